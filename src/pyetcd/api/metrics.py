"""Metrics of one member, and the variables of /debug/vars."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
from typing import Callable, Dict, Mapping, Tuple

from ..base.limits import NS
from ..base.system import open_files_limit, resident_bytes_max
from ..member.cluster import format_id
from ..member.server import EtcdServer
from ..member.statistics import Family, Labels, Metrics
from ..raft.core import Raft, RaftRole
from ..store.tree import Store
from .gojson import raft_state_name

_PROPOSALS_PENDING = "Proposals waiting for an answer."
_PROPOSALS_FAILED = "Proposals without an answer in time."
_SYNC = "Time to write a batch to the log and sync it."
_LOST = "Messages lost or dropped."

# Name, help, reading.  Names of etcd 2.3, and those that 3.x has for the same.
_GAUGES: Tuple[Tuple[str, str, Callable[[EtcdServer], float]], ...] = (
    ("etcd_server_pending_proposal_total", _PROPOSALS_PENDING, lambda s: len(s.proposals)),
    ("etcd_server_proposals_pending", _PROPOSALS_PENDING, lambda s: len(s.proposals)),
    ("etcd_server_has_leader", "1 if a leader is known, else 0.", lambda s: int(s.lead != 0)),
    ("etcd_server_is_leader", "1 if this member leads, else 0.", lambda s: int(s.is_leader)),
    ("etcd_server_proposals_committed_total", "Raft index that is committed.",
     lambda s: s.node.raft.log.commit),
    ("etcd_server_proposals_applied_total", "Raft index that is applied.",
     lambda s: s.raft_index),
    ("etcd_store_watchers", "Registered watchers.", lambda s: s.store.stats.watchers),
    ("pyetcd_store_keys", "Keys and directories, those of the cluster itself included.",
     lambda s: len(s.store)),
    ("pyetcd_store_bytes", "Characters of keys and values: bytes, where they are ASCII.",
     lambda s: s.store.chars),
    ("etcd_wal_last_index_saved", "Last raft index on disk.", lambda s: s.node.raft.log.stable),
)
_COUNTERS: Tuple[Tuple[str, str, Callable[[EtcdServer], float]], ...] = (
    ("etcd_server_proposal_failed_total", _PROPOSALS_FAILED, lambda s: s.proposals.failed),
    ("etcd_server_proposals_failed_total", _PROPOSALS_FAILED, lambda s: s.proposals.failed),
    ("etcd_server_slow_apply_total", "Turns that applied for more than 100 ms.",
     lambda s: s.counts.slow_applies),
    ("etcd_server_leader_changes_seen_total", "Leaders that became known.",
     lambda s: s.counts.leader_changes),
    ("etcd_server_heartbeat_send_failures_total",
     "Heartbeats to followers that left a period late or more.",
     lambda s: s.counts.late_heartbeats),
    ("pyetcd_v3_entries_skipped_total", "Entries of etcd's v3 API, which are not applied.",
     lambda s: s.applier.v3_entries),
    ("etcd_store_expires_total", "Keys that expired.", lambda s: s.store.stats.expire_count),
)
# Name, help, label, its value: samples that are always 1.
_FACTS: Tuple[Tuple[str, str, str, Callable[[EtcdServer], str]], ...] = (
    ("etcd_server_id", "Id of this member, in hex.", "server_id",
     lambda s: format_id(s.member_id)),
    ("etcd_server_version", "The etcd version that this member acts as.", "server_version",
     lambda s: s.cluster.identity.reported),
    ("etcd_cluster_version", "The version that all members understand.", "cluster_version",
     lambda s: s.cluster.version or "not_decided"),
)
_HISTOGRAMS: Tuple[Tuple[str, str, Callable[[EtcdServer], Family]], ...] = (
    ("pyetcd_reactor_turn_seconds", "Time of one turn of the main loop.",
     lambda s: s.counts.turn_durations),
    ("etcd_wal_fsync_durations_seconds", _SYNC, lambda s: s.journal.writer.sync_durations),
    ("etcd_disk_wal_fsync_duration_seconds", _SYNC, lambda s: s.journal.writer.sync_durations),
    ("etcd_snapshot_save_total_durations_seconds",
     "Time from the decision to snapshot until the file is there.",
     lambda s: s.snapshots.save_durations),
    ("etcd_snapshot_save_marshalling_durations_seconds",
     "Time of the reactor to encode a snapshot.", lambda s: s.snapshots.work_durations),
    ("pyetcd_wal_batch_entries", "Entries that one write and sync made durable.",
     lambda s: s.journal.batch_entries),
    ("etcd_rafthttp_message_sent_latency_seconds",
     "Time until the system took a message; by pipeline: until it was answered.",
     lambda s: s.traffic.latencies),
    ("etcd_rafthttp_message_sent_failed_total", _LOST, lambda s: s.traffic.failures),
    ("etcd_network_peer_round_trip_time_seconds", "Time of a probe to a peer and back.",
     lambda s: s.traffic.round_trips),
)
# Name, help, label, counts by member id.
_BY_PEER: Tuple[Tuple[str, str, str, Callable[[EtcdServer], Mapping[int, int]]], ...] = (
    ("etcd_network_peer_sent_bytes_total", "Bytes of messages to a peer.", "To",
     lambda s: s.traffic.sent_bytes),
    ("etcd_network_peer_sent_failures_total", _LOST, "To", lambda s: s.traffic.sent_failures),
    ("etcd_network_peer_received_bytes_total", "Bytes of messages from a peer.", "From",
     lambda s: s.traffic.received_bytes),
)


def add_member_metrics(server: EtcdServer) -> None:
    metrics, store, partial = server.metrics, server.store, functools.partial
    for name, help, read in _GAUGES:
        metrics.gauge(name, help, partial(read, server))
    for name, help, read in _COUNTERS:
        metrics.total(name, help, partial(_unlabelled, read, server))
    for name, help, label, text in _FACTS:
        metrics.fact(name, help, label, partial(text, server))
    for name, help, family in _HISTOGRAMS:
        metrics.add(name, help, family(server))
    for name, help, label, counts in _BY_PEER:
        metrics.total(name, help, partial(_by_peer, counts(server)), (label,))
    for suffix, outcome, ended in (("", "success", "succeeded"), ("_failed", "fail", "failed")):
        metrics.total(f"etcd_store_reads{suffix}_total", f"Store reads that {ended}.",
                      partial(_read_counts, store, outcome), ("action",))
        metrics.total(f"etcd_store_writes{suffix}_total", f"Store writes that {ended}.",
                      partial(_write_counts, store, outcome), ("action",))
    metrics.total("pyetcd_reactor_seconds_total", "Where the time of the main loop goes.",
                  lambda: {(name,): s for name, s in server.reactor.phase_seconds.items()},
                  ("phase",))
    metrics.gauge("etcd_server_file_descriptors_used_total", "Open file descriptors.",
                  _open_descriptors(server.reactor.now))
    add_process_readings(metrics, server.stats.started_ns, server.reactor.now)


def _unlabelled(read: Callable[[EtcdServer], float], server: EtcdServer) -> Dict[Labels, float]:
    return {(): read(server)}


def _by_peer(counts: Mapping[int, int]) -> Dict[Labels, float]:
    return {(format_id(peer),): count for peer, count in counts.items()}


_WRITE_ACTIONS = {
    "set": "sets", "create": "create", "update": "update", "delete": "delete",
    "compareAndSwap": "compare_and_swap", "compareAndDelete": "compare_and_delete",
}


def _write_counts(store: Store, outcome: str) -> Dict[Labels, float]:
    """Return the writes of the store's statistics by action, without actions at 0."""
    counts = (
        (action, getattr(store.stats, f"{name}_{outcome}"))
        for action, name in _WRITE_ACTIONS.items()
    )
    return {(action,): count for action, count in counts if count}


def _read_counts(store: Store, outcome: str) -> Dict[Labels, float]:
    """Return the reads likewise; the store counts recursive ones beside its statistics."""
    recursive = store.recursive_gets[outcome]
    single = getattr(store.stats, f"gets_{outcome}") - recursive
    counts = (("get", single), ("getRecursive", recursive))
    return {(action,): count for action, count in counts if count}


# -- the process -----------------------------------------------------------------


def add_process_readings(metrics: Metrics, started_ns: int, now: Callable[[], float]) -> None:
    metrics.total("process_cpu_seconds_total", "CPU time in seconds.",
                  lambda: {(): sum(os.times()[:2])})
    metrics.gauge("process_open_fds", "Open file descriptors.", _open_descriptors(now))
    metrics.gauge("process_max_fds", "Limit of open file descriptors.", open_files_limit)
    metrics.gauge("process_resident_memory_bytes", "Resident memory.", _resident_bytes)
    metrics.gauge("process_virtual_memory_bytes", "Virtual memory.", lambda: _statm_bytes(0))
    metrics.gauge("process_start_time_seconds", "Start of this member, unix seconds.",
                  lambda: started_ns / NS)


def _statm_bytes(field: int) -> int:
    """Return a field of /proc/self/statm in bytes; 0 where that file does not exist."""
    try:
        with open("/proc/self/statm", encoding="ascii", errors="replace") as file:
            return int(file.read().split()[field]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _resident_bytes() -> int:
    """Return the memory in use; without /proc, the most that was ever in use."""
    return _statm_bytes(1) or resident_bytes_max()


def _open_descriptors(now: Callable[[], float]) -> Callable[[], int]:
    """Return a reading that counts once a second: the count takes 0.3 us per descriptor."""
    return lambda: _count_descriptors(int(now()))


@functools.lru_cache(maxsize=1)
def _count_descriptors(second: int) -> int:
    for directory in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return len(os.listdir(directory)) - 1       # less the one of listdir itself
    return 0


# -- /debug/vars -----------------------------------------------------------------


def debug_variables(server: EtcdServer) -> Dict[str, object]:
    """Return the variables of etcd, then those that show where time is spent and work waits."""
    reactor, journal, log = server.reactor, server.journal, server.node.raft.log
    return {
        "cmdline": [sys.executable, *sys.argv],
        "file_descriptor_limit": open_files_limit(),
        "memstats": {
            "Alloc": _resident_bytes(), "Sys": _statm_bytes(0),
            "NumGC": sum(generation["collections"] for generation in gc.get_stats()),
        },
        "raft.status": _raft_status(server.node.raft),
        "reactor": {
            "turns": reactor.turns, "mean_turn_s": server.counts.turn_durations.mean,
            "slowest_turn_s": reactor.slowest_turn_s, "seconds": reactor.phase_seconds,
        },
        "journal": {
            "visits": journal.visits, "mean_batch_entries": journal.batch_entries.mean,
            "mean_sync_s": journal.writer.sync_durations.mean, "busy": journal.busy,
        },
        "queues": {
            "proposals_pending": len(server.proposals), "reads_pending": len(server.reads),
            "entries_not_durable": log.last_index - log.stable,
            "entries_not_applied": log.commit - log.applied,
            "watchers_to_tell": server.store.hub.backlog,
        },
    }


def _raft_status(raft: Raft) -> Dict[str, object]:
    followed = raft.progress if raft.role is RaftRole.LEADER else {}
    return {
        "id": format_id(raft.id), "term": raft.term, "vote": format_id(raft.vote),
        "commit": raft.log.commit, "lead": format_id(raft.lead),
        "raftState": raft_state_name(raft.role),
        "progress": {
            format_id(id): {
                "match": progress.match_index, "next": progress.next_index,
                "state": "ProgressState" + progress.state.name.capitalize(),
            }
            for id, progress in followed.items()
        },
    }
