"""Export and import: keys of v2 out of a directory or a cluster, and into a cluster."""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import os
import sys
import urllib.parse
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, TextIO, Tuple

from ..base.basics import TlsFiles
from ..base.errors import StartError
from ..base.text import load_json
from ..net.tls import TlsContext
from ..net.workers import SYSTEM_CLOCK
from .discovery import _open_connection
from .inspection import inspect_dir
from .records import (
    KeyMap,
    Record,
    Records,
    mapped,
    record_of,
    records_of_database,
    records_of_file,
    records_of_store,
    write_database,
    write_json,
    write_script,
)
from .sources import BackupError, OnProgress

CALL_SECONDS = 60.0                 # a member may list a large directory that long
FORMATS = ("json", "script", "db")
_PROGRESS_KEYS = 1_000              # keys between two calls of progress


class Access(NamedTuple):
    """How a cluster is reached."""

    urls: Tuple[str, ...]
    tls: TlsFiles
    username: str                   # name:password; ""


class KeysClient:
    """The keys API of a cluster, on one connection at a time.  Raises BackupError."""

    def __init__(self, access: Access) -> None:
        self._urls = list(access.urls)
        self._tls: Optional[TlsContext] = None
        self._headers = {}
        self._connection: Optional[http.client.HTTPConnection] = None
        self.etcd_index = 0             # of the last answer
        if access.username:
            token = base64.b64encode(access.username.encode()).decode()
            self._headers["Authorization"] = f"Basic {token}"
        if any(url.startswith("https:") for url in access.urls):
            try:
                self._tls = TlsContext(access.tls, server=False)
            except StartError as error:
                raise BackupError(str(error)) from None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def walk(self) -> Iterator[Record]:
        """Yield all nodes, parents first: one directory is listed at a time."""
        waiting = ["/"]
        while waiting:
            found = list(map(record_of, self._call(waiting.pop())["node"].get("nodes", ())))
            yield from found
            waiting += [record.key for record in reversed(found) if record.value is None]

    def put(self, record: Record, *, ttl_s: int, keep: bool) -> bool:
        """Write a node; False if it exists (directory, or any with `keep`); ValueError: refused."""
        form: Dict[str, str] = {"ttl": str(ttl_s)} if ttl_s else {}
        if record.value is None:
            form["dir"] = "true"
        else:
            form["value"] = record.value
        if keep or record.value is None:
            form["prevExist"] = "false"
        answer = self._call(record.key, form)
        if answer.get("errorCode") == 105:
            return False
        if "errorCode" in answer:
            raise ValueError(f"{answer.get('message')} ({answer.get('cause')})")
        return True

    def _call(self, key: str, form: Optional[Dict[str, str]] = None) -> Dict[str, Any]:
        """PUT `form` to a key, or GET the key without one; return the answer."""
        method, target, body = "GET", "/v2/keys" + urllib.parse.quote(key), None
        headers = dict(self._headers)
        if form is None:
            target += "?quorum=true&sorted=true"
        else:
            method, body = "PUT", urllib.parse.urlencode(form)
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        status, data = self._exchange(method, target, body, headers)
        try:
            answer = load_json(data)
            if not isinstance(answer, dict):
                raise ValueError("no object")
        except ValueError:
            raise BackupError(f"{self._urls[0]} answered {status}, and not as etcd does:"
                              f" {data[:100]!r}") from None
        if status >= 400 and method == "GET" or status in (401, 403) or status >= 500:
            raise BackupError(f"{self._urls[0]} refuses {method} {key}: {answer.get('message')}")
        return answer

    def _exchange(self, method: str, target: str, body: Optional[str],
                  headers: Dict[str, str]) -> Tuple[int, bytes]:
        """Return status and body.  A write without an answer is sent again, which does no harm."""
        failure: Optional[Exception] = None
        for _ in range(2 * len(self._urls)):
            try:
                connection = self._connection = self._connection or _open_connection(
                    self._urls[0], CALL_SECONDS, self._tls)
                connection.request(method, target, body, headers)
                answer = connection.getresponse()
                data = answer.read()
                self.etcd_index = int(answer.headers.get("X-Etcd-Index", "0"))
                return answer.status, data
            except (OSError, http.client.HTTPException, ValueError) as error:
                failure = error
                self.close()
                self._urls.append(self._urls.pop(0))
        raise BackupError(f"no answer from {', '.join(sorted(self._urls))}: {failure}")


# -- export


class ExportReport(NamedTuple):
    """What export_keys() has done."""

    keys: int
    etcd_index: int
    faults: Tuple[str, ...]         # of a directory that is damaged

    def summary(self) -> str:
        return f"{self.keys:,} keys, etcd index {self.etcd_index}"


def export_keys(
    source: str, access: Access, *, form: str, target: str, key_map: KeyMap, leases: bool,
    wal_dir: str, progress: OnProgress,
) -> ExportReport:
    """Write the keys of a data directory, or a cluster if source is "", to `target`, "": stdout.

    After a BackupError the file is absent, or as it was.
    """
    if form == "db" and not target:
        raise BackupError("a database is no text: name a file with -output")
    with contextlib.ExitStack() as cleanup:
        faults: Tuple[str, ...] = ()
        if source:
            found = inspect_dir(source, wal_dir, progress)
            records, faults = records_of_store(found.store), tuple(found.faults)
            index = found.store.current_index
        else:
            client = KeysClient(access)
            cleanup.callback(client.close)
            records = client.walk()
            first = next(records, None)
            index = client.etcd_index
            records = itertools.chain(() if first is None else (first,), records)
        try:
            keys = _write(_moved(records, key_map, progress), form, target, leases, index)
        except BrokenPipeError:         # a reader of stdout that has enough
            raise
        except OSError as error:
            raise BackupError(f"cannot write {target or 'stdout'}: {error}") from error
    return ExportReport(keys, index, faults)


def _moved(records: Records, key_map: KeyMap, progress: OnProgress) -> Iterator[Record]:
    for number, record in enumerate(records):
        if not number % _PROGRESS_KEYS:
            progress(1.0, number)
        yield record._replace(key=mapped(record.key, key_map)) if key_map else record


def _write(records: Records, form: str, target: str, leases: bool, index: int) -> int:
    now_ns = SYSTEM_CLOCK.wall_ns()

    def write_text(file: TextIO) -> int:
        if form == "json":
            return write_json(records, file, index)
        return write_script(records, file, leases=leases, now_ns=now_ns)

    if not target:
        return write_text(sys.stdout)
    temporary = target + ".tmp"
    try:
        if form == "db":
            keys = write_database(records, temporary, leases=leases, now_ns=now_ns)
        else:
            with open(temporary, "w", encoding="utf-8") as file:
                keys = write_text(file)
        os.chmod(temporary, 0o700 if form == "script" else 0o600)
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return keys


# -- import


class ImportReport(NamedTuple):
    """What import_keys() has done."""

    written: int
    kept: int                       # existed already
    expired: int
    refused: Tuple[str, ...]        # keys, each with the reason

    def summary(self) -> str:
        parts = [f"{self.written:,} keys written"]
        parts += [f"{count:,} {what}" for count, what in (
            (self.kept, "existed and were kept"), (self.expired, "had expired"),
            (len(self.refused), "refused")) if count]
        return ", ".join(parts)


def import_keys(
    source: str, access: Access, *, key_map: KeyMap, keep: bool, dry_run: bool,
    progress: OnProgress,
) -> ImportReport:
    """Write the keys of `source` to a cluster.  Raises BackupError.

    source  JSON of export, a snapshot or database of etcd 3, or a data directory with one
    """
    refused: List[str] = []
    records = _read_source(source, refused)
    client = KeysClient(access)
    written = kept = expired = 0
    with contextlib.closing(client):
        for record in _moved(records, key_map, progress):
            ttl_s = record.ttl_s(SYSTEM_CLOCK.wall_ns())
            if ttl_s < 0:
                expired += record.value is not None
                continue
            try:
                done = dry_run or client.put(record, ttl_s=ttl_s, keep=keep)
            except ValueError as error:
                refused.append(f"{record.key}: {error}")
                continue
            written += done and record.value is not None
            kept += not done and record.value is not None
    return ImportReport(written, kept, expired, tuple(refused))


def _read_source(source: str, refused: List[str]) -> Iterator[Record]:
    def skipped(key: bytes, why: str) -> None:
        refused.append(f"{key.decode('utf-8', 'backslashreplace')}: {why}")

    for path in (source, os.path.join(source, "member", "snap", "db"),
                 os.path.join(source, "snap", "db")):
        if os.path.isfile(path):
            break
    else:
        raise BackupError(f"{source} is no file and holds no member/snap/db; name a file of export,"
                          " or a snapshot of etcd 3")
    try:
        with open(path, "rb") as head:
            is_text = head.read(1) == b"{"
        if not is_text:
            yield from records_of_database(path, skipped, SYSTEM_CLOCK.wall_ns())
            return
        with open(path, encoding="utf-8") as file:
            yield from records_of_file(file, path)
    except (OSError, UnicodeDecodeError) as error:
        raise BackupError(f"cannot read {path}: {error}") from None
