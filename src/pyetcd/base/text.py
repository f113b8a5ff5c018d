"""JSON strings and times as etcd writes them."""

from __future__ import annotations

import binascii
import codecs
import contextlib
import itertools
import json
import re
import socket
import time
from datetime import datetime, timedelta, timezone
from typing import Any, Generator, Iterable, List, Tuple, TypeVar, Union, cast

from .limits import NS

_Result = TypeVar("_Result")


def finish(steps: Generator[None, None, _Result]) -> _Result:
    """Run a generator of steps to its end; return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: _Result = stop.value
            return result


_SURROGATE = re.compile("[\ud800-\udfff]")     # a byte that is not UTF-8, by surrogateescape
_JSON_UNSAFE = re.compile('[\x00-\x1f"\\\\<>&\u2028\u2029\ud800-\udfff]')
_JSON_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_JSON_ESCAPES = {
    char: _JSON_SHORT.get(char) or f"\\u{ord(char):04x}"
    for char in ("\\", '"', *map(chr, range(0x20)), *"<>&\u2028\u2029")
}
_JSON_MARKS = bytes(byte < 0x20 or byte in b'"\\<>&' for byte in range(128)).ljust(256, b"\1")
_JSON_LONG_CHARS = 200              # from here the table (0.4 ns a char) beats the expression (3)


def is_plain_json(text: str) -> bool:
    """True if no character of `text` has to be escaped; meant for long text."""
    if not text.isascii():
        return _JSON_UNSAFE.search(text) is None
    return b"\1" not in text.encode("ascii").translate(_JSON_MARKS)


def json_string(text: str) -> str:
    """Encode `text` as etcd does: `<`, `>`, `&`, U+2028/9 and controls escaped, the rest raw."""
    if len(text) >= _JSON_LONG_CHARS:
        return f'"{_escape_long(text)}"'
    if _JSON_UNSAFE.search(text) is None:
        return f'"{text}"'
    escaped = _JSON_UNSAFE.sub(lambda match: _JSON_ESCAPES.get(match[0], "\\ufffd"), text)
    return f'"{escaped}"'


def _escape_long(text: str) -> str:
    """Escape as json_string() does, in one pass per character: 10 MB of quotes take 0.1 s, not 3.

    Returns the same object if `text` is plain.
    """
    if is_plain_json(text):
        return text
    for char, escape in _JSON_ESCAPES.items():      # the backslash first: the others bring some
        if char in text:
            text = text.replace(char, escape)
    return text if is_unicode(text) else _SURROGATE.sub(r"\\ufffd", text)


# The stored form of a long text: its JSON without the quotes, in pieces of which each is the JSON
# of some characters.  All answers, snapshots and listings share the pieces.
LongText = Tuple[bytes, ...]
Value = Union[str, LongText]
LONG_TEXT_STEP_BYTES = 1 << 15      # one piece: 2 ms where every character has to be escaped
_PLAIN_PIECES = 32                  # pieces without an escape that take as long as two with


def long_text_steps(data: Union[bytes, bytearray, memoryview]) -> Generator[None, None, LongText]:
    """Return the stored form of as_unicode(text_of(data)), in steps of some ms."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    pieces: List[bytes] = []
    work = 0
    for start in range(0, len(data), LONG_TEXT_STEP_BYTES):
        end = start + LONG_TEXT_STEP_BYTES
        text = decode(data[start:end], end >= len(data))
        escaped = _escape_long(text)
        pieces.append(escaped.encode())
        work += 1 if escaped is text else _PLAIN_PIECES // 2
        if work >= _PLAIN_PIECES:
            work = 0
            yield
    return tuple(pieces)


def long_text(text: str) -> LongText:
    """Return the stored form of `text`, which is Unicode."""
    return finish(long_text_steps(text.encode()))


def text_of_long(pieces: Iterable[bytes]) -> str:
    return "".join([json.loads(b'"%b"' % piece) for piece in pieces])


def in_pieces(texts: Iterable[Union[str, bytes]]) -> List[bytes]:
    """Encode texts, joined where they follow each other; bytes stay as they are."""
    pieces: List[Any] = []
    for kind, run in itertools.groupby(texts, type):
        if kind is str:
            pieces.append("".join(cast(Iterable[str], run)).encode())
        else:
            pieces += run
    return pieces


def json_text(value: object) -> str:
    """Encode dicts, lists, strings, ints, floats, bools and None as Go's encoding/json does."""
    if isinstance(value, str):
        return json_string(value)
    if isinstance(value, dict):
        members = (f"{json_string(str(key))}:{json_text(item)}" for key, item in value.items())
        return "{" + ",".join(members) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(json_text, value)) + "]"
    return json.dumps(value)


def utf8(text: str) -> bytes:
    """Return the bytes of `text`; bytes that came in as invalid UTF-8 go out unchanged."""
    return text.encode("utf-8", "surrogateescape")


def text_of(data: bytes) -> str:
    """Return `data` as text that utf8() turns back into the same bytes."""
    return data.decode("utf-8", "surrogateescape")


def is_unicode(text: str) -> bool:
    """True if the bytes of `text` were UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_unicode(text: str) -> str:
    """Return `text` with U+FFFD for bytes that are not UTF-8: no JSON or snapshot can hold them."""
    if is_unicode(text):
        return text
    try:
        return utf8(text).decode("utf-8", "replace")
    except UnicodeEncodeError:          # half of a surrogate pair, escaped in JSON
        return _SURROGATE.sub("\ufffd", text)


_ESCAPE_MARKS = bytes(
    ord("%") if byte == ord("%") else ord("h" if byte in b"0123456789abcdefABCDEF" else ".")
    for byte in range(256)
)


def unquote(data: bytes, *, plus: bool = False) -> bytes:
    """Return `data` with its percent escapes decoded: 10 ns for each of them.

    plus  a `+` is a space, as in forms
    Raises ValueError with the first three bytes that look like an escape and are none.
    urllib takes 400 ns and 100 bytes of memory for an escape, and holds the GIL.
    """
    if b"%" not in data:
        return data.replace(b"+", b" ") if plus else data
    marks = data.translate(_ESCAPE_MARKS)
    if marks.count(b"%hh") != marks.count(b"%"):
        at = marks.replace(b"%hh", b"...").find(b"%")
        raise ValueError(text_of(data[at:at + 3]))
    if plus:
        data = data.replace(b"+", b" ")
    return binascii.a2b_qp(data.replace(b"=", b"=3D").replace(b"%", b"="))


_EPOCH = datetime(1970, 1, 1)


def format_time(unix_ns: int) -> str:
    """Return RFC 3339 in UTC with up to 9 fraction digits, trailing zeros removed."""
    seconds, nanos = divmod(unix_ns, NS)
    fraction = f".{nanos:09d}".rstrip("0") if nanos else ""
    return (_EPOCH + timedelta(seconds=seconds)).isoformat() + fraction + "Z"


def format_local_time(unix_ns: int) -> str:
    """Return RFC 3339 in the zone of this machine, as Go shows a reading of the clock."""
    offset_s = time.localtime(unix_ns // NS).tm_gmtoff
    if not offset_s:
        return format_time(unix_ns)
    hours, minutes = divmod(abs(offset_s) // 60, 60)
    sign = "-" if offset_s < 0 else "+"
    return f"{format_time(unix_ns + offset_s * NS)[:-1]}{sign}{hours:02d}:{minutes:02d}"


# Pythons differ on the hour 24, which 3.14 reads, and on 60 minutes of an offset: none takes them.
_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\dT(?!24)\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:[0-5]\d)\Z"
)
_UTC_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def load_json(text: Union[str, bytes]) -> Any:
    """Return the value of foreign JSON.  Raises ValueError, for depth as well."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def parse_time(text: str) -> int:
    """Return the unix nanoseconds of an RFC 3339 time.  Raises ValueError."""
    match = _RFC3339.match(text)
    if match is None:
        raise ValueError(f"not an RFC 3339 time: {text!r}")
    moment = datetime.fromisoformat(match[1] + match[3].replace("Z", "+00:00"))
    seconds = (moment - _UTC_EPOCH) // timedelta(seconds=1)
    return seconds * NS + int((match[2] or "0")[:9].ljust(9, "0"))


def format_duration(seconds: float) -> str:
    """Return Go's text of a duration: `1h2m3.5s`, `350.2ms`, `12µs`, `0s`."""
    if seconds == 0:
        return "0s"
    if seconds < 1:
        unit, factor = ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
        return f"{seconds * factor:.6f}".rstrip("0").rstrip(".") + unit
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{rest:.9f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


_UNQUOTABLE = re.compile(r'["\\\x00-\x1f\x7f-\xa0\xad\u2028\u2029\udc80-\udcff]')
_GO_SHORT = {**_JSON_SHORT, "\a": "\\a", "\b": "\\b", "\f": "\\f", "\v": "\\v"}


def go_quote(text: str) -> str:
    """Return `text` in double quotes as Go's %q shows it."""
    return f'"{_UNQUOTABLE.sub(_go_escape, text)}"'


def _go_escape(match: re.Match[str]) -> str:
    char = match[0]
    code = ord(char)
    if char in _GO_SHORT:
        return _GO_SHORT[char]
    if code < 0x80 or code >= 0xDC80:       # the latter: one byte that is not UTF-8
        return f"\\x{code & 0xFF:02x}"
    return f"\\u{code:04x}"


_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?://([^/?#]*))?(.*)", re.DOTALL)
_NOT_IN_URLS = re.compile(r"[\x00-\x1f\x7f]")
_NOT_IN_HOSTS = re.compile(r"[\x00-,/:-@\[-^`{-\x7f]")      # of ASCII; [^...] compiles in 5 ms
HOST_CHARS_MAX = 253                # of a name (RFC 1035 §2.3.4); above: refused


def most_like(word: str, words: Iterable[str], likeness: float = 0.6) -> str:
    """Return the word that looks most like `word`; "" if none is as like as `likeness`."""
    import difflib  # not at the top: a start without an error takes 2 ms less
    return next(iter(difflib.get_close_matches(word, list(words), 1, likeness)), "")


def is_ip(text: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, UnicodeError, ValueError):
            socket.inet_pton(family, text)
            return True
    return False


def split_url(url: str) -> Tuple[str, str, str]:
    """Return (scheme in lower case, authority, rest) of a URL; parts may be empty.

    Raises ValueError with the words of Go's url.Parse, also for a host that no machine can have:
    `${IP}`, `{{ip}}`, `a b`, `%41`, `10.0.0.256`, a zone.  Differs from Go, which accepts some of
    them: a member that is added with such a URL costs a small cluster its quorum for ever.
    """
    match = _URL.fullmatch(url)
    scheme, authority, rest = match.groups("") if match else ("", "", url)
    bad = re.search("%(?![0-9A-Fa-f]{2})", url)
    why = _authority_error(authority)
    if _NOT_IN_URLS.search(url):
        why = "net/url: invalid control character in URL"
    elif bad is not None:
        why = f"invalid URL escape {go_quote(url[bad.start():bad.start() + 3])}"
    if why:
        raise ValueError(f"parse {go_quote(url)}: {why}")
    return scheme.lower(), authority, rest


def _authority_error(authority: str) -> str:
    """Return the error of `user@host:port`, or ""."""
    user, _, address = authority.rpartition("@")
    host, port = split_address(address)
    plain = host[1:-1] if host.startswith("[") else host
    bad = _NOT_IN_HOSTS.search(plain.replace(":", ""))
    if not re.fullmatch(r"[A-Za-z0-9._~!$&'()*+,;=:%-]*", user):
        return "net/url: invalid userinfo"
    if address.startswith("[") and not host.endswith("]"):
        return "missing ']' in host"
    if host.startswith("[") and "%" in plain:
        return "an address with a zone names an interface of one machine; leave the zone out"
    if "%" in plain:
        return f"invalid URL escape {go_quote(plain[plain.index('%'):][:3])}"
    if bad is not None:
        return f"invalid character {go_quote(bad.group())} in host name"
    if port and (not re.fullmatch(":[0-9]{0,5}", port) or int(port[1:] or 0) > 65535):
        return f"invalid port {go_quote(port)} after host"
    if host.startswith("["):
        return "" if is_ip(plain) and ":" in plain else f"invalid IPv6 address {go_quote(host)}"
    if re.fullmatch(r"[0-9]+(\.[0-9]+)+", host):
        return "" if is_ip(host) else f"invalid IPv4 address {go_quote(host)}"
    return "" if ":" in host or _is_name(host) else f"invalid host name {go_quote(host)}"


def split_address(address: str) -> Tuple[str, str]:
    """Return (host, `:port`) of `host:port`; brackets stay, the port is "" if there is none."""
    if address.startswith("["):
        host, bracket, port = address.partition("]")
        return host + bracket, port
    host, colon, port = address.rpartition(":")
    return (host, colon + port) if colon else (address, "")


def _is_name(host: str) -> bool:
    """True for a name that a resolver can look up, and for ""."""
    if len(host) > HOST_CHARS_MAX or not host.isprintable():
        return False
    with contextlib.suppress(UnicodeError):     # an empty label, or one above 63 characters
        return _NOT_IN_HOSTS.search(host.encode("idna").decode("ascii")) is None
    return False
