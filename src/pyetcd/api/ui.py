"""The page, /ui, and the few paths below it that the page needs beside the other APIs.

/ui                 the page
/ui/status          members, what is wrong, and the samples of the last five minutes
/ui/keys/<path>     the children of a directory, or with ?q= what is found below it
/ui/log             the last lines of the log, for root
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import re
from typing import Dict, FrozenSet, Generator, Iterator, Optional, Tuple

from ..base.basics import clean_path
from ..base.errors import EtcdError, InvalidForm
from ..base.ids import RECENT_LINES
from ..base.limits import NS, SHORT_HEADER_BYTES_MAX, __version__
from ..base.text import json_string, json_text, utf8
from ..member.auth import Auth, Guard
from ..member.cluster import format_id
from ..member.server import EtcdServer
from ..net.http_messages import HttpHead
from ..net.http_requests import Handler, HttpRequest
from ..store.events import LongNode, Node
from .auth import refuse_credentials
from .forms import not_found, parse_form, refuse_method, send_pieces, write_error, write_message
from .keys import KeysApi
from .overview import Overview
from .page_text import PAGE_CSS, PAGE_HTML, PAGE_JS
from .ring import Ring

PAGE_HEADER = "x-pyetcd-page"       # of every write of the page: no form can send it, and a
                                    # script of another origin only after a CORS preflight
UI_MODES = ("true", "false", "readonly")
LISTED_MAX = 200_000                # children in one answer; above: cut, and said so
HITS_MAX = 500                      # of one search; likewise
PREVIEW_CHARS_MAX = 60              # of a value in a row; above: cut
BROWSES_MAX = 8                     # listings and searches at a time; above: 503
BROWSE_SLICE_NODES = 500            # looked at in one turn: 2 ms
_READS = ("GET", "HEAD", "OPTIONS")


def _source_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _shortened(text: str) -> str:
    """Return a file of the page as it is sent, without lines of comment too: 4 KB less."""
    return re.sub(r"(?m)^ *(?://.*\n|/\*\*.*\*/\n)*", "", text)


def make_page() -> Tuple[bytes, str]:
    """Return the page and its header lines: it may run its own script and ask this member only.

    Trusted types make the browser refuse every way from text to HTML, script included.
    """
    style, script = _shortened(PAGE_CSS), _shortened(PAGE_JS)
    page = _shortened(PAGE_HTML).replace("@STYLE@", style).replace("@SCRIPT@", script)
    policy = (
        f"default-src 'none'; script-src {_source_hash(script)}; style-src"
        f" {_source_hash(style)}; connect-src 'self'; img-src data:; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script';"
        " trusted-types 'none'"
    )
    return page.encode(), (
        f"Content-Security-Policy: {policy}\r\nX-Content-Type-Options: nosniff\r\n"
        "X-Frame-Options: DENY\r\nReferrer-Policy: same-origin\r\nCache-Control: no-cache\r\n"
    )


class UiApi:
    """/ui and what is below it.  mode: one of UI_MODES.  Thread: reactor."""

    def __init__(self, server: EtcdServer, auth: Auth, guard: Guard, keys: KeysApi) -> None:
        self._server = server
        self._auth = auth
        self._guard = guard
        self._mode = server.config.ui
        self._page, self._headers = make_page()
        self._overview = Overview(server)
        self._ring = Ring(server, keys) if self._mode != "false" else None
        self._browses = 0               # under way

    def stop(self) -> None:
        self._overview.stop()

    def route(self, head: HttpHead) -> Optional[Handler]:
        """Return what answers a request with this head; None if it is no matter of the page."""
        path = head.path
        is_page_path = path in ("/", "/ui") or path.startswith("/ui/")
        if self._mode == "false" or not is_page_path:
            return None
        if path == "/":
            is_browser = "text/html" in head.headers.get("accept", "")
            return _send_to_page if is_browser and head.method in ("GET", "HEAD") else None
        is_listing = path.startswith("/ui/keys/") or path == "/ui/keys"
        if head.method != "GET" and (is_listing or head.method != "HEAD"):
            return functools.partial(refuse_method, "GET" if is_listing else "GET,HEAD")
        if is_listing:
            return self._route_keys(head)
        if path == "/ui/log":
            return self._guard.root(head, self._log, refuse_credentials)
        handlers: Dict[str, Handler] = {
            "/ui": self._send_page, "/ui/": _send_to_page, "/ui/status": self._status,
        }
        return handlers.get(path, not_found)

    def refusal(self, head: HttpHead, origins: FrozenSet[str]) -> Optional[Handler]:
        """Return what refuses a write of a page; None if it is none, or may pass.

        A browser lets a form of any page POST here without a CORS preflight.
        origins  those of -cors
        """
        headers, is_read = head.headers, head.method in _READS
        if PAGE_HEADER in headers and (not is_read or head.path == "/new"):
            return None if self._mode == "true" else _refuse_readonly
        if is_read:
            return None
        if "referer" in headers and headers["referer"].endswith(f"://{headers.get('host')}/ui"):
            return _refuse_headerless
        if head.method != "POST" or not head.path.startswith("/v2/"):
            return None
        is_allowed = "*" in origins or headers.get("origin", "") in origins
        return _refuse_foreign if not is_allowed and is_foreign(head) else None

    def _send_page(self, request: HttpRequest) -> None:
        request.reply(200, self._page, "text/html; charset=utf-8", self._headers)

    def _status(self, request: HttpRequest) -> None:
        """?since=UNIX_S: without the samples up to then."""
        assert self._ring is not None   # else there is no such path
        server, overview = self._server, self._overview
        since = request.query.partition("since=")[2][:20]
        overview.look()
        rows = overview.rows()
        samples = [
            [sample.unix_s, *(round(value, 3) for value in sample[1:])]
            for sample in self._ring.samples
            if not since.isdecimal() or sample.unix_s > int(since)
        ]
        history = server.store.hub.history
        text = json_text({
            "now": server.reactor.wall_ns() / NS, "ui": self._mode, "auth": self._auth.enabled,
            "cluster": format_id(server.cluster.id), "version": server.cluster.identity.reported,
            "pyetcd": __version__, "index": server.store.current_index,
            "history": history.first_index, "problems": overview.problems(rows),
            "members": rows,
        })
        text = f'{text[:-1]},"samples":{json.dumps(samples)}}}'     # 0.5 ms instead of 4
        request.reply(200, utf8(text), headers=_NO_STORE)

    def _log(self, request: HttpRequest) -> None:
        lines = list(RECENT_LINES.lines)
        request.reply(200, utf8(json_text({"lines": lines})), headers=_NO_STORE)

    # -- keys --------------------------------------------------------------

    def _route_keys(self, head: HttpHead) -> Handler:
        path = clean_path(head.path[len("/ui/keys"):] or "/")
        if len(head.query) > SHORT_HEADER_BYTES_MAX:
            return lambda request: request.reply(414)
        try:
            fields = parse_form(head.query.encode("latin-1"))
        except InvalidForm as error:
            refused = error.with_traceback(None)
            return lambda request: write_error(request, refused, "")
        wanted = fields.get("q", "").lower()
        browse = functools.partial(
            self._browse, "/1" + path.rstrip("/"), wanted, fields.get("in", ""), "hidden" in fields,
        )
        return self._guard.key(
            head, path, write=False, recursive=bool(wanted), passed=browse,
            refused=refuse_credentials,
        )

    def _browse(self, path: str, text: str, where: str, hidden: bool, request: HttpRequest) -> None:
        if self._browses >= BROWSES_MAX:
            write_message(request, 503, "too many listings are under way; try again")
            return
        store = self._server.store
        nodes = store.below(path, recursive=bool(text), hidden=hidden)
        if nodes is None:
            try:
                store.listing(path, now_ns=0).end()
            except EtcdError as error:
                write_error(request, error, "")
            return
        rows = search(nodes, text, where) if text else listing(nodes)
        index = store.current_index
        reply = request.start_stream(
            200, "application/x-ndjson", f"X-Etcd-Index: {index}\r\n{_NO_STORE}")
        pieces = self._row_pieces(rows, HITS_MAX if text else LISTED_MAX, index)
        reply.on_close = pieces.close
        send_pieces(reply, pieces, self._server.reactor)

    def _row_pieces(self, rows: Rows, rows_max: int, index: int) -> Generator[bytes, None, None]:
        """Yield lines of JSON: arrays of rows, then an object that says whether there is more."""
        self._browses += 1
        try:
            left, looked, is_last = rows_max, 0, False
            while not is_last:
                some = list(itertools.islice(rows, BROWSE_SLICE_NODES))
                looked += len(some)
                found = [row for row in some if row][:left]
                left -= len(found)
                line = f"[{','.join(found)}]\n" if found else ""
                is_last = not left or len(some) < BROWSE_SLICE_NODES
                if is_last:
                    line += json_text({"index": index, "looked": looked, "more": not left}) + "\n"
                yield line.encode()
        finally:
            self._browses -= 1


_NO_STORE = "Cache-Control: no-store\r\n"


def _send_to_page(request: HttpRequest) -> None:
    request.reply(302, headers="Location: /ui\r\nVary: Accept\r\n")


def _forbid(why: str, request: HttpRequest) -> None:
    write_message(request, 403, why)


_refuse_readonly = functools.partial(
    _forbid, "the page may not write here: the member runs with -ui=readonly, or -ui=false")
_refuse_headerless = functools.partial(_forbid, f"a write of the page has the header {PAGE_HEADER}")
_refuse_foreign = functools.partial(
    _forbid, "a web page elsewhere may have sent this, without its reader's knowledge: name the"
    " page's origin in -cors if it may")


def is_foreign(head: HttpHead) -> bool:
    """True if a browser sends this for a page of another origin."""
    site = head.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("cross-site", "same-site")
    origin = head.headers.get("origin", "")
    return origin != "" and origin.partition("://")[2] != head.headers.get("host", "")


Rows = Iterator[str]                # for each node looked at, and now and then: a row, or ""
Nodes = Iterator[Optional[Tuple[str, Node]]]


def row_json(name: str, node: Node) -> str:
    """Return [name, is directory, value's begin, size, expiry in unix s or 0, modified index].

    size  of a directory: number of its children; of a value: in bytes, as JSON if it is long
    """
    preview, size = "", len(node.children or ())
    if isinstance(node, LongNode):
        size = sum(map(len, node.json))
    elif node.value is not None:
        preview, size = node.value[:PREVIEW_CHARS_MAX], len(utf8(node.value))
    return (
        f"[{json_string(name)},{int(node.children is not None)},{json_string(preview)},{size}"
        f",{node.expires_ns // NS},{node.modified_index}]"
    )


def listing(nodes: Nodes) -> Rows:
    for found in nodes:
        yield "" if found is None else row_json(found[0][found[0].rfind("/") + 1:], found[1])


def search(nodes: Nodes, text: str, where: str) -> Rows:
    """Yield rows of nodes whose `where` (key, value, "": both) has `text`, given in lower case."""
    for found in nodes:
        if found is None:
            yield ""
            continue
        path, node = found
        has = where != "value" and text in path[2:].lower()
        if not has and where != "key":
            if isinstance(node, LongNode):
                has = yield from _long_has(node, json_string(text)[1:-1])
            else:
                has = node.value is not None and text in node.value.lower()
        yield row_json(path[2:], node) if has else ""


def _long_has(node: LongNode, inside: str) -> Generator[str, None, bool]:
    """Return whether the JSON of a long value has `inside`, with a pause for each piece."""
    before = ""
    for piece in node.json:
        here = before + piece.decode().lower()
        if inside in here:
            return True
        before = here[1 - len(inside):] if len(inside) > 1 else ""
        yield ""
    return False
