"""Common parts of the recipes.

A write carries a uuid, so that a read tells whether it was applied.  A lease is counted from
before its request was sent, on a clock of this machine that runs on while the machine sleeps, and
less a margin.  A waiter watches one key, and reads again after every event, timeout and error, so
that a lost event costs only time.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Optional

from ..client.client import Client
from ..transport.calls import clean_key, is_endpoint_failure
from ..transport.connections import Scope, _call_back, _context
from ..transport.defaults import WAIT_MAX_S, _log
from ..transport.errors import (
    Cancelled,
    ConnectionFailed,
    EtcdError,
    EventIndexCleared,
    KeyNotFound,
    NodeExists,
    WatchTimeout,
)
from ..transport.results import _T, Node, Result

LEASE_TTL_S = 30
CREATE_TRIES = 5                # of a file that expires each time before it is read
CALL_TIMEOUT_S = 8.0            # of one request; above the 7 s after which etcd gives up on a write
OUTAGE_S = 30.0                 # how long a recipe retries while no server replies
WAIT_SLICE_S = 20.0             # a waiter reads again after this time without an event
TIDY_S = 0.5                    # for the cleanup after a call without success

_LostCallback = Optional[Callable[[], object]]


def _clock() -> float:
    """Return seconds that count on while the machine sleeps, if the system supports that."""
    clock_id = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock_id is None else time.clock_gettime(clock_id)


def _call_back_in_background(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of the program on a thread of a recipe; even SystemExit is only logged."""
    try:
        return _call_back(function, *args)
    except SystemExit:
        _log.error("%r raised SystemExit, which ends no process from this thread", function)
        return None


def _recipe_key(key: str) -> str:
    if "." in key.split("/") or ".." in key.split("/") or not key.strip("/"):
        raise ValueError(f"{key!r} names no key: it needs a part, and none that is . or ..")
    return clean_key(key)


def _checked_ttl(ttl: int) -> int:
    if ttl < 1:
        raise ValueError("ttl is seconds, at least 1")
    return ttl


# Objects that a forked child must reset, by identity.
_inherited: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def _reset_after_fork() -> None:
    """In a forked child: forget what the parent holds, and locks that no thread releases."""
    for recipe in list(_inherited.values()):
        recipe._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


# -- waiting


class _Wait(NamedTuple):
    """The event to wait for before the next read."""

    key: str
    since: int                                      # after this index
    below: Callable[[Result], bool] | None = None    # events below `key` of which this holds


class _CallScope(Scope):
    """The scope of one call of a recipe.

    The block ends without an exception, unless a write is in doubt, after `cancel` of the recipe
    and when the time ends during a read after the first one.  It raises Cancelled after a
    cancellation of an outer scope, and after `client.close`.

    quiet   False: the block always raises
    waited  True after the first read, which found a reason to wait
    """

    __slots__ = ("waited", "_quiet", "_siblings")

    def __init__(self, recipe: _Recipe, timeout: float | None, *, quiet: bool = True) -> None:
        super().__init__(timeout, recipe.client.scope)
        self.waited = False
        self._quiet = quiet
        self._siblings = recipe._scopes

    def __enter__(self) -> _CallScope:
        self._siblings[self] = None
        super().__enter__()
        return self

    def __exit__(  # type: ignore[override]
        self, _: object, error: BaseException | None, *__: object,
    ) -> bool:
        super().__exit__()
        self._siblings.pop(self, None)
        if not self._quiet or not isinstance(error, EtcdError) or error.maybe_applied:
            return False
        if isinstance(error, Cancelled):
            return not any(scope.cancelled for scope in self._within)
        return (self.waited and isinstance(error, ConnectionFailed)
                and not isinstance(error, WatchTimeout) and time.monotonic() >= self.deadline)

    def wait_s(self, longest_s: float = WAIT_MAX_S) -> float:
        """Return how long to wait for other clients; 0: no longer.  Raises Cancelled."""
        self.waited = True
        left_s = self.left_s(longest_s)
        return 0.0 if self.once else left_s

    def wait_for(self, changed: threading.Condition, condition: Callable[[], bool]) -> bool:
        """Wait until `condition` holds; `changed` is notified when it may.  Raises Cancelled."""
        def wake() -> None:
            with changed:
                changed.notify_all()
        self.attach(wake)
        try:
            with changed:
                changed.wait_for(lambda: self.cancelled or condition(), self.wait_s())
                self.left_s()
                return condition()
        finally:
            self.detach(wake)

    def wait_for_event(self, client: Client, wait: _Wait, longest_s: float) -> bool:
        """Wait, at most until an event; return whether there is time for another read."""
        wait_s, below = self.wait_s(longest_s), wait.below
        if not wait_s:
            return False
        try:
            with client.watcher(wait.key, recursive=below is not None, index=wait.since + 1,
                                timeout=wait_s, relist=False) as events:
                for event in events:
                    if below is None or below(event):
                        break
        except (WatchTimeout, EventIndexCleared):
            pass
        except EtcdError as error:
            if not is_endpoint_failure(error):
                raise
            with Scope(wait_s) as scope:
                scope.wait(0.2)                     # then the read tells whether the failure lasts
        return self.wait_s() > 0


class _Recipe:
    def __init__(self, client: Client, path: str = "") -> None:
        self.client = client
        self.path = path
        self._scopes: dict[_CallScope, None] = {}   # of the present calls
        _inherited[id(self)] = self

    def cancel(self) -> None:
        """End the waiting calls of this object as if their time was over.  Thread: any."""
        for scope in list(self._scopes):
            scope.cancel()

    def _call_scope(self, timeout: float | None) -> _CallScope:
        return _CallScope(self, timeout)

    def _poll(self, scope: _CallScope, read: Callable[[], tuple[_T | None, _Wait]],
              longest_s: float = WAIT_SLICE_S) -> _T | None:
        """Return the first result of `read` that is not None; None when the time is over.

        `read` runs again after the event that it names, and after `longest_s`.
        """
        while True:
            result, wait = read()
            if result is not None or not scope.wait_for_event(self.client, wait, longest_s):
                return result

    def _after_fork(self) -> None:
        self._scopes = {}


@contextlib.contextmanager
def _cleanup_scope() -> Iterator[None]:
    """Give a cleanup TIDY_S seconds of its own, even when the time of the call is over."""
    outer, _context.scope = _context.scope, None
    try:
        with Scope(TIDY_S):
            yield
    finally:
        _context.scope = outer


def _with_retries(client: Client, attempt: Callable[[], _T], patience_s: float | None = None, *,
                  idempotent: bool = True) -> _T:
    """Repeat a call while no server replies; `maybe_applied` of the error covers all attempts."""
    unsure, pause_s = False, 0.0
    with Scope(OUTAGE_S if patience_s is None else patience_s, client.scope) as scope:
        while True:
            try:
                if pause_s:
                    scope.wait(pause_s * random.uniform(0.5, 1.0))
                with Scope(CALL_TIMEOUT_S):
                    return attempt()
            except EtcdError as error:
                may_pass = is_endpoint_failure(error) and (idempotent or not error.maybe_applied)
                unsure = unsure or error.maybe_applied
                pause_s = min(2 * pause_s, 1.0) or 0.05
                if not may_pass or scope.cancelled or scope.left_s() <= pause_s:
                    answered = not may_pass and not isinstance(error, Cancelled)
                    error.maybe_applied = error.maybe_applied or (unsure and not answered)
                    raise


def retry(client: Client, function: Callable[[], _T], *, timeout: float | None = None,
          idempotent: bool = False) -> _T:
    """Call `function` until it returns, while no server replies; return its result.

        retry(client, lambda: client.set("/a", "1"), timeout=60, idempotent=True)

    timeout     seconds in all; None: OUTAGE_S; 0: call it once
    idempotent  repeat it even if its write may have been applied; else raise that error

    A reply of etcd, such as KeyNotFound, is raised at once.
    """
    return function() if timeout == 0 else _with_retries(
        client, function, timeout, idempotent=idempotent)


# -- reading


def _read(client: Client, key: str, *, recursive: bool = False) -> Result:
    return _with_retries(client, lambda: client.get(key, recursive=recursive, quorum=True))


def _children(client: Client, directory: str) -> tuple[list[Node], int]:
    """Return the children of a directory in the order of creation, and the index of the read."""
    try:
        found = _read(client, directory)
    except KeyNotFound as error:
        return [], error.index
    return sorted(found.nodes, key=lambda node: node.created_index), found.etcd_index


def _entries(client: Client, line: str) -> tuple[list[Node], int]:
    """Return the in-order files of a directory in their order, and the index of the read.

    Other files and directories are skipped: names of locks may contain slashes.
    """
    nodes, index = _children(client, line)
    return sorted(filter(_is_entry, nodes), key=_number), index


def _is_entry(node: Node) -> bool:
    """Return whether etcd chose the name of a file: the index of its creation.

    In etcd 2.3 the name has 20 digits.  In earlier versions it equals the created index, until an
    unconditional write renews the file, as by python-etcd.
    """
    name = _name(node.key)
    return not node.dir and name.isascii() and name.isdigit() and (
        len(name) == 20 or name == str(node.created_index))


def _number(node: Node) -> int:
    return int(_name(node.key))


def _name(key: str) -> str:
    return key.rpartition("/")[2]


# -- writing


def _create_once(client: Client, key: str, value: str, ttl: int | None) -> tuple[Node, bool]:
    """Create a file with a unique value.  Raises NodeExists for a file with another value.

    If an earlier attempt succeeded, the value shows it, and the second result is False.  A file
    that expires before it can be read is created again, at most CREATE_TRIES times in all.
    """
    tries = 0
    while True:
        try:
            return _with_retries(client, lambda: client.create(key, value, ttl=ttl)).node, True
        except NodeExists as exists:
            tries += 1
            try:
                node = _read(client, key).node
            except KeyNotFound:         # expired meanwhile
                if tries < CREATE_TRIES:
                    continue
                raise exists from None
            if node.value == value:
                return node, False
            raise


def _append_once(client: Client, directory: str, value: str, ttl: int | None,
                 find: Callable[[], Node | None]) -> tuple[Node, bool]:
    """Create an in-order file with a unique value.

    After an unknown fate `find` looks for the file; if it finds none the file is written again.
    If the first request arrives even later there are two; the second result is False then.
    """
    sure = True

    def attempt() -> Node:
        nonlocal sure
        found = None if sure else find()
        if found is not None:
            return found
        try:
            return client.append(directory, value, ttl=ttl).node
        except EtcdError as error:
            sure = sure and not error.maybe_applied
            raise
    return _with_retries(client, attempt), sure


def _remove(client: Client, key: str, value: str) -> None:
    """Delete a file with this value; if that fails, the file is left to its ttl."""
    with contextlib.suppress(EtcdError):
        _with_retries(client, lambda: client.compare_and_delete(key, prev_value=value))
