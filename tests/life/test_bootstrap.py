"""Discovery, and Bootstrap."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import tarfile
import types
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

import pytest

import pyetcd
from pyetcd import Entry, Request
from tests.kit.basics import TESTDATA, free_port
from tests.kit.flags import _flags_config, _flags_fails
from tests.kit.registries import _disc_fill, _disc_set_size, _DiscNameServer, _DiscRegistry
from tests.kit.servers import HttpStub

# -- bootstrap: a new cluster ---------------------------------------------------------


def _boot_config(path: Path, **settings: Any) -> pyetcd.ServerConfig:
    """A member of the recorded cluster: name fixture, its URL and token."""
    config = pyetcd.ServerConfig(
        name="fixture", data_dir=str(path / "d"), initial_cluster_token="fixture-token",
        initial_cluster="fixture=http://127.0.0.1:31002",
        initial_advertise_peer_urls=("http://127.0.0.1:31002",),
        advertise_client_urls=("http://127.0.0.1:31001",),
    )
    return config._replace(**settings)


@contextlib.contextmanager
def _boot(config: pyetcd.ServerConfig) -> Iterator[pyetcd.Bootstrap]:
    """bootstrap(config), whose log is closed afterwards."""
    boot = pyetcd.bootstrap(config)
    try:
        yield boot
    finally:
        boot.wal.close()


def _boot_fails(config: pyetcd.ServerConfig) -> str:
    """The one line with which bootstrap(config) refuses; nothing is left behind."""
    root = Path(config.data_dir)
    before = sorted(root.rglob("*")) if root.exists() else None
    with pytest.raises(pyetcd.StartError) as caught:
        pyetcd.bootstrap(config)
    assert "\n" not in str(caught.value)
    assert (sorted(root.rglob("*")) if root.exists() else None) == before
    return str(caught.value)


def test_bootstrap_new_member_has_the_recorded_ids_and_first_entry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    config = _boot_config(tmp_path)
    with _boot(config) as boot:
        assert pyetcd.format_id(boot.member_id) == "a80a825915e9e126"
        assert pyetcd.format_id(boot.cluster.id) == "c2403409e85ab695"
        (entry,) = boot.bootstrap_entries
        change = pyetcd.decode_conf_change(entry.data)
        assert (entry.type, entry.term, entry.index) == (pyetcd.EntryType.CONF_CHANGE, 1, 1)
        assert change == pyetcd.ConfChange(
            0, pyetcd.ConfChangeType.ADD_NODE, boot.member_id,
            b'{"id":12108633867270349094,"peerURLs":["http://127.0.0.1:31002"],"name":"fixture"}')
        assert boot.contents.hard_state == pyetcd.HardState()
        assert boot.snapshot is None
    own = [r.getMessage() for r in caplog.records if r.name == "pyetcd.etcdserver"]
    assert own == [
        "datadir is valid for the 2.0.1 format",
        "name = fixture",
        f"data dir = {config.data_dir}",
        f"member dir = {config.data_dir}/member",
        "heartbeat = 100ms",
        "election = 1000ms",
        "snapshot count = 10000",
        "advertise client URLs = http://127.0.0.1:31001",
        "initial advertise peer URLs = http://127.0.0.1:31002",
        "initial cluster = fixture=http://127.0.0.1:31002",
        "start member a80a825915e9e126 in cluster c2403409e85ab695",
    ]


def test_bootstrap_every_initial_member_makes_the_same_entries(tmp_path: Path) -> None:
    urls = {f"m{n}": f"http://127.0.0.1:{free_port()}" for n in range(3)}
    text = ",".join(f"{name}={url}" for name, url in urls.items())
    found = []
    for name, url in urls.items():
        config = _boot_config(
            tmp_path / name, name=name, initial_cluster=text, initial_advertise_peer_urls=(url,))
        (tmp_path / name).mkdir()
        with _boot(config) as boot:
            found.append([pyetcd.encode_entry(entry) for entry in boot.bootstrap_entries])
            ids = [pyetcd.decode_conf_change(e.data).node_id for e in boot.bootstrap_entries]
            assert ids == sorted(boot.cluster.members)
            assert boot.cluster.members[boot.member_id].name == name
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 3


def test_bootstrap_without_initial_cluster_is_alone(tmp_path: Path) -> None:
    with _boot(_boot_config(tmp_path, initial_cluster="")) as boot:
        assert pyetcd.format_id(boot.member_id) == "a80a825915e9e126"


def test_bootstrap_resolves_host_names_to_compare_urls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **options: [
        info for each in (("fd00::1", "10.0.0.1") if host == "n1.test" else (host,))
        for info in real(each, *args, **options)])
    assert pyetcd.same_urls(["http://n1.test:1", "http://x:2"], ["http://x:2", "http://10.0.0.1:1"])
    assert pyetcd.same_urls(["http://[fd00::1]:1"], ["http://n1.test:1"])
    assert not pyetcd.same_urls(["http://n1.test:1"] * 2, ["http://n1.test:1", "http://x:1"])
    assert not pyetcd.same_urls(["http://n1.test:1"], ["http://10.0.0.1:2"])
    assert not pyetcd.same_urls(["http://n1.test:1"], ["https://10.0.0.1:1"])
    assert not pyetcd.same_urls(["http://localhost:1"], ["http://127.0.0.1:1"])


@pytest.mark.parametrize("settings, words", [
    ({"name": "b"}, 'couldn\'t find local name "b" in the initial cluster configuration'),
    ({"initial_advertise_peer_urls": ("http://127.0.0.1:1",)},
     "--initial-cluster must include fixture=http://127.0.0.1:1 given"
     " --initial-advertise-peer-urls=http://127.0.0.1:1"),
    ({"initial_cluster": "fixture=http://127.0.0.1:31002,b=http://127.0.0.1:31002"},
     "initial cluster b=http://127.0.0.1:31002,fixture=http://127.0.0.1:31002 has duplicate url;"
     " http://127.0.0.1:31002 is there more than once"),
    ({"initial_cluster": "fixture=http://127.0.0.1:31002,b=http://x:1/"},
     "error setting up initial cluster: URL must not contain a path: http://x:1/"),
    ({"initial_advertise_peer_urls": tuple(pyetcd.DEFAULT_PEER_URLS.split(","))},
     "forgot to set --initial-advertise-peer-urls flag?"),
    ({"initial_cluster_state": "existing", "discovery": "http://h:1/t"},
     "discovery URL should not be set when joining existing initial cluster"),
], ids=["name", "own url", "duplicate", "bad url", "default urls", "existing"])
def test_bootstrap_refuses_contradictions(
    settings: Dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in _boot_fails(_boot_config(tmp_path, **settings))


def test_bootstrap_name_given_twice_is_named(tmp_path: Path) -> None:
    """`must include` would name an entry that is there."""
    text = _boot_fails(_boot_config(
        tmp_path, initial_cluster="fixture=http://127.0.0.1:31002,fixture=http://b.test:1,"
                                  "c=http://c.test:1"))
    assert text == (
        "--initial-cluster has the name fixture more than once, for http://127.0.0.1:31002 and"
        " http://b.test:1: give each member a name of its own; if all these are URLs of fixture,"
        " set --initial-advertise-peer-urls=http://127.0.0.1:31002,http://b.test:1")


@pytest.mark.parametrize("wal_dir", ["", "fast/log/wal"])
def test_bootstrap_failed_first_start_leaves_what_it_found(tmp_path: Path, wal_dir: str) -> None:
    """Also the directories above; what was there before stays, empty or not."""
    (tmp_path / "fast").mkdir()
    root = tmp_path / "some" / "where"
    config = _boot_config(
        tmp_path, name="b", data_dir=str(root), wal_dir=str(tmp_path / wal_dir) if wal_dir else "")
    with pytest.raises(pyetcd.StartError):
        pyetcd.bootstrap(config)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "fast"]
    root.mkdir(parents=True)
    with pytest.raises(pyetcd.StartError):
        pyetcd.bootstrap(config)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "fast", root.parent, root]
    with _boot(config._replace(name="fixture")):
        assert (root / "member" / "snap").is_dir()


def test_bootstrap_member_that_waits_for_the_others_has_no_directory_yet(
    tmp_path: Path, disc_registry: _DiscRegistry
) -> None:
    """It may be ended by a signal, which cleans up nothing."""
    config = _boot_discovery(tmp_path, disc_registry.url)
    seen: List[bool] = []

    def complete() -> None:
        seen.append(os.path.exists(config.data_dir))
        for name in "bc":
            disc_registry.put(name * 3, f"{name}=http://127.0.0.1:{ord(name)}")

    disc_registry.on_wait = complete
    with _boot(config):
        assert seen[0] is False
        assert os.stat(config.data_dir).st_mode & 0o777 == 0o700


@pytest.mark.parametrize("url, warned", [
    ("http://10.9.8.7:4001/t", True), ("http://127.0.0.1:4001/t", False),
])
def test_bootstrap_registration_of_localhost_elsewhere_is_a_warning(
    tmp_path: Path, url: str, warned: bool, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def join(self: Any) -> str:
        raise pyetcd.DiscoveryError("far enough")

    monkeypatch.setattr(pyetcd.Discovery, "join", join)
    _boot_fails(_boot_discovery(
        tmp_path, url, initial_advertise_peer_urls=("http://localhost:2380",)))
    assert ("registers http://localhost:2380, which other machines take for themselves"
            in caplog.text) is warned


# -- bootstrap: discovery ---------------------------------------------------------------


def _boot_discovery(path: Path, url: str, **settings: Any) -> pyetcd.ServerConfig:
    return _boot_config(path, initial_cluster="", discovery=url, **settings)


def test_bootstrap_by_discovery_logs_in_the_order_of_the_article(
    tmp_path: Path, disc_registry: _DiscRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    disc_registry.put("bbb", "b=http://127.0.0.1:1")
    disc_registry.put("ccc", "c=http://127.0.0.1:2")
    with _boot(_boot_discovery(tmp_path, disc_registry.url)) as boot:
        expected = pyetcd.member_id(("http://127.0.0.1:31002",), disc_registry.url)
        assert boot.member_id == expected
        assert len(boot.bootstrap_entries) == 3
    messages = caplog.messages
    assert messages[0] == "datadir is valid for the 2.0.1 format"
    assert f"found self {pyetcd.format_id(expected)} in the cluster" in messages[1:4]
    assert messages[4] == "found 3 needed peer(s)"
    assert messages[5] == "name = fixture"
    assert f"discovery URL= {disc_registry.url}" in messages


@pytest.mark.parametrize("settings, prepare, words", [
    ({}, _disc_fill("a", "b", "c"), "start a proxy of it, or add this member with POST"),
    ({"discovery_fallback": "exit"}, _disc_fill("a", "b", "c"),
     "failed to join discovery cluster (discovery: cluster is full)"),
    ({}, lambda r: r._nodes.clear(), "/_config/size -XPUT -d value=3"),
    ({}, _disc_set_size("x"), "failed to join discovery cluster (discovery: size key is bad)"),
    ({}, lambda r: (r.put("b", "fixture=http://b:1"), r.put("c", "c=http://c:1")),
     "member with duplicated name has registered with discovery service token("),
    ({}, lambda r: (r.put("b", "b=http://127.0.0.1:31002"), r.put("c", "c=http://c:1")),
     "has duplicate url: http://127.0.0.1:31002"),
    ({}, lambda r: r.put("%x" % pyetcd.member_id(("http://127.0.0.1:31002",), r.url), "x"),
     'member "fixture" has previously registered with discovery service token ('),
    ({}, lambda r: r.put("%x" % pyetcd.member_id(("http://127.0.0.1:31002",), r.url), "b=x"),
     "another one has registered with the same -initial-advertise-peer-urls"
     " (http://127.0.0.1:31002)"),
], ids=["full", "full, exit", "no size", "bad size", "name", "url", "id", "same urls"])
def test_bootstrap_discovery_failure_is_one_line_that_says_what_to_do(
    settings: Dict[str, Any], prepare: Callable[[_DiscRegistry], Any], words: str, tmp_path: Path,
    disc_registry: _DiscRegistry,
) -> None:
    prepare(disc_registry)
    text = _boot_fails(_boot_discovery(tmp_path, disc_registry.url, **settings))
    assert words in text
    assert disc_registry.url in text


def test_bootstrap_by_srv_records(
    tmp_path: Path, disc_dns: _DiscNameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    disc_dns.zone = {"_etcd-server._tcp.example.test": [(0, 0, 2380, "n1.example.test")]}
    monkeypatch.setattr(pyetcd, "name_servers", lambda: [disc_dns.address])
    config = _boot_config(
        tmp_path, name="me", initial_cluster="", discovery_srv="example.test",
        initial_advertise_peer_urls=("http://10.0.0.1:2380",))
    with _boot(config) as boot:
        (member,) = boot.cluster.members.values()
        assert (member.name, member.peer_urls) == ("me", ("http://n1.example.test:2380",))
    other = config._replace(
        data_dir=str(tmp_path / "other"), initial_advertise_peer_urls=("http://10.0.0.2:2380",))
    assert _boot_fails(other) == (
        'error setting up initial cluster: cannot find local etcd member "me" in SRV records')


def test_boot_first_life_asks_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 s, 0.2 s, ... up to 1.6 s; it begins again when a member has answered."""
    waits: List[float] = []
    calls: List[Dict[str, Any]] = []

    def call(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return types.SimpleNamespace(cancel=lambda: None)

    monkeypatch.setattr(pyetcd, "HttpCall", call)
    members = {
        number: pyetcd.Member(number, (f"http://10.0.0.{number}:2380",), f"m{number}", ())
        for number in (1, 2, 3)
    }
    etcd = types.SimpleNamespace(
        transport=types.SimpleNamespace(drop=None), stopping=False, member_id=1,
        reactor=types.SimpleNamespace(call_later=lambda delay_s, ask: waits.append(delay_s)),
        counts=types.SimpleNamespace(leader_changes=0),
        cluster=types.SimpleNamespace(members=members),
    )
    check = pyetcd.DataLossCheck(etcd, lambda error: None, None)
    for _ in range(7):
        check._ask()
    assert waits == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 1.6, 1.6])
    assert len(calls) == 2, "one call to a member at a time"
    assert {options["answer_max"] for options in calls} == {pyetcd.CALL_BODY_BYTES_MAX}
    body = json.dumps([
        {"id": "1", "peerURLs": ["http://10.0.0.1:2380"], "name": "m1", "clientURLs": []}])
    calls[0]["on_data"](body.encode())
    calls[0]["on_done"](None)
    check._ask()
    assert waits[-1] == pytest.approx(0.1)
    assert len(calls) == 2, "who has answered is not asked again"


def test_boot_answers_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a member or registry that sends without end, 4 MB are read."""
    sent = 0

    def serve(handler: Any) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.send_header("X-Etcd-Cluster-Id", "7")
        handler.end_headers()
        with contextlib.suppress(OSError):
            while sent < 200_000_000:
                handler.wfile.write(bytes(1 << 16))
                sent += 1 << 16

    sizes: List[int] = []
    monkeypatch.setattr(pyetcd, "parse_members", lambda body: sizes.append(len(body)))
    with contextlib.closing(HttpStub(serve)) as stub:
        pyetcd.fetch_cluster(stub.base, 20.0, None)
        registry = pyetcd.Discovery(f"{stub.base}/token", 1, "a=http://h:1")
        sizes.append(len(registry._send("GET", f"{stub.base}/v2/keys/token", 20.0, "")[2]))
    assert sizes == [4 << 20, 4 << 20]
    assert sent < 100_000_000


# -- bootstrap: addresses that nobody can reach ----------------------------------------------


_BOOT_OWN = "http://127.0.0.1:31002"


@pytest.fixture
def boot_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other member answers; this machine is 10.0.0.7 and knows which addresses are its own."""
    monkeypatch.setattr(pyetcd, "fetch_cluster", lambda *args, **options: None)
    monkeypatch.setattr(pyetcd, "default_route_address", lambda: "10.0.0.7")
    monkeypatch.setattr(pyetcd, "is_elsewhere", lambda url: "//10.0.0.8:" in url)


@pytest.mark.parametrize("own, other, words", [
    (_BOOT_OWN, "http://10.0.0.8:1",
     "the peer URL http://127.0.0.1:31002 of fixture can be reached from this machine only, but"
     " http://10.0.0.8:1 is another member's; write an address that all members can reach, e.g."
     " http://10.0.0.7:31002, in -initial-advertise-peer-urls and wherever the members are listed"),
    ("http://localhost:1", "http://10.0.0.8:1", "the peer URL http://localhost:1 of fixture"),
    ("http://0.0.0.0:1", "http://10.0.0.8:1", "the peer URL http://0.0.0.0:1 of fixture"),
    ("http://[::1]:1", "http://10.0.0.8:1", "the peer URL http://[::1]:1 of fixture"),
])
def test_bootstrap_loopback_among_other_hosts_is_refused(
    own: str, other: str, words: str, tmp_path: Path, boot_alone: None
) -> None:
    """etcd would wait for ever."""
    config = _boot_config(
        tmp_path, initial_cluster=f"fixture={own},b={other}", initial_advertise_peer_urls=(own,))
    assert words in _boot_fails(config)


@pytest.mark.parametrize("own, other, clients, warnings", [
    (_BOOT_OWN, "http://127.0.0.1:1", "http://127.0.0.1:2", []),
    (_BOOT_OWN, "http://localhost:1", "http://0.0.0.0:2", []),
    ("http://10.0.0.7:1", "http://10.0.0.8:1", "http://10.0.0.7:2", []),
    ("http://10.0.0.7:1", "http://b.test:1", "http://a.test:2", []),
    (_BOOT_OWN, "http://10.0.0.7:1", "http://10.0.0.7:2",
     ["the peer URL http://127.0.0.1:31002 of fixture can be reached from this machine only"]),
    (_BOOT_OWN, "http://b.test:1", "http://10.0.0.7:2",
     ["the peer URL http://127.0.0.1:31002 of fixture can be reached from this machine only"]),
    ("http://10.0.0.7:1", "http://127.0.0.1:1", "http://10.0.0.7:2",
     ["http://127.0.0.1:1 is listed for another member, but means this machine here"]),
    ("http://10.0.0.7:1", "http://10.0.0.8:1", "http://127.0.0.1:2",
     ["clients on other machines are told http://127.0.0.1:2, which is their own machine; set"
      " -advertise-client-urls to an address of this one, e.g. http://10.0.0.7:2"]),
])
def test_bootstrap_loopback_that_may_work_is_a_warning(
    own: str, other: str, clients: str, warnings: List[str], tmp_path: Path, boot_alone: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A name, or another address of this machine, may lead here."""
    config = _boot_config(
        tmp_path, initial_cluster=f"fixture={own},b={other}", initial_advertise_peer_urls=(own,),
        advertise_client_urls=(clients,))
    with _boot(config):
        pass
    found = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(found) == len(warnings)
    assert all(text.startswith(start) for text, start in zip(found, warnings))


def test_bootstrap_one_member_on_loopback_is_not_warned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with _boot(_boot_config(tmp_path)):
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_bootstrap_discovery_that_mixes_hosts_is_refused(
    tmp_path: Path, disc_registry: _DiscRegistry, boot_alone: None
) -> None:
    disc_registry.put("bbb", "b=http://10.0.0.8:1")
    disc_registry.put("ccc", "c=http://10.0.0.8:2")
    text = _boot_fails(_boot_discovery(tmp_path, disc_registry.url))
    assert "can be reached from this machine only" in text
    assert text.endswith("; then take a new discovery URL")


def test_bootstrap_only_addresses_of_others_are_elsewhere() -> None:
    """198.51.100.0/24 is for documentation (RFC 5737): no machine has it."""
    assert pyetcd.is_elsewhere("http://198.51.100.7:1")
    assert not pyetcd.is_elsewhere("http://127.0.0.1:1")
    assert not pyetcd.is_elsewhere("http://some.name:1")
    address = pyetcd.default_route_address()
    assert not address or not pyetcd.is_elsewhere(f"http://{address}:1")


# -- bootstrap: an existing cluster -------------------------------------------------------


class _BootPeer(HttpStub):
    """The peer port of a running member: /members and /version."""

    def __init__(self) -> None:
        self.members: List[Dict[str, Any]] = []
        self.version = "2.3.0"
        self.headers = {"X-Etcd-Cluster-Id": "c53239d6a4bed4f6"}
        self.status = 200
        super().__init__(self._answer)
        self.url = self.base

    def _answer(self, handler: Any) -> None:
        version = {"etcdserver": "2.3.8", "etcdcluster": self.version}
        value: Any = self.members if handler.path == "/members" else version
        handler.reply(self.status, json.dumps(value).encode(), **self.headers)

    def add(self, id: int, url: str, **more: Any) -> None:
        self.members.append({"id": id, "peerURLs": [url], **more})


@pytest.fixture
def boot_peer() -> Iterator[_BootPeer]:
    """A running member `a`, id 16197697275966332188, that knows of our URL, id 7."""
    peer = _BootPeer()
    peer.add(7, "http://127.0.0.1:31002")
    peer.add(16197697275966332188, peer.url, name="a", clientURLs=["http://127.0.0.1:31041"])
    yield peer
    peer.close()


def _boot_joining(path: Path, peer: _BootPeer, **settings: Any) -> pyetcd.ServerConfig:
    text = f"fixture=http://127.0.0.1:31002,a={peer.url}"
    return _boot_config(
        path, **{"initial_cluster": text, "initial_cluster_state": "existing", **settings})


def test_bootstrap_joining_member_takes_the_ids_of_the_cluster(
    tmp_path: Path, boot_peer: _BootPeer
) -> None:
    with _boot(_boot_joining(tmp_path, boot_peer)) as boot:
        assert boot.member_id == 7
        assert pyetcd.format_id(boot.cluster.id) == "c53239d6a4bed4f6"
        assert set(boot.cluster.members) == {7, 16197697275966332188}
        assert [member.id for member in boot.remotes] == [16197697275966332188]
        assert list(boot.bootstrap_entries) == []
        assert pyetcd.decode_metadata(boot.contents.metadata) == (7, boot.cluster.id)


def test_bootstrap_joining_member_takes_the_list_of_member_add(
    tmp_path: Path, boot_peer: _BootPeer
) -> None:
    """`etcdctl member add` prints `=url` for a member that was added and has not started yet."""
    boot_peer.add(8, "http://127.0.0.1:31008")
    boot_peer.add(9, "http://127.0.0.1:31009")
    text = (f"=http://127.0.0.1:31008,=http://127.0.0.1:31009,a={boot_peer.url},"
            f"fixture=http://127.0.0.1:31002")
    with _boot(_boot_joining(tmp_path, boot_peer, initial_cluster=text)) as boot:
        names = {id: member.name for id, member in boot.cluster.members.items()}
        assert names == {7: "fixture", 8: "", 9: "", 16197697275966332188: "a"}
    argv = ["-name=fixture", f"-initial-cluster={text}", "-initial-cluster-state=existing"]
    assert _flags_config(argv).initial_cluster == text
    with _flags_fails("Empty name given for http://127.0.0.1:31008"):
        _flags_config(argv[:-1])


def _boot_drop_us(peer: _BootPeer) -> None:
    del peer.members[0]


def _boot_move_us(peer: _BootPeer) -> None:
    peer.members[0]["peerURLs"] = ["http://127.0.0.1:1"]


@pytest.mark.parametrize("prepare, words", [
    (_boot_drop_us, "member count is unequal"),
    (_boot_move_us, "unmatched member while checking PeerURLs"),
    (lambda peer: setattr(peer, "version", "3.5.0"), "incompatible with current running cluster"),
    (lambda peer: setattr(peer, "version", "2.1.0"), "incompatible with current running cluster"),
    (lambda peer: setattr(peer, "version", "not_decided"), "incompatible with current running"),
    (lambda peer: setattr(peer, "headers", {}), "cannot fetch cluster info from peer urls"),
    (lambda peer: setattr(peer, "members", [1]), "cannot fetch cluster info from peer urls"),
    (lambda peer: setattr(peer, "status", 500), "cannot fetch cluster info from peer urls"),
    (lambda peer: peer.close(), "could not retrieve cluster information from the given urls"),
], ids=["count", "urls", "newer", "older", "no version", "no id", "garbage", "status", "down"])
def test_bootstrap_joining_fails_with_the_words_of_etcd(
    prepare: Callable[[_BootPeer], Any], words: str, tmp_path: Path
) -> None:
    peer = _BootPeer()
    peer.add(7, "http://127.0.0.1:31002")
    peer.add(8, peer.url, name="a", clientURLs=["http://127.0.0.1:31041"])
    try:
        prepare(peer)
        assert words in _boot_fails(_boot_joining(tmp_path, peer))
    finally:
        peer.close()


def test_bootstrap_joining_from_loopback_is_refused(
    tmp_path: Path, boot_peer: _BootPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyetcd, "is_elsewhere", lambda url: "//198.51.100.7:" in url)
    boot_peer.add(8, "http://198.51.100.7:1", name="b")
    text = f"fixture=http://127.0.0.1:31002,a={boot_peer.url},b=http://198.51.100.7:1"
    config = _boot_joining(tmp_path, boot_peer, initial_cluster=text)
    assert "can be reached from this machine only" in _boot_fails(config)


def test_bootstrap_member_with_a_past_is_refused(tmp_path: Path, boot_peer: _BootPeer) -> None:
    """Its data directory is gone, and with it the votes it gave."""
    config = _boot_joining(tmp_path, boot_peer, initial_cluster_state="new")
    own_id = pyetcd.member_id(("http://127.0.0.1:31002",), "fixture-token")
    boot_peer.members[0] = {"id": own_id, "peerURLs": ["http://127.0.0.1:31002"], "name": "fixture",
                            "clientURLs": ["http://127.0.0.1:31001"]}
    assert f"member {pyetcd.format_id(own_id)} has already been bootstrapped" in _boot_fails(config)
    boot_peer.members[0].pop("clientURLs")
    with _boot(config) as boot:
        assert boot.member_id == own_id


# -- bootstrap: restart ---------------------------------------------------------------------


def _boot_written(config: pyetcd.ServerConfig, entries: Sequence[pyetcd.Entry] = ()) -> None:
    """A first life: the bootstrap entries, and then `entries` that are not committed."""
    with _boot(config) as boot:
        first = list(boot.bootstrap_entries)
        state = pyetcd.HardState(1, 0, len(first))
        boot.wal.write(boot.wal.encode(state, [*first, *entries]), sync=True)


def test_bootstrap_log_decides_against_flags(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    _boot_written(_boot_config(tmp_path))
    caplog.clear()
    config = _boot_config(
        tmp_path, initial_cluster="", name="other", initial_cluster_token="x",
        discovery="http://127.0.0.1:1/token", initial_cluster_state="existing")
    with _boot(config) as boot:
        assert pyetcd.format_id(boot.member_id) == "a80a825915e9e126"
        assert pyetcd.format_id(boot.cluster.id) == "c2403409e85ab695"
        assert [entry.index for entry in boot.contents.entries] == [1]
        assert boot.contents.hard_state == pyetcd.HardState(1, 0, 1)
        assert list(boot.bootstrap_entries) == []
    assert (f"discovery token ignored since a cluster has already been initialized. Valid log found"
            f' at "{boot.data_dir.wal}"') in caplog.messages
    assert ("restart member a80a825915e9e126 in cluster c2403409e85ab695 at commit index 1"
            in caplog.messages)
    assert not any(message.startswith("initial cluster") for message in caplog.messages)


def test_bootstrap_names_the_flags_that_a_log_makes_void(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    _boot_written(_boot_config(tmp_path))
    for flags, void in (
        ({"initial_cluster": "fixture=http://127.0.0.1:31002,b=http://127.0.0.1:1"},
         "-initial-cluster, -initial-cluster-token"),
        ({}, "-initial-cluster-token"),         # it says what holds without it too
        ({"initial_cluster": "", "initial_cluster_token": "etcd-cluster",
          "initial_cluster_state": "existing", "discovery_srv": "example.test"},
         "-initial-cluster-state, -discovery-srv"),
        ({"initial_cluster": "", "initial_cluster_token": "etcd-cluster"}, ""),
    ):
        caplog.clear()
        with _boot(_boot_config(tmp_path, **flags)):
            lines = [line for line in caplog.messages if "its log counts" in line]
            assert lines == ([f"the member in {tmp_path}/d exists already, so its log counts and"
                              f" not {void}"] if void else [])


def test_bootstrap_peer_urls_that_do_nothing_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first mistake of whoever moves a member to another address."""
    ports = free_port(), free_port()
    for port in ports:
        url = f"http://127.0.0.1:{port}"
        with pyetcd.Server(
            data_dir=str(tmp_path / "d"), listen_peer_urls=[url], initial_advertise_peer_urls=[url]
        ) as server:
            assert server.wait_ready()
    known, given = (f"http://127.0.0.1:{port}" for port in ports)
    line = f"-initial-advertise-peer-urls {given} does nothing: the other members know this one by"
    assert [text for text in caplog.messages if "does nothing" in text] == [
        f"{line} {known}; change that with PUT /v2/members/{_boot_id(known)}"]


def _boot_id(url: str) -> str:
    return pyetcd.format_id(pyetcd.member_id([url], "etcd-cluster"))


def test_bootstrap_force_new_cluster_is_done_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a unit file it would throw the others out at each restart."""
    forced = _boot_config(tmp_path, force_new_cluster=True)
    with _boot(forced):
        pass
    assert "-force-new-cluster does nothing for a member without data; leave it out" in caplog.text
    _boot_written(_boot_config(tmp_path / "x"))
    forced = _boot_config(tmp_path / "x", force_new_cluster=True)
    with _boot(forced):
        assert "take -force-new-cluster out before the next start, which is refused" in caplog.text
    marker = f"{forced.data_dir}/member/forced-new-cluster"
    text = _boot_fails(forced)
    assert text.startswith("-force-new-cluster was already done on this data directory")
    assert text.endswith(f"remove {marker} first")
    with _boot(forced._replace(force_new_cluster=False)):
        pass
    os.unlink(marker)
    with _boot(forced):
        assert os.path.exists(marker)


def test_bootstrap_log_in_another_place_is_not_taken_for_none(tmp_path: Path) -> None:
    """The member would begin anew under the id that it had."""
    config = _boot_config(tmp_path)
    _boot_written(config)
    elsewhere = config._replace(wal_dir=str(tmp_path / "w"))
    assert f"but -wal-dir names {tmp_path}/w, which holds none" in _boot_fails(elsewhere)
    assert not (tmp_path / "w").exists()
    _boot_written(_boot_config(tmp_path / "y", wal_dir=str(tmp_path / "z")))
    snap = tmp_path / "y" / "d" / "member" / "snap" / "0000000000000001-0000000000000001.snap"
    snap.write_bytes(b"x")
    text = _boot_fails(_boot_config(tmp_path / "y"))
    assert f"{snap} is damaged" in text and "or give the right -wal-dir" in text


def _boot_with_a_snapshot(config: pyetcd.ServerConfig) -> List[Path]:
    """A log of three segments: entries 2-10, 11-20 and the record of snapshot 15, 21-30."""
    def entries(first: int) -> List[Entry]:
        return [Entry(0, 1, index, pyetcd.encode_request(Request(index, "PUT", "/1/k", "v" * 50)))
                for index in range(first, first + 10)]

    _boot_written(config)
    with _boot(config) as boot:
        wal = boot.wal
        for first in (2, 12, 22):
            state = pyetcd.HardState(1, 0, first + 9)
            wal.write(wal.encode(state, entries(first)), sync=True)
            if first == 12:
                wal.write(wal.encode_snapshot(pyetcd.EntryID(1, 15)), sync=True)
                snapshot = pyetcd.Snapshot(boot.store.save(), (boot.member_id,), 15, 1)
                boot.snapshotter.save(snapshot)
            if first < 22:
                wal.cut(wal.encode_cut())
    return sorted((Path(config.data_dir) / "member" / "wal").glob("*.wal"))


def _boot_halve(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [
    lambda files: [file.unlink() for file in files[1:]],
    lambda files: [files[2].unlink(), _boot_halve(files[1])],
    lambda files: [file.unlink() for file in files],
], ids=["newest deleted", "newest halved", "all deleted"])
@pytest.mark.parametrize("settings", [{}, {"force_new_cluster": True},
                                      {"initial_cluster_state": "existing"}],
                         ids=["as it was", "alone", "existing"])
def test_bootstrap_refuses_a_log_that_ends_before_an_intact_snapshot(
    tmp_path: Path, damage: Any, settings: Any
) -> None:
    """It started in the past, voted again, and led a cluster that neither committed nor agreed."""
    config = _boot_config(tmp_path, **settings)
    files = _boot_with_a_snapshot(_boot_config(tmp_path))
    damage(files)
    before = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(pyetcd.StartError) as caught:
        pyetcd.bootstrap(config)
    snap = Path(config.data_dir) / "member" / "snap" / "0000000000000001-000000000000000f.snap"
    text = str(caught.value)
    assert str(snap) in text and str(files[0].parent) in text and "pyetcd restore" in text
    assert "remove this member from the cluster" in text
    assert before == {
        str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if files[0].exists():
        with pytest.raises(pyetcd.BackupError, match="or restore"):
            pyetcd.backup(config.data_dir, str(tmp_path / "b"))
    pyetcd.restore(
        str(snap), "fixture", initial_cluster="fixture=http://127.0.0.1:31002",
        initial_cluster_token="new", data_dir=str(tmp_path / "new"),
        initial_advertise_peer_urls=["http://127.0.0.1:31002"])
    with _boot(_boot_config(tmp_path, data_dir=str(tmp_path / "new"))) as boot:
        assert boot.snapshot is not None


def test_bootstrap_takes_snapshots_older_than_the_log_knows(tmp_path: Path) -> None:
    """Their segments were purged; and one that was given up as broken is not looked at."""
    config = _boot_config(tmp_path)
    _boot_with_a_snapshot(config)
    snap = Path(config.data_dir) / "member" / "snap"
    good = (snap / "0000000000000001-000000000000000f.snap").read_bytes()
    (snap / "0000000000000001-0000000000000003.snap").write_bytes(good)
    (snap / "0000000000000001-0000000000000063.snap.broken").write_bytes(good[:-5])
    with _boot(config) as boot:
        assert boot.snapshot is not None and boot.snapshot.index == 15


@pytest.mark.parametrize("content", [b"", b"x", None])
def test_bootstrap_a_damaged_snapshot_proves_as_much(
    tmp_path: Path, content: Any
) -> None:
    """Its record was durable before the file was begun; and no file is touched."""
    config = _boot_config(tmp_path)
    _boot_with_a_snapshot(config)
    snap = Path(config.data_dir) / "member" / "snap"
    good = (snap / "0000000000000001-000000000000000f.snap").read_bytes()
    path = snap / "0000000000000001-0000000000000063.snap"
    path.write_bytes(good[:-5] if content is None else content)
    before = path.read_bytes()
    text = _boot_fails(config)
    assert "the end of the log is lost" in text and f"{path} is damaged" in text
    assert "pyetcd restore" not in text and path.read_bytes() == before


def test_bootstrap_crash_before_the_first_write_begins_again(tmp_path: Path) -> None:
    """Otherwise a member alone would be without a voter for ever."""
    with _boot(_boot_config(tmp_path)) as first:
        pass
    with _boot(_boot_config(tmp_path)) as second:
        assert second.bootstrap_entries == first.bootstrap_entries
        assert second.cluster.members == first.cluster.members
    with _boot(_boot_config(tmp_path, initial_cluster_token="another")) as third:
        assert list(third.bootstrap_entries) == []
        assert third.member_id == first.member_id


@pytest.fixture
def boot_recorded(tmp_path: Path) -> Path:
    """A copy of the data directory that etcd 2.3.8 wrote, below <path>/fixture.etcd."""
    with tarfile.open(TESTDATA / "datadir-2.3.8.tar.gz") as archive:
        for member in filter(tarfile.TarInfo.isfile, archive.getmembers()):
            content = archive.extractfile(member)
            assert content is not None
            (tmp_path / member.name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / member.name).write_bytes(content.read())
    return tmp_path


def test_bootstrap_restarts_on_the_recorded_data_directory(boot_recorded: Path) -> None:
    expected = json.loads((TESTDATA / "datadir-2.3.8.expected.json").read_text())
    config = _boot_config(boot_recorded, data_dir=str(boot_recorded / "fixture.etcd"))
    with _boot(config) as boot:
        assert boot.snapshot is not None
        assert (boot.snapshot.index, boot.snapshot.data) == (102, b"")
        assert pyetcd.format_id(boot.cluster.id) == expected["cluster_id"]
        assert [entry.index for entry in boot.contents.entries] == list(range(103, 125))
        assert boot.contents.hard_state.commit == 124
        assert [member.name for member in boot.cluster.members.values()] == ["fixture"]
        assert boot.store.value("/1/_hidden/secret") == "s"


def test_bootstrap_force_new_cluster_on_the_recorded_data_directory(
    boot_recorded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    config = _boot_config(
        boot_recorded, data_dir=str(boot_recorded / "fixture.etcd"), force_new_cluster=True)
    with _boot(config) as boot:
        assert boot.contents.entries[-1].index == 124       # it was alone: nobody to remove
        assert boot.contents.hard_state.commit == 124
    assert ("forcing restart of member a80a825915e9e126 in cluster c2403409e85ab695 at commit"
            " index 124") in caplog.messages


def test_bootstrap_force_new_cluster_removes_the_others_and_keeps_what_may_be_committed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Writes behind the commit index may have been acknowledged; the own removal ends them."""
    caplog.set_level(logging.INFO, "pyetcd")
    config = _boot_config(tmp_path, initial_cluster=(
        f"fixture=http://127.0.0.1:31002,b=http://127.0.0.1:{free_port()},"
        f"c=http://127.0.0.1:{free_port()}"))
    written = pyetcd.encode_request(Request(id=1, method="PUT", path="/1/a", val="kept"))
    own = pyetcd.member_id(["http://127.0.0.1:31002"], config.initial_cluster_token)
    change = pyetcd.encode_conf_change(
        pyetcd.ConfChange(0, pyetcd.ConfChangeType.REMOVE_NODE, own))
    _boot_written(config, [
        pyetcd.Entry(0, 1, 4, written), pyetcd.Entry(pyetcd.EntryType.CONF_CHANGE, 1, 5, change),
        pyetcd.Entry(0, 1, 6, written)])
    with _boot(config) as plain:
        assert [entry.index for entry in plain.contents.entries] == [1, 2, 3, 4, 5, 6]
        first = plain.contents.entries[:3]
        ids = [pyetcd.decode_conf_change(entry.data).node_id for entry in first]
        others = [id for id in sorted(ids) if id != plain.member_id]

    with _boot(config._replace(force_new_cluster=True)) as forced:
        assert forced.contents.entries[3].data == written
        added = [pyetcd.decode_conf_change(entry.data) for entry in forced.contents.entries[4:]]
        assert added == [
            pyetcd.ConfChange(0, pyetcd.ConfChangeType.REMOVE_NODE, other) for other in others]
        assert forced.contents.hard_state == pyetcd.HardState(1, 0, 6)
    assert "discarding 2 uncommitted WAL entries " in caplog.messages

    with _boot(config) as again:            # and it is all on disk
        assert again.contents.entries == forced.contents.entries
        assert again.contents.hard_state == forced.contents.hard_state


def test_bootstrap_force_new_cluster_adds_a_member_that_was_none(tmp_path: Path) -> None:
    """A joining member that never got its own addition can still be made the only one."""
    config = _boot_config(tmp_path)
    with _boot(config) as boot:
        member = pyetcd.Member(9, ("http://h:1",), "x")
        context = pyetcd.utf8(member.context_json())
        change = pyetcd.ConfChange(0, pyetcd.ConfChangeType.ADD_NODE, 9, context)
        entry = pyetcd.Entry(pyetcd.EntryType.CONF_CHANGE, 2, 1, pyetcd.encode_conf_change(change))
        boot.wal.write(boot.wal.encode(pyetcd.HardState(2, 0, 1), [entry]), sync=True)
    with _boot(config._replace(force_new_cluster=True)) as forced:
        changes = [pyetcd.decode_conf_change(entry.data) for entry in forced.contents.entries]
        assert [(c.type, c.node_id) for c in changes[1:]] == [
            (pyetcd.ConfChangeType.REMOVE_NODE, 9),
            (pyetcd.ConfChangeType.ADD_NODE, forced.member_id),
        ]
        assert b"http://127.0.0.1:31002" in (changes[2].context or b"")


def test_bootstrap_voters_follow_the_log() -> None:
    kinds = [(pyetcd.ConfChangeType.ADD_NODE, 3), (pyetcd.ConfChangeType.REMOVE_NODE, 1),
             (pyetcd.ConfChangeType.UPDATE_NODE, 2), (pyetcd.ConfChangeType.REMOVE_NODE, 9)]
    entries = [
        pyetcd.Entry(pyetcd.EntryType.CONF_CHANGE, 1, index,
                     pyetcd.encode_conf_change(pyetcd.ConfChange(0, kind, id)))
        for index, (kind, id) in enumerate(kinds, 1)
    ]
    assert pyetcd._voters([1, 2], [*entries, pyetcd.Entry(0, 1, 5, b"")]) == {2, 3}


def test_bootstrap_snapshot_of_something_else_is_refused(
    boot_recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyetcd.Snapshotter, "load", lambda *args: pyetcd.Snapshot(
        b"[]", (1,), 102, 2))
    config = _boot_config(boot_recorded, data_dir=str(boot_recorded / "fixture.etcd"))
    with pytest.raises(pyetcd.StartError, match="snapshot at index 102 does not hold a v2 store"):
        pyetcd.bootstrap(config)


def test_bootstrap_dedicated_wal_dir(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    config = _boot_config(tmp_path, wal_dir=str(tmp_path / "w"))
    with _boot(config):
        assert list((tmp_path / "w").glob("*.wal"))
        assert not list((tmp_path / "d" / "member").glob("wal/*"))
    assert f"dedicated WAL dir = {tmp_path}/w" in caplog.messages


def test_bootstrap_unusable_log_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _boot_written(_boot_config(tmp_path))

    def locked(*args: Any, **options: Any) -> None:
        raise pyetcd.FileLocked("open wal error: file already locked; stop the other member")

    monkeypatch.setattr(pyetcd.Wal, "open", locked)
    with pytest.raises(pyetcd.StartError, match="^open wal error: file already locked"):
        pyetcd.bootstrap(_boot_config(tmp_path))


def test_bootstrap_unwritable_data_dir_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("a file")
    assert str(tmp_path / "d") in _boot_fails(_boot_config(tmp_path))
