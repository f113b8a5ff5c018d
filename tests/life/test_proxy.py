"""Proxy: a door to a cluster, over real sockets."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import types
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
import requests

import pyetcd
from tests.kit.basics import TESTDATA, eventually, free_port
from tests.kit.http import _HTTP_FORM, _http_ask, _http_get, _http_keys, _http_member, _HttpSocket
from tests.kit.processes import ClusterMember, Process, StaticCluster, ended
from tests.kit.registries import _disc_sleepless, _DiscNameServer, _DiscRegistry
from tests.kit.servers import HttpStub


class _ProxyUpstream(HttpStub):
    """One port that is the peer and the client URL of a cluster's members.

    answer(handler) replies to everything but /members and /version.  If `silent`, nothing more
    is answered, as by a process that is stopped.
    """

    def __init__(self) -> None:
        self.requests: List[Tuple[str, str, Dict[str, str], bytes]] = []
        self.answer: Callable[[Any], None] = lambda handler: handler.reply(200, b"yes")
        self.silent = threading.Event()
        self.probes = 0                 # of /version, answered
        super().__init__(self._serve, protocol="HTTP/1.1")
        self.url = self.base
        self.members: List[Dict[str, Any]] = [self.member(1, self.url)]

    def _serve(self, handler: Any) -> None:
        if self.silent.is_set():
            handler.hang_up()
            handler.connection.recv(1)          # until the proxy gives up
        elif handler.path == "/members":
            handler.reply(200, json.dumps(self.members).encode(),
                          **{"X-Etcd-Cluster-Id": "c53239d6a4bed4f6"})
        elif handler.path == "/version":
            handler.reply(200, b"{}")
            self.probes += 1
        else:
            self.requests.append((
                handler.command, handler.path, dict(handler.headers.items()), handler.body))
            self.answer(handler)

    @staticmethod
    def member(id: int, *client_urls: str, peer: str = "") -> Dict[str, Any]:
        return {"id": id, "peerURLs": [peer or client_urls[0]], "name": f"m{id}",
                "clientURLs": client_urls}


@pytest.fixture
def proxy_upstream() -> Iterator[_ProxyUpstream]:
    """A cluster of one recording member."""
    upstream = _ProxyUpstream()
    yield upstream
    upstream.close()


@contextlib.contextmanager
def _proxy_of(path: Path, *peer_urls: str, **settings: Any) -> Iterator[pyetcd.ProxyServer]:
    initial = ",".join(f"m{number}={url}" for number, url in enumerate(peer_urls))
    settings = {"initial_cluster": initial, "proxy": "on", **settings}
    with pyetcd.ProxyServer(data_dir=str(path / "data"), **settings) as proxy:
        yield proxy


def _proxy_endpoints(proxy: pyetcd.ProxyServer) -> List[str]:
    urls: List[str] = json.loads(_http_ask(proxy, "GET", "/v2/config/local/proxy")[2])["endpoints"]
    return sorted(urls)


def _proxy_metric(ask: Callable[[str], str], name: str) -> float:
    """The value of a metric, 0 if it is not there.  ask: path -> text."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", ask("/metrics"), re.M)
    return float(found[1]) if found else 0.0


def _proxy_dead_url() -> str:
    return f"http://127.0.0.1:{free_port()}"


# -- requests and answers -----------------------------------------------------------------


def test_proxy_answers_are_those_of_the_member(tmp_path: Path) -> None:
    """Every method; errors, redirects, forms, heads; then the same requests directly."""
    requests_made = [
        ("PUT", "/v2/keys/a", "value=1"), ("GET", "/v2/keys/a", None), ("HEAD", "/v2/keys/a", None),
        ("GET", "/v2/keys/none", None), ("POST", "/v2/keys/q", "value=2"),
        ("PUT", "/v2/keys/a?prevValue=2", "value=3"), ("DELETE", "/v2/keys/a", None),
        ("PATCH", "/v2/keys/a", None), ("GET", "/v2//keys", None), ("GET", "/nope", None),
        ("GET", "/version", None), ("GET", "/health", None), ("GET", "/v2/members", None),
        ("OPTIONS", "/v2/keys", None), ("PUT", "/config/local/log", '{"Level":"INFO"}'),
        ("GET", "/v2/keys/a%20b?recursive=true", None), ("PUT", "/v2/keys/a", "%zz"),
    ]

    def ask(server: Any) -> List[Any]:
        answers = []
        for method, path, form in requests_made:
            headers = _HTTP_FORM if form else {}
            status, head, body = _http_ask(server, method, path, form, headers)
            kept = {name: value for name, value in head.items()
                    if name not in ("Date", "X-Etcd-Index", "X-Raft-Index")}
            text = re.sub(rb'(I|i)ndex":\d+|/q/\d+', b"", body)
            answers.append((method, path, status, kept, text))
        return answers

    with _http_member(tmp_path) as member, _proxy_of(tmp_path / "p", *member.peer_urls) as proxy:
        through = ask(proxy)
        direct = ask(member)
    assert through[0][2] == 201
    assert through == direct


def test_proxy_sends_on_what_is_for_the_member(
    tmp_path: Path, proxy_upstream: _ProxyUpstream
) -> None:
    """Method, target, Host, headers and body; not what belongs to one connection."""
    with _proxy_of(tmp_path, proxy_upstream.url) as proxy, _HttpSocket(proxy) as client:
        client.send(
            b"PUT /v2/keys/a%2Fb?x=1&y=%20 HTTP/1.1\r\nHost: etcd.example\r\nX-Own: 1\r\n"
            b"Authorization: Basic eDp5\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\n"
            b"Keep-Alive: 5\r\nTE: trailers\r\nTrailers: x\r\nUpgrade: h2c\r\nExpect: nothing\r\n"
            b"Proxy-Authenticate: x\r\nProxy-Authorization: y\r\nX-Forwarded-For: 10.0.0.1\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n3\r\nval\r\n4\r\nue=1\r\n0\r\n\r\n")
        assert client.answer()[0] == 200
        client.send(_http_get("/x"))
        assert client.answer()[0] == 200
    assert proxy_upstream.requests == [
        ("PUT", "/v2/keys/a%2Fb?x=1&y=%20", {
            "Host": "etcd.example", "X-Own": "1", "Authorization": "Basic eDp5",
            "X-Forwarded-For": "10.0.0.1, 127.0.0.1", "Content-Length": "7",
        }, b"value=1"),
        ("GET", "/x", {"Host": "x", "X-Forwarded-For": "127.0.0.1"}, b""),
    ]


def _proxy_chunks(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n")


def _proxy_until_close(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"all")
    handler.hang_up()


@pytest.mark.parametrize("answer, version, words", [
    (lambda h: h.reply(500, b"no", **{"X-A": "1", "Keep-Alive": "5"}), "1.1",
     [b"HTTP/1.1 500 ", b"\r\nX-A: 1\r\n", b"\r\nContent-Length: 2\r\n", b"\r\n\r\nno"]),
    (lambda h: h.reply(307, b"", Location="http://h/x"), "1.1",
     [b"HTTP/1.1 307 ", b"\r\nLocation: http://h/x\r\n", b"\r\nContent-Length: 0\r\n"]),
    (lambda h: h.reply(299, b"odd"), "1.1", [b"HTTP/1.1 299 ", b"\r\n\r\nodd"]),
    (_proxy_chunks, "1.1", [b"Transfer-Encoding: chunked\r\n"]),
    (_proxy_until_close, "1.1", [b"\r\n\r\n3\r\nall\r\n0\r\n\r\n"]),
    (_proxy_chunks, "1.0", [b"HTTP/1.0 200 ", b"\r\n\r\nabcdef"]),
    (lambda h: (h.send_response(204), h.end_headers()), "1.1", [b"HTTP/1.1 204 "]),
    (lambda h: (h.send_response(304), h.end_headers()), "1.1", [b"HTTP/1.1 304 "]),
], ids=["500", "307", "299", "chunked", "until close", "HTTP/1.0", "204", "304"])
def test_proxy_relays_any_answer(
    answer: Callable[[Any], None], version: str, words: List[bytes], tmp_path: Path,
    proxy_upstream: _ProxyUpstream,
) -> None:
    proxy_upstream.answer = answer
    with _proxy_of(tmp_path, proxy_upstream.url) as proxy, _HttpSocket(proxy) as client:
        client.send(_http_get("/x", "Connection: close", version=version))
        data = client.rest()
    for word in words:
        assert word in data, data
    assert b"Keep-Alive" not in data
    assert data.count(b"\r\nDate: ") == 1
    assert (b"chunked" in data) == (version == "1.1" and answer in (
        _proxy_chunks, _proxy_until_close))


def test_proxy_truncated_answer_is_not_taken_for_a_whole_one(
    tmp_path: Path, proxy_upstream: _ProxyUpstream
) -> None:
    def cut(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"3\r\nabc\r\n")
        handler.hang_up()

    proxy_upstream.answer = cut
    with _proxy_of(tmp_path, proxy_upstream.url) as proxy, _HttpSocket(proxy) as client:
        client.send(_http_get("/x"))
        assert client.rest().endswith(b"3\r\nabc\r\n")


def test_proxy_slow_reader_makes_the_member_wait(
    tmp_path: Path, proxy_upstream: _ProxyUpstream
) -> None:
    """A client that does not read costs the proxy no more than two buffers."""
    sent = [0]
    piece = b"x" * (1 << 20)

    def pour(handler: Any) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        handler.send_response(200)
        handler.send_header("Content-Length", str(100 * len(piece)))
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(piece)
            sent[0] += 1

    proxy_upstream.answer = pour
    with _proxy_of(tmp_path, proxy_upstream.url) as proxy:
        with _HttpSocket(proxy, receive_buffer=1 << 16) as client:
            client.send(_http_get("/x"))
            client.until(b"\r\n\r\n")
            seen = -1

            def stalled() -> bool:
                nonlocal seen
                seen, before = sent[0], seen
                return seen == before and bool(threading.Event().wait(0.3)) is False and (
                    seen == sent[0])
            eventually(stalled)
            assert sent[0] < 40
            assert proxy._api is not None
            (forward,) = proxy._api._forwards
            assert forward._reply.pending <= 2 * pyetcd.PROXY_UNREAD_BYTES_MAX
            assert _http_ask(proxy, "GET", "/v2/config/local/proxy")[0] == 200
            size = len(client.data)
            while size < 100 * len(piece) and (data := client.socket.recv(1 << 20)):
                size += len(data)
            assert size == 100 * len(piece)


def test_proxy_readonly_refuses_all_but_get(
    tmp_path: Path, proxy_upstream: _ProxyUpstream
) -> None:
    with _proxy_of(tmp_path, proxy_upstream.url, proxy="readonly", cors=["*"]) as proxy:
        for method in ("PUT", "POST", "DELETE", "HEAD", "PATCH", "OPTIONS"):
            for path in ("/v2/keys/a", "/v2/config/local/proxy"):
                status, _, body = _http_ask(proxy, method, path)
                assert (status, body) == (501, b"")
        assert _http_ask(proxy, "GET", "/v2/keys/a")[2] == b"yes"
        assert len(_proxy_endpoints(proxy)) == 1
    assert [method for method, *_ in proxy_upstream.requests] == ["GET"]


def test_proxy_has_two_paths_of_its_own(tmp_path: Path, proxy_upstream: _ProxyUpstream) -> None:
    with _proxy_of(tmp_path, proxy_upstream.url) as proxy:
        status, head, body = _http_ask(proxy, "GET", "/v2/config/local/proxy")
        assert (status, head["Content-Type"]) == (200, "text/plain; charset=utf-8")
        assert body == f'{{"endpoints":["{proxy_upstream.url}"]}}\n'.encode()
        status, head, body = _http_ask(proxy, "PUT", "/v2/config/local/proxy")
        assert (status, head["Allow"], body) == (405, "GET", b"Method Not Allowed\n")
        assert proxy_upstream.requests == []
        _http_ask(proxy, "GET", "/v2/keys/a")
        _http_ask(proxy, "PUT", "/v2/keys/a", "x")
        proxy_upstream.answer = lambda handler: handler.hang_up()
        _http_ask(proxy, "GET", "/v2/keys/a")
        _http_ask(proxy, "GET", "/v2/keys/a")
        text = _http_ask(proxy, "GET", "/metrics")[2].decode()
    for line in (
        'etcd_proxy_requests_total{method="GET"} 3', 'etcd_proxy_requests_total{method="PUT"} 1',
        'etcd_proxy_handled_total{method="GET",code="200"} 1',
        'etcd_proxy_handled_total{method="PUT",code="200"} 1',
        'etcd_proxy_dropped_total{method="GET",proxying_error="failed_sending_request"} 1',
        'etcd_proxy_dropped_total{method="GET",proxying_error="failed_getting_response"} 1',
        'etcd_proxy_dropped_total{method="GET",proxying_error="zero_endpoints"} 1',
        'etcd_proxy_handling_duration_seconds_count{method="GET"} 1',
    ):
        assert line in text.splitlines()


def test_proxy_answers_scripts_of_other_origins(
    tmp_path: Path, proxy_upstream: _ProxyUpstream
) -> None:
    """OPTIONS here; a reply has our lines of CORS, once."""
    proxy_upstream.answer = lambda handler: handler.reply(
        200, b"yes", **{"Access-Control-Allow-Origin": "*"})
    with _proxy_of(tmp_path, proxy_upstream.url, cors=["http://a"]) as proxy:
        for method in ("OPTIONS", "GET"):
            status, head, _ = _http_ask(proxy, method, "/v2/keys/a", headers={"Origin": "http://a"})
            assert (status, head.get_all("Access-Control-Allow-Origin")) == (200, ["http://a"])
        status, head, body = _http_ask(
            proxy, "OPTIONS", "/v2/keys/a", headers={"Origin": "http://b"})
        assert (status, head.get("Access-Control-Allow-Origin"), body) == (200, None, b"")
        for path in ("/metrics", "//v2/keys", "/v2/config/local/proxy", "/v2/keys/a", "*"):
            with _HttpSocket(proxy) as client:
                client.send(_http_get(path))
                assert b"\r\nVary: Origin\r\n" in client.until(b"\r\n\r\n"), path
    assert len(proxy_upstream.requests) == 2


# -- endpoints that fail ------------------------------------------------------------------


def test_proxy_errors_have_the_words_of_etcd(
    tmp_path: Path, proxy_upstream: _ProxyUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    dead = sorted(_proxy_dead_url() for _ in range(2))
    proxy_upstream.members = [proxy_upstream.member(1, *dead, peer=proxy_upstream.url)]
    with _proxy_of(tmp_path, proxy_upstream.url, proxy_refresh_interval_ms=60_000) as proxy:
        status, head, body = _http_ask(proxy, "PUT", "/v2/keys/a", b"x" * (11 << 20))
        assert (status, body) == (500, b'{"message":"proxy: failed to read request body:'
                                       b' http: request body too large"}')
        status, head, body = _http_ask(proxy, "DELETE", "/v2/keys/a")
        assert (status, head["Content-Type"]) == (502, "application/json")
        assert body == b'{"message":"proxy: unable to get response from 2 endpoint(s)"}'
        status, head, body = _http_ask(proxy, "GET", "/v2/keys/a")
        assert (status, head["Content-Type"]) == (503, "application/json")
        assert body == b'{"message":"proxy: zero endpoints currently available"}'
        assert _proxy_endpoints(proxy) == []
    for url in dead:
        assert (f"failed to direct request to {url}: dial tcp {url[len('http://'):]}: connect:"
                " connection refused") in caplog.messages
        assert f"marked endpoint {url} unavailable" in caplog.messages


def test_proxy_failed_endpoint_is_tried_again_after_the_wait(
    tmp_path: Path, proxy_upstream: _ProxyUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    other = _ProxyUpstream()
    other.members = proxy_upstream.members
    other.members.append(other.member(2, other.url))
    try:
        with _proxy_of(tmp_path, proxy_upstream.url, proxy_failure_wait_ms=300,
                       proxy_refresh_interval_ms=100) as proxy:
            other.close()
            eventually(lambda: _http_ask(proxy, "PUT", "/x", "a")[0] == 200
                       and other.url not in _proxy_endpoints(proxy))
            assert f"marked endpoint {other.url} unavailable" in caplog.messages
            eventually(lambda: other.url in _proxy_endpoints(proxy))
            assert (f"marked endpoint {other.url} available, to retest connectivity"
                    in caplog.messages)
            other.open()
            proxy_upstream.close()
            eventually(lambda: _http_ask(proxy, "GET", "/x")[0] == 200 and other.requests)
    finally:
        other.close()


@pytest.mark.parametrize("method, status, tries", [
    ("GET", 200, 2), ("HEAD", 200, 2), ("PUT", 502, 1), ("POST", 502, 1), ("DELETE", 502, 1),
])
def test_proxy_repeats_no_write_that_a_member_may_have_seen(
    method: str, status: int, tries: int, tmp_path: Path, proxy_upstream: _ProxyUpstream
) -> None:
    def first_time(handler: Any) -> None:
        proxy_upstream.answer = lambda handler: handler.reply(200, b"yes")
        handler.hang_up()

    proxy_upstream.answer = first_time
    other = proxy_upstream.url.replace("127.0.0.1", "localhost")
    proxy_upstream.members.append(proxy_upstream.member(2, other))
    with _proxy_of(tmp_path, proxy_upstream.url) as proxy:
        assert _http_ask(proxy, method, "/v2/keys/a")[0] == status
        assert len(_proxy_endpoints(proxy)) == 1
    assert len(proxy_upstream.requests) == tries


@pytest.mark.parametrize("settings", [
    {"proxy_read_timeout_ms": 200}, {"proxy_write_timeout_ms": 200},
], ids=["by the read timeout", "by a probe"])
def test_proxy_leaves_a_silent_member(
    settings: Dict[str, int], tmp_path: Path, proxy_upstream: _ProxyUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reads go elsewhere, writes are answered 502, watches end; the next request does not wait."""
    monkeypatch.setattr(pyetcd, "PROXY_PROBE_SECONDS", 0.2)
    silent = _ProxyUpstream()
    silent.silent.set()
    peer = proxy_upstream.url
    proxy_upstream.members = [proxy_upstream.member(1, silent.url, peer=peer)]
    try:
        with _proxy_of(tmp_path, proxy_upstream.url, proxy_refresh_interval_ms=100,
                       proxy_failure_wait_ms=60_000, **settings) as proxy:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                put = pool.submit(_http_ask, proxy, "PUT", "/v2/keys/a")
                get = pool.submit(_http_ask, proxy, "GET", "/v2/keys/a")
                assert put.result()[0] == 502
                assert get.result()[0] == 502
            assert _http_ask(proxy, "GET", "/v2/keys/a")[0] == 503
            proxy_upstream.members.append(proxy_upstream.member(2, proxy_upstream.url))
            eventually(lambda: _proxy_endpoints(proxy) == [proxy_upstream.url])
            assert _http_ask(proxy, "PUT", "/v2/keys/a")[0] == 200
    finally:
        silent.close()


def test_proxy_busy_member_is_not_taken_for_a_dead_one(
    tmp_path: Path, proxy_upstream: _ProxyUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request may take longer than the limits, as long as the member answers /version."""
    monkeypatch.setattr(pyetcd, "PROXY_PROBE_SECONDS", 0.05)
    busy = threading.Event()
    proxy_upstream.answer = lambda handler: busy.wait(60) and handler.reply(200, b"done")
    with _proxy_of(tmp_path, proxy_upstream.url, proxy_write_timeout_ms=2_000) as proxy:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answer = pool.submit(_http_ask, proxy, "PUT", "/v2/keys/a")
            eventually(lambda: proxy_upstream.probes > 45)      # 50 ms and more apart
            busy.set()
            assert answer.result()[2] == b"done"


# -- long polls ---------------------------------------------------------------------------


def test_proxy_long_polls_are_relayed_and_hang_ups_passed_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")

    def watchers() -> int:
        count: int = member.call(lambda etcd: etcd.store.stats.watchers)
        return count

    with _http_member(tmp_path) as member, _proxy_of(tmp_path / "p", *member.peer_urls) as proxy:
        with _HttpSocket(proxy) as client:
            client.send(_http_get("/v2/keys/a?wait=true&stream=true"))
            assert b"\r\nX-Etcd-Index: " in client.until(b"\r\n\r\n")
            for value in ("1", "2"):
                _http_keys(member, "PUT", "/a", f"value={value}")
                assert client.event()["node"]["value"] == value
            assert watchers() == 1
        eventually(lambda: watchers() == 0)
        with _HttpSocket(proxy) as client:
            client.send(_http_get("/v2/keys/a?wait=true"))
            client.until(b"\r\n\r\n")
            _http_keys(member, "PUT", "/a", "value=3")
            assert client.event()["node"]["value"] == "3"
            assert client.chunk() == b""
            client.send(_http_get("/v2/keys/a"))        # the connection goes on
            assert client.answer()[0] == 200
    gone = [text for text in caplog.messages if text.endswith(" closed request prematurely")]
    assert len(gone) == 1 and gone[0].startswith("client 127.0.0.1:")


def test_proxy_hang_up_is_passed_on_before_the_answer_begins(
    tmp_path: Path, proxy_upstream: _ProxyUpstream
) -> None:
    gone = threading.Event()
    proxy_upstream.answer = lambda handler: handler.connection.recv(1) or gone.set()
    with _proxy_of(tmp_path, proxy_upstream.url) as proxy:
        with _HttpSocket(proxy) as client:
            client.send(_http_get("/v2/keys/a?wait=true"))
            eventually(lambda: proxy_upstream.requests)
        assert gone.wait(10)
    # What waits when the proxy is stopped is dropped too.
    gone.clear()
    with _proxy_of(tmp_path, proxy_upstream.url) as proxy, _HttpSocket(proxy) as client:
        client.send(_http_get("/v2/keys/a"))
        eventually(lambda: len(proxy_upstream.requests) == 2)
        proxy.stop()
        assert gone.wait(10) and client.rest() == b""


def test_proxy_watch_on_a_member_that_dies_ends_empty(
    tmp_path: Path, proxy_upstream: _ProxyUpstream
) -> None:
    """As a member ends a watch whose time is up, so that clients begin a new one."""
    die = threading.Event()

    def watch(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        die.wait(10)
        handler.hang_up()

    proxy_upstream.answer = watch
    with _proxy_of(tmp_path, proxy_upstream.url) as proxy, _HttpSocket(proxy) as client:
        client.send(_http_get("/v2/keys/a?wait=true"))
        client.until(b"\r\n\r\n")
        die.set()
        assert client.chunk() == b""


def test_proxy_bytes_that_wait_for_members_are_limited(
    tmp_path: Path, proxy_upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large writes to a member that does not answer: the next one gets 503, reads go on."""
    monkeypatch.setattr(pyetcd, "QUEUED_BYTES_MAX", 100_000)
    go_on, asked = threading.Event(), []

    def wait(handler: Any) -> None:
        asked.append(handler.command)
        go_on.wait(20)
        handler.send_response(204)
        handler.end_headers()

    proxy_upstream.answer = wait
    with _proxy_of(tmp_path, proxy_upstream.url) as proxy, (
        concurrent.futures.ThreadPoolExecutor(4)
    ) as pool:
        def put() -> int:
            return _http_ask(proxy, "PUT", "/v2/keys/a", bytes(60_000))[0]

        try:
            first = [pool.submit(put) for _ in range(2)]
            eventually(lambda: len(asked) == 2)
            assert put() == 503
            read = pool.submit(_http_ask, proxy, "GET", "/v2/keys/a")
        finally:
            go_on.set()
        assert [one.result() for one in first] == [204, 204]
        assert read.result()[0] in (204, 503)
        assert put() == 204


def test_proxy_without_descriptors_blames_no_member(
    tmp_path: Path, proxy_upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 while it lasts; the endpoint is not marked unavailable for it."""
    with _proxy_of(tmp_path, proxy_upstream.url) as proxy:
        with monkeypatch.context() as patch:
            def fail(*args: Any) -> None:
                raise OSError(errno.EMFILE, "Too many open files")
            patch.setattr(pyetcd.socket, "socket", fail)
            answers: List[Any] = []
            call = types.SimpleNamespace(
                method="GET", target="/v2/keys/a", path="/v2/keys/a", query="", headers={},
                body=b"", body_too_large=False, remote="h:1", on_close=None, connection=(
                    types.SimpleNamespace(streaming=False)),
                reply=lambda *args: answers.append(args))
            proxy._reactor.call_soon_threadsafe(proxy._api._forward, call)
            eventually(lambda: answers)
            assert answers[0][0] == 503 and b"ulimit -n" in answers[0][1]
        assert _http_ask(proxy, "GET", "/v2/keys/a")[0] == 200


def test_proxy_thousand_dropped_watches_leave_nothing_behind(tmp_path: Path) -> None:
    """No watcher on the member, no descriptor and no call in the proxy."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with StaticCluster(tmp_path, 1) as cluster, _proxy_process(
                tmp_path, cluster, "p") as door:
            (member,) = cluster.members

            def watchers() -> float:
                return _proxy_metric(
                    lambda path: member.request("GET", path)[1], "etcd_store_watchers")

            def descriptors() -> float:
                return _proxy_metric(
                    lambda path: door.request("GET", path)[1], "process_open_fds")

            assert door.put("a", "1")[0] == 201
            before = descriptors()
            address = ("127.0.0.1", urllib.parse.urlsplit(door.client).port)
            watches = [socket.create_connection(address) for _ in range(1000)]
            for watch in watches:
                watch.sendall(_http_get("/v2/keys/a?wait=true"))
            eventually(lambda: watchers() == 1000, what="1,000 watchers")
            eventually(lambda: descriptors() >= before + 2000, what="two sockets for each")
            for watch in watches:
                watch.close()
            eventually(lambda: watchers() == 0, what="no watcher")
            eventually(lambda: descriptors() <= before, what="no descriptor more than before")
            assert door.put("a", "2")[0] == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- members come and go; the cluster file --------------------------------------------------


def test_proxy_follows_the_members_and_keeps_them(
    tmp_path: Path, proxy_upstream: _ProxyUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """A second member comes, the first goes; a restart needs no -initial-cluster."""
    caplog.set_level(logging.INFO, "pyetcd")
    path = tmp_path / "data" / "proxy" / "cluster"
    second = _ProxyUpstream()
    try:
        with _proxy_of(tmp_path, proxy_upstream.url, proxy_refresh_interval_ms=100) as proxy:
            assert _proxy_endpoints(proxy) == [proxy_upstream.url]
            assert json.loads(path.read_bytes()) == {"PeerURLs": [proxy_upstream.url]}
            assert path.stat().st_mode & 0o777 == 0o600
            assert path.parent.stat().st_mode & 0o777 == 0o700
            assert os.listdir(path.parent) == ["cluster"]
            both = [proxy_upstream.member(1, proxy_upstream.url),
                    proxy_upstream.member(2, second.url)]
            proxy_upstream.members = second.members = both
            urls = sorted([proxy_upstream.url, second.url])
            eventually(lambda: _proxy_endpoints(proxy) == urls)
            proxy_upstream.close()
            second.members = both[1:]
            eventually(lambda: _proxy_endpoints(proxy) == [second.url])
            assert _http_ask(proxy, "GET", "/v2/keys/a")[0] == 200
        messages = caplog.messages
        assert messages[0] == f"using peer urls [{proxy_upstream.url}] "
        assert f'endpoints found ["{proxy_upstream.url}"]' in messages
        assert (f"updated peer urls in cluster file from [{proxy_upstream.url}] to"
                f" [{' '.join(urls)}]") in messages
        assert path.read_text() == f'{{"PeerURLs":["{second.url}"]}}'
        caplog.clear()
        with _proxy_of(tmp_path, initial_cluster="", discovery="http://h/t",
                       discovery_srv="example.test") as proxy:
            assert _proxy_endpoints(proxy) == [second.url]
        file = pyetcd.go_quote(str(path))
        for what in ("discovery token", "DNS SRV discovery"):
            assert (f"{what} ignored since the proxy has already been initialized. Valid cluster"
                    f" file found at {file}") in caplog.messages
        assert f"using peer urls [{second.url}] from cluster file {file}" in caplog.messages
    finally:
        second.close()


def test_proxy_without_peers_has_no_endpoints_until_one_is_there(
    tmp_path: Path, proxy_upstream: _ProxyUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """With the default interval it asks every second meanwhile."""
    proxy_upstream.close()
    with _proxy_of(tmp_path, proxy_upstream.url) as proxy:
        assert _http_ask(proxy, "GET", "/v2/keys/a")[0] == 503
        assert "could not retrieve cluster information from the given urls" in caplog.messages
        assert not (tmp_path / "data" / "proxy" / "cluster").exists()
        proxy_upstream.open()
        eventually(lambda: _http_ask(proxy, "GET", "/v2/keys/a")[0] == 200, 20)


def test_proxy_asks_less_and_less_often_while_there_is_no_endpoint(tmp_path: Path) -> None:
    """1 s, 2 s, 4 s, ... up to the interval of refreshes; at once again after one was found."""
    waits: List[float] = []
    reactor = types.SimpleNamespace(
        call_later=lambda delay_s, callback: waits.append(delay_s),
        run_blocking=lambda work, *args, kind, done: done(None, found),
    )
    endpoints = pyetcd.Endpoints(
        pyetcd.ServerConfig(), types.SimpleNamespace(reactor=reactor),
        pyetcd.ClusterFile(("http://10.0.0.1:2380",)), str(tmp_path / "cluster"))
    found = None
    endpoints.schedule_refresh()
    for _ in range(8):
        endpoints._start_refresh()
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30, 30]
    found = pyetcd.ClusterFile(("http://10.0.0.1:2380",), ("http://10.0.0.1:2379",))
    endpoints._start_refresh()
    endpoints._endpoints[0].available = False
    found = None
    endpoints._start_refresh()
    assert waits[-2:] == [30, 1]


@pytest.mark.parametrize("wrong", ["peers", "clients"])
def test_proxy_keeps_what_works_when_a_list_of_members_does_not(
    wrong: str, tmp_path: Path, proxy_upstream: _ProxyUpstream
) -> None:
    """Over a restart too: 503 for ever before.  It lets go when a new list works."""
    dead = _proxy_dead_url()
    refresh = {"proxy_refresh_interval_ms": 100, "proxy_dial_timeout_ms": 100}
    good, path = proxy_upstream.url, tmp_path / "data" / "proxy" / "cluster"

    def ask(proxy: pyetcd.ProxyServer) -> int:
        return int(_http_ask(proxy, "GET", "/v2/keys/a")[0])

    with _proxy_of(tmp_path, good, **refresh) as proxy:
        assert ask(proxy) == 200
        proxy_upstream.members = [
            proxy_upstream.member(1, dead if wrong == "clients" else good, peer=(
                dead if wrong == "peers" else good))]
        eventually(lambda: dead in path.read_text() if wrong == "peers"
                   else dead in _proxy_endpoints(proxy))
        assert [ask(proxy) for _ in range(3)] == [200] * 3
    kept = {"ClientURLs": [good]} if wrong == "clients" else {}
    assert json.loads(path.read_bytes()) == (
        {"PeerURLs": [dead, good] if wrong == "peers" else [good], **kept})
    with _proxy_of(tmp_path, initial_cluster="", **refresh) as proxy:
        assert [ask(proxy) for _ in range(3)] == [200] * 3
        second = _ProxyUpstream()
        try:
            second.members = proxy_upstream.members = [proxy_upstream.member(2, second.url)]
            eventually(lambda: second.url in _proxy_endpoints(proxy))
            eventually(lambda: ask(proxy) == 200 and _proxy_endpoints(proxy) == [second.url])
            eventually(lambda: json.loads(path.read_bytes()) == {"PeerURLs": [second.url]})
        finally:
            second.close()


def test_proxy_keeps_endpoints_while_no_peer_answers(
    tmp_path: Path, proxy_upstream: _ProxyUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """Its way to the peers may be cut and that to the clients' ports not."""
    peer = _ProxyUpstream()
    peer.members = [proxy_upstream.member(1, proxy_upstream.url, peer=peer.url)]
    with _proxy_of(tmp_path, peer.url, proxy_refresh_interval_ms=100) as proxy:
        peer.close()
        eventually(lambda: "could not retrieve cluster information" in caplog.text)
        assert _http_ask(proxy, "GET", "/v2/keys/a")[0] == 200


def test_proxy_takes_no_url_that_is_none_and_not_itself(
    tmp_path: Path, proxy_upstream: _ProxyUpstream
) -> None:
    """A member that advertises `localhost` would have the proxy ask itself without end."""
    own = f"http://127.0.0.1:{free_port()}"
    port = own.rpartition(":")[2]
    proxy_upstream.members = [proxy_upstream.member(
        1, proxy_upstream.url, "http://${IP}:2379", "http://[::1:2379", f"http://localhost:{port}")]
    proxy_upstream.members[0]["peerURLs"].append("http://a b:1")
    with _proxy_of(tmp_path, proxy_upstream.url, listen_client_urls=[own]) as proxy:
        assert _proxy_endpoints(proxy) == [proxy_upstream.url]
    content = json.loads((tmp_path / "data" / "proxy" / "cluster").read_bytes())
    assert content == {"PeerURLs": [proxy_upstream.url]}


def test_proxy_failed_first_start_leaves_nothing(tmp_path: Path) -> None:
    """The directory would have made a proxy of a member that starts there."""
    wrong: List[Dict[str, Any]] = [
        {"initial_cluster": "a=b"},
        {"initial_cluster": "a=http://127.0.0.1:1", "listen_client_urls": ["http://192.0.2.1:1"]},
    ]
    for mistake in wrong:
        with pytest.raises(pyetcd.StartError), _proxy_of(tmp_path, **mistake):
            pass
        assert list(tmp_path.iterdir()) == []


def test_proxy_goes_on_when_the_cluster_file_cannot_be_written(
    tmp_path: Path, proxy_upstream: _ProxyUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data" / "proxy" / "cluster.bak").mkdir(parents=True)
    with _proxy_of(tmp_path, proxy_upstream.url) as proxy:
        assert _http_ask(proxy, "GET", "/v2/keys/a")[0] == 200
    assert any(text.startswith("error on writing urls ") for text in caplog.messages)


@pytest.mark.parametrize("prepare, settings, words", [
    (lambda root: (root / "member").mkdir(parents=True), {}, "belongs to a member"),
    (lambda root: ((root / "member").mkdir(parents=True), (root / "proxy").mkdir()), {},
     "invalid datadir. Both member and proxy directories exist."),
    (lambda root: ((root / "proxy").mkdir(parents=True),
                   (root / "proxy" / "cluster").write_text("{")), {}, "cannot use the cluster fil"),
    (lambda root: ((root / "proxy").mkdir(parents=True),
                   (root / "proxy" / "cluster").write_text('{"PeerURLs":[1]}')), {},
     "remove it to begin again with -initial-cluster or -discovery"),
    (lambda root: root.write_text(""), {}, "cannot write to proxy directory: "),
    (lambda root: None, {"initial_cluster": "a=b"}, "error setting up initial cluster: "),
    (lambda root: None, {"listen_client_urls": ["http://192.0.2.1:1"]}, "listen tcp 192.0.2.1:1"),
], ids=["member", "both", "torn file", "odd file", "no directory", "initial cluster", "port"])
def test_proxy_start_failure_is_one_line(
    prepare: Callable[[Path], Any], settings: Dict[str, Any], words: str, tmp_path: Path,
    proxy_upstream: _ProxyUpstream,
) -> None:
    prepare(tmp_path / "data")
    proxy = pyetcd.ProxyServer(**{
        "data_dir": str(tmp_path / "data"), "initial_cluster": f"m={proxy_upstream.url}",
        **settings})
    with pytest.raises(pyetcd.StartError, match=re.escape(words)) as caught:
        proxy.start()
    proxy.stop()
    assert "\n" not in str(caught.value)


def test_proxy_reads_the_registry_without_a_trace(
    tmp_path: Path, disc_registry: _DiscRegistry, proxy_upstream: _ProxyUpstream
) -> None:
    """It waits for the members that are missing, does not register, and takes the first ones."""
    disc_registry.put("aaa", f"a={proxy_upstream.url}")
    disc_registry.put("bbb", "b=http://127.0.0.1:1,b=http://127.0.0.1:2")
    server = pyetcd.ProxyServer(
        data_dir=str(tmp_path), initial_cluster="", discovery=disc_registry.url, proxy="on")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        started = pool.submit(server.start)
        with pytest.raises(concurrent.futures.TimeoutError):
            started.result(0.3)
        disc_registry.put("ccc", "c=http://127.0.0.1:3")
        started.result(10)
    try:
        assert _proxy_endpoints(server) == [proxy_upstream.url]
    finally:
        server.stop()
    disc_registry.put("ddd", "d=http://127.0.0.1:4")
    full = pyetcd.Discovery(disc_registry.url, 0, "", sleep=_disc_sleepless).find()
    assert full == (f"a={proxy_upstream.url},b=http://127.0.0.1:1,b=http://127.0.0.1:2,"
                    "c=http://127.0.0.1:3")


def test_proxy_by_srv_records_needs_no_own_entry(
    tmp_path: Path, disc_dns: _DiscNameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    disc_dns.zone = {"_etcd-server._tcp.example.test": [(0, 0, 2380, "n1.example.test")]}
    monkeypatch.setattr(pyetcd, "name_servers", lambda: [disc_dns.address])
    config = pyetcd.ServerConfig(
        discovery_srv="example.test", initial_advertise_peer_urls=("http://10.0.0.9:2380",))
    assert pyetcd.find_cluster(config, str(tmp_path / "none")).peer_urls == (
        "http://n1.example.test:2380",)


# -- whole processes ----------------------------------------------------------------------


@contextlib.contextmanager
def _proxy_process(
    path: Path, cluster: StaticCluster, name: str, *flags: str
) -> Iterator[ClusterMember]:
    """A proxy of `cluster`, started by -proxy on; ended by SIGTERM."""
    door = ClusterMember(path, name)
    door.process = Process(
        path, "-proxy", "on", "-name", name, "-listen-client-urls", door.client,
        "-initial-cluster", cluster.initial, *flags)
    with ended(door):
        door.process.wait_log("proxy: endpoints found [")
        yield door
        assert door.process.kill(signal.SIGTERM) == -signal.SIGTERM
        assert "Traceback" not in door.process.log()


def test_proxy_leaves_a_stopped_member_for_another(tmp_path: Path) -> None:
    """SIGSTOP of one of three: reads go elsewhere, watches end; then everything is quick."""
    with StaticCluster(tmp_path) as cluster, _proxy_process(
            tmp_path, cluster, "p", "-proxy-write-timeout", "500") as door:
        first = door.request("GET", "/v2/config/local/proxy")[1]["endpoints"][0]
        stopped = next(m for m in cluster.members if m.client == first)
        assert door.put("a", "1")[0] == 201
        url = door.client + "/v2/keys/a"
        with contextlib.closing(
                requests.get(url, params={"wait": "true"}, stream=True, timeout=30)) as watch:
            stopped.process.popen.send_signal(signal.SIGSTOP)
            with concurrent.futures.ThreadPoolExecutor() as pool:
                reads = [pool.submit(door.value, "a") for _ in range(5)]
                write = pool.submit(door.put, "b", "1")
                assert {read.result() for read in reads} == {"1"}
                # On a busy machine the watch may have found out before the write comes.
                assert write.result()[0] in (502, 201, 500)
            assert watch.content == b""
        failure = f"proxy: failed to direct request to {first}: "
        failures = door.process.log().count(failure)
        assert failures
        cluster.members.remove(stopped)
        cluster.put_through(door, "c", "1")         # when there is a leader
        for number in range(20):
            assert door.put("c", str(number))[0] == 200
            assert door.value("c", quorum="true") == str(number)
        assert door.process.log().count(failure) == failures
        cluster.members.append(stopped)


def test_proxy_mode_follows_the_data_directory(tmp_path: Path) -> None:
    """A proxy stays one without -proxy, a member stays one with it."""
    with StaticCluster(tmp_path, 1) as cluster:
        (member,) = cluster.members
        with _proxy_process(tmp_path, cluster, "p") as door:
            assert door.put("a", "1")[0] == 201
        door.start()
        with ended(door):
            door.process.wait_log("proxy: using peer urls [")
            assert "already initialized as proxy before" in door.process.log()
            assert eventually(lambda: door.value("a")) == "1"
        member.process.kill()
        cluster.start(member, "-proxy", "on")
        member.process.wait_log("published")
        assert "already initialized as member before" in member.process.log()


def test_proxy_answers_the_transcript_of_etcd_238(tmp_path: Path) -> None:
    """The recorded steps of the keys API again, by two proxies of a member each at once.

    Left out are the five scenarios that sleep: they check the clock and the counters of the
    member, of which a proxy has none.
    """
    cases = [json.loads(line) for line in (TESTDATA / "keys-cases.jsonl").read_text().splitlines()]
    sleeping = {case["s"] for case in cases if case.get("op") == "sleep"}
    names = {case["s"] for case in cases} - sleeping
    assert len(sleeping) == 5
    with contextlib.ExitStack() as stack:
        urls = []
        for name in "ab":
            member = stack.enter_context(pyetcd.LocalMember())
            proxy = stack.enter_context(pyetcd.ProxyServer(
                data_dir=str(tmp_path / name), initial_cluster=f"m={member.peer_url}"))
            eventually(lambda proxy=proxy: _proxy_endpoints(proxy))
            urls.append(proxy.client_urls[0])
        output = subprocess.run(
            [sys.executable, "compare.py", "--again", "3", "--only", ",".join(sorted(names)),
             ",".join(urls), "keys-cases.jsonl", "keys-etcd-2.3.8.jsonl"],
            cwd=TESTDATA, capture_output=True, text=True, timeout=600).stdout
    assert "TOTAL pass 802 fail 2" in output, output[-3000:]        # the two of the direct replay
