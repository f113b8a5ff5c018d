"""The nodes of a store: found by path, and removed in slices."""

from __future__ import annotations

import math
from typing import Dict, List, Optional, Tuple

from ..base.limits import REMOVED_NODES_MAX
from .events import Directory, Node, node_chars
from .walks import TreeWalk
from .watchers import TtlHeap


class NodeTree:
    """One flat dict of path -> node, with the children of each directory.

    Flat, because a lookup is one hash (0.05 us; a walk from the root takes 0.3) and costs no
    second string: the dict and the parent's children hold the same path.  100,000 keys of 10
    characters with 64-byte values take 370 bytes each.

    A directory takes what is below it out of reach at once, but its nodes stay for a while, dead.
    """

    def __init__(self) -> None:
        self.chars = 0                                  # of all paths and values
        self._ttl = TtlHeap()
        self._walks: List[TreeWalk] = []                # the snapshot and the listings under way
        self._dead: Tuple[str, ...] = ()                # the directories, each with a slash
        self._dying: List[Dict[str, None]] = []         # children of dead ones, yet to be removed
        self._old: List[Tuple[Dict[str, Node], List[TreeWalk]]] = []    # trees before become()
        self._room: float = math.inf                    # nodes that this turn may remove
        self._nodes: Dict[str, Node] = {                # no path without its parents
            "/": Directory(0, 0, 0, {"/0": None, "/1": None}),
            "/0": Directory(0, 0, 0, {}),
            "/1": Directory(0, 0, 0, {}),
        }

    def __len__(self) -> int:
        """The number of nodes, directories included, and those out of reach."""
        return len(self._nodes)

    @property
    def accepts_changes(self) -> bool:
        """True if a change may be applied in this turn; False: after the next tidy()."""
        return not self._dead and self._room > 0

    @property
    def has_garbage(self) -> bool:
        """True if tidy() has something to do."""
        return bool(self._dead) or bool(self._old) and not self._old[0][1]

    def tidy(self) -> None:
        """Remove REMOVED_NODES_MAX nodes at most until the next call.

        More may go at one index, with a directory: what is below it is out of reach at once, but
        removed in this call and those of the next turns.  As long as this was never called,
        all is removed at once.
        """
        self._room = REMOVED_NODES_MAX
        self._bury()
        if self._old and not self._old[0][1]:       # and no walk reads it any more
            nodes = self._old[0][0]
            for _ in range(min(len(nodes), REMOVED_NODES_MAX)):
                nodes.popitem()
            if not nodes:
                del self._old[0]

    def _put(self, path: str, old: Optional[Node], node: Node) -> None:
        """Have `node` at `path`, in the place of `old` if there was one."""
        for walk in self._walks:
            walk.keep(path, old)
        self._nodes[path] = node
        self.chars += node_chars(node) + (len(path) if old is None else -node_chars(old))
        if node.expires_ns or (old is not None and old.expires_ns):
            self._ttl.set(path, node.expires_ns)

    def _replace(self, nodes: Dict[str, Node], ttl: TtlHeap, chars: int) -> None:
        """Be another tree; tidy() frees this one."""
        self._dead, self._dying = (), []
        if len(self._nodes) > REMOVED_NODES_MAX:
            self._old.append((self._nodes, self._walks))
        self._walks = []                        # a walk under way keeps the tree it began with
        self._nodes, self._ttl, self.chars = nodes, ttl, chars

    def _drop(self, path: str) -> None:
        """Remove one node; what was below it dies."""
        node = self._nodes.pop(path)
        self._room -= 1
        self.chars -= len(path) + node_chars(node)
        for walk in self._walks:
            walk.keep(path, node)
        if node.expires_ns:
            self._ttl.set(path, 0)
        if node.children:
            self._dying.append(node.children)   # emptied: events of the past must not hold it

    def _bury(self) -> None:
        """Remove dying nodes, as many as there is room for."""
        dying = self._dying
        while dying and self._room > 0:
            children = dying[-1]
            if children:
                self._drop(children.popitem()[0])
            else:
                dying.pop()
        if not dying:
            self._dead = ()

    def _found(self, path: str) -> Optional[Node]:
        """The node at `path` that can be reached."""
        return None if path.startswith(self._dead) else self._nodes.get(path)

    def _to_change(self, path: str) -> Optional[Node]:
        """The same; what is dead has gone before anything changes."""
        if self._dead:
            room, self._room = self._room, math.inf
            self._bury()
            self._room = room
        return self._nodes.get(path)
