"""HTTP calls: requests to other servers, without blocking."""

from __future__ import annotations

import collections
import errno
import itertools
import os
import selectors
import socket
import ssl
import sys
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Union
from urllib.parse import urlsplit

from ..base.basics import _nothing
from ..base.limits import INTERIM_ANSWERS_MAX, SLICE_BYTES
from ..base.urls import is_https, url_address
from .http_messages import (
    BadRequest,
    ChunkedDecoder,
    HeadFinder,
    _content_length,
    parse_answer_head,
)
from .reactor import Reactor
from .tls import Handshake, TlsContext, default_tls, tls_reason
from .workers import Timer

DIAL_SECONDS = 0.25                 # for an address; then the next is tried beside it
DIAL_ADDRESSES_MAX = 16             # of one name; the others are not tried
ANSWER_BYTES_MAX = 4_096            # of the body of an answer, by default; above: cut


def dial_order(found: Sequence[Any]) -> List[Any]:
    """Order addresses of getaddrinfo: the families alternate, the first begins (RFC 8305 §4)."""
    first = [info for info in found if info[0] == found[0][0]]
    others = [info for info in found if info[0] != found[0][0]]
    turns = itertools.zip_longest(first, others)
    return [info for turn in turns for info in turn if info][:DIAL_ADDRESSES_MAX]


class Dial:
    """Connects to the first of several addresses that answers (RFC 8305 §5, without DNS).

    Calls done(socket, None) once, or done(None, error of the first address) when all have
    failed; never inside the constructor or after cancel().  The socket is not registered.
    """

    def __init__(
        self, reactor: Reactor, found: Sequence[Any],
        done: Callable[[Optional[socket.socket], Optional[OSError]], None],
    ) -> None:
        self._reactor = reactor
        self._left = collections.deque(dial_order(found))
        self._done = done
        self._error: Optional[OSError] = None       # of the first address that failed
        self._open: Set[socket.socket] = set()      # attempts under way
        self._timer = Timer(_nothing, ())
        self._next()

    def cancel(self) -> None:
        self._timer.cancel()
        self._left.clear()
        for sock in self._open:
            self._reactor.unregister(sock)
            sock.close()
        self._open.clear()

    def _next(self) -> None:
        """Try the next address, beside the attempts under way."""
        self._timer.cancel()
        if self._left:
            delay_s = DIAL_SECONDS if self._try(*self._left.popleft()) else 0.0
            if self._left or not self._open:
                self._timer = self._reactor.call_later(delay_s, self._next)
        elif not self._open:
            self._done(None, self._error)

    def _try(self, family: int, kind: int, protocol: int, _: str, address: Any) -> bool:
        """Begin to connect; False: it has failed already."""
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:            # no descriptor left, or no such family here
            self._error = self._error or error
            return False
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex(address)
        if code not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            self._note_failure(sock, code)
            return False
        self._open.add(sock)
        self._reactor.register(sock, selectors.EVENT_WRITE, lambda mask: self._answered(sock))
        return True

    def _note_failure(self, sock: socket.socket, code: int) -> None:
        sock.close()
        self._error = self._error or OSError(code, os.strerror(code))

    def _answered(self, sock: socket.socket) -> None:
        self._reactor.unregister(sock)
        self._open.discard(sock)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._note_failure(sock, code)
            self._next()
        else:
            self.cancel()
            self._done(sock, None)


class HttpCall:
    """One outgoing request on its own connection, without blocking.

    on_head            (status, headers) once
    on_data            (bytes) per piece of the body
    on_done            (error) once at the end, None for a complete body; not after cancel()
    headers            a Host here replaces that of the url
    more               further pieces of the body
    connect_timeout_s  for name look-up and connect
    idle_timeout_s     for each silence after that; None: no limit
    answer_max         received bytes of the body; above: cut, and complete
    """

    def __init__(
        self, reactor: Reactor, url: str, method: str, target: str, headers: Dict[str, str],
        body: bytes = b"", more: Sequence[bytes] = (), *, connect_timeout_s: float = 5.0,
        idle_timeout_s: Optional[float] = None, answer_max: int = sys.maxsize,
        tls: Optional[TlsContext] = None,
        on_head: Callable[[int, Dict[str, str]], None] = lambda status, headers: None,
        on_data: Callable[[bytes], None] = lambda data: None,
        on_done: Callable[[Optional[Exception]], None] = lambda error: None,
    ) -> None:
        self._reactor = reactor
        self._on_head = on_head
        self._on_data = on_data
        self._on_done = on_done
        self._idle_timeout_s = idle_timeout_s
        self._sock: Optional[socket.socket] = None
        lines = [f"{method} {target} HTTP/1.1"]
        if "Host" not in headers:
            lines.append(f"Host: {urlsplit(url).netloc}")
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body or method in ("POST", "PUT"):
            lines.append(f"Content-Length: {len(body) + sum(map(len, more))}")
        head = "\r\n".join(lines + ["", ""]).encode("latin-1")
        self._out = [memoryview(piece) for piece in (head + body, *more) if piece]
        self._in = bytearray()
        self._finder = HeadFinder()
        self._interim = 0               # answers of status 1xx so far
        self._left: Optional[int] = None    # bytes of body to come; None: no head yet
        self._chunks: Optional[ChunkedDecoder] = None
        self._room = answer_max         # bytes of body until it is cut
        self._heard = 0.0
        self.ended = False              # True after on_done() or cancel()
        self._bodyless = method == "HEAD"
        self._paused = False
        self._events = 0                # that the reactor waits for
        self.connected = False          # from then on the other side may have seen the request
        self._tls = (tls or default_tls()) if is_https(url) else None
        self._host = urlsplit(url).hostname or ""
        self._connecting: Union[Timer, Dial, Handshake, None] = None    # the step under way
        late = TimeoutError(f"dial tcp {urlsplit(url).netloc}: i/o timeout")
        self._timer = reactor.call_later(connect_timeout_s, self._fail, late)
        self._resolve(*url_address(url))

    def cancel(self) -> None:
        """Close the connection; no callback comes any more."""
        self.ended = True
        # Owners refer to their call, and these to the owner: that cycle must end.
        self._on_head = self._on_data = self._on_done = _ignore
        self._out = []
        self._timer.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._sock is None:
            return
        if self._events:
            self._reactor.unregister(self._sock)
        self._sock.close()
        self._sock = None

    def pause(self) -> None:
        """Read no more until resume(); the idle timeout is suspended."""
        if not self.ended and not self._paused:
            self._paused = True
            self._watch()

    def resume(self) -> None:
        if not self.ended and self._paused:
            self._paused = False
            self._heard = self._reactor.now()
            self._watch()

    def _flush(self) -> None:
        if self._sock is None:          # timed out meanwhile
            return
        try:
            if self._out:
                self._out[0] = self._out[0][self._sock.send(self._out[0]):]
                if not self._out[0]:
                    del self._out[0]
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(error)
            return
        self._watch()

    def _watch(self) -> None:
        assert self._sock is not None
        events = 0 if self._paused else selectors.EVENT_READ
        if self._out:
            events |= selectors.EVENT_WRITE
        if events and self._events:
            self._reactor.modify(self._sock, events, self._on_event)
        elif events:
            self._reactor.register(self._sock, events, self._on_event)
        elif self._events:
            self._reactor.unregister(self._sock)
        self._events = events

    def _resolve(self, host: str, port: int) -> None:
        """Dial a literal address at once; look a name up on a thread, as DNS may be slow."""
        hosts = ("127.0.0.1", "::1") if host == "localhost" else (host,)
        try:
            found = [info for host in hosts for info in socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)]
        except (socket.gaierror, UnicodeError):
            self._connecting = self._reactor.look_up(host, port, self._resolved)
        else:
            self._resolved(None, found)

    def _resolved(self, error: Optional[BaseException], found: Any) -> None:
        if error is not None:
            self._fail(error if isinstance(error, Exception) else OSError(str(error)))
        else:
            self._connecting = Dial(self._reactor, found, self._dialed)

    def _dialed(self, sock: Optional[socket.socket], error: Optional[OSError]) -> None:
        self._connecting, self._sock = None, sock
        if sock is None or self._tls is None:
            self._send_request(None if sock else error or OSError("no address"))
            return
        try:
            secured = self._tls.current.wrap_socket(
                sock, server_hostname=self._host, do_handshake_on_connect=False
            )
        except (OSError, ValueError) as fault:      # closed already, or an invalid name
            self._fail(OSError(f"cannot speak TLS to {self._host!r}: {fault}"))
            return
        self._sock = secured
        self._connecting = Handshake(self._reactor, secured, self._send_request)

    def _send_request(self, error: Optional[OSError]) -> None:
        self._connecting = None
        if error is not None:
            self._fail(error)
            return
        self.connected = True
        self._heard = self._reactor.now()
        self._timer.cancel()
        self._watch_idle()
        self._flush()

    def _on_event(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush()
        if mask & selectors.EVENT_READ and not self.ended:
            self._receive()

    def _watch_idle(self) -> None:
        if self._idle_timeout_s is None:
            return
        if self._paused:
            self._heard = self._reactor.now()
        left_s = self._heard + self._idle_timeout_s - self._reactor.now()
        if left_s <= 0:
            self._fail(TimeoutError("i/o timeout"))
        else:
            self._timer = self._reactor.call_later(left_s, self._watch_idle)

    def _receive(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(SLICE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        self._heard = self._reactor.now()
        try:
            if not data:
                self._end_of_input()
            elif self._left is None:
                self._in += data
                self._take_head()
            else:
                self._take_body(data)
        except BadRequest as error:
            self._fail(OSError(f"malformed HTTP response: {error}"))

    def _take_head(self) -> None:
        """Parse the head of the answer, behind any interim answers."""
        while True:
            found = self._finder.find(self._in)
            if found is None:
                return
            end, stop = found
            status, headers = parse_answer_head(bytes(self._in[:end]))
            del self._in[:stop]
            if status >= 200:
                break
            self._interim += 1
            if status == 101 or self._interim > INTERIM_ANSWERS_MAX:
                raise BadRequest(f"{self._interim} interim answers, the last with status {status}")
        data = bytes(self._in)
        self._in.clear()
        length = _content_length(headers)
        if self._bodyless or status in (204, 304):
            self._left = 0
        elif headers.get("transfer-encoding", "").lower() == "chunked":
            self._chunks = ChunkedDecoder()
            self._left = sys.maxsize
        else:
            self._left = length if "content-length" in headers else sys.maxsize
        self._on_head(status, headers)
        if not self.ended:
            self._take_body(data)

    def _take_body(self, data: bytes) -> None:
        assert self._left is not None
        self._room -= len(data)
        if self._chunks is not None:
            data = self._chunks.feed(data)
        else:
            data = data[:self._left]
            self._left -= len(data)
        if data:
            self._on_data(data)
        is_whole = self._chunks.done if self._chunks else not self._left
        if not self.ended and (is_whole or self._room < 0):
            self._end(None)

    def _end_of_input(self) -> None:
        until_close = self._left is not None and self._left > sys.maxsize // 2
        self._end(None if until_close and self._chunks is None else EOFError("unexpected EOF"))

    def _fail(self, error: Exception) -> None:
        if not self.ended:
            self._end(OSError(tls_reason(error)) if isinstance(error, ssl.SSLError) else error)

    def _end(self, error: Optional[Exception]) -> None:
        on_done = self._on_done
        self.cancel()
        on_done(error)


def _ignore(*args: object) -> None:
    """The callback of a call that is over."""


class Answer:
    """The answer to a call: status, headers, and the first body_max bytes of the body."""

    def __init__(self, body_max: int = ANSWER_BYTES_MAX) -> None:
        self._body_max = body_max
        self.status = 0                 # 0: none has arrived
        self.headers: Dict[str, str] = {}
        self.body = b""

    def take_head(self, status: int, headers: Dict[str, str]) -> None:
        self.status, self.headers = status, headers

    def take_data(self, data: bytes) -> None:
        self.body = (self.body + data)[:self._body_max]


def fetch(
    reactor: Reactor, url: str, target: str, done: Callable[[Optional[Exception], Answer], None],
    *, method: str = "GET", headers: Optional[Dict[str, str]] = None, body: Sequence[bytes] = (),
    connect_timeout_s: float, idle_timeout_s: float, body_max: int = ANSWER_BYTES_MAX,
    tls: Optional[TlsContext] = None,
) -> HttpCall:
    """Make a call; done(error, answer) once at its end, unless it is cancelled."""
    answer = Answer(body_max)
    return HttpCall(
        reactor, url, method, target, headers or {}, body=b"".join(body[:1]), more=body[1:],
        connect_timeout_s=connect_timeout_s, idle_timeout_s=idle_timeout_s, answer_max=body_max,
        tls=tls, on_head=answer.take_head, on_data=answer.take_data,
        on_done=lambda error: done(error, answer),
    )
