"""Embedding: a member inside any program, on a thread of its own, `reactor`."""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Tuple, Type, TypeVar

from ..api.discovery import DiscoveryService
from ..api.routes import ClientApi, PeerApi, _bad_request
from ..base.basics import TlsFiles
from ..base.errors import ServerStopped, StartError
from ..base.limits import DESCRIPTORS_KEPT, PEER_BODY_BYTES_MAX, REQUEST_BODY_BYTES_MAX
from ..base.system import check_system
from ..base.text import most_like
from ..base.urls import check_url, is_https, url_address
from ..member.cluster import SERVER_LOG
from ..member.configuration import Bootstrap, ServerConfig
from ..member.server import EtcdServer
from ..member.statistics import Metrics
from ..net.budgets import BufferBudget
from ..net.http_server import Listener
from ..net.reactor import Reactor
from ..net.tls import TlsContext
from ..net.workers import outcome_of
from ..peer.transport import Transport
from .addresses import ETCD_LOG
from .bootstrap import bootstrap
from .data_loss import DataLossCheck

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..member.configuration import ServerSettings

_Hosted = TypeVar("_Hosted", bound="ServerThread")


def checked_settings(settings: Mapping[str, Any]) -> Dict[str, Any]:
    """Return fields of ServerConfig, lists as tuples.  Raises TypeError, ValueError for a URL."""
    checked = dict(settings)
    for name, value in settings.items():
        if name not in ServerConfig._fields:
            near = most_like(name, ServerConfig._fields)
            meant = f"; did you mean {near}?" if near else ""
            raise TypeError(f"there is no setting {name}{meant}")
        if type(ServerConfig._field_defaults[name]) is tuple:
            if isinstance(value, str):
                raise TypeError(f"{name} is a list, not one string")
            checked[name] = tuple(map(check_url, value)) if "urls" in name else tuple(value)
    return checked


class ServerThread:
    """The base of a member and a proxy: listeners, and a reactor on a thread of its own.

    settings are the fields of ServerConfig; URL lists may be any sequence.
    Raises TypeError for an unknown setting, ValueError for a bad URL.  Thread: any.
    """

    def __init__(self, **settings: Unpack[ServerSettings]) -> None:
        free = ("http://127.0.0.1:0",)
        config = ServerConfig(
            listen_client_urls=free, listen_peer_urls=free, advertise_client_urls=(),
            initial_advertise_peer_urls=(),
        )
        self._init(config._replace(**checked_settings(settings)))

    @classmethod
    def from_config(cls: Type[_Hosted], config: ServerConfig) -> _Hosted:
        """Return a server with exactly this configuration."""
        server = cls.__new__(cls)
        server._init(config)
        return server

    def _init(self, config: ServerConfig) -> None:
        check_system()
        self.config = config
        self._reactor = Reactor()       # its sockets are closed by stop(), also without start()
        self._budget = BufferBudget(self._reactor)
        self._client_listeners: List[Listener] = []
        self._peer_listeners: List[Listener] = []
        self._thread: Optional[threading.Thread] = None
        self._error: Optional[BaseException] = None

    def __enter__(self: _Hosted) -> _Hosted:
        """Start; close everything after a failure."""
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.stop)
            self.start()
            on_failure.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """Stop in order: waiting requests are rejected, the last batch is written, files closed."""
        if self._thread is None:
            self._close()
        elif self._thread.is_alive():
            self._reactor.call_soon_threadsafe(self._stop_in_order)
            self._thread.join()

    def wait(self) -> int:
        """Wait for the end of the server; return the exit code: 0, or 1 after a failure."""
        if self._thread is not None:
            self._thread.join()
        return 1 if self._error is not None else 0

    @property
    def client_urls(self) -> Tuple[str, ...]:
        """Bound client URLs, with the real ports."""
        return tuple(listener.bound_url for listener in self._client_listeners)

    def _listen(
        self, url: str, body_max: int, files: TlsFiles, *,
        kept: Tuple[int, int] = (DESCRIPTORS_KEPT, 4), patient: bool = True,
    ) -> Listener:
        """Return a listener without a handler of its own yet.  Raises StartError."""
        tls = None
        if is_https(url):
            if not files.cert_file or not files.key_file:
                raise StartError(
                    f"cannot listen on TLS for {url}: KeyFile and CertFile are not presented;"
                    f" give both, or use an http URL"
                )
            tls = TlsContext(files, server=True, now=self._reactor.now)
        try:
            return Listener(
                url, self._reactor, _bad_request, body_max=body_max, tls=tls, budget=self._budget,
                kept=kept, patient=patient,
            )
        except OSError as error:
            host, port = url_address(url)
            what = f"listen tcp {host}:{port}: bind: {(error.strerror or str(error)).lower()}"
            hint = BIND_HINTS.get(error.errno or 0)
            raise StartError(f"{what}: {hint}" if hint else what) from None

    def _start_thread(self) -> None:
        for listener in self._peer_listeners + self._client_listeners:
            listener.start()
        thread = threading.Thread(target=self._run, name="reactor", daemon=True)
        thread.start()
        self._thread = thread

    def _run(self) -> None:
        try:
            self._start_work()
            self._reactor.run()
        except Exception as error:
            self._error = error
            ETCD_LOG.critical("the member ends: %s", error, exc_info=True)
        finally:
            self._close()

    def _start_work(self) -> None:
        """Start the parts of a subclass, on the reactor's thread."""

    def _free(self) -> None:
        """Free the parts of a subclass, in any state: after a failed start too."""

    def _close(self) -> None:
        with contextlib.ExitStack() as each:
            each.callback(self._reactor.close)
            each.callback(self._close_listeners)
            self._free()

    def _stop_in_order(self) -> None:
        """Stop, on the reactor's thread."""
        self._close_listeners()
        self._reactor.stop()

    def _close_listeners(self) -> None:
        with contextlib.ExitStack() as each:
            for listener in self._client_listeners + self._peer_listeners:
                each.callback(listener.stop)
            self._client_listeners, self._peer_listeners = [], []


class Server(ServerThread):
    """A whole member in the caller's process, on a thread of its own.

        with pyetcd.Server(data_dir="/var/lib/x", listen_client_urls=["http://127.0.0.1:0"]) as s:
            print(s.client_urls[0])

    settings are the fields of ServerConfig; URL lists may be any sequence.  By default the member
    listens on free loopback ports and advertises the bound URLs.  Several members may live in one
    process.  Raises StartError from bind() and start().  Thread: any.
    """

    _transport_type: Type[Transport] = Transport

    def _init(self, config: ServerConfig) -> None:
        super()._init(config)
        self.etcd: Optional[EtcdServer] = None      # after start(); touch it through call() only
        self._client_api: Optional[ClientApi] = None
        self._data_loss_check: Optional[DataLossCheck] = None
        self._ready = threading.Event()
        self._leaving = False           # stop() has begun

    def bind(self) -> None:
        """Open the listening sockets, so that the ports are known; serve nothing yet."""
        if self._client_listeners:
            return
        config = self.config
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._abandon_listeners)
            for url in config.listen_peer_urls:
                self._peer_listeners.append(self._listen(
                    url, PEER_BODY_BYTES_MAX, config.peer_tls,
                    kept=(DESCRIPTORS_KEPT // 2, 8), patient=False,
                ))
                ETCD_LOG.info("listening for peers on %s", url)
            for url in config.listen_client_urls:
                self._client_listeners.append(
                    self._listen(url, REQUEST_BODY_BYTES_MAX, config.client_tls))
                ETCD_LOG.info("listening for client requests on %s", url)
            on_failure.pop_all()
        if not config.advertise_client_urls:
            config = config._replace(advertise_client_urls=self.client_urls)
        if not config.initial_advertise_peer_urls:
            config = config._replace(initial_advertise_peer_urls=self.peer_urls)
        self.config = config

    def start(self, *, initial_cluster: str = "") -> None:
        """Bind, form or join the cluster, and serve.  Discovery waits for the other members.

        initial_cluster  replaces the configured one, if the caller binds all members first
        """
        self.bind()
        if initial_cluster:
            self.config = self.config._replace(initial_cluster=initial_cluster)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._abandon_listeners)
            boot = bootstrap(self.config)
            on_failure.callback(boot.wal.close)
            on_failure.callback(self._free)
            self._assemble(boot)
            self._start_thread()
            on_failure.pop_all()

    def _assemble(self, boot: Bootstrap) -> None:
        self.etcd = EtcdServer(
            self.config, boot, self._reactor, failed=self._failed, removed=self._removed,
            published=self.set_ready, transport_type=self._transport_type,
        )
        if DataLossCheck.is_due(boot):
            self._data_loss_check = DataLossCheck(self.etcd, self._refuse, boot.peer_tls)
        self._client_api = api = ClientApi(self.etcd)
        self._count_client_bytes(self.etcd.metrics)
        api.fallback = DiscoveryService(self.etcd.do, api.serve, self._reactor.wall_ns).handle
        for listener in self._client_listeners:
            listener.handler = api.handler
        peer_api = PeerApi(self.etcd)
        for listener in self._peer_listeners:
            listener.handler = peer_api.handle
            self.etcd.transport.guard(listener, boot.data_dir.snap)
        self._reactor.on_turn = self.etcd.on_turn

    def kill(self) -> None:
        """End at once, as `kill -9` does: write and send nothing more.  For tests."""
        if self._thread is not None and self.etcd is not None:
            self._reactor.call_soon_threadsafe(self._halt, ServerStopped("killed"))
            self._thread.join()

    def wait_ready(self, timeout_s: float = 10.0) -> bool:
        """Wait until this member has a leader and is published; return False after timeout_s."""
        return self._ready.wait(timeout_s)

    def call(self, work: Callable[[EtcdServer], Any], timeout_s: float = 10.0) -> Any:
        """Return work(etcd), run on the reactor's thread.  Raises TimeoutError, ServerStopped."""
        if self.etcd is None or self._thread is None or not self._thread.is_alive():
            raise ServerStopped()
        answers: queue.Queue[Tuple[Optional[Exception], Any]] = queue.Queue()
        etcd = self.etcd

        self._reactor.call_soon_threadsafe(lambda: answers.put(outcome_of(work, etcd)))
        for _ in range(max(round(timeout_s / 0.1), 1)):     # the reactor may end meanwhile
            with contextlib.suppress(queue.Empty):
                error, result = answers.get(timeout=min(0.1, timeout_s))
                break
            if not self._thread.is_alive() and answers.empty():
                raise ServerStopped()
        else:
            raise TimeoutError(f"the member did not get to it within {timeout_s} s")
        if error is not None:
            raise error             # of the caller's code: it belongs to the caller
        return result

    @property
    def peer_urls(self) -> Tuple[str, ...]:
        """Bound peer URLs, with the real ports."""
        return tuple(listener.bound_url for listener in self._peer_listeners)

    def set_ready(self) -> None:
        """Note that this member is published; programs that start `etcd` wait for this log line."""
        if not self._ready.is_set():
            ETCD_LOG.info("ready to serve client requests")
        self._ready.set()

    def _count_client_bytes(self, metrics: Metrics) -> None:
        """Add the bytes of the client port, under the names of etcd 3.x, whose clients use gRPC."""
        listeners = self._client_listeners
        metrics.total("etcd_network_client_grpc_received_bytes_total",
                      "Bytes from clients, HTTP here, heads included.",
                      lambda: {(): sum(listener.received_bytes for listener in listeners)})
        metrics.total("etcd_network_client_grpc_sent_bytes_total",
                      "Bytes to clients, HTTP here, heads included.",
                      lambda: {(): sum(listener.sent_bytes for listener in listeners)})

    def _start_work(self) -> None:
        assert self.etcd is not None
        self.etcd.start()

    def _free(self) -> None:
        if self._data_loss_check is not None:
            self._data_loss_check.end()
        if self._client_api is not None:
            self._client_api.stop()
        if self.etcd is not None:
            self.etcd.abandon()

    def _stop_in_order(self) -> None:
        assert self.etcd is not None
        if not self.etcd.stopping and not self._leaving:
            self._leaving = True
            self.etcd.leave(self._stop_member)

    def _stop_member(self) -> None:
        assert self.etcd is not None
        if not self.etcd.stopping:
            self.etcd.stop()
            super()._stop_in_order()

    def _failed(self, error: BaseException) -> None:
        """End the member, which sends nothing more: its data may no longer be durable."""
        hint = ""
        if isinstance(error, FileNotFoundError):
            hint = "; was the data directory renamed or removed while the member ran?"
        ETCD_LOG.critical("the member ends: %s%s", error, hint)
        self._halt(error)

    def _halt(self, error: BaseException) -> None:
        if not isinstance(error, ServerStopped):
            self._error = error
        if self.etcd is not None:
            self.etcd.abandon()
        self._reactor.stop()

    def _refuse(self, error: StartError) -> None:
        """End the member with an error that bootstrap would have raised, had it known."""
        ETCD_LOG.critical("%s", error)
        self._halt(error)

    def _removed(self) -> None:
        if self.etcd is not None and not self.etcd.stopping:
            SERVER_LOG.error("the member has been permanently removed from the cluster")
            SERVER_LOG.error("the data-dir used by this member must be removed.")
            self._stop_member()

    def _abandon_listeners(self) -> None:
        """Close the listeners after a failed start, and log the ports that are free again."""
        for listener in self._client_listeners:
            ETCD_LOG.info("stopping listening for client requests on %s", listener.url)
        for listener in self._peer_listeners:
            ETCD_LOG.info("stopping listening for peers on %s", listener.url)
        self._close_listeners()


BIND_HINTS = {
    errno.EADDRINUSE: "another program, perhaps another etcd, uses it; stop it or choose another"
                      " port with -listen-client-urls and -listen-peer-urls",
    errno.EACCES: "ports below 1024 need root; choose a higher one",
    errno.EADDRNOTAVAIL: "this machine does not have that address; see `ip addr`",
}
