"""Barriers and counters."""

from __future__ import annotations

import contextlib
import random
import threading
import uuid
from typing import Dict, Mapping, Optional, Tuple

from ..client.client import Client
from ..transport.calls import is_endpoint_failure
from ..transport.connections import Scope
from ..transport.errors import (
    Cancelled,
    CompareFailed,
    EtcdError,
    KeyNotFound,
    LockExpired,
    NodeExists,
    RequestTimeout,
)
from .basics import (
    CALL_TIMEOUT_S,
    LEASE_TTL_S,
    OUTAGE_S,
    TIDY_S,
    WAIT_SLICE_S,
    _apart,
    _await,
    _checked_ttl,
    _clock,
    _create_once,
    _entries,
    _insist,
    _read,
    _Recipe,
    _recipe_key,
    _Span,
)
from .elections import COUNTER_WRITERS
from .leases import _Place


class Barrier(_Recipe):
    """A gate for all: closed by one process, and opened for all who wait.

        barrier = Barrier(client, "/maintenance")
        barrier.create()                            # close it
        barrier.wait(timeout=60)                    # elsewhere: True when it is open
        barrier.remove()                            # open it

    Guarantee: wait returns True only after a moment at which the barrier was not there.
    Limit: it stays until it is removed, unless it has a ttl.  All who wait are woken at once.

    Thread: any.
    """

    def __init__(self, client: Client, key: str) -> None:
        super().__init__(client)
        self.path = _recipe_key(key)

    def create(self, ttl: Optional[int] = None) -> bool:
        """Close the barrier, for `ttl` seconds at most; False if it was closed already."""
        try:
            _create_once(self.client, self.path, uuid.uuid4().hex,
                         None if ttl is None else _checked_ttl(ttl))
        except NodeExists:
            return False
        return True

    def remove(self) -> bool:
        """Open the barrier; False if it was open already."""
        try:
            node = _read(self.client, self.path).node
        except KeyNotFound:
            return False
        with contextlib.suppress(KeyNotFound, CompareFailed):
            # By value, as a Heartbeat may keep it; by index if another program made it empty.
            _insist(self.client, lambda: self.client.compare_and_delete(
                self.path, prev_value=node.value or None,
                prev_index=None if node.value else node.modified_index))
        return True

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Wait until the barrier is open; False after `timeout` seconds (None: never).

        False after `cancel`, too.
        """
        with self._span(timeout) as span:
            while True:
                try:
                    index = _read(self.client, self.path).etcd_index
                except KeyNotFound:
                    return True
                if not _await(self.client, span, self.path, index, WAIT_SLICE_S):
                    return False
        return False


class DoubleBarrier(_Recipe):
    """Lets `size` participants begin together and end together, round after round.

        barrier = DoubleBarrier(client, "/phase", size=3)
        with barrier:
            work()

    Guarantee: enter returns True only after `size` participants were there at the same time, and
    leave only after all of this one's round have left, or expired.  Who comes later takes part in
    the next round.
    Limit: who is cut off for longer than its ttl is no participant any more, and enter raises
    LockExpired.  All participants name the same size.  One small file stays, which counts rounds.

    Thread: one, except for `cancel`; an object is one participant.
    """

    def __init__(self, client: Client, key: str, size: int, *, ttl: int = LEASE_TTL_S) -> None:
        if size < 1:
            raise ValueError("size is at least 1")
        super().__init__(client)
        self.path = _recipe_key(key)
        self.size = size
        self.ttl = _checked_ttl(ttl)
        self._place: Optional[_Place] = None
        self._round = 0                             # the index at which it began

    def enter(self, timeout: Optional[float] = None) -> bool:
        """Wait for the others; False after `timeout` seconds (None: never), and not inside.

        False after `cancel`, too.
        """
        place, self._round = _Place(self.client, f"{self.path}/members", "", self.ttl), 0
        try:
            with self._span(timeout) as span:
                place.start()
                self._round = self._await_round(place, span)
        finally:
            if not self._round:
                with _apart(TIDY_S):
                    place.stop()
        self._place = place
        return self._round > 0

    def leave(self, timeout: Optional[float] = None) -> bool:
        """Leave, and wait until the others have left; False after `timeout` seconds."""
        if self._place is not None:
            self._place.stop()
        with self._span(timeout) as span:
            while True:
                members, index = _entries(self.client, f"{self.path}/members")
                inside = [node for node in members if node.created_index < self._round]
                if not inside:
                    return True
                if not _await(self.client, span, inside[-1].key, index,
                              min(WAIT_SLICE_S, self.ttl)):
                    return False
        return False

    def __enter__(self) -> DoubleBarrier:
        if not self.enter():
            raise Cancelled("cancelled", cause=self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    # -- below: no public names

    def _after_fork(self) -> None:
        super()._after_fork()
        self._place, self._round = None, 0          # the participant is the parent

    def _await_round(self, place: _Place, span: _Span) -> int:
        """Return the index at which the round of `place` began; 0 if time is up.

        A file is written when a round is complete.  Those whose number lies between two such
        writes are of one round.
        """
        while place.is_held:
            last, index = self._last_round()
            if last > place.number:
                return last
            members, _ = _entries(self.client, f"{self.path}/members")
            # By value: an append that was given up for lost may have come in after all.
            if len({node.value for node in members if node.created_index > last}) >= self.size:
                self._begin_round(last)
                continue
            if not _await(self.client, span, f"{self.path}/round", index,
                          min(WAIT_SLICE_S, self.ttl)):
                return 0
        raise LockExpired("expired while it waited", cause=place.key)

    def _last_round(self) -> Tuple[int, int]:
        try:
            found = _read(self.client, f"{self.path}/round")
        except KeyNotFound as error:
            return 0, error.index
        return found.modified_index, found.etcd_index

    def _begin_round(self, last: int) -> None:
        """Write that a round is complete, unless another participant does."""
        key, mark = f"{self.path}/round", uuid.uuid4().hex
        with contextlib.suppress(CompareFailed, NodeExists, KeyNotFound):
            if last:
                _insist(self.client, lambda: self.client.compare_and_swap(
                    key, mark, prev_index=last))
            else:
                _create_once(self.client, key, mark, None)


class Counter(_Recipe):
    """A number that many change.

        counter = Counter(client, "/tickets")
        counter.add()                               # 1, in the whole cluster once
        counter.add(-1); counter.value

    The file holds the number and, behind it, the last change of each of the COUNTER_WRITERS
    objects that changed it last, by which a change whose answer was lost is found again.

    Guarantee: each add that returns was carried out once, and returns what it made of the number.
    Limit: an error with maybe_applied=True, after OUTAGE_S seconds without a server, or if more
    than COUNTER_WRITERS others changed it before this one could look.  Each change is a write of
    the whole cluster: made for hundreds a second, not for thousands.

    Thread: any; threads that share the object take turns.
    """

    _turn: Optional[_Span]

    def __init__(self, client: Client, key: str, initial: int = 0) -> None:
        super().__init__(client)
        self.path = _recipe_key(key)
        self.initial = initial
        self._after_fork()

    @property
    def value(self) -> int:
        """The number now, by quorum.  Raises ValueError if the file holds none."""
        return self._look()[0]

    def add(self, amount: int = 1, *, timeout: Optional[float] = None) -> int:
        """Add `amount`, and return the sum.  Raises ValueError if the file holds no number.

        timeout  seconds, after which it raises what kept it from ending; None: OUTAGE_S without
                 a server; 0: as for all recipes, TRY_S

        Raises Cancelled after `cancel`.
        """
        span = _Span(self.client, timeout)
        self._spans[span] = None
        try:
            with span:
                while not self._take_turn(span):
                    if not span.wait_for(self._changed, lambda: self._turn is None):
                        raise RequestTimeout("another thread changes this counter", endpoint="")
                self._serial += 1
                return self._add(amount, f"{self._writer}.{self._serial}", span)
        finally:
            del self._spans[span]
            self._leave_turn(span)

    # -- below: no public names

    def _take_turn(self, span: _Span) -> bool:
        with self._changed:
            self._turn = self._turn or span
            return self._turn is span

    def _leave_turn(self, span: _Span) -> None:
        with self._changed:
            if self._turn is span:
                self._turn = None
                self._changed.notify_all()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._changed = threading.Condition()
        self._turn = None                           # one change of this writer at a time
        self._writer = uuid.uuid4().hex[:12]        # a forked child is another one
        self._serial = 0

    def _add(self, amount: int, tag: str, span: _Span) -> int:
        unsure: Optional[EtcdError] = None
        pause_s, deadline = 0.001, _clock() + OUTAGE_S
        while True:
            try:
                number, changes, index = self._look()
                if tag in changes:
                    return changes[tag]
                if unsure is not None and self._forgotten(changes):
                    raise unsure
                try:
                    if self._write(number + amount, tag, changes, index):
                        return number + amount
                except EtcdError as error:
                    unsure = error if error.maybe_applied else unsure
                    if not is_endpoint_failure(error) or _clock() >= deadline:
                        raise
                if not span.wait(random.uniform(0, pause_s)):
                    raise unsure or RequestTimeout("others were faster", endpoint="")
            except EtcdError as error:              # whatever failed, our write may be in
                error.maybe_applied = unsure is not None
                raise
            pause_s = min(2 * pause_s, 0.1)

    def _look(self) -> Tuple[int, Dict[str, int], int]:
        """Return the number, the last changes with what they made of it, and the index."""
        try:
            node = _read(self.client, self.path).node
        except KeyNotFound:
            return self.initial, {}, 0
        number, *changes = (node.value or "").split() or [""]
        pairs = (change.split(":") for change in changes)
        return int(number), {tag: int(result) for tag, result in pairs}, node.modified_index

    def _forgotten(self, changes: Mapping[str, int]) -> bool:
        """Whether a change of this writer may have been pushed out by others."""
        writers = {tag.partition(".")[0] for tag in changes}
        return self._writer not in writers and len(writers) >= COUNTER_WRITERS

    def _write(self, number: int, tag: str, changes: Mapping[str, int], index: int) -> bool:
        """Write if nobody else has since `index`."""
        others = [f"{other}:{result}" for other, result in changes.items()
                  if other.partition(".")[0] != self._writer]
        value = " ".join([str(number), f"{tag}:{number}", *others[:COUNTER_WRITERS - 1]])
        try:
            with Scope(CALL_TIMEOUT_S):
                if index:
                    self.client.compare_and_swap(self.path, value, prev_index=index)
                else:
                    self.client.create(self.path, value)
        except (CompareFailed, NodeExists, KeyNotFound):
            return False
        return True
