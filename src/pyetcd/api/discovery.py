"""The discovery service: tokens and registrations of clusters elsewhere."""

from __future__ import annotations

import os
import re
from typing import Any, Callable, Mapping

from ..base.errors import EtcdError, InvalidForm
from ..base.limits import REGISTRY_KEY, SHORT_HEADER_BYTES_MAX
from ..base.messages import Request
from ..base.text import json_string
from ..net.http_messages import HttpHead
from ..net.http_requests import HttpRequest
from .forms import parse_form, write_text
from .routes import CorsRequest
from .ui import PAGE_HEADER

DISCOVERY_DEFAULT_SIZE = 3          # of a cluster made by /new without size


class DiscoveryService:
    """The registry of other clusters on the client port of a member: `/new` and `/<token>`.

    do       EtcdServer.do
    keys     the handler of /v2/keys requests
    wall_ns  the clock whose time the tokens hold

    Thread: reactor.  Source: discovery.etcd.io.
    Differs from discovery.etcd.io: sizes below 1 are refused, as no cluster can have them.
    """

    def __init__(
        self, do: Callable[[Request, Callable[[Any], None]], None],
        keys: Callable[[HttpRequest], None], wall_ns: Callable[[], int],
    ) -> None:
        self._do = do
        self._keys = keys
        self._wall_ns = wall_ns

    def handle(self, request: HttpRequest) -> bool:
        """Answer a request for the registry; return False for any other path."""
        path = request.path
        if path == "/new":
            self._new(request)
            return True
        match = _TOKEN_PATH.fullmatch(path)
        if match is None:
            return False
        if request.method in _TOKEN_METHODS.get(match.group(1), ("GET", "PUT", "DELETE")):
            self._forward(request)
        else:
            request.reply(405)
        return True

    def _new(self, request: HttpRequest) -> None:
        """Make a token; answer with its URL, below the host that the client asked."""
        host = request.headers.get("host", "")
        if is_from_browser(request.headers) and not (
            PAGE_HEADER in request.headers      # then it was the page's button
            or isinstance(request, CorsRequest) and request.is_allowed
        ):
            write_text(request, 403, _NOT_FOR_PAGES)
            return
        if request.body_too_large:
            write_text(request, 413, "413 Request Entity Too Large\n")
            return
        try:
            size = _wanted_size(request)
        except ValueError as error:
            write_text(request, 400, f"{error}\n")
            return
        if not host:
            write_text(request, 400, "missing Host header\n")
            return
        token = make_token(self._wall_ns())

        def done(result: Any) -> None:
            if isinstance(result, EtcdError):
                write_text(request, 400, f"Unable to generate token: {result.cause}\n")
            else:
                write_text(request, 200, f"{request.scheme}://{host}/{token}")

        self._do(
            Request(
                method="PUT", path=f"/1{REGISTRY_KEY}/{token}/_config/size", val=str(size),
                prev_exist=False,
            ),
            done,
        )

    def _forward(self, request: HttpRequest) -> None:
        old = request.head
        # All requests with the same bytes share a head, so this one needs a copy.
        head = HttpHead(old.method, f"/v2/keys{REGISTRY_KEY}{old.target}", old.minor, old.headers)
        head.keep_alive, head.takes_raw = old.keep_alive, old.takes_raw
        request.head = head
        self._keys(request)


def make_token(wall_ns: int) -> str:
    """Return a new token, which nobody can guess: a UUID of version 7 (RFC 9562 §5.7)."""
    token = bytearray(os.urandom(16))
    token[:6] = (wall_ns // 1_000_000).to_bytes(6, "big")
    token[6] = token[6] & 0x0F | 0x70
    token[8] = token[8] & 0x3F | 0x80
    return token.hex()


_NOT_FOR_PAGES = (
    "a web page may have asked for this token, without its reader's knowledge: use curl, or name"
    " the page's origin in -cors\n"
)


def is_from_browser(headers: Mapping[str, str]) -> bool:
    """True for a request of a web page; False for programs, and for an address that a user typed.

    Browsers send Sec-Fetch-Site on secure and local connections.  On others, and after DNS
    rebinding of the page's name to this member, only headers of every browser tell it apart.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site != "none"
    agent, accept = headers.get("user-agent", ""), headers.get("accept", "")
    return (
        "origin" in headers or "referer" in headers or headers.get("accept-language", "*") != "*"
        or "text/html" in accept or "image/" in accept
        or "Mozilla/" in agent and "PowerShell" not in agent
    )


_TOKEN_PATH = re.compile("/[0-9a-f]{32}(/?|/_config/size|/[^/]+)")
_TOKEN_METHODS = {"": ("GET", "PUT"), "/": ("GET", "PUT"), "/_config/size": ("GET",)}


def _wanted_size(request: HttpRequest) -> int:
    """Return the cluster size in a /new request.  Raises ValueError."""
    query = request.query.encode("latin-1")
    body = request.body if request.method in ("POST", "PUT", "PATCH") else b""
    if len(query) + len(body) > SHORT_HEADER_BYTES_MAX:
        raise ValueError(f"more than {SHORT_HEADER_BYTES_MAX} bytes to say a size")
    try:
        fields = {**parse_form(query), **parse_form(body)}
    except InvalidForm as error:
        raise ValueError(error.cause) from None
    text = fields.get("size") or str(DISCOVERY_DEFAULT_SIZE)
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"strconv.Atoi: parsing {json_string(text)}: invalid syntax")
    size = int(text[:20])
    if not 1 <= size < 1 << 63:
        raise ValueError(f"size={text[:20]}: a cluster has at least one member")
    return size
