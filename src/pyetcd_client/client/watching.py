"""Watching: all changes of a key or a directory, in order."""

from __future__ import annotations

import contextvars
import enum
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Callable, ClassVar, cast

from ..transport.calls import _SUCCESS, _backoff_s, _Call, _Field, clean_key, is_endpoint_failure
from ..transport.connections import Scope, _Closeable, _Exchange, _start_thread
from ..transport.errors import (
    BadReply,
    Cancelled,
    ClusterIdChanged,
    EtcdError,
    EventIndexCleared,
    KeyNotFound,
    NotDir,
    RequestTimeout,
    WatcherCleared,
    WatchTimeout,
)
from ..transport.results import _T, EtcdResult, Node, _keep_reply, _parse_result, _Reply
from .verbs import _Keys, _keys_target

WATCH_POLL_S = 60.0             # a silent watch is sent again, in case a proxy has forgotten it
WATCH_PROBE_S = 5.0             # a silent watch probes whether the server is alive
WATCH_HEAD_S = 1.0              # wait for the head of a watch, then probe; doubled after failures
WATCH_SETTLE_S = 1.0            # silence after a head that proves an empty history
WATCH_LOOK_S = 0.2              # with timeout=0: wait for an event right after the head
HISTORY_EVENTS = 1000           # events that etcd remembers


class _Step(enum.Enum):
    """The next request of a watch."""

    LIST = "the nodes, as a starting point"
    RELIST = "the nodes by quorum: at least as new as the events so far"
    CHECK = "the index by quorum: did the store go back, or does this member lag behind?"
    POLL = "the next change"


class _WatchState:
    """The state machine of a watch, without network and clock.

    step      the next request
    index     the next change to ask for; None: from now on
    found     events to be returned
    reached   True after the first reply of any server
    doubtful  True if the last head shows an older store: restored, or of a member that lags behind

    Transitions, from LIST (with relist) or POLL on:

    LIST    listed -> POLL
    POLL    change -> POLL.  Index cleared (401) -> RELIST; without relist POLL from the newest
            index known to be quiet, or the error.  An older store, by index or term, followed by
            silence -> CHECK
    CHECK   older -> RELIST; without relist etcd's error for a lost history, 401.
            Otherwise -> the previous step
    RELIST  listed: the difference becomes events -> POLL

    quiet   (index, time): the store was at `index` and this watch had no event.  The watch moves
            up to it only before etcd would forget the watch's own index.
    """

    def __init__(self, path: str, *, recursive: bool, index: int | None, relist: bool) -> None:
        self.step = _Step.LIST if relist else _Step.POLL
        self.index = index
        self.found: deque[EtcdResult] = deque()
        self.reached = False
        self.doubtful = False
        self.quiet = (0, 0.0)
        self._path = path
        self._recursive = recursive
        self._relist = relist
        self._known: dict[str, Node] | None = None   # with relist: the nodes after all events
        self._newest = (0, 0)                       # highest index and term of the store
        self._other_term = False                    # the last head has an older one

    # -- replies to POLL

    def head(self, index: int, term: int, now_s: float) -> None:
        """Take index and term of the store when it accepted the watch."""
        self.reached = True
        self.doubtful = self._is_older(index, term)
        self._other_term = 0 < term < self._newest[1]
        if self.doubtful:
            return
        self._newest = max(index, self._newest[0]), max(term, self._newest[1])
        if self.index is None:                      # for another connection, if this one breaks
            self.index = index + 1
        self.quiet = index, now_s

    def is_doubtful(self) -> bool:
        """Return whether to check the store, which showed an older index, instead of waiting."""
        if self.doubtful:
            self.step = _Step.CHECK
        return self.doubtful

    def alive(self, index: int, term: int, now_s: float) -> bool:
        """Take index and term while the watch waits; return False if they must be checked."""
        self.reached = True
        if self._is_older(index, term):
            self.step = _Step.CHECK
            return False
        self.settle(now_s)
        if self.step is _Step.POLL and index:
            self.quiet = index, now_s
        return True

    def change(self, event: EtcdResult, asked: int | None) -> None:
        """Take the event for index `asked`.  Raises BadReply for an older one."""
        if asked is not None and event.modified_index < asked:
            raise BadReply(f"asked for index {asked} on, got {event.modified_index}")
        self.reached = True
        if self._other_term:                        # perhaps an event of another history
            self.step = _Step.CHECK
            return
        self.index = event.modified_index + 1
        if self._concerns(event.key):
            if self._known is not None:
                for key, node in _changes(self._known, event).items():
                    if node is None:
                        del self._known[key]
                    else:
                        self._known[key] = node
            self.found.append(event)

    def cleared(self, error: EventIndexCleared) -> None:
        """Continue after more changes than etcd remembers; raise `error` if some may be lost."""
        self.reached = True
        if self._relist:
            self.step = _Step.RELIST
        elif self.quiet[0] and self.quiet[0] >= (self.index or 0):
            self.index = self.quiet[0] + 1          # only other keys have changed
        else:
            raise error

    def settle(self, now_s: float) -> None:
        """Move up to the quiet index before etcd forgets the present one.

        An event from the history follows its head at once, and a server sends a later event before
        it tells its new index to another request.
        """
        index, told_at = self.quiet
        far = self.index is None or index - self.index >= HISTORY_EVENTS // 2
        if index and far and now_s - told_at >= WATCH_SETTLE_S:
            self.index = index + 1

    def is_busy(self, since: int) -> bool:
        """Return whether to keep the present request: etcd could forget its index meanwhile."""
        index = self.quiet[0]
        return index - since >= HISTORY_EVENTS // 2 or not (index or self.index)

    # -- replies to the other steps

    def listed(self, nodes: dict[str, Node], index: int, term: int) -> None:
        """Take a listing; the difference to the one before becomes events."""
        self.reached = True
        first = self.step is _Step.LIST
        if first and self._is_older(index, term):   # than the given index
            self.step = _Step.CHECK
            return
        if not first:
            self.found.extend(_difference(self._known or {}, nodes, self.index or 1, index))
        if not first or self.index is None:
            self.index = index + 1
        self._newest, self._known, self.step = (index, term), nodes, _Step.POLL

    def checked(self, index: int, term: int) -> None:
        """Take index and term by quorum.  Raises EventIndexCleared."""
        went_back = self._is_older(index, term)
        if self._relist:
            self.step = (_Step.RELIST if went_back else
                         _Step.LIST if self._known is None else _Step.POLL)
            return
        self.step = _Step.POLL
        if went_back:
            self._newest, self.quiet = (index, term), (0, 0.0)
            raise EventIndexCleared("the store went back, as if restored from a backup: read again",
                                    cause=self._path, index=index)

    def replaced(self) -> None:
        """Forget index and term of the store, which another cluster has replaced."""
        self._newest, self.quiet = (0, 0), (0, 0.0)
        if self._relist:
            self.step = _Step.RELIST

    def _is_older(self, index: int, term: int) -> bool:
        """Return whether a store is older than its newest state, or than the given index."""
        if not index and not term:                  # not in the reply
            return False
        newest = max(self._newest[0], (self.index or 1) - 1)
        return index < newest or 0 < term < self._newest[1]

    def _concerns(self, key: str) -> bool:
        """Return whether a change of `key` belongs to this watch.

        From their history etcd 2.3 and 3.4 return events that a waiting watch would not get: of
        hidden keys below a directory, and removals of directories with a common name prefix.
        """
        ours = self._path
        if key == ours or _is_below(ours, key):
            return True
        below = self._recursive and _is_below(key, ours)
        return below and "/_" not in key[len(ours.rstrip("/")):]


class Watch(_Closeable):
    """An endless iterator over the changes of a key; made by `client.watcher`.

    Each request asks for the first change after the last one, so that none is lost or repeated
    while a server restarts, the leader changes or an endpoint fails.  A stream of the server would
    not do: in etcd 2.3 and 3.4 it falls silent after an event from the history or behind a slow
    consumer, and some deletions appear twice.

    index    the first change to return; None: from the first `next` on
    relist   reaction to more than 1000 missed changes of any key (error 401), and to a store that
             went back, because a backup was restored or the cluster was created anew.
             True: list the key again and return the difference to the known nodes as events with
             `relisted` set: a "set" for each changed node (of directories, only those that are
             empty or have a ttl), in the order of their last changes, then a "delete" for the
             topmost of the removed nodes.  Earlier changes of a node do not appear.  The watch
             lists the key at the start (if recursive, to all depths) and keeps a copy in memory.
             False: raise EventIndexCleared; no listing.
    timeout  seconds for each `next`; None: no limit; 0: return events of the history, do not wait.
             Then WatchTimeout, after which `next` may be called again and misses nothing

    Another watch continues at an event's `modified_index` + 1.  If no endpoint replies at the start
    that error is raised; later the watch waits and retries.  Raises ClusterIdChanged when a server
    of another cluster replies; see there.

    A silent server is probed by reading a key that does not exist, on another connection: after
    WATCH_HEAD_S without a head, then every WATCH_PROBE_S.  A failed probe leads to the next
    endpoint.

    Limit: in a recursive watch from the history etcd 2.3 and 3.4 overlook changes of the watched
    directory itself (created, new ttl) unless they are the first; not its removal.

    Thread: one, except for `close`.
    """

    def __init__(self, client: _Keys, key: str, *, recursive: bool = False,
                 index: int | None = None, relist: bool = True,
                 timeout: float | None = None) -> None:
        self._client = client
        self._path = clean_key(key)
        self._recursive = recursive
        self._timeout = timeout
        self._state = _WatchState(                  # 0 is "now" too
            self._path, recursive=recursive, index=index or None, relist=relist)
        self._endpoint = ""                         # of the last request
        self._exchange: _Exchange                   # of the last request
        self._alive = False                         # that server replied to it, or to a probe
        self._asked_at = 0.0                        # time of the request; monotonic seconds
        self._until = math.inf                      # deadline of the present `next`
        self._patience_s = WATCH_POLL_S             # wait after a reply
        self._failures = 0                          # since the last reply
        self.error: EtcdError | None = None      # the present failure, if any
        self._life = Scope()                        # cancelled by `close`
        self._within = client.scope

    @property
    def index(self) -> int | None:
        """The index of the next change; None: from now on."""
        return self._state.index

    def __iter__(self) -> Watch:
        return self

    def __next__(self) -> EtcdResult:
        try:
            with Scope(self._timeout, self._life, self._within) as scope:
                while not self._state.found:
                    self._advance(scope)
                scope.left_s()                      # closed meanwhile: no more events
                return self._state.found.popleft()
        except Cancelled:
            if not self._life.cancelled:
                raise
            raise StopIteration from None

    def close(self) -> None:
        """End the iteration, also a waiting `next`, at once.  Thread: any."""
        self._life.cancel()

    cancel = close

    def _advance(self, scope: Scope) -> None:
        """Perform one step of the state.  Raises WatchTimeout, and errors that are final."""
        client, state = self._client, self._state
        state.settle(time.monotonic())
        if scope.left_s() <= 0:
            raise WatchTimeout("no change in time", index=state.index or 0,
                               endpoint=client.endpoints.current)
        try:
            client._discover_endpoints(min(scope.deadline, time.monotonic() + WATCH_POLL_S))
            self._endpoint = client.endpoints.current
            self._STEPS[state.step](self, scope)
        except EventIndexCleared as error:
            state.cleared(error)
        except ClusterIdChanged as error:
            self.error = error
            state.replaced()
            raise
        except RequestTimeout as error:
            if not self._alive:
                self._on_silence(error, scope)
            elif scope.once:
                scope.deadline = 0.0                # a head without an event
        except EtcdError as error:
            self._on_failure(error, scope)
        else:
            self._on_reply()
            self._failures = 0
            if state.step is _Step.CHECK:           # a member that lags behind may need a moment
                scope.wait(_backoff_s(1))

    def _poll(self, scope: Scope) -> None:
        asked = self._state.index
        query = {"wait": True, "recursive": self._recursive or None, "waitIndex": asked}
        event = self._send(query, scope, _parse_result, self._on_head)
        self._state.change(event, asked)

    def _list(self, scope: Scope) -> None:
        query = {"recursive": self._recursive or None,
                 "quorum": self._state.step is _Step.RELIST or None}
        try:
            top = self._send(query, scope, _parse_result)
        except (KeyNotFound, NotDir) as error:
            self._state.listed({}, error.index, 0)
            return
        nodes = (top.node, *top.node.walk()) if self._recursive else (top.node,)
        self._state.listed(
            {node.key: _childless(node) for node in nodes}, top.etcd_index, top.raft_term)

    def _check(self, scope: Scope) -> None:
        reply = self._send(
            {"quorum": True}, scope, _keep_reply, statuses=_ANY_STATUS, below=_PROBE_KEY)
        self._state.checked(*_index_and_term(reply))

    _STEPS: ClassVar[dict[_Step, Callable[[Watch, Scope], None]]] = {
        _Step.LIST: _list, _Step.RELIST: _list, _Step.CHECK: _check, _Step.POLL: _poll}

    def _send(self, query: Mapping[str, _Field], scope: Scope, parse: Callable[[_Reply], _T],
              on_head: Callable[[_Reply], None] | None = None, *,
              statuses: frozenset[int] = _SUCCESS, below: str = "") -> _T:
        client = self._client
        target = _keys_target(self._path + below, query, client.key_endpoint)
        call = _Call("GET", target, parse, on_head=on_head, statuses=statuses)
        self._alive, self._asked_at, self._until = False, time.monotonic(), scope.deadline
        self._patience_s = WATCH_LOOK_S if scope.once else WATCH_POLL_S
        self._exchange = _Exchange(min(self._until, self._asked_at + WATCH_POLL_S),
                                   self._head_s(), client.connect_timeout, self._keeps_waiting)
        return client._request(self._endpoint, call, self._exchange)

    def _rounds(self) -> int:
        """Return how many times all endpoints failed since the last reply."""
        return self._failures // max(1, len(self._client.endpoints.urls))

    def _head_s(self) -> float:
        return min(WATCH_HEAD_S * (1 << min(self._rounds(), 5)), WATCH_POLL_S)

    def _on_head(self, head: _Reply) -> None:
        self._client._check_cluster_id(self._endpoint, head)
        self._state.head(*_index_and_term(head), time.monotonic())
        self._on_reply()
        self._failures = 0

    def _on_reply(self) -> None:
        self._alive, self.error = True, None
        self._client._connectivity.report(True)
        self._exchange.deadline = min(self._until, time.monotonic() + self._patience_s)
        silence_s = WATCH_HEAD_S if self._state.doubtful else WATCH_PROBE_S
        self._exchange.silence_s = min(silence_s, WATCH_POLL_S)

    def _keeps_waiting(self) -> bool:
        """Return whether to continue waiting for a silent server, after a probe."""
        if self._alive and self._state.is_doubtful():
            return False
        client, before = self._client, self._state.quiet[0]
        target = _keys_target(self._path + _PROBE_KEY, {}, client.key_endpoint)
        call = _Call("GET", target, _keep_reply, statuses=_ANY_STATUS)
        wait_s = self._head_s()
        exchange = _Exchange(time.monotonic() + wait_s, wait_s, client.connect_timeout)
        self._alive = False
        try:
            reply = client._request(self._endpoint, call, exchange)
        except (Cancelled, ClusterIdChanged):
            raise
        except EtcdError:
            return False
        self._on_reply()
        return self._state.alive(*_index_and_term(reply), time.monotonic()) and (
            time.monotonic() - self._asked_at < WATCH_POLL_S or self._state.is_busy(before))

    def _on_silence(self, error: RequestTimeout, scope: Scope) -> None:
        """Handle a request without any reply, not even a head."""
        if scope.left_s() > 0:
            self._on_failure(error, scope)
        elif time.monotonic() - self._asked_at >= min(1.0, self._client.connect_timeout):
            self._client._leave_endpoint(self._endpoint)    # for the next `next`

    def _on_failure(self, error: EtcdError, scope: Scope) -> None:
        """Continue with the next endpoint, after a wait if all failed.  Raises a final error."""
        client, self.error = self._client, error
        error.endpoint = error.endpoint or self._endpoint
        if is_endpoint_failure(error):
            client._leave_endpoint(self._endpoint, error)
        elif not isinstance(error, WatcherCleared):     # after a 400 the same request follows
            raise error
        self._failures += 1
        rounds = self._rounds()
        if not rounds:
            return
        client._connectivity.report(False)
        if not self._state.reached and not (isinstance(error, RequestTimeout) and rounds < 3):
            raise error
        scope.wait(_backoff_s(rounds))


_PROBE_KEY = "/_pyetcd-client"                      # below the watched key; never exists
_ANY_STATUS: frozenset[int] = frozenset(range(200, 500))


def _index_and_term(reply: _Reply) -> tuple[int, int]:
    return reply.header_number("X-Etcd-Index"), reply.header_number("X-Raft-Term")


_REMOVALS: frozenset[str] = frozenset(("delete", "expire", "compareAndDelete"))


def _childless(node: Node) -> Node:
    """Return a node without children and JSON, to save memory."""
    return replace(node, nodes=(), raw={})


def _changes(known: Mapping[str, Node], event: EtcdResult) -> dict[str, Node | None]:
    """Return the nodes that an event changes, by key; None: it is removed."""
    if event.action not in _REMOVALS:
        return {event.key: _childless(event.node)}
    gone = known.get(event.key)
    if gone is not None and not gone.dir:
        return {event.key: None}
    # A directory, perhaps one above the watched one, is removed with all nodes in it.
    return dict.fromkeys(key for key in known if key == event.key or _is_below(key, event.key))


def _identity(node: Node | None) -> tuple[Any, ...]:
    """Return the properties that only a write changes; the remaining ttl is none of them."""
    return () if node is None else (node.value, node.dir, node.modified_index, node.created_index)


def _is_below(key: str, directory: str) -> bool:
    return key.startswith(directory if directory == "/" else directory + "/")


def _difference(known: Mapping[str, Node], found: Mapping[str, Node], since: int,
                index: int) -> Iterator[EtcdResult]:
    """Yield events that lead from the nodes `known` before `since` to those `found` at `index`.

    After a restore a node may differ although its index is lower than `since`.
    """
    # Directories that appear together with the first key in them have no event.
    parents = {key.rpartition("/")[0] or "/" for key in found if key != "/"}
    changed = [
        node for node in found.values() if (node.key not in parents or node.ttl is not None) and (
            node.modified_index >= since or _identity(node) != _identity(known.get(node.key)))]
    for node in sorted(changed, key=lambda node: (node.modified_index, node.key)):
        yield EtcdResult("set", node, known.get(node.key), etcd_index=index, relisted=True)
    topmost = ""
    for key in sorted(known.keys() - found.keys(), key=lambda key: key.split("/")):
        if topmost and _is_below(key, topmost):
            continue
        topmost, old = key, known[key]
        node = Node(key, dir=old.dir, modified_index=index, created_index=old.created_index)
        yield EtcdResult("delete", node, old, etcd_index=index, relisted=True)


# -- asyncio: each wait on a thread of its own, which ends when the task is cancelled


async def to_thread(function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
    """Call `function` on a thread and return its result; as asyncio.to_thread, but cancellable.

    Cancelling the task cancels a Scope around the call, and the task continues when the call has
    ended: within milliseconds, or at the end of a function that waits for other things.  Each call
    has its own thread, so that a hundred watches do not block another call.

        async with asyncio.timeout(5):
            await to_thread(client.get, "k", quorum=True)
            await to_thread(lock.acquire)
    """
    # Its import takes as long as all others together, and programs with tasks have it already.
    import asyncio

    scope, context = Scope(), contextvars.copy_context()

    def run() -> _T:
        with scope:
            return context.run(function, *args, **kwargs)

    done = asyncio.wrap_future(_start_thread("pyetcd-to-thread", run))
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        scope.cancel()
        await asyncio.wait([done])
        done.exception()                            # retrieved, or asyncio would report it
        raise


async def each(items: Iterable[_T]) -> AsyncIterator[_T]:
    """Iterate in asyncio over a watch, or any iterable that waits; close it at the end.

        async for event in each(client.watcher("/config", recursive=True)): ...
    """
    iterator, end = iter(items), object()
    try:
        while True:
            item = await to_thread(next, iterator, end)
            if item is end:
                return
            yield cast(_T, item)
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


class WatchedChange(EtcdResult):
    """The result of `Client.watch`; iterate over it for this change and all later ones."""

    def __init__(self, change: EtcdResult, later: Callable[[int], Watch]) -> None:
        self.__dict__.update(change.__dict__, _later=later)

    def __iter__(self) -> Iterator[EtcdResult]:
        yield self
        with self.__dict__["_later"](self.modified_index + 1) as later:
            yield from later

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, perhaps in another process, has no client to continue with.
        plain = {name: value for name, value in self.__dict__.items() if name != "_later"}
        return EtcdResult, (), plain


class _Watching(_Keys):
    def read(self, key: str, *, recursive: bool | None = None, wait: bool = False,
             waitIndex: int | None = None, sorted: bool | None = None, quorum: bool | None = None,
             timeout: float | None = None) -> EtcdResult:
        """Return the node at `key`, or with `wait` its next change, with python-etcd's options.

        waitIndex  the first change to return; None: the next one from now on
        timeout    seconds; 0: no limit, as in python-etcd; None: the client's read_timeout with
                   `wait`, else as in `get`.  Raises WatchTimeout
        """
        if not wait:
            return self.get(key, recursive=bool(recursive), sorted=bool(sorted),
                            quorum=bool(quorum), timeout=math.inf if timeout == 0 else timeout)
        limit = self.read_timeout if timeout is None else timeout
        return self.watch(key, waitIndex, limit or math.inf, recursive)

    def watch(self, key: str, index: int | None = None, timeout: float | None = None,
              recursive: bool | None = None) -> WatchedChange:
        """Return the next change of `key` (with `recursive`, also of what lies below).

        index    the first change to return, such as the last modified_index + 1; None: from now on
        timeout  seconds to wait; None: no limit; 0: return a change since `index`, do not wait.
                 Raises WatchTimeout

        Iterate over the result for this change and all later ones.  Raises EventIndexCleared if
        `index` is more than 1000 changes back.
        """
        if self._is_replaced():                     # the program's own method sends one request
            query = {"wait": True, "waitIndex": index, "recursive": bool(recursive) or None}
            change = self._keys_call("GET", key, query=query, timeout=timeout)
        else:
            with self.watcher(key, recursive=bool(recursive), index=index, timeout=timeout,
                              relist=False) as events:
                change = next(events)
        return WatchedChange(change, lambda later: self.watcher(
            key, recursive=bool(recursive), index=later))

    def watcher(self, key: str, *, recursive: bool = False, index: int | None = None,
                timeout: float | None = None, relist: bool = True) -> Watch:
        """Return an endless iterator over the changes of `key`; see Watch."""
        return Watch(self, key, recursive=recursive, index=index, relist=relist, timeout=timeout)

    def eternal_watch(self, key: str, index: int | None = None,
                      recursive: bool | None = None) -> Iterator[EtcdResult]:
        """Yield the changes of `key` without end; `watcher` returns a cancellable iterator."""
        while self._is_replaced():
            change = self.watch(key, index, math.inf, recursive)
            index = change.modified_index + 1
            yield change
        with self.watcher(key, recursive=bool(recursive), index=index) as events:
            yield from events
