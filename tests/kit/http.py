"""HTTP contract."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import re
import socket
import urllib.parse
import urllib.request

import pytest

import pyetcd
from tests.kit.basics import eventually

_HTTP_FORM = {"Content-Type": "application/x-www-form-urlencoded"}
_HTTP_JSON = {"Content-Type": "application/json"}
_HTTP_TEXT = "text/plain; charset=utf-8"


@pytest.fixture
def http_server(tmp_path):
    """A member alone, ready, in this process."""
    with _http_member(tmp_path) as server:
        yield server


@contextlib.contextmanager
def _http_member(tmp_path, **settings):
    free = ["http://127.0.0.1:0"]
    settings = {"listen_client_urls": free, "listen_peer_urls": free, **settings}
    with pyetcd.Server(data_dir=str(tmp_path / "data"), **settings) as server:
        assert server.wait_ready(60)
        eventually(lambda: server.call(lambda etcd: etcd.cluster.version))
        yield server


def _http_ask(server, method, path, body=None, headers=None, *, peer=False):
    """Return (status, headers, body bytes) of one request on a connection of its own."""
    url = (server.peer_urls if peer else server.client_urls)[0]
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def _http_keys(server, method, path, form=None):
    """Return (status, decoded JSON) of a request below /v2/keys."""
    headers = _HTTP_FORM if form is not None else {}
    status, _, body = _http_ask(server, method, "/v2/keys" + path, form, headers)
    return status, json.loads(body)


class _HttpSocket:
    """A raw connection to a URL, or a server's client port, for what no HTTP library would send."""

    def __init__(self, server, receive_buffer=0, timeout_s=10, tls=None):
        url = server if isinstance(server, str) else server.client_urls[0]
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout_s)
        self.socket.connect(pyetcd.url_address(url))
        self.socket = tls.wrap_socket(self.socket) if tls else self.socket
        self.data = b""

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def until(self, end):
        """Read up to and including `end`; return that."""
        while end not in self.data:
            self._receive(repr(end))
        found, _, self.data = self.data.partition(end)
        return found + end

    def exactly(self, size):
        """Read `size` bytes."""
        while len(self.data) < size:
            self._receive(f"{size} bytes")
        found, self.data = self.data[:size], self.data[size:]
        return found

    def _receive(self, wanted):
        piece = self.socket.recv(65536)
        assert piece, f"closed before {wanted}; got {self.data!r}"
        self.data += piece

    def answer(self):
        """Read one answer with Content-Length; return (status, head, body)."""
        head = self.until(b"\r\n\r\n").decode("latin-1")
        size = int(re.search(r"(?i)content-length: (\d+)", head).group(1))
        return int(head.split()[1]), head, self.exactly(size)

    def chunk(self):
        """Read one chunk; b"" at the end of the body."""
        size = int(self.until(b"\r\n"), 16)
        return self.exactly(size + 2)[:-2]

    def event(self):
        """Read one event, in one chunk or, behind a proxy, in several."""
        data = self.chunk()
        while not data.endswith(b"\n"):
            more = self.chunk()
            assert more, f"the body ends within an event: {data!r}"
            data += more
        return json.loads(data)

    def rest(self):
        """Read until the server closes."""
        with contextlib.suppress(ConnectionResetError):
            while piece := self.socket.recv(65536):
                self.data += piece
        return self.data


def _http_get(path="/version", *headers, version="1.1"):
    lines = [f"GET {path} HTTP/{version}", "Host: x", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


# What no host can be called -> etcd's reason, where Go has one.
_BAD_HOSTS = {
    "http://${IP}:2380": 'invalid character "$" in host name',
    "http://{{ip}}:2380": 'invalid character "{" in host name',
    "http://<ip>:2380": 'invalid character "<" in host name',
    "http://a b:2380": 'invalid character " " in host name',
    "http://a|b:2380": 'invalid character "|" in host name',
    "http://a\\b:2380": 'invalid character "\\\\" in host name',
    "http://a^b:2380": 'invalid character "^" in host name',
    "http://%41:2380": 'invalid URL escape "%41"',
    "http://%zz:2380": 'invalid URL escape "%zz"',
    "http://[fe80::1%eth0]:2380": 'invalid URL escape "%et"',
    "http://[fe80::1%25eth0]:2380": "an address with a zone names an interface of one machine",
    "http://[::1:2380": "missing ']' in host",
    "http://[10.0.0.1]:2380": 'invalid IPv6 address "[10.0.0.1]"',
    "http://10.0.0.256:2380": 'invalid IPv4 address "10.0.0.256"',
    "http://10.0.0:2380": 'invalid IPv4 address "10.0.0"',
    "http://010.0.0.1:2380": 'invalid IPv4 address "010.0.0.1"',
    "http://a..b:2380": 'invalid host name "a..b"',
    "http://a\u200bb:2380": "invalid host name",
    "http://a\u00a0b:2380": "invalid host name",
    "http://a\uff0fb:2380": "invalid host name",
    "http://\uff05{ip}:2380": "in host name",
    "http://a\uff5cb:2380": "invalid host name",
    f"http://{'a' * 64}:2380": f'invalid host name "{"a" * 64}"',
    f"http://{'a.' * 127}b:2380": "invalid host name",
    "http://h:70000": 'invalid port ":70000" after host',
    "http://h:x": 'invalid port ":x" after host',
    "http://h:\u0663": 'invalid port ":\u0663" after host',
    "http://a\nb:2380": "invalid control character in URL",
    "http://u p@h:2380": "net/url: invalid userinfo",
}
