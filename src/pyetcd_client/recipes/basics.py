"""What every recipe rests on.

A write whose fate is unknown carries a uuid, so that a look tells whether it is in.  A lease is
counted from before the request that granted it was sent, on a clock of this machine that runs on
while the machine sleeps, and less a margin.  A waiter watches one key, and looks anew after every
event, timeout and error, so that a lost event costs time only.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
import weakref
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from ..client.client import Client
from ..client.watching import _REMOVALS
from ..transport.calls import clean_key, is_endpoint_failure
from ..transport.connections import Scope, _call_back, _here
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
EXPIRY_MARGIN = 0.1             # share of a ttl after which a lease counts as over before its time
CALL_TIMEOUT_S = 8.0            # of one request; above the 7 s after which etcd gives up on a write
OUTAGE_S = 30.0                 # how long a recipe waits for a cluster that does not answer
WAIT_SLICE_S = 20.0             # a waiter looks again after so long, even if nothing happened
TIDY_S = 0.5                    # for taking back what a call leaves that ended without success
LEAVE_S = 2.0                   # for removing the file of a lease that is stopped

_LostCallback = Optional[Callable[[], object]]


def _clock() -> float:
    """Return seconds that count on while the machine sleeps, where the system can tell."""
    clock_id = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock_id is None else time.clock_gettime(clock_id)


def _tell(function: Callable[..., Any], *args: Any) -> Any:
    """Call back what a user gave us, on a thread of ours, which survives even SystemExit."""
    try:
        return _call_back(function, *args)
    except SystemExit:
        _log.error("%r raised SystemExit, which ends no process from this thread", function)
        return None


def _recipe_key(key: str) -> str:
    """Return the clean `key`.  Raises ValueError if it names no place below the root."""
    if "." in key.split("/") or ".." in key.split("/") or not key.strip("/"):
        raise ValueError(f"{key!r} names no key: it needs a part, and none that is . or ..")
    return clean_key(key)


def _checked_ttl(ttl: int) -> int:
    if ttl < 1:
        raise ValueError("ttl is seconds, at least 1")
    return ttl


# What a forked child must make new, by identity.
_inherited: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def _leave_to_parent() -> None:
    """In a forked child: give up what the parent holds, and locks that nobody will release."""
    for recipe in list(_inherited.values()):
        recipe._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


class _Span(Scope):
    """The scope of one call of a recipe."""

    __slots__ = ("looked",)

    def __init__(self, client: Client, timeout: Optional[float]) -> None:
        super().__init__(timeout, client.scope)
        self.looked = False                         # a server said that there is reason to wait

    def wait_s(self, longest_s: float = WAIT_MAX_S) -> float:
        """Return how long to wait for others now; 0: the time is over.  Raises Cancelled."""
        self.looked = True
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


class _Recipe:
    """A recipe whose calls wait: `cancel` ends those under way."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._spans: Dict[_Span, None] = {}         # of the calls under way
        _inherited[id(self)] = self

    def cancel(self) -> None:
        """End the calls of this object that wait now, as if their time was over.  Thread: any."""
        for span in list(self._spans):
            span.cancel()

    def _span(self, timeout: Optional[float]) -> _Turn:
        return _Turn(self, timeout)

    def _after_fork(self) -> None:
        self._spans = {}


class _Turn:
    """A block in which a recipe waits.  After `cancel` it just ends, unless a write is in doubt.

    So it does if the time ends in the middle of a look that is not the first one.  If somebody
    else ended it (a scope around the call, or the client was closed) it raises Cancelled.
    """

    def __init__(self, recipe: _Recipe, timeout: Optional[float]) -> None:
        self._outer = (recipe.client.scope, _here.scope)
        self._spans = recipe._spans
        self._span = _Span(recipe.client, timeout)

    def __enter__(self) -> _Span:
        self._spans[self._span] = None
        self._span.__enter__()
        return self._span

    def __exit__(self, _: object, error: Optional[BaseException], *__: object) -> bool:
        self._span.__exit__()
        self._spans.pop(self._span, None)
        if not isinstance(error, EtcdError) or error.maybe_applied:
            return False
        if isinstance(error, Cancelled):
            return not any(scope is not None and scope.cancelled for scope in self._outer)
        return (self._span.looked and isinstance(error, ConnectionFailed)
                and not isinstance(error, WatchTimeout)
                and time.monotonic() >= self._span.deadline)


@contextlib.contextmanager
def _apart(timeout_s: float) -> Iterator[None]:
    """Give what has to be tidied up a time of its own, even when that of the call is over."""
    outer, _here.scope = _here.scope, None
    try:
        with Scope(timeout_s):
            yield
    finally:
        _here.scope = outer


def _insist(client: Client, attempt: Callable[[], _T], patience_s: Optional[float] = None) -> _T:
    """Repeat what may be repeated while no server can answer; then raise what the last one said.

    Whether a write may have been applied is said of all attempts together.
    """
    unsure, pause_s = False, 0.0
    with Scope(OUTAGE_S if patience_s is None else patience_s, client.scope) as scope:
        while True:
            try:
                if pause_s:
                    scope.wait(pause_s * random.uniform(0.5, 1.0))
                with Scope(CALL_TIMEOUT_S):
                    return attempt()
            except EtcdError as error:
                may_pass = is_endpoint_failure(error)
                unsure = unsure or error.maybe_applied
                pause_s = min(2 * pause_s, 1.0) or 0.05
                if not may_pass or scope.cancelled or scope.left_s() <= pause_s:
                    answered = not may_pass and not isinstance(error, Cancelled)
                    error.maybe_applied = error.maybe_applied or (unsure and not answered)
                    raise


def retry(client: Client, function: Callable[[], _T], *, timeout: Optional[float] = None,
          idempotent: bool = False) -> _T:
    """Call `function` until it returns, while no server can answer; return its result.

        retry(client, lambda: client.set("/a", "1"), timeout=60, idempotent=True)

    timeout     seconds in all; None: OUTAGE_S; 0: call it once
    idempotent  call it again even if its write may have been applied; else that error is raised

    An answer of etcd, such as KeyNotFound, is raised at once.
    """
    def attempt() -> _T:
        try:
            return function()
        except EtcdError as error:
            if error.maybe_applied and not idempotent:
                raise _InDoubt(error) from error
            raise
    try:
        return attempt() if timeout == 0 else _insist(client, attempt, timeout)
    except _InDoubt as doubt:
        raise doubt.error from doubt.error.__cause__


class _InDoubt(Exception):
    """Carries an error past those who would try again."""

    def __init__(self, error: EtcdError) -> None:
        super().__init__(error)
        self.error = error


def _read(client: Client, key: str, *, recursive: bool = False) -> Result:
    """Return what a quorum knows of `key`."""
    return _insist(client, lambda: client.get(key, recursive=recursive, quorum=True))


def _children(client: Client, directory: str) -> Tuple[List[Node], int]:
    """Return the children of a directory in the order of creation, and the index they are of."""
    try:
        found = _read(client, directory)
    except KeyNotFound as error:
        return [], error.index
    return sorted(found.nodes, key=lambda node: node.created_index), found.etcd_index


def _entries(client: Client, line: str) -> Tuple[List[Node], int]:
    """Return the in-order files of a directory, first come first, and the index they are of.

    Other files and directories in it, such as the lines of locks whose names begin with the name
    of this one, are nobody's place in the line.
    """
    nodes, index = _children(client, line)
    return sorted(filter(_is_entry, nodes), key=_number), index


def _is_entry(node: Node) -> bool:
    """Whether etcd chose the name of a file: the index at which it was made.

    etcd 2.3 fills it up to 20 digits; in earlier ones it equals the created index, until somebody
    renews the file by an unconditional write, as python-etcd does.
    """
    name = _name(node.key)
    return not node.dir and name.isascii() and name.isdigit() and (
        len(name) == 20 or name == str(node.created_index))


def _number(node: Node) -> int:
    return int(_name(node.key))


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _create_once(client: Client, key: str, value: str, ttl: Optional[int]) -> Tuple[Node, bool]:
    """Create a file whose value nobody else writes there; raise NodeExists if another did.

    Repeating a creation is harmless: if an earlier attempt is in, the value says so, and the
    second result is False.  A file that expires between creation and reading is created again.
    """
    while True:
        try:
            return _insist(client, lambda: client.create(key, value, ttl=ttl)).node, True
        except NodeExists:
            with contextlib.suppress(KeyNotFound):      # gone since: it can be created
                node = _read(client, key).node
                if node.value == value:
                    return node, False
                raise


def _append_once(
    client: Client, directory: str, value: str, ttl: Optional[int],
    find: Callable[[], Optional[Node]],
) -> Tuple[Node, bool]:
    """Create an in-order file with a value that nobody else writes.

    After an unknown fate `find` looks for it, and it is written again if that finds nothing.
    Should the first one arrive even later there are two; the second result is False then.
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
    return _insist(client, attempt), sure


def _remove(client: Client, key: str, value: str) -> None:
    """Delete a file if it has `value`; what cannot be deleted now is left to its ttl."""
    with contextlib.suppress(EtcdError):
        _insist(client, lambda: client.compare_and_delete(key, prev_value=value))


def _is_removal(event: Result) -> bool:
    return event.action in _REMOVALS


def _await(
    client: Client, span: _Span, key: str, index: int, longest_s: float,
    below: Optional[Callable[[Result], bool]] = None,
) -> bool:
    """Wait for a change of `key` after `index`; return whether there is time for another look.

    below  wait for a change below `key` instead of which this holds

    May return early: a waiter looks again.
    """
    wait_s = span.wait_s(longest_s)
    if not wait_s:
        return False
    try:
        with client.watcher(key, recursive=below is not None, index=index + 1, timeout=wait_s,
                            relist=False) as events:
            for event in events:
                if below is None or below(event):
                    break
    except (WatchTimeout, EventIndexCleared):
        pass
    except EtcdError as error:
        if not is_endpoint_failure(error):
            raise
        with Scope(wait_s) as scope:
            scope.wait(0.2)                         # then the look tells whether that lasts
    return span.wait_s() > 0
