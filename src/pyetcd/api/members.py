"""The members API: the list of members, and its changes."""

from __future__ import annotations

import functools
import re
import urllib.parse
from typing import Optional, Sequence, Tuple

from ..base.errors import (
    EtcdError,
    MemberExists,
    MemberNotFound,
    MemberRemoved,
    PeerUrlExists,
    ReconfigurationRefused,
)
from ..base.ids import package_logger
from ..base.limits import NS
from ..base.messages import ConfChangeType
from ..base.text import utf8
from ..base.urls import check_advertised_url, is_local, usable_urls
from ..member.cluster import Member, format_id, member_id
from ..member.server import EtcdServer
from ..net.http_requests import HttpRequest
from .forms import KEY_BYTES_MAX, canonical_path, write_message, write_text
from .gojson import GoJson

_PATH_SAFE = "/$&+,:;=@-_.~"        # characters that Go does not escape in a path


def redirect(request: HttpRequest) -> None:
    """Answer 301 with the canonical form of the path.  Source: Go http.ServeMux, Redirect."""
    if len(request.target) > KEY_BYTES_MAX:
        request.reply(414)
        return
    location = urllib.parse.quote(utf8(canonical_path(request.path)), safe=_PATH_SAFE)
    if request.query:
        location += "?" + request.query
    body = b""
    if request.method in ("GET", "HEAD"):
        shown = location.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        shown = shown.replace('"', "&#34;").replace("'", "&#39;")
        body = f'<a href="{shown}">Moved Permanently</a>.\n\n'.encode("latin-1")
    ascii_only = "".join(c if c < "\x80" else f"%{ord(c):x}" for c in location)
    request.reply(301, body, "text/html; charset=utf-8", f"Location: {ascii_only}\r\n")


PEER_URLS_MAX = 100                 # of one member; above: 400
_PEER_URLS_TYPE = r'struct { PeerURLs []string "json:\"peerURLs\"" }'


def parse_peer_urls(body: bytes) -> Tuple[str, ...]:
    """Return the sorted peer URLs in the body of a member request.

    Raises ValueError with etcd's words.  Source: etcd 2.3 etcdhttp/httptypes/member.go.
    """
    value = GoJson.loads(body)
    if value is not None and not isinstance(value, dict):
        kind = GoJson.type_name(value)
        raise ValueError(f"json: cannot unmarshal {kind} into Go value of type {_PEER_URLS_TYPE}")
    urls = GoJson.member(value, "peerURLs")
    into = "into Go struct field .peerURLs of type"
    if urls is not None and not isinstance(urls, list):
        raise ValueError(f"json: cannot unmarshal {GoJson.type_name(urls)} {into} []string")
    for url in urls or ():
        if url is not None and not isinstance(url, str):
            raise ValueError(f"json: cannot unmarshal {GoJson.type_name(url)} {into} string")
    if not urls:
        raise ValueError("no valid URLs given")
    if len(urls) > PEER_URLS_MAX:
        raise ValueError(f"more than {PEER_URLS_MAX} URLs given")
    return tuple(sorted(check_advertised_url(url or "") for url in urls))


class MembersApi:
    """/v2/members.  Source: etcd 2.3 API, members; etcdhttp/client.go."""

    METHODS = ("GET", "POST", "DELETE", "PUT")

    def __init__(self, server: EtcdServer) -> None:
        self._server = server
        self._cluster = server.cluster
        self._cluster_line = f"X-Etcd-Cluster-Id: {format_id(server.cluster.id)}\r\n"

    def handle(self, request: HttpRequest) -> None:
        rest = request.path[len("/v2/members/"):]
        if request.method == "GET":
            self._get(request, rest)
        elif request.method == "POST":
            self._change_urls(request, ConfChangeType.ADD_NODE)
        elif not rest:
            write_text(request, 405, "Method Not Allowed\n", self._cluster_line)
        elif not re.fullmatch("[0-9A-Fa-f]+", rest) or len(rest.lstrip("0")) > 16:
            self._message(request, 404, f"No such member: {rest}")
        elif request.method == "DELETE":
            self._change(request, ConfChangeType.REMOVE_NODE, Member(int(rest, 16), ()))
        else:
            self._change_urls(request, ConfChangeType.UPDATE_NODE, int(rest, 16))

    def _get(self, request: HttpRequest, rest: str) -> None:
        if rest == "":
            members = sorted(self._cluster.members.values())
            listing = ",".join(member.client_json() for member in members)
            self._reply(request, 200, f'{{"members":[{listing}]}}\n')
        elif rest != "leader":
            self._message(request, 404, "Not found")
        else:
            leader = self._cluster.members.get(self._server.lead)
            if leader is None:
                self._message(request, 503, "During election")
            else:
                self._reply(request, 200, leader.client_json() + "\n")

    def _change_urls(self, request: HttpRequest, change: ConfChangeType, id: int = 0) -> None:
        """Add a member with the URLs in the body, or give them to member `id`."""
        content_type = request.headers.get("content-type", "")
        if content_type != "application/json":
            self._message(request, 415, f"Bad Content-Type {content_type}, accept application/json")
            return
        if request.body_too_large:
            self._message(request, 413, "Request Entity Too Large")
            return
        try:
            urls = parse_peer_urls(request.body)
        except ValueError as error:
            self._message(request, 400, str(error))
            return
        self._warn_of_local(urls)
        id = id or member_id(urls, str(self._server.reactor.wall_ns() // NS))
        self._change(request, change, Member(id, urls))

    def _warn_of_local(self, urls: Sequence[str]) -> None:
        known = usable_urls(self._cluster.peer_urls())
        near = [url for url in urls if is_local(url)]
        if near and not all(map(is_local, known)):
            package_logger("etcdhttp").warning(
                "a member is added at %s, which each member takes for its own machine; if it runs"
                " elsewhere, give its address with PUT /v2/members/<id>", ",".join(near),
            )

    def _change(self, request: HttpRequest, change: ConfChangeType, member: Member) -> None:
        done = functools.partial(self._reply_change, request, change, member)
        self._server.change_member(change, member, done)

    def _reply_change(
        self, request: HttpRequest, change: ConfChangeType, member: Member,
        error: Optional[Exception],
    ) -> None:
        if error is None and change == ConfChangeType.ADD_NODE:
            self._reply(request, 201, member.client_json() + "\n")
        elif error is None:
            request.reply(204, headers=self._cluster_line)
        elif isinstance(error, (PeerUrlExists, MemberExists)):
            self._message(request, 409, str(error))
        elif isinstance(error, MemberNotFound):
            self._message(request, 404, f"No such member: {format_id(member.id)}")
        elif isinstance(error, MemberRemoved) and change == ConfChangeType.REMOVE_NODE:
            text = f"Member permanently removed: {format_id(member.id)}"
            self._message(request, 410, text)
        else:
            cause = error.cause if isinstance(error, EtcdError) else str(error)
            package_logger("etcdhttp").error("got unexpected response error (%s)", cause)
            is_refused = isinstance(error, ReconfigurationRefused)  # etcd only logs the reason
            self._message(request, 500, str(error) if is_refused else "Internal Server Error")

    def _reply(self, request: HttpRequest, status: int, body: str) -> None:
        request.reply(status, utf8(body), "application/json", self._cluster_line)

    def _message(self, request: HttpRequest, status: int, message: str) -> None:
        write_message(request, status, message, self._cluster_line)
