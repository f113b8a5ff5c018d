"""Results: frozen values, or the error, made from the JSON of a reply.

Names are the JSON keys in snake_case; `raw` is the JSON itself.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Callable, ClassVar, NamedTuple, TypeVar

from .errors import EtcdError, HttpError

_T = TypeVar("_T")


class _Reply(NamedTuple):
    """One complete HTTP reply; the result of `Client.api_execute`."""

    status: int
    headers: Mapping[str, str]      # by case-insensitive name
    body: bytes

    @property
    def data(self) -> bytes:
        """The body; this and the next two are python-etcd's names."""
        return self.body

    def getheader(self, name: str, default: str | None = None) -> str | None:
        return self.headers.get(name, default)

    def getheaders(self) -> Mapping[str, str]:
        return self.headers

    def header_number(self, name: str) -> int:
        """Return a numeric header; 0 if it is missing or not a number."""
        text = self.headers.get(name, "")
        return int(text) if text.isdigit() and text.isascii() else 0

    def json(self) -> Any:
        return json.loads(self.body.decode("utf-8", "replace"))


@dataclass(frozen=True)
class Node:
    """A file or a directory at one moment.

    value       None for a directory, and in the answer to a delete
    ttl         seconds left, rounded up; None if permanent.  0 or less: expired, not yet removed
    expiration  RFC 3339 instant in UTC as the server sent it; None if permanent
    nodes       visible children of a listed directory
    """

    key: str
    value: str | None = None
    dir: bool = False
    ttl: int | None = None
    expiration: str | None = None
    modified_index: int = 0
    created_index: int = 0
    nodes: tuple[Node, ...] = field(default_factory=tuple)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Node:
        """Return the node in a server's JSON; the root has no key there and is "/" here.

        Children are parsed on first access: this halves the cost of a listing of 1,000 nodes.
        """
        get, node = raw.get, cls.__new__(cls)
        fields = node.__dict__                      # bypasses the __init__ of a frozen class
        fields["key"] = get("key") or "/"
        fields["value"] = get("value")
        fields["dir"] = get("dir", False)
        fields["ttl"] = get("ttl", 0 if "expiration" in raw else None)
        fields["expiration"] = get("expiration")
        fields["modified_index"] = get("modifiedIndex", 0)
        fields["created_index"] = get("createdIndex", 0)
        fields["raw"] = raw
        children = get("nodes")
        if not children:
            fields["nodes"] = ()
        elif set(map(type, children)) != {dict}:
            raise TypeError("a child is not an object")
        return node

    def __getattr__(self, name: str) -> Any:
        if name != "nodes" or "raw" not in self.__dict__:
            raise AttributeError(name)
        children = self.__dict__["nodes"] = tuple(map(self.from_json, self.raw["nodes"]))
        return children

    def walk(self) -> Iterator[Node]:
        """Yield every node below this one, parents before their children."""
        for child in self.nodes:
            yield child
            yield from child.walk()


class _Forwarded:
    """An attribute of a result that reads another one, until a value is assigned to it."""

    def __init__(self, path: str) -> None:
        self._find = operator.attrgetter(path)

    def __get__(self, result: EtcdResult | None, _: object = None) -> Any:
        return self if result is None else self._find(result)


_forward: Callable[[str], Any] = _Forwarded


class EtcdResult:
    """The reply to a keys request, an event of a watch, or one node of a listing.

    action      get, set, create, update, delete, compareAndSwap, compareAndDelete, expire; ""
                for a node of a listing
    node        the present node, a frozen Node
    prev_node   the node before the change; None if there was none, and for get and create
    new_key     True if the request created the key
    etcd_index  store index at the reply (of an event: when the watch was accepted)
    relisted    True for an event that a watch derived by comparing listings, see Watch

    The attributes of `node` are attributes of the result too, also under python-etcd's names.
    They are assignable: `client.update(result)` writes `value` and `ttl`.  Results with equal
    attributes are equal.
    """

    action: str = ""
    node: Node
    prev_node: Node | None = None
    new_key: bool = False
    etcd_index: int = 0
    raft_index: int = 0
    raft_term: int = 0
    relisted: bool = False
    raw: Mapping[str, Any] = MappingProxyType({})
    value: str | None
    ttl: int | None
    key: str = _forward("node.key")
    dir: bool = _forward("node.dir")
    expiration: str | None = _forward("node.expiration")
    modified_index: int = _forward("node.modified_index")
    created_index: int = _forward("node.created_index")
    nodes: tuple[Node, ...] = _forward("node.nodes")
    modifiedIndex: int = _forward("modified_index")
    createdIndex: int = _forward("created_index")
    newKey: bool = _forward("new_key")
    _node_props: ClassVar[dict[str, Any]] = {    # compared by ==, as in python-etcd
        "key": None, "value": None, "expiration": None, "ttl": None, "modifiedIndex": None,
        "createdIndex": None, "newKey": False, "dir": False}

    def __init__(self, action: str | None = None, node: Node | Mapping[str, Any] | None = None,
                 prevNode: Node | Mapping[str, Any] | None = None, *, new_key: bool = False,
                 etcd_index: int = 0, raft_index: int = 0, raft_term: int = 0,
                 relisted: bool = False, raw: Mapping[str, Any] | None = None) -> None:
        present = _as_node(node or {})
        self.__dict__.update(
            action=action or "", node=present,
            prev_node=None if prevNode is None else _as_node(prevNode),
            new_key=new_key or bool(present.raw.get("newKey")), etcd_index=etcd_index,
            raft_index=raft_index, raft_term=raft_term, relisted=relisted,
            raw=raw or {}, value=present.value, ttl=present.ttl)

    @property
    def _prev_node(self) -> EtcdResult | None:
        return None if self.prev_node is None else EtcdResult(node=self.prev_node)

    def get_subtree(self, leaves_only: bool = False) -> Iterator[EtcdResult]:
        """Yield this and all listed nodes, parents first; `leaves_only`: those without children."""
        if not self.nodes or not leaves_only:
            yield self
        for child in self.nodes:
            result = EtcdResult.__new__(EtcdResult)     # other attributes come from the class
            fields = result.__dict__
            fields["node"], fields["value"], fields["ttl"] = child, child.value, child.ttl
            if child.nodes:
                yield from result.get_subtree(leaves_only)
            else:
                yield result

    @property
    def leaves(self) -> Iterator[EtcdResult]:
        """Files and empty directories of the listing; a file or an empty directory alone.

        `children` is the same, as in python-etcd; `nodes` has the direct children.
        """
        return self.get_subtree(leaves_only=True)

    children = leaves

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EtcdResult):
            return NotImplemented
        return self.nodes == other.nodes and all(
            getattr(self, name) == getattr(other, name) for name in self._node_props)

    __hash__ = None                 # type: ignore[assignment]  # attributes may change

    def __repr__(self) -> str:
        return f"EtcdResult({self.action!r}, {self.node!r}, {self.prev_node!r})"


Result = EtcdResult


def _as_node(node: Node | Mapping[str, Any]) -> Node:
    return node if isinstance(node, Node) else Node.from_json(node)


@dataclass(frozen=True)
class Member:
    """A server of the cluster; `name` and `client_urls` are empty until it has started."""

    id: str
    name: str
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Member:
        return cls(raw["id"], raw["name"], tuple(raw.get("peerURLs") or ()),
                   tuple(raw.get("clientURLs") or ()), raw)


def _expect_object(payload: Any) -> dict[str, Any]:
    if not isinstance(payload, dict):
        raise ValueError("not a JSON object")
    return payload


def _parse_result(reply: _Reply) -> EtcdResult:
    raw = _expect_object(reply.json())
    previous = raw.get("prevNode")
    return EtcdResult(
        raw["action"], _expect_object(raw["node"]),
        None if previous is None else _expect_object(previous), new_key=reply.status == 201,
        etcd_index=reply.header_number("X-Etcd-Index"),
        raft_index=reply.header_number("X-Raft-Index"),
        raft_term=reply.header_number("X-Raft-Term"), raw=raw)


def _parse_object(reply: _Reply) -> dict[str, Any]:
    return _expect_object(reply.json())


def _parse_members(reply: _Reply) -> list[Member]:
    return [Member.from_json(raw) for raw in _parse_object(reply)["members"]]


def _keep_reply(reply: _Reply) -> _Reply:
    return reply


def _describe_reply(reply: _Reply) -> str:
    """Return the status of a reply that is not etcd's, and its text if that is a sentence."""
    text = " ".join(reply.body[:1000].decode("utf-8", "replace").split())
    status = f"HTTP status {reply.status}"
    return f"{status}: {text[:200]}" if text.isprintable() and text[:1] not in "<{[" else status


def _status_error(reply: _Reply, endpoint: str, *, write: bool) -> EtcdError:
    """Return the error for an error reply.

    After a 5xx to a write the proposal may be in a log and be applied when the quorum returns (as
    in etcd 2.3), or a proxy may have lost the reply.  A 303 means that the write was applied.
    """
    maybe_applied = write and (reply.status >= 500 or reply.status == 303)
    try:
        payload = {**_expect_object(reply.json()), "status": reply.status}
    except (ValueError, RecursionError):
        payload = {"status": reply.status}
    # The members and auth APIs refuse a user or password without the header.
    of_etcd = "message" in payload and (reply.status == 401 or "X-Etcd-Cluster-Id" in reply.headers)
    if of_etcd or isinstance(payload.get("errorCode"), int):
        return EtcdError.from_payload(payload, endpoint=endpoint, maybe_applied=maybe_applied)
    message = str(payload.get("message", "")) or _describe_reply(reply)
    if 300 <= reply.status < 400:
        message = f"redirected to {reply.headers.get('Location')}: not followed"
    return HttpError(
        message, payload, status=reply.status, endpoint=endpoint, maybe_applied=maybe_applied)
