"""The Client class: members, status, and requests without a verb of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Callable
from urllib.parse import parse_qsl, unquote, urlsplit

from requests.structures import CaseInsensitiveDict

from ..transport.calls import _JSON_TYPE, _Call, _Caller, _encode_fields, _Field, _target, _text
from ..transport.connections import Scope
from ..transport.endpoints import _base_url
from ..transport.errors import EtcdValueError, LeaderElectionInProgress
from ..transport.results import _T, Member, _keep_reply, _parse_members, _parse_object, _Reply
from .users import _Users
from .watching import _Watching

_HEALTH_STATUSES: frozenset[int] = frozenset((200, 503))    # /health, /v2/members/leader


def _as_reply(answer: Any) -> _Reply:
    """Return a reply that the program obtained by other means, such as urllib3."""
    if isinstance(answer, _Reply):
        return answer
    headers = answer.headers if hasattr(answer, "headers") else answer.getheaders()
    return _Reply(answer.status, CaseInsensitiveDict(headers), answer.data)


def _parse_version(reply: _Reply) -> dict[str, str]:
    text = reply.body.decode("utf-8", "replace").strip()
    if text.startswith("etcd "):                    # etcd 2.0 answers "etcd 2.0.13"
        return {"etcdserver": text[5:]}
    return {str(name): str(value) for name, value in _parse_object(reply).items()}


class _Cluster(_Caller):
    _MGET, _MPUT, _MPOST, _MDELETE = "GET", "PUT", "POST", "DELETE"     # python-etcd's names

    # -- members

    def member_list(self) -> list[Member]:
        """Return the members of the cluster, ordered by id."""
        return self._perform(_Call("GET", f"{self.version_prefix}/members", _parse_members))

    def leader_member(self) -> Member | None:
        """Return the leader known to the replying member; None during an election."""
        return self._perform(_Call(
            "GET", f"{self.version_prefix}/members/leader",
            lambda reply: Member.from_json(_parse_object(reply)) if reply.status == 200 else None,
            statuses=_HEALTH_STATUSES))

    def member_add(self, peer_urls: str | Iterable[str]) -> Member:
        """Add a member before it starts.  Raises HttpError 409 if another one has such a URL."""
        return self._perform(self._members_call(
            "POST", "", peer_urls, lambda reply: Member.from_json(_parse_object(reply))))

    def member_update(self, id: str, peer_urls: str | Iterable[str]) -> None:
        """Change the peer URLs of a member.  Raises KeyNotFound."""
        self._perform(self._members_call("PUT", f"/{id}", peer_urls, _keep_reply))

    def member_remove(self, id: str) -> None:
        """Remove a member.  Raises KeyNotFound; HttpError 410 if it is removed already."""
        path = f"{self.version_prefix}/members/{id}"
        self._perform(_Call("DELETE", _target(path, {}), _keep_reply))

    # -- status of the replying member

    def statistics(self, name: str = "self") -> dict[str, Any]:
        """Return statistics of the member: `self`, `store` or (from the leader only) `leader`."""
        if name not in ("self", "store", "leader"):
            raise EtcdValueError(f"no such statistics: {name!r}; there are self, store and leader")
        return self._perform(_Call("GET", f"{self.version_prefix}/stats/{name}", _parse_object))

    def server_version(self) -> dict[str, str]:
        """Return {"etcdserver": ..., "etcdcluster": ...} of the replying member."""
        return self._perform(_Call("GET", "/version", _parse_version))

    def health(self, endpoint: str | None = None) -> bool:
        """Return whether a server (default: the one in use) is healthy.  Raises TransportError."""
        # A string in 2.x and 3.4, a boolean in the "nhealth" form that etcdctl accepts too.
        call = _Call("GET", "/health", lambda reply: _parse_object(reply)["health"] in (
            "true", True), statuses=_HEALTH_STATUSES)
        with Scope(self.total_timeout, self.scope) as scope:
            if endpoint is None:
                self._discover_endpoints(scope.deadline)
            base_url = self.endpoints.current if endpoint is None else _base_url(endpoint)
            return self._attempt(base_url, call, scope.deadline)

    # -- properties of python-etcd: each sends a request, except for the last six

    @property
    def machines(self) -> list[str]:
        """Client URLs of all members."""
        return self._perform(_Call(
            "GET", f"{self.version_prefix}/machines",
            lambda reply: reply.body.decode("utf-8", "replace").replace(",", " ").split()))

    @property
    def members(self) -> dict[str, dict[str, Any]]:
        """The members in the API's JSON, by id."""
        return {member.id: dict(member.raw) for member in self.member_list()}

    @property
    def leader(self) -> dict[str, Any]:
        """The leader in the API's JSON.  Raises LeaderElectionInProgress."""
        leader = self.leader_member()
        if leader is None:
            raise LeaderElectionInProgress("there is no leader at the moment")
        return dict(leader.raw)

    @property
    def stats(self) -> dict[str, Any]:
        return self.statistics()

    @property
    def leader_stats(self) -> dict[str, Any]:
        return self.statistics("leader")

    @property
    def store_stats(self) -> dict[str, Any]:
        return self.statistics("store")

    @property
    def version(self) -> str:
        return self.server_version().get("etcdserver", "")

    @property
    def cluster_version(self) -> str:
        """The version that all members support; "" from etcd 2.0."""
        return self.server_version().get("etcdcluster", "")

    @property
    def base_uri(self) -> str:
        return self.endpoints.current

    @property
    def protocol(self) -> str:
        return urlsplit(self.base_uri).scheme

    @property
    def host(self) -> str:
        return urlsplit(self.base_uri).hostname or ""

    @property
    def port(self) -> int:
        parts = urlsplit(self.base_uri)
        return parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def expected_cluster_id(self) -> str | None:
        return self.cluster_id

    @expected_cluster_id.setter
    def expected_cluster_id(self, cluster_id: str | None) -> None:
        self.cluster_id = cluster_id

    # -- requests without a verb

    def api_execute(self, path: str, method: str, params: Mapping[str, Any] | None = None,
                    timeout: float | None = None) -> _Reply:
        """Send any request and return the reply: `status`, `headers`, `data`.

        path     begins with a slash and the version prefix
        params   query of a GET or DELETE, form of a PUT or POST
        timeout  seconds in all; None: the client's; 0: no limit, as in python-etcd

        Raises the errors of the verbs; WatchTimeout for a GET with the parameter `wait`.

        If a subclass or an attribute of the client replaces this method, all verbs call it (those
        with JSON `api_execute_json`), except for `watcher` and its users.
        """
        given = {} if params is None else {
            name: value if isinstance(value, bool) else "" if value is None else _text(value)
            for name, value in params.items()}
        if method in ("GET", "DELETE"):
            return self._execute(path, method, timeout, query=given)
        return self._execute(path, method, timeout, body=_encode_fields(given).encode())

    def api_execute_json(self, path: str, method: str, params: Any = None,
                         timeout: float | None = None) -> _Reply:
        """Send any request with `params` as JSON and return the reply."""
        body = json.dumps(params).encode()
        return self._execute(path, method, timeout, body=body, content_type=_JSON_TYPE)

    def _execute(self, path: str, method: str, timeout: float | None, *,
                 query: Mapping[str, _Field] = MappingProxyType({}), body: bytes | None = None,
                 content_type: str = _Call.content_type) -> _Reply:
        if not path.startswith("/"):
            raise EtcdValueError("the path begins with a slash")
        if method not in ("GET", "PUT", "POST", "DELETE"):
            raise EtcdValueError(f"HTTP method {method} is not one of the API")
        return super()._perform(_Call(
            method, _target(path, query), _keep_reply, body, content_type,
            math.inf if timeout == 0 else timeout, waits=query.get("wait") in (True, "true")))

    def _is_replaced(self, name: str = "api_execute") -> bool:
        return name in self.__dict__ or getattr(type(self), name) is not getattr(Client, name)

    def _perform(self, call: _Call[_T]) -> _T:
        as_json = call.content_type == _JSON_TYPE and call.form is not None
        name = "api_execute_json" if as_json else "api_execute"
        if not self._is_replaced(name):
            return super()._perform(call)
        path, _, text = call.target.partition("?")
        given: dict[str, Any] = {}
        if call.form is not None:
            text = call.form.decode()
        if as_json:
            given["params"] = json.loads(text)
        elif text or path.startswith(self.key_endpoint):
            given["params"] = dict(parse_qsl(text, True, errors="surrogateescape"))
            if call.method == "GET":
                given["timeout"] = 0 if call.timeout == math.inf else call.timeout
        answer = getattr(self, name)(unquote(path, errors="surrogateescape"), call.method, **given)
        return self._interpret(self.base_uri, call, _as_reply(answer))

    def _members_call(self, method: str, path: str, peer_urls: str | Iterable[str],
                      parse: Callable[[_Reply], _T]) -> _Call[_T]:
        urls = peer_urls.split(",") if isinstance(peer_urls, str) else list(peer_urls)
        target = _target(f"{self.version_prefix}/members{path}", {})
        body = json.dumps({"peerURLs": urls}).encode()
        return _Call(method, target, parse, body, _JSON_TYPE)


class Client(_Watching, _Cluster, _Users):
    """A connection to an etcd cluster; safe to share between threads.

    Client()                                        http://127.0.0.1:2379
    Client("10.0.0.1", 2379)                        one server
    Client(("::1", 2379))                           the same
    Client(["http://h:p", "h:p", ("h", p), ...])    several members of one cluster
    Client(endpoints=[...])                         the same
    Client(srv_domain="example.org")                the servers in DNS (needs dnspython)
    Client.from_env()                               the servers in ETCDCTL_*

    port, protocol       defaults for hosts without them
    version_prefix       begins all paths except for /version and /health
    cert, ca_cert        files: client certificate, or a pair with its key; trusted authorities
    verify               False: do not verify the server's certificate
    username, password   sent to the endpoints with every request
    proxies              {"http": url, "https": url}; the environment is ignored
    connect_timeout      seconds to make a connection
    read_timeout         seconds for each silence of the server; 0 for no limit
    total_timeout        seconds for a call over all endpoints; None for no limit
    allow_reconnect      False: one endpoint, one attempt.  True: as `sync`
    retry                False: one attempt for each endpoint
    allow_redirect       follow redirects of reads, and those of writes that were not executed
    sync                 use the URLs that the members publish, too; never with use_proxies
    expected_cluster_id  refuse other clusters; None: the first cluster that replies
    per_host_pool_size   idle connections to keep
    lock_prefix          directory of the locks
    session_timeout      seconds without a reply until `state` is LOST
    on_state             called with the new `state`, see add_listener

    Keys methods return an EtcdResult and raise an EtcdError.  The leading slash of a key is
    optional.  Nothing is sent before the first call.

    Thread: any.  Concurrent calls use separate connections.
    """
