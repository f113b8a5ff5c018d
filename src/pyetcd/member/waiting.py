"""Requests that wait for consensus: callbacks of proposals, late proposals, quorum reads."""

from __future__ import annotations

import collections
import struct
from typing import Any, Callable, Container, Deque, Dict, List, Optional, Sequence, Tuple

from ..base.errors import EtcdError
from ..base.limits import PROPOSALS_PENDING_MAX, QUEUED_BYTES_MAX, UINT64_MAX
from ..base.messages import Entry, Request
from ..raft.node import RawNode
from .journal import WORK_ENTRIES_MAX

Done = Callable[[Any], None]


class Proposals:
    """The callbacks of requests on their way through consensus, by request id."""

    def __init__(self, timeout_s: float) -> None:
        self.failed = 0                 # timed out, or refused as one too many
        self.timeout_s = timeout_s
        self._callbacks: Dict[int, Done] = {}
        self._deadlines: Deque[Tuple[float, int]] = collections.deque()

    def __len__(self) -> int:
        return len(self._callbacks)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._callbacks

    def add(self, request_id: int, done: Done, now: float) -> bool:
        """Call done(result) when the entry with this id is applied, or fails; False: too many."""
        if len(self._callbacks) >= PROPOSALS_PENDING_MAX:
            self.failed += 1
            return False
        self._callbacks[request_id] = done
        self._deadlines.append((now + self.timeout_s, request_id))
        return True

    def pop(self, request_id: int) -> Optional[Done]:
        """Forget a request and return its callback; None if it is no request of this member."""
        return self._callbacks.pop(request_id, None)

    def expire(self, now: float, error: Callable[[float], EtcdError]) -> int:
        """Fail late requests, WORK_ENTRIES_MAX at most, with error(start time); return how many."""
        callbacks, deadlines, expired = self._callbacks, self._deadlines, 0
        while expired < WORK_ENTRIES_MAX and deadlines and (
            deadlines[0][1] not in callbacks or deadlines[0][0] <= now
        ):
            deadline, request_id = deadlines.popleft()
            done = callbacks.pop(request_id, None)
            if done is not None:
                expired += 1
                self.failed += 1
                done(error(deadline - self.timeout_s))
        return expired

    def fail_all(self, error: EtcdError) -> None:
        self._deadlines.clear()
        while self._callbacks:
            self._callbacks.popitem()[1](error)


class LateProposals:
    """Proposals that peers forward while no leader is known, kept for two election timeouts."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._entries: Deque[Tuple[float, Entry]] = collections.deque()     # with deadlines
        self._bytes = 0                 # of their data

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entries: Sequence[Entry], now: float) -> None:
        until = now + self._keep_s
        for entry in entries:
            if len(self._entries) < PROPOSALS_PENDING_MAX and self._bytes <= QUEUED_BYTES_MAX:
                self._entries.append((until, Entry(entry.type, data=entry.data)))
                self._bytes += len(entry.data)

    def expire(self, now: float) -> None:
        while self._entries and self._entries[0][0] < now:
            self._bytes -= len(self._entries.popleft()[1].data)

    def take(self, now: float) -> List[Entry]:
        self.expire(now)
        entries = [entry for _, entry in self._entries]
        self._entries.clear()
        self._bytes = 0
        return entries


class QuorumReads:
    """GET with quorum=true by MsgReadIndex: all that wait share one question to the leader.

    One question is under way at a time; requests that arrive meanwhile share the next.  Without
    an answer for two ticks it is repeated: the leader is gone, or not ready.  Thread: reactor.
    Source: Raft thesis §6.4.  Differs from etcd 2.3, which logs each such read.
    """

    def __init__(self, member_id: int, first_id: int) -> None:
        self.enabled = False            # every member can answer; else reads go through the log
        self._member_id = member_id
        self._question = first_id       # number of the last one, unique for this member
        self._context = b""             # that goes to the leader with it, and comes back
        self._waiting: List[Request] = []
        self._asked: List[Request] = []     # those of the question under way
        self._index = 0                 # its answer: the index to apply before; 0: not known
        self._ticks = 0                 # since it was asked

    def __len__(self) -> int:
        return len(self._waiting) + len(self._asked)

    def add(self, request: Request) -> None:
        """Serve `request` when the store is as far as the cluster is now."""
        self._waiting.append(request)

    def tick(self, proposals: Container[int]) -> None:
        """Give up an unanswered question, and requests that are not among `proposals` any more."""
        self._ticks += 1
        if self._asked and not self._index and self._ticks > 2:
            again, self._asked = self._asked + self._waiting, []
            self._waiting = [request for request in again if request.id in proposals]

    def take(self, node: RawNode, applied: int) -> List[Request]:
        """Ask the leader if requests wait; return the requests that can be served now."""
        served: List[Request] = []
        while True:
            if not self._asked and self._waiting:
                self._ask(node)
            for context, index in node.confirmed_reads():
                if context == self._context and self._asked:
                    self._index = index
            if not (self._index and applied >= self._index):
                return served
            served += self._asked
            self._asked, self._index = [], 0

    def _ask(self, node: RawNode) -> None:
        self._question = (self._question + 1) & UINT64_MAX
        self._context = struct.pack(">QQ", self._member_id, self._question)
        self._asked, self._waiting = self._waiting, []
        self._ticks = self._index = 0
        node.read_index(self._context)
