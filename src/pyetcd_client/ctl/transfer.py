"""Export, import and mirror."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

from ..client.client import Client
from ..transport.calls import clean_key, is_endpoint_failure
from ..transport.errors import (
    ApiError,
    EtcdError,
    HttpError,
    KeyNotFound,
    NodeExists,
    NotFile,
    Unauthorized,
)
from ..transport.results import Node, Result
from .etcdctl import _Answer, _import_snapshot_04, _run_parallel, _seconds_left, _set_dir
from .output import (
    Exit,
    _escape,
    _ExitError,
    _print,
    _print_error,
    _print_lines,
    _Progress,
    _unescape,
)
from .program import _Access, _command, _Flag, _Options, _Run

_EXPORT_MARK = "# keys of etcd v2, written by pyetcdctl export; see pyetcdctl help export"
_EXPORT_VERSION = 1
_LONG_S = 60.0                  # --timeout and --total-timeout for long replies
_RETRY_MIN_S = 0.2              # first wait of a mirror that cannot reach its target; doubled
_RETRY_MAX_S = 10.0             # up to this

_PREFIX = _Flag(("prefix",), str, "only keys below this one (default: all)")
_DEST_PREFIX = _Flag(("dest-prefix",), str, "their new prefix (default: the same)")
_DRY_RUN = _Flag(("dry-run",), bool, "print the changes, do nothing")
_WORKERS = _Flag(("c",), int, "connections to use (default: 10)", 1)


def _with_long_timeouts(client: Client, settings: _Options) -> Client:
    """Return `client` with time limits for long replies, unless options set them."""
    client.read_timeout = settings.seconds("timeout", _LONG_S)
    client.total_timeout = settings.seconds("total-timeout", _LONG_S) or None
    return client


# -- a tree as text


class _Record(NamedTuple):
    key: str
    value: str | None = None                     # None for a directory
    expiration: str | None = None                # RFC 3339 instant

    @classmethod
    def from_node(cls, node: Node) -> _Record:
        return cls(node.key, None if node.dir else node.value or "", node.expiration)

    @classmethod
    def from_line(cls, line: str) -> _Record:
        name, *fields = line.split("\t")
        is_dir = name.endswith("/")
        extra = fields[1] if len(fields) == 2 else ""
        if (not name.startswith("/") or len(fields) > 2 or not (is_dir or fields)
                or (extra and not extra.startswith("expires=")) or (is_dir and any(fields[:1]))):
            raise ValueError("not KEY, tab, value or DIRECTORY/")
        expiration = extra[len("expires="):] or None
        _seconds_left(expiration)
        return cls(_unescape(name.rstrip("/")) or "/", None if is_dir else _unescape(fields[0]),
                   expiration)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> _Record:
        key, value, expiration = raw["key"], raw.get("value"), raw.get("expiration")
        if raw.get("dir", False) != (value is None) or not isinstance(key, str):
            raise ValueError(f"{raw} has not either a value or dir")
        if not isinstance(value, (str, type(None))):
            raise ValueError(f"the value of {key} is not text")
        _seconds_left(expiration)
        return cls(key, value, expiration)

    @property
    def ttl(self) -> int | None:
        """Seconds left; None: permanent; 0 or less: expired."""
        return _seconds_left(self.expiration)

    def line(self) -> str:
        key = _escape(self.key)
        fields = [key.rstrip("/") + "/", ""] if self.value is None else [key, _escape(self.value)]
        if self.expiration:
            return "\t".join([*fields, f"expires={self.expiration}"])
        return fields[0] if self.value is None else "\t".join(fields)

    def json(self) -> str:
        content = {"dir": True} if self.value is None else {"value": self.value}
        shown = {"key": self.key, **content}
        if self.expiration:
            shown["expiration"] = self.expiration
        return json.dumps(shown, ensure_ascii=False)


def _records_in(node: Node) -> list[_Record]:
    """Return the records of a node and of all nodes below it; the root itself has none."""
    nodes = node.walk() if node.key == "/" else itertools.chain([node], node.walk())
    return [_Record.from_node(found) for found in nodes]


def _parse_export(text: str) -> list[_Record]:
    """Parse either form, or a reply of the keys API.  Raises ValueError."""
    if text.lstrip()[:1] == "{":
        raw = json.loads(text)
        if "node" in raw:
            return _records_in(Node.from_json(raw["node"]))
        return [_Record.from_json(node) for node in raw["nodes"]]
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line[:-1] if line.endswith("\r") else line
        if not line or line.startswith("#"):
            continue
        try:
            records.append(_Record.from_line(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return records


def _rebased(key: str, prefix: str, dest_prefix: str) -> str | None:
    """Return `key` with another prefix; None if it does not have `prefix`."""
    prefix, dest_prefix = prefix.rstrip("/"), dest_prefix.rstrip("/")
    if key == (prefix or "/"):
        return dest_prefix or "/"
    return dest_prefix + key[len(prefix):] if key.startswith(prefix + "/") else None


def _prefixes(options: _Options) -> tuple[str, str]:
    prefix = clean_key(options.text("prefix"))
    return prefix, clean_key(options.text("dest-prefix") or prefix)


@_command("export", "[key]", "print a tree, for import",
          _Flag(("format",), str, "json (default), or text: one key in a line, for diff"),
          _Flag(("hidden",), list, "also this hidden directory; may be repeated"), own=True)
def _cmd_export(run: _Run) -> None:
    form = run.options.text("format") or "json"
    if form not in ("json", "text"):
        raise _ExitError("--format is json or text")
    key, client = (run.args or ["/"])[0], _with_long_timeouts(run.client, run.settings)
    with _Progress("export"):
        result = client.get(key, recursive=True, sorted=True, quorum=True)
        records = _records_in(result.node)
        for hidden in run.options.texts("hidden"):
            found = client.get(hidden, recursive=True, sorted=True, quorum=True)
            records += _records_in(found.node)
    # Lone surrogates from a server become escapes, which both forms support.
    plain = (text.encode("utf-8", "backslashreplace").decode() for text in
             (record.json() if form == "json" else record.line() for record in records))
    with _Progress("export", len(records)) as progress:
        _print_lines(itertools.chain(
            [_EXPORT_MARK] if form == "text" else
            [f'{{"pyetcd_export": {_EXPORT_VERSION}, "key": {json.dumps(result.key)}, '
             f'"etcdIndex": {result.etcd_index}, "nodes": ['],
            _separated(plain, "," if form == "json" else "", progress),
            [] if form == "text" else ["]}"]))


def _separated(texts: Iterable[str], separator: str, progress: _Progress) -> Iterator[str]:
    previous: str | None = None
    for number, text in enumerate(texts):
        progress.show(number)
        if previous is not None:
            yield previous + separator
        previous = text
    if previous is not None:
        yield previous


class _Import:
    def __init__(self, client: Client, options: _Options) -> None:
        self._client = client
        self._keep = options.on("keep")
        self._ttl = options.number("ttl") or None
        self._workers = options.number("c", 10)
        self._lock = threading.Lock()               # guards `kept`
        self.kept = 0                               # keys that existed

    def write(self, records: Sequence[_Record]) -> None:
        for record in _needed_dirs(records):
            self._write_one(record)
        files = [record for record in records if record.value is not None]
        _run_parallel(files, self._workers, self._write_one, "import")

    def ttl(self, record: _Record) -> int | None:
        return self._ttl if record.expiration and self._ttl else record.ttl

    def is_expired(self, record: _Record) -> bool:
        ttl = self.ttl(record)
        return ttl is not None and ttl <= 0

    def _write_one(self, record: _Record) -> None:
        ttl = self.ttl(record)
        if ttl is not None and ttl <= 0:            # expired meanwhile
            return
        try:
            if record.value is None:
                self._client.mkdir(record.key, ttl=ttl)
            else:
                write = self._client.create if self._keep else self._client.set
                write(record.key, record.value, ttl=ttl)
        except NodeExists:
            if record.value is not None:
                with self._lock:
                    self.kept += 1
            elif ttl and not self._keep:
                _set_dir(self._client, record.key, ttl, prevExist=True)


def _needed_dirs(records: Sequence[_Record]) -> list[_Record]:
    """Return the directories that writing the files does not create, or not with their ttl."""
    filled = {record.key.rpartition("/")[0] for record in records}
    return [record for record in records
            if record.value is None and (record.expiration or record.key not in filled)]


def _read_records(path: str) -> list[_Record]:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return _parse_export(data.decode("utf-8"))
    except OSError as error:
        raise _ExitError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _ExitError(f"{path} is not what export writes: {error}") from error


@_command("import", "<file>", "write the output of export; - is stdin", _PREFIX,
          _DEST_PREFIX, _Flag(("keep",), bool, "do not overwrite existing keys"),
          _Flag(("ttl",), int, "new ttl in seconds of keys with one, also of expired ones", 1),
          _DRY_RUN, _WORKERS, _Flag(("snap",), str, "instead: a snapshot file of etcd 0.4"),
          _Flag(("hidden",), list, "with --snap: also this hidden directory"), own=True)
def _cmd_import(run: _Run) -> int:
    if run.options.text("snap"):
        run.options.refuse("with --snap", "prefix", "dest-prefix", "keep", "ttl", "dry-run")
        if run.args:
            raise _ExitError(f'pyetcdctl import: "{run.args[0]}" has no effect with --snap')
        return _import_snapshot_04(run)
    run.options.refuse("without --snap", "hidden")
    if not run.args:
        _print("no snapshot file provided (use --snap)")
        return Exit.BAD_ARGS
    prefixes = _prefixes(run.options)
    found = [(record, _rebased(clean_key(record.key), *prefixes))
             for record in _read_records(run.args[0])]
    records = [record._replace(key=key) for record, key in found if key is not None and key != "/"]
    importing = _Import(_with_long_timeouts(run.client, run.settings), run.options)
    alive = [record for record in records if not importing.is_expired(record)]
    if run.options.on("dry-run"):
        _print_lines(f"{'mkdir' if record.value is None else 'set'} {_escape(record.key)}"
                    for record in alive)
        return Exit.OK
    importing.write(alive)
    files = sum(record.value is not None for record in alive)
    notes = [(importing.kept, "existed and were kept"),
             (len(records) - len(alive), "had expired and were left out"),
             (len(found) - len(records), "lie elsewhere and were left out")]
    _print("; ".join([f"imported {files - importing.kept} keys",
                     *(f"{count} {note}" for count, note in notes if count)]))
    return Exit.OK


# -- mirror


class _Change(NamedTuple):
    verb: str                                       # set, mkdir or delete
    key: str
    value: str = ""
    ttl: int | None = None

    def apply(self, client: Client) -> None:
        """Write the change; it is idempotent."""
        if self.verb == "set":
            client.set(self.key, self.value, ttl=self.ttl)
        elif self.verb == "mkdir":
            with contextlib.suppress(NotFile):      # the directory exists
                _set_dir(client, self.key, self.ttl)
        else:
            with contextlib.suppress(KeyNotFound):
                client.delete(self.key, recursive=True)


class _Mirror:
    """Makes a tree of the target equal to one of the source, and keeps it equal.

    A mirror keeps no state.  After a restart, after more changes than the source remembers, and
    when a change does not fit the target, it compares both trees and writes the difference.
    """

    def __init__(self, source: Client, target: Client, options: _Options) -> None:
        self._source = source
        self._target = target
        self._prefix, self._dest_prefix = _prefixes(options)
        self._with_ttl = options.on("ttl")
        self._deletes = not options.on("no-delete")
        self._workers = options.number("c", 10)
        self.dry_run = options.on("dry-run")
        self.verbose = options.on("verbose") or self.dry_run

    def check(self) -> None:
        """Raise _ExitError if the mirror would copy its own writes."""
        for client in (self._source, self._target):
            client.member_list()                    # for the cluster id of the reply
        inside = (_rebased(self._prefix, self._dest_prefix, ""),
                  _rebased(self._dest_prefix, self._prefix, ""))
        if self._source.cluster_id == self._target.cluster_id and any(inside):
            raise _ExitError("source and target overlap: they are the same cluster")

    def copy(self) -> int:
        """Make the trees equal; return the source's index for `follow`."""
        index, wanted = self._listing(self._source, self._prefix)
        _, present = self._listing(self._target, self._dest_prefix)
        deletions, dirs, files = self._difference(wanted, present)
        for change in (*deletions, *dirs):
            self._do(change)
        _run_parallel(files, self._workers, self._do, "mirror")
        _print(f"{'would copy' if self.dry_run else 'copied'} {len(files)} keys, "
              f"{'would remove' if self.dry_run else 'removed'} {len(deletions)}; "
              f"source index {index}")
        return index + 1

    def follow(self, index: int) -> None:
        while True:
            try:
                with self._source.watcher(
                        self._prefix, recursive=True, index=index, relist=False) as changes:
                    for event in changes:
                        self._repeat(event)
            except (ApiError, HttpError) as error:  # history cleared, or the trees differ
                if isinstance(error, Unauthorized) or is_endpoint_failure(error):
                    raise
                index = self._with_retries(self.copy)

    def _listing(self, client: Client, prefix: str) -> tuple[int, dict[str, Node]]:
        """Return a cluster's index and all nodes below `prefix` by their keys at the target."""
        try:
            result = client.get(prefix, recursive=True, sorted=True, quorum=True)
        except KeyNotFound as error:
            return error.index, {}
        if not result.node.dir:
            raise _ExitError(f"{prefix} is no directory")
        moved = ((_rebased(node.key, prefix, self._dest_prefix), node)
                 for node in result.node.walk())
        return result.etcd_index, {key: node for key, node in moved if key is not None}

    def _difference(self, wanted: Mapping[str, Node], present: Mapping[str, Node],
                    ) -> tuple[list[_Change], list[_Change], list[_Change]]:
        """Return the changes: deletions, directories and files."""
        deletions: list[_Change] = []
        for key, node in present.items():           # parents come first
            mine = wanted.get(key)
            unwanted = self._deletes if mine is None else mine.dir != node.dir
            gone = deletions and key.startswith(deletions[-1].key + "/")
            if unwanted and not gone:
                deletions.append(_Change("delete", key))
        dirs = [_Change("mkdir", key, ttl=self._ttl(node)) for key, node in wanted.items()
                if node.dir and (key not in present or not present[key].dir)]
        files = [_Change("set", key, node.value or "", self._ttl(node))
                 for key, node in wanted.items()
                 if not node.dir and not self._is_equal(node, present.get(key))]
        return deletions, dirs, files

    def _is_equal(self, node: Node, copy: Node | None) -> bool:
        expires = self._with_ttl and node.ttl is not None
        return (copy is not None and not copy.dir and copy.value == node.value
                and (copy.ttl is not None) == expires)

    def _ttl(self, node: Node) -> int | None:
        return max(1, node.ttl) if self._with_ttl and node.ttl is not None else None

    def _repeat(self, event: Result) -> None:
        key = _rebased(event.key, self._prefix, self._dest_prefix)
        if key is None or key == "/":
            return
        if event.action in ("delete", "expire", "compareAndDelete"):
            if self._deletes:
                self._with_retries(lambda: self._do(_Change("delete", key)))
            return
        verb = "mkdir" if event.node.dir else "set"
        change = _Change(verb, key, event.value or "", self._ttl(event.node))
        self._with_retries(lambda: self._do(change))

    def _do(self, change: _Change) -> None:
        if self.verbose:
            _print(f"{change.verb} {_escape(change.key)}")
        if not self.dry_run:
            change.apply(self._target)

    def _with_retries(self, action: Callable[[], _Answer]) -> _Answer:
        """Repeat `action`, which is idempotent, until a server replies."""
        wait_s = _RETRY_MIN_S
        while True:
            try:
                return action()
            except EtcdError as error:
                if not is_endpoint_failure(error):
                    raise
                _print_error(f"{error}; trying again")
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(_RETRY_MAX_S, 2 * wait_s)


@_command("mirror", "<target>", "keep a copy of a tree in another cluster",
          _PREFIX, _DEST_PREFIX, _Flag(("once",), bool, "end after the copy"), _DRY_RUN,
          _Flag(("no-delete",), bool, "do not remove keys that only the target has"),
          _Flag(("ttl",), bool, "let copies expire by themselves (see the manual)"),
          _Flag(("verbose",), bool, "print every change"), _WORKERS,
          _Flag(("dest-cert",), str, "client certificate for the target"),
          _Flag(("dest-key",), str, "key of that certificate"),
          _Flag(("dest-cacert",), str, "certificates of the target's authorities"),
          _Flag(("dest-username",), str, "user[:password] at the target"), own=True,
          wrong="Provide the endpoints of the target, comma between")
def _cmd_mirror(run: _Run) -> None:
    settings = _Options()
    for flag, own in (("dest-cert", "cert-file"), ("dest-key", "key-file"),
                      ("dest-cacert", "ca-file"), ("dest-username", "username")):
        settings.put(_Flag((own,), str, ""), run.options.text(flag))
    access = _Access.from_settings(settings, environment=False)
    with _with_long_timeouts(run.client, run.settings) as source, _with_long_timeouts(
            access.client(endpoints=run.args[0].split(",")), run.settings) as target:
        mirror = _Mirror(source, target, run.options)
        mirror.check()
        index = mirror.copy()
        if not mirror.dry_run and not run.options.on("once"):
            mirror.follow(index)
