"""Backup and restore: the data of a member as files, and a new cluster from them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from typing import NamedTuple, Optional, Sequence, Tuple

from ..base.basics import fsync_dir
from ..base.codec import encode_metadata
from ..base.errors import DiskFull, StartError
from ..base.limits import DEFAULT_CLUSTER_TOKEN, DEFAULT_NAME, DEFAULT_PEER_URLS, UINT64_MAX
from ..base.messages import Entry, HardState
from ..base.urls import parse_urls
from ..base.versions import DEFAULT_IDENTITY
from ..disk.bolt import v3_buckets, write_bolt
from ..disk.files import OS_DISK
from ..disk.snapshots import SnapshotFile, Snapshotter
from ..disk.wal import Wal
from ..member.cluster import Cluster, Member, format_id
from ..member.configuration import ServerConfig
from ..member.snapshots import SnapshotJob
from ..net.workers import SYSTEM_CLOCK
from ..store.tree import Store
from .addresses import _initial_members, _new_cluster
from .bootstrap import _check_advertised
from .sources import (
    _ENTRIES_PER_WRITE,
    _STAGE,
    BackupError,
    CopyReport,
    OnProgress,
    _step_progress,
    load_state,
    read_source,
)

# -- writing ---------------------------------------------------------------------


class MemberFiles(NamedTuple):
    """The files that a member starts with."""

    member_id: int
    cluster_id: int
    snapshot: Optional[SnapshotFile]
    hard_state: HardState
    entries: Sequence[Entry]


def check_target(data_dir: str, wal_dir: str = "") -> None:
    """Raise BackupError unless both directories are empty or absent."""
    for path in filter(None, (data_dir, wal_dir)):
        try:
            found = set(os.listdir(path)) - {_STAGE}
        except FileNotFoundError:
            continue
        except OSError as error:
            raise BackupError(f"cannot use {path}: {error.strerror}; name another") from None
        if found:
            raise BackupError(f"{path} is not empty; name another directory, or move it away")


def write_member(data_dir: str, wal_dir: str, files: MemberFiles, progress: OnProgress) -> None:
    """Make a data directory: `member` appears when all is durable.  BackupError leaves no file."""
    stage = os.path.join(data_dir, _STAGE)
    wal_stage = os.path.join(wal_dir or stage, _STAGE if wal_dir else "wal")
    begun = [path for path in (data_dir, wal_dir) if path and not os.path.exists(path)]
    with contextlib.ExitStack() as on_failure:
        for path in (stage, wal_stage, *begun):
            on_failure.callback(shutil.rmtree, path, ignore_errors=True)
        try:
            for path in (stage, wal_stage):
                shutil.rmtree(path, ignore_errors=True)
            _fill_stage(stage, wal_stage, files, progress)
            if wal_dir:
                # The log first: a start refuses a log without its snapshot, but would pass over a
                # snapshot that its log does not know.
                for name in os.listdir(wal_stage):
                    os.rename(os.path.join(wal_stage, name), os.path.join(wal_dir, name))
                os.rmdir(wal_stage)
                fsync_dir(wal_dir)
            os.rename(stage, os.path.join(data_dir, "member"))
            fsync_dir(data_dir)
            for path in begun:
                with contextlib.suppress(PermissionError):  # a parent that this user cannot read
                    fsync_dir(os.path.dirname(os.path.abspath(path)))
        except (OSError, DiskFull) as error:
            raise BackupError(
                f"cannot write {data_dir}: {error}; make room and check who may write there"
            ) from error
        on_failure.pop_all()


def _fill_stage(stage: str, wal_stage: str, files: MemberFiles, progress: OnProgress) -> None:
    """Write all files.  The entries come first in the log, as etcdctl writes it."""
    snap = os.path.join(stage, "snap")
    for path in (os.path.dirname(stage), stage, snap, os.path.dirname(wal_stage)):
        os.makedirs(path, mode=0o700, exist_ok=True)
    snapshot = files.snapshot
    if snapshot is not None:
        Snapshotter(snap).write(snapshot)
        _write_bolt(os.path.join(snap, "db"), snapshot.id.index)
    metadata = encode_metadata(files.member_id, files.cluster_id)
    with contextlib.closing(Wal.create(wal_stage, metadata, segment_bytes=UINT64_MAX)) as wal:
        for first in range(0, len(files.entries), _ENTRIES_PER_WRITE):
            part = files.entries[first:first + _ENTRIES_PER_WRITE]
            wal.write(wal.encode(None, part), sync=False)
            progress(first / len(files.entries), 0)
        wal.write(wal.encode(files.hard_state, ()), sync=False)
        if snapshot is not None:
            wal.write(wal.encode_snapshot(snapshot.id), sync=False)
        wal.write(b"", sync=True)
    for path in (snap, wal_stage, stage):
        fsync_dir(path)


def _write_bolt(path: str, raft_index: int) -> None:
    """Write the database that etcd 3 wants beside a snapshot: without a key, up to raft_index."""
    with open(path, "w+b") as file:
        write_bolt(file, v3_buckets(raft_index))
        file.flush()
        OS_DISK.fsync(file.fileno())


# -- backup and restore ------------------------------------------------------------


def _no_progress(share: float, keys: int) -> None:
    pass


def backup(
    data_dir: str, backup_dir: str, *, wal_dir: str = "", backup_wal_dir: str = "",
    dry_run: bool = False, progress: OnProgress = _no_progress,
) -> CopyReport:
    """Copy the data of a member, which may be running, under new ids, as `etcdctl backup` does.

    The copy is for a start with -force-new-cluster: the snapshot and log of the source, with all
    indexes and member changes, without uncommitted entries.  progress is called with the share
    done, 0.0 to 1.0, and a number of keys.  Raises BackupError.
    Source: etcd 2.3 etcdctl/command/backup_command.go.
    """
    if not os.path.isdir(data_dir):
        what = "is a file" if os.path.exists(data_dir) else "does not exist"
        raise BackupError(
            f"{data_dir} {what}; name the data directory of a member, which its log shows as `data"
            f" dir =`, with -data-dir; a snapshot file is for `pyetcd restore`"
        )
    backup_wal_dir = _dedicated_wal_dir(backup_dir, backup_wal_dir)
    check_target(backup_dir, backup_wal_dir)
    source = read_source(data_dir, wal_dir)
    store, cluster = load_state(source, _step_progress(progress, 0.0, 0.7))
    file: Optional[SnapshotFile] = None
    if source.snapshot is not None:
        file = SnapshotFile.of(source.snapshot)
    entries = source.entries[:source.committed]
    new_ids = secrets.randbits(63) + 1, secrets.randbits(63) + 1
    state = source.hard_state._replace(commit=source.last.index)
    report = CopyReport(
        source, store.current_index, store.count_files("/1"),
        (file.size if file else 0) + sum(len(entry.data or b"") for entry in entries), *new_ids,
        tuple(sorted(cluster.members.values())), tuple(filter(None, (backup_dir, backup_wal_dir))),
    )
    if not dry_run:
        files = MemberFiles(*new_ids, file, state, entries)
        write_member(backup_dir, backup_wal_dir, files, _step_progress(progress, 0.7, 1.0))
    return report


def restore(
    source: str, name: str = DEFAULT_NAME, *, initial_cluster: str = "",
    initial_cluster_token: str = DEFAULT_CLUSTER_TOKEN,
    initial_advertise_peer_urls: Sequence[str] = (), data_dir: str = "", wal_dir: str = "",
    dry_run: bool = False, progress: OnProgress = _no_progress,
) -> CopyReport:
    """Make the data directory of member `name` of a new cluster, which starts with old data.

    source  a snapshot file, or a data directory, of which the committed entries count

    Call it for each member, with the same source.  Keys keep their indexes and expiry times;
    users and roles are kept.  The members are those given, with new ids.
    progress is called as by backup().  Raises BackupError.
    """
    data_dir = data_dir or name + ".etcd"
    wal_dir = _dedicated_wal_dir(data_dir, wal_dir)
    check_target(data_dir, wal_dir)
    cluster, own = _restored_cluster(ServerConfig(
        name=name, initial_cluster=initial_cluster, initial_cluster_token=initial_cluster_token,
        initial_advertise_peer_urls=tuple(initial_advertise_peer_urls),
    ))
    found = read_source(source)
    if found.voters & cluster.members.keys():
        raise BackupError(
            f"the new members would have ids of the old ones, and mix with them; name another"
            f" -initial-cluster-token than {initial_cluster_token}"
        )
    store, _ = load_state(found, _step_progress(progress, 0.0, 0.6))
    members = tuple(sorted(cluster.members.values()))
    _replace_members(store, members)
    job = SnapshotJob(store, found.last, tuple(member.id for member in members), SYSTEM_CLOCK.now)
    keys, expected = store.count_files("/1"), len(found.snapshot.data) if found.snapshot else 0
    while job.done is None:
        job.work()
        progress(0.6 + 0.3 * min(job.walked_bytes / (expected or job.walked_bytes), 1.0), keys)
    report = CopyReport(
        found, store.current_index, keys, job.done.size, own.id, cluster.id, members,
        tuple(filter(None, (data_dir, wal_dir))),
    )
    if not dry_run:
        state = HardState(found.last.term, 0, found.last.index)
        files = MemberFiles(own.id, cluster.id, job.done, state, ())
        write_member(data_dir, wal_dir, files, _step_progress(progress, 0.9, 1.0))
    return report


def _dedicated_wal_dir(data_dir: str, wal_dir: str) -> str:
    """Return wal_dir, or "" if it is the usual directory of the log."""
    usual = os.path.join(data_dir, "member", "wal")
    return "" if os.path.abspath(wal_dir) == os.path.abspath(usual) else wal_dir


def _restored_cluster(config: ServerConfig) -> Tuple[Cluster, Member]:
    """Return the new cluster and its member config.name.  Raises BackupError."""
    advertised = config.initial_advertise_peer_urls
    if not advertised and not config.initial_cluster:
        config = config._replace(initial_advertise_peer_urls=parse_urls(DEFAULT_PEER_URLS))
    try:
        initial = _initial_members(config)
        if advertised:
            _check_advertised(config, initial)
        return _new_cluster(config, config.initial_cluster_token, initial)
    except StartError as error:
        raise BackupError(str(error)) from None


def _replace_members(store: Store, members: Sequence[Member]) -> None:
    """Replace the members in the store, and drop a cluster version above this program's."""
    files = {
        f"/0/members/{format_id(member.id)}/raftAttributes": member.raft_attributes_json()
        for member in members
    }
    version = store.value("/0/version") or ""
    with contextlib.suppress(ValueError):
        if DEFAULT_IDENTITY.bears(version):
            files["/0/version"] = version
    store.replace_files("/0", files)
