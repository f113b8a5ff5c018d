"""Leases: keys that live as long as their owner."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from typing import Dict, Iterator, Optional, Tuple, TypeVar

from ..client.client import Client
from ..transport.calls import _Field
from ..transport.connections import Scope, _here
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
    EXPIRY_MARGIN,
    LEASE_TTL_S,
    LEAVE_S,
    TIDY_S,
    _apart,
    _append_once,
    _checked_ttl,
    _clock,
    _create_once,
    _entries,
    _inherited,
    _insist,
    _LostCallback,
    _name,
    _read,
    _recipe_key,
    _remove,
    _tell,
)

_HeartbeatType = TypeVar("_HeartbeatType", bound="Heartbeat")


class Heartbeat:
    """Keeps a file that exists from expiring, without waking those who watch it.

        with Heartbeat(client, "/jobs/7/running", ttl=10) as heartbeat:
            ...
            heartbeat.is_held           # False: it may be gone

    ttl      seconds, at least 1; renewed after a third of it
    on_lost  called once, on the thread of the heartbeat, when `is_held` has become False without
             `stop`: no server could renew the file in time, it is gone, its value has changed, or
             the client was closed

    Guarantee: `is_held` is False before a server lets the file expire, and stays so.  It is read
    off the local clock, whatever the thread and the network do.
    Limit: a tenth of the ttl must cover by how much the wall clocks of the members differ, since
    one of them sets the instant of expiry and another one acts on it.  `is_held` speaks of the
    moment it was asked: what is done a moment later needs a fencing token.  It does not ask a
    server: that somebody deleted the file shows at the next renewal, after a third of the ttl;
    `renew` asks now.  A forked child holds nothing, and cannot start what its parent started.
    etcd before 2.3 cannot refresh: there each renewal is a write that watchers see.

    Thread: any.  It runs a daemon thread, which `stop` joins and the end of the client ends.
    """

    def __init__(self, client: Client, key: str, ttl: int = LEASE_TTL_S, *,
                 on_lost: _LostCallback = None) -> None:
        self.client = client
        self.key = _recipe_key(key)
        self.ttl = _checked_ttl(ttl)
        self._on_lost = on_lost
        self._value = ""
        self._index = 0                             # modified index as last known
        self._silent = False                        # whether the server is known to have refresh
        self._due_at = 0.0                          # next renewal
        self._over = True                           # stopped or lost, and never again held
        self._expires_at = 0.0
        self._pid = 0                               # of the process that started it
        self._stopped = False
        self._scope = Scope()                       # of the thread: cancelled by `stop`
        self._thread: Optional[threading.Thread] = None
        self._after_fork()
        _inherited[id(self)] = self

    @property
    def is_held(self) -> bool:
        """Whether the file is certain to be there."""
        with self._lock:
            self._over = self._over or _clock() >= self._expires_at
            return not self._over and self._pid == os.getpid()

    @property
    def alive(self) -> bool:
        """As is_held."""
        return self.is_held

    @property
    def value(self) -> str:
        """Value of the file."""
        return self._value

    def start(self: _HeartbeatType) -> _HeartbeatType:
        """Renew the file now, and from now on.  Raises KeyNotFound, or that no server answers."""
        if self._pid not in (0, os.getpid()):
            raise RuntimeError(f"{self.key} belongs to the parent process: make another object")
        if self._thread is not None and self._thread.is_alive() and not self._stopped:
            return self                             # started already
        self._obtain()
        self._stopped, self._scope = False, Scope(None, self.client.scope)
        self._thread = threading.Thread(
            target=self._run, name=f"pyetcd-heartbeat {self.key}", daemon=True)
        self._thread.start()
        return self

    def renew(self, ttl: Optional[int] = None) -> bool:
        """Renew the file now; return whether it is held.

        ttl  seconds from now on; None: as before

        Raises that no server answers; then the heartbeat goes on trying.
        """
        if ttl is not None:
            self.ttl = _checked_ttl(ttl)
        if not self.is_held:
            return False
        try:
            self._renew()
        except (KeyNotFound, CompareFailed, NotFile, NotDir):
            self._lose()
        finally:
            self._wake.set()                        # the next one may be due earlier now
        return self.is_held

    def stop(self) -> bool:
        """Stop renewing, and leave the file to its ttl.  Return whether it was held until now."""
        held = self.is_held
        if self._pid != os.getpid():                # in a forked child it is the parent's
            return False
        self._end()
        around = _here.scope                        # its end must not leave the file to others
        over = around is not None and (
            around.cancelled or time.monotonic() + TIDY_S >= around.deadline)
        with _apart(TIDY_S) if over else Scope(LEAVE_S):
            self._leave()
        return held

    def __enter__(self: _HeartbeatType) -> _HeartbeatType:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- below: no public names

    def _after_fork(self) -> None:
        self._lock = threading.Lock()               # guards _over and _expires_at; a leaf
        self._renewing = threading.Lock()           # one renewal at a time; guards _index
        self._wake = threading.Event()              # the thread should look

    def _obtain(self) -> None:
        """Get the file to keep; the end of its life is known afterwards."""
        node = _read(self.client, self.key).node
        self._value, self._index = node.value or "", node.modified_index
        self._adopt()

    def _adopt(self) -> None:
        """Renew a file whose remaining life is not known."""
        sent_at = _clock()
        self._index = _insist(self.client, self._swap_ours).modified_index
        self._granted_at(sent_at)

    def _leave(self) -> None:
        """Do what follows the last renewal."""

    def _granted_at(self, sent_at: float) -> None:
        """Begin a new life of the file, from before the request that gave it was sent."""
        with self._lock:
            self._pid, self._over = os.getpid(), False
            self._expires_at = sent_at + self.ttl * (1 - EXPIRY_MARGIN)
        self._due_at = sent_at + self.ttl / 3

    def _lose(self) -> None:
        """End the life of the file, and let the thread know."""
        with self._lock:
            self._over = True
        self._wake.set()

    def _end(self) -> None:
        """End the thread, also in the middle of a renewal, and wait for it."""
        self._stopped = True
        self._lose()
        self._scope.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            with self._scope as scope:
                scope.attach(self._wake.set)
                while self._keep(scope) and self._regain(scope):
                    pass
        except Cancelled:                           # by `stop`, or the client was closed
            self._lose()
            if not self._stopped and self._on_lost is not None:
                _tell(self._on_lost)

    def _regain(self, _scope: Scope) -> bool:
        """Do what follows a loss; return whether there is a file to keep again."""
        if self._on_lost is not None:
            _tell(self._on_lost)
        return False

    def _keep(self, scope: Scope) -> bool:
        """Renew until stopped (return False) or lost (return True).  Raises Cancelled."""
        while self.is_held:
            self._wake.wait(max(0.0, min(self._due_at, self._expires_at) - _clock()))
            self._wake.clear()
            scope.left_s()
            if self.is_held and _clock() >= self._due_at:
                try:
                    self._renew()
                except (KeyNotFound, CompareFailed, NotFile, NotDir):
                    break
                except Cancelled:
                    raise
                except EtcdError:                   # expires unless a later attempt succeeds
                    self._due_at = _clock() + min(0.5, self.ttl / 10)
        with self._lock:
            self._over = True
        return not self._stopped

    def _renew(self) -> None:
        """Give the file its ttl anew.  Raises CompareFailed or KeyNotFound if it is lost."""
        with self._alone():
            sent_at = _clock()
            timeout_s = max(0.1, min(CALL_TIMEOUT_S, self.ttl / 3, self._expires_at - sent_at))
            with Scope(timeout_s):
                self._index = self._swap_ours().modified_index
            with self._lock:                        # what was reported as lost stays lost
                if not self._over and _clock() < self._expires_at:
                    self._expires_at = sent_at + self.ttl * (1 - EXPIRY_MARGIN)
            self._due_at = sent_at + self.ttl / 3

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other renewals out, which would make the index wrong that this one compares."""
        if not self._renewing.acquire(timeout=CALL_TIMEOUT_S):
            raise RequestTimeout("another renewal is under way", endpoint="")
        try:
            yield
        finally:
            self._renewing.release()

    def _swap_ours(self) -> Result:
        """Renew the file; renewals whose answers were lost may have changed its index."""
        while True:
            try:
                return self._swap()
            except CompareFailed:
                node = self.client.get(self.key, quorum=True).node
                if node.value != self._value or node.modified_index == self._index:
                    raise                           # it is somebody else's
                self._index = node.modified_index

    def _swap(self, *, announce: bool = False) -> Result:
        """Renew on condition that nothing happened to the file since the index we know.

        Therefore a renewal that was given up for lost cannot take effect after a later one, and
        shorten what that has granted.
        """
        fields: Dict[str, _Field] = {
            "ttl": self.ttl, "prevValue": self._value or None, "prevIndex": self._index}
        if announce:
            return self.client._put(self.key, {**fields, "value": self._value})
        fields["refresh"] = True
        if not self._silent:
            try:                                    # etcd before 2.3 would empty the value
                return self.client._put(self.key, {**fields, "value": self._value or " "})
            except RefreshValue:
                self._silent = True
        return self.client._put(self.key, fields)


class Lease(Heartbeat):
    """A file that exists as long as this process keeps it: made by start, removed by stop.

        with Lease(client, "/hosts/a", "10.0.0.1", ttl=10) as lease:
            ...

    value    tells who made it: two leases of one key need different values; None: a uuid

    Guarantee: made once, even if answers are lost; start raises NodeExists while the key is
    somebody else's.  `is_held` as for Heartbeat.  A crash leaves the file for at most its ttl (and
    the half second that etcd takes to notice), and so does the end of the client.
    Limit: as for Heartbeat.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, value: Optional[str] = None,
                 ttl: int = LEASE_TTL_S, *, on_lost: _LostCallback = None) -> None:
        super().__init__(client, key, ttl, on_lost=on_lost)
        if value == "":
            raise ValueError("etcd cannot compare with an empty value")
        self._named = value is not None
        self._value = value or uuid.uuid4().hex

    def start(self: _HeartbeatType) -> _HeartbeatType:
        """Make the file and keep it.  Raises NodeExists, or that no server answers."""
        return super().start()

    def stop(self) -> bool:
        """Remove the file.  Return whether it was held until now.

        If no server answers within LEAVE_S, the file is left to its ttl.
        """
        return super().stop()

    # -- below: no public names

    _named = True                                   # the value is the user's

    def _after_fork(self) -> None:
        super()._after_fork()
        if not self._named:                         # by the same value the child would take the
            self._value = uuid.uuid4().hex          # parent's file for its own

    def _obtain(self) -> None:
        sent_at = _clock()
        self._index, fresh = self._make()
        if fresh and _clock() - sent_at < self.ttl / 3:
            self._granted_at(sent_at)
            return
        try:
            self._adopt()
        except (KeyNotFound, CompareFailed) as error:
            raise LockExpired("expired before it was known to be made", cause=self.key) from error

    def _make(self) -> Tuple[int, bool]:
        """Create the file; return its index, and whether its ttl was given just now."""
        node, fresh = _create_once(self.client, self.key, self._value, self.ttl)
        return node.modified_index, fresh

    def _leave(self) -> None:
        _remove(self.client, self.key, self._value)


class _Place(Lease):
    """A place in a line: an in-order file, whose number says who came first."""

    def __init__(self, client: Client, line: str, label: str, ttl: int) -> None:
        super().__init__(client, line, uuid.uuid4().hex + label, ttl)
        self.line = self.key
        self._sure = True                           # that there is no second entry of this place

    @property
    def number(self) -> int:
        """Place in the line: the index at which it was made."""
        return int(_name(self.key))

    def announce(self) -> None:
        """Renew the file so that its watchers see it; it is no harm if that fails."""
        with contextlib.suppress(EtcdError), self._alone():
            self._index = self._swap(announce=True).modified_index

    def _obtain(self) -> None:
        try:
            super()._obtain()
        except BaseException:                       # it may be in line all the same
            self._sure = False
            with _apart(TIDY_S):
                self._leave()
            raise

    def _find(self) -> Optional[Node]:
        found = [node for node in _entries(self.client, self.line)[0]
                 if node.value == self._value]
        return found[0] if found else None

    def _make(self) -> Tuple[int, bool]:
        node, self._sure = _append_once(
            self.client, self.line, self._value, self.ttl, self._find)
        self.key = node.key
        return node.modified_index, self._sure

    def _leave(self) -> None:
        if self.key != self.line:
            super()._leave()
        with contextlib.suppress(EtcdError):
            for node in () if self._sure else _entries(self.client, self.line)[0]:
                if node.value == self._value:
                    _remove(self.client, node.key, self._value)
