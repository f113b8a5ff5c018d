"""Locks and semaphores."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from typing import Callable, List, Optional, Tuple, Type, TypeVar

from ..client.client import Client
from ..transport.connections import Scope
from ..transport.defaults import _log
from ..transport.errors import Cancelled, EtcdError, EtcdValueError, LockExpired
from ..transport.results import Node
from .basics import (
    LEASE_TTL_S,
    TIDY_S,
    WAIT_SLICE_S,
    _apart,
    _await,
    _checked_ttl,
    _entries,
    _is_removal,
    _LostCallback,
    _Recipe,
    _recipe_key,
    _remove,
    _Span,
)
from .leases import _Place

_ContenderType = TypeVar("_ContenderType", bound="Contender")
_LABELLED = re.compile(r"[0-9a-f]{32}:")


class Contender(_Recipe):
    """What Lock, RWLock, Semaphore and Election share: a line, and a place in it.

    The entry of a contender names the uuid of one attempt.  Only entries ahead can keep it
    waiting, none can appear there later, and so a contender that was let in stays in until its
    entry is gone.

    The object is the holder, whichever thread or task calls it: a second `acquire` waits until
    the first one was released or lost.
    """

    label = ""                                      # follows the uuid in the value of an entry
    _held: Optional[_Place]                         # guarded by _changed, as is _busy
    _retakes = True                                 # whether a lost hold may be acquired anew

    def __init__(self, client: Client, line: str, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        super().__init__(client)
        self.path = _recipe_key(line)
        self.ttl = _checked_ttl(ttl)
        self._on_lost = on_lost
        self._blocks = threading.local()            # .places: of the `with` blocks of a thread
        self._after_fork()

    @property
    def is_held(self) -> bool:
        """Whether it is held; False before a server could give it to another."""
        held = self._held
        return held is not None and held.is_held

    is_acquired = is_held                           # as python-etcd calls it

    @property
    def token(self) -> int:
        """Fencing token: higher than that of every earlier holder.  0 if it is not held.

        Send it with every write to what is protected, and have that refuse lower ones than it has
        seen: this is what protects it from a holder that was suspended and does not know yet.
        """
        held = self._held
        return held.number if held is not None and held.is_held else 0

    def acquire(self, blocking: bool = True, lock_ttl: Optional[int] = None,
                timeout: Optional[float] = None) -> bool:
        """Wait for it.  Return whether it is held.

        blocking  False: as timeout=0
        lock_ttl  seconds, instead of the ttl of the constructor; None: that one
        timeout   seconds to wait; None: for ever; 0: try once and do not wait

        False after `timeout`, and after `cancel` by another thread; nothing is left in the line
        then, nor after an exception (if no server answers, for the ttl at most).  Raises EtcdError
        if no server answered for OUTAGE_S seconds or for as long as there was time.

        While it is held through this object, acquire waits, also in the same thread, since a
        thread may serve many tasks: RLock may be acquired again, and `renew` renews.  Only where
        the wait could never end, without a limit in the main thread, it renews as python-etcd's.
        """
        if blocking and timeout is None and self._waits_for_itself():
            return self.renew(lock_ttl)
        return self._acquire(blocking, lock_ttl, timeout) is not None

    def renew(self, lock_ttl: Optional[int] = None) -> bool:
        """Renew the entry now, as the heartbeat does in time; return whether it is held.

        lock_ttl  seconds from now on; None: as before

        This asks the cluster: False also if somebody has removed the entry a moment ago.
        """
        held = self._held
        return held is not None and held.renew(lock_ttl)

    def release(self, token: Optional[int] = None) -> bool:
        """Give it up, from any thread.  Return whether it was held until now.

        token  nothing happens unless the hold is the one with this token

        If no server answers within LEAVE_S, the entry is left to its ttl.
        """
        with self._changed:
            held = self._held
            if held is None or (token is not None and held.number != token):
                return False
            self._held = None
        try:
            return held.stop()
        finally:
            self._set_free()

    def check(self) -> None:
        """Raise LockExpired unless it is held."""
        if not self.is_held:
            raise LockExpired("not held", cause=self.path)

    def contenders(self) -> List[str]:
        """Return the values of the entries in the line, the one served first at the head."""
        return [node.value or "" for node in self._line()[0]]

    def __enter__(self: _ContenderType) -> _ContenderType:
        if self._waits_for_itself():
            raise RuntimeError(f"{self.path} is held by this block's own thread: use RLock")
        place = self._acquire(True, None, None)
        if place is None:
            raise LockExpired("not acquired: cancelled, or lost before", cause=self.path)
        self._blocks.places = [*self._entered(), place]
        return self

    def __exit__(self, *_: object) -> None:
        *self._blocks.places, place = self._entered()
        if place is self._held:                     # else it was lost, and perhaps acquired anew
            self.release()

    # -- below: no public names

    def _after_fork(self) -> None:
        super()._after_fork()
        self._changed = threading.Condition()
        self._busy = False                          # somebody contends or holds
        self._held = None
        self._taken_by: object = None               # thread of the last acquire

    def _entered(self) -> List[_Place]:
        return getattr(self._blocks, "places", [])

    def _acquire(self, blocking: bool, lock_ttl: Optional[int],
                 timeout: Optional[float]) -> Optional[_Place]:
        ttl = self.ttl if lock_ttl is None else _checked_ttl(lock_ttl)
        with self._span(timeout if blocking else 0) as span:
            lost = self._take_turn(span)
            if lost is None:
                return None
            place = None
            try:
                for old in lost:
                    old.stop()
                place = self._contend(ttl, span)
            finally:
                if place is None:
                    self._set_free()
            blocks = self._entered()                # acquired anew inside of a block
            if place is not None and blocks and not blocks[-1].is_held:
                blocks[-1] = place
            return place
        return None                                 # cancelled

    def _waits_for_itself(self) -> bool:
        """Whether the main thread, outside of an event loop, would wait for what it holds.

        Any other thread may serve a pool or a loop, where another task releases it.
        """
        thread = threading.current_thread()         # not its ident, which another one gets later
        if not self.is_held or self._taken_by is not thread:
            return False
        asyncio = sys.modules.get("asyncio")
        looping = asyncio is not None and asyncio._get_running_loop() is not None
        return thread is threading.main_thread() and not looping

    def _take_turn(self, span: _Span) -> Optional[List[_Place]]:
        """Wait until nobody contends for or holds this object; None: it was in vain.

        Returns the hold that was lost, if nobody has given it up since, to be stopped.
        """
        if self._taken_by is threading.current_thread() and self.is_held and span.wait_s():
            _log.warning("%s is held by this object, and this thread waits until it is released: "
                         "RLock may be acquired again, renew() renews", self.path)
        while span.wait_for(self._changed, self._is_free):
            with self._changed:
                if self._is_free():
                    lost = [] if self._held is None else [self._held]
                    self._busy, self._held = True, None
                    self._taken_by = threading.current_thread()
                    return lost
        return None

    def _is_free(self) -> bool:
        held = self._held
        return not self._busy or (self._retakes and held is not None and not held.is_held)

    def _set_free(self) -> None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def _line(self) -> Tuple[List[Node], int]:
        """Return the entries that count, first come first, and the index.

        With a label those of this recipe; without one also those of python-etcd's lock.
        """
        nodes, index = _entries(self.client, self.path)
        if self.label:
            nodes = [node for node in nodes if _LABELLED.match(node.value or "")]
        return nodes, index

    def _blocker(self, ahead: List[Node]) -> Optional[str]:
        """Return the key to watch before looking again; None: let in.

        The line itself stands for: until any entry is gone.
        """
        return ahead[-1].key if ahead else None

    def _contend(self, ttl: int, span: _Span) -> Optional[_Place]:
        """Stand in line until let in, or out of time (return None).  Raises Cancelled."""
        place: Optional[_Place] = None
        client_scope = self.client.scope
        try:
            while True:
                if place is None or not place.is_held:
                    place = self._enter(place, ttl)
                blocker, index = self._look(place)
                if blocker is None:
                    self._held = place
                    if place.is_held:
                        return place
                    self._held = None
                if not self._wait(span, place, blocker, index):
                    return None
        finally:
            if place is not None and self._held is not place:
                place._end()
                if not client_scope.cancelled:
                    with _apart(TIDY_S):
                        place._leave()

    def _enter(self, old: Optional[_Place], ttl: int) -> _Place:
        """Take a place at the end of the line, instead of one that was lost."""
        if old is not None:
            old.stop()
        place = _Place(self.client, self.path, self.label, ttl)
        place._on_lost = lambda: self._lost(place)
        try:
            return place.start()
        except Cancelled as error:
            error.maybe_applied = False             # what may be in the line is taken back
            raise

    def _look(self, place: _Place) -> Tuple[Optional[str], int]:
        """Return the key to wait for (None: let in; "": none, look again) and the index."""
        entries, index = self._line()
        for node in entries:
            if node.value == place.value and node.key != place.key:
                # An append that was given up for lost came in after all.
                with Scope(TIDY_S):
                    _remove(self.client, node.key, place.value)
        keys = [node.key for node in entries]
        if place.key not in keys:                   # expired or removed
            place.stop()
            return "", index
        position = keys.index(place.key)
        blocker = self._blocker(entries[:position])
        if blocker is None and position + 1 < len(keys):
            self._let_in(place)
        return blocker, index

    def _let_in(self, place: _Place) -> None:
        """Do what those behind need when this contender is let in."""

    def _wait(self, span: _Span, place: _Place, blocker: Optional[str], index: int) -> bool:
        """Wait for a change of `blocker`, or until `place` is lost; return whether to look again.

        blocker  "" or None: there is none, but to look again
        """
        with contextlib.suppress(Cancelled), Scope() as waiting:
            place._scope.attach(waiting.cancel)
            try:
                if blocker and place.is_held:
                    _await(self.client, span, blocker, index, min(WAIT_SLICE_S, place.ttl),
                           below=_is_removal if blocker == self.path else None)
            finally:
                place._scope.detach(waiting.cancel)
        return span.wait_s() > 0

    def _lost(self, place: _Place) -> None:
        if self._held is place:
            with self._changed:
                self._changed.notify_all()
            if self._on_lost is not None:
                self._on_lost()
        else:
            place._scope.cancel()                   # it waits in vain, and must line up again


class Lock(Contender):
    """A lock that one contender in the cluster holds at a time; first come, first served.

        lock = Lock(client, "reports", ttl=10, on_lost=stop_working)
        with lock:
            write(..., fencing_token=lock.token)
        if lock.acquire(timeout=5): ...

    on_lost  called on another thread when the lock is lost while it is held; at that time
             `is_held` is False already, and the lock may be given to another soon

    It is python-etcd's lock, in one line with it: an in-order file under client.lock_prefix.
    Unlike there, an entry has a ttl always, and it is renewed while the process lives: a crash
    gives the lock away after the ttl, a long piece of work does not.

    Guarantee: while `is_held` is True nobody else holds it.  No lost answer, change of leader or
    restart of members breaks that, nor makes two places out of one acquire for longer than a ttl.
    A release wakes only the next in line.
    Limit: that of Heartbeat: clocks of the members differ by less than ttl / 10, and what takes
    place after the last look at `is_held` needs `token`.

    Thread: any.  Threads and tasks that share the object exclude each other too; after a lost
    hold was acquired anew, only release(token) tells the old hold from the new one.
    """

    def __init__(self, client: Client, lock_name: str, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        super().__init__(client, _below_prefix(client, lock_name), ttl=ttl, on_lost=on_lost)
        self.name = lock_name

    @property
    def uuid(self) -> str:
        """What the entry of the holder says, if this lock is held; else empty."""
        held = self._held
        return "" if held is None else held.value

    @property
    def lock_key(self) -> str:
        """Key of the entry, if this lock is held.  Raises ValueError."""
        held = self._held
        if held is None:
            raise EtcdValueError("not held: there is no entry", cause=self.path)
        return held.key

    is_taken = Contender.is_held                    # and this


def _below_prefix(client: Client, name: str) -> str:
    return client.lock_prefix + _recipe_key(name)


class RLock(Lock):
    """A Lock that its holder may acquire again; each acquire needs a release.

        with lock, lock: ...                        # the holder is the thread
        lock.acquire(holder=task)                   # ... or what you name: a task, a request

    Guarantee and limit are those of Lock.  When the lock is lost, an inner acquire returns False
    (or raises LockExpired, from `with`): the outer block has to end first.  Tasks that share
    threads name themselves as `holder`, as the thread cannot tell them apart.
    """

    _retakes = False
    _holder: object
    _depth: int                                     # acquires of the holder

    def acquire(self, blocking: bool = True, lock_ttl: Optional[int] = None,
                timeout: Optional[float] = None, *, holder: object = None) -> bool:
        """Acquire as Lock does, or once more, which renews if `lock_ttl` is given.  See Lock."""
        return self._acquire(blocking, lock_ttl, timeout, holder) is not None

    def _waits_for_itself(self) -> bool:
        return False

    def release(self, token: Optional[int] = None) -> bool:
        """Undo one acquire; the last one gives the lock up.  Return whether it was held."""
        with self._changed:
            self._depth = max(0, self._depth - 1)
            if self._depth:
                return self.is_held
            self._holder = None
        return super().release(token)

    # -- below: no public names

    def _after_fork(self) -> None:
        super()._after_fork()
        self._holder, self._depth = None, 0

    def _acquire(self, blocking: bool, lock_ttl: Optional[int], timeout: Optional[float],
                 holder: object = None) -> Optional[_Place]:
        holder = threading.current_thread() if holder is None else holder
        with self._changed:
            held = self._held if self._holder == holder else None
            self._depth += held is not None and held.is_held
        if held is not None:
            if lock_ttl is not None and held.is_held:
                with contextlib.suppress(EtcdError):    # if it fails the heartbeat tries again
                    held.renew(lock_ttl)
            return held if held.is_held else None
        place = super()._acquire(blocking, lock_ttl, timeout)
        if place is not None:
            self._holder, self._depth = holder, 1
        return place


class RWLock:
    """A lock that either one writer or any number of readers hold; first come, first served.

        lock = RWLock(client, "/config-lock")
        with lock.read_lock(): ...
        with lock.write_lock() as held: write(..., fencing_token=held.token)

    Each call of read_lock and write_lock returns a contender of its own, which has the methods of
    Lock.  A waiting writer keeps later readers waiting, so that it gets its turn.

    Guarantee: while a write lock `is_held`, no other one is; while a read lock `is_held`, no write
    lock is.  A waiting writer watches the entry before it, a reader the last writer before it.
    Limit: as for Lock.  A thread that holds one and asks for the other waits for itself.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        _recipe_key(key)
        self._contender: Callable[[Type[Contender]], Contender] = lambda kind: kind(
            client, key, ttl=ttl, on_lost=on_lost)

    def read_lock(self) -> Contender:
        """Return a contender that shares the lock with other readers."""
        return self._contender(_Reader)

    def write_lock(self) -> Contender:
        """Return a contender that shares the lock with nobody."""
        return self._contender(_Writer)


class _Writer(Contender):
    """Waits for all before it."""

    label = ":write"


class _Reader(Contender):
    """Waits for the writers before it."""

    label = ":read"

    def _blocker(self, ahead: List[Node]) -> Optional[str]:
        writers = [node for node in ahead if not (node.value or "").endswith(self.label)]
        return writers[-1].key if writers else None


class Semaphore(Contender):
    """At most `limit` contenders hold it at a time; first come, first served.

        with Semaphore(client, "/downloads", limit=3): ...

    An object is one contender: make one for each unit that is wanted.

    Guarantee: never more than `limit` objects with `is_held` True, if all have the same limit;
    acquire raises ValueError if it meets another limit in the line.  A release wakes the first of
    those who wait; each one that is let in wakes the next.
    Limit: as for Lock.  A token tells holders apart, but those of several holders are valid at a
    time.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, limit: int, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        if limit < 1:
            raise ValueError("limit is at least 1")
        super().__init__(client, key, ttl=ttl, on_lost=on_lost)
        self.limit = limit
        self.label = f":limit={limit}"

    def _blocker(self, ahead: List[Node]) -> Optional[str]:
        other = [node for node in ahead if not (node.value or "").endswith(self.label)]
        if other:
            raise ValueError(f"{other[0].value} stands in line, {self.label} wants to join it")
        if len(ahead) < self.limit:
            return None
        # The first of those who wait waits for any holder; the others for the one before them to
        # leave or to be let in, which is told by a renewal that is not silent.
        return self.path if len(ahead) == self.limit else ahead[-1].key

    def _let_in(self, place: _Place) -> None:
        place.announce()
