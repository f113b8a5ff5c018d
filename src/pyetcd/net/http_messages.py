"""HTTP messages: heads and bodies, from any bytes."""

from __future__ import annotations

import functools
import re
import struct
from typing import Any, Dict, Generator, Iterable, Iterator, List, Optional, Tuple, Union

from ..base.limits import (
    HEADER_LINES_MAX,
    REQUEST_HEAD_BYTES_MAX,
    REQUEST_LINE_BYTES_MAX,
    SHORT_HEADER_BYTES_MAX,
)
from ..base.text import text_of, unquote


class BadRequest(ValueError):
    """A message that is not HTTP; the answer has this status, and the text for its body."""

    def __init__(self, text: str = "400 Bad Request", status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class Http2Preface(BadRequest):
    """The connection begins with the preface of HTTP/2: most likely a gRPC client."""


class HttpHead:
    """The parsed request line and headers, shared by all requests with the same head bytes."""

    __slots__ = (
        "method", "target", "path", "query", "headers", "minor", "keep_alive", "body_size",
        "chunked", "expects", "is_simple", "takes_raw", "parsed",
    )

    def __init__(self, method: str, target: str, minor: int, headers: Dict[str, str]) -> None:
        self.method = method
        self.target = target
        self.minor = minor
        self.headers = headers
        raw_path, _, self.query = target.partition("?")
        try:
            self.path = text_of(unquote(raw_path.encode("latin-1")))
        except ValueError:
            raise BadRequest() from None
        connection = _list_header(headers, "connection") if "connection" in headers else ()
        self.keep_alive = "close" not in connection and bool(minor or "keep-alive" in connection)
        self.chunked = _is_chunked(headers, minor)
        self.body_size = _content_length(headers)
        self.expects = headers.get("expect", "").lower() == "100-continue"
        self.is_simple = not (self.chunked or self.expects) and self.body_size < 1 << 16
        self.takes_raw = self.keep_alive and minor == 1 and method != "HEAD"
        self.parsed: Any = None         # parameters that a handler has derived from them


_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_REQUEST_LINE = re.compile(rb"(%b+) ([^\x00-\x20\x7f]+) HTTP/(\d)\.(\d)" % _TOKEN)
_REQUEST_START = re.compile(rb"%b{1,32}( |\Z)" % _TOKEN)
_HEADER = re.compile(rb"(%b+):([^\x00\r\n]*)" % _TOKEN)


def _list_header(headers: Dict[str, str], name: str) -> List[str]:
    """Return the elements of a list header in lower case; [] without that header."""
    text = headers.get(name, "")
    if len(text) > SHORT_HEADER_BYTES_MAX:
        raise BadRequest("431 Request Header Fields Too Large", 431)
    return [part.strip().lower() for part in text.split(",")] if text else []


def _is_chunked(headers: Dict[str, str], minor: int) -> bool:
    coding = headers.get("transfer-encoding")
    if coding is None:
        return False
    if "content-length" in headers:     # two lengths: request smuggling (RFC 9112 §6.1)
        raise BadRequest()
    if coding.lower() != "chunked" or minor == 0:
        raise BadRequest("501 Not Implemented: unsupported transfer encoding", 501)
    return True


def _content_length(headers: Dict[str, str]) -> int:
    if "content-length" not in headers:
        return 0
    length = headers["content-length"]
    if "," in length:
        lengths = set(_list_header(headers, "content-length"))
        length = lengths.pop() if len(lengths) == 1 else ""
    if not (length.isascii() and length.isdigit()) or len(length) > 18:
        raise BadRequest()
    return int(length)


def _parse_header_line(line: bytes) -> Tuple[str, str]:
    match = _HEADER.fullmatch(line)
    if match is None:
        raise BadRequest()
    return match[1].decode("ascii").lower(), match[2].strip(b" \t").decode("latin-1")


_parse_usual_line = functools.lru_cache(maxsize=1_024)(_parse_header_line)


def parse_header_lines(lines: Iterable[bytes]) -> Dict[str, str]:
    """Return lower-case name -> value; repeated headers are joined by a comma.

    Raises BadRequest for a line that is not `token: value` (no folding, RFC 9112 §5), and for
    two Hosts: a proxy before this server may have routed by the other one (§3.2).
    """
    headers: Dict[str, str] = {}
    repeated: Dict[str, List[str]] = {}
    for line in lines:
        name, value = _parse_usual_line(line) if len(line) <= 256 else _parse_header_line(line)
        if name in headers:
            repeated.setdefault(name, [headers[name]]).append(value)
        else:
            headers[name] = value
    if "host" in repeated:
        raise BadRequest("400 Bad Request: too many Host headers")
    for name, values in repeated.items():
        headers[name] = ",".join(values)
    return headers


def check_start(data: Union[bytes, bytearray]) -> None:
    """Raise BadRequest if no request line begins with `data`."""
    line = data[:64].lstrip(b"\r\n")
    if line and not _REQUEST_START.match(line):
        raise BadRequest()


class HeadFinder:
    """Finds the end of a head in a growing buffer, in linear time.

    Lines may end without CR, as those of simple health checks do (RFC 9112 §2.2).
    """

    __slots__ = ("_seen", "_has_line")

    def __init__(self) -> None:
        self._seen = 0                  # bytes in which no head ends
        self._has_line = False          # a request line that is not too long is among them

    def find(self, data: bytearray) -> Optional[Tuple[int, int]]:
        """Return the end of the head and the start of the body in `data`; None: not complete.

        Raises BadRequest if the head is too long.  After a result the search begins again.
        """
        start = max(self._seen - 2, 0)
        end, blank = data.find(b"\n\r\n", start), 3
        bare = data.find(b"\n\n", start, len(data) if end < 0 else end + 1)
        if bare >= 0:
            end, blank = bare, 2
        size = len(data) if end < 0 else end
        if size > REQUEST_LINE_BYTES_MAX and not self._has_line:
            self._has_line = data.find(b"\n", 2, REQUEST_LINE_BYTES_MAX + 2) >= 0
            if not self._has_line:
                raise BadRequest("414 Request-URI Too Long", 414)
        if size > REQUEST_HEAD_BYTES_MAX:
            raise BadRequest("431 Request Header Fields Too Large", 431)
        if end < 0:
            self._seen = size
            return None
        self._seen, self._has_line = 0, False
        return end - (data[end - 1:end] == b"\r"), end + blank


def _lines_of(raw: bytes) -> List[bytes]:
    """Return the lines of a head, whose line ends have a CR or not."""
    lines = raw.split(b"\r\n")
    if len(lines) > raw.count(b"\n"):
        return lines                    # all have one
    *lines, last = raw.split(b"\n")
    return [*(line[:-1] if line.endswith(b"\r") else line for line in lines), last]


def parse_head(raw: bytes) -> HttpHead:
    """Parse the head of a request, without its final empty line.  Raises BadRequest."""
    lines = _lines_of(raw)
    match = _REQUEST_LINE.fullmatch(lines[0])
    if match is None:
        raise BadRequest()
    if len(lines) > HEADER_LINES_MAX:
        raise BadRequest("431 Request Header Fields Too Large", 431)
    if len(lines[0]) > REQUEST_LINE_BYTES_MAX:
        raise BadRequest("414 Request-URI Too Long", 414)
    method, target, major, minor = match.groups()
    if major != b"1" or minor not in (b"0", b"1"):
        if raw == b"PRI * HTTP/2.0":
            raise Http2Preface()
        raise BadRequest("505 HTTP Version Not Supported: unsupported protocol version", 505)
    headers = parse_header_lines(lines[1:])
    if minor == b"1" and "host" not in headers:
        raise BadRequest("400 Bad Request: missing required Host header")
    text = target.decode("latin-1")
    if text.startswith(("http://", "https://")):    # absolute-form, as sent to a proxy
        text = "/" + text.split("//", 1)[1].partition("/")[2]
    if not text.startswith("/") and text != "*":
        raise BadRequest()
    return HttpHead(method.decode("ascii"), text, int(minor), headers)


def parse_answer_head(raw: bytes) -> Tuple[int, Dict[str, str]]:
    """Return (status, headers) of an answer's head without its empty line.  Raises BadRequest."""
    if raw.count(b"\n") > HEADER_LINES_MAX:
        raise BadRequest("head too large")
    lines = _lines_of(raw)
    match = _STATUS_LINE.match(lines[0])
    if match is None:
        raise BadRequest("no status line")
    return int(match.group(1)), parse_header_lines(lines[1:])


_STATUS_LINE = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9]{2})(?: |\Z)")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
_CHUNK_SIZE_BYTES_MAX = 4_096       # of a chunk's size line with its extensions; above: refused


class ChunkedDecoder:
    """Chunked transfer coding, fed piecewise (RFC 9112 §7.1)."""

    __slots__ = ("done", "chunks", "rest", "_left", "_trailers")

    def __init__(self) -> None:
        self.done = False               # the last chunk and the trailers are read
        self.chunks = 0                 # begun so far
        self.rest = bytearray()         # input not decoded yet; when done: behind the body
        self._left = 0                  # bytes left of the chunk and its CRLF; 0: size line next
        self._trailers: Optional[HeadFinder] = None     # looks for their end, after the last chunk

    def feed(self, data: bytes) -> bytes:
        """Return the next bytes of the body.  Raises BadRequest."""
        buffer, body, at = self.rest, [], 0
        if not buffer and not self._left and self._trailers is None:
            line = _CHUNK_SIZE.match(data, 0, _CHUNK_SIZE_BYTES_MAX)
            if line is not None:
                start, size = line.end(), int(line[1], 16)
                if size and len(data) == start + size + 2 and data.endswith(b"\r\n"):
                    self.chunks += 1
                    return data[start:-2]       # one chunk, as a peer sends its messages
        buffer += data
        while self._trailers is None and at < len(buffer):
            if not self._left:
                size_line = self._size_line(at)
                if not size_line:
                    break
                at += size_line
            if self._left > 2:
                piece = buffer[at:at + self._left - 2]
                body.append(piece)
                at += len(piece)
                self._left -= len(piece)
            if 0 < self._left <= 2:
                end = buffer[at:at + self._left]
                if end != b"\r\n"[2 - self._left:][:len(end)]:
                    raise BadRequest()
                at += len(end)
                self._left -= len(end)
        del buffer[:at]
        if self._trailers is not None and not self.done:
            self._skip_trailers(self._trailers)
        return b"".join(body)

    def _size_line(self, at: int) -> int:
        """Begin the chunk whose size line is at `at`; return the line's length, 0: incomplete."""
        line = _CHUNK_SIZE.match(self.rest, at, at + _CHUNK_SIZE_BYTES_MAX)
        if line is None:
            until = at + _CHUNK_SIZE_BYTES_MAX
            if self.rest.find(b"\n", at, until) >= 0 or len(self.rest) >= until:
                raise BadRequest()
            return 0
        size = int(line.group(1), 16)
        if not size:
            self._trailers = HeadFinder()
            return line.end() - at - 2      # its CRLF may be the first half of the end
        self._left = size + 2
        self.chunks += 1
        return line.end() - at

    def _skip_trailers(self, finder: HeadFinder) -> None:
        found = finder.find(self.rest)
        if found is None:
            return
        end, stop = found
        trailers = bytes(self.rest[:end])
        if stop - end != 4 or trailers.count(b"\n") > HEADER_LINES_MAX:
            raise BadRequest()
        parse_header_lines(trailers.split(b"\r\n")[1:])
        del self.rest[:stop]
        self.done = True


class StreamParser:
    """Feeds a stream, which arrives in any pieces, to a parser.

    parser  a generator, which yields how many bytes to send it next, and items between
    """

    def __init__(self, parser: Generator[Any, bytes, None]) -> None:
        self._parser = parser
        self._need: int = next(parser)
        self._partial = bytearray()     # received, but less than _need

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yield the items in `data`; exhaust it before more data.  A parser's error is final."""
        if self._partial:
            self._partial += data
            if len(self._partial) < self._need:
                return
            data = bytes(self._partial)
        at, until, end = 0, self._need, len(data)
        while until <= end:
            found = self._parser.send(data[at:until])
            while not isinstance(found, int):
                yield found
                found = next(self._parser)
            at, until = until, until + found
        self._need = until - at
        if at < end or self._partial:
            self._partial = bytearray(data[at:])


_HTTP2_FRAME_BYTES_MAX = 1 << 14    # the protocol's default; above: GOAWAY
_HEADERS, _SETTINGS, _PING, _GOAWAY = 1, 4, 6, 7


def http2_refusal(sentence: bytes) -> Generator[Union[int, bytes], bytes, None]:
    """Speak as much HTTP/2 as it takes to answer one request of a gRPC client with a sentence.

    The answer is an error of gRPC, which the client shows to its user; then GOAWAY asks for
    HTTP/1.1.  GOAWAY alone would be a failed connection that the client retries in silence.
    Yields what to send, and at the end b"".
    Source: RFC 9113; RFC 7541 §6; the gRPC documents, "gRPC over HTTP2".
    """
    is_http2 = (yield 6) == b"SM\r\n\r\n"      # follows the empty line of `PRI * HTTP/2.0`
    yield _http2_frame(_SETTINGS, 0, 0)
    last_stream = 0
    while is_http2:
        head = yield 9
        kind, flags, stream = struct.unpack_from(">BBI", head, 3)
        size = int.from_bytes(head[:3], "big")
        if size > _HTTP2_FRAME_BYTES_MAX:
            break
        payload = yield size
        if kind == _HEADERS:            # the answer: `:status 200` and, as trailers, error 12
            last_stream = stream & 0x7FFF_FFFF
            yield _http2_frame(kind, 0x4 | 0x1, last_stream, (      # END_HEADERS | END_STREAM
                b"\x88\0\x0ccontent-type\x10application/grpc\0\x0bgrpc-status\x0212"
                b"\0\x0cgrpc-message%c%b" % (len(sentence), sentence)
            ))
        if kind in (_HEADERS, _GOAWAY):
            break
        if kind in (_SETTINGS, _PING) and not flags & 1:        # 1: acknowledgement
            yield _http2_frame(kind, 1, 0, payload if kind == _PING else b"")
    http_1_1_required = 0xD
    yield _http2_frame(_GOAWAY, 0, 0, struct.pack(">II", last_stream, http_1_1_required) + sentence)
    yield b""


def _http2_frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
