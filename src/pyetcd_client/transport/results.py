"""Results: frozen values made from the JSON of an answer.

Names are the JSON keys in snake_case; `raw` is the JSON itself.
"""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import (
    Any,
    ClassVar,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
    TypeVar,
    Union,
)

from requests.structures import CaseInsensitiveDict

_T = TypeVar("_T")


class _Reply(NamedTuple):
    """One HTTP answer, read to its end; what `Client.api_execute` returns."""

    status: int
    headers: Mapping[str, str]      # names in any case
    body: bytes

    @property
    def data(self) -> bytes:
        """The body, as python-etcd calls it."""
        return self.body

    def getheader(self, name: str, default: Optional[str] = None) -> Optional[str]:
        """Return a header by its name in any case."""
        return self.headers.get(name, default)

    def getheaders(self) -> Mapping[str, str]:
        """Return all headers; names are found in any case."""
        return self.headers

    def header_number(self, name: str) -> int:
        """Return a numeric header; 0 if it is missing or not a number."""
        text = self.headers.get(name, "")
        return int(text) if text.isdigit() and text.isascii() else 0

    def json(self) -> Any:
        """Return the body decoded; raise ValueError if it is not JSON."""
        return json.loads(self.body.decode("utf-8", "replace"))


def _as_reply(answer: Any) -> _Reply:
    """Return an answer that a program got by its own means, urllib3's for instance."""
    if isinstance(answer, _Reply):
        return answer
    headers = answer.headers if hasattr(answer, "headers") else answer.getheaders()
    return _Reply(answer.status, CaseInsensitiveDict(headers), answer.data)


@dataclass(frozen=True)
class Node:
    """A file or a directory at one moment.

    value       None for a directory, and in the answer to a delete
    ttl         seconds left, rounded up; None if permanent.  0 or less: expired, not yet removed
    expiration  RFC 3339 instant in UTC as the server sent it; None if permanent
    nodes       visible children of a listed directory
    """

    key: str
    value: Optional[str] = None
    dir: bool = False
    ttl: Optional[int] = None
    expiration: Optional[str] = None
    modified_index: int = 0
    created_index: int = 0
    nodes: Tuple[Node, ...] = field(default_factory=tuple)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Node:
        """Return the node a server described; the root has no key in JSON and is "/" here.

        Children are made when somebody asks for them: a listing of 1,000 costs half as much.
        """
        get, node = raw.get, cls.__new__(cls)
        fields = node.__dict__                      # the way around a frozen one's __init__
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
            raise TypeError("a child is no object")
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


class _Shown:
    """An attribute found elsewhere in a result, until another value is assigned to it."""

    def __init__(self, where: str) -> None:
        self._find = operator.attrgetter(where)

    def __get__(self, result: Optional[EtcdResult], _: object = None) -> Any:
        return self if result is None else self._find(result)


def _shown(where: str) -> Any:
    return _Shown(where)


class EtcdResult:
    """The answer to a keys request, or an event of a watch; or one node of a listing.

    action      get, set, create, update, delete, compareAndSwap, compareAndDelete, expire; ""
                for a node of a listing
    node        what is there now, as a frozen Node
    prev_node   what was there before; None if nothing was, and for get and create
    new_key     whether the request made the key
    etcd_index  store index when the request was answered (for an event: accepted)
    relisted    True for an event which a watch worked out by comparing listings, see Watch

    The attributes of `node` are attributes of the result too, also by python-etcd's names.  They
    may be assigned: `client.update(result)` then writes `value` and `ttl`.  Results are equal if
    they show the same.
    """

    action: str = ""
    node: Node
    prev_node: Optional[Node] = None
    new_key: bool = False
    etcd_index: int = 0
    raft_index: int = 0
    raft_term: int = 0
    relisted: bool = False
    raw: Mapping[str, Any] = MappingProxyType({})
    value: Optional[str]
    ttl: Optional[int]
    key: str = _shown("node.key")
    dir: bool = _shown("node.dir")
    expiration: Optional[str] = _shown("node.expiration")
    modified_index: int = _shown("node.modified_index")
    created_index: int = _shown("node.created_index")
    nodes: Tuple[Node, ...] = _shown("node.nodes")
    modifiedIndex: int = _shown("modified_index")
    createdIndex: int = _shown("created_index")
    newKey: bool = _shown("new_key")
    _node_props: ClassVar[Dict[str, Any]] = {    # what is compared, as in python-etcd
        "key": None, "value": None, "expiration": None, "ttl": None, "modifiedIndex": None,
        "createdIndex": None, "newKey": False, "dir": False}

    def __init__(
        self, action: Optional[str] = None, node: Union[Node, Mapping[str, Any], None] = None,
        prevNode: Union[Node, Mapping[str, Any], None] = None, *, new_key: bool = False,
        etcd_index: int = 0, raft_index: int = 0, raft_term: int = 0, relisted: bool = False,
        raw: Optional[Mapping[str, Any]] = None,
    ) -> None:
        present = _as_node(node or {})
        self.__dict__.update(
            action=action or "", node=present,
            prev_node=None if prevNode is None else _as_node(prevNode),
            new_key=new_key or bool(present.raw.get("newKey")), etcd_index=etcd_index,
            raft_index=raft_index, raft_term=raft_term, relisted=relisted,
            raw=raw or {}, value=present.value, ttl=present.ttl)

    @property
    def _prev_node(self) -> Optional[EtcdResult]:
        return None if self.prev_node is None else EtcdResult(node=self.prev_node)

    def get_subtree(self, leaves_only: bool = False) -> Iterator[EtcdResult]:
        """Yield this node and all listed below it, parents before their children.

        leaves_only  only those without children: files and empty directories
        """
        if not self.nodes or not leaves_only:
            yield self
        for child in self.nodes:
            result = EtcdResult.__new__(EtcdResult)     # what is not set is as the class has it
            fields = result.__dict__
            fields["node"], fields["value"], fields["ttl"] = child, child.value, child.ttl
            if child.nodes:
                yield from result.get_subtree(leaves_only)
            else:
                yield result

    @property
    def leaves(self) -> Iterator[EtcdResult]:
        """Files and empty directories listed below; for a file or an empty directory, itself."""
        return self.get_subtree(leaves_only=True)

    @property
    def children(self) -> Iterator[EtcdResult]:
        """The same as `leaves`; `nodes` has the direct children."""
        return self.leaves

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EtcdResult):
            return NotImplemented
        return self.nodes == other.nodes and all(
            getattr(self, name) == getattr(other, name) for name in self._node_props)

    __hash__ = None                 # type: ignore[assignment]  # attributes may change

    def __repr__(self) -> str:
        return f"EtcdResult({self.action!r}, {self.node!r}, {self.prev_node!r})"


Result = EtcdResult


def _as_node(node: Union[Node, Mapping[str, Any]]) -> Node:
    return node if isinstance(node, Node) else Node.from_json(node)


@dataclass(frozen=True)
class Member:
    """A server of the cluster; `name` and `client_urls` are empty until it has started."""

    id: str
    name: str
    peer_urls: Tuple[str, ...]
    client_urls: Tuple[str, ...]
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Member:
        """Return the member a server described."""
        return cls(
            id=raw["id"], name=raw["name"], peer_urls=tuple(raw.get("peerURLs") or ()),
            client_urls=tuple(raw.get("clientURLs") or ()), raw=raw,
        )


def _expect_object(payload: Any) -> Dict[str, Any]:
    if not isinstance(payload, dict):
        raise ValueError("not a JSON object")
    return payload


def _parse_result(reply: _Reply) -> EtcdResult:
    raw = _expect_object(reply.json())
    previous = raw.get("prevNode")
    return EtcdResult(
        raw["action"], _expect_object(raw["node"]),
        None if previous is None else _expect_object(previous),
        new_key=reply.status == 201,
        etcd_index=reply.header_number("X-Etcd-Index"),
        raft_index=reply.header_number("X-Raft-Index"),
        raft_term=reply.header_number("X-Raft-Term"),
        raw=raw)


def _parse_object(reply: _Reply) -> Dict[str, Any]:
    return _expect_object(reply.json())


def _parse_maybe_object(reply: _Reply) -> Dict[str, Any]:
    return _parse_object(reply) if reply.body.strip() else {}


def _parse_members(reply: _Reply) -> List[Member]:
    return [Member.from_json(raw) for raw in _parse_object(reply)["members"]]


def _parse_member(reply: _Reply) -> Member:
    return Member.from_json(_parse_object(reply))


def _parse_machines(reply: _Reply) -> List[str]:
    urls = (url.strip() for url in reply.body.decode("utf-8", "replace").split(","))
    return [url for url in urls if url]


def _parse_nothing(reply: _Reply) -> None:
    """There is nothing in a 204."""


def _parse_not(reply: _Reply) -> _Reply:
    """Return the answer as it is."""
    return reply


def _parse_leader(reply: _Reply) -> Optional[Member]:
    raw = _parse_object(reply)
    return Member.from_json(raw) if reply.status == 200 else None


def _parse_health(reply: _Reply) -> bool:
    # A string in 2.x and 3.4, a boolean in the "nhealth" form etcdctl also accepts.
    return _parse_object(reply)["health"] in ("true", True)


def _parse_version(reply: _Reply) -> Dict[str, str]:
    text = reply.body.decode("utf-8", "replace").strip()
    if text.startswith("etcd "):                    # etcd 2.0 answers "etcd 2.0.13"
        return {"etcdserver": text[5:]}
    return {str(name): str(value) for name, value in _parse_object(reply).items()}
