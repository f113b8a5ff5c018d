"""The servers that our own clients, proxies and members meet in tests: HTTP, and raw bytes."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
from typing import Any, Callable

from tests.kit.basics import free_port


class HttpStub:
    """Gives each request, on a thread of its own, to serve(handler).

    handler  BaseHTTPRequestHandler with `reply` and the `body` that came
    port     0: a free one, kept by open() after close()
    protocol "HTTP/1.0" ends the connection after each answer
    """

    def __init__(
        self, serve: Callable[[Any], None], *, port: int = 0, protocol: str = "HTTP/1.0"
    ) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = protocol

            def handle_any(self) -> None:
                self.body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                serve(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = handle_any

            def reply(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def hang_up(self) -> None:
                self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        self._handler = Handler
        self._port = port or free_port()
        self.base = f"http://127.0.0.1:{self._port}"
        self.open()

    def open(self) -> None:
        """Listen, on the same port as before."""
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Refuse connections; nothing if it does."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class RawServer:
    """Gives each connection, on a thread of its own, to serve(socket), and closes it then."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", free_port()), backlog=128)
        self.connections = 0
        self.closed = threading.Semaphore(0)    # released for every connection we closed
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="raw-server", daemon=True).start()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(
                    target=self._run, args=(connection,), name="raw-server-connection",
                    daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self._serve(connection)
            connection.shutdown(socket.SHUT_RDWR)
        self.closed.release()
