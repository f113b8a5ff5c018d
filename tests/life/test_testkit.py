"""Testing aid: members that a test kills, freezes and cuts off."""

from __future__ import annotations

import ast
import contextlib
import gc
import http.client
import http.server
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

import pyetcd
from pyetcd import Message, MsgType, ProgressState, RaftRole
from tests.kit.basics import ROOT, eventually, manual_code, open_files
from tests.kit.http import _http_ask, _http_keys, _HttpSocket
from tests.kit.processes import copy_module


def _aid_put(member, key, value):
    """Write a key through a member; fails unless it is acknowledged."""
    status, _ = _http_keys(member, "PUT", "/" + key, "value=" + value)
    assert status in (200, 201)


def _aid_value(member, key):
    """What a member has of a key; None: nothing."""
    return member.call(lambda etcd: _aid_stored(etcd, key))


def _aid_stored(etcd, key):
    try:
        return etcd.store.get("/1/" + key, now_ns=0).node.value
    except pyetcd.KeyNotFound:
        return None


def _aid_files(directory):
    return {path: path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def _aid_links(member):
    """How many links to other members are up, as the member sees it."""
    return member.call(lambda etcd: sum(
        etcd.transport.active_since(id) > 0 for id in etcd.cluster.members))


def _aid_others(cluster, member):
    return [other for other in cluster.members if other is not member]


def test_aid_member_keeps_its_urls_and_data_over_a_kill():
    with pyetcd.LocalMember() as member:
        urls, id = (member.client_url, member.peer_url), member.id
        _aid_put(member, "a", "1")
        member.kill()
        assert not member.is_running
        with pytest.raises(ConnectionRefusedError):
            _http_ask(member, "GET", "/version")
        member.start()
        assert (member.client_url, member.peer_url) == urls and member.id == id
        assert _http_keys(member, "GET", "/a")[1]["node"]["value"] == "1"


def test_aid_port_of_a_member_that_is_down_is_kept_for_it():
    """Nobody gets it who asks for any port, or for this one."""
    if os.environ.get("PYETCD_TEST_SYSTEM") == "macos":
        pytest.skip("there a port has one socket, and is not kept")
    with pyetcd.LocalMember() as member:
        port = urllib.parse.urlsplit(member.client_url).port
        member.kill()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        member.start()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)     # closed ones linger
        other.bind(("127.0.0.1", port))


def test_aid_killed_member_writes_nothing_more_and_has_lost_nothing(tmp_path):
    """Killed under load, again and again: what was acknowledged is there, in the files too."""
    acknowledged, ended = set(), threading.Event()
    with pyetcd.LocalMember("m", str(tmp_path)) as member:
        def write(number):
            for count in itertools.count():
                if ended.is_set():
                    return
                with contextlib.suppress(OSError, http.client.HTTPException):
                    _aid_put(member, f"{number}-{count}", "v")
                    acknowledged.add(f"{number}-{count}")

        writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for writer in writers:
            writer.start()
        for _ in range(3):
            before = len(acknowledged)
            eventually(lambda n=before: len(acknowledged) > n + 30)
            member.kill()
            files = _aid_files(tmp_path)
            with pyetcd.LocalMember() as other:         # goes on while the other one is dead
                _aid_put(other, "a", "1")
            assert _aid_files(tmp_path) == files
            member.restart()
        ended.set()
        for writer in writers:
            writer.join()
        missing = {key for key in acknowledged if _aid_value(member, key) is None}
    assert not missing and len(acknowledged) > 90


def test_aid_temporary_directory_is_removed_and_a_given_one_stays(tmp_path):
    with pyetcd.LocalMember() as member, pyetcd.LocalMember("kept", str(tmp_path)):
        data_dir = Path(member.call(lambda etcd: etcd.config.data_dir))
        assert data_dir.is_dir()
    assert not data_dir.parent.exists()
    assert (tmp_path / "kept" / "member" / "wal").is_dir()


def test_aid_closed_member_can_start_afresh():
    member = pyetcd.LocalMember()
    for _ in range(2):
        with member:
            assert _aid_value(member, "a") is None
            _aid_put(member, "a", "1")
    assert repr(member) == "<etcd1  down>"


def test_aid_paused_member_takes_connections_and_answers_after_resume():
    with pyetcd.LocalCluster(3) as cluster:
        paused = cluster.leader()
        term = paused.leading_term()
        paused.pause()
        assert paused.is_paused and paused.is_running
        with _HttpSocket(paused) as client:
            client.socket.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
            leader = cluster.wait_leader()
            assert leader is not paused and leader.leading_term() > term
            client.socket.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.socket.recv(1)
            _aid_put(leader, "a", "1")
            assert _aid_value(paused, "a") is None
            paused.resume()
            client.socket.settimeout(10)
            assert client.socket.recv(100).startswith(b"HTTP/1.1 200")
        eventually(lambda: _aid_value(paused, "a") == "1")
        assert cluster.leader() is leader


@pytest.mark.parametrize("end", ["kill", "stop", "close"])
def test_aid_paused_member_can_be_ended(end):
    with pyetcd.LocalMember() as member:
        _aid_put(member, "a", "1")
        member.pause()
        member.pause()
        getattr(member, end)()
        assert not member.is_running and not member.is_paused
        if end != "close":
            member.start()
            assert _aid_value(member, "a") == "1"


def test_aid_first_leader_is_elected_at_once():
    """In the first election of a cluster, without anybody's timeout: the last member's."""
    with pyetcd.LocalCluster(3, heartbeat_ms=1_000, election_ms=40_000) as cluster:
        assert cluster.leader() is cluster.members[-1]
        assert cluster.leader().leading_term() == 2


def test_aid_first_election_is_begun_again_where_the_candidate_was_no_voter_yet(monkeypatch):
    """A member that has not applied the first entries of its log ignores that it should lead."""
    campaign, ignored = pyetcd.RawNode.campaign, []

    def ignore_first(node):
        if ignored:
            campaign(node)
        ignored.append(node)

    monkeypatch.setattr(pyetcd.RawNode, "campaign", ignore_first)
    with pyetcd.LocalCluster(3, heartbeat_ms=1_000, election_ms=40_000) as cluster:
        assert cluster.leader() is cluster.members[-1]


def test_aid_members_are_known_to_all_when_the_cluster_is_ready():
    """And nothing of the start is left to do: the index stays where it is."""
    with pyetcd.LocalCluster(3) as cluster:
        body = json.loads(_http_ask(cluster.leader(), "GET", "/v2/members")[2])
        listed = {(m["id"], m["name"], *m["clientURLs"]) for m in body["members"]}
        assert listed == {(m.id, m.name, m.client_url) for m in cluster.members}
        version = json.loads(_http_ask(cluster.members[0], "GET", "/version")[2])
        assert version["etcdcluster"].startswith("2.3")
        assert cluster.client_urls == tuple(m.client_url for m in cluster.members)


def test_aid_publication_that_was_lost_is_made_again():
    with pyetcd.LocalMember() as member:
        def lose(etcd):
            etcd.publication._is_applied = False
            member._server._ready.clear()

        member.call(lose)
        assert not member.call(member._server.is_ready)
        member.wait_ready()


def test_aid_cluster_goes_on_without_its_leader():
    with pyetcd.LocalCluster(3) as cluster:
        old = cluster.leader()
        old.kill()
        assert cluster.leader() is not old
        new = cluster.wait_leader()
        _aid_put(new, "a", "1")
        old.restart()
        assert _aid_value(old, "a") == "1"
        for member in cluster.members:
            member.kill()
        assert cluster.leader() is None
        cluster.start()
        assert [_aid_value(member, "a") for member in cluster.members] == ["1"] * 3


def test_aid_minority_of_a_partition_neither_writes_nor_hears():
    """The old leader at first believes it leads; clients reach it, the others' links are closed."""
    with pyetcd.LocalCluster(3) as cluster:
        old = cluster.leader()
        others = _aid_others(cluster, old)
        assert all(_aid_links(member) == 2 for member in cluster.members)
        cluster.partition([old])
        assert _aid_links(old) == 0 and all(_aid_links(member) == 1 for member in others)
        assert cluster.leader() is old
        with _HttpSocket(old) as client:
            client.socket.sendall(b"PUT /v2/keys/b?value=1 HTTP/1.1\r\nHost: x\r\n\r\n")
            new = cluster.wait_leader(among=others)
            assert cluster.leader() is new
            _aid_put(new, "a", "1")
            assert _http_keys(old, "GET", "/a")[0] == 404
            assert all(_aid_value(member, "b") is None for member in cluster.members)
            cluster.heal()
            eventually(lambda: _aid_value(old, "a") == "1")
        eventually(lambda: all(_aid_links(member) == 2 for member in cluster.members))
        _aid_put(old, "c", "1")


def test_aid_partition_holds_over_a_restart_and_is_replaced_by_the_next():
    with pyetcd.LocalCluster(3) as cluster:
        first, second, third = cluster.members
        cluster.partition([first], [second, third])
        leader = cluster.wait_leader(among=[second, third])
        first.restart(timeout_s=0)
        _aid_put(leader, "a", "1")
        eventually(lambda: first.call(lambda etcd: etcd.node.raft.role != RaftRole.FOLLOWER))
        assert _aid_value(first, "a") is None and _aid_links(first) == 0
        cluster.partition([second])
        first.wait_ready()
        assert _aid_value(first, "a") == "1"
        assert cluster.wait_leader(among=[first, third])
        assert _aid_links(second) == 0


def test_aid_partition_into_single_members_has_no_leader_to_offer():
    with pyetcd.LocalCluster(3) as cluster:
        first, second, _ = cluster.members
        leader = cluster.leader()               # of itself, it steps down in the partition
        cluster.partition([first], [second])
        leader.kill()
        said = rf"no leader after 0.3 s: \[<etcd1 {first.client_url} .+>, <etcd2 .+>, <etcd3 .+>\]"
        with pytest.raises(TimeoutError, match=said) as caught:
            cluster.wait_leader(0.3)
        states = str(caught.value)
        assert (states.count(" down>"), len(re.findall(r" at term \d+>", states))) == (1, 2)
        with pytest.raises(TimeoutError, match=f"{leader.name} is not ready after 0.1 s: .+ at"):
            leader.start(0.1)


def test_aid_messages_cut_one_way_still_pass_the_other_way():
    """A follower that hears nothing of its leader, but is heard."""
    with pyetcd.LocalCluster(3) as cluster:
        leader = cluster.leader()
        deaf, other = _aid_others(cluster, leader)
        cluster.cut(leader, deaf)
        _aid_put(leader, "a", "1")
        eventually(lambda: _aid_value(other, "a") == "1")
        eventually(lambda: deaf.call(lambda etcd: etcd.lead == 0))
        assert _aid_value(deaf, "a") is None
        assert _aid_links(leader) == 2          # what the deaf one sends to it keeps coming
        heard = leader.call(lambda etcd: etcd.traffic.received_bytes[deaf.member_id])
        eventually(lambda: leader.call(
            lambda etcd: etcd.traffic.received_bytes[deaf.member_id]) > heard)
        cluster.heal()
        eventually(lambda: _aid_value(deaf, "a") == "1")


def test_aid_snapshot_that_is_cut_off_counts_as_failed():
    """Otherwise the leader would wait for its fate after heal()."""
    with pyetcd.LocalCluster(3) as cluster:
        leader = cluster.leader()
        lagging = _aid_others(cluster, leader)[0]
        cluster.partition([lagging])

        def send(etcd):
            progress = etcd.node.raft.progress[lagging.member_id]
            progress.become_snapshot(1)
            etcd.transport.offer([Message(MsgType.SNAP, to=lagging.member_id)])
            return progress

        progress = leader.call(send)
        eventually(lambda: leader.call(lambda etcd: progress.state != ProgressState.SNAPSHOT))


def test_aid_misuse_is_refused():
    with pyetcd.LocalCluster(2) as cluster, pyetcd.LocalMember() as stranger:
        first, second = cluster.members
        with pytest.raises(ValueError, match="a member is in two groups"):
            cluster.partition([first], [second, first])
        with pytest.raises(ValueError):
            cluster.cut(first, stranger)
        second.stop()
        with pytest.raises(pyetcd.ServerStopped):
            second.pause()
        with pytest.raises(pyetcd.ServerStopped):
            second.wait_ready()
        second.resume()
        first.start()                                   # it runs: nothing happens
        assert first.id and not second.is_running


def test_aid_start_that_fails_gives_everything_back(tmp_path):
    (tmp_path / "etcd1").write_text("in the way")
    threads, files = set(threading.enumerate()), set(open_files())
    with pytest.raises(pyetcd.StartError), pyetcd.LocalMember(directory=str(tmp_path)):
        pass
    with pytest.raises(pyetcd.StartError), pyetcd.LocalCluster(2, str(tmp_path)):
        pass
    assert set(threading.enumerate()) <= threads
    gc.collect()                                    # a reactor keeps one descriptor to its end
    assert set(open_files()) <= files


@pytest.mark.parametrize("make", [pyetcd.Server, pyetcd.ProxyServer, pyetcd.LocalMember,
                                  pyetcd.LocalCluster, pyetcd.ClusterFactory.__call__])
def test_settings_that_do_not_exist_are_a_type_error_with_the_word(make, tmp_path_factory):
    """Before anything is opened; whoever embeds a member learns which word is wrong."""
    if make is pyetcd.ClusterFactory.__call__:
        make = pyetcd.ClusterFactory(tmp_path_factory, contextlib.ExitStack())
    files = set(open_files())
    with pytest.raises(TypeError, match="^there is no setting nosuch$"):
        make(nosuch=1)
    with pytest.raises(TypeError, match="^there is no setting data; did you mean data_dir[?]$"):
        make(election_ms=200, data="x")
    with pytest.raises(TypeError, match="no setting _replace$"):
        make(_replace=1)
    for name in ("listen_client_urls", "cors"):
        with pytest.raises(TypeError, match=f"^{name} is a list, not one string$"):
            make(**{name: "http://127.0.0.1:0"})
    with pytest.raises(ValueError, match="nohost"):
        make(listen_peer_urls=["nohost"])
    assert set(open_files()) <= files


def test_settings_for_type_checkers_are_the_fields_of_the_configuration():
    """A name more, a name less or another type would mislead whoever trusts a checker."""
    source = ROOT / "src" / "pyetcd" / "member" / "configuration.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    fields = {node.name: {line.target.id: ast.unparse(line.annotation) for line in node.body
                          if isinstance(line, ast.AnnAssign)}
              for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert tuple(fields["ServerConfig"]) == pyetcd.ServerConfig._fields
    wanted = {name: kind.replace("Tuple[str, ...]", "Sequence[str]")
              for name, kind in fields["ServerConfig"].items()}
    assert {**fields["ServerSettings"], **fields["MemberSettings"]} == wanted
    assert list(fields["ServerSettings"]) == ["name"]


# -- the fixtures, in a pytest of their own

_AID_TESTS = """
import logging, threading, urllib.request, pytest

def put(member, key):
    url = f"{member.client_url}/v2/keys/{key}"
    urllib.request.urlopen(urllib.request.Request(url, b"value=1", method="PUT"), timeout=10)

def test_server(etcd_server, tmp_path):
    put(etcd_server, "a")
    assert not list(tmp_path.iterdir())

def test_cluster(etcd_cluster, etcd_server):
    assert len(etcd_cluster.members) == 3
    etcd_cluster.leader().kill()
    put(etcd_cluster.wait_leader(), "a")

def test_factory(etcd_cluster_factory):
    one, two = etcd_cluster_factory(1), etcd_cluster_factory(2, snapshot_count=7)
    assert two.members[0].call(lambda etcd: etcd.config.snapshot_count) == 7
    put(one.members[0], "a")

def test_that_fails(etcd_cluster):
    put(etcd_cluster.leader(), "a")
    assert 0, "on purpose"

def test_nothing_is_left():
    assert logging.getLogger("pyetcd").level == logging.NOTSET
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("reactor", "wal"))]
"""


def _aid_examples():
    """The Python examples of the manual on testing: tests, and programs."""
    shown = manual_code("README") + manual_code("testing", "Fixtures")
    return ([example for example in shown if "def test_" in example],
            manual_code("testing", "Without pytest"))


def _aid_project(path):
    """A project with the tests above, beside this checkout's module as pip would install it."""
    info = path / "site" / "pyetcd_server-0.dist-info"
    info.mkdir(parents=True)
    copy_module(pyetcd, path / "site")
    shutil.copy(ROOT / "pyetcd_pytest.py", path / "site")
    project = (ROOT / "pyproject.toml").read_text()
    entry = re.search(r'^\[project.entry-points.pytest11\]\npyetcd = "(\S+)"', project, re.M)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pyetcd-server\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[pytest11]\npyetcd = {entry[1]}\n")
    (info / "RECORD").write_text("pyetcd.py,,\n")
    (path / "pytest.ini").write_text("[pytest]\n")
    (path / "test_it.py").write_text(_AID_TESTS)
    (path / "test_manual.py").write_text("\n".join(_aid_examples()[0]))


def _aid_python(path, *arguments):
    """Run Python with `path`'s pyetcd; warnings are errors.  Return (exit code, output)."""
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTEST_ADDOPTS": "",
                   "PYTHONDONTWRITEBYTECODE": ""}       # compile once, not in every process
    result = subprocess.run(
        [sys.executable, "-W", "error", *arguments], cwd=str(path.parent), text=True, timeout=90,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, env=environment)
    return result.returncode, result.stdout


@pytest.fixture(scope="module", name="_aid_output")
def _aid_output_fixture(tmp_path_factory):
    """What pytest says of such a project, in two processes."""
    path = tmp_path_factory.mktemp("aid")
    _aid_project(path)
    code, output = _aid_python(
        path / "site", "-m", "pytest", "-v", "-p", "no:cacheprovider", "-n", "2", "-W", "error",
        "--assert=plain")       # each of the two would rewrite all of pyetcd.py
    assert code == 1, output
    return output


def test_aid_fixtures_work_and_show_the_log_of_a_test_that_fails(_aid_output):
    assert "1 failed" in _aid_output and "AssertionError: on purpose" in _aid_output
    assert len(re.findall(r"PASSED \S*test_it.py::", _aid_output)) == 4
    assert "INFO     pyetcd.raft:pyetcd.py:" in _aid_output
    assert re.search(r"became leader at term \d", _aid_output)
    assert _aid_output.count("newRaft") == 3            # and not those of the other tests


def test_aid_examples_of_the_manual_run(_aid_output):
    """Tests with pytest, the others as a program that has none."""
    tests, programs = _aid_examples()
    count = sum(example.count("def test_") for example in tests)
    assert count > 3 and programs
    assert len(re.findall(r"PASSED \S*test_manual.py::", _aid_output)) == count, _aid_output
    program = "\n".join([*programs, "import sys", "assert 'pytest' not in sys.modules"])
    code, output = _aid_python(ROOT, "-c", program)
    assert code == 0, output
    assert re.fullmatch(r"http://127.0.0.1:\d+\netcd[123]\n", output)


def test_aid_examples_of_embedding_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(manual_code("testing", "Embedding"))
    exec(compile(code, "testing.md", "exec"), {})
    assert re.fullmatch(r"http://127.0.0.1:\d+\n", capsys.readouterr().out)
    assert sorted(os.listdir(tmp_path)) == ["a.etcd", "b.etcd", "c.etcd", "one.etcd"]


@pytest.mark.parametrize("is_loaded", [True, False], ids=["loaded", "left out"])
def test_aid_plugin_costs_nothing_where_no_test_uses_it(tmp_path, is_loaded):
    """The module of the fixtures imports nothing that pytest has not; `-p no:pyetcd` works too."""
    _aid_project(tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import sys\ndef test_it():\n    assert 'pyetcd' not in sys.modules\n"
        f"    assert ('pyetcd_pytest' in sys.modules) is {is_loaded}\n")
    words = [] if is_loaded else ["-p", "no:pyetcd"]
    code, output = _aid_python(tmp_path / "site", "-m", "pytest", "-p", "no:cacheprovider", *words,
                               "-n", "0", "test_it.py")
    assert code == 0, output


def test_aid_fixtures_work_where_both_files_are_copied(tmp_path):
    """No installation: conftest.py names the plugin, or the class of before."""
    copy_module(pyetcd, tmp_path)
    shutil.copy(ROOT / "pyetcd_pytest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text("def test_it(etcd_server):\n    assert etcd_server.id\n")
    for line in ("pytest_plugins = ['pyetcd_pytest']", "from pyetcd import PytestPlugin\n"
                 "def pytest_configure(config):\n    PytestPlugin.pytest_configure(config)"):
        (tmp_path / "conftest.py").write_text(line + "\n")
        code, output = _aid_python(tmp_path, "-m", "pytest", "-p", "no:cacheprovider", "-p",
                                   "no:pyetcd", "-n", "0", "--assert=plain", str(tmp_path))
        assert code == 0, output


def test_embed_a_call_to_a_member_that_ends_meanwhile_is_told(tmp_path):
    """ServerStopped, and not an error of a queue; TimeoutError if it is only slow."""
    free = ["http://127.0.0.1:0"]
    with pyetcd.Server(data_dir=str(tmp_path / "d"), listen_client_urls=free,
                       listen_peer_urls=free) as server:
        assert server.wait_ready(10)
        entered, go_on = threading.Event(), threading.Event()
        server._reactor.call_soon_threadsafe(lambda: (entered.set(), go_on.wait(20)))
        entered.wait(10)
        with pytest.raises(TimeoutError, match="within 0.05 s"):
            server.call(lambda etcd: 1, timeout_s=0.05)
        go_on.set()

        entered.clear()
        go_on.clear()
        server._reactor.call_soon_threadsafe(
            lambda: (entered.set(), go_on.wait(20), server._reactor._posted.clear()))
        entered.wait(10)
        server._reactor.stop()
        threading.Timer(0.2, go_on.set).start()
        with pytest.raises(pyetcd.ServerStopped):
            server.call(lambda etcd: 1, timeout_s=10)
