"""Clusters over real sockets, in processes of their own."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import re
import resource
import select
import signal
import socket
import threading
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import requests

import pyetcd
from pyetcd import Cluster, Entry, InvariantError, Message, MsgType, Request, Wal
from tests.kit.basics import eventually, free_port
from tests.kit.exchange import Writer
from tests.kit.http import _http_ask, _http_keys
from tests.kit.processes import ClusterMember, StaticCluster, ended


def test_cluster_survives_kill_of_each_member(tmp_path):
    """kill -9 of the leader: the others go on, and it catches up when it is restarted."""
    with StaticCluster(tmp_path) as cluster:
        for round_number in range(2):
            leader = cluster.leader()
            follower = next(m for m in cluster.members if m is not leader)
            assert follower.put("k", f"via follower {round_number}")[0] in (200, 201)
            leader.process.kill()
            cluster.put_through(follower, "after", str(round_number))
            cluster.start(leader)
            leader.process.wait_log("published")
            eventually(lambda m=leader, r=round_number: m.value("after") == str(r),
                       what="the killed member catching up")


def test_cluster_kill_of_all_loses_no_acknowledged_write(tmp_path):
    """kill -9 of all three while they write: everything acknowledged is there afterwards."""
    with StaticCluster(tmp_path, 3, "-snapshot-count", "50") as cluster:
        with Writer(cluster) as writer:
            writer.wait_more(200)
            for member in cluster.members:
                member.process.popen.kill()
        for member in cluster.members:
            member.process.kill()
            cluster.start(member)
        for member in cluster.members:
            member.process.wait_log("published")
            eventually(lambda m=member: m.index() == cluster.members[0].index())
            nodes = member.request("GET", "/v2/keys/w")[1]["node"]["nodes"]
            missing = writer.acknowledged.keys() - {node["key"] for node in nodes}
            assert not missing, f"{member.name} lost {len(missing)} of {len(writer.acknowledged)}"


def test_cluster_member_catches_up_by_snapshot(tmp_path, monkeypatch, caplog):
    """A follower that was away while the log was compacted is brought back by a snapshot."""
    def state(member):
        return _http_ask(member, "GET", "/v2/keys/d?recursive=true&sorted=true")[2], member.call(
            lambda etcd: etcd.store.current_index)

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(pyetcd, "SNAPSHOT_CATCHUP_ENTRIES", 100)
    with pyetcd.LocalCluster(3, str(tmp_path), snapshot_count=50, election_ms=500) as cluster:
        leader = cluster.wait_leader()
        away = next(m for m in cluster.members if m is not leader)
        away.kill()
        for number in range(350):
            answer = _http_keys(leader, "PUT", f"/d/{number % 50}", f"value={number}")
            assert answer[0] in (200, 201)
        eventually(lambda: "compacted raft log at" in caplog.text)
        away.start()
        assert "recovered from incoming snapshot" in caplog.text
        eventually(lambda: state(away) == state(leader), what="equal keys and indexes")
        # And it survives its own restart from that snapshot.
        away.restart()
        eventually(lambda: state(away) == state(leader), what="the same after restart")


def test_cluster_grows_and_shrinks(tmp_path):
    """POST /v2/members, join with state existing, update, remove: the removed one stops itself."""
    with StaticCluster(tmp_path, 1) as cluster:
        first = cluster.members[0]
        first.put("before", "joined")
        joined = []
        for number in (1, 2):
            member = ClusterMember(tmp_path, f"j{number}")
            answer = requests.post(first.client + "/v2/members", timeout=10,
                                   json={"peerURLs": [member.peer]})
            assert answer.status_code == 201, answer.text
            names = [f"{m.name}={m.peer}" for m in [first, *joined, member]]
            member.start("-initial-cluster", ",".join(names), "-initial-cluster-state", "existing")
            cluster.members.append(member)
            member.process.wait_log("published")
            eventually(lambda m=member: m.value("before") == "joined")
            joined.append(member)

        def members():
            return {m["name"]: m["id"] for m in first.request("GET", "/v2/members")[1]["members"]}
        eventually(lambda: members().keys() == {"n0", "j1", "j2"})
        leader = first.request("GET", "/v2/members/leader")[1]
        assert leader["name"] in {"n0", "j1", "j2"}
        gone = f"{first.client}/v2/members/{members()['j2']}"
        answer = requests.delete(gone, timeout=10)
        assert answer.status_code == 204
        assert joined[1].process.popen.wait(60) == 0
        assert "permanently removed" in joined[1].process.log()
        assert first.put("after", "removal")[0] == 201
        assert requests.delete(gone, timeout=10).status_code == 410


def test_cluster_sigterm_stops_in_order(tmp_path):
    """SIGTERM: said in the log, death by that very signal, and a restart finds everything."""
    with StaticCluster(tmp_path, 1) as cluster:
        only = cluster.members[0]
        only.put("a", "1")
        assert only.process.kill(signal.SIGTERM) == -signal.SIGTERM
        assert "received terminated signal, shutting down..." in only.process.log()
        cluster.start(only)
        only.process.wait_log("published")
        assert only.value("a") == "1"


def test_cluster_snapshots_segments_and_purge(tmp_path):
    """Snapshots come every -snapshot-count entries; a restart reads snapshot and tail."""
    with pyetcd.LocalMember("n0", str(tmp_path), snapshot_count=100, max_snapshots=2) as only:
        for number in range(450):
            _http_keys(only, "PUT", f"/k{number % 7}", f"value={number}")
        snap = tmp_path / "n0" / "member" / "snap"
        eventually(lambda: len(list(snap.glob("*.snap"))) >= 3, what="three snapshots")
        index = only.call(lambda etcd: etcd.store.current_index)
        only.restart()
        assert only.call(lambda etcd: etcd.store.current_index) == index + 1    # its publication
        assert _http_keys(only, "GET", "/k0")[1]["node"]["value"] == "448"
        eventually(lambda: len(list(snap.glob("*.snap"))) <= 2, 60, "purge at start")


def _embed_open():
    """What a process owns: descriptors by what they are, threads, and locks of log files."""
    gc.collect()
    descriptors = []
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            descriptors.append(re.sub(r"\d+", "N", os.readlink(f"/proc/self/fd/{name}")))
    threads = [thread.name for thread in threading.enumerate()]
    return sorted(descriptors), sorted(threads), sorted(pyetcd._locked_paths)


def _raise_eio(*args, **named):
    raise OSError(errno.EIO, "Input/output error")


def _raise_bug(*args, **named):
    raise InvariantError("a bug made for this test")


def _fail_disk(server, patch):
    patch.setattr(pyetcd.OsDisk, "write", _raise_eio)
    server.call(lambda etcd: etcd.do(Request(method="PUT", path="/1/a", val="1"), print))


def _fail_sync_and_close(server, patch):
    def close(disk, handle):
        os.close(handle)
        _raise_eio()
    patch.setattr(pyetcd.OsDisk, "close", close)
    patch.setattr(pyetcd.OsDisk, "fdatasync", _raise_eio)
    server.call(lambda etcd: etcd.do(Request(method="PUT", path="/1/a", val="1"), print))


def _fail_reactor(server, patch):
    server._reactor.call_soon_threadsafe(_raise_bug)


def _fail_turn(server, patch):
    patch.setattr(pyetcd.EtcdServer, "_apply", _raise_bug)
    server.call(lambda etcd: etcd.do(Request(method="PUT", path="/1/a", val="1"), print))


def _fail_stop(server, patch):
    patch.setattr(pyetcd.Journal, "close", _raise_bug)
    server.stop()


@pytest.mark.parametrize("fail", [
    _fail_disk, _fail_sync_and_close, _fail_reactor, _fail_turn, _fail_stop,
])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_embed_failed_member_frees_all_and_starts_again(tmp_path, monkeypatch, fail):
    """Whatever ends a member, nothing of it is left in the process, not even before stop()."""
    directory, before = str(tmp_path / "a"), _embed_open()
    with monkeypatch.context() as patch:
        server = pyetcd.Server(data_dir=directory)
        server.start()
        assert server.wait_ready()
        with requests.get(server.client_urls[0] + "/v2/keys/?wait=true&stream=true", stream=True):
            fail(server, patch)
            assert server.wait() == 1
    assert _embed_open() == before
    server.stop()
    server.stop()
    with pyetcd.Server(data_dir=directory) as again:
        assert again.wait_ready()
    assert _embed_open() == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_embed_failed_member_of_a_cluster_closes_its_links(tmp_path, monkeypatch):
    """One of two, whose other never answers: streams, probes, and what a first life asks."""
    before = _embed_open()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(pyetcd, "PROBE_ANSWER_SECONDS", 0.05)
        server = pyetcd.Server(name="a", data_dir=str(tmp_path / "a"))
        server.bind()
        other = f"http://127.0.0.1:{silent.getsockname()[1]}"
        server.start(initial_cluster=f"a={server.peer_urls[0]},b={other}")
        monkeypatch.setattr(pyetcd, "PROBE_ANSWER_SECONDS", 5.0)
        eventually(lambda: server.call(lambda etcd: bool(server._data_loss_check._asked)))
        _fail_reactor(server, monkeypatch)
        assert server.wait() == 1
    assert _embed_open() == before


def _embed_blank_log(directory):
    """The log of a member that ended before its first write."""
    paths = pyetcd.prepare_data_dir(directory)
    cluster = Cluster.from_initial("t", {"a": ("http://127.0.0.1:1",)})
    (member,) = cluster.members
    Wal.create(paths.wal, pyetcd.encode_metadata(member, cluster.id)).close()


@pytest.mark.parametrize("name", [
    "pyetcd.bootstrap", "pyetcd.EtcdServer.__init__", "pyetcd.ClientApi.__init__",
    "pyetcd.PeerApi.__init__", "threading.Thread.start", "pyetcd._begin_again",
    "pyetcd.OsDisk.fsync_dir", "pyetcd.OsDisk.lock", "pyetcd.OsDisk.write",
    "pyetcd.Snapshotter.load", "pyetcd.decode_metadata", "pyetcd.Listener.start",
])
@pytest.mark.parametrize("past", [False, True], ids=["new", "restarted"])
def test_embed_start_that_fails_leaves_nothing(tmp_path, monkeypatch, name, past):
    """Neither ports nor log are kept, whichever step failed, and with whichever error."""
    directory, before = str(tmp_path / "a"), _embed_open()
    if past:
        _embed_blank_log(directory)
    owner, _, attribute = name.removeprefix("pyetcd.").rpartition(".")
    target = threading.Thread if owner == "threading.Thread" else (
        getattr(pyetcd, owner) if owner else pyetcd)
    settings = {"name": "a", "data_dir": directory, "initial_cluster_token": "t",
                "initial_advertise_peer_urls": ["http://127.0.0.1:1"],
                "initial_cluster": "a=http://127.0.0.1:1"}
    with monkeypatch.context() as patch:
        patch.setattr(target, attribute, _raise_bug)
        try:
            pyetcd.Server(**settings).__enter__().stop()
        except (pyetcd.StartError, InvariantError):
            assert _embed_open() == before
        else:
            assert name in ("pyetcd._begin_again", "pyetcd.Snapshotter.load",
                            "pyetcd.decode_metadata", "pyetcd.OsDisk.write",
                            "pyetcd.OsDisk.fsync_dir")      # it is not on this member's way
    with pyetcd.Server(**settings) as server:
        assert server.wait_ready()
    assert _embed_open() == before


def test_embed_refused_start_does_not_lock_the_log(tmp_path):
    """Flags that a half formed member cannot use: an error, and the next start has the log."""
    directory, before = str(tmp_path / "a"), _embed_open()
    _embed_blank_log(directory)
    server = pyetcd.Server(name="a", data_dir=directory, initial_cluster="b=http://127.0.0.1:1")
    with pytest.raises(pyetcd.StartError):
        server.start()
    assert _embed_open()[2] == before[2]
    server.stop()
    assert _embed_open() == before


def test_embed_failed_proxy_frees_all(tmp_path, monkeypatch):
    """A proxy that ends while requests wait for a member that never answers."""
    before = _embed_open()
    with pyetcd.Server(data_dir=str(tmp_path / "a")) as member:
        assert member.wait_ready()
        proxy = pyetcd.ProxyServer(data_dir=str(tmp_path / "p"),
                                   initial_cluster=f"a={member.peer_urls[0]}", proxy="on")
        proxy.start()
        with requests.get(proxy.client_urls[0] + "/v2/keys/?wait=true&stream=true",
                          stream=True) as watch:
            assert watch.status_code == 200
            proxy._reactor.call_soon_threadsafe(_raise_bug)
            assert proxy.wait() == 1
    assert _embed_open() == before


def test_cluster_embedded_members_form_a_cluster(tmp_path):
    """Three members inside this very process, on free ports, and a clean stop."""
    names = ("a", "b", "c")
    servers = {n: pyetcd.Server(name=n, data_dir=str(tmp_path / n)) for n in names}
    for server in servers.values():
        server.bind()
    initial = ",".join(f"{n}={s.peer_urls[0]}" for n, s in servers.items())
    try:
        for server in servers.values():
            server.start(initial_cluster=initial)
        assert all(server.wait_ready(20) for server in servers.values())
        url = servers["a"].client_urls[0]
        assert requests.put(url + "/v2/keys/x", data={"value": "y"}, timeout=5).status_code == 201
        for server in servers.values():
            other = server.client_urls[0]
            eventually(lambda u=other: requests.get(u + "/v2/keys/x", timeout=5).ok)
        lead = servers["a"].call(lambda etcd: etcd.lead)
        leader = next(s for s in servers.values() if s.call(lambda e: e.member_id) == lead)
        leader.kill()
        alive = next(s for s in servers.values() if s is not leader)

        def written():
            with contextlib.suppress(requests.RequestException):
                return requests.put(alive.client_urls[0] + "/v2/keys/x", data={"value": "z"},
                                    timeout=8).ok
        eventually(written, what="a write after the leader's death")
    finally:
        for server in servers.values():
            server.stop()
    names = {thread.name for thread in threading.enumerate()}
    assert "reactor" not in names and "wal" not in names


def test_cluster_first_write_follows_the_start_at_once():
    """A member that is alone leads without waiting for an election timeout."""
    with pyetcd.LocalMember(election_ms=50_000) as member:
        assert _http_keys(member, "PUT", "/a", "value=1")[0] == 201


def test_cluster_version_is_decided_while_a_member_is_away(tmp_path):
    """A quorum without its third member still gets a cluster version, the lowest possible."""
    cluster = StaticCluster(tmp_path, 3)
    with ended(*cluster.members):
        for member in cluster.members[:2]:
            cluster.start(member)
        for member in cluster.members[:2]:
            member.process.wait_log("set the initial cluster version to 2.2")


def test_server_failed_fsync_ends_the_member(tmp_path, monkeypatch):
    """Nobody knows which bytes are on disk then: no reply, no further write, exit code 1."""
    with pyetcd.Server(data_dir=str(tmp_path / "d")) as server:
        assert server.wait_ready()
        url = server.client_urls[0] + "/v2/keys/a"
        assert requests.put(url, data={"value": "1"}, timeout=5).status_code == 201

        def fail(disk, handle):
            raise OSError(errno.EIO, "Input/output error")
        monkeypatch.setattr(pyetcd.OsDisk, "fdatasync", fail)
        with pytest.raises(requests.RequestException):
            requests.put(url, data={"value": "2"}, timeout=5)
        assert server.wait() == 1


def test_server_full_disk_refuses_writes_until_there_is_space(tmp_path, monkeypatch):
    """Half a record was written: it is cut off, reads go on, and the next write finds space."""
    write = pyetcd.OsDisk.write

    def full(disk, handle, *pieces):
        data = b"".join(pieces)
        write(disk, handle, data[:len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def put(value, key="a"):
        return requests.put(f"{url}/{key}", data={"value": value}, timeout=20)

    with pyetcd.Server(data_dir=str(tmp_path / "d"), heartbeat_ms=20, election_ms=200) as server:
        assert server.wait_ready()
        url = server.client_urls[0] + "/v2/keys"
        assert put("1").status_code == 201
        with monkeypatch.context() as patch:
            patch.setattr(pyetcd.OsDisk, "write", full)
            first, second = put("2"), put("3", "b")
            assert (first.status_code, first.json()["errorCode"]) == (500, 300)
            assert "no space left on device" in first.json()["cause"]
            assert "may still be made" in first.json()["cause"]
            assert second.status_code == 500
            assert "nothing was changed" in second.json()["cause"]
            assert requests.get(url + "/a", timeout=5).json()["node"]["value"] == "1"
            health = requests.get(server.client_urls[0] + "/health", timeout=5)
            assert health.status_code == 503 and health.json()["health"] == "false"
            added = requests.post(server.client_urls[0] + "/v2/members", timeout=5,
                                  json={"peerURLs": ["http://127.0.0.1:9"]})
            assert added.status_code == 500
        eventually(lambda: put("4", "c").status_code == 201, what="a write when there is space")
        assert requests.get(url + "/a", timeout=5).json()["node"]["value"] == "2"
        assert requests.get(url + "/b", timeout=5).status_code == 404
    with pyetcd.Server(data_dir=str(tmp_path / "d")) as server:
        values = requests.get(server.client_urls[0] + "/v2/keys", timeout=5).json()["node"]["nodes"]
        assert {node["key"]: node["value"] for node in values} == {"/a": "2", "/c": "4"}


def test_server_keeps_descriptors_for_files_and_peers(tmp_path):
    """Connections beyond get 503 or are closed; snapshots, writes and peers go on meanwhile."""
    if not hasattr(resource, "prlimit"):
        pytest.skip("no other process can be given a limit without Linux's prlimit")
    with StaticCluster(tmp_path, 1, "-snapshot-count", "20") as cluster, (
        contextlib.ExitStack()
    ) as stack, requests.Session() as session:
        (only,) = cluster.members
        url = only.client + "/v2/keys/a"
        assert session.put(url, {"value": "1"}, timeout=10).status_code == 201
        resource.prlimit(only.process.popen.pid, resource.RLIMIT_NOFILE, (256, 256))
        address = ("127.0.0.1", urllib.parse.urlsplit(only.client).port)
        idle = [stack.enter_context(socket.create_connection(address)) for _ in range(400)]
        only.process.wait_log("too many open files (192) for more connections to " + only.client)
        eventually(lambda: any(
            sock.recv(12) == b"HTTP/1.1 503" for sock in idle if _is_readable(sock)))
        for number in range(60):
            answer = session.put(url, {"value": str(number)}, timeout=10)
            assert answer.status_code == 200
        only.process.wait_log("saved snapshot at index")
        assert requests.get(only.peer + "/version", timeout=10).status_code == 200
        user = {"user": "root", "password": "x"}
        assert session.put(only.client + "/v2/auth/users/root", json.dumps(user),
                           timeout=20).status_code == 201, "its hash takes a process"
        stack.close()
        eventually(lambda: only.value("a") == "59", what="room for a new connection")
        assert only.process.popen.poll() is None


def _is_readable(sock):
    return bool(select.select([sock], [], [], 0)[0])


def test_server_says_why_it_ends_when_its_directory_is_gone(tmp_path):
    """Renamed while the member runs: the next file of its log or a snapshot cannot be made."""
    with StaticCluster(tmp_path, 1, "-snapshot-count", "5") as cluster:
        (only,) = cluster.members
        assert only.put("a", "1")[0] == 201
        os.rename(tmp_path / "n0.etcd", tmp_path / "elsewhere")

        def ended():
            only.put("a", "2")
            return only.process.popen.poll() is not None
        eventually(ended)
        assert only.process.popen.returncode == 1
        assert re.search("the member ends: .*was the data directory renamed or removed",
                         only.process.log())


def test_server_unit_files_allow_our_own_limit_of_connections():
    """And the descriptors that are kept for files and calls."""
    limits = [
        int(limit) for path in (Path(pyetcd.__file__).parent / "contrib").iterdir()
        if path.is_file() for limit in re.findall(r"LimitNOFILE=(\d+)", path.read_text())
    ]
    assert len(limits) == 3
    assert min(limits) >= pyetcd.CONNECTIONS_MAX + pyetcd.DESCRIPTORS_KEPT


def test_server_full_disk_does_not_keep_it_from_stopping(tmp_path, monkeypatch):
    """What waits for space was never acknowledged: it is given up."""
    def full(disk, handle, *pieces):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pyetcd.Server(data_dir=str(tmp_path / "d")) as server:
        assert server.wait_ready()
        monkeypatch.setattr(pyetcd.OsDisk, "write", full)
        url = server.client_urls[0] + "/v2/keys/a"
        answer = requests.put(url, data={"value": "1"}, timeout=20)
        assert "disk quota exceeded" in answer.json()["cause"]
        server.stop()
        assert server.wait() == 0


def test_cluster_proposals_of_peers_wait_for_a_leader_only_so_long(tmp_path):
    """Without one they are dropped when their client has given up."""
    server = pyetcd.Server(name="a", data_dir=str(tmp_path / "a"), heartbeat_ms=20, election_ms=100)
    server.bind()
    server.start(initial_cluster=f"a={server.peer_urls[0]},b=http://127.0.0.1:{free_port()}")
    try:
        def receive(etcd):
            other = next(id for id in etcd.cluster.members if id != etcd.member_id)
            etcd._deliver(Message(
                MsgType.PROP, to=etcd.member_id, sender=other, entries=[Entry(data=b"x")]))
            return len(etcd._late_proposals)

        eventually(lambda: server.call(lambda etcd: len(etcd.node.raft.voters)) == 2)
        assert server.call(receive) == 1
        eventually(lambda: server.call(lambda etcd: not etcd._late_proposals))
    finally:
        server.stop()


def test_cluster_leader_hands_over_when_it_is_stopped(tmp_path):
    """SIGTERM: the next leader is elected before the old one ends, and no write fails."""
    with StaticCluster(tmp_path) as cluster:
        old = cluster.leader()
        follower = next(member for member in cluster.members if member is not old)
        statuses, ended = [], threading.Event()

        def write():
            while not ended.is_set():
                answer = follower.put("k", str(len(statuses)))
                statuses.append(answer and answer[0])

        writer = threading.Thread(target=write)
        writer.start()
        eventually(lambda: len(statuses) > 20)
        assert old.process.kill(signal.SIGTERM) == -signal.SIGTERM
        so_far = len(statuses)
        eventually(lambda: len(statuses) > so_far + 20)
        ended.set()
        writer.join()
        assert set(statuses) <= {200, 201}
        log = old.process.log()
        assert "leadership transfer" in log
        assert re.search(r"changed leader from \w+ to \w+ at term", log) or (
            "lost leader" in log and "elected leader" in log.partition("transfer")[2])
