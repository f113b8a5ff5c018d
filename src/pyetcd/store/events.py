"""Nodes of the key tree, events, and their JSON.

Paths are internal and clean: `/1/foo` is the user's `/foo`.  Time is passed in.
"""

from __future__ import annotations

from typing import Dict, Iterator, Optional, Sequence, Tuple, Union

from ..base.limits import NS
from ..base.text import (
    _JSON_UNSAFE,
    LongText,
    Value,
    format_time,
    in_pieces,
    json_string,
    long_text,
    text_of_long,
)

LONG_VALUE_CHARS = 4_096            # of a value: above, it is kept as the JSON that is sent
SHOWN_VALUE_CHARS = 4_096           # of a value in the text of an error; above: cut

Texts = Iterator[Union[str, bytes]]     # JSON in pieces, of which the long ones are shared
_PERMANENT = "0001-01-01T00:00:00Z"     # Go's zero time


class Node:
    """A file, without its path.  Immutable: every write replaces it.  64 bytes on CPython 3.11."""

    __slots__ = ("value", "created_index", "modified_index", "expires_ns")
    children: Optional[Dict[str, None]] = None

    def __init__(
        self, value: Optional[str], created_index: int, modified_index: int, expires_ns: int
    ) -> None:
        self.value = value                      # None only in a delete or expire event
        self.created_index = created_index      # store indexes
        self.modified_index = modified_index
        self.expires_ns = expires_ns            # unix; 0: permanent

    def ttl_s(self, now_ns: int) -> int:
        """Return the seconds left, rounded up; 0 or less when expired, 0 if permanent."""
        return -((now_ns - self.expires_ns) // NS) if self.expires_ns else 0


class LongNode(Node):
    """A file with a long value, kept as JSON for answers: encoding takes up to 60 ns a char."""

    __slots__ = ("json",)

    def __init__(
        self, json: LongText, created_index: int, modified_index: int, expires_ns: int
    ) -> None:
        self.json = json
        self.created_index = created_index
        self.modified_index = modified_index
        self.expires_ns = expires_ns

    @property
    def value(self) -> str:  # type: ignore[override]
        """The text; 10 MB take some ms."""
        return text_of_long(self.json)

    def has_value(self, value: Value) -> bool:
        if isinstance(value, str):
            value = long_text(value) if len(value) > LONG_VALUE_CHARS else ()
        if value == self.json or sum(map(len, value)) != sum(map(len, self.json)):
            return value == self.json
        return b"".join(value) == b"".join(self.json)       # perhaps in other pieces


def node_chars(node: Node) -> int:
    """Return the characters of a file's value, of a long one as it is kept; 0 for a directory."""
    return sum(map(len, node.json)) if type(node) is LongNode else len(node.value or "")


def file_node(value: Value, created_index: int, modified_index: int, expires_ns: int) -> Node:
    if isinstance(value, str):
        if len(value) <= LONG_VALUE_CHARS:
            return Node(value, created_index, modified_index, expires_ns)
        value = long_text(value)
    return LongNode(value, created_index, modified_index, expires_ns)


def stored_value(node: Node) -> Value:
    return node.json if isinstance(node, LongNode) else node.value or ""


def value_excerpt(value: Value) -> str:
    """Return a value for the text of an error.  Differs from etcd, which shows 20 MB."""
    text = value if isinstance(value, str) else text_of_long(value[:1])
    is_all = isinstance(value, str) and len(value) <= SHOWN_VALUE_CHARS
    return text if is_all else text[:SHOWN_VALUE_CHARS] + "..."


class Directory(Node):
    """A node with children: their full paths, in order of creation (a dict as ordered set).

    The dict is the one mutable part; every version of the same directory shares it.
    """

    __slots__ = ("children",)
    children: Dict[str, None]

    def __init__(
        self, created_index: int, modified_index: int, expires_ns: int, children: Dict[str, None]
    ) -> None:
        super().__init__(None, created_index, modified_index, expires_ns)
        self.children = children


def _node_ends(key: str, node: Node, ttl_s: int) -> Tuple[str, str]:
    """Return the JSON of a node in an event before and after its `nodes`, or its long value.

    key  already encoded; `""` is the root, which has neither key nor indexes
    """
    members = "" if key == '""' else f',"key":{key}'
    expires = f',"expiration":"{format_time(node.expires_ns)}"' if node.expires_ns else ""
    if ttl_s:
        expires += f',"ttl":{ttl_s}'
    indexes = f',"modifiedIndex":{node.modified_index}' if node.modified_index else ""
    if node.created_index:
        indexes += f',"createdIndex":{node.created_index}'
    if isinstance(node, LongNode):
        return f'{{{members[1:]},"value":"', f'"{expires}{indexes}}}'
    if node.value is not None:
        members += f',"value":{json_string(node.value)}'
    if node.children is not None:
        members += ',"dir":true'
    return f"{{{(members + expires)[1:]}", indexes + "}"


def _node_texts(key: str, node: Node, ttl_s: int) -> Texts:
    """Yield the JSON of a file in pieces, with no copy of a long value."""
    head, tail = _node_ends(key, node, ttl_s)
    yield head
    if isinstance(node, LongNode):
        yield from node.json
    yield tail


def _node_json(key: str, node: Node, ttl_s: int) -> str:
    if node.value is None or node.expires_ns:
        return "".join(_node_ends(key, node, ttl_s))
    return (                            # the usual node: 0.7 us instead of 1.7
        f'{{"key":{key},"value":{json_string(node.value)},'
        f'"modifiedIndex":{node.modified_index},"createdIndex":{node.created_index}}}'
    )


class Event:
    """The effect of one operation on one key.  Immutable.  Source: etcd 2.3 store/event.go."""

    __slots__ = (
        "action", "key", "node", "prev", "index", "ttl_s", "prev_ttl_s", "refresh", "_json"
    )

    def __init__(
        self, action: str, key: str, node: Node, prev: Optional[Node], index: int, now_ns: int,
        refresh: bool = False, encoded: Optional[Sequence[bytes]] = None,
    ) -> None:
        # get, set, create, update, compareAndSwap, delete, compareAndDelete or expire
        self.action = action
        self.key = key                  # full internal path
        self.node = node                # as the operation left it (deleted: without value)
        self.prev = prev                # as it was before, or None
        self.index = index              # store index of the change; for a get, the current one
        # Seconds left of both when it happened; 0: permanent or expired.
        self.ttl_s = node.ttl_s(now_ns) if node.expires_ns else 0
        self.prev_ttl_s = prev.ttl_s(now_ns) if prev is not None and prev.expires_ns else 0
        self.refresh = refresh          # True: kept in the history, but no watcher is notified
        self._json = encoded

    @property
    def is_created(self) -> bool:
        """True if the key is new: HTTP answers 201 instead of 200."""
        return self.prev is None and self.action in ("create", "set")

    @property
    def _is_long(self) -> bool:
        return LongNode in (self.node.__class__, self.prev.__class__)

    def client_pieces(self) -> Sequence[bytes]:
        """Return the line for clients and its newline, keys without `/1`; encoded once for all."""
        if self._json is None:
            if self._is_long:
                self._json = in_pieces((*self._texts(self.key[2:]), "}\n"))
            else:
                self._json = (f"{self._text(self.key[2:])}}}\n".encode(),)
        return self._json

    def history_texts(self) -> Texts:
        """Yield the form kept in snapshots: full keys, and the refresh mark."""
        end = ',"refresh":true}' if self.refresh else "}"
        if self._is_long:
            yield from self._texts(self.key)
            yield end
        else:
            yield self._text(self.key) + end

    def _text(self, key: str) -> str:
        node, prev = self.node, self.prev
        if (                            # the usual event: 1.6 us instead of 2.3
            prev is not None and prev.value is not None and node.value is not None
            and not (node.expires_ns or prev.expires_ns)
            and _JSON_UNSAFE.search(f"{key}{node.value}{prev.value}") is None
        ):
            return (
                f'{{"action":"{self.action}","node":{{"key":"{key}","value":"{node.value}",'
                f'"modifiedIndex":{node.modified_index},"createdIndex":{node.created_index}}},'
                f'"prevNode":{{"key":"{key}","value":"{prev.value}",'
                f'"modifiedIndex":{prev.modified_index},"createdIndex":{prev.created_index}}}'
            )
        key = json_string(key)
        text = f'{{"action":"{self.action}","node":{_node_json(key, self.node, self.ttl_s)}'
        if self.prev is None:
            return text
        return f'{text},"prevNode":{_node_json(key, self.prev, self.prev_ttl_s)}'

    def _texts(self, key: str) -> Texts:
        key = json_string(key)
        yield f'{{"action":"{self.action}","node":'
        yield from _node_texts(key, self.node, self.ttl_s)
        if self.prev is not None:
            yield ',"prevNode":'
            yield from _node_texts(key, self.prev, self.prev_ttl_s)
