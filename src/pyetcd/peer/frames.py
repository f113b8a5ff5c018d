"""Peer frames: messages as bytes on a stream.

The bytes of a peer are never trusted: an invalid or too long frame is a CodecError.
"""

from __future__ import annotations

import struct
from typing import Generator, Iterator, List, Optional, Sequence

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
    """Encodes lists of entries for msgappv2: each as big-endian uint64 length, then its bytes.

    The result for the last list is cached: a leader sends one list to all of its followers.
    """

    __slots__ = ("_entries", "_data")

    def __init__(self) -> None:
        self._entries: Sequence[Entry] = ()
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


class AppV2Encoder:
    """Frames of one msgappv2 stream: short where the fields follow from the last frame.

    Source: etcd 2.3 rafthttp/msgappv2.go.
    """

    __slots__ = ("_lists", "_term", "_index")

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
        data = encode_message_parts(message)
        return joined_parts((b"\2", _pack_u64(sum(map(len, data))), *data))


class MessageEncoder:
    """Frames of the message stream: big-endian uint64 length, then the Message."""

    __slots__ = ()

    heartbeat = _pack_u64(28) + encode_message(Message(MsgType.HEARTBEAT))

    @staticmethod
    def encode(message: Message) -> List[bytes]:
        """Return the frame in pieces, of which the long ones are not copied."""
        data = encode_message_parts(message)
        return joined_parts((_pack_u64(sum(map(len, data))), *data))


class FrameDecoder:
    """Cuts a stream, fed in any pieces, into frames."""

    __slots__ = ("_partial", "_need")

    def __init__(self) -> None:
        self._partial = bytearray()
        self._need = 0                  # bytes in _partial for the next step

    def feed(self, data: bytes) -> List[Message]:
        """Return the messages now complete.  Raises CodecError; then the stream is lost."""
        return [message for message in self.messages(data) if message is not None]

    def messages(self, data: bytes) -> Iterator[Optional[Message]]:
        """Do feed() in steps of 1 ms at most, or of one entry; exhaust it before the next data.

        Yields a message, or None between two steps of one.
        """
        if self._partial:
            self._partial += data
            if len(self._partial) < self._need:
                return
            data = bytes(self._partial)
        found: List[Message] = []
        offset, end, work = 0, len(data), 0
        while offset < end:
            size = yield from self._frame(data, offset, found)
            if offset + size > end:
                self._need = size
                break
            offset += size
            work += STEP_BYTES // STEP_ENTRIES + size
            if found or work > STEP_BYTES:
                work = 0
                yield found.pop() if found else None
        if offset < end or self._partial:
            self._partial = bytearray(data[offset:])

    def _frame(self, data: bytes, offset: int, found: List[Message]) -> Generator[None, None, int]:
        """Consume one frame at `offset`; return its size, which may exceed the data."""
        raise NotImplementedError


def _frame_size(data: bytes, offset: int) -> int:
    """Return the length at `offset`; 0 if it is incomplete."""
    if len(data) < offset + 8:
        return 0
    size: int = _U64.unpack_from(data, offset)[0]
    if size > RAFT_BODY_BYTES_MAX:
        raise CodecError(f"frame of {size} bytes")
    return size


class MessageDecoder(FrameDecoder):
    """Decodes the message stream without its link heartbeats."""

    __slots__ = ()

    def _frame(self, data: bytes, offset: int, found: List[Message]) -> Generator[None, None, int]:
        start = offset + 8
        end = start + _frame_size(data, offset)
        if end <= len(data):
            message = yield from decode_message_steps(data[start:end])
            if message.type != MsgType.HEARTBEAT or message.sender or message.to:
                found.append(message)
        return end - offset


class AppV2Decoder(FrameDecoder):
    """Decodes a msgappv2 stream from member `remote_id` to `local_id` without its heartbeats."""

    __slots__ = ("_local_id", "_remote_id", "_term", "_index", "_entries", "_left", "_bytes")

    def __init__(self, local_id: int, remote_id: int) -> None:
        super().__init__()
        self._local_id = local_id
        self._remote_id = remote_id
        self._term = 0
        self._index = 0
        self._entries: List[Entry] = []     # of the short frame under way
        self._left = -1                     # its entries to come; -1: between frames
        self._bytes = 0                     # its bytes so far

    def _frame(self, data: bytes, offset: int, found: List[Message]) -> Generator[None, None, int]:
        if self._left > 0:
            return (yield from self._some_entries(data, offset))
        if self._left == 0:
            return self._commit(data, offset, found)
        kind = data[offset]
        if kind == 0:
            return 1
        if kind == 1:
            return self._short_head(data, offset)
        if kind == 2:
            return (yield from self._full(data, offset, found))
        raise CodecError(f"unknown frame {kind} on msgappv2")

    def _short_head(self, data: bytes, offset: int) -> int:
        if len(data) >= offset + 9:
            (count,) = _U64.unpack_from(data, offset + 1)
            if count > MESSAGE_ENTRIES_MAX:
                raise CodecError(f"frame of {count} entries")
            if not self._term:
                raise CodecError("a frame that continues none")
            self._entries, self._left, self._bytes = [], count, 0
        return 9

    def _some_entries(self, data: bytes, offset: int) -> Generator[None, None, int]:
        """Decode the whole entries at `offset`; return their size, or that of one that is cut."""
        at, end, work = offset, len(data), 0
        while self._left > 0:
            start = at + 8
            following = start + (_U64.unpack_from(data, at)[0] if start <= end else 0)
            size = following - at
            if self._bytes + size > RAFT_BODY_BYTES_MAX:
                raise CodecError(f"frame of {self._bytes + size} bytes")
            if following > end:
                return at - offset or size
            self._entries.append(decode_entry(data[start:following]))
            self._left -= 1
            self._bytes += size
            at = following
            work += STEP_BYTES // STEP_ENTRIES + size
            if work > STEP_BYTES:
                work = 0
                yield
        return at - offset

    def _commit(self, data: bytes, offset: int, found: List[Message]) -> int:
        if len(data) >= offset + 8:
            found.append(Message(
                MsgType.APP, to=self._local_id, sender=self._remote_id, term=self._term,
                log_term=self._term, index=self._index, entries=self._entries,
                commit=_U64.unpack_from(data, offset)[0],
            ))
            self._index += len(self._entries)
            self._entries, self._left = [], -1
        return 8

    def _full(self, data: bytes, offset: int, found: List[Message]) -> Generator[None, None, int]:
        start = offset + 9
        end = start + _frame_size(data, offset + 1)
        if end <= len(data):
            message = yield from decode_message_steps(data[start:end])
            entries = message.entries
            self._term = message.term
            self._index = entries[-1].index if entries else message.index
            found.append(message)
        return end - offset
