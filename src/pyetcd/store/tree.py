"""The store: the operations on the key tree; the caller passes the time."""

from __future__ import annotations

import copy
import json
import operator
import re
from typing import Any, Callable, Dict, Generator, List, NamedTuple, Optional, Sequence, Tuple

from ..base.basics import _nothing
from ..base.codec import Buffer
from ..base.errors import (
    CompareFailed,
    DirNotEmpty,
    EtcdError,
    EventIndexCleared,
    InvariantError,
    KeyNotFound,
    NodeExists,
    NotDir,
    NotFile,
    RootReadOnly,
)
from ..base.limits import EXPIRED_KEYS_MAX, HISTORY_EVENTS_MAX, NS
from ..base.text import Value, as_unicode, in_pieces, json_string, load_json, parse_time
from .events import (
    _PERMANENT,
    LONG_VALUE_CHARS,
    Directory,
    Event,
    LongNode,
    Node,
    _node_json,
    _node_texts,
    file_node,
    node_chars,
    stored_value,
    value_excerpt,
)
from .nodes import NodeTree
from .walks import Listing, SnapshotWalk, parent_path
from .watchers import EventHistory, StoreStats, TtlHeap, Watcher, WatcherHub

EXPIRES_NS_MIN = 946_684_800 * NS   # 2000-01-01; an earlier instant is permanent for set and create
SNAPSHOT_PROGRESS_NODES = 20_000    # read between two reports of progress
EXPIRED_KEY_NODES = 8               # removed nodes that take as long as one event of an expired key
SNAPSHOT_BLOCK_BYTES = 1 << 15      # of a snapshot's JSON, decoded at once: 0.3 ms
_READ_ONLY = frozenset(("/", "/0", "/1"))
_PERMANENT_BYTES = _PERMANENT.encode()


def _number(members: Dict[str, Any], name: str) -> int:
    """Return members[name], 0 if missing.  Raises ValueError if it is no int >= 0."""
    value = members.get(name, 0)
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is not a number: {value!r}")
    return value


_STRING = rb'"([^"\\]*(?:\\.[^"\\]*)*)"'
_SNAPSHOT_NODE = re.compile(
    rb'[}},]*(?:%b:)?{"Path":%b,"CreatedIndex":([0-9]+),"ModifiedIndex":([0-9]+),'
    rb'"ExpireTime":%b,(?:"(?!Value")\w+":%b,)*"Value":%b,'
    rb'"Children":(?:null\}|(\{))' % ((_STRING,) * 5)
)
_FILE_END = b'"Children":null}'
_FILE_FIELDS = operator.itemgetter(
    "Path", "Value", "CreatedIndex", "ModifiedIndex", "ExpireTime", "Children"
)
_raw_decode = json.JSONDecoder().raw_decode


def _unquote(string: bytes) -> str:
    text = string.decode("utf-8", "replace")
    return as_unicode(load_json(f'"{text}"')) if "\\" in text else text


def _read_tree(data: Buffer, progress: Callable[[float, int], None]) -> Tuple[Dict[str, Node], int]:
    """Return the nodes of a snapshot by path, and the end of their JSON in `data`.

    Reads directories one by one, as Go writes their members in one order, instead of the nested
    objects: keys may be deeper than json.loads goes, and its 100,000 dicts would take four times
    the memory of the nodes.  A quote inside a string is escaped, so no string looks like a node.
    """
    nodes: Dict[str, Node] = {}
    end, plain_from, reported = len('{"Root":'), 0, 0
    match = _SNAPSHOT_NODE.match(data, end)
    while match is not None:
        end = match.end()
        _, key, created, modified, expires, _, value, children = match.groups()
        path, created_index = _unquote(key), int(created)
        modified_index = created_index if modified == created else int(modified)    # share the int
        expires_ns = 0 if expires == _PERMANENT_BYTES else parse_time(_unquote(expires))
        if children is None:
            nodes[path] = file_node(_unquote(value), created_index, modified_index, expires_ns)
        else:
            nodes[path] = Directory(created_index, modified_index, expires_ns, {})
        siblings = nodes[parent_path(path)].children
        if siblings is None:
            raise ValueError(f"{path} is in a file")
        if path != "/":
            siblings[path] = None
        while children is None and end >= plain_from and bytes(data[end:end + 1]) == b",":
            size, tried = _read_files(data, end, parent_path(path), nodes, siblings)
            end += size
            if not size:
                plain_from = end + tried    # until there node by node
        if len(nodes) >= reported + SNAPSHOT_PROGRESS_NODES:
            reported = len(nodes)
            progress(end / len(data), reported)
        match = _SNAPSHOT_NODE.match(data, end)
    return nodes, end


def _read_files(
    data: Buffer, start: int, parent: str, nodes: Dict[str, Node], siblings: Dict[str, None]
) -> Tuple[int, int]:
    """Read a block of files of one directory, from the comma before the first on.

    Returns how many bytes were read, and tried.  Reads nothing of a block with a directory in it,
    or of another form.  The C code of json is quicker than the expression.
    """
    block = bytes(data[start + 1:start + SNAPSHOT_BLOCK_BYTES])
    tried = block.rfind(_FILE_END) + len(_FILE_END)
    try:
        text = block[:tried].decode()
        files, end = _raw_decode("{" + text + "}")
        rows = map(_FILE_FIELDS, files.values())
        paths, values, created, modified, expires, children = zip(*rows)
        if (
            set(children) != {None} or set(map(type, paths + values)) != {str}
            or {path[:path.rfind("/")] for path in paths} != {parent.rstrip("/")}
            or set(map(type, created + modified)) != {int} or min(created + modified) < 0
        ):
            return 0, tried
        if not text.isascii() or "\\" in text:      # perhaps with half of a surrogate pair
            paths, values = tuple(map(as_unicode, paths)), tuple(map(as_unicode, values))
        found = [
            file_node(value, c, c if c == m else m, 0 if e == _PERMANENT else parse_time(e))
            for value, c, m, e in zip(values, created, modified, expires)
        ]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0, tried
    nodes.update(zip(paths, found))
    siblings.update(dict.fromkeys(paths))
    whole = end == len(text) + 2
    return 1 + (tried if whole else len(text[:end - 2].encode())), tried


def _read_event(members: Dict[str, Any]) -> Event:
    """Make an Event of its snapshot form; the seconds left are those it was written with."""
    shown, before = members["node"], members.get("prevNode")
    action, key = members["action"], shown["key"]
    if not (isinstance(action, str) and isinstance(key, str)):
        raise ValueError(f"not an event: {members!r}")
    node, prev = _read_event_node(shown), None if before is None else _read_event_node(before)
    event = Event(action, key, node, prev, node.modified_index, 0, "refresh" in members)
    event.ttl_s = int(shown.get("ttl", 0))
    event.prev_ttl_s = 0 if before is None else int(before.get("ttl", 0))
    return event


def _read_event_node(members: Dict[str, Any]) -> Node:
    created, modified = _number(members, "createdIndex"), _number(members, "modifiedIndex")
    expires_ns = parse_time(members["expiration"]) if "expiration" in members else 0
    if members.get("dir"):
        return Directory(created, modified, expires_ns, {})
    value = members.get("value")
    if isinstance(value, str):
        return file_node(value, created, modified, expires_ns)
    if value is not None:
        raise ValueError(f"not a value: {value!r}")
    return Node(None, created, modified, expires_ns)


class StoreState(NamedTuple):
    """A decoded and checked snapshot, which a store installs in no time."""

    nodes: Dict[str, Node]
    ttl: TtlHeap
    current_index: int
    stats: Dict[str, int]
    events: List[Event]                 # the history, oldest first
    back: int                           # of the history's ring
    capacity: int
    chars: int                          # as NodeTree has them

    @classmethod
    def read(
        cls, data: Buffer, progress: Callable[[float, int], None] = lambda share, nodes: None
    ) -> StoreState:
        """Decode a snapshot's data.  Raises ValueError if it is not of a store."""
        try:
            nodes, end = _read_tree(data, progress)
            text = bytes(data[end:]).decode("utf-8", "replace")
            slots, rest = _read_slots(text)
            state = load_json("{" + rest.lstrip("}")[1:])
            counters = state.get("Stats") or {}
            history = (state.get("WatcherHub") or {}).get("EventHistory") or {}
            queue = history.get("Queue") or {}
            slots = slots or [m and _read_event(m) for m in queue.get("Events") or ()]
            front = _number(queue, "Front")
            ring = slots[front:] + slots[:front]        # oldest first, then the unused
            if nodes["/0"].children is None or nodes["/1"].children is None:
                raise ValueError("/0 and /1 must be directories")
            ttl, chars = TtlHeap(), -len("/" + "/0" + "/1")
            for path, node in nodes.items():
                chars += len(path) + node_chars(node)
                if node.expires_ns:
                    ttl.set(path, node.expires_ns)
            return cls(
                nodes, ttl, _number(state, "CurrentIndex"),
                {name: _number(counters, name) for name in counters},
                [event for event in ring if event is not None],
                _number(queue, "Back"), _number(queue, "Capacity"), chars,
            )
        except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"not a snapshot of a store: {error!r}") from None

    @property
    def version(self) -> str:
        node = self.nodes.get("/0/version")
        return (node.value if node is not None else None) or ""


_SLOTS = '"Events":['
_SLOT_END = re.compile(r"\s*([,\]])")


def _read_slots(text: str) -> Tuple[List[Optional[Event]], str]:
    """Return the slots of the history's ring, and the rest of the text."""
    slots: List[Optional[Event]] = []
    first = text.find(_SLOTS) + len(_SLOTS)
    if first < len(_SLOTS) or text.startswith("]", first):
        return slots, text
    decoder, at, comma = json.JSONDecoder(), first, ","
    # One by one: json.loads of 1,000 events of 100 KB would stop every thread for 0.5 s.
    while comma == ",":
        members, at = decoder.raw_decode(text, at)
        slots.append(None if members is None else _read_event(members))
        match = _SLOT_END.match(text, at)
        if match is None:
            raise ValueError("the history of events has no end")
        comma, at = match.group(1), match.end()
    return slots, text[:first] + text[at - 1:]


class Store(NodeTree):
    """The key tree, its watchers and counters.

    now_ns      unix nanoseconds, to show the rest of a ttl
    expires_ns  unix nanoseconds; 0: permanent
    current_index  number of changes so far; every change makes one event

    Errors are EtcdError subclasses whose cause is without the namespace.
    Thread: reactor.  Source: etcd 2.3 store/store.go; "etcd 2.3 API: keys".
    """

    def __init__(self, *, history_capacity: int = HISTORY_EVENTS_MAX) -> None:
        super().__init__()
        self.current_index = 0
        self.stats = StoreStats()
        self.hub = WatcherHub(EventHistory(history_capacity), self.stats)
        self.recursive_gets = {"success": 0, "fail": 0}     # part of the gets in stats

    def get(self, path: str, *, recursive: bool = False, now_ns: int) -> Event:
        """Return a get event, without the children of a directory.  Raises KeyNotFound, NotDir."""
        encoded = self.file_json(path, recursive=recursive, now_ns=now_ns) or None
        node = self._nodes[path]
        return Event("get", path, node, None, self.current_index, now_ns, encoded=encoded)

    def file_json(self, path: str, *, recursive: bool = False, now_ns: int) -> Sequence[bytes]:
        """Return the answer to the GET of a file, in pieces; () for a directory: see listing().

        A hot path.  recursive is only counted.  Raises KeyNotFound, NotDir.
        """
        node = self._nodes.get(path)
        if self._detached and path.startswith(self._detached):
            node = None
        if recursive:
            self.recursive_gets["fail" if node is None else "success"] += 1
        if node is None:
            raise self._count_failure("gets", self._not_found(path))
        self.stats.gets_success += 1
        if node.children is not None:
            return ()
        key, ttl_s = json_string(path[2:]), node.ttl_s(now_ns)
        if isinstance(node, LongNode):
            return in_pieces(('{"action":"get","node":', *_node_texts(key, node, ttl_s), "}\n"))
        return (f'{{"action":"get","node":{_node_json(key, node, ttl_s)}}}\n'.encode(),)

    def listing(
        self, path: str, *, recursive: bool = False, sorted: bool = False, now_ns: int
    ) -> Listing:
        """Begin the answer to the GET of a directory, as of now; its work() makes it in slices.

        Not counted.  Raises KeyNotFound, NotDir, also for a file.
        """
        node = self._reachable(path)
        if node is None:
            raise self._not_found(path)
        if node.children is None:
            raise NotDir(path[2:], self.current_index)
        return Listing(
            self._nodes, self._walks, path, recursive=recursive, sorted=sorted,
            index=self.current_index, now_ns=now_ns,
        )

    def value(self, path: str) -> Optional[str]:
        """Return the value of a file, or None; not counted."""
        node = self._reachable(path)
        return None if node is None else node.value

    def children(self, path: str) -> List[Tuple[str, bool]]:
        """Return (name, is directory) of each child, hidden ones too."""
        node = self._reachable(path)
        if node is None or not node.children:
            return []
        return [
            (child[child.rfind("/") + 1:], self._nodes[child].children is not None)
            for child in node.children
        ]

    def watch(
        self, path: str, *, recursive: bool = False, stream: bool = False, since: int = 0,
        deliver: Callable[[Event], None], lost: Callable[[], None] = _nothing,
    ) -> Watcher:
        """Call deliver(event) for the first event on `path` with index >= since; stream: for each.

        since  0: from the next change on
        lost   called at the end of the watch if a snapshot skips events for it

        Events of the history are delivered before this returns.  Raises EventIndexCleared.
        Source: etcd 2.3 store/watcher_hub.go, watch.
        """
        first = self.hub.history.first_index
        since = since or self.current_index + 1
        if since < first:
            cause = f"the requested history has been cleared [{first}/{since}]"
            raise EventIndexCleared(cause, self.current_index)
        watcher = Watcher(
            path, recursive=recursive, stream=stream, since=since, deliver=deliver, lost=lost
        )
        self.hub.watch(watcher)
        return watcher

    def set(
        self, path: str, *, dir: bool = False, value: Value = "", expires_ns: int = 0,
        refresh: bool = False, now_ns: int,
    ) -> Event:
        """Put a new file, or with `dir` an empty directory, at `path`; a file there is replaced.

        refresh  keep the value of the file, which must exist, and notify no watcher
        Raises NotFile, NotDir, RootReadOnly, KeyNotFound (refresh only).
        """
        old = self._to_change(path)
        if old is None:
            if refresh:
                raise self._count_failure("sets", self._not_found(path))
        elif path in _READ_ONLY:
            raise self._count_failure("sets", RootReadOnly("/", self.current_index))
        elif old.children is not None:
            raise self._count_failure("sets", NotFile(path[2:], self.current_index))
        elif refresh:
            value = stored_value(old)
        event = self._put_new("set", path, old, None if dir else value, expires_ns, now_ns, refresh)
        self.stats.sets_success += 1
        return event

    def create(
        self, path: str, *, dir: bool = False, value: Value = "", unique: bool = False,
        expires_ns: int = 0, now_ns: int,
    ) -> Event:
        """Make a new file or directory at `path`, or with `unique` below it under a number.

        Raises NodeExists, NotDir, RootReadOnly.
        """
        if unique:
            path = f"{path}/{self.current_index + 1:020d}"
        if path in _READ_ONLY:
            raise self._count_failure("create", RootReadOnly("/", self.current_index))
        if self._to_change(path) is not None:
            raise self._count_failure("create", NodeExists(path[2:], self.current_index))
        event = self._put_new("create", path, None, None if dir else value, expires_ns, now_ns)
        self.stats.create_success += 1
        return event

    def update(
        self, path: str, *, value: Value = "", expires_ns: int = 0, refresh: bool = False,
        now_ns: int,
    ) -> Event:
        """Give a file a new value and TTL, keeping its created index; a directory a new TTL.

        The event of a directory shows the new modified index, the stored one keeps the old.
        Raises KeyNotFound, NotDir, NotFile (value for a directory), RootReadOnly.
        """
        old = self._to_change(path)
        if old is None:
            raise self._count_failure("update", self._not_found(path))
        self.stats.update_success += 1          # also of the two failures below, as in etcd
        if path in _READ_ONLY:
            raise RootReadOnly("/", self.current_index)
        if old.children is None:
            return self._rewrite("update", path, old, value, expires_ns, now_ns, refresh)
        if value:
            raise NotFile(path[2:], self.current_index)
        index, children = self.current_index + 1, old.children
        stored = Directory(old.created_index, old.modified_index, expires_ns, children)
        shown = Directory(old.created_index, index, expires_ns, children)
        self._put_node(path, old, stored)
        return self._publish(Event("update", path, shown, old, index, now_ns, refresh))

    def compare_and_swap(
        self, path: str, *, prev_value: Value = "", prev_index: int = 0, value: Value = "",
        expires_ns: int = 0, refresh: bool = False, now_ns: int,
    ) -> Event:
        """Update a file if its value and its modified index are those given; "" and 0: any.
        Raises CompareFailed, KeyNotFound, NotDir, NotFile, RootReadOnly.
        """
        if path in _READ_ONLY:
            self.stats.compare_and_swap_success += 1        # as etcd counts
            raise RootReadOnly("/", self.current_index)
        try:
            old = self._checked_file(path, prev_value, prev_index)
        except EtcdError as error:
            raise self._count_failure("compare_and_swap", error) from None
        self.stats.compare_and_swap_success += 1
        return self._rewrite("compareAndSwap", path, old, value, expires_ns, now_ns, refresh)

    def delete(
        self, path: str, *, dir: bool = False, recursive: bool = False, now_ns: int
    ) -> Event:
        """Remove a file, with `dir` an empty directory, with `recursive` anything: one event.

        Raises KeyNotFound, NotDir, NotFile (directory without dir), DirNotEmpty, RootReadOnly.
        """
        if path in _READ_ONLY:
            self.stats.delete_success += 1                  # as etcd counts
            raise RootReadOnly("/", self.current_index)
        old = self._to_change(path)
        if old is None:
            raise self._count_failure("delete", self._not_found(path))
        if old.children is not None and not recursive:
            if not dir:
                raise self._count_failure("delete", NotFile(path[2:], self.current_index))
            if old.children:
                raise self._count_failure("delete", DirNotEmpty(path[2:], self.current_index))
        self.stats.delete_success += 1
        return self._remove("delete", path, old, now_ns)

    def compare_and_delete(
        self, path: str, *, prev_value: Value = "", prev_index: int = 0, now_ns: int
    ) -> Event:
        """Remove a file if its value and its modified index are those given; "" and 0: any.
        Raises CompareFailed, KeyNotFound, NotDir, NotFile (also for the root, with no cause).
        """
        try:
            old = self._checked_file(path, prev_value, prev_index)
        except (CompareFailed, NotFile):
            self.stats.compare_and_delete_success += 1      # as etcd counts
            raise
        except EtcdError as error:
            raise self._count_failure("compare_and_delete", error) from None
        self.stats.compare_and_delete_success += 1
        return self._remove("compareAndDelete", path, old, now_ns)

    def begin_turn(self) -> None:
        """Continue notifications and removals, which are spread over turns from now on."""
        self.hub.begin_turn()
        self.collect_garbage()
        if self._expiring_ns and not self._detached:
            self.expire(self._expiring_ns)

    def expire(self, cutoff_ns: int) -> None:
        """Remove the nodes that expire at or before `cutoff_ns`, earliest first; one event each.

        The next turns remove what is beyond this turn's budget.  Until then no other change is
        accepted, and no snapshot may begin, as an entry of the log is half applied.  A leader of
        Go expires any number of keys with one entry.
        """
        self._expiring_ns = cutoff_ns
        expires_ns, path = self._ttl.first()
        while path and expires_ns <= cutoff_ns:
            if path.startswith(self._detached):
                self._ttl.set(path, 0)
            else:
                self.stats.expire_count += 1
                self._remove("expire", path, self._nodes[path], cutoff_ns)
                self._budget -= EXPIRED_KEY_NODES
                if self._budget <= 0:
                    return
            expires_ns, path = self._ttl.first()
        self._expiring_ns = 0

    @property
    def has_ttl(self) -> bool:
        return len(self._ttl) > 0

    def expiry_step_ns(self, until_ns: int) -> int:
        """Return a time up to `until_ns` by which at most about EXPIRED_KEYS_MAX keys expire."""
        return self._ttl.nth_ns(EXPIRED_KEYS_MAX, until_ns)

    def snapshot_chunks(self) -> Generator[bytes, None, None]:
        """Yield the snapshot as of the first next(), in slices of some ms.

        Close the generator to give up.  Raises InvariantError if another snapshot is under way.
        Source: etcd 2.3 store/store.go, Save.
        """
        if any(isinstance(walk, SnapshotWalk) for walk in self._walks):
            raise InvariantError("a snapshot walk is under way")
        walk = SnapshotWalk(self._nodes, self._walks)
        stats = copy.copy(self.stats)
        stats.watchers = 0                      # not a part of the state
        end = f',"CurrentIndex":{self.current_index},"Stats":{stats.json()},"CurrentVersion":2}}'
        try:
            yield from walk.chunks(self.hub.history.pieces(), end)
        finally:
            walk.end()

    def save(self) -> bytes:
        return b"".join(self.snapshot_chunks())

    def replace_files(self, directory: str, files: Dict[str, str]) -> None:
        """Put `files`, path -> value, in the place of all below `directory`, without an event."""
        below = directory + "/"
        for path in [path for path in self._nodes if path.startswith(below)]:
            del self._nodes[path]
        (self._nodes[directory].children or {}).clear()
        for path, value in files.items():
            self._make_parents(path, self.current_index)
            self._put_node(path, None, file_node(value, self.current_index, self.current_index, 0))

    def recover(
        self, data: Buffer, progress: Callable[[float, int], None] = lambda share, nodes: None
    ) -> None:
        """Install the snapshot `data`.  Raises ValueError, before any change, if it is not one.

        progress  called now and then with the share that is read, 0.0 to 1.0, and the nodes in it
        """
        self.install(StoreState.read(data, progress))

    def install(self, state: StoreState) -> None:
        """Take ownership of a snapshot's state, and notify the watchers of its events.

        Expired nodes go with the next expire().  Source: etcd 2.3 store/store.go, Recovery.
        """
        self._replace_tree(state.nodes, state.ttl, state.chars)
        seen, self.current_index = self.current_index, state.current_index
        self.stats.load(state.stats)
        self.hub.history.load(state.events, state.back, state.capacity)
        if self.current_index > seen:
            self.hub.catch_up(seen)

    def _put_new(
        self, action: str, path: str, old: Optional[Node], value: Optional[Value],
        expires_ns: int, now_ns: int, refresh: bool = False,
    ) -> Event:
        """Put a file, or a directory if value is None, in the place of `old`.  A hot path."""
        index = self.current_index + 1
        if (
            old.__class__ is Node and value.__class__ is str and len(value) <= LONG_VALUE_CHARS
            and not (expires_ns or old.expires_ns or self._walks)
        ):                              # what most writes do
            node = self._nodes[path] = Node(value, index, index, 0)
            self.chars += len(value) - len(old.value or "")
            return self._publish(Event(action, path, node, old, index, now_ns, refresh))
        if old is None:
            try:
                self._make_parents(path, index)
            except NotDir:
                self.stats.sets_fail += 1
                self.stats.create_fail += action == "create"    # etcd counts it in both
                raise
        if expires_ns < EXPIRES_NS_MIN:
            expires_ns = 0
        node = (
            Directory(index, index, expires_ns, {}) if value is None
            else file_node(value, index, index, expires_ns)
        )
        self._put_node(path, old, node)
        return self._publish(Event(action, path, node, old, index, now_ns, refresh))

    def _rewrite(
        self, action: str, path: str, old: Node, value: Value, expires_ns: int, now_ns: int,
        refresh: bool,
    ) -> Event:
        """Give the file `old` a value and a TTL, keeping its created index."""
        index = self.current_index + 1
        text = stored_value(old) if refresh else value
        node = file_node(text, old.created_index, index, expires_ns)
        self._put_node(path, old, node)
        return self._publish(Event(action, path, node, old, index, now_ns, refresh))

    def _make_parents(self, path: str, index: int) -> None:
        """Enter `path` in its directory, with missing parents; NotDir comes before any change."""
        missing = [path]
        while True:
            path = parent_path(path)
            parent = self._nodes.get(path)
            if parent is not None:
                break
            missing.append(path)
        children = parent.children
        if children is None:
            raise NotDir(path[2:], self.current_index)
        while len(missing) > 1:
            path = missing.pop()
            children[path] = None
            children = {}
            self._put_node(path, None, Directory(index, index, 0, children))
        children[missing[0]] = None

    def _remove(self, action: str, path: str, old: Node, now_ns: int) -> Event:
        """Take `old` and all below it out of the tree: one event, at the top."""
        removed = [path]
        for below in removed:                   # grows under the loop: parents before children
            children = self._nodes[below].children or ()
            if len(removed) + len(children) > self._budget:
                removed = self._watched_below(path)
                break
            removed += children
        siblings = self._nodes[parent_path(path)].children
        if siblings is not None:
            del siblings[path]
        self._free(path)
        if old.children:
            self._detached += (path + "/",)
            self._free_detached()
        index = self.current_index + 1
        if old.children is None or action == "expire":      # etcd 2.3: expire never says dir
            shown = Node(None, old.created_index, index, 0)
        else:
            shown = Directory(old.created_index, index, 0, {})
        return self._publish(Event(action, path, shown, old, index, now_ns), removed)

    def _watched_below(self, path: str) -> List[str]:
        """Return the watched nodes at and below `path`, parents first."""
        below = path + "/"
        watched = [
            name for name in self.hub.paths
            if (name == path or name.startswith(below)) and self._reachable(name) is not None
        ]
        return sorted(watched, key=lambda name: name.count("/"))

    def _publish(self, event: Event, removed: Sequence[str] = ()) -> Event:
        self.current_index = event.index
        self.hub.notify(event, removed)
        return event

    def _checked_file(self, path: str, prev_value: Value, prev_index: int) -> Node:
        """Return the file at `path` if it passes the comparison.  Raises as compare_and_swap."""
        node = self._to_change(path)
        if node is None:
            raise self._not_found(path)
        if node.children is not None:
            raise NotFile(path[2:], self.current_index)
        wrong = []
        if prev_value and not (
            node.has_value(prev_value) if isinstance(node, LongNode) else node.value == prev_value
        ):
            wrong.append(f"[{value_excerpt(prev_value)} != {value_excerpt(stored_value(node))}]")
        if prev_index and prev_index != node.modified_index:
            wrong.append(f"[{prev_index} != {node.modified_index}]")
        if wrong:
            raise CompareFailed(" ".join(wrong), self.current_index)
        return node

    def _not_found(self, path: str) -> EtcdError:
        """Return the error for a missing path; it names the first missing part, or a file."""
        end = path.find("/", 1)
        while end > 0:
            node = self._nodes.get(path[:end])
            if node is None:
                break
            if node.children is None:
                return NotDir(path[2:end], self.current_index)
            end = path.find("/", end + 1)
        return KeyNotFound((path[2:end] if end > 0 else path[2:]) or "/", self.current_index)

    def _count_failure(self, verb: str, error: EtcdError) -> EtcdError:
        name = verb + "_fail"
        setattr(self.stats, name, getattr(self.stats, name) + 1)
        return error
