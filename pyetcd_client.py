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
never made, or if it is a read.  If the fate of a write is unknown (its reply was lost, late or
malformed, or the server gave up on it) the error has `maybe_applied=True`, and the client does not
repeat the write: only the program can decide whether it may be applied twice.

`python -m pyetcd_client` is a command line: etcdctl 2.3, and export, mirror, top and others.

Rooms and their modules, bottom up; each uses only names defined above it:

  transport: defaults, errors, results, connections, endpoints, calls
  client:    users, verbs, watching, client
  recipes:   basics, leases, barriers, locks, elections, copies, queues, services
  ctl:       output, program, etcdctl, machines, transfer, more

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
import functools
import getpass
import http
import http.client
import importlib
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import (
    AsyncIterator,
    Container,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from dataclasses import dataclass, field, replace
from pathlib import Path
from re import Match
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from requests.utils import DEFAULT_CA_BUNDLE_PATH, select_proxy
from types import MappingProxyType
from typing import (
    Any,
    Callable,
    ClassVar,
    Generic,
    NamedTuple,
    NoReturn,
    Optional,
    TYPE_CHECKING,
    TypeVar,
    Union,
    cast,
    overload,
)
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urljoin, urlsplit
from urllib3 import PoolManager, ProxyManager
from urllib3.connection import HTTPConnection, HTTPSConnection
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
# transport/defaults -- The version, the log, and limits that several modules know.
# ============================================================================


__version__ = "0.5.0"

TRY_S = 1.5                     # for the requests of a call that must not wait (timeout=0)
WAIT_MAX_S = 1e6                # stands for "no limit"; sockets accept no more than 24 days

_log = logging.getLogger("pyetcd_client")


# ============================================================================
# transport/errors -- Errors: a class for each error code that programs handle, and those of the transport.
# ============================================================================


_CODES_BY_STATUS = {401: 110, 404: 100}         # the members and auth APIs send no code


class EtcdError(Exception):
    """Root of all errors about a server or the connection to it.

    message        description without the endpoint
    payload        JSON of the error reply and its HTTP `status`; {} without a reply
    code           etcd's error code; 0 without a code or without a reply
    index          etcd index at the time of the error
    status         HTTP status; 0 without a reply
    endpoint       base URL of the server
    maybe_applied  True if the request was a write that was, or may yet be, applied
    """

    code = 0
    error_exceptions: "ClassVar[dict[int, type[EtcdError]]]" = {}     # by code; programs may add

    def __init_subclass__(cls, code: int = 0) -> None:
        if code:
            cls.code = code
            cls.error_exceptions[code] = cls

    def __init__(self, message: "str | None" = "", payload: "Mapping[str, Any] | None" = None,
                 cause: Any = "", *, code: "int | None" = None, index: int = 0, status: int = 0,
                 endpoint: str = "", maybe_applied: bool = False) -> None:
        super().__init__(message or "")
        self.message = message or ""
        self.payload: dict[str, Any] = dict(payload or {})
        self.code = self.code if code is None else code
        self.index = index
        self.status = status
        self.endpoint = endpoint
        self.maybe_applied = maybe_applied
        self.others: tuple[EtcdError, ...] = ()     # of the endpoints tried after this one
        self._cause = cause

    @property
    def cause(self) -> Any:
        """etcd's cause, usually the key; without a reply, the underlying exception."""
        return self._cause or self.__cause__ or ""

    @cause.setter
    def cause(self, cause: Any) -> None:
        self._cause = cause

    @property
    def failures(self) -> "tuple[EtcdError, ...]":
        """One error for each endpoint that was tried, in order; the first is this one."""
        return (self, *self.others)

    @classmethod
    def from_payload(cls, payload: "Mapping[str, Any]", *, endpoint: str = "",
                     maybe_applied: bool = False) -> "EtcdError":
        """Return the error for the JSON of an error reply and its HTTP `status`.

        Only the keys API sends a code.  Without one the status decides: 401 is Unauthorized, 404
        KeyNotFound, all others HttpError.
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
    def handle(cls, payload: "Mapping[str, Any]") -> NoReturn:
        """Raise the error for the JSON of an error reply."""
        raise cls.from_payload(payload)

    def describe(self) -> str:
        """Return this error as one line, without those of other endpoints."""
        return f"{self.endpoint}: {self.message}" if self.endpoint else self.message

    def __str__(self) -> str:
        text = "; ".join(error.describe() for error in self.failures)
        return f"{text} (the write may have been applied)" if self.maybe_applied else text


class ApiError(EtcdError):
    """An error reply of the keys API; also the class for codes that have none of their own."""

    def describe(self) -> str:
        """Return code, message, cause and index in the form of etcdctl."""
        if not self._cause and not self.index:      # of the members or auth API, or of the client
            return super().describe()
        return f"{self.code}: {self.message} ({self.cause}) [{self.index}]"


class EtcdKeyError(ApiError):
    """The tree does not allow the operation: the key is missing, or is of the wrong kind."""


class EtcdValueError(ApiError, ValueError):
    """An argument is invalid (raised before anything is sent), or a comparison failed.

    Also the class for the codes 200 and 204 to 208, malformed fields; `code` tells them apart.
    """


EtcdError.error_exceptions.update(dict.fromkeys((200, *range(204, 209)), EtcdValueError))


class KeyNotFound(EtcdKeyError, KeyError, code=100):
    """A path component is missing (the cause is its path), or a user, role or member."""


class CompareFailed(EtcdValueError, code=101):
    """prev_value or prev_index does not match; the cause shows the given and the stored value."""


class NotFile(EtcdKeyError, code=102):
    """The key is a directory; the operation needs a file."""


class NotDir(EtcdKeyError, code=104):
    """A path component is a file; the operation needs a directory."""


class NodeExists(EtcdKeyError, code=105):
    """create or mkdir found the key."""


class RootReadOnly(EtcdKeyError, code=107):
    """The root cannot be changed."""


class DirNotEmpty(EtcdValueError, code=108):
    """Deleting a directory with children, hidden ones included, needs recursive=True."""


class Unauthorized(ApiError, code=110):
    """Auth is enabled and the user lacks the right, or user and password are wrong."""


class PrevValueRequired(EtcdValueError, code=201):
    """prev_value is empty."""


class TtlNotANumber(EtcdValueError, code=202):
    """ttl is not an unsigned integer."""


class IndexNotANumber(EtcdValueError, code=203):
    """prev_index or index is not an unsigned integer."""


class InvalidField(EtcdValueError, code=209):
    """A boolean parameter has another value, or does not fit the method."""


class InvalidForm(EtcdValueError, code=210):
    """The query or the body cannot be parsed, or is too large (10 MiB)."""


class RefreshValue(EtcdValueError, code=211):
    """A refresh must not have a value."""


class RefreshTtlRequired(EtcdValueError, code=212):
    """A refresh needs a ttl."""


class RaftInternal(ApiError, code=300):
    """The request found no consensus in time; a write may be applied later."""


class LeaderElectionInProgress(ApiError, code=301):
    """The cluster has no leader at the moment."""


class WatcherCleared(ApiError, code=400):
    """The member restored a snapshot and dropped its watchers."""


class EventIndexCleared(ApiError, code=401):
    """The index to watch from is older than the event history (1000 events)."""


class HttpError(EtcdError):
    """An error reply outside the keys API: of members, health, or a proxy in between."""


class TransportError(EtcdError):
    """There was no usable reply."""


class ConnectionFailed(TransportError):
    """The connection could not be made, broke, or brought no reply.

    For a write, maybe_applied=False means that the request was not sent.
    """


class RequestTimeout(ConnectionFailed):
    """The server did not reply in time."""


class WatchTimeout(RequestTimeout):
    """No event arrived in time; the next watch must begin at `index` to miss none."""


class BadReply(TransportError):
    """The reply is not etcd's: malformed, truncated, or an endless redirect."""


class ClusterIdChanged(TransportError):
    """The reply comes from another cluster than earlier ones.

    A write was applied there.  Set `client.cluster_id = None` to accept the next cluster.
    """


class Cancelled(EtcdError):
    """The Scope was cancelled, or the client closed; maybe_applied: a write had been sent."""


class LockExpired(EtcdError):
    """The entry of a lock disappeared while its owner waited for the lock or held it."""


# The names of python-etcd.
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
# transport/results -- Results: frozen values, or the error, made from the JSON of a reply.
# ----------------------------------------------------------------------------
# Names are the JSON keys in snake_case; `raw` is the JSON itself.
# ============================================================================


_T = TypeVar("_T")


class _Reply(NamedTuple):
    """One complete HTTP reply; the result of `Client.api_execute`."""

    status: int
    headers: "Mapping[str, str]"      # by case-insensitive name
    body: bytes

    @property
    def data(self) -> bytes:
        """The body; this and the next two are python-etcd's names."""
        return self.body

    def getheader(self, name: str, default: "str | None" = None) -> "str | None":
        return self.headers.get(name, default)

    def getheaders(self) -> "Mapping[str, str]":
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
    value: "str | None" = None
    dir: bool = False
    ttl: "int | None" = None
    expiration: "str | None" = None
    modified_index: int = 0
    created_index: int = 0
    nodes: "tuple[Node, ...]" = field(default_factory=tuple)
    raw: "Mapping[str, Any]" = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_json(cls, raw: "Mapping[str, Any]") -> "Node":
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

    def walk(self) -> "Iterator[Node]":
        """Yield every node below this one, parents before their children."""
        for child in self.nodes:
            yield child
            yield from child.walk()


class _Forwarded:
    """An attribute of a result that reads another one, until a value is assigned to it."""

    def __init__(self, path: str) -> None:
        self._find = operator.attrgetter(path)

    def __get__(self, result: "EtcdResult | None", _: object = None) -> Any:
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
    prev_node: "Node | None" = None
    new_key: bool = False
    etcd_index: int = 0
    raft_index: int = 0
    raft_term: int = 0
    relisted: bool = False
    raw: "Mapping[str, Any]" = MappingProxyType({})
    value: "str | None"
    ttl: "int | None"
    key: str = _forward("node.key")
    dir: bool = _forward("node.dir")
    expiration: "str | None" = _forward("node.expiration")
    modified_index: int = _forward("node.modified_index")
    created_index: int = _forward("node.created_index")
    nodes: "tuple[Node, ...]" = _forward("node.nodes")
    modifiedIndex: int = _forward("modified_index")
    createdIndex: int = _forward("created_index")
    newKey: bool = _forward("new_key")
    _node_props: "ClassVar[dict[str, Any]]" = {    # compared by ==, as in python-etcd
        "key": None, "value": None, "expiration": None, "ttl": None, "modifiedIndex": None,
        "createdIndex": None, "newKey": False, "dir": False}

    def __init__(self, action: "str | None" = None, node: "Node | Mapping[str, Any] | None" = None,
                 prevNode: "Node | Mapping[str, Any] | None" = None, *, new_key: bool = False,
                 etcd_index: int = 0, raft_index: int = 0, raft_term: int = 0,
                 relisted: bool = False, raw: "Mapping[str, Any] | None" = None) -> None:
        present = _as_node(node or {})
        self.__dict__.update(
            action=action or "", node=present,
            prev_node=None if prevNode is None else _as_node(prevNode),
            new_key=new_key or bool(present.raw.get("newKey")), etcd_index=etcd_index,
            raft_index=raft_index, raft_term=raft_term, relisted=relisted,
            raw=raw or {}, value=present.value, ttl=present.ttl)

    @property
    def _prev_node(self) -> "EtcdResult | None":
        return None if self.prev_node is None else EtcdResult(node=self.prev_node)

    def get_subtree(self, leaves_only: bool = False) -> "Iterator[EtcdResult]":
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
    def leaves(self) -> "Iterator[EtcdResult]":
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


def _as_node(node: "Node | Mapping[str, Any]") -> Node:
    return node if isinstance(node, Node) else Node.from_json(node)


@dataclass(frozen=True)
class Member:
    """A server of the cluster; `name` and `client_urls` are empty until it has started."""

    id: str
    name: str
    peer_urls: "tuple[str, ...]"
    client_urls: "tuple[str, ...]"
    raw: "Mapping[str, Any]" = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_json(cls, raw: "Mapping[str, Any]") -> "Member":
        return cls(raw["id"], raw["name"], tuple(raw.get("peerURLs") or ()),
                   tuple(raw.get("clientURLs") or ()), raw)


def _expect_object(payload: Any) -> "dict[str, Any]":
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


def _parse_object(reply: _Reply) -> "dict[str, Any]":
    return _expect_object(reply.json())


def _parse_members(reply: _Reply) -> "list[Member]":
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


# ============================================================================
# transport/connections -- Connections: exchanges over http.client and urllib3, scopes, and the state of the client.
# ----------------------------------------------------------------------------
# Converts the exceptions of urllib3 and http.client into the errors of the client.
# ============================================================================


IDLE_CLOSE_S = 3.0              # a connection that was idle for longer is replaced
READ_BUFFER_BYTES = 16384       # read from a socket at once
HEADER_BYTES_MAX = 65536        # of one header; a longer one breaks the connection
HEADERS_MAX = 100               # of one reply; more break the connection

# -- scopes: one deadline and one way to cancel, for all waits


class _ThreadContext(threading.local):
    scope: "Scope | None" = None                      # the innermost scope that the thread entered
    exchange: "_Exchange"                             # the request that it performs


_context = _ThreadContext()


class Scope:
    """A time limit for all waits below it, and a way to cancel them from another thread.

        with Scope(timeout=5) as scope:
            client.get("a")
            lock.acquire()

    Every wait of the thread that entered the scope ends at its deadline: requests, retries,
    watches and recipes.  After `cancel` these and all later waits raise Cancelled within
    milliseconds.  Scopes nest: the earliest deadline counts, and `cancel` reaches inner scopes.

    timeout    seconds from now; None: no limit of its own; 0: each call tries once and waits for
               nothing but the reply, TRY_S at most
    within     other scopes that cancel this one while it is entered, such as `client.scope`
    deadline   monotonic seconds
    once       True if calls must not wait: this scope or an outer one has timeout=0
    cancelled  True after `cancel`

    Threads do not inherit a scope: the background work of a recipe has scopes of its own.
    Thread: one enters the scope, once; any thread may cancel it, at any time.  There is no lock:
    each side writes first (`cancelled`, or its waker) and then reads the other's.
    """

    __slots__ = ("deadline", "once", "cancelled", "_within", "_wakers", "_outer")

    def __init__(self, timeout: "float | None" = None, *within: "Scope") -> None:
        if timeout is not None and not timeout >= 0:
            raise EtcdValueError(f"a timeout is seconds, None for no limit, not {timeout}")
        self.once = timeout == 0
        limit_s = math.inf if timeout is None else timeout or TRY_S
        self.deadline = time.monotonic() + limit_s
        self.cancelled = False
        self._within = within
        # By process: a forked child must not wake the parent's, which would close its sockets.
        self._wakers: dict[Callable[[], object], int] = {}
        self._outer: Scope | None = None

    def cancel(self) -> None:
        """End every wait below with Cancelled, now and from now on."""
        self.cancelled = True
        for wake, pid in list(self._wakers.items()):
            if pid == os.getpid():
                wake()

    def left_s(self, longest_s: float = WAIT_MAX_S) -> float:
        """Return the seconds left for a wait, 0 after the deadline.  Raises Cancelled."""
        if self.cancelled:
            raise Cancelled("cancelled")
        return max(0.0, min(longest_s, self.deadline - time.monotonic()))

    def wait(self, wait_s: float) -> bool:
        """Sleep; return whether time is left afterwards.  Raises Cancelled."""
        woken = threading.Event()
        self.attach(woken.set)
        try:
            woken.wait(self.left_s(wait_s))
        finally:
            self.detach(woken.set)
        return self.left_s() > 0

    @property
    def calls(self) -> int:
        """The number of waits and scopes directly below this one."""
        return len(self._wakers)

    def attach(self, wake: Callable[[], object]) -> None:
        """Have `cancel` call `wake`, perhaps twice; at once if the scope is cancelled already."""
        self._wakers[wake] = os.getpid()
        if self.cancelled:
            wake()

    def detach(self, wake: Callable[[], object]) -> None:
        """Undo `attach`."""
        self._wakers.pop(wake, None)

    def __enter__(self) -> "Scope":
        self._outer = _context.scope
        if self._outer is not None:
            self._within = (*self._within, self._outer)
        for scope in self._within:
            self.deadline = min(self.deadline, scope.deadline)
            self.once = self.once or scope.once
            scope.attach(self.cancel)
        _context.scope = self
        return self

    def __exit__(self, *_: object) -> None:
        _context.scope = self._outer
        for scope in self._within:
            scope.detach(self.cancel)


class _Closeable:
    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self: "_CloseableType") -> "_CloseableType":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_CloseableType = TypeVar("_CloseableType", bound=_Closeable)


def _start_thread(name: str, function: Callable[[], _T]) -> "concurrent.futures.Future[_T]":
    """Call `function` on a daemon thread, which does not delay the end of the program."""
    outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:              # raised by the owner of the future
            outcome.set_exception(error)
    threading.Thread(target=run, name=name, daemon=True).start()
    return outcome


def _call_on_thread(name: str, function: Callable[[], _T], left_s: Callable[[], float]) -> _T:
    """Return the result of `function`, which cannot be interrupted, such as a name lookup.

    After a cancellation or `left_s()` seconds, `left_s` raises and the thread is abandoned.
    """
    woken, scope = threading.Event(), _context.scope or Scope()
    scope.attach(woken.set)
    try:
        outcome = _start_thread(name, function)
        outcome.add_done_callback(lambda _: woken.set())
        woken.wait(left_s())
        left_s()
        return outcome.result(0)
    finally:
        scope.detach(woken.set)


# -- exchanges: urllib3 sets up TLS and proxies, http.client sends and receives


class _Exchange:
    """One request and its reply: time limits, progress, and cancellation.

    deadline    monotonic seconds, for the whole exchange, however slowly the reply arrives
    silence_s   longest wait for the next bytes
    connect_s   longest wait for one address of the server
    on_silence  called after `silence_s`; returns whether to continue waiting

    Thread: the one that performs it, except for `cancel`.
    """

    def __init__(self, deadline: float, silence_s: float, connect_s: float,
                 on_silence: "Callable[[], bool] | None" = None) -> None:
        self.deadline = deadline
        self.silence_s = silence_s
        self.connect_s = connect_s
        self.on_silence = on_silence
        self.sent = False                           # a byte of the request may have arrived
        self.cancelled = False
        self._sock: socket.socket | None = None  # the socket that the thread may wait for
        self._spare: socket.socket | None = None     # a duplicate of it, closed by `done`
        self._lock = threading.Lock()               # guards _sock; a leaf

    def left_s(self) -> float:
        """Return how long the next wait may be.  Raises OSError if there must be none."""
        if self.cancelled:
            raise ConnectionAbortedError("cancelled")
        left_s = min(self.silence_s, self.deadline - time.monotonic(), WAIT_MAX_S)
        if left_s <= 0:
            raise socket.timeout("timed out")
        return left_s

    def keeps_waiting(self) -> bool:
        if self.on_silence is None or time.monotonic() >= self.deadline:
            return False
        waits = self.on_silence()
        _context.exchange = self                    # on_silence may have performed another one
        return waits

    def use(self, sock: socket.socket, limit_s: float = math.inf) -> None:
        self._sock = sock                           # before `cancelled` is read
        sock.settimeout(min(limit_s, self.left_s()))

    def connect(self, host: str, port: int) -> socket.socket:
        """Return a connection to the first address of `host` that accepts one.  Raises OSError."""
        failure = OSError(f"{host} has no address")
        for family, kind, protocol, _, address in self._addresses(host, port):
            sock = socket.socket(family, kind, protocol)
            try:
                self.use(sock, self.connect_s)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect(address)
                self.use(sock, self.connect_s)      # the rest is for the handshake
                return sock
            except OSError as error:
                sock.close()
                failure = error
        raise failure

    def _addresses(self, host: str, port: int) -> "Sequence[tuple[Any, ...]]":
        with contextlib.suppress(socket.gaierror):
            return socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return _call_on_thread(f"pyetcd-lookup {host}", lambda: socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM), self.left_s)

    def guard(self, sock: socket.socket) -> None:
        """Let `cancel` end the TLS handshake, during which the library owns `sock`."""
        self._sock = self._spare = sock.dup()

    def done(self) -> None:
        """Release the socket: from here on `cancel` has no effect."""
        with self._lock:
            self._sock = None
        if self._spare is not None:
            self._spare.close()

    def cancel(self) -> None:
        """End the exchange at once, with an error in the thread that performs it."""
        self.cancelled = True                       # before `_sock` is read
        with self._lock, contextlib.suppress(OSError):
            if self._sock is not None:
                # Not SSLSocket.shutdown, which would free the TLS state that the reader uses.
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)


class _TimedReader(io.RawIOBase):
    """The receiving side of a socket; no wait outlasts the exchange of the thread."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)    # keeps the socket open for this reader

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, READ_BUFFER_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> "int | None":
        exchange = _context.exchange
        while True:
            self._sock.settimeout(exchange.left_s())
            try:
                return self._sock.recv_into(buffer)
            except socket.timeout:
                if not exchange.keeps_waiting():
                    raise

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Headers(dict[str, str]):
    """The headers of a reply by case-insensitive name; the first of equal names counts."""

    def __init__(self, lines: "Iterable[bytes]" = ()) -> None:
        super().__init__()
        self._lower: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.decode("latin-1").partition(":")
            if colon and name[0:1] not in " \t":    # continuation lines are skipped
                value = value.strip()
                self.setdefault(name, value)
                self._lower.setdefault(name.rstrip().lower(), value)

    def __getitem__(self, name: str) -> str:
        return self._lower[name.lower()]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._lower

    def get(self, name: str, default: Any = None) -> Any:
        return self._lower.get(name.lower(), default)


class _TimedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(cast(socket.socket, _TimedReader(sock)), *args, **kwargs)

    def begin(self, **_: Any) -> None:
        """Read the head; http.client's parser, made for mail, takes five times as long."""
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

    def _read_head(self) -> _Headers:
        lines: list[bytes] = []
        for line in iter(lambda: self.fp.readline(HEADER_BYTES_MAX + 1), b""):
            if line in (b"\r\n", b"\n"):
                break
            lines.append(line)
            if len(line) > HEADER_BYTES_MAX or len(lines) > HEADERS_MAX:
                raise http.client.HTTPException("a head without an end")
        return _Headers(lines)


class _HttpConnection(HTTPConnection):
    """A connection that respects the limits of the exchange that uses it."""

    response_class = _TimedResponse                 # of a proxy's reply to CONNECT

    def _new_conn(self) -> socket.socket:
        return _context.exchange.connect(self.host, self.port or self.default_port)

    def connect(self) -> None:
        try:
            super().connect()
        except ValueError as error:                 # urllib3 1.26: certificate of another host
            raise ssl.SSLCertVerificationError(str(error)) from error
        finally:
            _context.exchange.sent = False          # bytes for a proxy are not the request

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        exchange = _context.exchange
        exchange.use(self.sock)
        exchange.sent = True
        super().send(data)


class _HttpsConnection(_HttpConnection, HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        sock = super()._new_conn()
        _context.exchange.guard(sock)               # for the handshake
        return sock


class _ConnectionSettings(NamedTuple):
    """TLS and proxy settings of a client, in the forms that requests takes."""

    verify: "bool | str" = True                 # or the path of a file or directory
    cert: "None | str | tuple[str, str]" = None
    proxies: "Mapping[str, str]" = MappingProxyType({})

    def tls_options(self) -> "dict[str, Any]":
        """Return the options of a pool manager.  Raises OSError for a file that is missing."""
        authorities = DEFAULT_CA_BUNDLE_PATH if self.verify is True else self.verify or None
        cert, key = self.cert if isinstance(self.cert, tuple) else (self.cert, None)
        for path in filter(None, (authorities, cert, key)):
            if not os.path.exists(path):
                raise FileNotFoundError(f"there is no file {path}")
        directory = authorities is not None and os.path.isdir(authorities)
        return {"cert_reqs": "CERT_REQUIRED" if self.verify else "CERT_NONE",
                "ca_cert_dir" if directory else "ca_certs": authorities,
                "cert_file": cert, "key_file": key}


class _Route(NamedTuple):
    """A connection to one endpoint, opened on use, and the form of requests on it."""

    connection: HTTPConnection
    host: str
    prefix: str = ""                                # of targets: a forwarding proxy needs URLs
    headers: "Mapping[str, str]" = MappingProxyType({})   # for a forwarding proxy
    open_tunnel: "Callable[[HTTPConnection], None] | None" = None

    @classmethod
    def to(cls, endpoint: str, settings: _ConnectionSettings) -> "_Route":
        proxy = select_proxy(endpoint, dict(settings.proxies))
        tls = settings.tls_options() if "https:" in (endpoint[:6], (proxy or "")[:6]) else {}
        manager = PoolManager(**tls) if proxy is None else ProxyManager(
            proxy, proxy_headers=HTTPAdapter().proxy_headers(proxy), **tls)
        pool = cast(Any, manager.connection_from_url(endpoint))
        pool.ConnectionCls = _HttpsConnection if pool.scheme == "https" else _HttpConnection
        host = endpoint.partition("//")[2].rpartition("@")[2]
        host = host if host.isascii() else host.encode("idna").decode()
        connection = cast(HTTPConnection, pool._new_conn())
        if proxy is None:
            return cls(connection, host)
        if endpoint.startswith("https:"):
            return cls(connection, host, open_tunnel=pool._prepare_proxy)
        return cls(connection, host, endpoint, pool.proxy_headers)

    def request(self, method: str, target: str, form: "bytes | None",
                headers: "Mapping[str, str]") -> bytes:
        """Return the bytes of a request, in 2 us and for one send; http.client: 17 us, two."""
        if " " in target or not target.isprintable():   # from a redirect
            raise http.client.InvalidURL(f"{target!r} is not percent-encoded")
        lines = [f"{method} {self.prefix}{target} HTTP/1.1", f"Host: {self.host}",
                 "Accept-Encoding: identity",
                 *(f"{name}: {value}" for name, value in {**headers, **self.headers}.items())]
        if form is not None:
            lines.append(f"Content-Length: {len(form)}")
        return "\r\n".join([*lines, "\r\n"]).encode("ascii") + (form or b"")

    def prepare(self) -> None:
        if self.connection.sock is not None and is_connection_dropped(self.connection):
            self.connection.close()
        if self.connection.sock is None and self.open_tunnel is not None:
            self.open_tunnel(self.connection)


class _Connections:
    """A keep-alive connection to each endpoint, for one exchange at a time.

    Replaces requests.Session and urllib3's urlopen: their merging of settings, retries and
    wrapping of replies take longer than etcd's reply.
    """

    def __init__(self, settings: _ConnectionSettings) -> None:
        self.pid = os.getpid()                      # a forked child must not use these sockets
        self._settings = settings
        self._routes: dict[str, _Route] = {}
        self.used_at = time.monotonic()

    def perform(self, exchange: _Exchange, endpoint: str, method: str, target: str,
                form: "bytes | None", headers: "Mapping[str, str]",
                on_head: "Callable[[_Reply], None] | None") -> _Reply:
        """Send a request and read the reply.  Raises OSError, HTTPException or urllib3's errors.

        A server or a load balancer may close an idle connection while the request is on its way.
        The request was probably not executed, but the client cannot know: a write raises an error
        with maybe_applied=True.  To make this rare, a connection that was idle for IDLE_CLOSE_S,
        below the usual idle limits (5 s and more), is replaced.  The price is one round trip.
        """
        if time.monotonic() - self.used_at > IDLE_CLOSE_S:
            self.close()
        route = self._routes.get(endpoint)
        if route is None:
            route = self._routes[endpoint] = _Route.to(endpoint, self._settings)
        _context.exchange = exchange
        connection, body, response = route.connection, None, None
        try:
            route.prepare()
            connection.send(route.request(method, target, form, headers))
            response = _TimedResponse(connection.sock, method=method)
            response.begin()
            known = cast(Mapping[str, str], response.headers)
            if on_head is not None and response.status == 200:
                on_head(_Reply(response.status, known, b""))
                _context.exchange = exchange        # a listener may have made a call
            body = response.read()
            return _Reply(response.status, known, body)
        finally:
            if response is not None and body is None:
                response.close()
            if response is None or body is None or response.will_close:
                connection.close()                  # the rest of this reply must not be the next

    def close(self) -> None:
        while self._routes:
            self._routes.popitem()[1].connection.close()


def _close_all(idle: "deque[_Connections]") -> None:
    """Close the idle connections; the others are closed or returned by their calls."""
    while idle:
        with contextlib.suppress(IndexError):       # another thread took it
            idle.pop().close()


# -- errors


def _reason(error: BaseException) -> str:
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


def _transport_error(error: Exception, endpoint: str, exchange: _Exchange, *,
                     write: bool) -> EtcdError:
    timed_out = isinstance(error, (socket.timeout, TimeoutError))
    if exchange.cancelled:
        return Cancelled("cancelled", endpoint=endpoint, maybe_applied=write and exchange.sent)
    if not exchange.sent:                           # and so not applied: refused, unreachable,
        reason = "connect timed out" if timed_out else _reason(error)   # untrusted, unknown name
        return ConnectionFailed(reason, endpoint=endpoint)
    if timed_out:
        return RequestTimeout("no answer in time", endpoint=endpoint, maybe_applied=write)
    return ConnectionFailed(_reason(error), endpoint=endpoint, maybe_applied=write)


# -- connection states


class ConnectionState(enum.Enum):
    """The outcome of the last calls and watches of a client, in kazoo's terms.

    CONNECTED  a server replied
    SUSPENDED  no endpoint replied to the last call; known values may have changed meanwhile
    LOST       SUSPENDED for `session_timeout` seconds, or no server ever replied
    """

    CONNECTED = "CONNECTED"
    SUSPENDED = "SUSPENDED"
    LOST = "LOST"


_Listener = Callable[[ConnectionState], object]


def _call_back(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of the program and log its exception: the caller is not at fault."""
    try:
        return function(*args)
    except Exception:
        _log.exception("%r failed", function)
        return None


class _Connectivity:
    """The connection state of a client; a timer changes SUSPENDED to LOST.  Thread: any."""

    def __init__(self, session_timeout_s: float) -> None:
        self.state = ConnectionState.LOST
        self.listeners: tuple[_Listener, ...] = ()
        self._session_timeout_s = session_timeout_s
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()               # guards the next three, and `state`
        self._changes: deque[ConnectionState] = deque()     # not reported to listeners yet
        self._reporting = False                     # a thread reports them, in order
        self._timer: threading.Timer | None = None

    def report(self, answered: bool) -> None:
        if answered == (self.state is ConnectionState.CONNECTED):
            return
        if self._pid != os.getpid():                # a forked child has no timer, and perhaps
            self._reset()                           # a lock that is never released
        if answered:
            self._move(ConnectionState.CONNECTED, ConnectionState.SUSPENDED, ConnectionState.LOST)
        else:
            self._move(ConnectionState.SUSPENDED, ConnectionState.CONNECTED)

    def close(self) -> None:
        timer = self._timer
        if timer is not None:
            timer.cancel()

    def _move(self, state: ConnectionState, *origins: ConnectionState) -> None:
        with self._lock:
            if self.state not in origins:           # another thread was first
                return
            self.state = state
            self._changes.append(state)
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if state is ConnectionState.SUSPENDED:
                self._timer = threading.Timer(self._session_timeout_s, self._move, (
                    ConnectionState.LOST, ConnectionState.SUSPENDED))
                self._timer.daemon = True
                self._timer.start()
        self._call_listeners()

    def _call_listeners(self) -> None:
        """Call the listeners, without the lock; each sees all changes in order."""
        while True:
            with self._lock:
                if self._reporting or not self._changes:
                    return
                self._reporting, state = True, self._changes.popleft()
            try:
                for listener in self.listeners:
                    if _call_back(listener, state) is True:     # as in kazoo: remove me
                        self.remove(listener)
            finally:
                with self._lock:
                    self._reporting = False

    def add(self, listener: _Listener) -> None:
        self.listeners = (*self.listeners, listener)

    def remove(self, listener: _Listener) -> None:
        self.listeners = tuple(known for known in self.listeners if known != listener)


# ============================================================================
# transport/endpoints -- Endpoints: addresses of servers, and their discovery by SRV records.
# ============================================================================


_Address = Union[str, tuple[str, int]]              # a URL, host, host:port, or (host, port)


def _base_url(text: str, protocol: str = "http") -> str:
    """Return `text` as scheme://host:port.  Raises ValueError if it does not name a server."""
    url = text.strip()
    if url.count(":") > 1 and not {"[", "/"}.intersection(url):     # a bare IPv6 address
        url = f"[{url}]"
    url = url if "://" in url else f"{protocol}://{url}"
    try:
        parts = urlsplit(url)
        valid = parts.port != 0 and not parts.netloc.endswith(":")
        if "[" in parts.netloc:         # urlsplit looks into brackets since 3.11.4, never around
            ipaddress.IPv6Address(re.sub(r"^\[([^]]*)\](:\d+)?$", r"\1", parts.netloc))
    except ValueError:                  # not a number, above 65535, or not an IPv6 address
        parts, valid = urlsplit(""), False
    if (parts.scheme not in ("http", "https") or not valid
            or not re.fullmatch(r"[^\s\"'{}<>$]+", parts.hostname or "")):
        raise ValueError(f"endpoint {text!r} is not http://HOST:PORT or https://HOST:PORT"
                         f"{_endpoint_advice(text)}")
    if parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"endpoint {text!r} has more than a scheme, a host and a port")
    return f"{parts.scheme}://{parts.netloc}"


def _endpoint_advice(text: str) -> str:
    if not text.strip():
        return "; it is empty, or there is a comma too many"
    if re.search(r"[\"'\u2018-\u201f]", text):
        return "; the quotes are part of it: write it without them"
    if re.search(r"[${}<>]", text):
        return "; a variable or placeholder was not filled in"
    if " " in text.strip():
        return "; separate endpoints by commas"
    bare = text.count(":") > 2 and "[" not in text
    return "; an IPv6 address needs brackets: http://[::1]:2379" if bare else ""


def _listed_urls(host: "_Address | Sequence[_Address]", port: int, protocol: str) -> "list[str]":
    """Return the URLs of the servers in `host`; `port` is the default port."""
    urls: list[str] = []
    alone = isinstance(host, str) or (len(host) == 2 and isinstance(host[1], int))
    for item in cast(Sequence[_Address], [host] if alone else host):
        if isinstance(item, str):
            for part in item.split(","):
                url = _base_url(part, protocol)
                urls.append(url if urlsplit(url).port is not None else _base_url(f"{url}:{port}"))
        else:
            name, number = item
            address = f"[{name}]:{number}" if ":" in name else f"{name}:{number}"
            urls.append(_base_url(address, protocol))
    return urls


class Endpoints:
    """The servers of a client: one is used until it fails, then the next in turn.

    given    from the constructor or DNS; permanent
    urls     `given`, then the URLs learned from the member list
    current  the URL in use; "" before the first DNS lookup

    Thread: any.  There is no lock: threads that fail at the same time may at worst skip an
    endpoint, which is tried again in the next round.
    """

    def __init__(self, urls: "Iterable[str] | None" = None) -> None:
        self.given: tuple[str, ...] = ()
        self.urls: tuple[str, ...] = ()
        self.current = ""
        if urls is not None:
            self.give(urls)

    def give(self, urls: "Iterable[str]") -> None:
        """Replace the given URLs.  Raises ValueError for a malformed one, or for none."""
        listed = [urls] if isinstance(urls, str) else list(urls)
        cleaned = [_base_url(part) for url in listed for part in url.split(",")]
        if not cleaned:
            raise ValueError("at least one endpoint is needed")
        self.given = tuple(dict.fromkeys(cleaned))
        self.learn(())

    def learn(self, urls: "Iterable[str]") -> None:
        """Replace the URLs learned from the member list; the one in use stays in use.

        If all given URLs are https, others are ignored: passwords would travel in clear.
        """
        secure = bool(self.given) and all(url.startswith("https:") for url in self.given)
        learned = [url for url in urls if url.startswith("https:") or not secure]
        self.urls = urls = tuple(dict.fromkeys([*self.given, *learned]))
        if self.current not in urls and urls:
            self.current = urls[0]

    def candidates(self) -> "tuple[str, ...]":
        """Return every endpoint once, the one in use first."""
        urls, current = self.urls, self.current
        position = urls.index(current) if current in urls else 0
        return urls[position:] + urls[:position]

    def failed(self, url: str) -> None:
        """Switch to the next endpoint, unless another thread has done so."""
        urls = self.urls
        if url == self.current and url in urls:
            self.current = urls[(urls.index(url) + 1) % len(urls)]


# -- DNS: the standard library has no SRV lookup


def _lookup_srv(name: str, deadline: float) -> "list[str]":
    """Return host:port of the SRV records of `name` in the order of RFC 2782; [] if there is none.

    Raises OSError if no name server replies before `deadline` (monotonic seconds).
    """
    try:
        import dns.exception
        import dns.resolver
    except ImportError as error:
        raise OSError("SRV records need the package dnspython: pip install dnspython (or, from "
                      "Debian: apt install python3-dnspython)") from error

    def left_s() -> "float":
        wait_s = (_context.scope or Scope()).left_s(deadline - time.monotonic())
        if not wait_s:
            raise OSError(f"lookup of {name} failed: no answer in time")
        return wait_s

    lifetime_s = left_s()
    try:
        found = _call_on_thread(f"pyetcd-lookup {name}", lambda: dns.resolver.resolve(
            name, "SRV", lifetime=lifetime_s, search=False), left_s)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return []
    except dns.exception.DNSException as error:
        raise OSError(f"lookup of {name} failed: {error}") from error
    records: list[Any] = found.rrset.processing_order() if found.rrset else []
    return [f"{str(record.target).rstrip('.')}:{record.port}" for record in records]


def _discover(domain: str, protocol: str, deadline: float) -> "list[str]":
    """Return the URLs of the servers in the SRV records of `domain`.  Raises ConnectionFailed.

    _etcd-client-ssl._tcp (https), else _etcd-client._tcp (http), as in etcdctl 2.3; else
    _etcd._tcp (`protocol`), as in python-etcd.
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
# All I/O takes place in _Caller._exchange.
# ============================================================================


CONNECT_TIMEOUT_S = 2.0         # for each address of an endpoint; then the next endpoint is tried
READ_TIMEOUT_S = 60.0           # silence of a server
TOTAL_TIMEOUT_S = 30.0          # one call: all endpoints, attempts and parts of the reply
SESSION_TIMEOUT_S = 10.0        # without a reply, until the connection counts as lost
SYNC_INTERVAL_S = 60.0          # age at which the member list is read again
SYNC_TIMEOUT_S = 2.0            # for reading it; then the waiting call goes on without it
BACKOFF_MIN_S = 0.05            # wait after a round in which every endpoint failed; doubled,
BACKOFF_MAX_S = 1.0             # up to this
REDIRECTS_MAX = 5               # of one read; more raise BadReply

_SUCCESS: "frozenset[int]" = frozenset((200, 201, 204))
_FORM_TYPE = "application/x-www-form-urlencoded"
_JSON_TYPE = "application/json"
_REDIRECTS: "frozenset[int]" = frozenset((301, 302, 303, 307, 308))

_Field = Union[None, bool, int, str]                # a parameter; None is not sent


def clean_key(key: str) -> str:
    """Return the canonical form of `key`: one leading slash, no empty, `.` or `..` parts.

    The server answers other forms by a redirect; urllib3 would let `..` leave /v2/keys.
    """
    parts: list[str] = []
    for part in key.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


def _text(value: object) -> str:
    """Return the stored text of a value: text, UTF-8, a number, or an object with `__str__`.

    Raises EtcdValueError for a value that a read would not return as it was given.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError as error:
            raise EtcdValueError("etcd stores text, and these bytes are not UTF-8: store "
                                 "base64.b64encode(value).decode()") from error
    if isinstance(value, str):
        text = str.__str__(value)                   # the value of an Enum
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


def _encode_fields(fields: "Mapping[str, _Field]") -> str:
    return "&".join(
        f"{_quote_plus(name)}="
        f"{_quote_plus(str(value).lower() if isinstance(value, bool) else str(value))}"
        for name, value in fields.items() if value is not None)


def _target(path: str, query: "Mapping[str, _Field]") -> str:
    # Lone surrogates stand for bytes that are not UTF-8, as they come from sys.argv.
    path = path if _PLAIN(path) else quote(path, errors="surrogateescape")
    text = _encode_fields(query)
    return f"{path}?{text}" if text else path


@dataclass(frozen=True)
class _Call(Generic[_T]):
    """A request, independent of its endpoint."""

    method: str
    target: str                                     # path and query, percent-encoded
    parse: Callable[[_Reply], _T]
    form: "bytes | None" = None
    content_type: str = _FORM_TYPE
    timeout: "float | None" = None                 # seconds in all; None: the client's
    statuses: "frozenset[int]" = _SUCCESS             # that `parse` accepts
    on_head: "Callable[[_Reply], None] | None" = None  # called before a body that may take long
    waits: bool = False                             # a timeout means "no change", not a failure

    @property
    def write(self) -> bool:
        return self.method != "GET"


def is_endpoint_failure(error: EtcdError) -> bool:
    """Return whether another endpoint may succeed: not after a refusal, which is a reply."""
    if isinstance(error, TransportError):
        return not isinstance(error, ClusterIdChanged)
    return error.status >= 500


if TYPE_CHECKING:
    _Settings = ParamSpec("_Settings")
_ClientType = TypeVar("_ClientType")
_CallerType = TypeVar("_CallerType", bound="_Caller")
_USER_AGENT = f"pyetcd-client/{__version__}"
_PERMANENT = (ssl.SSLError, FileNotFoundError, PermissionError, UrllibError, http.client.InvalidURL)


def _is_permanent(error: EtcdError) -> bool:
    """Return whether a retry would fail in the same way: bad certificates, malformed replies."""
    closed = (ssl.SSLEOFError, ssl.SSLZeroReturnError)      # by a server that may be restarting
    return isinstance(error, BadReply) or (
        isinstance(error.__cause__, _PERMANENT) and not isinstance(error.__cause__, closed))


def _backoff_s(rounds: int) -> float:
    longest_s = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2 ** min(rounds - 1, 10))
    return float(longest_s * random.uniform(0.5, 1.0))


def _environment() -> "dict[str, Any]":
    """Return the settings in the ETCDCTL_* variables as arguments of Client."""
    given = {name: value for name, value in os.environ.items() if value}
    settings: dict[str, Any] = {}
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
) -> "Callable[[Callable[[type[_ClientType]], _ClientType]], Callable[Concatenate[type[_ClientType], _Settings], _ClientType]]":
    """Tell type checkers that a constructor takes the keyword arguments of another one."""
    return lambda function: cast(Any, function)


class _Caller(_Closeable):
    """Performs calls: endpoints, connections, retries.  The base of all parts of the client."""

    # Called with method, URL and form of each request before it is sent.
    on_request: "Callable[[str, str, bytes | None], object] | None" = None

    def __init__(self, host: "_Address | Sequence[_Address]" = "127.0.0.1", port: int = 2379,
                 srv_domain: "str | None" = None, version_prefix: str = "/v2",
                 read_timeout: float = READ_TIMEOUT_S, allow_redirect: bool = True,
                 protocol: str = "http", cert: "None | str | tuple[str, str]" = None,
                 ca_cert: "str | None" = None, username: "str | None" = None,
                 password: "str | None" = None, allow_reconnect: "bool | None" = None,
                 use_proxies: bool = False, expected_cluster_id: "str | None" = None,
                 per_host_pool_size: int = 10, lock_prefix: str = "/_locks", *,
                 endpoints: "Iterable[str] | None" = None, connect_timeout: float = CONNECT_TIMEOUT_S,
                 total_timeout: "float | None" = TOTAL_TIMEOUT_S,
                 session_timeout: float = SESSION_TIMEOUT_S, sync: bool = False, retry: bool = True,
                 verify: bool = True, proxies: "Mapping[str, str] | None" = None,
                 on_state: "_Listener | None" = None) -> None:
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
            self.endpoints = Endpoints()            # the first call looks them up
        self.version_prefix = version_prefix
        self.read_timeout = read_timeout
        self.connect_timeout = connect_timeout
        self.total_timeout = total_timeout
        self.allow_redirect = allow_redirect
        self.username, self.password = username, password
        self.lock_prefix = lock_prefix
        self.cluster_id = expected_cluster_id       # hex; default: from the first reply
        self._srv = None if srv_domain is None else (srv_domain, protocol)
        self._sync = (sync or bool(allow_reconnect)) and not use_proxies
        self._refresh_at = 0.0 if self._sync or srv_domain else math.inf    # monotonic seconds
        self._reconnect = allow_reconnect is not False
        self._retry = retry and self._reconnect
        self._reached = False                       # a request was sent to some server
        self._connection_settings = _ConnectionSettings(
            (ca_cert or True) if verify else False, cert, dict(proxies or {}))
        self.scope = Scope()                        # of all calls and watches until `close`
        self._idle: deque[_Connections] = deque()   # last in, first out
        # Also at exit, but only idle ones: closing one that a daemon thread reads from would wait.
        weakref.finalize(self, _close_all, self._idle)
        self._idle_max = per_host_pool_size
        self._connectivity = _Connectivity(session_timeout)
        if on_state is not None:
            self.add_listener(on_state)

    @classmethod
    @_with_settings_of(__init__)
    def from_env(cls: "type[_CallerType]", **settings: Any) -> _CallerType:
        """Return a client with the settings of the ETCDCTL_* variables; `settings` override them.

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

    def sync(self) -> "tuple[str, ...]":
        """Read the member list, use its URLs too, and return all endpoints.

        The given endpoints stay.  With `sync=True` in the constructor this is automatic: after the
        first call, after a failover, and about every SYNC_INTERVAL_S seconds.
        """
        self._learn_members(self._perform)
        return self.endpoints.urls

    @property
    def state(self) -> ConnectionState:
        """The outcome of the last calls and watches; an idle client does not probe."""
        return self._connectivity.state

    def add_listener(self, listener: _Listener) -> None:
        """Call `listener(state)` at every change of `state`, in order, until it returns True.

        It runs in the thread that noticed the change and must not block; its exceptions are logged.
        """
        self._connectivity.add(listener)

    def remove_listener(self, listener: _Listener) -> None:
        """Undo `add_listener`; an unknown listener is ignored."""
        self._connectivity.remove(listener)

    @property
    def key_endpoint(self) -> str:
        """Path of the keys API; a subclass may override it."""
        return self.version_prefix + "/keys"

    def close(self) -> None:
        """End calls, watches and recipes with Cancelled.  New calls are possible afterwards."""
        scope, self.scope = self.scope, Scope()
        scope.cancel()
        self._connectivity.close()
        _close_all(self._idle)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.endpoints.urls or self._srv or ())!r})"

    def _is_replaced(self, name: str = "api_execute") -> bool:
        """Return whether the program has overridden or replaced this method."""
        return False

    def _perform(self, call: "_Call[_T]") -> _T:
        """Send `call` to one endpoint after the other, in rounds, as long as that is safe.

        Raises the error of the endpoint tried first, with those of the others in `failures`.
        """
        timeout = self.total_timeout if call.timeout is None else call.timeout
        failures: dict[str, EtcdError] = {}
        with Scope(timeout, self.scope) as scope:
            deadline = scope.deadline
            self._discover_endpoints(deadline)
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
                self._wait_before_retry(rounds, list(failures.values()), scope)
        raise AssertionError("unreachable")

    def _note_success(self, after_failures: bool, deadline: float) -> None:
        self._connectivity.report(True)
        if self._sync and (after_failures or time.monotonic() >= self._refresh_at):
            until = min(deadline, time.monotonic() + SYNC_TIMEOUT_S)
            with contextlib.suppress(EtcdError):    # the result of the call is known
                self._learn_members(lambda call: self._attempt(self.endpoints.current, call, until))

    def _note_failure(self, endpoint: str, call: "_Call[Any]", error: EtcdError) -> None:
        """Leave `endpoint` if it failed.  Raises `error` unless the next one may be tried."""
        if isinstance(error, Cancelled):
            raise error
        if call.waits and isinstance(error, RequestTimeout):
            self._connectivity.report(True)
            raise WatchTimeout("no change in time", endpoint=endpoint) from error
        if not is_endpoint_failure(error):
            self._connectivity.report(True)
            raise error
        self._leave_endpoint(endpoint, error)
        never_sent = isinstance(error, ConnectionFailed) and not error.maybe_applied
        if call.write and not never_sent:
            self._connectivity.report(False)
            raise error

    def _leave_endpoint(self, endpoint: str, error: "EtcdError | None" = None) -> None:
        if self._reconnect:
            self.endpoints.failed(endpoint)
            if self.endpoints.current != endpoint:
                _log.info("%s failed (%s): on to %s", endpoint,
                          error.message if error else "no answer", self.endpoints.current)

    def _wait_before_retry(self, rounds: int, errors: "list[EtcdError]", scope: Scope) -> None:
        """Wait before the next round, or raise the errors of the final one.

        There is one round without a deadline, since a dead cluster must not block for ever, and
        until a server was reached, since the address is probably wrong.
        """
        pause_s = _backoff_s(rounds)
        final = scope.once or not (self._retry and self._reached) or all(map(_is_permanent, errors))
        if final or scope.deadline == math.inf or scope.left_s() <= pause_s:
            errors[0].others = tuple(errors[1:])
            raise errors[0]
        scope.wait(pause_s)

    def _discover_endpoints(self, deadline: float) -> None:
        """Look up the endpoints in DNS, before the first call and at intervals."""
        now = time.monotonic()
        if self._srv is None or (now < self._refresh_at and self.endpoints.urls):
            return
        patience_s = deadline - now
        if self.endpoints.urls:                     # a refresh leaves time for the call
            patience_s = min(SYNC_TIMEOUT_S, patience_s / 2)
        try:
            self.endpoints.give(_discover(*self._srv, now + patience_s))
        except ConnectionFailed:
            if not self.endpoints.urls:             # else keep the known ones
                raise
        if not self._sync:
            self._refresh_at = now + SYNC_INTERVAL_S

    def _learn_members(self, perform: "Callable[[_Call[list[Member]]], list[Member]]") -> None:
        self._refresh_at = time.monotonic() + SYNC_INTERVAL_S   # first: keeps other threads out
        call = _Call("GET", f"{self.version_prefix}/members", _parse_members)
        urls = [url for member in perform(call) for url in member.client_urls]
        with contextlib.suppress(ValueError):       # a malformed URL: keep the known ones
            self.endpoints.learn([_base_url(url) for url in urls])

    def _attempt(self, endpoint: str, call: "_Call[_T]", deadline: float, sharers: int = 1) -> _T:
        """Send `call` once; a read takes an equal share of the time left to `sharers` endpoints."""
        if sharers > 1 and not (call.write or call.waits) and deadline < math.inf:
            deadline -= (deadline - time.monotonic()) * (sharers - 1) / sharers
        return self._request(endpoint, call, _Exchange(
            deadline, self.read_timeout or math.inf, self.connect_timeout))

    def _request(self, endpoint: str, call: "_Call[_T]", exchange: _Exchange) -> _T:
        """Perform `call` at `endpoint` and return its parsed reply.

        Follows redirects of reads, and redirects of writes with 307 and 308, whose sender has not
        executed the request (RFC 9110 section 15.4), such as a follower of etcd 0.4.
        """
        scope = cast(Scope, _context.scope)
        scope.attach(exchange.cancel)
        connections = self._take_connections()
        base, target = endpoint, call.target
        try:
            for _ in range(REDIRECTS_MAX + 1):
                reply = self._exchange(base, target, call, exchange, connections)
                if reply.status not in _REDIRECTS or not self._follows(call, reply):
                    self._check_cluster_id(base, reply, write=call.write)
                    return self._interpret(base, call, reply)
                try:
                    where = urlsplit(urljoin(base + target, reply.headers.get("Location", "")))
                except ValueError as error:
                    raise BadReply("redirected to nowhere", endpoint=base) from error
                base, target = f"{where.scheme}://{where.netloc}", where._replace(
                    scheme="", netloc="", fragment="").geturl() or "/"
        finally:
            scope.detach(exchange.cancel)
            exchange.done()
            if scope.cancelled:                     # perhaps by `close`: leave no socket open
                connections.close()
            self._return_connections(connections)
        raise BadReply("too many redirects", endpoint=base)

    def _follows(self, call: "_Call[Any]", reply: _Reply) -> bool:
        harmless = not call.write or reply.status in (307, 308)
        return self.allow_redirect and harmless and "Location" in reply.headers

    def _exchange(self, base: str, target: str, call: "_Call[Any]", exchange: _Exchange,
                  connections: _Connections) -> _Reply:
        exchange.sent = False
        if self.on_request is not None:
            self.on_request(call.method, base + target, call.form)
        headers = self._headers(base, call)
        began, outcome = time.monotonic(), "interrupted"
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
            if _log.isEnabledFor(logging.DEBUG):    # without the query, which may hold a value
                _log.debug("%s %s%s: %s after %.1f ms", call.method, base, target.split("?")[0],
                           outcome, (time.monotonic() - began) * 1000)

    def _headers(self, base: str, call: "_Call[Any]") -> "dict[str, str]":
        headers = {"User-Agent": _USER_AGENT}
        if call.form is not None:
            headers["Content-Type"] = call.content_type
        if self.username is not None and base in self.endpoints.urls:   # not after a redirect
            credentials = f"{self.username}:{self.password}".encode()
            headers["Authorization"] = "Basic " + base64.b64encode(credentials).decode()
        return headers

    def _take_connections(self) -> _Connections:
        while self._idle:
            with contextlib.suppress(IndexError):   # another thread was faster
                connections = self._idle.pop()
                if connections.pid == os.getpid():
                    return connections
                connections.close()                 # in a forked child: the parent has its own
        return _Connections(self._connection_settings)

    def _return_connections(self, connections: _Connections) -> None:
        connections.used_at = time.monotonic()
        self._idle.append(connections)
        # In a burst keep one for each call under way, or every other call would open a new one.
        while len(self._idle) > max(self._idle_max, self.scope.calls):
            with contextlib.suppress(IndexError):   # another thread was faster
                self._idle.popleft().close()

    def _interpret(self, endpoint: str, call: "_Call[_T]", reply: _Reply) -> _T:
        if reply.status not in call.statuses:
            raise _status_error(reply, endpoint, write=call.write)
        try:
            return call.parse(reply)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadReply(
                f"the answer cannot be understood ({error or type(error).__name__})",
                status=reply.status, endpoint=endpoint, maybe_applied=call.write) from error

    def _check_cluster_id(self, endpoint: str, reply: _Reply, *, write: bool = False) -> None:
        cluster_id = reply.headers.get("X-Etcd-Cluster-Id")     # absent: /version, /health, stats
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
    """Users, roles and authentication: the auth API of etcd 2.1 and later.

    While auth is enabled all but `auth_status` need the role root, or raise Unauthorized.  Dicts
    are the server's JSON.
    """

    def auth_status(self) -> "dict[str, Any]":
        """Return {"enabled": bool}; needs no role."""
        return self._auth_call("GET", "/enable")

    def auth_enable(self) -> None:
        """Enable auth.  Raises HttpError without a user root, or if it is enabled.

        Requests without a password have the role guest, which permits everything until changed.
        """
        self._auth_call("PUT", "/enable", {})

    def auth_disable(self) -> None:
        """Disable auth.  Raises HttpError if it is disabled."""
        self._auth_call("DELETE", "/enable")

    # -- users

    def user_list(self) -> "list[dict[str, Any]]":
        """Return the users by name: [{"user": name, "roles": [role, ...]}, ...]."""
        return self._auth_list("user")

    def user_get(self, name: str) -> "dict[str, Any]":
        """Return {"user": name, "roles": [role, ...]}.  Raises KeyNotFound."""
        return self._auth_call("GET", f"/users/{name}")

    def user_add(self, name: str, password: str, roles: "Iterable[str]" = ()) -> "dict[str, Any]":
        """Create a user.  Raises NodeExists; but two concurrent calls may both succeed.

        The server treats a second user_add without roles as a change of password, so the client
        reads the users first.
        """
        if self._has_user(name):
            raise NodeExists(f"auth: User {name} already exists.")
        fields = {"user": name, "password": password, "roles": list(roles)}
        return self._auth_create(f"/users/{name}", fields)

    def user_remove(self, name: str) -> None:
        """Remove a user.  Raises KeyNotFound; HttpError for root while auth is enabled."""
        self._auth_call("DELETE", f"/users/{name}")

    def user_password(self, name: str, password: str) -> "dict[str, Any]":
        """Change the password of a user.  Raises KeyNotFound."""
        if not self._has_user(name):                # the server would create the user
            raise KeyNotFound(f"auth: User {name} does not exist.")
        return self._auth_call("PUT", f"/users/{name}", {"user": name, "password": password})

    def user_grant(self, name: str, roles: "Iterable[str]") -> "dict[str, Any]":
        """Grant roles to a user.  Raises KeyNotFound; HttpError if one is granted already."""
        return self._auth_call("PUT", f"/users/{name}", {"user": name, "grant": list(roles)})

    def user_revoke(self, name: str, roles: "Iterable[str]") -> "dict[str, Any]":
        """Revoke roles of a user.  Raises KeyNotFound; HttpError if one is not granted."""
        return self._auth_call("PUT", f"/users/{name}", {"user": name, "revoke": list(roles)})

    # -- roles

    def role_list(self) -> "list[dict[str, Any]]":
        """Return the roles by name; the role root, with all rights, always exists."""
        return self._auth_list("role")

    def role_get(self, name: str) -> "dict[str, Any]":
        """Return {"role": name, "permissions": {"kv": {"read": [...], "write": [...]}}}.

        Raises KeyNotFound.
        """
        return self._auth_call("GET", f"/roles/{name}")

    def role_add(self, name: str, *, read: "Iterable[str]" = (),
                 write: "Iterable[str]" = ()) -> "dict[str, Any]":
        """Create a role with the right to read and write these paths.  Raises NodeExists."""
        permissions = {"kv": {"read": list(read), "write": list(write)}}
        return self._auth_create(f"/roles/{name}", {"role": name, "permissions": permissions})

    def role_remove(self, name: str) -> None:
        """Remove a role.  Raises KeyNotFound.  Users keep its name, without effect."""
        self._auth_call("DELETE", f"/roles/{name}")

    def role_grant(self, name: str, path: "str | Iterable[str]",
                   kind: str = "readwrite") -> "dict[str, Any]":
        """Grant a role the right to `read`, `write` or `readwrite` a path.

        path  a key, a prefix of keys if it ends in `*`, or several of both

        Raises KeyNotFound; HttpError if it is granted already.
        """
        return self._role_change(name, "grant", path, kind)

    def role_revoke(self, name: str, path: "str | Iterable[str]",
                    kind: str = "readwrite") -> "dict[str, Any]":
        """Undo `role_grant`.  Raises KeyNotFound."""
        return self._role_change(name, "revoke", path, kind)

    def _auth_call(self, method: str, path: str,
                   fields: "Mapping[str, Any] | None" = None) -> "dict[str, Any]":
        body = None if fields is None else json.dumps(fields).encode()
        target = _target(f"{self.version_prefix}/auth{path}", {})
        return self._perform(_Call(
            method, target, lambda reply: _parse_object(reply) if reply.body.strip() else {}, body,
            _JSON_TYPE))

    def _auth_list(self, entity: str) -> "list[dict[str, Any]]":
        entries = self._auth_call("GET", f"/{entity}s").get(f"{entity}s") or []
        return [{entity: entry} if isinstance(entry, str) else entry for entry in entries]

    def _auth_create(self, path: str, fields: "Mapping[str, Any]") -> "dict[str, Any]":
        try:
            return self._auth_call("PUT", path, fields)
        except HttpError as error:
            if error.status != 409:
                raise
            raise NodeExists(error.message, error.payload, status=409,
                             endpoint=error.endpoint) from error

    def _has_user(self, name: str) -> bool:
        return any(user["user"] == name for user in self.user_list())

    def _role_change(self, name: str, change: str, path: "str | Iterable[str]",
                     kind: str) -> "dict[str, Any]":
        if kind not in _PERMISSIONS:
            raise EtcdValueError(f"a permission is read, write or readwrite, not {kind!r}")
        paths = [path] if isinstance(path, str) else list(path)
        kv = dict.fromkeys(_PERMISSIONS[kind], paths)
        return self._auth_call("PUT", f"/roles/{name}", {"role": name, change: {"kv": kv}})


class _AuthObject:
    entity = ""

    def __init__(self, client: _Users, name: str) -> None:
        self.client = client
        self.name = name

    @property
    def uri(self) -> str:
        return f"{self.client.version_prefix}/auth/{self.entity}s/{self.name}"

    @property
    def names(self) -> "list[dict[str, Any]]":
        """All users or all roles in the server's JSON."""
        return self.client._auth_list(self.entity)

    def delete(self) -> None:
        """Remove the user or role.  Raises KeyNotFound."""
        self.client._auth_call("DELETE", f"/{self.entity}s/{self.name}")


class EtcdUser(_AuthObject):
    """A user to read, change and write: python-etcd's interface.

    roles     names of the roles; change them, then `write`
    password  set it, then `write`; it cannot be read
    """

    entity = "user"

    def __init__(self, client: _Users, name: str) -> None:
        super().__init__(client, name)
        self._roles: set[str] = set()
        self._password: str | None = None

    @property
    def roles(self) -> "set[str]":
        return self._roles

    @roles.setter
    def roles(self, roles: "Iterable[str]") -> None:
        self._roles = set(roles)

    @property
    def password(self) -> None:
        return None

    @password.setter
    def password(self, password: "str | None") -> None:
        self._password = password

    def read(self) -> None:
        """Read the roles from the server.  Raises KeyNotFound."""
        self.roles = self._stored_roles()

    def write(self) -> None:
        """Create the user or write the differences, in up to three requests; drop the password."""
        stored: set[str] | None = None
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

    def _stored_roles(self) -> "set[str]":
        # Since etcd 2.3 the server lists whole roles, before that their names.
        roles = self.client.user_get(self.name).get("roles") or []
        return {role if isinstance(role, str) else role["role"] for role in roles}


class EtcdRole(_AuthObject):
    """A role to read, change and write: python-etcd's interface."""

    entity = "role"

    def __init__(self, client: _Users, name: str) -> None:
        super().__init__(client, name)
        self._paths: dict[str, set[str]] = {"read": set(), "write": set()}

    @property
    def acls(self) -> "dict[str, str]":
        """The permissions by path: R, W or RW."""
        read, write = self._paths["read"], self._paths["write"]
        return {path: "R" * (path in read) + "W" * (path in write) for path in sorted(read | write)}

    @acls.setter
    def acls(self, acls: "Mapping[str, str]") -> None:
        self._paths = {"read": set(), "write": set()}
        for path, permission in acls.items():
            self.grant(path, permission)

    def grant(self, path: str, permission: str) -> None:
        """Add R, W or RW of `path`; `write` sends it."""
        for right in _rights(permission):
            self._paths[right].add(path)

    def revoke(self, path: str, permission: str) -> None:
        """Remove R, W or RW of `path`; `write` sends it."""
        for right in _rights(permission):
            self._paths[right].discard(path)

    def read(self) -> None:
        """Read the permissions from the server.  Raises KeyNotFound."""
        self._paths = self._stored_paths()

    def write(self) -> None:
        """Create the role, or write the differences in up to four requests, two for each right."""
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

    def _stored_paths(self) -> "dict[str, set[str]]":
        kv = self.client.role_get(self.name)["permissions"]["kv"]
        return {right: set(kv.get(right) or ()) for right in ("read", "write")}


def _rights(permission: str) -> "list[str]":
    letters = permission.upper()
    if not letters or set(letters) - set("RW"):
        raise EtcdValueError(f"a permission is R, W or RW, not {permission!r}")
    return [right for right in ("read", "write") if right[0].upper() in letters]


class Auth:
    """The switch of authentication: python-etcd's interface."""

    def __init__(self, client: _Users) -> None:
        self.client = client

    @property
    def active(self) -> bool:
        """Whether the server checks requests; assign to switch it."""
        return bool(self.client.auth_status()["enabled"])

    @active.setter
    def active(self, active: bool) -> None:
        if active != self.active:
            (self.client.auth_enable if active else self.client.auth_disable)()


_User, _Role, _Switch = EtcdUser, EtcdRole, Auth


class auth:
    """The names of python-etcd's module `etcd.auth`."""

    EtcdUser = _User
    EtcdRole = _Role
    Auth = _Switch


# ============================================================================
# client/verbs -- Verbs of the keys API, except for those that wait.
# ============================================================================


_NOT_GIVEN = object()       # default of conditions; None may be a mistake and is refused


def _conditions(prev_value: object, prev_index: object, prev_exist: object = _NOT_GIVEN,
                ) -> "dict[str, _Field]":
    fields: dict[str, _Field] = {}
    if prev_value is None or prev_index is None or prev_exist is None:
        raise EtcdValueError("a condition is None: leave it out, or say what to compare with")
    if prev_value is not _NOT_GIVEN:
        fields["prevValue"] = _text(prev_value)
    if prev_index is not _NOT_GIVEN:
        # The server ignores prevIndex=0: the write would be unconditional.
        if isinstance(prev_index, int) and prev_index < 1:
            raise EtcdValueError("prev_index is a modified index, 1 or more")
        fields["prevIndex"] = _text(prev_index)
    if prev_exist is not _NOT_GIVEN:
        fields["prevExist"] = bool(prev_exist)
    return fields


def _keys_target(key: str, query: "Mapping[str, _Field]", endpoint: str) -> str:
    return _target(endpoint + clean_key(key), query)


class _Keys(_Caller):
    """The verbs of the keys API, except for those that wait.

    ttl      seconds, 1 or more; None: the key is permanent
    timeout  seconds for the call over all endpoints; None: the client's `total_timeout`; math.inf:
             no limit; 0: one attempt for each endpoint, TRY_S in all
    value    text, a number, or bytes in UTF-8; EtcdValueError for other values.  For other bytes
             use base64.b64encode(data).decode(), for dicts json.dumps
    """

    # -- reading

    @overload
    def get(self, key: str, *, recursive: bool = False, sorted: bool = False,
            quorum: bool = False, timeout: "float | None" = None) -> EtcdResult: ...

    @overload
    def get(self, key: str, *, default: _T, recursive: bool = False, sorted: bool = False,
            quorum: bool = False, timeout: "float | None" = None) -> "EtcdResult | _T": ...

    def get(self, key: str, *, default: Any = _NOT_GIVEN, recursive: bool = False,
            sorted: bool = False, quorum: bool = False, timeout: "float | None" = None) -> Any:
        """Return the node at `key`.  If it is missing, return `default` or raise KeyNotFound.

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

    def ls(self, key: str = "/", *, recursive: bool = False, quorum: bool = False,
           timeout: "float | None" = None) -> "list[Node]":
        """Return the visible nodes of a directory ordered by key; for a file, the file itself.

        recursive  list all depths, parents before their children
        """
        node = self.get(key, recursive=recursive, sorted=True, quorum=quorum, timeout=timeout).node
        return list(node.walk()) if node.dir else [node]

    def __contains__(self, key: str) -> bool:
        """Return whether `key` exists, as a file or a directory."""
        try:
            self.get(key)
        except KeyNotFound:
            return False
        return True

    def __getitem__(self, key: str) -> str:
        """Return the value of a file.  Raises KeyNotFound (a KeyError), NotFile."""
        node = self.get(key).node
        if node.dir:
            raise NotFile("Not a file", cause=node.key)
        return node.value or ""

    __iter__ = None                                 # else Python would read the keys 0, 1, 2...

    # -- writing

    def set(self, key: str, value: object, ttl: "int | None" = None, *,
            timeout: "float | None" = None) -> EtcdResult:
        """Write a file and its parent directories; an earlier ttl is dropped.  Raises NotFile."""
        return self._put(key, {"value": _text(value), "ttl": ttl}, timeout)

    def create(self, key: str, value: object, ttl: "int | None" = None, *,
               timeout: "float | None" = None) -> EtcdResult:
        """Write a file that must not exist.  Raises NodeExists."""
        return self._put(key, {"value": _text(value), "ttl": ttl, "prevExist": False}, timeout)

    @overload
    def update(self, key: str, value: object, ttl: "int | None" = None, *,
               timeout: "float | None" = None) -> EtcdResult: ...

    @overload
    def update(self, key: EtcdResult, *, timeout: "float | None" = None) -> EtcdResult: ...

    def update(self, key: "str | EtcdResult", value: object = None, ttl: "int | None" = None, *,
               timeout: "float | None" = None) -> EtcdResult:
        """Write a file that must exist.  Raises KeyNotFound.

        A result in place of key and value: write its `value` and `ttl`.  Raises CompareFailed if
        the key has changed since it was read, except for a directory, which etcd cannot compare.
        """
        if isinstance(key, str):
            return self._put(key, {"value": _text(value), "ttl": ttl, "prevExist": True}, timeout)
        if key.dir:
            return self.write(key.key, key.value, key.ttl, dir=True, prevExist=True,
                              timeout=timeout)
        return self.write(key.key, key.value, key.ttl, prevExist=True,
                          prevIndex=key.modifiedIndex, timeout=timeout)

    def append(self, key: str, value: object, ttl: "int | None" = None, *,
               timeout: "float | None" = None) -> EtcdResult:
        """Create a file with the next name in directory `key`; names sort in order of creation.

        After an error with maybe_applied=True, look for the value in the directory; this needs
        unique values.
        """
        return self._keys_call("POST", key, {"value": _text(value), "ttl": ttl}, timeout=timeout)

    def refresh(self, key: str, ttl: int, *, prevValue: object = _NOT_GIVEN,
                prevIndex: object = _NOT_GIVEN, timeout: "float | None" = None) -> EtcdResult:
        """Give an existing file a new ttl without a change of its value, and without an event.

        Needs etcd 2.3: earlier versions ignore `refresh` and empty the value.
        """
        conditions = _conditions(prevValue, prevIndex)
        fields: dict[str, _Field] = {"ttl": ttl, "refresh": True, "prevExist": True}
        return self._put(key, {**fields, **conditions}, timeout)

    def compare_and_swap(self, key: str, value: object, *, prev_value: "object | None" = None,
                         prev_index: "int | None" = None, ttl: "int | None" = None,
                         timeout: "float | None" = None) -> EtcdResult:
        """Write a file if it has the given value and modified index.  Raises CompareFailed.

        At least one condition is needed.  The API cannot compare with an empty value.
        """
        fields: dict[str, _Field] = {"value": _text(value), "ttl": ttl}
        return self._put(key, {**fields, **_needed(prev_value, prev_index)}, timeout)

    def test_and_set(self, key: str, value: object, prev_value: object, ttl: "int | None" = None, *,
                     timeout: "float | None" = None) -> EtcdResult:
        """Write a file if it has the value `prev_value`.  Raises CompareFailed."""
        return self.compare_and_swap(key, value, prev_value=prev_value, ttl=ttl, timeout=timeout)

    def write(self, key: str, value: object, ttl: "int | None" = None, dir: bool = False,
              append: bool = False, *, prevValue: object = _NOT_GIVEN,
              prevIndex: object = _NOT_GIVEN, prevExist: object = _NOT_GIVEN, refresh: bool = False,
              timeout: "float | None" = None) -> EtcdResult:
        """Write in any of the ways above, with python-etcd's options.

        value      None for a directory, a refresh or (as in python-etcd) an empty file
        dir        create a directory
        append     create a file with the next name in directory `key`
        prevValue  the required value, and
        prevIndex  the required modified index; else CompareFailed
        prevExist  False: create only, else NodeExists.  True: update only, else KeyNotFound
        refresh    change only the ttl, without an event

        Raises EtcdValueError for a condition that is None: leave it out instead.
        """
        if dir and value:
            raise EtcdValueError("a directory has no value")
        given = None if value is None else _text(value)
        fields: dict[str, _Field] = {"value": given, "ttl": ttl, "dir": bool(dir) or None,
                                     "refresh": bool(refresh) or None}
        conditions = _conditions(prevValue, prevIndex, prevExist)
        method = "POST" if append else "PUT"
        return self._keys_call(method, key, {**fields, **conditions}, timeout=timeout)

    # -- removing

    def delete(self, key: str, recursive: "bool | None" = None, dir: "bool | None" = None, *,
               prevValue: object = _NOT_GIVEN, prevIndex: object = _NOT_GIVEN,
               timeout: "float | None" = None) -> EtcdResult:
        """Remove a file; with `dir` also an empty directory, with `recursive` any directory.

        prevValue and prevIndex are conditions, as in `write`.  Raises CompareFailed.
        """
        query: dict[str, _Field] = {"recursive": bool(recursive) or None, "dir": bool(dir) or None}
        query.update(_conditions(prevValue, prevIndex))
        return self._keys_call("DELETE", key, query=query, timeout=timeout)

    def pop(self, key: str, recursive: "bool | None" = None, dir: "bool | None" = None, *,
            prevValue: object = _NOT_GIVEN, prevIndex: object = _NOT_GIVEN,
            timeout: "float | None" = None) -> EtcdResult:
        """Remove as `delete` does and return the removed node."""
        gone = self.delete(key, recursive, dir, prevValue=prevValue, prevIndex=prevIndex,
                           timeout=timeout)
        return EtcdResult(node=gone.prev_node or gone.node, etcd_index=gone.etcd_index)

    def compare_and_delete(self, key: str, *, prev_value: "object | None" = None,
                           prev_index: "int | None" = None,
                           timeout: "float | None" = None) -> EtcdResult:
        """Remove a file if it has the given value and modified index.  Raises CompareFailed."""
        return self._keys_call(
            "DELETE", key, query=_needed(prev_value, prev_index), timeout=timeout)

    # -- directories

    def mkdir(self, key: str, ttl: "int | None" = None, *,
              timeout: "float | None" = None) -> EtcdResult:
        """Create a directory that must not exist; with `ttl` it expires with its content."""
        return self._put(key, {"dir": True, "ttl": ttl, "prevExist": False}, timeout)

    def rmdir(self, key: str, *, timeout: "float | None" = None) -> EtcdResult:
        """Remove an empty directory or, as in etcd, a file.  Raises DirNotEmpty."""
        return self.delete(key, dir=True, timeout=timeout)

    def _put(self, key: str, form: "Mapping[str, _Field]",
             timeout: "float | None" = None) -> EtcdResult:
        return self._keys_call("PUT", key, form, timeout=timeout)

    def _keys_call(self, method: str, key: str, form: "Mapping[str, _Field] | None" = None, *,
                   query: "Mapping[str, _Field]" = MappingProxyType({}),
                   timeout: "float | None" = None) -> EtcdResult:
        if form is not None and form.get("ttl") == 0:
            raise EtcdValueError("a ttl is seconds, 1 or more; None for a key that stays")
        target = _keys_target(key, query, self.key_endpoint)
        body = None if form is None else _encode_fields(form).encode()
        return self._perform(_Call(method, target, _parse_result, body, timeout=timeout,
                                   waits="wait" in query))


def _needed(prev_value: "object | None", prev_index: "int | None") -> "dict[str, _Field]":
    if prev_value is None and prev_index is None:
        raise EtcdValueError("prev_value or prev_index is needed")
    return _conditions(_NOT_GIVEN if prev_value is None else prev_value,
                       _NOT_GIVEN if prev_index is None else prev_index)


# ============================================================================
# client/watching -- Watching: all changes of a key or a directory, in order.
# ============================================================================


WATCH_POLL_S = 60.0             # a silent watch is sent again, in case a proxy has forgotten it
WATCH_PROBE_S = 5.0             # a silent watch probes whether the server is alive
WATCH_HEAD_S = 1.0              # wait for the head of a watch, then probe; doubled after failures
WATCH_SETTLE_S = 1.0            # silence after a head that proves an empty history
WATCH_LOOK_S = 0.2              # with timeout=0: wait for an event right after the head
HISTORY_EVENTS = 1000           # events that etcd remembers


class _Step(enum.Enum):
    """The next request of a watch."""

    LIST = "the nodes, as a starting point"
    RELIST = "the nodes by quorum: at least as new as the events so far"
    CHECK = "the index by quorum: did the store go back, or does this member lag behind?"
    POLL = "the next change"


class _WatchState:
    """The state machine of a watch, without network and clock.

    step      the next request
    index     the next change to ask for; None: from now on
    found     events to be returned
    reached   True after the first reply of any server
    doubtful  True if the last head shows an older store: restored, or of a member that lags behind

    Transitions, from LIST (with relist) or POLL on:

    LIST    listed -> POLL
    POLL    change -> POLL.  Index cleared (401) -> RELIST; without relist POLL from the newest
            index known to be quiet, or the error.  An older store, by index or term, followed by
            silence -> CHECK
    CHECK   older -> RELIST; without relist etcd's error for a lost history, 401.
            Otherwise -> the previous step
    RELIST  listed: the difference becomes events -> POLL

    quiet   (index, time): the store was at `index` and this watch had no event.  The watch moves
            up to it only before etcd would forget the watch's own index.
    """

    def __init__(self, path: str, *, recursive: bool, index: "int | None", relist: bool) -> None:
        self.step = _Step.LIST if relist else _Step.POLL
        self.index = index
        self.found: deque[EtcdResult] = deque()
        self.reached = False
        self.doubtful = False
        self.quiet = (0, 0.0)
        self._path = path
        self._recursive = recursive
        self._relist = relist
        self._known: dict[str, Node] | None = None   # with relist: the nodes after all events
        self._newest = (0, 0)                       # highest index and term of the store
        self._other_term = False                    # the last head has an older one

    # -- replies to POLL

    def head(self, index: int, term: int, now_s: float) -> None:
        """Take index and term of the store when it accepted the watch."""
        self.reached = True
        self.doubtful = self._is_older(index, term)
        self._other_term = 0 < term < self._newest[1]
        if self.doubtful:
            return
        self._newest = max(index, self._newest[0]), max(term, self._newest[1])
        if self.index is None:                      # for another connection, if this one breaks
            self.index = index + 1
        self.quiet = index, now_s

    def is_doubtful(self) -> bool:
        """Return whether to check the store, which showed an older index, instead of waiting."""
        if self.doubtful:
            self.step = _Step.CHECK
        return self.doubtful

    def alive(self, index: int, term: int, now_s: float) -> bool:
        """Take index and term while the watch waits; return False if they must be checked."""
        self.reached = True
        if self._is_older(index, term):
            self.step = _Step.CHECK
            return False
        self.settle(now_s)
        if self.step is _Step.POLL and index:
            self.quiet = index, now_s
        return True

    def change(self, event: EtcdResult, asked: "int | None") -> None:
        """Take the event for index `asked`.  Raises BadReply for an older one."""
        if asked is not None and event.modified_index < asked:
            raise BadReply(f"asked for index {asked} on, got {event.modified_index}")
        self.reached = True
        if self._other_term:                        # perhaps an event of another history
            self.step = _Step.CHECK
            return
        self.index = event.modified_index + 1
        if self._concerns(event.key):
            if self._known is not None:
                for key, node in _changes(self._known, event).items():
                    if node is None:
                        del self._known[key]
                    else:
                        self._known[key] = node
            self.found.append(event)

    def cleared(self, error: EventIndexCleared) -> None:
        """Continue after more changes than etcd remembers; raise `error` if some may be lost."""
        self.reached = True
        if self._relist:
            self.step = _Step.RELIST
        elif self.quiet[0] and self.quiet[0] >= (self.index or 0):
            self.index = self.quiet[0] + 1          # only other keys have changed
        else:
            raise error

    def settle(self, now_s: float) -> None:
        """Move up to the quiet index before etcd forgets the present one.

        An event from the history follows its head at once, and a server sends a later event before
        it tells its new index to another request.
        """
        index, told_at = self.quiet
        far = self.index is None or index - self.index >= HISTORY_EVENTS // 2
        if index and far and now_s - told_at >= WATCH_SETTLE_S:
            self.index = index + 1

    def is_busy(self, since: int) -> bool:
        """Return whether to keep the present request: etcd could forget its index meanwhile."""
        index = self.quiet[0]
        return index - since >= HISTORY_EVENTS // 2 or not (index or self.index)

    # -- replies to the other steps

    def listed(self, nodes: "dict[str, Node]", index: int, term: int) -> None:
        """Take a listing; the difference to the one before becomes events."""
        self.reached = True
        first = self.step is _Step.LIST
        if first and self._is_older(index, term):   # than the given index
            self.step = _Step.CHECK
            return
        if not first:
            self.found.extend(_difference(self._known or {}, nodes, self.index or 1, index))
        if not first or self.index is None:
            self.index = index + 1
        self._newest, self._known, self.step = (index, term), nodes, _Step.POLL

    def checked(self, index: int, term: int) -> None:
        """Take index and term by quorum.  Raises EventIndexCleared."""
        went_back = self._is_older(index, term)
        if self._relist:
            self.step = (_Step.RELIST if went_back else
                         _Step.LIST if self._known is None else _Step.POLL)
            return
        self.step = _Step.POLL
        if went_back:
            self._newest, self.quiet = (index, term), (0, 0.0)
            raise EventIndexCleared("the store went back, as if restored from a backup: read again",
                                    cause=self._path, index=index)

    def replaced(self) -> None:
        """Forget index and term of the store, which another cluster has replaced."""
        self._newest, self.quiet = (0, 0), (0, 0.0)
        if self._relist:
            self.step = _Step.RELIST

    def _is_older(self, index: int, term: int) -> bool:
        """Return whether a store is older than its newest state, or than the given index."""
        if not index and not term:                  # not in the reply
            return False
        newest = max(self._newest[0], (self.index or 1) - 1)
        return index < newest or 0 < term < self._newest[1]

    def _concerns(self, key: str) -> bool:
        """Return whether a change of `key` belongs to this watch.

        From their history etcd 2.3 and 3.4 return events that a waiting watch would not get: of
        hidden keys below a directory, and removals of directories with a common name prefix.
        """
        ours = self._path
        if key == ours or _is_below(ours, key):
            return True
        below = self._recursive and _is_below(key, ours)
        return below and "/_" not in key[len(ours.rstrip("/")):]


class Watch(_Closeable):
    """An endless iterator over the changes of a key; made by `client.watcher`.

    Each request asks for the first change after the last one, so that none is lost or repeated
    while a server restarts, the leader changes or an endpoint fails.  A stream of the server would
    not do: in etcd 2.3 and 3.4 it falls silent after an event from the history or behind a slow
    consumer, and some deletions appear twice.

    index    the first change to return; None: from the first `next` on
    relist   reaction to more than 1000 missed changes of any key (error 401), and to a store that
             went back, because a backup was restored or the cluster was created anew.
             True: list the key again and return the difference to the known nodes as events with
             `relisted` set: a "set" for each changed node (of directories, only those that are
             empty or have a ttl), in the order of their last changes, then a "delete" for the
             topmost of the removed nodes.  Earlier changes of a node do not appear.  The watch
             lists the key at the start (if recursive, to all depths) and keeps a copy in memory.
             False: raise EventIndexCleared; no listing.
    timeout  seconds for each `next`; None: no limit; 0: return events of the history, do not wait.
             Then WatchTimeout, after which `next` may be called again and misses nothing

    Another watch continues at an event's `modified_index` + 1.  If no endpoint replies at the start
    that error is raised; later the watch waits and retries.  Raises ClusterIdChanged when a server
    of another cluster replies; see there.

    A silent server is probed by reading a key that does not exist, on another connection: after
    WATCH_HEAD_S without a head, then every WATCH_PROBE_S.  A failed probe leads to the next
    endpoint.

    Limit: in a recursive watch from the history etcd 2.3 and 3.4 overlook changes of the watched
    directory itself (created, new ttl) unless they are the first; not its removal.

    Thread: one, except for `close`.
    """

    def __init__(self, client: _Keys, key: str, *, recursive: bool = False,
                 index: "int | None" = None, relist: bool = True,
                 timeout: "float | None" = None) -> None:
        self._client = client
        self._path = clean_key(key)
        self._recursive = recursive
        self._timeout = timeout
        self._state = _WatchState(                  # 0 is "now" too
            self._path, recursive=recursive, index=index or None, relist=relist)
        self._endpoint = ""                         # of the last request
        self._exchange: _Exchange                   # of the last request
        self._alive = False                         # that server replied to it, or to a probe
        self._asked_at = 0.0                        # time of the request; monotonic seconds
        self._until = math.inf                      # deadline of the present `next`
        self._patience_s = WATCH_POLL_S             # wait after a reply
        self._failures = 0                          # since the last reply
        self.error: EtcdError | None = None      # the present failure, if any
        self._life = Scope()                        # cancelled by `close`
        self._within = client.scope

    @property
    def index(self) -> "int | None":
        """The index of the next change; None: from now on."""
        return self._state.index

    def __iter__(self) -> "Watch":
        return self

    def __next__(self) -> EtcdResult:
        try:
            with Scope(self._timeout, self._life, self._within) as scope:
                while not self._state.found:
                    self._advance(scope)
                scope.left_s()                      # closed meanwhile: no more events
                return self._state.found.popleft()
        except Cancelled:
            if not self._life.cancelled:
                raise
            raise StopIteration from None

    def close(self) -> None:
        """End the iteration, also a waiting `next`, at once.  Thread: any."""
        self._life.cancel()

    cancel = close

    def _advance(self, scope: Scope) -> None:
        """Perform one step of the state.  Raises WatchTimeout, and errors that are final."""
        client, state = self._client, self._state
        state.settle(time.monotonic())
        if scope.left_s() <= 0:
            raise WatchTimeout("no change in time", index=state.index or 0,
                               endpoint=client.endpoints.current)
        try:
            client._discover_endpoints(min(scope.deadline, time.monotonic() + WATCH_POLL_S))
            self._endpoint = client.endpoints.current
            self._STEPS[state.step](self, scope)
        except EventIndexCleared as error:
            state.cleared(error)
        except ClusterIdChanged as error:
            self.error = error
            state.replaced()
            raise
        except RequestTimeout as error:
            if not self._alive:
                self._on_silence(error, scope)
            elif scope.once:
                scope.deadline = 0.0                # a head without an event
        except EtcdError as error:
            self._on_failure(error, scope)
        else:
            self._on_reply()
            self._failures = 0
            if state.step is _Step.CHECK:           # a member that lags behind may need a moment
                scope.wait(_backoff_s(1))

    def _poll(self, scope: Scope) -> None:
        asked = self._state.index
        query = {"wait": True, "recursive": self._recursive or None, "waitIndex": asked}
        event = self._send(query, scope, _parse_result, self._on_head)
        self._state.change(event, asked)

    def _list(self, scope: Scope) -> None:
        query = {"recursive": self._recursive or None,
                 "quorum": self._state.step is _Step.RELIST or None}
        try:
            top = self._send(query, scope, _parse_result)
        except (KeyNotFound, NotDir) as error:
            self._state.listed({}, error.index, 0)
            return
        nodes = (top.node, *top.node.walk()) if self._recursive else (top.node,)
        self._state.listed(
            {node.key: _childless(node) for node in nodes}, top.etcd_index, top.raft_term)

    def _check(self, scope: Scope) -> None:
        reply = self._send(
            {"quorum": True}, scope, _keep_reply, statuses=_ANY_STATUS, below=_PROBE_KEY)
        self._state.checked(*_index_and_term(reply))

    _STEPS: "ClassVar[dict[_Step, Callable[[Watch, Scope], None]]]" = {
        _Step.LIST: _list, _Step.RELIST: _list, _Step.CHECK: _check, _Step.POLL: _poll}

    def _send(self, query: "Mapping[str, _Field]", scope: Scope, parse: Callable[[_Reply], _T],
              on_head: "Callable[[_Reply], None] | None" = None, *,
              statuses: "frozenset[int]" = _SUCCESS, below: str = "") -> _T:
        client = self._client
        target = _keys_target(self._path + below, query, client.key_endpoint)
        call = _Call("GET", target, parse, on_head=on_head, statuses=statuses)
        self._alive, self._asked_at, self._until = False, time.monotonic(), scope.deadline
        self._patience_s = WATCH_LOOK_S if scope.once else WATCH_POLL_S
        self._exchange = _Exchange(min(self._until, self._asked_at + WATCH_POLL_S),
                                   self._head_s(), client.connect_timeout, self._keeps_waiting)
        return client._request(self._endpoint, call, self._exchange)

    def _rounds(self) -> int:
        """Return how many times all endpoints failed since the last reply."""
        return self._failures // max(1, len(self._client.endpoints.urls))

    def _head_s(self) -> float:
        return min(WATCH_HEAD_S * (1 << min(self._rounds(), 5)), WATCH_POLL_S)

    def _on_head(self, head: _Reply) -> None:
        self._client._check_cluster_id(self._endpoint, head)
        self._state.head(*_index_and_term(head), time.monotonic())
        self._on_reply()
        self._failures = 0

    def _on_reply(self) -> None:
        self._alive, self.error = True, None
        self._client._connectivity.report(True)
        self._exchange.deadline = min(self._until, time.monotonic() + self._patience_s)
        silence_s = WATCH_HEAD_S if self._state.doubtful else WATCH_PROBE_S
        self._exchange.silence_s = min(silence_s, WATCH_POLL_S)

    def _keeps_waiting(self) -> bool:
        """Return whether to continue waiting for a silent server, after a probe."""
        if self._alive and self._state.is_doubtful():
            return False
        client, before = self._client, self._state.quiet[0]
        target = _keys_target(self._path + _PROBE_KEY, {}, client.key_endpoint)
        call = _Call("GET", target, _keep_reply, statuses=_ANY_STATUS)
        wait_s = self._head_s()
        exchange = _Exchange(time.monotonic() + wait_s, wait_s, client.connect_timeout)
        self._alive = False
        try:
            reply = client._request(self._endpoint, call, exchange)
        except (Cancelled, ClusterIdChanged):
            raise
        except EtcdError:
            return False
        self._on_reply()
        return self._state.alive(*_index_and_term(reply), time.monotonic()) and (
            time.monotonic() - self._asked_at < WATCH_POLL_S or self._state.is_busy(before))

    def _on_silence(self, error: RequestTimeout, scope: Scope) -> None:
        """Handle a request without any reply, not even a head."""
        if scope.left_s() > 0:
            self._on_failure(error, scope)
        elif time.monotonic() - self._asked_at >= min(1.0, self._client.connect_timeout):
            self._client._leave_endpoint(self._endpoint)    # for the next `next`

    def _on_failure(self, error: EtcdError, scope: Scope) -> None:
        """Continue with the next endpoint, after a wait if all failed.  Raises a final error."""
        client, self.error = self._client, error
        error.endpoint = error.endpoint or self._endpoint
        if is_endpoint_failure(error):
            client._leave_endpoint(self._endpoint, error)
        elif not isinstance(error, WatcherCleared):     # after a 400 the same request follows
            raise error
        self._failures += 1
        rounds = self._rounds()
        if not rounds:
            return
        client._connectivity.report(False)
        if not self._state.reached and not (isinstance(error, RequestTimeout) and rounds < 3):
            raise error
        scope.wait(_backoff_s(rounds))


_PROBE_KEY = "/_pyetcd-client"                      # below the watched key; never exists
_ANY_STATUS: "frozenset[int]" = frozenset(range(200, 500))


def _index_and_term(reply: _Reply) -> "tuple[int, int]":
    return reply.header_number("X-Etcd-Index"), reply.header_number("X-Raft-Term")


_REMOVALS: "frozenset[str]" = frozenset(("delete", "expire", "compareAndDelete"))


def _childless(node: Node) -> Node:
    """Return a node without children and JSON, to save memory."""
    return replace(node, nodes=(), raw={})


def _changes(known: "Mapping[str, Node]", event: EtcdResult) -> "dict[str, Node | None]":
    """Return the nodes that an event changes, by key; None: it is removed."""
    if event.action not in _REMOVALS:
        return {event.key: _childless(event.node)}
    gone = known.get(event.key)
    if gone is not None and not gone.dir:
        return {event.key: None}
    # A directory, perhaps one above the watched one, is removed with all nodes in it.
    return dict.fromkeys(key for key in known if key == event.key or _is_below(key, event.key))


def _identity(node: "Node | None") -> "tuple[Any, ...]":
    """Return the properties that only a write changes; the remaining ttl is none of them."""
    return () if node is None else (node.value, node.dir, node.modified_index, node.created_index)


def _is_below(key: str, directory: str) -> bool:
    return key.startswith(directory if directory == "/" else directory + "/")


def _difference(known: "Mapping[str, Node]", found: "Mapping[str, Node]", since: int,
                index: int) -> "Iterator[EtcdResult]":
    """Yield events that lead from the nodes `known` before `since` to those `found` at `index`.

    After a restore a node may differ although its index is lower than `since`.
    """
    # Directories that appear together with the first key in them have no event.
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
    """Call `function` on a thread and return its result; as asyncio.to_thread, but cancellable.

    Cancelling the task cancels a Scope around the call, and the task continues when the call has
    ended: within milliseconds, or at the end of a function that waits for other things.  Each call
    has its own thread, so that a hundred watches do not block another call.

        async with asyncio.timeout(5):
            await to_thread(client.get, "k", quorum=True)
            await to_thread(lock.acquire)
    """
    # Its import takes as long as all others together, and programs with tasks have it already.
    import asyncio

    scope, context = Scope(), contextvars.copy_context()

    def run() -> "_T":
        with scope:
            return context.run(function, *args, **kwargs)

    done = asyncio.wrap_future(_start_thread("pyetcd-to-thread", run))
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        scope.cancel()
        await asyncio.wait([done])
        done.exception()                            # retrieved, or asyncio would report it
        raise


async def each(items: "Iterable[_T]") -> "AsyncIterator[_T]":
    """Iterate in asyncio over a watch, or any iterable that waits; close it at the end.

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
    """The result of `Client.watch`; iterate over it for this change and all later ones."""

    def __init__(self, change: EtcdResult, later: Callable[[int], Watch]) -> None:
        self.__dict__.update(change.__dict__, _later=later)

    def __iter__(self) -> "Iterator[EtcdResult]":
        yield self
        with self.__dict__["_later"](self.modified_index + 1) as later:
            yield from later

    def __reduce__(self) -> "tuple[Any, ...]":
        # A copy, perhaps in another process, has no client to continue with.
        plain = {name: value for name, value in self.__dict__.items() if name != "_later"}
        return EtcdResult, (), plain


class _Watching(_Keys):
    def read(self, key: str, *, recursive: "bool | None" = None, wait: bool = False,
             waitIndex: "int | None" = None, sorted: "bool | None" = None, quorum: "bool | None" = None,
             timeout: "float | None" = None) -> EtcdResult:
        """Return the node at `key`, or with `wait` its next change, with python-etcd's options.

        waitIndex  the first change to return; None: the next one from now on
        timeout    seconds; 0: no limit, as in python-etcd; None: the client's read_timeout with
                   `wait`, else as in `get`.  Raises WatchTimeout
        """
        if not wait:
            return self.get(key, recursive=bool(recursive), sorted=bool(sorted),
                            quorum=bool(quorum), timeout=math.inf if timeout == 0 else timeout)
        limit = self.read_timeout if timeout is None else timeout
        return self.watch(key, waitIndex, limit or math.inf, recursive)

    def watch(self, key: str, index: "int | None" = None, timeout: "float | None" = None,
              recursive: "bool | None" = None) -> WatchedChange:
        """Return the next change of `key` (with `recursive`, also of what lies below).

        index    the first change to return, such as the last modified_index + 1; None: from now on
        timeout  seconds to wait; None: no limit; 0: return a change since `index`, do not wait.
                 Raises WatchTimeout

        Iterate over the result for this change and all later ones.  Raises EventIndexCleared if
        `index` is more than 1000 changes back.
        """
        if self._is_replaced():                     # the program's own method sends one request
            query = {"wait": True, "waitIndex": index, "recursive": bool(recursive) or None}
            change = self._keys_call("GET", key, query=query, timeout=timeout)
        else:
            with self.watcher(key, recursive=bool(recursive), index=index, timeout=timeout,
                              relist=False) as events:
                change = next(events)
        return WatchedChange(change, lambda later: self.watcher(
            key, recursive=bool(recursive), index=later))

    def watcher(self, key: str, *, recursive: bool = False, index: "int | None" = None,
                timeout: "float | None" = None, relist: bool = True) -> Watch:
        """Return an endless iterator over the changes of `key`; see Watch."""
        return Watch(self, key, recursive=recursive, index=index, relist=relist, timeout=timeout)

    def eternal_watch(self, key: str, index: "int | None" = None,
                      recursive: "bool | None" = None) -> "Iterator[EtcdResult]":
        """Yield the changes of `key` without end; `watcher` returns a cancellable iterator."""
        while self._is_replaced():
            change = self.watch(key, index, math.inf, recursive)
            index = change.modified_index + 1
            yield change
        with self.watcher(key, recursive=bool(recursive), index=index) as events:
            yield from events


# ============================================================================
# client/client -- The Client class: members, status, and requests without a verb of their own.
# ============================================================================


_HEALTH_STATUSES: "frozenset[int]" = frozenset((200, 503))    # /health, /v2/members/leader


def _as_reply(answer: Any) -> _Reply:
    """Return a reply that the program obtained by other means, such as urllib3."""
    if isinstance(answer, _Reply):
        return answer
    headers = answer.headers if hasattr(answer, "headers") else answer.getheaders()
    return _Reply(answer.status, CaseInsensitiveDict(headers), answer.data)


def _parse_version(reply: _Reply) -> "dict[str, str]":
    text = reply.body.decode("utf-8", "replace").strip()
    if text.startswith("etcd "):                    # etcd 2.0 answers "etcd 2.0.13"
        return {"etcdserver": text[5:]}
    return {str(name): str(value) for name, value in _parse_object(reply).items()}


class _Cluster(_Caller):
    _MGET, _MPUT, _MPOST, _MDELETE = "GET", "PUT", "POST", "DELETE"     # python-etcd's names

    # -- members

    def member_list(self) -> "list[Member]":
        """Return the members of the cluster, ordered by id."""
        return self._perform(_Call("GET", f"{self.version_prefix}/members", _parse_members))

    def leader_member(self) -> "Member | None":
        """Return the leader known to the replying member; None during an election."""
        return self._perform(_Call(
            "GET", f"{self.version_prefix}/members/leader",
            lambda reply: Member.from_json(_parse_object(reply)) if reply.status == 200 else None,
            statuses=_HEALTH_STATUSES))

    def member_add(self, peer_urls: "str | Iterable[str]") -> Member:
        """Add a member before it starts.  Raises HttpError 409 if another one has such a URL."""
        return self._perform(self._members_call(
            "POST", "", peer_urls, lambda reply: Member.from_json(_parse_object(reply))))

    def member_update(self, id: str, peer_urls: "str | Iterable[str]") -> None:
        """Change the peer URLs of a member.  Raises KeyNotFound."""
        self._perform(self._members_call("PUT", f"/{id}", peer_urls, _keep_reply))

    def member_remove(self, id: str) -> None:
        """Remove a member.  Raises KeyNotFound; HttpError 410 if it is removed already."""
        path = f"{self.version_prefix}/members/{id}"
        self._perform(_Call("DELETE", _target(path, {}), _keep_reply))

    # -- status of the replying member

    def statistics(self, name: str = "self") -> "dict[str, Any]":
        """Return statistics of the member: `self`, `store` or (from the leader only) `leader`."""
        if name not in ("self", "store", "leader"):
            raise EtcdValueError(f"no such statistics: {name!r}; there are self, store and leader")
        return self._perform(_Call("GET", f"{self.version_prefix}/stats/{name}", _parse_object))

    def server_version(self) -> "dict[str, str]":
        """Return {"etcdserver": ..., "etcdcluster": ...} of the replying member."""
        return self._perform(_Call("GET", "/version", _parse_version))

    def health(self, endpoint: "str | None" = None) -> bool:
        """Return whether a server (default: the one in use) is healthy.  Raises TransportError."""
        # A string in 2.x and 3.4, a boolean in the "nhealth" form that etcdctl accepts too.
        call = _Call("GET", "/health", lambda reply: _parse_object(reply)["health"] in (
            "true", True), statuses=_HEALTH_STATUSES)
        with Scope(self.total_timeout, self.scope) as scope:
            if endpoint is None:
                self._discover_endpoints(scope.deadline)
            base_url = self.endpoints.current if endpoint is None else _base_url(endpoint)
            return self._attempt(base_url, call, scope.deadline)

    # -- properties of python-etcd: each sends a request, except for the last six

    @property
    def machines(self) -> "list[str]":
        """Client URLs of all members."""
        return self._perform(_Call(
            "GET", f"{self.version_prefix}/machines",
            lambda reply: reply.body.decode("utf-8", "replace").replace(",", " ").split()))

    @property
    def members(self) -> "dict[str, dict[str, Any]]":
        """The members in the API's JSON, by id."""
        return {member.id: dict(member.raw) for member in self.member_list()}

    @property
    def leader(self) -> "dict[str, Any]":
        """The leader in the API's JSON.  Raises LeaderElectionInProgress."""
        leader = self.leader_member()
        if leader is None:
            raise LeaderElectionInProgress("there is no leader at the moment")
        return dict(leader.raw)

    @property
    def stats(self) -> "dict[str, Any]":
        return self.statistics()

    @property
    def leader_stats(self) -> "dict[str, Any]":
        return self.statistics("leader")

    @property
    def store_stats(self) -> "dict[str, Any]":
        return self.statistics("store")

    @property
    def version(self) -> str:
        return self.server_version().get("etcdserver", "")

    @property
    def cluster_version(self) -> str:
        """The version that all members support; "" from etcd 2.0."""
        return self.server_version().get("etcdcluster", "")

    @property
    def base_uri(self) -> str:
        return self.endpoints.current

    @property
    def protocol(self) -> str:
        return urlsplit(self.base_uri).scheme

    @property
    def host(self) -> str:
        return urlsplit(self.base_uri).hostname or ""

    @property
    def port(self) -> int:
        parts = urlsplit(self.base_uri)
        return parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def expected_cluster_id(self) -> "str | None":
        return self.cluster_id

    @expected_cluster_id.setter
    def expected_cluster_id(self, cluster_id: "str | None") -> None:
        self.cluster_id = cluster_id

    # -- requests without a verb

    def api_execute(self, path: str, method: str, params: "Mapping[str, Any] | None" = None,
                    timeout: "float | None" = None) -> _Reply:
        """Send any request and return the reply: `status`, `headers`, `data`.

        path     begins with a slash and the version prefix
        params   query of a GET or DELETE, form of a PUT or POST
        timeout  seconds in all; None: the client's; 0: no limit, as in python-etcd

        Raises the errors of the verbs; WatchTimeout for a GET with the parameter `wait`.

        If a subclass or an attribute of the client replaces this method, all verbs call it (those
        with JSON `api_execute_json`), except for `watcher` and its users.
        """
        given = {} if params is None else {
            name: value if isinstance(value, bool) else "" if value is None else _text(value)
            for name, value in params.items()}
        if method in ("GET", "DELETE"):
            return self._execute(path, method, timeout, query=given)
        return self._execute(path, method, timeout, body=_encode_fields(given).encode())

    def api_execute_json(self, path: str, method: str, params: Any = None,
                         timeout: "float | None" = None) -> _Reply:
        """Send any request with `params` as JSON and return the reply."""
        body = json.dumps(params).encode()
        return self._execute(path, method, timeout, body=body, content_type=_JSON_TYPE)

    def _execute(self, path: str, method: str, timeout: "float | None", *,
                 query: "Mapping[str, _Field]" = MappingProxyType({}), body: "bytes | None" = None,
                 content_type: str = _Call.content_type) -> _Reply:
        if not path.startswith("/"):
            raise EtcdValueError("the path begins with a slash")
        if method not in ("GET", "PUT", "POST", "DELETE"):
            raise EtcdValueError(f"HTTP method {method} is not one of the API")
        return super()._perform(_Call(
            method, _target(path, query), _keep_reply, body, content_type,
            math.inf if timeout == 0 else timeout, waits=query.get("wait") in (True, "true")))

    def _is_replaced(self, name: str = "api_execute") -> bool:
        return name in self.__dict__ or getattr(type(self), name) is not getattr(Client, name)

    def _perform(self, call: "_Call[_T]") -> _T:
        as_json = call.content_type == _JSON_TYPE and call.form is not None
        name = "api_execute_json" if as_json else "api_execute"
        if not self._is_replaced(name):
            return super()._perform(call)
        path, _, text = call.target.partition("?")
        given: dict[str, Any] = {}
        if call.form is not None:
            text = call.form.decode()
        if as_json:
            given["params"] = json.loads(text)
        elif text or path.startswith(self.key_endpoint):
            given["params"] = dict(parse_qsl(text, True, errors="surrogateescape"))
            if call.method == "GET":
                given["timeout"] = 0 if call.timeout == math.inf else call.timeout
        answer = getattr(self, name)(unquote(path, errors="surrogateescape"), call.method, **given)
        return self._interpret(self.base_uri, call, _as_reply(answer))

    def _members_call(self, method: str, path: str, peer_urls: "str | Iterable[str]",
                      parse: Callable[[_Reply], _T]) -> "_Call[_T]":
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
    Client(srv_domain="example.org")                the servers in DNS (needs dnspython)
    Client.from_env()                               the servers in ETCDCTL_*

    port, protocol       defaults for hosts without them
    version_prefix       begins all paths except for /version and /health
    cert, ca_cert        files: client certificate, or a pair with its key; trusted authorities
    verify               False: do not verify the server's certificate
    username, password   sent to the endpoints with every request
    proxies              {"http": url, "https": url}; the environment is ignored
    connect_timeout      seconds to make a connection
    read_timeout         seconds for each silence of the server; 0 for no limit
    total_timeout        seconds for a call over all endpoints; None for no limit
    allow_reconnect      False: one endpoint, one attempt.  True: as `sync`
    retry                False: one attempt for each endpoint
    allow_redirect       follow redirects of reads, and those of writes that were not executed
    sync                 use the URLs that the members publish, too; never with use_proxies
    expected_cluster_id  refuse other clusters; None: the first cluster that replies
    per_host_pool_size   idle connections to keep
    lock_prefix          directory of the locks
    session_timeout      seconds without a reply until `state` is LOST
    on_state             called with the new `state`, see add_listener

    Keys methods return an EtcdResult and raise an EtcdError.  The leading slash of a key is
    optional.  Nothing is sent before the first call.

    Thread: any.  Concurrent calls use separate connections.
    """


# ============================================================================
# recipes/basics -- Common parts of the recipes.
# ----------------------------------------------------------------------------
# A write carries a uuid, so that a read tells whether it was applied.  A lease is counted from
# before its request was sent, on a clock of this machine that runs on while the machine sleeps, and
# less a margin.  A waiter watches one key, and reads again after every event, timeout and error, so
# that a lost event costs only time.
# ============================================================================


LEASE_TTL_S = 30
CREATE_TRIES = 5                # of a file that expires each time before it is read
CALL_TIMEOUT_S = 8.0            # of one request; above the 7 s after which etcd gives up on a write
OUTAGE_S = 30.0                 # how long a recipe retries while no server replies
WAIT_SLICE_S = 20.0             # a waiter reads again after this time without an event
TIDY_S = 0.5                    # for the cleanup after a call without success

_LostCallback = Optional[Callable[[], object]]


def _clock() -> float:
    """Return seconds that count on while the machine sleeps, if the system supports that."""
    clock_id = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock_id is None else time.clock_gettime(clock_id)


def _call_back_in_background(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of the program on a thread of a recipe; even SystemExit is only logged."""
    try:
        return _call_back(function, *args)
    except SystemExit:
        _log.error("%r raised SystemExit, which ends no process from this thread", function)
        return None


def _recipe_key(key: str) -> str:
    if "." in key.split("/") or ".." in key.split("/") or not key.strip("/"):
        raise ValueError(f"{key!r} names no key: it needs a part, and none that is . or ..")
    return clean_key(key)


def _checked_ttl(ttl: int) -> int:
    if ttl < 1:
        raise ValueError("ttl is seconds, at least 1")
    return ttl


# Objects that a forked child must reset, by identity.
_inherited: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


def _reset_after_fork() -> None:
    """In a forked child: forget what the parent holds, and locks that no thread releases."""
    for recipe in list(_inherited.values()):
        recipe._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


# -- waiting


class _Wait(NamedTuple):
    """The event to wait for before the next read."""

    key: str
    since: int                                      # after this index
    below: "Callable[[Result], bool] | None" = None    # events below `key` of which this holds


class _CallScope(Scope):
    """The scope of one call of a recipe.

    The block ends without an exception, unless a write is in doubt, after `cancel` of the recipe
    and when the time ends during a read after the first one.  It raises Cancelled after a
    cancellation of an outer scope, and after `client.close`.

    quiet   False: the block always raises
    waited  True after the first read, which found a reason to wait
    """

    __slots__ = ("waited", "_quiet", "_siblings")

    def __init__(self, recipe: "_Recipe", timeout: "float | None", *, quiet: bool = True) -> None:
        super().__init__(timeout, recipe.client.scope)
        self.waited = False
        self._quiet = quiet
        self._siblings = recipe._scopes

    def __enter__(self) -> "_CallScope":
        self._siblings[self] = None
        super().__enter__()
        return self

    def __exit__(  # type: ignore[override]
        self, _: object, error: "BaseException | None", *__: object,
    ) -> bool:
        super().__exit__()
        self._siblings.pop(self, None)
        if not self._quiet or not isinstance(error, EtcdError) or error.maybe_applied:
            return False
        if isinstance(error, Cancelled):
            return not any(scope.cancelled for scope in self._within)
        return (self.waited and isinstance(error, ConnectionFailed)
                and not isinstance(error, WatchTimeout) and time.monotonic() >= self.deadline)

    def wait_s(self, longest_s: float = WAIT_MAX_S) -> float:
        """Return how long to wait for other clients; 0: no longer.  Raises Cancelled."""
        self.waited = True
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

    def wait_for_event(self, client: Client, wait: _Wait, longest_s: float) -> bool:
        """Wait, at most until an event; return whether there is time for another read."""
        wait_s, below = self.wait_s(longest_s), wait.below
        if not wait_s:
            return False
        try:
            with client.watcher(wait.key, recursive=below is not None, index=wait.since + 1,
                                timeout=wait_s, relist=False) as events:
                for event in events:
                    if below is None or below(event):
                        break
        except (WatchTimeout, EventIndexCleared):
            pass
        except EtcdError as error:
            if not is_endpoint_failure(error):
                raise
            with Scope(wait_s) as scope:
                scope.wait(0.2)                     # then the read tells whether the failure lasts
        return self.wait_s() > 0


class _Recipe:
    def __init__(self, client: Client, path: str = "") -> None:
        self.client = client
        self.path = path
        self._scopes: dict[_CallScope, None] = {}   # of the present calls
        _inherited[id(self)] = self

    def cancel(self) -> None:
        """End the waiting calls of this object as if their time was over.  Thread: any."""
        for scope in list(self._scopes):
            scope.cancel()

    def _call_scope(self, timeout: "float | None") -> _CallScope:
        return _CallScope(self, timeout)

    def _poll(self, scope: _CallScope, read: "Callable[[], tuple[_T | None, _Wait]]",
              longest_s: float = WAIT_SLICE_S) -> "_T | None":
        """Return the first result of `read` that is not None; None when the time is over.

        `read` runs again after the event that it names, and after `longest_s`.
        """
        while True:
            result, wait = read()
            if result is not None or not scope.wait_for_event(self.client, wait, longest_s):
                return result

    def _after_fork(self) -> None:
        self._scopes = {}


@contextlib.contextmanager
def _cleanup_scope() -> "Iterator[None]":
    """Give a cleanup TIDY_S seconds of its own, even when the time of the call is over."""
    outer, _context.scope = _context.scope, None
    try:
        with Scope(TIDY_S):
            yield
    finally:
        _context.scope = outer


def _with_retries(client: Client, attempt: Callable[[], _T], patience_s: "float | None" = None, *,
                  idempotent: bool = True) -> _T:
    """Repeat a call while no server replies; `maybe_applied` of the error covers all attempts."""
    unsure, pause_s = False, 0.0
    with Scope(OUTAGE_S if patience_s is None else patience_s, client.scope) as scope:
        while True:
            try:
                if pause_s:
                    scope.wait(pause_s * random.uniform(0.5, 1.0))
                with Scope(CALL_TIMEOUT_S):
                    return attempt()
            except EtcdError as error:
                may_pass = is_endpoint_failure(error) and (idempotent or not error.maybe_applied)
                unsure = unsure or error.maybe_applied
                pause_s = min(2 * pause_s, 1.0) or 0.05
                if not may_pass or scope.cancelled or scope.left_s() <= pause_s:
                    answered = not may_pass and not isinstance(error, Cancelled)
                    error.maybe_applied = error.maybe_applied or (unsure and not answered)
                    raise


def retry(client: Client, function: Callable[[], _T], *, timeout: "float | None" = None,
          idempotent: bool = False) -> _T:
    """Call `function` until it returns, while no server replies; return its result.

        retry(client, lambda: client.set("/a", "1"), timeout=60, idempotent=True)

    timeout     seconds in all; None: OUTAGE_S; 0: call it once
    idempotent  repeat it even if its write may have been applied; else raise that error

    A reply of etcd, such as KeyNotFound, is raised at once.
    """
    return function() if timeout == 0 else _with_retries(
        client, function, timeout, idempotent=idempotent)


# -- reading


def _read(client: Client, key: str, *, recursive: bool = False) -> Result:
    return _with_retries(client, lambda: client.get(key, recursive=recursive, quorum=True))


def _children(client: Client, directory: str) -> "tuple[list[Node], int]":
    """Return the children of a directory in the order of creation, and the index of the read."""
    try:
        found = _read(client, directory)
    except KeyNotFound as error:
        return [], error.index
    return sorted(found.nodes, key=lambda node: node.created_index), found.etcd_index


def _entries(client: Client, line: str) -> "tuple[list[Node], int]":
    """Return the in-order files of a directory in their order, and the index of the read.

    Other files and directories are skipped: names of locks may contain slashes.
    """
    nodes, index = _children(client, line)
    return sorted(filter(_is_entry, nodes), key=_number), index


def _is_entry(node: Node) -> bool:
    """Return whether etcd chose the name of a file: the index of its creation.

    In etcd 2.3 the name has 20 digits.  In earlier versions it equals the created index, until an
    unconditional write renews the file, as by python-etcd.
    """
    name = _name(node.key)
    return not node.dir and name.isascii() and name.isdigit() and (
        len(name) == 20 or name == str(node.created_index))


def _number(node: Node) -> int:
    return int(_name(node.key))


def _name(key: str) -> str:
    return key.rpartition("/")[2]


# -- writing


def _create_once(client: Client, key: str, value: str, ttl: "int | None") -> "tuple[Node, bool]":
    """Create a file with a unique value.  Raises NodeExists for a file with another value.

    If an earlier attempt succeeded, the value shows it, and the second result is False.  A file
    that expires before it can be read is created again, at most CREATE_TRIES times in all.
    """
    tries = 0
    while True:
        try:
            return _with_retries(client, lambda: client.create(key, value, ttl=ttl)).node, True
        except NodeExists as exists:
            tries += 1
            try:
                node = _read(client, key).node
            except KeyNotFound:         # expired meanwhile
                if tries < CREATE_TRIES:
                    continue
                raise exists from None
            if node.value == value:
                return node, False
            raise


def _append_once(client: Client, directory: str, value: str, ttl: "int | None",
                 find: "Callable[[], Node | None]") -> "tuple[Node, bool]":
    """Create an in-order file with a unique value.

    After an unknown fate `find` looks for the file; if it finds none the file is written again.
    If the first request arrives even later there are two; the second result is False then.
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
    return _with_retries(client, attempt), sure


def _remove(client: Client, key: str, value: str) -> None:
    """Delete a file with this value; if that fails, the file is left to its ttl."""
    with contextlib.suppress(EtcdError):
        _with_retries(client, lambda: client.compare_and_delete(key, prev_value=value))


# ============================================================================
# recipes/leases -- Leases: keys that live as long as their owner.
# ============================================================================


EXPIRY_MARGIN = 0.1             # share of a ttl by which a lease ends early on the local clock
LEAVE_S = 2.0                   # for removing the file of a lease that is stopped

_HeartbeatType = TypeVar("_HeartbeatType", bound="Heartbeat")
_GONE = (KeyNotFound, CompareFailed, NotFile, NotDir)   # replies to a renewal of a lost file


class Heartbeat:
    """Keeps an existing file from expiring, without events for its watchers.

        with Heartbeat(client, "/jobs/7/running", ttl=10) as heartbeat:
            ...
            heartbeat.is_held           # False: the file may be gone

    ttl      seconds, at least 1; renewed after a third of it
    on_lost  called once, on the thread of the heartbeat, when `is_held` becomes False without
             `stop`: no server could renew the file in time, it is gone, its value has changed, or
             the client was closed

    Guarantee: `is_held` turns False before a server lets the file expire, and stays False.  It
    depends on the local clock only, whatever the thread and the network do.
    Limit: a tenth of the ttl must cover the difference between the wall clocks of the members,
    since one of them sets the instant of expiry and another one acts on it.  `is_held` holds for
    the present moment: later writes need a fencing token.  It sends no request: a deletion of the
    file shows at the next renewal, after a third of the ttl; `renew` checks now.  A forked child
    holds nothing, and cannot start what its parent started.  etcd before 2.3 cannot refresh:
    there each renewal is a write that watchers see.

    Thread: any.  It runs a daemon thread, until `stop` or the end of the client.
    """

    def __init__(self, client: Client, key: str, ttl: int = LEASE_TTL_S, *,
                 on_lost: _LostCallback = None) -> None:
        self.client = client
        self.key = _recipe_key(key)
        self.ttl = _checked_ttl(ttl)
        self._on_lost = on_lost
        self._value = ""
        self._index = 0                             # the last known modified index
        self._has_refresh = False                   # the server is known to support refresh
        self._due_at = 0.0                          # of the next renewal
        self._over = True                           # stopped or lost, for ever
        self._expires_at = 0.0
        self._pid = 0                               # of the process that started it
        self._stopped = False
        self._scope = Scope()                       # of the thread: cancelled by `stop`
        self._thread: threading.Thread | None = None
        self._after_fork()
        _inherited[id(self)] = self

    @property
    def is_held(self) -> bool:
        """Whether the file certainly exists."""
        with self._lock:
            self._over = self._over or _clock() >= self._expires_at
            return not self._over and self._pid == os.getpid()

    alive = is_held

    @property
    def value(self) -> str:
        return self._value

    def start(self: _HeartbeatType) -> _HeartbeatType:
        """Take the file, now and from now on.  Raises KeyNotFound; EtcdError without a server."""
        if self._pid not in (0, os.getpid()):
            raise RuntimeError(f"{self.key} belongs to the parent process: make another object")
        if self._thread is not None and self._thread.is_alive() and not self._stopped:
            return self                             # it runs
        self._acquire_file()
        self._stopped, self._scope = False, Scope(None, self.client.scope)
        self._thread = threading.Thread(
            target=self._run, name=f"pyetcd-heartbeat {self.key}", daemon=True)
        self._thread.start()
        return self

    def renew(self, ttl: "int | None" = None) -> bool:
        """Renew the file now; return whether it is held.

        ttl  seconds from now on; None: as before

        Raises EtcdError if no server replies; the heartbeat retries then.
        """
        if ttl is not None:
            self.ttl = _checked_ttl(ttl)
        if not self.is_held:
            return False
        try:
            self._renew()
        except _GONE:
            self._lose()
        finally:
            self._wake.set()                        # the next renewal may be due earlier
        return self.is_held

    def stop(self) -> bool:
        """Stop renewing; return whether the file was held until now.

        A Heartbeat leaves the file to its ttl; a Lease tries to remove it, for LEAVE_S.
        """
        held = self.is_held
        if self._pid != os.getpid():                # in a forked child: the parent holds it
            return False
        self._end()
        outer = _context.scope                      # its end must not leave the file behind
        over = outer is not None and (
            outer.cancelled or time.monotonic() + TIDY_S >= outer.deadline)
        with _cleanup_scope() if over else Scope(LEAVE_S):
            self._remove_file()
        return held

    def __enter__(self: _HeartbeatType) -> _HeartbeatType:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()               # guards _over and _expires_at; a leaf
        self._renewing = threading.Lock()           # one renewal at a time; guards _index
        self._wake = threading.Event()              # for the thread to check its state

    def _acquire_file(self) -> None:
        """Find or create the file and set the time of its expiry."""
        node = _read(self.client, self.key).node
        self._value, self._index = node.value or "", node.modified_index
        self._adopt()

    def _adopt(self) -> None:
        """Renew a file with an unknown time of expiry."""
        sent_at = _clock()
        self._index = _with_retries(self.client, self._renew_if_ours).modified_index
        self._granted_at(sent_at)

    def _remove_file(self) -> None:
        """Remove the file after the last renewal; a heartbeat leaves it to its ttl."""

    def _granted_at(self, sent_at: float) -> None:
        """Start a new ttl, counted from before its request was sent."""
        with self._lock:
            self._pid, self._over = os.getpid(), False
            self._expires_at = sent_at + self.ttl * (1 - EXPIRY_MARGIN)
        self._due_at = sent_at + self.ttl / 3

    def _lose(self) -> None:
        with self._lock:
            self._over = True
        self._wake.set()

    def _end(self) -> None:
        """End the thread, also during a renewal, and wait for it."""
        self._stopped = True
        self._lose()
        self._scope.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            with self._scope as scope:
                scope.attach(self._wake.set)
                while self._renew_until_lost(scope) and self._regain(scope):
                    pass
        except Cancelled:                           # by `stop` or `client.close`
            self._lose()
            if not self._stopped:
                self._report_loss()

    def _report_loss(self) -> None:
        if self._on_lost is not None:
            _call_back_in_background(self._on_lost)

    def _regain(self, _scope: Scope) -> bool:
        """Handle a loss; return whether the file is held again."""
        self._report_loss()
        return False

    def _renew_until_lost(self, scope: Scope) -> bool:
        """Renew the file; return True when it is lost, False after `stop`.  Raises Cancelled."""
        while self.is_held:
            self._wake.wait(max(0.0, min(self._due_at, self._expires_at) - _clock()))
            self._wake.clear()
            scope.left_s()
            if self.is_held and _clock() >= self._due_at:
                try:
                    self._renew()
                except _GONE:
                    break
                except Cancelled:
                    raise
                except EtcdError:                   # retried until it expires
                    self._due_at = _clock() + min(0.5, self.ttl / 10)
        self._lose()
        return not self._stopped

    def _renew(self) -> None:
        """Renew the ttl once.  Raises CompareFailed or KeyNotFound if the file is lost."""
        with self._exclusive():
            sent_at = _clock()
            timeout_s = max(0.1, min(CALL_TIMEOUT_S, self.ttl / 3, self._expires_at - sent_at))
            with Scope(timeout_s):
                self._index = self._renew_if_ours().modified_index
            with self._lock:                        # a reported loss is final
                if not self._over and _clock() < self._expires_at:
                    self._expires_at = sent_at + self.ttl * (1 - EXPIRY_MARGIN)
            self._due_at = sent_at + self.ttl / 3

    @contextlib.contextmanager
    def _exclusive(self) -> "Iterator[None]":
        """Exclude other renewals, which would change the index that this one compares."""
        if not self._renewing.acquire(timeout=CALL_TIMEOUT_S):
            raise RequestTimeout("another renewal is under way", endpoint="")
        try:
            yield
        finally:
            self._renewing.release()

    def _renew_if_ours(self) -> Result:
        """Send a renewal; earlier ones whose replies were lost may have changed the index."""
        while True:
            try:
                return self._send_renewal()
            except CompareFailed:
                node = self.client.get(self.key, quorum=True).node
                if node.value != self._value or node.modified_index == self._index:
                    raise                           # a file of another owner
                self._index = node.modified_index

    def _send_renewal(self, *, announce: bool = False) -> Result:
        """Renew on condition that the file has the known index.

        A renewal that arrives after it was given up and repeated thus cannot shorten a longer ttl.
        """
        fields: dict[str, _Field] = {
            "ttl": self.ttl, "prevValue": self._value or None, "prevIndex": self._index}
        if announce:
            return self.client._put(self.key, {**fields, "value": self._value})
        fields["refresh"] = True
        if not self._has_refresh:
            try:                                    # the value: etcd before 2.3 would empty it
                return self.client._put(self.key, {**fields, "value": self._value or " "})
            except RefreshValue:
                self._has_refresh = True
        return self.client._put(self.key, fields)


class Lease(Heartbeat):
    """A file that exists as long as this process keeps it: created by start, removed by stop.

        with Lease(client, "/hosts/a", "10.0.0.1", ttl=10) as lease:
            ...

    value    identifies the owner: two leases of one key need different values; None: a uuid

    Guarantee: created once, even if replies are lost; start raises NodeExists while the key has
    another owner.  `is_held` as in Heartbeat.  After a crash, or the end of the client, the file
    remains for at most its ttl, and the half second that etcd takes to notice.
    Limit: as for Heartbeat.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, value: "str | None" = None,
                 ttl: int = LEASE_TTL_S, *, on_lost: _LostCallback = None) -> None:
        if value == "":
            raise ValueError("etcd cannot compare with an empty value")
        self._given_value = value
        super().__init__(client, key, ttl, on_lost=on_lost)

    def _after_fork(self) -> None:
        super()._after_fork()
        # A uuid for each process: with the parent's the child would own the parent's file.
        self._value = self._given_value or uuid.uuid4().hex

    def _acquire_file(self) -> None:
        sent_at = _clock()
        self._index, fresh = self._create_file()
        if fresh and _clock() - sent_at < self.ttl / 3:
            self._granted_at(sent_at)
            return
        try:
            self._adopt()
        except (KeyNotFound, CompareFailed) as error:
            raise LockExpired("expired before it was known to be made", cause=self.key) from error

    def _create_file(self) -> "tuple[int, bool]":
        """Create the file; return its index, and whether its ttl is new."""
        node, fresh = _create_once(self.client, self.key, self._value, self.ttl)
        return node.modified_index, fresh

    def _remove_file(self) -> None:
        _remove(self.client, self.key, self._value)


class _Entry(Lease):
    """An entry in a line of contenders: an in-order file, served in the order of its number."""

    def __init__(self, client: Client, line: str, label: str, ttl: int) -> None:
        super().__init__(client, line, uuid.uuid4().hex + label, ttl)
        self.line = self.key
        self._sure = True                           # that no second file of this entry exists

    @property
    def number(self) -> int:
        """The index at which the entry was created."""
        return int(self.key.rpartition("/")[2])

    def announce(self) -> None:
        """Renew the file with an event for its watchers; a failure is harmless."""
        with contextlib.suppress(EtcdError), self._exclusive():
            self._index = self._send_renewal(announce=True).modified_index

    def _acquire_file(self) -> None:
        try:
            super()._acquire_file()
        except BaseException:                       # the file may exist nevertheless
            self._sure = False
            with _cleanup_scope():
                self._remove_file()
            raise

    def _ours(self) -> "list[Node]":
        return [node for node in _entries(self.client, self.line)[0] if node.value == self._value]

    def _create_file(self) -> "tuple[int, bool]":
        node, self._sure = _append_once(
            self.client, self.line, self._value, self.ttl, lambda: next(iter(self._ours()), None))
        self.key = node.key
        return node.modified_index, self._sure

    def _remove_file(self) -> None:
        if self.key != self.line:
            super()._remove_file()
        with contextlib.suppress(EtcdError):
            for node in () if self._sure else self._ours():
                _remove(self.client, node.key, self._value)


# ============================================================================
# recipes/barriers -- Barriers and counters.
# ============================================================================


COUNTER_WRITERS = 32            # writers whose last change a counter's file records


class Barrier(_Recipe):
    """A barrier that one process closes, and whose removal releases all waiting processes.

        barrier = Barrier(client, "/maintenance")
        barrier.create()                            # close it
        barrier.wait(timeout=60)                    # in other processes: True when it is open
        barrier.remove()                            # open it

    Guarantee: wait returns True only after a moment at which the barrier did not exist.
    Limit: it stays until it is removed, unless it has a ttl.  All waiting processes wake at once.

    Thread: any.
    """

    def __init__(self, client: Client, key: str) -> None:
        super().__init__(client, _recipe_key(key))

    def create(self, ttl: "int | None" = None) -> bool:
        """Close the barrier, for at most `ttl` seconds; False if it was closed."""
        try:
            _create_once(self.client, self.path, uuid.uuid4().hex,
                         None if ttl is None else _checked_ttl(ttl))
        except NodeExists:
            return False
        return True

    def remove(self) -> bool:
        """Open the barrier; False if it was open."""
        try:
            node = _read(self.client, self.path).node
        except KeyNotFound:
            return False
        with contextlib.suppress(KeyNotFound, CompareFailed):
            # By value, since a Heartbeat may renew it; by index if another program left it empty.
            _with_retries(self.client, lambda: self.client.compare_and_delete(
                self.path, prev_value=node.value or None,
                prev_index=None if node.value else node.modified_index))
        return True

    def wait(self, timeout: "float | None" = None) -> bool:
        """Wait until it is open; False after `timeout` seconds (None: no limit) or `cancel`."""
        def read() -> "tuple[bool | None, _Wait]":
            try:
                return None, _Wait(self.path, _read(self.client, self.path).etcd_index)
            except KeyNotFound as error:
                return True, _Wait(self.path, error.index)

        with self._call_scope(timeout) as scope:
            return self._poll(scope, read) is True
        return False


class DoubleBarrier(_Recipe):
    """A barrier at which `size` participants begin together and end together, in rounds.

        barrier = DoubleBarrier(client, "/phase", size=3)
        with barrier:
            work()

    Guarantee: enter returns True only after `size` participants were present at the same time, and
    leave only after all participants of the round have left or expired.  Further participants
    form the next round.
    Limit: a participant that is cut off for longer than its ttl is removed, and enter raises
    LockExpired.  All participants need the same size.  One small file remains: a count of rounds.

    Thread: one, except for `cancel`; an object is one participant.
    """

    def __init__(self, client: Client, key: str, size: int, *, ttl: int = LEASE_TTL_S) -> None:
        if size < 1:
            raise ValueError("size is at least 1")
        super().__init__(client, _recipe_key(key))
        self.size = size
        self.ttl = _checked_ttl(ttl)
        self._entry: _Entry | None = None
        self._round = 0                             # index at which the present round began

    def enter(self, timeout: "float | None" = None) -> bool:
        """Wait for the others; False, and not inside, after `timeout` seconds or `cancel`."""
        entry, self._round = _Entry(self.client, f"{self.path}/members", "", self.ttl), 0
        try:
            with self._call_scope(timeout) as scope:
                entry.start()
                scope.waited = True                 # a later timeout returns False
                self._round = self._poll(
                    scope, lambda: self._read_round(entry), min(WAIT_SLICE_S, self.ttl)) or 0
        finally:
            if not self._round:
                with _cleanup_scope():
                    entry.stop()
        self._entry = entry
        return self._round > 0

    def leave(self, timeout: "float | None" = None) -> bool:
        """Leave, and wait until the others have left; False after `timeout` seconds."""
        if self._entry is not None:
            self._entry.stop()

        def read() -> "tuple[bool | None, _Wait]":
            members, index = _entries(self.client, f"{self.path}/members")
            inside = [node for node in members if node.created_index < self._round]
            return None if inside else True, _Wait(inside[-1].key if inside else "", index)

        with self._call_scope(timeout) as scope:
            return self._poll(scope, read, min(WAIT_SLICE_S, self.ttl)) is True
        return False

    def __enter__(self) -> "DoubleBarrier":
        if not self.enter():
            raise Cancelled("cancelled", cause=self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._entry, self._round = None, 0          # the parent is the participant

    def _read_round(self, entry: _Entry) -> "tuple[int | None, _Wait]":
        """Return the index at which the round of `entry` began, or None and the event to wait for.

        A file is written when a round is complete; the entries between two writes form a round.
        """
        key = f"{self.path}/round"
        while entry.is_held:
            try:
                found = _read(self.client, key)
                last, index = found.modified_index, found.etcd_index
            except KeyNotFound as error:
                last, index = 0, error.index
            if last > entry.number:
                return last, _Wait(key, index)
            members, _ = _entries(self.client, f"{self.path}/members")
            # By value: an append that was given up for lost may have arrived.
            if len({node.value for node in members if node.created_index > last}) < self.size:
                return None, _Wait(key, index)
            self._begin_round(last)
        raise LockExpired("expired while it waited", cause=entry.key)

    def _begin_round(self, last: int) -> None:
        """Write that a round is complete, unless another participant does."""
        key, mark = f"{self.path}/round", uuid.uuid4().hex
        with contextlib.suppress(CompareFailed, NodeExists, KeyNotFound):
            if last:
                _with_retries(self.client, lambda: self.client.compare_and_swap(
                    key, mark, prev_index=last))
            else:
                _create_once(self.client, key, mark, None)


class Counter(_Recipe):
    """A number that many processes change.

        counter = Counter(client, "/tickets")
        counter.add()                               # 1, once in the whole cluster
        counter.add(-1); counter.value

    The file holds the number, and the last change of each of its COUNTER_WRITERS latest writers,
    where an object finds a change of its own whose reply was lost.

    Guarantee: each add that returns was applied once, and returns its sum.
    Limit: an error with maybe_applied=True after OUTAGE_S seconds without a server, or if more
    than COUNTER_WRITERS others changed the number before this object could read it.  Each change
    is a write of the whole cluster: suitable for hundreds per second, not for thousands.

    Thread: any; threads that share the object take turns.
    """

    _turn: "_CallScope | None"                        # guarded by _changed

    def __init__(self, client: Client, key: str, initial: int = 0) -> None:
        super().__init__(client, _recipe_key(key))
        self.initial = initial
        self._after_fork()

    @property
    def value(self) -> int:
        """The present number, by quorum.  Raises ValueError if the file holds none."""
        return self._read_number()[0]

    def add(self, amount: int = 1, *, timeout: "float | None" = None) -> int:
        """Add `amount`, and return the sum.  Raises ValueError if the file holds no number.

        timeout  seconds until an error; None: OUTAGE_S without a server; 0: TRY_S, as always

        Raises Cancelled after `cancel`.
        """
        with _CallScope(self, timeout, quiet=False) as scope:
            try:
                if not scope.wait_for(self._changed, lambda: self._take_turn(scope)):
                    raise RequestTimeout("another thread changes this counter", endpoint="")
                self._serial += 1
                return self._add(amount, f"{self._writer}.{self._serial}", scope)
            finally:
                self._end_turn(scope)
        raise AssertionError("unreachable")         # the scope is not quiet

    def _take_turn(self, scope: _CallScope) -> bool:
        self._turn = self._turn or scope
        return self._turn is scope

    def _end_turn(self, scope: _CallScope) -> None:
        with self._changed:
            if self._turn is scope:
                self._turn = None
                self._changed.notify_all()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._changed = threading.Condition()
        self._turn = None                           # this writer performs one change at a time
        self._writer = uuid.uuid4().hex[:12]        # a forked child is another writer
        self._serial = 0

    def _add(self, amount: int, tag: str, scope: _CallScope) -> int:
        unsure: EtcdError | None = None
        pause_s, deadline = 0.001, _clock() + OUTAGE_S
        while True:
            try:
                number, changes, index = self._read_number()
                if tag in changes:
                    return changes[tag]
                if unsure is not None and self._is_forgotten(changes):
                    raise unsure
                try:
                    if self._write(number + amount, tag, changes, index):
                        return number + amount
                except EtcdError as error:
                    unsure = error if error.maybe_applied else unsure
                    if not is_endpoint_failure(error) or _clock() >= deadline:
                        raise
                if not scope.wait(random.uniform(0, pause_s)):
                    raise unsure or RequestTimeout("others were faster", endpoint="")
            except EtcdError as error:              # of any request: our write may be applied
                error.maybe_applied = unsure is not None
                raise
            pause_s = min(2 * pause_s, 0.1)

    def _read_number(self) -> "tuple[int, dict[str, int], int]":
        """Return the number, the last changes with their sums, and the index."""
        try:
            node = _read(self.client, self.path).node
        except KeyNotFound:
            return self.initial, {}, 0
        number, *changes = (node.value or "").split() or [""]
        pairs = (change.split(":") for change in changes)
        return int(number), {tag: int(result) for tag, result in pairs}, node.modified_index

    def _is_forgotten(self, changes: "Mapping[str, int]") -> bool:
        """Return whether others may have displaced a change of this writer."""
        writers = {tag.partition(".")[0] for tag in changes}
        return self._writer not in writers and len(writers) >= COUNTER_WRITERS

    def _write(self, number: int, tag: str, changes: "Mapping[str, int]", index: int) -> bool:
        """Write the number on condition that the file has not changed since `index`."""
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
# recipes/locks -- Locks and semaphores.
# ============================================================================


_ContenderType = TypeVar("_ContenderType", bound="Contender")
_LABELLED = re.compile(r"[0-9a-f]{32}:")


class Contender(_Recipe):
    """The base of Lock, RWLock, Semaphore and Election: a contender in a line of entries.

    Each attempt has an entry with a uuid of its own.  Only the entries ahead can block it and no
    new ones appear there, so a contender that was admitted stays admitted until its entry is gone.

    The object is the holder, not the thread or task: a second `acquire` waits until the first one
    is released or lost.
    """

    label = ""                                      # after the uuid in the value of an entry
    _held: "_Entry | None"                         # guarded by _changed, as is _busy
    _reacquires = True                              # a lost hold may be acquired again

    def __init__(self, client: Client, line: str, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        super().__init__(client, _recipe_key(line))
        self.ttl = _checked_ttl(ttl)
        self._on_lost = on_lost
        self._blocks = threading.local()            # .entries: of the `with` blocks of a thread
        self._after_fork()

    @property
    def is_held(self) -> bool:
        """Whether it is held; False before a server could admit another contender."""
        held = self._held
        return held is not None and held.is_held

    is_acquired = is_held                           # python-etcd's name

    @property
    def token(self) -> int:
        """The fencing token, higher than that of every earlier holder; 0 if it is not held.

        Send it with every write to the protected resource, which must refuse tokens lower than
        the highest so far: they come from a holder that was suspended past its ttl.
        """
        held = self._held
        return held.number if held is not None and held.is_held else 0

    def acquire(self, blocking: bool = True, lock_ttl: "int | None" = None,
                timeout: "float | None" = None) -> bool:
        """Wait until admitted.  Return whether it is held.

        blocking  False: as timeout=0
        lock_ttl  seconds; None: the ttl of the constructor
        timeout   seconds to wait; None: no limit; 0: try once, do not wait

        False after `timeout`, and after `cancel` by another thread.  No entry remains then, nor
        after an exception (without a server, until its ttl ends).  Raises EtcdError if no server
        replied for OUTAGE_S seconds or until the timeout.

        While this object holds it, acquire waits, also in the same thread, since a thread may
        serve many tasks: RLock is re-entrant, and `renew` renews.  Only if the wait could never
        end, without a limit in the main thread, it renews as in python-etcd.
        """
        if blocking and timeout is None and self._waits_for_itself():
            return self.renew(lock_ttl)
        return self._acquire(lock_ttl, timeout if blocking else 0) is not None

    def renew(self, lock_ttl: "int | None" = None) -> bool:
        """Renew the entry now; return whether it is held.

        lock_ttl  seconds from now on; None: as before

        Unlike `is_held` it sends a request, and so notices at once that the entry was removed.
        """
        held = self._held
        return held is not None and held.renew(lock_ttl)

    def release(self, token: "int | None" = None) -> bool:
        """Release it, from any thread.  Return whether it was held until now.

        token  release only the hold with this token

        If no server replies within LEAVE_S, the entry is left to its ttl.
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

    def contenders(self) -> "list[str]":
        """Return the values of the entries in the line in their order."""
        return [node.value or "" for node in self._line()[0]]

    def __enter__(self: _ContenderType) -> _ContenderType:
        if self._waits_for_itself():
            raise RuntimeError(f"{self.path} is held by this block's own thread: use RLock")
        entry = self._acquire(None, None)
        if entry is None:
            raise LockExpired("not acquired: cancelled, or lost before", cause=self.path)
        self._blocks.entries = [*self._entered(), entry]
        return self

    def __exit__(self, *_: object) -> None:
        *self._blocks.entries, entry = self._entered()
        if entry is self._held:                     # else it was lost, and perhaps acquired again
            self.release()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._changed = threading.Condition()
        self._busy = False                          # a thread contends or holds
        self._held = None
        self._taken_by: object = None               # thread of the last acquire

    def _entered(self) -> "list[_Entry]":
        return getattr(self._blocks, "entries", [])

    def _acquire(self, lock_ttl: "int | None", timeout: "float | None") -> "_Entry | None":
        ttl = self.ttl if lock_ttl is None else _checked_ttl(lock_ttl)
        with self._call_scope(timeout) as scope:
            lost = self._take_turn(scope)
            if lost is None:
                return None
            entry = None
            try:
                for old in lost:
                    old.stop()
                entry = self._contend(ttl, scope)
            finally:
                if entry is None:
                    self._set_free()
            blocks = self._entered()                # acquired again inside of a block
            if entry is not None and blocks and not blocks[-1].is_held:
                blocks[-1] = entry
            return entry
        return None                                 # cancelled

    def _waits_for_itself(self) -> bool:
        """Return whether the main thread, outside an event loop, would wait for its own hold.

        Any other thread may serve a pool or a loop, where another task releases it.
        """
        thread = threading.current_thread()         # not its ident, which is reused
        if not self.is_held or self._taken_by is not thread:
            return False
        asyncio = sys.modules.get("asyncio")
        looping = asyncio is not None and asyncio._get_running_loop() is not None
        return thread is threading.main_thread() and not looping

    def _take_turn(self, scope: _CallScope) -> "list[_Entry] | None":
        """Wait until no thread contends for or holds this object; None when the time is over.

        Returns a lost hold that was not released, to be stopped, or [].
        """
        thread = threading.current_thread()
        if self._taken_by is thread and self.is_held and scope.wait_s():
            _log.warning("%s is held by this object, and this thread waits until it is released: "
                         "RLock may be acquired again, renew() renews", self.path)
        while scope.wait_for(self._changed, self._is_free):
            with self._changed:
                if self._is_free():
                    lost = [] if self._held is None else [self._held]
                    self._busy, self._held, self._taken_by = True, None, thread
                    return lost
        return None

    def _is_free(self) -> bool:
        held = self._held
        return not self._busy or (self._reacquires and held is not None and not held.is_held)

    def _set_free(self) -> None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def _line(self) -> "tuple[list[Node], int]":
        """Return the entries in their order, and the index of the read.

        With a label only those of this recipe; without one also those of python-etcd's lock.
        """
        nodes, index = _entries(self.client, self.path)
        if self.label:
            nodes = [node for node in nodes if _LABELLED.match(node.value or "")]
        return nodes, index

    def _blocker(self, ahead: "list[Node]") -> "str | None":
        """Return the key to watch (the line's own: for any removal); None: admitted."""
        return ahead[-1].key if ahead else None

    def _contend(self, ttl: int, scope: _CallScope) -> "_Entry | None":
        """Keep an entry in the line until admitted; None at the deadline.  Raises Cancelled."""
        entry: _Entry | None = None
        client_scope = self.client.scope
        try:
            while True:
                if entry is None or not entry.is_held:
                    entry = self._enter(entry, ttl)
                blocker, index = self._find_blocker(entry)
                if blocker is None:
                    self._held = entry
                    if entry.is_held:
                        return entry
                    self._held = None
                if not self._wait_for_blocker(scope, entry, blocker, index):
                    return None
        finally:
            if entry is not None and self._held is not entry:
                entry._end()
                if not client_scope.cancelled:
                    with _cleanup_scope():
                        entry._remove_file()

    def _enter(self, old: "_Entry | None", ttl: int) -> _Entry:
        """Append an entry to the line, in place of one that was lost."""
        if old is not None:
            old.stop()
        entry = _Entry(self.client, self.path, self.label, ttl)
        entry._on_lost = lambda: self._lost(entry)
        try:
            return entry.start()
        except Cancelled as error:
            error.maybe_applied = False             # the entry was removed, if it existed
            raise

    def _find_blocker(self, entry: _Entry) -> "tuple[str | None, int]":
        """Return the key to wait for (None: admitted; "": none, read again) and the index."""
        entries, index = self._line()
        for node in entries:
            if node.value == entry.value and node.key != entry.key:
                # An append that was given up for lost has arrived.
                with Scope(TIDY_S):
                    _remove(self.client, node.key, entry.value)
        keys = [node.key for node in entries]
        if entry.key not in keys:                   # expired or removed
            entry.stop()
            return "", index
        position = keys.index(entry.key)
        blocker = self._blocker(entries[:position])
        if blocker is None and position + 1 < len(keys):
            self._admitted(entry)
        return blocker, index

    def _admitted(self, entry: _Entry) -> None:
        """Notify the contenders behind of the admission, if the recipe needs it."""

    def _wait_for_blocker(self, scope: _CallScope, entry: _Entry, blocker: "str | None",
                          index: int) -> bool:
        """Wait for a change of `blocker` or the loss of `entry`; return whether to read again."""
        with contextlib.suppress(Cancelled), Scope() as waiting:
            entry._scope.attach(waiting.cancel)
            try:
                if blocker and entry.is_held:
                    removed = (lambda event: event.action in _REMOVALS)
                    wait = _Wait(blocker, index, removed if blocker == self.path else None)
                    scope.wait_for_event(self.client, wait, min(WAIT_SLICE_S, entry.ttl))
            finally:
                entry._scope.detach(waiting.cancel)
        return scope.wait_s() > 0

    def _lost(self, entry: _Entry) -> None:
        if self._held is entry:
            with self._changed:
                self._changed.notify_all()
            if self._on_lost is not None:
                self._on_lost()
        else:
            entry._scope.cancel()                   # it must line up again


class Lock(Contender):
    """A lock with one holder in the cluster at a time, in order of arrival.

        lock = Lock(client, "reports", ttl=10, on_lost=stop_working)
        with lock:
            write(..., fencing_token=lock.token)
        if lock.acquire(timeout=5): ...

    on_lost  called on another thread when a held lock is lost; another contender may hold it soon

    It shares its line with python-etcd's lock: in-order files under client.lock_prefix.  Unlike
    there, an entry always has a ttl and is renewed while the process lives: a crash releases the
    lock after the ttl, long work keeps it.

    Guarantee: while `is_held` is True no other contender holds it.  Lost replies, changes of the
    leader and restarts of members do not break this, and leave no second entry of one acquire for
    longer than a ttl.  A release wakes only the next contender.
    Limit: that of Heartbeat: clocks of the members differ by less than ttl / 10, and work after
    the last check of `is_held` needs `token`.

    Thread: any.  Threads and tasks that share the object exclude each other too; after a lost
    hold was acquired again, only release(token) tells the two holds apart.
    """

    def __init__(self, client: Client, lock_name: str, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        super().__init__(client, client.lock_prefix + _recipe_key(lock_name), ttl=ttl,
                         on_lost=on_lost)
        self.name = lock_name

    @property
    def uuid(self) -> str:
        """The value of the entry, if this lock is held; else empty."""
        held = self._held
        return "" if held is None else held.value

    @property
    def lock_key(self) -> str:
        """The key of the entry, if this lock is held.  Raises ValueError."""
        held = self._held
        if held is None:
            raise EtcdValueError("not held: there is no entry", cause=self.path)
        return held.key

    is_taken = Contender.is_held                    # python-etcd's name


class RLock(Lock):
    """A re-entrant Lock; each acquire needs a release.

        with lock, lock: ...                        # the holder is the thread
        lock.acquire(holder=task)                   # or any object: a task, a request

    Guarantee and limit are those of Lock.  After a loss an inner acquire returns False (`with`
    raises LockExpired) until the outer block has ended.  Tasks that share a thread need `holder`.
    """

    _reacquires = False
    _holder: object
    _depth: int                                     # acquires of the holder

    def acquire(self, blocking: bool = True, lock_ttl: "int | None" = None,
                timeout: "float | None" = None, *, holder: object = None) -> bool:
        """Acquire as Lock does, or once more; `lock_ttl` then renews.  See Lock."""
        return self._acquire(lock_ttl, timeout if blocking else 0, holder) is not None

    def _waits_for_itself(self) -> bool:
        return False

    def release(self, token: "int | None" = None) -> bool:
        """Undo one acquire; the last one releases the lock.  Return whether it was held."""
        with self._changed:
            self._depth = max(0, self._depth - 1)
            if self._depth:
                return self.is_held
            self._holder = None
        return super().release(token)

    def _after_fork(self) -> None:
        super()._after_fork()
        self._holder, self._depth = None, 0

    def _acquire(self, lock_ttl: "int | None", timeout: "float | None",
                 holder: object = None) -> "_Entry | None":
        holder = threading.current_thread() if holder is None else holder
        with self._changed:
            held = self._held if self._holder == holder else None
            self._depth += held is not None and held.is_held
        if held is not None:
            if lock_ttl is not None and held.is_held:
                with contextlib.suppress(EtcdError):    # the heartbeat retries
                    held.renew(lock_ttl)
            return held if held.is_held else None
        entry = super()._acquire(lock_ttl, timeout)
        if entry is not None:
            self._holder, self._depth = holder, 1
        return entry


class RWLock:
    """A lock for one writer or any number of readers, in order of arrival.

        lock = RWLock(client, "/config-lock")
        with lock.read_lock(): ...
        with lock.write_lock() as held: write(..., fencing_token=held.token)

    Each call of read_lock and write_lock returns a new contender, with the methods of Lock.  A
    waiting writer blocks later readers, so that it is not starved.

    Guarantee: while a write lock `is_held`, no other lock is; while a read lock `is_held`, no
    write lock is.  A waiting writer watches the entry ahead, a reader the last writer ahead.
    Limit: as for Lock.  A thread that holds one and acquires the other waits for itself.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        _recipe_key(key)
        self._contender: Callable[[type[Contender]], Contender] = lambda kind: kind(
            client, key, ttl=ttl, on_lost=on_lost)

    def read_lock(self) -> Contender:
        """Return a contender for shared access."""
        return self._contender(_Reader)

    def write_lock(self) -> Contender:
        """Return a contender for exclusive access."""
        return self._contender(_Writer)


class _Writer(Contender):
    label = ":write"


class _Reader(Contender):
    label = ":read"

    def _blocker(self, ahead: "list[Node]") -> "str | None":
        writers = [node for node in ahead if not (node.value or "").endswith(self.label)]
        return writers[-1].key if writers else None


class Semaphore(Contender):
    """A semaphore with at most `limit` holders at a time, in order of arrival.

        with Semaphore(client, "/downloads", limit=3): ...

    An object is one contender: create one for each unit.

    Guarantee: never more than `limit` objects with `is_held` True, if all have the same limit;
    acquire raises ValueError if it finds another limit in the line.  A release wakes the first
    waiting contender; each admission wakes the next.
    Limit: as for Lock.  Tokens of several holders are valid at a time.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, limit: int, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        if limit < 1:
            raise ValueError("limit is at least 1")
        super().__init__(client, key, ttl=ttl, on_lost=on_lost)
        self.limit = limit
        self.label = f":limit={limit}"

    def _blocker(self, ahead: "list[Node]") -> "str | None":
        other = [node for node in ahead if not (node.value or "").endswith(self.label)]
        if other:
            raise ValueError(f"{other[0].value} stands in line, {self.label} wants to join it")
        if len(ahead) < self.limit:
            return None
        # The first waiting contender waits for the removal of any holder; the others wait until
        # the one ahead leaves or announces its admission.
        return self.path if len(ahead) == self.limit else ahead[-1].key

    def _admitted(self, entry: _Entry) -> None:
        entry.announce()


# ============================================================================
# recipes/elections -- Elections, and values that are observed.
# ============================================================================


class Observed(_Recipe, _Closeable, Generic[_T]):
    """An iterator over the states of a value: the present one, then each new one.

    An intermediate state may be missed, the last one is not.  `close` ends the iteration, from
    any thread.  Raises WatchTimeout when there was no change in time; `next` may be called again.

    read     returns the state, and the event to wait for before the next read
    timeout  seconds for each `next`; None: no limit; 0: read once, do not wait

    Thread: one, except for `close`.
    """

    def __init__(self, client: Client, read: "Callable[[], tuple[_T, _Wait]]",
                 timeout: "float | None" = None) -> None:
        super().__init__(client)
        self._read = read
        self._timeout = timeout
        self._seen: list[_T] = []                   # the last state
        self._closed = False

    def __iter__(self) -> "Observed[_T]":
        return self

    def __next__(self) -> _T:
        def changed() -> "tuple[list[_T] | None, _Wait]":
            state, wait = self._read()
            return None if [state] == self._seen else [state], wait

        with self._call_scope(self._timeout) as scope:
            found = None if self._closed else self._poll(scope, changed)
            if found is not None:
                self._seen = found
                return found[0]
        if self._closed:
            raise StopIteration
        raise WatchTimeout("no change in time")

    def close(self) -> None:
        """End the iteration, also a waiting `next`, at once.  Thread: any."""
        self._closed = True
        self.cancel()

def _is_change(event: Result) -> bool:
    return event.action in _CHANGES


_CHANGES = _REMOVALS | {"create", "set", "update", "compareAndSwap"}


class Leader(NamedTuple):
    """The leader of an election: its value and its fencing token."""

    value: str
    token: int


class Election(Contender):
    """An election: one of many candidates leads; after it the next one in order of arrival.

        election = Election(client, "/scheduler", value="host-a", ttl=10, on_lost=stop)
        with election:                              # the block begins when this candidate leads
            work(fencing_token=election.token)
        election.run(work)                          # the same

        with Election(client, "/scheduler").observe() as leaders:       # in any process
            for leader in leaders:
                print(leader.value if leader else "nobody")

    value    identifies this candidate to observers

    Guarantee: while `is_held` is True no other candidate's is.  A crashed leader is replaced
    after its ttl.  Successive leaders have rising tokens.
    Limit: as for Lock.

    Thread: any.  `campaign` is acquire, `resign` release, and the object a context manager.
    """

    def __init__(self, client: Client, key: str, value: str = "", *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        super().__init__(client, key, ttl=ttl, on_lost=on_lost)
        self.label = ":" + value

    is_leader = Contender.is_held

    def campaign(self, timeout: "float | None" = None) -> bool:
        """Wait until this candidate leads; return whether it does.  See acquire."""
        return self.acquire(timeout=timeout)

    def resign(self) -> bool:
        """Step down; return whether this candidate led until now."""
        return self.release()

    def run(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call `function` when this candidate leads, then resign, and return the result.

        The function should stop after a loss, which on_lost and `is_held` show.  Raises
        LockExpired if `cancel` ended the campaign.
        """
        with self:
            return function(*args, **kwargs)

    def leader(self) -> "Leader | None":
        """Return the present leader, by quorum; None if there are no candidates."""
        return self._first(self._line()[0])

    def observe(self, timeout: "float | None" = None) -> "Observed[Leader | None]":
        """Return an iterator over the leader, now and after each change; None: no leader."""
        def read() -> "tuple[Leader | None, _Wait]":
            entries, index = self._line()
            wait = _Wait(self.path, index, lambda event: event.action == "create")
            return self._first(entries), _Wait(entries[0].key, index) if entries else wait
        return Observed(self.client, read, timeout)

    @staticmethod
    def _first(entries: "list[Node]") -> "Leader | None":
        if not entries:
            return None
        value = entries[0].value or ""
        return Leader(value.partition(":")[2], _number(entries[0]))


# ============================================================================
# recipes/copies -- Copies of directories, and callbacks for each change.
# ============================================================================


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

    _thread: "threading.Thread | None"
    _watch: "Watch | None"
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
    def error(self) -> "EtcdError | None":
        """The failure that keeps the copy from following the directory at the moment, if any."""
        watch = self._watch
        return self._error or (None if watch is None else watch.error)

    def start(self) -> "CachedTree":
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

    def snapshot(self) -> "dict[str, Node]":
        """Return the copy in its present state."""
        self._check_process()
        with self._changed:
            return dict(self._nodes)

    def wait_for(self, index: int, timeout: "float | None" = None) -> bool:
        """Wait until the copy has the change with `index`, of a file in it; False if it is late.

        timeout  seconds; None: no limit; 0: do not wait.  No wait if the directory is not followed
        """
        self._check_process()
        with self._call_scope(timeout) as scope:
            scope.wait_for(self._changed, lambda: self._index >= index or self._scope.cancelled)
        return self._index >= index

    def items(self) -> "ItemsView[str, Node]":
        """Return keys and nodes of a consistent state."""
        return self.snapshot().items()

    def keys(self) -> "KeysView[str]":
        """Return the keys of a consistent state."""
        return self.snapshot().keys()

    def values(self) -> "ValuesView[Node]":
        """Return the nodes of a consistent state."""
        return self.snapshot().values()

    def __getitem__(self, key: str) -> Node:
        self._check_process()
        with self._changed:
            return self._nodes[clean_key(key)]

    def __iter__(self) -> "Iterator[str]":
        return iter(self.snapshot())

    def __len__(self) -> int:
        self._check_process()
        return len(self._nodes)

    def __enter__(self) -> "CachedTree":
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

    def _update(self, changes: "Mapping[str, Node | None]", index: int, *, report: bool) -> None:
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

    def __init__(self, client: Client, key: str, function: "_Called | None" = None) -> None:
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

    def _read_state(self) -> "tuple[_T, _Wait]":
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

    def _read_state(self) -> "tuple[list[str], _Wait]":
        nodes, index = _children(self.client, self.path)
        return sorted(_name(node.key) for node in nodes), _Wait(self.path, index, _is_change)


class DataWatch(_Follower[Optional[Node], Callable[[Optional[str], Optional[Node]], object]]):
    """Calls a function with value and node of a file, now and after each change.

        @DataWatch(client, "/config/db")
        def changed(value, node): ...               # None, None: there is no such file

    Limit and thread: as for ChildrenWatch.
    """

    def _read_state(self) -> "tuple[Node | None, _Wait]":
        try:
            found = _read(self.client, self.path)
        except KeyNotFound as error:
            return None, _Wait(self.path, error.index)
        return (None if found.dir else _childless(found.node), _Wait(self.path, found.etcd_index))

    def _call_function(self, function: Callable[..., Any], state: "Node | None") -> bool:
        return _call_back_in_background(function, state and state.value, state) is not False


# ============================================================================
# recipes/queues -- Queues.
# ============================================================================


TAKEN_TTL_S = 120               # lifetime of the mark of an item that was taken
PRIORITY = 100                  # default priority of an item


class _Item(NamedTuple):
    uid: str                                        # the same in both files of an item that was
    value: str                                      # written twice after a lost reply
    priority: int
    node: Node                                      # its first file
    mark: str                                       # the value that this consumer writes to take it

    @classmethod
    def of(cls, node: Node, root: str) -> "_Item":
        """Return the item in a file; other programs may create files by hand."""
        found = _ITEM.fullmatch(node.value or "") if _is_entry(node) else None
        uid, priority, value = found.groups() if found else (
            node.key[len(root):], PRIORITY, node.value or "")
        return cls(uid, value, int(priority), node, uuid.uuid4().hex + ":" + _name(node.key))

    def order(self) -> "tuple[int, int]":
        node = self.node
        return self.priority, _number(node) if _is_entry(node) else node.created_index


_ITEM = re.compile(r"([0-9a-f]{32}):(-?[0-9]{1,9}):(.*)", re.DOTALL)


class QueueItem:
    """An item that this process works on, from Queue.take; `value` is the one given to `put`.

    A context manager: the item is done after the block, or given back after an exception.
    """

    def __init__(self, queue: "Queue", item: _Item, lease: Lease) -> None:
        self.value = item.value
        self._queue = queue
        self._item = item
        self._lease = lease

    @property
    def is_held(self) -> bool:
        """True as long as no other consumer can have the item."""
        return self._lease.is_held

    def done(self) -> bool:
        """Remove the item; False if another consumer has removed it."""
        try:
            return self._queue._remove(self._item)
        finally:
            self._lease.stop()

    def give_back(self) -> None:
        """Return the item to the queue."""
        self._lease.stop()

    def __enter__(self) -> "QueueItem":
        return self

    def __exit__(self, kind: "type[BaseException] | None", *_: object) -> None:
        if kind is None:
            self.done()
        else:
            self.give_back()


class Queue(_Recipe):
    """A first in, first out queue for any number of producers and consumers in the cluster.

        queue = Queue(client, "/jobs")
        queue.put("one")
        queue.put("urgent", priority=1)             # before items with a higher number
        queue.get(timeout=5)                        # "urgent", or None after 5 s
        with queue.take(timeout=5) as item:         # at least once
            work(item.value)

    Guarantee: after put returns, the item is in the queue once.  Items are removed once, ordered
    by priority, then by creation.  `get` hands each item to one consumer, which may crash with
    it.  An item of `take` returns to the queue ttl seconds after a crash, until done has removed
    it.  A consumer that finds the queue empty reads it once, and the cost of an item does not
    depend on the number of earlier items.  A new item wakes one of the waiting consumers; the
    others wait in a line.
    How: an item is an in-order file with a uuid.  To take it a consumer creates a hidden mark for
    this uuid, at which only one can succeed, and then deletes the file.  A second file of the
    same item, from a lost reply, is recognised by the mark, which stays for TAKEN_TTL_S.
    Limit: after an error with maybe_applied, and if a request is executed more than TAKEN_TTL_S
    late, an item may appear twice or be lost with its consumer.  A consumer that crashes between
    mark and deletion delays its item for TAKEN_TTL_S.  Consumers of one queue use either get or
    take: get may remove an item that was taken.  A consumer lists the whole directory and takes
    the listed items before it lists again (an urgent item that arrives meanwhile comes later):
    suitable for thousands of items, not for millions.
    Differs from 0.4.0: its items are read, but 0.4.0 cannot read the present ones.

    ttl      seconds by which a crash delays an item that was taken, or the line

    Thread: any.
    """

    def __init__(self, client: Client, key: str, *, ttl: int = LEASE_TTL_S) -> None:
        super().__init__(client, _recipe_key(key))
        self.ttl = _checked_ttl(ttl)
        self._items = f"{self.path}/items"
        self._after_fork()

    def put(self, value: str, priority: int = PRIORITY) -> str:
        """Add an item, behind all of the same priority (lower numbers first); return its key."""
        uid = uuid.uuid4().hex
        text = f"{uid}:{priority:d}:{_text(value)}"

        def find() -> "Node | None":
            with contextlib.suppress(KeyNotFound):  # found: it was taken already
                return _read(self.client, self._mark_of(uid)).node
            nodes, _ = _entries(self.client, self._items)
            return next((node for node in nodes if node.value == text), None)
        return _append_once(self.client, self._items, text, None, find)[0].key

    def put_all(self, values: "Iterable[str]", priority: int = PRIORITY) -> "list[str]":
        """Add items in order; return their keys."""
        return [self.put(value, priority) for value in values]

    def get(self, timeout: "float | None" = None) -> "str | None":
        """Remove the first item and return its value; None after the timeout, or `cancel`.

        timeout  seconds; None: no limit; 0: do not wait
        """
        return self._first(timeout, lambda item: item.value if self._remove(item) else None)

    def take(self, timeout: "float | None" = None) -> QueueItem:
        """Return the first item that no other consumer works on.  Raises WatchTimeout."""
        item = self._first(timeout, self._claim)
        if item is None:
            raise WatchTimeout("no item in time", cause=self.path)
        return item

    def __len__(self) -> int:
        """Return the number of items, including those that consumers work on."""
        free, claimed, _ = self._list()
        return len(free) + claimed

    def _after_fork(self) -> None:
        super()._after_fork()
        # Items of the last listing.  Append and pop are atomic; an item may be gone.
        self._seen: deque[_Item] = deque()

    def _mark_of(self, uid: str) -> str:
        return f"{self.path}/_taken/{uid}"

    def _list(self) -> "tuple[list[_Item], int, int]":
        """Return the free items in order, the number of claimed ones, and the index."""
        try:
            found = _read(self.client, self.path, recursive=True)
        except KeyNotFound as error:
            return [], 0, error.index
        files = [node for node in found.node.walk() if not node.dir]
        claims = {_name(node.key) for node in files if node.key.startswith(f"{self.path}/claims/")}
        first: dict[str, _Item] = {}
        # A file with a ttl is a mark of 0.4.0.
        for node in files:
            if node.ttl is None and node.key.startswith(f"{self._items}/"):
                item = _Item.of(node, self._items + "/")
                first[item.uid] = min(item, first.get(item.uid, item), key=_Item.order)
        items = sorted(first.values(), key=_Item.order)
        free = [item for item in items if item.uid not in claims]
        return free, len(items) - len(free), found.etcd_index

    def _first(self, timeout: "float | None", obtain: "Callable[[_Item], _T | None]") -> "_T | None":
        """Return the first result of `obtain` that is not None; None after timeout or `cancel`."""
        with self._call_scope(timeout) as scope:
            found, _ = self._try(obtain)
            if found is not None or not scope.wait_s():
                return found
            line = Contender(self.client, f"{self.path}/_waiting", ttl=self.ttl)
            if not line.acquire():
                return None
            try:
                return self._poll(scope, lambda: self._try(obtain), min(WAIT_SLICE_S, self.ttl))
            finally:
                with _cleanup_scope():
                    line.release()
        return None

    def _is_arrival(self, event: Result) -> bool:
        """Return whether there may be an item: a new one, or one that was given back."""
        if event.key.startswith(f"{self.path}/claims/"):
            return event.action in _REMOVALS
        return event.action in ("create", "set")

    def _try(self, obtain: "Callable[[_Item], _T | None]") -> "tuple[_T | None, _Wait]":
        """Try the items of the last listing, then those of a new one."""
        while self._seen:
            with contextlib.suppress(IndexError):   # another thread was faster
                found = obtain(self._seen.popleft())
                if found is not None:
                    return found, _Wait(self.path, 0)
        free, _, index = self._list()
        wait = _Wait(self.path, index, self._is_arrival)
        for position, item in enumerate(free):
            found = obtain(item)
            if found is not None:
                self._seen.extend(free[position + 1:])
                return found, wait
        return None, wait

    def _remove(self, item: _Item) -> bool:
        """Remove an item; False if another consumer has removed it."""
        try:
            _create_once(self.client, self._mark_of(item.uid), item.mark, TAKEN_TTL_S)
        except NodeExists:
            self._is_taken(item)
            return False
        except EtcdError as error:
            self._unmark(item)
            error.maybe_applied = False             # the item is in the queue
            raise
        return self._delete(item)

    def _unmark(self, item: _Item) -> None:
        """Let other consumers have an item that this one could not take."""
        with _cleanup_scope():
            _remove(self.client, self._mark_of(item.uid), item.mark)

    def _is_taken(self, item: _Item) -> bool:
        """Return whether the item has a mark; if it was taken as another file, delete this one."""
        try:
            mark = _read(self.client, self._mark_of(item.uid)).node.value or ""
        except KeyNotFound:
            return False
        if mark.rpartition(":")[2] != _name(item.node.key):
            with contextlib.suppress(EtcdError):
                self.client.compare_and_delete(item.node.key, prev_index=item.node.modified_index)
        return True

    def _delete(self, item: _Item) -> bool:
        """Delete the file of an item; False if another consumer has deleted it."""
        unsure = False

        def attempt() -> "bool":
            nonlocal unsure
            try:
                self.client.compare_and_delete(item.node.key, prev_index=item.node.modified_index)
            except (KeyNotFound, CompareFailed) as error:
                # Other consumers leave it alone until our mark expires.
                return unsure and isinstance(error, KeyNotFound) and item.mark == _read(
                    self.client, self._mark_of(item.uid)).node.value
            except EtcdError as error:
                unsure = unsure or error.maybe_applied
                raise
            return True
        try:
            return _with_retries(self.client, attempt)
        except EtcdError as error:
            if not error.maybe_applied:
                self._unmark(item)
            raise

    def _claim(self, item: _Item) -> "QueueItem | None":
        lease = Lease(self.client, f"{self.path}/claims/{item.uid}", ttl=self.ttl)
        claimed, ours = None, True
        try:
            lease.start()
            # Another consumer may have claimed and finished the item since the listing.
            index = _read(self.client, item.node.key).node.modified_index
            if index == item.node.modified_index and not self._is_taken(item):
                claimed = QueueItem(self, item, lease)
        except (NodeExists, LockExpired):
            ours = False
        except KeyNotFound:
            pass
        finally:
            if ours and claimed is None:
                with _cleanup_scope():
                    lease._end()
                    lease._remove_file()
        return claimed


# ============================================================================
# recipes/services -- Services and parties.
# ============================================================================


@dataclass(frozen=True)
class Instance:
    """An instance of a service; unpacks as a pair of id and address."""

    id: str
    address: str
    metadata: "Mapping[str, Any]" = field(default_factory=dict, hash=False)
    tags: "tuple[str, ...]" = ()

    def __iter__(self) -> "Iterator[str]":
        return iter((self.id, self.address))

    @classmethod
    def of(cls, node: Node) -> "Instance":
        """Return the instance in a file: an address, or JSON with an address in it."""
        text = node.value or ""
        try:
            raw = json.loads(text) if text.startswith("{") else None
            if isinstance(raw, dict) and isinstance(raw.get("address"), str):
                return cls(_name(node.key), raw["address"], dict(raw.get("metadata") or {}),
                           tuple(map(str, raw.get("tags") or ())))
        except (ValueError, TypeError, RecursionError):     # the format of another program
            pass
        return cls(_name(node.key), text)

    def text(self) -> str:
        """Return the text of its file: the address, or JSON if there are metadata or tags."""
        if not self.metadata and not self.tags and not self.address.startswith("{"):
            return self.address
        return json.dumps({"address": self.address, "metadata": dict(self.metadata),
                           "tags": list(self.tags)})


class Registration(Lease):
    """A Lease of ServiceRegistry or Party: after a loss it calls on_lost and recreates the file."""

    def _regain(self, scope: Scope) -> bool:
        self._report_loss()
        while scope.wait(min(1.0, self.ttl / 3)):
            try:
                with Scope(1.0):
                    self._acquire_file()
            except Cancelled:
                raise
            except EtcdError:
                continue
            return True
        return False


class ServiceRegistry:
    """A registry of services and their instances.

        registry = ServiceRegistry(client, ttl=10)
        with registry.register("mail", "10.0.0.5:25", tags=["v2"], metadata={"zone": "a"}): ...

        [instance.address for instance in registry.resolve("mail", tag="v2")]
        with registry.watch("mail") as changes:
            for instances in changes: ...

    Guarantee: an instance is listed while its process lives and reaches the cluster, and at most
    ttl seconds longer.  Its renewals cause no events.
    Limit: a process that lives but does not serve is listed.  resolve may return an instance that
    died less than ttl seconds ago.

    prefix   directory of all services; an instance is the file <prefix>/<service>/<id> with the
             address or, with metadata or tags, JSON: address, metadata, tags

    Thread: any.
    """

    def __init__(self, client: Client, prefix: str = "/services", *,
                 ttl: int = LEASE_TTL_S) -> None:
        self.client = client
        self.prefix = clean_key(prefix)
        self.ttl = _checked_ttl(ttl)

    def register(self, service: str, address: str, *, metadata: "Mapping[str, Any] | None" = None,
                 tags: "Iterable[str]" = (), on_lost: _LostCallback = None) -> Registration:
        """List `address` for `service`, until the Registration is stopped or its block ends.

        metadata  any JSON values, for the users of the service
        tags      for resolve(service, tag=...)
        on_lost   called on another thread after the instance was missing from the list
        """
        if isinstance(tags, str):
            raise ValueError("tags are several: a list of strings")
        instance = Instance(uuid.uuid4().hex, address, metadata or {}, tuple(tags))
        return Registration(self.client, f"{self.path(service)}/{instance.id}", instance.text(),
                            self.ttl, on_lost=on_lost).start()

    def resolve(self, service: str, tag: "str | None" = None) -> "list[Instance]":
        """Return the instances of `service` (with this tag, if given), oldest first."""
        return self._instances(_children(self.client, self.path(service))[0], tag)

    def watch(self, service: str, timeout: "float | None" = None,
              tag: "str | None" = None) -> "Observed[list[Instance]]":
        """Return an iterator over the instances of `service`, now and after each change."""
        path = self.path(service)

        def read() -> "tuple[list[Instance], _Wait]":
            nodes, index = _children(self.client, path)
            return self._instances(nodes, tag), _Wait(path, index, _is_change)
        return Observed(self.client, read, timeout)

    def path(self, service: str) -> str:
        """Return the directory of a service, for example for a CachedTree."""
        return self.prefix.rstrip("/") + _recipe_key(service)

    @staticmethod
    def _instances(nodes: "list[Node]", tag: "str | None") -> "list[Instance]":
        found = [Instance.of(node) for node in nodes if not node.dir]
        return [instance for instance in found if tag is None or tag in instance.tags]


class Party:
    """A group of processes, each a member while it lives.

        with Party(client, "/workers", "host-a") as party:
            list(party), len(party)

    name  the name of this member; None: the name of the host

    Guarantee: a process is a member while it lives and reaches the cluster, and at most ttl
    seconds longer.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, name: "str | None" = None, *,
                 ttl: int = LEASE_TTL_S) -> None:
        self.client = client
        self.path = _recipe_key(key)
        self.name = name or socket.gethostname()
        self.ttl = _checked_ttl(ttl)
        self._member: Registration | None = None

    def join(self) -> None:
        """Become a member; no effect if this object is one."""
        member = self._member
        if member is None or member._pid != os.getpid():    # a forked child is another member
            key = f"{self.path}/{uuid.uuid4().hex}"
            self._member = Registration(self.client, key, self.name, self.ttl).start()

    def leave(self) -> None:
        """Cease to be a member."""
        member, self._member = self._member, None
        if member is not None:
            member.stop()

    def __iter__(self) -> "Iterator[str]":
        """Return an iterator over the names of the members, oldest first."""
        nodes, _ = _children(self.client, self.path)
        return iter([node.value or "" for node in nodes if not node.dir])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __enter__(self) -> "Party":
        self.join()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


# ============================================================================
# ctl/output -- Output of the command line in the formats of etcdctl 2.3.
# ============================================================================


_LINES_PER_WRITE = 1_000        # of a listing to standard output
_PROGRESS_EVERY_S = 0.1         # interval between two updates of the progress line
_UNAVAILABLE = "client: etcd cluster is unavailable or misconfigured"
_HTML_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}     # as Go's encoder does


class Exit(enum.IntEnum):
    """Exit codes; see `main`."""

    OK = 0
    BAD_ARGS = 1
    BAD_CONNECTION = 2
    SERVER_ERROR = 4
    UNHEALTHY = 5
    INTERRUPTED = 130                               # 128 + SIGINT
    BROKEN_PIPE = 141                               # 128 + SIGPIPE
    MISUSE = OK         # unknown command or option: etcdctl 2.3 prints help, exits with 0


class _ExitError(Exception):
    """Ends a command with a line on stderr and an exit code."""

    def __init__(self, line: str, code: int = Exit.BAD_ARGS) -> None:
        super().__init__(line)
        self.line = line
        self.code = code


# -- output


_BLUE, _GREEN, _RED = "1;34", "32", "31"
_UNESCAPED = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029]")    # not possible in a line
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {escape[1]: character for character, escape in _ESCAPES.items()}


def _escape(text: str) -> str:
    """Return `text` as one line without tabs; the inverse of `_unescape`."""
    return _UNESCAPED.sub(lambda m: _ESCAPES.get(m[0]) or f"\\u{ord(m[0]):04x}", text)


def _unescape(text: str) -> str:
    def original(match: "Match[str]") -> "str":
        code = match[1]
        if len(code) == 5:
            return chr(int(code[1:], 16))
        if code not in _UNESCAPES:
            raise ValueError(f"\\{code} is no escape")
        return _UNESCAPES[code]
    return re.sub(r"\\(u[0-9a-fA-F]{4}|.?)", original, text, flags=re.DOTALL)


def _coloured(text: str, colour: str) -> str:
    if not colour or not sys.stdout.isatty() or (
            os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def _table_lines(rows: "Sequence[Sequence[str]]", colours: "Sequence[str]") -> "Iterator[str]":
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    for row, colour in zip(rows, colours):
        if sys.stdout.isatty():
            row = [text.ljust(width) for text, width in zip(row, widths)]
        yield _coloured(" ".join(filter(None, row)).rstrip(), colour)


def _print(text: str) -> None:
    """Print a line at once, as UTF-8 in any locale: keys and values are bytes to a terminal."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b"\n")
    sys.stdout.buffer.flush()


def _print_lines(lines: "Iterable[str]") -> None:
    rest = iter(lines)
    for batch in iter(lambda: list(itertools.islice(rest, _LINES_PER_WRITE)), []):
        _print("\n".join(batch))


def _print_error(text: str) -> None:
    line = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    print(line, file=sys.stderr)


class _Progress:
    """A line on stderr with the progress of long work; only on a terminal."""

    def __init__(self, work: str, total: int = 0) -> None:
        self._work = work
        self._total = total                         # 0: unknown
        self._visible = sys.stderr.isatty()
        self._drawn_at = 0.0

    def __enter__(self) -> "_Progress":
        self.show(0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, done: int) -> None:
        if not self._visible or time.monotonic() - self._drawn_at < _PROGRESS_EVERY_S:
            return
        self._drawn_at = time.monotonic()
        share = f"/{self._total:,} ({100 * done // self._total} %)" if self._total else ""
        print(f"\r\x1b[K{self._work}: {done:,}{share}", end="", file=sys.stderr, flush=True)


def _value_text(node: "Node | None") -> str:
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


def _node_json(node: "Node | None") -> "dict[str, Any] | None":
    if node is None:
        return None
    shown: dict[str, Any] = {"key": "" if node.key == "/" else node.key}
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


def _print_result(result: Result, form: str) -> None:
    if form == "json":
        _print(_result_json(result))
    elif form == "extended":
        _print(_result_extended(result))
    elif form != "simple":
        _print_error(f"Unsupported output format: {form}")
    elif result.action == "delete":
        _print(f"PrevNode.Value: {_value_text(result.prev_node)}")
    else:
        _print(_value_text(result.node))


# -- errors


def _failure_line(error: EtcdError) -> str:
    """Return the failure of one endpoint in etcdctl's words."""
    if isinstance(error, RequestTimeout):
        return f"client: endpoint {error.endpoint} exceeded header timeout"
    if isinstance(error, TransportError) and error.endpoint:
        address = urlsplit(error.endpoint).netloc
        never_sent = isinstance(error, ConnectionFailed) and not error.maybe_applied
        return f"dial tcp {address}: connect: {error.message}" if never_sent else error.describe()
    if not error.status:                            # of a DNS lookup
        return error.describe()
    if error.status in (500, 503):
        return f"client: etcd member {error.endpoint} has no leader"
    phrase = http.client.responses.get(error.status, "")
    return f"client: etcd member {error.endpoint} returns server error [{phrase}]"


def _error_lines(error: EtcdError) -> str:
    if not is_endpoint_failure(error):
        return f"Error:  {error}"
    lines = [f"error #{number}: {_failure_line(failure)}"
             for number, failure in enumerate(error.failures)]
    if error.maybe_applied:
        lines.append("the write may have been applied: it was not sent again")
    return "\n".join([f"Error:  {_UNAVAILABLE}", *lines, ""])


# ============================================================================
# ctl/program -- The program: options, clients of commands, help, errors and exit codes.
# ============================================================================


CLI_ENDPOINTS = "http://127.0.0.1:2379,http://127.0.0.1:4001"
CLI_VERSION = "2.3.8"                               # the etcdctl whose behaviour is reproduced
_NOT_TEXT = "pyetcdctl: {} is not UTF-8: etcd v2 stores text; encode bytes, as base64 does"
_BOOLEANS = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}


class _MisuseError(Exception):
    """A command line that etcdctl 2.3 does not accept either; help is printed."""


# -- options


class _Flag(NamedTuple):
    names: "tuple[str, ...]"
    kind: type          # bool, int, str, float (a Go duration, in seconds), list (repeatable)
    help: str
    least: "float | None" = None   # the smallest number, or length of a text

    @property
    def dashed(self) -> str:
        return _dashed(self.names[0])


class _Options:
    """Values of the given flags; the others are False, 0, "" or empty."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._forms: dict[str, str] = {}

    def put(self, flag: _Flag, text: str, form: str = "") -> None:
        name, value = flag.names[0], _flag_value(flag, text)
        if self._forms.setdefault(name, form) != form:
            raise _MisuseError(f"{_dashed(form)} and {_dashed(self._forms[name])} are the same")
        if flag.kind is list:
            value = [*self.texts(name), value]
        elif self._values.get(name, value) != value and flag not in _GLOBAL_FLAGS:
            # A global one behind that of an alias or a script overrides it on purpose.
            _print_error(f"pyetcdctl: {flag.dashed} is given twice: only the last counts")
        elif form and text == "":
            _print_error(f"pyetcdctl: {flag.dashed} is empty, as if it were not there")
        self._values[name] = value

    def on(self, name: str) -> bool:
        return bool(self._values.get(name, False))

    def number(self, name: str, default: int = 0) -> int:
        return int(self._values.get(name, default))

    def seconds(self, name: str, default: float) -> float:
        return float(self._values.get(name, default))

    def text(self, name: str, variable: str = "") -> str:
        return str(self._values.get(name, "")) or os.environ.get(variable, "")

    def texts(self, name: str) -> "list[str]":
        return list(self._values.get(name, ()))

    def refuse(self, why: str, *names: str) -> None:
        for name in names:
            if name in self._values:
                raise _ExitError(f"pyetcdctl: {_dashed(name)} has no effect {why}")


def _flag_value(flag: _Flag, text: str) -> Any:
    """Return the value of a flag.  Raises _MisuseError; _ExitError if etcdctl accepts it."""
    parse, expected = _READERS.get(flag.kind, (str, ""))
    try:
        value = parse(text)
    except (KeyError, ValueError):
        repaired, hint = text[:-1] if text.endswith("s") else text + "s", ""
        with contextlib.suppress(KeyError, ValueError):
            parse(repaired)                         # 5s for 5, or 5 for 5s
            hint = f"; did you mean {repaired}?"
        raise _MisuseError(f'{flag.dashed} takes {expected}, not "{text}"{hint}') from None
    is_text = isinstance(value, str)
    if flag.least is not None and (len(text) if is_text else value) < flag.least:
        limit = "must not be empty" if is_text else f"is {flag.least} or more"
        raise _ExitError(f"pyetcdctl: {flag.dashed} {limit}")
    return value


def _parse_integer(text: str) -> int:
    """Parse a number by the rules of Go's flag package: also hexadecimal, and octal after a 0."""
    match = re.fullmatch(r"([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)", text, re.ASCII)
    if match is None or len(text) > 30:
        raise ValueError(text)
    digits = match[2]
    value = int(digits, 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10)
    if value >= (1 << 63) + (match[1] == "-"):
        raise ValueError(text)
    return -value if match[1] == "-" else value


def _parse_duration(text: str) -> float:
    """Parse a Go duration such as 500ms or 1m30s; return seconds."""
    text = text.replace("\u03bc", "\u00b5")          # the Greek letter, and the sign on keyboards
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
    part = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(h|ms|us|µs|ns|m|s)"
    if text in ("0", "+0", "-0"):
        return 0.0
    if not re.fullmatch(f"\\+?(?:{part})+", text, re.ASCII):
        raise ValueError(text)
    return sum(float(count) * units[unit] for count, unit in re.findall(part, text))


_READERS: "dict[type, tuple[Callable[[str], Any], str]]" = {
    bool: (_BOOLEANS.__getitem__, "true or false"), int: (_parse_integer, "a whole number"),
    float: (_parse_duration, "a time such as 500ms or 1m30s"),
}


def _parse_flags(argv: "Sequence[str]", flags: "Sequence[_Flag]", *,
                 mixed: bool = False) -> "tuple[_Options, list[str]]":
    """Split `argv` into options and arguments by the rules of Go's flag package.

    An option has one or two dashes; its value follows `=` or, except for booleans, is the next
    word.  The options end at the first argument, or at `--`.  With `mixed` they end at `--` only,
    and a negative number is an argument.
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


def _about_unknown(word: str, name: str, known: "Sequence[str]", args: "Sequence[str]") -> str:
    text = f'there is no option "{word}"'
    if any(name in flag.names for flag in _GLOBAL_FLAGS):
        return f"{text} here: {_dashed(name)} stands before the command"
    if any(name in flag.names for command in _COMMANDS.values() for flag in command.flags):
        if "endpoints" in known:
            return f"{text} here: {_dashed(name)} stands behind the command"
    hint = "; put -- in front of a value that begins with a dash" if args else ""
    return text + (_did_you_mean(name, known, _dashed) or hint)


def _did_you_mean(word: str, known: "Iterable[str]", show: Callable[[str], str] = str) -> str:
    import difflib

    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {show(found[0])}?" if found else ""


# -- the client of a command


def _show_request(method: str, url: str, form: "bytes | None") -> None:
    """Print a request on stderr as a curl command (--debug)."""
    data = f' -d "{form.decode()}"' if form else ""
    _print_error(f"cURL Command: curl -X {method} {url}{data}")


def _ask_password(prompt: str) -> str:
    if sys.stdin.isatty():
        return getpass.getpass(prompt)
    _print(prompt)
    return sys.stdin.readline().rstrip("\n")


def _split_user(text: str, prompt: str) -> "tuple[str, str]":
    name, separator, password = text.partition(":")
    return name, password if separator else _ask_password(prompt)


def _cluster_asked(settings: _Options) -> "dict[str, Any]":
    """Return the endpoints as arguments of Client, by the precedence of etcdctl 2.3."""
    chosen, source, where = CLI_ENDPOINTS, "", "endpoints"
    for flag in ("discovery-srv", "endpoints", "endpoint", "peers"):
        variable = "ETCDCTL_" + flag.upper().replace("-", "_")
        for name, text in (
                (_dashed(flag), settings.text(flag)), (variable, os.environ.get(variable, ""))):
            if text and not source:
                chosen, source = text, name
                where = "srv_domain" if flag == "discovery-srv" else "endpoints"
            elif text and text != chosen and name != variable:
                _print_error(f"pyetcdctl: {name} is not used: {source} is stronger")
    return {where: chosen if where == "srv_domain" else chosen.split(",")}


class _Access(NamedTuple):
    """Credentials and time limits for the members of a cluster."""

    options: "dict[str, Any]"                         # keywords of Client
    debug: bool = False

    @classmethod
    def from_settings(cls, settings: _Options, *, environment: bool = True) -> "_Access":
        """Return the access from flags and ETCDCTL_* variables; ask for a missing password."""
        user, certificate, key, authorities = (
            settings.text(flag, "ETCDCTL_" + flag.upper().replace("-", "_") if environment else "")
            for flag in ("username", "cert-file", "key-file", "ca-file"))
        if environment and user and ":" not in user and os.environ.get("ETCDCTL_PASSWORD"):
            user += ":" + os.environ["ETCDCTL_PASSWORD"]
        if key and not certificate:
            flag = "--cert-file" if environment else "--dest-cert"
            raise _ExitError(f"pyetcdctl: the key {key} is of no use without {flag}")
        for path in filter(None, (certificate, key, authorities)):
            try:                                    # also for http, which would not read it
                open(path, "rb").close()
            except OSError as error:
                raise _ExitError(f"open {path}: {str(error.strerror).lower()}") from error
        name, password = _split_user(user, "Password: ") if user else (None, None)
        request_s = settings.seconds("timeout", 1.0)
        return cls({
            "connect_timeout": request_s or math.inf, "read_timeout": request_s, "retry": False,
            "total_timeout": settings.seconds("total-timeout", 5.0) or None,
            "cert": (certificate, key) if key else certificate or None,
            "ca_cert": authorities or None, "username": name, "password": password,
        }, settings.on("debug"))

    def client(self, **where: Any) -> Client:
        try:
            client = Client(**where, **self.options)
        except (ValueError, OSError) as error:      # an endpoint, a certificate, a DNS server
            raise _ExitError(str(error)) from error
        if self.debug:
            client.on_request = _show_request
        return client


def _given_client(settings: _Options, access: _Access) -> Client:
    where = _cluster_asked(settings)
    client = access.client(**where)

    # An endpoint behind the first may belong to another cluster, or to the discovery service.
    def report(state: "ConnectionState") -> "bool":
        first, current = client.endpoints.urls[0], client.endpoints.current
        if state is ConnectionState.CONNECTED and current != first:
            _print_error(f"pyetcdctl: answered by {current}, not by {first}")
        return state is ConnectionState.CONNECTED   # then the listener is removed

    if len(where.get("endpoints", ())) > 1:
        client.add_listener(report)
    return client


def _synced_client(settings: _Options, access: _Access) -> Client:
    """Return a client for the client URLs that the members publish, in random order."""
    client, debug = _given_client(settings, access), settings.on("debug")
    if settings.on("no-sync"):
        return client
    given = ",".join(client.endpoints.urls)
    if debug:
        _print_error(f"start to sync cluster using endpoints({given})")
    try:
        urls = [url for member in client.member_list() for url in member.client_urls]
    except EtcdError as error:
        code = Exit.BAD_CONNECTION if is_endpoint_failure(error) else Exit.SERVER_ERROR
        raise _ExitError(_error_lines(error), code) from error
    if all(url.startswith("https:") for url in client.endpoints.urls):
        urls = [url for url in urls if url.startswith("https:")]    # no passwords in clear
    if not urls:
        raise _ExitError(
            "etcd cluster has no published client endpoints.\nTry '--no-sync' if you want to "
            f"access non-published client endpoints({given}).\nError:  client: no endpoints "
            "available", Exit.SERVER_ERROR)
    random.shuffle(urls)
    client.endpoints = Endpoints(urls)
    if debug:
        _print_error(f"got endpoints({','.join(urls)}) after sync")
    return client


class _Run:
    """One invocation: the argument of a command function."""

    def __init__(self, settings: _Options, options: _Options, args: "list[str]",
                 behind: "list[str] | None" = None) -> None:
        self.settings = settings                    # the global options
        self.options = options                      # of the command
        self.args = args                            # all arguments
        self.behind = behind                        # the arguments behind `--`, if there is one
        self.output = settings.text("output") or "simple"
        self._client: Client | None = None      # created on first use

    @functools.cached_property
    def access(self) -> _Access:
        return _Access.from_settings(self.settings)

    @property
    def client(self) -> Client:
        return self.connect()

    def connect(self, make: Callable[[_Options, _Access], Client] = _synced_client) -> Client:
        if self._client is None:
            self._client = make(self.settings, self.access)
            if self.settings.on("debug"):
                _print_error(f"Cluster-Endpoints: {', '.join(self._client.endpoints.urls)}")
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def key(self) -> str:
        if not self.args:
            raise _ExitError("Error:  key required")
        return self.args[0]

    def value(self) -> str:
        if len(self.args) > 1:
            return self.args[1]
        data = sys.stdin.buffer.read()
        if not data:
            raise _ExitError("Error:  value required")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise _ExitError(_NOT_TEXT.format("the value on stdin")) from error

    def ttl(self) -> "int | None":
        """Return --ttl; 0 and less mean no ttl, as in etcdctl."""
        return max(0, self.options.number("ttl")) or None

    def conditions(self, value_flag: str, index_flag: str) -> "dict[str, Any]":
        given = {"prevValue": self.options.text(value_flag),
                 "prevIndex": self.options.number(index_flag)}
        return {name: value for name, value in given.items() if value}

    def print_result(self, result: Result) -> None:
        _print_result(result, self.output)

    def print_unless_silent(self, result: Result) -> None:
        if not result.node.dir or self.output != "simple":
            self.print_result(result)


# -- the table of commands, and the way into it


_CommandFunction = Callable[[_Run], Optional[int]]      # None: Exit.OK
_FORMATS = ("simple", "extended", "json")


class _Command(NamedTuple):
    usage: str
    help: str
    flags: "tuple[_Flag, ...]"
    run: _CommandFunction
    formats: "tuple[str, ...]"    # accepted for --output
    wrong: str                  # etcdctl's message for a wrong number of arguments
    own: bool                   # not in etcdctl 2.3, or not with these options
    mixed: bool                 # options may follow arguments

    def words(self) -> "tuple[int, float]":
        """Return the least and the greatest number of arguments."""
        words = [word for word in self.usage.split() if word[0] in "<[" and word != "[options]"]
        return (sum(word[0] == "<" for word in words),
                len(words) if self.mixed and "..." not in self.usage else math.inf)


_COMMANDS: "dict[str, _Command]" = {}                 # by name: "get", "member list"; help's order

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


def _command(name: str, arguments: str, help: str, *flags: _Flag,
             formats: "tuple[str, ...]" = _FORMATS[:1], wrong: str = "", own: bool = False,
             mixed: bool = True) -> Callable[[_CommandFunction], _CommandFunction]:
    def enter(function: "_CommandFunction") -> "_CommandFunction":
        usage = " ".join(filter(None, (name, "[options]" if flags else "", arguments)))
        accepted = tuple(flag._replace(least=1) if own and flag.kind in (str, list) else flag
                         for flag in flags)
        _COMMANDS[name] = _Command(usage, help, accepted, function, formats, wrong, own, mixed)
        return function
    return enter


_keys_command = functools.partial(_command, formats=_FORMATS)    # prints replies of the keys API


def _aligned(rows: "Sequence[tuple[str, str]]") -> "list[str]":
    width = max((len(left) for left, _ in rows), default=0)
    return [f"   {left:{width}}  {right}" for left, right in rows]


def _dashed(name: str) -> str:
    return ("-" if len(name) == 1 else "--") + name


def _flag_lines(flags: "Sequence[_Flag]") -> "list[str]":
    return _aligned([(", ".join(map(_dashed, flag.names))
                      + ("" if flag.kind is bool else " value"), flag.help) for flag in flags])


def _command_names(group: str = "") -> "list[tuple[str, str]]":
    """Return (name, help) of all commands, a group as one; or of those in a group."""
    if group:
        return [(name[len(group) + 1:], command.help) for name, command in _COMMANDS.items()
                if name.startswith(group + " ")]
    firsts = dict.fromkeys(name.split()[0] for name in _COMMANDS)
    return [(name, _GROUPS[name] if name in _GROUPS else _COMMANDS[name].help) for name in firsts]


def _print_help(group: str = "") -> None:
    name = f"pyetcdctl {group}".strip()
    lines = ["NAME:", f"   {name} - {_GROUPS.get(group, 'A command line client of etcd v2.')}", "",
             "USAGE:", f"   {name} [options] command [command options] [arguments...]", "",
             "COMMANDS:", *_aligned(_command_names(group)), ""]
    _print("\n".join([*lines, "GLOBAL OPTIONS:", *_flag_lines(_GLOBAL_FLAGS)]))


def _print_command_help(name: str) -> None:
    command = _COMMANDS[name]
    lines = ["NAME:", f"   pyetcdctl {name} - {command.help}", "", "USAGE:",
             f"   pyetcdctl {command.usage}", "", "OPTIONS:", *_flag_lines((*command.flags, _HELP))]
    _print("\n".join(lines))


def _run_command(name: str, words: "Sequence[str]", settings: _Options) -> int:
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
        _print("Incorrect Usage.\n")
        _print_command_help(name)
        _print_error(f"pyetcdctl {name}: {error}")
        return Exit.BAD_ARGS if command.own else Exit.MISUSE
    if options.on("help"):
        _print_command_help(name)
        return Exit.OK
    run = _Run(settings, options, args + (behind or []), behind)
    _check_line(name, command, run)
    with contextlib.closing(run):
        return command.run(run) or Exit.OK


def _check_line(name: str, command: _Command, run: _Run) -> None:
    """Raise _ExitError for words that the command would ignore."""
    least, most = command.words()
    surplus = run.args[int(most):] if most < math.inf else []
    given = run.args[:least]
    if name.split()[0] in ("user", "role") and given:
        given = [text for text in given if text.partition(":")[0] not in ("", ".", "..")]
    if command.wrong and (surplus or len(list(filter(None, given))) < least):
        too_many = f'; "{surplus[0]}" is one word too many' if surplus and least else ""
        raise _ExitError(command.wrong + too_many)
    if surplus:
        quoting = " (a value with spaces needs quotes)" if "value" in command.usage else ""
        if surplus[0] in _BOOLEANS and any(run.options.on(flag.names[0]) for flag in command.flags
                                           if flag.kind is bool):
            quoting = f" (a switch takes {surplus[0]} behind =)"
        raise _ExitError(f'pyetcdctl {name}: "{surplus[0]}" is one word too many{quoting}; '
                         f"usage: pyetcdctl {command.usage}")
    # etcdctl reports an unknown format, but only after the request.
    if run.output not in command.formats and (
            run.output in _FORMATS or command.formats != _FORMATS):
        raise _ExitError(f"pyetcdctl {name}: --output {run.output} is not possible here, only "
                         f"{' and '.join(command.formats)}")


_WITH_PATHS = ("backup", "import", "mirror", "exec-watch", "completion")    # paths: any bytes
_OTHER_NAMES = {"put": "set", "del": "rm", "delete": "rm", "remove": "rm", "list": "ls",
                "endpoint": "cluster-health", "health": "cluster-health"}


def _dispatch(argv: "Sequence[str]") -> int:
    settings, words = _parse_flags(argv, _GLOBAL_FLAGS)
    if settings.on("version"):
        _print(f"pyetcdctl version {__version__}\nBehaves as etcdctl {CLI_VERSION}")
        return Exit.OK
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
    return Exit.OK


def _unknown_command(group: str, word: str) -> int:
    _print(f"No help topic for '{word}'")
    names = [name for name, _ in _command_names(group)]
    other = _OTHER_NAMES.get(word.lower(), word.lower())
    hint = f"; did you mean {other}?" if other in names else _did_you_mean(other, names)
    if word in ("true", "false"):
        hint = f"; a switch takes {word} behind ="
    _print_error(f'pyetcdctl: there is no command "{f"{group} {word}".strip()}"{hint}')
    return Exit.MISUSE


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run the command line; return its exit code.

    0 success · 1 bad arguments, or a command for members, users, roles or files failed · 2 no
    server can be reached · 4 the server refused, or the request failed · 5 the cluster is
    unhealthy · 130 interrupted · 141 the output was closed

    Source: etcdctl 2.3.8.
    """
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except _MisuseError as error:
        _print("Incorrect Usage.\n")
        _print_help()
        _print_error(f"pyetcdctl: {error}")
        return Exit.MISUSE
    except _ExitError as error:
        _print_error(error.line)
        return error.code
    except EtcdError as error:
        _print_error(_error_lines(error))
        return Exit.SERVER_ERROR
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:                         # `ls | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.BROKEN_PIPE


# ============================================================================
# ctl/etcdctl -- The commands of etcdctl 2.3.8.
# ============================================================================


_Answer = TypeVar("_Answer")
_Job = TypeVar("_Job")
_HEALTH_EVERY_S = 10.0
_SNAP_TTL_MIN_S = 300           # `import --snap` gives short-lived keys at least this long

_TTL = _Flag(("ttl",), int, "seconds until it expires; 0 and less: never")
_SORT = _Flag(("sort",), bool, "order by key")
_QUORUM = _Flag(("quorum", "q"), bool, "read through consensus: never stale")
_RECURSIVE = _Flag(("recursive", "r"), bool, "with everything below")
_AFTER_INDEX = _Flag(("after-index",), int, "begin with the first change after this index", least=0)
_ROLES = _Flag(("roles",), list, "name of a role; may be repeated", 1)
_JSON_TOO = ("simple", "json")
_NO_ARGUMENTS = "No arguments accepted"
_A_USER = "Please provide a username"
_A_ROLE = "Please provide a role name"
_PERMISSION_FLAGS = (
    _Flag(("path",), str, "a key, or a prefix of keys if it ends in *"),
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
    result = run.client.get(run.args[0] if run.args else "/", recursive=options.on("recursive"),
                            sorted=options.on("sort"), quorum=options.on("quorum"))
    if run.output != "simple":
        run.print_result(result)
        return
    shown = _escape if sys.stdout.isatty() else str     # keys may hold terminal commands
    _print_lines(_coloured(shown(node.key), _BLUE if node.dir else "")
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


def _set_dir(client: Client, key: str, ttl: "int | None", **conditions: Any) -> Result:
    return client.write(key, None, ttl=ttl, dir=True, **conditions)


_keys_command("update", "<key> [value]", "write a key that must exist", _TTL)(
    lambda run: run.print_result(run.client.update(run.key(), run.value(), ttl=run.ttl())))
_keys_command("mkdir", "<key>", "create a directory that must not exist", _TTL)(
    lambda run: run.print_unless_silent(run.client.mkdir(run.key(), ttl=run.ttl())))
_keys_command("setdir", "<key>", "create a directory, also in place of a key", _TTL)(
    lambda run: run.print_unless_silent(_set_dir(run.client, run.key(), run.ttl())))
_keys_command("updatedir", "<key>", "give a directory a new time to live, or none", _TTL)(
    lambda run: run.print_unless_silent(_set_dir(run.client, run.key(), run.ttl(), prevExist=True)))
_keys_command("rmdir", "<key>", "remove an empty directory, or a key")(
    lambda run: run.print_unless_silent(run.client.rmdir(run.key())))


@_keys_command("rm", "<key>", "remove a key or a directory",
               _Flag(("dir",), bool, "also an empty directory"),
               _Flag(("recursive", "r"), bool, "also a directory with everything below"),
               _Flag(("with-value",), str, "remove only if this is the value", 1),
               _Flag(("with-index",), int, "remove only if this is the modified index", 1))
def _cmd_rm(run: _Run) -> None:
    run.print_unless_silent(run.client.delete(
        run.key(), dir=run.options.on("dir"), recursive=run.options.on("recursive"),
        **run.conditions("with-value", "with-index")))


def _watch(run: _Run, key: str) -> Watch:
    after_index = run.options.number("after-index")
    return run.client.watcher(key, recursive=run.options.on("recursive"),
                              index=after_index + 1 if after_index else None, relist=False)


@_keys_command("watch", "<key>", "print the next change of a key",
               _Flag(("forever", "f"), bool, "and all later ones, until Ctrl-C"), _AFTER_INDEX,
               _RECURSIVE)
def _cmd_watch(run: _Run) -> None:
    with contextlib.suppress(KeyboardInterrupt):    # ends --forever; not an error
        with _watch(run, run.key()) as changes:
            for change in changes:
                if change.node.dir:
                    continue
                if run.options.on("recursive"):
                    _print(f"[{change.action}] {change.key}")
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
    children: list[subprocess.Popen[bytes]] = []
    with contextlib.suppress(KeyboardInterrupt):
        with _watch(run, key[0]) as changes:
            for change in changes:
                children = [child for child in children if child.poll() is None]
                if change.node.dir:
                    _print_error(f"Ignored dir {change.key} change")
                else:
                    children.append(_start_for(change, command))


def _start_for(change: Result, command: "Sequence[str]") -> "subprocess.Popen[bytes]":
    """Start a command with a change in its environment; do not wait for its end, as in etcdctl."""
    added = {"ACTION": change.action, "MODIFIED_INDEX": str(change.modified_index),
             "KEY": change.key, "VALUE": change.value or ""}
    environment = {**os.environ, **{f"ETCD_WATCH_{name}": text for name, text in added.items()}}
    try:
        return subprocess.Popen(command, env=environment)
    except (OSError, ValueError) as error:          # ValueError: a NUL cannot be passed on
        raise _ExitError(f"{command[0]}: {getattr(error, 'strerror', None) or error}") from error


# -- members and health


@contextlib.contextmanager
def _one_line_errors(prefix: str = "", shown: "Container[int] | None" = None) -> "Iterator[None]":
    """Turn errors of the members and auth APIs into one line without "Error:", and exit code 1.

    shown  HTTP statuses whose message etcdctl prints, in place of the number; None: all
    """
    try:
        yield
    except EtcdError as error:
        line = error.message
        if is_endpoint_failure(error):
            line = _UNAVAILABLE
        elif shown is not None and error.status not in shown:
            line = f"unexpected status code {error.status}"
        raise _ExitError(prefix + line) from error


def _print_json(shown: Any) -> None:
    _print(json.dumps(shown, ensure_ascii=False, separators=(",", ":")))


@_command("member list", "", "print the members", formats=_JSON_TOO,
          wrong=_NO_ARGUMENTS)
def _cmd_member_list(run: _Run) -> None:
    client = run.client
    with _one_line_errors(shown=()):
        members = client.member_list()
    with _one_line_errors("Failed to get leader:  ", shown=()):
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
                     f"clientURLs={client_urls}", f"isLeader={str(leading).lower()}"]
                    if member.name else [f"{member.id}[unstarted]:", "", f"peerURLs={peer_urls}"])
    _print_lines(_table_lines(rows, [_GREEN if leading else "" for leading in leads]))


@_command("member add", "<name> <peerURL>", "add a member, before it starts",
          wrong="Provide a name and a single member peerURL")
def _cmd_member_add(run: _Run) -> None:
    name, url = run.args
    if re.search("[=,]", name):
        raise _ExitError(f'the name "{name}" cannot stand in ETCD_INITIAL_CLUSTER, where = and , '
                         "separate names and URLs: choose another")
    client = run.client
    with _one_line_errors(shown=(400, 409)):
        added = client.member_add([url])
        _print(f"Added member named {name} with ID {added.id} to cluster")
        members = client.member_list()
    cluster = ",".join(f"{name if member.id == added.id else member.name}={peer_url}"
                       for member in members for peer_url in member.peer_urls)
    _print(f'\nETCD_NAME="{name}"\nETCD_INITIAL_CLUSTER="{cluster}"\n'
          'ETCD_INITIAL_CLUSTER_STATE="existing"')


@_command("member remove", "<memberID>", "remove a member, by its id or its name",
          wrong="Provide a single member ID")
def _cmd_member_remove(run: _Run) -> None:
    asked, client = run.args[0], run.client
    with _one_line_errors("Error while verifying ID against known members: ", shown=()):
        members = client.member_list()
    found = [member.id for member in members if member.id == asked] or [
        member.id for member in members if member.name == asked]
    if not found:
        raise _ExitError(f"Couldn't find a member in the cluster with an ID of {asked}.")
    if len(found) > 1:
        raise _ExitError(f"{len(found)} members are named {asked}; remove one of them by its id: "
                         f"{', '.join(found)}")
    id = found[0]
    with _one_line_errors(f"Received an error trying to remove member {id}: ", shown=()):
        try:
            client.member_remove(id)
        except HttpError as error:
            if error.status != http.HTTPStatus.GONE:    # removed already
                raise
    _print(f"Removed member {id} from cluster")


@_command("member update", "<memberID> <peerURLs>", "give a member other peer URLs",
          wrong="Provide an ID and a list of comma separated peerURL "
                "(0xabcd http://example.com,http://example1.com)")
def _cmd_member_update(run: _Run) -> None:
    id, urls = run.args
    client = run.client
    with _one_line_errors(shown=(400, 404, 409)):
        client.member_update(id, urls.split(","))
    _print(f"Updated member with ID {id} in cluster")


@_command("cluster-health", "", "ask every member whether it is healthy",
          _Flag(("forever", "f"), bool, "ask again every 10 seconds, until Ctrl-C"))
def _cmd_cluster_health(run: _Run) -> int:
    if not run.options.on("forever"):
        return _check_health(run.connect(_given_client))
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            _check_health(run.connect(_given_client))
            _print("\nnext check after 10 second...\n")
            time.sleep(_HEALTH_EVERY_S)
    return Exit.OK


def _check_health(client: Client) -> int:
    try:
        members = client.member_list()
    except EtcdError:
        _print("cluster may be unhealthy: failed to list members")
        raise
    width = max(len(member.id) for member in members) if sys.stdout.isatty() and members else 0
    healthy = [_member_is_healthy(client, member, width) for member in members]
    _print("cluster is " + (_coloured("healthy", _GREEN) if any(healthy)
                           else _coloured("unhealthy", _RED)))
    return Exit.OK if any(healthy) else Exit.UNHEALTHY


def _member_is_healthy(client: Client, member: Member, width: int) -> bool:
    unreachable = f"member {member.id.ljust(width)} is {_coloured('unreachable', _RED)}"
    if not member.client_urls:
        _print(f"{unreachable}: no available published client urls")
        return False
    for url in member.client_urls:
        try:
            healthy = client.health(url)
        except (EtcdError, ValueError) as error:
            why = _failure_line(error) if isinstance(error, EtcdError) else str(error)
            _print(f"failed to check the health of member {member.id} on {url}: {why}")
            continue
        word = "healthy" if healthy else "unhealthy"
        verdict = _coloured(word, _GREEN if healthy else _RED)
        _print(f"member {member.id.ljust(width)} is {verdict}: got {word} result from {url}")
        return healthy
    _print(f"{unreachable}: [{' '.join(member.client_urls)}] are all unreachable")
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


def _run_parallel(items: "Sequence[_Job]", workers: int, work: Callable[[_Job], None],
                  title: str) -> None:
    """Call `work` for every item on `workers` threads, until one raises; show the progress."""
    numbered, lock, stop = enumerate(items), threading.Lock(), threading.Event()

    def serve() -> None:
        try:
            while True:
                with lock:                          # guards the iterator and the terminal
                    number, item = next(numbered, (0, None))
                    if item is None or stop.is_set():
                        break
                    progress.show(number)
                work(item)
        finally:
            stop.set()

    with _Progress(title, len(items)) as progress, concurrent.futures.ThreadPoolExecutor(
            max(1, workers), "pyetcdctl") as pool:
        try:
            with lock:                              # the pool does not wait for a worker whose
                stop.set()                          # start Ctrl-C interrupted: it gets no item
                futures = [pool.submit(serve) for _ in range(max(1, workers))]
                stop.clear()
            for future in futures: future.result()
        finally:
            stop.set()


def _read_snapshot_04(path: str, hidden: "Sequence[str]") -> "list[tuple[str, str, int | None]]":
    """Return (key, value, ttl) of the files in a snapshot of etcd 0.4.

    Such a file is the JSON of a store, or a checksum line and JSON with the former in base64.
    Expired files are omitted, and hidden directories that are not in `hidden`.
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


def _snapshot_files(node: "Mapping[str, Any]", key: str, *,
                    hidden: bool) -> "Iterator[tuple[str, str, int | None]]":
    children = node.get("Children")
    if children is None:
        yield key, node["Value"], _seconds_left(node["ExpireTime"])
        return
    for name, child in sorted(children.items()):
        if hidden or not name.startswith("_"):
            yield from _snapshot_files(child, f"{key}/{name}", hidden=hidden)


def _seconds_left(instant: "str | None") -> "int | None":
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
    path, workers = run.options.text("snap"), run.options.number("c", 10)
    files = _read_snapshot_04(path, run.options.texts("hidden"))
    client = run.client

    def write(record: "tuple[str, str, int | None]") -> None:
        key, value, ttl = record
        client.set(key, value, ttl=max(ttl, _SNAP_TTL_MIN_S) if ttl else None)

    _print(f"starting to import snapshot {path} with {workers} clients")
    _run_parallel(files, workers, write, "import")
    _print(f"finished importing {len(files)} keys")
    return Exit.OK


# -- users, roles, auth


def _names(entries: "Sequence[Any] | None", field: str) -> "list[str]":
    """Return the names in a list of names or of objects: servers have both."""
    return [entry[field] if isinstance(entry, dict) else str(entry) for entry in entries or ()]


def _auth_call(call: Callable[..., _Answer], *args: Any) -> _Answer:
    with _one_line_errors():
        return call(*args)


def _exists(get: Callable[[str], Any], name: str) -> bool:
    with _one_line_errors():
        try:
            get(name)
        except EtcdError as error:
            if is_endpoint_failure(error):
                raise
            return False
    return True


def _call_command(name: str, arguments: str, help: str, call: Callable[..., Any], done: str,
                  wrong: str) -> None:
    @_command(name, arguments, help, wrong=wrong)
    def run_it(run: "_Run") -> None:
        _auth_call(call, run.client, *run.args)
        _print(done.format(*run.args))


@_command("user add", "<name>[:<password>]", "make a user", wrong=_A_USER)
def _cmd_user_add(run: _Run) -> None:
    text, client = run.args[0], run.client
    name = text.partition(":")[0]
    if _exists(client.user_get, name):
        raise _ExitError(f"User {name} already exists")
    _auth_call(client.user_add, name, _split_user(text, "New password: ")[1])
    _print(f"User {name} created")


@_command("user get", "<name>", "print a user's roles", wrong=_A_USER, formats=_JSON_TOO)
def _cmd_user_get(run: _Run) -> None:
    user = _auth_call(run.client.user_get, run.args[0])
    roles = _names(user.get("roles"), "role")
    if run.output == "json":
        _print_json({"user": user["user"], "roles": roles})
    else:
        _print(f"User: {user['user']}\nRoles: {' '.join(roles)}")


def _list_names(run: _Run, kind: str, listing: "Callable[[Client], Sequence[Any]]") -> None:
    client = run.client
    with _one_line_errors(shown=()):
        names = _names(listing(client), kind)
    if run.output == "json":
        _print_json({f"{kind}s": names})
    else:
        _print_lines(names)


_command("user list", "", "print the names of all users", wrong=_NO_ARGUMENTS, formats=_JSON_TOO)(
    lambda run: _list_names(run, "user", Client.user_list))
_command("role list", "", "print the names of all roles", wrong=_NO_ARGUMENTS, formats=_JSON_TOO)(
    lambda run: _list_names(run, "role", Client.role_list))
_call_command(
    "user remove", "<name>", "remove a user", Client.user_remove, "User {} removed", _A_USER)


def _change_roles(run: _Run, change: "Callable[[Client, str, Sequence[str]], Any]") -> None:
    roles = run.options.texts("roles")
    if not roles:
        raise _ExitError("No roles specified; please use `-roles`")
    _auth_call(change, run.client, run.args[0], roles)
    _print(f"User {run.args[0]} updated")


_command("user grant", "<name>", "grant roles to a user", _ROLES, wrong=_A_USER)(
    lambda run: _change_roles(run, Client.user_grant))
_command("user revoke", "<name>", "revoke roles of a user", _ROLES, wrong=_A_USER)(
    lambda run: _change_roles(run, Client.user_revoke))


@_command("user passwd", "<name>", "change a user's password", wrong=_A_USER)
def _cmd_user_passwd(run: _Run) -> None:
    name, client = run.args[0], run.client
    _auth_call(client.user_get, name)
    _auth_call(client.user_password, name, _ask_password("New password: "))
    _print("Password updated")


@_command("role add", "<name>", "make a role", wrong=_A_ROLE)
def _cmd_role_add(run: _Run) -> None:
    name, client = run.args[0], run.client
    if _exists(client.role_get, name):
        raise _ExitError(f"Role {name} already exists")
    _auth_call(client.role_add, name)
    _print(f"Role {name} created")


def _permitted(role: "Mapping[str, Any]") -> "tuple[list[str], list[str]]":
    kv = role["permissions"]["kv"]
    return list(kv.get("read") or ()), list(kv.get("write") or ())


@_command("role get", "<name>", "print what a role permits", wrong=_A_ROLE, formats=_JSON_TOO)
def _cmd_role_get(run: _Run) -> None:
    role = _auth_call(run.client.role_get, run.args[0])
    read, write = _permitted(role)
    if run.output == "json":
        _print_json(role)
    else:
        _print_lines([f"Role: {role['role']}", "KV Read:", *(f"\t{path}" for path in read),
                     "KV Write:", *(f"\t{path}" for path in write)])


_call_command(
    "role remove", "<name>", "remove a role", Client.role_remove, "Role {} removed", _A_ROLE)


def _change_permission(run: _Run, change: "Callable[[Client, str, str, str], dict[str, Any]]",
                       done: str) -> None:
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
    before = _auth_call(client.role_get, name)
    after = _auth_call(change, client, name, path, kinds[0])
    unchanged = _permitted(before) == _permitted(after)
    _print(f"{f'Role unchanged; already {done}' if unchanged else ''}Role {name} updated")


_command("role grant", "<name>", "permit a path", *_PERMISSION_FLAGS, wrong=_A_ROLE)(
    lambda run: _change_permission(run, Client.role_grant, "granted"))
_command("role revoke", "<name>", "undo role grant", *_PERMISSION_FLAGS, wrong=_A_ROLE)(
    lambda run: _change_permission(run, Client.role_revoke, "revoked"))
_call_command("auth enable", "", "check the rights of every request",
              Client.auth_enable, "Authentication Enabled", _NO_ARGUMENTS)
_call_command("auth disable", "", "permit every request",
              Client.auth_disable, "Authentication Disabled", _NO_ARGUMENTS)


# ============================================================================
# ctl/machines -- The machines of fleet, which every fleetd keeps in etcd, with 30 s to live.
# ----------------------------------------------------------------------------
# Source: fleet 0.11, registry/machine.go and fleetctl list-machines.
# ============================================================================


_FLEET_MACHINES = "/_coreos.com/fleet/machines"
_SHORT_ID_LENGTH = 8
_TAB_WIDTH = 8              # of the tabs between the columns of fleetctl, which are spaces here


@_command("machines", "", "list the machines that fleet has registered, as fleetctl list-machines",
          _Flag(("full", "l"), bool, "with whole machine ids"),
          _Flag(("no-legend",), bool, "without the headings"), own=True)
def _cmd_machines(run: _Run) -> None:
    rows = [] if run.options.on("no-legend") else [("MACHINE", "IP", "METADATA")]
    try:
        listing = run.client.get(_FLEET_MACHINES, recursive=True, sorted=True).node
    except KeyNotFound:
        pass                            # no fleetd has ever run
    else:
        rows += _machine_rows(listing, full=run.options.on("full"))
    widths = [(max(map(len, column)) // _TAB_WIDTH + 1) * _TAB_WIDTH for column in zip(*rows)]
    for machine, ip, metadata in rows:
        line = f"{machine:{widths[0]}}{ip:{widths[1]}}{metadata}"
        print(line.encode("utf-8", "replace").decode())


def _machine_rows(listing: Node, *, full: bool) -> "Iterator[tuple[str, str, str]]":
    """Yield id, address and metadata of each machine; report malformed ones on stderr."""
    for directory in listing.nodes:
        for node in directory.nodes:
            if not node.key.endswith("/object"):
                continue
            try:
                state = json.loads(node.value or "")
                id = _escape(state.get("ID") or directory.key.rpartition("/")[2])
                pairs = sorted((state.get("Metadata") or {}).items())
                metadata = _escape(",".join(f"{name}={value}" for name, value in pairs))
                address = _escape(state.get("PublicIP") or "-")
            except (ValueError, TypeError, AttributeError, LookupError):
                print(f"pyetcdctl: {_escape(node.key)} is no machine of fleet", file=sys.stderr)
                continue
            yield id if full else id[:_SHORT_ID_LENGTH] + "...", address, metadata or "-"


# ============================================================================
# ctl/transfer -- Export, import and mirror.
# ============================================================================


_EXPORT_MARK = "# keys of etcd v2, written by pyetcdctl export; see pyetcdctl help export"
_EXPORT_VERSION = 1
_LONG_S = 60.0                  # --timeout and --total-timeout for long replies
_RETRY_MIN_S = 0.2              # first wait of a mirror that cannot reach its target; doubled
_RETRY_MAX_S = 10.0             # up to this

_PREFIX = _Flag(("prefix",), str, "only keys below this one (default: all)")
_DEST_PREFIX = _Flag(("dest-prefix",), str, "their new prefix (default: the same)")
_DRY_RUN = _Flag(("dry-run",), bool, "print the changes, do nothing")
_WORKERS = _Flag(("c",), int, "connections to use (default: 10)", 1)


def _with_long_timeouts(client: Client, settings: _Options) -> Client:
    """Return `client` with time limits for long replies, unless options set them."""
    client.read_timeout = settings.seconds("timeout", _LONG_S)
    client.total_timeout = settings.seconds("total-timeout", _LONG_S) or None
    return client


# -- a tree as text


class _Record(NamedTuple):
    key: str
    value: "str | None" = None                     # None for a directory
    expiration: "str | None" = None                # RFC 3339 instant

    @classmethod
    def from_node(cls, node: Node) -> "_Record":
        return cls(node.key, None if node.dir else node.value or "", node.expiration)

    @classmethod
    def from_line(cls, line: str) -> "_Record":
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
    def from_json(cls, raw: "Mapping[str, Any]") -> "_Record":
        key, value, expiration = raw["key"], raw.get("value"), raw.get("expiration")
        if raw.get("dir", False) != (value is None) or not isinstance(key, str):
            raise ValueError(f"{raw} has not either a value or dir")
        if not isinstance(value, (str, type(None))):
            raise ValueError(f"the value of {key} is not text")
        _seconds_left(expiration)
        return cls(key, value, expiration)

    @property
    def ttl(self) -> "int | None":
        """Seconds left; None: permanent; 0 or less: expired."""
        return _seconds_left(self.expiration)

    def line(self) -> str:
        key = _escape(self.key)
        fields = [key.rstrip("/") + "/", ""] if self.value is None else [key, _escape(self.value)]
        if self.expiration:
            return "\t".join([*fields, f"expires={self.expiration}"])
        return fields[0] if self.value is None else "\t".join(fields)

    def json(self) -> str:
        content = {"dir": True} if self.value is None else {"value": self.value}
        shown = {"key": self.key, **content}
        if self.expiration:
            shown["expiration"] = self.expiration
        return json.dumps(shown, ensure_ascii=False)


def _records_in(node: Node) -> "list[_Record]":
    """Return the records of a node and of all nodes below it; the root itself has none."""
    nodes = node.walk() if node.key == "/" else itertools.chain([node], node.walk())
    return [_Record.from_node(found) for found in nodes]


def _parse_export(text: str) -> "list[_Record]":
    """Parse either form, or a reply of the keys API.  Raises ValueError."""
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


def _rebased(key: str, prefix: str, dest_prefix: str) -> "str | None":
    """Return `key` with another prefix; None if it does not have `prefix`."""
    prefix, dest_prefix = prefix.rstrip("/"), dest_prefix.rstrip("/")
    if key == (prefix or "/"):
        return dest_prefix or "/"
    return dest_prefix + key[len(prefix):] if key.startswith(prefix + "/") else None


def _prefixes(options: _Options) -> "tuple[str, str]":
    prefix = clean_key(options.text("prefix"))
    return prefix, clean_key(options.text("dest-prefix") or prefix)


@_command("export", "[key]", "print a tree, for import",
          _Flag(("format",), str, "json (default), or text: one key in a line, for diff"),
          _Flag(("hidden",), list, "also this hidden directory; may be repeated"), own=True)
def _cmd_export(run: _Run) -> None:
    form = run.options.text("format") or "json"
    if form not in ("json", "text"):
        raise _ExitError("--format is json or text")
    key, client = (run.args or ["/"])[0], _with_long_timeouts(run.client, run.settings)
    with _Progress("export"):
        result = client.get(key, recursive=True, sorted=True, quorum=True)
        records = _records_in(result.node)
        for hidden in run.options.texts("hidden"):
            found = client.get(hidden, recursive=True, sorted=True, quorum=True)
            records += _records_in(found.node)
    # Lone surrogates from a server become escapes, which both forms support.
    plain = (text.encode("utf-8", "backslashreplace").decode() for text in
             (record.json() if form == "json" else record.line() for record in records))
    with _Progress("export", len(records)) as progress:
        _print_lines(itertools.chain(
            [_EXPORT_MARK] if form == "text" else
            [f'{{"pyetcd_export": {_EXPORT_VERSION}, "key": {json.dumps(result.key)}, '
             f'"etcdIndex": {result.etcd_index}, "nodes": ['],
            _separated(plain, "," if form == "json" else "", progress),
            [] if form == "text" else ["]}"]))


def _separated(texts: "Iterable[str]", separator: str, progress: _Progress) -> "Iterator[str]":
    previous: str | None = None
    for number, text in enumerate(texts):
        progress.show(number)
        if previous is not None:
            yield previous + separator
        previous = text
    if previous is not None:
        yield previous


class _Import:
    def __init__(self, client: Client, options: _Options) -> None:
        self._client = client
        self._keep = options.on("keep")
        self._ttl = options.number("ttl") or None
        self._workers = options.number("c", 10)
        self._lock = threading.Lock()               # guards `kept`
        self.kept = 0                               # keys that existed

    def write(self, records: "Sequence[_Record]") -> None:
        for record in _needed_dirs(records):
            self._write_one(record)
        files = [record for record in records if record.value is not None]
        _run_parallel(files, self._workers, self._write_one, "import")

    def ttl(self, record: _Record) -> "int | None":
        return self._ttl if record.expiration and self._ttl else record.ttl

    def is_expired(self, record: _Record) -> bool:
        ttl = self.ttl(record)
        return ttl is not None and ttl <= 0

    def _write_one(self, record: _Record) -> None:
        ttl = self.ttl(record)
        if ttl is not None and ttl <= 0:            # expired meanwhile
            return
        try:
            if record.value is None:
                self._client.mkdir(record.key, ttl=ttl)
            else:
                write = self._client.create if self._keep else self._client.set
                write(record.key, record.value, ttl=ttl)
        except NodeExists:
            if record.value is not None:
                with self._lock:
                    self.kept += 1
            elif ttl and not self._keep:
                _set_dir(self._client, record.key, ttl, prevExist=True)


def _needed_dirs(records: "Sequence[_Record]") -> "list[_Record]":
    """Return the directories that writing the files does not create, or not with their ttl."""
    filled = {record.key.rpartition("/")[0] for record in records}
    return [record for record in records
            if record.value is None and (record.expiration or record.key not in filled)]


def _read_records(path: str) -> "list[_Record]":
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return _parse_export(data.decode("utf-8"))
    except OSError as error:
        raise _ExitError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _ExitError(f"{path} is not what export writes: {error}") from error


@_command("import", "<file>", "write the output of export; - is stdin", _PREFIX,
          _DEST_PREFIX, _Flag(("keep",), bool, "do not overwrite existing keys"),
          _Flag(("ttl",), int, "new ttl in seconds of keys with one, also of expired ones", 1),
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
        _print("no snapshot file provided (use --snap)")
        return Exit.BAD_ARGS
    prefixes = _prefixes(run.options)
    found = [(record, _rebased(clean_key(record.key), *prefixes))
             for record in _read_records(run.args[0])]
    records = [record._replace(key=key) for record, key in found if key is not None and key != "/"]
    importing = _Import(_with_long_timeouts(run.client, run.settings), run.options)
    alive = [record for record in records if not importing.is_expired(record)]
    if run.options.on("dry-run"):
        _print_lines(f"{'mkdir' if record.value is None else 'set'} {_escape(record.key)}"
                    for record in alive)
        return Exit.OK
    importing.write(alive)
    files = sum(record.value is not None for record in alive)
    notes = [(importing.kept, "existed and were kept"),
             (len(records) - len(alive), "had expired and were left out"),
             (len(found) - len(records), "lie elsewhere and were left out")]
    _print("; ".join([f"imported {files - importing.kept} keys",
                     *(f"{count} {note}" for count, note in notes if count)]))
    return Exit.OK


# -- mirror


class _Change(NamedTuple):
    verb: str                                       # set, mkdir or delete
    key: str
    value: str = ""
    ttl: "int | None" = None

    def apply(self, client: Client) -> None:
        """Write the change; it is idempotent."""
        if self.verb == "set":
            client.set(self.key, self.value, ttl=self.ttl)
        elif self.verb == "mkdir":
            with contextlib.suppress(NotFile):      # the directory exists
                _set_dir(client, self.key, self.ttl)
        else:
            with contextlib.suppress(KeyNotFound):
                client.delete(self.key, recursive=True)


class _Mirror:
    """Makes a tree of the target equal to one of the source, and keeps it equal.

    A mirror keeps no state.  After a restart, after more changes than the source remembers, and
    when a change does not fit the target, it compares both trees and writes the difference.
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
        """Raise _ExitError if the mirror would copy its own writes."""
        for client in (self._source, self._target):
            client.member_list()                    # for the cluster id of the reply
        inside = (_rebased(self._prefix, self._dest_prefix, ""),
                  _rebased(self._dest_prefix, self._prefix, ""))
        if self._source.cluster_id == self._target.cluster_id and any(inside):
            raise _ExitError("source and target overlap: they are the same cluster")

    def copy(self) -> int:
        """Make the trees equal; return the source's index for `follow`."""
        index, wanted = self._listing(self._source, self._prefix)
        _, present = self._listing(self._target, self._dest_prefix)
        deletions, dirs, files = self._difference(wanted, present)
        for change in (*deletions, *dirs):
            self._do(change)
        _run_parallel(files, self._workers, self._do, "mirror")
        _print(f"{'would copy' if self.dry_run else 'copied'} {len(files)} keys, "
              f"{'would remove' if self.dry_run else 'removed'} {len(deletions)}; "
              f"source index {index}")
        return index + 1

    def follow(self, index: int) -> None:
        while True:
            try:
                with self._source.watcher(
                        self._prefix, recursive=True, index=index, relist=False) as changes:
                    for event in changes:
                        self._repeat(event)
            except (ApiError, HttpError) as error:  # history cleared, or the trees differ
                if isinstance(error, Unauthorized) or is_endpoint_failure(error):
                    raise
                index = self._with_retries(self.copy)

    def _listing(self, client: Client, prefix: str) -> "tuple[int, dict[str, Node]]":
        """Return a cluster's index and all nodes below `prefix` by their keys at the target."""
        try:
            result = client.get(prefix, recursive=True, sorted=True, quorum=True)
        except KeyNotFound as error:
            return error.index, {}
        if not result.node.dir:
            raise _ExitError(f"{prefix} is no directory")
        moved = ((_rebased(node.key, prefix, self._dest_prefix), node)
                 for node in result.node.walk())
        return result.etcd_index, {key: node for key, node in moved if key is not None}

    def _difference(self, wanted: "Mapping[str, Node]", present: "Mapping[str, Node]",
                    ) -> "tuple[list[_Change], list[_Change], list[_Change]]":
        """Return the changes: deletions, directories and files."""
        deletions: list[_Change] = []
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

    def _is_equal(self, node: Node, copy: "Node | None") -> bool:
        expires = self._with_ttl and node.ttl is not None
        return (copy is not None and not copy.dir and copy.value == node.value
                and (copy.ttl is not None) == expires)

    def _ttl(self, node: Node) -> "int | None":
        return max(1, node.ttl) if self._with_ttl and node.ttl is not None else None

    def _repeat(self, event: Result) -> None:
        key = _rebased(event.key, self._prefix, self._dest_prefix)
        if key is None or key == "/":
            return
        if event.action in ("delete", "expire", "compareAndDelete"):
            if self._deletes:
                self._with_retries(lambda: self._do(_Change("delete", key)))
            return
        verb = "mkdir" if event.node.dir else "set"
        change = _Change(verb, key, event.value or "", self._ttl(event.node))
        self._with_retries(lambda: self._do(change))

    def _do(self, change: _Change) -> None:
        if self.verbose:
            _print(f"{change.verb} {_escape(change.key)}")
        if not self.dry_run:
            change.apply(self._target)

    def _with_retries(self, action: Callable[[], _Answer]) -> _Answer:
        """Repeat `action`, which is idempotent, until a server replies."""
        wait_s = _RETRY_MIN_S
        while True:
            try:
                return action()
            except EtcdError as error:
                if not is_endpoint_failure(error):
                    raise
                _print_error(f"{error}; trying again")
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(_RETRY_MAX_S, 2 * wait_s)


@_command("mirror", "<target>", "keep a copy of a tree in another cluster",
          _PREFIX, _DEST_PREFIX, _Flag(("once",), bool, "end after the copy"), _DRY_RUN,
          _Flag(("no-delete",), bool, "do not remove keys that only the target has"),
          _Flag(("ttl",), bool, "let copies expire by themselves (see the manual)"),
          _Flag(("verbose",), bool, "print every change"), _WORKERS,
          _Flag(("dest-cert",), str, "client certificate for the target"),
          _Flag(("dest-key",), str, "key of that certificate"),
          _Flag(("dest-cacert",), str, "certificates of the target's authorities"),
          _Flag(("dest-username",), str, "user[:password] at the target"), own=True,
          wrong="Provide the endpoints of the target, comma between")
def _cmd_mirror(run: _Run) -> None:
    settings = _Options()
    for flag, own in (("dest-cert", "cert-file"), ("dest-key", "key-file"),
                      ("dest-cacert", "ca-file"), ("dest-username", "username")):
        settings.put(_Flag((own,), str, ""), run.options.text(flag))
    access = _Access.from_settings(settings, environment=False)
    with _with_long_timeouts(run.client, run.settings) as source, _with_long_timeouts(
            access.client(endpoints=run.args[0].split(",")), run.settings) as target:
        mirror = _Mirror(source, target, run.options)
        mirror.check()
        index = mirror.copy()
        if not mirror.dry_run and not run.options.on("once"):
            mirror.follow(index)


# ============================================================================
# ctl/more -- Tree, top, bench and completion.
# ============================================================================


_TOP_EVERY_S = 2.0
_TREE_VALUE_MAX = 60            # characters of a value that `tree --values` prints
_BENCH_TOTAL = 10_000
_BENCH_PREFIX = "/pyetcd-bench"
_BENCH_SIZE_BYTES = 64
_BENCH_KEYS = 1_000             # distinct keys that bench writes and reads

# -- tree


@_command("tree", "[key]", "print a directory as a tree",
          _Flag(("values",), bool, "with the values of keys"),
          _Flag(("ascii",), bool, "without box characters"), _QUORUM, own=True)
def _cmd_tree(run: _Run) -> None:
    options = run.options
    node = _with_long_timeouts(run.client, run.settings).get(
        (run.args or ["/"])[0], recursive=True, sorted=True, quorum=options.on("quorum")).node
    strokes = ("|-- ", "`-- ", "|   ") if options.on("ascii") else ("├── ", "└── ", "│   ")
    _print(_escape(node.key) + (_tree_tail(node, options) if node.key != "/" else ""))
    _print_lines(_tree_lines(node, options, strokes))
    below = list(node.walk()) if node.dir else [node]
    dirs = sum(child.dir for child in below)
    _print(f"\n{dirs} directories, {len(below) - dirs} keys")


def _tree_lines(node: Node, options: _Options, strokes: "tuple[str, str, str]") -> "Iterator[str]":
    fork, end, along = strokes
    for child in node.nodes:
        last = child is node.nodes[-1]
        name = _coloured(_escape(child.key.rpartition("/")[2]), _BLUE if child.dir else "")
        yield (end if last else fork) + name + _tree_tail(child, options)
        for line in _tree_lines(child, options, strokes):
            yield ("    " if last else along) + line


def _tree_tail(node: Node, options: _Options) -> str:
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
    taken_at: float                                 # monotonic seconds
    self_stats: "Mapping[str, Any]"
    store: "Mapping[str, int]"

    def count(self, *names: str) -> int:
        return sum(self.store.get(name, 0) for name in names)


class _Top:
    """Samples all members; prints a table of the rates since the last sample."""

    def __init__(self, run: _Run) -> None:
        self._client = run.client
        self._access = run.access
        self._members = self._client.member_list()
        self._clients: dict[str, Client] = {}       # by member id
        self._samples: dict[str, _Sample] = {}

    def lines(self) -> "list[str]":
        """Take a sample of every member; return the table."""
        with contextlib.suppress(EtcdError):        # no reply: use the known list
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

    def _sample(self, member: Member) -> "_Sample | None":
        if not member.client_urls:
            return None
        client = self._clients.get(member.id)
        if client is None:
            client = self._clients[member.id] = self._access.client(endpoints=member.client_urls)
        try:
            with client:                            # closes its connections
                return _Sample(time.monotonic(), client.statistics("self"),
                               client.statistics("store"))
        except EtcdError:
            return None

    def _row(self, member: Member, sample: "_Sample | None") -> "tuple[str, ...]":
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
def _screen() -> "Iterator[Callable[[float], bool]]":
    """Take over the terminal; yield a function that waits and returns whether q was pressed.

    The terminal is restored afterwards, also after Ctrl-C and SIGTERM.
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


@_command("top", "", "show the activity of every member, until q or Ctrl-C",
          _Flag(("interval",), float, "time between two samples (default: 2s)", 0.001),
          _Flag(("once",), bool, "print the rates of one interval as text, then end"), own=True)
def _cmd_top(run: _Run) -> None:
    top, every_s = _Top(run), run.options.seconds("interval", _TOP_EVERY_S)
    if run.options.on("once"):
        top.lines()
        time.sleep(every_s)
        _print_lines(top.lines())
        return
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        while True:
            _print_lines([*top.lines(), ""])
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
    """Sends requests on many connections; records their latencies."""

    def __init__(self, client: Client, options: _Options, kind: str) -> None:
        self._client = client
        self.connections = options.number("connections", 8)
        self.total = options.number("total", _BENCH_TOTAL)
        self.value = "x" * options.number("size", _BENCH_SIZE_BYTES)
        self._reads_percent = {"put": 0, "get": 100}.get(kind, options.number("reads", 90))
        prefix = clean_key(options.text("prefix") or _BENCH_PREFIX).rstrip("/")
        self.directory = f"{prefix}/{random.getrandbits(32):08x}"
        self._made = list(self._missing(prefix))
        self.latencies_s: list[float] = []          # append is atomic
        self.failures: list[EtcdError] = []

    def prepare(self) -> None:
        if self._reads_percent:
            keys = [self._key(number) for number in range(min(_BENCH_KEYS, self.total))]
            _run_parallel(keys, self.connections, self._put, "bench: preparing")

    def run(self) -> float:
        """Send all requests; return the duration in seconds."""
        started_at = time.monotonic()
        _run_parallel(range(self.total), self.connections, self._one, "bench")
        return time.monotonic() - started_at

    def clean_up(self) -> None:
        try:
            with contextlib.suppress(KeyNotFound):
                self._client.delete(self.directory, recursive=True)
            for directory in self._made:
                with contextlib.suppress(KeyNotFound, DirNotEmpty):     # in use by another run
                    self._client.rmdir(directory)
        except EtcdError as error:
            _print_error(f"pyetcdctl bench: {self.directory} is still there: {error}")

    def _missing(self, directory: str) -> "Iterator[str]":
        """Yield the missing directories, the inner ones first."""
        while directory:
            try:
                self._client.get(directory)
            except KeyNotFound:
                yield directory
            except EtcdError:                       # later requests report it
                return
            else:
                if directory == _BENCH_PREFIX:      # left by a run that was killed
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
        # 37 and 100 are coprime: reads and writes mix evenly.
        is_read = number * 37 % 100 < self._reads_percent
        begun_at = time.perf_counter()
        try:
            (self._client.get if is_read else self._put)(self._key(number))
        except EtcdError as error:
            self.failures.append(error)
        else:
            self.latencies_s.append(time.perf_counter() - begun_at)


@_command("bench", "[put|get|mixed]", "put load on a cluster; print rate and latencies",
          _Flag(("connections",), int, "concurrent requests (default: 8)", 1),
          _Flag(("total",), int, f"requests to send (default: {_BENCH_TOTAL})", 1),
          _Flag(("size",), int, f"bytes of a value (default: {_BENCH_SIZE_BYTES})", 0),
          _Flag(("reads",), int, "with mixed: percentage of reads (default: 90)", 0),
          _Flag(("prefix",), str, f"directory to work in (default: {_BENCH_PREFIX})"),
          own=True)
def _cmd_bench(run: _Run) -> int:
    kind = (run.args or ["put"])[0]
    if kind not in ("put", "get", "mixed") or run.options.number("reads") > 100:
        raise _ExitError("bench is put, get or mixed, with --reads from 0 to 100")
    if kind != "mixed":
        run.options.refuse(f"with {kind}", "reads")
    bench = _Bench(_with_long_timeouts(run.client, run.settings), run.options, kind)
    try:
        bench.prepare()
        elapsed_s = bench.run()
    finally:
        bench.clean_up()
    done = len(bench.latencies_s)
    _print(f"{kind}: {done:,} requests, values of {len(bench.value):,} bytes, {bench.connections} "
          f"connections, {elapsed_s:.2f} s: {done / elapsed_s:,.0f} per second")
    if done:
        _print("milliseconds: " + ", ".join(
            f"{name} {bench.percentile_ms(share):.2f}" for name, share in (
                ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0))))
    if bench.failures:
        _print(f"{len(bench.failures):,} requests failed, the first: {bench.failures[0]}")
    return Exit.SERVER_ERROR if bench.failures else Exit.OK


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
        _print_lines("\t".join(pair).rstrip("\t") for pair in _candidates(run.args[1:] or [""]))
        return
    if len(run.args) != 1 or run.args[0] not in _COMPLETIONS:
        raise _ExitError("Provide the name of a shell: bash, zsh or fish")
    _print(_COMPLETIONS[run.args[0]].rstrip("\n"))


def _split_command(words: "Sequence[str]") -> "tuple[str, list[str]]":
    """Return the name of the command (one or two words, "" for none), and the rest."""
    for size in (2, 1):
        name = " ".join(words[:size])
        if len(words) >= size and name in _COMMANDS:
            return name, list(words[size:])
    return "", list(words)


def _candidates(words: "Sequence[str]") -> "list[tuple[str, str]]":
    """Return (word, note) for each completion of the last of `words`."""
    *before, current = words
    settings, rest, awaited = _scan(before, _GLOBAL_FLAGS, mixed=False)
    name, args = _split_command(rest)
    flags: Sequence[_Flag] = _GLOBAL_FLAGS
    if name:
        _, args, awaited = _scan(args, _COMMANDS[name].flags, mixed=_COMMANDS[name].mixed)
        flags = _COMMANDS[name].flags
    found: list[tuple[str, str]] = []
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


def _scan(words: "Sequence[str]", flags: "Sequence[_Flag]", *,
          mixed: bool) -> "tuple[_Options, list[str], _Flag | None]":
    """Return options, arguments, and the last flag if its value is missing."""
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


def _keys_like(settings: _Options, current: str) -> "list[tuple[str, str]]":
    """Return the keys in the directory of `current`; none without a reply."""
    directory = current.rpartition("/")[0]
    user = settings.text("username", "ETCDCTL_USERNAME")
    if user and ":" not in user and not os.environ.get("ETCDCTL_PASSWORD"):
        return []                                   # a completion must not ask for it
    try:
        with _given_client(settings, _Access.from_settings(settings)) as client:
            nodes = client.get(directory, sorted=True).node.nodes
    except (EtcdError, _ExitError):
        return []
    slash = "/" if current.startswith("/") or not current else ""
    keys = (slash + node.key.lstrip("/") for node in nodes)
    return [(key + "/" if node.dir else key, "") for key, node in zip(keys, nodes)]


if __name__ == "__main__":
    sys.exit(main())
