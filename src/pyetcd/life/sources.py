"""Readers of the files of a member, which may be running; they change no file."""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import Callable, Iterator, List, NamedTuple, Optional, Set, Tuple

from ..base.codec import decode_conf_change, decode_metadata
from ..base.errors import CodecError, FileLocked, WalError
from ..base.messages import Entry, EntryID, EntryType, HardState, Snapshot
from ..disk.files import _SNAP_NAME, OsDisk
from ..disk.records import WalContents
from ..disk.snapshots import Snapshotter, decode_snapshot_file
from ..disk.wal import Wal
from ..member.applier import Applier
from ..member.cluster import Cluster, Member
from ..net.workers import SYSTEM_CLOCK
from ..store.tree import Store
from .restart import _voters

_STAGE = "member.tmp"               # where a member directory grows until it is complete
_ENTRIES_PER_WRITE = 1_000
_READ_RETRIES = 2                   # a running member may remove or finish a file meanwhile

OnProgress = Callable[[float, int], None]     # share that is done, keys so far (0: as before)


def _step_progress(progress: OnProgress, low: float, high: float) -> OnProgress:
    """Return the progress function of a step that takes the share from `low` to `high`."""
    return lambda share, keys: progress(low + share * (high - low), keys)


class BackupError(Exception):
    """A backup or restore failed.  The text is one line that says what to do."""


class DataSource(NamedTuple):
    """The contents of the files of a member."""

    path: str
    member_id: int                      # 0, as the next, for a snapshot file alone
    cluster_id: int
    snapshot: Optional[Snapshot]
    hard_state: HardState
    entries: List[Entry]                # after the snapshot
    committed: int                      # how many of them are known to be committed

    @property
    def last(self) -> EntryID:
        """The last entry that is known to be committed."""
        last = self.entries[self.committed - 1] if self.committed else self.snapshot or Snapshot()
        return EntryID(last.term, last.index)

    @property
    def voters(self) -> Set[int]:
        """The voters after the last committed entry."""
        before = self.snapshot.voters if self.snapshot else ()
        return _voters(before, self.entries[:self.committed])


class CopyReport(NamedTuple):
    """The result of backup() or restore(), or of their dry run."""

    source: DataSource
    etcd_index: int
    keys: int
    size_bytes: int                     # of the new snapshot file and entries
    member_id: int                      # the new ids
    cluster_id: int
    members: Tuple[Member, ...]         # of the new cluster, those of the source in a backup
    paths: Tuple[str, ...]              # data directory, dedicated wal directory

    def lines(self) -> List[str]:
        source, last = self.source, self.source.last
        left_out = len(source.entries) - source.committed
        identity = "a snapshot file, without ids"
        if source.member_id:
            identity = f"member {source.member_id:x} of cluster {source.cluster_id:x}"
        members = ", ".join(
            f"{member.name or '(unnamed)'}={','.join(member.peer_urls)} ({member.id:x})"
            for member in self.members
        )
        return [
            f"source:      {source.path}: {identity}",
            f"raft:        term {last.term}, index {last.index}",
            f"left out:    {left_out} entries that are not known to be committed",
            f"etcd index:  {self.etcd_index}",
            f"keys:        {self.keys:,} in {self.size_bytes:,} bytes",
            f"members:     {members or 'none'}",
            f"new ids:     member {self.member_id:x}, cluster {self.cluster_id:x}",
            f"target:      {', '.join(self.paths)}",
        ]

    def summary(self) -> str:
        left_out = len(self.source.entries) - self.source.committed
        return (
            f"{self.paths[0]}: member {self.member_id:x} of cluster {self.cluster_id:x},"
            f" {self.keys:,} keys, etcd index {self.etcd_index}, raft index"
            f" {self.source.last.index}, {left_out} uncommitted entries left out"
        )


class ReadOnlyDisk(OsDisk):
    """The files of a member that may be running: it takes no lock and changes no file.

    Files of a member in this process are refused (FileLocked), as closing one frees its lock.
    """

    read_only = True

    def open_append(self, path: str) -> int:
        return os.open(path, os.O_RDONLY)

    def lock(self, path: str, handle: int) -> bool:
        return True

    def unlock(self, path: str) -> None:
        pass


_READ_ONLY_DISK = ReadOnlyDisk()


class _AnyVersionCluster(Cluster):
    """Members of a cluster whose version may be newer than this program."""

    @staticmethod
    def _check_version(version: str) -> None:
        pass


# -- reading ---------------------------------------------------------------------


def read_source(path: str, wal_dir: str = "") -> DataSource:
    """Read a snapshot file, or a data directory: newest snapshot and log.  Raises BackupError."""
    if os.path.isfile(path):
        try:
            return DataSource(path, 0, 0, _read_snapshot(path), HardState(), [], 0)
        except OSError as error:
            raise BackupError(f"cannot read {path}: {error}; check who may read it") from None
    if not os.path.isdir(path):
        raise BackupError(f"{path} does not exist; name a snapshot file or a data directory")
    try:
        wal_dir, snap_dir = member_dirs(path, wal_dir)
        for _ in range(_READ_RETRIES):
            with contextlib.suppress(WalError, CodecError, FileNotFoundError):
                return _read_member(path, wal_dir, snap_dir)
        return _read_member(path, wal_dir, snap_dir)
    except FileLocked:
        raise BackupError(
            f"{path} belongs to a member in this process; use GET /v2/snapshot"
        ) from None
    except (WalError, CodecError) as error:
        intact = _newest_intact(snap_dir)
        advice = f"; or restore {intact}, without what came after it" if intact else ""
        raise BackupError(f"{error}{advice}") from error
    except OSError as error:
        raise BackupError(f"cannot read {path}: {error}; run this as the member's user") from error


def member_dirs(path: str, wal_dir: str) -> Tuple[str, str]:
    """Return where a data directory has log and snapshots.  Raises BackupError without a log."""
    member = os.path.join(path, "member")
    member = member if os.path.isdir(member) else path      # as etcd 2.0.0 has it
    wal_dir = wal_dir or os.path.join(member, "wal")
    if not Wal.exists(wal_dir, disk=_READ_ONLY_DISK):
        raise BackupError(
            f"{path} is no data directory of a member: {wal_dir} holds no log; if the log is"
            f" elsewhere, name its directory in -wal-dir of `pyetcd backup`, check, dump or export"
        )
    return wal_dir, os.path.join(member, "snap")


def _read_member(path: str, wal_dir: str, snap_dir: str) -> DataSource:
    known = set(Wal.snapshots(wal_dir, disk=_READ_ONLY_DISK))
    Snapshotter(snap_dir, disk=_READ_ONLY_DISK).check_log(wal_dir, known)
    files = (file for file, id in snapshot_files(snap_dir) if id in known)
    snapshot = next(map(_read_snapshot, files), None)
    start = snapshot.id if snapshot else EntryID(0, 0)
    wal, contents = Wal.open(wal_dir, start, disk=_READ_ONLY_DISK)
    wal.close()
    return with_lone_commits(
        data_source(path, *decode_metadata(contents.metadata), snapshot, contents))


def data_source(
    path: str, member_id: int, cluster_id: int, snapshot: Optional[Snapshot], contents: WalContents,
) -> DataSource:
    state, entries = contents.hard_state, contents.entries
    committed = sum(entry.index <= state.commit for entry in entries)
    return DataSource(path, member_id, cluster_id, snapshot, state, entries, committed)


def with_lone_commits(source: DataSource) -> DataSource:
    """Return `source` with the entries that a member alone has committed without writing so."""
    member_id, committed, entries = source.member_id, source.committed, source.entries
    if source.voters == {member_id}:
        # A single member commits each entry that is on its disk, and writes the commit index later.
        following = itertools.takewhile(
            lambda entry: entry.type == EntryType.NORMAL, entries[committed:]
        )
        source = source._replace(committed=committed + sum(1 for _ in following))
    return source


def snapshot_files(directory: str) -> Iterator[Tuple[str, EntryID]]:
    """Yield the paths of snapshot files, the newest first, with the ids in their names."""
    for name in reversed(_READ_ONLY_DISK.listdir(directory or ".")):
        match = _SNAP_NAME.fullmatch(name)
        if match:
            term, index = (int(part, 16) for part in match.groups())
            yield os.path.join(directory, name), EntryID(term, index)


def _read_snapshot(path: str) -> Snapshot:
    """Read a snapshot file.  Raises BackupError, which names an older good file, if any."""
    content = _READ_ONLY_DISK.read(path)
    try:
        return decode_snapshot_file(content)
    except CodecError as error:
        if not _SNAP_NAME.fullmatch(os.path.basename(path)):
            raise BackupError(
                f"{path} is damaged or no snapshot of etcd 2: {_file_kind_advice(path, content)}"
            ) from None
        older = _newest_intact(os.path.dirname(path))
        advice = f"{older} is intact: move the damaged one away, or restore from that"
        raise BackupError(
            f"{path} is damaged ({error}); {advice if older else 'take one of another member'}"
        ) from None


def _file_kind_advice(path: str, content: bytes) -> str:
    """Return the kind of a file that is no snapshot, and what to name instead."""
    advice = "take one with GET /v2/snapshot, or name a file of member/snap or a data directory"
    if content[16:20] in (b"\xed\xda\x0c\xed", b"\xed\x0c\xda\xed"):
        return f"it is a database of etcd 3, which holds no keys of v2; {advice}"
    if content[:2] == b"\x1f\x8b":
        return f"it is compressed; run `gunzip` on it first, or {advice}"
    if path.endswith(".wal"):
        return "it is a piece of a log; name its data directory, two directories above"
    if content[:1] in (b"{", b"["):
        return f"it is JSON; `pyetcdctl import` reads what export has written; or {advice}"
    if not content:
        return f"it is empty; {advice}"
    return advice


def _newest_intact(directory: str) -> str:
    for path, _ in snapshot_files(directory):
        with contextlib.suppress(CodecError, OSError):
            decode_snapshot_file(_READ_ONLY_DISK.read(path))
            return path
    return ""


def load_state(source: DataSource, progress: OnProgress) -> Tuple[Store, Cluster]:
    """Return store and cluster as of source.last.  Raises BackupError."""
    store = Store()
    if not source.last.index:
        raise BackupError(f"{source.path} holds no data yet; name one of a member that has run")
    cluster = _AnyVersionCluster(store)
    applier = Applier(store, cluster, source.member_id, SYSTEM_CLOCK.wall_ns)
    try:
        if source.snapshot is not None:
            store.recover(source.snapshot.data, _step_progress(progress, 0.0, 0.8))
            cluster.recover()
        for number, entry in enumerate(source.entries[:source.committed]):
            if entry.type == EntryType.NORMAL:
                applier.apply_entry(entry)
                entry.request = None
            else:
                applier.apply_conf_change(decode_conf_change(entry.data))
            if not number % _ENTRIES_PER_WRITE:
                progress(0.8 + 0.2 * number / source.committed, 0)
    except ValueError as error:         # CodecError is one
        raise BackupError(
            f"{source.path} does not hold the state of a v2 store ({error}); take a snapshot or"
            f" data directory of another member"
        ) from None
    return store, cluster
