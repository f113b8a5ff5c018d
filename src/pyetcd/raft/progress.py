"""Progress and quorum: a leader's view of its followers, and the messages of one member.

Knows neither the log's content nor time nor sockets.
"""

from __future__ import annotations

import collections
from enum import IntEnum
from typing import Any, Deque, Dict, List, Optional, Sequence, Tuple

from ..base.messages import Entry, Message, MsgType


class ProgressState(IntEnum):
    """How a leader sends to one follower (Raft thesis §10.2.1, etcd raft/progress.go)."""

    PROBE = 0           # the match is unknown: one MsgApp, then wait for an answer or a heartbeat
    REPLICATE = 1       # the match is known: send ahead, up to the in-flight window
    SNAPSHOT = 2        # a snapshot is under way: send nothing


class Progress:
    """A leader's view of one member, itself included.

    match_index < next_index holds always: everything up to match_index is durable there, and
    next_index is the first entry of the next MsgApp.
    """

    __slots__ = (
        "due", "inflights", "match_index", "next_index", "paused", "pending_snapshot",
        "proposed_index", "recent_active", "state", "_window",
    )

    def __init__(self, next_index: int, window: int, *, match_index: int = 0) -> None:
        self.match_index = match_index
        self.next_index = next_index
        self.state = ProgressState.PROBE
        self.paused = False             # PROBE only: a probe is unanswered
        self.pending_snapshot = 0       # SNAPSHOT only: index of the snapshot under way
        self.recent_active = False      # answered since the last report_unreachable
        self.due = False                # gets a MsgApp, maybe an empty one, at the next ready()
        self.proposed_index = 0         # index of its newest proposal that is not committed
        self.inflights: Deque[int] = collections.deque()    # last index of each unanswered MsgApp
        self._window = window

    @property
    def is_paused(self) -> bool:
        if self.state == ProgressState.REPLICATE:
            return len(self.inflights) >= self._window
        return self.paused or self.state == ProgressState.SNAPSHOT

    def become_probe(self) -> None:
        """Find out where the logs match; after a snapshot, assume that it arrived."""
        self.next_index = max(self.match_index, self.pending_snapshot) + 1
        self._enter(ProgressState.PROBE)

    def become_replicate(self) -> None:
        self._enter(ProgressState.REPLICATE)
        self.next_index = self.match_index + 1

    def become_snapshot(self, index: int) -> None:
        self._enter(ProgressState.SNAPSHOT)
        self.pending_snapshot = index

    def _enter(self, state: ProgressState) -> None:
        self.state = state
        self.paused = False
        self.pending_snapshot = 0
        self.inflights.clear()

    def sent(self, last: int) -> None:
        if self.state == ProgressState.REPLICATE:
            self.next_index = last + 1
            self.inflights.append(last)
        else:
            self.paused = True

    def maybe_update(self, index: int) -> bool:
        """Note that the member holds everything up to `index`; False if that was known."""
        if self.next_index <= index:
            self.next_index = index + 1
        if index <= self.match_index:
            return False
        self.match_index = index
        self.paused = False
        return True

    def acknowledge(self, index: int) -> bool:
        """Handle a positive answer: update, and move on to REPLICATE; False if it was known."""
        if not self.maybe_update(index):
            return False
        if self.state == ProgressState.REPLICATE:
            while self.inflights and self.inflights[0] <= index:
                self.inflights.popleft()
        elif self.match_index >= self.pending_snapshot:
            self.become_replicate()
        return True

    def maybe_decrease(self, rejected: int, hint: int) -> bool:
        """Step back after a rejection; False if the rejection is stale.

        rejected  index of the entry that did not match (that MsgApp's previous index)
        hint      last index of the follower's log
        """
        if self.state == ProgressState.REPLICATE:
            if rejected <= self.match_index:
                return False
            self.become_probe()
            return True
        if self.state == ProgressState.SNAPSHOT or rejected != self.next_index - 1:
            return False
        self.next_index = max(self.match_index + 1, min(rejected, hint + 1))
        self.paused = False
        return True


def quorum_size(voters: int) -> int:
    return voters // 2 + 1


_ENTRY_OVERHEAD = 40            # bytes of an encoded entry besides its data, at most


class Mailbox:
    """The messages of one member until ready() takes them.

    Promises (votes, answers to MsgApp) are held until the state that they promise is durable.
    All other messages may leave at once.
    """

    def __init__(self, id: int, forward_bytes_max: int) -> None:
        self.id = id
        self.term = 0                               # stamped on every message; kept by Raft
        self._forward_bytes_max = forward_bytes_max
        self._messages: List[Message] = []
        self._held: List[Message] = []
        self._ack: Optional[Message] = None         # the one positive answer to a MsgApp
        self._forward_to = 0                        # addressee of the MsgProp that may grow
        self._forward: List[Entry] = []
        self._forward_bytes = 0

    def _message(self, kind: MsgType, to: int, fields: Dict[str, Any]) -> Message:
        fields.setdefault("term", self.term)
        return Message(kind, to=to, sender=self.id, **fields)

    def send(self, kind: MsgType, to: int, **fields: Any) -> None:
        """Send a message that promises nothing."""
        self._messages.append(self._message(kind, to, fields))

    def hold(self, kind: MsgType, to: int, **fields: Any) -> None:
        """Send a message when everything that is known now is durable."""
        self._held.append(self._message(kind, to, fields))

    def hold_ack(self, to: int, index: int) -> None:
        """Acknowledge every entry up to `index`; one such answer stands for all before.

        Of two answers to one leader the higher holds: within a term the follower's log only
        grows.  An answer to an earlier leader is dropped, as its entries may be gone by now.
        """
        ack = self._ack
        if ack is None or ack.to != to or ack.term != self.term or ack.index < index:
            self._ack = self._message(MsgType.APP_RESP, to, {"index": index})

    def forward(self, to: int, entries: Sequence[Entry]) -> None:
        """Pass proposals to the leader; those of one turn share a MsgProp, up to a size."""
        size = sum([len(entry.data) + _ENTRY_OVERHEAD for entry in entries])
        if self._forward_to != to or self._forward_bytes + size > self._forward_bytes_max:
            self._forward, self._forward_bytes, self._forward_to = [], 0, to
            self.send(MsgType.PROP, to, term=0, entries=self._forward)
        self._forward.extend(entries)
        self._forward_bytes += size

    @property
    def is_empty(self) -> bool:
        return not (self._messages or self._held or self._ack)

    def take(self) -> Tuple[List[Message], List[Message]]:
        """Return (messages, held ones) since the last call."""
        messages, held = self._messages, self._held
        self._messages, self._held = [], []
        self._forward_to = 0
        if self._ack is not None:
            held.append(self._ack)
            self._ack = None
        return messages, held
