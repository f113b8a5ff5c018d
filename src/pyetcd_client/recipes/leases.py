"""Leases: keys that live as long as their owner."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from typing import TypeVar

from ..client.client import Client
from ..transport.calls import _Field
from ..transport.connections import Scope, _context
from ..transport.errors import (
    Cancelled,
    CompareFailed,
    EtcdError,
    KeyNotFound,
    LockExpired,
    NotDir,
    NotFile,
    RefreshValue,
    RequestTimeout,
)
from ..transport.results import Node, Result
from .basics import (
    CALL_TIMEOUT_S,
    LEASE_TTL_S,
    TIDY_S,
    _append_once,
    _call_back_in_background,
    _checked_ttl,
    _cleanup_scope,
    _clock,
    _create_once,
    _entries,
    _inherited,
    _LostCallback,
    _read,
    _recipe_key,
    _remove,
    _with_retries,
)

EXPIRY_MARGIN = 0.1             # share of a ttl by which a lease ends early on the local clock
LEAVE_S = 2.0                   # for removing the file of a lease that is stopped

_HeartbeatType = TypeVar("_HeartbeatType", bound="Heartbeat")
_GONE = (KeyNotFound, CompareFailed, NotFile, NotDir)   # replies to a renewal of a lost file


class Heartbeat:
    """Keeps an existing file from expiring, without events for its watchers.

        with Heartbeat(client, "/jobs/7/running", ttl=10) as heartbeat:
            ...
            heartbeat.is_held           # False: the file may be gone

    ttl      seconds, at least 1; renewed after a third of it
    on_lost  called once, on the thread of the heartbeat, when `is_held` becomes False without
             `stop`: no server could renew the file in time, it is gone, its value has changed, or
             the client was closed

    Guarantee: `is_held` turns False before a server lets the file expire, and stays False.  It
    depends on the local clock only, whatever the thread and the network do.
    Limit: a tenth of the ttl must cover the difference between the wall clocks of the members,
    since one of them sets the instant of expiry and another one acts on it.  `is_held` holds for
    the present moment: later writes need a fencing token.  It sends no request: a deletion of the
    file shows at the next renewal, after a third of the ttl; `renew` checks now.  A forked child
    holds nothing, and cannot start what its parent started.  etcd before 2.3 cannot refresh:
    there each renewal is a write that watchers see.

    Thread: any.  It runs a daemon thread, until `stop` or the end of the client.
    """

    def __init__(self, client: Client, key: str, ttl: int = LEASE_TTL_S, *,
                 on_lost: _LostCallback = None) -> None:
        self.client = client
        self.key = _recipe_key(key)
        self.ttl = _checked_ttl(ttl)
        self._on_lost = on_lost
        self._value = ""
        self._index = 0                             # the last known modified index
        self._has_refresh = False                   # the server is known to support refresh
        self._due_at = 0.0                          # of the next renewal
        self._over = True                           # stopped or lost, for ever
        self._expires_at = 0.0
        self._pid = 0                               # of the process that started it
        self._stopped = False
        self._scope = Scope()                       # of the thread: cancelled by `stop`
        self._thread: threading.Thread | None = None
        self._after_fork()
        _inherited[id(self)] = self

    @property
    def is_held(self) -> bool:
        """Whether the file certainly exists."""
        with self._lock:
            self._over = self._over or _clock() >= self._expires_at
            return not self._over and self._pid == os.getpid()

    alive = is_held

    @property
    def value(self) -> str:
        return self._value

    def start(self: _HeartbeatType) -> _HeartbeatType:
        """Take the file, now and from now on.  Raises KeyNotFound; EtcdError without a server."""
        if self._pid not in (0, os.getpid()):
            raise RuntimeError(f"{self.key} belongs to the parent process: make another object")
        if self._thread is not None and self._thread.is_alive() and not self._stopped:
            return self                             # it runs
        self._acquire_file()
        self._stopped, self._scope = False, Scope(None, self.client.scope)
        self._thread = threading.Thread(
            target=self._run, name=f"pyetcd-heartbeat {self.key}", daemon=True)
        self._thread.start()
        return self

    def renew(self, ttl: int | None = None) -> bool:
        """Renew the file now; return whether it is held.

        ttl  seconds from now on; None: as before

        Raises EtcdError if no server replies; the heartbeat retries then.
        """
        if ttl is not None:
            self.ttl = _checked_ttl(ttl)
        if not self.is_held:
            return False
        try:
            self._renew()
        except _GONE:
            self._lose()
        finally:
            self._wake.set()                        # the next renewal may be due earlier
        return self.is_held

    def stop(self) -> bool:
        """Stop renewing; return whether the file was held until now.

        A Heartbeat leaves the file to its ttl; a Lease tries to remove it, for LEAVE_S.
        """
        held = self.is_held
        if self._pid != os.getpid():                # in a forked child: the parent holds it
            return False
        self._end()
        outer = _context.scope                      # its end must not leave the file behind
        over = outer is not None and (
            outer.cancelled or time.monotonic() + TIDY_S >= outer.deadline)
        with _cleanup_scope() if over else Scope(LEAVE_S):
            self._remove_file()
        return held

    def __enter__(self: _HeartbeatType) -> _HeartbeatType:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()               # guards _over and _expires_at; a leaf
        self._renewing = threading.Lock()           # one renewal at a time; guards _index
        self._wake = threading.Event()              # for the thread to check its state

    def _acquire_file(self) -> None:
        """Find or create the file and set the time of its expiry."""
        node = _read(self.client, self.key).node
        self._value, self._index = node.value or "", node.modified_index
        self._adopt()

    def _adopt(self) -> None:
        """Renew a file with an unknown time of expiry."""
        sent_at = _clock()
        self._index = _with_retries(self.client, self._renew_if_ours).modified_index
        self._granted_at(sent_at)

    def _remove_file(self) -> None:
        """Remove the file after the last renewal; a heartbeat leaves it to its ttl."""

    def _granted_at(self, sent_at: float) -> None:
        """Start a new ttl, counted from before its request was sent."""
        with self._lock:
            self._pid, self._over = os.getpid(), False
            self._expires_at = sent_at + self.ttl * (1 - EXPIRY_MARGIN)
        self._due_at = sent_at + self.ttl / 3

    def _lose(self) -> None:
        with self._lock:
            self._over = True
        self._wake.set()

    def _end(self) -> None:
        """End the thread, also during a renewal, and wait for it."""
        self._stopped = True
        self._lose()
        self._scope.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            with self._scope as scope:
                scope.attach(self._wake.set)
                while self._renew_until_lost(scope) and self._regain(scope):
                    pass
        except Cancelled:                           # by `stop` or `client.close`
            self._lose()
            if not self._stopped:
                self._report_loss()

    def _report_loss(self) -> None:
        if self._on_lost is not None:
            _call_back_in_background(self._on_lost)

    def _regain(self, _scope: Scope) -> bool:
        """Handle a loss; return whether the file is held again."""
        self._report_loss()
        return False

    def _renew_until_lost(self, scope: Scope) -> bool:
        """Renew the file; return True when it is lost, False after `stop`.  Raises Cancelled."""
        while self.is_held:
            self._wake.wait(max(0.0, min(self._due_at, self._expires_at) - _clock()))
            self._wake.clear()
            scope.left_s()
            if self.is_held and _clock() >= self._due_at:
                try:
                    self._renew()
                except _GONE:
                    break
                except Cancelled:
                    raise
                except EtcdError:                   # retried until it expires
                    self._due_at = _clock() + min(0.5, self.ttl / 10)
        self._lose()
        return not self._stopped

    def _renew(self) -> None:
        """Renew the ttl once.  Raises CompareFailed or KeyNotFound if the file is lost."""
        with self._exclusive():
            sent_at = _clock()
            timeout_s = max(0.1, min(CALL_TIMEOUT_S, self.ttl / 3, self._expires_at - sent_at))
            with Scope(timeout_s):
                self._index = self._renew_if_ours().modified_index
            with self._lock:                        # a reported loss is final
                if not self._over and _clock() < self._expires_at:
                    self._expires_at = sent_at + self.ttl * (1 - EXPIRY_MARGIN)
            self._due_at = sent_at + self.ttl / 3

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Exclude other renewals, which would change the index that this one compares."""
        if not self._renewing.acquire(timeout=CALL_TIMEOUT_S):
            raise RequestTimeout("another renewal is under way", endpoint="")
        try:
            yield
        finally:
            self._renewing.release()

    def _renew_if_ours(self) -> Result:
        """Send a renewal; earlier ones whose replies were lost may have changed the index."""
        while True:
            try:
                return self._send_renewal()
            except CompareFailed:
                node = self.client.get(self.key, quorum=True).node
                if node.value != self._value or node.modified_index == self._index:
                    raise                           # a file of another owner
                self._index = node.modified_index

    def _send_renewal(self, *, announce: bool = False) -> Result:
        """Renew on condition that the file has the known index.

        A renewal that arrives after it was given up and repeated thus cannot shorten a longer ttl.
        """
        fields: dict[str, _Field] = {
            "ttl": self.ttl, "prevValue": self._value or None, "prevIndex": self._index}
        if announce:
            return self.client._put(self.key, {**fields, "value": self._value})
        fields["refresh"] = True
        if not self._has_refresh:
            try:                                    # the value: etcd before 2.3 would empty it
                return self.client._put(self.key, {**fields, "value": self._value or " "})
            except RefreshValue:
                self._has_refresh = True
        return self.client._put(self.key, fields)


class Lease(Heartbeat):
    """A file that exists as long as this process keeps it: created by start, removed by stop.

        with Lease(client, "/hosts/a", "10.0.0.1", ttl=10) as lease:
            ...

    value    identifies the owner: two leases of one key need different values; None: a uuid

    Guarantee: created once, even if replies are lost; start raises NodeExists while the key has
    another owner.  `is_held` as in Heartbeat.  After a crash, or the end of the client, the file
    remains for at most its ttl, and the half second that etcd takes to notice.
    Limit: as for Heartbeat.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, value: str | None = None,
                 ttl: int = LEASE_TTL_S, *, on_lost: _LostCallback = None) -> None:
        if value == "":
            raise ValueError("etcd cannot compare with an empty value")
        self._given_value = value
        super().__init__(client, key, ttl, on_lost=on_lost)

    def _after_fork(self) -> None:
        super()._after_fork()
        # A uuid for each process: with the parent's the child would own the parent's file.
        self._value = self._given_value or uuid.uuid4().hex

    def _acquire_file(self) -> None:
        sent_at = _clock()
        self._index, fresh = self._create_file()
        if fresh and _clock() - sent_at < self.ttl / 3:
            self._granted_at(sent_at)
            return
        try:
            self._adopt()
        except (KeyNotFound, CompareFailed) as error:
            raise LockExpired("expired before it was known to be made", cause=self.key) from error

    def _create_file(self) -> tuple[int, bool]:
        """Create the file; return its index, and whether its ttl is new."""
        node, fresh = _create_once(self.client, self.key, self._value, self.ttl)
        return node.modified_index, fresh

    def _remove_file(self) -> None:
        _remove(self.client, self.key, self._value)


class _Entry(Lease):
    """An entry in a line of contenders: an in-order file, served in the order of its number."""

    def __init__(self, client: Client, line: str, label: str, ttl: int) -> None:
        super().__init__(client, line, uuid.uuid4().hex + label, ttl)
        self.line = self.key
        self._sure = True                           # that no second file of this entry exists

    @property
    def number(self) -> int:
        """The index at which the entry was created."""
        return int(self.key.rpartition("/")[2])

    def announce(self) -> None:
        """Renew the file with an event for its watchers; a failure is harmless."""
        with contextlib.suppress(EtcdError), self._exclusive():
            self._index = self._send_renewal(announce=True).modified_index

    def _acquire_file(self) -> None:
        try:
            super()._acquire_file()
        except BaseException:                       # the file may exist nevertheless
            self._sure = False
            with _cleanup_scope():
                self._remove_file()
            raise

    def _ours(self) -> list[Node]:
        return [node for node in _entries(self.client, self.line)[0] if node.value == self._value]

    def _create_file(self) -> tuple[int, bool]:
        node, self._sure = _append_once(
            self.client, self.line, self._value, self.ttl, lambda: next(iter(self._ours()), None))
        self.key = node.key
        return node.modified_index, self._sure

    def _remove_file(self) -> None:
        if self.key != self.line:
            super()._remove_file()
        with contextlib.suppress(EtcdError):
            for node in () if self._sure else self._ours():
                _remove(self.client, node.key, self._value)
