"""Barriers and counters."""

from __future__ import annotations

import contextlib
import random
import threading
import uuid
from collections.abc import Mapping

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
    WAIT_SLICE_S,
    _CallScope,
    _checked_ttl,
    _cleanup_scope,
    _clock,
    _create_once,
    _entries,
    _read,
    _Recipe,
    _recipe_key,
    _Wait,
    _with_retries,
)
from .leases import _Entry

COUNTER_WRITERS = 32            # writers whose last change a counter's file records


class Barrier(_Recipe):
    """A barrier that one process closes, and whose removal releases all waiting processes.

        barrier = Barrier(client, "/maintenance")
        barrier.create()                            # close it
        barrier.wait(timeout=60)                    # in other processes: True when it is open
        barrier.remove()                            # open it

    Guarantee: wait returns True only after a moment at which the barrier did not exist.
    Limit: it stays until it is removed, unless it has a ttl.  All waiting processes wake at once.

    Thread: any.
    """

    def __init__(self, client: Client, key: str) -> None:
        super().__init__(client, _recipe_key(key))

    def create(self, ttl: int | None = None) -> bool:
        """Close the barrier, for at most `ttl` seconds; False if it was closed."""
        try:
            _create_once(self.client, self.path, uuid.uuid4().hex,
                         None if ttl is None else _checked_ttl(ttl))
        except NodeExists:
            return False
        return True

    def remove(self) -> bool:
        """Open the barrier; False if it was open."""
        try:
            node = _read(self.client, self.path).node
        except KeyNotFound:
            return False
        with contextlib.suppress(KeyNotFound, CompareFailed):
            # By value, since a Heartbeat may renew it; by index if another program left it empty.
            _with_retries(self.client, lambda: self.client.compare_and_delete(
                self.path, prev_value=node.value or None,
                prev_index=None if node.value else node.modified_index))
        return True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is open; False after `timeout` seconds (None: no limit) or `cancel`."""
        def read() -> tuple[bool | None, _Wait]:
            try:
                return None, _Wait(self.path, _read(self.client, self.path).etcd_index)
            except KeyNotFound as error:
                return True, _Wait(self.path, error.index)

        with self._call_scope(timeout) as scope:
            return self._poll(scope, read) is True
        return False


class DoubleBarrier(_Recipe):
    """A barrier at which `size` participants begin together and end together, in rounds.

        barrier = DoubleBarrier(client, "/phase", size=3)
        with barrier:
            work()

    Guarantee: enter returns True only after `size` participants were present at the same time, and
    leave only after all participants of the round have left or expired.  Further participants
    form the next round.
    Limit: a participant that is cut off for longer than its ttl is removed, and enter raises
    LockExpired.  All participants need the same size.  One small file remains: a count of rounds.

    Thread: one, except for `cancel`; an object is one participant.
    """

    def __init__(self, client: Client, key: str, size: int, *, ttl: int = LEASE_TTL_S) -> None:
        if size < 1:
            raise ValueError("size is at least 1")
        super().__init__(client, _recipe_key(key))
        self.size = size
        self.ttl = _checked_ttl(ttl)
        self._entry: _Entry | None = None
        self._round = 0                             # index at which the present round began

    def enter(self, timeout: float | None = None) -> bool:
        """Wait for the others; False, and not inside, after `timeout` seconds or `cancel`."""
        entry, self._round = _Entry(self.client, f"{self.path}/members", "", self.ttl), 0
        try:
            with self._call_scope(timeout) as scope:
                entry.start()
                scope.waited = True                 # a later timeout returns False
                self._round = self._poll(
                    scope, lambda: self._read_round(entry), min(WAIT_SLICE_S, self.ttl)) or 0
        finally:
            if not self._round:
                with _cleanup_scope():
                    entry.stop()
        self._entry = entry
        return self._round > 0

    def leave(self, timeout: float | None = None) -> bool:
        """Leave, and wait until the others have left; False after `timeout` seconds."""
        if self._entry is not None:
            self._entry.stop()

        def read() -> tuple[bool | None, _Wait]:
            members, index = _entries(self.client, f"{self.path}/members")
            inside = [node for node in members if node.created_index < self._round]
            return None if inside else True, _Wait(inside[-1].key if inside else "", index)

        with self._call_scope(timeout) as scope:
            return self._poll(scope, read, min(WAIT_SLICE_S, self.ttl)) is True
        return False

    def __enter__(self) -> DoubleBarrier:
        if not self.enter():
            raise Cancelled("cancelled", cause=self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._entry, self._round = None, 0          # the parent is the participant

    def _read_round(self, entry: _Entry) -> tuple[int | None, _Wait]:
        """Return the index at which the round of `entry` began, or None and the event to wait for.

        A file is written when a round is complete; the entries between two writes form a round.
        """
        key = f"{self.path}/round"
        while entry.is_held:
            try:
                found = _read(self.client, key)
                last, index = found.modified_index, found.etcd_index
            except KeyNotFound as error:
                last, index = 0, error.index
            if last > entry.number:
                return last, _Wait(key, index)
            members, _ = _entries(self.client, f"{self.path}/members")
            # By value: an append that was given up for lost may have arrived.
            if len({node.value for node in members if node.created_index > last}) < self.size:
                return None, _Wait(key, index)
            self._begin_round(last)
        raise LockExpired("expired while it waited", cause=entry.key)

    def _begin_round(self, last: int) -> None:
        """Write that a round is complete, unless another participant does."""
        key, mark = f"{self.path}/round", uuid.uuid4().hex
        with contextlib.suppress(CompareFailed, NodeExists, KeyNotFound):
            if last:
                _with_retries(self.client, lambda: self.client.compare_and_swap(
                    key, mark, prev_index=last))
            else:
                _create_once(self.client, key, mark, None)


class Counter(_Recipe):
    """A number that many processes change.

        counter = Counter(client, "/tickets")
        counter.add()                               # 1, once in the whole cluster
        counter.add(-1); counter.value

    The file holds the number, and the last change of each of its COUNTER_WRITERS latest writers,
    where an object finds a change of its own whose reply was lost.

    Guarantee: each add that returns was applied once, and returns its sum.
    Limit: an error with maybe_applied=True after OUTAGE_S seconds without a server, or if more
    than COUNTER_WRITERS others changed the number before this object could read it.  Each change
    is a write of the whole cluster: suitable for hundreds per second, not for thousands.

    Thread: any; threads that share the object take turns.
    """

    _turn: _CallScope | None                        # guarded by _changed

    def __init__(self, client: Client, key: str, initial: int = 0) -> None:
        super().__init__(client, _recipe_key(key))
        self.initial = initial
        self._after_fork()

    @property
    def value(self) -> int:
        """The present number, by quorum.  Raises ValueError if the file holds none."""
        return self._read_number()[0]

    def add(self, amount: int = 1, *, timeout: float | None = None) -> int:
        """Add `amount`, and return the sum.  Raises ValueError if the file holds no number.

        timeout  seconds until an error; None: OUTAGE_S without a server; 0: TRY_S, as always

        Raises Cancelled after `cancel`.
        """
        with _CallScope(self, timeout, quiet=False) as scope:
            try:
                if not scope.wait_for(self._changed, lambda: self._take_turn(scope)):
                    raise RequestTimeout("another thread changes this counter", endpoint="")
                self._serial += 1
                return self._add(amount, f"{self._writer}.{self._serial}", scope)
            finally:
                self._end_turn(scope)
        raise AssertionError("unreachable")         # the scope is not quiet

    def _take_turn(self, scope: _CallScope) -> bool:
        self._turn = self._turn or scope
        return self._turn is scope

    def _end_turn(self, scope: _CallScope) -> None:
        with self._changed:
            if self._turn is scope:
                self._turn = None
                self._changed.notify_all()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._changed = threading.Condition()
        self._turn = None                           # this writer performs one change at a time
        self._writer = uuid.uuid4().hex[:12]        # a forked child is another writer
        self._serial = 0

    def _add(self, amount: int, tag: str, scope: _CallScope) -> int:
        unsure: EtcdError | None = None
        pause_s, deadline = 0.001, _clock() + OUTAGE_S
        while True:
            try:
                number, changes, index = self._read_number()
                if tag in changes:
                    return changes[tag]
                if unsure is not None and self._is_forgotten(changes):
                    raise unsure
                try:
                    if self._write(number + amount, tag, changes, index):
                        return number + amount
                except EtcdError as error:
                    unsure = error if error.maybe_applied else unsure
                    if not is_endpoint_failure(error) or _clock() >= deadline:
                        raise
                if not scope.wait(random.uniform(0, pause_s)):
                    raise unsure or RequestTimeout("others were faster", endpoint="")
            except EtcdError as error:              # of any request: our write may be applied
                error.maybe_applied = unsure is not None
                raise
            pause_s = min(2 * pause_s, 0.1)

    def _read_number(self) -> tuple[int, dict[str, int], int]:
        """Return the number, the last changes with their sums, and the index."""
        try:
            node = _read(self.client, self.path).node
        except KeyNotFound:
            return self.initial, {}, 0
        number, *changes = (node.value or "").split() or [""]
        pairs = (change.split(":") for change in changes)
        return int(number), {tag: int(result) for tag, result in pairs}, node.modified_index

    def _is_forgotten(self, changes: Mapping[str, int]) -> bool:
        """Return whether others may have displaced a change of this writer."""
        writers = {tag.partition(".")[0] for tag in changes}
        return self._writer not in writers and len(writers) >= COUNTER_WRITERS

    def _write(self, number: int, tag: str, changes: Mapping[str, int], index: int) -> bool:
        """Write the number on condition that the file has not changed since `index`."""
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
