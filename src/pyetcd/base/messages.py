"""Raft's messages and etcd's requests as values."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple, Optional, Sequence, Tuple

from .text import as_unicode


class MsgType(IntEnum):
    """raftpb.MessageType; LOCAL_MESSAGES never leave their member."""

    HUP = 0
    BEAT = 1
    PROP = 2
    APP = 3
    APP_RESP = 4
    VOTE = 5
    VOTE_RESP = 6
    SNAP = 7
    HEARTBEAT = 8
    HEARTBEAT_RESP = 9
    UNREACHABLE = 10
    SNAP_STATUS = 11
    CHECK_QUORUM = 12
    TRANSFER_LEADER = 13
    TIMEOUT_NOW = 14
    READ_INDEX = 15
    READ_INDEX_RESP = 16
    PRE_VOTE = 17
    PRE_VOTE_RESP = 18


LOCAL_MESSAGES = frozenset(
    (MsgType.HUP, MsgType.BEAT, MsgType.UNREACHABLE, MsgType.SNAP_STATUS, MsgType.CHECK_QUORUM)
)


class EntryType(IntEnum):
    """raftpb.EntryType."""

    NORMAL = 0
    CONF_CHANGE = 1
    CONF_CHANGE_V2 = 2


class ConfChangeType(IntEnum):
    """raftpb.ConfChangeType."""

    ADD_NODE = 0
    REMOVE_NODE = 1
    UPDATE_NODE = 2
    ADD_LEARNER = 3


class EntryID(NamedTuple):
    """The place of an entry in the log."""

    term: int
    index: int  # type: ignore[assignment]  # hides tuple.index


class HardState(NamedTuple):
    """The state that survives a crash (Raft thesis fig. 3.1)."""

    term: int = 0
    vote: int = 0
    commit: int = 0


class Request(NamedTuple):
    """etcdserverpb.Request, one command of the store."""

    id: int = 0
    method: str = ""
    path: str = ""          # with its namespace: `/1/foo` is the user's `/foo`
    val: str = ""
    dir: bool = False
    prev_value: str = ""
    prev_index: int = 0
    prev_exist: Optional[bool] = None   # None: not given
    expiration: int = 0     # unix nanoseconds; 0: permanent
    wait: bool = False
    since: int = 0
    recursive: bool = False
    sorted: bool = False
    quorum: bool = False
    time: int = 0           # unix nanoseconds
    stream: bool = False
    refresh: Optional[bool] = None      # None: not given

    def as_unicode(self) -> Request:
        """Return the command as every member applies it: with U+FFFD where a snapshot has it."""
        path, value, prev_value = self.path, self.val, self.prev_value
        if path.isascii() and value.isascii() and prev_value.isascii():
            return self
        return self._replace(
            path=as_unicode(path), val=as_unicode(value), prev_value=as_unicode(prev_value)
        )


class ConfChange(NamedTuple):
    """raftpb.ConfChange; context is the JSON of a member, or None."""

    id: int = 0
    type: int = ConfChangeType.ADD_NODE
    node_id: int = 0
    context: Optional[bytes] = None


class Entry:
    """One log entry."""

    __slots__ = ("type", "term", "index", "data", "request", "encoded")

    def __init__(
        self, type: int = 0, term: int = 0, index: int = 0, data: bytes = b"",
        request: Optional[Request] = None,
    ) -> None:
        self.type = type
        self.term = term
        self.index = index
        self.data = data
        self.request = request          # caches the decoded payload where the proposer knows it
        # Caches encode_entry(), for peers and disk; b"": not known; None: on disk, dropped.
        self.encoded: Optional[bytes] = b""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entry) and (self.type, self.term, self.index, self.data) == (
            other.type, other.term, other.index, other.data
        )

    def __repr__(self) -> str:
        return f"Entry({self.type}, {self.term}, {self.index}, {self.data!r})"


class Snapshot(NamedTuple):
    """raftpb.Snapshot: the store's JSON at (term, index) and the voters then, ascending."""

    data: bytes = b""       # after decoding perhaps a view of a file or of the message it came in
    voters: Tuple[int, ...] = ()
    index: int = 0  # type: ignore[assignment]  # hides tuple.index
    term: int = 0
    state: Any = None       # the decoded `data`, if known (StoreState); never encoded

    @property
    def id(self) -> EntryID:
        return EntryID(self.term, self.index)


class Message:
    """raftpb.Message.  `sender` is protobuf's `from`; snapshot and context are None when unset."""

    __slots__ = (
        "type", "to", "sender", "term", "log_term", "index", "entries", "commit", "snapshot",
        "reject", "reject_hint", "context",
    )

    def __init__(
        self, type: int, *, to: int = 0, sender: int = 0, term: int = 0, log_term: int = 0,
        index: int = 0, entries: Sequence[Entry] = (), commit: int = 0,
        snapshot: Optional[Snapshot] = None, reject: bool = False, reject_hint: int = 0,
        context: Optional[bytes] = None,
    ) -> None:
        self.type = type
        self.to = to
        self.sender = sender
        self.term = term
        self.log_term = log_term
        self.index = index
        self.entries = entries
        self.commit = commit
        self.snapshot = snapshot
        self.reject = reject
        self.reject_hint = reject_hint
        self.context = context

    def __repr__(self) -> str:
        return (
            f"Message({MsgType(self.type).name} {self.sender:x}->{self.to:x} term={self.term}"
            f" log=({self.log_term},{self.index}) entries={len(self.entries)}"
            f" commit={self.commit} reject={self.reject}:{self.reject_hint})"
        )
