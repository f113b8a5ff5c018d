#!/usr/bin/env python3
"""Measure pyetcd beside etcd, ZooKeeper, Redis and PySyncObj on this machine, in one run.

    python bench/bench.py                       # table on the terminal, about 35 minutes
    python bench/bench.py --write               # and bench/RESULTS.md with one plot per family
    python bench/bench.py --only put64,get64 --rounds 3

Every case runs round after round, and in every round the peers take turns (in the opposite order
next time), each with fresh members in fresh data directories on the same disk.  What counts is
the ratio of the medians: absolute numbers drift with the machine, ratios of alternating rounds
much less.  Load comes from `wrk` with one thread, whose warm-up is a run of its own that is thrown
away.  Everything listens on 127.0.0.1, on ports below 32768, and this program ends the processes
that it started and no others.  A peer that is not installed is skipped with a message.

To add a case, append a `Case` to `CASES`; to add a peer with etcd's flags, use --peer
NAME=COMMAND, for example a binary of etcd 2.3.8.  Needs Linux, Python 3.9 and wrk.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import http.client
import itertools
import os
import platform
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

from foreign import FOREIGN_PEERS
from load import LUA_GET, Prober, Watchers, Wrk, guessing, lua_put, put_keys, random_value
from members import PLAIN_KEY, BenchError, Cluster, Member, Peer, scratch_directory
from report import (
    REFERENCE,
    SUBJECT,
    AnyPeer,
    Metric,
    Results,
    guarantees,
    number,
    text_table,
    write_results,
)

HERE = Path(__file__).resolve().parent
LOADED_KEYS = 100_000                   # keys of the cases of size
GROWN_KEYS = 1_000_000
SCALE_SECONDS_MAX = 300.0               # for a snapshot or a join with so many keys
STALL_MS = 25.0                         # nobody else may have to wait longer


class Case(NamedTuple):
    """A way to obtain the values of some metrics from one peer, once per round.

    run         (bench, peer) -> {metric key: value}; starts and ends its own members
    rounds_max  fewer rounds than --rounds for slow cases; 0: no such limit
    foreign     names of peers with another protocol that can do this as well
    in_full_run  False for a case of several minutes, which --only has to name
    """

    name: str
    metrics: Tuple[Metric, ...]
    run: Callable[[Bench, Peer], Dict[str, float]]
    rounds_max: int = 0
    foreign: Tuple[str, ...] = ()
    connections: int = 64               # for the foreign ones
    in_full_run: bool = True


class Bench:
    """Settings of this run, and the means that cases use: members, directories, load."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.seconds: float = options.seconds
        self.warm_up_s: float = options.warm_up
        self.scratch = scratch
        self._wrk = Wrk(scratch)

    @contextlib.contextmanager
    def cluster(self, peer: Peer, count: int = 1) -> Iterator[Cluster]:
        """A fresh cluster of a peer; its data directories are removed afterwards."""
        with scratch_directory(self.scratch) as directory:
            cluster = Cluster(peer, directory, count)
            try:
                cluster.start()
                yield cluster
            finally:
                cluster.stop()

    @contextlib.contextmanager
    def member(self, peer: Peer) -> Iterator[Member]:
        """A fresh member alone."""
        with self.cluster(peer) as cluster:
            yield cluster.members[0]

    def load(
        self, name: str, cluster: Cluster, member: Member, script: str, *, connections: int = 64,
        target: str = PLAIN_KEY,
    ) -> Dict[str, float]:
        """Warm up, then measure one kind of request.

        name  of the case, first part of the metric keys
        """
        url = member.url(target)
        if self.warm_up_s > 0:
            self._wrk.run(url, script, connections, self.warm_up_s, warms=True)
        cpu_s = cluster.cpu_seconds()
        load = self._wrk.run(url, script, connections, self.seconds)
        cpu_s = cluster.cpu_seconds() - cpu_s
        return {
            f"{name}.rate": load.requests / load.seconds, f"{name}.p99": load.p99_ms,
            f"{name}.cpu": cpu_s / load.requests * 1e6,
        }


# --- load cases -----------------------------------------------------------------------------------


def load_case(
    name: str, title: str, script: str, rate_target: float, *, connections: int = 64,
    members: int = 1, to: str = "leader", target: str = PLAIN_KEY, cpu_target: float = 0.0,
    foreign: Tuple[str, ...] = (),
) -> Case:
    """A case of wrk: rate, p99 and processor time per request of all members."""
    def run(bench: Bench, peer: Peer) -> Dict[str, float]:
        with bench.cluster(peer, members) as cluster:
            if members == 1:
                member = cluster.members[0]
            else:
                member = cluster.leader if to == "leader" else cluster.follower
            return bench.load(
                name, cluster, member, script, connections=connections, target=target)

    family = "cluster" if members > 1 else name.rstrip("0123456789")
    return Case(name, (
        Metric(f"{name}.rate", f"{title}, rate", "req/s", family, "higher", rate_target),
        Metric(f"{name}.p99", f"{title}, p99", "ms", family + "-p99", "lower", 1.0),
        Metric(f"{name}.cpu", f"{title}, CPU per request", "us", family + "-cpu", "lower",
               cpu_target or None),
    ), run, foreign=foreign, connections=connections)


PUT, SERVERS = lua_put(), ("zookeeper", "redis")
LOAD_CASES: Tuple[Case, ...] = (
    load_case("put1", "PUT 64 B, 1 connection", PUT, 1.0, connections=1, foreign=SERVERS),
    load_case("put64", "PUT 64 B, 64 connections", PUT, 1.3, cpu_target=0.6, foreign=SERVERS),
    load_case("put256", "PUT 64 B, 256 connections", PUT, 1.3, connections=256, foreign=SERVERS),
    load_case("get1", "GET, 1 connection", LUA_GET, 1.0, connections=1),
    load_case("get64", "GET, 64 connections", LUA_GET, 2.0),
    load_case("get256", "GET, 256 connections", LUA_GET, 2.0, connections=256),
    load_case("mixed64", "90 % GET, 10 % PUT, 64 connections", lua_put(keys=500, gets=9), 1.5),
    load_case("clusterput1", "3 members, PUT to the leader, 1 connection", PUT, 0.9, connections=1,
              members=3),
    load_case("clusterput64", "3 members, PUT to the leader, 64 connections", PUT, 1.2, members=3,
              cpu_target=0.6, foreign=("pysyncobj",)),
    load_case("clusterput256", "3 members, PUT to the leader, 256 connections", PUT, 1.2,
              connections=256, members=3),
    load_case("clusterfollower64", "3 members, PUT to a follower, 64 connections", PUT, 1.0,
              members=3, to="follower"),
    load_case("clusterquorum64", "3 members, GET quorum=true at the leader, 64 connections",
              LUA_GET, 2.0, members=3, target=PLAIN_KEY + "?quorum=true"),
    load_case("big16", "PUT 16 KB, 16 connections", lua_put(random_value(16 << 10), 50), 0.8,
              connections=16),
    load_case("big256", "PUT 256 KB, 16 connections", lua_put(random_value(256 << 10), 8), 0.5,
              connections=16),
)


# --- listings, watchers, expiry: and who has to wait meanwhile ------------------------------------


def run_listing(bench: Bench, peer: Peer) -> Dict[str, float]:
    """List directories of two sizes on one connection, and GET one key on another meanwhile."""
    values = {}
    with bench.cluster(peer) as cluster:
        member = cluster.members[0]
        for name, count in (("list1k", 1_000), ("list50k", 50_000)):
            put_keys(member, count, directory=name)
            with Prober(member, PLAIN_KEY) as prober:
                load = bench.load(name, cluster, member, LUA_GET, connections=1,
                                  target=f"/v2/keys/{name}?recursive=true")
            values[f"{name}.rate"] = load[f"{name}.rate"]
            values[f"{name}.stall"] = prober.longest_ms
    return values


def run_watchers(bench: Bench, peer: Peer) -> Dict[str, float]:
    """Time from a PUT to the last of many watchers, and the memory that 10,000 take."""
    values = {}
    for name, count in (("watch1k", 1_000), ("watch10k", 10_000)):
        with bench.member(peer) as member:
            before = member.resident_bytes()
            with Watchers(member, "/bench/watched", count) as watchers:
                times_s = []
                for repetition in range(3):
                    watchers.wait()
                    if not repetition:
                        time.sleep(1)
                        memory = (member.resident_bytes() - before) / count
                    began = time.perf_counter()
                    member.put("/v2/keys/bench/watched", "x")
                    times_s.append(watchers.collect() - began)
                    watchers.drain()
            values[f"{name}.last"] = statistics.median(times_s) * 1000
    values["watch10k.memory"] = memory / 1000
    return values


def run_expiry(bench: Bench, peer: Peer) -> Dict[str, float]:
    """100,000 keys with a TTL, of which 10,000 expire in one second: the longest GET meanwhile."""
    with bench.member(peer) as member:
        put_keys(member, 90_000, directory="later", fields="&ttl=3600")
        began = time.monotonic()
        put_keys(member, 10_000, directory="soon", fields="&ttl=12")
        if time.monotonic() - began > 10:
            raise BenchError("the keys were not written before the first expired")
        with Prober(member, PLAIN_KEY) as prober:
            time.sleep(max(0.0, began + 18 - time.monotonic()))
    return {"expiry.stall": prober.longest_ms}


# --- sizes and starts -----------------------------------------------------------------------------


def run_memory(bench: Bench, peer: Peer) -> Dict[str, float]:
    """Memory and processor time of an idle member, then what each of 100,000 keys adds."""
    with bench.member(peer) as member:
        time.sleep(2)
        idle, cpu_s, began = member.resident_bytes(), member.cpu_seconds(), time.monotonic()
        time.sleep(10)
        share = (member.cpu_seconds() - cpu_s) / (time.monotonic() - began)
        put_keys(member, LOADED_KEYS)
        time.sleep(2)
        loaded = member.resident_bytes()
    return {"memory.idle": idle / 1e6, "memory.cpu": share * 100,
            "memory.key": (loaded - idle) / LOADED_KEYS}


def run_start(bench: Bench, peer: Peer) -> Dict[str, float]:
    """Process start to the first acknowledged PUT of fresh members, medians of three starts."""
    values = {}
    for name, count in (("start1", 1), ("start3", 3)):
        starts_s = []
        for _ in range(3):
            with bench.cluster(peer, count) as cluster:
                starts_s.append(cluster.start_s)
        values[f"start.{name}"] = statistics.median(starts_s) * 1000
    return values


def run_restart(bench: Bench, peer: Peer) -> Dict[str, float]:
    """Process start to the first acknowledged PUT with 100,000 keys on disk."""
    with bench.cluster(peer) as cluster:
        put_keys(cluster.members[0], LOADED_KEYS)
        time.sleep(1)
        starts_s = []
        for _ in range(3):
            cluster.stop()
            cluster.start()
            starts_s.append(cluster.start_s)
    return {"restart": statistics.median(starts_s) * 1000}


def run_growth(bench: Bench, peer: Peer) -> Dict[str, float]:
    """PUT and GET rates among 1,000,000 keys over those among 1,000, in the same member."""
    rates: Dict[str, List[float]] = {"put": [], "get": []}
    with bench.cluster(peer) as cluster:
        member = cluster.members[0]
        put_keys(member, 1_000, directory="bench")
        for grown in (False, True):
            if grown:
                put_keys(member, GROWN_KEYS, connections=256)
                time.sleep(5)
            for name, script in (("put", PUT), ("get", LUA_GET)):
                rates[name].append(bench.load(name, cluster, member, script)[f"{name}.rate"])
    return {f"growth.{name}": grown / small for name, (small, grown) in rates.items()}


def run_scale(bench: Bench, peer: Peer) -> Dict[str, float]:
    """1,000,000 keys: memory, a snapshot, a restart, and a member without data that joins."""
    values = {}
    with bench.cluster(peer) as cluster:
        member = cluster.members[0]
        idle = member.resident_bytes()
        put_keys(member, GROWN_KEYS)
        time.sleep(5)
        values["scale.memory"] = (member.resident_bytes() - idle) / GROWN_KEYS
        begun = member.log_lines("start to snapshot")
        while member.log_lines("start to snapshot") == begun:
            put_keys(member, 2_000, directory="bench")
        with Prober(member, PLAIN_KEY) as prober:
            values["scale.snapshot"] = _seconds_until(
                member, lambda: member.log_lines("saved snapshot") > begun)
        values["scale.snapshot.stall"] = prober.longest_ms
        cluster.stop()
        cluster.start()
        values["scale.restart"] = cluster.start_s
        with Prober(member, PLAIN_KEY) as prober:
            joined = time.perf_counter()
            joiner = cluster.join()
            _seconds_until(joiner, lambda: _status(joiner, "/version") == 200)
            with Prober(joiner, "/version") as follower_prober:
                last_key = f"/v2/keys/load/key-{GROWN_KEYS - 1:07d}"
                _seconds_until(joiner, lambda: _status(joiner, last_key) == 200)
            values["scale.join"] = time.perf_counter() - joined
        values["scale.join.stall"] = prober.longest_ms
        values["scale.joiner.stall"] = follower_prober.longest_ms
    return values


def _seconds_until(program: Member, holds: Callable[[], bool]) -> float:
    """Return how long it takes from now until holds() is true."""
    began = time.perf_counter()
    while not holds():
        program.check()
        if time.perf_counter() - began > SCALE_SECONDS_MAX:
            raise BenchError(program.failure(f"was not ready in {SCALE_SECONDS_MAX:g} s"))
        time.sleep(0.02)
    return time.perf_counter() - began


def _status(member: Member, target: str) -> int:
    """Return the status of a GET; 0: no answer."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return member.send("GET", target)[0]
    return 0


# --- what users cost ------------------------------------------------------------------------------


def run_auth(bench: Bench, peer: Peer) -> Dict[str, float]:
    """What users cost: the rates without auth over those with it, and p99 while guesses go on."""
    if peer.name == REFERENCE:
        return {}                       # hashes every password again: some 10 requests per second
    known = "Basic " + base64.b64encode(b"root:pw").decode()
    lua_known = f'wrk.headers["Authorization"] = "{known}"\n' + LUA_GET
    guesses = (
        {"Authorization": "Basic " + base64.b64encode(f"root:{guess}".encode()).decode()}
        for guess in itertools.count())
    with bench.cluster(peer) as cluster:
        member = cluster.members[0]

        def both(get: str, put: str) -> Dict[str, float]:
            return {**bench.load("get", cluster, member, get),
                    **bench.load("put", cluster, member, put)}

        free = both(LUA_GET, PUT)
        for target, body in (("users/root", '{"user":"root","password":"pw"}'), ("enable", "")):
            member.send("PUT", f"/v2/auth/{target}", body)
        checked = both(lua_known, lua_put(authorization=known))
        with guessing(member, guesses, PLAIN_KEY, 16):
            attacked = both(lua_known, lua_put(authorization=known))
    values = {}
    for name in ("get", "put"):
        values[f"auth.{name}"] = free[f"{name}.rate"] / checked[f"{name}.rate"]
        values[f"auth.{name}99"] = attacked[f"{name}.p99"] / checked[f"{name}.p99"]
    return values


def _time(key: str, title: str, target: float) -> Metric:
    return Metric(key, title, "ms", "times", "lower", target)


def _stall(key: str, what: str) -> Metric:
    return Metric(key, f"longest GET of another client during {what}", "ms", "stalls", "lower",
                  limit=STALL_MS)


CASES: Tuple[Case, ...] = (
    *LOAD_CASES,
    Case("list", (
        Metric("list1k.rate", "recursive listing of 1,000 keys, 1 connection", "req/s", "listing",
               "higher", 1.0),
        Metric("list50k.rate", "recursive listing of 50,000 keys, 1 connection", "req/s",
               "listing", "higher", 1.0),
        _stall("list1k.stall", "listings of 1,000 keys"),
        _stall("list50k.stall", "listings of 50,000 keys"),
    ), run_listing, rounds_max=5),
    Case("watch", (
        _time("watch1k.last", "event to the last of 1,000 watchers", 0.7),
        _time("watch10k.last", "event to the last of 10,000 watchers", 0.7),
        Metric("watch10k.memory", "memory per idle watcher, 10,000 of them", "KB", "memory",
               "lower", 0.3),
    ), run_watchers, rounds_max=5),
    Case("expiry", (_stall("expiry.stall", "the expiry of 10,000 keys of 100,000"),),
         run_expiry, rounds_max=5),
    Case("start", (
        _time("start.start1", "start to first acknowledged PUT, 1 member", 0.6),
        _time("start.start3", "start to first acknowledged PUT, 3 members", 0.6),
    ), run_start),
    Case("restart", (
        _time("restart", "start to first acknowledged PUT, 100,000 keys on disk", 1.0),
    ), run_restart, rounds_max=5),
    Case("memory", (
        Metric("memory.key", "memory per key, 100,000 keys of 64 B", "B", "memory", "lower", 0.35),
        Metric("memory.idle", "memory of an idle member", "MB", "memory", "lower", limit=30.0),
        Metric("memory.cpu", "processor time of an idle member", "% of a core", "idle", "lower",
               limit=1.0),
    ), run_memory, rounds_max=5),
    Case("growth", (
        Metric("growth.put", "PUT rate among 1,000,000 keys / among 1,000", "x", "growth",
               "higher", limit=0.7),
        Metric("growth.get", "GET rate among 1,000,000 keys / among 1,000", "x", "growth",
               "higher", limit=0.7),
    ), run_growth, rounds_max=3),
    Case("scale", (
        Metric("scale.memory", "memory per key, 1,000,000 keys of 64 B", "B", "memory", "lower",
               0.22),
        Metric("scale.snapshot", "snapshot of 1,000,000 keys", "s", "scale", "lower", 1.0),
        Metric("scale.restart", "start to first acknowledged PUT, 1,000,000 keys on disk", "s",
               "scale", "lower", 1.0),
        Metric("scale.join", "a new member gets 1,000,000 keys", "s", "scale", "lower", 1.0),
        _stall("scale.snapshot.stall", "a snapshot of 1,000,000 keys"),
        _stall("scale.join.stall", "the sending of 1,000,000 keys to a new member"),
        _stall("scale.joiner.stall", "their recovery, at the new member"),
    ), run_scale, rounds_max=1, in_full_run=False),
    Case("auth", (
        Metric("auth.get", "GET without users / with, verified", "x", "auth", "lower", limit=1.18),
        Metric("auth.put", "PUT without users / with, verified", "x", "auth", "lower", limit=1.18),
        Metric("auth.get99", "GET p99 while 16 clients guess / before", "x", "auth", "lower",
               limit=2.0),
        Metric("auth.put99", "PUT p99 while 16 clients guess / before", "x", "auth", "lower",
               limit=2.0),
    ), run_auth, rounds_max=2),
)


# --- rounds ---------------------------------------------------------------------------------------


def measure(bench: Bench, cases: Sequence[Case], results: Results, rounds: int) -> None:
    """Run every case for every peer, `rounds` times, the peers in alternating order.

    What fails is noted, and the other cases go on.
    """
    began = time.monotonic()
    for case in cases:
        results.metrics.extend(case.metrics)
        case_rounds = min(rounds, case.rounds_max or rounds)
        for turn in range(case_rounds):
            for peer in results.peers if turn % 2 == 0 else results.peers[::-1]:
                try:
                    values = run_case(bench, case, peer)
                except (BenchError, OSError) as error:
                    text = f"{case.name}, {peer.name}: {error}"
                    print(text, file=sys.stderr, flush=True)
                    results.failures.append(text.partition("\n")[0])
                    continue
                results.add(peer.name, values)
                if values:
                    shown = ", ".join(f"{key} {number(value)}" for key, value in values.items())
                    print(f"{time.monotonic() - began:5.0f} s {case.name} {turn + 1}/{case_rounds}"
                          f" {peer.name}: {shown}", file=sys.stderr, flush=True)


def run_case(bench: Bench, case: Case, peer: AnyPeer) -> Dict[str, float]:
    """Return the values of one round; {} if this peer does not take part."""
    if isinstance(peer, Peer):
        return case.run(bench, peer)
    if peer.name not in case.foreign:
        return {}
    values = peer.writes(bench.scratch, case.connections, bench.warm_up_s, bench.seconds)
    return {f"{case.name}.{key}": value for key, value in values.items()}


def file_system(path: Path) -> str:
    """Type of the file system that holds a path."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, mount_kind = line.split()[:3]
        inside = mount == "/" or str(path) == mount or str(path).startswith(mount + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, mount_kind
    return kind


def conditions(bench: Bench, options: argparse.Namespace) -> List[str]:
    """Sentences on machine, load and durability."""
    kind = file_system(bench.scratch)
    python = shlex.split(options.pyetcd_command)[0]
    lines = [
        f"{datetime.date.today().isoformat()}, {os.cpu_count()} cores, Linux "
        f"{platform.release().split('-')[0]}, {python_version(python)}, data on {kind}.",
        f"Load: wrk, 1 thread, keep-alive connections, {bench.warm_up_s:g} s of warm-up thrown"
        f" away, then {bench.seconds:g} s; medians of {options.rounds} rounds (slow cases fewer,"
        " see the last table) in alternating order; servers with their default settings.",
    ]
    if kind in ("tmpfs", "ramfs", "overlay"):
        lines.append(f"Beware: on {kind} a sync may cost nothing; use --dir for a real disk.")
    return lines


def python_version(python: str) -> str:
    """What runs pyetcd."""
    done = subprocess.run([python, "--version"], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True)
    origin = "Debian's " if os.path.realpath(python).startswith("/usr/bin/") else ""
    return origin + (done.stdout or done.stderr).strip()


# --- command line ---------------------------------------------------------------------------------

ETCD_GUARANTEE = "a write is acknowledged after fdatasync of the log entry on a majority"
SUBJECT_GUARANTEE = "the same: acknowledged after fdatasync of the log entry on a majority"


def default_python() -> str:
    """The system's Python where it is new enough, else this one.

    Its users have it, as they have the system's etcd, and builds differ: one with a shared library
    (pyenv's) takes a fifth longer.
    """
    system = "/usr/bin/python3"
    check = [system, "-c", "import sys; sys.exit(sys.version_info < (3, 9))"]
    known = os.access(system, os.X_OK)
    if known and subprocess.run(check, stdin=subprocess.DEVNULL).returncode == 0:
        return system
    return sys.executable


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure pyetcd beside etcd and others.")
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="rounds per case, medians are shown (5)")
    add("--seconds", type=float, default=4.0, help="measured seconds of load per round (4)")
    add("--warm-up", type=float, default=1.0, help="seconds of load thrown away before (1)")
    add("--only", default="", metavar="CASE,...", help="cases to run: "
        + ", ".join(case.name for case in CASES))
    add("--pyetcd-command", default=shlex.join([default_python(), str(HERE.parent / "pyetcd.py")]),
        metavar="COMMAND", help="how pyetcd is started (the system's Python, ../pyetcd.py)")
    add("--etcd-command", default="etcd --enable-v2", metavar="COMMAND")
    add("--peer", action="append", default=[], metavar="NAME=COMMAND",
        help="one more peer with etcd's flags, for example a binary of etcd 2.3.8")
    add("--dir", type=Path, default=None, help="where data directories go (system's temporary)")
    add("--samples", type=Path, default=None, metavar="FILE",
        help="append every sample to FILE, a line of JSON each")
    add("--from", type=Path, default=None, metavar="FILE", dest="earlier",
        help="take in the samples of an earlier run of these cases")
    add("--write", action="store_true", help="write RESULTS.md and the plots")
    add("--output", type=Path, default=HERE, help="where --write puts them (beside this file)")
    return parser.parse_args(argv)


def find_peers(options: argparse.Namespace) -> List[AnyPeer]:
    """Return the peers that can run here; say which cannot, and why."""
    peers: List[AnyPeer] = [
        Peer(SUBJECT, tuple(shlex.split(options.pyetcd_command)), SUBJECT_GUARANTEE),
        Peer(REFERENCE, tuple(shlex.split(options.etcd_command)), ETCD_GUARANTEE),
    ]
    for text in options.peer:
        name, _, command = text.partition("=")
        peers.append(Peer(name, tuple(shlex.split(command)), ETCD_GUARANTEE))
    found: List[AnyPeer] = []
    for peer in [*peers, *FOREIGN_PEERS]:
        reason = peer.missing()
        if reason:
            print(f"{peer.name} is skipped: {reason}", file=sys.stderr)
        else:
            found.append(peer)
    return found


def find_cases(only: str) -> List[Case]:
    """Return the chosen cases."""
    wanted = [name for name in only.split(",") if name]
    unknown = set(wanted) - {case.name for case in CASES}
    if unknown:
        raise SystemExit(f"bench: no case {', '.join(sorted(unknown))}")
    return [case for case in CASES if (case.name in wanted if wanted else case.in_full_run)]


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; 0 if every target that could be judged is met, 2 otherwise."""
    # A SIGTERM must end our members too: as an exception it passes through their `with` blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))    # 10,000 watchers; members inherit
    options = parse_options(argv)
    if shutil.which("wrk") is None:
        raise SystemExit("bench: wrk is not installed (Debian's package wrk)")
    peers, cases = find_peers(options), find_cases(options.only)
    used = {name for case in cases for name in case.foreign}
    peers = [peer for peer in peers if isinstance(peer, Peer) or peer.name in used]
    if not peers or not cases:
        print("bench: nothing to measure", file=sys.stderr)
        return 1
    results = Results(peers, options.samples)
    if options.earlier is not None:
        results.load(options.earlier)
    with tempfile.TemporaryDirectory(prefix="pyetcd-bench-", dir=options.dir) as name:
        bench = Bench(options, Path(name).resolve())
        notes = conditions(bench, options)
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
