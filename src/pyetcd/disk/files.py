"""File operations of the log and the snapshots."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from typing import Callable, Dict, Iterator, List, Tuple

from ..base.basics import NO_DESCRIPTOR, _nothing, fsync_dir
from ..base.errors import DiskFull
from ..base.system import lock_file, sync_data, sync_file

_WAL_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.wal")
_SNAP_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})\.snap")

# Path as given -> real path, which a moved link or another working directory may change later.
# POSIX locks do not exclude other members of the same process.
_locked_paths: Dict[str, str] = {}


class OsDisk:
    """Every file operation of log and snapshots; the simulator has another one.

    Data are durable after fsync or fdatasync of the handle, names after fsync_dir of their
    directory.  Raises OSError.
    """

    read_only = False           # True: a log is read without repairs
    fdatasync = staticmethod(sync_data)
    fsync = staticmethod(sync_file)
    fsync_dir = staticmethod(fsync_dir)
    close = staticmethod(os.close)
    rename = staticmethod(os.replace)
    unlink = staticmethod(os.unlink)

    def makedirs(self, path: str) -> None:
        os.makedirs(path, mode=0o700, exist_ok=True)

    def listdir(self, path: str) -> List[str]:
        """Return the names in a directory, sorted; [] if there is none."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def create(self, path: str) -> int:
        """Make an empty file, or empty the existing one; return a handle for appending."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)

    def open_append(self, path: str) -> int:
        """Return a handle for reading and appending to an existing file."""
        return os.open(path, os.O_RDWR | os.O_APPEND)

    def read_open(self, handle: int) -> bytes:
        """Return the whole file of a handle; as no descriptor is closed, the lock stays."""
        with open(handle, "rb", closefd=False) as file:
            file.seek(0)
            return file.read()

    def write(self, handle: int, *data: bytes) -> None:
        """Append pieces, many in one call: each call lets another thread run in between."""
        left = [*data]
        while left:
            written, whole = os.writev(handle, left[:_WRITE_PIECES_MAX]), 0
            while whole < len(left) and written >= len(left[whole]):
                written -= len(left[whole])
                whole += 1
            del left[:whole]
            if written:
                left[0] = left[0][written:]

    def truncate(self, handle: int, size: int) -> None:
        """Cut a file to `size` bytes, durably."""
        os.ftruncate(handle, size)
        sync_file(handle)

    def lock(self, path: str, handle: int) -> bool:
        """Lock a file against other processes and other members in this one; False if taken.

        A POSIX lock, as in etcd 2: it is lost when any descriptor of the file is closed in this
        process, so a locked file must not be opened again.
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
        return os.path.realpath(path) in _locked_paths.values()


@contextlib.contextmanager
def disk_full_as_error(
    path: str, undo: Callable[[], None] = _nothing,
    codes: Tuple[int, ...] = (errno.ENOSPC, errno.EDQUOT, *NO_DESCRIPTOR),
) -> Iterator[None]:
    """Turn a full disk or a lack of descriptors into DiskFull, after undo(), for a later retry.

    Not for syncs: after one has failed the contents of the disk are unknown, for any reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise
        undo()
        hint = "raise the limit of open files (ulimit -n): " * (error.errno in NO_DESCRIPTOR)
        raise DiskFull(f"{os.strerror(error.errno).lower()}: {hint}{path}") from error


_WRITE_PIECES_MAX = 1_024               # as many as Linux and macOS take
OS_DISK = OsDisk()
