"""Copies of directories, and calls for each change."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import (
    Any,
    Callable,
    Dict,
    Generic,
    ItemsView,
    Iterator,
    KeysView,
    List,
    Mapping,
    Optional,
    Tuple,
    TypeVar,
    ValuesView,
)

from ..client.client import Client
from ..client.watching import _REMOVALS, Watch, _alone, _identity, _is_below
from ..transport.calls import clean_key
from ..transport.connections import Scope
from ..transport.defaults import _log
from ..transport.errors import Cancelled, EtcdError, KeyNotFound, NotDir
from ..transport.results import _T, Node, Result
from .basics import _children, _name, _read, _Recipe, _tell
from .elections import Observed, _is_change, _Wait

_ChangeCallback = Optional[Callable[[str, Optional[Node], Optional[Node]], object]]


class CachedTree(_Recipe, Mapping[str, Node]):
    """A live copy of a directory: a mapping from the keys of its files to their nodes.

        with CachedTree(client, "/config") as tree:
            tree["/config/db"].value
            index = client.set("/config/db", "new").modified_index
            tree.wait_for(index)                    # now the copy has it
            dict(tree)                              # all of it at one moment: tree.snapshot()

    on_change  called with key, old node and new node (None: there is none) for each file that
               changes after the start, in order, on the thread of the tree

    Guarantee: the copy is the directory as it was at `index`, at all depths; it goes forward
    only, and catches up after every loss of contact: after more than 1000 missed changes, or when
    a backup was restored, by reading it anew and reporting the difference.  `items`, `keys` and
    `values` are of one moment.
    Limit: it is late by as much as the network is, and silent about it while there is no contact
    (`error` tells).  Hidden files are not in it, nor empty directories; ttl and expiration are
    those of the last change, since refreshing is silent.  After `close` the copy stays as it is;
    `start` goes on, with the difference.  In a forked child it raises RuntimeError until `start`.

    Thread: any.  It runs a daemon thread, which `close` joins and the end of the client ends.
    """

    _thread: Optional[threading.Thread]
    _watching: Optional[Watch]
    _scope: Scope

    def __init__(self, client: Client, path: str, *, on_change: _ChangeCallback = None) -> None:
        super().__init__(client)
        self.path = clean_key(path)
        self._on_change = on_change
        self._nodes: Dict[str, Node] = {}
        self._index = 0
        self._error: Optional[EtcdError] = None     # of a watch that ended
        self._pid = os.getpid()
        self._after_fork()

    @property
    def index(self) -> int:
        """The etcd index the copy is of."""
        return self._index

    @property
    def error(self) -> Optional[EtcdError]:
        """Why the copy is not followed at the moment; None: it is."""
        watching = self._watching
        return self._error or (None if watching is None else watching.error)

    def start(self) -> CachedTree:
        """Read the directory, and follow it from now on.  Raises that no server answers.

        A tree that is followed stays as it is.  After `close` it is followed again.
        """
        with self._control:
            if self._thread is not None and self._thread.is_alive() and not self._scope.cancelled:
                return self
            within = self.client.scope
            events = self._watch(tell=self._index > 0)
            self._pid, self._scope = os.getpid(), Scope(None, within)
            self._thread = threading.Thread(
                target=self._run, args=(events, within), name=f"pyetcd-tree {self.path}",
                daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Stop following; the copy stays as it is."""
        self._scope.cancel()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def snapshot(self) -> Dict[str, Node]:
        """Return the copy as it is now."""
        self._check_process()
        with self._changed:
            return dict(self._nodes)

    def wait_for(self, index: int, timeout: Optional[float] = None) -> bool:
        """Wait until the copy has the change with `index`, of a file in it; False if it is late.

        timeout  seconds; None: for ever; 0: look, and do not wait

        False at once if nobody follows the directory any more.
        """
        self._check_process()
        with self._span(timeout) as span:
            span.wait_for(self._changed, lambda: self._index >= index or self._scope.cancelled)
        return self._index >= index

    def items(self) -> ItemsView[str, Node]:
        """Return keys and nodes as they are now."""
        return self.snapshot().items()

    def keys(self) -> KeysView[str]:
        """Return the keys as they are now."""
        return self.snapshot().keys()

    def values(self) -> ValuesView[Node]:
        """Return the nodes as they are now."""
        return self.snapshot().values()

    def __getitem__(self, key: str) -> Node:
        self._check_process()
        with self._changed:
            return self._nodes[clean_key(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.snapshot())

    def __len__(self) -> int:
        self._check_process()
        return len(self._nodes)

    def __enter__(self) -> CachedTree:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- below: no public names

    def _after_fork(self) -> None:
        super()._after_fork()
        self._control = threading.Lock()            # of threads that start it, one does
        self._changed = threading.Condition()       # guards _nodes and _index
        self._scope = Scope()                       # of the thread: cancelled by `close`
        self._thread = self._watching = None

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise RuntimeError(f"nobody follows {self.path} in this process: start() it here")

    def _run(self, events: Watch, client_scope: Scope) -> None:
        try:
            with self._scope as scope:
                while True:
                    events = self._follow(events, scope)
        except Cancelled as error:                  # by `close`, or the client was closed
            if client_scope.cancelled:
                self._error = error
        with self._changed:
            self._changed.notify_all()

    def _follow(self, events: Watch, scope: Scope) -> Watch:
        """Apply what happens; return another watch when this one has ended.  Raises Cancelled."""
        try:
            for event in events:
                self._error = None
                self._apply(event)
        except Cancelled:
            raise
        except EtcdError as error:
            self._error = error
        scope.wait(0.5)
        try:
            return self._watch(tell=True)
        except Cancelled:
            raise
        except EtcdError as error:
            self._error = error
            return events

    def _watch(self, tell: bool) -> Watch:
        """Make the copy what the directory is now, and return the changes from there on."""
        watch = self.client.watcher(self.path, recursive=True)
        known: Dict[str, Node] = {}
        index = term = 0
        try:
            found = _read(self.client, self.path, recursive=True)
            nodes = (found.node, *found.node.walk())
            known = {node.key: _alone(node) for node in nodes}
            index, term = found.etcd_index, found.raft_term
        except (KeyNotFound, NotDir) as error:
            index = error.index
        watch._state.listed(dict(known), index, term)
        fresh = {key: node for key, node in known.items() if not node.dir}
        keys = sorted(set(self._nodes) | set(fresh))
        self._change({key: fresh.get(key) for key in keys}, index, tell=tell)
        self._watching, self._error = watch, None
        return watch

    def _apply(self, event: Result) -> None:
        """Make the copy what the event made of the directory."""
        key, changes = event.key, {}
        if event.action in _REMOVALS:
            # With a directory go all files in it, and this may be one above the tree.
            keys = [key] if key in self._nodes else [
                other for other in self._nodes if _is_below(other, key)]
            changes = dict.fromkeys(keys)
        elif event.node.dir:
            changes = {key: None}                   # perhaps it took the place of a file
        elif self._covers(key):
            changes = {key: _alone(event.node)}
        index = max(self._index, event.modified_index)
        if event.relisted:                          # the index may go back, with the last of them
            more = self._watching is not None and self._watching._state.found
            index = self._index if more else event.etcd_index
        self._change(changes, index, tell=True)

    def _covers(self, key: str) -> bool:
        ours = key == self.path or _is_below(key, self.path)
        return ours and "/_" not in key[len(self.path.rstrip("/")):]

    def _change(self, changes: Mapping[str, Optional[Node]], index: int, *, tell: bool) -> None:
        """Put in the new nodes (None: remove), and tell what has changed."""
        told: List[Tuple[str, Optional[Node], Optional[Node]]] = []
        with self._changed:
            for key, node in changes.items():
                old = self._nodes.get(key)
                if _identity(old) == _identity(node):
                    continue
                told.append((key, old, node))
                if node is None:
                    del self._nodes[key]
                else:
                    self._nodes[key] = node
            self._index = index
            self._changed.notify_all()
        if self._on_change is not None and tell:
            for change in told:
                _tell(self._on_change, *change)


_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Follower(Generic[_T]):
    """Calls a function with what there is, now and whenever it changes; a decorator, too.

    The function is called on the calling thread at first, then on a daemon thread, until it
    returns False, `close` is called, or the client is closed.
    """

    def __init__(self, client: Client, key: str, function: Optional[Callable[..., Any]]) -> None:
        self.client = client
        self.path = clean_key(key)
        self._observed = Observed(client, self._look)
        self._thread: Optional[threading.Thread] = None
        if function is not None:
            self(function)

    def __call__(self, function: _Function) -> _Function:
        """Begin to call `function`; raises that no server answers."""
        if self._thread is not None:
            raise ValueError("it calls a function already: make another object")
        if self._call(function, next(self._observed)):
            self._thread = threading.Thread(
                target=self._run, args=(function,), name=f"pyetcd-watch {self.path}", daemon=True)
            self._thread.start()
        return function

    def close(self) -> None:
        """Call the function no more."""
        self._observed.close()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def __enter__(self: _FollowerType) -> _FollowerType:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- below: no public names

    def _look(self) -> Tuple[_T, _Wait]:
        raise NotImplementedError

    def _call(self, function: Callable[..., Any], state: _T) -> bool:
        return _tell(function, state) is not False

    def _run(self, function: Callable[..., Any]) -> None:
        with contextlib.suppress(Cancelled, StopIteration), Scope(None, self.client.scope) as scope:
            while self._call(function, self._next(scope)):
                pass

    def _next(self, scope: Scope) -> _T:
        """Return what there is when it has changed.  Raises StopIteration, Cancelled."""
        while True:
            try:
                return next(self._observed)
            except Cancelled:
                raise
            except EtcdError as error:              # goes on when a server answers
                _log.warning("%s cannot be watched: %s", self.path, error)
                scope.wait(1.0)


_FollowerType = TypeVar("_FollowerType", bound=_Follower[Any])


class ChildrenWatch(_Follower[List[str]]):
    """Calls a function with the names in a directory, in order; now and whenever they change.

        @ChildrenWatch(client, "/workers")
        def changed(names): ...                     # return False to end it

    Limit: it looks after each change, so that of changes in quick succession the last one counts.

    Thread: any.  `close` ends it; what the function raises is logged.
    """

    def __init__(self, client: Client, key: str,
                 function: Optional[Callable[[List[str]], object]] = None) -> None:
        super().__init__(client, key, function)

    # -- below: no public names

    def _look(self) -> Tuple[List[str], _Wait]:
        nodes, index = _children(self.client, self.path)
        return sorted(_name(node.key) for node in nodes), (self.path, index, _is_change)


class DataWatch(_Follower[Optional[Node]]):
    """Calls a function with value and node of a file; now and whenever it changes.

        @DataWatch(client, "/config/db")
        def changed(value, node): ...               # None, None: there is no such file

    Limit and thread: as for ChildrenWatch.
    """

    def __init__(self, client: Client, key: str,
                 function: Optional[Callable[[Optional[str], Optional[Node]], object]] = None,
                 ) -> None:
        super().__init__(client, key, function)

    # -- below: no public names

    def _look(self) -> Tuple[Optional[Node], _Wait]:
        try:
            found = _read(self.client, self.path)
            return None if found.dir else _alone(found.node), (self.path, found.etcd_index, None)
        except KeyNotFound as error:
            return None, (self.path, error.index, None)

    def _call(self, function: Callable[..., Any], state: Optional[Node]) -> bool:
        return _tell(function, state and state.value, state) is not False
