#!/usr/bin/env python3
"""A client for the etcd v2 keys API (pyetcd, etcd 2.x, etcd 3.4 with --enable-v2).
    from pyetcd_client import Client, KeyNotFound

    client = Client()                                  # http://127.0.0.1:2379
    client = Client(["http://10.0.0.1:2379", "10.0.0.2:2379"])
    client.set("foo", "bar", ttl=60).modified_index
    client.get("foo").value
    client.compare_and_swap("foo", "new", prev_value="bar")
    for event in client.watch("/config", recursive=True):
        print(event.action, event.key, event.value)

The client never guesses.  A request goes to another endpoint only if the first connection was
never made, or if it is a read.  When the fate of a write is unknown (its answer was lost, late or
unreadable, or the server gave up on it) the error raised says `maybe_applied=True`, and nothing is
sent again: what to do then is for the caller to decide, who knows whether it may happen twice.

`python -m pyetcd_client` is a command line: etcdctl 2.3, and export, mirror, top and others.

Rooms and their modules, bottom up; each uses only names defined above it:

  transport: defaults, errors, results, connections, endpoints, calls
  client:    users, verbs, watching, client
  recipes:   basics, leases, locks, elections, barriers, copies, queues, services
  ctl:       output, program, etcdctl, transfer, more

Sources: etcd 2.3 API (keys, members, errorcode), etcdctl 2.3.8, RFC 9110 section 9.2.
"""

# Built from src/ by build.py: change it there.

import sys

if sys.version_info < (3, 9):
    _why = "pyetcd_client needs Python 3.9 or later, and this is " + sys.version.split()[0]
    if __name__ == "__main__":
        sys.exit(_why)
    raise ImportError(_why) from None   # pyetcd_client needs Python 3.9 or later

import os

try:
    import requests  # noqa: F401
except ImportError:
    if __name__ == "__main__" or os.path.basename("".join(sys.argv[:1])) == "pyetcdctl":
        sys.exit("pyetcdctl needs the package requests: pip install requests (or, from Debian: "
                 "apt install python3-requests)")
    raise

import base64
import concurrent.futures
import contextlib
import contextvars
import datetime
import enum
import getpass
import http
import http.client
import importlib
import io
import itertools
import json
import logging
import math
import operator
import random
import re
import requests
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
import uuid
import weakref
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from requests.utils import select_proxy
from types import MappingProxyType
from typing import (
    Any,
    AsyncIterator,
    Callable,
    ClassVar,
    Container,
    Deque,
    Dict,
    FrozenSet,
    Generic,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    List,
    Mapping,
    Match,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    TYPE_CHECKING,
    Tuple,
    Type,
    TypeVar,
    Union,
    ValuesView,
    cast,
    overload,
)
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urljoin, urlsplit
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError as UrllibError
from urllib3.util.connection import is_connection_dropped

if TYPE_CHECKING:
    from typing_extensions import Concatenate, ParamSpec

__all__ = [
    "__version__", "EtcdError", "ApiError", "KeyNotFound", "CompareFailed", "NotFile", "NotDir",
    "NodeExists", "RootReadOnly", "DirNotEmpty", "Unauthorized", "PrevValueRequired",
    "TtlNotANumber", "IndexNotANumber", "InvalidField", "InvalidForm", "RefreshValue",
    "RefreshTtlRequired", "RaftInternal", "LeaderElectionInProgress", "WatcherCleared",
    "EventIndexCleared", "HttpError", "BadReply", "TransportError", "ConnectionFailed",
    "RequestTimeout", "WatchTimeout", "ClusterIdChanged", "Cancelled", "LockExpired",
    "EtcdKeyError", "EtcdValueError", "EtcdException", "EtcdKeyNotFound", "EtcdCompareFailed",
    "EtcdNotFile", "EtcdNotDir", "EtcdAlreadyExist", "EtcdRootReadOnly", "EtcdDirNotEmpty",
    "EtcdInsufficientPermissions", "EtcdLeaderElectionInProgress", "EtcdWatcherCleared",
    "EtcdEventIndexCleared", "EtcdConnectionFailed", "EtcdWatchTimedOut",
    "EtcdClusterIdChanged", "EtcdLockExpired", "Node", "EtcdResult", "Result", "Member",
    "Scope", "Endpoints", "ConnectionState", "Watch", "WatchedChange", "to_thread", "each",
    "EtcdUser", "EtcdRole", "Auth", "auth", "Client", "retry", "Heartbeat", "Lease",
    "Contender", "Lock", "RLock", "RWLock", "Semaphore", "Observed", "Leader", "Election",
    "QueueItem", "Queue", "Barrier", "DoubleBarrier", "Counter", "CachedTree", "ChildrenWatch",
    "DataWatch", "Instance", "Registration", "ServiceRegistry", "Party",
]


# ============================================================================
# transport/defaults -- Defaults and limits of the client.
# ============================================================================


__version__ = "0.4.0"

DEFAULT_ENDPOINT = "http://127.0.0.1:2379"
CONNECT_TIMEOUT_S = 2.0         # per address of an endpoint; then the next endpoint is tried
READ_TIMEOUT_S = 60.0           # silence of a server
TOTAL_TIMEOUT_S = 30.0          # one call: over all endpoints, attempts and pieces of an answer
SESSION_TIMEOUT_S = 10.0        # without an answer, until the connection counts as lost
SYNC_INTERVAL_S = 60.0          # age at which the member list is asked for again
SYNC_TIMEOUT_S = 2.0            # for asking; a call that waits for it goes on without after that
TRY_S = 1.5                     # for the requests of what must not wait (timeout=0)
WAIT_MAX_S = 1e6                # without a limit; sockets take no more than 24 days
IDLE_CLOSE_S = 3.0              # a connection that was idle for longer is not used again
WATCH_POLL_S = 60.0             # a silent watch is asked anew, in case a proxy has forgotten it
WATCH_PROBE_S = 5.0             # a silent watch sees whether the server still answers
WATCH_HEAD_S = 1.0              # wait for the head of a watch, then see; doubled after failures
WATCH_SETTLE_S = 1.0            # silent for so long after a head: nothing was in the history
WATCH_LOOK_S = 0.2              # with timeout=0: wait for what follows a head at once
HISTORY_EVENTS = 1000           # that etcd remembers
BACKOFF_MIN_S = 0.05            # wait after a round in which every endpoint failed; doubled,
BACKOFF_MAX_S = 1.0             # up to this
READ_BUFFER_BYTES = 16384       # read from a socket at once
HEADER_BYTES_MAX = 65536        # of one header
HEADERS_MAX = 100               # of one answer
DNS_ANSWER_S = 2.0              # wait for one name server; then the next is asked
DNS_SLICE_S = 0.02              # of it: nobody can wake who waits for a datagram
RESOLV_CONF = "/etc/resolv.conf"
REDIRECTS_MAX = 5               # of one read; more raise BadReply


_log = logging.getLogger("pyetcd_client")


# ============================================================================
# transport/errors -- Errors: one class per error code of etcd, and those of the transport.
# ============================================================================


_CODES_BY_STATUS = {401: 110, 404: 100}         # of answers without a code: members, auth


class EtcdError(Exception):
    """Root of everything this module raises about a server or the way to it.

    message        what went wrong, without the endpoint
    payload        the JSON of the error answer and its HTTP `status`; {} if there was no answer
    code           etcd's error code; 0 if the answer had none, or there was no answer
    index          etcd index at the time of the error
    status         HTTP status; 0 if there was no answer
    endpoint       base URL of the server that was asked
    maybe_applied  True if this was a write which may have been, or may yet be, applied

    python-etcd calls it EtcdException.
    """

    code = 0
    error_exceptions: "ClassVar[Dict[int, Type[EtcdError]]]" = {}     # by etcd's code; may be changed

    def __init__(
        self, message: Optional[str] = "", payload: Optional[Mapping[str, Any]] = None,
        cause: Any = "", *, code: Optional[int] = None, index: int = 0, status: int = 0,
        endpoint: str = "", maybe_applied: bool = False,
    ) -> None:
        super().__init__(message or "")
        self.message = message or ""
        self.payload: Dict[str, Any] = dict(payload or {})
        self.code = self.code if code is None else code
        self.index = index
        self.status = status
        self.endpoint = endpoint
        self.maybe_applied = maybe_applied
        self.others: Tuple[EtcdError, ...] = ()     # from the endpoints tried after this one
        self._cause = cause

    @property
    def cause(self) -> Any:
        """etcd's cause, usually the key; without an answer, the exception from below."""
        return self._cause or self.__cause__ or ""

    @cause.setter
    def cause(self, cause: Any) -> None:
        """Say what it was, as programs do that raise these errors themselves."""
        self._cause = cause

    @property
    def failures(self) -> "Tuple[EtcdError, ...]":
        """One error per endpoint that was tried, in order; the first is this one."""
        return (self, *self.others)

    @classmethod
    def from_payload(
        cls, payload: Mapping[str, Any], *, endpoint: str = "", maybe_applied: bool = False,
    ) -> "EtcdError":
        """Return the error that the JSON of an answer, with its HTTP `status`, stands for.

        The keys API tells by a code.  Members and auth tell by the status: 401 is Unauthorized,
        404 KeyNotFound, anything else HttpError.
        """
        status, message = payload.get("status", 0), str(payload.get("message", ""))
        code, index = payload.get("errorCode"), payload.get("index")
        if not isinstance(code, int):
            code = _CODES_BY_STATUS.get(status, 0)
        error_class = cls.error_exceptions.get(code, ApiError if code else HttpError)
        return error_class(
            message or f"HTTP status {status}", payload, str(payload.get("cause", "")),
            code=code, index=index if isinstance(index, int) else 0, status=status,
            endpoint=endpoint, maybe_applied=maybe_applied)

    @classmethod
    def handle(cls, payload: Mapping[str, Any]) -> NoReturn:
        """Raise the error that the JSON of an answer stands for."""
        raise cls.from_payload(payload)

    def describe(self) -> str:
        """Return this error alone, as one line."""
        return f"{self.endpoint}: {self.message}" if self.endpoint else self.message

    def __str__(self) -> str:
        text = "; ".join(error.describe() for error in self.failures)
        return f"{text} (the write may have been applied)" if self.maybe_applied else text


class ApiError(EtcdError):
    """An error answer of the keys API; codes without a class of their own come as this one."""

    def describe(self) -> str:
        """Return code, message, cause and index in the form etcdctl prints them."""
        if not self._cause and not self.index:      # of the members or auth API, or our own
            return super().describe()
        return f"{self.code}: {self.message} ({self.cause}) [{self.index}]"


_ApiErrorType = TypeVar("_ApiErrorType", bound=Type[ApiError])


def _registered(code: int) -> Callable[[_ApiErrorType], _ApiErrorType]:
    """Make the decorated class the one raised for error `code`."""
    def register(error_class: "_ApiErrorType") -> "_ApiErrorType":
        error_class.code = code
        EtcdError.error_exceptions[code] = error_class
        return error_class
    return register


class EtcdKeyError(ApiError):
    """The tree does not allow it: there is no such key, or not of the kind that is needed."""


class EtcdValueError(ApiError, ValueError):
    """A value does not fit: an argument (raised before anything is sent), or one compared with."""


EtcdError.error_exceptions.update(dict.fromkeys((200, *range(204, 209)), EtcdValueError))


@_registered(100)
class KeyNotFound(EtcdKeyError, KeyError):
    """A path component does not exist; the cause is its path.  Also: no such user, role, member."""


@_registered(101)
class CompareFailed(EtcdValueError):
    """prev_value or prev_index does not hold; the cause shows given and stored."""


@_registered(102)
class NotFile(EtcdKeyError):
    """A directory stands where a file is needed."""


@_registered(104)
class NotDir(EtcdKeyError):
    """A file stands in the middle of the path."""


@_registered(105)
class NodeExists(EtcdKeyError):
    """create or mkdir found the key."""


@_registered(107)
class RootReadOnly(EtcdKeyError):
    """The root cannot be changed."""


@_registered(108)
class DirNotEmpty(EtcdValueError):
    """Deleting a directory with children, hidden ones included, needs recursive=True."""


@_registered(110)
class Unauthorized(ApiError):
    """Auth is enabled and the request lacks the right, or user and password are wrong."""


@_registered(201)
class PrevValueRequired(EtcdValueError):
    """prev_value was given, but empty."""


@_registered(202)
class TtlNotANumber(EtcdValueError):
    """ttl is not an unsigned integer."""


@_registered(203)
class IndexNotANumber(EtcdValueError):
    """prev_index or index is not an unsigned integer."""


@_registered(209)
class InvalidField(EtcdValueError):
    """A boolean parameter has another value, or does not fit the method."""


@_registered(210)
class InvalidForm(EtcdValueError):
    """The query or the body cannot be parsed, or is too large (10 MiB)."""


@_registered(211)
class RefreshValue(EtcdValueError):
    """A refresh came with a value."""


@_registered(212)
class RefreshTtlRequired(EtcdValueError):
    """A refresh came without a ttl."""


@_registered(300)
class RaftInternal(ApiError):
    """The request did not get through consensus in time; a write may be applied later."""


@_registered(301)
class LeaderElectionInProgress(ApiError):
    """There is no leader at the moment."""


@_registered(400)
class WatcherCleared(ApiError):
    """The member restored a snapshot, and its watchers with it."""


@_registered(401)
class EventIndexCleared(ApiError):
    """The index to watch from lies before the event history (1000 events)."""


class HttpError(EtcdError):
    """An error answer that is not one of the keys API: members, health, a proxy in between."""


class TransportError(EtcdError):
    """There was no usable answer."""


class ConnectionFailed(TransportError):
    """The connection could not be made, broke, or brought no answer.

    For a write, maybe_applied=False means that it was never made: the request was not sent.
    """


class RequestTimeout(ConnectionFailed):
    """The server did not answer in time."""


class WatchTimeout(RequestTimeout):
    """No event came in time; `index` is where the next watch must begin to miss none."""


class BadReply(TransportError):
    """The answer is not what etcd would say: garbage, cut short, or redirected for ever."""


class ClusterIdChanged(TransportError):
    """The answer comes from another cluster than earlier ones.

    A write was applied there.  Set `client.cluster_id = None` to accept the next cluster seen.
    """


class Cancelled(EtcdError):
    """Somebody cancelled the Scope of this wait, or closed its client.

    maybe_applied=True: a write had been sent.
    """


class LockExpired(EtcdError):
    """The key of a lock was gone while its holder still waited for it or relied on it."""


# What python-etcd calls them.
EtcdException = EtcdError
EtcdKeyNotFound = KeyNotFound
EtcdCompareFailed = CompareFailed
EtcdNotFile = NotFile
EtcdNotDir = NotDir
EtcdAlreadyExist = NodeExists
EtcdRootReadOnly = RootReadOnly
EtcdDirNotEmpty = DirNotEmpty
EtcdInsufficientPermissions = Unauthorized
EtcdLeaderElectionInProgress = LeaderElectionInProgress
EtcdWatcherCleared = WatcherCleared
EtcdEventIndexCleared = EventIndexCleared
EtcdConnectionFailed = ConnectionFailed
EtcdWatchTimedOut = WatchTimeout
EtcdClusterIdChanged = ClusterIdChanged
EtcdLockExpired = LockExpired


# ============================================================================
# transport/results -- Results: frozen values made from the JSON of an answer.
# ----------------------------------------------------------------------------
# Names are the JSON keys in snake_case; `raw` is the JSON itself.
# ============================================================================


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
    nodes: "Tuple[Node, ...]" = field(default_factory=tuple)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Node":
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

    def walk(self) -> "Iterator[Node]":
        """Yield every node below this one, parents before their children."""
        for child in self.nodes:
            yield child
            yield from child.walk()


class _Shown:
    """An attribute found elsewhere in a result, until another value is assigned to it."""

    def __init__(self, where: str) -> None:
        self._find = operator.attrgetter(where)

    def __get__(self, result: "Optional[EtcdResult]", _: object = None) -> Any:
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
    def _prev_node(self) -> "Optional[EtcdResult]":
        return None if self.prev_node is None else EtcdResult(node=self.prev_node)

    def get_subtree(self, leaves_only: bool = False) -> "Iterator[EtcdResult]":
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
    def leaves(self) -> "Iterator[EtcdResult]":
        """Files and empty directories listed below; for a file or an empty directory, itself."""
        return self.get_subtree(leaves_only=True)

    @property
    def children(self) -> "Iterator[EtcdResult]":
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
    def from_json(cls, raw: Mapping[str, Any]) -> "Member":
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


# ============================================================================
# transport/connections -- Connections: exchanges over requests and urllib3, and the state of the client.
# ----------------------------------------------------------------------------
# Turns what requests and urllib3 raise into the client's errors.
# ============================================================================


# -- scopes: one deadline, and one way to end, for all that waits


class _Here(threading.local):
    """What the running thread is at."""

    scope: "Optional[Scope]" = None                   # the innermost one entered
    exchange: "_Exchange"                             # the request it performs


_here = _Here()


class Scope:
    """How long all that runs below it may wait, and the way to end it from another thread.

        with Scope(timeout=5) as scope:
            client.get("a")
            lock.acquire()

    Every wait of this module in the thread that entered it, however deep below, has what time is
    left: a request, a retry, a watch ends as it does at a deadline of its own.  After `cancel`
    those waits, and all later ones, raise Cancelled within milliseconds.  Scopes may be nested:
    the earliest deadline rules, and the outer one cancels the inner one.

    timeout    seconds from now; None: no limit of its own; 0: what is below it tries once and does
               not wait for others or for better times, its requests take TRY_S at most
    within     other scopes that cancel this one while it is entered, such as `client.scope`
    deadline   monotonic seconds
    once       whether it must not wait: this or an outer one has timeout=0
    cancelled  whether anybody called `cancel`

    Threads do not inherit it: what a recipe does in the background has scopes of its own.
    Thread: one enters it, once; any may cancel, also before and after.  There is no lock: whoever
    writes first (`cancelled`, or the waker) looks at the other one afterwards.
    """

    __slots__ = ("deadline", "once", "cancelled", "pid", "_within", "_wakers", "_outer")

    def __init__(self, timeout: Optional[float] = None, *within: "Scope") -> None:
        if timeout is not None and not timeout >= 0:
            raise EtcdValueError(f"a timeout is seconds, None for no limit, not {timeout}")
        self.once = timeout == 0
        limit_s = math.inf if timeout is None else timeout or TRY_S
        self.deadline = time.monotonic() + limit_s
        self.cancelled = False
        self.pid = os.getpid()                      # a forked child must not wake the parent's
        self._within = within
        self._wakers: Dict[Callable[[], object], None] = {}
        self._outer: Optional[Scope] = None

    def cancel(self) -> None:
        """End every wait below with Cancelled, now and from now on."""
        self.cancelled = True
        if self.pid == os.getpid():
            for wake in list(self._wakers):
                wake()

    def left_s(self, longest_s: float = WAIT_MAX_S) -> float:
        """Return the seconds the next wait may take, 0 if the time is over.  Raises Cancelled."""
        if self.cancelled:
            raise Cancelled("cancelled")
        return max(0.0, min(longest_s, self.deadline - time.monotonic()))

    def wait(self, wait_s: float) -> bool:
        """Sleep; return whether there is time left after it.  Raises Cancelled."""
        woken = threading.Event()
        self.attach(woken.set)
        try:
            woken.wait(self.left_s(wait_s))
        finally:
            self.detach(woken.set)
        return self.left_s() > 0

    @property
    def calls(self) -> int:
        """How many waits there are just below it."""
        return len(self._wakers)

    def attach(self, wake: Callable[[], object]) -> None:
        """Have `wake()` called by whoever cancels; at once, if somebody did.  Perhaps twice."""
        self._wakers[wake] = None
        if self.cancelled:
            wake()

    def detach(self, wake: Callable[[], object]) -> None:
        """Forget `wake`."""
        self._wakers.pop(wake, None)

    def __enter__(self) -> "Scope":
        self._outer = _here.scope
        if self._outer is not None:
            self._within = (*self._within, self._outer)
        for scope in self._within:
            self.deadline = min(self.deadline, scope.deadline)
            self.once = self.once or scope.once
            scope.attach(self.cancel)
        _here.scope = self
        return self

    def __exit__(self, *_: object) -> None:
        _here.scope = self._outer
        for scope in self._within:
            scope.detach(self.cancel)


# -- connections: requests knows the way (TLS, proxies), http.client speaks


class _Exchange:
    """One request and its answer: how long it may take, how far it came, how to break it off.

    deadline    monotonic seconds for all of it, even if the answer trickles in
    silence_s   longest wait for the next bytes
    connect_s   longest wait for one address of the server
    on_silence  asked after `silence_s`: whether to wait on

    Thread: the one that performs it, except for `cancel`.
    """

    def __init__(self, deadline: float, silence_s: float, connect_s: float,
                 on_silence: Optional[Callable[[], bool]] = None) -> None:
        self.deadline = deadline
        self.silence_s = silence_s
        self.connect_s = connect_s
        self.on_silence = on_silence
        self.sent = False                           # a byte of the request may have arrived
        self.cancelled = False
        self._sock: Optional[socket.socket] = None  # what the performing thread may wait for
        self._spare: Optional[socket.socket] = None     # another descriptor of it, ours to close
        self._lock = threading.Lock()               # guards _sock; nothing is locked inside

    def left_s(self) -> float:
        """Return how long the next wait may be.  Raises OSError if there must be none."""
        if self.cancelled:
            raise ConnectionAbortedError("broken off")
        left_s = min(self.silence_s, self.deadline - time.monotonic(), WAIT_MAX_S)
        if left_s <= 0:
            raise socket.timeout("timed out")
        return left_s

    def is_patient(self) -> bool:
        """Whether to wait on after silence."""
        if self.on_silence is None or time.monotonic() >= self.deadline:
            return False
        patient = self.on_silence()
        _here.exchange = self                       # it may have made a call of its own
        return patient

    def use(self, sock: socket.socket, limit_s: float = math.inf) -> None:
        """Prepare `sock` for the next wait."""
        self._sock = sock                           # before the look at `cancelled`
        sock.settimeout(min(limit_s, self.left_s()))

    def connect(self, host: str, port: int) -> socket.socket:
        """Return a connection to the first address of `host` that takes one.  Raises OSError."""
        failure = OSError(f"{host} has no address")
        for family, kind, protocol, _, address in self._addresses(host, port):
            sock = socket.socket(family, kind, protocol)
            try:
                self.use(sock, self.connect_s)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect(address)
                self.use(sock, self.connect_s)      # a handshake has what is left
                return sock
            except OSError as error:
                sock.close()
                failure = error
        raise failure

    def _addresses(self, host: str, port: int) -> Sequence[Tuple[Any, ...]]:
        """Look a name up on a thread of its own: nothing else could end that in time."""
        with contextlib.suppress(socket.gaierror):
            return socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        found: concurrent.futures.Future[Sequence[Tuple[Any, ...]]] = concurrent.futures.Future()

        def look() -> None:
            try:
                found.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError) as error:
                found.set_exception(error)

        woken = threading.Event()
        found.add_done_callback(lambda _: woken.set())
        scope = cast(Scope, _here.scope)
        scope.attach(woken.set)
        threading.Thread(target=look, name=f"pyetcd-lookup {host}", daemon=True).start()
        woken.wait(self.left_s())
        scope.detach(woken.set)
        self.left_s()
        return found.result(0)

    def guard(self, sock: socket.socket) -> None:
        """Let `cancel` end what is done with `sock` by a library that takes it over."""
        self._sock = self._spare = sock.dup()

    def done(self) -> None:
        """Let go of the socket: from here on `cancel` does nothing."""
        with self._lock:
            self._sock = None
        if self._spare is not None:
            self._spare.close()

    def cancel(self) -> None:
        """End the exchange at once, with an error for who performs it."""
        self.cancelled = True                       # before the look at `_sock`
        with self._lock, contextlib.suppress(OSError):
            if self._sock is not None:
                # Not SSLSocket's own shutdown: that takes the TLS state from under the reader.
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)


class _TimedReader(io.RawIOBase):
    """The receiving side of a socket; no wait outlasts the exchange under way."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)    # the socket stays open as long as this

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return the stream http.client asks a socket for."""
        return io.BufferedReader(self, READ_BUFFER_BYTES)

    def readable(self) -> bool:
        """Say yes, as io wants to hear."""
        return True

    def readinto(self, buffer: Any) -> Optional[int]:
        """Fill `buffer` with what comes first.  Raises socket.timeout when it is too late."""
        exchange = _here.exchange
        while True:
            self._sock.settimeout(exchange.left_s())
            try:
                return self._sock.recv_into(buffer)
            except socket.timeout:
                if not exchange.is_patient():
                    raise

    def close(self) -> None:
        """Let go of the socket, which stays open."""
        self._raw.close()
        super().close()


class _Head(Dict[str, str]):
    """The headers of an answer, found by their names in any case; of one name the first counts."""

    def __init__(self, lines: Iterable[bytes] = ()) -> None:
        super().__init__()
        self._lower: Dict[str, str] = {}
        for line in lines:
            name, colon, value = line.decode("latin-1").partition(":")
            if colon and name[0:1] not in " \t":    # no continuation, which nobody here reads
                value = value.strip()
                self.setdefault(name, value)
                self._lower.setdefault(name.rstrip().lower(), value)

    def __getitem__(self, name: str) -> str:
        return self._lower[name.lower()]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._lower

    def get(self, name: str, default: Any = None) -> Any:
        """Return a header, or `default`."""
        return self._lower.get(name.lower(), default)


class _TimedResponse(http.client.HTTPResponse):
    """An answer that is read by way of a _TimedReader."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(cast(socket.socket, _TimedReader(sock)), *args, **kwargs)

    def begin(self, **_: Any) -> None:
        """Read the head; http.client's way, by the parser for mails, takes five times as long."""
        this = cast(Any, self)
        version, status, reason = this._read_status()
        head = self._read_head()
        while status == http.HTTPStatus.CONTINUE:
            version, status, reason = this._read_status()
            head = self._read_head()
        if not version.startswith(("HTTP/1.", "HTTP/0.9")):
            raise http.client.UnknownProtocol(version)
        self.version = 10 if version in ("HTTP/1.0", "HTTP/0.9") else 11
        this.code = self.status = status
        self.reason = reason.strip()
        this.headers = this.msg = head
        connection = head.get("connection", "").lower()
        this.chunked = head.get("transfer-encoding", "").lower() == "chunked"
        this.chunk_left = None
        length = head.get("content-length", "")
        counted = length.isdecimal() and len(length) < 20 and not this.chunked
        this.length = int(length) if counted else None
        if status in (204, 304) or status < 200 or this._method == "HEAD":
            this.length = 0
        this.will_close = not this.chunked and this.length is None or (
            "close" in connection if self.version == 11 else "keep-alive" not in connection)

    def _read_head(self) -> _Head:
        lines: List[bytes] = []
        for line in iter(lambda: self.fp.readline(HEADER_BYTES_MAX + 1), b""):
            if line in (b"\r\n", b"\n"):
                break
            lines.append(line)
            if len(line) > HEADER_BYTES_MAX or len(lines) > HEADERS_MAX:
                raise http.client.HTTPException("a head without an end")
        return _Head(lines)


class _HttpConnection(HTTPConnection):
    """A connection that keeps to the limits of the exchange it is used for."""

    response_class = _TimedResponse

    def _new_conn(self) -> socket.socket:
        exchange: _Exchange = _here.exchange
        return exchange.connect(self.host, self.port or self.default_port)

    def connect(self) -> None:
        """Connect, through a proxy if there is one, and agree on the encryption."""
        try:
            super().connect()
        except ValueError as error:                 # of urllib3 1.26: another host's certificate
            raise ssl.SSLCertVerificationError(str(error)) from error
        finally:
            _here.exchange.sent = False       # what went to a proxy is not the request

    def send(self, data: Any) -> None:
        """Send bytes of the request; from here on the server may have it."""
        if self.sock is None:
            self.connect()
        exchange: _Exchange = _here.exchange
        exchange.use(self.sock)
        exchange.sent = True
        super().send(data)


class _HttpsConnection(_HttpConnection, HTTPSConnection):
    """The same over TLS."""

    def _new_conn(self) -> socket.socket:
        sock = super()._new_conn()
        _here.exchange.guard(sock)                  # during the handshake
        return sock


class _HttpPool(HTTPConnectionPool):
    """Connections of ours; urllib3 knows how to make one."""

    ConnectionCls = _HttpConnection

    def new_connection(self) -> HTTPConnection:
        """Return a connection that is not open yet."""
        return cast(HTTPConnection, self._new_conn())

    def open_tunnel(self, connection: HTTPConnection) -> None:
        """Connect by way of a proxy that passes on what it cannot read."""
        self._prepare_proxy(connection)


class _HttpsPool(_HttpPool, HTTPSConnectionPool):
    """The same over TLS."""

    ConnectionCls = _HttpsConnection


class _Way(NamedTuple):
    """A connection to one endpoint, which is opened when it is used."""

    connection: HTTPConnection
    prefix: str                                     # of targets: a proxy wants whole URLs
    open_tunnel: Optional[Callable[[HTTPConnection], None]]
    headers: Mapping[str, str] = MappingProxyType({})   # for a proxy that reads the request

    def prepare(self) -> None:
        """Close what the other side has closed already; go through the proxy if there is one."""
        if self.connection.sock is not None and is_connection_dropped(self.connection):
            self.connection.close()
        if self.connection.sock is None and self.open_tunnel is not None:
            self.open_tunnel(self.connection)


class _Trust(NamedTuple):
    """Whom to believe, who we are, and who is in between; as requests takes them."""

    verify: Union[bool, str] = True
    cert: Union[None, str, Tuple[str, str]] = None
    proxies: Mapping[str, str] = MappingProxyType({})


class _Adapter(HTTPAdapter):
    """Requests' way to a server, over connections of ours."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Make the pools of direct connections."""
        super().init_poolmanager(*args, **kwargs)
        self._use_ours(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """Return the pools of connections by way of `proxy`."""
        manager = super().proxy_manager_for(proxy, **kwargs)
        self._use_ours(manager)
        return manager

    def way_to(self, endpoint: str, trust: _Trust) -> _Way:
        """Return a connection to `endpoint`.  Raises OSError if a certificate is missing."""
        proxies = dict(trust.proxies)
        if hasattr(self, "get_connection_with_tls_context"):
            request = requests.Request("GET", endpoint).prepare()
            found = self.get_connection_with_tls_context(
                request, trust.verify, proxies=proxies, cert=trust.cert)
        else:                                       # requests before 2.32
            found = self.get_connection(endpoint, proxies)
        self.cert_verify(found, endpoint, trust.verify, trust.cert)  # type: ignore[no-untyped-call]
        pool = cast(_HttpPool, found)
        if not select_proxy(endpoint, proxies):
            return _Way(pool.new_connection(), "", None)
        if endpoint.startswith("https:"):
            return _Way(pool.new_connection(), "", pool.open_tunnel)
        return _Way(pool.new_connection(), endpoint, None, pool.proxy_headers)

    @staticmethod
    def _use_ours(manager: Any) -> None:
        manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}


class _Connections:
    """A keep-alive connection to each endpoint, for one exchange after the other.

    Neither Session nor urllib3's urlopen is used: merging settings, retries and the wrapping of
    answers take longer than etcd's answer.
    """

    def __init__(self, trust: _Trust) -> None:
        self.pid = os.getpid()                      # a forked child must not use these sockets
        self._trust = trust
        self._adapter = _Adapter(pool_maxsize=1)
        self._ways: Dict[str, _Way] = {}
        self._used_at = time.monotonic()

    def perform(
        self, exchange: _Exchange, endpoint: str, method: str, target: str, form: Optional[bytes],
        headers: Mapping[str, str], on_head: Optional[Callable[[_Reply], None]],
    ) -> _Reply:
        """Send a request and read the answer.  Raises OSError, HTTPException or urllib3's errors.

        Connections that were idle for IDLE_CLOSE_S are closed first.  A server or a load balancer
        may close an idle connection while our request is on its way.  Such a request was probably
        not executed, but nobody can know, so for a write that is an error with
        maybe_applied=True.  A connection whose end has arrived already is replaced; the race
        that remains is made rare by not using one that was idle for IDLE_CLOSE_S, which is below
        the idle limits in common use (5 s and more).  The price is one round trip for a new one.
        """
        if self.is_stale():
            self.close()
        way = self._ways.get(endpoint)
        if way is None:
            way = self._ways[endpoint] = self._adapter.way_to(endpoint, self._trust)
        _here.exchange = exchange
        connection, body = way.connection, None
        try:
            way.prepare()
            http.client.HTTPConnection.request(
                connection, method, way.prefix + target, form, {**headers, **way.headers})
            response = http.client.HTTPConnection.getresponse(connection)
            known = cast(Mapping[str, str], response.headers)
            if on_head is not None and response.status == 200:
                on_head(_Reply(response.status, known, b""))
                _here.exchange = exchange     # a listener may have made a call of its own
            body = response.read()
            return _Reply(response.status, known, body)
        finally:
            if body is None:                        # what is left of the answer is not the next one
                connection.close()

    def is_stale(self) -> bool:
        """Whether the other side may be about to close the connections."""
        return time.monotonic() - self._used_at > IDLE_CLOSE_S

    def used(self) -> None:
        """Note that an exchange just ended: idle time counts from here."""
        self._used_at = time.monotonic()

    def close(self) -> None:
        """Close the connections; the next request makes new ones."""
        while self._ways:
            self._ways.popitem()[1].connection.close()
        self._adapter.close()


def _close_all(idle: Deque[_Connections]) -> None:
    """Close what nobody uses; what is in use is closed, or used again, by whoever uses it."""
    while idle:
        with contextlib.suppress(IndexError):       # another thread was faster
            idle.pop().close()


def _reason(error: BaseException) -> str:
    """Return what an error says, in a few words."""
    inner = next((item for item in error.args if isinstance(item, BaseException)), None)
    if inner is not None:                           # urllib3's errors about certificates
        return _reason(inner)
    if isinstance(error, http.client.BadStatusLine) and str(error)[:1] == "\x15":
        return "the server speaks TLS: use https://"
    if "WRONG_VERSION_NUMBER" in str(error) or "HTTP_REQUEST" in str(error):
        return "the server does not speak TLS: use http://"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def _transport_error(
    error: Exception, endpoint: str, exchange: _Exchange, *, write: bool,
) -> EtcdError:
    """Return `error` in our terms; a request that was not sent has not been applied."""
    timed_out = isinstance(error, (socket.timeout, TimeoutError))
    if exchange.cancelled:
        return Cancelled("cancelled", endpoint=endpoint, maybe_applied=write and exchange.sent)
    if not exchange.sent:
        # Refused, unreachable, unknown name, untrusted certificate.
        reason = "connect timed out" if timed_out else _reason(error)
        return ConnectionFailed(reason, endpoint=endpoint)
    if timed_out:
        return RequestTimeout("no answer in time", endpoint=endpoint, maybe_applied=write)
    return ConnectionFailed(_reason(error), endpoint=endpoint, maybe_applied=write)


def _said(reply: _Reply) -> str:
    """Return what an answer that is not etcd's says: its status, and a sentence if there is one."""
    text = " ".join(reply.body[:1000].decode("utf-8", "replace").split())
    status = f"HTTP status {reply.status}"
    return f"{status}: {text[:200]}" if text.isprintable() and text[:1] not in "<{[" else status


def _status_error(reply: _Reply, endpoint: str, *, write: bool) -> EtcdError:
    """Return the error an answer stands for.

    A 4xx is a refusal.  After a 5xx to a write the proposal may sit in a log and be applied when
    the quorum returns (etcd 2.3 does that), or whoever stands between us and etcd lost the answer.
    303 says that it was carried out, and where to look.
    """
    maybe_applied = write and (reply.status >= 500 or reply.status == 303)
    try:
        payload = {**_expect_object(reply.json()), "status": reply.status}
    except (ValueError, RecursionError):
        payload = {"status": reply.status}
    # Members and auth refuse a user or password without the header.
    of_etcd = "message" in payload and (
        reply.status == 401 or "X-Etcd-Cluster-Id" in reply.headers)
    if of_etcd or isinstance(payload.get("errorCode"), int):
        return EtcdError.from_payload(payload, endpoint=endpoint, maybe_applied=maybe_applied)
    message = str(payload.get("message", "")) or _said(reply)
    if 300 <= reply.status < 400:
        message = f"redirected to {reply.headers.get('Location')}: not followed"
    return HttpError(                               # whoever it was, it was not etcd
        message, payload, status=reply.status, endpoint=endpoint, maybe_applied=maybe_applied)


# -- connection states


class ConnectionState(enum.Enum):
    """What the last calls and watches of a client met; as kazoo's states.

    CONNECTED  a server answered
    SUSPENDED  no endpoint answered the last call; what was known may have changed meanwhile
    LOST       SUSPENDED for `session_timeout` seconds, or no server ever answered
    """

    CONNECTED = "CONNECTED"
    SUSPENDED = "SUSPENDED"
    LOST = "LOST"


_Listener = Callable[[ConnectionState], object]


def _call_back(function: Callable[..., Any], *args: Any) -> Any:
    """Call what a user of ours gave us; what it raises is logged: whoever is here is innocent."""
    try:
        return function(*args)
    except Exception:
        _log.exception("%r failed", function)
        return None


class _Connectivity:
    """The state of a client's connection, and who wants to hear of it.

    A timer turns SUSPENDED into LOST on time, even if nobody calls.  Thread: any.
    """

    def __init__(self, session_timeout_s: float) -> None:
        self.state = ConnectionState.LOST
        self.listeners: Tuple[_Listener, ...] = ()
        self._session_timeout_s = session_timeout_s
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()               # guards what follows, and `state`
        self._news: Deque[ConnectionState] = deque()    # not told yet
        self._telling = False                       # a thread tells them, in order
        self._timer: Optional[threading.Timer] = None

    def report(self, answered: bool) -> None:
        """Note the outcome of a call."""
        if answered == (self.state is ConnectionState.CONNECTED):
            return
        if self._pid != os.getpid():                # a forked child has no timer, and perhaps
            self._reset()                           # a lock that nobody will release
        if answered:
            self._move(ConnectionState.CONNECTED, ConnectionState.SUSPENDED, ConnectionState.LOST)
        else:
            self._move(ConnectionState.SUSPENDED, ConnectionState.CONNECTED)

    def close(self) -> None:
        """Stop the timer."""
        timer = self._timer
        if timer is not None:
            timer.cancel()

    def _lose(self) -> None:
        self._move(ConnectionState.LOST, ConnectionState.SUSPENDED)

    def _move(self, state: ConnectionState, *origins: ConnectionState) -> None:
        with self._lock:
            if self.state not in origins:           # another thread was first
                return
            self.state = state
            self._news.append(state)
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if state is ConnectionState.SUSPENDED:
                self._timer = threading.Timer(self._session_timeout_s, self._lose)
                self._timer.daemon = True
                self._timer.start()
        self._tell()

    def _tell(self) -> None:
        """Call the listeners, without the lock; changes reach all of them in order."""
        while True:
            with self._lock:
                if self._telling or not self._news:
                    return
                self._telling, state = True, self._news.popleft()
            try:
                for listener in self.listeners:
                    self._tell_one(listener, state)
            finally:
                with self._lock:
                    self._telling = False

    def _tell_one(self, listener: _Listener, state: ConnectionState) -> None:
        if _call_back(listener, state) is True:     # as for kazoo: once was enough
            self.remove(listener)

    def add(self, listener: _Listener) -> None:
        """Remember a listener."""
        self.listeners = (*self.listeners, listener)

    def remove(self, listener: _Listener) -> None:
        """Forget a listener; nothing happens if it is not known."""
        self.listeners = tuple(known for known in self.listeners if known != listener)


# ============================================================================
# transport/endpoints -- Endpoints: addresses of servers, and their discovery by SRV records.
# ============================================================================


_Address = Union[str, Tuple[str, int]]              # a URL, host, host:port, or (host, port)


def _base_url(text: str, protocol: str = "http") -> str:
    """Return `text` as scheme://host:port; raise ValueError if it does not name a server."""
    url = text.strip()
    if url.count(":") > 1 and not {"[", "/"}.intersection(url):     # an IPv6 address alone
        url = f"[{url}]"
    url = url if "://" in url else f"{protocol}://{url}"
    parts = urlsplit(url)
    try:
        valid = parts.port != 0
    except ValueError:                              # not a number, or above 65535
        valid = False
    if parts.scheme not in ("http", "https") or not parts.hostname or not valid:
        raise ValueError(f"endpoint {text!r} is not http://HOST:PORT or https://HOST:PORT")
    if parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"endpoint {text!r} has more than a scheme, a host and a port")
    return f"{parts.scheme}://{parts.netloc}"


def _listed_urls(
    host: Union[_Address, Sequence[_Address]], port: int, protocol: str,
) -> List[str]:
    """Return the URLs of the servers in `host`; `port` is for those that come without one."""
    urls: List[str] = []
    alone = isinstance(host, str) or (len(host) == 2 and isinstance(host[1], int))
    for item in cast(Sequence[_Address], [host] if alone else host):
        if isinstance(item, str):
            urls.extend(_with_port(_base_url(part, protocol), port) for part in item.split(","))
        else:
            name, number = item
            address = f"[{name}]:{number}" if ":" in name else f"{name}:{number}"
            urls.append(_base_url(address, protocol))
    return urls


def _with_port(url: str, port: int) -> str:
    return url if urlsplit(url).port is not None else _base_url(f"{url}:{port}")


class Endpoints:
    """The servers a client may ask: one is used until it fails, then the next in turn.

    given  those named at the start, or found in DNS; never forgotten
    urls   `given`, then those learned from the member list

    Thread: any.  There is no lock: what threads that fail at once may do to each other is to skip
    an endpoint, which is tried again in the next round.
    """

    def __init__(self, urls: Optional[Iterable[str]] = None) -> None:
        self.given: Tuple[str, ...] = ()
        self.urls: Tuple[str, ...] = ()
        self._current = ""                          # the endpoint in use; "" if there is none
        if urls is not None:
            self.give(urls)

    @property
    def current(self) -> str:
        """Base URL of the endpoint in use; "" before the first look into DNS."""
        return self._current

    def give(self, urls: Iterable[str]) -> None:
        """Replace those given at the start.  Raises ValueError if one is malformed, or none is."""
        listed = [urls] if isinstance(urls, str) else list(urls)
        cleaned = [_base_url(part) for url in listed for part in url.split(",")]
        if not cleaned:
            raise ValueError("at least one endpoint is needed")
        self.given = tuple(dict.fromkeys(cleaned))
        self.learn(())

    def learn(self, urls: Iterable[str]) -> None:
        """Replace what was learned from the member list; the one in use stays in use.

        Where all that were given are https, others are not taken: passwords would travel in clear.
        """
        secure = bool(self.given) and all(url.startswith("https:") for url in self.given)
        learned = [url for url in urls if url.startswith("https:") or not secure]
        self.urls = urls = tuple(dict.fromkeys([*self.given, *learned]))
        if self._current not in urls and urls:
            self._current = urls[0]

    def candidates(self) -> Tuple[str, ...]:
        """Return every endpoint once, the one in use first."""
        urls, current = self.urls, self._current
        position = urls.index(current) if current in urls else 0
        return urls[position:] + urls[:position]

    def failed(self, url: str) -> None:
        """Move on to the next endpoint, unless another thread has done so already."""
        urls = self.urls
        if url == self._current and url in urls:
            self._current = urls[(urls.index(url) + 1) % len(urls)]


# -- DNS: the standard library cannot ask for SRV records, and a package for the one question would
# be a dependency larger than this client


def _name_servers() -> List[Tuple[str, int]]:
    """Return the addresses of the system's name servers; without any, the local one."""
    found: List[Tuple[str, int]] = []
    with contextlib.suppress(OSError), open(RESOLV_CONF, encoding="utf-8") as lines:
        found = [(words[1], 53) for words in map(str.split, lines) if words[:1] == ["nameserver"]]
    return found or [("127.0.0.1", 53)]


def _dns_ask(server: Tuple[str, int], query: bytes, wait_s: float) -> bytes:
    """Return the answer of a name server, by TCP if it is too long for a datagram (RFC 1035)."""
    family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
    deadline = time.monotonic() + wait_s
    scope = _here.scope or Scope()
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(server)                        # the kernel drops what comes from others
        sock.send(query)
        answer = b""
        while answer[:2] != query[:2] or len(answer) < 12:
            left_s = deadline - time.monotonic()
            if scope.left_s() <= 0 or left_s <= 0:
                raise socket.timeout("no answer in time")
            sock.settimeout(min(left_s, DNS_SLICE_S))
            with contextlib.suppress(socket.timeout):
                answer = sock.recv(65535)
    if not answer[2] & 2:
        return answer
    with socket.create_connection(server, wait_s) as sock, sock.makefile("rb") as stream:
        sock.sendall(struct.pack(">H", len(query)) + query)
        return stream.read(*struct.unpack(">H", stream.read(2)))


def _dns_name(message: bytes, offset: int) -> Tuple[str, int]:
    """Return a name, without the last dot, and the offset behind it; pointers are followed."""
    labels: List[str] = []
    behind = 0
    for _ in range(128):                            # more would be a loop of pointers
        size = message[offset]
        if size >= 0xC0:
            behind = behind or offset + 2
            offset = struct.unpack_from(">H", message, offset)[0] & 0x3FFF
        elif size:
            labels.append(message[offset + 1:offset + 1 + size].decode("latin-1"))
            offset += 1 + size
        else:
            return ".".join(labels), behind or offset + 1
    raise ValueError("a name without an end")


def _srv_records(message: bytes) -> List[Tuple[int, int, int, str]]:
    """Return (priority, weight, port, target) of the SRV records in a DNS answer."""
    questions, answers = struct.unpack_from(">2H", message, 4)
    offset, records = 12, []
    for _ in range(questions):
        offset = _dns_name(message, offset)[1] + 4
    for _ in range(answers):
        offset = _dns_name(message, offset)[1]
        kind, size = struct.unpack_from(">H6xH", message, offset)
        offset += 10
        if kind == 33:
            fields = struct.unpack_from(">3H", message, offset)
            records.append((*fields, _dns_name(message, offset + 6)[0]))
        offset += size
    return records


def _lookup_srv(name: str, deadline: float) -> List[str]:
    """Return host:port of the SRV records of `name`, in the random order of RFC 2782; [] if none.

    Raises OSError if no name server has a usable answer before `deadline`.
    """
    labels = [label.encode("idna") for label in name.strip(".").split(".")]
    question = b"".join(bytes((len(label),)) + label for label in labels) + b"\0\0\x21\0\x01"
    last: Exception = OSError("no time to ask a name server")
    for server in _name_servers() * 2:
        wait_s = min(DNS_ANSWER_S, deadline - time.monotonic())
        if wait_s <= 0:
            break
        query = struct.pack(">6H", random.randrange(1 << 16), 0x0100, 1, 0, 0, 0) + question
        try:
            answer = _dns_ask(server, query, wait_s)
            if answer[3] & 15 not in (0, 3):        # 3: there is no such name
                raise OSError(f"DNS error {answer[3] & 15}")
            records = _srv_records(answer)
        except (OSError, struct.error, IndexError, ValueError) as error:
            last = error
            continue
        records.sort(key=lambda r: (r[0], -random.random() ** (1 / (r[1] or 0.01))))
        return [f"{target}:{port}" for _, _, port, target in records]
    raise OSError(f"lookup of {name} failed: {last}") from last


def _discover(domain: str, protocol: str, deadline: float) -> List[str]:
    """Return the URLs of the servers that the SRV records of `domain` name.

    _etcd-client-ssl._tcp (https), else _etcd-client._tcp (http), as etcdctl 2.3 asks; else
    _etcd._tcp (`protocol`), as python-etcd asks.  Raises ConnectionFailed.
    """
    services = ("etcd-client-ssl", "https"), ("etcd-client", "http"), ("etcd", protocol)
    for service, scheme in services:
        try:
            found = _lookup_srv(f"_{service}._tcp.{domain}", deadline)
            if found:
                return [_base_url(address, scheme) for address in found]
        except (OSError, ValueError) as error:
            raise ConnectionFailed(str(error)) from error
    raise ConnectionFailed(f"there are no SRV records for etcd in {domain}")


# ============================================================================
# transport/calls -- Calls: one request over all endpoints, attempts and deadlines.
# ----------------------------------------------------------------------------
# _Caller._exchange is the only place that does I/O.
# ============================================================================


_READS: FrozenSet[str] = frozenset(("GET", "HEAD"))
_SUCCESS: FrozenSet[int] = frozenset((200, 201, 204))
_HEALTH_STATUSES: FrozenSet[int] = frozenset((200, 503))    # /health, /v2/members/leader
_FORM_TYPE = "application/x-www-form-urlencoded"
_JSON_TYPE = "application/json"

_REDIRECTS: FrozenSet[int] = frozenset((301, 302, 303, 307, 308))

_Field = Union[None, bool, int, str]                # a parameter; None leaves it out


def clean_key(key: str) -> str:
    """Return `key` as the server files it: one leading slash, no empty, `.` or `..` parts.

    Left to the server, such a key is answered by a redirect; left to urllib3, `..` would leave
    /v2/keys.
    """
    parts: List[str] = []
    for part in key.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


def _text(value: object) -> str:
    """Return a value as the text that is stored: text, UTF-8, a number, or what has a `__str__`.

    Raises EtcdValueError for what would not come back as it was given.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError as error:
            raise EtcdValueError("etcd stores text, and these bytes are not UTF-8: store "
                                 "base64.b64encode(value).decode()") from error
    if isinstance(value, str):
        text = str.__str__(value)                   # of an Enum its value
    elif isinstance(value, (int, float)) or type(value).__str__ is not object.__str__:
        text = str(value)
    elif value is None:
        raise EtcdValueError("None is not a value: delete the key, or store an empty text")
    else:
        raise EtcdValueError(
            f"etcd stores text, not a {type(value).__name__}: store json.dumps(value)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EtcdValueError("etcd stores text, and this is not all text: store "
                             "base64.b64encode(os.fsencode(value)).decode()") from error
    return text


_PLAIN = re.compile(r"[A-Za-z0-9_.~/-]*").fullmatch     # most keys: `quote` is slow to see that


def _quote_plus(text: str) -> str:
    plain = text.isalnum() and text.isascii()
    return text if plain else quote_plus(text, errors="surrogateescape")


def _encode_fields(fields: Mapping[str, _Field]) -> str:
    """Return the parameters that were given, form-encoded."""
    return "&".join(
        f"{_quote_plus(name)}="
        f"{_quote_plus(str(value).lower() if isinstance(value, bool) else str(value))}"
        for name, value in fields.items() if value is not None)


def _target(path: str, query: Mapping[str, _Field]) -> str:
    # Lone surrogates stand for bytes that are not UTF-8, as they come from sys.argv.
    path = path if _PLAIN(path) else quote(path, errors="surrogateescape")
    text = _encode_fields(query)
    return f"{path}?{text}" if text else path


def _keys_target(key: str, query: Mapping[str, _Field], endpoint: str = "/v2/keys") -> str:
    return _target(endpoint + clean_key(key), query)


class _NotGiven:
    """Stands for a condition that is left out: None, from a careless caller, must not."""


_NOT_GIVEN = _NotGiven()


def _conditions(prev_value: object, prev_index: object, prev_exist: object = _NOT_GIVEN,
                ) -> Dict[str, _Field]:
    """Return the conditions that were given; raise EtcdValueError for one that is none."""
    fields: Dict[str, _Field] = {}
    if prev_value is None or prev_index is None or prev_exist is None:
        raise EtcdValueError("a condition is None: leave it out, or say what to compare with")
    if prev_value is not _NOT_GIVEN:
        fields["prevValue"] = _text(prev_value)
    if prev_index is not _NOT_GIVEN:
        # To the server prevIndex=0 is no condition at all: the write would be unconditional.
        if isinstance(prev_index, int) and prev_index < 1:
            raise EtcdValueError("prev_index is a modified index, 1 or more")
        fields["prevIndex"] = _text(prev_index)
    if prev_exist is not _NOT_GIVEN:
        fields["prevExist"] = bool(prev_exist)
    return fields


@dataclass(frozen=True)
class _Call(Generic[_T]):
    """A request, independent of the endpoint it goes to."""

    method: str
    target: str                                     # path and query, percent-encoded
    parse: Callable[[_Reply], _T]
    form: Optional[bytes] = None
    content_type: str = _FORM_TYPE
    timeout: Optional[float] = None                 # seconds in all; None: the client's
    statuses: FrozenSet[int] = _SUCCESS             # those `parse` understands
    on_head: Optional[Callable[[_Reply], None]] = None  # called before a body that may take long
    waits: bool = False                             # silence is an answer, too

    @property
    def write(self) -> bool:
        """Whether sending it twice could matter."""
        return self.method not in _READS


def is_endpoint_failure(error: EtcdError) -> bool:
    """Whether another endpoint might do better: not after a refusal, which is an answer."""
    if isinstance(error, TransportError):
        return not isinstance(error, ClusterIdChanged)
    return error.status >= 500


if TYPE_CHECKING:
    _Settings = ParamSpec("_Settings")
_Made = TypeVar("_Made")
_CallerType = TypeVar("_CallerType", bound="_Caller")
_USER_AGENT = f"pyetcd-client/{__version__}"


_LASTING = (ssl.SSLError, FileNotFoundError, PermissionError, UrllibError)


def _lasts(error: EtcdError) -> bool:
    """Whether a failure will be the same in a moment: bad certificates, garbage."""
    broken_off = (ssl.SSLEOFError, ssl.SSLZeroReturnError)      # the server ended, as it may
    return isinstance(error, BadReply) or (
        isinstance(error.__cause__, _LASTING) and not isinstance(error.__cause__, broken_off))


def _backoff_s(rounds: int) -> float:
    """Return how long to wait after so many rounds of failures: longer each time, never alike."""
    longest_s = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2 ** min(rounds - 1, 10))
    return float(longest_s * random.uniform(0.5, 1.0))


def _environment() -> Dict[str, Any]:
    """Return what the ETCDCTL_* variables say, as arguments of Client."""
    given = {name: value for name, value in os.environ.items() if value}
    settings: Dict[str, Any] = {}
    for name in ("ETCDCTL_ENDPOINTS", "ETCDCTL_ENDPOINT", "ETCDCTL_PEERS"):
        if name in given:
            settings.setdefault("endpoints", given[name].split(","))
    if "ETCDCTL_DISCOVERY_SRV" in given and not settings:
        settings["srv_domain"] = given["ETCDCTL_DISCOVERY_SRV"]
    if "ETCDCTL_CERT_FILE" in given:
        pair = given["ETCDCTL_CERT_FILE"], given.get("ETCDCTL_KEY_FILE")
        settings["cert"] = pair if pair[1] else pair[0]
    if "ETCDCTL_CA_FILE" in given:
        settings["ca_cert"] = given["ETCDCTL_CA_FILE"]
    if "ETCDCTL_USERNAME" in given:
        settings["username"], _, password = given["ETCDCTL_USERNAME"].partition(":")
        settings["password"] = password or given.get("ETCDCTL_PASSWORD")
    return settings


def _with_settings_of(
    _: "Callable[Concatenate[Any, _Settings], None]",
) -> "Callable[[Callable[[Type[_Made]], _Made]], Callable[Concatenate[Type[_Made], _Settings], _Made]]":
    """Tell type checkers that a constructor takes the keyword arguments of another one."""
    return lambda function: cast(Any, function)


class _Caller:
    """What all parts of a client share: endpoints, connections, and the way a call goes.

    on_request  called with method, URL and form of each request before it is sent
    """

    on_request: Optional[Callable[[str, str, Optional[bytes]], object]] = None

    def __init__(
        self, host: Union[_Address, Sequence[_Address]] = "127.0.0.1", port: int = 2379,
        srv_domain: Optional[str] = None, version_prefix: str = "/v2",
        read_timeout: float = READ_TIMEOUT_S, allow_redirect: bool = True, protocol: str = "http",
        cert: Union[None, str, Tuple[str, str]] = None, ca_cert: Optional[str] = None,
        username: Optional[str] = None, password: Optional[str] = None,
        allow_reconnect: Optional[bool] = None, use_proxies: bool = False,
        expected_cluster_id: Optional[str] = None, per_host_pool_size: int = 10,
        lock_prefix: str = "/_locks", *, endpoints: Optional[Iterable[str]] = None,
        connect_timeout: float = CONNECT_TIMEOUT_S,
        total_timeout: Optional[float] = TOTAL_TIMEOUT_S,
        session_timeout: float = SESSION_TIMEOUT_S, sync: bool = False, retry: bool = True,
        verify: bool = True, proxies: Optional[Mapping[str, str]] = None,
        on_state: Optional[_Listener] = None,
    ) -> None:
        if min(read_timeout, total_timeout or 0) < 0 or min(connect_timeout, session_timeout) <= 0:
            raise EtcdValueError("timeouts are seconds above 0")
        if (username is None) != (password is None):
            raise EtcdValueError("username and password belong together")
        if any(not url.startswith(("http://", "https://")) for url in (proxies or {}).values()):
            raise EtcdValueError("a proxy is http://... or https://...")
        if srv_domain is None:
            if endpoints is not None:
                host = endpoints if isinstance(endpoints, str) else list(endpoints)
            self.endpoints = Endpoints(_listed_urls(host, port, protocol))
        else:
            self.endpoints = Endpoints()            # filled by the first call: no I/O here
        self.version_prefix = version_prefix
        self.read_timeout = read_timeout
        self.connect_timeout = connect_timeout
        self.total_timeout = total_timeout
        self.allow_redirect = allow_redirect
        self.username, self.password = username, password
        self.lock_prefix = lock_prefix
        self.cluster_id = expected_cluster_id       # hex; from the first answer if not given
        self._srv = None if srv_domain is None else (srv_domain, protocol)
        self._sync = (sync or bool(allow_reconnect)) and not use_proxies
        self._refresh_at = 0.0 if self._sync or srv_domain else math.inf    # monotonic seconds
        self._reconnect = allow_reconnect is not False
        self._retry = retry and self._reconnect
        self._reached = False                       # a request has left for a server
        self._trust = _Trust((ca_cert or True) if verify else False, cert, dict(proxies or {}))
        self._scope = Scope()                       # of all that is under way
        self._idle: Deque[_Connections] = deque()   # the last one used is used next
        # At exit, too: but not what a daemon thread is reading from, which would wait for it.
        weakref.finalize(self, _close_all, self._idle)
        self._idle_max = per_host_pool_size
        self._connectivity = _Connectivity(session_timeout)
        if on_state is not None:
            self.add_listener(on_state)

    @classmethod
    @_with_settings_of(__init__)
    def from_env(cls: Type[_CallerType], **settings: Any) -> _CallerType:
        """Return a client as the ETCDCTL_* variables describe it; `settings` have precedence.

        ETCDCTL_ENDPOINTS, else ETCDCTL_ENDPOINT, else ETCDCTL_PEERS; without those
        ETCDCTL_DISCOVERY_SRV.  ETCDCTL_CERT_FILE, ETCDCTL_KEY_FILE, ETCDCTL_CA_FILE.
        ETCDCTL_USERNAME: user:password, or the user alone beside ETCDCTL_PASSWORD.
        """
        given = _environment()
        if not settings.keys().isdisjoint(("host", "endpoints", "srv_domain")):
            given.pop("endpoints", None)
            given.pop("srv_domain", None)
        return cls(**{**given, **settings})

    # -- endpoints and states

    def sync(self) -> Tuple[str, ...]:
        """Ask for the member list, use the URLs in it too, and return all endpoints.

        Those given at the start stay.  With `sync=True` for the constructor this happens by
        itself: after the first call, after a failover, and about every SYNC_INTERVAL_S seconds.
        """
        self._learn_members(self._perform)
        return self.endpoints.urls

    @property
    def state(self) -> ConnectionState:
        """What the last calls and watches met; an idle client does not look."""
        return self._connectivity.state

    def add_listener(self, listener: _Listener) -> None:
        """Have `listener(state)` called at every change of `state`, in order.

        It runs in the thread that noticed the change and must not block: start a thread for
        what takes long.  It is removed when it returns True; what it raises is logged.
        """
        self._connectivity.add(listener)

    def remove_listener(self, listener: _Listener) -> None:
        """Call `listener` no more; nothing happens if it is not known."""
        self._connectivity.remove(listener)

    @property
    def key_endpoint(self) -> str:
        """Path of the keys API; a subclass may name another one."""
        return self.version_prefix + "/keys"

    @property
    def scope(self) -> Scope:
        """What all calls and watches of this client are within, until it is closed."""
        if self._scope.pid != os.getpid():          # what the parent waits for is not ours to end
            self._scope = Scope()
        return self._scope

    def close(self) -> None:
        """End every call and watch under way with Cancelled, and close the connections.

        So ends what recipes do with this client in the background.  New calls may follow.
        """
        scope, self._scope = self._scope, Scope()
        scope.cancel()
        self._connectivity.close()
        _close_all(self._idle)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.endpoints.urls or self._srv or ())!r})"

    def __enter__(self: _CallerType) -> _CallerType:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- below: no public names

    def _is_replaced(self, name: str = "api_execute") -> bool:
        """Whether the program has put something of its own in the place of a method."""
        return False

    def _perform(self, call: "_Call[_T]") -> _T:
        """Send `call` to one endpoint after the other, and again, as long as that is safe.

        Raises the error of the endpoint tried first, with those of the others in `failures`.
        """
        timeout = self.total_timeout if call.timeout is None else call.timeout
        with Scope(timeout, self.scope) as scope:
            self._discover_endpoints(scope.deadline)
            return self._perform_within(scope, call)

    def _perform_within(self, scope: Scope, call: "_Call[_T]") -> _T:
        deadline = scope.deadline
        failures: Dict[str, EtcdError] = {}
        for rounds in itertools.count(1):
            candidates = self.endpoints.candidates()[:None if self._reconnect else 1]
            for position, endpoint in enumerate(candidates):
                if position and time.monotonic() >= deadline:
                    break
                try:
                    result = self._attempt(endpoint, call, deadline, len(candidates) - position)
                except EtcdError as error:
                    failures[endpoint] = error
                    self._note_failure(endpoint, call, error)
                else:
                    self._note_success(bool(failures), deadline)
                    return result
            self._connectivity.report(False)
            self._pause(rounds, failures, scope)
        raise AssertionError("unreachable")

    def _note_success(self, after_failures: bool, deadline: float) -> None:
        self._connectivity.report(True)
        if self._sync and (after_failures or time.monotonic() >= self._refresh_at):
            with contextlib.suppress(EtcdError):    # the answer matters more
                until = min(deadline, time.monotonic() + SYNC_TIMEOUT_S)
                self._learn_members(
                    lambda call: self._attempt(self.endpoints.current, call, until))

    def _note_failure(self, endpoint: str, call: "_Call[Any]", error: EtcdError) -> None:
        """Give up `endpoint` if it failed; raise `error` again unless the next may be tried."""
        if isinstance(error, Cancelled):
            raise error
        if call.waits and isinstance(error, RequestTimeout):
            self._connectivity.report(True)
            raise WatchTimeout("no change in time", endpoint=endpoint) from error
        if not is_endpoint_failure(error):
            self._connectivity.report(True)
            raise error
        self._give_up(endpoint, error)
        never_sent = isinstance(error, ConnectionFailed) and not error.maybe_applied
        if call.write and not never_sent:
            self._connectivity.report(False)
            raise error

    def _give_up(self, endpoint: str, error: Optional[EtcdError] = None) -> None:
        if self._reconnect:
            self.endpoints.failed(endpoint)
            if self.endpoints.current != endpoint:
                _log.info("%s failed (%s): on to %s", endpoint,
                          error.message if error else "no answer", self.endpoints.current)

    def _pause(self, rounds: int, failures: Mapping[str, EtcdError], scope: Scope) -> None:
        """Wait before the next round; raise what the last one brought if there must be none.

        Without a deadline there is one round: nobody wants to wait for ever for a dead cluster.
        Nor is there a second one where nobody was ever reached: the address is wrong, most likely.
        """
        pause_s = _backoff_s(rounds)
        errors = failures.values()
        hopeless = scope.once or not (self._retry and self._reached) or all(map(_lasts, errors))
        if hopeless or scope.deadline == math.inf or scope.left_s() <= pause_s:
            first, *others = errors
            first.others = tuple(others)
            raise first
        scope.wait(pause_s)

    def _discover_endpoints(self, deadline: float) -> None:
        """Look the endpoints up in DNS, at first and then now and again."""
        now = time.monotonic()
        if self._srv is None or (now < self._refresh_at and self.endpoints.urls):
            return
        patience_s = deadline - now
        if self.endpoints.urls:                     # looked up again: the call needs its time
            patience_s = min(SYNC_TIMEOUT_S, patience_s / 2)
        try:
            self.endpoints.give(_discover(*self._srv, now + patience_s))
        except ConnectionFailed:
            if not self.endpoints.urls:             # else go on with the old ones
                raise
        if not self._sync:
            self._refresh_at = now + SYNC_INTERVAL_S

    def _learn_members(
        self, perform: "Callable[[_Call[List[Member]]], List[Member]]",
    ) -> None:
        self._refresh_at = time.monotonic() + SYNC_INTERVAL_S   # for other threads, and ours
        call = _Call("GET", f"{self.version_prefix}/members", _parse_members)
        urls = [url for member in perform(call) for url in member.client_urls]
        with contextlib.suppress(ValueError):       # nonsense in the list: keep what we have
            self.endpoints.learn([_base_url(url) for url in urls])

    def _attempt(
        self, endpoint: str, call: "_Call[_T]", deadline: float, sharers: int = 1,
    ) -> _T:
        """Send `call` to `endpoint` once.

        sharers  endpoints still to be tried: a read leaves them their part of the time that is left
        """
        if sharers > 1 and not (call.write or call.waits) and deadline < math.inf:
            deadline -= (deadline - time.monotonic()) * (sharers - 1) / sharers
        return self._request(endpoint, call, _Exchange(
            deadline, self.read_timeout or math.inf, self.connect_timeout))

    def _request(self, endpoint: str, call: "_Call[_T]", exchange: _Exchange) -> _T:
        """Perform `call` at `endpoint` and return what its answer means.

        Redirects of reads are followed, and of writes those with 307 and 308: who sends one has
        not carried out the request (RFC 9110 section 15.4), as followers of etcd 0.4 do.  Any
        other redirect of a write is an error; 303 says that it was carried out.
        """
        scope = cast(Scope, _here.scope)
        scope.attach(exchange.cancel)
        connections = self._take()
        base, target = endpoint, call.target
        try:
            for _ in range(REDIRECTS_MAX + 1):
                reply = self._exchange(base, target, call, exchange, connections)
                if reply.status not in _REDIRECTS or not self._follows(call, reply):
                    self._expect_cluster(base, reply, write=call.write)
                    return self._judge(base, call, reply)
                try:
                    where = urlsplit(urljoin(base + target, reply.headers.get("Location", "")))
                except ValueError as error:
                    raise BadReply("redirected to nowhere", endpoint=base) from error
                base, target = f"{where.scheme}://{where.netloc}", where._replace(
                    scheme="", netloc="", fragment="").geturl() or "/"
        finally:
            scope.detach(exchange.cancel)
            exchange.done()
            self._give_back(connections)
        raise BadReply("too many redirects", endpoint=base)

    def _follows(self, call: "_Call[Any]", reply: _Reply) -> bool:
        harmless = not call.write or reply.status in (307, 308)
        return self.allow_redirect and harmless and "Location" in reply.headers

    def _exchange(
        self, base: str, target: str, call: "_Call[Any]", exchange: _Exchange,
        connections: _Connections,
    ) -> _Reply:
        """Send one request and read its answer: the only place that does I/O."""
        exchange.sent = False
        if self.on_request is not None:
            self.on_request(call.method, base + target, call.form)
        headers = self._headers(base, call)
        began, outcome = time.monotonic(), "broken off"
        try:
            reply = connections.perform(
                exchange, base, call.method, target, call.form, headers, call.on_head)
            outcome = str(reply.status)
            return reply
        except (OSError, http.client.HTTPException, UrllibError, UnicodeError) as error:
            failure = _transport_error(error, base, exchange, write=call.write)
            outcome = failure.message
            raise failure from error
        finally:
            self._reached = self._reached or exchange.sent
            if _log.isEnabledFor(logging.DEBUG):    # without the query: it may hold a value
                _log.debug("%s %s%s: %s after %.1f ms", call.method, base, target.split("?")[0],
                           outcome, (time.monotonic() - began) * 1000)

    def _headers(self, base: str, call: "_Call[Any]") -> Dict[str, str]:
        headers = {"User-Agent": _USER_AGENT}
        if call.form is not None:
            headers["Content-Type"] = call.content_type
        if self.username is not None and base in self.endpoints.urls:   # not for where redirects
            credentials = f"{self.username}:{self.password}".encode()   # lead to
            headers["Authorization"] = "Basic " + base64.b64encode(credentials).decode()
        return headers

    def _take(self) -> _Connections:
        """Return connections for one exchange; whoever takes them gives them back."""
        while self._idle:
            with contextlib.suppress(IndexError):   # another thread was faster
                connections = self._idle.pop()
                if connections.pid == os.getpid():
                    return connections
                connections.close()                 # of a forked child: the parent has its own
        return _Connections(self._trust)

    def _give_back(self, connections: _Connections) -> None:
        connections.used()
        self._idle.append(connections)
        # In a rush keep one for each call under way, or every other call would make a new one.
        while len(self._idle) > max(self._idle_max, self.scope.calls):
            with contextlib.suppress(IndexError):   # another thread was faster
                self._idle.popleft().close()

    def _judge(self, endpoint: str, call: "_Call[_T]", reply: _Reply) -> _T:
        """Return what an answer means, or raise the error it stands for."""
        if reply.status not in call.statuses:
            raise _status_error(reply, endpoint, write=call.write)
        try:
            return call.parse(reply)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadReply(
                f"the answer cannot be understood ({error or type(error).__name__})",
                status=reply.status, endpoint=endpoint, maybe_applied=call.write) from error

    def _expect_cluster(self, endpoint: str, reply: _Reply, *, write: bool = False) -> None:
        cluster_id = reply.headers.get("X-Etcd-Cluster-Id")     # not of /version, /health, stats
        if cluster_id is not None and cluster_id != self.cluster_id:
            if self.cluster_id is not None:
                raise ClusterIdChanged(
                    f"cluster id is {cluster_id}, was {self.cluster_id}", status=reply.status,
                    endpoint=endpoint, maybe_applied=write and (
                    reply.status in _SUCCESS or reply.status == 303 or reply.status >= 500))
            self.cluster_id = cluster_id


# ============================================================================
# client/users -- Users and roles: methods of the client, and python-etcd's objects on top of them.
# ============================================================================


_PERMISSIONS = {"read": ("read",), "write": ("write",), "readwrite": ("read", "write")}


class _Users(_Caller):
    """Users, roles, and whether the server asks for them: the auth API of etcd 2.1 and later.

    All but `auth_status` need the role root once auth is enabled; else they raise Unauthorized.
    Dicts are the server's JSON.
    """

    # -- the switch

    def auth_status(self) -> Dict[str, Any]:
        """Return {"enabled": bool}; anybody may ask."""
        return self._auth_call("GET", "/enable")

    def auth_enable(self) -> None:
        """Let the server check every request.  Raises HttpError without a user root, or if it does.

        Whoever comes without a password has the role guest, which may do all until changed.
        """
        self._auth_call("PUT", "/enable", {})

    def auth_disable(self) -> None:
        """Let the server check nothing.  Raises HttpError if it does not check."""
        self._auth_call("DELETE", "/enable")

    # -- users

    def user_list(self) -> List[Dict[str, Any]]:
        """Return the users by name: [{"user": name, "roles": [role, ...]}, ...]."""
        users = self._auth_call("GET", "/users").get("users") or []
        return [{"user": user} if isinstance(user, str) else user for user in users]

    def user_get(self, name: str) -> Dict[str, Any]:
        """Return {"user": name, "roles": [role, ...]}.  Raises KeyNotFound."""
        return self._auth_call("GET", f"/users/{name}")

    def user_add(self, name: str, password: str, roles: Iterable[str] = ()) -> Dict[str, Any]:
        """Make a user.  Raises NodeExists.

        The server would take a second user_add without roles for a change of password; so we look
        first, and two calls at the same moment may both succeed.
        """
        if self._has_user(name):
            raise NodeExists(f"auth: User {name} already exists.")
        fields = {"user": name, "password": password, "roles": list(roles)}
        return self._auth_create(f"/users/{name}", fields)

    def user_remove(self, name: str) -> None:
        """Remove a user.  Raises KeyNotFound; HttpError for root while auth is enabled."""
        self._auth_call("DELETE", f"/users/{name}")

    def user_password(self, name: str, password: str) -> Dict[str, Any]:
        """Give a user another password.  Raises KeyNotFound."""
        if not self._has_user(name):                # the server would make the user
            raise KeyNotFound(f"auth: User {name} does not exist.")
        return self._auth_call("PUT", f"/users/{name}", {"user": name, "password": password})

    def user_grant(self, name: str, roles: Iterable[str]) -> Dict[str, Any]:
        """Give a user more roles.  Raises KeyNotFound; HttpError if one is granted already."""
        return self._auth_call("PUT", f"/users/{name}", {"user": name, "grant": list(roles)})

    def user_revoke(self, name: str, roles: Iterable[str]) -> Dict[str, Any]:
        """Take roles from a user.  Raises KeyNotFound; HttpError if one is not granted."""
        return self._auth_call("PUT", f"/users/{name}", {"user": name, "revoke": list(roles)})

    # -- roles

    def role_list(self) -> List[Dict[str, Any]]:
        """Return the roles by name; root, who may do all, is always there."""
        roles = self._auth_call("GET", "/roles").get("roles") or []
        return [{"role": role} if isinstance(role, str) else role for role in roles]

    def role_get(self, name: str) -> Dict[str, Any]:
        """Return {"role": name, "permissions": {"kv": {"read": [...], "write": [...]}}}.

        Raises KeyNotFound.
        """
        return self._auth_call("GET", f"/roles/{name}")

    def role_add(
        self, name: str, *, read: Iterable[str] = (), write: Iterable[str] = (),
    ) -> Dict[str, Any]:
        """Make a role that may read and write what is at these paths.  Raises NodeExists."""
        permissions = {"kv": {"read": list(read), "write": list(write)}}
        return self._auth_create(f"/roles/{name}", {"role": name, "permissions": permissions})

    def role_remove(self, name: str) -> None:
        """Remove a role.  Raises KeyNotFound.  Users keep its name, which means nothing then."""
        self._auth_call("DELETE", f"/roles/{name}")

    def role_grant(
        self, name: str, path: Union[str, Iterable[str]], kind: str = "readwrite",
    ) -> Dict[str, Any]:
        """Allow a role to `read`, `write` or `readwrite` what is at `path`.

        path  a key, or what all keys begin with if it ends in `*`; or several of them

        Raises KeyNotFound; HttpError if it is granted already.
        """
        return self._role_change(name, "grant", path, kind)

    def role_revoke(
        self, name: str, path: Union[str, Iterable[str]], kind: str = "readwrite",
    ) -> Dict[str, Any]:
        """Take back what `role_grant` gave.  Raises KeyNotFound."""
        return self._role_change(name, "revoke", path, kind)

    # -- below: no public names

    def _auth_call(
        self, method: str, path: str, fields: Optional[Mapping[str, Any]] = None,
    ) -> Dict[str, Any]:
        body = None if fields is None else json.dumps(fields).encode()
        target = _target(f"{self.version_prefix}/auth{path}", {})
        return self._perform(_Call(method, target, _parse_maybe_object, body, _JSON_TYPE))

    def _auth_create(self, path: str, fields: Mapping[str, Any]) -> Dict[str, Any]:
        try:
            return self._auth_call("PUT", path, fields)
        except HttpError as error:
            if error.status != 409:
                raise
            raise NodeExists(error.message, error.payload, status=409,
                             endpoint=error.endpoint) from error

    def _has_user(self, name: str) -> bool:
        return any(user["user"] == name for user in self.user_list())

    def _role_change(
        self, name: str, change: str, path: Union[str, Iterable[str]], kind: str,
    ) -> Dict[str, Any]:
        if kind not in _PERMISSIONS:
            raise EtcdValueError(f"a permission is read, write or readwrite, not {kind!r}")
        paths = [path] if isinstance(path, str) else list(path)
        kv = dict.fromkeys(_PERMISSIONS[kind], paths)
        return self._auth_call("PUT", f"/roles/{name}", {"role": name, change: {"kv": kv}})


class _AuthObject:
    """What EtcdUser and EtcdRole have in common."""

    entity = ""

    def __init__(self, client: _Users, name: str) -> None:
        self.client = client
        self.name = name

    @property
    def uri(self) -> str:
        """Path of this user or role in the API."""
        return f"{self.client.version_prefix}/auth/{self.entity}s/{self.name}"


class EtcdUser(_AuthObject):
    """A user, to be read, changed and written: python-etcd's interface.

    roles     names of the roles; change them, then `write`
    password  set it, then `write`; it cannot be read
    """

    entity = "user"

    def __init__(self, client: _Users, name: str) -> None:
        super().__init__(client, name)
        self._roles: Set[str] = set()
        self._password: Optional[str] = None

    @property
    def names(self) -> List[Dict[str, Any]]:
        """All users, as the server lists them."""
        return self.client.user_list()

    @property
    def roles(self) -> Set[str]:
        """Names of the roles this user has, or shall have."""
        return self._roles

    @roles.setter
    def roles(self, roles: Iterable[str]) -> None:
        """Choose the roles."""
        self._roles = set(roles)

    @property
    def password(self) -> None:
        """Always None: only the server knows it."""
        return None

    @password.setter
    def password(self, password: Optional[str]) -> None:
        """Choose the password."""
        self._password = password

    def read(self) -> None:
        """Take the roles from the server.  Raises KeyNotFound."""
        self.roles = self._stored_roles()

    def write(self) -> None:
        """Make the user, or change what differs.  The password is forgotten here afterwards.

        An existing user takes up to three requests: password, new roles, roles taken away.
        """
        stored: Optional[Set[str]] = None
        with contextlib.suppress(KeyNotFound):
            stored = self._stored_roles()
        password, self._password = self._password, None
        if stored is None:
            self.client.user_add(self.name, password or "", sorted(self.roles))
            return
        if password:
            self.client.user_password(self.name, password)
        if self.roles - stored:
            self.client.user_grant(self.name, sorted(self.roles - stored))
        if stored - self.roles:
            self.client.user_revoke(self.name, sorted(stored - self.roles))

    def delete(self) -> None:
        """Remove the user.  Raises KeyNotFound."""
        self.client.user_remove(self.name)

    def _stored_roles(self) -> Set[str]:
        # Since etcd 2.3 whole roles are listed, before that their names.
        roles = self.client.user_get(self.name).get("roles") or []
        return {role if isinstance(role, str) else role["role"] for role in roles}


class EtcdRole(_AuthObject):
    """A role, to be read, changed and written: python-etcd's interface."""

    entity = "role"

    def __init__(self, client: _Users, name: str) -> None:
        super().__init__(client, name)
        self._paths: Dict[str, Set[str]] = {"read": set(), "write": set()}

    @property
    def names(self) -> List[Dict[str, Any]]:
        """All roles, as the server lists them."""
        return self.client.role_list()

    @property
    def acls(self) -> Dict[str, str]:
        """What the role may do, by path: R, W or RW."""
        read, write = self._paths["read"], self._paths["write"]
        return {path: "R" * (path in read) + "W" * (path in write)
                for path in sorted(read | write)}

    @acls.setter
    def acls(self, acls: Mapping[str, str]) -> None:
        """Choose all permissions."""
        self._paths = {"read": set(), "write": set()}
        for path, permission in acls.items():
            self.grant(path, permission)

    def grant(self, path: str, permission: str) -> None:
        """Allow R, W or RW of `path`, once the role is written."""
        for right in _rights(permission):
            self._paths[right].add(path)

    def revoke(self, path: str, permission: str) -> None:
        """Forbid R, W or RW of `path`, once the role is written."""
        for right in _rights(permission):
            self._paths[right].discard(path)

    def read(self) -> None:
        """Take the permissions from the server.  Raises KeyNotFound."""
        self._paths = self._stored_paths()

    def write(self) -> None:
        """Make the role, or change what differs.

        An existing role takes up to four requests: each right is taken and given by its own.
        """
        try:
            stored = self._stored_paths()
        except KeyNotFound:
            self.client.role_add(
                self.name, **{right: sorted(paths) for right, paths in self._paths.items()})
            return
        for right, paths in self._paths.items():
            if stored[right] - paths:
                self.client.role_revoke(self.name, sorted(stored[right] - paths), right)
            if paths - stored[right]:
                self.client.role_grant(self.name, sorted(paths - stored[right]), right)

    def delete(self) -> None:
        """Remove the role.  Raises KeyNotFound."""
        self.client.role_remove(self.name)

    def _stored_paths(self) -> Dict[str, Set[str]]:
        kv = self.client.role_get(self.name)["permissions"]["kv"]
        return {right: set(kv.get(right) or ()) for right in ("read", "write")}


def _rights(permission: str) -> List[str]:
    """Return the long names of the letters in R, W or RW."""
    letters = permission.upper()
    if not letters or set(letters) - set("RW"):
        raise EtcdValueError(f"a permission is R, W or RW, not {permission!r}")
    return [right for right in ("read", "write") if right[0].upper() in letters]


class Auth:
    """Whether the server checks users: python-etcd's interface."""

    def __init__(self, client: _Users) -> None:
        self.client = client

    @property
    def active(self) -> bool:
        """Whether requests are checked; assign to switch it."""
        return bool(self.client.auth_status()["enabled"])

    @active.setter
    def active(self, active: bool) -> None:
        """Switch the checks on or off."""
        if active == self.active:
            return
        if active:
            self.client.auth_enable()
        else:
            self.client.auth_disable()


_User = EtcdUser
_Role = EtcdRole
_Switch = Auth


class auth:
    """The names of python-etcd's module of this name."""

    EtcdUser = _User
    EtcdRole = _Role
    Auth = _Switch


# ============================================================================
# client/verbs -- Verbs: the keys, members and status of a cluster.
# ============================================================================


class _Keys(_Caller):
    """The verbs of the keys API, but for those that wait.

    Everywhere `ttl` is in seconds, 1 or more, None for a key that stays; `timeout` is the deadline
    of this call, seconds over all endpoints: None for the client's `total_timeout`, math.inf for
    none, 0 to ask each endpoint once and wait for nothing but the answers (TRY_S in all).  A value
    is text, or a number, or bytes in UTF-8; EtcdValueError for what would not come back as
    it was given.  For other bytes there is base64.b64encode(data).decode(), for dicts json.dumps.
    """

    # -- reading

    @overload
    def get(self, key: str, *, recursive: bool = False, sorted: bool = False,
            quorum: bool = False, timeout: Optional[float] = None) -> EtcdResult: ...

    @overload
    def get(self, key: str, *, default: _T, recursive: bool = False, sorted: bool = False,
            quorum: bool = False, timeout: Optional[float] = None) -> Union[EtcdResult, _T]: ...

    def get(
        self, key: str, *, default: Any = _NOT_GIVEN, recursive: bool = False,
        sorted: bool = False, quorum: bool = False, timeout: Optional[float] = None,
    ) -> Any:
        """Return the node at `key`.  Raises KeyNotFound, unless there is a `default` to return.

        recursive  list a directory to all depths, not only its children
        sorted     order each level of a listing by key
        quorum     read through consensus: never stale, slower, fails without a quorum
        """
        query = {name: True for name, wanted in (
            ("recursive", recursive), ("sorted", sorted), ("quorum", quorum)) if wanted}
        try:
            return self._keys_call("GET", key, query=query, timeout=timeout)
        except KeyNotFound:
            if default is _NOT_GIVEN:
                raise
            return default

    def ls(
        self, key: str = "/", *, recursive: bool = False, quorum: bool = False,
        timeout: Optional[float] = None,
    ) -> List[Node]:
        """Return the visible nodes of a directory ordered by key; for a file, the file itself.

        recursive  every node below, parents before their children
        """
        node = self.get(
            key, recursive=recursive, sorted=True, quorum=quorum, timeout=timeout).node
        return list(node.walk()) if node.dir else [node]

    def __contains__(self, key: str) -> bool:
        """Whether `key` exists, as a file or a directory."""
        try:
            self.get(key)
        except KeyNotFound:
            return False
        return True

    def __getitem__(self, key: str) -> str:
        """The value of a file.  Raises KeyNotFound, a KeyError; NotFile for a directory."""
        node = self.get(key).node
        if node.dir:
            raise NotFile("Not a file", cause=node.key)
        return node.value or ""

    __iter__ = None                                 # else Python would ask for the keys 0, 1, 2

    # -- writing

    def set(
        self, key: str, value: object, ttl: Optional[int] = None, *,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Write a file, whether or not it exists; parents are created.

        A ttl that was set before does not last.  Raises NotFile for a directory.
        """
        return self._put(key, {"value": _text(value), "ttl": ttl}, timeout)

    def create(
        self, key: str, value: object, ttl: Optional[int] = None, *,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Write a file that must not exist yet.  Raises NodeExists."""
        return self._put(key, {"value": _text(value), "ttl": ttl, "prevExist": False}, timeout)

    @overload
    def update(self, key: str, value: object, ttl: Optional[int] = None, *,
               timeout: Optional[float] = None) -> EtcdResult: ...

    @overload
    def update(self, key: EtcdResult, *, timeout: Optional[float] = None) -> EtcdResult: ...

    def update(
        self, key: Union[str, EtcdResult], value: object = None, ttl: Optional[int] = None, *,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Write a file that must exist.  Raises KeyNotFound.

        Instead of key and value: a result, whose `value` and `ttl` you may have changed.  It is
        written if nobody else wrote the key since.  Raises CompareFailed.  A directory takes a
        new ttl; nothing is compared, as etcd cannot.
        """
        if isinstance(key, str):
            return self._put(key, {"value": _text(value), "ttl": ttl, "prevExist": True}, timeout)
        if key.dir:
            return self.write(key.key, key.value, key.ttl, dir=True, prevExist=True,
                              timeout=timeout)
        return self.write(key.key, key.value, key.ttl, prevExist=True,
                          prevIndex=key.modifiedIndex, timeout=timeout)

    def append(
        self, key: str, value: object, ttl: Optional[int] = None, *,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Create a file with the next name in directory `key`; names sort in order of creation.

        After an error with maybe_applied=True only a look at the directory tells whether the
        value is in: make values unique if that matters.
        """
        return self._keys_call("POST", key, {"value": _text(value), "ttl": ttl}, timeout=timeout)

    def refresh(
        self, key: str, ttl: int, *, prevValue: object = _NOT_GIVEN,
        prevIndex: object = _NOT_GIVEN, timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Give an existing file a new ttl and leave its value; watchers are not told.

        Needs etcd 2.3: earlier ones do not know refresh and would empty the value.
        """
        conditions = _conditions(prevValue, prevIndex)
        fields: Dict[str, _Field] = {"ttl": ttl, "refresh": True, "prevExist": True}
        return self._put(key, {**fields, **conditions}, timeout)

    def compare_and_swap(
        self, key: str, value: object, *, prev_value: Optional[object] = None,
        prev_index: Optional[int] = None, ttl: Optional[int] = None,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Write a file if it has the given value and modified index.  Raises CompareFailed.

        At least one condition is needed.  The API cannot compare with an empty value.
        """
        fields: Dict[str, _Field] = {"value": _text(value), "ttl": ttl}
        return self._put(key, {**fields, **_needed(prev_value, prev_index)}, timeout)

    def test_and_set(
        self, key: str, value: object, prev_value: object, ttl: Optional[int] = None, *,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Write a file if it has the value `prev_value`.  Raises CompareFailed."""
        return self.compare_and_swap(
            key, value, prev_value=prev_value, ttl=ttl, timeout=timeout)

    def write(
        self, key: str, value: object, ttl: Optional[int] = None, dir: bool = False,
        append: bool = False, *, prevValue: object = _NOT_GIVEN, prevIndex: object = _NOT_GIVEN,
        prevExist: object = _NOT_GIVEN, refresh: bool = False, timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Write in any of the ways above, chosen by python-etcd's options.

        value      None for none: of a directory, a refresh or, as for python-etcd, an empty file
        dir        make a directory; the value is None
        append     create a file with the next name in directory `key`
        prevValue  the value the file must have, and
        prevIndex  the modified index it must have; else CompareFailed
        prevExist  False: create only, else NodeExists.  True: update only, else KeyNotFound
        refresh    change only the ttl and tell no watcher; the value is None

        Raises EtcdValueError for a condition that is None: leave it out if there is none.
        """
        if dir and value:
            raise EtcdValueError("a directory has no value")
        given = None if value is None else _text(value)
        fields: Dict[str, _Field] = {
            "value": given, "ttl": ttl, "dir": bool(dir) or None,
            "refresh": bool(refresh) or None}
        conditions = _conditions(prevValue, prevIndex, prevExist)
        method = "POST" if append else "PUT"
        return self._keys_call(method, key, {**fields, **conditions}, timeout=timeout)

    # -- removing

    def delete(
        self, key: str, recursive: Optional[bool] = None, dir: Optional[bool] = None, *,
        prevValue: object = _NOT_GIVEN, prevIndex: object = _NOT_GIVEN,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Remove a file; with `dir` also an empty directory, with `recursive` also a full one.

        With prevValue or prevIndex: only a file that has them.  Raises CompareFailed.
        """
        query: Dict[str, _Field] = {"recursive": bool(recursive) or None, "dir": bool(dir) or None}
        query.update(_conditions(prevValue, prevIndex))
        return self._keys_call("DELETE", key, query=query, timeout=timeout)

    def pop(
        self, key: str, recursive: Optional[bool] = None, dir: Optional[bool] = None, *,
        prevValue: object = _NOT_GIVEN, prevIndex: object = _NOT_GIVEN,
        timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Remove as `delete` does and return what was there."""
        gone = self.delete(key, recursive, dir, prevValue=prevValue, prevIndex=prevIndex,
                           timeout=timeout)
        return EtcdResult(node=gone.prev_node or gone.node, etcd_index=gone.etcd_index)

    def compare_and_delete(
        self, key: str, *, prev_value: Optional[object] = None,
        prev_index: Optional[int] = None, timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Remove a file if it has the given value and modified index.  Raises CompareFailed."""
        return self._keys_call(
            "DELETE", key, query=_needed(prev_value, prev_index), timeout=timeout)

    # -- directories

    def mkdir(
        self, key: str, ttl: Optional[int] = None, *, timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Create a directory that must not exist yet; with `ttl`, it expires with its content."""
        return self._put(key, {"dir": True, "ttl": ttl, "prevExist": False}, timeout)

    def rmdir(self, key: str, *, timeout: Optional[float] = None) -> EtcdResult:
        """Remove an empty directory (or a file, as etcd does).  Raises DirNotEmpty."""
        return self.delete(key, dir=True, timeout=timeout)

    # -- below: no public names

    def _put(
        self, key: str, form: Mapping[str, _Field], timeout: Optional[float] = None,
    ) -> EtcdResult:
        return self._keys_call("PUT", key, form, timeout=timeout)

    def _keys_call(
        self, method: str, key: str, form: Optional[Mapping[str, _Field]] = None, *,
        query: Mapping[str, _Field] = MappingProxyType({}), timeout: Optional[float] = None,
    ) -> EtcdResult:
        if form is not None and form.get("ttl") == 0:
            raise EtcdValueError("a ttl is seconds, 1 or more; None for a key that stays")
        target = _keys_target(key, query, self.key_endpoint)
        body = None if form is None else _encode_fields(form).encode()
        return self._perform(_Call(method, target, _parse_result, body, timeout=timeout,
                                   waits="wait" in query))


def _needed(prev_value: Optional[object], prev_index: Optional[int]) -> Dict[str, _Field]:
    """Return the conditions that are not None; raise EtcdValueError if both are."""
    if prev_value is None and prev_index is None:
        raise EtcdValueError("prev_value or prev_index is needed")
    return _conditions(_NOT_GIVEN if prev_value is None else prev_value,
                       _NOT_GIVEN if prev_index is None else prev_index)


# ============================================================================
# client/watching -- Watching: changes of a key or a directory, without a gap.
# ============================================================================


class _Step(enum.Enum):
    """What a watch asks next."""

    LIST = "what there is"
    RELIST = "what there is by quorum: at least as new as what was told"
    CHECK = "by quorum, whether the store went back, or only this member lags behind"
    POLL = "the next change"


class _WatchState:
    """What a watch knows, and what follows from each answer.  No network and no clock in here.

    step      what to ask next
    index     the next change to ask for; None: from now on
    found     events that are not told yet
    reached   whether a server ever answered
    doubtful  whether the last head shows an older store: restored, or of a member that lags behind

    How the steps follow each other, from LIST (with relist) or POLL on:

    LIST    listed -> POLL
    POLL    change -> POLL.  Index cleared (401) -> RELIST; without relist POLL from the newest
            index known to be quiet, or the error.  An older store, by index or term, and silence
            after that -> CHECK
    CHECK   older -> RELIST; without relist the error that etcd has for a lost history, 401.
            As new as it should be -> where we were
    RELIST  listed: the difference is found -> POLL

    quiet   (index, when): the store was at `index`, and nothing of ours had come.  The watch moves
            up to it only when etcd would forget where it stands.
    """

    def __init__(self, path: str, *, recursive: bool, index: Optional[int], relist: bool) -> None:
        self.step = _Step.LIST if relist else _Step.POLL
        self.index = index
        self.found: Deque[EtcdResult] = deque()
        self.reached = False
        self.doubtful = False
        self.quiet = (0, 0.0)
        self._path = path
        self._recursive = recursive
        self._relist = relist
        self._known: Optional[Dict[str, Node]] = None   # with relist: the nodes as told so far
        self._newest = (0, 0)                       # index and term of a store seen
        self._other_term = False                    # the last head has an older one

    # -- answers to POLL

    def head(self, index: int, term: int, now_s: float) -> None:
        """Note where the store was when it began to wait for us."""
        self.reached = True
        self.doubtful = self._is_older(index, term)
        self._other_term = 0 < term < self._newest[1]
        if self.doubtful:
            return
        self._newest = max(index, self._newest[0]), max(term, self._newest[1])
        if self.index is None:                      # in case the connection breaks now
            self.index = index + 1
        self.quiet = index, now_s

    def is_doubtful(self) -> bool:
        """Whether to check where the store is, rather than wait for it: it showed an older one."""
        if self.doubtful:
            self.step = _Step.CHECK
        return self.doubtful

    def alive(self, index: int, term: int, now_s: float) -> bool:
        """Note where the store is while it waits for us; return False if that must be checked."""
        self.reached = True
        if self._is_older(index, term):
            self.step = _Step.CHECK
            return False
        self.settle(now_s)
        if self.step is _Step.POLL and index:
            self.quiet = index, now_s
        return True

    def change(self, event: EtcdResult, asked: Optional[int]) -> None:
        """Take the change that came for index `asked`.  Raises BadReply for an older one."""
        if asked is not None and event.modified_index < asked:
            raise BadReply(f"asked for index {asked} on, got {event.modified_index}")
        self.reached = True
        if self._other_term:                        # perhaps of another history
            self.step = _Step.CHECK
            return
        self.index = event.modified_index + 1
        if self._concerns(event.key):
            if self._known is not None:
                self._keep(self._known, event)
            self.found.append(event)

    def cleared(self, error: EventIndexCleared) -> None:
        """Go on after more changes than etcd remembers.  Raises `error` if ours may be lost."""
        self.reached = True
        if self._relist:
            self.step = _Step.RELIST
        elif self.quiet[0] and self.quiet[0] >= (self.index or 0):
            self.index = self.quiet[0] + 1          # others changed much, and ours did not
        else:
            raise error

    def settle(self, now_s: float) -> None:
        """Move up, if etcd might forget the index.

        A change out of the history follows its head at once, and one that came later was sent
        before a server told its index to somebody else.
        """
        index, told_at = self.quiet
        far = self.index is None or index - self.index >= HISTORY_EVENTS // 2
        if index and far and now_s - told_at >= WATCH_SETTLE_S:
            self.index = index + 1

    def is_busy(self, since: int) -> bool:
        """Whether to leave a request as it is: etcd could forget where it stands meanwhile."""
        index = self.quiet[0]
        return index - since >= HISTORY_EVENTS // 2 or not (index or self.index)

    # -- answers to the others

    def listed(self, nodes: Dict[str, Node], index: int, term: int) -> None:
        """Take a listing; if there was one before, what differs is found."""
        self.reached = True
        first = self.step is _Step.LIST
        if first and self._is_older(index, term):   # than the index we were given
            self.step = _Step.CHECK
            return
        if not first:
            self.found.extend(_difference(self._known or {}, nodes, self.index or 1, index))
        if not first or self.index is None:
            self.index = index + 1
        self._newest, self._known, self.step = (index, term), nodes, _Step.POLL

    def checked(self, index: int, term: int) -> None:
        """Take what a quorum says.  Raises EventIndexCleared."""
        went_back = self._is_older(index, term)
        if self._relist:
            self.step = (_Step.RELIST if went_back else
                         _Step.LIST if self._known is None else _Step.POLL)
            return
        self.step = _Step.POLL
        if went_back:
            self._newest, self.quiet = (index, term), (0, 0.0)
            raise EventIndexCleared(
                "the store went back, as if restored from a backup: read again",
                cause=self._path, index=index)

    def replaced(self) -> None:
        """Note that another cluster answers: nothing of what was seen counts there."""
        self._newest, self.quiet = (0, 0), (0, 0.0)
        if self._relist:
            self.step = _Step.RELIST

    # -- below: what those above have in common

    def _is_older(self, index: int, term: int) -> bool:
        """Whether a store shows less than what was seen, or than the index we were given."""
        if not index and not term:                  # it does not say
            return False
        newest = max(self._newest[0], (self.index or 1) - 1)
        return index < newest or 0 < term < self._newest[1]

    def _concerns(self, key: str) -> bool:
        """Whether a change of `key` is one of ours.

        Out of its history etcd 2.3 and 3.4 hand out what a waiting watch would not be told: what
        is hidden below a directory, and removals of directories whose name begins like ours.
        """
        ours = self._path
        if key == ours or _is_below(ours, key):
            return True
        below = self._recursive and _is_below(key, ours)
        return below and "/_" not in key[len(ours.rstrip("/")):]

    @staticmethod
    def _keep(known: Dict[str, Node], event: EtcdResult) -> None:
        """Bring the copy of what is there up to date."""
        if event.action not in _REMOVALS:
            known[event.key] = _alone(event.node)
            return
        gone = known.pop(event.key, None)
        if gone is None or gone.dir:                # with all that was below
            for key in [key for key in known if _is_below(key, event.key)]:
                del known[key]


class Watch:
    """An endless iterator over the changes of a key; made by `client.watcher`.

    It asks for one change after the other, each from the index after the last, so that none is
    lost and none repeated while a server restarts, the leader changes or an endpoint fails.
    Server-side streams are not used: etcd 2.3 and 3.4 let one fall silent after an event from
    the history or when its consumer is slow, and report some deletions twice.

    index    the first change to consider; None: from the first `next` on
    relist   what to do when more than 1000 changes, of any key, went by unseen (error 401), or
             when the store went back: a backup was restored, or the cluster made anew.
             True: list the key again and yield the difference to what is known as events with
             `relisted` set: a "set" for each node that changed (of directories, only those that
             are empty or have a ttl), in the order of their last changes, then a "delete" for the
             topmost of what is gone.  Of several changes only the last is seen.  For this the
             watch lists the key at the start too (a directory to all depths if recursive), and
             holds a copy of it in memory.
             False: raise EventIndexCleared; nothing is listed.
    timeout  seconds each `next` may take, None: no limit; 0: take what is in the history, wait for
             nothing.  Then WatchTimeout, after which `next` may be called again and misses nothing

    An event's `modified_index` + 1 is the index to go on from in another watch.  If no endpoint
    answers at the start that error is raised; later the watch waits and tries again.  Raises
    ClusterIdChanged when a server of another cluster answers; see there.

    A server that says nothing is asked something else, a key that nobody has, on another
    connection: after WATCH_HEAD_S without the head of its answer, then every WATCH_PROBE_S.  If
    it does not answer that either, the next endpoint is asked.

    Limit: when etcd 2.3 or 3.4 looks into its history for a recursive watch, it overlooks changes
    of the watched directory itself (made, given another ttl) unless they come first in there.
    What lies below, and the removal of the directory, it always finds.

    Thread: one, except for `close`.
    """

    def __init__(
        self, client: _Keys, key: str, *, recursive: bool = False, index: Optional[int] = None,
        relist: bool = True, timeout: Optional[float] = None,
    ) -> None:
        self._client = client
        self._path = clean_key(key)
        self._recursive = recursive
        self._timeout = timeout
        self._state = _WatchState(                  # 0 is "now" too
            self._path, recursive=recursive, index=index or None, relist=relist)
        self._endpoint = ""                         # asked last
        self._exchange: Optional[_Exchange] = None  # the last one
        self._alive = False                         # whether that server answers us
        self._asked_at = 0.0                        # when; monotonic seconds
        self._until = math.inf                      # deadline of the `next` under way
        self._patience_s = WATCH_POLL_S             # after an answer
        self._failures = 0                          # since the last answer
        self.error: Optional[EtcdError] = None      # why nothing is followed now; None: it is
        self._life = Scope()                        # until `close`
        self._within = client.scope

    @property
    def index(self) -> Optional[int]:
        """The next change to consider; None: from now on."""
        return self._state.index

    def __iter__(self) -> "Watch":
        return self

    def __next__(self) -> EtcdResult:
        try:
            with Scope(self._timeout, self._life, self._within) as scope:
                while not self._state.found:
                    self._look(scope)
                scope.left_s()                      # closed meanwhile: no more is told
                return self._state.found.popleft()
        except Cancelled:
            if not self._life.cancelled:
                raise
            raise StopIteration from None

    def close(self) -> None:
        """End the iteration, from any thread: a `next` that waits in another one ends at once."""
        self._life.cancel()

    cancel = close

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- below: the way to the servers

    def _look(self, scope: Scope) -> None:
        """Ask once and give the answer to the state.  Raises WatchTimeout, and what is final."""
        client, state = self._client, self._state
        state.settle(time.monotonic())
        if scope.left_s() <= 0:
            raise WatchTimeout("no change in time", index=state.index or 0,
                               endpoint=client.endpoints.current)
        try:
            client._discover_endpoints(min(scope.deadline, time.monotonic() + WATCH_POLL_S))
            self._endpoint = client.endpoints.current
            self._ASK[state.step](self, scope)
        except EventIndexCleared as error:
            state.cleared(error)
        except ClusterIdChanged:
            state.replaced()
            raise
        except RequestTimeout as error:
            if not self._alive:
                self._silent(error, scope)
            elif scope.once:
                scope.deadline = 0.0                # the head came, and no change behind it
        except EtcdError as error:
            self._fail(error, scope)
        else:
            self._answered()
            self._failures = 0
            if state.step is _Step.CHECK:           # whoever lags behind may need a moment
                scope.wait(_backoff_s(1))

    def _poll(self, scope: Scope) -> None:
        asked = self._state.index
        query = {"wait": True, "recursive": self._recursive or None, "waitIndex": asked}
        event = self._ask(query, scope, _parse_result, self._on_head)
        try:
            self._state.change(event, asked)
        except BadReply as error:
            error.endpoint = self._endpoint
            raise

    def _list(self, scope: Scope) -> None:
        query = {"recursive": self._recursive or None,
                 "quorum": self._state.step is _Step.RELIST or None}
        try:
            top = self._ask(query, scope, _parse_result)
        except (KeyNotFound, NotDir) as error:
            self._state.listed({}, error.index, 0)
            return
        nodes = (top.node, *top.node.walk()) if self._recursive else (top.node,)
        self._state.listed(
            {node.key: _alone(node) for node in nodes}, top.etcd_index, top.raft_term)

    def _check(self, scope: Scope) -> None:
        reply = self._ask({"quorum": True}, scope, _parse_not, statuses=_ANY_ANSWER, below=_NOBODYS)
        self._state.checked(*_store_in(reply))

    _ASK: "ClassVar[Dict[_Step, Callable[[Watch, Scope], None]]]" = {
        _Step.LIST: _list, _Step.RELIST: _list, _Step.CHECK: _check, _Step.POLL: _poll}

    def _ask(
        self, query: Mapping[str, _Field], scope: Scope, parse: Callable[[_Reply], _T],
        on_head: Optional[Callable[[_Reply], None]] = None, *,
        statuses: FrozenSet[int] = _SUCCESS, below: str = "",
    ) -> _T:
        """Send one request to the endpoint in use."""
        client = self._client
        target = _keys_target(self._path + below, query, client.key_endpoint)
        call = _Call("GET", target, parse, on_head=on_head, statuses=statuses)
        self._alive, self._asked_at, self._until = False, time.monotonic(), scope.deadline
        self._patience_s = WATCH_LOOK_S if scope.once else WATCH_POLL_S
        self._exchange = _Exchange(min(self._until, self._asked_at + WATCH_POLL_S),
                                   self._head_s(), client.connect_timeout, self._is_patient)
        return client._request(self._endpoint, call, self._exchange)

    def _rounds(self) -> int:
        """Return how often all endpoints failed."""
        return self._failures // max(1, len(self._client.endpoints.urls))

    def _head_s(self) -> float:
        return min(WATCH_HEAD_S * (1 << min(self._rounds(), 5)), WATCH_POLL_S)

    def _on_head(self, head: _Reply) -> None:
        self._client._expect_cluster(self._endpoint, head)
        self._state.head(*_store_in(head), time.monotonic())
        self._answered()
        self._failures = 0

    def _answered(self) -> None:
        """Note that the server is there, and give it time."""
        self._alive, self.error = True, None
        self._client._connectivity.report(True)
        if self._exchange is not None:
            self._exchange.deadline = min(self._until, time.monotonic() + self._patience_s)
            silence_s = WATCH_HEAD_S if self._state.doubtful else WATCH_PROBE_S
            self._exchange.silence_s = min(silence_s, WATCH_POLL_S)

    def _is_patient(self) -> bool:
        """Whether to wait on for a server that said nothing for a while."""
        if self._alive and self._state.is_doubtful():
            return False
        return self._see()

    def _see(self) -> bool:
        """Ask a silent server something else; return whether to wait on for this answer."""
        client, before = self._client, self._state.quiet[0]
        target = _keys_target(self._path + _NOBODYS, {}, client.key_endpoint)
        call = _Call("GET", target, _parse_not, statuses=_ANY_ANSWER)
        wait_s = self._head_s()
        exchange = _Exchange(time.monotonic() + wait_s, wait_s, client.connect_timeout)
        self._alive = False
        try:
            reply = client._request(self._endpoint, call, exchange)
        except (Cancelled, ClusterIdChanged):
            raise
        except EtcdError:
            return False
        self._answered()
        return self._state.alive(*_store_in(reply), time.monotonic()) and (
            time.monotonic() - self._asked_at < WATCH_POLL_S or self._state.is_busy(before))

    def _silent(self, error: RequestTimeout, scope: Scope) -> None:
        """Note that nothing came, not even a head."""
        if scope.left_s() > 0:
            self._fail(error, scope)
        elif time.monotonic() - self._asked_at >= min(1.0, self._client.connect_timeout):
            self._client._give_up(self._endpoint)   # for the next `next`

    def _fail(self, error: EtcdError, scope: Scope) -> None:
        """Go on with the next endpoint, after a wait if all failed; raise `error` if it is final.

        When etcd clears its watchers (400) the same question may be asked again.
        """
        client = self._client
        if is_endpoint_failure(error):
            client._give_up(self._endpoint, error)
        elif not isinstance(error, WatcherCleared):
            raise error
        self.error = error
        self._failures += 1
        rounds = self._rounds()
        if not rounds:
            return
        client._connectivity.report(False)
        if not self._state.reached and not (isinstance(error, RequestTimeout) and rounds < 3):
            raise error
        scope.wait(_backoff_s(rounds))


_NOBODYS = "/_pyetcd-client"                        # below the key, and never there
_ANY_ANSWER: FrozenSet[int] = frozenset(range(200, 500))


def _store_in(reply: _Reply) -> Tuple[int, int]:
    """Return index and term of the store that answered; 0 if it does not say."""
    return reply.header_number("X-Etcd-Index"), reply.header_number("X-Raft-Term")


_REMOVALS: FrozenSet[str] = frozenset(("delete", "expire", "compareAndDelete"))


def _alone(node: Node) -> Node:
    """Return a node without children and JSON: less to remember."""
    return replace(node, nodes=(), raw={})


def _identity(node: Optional[Node]) -> Tuple[Any, ...]:
    """Return what is the same as long as nobody writes a node: not the time that is left to it."""
    return () if node is None else (
        node.value, node.dir, node.modified_index, node.created_index)


def _is_below(key: str, directory: str) -> bool:
    return key.startswith(directory if directory == "/" else directory + "/")


def _difference(
    known: Mapping[str, Node], found: Mapping[str, Node], since: int, index: int,
) -> Iterator[EtcdResult]:
    """Yield events that lead from the nodes `known` before `since` to those `found` at `index`.

    After a store was restored a node may differ though its index is lower than `since`.
    """
    # Nobody is told of directories that come with the first key in them.
    parents = {key.rpartition("/")[0] or "/" for key in found if key != "/"}
    changed = [
        node for node in found.values() if (node.key not in parents or node.ttl is not None) and (
            node.modified_index >= since or _identity(node) != _identity(known.get(node.key)))]
    for node in sorted(changed, key=lambda node: (node.modified_index, node.key)):
        yield EtcdResult("set", node, known.get(node.key), etcd_index=index, relisted=True)
    topmost = ""
    for key in sorted(known.keys() - found.keys(), key=lambda key: key.split("/")):
        if topmost and _is_below(key, topmost):
            continue
        topmost, old = key, known[key]
        node = Node(key, dir=old.dir, modified_index=index, created_index=old.created_index)
        yield EtcdResult("delete", node, old, etcd_index=index, relisted=True)


# -- asyncio: each wait on a thread of its own, which ends when the task is cancelled


async def to_thread(function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
    """Call `function` on a thread, and return what it returns; as asyncio.to_thread, but:

    When the task is cancelled, so is a Scope around the call: it ends within milliseconds, and the
    task goes on after that, so that nothing runs behind its back.  A function that waits for
    something else is waited for.  There are as many threads as calls: a hundred watches do not
    keep another call waiting.

        async with asyncio.timeout(5):
            await to_thread(client.get, "k", quorum=True)
            await to_thread(lock.acquire)
    """
    # Not above: it takes as long to import as all the rest, and who needs it has it already.
    import asyncio

    scope, context = Scope(), contextvars.copy_context()
    outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def run() -> None:
        try:
            with scope:
                outcome.set_result(context.run(function, *args, **kwargs))
        except BaseException as error:              # the task's, whatever it is
            outcome.set_exception(error)

    threading.Thread(target=run, name="pyetcd-to-thread", daemon=True).start()
    done = asyncio.wrap_future(outcome)
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        scope.cancel()
        await asyncio.wait([done])
        done.exception()                            # asked for, lest asyncio reports it
        raise


async def each(items: Iterable[_T]) -> AsyncIterator[_T]:
    """Iterate over a watch, or whatever waits between its items, in asyncio; closes it at the end.

        async for event in each(client.watcher("/config", recursive=True)): ...
    """
    iterator, end = iter(items), object()
    try:
        while True:
            item = await to_thread(next, iterator, end)
            if item is end:
                return
            yield cast(_T, item)
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


class WatchedChange(EtcdResult):
    """The change that `Client.watch` returned; to iterate over it is to go on watching.

    The first item is this change; later ones follow for ever, see Watch.
    """

    def __init__(self, change: EtcdResult, later: Callable[[int], Watch]) -> None:
        self.__dict__.update(change.__dict__, _later=later)

    def __iter__(self) -> Iterator[EtcdResult]:
        yield self
        with self.__dict__["_later"](self.modified_index + 1) as later:
            yield from later

    def __reduce__(self) -> Tuple[Any, ...]:
        # A copy, in another process perhaps, has no client to go on with.
        plain = {name: value for name, value in self.__dict__.items() if name != "_later"}
        return EtcdResult, (), plain


class _Watching(_Keys):
    """The verbs that wait for changes."""

    def read(
        self, key: str, *, recursive: Optional[bool] = None, wait: bool = False,
        waitIndex: Optional[int] = None, sorted: Optional[bool] = None,
        quorum: Optional[bool] = None, timeout: Optional[float] = None,
    ) -> EtcdResult:
        """Return the node at `key`, or with `wait` its next change, by python-etcd's options.

        waitIndex  the first change to consider; None: the next one from now on
        timeout    seconds for this call, 0: no end, as for python-etcd.  With `wait`: None is the
                   client's read_timeout; then WatchTimeout.  Without: None is as for `get`
        """
        if not wait:
            return self.get(key, recursive=bool(recursive), sorted=bool(sorted),
                            quorum=bool(quorum), timeout=math.inf if timeout == 0 else timeout)
        limit = self.read_timeout if timeout is None else timeout
        return self.watch(key, waitIndex, limit or math.inf, recursive)

    def watch(
        self, key: str, index: Optional[int] = None, timeout: Optional[float] = None,
        recursive: Optional[bool] = None,
    ) -> WatchedChange:
        """Return the next change of `key` (with `recursive`, also of what lies below).

        index    the first change to consider: modified_index + 1 of the last one seen; None: now
        timeout  seconds to wait for a change; None: for ever; 0: look for one since `index`, and do
                 not wait.  Raises WatchTimeout.

        Iterate over what is returned to get this change and all later ones.

        Raises EventIndexCleared if `index` is more than 1000 changes back.
        """
        if self._is_replaced():                     # the program's own sends one request
            query = {"wait": True, "waitIndex": index, "recursive": bool(recursive) or None}
            change = self._keys_call("GET", key, query=query, timeout=timeout)
        else:
            with self.watcher(key, recursive=bool(recursive), index=index, timeout=timeout,
                              relist=False) as events:
                change = next(events)
        return WatchedChange(change, lambda later: self.watcher(
            key, recursive=bool(recursive), index=later))

    def watcher(
        self, key: str, *, recursive: bool = False, index: Optional[int] = None,
        timeout: Optional[float] = None, relist: bool = True,
    ) -> Watch:
        """Return an endless iterator over the changes of `key`; see Watch."""
        return Watch(self, key, recursive=recursive, index=index, relist=relist, timeout=timeout)

    def eternal_watch(
        self, key: str, index: Optional[int] = None, recursive: Optional[bool] = None,
    ) -> Iterator[EtcdResult]:
        """Yield the changes of `key` for ever; `watcher` gives one that can be cancelled."""
        while self._is_replaced():
            change = self.watch(key, index, math.inf, recursive)
            index = change.modified_index + 1
            yield change
        with self.watcher(key, recursive=bool(recursive), index=index) as events:
            yield from events


# ============================================================================
# client/client -- The Client class: all of it under one name.
# ============================================================================


class _Cluster(_Caller):
    """Members, statistics, versions, health; and requests for which there is no verb."""

    _MGET, _MPUT, _MPOST, _MDELETE = "GET", "PUT", "POST", "DELETE"     # callers of api_execute

    # -- members

    def member_list(self) -> List[Member]:
        """Return the members of the cluster, ordered by id."""
        return self._perform(_Call("GET", f"{self.version_prefix}/members", _parse_members))

    def leader_member(self) -> Optional[Member]:
        """Return the leader as the answering member knows it; None during an election."""
        return self._perform(_Call(
            "GET", f"{self.version_prefix}/members/leader", _parse_leader,
            statuses=_HEALTH_STATUSES))

    def member_add(self, peer_urls: Union[str, Iterable[str]]) -> Member:
        """Add a member that will be reached at `peer_urls`; start it after that.

        Raises HttpError with status 409 if another member has one of the URLs.
        """
        return self._perform(self._members_call("POST", "", peer_urls, _parse_member))

    def member_update(self, id: str, peer_urls: Union[str, Iterable[str]]) -> None:
        """Change the peer URLs of the member with this id.  Raises KeyNotFound."""
        self._perform(self._members_call("PUT", f"/{id}", peer_urls, _parse_nothing))

    def member_remove(self, id: str) -> None:
        """Remove the member with this id from the cluster.

        Raises KeyNotFound; HttpError with status 410 if it was removed already.
        """
        path = f"{self.version_prefix}/members/{id}"
        self._perform(_Call("DELETE", _target(path, {}), _parse_nothing))

    # -- what the answering member says of itself

    def statistics(self, name: str = "self") -> Dict[str, Any]:
        """Return statistics of the answering member: `self`, `store` or (leader only) `leader`."""
        if name not in ("self", "store", "leader"):
            raise EtcdValueError(f"no such statistics: {name!r}; there are self, store and leader")
        return self._perform(_Call("GET", f"{self.version_prefix}/stats/{name}", _parse_object))

    def server_version(self) -> Dict[str, str]:
        """Return {"etcdserver": ..., "etcdcluster": ...} of the answering member."""
        return self._perform(_Call("GET", "/version", _parse_version))

    def health(self, endpoint: Optional[str] = None) -> bool:
        """Return what one server says of itself (the one in use, if none is given).

        Raises TransportError if it does not answer.
        """
        call = _Call("GET", "/health", _parse_health, statuses=_HEALTH_STATUSES)
        with Scope(self.total_timeout, self.scope) as scope:
            if endpoint is None:
                self._discover_endpoints(scope.deadline)
            base_url = self.endpoints.current if endpoint is None else _base_url(endpoint)
            return self._attempt(base_url, call, scope.deadline)

    # -- the same as python-etcd shows it: each a request, but for the last group

    @property
    def machines(self) -> List[str]:
        """Client URLs of all members."""
        return self._perform(_Call("GET", f"{self.version_prefix}/machines", _parse_machines))

    @property
    def members(self) -> Dict[str, Dict[str, Any]]:
        """The members as the API describes them, by id."""
        return {member.id: dict(member.raw) for member in self.member_list()}

    @property
    def leader(self) -> Dict[str, Any]:
        """The leader as the API describes it.  Raises LeaderElectionInProgress."""
        leader = self.leader_member()
        if leader is None:
            raise LeaderElectionInProgress("there is no leader at the moment")
        return dict(leader.raw)

    @property
    def stats(self) -> Dict[str, Any]:
        """Statistics of the answering member."""
        return self.statistics()

    @property
    def leader_stats(self) -> Dict[str, Any]:
        """What the leader knows of its followers; HttpError from any other member."""
        return self.statistics("leader")

    @property
    def store_stats(self) -> Dict[str, Any]:
        """Counters of the store."""
        return self.statistics("store")

    @property
    def version(self) -> str:
        """Version of the answering server."""
        return self.server_version().get("etcdserver", "")

    @property
    def cluster_version(self) -> str:
        """Version all members can work with; "" from etcd 2.0."""
        return self.server_version().get("etcdcluster", "")

    @property
    def base_uri(self) -> str:
        """URL of the server in use."""
        return self.endpoints.current

    @property
    def protocol(self) -> str:
        """http or https, as the server in use wants it."""
        return urlsplit(self.base_uri).scheme

    @property
    def host(self) -> str:
        """Host of the server in use."""
        return urlsplit(self.base_uri).hostname or ""

    @property
    def port(self) -> int:
        """Port of the server in use."""
        parts = urlsplit(self.base_uri)
        return parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def expected_cluster_id(self) -> Optional[str]:
        """`cluster_id`, as python-etcd calls it."""
        return self.cluster_id

    @expected_cluster_id.setter
    def expected_cluster_id(self, cluster_id: Optional[str]) -> None:
        self.cluster_id = cluster_id

    # -- requests for which there is no verb

    def api_execute(
        self, path: str, method: str, params: Optional[Mapping[str, Any]] = None,
        timeout: Optional[float] = None,
    ) -> _Reply:
        """Send a request of your own and return the answer: `status`, `headers`, `data`.

        path     begins with a slash and the version prefix
        params   go into the query of a GET or DELETE, into the form of a PUT or POST
        timeout  seconds in all; None: the client's; 0: no end, as for python-etcd

        All verbs go through here if a subclass or an attribute of the client replaces this method
        (JSON through `api_execute_json`), but not `watcher` and what is built on it.

        Raises what the verbs raise for an answer other than 2xx; WatchTimeout for a GET with the
        parameter `wait`.
        """
        given = {} if params is None else {
            name: value if isinstance(value, bool) else "" if value is None else _text(value)
            for name, value in params.items()}
        if method in ("GET", "DELETE"):
            return self._execute(path, method, given, None, _FORM_TYPE, timeout)
        return self._execute(path, method, {}, _encode_fields(given).encode(), _FORM_TYPE, timeout)

    def api_execute_json(
        self, path: str, method: str, params: Any = None, timeout: Optional[float] = None,
    ) -> _Reply:
        """Send a request of your own with `params` as JSON and return the answer."""
        body = json.dumps(params).encode()
        return self._execute(path, method, {}, body, _JSON_TYPE, timeout)

    # -- below: no public names

    def _execute(
        self, path: str, method: str, query: Mapping[str, _Field], body: Optional[bytes],
        content_type: str, timeout: Optional[float],
    ) -> _Reply:
        if not path.startswith("/"):
            raise EtcdValueError("the path begins with a slash")
        if method not in ("GET", "PUT", "POST", "DELETE"):
            raise EtcdValueError(f"HTTP method {method} is not one of the API")
        return super()._perform(_Call(
            method, _target(path, query), _parse_not, body, content_type,
            math.inf if timeout == 0 else timeout, waits=query.get("wait") in (True, "true")))

    def _is_replaced(self, name: str = "api_execute") -> bool:
        return name in self.__dict__ or getattr(type(self), name) is not getattr(Client, name)

    def _perform(self, call: "_Call[_T]") -> _T:
        as_json = call.content_type == _JSON_TYPE and call.form is not None
        name = "api_execute_json" if as_json else "api_execute"
        if not self._is_replaced(name):
            return super()._perform(call)
        path, _, text = call.target.partition("?")
        given: Dict[str, Any] = {}
        if call.form is not None:
            text = call.form.decode()
        if as_json:
            given["params"] = json.loads(text)
        elif text or path.startswith(self.key_endpoint):
            given["params"] = dict(parse_qsl(text, True, errors="surrogateescape"))
            if call.method == "GET":
                given["timeout"] = 0 if call.timeout == math.inf else call.timeout
        answer = getattr(self, name)(unquote(path, errors="surrogateescape"), call.method, **given)
        return self._judge(self.base_uri, call, _as_reply(answer))

    def _members_call(
        self, method: str, path: str, peer_urls: Union[str, Iterable[str]],
        parse: Callable[[_Reply], _T],
    ) -> "_Call[_T]":
        urls = peer_urls.split(",") if isinstance(peer_urls, str) else list(peer_urls)
        target = _target(f"{self.version_prefix}/members{path}", {})
        body = json.dumps({"peerURLs": urls}).encode()
        return _Call(method, target, parse, body, _JSON_TYPE)


class Client(_Watching, _Cluster, _Users):
    """A connection to an etcd cluster; safe to share between threads.

    Client()                                        http://127.0.0.1:2379
    Client("10.0.0.1", 2379)                        one server
    Client(("::1", 2379))                           the same
    Client(["http://h:p", "h:p", ("h", p), ...])    several members of one cluster
    Client(endpoints=[...])                         the same
    Client(srv_domain="example.org")                those that DNS names
    Client.from_env()                               those that ETCDCTL_* name

    port, protocol       of hosts that come without
    version_prefix       what all paths begin with, but for /version and /health
    cert, ca_cert        files: our certificate, or it and its key as a pair; whom to believe
    verify               False: believe any server
    username, password   sent to the endpoints with every request
    proxies              {"http": url, "https": url}; the environment is not asked
    connect_timeout      seconds to make a connection
    read_timeout         seconds for each silence of the server; 0 for no limit
    total_timeout        seconds for a call over all endpoints; None for no limit
    allow_reconnect      False: never try another endpoint, and none twice.  True: as `sync`
    retry                False: try each endpoint once
    allow_redirect       follow redirects of reads, and those that were not carried out
    sync                 use the URLs that the members publish, too; never with use_proxies
    expected_cluster_id  refuse another cluster; None: than the first one that answers
    per_host_pool_size   idle connections to keep
    lock_prefix          directory of the locks
    session_timeout      seconds without an answer until `state` is LOST
    on_state             called with the new `state`, see add_listener

    Every keys method returns an EtcdResult and raises an EtcdError.  Keys may be written with or
    without the leading slash.  Nothing is sent before the first call.

    Thread: any.  Calls at the same time have connections of their own.
    """


# ============================================================================
# recipes/basics -- What every recipe rests on.
# ----------------------------------------------------------------------------
# A write whose fate is unknown carries a uuid, so that a look tells whether it is in.  A lease is
# counted from before the request that granted it was sent, on a clock of this machine that runs on
# while the machine sleeps, and less a margin.  A waiter watches one key, and looks anew after every
# event, timeout and error, so that a lost event costs time only.
# ============================================================================


LEASE_TTL_S = 30
EXPIRY_MARGIN = 0.1             # share of a ttl after which a lease counts as over before its time
CALL_TIMEOUT_S = 8.0            # of one request; above the 7 s after which etcd gives up on a write
OUTAGE_S = 30.0                 # how long a recipe waits for a cluster that does not answer
WAIT_SLICE_S = 20.0             # a waiter looks again after so long, even if nothing happened
TIDY_S = 0.5                    # for taking back what a call leaves that ended without success
LEAVE_S = 2.0                   # for removing the file of a lease that is stopped

_LostCallback = Optional[Callable[[], object]]


def _clock() -> float:
    """Return seconds that count on while the machine sleeps, where the system can tell."""
    clock_id = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock_id is None else time.clock_gettime(clock_id)


def _tell(function: Callable[..., Any], *args: Any) -> Any:
    """Call back what a user gave us, on a thread of ours, which survives even SystemExit."""
    try:
        return _call_back(function, *args)
    except SystemExit:
        _log.error("%r raised SystemExit, which ends no process from this thread", function)
        return None


def _recipe_key(key: str) -> str:
    """Return the clean `key`.  Raises ValueError if it names no place below the root."""
    if "." in key.split("/") or ".." in key.split("/") or not key.strip("/"):
        raise ValueError(f"{key!r} names no key: it needs a part, and none that is . or ..")
    return clean_key(key)


def _checked_ttl(ttl: int) -> int:
    if ttl < 1:
        raise ValueError("ttl is seconds, at least 1")
    return ttl


# What a forked child must make new, by identity.
_inherited: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


def _leave_to_parent() -> None:
    """In a forked child: give up what the parent holds, and locks that nobody will release."""
    for recipe in list(_inherited.values()):
        recipe._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


class _Span(Scope):
    """The scope of one call of a recipe."""

    __slots__ = ("looked",)

    def __init__(self, client: Client, timeout: Optional[float]) -> None:
        super().__init__(timeout, client.scope)
        self.looked = False                         # a server said that there is reason to wait

    def wait_s(self, longest_s: float = WAIT_MAX_S) -> float:
        """Return how long to wait for others now; 0: the time is over.  Raises Cancelled."""
        self.looked = True
        left_s = self.left_s(longest_s)
        return 0.0 if self.once else left_s

    def wait_for(self, changed: threading.Condition, condition: Callable[[], bool]) -> bool:
        """Wait until `condition` holds; `changed` is notified when it may.  Raises Cancelled."""
        def wake() -> None:
            with changed:
                changed.notify_all()
        self.attach(wake)
        try:
            with changed:
                changed.wait_for(lambda: self.cancelled or condition(), self.wait_s())
                self.left_s()
                return condition()
        finally:
            self.detach(wake)


class _Recipe:
    """A recipe whose calls wait: `cancel` ends those under way."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._spans: Dict[_Span, None] = {}         # of the calls under way
        _inherited[id(self)] = self

    def cancel(self) -> None:
        """End the calls of this object that wait now, as if their time was over.  Thread: any."""
        for span in list(self._spans):
            span.cancel()

    def _span(self, timeout: Optional[float]) -> "_Turn":
        return _Turn(self, timeout)

    def _after_fork(self) -> None:
        self._spans = {}


class _Turn:
    """A block in which a recipe waits.  After `cancel` it just ends, unless a write is in doubt.

    So it does if the time ends in the middle of a look that is not the first one.  If somebody
    else ended it (a scope around the call, or the client was closed) it raises Cancelled.
    """

    def __init__(self, recipe: _Recipe, timeout: Optional[float]) -> None:
        self._outer = (recipe.client.scope, _here.scope)
        self._spans = recipe._spans
        self._span = _Span(recipe.client, timeout)

    def __enter__(self) -> _Span:
        self._spans[self._span] = None
        self._span.__enter__()
        return self._span

    def __exit__(self, _: object, error: Optional[BaseException], *__: object) -> bool:
        self._span.__exit__()
        self._spans.pop(self._span, None)
        if not isinstance(error, EtcdError) or error.maybe_applied:
            return False
        if isinstance(error, Cancelled):
            return not any(scope is not None and scope.cancelled for scope in self._outer)
        return (self._span.looked and isinstance(error, ConnectionFailed)
                and not isinstance(error, WatchTimeout)
                and time.monotonic() >= self._span.deadline)


@contextlib.contextmanager
def _apart(timeout_s: float) -> Iterator[None]:
    """Give what has to be tidied up a time of its own, even when that of the call is over."""
    outer, _here.scope = _here.scope, None
    try:
        with Scope(timeout_s):
            yield
    finally:
        _here.scope = outer


def _insist(client: Client, attempt: Callable[[], _T], patience_s: Optional[float] = None) -> _T:
    """Repeat what may be repeated while no server can answer; then raise what the last one said.

    Whether a write may have been applied is said of all attempts together.
    """
    unsure, pause_s = False, 0.0
    with Scope(OUTAGE_S if patience_s is None else patience_s, client.scope) as scope:
        while True:
            try:
                if pause_s:
                    scope.wait(pause_s * random.uniform(0.5, 1.0))
                with Scope(CALL_TIMEOUT_S):
                    return attempt()
            except EtcdError as error:
                may_pass = is_endpoint_failure(error)
                unsure = unsure or error.maybe_applied
                pause_s = min(2 * pause_s, 1.0) or 0.05
                if not may_pass or scope.cancelled or scope.left_s() <= pause_s:
                    answered = not may_pass and not isinstance(error, Cancelled)
                    error.maybe_applied = error.maybe_applied or (unsure and not answered)
                    raise


def retry(client: Client, function: Callable[[], _T], *, timeout: Optional[float] = None,
          idempotent: bool = False) -> _T:
    """Call `function` until it returns, while no server can answer; return its result.

        retry(client, lambda: client.set("/a", "1"), timeout=60, idempotent=True)

    timeout     seconds in all; None: OUTAGE_S; 0: call it once
    idempotent  call it again even if its write may have been applied; else that error is raised

    An answer of etcd, such as KeyNotFound, is raised at once.
    """
    def attempt() -> "_T":
        try:
            return function()
        except EtcdError as error:
            if error.maybe_applied and not idempotent:
                raise _InDoubt(error) from error
            raise
    try:
        return attempt() if timeout == 0 else _insist(client, attempt, timeout)
    except _InDoubt as doubt:
        raise doubt.error from doubt.error.__cause__


class _InDoubt(Exception):
    """Carries an error past those who would try again."""

    def __init__(self, error: EtcdError) -> None:
        super().__init__(error)
        self.error = error


def _read(client: Client, key: str, *, recursive: bool = False) -> Result:
    """Return what a quorum knows of `key`."""
    return _insist(client, lambda: client.get(key, recursive=recursive, quorum=True))


def _children(client: Client, directory: str) -> Tuple[List[Node], int]:
    """Return the children of a directory in the order of creation, and the index they are of."""
    try:
        found = _read(client, directory)
    except KeyNotFound as error:
        return [], error.index
    return sorted(found.nodes, key=lambda node: node.created_index), found.etcd_index


def _entries(client: Client, line: str) -> Tuple[List[Node], int]:
    """Return the in-order files of a directory, first come first, and the index they are of.

    Other files and directories in it, such as the lines of locks whose names begin with the name
    of this one, are nobody's place in the line.
    """
    nodes, index = _children(client, line)
    return sorted(filter(_is_entry, nodes), key=_number), index


def _is_entry(node: Node) -> bool:
    """Whether etcd chose the name of a file: the index at which it was made.

    etcd 2.3 fills it up to 20 digits; in earlier ones it equals the created index, until somebody
    renews the file by an unconditional write, as python-etcd does.
    """
    name = _name(node.key)
    return not node.dir and name.isascii() and name.isdigit() and (
        len(name) == 20 or name == str(node.created_index))


def _number(node: Node) -> int:
    return int(_name(node.key))


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _create_once(client: Client, key: str, value: str, ttl: Optional[int]) -> Tuple[Node, bool]:
    """Create a file whose value nobody else writes there; raise NodeExists if another did.

    Repeating a creation is harmless: if an earlier attempt is in, the value says so, and the
    second result is False.  A file that expires between creation and reading is created again.
    """
    while True:
        try:
            return _insist(client, lambda: client.create(key, value, ttl=ttl)).node, True
        except NodeExists:
            with contextlib.suppress(KeyNotFound):      # gone since: it can be created
                node = _read(client, key).node
                if node.value == value:
                    return node, False
                raise


def _append_once(
    client: Client, directory: str, value: str, ttl: Optional[int],
    find: Callable[[], Optional[Node]],
) -> Tuple[Node, bool]:
    """Create an in-order file with a value that nobody else writes.

    After an unknown fate `find` looks for it, and it is written again if that finds nothing.
    Should the first one arrive even later there are two; the second result is False then.
    """
    sure = True

    def attempt() -> "Node":
        nonlocal sure
        found = None if sure else find()
        if found is not None:
            return found
        try:
            return client.append(directory, value, ttl=ttl).node
        except EtcdError as error:
            sure = sure and not error.maybe_applied
            raise
    return _insist(client, attempt), sure


def _remove(client: Client, key: str, value: str) -> None:
    """Delete a file if it has `value`; what cannot be deleted now is left to its ttl."""
    with contextlib.suppress(EtcdError):
        _insist(client, lambda: client.compare_and_delete(key, prev_value=value))


def _is_removal(event: Result) -> bool:
    return event.action in _REMOVALS


def _await(
    client: Client, span: _Span, key: str, index: int, longest_s: float,
    below: Optional[Callable[[Result], bool]] = None,
) -> bool:
    """Wait for a change of `key` after `index`; return whether there is time for another look.

    below  wait for a change below `key` instead of which this holds

    May return early: a waiter looks again.
    """
    wait_s = span.wait_s(longest_s)
    if not wait_s:
        return False
    try:
        with client.watcher(key, recursive=below is not None, index=index + 1, timeout=wait_s,
                            relist=False) as events:
            for event in events:
                if below is None or below(event):
                    break
    except (WatchTimeout, EventIndexCleared):
        pass
    except EtcdError as error:
        if not is_endpoint_failure(error):
            raise
        with Scope(wait_s) as scope:
            scope.wait(0.2)                         # then the look tells whether that lasts
    return span.wait_s() > 0


# ============================================================================
# recipes/leases -- Leases: keys that live as long as their owner.
# ============================================================================


_HeartbeatType = TypeVar("_HeartbeatType", bound="Heartbeat")


class Heartbeat:
    """Keeps a file that exists from expiring, without waking those who watch it.

        with Heartbeat(client, "/jobs/7/running", ttl=10) as heartbeat:
            ...
            heartbeat.is_held           # False: it may be gone

    ttl      seconds, at least 1; renewed after a third of it
    on_lost  called once, on the thread of the heartbeat, when `is_held` has become False without
             `stop`: no server could renew the file in time, it is gone, its value has changed, or
             the client was closed

    Guarantee: `is_held` is False before a server lets the file expire, and stays so.  It is read
    off the local clock, whatever the thread and the network do.
    Limit: a tenth of the ttl must cover by how much the wall clocks of the members differ, since
    one of them sets the instant of expiry and another one acts on it.  `is_held` speaks of the
    moment it was asked: what is done a moment later needs a fencing token.  It does not ask a
    server: that somebody deleted the file shows at the next renewal, after a third of the ttl;
    `renew` asks now.  A forked child holds nothing, and cannot start what its parent started.
    etcd before 2.3 cannot refresh: there each renewal is a write that watchers see.

    Thread: any.  It runs a daemon thread, which `stop` joins and the end of the client ends.
    """

    def __init__(self, client: Client, key: str, ttl: int = LEASE_TTL_S, *,
                 on_lost: _LostCallback = None) -> None:
        self.client = client
        self.key = _recipe_key(key)
        self.ttl = _checked_ttl(ttl)
        self._on_lost = on_lost
        self._value = ""
        self._index = 0                             # modified index as last known
        self._silent = False                        # whether the server is known to have refresh
        self._due_at = 0.0                          # next renewal
        self._over = True                           # stopped or lost, and never again held
        self._expires_at = 0.0
        self._pid = 0                               # of the process that started it
        self._stopped = False
        self._scope = Scope()                       # of the thread: cancelled by `stop`
        self._thread: Optional[threading.Thread] = None
        self._after_fork()
        _inherited[id(self)] = self

    @property
    def is_held(self) -> bool:
        """Whether the file is certain to be there."""
        with self._lock:
            self._over = self._over or _clock() >= self._expires_at
            return not self._over and self._pid == os.getpid()

    @property
    def alive(self) -> bool:
        """As is_held."""
        return self.is_held

    @property
    def value(self) -> str:
        """Value of the file."""
        return self._value

    def start(self: _HeartbeatType) -> _HeartbeatType:
        """Renew the file now, and from now on.  Raises KeyNotFound, or that no server answers."""
        if self._pid not in (0, os.getpid()):
            raise RuntimeError(f"{self.key} belongs to the parent process: make another object")
        if self._thread is not None and self._thread.is_alive() and not self._stopped:
            return self                             # started already
        self._obtain()
        self._stopped, self._scope = False, Scope(None, self.client.scope)
        self._thread = threading.Thread(
            target=self._run, name=f"pyetcd-heartbeat {self.key}", daemon=True)
        self._thread.start()
        return self

    def renew(self, ttl: Optional[int] = None) -> bool:
        """Renew the file now; return whether it is held.

        ttl  seconds from now on; None: as before

        Raises that no server answers; then the heartbeat goes on trying.
        """
        if ttl is not None:
            self.ttl = _checked_ttl(ttl)
        if not self.is_held:
            return False
        try:
            self._renew()
        except (KeyNotFound, CompareFailed, NotFile, NotDir):
            self._lose()
        finally:
            self._wake.set()                        # the next one may be due earlier now
        return self.is_held

    def stop(self) -> bool:
        """Stop renewing, and leave the file to its ttl.  Return whether it was held until now."""
        held = self.is_held
        if self._pid != os.getpid():                # in a forked child it is the parent's
            return False
        self._end()
        around = _here.scope                        # its end must not leave the file to others
        over = around is not None and (
            around.cancelled or time.monotonic() + TIDY_S >= around.deadline)
        with _apart(TIDY_S) if over else Scope(LEAVE_S):
            self._leave()
        return held

    def __enter__(self: _HeartbeatType) -> _HeartbeatType:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- below: no public names

    def _after_fork(self) -> None:
        self._lock = threading.Lock()               # guards _over and _expires_at; a leaf
        self._renewing = threading.Lock()           # one renewal at a time; guards _index
        self._wake = threading.Event()              # the thread should look

    def _obtain(self) -> None:
        """Get the file to keep; the end of its life is known afterwards."""
        node = _read(self.client, self.key).node
        self._value, self._index = node.value or "", node.modified_index
        self._adopt()

    def _adopt(self) -> None:
        """Renew a file whose remaining life is not known."""
        sent_at = _clock()
        self._index = _insist(self.client, self._swap_ours).modified_index
        self._granted_at(sent_at)

    def _leave(self) -> None:
        """Do what follows the last renewal."""

    def _granted_at(self, sent_at: float) -> None:
        """Begin a new life of the file, from before the request that gave it was sent."""
        with self._lock:
            self._pid, self._over = os.getpid(), False
            self._expires_at = sent_at + self.ttl * (1 - EXPIRY_MARGIN)
        self._due_at = sent_at + self.ttl / 3

    def _lose(self) -> None:
        """End the life of the file, and let the thread know."""
        with self._lock:
            self._over = True
        self._wake.set()

    def _end(self) -> None:
        """End the thread, also in the middle of a renewal, and wait for it."""
        self._stopped = True
        self._lose()
        self._scope.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            with self._scope as scope:
                scope.attach(self._wake.set)
                while self._keep(scope) and self._regain(scope):
                    pass
        except Cancelled:                           # by `stop`, or the client was closed
            self._lose()
            if not self._stopped and self._on_lost is not None:
                _tell(self._on_lost)

    def _regain(self, _scope: Scope) -> bool:
        """Do what follows a loss; return whether there is a file to keep again."""
        if self._on_lost is not None:
            _tell(self._on_lost)
        return False

    def _keep(self, scope: Scope) -> bool:
        """Renew until stopped (return False) or lost (return True).  Raises Cancelled."""
        while self.is_held:
            self._wake.wait(max(0.0, min(self._due_at, self._expires_at) - _clock()))
            self._wake.clear()
            scope.left_s()
            if self.is_held and _clock() >= self._due_at:
                try:
                    self._renew()
                except (KeyNotFound, CompareFailed, NotFile, NotDir):
                    break
                except Cancelled:
                    raise
                except EtcdError:                   # expires unless a later attempt succeeds
                    self._due_at = _clock() + min(0.5, self.ttl / 10)
        with self._lock:
            self._over = True
        return not self._stopped

    def _renew(self) -> None:
        """Give the file its ttl anew.  Raises CompareFailed or KeyNotFound if it is lost."""
        with self._alone():
            sent_at = _clock()
            timeout_s = max(0.1, min(CALL_TIMEOUT_S, self.ttl / 3, self._expires_at - sent_at))
            with Scope(timeout_s):
                self._index = self._swap_ours().modified_index
            with self._lock:                        # what was reported as lost stays lost
                if not self._over and _clock() < self._expires_at:
                    self._expires_at = sent_at + self.ttl * (1 - EXPIRY_MARGIN)
            self._due_at = sent_at + self.ttl / 3

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other renewals out, which would make the index wrong that this one compares."""
        if not self._renewing.acquire(timeout=CALL_TIMEOUT_S):
            raise RequestTimeout("another renewal is under way", endpoint="")
        try:
            yield
        finally:
            self._renewing.release()

    def _swap_ours(self) -> Result:
        """Renew the file; renewals whose answers were lost may have changed its index."""
        while True:
            try:
                return self._swap()
            except CompareFailed:
                node = self.client.get(self.key, quorum=True).node
                if node.value != self._value or node.modified_index == self._index:
                    raise                           # it is somebody else's
                self._index = node.modified_index

    def _swap(self, *, announce: bool = False) -> Result:
        """Renew on condition that nothing happened to the file since the index we know.

        Therefore a renewal that was given up for lost cannot take effect after a later one, and
        shorten what that has granted.
        """
        fields: Dict[str, _Field] = {
            "ttl": self.ttl, "prevValue": self._value or None, "prevIndex": self._index}
        if announce:
            return self.client._put(self.key, {**fields, "value": self._value})
        fields["refresh"] = True
        if not self._silent:
            try:                                    # etcd before 2.3 would empty the value
                return self.client._put(self.key, {**fields, "value": self._value or " "})
            except RefreshValue:
                self._silent = True
        return self.client._put(self.key, fields)


class Lease(Heartbeat):
    """A file that exists as long as this process keeps it: made by start, removed by stop.

        with Lease(client, "/hosts/a", "10.0.0.1", ttl=10) as lease:
            ...

    value    tells who made it: two leases of one key need different values; None: a uuid

    Guarantee: made once, even if answers are lost; start raises NodeExists while the key is
    somebody else's.  `is_held` as for Heartbeat.  A crash leaves the file for at most its ttl (and
    the half second that etcd takes to notice), and so does the end of the client.
    Limit: as for Heartbeat.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, value: Optional[str] = None,
                 ttl: int = LEASE_TTL_S, *, on_lost: _LostCallback = None) -> None:
        super().__init__(client, key, ttl, on_lost=on_lost)
        if value == "":
            raise ValueError("etcd cannot compare with an empty value")
        self._named = value is not None
        self._value = value or uuid.uuid4().hex

    def start(self: _HeartbeatType) -> _HeartbeatType:
        """Make the file and keep it.  Raises NodeExists, or that no server answers."""
        return super().start()

    def stop(self) -> bool:
        """Remove the file.  Return whether it was held until now.

        If no server answers within LEAVE_S, the file is left to its ttl.
        """
        return super().stop()

    # -- below: no public names

    _named = True                                   # the value is the user's

    def _after_fork(self) -> None:
        super()._after_fork()
        if not self._named:                         # by the same value the child would take the
            self._value = uuid.uuid4().hex          # parent's file for its own

    def _obtain(self) -> None:
        sent_at = _clock()
        self._index, fresh = self._make()
        if fresh and _clock() - sent_at < self.ttl / 3:
            self._granted_at(sent_at)
            return
        try:
            self._adopt()
        except (KeyNotFound, CompareFailed) as error:
            raise LockExpired("expired before it was known to be made", cause=self.key) from error

    def _make(self) -> Tuple[int, bool]:
        """Create the file; return its index, and whether its ttl was given just now."""
        node, fresh = _create_once(self.client, self.key, self._value, self.ttl)
        return node.modified_index, fresh

    def _leave(self) -> None:
        _remove(self.client, self.key, self._value)


class _Place(Lease):
    """A place in a line: an in-order file, whose number says who came first."""

    def __init__(self, client: Client, line: str, label: str, ttl: int) -> None:
        super().__init__(client, line, uuid.uuid4().hex + label, ttl)
        self.line = self.key
        self._sure = True                           # that there is no second entry of this place

    @property
    def number(self) -> int:
        """Place in the line: the index at which it was made."""
        return int(_name(self.key))

    def announce(self) -> None:
        """Renew the file so that its watchers see it; it is no harm if that fails."""
        with contextlib.suppress(EtcdError), self._alone():
            self._index = self._swap(announce=True).modified_index

    def _obtain(self) -> None:
        try:
            super()._obtain()
        except BaseException:                       # it may be in line all the same
            self._sure = False
            with _apart(TIDY_S):
                self._leave()
            raise

    def _find(self) -> Optional[Node]:
        found = [node for node in _entries(self.client, self.line)[0]
                 if node.value == self._value]
        return found[0] if found else None

    def _make(self) -> Tuple[int, bool]:
        node, self._sure = _append_once(
            self.client, self.line, self._value, self.ttl, self._find)
        self.key = node.key
        return node.modified_index, self._sure

    def _leave(self) -> None:
        if self.key != self.line:
            super()._leave()
        with contextlib.suppress(EtcdError):
            for node in () if self._sure else _entries(self.client, self.line)[0]:
                if node.value == self._value:
                    _remove(self.client, node.key, self._value)


# ============================================================================
# recipes/locks -- Locks and semaphores.
# ============================================================================


_ContenderType = TypeVar("_ContenderType", bound="Contender")
_LABELLED = re.compile(r"[0-9a-f]{32}:")


class Contender(_Recipe):
    """What Lock, RWLock, Semaphore and Election share: a line, and a place in it.

    The entry of a contender names the uuid of one attempt.  Only entries ahead can keep it
    waiting, none can appear there later, and so a contender that was let in stays in until its
    entry is gone.

    The object is the holder, whichever thread or task calls it: a second `acquire` waits until
    the first one was released or lost.
    """

    label = ""                                      # follows the uuid in the value of an entry
    _held: Optional[_Place]                         # guarded by _changed, as is _busy
    _retakes = True                                 # whether a lost hold may be acquired anew

    def __init__(self, client: Client, line: str, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        super().__init__(client)
        self.path = _recipe_key(line)
        self.ttl = _checked_ttl(ttl)
        self._on_lost = on_lost
        self._blocks = threading.local()            # .places: of the `with` blocks of a thread
        self._after_fork()

    @property
    def is_held(self) -> bool:
        """Whether it is held; False before a server could give it to another."""
        held = self._held
        return held is not None and held.is_held

    is_acquired = is_held                           # as python-etcd calls it

    @property
    def token(self) -> int:
        """Fencing token: higher than that of every earlier holder.  0 if it is not held.

        Send it with every write to what is protected, and have that refuse lower ones than it has
        seen: this is what protects it from a holder that was suspended and does not know yet.
        """
        held = self._held
        return held.number if held is not None and held.is_held else 0

    def acquire(self, blocking: bool = True, lock_ttl: Optional[int] = None,
                timeout: Optional[float] = None) -> bool:
        """Wait for it.  Return whether it is held.

        blocking  False: as timeout=0
        lock_ttl  seconds, instead of the ttl of the constructor; None: that one
        timeout   seconds to wait; None: for ever; 0: try once and do not wait

        False after `timeout`, and after `cancel` by another thread; nothing is left in the line
        then, nor after an exception (if no server answers, for the ttl at most).  Raises EtcdError
        if no server answered for OUTAGE_S seconds or for as long as there was time.

        While it is held through this object, acquire waits, also in the same thread, since a
        thread may serve many tasks: RLock may be acquired again, and `renew` renews.  Only where
        the wait could never end, without a limit in the main thread, it renews as python-etcd's.
        """
        if blocking and timeout is None and self._waits_for_itself():
            return self.renew(lock_ttl)
        return self._acquire(blocking, lock_ttl, timeout) is not None

    def renew(self, lock_ttl: Optional[int] = None) -> bool:
        """Renew the entry now, as the heartbeat does in time; return whether it is held.

        lock_ttl  seconds from now on; None: as before

        This asks the cluster: False also if somebody has removed the entry a moment ago.
        """
        held = self._held
        return held is not None and held.renew(lock_ttl)

    def release(self, token: Optional[int] = None) -> bool:
        """Give it up, from any thread.  Return whether it was held until now.

        token  nothing happens unless the hold is the one with this token

        If no server answers within LEAVE_S, the entry is left to its ttl.
        """
        with self._changed:
            held = self._held
            if held is None or (token is not None and held.number != token):
                return False
            self._held = None
        try:
            return held.stop()
        finally:
            self._set_free()

    def check(self) -> None:
        """Raise LockExpired unless it is held."""
        if not self.is_held:
            raise LockExpired("not held", cause=self.path)

    def contenders(self) -> List[str]:
        """Return the values of the entries in the line, the one served first at the head."""
        return [node.value or "" for node in self._line()[0]]

    def __enter__(self: _ContenderType) -> _ContenderType:
        if self._waits_for_itself():
            raise RuntimeError(f"{self.path} is held by this block's own thread: use RLock")
        place = self._acquire(True, None, None)
        if place is None:
            raise LockExpired("not acquired: cancelled, or lost before", cause=self.path)
        self._blocks.places = [*self._entered(), place]
        return self

    def __exit__(self, *_: object) -> None:
        *self._blocks.places, place = self._entered()
        if place is self._held:                     # else it was lost, and perhaps acquired anew
            self.release()

    # -- below: no public names

    def _after_fork(self) -> None:
        super()._after_fork()
        self._changed = threading.Condition()
        self._busy = False                          # somebody contends or holds
        self._held = None
        self._taken_by: object = None               # thread of the last acquire

    def _entered(self) -> List[_Place]:
        return getattr(self._blocks, "places", [])

    def _acquire(self, blocking: bool, lock_ttl: Optional[int],
                 timeout: Optional[float]) -> Optional[_Place]:
        ttl = self.ttl if lock_ttl is None else _checked_ttl(lock_ttl)
        with self._span(timeout if blocking else 0) as span:
            lost = self._take_turn(span)
            if lost is None:
                return None
            place = None
            try:
                for old in lost:
                    old.stop()
                place = self._contend(ttl, span)
            finally:
                if place is None:
                    self._set_free()
            blocks = self._entered()                # acquired anew inside of a block
            if place is not None and blocks and not blocks[-1].is_held:
                blocks[-1] = place
            return place
        return None                                 # cancelled

    def _waits_for_itself(self) -> bool:
        """Whether the main thread, outside of an event loop, would wait for what it holds.

        Any other thread may serve a pool or a loop, where another task releases it.
        """
        thread = threading.current_thread()         # not its ident, which another one gets later
        if not self.is_held or self._taken_by is not thread:
            return False
        asyncio = sys.modules.get("asyncio")
        looping = asyncio is not None and asyncio._get_running_loop() is not None
        return thread is threading.main_thread() and not looping

    def _take_turn(self, span: _Span) -> Optional[List[_Place]]:
        """Wait until nobody contends for or holds this object; None: it was in vain.

        Returns the hold that was lost, if nobody has given it up since, to be stopped.
        """
        if self._taken_by is threading.current_thread() and self.is_held and span.wait_s():
            _log.warning("%s is held by this object, and this thread waits until it is released: "
                         "RLock may be acquired again, renew() renews", self.path)
        while span.wait_for(self._changed, self._is_free):
            with self._changed:
                if self._is_free():
                    lost = [] if self._held is None else [self._held]
                    self._busy, self._held = True, None
                    self._taken_by = threading.current_thread()
                    return lost
        return None

    def _is_free(self) -> bool:
        held = self._held
        return not self._busy or (self._retakes and held is not None and not held.is_held)

    def _set_free(self) -> None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def _line(self) -> Tuple[List[Node], int]:
        """Return the entries that count, first come first, and the index.

        With a label those of this recipe; without one also those of python-etcd's lock.
        """
        nodes, index = _entries(self.client, self.path)
        if self.label:
            nodes = [node for node in nodes if _LABELLED.match(node.value or "")]
        return nodes, index

    def _blocker(self, ahead: List[Node]) -> Optional[str]:
        """Return the key to watch before looking again; None: let in.

        The line itself stands for: until any entry is gone.
        """
        return ahead[-1].key if ahead else None

    def _contend(self, ttl: int, span: _Span) -> Optional[_Place]:
        """Stand in line until let in, or out of time (return None).  Raises Cancelled."""
        place: Optional[_Place] = None
        client_scope = self.client.scope
        try:
            while True:
                if place is None or not place.is_held:
                    place = self._enter(place, ttl)
                blocker, index = self._look(place)
                if blocker is None:
                    self._held = place
                    if place.is_held:
                        return place
                    self._held = None
                if not self._wait(span, place, blocker, index):
                    return None
        finally:
            if place is not None and self._held is not place:
                place._end()
                if not client_scope.cancelled:
                    with _apart(TIDY_S):
                        place._leave()

    def _enter(self, old: Optional[_Place], ttl: int) -> _Place:
        """Take a place at the end of the line, instead of one that was lost."""
        if old is not None:
            old.stop()
        place = _Place(self.client, self.path, self.label, ttl)
        place._on_lost = lambda: self._lost(place)
        try:
            return place.start()
        except Cancelled as error:
            error.maybe_applied = False             # what may be in the line is taken back
            raise

    def _look(self, place: _Place) -> Tuple[Optional[str], int]:
        """Return the key to wait for (None: let in; "": none, look again) and the index."""
        entries, index = self._line()
        for node in entries:
            if node.value == place.value and node.key != place.key:
                # An append that was given up for lost came in after all.
                with Scope(TIDY_S):
                    _remove(self.client, node.key, place.value)
        keys = [node.key for node in entries]
        if place.key not in keys:                   # expired or removed
            place.stop()
            return "", index
        position = keys.index(place.key)
        blocker = self._blocker(entries[:position])
        if blocker is None and position + 1 < len(keys):
            self._let_in(place)
        return blocker, index

    def _let_in(self, place: _Place) -> None:
        """Do what those behind need when this contender is let in."""

    def _wait(self, span: _Span, place: _Place, blocker: Optional[str], index: int) -> bool:
        """Wait for a change of `blocker`, or until `place` is lost; return whether to look again.

        blocker  "" or None: there is none, but to look again
        """
        with contextlib.suppress(Cancelled), Scope() as waiting:
            place._scope.attach(waiting.cancel)
            try:
                if blocker and place.is_held:
                    _await(self.client, span, blocker, index, min(WAIT_SLICE_S, place.ttl),
                           below=_is_removal if blocker == self.path else None)
            finally:
                place._scope.detach(waiting.cancel)
        return span.wait_s() > 0

    def _lost(self, place: _Place) -> None:
        if self._held is place:
            with self._changed:
                self._changed.notify_all()
            if self._on_lost is not None:
                self._on_lost()
        else:
            place._scope.cancel()                   # it waits in vain, and must line up again


class Lock(Contender):
    """A lock that one contender in the cluster holds at a time; first come, first served.

        lock = Lock(client, "reports", ttl=10, on_lost=stop_working)
        with lock:
            write(..., fencing_token=lock.token)
        if lock.acquire(timeout=5): ...

    on_lost  called on another thread when the lock is lost while it is held; at that time
             `is_held` is False already, and the lock may be given to another soon

    It is python-etcd's lock, in one line with it: an in-order file under client.lock_prefix.
    Unlike there, an entry has a ttl always, and it is renewed while the process lives: a crash
    gives the lock away after the ttl, a long piece of work does not.

    Guarantee: while `is_held` is True nobody else holds it.  No lost answer, change of leader or
    restart of members breaks that, nor makes two places out of one acquire for longer than a ttl.
    A release wakes only the next in line.
    Limit: that of Heartbeat: clocks of the members differ by less than ttl / 10, and what takes
    place after the last look at `is_held` needs `token`.

    Thread: any.  Threads and tasks that share the object exclude each other too; after a lost
    hold was acquired anew, only release(token) tells the old hold from the new one.
    """

    def __init__(self, client: Client, lock_name: str, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        super().__init__(client, _below_prefix(client, lock_name), ttl=ttl, on_lost=on_lost)
        self.name = lock_name

    @property
    def uuid(self) -> str:
        """What the entry of the holder says, if this lock is held; else empty."""
        held = self._held
        return "" if held is None else held.value

    @property
    def lock_key(self) -> str:
        """Key of the entry, if this lock is held.  Raises ValueError."""
        held = self._held
        if held is None:
            raise EtcdValueError("not held: there is no entry", cause=self.path)
        return held.key

    is_taken = Contender.is_held                    # and this


def _below_prefix(client: Client, name: str) -> str:
    return client.lock_prefix + _recipe_key(name)


class RLock(Lock):
    """A Lock that its holder may acquire again; each acquire needs a release.

        with lock, lock: ...                        # the holder is the thread
        lock.acquire(holder=task)                   # ... or what you name: a task, a request

    Guarantee and limit are those of Lock.  When the lock is lost, an inner acquire returns False
    (or raises LockExpired, from `with`): the outer block has to end first.  Tasks that share
    threads name themselves as `holder`, as the thread cannot tell them apart.
    """

    _retakes = False
    _holder: object
    _depth: int                                     # acquires of the holder

    def acquire(self, blocking: bool = True, lock_ttl: Optional[int] = None,
                timeout: Optional[float] = None, *, holder: object = None) -> bool:
        """Acquire as Lock does, or once more, which renews if `lock_ttl` is given.  See Lock."""
        return self._acquire(blocking, lock_ttl, timeout, holder) is not None

    def _waits_for_itself(self) -> bool:
        return False

    def release(self, token: Optional[int] = None) -> bool:
        """Undo one acquire; the last one gives the lock up.  Return whether it was held."""
        with self._changed:
            self._depth = max(0, self._depth - 1)
            if self._depth:
                return self.is_held
            self._holder = None
        return super().release(token)

    # -- below: no public names

    def _after_fork(self) -> None:
        super()._after_fork()
        self._holder, self._depth = None, 0

    def _acquire(self, blocking: bool, lock_ttl: Optional[int], timeout: Optional[float],
                 holder: object = None) -> Optional[_Place]:
        holder = threading.current_thread() if holder is None else holder
        with self._changed:
            held = self._held if self._holder == holder else None
            self._depth += held is not None and held.is_held
        if held is not None:
            if lock_ttl is not None and held.is_held:
                with contextlib.suppress(EtcdError):    # if it fails the heartbeat tries again
                    held.renew(lock_ttl)
            return held if held.is_held else None
        place = super()._acquire(blocking, lock_ttl, timeout)
        if place is not None:
            self._holder, self._depth = holder, 1
        return place


class RWLock:
    """A lock that either one writer or any number of readers hold; first come, first served.

        lock = RWLock(client, "/config-lock")
        with lock.read_lock(): ...
        with lock.write_lock() as held: write(..., fencing_token=held.token)

    Each call of read_lock and write_lock returns a contender of its own, which has the methods of
    Lock.  A waiting writer keeps later readers waiting, so that it gets its turn.

    Guarantee: while a write lock `is_held`, no other one is; while a read lock `is_held`, no write
    lock is.  A waiting writer watches the entry before it, a reader the last writer before it.
    Limit: as for Lock.  A thread that holds one and asks for the other waits for itself.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        _recipe_key(key)
        self._contender: Callable[[Type[Contender]], Contender] = lambda kind: kind(
            client, key, ttl=ttl, on_lost=on_lost)

    def read_lock(self) -> Contender:
        """Return a contender that shares the lock with other readers."""
        return self._contender(_Reader)

    def write_lock(self) -> Contender:
        """Return a contender that shares the lock with nobody."""
        return self._contender(_Writer)


class _Writer(Contender):
    """Waits for all before it."""

    label = ":write"


class _Reader(Contender):
    """Waits for the writers before it."""

    label = ":read"

    def _blocker(self, ahead: List[Node]) -> Optional[str]:
        writers = [node for node in ahead if not (node.value or "").endswith(self.label)]
        return writers[-1].key if writers else None


class Semaphore(Contender):
    """At most `limit` contenders hold it at a time; first come, first served.

        with Semaphore(client, "/downloads", limit=3): ...

    An object is one contender: make one for each unit that is wanted.

    Guarantee: never more than `limit` objects with `is_held` True, if all have the same limit;
    acquire raises ValueError if it meets another limit in the line.  A release wakes the first of
    those who wait; each one that is let in wakes the next.
    Limit: as for Lock.  A token tells holders apart, but those of several holders are valid at a
    time.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, limit: int, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        if limit < 1:
            raise ValueError("limit is at least 1")
        super().__init__(client, key, ttl=ttl, on_lost=on_lost)
        self.limit = limit
        self.label = f":limit={limit}"

    def _blocker(self, ahead: List[Node]) -> Optional[str]:
        other = [node for node in ahead if not (node.value or "").endswith(self.label)]
        if other:
            raise ValueError(f"{other[0].value} stands in line, {self.label} wants to join it")
        if len(ahead) < self.limit:
            return None
        # The first of those who wait waits for any holder; the others for the one before them to
        # leave or to be let in, which is told by a renewal that is not silent.
        return self.path if len(ahead) == self.limit else ahead[-1].key

    def _let_in(self, place: _Place) -> None:
        place.announce()


# ============================================================================
# recipes/elections -- Elections, and values that are observed.
# ============================================================================


TAKEN_TTL_S = 120               # what was taken from a queue leaves a mark for so long
COUNTER_WRITERS = 32            # so many writers find out whether a lost change is in
PRIORITY = 100                  # of an item that comes without

_Wait = Tuple[str, int, Optional[Callable[[Result], bool]]]     # key, index, below: see _await


class Observed(_Recipe, Generic[_T]):
    """What somebody observes: `next` returns it, at first and whenever it has changed.

    Between two looks a state may be missed; the last one is not.  `close` ends the iteration, from
    any thread.  Raises WatchTimeout when there was no change in time; then `next` may be called
    again.

    look     returns what there is, and how to wait: key, index, and what must happen below the key
             (see _await)
    timeout  seconds each `next` may take; None: no limit; 0: it looks, and does not wait

    Thread: one, except for `close`.
    """

    def __init__(self, client: Client, look: Callable[[], Tuple[_T, _Wait]],
                 timeout: Optional[float] = None) -> None:
        super().__init__(client)
        self._look = look
        self._timeout = timeout
        self._seen: List[_T] = []                   # what was returned last
        self._closed = False

    def __iter__(self) -> "Observed[_T]":
        return self

    def __next__(self) -> _T:
        with self._span(self._timeout) as span:
            while not self._closed:
                state, (key, index, below) = self._look()
                if [state] != self._seen:
                    self._seen = [state]
                    return state
                if not _await(self.client, span, key, index, WAIT_SLICE_S, below):
                    break
        if self._closed:
            raise StopIteration
        raise WatchTimeout("no change in time")

    def close(self) -> None:
        """End the iteration: a `next` that waits in another thread ends at once.  Thread: any."""
        self._closed = True
        self.cancel()

    def __enter__(self) -> "Observed[_T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_change(event: Result) -> bool:
    return event.action in _CHANGES


_CHANGES = _REMOVALS | {"create", "set", "update", "compareAndSwap"}


class Leader(NamedTuple):
    """Who leads: what it said of itself, and its fencing token."""

    value: str
    token: int


class Election(Contender):
    """One of many candidates leads; when it is gone the one that came next leads.

        election = Election(client, "/scheduler", value="host-a", ttl=10, on_lost=stop)
        with election:                              # the block begins when this candidate leads
            work(fencing_token=election.token)
        election.run(work)                          # the same

        with Election(client, "/scheduler").observe() as leaders:       # anywhere
            for leader in leaders:
                print(leader.value if leader else "nobody")

    value    what others see of this candidate

    Guarantee: while `is_held` is True no other candidate's is.  A crashed leader is followed
    after its ttl.  Terms have rising tokens.
    Limit: as for Lock.

    Thread: any.  `campaign` is acquire, `resign` release, and the object a context manager.
    """

    def __init__(self, client: Client, key: str, value: str = "", *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        super().__init__(client, key, ttl=ttl, on_lost=on_lost)
        self.label = ":" + value

    @property
    def is_leader(self) -> bool:
        """As is_held."""
        return self.is_held

    def campaign(self, timeout: Optional[float] = None) -> bool:
        """Stand for election until this candidate leads; return whether it does.  See acquire."""
        return self.acquire(timeout=timeout)

    def resign(self) -> bool:
        """Stop leading; return whether it led until now."""
        return self.release()

    def run(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call `function` as soon as this candidate leads, resign, and return its result.

        It should stop when the lead is lost: on_lost says so, `is_held` too.  Raises LockExpired
        if `cancel` ended the campaign.
        """
        with self:
            return function(*args, **kwargs)

    def leader(self) -> Optional[Leader]:
        """Return who leads now, by quorum; None if there are no candidates."""
        return self._first(self._line()[0])

    def observe(self, timeout: Optional[float] = None) -> "Observed[Optional[Leader]]":
        """Return an iterator over who leads, now and whenever that changes; None: nobody.

        timeout  seconds without a change after which WatchTimeout is raised; None: never

        A leader between two looks may be missed; the last one is not.
        """
        def look() -> "Tuple[Optional[Leader], _Wait]":
            entries, index = self._line()
            wait: _Wait = (self.path, index, lambda event: event.action == "create")
            return self._first(entries), (entries[0].key, index, None) if entries else wait
        return Observed(self.client, look, timeout)

    @staticmethod
    def _first(entries: List[Node]) -> Optional[Leader]:
        if not entries:
            return None
        value = entries[0].value or ""
        return Leader(value.partition(":")[2], _number(entries[0]))


# ============================================================================
# recipes/barriers -- Barriers and counters.
# ============================================================================


class Barrier(_Recipe):
    """A gate for all: closed by one process, and opened for all who wait.

        barrier = Barrier(client, "/maintenance")
        barrier.create()                            # close it
        barrier.wait(timeout=60)                    # elsewhere: True when it is open
        barrier.remove()                            # open it

    Guarantee: wait returns True only after a moment at which the barrier was not there.
    Limit: it stays until it is removed, unless it has a ttl.  All who wait are woken at once.

    Thread: any.
    """

    def __init__(self, client: Client, key: str) -> None:
        super().__init__(client)
        self.path = _recipe_key(key)

    def create(self, ttl: Optional[int] = None) -> bool:
        """Close the barrier, for `ttl` seconds at most; False if it was closed already."""
        try:
            _create_once(self.client, self.path, uuid.uuid4().hex,
                         None if ttl is None else _checked_ttl(ttl))
        except NodeExists:
            return False
        return True

    def remove(self) -> bool:
        """Open the barrier; False if it was open already."""
        try:
            node = _read(self.client, self.path).node
        except KeyNotFound:
            return False
        with contextlib.suppress(KeyNotFound, CompareFailed):
            # By value, as a Heartbeat may keep it; by index if another program made it empty.
            _insist(self.client, lambda: self.client.compare_and_delete(
                self.path, prev_value=node.value or None,
                prev_index=None if node.value else node.modified_index))
        return True

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Wait until the barrier is open; False after `timeout` seconds (None: never).

        False after `cancel`, too.
        """
        with self._span(timeout) as span:
            while True:
                try:
                    index = _read(self.client, self.path).etcd_index
                except KeyNotFound:
                    return True
                if not _await(self.client, span, self.path, index, WAIT_SLICE_S):
                    return False
        return False


class DoubleBarrier(_Recipe):
    """Lets `size` participants begin together and end together, round after round.

        barrier = DoubleBarrier(client, "/phase", size=3)
        with barrier:
            work()

    Guarantee: enter returns True only after `size` participants were there at the same time, and
    leave only after all of this one's round have left, or expired.  Who comes later takes part in
    the next round.
    Limit: who is cut off for longer than its ttl is no participant any more, and enter raises
    LockExpired.  All participants name the same size.  One small file stays, which counts rounds.

    Thread: one, except for `cancel`; an object is one participant.
    """

    def __init__(self, client: Client, key: str, size: int, *, ttl: int = LEASE_TTL_S) -> None:
        if size < 1:
            raise ValueError("size is at least 1")
        super().__init__(client)
        self.path = _recipe_key(key)
        self.size = size
        self.ttl = _checked_ttl(ttl)
        self._place: Optional[_Place] = None
        self._round = 0                             # the index at which it began

    def enter(self, timeout: Optional[float] = None) -> bool:
        """Wait for the others; False after `timeout` seconds (None: never), and not inside.

        False after `cancel`, too.
        """
        place, self._round = _Place(self.client, f"{self.path}/members", "", self.ttl), 0
        try:
            with self._span(timeout) as span:
                place.start()
                self._round = self._await_round(place, span)
        finally:
            if not self._round:
                with _apart(TIDY_S):
                    place.stop()
        self._place = place
        return self._round > 0

    def leave(self, timeout: Optional[float] = None) -> bool:
        """Leave, and wait until the others have left; False after `timeout` seconds."""
        if self._place is not None:
            self._place.stop()
        with self._span(timeout) as span:
            while True:
                members, index = _entries(self.client, f"{self.path}/members")
                inside = [node for node in members if node.created_index < self._round]
                if not inside:
                    return True
                if not _await(self.client, span, inside[-1].key, index,
                              min(WAIT_SLICE_S, self.ttl)):
                    return False
        return False

    def __enter__(self) -> "DoubleBarrier":
        if not self.enter():
            raise Cancelled("cancelled", cause=self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    # -- below: no public names

    def _after_fork(self) -> None:
        super()._after_fork()
        self._place, self._round = None, 0          # the participant is the parent

    def _await_round(self, place: _Place, span: _Span) -> int:
        """Return the index at which the round of `place` began; 0 if time is up.

        A file is written when a round is complete.  Those whose number lies between two such
        writes are of one round.
        """
        while place.is_held:
            last, index = self._last_round()
            if last > place.number:
                return last
            members, _ = _entries(self.client, f"{self.path}/members")
            # By value: an append that was given up for lost may have come in after all.
            if len({node.value for node in members if node.created_index > last}) >= self.size:
                self._begin_round(last)
                continue
            if not _await(self.client, span, f"{self.path}/round", index,
                          min(WAIT_SLICE_S, self.ttl)):
                return 0
        raise LockExpired("expired while it waited", cause=place.key)

    def _last_round(self) -> Tuple[int, int]:
        try:
            found = _read(self.client, f"{self.path}/round")
        except KeyNotFound as error:
            return 0, error.index
        return found.modified_index, found.etcd_index

    def _begin_round(self, last: int) -> None:
        """Write that a round is complete, unless another participant does."""
        key, mark = f"{self.path}/round", uuid.uuid4().hex
        with contextlib.suppress(CompareFailed, NodeExists, KeyNotFound):
            if last:
                _insist(self.client, lambda: self.client.compare_and_swap(
                    key, mark, prev_index=last))
            else:
                _create_once(self.client, key, mark, None)


class Counter(_Recipe):
    """A number that many change.

        counter = Counter(client, "/tickets")
        counter.add()                               # 1, in the whole cluster once
        counter.add(-1); counter.value

    The file holds the number and, behind it, the last change of each of the COUNTER_WRITERS
    objects that changed it last, by which a change whose answer was lost is found again.

    Guarantee: each add that returns was carried out once, and returns what it made of the number.
    Limit: an error with maybe_applied=True, after OUTAGE_S seconds without a server, or if more
    than COUNTER_WRITERS others changed it before this one could look.  Each change is a write of
    the whole cluster: made for hundreds a second, not for thousands.

    Thread: any; threads that share the object take turns.
    """

    _turn: Optional[_Span]

    def __init__(self, client: Client, key: str, initial: int = 0) -> None:
        super().__init__(client)
        self.path = _recipe_key(key)
        self.initial = initial
        self._after_fork()

    @property
    def value(self) -> int:
        """The number now, by quorum.  Raises ValueError if the file holds none."""
        return self._look()[0]

    def add(self, amount: int = 1, *, timeout: Optional[float] = None) -> int:
        """Add `amount`, and return the sum.  Raises ValueError if the file holds no number.

        timeout  seconds, after which it raises what kept it from ending; None: OUTAGE_S without
                 a server; 0: as for all recipes, TRY_S

        Raises Cancelled after `cancel`.
        """
        span = _Span(self.client, timeout)
        self._spans[span] = None
        try:
            with span:
                while not self._take_turn(span):
                    if not span.wait_for(self._changed, lambda: self._turn is None):
                        raise RequestTimeout("another thread changes this counter", endpoint="")
                self._serial += 1
                return self._add(amount, f"{self._writer}.{self._serial}", span)
        finally:
            del self._spans[span]
            self._leave_turn(span)

    # -- below: no public names

    def _take_turn(self, span: _Span) -> bool:
        with self._changed:
            self._turn = self._turn or span
            return self._turn is span

    def _leave_turn(self, span: _Span) -> None:
        with self._changed:
            if self._turn is span:
                self._turn = None
                self._changed.notify_all()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._changed = threading.Condition()
        self._turn = None                           # one change of this writer at a time
        self._writer = uuid.uuid4().hex[:12]        # a forked child is another one
        self._serial = 0

    def _add(self, amount: int, tag: str, span: _Span) -> int:
        unsure: Optional[EtcdError] = None
        pause_s, deadline = 0.001, _clock() + OUTAGE_S
        while True:
            try:
                number, changes, index = self._look()
                if tag in changes:
                    return changes[tag]
                if unsure is not None and self._forgotten(changes):
                    raise unsure
                try:
                    if self._write(number + amount, tag, changes, index):
                        return number + amount
                except EtcdError as error:
                    unsure = error if error.maybe_applied else unsure
                    if not is_endpoint_failure(error) or _clock() >= deadline:
                        raise
                if not span.wait(random.uniform(0, pause_s)):
                    raise unsure or RequestTimeout("others were faster", endpoint="")
            except EtcdError as error:              # whatever failed, our write may be in
                error.maybe_applied = unsure is not None
                raise
            pause_s = min(2 * pause_s, 0.1)

    def _look(self) -> Tuple[int, Dict[str, int], int]:
        """Return the number, the last changes with what they made of it, and the index."""
        try:
            node = _read(self.client, self.path).node
        except KeyNotFound:
            return self.initial, {}, 0
        number, *changes = (node.value or "").split() or [""]
        pairs = (change.split(":") for change in changes)
        return int(number), {tag: int(result) for tag, result in pairs}, node.modified_index

    def _forgotten(self, changes: Mapping[str, int]) -> bool:
        """Whether a change of this writer may have been pushed out by others."""
        writers = {tag.partition(".")[0] for tag in changes}
        return self._writer not in writers and len(writers) >= COUNTER_WRITERS

    def _write(self, number: int, tag: str, changes: Mapping[str, int], index: int) -> bool:
        """Write if nobody else has since `index`."""
        others = [f"{other}:{result}" for other, result in changes.items()
                  if other.partition(".")[0] != self._writer]
        value = " ".join([str(number), f"{tag}:{number}", *others[:COUNTER_WRITERS - 1]])
        try:
            with Scope(CALL_TIMEOUT_S):
                if index:
                    self.client.compare_and_swap(self.path, value, prev_index=index)
                else:
                    self.client.create(self.path, value)
        except (CompareFailed, NodeExists, KeyNotFound):
            return False
        return True


# ============================================================================
# recipes/copies -- Copies of directories, and calls for each change.
# ============================================================================


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

    def start(self) -> "CachedTree":
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

    def __enter__(self) -> "CachedTree":
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

    def __enter__(self: "_FollowerType") -> "_FollowerType":
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


# ============================================================================
# recipes/queues -- Queues.
# ============================================================================


class _Item(NamedTuple):
    """An item of a queue, as a look found it."""

    uid: str                                        # tells it from others, and stays when it is
    value: str                                      # written twice after a lost answer
    priority: int
    node: Node                                      # its first entry
    mark: str                                       # what we write when we take it

    @classmethod
    def of(cls, node: Node, root: str) -> "_Item":
        """Return the item in a file; any program may put one there by hand."""
        found = _ITEM.fullmatch(node.value or "") if _is_entry(node) else None
        uid, priority, value = found.groups() if found else (
            node.key[len(root):], PRIORITY, node.value or "")
        return cls(uid, value, int(priority), node, uuid.uuid4().hex + ":" + _name(node.key))

    def place(self) -> Tuple[int, int]:
        """Return what items are ordered by."""
        node = self.node
        return self.priority, _number(node) if _is_entry(node) else node.created_index


_ITEM = re.compile(r"([0-9a-f]{32}):(-?[0-9]{1,9}):(.*)", re.DOTALL)


class QueueItem:
    """An item that this process works on; from Queue.take.

    value  what was put

    A context manager: without an exception the item is done, with one it is given back.
    """

    def __init__(self, queue: "Queue", item: _Item, lease: Lease) -> None:
        self.value = item.value
        self._queue = queue
        self._item = item
        self._lease = lease

    @property
    def is_held(self) -> bool:
        """Whether no other consumer can have got the item meanwhile."""
        return self._lease.is_held

    def done(self) -> bool:
        """Remove the item; False if another consumer has removed it first."""
        try:
            return self._queue._remove(self._item)
        finally:
            self._lease.stop()

    def give_back(self) -> None:
        """Let another consumer have the item."""
        self._lease.stop()

    def __enter__(self) -> "QueueItem":
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], *_: object) -> None:
        if kind is None:
            self.done()
        else:
            self.give_back()


class Queue(_Recipe):
    """A queue in the cluster: first in, first out, any number of producers and consumers.

        queue = Queue(client, "/jobs")
        queue.put("one")
        queue.put("urgent", priority=1)             # before those with a higher number
        queue.get(timeout=5)                        # "urgent", or None after 5 s
        with queue.take(timeout=5) as item:         # at least once
            work(item.value)

    Guarantee: what put has returned for is in the queue once.  An item is removed once, in the
    order of priority, then of their making: `get` hands each to one consumer only, which may
    crash with it; what `take` hands out comes back, ttl seconds after a crash, until done has
    removed it.  A consumer that finds its queue empty looks once, and its work for an item does
    not depend on how many were taken before.  An idle queue wakes one of the waiting consumers
    for each item; the others stand in line.
    How: an item is an in-order file with a uuid in it.  To take it is to write a hidden mark for
    this uuid, which only one consumer can do, and then to delete the file.  A second file of the
    same item, from an answer that was lost, is known by the mark, which stays for TAKEN_TTL_S.
    Limit: after an error with maybe_applied, and when a request is executed more than TAKEN_TTL_S
    late, an item may be there twice or lost with its consumer.  A consumer that crashes between
    mark and deletion delays its item for TAKEN_TTL_S.  Consumers of one queue use either get or
    take: a get may remove what another one has taken.  A consumer reads the whole directory, and
    then takes what it has seen (an urgent item that was put meanwhile comes after that): made for
    thousands of items, not for millions.
    Differs from 0.4.0: that could not read the items put now; those it has put are taken.

    ttl      seconds a crashed consumer delays what it had taken, or the line

    Thread: any.
    """

    def __init__(self, client: Client, key: str, *, ttl: int = LEASE_TTL_S) -> None:
        super().__init__(client)
        self.path = _recipe_key(key)
        self.ttl = _checked_ttl(ttl)
        self._items = f"{self.path}/items"
        self._after_fork()

    def put(self, value: str, priority: int = PRIORITY) -> str:
        """Add an item, behind all of the same priority; return its key.

        priority  lower ones are taken first
        """
        uid = uuid.uuid4().hex
        text = f"{uid}:{priority:d}:{_text(value)}"

        def find() -> "Optional[Node]":
            with contextlib.suppress(KeyNotFound):  # perhaps it was taken already
                return _read(self.client, self._mark_of(uid)).node
            nodes, _ = _entries(self.client, self._items)
            return next((node for node in nodes if node.value == text), None)
        return _append_once(self.client, self._items, text, None, find)[0].key

    def put_all(self, values: Iterable[str], priority: int = PRIORITY) -> List[str]:
        """Add items one after the other; return their keys."""
        return [self.put(value, priority) for value in values]

    def get(self, timeout: Optional[float] = None) -> Optional[str]:
        """Remove the first item and return its value; None after `timeout` seconds (None: never).

        With timeout=0 it does not wait.  None after `cancel`, too.
        """
        item = self._first(timeout, self._remove)
        return None if item is None else item.value

    def take(self, timeout: Optional[float] = None) -> QueueItem:
        """Return the first item that nobody works on.

        Raises WatchTimeout where `get` returns None, since a `with` needs an item.
        """
        leases: List[Lease] = []
        item = self._first(timeout, lambda item: self._claim(item, leases))
        if item is None:
            raise WatchTimeout("no item in time", cause=self.path)
        return QueueItem(self, item, leases[0])

    def __len__(self) -> int:
        """Return the number of items, those included that somebody works on."""
        free, claimed, _ = self._look()
        return len(free) + claimed

    # -- below: no public names

    def _after_fork(self) -> None:
        super()._after_fork()
        self._seen: Deque[_Item] = deque()          # items of the last look; append and pop are
                                                    # atomic, and all it gives is hints

    def _mark_of(self, uid: str) -> str:
        return f"{self.path}/_taken/{uid}"

    def _look(self) -> Tuple[List[_Item], int, int]:
        """Return the items that are free, first one first, how many are claimed, and the index."""
        try:
            found = _read(self.client, self.path, recursive=True)
        except KeyNotFound as error:
            return [], 0, error.index
        files = [node for node in found.node.walk() if not node.dir]
        claims = {_name(node.key) for node in files if node.key.startswith(f"{self.path}/claims/")}
        first: Dict[str, _Item] = {}
        # A file with a ttl is a mark of 0.4.0.
        for node in files:
            if node.ttl is None and node.key.startswith(f"{self._items}/"):
                item = _Item.of(node, self._items + "/")
                first[item.uid] = min(item, first.get(item.uid, item), key=_Item.place)
        items = sorted(first.values(), key=_Item.place)
        free = [item for item in items if item.uid not in claims]
        return free, len(items) - len(free), found.etcd_index

    def _first(self, timeout: Optional[float], obtain: Callable[[_Item], bool]) -> Optional[_Item]:
        """Return the first item that `obtain` gets; None if time is up, or after `cancel`."""
        with self._span(timeout) as span:
            item, _ = self._try(obtain)
            if item is not None or not span.wait_s():
                return item
            line = Contender(self.client, f"{self.path}/_waiting", ttl=self.ttl)
            if not line.acquire():
                return None
            try:
                while True:
                    item, index = self._try(obtain)
                    if item is not None or not _await(
                            self.client, span, self.path, index, min(WAIT_SLICE_S, self.ttl),
                            self._is_arrival):
                        return item
            finally:
                with _apart(TIDY_S):
                    line.release()
        return None

    def _is_arrival(self, event: Result) -> bool:
        """Whether there may be an item now: it is new, or somebody gave it back."""
        if event.key.startswith(f"{self.path}/claims/"):
            return event.action in _REMOVALS
        return event.action in ("create", "set")

    def _try(self, obtain: Callable[[_Item], bool]) -> Tuple[Optional[_Item], int]:
        """Try the items seen last, then those of a new look; return the index of that."""
        while self._seen:
            with contextlib.suppress(IndexError):   # another thread was faster
                item = self._seen.popleft()
                if obtain(item):
                    return item, 0
        free, _, index = self._look()
        for position, item in enumerate(free):
            if obtain(item):
                self._seen.extend(free[position + 1:])
                return item, index
        return None, index

    def _remove(self, item: _Item) -> bool:
        """Remove an item for ever; False if somebody else has done so."""
        try:
            _create_once(self.client, self._mark_of(item.uid), item.mark, TAKEN_TTL_S)
        except NodeExists:
            self._is_taken(item)
            return False
        except EtcdError as error:
            self._unmark(item)
            error.maybe_applied = False             # the item is there
            raise
        return self._delete(item)

    def _unmark(self, item: _Item) -> None:
        """Let others have an item at once that we could not take."""
        with _apart(TIDY_S):
            _remove(self.client, self._mark_of(item.uid), item.mark)

    def _is_taken(self, item: _Item) -> bool:
        """Whether the item has a mark; if it was taken as another file, this one is removed."""
        try:
            mark = _read(self.client, self._mark_of(item.uid)).node.value or ""
        except KeyNotFound:
            return False
        if mark.rpartition(":")[2] != _name(item.node.key):
            with contextlib.suppress(EtcdError):
                self.client.compare_and_delete(
                    item.node.key, prev_index=item.node.modified_index)
        return True

    def _delete(self, item: _Item) -> bool:
        """Delete the file of an item; False if somebody else has."""
        unsure = False

        def attempt() -> "bool":
            nonlocal unsure
            try:
                self.client.compare_and_delete(
                    item.node.key, prev_index=item.node.modified_index)
            except (KeyNotFound, CompareFailed) as error:
                # Nobody else deletes it before our mark has expired.
                return unsure and isinstance(error, KeyNotFound) and item.mark == _read(
                    self.client, self._mark_of(item.uid)).node.value
            except EtcdError as error:
                unsure = unsure or error.maybe_applied
                raise
            return True
        try:
            return _insist(self.client, attempt)
        except EtcdError as error:
            if not error.maybe_applied:
                self._unmark(item)
            raise

    def _claim(self, item: _Item, leases: List[Lease]) -> bool:
        lease = Lease(self.client, f"{self.path}/claims/{item.uid}", ttl=self.ttl)
        ours = True
        try:
            lease.start()
            # The item may be gone since it was seen: whoever had claimed it has finished.
            index = _read(self.client, item.node.key).node.modified_index
            if index == item.node.modified_index and not self._is_taken(item):
                leases.append(lease)
        except (NodeExists, LockExpired):
            ours = False
        except KeyNotFound:
            pass
        finally:
            if ours and not leases:
                with _apart(TIDY_S):
                    lease._end()
                    lease._leave()
        return bool(leases)


# ============================================================================
# recipes/services -- Services and parties.
# ============================================================================


@dataclass(frozen=True)
class Instance:
    """One place at which a service can be had; also a pair of id and address."""

    id: str
    address: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tags: Tuple[str, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return iter((self.id, self.address))

    @classmethod
    def of(cls, node: Node) -> "Instance":
        """Return the instance in a file: an address, or JSON with an address in it."""
        text = node.value or ""
        try:
            said = json.loads(text) if text.startswith("{") else None
            if isinstance(said, dict) and isinstance(said.get("address"), str):
                return cls(_name(node.key), said["address"], dict(said.get("metadata") or {}),
                           tuple(map(str, said.get("tags") or ())))
        except (ValueError, TypeError, RecursionError):     # somebody else's way to write it
            pass
        return cls(_name(node.key), text)

    def text(self) -> str:
        """Return what its file says: the address alone, if there is no more to say."""
        if not self.metadata and not self.tags and not self.address.startswith("{"):
            return self.address
        return json.dumps({"address": self.address, "metadata": dict(self.metadata),
                           "tags": list(self.tags)})


class Registration(Lease):
    """A file that is there as long as this process lives; from ServiceRegistry.register and Party.

    When it is lost, on_lost is called, and it is made again as soon as a server answers.

    Thread: any.
    """

    # -- below: no public names

    def _regain(self, scope: Scope) -> bool:
        super()._regain(scope)
        while scope.wait(min(1.0, self.ttl / 3)):
            try:
                with Scope(1.0):
                    self._obtain()
            except Cancelled:
                raise
            except EtcdError:                       # the next attempt is soon
                continue
            return True
        return False


class ServiceRegistry:
    """Where services say where they are, and where others find that.

        registry = ServiceRegistry(client, ttl=10)
        with registry.register("mail", "10.0.0.5:25", tags=["v2"], metadata={"zone": "a"}): ...

        [instance.address for instance in registry.resolve("mail", tag="v2")]
        with registry.watch("mail") as changes:
            for instances in changes: ...

    Guarantee: an instance is listed while its process lives and reaches the cluster, and at most
    ttl seconds longer; it keeps itself listed without waking anybody.
    Limit: a process that lives but does not serve is listed.  resolve may name an instance that
    has died less than ttl seconds ago.

    prefix   directory of all services; an instance is the file <prefix>/<service>/<id>, which
             holds the address, or with metadata or tags JSON: address, metadata, tags

    Thread: any.
    """

    def __init__(self, client: Client, prefix: str = "/services", *,
                 ttl: int = LEASE_TTL_S) -> None:
        self.client = client
        self.prefix = clean_key(prefix)
        self.ttl = _checked_ttl(ttl)

    def register(
        self, service: str, address: str, *, metadata: Optional[Mapping[str, Any]] = None,
        tags: Iterable[str] = (), on_lost: _LostCallback = None,
    ) -> Registration:
        """List `address` for `service`, until the Registration is stopped or its block ends.

        metadata  what JSON can hold: who resolves the service gets it
        tags      by which others may choose; resolve(service, tag=...)
        on_lost   called on another thread whenever the instance was missing from the list
        """
        if isinstance(tags, str):
            raise ValueError("tags are several: a list of strings")
        instance = Instance(uuid.uuid4().hex, address, metadata or {}, tuple(tags))
        return Registration(self.client, f"{self.path(service)}/{instance.id}", instance.text(),
                            self.ttl, on_lost=on_lost).start()

    def resolve(self, service: str, tag: Optional[str] = None) -> List[Instance]:
        """Return the instances of `service`, the one that came first at the head.

        tag  only those that have it
        """
        return self._instances(_children(self.client, self.path(service))[0], tag)

    def watch(self, service: str, timeout: Optional[float] = None,
              tag: Optional[str] = None) -> "Observed[List[Instance]]":
        """Return an iterator over the instances of `service`, now and whenever they have changed.

        timeout  seconds without a change after which WatchTimeout is raised; None: never
        """
        path = self.path(service)

        def look() -> "Tuple[List[Instance], _Wait]":
            nodes, index = _children(self.client, path)
            return self._instances(nodes, tag), (path, index, _is_change)
        return Observed(self.client, look, timeout)

    def path(self, service: str) -> str:
        """Return the directory of a service, for a CachedTree for instance."""
        return self.prefix.rstrip("/") + _recipe_key(service)

    @staticmethod
    def _instances(nodes: List[Node], tag: Optional[str]) -> List[Instance]:
        found = [Instance.of(node) for node in nodes if not node.dir]
        return [instance for instance in found if tag is None or tag in instance.tags]


class Party:
    """Who takes part: processes that join, and are no members any more when they die.

        with Party(client, "/workers", "host-a") as party:
            list(party), len(party)

    name  what others see of this member; None: the name of the host

    Guarantee: a member is in it while its process lives and reaches the cluster, and at most ttl
    seconds longer.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, name: Optional[str] = None, *,
                 ttl: int = LEASE_TTL_S) -> None:
        self.client = client
        self.path = _recipe_key(key)
        self.name = name or socket.gethostname()
        self.ttl = _checked_ttl(ttl)
        self._member: Optional[Registration] = None

    def join(self) -> None:
        """Take part; nothing happens if this object does."""
        member = self._member
        if member is None or member._pid != os.getpid():    # a forked child is another member
            key = f"{self.path}/{uuid.uuid4().hex}"
            self._member = Registration(self.client, key, self.name, self.ttl).start()

    def leave(self) -> None:
        """Take part no more."""
        member, self._member = self._member, None
        if member is not None:
            member.stop()

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the members, the one that came first at the head."""
        nodes, _ = _children(self.client, self.path)
        return iter([node.value or "" for node in nodes if not node.dir])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __enter__(self) -> "Party":
        self.join()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


# ============================================================================
# ctl/output -- Output of the command line, as etcdctl 2.3 has it.
# ----------------------------------------------------------------------------
# Knows the public names of the client only.
# ============================================================================


CLI_ENDPOINTS = "http://127.0.0.1:2379,http://127.0.0.1:4001"
CLI_VERSION = "2.3.8"                               # the etcdctl whose behaviour is reproduced

EXIT_OK = 0
EXIT_BAD_ARGS = 1
EXIT_BAD_CONNECTION = 2
EXIT_SERVER_ERROR = 4
EXIT_UNHEALTHY = 5
EXIT_INTERRUPTED = 130                              # 128 + SIGINT
EXIT_BROKEN_PIPE = 141                              # 128 + SIGPIPE
EXIT_MISUSE = EXIT_OK           # unknown command or option: etcdctl 2.3 prints help, exits with 0

_LINES_PER_WRITE = 1_000        # of a listing to standard output
_PROGRESS_EVERY_S = 0.1         # the line on a terminal is drawn no more often
_NOT_TEXT = "pyetcdctl: {} is not UTF-8: etcd v2 stores text; encode bytes, as base64 does"
_UNAVAILABLE = "client: etcd cluster is unavailable or misconfigured"
_HTML_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}     # as Go's encoder does
_BOOLEANS = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}


class _ExitError(Exception):
    """Ends a command with a line on stderr and an exit code."""

    def __init__(self, line: str, code: int = EXIT_BAD_ARGS) -> None:
        super().__init__(line)
        self.line = line
        self.code = code


def _did_you_mean(
    word: str, known: Iterable[str], show: Callable[[str], str] = str,
) -> str:
    import difflib

    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {show(found[0])}?" if found else ""


# -- output


_BLUE, _GREEN, _RED = "1;34", "32", "31"
_UNESCAPED = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029]")    # what would break a line
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {escape[1]: character for character, escape in _ESCAPES.items()}


def _escape(text: str) -> str:
    """Return `text` in one line without tabs; _unescape has the way back."""
    return _UNESCAPED.sub(lambda m: _ESCAPES.get(m[0]) or f"\\u{ord(m[0]):04x}", text)


def _unescape(text: str) -> str:
    """Return what _escape was given.  Raises ValueError."""
    def original(match: "Match[str]") -> "str":
        code = match[1]
        if len(code) == 5:
            return chr(int(code[1:], 16))
        if code not in _UNESCAPES:
            raise ValueError(f"\\{code} is no escape")
        return _UNESCAPES[code]
    return re.sub(r"\\(u[0-9a-fA-F]{4}|.?)", original, text, flags=re.DOTALL)


def _painted(text: str, colour: str) -> str:
    """Return `text` in a colour, where somebody sees it and has not said NO_COLOR."""
    if not colour or not sys.stdout.isatty() or (
            os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def _in_columns(rows: Sequence[Sequence[str]], colours: Sequence[str]) -> Iterator[str]:
    """Yield a line a row: aligned and coloured on a terminal, with single spaces elsewhere."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    for row, colour in zip(rows, colours):
        if sys.stdout.isatty():
            row = [text.ljust(width) for text, width in zip(row, widths)]
        yield _painted(" ".join(filter(None, row)).rstrip(), colour)


def _emit(text: str) -> None:
    """Print a line at once, whatever the locale: keys and values are bytes to a terminal."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b"\n")
    sys.stdout.buffer.flush()


def _emit_lines(lines: Iterable[str]) -> None:
    """Print many lines in few writes."""
    some = iter(lines)
    while True:
        batch = list(itertools.islice(some, _LINES_PER_WRITE))
        if not batch:
            return
        _emit("\n".join(batch))


def _complain(text: str) -> None:
    line = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    print(line, file=sys.stderr)


class _Progress:
    """A line on stderr that says how far long work is; nothing unless stderr is a terminal."""

    def __init__(self, work: str, total: int = 0) -> None:
        self._work = work
        self._total = total                         # 0: not known
        self._visible = sys.stderr.isatty()
        self._drawn_at = 0.0

    def __enter__(self) -> "_Progress":
        self.show(0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, done: int) -> None:
        """Draw the line, unless that was done a moment ago."""
        if not self._visible or time.monotonic() - self._drawn_at < _PROGRESS_EVERY_S:
            return
        self._drawn_at = time.monotonic()
        share = f"/{self._total:,} ({100 * done // self._total} %)" if self._total else ""
        print(f"\r\x1b[K{self._work}: {done:,}{share}", end="", file=sys.stderr, flush=True)


def _value_text(node: Optional[Node]) -> str:
    return (node.value or "") if node is not None else ""


def _result_extended(result: Result) -> str:
    node = result.node
    lines = [f"Key: {'' if node.key == '/' else node.key}",
             f"Created-Index: {node.created_index}", f"Modified-Index: {node.modified_index}"]
    if result.prev_node is not None:
        lines.append(f"PrevNode.Value: {_value_text(result.prev_node)}")
    lines += [f"TTL: {node.ttl or 0}", f"Index: {result.etcd_index}"]
    if result.action != "delete":
        lines += ["", _value_text(node)]
    return "\n".join(lines)


def _node_json(node: Optional[Node]) -> Optional[Dict[str, Any]]:
    if node is None:
        return None
    shown: Dict[str, Any] = {"key": "" if node.key == "/" else node.key}
    if node.dir:
        shown["dir"] = True
    shown["value"] = node.value or ""
    shown["nodes"] = [_node_json(child) for child in node.nodes] or None
    shown["createdIndex"] = node.created_index
    shown["modifiedIndex"] = node.modified_index
    if node.expiration is not None:
        shown["expiration"] = node.expiration
    if node.ttl:
        shown["ttl"] = node.ttl
    return shown


def _result_json(result: Result) -> str:
    shown = {"action": result.action, "node": _node_json(result.node),
             "prevNode": _node_json(result.prev_node)}
    return json.dumps(shown, ensure_ascii=False, separators=(",", ":")).translate(_HTML_ESCAPES)


# -- errors


def _failure_line(error: EtcdError) -> str:
    """Return the failure of one endpoint in etcdctl's words."""
    if isinstance(error, RequestTimeout):
        return f"client: endpoint {error.endpoint} exceeded header timeout"
    if isinstance(error, TransportError) and error.endpoint:
        address = urlsplit(error.endpoint).netloc
        never_sent = isinstance(error, ConnectionFailed) and not error.maybe_applied
        return f"dial tcp {address}: connect: {error.message}" if never_sent else error.describe()
    if not error.status:                            # not found in DNS
        return error.describe()
    if error.status in (500, 503):
        return f"client: etcd member {error.endpoint} has no leader"
    phrase = http.HTTPStatus(error.status).phrase if error.status in _HTTP_STATUSES else ""
    return f"client: etcd member {error.endpoint} returns server error [{phrase}]"


_HTTP_STATUSES = frozenset(int(status) for status in http.HTTPStatus)


def _error_lines(error: EtcdError) -> str:
    """Return what etcdctl prints on stderr about `error`."""
    if not is_endpoint_failure(error):
        return f"Error:  {error}"
    lines = [f"error #{number}: {_failure_line(failure)}"
             for number, failure in enumerate(error.failures)]
    if error.maybe_applied:
        lines.append("the write may have been applied: it was not sent again")
    return "\n".join([f"Error:  {_UNAVAILABLE}", *lines, ""])


# ============================================================================
# ctl/program -- The program: options, which client a command gets, help, errors and exit codes.
# ============================================================================


class _MisuseError(Exception):
    """A line that says nothing to etcdctl 2.3 either; the text tells why.  Help is shown."""


# -- options


class _Flag(NamedTuple):
    names: Tuple[str, ...]
    kind: type          # bool, int, str, float (a Go duration, kept in seconds), list (repeatable)
    help: str
    least: Optional[float] = None   # smallest number, or shortest text

    @property
    def dashed(self) -> str:
        return _dashed(self.names[0])


class _Options:
    """Values of the flags that were given; the others are False, 0, "" or empty."""

    def __init__(self) -> None:
        self._values: Dict[str, Any] = {}
        self._forms: Dict[str, str] = {}

    def put(self, flag: _Flag, text: str, form: str = "") -> None:
        name, value = flag.names[0], _flag_value(flag, text)
        if self._forms.setdefault(name, form) != form:
            raise _MisuseError(f"{_dashed(form)} and {_dashed(self._forms[name])} are the same")
        self._values[name] = [*self.texts(name), value] if flag.kind is list else value

    def on(self, name: str) -> bool:
        return bool(self._values.get(name, False))

    def number(self, name: str, default: int = 0) -> int:
        return int(self._values.get(name, default))

    def seconds(self, name: str, default: float) -> float:
        return float(self._values.get(name, default))

    def text(self, name: str, variable: str = "") -> str:
        """Return a flag, or else an environment variable."""
        return str(self._values.get(name, "")) or os.environ.get(variable, "")

    def texts(self, name: str) -> List[str]:
        return list(self._values.get(name, ()))

    def refuse(self, why: str, *names: str) -> None:
        """End the command if one of these was given: it would have no effect."""
        for name in names:
            if name in self._values:
                raise _ExitError(f"pyetcdctl: {_dashed(name)} has no effect {why}")


def _flag_value(flag: _Flag, text: str) -> Any:
    """Return the value of a flag.  Raises _MisuseError; _ExitError for what only we refuse."""
    parse, what = _READERS.get(flag.kind, (str, ""))
    try:
        value = parse(text)
    except (KeyError, ValueError):
        repaired, hint = text[:-1] if text.endswith("s") else text + "s", ""
        with contextlib.suppress(KeyError, ValueError):
            parse(repaired)                         # 5s for 5, or 5 for 5s
            hint = f"; did you mean {repaired}?"
        raise _MisuseError(f'{flag.dashed} takes {what}, not "{text}"{hint}') from None
    if flag.least is not None and (len(text) if flag.kind is str else value) < flag.least:
        limit = "must not be empty" if flag.kind is str else f"is {flag.least} or more"
        raise _ExitError(f"pyetcdctl: {flag.dashed} {limit}")
    return value


def _parse_integer(text: str) -> int:
    """Return a number as Go's flag package reads it: also hexadecimal, and octal after a 0."""
    match = re.fullmatch(r"([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)", text, re.ASCII)
    if match is None or len(text) > 30:
        raise ValueError(text)
    digits = match[2]
    value = int(digits, 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10)
    if value >= 1 << 63:
        raise ValueError(text)
    return -value if match[1] == "-" else value


def _parse_duration(text: str) -> float:
    """Return the seconds of a Go duration such as 500ms or 1m30s."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
    part = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(h|ms|us|µs|ns|m|s)"
    if text in ("0", "+0", "-0"):
        return 0.0
    if not re.fullmatch(f"\\+?(?:{part})+", text, re.ASCII):
        raise ValueError(text)
    return sum(float(count) * units[unit] for count, unit in re.findall(part, text))


_READERS: Dict[type, Tuple[Callable[[str], Any], str]] = {
    bool: (_BOOLEANS.__getitem__, "true or false"), int: (_parse_integer, "a whole number"),
    float: (_parse_duration, "a time such as 500ms or 1m30s"),
}


def _parse_flags(
    argv: Sequence[str], flags: Sequence[_Flag], *, mixed: bool = False,
) -> Tuple[_Options, List[str]]:
    """Split `argv` into options and arguments by the rules of Go's flag package.

    One or two dashes; a value after `=` or, except for booleans, as the next word.  The first
    word that is no option, or `--`, ends the options; if they may be mixed with arguments, only
    `--` does, and a negative number is an argument.
    """
    known = {name: flag for flag in flags for name in flag.names}
    options, words, args = _Options(), list(argv), []
    while words:
        word = words.pop(0)
        if not word.startswith("-") or word == "-" or (mixed and word[1:2].isdecimal()):
            args.append(word)
            if not mixed:
                break
            continue
        if word == "--":
            break
        name, separator, text = word[2 if word.startswith("--") else 1:].partition("=")
        flag = known.get(name)
        if flag is None:
            raise _MisuseError(_about_unknown(word, name, list(known), args))
        if not separator and flag.kind is bool:
            text = "true"
        elif not separator:
            if not words:
                raise _MisuseError(f"{_dashed(name)} needs a value behind it")
            text = words.pop(0)
        options.put(flag, text, name)
    return options, args + words


def _about_unknown(word: str, name: str, known: Sequence[str], args: Sequence[str]) -> str:
    """Return what is wrong with an option, behind `args`, that is not among those `known`."""
    text = f'there is no option "{word}"'
    if any(name in flag.names for flag in _GLOBAL_FLAGS):
        return f"{text} here: {_dashed(name)} stands before the command"
    if any(name in flag.names for command in _COMMANDS.values() for flag in command.flags):
        if "endpoints" in known:
            return f"{text} here: {_dashed(name)} stands behind the command"
    hint = "; put -- in front of a value that begins with a dash" if args else ""
    return text + (_did_you_mean(name, known, _dashed) or hint)


# -- the client of a command


def _show_request(method: str, url: str, form: Optional[bytes]) -> None:
    """Show a request on stderr as the curl command for it: --debug."""
    data = f' -d "{form.decode()}"' if form else ""
    _complain(f"cURL Command: curl -X {method} {url}{data}")


def _ask_password(prompt: str) -> str:
    """Read a password without echo; from a pipe, its first line."""
    if sys.stdin.isatty():
        return getpass.getpass(prompt)
    _emit(prompt)
    return sys.stdin.readline().rstrip("\n")


def _split_user(text: str, prompt: str) -> Tuple[str, str]:
    """Return name and password of NAME[:PASSWORD]; a password that is not there is asked for."""
    name, separator, password = text.partition(":")
    return name, password if separator else _ask_password(prompt)


def _cluster_asked(settings: _Options) -> Dict[str, Any]:
    """Return what Client takes to find the cluster, by the order of etcdctl 2.3.

    There some variables are stronger than some options: that is said, not left to be noticed.
    """
    chosen, source, where = CLI_ENDPOINTS, "", "endpoints"
    for flag in ("discovery-srv", "endpoints", "endpoint", "peers"):
        variable = "ETCDCTL_" + flag.upper().replace("-", "_")
        for name, text in (
                (_dashed(flag), settings.text(flag)), (variable, os.environ.get(variable, ""))):
            if text and not source:
                chosen, source = text, name
                where = "srv_domain" if flag == "discovery-srv" else "endpoints"
            elif text and text != chosen and name != variable:
                _complain(f"pyetcdctl: {name} is not used: {source} is stronger")
    return {where: chosen if where == "srv_domain" else chosen.split(",")}


def _check_readable(path: str) -> None:
    try:
        open(path, "rb").close()
    except OSError as error:
        raise _ExitError(f"open {path}: {str(error.strerror).lower()}") from error


class _Access(NamedTuple):
    """How to reach a cluster, whichever of its members is asked."""

    options: Dict[str, Any]                         # keywords of Client
    debug: bool = False

    @classmethod
    def from_settings(cls, settings: _Options, *, environment: bool = True) -> "_Access":
        """Return what flags and ETCDCTL_* variables say; asks for a password if need be."""
        user, certificate, key, authorities = (
            settings.text(flag, "ETCDCTL_" + flag.upper().replace("-", "_") if environment else "")
            for flag in ("username", "cert-file", "key-file", "ca-file"))
        if environment and user and ":" not in user and os.environ.get("ETCDCTL_PASSWORD"):
            user += ":" + os.environ["ETCDCTL_PASSWORD"]
        if key and not certificate:
            raise _ExitError(f"pyetcdctl: the key {key} is of no use without --cert-file")
        for path in filter(None, (certificate, key, authorities)):
            _check_readable(path)                   # also for http, which would not look
        name, password = _split_user(user, "Password: ") if user else (None, None)
        request_s = settings.seconds("timeout", 1.0)
        return cls({
            "connect_timeout": request_s or math.inf, "read_timeout": request_s, "retry": False,
            "total_timeout": settings.seconds("total-timeout", 5.0) or None,
            "cert": (certificate, key) if key else certificate or None,
            "ca_cert": authorities or None, "username": name, "password": password,
        }, settings.on("debug"))

    def client(self, **where: Any) -> Client:
        """Return a client for these endpoints, or for those that SRV records name."""
        try:
            client = Client(**where, **self.options)
        except (ValueError, OSError) as error:      # an endpoint, a certificate, a DNS server
            raise _ExitError(str(error)) from error
        if self.debug:
            client.on_request = _show_request
        return client


def _given_client(settings: _Options, access: _Access) -> Client:
    """Return a client for the endpoints that were given; it tells if another than the first one
    answers: that may be the member of another cluster, or the discovery service.
    """
    where = _cluster_asked(settings)
    client = access.client(**where)

    def tell(state: "ConnectionState") -> "bool":
        first, current = client.endpoints.urls[0], client.endpoints.current
        if state is ConnectionState.CONNECTED and current != first:
            _complain(f"pyetcdctl: answered by {current}, not by {first}")
        return state is ConnectionState.CONNECTED   # once is enough

    if len(where.get("endpoints", ())) > 1:
        client.add_listener(tell)
    return client


def _synced_client(settings: _Options, access: _Access) -> Client:
    """Return a client that uses the client URLs the members publish, in random order."""
    client, debug = _given_client(settings, access), settings.on("debug")
    if settings.on("no-sync"):
        return client
    given = ",".join(client.endpoints.urls)
    if debug:
        _complain(f"start to sync cluster using endpoints({given})")
    try:
        urls = [url for member in client.member_list() for url in member.client_urls]
    except EtcdError as error:
        code = EXIT_BAD_CONNECTION if is_endpoint_failure(error) else EXIT_SERVER_ERROR
        raise _ExitError(_error_lines(error), code) from error
    if all(url.startswith("https:") for url in client.endpoints.urls):
        urls = [url for url in urls if url.startswith("https:")]    # no passwords in clear
    if not urls:
        raise _ExitError(
            "etcd cluster has no published client endpoints.\nTry '--no-sync' if you want to "
            f"access non-published client endpoints({given}).\nError:  client: no endpoints "
            "available", EXIT_SERVER_ERROR)
    random.shuffle(urls)
    client.endpoints = Endpoints(urls)
    if debug:
        _complain(f"got endpoints({','.join(urls)}) after sync")
    return client


class _Run:
    """One invocation: what a command function gets."""

    def __init__(
        self, settings: _Options, options: _Options, args: List[str],
        behind: Optional[List[str]] = None,
    ) -> None:
        self.settings = settings                    # the global options
        self.options = options                      # those of the command
        self.args = args                            # all of them
        self.behind = behind                        # those behind `--`, if there is one
        self.output = settings.text("output") or "simple"
        self._access: Optional[_Access] = None      # this and the next: made when a command
        self._client: Optional[Client] = None       # first asks for them

    @property
    def access(self) -> _Access:
        """How to reach the cluster; a password is asked for once."""
        if self._access is None:
            self._access = _Access.from_settings(self.settings)
        return self._access

    @property
    def client(self) -> Client:
        """The client, with the endpoints that the members publish unless --no-sync is given."""
        return self.connect()

    def connect(
        self, make: Callable[[_Options, _Access], Client] = _synced_client,
    ) -> Client:
        """Return the client; the first call makes it."""
        if self._client is None:
            self._client = make(self.settings, self.access)
            if self.settings.on("debug"):
                _complain(f"Cluster-Endpoints: {', '.join(self._client.endpoints.urls)}")
        return self._client

    def close(self) -> None:
        """Close the client, if one was made."""
        if self._client is not None:
            self._client.close()

    def key(self) -> str:
        """Return the first argument."""
        if not self.args:
            raise _ExitError("Error:  key required")
        return self.args[0]

    def value(self) -> str:
        """Return the second argument, or else all of standard input."""
        if len(self.args) > 1:
            return self.args[1]
        data = sys.stdin.buffer.read()
        if not data:
            raise _ExitError("Error:  value required")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise _ExitError(_NOT_TEXT.format("the value on stdin")) from error

    def ttl(self) -> Optional[int]:
        """Return --ttl; 0 and less mean none, as in etcdctl."""
        return max(0, self.options.number("ttl")) or None

    def conditions(self, value_flag: str, index_flag: str) -> Dict[str, Any]:
        """Return prevValue and prevIndex if flags ask for them."""
        given = {"prevValue": self.options.text(value_flag),
                 "prevIndex": self.options.number(index_flag)}
        return {name: value for name, value in given.items() if value}

    def print_result(self, result: Result) -> None:
        """Print a result in the format asked for."""
        if self.output == "json":
            _emit(_result_json(result))
        elif self.output == "extended":
            _emit(_result_extended(result))
        elif self.output != "simple":
            _complain(f"Unsupported output format: {self.output}")
        elif result.action == "delete":
            _emit(f"PrevNode.Value: {_value_text(result.prev_node)}")
        else:
            _emit(_value_text(result.node))

    def print_unless_silent(self, result: Result) -> None:
        """Print a result; in simple format, nothing for a directory."""
        if not result.node.dir or self.output != "simple":
            self.print_result(result)


# -- the table of commands, and the way into it


_CommandFunction = Callable[[_Run], Optional[int]]      # None: EXIT_OK
_FORMATS = ("simple", "extended", "json")


class _Command(NamedTuple):
    usage: str
    help: str
    flags: Tuple[_Flag, ...]
    run: _CommandFunction
    formats: Tuple[str, ...]    # of --output
    wrong: str                  # the complaint of etcdctl about the number of arguments
    own: bool                   # etcdctl 2.3 has it not, or not with these options
    mixed: bool                 # options may stand behind arguments

    def words(self) -> Tuple[int, float]:
        """Return how many arguments there are, at least and at most."""
        words = [word for word in self.usage.split() if word[0] in "<[" and word != "[options]"]
        return (sum(word[0] == "<" for word in words),
                len(words) if self.mixed and "..." not in self.usage else math.inf)


_COMMANDS: Dict[str, _Command] = {}                 # by name: "get", "member list"; help's order

_HELP = _Flag(("help", "h"), bool, "show help")

_GROUPS = {
    "member": "list, add, remove and update members", "user": "users and their roles",
    "role": "roles and what they permit", "auth": "turn authentication on and off",
}

_GLOBAL_FLAGS = (
    _Flag(("debug",), bool, "show endpoints, and requests as curl commands, on stderr"),
    _Flag(("no-sync",), bool, "use the endpoints given, not those that the members publish"),
    _Flag(("output", "o"), str, f"how to print results: {', '.join(_FORMATS)}"),
    _Flag(("discovery-srv", "D"), str, "domain whose SRV records name the endpoints"),
    _Flag(("peers", "C"), str, "older name of --endpoints"),
    _Flag(("endpoint",), str, "older name of --endpoints"),
    _Flag(("endpoints",), str, f"addresses of members, comma between (default: {CLI_ENDPOINTS})"),
    _Flag(("cert-file",), str, "client certificate for https"),
    _Flag(("key-file",), str, "key of the client certificate"),
    _Flag(("ca-file",), str, "certificates of authorities that servers are checked with"),
    _Flag(("username", "u"), str, "user[:password]; a password that is not given is asked for"),
    _Flag(("timeout",), float, "time for a member to answer (default: 1s; 60s for long work)"),
    _Flag(("total-timeout",), float, "time for a call over all (default: 5s; 60s for long work)"),
    _HELP,
    _Flag(("version", "v"), bool, "print the version"),
)


def _command(
    name: str, arguments: str, help: str, *flags: _Flag,
    formats: Tuple[str, ...] = _FORMATS[:1], wrong: str = "", own: bool = False,
    mixed: bool = True,
) -> Callable[[_CommandFunction], _CommandFunction]:
    """Enter the decorated function into the table of commands."""
    def enter(function: "_CommandFunction") -> "_CommandFunction":
        usage = " ".join(filter(None, (name, "[options]" if flags else "", arguments)))
        _COMMANDS[name] = _Command(usage, help, flags, function, formats, wrong, own, mixed)
        return function
    return enter


def _keys_command(
    name: str, arguments: str, help: str, *flags: _Flag,
) -> Callable[[_CommandFunction], _CommandFunction]:
    """Enter a command that prints what the keys API answers."""
    return _command(name, arguments, help, *flags, formats=_FORMATS)


def _aligned(rows: Sequence[Tuple[str, str]]) -> List[str]:
    width = max((len(left) for left, _ in rows), default=0)
    return [f"   {left:{width}}  {right}" for left, right in rows]


def _dashed(name: str) -> str:
    return ("-" if len(name) == 1 else "--") + name


def _flag_lines(flags: Sequence[_Flag]) -> List[str]:
    return _aligned([(", ".join(map(_dashed, flag.names))
                      + ("" if flag.kind is bool else " value"), flag.help) for flag in flags])


def _command_names(group: str = "") -> List[Tuple[str, str]]:
    """Return (name, help) of all commands, a group as one; or of those in a group."""
    if group:
        return [(name[len(group) + 1:], command.help) for name, command in _COMMANDS.items()
                if name.startswith(group + " ")]
    firsts = dict.fromkeys(name.split()[0] for name in _COMMANDS)
    return [(name, _GROUPS[name] if name in _GROUPS else _COMMANDS[name].help) for name in firsts]


def _print_help(group: str = "") -> None:
    """Print what the program can do, or what the commands of a group can."""
    name = f"pyetcdctl {group}".strip()
    lines = ["NAME:", f"   {name} - {_GROUPS.get(group, 'A command line client of etcd v2.')}", "",
             "USAGE:", f"   {name} [options] command [command options] [arguments...]", "",
             "COMMANDS:", *_aligned(_command_names(group)), ""]
    _emit("\n".join([*lines, "GLOBAL OPTIONS:", *_flag_lines(_GLOBAL_FLAGS)]))


def _print_command_help(name: str) -> None:
    command = _COMMANDS[name]
    lines = ["NAME:", f"   pyetcdctl {name} - {command.help}", "", "USAGE:",
             f"   pyetcdctl {command.usage}", "", "OPTIONS:", *_flag_lines((*command.flags, _HELP))]
    _emit("\n".join(lines))


def _split_command(words: Sequence[str]) -> Tuple[str, List[str]]:
    """Return the command's name, of one or two words, and what follows; "" if there is none."""
    for size in (2, 1):
        name = " ".join(words[:size])
        if len(words) >= size and name in _COMMANDS:
            return name, list(words[size:])
    return "", list(words)


def _run_command(name: str, words: Sequence[str], settings: _Options) -> int:
    command, behind = _COMMANDS[name], None
    for word in words if name not in _WITH_PATHS else ():
        if word.encode("utf-8", "replace").decode() != word:    # bytes of sys.argv
            raise _ExitError(_NOT_TEXT.format(f'"{word}"'))
    if command.mixed and "--" in words:
        at = words.index("--")
        words, behind = words[:at], list(words[at + 1:])
    try:
        options, args = _parse_flags(words, (*command.flags, _HELP), mixed=command.mixed)
    except _MisuseError as error:
        _emit("Incorrect Usage.\n")
        _print_command_help(name)
        _complain(f"pyetcdctl {name}: {error}")
        return EXIT_BAD_ARGS if command.own else EXIT_MISUSE
    if options.on("help"):
        _print_command_help(name)
        return EXIT_OK
    run = _Run(settings, options, args + (behind or []), behind)
    _check_line(name, command, run)
    with contextlib.closing(run):
        return command.run(run) or EXIT_OK


def _check_line(name: str, command: _Command, run: _Run) -> None:
    """Refuse what the command would not look at."""
    least, most = command.words()
    surplus = run.args[int(most):] if most < math.inf else []
    if command.wrong and (surplus or len(run.args) < least):
        too_many = f'; "{surplus[0]}" is one word too many' if surplus and least else ""
        raise _ExitError(command.wrong + too_many)
    if surplus:
        quoting = " (a value with spaces needs quotes)" if "value" in command.usage else ""
        raise _ExitError(f'pyetcdctl {name}: "{surplus[0]}" is one word too many{quoting}; '
                         f"usage: pyetcdctl {command.usage}")
    # etcdctl prints results, and complains of a format that it does not know, afterwards.
    if run.output not in command.formats and (
            run.output in _FORMATS or command.formats != _FORMATS):
        raise _ExitError(f"pyetcdctl {name}: --output {run.output} is not possible here, only "
                         f"{' and '.join(command.formats)}")


_WITH_PATHS = ("backup", "import", "mirror", "exec-watch", "completion")    # of any bytes
_OTHER_NAMES = {"put": "set", "del": "rm", "delete": "rm", "remove": "rm", "list": "ls",
                "endpoint": "cluster-health", "health": "cluster-health"}


def _dispatch(argv: Sequence[str]) -> int:
    """Run the command `argv` asks for, or show the help it needs."""
    settings, words = _parse_flags(argv, _GLOBAL_FLAGS)
    if settings.on("version"):
        _emit(f"pyetcdctl version {__version__}\nBehaves as etcdctl {CLI_VERSION}")
        return EXIT_OK
    asks_help, group = settings.on("help"), ""
    while words and words[0] in ("help", "h", *([] if group else _GROUPS)):
        word, *words = words
        if word in _GROUPS:
            group = word
            options, words = _parse_flags(words, (_HELP,))
        asks_help = asks_help or word not in _GROUPS or options.on("help")
    name = " ".join([group, *words[:1]]).strip()
    if not words:
        _print_help(group)
    elif name not in _COMMANDS:
        return _unknown_command(group, words[0])
    elif not asks_help:
        return _run_command(name, words[1:], settings)
    elif words[1:]:
        raise _ExitError(f'pyetcdctl help: "{words[1]}" is one word too many')
    else:
        _print_command_help(name)
    return EXIT_OK


def _unknown_command(group: str, word: str) -> int:
    _emit(f"No help topic for '{word}'")
    names = [name for name, _ in _command_names(group)]
    other = _OTHER_NAMES.get(word, word)
    hint = f"; did you mean {other}?" if other in names else _did_you_mean(word, names)
    _complain(f'pyetcdctl: there is no command "{f"{group} {word}".strip()}"{hint}')
    return EXIT_MISUSE


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return its exit code.

    0 success · 1 bad arguments, or a command about members, users, roles or files failed · 2 no
    server can be reached · 4 the server refused, or the request failed · 5 the cluster is
    unhealthy · 130 interrupted · 141 nobody reads what is printed

    Source: etcdctl 2.3.8.
    """
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except _MisuseError as error:
        _emit("Incorrect Usage.\n")
        _print_help()
        _complain(f"pyetcdctl: {error}")
        return EXIT_MISUSE
    except _ExitError as error:
        _complain(error.line)
        return error.code
    except EtcdError as error:
        _complain(_error_lines(error))
        return EXIT_SERVER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:                         # `ls | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def _exit() -> NoReturn:
    sys.exit(main())


# ============================================================================
# ctl/etcdctl -- The commands of etcdctl 2.3.
# ----------------------------------------------------------------------------
# Source: etcdctl 2.3.8.
# ============================================================================


_Answer = TypeVar("_Answer")
_Job = TypeVar("_Job")
_HEALTH_EVERY_S = 10.0
_SNAP_TTL_MIN_S = 300           # `import --snap` gives short-lived keys at least this long

_TTL = _Flag(("ttl",), int, "seconds until it expires; 0 and less: never")
_SORT = _Flag(("sort",), bool, "order by key")
_QUORUM = _Flag(("quorum", "q"), bool, "read through consensus: never stale")
_RECURSIVE = _Flag(("recursive", "r"), bool, "with all that lies below")
_AFTER_INDEX = _Flag(("after-index",), int, "begin with the first change after this index",
                     least=0)
_ROLES = _Flag(("roles",), list, "name of a role; may be given again")
_JSON_TOO = ("simple", "json")
_NO_ARGUMENTS = "No arguments accepted"
_A_USER = "Please provide a username"
_A_ROLE = "Please provide a role name"
_PERMISSION_FLAGS = (
    _Flag(("path",), str, "a key, or all that begin with it if it ends in *"),
    _Flag(("read",), bool, "the right to read"),
    _Flag(("write",), bool, "the right to write"),
    _Flag(("readwrite", "rw"), bool, "both rights"),
)


# -- keys


@_keys_command("get", "<key>", "print the value of a key", _SORT, _QUORUM)
def _cmd_get(run: _Run) -> None:
    result = run.client.get(
        run.key(), sorted=run.options.on("sort"), quorum=run.options.on("quorum"))
    if result.node.dir:
        raise _ExitError(f"{result.key}: is a directory")
    run.print_result(result)


@_keys_command("ls", "[key]", "list a directory", _SORT, _RECURSIVE,
               _Flag(("p",), bool, "put a slash behind directories"), _QUORUM)
def _cmd_ls(run: _Run) -> None:
    options = run.options
    if run.output != "simple":
        options.refuse(f"with --output {run.output}", "p")
    result = run.client.get(
        run.args[0] if run.args else "/", recursive=options.on("recursive"),
        sorted=options.on("sort"), quorum=options.on("quorum"))
    if run.output != "simple":
        run.print_result(result)
        return
    shown = _escape if sys.stdout.isatty() else str     # keys may hold a terminal's commands
    _emit_lines(_painted(shown(node.key), _BLUE if node.dir else "")
                + ("/" if node.dir and options.on("p") else "")
                for node in (result.node.walk() if result.node.dir else (result.node,)))


@_keys_command("set", "<key> [value]", "write a key; its value may come from stdin", _TTL,
               _Flag(("swap-with-value",), str, "write only if this is the value", 1),
               _Flag(("swap-with-index",), int, "write only if this is the modified index", 1))
def _cmd_set(run: _Run) -> None:
    key, value = run.key(), run.value()
    run.print_result(run.client.write(
        key, value, ttl=run.ttl(), **run.conditions("swap-with-value", "swap-with-index")))


@_keys_command("mk", "<key> [value]", "write a key that must not exist",
               _Flag(("in-order",), bool, "take the next name in the directory <key>"), _TTL)
def _cmd_mk(run: _Run) -> None:
    key, value = run.key(), run.value()
    write = run.client.append if run.options.on("in-order") else run.client.create
    run.print_result(write(key, value, ttl=run.ttl()))


@_keys_command("update", "<key> [value]", "write a key that must exist", _TTL)
def _cmd_update(run: _Run) -> None:
    run.print_result(run.client.update(run.key(), run.value(), ttl=run.ttl()))


@_keys_command("mkdir", "<key>", "make a directory that must not exist", _TTL)
def _cmd_mkdir(run: _Run) -> None:
    run.print_unless_silent(run.client.mkdir(run.key(), ttl=run.ttl()))


@_keys_command("setdir", "<key>", "make a directory, also in place of a key", _TTL)
def _cmd_setdir(run: _Run) -> None:
    run.print_unless_silent(_set_dir(run.client, run.key(), run.ttl()))


@_keys_command("updatedir", "<key>", "give a directory a new time to live, or none", _TTL)
def _cmd_updatedir(run: _Run) -> None:
    run.print_unless_silent(_set_dir(run.client, run.key(), run.ttl(), prevExist=True))


def _set_dir(client: Client, key: str, ttl: Optional[int], **conditions: Any) -> Result:
    return client.write(key, None, ttl=ttl, dir=True, **conditions)


@_keys_command("rm", "<key>", "remove a key or a directory",
               _Flag(("dir",), bool, "also an empty directory"),
               _Flag(("recursive", "r"), bool, "also a directory with all that lies below"),
               _Flag(("with-value",), str, "remove only if this is the value", 1),
               _Flag(("with-index",), int, "remove only if this is the modified index", 1))
def _cmd_rm(run: _Run) -> None:
    run.print_unless_silent(run.client.delete(
        run.key(), dir=run.options.on("dir"), recursive=run.options.on("recursive"),
        **run.conditions("with-value", "with-index")))


@_keys_command("rmdir", "<key>", "remove an empty directory, or a key")
def _cmd_rmdir(run: _Run) -> None:
    run.print_unless_silent(run.client.rmdir(run.key()))


def _changes(run: _Run, key: str) -> Watch:
    after_index = run.options.number("after-index")
    return run.client.watcher(
        key, recursive=run.options.on("recursive"), index=after_index + 1 if after_index else None,
        relist=False)


@_keys_command("watch", "<key>", "print the next change of a key",
               _Flag(("forever", "f"), bool, "and all later ones, until Ctrl-C"), _AFTER_INDEX,
               _RECURSIVE)
def _cmd_watch(run: _Run) -> None:
    with contextlib.suppress(KeyboardInterrupt):    # the way to end --forever: not an error
        with _changes(run, run.key()) as changes:
            for change in changes:
                if change.node.dir:
                    continue
                if run.options.on("recursive"):
                    _emit(f"[{change.action}] {change.key}")
                run.print_result(change)
                if not run.options.on("forever"):
                    break


@_command("exec-watch", "<key> -- <command> [args...]",
          "run a command for each change of a key", _AFTER_INDEX, _RECURSIVE)
def _cmd_exec_watch(run: _Run) -> None:
    key, command = run.args[-1:], run.args[:-1]     # as etcdctl, if there is no `--`
    if run.behind is not None and len(run.args) > len(run.behind):
        key, command = run.args[:-len(run.behind) or None], run.behind
    if len(key) != 1 or not command:
        raise _ExitError("Error:  key and command to exec required")
    children: List[subprocess.Popen[bytes]] = []
    with contextlib.suppress(KeyboardInterrupt):
        with _changes(run, key[0]) as changes:
            for change in changes:
                children = [child for child in children if child.poll() is None]
                if change.node.dir:
                    _complain(f"Ignored dir {change.key} change")
                else:
                    children.append(_start_for(change, command))


def _start_for(change: Result, command: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Start a command with a change in its environment; like etcdctl, do not wait for its end."""
    added = {"ACTION": change.action, "MODIFIED_INDEX": str(change.modified_index),
             "KEY": change.key, "VALUE": change.value or ""}
    environment = {**os.environ, **{f"ETCD_WATCH_{name}": text for name, text in added.items()}}
    try:
        return subprocess.Popen(command, env=environment)
    except (OSError, ValueError) as error:          # ValueError: a NUL cannot be passed on
        raise _ExitError(f"{command[0]}: {getattr(error, 'strerror', None) or error}") from error


# -- members and health


@contextlib.contextmanager
def _as_one_line(prefix: str = "", spoken: Optional[Container[int]] = None) -> Iterator[None]:
    """Make errors of the members and auth APIs one line without "Error:", and exit code 1.

    spoken  HTTP statuses whose message etcdctl shows; of others it tells the number.  None: all
    """
    try:
        yield
    except EtcdError as error:
        line = error.message
        if is_endpoint_failure(error):
            line = _UNAVAILABLE
        elif spoken is not None and error.status not in spoken:
            line = f"unexpected status code {error.status}"
        raise _ExitError(prefix + line) from error


def _print_json(shown: Any) -> None:
    _emit(json.dumps(shown, ensure_ascii=False, separators=(",", ":")))


@_command("member list", "", "print the members", formats=_JSON_TOO,
          wrong=_NO_ARGUMENTS)
def _cmd_member_list(run: _Run) -> None:
    client = run.client
    with _as_one_line(spoken=()):
        members = client.member_list()
    with _as_one_line("Failed to get leader:  ", spoken=()):
        leader = client.leader_member()
    leads = [leader is not None and leader.id == member.id for member in members]
    if run.output == "json":
        _print_json({"members": [
            {**member.raw, "isLeader": leading} for member, leading in zip(members, leads)]})
        return
    rows = []
    for member, leading in zip(members, leads):
        peer_urls, client_urls = ",".join(member.peer_urls), ",".join(member.client_urls)
        rows.append([f"{member.id}:", f"name={member.name}", f"peerURLs={peer_urls}",
                     f"clientURLs={client_urls}", f"isLeader={str(leading).lower()}"])
        if not member.name:
            rows[-1] = [f"{member.id}[unstarted]:", "", f"peerURLs={peer_urls}"]
    _emit_lines(_in_columns(rows, [_GREEN if leading else "" for leading in leads]))


@_command("member add", "<name> <peerURL>", "announce a member that will be started",
          wrong="Provide a name and a single member peerURL")
def _cmd_member_add(run: _Run) -> None:
    name, url = run.args
    client = run.client
    with _as_one_line(spoken=(400, 409)):
        added = client.member_add([url])
        _emit(f"Added member named {name} with ID {added.id} to cluster")
        members = client.member_list()
    cluster = ",".join(
        f"{name if member.id == added.id else member.name}={peer_url}"
        for member in members for peer_url in member.peer_urls)
    _emit(f'\nETCD_NAME="{name}"\nETCD_INITIAL_CLUSTER="{cluster}"\n'
          'ETCD_INITIAL_CLUSTER_STATE="existing"')


@_command("member remove", "<memberID>", "remove a member, by its id or its name",
          wrong="Provide a single member ID")
def _cmd_member_remove(run: _Run) -> None:
    asked, client = run.args[0], run.client
    with _as_one_line("Error while verifying ID against known members: ", spoken=()):
        members = client.member_list()
    found = [member.id for member in members if member.id == asked] or [
        member.id for member in members if member.name == asked]
    if not found:
        raise _ExitError(f"Couldn't find a member in the cluster with an ID of {asked}.")
    if len(found) > 1:
        raise _ExitError(f"{len(found)} members are named {asked}; remove one of them by its id: "
                         f"{', '.join(found)}")
    id = found[0]
    with _as_one_line(f"Received an error trying to remove member {id}: ", spoken=()):
        try:
            client.member_remove(id)
        except HttpError as error:
            if error.status != http.HTTPStatus.GONE:    # removed already
                raise
    _emit(f"Removed member {id} from cluster")


@_command("member update", "<memberID> <peerURLs>", "give a member other peer URLs",
          wrong="Provide an ID and a list of comma separated peerURL "
                "(0xabcd http://example.com,http://example1.com)")
def _cmd_member_update(run: _Run) -> None:
    id, urls = run.args
    client = run.client
    with _as_one_line(spoken=(400, 404, 409)):
        client.member_update(id, urls.split(","))
    _emit(f"Updated member with ID {id} in cluster")


@_command("cluster-health", "", "ask every member whether it is healthy",
          _Flag(("forever", "f"), bool, "ask again every 10 seconds, until Ctrl-C"))
def _cmd_cluster_health(run: _Run) -> int:
    if not run.options.on("forever"):
        return _check_health(run.connect(_given_client))
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            _check_health(run.connect(_given_client))
            _emit("\nnext check after 10 second...\n")
            time.sleep(_HEALTH_EVERY_S)
    return EXIT_OK


def _check_health(client: Client) -> int:
    try:
        members = client.member_list()
    except EtcdError:
        _emit("cluster may be unhealthy: failed to list members")
        raise
    width = max(len(member.id) for member in members) if sys.stdout.isatty() and members else 0
    healthy = [_member_is_healthy(client, member, width) for member in members]
    _emit("cluster is " + (_painted("healthy", _GREEN) if any(healthy)
                           else _painted("unhealthy", _RED)))
    return EXIT_OK if any(healthy) else EXIT_UNHEALTHY


def _member_is_healthy(client: Client, member: Member, width: int) -> bool:
    """Ask a member for its health and print the verdict."""
    unreachable = f"member {member.id:{width}} is {_painted('unreachable', _RED)}"
    if not member.client_urls:
        _emit(f"{unreachable}: no available published client urls")
        return False
    for url in member.client_urls:
        try:
            healthy = client.health(url)
        except (EtcdError, ValueError) as error:
            why = _failure_line(error) if isinstance(error, EtcdError) else str(error)
            _emit(f"failed to check the health of member {member.id} on {url}: {why}")
            continue
        word = "healthy" if healthy else "unhealthy"
        verdict = _painted(word, _GREEN if healthy else _RED)
        _emit(f"member {member.id:{width}} is {verdict}: got {word} result from {url}")
        return healthy
    _emit(f"{unreachable}: [{' '.join(member.client_urls)}] are all unreachable")
    return False


# -- files


@_command("backup", "", "copy a member's data directory under new ids",
          _Flag(("data-dir",), str, "data directory of the member; it may run"),
          _Flag(("wal-dir",), str, "its log directory, if that is elsewhere"),
          _Flag(("backup-dir",), str, "the copy"),
          _Flag(("backup-wal-dir",), str, "log directory of the copy, if that is elsewhere"))
def _cmd_backup(run: _Run) -> None:
    text = run.options.text
    if not text("data-dir") or not text("backup-dir"):
        raise _ExitError("backup needs --data-dir and --backup-dir")
    try:
        server = importlib.import_module("pyetcd")
    except ImportError as error:
        raise _ExitError(
            "backup is done by the server's module: put pyetcd.py beside pyetcd_client.py, or "
            f"install it ({error})") from error
    try:
        server.backup(text("data-dir"), text("backup-dir"), wal_dir=text("wal-dir"),
                      backup_wal_dir=text("backup-wal-dir"))
    except server.BackupError as error:
        raise _ExitError(str(error)) from error


def _spread(
    items: Sequence[_Job], workers: int, work: Callable[[_Job], None], progress: _Progress,
) -> None:
    """Call `work` for every item on `workers` threads; what one raises ends them all."""
    numbered, lock, stop = enumerate(items), threading.Lock(), threading.Event()

    def serve() -> None:
        try:
            while not stop.is_set():
                with lock:                          # guards the iterator and the terminal
                    number, item = next(numbered, (0, None))
                    progress.show(number)
                if item is None:
                    break
                work(item)
        finally:
            stop.set()

    with concurrent.futures.ThreadPoolExecutor(max(1, workers), "pyetcdctl") as pool:
        try:                                        # Ctrl-C may come before all have begun
            for future in [pool.submit(serve) for _ in range(max(1, workers))]:
                future.result()
        finally:
            stop.set()


def _read_snapshot_04(path: str, hidden: Sequence[str]) -> List[Tuple[str, str, Optional[int]]]:
    """Return (key, value, ttl) of the files in a snapshot of etcd 0.4.

    Such a file is the JSON of a store, or a line with a checksum and JSON that holds the former in
    base64.  Hidden directories are left out, except those in `hidden`; so is what has expired.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        outer = json.loads(text if text.startswith("{") else text.partition("\n")[2])
        store = json.loads(base64.b64decode(outer["state"])) if "state" in outer else outer
        root = store["Root"]
        found = list(_snapshot_files(root, "", hidden=False))
        for key in hidden:
            node = root
            for name in clean_key(key).strip("/").split("/"):
                node = node["Children"][name]
            found += _snapshot_files(node, clean_key(key), hidden=True)
    except OSError:
        raise _ExitError(f"cannot read snapshot file {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _ExitError(f"{path} is no snapshot of etcd 0.4 ({error or error!r})") from error
    return [record for record in found if record[2] is None or record[2] > 0]


def _snapshot_files(
    node: Mapping[str, Any], key: str, *, hidden: bool,
) -> Iterator[Tuple[str, str, Optional[int]]]:
    children = node.get("Children")
    if children is None:
        yield key, node["Value"], _seconds_left(node["ExpireTime"])
        return
    for name, child in sorted(children.items()):
        if hidden or not name.startswith("_"):
            yield from _snapshot_files(child, f"{key}/{name}", hidden=hidden)


def _seconds_left(instant: Optional[str]) -> Optional[int]:
    """Return the whole seconds until an RFC 3339 instant, rounded up; None for none."""
    if not instant or instant.startswith("0001-"):  # Go's zero time
        return None
    match = re.fullmatch(r"(\S{19})(\.\d+)?(Z|[+-]\d\d:\d\d)", instant)
    if match is None:
        raise ValueError(f"{instant!r} is no RFC 3339 instant")
    offset = "+00:00" if match[3] == "Z" else match[3]
    at = datetime.datetime.fromisoformat(match[1] + offset).timestamp() + float(match[2] or 0)
    return math.ceil(at - time.time())


def _import_snapshot_04(run: _Run) -> int:
    """Write the files of a snapshot of etcd 0.4, as `import --snap` of etcdctl does."""
    path, workers = run.options.text("snap"), run.options.number("c", 10)
    files = _read_snapshot_04(path, run.options.texts("hidden"))
    client = run.client

    def write(record: "Tuple[str, str, Optional[int]]") -> None:
        key, value, ttl = record
        client.set(key, value, ttl=max(ttl, _SNAP_TTL_MIN_S) if ttl else None)

    _emit(f"starting to import snapshot {path} with {workers} clients")
    with _Progress("import", len(files)) as progress:
        _spread(files, workers, write, progress)
    _emit(f"finished importing {len(files)} keys")
    return EXIT_OK


# -- users, roles, auth


def _names(entries: Optional[Sequence[Any]], field: str) -> List[str]:
    """Return names out of a list of names or of objects: servers have both."""
    return [entry[field] if isinstance(entry, dict) else str(entry) for entry in entries or ()]


def _ask(ask: Callable[..., _Answer], *args: Any) -> _Answer:
    """Ask the auth API; what goes wrong ends the command with one line."""
    with _as_one_line():
        return ask(*args)


def _is_there(ask: Callable[[str], Any], name: str) -> bool:
    with _as_one_line():
        try:
            ask(name)
        except EtcdError as error:
            if is_endpoint_failure(error):
                raise
            return False
    return True


def _call_command(
    name: str, arguments: str, help: str, call: Callable[..., Any], done: str, wrong: str,
) -> None:
    """Enter a command that makes one call and says that this was done."""
    @_command(name, arguments, help, wrong=wrong)
    def run_it(run: "_Run") -> None:
        _ask(call, run.client, *run.args)
        _emit(done.format(*run.args))


@_command("user add", "<name>[:<password>]", "make a user", wrong=_A_USER)
def _cmd_user_add(run: _Run) -> None:
    text, client = run.args[0], run.client
    name = text.partition(":")[0]
    if _is_there(client.user_get, name):
        raise _ExitError(f"User {name} already exists")
    _ask(client.user_add, name, _split_user(text, "New password: ")[1])
    _emit(f"User {name} created")


@_command("user get", "<name>", "print a user's roles", wrong=_A_USER, formats=_JSON_TOO)
def _cmd_user_get(run: _Run) -> None:
    user = _ask(run.client.user_get, run.args[0])
    roles = _names(user.get("roles"), "role")
    if run.output == "json":
        _print_json({"user": user["user"], "roles": roles})
    else:
        _emit(f"User: {user['user']}\nRoles: {' '.join(roles)}")


@_command("user list", "", "print the names of all users", wrong=_NO_ARGUMENTS,
          formats=_JSON_TOO)
def _cmd_user_list(run: _Run) -> None:
    _list_names(run, "user", Client.user_list)


@_command("role list", "", "print the names of all roles", wrong=_NO_ARGUMENTS,
          formats=_JSON_TOO)
def _cmd_role_list(run: _Run) -> None:
    _list_names(run, "role", Client.role_list)


def _list_names(run: _Run, kind: str, listing: Callable[[Client], Sequence[Any]]) -> None:
    client = run.client
    with _as_one_line(spoken=()):
        names = _names(listing(client), kind)
    if run.output == "json":
        _print_json({f"{kind}s": names})
    else:
        _emit_lines(names)


_call_command(
    "user remove", "<name>", "remove a user", Client.user_remove, "User {} removed", _A_USER)


@_command("user grant", "<name>", "give a user roles", _ROLES, wrong=_A_USER)
def _cmd_user_grant(run: _Run) -> None:
    _change_roles(run, Client.user_grant)


@_command("user revoke", "<name>", "take roles from a user", _ROLES, wrong=_A_USER)
def _cmd_user_revoke(run: _Run) -> None:
    _change_roles(run, Client.user_revoke)


def _change_roles(run: _Run, change: Callable[[Client, str, Sequence[str]], Any]) -> None:
    roles = run.options.texts("roles")
    if not roles:
        raise _ExitError("No roles specified; please use `-roles`")
    _ask(change, run.client, run.args[0], roles)
    _emit(f"User {run.args[0]} updated")


@_command("user passwd", "<name>", "change a user's password", wrong=_A_USER)
def _cmd_user_passwd(run: _Run) -> None:
    name, client = run.args[0], run.client
    _ask(client.user_get, name)
    _ask(client.user_password, name, _ask_password("New password: "))
    _emit("Password updated")


@_command("role add", "<name>", "make a role", wrong=_A_ROLE)
def _cmd_role_add(run: _Run) -> None:
    name, client = run.args[0], run.client
    if _is_there(client.role_get, name):
        raise _ExitError(f"Role {name} already exists")
    _ask(client.role_add, name)
    _emit(f"Role {name} created")


def _permitted(role: Mapping[str, Any]) -> Tuple[List[str], List[str]]:
    """Return the paths that a role may read, and those that it may write."""
    kv = role["permissions"]["kv"]
    return list(kv.get("read") or ()), list(kv.get("write") or ())


@_command("role get", "<name>", "print what a role permits", wrong=_A_ROLE, formats=_JSON_TOO)
def _cmd_role_get(run: _Run) -> None:
    role = _ask(run.client.role_get, run.args[0])
    read, write = _permitted(role)
    if run.output == "json":
        _print_json(role)
    else:
        _emit_lines([f"Role: {role['role']}", "KV Read:", *(f"\t{path}" for path in read),
                     "KV Write:", *(f"\t{path}" for path in write)])


_call_command(
    "role remove", "<name>", "remove a role", Client.role_remove, "Role {} removed", _A_ROLE)


@_command("role grant", "<name>", "permit a path", *_PERMISSION_FLAGS, wrong=_A_ROLE)
def _cmd_role_grant(run: _Run) -> None:
    _change_permission(run, Client.role_grant, "granted")


@_command("role revoke", "<name>", "permit a path no longer", *_PERMISSION_FLAGS, wrong=_A_ROLE)
def _cmd_role_revoke(run: _Run) -> None:
    _change_permission(run, Client.role_revoke, "revoked")


def _change_permission(
    run: _Run, change: Callable[[Client, str, str, str], Dict[str, Any]], done: str,
) -> None:
    path = run.options.text("path")
    if not path:
        raise _ExitError("No path specified; please use `-path`")
    canonical = clean_key(path) + ("/" if path.endswith("/") and path.strip("/") else "")
    if path != canonical:
        raise _ExitError(f"Not canonical path; please use `-path={canonical}`")
    kinds = [kind for kind in ("read", "write", "readwrite") if run.options.on(kind)]
    if len(kinds) != 1:
        raise _ExitError("Please specify exactly one of -read, -write or -readwrite")
    name, client = run.args[0], run.client
    before = _ask(client.role_get, name)
    after = _ask(change, client, name, path, kinds[0])
    unchanged = _permitted(before) == _permitted(after)
    _emit(f"{f'Role unchanged; already {done}' if unchanged else ''}Role {name} updated")


_call_command("auth enable", "", "let only users with the right do something",
              Client.auth_enable, "Authentication Enabled", _NO_ARGUMENTS)
_call_command("auth disable", "", "let everybody do everything",
              Client.auth_disable, "Authentication Disabled", _NO_ARGUMENTS)


# ============================================================================
# ctl/transfer -- Export, import and mirror.
# ============================================================================


_EXPORT_MARK = "# keys of etcd v2, written by pyetcdctl export; see pyetcdctl help export"
_EXPORT_VERSION = 1
_LONG_S = 60.0                  # --timeout and --total-timeout where an answer may be long
_RETRY_MIN_S = 0.2              # a mirror that cannot reach its target tries again, each time
_RETRY_MAX_S = 10.0             # after twice the wait
_TOP_EVERY_S = 2.0
_TREE_VALUE_MAX = 60            # characters of a value that `tree --values` shows
_BENCH_TOTAL = 10_000
_BENCH_PREFIX = "/pyetcd-bench"
_BENCH_SIZE_BYTES = 64
_BENCH_KEYS = 1_000             # distinct keys that bench writes and reads

_PREFIX = _Flag(("prefix",), str, "take only what lies below this key (default: all)")
_DEST_PREFIX = _Flag(("dest-prefix",), str, "and put it below this one (default: the same)")
_DRY_RUN = _Flag(("dry-run",), bool, "print what would be done, and do nothing")
_WORKERS = _Flag(("c",), int, "connections to use (default: 10)", 1)


def _patient(client: Client, settings: _Options) -> Client:
    """Return `client` with time for long answers, unless options say otherwise."""
    client.read_timeout = settings.seconds("timeout", _LONG_S)
    client.total_timeout = settings.seconds("total-timeout", _LONG_S) or None
    return client


# -- a tree as text


class _Record(NamedTuple):
    """A node as it is exported and imported."""

    key: str
    value: Optional[str] = None                     # None for a directory
    expiration: Optional[str] = None                # RFC 3339 instant

    @classmethod
    def from_node(cls, node: Node) -> "_Record":
        """Return the record of a node."""
        return cls(node.key, None if node.dir else node.value or "", node.expiration)

    @classmethod
    def from_line(cls, line: str) -> "_Record":
        """Return the record of a line of the text form.  Raises ValueError."""
        name, *fields = line.split("\t")
        is_dir = name.endswith("/")
        extra = fields[1] if len(fields) == 2 else ""
        if (not name.startswith("/") or len(fields) > 2 or not (is_dir or fields)
                or (extra and not extra.startswith("expires=")) or (is_dir and any(fields[:1]))):
            raise ValueError("not KEY, tab, value or DIRECTORY/")
        expiration = extra[len("expires="):] or None
        _seconds_left(expiration)
        return cls(_unescape(name.rstrip("/")) or "/", None if is_dir else _unescape(fields[0]),
                   expiration)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "_Record":
        """Return the record of an object of the JSON form.  Raises ValueError."""
        key, value, expiration = raw["key"], raw.get("value"), raw.get("expiration")
        if raw.get("dir", False) != (value is None) or not isinstance(key, str):
            raise ValueError(f"{raw} has not either a value or dir")
        if not isinstance(value, (str, type(None))):
            raise ValueError(f"the value of {key} is not text")
        _seconds_left(expiration)
        return cls(key, value, expiration)

    @property
    def ttl(self) -> Optional[int]:
        """Seconds left; None if permanent; 0 or less if expired."""
        return _seconds_left(self.expiration)

    def line(self) -> str:
        """Return the record as a line of the text form."""
        key = _escape(self.key)
        fields = [key.rstrip("/") + "/", ""] if self.value is None else [key, _escape(self.value)]
        if self.expiration:
            return "\t".join([*fields, f"expires={self.expiration}"])
        return fields[0] if self.value is None else "\t".join(fields)

    def json(self) -> str:
        """Return the record as an object of the JSON form."""
        content = {"dir": True} if self.value is None else {"value": self.value}
        shown = {"key": self.key, **content}
        if self.expiration:
            shown["expiration"] = self.expiration
        return json.dumps(shown, ensure_ascii=False)


def _records_in(node: Node) -> List[_Record]:
    """Return the records of a listed node and of all below it; the root itself is none."""
    nodes = node.walk() if node.key == "/" else itertools.chain([node], node.walk())
    return [_Record.from_node(found) for found in nodes]


def _parse_export(text: str) -> List[_Record]:
    """Return the records in either form, or in an answer of the keys API.  Raises ValueError."""
    if text.lstrip()[:1] == "{":
        raw = json.loads(text)
        if "node" in raw:
            return _records_in(Node.from_json(raw["node"]))
        return [_Record.from_json(node) for node in raw["nodes"]]
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line[:-1] if line.endswith("\r") else line
        if not line or line.startswith("#"):
            continue
        try:
            records.append(_Record.from_line(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return records


def _moved(key: str, prefix: str, dest_prefix: str) -> Optional[str]:
    """Return `key` with `prefix` replaced; None if it does not lie there."""
    prefix, dest_prefix = prefix.rstrip("/"), dest_prefix.rstrip("/")
    if key == (prefix or "/"):
        return dest_prefix or "/"
    return dest_prefix + key[len(prefix):] if key.startswith(prefix + "/") else None


def _prefixes(options: _Options, prefix: str = "") -> Tuple[str, str]:
    prefix = clean_key(prefix or options.text("prefix"))
    return prefix, clean_key(options.text("dest-prefix") or prefix)


@_command("export", "[key]", "print a tree, to be read by import",
          _Flag(("format",), str, "json (default), or text: a key a line, to be compared by diff"),
          _Flag(("hidden",), list, "also this hidden directory; may be given again"), own=True)
def _cmd_export(run: _Run) -> None:
    """Print records, parents first; each --hidden directory is read for itself, later."""
    form = run.options.text("format") or "json"
    if form not in ("json", "text"):
        raise _ExitError("--format is json or text")
    key, client = (run.args or ["/"])[0], _patient(run.client, run.settings)
    with _Progress("export"):
        result = client.get(key, recursive=True, sorted=True, quorum=True)
        records = _records_in(result.node)
        for hidden in run.options.texts("hidden"):
            found = client.get(hidden, recursive=True, sorted=True, quorum=True)
            records += _records_in(found.node)
    # Lone surrogates, which some server might send, become escapes that both forms know.
    plain = (text.encode("utf-8", "backslashreplace").decode() for text in
             (record.json() if form == "json" else record.line() for record in records))
    with _Progress("export", len(records)) as progress:
        _emit_lines(itertools.chain(
            [_EXPORT_MARK] if form == "text" else
            [f'{{"pyetcd_export": {_EXPORT_VERSION}, "key": {json.dumps(result.key)}, '
             f'"etcdIndex": {result.etcd_index}, "nodes": ['],
            _separated(plain, "," if form == "json" else "", progress),
            [] if form == "text" else ["]}"]))


def _separated(texts: Iterable[str], separator: str, progress: _Progress) -> Iterator[str]:
    previous: Optional[str] = None
    for number, text in enumerate(texts):
        progress.show(number)
        if previous is not None:
            yield previous + separator
        previous = text
    if previous is not None:
        yield previous


class _Import:
    """Writes records; counts what it did."""

    def __init__(self, client: Client, options: _Options) -> None:
        self._client = client
        self._keep = options.on("keep")
        self._ttl = options.number("ttl") or None
        self._workers = options.number("c", 10)
        self._lock = threading.Lock()               # guards the next
        self.kept = 0                               # existed already

    def write(self, records: Sequence[_Record]) -> None:
        """Write directories one after the other, then files on many connections."""
        for record in _needed_dirs(records):
            self._make_dir(record)
        files = [record for record in records if record.value is not None]
        with _Progress("import", len(files)) as progress:
            _spread(files, self._workers, self._write_file, progress)

    def ttl(self, record: _Record) -> Optional[int]:
        """Return the seconds a record is to live; None for ever; 0 or less: not at all."""
        return self._ttl if record.expiration and self._ttl else record.ttl

    def is_over(self, record: _Record) -> bool:
        """Tell whether a record has expired."""
        ttl = self.ttl(record)
        return ttl is not None and ttl <= 0

    def _make_dir(self, record: _Record) -> None:
        ttl = self.ttl(record)
        if ttl is not None and ttl <= 0:            # meanwhile
            return
        try:
            self._client.mkdir(record.key, ttl=ttl)
        except NodeExists:
            if ttl and not self._keep:
                _set_dir(self._client, record.key, ttl, prevExist=True)

    def _write_file(self, record: _Record) -> None:
        write, ttl = self._client.create if self._keep else self._client.set, self.ttl(record)
        if ttl is not None and ttl <= 0:            # meanwhile
            return
        try:
            write(record.key, record.value or "", ttl=ttl)
        except NodeExists:
            with self._lock:
                self.kept += 1


def _needed_dirs(records: Sequence[_Record]) -> List[_Record]:
    """Return the directories that writing the files would not make as they are to be."""
    filled = {record.key.rpartition("/")[0] for record in records}
    return [record for record in records
            if record.value is None and (record.expiration or record.key not in filled)]


def _read_records(path: str) -> List[_Record]:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return _parse_export(data.decode("utf-8"))
    except OSError as error:
        raise _ExitError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _ExitError(f"{path} is not what export writes: {error}") from error


@_command("import", "<file>", "write what export has printed; - is stdin", _PREFIX,
          _DEST_PREFIX, _Flag(("keep",), bool, "leave keys that exist as they are"),
          _Flag(("ttl",), int, "seconds that keys which expire live anew, expired ones too", 1),
          _DRY_RUN, _WORKERS, _Flag(("snap",), str, "instead: a snapshot file of etcd 0.4"),
          _Flag(("hidden",), list, "with --snap: also this hidden directory"), own=True)
def _cmd_import(run: _Run) -> int:
    if run.options.text("snap"):
        run.options.refuse("with --snap", "prefix", "dest-prefix", "keep", "ttl", "dry-run")
        if run.args:
            raise _ExitError(f'pyetcdctl import: "{run.args[0]}" has no effect with --snap')
        return _import_snapshot_04(run)
    run.options.refuse("without --snap", "hidden")
    if not run.args:
        _emit("no snapshot file provided (use --snap)")
        return EXIT_BAD_ARGS
    prefixes = _prefixes(run.options)
    found = [(record, _moved(clean_key(record.key), *prefixes))
             for record in _read_records(run.args[0])]
    records = [record._replace(key=key) for record, key in found if key is not None and key != "/"]
    importing = _Import(_patient(run.client, run.settings), run.options)
    alive = [record for record in records if not importing.is_over(record)]
    if run.options.on("dry-run"):
        _emit_lines(f"{'mkdir' if record.value is None else 'set'} {_escape(record.key)}"
                    for record in alive)
        return EXIT_OK
    importing.write(alive)
    files = sum(record.value is not None for record in alive)
    notes = [(importing.kept, "existed and were kept"),
             (len(records) - len(alive), "had expired and were left out"),
             (len(found) - len(records), "lie elsewhere and were left out")]
    _emit("; ".join([f"imported {files - importing.kept} keys",
                     *(f"{count} {what}" for count, what in notes if count)]))
    return EXIT_OK


# -- mirror


class _Change(NamedTuple):
    """What a mirror does to its target."""

    verb: str                                       # set, mkdir or delete
    key: str
    value: str = ""
    ttl: Optional[int] = None

    def apply(self, client: Client) -> None:
        """Do it; that may be done again, as after an answer that was lost."""
        if self.verb == "set":
            client.set(self.key, self.value, ttl=self.ttl)
        elif self.verb == "mkdir":
            with contextlib.suppress(NotFile):      # it is a directory already
                _set_dir(client, self.key, self.ttl)
        else:
            with contextlib.suppress(KeyNotFound):
                client.delete(self.key, recursive=True)


class _Mirror:
    """Makes a tree of the target equal to one of the source, and keeps it so.

    What was done so far is seen in the target: a mirror that is started again compares both trees
    and writes the difference, so it needs no notes.  The same happens when more changes went by
    than the source remembers, and when a change does not fit the target.
    """

    def __init__(self, source: Client, target: Client, options: _Options) -> None:
        self._source = source
        self._target = target
        self._prefix, self._dest_prefix = _prefixes(options)
        self._with_ttl = options.on("ttl")
        self._deletes = not options.on("no-delete")
        self._workers = options.number("c", 10)
        self.dry_run = options.on("dry-run")
        self.verbose = options.on("verbose") or self.dry_run

    def check(self) -> None:
        """Raise _ExitError if the mirror would see its own writes."""
        for client in (self._source, self._target):
            client.member_list()                    # an answer tells the cluster's id
        inside = (_moved(self._prefix, self._dest_prefix, ""),
                  _moved(self._dest_prefix, self._prefix, ""))
        if self._source.cluster_id == self._target.cluster_id and any(inside):
            raise _ExitError("source and target overlap: they are the same cluster")

    def copy(self) -> int:
        """Make the trees equal; return the source's index from which to follow."""
        index, wanted = self._listing(self._source, self._prefix)
        _, present = self._listing(self._target, self._dest_prefix)
        deletions, dirs, files = self._difference(wanted, present)
        with _Progress("mirror", len(files)) as progress:
            for change in (*deletions, *dirs):
                self._do(change)
            _spread(files, self._workers, self._do, progress)
        _emit(f"{'would copy' if self.dry_run else 'copied'} {len(files)} keys, "
              f"{'would remove' if self.dry_run else 'removed'} {len(deletions)}; "
              f"source index {index}")
        return index + 1

    def follow(self, index: int) -> None:
        """Repeat every change of the source at the target, for ever."""
        while True:
            try:
                with self._source.watcher(
                        self._prefix, recursive=True, index=index, relist=False) as changes:
                    for event in changes:
                        self._repeat(event)
            except (ApiError, HttpError) as error:  # history gone, or the trees differ
                if isinstance(error, Unauthorized) or is_endpoint_failure(error):
                    raise
                index = self._insist(self.copy)

    def _listing(self, client: Client, prefix: str) -> Tuple[int, Dict[str, Node]]:
        """Return a cluster's index and all nodes below `prefix`, by their key at the target."""
        try:
            result = client.get(prefix, recursive=True, sorted=True, quorum=True)
        except KeyNotFound as error:
            return error.index, {}
        if not result.node.dir:
            raise _ExitError(f"{prefix} is no directory")
        moved = ((_moved(node.key, prefix, self._dest_prefix), node)
                 for node in result.node.walk())
        return result.etcd_index, {key: node for key, node in moved if key is not None}

    def _difference(
        self, wanted: Mapping[str, Node], present: Mapping[str, Node],
    ) -> Tuple[List[_Change], List[_Change], List[_Change]]:
        """Return what is to be deleted, which directories and which files are to be written."""
        deletions: List[_Change] = []
        for key, node in present.items():           # parents come first
            mine = wanted.get(key)
            unwanted = self._deletes if mine is None else mine.dir != node.dir
            gone = deletions and key.startswith(deletions[-1].key + "/")
            if unwanted and not gone:
                deletions.append(_Change("delete", key))
        dirs = [_Change("mkdir", key, ttl=self._ttl(node)) for key, node in wanted.items()
                if node.dir and (key not in present or not present[key].dir)]
        files = [_Change("set", key, node.value or "", self._ttl(node))
                 for key, node in wanted.items()
                 if not node.dir and not self._is_equal(node, present.get(key))]
        return deletions, dirs, files

    def _is_equal(self, node: Node, copy: Optional[Node]) -> bool:
        expires = self._with_ttl and node.ttl is not None
        return (copy is not None and not copy.dir and copy.value == node.value
                and (copy.ttl is not None) == expires)

    def _ttl(self, node: Node) -> Optional[int]:
        return max(1, node.ttl) if self._with_ttl and node.ttl is not None else None

    def _repeat(self, event: Result) -> None:
        key = _moved(event.key, self._prefix, self._dest_prefix)
        if key is None or key == "/":
            return
        if event.action in ("delete", "expire", "compareAndDelete"):
            if self._deletes:
                self._insist(lambda: self._do(_Change("delete", key)))
            return
        verb = "mkdir" if event.node.dir else "set"
        change = _Change(verb, key, event.value or "", self._ttl(event.node))
        self._insist(lambda: self._do(change))

    def _do(self, change: _Change) -> None:
        if self.verbose:
            _emit(f"{change.verb} {_escape(change.key)}")
        if not self.dry_run:
            change.apply(self._target)

    def _insist(self, action: Callable[[], _Answer]) -> _Answer:
        """Do `action` until a server answers: all a mirror does may be done twice."""
        wait_s = _RETRY_MIN_S
        while True:
            try:
                return action()
            except EtcdError as error:
                if not is_endpoint_failure(error):
                    raise
                _complain(f"{error}; trying again")
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(_RETRY_MAX_S, 2 * wait_s)


@_command("mirror", "<target>", "keep a copy of a tree in another cluster",
          _PREFIX, _DEST_PREFIX, _Flag(("once",), bool, "end when the copy is made"), _DRY_RUN,
          _Flag(("no-delete",), bool, "leave what only the target has"),
          _Flag(("ttl",), bool, "let copies expire by themselves (see the manual)"),
          _Flag(("verbose",), bool, "print every change"), _WORKERS,
          _Flag(("dest-cert",), str, "client certificate for the target"),
          _Flag(("dest-key",), str, "key of that certificate"),
          _Flag(("dest-cacert",), str, "certificates of authorities to check the target with"),
          _Flag(("dest-username",), str, "user[:password] at the target"), own=True,
          wrong="Provide the endpoints of the target, comma between")
def _cmd_mirror(run: _Run) -> None:
    settings = _Options()
    for flag, own in (("dest-cert", "cert-file"), ("dest-key", "key-file"),
                      ("dest-cacert", "ca-file"), ("dest-username", "username")):
        settings.put(_Flag((own,), str, ""), run.options.text(flag))
    access = _Access.from_settings(settings, environment=False)
    with _patient(run.client, run.settings) as source, _patient(
            access.client(endpoints=run.args[0].split(",")), run.settings) as target:
        mirror = _Mirror(source, target, run.options)
        mirror.check()
        index = mirror.copy()
        if not mirror.dry_run and not run.options.on("once"):
            mirror.follow(index)
    return


# ============================================================================
# ctl/more -- Tree, top, bench and completion.
# ============================================================================


# -- tree


@_command("tree", "[key]", "draw a directory with all below it",
          _Flag(("values",), bool, "with the values of keys"),
          _Flag(("ascii",), bool, "without box characters"), _QUORUM, own=True)
def _cmd_tree(run: _Run) -> None:
    options = run.options
    node = _patient(run.client, run.settings).get(
        (run.args or ["/"])[0], recursive=True, sorted=True, quorum=options.on("quorum")).node
    strokes = ("|-- ", "`-- ", "|   ") if options.on("ascii") else ("├── ", "└── ", "│   ")
    _emit(_escape(node.key) + (_tree_tail(node, options) if node.key != "/" else ""))
    _emit_lines(_tree_lines(node, options, strokes))
    below = list(node.walk()) if node.dir else [node]
    dirs = sum(child.dir for child in below)
    _emit(f"\n{dirs} directories, {len(below) - dirs} keys")


def _tree_lines(node: Node, options: _Options, strokes: Tuple[str, str, str]) -> Iterator[str]:
    """Yield a line for each node below `node`."""
    fork, end, along = strokes
    for child in node.nodes:
        last = child is node.nodes[-1]
        name = _painted(_escape(child.key.rpartition("/")[2]), _BLUE if child.dir else "")
        yield (end if last else fork) + name + _tree_tail(child, options)
        for line in _tree_lines(child, options, strokes):
            yield ("    " if last else along) + line


def _tree_tail(node: Node, options: _Options) -> str:
    """Return what stands behind a name: the kind, the value, the time left."""
    text = "/" if node.dir else ""
    if options.on("values") and not node.dir:
        value = _escape(node.value or "")
        cut = value if len(value) <= _TREE_VALUE_MAX else value[:_TREE_VALUE_MAX - 1] + "…"
        text += f" = {cut}"
    return text if node.ttl is None else f"{text}  ({node.ttl} s left)"


# -- top

_TOP_WRITES = tuple(f"{verb}Success" for verb in (
    "sets", "delete", "update", "create", "compareAndSwap", "compareAndDelete"))
_TOP_COLUMNS = ("NAME", "STATE", "GET/S", "WRITE/S", "FAIL/S", "EXPIRE/S", "WATCH", "SINCE",
                "ADDRESS")


class _Sample(NamedTuple):
    """What one member said of itself."""

    taken_at: float                                 # monotonic seconds
    self_stats: Mapping[str, Any]
    store: Mapping[str, int]

    def count(self, *names: str) -> int:
        return sum(self.store.get(name, 0) for name in names)


class _Top:
    """Samples all members; draws a table of what happened since the last time."""

    def __init__(self, run: _Run) -> None:
        self._client = run.client
        self._access = run.access
        self._members = self._client.member_list()
        self._clients: Dict[str, Client] = {}       # by member id
        self._samples: Dict[str, _Sample] = {}

    def lines(self) -> List[str]:
        """Take a sample of every member; return the table."""
        with contextlib.suppress(EtcdError):        # nobody answers: the list known is shown
            self._members = self._client.member_list()
        members = self._members
        with concurrent.futures.ThreadPoolExecutor(max(1, len(members)), "pyetcdctl-top") as pool:
            samples = list(pool.map(self._sample, members))
        rows = [_TOP_COLUMNS, *map(self._row, members, samples)]
        self._samples = {member.id: sample for member, sample in zip(members, samples)
                         if sample is not None}
        widths = [max(map(len, column)) for column in zip(*rows)]
        up = len(self._samples)
        return [f"pyetcdctl top, {time.strftime('%H:%M:%S')}: {up} of {len(members)} members "
                f"answer", "",
                *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)]

    def _sample(self, member: Member) -> Optional[_Sample]:
        if not member.client_urls:
            return None
        client = self._clients.get(member.id)
        if client is None:
            client = self._clients[member.id] = self._access.client(endpoints=member.client_urls)
        try:
            with client:                            # its thread ends: so do its connections
                return _Sample(time.monotonic(), client.statistics("self"),
                               client.statistics("store"))
        except EtcdError:
            return None

    def _row(self, member: Member, sample: Optional[_Sample]) -> Tuple[str, ...]:
        name, address = member.name or member.id, ",".join(member.client_urls)
        if sample is None:
            return (name, "silent" if member.name else "unstarted", *"-" * 6, address)
        before = self._samples.get(member.id, sample)
        elapsed_s = sample.taken_at - before.taken_at

        def rate(*names: "str") -> "str":
            return f"{(sample.count(*names) - before.count(*names)) / elapsed_s:.1f}" \
                if elapsed_s > 0 else "-"

        state = str(sample.self_stats.get("state", "")).replace("State", "").lower()
        failures = [name for name in sample.store if name.endswith("Fail")]
        return (name, state, rate("getsSuccess"), rate(*_TOP_WRITES), rate(*failures),
                rate("expireCount"), str(sample.count("watchers")),
                str(sample.self_stats.get("startTime", ""))[:16], address)


@contextlib.contextmanager
def _screen() -> Iterator[Callable[[float], bool]]:
    """Take the terminal; yields a function that waits and says whether q was pressed.

    The terminal is as before afterwards, also after Ctrl-C and SIGTERM.
    """
    import select
    import termios
    import tty

    def wait(seconds: "float") -> "bool":
        return (bool(select.select([sys.stdin], [], [], seconds)[0])
                and os.read(sys.stdin.fileno(), 16)[:1] in (b"q", b"Q", b""))

    saved = termios.tcgetattr(sys.stdin)
    handler = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        tty.setcbreak(sys.stdin)
        print("\x1b[?1049h\x1b[?25l", end="", flush=True)   # other screen, no cursor
        yield wait
    finally:
        print("\x1b[?25h\x1b[?1049l", end="", flush=True)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)
        signal.signal(signal.SIGTERM, handler)


@_command("top", "", "show what every member does, until q or Ctrl-C",
          _Flag(("interval",), float, "time between two looks (default: 2s)", 0.001),
          _Flag(("once",), bool, "print the rates of one interval as text, then end"), own=True)
def _cmd_top(run: _Run) -> None:
    top, every_s = _Top(run), run.options.seconds("interval", _TOP_EVERY_S)
    if run.options.on("once"):
        top.lines()
        time.sleep(every_s)
        _emit_lines(top.lines())
        return
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        while True:
            _emit_lines([*top.lines(), ""])
            time.sleep(every_s)
    with _screen() as quit_pressed:
        while True:
            columns, rows = shutil.get_terminal_size()
            shown = [line[:columns] for line in (*top.lines(), "", "q: quit")]
            print("\x1b[H\x1b[J" + "\r\n".join(shown[:rows]), end="", flush=True)
            if quit_pressed(every_s):
                return


# -- bench


class _Bench:
    """Sends requests on many connections; keeps how long each took."""

    def __init__(self, client: Client, options: _Options, kind: str) -> None:
        self._client = client
        self.connections = options.number("connections", 8)
        self.total = options.number("total", _BENCH_TOTAL)
        self.value = "x" * options.number("size", _BENCH_SIZE_BYTES)
        self._reads_percent = {"put": 0, "get": 100}.get(kind, options.number("reads", 90))
        prefix = clean_key(options.text("prefix") or _BENCH_PREFIX).rstrip("/")
        self.directory = f"{prefix}/{random.getrandbits(32):08x}"
        self._made = list(self._missing(prefix))
        self.latencies_s: List[float] = []          # append is atomic
        self.failures: List[EtcdError] = []

    def prepare(self) -> None:
        """Write what will be read."""
        if self._reads_percent:
            keys = [self._key(number) for number in range(min(_BENCH_KEYS, self.total))]
            with _Progress("bench: preparing", len(keys)) as progress:
                _spread(keys, self.connections, lambda key: self._put(key), progress)

    def run(self) -> float:
        """Send all requests; return the seconds that took."""
        numbers = range(self.total)
        with _Progress("bench", self.total) as progress:
            started_at = time.monotonic()
            _spread(numbers, self.connections, self._one, progress)
            return time.monotonic() - started_at

    def clean_up(self) -> None:
        """Remove what was written, and the directories that were not there before."""
        try:
            with contextlib.suppress(KeyNotFound):
                self._client.delete(self.directory, recursive=True)
            for directory in self._made:
                with contextlib.suppress(KeyNotFound, DirNotEmpty):     # another bench uses it
                    self._client.rmdir(directory)
        except EtcdError as error:
            _complain(f"pyetcdctl bench: {self.directory} is still there: {error}")

    def _missing(self, directory: str) -> Iterator[str]:
        """Yield the directories that have to be made, the inner ones first."""
        while directory:
            try:
                self._client.get(directory)
            except KeyNotFound:
                yield directory
            except EtcdError:                       # the requests to come will tell
                return
            else:
                if directory == _BENCH_PREFIX:      # left by one that was killed
                    yield directory
                return
            directory = directory.rpartition("/")[0]

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def _key(self, number: int) -> str:
        return f"{self.directory}/{number % _BENCH_KEYS:04}"

    def _put(self, key: str) -> None:
        self._client.set(key, self.value)

    def _one(self, number: int) -> None:
        # Multiples of a number without common factors: reads and writes mix evenly.
        is_read = number * 37 % 100 < self._reads_percent
        begun_at = time.perf_counter()
        try:
            (self._client.get if is_read else self._put)(self._key(number))
        except EtcdError as error:
            self.failures.append(error)
        else:
            self.latencies_s.append(time.perf_counter() - begun_at)


@_command("bench", "[put|get|mixed]", "put load on a cluster; print rate and times",
          _Flag(("connections",), int, "requests under way at once (default: 8)", 1),
          _Flag(("total",), int, f"requests to send (default: {_BENCH_TOTAL})", 1),
          _Flag(("size",), int, f"bytes of a value (default: {_BENCH_SIZE_BYTES})", 0),
          _Flag(("reads",), int, "with mixed: reads in 100 requests (default: 90)", 0),
          _Flag(("prefix",), str, f"directory to work in (default: {_BENCH_PREFIX})"),
          own=True)
def _cmd_bench(run: _Run) -> int:
    kind = (run.args or ["put"])[0]
    if kind not in ("put", "get", "mixed") or run.options.number("reads") > 100:
        raise _ExitError("bench is put, get or mixed, with --reads from 0 to 100")
    if kind != "mixed":
        run.options.refuse(f"with {kind}", "reads")
    bench = _Bench(_patient(run.client, run.settings), run.options, kind)
    try:
        bench.prepare()
        elapsed_s = bench.run()
    finally:
        bench.clean_up()
    done = len(bench.latencies_s)
    _emit(f"{kind}: {done:,} requests, values of {len(bench.value):,} bytes, {bench.connections} "
          f"connections, {elapsed_s:.2f} s: {done / elapsed_s:,.0f} per second")
    if done:
        _emit("milliseconds: " + ", ".join(
            f"{name} {bench.percentile_ms(share):.2f}" for name, share in (
                ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0))))
    if bench.failures:
        _emit(f"{len(bench.failures):,} requests failed, the first: {bench.failures[0]}")
    return EXIT_SERVER_ERROR if bench.failures else EXIT_OK


# -- completion

_COMPLETIONS = {
    "bash": """\
_pyetcdctl() {
    local IFS=$'\\n' words=("${COMP_WORDS[@]:1:COMP_CWORD}")
    if declare -F _get_comp_words_by_ref >/dev/null; then
        local cur cword; _get_comp_words_by_ref -n : -w words -i cword cur
        words=("${words[@]:1:cword}")
    fi
    COMPREPLY=($("${COMP_WORDS[0]}" completion words "${words[@]}" 2>/dev/null | cut -f 1))
    [[ ${COMPREPLY[0]} == */ ]] && compopt -o nospace
    declare -F __ltrim_colon_completions >/dev/null && __ltrim_colon_completions "$cur"
}
complete -o default -F _pyetcdctl pyetcdctl
""",
    "zsh": """\
#compdef pyetcdctl
_pyetcdctl() {
    local -a lines words_found notes
    lines=("${(@f)$("${words[1]}" completion words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    local line
    for line in $lines; do
        words_found+=("${line%%$'\\t'*}")
        notes+=("${line/$'\\t'/  -- }")
    done
    (( $#words_found )) || { _files; return }
    if [[ ${words_found[1]} == */ ]]; then
        compadd -S '' -a words_found
    else
        compadd -l -d notes -a words_found
    fi
}
if [[ $funcstack[1] == _pyetcdctl ]]; then _pyetcdctl; else compdef _pyetcdctl pyetcdctl; fi
""",
    "fish": """\
function __pyetcdctl_words
    set -l before (commandline -opc)
    $before[1] completion words $before[2..-1] (commandline -ct) 2>/dev/null
end
complete -c pyetcdctl -a '(__pyetcdctl_words)'
""",
}


@_command("completion", "bash|zsh|fish", "print a script that completes words in a shell",
          own=True, mixed=False)
def _cmd_completion(run: _Run) -> None:
    if run.args[:1] == ["words"]:
        _emit_lines("\t".join(pair).rstrip("\t") for pair in _candidates(run.args[1:] or [""]))
        return
    if len(run.args) != 1 or run.args[0] not in _COMPLETIONS:
        raise _ExitError("Provide the name of a shell: bash, zsh or fish")
    _emit(_COMPLETIONS[run.args[0]].rstrip("\n"))


def _candidates(words: Sequence[str]) -> List[Tuple[str, str]]:
    """Return (word, note) for all that may stand in place of the last of `words`."""
    *before, current = words
    settings, rest, awaited = _scan(before, _GLOBAL_FLAGS, mixed=False)
    name, args = _split_command(rest)
    flags: Sequence[_Flag] = _GLOBAL_FLAGS
    if name:
        _, args, awaited = _scan(args, _COMMANDS[name].flags, mixed=_COMMANDS[name].mixed)
        flags = _COMMANDS[name].flags
    found: List[Tuple[str, str]] = []
    if awaited is not None:
        values = ("simple", "extended", "json") if awaited.names[0] == "output" else ()
        found = [(value, "") for value in values]
    elif current.startswith("-"):
        found = [(_dashed(flag.names[0]), flag.help) for flag in flags]
    elif not name:
        group = rest[0] if rest and rest[0] in _GROUPS else ""
        found = _command_names(group) if group or not rest else []
    elif name == "completion":
        found = [(shell, "") for shell in _COMPLETIONS]
    elif not args and re.search(r"[<[]key[]>]", _COMMANDS[name].usage):
        found = _keys_like(settings, current)
    return [pair for pair in found if pair[0].startswith(current)]


def _scan(
    words: Sequence[str], flags: Sequence[_Flag], *, mixed: bool,
) -> Tuple[_Options, List[str], Optional[_Flag]]:
    """Return options, arguments, and the flag whose value is to come, if words end with one."""
    for flag in flags:
        if flag.kind is not bool and words and words[-1].lstrip("-") in flag.names:
            with contextlib.suppress(_MisuseError, _ExitError):
                options, rest = _parse_flags(words[:-1], flags, mixed=mixed)
                if mixed or not rest:
                    return options, rest, flag
    try:
        return (*_parse_flags(words, flags, mixed=mixed), None)
    except (_MisuseError, _ExitError):
        return _Options(), [], None


def _keys_like(settings: _Options, current: str) -> List[Tuple[str, str]]:
    """Return the keys in the directory that `current` names so far; none if nobody answers."""
    directory = current.rpartition("/")[0]
    user = settings.text("username", "ETCDCTL_USERNAME")
    if user and ":" not in user and not os.environ.get("ETCDCTL_PASSWORD"):
        return []                                   # no questions while somebody types
    try:
        with _given_client(settings, _Access.from_settings(settings)) as client:
            nodes = client.get(directory, sorted=True).node.nodes
    except (EtcdError, _ExitError):
        return []
    slash = "/" if current.startswith("/") or not current else ""
    keys = (slash + node.key.lstrip("/") for node in nodes)
    return [(key + "/" if node.dir else key, "") for key, node in zip(keys, nodes)]


if __name__ == "__main__":
    _exit()
