"""Copies of directories, and callbacks for each change."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any, Callable, Generic, Optional, TypeVar

from ..client.client import Client
from ..client.watching import Watch, _changes, _childless, _identity
from ..transport.calls import clean_key
from ..transport.connections import Scope, _Closeable
from ..transport.defaults import _log
from ..transport.errors import Cancelled, EtcdError, KeyNotFound, NotDir
from ..transport.results import _T, Node, Result
from .basics import _call_back_in_background, _children, _name, _read, _Recipe, _Wait
from .elections import Observed, _is_change

_ChangeCallback = Optional[Callable[[str, Optional[Node], Optional[Node]], object]]


class CachedTree(_Recipe, Mapping[str, Node]):
    """A live copy of a directory: a mapping from the keys of its files to their nodes.

        with CachedTree(client, "/config") as tree:
            tree["/config/db"].value
            index = client.set("/config/db", "new").modified_index
            tree.wait_for(index)                    # now the copy has the change
            dict(tree)                              # a consistent state: tree.snapshot()

    on_change  called with key, old node and new node (None: missing) for each file that changes
               after the start, in order, on the thread of the tree

    Guarantee: the copy is the directory at `index`, to all depths.  It only moves forward, and
    catches up after every loss of contact: after more than 1000 missed changes, or the restore of
    a backup, it reads the directory again and reports the difference.  `items`, `keys` and
    `values` are consistent states.
    Limit: it is as late as the network, and does not show that without contact (`error` does).
    It has no hidden files and no empty directories; ttl and expiration are those of the last
    change, since a refresh has no event.  After `close` the copy remains; `start` continues, with
    the difference.  In a forked child it raises RuntimeError until `start`.

    Thread: any.  It runs a daemon thread until `close` or the end of the client.
    """

    _thread: threading.Thread | None
    _watch: Watch | None
    _scope: Scope

    def __init__(self, client: Client, path: str, *, on_change: _ChangeCallback = None) -> None:
        super().__init__(client, clean_key(path))
        self._on_change = on_change
        self._nodes: dict[str, Node] = {}
        self._index = 0
        self._error: EtcdError | None = None     # the end of the client
        self._pid = os.getpid()
        self._after_fork()

    @property
    def index(self) -> int:
        """The etcd index of the copy."""
        return self._index

    @property
    def error(self) -> EtcdError | None:
        """The failure that keeps the copy from following the directory at the moment, if any."""
        watch = self._watch
        return self._error or (None if watch is None else watch.error)

    def start(self) -> CachedTree:
        """Read and follow the directory, if not yet done.  Raises EtcdError without a server."""
        with self._control:
            if self._thread is not None and self._thread.is_alive() and not self._scope.cancelled:
                return self
            client_scope = self.client.scope
            watch = self._watch = self._read_directory()
            self._pid, self._error, self._scope = os.getpid(), None, Scope(None, client_scope)
            self._thread = threading.Thread(target=self._run, args=(watch, client_scope),
                                            name=f"pyetcd-tree {self.path}", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Stop following; the copy remains."""
        self._scope.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def snapshot(self) -> dict[str, Node]:
        """Return the copy in its present state."""
        self._check_process()
        with self._changed:
            return dict(self._nodes)

    def wait_for(self, index: int, timeout: float | None = None) -> bool:
        """Wait until the copy has the change with `index`, of a file in it; False if it is late.

        timeout  seconds; None: no limit; 0: do not wait.  No wait if the directory is not followed
        """
        self._check_process()
        with self._call_scope(timeout) as scope:
            scope.wait_for(self._changed, lambda: self._index >= index or self._scope.cancelled)
        return self._index >= index

    def items(self) -> ItemsView[str, Node]:
        """Return keys and nodes of a consistent state."""
        return self.snapshot().items()

    def keys(self) -> KeysView[str]:
        """Return the keys of a consistent state."""
        return self.snapshot().keys()

    def values(self) -> ValuesView[Node]:
        """Return the nodes of a consistent state."""
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

    def _after_fork(self) -> None:
        super()._after_fork()
        self._control = threading.Lock()            # one `start` at a time
        self._changed = threading.Condition()       # guards _nodes and _index
        self._scope = Scope()                       # of the thread: cancelled by `close`
        self._thread = self._watch = None

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise RuntimeError(f"nobody follows {self.path} in this process: start() it here")

    def _read_directory(self) -> Watch:
        """Copy the directory, and return a watch that continues from there."""
        watch = self.client.watcher(self.path, recursive=True)
        nodes: dict[str, Node] = {}
        index = term = 0
        try:
            found = _read(self.client, self.path, recursive=True)
            nodes = {node.key: _childless(node) for node in (found.node, *found.node.walk())}
            index, term = found.etcd_index, found.raft_term
        except (KeyNotFound, NotDir) as error:
            index = error.index
        watch._state.listed(nodes, index, term)
        files = {key: node for key, node in nodes.items() if not node.dir}
        keys = sorted(self._nodes.keys() | files.keys())
        self._update({key: files.get(key) for key in keys}, index, report=self._index > 0)
        return watch

    def _run(self, watch: Watch, client_scope: Scope) -> None:
        try:
            with self._scope as scope:
                while True:
                    self._apply_events(watch)
                    scope.wait(0.5)
        except Cancelled as error:                  # by `close` or `client.close`
            if client_scope.cancelled:
                self._error = error
        with self._changed:
            self._changed.notify_all()

    def _apply_events(self, watch: Watch) -> None:
        with contextlib.suppress(EtcdError):        # see Watch.error; the watch can be continued
            for event in watch:
                self._apply(watch, event)

    def _apply(self, watch: Watch, event: Result) -> None:
        changes = {key: None if node is None or node.dir else node  # a directory may replace a file
                   for key, node in _changes(self._nodes, event).items()}
        index = max(self._index, event.modified_index)
        if event.relisted:                          # the index changes, back perhaps, with the last
            index = self._index if watch._state.found else event.etcd_index
        self._update(changes, index, report=True)

    def _update(self, changes: Mapping[str, Node | None], index: int, *, report: bool) -> None:
        """Replace nodes (None: remove), and report the differences to `on_change`."""
        differences: list[tuple[str, Node | None, Node | None]] = []
        with self._changed:
            for key, node in changes.items():
                old = self._nodes.get(key)
                if _identity(old) == _identity(node):
                    continue
                differences.append((key, old, node))
                if node is None:
                    del self._nodes[key]
                else:
                    self._nodes[key] = node
            self._index = index
            self._changed.notify_all()
        if self._on_change is not None and report:
            for difference in differences:
                _call_back_in_background(self._on_change, *difference)


_Called = TypeVar("_Called", bound=Callable[..., Any])
_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Follower(_Closeable, Generic[_T, _Called]):
    """Calls a function with the present state, and after each change; also a decorator.

    The first call is on the calling thread, later ones on a daemon thread, until the function
    returns False, or `close`, or the end of the client.
    """

    def __init__(self, client: Client, key: str, function: _Called | None = None) -> None:
        self.client = client
        self.path = clean_key(key)
        self._observed = Observed(client, self._read_state)
        self._thread: threading.Thread | None = None
        if function is not None:
            self(function)

    def __call__(self, function: _Function) -> _Function:
        """Start calling `function`.  Raises EtcdError without a server."""
        if self._thread is not None:
            raise ValueError("it calls a function already: make another object")
        if self._call_function(function, next(self._observed)):
            self._thread = threading.Thread(
                target=self._run, args=(function,), name=f"pyetcd-watch {self.path}", daemon=True)
            self._thread.start()
        return function

    def close(self) -> None:
        """Stop calling the function."""
        self._observed.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _read_state(self) -> tuple[_T, _Wait]:
        raise NotImplementedError

    def _call_function(self, function: Callable[..., Any], state: _T) -> bool:
        return _call_back_in_background(function, state) is not False

    def _run(self, function: Callable[..., Any]) -> None:
        with contextlib.suppress(Cancelled, StopIteration), Scope(None, self.client.scope) as scope:
            wanted = True
            while wanted:
                try:
                    wanted = self._call_function(function, next(self._observed))
                except Cancelled:
                    raise
                except EtcdError as error:          # retried until a server replies
                    _log.warning("%s cannot be watched: %s", self.path, error)
                    scope.wait(1.0)


class ChildrenWatch(_Follower[list[str], Callable[[list[str]], object]]):
    """Calls a function with the sorted names in a directory, now and after each change.

        @ChildrenWatch(client, "/workers")
        def changed(names): ...                     # return False to end it

    Limit: it reads after each change; of changes in quick succession the last one counts.

    Thread: any.  `close` ends it; exceptions of the function are logged.
    """

    def _read_state(self) -> tuple[list[str], _Wait]:
        nodes, index = _children(self.client, self.path)
        return sorted(_name(node.key) for node in nodes), _Wait(self.path, index, _is_change)


class DataWatch(_Follower[Optional[Node], Callable[[Optional[str], Optional[Node]], object]]):
    """Calls a function with value and node of a file, now and after each change.

        @DataWatch(client, "/config/db")
        def changed(value, node): ...               # None, None: there is no such file

    Limit and thread: as for ChildrenWatch.
    """

    def _read_state(self) -> tuple[Node | None, _Wait]:
        try:
            found = _read(self.client, self.path)
        except KeyNotFound as error:
            return None, _Wait(self.path, error.index)
        return (None if found.dir else _childless(found.node), _Wait(self.path, found.etcd_index))

    def _call_function(self, function: Callable[..., Any], state: Node | None) -> bool:
        return _call_back_in_background(function, state and state.value, state) is not False
