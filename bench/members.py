"""Programs under test, and their members: started, found, measured, ended."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

PORT_MIN, PORT_MAX = 20_000, 32_000     # below the ephemeral range: no client socket can take one
START_SECONDS_MAX = 60.0                # a member that does not answer by then has failed
STOP_SECONDS_MAX = 20.0                 # after SIGTERM; then SIGKILL
VALUE = "x" * 64
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
PLAIN_KEY = "/v2/keys/bench/one"


class BenchError(Exception):
    """A case cannot be measured; the text says why."""


class Peer(NamedTuple):
    """A program under test: its command takes etcd's flags."""

    name: str
    command: Tuple[str, ...]
    guarantee: str

    def missing(self) -> str:
        """Return why it cannot run here, or ""."""
        program = self.command[0]
        if shutil.which(program) is None:
            return f"{program} is not installed"
        for argument in self.command[1:]:
            if argument.endswith(".py") and not Path(argument).exists():
                return f"{argument} does not exist"
        return ""

    def version(self) -> str:
        """First line of `--version`."""
        command = [word for word in self.command if word != "--enable-v2"]
        done = subprocess.run([*command, "--version"], env=clean_environment(), timeout=20,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)
        return (done.stdout or done.stderr).partition("\n")[0].strip()


def clean_environment() -> Dict[str, str]:
    """Our environment without ETCD_*: those would configure the members."""
    return {key: value for key, value in os.environ.items() if not key.startswith("ETCD_")}


_next_port = PORT_MIN + os.getpid() * 16 % (PORT_MAX - PORT_MIN)


def free_ports(count: int) -> List[int]:
    """Return ports of 127.0.0.1 that nobody listens on, all below the ephemeral range.

    Never the same twice in a row: old connections may linger.
    """
    global _next_port
    found: List[int] = []
    for _ in range(PORT_MAX - PORT_MIN):
        port = _next_port
        _next_port = port + 1 if port + 1 < PORT_MAX else PORT_MIN
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
        if len(found) == count:
            return found
    raise BenchError("no free port on 127.0.0.1")


class Program:
    """A process that we start and end; its output goes to a file."""

    def __init__(self, command: List[str], log_path: Path) -> None:
        self.command = command
        self._log_path = log_path
        self._process: Optional[subprocess.Popen[bytes]] = None

    def start(self) -> None:
        """Start it."""
        with open(self._log_path, "ab") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=clean_environment())

    def stop(self) -> None:
        """End the process we started: SIGTERM, and SIGKILL if that does not help."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def check(self) -> None:
        """Raise BenchError if it has ended by itself."""
        if self._process is None or self._process.poll() is not None:
            raise BenchError(self.failure("ended by itself"))

    def resident_bytes(self) -> int:
        """VmRSS now."""
        for line in self._proc("status").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise BenchError(self.failure("has no VmRSS"))

    def cpu_seconds(self) -> float:
        """User and system time so far, all threads."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def failure(self, what: str) -> str:
        """What happened to it, with the end of its log."""
        log = self._log_path.read_text(errors="replace").splitlines()[-10:]
        return "\n".join([f"{shlex.join(self.command)} {what}; its last lines:", *log])

    def log_lines(self, text: str) -> int:
        """Return how many lines of its log hold `text`."""
        return self._log_path.read_text(errors="replace").count(text)

    def _proc(self, name: str) -> str:
        assert self._process is not None
        return Path(f"/proc/{self._process.pid}/{name}").read_text()


class Member(Program):
    """One member of a cluster with a data directory of its own.

    client_port   where it answers
    """

    def __init__(
        self, peer: Peer, directory: Path, name: str, ports: Tuple[int, int], cluster: str,
        state: str = "new",
    ) -> None:
        directory.mkdir()
        self.client_port, peer_port = ports
        client_url = f"http://127.0.0.1:{self.client_port}"
        peer_url = f"http://127.0.0.1:{peer_port}"
        super().__init__([
            *peer.command, "--name", name, "--data-dir", str(directory / "data"),
            "--listen-client-urls", client_url, "--advertise-client-urls", client_url,
            "--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url,
            "--initial-cluster", cluster, "--initial-cluster-state", state,
        ], directory / "log")

    def url(self, target: str) -> str:
        """URL of a request target on the client listener."""
        return f"http://127.0.0.1:{self.client_port}{target}"

    def put(self, target: str, value: str) -> int:
        """PUT one value on a connection of its own; return the status."""
        return self.send("PUT", target, f"value={value}", FORM)[0]

    def send(
        self, method: str, target: str, body: str = "", headers: Optional[Dict[str, str]] = None
    ) -> Tuple[int, bytes]:
        """Make one request on a connection of its own; return status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.client_port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, target, body, headers or {})
            reply = connection.getresponse()
            return reply.status, reply.read()

    def wait_until_writable(self) -> None:
        """Return when a PUT is acknowledged; the key is PLAIN_KEY."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.put(PLAIN_KEY, VALUE) in (200, 201):
                    return
            self.check()
            if time.monotonic() > deadline:
                raise BenchError(self.failure("does not answer"))
            time.sleep(0.002)

    @property
    def leads(self) -> bool:
        """True if this member is the leader."""
        state = json.loads(self.send("GET", "/v2/stats/self")[1])["state"]
        return str(state) == "StateLeader"


class Cluster:
    """Some members of one program, all on this machine.

    start_s   process start to first acknowledged PUT, seconds
    """

    def __init__(self, peer: Peer, directory: Path, count: int) -> None:
        self.start_s = 0.0
        self._peer = peer
        self._directory = directory
        ports = free_ports(2 * count)
        names = [f"bench{number}" for number in range(count)]
        self._initial = ",".join(
            f"{name}=http://127.0.0.1:{ports[2 * at + 1]}" for at, name in enumerate(names))
        self.members = [
            Member(peer, directory / name, name, (ports[2 * at], ports[2 * at + 1]), self._initial)
            for at, name in enumerate(names)
        ]

    def start(self) -> None:
        """Start all, and wait until one and then the others take writes."""
        began = time.perf_counter()
        for member in self.members:
            member.start()
        self.members[0].wait_until_writable()
        self.start_s = time.perf_counter() - began
        for member in self.members[1:]:
            member.wait_until_writable()

    def join(self) -> Member:
        """Add one member, and start it; it has no data yet."""
        ports, name = free_ports(2), f"bench{len(self.members)}"
        url = f"http://127.0.0.1:{ports[1]}"
        status, body = self.leader.send(
            "POST", "/v2/members", json.dumps({"peerURLs": [url]}),
            {"Content-Type": "application/json"})
        if status != 201:
            raise BenchError(f"a member could not be added: {status} {body!r}")
        self._initial += f",{name}={url}"
        member = Member(self._peer, self._directory / name, name, (ports[0], ports[1]),
                        self._initial, "existing")
        self.members.append(member)
        member.start()
        return member

    def stop(self) -> None:
        """End all."""
        for member in self.members:
            member.stop()

    @property
    def leader(self) -> Member:
        """The member that leads now."""
        for member in self.members:
            if member.leads:
                return member
        raise BenchError("the cluster has no leader")

    @property
    def follower(self) -> Member:
        """A member that does not lead."""
        return next(member for member in self.members if not member.leads)

    def cpu_seconds(self) -> float:
        """Of all members."""
        return sum(member.cpu_seconds() for member in self.members)


@contextlib.contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """A directory that is removed in the end."""
    number = 0
    while True:
        directory = parent / f"run-{number}"
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            break
        number += 1
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
