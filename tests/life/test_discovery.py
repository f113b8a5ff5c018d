"""Discovery, and Bootstrap."""

from __future__ import annotations

import json
import logging
import socket
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest

import pyetcd
from tests.kit.basics import free_port
from tests.kit.flags import _flags_config
from tests.kit.http import _BAD_HOSTS
from tests.kit.registries import (
    _DISC_TOKEN,
    _disc_fill,
    _disc_set_size,
    _disc_sleepless,
    _DiscNameServer,
    _DiscRegistry,
)

_DISC_ARTICLE_URL = f"https://discovery.etcd.io/{_DISC_TOKEN}"
_DISC_ARTICLE = {
    "machine1": ("http://127.0.0.1:2380", 0xA956683CC771BA75),
    "machine2": ("http://127.0.0.1:22380", 0x2307DAD4EC70BE21),
    "machine3": ("http://127.0.0.1:32380", 0x6693DB807CA7130F),
}


def _disc_join(
    registry: _DiscRegistry, member_id: int, pairs: str,
    sleep: Callable[[float], None] = _disc_sleepless,
) -> str:
    return pyetcd.Discovery(registry.url, member_id, pairs, sleep=sleep).join()


# -- token discovery -----------------------------------------------------------


def test_discovery_ids_of_the_article() -> None:
    """Discovery URL and peer URLs of the article give its member ids and its cluster id."""
    ids = {}
    for name, (url, expected) in _DISC_ARTICLE.items():
        ids[name] = pyetcd.member_id((url,), _DISC_ARTICLE_URL)
        assert ids[name] == expected
    assert pyetcd.format_id(pyetcd.cluster_id(ids.values())) == "31fef011866a5fd7"


def test_discovery_requests_are_those_of_etcd(
    disc_registry: _DiscRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    late = ["b=http://h:2", "c=http://h:3"]
    disc_registry.on_wait = lambda: late and disc_registry.put(
        {2: "bbb", 1: "ccc"}[len(late)], late.pop(0)) and None
    assert _disc_join(disc_registry, 0xAAA, "a=http://h:1") == (
        "a=http://h:1,b=http://h:2,c=http://h:3")
    path = disc_registry.prefix
    options = "?quorum=false&recursive=false&sorted=false"
    check = [f"GET {path}/_config/size{options}", f"GET {path}{options}"]
    assert disc_registry.requests == [
        *check,
        f"PUT {path}/aaa?prevExist=false",
        f"GET {path}/aaa?recursive=false&wait=true&waitIndex=5",
        *check,
        f"GET {path}?recursive=true&wait=true&waitIndex=6",
        f"GET {path}?recursive=true&wait=true&waitIndex=7",
    ]
    assert disc_registry.forms[2] == "value=a%3Dhttp%3A%2F%2Fh%3A1"
    assert caplog.messages == [
        "found self aaa in the cluster",
        "found 1 peer(s), waiting for 2 more",
        "found peer bbb in the cluster",
        "found 2 peer(s), waiting for 1 more",
        "found peer ccc in the cluster",
        "found 3 needed peer(s)",
    ]


def test_discovery_three_members_find_each_other(disc_registry: _DiscRegistry) -> None:
    results: Dict[int, Dict[str, Any]] = {}

    def join(number: int) -> None:
        text = _disc_join(disc_registry, number, f"m{number}=http://h:{number}")
        results[number] = pyetcd.parse_initial_cluster(text)

    threads = [threading.Thread(target=join, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    expected = {f"m{number}": (f"http://h:{number}",) for number in (1, 2, 3)}
    assert results == {1: expected, 2: expected, 3: expected}


def test_discovery_only_new_registrations_count(disc_registry: _DiscRegistry) -> None:
    """A changed size, a changed or deleted registration is no member (etcd counts them)."""
    disc_registry.put("bbb", "b=http://h:2")
    events = [("bbb", "b=http://h:2", "set"), ("_config", "", "create"), ("ddd", "", "delete"),
              ("ccc", "c=http://h:3", "create")]
    disc_registry.on_wait = lambda: events and disc_registry.put(*events.pop(0)) and None
    text = _disc_join(disc_registry, 0xAAA, "a=http://h:1")
    assert sorted(text.split(",")) == ["a=http://h:1", "b=http://h:2", "c=http://h:3"]


def test_discovery_takes_the_oldest_registrations(disc_registry: _DiscRegistry) -> None:
    disc_registry.put("bbb", "b=http://h:2")
    disc_registry.put("ccc", "c=http://h:3")
    assert _disc_join(disc_registry, 0xAAA, "a=http://h:1") == (
        "b=http://h:2,c=http://h:3,a=http://h:1")


def test_discovery_name_that_does_not_resolve_is_tried_again(
    disc_registry: _DiscRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that fails for a moment is no reason to end the start."""
    resolve = socket.getaddrinfo
    waits: List[float] = []

    def flaky(host: Any, *args: Any, **options: Any) -> Any:
        if host == "registry.test" and not waits:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve("127.0.0.1" if host == "registry.test" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", flaky)
    url = disc_registry.url.replace("127.0.0.1", "registry.test")
    for name in ("bbb", "ccc"):
        disc_registry.put(name, f"{name}=http://{name}:1")
    found = pyetcd.Discovery(url, 0xAAA, "a=http://h:1", sleep=waits.append).join()
    assert "a=http://h:1" in found and waits == [2.0]


def test_discovery_retries_while_unreachable_with_growing_waits(
    caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    port = free_port()
    waits: List[float] = []
    started: List[_DiscRegistry] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 10:
            started.append(_DiscRegistry(port, "1"))

    url = f"http://127.0.0.1:{port}/v2/keys/_etcd/registry/{_DISC_TOKEN}"
    try:
        assert pyetcd.Discovery(url, 1, "a=http://h:1", sleep=sleep).join() == "a=http://h:1"
    finally:
        for registry in started:
            registry.close()
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, 256, 256]
    assert caplog.messages[0].startswith("error #0: GET http://127.0.0.1")
    assert "connection refused" in caplog.messages[0]
    assert caplog.messages[1] == (
        f"cluster status check: error connecting to http://127.0.0.1:{port}, retrying in 2s")
    assert caplog.messages[19].endswith("retrying in 4m16s")


def test_discovery_server_errors_are_retried(
    disc_registry: _DiscRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    disc_registry.put("bbb", "b=http://h:2")
    waits: List[float] = []
    disc_registry.answers = [(503, b"busy")]

    def fail_once() -> None:
        if len(waits) == 1:
            disc_registry.answers = [(500, b"")]    # the look after the failed wait
            raise ConnectionError("cut")
        disc_registry.put("ccc", "c=http://h:3")

    disc_registry.on_wait = fail_once
    disc_registry._server.handle_error = lambda *args: None     # type: ignore[method-assign]
    text = _disc_join(disc_registry, 0xAAA, "a=http://h:1", waits.append)
    assert text == "b=http://h:2,a=http://h:1,c=http://h:3"
    assert waits == [2, 4, 8]
    steps = [line.partition(":")[0] for line in caplog.messages if "retrying" in line]
    assert steps == ["cluster status check", "waiting for other nodes", "cluster status check"]


def test_discovery_follows_redirects(disc_registry: _DiscRegistry) -> None:
    disc_registry.put("bbb", "b=http://h:2")
    disc_registry.put("ccc", "c=http://h:3")
    options = "?quorum=false&recursive=false&sorted=false"
    disc_registry.answers = [
        (307, f"{disc_registry.url}/_config/size{options}".encode()),
    ]
    assert "a=http://h:1" in _disc_join(disc_registry, 0xAAA, "a=http://h:1")


def test_discovery_gives_up_a_redirect_loop(disc_registry: _DiscRegistry) -> None:
    disc_registry.answers = [(307, disc_registry.url.encode())] * 10
    waits: List[float] = []
    disc_registry.put("bbb", "b=http://h:2")
    disc_registry.put("ccc", "c=http://h:3")
    _disc_join(disc_registry, 0xAAA, "a=http://h:1", waits.append)
    assert waits == [2]


@pytest.mark.parametrize("body", [b"", b'{"action":"set","node":{"key":"/x","modifiedIndex":1}}'],
                         ids=["empty", "old news"])
def test_discovery_asks_a_registry_that_ends_waits_less_and_less_often(
    disc_registry: _DiscRegistry, body: bytes
) -> None:
    """It was asked 4,015 times in 3 s."""
    waits: List[float] = []
    disc_registry.put("bbb", "b=http://h:2")

    def end() -> Any:
        if len(waits) == 10:
            disc_registry.put("ccc", "c=http://h:3")
            return None
        return (200, body)

    disc_registry.on_wait = end
    assert "c=http://h:3" in _disc_join(disc_registry, 0xAAA, "a=http://h:1", waits.append)
    first, most = pyetcd.DISCOVERY_PAUSE_SECONDS, pyetcd.DISCOVERY_PAUSE_SECONDS_MAX
    assert waits == [min(first * 2**number, most) for number in range(10)]
    assert len(disc_registry.requests) < 25


def test_discovery_empty_answer_to_a_wait_is_asked_again(disc_registry: _DiscRegistry) -> None:
    """Proxies in between end a long poll like this."""
    disc_registry.put("bbb", "b=http://h:2")

    def end_the_wait() -> Tuple[int, bytes]:
        disc_registry.on_wait = lambda: disc_registry.put("ccc", "c=http://h:3") and None
        return 200, b""

    disc_registry.on_wait = end_the_wait
    assert "c=http://h:3" in _disc_join(disc_registry, 0xAAA, "a=http://h:1")


def test_discovery_https_through_a_proxy_asks_for_a_tunnel(
    disc_registry: _DiscRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(Exception):
        pass

    def sleep(seconds: float) -> None:
        raise Stop

    proxy = disc_registry.url.partition("/v2")[0]
    with pytest.raises(Stop):
        pyetcd.Discovery("https://h.invalid/t", 1, "a=http://h:1", proxy=proxy, sleep=sleep).join()
    assert "Tunnel connection failed: 501" in caplog.text


@pytest.mark.parametrize("prepare, error, text", [
    (lambda r: r._nodes.clear(), pyetcd.DiscoveryError, "discovery: size key not found"),
    (_disc_set_size("many"), pyetcd.DiscoveryError, "discovery: size key is bad"),
    (_disc_set_size("0"), pyetcd.DiscoveryError, "discovery: size key is bad"),
    (_disc_set_size("-1"), pyetcd.DiscoveryError, "discovery: size key is bad"),
    (_disc_set_size(""), pyetcd.DiscoveryError, "discovery: size key is bad"),
    (_disc_fill("b", "c", "d"), pyetcd.DiscoveryFull, "discovery: cluster is full"),
    (_disc_fill("b", "c", "d", "aaa"), pyetcd.DiscoveryFull, "discovery: cluster is full"),
    (_disc_fill("aaa"), pyetcd.DuplicateId, "discovery: found duplicate id"),
    (_disc_fill("aaa", "b", "c"), pyetcd.DuplicateId, "discovery: found duplicate id"),
    (lambda r: (r.put("b", "a=http://b:1"), r.put("c", "c=http://c:1")), pyetcd.DuplicateName,
     "discovery: found duplicate name"),
    (lambda r: (r.put("b", "nonsense"), r.put("c", "c=http://c:1")), pyetcd.DiscoveryError,
     "discovery: invalid URL"),
    (lambda r: r.answers.append((200, b"<html>")), pyetcd.DiscoveryError,
     "discovery: bad discovery endpoint"),
    (lambda r: r.answers.append((200, b"[1]")), pyetcd.DiscoveryError,
     "discovery: bad discovery endpoint"),
    (lambda r: r.answers.append((404, b"404 page not found\n")), pyetcd.DiscoveryError,
     "discovery: bad discovery endpoint"),
    (lambda r: r.answers.append((401, b'{"errorCode":110,"message":"no","cause":"c"}')),
     pyetcd.DiscoveryError, "110: no (c)"),
], ids=["no size", "size not a number", "size 0", "size negative", "size empty", "full",
        "full goes before duplicate", "duplicate id", "duplicate id at last place",
        "duplicate name", "bad pairs", "no json", "no object", "not found", "other error"])
def test_discovery_fails_with_the_words_of_etcd(
    prepare: Callable[[_DiscRegistry], Any], error: type, text: str, disc_registry: _DiscRegistry
) -> None:
    prepare(disc_registry)
    with pytest.raises(pyetcd.DiscoveryError) as caught:
        _disc_join(disc_registry, 0xAAA, "a=http://h:1")
    assert type(caught.value) is error
    assert str(caught.value) == text


@pytest.mark.parametrize("is_done", [True, False])
def test_discovery_lost_registration_is_looked_for(
    is_done: bool, disc_registry: _DiscRegistry
) -> None:
    """The write may have been done: what stands there decides, not its answer."""
    ok = json.dumps({"node": {"value": "3"}}).encode()
    disc_registry.answers = [(200, ok), (200, b'{"node":{"dir":true}}'), (503, b"")]

    def sleep(seconds: float) -> None:
        if is_done:
            disc_registry.put("aaa", "a=http://localhost:1")
        disc_registry.put("bbb", "b=http://h:2")
        disc_registry.put("ccc", "c=http://h:3")

    text = _disc_join(disc_registry, 0xAAA, "a=http://localhost:1", sleep)
    assert sorted(text.split(",")) == ["a=http://localhost:1", "b=http://h:2", "c=http://h:3"]
    assert sum(request.startswith("PUT") for request in disc_registry.requests) == 2


def test_discovery_lost_answer_about_the_registration_is_no_failure(
    disc_registry: _DiscRegistry
) -> None:
    """The key is there; the next look shows it."""
    disc_registry.put("bbb", "b=http://h:2")
    disc_registry.put("ccc", "c=http://h:3")
    answer = disc_registry._answer
    lost: List[str] = []

    def lose_the_wait(handler: Any, form: str) -> Tuple[int, bytes]:
        if "/aaa?recursive" in handler.path:
            lost.append(handler.path)
            return 503, b""
        return answer(handler, form)

    disc_registry._answer = lose_the_wait       # type: ignore[method-assign]
    text = _disc_join(disc_registry, 0xAAA, "a=http://h:1")
    assert lost and text.endswith("a=http://h:1")


@pytest.mark.parametrize("full", [False, True])
def test_discovery_member_restarted_while_it_waits_goes_on(
    full: bool, disc_registry: _DiscRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    disc_registry.put("aaa", "a=http://h:1")
    disc_registry.put("bbb", "b=http://h:2")
    if full:
        disc_registry.put("ccc", "c=http://h:3")
    else:
        disc_registry.on_wait = lambda: (disc_registry.put("ccc", "c=http://h:3"), None)[1]
    text = _disc_join(disc_registry, 0xAAA, "a=http://h:1")
    assert sorted(text.split(",")) == ["a=http://h:1", "b=http://h:2", "c=http://h:3"]
    assert "found the registration of this member, which an earlier try has made" in caplog.messages


def test_discovery_registration_of_localhost_elsewhere_may_be_of_another_machine(
    disc_registry: _DiscRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines with the default URLs would wait for ever."""
    monkeypatch.setattr(pyetcd, "is_local", lambda url: "localhost" in url)
    disc_registry.put("aaa", "a=http://localhost:1")
    with pytest.raises(pyetcd.DuplicateId):
        _disc_join(disc_registry, 0xAAA, "a=http://localhost:1")


def test_discovery_registry_that_does_not_answer_is_explained_once(
    caplog: pytest.LogCaptureFixture, disc_registry: _DiscRegistry
) -> None:
    disc_registry.answers = [(503, b""), (503, b"")]
    disc_registry.put("bbb", "b=http://h:2")
    disc_registry.put("ccc", "c=http://h:3")
    _disc_join(disc_registry, 0xAAA, "a=http://h:1", lambda seconds: None)
    lines = [line for line in caplog.messages if line.startswith("error #0")]
    assert len(lines) == 2
    assert "no discovery service answers at http://127.0.0.1" in lines[0]
    assert "curl 'http://MACHINE:2379/new?size=3'" in lines[0] and "curl" not in lines[1]
    public = pyetcd._registry_advice("https://discovery.etcd.io")
    assert public.startswith("the public discovery service is out of use; any pyetcd that is not a")


@pytest.mark.parametrize("url, advice", [
    ("http://h:4001/new?size=5", "run `curl 'http://h:4001/new?size=5'` once"),
    ("http://h:4001/new", "run `curl 'http://h:4001/new?size=3'` once"),
    ("http://h:4001/new/", "run `curl 'http://h:4001/new?size=3'` once"),
    ("https://discovery.etcd.io/new?size=3", "the public discovery service is out of use"),
    ("http://h/t?size=3", "it must end with the token; perhaps http://h/t"),
    ("http://h/v2/keys/t/_config/size", "it must end with the token; perhaps http://h/v2/keys/t"),
    *((url.replace(":2380", ":2380/t"), "it must read") for url in _BAD_HOSTS if ":2380" in url),
])
def test_discovery_url_that_is_none_is_explained(url: str, advice: str) -> None:
    with pytest.raises(pyetcd.DiscoveryError, match="^discovery: invalid URL ") as caught:
        pyetcd.check_discovery_url(url)
    assert advice in str(caught.value) and "\n" not in str(caught.value)


def test_discovery_url_in_upper_case_is_the_same_token() -> None:
    url = "HTTP://h:4001/v2/keys/T"
    assert pyetcd.check_discovery_url(url) == "http://h:4001/v2/keys/T"
    assert _flags_config(["-discovery", url]).discovery == "http://h:4001/v2/keys/T"


def test_discovery_through_a_proxy_sends_whole_urls(
    disc_registry: _DiscRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    proxy = disc_registry.url[len("http://"):].partition("/")[0]
    disc_registry.prefix = f"http://registry.invalid{disc_registry.prefix}"
    disc_registry.put("bbb", "b=http://h:2")
    disc_registry.put("ccc", "c=http://h:3")
    url = disc_registry.prefix
    text = pyetcd.Discovery(url, 0xAAA, "a=http://h:1", proxy=proxy, sleep=_disc_sleepless).join()
    assert text.endswith("a=http://h:1")
    assert caplog.messages[0] == f'using proxy "http://{proxy}"'
    assert disc_registry.requests[2] == f"PUT {url}/aaa?prevExist=false"


@pytest.mark.parametrize("url", [
    "", "discovery.etcd.io/x", "ftp://h/x", "http:///x", "http://h", "http://h/", "http://h:x/t",
    "http://h/a b",
])
def test_discovery_url_must_be_one(url: str) -> None:
    with pytest.raises(pyetcd.DiscoveryError, match="discovery: invalid URL"):
        pyetcd.Discovery(url, 1, "a=http://h:1")


def test_discovery_reads_the_listing_of_the_article() -> None:
    """The public service wrote indices as floats."""
    nodes = [
        {"createdIndex": 780133027.0, "modifiedIndex": 780133027.0,
         "value": "machine3=http://127.0.0.1:32380", "key": "/_etcd/registry/t/6693db807ca7130f"},
        {"createdIndex": 780132766.0, "modifiedIndex": 780132766.0,
         "value": "machine1=http://127.0.0.1:2380", "key": "/_etcd/registry/t/a956683cc771ba75"},
    ]
    found = [pyetcd._registration(node) for node in nodes]
    assert min(found, key=lambda r: r.created_index) == pyetcd.Registration(
        "a956683cc771ba75", "machine1=http://127.0.0.1:2380", 780132766)


def _disc_srv(server: _DiscNameServer, domain: str = "example.test") -> str:
    return pyetcd.srv_cluster(domain, "me", ["http://10.0.0.1:2380"], [server.address])


def test_discovery_srv_gives_the_initial_cluster(
    disc_dns: _DiscNameServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    assert _disc_srv(disc_dns) == (
        "0=https://n4.example.test:7001,me=http://n1.example.test:2380,"
        "1=http://n3.example.test:2380,2=http://n2.example.test:2380")
    assert disc_dns.queries == [
        "_etcd-server-ssl._tcp.example.test", "_etcd-server._tcp.example.test"]
    assert ("got bootstrap from DNS for etcd-server at http://n1.example.test:2380"
            in caplog.messages)
    assert "couldn't resolve host gone.example.test: name or service not known" in caplog.messages


def test_discovery_srv_truncated_answer_is_asked_for_by_tcp(disc_dns: _DiscNameServer) -> None:
    plain = _disc_srv(disc_dns)
    disc_dns.truncate = True
    assert _disc_srv(disc_dns) == plain
    assert len(disc_dns.queries) == 6


def test_discovery_srv_one_service_is_enough(
    disc_dns: _DiscNameServer, caplog: pytest.LogCaptureFixture
) -> None:
    del disc_dns.zone["_etcd-server-ssl._tcp.example.test"]
    assert _disc_srv(disc_dns).startswith("me=http://n1.example.test:2380,0=")
    assert caplog.messages[0].startswith("error querying DNS SRV records for _etcd-server-ssl ")
    assert "no such host" in caplog.messages[0]


@pytest.mark.parametrize("garbage", [False, True])
def test_discovery_srv_fails_without_records(garbage: bool, disc_dns: _DiscNameServer) -> None:
    disc_dns.garbage = garbage
    domain = "example.test" if garbage else "other.test"
    with pytest.raises(pyetcd.DiscoveryError, match="^SRV discovery failed: too many errors"):
        _disc_srv(disc_dns, domain)


def test_discovery_srv_next_name_server_is_asked(disc_dns: _DiscNameServer) -> None:
    dead = ("127.0.0.1", free_port())
    records = pyetcd.lookup_srv("_etcd-server-ssl._tcp.example.test", [dead, disc_dns.address])
    assert records == [pyetcd.SrvRecord(0, 0, 7001, "n4.example.test")]


@pytest.mark.parametrize("answer", [
    b"\x81\x82" + bytes(8), b"\x81\x85" + bytes(8), b"\x81\x80\0\1\0\1\0\0\0\0\xc0", b"\x83\x80",
], ids=["misbehaving", "refused", "malformed", "truncated"])
def test_discovery_srv_any_failure_leads_to_the_next_name_server(
    answer: bytes, disc_dns: _DiscNameServer
) -> None:
    """What is wrong with one name server says nothing of the others."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bad:
        bad.bind(("127.0.0.1", 0))

        def serve() -> None:
            query, asker = bad.recvfrom(512)
            bad.sendto(query[:2] + answer.ljust(10, b"\0"), asker)
        thread = threading.Thread(target=serve)
        thread.start()
        unreachable = ("1:2", 53)       # as a strange line of resolv.conf
        servers = [unreachable, bad.getsockname(), disc_dns.address]
        found = pyetcd.lookup_srv("_etcd-server-ssl._tcp.example.test", servers)
        thread.join()
    assert found == [pyetcd.SrvRecord(0, 0, 7001, "n4.example.test")]
    assert len(disc_dns.queries) == 1


def test_discovery_srv_no_name_server_answers() -> None:
    dead = ("127.0.0.1", free_port())
    with pytest.raises(OSError, match="lookup x.test on 127.0.0.1"):
        pyetcd.lookup_srv("x.test", [dead])


def test_discovery_srv_silent_name_server_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyetcd, "DNS_ANSWER_SECONDS", 0.02)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="lookup x.test on 127.0.0.1: i/o timeout"):
            pyetcd.lookup_srv("x.test", [silent.getsockname()])


def test_discovery_srv_name_without_records(disc_dns: _DiscNameServer) -> None:
    disc_dns.zone["empty.test"] = []
    with pytest.raises(OSError, match="lookup empty.test: no such host"):
        pyetcd.lookup_srv("empty.test", [disc_dns.address])


def test_discovery_srv_own_host_must_resolve(disc_dns: _DiscNameServer) -> None:
    with pytest.raises(pyetcd.DiscoveryError, match="couldn't resolve host gone.example.test"):
        pyetcd.srv_cluster("example.test", "me", ["http://gone.example.test:1"], [disc_dns.address])


def test_discovery_srv_looping_name_is_refused() -> None:
    with pytest.raises(IndexError):
        pyetcd._dns_name(b"\xc0\x00", 0)


@pytest.mark.parametrize("text, expected", [
    ("# x\nnameserver 10.0.0.1\nsearch a\nnameserver ::1\n", [("10.0.0.1", 53), ("::1", 53)]),
    ("", [("127.0.0.1", 53)]),
    (None, [("127.0.0.1", 53)]),
], ids=str)
def test_discovery_name_servers_of_the_system(
    text: Optional[str], expected: List[Tuple[str, int]], tmp_path: Path
) -> None:
    path = tmp_path / "resolv.conf"
    if text is not None:
        path.write_text(text)
    assert pyetcd.name_servers(str(path)) == expected


# -- the discovery service ----------------------------------------------------------


class _DiscRequest:
    """What DiscoveryService uses of an HttpRequest."""

    def __init__(
        self, method: str, target: str, body: bytes = b"", headers: Optional[Dict[str, str]] = None
    ) -> None:
        if headers is None:
            headers = {"host": "127.0.0.1:4001"}
        self.head = pyetcd.HttpHead(method, target, 1, headers)
        self.body, self.scheme, self.body_too_large = body, "http", False
        self.replies: List[Tuple[Any, ...]] = []

    method = property(lambda self: self.head.method)
    path = property(lambda self: self.head.path)
    query = property(lambda self: self.head.query)
    headers = property(lambda self: self.head.headers)

    def reply(self, *args: Any) -> None:
        self.replies.append(args)


class _DiscServer:
    """A DiscoveryService with what it was given to do."""

    def __init__(self, result: Any = None) -> None:
        self.done: List[pyetcd.Request] = []
        self.forwarded: List[str] = []
        self._result = result
        self.service = pyetcd.DiscoveryService(
            self._do, self._keys, lambda: 10**18)   # type: ignore[arg-type]

    def ask(self, *args: Any, **options: Any) -> Tuple[bool, List[Tuple[Any, ...]]]:
        request = _DiscRequest(*args, **options)
        return self.service.handle(request), request.replies    # type: ignore[arg-type]

    def _do(self, request: pyetcd.Request, done: Callable[[Any], None]) -> None:
        self.done.append(request)
        done(self._result)

    def _keys(self, request: _DiscRequest) -> None:
        self.forwarded.append(f"{request.method} {request.head.target}")


def test_discovery_service_makes_tokens_on_itself() -> None:
    server = _DiscServer()
    handled, replies = server.ask("GET", "/new?size=5")
    assert handled
    (request,) = server.done
    token = request.path.split("/")[4]
    assert request == pyetcd.Request(
        method="PUT", path=f"/1/_etcd/registry/{token}/_config/size", val="5", prev_exist=False)
    assert len(token) == 32 and not token.strip("0123456789abcdef")
    assert replies == [
        (200, f"http://127.0.0.1:4001/{token}".encode(), "text/plain; charset=utf-8", "")]


@pytest.mark.parametrize("method, target, body, size", [
    ("GET", "/new", b"", "3"), ("GET", "/new?size=", b"", "3"), ("POST", "/new", b"size=7", "7"),
    ("PUT", "/new?size=1", b"", "1"), ("POST", "/new?size=4", b"size=2", "2"),
])
def test_discovery_service_size(method: str, target: str, body: bytes, size: str) -> None:
    server = _DiscServer()
    server.ask(method, target, body)
    assert server.done[0].val == size


@pytest.mark.parametrize("size, text", [
    ("abc", b'strconv.Atoi: parsing "abc": invalid syntax\n'),
    ("-1", b'strconv.Atoi: parsing "-1": invalid syntax\n'),
    ("0", b"size=0: a cluster has at least one member\n"),
    ("9" * 30, b"size=99999999999999999999: a cluster has at least one member\n"),
])
def test_discovery_service_refuses_a_bad_size(size: str, text: bytes) -> None:
    server = _DiscServer()
    _, replies = server.ask("GET", f"/new?size={size}")
    assert replies[0][:2] == (400, text)
    assert server.done == []


def test_discovery_service_says_when_the_store_fails() -> None:
    server = _DiscServer(pyetcd.RaftInternal("etcdserver: request timed out"))
    _, replies = server.ask("GET", "/new")
    assert replies[0][:2] == (400, b"Unable to generate token: etcdserver: request timed out\n")


def test_discovery_service_needs_a_host() -> None:
    _, replies = _DiscServer().ask("GET", "/new", headers={})
    assert replies[0][:2] == (400, b"missing Host header\n")


@pytest.mark.parametrize("method, target, answer", [
    ("GET", "", "keys"), ("GET", "/", "keys"), ("PUT", "", "keys"), ("DELETE", "", 405),
    ("POST", "/", 405), ("GET", "/abc?wait=true", "keys"), ("PUT", "/abc?prevExist=false", "keys"),
    ("DELETE", "/abc", "keys"), ("POST", "/abc", 405),
    ("GET", "/_config/size?quorum=false", "keys"),
    ("PUT", "/_config/size", 405), ("GET", "/a/b", None), ("HEAD", "/abc", 405),
])
def test_discovery_service_serves_tokens_through_the_keys_api(
    method: str, target: str, answer: Any
) -> None:
    server = _DiscServer()
    handled, replies = server.ask(method, f"/{_DISC_TOKEN}{target}")
    assert handled is (answer is not None)
    if answer == "keys":
        assert server.forwarded == [f"{method} /v2/keys/_etcd/registry/{_DISC_TOKEN}{target}"]
    elif answer:
        assert replies == [(answer,)]


@pytest.mark.parametrize("path", ["/", "/newer", "/new/", "/v2/keys/new", "/" + "a" * 31,
                                  "/" + "A" * 32, "/" + "g" * 32, "/" + "a" * 33])
def test_discovery_service_leaves_other_paths_alone(path: str) -> None:
    server = _DiscServer()
    assert server.ask("GET", path) == (False, [])


def test_discovery_forgotten_events_lead_to_a_new_look(disc_registry: _DiscRegistry) -> None:
    disc_registry.put("bbb", "b=http://h:2")
    cleared = b'{"errorCode":401,"message":"The event in requested index is outdated and cleared"}'

    def forget() -> Tuple[int, bytes]:
        disc_registry.on_wait = lambda: None
        disc_registry.put("ccc", "c=http://h:3")
        return 400, cleared

    disc_registry.on_wait = forget
    waits: List[float] = []
    text = _disc_join(disc_registry, 0xAAA, "a=http://h:1", waits.append)
    assert sorted(text.split(",")) == ["a=http://h:1", "b=http://h:2", "c=http://h:3"]
    assert waits == [2]
