"""Connections: exchanges over http.client and urllib3, scopes, and the state of the client.

Converts the exceptions of urllib3 and http.client into the errors of the client.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import enum
import http.client
import io
import math
import os
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Callable, NamedTuple, TypeVar, cast

from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH, select_proxy
from urllib3 import PoolManager, ProxyManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util.connection import is_connection_dropped

from .defaults import TRY_S, WAIT_MAX_S, _log
from .errors import Cancelled, ConnectionFailed, EtcdError, EtcdValueError, RequestTimeout
from .results import _T, _Reply

IDLE_CLOSE_S = 3.0              # a connection that was idle for longer is replaced
READ_BUFFER_BYTES = 16384       # read from a socket at once
HEADER_BYTES_MAX = 65536        # of one header; a longer one breaks the connection
HEADERS_MAX = 100               # of one reply; more break the connection

# -- scopes: one deadline and one way to cancel, for all waits


class _ThreadContext(threading.local):
    scope: Scope | None = None                      # the innermost scope that the thread entered
    exchange: _Exchange                             # the request that it performs


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

    def __init__(self, timeout: float | None = None, *within: Scope) -> None:
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

    def __enter__(self) -> Scope:
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

    def __enter__(self: _CloseableType) -> _CloseableType:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_CloseableType = TypeVar("_CloseableType", bound=_Closeable)


def _start_thread(name: str, function: Callable[[], _T]) -> concurrent.futures.Future[_T]:
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
                 on_silence: Callable[[], bool] | None = None) -> None:
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

    def _addresses(self, host: str, port: int) -> Sequence[tuple[Any, ...]]:
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

    def readinto(self, buffer: Any) -> int | None:
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

    def __init__(self, lines: Iterable[bytes] = ()) -> None:
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

    verify: bool | str = True                 # or the path of a file or directory
    cert: None | str | tuple[str, str] = None
    proxies: Mapping[str, str] = MappingProxyType({})

    def tls_options(self) -> dict[str, Any]:
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
    headers: Mapping[str, str] = MappingProxyType({})   # for a forwarding proxy
    open_tunnel: Callable[[HTTPConnection], None] | None = None

    @classmethod
    def to(cls, endpoint: str, settings: _ConnectionSettings) -> _Route:
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

    def request(self, method: str, target: str, form: bytes | None,
                headers: Mapping[str, str]) -> bytes:
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
                form: bytes | None, headers: Mapping[str, str],
                on_head: Callable[[_Reply], None] | None) -> _Reply:
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


def _close_all(idle: deque[_Connections]) -> None:
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
