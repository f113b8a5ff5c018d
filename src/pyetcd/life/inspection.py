"""What a data directory holds, read offline and without a change to it.

Reads directories of etcd 2.0 to 3.7 and of pyetcd.  A damaged directory is read as far as it goes.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from typing import Container, List, NamedTuple, Optional, Tuple

from ..base.codec import decode_conf_change, decode_metadata
from ..base.errors import CodecError, FileLocked, WalError
from ..base.messages import Entry, EntryID, EntryType, Request, Snapshot
from ..disk.bolt import BoltError, BoltReader
from ..disk.files import _SNAP_NAME, _WAL_NAME
from ..disk.records import WalContents
from ..disk.snapshots import Snapshotter, decode_snapshot_file
from ..disk.wal import Wal
from ..member.applier import Applier, read_command
from ..member.cluster import Cluster
from ..net.workers import SYSTEM_CLOCK
from ..store.tree import Store
from .sources import (
    _ENTRIES_PER_WRITE,
    _READ_ONLY_DISK,
    BackupError,
    DataSource,
    OnProgress,
    _AnyVersionCluster,
    _step_progress,
    data_source,
    member_dirs,
    snapshot_files,
    with_lone_commits,
)


class Database(NamedTuple):
    """What the database of etcd 3 beside the snapshots says about itself."""

    path: str
    fault: str                      # why it cannot be read; ""
    consistent_index: int           # raft index up to which it holds what was applied
    storage_version: str            # "3.6.0"; "" before etcd 3.6
    keys: int                       # revisions of keys of v3


class CommandEntry(NamedTuple):
    """An entry behind the snapshot that holds a command of v2."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    committed: bool
    request: Request


class Inspection:
    """A data directory, as far as it could be read."""

    def __init__(self, path: str, wal_dir: str, snap_dir: str, progress: OnProgress) -> None:
        disk, known = _READ_ONLY_DISK, set(Wal.snapshots(wal_dir, disk=_READ_ONLY_DISK))
        self.faults: List[str] = []     # what is damaged or missing, each with what it means
        try:
            Snapshotter(snap_dir, disk=disk).check_log(wal_dir, known)
        except WalError as error:
            self.faults.append(str(error))
        snapshot, self.snapshot_name = self._newest_intact_snapshot(snap_dir, known)
        start = snapshot.id if snapshot else EntryID(0, 0)
        contents, damage = Wal.read_until_damage(wal_dir, start, disk=disk)
        if damage:
            last = contents.entries[-1].index if contents.entries else start.index
            self.faults.append(f"{damage}; the log is read up to entry {last}")
        self.source = self._source(path, snapshot, contents)
        segments = filter(_WAL_NAME.fullmatch, disk.listdir(wal_dir))
        self.segments = [(n, os.path.getsize(os.path.join(wal_dir, n))) for n in segments]
        self.snapshot_files = list(filter(_SNAP_NAME.fullmatch, disk.listdir(snap_dir)))
        self.voters_recorded = start in Wal.voters_recorded(wal_dir, disk=disk)     # of snapshot
        self.database = _read_database(os.path.join(snap_dir, "db"))
        # One that came with the snapshot, and waits to replace the present one.
        self.received_database = snapshot is not None and os.path.exists(
            os.path.join(snap_dir, f"{snapshot.index:016x}.snap.db"))
        self.commands: List[CommandEntry] = []
        self.v3_entries = self.changes = 0      # behind the snapshot; changes of members
        self.applied_at: List[Tuple[int, int]] = []     # (store index, raft index), ascending
        # These two are as of the last committed entry that could be applied.
        self.store = Store()
        self.cluster: Cluster = _AnyVersionCluster(self.store)
        self._applier = Applier(
            self.store, self.cluster, self.source.member_id, SYSTEM_CLOCK.wall_ns)
        self._recover(snapshot, progress)
        # Files and empty directories in the snapshot, not hidden; nodes with a higher index were
        # written by the log.
        self.snapshot_paths = [
            path for space in ("/1", "/2") for path, node in self.store.nodes_below(space)
            if not node.children and "/_" not in path]
        self.snapshot_etcd_index = self.store.current_index
        self._replay(progress)

    @property
    def cluster_version(self) -> str:
        """The version that all members had, "2.3.0"; "" if it was never decided."""
        return self.store.value("/0/version") or ""

    def place(self, modified_index: int) -> int:
        """Return the raft index of the entry that wrote a node last; 0: it is in the snapshot."""
        if modified_index <= self.snapshot_etcd_index:
            return 0
        at = bisect.bisect_left(self.applied_at, (modified_index, 0))
        return self.applied_at[at][1] if at < len(self.applied_at) else 0

    def _newest_intact_snapshot(
        self, directory: str, known: Container[EntryID]
    ) -> Tuple[Optional[Snapshot], str]:
        for path, id in snapshot_files(directory):
            if id in known:
                try:
                    return decode_snapshot_file(_READ_ONLY_DISK.read(path)), os.path.basename(path)
                except CodecError as error:
                    self.faults.append(f"{path} is damaged ({error}), so the one before counts")
        return None, ""

    def _source(self, path: str, snapshot: Optional[Snapshot], contents: WalContents) -> DataSource:
        member_id = cluster_id = 0
        try:
            member_id, cluster_id = decode_metadata(contents.metadata)
        except CodecError as error:
            self.faults.append(f"the log does not say whose it is ({error})")
        source = data_source(path, member_id, cluster_id, snapshot, contents)
        with contextlib.suppress(CodecError):
            source = with_lone_commits(source)
        return source

    def _recover(self, snapshot: Optional[Snapshot], progress: OnProgress) -> None:
        if snapshot is None:
            return
        try:
            self.store.recover(snapshot.data, _step_progress(progress, 0.0, 0.8))
            self.cluster.recover()
        except ValueError as error:
            self.faults.append(f"the snapshot at index {snapshot.index} holds no state of a v2"
                               f" store ({error})")

    def _replay(self, progress: OnProgress) -> None:
        """Apply the entries, and note which of them gave the store which index."""
        entries = self.source.entries
        for number, entry in enumerate(entries):
            if not number % _ENTRIES_PER_WRITE:
                progress(0.8 + 0.2 * number / len(entries), 0)
            committed = number < self.source.committed
            try:
                if entry.type == EntryType.NORMAL:
                    self._take_command(entry, committed)
                else:
                    self.changes += 1
                    if committed:
                        self._applier.apply_conf_change(decode_conf_change(entry.data))
            except ValueError as error:     # CodecError is one
                self.faults.append(f"entry {entry.index} cannot be applied: {error}")
            if committed:
                self.applied_at.append((self.store.current_index, entry.index))

    def _take_command(self, entry: Entry, committed: bool) -> None:
        request = read_command(entry.data) if entry.data else None
        if request is not None:
            self.commands.append(CommandEntry(entry.index, committed, request))
            if committed:
                self._applier.apply_request(request)
        elif entry.data:
            self.v3_entries += 1


def inspect_dir(path: str, wal_dir: str, progress: OnProgress) -> Inspection:
    """Read a data directory.  Raises BackupError if it is none, or may not be read."""
    if not os.path.isdir(path):
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise BackupError(f"{path} {what}; name the data directory of a member")
    try:
        return Inspection(path, *member_dirs(path, wal_dir), progress)
    except FileLocked:
        raise BackupError(f"{path} belongs to a member in this process; stop it first") from None
    except OSError as error:
        raise BackupError(f"cannot read {path}: {error}; run this as the member's user") from error


def _read_database(path: str) -> Optional[Database]:
    if not os.path.exists(path):
        return None
    try:
        with BoltReader(path) as reader:
            meta = dict(reader.items(b"meta"))
            keys = sum(1 for _ in reader.items(b"key"))
    except (BoltError, OSError) as error:
        return Database(path, str(error), 0, "", 0)
    index = int.from_bytes(meta.get(b"consistent_index", b""), "big")
    version = meta.get(b"storageVersion", b"").decode("utf-8", "replace")
    return Database(path, "", index, version, keys)
