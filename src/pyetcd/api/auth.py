"""The auth API: users, roles.  Source: etcd 2.3 API, auth; etcdhttp/client_auth.go."""

from __future__ import annotations

import functools
import itertools
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from ..base.errors import EtcdError
from ..base.messages import Request
from ..base.text import json_text, utf8
from ..base.versions import version_key
from ..member.auth import Auth, AuthStore, Guard, Steps
from ..member.cluster import format_id
from ..member.passwords import (
    _TRY_AGAIN,
    AUTH_NAME_BYTES_MAX,
    PASSWORD_BYTES_MAX,
    AuthError,
    Names,
    Permissions,
    Role,
    User,
    make_permissions,
    string_list,
)
from ..member.server import EtcdServer
from ..net.http_messages import HttpHead
from ..net.http_requests import Handler, HttpRequest
from ..net.workers import PASSWORD_WORK
from .forms import not_found, refuse_method, write_error, write_message
from .gojson import GoJson

_AUTH_VERSION = (2, 1)              # of a cluster in which all members know users
_ITEM_METHODS = ("GET", "PUT", "DELETE")
ITEMS_IN_SLICE = 100                # users or roles that one turn lists: 2 ms


def refuse_credentials(request: HttpRequest) -> None:
    write_message(request, 401, "Insufficient credentials")


def parse_user_body(body: bytes) -> Tuple[User, Names, Names]:
    """Return the user, the roles to grant and those to revoke of a PUT.  Raises ValueError."""
    value = GoJson.loads(body, partial=True)
    roles, grant, revoke = (
        string_list(GoJson.member(value, name)) for name in ("roles", "grant", "revoke"))
    name, password = (GoJson.string_member(value, name) for name in ("user", "password"))
    return User(name, password, roles), grant, revoke


def parse_role_body(body: bytes) -> Tuple[Role, Permissions, Permissions]:
    """Return the role, what to grant and what to revoke of a PUT.  Raises ValueError."""
    value = GoJson.loads(body, partial=True)
    kvs = [GoJson.member(GoJson.member(value, name), "kv")
           for name in ("permissions", "grant", "revoke")]
    permissions, grant, revoke = (
        make_permissions(GoJson.member(kv, "read"), GoJson.member(kv, "write")) for kv in kvs)
    return Role(GoJson.string_member(value, "role"), permissions), grant, revoke


class AuthApi:
    """/v2/auth/: users, roles, enable.  Thread: reactor."""

    def __init__(self, server: EtcdServer, auth: Auth, guard: Guard) -> None:
        self._server = server
        self._auth = auth
        self._guard = guard
        self._store = AuthStore(auth)
        self._cluster_line = f"X-Etcd-Cluster-Id: {format_id(server.cluster.id)}\r\n"

    def route(self, head: HttpHead) -> Handler:
        if not self._is_capable:
            # The decision is kept with the head, but the cluster may learn its version at any time.
            return lambda request: self.route(head)(request) if self._is_capable else write_message(
                request, 500, "Not capable of accessing auth feature during rolling upgrades."
            )
        kind, _, name = head.path[len("/v2/auth/"):].partition("/")
        if head.path == "/v2/auth/enable":
            return self._allow(head, _ITEM_METHODS, self._enable, is_open=head.method == "GET")
        if kind not in ("users", "roles"):
            return not_found
        if not name:
            listing = self._list_users if kind == "users" else self._list_roles
            return self._allow(head, ("GET",), listing)
        if "/" in name or len(utf8(name)) > AUTH_NAME_BYTES_MAX:
            return lambda request: write_message(request, 400, "Invalid path")
        return self._allow(head, _ITEM_METHODS, functools.partial(self._item, kind, name))

    @property
    def _is_capable(self) -> bool:
        version = self._server.cluster.version
        return version is not None and version_key(version) >= _AUTH_VERSION

    def _allow(
        self, head: HttpHead, methods: Sequence[str], handler: Handler, *, is_open: bool = False
    ) -> Handler:
        if head.method not in methods:
            return functools.partial(refuse_method, ",".join(methods))
        return handler if is_open else self._guard.root(head, handler, refuse_credentials)

    # -- enable ------------------------------------------------------------

    def _enable(self, request: HttpRequest) -> None:
        if request.method == "GET":
            self._reply(request, 200, {"enabled": self._auth.enabled})
        else:
            steps = self._store.enable() if request.method == "PUT" else self._store.disable()
            self._run(request, steps, lambda _: self._reply_empty(request))

    # -- users and roles ---------------------------------------------------

    def _item(self, kind: str, name: str, request: HttpRequest) -> None:
        is_user = kind == "users"
        if request.method == "GET":
            try:
                found = self._user(name) if is_user else self._role(name).json()
                self._reply(request, 200, found)
            except AuthError as error:
                self._fail(request, error)
        elif request.method == "DELETE":
            delete = self._store.delete_user if is_user else self._store.delete_role
            self._run(request, delete(name), lambda _: self._reply_empty(request))
        else:
            (self._put_user if is_user else self._put_role)(name, request)

    def _user(self, name: str) -> Dict[str, object]:
        user = self._auth.user(name)
        if user is None:
            raise AuthError(404, f"User {name} does not exist.")
        return self._with_roles(user, map(self._role, user.roles or ()))

    def _role(self, name: str) -> Role:
        role = self._auth.role(name)
        if role is None:
            raise AuthError(404, f"Role {name} does not exist.")
        return role

    def _list_users(self, request: HttpRequest) -> None:
        users = filter(None, map(self._auth.user, self._auth.names("users")))
        shown = (
            self._with_roles(user, filter(None, map(self._auth.role, user.roles or ())))
            for user in users
        )
        self._reply_list(request, "users", shown, [])

    @staticmethod
    def _with_roles(user: User, roles: Iterator[Role]) -> Dict[str, object]:
        shown = [role.json() for role in roles]
        return {"user": user.name, **({"roles": shown} if shown else {})}

    def _put_user(self, name: str, request: HttpRequest) -> None:
        body = self._parse(request, parse_user_body, name, "User")
        if body is None:
            return
        user, grant, revoke = body
        if user.roles and (grant or revoke):
            self._message(request, 400, "User JSON contains both roles and grant/revoke")
            return
        if len(utf8(user.password)) > PASSWORD_BYTES_MAX or "\0" in user.password:
            self._message(request, 400, "the password is too long, or has a NUL in it")
            return
        updates = bool(grant or revoke) or not user.roles and self._auth.user(name)
        if updates:
            steps = self._store.update_user(name, user.password, grant, revoke)
        else:
            steps = self._store.create_user(user)
        status = 200 if updates or user.roles else 201
        self._run(request, steps,
                  lambda user: self._reply(request, status, user.json(hide_password=True)))

    # -- roles -------------------------------------------------------------

    def _list_roles(self, request: HttpRequest) -> None:
        roles = filter(None, map(self._auth.role, self._auth.names("roles")))
        self._reply_list(request, "roles", (role.json() for role in roles), [])

    def _put_role(self, name: str, request: HttpRequest) -> None:
        body = self._parse(request, parse_role_body, name, "Role")
        if body is None:
            return
        role, grant, revoke = body
        updates = not (grant.is_empty and revoke.is_empty)
        if updates and not role.permissions.is_empty:
            self._message(request, 400, "Role JSON contains both permissions and grant/revoke")
            return
        if updates:
            steps = self._store.update_role(name, grant, revoke)
        else:
            steps = self._store.create_role(role)
        self._run(request, steps,
                  lambda role: self._reply(request, 200 if updates else 201, role.json()))

    # -- answers -----------------------------------------------------------

    def _parse(
        self, request: HttpRequest, parse: Callable[[bytes], Any], name: str, what: str
    ) -> Any:
        """Return the parsed body; None after an error, which is answered."""
        if request.body_too_large:
            self._message(request, 413, "Request Entity Too Large")
            return None
        try:
            body = parse(request.body)
        except ValueError:
            self._message(request, 400, "Invalid JSON in request body.")
            return None
        if body[0].name != name:
            self._message(request, 400, f"{what} JSON name does not match the name in the URL")
            return None
        return body

    def _run(
        self, request: HttpRequest, steps: Steps, reply: Callable[[Any], None], value: Any = None
    ) -> None:
        """Run `steps` on from `value`; at their end call reply(result), or answer the error."""
        go_on = functools.partial(self._run, request, steps, reply)

        def worked(error: Optional[BaseException], result: Any) -> None:
            if error is None:
                go_on(result)
            elif isinstance(error, AuthError):
                self._fail(request, error)
            else:
                self._fail(request, AuthError(503, f"{error}{_TRY_AGAIN}"))

        try:
            step = steps.send(value)
        except StopIteration as stop:
            reply(stop.value)
        except (AuthError, EtcdError) as error:
            self._fail(request, error.with_traceback(None))
        else:
            if isinstance(step, Request):
                self._server.do(step, go_on)
            else:
                self._server.reactor.run_blocking(step, kind=PASSWORD_WORK, done=worked)

    def _fail(self, request: HttpRequest, error: Union[AuthError, EtcdError]) -> None:
        if isinstance(error, EtcdError):
            write_error(request, error, self._cluster_line)
        else:
            self._message(request, error.status, str(error))

    def _message(self, request: HttpRequest, status: int, message: str) -> None:
        write_message(request, status, message, self._cluster_line)

    def _reply(self, request: HttpRequest, status: int, value: object) -> None:
        request.reply(status, utf8(json_text(value) + "\n"), headers=self._cluster_line)

    def _reply_list(
        self, request: HttpRequest, name: str, shown: Iterator[object], texts: List[str]
    ) -> None:
        """Answer with all of `shown`; one turn formats ITEMS_IN_SLICE of them."""
        some = [json_text(item) for item in itertools.islice(shown, ITEMS_IN_SLICE)]
        texts += some
        if request.connection.closed:
            return
        if len(some) == ITEMS_IN_SLICE:
            self._server.reactor.call_in_turn(self._reply_list, request, name, shown, texts)
            return
        listing = f"[{','.join(texts)}]" if texts else "null"
        request.reply(200, utf8(f'{{"{name}":{listing}}}\n'), headers=self._cluster_line)

    def _reply_empty(self, request: HttpRequest) -> None:
        request.reply(200, headers="Content-Type: application/json\r\n" + self._cluster_line)
