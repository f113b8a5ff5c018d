"""The Client class: all of it under one name."""

from __future__ import annotations

import json
import math
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Union
from urllib.parse import parse_qsl, unquote, urlsplit

from ..transport.calls import (
    _FORM_TYPE,
    _HEALTH_STATUSES,
    _JSON_TYPE,
    _Call,
    _Caller,
    _encode_fields,
    _Field,
    _target,
    _text,
)
from ..transport.connections import Scope
from ..transport.endpoints import _base_url
from ..transport.errors import EtcdValueError, LeaderElectionInProgress
from ..transport.results import (
    _T,
    Member,
    _as_reply,
    _parse_health,
    _parse_leader,
    _parse_machines,
    _parse_member,
    _parse_members,
    _parse_not,
    _parse_nothing,
    _parse_object,
    _parse_version,
    _Reply,
)
from .users import _Users
from .watching import _Watching


class _Cluster(_Caller):
    """Members, statistics, versions, health; and requests for which there is no verb."""

    _MGET, _MPUT, _MPOST, _MDELETE = "GET", "PUT", "POST", "DELETE"     # callers of api_execute

    # -- members

    def member_list(self) -> List[Member]:
        """Return the members of the cluster, ordered by id."""
        return self._perform(_Call("GET", f"{self.version_prefix}/members", _parse_members))

    def leader_member(self) -> Optional[Member]:
        """Return the leader as the answering member knows it; None during an election."""
        return self._perform(_Call(
            "GET", f"{self.version_prefix}/members/leader", _parse_leader,
            statuses=_HEALTH_STATUSES))

    def member_add(self, peer_urls: Union[str, Iterable[str]]) -> Member:
        """Add a member that will be reached at `peer_urls`; start it after that.

        Raises HttpError with status 409 if another member has one of the URLs.
        """
        return self._perform(self._members_call("POST", "", peer_urls, _parse_member))

    def member_update(self, id: str, peer_urls: Union[str, Iterable[str]]) -> None:
        """Change the peer URLs of the member with this id.  Raises KeyNotFound."""
        self._perform(self._members_call("PUT", f"/{id}", peer_urls, _parse_nothing))

    def member_remove(self, id: str) -> None:
        """Remove the member with this id from the cluster.

        Raises KeyNotFound; HttpError with status 410 if it was removed already.
        """
        path = f"{self.version_prefix}/members/{id}"
        self._perform(_Call("DELETE", _target(path, {}), _parse_nothing))

    # -- what the answering member says of itself

    def statistics(self, name: str = "self") -> Dict[str, Any]:
        """Return statistics of the answering member: `self`, `store` or (leader only) `leader`."""
        if name not in ("self", "store", "leader"):
            raise EtcdValueError(f"no such statistics: {name!r}; there are self, store and leader")
        return self._perform(_Call("GET", f"{self.version_prefix}/stats/{name}", _parse_object))

    def server_version(self) -> Dict[str, str]:
        """Return {"etcdserver": ..., "etcdcluster": ...} of the answering member."""
        return self._perform(_Call("GET", "/version", _parse_version))

    def health(self, endpoint: Optional[str] = None) -> bool:
        """Return what one server says of itself (the one in use, if none is given).

        Raises TransportError if it does not answer.
        """
        call = _Call("GET", "/health", _parse_health, statuses=_HEALTH_STATUSES)
        with Scope(self.total_timeout, self.scope) as scope:
            if endpoint is None:
                self._discover_endpoints(scope.deadline)
            base_url = self.endpoints.current if endpoint is None else _base_url(endpoint)
            return self._attempt(base_url, call, scope.deadline)

    # -- the same as python-etcd shows it: each a request, but for the last group

    @property
    def machines(self) -> List[str]:
        """Client URLs of all members."""
        return self._perform(_Call("GET", f"{self.version_prefix}/machines", _parse_machines))

    @property
    def members(self) -> Dict[str, Dict[str, Any]]:
        """The members as the API describes them, by id."""
        return {member.id: dict(member.raw) for member in self.member_list()}

    @property
    def leader(self) -> Dict[str, Any]:
        """The leader as the API describes it.  Raises LeaderElectionInProgress."""
        leader = self.leader_member()
        if leader is None:
            raise LeaderElectionInProgress("there is no leader at the moment")
        return dict(leader.raw)

    @property
    def stats(self) -> Dict[str, Any]:
        """Statistics of the answering member."""
        return self.statistics()

    @property
    def leader_stats(self) -> Dict[str, Any]:
        """What the leader knows of its followers; HttpError from any other member."""
        return self.statistics("leader")

    @property
    def store_stats(self) -> Dict[str, Any]:
        """Counters of the store."""
        return self.statistics("store")

    @property
    def version(self) -> str:
        """Version of the answering server."""
        return self.server_version().get("etcdserver", "")

    @property
    def cluster_version(self) -> str:
        """Version all members can work with; "" from etcd 2.0."""
        return self.server_version().get("etcdcluster", "")

    @property
    def base_uri(self) -> str:
        """URL of the server in use."""
        return self.endpoints.current

    @property
    def protocol(self) -> str:
        """http or https, as the server in use wants it."""
        return urlsplit(self.base_uri).scheme

    @property
    def host(self) -> str:
        """Host of the server in use."""
        return urlsplit(self.base_uri).hostname or ""

    @property
    def port(self) -> int:
        """Port of the server in use."""
        parts = urlsplit(self.base_uri)
        return parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def expected_cluster_id(self) -> Optional[str]:
        """`cluster_id`, as python-etcd calls it."""
        return self.cluster_id

    @expected_cluster_id.setter
    def expected_cluster_id(self, cluster_id: Optional[str]) -> None:
        self.cluster_id = cluster_id

    # -- requests for which there is no verb

    def api_execute(
        self, path: str, method: str, params: Optional[Mapping[str, Any]] = None,
        timeout: Optional[float] = None,
    ) -> _Reply:
        """Send a request of your own and return the answer: `status`, `headers`, `data`.

        path     begins with a slash and the version prefix
        params   go into the query of a GET or DELETE, into the form of a PUT or POST
        timeout  seconds in all; None: the client's; 0: no end, as for python-etcd

        All verbs go through here if a subclass or an attribute of the client replaces this method
        (JSON through `api_execute_json`), but not `watcher` and what is built on it.

        Raises what the verbs raise for an answer other than 2xx; WatchTimeout for a GET with the
        parameter `wait`.
        """
        given = {} if params is None else {
            name: value if isinstance(value, bool) else "" if value is None else _text(value)
            for name, value in params.items()}
        if method in ("GET", "DELETE"):
            return self._execute(path, method, given, None, _FORM_TYPE, timeout)
        return self._execute(path, method, {}, _encode_fields(given).encode(), _FORM_TYPE, timeout)

    def api_execute_json(
        self, path: str, method: str, params: Any = None, timeout: Optional[float] = None,
    ) -> _Reply:
        """Send a request of your own with `params` as JSON and return the answer."""
        body = json.dumps(params).encode()
        return self._execute(path, method, {}, body, _JSON_TYPE, timeout)

    # -- below: no public names

    def _execute(
        self, path: str, method: str, query: Mapping[str, _Field], body: Optional[bytes],
        content_type: str, timeout: Optional[float],
    ) -> _Reply:
        if not path.startswith("/"):
            raise EtcdValueError("the path begins with a slash")
        if method not in ("GET", "PUT", "POST", "DELETE"):
            raise EtcdValueError(f"HTTP method {method} is not one of the API")
        return super()._perform(_Call(
            method, _target(path, query), _parse_not, body, content_type,
            math.inf if timeout == 0 else timeout, waits=query.get("wait") in (True, "true")))

    def _is_replaced(self, name: str = "api_execute") -> bool:
        return name in self.__dict__ or getattr(type(self), name) is not getattr(Client, name)

    def _perform(self, call: _Call[_T]) -> _T:
        as_json = call.content_type == _JSON_TYPE and call.form is not None
        name = "api_execute_json" if as_json else "api_execute"
        if not self._is_replaced(name):
            return super()._perform(call)
        path, _, text = call.target.partition("?")
        given: Dict[str, Any] = {}
        if call.form is not None:
            text = call.form.decode()
        if as_json:
            given["params"] = json.loads(text)
        elif text or path.startswith(self.key_endpoint):
            given["params"] = dict(parse_qsl(text, True, errors="surrogateescape"))
            if call.method == "GET":
                given["timeout"] = 0 if call.timeout == math.inf else call.timeout
        answer = getattr(self, name)(unquote(path, errors="surrogateescape"), call.method, **given)
        return self._judge(self.base_uri, call, _as_reply(answer))

    def _members_call(
        self, method: str, path: str, peer_urls: Union[str, Iterable[str]],
        parse: Callable[[_Reply], _T],
    ) -> _Call[_T]:
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
    Client(srv_domain="example.org")                those that DNS names
    Client.from_env()                               those that ETCDCTL_* name

    port, protocol       of hosts that come without
    version_prefix       what all paths begin with, but for /version and /health
    cert, ca_cert        files: our certificate, or it and its key as a pair; whom to believe
    verify               False: believe any server
    username, password   sent to the endpoints with every request
    proxies              {"http": url, "https": url}; the environment is not asked
    connect_timeout      seconds to make a connection
    read_timeout         seconds for each silence of the server; 0 for no limit
    total_timeout        seconds for a call over all endpoints; None for no limit
    allow_reconnect      False: never try another endpoint, and none twice.  True: as `sync`
    retry                False: try each endpoint once
    allow_redirect       follow redirects of reads, and those that were not carried out
    sync                 use the URLs that the members publish, too; never with use_proxies
    expected_cluster_id  refuse another cluster; None: than the first one that answers
    per_host_pool_size   idle connections to keep
    lock_prefix          directory of the locks
    session_timeout      seconds without an answer until `state` is LOST
    on_state             called with the new `state`, see add_listener

    Every keys method returns an EtcdResult and raises an EtcdError.  Keys may be written with or
    without the leading slash.  Nothing is sent before the first call.

    Thread: any.  Calls at the same time have connections of their own.
    """
