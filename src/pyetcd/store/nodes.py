"""The nodes of a store: found by path, and removed in slices."""

from __future__ import annotations

import math
from typing import Dict, Iterator, List, Optional, Tuple

from ..base.limits import REMOVED_NODES_MAX
from .events import Directory, Node, node_chars
from .walks import TreeWalk
from .watchers import TtlHeap


class NodeTree:
    """One flat dict of path -> node, with the children of each directory.

    Flat, because a lookup is one hash (0.05 us; a walk from the root takes 0.3) and costs no
    second string: the dict and the parent's children hold the same path.  100,000 keys of 10
    characters with 64-byte values take 370 bytes each.

    The removal of a directory detaches the nodes below it at once, and frees them over many turns.
    """

    def __init__(self) -> None:
        self.chars = 0                                  # of all paths and values
        self._ttl = TtlHeap()
        self._walks: List[TreeWalk] = []                # the snapshot and the listings under way
        self._detached: Tuple[str, ...] = ()            # removed directories, each with a slash
        self._unfreed: List[Dict[str, None]] = []       # children of removed directories
        self._replaced: List[Tuple[Dict[str, Node], List[TreeWalk], TtlHeap]] = []  # earlier trees
        self._expiring_ns = 0                           # the cutoff of an expiry under way
        self._budget: float = math.inf                  # nodes that this turn may free
        self._nodes: Dict[str, Node] = {                # no path without its parents
            "/": Directory(0, 0, 0, {"/0": None, "/1": None}),
            "/0": Directory(0, 0, 0, {}),
            "/1": Directory(0, 0, 0, {}),
        }

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def accepts_changes(self) -> bool:
        """True if a change may be applied in this turn; False: after the next collect_garbage()."""
        return not self._detached and self._budget > 0 and not self._expiring_ns

    @property
    def is_expiring(self) -> bool:
        """True if the rest of the expired keys of one entry is removed in the next turns."""
        return self._expiring_ns > 0

    @property
    def has_garbage(self) -> bool:
        return bool(
            self._detached or self._expiring_ns or self._replaced and not self._replaced[0][1])

    def collect_garbage(self) -> None:
        """Free at most REMOVED_NODES_MAX nodes until the next call; before the first: no limit."""
        self._budget = REMOVED_NODES_MAX
        if self._detached:
            self._free_detached()
        if self._replaced and not self._replaced[0][1]:     # and no walk reads it any more
            nodes, _, ttl = self._replaced[0]
            for _ in range(min(len(nodes), REMOVED_NODES_MAX)):
                nodes.popitem()
            ttl.free(REMOVED_NODES_MAX)
            if not nodes and not len(ttl):
                del self._replaced[0]

    def count_files(self, directory: str) -> int:
        """Return the number of files below `directory`, at any depth; reads every node."""
        below = directory + "/"
        return sum(n.children is None and p.startswith(below) for p, n in self._nodes.items())

    def nodes_below(self, directory: str) -> List[Tuple[str, Node]]:
        """Return all nodes below `directory` with their paths, sorted; looks at every node."""
        below = directory + "/"
        return sorted(((p, n) for p, n in self._nodes.items() if p.startswith(below)),
                      key=lambda item: item[0])

    def count_children(self, path: str) -> int:
        """Return how many children a directory has, hidden ones too; 0 if there is none."""
        node = self._reachable(path)
        return 0 if node is None else len(node.children or ())

    def below(
        self, path: str, *, recursive: bool, hidden: bool
    ) -> Optional[Iterator[Optional[Tuple[str, Node]]]]:
        """Yield the nodes below a directory, each as it is when its turn comes; not counted.

        Nodes that come or go meanwhile may be left out.  Yields None for a node passed over, so
        that the caller can pause.  Returns None if `path` is no directory.
        """
        node = self._reachable(path)
        if node is None or node.children is None:
            return None
        return self._below(list(node.children), recursive=recursive, hidden=hidden)

    def _below(
        self, children: List[str], *, recursive: bool, hidden: bool
    ) -> Iterator[Optional[Tuple[str, Node]]]:
        """Walk with a stack: keys may be deeper than Python's recursion goes."""
        stack = [iter(children)]
        while stack:
            path = next(stack[-1], "")
            node = self._reachable(path) if path else None
            if not path:
                stack.pop()
            elif node is None or not hidden and path.startswith("_", path.rfind("/") + 1):
                yield None
            else:
                yield path, node
                if recursive and node.children:
                    stack.append(iter(list(node.children)))

    def _put_node(self, path: str, old: Optional[Node], node: Node) -> None:
        for walk in self._walks:
            walk.keep(path, old)
        self._nodes[path] = node
        self.chars += node_chars(node) + (len(path) if old is None else -node_chars(old))
        if node.expires_ns or (old is not None and old.expires_ns):
            self._ttl.set(path, node.expires_ns)

    def _replace_tree(self, nodes: Dict[str, Node], ttl: TtlHeap, chars: int) -> None:
        self._detached, self._unfreed, self._expiring_ns = (), [], 0
        if len(self._nodes) > REMOVED_NODES_MAX:
            self._replaced.append((self._nodes, self._walks, self._ttl))
        self._walks = []                        # a walk under way keeps the tree it began with
        self._nodes, self._ttl, self.chars = nodes, ttl, chars

    def _free(self, path: str) -> None:
        """Remove one node; its children are freed later."""
        node = self._nodes.pop(path)
        self._budget -= 1
        self.chars -= len(path) + node_chars(node)
        for walk in self._walks:
            walk.keep(path, node)
        if node.expires_ns:
            self._ttl.set(path, 0)
        if node.children:
            self._unfreed.append(node.children)     # emptied: no event of the past may hold it

    def _free_detached(self) -> None:
        while self._unfreed and self._budget > 0:
            children = self._unfreed[-1]
            if children:
                self._free(children.popitem()[0])
            else:
                self._unfreed.pop()
        if not self._unfreed:
            self._detached = ()

    def _reachable(self, path: str) -> Optional[Node]:
        return None if path.startswith(self._detached) else self._nodes.get(path)

    def _to_change(self, path: str) -> Optional[Node]:
        """Return the node at `path`, after all detached nodes are freed."""
        if self._detached:
            budget, self._budget = self._budget, math.inf
            self._free_detached()
            self._budget = budget
        return self._nodes.get(path)
