#!/usr/bin/env python3
"""Measure pyetcd against etcd on this machine, side by side, in one run.

    python bench/bench.py                       # table on the terminal
    python bench/bench.py --write               # and bench/RESULTS.md with one plot per family
    python bench/bench.py --only put,get --rounds 3 --seconds 4

Every case runs round after round, and in every round the peers take turns (in the opposite order
next time), each with a fresh member in a fresh data directory on the same disk. What counts is the
ratio of the medians: absolute numbers drift with the machine, ratios of alternating rounds much
less. Load comes from `wrk`, whose warm-up is a run of its own that is thrown away. Everything
listens on 127.0.0.1, on ports below 32768, and this program ends the processes that it started and
no others.

To add a case, append a `Case` to `CASES`; to add a peer, use --peer NAME=COMMAND (any program with
etcd's flags). Needs Linux, Python 3.9 and wrk. No Python package is needed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import http.client
import itertools
import json
import os
import platform
import selectors
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent
PORT_MIN, PORT_MAX = 20_000, 32_000     # below the ephemeral range: no client socket can take one
START_SECONDS_MAX = 30.0                # a member that does not answer by then has failed
STOP_SECONDS_MAX = 10.0                 # after SIGTERM; then SIGKILL
REFERENCE = "etcd"                      # ratios are value / value of this peer
SUBJECT = "pyetcd"
VALUE = "x" * 64
KEY_COUNT = 1_000                       # keys that the PUT case writes
LOADED_KEYS = 100_000                   # keys of the memory case
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
PLAIN_KEY = "/v2/keys/bench/one"


# --- what is measured -----------------------------------------------------------------------------


class Metric(NamedTuple):
    """One number per round and peer.

    better        "higher" or "lower"
    ratio_target  wanted value / reference; None: no target
    limit         wanted absolute bound (upper, as only sizes have one); None: no bound
    """

    key: str
    title: str
    unit: str
    family: str
    better: str
    ratio_target: Optional[float] = None
    limit: Optional[float] = None

    def verdict(self, value: float, reference: Optional[float]) -> str:
        """Return "met", "MISSED" or "" (nothing to compare with)."""
        results = []
        if self.limit is not None:
            results.append(value <= self.limit)
        if self.ratio_target is not None and reference:
            ratio = value / reference
            results.append(ratio >= self.ratio_target if self.better == "higher"
                           else ratio <= self.ratio_target)
        return "" if not results else "met" if all(results) else "MISSED"

    def target(self) -> str:
        """Spell the target out for the table."""
        parts = []
        sign = ">=" if self.better == "higher" else "<="
        if self.ratio_target is not None:
            parts.append(f"ratio {sign} {self.ratio_target:g}")
        if self.limit is not None:
            parts.append(f"<= {self.limit:g} {self.unit}")
        return ", ".join(parts)


class Case(NamedTuple):
    """A way to obtain the values of some metrics from one peer, once per round.

    run         (bench, peer) -> {metric key: value}; starts and ends its own members
    rounds_max  fewer rounds than --rounds for slow cases; 0: no such limit
    needs_wrk   skipped where wrk is missing
    """

    name: str
    metrics: Tuple[Metric, ...]
    run: Callable[[Bench, Peer], Dict[str, float]]
    rounds_max: int = 0
    needs_wrk: bool = True


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


# --- members --------------------------------------------------------------------------------------


def clean_environment() -> Dict[str, str]:
    """Our environment without ETCD_*: those would configure the members."""
    return {key: value for key, value in os.environ.items() if not key.startswith("ETCD_")}


def free_ports(count: int) -> List[int]:
    """Return ports of 127.0.0.1 that nobody listens on, all below the ephemeral range."""
    found: List[int] = []
    start = PORT_MIN + os.getpid() * 16 % (PORT_MAX - PORT_MIN)
    for offset in range(PORT_MAX - PORT_MIN):
        port = PORT_MIN + (start + offset - PORT_MIN) % (PORT_MAX - PORT_MIN)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
        if len(found) == count:
            return found
    raise SystemExit("bench: no free port on 127.0.0.1")


class Member:
    """One running member with a data directory of its own; use as a context manager.

    client_port   where it answers
    start_s       process start to first acknowledged PUT, seconds
    """

    def __init__(self, peer: Peer, directory: Path) -> None:
        self.client_port, peer_port = free_ports(2)
        self.start_s = 0.0
        self._log_path = directory / "log"
        client_url = f"http://127.0.0.1:{self.client_port}"
        peer_url = f"http://127.0.0.1:{peer_port}"
        self._command = [
            *peer.command, "--name", "bench", "--data-dir", str(directory / "data"),
            "--listen-client-urls", client_url, "--advertise-client-urls", client_url,
            "--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url,
            "--initial-cluster", f"bench={peer_url}",
        ]
        self._process: Optional[subprocess.Popen[bytes]] = None

    def __enter__(self) -> Member:
        with open(self._log_path, "wb") as log:
            began = time.perf_counter()
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=clean_environment())
        try:
            while not self._try_put():
                if self._process.poll() is not None:
                    raise SystemExit(self._failure("ended by itself"))
                if time.perf_counter() - began > START_SECONDS_MAX:
                    raise SystemExit(self._failure("does not answer"))
                time.sleep(0.002)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.perf_counter() - began
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process we started: SIGTERM, and SIGKILL if that does not help."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def url(self, target: str) -> str:
        """URL of a request target on the client listener."""
        return f"http://127.0.0.1:{self.client_port}{target}"

    def put(self, target: str, value: str) -> int:
        """PUT one value on a connection of its own; return the status."""
        return self.send("PUT", target, f"value={value}", FORM)

    def send(
        self, method: str, target: str, body: str, headers: Optional[Dict[str, str]] = None
    ) -> int:
        """Make one request on a connection of its own; return the status."""
        connection = http.client.HTTPConnection("127.0.0.1", self.client_port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, target, body, headers or {})
            reply = connection.getresponse()
            reply.read()
            return reply.status

    def resident_bytes(self) -> int:
        """VmRSS now."""
        for line in self._proc("status").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise SystemExit(self._failure("has no VmRSS"))

    def cpu_seconds(self) -> float:
        """User and system time so far, all threads."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _proc(self, name: str) -> str:
        assert self._process is not None
        return Path(f"/proc/{self._process.pid}/{name}").read_text()

    def _try_put(self) -> bool:
        try:
            return self.put(PLAIN_KEY, VALUE) in (200, 201)
        except (OSError, http.client.HTTPException):
            return False

    def _failure(self, what: str) -> str:
        log = self._log_path.read_text(errors="replace").splitlines()[-15:]
        return "\n".join([f"bench: {shlex.join(self._command)} {what}; its last lines:", *log])


# --- load -----------------------------------------------------------------------------------------

LUA_DONE = """
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\nRESULT {"requests": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "errors": %d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1000,
    latency:percentile(99) / 1000, e.connect + e.read + e.write + e.status + e.timeout))
end
"""

# Every thread of wrk walks through all keys; the requests are made before the clock starts.
LUA_PUT = """
local requests, at = {}, 0
init = function(args)
  for i = 0, %(keys)d - 1 do
    requests[i] = wrk.format("PUT", string.format("/v2/keys/bench/key-%%06d", i),
      {["Host"] = wrk.host .. ":" .. wrk.port, ["Content-Type"] = "%(form)s",
       ["Authorization"] = wrk.headers["Authorization"]}, "value=%(value)s")
  end
end
request = function()
  at = (at + 1) %% %(keys)d
  return requests[at]
end
""" % {"keys": KEY_COUNT, "value": VALUE, "form": FORM["Content-Type"]} + LUA_DONE

LUA_AUTH = 'wrk.headers["Authorization"] = "Basic %s"\n' % base64.b64encode(b"root:pw").decode()

LUA_GET = LUA_DONE      # the request is wrk's own: no Lua runs per request


class Load(NamedTuple):
    """Result of one wrk run."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int


class Bench:
    """Settings of this run, and the means that cases use: members, directories, load."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.seconds: float = options.seconds
        self.warm_up_s: float = options.warm_up
        self.connections: int = options.connections
        self.threads: int = min(options.threads, options.connections)
        self._scratch = scratch
        self._scripts = scratch / "lua"
        self._scripts.mkdir()

    @contextlib.contextmanager
    def member(self, peer: Peer) -> Iterator[Member]:
        """A fresh member of a peer; its data directory is removed afterwards."""
        directory = Path(tempfile.mkdtemp(prefix="member-", dir=self._scratch))
        try:
            with Member(peer, directory) as member:
                yield member
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def load(self, member: Member, name: str, target: str, script: str) -> Dict[str, float]:
        """Warm up, then measure one kind of request; an error spoils the run and ends it.

        name    of the case, first part of the metric keys
        target  path for wrk; a script may choose others
        """
        path = self._scripts / f"{name}.lua"
        path.write_text(script)
        if self.warm_up_s > 0:
            self._wrk(member.url(target), path, self.warm_up_s)
        cpu_s = member.cpu_seconds()
        load = self._wrk(member.url(target), path, self.seconds)
        cpu_s = member.cpu_seconds() - cpu_s
        if load.errors or not load.requests:
            raise SystemExit(f"bench: {name}: {load.errors} errors in {load.requests} requests")
        return {
            f"{name}.rate": load.requests / load.seconds,
            f"{name}.p99": load.p99_ms,
            f"{name}.cpu": cpu_s / load.requests * 1e6,
        }

    def _wrk(self, url: str, script: Path, seconds: float) -> Load:
        command = ["wrk", "-t", str(self.threads), "-c", str(self.connections),
                   "-d", f"{max(1, round(seconds))}s", "--timeout", "10s", "-s", str(script), url]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=seconds + 60)
        for line in done.stdout.splitlines():
            if line.startswith("RESULT "):
                return Load(**json.loads(line[len("RESULT "):]))
        raise SystemExit(f"bench: {shlex.join(command)} failed:\n{done.stdout}{done.stderr}")


def put_keys(port: int, count: int, connections: int = 64) -> None:
    """PUT `count` different keys of 64-byte values exactly once, many connections at a time."""
    pending = iter(range(count))
    unfinished = 0
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        def send_next(sock: socket.socket) -> int:
            index = next(pending, None)
            if index is None:
                selector.unregister(sock)
                return 0
            body = f"value={VALUE}"
            sock.sendall(
                (f"PUT /v2/keys/load/key-{index:06d} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                 f"Content-Type: {FORM['Content-Type']}\r\nContent-Length: {len(body)}\r\n\r\n"
                 f"{body}").encode())
            return 1

        for _ in range(connections):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            selector.register(sock, selectors.EVENT_READ, bytearray())
            unfinished += send_next(sock)
        while unfinished:
            ready = selector.select(30)
            if not ready:
                raise SystemExit("bench: no answer to a PUT for 30 s")
            for key, _ in ready:
                answering, received = key.fileobj, key.data
                assert isinstance(answering, socket.socket)
                data = answering.recv(65536)
                if not data:
                    raise SystemExit("bench: connection closed while loading keys")
                received += data
                if is_complete(received):
                    received.clear()
                    unfinished += send_next(answering) - 1


def is_complete(reply: bytearray) -> bool:
    """Tell whether a whole 200 or 201 reply with a Content-Length is there."""
    head, blank, body = bytes(reply).partition(b"\r\n\r\n")
    if not blank:
        return False
    if head.split(b" ", 2)[1] not in (b"200", b"201"):
        raise SystemExit(f"bench: PUT failed: {bytes(reply)!r}")
    for line in head.lower().split(b"\r\n")[1:]:
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.split(b":")[1])
    raise SystemExit("bench: reply without Content-Length")


# --- cases ----------------------------------------------------------------------------------------


def load_metrics(name: str, title: str, rate_target: float) -> Tuple[Metric, ...]:
    """The metrics of a load case: rate, p99 and processor time per request, warm-up not counted."""
    return (
        Metric(f"{name}.rate", f"{title}, rate", "req/s", "rate", "higher", rate_target),
        Metric(f"{name}.p99", f"{title}, p99", "ms", "latency", "lower", 1.0),
        Metric(f"{name}.cpu", f"{title}, CPU per request", "us", "cpu", "lower"),
    )


def run_put(bench: Bench, peer: Peer) -> Dict[str, float]:
    """PUT 64-byte values, walking through 1,000 keys."""
    with bench.member(peer) as member:
        return bench.load(member, "put", "/", LUA_PUT)


def run_get(bench: Bench, peer: Peer) -> Dict[str, float]:
    """GET one key (written by the start of the member)."""
    with bench.member(peer) as member:
        return bench.load(member, "get", PLAIN_KEY, LUA_GET)


def run_memory(bench: Bench, peer: Peer) -> Dict[str, float]:
    """Resident memory of a fresh idle member, and what each of 100,000 keys adds to it."""
    with bench.member(peer) as member:
        time.sleep(2)
        idle = member.resident_bytes()
        put_keys(member.client_port, LOADED_KEYS)
        time.sleep(2)
        loaded = member.resident_bytes()
    return {"memory.idle": idle / 1e6, "memory.key": (loaded - idle) / LOADED_KEYS}


def run_start(bench: Bench, peer: Peer) -> Dict[str, float]:
    """Process start to the first acknowledged PUT of a fresh member, median of three starts."""
    starts_s = []
    for _ in range(3):
        with bench.member(peer) as member:
            starts_s.append(member.start_s)
    return {"start.fresh": statistics.median(starts_s) * 1000}


def run_auth(bench: Bench, peer: Peer) -> Dict[str, float]:
    """What users cost: the rates without auth over those with it, and p99 while guesses go on."""
    if peer.name == REFERENCE:
        return {}                       # hashes every password again: some 10 requests per second
    with bench.member(peer) as member:
        free = {name: bench.load(member, name, PLAIN_KEY, script)
                for name, script in (("get", LUA_GET), ("put", LUA_PUT))}
        for target, body in (("users/root", '{"user":"root","password":"pw"}'), ("enable", "")):
            member.send("PUT", f"/v2/auth/{target}", body)
        known = {name: bench.load(member, name, PLAIN_KEY, LUA_AUTH + script)
                 for name, script in (("get", LUA_GET), ("put", LUA_PUT))}
        with guessing(member):
            attacked = {name: bench.load(member, name, PLAIN_KEY, LUA_AUTH + script)
                        for name, script in (("get", LUA_GET), ("put", LUA_PUT))}
    values = {}
    for name in ("get", "put"):
        values[f"auth.{name}"] = free[name][f"{name}.rate"] / known[name][f"{name}.rate"]
        values[f"auth.{name}99"] = attacked[name][f"{name}.p99"] / known[name][f"{name}.p99"]
    return values


@contextlib.contextmanager
def guessing(member: Member, clients: int = 16) -> Iterator[None]:
    """Ask with ever new wrong passwords, from so many clients at a time."""
    ended = threading.Event()

    def guess(number: int) -> None:
        for attempt in itertools.count():
            if ended.is_set():
                return
            password = base64.b64encode(f"root:{number} {attempt}".encode()).decode()
            member.send("GET", PLAIN_KEY, "", {"Authorization": f"Basic {password}"})

    threads = [threading.Thread(target=guess, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


CASES: Tuple[Case, ...] = (
    Case("put", load_metrics("put", "PUT 64 B, 1,000 keys, 1 member", 0.8), run_put),
    Case("get", load_metrics("get", "GET one key, 1 member", 1.2), run_get),
    Case("start", (
        Metric("start.fresh", "start to first acknowledged PUT", "ms", "footprint", "lower",
               limit=450.0),
    ), run_start, needs_wrk=False),
    Case("memory", (
        Metric("memory.idle", "resident memory, idle fresh member", "MB", "footprint", "lower",
               limit=30.0),
        Metric("memory.key", "resident memory per key, 100,000 keys of 64 B", "B", "footprint",
               "lower", limit=1000.0),
    ), run_memory, rounds_max=3, needs_wrk=False),
    Case("auth", (
        Metric("auth.get", "GET without users / with, verified", "x", "auth", "lower", limit=1.18),
        Metric("auth.put", "PUT without users / with, verified", "x", "auth", "lower", limit=1.18),
        Metric("auth.get99", "GET p99 while 16 clients guess / before", "x", "auth", "lower",
               limit=2.0),
        Metric("auth.put99", "PUT p99 while 16 clients guess / before", "x", "auth", "lower",
               limit=2.0),
    ), run_auth),
)


# --- rounds and results ---------------------------------------------------------------------------


class Results:
    """Samples by metric and peer; ratios are between medians."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        self.peers = tuple(peers)
        self.metrics: List[Metric] = []
        self._samples: Dict[Tuple[str, str], List[float]] = {}

    def add(self, peer: Peer, values: Dict[str, float]) -> None:
        """Take in what one run of a case gave."""
        for key, value in values.items():
            self._samples.setdefault((key, peer.name), []).append(value)

    def median(self, metric: Metric, peer_name: str) -> Optional[float]:
        """Median of a metric, or None if that peer did not run."""
        samples = self._samples.get((metric.key, peer_name))
        return statistics.median(samples) if samples else None

    def spread(self, metric: Metric, peer_name: str) -> str:
        """Smallest and largest sample."""
        samples = self._samples.get((metric.key, peer_name))
        return f"{number(min(samples))}-{number(max(samples))}" if samples else "-"

    def rows(self) -> List[List[str]]:
        """The table: a head, then one row per metric."""
        head = ["case", "unit", *(peer.name for peer in self.peers), "ratio", "target", ""]
        rows = [head]
        for metric in self.metrics:
            subject, reference = (self.median(metric, name) for name in (SUBJECT, REFERENCE))
            values = [self.median(metric, peer.name) for peer in self.peers]
            ratio = f"{subject / reference:.2f}" if subject and reference else "-"
            verdict = "" if subject is None else metric.verdict(subject, reference)
            rows.append([metric.title, metric.unit,
                         *("-" if value is None else number(value) for value in values),
                         ratio, metric.target(), verdict])
        return rows


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def measure(bench: Bench, cases: Sequence[Case], results: Results, rounds: int) -> None:
    """Run every case for every peer, `rounds` times, the peers in alternating order."""
    for case in cases:
        results.metrics.extend(case.metrics)
        case_rounds = min(rounds, case.rounds_max or rounds)
        for turn in range(case_rounds):
            order = results.peers if turn % 2 == 0 else results.peers[::-1]
            for peer in order:
                values = case.run(bench, peer)
                results.add(peer, values)
                shown = ", ".join(f"{key} {number(value)}" for key, value in values.items())
                print(f"{case.name} {turn + 1}/{case_rounds} {peer.name}: {shown}",
                      file=sys.stderr, flush=True)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns for a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                               for column, (cell, width) in enumerate(zip(row, widths))).rstrip()
                     for row in rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The same table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" + "|---:" * (len(rows[0]) - 1) + "|")
    return "\n".join(lines)


def file_system(path: Path) -> str:
    """Type of the file system that holds a path."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, mount_kind = line.split()[:3]
        inside = mount == "/" or str(path) == mount or str(path).startswith(mount + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, mount_kind
    return kind


def conditions(bench: Bench, options: argparse.Namespace, scratch: Path) -> List[str]:
    """Sentences on machine, load and durability."""
    kind = file_system(scratch)
    lines = [
        f"{datetime.date.today().isoformat()}, {os.cpu_count()} cores, Linux "
        f"{platform.release().split('-')[0]}, CPython {platform.python_version()}, data on {kind}.",
        f"Load: wrk, {bench.threads} thread(s), {bench.connections} keep-alive connections, "
        f"{bench.warm_up_s:g} s of warm-up thrown away, then {bench.seconds:g} s; medians of "
        f"{options.rounds} rounds in alternating order; servers with their default settings.",
    ]
    if kind in ("tmpfs", "ramfs", "overlay"):
        lines.append(f"Beware: on {kind} a sync may cost nothing; use --dir for a real disk.")
    return lines


def results_page(results: Results, notes: Sequence[str], plots: Sequence[str]) -> str:
    """Contents of RESULTS.md."""
    spreads = [["case", *(peer.name for peer in results.peers)]]
    for metric in results.metrics:
        spreads.append([f"{metric.title} ({metric.unit})",
                        *(results.spread(metric, peer.name) for peer in results.peers)])
    parts = ["# pyetcd beside etcd", "Written by `python bench/bench.py --write`.", *notes,
             f"`ratio` is {SUBJECT} / {REFERENCE}.", markdown_table(results.rows()),
             "## What each of them guarantees", guarantees(results, "- "),
             "## Smallest and largest round", markdown_table(spreads),
             *(f"![{name}]({name})" for name in plots)]
    return "\n\n".join(parts) + "\n"


def guarantees(results: Results, mark: str = "") -> str:
    """One line per peer: what it is, and what an acknowledged write means."""
    return "\n".join(f"{mark}{peer.name} ({peer.version()}): {peer.guarantee}"
                     for peer in results.peers)


# --- plots ----------------------------------------------------------------------------------------

COLOURS = ("#3366aa", "#bbbbbb", "#cc8844", "#669966", "#aa5577", "#888833")
BAR_HEIGHT, BAR_GAP, GROUP_GAP, TEXT_WIDTH, BAR_WIDTH = 18, 3, 30, 90, 430


def plot(results: Results, family: str) -> str:
    """One SVG of a family: a group of bars per metric, each group on its own scale."""
    shapes: List[str] = []
    y = 10
    for metric in (metric for metric in results.metrics if metric.family == family):
        title = f"{metric.title} ({metric.unit}, {metric.better} is better)"
        shapes.append(f'<text x="10" y="{y + 12}" font-weight="bold">{escape(title)}</text>')
        y += 20
        medians = [results.median(metric, peer.name) or 0.0 for peer in results.peers]
        for position, (peer, value) in enumerate(zip(results.peers, medians)):
            width = BAR_WIDTH * value / (max(medians) or 1.0)
            shapes.append(
                f'<text x="10" y="{y + 13}">{escape(peer.name)}</text>'
                f'<rect x="{TEXT_WIDTH}" y="{y}" width="{width:.1f}" height="{BAR_HEIGHT}" '
                f'fill="{COLOURS[position % len(COLOURS)]}"/>'
                f'<text x="{TEXT_WIDTH + width + 6:.1f}" y="{y + 13}">{number(value)}</text>')
            y += BAR_HEIGHT + BAR_GAP
        y += GROUP_GAP - BAR_GAP
    total_width = TEXT_WIDTH + BAR_WIDTH + 90
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {y}" '
            f'width="{total_width}" height="{y}" font-family="sans-serif" font-size="12">\n'
            f'<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(shapes)
            + "\n</svg>\n")


def write_results(results: Results, notes: Sequence[str], directory: Path) -> None:
    """Write RESULTS.md and one SVG per family into a directory."""
    plots = []
    for family in dict.fromkeys(metric.family for metric in results.metrics):
        name = f"results-{family}.svg"
        (directory / name).write_text(plot(results, family), encoding="utf-8")
        plots.append(name)
    (directory / "RESULTS.md").write_text(results_page(results, notes, plots), encoding="utf-8")
    print(f"wrote {directory / 'RESULTS.md'} and {', '.join(plots)}", file=sys.stderr)


# --- command line ---------------------------------------------------------------------------------

ETCD_GUARANTEE = "a write is acknowledged after fdatasync of the log entry on a majority"
SUBJECT_GUARANTEE = "the same: acknowledged after fdatasync of the log entry on a majority"


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure pyetcd against etcd, side by side.")
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="rounds per case, medians are shown (5)")
    add("--seconds", type=float, default=8.0, help="measured seconds of load per round (8)")
    add("--warm-up", type=float, default=2.0, help="seconds of load thrown away before (2)")
    add("--connections", type=int, default=64, help="keep-alive connections (64)")
    add("--threads", type=int, default=1, help="threads of wrk (1)")
    add("--only", default="", metavar="CASE,...", help="cases to run: "
        + ", ".join(case.name for case in CASES))
    add("--pyetcd-command", default=shlex.join([sys.executable, str(HERE.parent / "pyetcd.py")]),
        metavar="COMMAND", help="how pyetcd is started (this Python, ../pyetcd.py)")
    add("--etcd-command", default="etcd --enable-v2", metavar="COMMAND")
    add("--peer", action="append", default=[], metavar="NAME=COMMAND",
        help="one more peer with etcd's flags, for example a binary of etcd 2.3.8")
    add("--dir", type=Path, default=None, help="where data directories go (system's temporary)")
    add("--write", action="store_true", help="write RESULTS.md and the plots")
    add("--output", type=Path, default=HERE, help="where --write puts them (beside this file)")
    return parser.parse_args(argv)


def find_peers(options: argparse.Namespace) -> List[Peer]:
    """Return the peers that can run here; say which cannot, and why."""
    peers = [
        Peer(SUBJECT, tuple(shlex.split(options.pyetcd_command)), SUBJECT_GUARANTEE),
        Peer(REFERENCE, tuple(shlex.split(options.etcd_command)), ETCD_GUARANTEE),
    ]
    for text in options.peer:
        name, _, command = text.partition("=")
        peers.append(Peer(name, tuple(shlex.split(command)), ETCD_GUARANTEE))
    found = []
    for peer in peers:
        reason = peer.missing()
        if reason:
            print(f"{peer.name} is skipped: {reason}", file=sys.stderr)
        else:
            found.append(peer)
    return found


def find_cases(only: str) -> List[Case]:
    """Return the chosen cases that can run here; say which cannot."""
    wanted = [name for name in only.split(",") if name]
    unknown = set(wanted) - {case.name for case in CASES}
    if unknown:
        raise SystemExit(f"bench: no case {', '.join(sorted(unknown))}")
    cases = [case for case in CASES if not wanted or case.name in wanted]
    if shutil.which("wrk") is None:
        for case in (case for case in cases if case.needs_wrk):
            print(f"{case.name} is skipped: wrk is not installed", file=sys.stderr)
        cases = [case for case in cases if not case.needs_wrk]
    return cases


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; 0 if every target that could be judged is met, 2 otherwise."""
    # A SIGTERM must end our members too: as an exception it passes through their `with` blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parse_options(argv)
    peers, cases = find_peers(options), find_cases(options.only)
    if not peers or not cases:
        print("bench: nothing to measure", file=sys.stderr)
        return 1
    results = Results(peers)
    with tempfile.TemporaryDirectory(prefix="pyetcd-bench-", dir=options.dir) as name:
        scratch = Path(name).resolve()
        bench = Bench(options, scratch)
        notes = conditions(bench, options, scratch)
        measure(bench, cases, results, options.rounds)
    rows = results.rows()
    print("\n".join(notes), text_table(rows), guarantees(results), sep="\n\n")
    if options.write:
        write_results(results, notes, options.output)
    return 2 if any(row[-1] == "MISSED" for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
