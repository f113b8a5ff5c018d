"""Connections: bytes in, requests out, replies in order."""

from __future__ import annotations

import math
import selectors
import socket
from typing import (
    IO,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
    cast,
)

from ..base.errors import InvariantError
from ..base.ids import package_logger
from ..base.limits import (
    CHUNKED_SLICE_BYTES,
    CHUNKS_MAX,
    HEAD_CACHE_MAX,
    OUTPUT_BYTES_MAX,
    OUTPUT_JOIN_BYTES_MAX,
    OUTPUT_PAUSE_BYTES,
    OUTPUT_PIECES_MAX,
    REQUEST_HEAD_BYTES_MAX,
    REQUEST_SECONDS_MAX,
    SLICE_BYTES,
    UNREAD_BYTES_MIN,
    UNREAD_SECONDS_MAX,
    V3_REFUSAL,
)
from .budgets import HeldBytes
from .http_messages import (
    BadRequest,
    ChunkedDecoder,
    HeadFinder,
    Http2Knock,
    Http2Refusal,
    HttpHead,
    check_start,
    parse_head,
)
from .http_requests import _STATUS_LINES, Handler, HttpRequest, closing_head
from .reactor import Reactor
from .tls import TlsContext
from .workers import Timer

DRAIN_SECONDS = 2.0                 # how long a closing connection waits for the client's end


class Service:
    """What the connections of a listener share, and may ask it for.

    handler gets every complete request.  body_max in bytes: larger bodies arrive as
    body_too_large.  body_limit(head) may allow less.  memory_max: from there on a body goes to the
    file that open_spool(its first bytes) returns, if any, else it is too large.  held_max: of all
    bodies in memory together.  patient: these are clients, who share a part of each turn; members
    never wait for them.
    """

    def __init__(
        self, reactor: Reactor, handler: Handler, body_max: int, tls: Optional[TlsContext],
        held: Optional[HeldBytes], *, patient: bool,
    ) -> None:
        self.reactor = reactor
        self.handler = handler
        self.body_max = body_max
        self.tls = tls
        self.held = held or HeldBytes(reactor)
        self.patient = patient
        self.flush_soon = reactor.flush_in_turn if patient else reactor.flush_soon
        self.body_limit: Callable[[HttpHead], int] = lambda head: self.body_max
        self.memory_max: float = math.inf
        self.open_spool: Callable[[bytes], Optional[IO[bytes]]] = lambda first: None
        self.held_max: float = math.inf
        self.held_bytes = 0             # of bodies under way
        self.heads: Dict[bytes, HttpHead] = {}
        self.received_bytes = self.sent_bytes = 0   # of all connections so far
        self.unread: Dict[Connection, Tuple[float, int]] = {}   # since when; taken since then
        self._connections: Set[Connection] = set()
        self._partial: Dict[Connection, float] = {}     # incomplete requests and their start

    def serve(self, sock: socket.socket, remote: str) -> Connection:
        """Serve HTTP on an accepted socket, whose handshake is done if there is one."""
        connection = Connection(self, sock, remote)
        self._connections.add(connection)
        return connection

    def dispatch(self, request: HttpRequest) -> None:
        """Hand a request to the handler; a bug there costs this request, not the member.

        Requests only read state or propose, so nothing is half done when one fails; what is
        applied from the log is not protected like this.
        """
        try:
            self.handler(request)
        except InvariantError:
            raise
        except Exception:
            package_logger("http").exception("bug: %s %s", request.method, request.target[:200])
            if request.connection.streaming:
                request.connection.close()      # its reply has begun, and cannot be completed
                return
            request.head = closing_head(request.head)      # no second reply: see finish()
            request.reply(500, b'{"message":"Internal Server Error"}')

    @property
    def has_partial(self) -> bool:
        """True if any connection is known to watch_partial()."""
        return bool(self._partial)

    def watch_partial(self, connection: Connection, partial: bool, *, begun: bool) -> None:
        """Remember since when a request is incomplete.  begun: it is another than before."""
        if partial and begun:
            self._partial[connection] = self.reactor.now()
        elif partial:
            self._partial.setdefault(connection, self.reactor.now())
        elif self._partial:
            self._partial.pop(connection, None)

    def watch_unread(self, connection: Connection, taken: int) -> None:
        """Remember since when a client takes too little.  taken: so many bytes just now."""
        since, before = self.unread.get(connection, (0.0, UNREAD_BYTES_MIN))
        taken += before
        is_enough = taken >= UNREAD_BYTES_MIN
        self.unread[connection] = (self.reactor.now(), 0) if is_enough else (since, taken)

    def forget(self, connection: Connection) -> None:
        """The connection is closed."""
        self._connections.discard(connection)
        self._partial.pop(connection, None)
        self.unread.pop(connection, None)
        self.held.forget(connection)

    def close_slow(self) -> None:
        """Close what has been on the way for too long."""
        now = self.reactor.now()
        for connection, since in list(self._partial.items()):
            if since < now - REQUEST_SECONDS_MAX:
                connection.refuse(BadRequest("408 Request Timeout", 408))
        for connection, (since, _) in list(self.unread.items()):
            if since < now - UNREAD_SECONDS_MAX:
                connection.close()


class Connection:
    """One accepted socket: bytes in, requests out, one at a time and in order."""

    __slots__ = (
        "reactor", "remote", "on_close", "on_drain", "streaming", "pending", "busy", "closed",
        "_service", "_sock", "_in", "_finder", "_head", "_chunks", "_body", "_body_bytes",
        "_body_max", "_file", "_out", "_dirty", "_events", "_close_after", "_eof", "_draining",
        "_in_line", "_http2", "_goodbye",
    )

    def __init__(self, service: Service, sock: socket.socket, remote: str) -> None:
        self.reactor = service.reactor
        self.remote = remote
        self.on_close: Optional[Callable[[], None]] = None
        self.on_drain: Optional[Callable[[], None]] = None      # once, when nothing is pending
        self.streaming = False
        self.pending = 0                # bytes in _out
        self.busy = False               # a request waits for its reply, or for the end of it
        self.closed = False
        self._service = service
        self._sock = sock
        self._in = bytearray()          # received, not yet parsed
        self._finder = HeadFinder()     # looks for the end of the next head in it
        self._head: Optional[HttpHead] = None       # parsed, its body still incomplete
        self._chunks: Optional[ChunkedDecoder] = None
        self._body: List[bytes] = []    # pieces of a chunked or large body
        self._body_bytes = 0            # in them, or in _file
        self._body_max = 0              # of the request under way, as its head deserves
        self._file: Optional[IO[bytes]] = None      # instead of _body
        self._out: List[Union[bytes, memoryview]] = []
        self._dirty = False
        self._events = selectors.EVENT_READ
        self._close_after = False       # close when _out is sent
        self._eof = False               # the client will send no more
        self._draining = False          # reply sent, input thrown away until the client closes
        self._in_line = False           # what is in _in is parsed after the others' turn
        self._http2: Optional[Http2Refusal] = None
        self._goodbye: Optional[Timer] = None       # ends _draining
        self._register(selectors.EVENT_READ, self._receive)

    @property
    def scheme(self) -> str:
        """`https` under TLS, else `http`."""
        return "https" if self._service.tls else "http"

    def _register(self, events: int, callback: Callable[[int], None]) -> None:
        self.reactor.register(self._sock, events, callback, patient=self._service.patient)

    def _on_event(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self.flush()
        if mask & selectors.EVENT_READ and not self.closed:
            self._receive(mask)

    def _receive(self, mask: int) -> None:
        try:
            data = self._sock.recv(SLICE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if self._draining:
            if not data:
                self.close()
        elif not data:
            self._end_of_input()
        else:
            self._service.received_bytes += len(data)
            if not (self._in or self.busy or self.pending or self._head or self._close_after):
                request = self._whole_request(data)
                if request is not None:
                    self.busy = True
                    self._service.dispatch(request)
                    return
            self._in += data
            if not (self.busy or self._in_line) and self.pending <= OUTPUT_PAUSE_BYTES:
                self._process()
            elif len(self._in) > REQUEST_HEAD_BYTES_MAX:
                self._watch(self._events & ~selectors.EVENT_READ)   # until _resume()
            if (self._in or self._body_bytes) and not self.closed:
                self._service.held.hold(self, len(data))

    def _end_of_input(self) -> None:
        """The client sends no more: it waits for its replies, but not for the end of a stream."""
        self._eof = True
        if self.busy and self.streaming:
            self.close()
        elif self.busy or self._in_line or self._out:
            self._watch(self._events & ~selectors.EVENT_READ)
            # Requests that wait for room in the output are served when there is some.
            waits = self.busy or self._in_line or self.pending > OUTPUT_PAUSE_BYTES and self._in
            self._close_after = self._close_after or not waits
        else:
            self.close()

    def _process(self) -> None:
        """Serve the next request, if it is all there; finish() sees to those behind it."""
        served = False
        try:
            request = self._next_request() if self._in or self._head else None
            if request is not None:
                self.busy = served = True
                self._service.dispatch(request)
        except BadRequest as error:
            self.refuse(error)
        if self.closed:
            return
        partial = bool(self._in or self._head or self._http2) and not self.busy
        if partial or self._service.has_partial:
            self._service.watch_partial(self, partial, begun=served)
        if self._eof and not (self.busy or self._in_line or self._close_after):
            self._close_after = True        # what is left is no whole request
            self._flush_soon()

    def _line_up(self) -> None:
        """Parse what is in _in after the others' turn: nobody is served twice before them."""
        if not self._in_line:
            self._in_line = True
            self.reactor.call_in_turn(self._resume)

    def _whole_request(self, data: bytes) -> Optional[HttpRequest]:
        """The request if `data` is just one, whose head was seen before.  A hot path."""
        end = data.find(b"\r\n\r\n")
        head = self._service.heads.get(data[:end]) if end >= 0 else None
        if head is not None and head.is_simple and len(data) == end + 4 + head.body_size:
            return HttpRequest(head, data[end + 4:], self)
        return None

    def _next_request(self) -> Optional[HttpRequest]:
        head = self._head or self._take_head()
        if head is None:
            return None
        if not head.body_size and not head.chunked:
            self._head = None
            return HttpRequest(head, b"", self)
        body = self._take_chunked(head) if head.chunked else self._take_sized(head)
        if body is None and self._head is not None:
            return None
        self._head = None
        request = HttpRequest(head, body or b"", self)
        request.body_file, self._file = self._file, None
        if body is None:
            request.body_too_large = True
            request.head = closing_head(head)
        return request

    def _take_head(self) -> Optional[HttpHead]:
        if self._http2 is not None:
            self._refuse_http2(self._http2)
            return None
        found = self._finder.find(self._in)
        if found is None:
            check_start(self._in)       # say so at once instead of waiting for an end
            return None
        end, stop = found
        raw = bytes(self._in[:end])
        del self._in[:stop]
        heads = self._service.heads
        head = heads.get(raw)
        if head is None:
            head = parse_head(raw)
            if end <= 2048:
                if len(heads) >= HEAD_CACHE_MAX:
                    heads.clear()
                heads[raw] = head
        self._head = head
        if head.chunked or head.body_size:
            self._body_max = self._service.body_limit(head)
        if head.expects and (head.chunked or head.body_size > len(self._in)):
            if head.body_size <= self._body_max:
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return head

    def _take_sized(self, head: HttpHead) -> Optional[bytes]:
        """Return the body; None with _head cleared if it is too large, with _head if not all."""
        size = head.body_size
        if size > self._body_max:
            self._refuse_body()
            return None
        if self._body or len(self._in) < size:
            if size > 1 << 16:
                return self._gather(size)
            return None
        body = bytes(self._in[:size])
        del self._in[:size]
        return body

    def _gather(self, size: int) -> Optional[bytes]:
        """Collect a large body in a list: appending to bytes would copy it each time."""
        left = size - self._body_bytes
        piece = bytes(self._in[:left])
        del self._in[:left]
        if piece and not self._keep(piece):
            self._refuse_body()
            return None
        return self._join() if self._body_bytes == size else None

    def _keep(self, piece: bytes) -> bool:
        """Keep a piece of a body, not empty; False if there is no room."""
        self._body_bytes += len(piece)
        if self._file is not None:
            return _write_all(self._file, (piece,))
        service = self._service
        self._body.append(piece)
        service.held_bytes += len(piece)
        if self._body_bytes > service.memory_max:
            return self._spool()
        return service.held_bytes <= service.held_max

    def _spool(self) -> bool:
        """From here on the body goes to a file; False if that cannot be."""
        first = b"".join([piece[:16] for piece in self._body[:16]])
        file = self._service.open_spool(first[:16])
        if file is None or not _write_all(file, self._body):
            return False
        self._service.held_bytes -= self._body_bytes
        self._body, self._file = [], file
        return True

    def _join(self) -> bytes:
        """Return what was kept, unless it is in _file."""
        data = b"".join(self._body)
        self._service.held_bytes -= len(data)
        self._body, self._body_bytes = [], 0
        return data

    def _refuse_body(self) -> None:
        """Forget the body: its request is answered at once."""
        self._head = self._chunks = self._file = None
        self._join()

    def _take_chunked(self, head: HttpHead) -> Optional[bytes]:
        if self._chunks is None:
            self._chunks = ChunkedDecoder()
        decoder = self._chunks
        data = bytes(self._in[:CHUNKED_SLICE_BYTES])
        del self._in[:CHUNKED_SLICE_BYTES]
        piece = decoder.feed(data)
        has_room = self._keep(piece) if piece else True
        if not has_room or self._body_bytes > self._body_max or decoder.chunks > CHUNKS_MAX:
            self._refuse_body()
            return None
        if not decoder.done:
            if self._in:
                self._line_up()
            return None
        self._in[:0] = decoder.rest
        self._chunks = None
        return self._join()

    def refuse(self, error: BadRequest) -> None:
        """Answer what is not HTTP, and close."""
        if isinstance(error, Http2Knock):
            self._http2 = Http2Refusal(V3_REFUSAL)
            self._refuse_http2(self._http2)
            return
        text = str(error).encode("latin-1")
        status_line = _STATUS_LINES.get(error.status, _STATUS_LINES[400])
        self.send(
            f"{status_line}Content-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n".encode("latin-1") + text
        )
        self._in.clear()
        self._close_after = True

    def _refuse_http2(self, refusal: Http2Refusal) -> None:
        data = bytes(self._in)
        self._in.clear()
        answer = refusal.feed(data)
        if answer:
            self.send(answer)
        self._close_after = refusal.done

    def send(self, data: bytes, more: Sequence[bytes] = ()) -> None:
        """Queue bytes for the end of this turn."""
        if self.closed:
            return
        if self.pending > OUTPUT_BYTES_MAX:
            self.close()
            return
        size = len(data)
        self._out.append(data)
        if more:
            self._out += more
            size += sum(map(len, more))
        self.pending += size
        if self._events & selectors.EVENT_WRITE:
            self._service.held.hold(self, size)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._dirty:
            self._dirty = True
            self._service.flush_soon(self.flush)

    def finish(self, data: bytes, keep_alive: bool, more: Sequence[bytes] = ()) -> None:
        """Queue the end of a reply and go on with the next request, or close.

        Does nothing if no reply is due: a handler that failed has been answered for already.
        """
        if self.closed or not self.busy:
            return
        self.busy = self.streaming = False
        self.on_close = self.on_drain = None
        if data and not self._out and not more:     # a hot path: what send() does
            self._out.append(data)
            self.pending = len(data)
            if not self._dirty:
                self._dirty = True
                self._service.flush_soon(self.flush)
        elif data:
            self.send(data, more)
        if not keep_alive or self._eof and not self._in:
            self._close_after = True
        elif self._in:
            self._line_up()
        elif not self._events & selectors.EVENT_READ and not self.closed:
            self._watch(self._events | selectors.EVENT_READ)

    def flush(self) -> None:
        """Send what is queued, in one call; what the socket does not take waits for it."""
        self._dirty = False
        if self.closed:
            return
        if self._out:
            try:
                sent = self._sock.send(self._out[0]) if len(self._out) == 1 else self._send_many()
            except BlockingIOError:
                sent = 0
            except OSError:
                self.close()
                return
            self._service.sent_bytes += sent
            self.pending -= sent
            if self.pending:
                self._drop_sent(sent)
                self._service.watch_unread(self, sent)
                grown = 0 if self._events & selectors.EVENT_WRITE else self.pending
                self._service.held.hold(self, grown, moved=sent > 0)
            else:
                self._out = []
        if self._out:
            self._watch(self._events | selectors.EVENT_WRITE)
        elif self._close_after:
            self._drain()
        elif self._events & selectors.EVENT_WRITE:
            self._watch(self._events & ~selectors.EVENT_WRITE)
            self._service.unread.pop(self, None)
        if self._in and not self.busy and self.pending <= OUTPUT_PAUSE_BYTES:
            self._line_up()
        if self.on_drain is not None and not self._out:
            on_drain, self.on_drain = self.on_drain, None
            on_drain()

    def _send_many(self) -> int:
        """Send in one call; return how many bytes the socket took.  Large pieces are not copied:
        256 KB take 40 us less."""
        out = self._out
        if self._service.tls is not None:  # it knows no sendmsg(), and wants the same again
            size, count = len(out[0]), 1    # after it was blocked, or more that begins so
            while count < len(out) and size + len(out[count]) <= OUTPUT_JOIN_BYTES_MAX:
                size += len(out[count])
                count += 1
            if count > 1:
                out[:count] = [b"".join(out[:count])]
            return self._sock.send(out[0])
        if self.pending <= OUTPUT_JOIN_BYTES_MAX:
            return self._sock.send(b"".join(out))
        return self._sock.sendmsg(out[:OUTPUT_PIECES_MAX])

    def pieces(self) -> Iterator[Union[bytes, bytearray]]:
        """What it holds; a piece may be of several connections at a time."""
        for piece in (*self._out, self._in, *self._body):
            if piece:
                yield cast(bytes, piece.obj) if isinstance(piece, memoryview) else piece

    def _drop_sent(self, sent: int) -> None:
        """Forget what the socket has taken; more is left."""
        first = 0
        while sent >= len(self._out[first]):
            sent -= len(self._out[first])
            first += 1
        del self._out[:first]
        if sent:
            self._out[0] = memoryview(self._out[0])[sent:]      # no copy of the rest

    def _resume(self) -> None:
        """Go on with input that waited for its turn, or for room in the output."""
        self._in_line = False
        if self.closed or self.busy or self._close_after or self.pending > OUTPUT_PAUSE_BYTES:
            return
        if not self._eof:
            self._watch(self._events | selectors.EVENT_READ)
        self._process()

    def _drain(self) -> None:
        """Say goodbye, then read what the client still sends: a reset would destroy the reply."""
        if self._draining:
            return
        self._draining = True
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._in.clear()
        self._watch(selectors.EVENT_READ)
        self._goodbye = self.reactor.call_later(DRAIN_SECONDS, self.close)

    def _watch(self, events: int) -> None:
        if events == self._events:
            return
        callback = self._receive if events == selectors.EVENT_READ else self._on_event
        if not self._events:
            self._register(events, callback)
        elif events:
            self.reactor.modify(self._sock, events, callback)
        else:
            self.reactor.unregister(self._sock)
        self._events = events

    def close(self) -> None:
        """Drop the socket; a waiting request's on_close is called."""
        if self.closed:
            return
        self.closed = True
        if self._events:
            self.reactor.unregister(self._sock)
        self._sock.close()
        self._out = []
        self._in.clear()
        self._refuse_body()
        self.on_drain = None
        if self._goodbye is not None:
            self._goodbye.cancel()
        self._service.forget(self)
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()


def _write_all(file: IO[bytes], pieces: Iterable[bytes]) -> bool:
    """Append to a file; False if the disk does not take it."""
    try:
        file.writelines(pieces)
    except OSError:
        return False
    return True
