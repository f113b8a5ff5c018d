"""Attacks from outside on real processes, while another client reads and writes."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import threading
import time

import pytest

import pyetcd
from tests.kit.basics import eventually, free_port
from tests.kit.http import _HttpSocket
from tests.kit.processes import ClusterMember, Process, StaticCluster, ended
from tests.kit.registries import _DiscRegistry
from tests.kit.servers import RawServer

# 1 takes some 40 s; the sizes of the issue and above: PYETCD_ATTACK=10.
_SCALE = float(os.environ.get("PYETCD_ATTACK", "1"))
_MB = 1 << 20
_RESIDENT_SLACK = 100 * _MB         # what may be left of an attack: caches, and holes in the heap


def _times(count):
    return max(1, round(count * _SCALE))


class _Traffic:
    """A client that writes and reads all the time, and remembers what went wrong."""

    def __init__(self, member):
        self.done, self.wrong = 0, []
        self._member = member
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        eventually(lambda: self.done, what="the first write")
        return self

    def __exit__(self, *exc_info):
        self._over.set()
        self._thread.join(120)

    def _run(self):
        number = 0
        while not self._over.wait(0.02):
            number += 1
            put = self._member.request(
                "PUT", "/v2/keys/traffic", {"value": number}, timeout_s=100)
            value = self._member.value("traffic")
            if put is None or put[0] not in (200, 201) or value != str(number):
                self.wrong.append((put and put[:2], value, number, self._member.failure))
            self.done += 1

    def goes_on(self):
        """Wait until it has done some more."""
        wanted = self.done + 3
        eventually(lambda: self.done >= wanted, 120, "more writes and reads")


class _Victim:
    """A process under attack, and what it was before."""

    def __init__(self, member, cluster=None):
        if not os.path.isdir("/proc/self/fd"):
            pytest.skip("only Linux's /proc tells what another process has open")
        self.member, self.cluster = member, cluster
        self.process = member.process
        self.client, self.peer = member.client, member.peer
        eventually(lambda: self.term(), what="a term")
        self.before = self.term(), self.resident(), self.descriptors()

    def term(self):
        answer = self.member.request("GET", "/v2/keys/")
        return answer and int(answer[2].get("X-Raft-Term", 0))

    def resident(self):
        with open(f"/proc/{self.process.popen.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.popen.pid}/fd"))

    def cluster_id(self):
        return self.member.request("GET", "/version")[2].get("X-Etcd-Cluster-Id") or \
            self.member.request("GET", "/v2/members")[2]["X-Etcd-Cluster-Id"]

    def check(self, *said, slack=_RESIDENT_SLACK):
        """It lives, leads as before, let go of everything, and its log says what happened."""
        term, resident, descriptors = self.before
        assert self.process.popen.poll() is None, self.process.log()[-3000:]
        assert self.term() == term, "an attack must not cost a leader its term"
        eventually(lambda: self.descriptors() <= descriptors + 4, 30, "descriptors came back")
        eventually(lambda: self.resident() <= resident + slack, 20, "memory came back")
        for text in said:
            eventually(lambda text=text: text in self.process.log(), 20, f"{text!r} in the log")
        assert "Traceback" not in self.process.log() and "bug:" not in self.process.log()


def _ends(process):
    """SIGTERM ends it, and it says so."""
    assert process.kill(signal.SIGTERM) in (0, -signal.SIGTERM)
    assert "received terminated signal, shutting down" in process.log()


@contextlib.contextmanager
def _under_attack(directory, size=1, *flags):
    """Yield the victim, the leader of `size` members, with traffic; then check what must hold."""
    with StaticCluster(directory, size, *flags) as cluster:
        leader = cluster.leader()
        cluster.put_through(leader, "first", "1")
        victim = _Victim(leader, cluster)
        with _Traffic(leader) as traffic:
            yield victim
            traffic.goes_on()
        assert not traffic.wrong, traffic.wrong[:3]
        victim.check()
        for member in cluster.members:
            _ends(member.process)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A member alone that survives all attacks of this file."""
    with _under_attack(tmp_path_factory.mktemp("one")) as victim:
        yield victim


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The leader of three, likewise."""
    with _under_attack(tmp_path_factory.mktemp("three"), 3) as victim:
        yield victim


def _say(url, data, timeout_s=20):
    """Send bytes, and return what comes until the end or the time is over."""
    with _HttpSocket(url, timeout_s=timeout_s) as client:
        with contextlib.suppress(OSError):
            client.send(data)
            client.socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            client.rest()
        return client.data


@contextlib.contextmanager
def _connected(url, count, **options):
    """So many connections at the same time."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_HttpSocket(url, **options)) for _ in range(count)]


def _post(path, body, *headers, method="POST"):
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close",
             f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


_FORM = "Content-Type: application/x-www-form-urlencoded"


# -- work ----------------------------------------------------------------------------


_SLOW_HEADS = [
    b"a:" + b" " * 1_600 + b"\0", b"a:" + b" b" * 20_000 + b"\0", b"a: x" + b"\t" * 40_000 + b"\0",
    b"a" * 40_000 + b"\0", b"a:" + b"\t \r" * 20_000, b"Host:" + b" " * 40_000 + b"\x7f:\0",
    b"Cookie: " + b"a=\"" * 20_000 + b"\0", b"Accept-Encoding: " + b"gzip;q=" * 9_000 + b"\0",
    b"Authorization: Basic " + b"=" * 60_000, b"Transfer-Encoding: " + b"chunked," * 9_000,
    b"Origin: http://" + b"[" * 60_000, b"If-None-Match: " + b"\"," * 40_000,
]


@pytest.mark.parametrize("port", ["client", "peer"])
def test_live_heads_made_to_be_slow(three, port):
    """A1: each many times, on both ports of a leader."""
    for head in _SLOW_HEADS:
        for _ in range(_times(3)):
            answer = _say(getattr(three, port), b"GET / HTTP/1.1\r\n" + head + b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 "), head[:40]
    three.check()


def test_live_heads_at_a_proxy(tmp_path, one):
    """A1: the proxy in front of a member serves on."""
    url = f"http://127.0.0.1:{free_port()}"
    proxy = ClusterMember(tmp_path, "proxy")
    proxy.client = url
    proxy.process = Process(
        tmp_path, "-proxy", "on", "-listen-client-urls", url, "-data-dir", str(tmp_path / "p"),
        "-initial-cluster", f"n0={one.member.peer}")
    with ended(proxy):
        eventually(lambda: proxy.value("first") == "1", what="the proxy")
        for head in _SLOW_HEADS:
            answer = _say(url, b"GET / HTTP/1.1\r\n" + head + b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 "), head[:40]
        assert proxy.value("first") == "1"
        _ends(proxy.process)


def test_live_requests_that_cost_much(three):
    """A2: forms, pipelines, listings, heads byte by byte; against a leader."""
    big = b"a=b&" * 2_600_000
    for path, method in (("/new", "POST"), ("/v2/keys/a", "PUT"), ("/v2/auth/enable", "PUT")):
        assert _say(three.client, _post(path, big, _FORM, method=method)).startswith(b"HTTP/1.1 4")
    ask = b"%b HTTP/1.1\r\nHost: x\r\n\r\n"
    for line in (b"HEAD /metrics", b"GET /v2/stats/store", b"GET /debug/vars", b"HEAD /v2/keys/?"
                 b"recursive=true", b"GET /v2/members"):
        count = _times(200)
        answers = _say(three.client, ask % line * count, 60)
        assert answers.count(b"HTTP/1.1 ") == count, line
    three.check()


def test_live_many_listings_become_ready_together(one):
    """A2: the same large directory, wanted by all at the same time."""
    put = b"PUT /v2/keys/large/%d?value=x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    answers = _say(one.client, b"".join(put % number for number in range(1_000)), 60)
    assert answers.count(b"HTTP/1.1 201") == 1_000
    with _connected(one.client, _times(50), timeout_s=60) as clients:
        for client in clients:
            client.send(b"GET /v2/keys/large?recursive=true&sorted=true HTTP/1.1\r\nHost: x\r\n"
                        b"Connection: close\r\n\r\n" * 2)
        for client in clients:
            assert client.until(b"HTTP/1.1 ") == b"HTTP/1.1 "
    one.check()


def test_live_heads_that_come_in_small_pieces(one):
    """A2: ten connections, each with a head near the limit."""
    with _connected(one.client, 10) as clients:
        for client in clients:
            client.send(b"GET / HTTP/1.1\r\n")
        for number in range(_times(600)):
            for client in clients:
                with contextlib.suppress(OSError):
                    client.send(b"a%d: b\r" % number)
                    client.send(b"\n" + b"c" * 100 + b": " + b"d" * 1_000 + b"\r\n")
    one.check()


def _peer_headers(victim, sender="1"):
    return [f"X-Etcd-Cluster-Id: {victim.cluster_id()}", f"X-Server-From: {sender}",
            "X-Server-Version: 2.3.8", "X-Min-Cluster-Version: 2.2.0",
            "X-PeerURLs: http://127.0.0.1:1"]


def test_live_peer_messages_of_many_fields(three):
    """A2: repeated fields, entries without number, from members and strangers."""
    follower = next(m for m in three.cluster.members if m is not three.member)
    sender = follower.request("GET", "/v2/stats/self")[1]["id"]
    for headers in (_peer_headers(three), _peer_headers(three, sender)):
        for body in (b"\x08\x03" * 4_000_000, b"\x3a\x00" * 3_000_000,
                     b"\x3a\x02\x08\x00" * 900_000, b"\xff" * 5_000_000,
                     b"\x08" + b"\x80" * 9 + b"\x01", b""):
            answer = _say(three.peer, _post("/raft", body, *headers))
            assert not answer or answer[:10] in (b"HTTP/1.1 4", b"HTTP/1.1 5"), answer[:100]
    three.check()


def test_live_large_values_while_a_snapshot_is_made(tmp_path):
    """A2: slices count bytes."""
    with _under_attack(tmp_path, 1, "-snapshot-count", "40") as victim:
        for number in range(_times(60)):
            victim.member.put(f"v{number}", "x" * (100_000 + 150_000 * (number % 2)), timeout_s=30)
        eventually(lambda: "saved snapshot at index" in victim.process.log()
                   or "compacted raft log" in victim.process.log(), what="a snapshot")
        victim.before = victim.before[0], victim.resident(), victim.before[2]


def _interim(sock):
    sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 16_000)


def _endless_head(sock):
    while True:
        sock.sendall(b"a: b\r\n" * 10_000)


def _endless_body(sock):
    sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        sock.sendall(b"10\r\n0123456789abcdef\r\n" * 3_000)


def _huge_frame(sock):
    sock.sendall(b"HTTP/1.1 200 OK\r\nX-Server-Version: 2.3.8\r\nTransfer-Encoding: chunked\r\n\r\n"
                 b"10\r\n" + struct.pack(">QQ", 1 << 62, 7) + b"\r\n")
    sock.recv(1)


def _junk(sock):
    sock.sendall(random.Random(1).randbytes(100_000) if hasattr(random.Random, "randbytes")
                 else os.urandom(100_000))


_NONSENSE = (_interim, _endless_head, _endless_body, _huge_frame, _junk)


def test_live_a_peer_that_answers_nonsense(tmp_path):
    """A3, A4: the third of three is none; the other two go on, and dial it seldom."""
    def behave(sock):
        sock.settimeout(20)
        sock.recv(1 << 16)
        _NONSENSE[peer.connections % len(_NONSENSE)](sock)

    with RawServer(behave) as peer:
        cluster = StaticCluster(tmp_path, 3)
        cluster.members[2].peer = peer.url
        cluster.initial = ",".join(f"{m.name}={m.peer}" for m in cluster.members)
        cluster.members.pop()
        with cluster:
            leader = cluster.leader()
            cluster.put_through(leader, "first", "1")
            victim = _Victim(leader, cluster)
            with _Traffic(leader) as traffic:
                before, started = peer.connections, time.monotonic()
                eventually(lambda: peer.connections >= before + _times(40), 60 * _SCALE)
                # Two members: streams, a post for each heartbeat and beat of a link, probes.
                assert peer.connections - before <= 2 * 20 * (time.monotonic() - started + 2)
                traffic.goes_on()
            assert not traffic.wrong
            victim.check()
            _ends(leader.process)


def test_live_a_registry_that_ends_waits_empty(tmp_path):
    """A4: it is asked again less and less often."""
    registry = _DiscRegistry()
    registry.on_wait = lambda: (200, b"")
    process = Process(
        tmp_path, "-name", "n0", "-discovery", registry.url,
        "-initial-advertise-peer-urls", f"http://127.0.0.1:{free_port()}",
        "-listen-client-urls", "http://127.0.0.1:0", "-listen-peer-urls", "http://127.0.0.1:0")
    try:
        def waits():
            return sum("wait=" in line for line in registry.requests)
        eventually(lambda: waits() >= 3, what="the first waits")
        started, before = time.monotonic(), waits()
        eventually(lambda: time.monotonic() - started > 3 * _SCALE, 3 * _SCALE + 20)
        assert waits() - before <= 3 * (time.monotonic() - started) + 5
        process.kill(signal.SIGTERM)
    finally:
        process.kill()
        registry.close()


# -- memory and descriptors ----------------------------------------------------------


def test_live_bodies_of_strangers(three):
    """B5: nobody keeps what a stranger sends, whatever its path and its method."""
    before, most = three.resident(), 0
    piece = bytes(1 << 16)
    for path, headers in (("/raft", []), ("/raft/snapshot", []), ("/raft/stream/x", []),
                          ("/members", []), ("/raft", _peer_headers(three)),
                          ("/raft/snapshot", _peer_headers(three, "abc"))):
        for method in ("POST", "PUT", "GET"):
            with contextlib.suppress(OSError), _HttpSocket(three.peer, timeout_s=20) as client:
                client.send(_post(path, b"", *headers, method=method).replace(
                    b"Content-Length: 0", b"Content-Length: 500000000"))
                for _ in range(_times(200)):
                    client.send(piece)
            most = max(most, three.resident())
    assert most <= before + _RESIDENT_SLACK
    three.check()


def test_live_watchers_that_never_read(one):
    """B6: what they do not take has an end, for all of them together."""
    _say(one.client, _post("/v2/keys/w", b"value=1", _FORM, method="PUT"))
    with _connected(one.client, _times(60), receive_buffer=4_096) as clients:
        before, most = one.resident(), 0
        for number, client in enumerate(clients):
            client.send(b"GET /v2/keys/w?wait=true&stream=true&n=%d HTTP/1.1\r\n"
                        b"Host: x\r\n\r\n" % number)
        value = b"value=" + b"x" * 200_000
        for number in range(_times(60)):
            _say(one.client, _post("/v2/keys/w", value + b"%d" % number, _FORM, method="PUT"))
            most = max(most, one.resident())
    assert most <= before + pyetcd.HELD_BYTES_MAX + _RESIDENT_SLACK
    one.check()


def test_live_watches_and_connections_that_are_over(one):
    """B7: long paths, closed at once; the number of watchers is as before."""
    def watchers():
        text = eventually(lambda: one.member.request("GET", "/metrics"))[1]
        return float(re.search(r"(?m)^etcd_store_watchers (\S+)", text).group(1))

    before = watchers()
    for number in range(_times(300)):
        with _HttpSocket(one.client) as client:
            client.send(b"GET /v2/keys/%s/%d?wait=true&recursive=%s HTTP/1.1\r\nHost: x\r\n\r\n"
                        % (b"p" * 200_000, number, b"true" if number % 2 else b"false"))
    eventually(lambda: watchers() <= before, what="all watchers gone")
    one.check()


def test_live_user_names_are_not_kept(one):
    """B8: unknown users with names of 700 KB, over one connection and over many."""
    name = "u" * 520_000
    for number in range(_times(60)):
        basic = base64.b64encode(f"{name}{number}:p".encode()).decode()
        answer = _say(one.client, _post("/v2/keys/a", b"", f"Authorization: Basic {basic}",
                                        method="GET"))
        assert answer.startswith(b"HTTP/1.1 ")
    one.check()


@pytest.mark.parametrize("limit", [160, 256])
def test_live_without_descriptors(tmp_path, limit):
    """B9: what is open goes on, snapshots are made, the log says what to do."""
    class Limited(Process):
        program = ("sh", "-c", f'ulimit -n {limit}; exec "$0" "$@"', *Process.program)

    with StaticCluster(tmp_path, 1, "-snapshot-count", "50", process_type=Limited) as cluster:
        member = cluster.leader()
        cluster.put_through(member, "first", "1")
        victim = _Victim(member, cluster)
        with contextlib.ExitStack() as stack:
            session = stack.enter_context(contextlib.closing(
                http.client.HTTPConnection(*pyetcd.url_address(victim.client), timeout=20)))
            session.request("GET", "/version")
            session.getresponse().read()
            for _ in range(limit + 40):
                with contextlib.suppress(OSError):
                    stack.enter_context(_HttpSocket(victim.client))
                    stack.enter_context(_HttpSocket(victim.peer))
            for number in range(150):
                session.request("PUT", "/v2/keys/k", f"value={number}", {
                    "Content-Type": "application/x-www-form-urlencoded"})
                assert session.getresponse().read()
            eventually(lambda: "saved snapshot at index" in victim.process.log(), what="snapshot")
        eventually(lambda: member.value("k") == "149", what="new connections")
        victim.check("too many open files", "ulimit -n")
        _ends(member.process)


def test_live_data_directory_renamed(tmp_path):
    """B9: whatever a member makes of that, it never ends without a line that says why."""
    with StaticCluster(tmp_path, 1, "-snapshot-count", "20") as cluster:
        member = cluster.leader()
        (tmp_path / "n0.etcd").rename(tmp_path / "elsewhere")
        for number in range(60):
            member.put("k", str(number), timeout_s=2)
            if member.process.popen.poll() is not None:
                break
        if member.process.popen.poll() is not None:
            assert "n0.etcd" in member.process.log().splitlines()[-1]


def test_live_names_whose_server_hangs(tmp_path):
    """B10: two of five are names that no server answers for; all else goes on, and it stops."""
    if os.geteuid():
        pytest.skip("only root can have a resolv.conf of its own")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        try:
            silent.bind(("127.0.0.1", 53))
        except OSError:
            pytest.skip("somebody is a name server here")
        conf = tmp_path / "resolv.conf"
        conf.write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:2\n")
        mount = f'mount --bind {conf} /etc/resolv.conf && exec "$0" "$@"'
        probe = ("unshare", "-m", "sh", "-c", mount)
        if subprocess.run([*probe, "true"], check=False, capture_output=True).returncode:
            pytest.skip("no mount namespaces here")

        class Silenced(Process):
            program = (*probe, *Process.program)

        cluster = StaticCluster(tmp_path, 3, "-snapshot-count", "50", process_type=Silenced)
        cluster.initial += ",x=http://x.invalid:2380,y=http://y.invalid:2380"
        with cluster:
            leader = cluster.leader()
            cluster.put_through(leader, "first", "1")
            victim = _Victim(leader, cluster)
            with _Traffic(leader) as traffic:
                eventually(lambda: "saved snapshot" in leader.process.log(), 30, "a snapshot")
                traffic.goes_on()
            assert not traffic.wrong
            victim.check()
            _ends(leader.process)
