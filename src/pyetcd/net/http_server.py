"""Listeners: sockets that accept connections, in plain HTTP or by TLS."""

from __future__ import annotations

import contextlib
import errno
import http.server
import os
import selectors
import socket
import socketserver
import ssl
from typing import Optional, Set, Tuple
from urllib.parse import urlsplit

from ..base.basics import NO_DESCRIPTOR, descriptors_max
from ..base.ids import package_logger
from ..base.limits import (
    CONNECTIONS_MAX,
    DESCRIPTORS_KEPT,
    REFUSALS_MAX,
    REFUSALS_TOLD_MAX,
    REQUEST_BODY_BYTES_MAX,
    SLOW_CHECK_SECONDS,
)
from ..base.urls import url_address
from .budgets import BufferBudget
from .http_connections import Service
from .http_messages import BadRequest
from .http_requests import Handler
from .reactor import Reactor
from .tls import _TLS_REASONS, HANDSHAKE_SECONDS_MAX, Handshake, TlsContext, tls_reason
from .workers import ThrottledLog, Timer


class PendingConnection:
    """An accepted connection until its TLS handshake is done."""

    def __init__(
        self, listener: Listener, tls: TlsContext, sock: socket.socket, remote: str
    ) -> None:
        self._listener = listener
        self._tls = tls
        self._sock = sock
        self._remote = remote
        self._handshake: Optional[Handshake] = None
        self._timer = listener.reactor.call_later(HANDSHAKE_SECONDS_MAX, self._expire)
        listener.reactor.register(
            sock, selectors.EVENT_READ, self._read_first_byte, patient=listener.patient)

    def close(self) -> None:
        self._detach()
        self._sock.close()

    def _detach(self) -> None:
        """Stop watching the socket."""
        self._timer.cancel()
        if self._handshake is not None:
            self._handshake.cancel()
            self._handshake = None
        else:
            self._listener.reactor.unregister(self._sock)
        self._listener.pending.discard(self)

    def _expire(self) -> None:
        self._detach()
        self._refuse("client sent nothing: TLS handshake timeout")

    def _refuse(self, why: str) -> None:
        self._listener.log_refusal(self._remote, why)
        self._sock.close()

    def _read_first_byte(self, mask: int) -> None:
        """Begin the handshake after a byte of 22; answer a request in plain HTTP as such."""
        try:
            first = self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            first = b""
        self._detach()
        if first == b"\x16":
            self._shake_hands()
        elif first:
            self._listener.log_refusal(self._remote, _TLS_REASONS["HTTP_REQUEST"])
            connection = self._listener.serve(self._sock, self._remote)
            connection.refuse(BadRequest("Client sent an HTTP request to an HTTPS server.\n"))
        else:
            self._sock.close()

    def _shake_hands(self) -> None:
        try:
            sock = self._tls.current.wrap_socket(
                self._sock, server_side=True, do_handshake_on_connect=False
            )
        except OSError:                 # the client has closed the connection
            self._sock.close()
            return
        self._sock = sock
        self._listener.pending.add(self)
        self._handshake = Handshake(
            self._listener.reactor, sock, self._serve, patient=self._listener.patient)

    def _serve(self, error: Optional[OSError]) -> None:
        self._handshake = None
        self._listener.pending.discard(self)
        assert isinstance(self._sock, ssl.SSLSocket)
        try:
            if error is not None:
                raise error
            self._tls.check_peer(self._sock)
        except OSError as failure:
            is_tls = isinstance(failure, ssl.SSLError)
            self._refuse(tls_reason(failure) if is_tls else str(failure))
        else:
            self._listener.serve(self._sock, self._remote)


class Listener(Service, http.server.HTTPServer):
    """A listening socket whose connections the reactor serves.

    Bound at construction (OSError if the port is taken), accepting after start().

    tls   for an https URL; a request in plain HTTP is refused with a sentence
    kept  descriptors for other purposes: a number, or one part in so many of all, if that is less
    """

    allow_reuse_address = os.name == "posix"
    request_queue_size = 1024

    def __init__(
        self, url: str, reactor: Reactor, handler: Handler, *,
        body_max: int = REQUEST_BODY_BYTES_MAX, tls: Optional[TlsContext] = None,
        budget: Optional[BufferBudget] = None, kept: Tuple[int, int] = (DESCRIPTORS_KEPT, 4),
        patient: bool = True,
    ) -> None:
        self.url = url
        Service.__init__(self, reactor, handler, body_max, tls, budget, patient=patient)
        self.pending: Set[PendingConnection] = set()
        self._kept = kept
        self._log = ThrottledLog("http", reactor.now)
        self._sweep: Optional[Timer] = None     # set while it accepts
        family, address = _listen_address(url)
        self.address_family = family
        http.server.HTTPServer.__init__(self, address, http.server.BaseHTTPRequestHandler)
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the own host name, which may ask a name server."""
        if self.address_family == socket.AF_INET6:
            with contextlib.suppress(OSError, AttributeError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)

    @property
    def bound_url(self) -> str:
        """The URL with the port that the system chose for port 0."""
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition(":")[0]
        return f"{parts.scheme}://{host}:{self.server_address[1]}"

    def start(self) -> None:
        """Accept from now on.  Thread: reactor, or before it runs."""
        self.reactor.register(self.socket, selectors.EVENT_READ, self._accept, patient=self.patient)
        self._sweep = self.reactor.every(SLOW_CHECK_SECONDS, self.close_slow)

    def stop(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
            self.reactor.unregister(self.socket)
        self.server_close()
        for pending in list(self.pending):
            pending.close()
        for connection in list(self._connections):
            connection.flush()
            connection.close()

    def _accept(self, mask: int) -> None:
        for _ in range(64):
            try:
                sock, address = self.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._pause(error)
                return
            try:
                self._admit(sock, f"{address[0]}:{address[1]}")
            except OSError:             # the client has left, or the system has no room for it
                sock.close()

    def _admit(self, sock: socket.socket, remote: str) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        room = CONNECTIONS_MAX - len(self._connections) - len(self.pending)
        # A new descriptor is the lowest that is free: its number tells how many are in use.
        descriptors = descriptors_max(*self._kept)
        free = descriptors - sock.fileno()
        if room <= 0:
            why = f"too many connections ({CONNECTIONS_MAX}) to {self.url}"
            self._turn_away(sock, remote, why, told=room > -REFUSALS_MAX)
        elif free <= 0:
            why = (
                f"too many open files ({descriptors}) for more connections to {self.url}; raise the"
                " limit (ulimit -n)"
            )
            self._turn_away(sock, remote, why, told=free > -REFUSALS_TOLD_MAX)
        elif self.tls is None:
            self.serve(sock, remote)
        else:
            self.pending.add(PendingConnection(self, self.tls, sock, remote))

    def _turn_away(self, sock: socket.socket, remote: str, why: str, *, told: bool) -> None:
        """Close one connection too many; `told`: after a 503, where that needs no handshake."""
        self._log.error(f"{why}: turned {remote.rpartition(':')[0]} away", why)
        if told and self.tls is None:
            self.serve(sock, remote).refuse(BadRequest(
                "503 Service Unavailable: too many connections; close some, or use another member",
                503,
            ))
        else:
            sock.close()

    def log_refusal(self, remote: str, why: str) -> None:
        """Log why a connection was refused, at most twice a minute per host and reason."""
        host = remote.rpartition(":")[0]
        self._log.error(f"rejected connection from {remote} to {self.url}: {why}", f"{host} {why}")

    def _pause(self, error: OSError) -> None:
        """Accept again in a second if the system has no descriptor left."""
        if error.errno not in (*NO_DESCRIPTOR, errno.ENOBUFS, errno.ENOMEM):
            return                      # the client has left already
        package_logger("http").error(
            "cannot accept connections on %s: %s; raise the open files limit (ulimit -n)",
            self.url, error.strerror,
        )
        self.reactor.modify(self.socket, 0, self._accept)
        self.reactor.call_later(1.0, self._resume)

    def _resume(self) -> None:
        if self._sweep is not None:
            self.reactor.modify(self.socket, selectors.EVENT_READ, self._accept)


def _listen_address(url: str) -> Tuple[int, Tuple[str, int]]:
    """Return the address family and the address to bind for `url`; without host: all."""
    host, port = url_address(url)
    if not host:
        return (socket.AF_INET6, ("::", port)) if socket.has_dualstack_ipv6() else (
            socket.AF_INET, ("0.0.0.0", port))
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    found.sort(key=lambda info: info[0] != socket.AF_INET)  # localhost: IPv4 first, as Go does
    family, _, _, _, address = found[0]
    return family, (str(address[0]), int(address[1]))
