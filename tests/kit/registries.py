"""Discovery, and Bootstrap."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import urllib.parse
import urllib.request
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest

from tests.kit.basics import free_port
from tests.kit.servers import HttpStub

_DISC_TOKEN = "9dfd14389c921bdde47847f13b7f51cb"


class _DiscRegistry(HttpStub):
    """A v2 keys API just large enough for discovery.

    answers    (status, body) to give to the next requests instead of the right ones
    requests   `METHOD target` of all requests so far
    on_wait    called when a member waits for an event of the whole token; may return the answer
    """

    def __init__(self, port: int = 0, size: str = "3") -> None:
        self.requests: List[str] = []
        self.forms: List[str] = []
        self.answers: List[Tuple[int, bytes]] = []
        self.on_wait: Callable[[], Any] = lambda: None
        self.index = 3
        self.prefix = f"/v2/keys/_etcd/registry/{_DISC_TOKEN}"
        self._nodes: Dict[str, Dict[str, Any]] = {}
        self._events: List[Dict[str, Any]] = []
        self._changed = threading.Condition()
        self._closing = False
        super().__init__(self.serve, port=port)
        self.url = self.base + self.prefix
        if size:
            self.put("_config/size", size)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        super().close()

    def put(self, name: str, value: str, action: str = "create") -> Dict[str, Any]:
        with self._changed:
            self.index += 1
            node = {"key": f"/_etcd/registry/{_DISC_TOKEN}/{name}", "value": value,
                    "modifiedIndex": self.index, "createdIndex": self.index}
            if action == "create":
                self._nodes[name] = node
            event = {"action": action, "node": node}
            self._events.append(event)
            self._changed.notify_all()
            return event

    def serve(self, handler: Any) -> None:
        form = handler.body.decode()
        self.requests.append(f"{handler.command} {handler.path}")
        self.forms.append(form)
        status, body = self.answers.pop(0) if self.answers else self._answer(handler, form)
        headers = {"Location": body.decode()} if 300 < status < 400 else {}
        handler.reply(status, body, **headers, **{"X-Etcd-Index": str(self.index)})

    def _answer(self, handler: Any, form: str) -> Tuple[int, bytes]:
        path, _, query = handler.path.partition("?")
        name = path[len(self.prefix):].strip("/")
        options = dict(urllib.parse.parse_qsl(query))
        if handler.command == "PUT":
            if name in self._nodes:
                return 412, b'{"errorCode":105,"message":"Key already exists","index":9}'
            return 201, json.dumps(self.put(name, urllib.parse.parse_qs(form)["value"][0])).encode()
        if "wait" in options:
            return self._wait(name, int(options["waitIndex"]))
        if name == "":
            nodes = [n for k, n in self._nodes.items() if not k.startswith("_")]
            random.shuffle(nodes)
            listing = {"action": "get", "node": {"dir": True, "nodes": nodes}}
            return 200, json.dumps(listing).encode()
        if name not in self._nodes:
            return 404, b'{"errorCode":100,"message":"Key not found","cause":"/_etcd","index":3}'
        return 200, json.dumps({"action": "get", "node": self._nodes[name]}).encode()

    def _wait(self, name: str, index: int) -> Tuple[int, bytes]:
        answer: Optional[Tuple[int, bytes]] = None if name else self.on_wait()
        if answer:
            return answer
        with self._changed:
            while not self._closing:
                for event in self._events:
                    node = event["node"]
                    if node["modifiedIndex"] >= index and node["key"].endswith("/" + name):
                        return 200, json.dumps(event).encode()
                    if node["modifiedIndex"] >= index and not name:
                        return 200, json.dumps(event).encode()
                self._changed.wait(10)
        return 200, b""


@pytest.fixture
def disc_registry() -> Iterator[_DiscRegistry]:
    """A registry with a token of size 3."""
    registry = _DiscRegistry()
    yield registry
    registry.close()


def _disc_sleepless(seconds: float) -> None:
    raise AssertionError(f"would sleep {seconds} s")


def _disc_set_size(value: str) -> Callable[[_DiscRegistry], None]:
    return lambda registry: (registry.put("_config/size", value), None)[1]


def _disc_fill(*names: str) -> Callable[[_DiscRegistry], None]:
    def fill(registry: _DiscRegistry) -> None:
        for name in names:
            registry.put(name, f"{name}=http://{name}:1")

    return fill


# -- SRV records -----------------------------------------------------------------


class _DiscNameServer:
    """A DNS server for SRV records on one loopback port, UDP and TCP, on threads."""

    def __init__(self, zone: Dict[str, List[Tuple[int, int, int, str]]]) -> None:
        self.zone = zone
        self.truncate = False
        self.garbage = False
        self.queries: List[str] = []
        self.address = ("127.0.0.1", free_port())
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind(self.address)
        self._tcp = socket.create_server(self.address)
        self._threads = [threading.Thread(target=serve, daemon=True)
                         for serve in (self._serve_udp, self._serve_tcp)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self.address)
        with socket.create_connection(self.address) as end:
            end.sendall(b"\0\0")
        for thread in self._threads:
            thread.join(10)
        self._udp.close()
        self._tcp.close()

    def _serve_udp(self) -> None:
        while True:
            query, client = self._udp.recvfrom(4096)
            if not query:
                return
            self._udp.sendto(b"\0\0 not yours", client)
            answer = self._answer(query)
            if self.truncate:
                answer = answer[:2] + b"\x83\x80" + query[4:6] + bytes(6) + query[12:]
            self._udp.sendto(answer[:14] if self.garbage else answer, client)

    def _serve_tcp(self) -> None:
        while True:
            sock, _ = self._tcp.accept()
            with sock, sock.makefile("rb") as file:
                (size,) = struct.unpack(">H", file.read(2))
                if not size:
                    return
                answer = self._answer(file.read(size))
                sock.sendall(struct.pack(">H", len(answer)) + answer)

    def _answer(self, query: bytes) -> bytes:
        labels, offset = [], 12
        while query[offset]:
            labels.append(query[offset + 1:offset + 1 + query[offset]].decode())
            offset += 1 + query[offset]
        name = ".".join(labels)
        self.queries.append(name)
        records = self.zone.get(name, [])
        code = 0 if name in self.zone else 3
        count = len(records) and len(records) + 1
        head = query[:2] + struct.pack(">5H", 0x8180 | code, 1, count, 0, 0)
        body = query[12:]
        if records:                     # an alias first: other types are skipped
            body += struct.pack(">3HIH", 0xC00C, 5, 1, 60, 2) + b"\xc0\x0c"
        for priority, weight, port, target in records:
            first, _, rest = target.partition(".")
            # The target ends in a pointer to the domain in the question.
            domain = 12 + sum(len(label) + 1 for label in labels[:2])
            assert rest == ".".join(labels[2:])
            data = struct.pack(">3H", priority, weight, port)
            data += bytes((len(first),)) + first.encode() + struct.pack(">H", 0xC000 | domain)
            body += struct.pack(">3HIH", 0xC00C, 33, 1, 60, len(data)) + data
        return head + body


@pytest.fixture
def disc_dns(monkeypatch: pytest.MonkeyPatch) -> Iterator[_DiscNameServer]:
    """A name server with both kinds of service records of example.test, whose hosts resolve."""
    server = _DiscNameServer({
        "_etcd-server._tcp.example.test": [
            (10, 0, 2380, "n2.example.test"), (0, 0, 2380, "n1.example.test"),
            (10, 5, 2380, "n3.example.test"), (20, 0, 2380, "gone.example.test"),
        ],
        "_etcd-server-ssl._tcp.example.test": [(0, 0, 7001, "n4.example.test")],
    })
    hosts = {f"n{number}.example.test": f"10.0.0.{number}" for number in range(1, 5)}
    real = socket.getaddrinfo

    def resolve(host: str, port: int, *args: Any, **options: Any) -> Any:
        if host == "gone.example.test":
            raise socket.gaierror(-2, "Name or service not known")
        return real(hosts.get(host, host), port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    yield server
    server.close()
