"""Peer frames: messages as bytes on a stream; invalid or too long ones raise CodecError."""

from __future__ import annotations

import struct
from typing import Generator, List, Sequence, Union

from ..base.codec import (
    SHARED_DATA_BYTES,
    STEP_BYTES,
    STEP_ENTRIES,
    decode_entry,
    decode_message_steps,
    encode_entry,
    encode_entry_head,
    encode_message,
    encode_message_parts,
    joined_parts,
)
from ..base.errors import CodecError
from ..base.limits import MESSAGE_ENTRIES_MAX, RAFT_BODY_BYTES_MAX
from ..base.messages import Entry, Message, MsgType

_U64 = struct.Struct(">Q")
_pack_u64 = _U64.pack


class EntryListEncoder:
    """Encodes lists of entries for msgappv2: each as big-endian uint64 length, then its bytes."""

    def __init__(self) -> None:
        self._entries: Sequence[Entry] = ()     # the last list: a leader sends it to all followers
        self._data: List[bytes] = []

    def encode(self, entries: Sequence[Entry]) -> List[bytes]:
        """Return the bytes of `entries` in pieces; the list must not change until forget()."""
        if entries is not self._entries:
            parts: List[bytes] = []
            for entry in entries:
                if len(entry.data) > SHARED_DATA_BYTES:
                    head = encode_entry_head(entry)
                    parts += (_pack_u64(len(head) + len(entry.data)) + head, entry.data)
                    continue
                data = entry.encoded or encode_entry(entry)
                if entry.encoded is not None:       # the log will be written from it, too
                    entry.encoded = data
                parts += (_pack_u64(len(data)), data)
            self._entries, self._data = entries, joined_parts(parts)
        return self._data

    def forget(self) -> None:
        self._entries, self._data = (), []


class MessageEncoder:
    """Frames of the message stream: big-endian uint64 length, then the Message."""

    heartbeat = _pack_u64(28) + encode_message(Message(MsgType.HEARTBEAT))

    @staticmethod
    def encode(message: Message) -> List[bytes]:
        """Return the frame in pieces, of which the long ones are not copied."""
        data = encode_message_parts(message)
        return joined_parts((_pack_u64(sum(map(len, data))), *data))


class AppV2Encoder:
    """Frames of msgappv2 (etcd 2.3 rafthttp/msgappv2.go), short if they continue the last one."""

    heartbeat = b"\0"

    def __init__(self, lists: EntryListEncoder) -> None:
        self._lists = lists
        self._term = 0
        self._index = 0                 # of the last entry sent

    def encode(self, message: Message) -> List[bytes]:
        """Return the frame of a MsgApp in pieces, of which the long ones are not copied."""
        entries = message.entries
        if message.index == self._index and message.log_term == self._term == message.term:
            self._index += len(entries)
            return joined_parts((
                b"\1", _pack_u64(len(entries)), *self._lists.encode(entries),
                _pack_u64(message.commit),
            ))
        self._term = message.term
        self._index = entries[-1].index if entries else message.index
        return joined_parts((b"\2", *MessageEncoder.encode(message)))


_ENTRY_WORK = STEP_BYTES // STEP_ENTRIES
Frames = Generator[Union[int, Message, None], bytes, None]


def _frame_size(length: bytes) -> int:
    size: int = _U64.unpack(length)[0]
    if size > RAFT_BODY_BYTES_MAX:
        raise CodecError(f"frame of {size} bytes")
    return size


def message_frames() -> Frames:
    """Parse the message stream: yield its messages, and None for a link heartbeat.

    This one and app_v2_frames() are for a StreamParser, raise CodecError, and yield None also
    between steps of 1 ms at most, or of one entry.
    """
    while True:
        message = yield from decode_message_steps((yield _frame_size((yield 8))))
        is_heartbeat = message.type == MsgType.HEARTBEAT and not (message.sender or message.to)
        yield None if is_heartbeat else message


def app_v2_frames(local_id: int, remote_id: int) -> Frames:
    """Parse a msgappv2 stream from member `remote_id` to `local_id`."""
    term = index = 0                    # of the last entry
    while True:
        kind = yield 1
        if kind == b"\1":
            (count,) = _U64.unpack((yield 8))
            if count > MESSAGE_ENTRIES_MAX:
                raise CodecError(f"frame of {count} entries")
            if not term:
                raise CodecError("a frame that continues none")
            entries: List[Entry] = []
            received = work = 0
            for _ in range(count):
                (size,) = _U64.unpack((yield 8))
                received += 8 + size
                if received > RAFT_BODY_BYTES_MAX:
                    raise CodecError(f"frame of {received} bytes")
                entries.append(decode_entry((yield size)))
                work += _ENTRY_WORK + size
                if work > STEP_BYTES:
                    work = 0
                    yield None
            (commit,) = _U64.unpack((yield 8))
            yield Message(
                MsgType.APP, to=local_id, sender=remote_id, term=term, log_term=term, index=index,
                entries=entries, commit=commit,
            )
            index += count
        elif kind == b"\2":
            message = yield from decode_message_steps((yield _frame_size((yield 8))))
            term, last = message.term, message.entries[-1:]
            index = last[0].index if last else message.index
            yield message
        elif kind == AppV2Encoder.heartbeat:
            yield None
        else:
            raise CodecError(f"unknown frame {kind[0]} on msgappv2")
