"""What the shipped files promise to whoever copies them.

Runs alone, where nothing lies but this file, pyetcd.py, pyetcd_client.py and testdata/:

    python3 -m venv v && v/bin/pip install requests pytest && v/bin/pytest test_pyetcd.py
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest

import pyetcd
import pyetcd_client
from pyetcd_client import Client

HERE = Path(__file__).resolve().parent
TESTDATA = HERE / "testdata"
WAIT_S = 60.0
_ports = itertools.count(os.getpid() * 4_999)       # two runs at once begin far apart


# -- helpers -----------------------------------------------------------------------


def free_port() -> int:
    """Return a loopback port, below those that systems give away, on which nobody listens."""
    while True:
        port = 20_000 + next(_ports) % 12_000
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def eventually(condition: Callable[[], Any], what: str = "condition") -> Any:
    """Return condition()'s first true value."""
    deadline = time.monotonic() + WAIT_S
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not hold within {WAIT_S} s"
        time.sleep(0.02)


class Answer(NamedTuple):
    status: int
    headers: Dict[str, str]
    text: str

    @property
    def node(self) -> Dict[str, Any]:
        """The node of the keys API."""
        node: Dict[str, Any] = json.loads(self.text)["node"]
        return node


def curl(url: str, method: str = "GET", data: Optional[str] = None) -> Answer:
    """What `curl -X<method> -d <data> <url>` gets."""
    body = None if data is None else data.encode()
    request = urllib.request.Request(url, body, method=method)
    try:
        answer = urllib.request.urlopen(request, timeout=WAIT_S)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return Answer(answer.status, dict(answer.headers), answer.read().decode())


class Program:
    """`python3 pyetcd.py <flags>` in `directory`; its lines may be read while it runs."""

    def __init__(self, directory: Path, *flags: str, **environment: str) -> None:
        self.log_path = directory / f"log{next(_ports)}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ETCD_", "COREOS_"))}
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "pyetcd.py", *flags], cwd=directory, stdout=log, stderr=log,
                env={**clean, **environment})

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end(signal.SIGKILL)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_log(self, text: str) -> None:
        def is_there() -> bool:
            ended = self.process.poll() is not None         # before the last look at the log
            found = text in self.log()
            assert found or not ended, f"ended, and no {text!r}:\n{self.log()}"
            return found

        eventually(is_there, f"{text!r} in {self.log_path}")

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(WAIT_S)


class Machine:
    """One line of the article's table: a name, a client port and a peer port."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.client = f"http://127.0.0.1:{free_port()}"
        self.peer = f"http://127.0.0.1:{free_port()}"

    def flags(self, *more: str) -> List[str]:
        """The command line of the article, as it stands there."""
        return [
            "-name", self.name, "-initial-advertise-peer-urls", self.peer,
            "-listen-peer-urls", self.peer,
            "-listen-client-urls", self.client,
            "-advertise-client-urls", self.client,
            *more,
        ]

    def alone(self) -> List[str]:
        return self.flags("-initial-cluster", f"{self.name}={self.peer}")

    def key(self, name: str) -> str:
        return f"{self.client}/v2/keys/{name}"


@contextlib.contextmanager
def running(home: Path, machine: Machine, *more: str) -> Iterator[Program]:
    """The machine as a cluster of its own, ready."""
    with Program(home, *machine.alone(), *more) as program:
        program.wait_log("published")
        yield program


def run(directory: Path, *arguments: str, **options: Any) -> Tuple[int, str, str]:
    """Run Python there; return (exit code, stdout, stderr)."""
    options.setdefault("env", {k: v for k, v in os.environ.items()
                               if not k.startswith(("ETCD", "PYTHONPATH"))})
    done = subprocess.run([sys.executable, *arguments], cwd=directory, capture_output=True,
                          text=True, timeout=600, check=False, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory that holds the two files and nothing else."""
    directory = tmp_path / "home"
    directory.mkdir()
    for name in ("pyetcd.py", "pyetcd_client.py"):
        shutil.copy(HERE / name, directory)
    return directory


@pytest.fixture(scope="module")
def shared() -> Iterator[pyetcd.LocalMember]:
    """A member that tests share, each in a directory of its own."""
    with pyetcd.LocalMember() as local:
        yield local


@pytest.fixture
def member() -> Iterator[pyetcd.LocalMember]:
    with pyetcd.LocalMember() as local:
        yield local


# -- the files, alone --------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-version", "--version", "-h", "-help"])
def test_shipped_server_needs_only_the_standard_library(home: Path, flag: str) -> None:
    """`-S -I`: no package that was installed can be found, only what comes with Python."""
    (home / "pyetcd_client.py").unlink()
    code, out, err = run(home, "-S", "-I", "-W", "error", "pyetcd.py", flag)
    assert (code, err) == (0, "")
    assert pyetcd.__version__ in out or "--listen-client-urls" in out


def test_shipped_client_needs_requests_and_not_the_server(home: Path) -> None:
    (home / "pyetcd.py").unlink()
    script = ("import sys, pyetcd_client\n"
              "pyetcd_client.Client\n"
              "print('requests' in sys.modules, 'pyetcd' in sys.modules)\n")
    assert run(home, "-W", "error", "-c", script) == (0, "True False\n", "")


def test_shipped_files_leave_nothing_beside_them(home: Path) -> None:
    """Asking for the version or the help makes no directories."""
    run(home, "pyetcd.py", "-version")
    run(home, "pyetcd_client.py", "--version")
    assert sorted(path.name for path in home.iterdir()) == ["pyetcd.py", "pyetcd_client.py"]


@pytest.mark.parametrize("name", ["pyetcd", "pyetcd_client"])
def test_shipped_file_exports_what_it_says(name: str) -> None:
    """`from pyetcd import *` gets what `__all__` names, and each of them exists."""
    module = sys.modules[name]
    assert module.__all__ and all(hasattr(module, public) for public in module.__all__)


@pytest.mark.parametrize("name", ["pyetcd.py", "pyetcd_client.py"])
def test_shipped_file_is_readable_by_every_supported_python(name: str) -> None:
    ast.parse((HERE / name).read_text(encoding="utf-8"), feature_version=(3, 9))


def test_shipped_readme_begins_with_the_first_screen_of_these_tests() -> None:
    """What the next section does is what README's first lines say; no README, nothing to say."""
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")[:4_000] if readme.exists() else FIRST_SCREEN
    for line in FIRST_SCREEN.splitlines():
        assert line.strip() in text


# -- README's first screen ---------------------------------------------------------


FIRST_SCREEN = """\
python3 pyetcd.py
curl http://127.0.0.1:2379/v2/keys/foo -XPUT -d value=bar
{"action":"set","node":{"key":"/foo","value":"bar","modifiedIndex":4,"createdIndex":4}}
from pyetcd_client import Client
client.set("foo", "bar")
print(client.get("foo").value)
client.compare_and_swap("foo", "new", prev_value="bar")
"""
FIRST_PROGRAM = """\
from pyetcd_client import Client
client = Client(port=PORT)
client.set("foo", "bar")
print(client.get("foo").value)
print(client.compare_and_swap("foo", "new", prev_value="bar").value)
"""


def test_first_screen_member_curl_and_client(home: Path) -> None:
    """One member, one curl with its answer, five lines of the client."""
    machine = Machine("default")
    with running(home, machine):
        answer = curl(machine.key("foo"), "PUT", "value=bar")
        assert answer.status == 201 and answer.headers["Content-Type"] == "application/json"
        assert answer.text == ('{"action":"set","node":{"key":"/foo","value":"bar",'
                               '"modifiedIndex":4,"createdIndex":4}}\n')
        program = FIRST_PROGRAM.replace("PORT", machine.client.rpartition(":")[2])
        assert run(home, "-c", program) == (0, "bar\nnew\n", "")


def test_first_screen_default_ports_are_those_of_etcd(home: Path) -> None:
    """`python3 pyetcd.py` and no flag."""
    out = run(home, "pyetcd.py", "-h")[1]
    assert "--listen-client-urls 'http://localhost:2379,http://localhost:4001'" in out
    assert "--listen-peer-urls 'http://localhost:2380,http://localhost:7001'" in out


# -- a member serves ---------------------------------------------------------------


def test_serve_data_survives_kill_9(home: Path) -> None:
    """What was acknowledged is there after a restart in the same directory."""
    machine = Machine("n1")
    with running(home, machine) as program:
        for number in range(20):
            assert curl(machine.key(f"k{number}"), "PUT", f"value={number}").status == 201
        program.end(signal.SIGKILL)
    with running(home, machine):
        nodes = curl(machine.key("")).node["nodes"]
        assert {node["key"]: node["value"] for node in nodes} == {
            f"/k{number}": str(number) for number in range(20)}


def test_serve_sigterm_ends_it_in_order(home: Path) -> None:
    with running(home, Machine("n1")) as program:
        assert program.end() == -signal.SIGTERM
        assert "received terminated signal, shutting down..." in program.log()


def test_serve_flags_may_be_variables(home: Path) -> None:
    """As a unit of systemd passes them."""
    machine = Machine("n1")
    flags = machine.alone()
    variables = {"ETCD_" + name[1:].upper().replace("-", "_"): value
                 for name, value in zip(flags[::2], flags[1::2])}
    with Program(home, **variables) as program:
        program.wait_log("published")
        assert "recognized and used environment variable ETCD_NAME=n1" in program.log()
        assert curl(machine.client + "/version").status == 200


@pytest.mark.parametrize("flags, told", [
    (["-nmae", "x"], "did you mean -name?"),
    (["-listen-client-urls", "127.0.0.1:2379"], "http://127.0.0.1:2379"),
    (["-heartbeat-interval", "fast"], "-heartbeat-interval"),
], ids=["flag", "url", "number"])
def test_serve_mistakes_are_told_in_one_line(home: Path, flags: List[str], told: str) -> None:
    code, out, err = run(home, "pyetcd.py", *flags)
    assert code == 1 and told in out + err and len((out + err).splitlines()) == 1
    assert sorted(path.name for path in home.iterdir()) == ["pyetcd.py", "pyetcd_client.py"]


def test_serve_watch_ttl_and_conditions(member: pyetcd.LocalMember) -> None:
    """The verbs of the keys API, through the door that curl takes."""
    keys = f"{member.client_url}/v2/keys"
    index = curl(f"{keys}/a", "PUT", "value=1").node["modifiedIndex"]
    assert curl(f"{keys}/a?prevValue=2", "PUT", "value=3").status == 412
    assert curl(f"{keys}/a?prevIndex={index}", "PUT", "value=3").node["value"] == "3"
    assert curl(f"{keys}/a?wait=true&waitIndex={index + 1}").node["value"] == "3"
    first, second = (curl(f"{keys}/queue", "POST", f"value={n}").node["key"] for n in "ab")
    assert first < second and first.startswith("/queue/000")
    curl(f"{keys}/short", "PUT", "value=x&ttl=1")
    expired = curl(f"{keys}/short?wait=true&waitIndex={index + 5}")
    assert json.loads(expired.text)["action"] == "expire"
    missing = curl(f"{keys}/short")
    assert missing.status == 404 and json.loads(missing.text)["errorCode"] == 100
    assert curl(f"{keys}/queue", "DELETE").status == 403
    assert curl(f"{keys}/queue?recursive=true", "DELETE").status == 200


def test_serve_data_directory_of_etcd_238(home: Path) -> None:
    """A member of etcd 2.3.8 that was stopped goes on as pyetcd, on other ports."""
    with tarfile.open(TESTDATA / "datadir-2.3.8.tar.gz") as archive:
        for entry in archive.getmembers():
            source = archive.extractfile(entry) if entry.isfile() else None
            if source:
                path = home / entry.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(source.read())
    machine = Machine("fixture")
    with Program(home, *machine.flags()) as program:
        program.wait_log("published")
        found = curl(machine.key("?recursive=true&sorted=true"))
    expected = json.loads((TESTDATA / "datadir-2.3.8.expected.json").read_text())["keys"]
    assert without_ttl(json.loads(found.text)) == without_ttl(expected)


def without_ttl(value: Any) -> Any:
    """A listing but for the seconds left."""
    if isinstance(value, dict):
        return {name: without_ttl(item) for name, item in value.items() if name != "ttl"}
    return [without_ttl(item) for item in value] if isinstance(value, list) else value


# -- embedded in a program ---------------------------------------------------------


def test_embed_a_server_in_a_with_block(tmp_path: Path) -> None:
    """Ports are free ones, and nothing is left when the block ends."""
    before = set(threading.enumerate())
    with pyetcd.Server(data_dir=str(tmp_path / "a.etcd")) as server:
        assert server.wait_ready(WAIT_S)
        url = server.client_urls[0]
        assert curl(f"{url}/v2/keys/a", "PUT", "value=1").status == 201
    assert set(threading.enumerate()) <= before
    with pytest.raises(urllib.error.URLError):
        curl(url + "/version")
    with pyetcd.Server(data_dir=str(tmp_path / "a.etcd")) as server:
        assert server.wait_ready(WAIT_S)
        assert curl(f"{server.client_urls[0]}/v2/keys/a").node["value"] == "1"


def test_embed_three_servers_form_a_cluster(tmp_path: Path) -> None:
    """Bind all, so that the ports are known, then start each with the same list."""
    servers = [pyetcd.Server(name=name, data_dir=str(tmp_path / name)) for name in "abc"]
    try:
        for server in servers:
            server.bind()
        members = ",".join(f"{s.config.name}={s.peer_urls[0]}" for s in servers)
        for server in servers:
            server.start(initial_cluster=members)
        for server in servers:
            assert server.wait_ready(WAIT_S)
        assert curl(f"{servers[0].client_urls[0]}/v2/keys/a", "PUT", "value=1").status == 201
        for server in servers:
            url = f"{server.client_urls[0]}/v2/keys/a?quorum=true"
            assert curl(url).node["value"] == "1"
    finally:
        for server in servers:
            server.stop()


def test_embed_test_kit_kills_pauses_and_cuts() -> None:
    """What the fixtures of pytest are made of."""
    with pyetcd.LocalCluster(3) as cluster:
        old = cluster.wait_leader()
        rest = [local for local in cluster.members if local is not old]
        cluster.partition([old], rest)
        leader = cluster.wait_leader(among=rest)
        assert curl(f"{leader.client_url}/v2/keys/a", "PUT", "value=1").status == 201
        cluster.heal()
        assert eventually(lambda: "1" in curl(f"{old.client_url}/v2/keys/a").text)
        leader.kill()
        assert cluster.wait_leader() is not leader
        leader.start()
        assert curl(f"{leader.client_url}/v2/keys/a?quorum=true").node["value"] == "1"


def test_embed_fixtures_of_pytest(home: Path) -> None:
    """`-p pyetcd.PytestPlugin` is what the installed package does by itself."""
    (home / "conftest.py").write_text(
        "import pyetcd\n"
        "def pytest_configure(config):\n"
        "    pyetcd.PytestPlugin.pytest_configure(config)\n")
    (home / "test_it.py").write_text(
        "import urllib.request\n"
        "def version(member):\n"
        "    return urllib.request.urlopen(member.client_url + '/version').status\n"
        "def test_one(etcd_server): assert version(etcd_server) == 200\n"
        "def test_three(etcd_cluster):\n"
        "    assert [version(member) for member in etcd_cluster.members] == [200] * 3\n"
        "def test_two(etcd_cluster_factory):\n"
        "    assert len(etcd_cluster_factory(2).client_urls) == 2\n")
    code, out, err = run(home, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:pyetcd",
                         "test_it.py")
    assert code == 0 and "3 passed" in out, out + err


# -- the article: three members through a discovery service of our own -------------


def test_article_three_members_by_discovery(home: Path) -> None:
    """The article, step by step, with its command lines; the ports are free ones.

    The service is a pyetcd that is no member of the cluster.  Each member registers there and
    waits for the others; then all have one key space.  A fourth one is too late, and a proxy.
    """
    service = Machine("default")
    machines = [Machine(f"machine{number}") for number in (1, 2, 3)]
    with contextlib.ExitStack() as programs:
        (home / "discovery").mkdir()
        shutil.copy(HERE / "pyetcd.py", home / "discovery")
        programs.enter_context(running(home / "discovery", service))

        # $ curl 'https://discovery.etcd.io/new?size=3'
        url = curl(f"{service.client}/new?size=3").text.strip()
        token = re.fullmatch(re.escape(service.client) + "/([0-9a-f]{32})", url)
        assert token
        size = curl(f"{service.client}/v2/keys/_etcd/registry/{token[1]}/_config/size")
        assert size.node["value"] == "3"

        # $ etcd -name machine1 ... -discovery https://discovery.etcd.io/<token>
        first = programs.enter_context(Program(home, *machines[0].flags("-discovery", url)))
        first.wait_log("discovery: found 1 peer(s), waiting for 2 more")
        check_log_of_the_article(first.log(), machines[0])
        started = [first, *(programs.enter_context(Program(home, *m.flags("-discovery", url)))
                            for m in machines[1:])]
        for machine, program in zip(machines, started):
            program.wait_log(f"published {{Name:{machine.name} ClientURLs:[{machine.client}]}}")
            assert "discovery: found 3 needed peer(s)" in program.log()
            assert re.search("raft.node: [0-9a-f]+ elected leader [0-9a-f]+ at term 2",
                             program.log())

        # $ curl https://discovery.etcd.io/<token>
        listing = curl(url).node
        assert listing["key"] == f"/_etcd/registry/{token[1]}" and listing["dir"] is True
        assert {node["value"] for node in listing["nodes"]} == {
            f"{machine.name}={machine.peer}" for machine in machines}
        ids = {node["key"].rpartition("/")[2] for node in listing["nodes"]}
        assert ids == {f"{pyetcd.member_id([machine.peer], url):x}" for machine in machines}
        members = json.loads(curl(machines[0].client + "/v2/members").text)["members"]
        assert {m["id"] for m in members} == ids

        # $ curl http://127.0.0.1:2379/v2/keys/foo -XPUT -d value=bar
        written = curl(machines[0].key("foo"), "PUT", "value=bar")
        assert written.status == 201 and json.loads(written.text)["action"] == "set"
        for machine in machines:
            node = eventually(lambda m=machine: shown(m, "foo"))
            assert node == written.node

        late_member_is_a_proxy(home, url, " ".join(sorted(m.peer for m in machines)))
        the_url_is_not_needed_again(home, url, machines, started)


def check_log_of_the_article(log: str, machine: Machine) -> None:
    """The first lines, each after a date as Go writes it."""
    assert all(re.match(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d \w+: ", line)
               for line in log.splitlines())
    said = [line.split(" ", 2)[2] for line in log.splitlines()]
    wanted = [
        f"etcd: no data-dir provided, using default data-dir ./{machine.name}.etcd",
        f"etcd: listening for peers on {machine.peer}",
        f"etcd: listening for client requests on {machine.client}",
        "etcdserver: datadir is valid for the 2.0.1 format",
    ]
    start = said.index(wanted[0])
    assert said[start:start + 4] == wanted
    assert re.search("discovery: found self [0-9a-f]+ in the cluster", log)


def shown(machine: Machine, key: str) -> Any:
    """The node, None where it has not arrived yet."""
    answer = curl(machine.key(key))
    return answer.node if answer.status == 200 else None


def late_member_is_a_proxy(home: Path, url: str, peers: str) -> None:
    """It joins by itself in that it passes requests on, and it stays a proxy."""
    late = Machine("machine4")
    with Program(home, *late.flags("-discovery", url)) as program:
        program.wait_log("etcd: discovery cluster full, falling back to proxy")
        program.wait_log("proxy: endpoints found [")
        assert f"proxy: using peer urls [{peers}] " in program.log()
        assert eventually(lambda: shown(late, "foo"))["value"] == "bar"
        assert curl(late.key("foo"), "PUT", "value=baz").status == 200
        assert program.end() == -signal.SIGTERM
    with Program(home, *late.flags("-discovery", url)) as program:
        program.wait_log("proxy: endpoints found [")
        assert "already initialized as proxy before" in program.log()
        assert ("discovery token ignored since the proxy has already been initialized. Valid "
                'cluster file found at "machine4.etcd/proxy/cluster"') in program.log()
        assert shown(late, "foo")["value"] == "baz"


def the_url_is_not_needed_again(
    home: Path, url: str, machines: List[Machine], started: List[Program]
) -> None:
    """A member that was killed starts again with the same command line; its directory decides."""
    started[2].end(signal.SIGKILL)
    assert curl(machines[0].key("foo"), "PUT", "value=two").status == 200
    with Program(home, *machines[2].flags("-discovery", url)) as again:
        again.wait_log("published")
        assert curl(machines[2].key("foo?quorum=true")).node["value"] == "two"


# -- the article on CoreOS ---------------------------------------------------------


def drop_in(service_url: str, machine: Machine, address: str) -> Dict[str, str]:
    """/run/systemd/system/etcd2.service.d/20-cloudinit.conf, `address` for the private one."""
    client, peer = machine.client.rpartition(":")[2], machine.peer.rpartition(":")[2]
    return {
        "ETCD_ADVERTISE_CLIENT_URLS": f"http://{address}:{client}",
        "ETCD_DISCOVERY": service_url,
        "ETCD_INITIAL_ADVERTISE_PEER_URLS": f"http://{address}:{peer}",
        "ETCD_LISTEN_CLIENT_URLS": f"http://0.0.0.0:{client}",
        "ETCD_LISTEN_PEER_URLS": f"http://{address}:{peer}",
        "ETCD_NAME": machine.name,
    }


def test_coreos_drop_in_with_private_ipv4(home: Path) -> None:
    """Three hosts, one cloud-config: the variables of the drop-in, and $private_ipv4 filled in.

    The address comes from COREOS_PRIVATE_IPV4, which /etc/environment holds on CoreOS.
    """
    service = Machine("default")
    machines = [Machine(f"host{number}") for number in (1, 2, 3)]
    with contextlib.ExitStack() as programs:
        programs.enter_context(running(home, service))
        url = curl(f"{service.client}/new?size=3").text.strip()
        for machine in machines:
            programs.enter_context(Program(
                home, COREOS_PRIVATE_IPV4="127.0.0.1", **drop_in(url, machine, "$private_ipv4")))
        for machine in machines:
            eventually(lambda m=machine: serves(m), f"{machine.name} serves")
        listing = json.loads(curl(machines[0].client + "/v2/members").text)["members"]
        assert {member["name"]: member["clientURLs"] for member in listing} == {
            machine.name: [machine.client] for machine in machines}


def serves(machine: Machine) -> bool:
    try:
        return curl(machine.key("?quorum=true")).status == 200
    except OSError:
        return False


def test_coreos_drop_in_with_an_empty_address_says_what_to_do(home: Path) -> None:
    """Where the article ends: $private_ipv4 was empty, and the URLs are http://:2379."""
    variables = drop_in("http://127.0.0.1:4001/token", Machine("default"), "")
    with Program(home, **variables) as program:
        assert program.process.wait(WAIT_S) == 1
        last = program.log().splitlines()[-1]
    assert re.search(r"\(from ETCD_\w+_URLS\) has no host in http://:\d+", last)
    assert "$private_ipv4 was empty" in last
    assert "COREOS_PRIVATE_IPV4 in /etc/environment" in last


# -- the recordings of etcd 2.3.8 --------------------------------------------------


def test_transcript_of_the_keys_api() -> None:
    """921 recorded steps; the two that differ stand under "Differences from etcd".

    Most of the time is spent in waiting for what must not come, so four members share the steps.
    """
    with contextlib.ExitStack() as members:
        urls = [members.enter_context(pyetcd.LocalMember()).client_url for _ in range(4)]
        _, out, err = run(TESTDATA, "compare.py", "--again", "3", ",".join(urls),
                          "keys-cases.jsonl", "keys-etcd-2.3.8.jsonl")
    assert "TOTAL pass 919 fail 2" in out, out[-3000:] + err
    assert re.findall(r"^  #(\d+) ", out, re.M) == ["15", "17"]
    assert "watch-stream                 pass  16  fail   2" in out


def load_compare_ops() -> Any:
    spec = importlib.util.spec_from_file_location("compare_ops", TESTDATA / "compare_ops.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare_ops = load_compare_ops()


def is_formed(local: pyetcd.LocalMember, size: int) -> bool:
    """Whether all members are published, and the version of the cluster is decided."""
    listing = json.loads(curl(local.client_url + "/v2/members").text)["members"]
    version = json.loads(curl(local.client_url + "/version").text)["etcdcluster"]
    return version == "2.3.0" and sum(bool(m["name"]) for m in listing) == size


# etcd lets everybody change the level of the log, pyetcd only root once there are users.
OPS_DIFFER = {"aopen-log"}


@pytest.mark.parametrize(("environment", "cases"), [
    pytest.param(environment, cases, id=f"{environment}-from-{cases[0]['id']}")
    for environment, cases in compare_ops.groups()
])
def test_transcript_of_all_but_the_keys(environment: str, cases: List[Dict[str, Any]]) -> None:
    """249 requests to members, statistics, users, health...: status, headers and body."""
    names = compare_ops.NAMES[environment]
    settings: Dict[str, Any] = {"initial_cluster_token": "ops"}
    if environment == "cors":
        settings["cors"] = compare_ops.CORS.split(",")
    cluster = pyetcd.LocalCluster(len(names), **settings)
    for local in cluster.members:
        local.reserve()
    cluster.members.sort(key=lambda local: local.client_url)        # lists are in this order
    for local, name in zip(cluster.members, names):
        local.name = name
    with cluster:
        for local in cluster.members:
            eventually(lambda m=local: is_formed(m, len(names)), "a formed cluster")
        addresses = [(m.client_url[len("http://"):], m.peer_url[len("http://"):])
                     for m in cluster.members]
        different = compare_ops.Replay(addresses).run(cases)
        assert set(different) == OPS_DIFFER & {case["id"] for case in cases}, different


# -- the client and pyetcdctl ------------------------------------------------------


def test_client_verbs_errors_and_watch(member: pyetcd.LocalMember) -> None:
    with Client(member.client_url) as client:
        start = client.set("/conf/name", "a").modified_index
        assert client.get("/conf/name").value == "a"
        assert [node.key for node in client.ls("/conf")] == ["/conf/name"]
        with pytest.raises(pyetcd_client.CompareFailed):
            client.compare_and_swap("/conf/name", "c", prev_value="x")
        with pytest.raises(pyetcd_client.EtcdError) as caught:
            client.get("/nope")
        assert caught.value.code == 100 and not caught.value.maybe_applied
        event = next(iter(client.watch("/conf", index=start, recursive=True)))
        assert (event.action, event.key, event.value) == ("set", "/conf/name", "a")
        client.delete("/conf", recursive=True)
        assert "/conf" not in client


def test_client_goes_on_when_its_member_dies() -> None:
    """Several endpoints: reads move to the next, and a write is told from an unknown one."""
    with pyetcd.LocalCluster(3) as cluster, Client(",".join(cluster.client_urls)) as client:
        client.set("/a", "1")
        cluster.members[0].kill()
        cluster.wait_leader()
        assert client.get("/a", quorum=True).value == "1"


def test_client_lock_is_held_by_one(member: pyetcd.LocalMember) -> None:
    """The recipe most used; the others stand in docs."""
    with Client(member.client_url) as one, Client(member.client_url) as two:
        with pyetcd_client.Lock(one, "/lock"):
            assert not pyetcd_client.Lock(two, "/lock").acquire(timeout=0)
        assert pyetcd_client.Lock(two, "/lock").acquire(timeout=WAIT_S)


@pytest.mark.parametrize("arguments, code, out, err", [
    (["set", "/conf/port", "80"], 0, "80\n", ""),
    (["get", "/conf/name"], 0, "a\n", ""),
    (["-o", "extended", "get", "/conf/name"], 0, "Key: /conf/name\n", ""),
    (["ls", "--recursive", "/conf"], 0, "/conf/name\n", ""),
    (["get", "/nope"], 4, "", "Error:  100: Key not found (/nope) ["),
    (["mk", "/conf/name", "b"], 4, "", "Error:  105: Key already exists (/conf/name) ["),
    (["rm", "/conf/name"], 0, "PrevNode.Value: a\n", ""),
    (["cluster-health"], 0, "cluster is healthy\n", ""),
    (["member", "list"], 0, "name=etcd1 ", ""),
], ids=lambda value: value[0] if isinstance(value, list) else None)
def test_pyetcdctl_prints_what_etcdctl_prints(
    home: Path, shared: pyetcd.LocalMember, arguments: List[str], code: int, out: str, err: str
) -> None:
    curl(f"{shared.client_url}/v2/keys/conf/name", "PUT", "value=a")
    done = run(home, "pyetcd_client.py", "--endpoints", shared.client_url, *arguments)
    assert done[0] == code and out in done[1] and err in done[2], done


# -- the ways in and out -----------------------------------------------------------


def test_operator_grows_and_shrinks_a_cluster(home: Path) -> None:
    """POST /v2/members, start the new one with the whole list, remove it again."""
    one, two = Machine("n1"), Machine("n2")
    with running(home, one):
        body = json.dumps({"peerURLs": [two.peer]})
        request = urllib.request.Request(
            one.client + "/v2/members", body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            number = json.load(answer)["id"]
        flags = two.flags("-initial-cluster", f"n1={one.peer},n2={two.peer}",
                          "-initial-cluster-state", "existing")
        with Program(home, *flags) as program:
            program.wait_log("published")
            assert curl(two.key("a"), "PUT", "value=1").status == 201
            assert curl(f"{one.client}/v2/members/{number}", "DELETE").status == 204
            assert program.process.wait(WAIT_S) == 0
        assert curl(one.key("a")).node["value"] == "1"


def test_operator_snapshot_becomes_a_new_cluster(home: Path, member: pyetcd.LocalMember) -> None:
    """GET /v2/snapshot, `pyetcd.py restore`, and a start with the same flags."""
    curl(f"{member.client_url}/v2/keys/a", "PUT", "value=1")
    with urllib.request.urlopen(member.client_url + "/v2/snapshot", timeout=WAIT_S) as answer:
        (home / "backup.snap").write_bytes(answer.read())
    machine = Machine("m1")
    cluster = ["-name", "m1", "-initial-cluster-token", "restored-1",
               "-initial-cluster", f"m1={machine.peer}",
               "-initial-advertise-peer-urls", machine.peer]
    code, out, err = run(home, "pyetcd.py", "restore", "backup.snap", *cluster)
    assert code == 0, out + err
    with running(home, machine, "-initial-cluster-token", "restored-1"):
        assert curl(machine.key("a")).node["value"] == "1"
