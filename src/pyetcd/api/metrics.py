"""Metrics of one member."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Callable, Dict, Mapping

from ..base.limits import NS, SERVER_VERSION
from ..base.system import open_files_limit, resident_bytes_max
from ..member.cluster import format_id
from ..member.server import EtcdServer
from ..member.statistics import Labels, Metrics
from ..raft.core import Status
from ..store.tree import Store
from .gojson import raft_state_name


def _raft_status(status: Status) -> Dict[str, object]:
    """The variable raft.status."""
    return {
        "id": format_id(status.id), "term": status.term, "vote": format_id(status.vote),
        "commit": status.commit, "lead": format_id(status.lead),
        "raftState": raft_state_name(status.role),
        "progress": {
            format_id(each): {
                "match": match, "next": next_, "state": "ProgressState" + state.capitalize(),
            }
            for each, (match, next_, state) in status.progress.items()
        },
    }


def _where_time_goes(server: EtcdServer) -> Dict[str, object]:
    """The variables reactor, journal and queues: seconds, and how much waits where."""
    reactor, journal, log = server.reactor, server.journal, server.node.raft.log
    return {
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


def _proc_text(name: str) -> str:
    """A file of this process in /proc; "" where there is none."""
    try:
        with open(f"/proc/self/{name}", encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _resident_bytes() -> int:
    """Memory in use; where the system does not tell, the most ever used."""
    pages = _proc_text("statm").split()
    if len(pages) > 1:
        return int(pages[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident_bytes_max()


def _virtual_bytes() -> int:
    pages = _proc_text("statm").split()
    return int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def _open_descriptors(now: Callable[[], float]) -> Callable[[], int]:
    """Return what counts them, once a second: that takes 0.3 us for each."""
    return lambda: _count_descriptors(int(now()))


@functools.lru_cache(maxsize=1)
def _count_descriptors(second: int) -> int:
    for directory in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return len(os.listdir(directory)) - 1       # less the one that lists them
    return 0


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _add_server(metrics: Metrics, server: EtcdServer) -> None:
    """Names of etcd 2.3 first, then those that 3.x has for the same."""
    proposals, counts = server.proposals, server.counts
    metrics.gauge("etcd_server_file_descriptors_used_total", "Open file descriptors.",
                  _open_descriptors(server.reactor.now))
    metrics.gauge("etcd_server_pending_proposal_total", "Proposals waiting for an answer.",
                  lambda: len(proposals))
    metrics.total("etcd_server_proposal_failed_total", "Proposals without an answer in time.",
                  lambda: {(): proposals.failed})
    metrics.gauge("etcd_server_proposals_pending", "Proposals waiting for an answer.",
                  lambda: len(proposals))
    metrics.total("etcd_server_proposals_failed_total", "Proposals without an answer in time.",
                  lambda: {(): proposals.failed})
    metrics.total("etcd_server_slow_apply_total", "Turns that applied for more than 100 ms.",
                  lambda: {(): counts.slow_applies})
    metrics.add("pyetcd_reactor_turn_seconds", "Time of one turn of the main loop.",
                counts.turn_durations)
    metrics.total("pyetcd_reactor_seconds_total", "Where the time of the main loop goes.",
                  lambda: {(name,): s for name, s in server.reactor.phase_seconds.items()},
                  ("phase",))
    metrics.fact("etcd_server_id", "Id of this member, in hex.", "server_id",
                 lambda: format_id(server.member_id))
    metrics.fact("etcd_server_version", "The etcd version that this member acts as.",
                 "server_version", lambda: SERVER_VERSION)
    metrics.fact("etcd_cluster_version", "The version that all members understand.",
                 "cluster_version", lambda: server.cluster.version or "not_decided")


def _add_raft(metrics: Metrics, server: EtcdServer) -> None:
    """Names of etcd 3.x: what its dashboards and alerts ask first."""
    log, counts = server.node.raft.log, server.counts
    metrics.gauge("etcd_server_has_leader", "1 if a leader is known, else 0.",
                  lambda: int(server.lead != 0))
    metrics.gauge("etcd_server_is_leader", "1 if this member leads, else 0.",
                  lambda: int(server.is_leader))
    metrics.total("etcd_server_leader_changes_seen_total", "Leaders that became known.",
                  lambda: {(): counts.leader_changes})
    metrics.total("etcd_server_heartbeat_send_failures_total",
                  "Heartbeats to followers that left a period late or more.",
                  lambda: {(): counts.late_heartbeats})
    metrics.gauge("etcd_server_proposals_committed_total", "Raft index that is committed.",
                  lambda: log.commit)
    metrics.gauge("etcd_server_proposals_applied_total", "Raft index that is applied.",
                  lambda: server.raft_index)


def _add_store(metrics: Metrics, server: EtcdServer) -> None:
    store = server.store
    metrics.total("etcd_store_expires_total", "Keys that expired.",
                  lambda: {(): store.stats.expire_count})
    metrics.gauge("etcd_store_watchers", "Registered watchers.", lambda: store.stats.watchers)
    for suffix, outcome in (("", "success"), ("_failed", "fail")):
        ended = "succeeded" if outcome == "success" else "failed"
        metrics.total(f"etcd_store_reads{suffix}_total", f"Store reads that {ended}.",
                      functools.partial(_read_counts, store, outcome), ("action",))
        metrics.total(f"etcd_store_writes{suffix}_total", f"Store writes that {ended}.",
                      functools.partial(_write_counts, store, outcome), ("action",))


def _add_disk(metrics: Metrics, server: EtcdServer) -> None:
    log, snapshots = server.node.raft.log, server.snapshots
    syncs = server.journal.writer.sync_durations
    help = "Time to write a batch to the log and sync it."
    metrics.add("etcd_wal_fsync_durations_seconds", help, syncs)
    metrics.add("etcd_disk_wal_fsync_duration_seconds", help, syncs)    # 3.x
    metrics.gauge("etcd_wal_last_index_saved", "Last raft index on disk.", lambda: log.stable)
    metrics.add("etcd_snapshot_save_total_durations_seconds",
                "Time from the decision to snapshot until the file is there.",
                snapshots.save_durations)
    metrics.add("etcd_snapshot_save_marshalling_durations_seconds",
                "Time of the reactor to encode a snapshot.", snapshots.work_durations)
    metrics.add("pyetcd_wal_batch_entries", "Entries that one write and sync made durable.",
                server.journal.batch_entries)


def _add_peers(metrics: Metrics, server: EtcdServer) -> None:
    """Two names of etcd 2.3, and those of 3.x."""
    traffic = server.traffic

    def by_peer(counts: Mapping[int, int]) -> Callable[[], Dict[Labels, float]]:
        return lambda: {(format_id(peer),): count for peer, count in counts.items()}

    metrics.add("etcd_rafthttp_message_sent_latency_seconds",
                "Time until the system took a message; by pipeline: until it was answered.",
                traffic.latencies)
    metrics.add("etcd_rafthttp_message_sent_failed_total", "Messages lost or dropped.",
                traffic.failures)
    metrics.total("etcd_network_peer_sent_bytes_total", "Bytes of messages to a peer.",
                  by_peer(traffic.sent_bytes), ("To",))
    metrics.total("etcd_network_peer_sent_failures_total", "Messages lost or dropped.",
                  by_peer(traffic.sent_failures), ("To",))
    metrics.total("etcd_network_peer_received_bytes_total", "Bytes of messages from a peer.",
                  by_peer(traffic.received_bytes), ("From",))
    metrics.add("etcd_network_peer_round_trip_time_seconds",
                "Time of a probe to a peer and back.", traffic.round_trips)


def add_process_readings(
    metrics: Metrics, started_ns: int, now: Callable[[], float]
) -> None:
    """Register what the system knows of this process.  started_ns: unix nanoseconds."""
    metrics.total("process_cpu_seconds_total", "CPU time in seconds.",
                  lambda: {(): _cpu_seconds()})
    metrics.gauge("process_open_fds", "Open file descriptors.", _open_descriptors(now))
    metrics.gauge("process_max_fds", "Limit of open file descriptors.", open_files_limit)
    metrics.gauge("process_resident_memory_bytes", "Resident memory.", _resident_bytes)
    metrics.gauge("process_virtual_memory_bytes", "Virtual memory.", _virtual_bytes)
    metrics.gauge("process_start_time_seconds", "Start of this member, unix seconds.",
                  lambda: started_ns / NS)


_WRITE_ACTIONS = {
    "set": "sets", "create": "create", "update": "update", "delete": "delete",
    "compareAndSwap": "compare_and_swap", "compareAndDelete": "compare_and_delete",
}


def _write_counts(store: Store, outcome: str) -> Dict[Labels, float]:
    """Counters of the store's statistics by action; what never happened is left out."""
    counts = (
        (action, getattr(store.stats, f"{name}_{outcome}"))
        for action, name in _WRITE_ACTIONS.items()
    )
    return {(action,): count for action, count in counts if count}


def _read_counts(store: Store, outcome: str) -> Dict[Labels, float]:
    """Likewise; the store's statistics do not tell which gets were recursive."""
    recursive = store.recursive_gets[outcome]
    single = getattr(store.stats, f"gets_{outcome}") - recursive
    counts = (("get", single), ("getRecursive", recursive))
    return {(action,): count for action, count in counts if count}
