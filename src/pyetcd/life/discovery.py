"""Discovery, before the reactor starts: new members meet at a registry, or by SRV records."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import queue
import re
import shlex
import socket
import threading
import time
import urllib.parse
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    TypeVar,
)
from urllib.parse import urlsplit

from ..api.discovery import DISCOVERY_DEFAULT_SIZE
from ..base.basics import Backoff, clean_path
from ..base.errors import DiscoveryError, EventIndexCleared, KeyNotFound, NodeExists
from ..base.ids import package_logger
from ..base.limits import CALL_BODY_BYTES_MAX
from ..base.text import format_duration, go_quote, load_json, split_address, split_url
from ..base.urls import is_local, url_address
from ..member.cluster import format_id, parse_initial_cluster
from ..net.dns import _reason, lookup_srv
from ..net.tls import TlsContext
from ..net.workers import outcome_of

DISCOVERY_DIAL_SECONDS = 30.0       # connecting to the registry; above: unreachable, tried again
DISCOVERY_ANSWER_SECONDS = 5.0      # silence of the registry, watches excepted
DISCOVERY_RETRY_FIRST_SECONDS = 2.0
DISCOVERY_RETRY_SECONDS_MAX = 256.0  # longest wait between two tries
DISCOVERY_PAUSE_SECONDS = 0.25      # after a watch that the registry ended at once; then longer
DISCOVERY_PAUSE_SECONDS_MAX = 32.0
DISCOVERY_REDIRECTS_MAX = 10        # of one request; above: unreachable
WAIT_REPORT_SECONDS = 10.0          # between two lines of the log on what is waited for
_SIZE_EXAMPLE = f"size={DISCOVERY_DEFAULT_SIZE}"
_PUBLIC_REGISTRY = "discovery.etcd.io"
_Reached = TypeVar("_Reached")


class DiscoveryUnreachable(DiscoveryError):
    """The registry did not answer, or answered 5xx: worth another try."""


class DiscoveryFull(DiscoveryError):
    """Enough other members have registered: there is no place for this one."""

    def __init__(self, members: List[Registration]) -> None:
        super().__init__("discovery: cluster is full")
        self.members = members


class DuplicateId(DiscoveryError):
    """The registry has this member id already, but the data directory is empty."""


class DuplicateName(DiscoveryError):
    """Two registered members have the same name."""


class Registration(NamedTuple):
    """One member in the registry."""

    id: str                             # hex: the last part of the key
    value: str                          # `name=url[,name=url]`
    created_index: int


class RegistryState(NamedTuple):
    """The registry at one moment."""

    members: List[Registration]         # the first `size`, oldest first
    size: int
    etcd_index: int                     # X-Etcd-Index of the listing


def blocking_get(
    url: str, timeout_s: float, target: str = "/", tls: Optional[TlsContext] = None
) -> Tuple[int, http.client.HTTPMessage, bytes]:
    """Return (status, headers, body) of GET `target`.  Raises OSError, HTTPException."""
    return _exchange(_open_connection(url, timeout_s, tls), "GET", target, timeout_s)


def _exchange(
    connection: http.client.HTTPConnection, method: str, target: str, answer_s: Optional[float],
    form: str = "",
) -> Tuple[int, http.client.HTTPMessage, bytes]:
    """Connect, send one request and return (status, headers, body); answer_s: longest silence."""
    with contextlib.closing(connection):
        connection.connect()
        connection.sock.settimeout(answer_s)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        headers = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
        connection.request(method, target, form or None, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read(CALL_BODY_BYTES_MAX)


def _open_connection(
    url: str, timeout_s: float, tls: Optional[TlsContext] = None
) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    look_up(host, timeout_s)
    if parts.scheme != "https":
        return http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
    context = tls.current if tls else None
    return http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=context)


def look_up(host: str, timeout_s: float) -> None:
    """Resolve `host` on another thread, so that a connection then has the answer from a cache.

    Raises OSError, also after timeout_s: a lookup can block for minutes, and no signal ends it.
    """
    answers: queue.Queue[Optional[Exception]] = queue.Queue()

    def ask() -> None:
        answers.put(outcome_of(socket.getaddrinfo, host, None)[0])

    threading.Thread(target=ask, name="names", daemon=True).start()
    try:
        error = answers.get(timeout=timeout_s)
    except queue.Empty:
        error = OSError(f"lookup {host}: i/o timeout")
    if error is not None:
        raise error


class Discovery:
    """Registers a member at a discovery URL, and waits for the initial cluster.

    url         scheme://host[:port]/<token key>, on any etcd v2 or discovery service
    member_id   its hex text is the key of this member in the registry; 0 for a proxy
    pairs       `name=url[,name=url]` of this member, sorted
    proxy       URL of an HTTP proxy, or ""
    sleep       called with the seconds to wait before another try

    Waits without end for an unreachable registry.  Raises DiscoveryError.  Blocks.
    Source: etcd 2.3 discovery.  Differs from etcd: only the registration of a new member ends the
    wait; etcd counts every event, so a changed or deleted key leaves a member out.
    """

    def __init__(
        self, url: str, member_id: int, pairs: str, *, proxy: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urlsplit(check_discovery_url(url))
        self._endpoint = f"{parts.scheme}://{parts.netloc}"
        self._path = clean_path(parts.path)
        self._id = format_id(member_id)
        self._pairs = pairs
        self._proxy = check_proxy_url(proxy)
        self._sleep = sleep
        self._backoff = Backoff(DISCOVERY_RETRY_FIRST_SECONDS, DISCOVERY_RETRY_SECONDS_MAX)
        self._advised = False           # only the first failure is logged with advice
        self.resumed = False            # join() found a registration of an earlier try
        self._log = package_logger("discovery")
        self._awaited = ""              # what a line of the log says that this waits for
        if self._proxy:
            self._log.info('using proxy "%s"', self._proxy)

    def join(self) -> str:
        """Register, wait for the other members, and return the initial cluster `name=url,...`."""
        with self._reports():
            self._read_registry()
            self._register()
            return self._initial_cluster(self._wait_until_complete())

    def find(self) -> str:
        """Wait for the members without registering; return the initial cluster."""
        try:
            with self._reports():
                return self._initial_cluster(self._wait_until_complete())
        except DiscoveryFull as full:
            return self._initial_cluster(full.members)

    @contextlib.contextmanager
    def _reports(self) -> Iterator[None]:
        """Log every ten seconds, from a thread, what the block waits for, and for how long."""
        ended, since = threading.Event(), time.monotonic()

        def run() -> None:
            while not ended.wait(WAIT_REPORT_SECONDS):
                if self._awaited:
                    waited_s = time.monotonic() - since
                    self._log.info("waiting for %s, %.0f s", self._awaited, waited_s)

        threading.Thread(target=run, name="wait-report", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    @staticmethod
    def _initial_cluster(members: Sequence[Registration]) -> str:
        text = ",".join(member.value for member in members)
        try:
            found = parse_initial_cluster(text)
        except ValueError:
            raise DiscoveryError("discovery: invalid URL") from None
        if len(found) != len(members):
            raise DuplicateName("discovery: found duplicate name")
        return text

    def _read_registry(self) -> RegistryState:
        """Return the state of the registry, once it answers.  Raises DiscoveryFull."""
        return self._until_reached("cluster status check", self._get_state)

    def _get_state(self) -> RegistryState:
        options = "?quorum=false&recursive=false&sorted=false"
        size = self._size(self._get("/_config/size" + options)[1])
        index, body = self._get(options)
        node = self._node(body)
        members = sorted(map(_registration, node.get("nodes", [])), key=lambda m: m.created_index)
        members = [member for member in members if not member.id.startswith("_")]
        first = members[:size]
        if len(members) >= size and self._id not in (member.id for member in first):
            raise DiscoveryFull(first)
        seen = max((member.created_index for member in members), default=0)
        return RegistryState(first, size, index or seen)

    def _size(self, body: Any) -> int:
        if isinstance(body, dict) and body.get("errorCode") == KeyNotFound.code:
            raise DiscoveryError("discovery: size key not found")
        text = str(self._node(body).get("value", ""))
        if not text.isascii() or not text.isdigit() or int(text) < 1:
            raise DiscoveryError("discovery: size key is bad")
        return int(text)

    def _register(self) -> None:
        """Create the key of this member, and wait until the registry shows it."""
        tries = itertools.count()
        created = self._until_reached(
            "registration", lambda: self._create(is_again=next(tries) > 0))
        with contextlib.suppress(DiscoveryUnreachable):     # the next step tries again
            self._request("GET", f"/{self._id}?recursive=false&wait=true&waitIndex={created}")

    def _create(self, *, is_again: bool) -> int:
        """Create the key of this member, or find it from an earlier try; return its index.

        A key with the same value is from an earlier try if this process tried before (is_again),
        or if no other host can have written it: the member was restarted while it waited.  Its
        peers report later whether it lost its log.
        Differs from etcd, which concludes from such a key that the log is lost.
        """
        form = urllib.parse.urlencode({"value": self._pairs})
        suffix = f"/{self._id}?prevExist=false"
        _, body = self._request("PUT", suffix, DISCOVERY_ANSWER_SECONDS, form)
        if not (isinstance(body, dict) and body.get("errorCode") == NodeExists.code):
            return int(self._node(body).get("createdIndex", 0)) or 1
        node = self._node(self._get(f"/{self._id}?quorum=true")[1])
        if node.get("value") != self._pairs or not (is_again or self._is_unique_registration()):
            raise DuplicateId("discovery: found duplicate id")
        self.resumed = True
        self._log.info("found the registration of this member, which an earlier try has made")
        return int(node.get("createdIndex", 0)) or 1

    def _is_unique_registration(self) -> bool:
        """True unless other hosts may register the same URLs: `localhost`, on a remote registry."""
        initial = parse_initial_cluster(self._pairs)
        urls = [url for urls in initial.values() for url in urls]
        return is_local(self._endpoint) or not all(map(is_local, urls))

    def _wait_until_complete(self) -> List[Registration]:
        members = self._until_reached("waiting for other nodes", self._watch_registrations)
        self._log.info("found %d needed peer(s)", len(members))
        return members

    def _watch_registrations(self) -> List[Registration]:
        """Read the registry, and watch it until `size` members have registered.

        The pauses grow while the registry ends watches at once or repeats old events.  The first
        such watch has no pause: a proxy on the way may have ended it.
        """
        state = self._read_registry()
        for member in state.members:
            self._log_found(member)
        members, index = list(state.members), state.etcd_index
        announced, idle = -1, 0         # idle: watches in a row without a new event
        pause = Backoff(DISCOVERY_PAUSE_SECONDS, DISCOVERY_PAUSE_SECONDS_MAX)
        while len(members) < state.size:
            names = ", ".join(member.value.partition("=")[0] for member in members)
            self._awaited = (
                f"{state.size - len(members)} more member(s) at {self._endpoint}{self._path}:"
                f" {len(members)} of {state.size} registered ({names})"
            )
            if announced != len(members):
                announced = len(members)
                missing = state.size - announced
                self._log.info("found %d peer(s), waiting for %d more", announced, missing)
            asked = time.monotonic()
            body = self._next_event(index + 1)
            node = self._node(body) if body is not None else {}
            before, index = index, max(index, int(node.get("modifiedIndex", index)))
            idle += 1
            if index > before or time.monotonic() - asked > DISCOVERY_ANSWER_SECONDS:
                idle = 0
                pause.reset()
            elif idle > 1:
                self._sleep(pause.next())
            if body is None:
                continue
            if self._is_registration(body.get("action"), str(node.get("key")), members):
                members.append(_registration(node))
                self._log_found(members[-1])
        return members

    def _is_registration(self, action: Any, key: str, members: Sequence[Registration]) -> bool:
        """True if the event registers a member that is not among `members`."""
        token, _, name = key.rpartition("/")
        return (
            action in ("create", "set") and token.endswith(self._path.rpartition("/")[2])
            and not name.startswith("_") and name not in (member.id for member in members)
        )

    def _next_event(self, index: int) -> Optional[Dict[str, Any]]:
        """Wait for the event at `index` or later; return None if the registry ends the watch."""
        _, body = self._request("GET", f"?recursive=true&wait=true&waitIndex={index}")
        if isinstance(body, dict) and body.get("errorCode") == EventIndexCleared.code:
            raise DiscoveryUnreachable(f"the registry has forgotten the events from {index} on")
        return body if body else None

    def _log_found(self, member: Registration) -> None:
        who = "self" if member.id == self._id else "peer"
        self._log.info("found %s %s in the cluster", who, member.id)

    def _node(self, body: Any) -> Dict[str, Any]:
        """Return the node in an answer of the keys API.  Raises DiscoveryError if it has none."""
        if isinstance(body, dict) and isinstance(body.get("node"), dict):
            node: Dict[str, Any] = body["node"]
            return node
        if isinstance(body, dict) and "errorCode" in body:
            cause = f" ({body['cause']})" if body.get("cause") else ""
            raise DiscoveryError(f"{body['errorCode']}: {body.get('message', '')}{cause}")
        raise DiscoveryError("discovery: bad discovery endpoint")

    def _until_reached(self, step: str, work: Callable[[], _Reached]) -> _Reached:
        while True:
            try:
                return work()
            except DiscoveryUnreachable as error:
                advice = "" if self._advised else "; " + _registry_advice(self._endpoint)
                self._advised = True
                self._awaited = f"the discovery service: {error}"
                self._log.error("error #0: %s%s", error, advice)
            wait_s = self._backoff.next()
            self._log.info(
                "%s: error connecting to %s, retrying in %s", step, self._endpoint,
                format_duration(wait_s),
            )
            self._sleep(wait_s)

    def _get(self, suffix: str) -> Tuple[int, Any]:
        return self._request("GET", suffix, DISCOVERY_ANSWER_SECONDS)

    def _request(
        self, method: str, suffix: str, answer_s: Optional[float] = None, form: str = ""
    ) -> Tuple[int, Any]:
        """Follow redirects; return (X-Etcd-Index or 0, decoded JSON or None for an empty body).

        answer_s  longest silence of the registry; None: no limit, for watches
        Raises DiscoveryUnreachable, and DiscoveryError for a body that is not JSON.
        """
        url = self._endpoint + self._path + suffix
        for _ in range(DISCOVERY_REDIRECTS_MAX):
            status, headers, body = self._send(method, url, answer_s, form)
            if status >= 500:
                raise DiscoveryUnreachable(f"unexpected status code {status} from {self._endpoint}")
            location = headers.get("Location", "")
            if not (300 < status < 400 and location):
                break
            url = urllib.parse.urljoin(url, location)
        else:
            raise DiscoveryUnreachable(f"more than {DISCOVERY_REDIRECTS_MAX} redirects")
        try:
            index = headers.get("X-Etcd-Index", "")
            return int(index) if index.isdigit() else 0, load_json(body) if body.strip() else None
        except ValueError:
            raise DiscoveryError("discovery: bad discovery endpoint") from None

    def _send(
        self, method: str, url: str, answer_s: Optional[float], form: str
    ) -> Tuple[int, http.client.HTTPMessage, bytes]:
        """Send one request on a connection of its own.  Raises DiscoveryUnreachable."""
        parts = urlsplit(url)
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        if self._proxy and parts.scheme == "http":
            target = url
        try:
            return _exchange(self._connection(parts), method, target, answer_s, form)
        except (OSError, http.client.HTTPException) as error:
            where = self._proxy or f"{parts.scheme}://{parts.netloc}"
            raise DiscoveryUnreachable(f"{method} {url}: {where}: {_reason(error)}") from None

    def _connection(self, parts: urllib.parse.SplitResult) -> http.client.HTTPConnection:
        if not self._proxy or parts.scheme == "http":
            url = self._proxy or f"{parts.scheme}://{parts.netloc}"
            return _open_connection(url, DISCOVERY_DIAL_SECONDS)
        proxy = urlsplit(self._proxy)
        tunnel = http.client.HTTPSConnection(
            proxy.hostname or "", proxy.port or 80, timeout=DISCOVERY_DIAL_SECONDS
        )
        tunnel.set_tunnel(parts.hostname or "", parts.port or 443)
        return tunnel


def check_discovery_url(url: str) -> str:
    """Return `url`, scheme in lower case.  Raises DiscoveryError unless it ends with a token."""
    why = ""
    try:
        scheme, authority, rest = split_url(url)
    except ValueError as error:
        scheme, authority, rest, why = "", "", "", f"{error}; "
    path, _, query = rest.partition("?")
    if not (_is_dialable(scheme, authority) and path.strip("/") and re.fullmatch("[!-~]+", url)):
        raise DiscoveryError(
            f"discovery: invalid URL {go_quote(url)}: {why}it must read"
            f" http://host:port/path/of/the/token"
        )
    if path.strip("/") == "new" and authority == _PUBLIC_REGISTRY:
        raise DiscoveryError(
            f"discovery: invalid URL {go_quote(url)}: {_registry_advice(authority)}"
        )
    if path.strip("/") == "new":
        new = shlex.quote(f"{scheme}://{authority}/new?{query or _SIZE_EXAMPLE}")
        raise DiscoveryError(
            f"discovery: invalid URL {go_quote(url)}: it makes a new cluster's URL at each request;"
            f" run `curl {new}` once and give all members what it prints"
        )
    if query or "#" in rest or path.rstrip("/").endswith("/_config/size"):
        token = path.rstrip("/").partition("/_config")[0].partition("#")[0]
        raise DiscoveryError(
            f"discovery: invalid URL {go_quote(url)}: it must end with the token; perhaps"
            f" {scheme}://{authority}{token}"
        )
    return f"{scheme}://{authority}{rest}"


def _is_dialable(scheme: str, authority: str) -> bool:
    """True if `authority` has a host, IPv6 addresses in brackets, and no port 0."""
    host, port = split_address(authority.rpartition("@")[2])
    is_host = bool(host) and (host.startswith("[") or ":" not in host)
    return scheme in ("http", "https") and is_host and int(port[1:] or 1) != 0


def check_proxy_url(proxy: str) -> str:
    """Return the URL of an HTTP proxy given as URL or `host:port`.  Raises DiscoveryError."""
    if not proxy:
        return ""
    url = proxy if "://" in proxy else "http://" + proxy
    try:
        scheme, authority, _ = split_url(url)
    except ValueError as error:
        raise DiscoveryError(str(error)) from None
    if not _is_dialable(scheme, authority):
        raise DiscoveryError(f"invalid proxy {go_quote(proxy)}: it must read http://host:port")
    return f"{scheme}://{authority}"


def _registry_advice(endpoint: str) -> str:
    public = _PUBLIC_REGISTRY in endpoint
    what = "the public discovery service is out of use" if public else (
        f"no discovery service answers at {endpoint}, is it running there?"
    )
    return (
        f"{what}; any pyetcd that is not a member of this cluster is one: run `pyetcd` on a machine"
        f" that all members reach, and `curl 'http://MACHINE:2379/new?{_SIZE_EXAMPLE}'` for a new"
        f" -discovery URL"
    )


def _registration(node: Dict[str, Any]) -> Registration:
    key = str(node.get("key", ""))
    index = int(node.get("createdIndex", 0))    # some registries answer 780131509.0
    return Registration(key.rpartition("/")[2], str(node.get("value", "")), index)


def srv_cluster(
    domain: str, own_name: str, peer_urls: Sequence[str], servers: Sequence[Tuple[str, int]]
) -> str:
    """Return the initial cluster `name=url,...` that the SRV records of `domain` describe.

    own_name   name for the record that leads to one of peer_urls; the others are `0`, `1`...
    servers    (address, port) of the name servers

    Raises DiscoveryError.  Source: etcd 2.3 discovery/srv.go.
    """
    log = package_logger("discovery")
    own: Set[Tuple[str, int]] = set()
    for url in peer_urls:
        try:
            own |= _resolve(url)
        except OSError:
            host = url_address(url)[0]
            raise DiscoveryError(f"couldn't resolve host {host} during SRV discovery") from None
    pairs: List[str] = []
    errors = 0
    for service, scheme in (("etcd-server-ssl", "https"), ("etcd-server", "http")):
        try:
            records = lookup_srv(f"_{service}._tcp.{domain}", servers)
        except (OSError, UnicodeError) as error:
            log.warning("error querying DNS SRV records for _%s %s", service, error)
            errors += 1
            continue
        for record in records:
            url = f"{scheme}://{record.target}:{record.port}"
            try:
                is_own = bool(_resolve(url) & own)
            except OSError as error:
                log.warning("couldn't resolve host %s: %s", record.target, _reason(error))
                continue
            unnamed = sum(not pair.startswith(own_name + "=") for pair in pairs)
            pairs.append(f"{own_name if is_own else unnamed}={url}")
            log.info("got bootstrap from DNS for %s at %s", service, url)
    if errors == 2:
        raise DiscoveryError("SRV discovery failed: too many errors querying DNS SRV records")
    return ",".join(pairs)


def _resolve(url: str) -> Set[Tuple[str, int]]:
    """Return the (ip address, port) pairs of a URL's host.  Raises OSError."""
    host, port = url_address(url)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {(str(info[4][0]), port) for info in found}
