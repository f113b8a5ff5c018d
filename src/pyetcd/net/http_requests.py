"""Requests, and the replies to them."""

from __future__ import annotations

import http.server
from operator import attrgetter
from typing import IO, Callable, Dict, Optional, Protocol, Sequence, cast

from ..base.limits import OUTPUT_SHARED_BYTES_MIN
from .http_messages import HttpHead
from .reactor import Reactor

_STATUS_LINES = {
    int(status): f"HTTP/1.1 {int(status)} {phrases[0]}\r\n"
    for status, phrases in http.server.BaseHTTPRequestHandler.responses.items()
}


class Channel(Protocol):
    """The part of a connection that its requests and their replies use."""

    reactor: Reactor
    remote: str
    on_close: Optional[Callable[[], None]]      # once, if the client closes it before the reply
    on_drain: Optional[Callable[[], None]]
    streaming: bool
    pending: int
    busy: bool
    closed: bool

    @property
    def scheme(self) -> str: ...
    def send(self, data: bytes, more: Sequence[bytes] = ()) -> None: ...
    def finish(self, data: bytes, keep_alive: bool, more: Sequence[bytes] = ()) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class HttpRequest:
    """One request, complete with its body, waiting for exactly one reply."""

    __slots__ = ("head", "body", "connection", "body_too_large", "body_file")

    def __init__(self, head: HttpHead, body: bytes, connection: Channel) -> None:
        self.head = head
        self.body = body
        self.connection = connection
        self.body_too_large = False
        self.body_file: Optional[IO[bytes]] = None      # with a body that is too large for memory

    # Attributes of the head and the connection, read in C: a GET reads four of them.
    method = cast(str, property(attrgetter("head.method")))
    target = cast(str, property(attrgetter("head.target")))     # as sent, latin-1
    path = cast(str, property(attrgetter("head.path")))         # percent-decoded (text_of)
    query = cast(str, property(attrgetter("head.query")))       # as sent, without `?`, latin-1
    headers = cast(Dict[str, str], property(attrgetter("head.headers")))    # lower-case names
    remote = cast(str, property(attrgetter("connection.remote")))       # client's `ip:port`
    scheme = cast(str, property(attrgetter("connection.scheme")))

    def _head_bytes(
        self, status: int, content_type: Optional[str], headers: str, framing: str
    ) -> bytes:
        head = self.head
        kind = f"Content-Type: {content_type}\r\n" if content_type else ""
        status_line = _STATUS_LINES.get(status) or f"HTTP/1.1 {status} Status\r\n"
        if head.minor:
            closing = "" if head.keep_alive else "Connection: close\r\n"
        else:
            closing = "Connection: keep-alive\r\n" if head.keep_alive else ""
            status_line = "HTTP/1.0" + status_line[8:]
        date = f"Date: {self.connection.reactor.http_date}\r\n"
        return f"{status_line}{kind}{headers}{date}{framing}{closing}\r\n".encode("latin-1")

    def reply(
        self, status: int, body: bytes = b"", content_type: Optional[str] = "application/json",
        headers: str = "", more: Sequence[bytes] = (),
    ) -> None:
        """Send a reply; to HEAD without its body.

        headers  further raw lines, each with its CRLF
        more     pieces of the body that are never copied
        """
        size = len(body) + sum(map(len, more))
        framing = "" if status == 204 else f"Content-Length: {size}\r\n"
        data = self._head_bytes(status, content_type if size else None, headers, framing)
        if self.head.method == "HEAD":
            more = ()
        else:
            data += body
        self.connection.finish(data, self.head.keep_alive, more)

    def reply_raw(self, data: bytes, more: Sequence[bytes] = ()) -> None:
        """Send a ready-made head and body; only if the head takes_raw."""
        self.connection.finish(data, True, more)

    def start_stream(
        self, status: int, content_type: Optional[str] = "application/json", headers: str = "",
        *, length: Optional[int] = None,
    ) -> StreamReply:
        """Send the head now; the body follows in pieces, of `length` bytes if that is known.

        A reply without body (HEAD, 204, 304) is completed by end().
        """
        bodyless = self.head.method == "HEAD" or status in (204, 304)
        chunked = bool(self.head.minor) and length is None and not bodyless
        framing = "Transfer-Encoding: chunked\r\n" if chunked else ""
        if length is not None and status != 204:
            framing = f"Content-Length: {length}\r\n"
        if not (chunked or bodyless or length is not None):
            self.head = closing_head(self.head)        # the connection's end is the body's end
        reply = StreamReply(self, chunked=chunked)
        if not reply.closed:
            self.connection.send(self._head_bytes(status, content_type, headers, framing))
        return reply


Handler = Callable[[HttpRequest], None]


class StreamReply:
    """A reply whose body is written in pieces: chunked, of known length, or until close."""

    __slots__ = ("_connection", "_chunked", "_keep_alive", "closed", "on_close")

    def __init__(self, request: HttpRequest, *, chunked: bool) -> None:
        self._connection = request.connection
        self._chunked = chunked
        self._keep_alive = request.head.keep_alive
        self.closed = not request.connection.busy
        self.on_close: Optional[Callable[[], None]] = None
        if not self.closed:
            request.connection.streaming = True
            request.connection.on_close = self._client_gone

    @property
    def pending(self) -> int:
        """Bytes that the socket has not taken yet."""
        return self._connection.pending

    def when_read(self, callback: Callable[[], None]) -> None:
        """Call once, as soon as the socket has taken all pending bytes."""
        self._connection.on_drain = callback

    def write(self, data: bytes, more: Sequence[bytes] = ()) -> bool:
        """Queue one piece, of which `more` is never copied; False: the reply has ended."""
        if self.closed:
            return False
        size = len(data) + sum(map(len, more))
        if not self._chunked:
            self._connection.send(data, more)
        elif size < OUTPUT_SHARED_BYTES_MIN:
            self._connection.send(b"%x\r\n%b\r\n" % (size, b"".join((data, *more))))
        else:
            self._connection.send(b"%x\r\n" % size, (data, *more, b"\r\n"))
        return True

    def end(self, last: Sequence[bytes] = ()) -> None:
        """Finish the body, with the pieces of a last chunk, and go on with the next request."""
        if self.closed:
            return
        size, end = sum(map(len, last)), b"0\r\n\r\n" if self._chunked else b""
        if last and self._chunked and size < OUTPUT_SHARED_BYTES_MIN:
            end = b"%x\r\n%b\r\n0\r\n\r\n" % (size, b"".join(last))     # one piece, for one send
        elif last:
            self.write(last[0], last[1:])
        self.closed = True
        self.on_close = None
        self._connection.finish(end, self._keep_alive)

    def abort(self) -> None:
        """Drop the connection without finishing the body; on_close is not called."""
        self.on_close = None
        if not self.closed:
            self.closed = True
            self._connection.close()

    def _client_gone(self) -> None:
        self.closed = True
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()


def closing_head(head: HttpHead) -> HttpHead:
    """Return a copy of `head` for the last request of its connection."""
    closing = HttpHead(head.method, head.target, head.minor, head.headers)
    closing.keep_alive = closing.takes_raw = False
    closing.parsed = head.parsed
    return closing
