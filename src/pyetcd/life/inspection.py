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
    _READ_ONLY_DISK,
    BackupError,
    DataSource,
    OnProgress,
    _AnyVersionCluster,
    with_lone_commits,
)

_ENTRIES_PER_STEP = 1_000           # between two calls of progress


class Database(NamedTuple):
    """What the database of etcd 3 beside the snapshots says about itself."""

    path: str
    fault: str                      # why it cannot be read; ""
    consistent_index: int           # raft index up to which it holds what was applied
    storage_version: str            # "3.6.0"; "" before etcd 3.6
    members: int                    # so many in it; 0 before etcd 3.5
    keys: int                       # revisions of keys of v3


class CommandEntry(NamedTuple):
    """An entry behind the snapshot that holds a command of v2."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    committed: bool
    request: Request


class Inspection(NamedTuple):
    """A data directory, as far as it could be read."""

    source: DataSource
    snap_dir: str
    faults: Tuple[str, ...]         # what is damaged or missing, each with what it means
    segments: Tuple[Tuple[str, int], ...]   # name, bytes
    snapshot_files: Tuple[str, ...]
    snapshot_name: str              # of the file that counts; ""
    voters_recorded: bool           # the log names the voters of that snapshot
    commands: Tuple[CommandEntry, ...]
    v3_entries: int                 # behind the snapshot
    changes: int                    # of members, likewise
    database: Optional[Database]
    store: Store                    # after the last committed entry that could be applied
    snapshot_paths: Tuple[str, ...]     # files and empty directories in the snapshot, not hidden
    snapshot_etcd_index: int        # nodes with a higher index were written by the log
    cluster: Cluster
    applied_at: Tuple[Tuple[int, int], ...]     # (store index, raft index) of entries, ascending

    @property
    def cluster_version(self) -> str:
        """The version that all members had, "2.3.0"; "" if it was never decided."""
        return self.store.value("/0/version") or ""

    @property
    def received_database(self) -> bool:
        """True if a database that came with the snapshot waits to replace the present one."""
        snapshot, snap_dir = self.source.snapshot, self.snap_dir
        return snapshot is not None and os.path.exists(
            os.path.join(snap_dir, f"{snapshot.index:016x}.snap.db"))

    @property
    def is_v3(self) -> bool:
        """True if etcd 3 has written here."""
        return self.database is not None or self.v3_entries > 0

    def place(self, modified_index: int) -> int:
        """Return the raft index of the entry that wrote a node last; 0: it is in the snapshot."""
        if modified_index <= self.snapshot_etcd_index:
            return 0
        at = bisect.bisect_left(self.applied_at, (modified_index, 0))
        return self.applied_at[at][1] if at < len(self.applied_at) else 0


def inspect_dir(path: str, wal_dir: str, progress: OnProgress) -> Inspection:
    """Read a data directory.  Raises BackupError if it is none, or may not be read."""
    if not os.path.isdir(path):
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise BackupError(f"{path} {what}; name the data directory of a member")
    member = os.path.join(path, "member")
    member = member if os.path.isdir(member) else path      # as etcd 2.0.0 has it
    wal_dir, snap_dir = wal_dir or os.path.join(member, "wal"), os.path.join(member, "snap")
    try:
        return _inspect(path, wal_dir, snap_dir, progress)
    except FileLocked:
        raise BackupError(f"{path} belongs to a member in this process; stop it first") from None
    except OSError as error:
        raise BackupError(f"cannot read {path}: {error}; run this as the member's user") from error


def _inspect(path: str, wal_dir: str, snap_dir: str, progress: OnProgress) -> Inspection:
    if not Wal.exists(wal_dir, disk=_READ_ONLY_DISK):
        raise BackupError(
            f"{path} is no data directory of a member: {wal_dir} holds no log; if the log is"
            f" elsewhere, name its directory with -wal-dir"
        )
    faults: List[str] = []
    known = set(Wal.snapshots(wal_dir, disk=_READ_ONLY_DISK))
    try:
        Snapshotter(snap_dir, disk=_READ_ONLY_DISK).check_log(wal_dir, known)
    except WalError as error:
        faults.append(str(error))
    snapshot, name = _newest_intact_snapshot(snap_dir, known, faults)
    start = EntryID(snapshot.term, snapshot.index) if snapshot else EntryID(0, 0)
    contents, damage = Wal.read_until_damage(wal_dir, start, disk=_READ_ONLY_DISK)
    if damage:
        last = contents.entries[-1].index if contents.entries else start.index
        faults.append(f"{damage}; the log is read up to entry {last}")
    source = _source(path, snapshot, contents, faults)
    state = _Replay(source, faults, progress)
    segments = [n for n in _READ_ONLY_DISK.listdir(wal_dir) if _WAL_NAME.fullmatch(n)]
    return Inspection(
        source, snap_dir, tuple(faults),
        tuple((n, os.path.getsize(os.path.join(wal_dir, n))) for n in segments),
        tuple(filter(_SNAP_NAME.fullmatch, _READ_ONLY_DISK.listdir(snap_dir))), name,
        start in Wal.voters_recorded(wal_dir, disk=_READ_ONLY_DISK),
        tuple(state.commands), state.v3_entries, state.changes,
        _read_database(os.path.join(snap_dir, "db")), state.store,
        state.snapshot_paths, state.snapshot_etcd_index, state.cluster, tuple(state.applied_at),
    )


def _newest_intact_snapshot(
    directory: str, known: Container[EntryID], faults: List[str]
) -> Tuple[Optional[Snapshot], str]:
    """Return the newest intact snapshot that the log knows, and the name of its file."""
    for name in reversed(_READ_ONLY_DISK.listdir(directory)):
        match = _SNAP_NAME.fullmatch(name)
        if not match or EntryID(int(match.group(1), 16), int(match.group(2), 16)) not in known:
            continue
        try:
            content = _READ_ONLY_DISK.read(os.path.join(directory, name))
            return decode_snapshot_file(content), name
        except CodecError as error:
            faults.append(f"{os.path.join(directory, name)} is damaged ({error}), so the one before"
                          " counts")
    return None, ""


def _source(
    path: str, snapshot: Optional[Snapshot], contents: WalContents, faults: List[str]
) -> DataSource:
    member_id = cluster_id = 0
    try:
        member_id, cluster_id = decode_metadata(contents.metadata)
    except CodecError as error:
        faults.append(f"the log does not say whose it is ({error})")
    commit = contents.hard_state.commit
    committed = sum(entry.index <= commit for entry in contents.entries)
    source = DataSource(path, member_id, cluster_id, snapshot, contents.hard_state,
                        contents.entries, committed)
    with contextlib.suppress(CodecError):
        source = with_lone_commits(source)
    return source


class _Replay:
    """Applies snapshot and entries, and notes which entry gave the store which index."""

    def __init__(self, source: DataSource, faults: List[str], progress: OnProgress) -> None:
        self.store = Store()
        self.cluster: Cluster = _AnyVersionCluster(self.store)
        self.commands: List[CommandEntry] = []
        self.v3_entries = self.changes = 0
        self.applied_at: List[Tuple[int, int]] = []
        self._applier = Applier(self.store, self.cluster, source.member_id, SYSTEM_CLOCK.wall_ns)
        try:
            if source.snapshot is not None:
                self.store.recover(source.snapshot.data,
                                   lambda share, keys: progress(0.8 * share, keys))
                self.cluster.recover()
        except ValueError as error:
            faults.append(f"the snapshot at index {source.snapshot and source.snapshot.index}"
                          f" holds no state of a v2 store ({error})")
        self.snapshot_etcd_index = self.store.current_index
        self.snapshot_paths = tuple(
            path for space in ("/1", "/2") for path, node in self.store.nodes_below(space)
            if not node.children and "/_" not in path)
        for number, entry in enumerate(source.entries):
            if not number % _ENTRIES_PER_STEP:
                progress(0.8 + 0.2 * number / len(source.entries), 0)
            self._take(entry, number < source.committed, faults)

    def _take(self, entry: Entry, committed: bool, faults: List[str]) -> None:
        try:
            if entry.type != EntryType.NORMAL:
                self.changes += 1
                if committed:
                    self._applier.apply_conf_change(decode_conf_change(entry.data))
            elif entry.data:
                self._take_command(entry, committed)
        except ValueError as error:     # CodecError is one
            faults.append(f"entry {entry.index} cannot be applied: {error}")
        if committed:
            self.applied_at.append((self.store.current_index, entry.index))

    def _take_command(self, entry: Entry, committed: bool) -> None:
        request = read_command(entry.data)
        if request is None:
            self.v3_entries += 1
            return
        self.commands.append(CommandEntry(entry.index, committed, request))
        if committed:
            self._applier.apply_request(request)


def _read_database(path: str) -> Optional[Database]:
    """Return what the database says, or None if there is none."""
    if not os.path.exists(path):
        return None
    try:
        with BoltReader(path) as reader:
            meta = dict(reader.items(b"meta"))
            keys = sum(1 for _ in reader.items(b"key"))
            members = sum(1 for _ in reader.items(b"members"))
    except (BoltError, OSError) as error:
        return Database(path, str(error), 0, "", 0, 0)
    index = int.from_bytes(meta.get(b"consistent_index", b""), "big")
    version = meta.get(b"storageVersion", b"").decode("utf-8", "replace")
    return Database(path, "", index, version, members, keys)
