"""`pyetcd dev`: a cluster in one command."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Iterator, List

import pytest
import requests

import pyetcd
from tests.kit.basics import eventually, free_port
from tests.kit.processes import ClusterMember, Process, ended


class _Dev(Process):
    """`pyetcd dev` with its own directory for temporary files."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.temporary = directory / "tmp"
        self.temporary.mkdir(exist_ok=True)
        super().__init__(directory, "dev", *arguments, env={"TMPDIR": str(self.temporary)})

    def wait_ready(self) -> List[str]:
        """Return the client URLs that it prints."""
        self.wait_log("Try next:")
        self.wait_log("prints the next change")
        return re.findall(r"^  etcd\d  (\S+)", self.log(), re.M)

    def end(self, *numbers: int) -> int:
        """Send signals, and return the exit code."""
        for number in numbers:
            self.popen.send_signal(number)
        return int(self.popen.wait(60))


@pytest.fixture(name="dev_started")
def _dev_started(tmp_path: Path) -> Iterator[Any]:
    """A function that starts `pyetcd dev`; all are killed in the end."""
    started: List[_Dev] = []

    def start(*arguments: str) -> _Dev:
        started.append(_Dev(tmp_path, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def _dev_get(url: str) -> Any:
    return requests.get(url, timeout=30).json()


def _dev_fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that `pyetcd dev` ends with."""
    assert pyetcd.main(["dev", *words]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize("size", [1, 3])
def test_dev_serves_on_its_urls_and_leaves_nothing(dev_started: Any, size: int) -> None:
    """All members are in one cluster, on a real log; a second Ctrl-C changes nothing."""
    dev = dev_started(*[str(size)] * (size > 1))
    urls = dev.wait_ready()
    members = _dev_get(urls[0] + "/v2/members")["members"]
    assert len(urls) == size and sorted(urls) == sorted(m["clientURLs"][0] for m in members)
    assert f"page: {urls[0]}/ui\n" in dev.log()
    assert len(list(dev.temporary.rglob("*.wal"))) == size
    assert dev.end(signal.SIGINT, signal.SIGINT, signal.SIGTERM) == 0
    assert list(dev.temporary.iterdir()) == []
    assert "Traceback" not in dev.log() and "rafthttp" not in dev.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_dev_ends_with_its_data_whatever_signal_comes(dev_started: Any, number: int) -> None:
    dev = dev_started()
    dev.wait_ready()
    assert dev.end(number) == 0 and list(dev.temporary.iterdir()) == []


def test_dev_signal_during_the_start_leaves_nothing(dev_started: Any) -> None:
    """The data directory is there before the members are."""
    dev = dev_started("9")
    eventually(lambda: list(dev.temporary.iterdir()), what="a data directory")
    assert dev.end(signal.SIGTERM) == 0
    assert list(dev.temporary.iterdir()) == []


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_dev_lines_to_try_next_work_as_they_stand(dev_started: Any) -> None:
    dev = dev_started("3")
    dev.wait_ready()
    put, get, watch = (
        shlex.split(line, comments=True)
        for line in re.findall(r"^  (curl .*)", dev.log(), re.M)
    )
    waiting = subprocess.Popen([*watch, "-sS", "-m", "60"], stdout=subprocess.PIPE, text=True)

    def run(words: List[str]) -> Any:
        done = subprocess.run([*words, "-sS", "-m", "60"], capture_output=True, check=True)
        return json.loads(done.stdout)

    assert run(put)["node"]["value"] == "bar"
    eventually(lambda: run(get).get("node", {}).get("value") == "bar", what="the other member")

    def has_told() -> bool:                 # curl may have asked after the first write
        run(put)
        return waiting.poll() is not None

    eventually(has_told, what="the watch")
    assert json.loads(waiting.communicate()[0])["action"] == "set"


def test_dev_takes_ports_in_a_row(dev_started: Any) -> None:
    first = free_port()
    dev = dev_started("3", "-port", str(first))
    assert dev.wait_ready() == [f"http://127.0.0.1:{first + 2 * place}" for place in range(3)]
    members = _dev_get(f"http://127.0.0.1:{first}/v2/members")["members"]
    assert {url for member in members for url in member["peerURLs"]} == {
        f"http://127.0.0.1:{first + 2 * place + 1}" for place in range(3)}


def test_dev_port_that_is_taken_is_named(
    dev_started: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = free_port()
    dev_started("-port", str(first)).wait_ready()
    assert _dev_fails(capsys, "1", "-port", str(first)) == (
        f"dev: cannot listen on 127.0.0.1 port {first} or {first + 1}: another program uses it;"
        " choose another -port, or leave it out for free ports\n")


def test_dev_data_dir_keeps_keys_size_and_ports(
    dev_started: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    dev = dev_started("3", "-data-dir", str(kept))
    urls = dev.wait_ready()
    assert requests.put(urls[0] + "/v2/keys/a", {"value": "1"}, timeout=30).status_code == 201
    assert dev.end(signal.SIGTERM) == 0
    again = dev_started("-data-dir", str(kept))
    assert again.wait_ready() == urls
    assert _dev_get(urls[0] + "/v2/keys/a?quorum=true")["node"]["value"] == "1"
    assert again.end(signal.SIGTERM) == 0
    assert "keeps a cluster of 3 on 127.0.0.1" in _dev_fails(capsys, "1", "-data-dir", str(kept))


def test_dev_data_dir_of_something_else_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    assert "is not empty and has no dev.json" in _dev_fails(capsys, "-data-dir", str(tmp_path))
    (tmp_path / "dev.json").write_text("{}")
    assert "cannot use" in _dev_fails(capsys, "-data-dir", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dev.json", "thesis.txt"]


def test_dev_discovery_url_is_for_members_elsewhere(dev_started: Any, tmp_path: Path) -> None:
    """It carries an address of this machine that others reach; members form a cluster by it."""
    address = pyetcd.default_route_address() or "127.0.0.1"
    dev = dev_started("-discovery-url", "-host", "127.0.0.1")
    dev.wait_ready()
    dev.wait_log("/new?size=5")
    assert "reached from this machine only" in dev.log()
    dev.end(signal.SIGTERM)
    dev = dev_started("-discovery-url")
    dev.wait_ready()
    dev.wait_log("/new?size=5")
    url = re.search(r"^  (http://\S+/[0-9a-f]{32})$", dev.log(), re.M)
    assert url is not None and url[1].startswith(f"http://{address}:")
    members = [ClusterMember(tmp_path, f"m{number}") for number in range(3)]
    with ended(*members):
        for member in members:
            member.start("-discovery", url[1])
        for member in members:
            member.process.wait_log("published")


@pytest.mark.parametrize("words, text", [
    (["0"], "a cluster has at least one member; use 1, 3, 5, 7 or 9."),
    (["2"], "2 members survive no more failures than 1: both need a majority; use 1, 3,"),
    (["4", "-debug"], "4 members survive no more failures than 3"),
    (["100"], "100 members are too many for one process; use 1, 3, 5, 7 or 9."),
    (["1" * 5_000], "members are too many"),
    (["three"], "'three' is not a number of members; use 1, 3,"),
    (["²"], "'²' is not a number of members"),
    (["-debug", "x"], "'x' is not a number of members"),
    (["3", "5"], "'5' is one word too many"), (["-port", "3000", "3", "x"], "'x' is one word too"),
    ([""], "'' is not a number of members"), (["-debug", "true"], "; -debug is a switch: write"),
    (["-prot", "3000"], "; did you mean -port? See 'pyetcd dev -help'"),
    (["-3"], "flag provided but not defined: -3"),
    (["-port", "0"], "a port is a number from 1 to 65535"),
    (["-port", "x"], "a port is a number from 1 to 65535"),
    (["3", "-port", "65531"], "-port 65531 leaves too few ports for 3 members; use one up to 6"),
    (["-host", "0.0.0.0"], "the URLs need one address of this machine"),
    (["-host", "machine1"], "an IP address of this machine is wanted"),
    (["-host", "203.0.113.7"], "cannot listen on 203.0.113.7: this machine does not have that"),
    (["-listen-client-urls", "http://127.0.0.1:1"], "flag provided but not defined"),
])
def test_dev_mistakes_are_explained(
    words: List[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, flags_logging: Any,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert text in _dev_fails(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_dev_is_not_for_the_variables_of_a_member(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ETCD_DATA_DIR may name the data of a real one."""
    monkeypatch.setenv("ETCD_DATA_DIR", "/var/lib/etcd2")
    monkeypatch.setenv("ETCD_PORT", "x")
    assert pyetcd.main(["dev", "-help"]) == 0
    assert "usage: pyetcd dev [N]" in capsys.readouterr().out


def test_dev_member_that_ends_ends_all(dev_started: Any) -> None:
    """As after a failed disk: whoever looks at the terminal is told."""
    dev = dev_started("3")
    urls = dev.wait_ready()
    ids = [member["id"] for member in _dev_get(urls[0] + "/v2/members")["members"]]
    assert requests.delete(f"{urls[0]}/v2/members/{ids[0]}", timeout=30).status_code == 204
    assert dev.popen.wait(60) == 1
    assert "ended by itself, and so does the rest" in dev.log()
    assert list(dev.temporary.iterdir()) == []
