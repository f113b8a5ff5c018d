"""The mark of a cluster that holds data of etcd's v3 API, of which this member keeps none."""

from __future__ import annotations

import io
import os
from typing import IO, BinaryIO, cast

from ..base.basics import fsync_dir
from ..base.ids import package_logger
from .bolt import BoltError, BoltReader, v3_buckets, write_bolt

_MARK = "v3-data"                   # file in the member directory


class V3Mark:
    """Whether the cluster holds v3 data: then this member must not send its empty database.

    A file remembers it, since the entries that wrote the data are compacted in time.

    directory  of the file; "": remember it in memory only
    """

    def __init__(self, directory: str = "") -> None:
        self.path = directory and os.path.join(directory, _MARK)
        self.is_set = bool(directory) and os.path.exists(self.path)

    def set(self, where: str) -> None:
        """Remember v3 data; `where` it was found goes to the log."""
        if self.is_set:
            return
        self.is_set = True
        log = package_logger("etcdserver")
        log.warning(
            "%s holds data of etcd's v3 API, which this member does not keep: members of etcd 3"
            " can get it from one another only", where,
        )
        if self.path:
            try:
                with open(self.path, "wb") as file:
                    os.fsync(file.fileno())
                fsync_dir(os.path.dirname(self.path))
            except OSError as error:
                log.error("cannot write %s: %s", self.path, error)


def empty_database(raft_index: int) -> bytes:
    """Return the database without keys that etcd 3 needs beside a snapshot up to raft_index."""
    file = io.BytesIO()
    write_bolt(file, v3_buckets(raft_index))
    return file.getvalue()


def holds_v3_data(database: IO[bytes]) -> bool:
    """Return whether a database of etcd 3, from the present position on, holds keys or users.

    A damaged one counts as one that does; none at all holds nothing.
    """
    if not database.read(1):
        return False
    database.seek(-1, io.SEEK_CUR)
    try:
        tail = cast(BinaryIO, _Tail(database))
        with BoltReader("the database of a snapshot", tail) as reader:
            return any(True for bucket in _DATA_BUCKETS for _ in reader.items(bucket))
    except (BoltError, OSError):
        return True


_DATA_BUCKETS = (b"key", b"lease", b"authUsers", b"authRoles")


class _Tail(io.RawIOBase):
    """A file from the present position of another one on; closing it leaves the other open."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._start = file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(self._start + offset) - self._start

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)
