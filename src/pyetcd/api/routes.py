"""The tables of paths of the client port and the peer port."""

from __future__ import annotations

import functools
import logging
import operator
from typing import Callable, Dict, FrozenSet, Optional, Sequence, Tuple

from ..base.basics import is_clean_path
from ..base.ids import package_logger
from ..base.limits import REGISTRY_KEY, V3_REFUSAL
from ..base.text import json_string, utf8
from ..member.auth import Auth, Guard
from ..member.cluster import format_id
from ..member.server import EtcdServer
from ..net.http_messages import HttpHead
from ..net.http_requests import Handler, HttpRequest
from .auth import AuthApi, refuse_credentials
from .forms import not_found, refuse_method
from .keys import KeysApi
from .members import MembersApi, redirect
from .overview import reply_report
from .request_log import log_reply
from .snapshot import SnapshotApi
from .status import StatusApi, version_json
from .ui import UiApi


class CorsRequest(HttpRequest):
    """A request whose reply has the headers of CORS."""

    __slots__ = ("_lines", "is_allowed")

    def __init__(self, request: HttpRequest, lines: str, *, is_allowed: bool) -> None:
        super().__init__(request.head, request.body, request.connection)
        self.body_too_large = request.body_too_large
        self.is_allowed = is_allowed    # scripts of its origin may use the API
        self._lines = lines

    def _head_bytes(
        self, status: int, content_type: Optional[str], headers: str, framing: str
    ) -> bytes:
        return super()._head_bytes(status, content_type, self._lines + headers, framing)

    def reply_raw(self, data: bytes, more: Sequence[bytes] = ()) -> None:
        status_line, _, rest = data.partition(b"\r\n")
        lines = self._lines.encode("latin-1")
        super().reply_raw(b"%b\r\n%b%b" % (status_line, lines, rest), more)


def allow_origin(request: HttpRequest, origins: FrozenSet[str]) -> HttpRequest:
    """Return `request` so that its reply has CORS headers, with `Vary: Origin` for caches."""
    if not origins:
        return request
    lines, origin = "", "*"
    if "*" not in origins:
        lines, origin = "Vary: Origin\r\n", request.headers.get("origin", "")
    is_allowed = origin in origins
    if is_allowed:
        lines += (
            "Access-Control-Allow-Headers: accept, content-type, authorization\r\n"
            "Access-Control-Allow-Methods: POST, GET, OPTIONS, PUT, DELETE\r\n"
            f"Access-Control-Allow-Origin: {origin}\r\n"
        )
    return CorsRequest(request, lines, is_allowed=is_allowed)


class ClientApi:
    """The client port: a table from path to handler.

    fallback  handles paths that etcd does not have; returns True if it answered.  Set by the owner

    The handler for a head is kept in HttpHead.parsed, with the version of users and roles for which
    it was found: heads are cached, so most requests skip the search.  Thread: reactor.
    Source: etcd 2.3 etcdhttp/client.go, pkg/cors, Go http.ServeMux.
    """

    def __init__(self, server: EtcdServer) -> None:
        self.fallback: Callable[[HttpRequest], bool] = lambda request: False
        self._origins = frozenset(server.config.cors)
        self._log = package_logger("etcdhttp")
        self._applier = server.applier
        auth = Auth(server.store, server.applier, server.reactor)
        self._guard = Guard(auth, server.reactor)
        self._auth = AuthApi(server, auth, self._guard)
        self._keys = KeysApi(server, self._guard)
        self._members = MembersApi(server)
        self._ui = UiApi(server, auth, self._guard, self._keys)
        status, snapshot = StatusApi(server), SnapshotApi(server)
        self._routes: Dict[str, Tuple[Tuple[str, ...], Handler]] = {
            "/v2/members": (MembersApi.METHODS, self._members.handle),
            "/v2/snapshot": (SnapshotApi.METHODS, snapshot.handle),
            "/v2/machines": (("GET", "HEAD"), status.machines),
            "/v2/stats/self": (("GET",), status.stats_self),
            "/v2/stats/leader": (("GET",), status.stats_leader),
            "/v2/stats/store": (("GET",), status.stats_store),
            "/version": (("GET",), status.version),
            "/health": (("GET",), status.health),
            "/metrics": ((), status.metrics),
            "/debug/vars": (("GET",), status.debug_vars),
            "/config/local/log": (("PUT",), status.log_level),
            **{path: (("GET",), status.probe) for root, checks in StatusApi.CHECKS.items()
               for path in (root, *(f"{root}/{check}" for check in checks))},
        }

    def stop(self) -> None:
        self._ui.stop()

    @property
    def handler(self) -> Handler:
        return self._serve_with_cors if self._origins else self.serve

    def _serve_with_cors(self, request: HttpRequest) -> None:
        self.serve(allow_origin(request, self._origins))

    def serve(self, request: HttpRequest) -> None:
        """Answer a request, or one that was made from it, such as that of the registry."""
        if self._log.isEnabledFor(logging.DEBUG):
            log_reply(request, self._log)
        head = request.head
        decided: Optional[Tuple[int, Handler]] = head.parsed
        version = self._applier.auth_changes
        if decided is None or decided[0] != version:
            decided = head.parsed = version, self._route(head)
        decided[1](request)

    def _route(self, head: HttpHead) -> Handler:
        """Return the handler of requests with this head.  The order of the checks is etcd's."""
        path = head.path
        if head.method == "OPTIONS":
            return _reply_empty
        if not path.startswith("/"):
            return _bad_request
        if not is_clean_path(path):
            return redirect
        refusal = self._ui.refusal(head, self._origins)
        if refusal is not None:
            return refusal
        if path == "/v2/keys" or path.startswith("/v2/keys/"):
            return self._keys.route(head)
        if path.startswith("/v2/auth/"):
            return self._auth.route(head)
        of_page = self._ui.route(head)
        if of_page is not None:
            return of_page
        name = "/v2/members" if path.startswith("/v2/members/") else path
        if path == "/new":              # makes a discovery token, which is a write
            return self._guard.key(
                head, REGISTRY_KEY + "/", write=True, recursive=False, passed=self._unknown,
                refused=refuse_credentials,
            )
        if name.startswith(("/v3/", "/v3alpha/", "/v3beta/")):
            return _refuse_v3
        if name not in self._routes:
            return self._unknown
        methods, handler = self._routes[name]
        if methods and head.method not in methods:
            return functools.partial(refuse_method, ",".join(methods))
        if name == "/v2/snapshot":
            return self._guard.root(head, handler, _refuse_hashes, hashes=True)
        if name == "/config/local/log" or (name == "/v2/members" and head.method != "GET"):
            return self._guard.root(head, handler, refuse_credentials)
        return handler

    def _unknown(self, request: HttpRequest) -> None:
        if not self.fallback(request):
            not_found(request)


def _refuse_v3(request: HttpRequest) -> None:
    """Answer etcd 3's JSON gateway clients 501 and gRPC's 12: a 404 is a missing key to them."""
    text = json_string(V3_REFUSAL)
    request.reply(501, f'{{"error":{text},"message":{text},"code":12}}'.encode())


_reply_empty: Handler = operator.methodcaller("reply", 200)
_bad_request: Handler = operator.methodcaller("reply", 400)


def _refuse_hashes(request: HttpRequest) -> None:
    text = "the snapshot holds password hashes: it is for users with the role root"
    request.reply(401, f'{{"message":"Insufficient credentials; {text}"}}'.encode())


class PeerApi:
    """The peer port.  Source: etcd 2.3 etcdhttp/peer.go.  Thread: reactor."""

    def __init__(self, server: EtcdServer) -> None:
        self._server = server

    def handle(self, request: HttpRequest) -> None:
        """Answer a request of a member, or of one that is about to join."""
        path = request.path
        if not path.startswith("/"):
            _bad_request(request)
        elif not is_clean_path(path):
            redirect(request)
        elif path in ("/members", "/version", "/status"):
            self._describe_cluster(request, path)
        elif not self._server.transport.handle(request):
            not_found(request)

    def _describe_cluster(self, request: HttpRequest, path: str) -> None:
        if request.method != "GET":
            refuse_method("GET", request)
        elif path == "/version":
            request.reply(200, version_json(self._server))
        elif path == "/status":             # for the page of another member
            reply_report(self._server, request)
        else:
            cluster = self._server.cluster
            members = sorted(cluster.members.values())
            body = "[" + ",".join(member.context_json() for member in members) + "]\n"
            headers = f"X-Etcd-Cluster-Id: {format_id(cluster.id)}\r\n"
            request.reply(200, utf8(body), "application/json", headers)
