"""Data of etcd's v3 API, of which this member keeps none: databases without it, and a mark."""

from __future__ import annotations

import contextlib
import io
import os
from typing import IO

from ..base.basics import fsync_dir
from ..base.ids import package_logger
from .bolt import BoltError, BoltReader, v3_buckets, write_bolt

_MARK = "v3-data"                   # file in the member directory


class V3Mark:
    """Notes whether the cluster holds v3 data: then this member must send no empty database.

    A file keeps the note, since the entries that wrote the data are compacted in time.

    member_dir  has the file, and snap/db; "": note it in memory only
    """

    def __init__(self, member_dir: str = "") -> None:
        self.path = member_dir and os.path.join(member_dir, _MARK)
        self.database = member_dir and os.path.join(member_dir, "snap", "db")
        self.is_set = bool(member_dir) and os.path.exists(self.path)
        with contextlib.suppress(FileNotFoundError):
            if member_dir and holds_v3_data(open(self.database, "rb")):
                self.set(self.database)

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
                _write_file(self.path, b"")
            except OSError as error:
                log.error("cannot write %s: %s", self.path, error)

    def write_database(self, raft_index: int) -> None:
        """Write the database with which etcd 3 starts on a snapshot to raft_index.  Thread: any."""
        if self.database and not self.is_set:
            try:
                _write_file(self.database, empty_database(raft_index))
            except OSError as error:
                package_logger("snap").error("cannot write %s: %s", self.database, error)

    def remove_database(self) -> None:
        """Remove the database, so that etcd 2.3 starts here, unless it holds data."""
        if self.database and not self.is_set:
            with contextlib.suppress(OSError):
                os.unlink(self.database)


def _write_file(path: str, data: bytes) -> None:
    temporary = path + ".tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    fsync_dir(os.path.dirname(path))


def empty_database(raft_index: int) -> bytes:
    """Return the database without keys that etcd 3 needs beside a snapshot up to raft_index."""
    file = io.BytesIO()
    write_bolt(file, v3_buckets(raft_index))
    return file.getvalue()


def holds_v3_data(database: IO[bytes]) -> bool:
    """Return whether a database of etcd 3 holds keys or users: True if damaged, False if empty.

    database  a file at the start of the database; it is closed
    """
    with database:
        start = database.tell()
        if not database.read(1):
            return False
        try:
            reader = BoltReader("database", database, start)
            return any(True for bucket in _DATA_BUCKETS for _ in reader.items(bucket))
        except (BoltError, OSError):
            return True


_DATA_BUCKETS = (b"key", b"lease", b"authUsers", b"authRoles")
