"""Walks over the key tree in slices: listings and snapshots."""

from __future__ import annotations

import heapq
import itertools
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Union

from ..base.text import format_time, in_pieces, is_plain_json, json_string, utf8
from .events import (
    _PERMANENT,
    LISTING_BLOCK_CHARS,
    LISTING_BLOCK_NODES,
    LISTING_NODE_CHARS,
    LISTING_SLICE_WORK,
    LISTING_SORT_RUN,
    SNAPSHOT_SLICE_CHARS,
    SNAPSHOT_SLICE_NODES,
    SNAPSHOT_SORT_MAX,
    LongNode,
    Node,
    Texts,
    _node_ends,
    _node_texts,
)


def _sort_bytewise(paths: List[str]) -> bool:
    """Sort as Go does; only surrogates (bytes that are no UTF-8) make code points differ.

    True if there may have been some.
    """
    is_plain = all(map(str.isascii, paths))
    paths.sort(key=None if is_plain else utf8)
    return not is_plain


def parent_path(path: str) -> str:
    """Return the directory that `path` lies in."""
    return path[:path.rfind("/")] or "/"


def _files_json(paths: Sequence[str], nodes: Sequence[Node]) -> str:
    """The JSON of nodes, commas between; "" if one of them is more than a file with plain text.

    Looks once at the text of all: 0.4 us per node instead of 1.  A hot path.
    """
    if LongNode in set(map(type, nodes)):
        return ""
    values = [node.value for node in nodes]
    if not all(values) or sum([node.expires_ns for node in nodes]) > 0:
        return ""
    texts: List[str] = values  # type: ignore[assignment]
    if sum(map(len, texts)) > LISTING_BLOCK_CHARS or not is_plain_json("".join(texts + [*paths])):
        return ""
    return ",".join([
        f'{{"key":"{path[2:]}","value":"{node.value}","modifiedIndex":{node.modified_index},'
        f'"createdIndex":{node.created_index}}}' for path, node in zip(paths, nodes)
    ])


class TreeWalk:
    """A walk over the tree as it was when the walk began, while the tree goes on changing.

    The store calls keep() before the first change of a path; the walk then takes that image
    instead of the node it finds.  Nothing is copied but what changes.

    walks  all that are under way; this one is among them until end()
    """

    __slots__ = ("_nodes", "_walks", "_before", "_lost")

    def __init__(self, nodes: Dict[str, Node], walks: List[TreeWalk]) -> None:
        self._nodes = nodes
        self._walks = walks
        self._before: Dict[str, Optional[Node]] = {}    # path -> node at the start; None: absent
        self._lost: Dict[str, List[str]] = {}           # directory -> kept children, maybe removed
        walks.append(self)

    def keep(self, path: str, node: Optional[Node]) -> None:
        """Remember `node` as the image of `path`, unless an earlier change did."""
        if path not in self._before:
            self._before[path] = node
            if node is not None:
                self._lost.setdefault(parent_path(path), []).append(path)

    def end(self) -> None:
        """Be complete, or give up: the changes of the tree are of no interest any more."""
        if self in self._walks:
            self._walks.remove(self)
        self._before, self._lost = {}, {}

    def _image(self, path: str) -> Optional[Node]:
        """The node at the start of the walk."""
        return self._before[path] if path in self._before else self._nodes[path]

    def _children(self, path: str) -> List[str]:
        """The paths that may have been children at the start; later ones have the image None."""
        node = self._image(path)
        paths = list(node.children) if node is not None and node.children is not None else []
        if path in self._lost:
            paths = list(dict.fromkeys(paths + self._lost[path]))
        return paths


class SnapshotWalk(TreeWalk):
    """The walk that writes a snapshot."""

    __slots__ = ()

    def chunks(self, history: Texts, end: str) -> Iterator[bytes]:
        """Yield the snapshot in slices of some ms.  history: pieces of JSON; end: what follows."""
        slice: List[Union[str, bytes]] = []
        chars = 0
        for text in itertools.chain(
            ('{"Root":',), self._pieces(), (',"WatcherHub":{"EventHistory":', next(history)),
            history, ("}", end),
        ):
            slice.append(text)
            chars += len(text)
            if chars >= SNAPSHOT_SLICE_CHARS or len(slice) >= SNAPSHOT_SLICE_NODES:
                yield from in_pieces(slice)
                slice, chars = [], 0
        yield from in_pieces(slice)

    def _pieces(self) -> Texts:
        """Yield the JSON of the root in pieces, one for each node and one for each end.

        Goes by a stack of its own: keys may be deeper than Python likes to call.
        """
        stack = [iter(("/",))]
        comma = ""
        while stack:
            for path in stack[-1]:
                node = self._image(path)
                if node is None:
                    continue
                text = comma + self._head(path, node)
                if isinstance(node, LongNode):
                    yield text
                    yield from node.json
                    text = '","Children":'
                if node.children is None:
                    yield text + "null}"
                    comma = ","
                    continue
                yield text + "{"
                children = self._children(path)
                if len(children) <= SNAPSHOT_SORT_MAX:
                    _sort_bytewise(children)
                stack.append(iter(children))
                comma = ""
                break
            else:
                stack.pop()
                if stack:
                    yield "}}"
                comma = ","

    def _head(self, path: str, node: Node) -> str:
        name = "" if path == "/" else json_string(path[path.rfind("/") + 1:]) + ":"
        expires = format_time(node.expires_ns) if node.expires_ns else _PERMANENT
        text = (
            f'{name}{{"Path":{json_string(path)},"CreatedIndex":{node.created_index},'
            f'"ModifiedIndex":{node.modified_index},"ExpireTime":"{expires}","Value":'
        )
        if isinstance(node, LongNode):
            return text + '"'
        return f'{text}{json_string(node.value or "")},"Children":'


class _Level:
    """A directory of which a listing has begun: what follows, and what comes before and after."""

    __slots__ = ("items", "comma", "tail")

    def __init__(self, items: Iterator[Union[str, Tuple[str, Node]]], tail: str) -> None:
        self.items = items
        self.comma = ',"nodes":['
        self.tail = tail

    def end(self) -> str:
        """Return the end of the directory's JSON; one without visible children has no `nodes`."""
        return "]" + self.tail if self.comma == "," else self.tail


class Listing(TreeWalk):
    """The answer to the GET of a directory at one index, made in slices while the tree changes.

    index   store index of the state that it shows
    chunks  of the answer so far, none of them huge
    done    all of it is there
    cacheable  the answer holds as long as the index does: nothing in it expires

    With `recursive` all that is visible, all the way down, else the children.
    """

    __slots__ = (
        "index", "chunks", "done", "cacheable", "work_done", "_recursive", "_sorted", "_now_ns",
        "_texts",
    )

    def __init__(
        self, nodes: Dict[str, Node], walks: List[TreeWalk], path: str, *, recursive: bool,
        sorted: bool, index: int, now_ns: int,
    ) -> None:
        super().__init__(nodes, walks)
        self.index = index
        self.chunks: List[bytes] = []
        self.done = False
        self.cacheable = True
        self.work_done = 0              # nodes so far, and text in units of LISTING_NODE_CHARS
        self._recursive = recursive
        self._sorted = sorted
        self._now_ns = now_ns
        self._texts = self._walk(path, nodes[path])

    def work(self, amount: int = LISTING_SLICE_WORK) -> None:
        """Go on for about `amount` nodes."""
        until = self.work_done + amount
        texts: List[Union[str, bytes]] = []
        for text in self._texts:
            texts.append(text)
            if self.work_done >= until:
                break
        else:
            self.done = True
            self.end()
        self.chunks += in_pieces(texts) or [b""]

    def _walk(self, path: str, node: Node) -> Texts:
        """Yield the text in pieces, sometimes empty ones to allow a pause.

        Goes by a stack of its own: keys may be deeper than Python likes to call.
        """
        head, tail = self._ends(path, node)
        yield '{"action":"get","node":' + head
        levels = [_Level(self._items(path), tail)]
        while levels:
            level = levels[-1]
            for item in level.items:
                if isinstance(item, str):
                    if item:
                        yield level.comma + item
                        level.comma = ","
                    else:
                        yield ""
                    continue
                path, node = item
                if isinstance(node, LongNode):
                    yield level.comma
                    yield from self._long_texts(path, node)
                    level.comma = ","
                    continue
                head, tail = self._ends(path, node)
                text, level.comma = level.comma + head, ","
                if node.children is None or not self._recursive:
                    yield text + tail
                    continue
                yield text
                levels.append(_Level(self._items(path), tail))
                break
            else:
                levels.pop()
                yield level.end()
        yield "}\n"

    def _long_texts(self, path: str, node: LongNode) -> Texts:
        self.cacheable = self.cacheable and not node.expires_ns
        self.work_done += 1 + len(node.json)
        yield from _node_texts(json_string(path[2:]), node, node.ttl_s(self._now_ns))

    def _ends(self, path: str, node: Node) -> Tuple[str, str]:
        """What comes before and after the place of a node's children."""
        self.cacheable = self.cacheable and not node.expires_ns
        self.work_done += 1 + len(node.value or "") // LISTING_NODE_CHARS
        return _node_ends(json_string(path[2:]), node, node.ttl_s(self._now_ns))

    def _items(self, path: str) -> Iterator[Union[str, Tuple[str, Node]]]:
        """Yield what is visible in a directory: the text of a block of files, else one node.

        Some text may be empty, to allow a pause.
        """
        name_at = len(path) + 1
        for block in self._blocks(path):
            if "/_" in "".join(block):
                block = [child for child in block if not child.startswith("_", name_at)]
            if self._before:
                block = [child for child in block if self._image(child) is not None]
                nodes = [self._image(child) for child in block]
            else:
                nodes = list(map(self._nodes.__getitem__, block))
            files: Sequence[Node] = nodes  # type: ignore[assignment]
            text = _files_json(block, files)
            if text or not block:
                self.work_done += len(block) + len(text) // LISTING_NODE_CHARS
                yield text
            else:
                yield from zip(block, files)

    def _blocks(self, path: str) -> Iterator[List[str]]:
        """Yield the children of a directory, hidden ones too, a few at a time."""
        paths: Iterator[str]
        children = self._children(path)
        if self._sorted and len(children) > LISTING_SORT_RUN:
            runs = [
                children[start:start + LISTING_SORT_RUN]
                for start in range(0, len(children), LISTING_SORT_RUN)
            ]
            is_odd = False
            for run in runs:
                is_odd = _sort_bytewise(run) or is_odd
                self.work_done += len(run)
                yield []
            paths = heapq.merge(*runs, key=utf8 if is_odd else None)
        else:
            if self._sorted:
                _sort_bytewise(children)
            paths = iter(children)
        block = list(itertools.islice(paths, LISTING_BLOCK_NODES))
        while block:
            yield block
            block = list(itertools.islice(paths, LISTING_BLOCK_NODES))
