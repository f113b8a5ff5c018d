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
from .budgets import HeldBytes
from .http_connections import Service
from .http_messages import BadRequest
from .http_requests import Handler
from .reactor import Reactor
from .tls import _TLS_REASONS, HANDSHAKE_SECONDS_MAX, Handshake, TlsContext, tls_reason
from .workers import Complaints, Timer


class Arrival:
    """An accepted connection until its TLS handshake is done; a slow one delays nobody else."""

    def __init__(
        self, listener: Listener, tls: TlsContext, sock: socket.socket, remote: str
    ) -> None:
        self._listener = listener
        self._tls = tls
        self._sock = sock
        self._remote = remote
        self._handshake: Optional[Handshake] = None
        self._timer = listener.reactor.call_later(HANDSHAKE_SECONDS_MAX, self._silent)
        listener.reactor.register(
            sock, selectors.EVENT_READ, self._first_bytes, patient=listener.patient)

    def close(self) -> None:
        """Drop the connection."""
        self._leave()
        self._sock.close()

    def _leave(self) -> None:
        """End the part of this object in the connection's life."""
        self._timer.cancel()
        if self._handshake is not None:
            self._handshake.cancel()
            self._handshake = None
        else:
            self._listener.reactor.unregister(self._sock)
        self._listener.arrived(self)

    def _silent(self) -> None:
        self._log("client sent nothing: TLS handshake timeout")
        self.close()

    def _first_bytes(self, mask: int) -> None:
        """Plain HTTP gets an answer that it understands; TLS begins with a byte of 22."""
        try:
            first = self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            first = b""
        if not first:
            self.close()
        elif first != b"\x16":
            self._log(_TLS_REASONS["HTTP_REQUEST"])
            self._leave()
            connection = self._listener.serve(self._sock, self._remote)
            connection.refuse(BadRequest("Client sent an HTTP request to an HTTPS server.\n"))
        else:
            self._begin()

    def _begin(self) -> None:
        reactor = self._listener.reactor
        self._timer.cancel()
        reactor.unregister(self._sock)
        try:
            sock = self._tls.current.wrap_socket(
                self._sock, server_side=True, do_handshake_on_connect=False
            )
        except OSError:                 # the client is gone: no handshake to wait for
            self._listener.arrived(self)
            self._sock.close()
            return
        self._sock = sock
        self._handshake = Handshake(
            reactor, sock, self._secured, patient=self._listener.patient)

    def _secured(self, error: Optional[OSError]) -> None:
        self._handshake = None
        self._listener.arrived(self)
        assert isinstance(self._sock, ssl.SSLSocket)
        try:
            if error is not None:
                raise error
            self._tls.check_peer(self._sock)
        except ssl.SSLError as refusal:
            self._log(tls_reason(refusal))
            self._sock.close()
        except OSError as failure:
            self._log(str(failure))
            self._sock.close()
        else:
            self._listener.serve(self._sock, self._remote)

    def _log(self, why: str) -> None:
        self._listener.complain(self._remote, why)


class Listener(Service, http.server.HTTPServer):
    """A listening socket whose connections the reactor serves.

    Bound at construction (OSError if the port is taken), accepting after start().  handler gets
    every complete request.  tls for an https URL; what is no TLS gets a sentence in plain HTTP.
    """

    allow_reuse_address = os.name == "posix"
    request_queue_size = 1024

    def __init__(
        self, url: str, reactor: Reactor, handler: Handler, *,
        body_max: int = REQUEST_BODY_BYTES_MAX, tls: Optional[TlsContext] = None,
        held: Optional[HeldBytes] = None, kept: Tuple[int, int] = (DESCRIPTORS_KEPT, 4),
        patient: bool = True,
    ) -> None:
        self.url = url
        Service.__init__(self, reactor, handler, body_max, tls, held, patient=patient)
        self._kept = kept               # of the descriptors, for other purposes
        self._complaints = Complaints("http", reactor.now)
        self._arriving: Set[Arrival] = set()            # in the handshake of TLS
        self._sweep: Optional[Timer] = None
        self._started = False
        family, address = _listen_address(url)
        self.address_family = family
        http.server.HTTPServer.__init__(self, address, http.server.BaseHTTPRequestHandler)
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of our own name, which may ask a name server."""
        if self.address_family == socket.AF_INET6:
            with contextlib.suppress(OSError, AttributeError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)

    @property
    def bound_url(self) -> str:
        """The URL with the port that the system chose, if it was 0."""
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition(":")[0]
        return f"{parts.scheme}://{host}:{self.server_address[1]}"

    def start(self) -> None:
        """Accept from now on.  Thread: reactor, or before it runs."""
        self._started = True
        self._listen()
        self._sweep = self.reactor.call_later(SLOW_CHECK_SECONDS, self._close_slow)

    def _listen(self) -> None:
        self.reactor.register(
            self.socket, selectors.EVENT_READ, self._accept, patient=self.patient)

    def stop(self) -> None:
        """Close the listening socket and every connection."""
        if self._started:
            self.reactor.unregister(self.socket)
        if self._sweep is not None:
            self._sweep.cancel()
        self._started = False
        self.server_close()
        for arrival in list(self._arriving):
            arrival.close()
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
            except OSError:             # the client is gone, or the system has no room for it
                sock.close()

    def _admit(self, sock: socket.socket, remote: str) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        room = CONNECTIONS_MAX - len(self._connections) - len(self._arriving)
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
            self._arriving.add(Arrival(self, self.tls, sock, remote))

    def _turn_away(self, sock: socket.socket, remote: str, why: str, *, told: bool) -> None:
        """There are too many connections.  told: say so, where that needs no handshake."""
        self._complaints.say(f"{why}: turned {remote.rpartition(':')[0]} away", why)
        if told and self.tls is None:
            self.serve(sock, remote).refuse(BadRequest(
                "503 Service Unavailable: too many connections; close some, or use another member",
                503,
            ))
        else:
            sock.close()

    def arrived(self, arrival: Arrival) -> None:
        """The handshake has ended, one way or the other."""
        self._arriving.discard(arrival)

    def complain(self, remote: str, why: str) -> None:
        """Log why a connection was refused; the same about one host not again and again."""
        host = remote.rpartition(":")[0]
        self._complaints.say(
            f"rejected connection from {remote} to {self.url}: {why}", f"{host} {why}"
        )

    def _pause(self, error: OSError) -> None:
        """No descriptor left, most likely: accept again in a second, when some may be free."""
        if error.errno not in (*NO_DESCRIPTOR, errno.ENOBUFS, errno.ENOMEM):
            return                      # the client is gone already
        package_logger("http").error(
            "cannot accept connections on %s: %s; raise the open files limit (ulimit -n)",
            self.url, error.strerror,
        )
        self.reactor.unregister(self.socket)
        self._started = False
        self.reactor.call_later(1.0, self._resume)

    def _resume(self) -> None:
        if self.socket.fileno() >= 0 and not self._started:
            self._started = True
            self._listen()

    def _close_slow(self) -> None:
        self.close_slow()
        self._sweep = self.reactor.call_later(SLOW_CHECK_SECONDS, self._close_slow)


def _listen_address(url: str) -> Tuple[int, Tuple[str, int]]:
    """Return the address family and address to bind for `url`; an empty host is every interface."""
    host, port = url_address(url)
    if not host:
        return (socket.AF_INET6, ("::", port)) if socket.has_dualstack_ipv6() else (
            socket.AF_INET, ("0.0.0.0", port))
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    found.sort(key=lambda info: info[0] != socket.AF_INET)  # localhost: IPv4 first, as Go does
    family, _, _, _, address = found[0]
    return family, (str(address[0]), int(address[1]))
