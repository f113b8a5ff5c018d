"""Forms, queries and plain replies."""

from __future__ import annotations

import codecs
import functools
import re
from typing import Dict, Generator, Iterator, List, Mapping, Optional

from ..base.basics import clean_path
from ..base.codec import encode_target, wrap_int64
from ..base.errors import (
    EtcdError,
    IndexNotANumber,
    InvalidField,
    InvalidForm,
    PrevValueRequired,
    RefreshTtlRequired,
    RefreshValue,
    TtlNotANumber,
)
from ..base.ids import package_logger
from ..base.limits import (
    KEY_DEPTH_MAX,
    NS,
    SHORT_HEADER_BYTES_MAX,
    UINT64_MAX,
    WATCHER_QUEUE_EVENTS_MAX,
)
from ..base.messages import Request
from ..base.text import finish, go_quote, is_unicode, json_string, text_of, unquote, utf8
from ..net.http_messages import HttpHead
from ..net.http_requests import HttpRequest, StreamReply
from ..net.reactor import Reactor
from ..store.events import Event
from ..store.tree import Store
from ..store.watchers import Watcher

FORM_FIELDS_MAX = 10_000            # fields of one body; above: error 210
QUERY_FIELDS_MAX = 1_000            # fields of one query; above: error 210
FORM_SLICE_BYTES = 512 << 10        # of one field of a form that are decoded in one turn
FORM_SLICE_FIELDS = 1_000           # of a form that are decoded in one turn
KEY_BYTES_MAX = 64 << 10            # of the path of a key that is written; above: error 210

_NOSNIFF = "X-Content-Type-Options: nosniff\r\n"


def write_text(request: HttpRequest, status: int, text: str, headers: str = "") -> None:
    """Answer with plain text; errors have `nosniff`, as those of Go's http.Error."""
    headers += _NOSNIFF if status >= 400 else ""
    request.reply(status, utf8(text), "text/plain; charset=utf-8", headers)


def refuse_method(allow: str, request: HttpRequest) -> None:
    """Answer 405.  allow: the methods of the path, `A,B`."""
    write_text(request, 405, "Method Not Allowed\n", f"Allow: {allow}\r\n")


def not_found(request: HttpRequest) -> None:
    write_text(request, 404, "404 page not found\n")


def write_message(request: HttpRequest, status: int, message: str, headers: str = "") -> None:
    """Answer with an error of any API but the keys API."""
    body = f'{{"message":{json_string(message)}}}'.encode()
    request.reply(status, body, "application/json", headers)


def send_pieces(reply: StreamReply, pieces: Iterator[bytes], reactor: Reactor) -> None:
    """Send pieces, one a turn, as fast as the client reads; end the reply.  b"": only a pause."""
    if reply.closed:
        return
    piece = next(pieces, None)
    go_on = functools.partial(reactor.call_in_turn, send_pieces, reply, pieces, reactor)
    if piece is None:
        reply.end()
    elif piece:
        reply.when_read(go_on)
        reply.write(piece)
    else:
        go_on()


def parse_form(data: bytes, fields_max: int = FORM_FIELDS_MAX) -> Dict[str, str]:
    """Return name -> first value of a query, or of a body in the same form.

    Raises InvalidForm.  Source: Go url.ParseQuery, as etcd 2.3 built with Go 1.17 or newer.
    Differs from etcd: more than fields_max fields are refused, as they would stall all clients,
    and so is a part of more than FORM_SLICE_BYTES that is not UTF-8, as no reply could hold it.
    """
    return finish(form_steps(data, fields_max))


def form_steps(
    data: bytes, fields_max: int = FORM_FIELDS_MAX
) -> Generator[None, None, Dict[str, str]]:
    """Do the work of parse_form() with pauses, so that a large form does not stall the reactor."""
    fields: Dict[str, str] = {}
    if not data:
        return fields
    if b";" in data:
        raise InvalidForm("invalid semicolon separator in query")
    found = 0
    for start in range(0, len(data), FORM_SLICE_BYTES):
        if len(data) > FORM_SLICE_BYTES:
            yield                       # before the first slice too: the receipt took some ms
        found += data.count(b"&", start, start + FORM_SLICE_BYTES)
        if found >= fields_max:
            raise InvalidForm(f"more than {fields_max} fields")
    view, end = memoryview(data), -1
    for count in range(1, found + 2):
        start, end = end + 1, data.find(b"&", end + 1)
        end = end if end >= 0 else len(data)
        if end - start > FORM_SLICE_BYTES:
            middle = data.find(b"=", start, end)
            middle = middle if middle >= 0 else end
            name_text = yield from _unescape_steps(view[start:middle])
            value_text = yield from _unescape_steps(view[middle + 1:end])
        elif end > start:
            name, _, value = data[start:end].partition(b"=")
            name_text, value_text = text_of(_unescape(name)), text_of(_unescape(value))
        else:
            continue
        fields.setdefault(name_text, value_text)
        if not count % FORM_SLICE_FIELDS:
            yield
    return fields


def _unescape_steps(data: memoryview) -> Generator[None, None, str]:
    decode = codecs.getincrementaldecoder("utf-8")().decode
    pieces, start = [], 0
    try:
        while start < len(data):
            yield
            end = start + FORM_SLICE_BYTES
            last = bytes(data[end - 2:end])
            if end < len(data) and b"%" in last:
                end -= 2 - last.rfind(b"%")     # keep escapes whole
            pieces.append(decode(_unescape(bytes(data[start:end])), end >= len(data)))
            start = end
    except UnicodeDecodeError:
        raise InvalidForm(f"more than {FORM_SLICE_BYTES} bytes that are not UTF-8") from None
    return "".join(pieces)


def _unescape(data: bytes) -> bytes:
    try:
        return unquote(data, plus=True)
    except ValueError as error:
        raise InvalidForm(f"invalid URL escape {go_quote(str(error))}") from None


_MEDIA_TOKEN = r"[!#-'*+\-.0-9A-Z^-~]+"       # compiles 7 ms faster than the negated class
_MEDIA_TYPE = re.compile(f"({_MEDIA_TOKEN})?(/?)({_MEDIA_TOKEN})?(.*)", re.DOTALL)
_MEDIA_PARAM = re.compile(rf'\s*;\s*({_MEDIA_TOKEN})\s*=\s*({_MEDIA_TOKEN}|"(?:[^"\\\r\n]|\\.)*")')


@functools.lru_cache(maxsize=64)
def is_form_type(content_type: str) -> bool:
    """True for the type of a form.  Raises InvalidForm.  Source: Go mime.ParseMediaType."""
    if not content_type:
        return False
    if len(content_type) > SHORT_HEADER_BYTES_MAX:
        raise InvalidForm(f"mime: more than {SHORT_HEADER_BYTES_MAX} bytes")
    base = content_type.partition(";")[0]
    media_type = base.strip().lower()
    match = _MEDIA_TYPE.fullmatch(media_type)
    main, slash, sub, rest = match.groups() if match else (None, "", None, "")
    if not main:
        raise InvalidForm("mime: no media type")
    if not slash and (sub or rest):
        raise InvalidForm("mime: expected slash after first token")
    if slash and not sub:
        raise InvalidForm("mime: expected token after slash")
    if rest:
        raise InvalidForm("mime: unexpected content after media subtype")
    _check_media_params(content_type[len(base):])
    return media_type == "application/x-www-form-urlencoded"


def _check_media_params(text: str) -> None:
    params: Dict[str, str] = {}
    end = 0
    param = _MEDIA_PARAM.match(text)
    while param is not None:
        end = param.end()
        name, value = param.group(1).lower(), param.group(2)
        if params.setdefault(name, value) != value:
            raise InvalidForm("mime: duplicate parameter name")
        param = _MEDIA_PARAM.match(text, end)
    if text[end:].strip() not in ("", ";"):
        raise InvalidForm("mime: invalid media parameter")


GO_BOOLS = {
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}


def _bool_field(fields: Mapping[str, str], name: str, shown: str = "") -> Optional[bool]:
    text = fields.get(name)
    if text is None:
        return None
    value = GO_BOOLS.get(text)
    if value is None:
        raise InvalidField("invalid value for " + (shown or f'"{name}"'))
    return value


def _parse_uint64(text: str) -> Optional[int]:
    """Return the decimal number in `text`; None for another text, or for more than 64 bits."""
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0")
    value = int(digits or "0") if len(digits) <= 20 else UINT64_MAX + 1
    return value if value <= UINT64_MAX else None


def _index_field(fields: Mapping[str, str], name: str) -> int:
    text = fields.get(name)
    if text is None:
        return 0
    value = _parse_uint64(text)
    if value is None:
        raise IndexNotANumber(f'invalid value for "{name}"')
    return value


def _expiration_field(fields: Mapping[str, str], now_ns: int) -> Optional[int]:
    """Return the expiry time in unix ns; None without a ttl.  Raises TtlNotANumber."""
    text = fields.get("ttl")
    if not text:
        return None
    ttl_s = _parse_uint64(text)
    if ttl_s is None:
        raise TtlNotANumber('invalid value for "ttl"')
    return wrap_int64(now_ns + wrap_int64(ttl_s * NS))


def parse_key_request(method: str, path: str, fields: Mapping[str, str], now_ns: int) -> Request:
    """Return the command, with id 0, that merged fields describe; path: internal, clean.

    Raises EtcdError for the first bad parameter in etcd's order, also if the method ignores it.
    Source: etcd 2.3 etcdserver/etcdhttp/client.go, parseKeyRequest.
    """
    if not fields:
        return Request(0, method, path)
    prev_index = _index_field(fields, "prevIndex")
    since = _index_field(fields, "waitIndex")
    recursive = _bool_field(fields, "recursive")
    sort = _bool_field(fields, "sorted")
    wait = _bool_field(fields, "wait")
    dir = _bool_field(fields, "dir")
    quorum = _bool_field(fields, "quorum")
    stream = _bool_field(fields, "stream")
    if wait and method != "GET":
        raise InvalidField('"wait" can only be used with GET requests')
    prev_value = fields.get("prevValue")
    if prev_value == "":
        raise PrevValueRequired('"prevValue" cannot be empty')
    if prev_value and len(prev_value) <= FORM_SLICE_BYTES and not is_unicode(prev_value):
        raise InvalidForm('"prevValue" is not UTF-8: no value is')
    expiration = _expiration_field(fields, now_ns)
    prev_exist = _bool_field(fields, "prevExist", "prevExist")
    refresh = _bool_field(fields, "refresh", "refresh")
    value = fields.get("value", "")
    if refresh and value:
        raise RefreshValue("A value was provided on a refresh")
    if refresh and expiration is None:
        raise RefreshTtlRequired("No TTL value set")
    return Request(
        0, method, path, value, bool(dir), prev_value or "", prev_index, prev_exist,
        expiration or 0, bool(wait), since, bool(recursive), bool(sort), bool(quorum), 0,
        bool(stream), refresh,
    )


def canonical_path(path: str) -> str:
    """Return `path` without `//`, `.` and `..`, but with its trailing slash (Go ServeMux)."""
    clean = clean_path(path)
    return clean + "/" if path.endswith("/") and clean != "/" else clean


def _bad_key(path: str) -> str:
    """Return why no key with this internal path may be written; "" if it may."""
    if not is_unicode(path):            # JSON cannot hold it, so snapshots would lose the key
        return "the key is not UTF-8"
    if path.count("/") > KEY_DEPTH_MAX + 1:     # the namespace
        return f"the key has more than {KEY_DEPTH_MAX} path elements"
    return f"the key has more than {KEY_BYTES_MAX} bytes" if len(path) > KEY_BYTES_MAX else ""


class KeyTarget:
    """The part of a key request that its head decides; kept with the head, which is cached.

    command  complete for GET, HEAD and DELETE, whose body is ignored; else a template
    encoded  method and path of the command
    error    the answer to every request with this head, or None
    fields   of the query, for PUT and POST
    is_form  True if the body holds fields
    plain    True if only the fields of the body remain to be read
    bad_key  why no such key may be written, or ""
    bad_type, bad_query  causes of error 210 that go before and after those of the body
    """

    __slots__ = (
        "command", "encoded", "error", "fields", "is_form", "plain", "bad_key", "bad_type",
        "bad_query",
    )

    def __init__(self, head: HttpHead) -> None:
        path = "/1" + clean_path(head.path[len("/v2/keys"):]).rstrip("/")
        self.command = Request(0, head.method, path)
        self.encoded = encode_target(head.method, path)
        self.error: Optional[EtcdError] = None
        self.fields: Dict[str, str] = {}
        self.is_form = False
        self.bad_key = _bad_key(path)
        self.bad_type = self.bad_query = ""
        try:
            if head.query:
                self.fields = parse_form(head.query.encode("latin-1"), QUERY_FIELDS_MAX)
        except InvalidForm as error:
            self.bad_query = error.cause
        if head.method in ("PUT", "POST"):
            self._read_type(head)
        else:
            self._read_command()
        self.plain = self.is_form and not (
            self.fields or self.bad_key or self.bad_type or self.bad_query
        )

    def request(self, request: HttpRequest, now_ns: int) -> Generator[None, None, Request]:
        """Return the command of a PUT or POST, with pauses.  Raises EtcdError."""
        if self.is_form and request.body_too_large:
            raise InvalidForm("http: POST too large")
        if self.bad_type:
            raise InvalidForm(self.bad_type)
        fields = (yield from form_steps(request.body)) if self.is_form else {}
        if self.bad_query:
            raise InvalidForm(self.bad_query)
        if self.bad_key:
            raise InvalidForm(self.bad_key)
        if self.fields:
            fields = {**self.fields, **fields}
        return parse_key_request(self.command.method, self.command.path, fields, now_ns)

    def _read_type(self, head: HttpHead) -> None:
        content_type = head.headers.get("content-type", "")
        try:
            self.is_form = is_form_type(content_type)
        except InvalidForm as error:
            self.bad_type = error.cause
            form = "application/x-www-form-urlencoded"      # the limit of the body holds for it
            self.is_form = content_type.partition(";")[0].strip().lower() == form

    def _read_command(self) -> None:
        command = self.command
        try:
            if self.bad_query:
                raise InvalidForm(self.bad_query)
            if self.bad_key and (command.method == "DELETE" or not is_unicode(command.path)):
                raise InvalidForm(self.bad_key)
            self.command = parse_key_request(command.method, command.path, self.fields, 0)
        except EtcdError as error:
            self.error = error.with_traceback(None)


class KeyWatch:
    """A watch of one client: each event is a chunk; without `stream` the first one ends the reply.

    Differs from etcd: a client that leaves more than WATCHER_QUEUE_EVENTS_MAX events unread is
    disconnected, so that it notices; etcd keeps the connection and sends nothing more.
    """

    __slots__ = ("_connection", "_stream", "_reply", "_early", "_unsent", "_watcher")

    def __init__(self, store: Store, command: Request, request: HttpRequest, headers: str) -> None:
        """Register, and send the head at once.  Raises EventIndexCleared before it sends."""
        self._connection = request.connection
        self._stream = command.stream
        self._reply: Optional[StreamReply] = None
        self._early: List[Event] = []       # events of the history, before the reply has started
        self._unsent: List[int] = []        # sizes of events, a superset of those not yet sent
        self._watcher: Optional[Watcher] = None
        self._watcher = store.watch(
            command.path, recursive=command.recursive, stream=command.stream, since=command.since,
            deliver=self._deliver, lost=self._lost,
        )
        self._reply = request.start_stream(200, "application/json", headers)
        self._reply.on_close = self._unregister
        early, self._early = self._early, []
        for event in early:
            self._deliver(event)

    def _deliver(self, event: Event) -> None:
        reply = self._reply
        if reply is None:
            self._early.append(event)
            return
        data = event.client_pieces()
        if self._stream and not reply.pending:
            self._unsent.clear()
        if not self._stream:
            self._unregister()
            reply.end(data)
        elif reply.write(data[0], data[1:]):
            self._unsent.append(sum(map(len, data)))
            if len(self._unsent) > WATCHER_QUEUE_EVENTS_MAX:
                self._check_pace(reply)

    def _lost(self) -> None:
        """Disconnect the client, as events were lost: it asks again, and then learns of it."""
        self._unregister()
        if self._reply is not None:
            self._reply.abort()

    def _unregister(self) -> None:
        """Cancel the watcher, which refers to this object."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()

    def _check_pace(self, reply: StreamReply) -> None:
        self._connection.flush()
        left, events = reply.pending, 0
        for size in reversed(self._unsent):
            if left <= 0:
                break
            left -= size
            events += 1
        del self._unsent[:len(self._unsent) - events]
        if events > WATCHER_QUEUE_EVENTS_MAX:
            package_logger("etcdhttp").warning(
                "closed the watch of %s: it left %d events unread", self._connection.remote, events
            )
            self._unregister()
            reply.abort()


def write_error(request: HttpRequest, error: EtcdError, headers: str) -> None:
    """Answer with an error of the keys API.  Source: etcd 2.3 error/error.go."""
    cause = f',"cause":{json_string(error.cause)}' if error.cause else ""
    body = (
        f'{{"errorCode":{error.code},"message":{json_string(error.message)}{cause}'
        f',"index":{error.index}}}\n'
    )
    request.reply(
        error.status, body.encode(), "application/json",
        f"{headers}X-Etcd-Index: {error.index}\r\n",
    )
