"""Calls: one request over all endpoints, attempts and deadlines.

_Caller._exchange is the only place that does I/O.
"""

from __future__ import annotations

import base64
import contextlib
import http
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
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Deque,
    Dict,
    FrozenSet,
    Generic,
    Iterable,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Type,
    TypeVar,
    Union,
    cast,
)
from urllib.parse import quote, quote_plus, urljoin, urlsplit

from urllib3.exceptions import HTTPError as UrllibError

from .connections import (
    ConnectionState,
    Scope,
    _close_all,
    _Connections,
    _Connectivity,
    _Exchange,
    _here,
    _Listener,
    _status_error,
    _transport_error,
    _Trust,
)
from .defaults import (
    BACKOFF_MAX_S,
    BACKOFF_MIN_S,
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
    REDIRECTS_MAX,
    SESSION_TIMEOUT_S,
    SYNC_INTERVAL_S,
    SYNC_TIMEOUT_S,
    TOTAL_TIMEOUT_S,
    __version__,
    _log,
)
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
from .results import _T, Member, _parse_members, _Reply

if TYPE_CHECKING:
    from typing_extensions import Concatenate, ParamSpec

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
    _: Callable[Concatenate[Any, _Settings], None],
) -> Callable[
    [Callable[[Type[_Made]], _Made]], Callable[Concatenate[Type[_Made], _Settings], _Made]
]:
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

    def _perform(self, call: _Call[_T]) -> _T:
        """Send `call` to one endpoint after the other, and again, as long as that is safe.

        Raises the error of the endpoint tried first, with those of the others in `failures`.
        """
        timeout = self.total_timeout if call.timeout is None else call.timeout
        with Scope(timeout, self.scope) as scope:
            self._discover_endpoints(scope.deadline)
            return self._perform_within(scope, call)

    def _perform_within(self, scope: Scope, call: _Call[_T]) -> _T:
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

    def _note_failure(self, endpoint: str, call: _Call[Any], error: EtcdError) -> None:
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
        self, perform: Callable[[_Call[List[Member]]], List[Member]],
    ) -> None:
        self._refresh_at = time.monotonic() + SYNC_INTERVAL_S   # for other threads, and ours
        call = _Call("GET", f"{self.version_prefix}/members", _parse_members)
        urls = [url for member in perform(call) for url in member.client_urls]
        with contextlib.suppress(ValueError):       # nonsense in the list: keep what we have
            self.endpoints.learn([_base_url(url) for url in urls])

    def _attempt(
        self, endpoint: str, call: _Call[_T], deadline: float, sharers: int = 1,
    ) -> _T:
        """Send `call` to `endpoint` once.

        sharers  endpoints still to be tried: a read leaves them their part of the time that is left
        """
        if sharers > 1 and not (call.write or call.waits) and deadline < math.inf:
            deadline -= (deadline - time.monotonic()) * (sharers - 1) / sharers
        return self._request(endpoint, call, _Exchange(
            deadline, self.read_timeout or math.inf, self.connect_timeout))

    def _request(self, endpoint: str, call: _Call[_T], exchange: _Exchange) -> _T:
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

    def _follows(self, call: _Call[Any], reply: _Reply) -> bool:
        harmless = not call.write or reply.status in (307, 308)
        return self.allow_redirect and harmless and "Location" in reply.headers

    def _exchange(
        self, base: str, target: str, call: _Call[Any], exchange: _Exchange,
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

    def _headers(self, base: str, call: _Call[Any]) -> Dict[str, str]:
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

    def _judge(self, endpoint: str, call: _Call[_T], reply: _Reply) -> _T:
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
