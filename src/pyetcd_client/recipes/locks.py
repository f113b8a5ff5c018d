"""Locks and semaphores."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from typing import Callable, TypeVar

from ..client.client import Client
from ..client.watching import _REMOVALS
from ..transport.connections import Scope
from ..transport.defaults import _log
from ..transport.errors import Cancelled, EtcdError, EtcdValueError, LockExpired
from ..transport.results import Node
from .basics import (
    LEASE_TTL_S,
    TIDY_S,
    WAIT_SLICE_S,
    _CallScope,
    _checked_ttl,
    _cleanup_scope,
    _entries,
    _LostCallback,
    _Recipe,
    _recipe_key,
    _remove,
    _Wait,
)
from .leases import _Entry

_ContenderType = TypeVar("_ContenderType", bound="Contender")
_LABELLED = re.compile(r"[0-9a-f]{32}:")


class Contender(_Recipe):
    """The base of Lock, RWLock, Semaphore and Election: a contender in a line of entries.

    Each attempt has an entry with a uuid of its own.  Only the entries ahead can block it and no
    new ones appear there, so a contender that was admitted stays admitted until its entry is gone.

    The object is the holder, not the thread or task: a second `acquire` waits until the first one
    is released or lost.
    """

    label = ""                                      # after the uuid in the value of an entry
    _held: _Entry | None                         # guarded by _changed, as is _busy
    _reacquires = True                              # a lost hold may be acquired again

    def __init__(self, client: Client, line: str, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        super().__init__(client, _recipe_key(line))
        self.ttl = _checked_ttl(ttl)
        self._on_lost = on_lost
        self._blocks = threading.local()            # .entries: of the `with` blocks of a thread
        self._after_fork()

    @property
    def is_held(self) -> bool:
        """Whether it is held; False before a server could admit another contender."""
        held = self._held
        return held is not None and held.is_held

    is_acquired = is_held                           # python-etcd's name

    @property
    def token(self) -> int:
        """The fencing token, higher than that of every earlier holder; 0 if it is not held.

        Send it with every write to the protected resource, which must refuse tokens lower than
        the highest so far: they come from a holder that was suspended past its ttl.
        """
        held = self._held
        return held.number if held is not None and held.is_held else 0

    def acquire(self, blocking: bool = True, lock_ttl: int | None = None,
                timeout: float | None = None) -> bool:
        """Wait until admitted.  Return whether it is held.

        blocking  False: as timeout=0
        lock_ttl  seconds; None: the ttl of the constructor
        timeout   seconds to wait; None: no limit; 0: try once, do not wait

        False after `timeout`, and after `cancel` by another thread.  No entry remains then, nor
        after an exception (without a server, until its ttl ends).  Raises EtcdError if no server
        replied for OUTAGE_S seconds or until the timeout.

        While this object holds it, acquire waits, also in the same thread, since a thread may
        serve many tasks: RLock is re-entrant, and `renew` renews.  Only if the wait could never
        end, without a limit in the main thread, it renews as in python-etcd.
        """
        if blocking and timeout is None and self._waits_for_itself():
            return self.renew(lock_ttl)
        return self._acquire(lock_ttl, timeout if blocking else 0) is not None

    def renew(self, lock_ttl: int | None = None) -> bool:
        """Renew the entry now; return whether it is held.

        lock_ttl  seconds from now on; None: as before

        Unlike `is_held` it sends a request, and so notices at once that the entry was removed.
        """
        held = self._held
        return held is not None and held.renew(lock_ttl)

    def release(self, token: int | None = None) -> bool:
        """Release it, from any thread.  Return whether it was held until now.

        token  release only the hold with this token

        If no server replies within LEAVE_S, the entry is left to its ttl.
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

    def contenders(self) -> list[str]:
        """Return the values of the entries in the line in their order."""
        return [node.value or "" for node in self._line()[0]]

    def __enter__(self: _ContenderType) -> _ContenderType:
        if self._waits_for_itself():
            raise RuntimeError(f"{self.path} is held by this block's own thread: use RLock")
        entry = self._acquire(None, None)
        if entry is None:
            raise LockExpired("not acquired: cancelled, or lost before", cause=self.path)
        self._blocks.entries = [*self._entered(), entry]
        return self

    def __exit__(self, *_: object) -> None:
        *self._blocks.entries, entry = self._entered()
        if entry is self._held:                     # else it was lost, and perhaps acquired again
            self.release()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._changed = threading.Condition()
        self._busy = False                          # a thread contends or holds
        self._held = None
        self._taken_by: object = None               # thread of the last acquire

    def _entered(self) -> list[_Entry]:
        return getattr(self._blocks, "entries", [])

    def _acquire(self, lock_ttl: int | None, timeout: float | None) -> _Entry | None:
        ttl = self.ttl if lock_ttl is None else _checked_ttl(lock_ttl)
        with self._call_scope(timeout) as scope:
            lost = self._take_turn(scope)
            if lost is None:
                return None
            entry = None
            try:
                for old in lost:
                    old.stop()
                entry = self._contend(ttl, scope)
            finally:
                if entry is None:
                    self._set_free()
            blocks = self._entered()                # acquired again inside of a block
            if entry is not None and blocks and not blocks[-1].is_held:
                blocks[-1] = entry
            return entry
        return None                                 # cancelled

    def _waits_for_itself(self) -> bool:
        """Return whether the main thread, outside an event loop, would wait for its own hold.

        Any other thread may serve a pool or a loop, where another task releases it.
        """
        thread = threading.current_thread()         # not its ident, which is reused
        if not self.is_held or self._taken_by is not thread:
            return False
        asyncio = sys.modules.get("asyncio")
        looping = asyncio is not None and asyncio._get_running_loop() is not None
        return thread is threading.main_thread() and not looping

    def _take_turn(self, scope: _CallScope) -> list[_Entry] | None:
        """Wait until no thread contends for or holds this object; None when the time is over.

        Returns a lost hold that was not released, to be stopped, or [].
        """
        thread = threading.current_thread()
        if self._taken_by is thread and self.is_held and scope.wait_s():
            _log.warning("%s is held by this object, and this thread waits until it is released: "
                         "RLock may be acquired again, renew() renews", self.path)
        while scope.wait_for(self._changed, self._is_free):
            with self._changed:
                if self._is_free():
                    lost = [] if self._held is None else [self._held]
                    self._busy, self._held, self._taken_by = True, None, thread
                    return lost
        return None

    def _is_free(self) -> bool:
        held = self._held
        return not self._busy or (self._reacquires and held is not None and not held.is_held)

    def _set_free(self) -> None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def _line(self) -> tuple[list[Node], int]:
        """Return the entries in their order, and the index of the read.

        With a label only those of this recipe; without one also those of python-etcd's lock.
        """
        nodes, index = _entries(self.client, self.path)
        if self.label:
            nodes = [node for node in nodes if _LABELLED.match(node.value or "")]
        return nodes, index

    def _blocker(self, ahead: list[Node]) -> str | None:
        """Return the key to watch (the line's own: for any removal); None: admitted."""
        return ahead[-1].key if ahead else None

    def _contend(self, ttl: int, scope: _CallScope) -> _Entry | None:
        """Keep an entry in the line until admitted; None at the deadline.  Raises Cancelled."""
        entry: _Entry | None = None
        client_scope = self.client.scope
        try:
            while True:
                if entry is None or not entry.is_held:
                    entry = self._enter(entry, ttl)
                blocker, index = self._find_blocker(entry)
                if blocker is None:
                    self._held = entry
                    if entry.is_held:
                        return entry
                    self._held = None
                if not self._wait_for_blocker(scope, entry, blocker, index):
                    return None
        finally:
            if entry is not None and self._held is not entry:
                entry._end()
                if not client_scope.cancelled:
                    with _cleanup_scope():
                        entry._remove_file()

    def _enter(self, old: _Entry | None, ttl: int) -> _Entry:
        """Append an entry to the line, in place of one that was lost."""
        if old is not None:
            old.stop()
        entry = _Entry(self.client, self.path, self.label, ttl)
        entry._on_lost = lambda: self._lost(entry)
        try:
            return entry.start()
        except Cancelled as error:
            error.maybe_applied = False             # the entry was removed, if it existed
            raise

    def _find_blocker(self, entry: _Entry) -> tuple[str | None, int]:
        """Return the key to wait for (None: admitted; "": none, read again) and the index."""
        entries, index = self._line()
        for node in entries:
            if node.value == entry.value and node.key != entry.key:
                # An append that was given up for lost has arrived.
                with Scope(TIDY_S):
                    _remove(self.client, node.key, entry.value)
        keys = [node.key for node in entries]
        if entry.key not in keys:                   # expired or removed
            entry.stop()
            return "", index
        position = keys.index(entry.key)
        blocker = self._blocker(entries[:position])
        if blocker is None and position + 1 < len(keys):
            self._admitted(entry)
        return blocker, index

    def _admitted(self, entry: _Entry) -> None:
        """Notify the contenders behind of the admission, if the recipe needs it."""

    def _wait_for_blocker(self, scope: _CallScope, entry: _Entry, blocker: str | None,
                          index: int) -> bool:
        """Wait for a change of `blocker` or the loss of `entry`; return whether to read again."""
        with contextlib.suppress(Cancelled), Scope() as waiting:
            entry._scope.attach(waiting.cancel)
            try:
                if blocker and entry.is_held:
                    removed = (lambda event: event.action in _REMOVALS)
                    wait = _Wait(blocker, index, removed if blocker == self.path else None)
                    scope.wait_for_event(self.client, wait, min(WAIT_SLICE_S, entry.ttl))
            finally:
                entry._scope.detach(waiting.cancel)
        return scope.wait_s() > 0

    def _lost(self, entry: _Entry) -> None:
        if self._held is entry:
            with self._changed:
                self._changed.notify_all()
            if self._on_lost is not None:
                self._on_lost()
        else:
            entry._scope.cancel()                   # it must line up again


class Lock(Contender):
    """A lock with one holder in the cluster at a time, in order of arrival.

        lock = Lock(client, "reports", ttl=10, on_lost=stop_working)
        with lock:
            write(..., fencing_token=lock.token)
        if lock.acquire(timeout=5): ...

    on_lost  called on another thread when a held lock is lost; another contender may hold it soon

    It shares its line with python-etcd's lock: in-order files under client.lock_prefix.  Unlike
    there, an entry always has a ttl and is renewed while the process lives: a crash releases the
    lock after the ttl, long work keeps it.

    Guarantee: while `is_held` is True no other contender holds it.  Lost replies, changes of the
    leader and restarts of members do not break this, and leave no second entry of one acquire for
    longer than a ttl.  A release wakes only the next contender.
    Limit: that of Heartbeat: clocks of the members differ by less than ttl / 10, and work after
    the last check of `is_held` needs `token`.

    Thread: any.  Threads and tasks that share the object exclude each other too; after a lost
    hold was acquired again, only release(token) tells the two holds apart.
    """

    def __init__(self, client: Client, lock_name: str, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        super().__init__(client, client.lock_prefix + _recipe_key(lock_name), ttl=ttl,
                         on_lost=on_lost)
        self.name = lock_name

    @property
    def uuid(self) -> str:
        """The value of the entry, if this lock is held; else empty."""
        held = self._held
        return "" if held is None else held.value

    @property
    def lock_key(self) -> str:
        """The key of the entry, if this lock is held.  Raises ValueError."""
        held = self._held
        if held is None:
            raise EtcdValueError("not held: there is no entry", cause=self.path)
        return held.key

    is_taken = Contender.is_held                    # python-etcd's name


class RLock(Lock):
    """A re-entrant Lock; each acquire needs a release.

        with lock, lock: ...                        # the holder is the thread
        lock.acquire(holder=task)                   # or any object: a task, a request

    Guarantee and limit are those of Lock.  After a loss an inner acquire returns False (`with`
    raises LockExpired) until the outer block has ended.  Tasks that share a thread need `holder`.
    """

    _reacquires = False
    _holder: object
    _depth: int                                     # acquires of the holder

    def acquire(self, blocking: bool = True, lock_ttl: int | None = None,
                timeout: float | None = None, *, holder: object = None) -> bool:
        """Acquire as Lock does, or once more; `lock_ttl` then renews.  See Lock."""
        return self._acquire(lock_ttl, timeout if blocking else 0, holder) is not None

    def _waits_for_itself(self) -> bool:
        return False

    def release(self, token: int | None = None) -> bool:
        """Undo one acquire; the last one releases the lock.  Return whether it was held."""
        with self._changed:
            self._depth = max(0, self._depth - 1)
            if self._depth:
                return self.is_held
            self._holder = None
        return super().release(token)

    def _after_fork(self) -> None:
        super()._after_fork()
        self._holder, self._depth = None, 0

    def _acquire(self, lock_ttl: int | None, timeout: float | None,
                 holder: object = None) -> _Entry | None:
        holder = threading.current_thread() if holder is None else holder
        with self._changed:
            held = self._held if self._holder == holder else None
            self._depth += held is not None and held.is_held
        if held is not None:
            if lock_ttl is not None and held.is_held:
                with contextlib.suppress(EtcdError):    # the heartbeat retries
                    held.renew(lock_ttl)
            return held if held.is_held else None
        entry = super()._acquire(lock_ttl, timeout)
        if entry is not None:
            self._holder, self._depth = holder, 1
        return entry


class RWLock:
    """A lock for one writer or any number of readers, in order of arrival.

        lock = RWLock(client, "/config-lock")
        with lock.read_lock(): ...
        with lock.write_lock() as held: write(..., fencing_token=held.token)

    Each call of read_lock and write_lock returns a new contender, with the methods of Lock.  A
    waiting writer blocks later readers, so that it is not starved.

    Guarantee: while a write lock `is_held`, no other lock is; while a read lock `is_held`, no
    write lock is.  A waiting writer watches the entry ahead, a reader the last writer ahead.
    Limit: as for Lock.  A thread that holds one and acquires the other waits for itself.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        _recipe_key(key)
        self._contender: Callable[[type[Contender]], Contender] = lambda kind: kind(
            client, key, ttl=ttl, on_lost=on_lost)

    def read_lock(self) -> Contender:
        """Return a contender for shared access."""
        return self._contender(_Reader)

    def write_lock(self) -> Contender:
        """Return a contender for exclusive access."""
        return self._contender(_Writer)


class _Writer(Contender):
    label = ":write"


class _Reader(Contender):
    label = ":read"

    def _blocker(self, ahead: list[Node]) -> str | None:
        writers = [node for node in ahead if not (node.value or "").endswith(self.label)]
        return writers[-1].key if writers else None


class Semaphore(Contender):
    """A semaphore with at most `limit` holders at a time, in order of arrival.

        with Semaphore(client, "/downloads", limit=3): ...

    An object is one contender: create one for each unit.

    Guarantee: never more than `limit` objects with `is_held` True, if all have the same limit;
    acquire raises ValueError if it finds another limit in the line.  A release wakes the first
    waiting contender; each admission wakes the next.
    Limit: as for Lock.  Tokens of several holders are valid at a time.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, limit: int, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        if limit < 1:
            raise ValueError("limit is at least 1")
        super().__init__(client, key, ttl=ttl, on_lost=on_lost)
        self.limit = limit
        self.label = f":limit={limit}"

    def _blocker(self, ahead: list[Node]) -> str | None:
        other = [node for node in ahead if not (node.value or "").endswith(self.label)]
        if other:
            raise ValueError(f"{other[0].value} stands in line, {self.label} wants to join it")
        if len(ahead) < self.limit:
            return None
        # The first waiting contender waits for the removal of any holder; the others wait until
        # the one ahead leaves or announces its admission.
        return self.path if len(ahead) == self.limit else ahead[-1].key

    def _admitted(self, entry: _Entry) -> None:
        entry.announce()
