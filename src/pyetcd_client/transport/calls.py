"""Calls: one request over all endpoints, attempts and deadlines.

All I/O takes place in _Caller._exchange.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import logging
import math
import os
import random
import re
import ssl
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Generic, TypeVar, Union, cast
from urllib.parse import quote, quote_plus, urljoin, urlsplit

from urllib3.exceptions import HTTPError as UrllibError

from .connections import (
    ConnectionState,
    Scope,
    _close_all,
    _Closeable,
    _Connections,
    _ConnectionSettings,
    _Connectivity,
    _context,
    _Exchange,
    _Listener,
    _transport_error,
)
from .defaults import __version__, _log
from .endpoints import Endpoints, _Address, _base_url, _discover, _listed_urls
from .errors import (
    BadReply,
    Cancelled,
    ClusterIdChanged,
    ConnectionFailed,
    EtcdError,
    EtcdValueError,
    RequestTimeout,
    TransportError,
    WatchTimeout,
)
from .results import _T, Member, _parse_members, _Reply, _status_error

if TYPE_CHECKING:
    from typing_extensions import Concatenate, ParamSpec

CONNECT_TIMEOUT_S = 2.0         # for each address of an endpoint; then the next endpoint is tried
READ_TIMEOUT_S = 60.0           # silence of a server
TOTAL_TIMEOUT_S = 30.0          # one call: all endpoints, attempts and parts of the reply
SESSION_TIMEOUT_S = 10.0        # without a reply, until the connection counts as lost
SYNC_INTERVAL_S = 60.0          # age at which the member list is read again
SYNC_TIMEOUT_S = 2.0            # for reading it; then the waiting call goes on without it
BACKOFF_MIN_S = 0.05            # wait after a round in which every endpoint failed; doubled,
BACKOFF_MAX_S = 1.0             # up to this
REDIRECTS_MAX = 5               # of one read; more raise BadReply

_SUCCESS: frozenset[int] = frozenset((200, 201, 204))
_FORM_TYPE = "application/x-www-form-urlencoded"
_JSON_TYPE = "application/json"
_REDIRECTS: frozenset[int] = frozenset((301, 302, 303, 307, 308))

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


def _encode_fields(fields: Mapping[str, _Field]) -> str:
    return "&".join(
        f"{_quote_plus(name)}="
        f"{_quote_plus(str(value).lower() if isinstance(value, bool) else str(value))}"
        for name, value in fields.items() if value is not None)


def _target(path: str, query: Mapping[str, _Field]) -> str:
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
    form: bytes | None = None
    content_type: str = _FORM_TYPE
    timeout: float | None = None                 # seconds in all; None: the client's
    statuses: frozenset[int] = _SUCCESS             # that `parse` accepts
    on_head: Callable[[_Reply], None] | None = None  # called before a body that may take long
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


def _environment() -> dict[str, Any]:
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
    _: Callable[Concatenate[Any, _Settings], None],
) -> Callable[
    [Callable[[type[_ClientType]], _ClientType]],
    Callable[Concatenate[type[_ClientType], _Settings], _ClientType]
]:
    """Tell type checkers that a constructor takes the keyword arguments of another one."""
    return lambda function: cast(Any, function)


class _Caller(_Closeable):
    """Performs calls: endpoints, connections, retries.  The base of all parts of the client."""

    # Called with method, URL and form of each request before it is sent.
    on_request: Callable[[str, str, bytes | None], object] | None = None

    def __init__(self, host: _Address | Sequence[_Address] = "127.0.0.1", port: int = 2379,
                 srv_domain: str | None = None, version_prefix: str = "/v2",
                 read_timeout: float = READ_TIMEOUT_S, allow_redirect: bool = True,
                 protocol: str = "http", cert: None | str | tuple[str, str] = None,
                 ca_cert: str | None = None, username: str | None = None,
                 password: str | None = None, allow_reconnect: bool | None = None,
                 use_proxies: bool = False, expected_cluster_id: str | None = None,
                 per_host_pool_size: int = 10, lock_prefix: str = "/_locks", *,
                 endpoints: Iterable[str] | None = None, connect_timeout: float = CONNECT_TIMEOUT_S,
                 total_timeout: float | None = TOTAL_TIMEOUT_S,
                 session_timeout: float = SESSION_TIMEOUT_S, sync: bool = False, retry: bool = True,
                 verify: bool = True, proxies: Mapping[str, str] | None = None,
                 on_state: _Listener | None = None) -> None:
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
    def from_env(cls: type[_CallerType], **settings: Any) -> _CallerType:
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

    def sync(self) -> tuple[str, ...]:
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

    def _perform(self, call: _Call[_T]) -> _T:
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

    def _note_failure(self, endpoint: str, call: _Call[Any], error: EtcdError) -> None:
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

    def _leave_endpoint(self, endpoint: str, error: EtcdError | None = None) -> None:
        if self._reconnect:
            self.endpoints.failed(endpoint)
            if self.endpoints.current != endpoint:
                _log.info("%s failed (%s): on to %s", endpoint,
                          error.message if error else "no answer", self.endpoints.current)

    def _wait_before_retry(self, rounds: int, errors: list[EtcdError], scope: Scope) -> None:
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

    def _learn_members(self, perform: Callable[[_Call[list[Member]]], list[Member]]) -> None:
        self._refresh_at = time.monotonic() + SYNC_INTERVAL_S   # first: keeps other threads out
        call = _Call("GET", f"{self.version_prefix}/members", _parse_members)
        urls = [url for member in perform(call) for url in member.client_urls]
        with contextlib.suppress(ValueError):       # a malformed URL: keep the known ones
            self.endpoints.learn([_base_url(url) for url in urls])

    def _attempt(self, endpoint: str, call: _Call[_T], deadline: float, sharers: int = 1) -> _T:
        """Send `call` once; a read takes an equal share of the time left to `sharers` endpoints."""
        if sharers > 1 and not (call.write or call.waits) and deadline < math.inf:
            deadline -= (deadline - time.monotonic()) * (sharers - 1) / sharers
        return self._request(endpoint, call, _Exchange(
            deadline, self.read_timeout or math.inf, self.connect_timeout))

    def _request(self, endpoint: str, call: _Call[_T], exchange: _Exchange) -> _T:
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

    def _follows(self, call: _Call[Any], reply: _Reply) -> bool:
        harmless = not call.write or reply.status in (307, 308)
        return self.allow_redirect and harmless and "Location" in reply.headers

    def _exchange(self, base: str, target: str, call: _Call[Any], exchange: _Exchange,
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

    def _headers(self, base: str, call: _Call[Any]) -> dict[str, str]:
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

    def _interpret(self, endpoint: str, call: _Call[_T], reply: _Reply) -> _T:
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
