"""A client for the etcd v2 keys API (pyetcd, etcd 2.x, etcd 3.4 with --enable-v2).

    from pyetcd_client import Client, KeyNotFound

    client = Client()                                  # http://127.0.0.1:2379
    client = Client("http://10.0.0.1:2379", "10.0.0.2:2379")
    client.set("foo", "bar", ttl=60).modified_index
    client.get("foo").value
    client.compare_and_swap("foo", "new", prev_value="bar")
    for event in client.watch_iter("/config", recursive=True):
        print(event.action, event.key, event.value)

The client never guesses.  A request goes to another endpoint only if the first connection was
never made, or if it is a read.  When the fate of a write is unknown (its answer was lost, late or
unreadable, or the server gave up on it) the error raised says `maybe_applied=True`, and nothing is
sent again: what to do then is for the caller to decide, who knows whether it may happen twice.

`python -m pyetcd_client` is a command line in the manner of etcdctl 2.3.

Sections
  1. Errors
  2. Results
  3. Endpoints and connections
  4. Client
  7. Leases and locks
  8. Queues, barriers, counters, caches, services
  9. Command line

Sources: etcd 2.3 API (keys, members, errorcode), etcdctl 2.3.8, RFC 9110 section 9.2.
"""

from __future__ import annotations

import contextlib
import copy
import http
import json
import os
import random
import re
import ssl
import sys
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    FrozenSet,
    Generic,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Tuple,
    Type,
    TypeVar,
    Union,
)
from urllib.parse import quote, urlencode, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import NewConnectionError, ReadTimeoutError

__version__ = "0.3.0"

__all__ = [
    "EtcdError", "ApiError", "KeyNotFound", "CompareFailed", "NotFile", "NotDir", "NodeExists",
    "RootReadOnly", "DirNotEmpty", "Unauthorized", "PrevValueRequired", "TtlNotANumber",
    "IndexNotANumber", "InvalidField", "InvalidForm", "RefreshValue", "RefreshTtlRequired",
    "RaftInternal", "EventIndexCleared", "HttpError", "BadReply", "TransportError",
    "ConnectionFailed", "RequestTimeout", "WatchTimeout", "ClusterIdChanged",
    "Node", "Result", "Member", "Endpoints", "Watch", "Client",
    "LockExpired", "Heartbeat", "Lease", "Contender", "Lock", "RLock", "RWLock", "Semaphore",
    "Leader", "Election", "QueueItem", "Queue", "Barrier", "DoubleBarrier", "Counter",
    "CachedTree", "Instance", "Registration", "ServiceRegistry", "main",
]

DEFAULT_ENDPOINT = "http://127.0.0.1:2379"
CONNECT_TIMEOUT_S = 2.0         # per address of an endpoint; then the next endpoint is tried
READ_TIMEOUT_S = 10.0           # silence of a server; above the 7 s after which etcd gives up
TOTAL_TIMEOUT_S = 30.0          # one call over all endpoints; when it is over no other one is tried
IDLE_CLOSE_S = 3.0              # a connection that was idle for longer is not used again
WATCH_POLL_S = 60.0             # a silent watch is asked anew, so that a dead peer is noticed
BACKOFF_MIN_S = 0.1             # first wait of a watch that lost its server; doubled each time
BACKOFF_MAX_S = 5.0
REDIRECTS_MAX = 5               # of one read; more raise BadReply


# ============================================================================
# 1. Errors -- one class per error code of etcd, and those of the transport
# ----------------------------------------------------------------------------
# Knows: nothing.
# ============================================================================

class EtcdError(Exception):
    """Root of everything this module raises about a server or the way to it.

    message        what went wrong, without the endpoint
    code           etcd's error code; 0 if the answer had none, or there was no answer
    cause          etcd's cause, usually the key
    index          etcd index at the time of the error
    status         HTTP status; 0 if there was no answer
    endpoint       base URL of the server that was asked
    maybe_applied  True if this was a write which may have been, or may yet be, applied
    """

    code = 0

    def __init__(
        self, message: str = "", *, code: Optional[int] = None, cause: str = "", index: int = 0,
        status: int = 0, endpoint: str = "", maybe_applied: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = self.code if code is None else code
        self.cause = cause
        self.index = index
        self.status = status
        self.endpoint = endpoint
        self.maybe_applied = maybe_applied
        self.others: Tuple[EtcdError, ...] = ()     # from the endpoints tried after this one

    @property
    def failures(self) -> Tuple[EtcdError, ...]:
        """One error per endpoint that was tried, in order; the first is this one."""
        return (self, *self.others)

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
        return f"{self.code}: {self.message} ({self.cause}) [{self.index}]"


_API_ERRORS: Dict[int, Type[ApiError]] = {}

_ApiErrorType = TypeVar("_ApiErrorType", bound=Type[ApiError])


def _registered(code: int) -> Callable[[_ApiErrorType], _ApiErrorType]:
    """Make the decorated class the one raised for error `code`."""
    def register(error_class: _ApiErrorType) -> _ApiErrorType:
        error_class.code = code
        _API_ERRORS[code] = error_class
        return error_class
    return register


@_registered(100)
class KeyNotFound(ApiError):
    """A path component does not exist; the cause is its path."""


@_registered(101)
class CompareFailed(ApiError):
    """prev_value or prev_index does not hold; the cause shows given and stored."""


@_registered(102)
class NotFile(ApiError):
    """A directory stands where a file is needed."""


@_registered(104)
class NotDir(ApiError):
    """A file stands in the middle of the path."""


@_registered(105)
class NodeExists(ApiError):
    """create or mkdir found the key."""


@_registered(107)
class RootReadOnly(ApiError):
    """The root cannot be changed."""


@_registered(108)
class DirNotEmpty(ApiError):
    """Deleting a directory with children, hidden ones included, needs recursive=True."""


@_registered(110)
class Unauthorized(ApiError):
    """Auth is enabled and the request lacks the right."""


@_registered(201)
class PrevValueRequired(ApiError):
    """prev_value was given, but empty."""


@_registered(202)
class TtlNotANumber(ApiError):
    """ttl is not an unsigned integer."""


@_registered(203)
class IndexNotANumber(ApiError):
    """prev_index or index is not an unsigned integer."""


@_registered(209)
class InvalidField(ApiError):
    """A boolean parameter has another value, or does not fit the method."""


@_registered(210)
class InvalidForm(ApiError):
    """The query or the body cannot be parsed, or is too large (10 MiB)."""


@_registered(211)
class RefreshValue(ApiError):
    """A refresh came with a value."""


@_registered(212)
class RefreshTtlRequired(ApiError):
    """A refresh came without a ttl."""


@_registered(300)
class RaftInternal(ApiError):
    """The request did not get through consensus in time; a write may be applied later."""


@_registered(401)
class EventIndexCleared(ApiError):
    """The index to watch from lies before the event history (1000 events)."""


class HttpError(EtcdError):
    """An error answer that is not one of the keys API: members, health, a proxy in between."""


class TransportError(EtcdError):
    """There was no usable answer."""


class ConnectionFailed(TransportError):
    """The connection could not be made, or broke.

    For a write, maybe_applied=False means that it was never made: the request was not sent.
    """


class RequestTimeout(TransportError):
    """The server did not answer in time."""


class WatchTimeout(RequestTimeout):
    """No event came in time; `index` is where the next watch must begin to miss none."""


class BadReply(TransportError):
    """The answer is not what etcd would say: garbage, cut short, or redirected for ever."""


class ClusterIdChanged(TransportError):
    """The answer comes from another cluster than earlier ones.

    A write was applied there.  Set `client.cluster_id = None` to accept the next cluster seen.
    """


class LockExpired(EtcdError):
    """The key of a lock was gone while its holder still waited for it or relied on it."""


# ============================================================================
# 2. Results -- frozen values made from the JSON of an answer
# ----------------------------------------------------------------------------
# Knows: section 1.  Names are the JSON keys in snake_case; `raw` is the JSON itself.
# ============================================================================

_T = TypeVar("_T")


class _Reply(NamedTuple):
    """One HTTP answer, read to its end."""

    status: int
    headers: Mapping[str, str]      # names in any case
    body: bytes

    def header_number(self, name: str) -> int:
        """Return a numeric header; 0 if it is missing or not a number."""
        text = self.headers.get(name, "")
        return int(text) if text.isdigit() and text.isascii() else 0

    def json(self) -> Any:
        """Return the body decoded; raise ValueError if it is not JSON."""
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
    value: Optional[str] = None
    dir: bool = False
    ttl: Optional[int] = None
    expiration: Optional[str] = None
    modified_index: int = 0
    created_index: int = 0
    nodes: Tuple[Node, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Node:
        """Return the node a server described; the root has no key in JSON and is "/" here."""
        return cls(
            key=raw.get("key") or "/",
            value=raw.get("value"),
            dir=raw.get("dir", False),
            ttl=raw.get("ttl", 0 if "expiration" in raw else None),
            expiration=raw.get("expiration"),
            modified_index=raw.get("modifiedIndex", 0),
            created_index=raw.get("createdIndex", 0),
            nodes=tuple(map(cls.from_json, raw.get("nodes") or ())),
            raw=raw,
        )

    def walk(self) -> Iterator[Node]:
        """Yield every node below this one, parents before their children."""
        for child in self.nodes:
            yield child
            yield from child.walk()


@dataclass(frozen=True)
class Result:
    """The answer to a keys request, or an event of a watch.

    action      get, set, create, update, delete, compareAndSwap, compareAndDelete, expire
    prev_node   what was there before; None if nothing was, and for get and create
    etcd_index  store index when the request was answered (for an event: accepted)
    """

    action: str
    node: Node
    prev_node: Optional[Node] = None
    etcd_index: int = 0
    raft_index: int = 0
    raft_term: int = 0
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def key(self) -> str:
        """Key of the node."""
        return self.node.key

    @property
    def value(self) -> Optional[str]:
        """Value of the node; None for a directory and after a delete."""
        return self.node.value

    @property
    def modified_index(self) -> int:
        """Index of the change that made the node what it is."""
        return self.node.modified_index

    @property
    def created_index(self) -> int:
        """Index of the change that created the node."""
        return self.node.created_index

    @property
    def nodes(self) -> Tuple[Node, ...]:
        """Visible children of a listed directory."""
        return self.node.nodes


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


def _parse_result(reply: _Reply) -> Result:
    raw = _expect_object(reply.json())
    previous = raw.get("prevNode")
    return Result(
        action=raw["action"],
        node=Node.from_json(_expect_object(raw["node"])),
        prev_node=None if previous is None else Node.from_json(_expect_object(previous)),
        etcd_index=reply.header_number("X-Etcd-Index"),
        raft_index=reply.header_number("X-Raft-Index"),
        raft_term=reply.header_number("X-Raft-Term"),
        raw=raw,
    )


def _parse_object(reply: _Reply) -> Dict[str, Any]:
    return _expect_object(reply.json())


def _parse_members(reply: _Reply) -> List[Member]:
    return [Member.from_json(raw) for raw in _parse_object(reply)["members"]]


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
# 3. Endpoints and connections
# ----------------------------------------------------------------------------
# Knows: sections 1-2.  Turns what requests and urllib3 raise into section 1.
# ============================================================================

def _base_url(text: str) -> str:
    """Return `text` as scheme://host:port; raise ValueError if it does not name a server."""
    url = text.strip()
    url = url if "://" in url else f"http://{url}"
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


class Endpoints:
    """The servers a client may ask: one is used until it fails, then the next in turn.

    Thread: any.
    """

    def __init__(self, urls: Iterable[str]) -> None:
        listed = [urls] if isinstance(urls, str) else list(urls)
        cleaned = [_base_url(part) for url in listed for part in url.split(",")]
        if not cleaned:
            raise ValueError("at least one endpoint is needed")
        self.urls: Tuple[str, ...] = tuple(dict.fromkeys(cleaned))
        self._position = 0                          # of the endpoint in use
        self._lock = threading.Lock()               # guards _position; nothing is locked inside

    @property
    def current(self) -> str:
        """Base URL of the endpoint in use."""
        return self.urls[self._position]

    def candidates(self) -> Tuple[str, ...]:
        """Return every endpoint once, the one in use first."""
        position = self._position
        return self.urls[position:] + self.urls[:position]

    def failed(self, url: str) -> None:
        """Move on to the next endpoint, unless another thread has done so already."""
        with self._lock:
            if self.urls[self._position] == url:
                self._position = (self._position + 1) % len(self.urls)


class _Connections:
    """Keep-alive connections of one thread, or of one watch; not shared, hence without a lock."""

    def __init__(self) -> None:
        self.pid = os.getpid()                      # a forked child must not use these sockets
        self._used_at = time.monotonic()
        self.session = session = requests.Session()
        # Proxies, .netrc passwords and CA paths out of the environment would reach etcd without
        # anybody having asked for it; looking them up also takes 0.16 ms of a GET's 0.69 ms.
        session.trust_env = False
        session.max_redirects = REDIRECTS_MAX
        session.headers["User-Agent"] = f"pyetcd-client/{__version__}"
        for scheme in ("http://", "https://"):
            # No retries below us: urllib3 does not know which requests may be sent twice.
            session.mount(scheme, HTTPAdapter(max_retries=0))

    def ready(self) -> requests.Session:
        """Return the session; connections that were idle for IDLE_CLOSE_S are closed first.

        A server or a load balancer may close an idle connection while our request is on its way.
        Such a request was probably not executed, but nobody can know, so for a write that is
        an error with maybe_applied=True.  urllib3 replaces a connection whose end has arrived
        already; the race that remains is made rare by not using one that was idle for
        IDLE_CLOSE_S, which is below the idle limits in common use (5 s and more).  The price is
        one round trip for a new connection.
        """
        now = time.monotonic()
        if now - self._used_at > IDLE_CLOSE_S:
            self.session.close()                    # closes its connections; it stays usable
        self._used_at = now
        return self.session

    def used(self) -> None:
        """Note that an exchange just ended: idle time counts from here."""
        self._used_at = time.monotonic()

    def close(self) -> None:
        """Close the connections; the next request makes new ones."""
        self.session.close()


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and what requests and urllib3 wrapped in it, outermost first."""
    current: Optional[BaseException] = error
    for _ in range(10):                             # they wrap four deep; a cycle ends here
        if current is None:
            return
        yield current
        inner = (getattr(current, "reason", None), *current.args)
        current = next((item for item in inner if isinstance(item, BaseException)),
                       current.__cause__ or current.__context__)


def _reason(causes: Sequence[BaseException]) -> str:
    """Return what the innermost error says, in a few words."""
    for cause in reversed(causes):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
    return str(causes[-1]) or type(causes[-1]).__name__


def _transport_error(
    error: requests.RequestException, endpoint: str, *, write: bool,
) -> TransportError:
    """Return `error` in our terms; it decides whether a write may have reached the server."""
    causes = list(_causes(error))
    if isinstance(error, requests.ConnectTimeout):
        return ConnectionFailed("connect timed out", endpoint=endpoint)
    # Refused, unreachable, unknown name, untrusted certificate: no request was sent.
    if any(isinstance(c, (NewConnectionError, ssl.SSLCertVerificationError)) for c in causes):
        return ConnectionFailed(_reason(causes), endpoint=endpoint)
    if any(isinstance(c, (requests.Timeout, ReadTimeoutError)) for c in causes):
        return RequestTimeout("no answer in time", endpoint=endpoint, maybe_applied=write)
    if isinstance(error, requests.TooManyRedirects):
        return BadReply("too many redirects", endpoint=endpoint)
    return ConnectionFailed(_reason(causes), endpoint=endpoint, maybe_applied=write)


def _status_error(reply: _Reply, endpoint: str, *, write: bool) -> EtcdError:
    """Return the error an answer stands for.

    A 4xx is a refusal.  After a 5xx to a write the proposal may sit in a log and be applied when
    the quorum returns (etcd 2.3 does that), or whoever stands between us and etcd lost the answer.
    """
    maybe_applied = write and reply.status >= 500
    try:
        raw = _expect_object(reply.json())
    except (ValueError, RecursionError):
        raw = {}
    code, message = raw.get("errorCode"), str(raw.get("message", ""))
    if isinstance(code, int):
        index = raw.get("index")
        return _API_ERRORS.get(code, ApiError)(
            message, code=code, cause=str(raw.get("cause", "")),
            index=index if isinstance(index, int) else 0,
            status=reply.status, endpoint=endpoint, maybe_applied=maybe_applied)
    if 300 <= reply.status < 400:
        message = f"redirected to {reply.headers.get('Location')}: not followed"
    return HttpError(
        message or f"HTTP status {reply.status}", status=reply.status, endpoint=endpoint,
        maybe_applied=maybe_applied)


# ============================================================================
# 4. Client
# ----------------------------------------------------------------------------
# Knows: sections 1-3.  Client._request is the only place that does I/O.
# ============================================================================

_READS = frozenset(("GET", "HEAD"))
_SUCCESS: FrozenSet[int] = frozenset((200, 201))
_HEALTH_STATUSES: FrozenSet[int] = frozenset((200, 503))    # /health, /v2/members/leader
_FORM_HEADERS = {"Content-Type": "application/x-www-form-urlencoded"}

_Field = Union[None, bool, int, str]                # a parameter; None leaves it out


def _clean_key(key: str) -> str:
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


def _encode_fields(fields: Mapping[str, _Field]) -> str:
    """Return the parameters that were given, form-encoded."""
    given = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in fields.items() if value is not None
    }
    return urlencode(given, errors="surrogateescape")


def _keys_target(key: str, query: Mapping[str, _Field]) -> str:
    # Lone surrogates stand for bytes that are not UTF-8, as they come from sys.argv.
    path = quote("/v2/keys" + _clean_key(key), errors="surrogateescape")
    text = _encode_fields(query)
    return f"{path}?{text}" if text else path


@dataclass(frozen=True)
class _Call(Generic[_T]):
    """A request, independent of the endpoint it goes to."""

    method: str
    target: str                                     # path and query, percent-encoded
    parse: Callable[[_Reply], _T]
    form: Optional[bytes] = None
    statuses: FrozenSet[int] = _SUCCESS             # those `parse` understands
    on_head: Optional[Callable[[_Reply], None]] = None  # called before a body that may take long

    @property
    def write(self) -> bool:
        """Whether sending it twice could matter."""
        return self.method not in _READS


def _is_endpoint_failure(error: EtcdError) -> bool:
    """Whether another endpoint might do better: not after a refusal, which is an answer."""
    if isinstance(error, TransportError):
        return not isinstance(error, ClusterIdChanged)
    return error.status >= 500


class Client:
    """A connection to an etcd cluster; safe to share between threads.

    Client()                               http://127.0.0.1:2379
    Client("http://h:p", "h:p", ...)       several members of one cluster
    Client(endpoints=[...])                the same

    connect_timeout_s  to make a connection
    read_timeout_s     for each silence of the server; below 7 it may cut short etcd's own answer
    total_timeout_s    for a call over all endpoints: when it has passed no other one is tried

    Every keys method returns a Result and raises an EtcdError.  Keys may be written with or
    without the leading slash.  Nothing is sent before the first call.

    Thread: any.  Each thread has connections of its own, so calls never wait for each other.
    """

    def __init__(
        self, *urls: str, endpoints: Optional[Iterable[str]] = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S, read_timeout_s: float = READ_TIMEOUT_S,
        total_timeout_s: float = TOTAL_TIMEOUT_S,
    ) -> None:
        if urls and endpoints is not None:
            raise ValueError("give endpoints either as arguments or as endpoints=, not both")
        if min(connect_timeout_s, read_timeout_s, total_timeout_s) <= 0:
            raise ValueError("timeouts are seconds above 0")
        self.endpoints = Endpoints(
            (urls or (DEFAULT_ENDPOINT,)) if endpoints is None else endpoints)
        self.cluster_id: Optional[str] = None       # hex; from the first answer
        self.connect_timeout_s = connect_timeout_s
        self.read_timeout_s = read_timeout_s
        self.total_timeout_s = total_timeout_s
        self._local = threading.local()             # .connections: those of the calling thread

    # -- keys: reading

    def get(
        self, key: str, *, recursive: bool = False, sorted: bool = False, quorum: bool = False,
    ) -> Result:
        """Return the node at `key`.

        recursive  list a directory to all depths, not only its children
        sorted     order each level of a listing by key
        quorum     read through consensus: never stale, slower, fails without a quorum
        """
        query = {"recursive": recursive or None, "sorted": sorted or None, "quorum": quorum or None}
        return self._perform(_Call("GET", _keys_target(key, query), _parse_result))

    def ls(
        self, key: str = "/", *, recursive: bool = False, quorum: bool = False,
    ) -> List[Node]:
        """Return the visible nodes of a directory ordered by key; for a file, the file itself.

        recursive  every node below, parents before their children
        """
        node = self.get(key, recursive=recursive, sorted=True, quorum=quorum).node
        return list(node.walk()) if node.dir else [node]

    # -- keys: writing

    def set(self, key: str, value: str, *, ttl: Optional[int] = None) -> Result:
        """Write a file, whether or not it exists; parents are created.

        ttl  seconds until it expires; None: never, whatever was set before
        """
        return self._put(key, {"value": value, "ttl": ttl})

    def create(self, key: str, value: str, *, ttl: Optional[int] = None) -> Result:
        """Write a file that must not exist yet.  Raises NodeExists."""
        return self._put(key, {"value": value, "ttl": ttl, "prevExist": False})

    def update(self, key: str, value: str, *, ttl: Optional[int] = None) -> Result:
        """Write a file that must exist.  Raises KeyNotFound."""
        return self._put(key, {"value": value, "ttl": ttl, "prevExist": True})

    def append(self, key: str, value: str, *, ttl: Optional[int] = None) -> Result:
        """Create a file with the next name in directory `key`; names sort in order of creation.

        After an error with maybe_applied=True only a look at the directory tells whether the
        value is in: make values unique if that matters.
        """
        form = _encode_fields({"value": value, "ttl": ttl}).encode()
        return self._perform(_Call("POST", _keys_target(key, {}), _parse_result, form))

    def refresh(self, key: str, ttl: int) -> Result:
        """Give an existing file a new ttl and leave its value; watchers are not told.

        Needs etcd 2.3: earlier ones do not know refresh and would empty the value.
        """
        return self._put(key, {"ttl": ttl, "refresh": True, "prevExist": True})

    def compare_and_swap(
        self, key: str, value: str, *, prev_value: Optional[str] = None,
        prev_index: Optional[int] = None, ttl: Optional[int] = None,
    ) -> Result:
        """Write a file if it has the given value and modified index.  Raises CompareFailed.

        At least one condition is needed.  The API cannot compare with an empty value.
        """
        conditions = self._conditions(prev_value, prev_index)
        return self._put(key, {"value": value, "ttl": ttl, **conditions})

    def delete(self, key: str, *, dir: bool = False, recursive: bool = False) -> Result:
        """Remove a file; with `dir` also an empty directory, with `recursive` also a full one."""
        return self._delete(key, {"dir": dir or None, "recursive": recursive or None})

    def compare_and_delete(
        self, key: str, *, prev_value: Optional[str] = None, prev_index: Optional[int] = None,
    ) -> Result:
        """Remove a file if it has the given value and modified index.  Raises CompareFailed."""
        return self._delete(key, self._conditions(prev_value, prev_index))

    def mkdir(self, key: str, *, ttl: Optional[int] = None) -> Result:
        """Create a directory that must not exist yet; with `ttl`, it expires with its content."""
        return self._put(key, {"dir": True, "ttl": ttl, "prevExist": False})

    def rmdir(self, key: str) -> Result:
        """Remove an empty directory (or a file, as etcd does).  Raises DirNotEmpty."""
        return self.delete(key, dir=True)

    # -- keys: watching

    def watch(
        self, key: str, *, recursive: bool = False, index: Optional[int] = None,
        timeout: Optional[float] = None,
    ) -> Result:
        """Return the next change of `key` (with `recursive`, also of what lies below).

        index    the first change to consider: modified_index + 1 of the last one seen; None: now
        timeout  seconds to wait for a change; None: for ever.  Raises WatchTimeout.

        Raises EventIndexCleared if `index` is more than 1000 changes back.
        """
        with Watch(self, key, recursive=recursive, index=index, timeout=timeout) as events:
            return next(events)

    def watch_iter(
        self, key: str, *, recursive: bool = False, index: Optional[int] = None,
        relist: bool = False,
    ) -> Watch:
        """Return an endless iterator over the changes of `key`; see Watch."""
        return Watch(self, key, recursive=recursive, index=index, relist=relist)

    # -- cluster

    def members(self) -> List[Member]:
        """Return the members of the cluster, ordered by id."""
        return self._perform(_Call("GET", "/v2/members", _parse_members))

    def leader(self) -> Optional[Member]:
        """Return the leader as the answering member knows it; None during an election."""
        call = _Call("GET", "/v2/members/leader", _parse_leader, statuses=_HEALTH_STATUSES)
        return self._perform(call)

    def stats(self, name: str = "self") -> Dict[str, Any]:
        """Return statistics of the answering member: `self`, `store` or (leader only) `leader`."""
        if name not in ("self", "store", "leader"):
            raise ValueError(f"no such statistics: {name!r}; there are self, store and leader")
        return self._perform(_Call("GET", f"/v2/stats/{name}", _parse_object))

    def version(self) -> Dict[str, str]:
        """Return {"etcdserver": ..., "etcdcluster": ...} of the answering member."""
        return self._perform(_Call("GET", "/version", _parse_version))

    def health(self, endpoint: Optional[str] = None) -> bool:
        """Return what one server says of itself (the one in use, if none is given).

        Raises TransportError if it does not answer.
        """
        base_url = self.endpoints.current if endpoint is None else _base_url(endpoint)
        call = _Call("GET", "/health", _parse_health, statuses=_HEALTH_STATUSES)
        timeouts = (self.connect_timeout_s, self.read_timeout_s)
        return self._request(base_url, call, self._connections(), timeouts)

    def close(self) -> None:
        """Close the calling thread's connections; other threads' close when they end."""
        self._connections().close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- below: no public names

    def _put(self, key: str, fields: Mapping[str, _Field]) -> Result:
        form = _encode_fields(fields).encode()
        return self._perform(_Call("PUT", _keys_target(key, {}), _parse_result, form))

    def _delete(self, key: str, query: Mapping[str, _Field]) -> Result:
        return self._perform(_Call("DELETE", _keys_target(key, query), _parse_result))

    @staticmethod
    def _conditions(prev_value: Optional[str], prev_index: Optional[int]) -> Dict[str, _Field]:
        # To the server prevIndex=0 is no condition at all: the write would be unconditional.
        if prev_value is None and prev_index is None:
            raise ValueError("prev_value or prev_index is needed")
        if prev_index is not None and prev_index < 1:
            raise ValueError("prev_index is a modified index, 1 or more")
        return {"prevValue": prev_value, "prevIndex": prev_index}

    def _connections(self) -> _Connections:
        connections: Optional[_Connections] = getattr(self._local, "connections", None)
        if connections is None or connections.pid != os.getpid():
            connections = self._local.connections = _Connections()
        return connections

    def _perform(self, call: _Call[_T]) -> _T:
        """Send `call` to one endpoint after the other, as long as that is safe.

        Raises the error of the endpoint tried first, with those of the others in `failures`.
        """
        deadline = time.monotonic() + self.total_timeout_s
        failures: List[EtcdError] = []
        for endpoint in self.endpoints.candidates():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            timeouts = (min(self.connect_timeout_s, left_s), min(self.read_timeout_s, left_s))
            try:
                return self._request(endpoint, call, self._connections(), timeouts)
            except EtcdError as error:
                self._note_failure(endpoint, call, error)
                failures.append(error)
        failures[0].others = tuple(failures[1:])
        raise failures[0]

    def _note_failure(self, endpoint: str, call: _Call[Any], error: EtcdError) -> None:
        """Give up `endpoint` if it failed; raise `error` again unless the next may be tried."""
        if not _is_endpoint_failure(error):
            raise error
        self.endpoints.failed(endpoint)
        never_sent = isinstance(error, ConnectionFailed) and not error.maybe_applied
        if call.write and not never_sent:
            raise error

    def _request(
        self, endpoint: str, call: _Call[_T], connections: _Connections,
        timeouts: Tuple[float, float],
    ) -> _T:
        """Send `call` to `endpoint` once and return what its answer means."""
        session = connections.ready()
        try:
            # Redirects of reads are followed.  A write that is redirected may already have been
            # carried out by who redirects it, so that is an error.
            with session.request(
                call.method, endpoint + call.target, data=call.form, timeout=timeouts, stream=True,
                headers=_FORM_HEADERS if call.form is not None else None,
                allow_redirects=not call.write,
            ) as response:
                if call.on_head is not None and response.status_code == 200:
                    call.on_head(_Reply(response.status_code, response.headers, b""))
                reply = _Reply(response.status_code, response.headers, response.content)
        except requests.RequestException as error:
            raise _transport_error(error, endpoint, write=call.write) from error
        connections.used()
        self._check_cluster(endpoint, call, reply)
        return self._judge(endpoint, call, reply)

    def _check_cluster(self, endpoint: str, call: _Call[Any], reply: _Reply) -> None:
        cluster_id = reply.headers.get("X-Etcd-Cluster-Id")
        if cluster_id is None:                      # /version, /health, stats
            return
        known = self.cluster_id = self.cluster_id or cluster_id
        if known != cluster_id:
            raise ClusterIdChanged(
                f"cluster id is {cluster_id}, was {known}", status=reply.status,
                endpoint=endpoint, maybe_applied=call.write and reply.status in _SUCCESS)

    def _judge(self, endpoint: str, call: _Call[_T], reply: _Reply) -> _T:
        if reply.status not in call.statuses:
            raise _status_error(reply, endpoint, write=call.write)
        try:
            return call.parse(reply)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadReply(
                f"the answer cannot be understood ({error or type(error).__name__})",
                status=reply.status, endpoint=endpoint, maybe_applied=call.write) from error


class Watch:
    """An endless iterator over the changes of a key; made by Client.watch_iter.

    It asks for one change after the other, each from the index after the last, so that none is
    lost and none repeated while a server restarts, the leader changes or an endpoint fails.
    Server-side streams are not used: etcd 2.3 and 3.4 let one fall silent after an event from
    the history or when its consumer is slow, and report some deletions twice.

    index    the first change to consider; None: those after the first answer of a server
    relist   what to do when more than 1000 changes went by unseen (error 401).  False: raise
             EventIndexCleared.  True: yield a Result with action "get" that holds the node as it
             is now (with its whole tree if recursive; if there is none, modified_index is 0),
             and go on from there: the changes in between are not known.
    timeout  seconds each `next` may take; then WatchTimeout, after which `next` may be called
             again and misses nothing

    If no endpoint answers the very first request that error is raised; later the watch waits,
    0.1 to 5 s, and tries again.

    Thread: one, except for `close`.
    """

    def __init__(
        self, client: Client, key: str, *, recursive: bool = False, index: Optional[int] = None,
        relist: bool = False, timeout: Optional[float] = None,
    ) -> None:
        self.index = index or None                  # next to ask for; 0 is "now" too
        self._client = client
        self._key = key
        self._recursive = recursive
        self._relist = relist
        self._timeout = timeout
        self._connections = _Connections()          # a watch blocks its connection: own ones
        self._connected = False                     # whether a server ever answered this watch
        self._head_seen = False                     # whether it answered the request under way
        self._failures = 0                          # since the last answer
        self._closed = threading.Event()

    def __iter__(self) -> Watch:
        return self

    def __next__(self) -> Result:
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        while not self._closed.is_set():
            endpoint = self._client.endpoints.current
            left_s = WATCH_POLL_S if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                raise WatchTimeout("no change in time", index=self.index or 0, endpoint=endpoint)
            result = self._next_or_none(endpoint, min(left_s, WATCH_POLL_S))
            if result is not None:
                self._failures = 0
                return result
        raise StopIteration

    def close(self) -> None:
        """End the iteration; a wait in another thread ends within WATCH_POLL_S seconds."""
        self._closed.set()
        self._connections.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_or_none(self, endpoint: str, wait_s: float) -> Optional[Result]:
        """Ask once, for at most `wait_s`; None if there is nothing yet and asking goes on."""
        self._head_seen = False
        try:
            return self._poll(endpoint, wait_s)
        except EventIndexCleared:
            self._connected = True
            if not self._relist:
                raise
            return self._list_or_none(endpoint, wait_s)
        except RequestTimeout as error:
            # After the head, silence only means that nothing changed.  If the server is gone the
            # next connection fails, and that moves us on.
            if not self._head_seen and wait_s >= WATCH_POLL_S:
                self._pause_after(endpoint, error, wait_s)
        except EtcdError as error:
            self._pause_after(endpoint, error, wait_s)
        return None

    def _poll(self, endpoint: str, wait_s: float) -> Result:
        query: Dict[str, _Field] = {
            "wait": True, "recursive": self._recursive or None, "waitIndex": self.index}
        call = _Call("GET", _keys_target(self._key, query), _parse_result, on_head=self._on_head)
        timeouts = (min(self._client.connect_timeout_s, wait_s), wait_s)
        result = self._client._request(endpoint, call, self._connections, timeouts)
        self.index = result.modified_index + 1
        return result

    def _on_head(self, head: _Reply) -> None:
        """Note from where a watch without an index runs, in case the connection breaks now."""
        self._connected = self._head_seen = True
        if self.index is None:
            self.index = head.header_number("X-Etcd-Index") + 1

    def _pause_after(self, endpoint: str, error: EtcdError, wait_s: float) -> None:
        """Wait before the next attempt, at most `wait_s`; raise `error` if there should be none."""
        if not _is_endpoint_failure(error):
            raise error
        endpoints = self._client.endpoints
        endpoints.failed(endpoint)
        self._failures += 1
        if not self._connected and self._failures >= len(endpoints.urls):
            raise error
        longest_s = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2 ** min(self._failures - 1, 10))
        self._closed.wait(min(wait_s, longest_s * random.uniform(0.5, 1.0)))

    def _list_or_none(self, endpoint: str, wait_s: float) -> Optional[Result]:
        """Return the present state as a Result with action "get", and go on watching after it.

        Read by quorum: a member that lags behind could show a state older than the events
        already delivered, which would then be repeated.
        """
        try:
            result = self._client.get(self._key, recursive=self._recursive, quorum=True)
        except KeyNotFound as error:
            nothing = Node(key=_clean_key(self._key))
            result = Result("get", nothing, etcd_index=error.index)
        except EtcdError as error:
            self._pause_after(endpoint, error, wait_s)
            return None
        self.index = result.etcd_index + 1
        return result


# ============================================================================
# 7. Leases and locks
# ----------------------------------------------------------------------------
# Knows: sections 1-5, through few verbs of Client, gathered in the functions below.
#
# What every recipe rests on.  A write whose fate is unknown carries a uuid, so that a look tells
# whether it is in.  A lease is counted from before the request that granted it was sent, on a
# clock of this machine that runs on while the machine sleeps, and less a margin.  Who waits
# watches one key, and looks anew after every event, timeout and error, so that a lost event costs
# time only.
# ============================================================================

LEASE_TTL_S = 30
EXPIRY_MARGIN = 0.1             # share of a ttl after which a lease counts as over before its time
CALL_TIMEOUT_S = 8.0            # of one request; above the 7 s after which etcd gives up on a write
OUTAGE_S = 30.0                 # how long a recipe waits for a cluster that does not answer
WAIT_SLICE_S = 20.0             # a waiter looks again after so long, even if nothing happened
_REMOVALS = frozenset(("delete", "expire", "compareAndDelete"))

_LostCallback = Optional[Callable[[], None]]


def _clock() -> float:
    """Return seconds that count on while the machine sleeps, where the system can tell."""
    clock_id = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock_id is None else time.clock_gettime(clock_id)


def _left(deadline: Optional[float], longest_s: float) -> float:
    """Return the seconds until `deadline` (None: never), from 0 to `longest_s`."""
    return longest_s if deadline is None else max(0.0, min(longest_s, deadline - _clock()))


def _insist(attempt: Callable[[float], _T], patience_s: float = OUTAGE_S) -> _T:
    """Repeat what may be repeated while no server can answer; then raise what the last one said.

    attempt  is given the seconds it may take
    """
    deadline, pause_s = _clock() + patience_s, 0.05
    while True:
        try:
            return attempt(min(CALL_TIMEOUT_S, max(deadline - _clock(), 1.0)))
        except EtcdError as error:
            if not _is_endpoint_failure(error) or _clock() + pause_s >= deadline:
                raise
        time.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, 1.0)


def _within(client: Client, timeout_s: float) -> Client:
    """Return `client` with another limit for its calls."""
    limited = copy.copy(client)                     # shares endpoints and connections
    names = ("read_timeout", "total_timeout", "read_timeout_s", "total_timeout_s")
    vars(limited).update(dict.fromkeys(names, timeout_s))
    return limited


def _read(client: Client, key: str, patience_s: float = OUTAGE_S, *,
          recursive: bool = False) -> Result:
    """Return what a quorum knows of `key`."""
    return _insist(lambda timeout_s: _within(client, timeout_s).get(
        key, recursive=recursive, quorum=True), patience_s)


def _list(client: Client, directory: str, patience_s: float = OUTAGE_S) -> Tuple[List[Node], int]:
    """Return the children of a directory, in the order they were made, and the index they are of.

    That is the number an in-order file has as its name: its created_index too, until somebody
    renews it by an unconditional write, as python-etcd does.
    """
    try:
        found = _read(client, directory, patience_s)
    except KeyNotFound as error:
        return [], error.index
    def order(node: Node) -> int:
        name = _name(node.key)
        return int(name) if name.isdigit() else node.created_index
    return sorted(found.nodes, key=order), found.etcd_index


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _create_once(
    client: Client, key: str, value: str, ttl: Optional[int], patience_s: float = OUTAGE_S,
) -> Tuple[Node, bool]:
    """Create a file whose value nobody else writes there; raise NodeExists if another did.

    Repeating a creation is harmless: if an earlier attempt is in, the value says so, and the
    second result is False.
    """
    try:
        made = _insist(lambda timeout_s: _within(client, timeout_s).create(
            key, value, ttl=ttl), patience_s)
        return made.node, True
    except NodeExists:
        node = _read(client, key).node
        if node.value != value:
            raise
        return node, False


def _append_once(
    client: Client, directory: str, value: str, ttl: int, patience_s: float = OUTAGE_S,
) -> Tuple[Node, bool]:
    """Create an in-order file with a value that nobody else writes.

    After an unknown fate the value is looked for, and written again if it is not there.  Should
    the first one arrive even later there are two for a while; the second result is False then.
    """
    sure = True

    def attempt(timeout_s: float) -> Node:
        nonlocal sure
        try:
            return _within(client, timeout_s).append(directory, value, ttl=ttl).node
        except EtcdError as error:
            if not error.maybe_applied:
                raise
            sure = False
            found = [node for node in _list(client, directory)[0] if node.value == value]
            if not found:
                raise
            return found[0]
    return _insist(attempt, patience_s), sure


def _remove(client: Client, key: str, value: str, patience_s: float) -> None:
    """Delete a file if it has `value`; what cannot be deleted now is left to its ttl."""
    with contextlib.suppress(EtcdError):
        _insist(lambda timeout_s: _within(client, timeout_s).compare_and_delete(
            key, prev_value=value), patience_s)


def _watch(
    client: Client, key: str, index: int, *, recursive: bool = False,
    timeout_s: Optional[float] = None,
) -> Watch:
    """Return the changes of `key` from `index` on."""
    return Watch(
        client, key, recursive=recursive, index=index, timeout=timeout_s, relist=False)


def _await(
    client: Client, key: str, index: int, wait_s: float, *,
    children: FrozenSet[str] = frozenset(), started: Callable[[Watch], object] = id,
) -> None:
    """Wait for a change of `key` after `index`, at most `wait_s`.

    children  wait for one of these actions below `key` instead
    started   is given the watch, so that another thread can close it

    May return early: who waits looks again.
    """
    try:
        with _watch(client, key, index + 1, recursive=bool(children),
                    timeout_s=wait_s) as events:
            started(events)
            for event in events:
                if not children or event.action in children:
                    return
    except (WatchTimeout, EventIndexCleared):
        pass
    except EtcdError as error:
        if not _is_endpoint_failure(error):
            raise
        time.sleep(min(wait_s, 0.2))                # then the look tells whether that lasts


_HeartbeatType = TypeVar("_HeartbeatType", bound="Heartbeat")


class Heartbeat:
    """Keeps a file that exists from expiring, without waking those who watch it.

        with Heartbeat(client, "/jobs/7/running", ttl=10) as heartbeat:
            ...
            heartbeat.alive             # False: it may be gone

    ttl      seconds, at least 1; renewed after a third of it
    on_lost  called once, on the thread of the heartbeat, when `alive` has become False without
             `stop`: no server could renew the file in time, it is gone, or its value has changed

    Guarantee: `alive` is False before a server removes the file, and stays so.  It is read off
    the local clock, whatever the thread and the network do.
    Limit: a tenth of the ttl must cover by how much the wall clocks of the members differ, since
    one of them sets the instant of expiry and another one acts on it.  `alive` speaks of the
    moment it was asked: what is done a moment later needs a fencing token.
    etcd before 2.3 cannot refresh: there each renewal is a write that watchers see.

    Thread: any.  It runs a daemon thread, which `stop` joins.
    """

    def __init__(self, client: Client, key: str, ttl: int = LEASE_TTL_S, *,
                 on_lost: _LostCallback = None) -> None:
        if ttl < 1:
            raise ValueError("ttl is seconds, at least 1")
        self.client = client
        self.key = _clean_key(key)
        self.ttl = ttl
        self._on_lost = on_lost
        self._value = ""
        self._index = 0                             # modified index as last known
        self._silent = False                        # whether the server is known to have refresh
        self._due_at = 0.0                          # next renewal
        self._lock = threading.Lock()               # guards the next three; a leaf
        self._expires_at = 0.0
        self._over = True                           # stopped or lost, and never again alive
        self._pid = 0                               # a forked child holds nothing
        self._stopped = threading.Event()
        self._thread: Optional[threading.Thread] = None

    @property
    def alive(self) -> bool:
        """Whether the file is certain to be there."""
        with self._lock:
            self._over = self._over or _clock() >= self._expires_at
            return not self._over and self._pid == os.getpid()

    @property
    def value(self) -> str:
        """Value of the file."""
        return self._value

    def start(self: _HeartbeatType) -> _HeartbeatType:
        """Renew the file now, and from now on.  Raises KeyNotFound, or that no server answers."""
        return self._start(OUTAGE_S)
    def stop(self) -> bool:
        """Stop renewing, and leave the file to its ttl.  Return whether it was alive until now."""
        alive = self.alive
        if self._pid != os.getpid():                # in a forked child it is the parent's
            return False
        with self._lock:
            self._over = True
        self._stopped.set()
        self._leave()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()                     # at most CALL_TIMEOUT_S: one request
        return alive

    def __enter__(self: _HeartbeatType) -> _HeartbeatType:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- below: no public names

    def _start(self: _HeartbeatType, patience_s: float) -> _HeartbeatType:
        if self._thread is not None and self._thread.is_alive() and not self._stopped.is_set():
            return self                             # started already
        self._obtain(patience_s)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"pyetcd-heartbeat {self.key}", daemon=True)
        self._thread.start()
        return self

    def _obtain(self, patience_s: float) -> None:
        """Get the file to keep; the end of its life is known afterwards."""
        node = _read(self.client, self.key, patience_s).node
        self._value, self._index = node.value or "", node.modified_index
        self._adopt(patience_s)

    def _adopt(self, patience_s: float) -> None:
        """Renew a file whose remaining life is not known."""
        sent_at = _clock()
        self._index = _insist(self._swap_ours, patience_s).modified_index
        self._granted_at(sent_at)

    def _leave(self) -> None:
        """Do what follows the last renewal."""

    def _granted_at(self, sent_at: float) -> None:
        """Begin a new life of the file, from before the request that gave it was sent."""
        with self._lock:
            self._pid, self._over = os.getpid(), False
            self._expires_at = sent_at + self.ttl * (1 - EXPIRY_MARGIN)
        self._due_at = sent_at + self.ttl / 3

    def _run(self) -> None:
        while self._keep() and self._regain():
            pass

    def _regain(self) -> bool:
        """Do what follows a loss; return whether there is a file to keep again."""
        if self._on_lost is not None:
            self._on_lost()
        return False

    def _keep(self) -> bool:
        """Renew until stopped (return False) or lost (return True)."""
        while True:
            wake_at = min(self._due_at, self._expires_at)
            if self._stopped.wait(max(0.0, wake_at - _clock())):
                return False
            if not self.alive:
                break
            try:
                self._renew()
            except (KeyNotFound, CompareFailed, NotFile, NotDir):
                break
            except EtcdError:                       # expires unless a later attempt succeeds
                self._due_at = _clock() + min(0.5, self.ttl / 10)
        with self._lock:
            self._over = True
        return not self._stopped.is_set()

    def _renew(self) -> None:
        """Give the file its ttl anew.  Raises CompareFailed or KeyNotFound if it is lost."""
        sent_at = _clock()
        timeout_s = max(0.1, min(CALL_TIMEOUT_S, self.ttl / 3, self._expires_at - sent_at))
        self._index = self._swap_ours(timeout_s).modified_index
        with self._lock:                            # what was reported as lost stays lost
            if not self._over and _clock() < self._expires_at:
                self._expires_at = sent_at + self.ttl * (1 - EXPIRY_MARGIN)
        self._due_at = sent_at + self.ttl / 3

    def _swap_ours(self, timeout_s: float) -> Result:
        """Renew the file; a renewal whose answer was lost may have changed its index."""
        try:
            return self._swap(timeout_s)
        except CompareFailed:
            node = _within(self.client, timeout_s).get(self.key, quorum=True).node
            if node.value != self._value:           # it is somebody else's
                raise
            self._index = node.modified_index
            return self._swap(timeout_s)

    def _swap(self, timeout_s: float, *, announce: bool = False) -> Result:
        """Renew on condition that nothing happened to the file since the index we know.

        Therefore a renewal that was given up for lost cannot take effect after a later one, and
        shorten what that has granted.
        """
        client = _within(self.client, timeout_s)
        fields: Dict[str, _Field] = {
            "ttl": self.ttl, "prevValue": self._value or None, "prevIndex": self._index}
        if announce:
            return client._put(self.key, {**fields, "value": self._value})
        fields["refresh"] = True
        if not self._silent:
            try:                                    # etcd before 2.3 would empty the value
                return client._put(self.key, {**fields, "value": self._value or " "})
            except RefreshValue:
                self._silent = True
        return client._put(self.key, fields)


class Lease(Heartbeat):
    """A file that exists as long as this process keeps it: made by start, removed by stop.

        with Lease(client, "/hosts/a", "10.0.0.1", ttl=10) as lease:
            ...

    value    tells who made it: two leases of one key need different values; None: a uuid

    Guarantee: made once, even if answers are lost; start raises NodeExists while the key is
    somebody else's.  `alive` as for Heartbeat.  A crash leaves the file for at most its ttl (and
    the half second that etcd takes to notice).
    Limit: as for Heartbeat.

    Thread: any.
    """

    def __init__(self, client: Client, key: str, value: Optional[str] = None,
                 ttl: int = LEASE_TTL_S, *, on_lost: _LostCallback = None) -> None:
        super().__init__(client, key, ttl, on_lost=on_lost)
        if value == "":
            raise ValueError("etcd cannot compare with an empty value")
        self._value = value or uuid.uuid4().hex

    def start(self: _HeartbeatType) -> _HeartbeatType:
        """Make the file and keep it.  Raises NodeExists, or that no server answers."""
        return super().start()

    def stop(self) -> bool:
        """Remove the file.  Return whether it was alive until now.

        If no server answers, the file is left to its ttl.
        """
        return super().stop()

    # -- below: no public names

    def _obtain(self, patience_s: float) -> None:
        sent_at = _clock()
        self._index, fresh = self._make(patience_s)
        if fresh and _clock() - sent_at < self.ttl / 3:
            self._granted_at(sent_at)
            return
        try:
            self._adopt(patience_s)
        except (KeyNotFound, CompareFailed) as error:
            raise LockExpired("expired before it was known to be made", cause=self.key) from error

    def _make(self, patience_s: float) -> Tuple[int, bool]:
        """Create the file; return its index, and whether its ttl was given just now."""
        node, fresh = _create_once(self.client, self.key, self._value, self.ttl, patience_s)
        return node.modified_index, fresh

    def _leave(self) -> None:
        _remove(self.client, self.key, self._value, min(5.0, self.ttl))


class _Place(Lease):
    """A place in a line: an in-order file, whose number says who came first."""

    def __init__(self, client: Client, line: str, label: str, ttl: int,
                 on_lost: _LostCallback) -> None:
        super().__init__(client, line, uuid.uuid4().hex + label, ttl, on_lost=on_lost)
        self.line = self.key
        self._sure = True                           # that there is no second entry of this place

    @property
    def number(self) -> int:
        """Place in the line: the index at which it was made."""
        return int(_name(self.key))

    def announce(self) -> None:
        """Renew the file so that its watchers see it; it is no harm if that fails."""
        with contextlib.suppress(EtcdError):
            self._swap(CALL_TIMEOUT_S, announce=True)

    def _make(self, patience_s: float) -> Tuple[int, bool]:
        node, self._sure = _append_once(
            self.client, self.line, self._value, self.ttl, patience_s)
        self.key = node.key
        return node.modified_index, self._sure

    def _leave(self) -> None:
        super()._leave()
        with contextlib.suppress(EtcdError):
            for node in () if self._sure else _list(self.client, self.line, 1.0)[0]:
                if node.value == self._value:
                    _remove(self.client, node.key, self._value, 1.0)


_ContenderType = TypeVar("_ContenderType", bound="Contender")


class Contender:
    """What Lock, RWLock, Semaphore and Election share: a line, and a place in it.

    The entry of a contender names the uuid of one attempt.  Only entries ahead can keep it
    waiting, none can appear there later, and so a contender that was let in stays in until its
    entry is gone.
    """

    label = ""                                      # follows the uuid in the value of an entry

    def __init__(self, client: Client, line: str, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        if ttl < 1:
            raise ValueError("ttl is seconds, at least 1")
        self.client = client
        self.path = _clean_key(line)
        self.ttl = ttl
        self._on_lost = on_lost
        self._turn = threading.Lock()               # taken by the thread that contends or holds
        self._owner = 0                             # that thread
        self._guard = threading.Lock()              # of two threads that release, one does it
        self._held: Optional[_Place] = None
        self._cancelled = threading.Event()
        self._watching: Optional[Watch] = None

    @property
    def is_held(self) -> bool:
        """Whether it is held; False before a server could give it to another."""
        held = self._held
        return held is not None and held.alive

    @property
    def is_acquired(self) -> bool:
        """As is_held."""
        return self.is_held

    @property
    def token(self) -> int:
        """Fencing token: higher than that of every earlier holder.  0 if it is not held.

        Send it with every write to what is protected, and have that refuse lower ones than it has
        seen: this is what protects it from a holder that was suspended and does not know yet.
        """
        held = self._held
        return held.number if held is not None and held.alive else 0

    def acquire(self, blocking: bool = True, lock_ttl: Optional[int] = None,
                timeout: Optional[float] = 0) -> bool:
        """Wait for it.  Return whether it is held.

        blocking  False: return at once
        lock_ttl  seconds, instead of the ttl of the constructor; None: that one
        timeout   seconds to wait; 0 and None: for ever

        By the thread that holds it: renew, and return True.  Other threads that share the object
        wait for each other.  False after `timeout`, and after `cancel` by another thread; nothing
        is left in the line then, nor after an exception.  Raises EtcdError if no server answered
        for OUTAGE_S seconds or for as long as there was time.
        """
        if self._owner == threading.get_ident() and self.is_held:
            return self._again(lock_ttl)
        if self._owner == threading.get_ident():
            self.release()                          # it was lost: contend anew
        limit_s = (timeout or None) if blocking else 0.0
        deadline = None if limit_s is None else _clock() + limit_s
        if not self._turn.acquire(timeout=-1 if limit_s is None else limit_s):
            return False
        self._owner = threading.get_ident()
        self._cancelled.clear()
        try:
            self._contend(lock_ttl or self.ttl, deadline)
        finally:
            if self._held is None:
                self._yield_turn()
        return self._held is not None

    def release(self) -> bool:
        """Give it up, from any thread.  Return whether it was held until now.

        If no server answers, the entry is left to its ttl.
        """
        with self._guard:
            held, self._held = self._held, None
        if held is None:
            return False
        was_held = held.stop()
        self._yield_turn()
        return was_held

    def cancel(self) -> None:
        """Make an acquire that is waiting return False.  Thread: any."""
        self._cancelled.set()
        watching = self._watching
        if watching is not None:
            watching.close()

    def check(self) -> None:
        """Raise LockExpired unless it is held."""
        if not self.is_held:
            raise LockExpired("not held", cause=self.path)

    def contenders(self) -> List[str]:
        """Return the values of the entries in the line, the one served first at the head."""
        return [node.value or "" for node in _list(self.client, self.path)[0]]

    def __enter__(self: _ContenderType) -> _ContenderType:
        if not self.acquire():
            raise LockExpired("not acquired: cancelled, or lost before", cause=self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    # -- below: no public names

    def _again(self, lock_ttl: Optional[int]) -> bool:
        """Acquire what this thread holds."""
        held = self._held
        if held is not None:
            held.ttl = lock_ttl or held.ttl
            with contextlib.suppress(EtcdError):    # if it fails the heartbeat tries again
                held._renew()
        return self.is_held

    def _yield_turn(self) -> None:
        self._owner = 0
        self._turn.release()

    def _blocker(self, ahead: List[Node]) -> Optional[str]:
        """Return the key to watch before looking again; None: let in.

        The line itself stands for: until any entry is gone.
        """
        return ahead[-1].key if ahead else None

    def _contend(self, ttl: int, deadline: Optional[float]) -> None:
        """Stand in line until let in, out of time, or cancelled."""
        place: Optional[_Place] = None
        try:
            while not self._cancelled.is_set():
                if place is None or not place.alive:
                    place = self._enter(place, ttl, deadline)
                blocker, index = self._look(place, deadline)
                if blocker is None:
                    self._held = place
                    if place.alive:
                        return
                    self._held = None
                if _left(deadline, 1.0) <= 0:
                    return
                if blocker and not self._cancelled.is_set():
                    wait_s = _left(deadline, min(WAIT_SLICE_S, ttl))
                    _await(self.client, blocker, index, wait_s, started=self._wait_with,
                           children=_REMOVALS if blocker == self.path else frozenset())
        finally:
            if place is not None and self._held is not place:
                place.stop()

    def _enter(self, old: Optional[_Place], ttl: int, deadline: Optional[float]) -> _Place:
        """Take a place at the end of the line, instead of one that was lost."""
        if old is not None:
            old.stop()
        place = _Place(self.client, self.path, self.label, ttl, None)
        place._on_lost = lambda: self._lost(place)
        return place._start(_left(deadline, OUTAGE_S))

    def _look(self, place: _Place, deadline: Optional[float]) -> Tuple[Optional[str], int]:
        """Return the key to wait for (None: let in; "": none, look again) and the index."""
        entries, index = _list(self.client, self.path, _left(deadline, OUTAGE_S))
        for node in entries:
            if node.value == place.value and node.key != place.key:
                # An append that was given up for lost came in after all.
                _remove(self.client, node.key, place.value, 1.0)
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

    def _wait_with(self, watch: Watch) -> None:
        self._watching = watch
        if self._cancelled.is_set():                # before cancel could see the watch
            watch.close()

    def _lost(self, place: _Place) -> None:
        watching = self._watching
        if self._held is not place:
            if watching is not None:                # it waits in vain, and must line up again
                watching.close()
        elif self._on_lost is not None:
            self._on_lost()


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

    Thread: any.  Threads that share the object exclude each other too.
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


def _below_prefix(client: Client, name: str) -> str:
    prefix: str = getattr(client, "lock_prefix", "/_locks")
    return f"{prefix}/{name}"


class RLock(Lock):
    """A Lock that the thread which holds it may acquire again; each acquire needs a release.

    Guarantee and limit are those of Lock.  When the lock is lost, an inner acquire returns False
    (or raises LockExpired, from `with`): the outer block has to end first.
    """

    def __init__(self, client: Client, lock_name: str, *, ttl: int = LEASE_TTL_S,
                 on_lost: _LostCallback = None) -> None:
        super().__init__(client, lock_name, ttl=ttl, on_lost=on_lost)
        self._depth = 0                             # acquires of the holder; its thread's alone

    def acquire(self, blocking: bool = True, lock_ttl: Optional[int] = None,
                timeout: Optional[float] = 0) -> bool:
        """Acquire as Lock does, or once more.  See Lock."""
        if self._owner != threading.get_ident():
            acquired = super().acquire(blocking, lock_ttl, timeout)
            self._depth = 1 if acquired else 0
            return acquired
        self._depth += self.is_held
        return self.is_held

    def release(self) -> bool:
        """Undo one acquire; the last one gives the lock up.  Return whether it was held."""
        self._depth -= 1
        return self.is_held if self._depth > 0 else super().release()


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


class Leader(NamedTuple):
    """Who leads: what it said of itself, and its fencing token."""

    value: str
    token: int


class Election(Contender):
    """One of many candidates leads; when it is gone the one that came next leads.

        election = Election(client, "/scheduler", value="host-a", ttl=10, on_lost=stop)
        if election.campaign():                     # returns when this candidate leads
            work(fencing_token=election.token)
            election.resign()

        for leader in election.observe():           # anywhere, without being a candidate
            print(leader.value if leader else "nobody")

    value    what others see of this candidate

    Guarantee: while `is_leader` is True no other candidate's is.  A crashed leader is followed
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
        """Whether this candidate leads; False before a server could let another one lead."""
        return self.is_held

    def campaign(self, timeout: Optional[float] = None) -> bool:
        """Stand for election until this candidate leads; return whether it does.  See acquire."""
        return self.acquire(timeout=timeout)

    def resign(self) -> bool:
        """Stop leading; return whether it led until now."""
        return self.release()

    def leader(self) -> Optional[Leader]:
        """Return who leads now, by quorum; None if there are no candidates."""
        return self._first(_list(self.client, self.path)[0])

    def observe(self, timeout: Optional[float] = None) -> Iterator[Optional[Leader]]:
        """Yield who leads, now and whenever that changes; None: nobody.

        timeout  seconds without a change after which WatchTimeout is raised; None: never

        A leader between two looks may be missed; the last one is not.
        """
        seen: Optional[Leader] = None
        fresh, deadline = True, None if timeout is None else _clock() + timeout
        while True:
            entries, index = _list(self.client, self.path)
            leader = self._first(entries)
            if fresh or leader != seen:
                yield leader
                deadline = None if timeout is None else _clock() + timeout
            fresh, seen = False, leader
            if _left(deadline, 1.0) <= 0:
                raise WatchTimeout("no change in time", index=index)
            key = entries[0].key if entries else self.path
            _await(self.client, key, index, _left(deadline, WAIT_SLICE_S),
                   children=frozenset() if entries else frozenset(("create",)))

    @staticmethod
    def _first(entries: List[Node]) -> Optional[Leader]:
        if not entries:
            return None
        value = entries[0].value or ""
        return Leader(value.partition(":")[2], int(_name(entries[0].key)))


# ============================================================================
# 8. Queues, barriers, counters, caches, services
# ----------------------------------------------------------------------------
# Knows: sections 1-7.
# ============================================================================

TAKEN_TTL_S = 120               # what was taken from a queue leaves a mark for so long
COUNTER_WRITERS = 32            # so many writers find out whether a lost change is in


class QueueItem:
    """An item that this process works on; from Queue.take.

    value  what was put

    A context manager: without an exception the item is done, with one it is given back.
    """

    def __init__(self, queue: Queue, node: Node, lease: Lease) -> None:
        self.value = node.value or ""
        self._queue = queue
        self._node = node
        self._lease = lease

    @property
    def is_held(self) -> bool:
        """Whether no other consumer can have got the item meanwhile."""
        return self._lease.alive

    def done(self) -> bool:
        """Remove the item; False if another consumer has removed it first."""
        removed = self._queue._mark(self._node)
        self._lease.stop()
        return removed

    def give_back(self) -> None:
        """Let another consumer have the item."""
        self._lease.stop()

    def __enter__(self) -> QueueItem:
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], *_: object) -> None:
        if kind is None:
            self.done()
        else:
            self.give_back()


class Queue:
    """A queue in the cluster: first in, first out, any number of producers and consumers.

        queue = Queue(client, "/jobs")
        queue.put("one")
        queue.get(timeout=5)                        # "one", or None after 5 s
        with queue.take(timeout=5) as item:         # at least once
            work(item.value)

    Guarantee: what put has returned for is in the queue once.  An item is removed once, in the
    order in which the items were made: `get` hands each to one consumer only, which may crash
    with it; what `take` hands out comes back, ttl seconds after a crash, until done has removed
    it.  Lost answers are looked into: items have a uuid as name, and leave a mark for
    TAKEN_TTL_S seconds that says who took them.
    An idle queue wakes one of the waiting consumers for each item; the others stand in line.
    Limit: after an error with maybe_applied, and when a request is executed more than TAKEN_TTL_S
    late, an item may be there twice or lost with its consumer.  Consumers of one queue use either
    get or take: a get may remove what another one has taken.  They read the whole directory now
    and then: made for thousands of items, not for millions.

    ttl      seconds a crashed consumer delays what it had taken, or the line

    Thread: any.
    """

    def __init__(self, client: Client, key: str, *, ttl: int = LEASE_TTL_S) -> None:
        self.client = client
        self.path = _clean_key(key)
        self.ttl = ttl
        self._seen: Deque[Node] = deque()   # items of the last look; append and pop
                                                        # are atomic, and all it gives is hints

    def put(self, value: str) -> str:
        """Add an item at the end; return its key."""
        name = uuid.uuid4().hex
        key = f"{self.path}/items/{name}"
        try:
            _insist(lambda timeout_s: _within(self.client, timeout_s).create(key, value))
        except NodeExists:                          # an attempt whose answer was lost
            pass
        return key

    def get(self, timeout: Optional[float] = None) -> Optional[str]:
        """Remove the first item and return its value; None after `timeout` seconds (None: never).

        With timeout=0 it does not wait.
        """
        node = self._first(timeout, self._mark)
        return None if node is None else node.value

    def take(self, timeout: Optional[float] = None) -> QueueItem:
        """Return the first item that nobody works on.  Raises WatchTimeout after `timeout` s."""
        leases: List[Lease] = []
        node = self._first(timeout, lambda node: self._claim(node, leases))
        if node is None:
            raise WatchTimeout("no item in time", cause=self.path)
        return QueueItem(self, node, leases[0])

    def __len__(self) -> int:
        """Return the number of items, those included that somebody works on."""
        items, claimed, _ = self._look()
        return len(items) + len(claimed)

    # -- below: no public names

    def _look(self) -> Tuple[List[Node], List[Node], int]:
        """Return the items that are free, and that are claimed, first one first, and the index."""
        try:
            found = _read(self.client, self.path, recursive=True)
        except KeyNotFound as error:
            return [], [], error.index
        files = [node for node in found.node.walk() if not node.dir]
        claims = {_name(node.key) for node in files if node.key.startswith(f"{self.path}/claims/")}
        items = sorted((node for node in files if node.ttl is None
                        and node.key.startswith(f"{self.path}/items/")),
                       key=lambda node: node.created_index)
        free = [node for node in items if _name(node.key) not in claims]
        return free, [node for node in items if _name(node.key) in claims], found.etcd_index

    def _first(self, timeout: Optional[float], obtain: Callable[[Node], bool]) -> Optional[Node]:
        """Return the first item that `obtain` gets."""
        node, _ = self._try(obtain)
        if node is not None or timeout == 0:
            return node
        deadline = None if timeout is None else _clock() + timeout
        line = Contender(self.client, f"{self.path}/_waiting", ttl=self.ttl)
        if not line.acquire(timeout=timeout):
            return None
        try:
            while True:
                node, index = self._try(obtain)
                if node is not None or _left(deadline, 1.0) <= 0:
                    return node
                wait_s = _left(deadline, min(WAIT_SLICE_S, self.ttl))
                _await(self.client, self.path, index, wait_s, children=self._ARRIVALS)
        finally:
            line.release()

    _ARRIVALS = frozenset(("create", "expire", "compareAndDelete"))     # new, or given back

    def _try(self, obtain: Callable[[Node], bool]) -> Tuple[Optional[Node], int]:
        """Try the items seen last, then those of a new look; return the index of that."""
        while self._seen:
            with contextlib.suppress(IndexError):   # another thread was faster
                node = self._seen.popleft()
                if obtain(node):
                    return node, 0
        free, _, index = self._look()
        for position, node in enumerate(free):
            if obtain(node):
                self._seen.extend(free[position + 1:])
                return node, index
        return None, index

    def _mark(self, node: Node) -> bool:
        """Turn an item into a mark that expires; False if somebody else has done so.

        Only the first such write after the item was made can succeed, so it may be repeated, and
        the mark tells whose it was.
        """
        mark = uuid.uuid4().hex
        try:
            _insist(lambda timeout_s: _within(self.client, timeout_s).compare_and_swap(
                node.key, mark, prev_index=node.modified_index, ttl=TAKEN_TTL_S))
        except KeyNotFound:
            return False
        except CompareFailed:
            try:
                return _read(self.client, node.key).value == mark
            except KeyNotFound:
                return False
        return True

    def _claim(self, node: Node, leases: List[Lease]) -> bool:
        lease = Lease(self.client, f"{self.path}/claims/{_name(node.key)}", ttl=self.ttl)
        try:
            lease.start()
        except (NodeExists, LockExpired):
            return False
        # The item may be gone since it was seen: whoever had claimed it has finished.
        try:
            present = _read(self.client, node.key).node.modified_index == node.modified_index
        except KeyNotFound:
            present = False
        if present:
            leases.append(lease)
        else:
            lease.stop()
        return present


class Barrier:
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
        self.client = client
        self.path = _clean_key(key)

    def create(self, ttl: Optional[int] = None) -> bool:
        """Close the barrier, for `ttl` seconds at most; False if it was closed already."""
        try:
            _create_once(self.client, self.path, uuid.uuid4().hex, ttl)
        except NodeExists:
            return False
        return True

    def remove(self) -> bool:
        """Open the barrier; False if it was open already."""
        try:
            index = _read(self.client, self.path).modified_index
        except KeyNotFound:
            return False
        with contextlib.suppress(KeyNotFound, CompareFailed):
            _insist(lambda timeout_s: _within(self.client, timeout_s).compare_and_delete(
                self.path, prev_index=index))
        return True

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Wait until the barrier is open; False after `timeout` seconds (None: never)."""
        deadline = None if timeout is None else _clock() + timeout
        while True:
            try:
                index = _read(self.client, self.path).etcd_index
            except KeyNotFound:
                return True
            wait_s = _left(deadline, WAIT_SLICE_S)
            if wait_s <= 0:
                return False
            _await(self.client, self.path, index, wait_s)


class DoubleBarrier:
    """Lets `size` participants begin together and end together, round after round.

        barrier = DoubleBarrier(client, "/phase", size=3)
        with barrier:
            work()

    Guarantee: enter returns True only after `size` participants were there at the same time, and
    leave only after all of this one's round have left, or expired.  Who comes later takes part in
    the next round.
    Limit: who is cut off for longer than its ttl is no participant any more, and enter raises
    LockExpired.  All participants name the same size.  One small file stays, which counts rounds.

    Thread: one; an object is one participant.
    """

    def __init__(self, client: Client, key: str, size: int, *, ttl: int = LEASE_TTL_S) -> None:
        if size < 1:
            raise ValueError("size is at least 1")
        self.client = client
        self.path = _clean_key(key)
        self.size = size
        self.ttl = ttl
        self._place: Optional[_Place] = None
        self._round = 0                             # the index at which it began

    def enter(self, timeout: Optional[float] = None) -> bool:
        """Wait for the others; False after `timeout` seconds (None: never), and not inside."""
        deadline = None if timeout is None else _clock() + timeout
        place = _Place(self.client, f"{self.path}/members", "", self.ttl, None)
        place._start(_left(deadline, OUTAGE_S))
        self._round = 0
        try:
            self._round = self._await_round(place, deadline)
        finally:
            if not self._round:
                place.stop()
        self._place = place
        return self._round > 0

    def leave(self, timeout: Optional[float] = None) -> bool:
        """Leave, and wait until the others have left; False after `timeout` seconds."""
        deadline = None if timeout is None else _clock() + timeout
        if self._place is not None:
            self._place.stop()
        while True:
            members, index = _list(self.client, f"{self.path}/members")
            inside = [node for node in members if node.created_index < self._round]
            if not inside:
                return True
            wait_s = _left(deadline, min(WAIT_SLICE_S, self.ttl))
            if wait_s <= 0:
                return False
            _await(self.client, inside[-1].key, index, wait_s)

    def __enter__(self) -> DoubleBarrier:
        self.enter()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    # -- below: no public names

    def _await_round(self, place: _Place, deadline: Optional[float]) -> int:
        """Return the index at which the round of `place` began; 0 if time is up.

        A file is written when a round is complete.  Those whose number lies between two such
        writes are of one round.
        """
        while place.alive:
            last, index = self._last_round()
            if last > place.number:
                return last
            members, _ = _list(self.client, f"{self.path}/members")
            if sum(node.created_index > last for node in members) >= self.size:
                self._begin_round(last)
                continue
            wait_s = _left(deadline, min(WAIT_SLICE_S, self.ttl))
            if wait_s <= 0:
                return 0
            _await(self.client, f"{self.path}/round", index, wait_s)
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
                _insist(lambda timeout_s: _within(self.client, timeout_s).compare_and_swap(
                    key, mark, prev_index=last))
            else:
                _create_once(self.client, key, mark, None)


class Counter:
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

    def __init__(self, client: Client, key: str, initial: int = 0) -> None:
        self.client = client
        self.path = _clean_key(key)
        self.initial = initial
        self._turn = threading.Lock()               # one change of this writer at a time
        self._writer = uuid.uuid4().hex[:12]
        self._serial = 0

    @property
    def value(self) -> int:
        """The number now, by quorum.  Raises ValueError if the file holds none."""
        return self._look()[0]

    def add(self, amount: int = 1) -> int:
        """Add `amount`, and return the sum.  Raises ValueError if the file holds no number."""
        with self._turn:
            self._serial += 1
            tag, unsure, pause_s = f"{self._writer}.{self._serial}", None, 0.001
            deadline = _clock() + OUTAGE_S
            while True:
                number, changes, index = self._look()
                if tag in changes:
                    return changes[tag]
                if unsure is not None and self._forgotten(changes):
                    raise unsure
                try:
                    if self._write(number + amount, tag, changes, index):
                        return number + amount
                except EtcdError as error:
                    if not _is_endpoint_failure(error) or _clock() >= deadline:
                        raise
                    unsure = error if error.maybe_applied else unsure
                time.sleep(random.uniform(0, pause_s))
                pause_s = min(2 * pause_s, 0.1)

    # -- below: no public names

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
        client = _within(self.client, CALL_TIMEOUT_S)
        try:
            if index:
                client.compare_and_swap(self.path, value, prev_index=index)
            else:
                client.create(self.path, value)
        except (CompareFailed, NodeExists, KeyNotFound):
            return False
        return True


_ChangeCallback = Optional[Callable[[str, Optional[Node], Optional[Node]], None]]


class CachedTree(Mapping[str, Node]):
    """A live copy of a directory: a mapping from the keys of its files to their nodes.

        with CachedTree(client, "/config") as tree:
            tree["/config/db"].value
            index = client.set("/config/db", "new").modified_index
            tree.wait_for(index)                    # now the copy has it
            dict(tree)                              # all of it at one moment: tree.snapshot()

    on_change  called with key, old node and new node (None: there is none) for each file that
               changes after the start, in order, on the thread of the tree

    Guarantee: the copy is the directory as it was at `index`, at all depths; it goes forward
    only, and catches up after every loss of contact, after more than 1000 missed changes by
    reading it anew and reporting the difference.
    Limit: it is late by as much as the network is, and silent about it while there is no contact
    (`error` tells).  Hidden files are not in it, nor empty directories; ttl and expiration are
    those of the last change, since refreshing is silent.

    Thread: any.  It runs a daemon thread, which `close` joins.
    """

    def __init__(self, client: Client, path: str, *, on_change: _ChangeCallback = None) -> None:
        self.client = client
        self.path = _clean_key(path)
        self.error: Optional[EtcdError] = None      # why the copy is not followed; None: it is
        self._on_change = on_change
        self._changed = threading.Condition()       # guards the next two
        self._nodes: Dict[str, Node] = {}
        self._index = 0
        self._closed = threading.Event()
        self._watching: Optional[Watch] = None
        self._thread: Optional[threading.Thread] = None

    @property
    def index(self) -> int:
        """The etcd index the copy is of."""
        return self._index

    def start(self) -> CachedTree:
        """Read the directory, and follow it from now on.  Raises that no server answers."""
        self._load(OUTAGE_S)
        self._thread = threading.Thread(
            target=self._run, name=f"pyetcd-tree {self.path}", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop following; the copy stays as it is."""
        self._closed.set()
        watching = self._watching
        if watching is not None:
            watching.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def snapshot(self) -> Dict[str, Node]:
        """Return the copy as it is now."""
        with self._changed:
            return dict(self._nodes)

    def wait_for(self, index: int, timeout: Optional[float] = None) -> bool:
        """Wait until the copy has the change with `index`, of a file in it; False if it is late.

        timeout  seconds; None: for ever
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._index >= index, timeout)

    def __getitem__(self, key: str) -> Node:
        with self._changed:
            return self._nodes[_clean_key(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.snapshot())

    def __len__(self) -> int:
        return len(self._nodes)

    def __enter__(self) -> CachedTree:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- below: no public names

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._follow()
            except EtcdError as error:
                self.error = error
                self._closed.wait(0.5)

    def _follow(self) -> None:
        """Apply what happens, for some time; raise EtcdError if that is not possible now."""
        try:
            with _watch(self.client, self.path, self._index + 1, recursive=True,
                        timeout_s=WAIT_SLICE_S) as events:
                self._watching = events
                if self._closed.is_set():           # before close could see the watch
                    return
                for event in events:
                    self.error = None
                    self._apply(event)
        except WatchTimeout:
            self.error = None
        except EventIndexCleared:
            self._load(CALL_TIMEOUT_S)

    def _load(self, patience_s: float) -> None:
        """Make the copy what the directory is now."""
        try:
            found = _read(self.client, self.path, patience_s, recursive=True)
            nodes = [found.node, *found.node.walk()]
            fresh = {node.key: node for node in nodes if not node.dir}
            index = found.etcd_index
        except KeyNotFound as error:
            fresh, index = {}, error.index
        keys = sorted(set(self._nodes) | set(fresh))
        self._change({key: fresh.get(key) for key in keys}, index)

    def _apply(self, event: Result) -> None:
        """Make the copy what the event made of the directory."""
        key, changes = event.key, {}
        if event.action in _REMOVALS:
            # With a directory go all files in it, and this may be one above the tree.
            keys = [key] if key in self._nodes else [
                other for other in self._nodes if other.startswith(key.rstrip("/") + "/")]
            changes = dict.fromkeys(keys)
        elif event.node.dir:
            changes = {key: None}                   # perhaps it took the place of a file
        elif self._covers(key):
            changes = {key: event.node}
        self._change(changes, event.modified_index)

    def _covers(self, key: str) -> bool:
        root = self.path.rstrip("/")
        below = key[len(root):]
        return key.startswith(root) and below[:1] in ("", "/") and "/_" not in below

    def _change(self, changes: Mapping[str, Optional[Node]], index: int) -> None:
        """Put in the new nodes (None: remove), and tell what has changed."""
        told: List[Tuple[str, Optional[Node], Optional[Node]]] = []
        with self._changed:
            for key, node in changes.items():
                old = self._nodes.get(key)
                if (old and old.modified_index) == (node and node.modified_index):
                    continue
                told.append((key, old, node))
                if node is None:
                    del self._nodes[key]
                else:
                    self._nodes[key] = node
            self._index = max(self._index, index)
            self._changed.notify_all()
        if self._on_change is not None and self._thread is not None:
            for change in told:
                self._on_change(*change)


class Instance(NamedTuple):
    """One place at which a service can be had."""

    id: str
    address: str


class Registration(Lease):
    """An instance that is listed as long as this process lives; from ServiceRegistry.register.

    When it is lost, on_lost is called, and it is made again as soon as a server answers.

    Thread: any.
    """

    # -- below: no public names

    def _regain(self) -> bool:
        super()._regain()
        while not self._stopped.wait(min(1.0, self.ttl / 3)):
            try:
                self._obtain(1.0)
            except EtcdError:                       # the next attempt is soon
                continue
            if self._stopped.is_set():              # `stop` has removed what was there before
                self._leave()
            return True
        return False


class ServiceRegistry:
    """Where services say where they are, and where others find that.

        registry = ServiceRegistry(client, ttl=10)
        with registry.register("mail", "10.0.0.5:25"): ...

        [instance.address for instance in registry.resolve("mail")]
        for instances in registry.watch("mail"): ...

    Guarantee: an instance is listed while its process lives and reaches the cluster, and at most
    ttl seconds longer; it keeps itself listed without waking anybody.
    Limit: a process that lives but does not serve is listed.  resolve may name an instance that
    has died less than ttl seconds ago.

    prefix   directory of all services; an instance is the file <prefix>/<service>/<id>

    Thread: any.
    """

    def __init__(self, client: Client, prefix: str = "/services", *,
                 ttl: int = LEASE_TTL_S) -> None:
        self.client = client
        self.prefix = _clean_key(prefix)
        self.ttl = ttl

    def register(self, service: str, address: str, *,
                 on_lost: _LostCallback = None) -> Registration:
        """List `address` for `service`, until the Registration is stopped or its block ends.

        on_lost  called on another thread whenever the instance was missing from the list
        """
        key = f"{self.path(service)}/{uuid.uuid4().hex}"
        return Registration(self.client, key, address, self.ttl, on_lost=on_lost).start()

    def resolve(self, service: str) -> List[Instance]:
        """Return the instances of `service`, the one that came first at the head."""
        return self._instances(_list(self.client, self.path(service))[0])

    def watch(self, service: str, timeout: Optional[float] = None) -> Iterator[List[Instance]]:
        """Yield the instances of `service`, now and whenever they have changed.

        timeout  seconds without a change after which WatchTimeout is raised; None: never
        """
        seen: Optional[List[Instance]] = None
        deadline = None if timeout is None else _clock() + timeout
        while True:
            nodes, index = _list(self.client, self.path(service))
            instances = self._instances(nodes)
            if instances != seen:
                yield instances
                deadline = None if timeout is None else _clock() + timeout
            seen = instances
            wait_s = _left(deadline, WAIT_SLICE_S)
            if wait_s <= 0:
                raise WatchTimeout("no change in time", index=index + 1)
            _await(self.client, self.path(service), index, wait_s, children=_CHANGES)

    def path(self, service: str) -> str:
        """Return the directory of a service, for a CachedTree for instance."""
        return f"{self.prefix}/{service}"

    @staticmethod
    def _instances(nodes: List[Node]) -> List[Instance]:
        return [Instance(_name(node.key), node.value or "") for node in nodes if not node.dir]


_CHANGES = _REMOVALS | {"create", "set", "update", "compareAndSwap"}


# ============================================================================
# 9. Command line -- commands, output and exit codes of etcdctl 2.3
# ----------------------------------------------------------------------------
# Knows: sections 1-4, through the public names of Client.
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

_UNAVAILABLE = "client: etcd cluster is unavailable or misconfigured"
_HTML_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}     # as Go's encoder does


class _MisuseError(Exception):
    """An option that does not exist or cannot be parsed: help is shown."""


class _ExitError(Exception):
    """Ends a command with a line on stderr and an exit code."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.line = line
        self.code = code


class _Flag(NamedTuple):
    names: Tuple[str, ...]
    kind: type                                      # bool, int or str
    help: str


class _Options:
    """Values of the flags that were given; the others are False, 0 or ""."""

    def __init__(self) -> None:
        self._values: Dict[str, Union[bool, int, str]] = {}

    def put(self, flag: _Flag, text: str) -> None:
        self._values[flag.names[0]] = _flag_value(flag, text)

    def on(self, name: str) -> bool:
        return bool(self._values.get(name, False))

    def number(self, name: str) -> int:
        return int(self._values.get(name, 0))

    def text(self, name: str) -> str:
        return str(self._values.get(name, ""))


def _flag_value(flag: _Flag, text: str) -> Union[bool, int, str]:
    if flag.kind is bool:
        if text not in ("true", "false", "1", "0"):
            raise _MisuseError(flag.names[0])
        return text in ("true", "1")
    if flag.kind is int:
        if not re.fullmatch(r"[+-]?[0-9]+", text, re.ASCII):
            raise _MisuseError(flag.names[0])
        return int(text)
    return text


def _parse_flags(argv: Sequence[str], flags: Sequence[_Flag]) -> Tuple[_Options, List[str]]:
    """Split `argv` into options and arguments by the rules of Go's flag package.

    One or two dashes; a value after `=` or, except for booleans, as the next word; the first
    word that is no option, or `--`, ends the options.
    """
    known = {name: flag for flag in flags for name in flag.names}
    options, words = _Options(), list(argv)
    while words and words[0].startswith("-") and words[0] != "-":
        word = words.pop(0)
        if word == "--":
            break
        name, separator, text = word[2 if word.startswith("--") else 1:].partition("=")
        flag = known.get(name)
        if flag is None:
            raise _MisuseError(name)
        if not separator and flag.kind is bool:
            text = "true"
        elif not separator:
            if not words:
                raise _MisuseError(name)
            text = words.pop(0)
        options.put(flag, text)
    return options, words


def _parse_duration(text: str) -> float:
    """Return the seconds of a Go duration such as 500ms or 1m30s."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
    part = r"([0-9]+(?:\.[0-9]*)?)(h|ms|us|ns|m|s)"
    if not re.fullmatch(f"(?:{part})+", text, re.ASCII):
        raise _MisuseError(text)
    return sum(float(count) * units[unit] for count, unit in re.findall(part, text))


def _emit(text: str) -> None:
    """Print a line at once, whatever the locale: keys and values are bytes to a terminal."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b"\n")
    sys.stdout.buffer.flush()


def _complain(text: str) -> None:
    line = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    print(line, file=sys.stderr)


class _Run(NamedTuple):
    """One invocation: what a command function gets."""

    client: Client
    output: str                                     # simple, extended or json
    options: _Options
    args: List[str]

    def key(self) -> str:
        """Return the first argument."""
        if not self.args:
            raise _ExitError("Error:  key required", EXIT_BAD_ARGS)
        return self.args[0]

    def value(self) -> str:
        """Return the second argument, or else all of standard input."""
        if len(self.args) > 1:
            return self.args[1]
        text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
        if not text:
            raise _ExitError("Error:  value required", EXIT_BAD_ARGS)
        return text

    def ttl(self) -> Optional[int]:
        """Return --ttl; 0 means none, as in etcdctl."""
        return self.options.number("ttl") or None

    def conditions(self, value_flag: str, index_flag: str) -> Dict[str, Any]:
        """Return prev_value and prev_index if flags ask for them, else nothing."""
        given = {"prev_value": self.options.text(value_flag) or None,
                 "prev_index": self.options.number(index_flag) or None}
        return given if any(given.values()) else {}

    def print_result(self, result: Result) -> None:
        """Print a result in the format asked for."""
        if self.output == "json":
            _emit(_result_json(result))
        elif self.output == "extended":
            _emit(_result_extended(result))
        elif result.action == "delete":
            _emit(f"PrevNode.Value: {_value_text(result.prev_node)}")
        else:
            _emit(_value_text(result.node))

    def print_unless_silent(self, result: Result) -> None:
        """Print a result; in simple format, nothing for a directory."""
        if not result.node.dir or self.output != "simple":
            self.print_result(result)


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


def _cmd_get(run: _Run) -> int:
    result = run.client.get(
        run.key(), sorted=run.options.on("sort"), quorum=run.options.on("quorum"))
    if result.node.dir:
        raise _ExitError(f"{result.key}: is a directory", EXIT_BAD_ARGS)
    run.print_result(result)
    return EXIT_OK


def _cmd_set(run: _Run) -> int:
    key, value = run.key(), run.value()
    conditions = run.conditions("swap-with-value", "swap-with-index")
    if conditions:
        result = run.client.compare_and_swap(key, value, ttl=run.ttl(), **conditions)
    else:
        result = run.client.set(key, value, ttl=run.ttl())
    run.print_result(result)
    return EXIT_OK


def _cmd_mk(run: _Run) -> int:
    key, value = run.key(), run.value()
    write = run.client.append if run.options.on("in-order") else run.client.create
    run.print_result(write(key, value, ttl=run.ttl()))
    return EXIT_OK


def _cmd_update(run: _Run) -> int:
    run.print_result(run.client.update(run.key(), run.value(), ttl=run.ttl()))
    return EXIT_OK


def _cmd_mkdir(run: _Run) -> int:
    run.print_unless_silent(run.client.mkdir(run.key(), ttl=run.ttl()))
    return EXIT_OK


def _cmd_rm(run: _Run) -> int:
    key, conditions = run.key(), run.conditions("with-value", "with-index")
    if conditions:
        result = run.client.compare_and_delete(key, **conditions)
    else:
        result = run.client.delete(
            key, dir=run.options.on("dir"), recursive=run.options.on("recursive"))
    run.print_unless_silent(result)
    return EXIT_OK


def _cmd_rmdir(run: _Run) -> int:
    run.print_unless_silent(run.client.rmdir(run.key()))
    return EXIT_OK


def _cmd_ls(run: _Run) -> int:
    options = run.options
    result = run.client.get(
        run.args[0] if run.args else "/", recursive=options.on("recursive"),
        sorted=options.on("sort"), quorum=options.on("quorum"))
    if run.output != "simple":
        run.print_result(result)
        return EXIT_OK
    for node in result.node.walk() if result.node.dir else (result.node,):
        _emit(node.key + ("/" if node.dir and options.on("p") else ""))
    return EXIT_OK


def _cmd_watch(run: _Run) -> int:
    recursive, after_index = run.options.on("recursive"), run.options.number("after-index")
    index = after_index + 1 if after_index else None
    try:
        with run.client.watch_iter(run.key(), recursive=recursive, index=index) as events:
            for event in events:
                if event.node.dir:
                    continue
                if recursive:
                    _emit(f"[{event.action}] {event.key}")
                run.print_result(event)
                if not run.options.on("forever"):
                    break
    except KeyboardInterrupt:                       # the way to end --forever: not an error
        pass
    return EXIT_OK


def _member_failure(error: EtcdError) -> _ExitError:
    line = _UNAVAILABLE if _is_endpoint_failure(error) else error.message
    return _ExitError(line, EXIT_BAD_ARGS)


def _cmd_member_list(run: _Run) -> int:
    if run.args:
        raise _ExitError("No arguments accepted", EXIT_BAD_ARGS)
    try:
        members, leader = run.client.members(), run.client.leader()
    except EtcdError as error:
        raise _member_failure(error) from error
    for member in members:
        peer_urls, client_urls = ",".join(member.peer_urls), ",".join(member.client_urls)
        is_leader = str(leader is not None and leader.id == member.id).lower()
        if member.name:
            _emit(f"{member.id}: name={member.name} peerURLs={peer_urls} "
                  f"clientURLs={client_urls} isLeader={is_leader}")
        else:
            _emit(f"{member.id}[unstarted]: peerURLs={peer_urls}")
    return EXIT_OK


def _cmd_cluster_health(run: _Run) -> int:
    try:
        members = run.client.members()
    except EtcdError:
        _emit("cluster may be unhealthy: failed to list members")
        raise
    healthy = [_member_is_healthy(run.client, member) for member in members]
    _emit("cluster is healthy" if any(healthy) else "cluster is unhealthy")
    return EXIT_OK if any(healthy) else EXIT_UNHEALTHY


def _member_is_healthy(client: Client, member: Member) -> bool:
    """Ask a member for its health and print the verdict."""
    if not member.client_urls:
        _emit(f"member {member.id} is unreachable: no available published client urls")
        return False
    for url in member.client_urls:
        try:
            healthy = client.health(url)
        except (EtcdError, ValueError) as error:
            why = _failure_line(error) if isinstance(error, EtcdError) else str(error)
            _emit(f"failed to check the health of member {member.id} on {url}: {why}")
            continue
        word = "healthy" if healthy else "unhealthy"
        _emit(f"member {member.id} is {word}: got {word} result from {url}")
        return healthy
    _emit(f"member {member.id} is unreachable: [{' '.join(member.client_urls)}] "
          "are all unreachable")
    return False


class _Command(NamedTuple):
    usage: str
    help: str
    flags: Tuple[_Flag, ...]
    run: Callable[[_Run], int]


_TTL = _Flag(("ttl",), int, "key time-to-live in seconds")
_SORT = _Flag(("sort",), bool, "returns result in sorted order")
_QUORUM = _Flag(("quorum", "q"), bool, "require quorum for get request")
_RECURSIVE = _Flag(("recursive", "r"), bool, "include everything below the directory")

_COMMANDS: Dict[str, _Command] = {
    "cluster-health": _Command(
        "cluster-health", "check the health of the etcd cluster", (), _cmd_cluster_health),
    "mk": _Command(
        "mk [options] <key> <value>", "make a new key with a given value",
        (_Flag(("in-order",), bool, "create in-order key under directory <key>"), _TTL), _cmd_mk),
    "mkdir": _Command("mkdir [options] <key>", "make a new directory", (_TTL,), _cmd_mkdir),
    "rm": _Command(
        "rm [options] <key>", "remove a key or a directory",
        (_Flag(("dir",), bool, "removes the key if it is an empty directory or a key-value pair"),
         _Flag(("recursive", "r"), bool, "removes the key and all child keys (if a directory)"),
         _Flag(("with-value",), str, "previous value"),
         _Flag(("with-index",), int, "previous index")), _cmd_rm),
    "rmdir": _Command(
        "rmdir <key>", "removes the key if it is an empty directory or a key-value pair", (),
        _cmd_rmdir),
    "get": _Command(
        "get [options] <key>", "retrieve the value of a key", (_SORT, _QUORUM), _cmd_get),
    "ls": _Command(
        "ls [options] [key]", "retrieve a directory",
        (_SORT, _Flag(("recursive", "r"), bool, "returns all key names recursively"),
         _Flag(("p",), bool, "append slash (/) to directories"), _QUORUM), _cmd_ls),
    "set": _Command(
        "set [options] <key> <value>", "set the value of a key",
        (_TTL, _Flag(("swap-with-value",), str, "previous value"),
         _Flag(("swap-with-index",), int, "previous index")), _cmd_set),
    "update": _Command(
        "update [options] <key> <value>", "update an existing key with a given value", (_TTL,),
        _cmd_update),
    "watch": _Command(
        "watch [options] <key>", "watch a key for changes",
        (_Flag(("forever", "f"), bool, "forever watch a key until CTRL+C"),
         _Flag(("after-index",), int, "watch after the given index"), _RECURSIVE), _cmd_watch),
    "member list": _Command(
        "member list", "enumerate existing cluster members", (), _cmd_member_list),
}

_HELP = _Flag(("help", "h"), bool, "show help")

_GLOBAL_FLAGS = (
    _Flag(("debug",), bool, "show the endpoints in use on stderr"),
    _Flag(("no-sync",), bool, "don't synchronize cluster information before sending request"),
    _Flag(("output", "o"), str, "output response in the given format (simple, extended or json)"),
    _Flag(("peers", "C"), str, "a comma-delimited list of machine addresses in the cluster"),
    _Flag(("endpoint",), str, "a comma-delimited list of machine addresses in the cluster"),
    _Flag(("endpoints",), str, "a comma-delimited list of machine addresses in the cluster"),
    _Flag(("timeout",), str, "connection timeout per request (default: 1s)"),
    _Flag(("total-timeout",), str, "timeout for the command, except watch (default: 5s)"),
    _HELP,
    _Flag(("version", "v"), bool, "print the version"),
)


def _flag_lines(flags: Sequence[_Flag]) -> List[str]:
    names = [", ".join(("-" if len(name) == 1 else "--") + name for name in flag.names)
             + ("" if flag.kind is bool else " value") for flag in flags]
    width = max(map(len, names), default=0)
    return [f"   {shown:{width}}  {flag.help}" for shown, flag in zip(names, flags)]


def _print_help(prefix: str = "") -> None:
    """Print what the program can do, or what the commands that begin with `prefix` can."""
    commands = {name: c for name, c in _COMMANDS.items() if name.startswith(prefix)}
    name = f"etcdctl {prefix}".strip()
    lines = ["NAME:", f"   {name} - A simple command line client for etcd.", "", "USAGE:",
             f"   {name} [options] command [command options] [arguments...]", "", "COMMANDS:"]
    lines += [f"   {command:14}  {entry.help}" for command, entry in commands.items()]
    _emit("\n".join([*lines, "", "GLOBAL OPTIONS:", *_flag_lines(_GLOBAL_FLAGS)]))


def _print_command_help(name: str) -> None:
    command = _COMMANDS[name]
    lines = ["NAME:", f"   etcdctl {name} - {command.help}", "", "USAGE:",
             f"   etcdctl {command.usage}", "", "OPTIONS:", *_flag_lines((*command.flags, _HELP))]
    _emit("\n".join(lines))


def _split_command(words: Sequence[str]) -> Tuple[str, List[str]]:
    """Return the command's name, of one or two words, and what follows; "" if there is none."""
    for size in (2, 1):
        name = " ".join(words[:size])
        if len(words) >= size and name in _COMMANDS:
            return name, list(words[size:])
    return "", list(words)


def _endpoints_asked(options: _Options) -> str:
    for flag, variable in (("endpoints", "ETCDCTL_ENDPOINTS"), ("endpoint", "ETCDCTL_ENDPOINT"),
                           ("peers", "ETCDCTL_PEERS")):
        text = options.text(flag) or os.environ.get(variable, "")
        if text:
            return text
    return CLI_ENDPOINTS


def _make_client(options: _Options, endpoints: Iterable[str]) -> Client:
    request_s = _parse_duration(options.text("timeout") or "1s")
    total_s = _parse_duration(options.text("total-timeout") or "5s")
    try:
        return Client(endpoints=endpoints, connect_timeout_s=request_s, read_timeout_s=request_s,
                      total_timeout_s=total_s)
    except ValueError as error:
        raise _ExitError(str(error), EXIT_BAD_ARGS) from error


def _synced_client(options: _Options) -> Client:
    """Return a client that uses the client URLs the members publish, in random order."""
    client = _make_client(options, _endpoints_asked(options).split(","))
    try:
        urls = [url for member in client.members() for url in member.client_urls]
    except EtcdError as error:
        code = EXIT_BAD_CONNECTION if _is_endpoint_failure(error) else EXIT_SERVER_ERROR
        raise _ExitError(_error_lines(error), code) from error
    if not urls:
        given = ",".join(client.endpoints.urls)
        raise _ExitError(
            "etcd cluster has no published client endpoints.\nTry '--no-sync' if you want to "
            f"access non-published client endpoints({given}).\nError:  client: no endpoints "
            "available", EXIT_SERVER_ERROR)
    random.shuffle(urls)
    return _make_client(options, urls)


def _failure_line(error: EtcdError) -> str:
    """Return the failure of one endpoint in etcdctl's words."""
    if isinstance(error, RequestTimeout):
        return f"client: endpoint {error.endpoint} exceeded header timeout"
    if isinstance(error, TransportError):
        address = urlsplit(error.endpoint).netloc
        never_sent = isinstance(error, ConnectionFailed) and not error.maybe_applied
        return f"dial tcp {address}: connect: {error.message}" if never_sent else error.describe()
    if error.status in (500, 503):
        return f"client: etcd member {error.endpoint} has no leader"
    phrase = http.HTTPStatus(error.status).phrase if error.status in _HTTP_STATUSES else ""
    return f"client: etcd member {error.endpoint} returns server error [{phrase}]"


_HTTP_STATUSES = frozenset(int(status) for status in http.HTTPStatus)


def _error_lines(error: EtcdError) -> str:
    """Return what etcdctl prints on stderr about `error`."""
    if not _is_endpoint_failure(error):
        return f"Error:  {error}"
    lines = [f"error #{number}: {_failure_line(failure)}"
             for number, failure in enumerate(error.failures)]
    if error.maybe_applied:
        lines.append("the write may have been applied: it was not sent again")
    return "\n".join([f"Error:  {_UNAVAILABLE}", *lines, ""])


def _run_command(name: str, words: Sequence[str], options: _Options) -> int:
    command = _COMMANDS[name]
    output = options.text("output") or "simple"
    try:
        command_options, args = _parse_flags(words, (*command.flags, _HELP))
    except _MisuseError:
        _emit("Incorrect Usage.\n")
        _print_command_help(name)
        return EXIT_MISUSE
    if command_options.on("help"):
        _print_command_help(name)
        return EXIT_OK
    if output not in ("simple", "extended", "json"):
        _complain(f"Unsupported output format: {output}")
        return EXIT_OK
    if options.on("no-sync") or name == "cluster-health":
        client = _make_client(options, _endpoints_asked(options).split(","))
    else:
        client = _synced_client(options)
    if options.on("debug"):
        _complain(f"Cluster-Endpoints: {', '.join(client.endpoints.urls)}")
    with client:
        return command.run(_Run(client, output, command_options, args))


def _dispatch(argv: Sequence[str]) -> int:
    """Run the command `argv` asks for, or show the help it needs."""
    options, words = _parse_flags(argv, _GLOBAL_FLAGS)
    if options.on("version"):
        _emit(f"etcdctl version {CLI_VERSION}")
        return EXIT_OK
    asks_help = options.on("help") or words[:1] in (["help"], ["h"], [])
    name, rest = _split_command(words[1:] if words[:1] in (["help"], ["h"]) else words)
    if name and asks_help:
        _print_command_help(name)
    elif name:
        return _run_command(name, rest, options)
    elif asks_help or words == ["member"]:
        _print_help("" if asks_help else "member")
    else:
        _emit(f"No help topic for '{words[0]}'")
        return EXIT_MISUSE
    return EXIT_OK


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return its exit code.

    0 success · 1 bad arguments, or a member command failed · 2 no server can be reached ·
    4 the server refused, or the request failed · 5 the cluster is unhealthy

    Source: etcdctl 2.3.8.
    """
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except _MisuseError:
        _emit("Incorrect Usage.\n")
        _print_help()
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


if __name__ == "__main__":
    _exit()
