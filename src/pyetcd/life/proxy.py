"""The proxy: forwards requests of clients to the members of a cluster.

Threads: as for embedding.  Blocking calls run before the reactor starts, or on its worker threads.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import string
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple
from urllib.parse import urlsplit

from ..api.forms import FORM_FIELDS_MAX, GO_BOOLS, refuse_method, write_message, write_text
from ..api.members import redirect
from ..api.metrics import add_process_readings
from ..api.routes import CorsRequest, allow_origin
from ..base.basics import NO_DESCRIPTOR, Backoff, is_clean_path
from ..base.limits import CONNECTIONS_MAX, QUEUED_BYTES_MAX, REQUEST_BODY_BYTES_MAX
from ..base.text import go_quote, json_text, utf8
from ..base.urls import is_local, url_address, usable_urls
from ..disk.snapshots import absent_dirs, make_dirs, remove_dirs
from ..member.configuration import ServerConfig
from ..member.statistics import Histograms, Metrics, exponential_bounds
from ..net.dns import _reason
from ..net.http_calls import ANSWER_BYTES_MAX, HttpCall
from ..net.http_messages import _content_length, _list_header
from ..net.http_requests import HttpRequest, StreamReply
from ..net.reactor import Reactor
from ..net.workers import PEER_WORK, Timer
from .addresses import PROBE_ANSWER_SECONDS, fetch_cluster
from .bootstrap import make_peer_tls
from .embedding import ServerThread
from .proxy_files import PROXY_LOG, ClusterFile, find_cluster, prepare_proxy_dir, write_cluster_file

PROXY_PROBE_SECONDS = 2.0           # silence of a member with requests; above: it is probed
PROXY_RETRY_SECONDS = 1.0           # between refreshes while there is no endpoint
PROXY_REFRESH_SECONDS_MIN = 0.1     # between refreshes, whatever the flag says
PROXY_UNREAD_BYTES_MAX = 256 << 10  # reply bytes a client has not read; above: the call pauses
PROXY_CONNECT_SECONDS_MAX = 3600.0  # with dial timeout 0; the system times out long before
_DEFAULT_REFRESH_MS = ServerConfig().proxy_refresh_interval_ms

# Headers of one connection (RFC 2616 §13.5.1), and Content-Length, which each side computes.
_HOP_HEADERS = frozenset((
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailers",
    "transfer-encoding", "upgrade", "content-length",
))
_CORS_HEADERS = frozenset((
    "access-control-allow-headers", "access-control-allow-methods", "access-control-allow-origin",
))
_WAITS = frozenset(f"wait={word}" for word, value in GO_BOOLS.items() if value)


class ProxyDialer:
    """Makes every call of a proxy to a member, with the limits of the -proxy-* flags."""

    def __init__(self, config: ServerConfig, reactor: Reactor) -> None:
        self.reactor = reactor
        self.failure_wait_s = config.proxy_failure_wait_ms / 1000
        self._connect_s = config.proxy_dial_timeout_ms / 1000 or PROXY_CONNECT_SECONDS_MAX
        self._read_s = config.proxy_read_timeout_ms / 1000 or None
        self._write_s = config.proxy_write_timeout_ms / 1000 or None
        self.tls = make_peer_tls(config)

    def call(
        self, url: str, request: HttpRequest, headers: Dict[str, str], forward: Forward
    ) -> HttpCall:
        return HttpCall(
            self.reactor, url, request.method, request.target, headers, request.body,
            connect_timeout_s=self._connect_s, idle_timeout_s=self._read_s, tls=self.tls,
            on_head=forward.on_head, on_data=forward.on_data, on_done=forward.on_done,
        )

    def probe(self, url: str, on_done: Callable[[Optional[Exception]], None]) -> HttpCall:
        """Send a request that a member answers at once; it fails after the write timeout."""
        return HttpCall(
            self.reactor, url, "GET", "/version", {}, connect_timeout_s=self._connect_s,
            idle_timeout_s=self._write_s, answer_max=ANSWER_BYTES_MAX, tls=self.tls,
            on_done=on_done,
        )


class Endpoint:
    """A client URL of a member, its state, and the requests that wait for its answers.

    A suspended member accepts connections and sends nothing, and -proxy-read-timeout would also
    end watches.  So an endpoint that is silent for PROXY_PROBE_SECONDS, with requests waiting,
    gets a probe.  An unanswered probe fails them all.  Differs from etcd, which waits for ever.
    """

    def __init__(self, url: str, dialer: ProxyDialer, *, has_worked: bool = False) -> None:
        self.url = url
        self.available = True
        self.suspect = False            # failed, and has not answered since: tried last
        self._reactor = dialer.reactor
        self._dialer = dialer
        self._waiting: Dict[Forward, None] = {}
        self._heard = 0.0               # time of the last answer, monotonic seconds
        self._has_worked = has_worked
        self._timer: Optional[Timer] = None
        self._probe: Optional[HttpCall] = None

    def add_waiting(self, forward: Forward) -> None:
        self._waiting[forward] = None
        self._start_timer()

    def remove_waiting(self, forward: Forward) -> None:
        self._waiting.pop(forward, None)
        if not self._waiting and self._probe is not None:
            self._probe.cancel()
            self._probe = None

    @property
    def works(self) -> bool:
        return self._has_worked and not self.suspect

    def answered(self) -> None:
        self._heard = self._reactor.now()
        self._has_worked = True
        self.suspect = False

    def failed(self) -> None:
        """Send no requests to the member until the failure wait is over."""
        self.suspect = True
        if self.available:
            self.available = False
            PROXY_LOG.info("marked endpoint %s unavailable", self.url)
            self._reactor.call_later(self._dialer.failure_wait_s, self._retest)

    def _retest(self) -> None:
        self.available = True
        PROXY_LOG.info("marked endpoint %s available, to retest connectivity", self.url)

    def _start_timer(self) -> None:
        if self._waiting and self._timer is None and self._probe is None:
            self._timer = self._reactor.call_later(PROXY_PROBE_SECONDS, self._probe_if_silent)

    def _probe_if_silent(self) -> None:
        self._timer = None
        asked = self._reactor.now()
        if self._waiting and asked - self._heard >= PROXY_PROBE_SECONDS:
            self._probe = self._dialer.probe(self.url, lambda error: self._probed(asked, error))
        self._start_timer()

    def _probed(self, asked: float, error: Optional[Exception]) -> None:
        self._probe = None
        if error is None:
            self.answered()
        elif isinstance(error, TimeoutError) and self._heard < asked:
            self.failed()
            for forward in list(self._waiting):
                forward.lost(error)
        # After any other error the connections of the waiting requests report errors of their own.
        self._start_timer()


class Endpoints:
    """The endpoints of a cluster, refreshed from a peer's list of members every interval.

    Source: etcd 2.3 proxy/director.go, etcdmain/etcd.go startProxy.
    """

    def __init__(
        self, config: ServerConfig, dialer: ProxyDialer, cluster: ClusterFile, cluster_file: str
    ) -> None:
        self._config = config
        self._reactor = dialer.reactor
        self._dialer = dialer
        self._peer_urls = cluster.peer_urls
        self._cluster_file = cluster_file
        self._retry = Backoff(PROXY_RETRY_SECONDS, _DEFAULT_REFRESH_MS / 1000)
        self._written: Optional[ClusterFile] = None     # the contents of the file, once written
        self._endpoints = [Endpoint(url, dialer, has_worked=True) for url in cluster.client_urls]
        self._announced = False
        self._timer: Optional[Timer] = None

    def available(self) -> List[Endpoint]:
        usable = [endpoint for endpoint in self._endpoints if endpoint.available]
        return sorted(usable, key=lambda endpoint: endpoint.suspect)

    def refresh(self) -> None:
        """Refresh now; blocks.  Thread: any, before the reactor runs."""
        self._update(self._fetch(self._peer_urls, self._working()))

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def schedule_refresh(self) -> None:
        """Refresh after the interval, and again and again.  Thread: reactor."""
        interval_ms = self._config.proxy_refresh_interval_ms
        wait_s = max(interval_ms / 1000, PROXY_REFRESH_SECONDS_MIN)
        usable = self.available()
        if usable:
            self._retry.reset()
        elif interval_ms >= _DEFAULT_REFRESH_MS:
            wait_s = self._retry.next()
        if usable and not self._announced:
            self._announced = True
            urls = " ".join(go_quote(endpoint.url) for endpoint in usable)
            PROXY_LOG.info("endpoints found [%s]", urls)
        self._timer = self._reactor.call_later(wait_s, self._start_refresh)

    def _start_refresh(self) -> None:
        self._reactor.run_blocking(
            self._fetch, self._peer_urls, self._working(), kind=PEER_WORK, done=self._refreshed
        )

    def _refreshed(self, error: Optional[BaseException], found: Any) -> None:
        if error is None:
            self._update(found)
        else:
            PROXY_LOG.warning("could not ask for the members: %s", error)
        self.schedule_refresh()

    def _working(self) -> Tuple[str, ...]:
        return tuple(sorted(endpoint.url for endpoint in self._endpoints if endpoint.works))

    def _fetch(self, peer_urls: Tuple[str, ...], working: Tuple[str, ...]) -> Optional[ClusterFile]:
        """Return the URLs that the first peer to answer lists, and keep them in the file; or None.

        Differs from etcd: the peer URL that answered stays, last in the list, and the `working`
        client URLs stay in the file if the peer lists none of them.  Otherwise URLs that are wrong
        on this machine, such as `localhost`, would end the service for good.  Thread: any; blocks.
        """
        limit_s = max(self._config.proxy_dial_timeout_ms / 1000, PROBE_ANSWER_SECONDS)
        found, url = None, ""
        for url in peer_urls:
            found = fetch_cluster(url, limit_s, self._dialer.tls)
            if found is not None:
                break
        if found is None or not found[1]:
            return None
        urls = tuple(sorted(usable_urls(url for m in found[1] for url in m.peer_urls)))
        urls = urls if url in urls else (*urls, url)
        listed = tuple(sorted(set(usable_urls(url for m in found[1] for url in m.client_urls))))
        content = ClusterFile(urls, () if set(listed) & set(working) else working)
        if content != self._written:
            try:
                write_cluster_file(self._cluster_file, content)
                self._written = content
            except OSError as error:
                PROXY_LOG.warning("error on writing urls %s", error)
        return ClusterFile(urls, listed)

    def _update(self, found: Optional[ClusterFile]) -> None:
        """Replace the endpoints by those in `found`; endpoints in both keep their state.

        Working endpoints stay, last in the list, until a new one works.  All stay if found is None.
        """
        if found is None:
            PROXY_LOG.warning("could not retrieve cluster information from the given urls")
            return
        urls = found.peer_urls
        if urls != self._peer_urls:
            PROXY_LOG.info(
                "updated peer urls in cluster file from [%s] to [%s]", " ".join(self._peer_urls),
                " ".join(urls),
            )
            self._peer_urls = urls
        known = {endpoint.url: endpoint for endpoint in self._endpoints}
        listed = [url for url in found.client_urls if not self._is_own(url)]
        random.shuffle(listed)
        endpoints = [known.get(url) or Endpoint(url, self._dialer) for url in listed]
        if not any(endpoint.works for endpoint in endpoints):
            endpoints += [
                endpoint for endpoint in self._endpoints
                if endpoint.works and endpoint not in endpoints
            ]
        self._endpoints = endpoints

    def _is_own(self, url: str) -> bool:
        """True if `url` leads to this proxy: some members advertise `localhost`."""
        port = url_address(url)[1]
        return is_local(url) and any(
            is_local(own) and url_address(own)[1] == port for own in self._config.listen_client_urls
        )


class ProxyMetrics(Metrics):
    """The metrics of a proxy.  Source: etcd 2.3 proxy/metrics.go."""

    def __init__(self, reactor: Reactor) -> None:
        super().__init__()
        add_process_readings(self, reactor.wall_ns(), reactor.now)
        self.requests = self.counter(
            "etcd_proxy_requests_total", "Requests that came in, by method.", ("method",))
        self.handled = self.counter(
            "etcd_proxy_handled_total", "Requests that a member answered.", ("method", "code"))
        self.dropped = self.counter(
            "etcd_proxy_dropped_total", "Requests, or tries of one, that failed in the proxy.",
            ("method", "proxying_error"))
        self.seconds = Histograms(exponential_bounds(0.0005, 13), ("method",))
        self.add("etcd_proxy_handling_duration_seconds",
                 "From a request to its answer, by method.", self.seconds)


def _method_label(request: HttpRequest) -> str:
    """Return the method as a label; unknown ones share `other`, so that labels stay few."""
    known = ("GET", "HEAD", "PUT", "POST", "DELETE", "PATCH")
    return request.method if request.method in known else "other"


class Forward:
    """One request: tries one endpoint after the other, until one answers the client.

    Differs from etcd: a request that is not GET or HEAD goes to the next endpoint only if no
    connection was made, as the first member may have executed it.  Thread: reactor.
    """

    __slots__ = (
        "_request", "_left", "_tried", "_dialer", "_metrics", "_method", "_ended", "_started",
        "_endpoint", "_call", "_reply", "_is_empty", "_waits",
    )

    def __init__(
        self, request: HttpRequest, endpoints: Sequence[Endpoint], dialer: ProxyDialer,
        metrics: ProxyMetrics, ended: Callable[[Forward], None],
    ) -> None:
        self._request = request
        self._left = collections.deque(endpoints)
        self._tried = 0
        self._dialer = dialer
        self._metrics = metrics
        self._method = _method_label(request)
        self._ended = ended
        self._started = dialer.reactor.now()
        self._endpoint: Optional[Endpoint] = None
        self._call: Optional[HttpCall] = None
        self._reply: Optional[StreamReply] = None
        self._is_empty = True           # no byte of the answer's body has come
        self._waits = request.method == "GET" and not _WAITS.isdisjoint(
            request.query.split("&", FORM_FIELDS_MAX))

    def start(self) -> None:
        self._request.connection.on_close = self._client_gone
        # A client that ends its side of the connection has ended its watch.
        self._request.connection.streaming = self._waits
        self._try_next()

    def cancel(self) -> None:
        self._request.connection.on_close = None
        if self._call is not None:
            self._call.cancel()
        self._end()

    def lost(self, error: Exception) -> None:
        """Try the next endpoint, as this one has failed a probe."""
        if self._call is not None:
            self._call.cancel()
        self.on_done(error)

    def _try_next(self) -> None:
        while self._left:
            endpoint = self._left.popleft()
            if endpoint.available:      # another request may have marked it failed meanwhile
                self._tried += 1
                self._endpoint = endpoint
                endpoint.add_waiting(self)
                self._call = self._dialer.call(endpoint.url, self._request, self._headers(), self)
                return
        self._give_up(502, f"unable to get response from {self._tried} endpoint(s)")

    def _headers(self) -> Dict[str, str]:
        request = self._request
        named = _list_header(request.headers, "connection")
        dropped = _HOP_HEADERS.union(named, ("expect",))    # the proxy has answered Expect
        headers = {
            string.capwords(name, "-"): value for name, value in request.headers.items()
            if name not in dropped
        }
        came_by = request.headers.get("x-forwarded-for", "")
        client = request.remote.rpartition(":")[0]
        headers["X-Forwarded-For"] = f"{came_by}, {client}" if came_by else client
        return headers

    def on_head(self, status: int, headers: Dict[str, str]) -> None:
        assert self._endpoint is not None
        request = self._request
        self._endpoint.answered()
        self._metrics.handled.inc(self._method, str(status))
        seconds = self._dialer.reactor.now() - self._started
        self._metrics.seconds.child(self._method).observe(seconds)
        dropped = _HOP_HEADERS.union(("date",))
        if isinstance(request, CorsRequest):
            dropped = dropped.union(_CORS_HEADERS)      # the reply has those of the proxy
        lines = "".join(
            f"{string.capwords(name, '-')}: {value}\r\n" for name, value in headers.items()
            if name not in dropped
        )
        length = None
        if "transfer-encoding" not in headers and "content-length" in headers:
            length = _content_length(headers)
        request.connection.on_close = None
        self._reply = request.start_stream(status, None, lines, length=length)
        self._reply.on_close = self._client_gone

    def on_data(self, data: bytes) -> None:
        assert self._reply is not None and self._call is not None and self._endpoint is not None
        self._endpoint.answered()
        self._is_empty = False
        self._reply.write(data)
        if self._reply.pending > PROXY_UNREAD_BYTES_MAX:
            self._call.pause()
            self._reply.when_read(self._call.resume)

    def on_done(self, error: Optional[Exception]) -> None:
        if self._reply is None:
            self._try_failed(error or EOFError("unexpected EOF"))
            return
        # A watch without events ends as if the member had ended it: clients start a new one.
        if error is None or self._waits and self._is_empty:
            self._reply.end()
        else:
            self._reply.abort()
        self._end()

    def _try_failed(self, error: Exception) -> None:
        """Try the next endpoint, as this one did not answer."""
        assert self._endpoint is not None and self._call is not None
        endpoint = self._endpoint
        endpoint.remove_waiting(self)
        if isinstance(error, OSError) and error.errno in NO_DESCRIPTOR:     # not the member's fault
            self._give_up(503, f"{_reason(error)}; raise the limit of open files (ulimit -n)")
            return
        self._metrics.dropped.inc(self._method, "failed_sending_request")
        why = _reason(error)
        if isinstance(error, OSError) and error.errno and not self._call.connected:
            why = f"dial tcp {urlsplit(endpoint.url).netloc}: connect: {why}"
        PROXY_LOG.info("failed to direct request to %s: %s", endpoint.url, why)
        endpoint.failed()
        if self._call.connected and self._method not in ("GET", "HEAD"):
            self._left.clear()          # the member may have executed it
        self._try_next()

    def _give_up(self, status: int, text: str) -> None:
        PROXY_LOG.info(text)
        self._metrics.dropped.inc(self._method, "failed_getting_response")
        self._end()
        write_message(self._request, status, f"proxy: {text}")

    def _client_gone(self) -> None:
        PROXY_LOG.info("client %s closed request prematurely", self._request.remote)
        self.cancel()

    def _end(self) -> None:
        if self._endpoint is not None:
            self._endpoint.remove_waiting(self)
        self._ended(self)


class ProxyApi:
    """The client port of a proxy: answers two paths, and forwards the others to a member.

    Thread: reactor.  Source: etcd 2.3 proxy/proxy.go, reverse.go.
    """

    def __init__(self, endpoints: Endpoints, dialer: ProxyDialer, config: ServerConfig) -> None:
        self._endpoints = endpoints
        self._dialer = dialer
        self._origins = frozenset(config.cors)
        self._is_readonly = config.proxy == "readonly"
        self._metrics = ProxyMetrics(dialer.reactor)
        self._forwards: Dict[Forward, int] = {}     # bytes of their bodies
        self._body_bytes = 0                        # of all

    def handle(self, request: HttpRequest) -> None:
        path, request = request.path, allow_origin(request, self._origins)
        if not path.startswith("/"):
            request.reply(400)
        elif not is_clean_path(path):
            redirect(request)
        elif path == "/metrics":
            request.reply(200, utf8(self._metrics.text()), "text/plain; version=0.0.4")
        elif self._is_readonly and request.method != "GET":
            request.reply(501)
        elif request.method == "OPTIONS":
            request.reply(200)
        elif path != "/v2/config/local/proxy":
            self._forward(request)
        elif request.method != "GET":
            refuse_method("GET", request)
        else:
            urls = [endpoint.url for endpoint in self._endpoints.available()]
            write_text(request, 200, json_text({"endpoints": urls}) + "\n")

    def stop(self) -> None:
        for forward in list(self._forwards):
            forward.cancel()

    def _forward(self, request: HttpRequest) -> None:
        method = _method_label(request)
        self._metrics.requests.inc(method)
        if request.body_too_large:
            write_message(
                request, 500, "proxy: failed to read request body: http: request body too large"
            )
            return
        endpoints = self._endpoints.available()
        if not endpoints:
            text = "zero endpoints currently available"
            PROXY_LOG.info(text)
            self._metrics.dropped.inc(method, "zero_endpoints")
            write_message(request, 503, f"proxy: {text}")
            return
        if self._body_bytes > QUEUED_BYTES_MAX:
            self._metrics.dropped.inc(method, "failed_sending_request")
            write_message(request, 503, "proxy: too many large requests wait for the members")
            return
        forward = Forward(request, endpoints, self._dialer, self._metrics, self._forward_ended)
        self._forwards[forward] = len(request.body)
        self._body_bytes += len(request.body)
        forward.start()

    def _forward_ended(self, forward: Forward) -> None:
        self._body_bytes -= self._forwards.pop(forward)


class ProxyServer(ServerThread):
    """A proxy in the caller's process, on a thread of its own; settings as for Server.

        with pyetcd.ProxyServer(data_dir="p", initial_cluster="a=http://10.0.0.1:2380") as proxy:
            print(proxy.client_urls[0])

    Raises StartError from bind() and start().  Thread: any.
    """

    def _init(self, config: ServerConfig) -> None:
        super()._init(config)
        self._endpoints: Optional[Endpoints] = None
        self._api: Optional[ProxyApi] = None

    def bind(self) -> None:
        """Open the listening sockets, so that the ports are known; serve nothing yet."""
        if self._client_listeners:
            return
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._close_listeners)
            for url in self.config.listen_client_urls:
                self._client_listeners.append(self._listen(
                    url, REQUEST_BODY_BYTES_MAX, self.config.client_tls,
                    kept=(CONNECTIONS_MAX, 2),  # a request needs a second one, to a member
                ))
                PROXY_LOG.info("listening for client requests on %s", url)
            on_failure.pop_all()

    def start(self) -> None:
        """Find the members and serve.  Discovery waits until all have registered."""
        config = self.config
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._close_listeners)
            fresh = absent_dirs(os.path.join(config.data_dir or config.name + ".etcd", "proxy"))
            cleanup.callback(remove_dirs, fresh)
            cluster_file = prepare_proxy_dir(config)
            remove_dirs(fresh)          # a proxy that ends while it waits leaves no directory
            cluster = find_cluster(config, cluster_file)
            make_dirs(fresh)
            dialer = ProxyDialer(config, self._reactor)
            self._endpoints = Endpoints(config, dialer, cluster, cluster_file)
            self._endpoints.refresh()
            self._api = ProxyApi(self._endpoints, dialer, config)
            self.bind()
            for listener in self._client_listeners:
                listener.handler = self._api.handle
            self._start_thread()
            cleanup.pop_all()

    def _start_work(self) -> None:
        assert self._endpoints is not None
        self._endpoints.schedule_refresh()

    def _free(self) -> None:
        if self._endpoints is not None:
            self._endpoints.stop()
        if self._api is not None:
            self._api.stop()
