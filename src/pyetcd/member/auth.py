"""Auth records in the store, their changes through consensus, and the guard before a request.

Source: etcd 2.3 etcdserver/auth, etcdhttp/client_security.go.
"""

from __future__ import annotations

import base64
import functools
from typing import Any, Callable, Dict, Generator, List, Optional, Tuple, Type, Union

from ..base.errors import EtcdError, KeyNotFound, NodeExists, RaftInternal
from ..base.messages import Request
from ..base.text import json_string, json_text, load_json, text_of, utf8
from ..net.http_messages import HttpHead
from ..net.http_requests import Handler, HttpRequest
from ..net.reactor import Reactor
from ..net.workers import ThrottledLog
from ..store.tree import Store
from .applier import Applier
from .passwords import (
    _TRY_AGAIN,
    AUTH_LOG,
    AUTH_NAME_BYTES_MAX,
    AUTH_PREFIX,
    EVERYTHING,
    GUEST,
    ROOT,
    AuthError,
    Names,
    PasswordChecks,
    Permissions,
    Role,
    Sender,
    User,
    go_text,
    make_permissions,
    string_list,
)


class Auth:
    """Users and roles as the store has them, and the accesses that they allow.

    Decisions hold until `version` changes.  Thread: reactor.
    """

    def __init__(self, store: Store, applier: Applier, reactor: Reactor) -> None:
        self.checks = PasswordChecks(reactor)
        self._store = store
        self._applier = applier
        self._seen = -1
        self._enabled = False
        self._records: Dict[Tuple[str, str], Any] = {}      # kind and name -> User or Role

    @property
    def version(self) -> int:
        """A number that changes with every change of users, roles, or enabled."""
        return self._applier.auth_changes

    @property
    def enabled(self) -> bool:
        self._refresh()
        return self._enabled

    def user(self, name: str) -> Optional[User]:
        """Return a user, with the role root if it is root."""
        user: Optional[User] = self._record("user", name)
        return user

    def role(self, name: str) -> Optional[Role]:
        """Return a role; root exists without being stored."""
        role: Optional[Role] = Role(ROOT, EVERYTHING)
        return role if name == ROOT else self._record("role", name)

    def _record(self, kind: str, name: str) -> Any:
        self._refresh()
        key = kind, name
        if key not in self._records:    # missing records are not remembered
            stored = self._store.value(f"{AUTH_PREFIX}/{kind}s/{name}")
            if not stored:
                return None
            self._records[key] = parse_stored(kind, name, stored)
        return self._records[key]

    def _refresh(self) -> None:
        if self._seen != self._applier.auth_changes:
            self._seen = self._applier.auth_changes
            self._records = {}
            self._enabled = self._store.value(AUTH_PREFIX + "/enabled") == "true"

    def stored_hash(self, name: str) -> str:
        """Return a user's password hash; for an unknown one, a hash as slow as root's."""
        user = self.user(name)
        if user is not None:
            return user.password
        root = self.user(ROOT)
        return self.checks.passwords.decoy(root.password if root is not None else "")

    def names(self, kind: str) -> List[str]:
        """Return sorted names of `users`, or `roles` with root; as in etcd no hidden ones, `_*`."""
        children = self._store.children(f"{AUTH_PREFIX}/{kind}")
        names = [name for name, is_dir in children if not is_dir and not name.startswith("_")]
        return sorted(names + [ROOT] if kind == "roles" else names)

    @property
    def has_users(self) -> bool:
        """True if there are users, hidden ones included; auth may be off."""
        return bool(self._store.children(AUTH_PREFIX + "/users"))

    def may_access(self, user: Optional[User], key: str, *, write: bool, recursive: bool) -> bool:
        """True if a verified user (None: a guest) may read or write `key`."""
        if user is None:
            role = self.role(GUEST)
            return role is not None and role.allow(key, write=write, recursive=False)
        for name in user.roles or ():
            role = self.role(name)
            if role is not None and role.allow(key, write=write, recursive=recursive):
                return True
        AUTH_LOG.warning("invalid access for user %s on key %s.", user.name, key)
        return False

    @staticmethod
    def is_root(user: Optional[User]) -> bool:
        if user is not None and ROOT not in (user.roles or ()):
            AUTH_LOG.warning(
                "user %s does not have the %s role for this resource.", user.name, ROOT
            )
            return False
        return user is not None


def parse_stored(kind: str, name: str, text: str) -> Union[User, Role, None]:
    """Return the `user` or `role` in a record of the store; None, with a log line, if none is."""
    try:
        value = load_json(text)
        if kind == "user":
            password = go_text(str(value["password"]))
            return User(name, password, string_list(value.get("roles"))).with_root()
        kv = value["permissions"]["kv"]
        return Role(name, make_permissions(kv.get("read"), kv.get("write")))
    except (ValueError, KeyError, TypeError, AttributeError):
        AUTH_LOG.error("ignored %s %s: what is stored is no %s", kind, name, kind)
        return None


# A change in steps: yields a Request and gets its Event or EtcdError, or yields a callable, which
# runs on another thread, and gets its result.
Steps = Generator[Union[Request, Callable[[], Any]], Any, Any]


class AuthStore:
    """Changes of users and roles, through consensus: each method returns Steps to the new record.

    A change reads its record through consensus, too, and begins again if the record has changed
    when it writes.  Differs from etcd, where one of two concurrent changes of a user is lost.
    All methods raise AuthError.
    """

    def __init__(self, auth: Auth) -> None:
        self._auth = auth
        self._ensured = False

    def create_user(self, user: User) -> Steps:
        if not user.password:
            raise AuthError(400, f"Cannot create user {user.name} with an empty password")
        hashed = yield functools.partial(self._auth.checks.passwords.hash, user.password)
        user = user._replace(password=hashed).with_root()
        yield from self._create("user", user)
        AUTH_LOG.info("created user %s", user.name)
        return user

    def update_user(self, name: str, password: str, grant: Names, revoke: Names) -> Steps:
        hashed = ""
        if password:
            hashed = yield functools.partial(self._auth.checks.passwords.hash, password)

        def change(old: User) -> User:
            new = old.change_roles(grant, revoke)
            return new._replace(password=hashed) if hashed else new

        return (yield from self._update("user", name, change, "grant/revoke/password"))

    def delete_user(self, name: str) -> Steps:
        if name == ROOT and self._auth.enabled:
            raise AuthError(403, "Cannot delete root user while auth is enabled.")
        missing = AuthError(404, f"User {name} does not exist")
        yield from self._write(f"/users/{name}", KeyNotFound, missing, method="DELETE")
        AUTH_LOG.info("deleted user %s", name)

    def create_role(self, role: Role) -> Steps:
        self._check_role(role.name)
        yield from self._create("role", role)
        AUTH_LOG.info("created new role %s", role.name)
        return role

    def update_role(self, name: str, grant: Permissions, revoke: Permissions) -> Steps:
        self._check_role(name)

        def change(old: Role) -> Role:
            return old._replace(permissions=old.permissions.grant(grant).revoke(revoke))

        return (yield from self._update("role", name, change, "grant/revoke"))

    def delete_role(self, name: str) -> Steps:
        self._check_role(name)
        missing = AuthError(404, f"Role {name} doesn't exist.")
        yield from self._write(f"/roles/{name}", KeyNotFound, missing, method="DELETE")
        AUTH_LOG.info("deleted role %s", name)

    def enable(self) -> Steps:
        """Check requests from now on; there must be a root."""
        if self._auth.enabled:
            raise AuthError(409, "already enabled")
        no_root = AuthError(409, "No root user available, please create one")
        yield from self._read(f"/users/{ROOT}", no_root)
        if self._auth.role(GUEST) is None:
            AUTH_LOG.info("no guest role access found, creating default")
            yield from self.create_role(Role(GUEST, EVERYTHING))
        yield from self._write("/enabled", val="true", prev_exist=True)
        AUTH_LOG.info("auth: enabled auth")

    def disable(self) -> Steps:
        if not self._auth.enabled:
            raise AuthError(409, "already disabled")
        yield from self._write("/enabled", val="false", prev_exist=True)
        AUTH_LOG.info("auth: disabled auth")

    @staticmethod
    def _check_role(name: str) -> None:
        if name == ROOT:
            raise AuthError(403, f"Cannot modify role {name}: is root role.")

    def _create(self, kind: str, record: Union[User, Role]) -> Steps:
        exists = AuthError(409, f"{kind.capitalize()} {record.name} already exists.")
        yield from self._write(
            f"/{kind}s/{record.name}", NodeExists, exists, val=json_text(record.json()),
            prev_exist=False,
        )

    def _update(self, kind: str, name: str, change: Callable[[Any], Any], options: str) -> Steps:
        """Return the changed record; begins again if another change was faster."""
        path, what = f"/{kind}s/{name}", kind.capitalize()
        missing = AuthError(404, f"{what} {name} does not exist.")
        while True:
            text, index = yield from self._read(path, missing)
            old = parse_stored(kind, name, text)
            if old is None:
                raise missing
            new = change(old)
            if new == old:
                raise AuthError(400, f"{what} not updated. Use {options} to update the {kind}.")
            result = yield from self._do(Request(
                method="PUT", path=path, val=json_text(new.json()), prev_exist=True,
                prev_index=index,
            ))
            if not isinstance(result, EtcdError):
                AUTH_LOG.info("updated %s %s", kind, name)
                return new

    def _read(self, path: str, missing: AuthError) -> Steps:
        """Return (value, its index) as of now.  Raises `missing`."""
        result = yield from self._do(Request(method="QGET", path=path))
        if isinstance(result, EtcdError) or result.node.value is None:
            raise missing
        return result.node.value, result.node.modified_index

    def _write(
        self, path: str, error: Type[EtcdError] = EtcdError,
        refusal: Optional[AuthError] = None, method: str = "PUT", **fields: Any,
    ) -> Steps:
        """Write or delete a record.  Raises `refusal` for an `error`, and others as they are."""
        yield from self._ensure_directories()
        result = yield from self._do(Request(method=method, path=path, **fields))
        if isinstance(result, EtcdError):
            raise refusal if refusal is not None and isinstance(result, error) else result

    def _ensure_directories(self) -> Steps:
        """Make the directories before the first change: four indexes of the store, as in etcd."""
        if not self._ensured:
            for path in ("", "/users", "/roles"):
                yield from self._do(Request(method="PUT", path=path, dir=True, prev_exist=False))
            yield from self._do(
                Request(method="PUT", path="/enabled", val="false", prev_exist=False)
            )
            self._ensured = True

    @staticmethod
    def _do(request: Request) -> Steps:
        """Return the event, or the error of the store; raises those of consensus."""
        result = yield request._replace(path=AUTH_PREFIX + request.path)
        if isinstance(result, RaftInternal):
            raise result
        return result


def parse_credential(header: str) -> Optional[Tuple[str, str]]:
    """Return user and password in a Basic Authorization header (RFC 7617); None: malformed."""
    kind, _, encoded = header.partition(" ")
    if kind.lower() != "basic":
        return None
    try:
        user, colon, password = text_of(base64.b64decode(encoded, validate=True)).partition(":")
    except ValueError:
        return None
    return (user, password) if colon else None


class Guard:
    """Decides from its head whether a request may pass.

    A decision is kept with the head until Auth.version changes: the requests of verified clients
    cost no more than without auth.  Thread: reactor.
    """

    def __init__(self, auth: Auth, reactor: Reactor) -> None:
        self._auth = auth
        self._log = ThrottledLog("auth", reactor.now)

    def key(
        self, head: HttpHead, key: str, *, write: bool, recursive: bool, passed: Handler,
        refused: Handler,
    ) -> Handler:
        """Return the handler for an access to `key`; without Authorization, that of a guest."""
        def may(user: Optional[User]) -> bool:
            return self._auth.may_access(user, key, write=write, recursive=recursive)

        return self._decide(head, may, passed, refused)

    def root(
        self, head: HttpHead, passed: Handler, refused: Handler, *, hashes: bool = False
    ) -> Handler:
        """Return the handler for a request that only the role root may make.

        hashes  the answer holds password hashes: if there are users, needs root also without auth
        """
        always = hashes and self._auth.has_users
        return self._decide(head, self._auth.is_root, passed, refused, always=always)

    def _decide(
        self, head: HttpHead, may: Callable[[Optional[User]], bool], passed: Handler,
        refused: Handler, *, always: bool = False,
    ) -> Handler:
        if not (self._auth.enabled or always):
            return passed
        verdict = self._verdict(head, may)
        if verdict is None:
            return functools.partial(self._verify, head, may, passed, refused)
        return passed if verdict else refused

    def _verdict(self, head: HttpHead, may: Callable[[Optional[User]], bool]) -> Optional[bool]:
        """True if the request may pass; None: the password has not been verified yet."""
        header = head.headers.get("authorization", "")
        if not header:
            return may(None)
        credential = parse_credential(header)
        if credential is None:
            self._log.error("malformed basic auth encoding")
            return False
        name, password = credential
        if len(utf8(name)) > AUTH_NAME_BYTES_MAX:
            return False
        right = self._auth.checks.known(name, self._auth.stored_hash(name), password)
        if right is None:
            return None
        user = self._auth.user(name)
        if right and user is not None:
            return may(user)
        why = "no such user" if user is None else "incorrect password for user"
        self._log.error(f"{why}: {name[:64]}.")
        return False

    def _verify(
        self, head: HttpHead, may: Callable[[Optional[User]], bool], passed: Handler,
        refused: Handler, request: HttpRequest,
    ) -> None:
        """Answer as soon as the password is verified."""
        if request.connection.closed:
            return
        verdict = self._verdict(head, may)
        if verdict is not None:
            answer = passed if verdict else refused
            head.parsed = self._auth.version, answer
            answer(request)
            return
        credential = parse_credential(head.headers["authorization"])
        assert credential is not None   # without one there is a verdict
        name, password = credential

        def checked(known: bool) -> None:
            if known:
                self._verify(head, may, passed, refused, request)
            elif not request.connection.closed:
                text = json_string(f"the password could not be checked{_TRY_AGAIN}")
                request.reply(503, f'{{"message":{text}}}'.encode())

        sender = Sender(name, request.remote.rpartition(":")[0])
        self._auth.checks.check(sender, self._auth.stored_hash(name), password, checked)
