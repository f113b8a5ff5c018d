"""Watching: changes of a key or a directory, without a gap."""

from __future__ import annotations

import concurrent.futures
import contextvars
import enum
import math
import threading
import time
from collections import deque
from dataclasses import replace
from typing import (
    Any,
    AsyncIterator,
    Callable,
    ClassVar,
    Deque,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    Mapping,
    Optional,
    Tuple,
    cast,
)

from ..transport.calls import (
    _SUCCESS,
    _backoff_s,
    _Call,
    _Field,
    _keys_target,
    clean_key,
    is_endpoint_failure,
)
from ..transport.connections import Scope, _Exchange
from ..transport.defaults import (
    HISTORY_EVENTS,
    WATCH_HEAD_S,
    WATCH_LOOK_S,
    WATCH_POLL_S,
    WATCH_PROBE_S,
    WATCH_SETTLE_S,
)
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
from ..transport.results import _T, EtcdResult, Node, _parse_not, _parse_result, _Reply
from .verbs import _Keys


class _Step(enum.Enum):
    """What a watch asks next."""

    LIST = "what there is"
    RELIST = "what there is by quorum: at least as new as what was told"
    CHECK = "by quorum, whether the store went back, or only this member lags behind"
    POLL = "the next change"


class _WatchState:
    """What a watch knows, and what follows from each answer.  No network and no clock in here.

    step      what to ask next
    index     the next change to ask for; None: from now on
    found     events that are not told yet
    reached   whether a server ever answered
    doubtful  whether the last head shows an older store: restored, or of a member that lags behind

    How the steps follow each other, from LIST (with relist) or POLL on:

    LIST    listed -> POLL
    POLL    change -> POLL.  Index cleared (401) -> RELIST; without relist POLL from the newest
            index known to be quiet, or the error.  An older store, by index or term, and silence
            after that -> CHECK
    CHECK   older -> RELIST; without relist the error that etcd has for a lost history, 401.
            As new as it should be -> where we were
    RELIST  listed: the difference is found -> POLL

    quiet   (index, when): the store was at `index`, and nothing of ours had come.  The watch moves
            up to it only when etcd would forget where it stands.
    """

    def __init__(self, path: str, *, recursive: bool, index: Optional[int], relist: bool) -> None:
        self.step = _Step.LIST if relist else _Step.POLL
        self.index = index
        self.found: Deque[EtcdResult] = deque()
        self.reached = False
        self.doubtful = False
        self.quiet = (0, 0.0)
        self._path = path
        self._recursive = recursive
        self._relist = relist
        self._known: Optional[Dict[str, Node]] = None   # with relist: the nodes as told so far
        self._newest = (0, 0)                       # index and term of a store seen
        self._other_term = False                    # the last head has an older one

    # -- answers to POLL

    def head(self, index: int, term: int, now_s: float) -> None:
        """Note where the store was when it began to wait for us."""
        self.reached = True
        self.doubtful = self._is_older(index, term)
        self._other_term = 0 < term < self._newest[1]
        if self.doubtful:
            return
        self._newest = max(index, self._newest[0]), max(term, self._newest[1])
        if self.index is None:                      # in case the connection breaks now
            self.index = index + 1
        self.quiet = index, now_s

    def is_doubtful(self) -> bool:
        """Whether to check where the store is, rather than wait for it: it showed an older one."""
        if self.doubtful:
            self.step = _Step.CHECK
        return self.doubtful

    def alive(self, index: int, term: int, now_s: float) -> bool:
        """Note where the store is while it waits for us; return False if that must be checked."""
        self.reached = True
        if self._is_older(index, term):
            self.step = _Step.CHECK
            return False
        self.settle(now_s)
        if self.step is _Step.POLL and index:
            self.quiet = index, now_s
        return True

    def change(self, event: EtcdResult, asked: Optional[int]) -> None:
        """Take the change that came for index `asked`.  Raises BadReply for an older one."""
        if asked is not None and event.modified_index < asked:
            raise BadReply(f"asked for index {asked} on, got {event.modified_index}")
        self.reached = True
        if self._other_term:                        # perhaps of another history
            self.step = _Step.CHECK
            return
        self.index = event.modified_index + 1
        if self._concerns(event.key):
            if self._known is not None:
                self._keep(self._known, event)
            self.found.append(event)

    def cleared(self, error: EventIndexCleared) -> None:
        """Go on after more changes than etcd remembers.  Raises `error` if ours may be lost."""
        self.reached = True
        if self._relist:
            self.step = _Step.RELIST
        elif self.quiet[0] and self.quiet[0] >= (self.index or 0):
            self.index = self.quiet[0] + 1          # others changed much, and ours did not
        else:
            raise error

    def settle(self, now_s: float) -> None:
        """Move up, if etcd might forget the index.

        A change out of the history follows its head at once, and one that came later was sent
        before a server told its index to somebody else.
        """
        index, told_at = self.quiet
        far = self.index is None or index - self.index >= HISTORY_EVENTS // 2
        if index and far and now_s - told_at >= WATCH_SETTLE_S:
            self.index = index + 1

    def is_busy(self, since: int) -> bool:
        """Whether to leave a request as it is: etcd could forget where it stands meanwhile."""
        index = self.quiet[0]
        return index - since >= HISTORY_EVENTS // 2 or not (index or self.index)

    # -- answers to the others

    def listed(self, nodes: Dict[str, Node], index: int, term: int) -> None:
        """Take a listing; if there was one before, what differs is found."""
        self.reached = True
        first = self.step is _Step.LIST
        if first and self._is_older(index, term):   # than the index we were given
            self.step = _Step.CHECK
            return
        if not first:
            self.found.extend(_difference(self._known or {}, nodes, self.index or 1, index))
        if not first or self.index is None:
            self.index = index + 1
        self._newest, self._known, self.step = (index, term), nodes, _Step.POLL

    def checked(self, index: int, term: int) -> None:
        """Take what a quorum says.  Raises EventIndexCleared."""
        went_back = self._is_older(index, term)
        if self._relist:
            self.step = (_Step.RELIST if went_back else
                         _Step.LIST if self._known is None else _Step.POLL)
            return
        self.step = _Step.POLL
        if went_back:
            self._newest, self.quiet = (index, term), (0, 0.0)
            raise EventIndexCleared(
                "the store went back, as if restored from a backup: read again",
                cause=self._path, index=index)

    def replaced(self) -> None:
        """Note that another cluster answers: nothing of what was seen counts there."""
        self._newest, self.quiet = (0, 0), (0, 0.0)
        if self._relist:
            self.step = _Step.RELIST

    # -- below: what those above have in common

    def _is_older(self, index: int, term: int) -> bool:
        """Whether a store shows less than what was seen, or than the index we were given."""
        if not index and not term:                  # it does not say
            return False
        newest = max(self._newest[0], (self.index or 1) - 1)
        return index < newest or 0 < term < self._newest[1]

    def _concerns(self, key: str) -> bool:
        """Whether a change of `key` is one of ours.

        Out of its history etcd 2.3 and 3.4 hand out what a waiting watch would not be told: what
        is hidden below a directory, and removals of directories whose name begins like ours.
        """
        ours = self._path
        if key == ours or _is_below(ours, key):
            return True
        below = self._recursive and _is_below(key, ours)
        return below and "/_" not in key[len(ours.rstrip("/")):]

    @staticmethod
    def _keep(known: Dict[str, Node], event: EtcdResult) -> None:
        """Bring the copy of what is there up to date."""
        if event.action not in _REMOVALS:
            known[event.key] = _alone(event.node)
            return
        gone = known.pop(event.key, None)
        if gone is None or gone.dir:                # with all that was below
            for key in [key for key in known if _is_below(key, event.key)]:
                del known[key]


class Watch:
    """An endless iterator over the changes of a key; made by `client.watcher`.

    It asks for one change after the other, each from the index after the last, so that none is
    lost and none repeated while a server restarts, the leader changes or an endpoint fails.
    Server-side streams are not used: etcd 2.3 and 3.4 let one fall silent after an event from
    the history or when its consumer is slow, and report some deletions twice.

    index    the first change to consider; None: from the first `next` on
    relist   what to do when more than 1000 changes, of any key, went by unseen (error 401), or
             when the store went back: a backup was restored, or the cluster made anew.
             True: list the key again and yield the difference to what is known as events with
             `relisted` set: a "set" for each node that changed (of directories, only those that
             are empty or have a ttl), in the order of their last changes, then a "delete" for the
             topmost of what is gone.  Of several changes only the last is seen.  For this the
             watch lists the key at the start too (a directory to all depths if recursive), and
             holds a copy of it in memory.
             False: raise EventIndexCleared; nothing is listed.
    timeout  seconds each `next` may take, None: no limit; 0: take what is in the history, wait for
             nothing.  Then WatchTimeout, after which `next` may be called again and misses nothing

    An event's `modified_index` + 1 is the index to go on from in another watch.  If no endpoint
    answers at the start that error is raised; later the watch waits and tries again.  Raises
    ClusterIdChanged when a server of another cluster answers; see there.

    A server that says nothing is asked something else, a key that nobody has, on another
    connection: after WATCH_HEAD_S without the head of its answer, then every WATCH_PROBE_S.  If
    it does not answer that either, the next endpoint is asked.

    Limit: when etcd 2.3 or 3.4 looks into its history for a recursive watch, it overlooks changes
    of the watched directory itself (made, given another ttl) unless they come first in there.
    What lies below, and the removal of the directory, it always finds.

    Thread: one, except for `close`.
    """

    def __init__(
        self, client: _Keys, key: str, *, recursive: bool = False, index: Optional[int] = None,
        relist: bool = True, timeout: Optional[float] = None,
    ) -> None:
        self._client = client
        self._path = clean_key(key)
        self._recursive = recursive
        self._timeout = timeout
        self._state = _WatchState(                  # 0 is "now" too
            self._path, recursive=recursive, index=index or None, relist=relist)
        self._endpoint = ""                         # asked last
        self._exchange: Optional[_Exchange] = None  # the last one
        self._alive = False                         # whether that server answers us
        self._asked_at = 0.0                        # when; monotonic seconds
        self._until = math.inf                      # deadline of the `next` under way
        self._patience_s = WATCH_POLL_S             # after an answer
        self._failures = 0                          # since the last answer
        self.error: Optional[EtcdError] = None      # why nothing is followed now; None: it is
        self._life = Scope()                        # until `close`
        self._within = client.scope

    @property
    def index(self) -> Optional[int]:
        """The next change to consider; None: from now on."""
        return self._state.index

    def __iter__(self) -> Watch:
        return self

    def __next__(self) -> EtcdResult:
        try:
            with Scope(self._timeout, self._life, self._within) as scope:
                while not self._state.found:
                    self._look(scope)
                scope.left_s()                      # closed meanwhile: no more is told
                return self._state.found.popleft()
        except Cancelled:
            if not self._life.cancelled:
                raise
            raise StopIteration from None

    def close(self) -> None:
        """End the iteration, from any thread: a `next` that waits in another one ends at once."""
        self._life.cancel()

    cancel = close

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- below: the way to the servers

    def _look(self, scope: Scope) -> None:
        """Ask once and give the answer to the state.  Raises WatchTimeout, and what is final."""
        client, state = self._client, self._state
        state.settle(time.monotonic())
        if scope.left_s() <= 0:
            raise WatchTimeout("no change in time", index=state.index or 0,
                               endpoint=client.endpoints.current)
        try:
            client._discover_endpoints(min(scope.deadline, time.monotonic() + WATCH_POLL_S))
            self._endpoint = client.endpoints.current
            self._ASK[state.step](self, scope)
        except EventIndexCleared as error:
            state.cleared(error)
        except ClusterIdChanged:
            state.replaced()
            raise
        except RequestTimeout as error:
            if not self._alive:
                self._silent(error, scope)
            elif scope.once:
                scope.deadline = 0.0                # the head came, and no change behind it
        except EtcdError as error:
            self._fail(error, scope)
        else:
            self._answered()
            self._failures = 0
            if state.step is _Step.CHECK:           # whoever lags behind may need a moment
                scope.wait(_backoff_s(1))

    def _poll(self, scope: Scope) -> None:
        asked = self._state.index
        query = {"wait": True, "recursive": self._recursive or None, "waitIndex": asked}
        event = self._ask(query, scope, _parse_result, self._on_head)
        try:
            self._state.change(event, asked)
        except BadReply as error:
            error.endpoint = self._endpoint
            raise

    def _list(self, scope: Scope) -> None:
        query = {"recursive": self._recursive or None,
                 "quorum": self._state.step is _Step.RELIST or None}
        try:
            top = self._ask(query, scope, _parse_result)
        except (KeyNotFound, NotDir) as error:
            self._state.listed({}, error.index, 0)
            return
        nodes = (top.node, *top.node.walk()) if self._recursive else (top.node,)
        self._state.listed(
            {node.key: _alone(node) for node in nodes}, top.etcd_index, top.raft_term)

    def _check(self, scope: Scope) -> None:
        reply = self._ask({"quorum": True}, scope, _parse_not, statuses=_ANY_ANSWER, below=_NOBODYS)
        self._state.checked(*_store_in(reply))

    _ASK: ClassVar[Dict[_Step, Callable[[Watch, Scope], None]]] = {
        _Step.LIST: _list, _Step.RELIST: _list, _Step.CHECK: _check, _Step.POLL: _poll}

    def _ask(
        self, query: Mapping[str, _Field], scope: Scope, parse: Callable[[_Reply], _T],
        on_head: Optional[Callable[[_Reply], None]] = None, *,
        statuses: FrozenSet[int] = _SUCCESS, below: str = "",
    ) -> _T:
        """Send one request to the endpoint in use."""
        client = self._client
        target = _keys_target(self._path + below, query, client.key_endpoint)
        call = _Call("GET", target, parse, on_head=on_head, statuses=statuses)
        self._alive, self._asked_at, self._until = False, time.monotonic(), scope.deadline
        self._patience_s = WATCH_LOOK_S if scope.once else WATCH_POLL_S
        self._exchange = _Exchange(min(self._until, self._asked_at + WATCH_POLL_S),
                                   self._head_s(), client.connect_timeout, self._is_patient)
        return client._request(self._endpoint, call, self._exchange)

    def _rounds(self) -> int:
        """Return how often all endpoints failed."""
        return self._failures // max(1, len(self._client.endpoints.urls))

    def _head_s(self) -> float:
        return min(WATCH_HEAD_S * (1 << min(self._rounds(), 5)), WATCH_POLL_S)

    def _on_head(self, head: _Reply) -> None:
        self._client._expect_cluster(self._endpoint, head)
        self._state.head(*_store_in(head), time.monotonic())
        self._answered()
        self._failures = 0

    def _answered(self) -> None:
        """Note that the server is there, and give it time."""
        self._alive, self.error = True, None
        self._client._connectivity.report(True)
        if self._exchange is not None:
            self._exchange.deadline = min(self._until, time.monotonic() + self._patience_s)
            silence_s = WATCH_HEAD_S if self._state.doubtful else WATCH_PROBE_S
            self._exchange.silence_s = min(silence_s, WATCH_POLL_S)

    def _is_patient(self) -> bool:
        """Whether to wait on for a server that said nothing for a while."""
        if self._alive and self._state.is_doubtful():
            return False
        return self._see()

    def _see(self) -> bool:
        """Ask a silent server something else; return whether to wait on for this answer."""
        client, before = self._client, self._state.quiet[0]
        target = _keys_target(self._path + _NOBODYS, {}, client.key_endpoint)
        call = _Call("GET", target, _parse_not, statuses=_ANY_ANSWER)
        wait_s = self._head_s()
        exchange = _Exchange(time.monotonic() + wait_s, wait_s, client.connect_timeout)
        self._alive = False
        try:
            reply = client._request(self._endpoint, call, exchange)
        except (Cancelled, ClusterIdChanged):
            raise
        except EtcdError:
            return False
        self._answered()
        return self._state.alive(*_store_in(reply), time.monotonic()) and (
            time.monotonic() - self._asked_at < WATCH_POLL_S or self._state.is_busy(before))

    def _silent(self, error: RequestTimeout, scope: Scope) -> None:
        """Note that nothing came, not even a head."""
        if scope.left_s() > 0:
            self._fail(error, scope)
        elif time.monotonic() - self._asked_at >= min(1.0, self._client.connect_timeout):
            self._client._give_up(self._endpoint)   # for the next `next`

    def _fail(self, error: EtcdError, scope: Scope) -> None:
        """Go on with the next endpoint, after a wait if all failed; raise `error` if it is final.

        When etcd clears its watchers (400) the same question may be asked again.
        """
        client = self._client
        if is_endpoint_failure(error):
            client._give_up(self._endpoint, error)
        elif not isinstance(error, WatcherCleared):
            raise error
        self.error = error
        self._failures += 1
        rounds = self._rounds()
        if not rounds:
            return
        client._connectivity.report(False)
        if not self._state.reached and not (isinstance(error, RequestTimeout) and rounds < 3):
            raise error
        scope.wait(_backoff_s(rounds))


_NOBODYS = "/_pyetcd-client"                        # below the key, and never there
_ANY_ANSWER: FrozenSet[int] = frozenset(range(200, 500))


def _store_in(reply: _Reply) -> Tuple[int, int]:
    """Return index and term of the store that answered; 0 if it does not say."""
    return reply.header_number("X-Etcd-Index"), reply.header_number("X-Raft-Term")


_REMOVALS: FrozenSet[str] = frozenset(("delete", "expire", "compareAndDelete"))


def _alone(node: Node) -> Node:
    """Return a node without children and JSON: less to remember."""
    return replace(node, nodes=(), raw={})


def _identity(node: Optional[Node]) -> Tuple[Any, ...]:
    """Return what is the same as long as nobody writes a node: not the time that is left to it."""
    return () if node is None else (
        node.value, node.dir, node.modified_index, node.created_index)


def _is_below(key: str, directory: str) -> bool:
    return key.startswith(directory if directory == "/" else directory + "/")


def _difference(
    known: Mapping[str, Node], found: Mapping[str, Node], since: int, index: int,
) -> Iterator[EtcdResult]:
    """Yield events that lead from the nodes `known` before `since` to those `found` at `index`.

    After a store was restored a node may differ though its index is lower than `since`.
    """
    # Nobody is told of directories that come with the first key in them.
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
    """Call `function` on a thread, and return what it returns; as asyncio.to_thread, but:

    When the task is cancelled, so is a Scope around the call: it ends within milliseconds, and the
    task goes on after that, so that nothing runs behind its back.  A function that waits for
    something else is waited for.  There are as many threads as calls: a hundred watches do not
    keep another call waiting.

        async with asyncio.timeout(5):
            await to_thread(client.get, "k", quorum=True)
            await to_thread(lock.acquire)
    """
    # Not above: it takes as long to import as all the rest, and who needs it has it already.
    import asyncio

    scope, context = Scope(), contextvars.copy_context()
    outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def run() -> None:
        try:
            with scope:
                outcome.set_result(context.run(function, *args, **kwargs))
        except BaseException as error:              # the task's, whatever it is
            outcome.set_exception(error)

    threading.Thread(target=run, name="pyetcd-to-thread", daemon=True).start()
    done = asyncio.wrap_future(outcome)
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        scope.cancel()
        await asyncio.wait([done])
        done.exception()                            # asked for, lest asyncio reports it
        raise


async def each(items: Iterable[_T]) -> AsyncIterator[_T]:
    """Iterate over a watch, or whatever waits between its items, in asyncio; closes it at the end.

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
    """The change that `Client.watch` returned; to iterate over it is to go on watching.

    The first item is this change; later ones follow for ever, see Watch.
    """

    def __init__(self, change: EtcdResult, later: Callable[[int], Watch]) -> None:
        self.__dict__.update(change.__dict__, _later=later)

    def __iter__(self) -> Iterator[EtcdResult]:
        yield self
        with self.__dict__["_later"](self.modified_index + 1) as later:
            yield from later

    def __reduce__(self) -> Tuple[Any, ...]:
        # A copy, in another process perhaps, has no client to go on with.
        plain = {name: value for name, value in self.__dict__.items() if name != "_later"}
        return EtcdResult, (), plain


class _Watching(_Keys):
    """The verbs that wait for changes."""

    def read(
        self, key: str, *, recursive: Optional[bool] = None, wait: bool = False,
        waitIndex: Optional[int] = None, sorted: Optional[bool] = None,
        quorum: Optional[bool] = None, timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Return the node at `key`, or with `wait` its next change, by python-etcd's options.

        waitIndex  the first change to consider; None: the next one from now on
        timeout    seconds for this call, 0: no end, as for python-etcd.  With `wait`: None is the
                   client's read_timeout; then WatchTimeout.  Without: None is as for `get`
        """
        if not wait:
            return self.get(key, recursive=bool(recursive), sorted=bool(sorted),
                            quorum=bool(quorum), timeout=math.inf if timeout == 0 else timeout)
        limit = self.read_timeout if timeout is None else timeout
        return self.watch(key, waitIndex, limit or math.inf, recursive)

    def watch(
        self, key: str, index: Optional[int] = None, timeout: Optional[float] = None,
        recursive: Optional[bool] = None,
    ) -> WatchedChange:
        """Return the next change of `key` (with `recursive`, also of what lies below).

        index    the first change to consider: modified_index + 1 of the last one seen; None: now
        timeout  seconds to wait for a change; None: for ever; 0: look for one since `index`, and do
                 not wait.  Raises WatchTimeout.

        Iterate over what is returned to get this change and all later ones.

        Raises EventIndexCleared if `index` is more than 1000 changes back.
        """
        if self._is_replaced():                     # the program's own sends one request
            query = {"wait": True, "waitIndex": index, "recursive": bool(recursive) or None}
            change = self._keys_call("GET", key, query=query, timeout=timeout)
        else:
            with self.watcher(key, recursive=bool(recursive), index=index, timeout=timeout,
                              relist=False) as events:
                change = next(events)
        return WatchedChange(change, lambda later: self.watcher(
            key, recursive=bool(recursive), index=later))

    def watcher(
        self, key: str, *, recursive: bool = False, index: Optional[int] = None,
        timeout: Optional[float] = None, relist: bool = True,
    ) -> Watch:
        """Return an endless iterator over the changes of `key`; see Watch."""
        return Watch(self, key, recursive=recursive, index=index, relist=relist, timeout=timeout)

    def eternal_watch(
        self, key: str, index: Optional[int] = None, recursive: Optional[bool] = None,
    ) -> Iterator[EtcdResult]:
        """Yield the changes of `key` for ever; `watcher` gives one that can be cancelled."""
        while self._is_replaced():
            change = self.watch(key, index, math.inf, recursive)
            index = change.modified_index + 1
            yield change
        with self.watcher(key, recursive=bool(recursive), index=index) as events:
            yield from events
