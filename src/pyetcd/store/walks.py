"""Walks over the key tree in slices: listings and snapshots."""

from __future__ import annotations

import heapq
import itertools
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Union

from ..base.text import format_time, in_pieces, is_plain_json, json_string, utf8
from .events import _PERMANENT, LongNode, Node, Texts, _node_ends

SNAPSHOT_SLICE_NODES = 500          # nodes per slice of a snapshot walk: 1 ms, all with ttl 3
SNAPSHOT_SLICE_CHARS = 1 << 18      # of text in a slice, or more with the last node
SNAPSHOT_SORT_MAX = 1_000           # children of larger directories stay in insertion order
LISTING_BLOCK_NODES = 100           # encoded at once
LISTING_BLOCK_CHARS = 1 << 16       # of the values of a block; above: node by node
LISTING_SORT_RUN = 4_000            # children sorted at once: 2 ms
LISTING_SLICE_WORK = 4_000          # nodes, or as much text, of a listing in one slice: 2 ms
LISTING_NODE_CHARS = 500            # text that is as much work as a node


def _sort_bytewise(paths: List[str]) -> bool:
    """Sort as Go does; True if not all is ASCII."""
    is_plain = all(map(str.isascii, paths))
    paths.sort(key=None if is_plain else utf8)      # code points sort surrogates differently
    return not is_plain


def parent_path(path: str) -> str:
    return path[:path.rfind("/")] or "/"


def _files_json(paths: Sequence[str], nodes: Sequence[Node]) -> str:
    """Return the JSON of nodes, joined by commas; "" if one is not a file with plain text."""
    # A hot path: to check the text of all at once takes 0.4 us per node instead of 1.
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
    """A walk over the tree as of the start of the walk, while the tree goes on changing.

    The store calls keep() before each change of a path; the walk then takes that image instead
    of the node in the tree.  Only changed nodes cost memory.
    """

    def __init__(self, nodes: Dict[str, Node], walks: List[TreeWalk]) -> None:
        self._nodes = nodes
        self._walks = walks             # those under way; this one is among them until end()
        self._images: Dict[str, Optional[Node]] = {}    # path -> node at the start; None: absent
        self._kept: Dict[str, List[str]] = {}           # directory -> children with an image
        walks.append(self)

    def keep(self, path: str, node: Optional[Node]) -> None:
        """Remember `node` as the image of `path`, unless an earlier change did."""
        if path not in self._images:
            self._images[path] = node
            if node is not None:
                self._kept.setdefault(parent_path(path), []).append(path)

    def end(self) -> None:
        """Stop keeping images: the walk is complete, or given up."""
        if self in self._walks:
            self._walks.remove(self)
        self._images, self._kept = {}, {}

    def _image(self, path: str) -> Optional[Node]:
        return self._images[path] if path in self._images else self._nodes[path]

    def _children(self, path: str) -> List[str]:
        """Return the children at the start, and perhaps later ones, whose image is None."""
        node = self._image(path)
        known = (node.children if node is not None else None) or {}
        kept = dict.fromkeys(self._kept.get(path, ()))
        return [*known, *[child for child in kept if child not in known]]


class SnapshotWalk(TreeWalk):
    """The walk that writes a snapshot."""

    def chunks(self, history: Texts, end: str) -> Iterator[bytes]:
        """Yield the snapshot in slices of some ms.  history: pieces of JSON; end: the rest."""
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
        """Yield the JSON of the root in pieces, one for each node and one for each end."""
        stack = [iter(("/",))]          # keys may be deeper than Python's recursion goes
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
    """A directory whose listing has begun: its remaining items, and the JSON around them."""

    __slots__ = ("items", "comma", "tail")

    def __init__(self, items: Iterator[Union[str, Tuple[str, Node]]], tail: str) -> None:
        self.items = items
        self.comma = ',"nodes":['       # "," behind the first visible child
        self.tail = tail


class Listing(TreeWalk):
    """The answer to the GET of a directory at one index, made in slices while the tree changes.

    Shows the visible children, with `recursive` all visible nodes below.
    """

    def __init__(
        self, nodes: Dict[str, Node], walks: List[TreeWalk], path: str, *, recursive: bool,
        sorted: bool, index: int, now_ns: int,
    ) -> None:
        super().__init__(nodes, walks)
        self.index = index              # store index of the state in it
        self.chunks: List[bytes] = []   # of the answer so far, none of them huge
        self.done = False               # the answer is complete
        self.cacheable = True           # as long as the index holds: nothing in it expires
        self.work_done = 0              # nodes so far, and text in units of LISTING_NODE_CHARS
        self._recursive = recursive
        self._sorted = sorted
        self._now_ns = now_ns
        self._texts = self._walk(path, nodes[path])

    def work(self, amount: int = LISTING_SLICE_WORK) -> None:
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
        """Yield the text in pieces, sometimes empty ones to allow a pause."""
        head, tail = self._ends(path, node)
        yield '{"action":"get","node":' + head
        levels = [_Level(self._items(path), tail)]      # keys may be deeper than recursion goes
        while levels:
            level = levels[-1]
            for item in level.items:
                if isinstance(item, str):
                    yield level.comma + item if item else ""
                    level.comma = "," if item else level.comma
                    continue
                path, node = item
                head, tail = self._ends(path, node)
                text, level.comma = level.comma + head, ","
                if node.children is not None and self._recursive:
                    yield text
                    levels.append(_Level(self._items(path), tail))
                    break
                if isinstance(node, LongNode):
                    yield text
                    yield from node.json
                    text = ""
                yield text + tail
            else:
                levels.pop()            # without visible children there is no `nodes`
                yield "]" + level.tail if level.comma == "," else level.tail
        yield "}\n"

    def _ends(self, path: str, node: Node) -> Tuple[str, str]:
        """Return the JSON of a node before and after its children, or its long value."""
        self.cacheable = self.cacheable and not node.expires_ns
        if isinstance(node, LongNode):
            self.work_done += 1 + len(node.json)
        else:
            self.work_done += 1 + len(node.value or "") // LISTING_NODE_CHARS
        return _node_ends(json_string(path[2:]), node, node.ttl_s(self._now_ns))

    def _items(self, path: str) -> Iterator[Union[str, Tuple[str, Node]]]:
        """Yield the visible children: the text of a block of files ("": a pause), or one node."""
        name_at = len(path) + 1
        for block in self._blocks(path):
            if "/_" in "".join(block):
                block = [child for child in block if not child.startswith("_", name_at)]
            if self._images:
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
        """Yield the children of a directory, hidden ones too, in blocks."""
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
        yield from iter(lambda: list(itertools.islice(paths, LISTING_BLOCK_NODES)), [])
