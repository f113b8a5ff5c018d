"""Keys on their way between clusters: read from a directory, a cluster or a file; written to one.

A file is an export like that of `pyetcdctl export`, a record a line; a shell script for etcdctl of
etcd 3; or a database for its `etcdctl snapshot restore`.  Records are read and written one by one:
memory holds the largest directory at most, or what a member holds anyhow.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from typing import (
    Any,
    BinaryIO,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    TextIO,
    Tuple,
)

from ..base.codec import decode_fields, encode_varint
from ..base.errors import CodecError
from ..base.limits import NS
from ..base.text import format_time, json_string, load_json, parse_time
from ..disk.bolt import BoltError, BoltReader, v3_buckets, write_bolt
from ..store.tree import Store
from .sources import BackupError

EXPORT_VERSION = 1                  # of the form with a record a line
COPY_BYTES = 1 << 20
ARGUMENT_BYTES_MAX = 1 << 16        # of a value on a command line; a longer one comes by a pipe
_LEASE_FIRST = 1 << 40              # ids of the leases that are made here
_REVISION_FIRST = 2                 # of the first key; 1 is that of an empty store


class Record(NamedTuple):
    """A node: value is None for a directory, expires_ns 0 for a permanent one."""

    key: str
    value: Optional[str]
    expires_ns: int

    def ttl_s(self, now_ns: int) -> int:
        """Return the seconds left, at least 1; 0 if permanent, -1 if it has expired."""
        if not self.expires_ns:
            return 0
        left = -((now_ns - self.expires_ns) // NS)
        return left if left > 0 else -1


Records = Iterable[Record]
KeyMap = List[Tuple[str, str]]      # prefix -> its replacement, the longest first


def parse_key_map(text: str) -> KeyMap:
    """Read `/old=/new,/other=`.  Raises ValueError."""
    pairs = []
    for part in filter(None, text.split(",")):
        old, separator, new = part.partition("=")
        if not separator or not old:
            raise ValueError(f"{part} is not OLD=NEW, a prefix of keys and what replaces it")
        pairs.append((old, new))
    return sorted(pairs, key=lambda pair: -len(pair[0]))


def mapped(key: str, key_map: KeyMap) -> str:
    """Replace the longest prefix of `key`, of whole parts only, that the map has."""
    for old, new in key_map:
        if key == old or key.startswith(old if old.endswith("/") else old + "/"):
            return new + key[len(old):]
    return key


# -- sources


def records_of_store(store: Store) -> Iterator[Record]:
    """Yield the nodes of users' keys, parents first."""
    for path, node in store.nodes_below("/1"):
        yield Record(path[2:], node.value if node.children is None else None, node.expires_ns)


def record_of(node: Any) -> Record:
    """Return the record of a node in JSON.  Raises ValueError, KeyError, AttributeError."""
    expiration = node.get("expiration")
    value = None if node.get("dir") else node["value"]
    if not isinstance(node["key"], str) or not isinstance(value, (str, type(None))):
        raise ValueError("key and value are text")
    return Record(node["key"], value, parse_time(expiration) if expiration else 0)


def records_of_file(file: TextIO, path: str) -> Iterator[Record]:
    """Yield the records of a JSON file, a line each.  Raises BackupError."""
    if not file.readline().startswith('{"pyetcd_export"'):
        raise BackupError(
            f"{path} does not begin as `pyetcd export` and `pyetcdctl export` write; other JSON,"
            " like an answer of the keys API, is read by `pyetcdctl import`"
        )
    for number, line in enumerate(file, 2):
        text = line.strip().rstrip(",")
        if text == "]}":
            return
        try:
            yield record_of(load_json(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackupError(f"{path}, line {number}: no record of an export: {error}") from None
    raise BackupError(f"{path} is cut: its last line, ]}}, is missing")


def records_of_database(
    path: str, skipped: Callable[[bytes, str], None], now_ns: int
) -> Iterator[Record]:
    """Yield the present keys of a database of etcd 3: a snapshot, or member/snap/db.

    skipped is called with keys that v2 cannot hold, and why.  Takes 30 bytes and the key in
    memory for each key.  Raises BackupError.
    """
    try:
        with BoltReader(path) as reader:
            newest, expires = _newest_revisions(reader), _lease_ends(reader, now_ns)
            for revision, data in reader.items(b"key"):
                key, value, lease = _key_value(data)
                if newest.get(key) != revision:
                    continue
                try:
                    yield Record(_v2_key(key), value.decode("utf-8"), expires.get(lease, 0))
                except ValueError as error:
                    skipped(key, str(error))
    except (BoltError, CodecError) as error:
        raise BackupError(f"{path} cannot be read: {error}") from None
    except OSError as error:
        raise BackupError(f"cannot read {path}: {error}") from None


def _newest_revisions(reader: BoltReader) -> Dict[bytes, bytes]:
    """Return key -> its newest revision, of keys that are not deleted."""
    newest: Dict[bytes, bytes] = {}
    for revision, data in reader.items(b"key"):
        key = _key_value(data)[0]
        if len(revision) == 17:
            newest[key] = revision
        else:                           # a mark of deletion: 17 bytes and "t"
            newest.pop(key, None)
    return newest


def _lease_ends(reader: BoltReader, now_ns: int) -> Dict[int, int]:
    """Return lease -> unix nanoseconds of its end: a whole ttl from now, as etcd 3 restarts it."""
    ends: Dict[int, int] = {}
    for _, data in reader.items(b"lease"):
        fields = {number: value for number, _, value in decode_fields(data)}
        lease, ttl_s = fields.get(1), fields.get(2)
        if isinstance(lease, int) and isinstance(ttl_s, int):
            ends[lease] = now_ns + ttl_s * NS
    return ends


def _key_value(data: bytes) -> Tuple[bytes, bytes, int]:
    """Return key, value and lease of a mvccpb.KeyValue.  Raises CodecError."""
    fields: Dict[int, Any] = {number: value for number, _, value in decode_fields(data)}
    key, value, lease = fields.get(1, b""), fields.get(5, b""), fields.get(6, 0)
    if isinstance(key, int) or isinstance(value, int) or not isinstance(lease, int):
        raise CodecError("not a key of etcd 3")
    return bytes(key), bytes(value), lease


def _v2_key(key: bytes) -> str:
    text = key.decode("utf-8")
    if not text.strip("/") or "//" in text or text.endswith("/"):
        raise ValueError("v2 cannot hold a key with an empty part")
    if {".", ".."} & set(text.split("/")):
        raise ValueError("v2 cannot hold a key with the part . or ..")
    return text if text.startswith("/") else "/" + text


# -- targets


def _live_keys(records: Records, now_ns: int) -> Iterator[Tuple[str, str, int]]:
    """Yield (key, value, seconds left or 0) of the keys that have not expired."""
    for record in records:
        ttl_s = record.ttl_s(now_ns)
        if record.value is not None and ttl_s >= 0:
            yield record.key, record.value, ttl_s


def write_json(records: Records, file: TextIO, etcd_index: int) -> int:
    """Write the form of `pyetcdctl export`; return the number of keys."""
    file.write(f'{{"pyetcd_export": {EXPORT_VERSION}, "key": "/", "etcdIndex": {etcd_index},'
               ' "nodes": [\n')
    keys, separator = 0, ""
    for record in records:
        content = '"dir": true' if record.value is None else f'"value": {json_string(record.value)}'
        expiration = (f', "expiration": "{format_time(record.expires_ns)}"'
                      if record.expires_ns else "")
        file.write(f'{separator}{{"key": {json_string(record.key)}, {content}{expiration}}}')
        separator = ",\n"
        keys += record.value is not None
    file.write("\n" * bool(separator) + "]}\n")
    return keys


def write_script(records: Records, file: TextIO, *, leases: bool, now_ns: int) -> int:
    """Write a script of etcdctl commands for etcd 3; return the number of keys.

    leases  True: a key with a time to live gets a lease of what is left; False: it is permanent
    """
    file.write("#!/bin/sh\n# Keys of etcd v2, written by pyetcd export.  Endpoints and access come"
               " from ETCDCTL_... variables.\nset -e\nexport ETCDCTL_API=3\n")
    keys = 0
    for key, value, ttl_s in _live_keys(records, now_ns):
        option = ""
        if leases and ttl_s:
            file.write(f"lease=$(etcdctl lease grant {ttl_s} | cut -d' ' -f2)\n")
            option = '--lease="$lease" '
        name, text = shlex.quote(key), shlex.quote(value)
        if len(value) <= ARGUMENT_BYTES_MAX // 4:
            file.write(f"etcdctl put {option}-- {name} {text} >/dev/null\n")
        else:                           # printf is a part of the shell: no limit of arguments
            file.write(f"printf %s {text} | etcdctl put {option}-- {name} >/dev/null\n")
        keys += 1
    return keys


def write_database(records: Records, path: str, *, leases: bool, now_ns: int) -> int:
    """Write a snapshot of etcd 3 with these keys, each at a revision of its own; return how many.

    `etcdctl snapshot restore` checks the digest at its end.  Raises OSError.
    """
    count = 0
    leases_s: List[int] = []            # the time to live of each lease

    def key_items() -> Iterator[Tuple[bytes, bytes]]:
        nonlocal count
        for key, value, ttl_s in _live_keys(records, now_ns):
            lease = 0
            if leases and ttl_s:
                lease = _LEASE_FIRST + len(leases_s)
                leases_s.append(ttl_s)
            revision = _REVISION_FIRST + count
            count += 1
            yield (revision.to_bytes(8, "big") + b"_" + bytes(8),
                   _encode_key_value(key.encode(), value.encode(), revision, lease))

    def lease_items() -> Iterator[Tuple[bytes, bytes]]:     # asked for after all keys
        for lease, ttl_s in enumerate(leases_s, _LEASE_FIRST):
            yield (lease.to_bytes(8, "big"),
                   b"\x08" + encode_varint(lease) + b"\x10" + encode_varint(ttl_s))

    with open(path, "w+b") as file:
        write_bolt(file, {**v3_buckets(0), b"key": key_items(), b"lease": lease_items()})
        file.seek(0)
        _append_digest(file)
        file.flush()
        os.fsync(file.fileno())
    return count


def _append_digest(file: BinaryIO) -> None:
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(COPY_BYTES), b""):
        digest.update(block)
    file.write(digest.digest())


def _encode_key_value(key: bytes, value: bytes, revision: int, lease: int) -> bytes:
    """Return a mvccpb.KeyValue, created at `revision` and not changed since."""
    number = encode_varint(revision)
    data = b"\x0a%b%b\x10%b\x18%b\x20\x01\x2a%b%b" % (
        encode_varint(len(key)), key, number, number, encode_varint(len(value)), value)
    return data + b"\x30" + encode_varint(lease) if lease else data
