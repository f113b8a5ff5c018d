"""Connections: exchanges over requests and urllib3, and the state of the client.

Turns what requests and urllib3 raise into the client's errors.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import enum
import http
import http.client
import io
import math
import os
import socket
import ssl
import threading
import time
from collections import deque
from types import MappingProxyType
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
    cast,
)

import requests
from requests.adapters import HTTPAdapter
from requests.utils import select_proxy
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.connection import is_connection_dropped

from .defaults import (
    HEADER_BYTES_MAX,
    HEADERS_MAX,
    IDLE_CLOSE_S,
    READ_BUFFER_BYTES,
    TRY_S,
    WAIT_MAX_S,
    _log,
)
from .errors import (
    Cancelled,
    ConnectionFailed,
    EtcdError,
    EtcdValueError,
    HttpError,
    RequestTimeout,
)
from .results import _expect_object, _Reply

# -- scopes: one deadline, and one way to end, for all that waits


class _Here(threading.local):
    """What the running thread is at."""

    scope: Optional[Scope] = None                   # the innermost one entered
    exchange: _Exchange                             # the request it performs


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

    def __init__(self, timeout: Optional[float] = None, *within: Scope) -> None:
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

    def __enter__(self) -> Scope:
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
