"""Snapshot files and the data directory.

Knows neither the store nor the rules of Raft.
"""

from __future__ import annotations

import contextlib
import os
from typing import Callable, Container, Iterable, List, NamedTuple, Optional, Sequence, Set

from ..base.basics import NO_DESCRIPTOR, fsync_dir
from ..base.checksums import crc32c
from ..base.codec import decode_known, decode_snapshot, encode_snapshot_parts, encode_varint
from ..base.errors import CodecError, StartError, WalError
from ..base.ids import package_logger
from ..base.limits import REPAIR_HINT
from ..base.messages import EntryID, Snapshot
from .files import _SNAP_NAME, _WAL_NAME, OS_DISK, OsDisk, disk_full_as_error


class SnapshotFile(NamedTuple):
    """A raftpb.Snapshot in pieces: `size` bytes with the checksum `crc`."""

    id: EntryID
    pieces: Sequence[bytes]
    size: int
    crc: int

    @property
    def name(self) -> str:
        return f"{self.id.term:016x}-{self.id.index:016x}.snap"

    @property
    def head(self) -> bytes:
        """The bytes of the file before the pieces."""
        return b"\x08%b\x12%b" % (encode_varint(self.crc), encode_varint(self.size))

    @classmethod
    def of(cls, snapshot: Snapshot) -> SnapshotFile:
        parts, crc = encode_snapshot_parts(snapshot), 0
        for part in parts:
            crc = crc32c(part, crc)
        return cls(snapshot.id, parts, sum(map(len, parts)), crc)


class Snapshotter:
    """The directory of snapshot files, `<term>-<index>.snap`.  Source: etcd 2.3 snap."""

    def __init__(self, directory: str, *, disk: OsDisk = OS_DISK) -> None:
        self.directory = directory
        self.disk = disk
        self.before_write: Callable[[int], object] = lambda raft_index: None    # of each file

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot durably, after its WAL record is durable.  Raises DiskFull, OSError."""
        self.write(SnapshotFile.of(snapshot))

    def write(self, file: SnapshotFile) -> None:
        """Do save() for a snapshot with a known checksum.

        Differs from etcd: an incomplete file has another name, so load() on another thread never
        reads half of it.
        """
        self.before_write(file.id.index)
        path = os.path.join(self.directory, file.name)
        disk, temporary = self.disk, path + ".tmp"
        with disk_full_as_error(path):
            handle = disk.create(temporary)
        try:
            with disk_full_as_error(path, lambda: disk.unlink(temporary)):
                disk.write(handle, file.head, *file.pieces)
            disk.fsync(handle)
        finally:
            disk.close(handle)
        disk.rename(temporary, path)
        with disk_full_as_error(path, codes=NO_DESCRIPTOR):
            disk.fsync_dir(self.directory)      # opens it

    def load(self, valid: Optional[Container[EntryID]] = None) -> Optional[Snapshot]:
        """Return the newest good snapshot, or None.  A bad file is renamed to `.broken`.

        valid  the snapshots in the log; other files are skipped
        """
        log = package_logger("snap")
        for name in reversed(self.disk.listdir(self.directory)):
            match = _SNAP_NAME.fullmatch(name)
            if match is None:
                if not name.endswith((".broken", ".tmp", ".snap.db")) and name != "db":
                    log.warning("skipped unexpected non snapshot file %s", name)
                continue
            term, index = (int(part, 16) for part in match.groups())
            if valid is not None and EntryID(term, index) not in valid:
                log.warning("skipped snapshot file %s: the log does not know it", name)
                continue
            snapshot = self._read(name)
            if snapshot is not None:
                return snapshot
        return None

    def check_log(self, wal_dir: str, known: Iterable[EntryID]) -> None:
        """Raise WalError if a file, intact or damaged, is newer than all snapshots in the log.

        Its record was durable before its file was begun: the end of the log is lost, with votes
        and entries that others count on.  Differs from etcd, which starts in the past.
        """
        newest = max((snapshot_id.index for snapshot_id in known), default=-1)
        for name in reversed(self.disk.listdir(self.directory)):
            match = _SNAP_NAME.fullmatch(name)
            path = os.path.join(self.directory, name)
            if match is None or int(match.group(2), 16) <= newest:
                continue
            state, way = "damaged", ""
            with contextlib.suppress(CodecError):
                decode_snapshot_file(self.disk.read(path))
                way = f", or by `pyetcd restore {path}`, without what came after it"
                state = "intact"
            segments = list(filter(_WAL_NAME.fullmatch, self.disk.listdir(wal_dir)))
            last = os.path.join(wal_dir, segments[-1]) if segments else "no file"
            raise WalError(
                f"wal: the end of the log is lost: {path} is {state}, but the log in {wal_dir}"
                f" (its last: {last}) ends before it; a later .wal file is missing, or the last"
                f" one was cut: put it back; or {REPAIR_HINT}{way}; or give the right -wal-dir"
            )

    def _read(self, name: str) -> Optional[Snapshot]:
        path = os.path.join(self.directory, name)
        try:
            return decode_snapshot_file(self.disk.read(path))
        except FileNotFoundError:
            return None                 # purged in the meantime
        except CodecError as error:
            package_logger("snap").error(
                "cannot read snapshot file %s (%s); renamed to %s.broken, using the one before",
                name, error, name,
            )
            self.disk.rename(path, path + ".broken")
            return None


def decode_snapshot_file(content: bytes) -> Snapshot:
    """Return the snapshot in a file.  Raises CodecError if it is damaged."""
    fields = {1: ("crc", 0, int), 2: ("data", 2, memoryview)}
    values = decode_known(memoryview(content), fields, "snappb.Snapshot")
    data = values.get("data", b"")
    if not data:
        raise CodecError("unexpected empty snapshot")
    if crc32c(data) != values.get("crc", 0):
        raise CodecError("crc mismatch")
    return decode_snapshot(data)


def purge_files(directory: str, suffix: str, keep: int, *, disk: OsDisk = OS_DISK) -> List[str]:
    """Remove the oldest files beyond `keep` (0: none), up to the first locked one.

    Temporary files of a crash go too.  Returns the paths removed.  Raises OSError.
    """
    if not keep:
        return []
    listing = disk.listdir(directory)
    names = [name for name in listing if name.endswith(suffix)]
    removed: List[str] = []
    # A file that is being written now has a later name than the newest complete one.
    stale = [n for n in listing if n.endswith(suffix + ".tmp") and names and n < names[-1]]
    for name in stale + names[:-keep]:
        path = os.path.join(directory, name)
        if disk.is_locked(path):
            break
        disk.unlink(path)
        package_logger("etcdserver").info("purged file %s successfully", path)
        removed.append(path)
    return removed


class DataDir(NamedTuple):
    """Paths of a data directory."""

    root: str
    member: str
    wal: str
    snap: str


def prepare_data_dir(data_dir: str, wal_dir: str = "") -> DataDir:
    """Make a data directory usable: layout, modes, a test write; migrate the layout of 2.0.0.

    Raises StartError if it is another program's, not a directory, or not writable.
    """
    member = os.path.join(data_dir, "member")
    wal, snap = wal_dir or os.path.join(member, "wal"), os.path.join(member, "snap")
    paths = DataDir(data_dir, member, wal, snap)
    try:
        names = set(os.listdir(data_dir)) if os.path.exists(data_dir) else set()
    except OSError as error:
        raise StartError(
            f"error listing data dir: {data_dir} ({error.strerror}); -data-dir must name a"
            " directory that this user may read and write"
        ) from None
    check_layout(data_dir, names)
    kind = "member"
    try:
        make_dirs((member, data_dir))
        check_writable(data_dir)
        check_writable(member)
        _migrate(paths, names)
        make_dirs((paths.snap,))
        kind = "WAL"
        make_dirs((paths.wal,))
        check_writable(paths.wal)
    except OSError as error:
        raise StartError(
            f"cannot write to {kind} directory: {error}; give the directory to this user, or"
            " choose another -data-dir"
        ) from None
    return paths


def absent_dirs(*paths: str) -> List[str]:
    """Return the missing ones of `paths` and of the directories above, deepest first."""
    found: Set[str] = set()
    for path in paths:
        while path and not os.path.exists(path):
            found.add(path)
            path = os.path.dirname(path)
    return sorted(found, key=len, reverse=True)


def make_dirs(paths: Sequence[str]) -> None:
    """Make data directories, given deepest first as by absent_dirs().  Raises OSError."""
    for path in reversed(paths):
        os.makedirs(path, mode=0o700, exist_ok=True)
        with contextlib.suppress(PermissionError):  # a parent that we may not list
            fsync_dir(os.path.dirname(path) or ".")


def remove_dirs(paths: Iterable[str]) -> None:
    """Remove the empty ones of `paths`, given deepest first."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.rmdir(path)


def check_layout(data_dir: str, names: Set[str]) -> None:
    if {"member", "proxy"} <= names:
        raise StartError(
            f"invalid datadir. Both member and proxy directories exist. Remove the one in"
            f" {data_dir} that is not wanted"
        )
    for name in sorted(names - {"member", "proxy", "wal", "snap"}):
        package_logger("etcd").warning(
            "found invalid file/dir %s under data dir %s (Ignore this if you are upgrading etcd)",
            name, data_dir,
        )


def check_writable(path: str) -> None:
    probe = os.path.join(path, ".touch")
    with open(probe, "wb"):
        pass
    os.unlink(probe)


def _migrate(paths: DataDir, names: Set[str]) -> None:
    """Move wal and snap from the top, their place in etcd 2.0.0, to member."""
    old = os.path.join(paths.root, "wal")
    if "wal" not in names or not os.listdir(old):
        return
    for name in ("snap", "wal"):        # the log last: a restart resumes while it is at the top
        path = os.path.join(paths.root, name)
        target = os.path.join(paths.member, name)
        if os.path.isdir(path) and not (os.path.isdir(target) and os.listdir(target)):
            os.replace(path, target)
            fsync_dir(paths.member)
            fsync_dir(paths.root)
