"""Users and roles: methods of the client, and python-etcd's objects on top of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..transport.calls import _JSON_TYPE, _Call, _Caller, _target
from ..transport.errors import EtcdValueError, HttpError, KeyNotFound, NodeExists
from ..transport.results import _parse_object

_PERMISSIONS = {"read": ("read",), "write": ("write",), "readwrite": ("read", "write")}


class _Users(_Caller):
    """Users, roles and authentication: the auth API of etcd 2.1 and later.

    While auth is enabled all but `auth_status` need the role root, or raise Unauthorized.  Dicts
    are the server's JSON.
    """

    def auth_status(self) -> dict[str, Any]:
        """Return {"enabled": bool}; needs no role."""
        return self._auth_call("GET", "/enable")

    def auth_enable(self) -> None:
        """Enable auth.  Raises HttpError without a user root, or if it is enabled.

        Requests without a password have the role guest, which permits everything until changed.
        """
        self._auth_call("PUT", "/enable", {})

    def auth_disable(self) -> None:
        """Disable auth.  Raises HttpError if it is disabled."""
        self._auth_call("DELETE", "/enable")

    # -- users

    def user_list(self) -> list[dict[str, Any]]:
        """Return the users by name: [{"user": name, "roles": [role, ...]}, ...]."""
        return self._auth_list("user")

    def user_get(self, name: str) -> dict[str, Any]:
        """Return {"user": name, "roles": [role, ...]}.  Raises KeyNotFound."""
        return self._auth_call("GET", f"/users/{name}")

    def user_add(self, name: str, password: str, roles: Iterable[str] = ()) -> dict[str, Any]:
        """Create a user.  Raises NodeExists; but two concurrent calls may both succeed.

        The server treats a second user_add without roles as a change of password, so the client
        reads the users first.
        """
        if self._has_user(name):
            raise NodeExists(f"auth: User {name} already exists.")
        fields = {"user": name, "password": password, "roles": list(roles)}
        return self._auth_create(f"/users/{name}", fields)

    def user_remove(self, name: str) -> None:
        """Remove a user.  Raises KeyNotFound; HttpError for root while auth is enabled."""
        self._auth_call("DELETE", f"/users/{name}")

    def user_password(self, name: str, password: str) -> dict[str, Any]:
        """Change the password of a user.  Raises KeyNotFound."""
        if not self._has_user(name):                # the server would create the user
            raise KeyNotFound(f"auth: User {name} does not exist.")
        return self._auth_call("PUT", f"/users/{name}", {"user": name, "password": password})

    def user_grant(self, name: str, roles: Iterable[str]) -> dict[str, Any]:
        """Grant roles to a user.  Raises KeyNotFound; HttpError if one is granted already."""
        return self._auth_call("PUT", f"/users/{name}", {"user": name, "grant": list(roles)})

    def user_revoke(self, name: str, roles: Iterable[str]) -> dict[str, Any]:
        """Revoke roles of a user.  Raises KeyNotFound; HttpError if one is not granted."""
        return self._auth_call("PUT", f"/users/{name}", {"user": name, "revoke": list(roles)})

    # -- roles

    def role_list(self) -> list[dict[str, Any]]:
        """Return the roles by name; the role root, with all rights, always exists."""
        return self._auth_list("role")

    def role_get(self, name: str) -> dict[str, Any]:
        """Return {"role": name, "permissions": {"kv": {"read": [...], "write": [...]}}}.

        Raises KeyNotFound.
        """
        return self._auth_call("GET", f"/roles/{name}")

    def role_add(self, name: str, *, read: Iterable[str] = (),
                 write: Iterable[str] = ()) -> dict[str, Any]:
        """Create a role with the right to read and write these paths.  Raises NodeExists."""
        permissions = {"kv": {"read": list(read), "write": list(write)}}
        return self._auth_create(f"/roles/{name}", {"role": name, "permissions": permissions})

    def role_remove(self, name: str) -> None:
        """Remove a role.  Raises KeyNotFound.  Users keep its name, without effect."""
        self._auth_call("DELETE", f"/roles/{name}")

    def role_grant(self, name: str, path: str | Iterable[str],
                   kind: str = "readwrite") -> dict[str, Any]:
        """Grant a role the right to `read`, `write` or `readwrite` a path.

        path  a key, a prefix of keys if it ends in `*`, or several of both

        Raises KeyNotFound; HttpError if it is granted already.
        """
        return self._role_change(name, "grant", path, kind)

    def role_revoke(self, name: str, path: str | Iterable[str],
                    kind: str = "readwrite") -> dict[str, Any]:
        """Undo `role_grant`.  Raises KeyNotFound."""
        return self._role_change(name, "revoke", path, kind)

    def _auth_call(self, method: str, path: str,
                   fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
        body = None if fields is None else json.dumps(fields).encode()
        target = _target(f"{self.version_prefix}/auth{path}", {})
        return self._perform(_Call(
            method, target, lambda reply: _parse_object(reply) if reply.body.strip() else {}, body,
            _JSON_TYPE))

    def _auth_list(self, entity: str) -> list[dict[str, Any]]:
        entries = self._auth_call("GET", f"/{entity}s").get(f"{entity}s") or []
        return [{entity: entry} if isinstance(entry, str) else entry for entry in entries]

    def _auth_create(self, path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._auth_call("PUT", path, fields)
        except HttpError as error:
            if error.status != 409:
                raise
            raise NodeExists(error.message, error.payload, status=409,
                             endpoint=error.endpoint) from error

    def _has_user(self, name: str) -> bool:
        return any(user["user"] == name for user in self.user_list())

    def _role_change(self, name: str, change: str, path: str | Iterable[str],
                     kind: str) -> dict[str, Any]:
        if kind not in _PERMISSIONS:
            raise EtcdValueError(f"a permission is read, write or readwrite, not {kind!r}")
        paths = [path] if isinstance(path, str) else list(path)
        kv = dict.fromkeys(_PERMISSIONS[kind], paths)
        return self._auth_call("PUT", f"/roles/{name}", {"role": name, change: {"kv": kv}})


class _AuthObject:
    entity = ""

    def __init__(self, client: _Users, name: str) -> None:
        self.client = client
        self.name = name

    @property
    def uri(self) -> str:
        return f"{self.client.version_prefix}/auth/{self.entity}s/{self.name}"

    @property
    def names(self) -> list[dict[str, Any]]:
        """All users or all roles in the server's JSON."""
        return self.client._auth_list(self.entity)

    def delete(self) -> None:
        """Remove the user or role.  Raises KeyNotFound."""
        self.client._auth_call("DELETE", f"/{self.entity}s/{self.name}")


class EtcdUser(_AuthObject):
    """A user to read, change and write: python-etcd's interface.

    roles     names of the roles; change them, then `write`
    password  set it, then `write`; it cannot be read
    """

    entity = "user"

    def __init__(self, client: _Users, name: str) -> None:
        super().__init__(client, name)
        self._roles: set[str] = set()
        self._password: str | None = None

    @property
    def roles(self) -> set[str]:
        return self._roles

    @roles.setter
    def roles(self, roles: Iterable[str]) -> None:
        self._roles = set(roles)

    @property
    def password(self) -> None:
        return None

    @password.setter
    def password(self, password: str | None) -> None:
        self._password = password

    def read(self) -> None:
        """Read the roles from the server.  Raises KeyNotFound."""
        self.roles = self._stored_roles()

    def write(self) -> None:
        """Create the user or write the differences, in up to three requests; drop the password."""
        stored: set[str] | None = None
        with contextlib.suppress(KeyNotFound):
            stored = self._stored_roles()
        password, self._password = self._password, None
        if stored is None:
            self.client.user_add(self.name, password or "", sorted(self.roles))
            return
        if password:
            self.client.user_password(self.name, password)
        if self.roles - stored:
            self.client.user_grant(self.name, sorted(self.roles - stored))
        if stored - self.roles:
            self.client.user_revoke(self.name, sorted(stored - self.roles))

    def _stored_roles(self) -> set[str]:
        # Since etcd 2.3 the server lists whole roles, before that their names.
        roles = self.client.user_get(self.name).get("roles") or []
        return {role if isinstance(role, str) else role["role"] for role in roles}


class EtcdRole(_AuthObject):
    """A role to read, change and write: python-etcd's interface."""

    entity = "role"

    def __init__(self, client: _Users, name: str) -> None:
        super().__init__(client, name)
        self._paths: dict[str, set[str]] = {"read": set(), "write": set()}

    @property
    def acls(self) -> dict[str, str]:
        """The permissions by path: R, W or RW."""
        read, write = self._paths["read"], self._paths["write"]
        return {path: "R" * (path in read) + "W" * (path in write) for path in sorted(read | write)}

    @acls.setter
    def acls(self, acls: Mapping[str, str]) -> None:
        self._paths = {"read": set(), "write": set()}
        for path, permission in acls.items():
            self.grant(path, permission)

    def grant(self, path: str, permission: str) -> None:
        """Add R, W or RW of `path`; `write` sends it."""
        for right in _rights(permission):
            self._paths[right].add(path)

    def revoke(self, path: str, permission: str) -> None:
        """Remove R, W or RW of `path`; `write` sends it."""
        for right in _rights(permission):
            self._paths[right].discard(path)

    def read(self) -> None:
        """Read the permissions from the server.  Raises KeyNotFound."""
        self._paths = self._stored_paths()

    def write(self) -> None:
        """Create the role, or write the differences in up to four requests, two for each right."""
        try:
            stored = self._stored_paths()
        except KeyNotFound:
            self.client.role_add(
                self.name, **{right: sorted(paths) for right, paths in self._paths.items()})
            return
        for right, paths in self._paths.items():
            if stored[right] - paths:
                self.client.role_revoke(self.name, sorted(stored[right] - paths), right)
            if paths - stored[right]:
                self.client.role_grant(self.name, sorted(paths - stored[right]), right)

    def _stored_paths(self) -> dict[str, set[str]]:
        kv = self.client.role_get(self.name)["permissions"]["kv"]
        return {right: set(kv.get(right) or ()) for right in ("read", "write")}


def _rights(permission: str) -> list[str]:
    letters = permission.upper()
    if not letters or set(letters) - set("RW"):
        raise EtcdValueError(f"a permission is R, W or RW, not {permission!r}")
    return [right for right in ("read", "write") if right[0].upper() in letters]


class Auth:
    """The switch of authentication: python-etcd's interface."""

    def __init__(self, client: _Users) -> None:
        self.client = client

    @property
    def active(self) -> bool:
        """Whether the server checks requests; assign to switch it."""
        return bool(self.client.auth_status()["enabled"])

    @active.setter
    def active(self, active: bool) -> None:
        if active != self.active:
            (self.client.auth_enable if active else self.client.auth_disable)()


_User, _Role, _Switch = EtcdUser, EtcdRole, Auth


class auth:
    """The names of python-etcd's module `etcd.auth`."""

    EtcdUser = _User
    EtcdRole = _Role
    Auth = _Switch
