"""Bootstrap of a member that has a log: identity, log and snapshot come from the disk."""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import Iterator, Optional, Sequence, Set

from ..base.basics import fsync_dir
from ..base.codec import decode_conf_change, decode_metadata, encode_conf_change
from ..base.errors import CodecError, SnapshotError, StartError
from ..base.limits import DEFAULT_CLUSTER_TOKEN
from ..base.messages import (
    ConfChange,
    ConfChangeType,
    Entry,
    EntryID,
    EntryType,
    HardState,
    Snapshot,
)
from ..base.text import utf8
from ..base.versions import choose_identity
from ..disk.records import WalContents
from ..disk.snapshots import DataDir, Snapshotter
from ..disk.wal import Wal
from ..member.applier import read_command
from ..member.cluster import SERVER_LOG, Cluster, Member, format_id
from ..member.configuration import Bootstrap, ServerConfig
from ..store.tree import Store
from .addresses import (
    _bootstrap_entries,
    _initial_members,
    _log_config,
    _new_cluster,
    default_initial_cluster,
)

_FORCED_FILE = "forced-new-cluster"     # in the member directory, after -force-new-cluster


def _check_not_forced(marker: str) -> None:
    """Raise StartError if this data directory had a -force-new-cluster before.

    Differs from etcd, which removes the other members again at each restart with that flag.
    """
    if os.path.exists(marker):
        raise StartError(
            f"-force-new-cluster was already done on this data directory; done again it would"
            f" remove the members that have joined since. Take it out of the unit file or the"
            f" environment (ETCD_FORCE_NEW_CLUSTER) and start again; if the other members are lost"
            f" once more, remove {marker} first"
        )


def _mark_forced(marker: str) -> None:
    """Record a -force-new-cluster on the disk.  Raises OSError."""
    with open(marker, "wb") as file:
        os.fsync(file.fileno())
    fsync_dir(os.path.dirname(marker))
    SERVER_LOG.warning(
        "this member is the only one of its cluster now; take -force-new-cluster out before the"
        " next start, which is refused with it"
    )


def _log_void_flags(config: ServerConfig, data_dir: DataDir) -> None:
    """Log the flags that an existing log makes void; etcd does so for discovery only."""
    if config.discovery:
        SERVER_LOG.warning(
            "discovery token ignored since a cluster has already been initialized."
            ' Valid log found at "%s"', data_dir.wal,
        )
    void = [name for name, is_given in (
        ("initial-cluster", config.initial_cluster not in ("", default_initial_cluster(config))),
        ("initial-cluster-token", config.initial_cluster_token != DEFAULT_CLUSTER_TOKEN),
        ("initial-cluster-state", config.initial_cluster_state == "existing"),
        ("discovery-srv", bool(config.discovery_srv)), ("proxy", config.proxy != "off"),
    ) if is_given]
    if void:
        SERVER_LOG.info(
            "the member in %s exists already, so its log counts and not -%s", data_dir.root,
            ", -".join(void),
        )


def _restart(config: ServerConfig, data_dir: DataDir) -> Bootstrap:
    marker = os.path.join(data_dir.member, _FORCED_FILE)
    if config.force_new_cluster:
        _check_not_forced(marker)
    _log_void_flags(config, data_dir)
    _log_config(config, data_dir)
    store = Store(history_capacity=config.history_events)
    cluster = Cluster(store)
    snapshotter = Snapshotter(data_dir.snap)
    known = set(Wal.snapshots(data_dir.wal))
    snapshotter.check_log(data_dir.wal, known)
    snapshot = snapshotter.load(known)
    start = EntryID(0, 0)
    if snapshot is not None:
        start = snapshot.id
        _recover(store, snapshot)
    wal, contents = Wal.open(data_dir.wal, start)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(wal.close)
        member_id, cluster.id = decode_metadata(contents.metadata)
        cluster.local_id = member_id
        cluster.identity = choose_identity(
            config.compat_version, store.value("/0/version"), *_logged_versions(contents.entries)
        )
        if snapshot is not None:
            cluster.recover()
            snapshot = snapshot._replace(data=b"")
        if config.force_new_cluster:
            contents = _stand_alone(config, member_id, cluster.id, wal, contents, snapshot)
            _mark_forced(marker)
        else:
            SERVER_LOG.info(
                "restart member %s in cluster %s at commit index %d", format_id(member_id),
                format_id(cluster.id), contents.hard_state.commit,
            )
        boot = Bootstrap(data_dir, member_id, cluster, store, wal, snapshotter, contents, snapshot)
        if _is_blank(boot):
            boot = _begin_again(config, boot)
        on_failure.pop_all()
    return boot


def _recover(store: Store, snapshot: Snapshot) -> None:
    try:
        store.recover(snapshot.data)
    except ValueError as error:
        raise SnapshotError(
            f"the snapshot at index {snapshot.index} does not hold a v2 store ({error});"
            f" move its file away to use the one before"
        ) from None
    SERVER_LOG.info("recovered store from snapshot at index %d", snapshot.index)


def _logged_versions(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield the cluster versions that the entries set, for one that no snapshot holds yet."""
    for entry in entries:
        if b"/0/version" in entry.data and entry.type == EntryType.NORMAL:
            with contextlib.suppress(CodecError):
                request = read_command(entry.data)
                if request is not None and request.path == "/0/version":
                    yield request.val


def _is_blank(boot: Bootstrap) -> bool:
    """True if the member created its log, but ended before its first write."""
    contents = boot.contents
    return not contents.entries and boot.snapshot is None and contents.hard_state == HardState()


def _begin_again(config: ServerConfig, boot: Bootstrap) -> Bootstrap:
    """Give the first entries of a new cluster to a member that crashed before it wrote them.

    The flags must lead to the same ids.  Otherwise, and after discovery or joining, the other
    members have the log and send it.  Differs from etcd: a single member never gets a voter.
    """
    if config.discovery or config.discovery_srv or config.initial_cluster_state == "existing":
        return boot
    initial = _initial_members(config)
    cluster, own = _new_cluster(config, config.initial_cluster_token, initial)
    if (own.id, cluster.id) != (boot.member_id, boot.cluster.id):
        return boot
    cluster.store = boot.store
    return boot._replace(cluster=cluster, bootstrap_entries=_bootstrap_entries(cluster))


def _stand_alone(
    config: ServerConfig, member_id: int, cluster_id: int, wal: Wal, contents: WalContents,
    snapshot: Optional[Snapshot],
) -> WalContents:
    """Remove the lost members in the log of this one (-force-new-cluster); return its contents.

    Entries after the commit index, up to the removal of this member, are kept: they may be
    committed, as the index on disk lags.  Committed entries that remove every other voter follow.
    Source: etcd 2.3 etcdserver/raft.go restartAsStandaloneNode.  Differs from etcd, which drops
    all entries after the commit index, and so the last acknowledged writes.
    """
    state = contents.hard_state
    kept = list(itertools.takewhile(
        lambda entry: entry.index <= state.commit or not _removes(entry, member_id),
        contents.entries,
    ))
    if len(kept) < len(contents.entries):
        SERVER_LOG.info("discarding %d uncommitted WAL entries ", len(contents.entries) - len(kept))
    if kept:
        state = state._replace(commit=max(state.commit, kept[-1].index))
    voters = _voters(snapshot.voters if snapshot else (), kept)
    changes = [
        ConfChange(0, ConfChangeType.REMOVE_NODE, voter) for voter in sorted(voters - {member_id})
    ]
    if member_id not in voters:
        own = Member(member_id, tuple(config.initial_advertise_peer_urls))
        context = utf8(own.context_json())
        changes.append(ConfChange(0, ConfChangeType.ADD_NODE, member_id, context))
    added = [
        Entry(EntryType.CONF_CHANGE, state.term, index, encode_conf_change(change))
        for index, change in enumerate(changes, state.commit + 1)
    ]
    state = state._replace(commit=state.commit + len(added))
    wal.write(wal.encode(state, added), sync=True)
    SERVER_LOG.info(
        "forcing restart of member %s in cluster %s at commit index %d", format_id(member_id),
        format_id(cluster_id), state.commit,
    )
    return contents._replace(hard_state=state, entries=kept + added)


def _removes(entry: Entry, member_id: int) -> bool:
    if entry.type != EntryType.CONF_CHANGE:
        return False
    change = decode_conf_change(entry.data)
    return change.type == ConfChangeType.REMOVE_NODE and change.node_id == member_id


def _voters(voters: Sequence[int], entries: Sequence[Entry]) -> Set[int]:
    ids = set(voters)
    for entry in entries:
        if entry.type == EntryType.CONF_CHANGE:
            change = decode_conf_change(entry.data)
            if change.type == ConfChangeType.ADD_NODE:
                ids.add(change.node_id)
            elif change.type == ConfChangeType.REMOVE_NODE:
                ids.discard(change.node_id)
    return ids
