"""The wire codec: etcd's protobuf messages, byte for byte.

Fields ascend, and a non-nullable field is written even when zero.  Every decode_x is the inverse
of encode_x and raises CodecError.
Source: etcd 2.3 raft/raftpb, wal/walpb, snap/snappb, etcdserver/etcdserverpb.
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import (
    Any,
    Callable,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from .errors import CodecError
from .limits import FIELDS_MAX, MESSAGE_ENTRIES_MAX, UINT64_MAX, VOTERS_MAX
from .messages import ConfChange, Entry, EntryID, HardState, Message, MsgType, Request, Snapshot
from .text import LongText, as_unicode, finish, long_text_steps, text_of, utf8

_BYTE = [bytes((value,)) for value in range(128)]
_SMALL = _BYTE + [bytes((value & 127 | 128, value >> 7)) for value in range(128, 1_024)]
Buffer = Union[bytes, bytearray, memoryview]
Schema = Mapping[int, Tuple[str, int, Callable[[Any], Any]]]    # number: name, wire type, convert


def encode_varint(value: int) -> bytes:
    """Return the protobuf varint of 0 <= value < 2**64, or of a negative int64."""
    if 0 <= value < 1_024:
        return _SMALL[value]
    value &= UINT64_MAX
    if value < 1 << 14:
        return bytes((value & 127 | 128, value >> 7))
    if value < 1 << 21:                 # an index: these lines save 0.2 us each
        return bytes((value & 127 | 128, value >> 7 & 127 | 128, value >> 14))
    if 1 << 28 <= value < 1 << 35:      # a checksum
        return bytes((
            value & 127 | 128, value >> 7 & 127 | 128, value >> 14 & 127 | 128,
            value >> 21 & 127 | 128, value >> 28,
        ))
    return bytes((value & 127 | 128, value >> 7 & 127 | 128)) + _encode_rest(value >> 14)


@functools.lru_cache(maxsize=1_024)     # of ids, most of which differ only below
def _encode_rest(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint(data: Buffer, offset: int) -> Tuple[int, int]:
    """Return (value, offset behind it).  Raises CodecError if cut or longer than 64 bits."""
    value = shift = 0
    try:
        while True:
            byte = data[offset]
            offset += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & UINT64_MAX, offset
            shift += 7
            if shift > 63:
                raise CodecError("varint longer than 64 bits")
    except IndexError:
        raise CodecError("unexpected end inside a varint") from None


def decode_fields(data: Buffer, limit: int = FIELDS_MAX) -> Iterator[Tuple[int, int, Any]]:
    """Yield (field number, wire type, value): int for varint and fixed, a slice for bytes.

    Raises CodecError for anything that is not protobuf, and for more than `limit` fields: a
    later one replaces an earlier one, so millions are only work.  Callers skip unknown fields.
    """
    offset, end = 0, len(data)
    for _ in range(limit + 1):
        if offset >= end:
            return
        tag = data[offset]
        if tag < 128:
            offset += 1
        else:
            tag, offset = decode_varint(data, offset)
        wire_type = tag & 7
        if wire_type == 0:
            value, offset = decode_varint(data, offset)
            yield tag >> 3, 0, value
            continue
        if wire_type == 2:
            size, offset = decode_varint(data, offset)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise CodecError(f"unknown wire type {wire_type}")
        if offset + size > end:
            raise CodecError("unexpected end inside a field")
        chunk = data[offset:offset + size]
        offset += size
        yield tag >> 3, wire_type, chunk if wire_type == 2 else int.from_bytes(chunk, "little")
    raise CodecError(f"more than {limit} fields")


def check_wire_type(wire_type: int, expected: int, owner: str) -> None:
    if wire_type != expected:
        raise CodecError(f"{owner}: wire type {wire_type}, expected {expected}")


def decode_known(data: Buffer, schema: Schema, owner: str) -> Dict[str, Any]:
    """Decode the single-valued fields of `schema`."""
    values: Dict[str, Any] = {}
    for number, wire_type, value in decode_fields(data):
        known = schema.get(number)
        if known is not None:
            name, expected, convert = known
            check_wire_type(wire_type, expected, owner)
            values[name] = convert(value)
    return values


def _bytes_field(tag: bytes, data: bytes) -> bytes:
    return tag + encode_varint(len(data)) + data


def encode_hard_state(state: HardState) -> bytes:
    return b"\x08%b\x10%b\x18%b" % (
        encode_varint(state.term), encode_varint(state.vote), encode_varint(state.commit)
    )


_HARD_STATE = {1: ("term", 0, int), 2: ("vote", 0, int), 3: ("commit", 0, int)}


def decode_hard_state(data: Buffer) -> HardState:
    return HardState(**decode_known(data, _HARD_STATE, "HardState"))


def encode_entry(entry: Entry) -> bytes:
    """Encode an entry, without the data if they are empty, as etcd 2.3 does."""
    data, term = entry.data, entry.term     # a hot path
    size = len(data)
    if not size:
        return b"\x08%b\x10%b\x18%b" % (
            _BYTE[entry.type], encode_varint(term), encode_varint(entry.index))
    return b'\x08%b\x10%b\x18%b"%b%b' % (
        _BYTE[entry.type], _SMALL[term] if term < 1_024 else encode_varint(term),
        encode_varint(entry.index), _SMALL[size] if size < 1_024 else encode_varint(size), data,
    )


def encode_entry_head(entry: Entry) -> bytes:
    """Return the part of encode_entry() before the data."""
    head = encode_entry(Entry(entry.type, entry.term, entry.index))
    return b'%b"%b' % (head, encode_varint(len(entry.data))) if entry.data else head


_ENTRY = {1: ("type", 0, int), 2: ("term", 0, int), 3: ("index", 0, int), 4: ("data", 2, bytes)}
_VARINT = rb"([\x80-\xff]{0,9}[\x00-\x7f])"
_PLAIN_ENTRY = re.compile(b'\x08\0\x10%b\x18%b"%b' % ((_VARINT,) * 3))


def decode_entry(data: Buffer) -> Entry:
    plain = _PLAIN_ENTRY.match(data)    # the usual form: 2 us instead of 7
    if plain is not None:
        term, index, size = plain.groups()
        start = plain.end()
        if _varint_value(size) == len(data) - start:
            entry = Entry(0, _varint_value(term), _varint_number(index), bytes(data[start:]))
            entry.encoded = bytes(data)
            return entry
    return Entry(**decode_known(data, _ENTRY, "Entry"))


@functools.lru_cache(maxsize=1_024)     # of terms and sizes
def _varint_value(data: bytes) -> int:
    return decode_varint(data, 0)[0]


def _varint_number(data: bytes) -> int:
    """Return the value of a varint of at most ten bytes: most ids differ in the first two."""
    if len(data) < 3:
        return _varint_value(data)
    return data[0] & 127 | (data[1] & 127) << 7 | _varint_value(data[2:]) << 14 & UINT64_MAX


def encode_conf_change(change: ConfChange) -> bytes:
    head = b"\x08%b\x10%b\x18%b" % (
        encode_varint(change.id), encode_varint(change.type), encode_varint(change.node_id)
    )
    return head if change.context is None else head + _bytes_field(b"\x22", change.context)


_CONF_CHANGE = {
    1: ("id", 0, int), 2: ("type", 0, int), 3: ("node_id", 0, int), 4: ("context", 2, bytes),
}


def decode_conf_change(data: Buffer) -> ConfChange:
    return ConfChange(**decode_known(data, _CONF_CHANGE, "ConfChange"))


def encode_snapshot_parts(snapshot: Optional[Snapshot]) -> Tuple[bytes, ...]:
    """Encode a snapshot without a copy of its data; None is the empty one of most messages."""
    if snapshot is None:
        return (_EMPTY_SNAPSHOT,)
    before, after = encode_snapshot_around(len(snapshot.data), snapshot.voters, snapshot.id)
    return before, snapshot.data, after


def encode_snapshot_around(
    size: int, voters: Iterable[int], snapshot_id: EntryID
) -> Tuple[bytes, bytes]:
    """Return the parts of a raftpb.Snapshot before and after its `size` bytes of data."""
    conf_state = b"".join(b"\x08" + encode_varint(voter) for voter in voters)
    metadata = b"%b\x10%b\x18%b" % (
        _bytes_field(b"\x0a", conf_state), encode_varint(snapshot_id.index),
        encode_varint(snapshot_id.term),
    )
    before = b"\x0a" + encode_varint(size) if size else b""
    return before, _bytes_field(b"\x12", metadata)


_EMPTY_SNAPSHOT = b"\x12\x06\x0a\x00\x10\x00\x18\x00"


def decode_snapshot(data: Buffer) -> Snapshot:
    """Decode a raftpb.Snapshot; the fields that etcd 3.x adds are skipped."""
    values = decode_known(data, _SNAPSHOT, "Snapshot")
    metadata = values.pop("metadata", b"")
    return Snapshot(**values, **decode_known(metadata, _SNAPSHOT_METADATA, "SnapshotMetadata"))


def _decode_voters(data: Buffer) -> Tuple[int, ...]:
    """Return the voters of a ConfState: field 1, unpacked, or packed by other writers."""
    voters: List[int] = []
    for number, wire_type, value in decode_fields(data):
        if number == 1 and wire_type == 0:
            voters.append(value)
        elif number == 1:
            check_wire_type(wire_type, 2, "ConfState")
            offset = 0
            while offset < len(value):
                voter, offset = decode_varint(value, offset)
                voters.append(voter)
                if len(voters) > VOTERS_MAX:
                    raise CodecError(f"more than {VOTERS_MAX} voters")
    return tuple(voters)


_SNAPSHOT: Schema = {           # the data are not copied: 200 MB would stop all threads for 0.1 s
    1: ("data", 2, lambda data: data), 2: ("metadata", 2, bytes),
}
_SNAPSHOT_METADATA: Schema = {
    1: ("voters", 2, _decode_voters), 2: ("index", 0, int), 3: ("term", 0, int),
}

SHARED_DATA_BYTES = 1 << 16         # of an entry or a snapshot; above: never copied


def joined_parts(parts: Sequence[bytes]) -> List[bytes]:
    """Join short parts that follow each other."""
    if max(map(len, parts), default=0) <= SHARED_DATA_BYTES:
        return [b"".join(parts)]
    joined: List[bytes] = []
    for is_short, run in itertools.groupby(parts, lambda part: len(part) <= SHARED_DATA_BYTES):
        if is_short:
            joined.append(b"".join(run))
        else:
            joined += run
    return joined


def encode_message(message: Message) -> bytes:
    return b"".join(encode_message_parts(message))


def encode_message_parts(message: Message) -> List[bytes]:
    """Encode a message, with no copy of long data; the snapshot is written even when empty."""
    head = _message_head(message.type, message.to, message.sender, message.term, message.log_term)
    parts = [b"%b\x30%b" % (head, encode_varint(message.index))]
    for entry in message.entries:
        head = encode_entry_head(entry)
        parts += (b"\x3a", encode_varint(len(head) + len(entry.data)), head, entry.data)
    snapshot = encode_snapshot_parts(message.snapshot)
    size = encode_varint(sum(map(len, snapshot)))
    parts += (b"\x40%b\x4a%b" % (encode_varint(message.commit), size), *snapshot)
    parts.append(b"\x50%b\x58%b" % (_BYTE[message.reject], encode_varint(message.reject_hint)))
    if message.context is not None:
        parts.append(_bytes_field(b"\x62", message.context))
    return joined_parts(parts)


@functools.lru_cache(maxsize=256)
def _message_head(type: int, to: int, sender: int, term: int, log_term: int) -> bytes:
    """Encode the fields that all messages of a kind to one member share for a term."""
    return b"\x08%b\x10%b\x18%b\x20%b\x28%b" % tuple(
        map(encode_varint, (type, to, sender, term, log_term)))


def _snapshot_or_none(data: Buffer) -> Optional[Snapshot]:
    snapshot = decode_snapshot(data)
    return snapshot if snapshot.index else None


_MESSAGE: Schema = {
    1: ("type", 0, int), 2: ("to", 0, int), 3: ("sender", 0, int), 4: ("term", 0, int),
    5: ("log_term", 0, int), 6: ("index", 0, int), 8: ("commit", 0, int),
    9: ("snapshot", 2, _snapshot_or_none), 10: ("reject", 0, bool), 11: ("reject_hint", 0, int),
    12: ("context", 2, bytes),
}
_PLAIN_MESSAGE = re.compile(
    rb"%b%b\x50\x00\x58%b" % (
        b"".join([re.escape(bytes((tag,))) + _VARINT for tag in (8, 16, 24, 32, 40, 48, 64)]),
        re.escape(b"\x4a\x08" + _EMPTY_SNAPSHOT), _VARINT,
    )
)


def _decode_plain_message(data: Buffer) -> Optional[Message]:
    """Decode a message of numbers alone, as most answers are: 3 us, not 13.  None: another form."""
    plain = _PLAIN_MESSAGE.fullmatch(data)
    if plain is None:
        return None
    kind, to, sender, term, log_term, index, commit, hint = plain.groups()
    return Message(
        _varint_value(kind), to=_varint_value(to), sender=_varint_value(sender),
        term=_varint_value(term), log_term=_varint_value(log_term),
        index=_varint_number(index), commit=_varint_number(commit), reject_hint=_varint_value(hint),
    )


def decode_message(data: Buffer) -> Message:
    return finish(decode_message_steps(data))


def decode_message_steps(data: Buffer) -> Generator[None, None, Message]:
    """Decode a message in steps of 1 ms at most, or of one entry.  Raises CodecError."""
    message = _decode_plain_message(data)
    if message is None:
        message = yield from _decode_any_message(data)
    if message.type > MsgType.PRE_VOTE_RESP:
        raise CodecError(f"unknown message type {message.type}")
    return message


STEP_ENTRIES = 200                  # of a peer's message, decoded or checked in one step
STEP_BYTES = 1 << 18                # of data in one step, or more with the last entry


def _decode_any_message(data: Buffer) -> Generator[None, None, Message]:
    entries: List[Entry] = []
    values: Dict[str, Any] = {"type": 0}
    others = work = 0
    for number, wire_type, value in decode_fields(data, MESSAGE_ENTRIES_MAX + FIELDS_MAX):
        if number == 7:
            check_wire_type(wire_type, 2, "Message")
            entries.append(decode_entry(value))
            work += STEP_BYTES // STEP_ENTRIES + len(value)
            if work > STEP_BYTES:
                work = 0
                yield
            continue
        others += 1
        if others > FIELDS_MAX:
            raise CodecError(f"more than {FIELDS_MAX} fields that are no entries")
        known = _MESSAGE.get(number)
        if known is not None:
            name, expected, convert = known
            check_wire_type(wire_type, expected, "Message")
            values[name] = convert(value)
    return Message(entries=entries, **values)


def encode_request(
    request: Request, val: Optional[List[bytes]] = None, prev_value: Optional[List[bytes]] = None
) -> bytes:
    """Encode a request: PrevExist and Refresh only when given, all other fields always.

    val, prev_value  the UTF-8 of these texts in pieces, if already encoded
    """
    prev_exist, refresh = request.prev_exist, request.refresh
    val = [utf8(request.val)] if val is None else val
    prev_value = [utf8(request.prev_value)] if prev_value is None else prev_value
    return b"".join((
        b"\x08", encode_varint(request.id),
        _bytes_field(b"\x12", request.method.encode()),
        _bytes_field(b"\x1a", utf8(request.path)),
        b"\x22", encode_varint(sum(map(len, val))), *val,
        b"\x28", _BYTE[request.dir],
        b"\x32", encode_varint(sum(map(len, prev_value))), *prev_value,
        b"\x38", encode_varint(request.prev_index),
        b"" if prev_exist is None else b"\x40" + _BYTE[prev_exist],
        b"\x48", encode_varint(request.expiration),
        b"\x50", _BYTE[request.wait],
        b"\x58", encode_varint(request.since),
        b"\x60", _BYTE[request.recursive],
        b"\x68", _BYTE[request.sorted],
        b"\x70", _BYTE[request.quorum],
        b"\x78", encode_varint(request.time),
        b"\x80\x01", _BYTE[request.stream],
        b"" if refresh is None else b"\x88\x01" + _BYTE[refresh],
    ))


def encode_target(method: str, path: str) -> bytes:
    return _bytes_field(b"\x12", method.encode()) + _bytes_field(b"\x1a", utf8(path))


_NO_OPTIONS = encode_request(Request())[len(b"\x08\0\x12\0\x1a\0\x22\0"):]


def encode_plain(id: int, target: bytes, value: bytes) -> bytes:
    """Encode a Request with a value and no option, to an encode_target(): 0.8 us instead of 2.3."""
    size = len(value)
    return b'\x08%b%b"%b%b%b' % (
        encode_varint(id), target, _SMALL[size] if size < 1_024 else encode_varint(size), value,
        _NO_OPTIONS,
    )


def wrap_int64(value: int) -> int:
    return (value + (1 << 63) & UINT64_MAX) - (1 << 63)


def _text(value: Buffer) -> str:
    return text_of(bytes(value))


_REQUEST: Schema = {
    1: ("id", 0, int), 2: ("method", 2, _text), 3: ("path", 2, _text), 4: ("val", 2, _text),
    5: ("dir", 0, bool), 6: ("prev_value", 2, _text), 7: ("prev_index", 0, int),
    8: ("prev_exist", 0, bool), 9: ("expiration", 0, wrap_int64), 10: ("wait", 0, bool),
    11: ("since", 0, int), 12: ("recursive", 0, bool), 13: ("sorted", 0, bool),
    14: ("quorum", 0, bool), 15: ("time", 0, wrap_int64), 16: ("stream", 0, bool),
    17: ("refresh", 0, bool),
}
_LONG_REQUEST: Schema = {**_REQUEST, 4: ("val", 2, memoryview), 6: ("prev_value", 2, memoryview)}
LONG_REQUEST_BYTES = 1 << 17        # above: decoded in steps

# The size has 35 bits at most: a pattern takes no position of 64.
_PUT_HEAD = re.compile(rb"\x08%b\x12\x03PUT\x1a([\x80-\xff]{0,4}[\x00-\x7f])" % _VARINT)
_VALUE_HEAD = re.compile(b'"' + _VARINT)


def _decode_plain_put(data: bytes) -> Optional[Request]:
    """Decode a PUT of a value without options: 2 us instead of 12.  None: another form."""
    head = _PUT_HEAD.match(data)
    if head is None or not data.endswith(_NO_OPTIONS):
        return None
    id, size = head.groups()
    path_end = head.end() + _varint_value(size)
    value = _VALUE_HEAD.match(data, path_end)
    if value is None or value.end() + _varint_value(value[1]) + len(_NO_OPTIONS) != len(data):
        return None
    return Request(
        _varint_number(id), "PUT", text_of(data[head.end():path_end]),
        text_of(data[value.end():-len(_NO_OPTIONS)]),
    )


def decode_request(data: Buffer) -> Optional[Request]:
    """Return the command in a normal entry's data, or None for an operation of etcd 3's API.

    A v2 command is a bare Request, or a Request nested in field 2 of InternalRaftRequest.  Field 2
    of a bare Request is its method, in upper case.
    """
    plain = _decode_plain_put(bytes(data))
    if plain is not None:
        return plain
    values = _request_fields(data, _REQUEST)
    return None if values is None else Request(**values)


def _request_fields(data: Buffer, schema: Schema) -> Optional[Dict[str, Any]]:
    nested = next((value for number, _, value in decode_fields(data) if number == 2), None)
    if nested is None:
        return None
    if isinstance(nested, int):
        raise CodecError("Request: method is not a string")
    if bytes(nested[:1]) == b"\x08":
        data = nested
    return decode_known(data, schema, "Request")


def decode_long_request(data: bytes) -> Generator[None, None, Optional[Request]]:
    """Do decode_request() in steps of some ms; long texts become LongText, all are Unicode."""
    values = _request_fields(memoryview(data), _LONG_REQUEST)
    if values is None:
        return None
    for name in ("val", "prev_value"):
        value: Buffer = values.get(name, b"")
        if len(value) > LONG_REQUEST_BYTES // 4:        # even if all have four bytes, it is long
            text: LongText = (yield from long_text_steps(value))
            values[name] = text
        else:
            values[name] = as_unicode(_text(value))
    values["path"] = as_unicode(values.get("path", ""))
    return Request(**values)


def decode_request_head(data: bytes) -> Optional[Request]:
    """Do decode_request() without the texts, at once even if they are long."""
    values = _request_fields(memoryview(data), _LONG_REQUEST)
    return None if values is None else Request(**{**values, "val": "", "prev_value": ""})


def encode_request_steps(request: Request) -> Generator[None, None, bytes]:
    """Do encode_request() of long texts in steps of some ms."""
    texts: List[List[bytes]] = [[], []]
    for pieces, text in zip(texts, (request.val, request.prev_value)):
        for start in range(0, len(text), LONG_REQUEST_BYTES):
            pieces.append(utf8(text[start:start + LONG_REQUEST_BYTES]))
            if len(pieces) % 8 == 0:
                yield
    data = encode_request(request, *texts)
    yield                               # the copy took some ms
    return data


def encode_metadata(member_id: int, cluster_id: int) -> bytes:
    """Encode the identity in every WAL file (etcdserverpb.Metadata)."""
    return b"\x08%b\x10%b" % (encode_varint(member_id), encode_varint(cluster_id))


def decode_metadata(data: Buffer) -> Tuple[int, int]:
    """Return (member_id, cluster_id)."""
    schema = {1: ("member_id", 0, int), 2: ("cluster_id", 0, int)}
    values = decode_known(data, schema, "Metadata")
    return values.get("member_id", 0), values.get("cluster_id", 0)
