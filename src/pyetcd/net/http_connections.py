"""Connections: bytes in, requests out, replies in order."""

from __future__ import annotations

import math
import selectors
import socket
from typing import IO, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union, cast

from ..base.errors import InvariantError
from ..base.ids import package_logger
from ..base.limits import (
    CHUNKED_SLICE_BYTES,
    CHUNKS_MAX,
    HEAD_CACHE_BYTES_MAX,
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
from .budgets import BufferBudget
from .http_messages import (
    BadRequest,
    ChunkedDecoder,
    HeadFinder,
    Http2Preface,
    HttpHead,
    StreamParser,
    check_start,
    http2_refusal,
    parse_head,
)
from .http_requests import _STATUS_LINES, Handler, HttpRequest, closing_head
from .reactor import Reactor
from .tls import TlsContext
from .workers import Timer

DRAIN_SECONDS = 2.0                 # until a client has closed its end too; above: closed


class Service:
    """The handler, the limits and the state that the connections of a listener share."""

    def __init__(
        self, reactor: Reactor, handler: Handler, body_max: int, tls: Optional[TlsContext],
        budget: Optional[BufferBudget], *, patient: bool,
    ) -> None:
        self.reactor = reactor
        self.handler = handler          # gets every complete request
        self.body_max = body_max        # bytes of a body; a longer one arrives as body_too_large
        self.tls = tls
        self.budget = budget or BufferBudget(reactor)
        # Connections of clients, which share a part of each turn; members never wait for them.
        self.patient = patient
        self.flush_soon = reactor.flush_in_turn if patient else reactor.flush_soon
        self.body_limit: Callable[[HttpHead], int] = lambda head: self.body_max     # by its head
        # Bytes of a body in memory; a longer one goes to the file that open_spool(first bytes)
        # returns, and is too large without one.
        self.memory_max: float = math.inf
        self.open_spool: Callable[[bytes], Optional[IO[bytes]]] = lambda first: None
        self.held_max: float = math.inf     # bytes of all incomplete bodies in memory
        self.held_bytes = 0             # of bodies under way
        self.heads: Dict[bytes, HttpHead] = {}
        self.received_bytes = self.sent_bytes = 0   # of all connections so far
        self.unread: Dict[Connection, Tuple[float, int]] = {}   # since when; taken since then
        self.partial: Dict[Connection, float] = {}      # start of their incomplete requests
        self._connections: Set[Connection] = set()

    def serve(self, sock: socket.socket, remote: str) -> Connection:
        """Serve HTTP on an accepted socket, after its TLS handshake."""
        connection = Connection(self, sock, remote)
        self._connections.add(connection)
        return connection

    def dispatch(self, request: HttpRequest) -> None:
        """Hand a request to the handler; a bug there costs this request, not the member.

        Requests only read state or propose, so a failure leaves nothing half done.  Applying
        entries of the log has no such protection.
        """
        try:
            self.handler(request)
        except InvariantError:
            raise
        except Exception:
            package_logger("http").exception("bug: %s %s", request.method, request.target[:200])
            if request.connection.streaming:
                request.connection.close()      # its reply cannot be completed
                return
            request.head = closing_head(request.head)      # no second reply: see finish()
            request.reply(500, b'{"message":"Internal Server Error"}')

    def watch_partial(self, connection: Connection, partial: bool, *, begun: bool) -> None:
        """Note the start of an incomplete request.  begun: a new one has begun."""
        if not partial:
            self.partial.pop(connection, None)
        elif begun or connection not in self.partial:
            self.partial[connection] = self.reactor.now()

    def watch_unread(self, connection: Connection, taken: int) -> None:
        """Note since when a client reads too slowly.  taken: bytes by this send."""
        since, before = self.unread.get(connection, (0.0, UNREAD_BYTES_MIN))
        taken += before
        is_enough = taken >= UNREAD_BYTES_MIN
        self.unread[connection] = (self.reactor.now(), 0) if is_enough else (since, taken)

    def forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self.partial.pop(connection, None)
        self.unread.pop(connection, None)
        self.budget.forget(connection)

    def close_slow(self) -> None:
        """Close connections with a request or a reply that takes too long."""
        now = self.reactor.now()
        for connection, since in list(self.partial.items()):
            if since < now - REQUEST_SECONDS_MAX:
                connection.refuse(BadRequest("408 Request Timeout", 408))
        for connection, (since, _) in list(self.unread.items()):
            if since < now - UNREAD_SECONDS_MAX:
                connection.close()


def _parse_new_head(raw: bytes, heads: Dict[bytes, HttpHead]) -> HttpHead:
    """Parse a head that is not in `heads`, and remember it there if it is short."""
    head = parse_head(raw)
    if len(raw) <= HEAD_CACHE_BYTES_MAX:
        if len(heads) >= HEAD_CACHE_MAX:
            heads.clear()
        heads[raw] = head
    return head


class Connection:
    """One accepted socket: bytes in, requests out, one at a time and in order."""

    __slots__ = (
        "reactor", "remote", "on_close", "on_drain", "streaming", "pending", "busy", "closed",
        "_service", "_sock", "_in", "_finder", "_head", "_chunks", "_body", "_body_bytes",
        "_body_max", "_file", "_out", "_dirty", "_events", "_close_after", "_eof", "_in_line",
        "_http2", "_drain_timer",
    )

    def __init__(self, service: Service, sock: socket.socket, remote: str) -> None:
        self.reactor = service.reactor
        self.remote = remote
        self.on_close: Optional[Callable[[], None]] = None
        self.on_drain: Optional[Callable[[], None]] = None      # once, when nothing is pending
        self.streaming = False
        self.pending = 0                # bytes in _out
        self.busy = False               # the reply to a request is not complete
        self.closed = False
        self._service = service
        self._sock = sock
        self._in = bytearray()          # received, not yet parsed
        self._finder = HeadFinder()     # of the next head in _in
        self._head: Optional[HttpHead] = None       # parsed, its body still incomplete
        self._chunks: Optional[ChunkedDecoder] = None
        self._body: List[bytes] = []    # pieces of a chunked or large body
        self._body_bytes = 0            # in them, or in _file
        self._body_max = 0              # limit for the request under way
        self._file: Optional[IO[bytes]] = None      # instead of _body
        self._out: List[Union[bytes, memoryview]] = []
        self._dirty = False
        self._events = 0                # that the reactor waits for
        self._close_after = False       # close when _out is sent
        self._eof = False               # the client will send no more
        self._in_line = False           # _resume() is queued behind other connections
        self._http2: Optional[StreamParser] = None
        self._drain_timer: Optional[Timer] = None   # set: the reply is sent, and input thrown away
        self._watch(selectors.EVENT_READ)

    @property
    def scheme(self) -> str:
        return "https" if self._service.tls else "http"

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
        if self._drain_timer:
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
                self._service.budget.grow(self, len(data))

    def _end_of_input(self) -> None:
        """Serve the remaining requests of a client that sends no more; end its streams."""
        self._eof = True
        if self.busy and self.streaming:
            self.close()
        elif self.busy or self._in_line or self._out:
            self._watch(self._events & ~selectors.EVENT_READ)
            # Requests that wait for room in the output are served later.
            waits = self.busy or self._in_line or self.pending > OUTPUT_PAUSE_BYTES and self._in
            self._close_after = self._close_after or not waits
        else:
            self.close()

    def _process(self) -> None:
        """Serve the next request if it is complete; finish() goes on with those behind it."""
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
        if partial or self._service.partial:
            self._service.watch_partial(self, partial, begun=served)
        if self._eof and not (self.busy or self._in_line or self._close_after):
            self._close_after = True        # the rest is an incomplete request
            self._flush_soon()

    def _line_up(self) -> None:
        """Parse the rest of _in after all other connections: one request of each in turn."""
        if not self._in_line:
            self._in_line = True
            self.reactor.call_in_turn(self._resume)

    def _whole_request(self, data: bytes) -> Optional[HttpRequest]:
        """Return the request if `data` is exactly one, and a simple one.  A hot path."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return None
        service, raw = self._service, data[:end]
        head = service.heads.get(raw)
        if head is None:
            if end > HEAD_CACHE_BYTES_MAX or raw.count(b"\n") != raw.count(b"\r\n"):
                return None             # it may end earlier
            try:
                head = _parse_new_head(raw, service.heads)
            except BadRequest:
                return None             # again in _process(), which answers
        size = head.body_size
        if not head.is_simple or len(data) != end + 4 + size:
            return None
        if size and size > service.body_limit(head):
            return None
        return HttpRequest(head, data[end + 4:], self)

    def _next_request(self) -> Optional[HttpRequest]:
        head = self._head or self._take_head()
        if head is None:
            return None
        if not head.body_size and not head.chunked:
            self._head = None
            return HttpRequest(head, b"", self)
        body = self._take_chunked() if head.chunked else self._take_sized(head.body_size)
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
            check_start(self._in)       # refuse at once instead of waiting for an end
            return None
        end, stop = found
        raw = bytes(self._in[:end])
        del self._in[:stop]
        heads = self._service.heads
        self._head = head = heads.get(raw) or _parse_new_head(raw, heads)
        if head.chunked or head.body_size:
            self._body_max = self._service.body_limit(head)
        if head.expects and (head.chunked or head.body_size > len(self._in)):
            if head.body_size <= self._body_max:
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return head

    def _take_sized(self, size: int) -> Optional[bytes]:
        """Return the body; None: incomplete, or too large and then _head is cleared."""
        if size <= self._body_max:
            if not self._body_bytes and len(self._in) >= size:
                body = bytes(self._in[:size])
                del self._in[:size]
                return body
            if size <= 1 << 16:
                return None
        left = size - self._body_bytes      # to a list: appending to bytes would copy them
        piece = bytes(self._in[:left])
        del self._in[:left]
        return self._add(piece, fits=size <= self._body_max, is_last=len(piece) == left)

    def _take_chunked(self) -> Optional[bytes]:
        decoder = self._chunks = self._chunks or ChunkedDecoder()
        data = bytes(self._in[:CHUNKED_SLICE_BYTES])
        del self._in[:CHUNKED_SLICE_BYTES]
        piece = decoder.feed(data)
        if decoder.done:
            self._in[:0] = decoder.rest
            self._chunks = None
        elif self._in:
            self._line_up()
        return self._add(piece, fits=decoder.chunks <= CHUNKS_MAX, is_last=decoder.done)

    def _add(self, piece: bytes, *, fits: bool, is_last: bool) -> Optional[bytes]:
        """Keep a piece of a body, and return all of it behind the last; not fits: refuse it."""
        if not fits or piece and not self._keep(piece) or self._body_bytes > self._body_max:
            self._refuse_body()
            return None
        return self._join() if is_last else None

    def _keep(self, piece: bytes) -> bool:
        """Keep a piece of a body in memory, or all of it in a file; False: there is no room."""
        service = self._service
        self._body.append(piece)
        self._body_bytes += len(piece)
        service.held_bytes += len(piece)
        if self._file is None:
            if self._body_bytes <= service.memory_max:
                return service.held_bytes <= service.held_max
            first = b"".join([piece[:16] for piece in self._body[:16]])
            self._file = service.open_spool(first[:16])
            if self._file is None:
                return False
        try:
            self._file.writelines(self._body)
        except OSError:
            return False
        service.held_bytes -= sum(map(len, self._body))
        self._body = []
        return True

    def _join(self) -> bytes:
        data = b"".join(self._body)
        self._service.held_bytes -= len(data)
        self._body, self._body_bytes = [], 0
        return data

    def _refuse_body(self) -> None:
        """Drop the body: its request is answered at once."""
        self._head = self._chunks = self._file = None
        self._join()

    def refuse(self, error: BadRequest) -> None:
        """Answer a message that is not HTTP, and close."""
        if isinstance(error, Http2Preface):
            self._http2 = StreamParser(http2_refusal(V3_REFUSAL.encode("ascii")))
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

    def _refuse_http2(self, refusal: StreamParser) -> None:
        data = bytes(self._in)
        self._in.clear()
        answers: List[bytes] = []
        for answer in () if self._close_after else refusal.feed(data):
            answers.append(answer)
            if not answer:
                self._close_after = True
                break
        if answers:                     # one piece: a flood of pings would leave 100,000
            self.send(b"".join(answers))

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
            self._service.budget.grow(self, size)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._dirty:
            self._dirty = True
            self._service.flush_soon(self.flush)

    def finish(self, data: bytes, keep_alive: bool, more: Sequence[bytes] = ()) -> None:
        """Queue the end of a reply and go on with the next request, or close."""
        if self.closed or not self.busy:    # not busy: dispatch() replied for a failed handler
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
            self._flush_soon()
        elif self._in:
            self._line_up()
        elif not self._events & selectors.EVENT_READ and not self.closed:
            self._watch(self._events | selectors.EVENT_READ)

    def flush(self) -> None:
        """Send the queued bytes in one call; the rest waits until the socket takes more."""
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
                self._service.budget.grow(self, grown, moved=sent > 0)
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
        """Send in one call, large pieces uncopied (256 KB: 40 us less); return the bytes taken."""
        out = self._out
        # TLS has no sendmsg(), and a blocked send must be repeated with the same first bytes.
        if self._service.tls is not None:
            size, count = len(out[0]), 1
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
        """Yield the buffers in memory; several connections may share one."""
        for piece in (*self._out, self._in, *self._body):
            if piece:
                yield cast(bytes, piece.obj) if isinstance(piece, memoryview) else piece

    def _drop_sent(self, sent: int) -> None:
        """Remove the bytes that the socket has taken; more are left."""
        first = 0
        while sent >= len(self._out[first]):
            sent -= len(self._out[first])
            first += 1
        del self._out[:first]
        if sent:
            self._out[0] = memoryview(self._out[0])[sent:]      # no copy of the rest

    def _resume(self) -> None:
        """Go on with input that waited for other connections, or for room in the output."""
        self._in_line = False
        if self.closed or self.busy or self._close_after or self.pending > OUTPUT_PAUSE_BYTES:
            return
        if not self._eof:
            self._watch(self._events | selectors.EVENT_READ)
        self._process()

    def _drain(self) -> None:
        """End the output, then read until the client closes: a reset would destroy the reply."""
        if self._drain_timer:
            return
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._in.clear()
        self._watch(selectors.EVENT_READ)
        self._drain_timer = self.reactor.call_later(DRAIN_SECONDS, self.close)

    def _watch(self, events: int) -> None:
        if events == self._events:
            return
        callback = self._receive if events == selectors.EVENT_READ else self._on_event
        if not self._events:
            self.reactor.register(self._sock, events, callback, patient=self._service.patient)
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
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        self._service.forget(self)
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()
