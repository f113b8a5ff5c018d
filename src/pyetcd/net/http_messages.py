"""HTTP messages: heads and bodies, from any bytes."""

from __future__ import annotations

import re
import struct
from typing import Any, Dict, Iterable, List, Optional, Tuple, Union

from ..base.limits import (
    HEADER_LINES_MAX,
    REQUEST_HEAD_BYTES_MAX,
    REQUEST_LINE_BYTES_MAX,
    SHORT_HEADER_BYTES_MAX,
)
from ..base.text import text_of, unquote


class BadRequest(ValueError):
    """A request that is not HTTP; the text is the body of the answer, status says which."""

    def __init__(self, text: str = "400 Bad Request", status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class Http2Knock(BadRequest):
    """The client speaks HTTP/2 without having asked whether we do: a gRPC client, most likely."""


class HttpHead:
    """The parsed request line and headers.  Shared by all requests with the same head bytes:
    `parsed` is where a handler may keep what it derived from them."""

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
        connection = _list_header(headers, "connection")
        self.keep_alive = "close" not in connection and bool(minor or "keep-alive" in connection)
        self.chunked = _is_chunked(headers, minor)
        self.body_size = _content_length(headers)
        self.expects = headers.get("expect", "").lower() == "100-continue"
        self.is_simple = not (self.chunked or self.expects) and self.body_size < 1 << 16
        self.takes_raw = self.keep_alive and minor == 1 and method != "HEAD"
        self.parsed: Any = None


_REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([^\x00-\x20\x7f]+) HTTP/(\d)\.(\d)")
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([^\x00\r\n]*)")


def _list_header(headers: Dict[str, str], name: str) -> List[str]:
    """Return the elements of a header that is a list, in lower case; [] if it is absent."""
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
    lengths = set(_list_header(headers, "content-length")) or {""}
    length = lengths.pop()
    if lengths or not (length.isascii() and length.isdigit()) or len(length) > 18:
        raise BadRequest()
    return int(length)


def parse_header_lines(lines: Iterable[bytes]) -> Dict[str, str]:
    """Return lower-case name -> value; repeated headers are joined by a comma.

    Raises BadRequest for anything else than `token: value` (no folding, RFC 9112 §5), and for
    two Hosts: a proxy before us may have looked at the other one (§3.2).
    """
    headers: Dict[str, str] = {}
    repeated: Dict[str, List[str]] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None:
            raise BadRequest()
        name = match.group(1).decode("ascii").lower()
        value = match.group(2).strip(b" \t").decode("latin-1")
        if name in headers:
            repeated.setdefault(name, [headers[name]]).append(value)
        else:
            headers[name] = value
    if "host" in repeated:
        raise BadRequest("400 Bad Request: too many Host headers")
    for name, values in repeated.items():
        headers[name] = ",".join(values)
    return headers


_REQUEST_START = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}( |\Z)")


def check_start(data: Union[bytes, bytearray]) -> None:
    """Raise BadRequest if no head can begin like this, however it goes on."""
    line = data[:64].lstrip(b"\r\n")
    if line and not _REQUEST_START.match(line):
        raise BadRequest()


class HeadFinder:
    """Finds the end of a head in a buffer that grows, and looks at no byte of it twice.

    Lines may end without CR, as those of simple health checks do (RFC 9112 §2.2).
    """

    __slots__ = ("_seen", "_has_line")

    def __init__(self) -> None:
        self._seen = 0                  # bytes in which no head ends
        self._has_line = False          # a request line that is not too long is among them

    def find(self, data: bytearray) -> Optional[Tuple[int, int]]:
        """Return the end of the head in `data`, and where what follows it begins; None: not yet.

        Raises BadRequest if the head is too long.  After a result, the next head is looked for.
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
    """Return the lines of a head, with or without CR at their ends; the last one has none."""
    *lines, last = raw.split(b"\n")
    return [*(line[:-1] if line.endswith(b"\r") else line for line in lines), last]


def parse_head(raw: bytes) -> HttpHead:
    """Parse a request's head without its final empty line.  Raises BadRequest."""
    check_start(raw)
    if raw.count(b"\n") >= HEADER_LINES_MAX:
        raise BadRequest("431 Request Header Fields Too Large", 431)
    lines = _lines_of(raw)
    if len(lines[0]) > REQUEST_LINE_BYTES_MAX:
        raise BadRequest("414 Request-URI Too Long", 414)
    match = _REQUEST_LINE.fullmatch(lines[0])
    if match is None:
        raise BadRequest()
    method, target, major, minor = match.groups()
    if major != b"1" or minor not in (b"0", b"1"):
        if raw == b"PRI * HTTP/2.0":
            raise Http2Knock()
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
    """Parse an answer's head without its final empty line: status, headers.  Raises BadRequest."""
    if raw.count(b"\n") > HEADER_LINES_MAX:
        raise BadRequest("head too large")
    lines = _lines_of(raw)
    match = _STATUS_LINE.match(lines[0])
    if match is None:
        raise BadRequest("no status line")
    return int(match.group(1)), parse_header_lines(lines[1:])


_STATUS_LINE = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9]{2})(?: |\Z)")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
_CHUNK_SIZE_BYTES_MAX = 4_096       # of that line, extensions and all


class ChunkedDecoder:
    """Chunked transfer coding, fed piecewise (RFC 9112 §7.1)."""

    __slots__ = ("done", "chunks", "_buffer", "_left", "_trailers")

    def __init__(self) -> None:
        self.done = False
        self.chunks = 0                 # begun so far
        self._buffer = bytearray()
        self._left = 0                  # bytes left of the chunk and its CRLF; 0: size line next
        self._trailers: Optional[HeadFinder] = None     # looks for their end, after the last chunk

    def feed(self, data: bytes) -> bytes:
        """Return the body bytes now known; after the last chunk `done` is set and the rest of
        the input waits in `rest`.  Raises BadRequest."""
        buffer, body, at = self._buffer, [], 0
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

    @property
    def rest(self) -> bytes:
        """Input behind the end of the body."""
        return bytes(self._buffer)

    def _size_line(self, at: int) -> int:
        """Begin the chunk whose size stands at `at`; return how long that line is, 0: not all."""
        line = _CHUNK_SIZE.match(self._buffer, at, at + _CHUNK_SIZE_BYTES_MAX)
        if line is None:
            until = at + _CHUNK_SIZE_BYTES_MAX
            if self._buffer.find(b"\n", at, until) >= 0 or len(self._buffer) >= until:
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
        """Check them, and forget them."""
        found = finder.find(self._buffer)
        if found is None:
            return
        end, stop = found
        trailers = bytes(self._buffer[:end])
        if stop - end != 4 or trailers.count(b"\n") > HEADER_LINES_MAX:
            raise BadRequest()
        parse_header_lines(trailers.split(b"\r\n")[1:])
        del self._buffer[:stop]
        self.done = True


class Http2Refusal:
    """As much HTTP/2 as it takes to answer one request of a gRPC client with a sentence.

    The answer is an error of gRPC, which its user gets to see; only then GOAWAY asks for
    HTTP/1.1.  Sent alone, that would be one failed connection more to try again, and silence.
    Source: RFC 9113; RFC 7541 §6; the gRPC documents, "gRPC over HTTP2".
    """

    _PREFACE_END = b"SM\r\n\r\n"        # what follows the empty line of `PRI * HTTP/2.0`
    _FRAME_BYTES_MAX = 1 << 14          # nobody may send larger ones unasked; above: the end
    _HEADERS, _SETTINGS, _PING, _GOAWAY = 1, 4, 6, 7
    _UNIMPLEMENTED = b"12"              # a status of gRPC
    _HTTP_1_1_REQUIRED = 0xD

    __slots__ = ("done", "_buffer", "_greeted", "_sentence")

    def __init__(self, sentence: str) -> None:
        self.done = False               # all is said: close
        self._buffer = b""
        self._greeted = False
        self._sentence = sentence.encode("ascii")

    def feed(self, data: bytes) -> bytes:
        """Return what to send, after `data` has come."""
        self._buffer += data
        answers = []
        if not self._greeted and len(self._buffer) >= len(self._PREFACE_END):
            self._greeted = True
            answers.append(self._frame(self._SETTINGS, 0, 0, b""))
            if not self._buffer.startswith(self._PREFACE_END):
                answers.append(self._goodbye(0))
            self._buffer = self._buffer[len(self._PREFACE_END):]
        while self._greeted and not self.done and len(self._buffer) >= 9:
            size = int.from_bytes(self._buffer[:3], "big")
            if size > self._FRAME_BYTES_MAX:
                answers.append(self._goodbye(0))
            elif len(self._buffer) >= 9 + size:
                frame, self._buffer = self._buffer[:9 + size], self._buffer[9 + size:]
                answers.append(self._answer(frame))
            else:
                break
        return b"".join(answers)

    def _answer(self, frame: bytes) -> bytes:
        kind, is_ack = frame[3], frame[4] & 1
        stream = int.from_bytes(frame[5:9], "big") & 0x7FFF_FFFF
        if kind == self._HEADERS:
            return self._refuse(stream) + self._goodbye(stream)
        if kind == self._GOAWAY:
            return self._goodbye(0)
        if kind in (self._SETTINGS, self._PING) and not is_ack:
            return self._frame(kind, 1, 0, frame[9:] if kind == self._PING else b"")
        return b""                      # of a request that is answered, or of no interest

    def _refuse(self, stream: int) -> bytes:
        """Headers that are trailers as well: `:status 200`, as gRPC wants it, and the error."""
        block = b"\x88" + b"".join(
            b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in (
                (b"content-type", b"application/grpc"), (b"grpc-status", self._UNIMPLEMENTED),
                (b"grpc-message", self._sentence),
            )
        )
        return self._frame(self._HEADERS, 0x4 | 0x1, stream, block)    # END_HEADERS, END_STREAM

    def _goodbye(self, last_stream: int) -> bytes:
        self.done = True
        payload = struct.pack(">II", last_stream, self._HTTP_1_1_REQUIRED) + self._sentence
        return self._frame(self._GOAWAY, 0, 0, payload)

    @staticmethod
    def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + struct.pack(
            ">BBI", kind, flags, stream) + payload
