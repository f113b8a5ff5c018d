"""Torture: real processes under faults, and a check of what clients saw."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import http.client
import http.server
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set, Tuple

import pyetcd
from tests.kit.basics import eventually, free_port
from tests.kit.histories import Operation, find_violation
from tests.kit.processes import ClusterMember, Process, StaticCluster

TORTURE_SECONDS = float(os.environ.get("PYETCD_TORTURE_SECONDS", 0))      # 0: the short form
TORTURE_SEED = int(os.environ.get("PYETCD_TORTURE_SEED") or random.SystemRandom().randrange(10**6))
_TORTURE_FULL_DISK = True              # a member ends when its disk is full
_TORTURE_FLAGS = ("-snapshot-count", "200")
_TORTURE_FAST = ("-heartbeat-interval", "50", "-election-timeout", "300")


class TortureMember(ClusterMember):
    """A member whose advertised peer URL may not be where it listens; its disk is named."""

    def __init__(self, directory, name, process_type=Process):
        super().__init__(directory, name, process_type)
        self.listen = f"http://127.0.0.1:{free_port()}"
        self.disk = directory / f"disk-{name}"

    @property
    def id(self):
        return f"{pyetcd.member_id([self.peer], pyetcd.DEFAULT_CLUSTER_TOKEN):x}"

    @property
    def address(self):
        return urllib.parse.urlsplit(self.client).netloc

    def flags(self):
        return [
            "-name", self.name, "-initial-advertise-peer-urls", self.peer,
            "-listen-peer-urls", self.listen, "-listen-client-urls", self.client,
            "-advertise-client-urls", self.client, "-data-dir", str(self.disk / "data"),
        ]

    def is_up(self):
        return self.process.popen.poll() is None


class CuttingProxy:
    """A port before each member's peer port; bytes from one member to another can be stopped.

    Who dials is told by the first head of each connection.  What is stopped is not lost but comes
    late, as with TCP over a network that loses all packets for a while; with `resets`, connections
    end instead.  It has a thread of its own; any other may cut and heal.
    """

    def __init__(self) -> None:
        self._cut: Set[Tuple[str, str]] = set()     # ids of members: from, to
        self._resets = False
        self._servers: List[asyncio.AbstractServer] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cutting-proxy")
        self._thread.start()

    def attach(self, member: TortureMember) -> None:
        """Stand where the member says it is, for where it listens."""
        ports = [urllib.parse.urlsplit(url).port for url in (member.peer, member.listen)]
        self._do(self._open(member.id, *ports))

    def cut(self, pairs: Set[Tuple[TortureMember, TortureMember]], resets: bool) -> None:
        """Let nothing pass from the first of each pair to the second."""
        self._resets = resets
        self._cut = self._cut | {(a.id, b.id) for a, b in pairs}

    def heal(self, pairs: Set[Tuple[TortureMember, TortureMember]]) -> None:
        """Let everything pass again."""
        self._cut = self._cut - {(a.id, b.id) for a, b in pairs}

    def close(self) -> None:
        """End all connections and the thread."""
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    async def _open(self, member_id: str, port: int, peer_port: int) -> None:
        serve = functools.partial(self._serve, member_id, peer_port)
        self._servers.append(await asyncio.start_server(serve, "127.0.0.1", port))

    async def _stop(self) -> None:
        for server in self._servers:
            server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.05)                   # the transports close in the next turns

    async def _serve(self, member_id, peer_port, reader, writer):
        writers = [writer]
        halves = set()
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            dialer = re.search(rb"(?i)\r\nx-server-from: *([0-9a-f]+)", head)
            name = dialer[1].decode() if dialer else ""     # probes have no name
            back, there = await asyncio.open_connection("127.0.0.1", peer_port)
            writers.append(there)
            halves = {asyncio.ensure_future(self._forward(reader, there, (name, member_id), head)),
                      asyncio.ensure_future(self._forward(back, writer, (member_id, name)))}
            await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            for half in halves:
                half.cancel()
            for each in writers:
                each.close()

    async def _forward(self, reader, writer, way, data=b""):
        """Copy bytes until the end, or until a reset; hold them while the way is cut."""
        with contextlib.suppress(OSError):
            while True:
                data = data or await reader.read(65_536)
                while way in self._cut:
                    if self._resets:
                        return
                    await asyncio.sleep(0.01)
                if not data:
                    return
                writer.write(data)
                await writer.drain()
                data = b""


class NamespaceNetwork:
    """A network namespace for each member, all on one bridge: the kernel loses what is cut.

    A member that may not reach another one is given a hardware address that nobody has.
    """

    def __init__(self) -> None:
        self._name = f"torture{os.getpid() % 10_000}"
        self._subnet = f"10.213.{os.getpid() % 250}"
        self._spaces: Dict[str, str] = {}           # by the member's name
        _ip(f"link add {self._name} type bridge")
        _ip(f"addr add {self._subnet}.1/24 dev {self._name}")
        _ip(f"link set {self._name} up")

    def attach(self, member: TortureMember) -> None:
        """Give the member an address of its own, in a namespace of its own."""
        space = f"{self._name}n{len(self._spaces)}"
        self._spaces[member.name] = space
        address = self._address(member)
        _ip(f"netns add {space}")
        _ip(f"link add {space} type veth peer name e0 netns {space}")
        _ip(f"link set {space} master {self._name} up")
        _ip(f"-n {space} addr add {address}/24 dev e0")
        _ip(f"-n {space} link set e0 up")
        member.client = f"http://{address}:2379"
        member.peer = member.listen = f"http://{address}:2380"
        member.process_type = type("SpaceProcess", (Process,), {
            "program": ("ip", "netns", "exec", space, *Process.program)})

    def cut(self, pairs: Set[Tuple[TortureMember, TortureMember]], resets: bool) -> None:
        """Let nothing pass from the first of each pair to the second; there are no resets."""
        for a, b in pairs:
            _ip(f"-n {self._spaces[a.name]} neigh replace {self._address(b)}"
                " lladdr 02:00:00:00:00:01 dev e0 nud permanent")

    def heal(self, pairs: Set[Tuple[TortureMember, TortureMember]]) -> None:
        """Let everything pass again."""
        for a, b in pairs:
            with contextlib.suppress(subprocess.CalledProcessError):    # healed already
                _ip(f"-n {self._spaces[a.name]} neigh del {self._address(b)} dev e0")

    def close(self) -> None:
        """Remove all of it."""
        # Links by name: a namespace stays while the kernel still sends for a dead process.
        spaces = self._spaces.values()
        for words in [*(f"link del {space}" for space in spaces), f"link del {self._name}",
                      *(f"netns del {space}" for space in spaces)]:
            with contextlib.suppress(subprocess.CalledProcessError):    # it failed to be made
                _ip(words)

    def _address(self, member: TortureMember) -> str:
        return f"{self._subnet}.{list(self._spaces).index(member.name) + 2}"


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, timeout=20)


@functools.cache
def _why_no_namespaces() -> str:
    """Return "" if this machine lets us have network namespaces."""
    space = f"torture-try{os.getpid()}"
    try:
        NamespaceNetwork().close()
        _ip(f"netns add {space}")
        _ip(f"netns del {space}")
    except FileNotFoundError:
        return "ip (iproute2) is not installed"
    except subprocess.CalledProcessError as error:
        return error.stderr.decode().strip()
    return ""


class TortureCluster(StaticCluster):
    """A cluster on a network that can be cut."""

    member_type = TortureMember

    def __init__(self, directory, size, *flags, network_type=CuttingProxy):
        super().__init__(directory, size, *flags)
        self.network_type = network_type

    def __enter__(self):
        self.network = self.network_type()
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.network.close)
            for member in self.members:
                self.network.attach(member)
            on_failure.pop_all()
        self.initial = ",".join(f"{m.name}={m.peer}" for m in self.members)
        return super().__enter__()      # which comes to __exit__ if it fails

    def __exit__(self, *exc_info):
        super().__exit__(*exc_info)
        self.network.close()

    def others(self, member):
        return [other for other in self.members if other is not member]

    @contextlib.contextmanager
    def cut_between(self, some, others, ways=2, resets=False):
        """Nothing goes from `some` to `others`, nor, with two ways, back."""
        pairs = {(a, b) for a in some for b in others}
        pairs |= {(b, a) for a, b in pairs} if ways == 2 else set()
        self.network.cut(pairs, resets)
        try:
            yield
        finally:
            self.network.heal(pairs)

    @contextlib.contextmanager
    def paused(self, member):
        """The process does nothing, and does not know it."""
        process = member.process.popen
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def killed(self, members):
        """kill -9, and a restart."""
        for member in members:
            member.process.popen.kill()
        for member in members:
            member.process.kill()
        try:
            yield
        finally:
            for member in members:
                if not member.is_up():              # else another fault has ended sooner
                    self.start(member)

    @contextlib.contextmanager
    def full_disk(self, member):
        """Not a byte is free where the member has its data."""
        ballast = member.disk / "ballast"
        with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(65_536))
        try:
            yield
        finally:
            ballast.unlink(missing_ok=True)          # twice full, once emptied


@contextlib.contextmanager
def small_disk(path, megabytes):
    """A file system of its own at `path`; yields "", or why it cannot be had."""
    path.mkdir()
    if not shutil.which("mount"):
        yield "there is no mount"
        return
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)],
        capture_output=True, text=True, timeout=20)
    try:
        yield mount.stderr.strip()
    finally:
        if mount.returncode == 0:
            subprocess.run(["umount", str(path)], check=True, timeout=20)


class Histories:
    """What all clients of one run saw, and which keys they use now.

    A key is used for some 200 operations and then left: long histories are hard to check.
    """

    keys_at_once, operations_per_key = 4, 200

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.seen: Dict[str, Optional[str]] = {}    # last known value, a guess for swaps
        self._asked = itertools.count()

    def next_key(self, rng: random.Random) -> str:
        generation = next(self._asked) // (self.keys_at_once * self.operations_per_key)
        return f"{generation:05}-{rng.randrange(self.keys_at_once)}"


class TortureDoor:
    """Connections of one thread to every member."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._open: Dict[str, http.client.HTTPConnection] = {}

    def ask(self, member, method, path, **form):
        """Return (status, JSON); None: no answer.  ConnectionRefusedError: it was never sent."""
        connection = self._open.pop(member.address, None)
        connection = connection or http.client.HTTPConnection(
            member.address, timeout=self.timeout_s)
        body = urllib.parse.urlencode(form) or None
        headers = {"Content-Type": "application/x-www-form-urlencoded"} if body else {}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            result = answer.status, json.loads(answer.read())
        except ConnectionRefusedError:
            connection.close()
            raise
        except (OSError, http.client.HTTPException, ValueError):
            connection.close()
            return None
        self._open[member.address] = connection
        return result

    def close(self) -> None:
        for connection in self._open.values():
            connection.close()


class Change(NamedTuple):
    """What happened to a key at an index of the store; value None: it was deleted."""

    key: str
    value: Optional[str]
    previous: Optional[str]

    @classmethod
    def of(cls, body):
        """Read an event, or the answer to a write."""
        return cls(body["node"]["key"].rpartition("/")[2], body["node"].get("value"),
                   body.get("prevNode", {}).get("value"))


class TortureClient(threading.Thread):
    """Writes, swaps, deletes and reads at members of its choice; nothing is ever repeated."""

    def __init__(self, members, histories, name):
        super().__init__(name=name)
        self.members, self.histories = members, histories
        self.rng = random.Random(f"{TORTURE_SEED}/{name}")
        self.operations: List[Tuple[str, Operation]] = []           # with their keys
        self.changes: List[Tuple[int, Change, Operation]] = []      # with their modifiedIndex
        self.wrong: List[str] = []
        self._door = TortureDoor(self.rng.choice((0.3, 1, 4)))     # hasty and patient ones
        self._numbers = itertools.count()

    def run(self):
        try:
            while not self.histories.ended.wait(self.rng.uniform(0, 0.02)):
                verb = self.rng.choices(("write", "swap", "read", "delete"), (4, 3, 4, 1))[0]
                self._operate(verb, self.histories.next_key(self.rng))
        finally:
            self._door.close()

    def _operate(self, verb, key):
        new = f"{self.name}.{next(self._numbers)}" if verb in ("write", "swap") else None
        old = self.histories.seen.get(key) if verb == "swap" else None
        called = time.monotonic()
        try:
            answer = self._ask(verb, f"/v2/keys/t/{key}", new, old)
        except ConnectionRefusedError:
            return
        returned = time.monotonic()
        operation = self._meaning(verb, new, old, answer)
        if operation is not None:
            operation = operation._replace(called=called, returned=operation.returned or returned)
            self.operations.append((key, operation))
            if answer and answer[0] in (200, 201):
                self._note(key, operation, answer[1])

    def _ask(self, verb, path, new, old):
        member = self.rng.choice(self.members)
        if verb == "read":
            return self._door.ask(member, "GET", path + "?quorum=true")
        if verb == "delete":
            return self._door.ask(member, "DELETE", path)
        if verb == "write":
            return self._door.ask(member, "PUT", path, value=new)
        if old is None:
            return self._door.ask(member, "PUT", path, value=new, prevExist="false")
        return self._door.ask(member, "PUT", path, value=new, prevValue=old)

    def _meaning(self, verb, new, old, answer):
        """Return what the answer says, without times; None: it says nothing.

        An acknowledged write tells the value before, so it is as good as a swap.
        """
        status, body = answer or (0, {})
        code = body.get("errorCode")
        if status in (200, 201) and verb == "read":
            return Operation(0, 0, "read", body["node"]["value"])
        if status in (200, 201):
            previous = Change.of(body).previous
            if verb == "swap" and previous != old:
                self.wrong.append(f"swap from {old} had prevNode {previous}")
            return Operation(0, 0, "swap", new, previous)
        if code == 100:
            return Operation(0, 0, "read", None)
        if code == 101:
            return Operation(0, 0, "read", body["cause"][1:-1].partition(" != ")[2])
        if code == 105:
            return Operation(0, 0, "swap", new, None, ok=False)
        unknown = "swap" if verb == "swap" else "write"
        return None if verb == "read" else Operation(0, math.inf, unknown, new, old)

    def _note(self, key, operation, body):
        """Keep what the next swap can start from, and the index of a change."""
        self.histories.seen[key] = body["node"].get("value")
        if operation.verb == "swap":
            self.changes.append((body["node"]["modifiedIndex"], Change.of(body), operation))


class TortureWatcher(threading.Thread):
    """Follows all changes from member to member, one at a time or by a stream."""

    def __init__(self, members, name, streams, wait_index):
        super().__init__(name=name)
        self.members, self.streams, self.wait_index = members, streams, wait_index
        self.rng = random.Random(f"{TORTURE_SEED}/{name}")
        self.events: Dict[int, Change] = {}         # by modifiedIndex
        self.seen_s: Dict[Change, float] = {}       # when, by time.monotonic()
        self.gaps: List[range] = []                 # indexes that were no more in the history
        self.wrong: List[str] = []
        self.end_index = math.inf                   # the last one to wait for

    def run(self):
        while self.wait_index <= self.end_index and not self.wrong:
            member = self.rng.choice(self.members)
            connection = http.client.HTTPConnection(member.address, timeout=1)
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                self._follow(connection)
            connection.close()
            threading.Event().wait(0.01)            # all may be down

    def _follow(self, connection):
        """Take events from one member until it has no more, or for a while."""
        query = "wait=true&recursive=true" + ("&stream=true" if self.streams else "")
        for _ in range(self.rng.randrange(1, 300)):
            connection.request("GET", f"/v2/keys/t?{query}&waitIndex={self.wait_index}")
            answer = connection.getresponse()
            if answer.status == 400:
                index = json.loads(answer.read())["index"]
                self.gaps.append(range(self.wait_index, index + 1))
                self.wait_index = index + 1
                continue
            for line in iter(answer.readline, b""):
                self._take(json.loads(line))
                if self.wait_index > self.end_index:
                    return
            if self.streams or answer.status != 200:
                return

    def _take(self, event):
        index = event["node"]["modifiedIndex"]
        if index < self.wait_index:
            self.wrong.append(f"{self.name} waited for {self.wait_index} and got {index}")
        change = self.events[index] = Change.of(event)
        self.seen_s[change] = time.monotonic()
        self.wait_index = index + 1


class Torture:
    """Clients and watchers at work on a cluster, a nemesis, and the final judgement."""

    def __init__(self, cluster, rng, small=(), clients=12, watchers=4):
        self.cluster, self.rng = cluster, rng
        self.small = small              # members whose disk can be filled
        self.histories = Histories()
        members = cluster.members
        self.clients = [TortureClient(members, self.histories, f"c{i}") for i in range(clients)]
        index = eventually(lambda: members[0].put("t/begin", "1"), what="a first write")
        first = index[1]["node"]["modifiedIndex"] + 1
        self.watchers = [TortureWatcher(members, f"w{i}", i % 2 == 0, first)
                         for i in range(watchers)]
        self.faults: List[str] = []
        self._deck: List[Callable[[], Tuple[str, Any]]] = []

    def run(self, seconds):
        """Let all work while one fault follows another; then heal, and wait for the last event."""
        deadline = time.monotonic() + seconds
        threads = [*self.clients, *self.watchers]
        for thread in threads:
            thread.start()
        last = 0                                    # after a failure nobody waits for an end
        try:
            while time.monotonic() < deadline:
                self._one_fault()
            self._end_clients()
            self.check_convergence()                # late writes have happened then
            last = self._write_marker()
        finally:
            self._end_clients()
            for watcher in self.watchers:
                watcher.end_index = last
        self._write_marker()                        # wakes up who had the last one before
        for watcher in self.watchers:
            watcher.join(60)
            assert not watcher.is_alive(), f"{watcher.name} waits for {watcher.wait_index}"

    def _end_clients(self):
        self.histories.ended.set()
        for client in self.clients:
            client.join()

    def _write_marker(self):
        def written():
            answer = self.cluster.members[0].put("t/end", "1")
            return answer and answer[0] in (200, 201) and answer[1]["node"]["modifiedIndex"]
        return eventually(written, 60, "a write after the faults")

    def _one_fault(self):
        """Choose, begin, wait, heal, and let the cluster breathe; now and then two at a time."""
        with contextlib.ExitStack() as faults:
            for _ in range(self.rng.choice((1, 1, 1, 2))):
                name, fault = self._choose()
                self.faults.append(name)
                faults.enter_context(fault)
                self._wait(self.rng.uniform(0.3, 1.0))
            if TORTURE_SECONDS:
                self._wait(self.rng.choice((0, 1, 2, 7)))      # 7: links are given up after 5
        self._wait(self.rng.uniform(0.1, 0.5))
        dead = [member for member in self.cluster.members if not member.is_up()]
        assert not dead, f"{dead[0].name} died in {self.faults[-2:]}:\n" + (
            dead[0].process.log()[-2000:])

    def _choose(self):
        """Deal one fault after the other, then shuffle again."""
        if not self._deck:
            self._deck = [self._kill, self._pause, self._cut_off, self._cut_halves,
                          self._cut_one_way, self._bridge] + [self._fill] * bool(self.small)
            self.rng.shuffle(self._deck)
        return self._deck.pop()()

    def _wait(self, seconds):
        threading.Event().wait(seconds)

    def _anyone(self):
        """The leader, more often than the others."""
        anyone, wants_leader = self.rng.choice(self.cluster.members), self.rng.random() < 0.6
        leaders = (member for member in self.cluster.members if member.is_leader())
        return next(leaders, anyone) if wants_leader else anyone

    def _some(self, count):
        members = [self._anyone()]
        return members + self.rng.sample(self.cluster.others(members[0]), count - 1)

    def _kill(self):
        """One, a minority, a majority or all."""
        size = len(self.cluster.members)
        count = self.rng.choice((1, 1, size // 2, size // 2 + 1, size))
        return f"kill {count}", self.cluster.killed(self._some(count))

    def _fill(self):
        return "full disk", self.cluster.full_disk(self.rng.choice(self.small))

    def _pause(self):
        return "pause", self.cluster.paused(self._anyone())

    def _cut(self, some, others, ways=2):
        return self.cluster.cut_between(some, others, ways, self.rng.random() < 0.3)

    def _cut_off(self):
        member = self._anyone()
        return "cut one off", self._cut([member], self.cluster.others(member))

    def _cut_halves(self):
        some = self._some(len(self.cluster.members) // 2)
        return "halves", self._cut(some, [m for m in self.cluster.members if m not in some])

    def _cut_one_way(self):
        member = self._anyone()
        sides = [[member], self.cluster.others(member)]
        self.rng.shuffle(sides)
        return "one way", self._cut(*sides, ways=1)

    def _bridge(self):
        """Two members, or halves, cannot meet; one member meets all."""
        bridge, *rest = self._some(len(self.cluster.members))
        return "bridge", self._cut(rest[::2], rest[1::2])

    # -- judgement ---------------------------------------------------------

    def judge(self):
        """Check all that was seen; return a line of figures."""
        self._read_all_at_last()
        wrong = [text for each in [*self.clients, *self.watchers] for text in each.wrong]
        assert not wrong, wrong[:5]
        changes = sorted(change for client in self.clients for change in client.changes)
        self._check_indexes(changes)
        self._check_events({index: change for index, change, _ in changes})
        histories: Dict[str, List[Operation]] = collections.defaultdict(list)
        for key, operation in self._settled({change for _, change, _ in changes}):
            histories[key].append(operation)
        for key, operations in histories.items():
            violation = find_violation(operations)
            assert not violation, f"{key}: {violation} in\n" + "\n".join(map(str, operations))
        all_operations = [op for client in self.clients for _, op in client.operations]
        unanswered = sum(op.returned == math.inf for op in all_operations)
        return (f"{len(all_operations)} operations on {len(histories)} keys,"
                f" {unanswered} without an answer; {len(changes)} changes,"
                f" events {[len(watcher.events) for watcher in self.watchers]},"
                f" gaps {[len(watcher.gaps) for watcher in self.watchers]};"
                f" faults {dict(collections.Counter(self.faults))}")

    def _read_all_at_last(self):
        """What is there in the end is the last operation on every key."""
        called = time.monotonic()
        answer = self.cluster.members[-1].request(
            "GET", "/v2/keys/t", recursive="true", quorum="true", timeout_s=60)
        values = {node["key"].rpartition("/")[2]: node["value"]
                  for node in answer[1]["node"]["nodes"]}
        keys = {key for client in self.clients for key, _ in client.operations}
        self.clients[0].operations += [
            (key, Operation(called, time.monotonic(), "read", values.get(key))) for key in keys]

    @staticmethod
    def _check_indexes(changes):
        """An index has one change, and later changes have higher ones, whatever their key."""
        returned = iter(sorted(changes, key=lambda change: change[2].returned))
        highest, following = 0, next(returned, None)
        for change in sorted(changes, key=lambda change: change[2].called):
            while following and following[2].returned < change[2].called:
                highest = max(highest, following[0])
                following = next(returned, None)
            assert change[0] > highest, f"{change} was told an index below {highest}"
        indexes = collections.Counter(change[0] for change in changes)
        assert not [index for index, count in indexes.items() if count > 1]

    def _check_events(self, told):
        """Watchers saw every change that a client was told of, the same ones, and no others."""
        written = {op.new for client in self.clients for _, op in client.operations
                   if op.verb != "read"}
        meaning: Dict[int, Change] = {}
        for watcher in self.watchers:
            gone = {index for gap in watcher.gaps for index in gap}
            missed = [(index, change) for index, change in told.items()
                      if index not in gone and watcher.events.get(index) != change]
            assert not missed, f"{watcher.name} missed {missed[:5]} of {len(missed)}"
            for index, event in watcher.events.items():
                assert meaning.setdefault(index, event) == event
                assert event.value in written or event.key == "end", event

    def _settled(self, told):
        """Yield (key, operation) of all clients; watchers know more of those without an answer.

        They have seen which of them happened, instead of what, and not later than when.  This
        makes no wrong answer look right, but the search short: it is exponential in the others.
        """
        seen_s: Dict[Change, float] = {}
        for change, at_s in itertools.chain(*(w.seen_s.items() for w in self.watchers)):
            seen_s[change] = min(at_s, seen_s.get(change, math.inf))
        by_value = {change.value: change for change in seen_s}
        knows_all = not all(watcher.gaps for watcher in self.watchers)
        deletes: Dict[str, List[Operation]] = collections.defaultdict(list)
        for key, op in itertools.chain(*(client.operations for client in self.clients)):
            if op.returned < math.inf or not knows_all:
                yield key, op
            elif op.new is None:
                deletes[key].append(op)
            elif op.new in by_value:
                change = by_value[op.new]
                old = op.old if op.verb == "swap" else change.previous
                yield key, Operation(op.called, seen_s[change], "swap", op.new, old)
        for change in seen_s.keys() - told:
            if change.value is None and knows_all:
                called = min(op.called for op in deletes[change.key])   # one of these it was
                yield change.key, Operation(
                    called, seen_s[change], "swap", None, change.previous)

    def check_convergence(self):
        """All members hold the same keys at the same indexes."""
        def is_same():
            answers = [member.request("GET", "/v2/keys/", recursive="true", sorted="true")
                       for member in self.cluster.members]
            return all(answers) and len({
                (json.dumps(body), headers["X-Etcd-Index"], headers["X-Raft-Index"])
                for _, body, headers in answers}) == 1
        eventually(is_same, 60, "the same keys at the same index everywhere")
