"""Programs that start an `etcd`, or want one: with pyetcd under that name on PATH.

The page docs/programs.md has a command line for each.  A program that is not installed here is
skipped; conftool and kombu come with the extra `test`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Iterator

import pytest
import requests

import pyetcd
import pyetcd_client
from tests.kit.basics import eventually, free_port
from tests.kit.http import _http_keys
from tests.kit.processes import ClusterMember, Process, compiled, ended

_HELPERS = {"etcd": pyetcd, "etcdctl": pyetcd_client}
_CTDB_LOCK = Path("/usr/libexec/ctdb/ctdb_etcd_lock")       # Debian: ctdb


@pytest.fixture(name="programs_path")
def _programs_path(tmp_path: Path) -> str:
    """A PATH on which pyetcd is `etcd` and pyetcdctl is `etcdctl`, compiled before."""
    for name, module in _HELPERS.items():
        _script(tmp_path / "bin" / name, f'exec "{sys.executable}" "{compiled(module)}" "$@"')
    return f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(name="programs_server")
def _programs_server() -> Iterator[pyetcd.LocalMember]:
    with pyetcd.LocalMember() as member:
        yield member


def _script(path: Path, line: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def _run(words: Any, path: str, *, timeout_s: float = 300.0, **environ: str) -> str:
    """Run a program to its end, with that PATH; return what it prints."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ETCD")}
    done = subprocess.run(
        list(map(str, words)), env={**clean, "PATH": path, **environ}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def _python(directory: Path, program: str, path: str, *words: object, **environ: str) -> str:
    """Run a Python program with this interpreter."""
    file = directory / "program.py"
    file.write_text(textwrap.dedent(program))
    return _run([sys.executable, file, *words], path, **environ)


# -- what a program sees that starts an `etcd` ---------------------------------------


@pytest.mark.parametrize("pattern", [
    r"etcd Version: (\d+\.)+\d+",
    r"^etcd Version: (.*?)$",
    r"etcd Version: (?P<version>.*?)\nGit SHA: (?P<sha>.*?)\nGo Version: (?P<go>.*?)\n"
    r"Go OS/Arch: (?P<arch>.*?)\n",
    r"etcd Version: ([0-9]+\.[0-9]+\.[0-9]+)",
    r"(?i)etcd version:? v?(\d+)\.(\d+)\.(\d+)",
], ids=range(5))
@pytest.mark.parametrize("flag", ["--version", "-version"])
def test_programs_read_the_version(flag: str, pattern: str) -> None:
    """By the expressions of process scanners, Ansible roles and installers."""
    assert re.search(pattern, _version_told(flag), re.M)


@functools.cache
def _version_told(flag: str) -> str:
    return _run([*Process.program, flag], os.environ["PATH"])


def test_programs_that_name_no_initial_cluster_get_a_member(tmp_path: Path) -> None:
    """As Wikimedia's conftool starts it; a write after the line `ready to serve` succeeds."""
    member = ClusterMember(tmp_path, "test-node")
    process = Process(tmp_path, "-enable-v2", "-data-dir", str(tmp_path / "d"), *member.flags())
    member.process = process
    try:
        process.wait_log("etcd: ready to serve client requests")
        assert requests.put(member.client + "/v2/keys/a", {"value": "1"},
                            timeout=60).status_code == 201
        assert process.log().index("published {Name") < process.log().index("ready to serve")
        (found,) = requests.get(member.client + "/v2/members", timeout=60).json()["members"]
        assert (found["name"], found["peerURLs"]) == ("test-node", [member.peer])
    finally:
        assert process.kill(signal.SIGTERM) == -signal.SIGTERM


def test_programs_are_told_once_that_it_is_ready(tmp_path: Path) -> None:
    """Not before there is a quorum, and not again when the leader changes."""
    pair = [ClusterMember(tmp_path, name) for name in ("a", "b")]
    initial = ",".join(f"{member.name}={member.peer}" for member in pair)
    with ended(*pair):
        pair[0].start("-initial-cluster", initial)
        pair[0].process.wait_log("listening for client requests on")
        eventually(lambda: pair[0].request("GET", "/version"), what="an answer")
        assert "ready to serve" not in pair[0].process.log()
        pair[1].start("-initial-cluster", initial)
        for member in pair:
            member.process.wait_log("ready to serve client requests")
        pair[1].process.kill()
        pair[1].start("-initial-cluster", initial)
        pair[1].process.wait_log("ready to serve client requests")
        assert pair[0].process.log().count("ready to serve") == 1


def test_programs_start_it_with_a_data_directory_alone(tmp_path: Path, programs_path: str) -> None:
    """As Patroni's own tests do.  In a network of its own: the ports are 2379 and 4001."""
    alone = ["unshare", "-rn", "sh", "-c"]
    if shutil.which("ip") is None or subprocess.run([*alone, "ip link set lo up"],
                                                    check=False).returncode:
        pytest.skip("no network namespace can be made here")
    output = _run([*alone, """
        ip link set lo up
        : >"$0.log"
        etcd --enable-v2=true --data-dir "$0" 2>"$0.log" & etcd=$!
        until grep -q "ready to serve client requests" "$0.log"; do
            kill -0 $etcd || { cat "$0.log"; exit 1; }
            sleep 0.05
        done
        etcdctl set /a 1; etcdctl --endpoints http://localhost:4001 get /a
        kill $etcd; wait $etcd; echo $?
        """, str(tmp_path / "data")], programs_path)
    words = output.split()              # the shell may tell of the signal, too
    assert words[:2] == ["1", "1"] and words[-1] == "143"


# -- programs of others ----------------------------------------------------------------


_CONFTOOL = """
    import socket, sys, time, unittest
    from conftool.tests import integration

    class Helper(integration.EtcdProcessHelper):
        def __init__(self, directory, **named):         # its ports are fixed; they may be taken
            ports = {"port": int(sys.argv[1]), "internal_port": int(sys.argv[2])}
            super().__init__(directory, **{**named, **ports})

        def run(self, proc_args=None):                  # it waits for two seconds
            super().run(proc_args)
            while self.proc.poll() is None:
                try:
                    return socket.create_connection(("127.0.0.1", self.port)).close()
                except OSError:
                    time.sleep(0.05)

    integration.EtcdProcessHelper = Helper
    integration.IntegrationTestBase.fixture_dir = sys.argv[3]
    names = ["conftool.tests.integration.test_driver_etcd", "conftool.tests.unit.test_driver_etcd"]
    tests = unittest.defaultTestLoader.loadTestsFromNames(names)
    result = unittest.TextTestRunner(stream=sys.stdout).run(tests)
    sys.exit(not result.wasSuccessful())
"""


def test_programs_conftool_passes_its_own_driver_tests(tmp_path: Path, programs_path: str) -> None:
    """It starts `etcd` itself."""
    pytest.importorskip("conftool", reason="conftool is not installed")
    port, peer_port = free_port(), free_port()
    (tmp_path / "etcd_testrc").write_text(json.dumps(
        {"host": "127.0.0.1", "port": port, "protocol": "http"}))
    output = _python(tmp_path, _CONFTOOL, programs_path, port, peer_port, tmp_path)
    assert re.search(r"Ran [3-9]\d tests", output) and "skipped" not in output


def test_programs_kombu_sends_messages(programs_server: pyetcd.LocalMember) -> None:
    kombu = pytest.importorskip("kombu", reason="kombu is not installed")
    pytest.importorskip("etcd", reason="python-etcd is not installed")
    url = programs_server.client_url.replace("http:", "etcd:")
    with kombu.Connection(url, transport_options={"polling_interval": 0.05}) as connection:
        with connection.SimpleQueue("jobs") as queue:
            for number in range(3):
                queue.put({"number": number})
            assert queue.qsize() == 3
            messages = [queue.get(timeout=60) for _ in range(3)]
            for message in messages:
                message.ack()
            assert sorted(message.payload["number"] for message in messages) == [0, 1, 2]
            with pytest.raises(queue.Empty):
                queue.get_nowait()


def test_programs_ansible_looks_keys_up(
    programs_server: pyetcd.LocalMember, tmp_path: Path
) -> None:
    lookup = "ansible_collections.community.general.plugins.lookup.etcd"
    if shutil.which("ansible") is None or not _is_there(lookup):
        pytest.skip("ansible with the collection community.general is not installed")
    _http_keys(programs_server, "PUT", "/conf/port", "value=80")
    _http_keys(programs_server, "PUT", "/conf/db/host", "value=db1")
    question = f"'community.general.etcd', 'conf', version='v2', url='{programs_server.client_url}'"
    output = _run(["ansible", "localhost", "-m", "debug", "-a",
                   f"msg={{{{ lookup({question}) | to_json }}}}"], os.environ["PATH"],
                  ANSIBLE_HOME=str(tmp_path), ANSIBLE_NOCOLOR="1")
    found = output.replace("\\", "")
    assert '"port": "80"' in found and '"host": "db1"' in found


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:                     # of the package above it
        return False


_SALT = """
    import sys
    import salt.modules.etcd_mod as etcd
    from salt.utils.etcd_util import get_conn

    etcd.__opts__ = {"p": {"etcd.host": sys.argv[1], "etcd.port": int(sys.argv[2])}}
    etcd.__utils__ = {"etcd_util.get_conn": get_conn}
    assert etcd.get_("/conf", recurse=True, profile="p") is None
    assert etcd.set_("/conf/a", "1", profile="p") == "1"
    etcd.update({"b": "2", "c": {"d": "3"}}, path="/conf", profile="p")
    assert etcd.get_("/conf/c/d", profile="p") == "3"
    assert etcd.ls_("/conf", profile="p") == {"/conf": {
        "/conf/a": "1", "/conf/b": "2", "/conf/c/": {}}}
    assert etcd.tree("/conf", profile="p") == {"a": "1", "b": "2", "c": {"d": "3"}}
    assert etcd.rm_("/conf/c", recurse=True, profile="p") is True
    assert etcd.get_("/conf/c/d", profile="p") is None
"""


def test_programs_salt_reads_and_writes(
    programs_server: pyetcd.LocalMember, tmp_path: Path
) -> None:
    """The execution module `etcd`, with its functions called as `salt-call etcd.set` does."""
    if not _is_there("salt"):
        pytest.skip("salt is not installed")
    _python(tmp_path, _SALT, os.environ["PATH"],
            *programs_server.client_url[len("http://"):].split(":"))


def test_programs_ctdb_has_one_holder_of_its_lock(
    programs_server: pyetcd.LocalMember, tmp_path: Path, programs_path: str
) -> None:
    """The helper says 0 while it holds the lock, and 1 if another node does."""
    helper = Path(os.environ.get("PYETCD_CTDB_LOCK", _CTDB_LOCK))
    if not helper.exists():
        pytest.skip("Debian's package ctdb is not installed")
    pytest.importorskip("etcd", reason="python-etcd is not installed")
    host, port = programs_server.client_url[len("http://"):].split(":")
    config = tmp_path / "etcd"
    config.write_text(f"host = {host}\nport = {port}\nlock_ttl = 5\nlock_refresh = 1\n")
    _script(tmp_path / "bin" / "testparm", "echo CLUSTER")
    _script(tmp_path / "bin" / "ctdb", "echo 0")
    words = [sys.executable, str(helper), "-c", str(config)]
    environ = {**os.environ, "PATH": programs_path}
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, env=environ)
    try:
        assert holder.stdout is not None and holder.stdout.read(1) == b"0"
        assert _run(words, programs_path) == "1"
        holder.terminate()
        assert holder.wait(60) == 0
        second = subprocess.Popen(words, stdout=subprocess.PIPE, env=environ)
        with second:
            assert second.stdout is not None and second.stdout.read(1) == b"0"
            second.terminate()
    finally:
        holder.kill()
        holder.communicate()


_TORCH = """
    import sys, threading
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous import registry
    from torch.distributed.elastic.rendezvous.etcd_server import EtcdServer

    def main():
        server = EtcdServer(sys.argv[1])
        server.start()
        try:
            for backend in ("etcd", "etcd-v2"):
                results = {}

                def join(number):
                    handler = registry.get_rendezvous_handler(RendezvousParameters(
                        backend=backend, endpoint=server.get_endpoint(), run_id="run-" + backend,
                        min_nodes=2, max_nodes=2, timeout=60))
                    info = handler.next_rendezvous()
                    info.store.set(f"rank{info.rank}", str(number))
                    results[info.rank] = info.world_size, info.store.get(f"rank{1 - info.rank}")

                threads = [threading.Thread(target=join, args=(n,)) for n in range(2)]
                for thread in threads: thread.start()
                for thread in threads: thread.join()
                assert sorted(results) == [0, 1], results
                assert [size for size, _ in results.values()] == [2, 2]
                print(backend, "joined")
        finally:
            server.stop()

    main()
"""


def test_programs_torch_elastic_meets_by_its_etcd_server(
    tmp_path: Path, programs_path: str
) -> None:
    """EtcdServer starts `etcd`; two workers meet by the rendezvous etcd, two by etcd-v2."""
    if not _is_there("torch") or not _is_there("etcd"):
        pytest.skip("torch or python-etcd is not installed")
    output = _python(tmp_path, _TORCH, programs_path, tmp_path / "torch")
    assert "etcd joined\n" in output and "etcd-v2 joined\n" in output
