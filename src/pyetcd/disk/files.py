"""Files and directories as the log and the snapshots use them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from enum import IntEnum
from typing import Callable, Dict, Iterator, List, Tuple

from ..base.basics import NO_DESCRIPTOR, fsync_dir
from ..base.errors import DiskFull
from ..base.messages import EntryID
from ..base.system import lock_file, sync_data, sync_file

_WAL_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.wal")
_SNAP_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.snap")
_RECORD_START = re.compile(rb"\x08[\x01-\x05]\x10")
_PLAIN_RECORD = re.compile(             # the head of a normal entry with data, or a hard state
    rb"(?s:.{7})\0\x08(?:\x02\x10(%b)\x1a(%b)\x08\0\x10(%b)\x18(%b)\"(%b)|"
    rb"\x03\x10(%b)\x1a(%b)(\x08%b\x10%b\x18%b))".replace(
        b"%b", rb"[\x80-\xff]{0,9}[\x00-\x7f]")
)


class RecordType(IntEnum):
    """walpb.Record types."""

    METADATA = 1
    ENTRY = 2
    STATE = 3
    CRC = 4
    SNAPSHOT = 5


# POSIX locks do not exclude others in the same process.  By path as given, the real one: a link
# may be moved, or the working directory changed, before the lock is freed.
_locked_paths: Dict[str, str] = {}


class OsDisk:
    """Every file operation of log and snapshots; the simulator has another one.

    A handle is what create and open_append return.  Nothing is durable before fsync or
    fdatasync of the handle, no name before fsync_dir of its directory.  Raises OSError.
    """

    read_only = False           # True: a log is read as it is, and not repaired

    def makedirs(self, path: str) -> None:
        """Make a directory and its parents, mode 0700."""
        os.makedirs(path, mode=0o700, exist_ok=True)

    def listdir(self, path: str) -> List[str]:
        """Return the names in a directory, sorted; [] if there is none."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def read(self, path: str) -> bytes:
        """Return a whole file."""
        with open(path, "rb") as file:
            return file.read()

    def create(self, path: str, mode: int = 0o600) -> int:
        """Make an empty file, replacing one that is there; return a handle for appending."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, mode)

    def open_append(self, path: str) -> int:
        """Return a handle for reading and appending to a file that is there."""
        return os.open(path, os.O_RDWR | os.O_APPEND)

    def read_open(self, handle: int) -> bytes:
        """Return the whole file of a handle; its lock stays, as nothing is closed."""
        with open(handle, "rb", closefd=False) as file:
            file.seek(0)
            return file.read()

    def write(self, handle: int, data: bytes) -> None:
        """Append all of `data`."""
        written = os.write(handle, data)
        while written < len(data):
            data = data[written:]
            written = os.write(handle, data)

    def fdatasync(self, handle: int) -> None:
        """Make the contents durable."""
        _fdatasync(handle)

    def fsync(self, handle: int) -> None:
        """Make contents and attributes durable."""
        sync_file(handle)

    def close(self, handle: int) -> None:
        """Close a handle."""
        os.close(handle)

    def truncate(self, handle: int, size: int) -> None:
        """Cut a file to `size` bytes, durably."""
        os.ftruncate(handle, size)
        sync_file(handle)

    def rename(self, old: str, new: str) -> None:
        """Rename a file over whatever has the new name."""
        os.replace(old, new)

    def unlink(self, path: str) -> None:
        """Remove a file."""
        os.unlink(path)

    def fsync_dir(self, path: str) -> None:
        """Make the names in a directory durable."""
        fsync_dir(path)

    def lock(self, path: str, handle: int) -> bool:
        """Lock a file against other processes and other members in this one; False if taken.

        A POSIX lock, as etcd 2 takes: it is lost when any descriptor of the file is closed in
        this process, so a locked file must not be read again.
        """
        real = os.path.realpath(path)
        if real in _locked_paths.values():
            return False
        if lock_file(handle):
            _locked_paths[path] = real
            return True
        return False

    def unlock(self, path: str) -> None:
        """Forget a lock; closing the handle has released it for other processes."""
        _locked_paths.pop(path, None)

    def is_locked(self, path: str) -> bool:
        """Tell whether this process holds the lock of a file."""
        return os.path.realpath(path) in _locked_paths.values()


_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def _needs_space(
    path: str, undo: Callable[[], None], codes: Tuple[int, ...] = (*_FULL, *NO_DESCRIPTOR)
) -> Iterator[None]:
    """Run what writes; if the disk is full, or no file can be opened, undo() it and raise
    DiskFull: it can be repeated.

    Not for syncs: after one has failed nobody knows what is on disk, whatever the reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise
        undo()
        hint = "raise the limit of open files (ulimit -n): " * (error.errno in NO_DESCRIPTOR)
        raise DiskFull(f"{os.strerror(error.errno).lower()}: {hint}{path}") from error


_LOG_START = EntryID(0, 0)
_fdatasync: Callable[[int], None] = sync_data
OS_DISK = OsDisk()
