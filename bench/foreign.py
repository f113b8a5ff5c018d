"""Peers that do not speak etcd's protocol: ZooKeeper, Redis and PySyncObj, for writes alone.

wrk cannot load them.  ZooKeeper gets requests from here, encoded beforehand and one outstanding
per connection, as wrk does; Redis from its own redis-benchmark; PySyncObj, which has no clients,
from inside its leader.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple

from members import VALUE, BenchError, Program, free_ports, scratch_directory

HERE = Path(__file__).resolve().parent
ZOOKEEPER_JAR = Path("/usr/share/java/zookeeper.jar")       # of Debian's package
KEY_COUNT = 1_000


class ForeignPeer(NamedTuple):
    """A program of another kind.  name: zookeeper, redis or pysyncobj."""

    name: str
    guarantee: str

    def missing(self) -> str:
        """Return why it cannot run here, or ""."""
        if self.name == "zookeeper":
            if shutil.which("java") is None or not ZOOKEEPER_JAR.exists():
                return "Debian's packages zookeeper and default-jre-headless are not installed"
        elif self.name == "redis":
            for program in ("redis-server", "redis-benchmark"):
                if shutil.which(program) is None:
                    return f"{program} is not installed"
        elif importlib.util.find_spec("pysyncobj") is None:
            return "the package pysyncobj is not installed"
        return ""

    def version(self) -> str:
        """Where it comes from."""
        return {"zookeeper": "Debian", "redis": "Debian", "pysyncobj": "package index"}[self.name]

    def writes(
        self, scratch: Path, connections: int, warm_up_s: float, seconds: float
    ) -> Dict[str, float]:
        """Return rate, p99 (ms) and cpu (us per write) of writing 1,000 keys of 64 bytes."""
        run = {"zookeeper": _zookeeper, "redis": _redis, "pysyncobj": _pysyncobj}[self.name]
        with scratch_directory(scratch) as directory:
            return run(directory, connections, warm_up_s, seconds)


FOREIGN_PEERS = (
    ForeignPeer("zookeeper", "a write is acknowledged after fsync of its log on a majority; load"
                             " from a Python program that needs about a third of a core"),
    ForeignPeer("redis", "one server without consensus, appendfsync always: a write is"
                         " acknowledged after fsync here; load from redis-benchmark"),
    ForeignPeer("pysyncobj", "a replicated dictionary in Python: a majority has the write in a"
                             " memory-mapped journal, and NOBODY syncs it to disk"),
)


def _wait_for_port(program: Program, port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        program.check()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise BenchError(program.failure("does not listen"))


@contextlib.contextmanager
def _running(program: Program, port: int) -> Iterator[Program]:
    program.start()
    try:
        _wait_for_port(program, port)
        yield program
    finally:
        program.stop()


# --- ZooKeeper ------------------------------------------------------------------------------------


def _string(data: bytes) -> bytes:
    return struct.pack(">i", len(data)) + data


def _frame(data: bytes) -> bytes:
    return _string(data)


def _receive(sock: socket.socket) -> bytes:
    data = bytearray()
    while len(data) < 4 or len(data) < 4 + struct.unpack_from(">i", data)[0]:
        piece = sock.recv(65536)
        if not piece:
            raise BenchError("zookeeper closed a connection")
        data += piece
    return bytes(data[4:])


def _zookeeper_session(port: int) -> socket.socket:
    """A connection with a session; the server listens before it serves."""
    for _ in range(100):
        with contextlib.suppress(BenchError, OSError):
            return _zookeeper_try(port)
        time.sleep(0.1)
    raise BenchError("zookeeper opens no session")


def _zookeeper_try(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(_frame(struct.pack(">iqiq", 0, 0, 30_000, 0) + _string(bytes(16)) + b"\0"))
    _receive(sock)
    return sock


def _zookeeper_call(sock: socket.socket, kind: int, body: bytes) -> None:
    sock.sendall(_frame(struct.pack(">ii", 1, kind) + body))
    error = struct.unpack_from(">i", _receive(sock), 12)[0]
    if error:
        raise BenchError(f"zookeeper answers with error {error}")


def _zookeeper(
    directory: Path, connections: int, warm_up_s: float, seconds: float
) -> Dict[str, float]:
    (port,) = free_ports(1)
    config = directory / "zoo.cfg"
    config.write_text(
        f"tickTime=2000\ndataDir={directory}\nclientPort={port}\nclientPortAddress=127.0.0.1\n"
        "admin.enableServer=false\nmaxClientCnxns=0\nforceSync=yes\n")
    program = Program([
        "java", "-cp", f"/etc/zookeeper/conf:{ZOOKEEPER_JAR}", "-Dzookeeper.log.dir=.",
        "org.apache.zookeeper.server.ZooKeeperServerMain", str(config),
    ], directory / "log")
    with _running(program, port), contextlib.ExitStack() as stack:
        socks = [stack.enter_context(_zookeeper_session(port)) for _ in range(connections)]
        anyone = struct.pack(">ii", 1, 31) + _string(b"world") + _string(b"anyone")
        paths = [b"/key-%06d" % number for number in range(KEY_COUNT)]
        for path in paths:              # op 1: create
            _zookeeper_call(socks[0], 1, _string(path) + _string(b"") + anyone + bytes(4))
        requests = [                    # op 5: setData, any version
            _frame(struct.pack(">ii", 1, 5) + _string(path) + _string(VALUE.encode())
                   + struct.pack(">i", -1)) for path in paths
        ]
        _drive(socks, requests, warm_up_s)
        cpu_s = program.cpu_seconds()
        latencies = _drive(socks, requests, seconds)
        cpu_s = program.cpu_seconds() - cpu_s
    return _summary(latencies, seconds, cpu_s)


def _drive(socks: List[socket.socket], requests: List[bytes], seconds: float) -> List[float]:
    """Keep one request outstanding per connection; return the latencies in seconds."""
    latencies: List[float] = []
    sent: Dict[socket.socket, float] = {}
    at = 0
    with selectors.DefaultSelector() as selector:
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
            sock.sendall(requests[at % len(requests)])
            sent[sock] = time.perf_counter()
            at += 1
        end = time.perf_counter() + seconds
        open_count = len(socks)
        while open_count:
            for key, _ in selector.select(30):
                answering = key.fileobj
                assert isinstance(answering, socket.socket)
                if struct.unpack_from(">i", _receive(answering), 12)[0]:
                    raise BenchError("zookeeper answers with an error")
                now = time.perf_counter()
                latencies.append(now - sent[answering])
                if now >= end:
                    selector.unregister(answering)
                    open_count -= 1
                    continue
                answering.sendall(requests[at % len(requests)])
                sent[answering] = now
                at += 1
    return latencies


def _summary(latencies: List[float], seconds: float, cpu_s: float) -> Dict[str, float]:
    count = len(latencies)
    return {
        "rate": count / seconds, "p99": sorted(latencies)[count * 99 // 100] * 1000,
        "cpu": cpu_s / count * 1e6,
    }


# --- Redis ----------------------------------------------------------------------------------------


def _redis(
    directory: Path, connections: int, warm_up_s: float, seconds: float
) -> Dict[str, float]:
    (port,) = free_ports(1)
    program = Program([
        "redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory),
        "--appendonly", "yes", "--appendfsync", "always", "--save", "",
    ], directory / "log")
    with _running(program, port):
        rate = _redis_benchmark(port, connections, 2_000)["rate"]
        rate = _redis_benchmark(port, connections, int(rate * max(warm_up_s, 0.5)))["rate"]
        cpu_s, count = program.cpu_seconds(), int(rate * seconds)
        values = _redis_benchmark(port, connections, count)
        values["cpu"] = (program.cpu_seconds() - cpu_s) / count * 1e6
    return values


def _redis_benchmark(port: int, connections: int, count: int) -> Dict[str, float]:
    done = subprocess.run([
        "redis-benchmark", "-p", str(port), "-t", "set", "-c", str(connections), "-d",
        str(len(VALUE)), "-r", str(KEY_COUNT), "-n", str(max(count, 100)), "--csv",
    ], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    head, _, line = done.stdout.strip().rpartition("\n")
    names = [name.strip('"') for name in head.rpartition("\n")[2].split(",")]
    row = dict(zip(names, (value.strip('"') for value in line.split(","))))
    if "rps" not in row:
        raise BenchError(f"redis-benchmark failed:\n{done.stdout}{done.stderr}")
    return {"rate": float(row["rps"]), "p99": float(row["p99_latency_ms"])}


# --- PySyncObj ------------------------------------------------------------------------------------


def _pysyncobj(
    directory: Path, connections: int, warm_up_s: float, seconds: float
) -> Dict[str, float]:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
    nodes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "pysyncobj_peer.py"), str(connections), str(warm_up_s),
             str(seconds), str(directory / f"journal-{number}"), address,
             *(other for other in addresses if other != address)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number, address in enumerate(addresses)
    ]
    try:
        with selectors.DefaultSelector() as selector:
            for node in nodes:
                assert node.stdout is not None
                selector.register(node.stdout, selectors.EVENT_READ)
            ready = selector.select(60 + warm_up_s + seconds)
        if not ready:
            raise BenchError("pysyncobj: no leader has written anything")
        line = next(node.stdout.readline() for node in nodes
                    if node.stdout is not None and node.stdout is ready[0][0].fileobj)
        if not line:
            raise BenchError("pysyncobj: a node has ended")
        result: Dict[str, float] = json.loads(line)
        return result
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait()
            for pipe in (node.stdin, node.stdout):
                if pipe is not None:
                    pipe.close()
