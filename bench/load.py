"""Load and observers: wrk, a loader of many keys, waiting watchers, and who has to wait."""

from __future__ import annotations

import contextlib
import json
import random
import selectors
import shlex
import socket
import string
import subprocess
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple

from members import FORM, VALUE, BenchError, Member

KEY_COUNT = 1_000                       # keys that the PUT cases walk through

LUA_DONE = """
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\nRESULT {"requests": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "errors": %d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1000,
    latency:percentile(99) / 1000, e.connect + e.read + e.write + e.status + e.timeout))
end
"""

LUA_GET = LUA_DONE      # the request is wrk's own: no Lua runs per request


def lua_put(
    value: str = VALUE, keys: int = KEY_COUNT, authorization: str = "", gets: int = 0
) -> str:
    """A script that walks through the keys; the requests are made before the clock starts.

    gets  so many GETs before each PUT
    """
    return """
local requests, at = {}, 0
init = function(args)
  local value = "value=%(value)s"
  for i = 0, %(keys)d - 1 do
    local path = string.format("/v2/keys/bench/key-%%06d", i)
    local head = {["Host"] = wrk.host .. ":" .. wrk.port, ["Authorization"] = %(authorization)s}
    for _ = 1, %(gets)d do
      requests[#requests + 1] = wrk.format("GET", "/v2/keys/bench/one", head)
    end
    head["Content-Type"] = "%(form)s"
    requests[#requests + 1] = wrk.format("PUT", path, head, value)
  end
end
request = function()
  at = at %% #requests + 1
  return requests[at]
end
""" % {
        "keys": keys, "value": value, "form": FORM["Content-Type"], "gets": gets,
        "authorization": f'"{authorization}"' if authorization else "nil",
    } + LUA_DONE


def random_value(size: int) -> str:
    """Letters and digits, the same in every run."""
    return "".join(random.Random(size).choices(string.ascii_letters + string.digits, k=size))


class Load(NamedTuple):
    """Result of one wrk run."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int


class Wrk:
    """Runs wrk with one thread."""

    def __init__(self, scratch: Path) -> None:
        self._scripts = scratch / "lua"
        self._scripts.mkdir()

    def run(
        self, url: str, script: str, connections: int, seconds: float, *, warms: bool = False
    ) -> Load:
        """Load one URL; an error spoils the run, and so does silence.  Raises BenchError.

        warms  it only warms up, and may be silent: etcd with 1,000,000 keys is during a snapshot
        """
        path = self._scripts / f"{abs(hash(script))}.lua"
        if not path.exists():
            path.write_text(script)
        command = ["wrk", "-t", "1", "-c", str(connections), "-d", f"{max(1, round(seconds))}s",
                   "--timeout", "10s", "-s", str(path), url]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=seconds + 60)
        for line in done.stdout.splitlines():
            if line.startswith("RESULT "):
                load = Load(**json.loads(line[len("RESULT "):]))
                if load.errors or not (load.requests or warms):
                    raise BenchError(f"{load.errors} errors in {load.requests} requests to {url}")
                return load
        raise BenchError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")


def put_keys(
    member: Member, count: int, *, directory: str = "load", fields: str = "", connections: int = 64
) -> None:
    """PUT so many different keys of 64-byte values exactly once, many connections at a time.

    fields  more form fields, beginning with `&`
    """
    host = f"127.0.0.1:{member.client_port}"
    pending = iter(range(count))
    body = f"value={VALUE}{fields}"

    def request(index: int) -> bytes:
        return (f"PUT /v2/keys/{directory}/key-{index:07d} HTTP/1.1\r\nHost: {host}\r\n"
                f"Content-Type: {FORM['Content-Type']}\r\nContent-Length: {len(body)}\r\n\r\n"
                f"{body}").encode()

    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        unfinished = 0

        def send_next(sock: socket.socket) -> int:
            index = next(pending, None)
            if index is None:
                selector.unregister(sock)
                return 0
            sock.sendall(request(index))
            return 1

        for _ in range(connections):
            sock = stack.enter_context(connect(member))
            selector.register(sock, selectors.EVENT_READ, bytearray())
            unfinished += send_next(sock)
        while unfinished:
            ready = selector.select(30)
            if not ready:
                raise BenchError("no answer to a PUT for 30 s")
            for key, _ in ready:
                answering, received = key.fileobj, key.data
                assert isinstance(answering, socket.socket)
                received += answering.recv(65536)
                if is_complete(received):
                    received.clear()
                    unfinished += send_next(answering) - 1


def is_complete(reply: bytearray) -> bool:
    """Tell whether a whole 200 or 201 reply with a Content-Length is there."""
    if not reply:
        raise BenchError("connection closed")
    head, blank, body = bytes(reply).partition(b"\r\n\r\n")
    if not blank:
        return False
    if head.split(b" ", 2)[1] not in (b"200", b"201"):
        raise BenchError(f"a request failed: {bytes(reply)!r}")
    for line in head.lower().split(b"\r\n")[1:]:
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.split(b":")[1])
    raise BenchError("reply without Content-Length")


def connect(member: Member) -> socket.socket:
    """A connection to a member's client port."""
    sock = socket.create_connection(("127.0.0.1", member.client_port), timeout=60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class Prober:
    """GETs one key again and again on a connection of its own, on a thread of ours.

    waits_s  how long each of them took
    """

    PAUSE_S = 0.002

    def __init__(self, member: Member, target: str) -> None:
        self.waits_s: List[float] = []
        self._member = member
        self._request = (
            f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{member.client_port}\r\n\r\n".encode())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Prober:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def longest_ms(self) -> float:
        """The longest wait."""
        return max(self.waits_s) * 1000

    def _run(self) -> None:
        with contextlib.closing(connect(self._member)) as sock:
            while not (self.waits_s and self._ended.wait(self.PAUSE_S)):     # one at least
                began = time.perf_counter()
                sock.sendall(self._request)
                received = bytearray()
                while not received or not is_complete(received):
                    received += sock.recv(65536)
                self.waits_s.append(time.perf_counter() - began)


class Watchers:
    """Many waiting GETs of one key, a connection each; use as a context manager."""

    def __init__(self, member: Member, key: str, count: int) -> None:
        self._member = member
        self._count = count
        self._request = (f"GET /v2/keys{key}?wait=true HTTP/1.1\r\n"
                         f"Host: 127.0.0.1:{member.client_port}\r\n\r\n").encode()
        self._selector = selectors.DefaultSelector()
        self._socks: List[socket.socket] = []

    def __enter__(self) -> Watchers:
        try:
            for _ in range(self._count):
                sock = connect(self._member)
                self._socks.append(sock)
                self._selector.register(sock, selectors.EVENT_READ)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._selector.close()
        for sock in self._socks:
            sock.close()

    def wait(self) -> None:
        """Have all of them wait, and return when the server has said that it knows."""
        for sock in self._socks:
            sock.sendall(self._request)
        self._collect(b"\r\n\r\n")

    def collect(self) -> float:
        """Return the time (perf_counter) at which the last of them has had its event."""
        self._collect(b"")
        return time.perf_counter()

    def _collect(self, needed: bytes) -> None:
        """Read until each has got something with `needed` in it."""
        left = set(self._socks)
        received: Dict[socket.socket, bytes] = {}
        while left:
            ready = self._selector.select(60)
            if not ready:
                raise BenchError(f"{len(left)} of {self._count} watchers got nothing for 60 s")
            for key, _ in ready:
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                data = sock.recv(65536)
                if not data:
                    raise BenchError("a watcher was disconnected")
                if needed:
                    data = received[sock] = received.get(sock, b"") + data
                if needed in data:
                    left.discard(sock)

    def drain(self) -> None:
        """Throw away what comes behind the events, so that the next wait() begins anew."""
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            for key, _ in self._selector.select(0.1):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                sock.recv(65536)


@contextlib.contextmanager
def guessing(
    member: Member, requests: Iterator[Dict[str, str]], target: str, clients: int
) -> Iterator[None]:
    """GET with ever new headers, from so many clients at a time."""
    ended = threading.Event()
    lock = threading.Lock()

    def guess() -> None:
        while not ended.is_set():
            with lock:
                headers = next(requests)
            member.send("GET", target, "", headers)

    threads = [threading.Thread(target=guess) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
