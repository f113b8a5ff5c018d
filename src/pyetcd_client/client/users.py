"""Users and roles: methods of the client, and python-etcd's objects on top of them."""

from __future__ import annotations

import contextlib
import json
from typing import Any, Dict, Iterable, List, Mapping, Optional, Set, Union

from ..transport.calls import _JSON_TYPE, _Call, _Caller, _target
from ..transport.errors import EtcdValueError, HttpError, KeyNotFound, NodeExists
from ..transport.results import _parse_maybe_object

_PERMISSIONS = {"read": ("read",), "write": ("write",), "readwrite": ("read", "write")}


class _Users(_Caller):
    """Users, roles, and whether the server asks for them: the auth API of etcd 2.1 and later.

    All but `auth_status` need the role root once auth is enabled; else they raise Unauthorized.
    Dicts are the server's JSON.
    """

    # -- the switch

    def auth_status(self) -> Dict[str, Any]:
        """Return {"enabled": bool}; anybody may ask."""
        return self._auth_call("GET", "/enable")

    def auth_enable(self) -> None:
        """Let the server check every request.  Raises HttpError without a user root, or if it does.

        Whoever comes without a password has the role guest, which may do all until changed.
        """
        self._auth_call("PUT", "/enable", {})

    def auth_disable(self) -> None:
        """Let the server check nothing.  Raises HttpError if it does not check."""
        self._auth_call("DELETE", "/enable")

    # -- users

    def user_list(self) -> List[Dict[str, Any]]:
        """Return the users by name: [{"user": name, "roles": [role, ...]}, ...]."""
        users = self._auth_call("GET", "/users").get("users") or []
        return [{"user": user} if isinstance(user, str) else user for user in users]

    def user_get(self, name: str) -> Dict[str, Any]:
        """Return {"user": name, "roles": [role, ...]}.  Raises KeyNotFound."""
        return self._auth_call("GET", f"/users/{name}")

    def user_add(self, name: str, password: str, roles: Iterable[str] = ()) -> Dict[str, Any]:
        """Make a user.  Raises NodeExists.

        The server would take a second user_add without roles for a change of password; so we look
        first, and two calls at the same moment may both succeed.
        """
        if self._has_user(name):
            raise NodeExists(f"auth: User {name} already exists.")
        fields = {"user": name, "password": password, "roles": list(roles)}
        return self._auth_create(f"/users/{name}", fields)

    def user_remove(self, name: str) -> None:
        """Remove a user.  Raises KeyNotFound; HttpError for root while auth is enabled."""
        self._auth_call("DELETE", f"/users/{name}")

    def user_password(self, name: str, password: str) -> Dict[str, Any]:
        """Give a user another password.  Raises KeyNotFound."""
        if not self._has_user(name):                # the server would make the user
            raise KeyNotFound(f"auth: User {name} does not exist.")
        return self._auth_call("PUT", f"/users/{name}", {"user": name, "password": password})

    def user_grant(self, name: str, roles: Iterable[str]) -> Dict[str, Any]:
        """Give a user more roles.  Raises KeyNotFound; HttpError if one is granted already."""
        return self._auth_call("PUT", f"/users/{name}", {"user": name, "grant": list(roles)})

    def user_revoke(self, name: str, roles: Iterable[str]) -> Dict[str, Any]:
        """Take roles from a user.  Raises KeyNotFound; HttpError if one is not granted."""
        return self._auth_call("PUT", f"/users/{name}", {"user": name, "revoke": list(roles)})

    # -- roles

    def role_list(self) -> List[Dict[str, Any]]:
        """Return the roles by name; root, who may do all, is always there."""
        roles = self._auth_call("GET", "/roles").get("roles") or []
        return [{"role": role} if isinstance(role, str) else role for role in roles]

    def role_get(self, name: str) -> Dict[str, Any]:
        """Return {"role": name, "permissions": {"kv": {"read": [...], "write": [...]}}}.

        Raises KeyNotFound.
        """
        return self._auth_call("GET", f"/roles/{name}")

    def role_add(
        self, name: str, *, read: Iterable[str] = (), write: Iterable[str] = (),
    ) -> Dict[str, Any]:
        """Make a role that may read and write what is at these paths.  Raises NodeExists."""
        permissions = {"kv": {"read": list(read), "write": list(write)}}
        return self._auth_create(f"/roles/{name}", {"role": name, "permissions": permissions})

    def role_remove(self, name: str) -> None:
        """Remove a role.  Raises KeyNotFound.  Users keep its name, which means nothing then."""
        self._auth_call("DELETE", f"/roles/{name}")

    def role_grant(
        self, name: str, path: Union[str, Iterable[str]], kind: str = "readwrite",
    ) -> Dict[str, Any]:
        """Allow a role to `read`, `write` or `readwrite` what is at `path`.

        path  a key, or what all keys begin with if it ends in `*`; or several of them

        Raises KeyNotFound; HttpError if it is granted already.
        """
        return self._role_change(name, "grant", path, kind)

    def role_revoke(
        self, name: str, path: Union[str, Iterable[str]], kind: str = "readwrite",
    ) -> Dict[str, Any]:
        """Take back what `role_grant` gave.  Raises KeyNotFound."""
        return self._role_change(name, "revoke", path, kind)

    # -- below: no public names

    def _auth_call(
        self, method: str, path: str, fields: Optional[Mapping[str, Any]] = None,
    ) -> Dict[str, Any]:
        body = None if fields is None else json.dumps(fields).encode()
        target = _target(f"{self.version_prefix}/auth{path}", {})
        return self._perform(_Call(method, target, _parse_maybe_object, body, _JSON_TYPE))

    def _auth_create(self, path: str, fields: Mapping[str, Any]) -> Dict[str, Any]:
        try:
            return self._auth_call("PUT", path, fields)
        except HttpError as error:
            if error.status != 409:
                raise
            raise NodeExists(error.message, error.payload, status=409,
                             endpoint=error.endpoint) from error

    def _has_user(self, name: str) -> bool:
        return any(user["user"] == name for user in self.user_list())

    def _role_change(
        self, name: str, change: str, path: Union[str, Iterable[str]], kind: str,
    ) -> Dict[str, Any]:
        if kind not in _PERMISSIONS:
            raise EtcdValueError(f"a permission is read, write or readwrite, not {kind!r}")
        paths = [path] if isinstance(path, str) else list(path)
        kv = dict.fromkeys(_PERMISSIONS[kind], paths)
        return self._auth_call("PUT", f"/roles/{name}", {"role": name, change: {"kv": kv}})


class _AuthObject:
    """What EtcdUser and EtcdRole have in common."""

    entity = ""

    def __init__(self, client: _Users, name: str) -> None:
        self.client = client
        self.name = name

    @property
    def uri(self) -> str:
        """Path of this user or role in the API."""
        return f"{self.client.version_prefix}/auth/{self.entity}s/{self.name}"


class EtcdUser(_AuthObject):
    """A user, to be read, changed and written: python-etcd's interface.

    roles     names of the roles; change them, then `write`
    password  set it, then `write`; it cannot be read
    """

    entity = "user"

    def __init__(self, client: _Users, name: str) -> None:
        super().__init__(client, name)
        self._roles: Set[str] = set()
        self._password: Optional[str] = None

    @property
    def names(self) -> List[Dict[str, Any]]:
        """All users, as the server lists them."""
        return self.client.user_list()

    @property
    def roles(self) -> Set[str]:
        """Names of the roles this user has, or shall have."""
        return self._roles

    @roles.setter
    def roles(self, roles: Iterable[str]) -> None:
        """Choose the roles."""
        self._roles = set(roles)

    @property
    def password(self) -> None:
        """Always None: only the server knows it."""
        return None

    @password.setter
    def password(self, password: Optional[str]) -> None:
        """Choose the password."""
        self._password = password

    def read(self) -> None:
        """Take the roles from the server.  Raises KeyNotFound."""
        self.roles = self._stored_roles()

    def write(self) -> None:
        """Make the user, or change what differs.  The password is forgotten here afterwards.

        An existing user takes up to three requests: password, new roles, roles taken away.
        """
        stored: Optional[Set[str]] = None
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

    def delete(self) -> None:
        """Remove the user.  Raises KeyNotFound."""
        self.client.user_remove(self.name)

    def _stored_roles(self) -> Set[str]:
        # Since etcd 2.3 whole roles are listed, before that their names.
        roles = self.client.user_get(self.name).get("roles") or []
        return {role if isinstance(role, str) else role["role"] for role in roles}


class EtcdRole(_AuthObject):
    """A role, to be read, changed and written: python-etcd's interface."""

    entity = "role"

    def __init__(self, client: _Users, name: str) -> None:
        super().__init__(client, name)
        self._paths: Dict[str, Set[str]] = {"read": set(), "write": set()}

    @property
    def names(self) -> List[Dict[str, Any]]:
        """All roles, as the server lists them."""
        return self.client.role_list()

    @property
    def acls(self) -> Dict[str, str]:
        """What the role may do, by path: R, W or RW."""
        read, write = self._paths["read"], self._paths["write"]
        return {path: "R" * (path in read) + "W" * (path in write)
                for path in sorted(read | write)}

    @acls.setter
    def acls(self, acls: Mapping[str, str]) -> None:
        """Choose all permissions."""
        self._paths = {"read": set(), "write": set()}
        for path, permission in acls.items():
            self.grant(path, permission)

    def grant(self, path: str, permission: str) -> None:
        """Allow R, W or RW of `path`, once the role is written."""
        for right in _rights(permission):
            self._paths[right].add(path)

    def revoke(self, path: str, permission: str) -> None:
        """Forbid R, W or RW of `path`, once the role is written."""
        for right in _rights(permission):
            self._paths[right].discard(path)

    def read(self) -> None:
        """Take the permissions from the server.  Raises KeyNotFound."""
        self._paths = self._stored_paths()

    def write(self) -> None:
        """Make the role, or change what differs.

        An existing role takes up to four requests: each right is taken and given by its own.
        """
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

    def delete(self) -> None:
        """Remove the role.  Raises KeyNotFound."""
        self.client.role_remove(self.name)

    def _stored_paths(self) -> Dict[str, Set[str]]:
        kv = self.client.role_get(self.name)["permissions"]["kv"]
        return {right: set(kv.get(right) or ()) for right in ("read", "write")}


def _rights(permission: str) -> List[str]:
    """Return the long names of the letters in R, W or RW."""
    letters = permission.upper()
    if not letters or set(letters) - set("RW"):
        raise EtcdValueError(f"a permission is R, W or RW, not {permission!r}")
    return [right for right in ("read", "write") if right[0].upper() in letters]


class Auth:
    """Whether the server checks users: python-etcd's interface."""

    def __init__(self, client: _Users) -> None:
        self.client = client

    @property
    def active(self) -> bool:
        """Whether requests are checked; assign to switch it."""
        return bool(self.client.auth_status()["enabled"])

    @active.setter
    def active(self, active: bool) -> None:
        """Switch the checks on or off."""
        if active == self.active:
            return
        if active:
            self.client.auth_enable()
        else:
            self.client.auth_disable()


_User = EtcdUser
_Role = EtcdRole
_Switch = Auth


class auth:
    """The names of python-etcd's module of this name."""

    EtcdUser = _User
    EtcdRole = _Role
    Auth = _Switch
