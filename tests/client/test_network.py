"""Client on the network: deadlines, many servers, states, watches that outlive them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time

import pytest

import pyetcd_client
from pyetcd_client import Client
from tests.kit.basics import eventually
from tests.kit.certificates import _tls_member
from tests.kit.clients import (
    _CLIENT_GOOD,
    _CLIENT_HALF,
    _CLIENT_HEAD,
    _CLIENT_KINDS,
    _CLIENT_TIMED_OUT,
    _CLIENT_WAIT_S,
    _client_background,
    _client_dead_url,
    _client_event,
    _client_hang_up,
    _client_python,
    _client_reply,
    _ClientRawServer,
    _net_black_hole,
)
from tests.kit.processes import ClusterMember, Process, StaticCluster, ended
from tests.kit.servers import RawServer


def _net_drip(head, body, gap_s=0.05):
    """Return a reply that sends one byte after the other until the other side has enough."""
    def drip(connection):
        pause = threading.Event()
        with contextlib.suppress(OSError):
            connection.sendall(head)
            for byte in body:
                connection.sendall(bytes((byte,)))
                pause.wait(gap_s)
    return drip


@pytest.mark.parametrize("sent", ["head", "body", "chunks"])
def test_client_net_a_trickling_answer_does_not_outlast_the_deadline(sent):
    """Every byte comes in time, all of them would take half a minute."""
    whole = _CLIENT_GOOD + b" " * 500
    at = 0 if sent == "head" else whole.index(b"\r\n\r\n") + 4
    head, body = whole[:at], whole[at:]
    if sent == "chunks":
        head, body = _CLIENT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 100
    elif sent == "body":
        head = re.sub(rb"Content-Length: \d+", b"Content-Length: 600", head)
    with _ClientRawServer(_net_drip(head, body)) as server, Client(server.url) as client:
        for call in (lambda: client.get("k", timeout=0.2),
                     lambda: client.set("k", "v", timeout=0.2)):
            with pytest.raises(pyetcd_client.RequestTimeout):
                call()          # 30 s would be a whole answer


@pytest.mark.parametrize("first, extra, connections", [
    (b"HTTP/1.1 200 OK", b"", 1),
    (b"HTTP/1.1 200", b"x-EMPTY:\r\nX-Folded: one\r\n two: 2\r\nno colon\r\n: no name\r\n", 1),
    (b"HTTP/1.1 100 Continue\r\nX-Etcd-Index: 3\r\n\r\nHTTP/1.1 200 OK", b"", 1),
    (b"HTTP/1.1 200 OK", b"connection: Close\r\n", 2),
    (b"HTTP/1.0 200 OK", b"", 2),
    (b"HTTP/1.0 200 OK", b"Connection: keep-alive\r\n", 1)])
def test_client_net_heads_are_read_as_http_means_them(first, extra, connections):
    body = _CLIENT_GOOD.partition(b"\r\n\r\n")[2]
    head = first + (b"\r\nx-etcd-INDEX:  7 \r\nX-Etcd-Index: 8\r\n" + extra
                    + b"content-length: %d\r\n\r\n" % len(body))
    with _ClientRawServer(head + body, head + body) as server, Client(server.url) as client:
        assert [client.get("k").etcd_index for _ in range(2)] == [7, 7]
        assert server.connections == connections


@pytest.mark.parametrize("head", [
    b"HTTP/1.1 200 OK\r\n" + b"X-More: 1\r\n" * 101 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nX-Long: " + b"1" * 70_000,
    b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    b"HTTP/2.0 200 OK\r\n\r\n", b"HTTP/1.1 9 OK\r\n\r\n"])
def test_client_net_heads_without_sense_are_errors(head):
    with _ClientRawServer((head,)) as server, Client(server.url, retry=False) as client:
        with pytest.raises(pyetcd_client.TransportError):
            client.get("k")


def test_client_net_reads_are_sent_again_until_a_server_answers():
    with _ClientRawServer((b"",), _CLIENT_TIMED_OUT, (_CLIENT_HALF,), _CLIENT_GOOD) as server:
        with Client(server.url) as client:
            assert client.get("k").value == "v"
        assert len(server.requests) == 4


def test_client_net_writes_that_were_never_sent_are_tried_again():
    """Unless nobody was ever reached: then the address is wrong, most likely."""
    url = _client_dead_url()

    def serve_one():
        with socket.create_server(("127.0.0.1", int(url.rpartition(":")[2]))) as listener:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(_CLIENT_GOOD)

    def asked():
        with contextlib.suppress(pyetcd_client.ConnectionFailed):
            return client.get("k").value

    with Client(url) as client:
        with pytest.raises(pyetcd_client.ConnectionFailed):
            client.set("k", "v")
        with _client_background(serve_one):
            eventually(asked)
        with _client_background(client.set, "k", "v") as outcome:
            eventually(lambda: client.state is pyetcd_client.ConnectionState.SUSPENDED)
            serve_one()
        assert outcome[0].value == "v"


def test_client_net_what_does_not_pass_is_not_tried_again():
    with _ClientRawServer(_client_reply(b"{garbage")) as server, Client(server.url) as client:
        with pytest.raises(pyetcd_client.BadReply):
            client.get("k")
        assert len(server.requests) == 1


def test_client_net_thirty_two_threads_share_a_client():
    barrier = threading.Barrier(32)

    def work(client):
        barrier.wait(_CLIENT_WAIT_S)
        return [client.get("k").value for _ in range(10)]

    with _ClientRawServer(_CLIENT_GOOD) as server, Client(server.url) as client:
        with contextlib.ExitStack() as stack:
            outcomes = [stack.enter_context(_client_background(work, client)) for _ in range(32)]
        assert outcomes == [[["v"] * 10]] * 32
        assert server.connections <= 32 and len(server.requests) == 320


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_client_net_a_forked_child_works_and_leaves_the_parents_connection_alone():
    with _ClientRawServer(_CLIENT_GOOD) as server, Client(server.url) as client:
        client.get("k")
        child = os.fork()
        if not child:
            os._exit(0 if client.get("k").value == "v" else 1)
        assert os.waitpid(child, 0)[1] == 0
        client.get("k")
        assert server.connections == 2 and len(server.requests) == 3


def _net_members(*urls):
    return _client_reply({"members": [
        {"id": "a", "name": "m", "peerURLs": [], "clientURLs": [url]} for url in urls]})


def test_client_net_members_add_endpoints_and_forget_none():
    with _ClientRawServer(_CLIENT_GOOD) as other, _ClientRawServer(
            _CLIENT_GOOD, _net_members(other.url), _client_hang_up) as server:
        with Client(server.url, sync=True) as client:
            client.get("k")
            assert client.endpoints.urls == (server.url, other.url)
            assert client.endpoints.current == server.url           # sticky
            assert client.get("k").value == "v"                     # from the other
            assert client.endpoints.current == other.url
            assert client.endpoints.given == (server.url,)
            client.endpoints.learn(())
            assert client.endpoints.urls == (server.url,)


def test_client_net_sync_takes_no_plain_urls_where_all_are_encrypted():
    endpoints = pyetcd_client.Endpoints(["https://a:1"])
    endpoints.learn(["http://b:1", "https://c:1"])
    assert endpoints.urls == ("https://a:1", "https://c:1")


def test_client_net_etcd_proxies_are_not_left():
    with _ClientRawServer(_CLIENT_GOOD) as server:
        with Client(server.url, sync=True, use_proxies=True) as client:
            client.get("k")
        assert [target for _, target, _ in server.requests] == ["/v2/keys/k"]


def _net_resolve_with(address, monkeypatch):
    """Have dnspython ask this name server."""
    resolver = pytest.importorskip("dns.resolver", reason="dnspython is not installed")
    own = resolver.Resolver(configure=False)
    own.nameservers, own.port = [address[0]], address[1]
    monkeypatch.setattr(resolver, "default_resolver", own)


@pytest.mark.parametrize("service, scheme", [
    ("etcd-client-ssl", "https"), ("etcd-client", "http"), ("etcd", "http")])
def test_client_net_srv_records_name_the_endpoints(service, scheme, disc_dns, monkeypatch):
    _net_resolve_with(disc_dns.address, monkeypatch)
    disc_dns.zone = {f"_{service}._tcp.example.test": [
        (10, 0, 2379, "n2.example.test"), (0, 0, 2380, "n1.example.test")]}
    for disc_dns.truncate in (False, True):
        client = Client(srv_domain="example.test")
        assert client.endpoints.urls == ()
        client._discover_endpoints(time.monotonic() + _CLIENT_WAIT_S)
        assert client.endpoints.urls == (
            f"{scheme}://n1.example.test:2380", f"{scheme}://n2.example.test:2379")


@pytest.mark.parametrize("garbage", [False, True])
def test_client_net_srv_without_records_is_an_error(garbage, disc_dns, monkeypatch):
    _net_resolve_with(disc_dns.address, monkeypatch)
    disc_dns.garbage = garbage
    with Client(srv_domain="none.test") as client, pytest.raises(
            pyetcd_client.ConnectionFailed, match="SRV|lookup"):
        client.get("k", timeout=5)


def test_client_net_srv_domain_without_dnspython_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "dns.exception", None)
    with Client(srv_domain="example.test") as client, pytest.raises(
            pyetcd_client.ConnectionFailed, match="pip install dnspython"):
        client.get("k")


def test_client_net_a_redirect_to_a_malformed_target_is_not_followed():
    with _ClientRawServer(_client_reply(b"", 307, extra="Location: /v2/a b\r\n")) as server:
        with Client(server.url) as client, pytest.raises(
                pyetcd_client.TransportError, match="not percent-encoded"):
            client.get("k", timeout=1)
        assert {target for _, target, _ in server.requests} == {"/v2/keys/k"}


@pytest.mark.parametrize("option", ["ca_cert", "cert"])
def test_client_net_a_missing_certificate_file_is_named(option):
    with Client("https://127.0.0.1:9", **{option: "/no/Such"}) as client, pytest.raises(
            pyetcd_client.ConnectionFailed, match="there is no file /no/Such"):
        client.get("k")


def test_client_net_passwords_go_to_endpoints_only():
    with _ClientRawServer(_CLIENT_GOOD) as server:
        with Client(server.url, username="root", password="pä:ss") as client:
            headers = client._headers(server.url, pyetcd_client._Call("GET", "/", None))
            elsewhere = client._headers("http://h:1", pyetcd_client._Call("GET", "/", None))
    assert base64.b64decode(headers["Authorization"][6:]).decode() == "root:pä:ss"
    assert "Authorization" not in elsewhere


def test_client_net_settings_come_from_the_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("ETCDCTL_")]:
        monkeypatch.delenv(name)
    assert Client.from_env().endpoints.urls == ("http://127.0.0.1:2379",)
    monkeypatch.setenv("ETCDCTL_DISCOVERY_SRV", "example.test")
    assert Client.from_env()._srv == ("example.test", "http")
    for name, value in {"PEERS": "a:1", "ENDPOINTS": "b:1,b:2", "USERNAME": "u:p:w",
                        "CERT_FILE": "c", "KEY_FILE": "k", "CA_FILE": "a"}.items():
        monkeypatch.setenv("ETCDCTL_" + name, value)
    client = Client.from_env(connect_timeout=7)
    assert client.endpoints.urls == ("http://b:1", "http://b:2") and client._srv is None
    assert (client.username, client.password, client.connect_timeout) == ("u", "p:w", 7)
    assert client._connection_settings[:2] == ("a", ("c", "k"))


def test_client_net_tls_with_certificates(tmp_path, certificates):
    files = certificates.files(client_cert_auth=True)
    pair = certificates.issue("client")
    with _tls_member(tmp_path, files) as (_, url):
        with Client(url, ca_cert=certificates.ca_file, cert=pair) as client:
            client.set("k", "v")
            assert client.get("k").value == "v"
        for settings in ({"ca_cert": certificates.other_ca_file, "cert": pair}, {}):
            with Client(url, **settings) as client:
                with pytest.raises(
                        pyetcd_client.ConnectionFailed, match="(?i)certificate") as caught:
                    client.set("k", "v")
            assert not caught.value.maybe_applied
        with Client(url, verify=False, cert=pair) as client:
            assert client.get("k").value == "v"


def test_client_net_plain_text_to_a_tls_port_says_so(tmp_path, certificates):
    with _tls_member(tmp_path, certificates.files()) as (_, url):
        with Client(url.replace("https:", "http:"), retry=False) as client:
            with pytest.raises(pyetcd_client.EtcdError, match="(?i)https|TLS"):
                client.get("k")
    go = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
    old_go = b"\x15\x03\x01\x00\x02\x02\x16"
    for said, text in ((go, "HTTP request to an HTTPS server"), (old_go, "speaks TLS")):
        with _ClientRawServer((said,)) as server, Client(server.url, retry=False) as client:
            with pytest.raises(pyetcd_client.EtcdError, match=text):
                client.get("k")
    with RawServer(lambda sock: sock.recv(65536) and sock.sendall(go)) as server:
        with Client(server.url.replace("http", "https"), retry=False) as client, pytest.raises(
                pyetcd_client.ConnectionFailed, match="http://"):
            client.get("k")


@pytest.mark.parametrize("waits_for", ["lookup", "handshake"])
def test_client_net_a_connection_in_the_making_can_be_ended(waits_for, monkeypatch):
    """A name server and a TLS server that never answer."""
    reached, hold = threading.Event(), threading.Event()
    look_up = socket.getaddrinfo

    def black_hole(host, *args, **options):
        if host != "name.test" or options.get("flags"):
            return look_up(host, *args, **options)
        reached.set()
        hold.wait(_CLIENT_WAIT_S)
        raise socket.gaierror("late")

    monkeypatch.setattr(socket, "getaddrinfo", black_hole)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = "http://name.test:1" if waits_for == "lookup" else (
            f"https://127.0.0.1:{listener.getsockname()[1]}")
        with Client(url, connect_timeout=1e3, total_timeout=1e3) as client:
            with _client_background(client.get, "k") as outcome:
                if waits_for == "lookup":
                    assert reached.wait(_CLIENT_WAIT_S)
                else:
                    connection = listener.accept()[0]
                    assert connection.recv(1)
                client.close()
                eventually(lambda: outcome, 30)
            assert isinstance(outcome[0], pyetcd_client.Cancelled)
            hold.set()
            if waits_for == "handshake":
                connection.settimeout(_CLIENT_WAIT_S)
                with contextlib.suppress(ConnectionResetError):
                    while connection.recv(65536):   # nothing of ours holds it open
                        pass
                connection.close()


def test_client_net_a_silent_name_server_can_be_left(monkeypatch):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.settimeout(_CLIENT_WAIT_S)
        _net_resolve_with(silent.getsockname(), monkeypatch)
        with Client(srv_domain="example.test", total_timeout=1e3) as client:
            with _client_background(client.get, "k") as outcome:
                query, asker = silent.recvfrom(512)
                client.close()
                eventually(lambda: outcome, 30)
        # No such domain: this ends the thread of the look-up, which other tests would find.
        silent.sendto(query[:2] + b"\x81\x83" + query[4:], asker)
    assert isinstance(outcome[0], pyetcd_client.Cancelled)


def test_client_net_a_name_that_cannot_be_looked_up_keeps_to_the_deadline(monkeypatch):
    hold = threading.Event()
    monkeypatch.setattr(pyetcd_client.socket, "getaddrinfo", lambda *_, **options: (
        () if options.get("flags") else hold.wait(_CLIENT_WAIT_S)))
    with Client("http://name.test:1") as client, pytest.raises(pyetcd_client.ConnectionFailed):
        client.get("k", timeout=0.1)
    hold.set()


def test_client_net_few_connections_stay_after_a_rush():
    barrier = threading.Barrier(50)

    def reply(connection):
        barrier.wait(_CLIENT_WAIT_S)
        connection.sendall(_CLIENT_GOOD)
        connection.recv(1)                          # kept until the client closes it

    with _ClientRawServer(reply) as server, Client(server.url, per_host_pool_size=3) as client:
        with contextlib.ExitStack() as stack:
            for _ in range(50):
                stack.enter_context(_client_background(client.get, "k"))
        assert server.connections == 50 and len(client._idle) <= 3
        for _ in range(47):
            assert server.closed.acquire(timeout=_CLIENT_WAIT_S)


def test_client_net_log_tells_of_requests_and_failovers(caplog):
    caplog.set_level("DEBUG", "pyetcd_client")
    with _ClientRawServer(_client_hang_up) as bad, _ClientRawServer(_CLIENT_GOOD) as good:
        with Client([bad.url, good.url], username="root", password="secret") as client:
            client.get("k")
            client.delete("k", prevValue="hidden")
    told = [(record.levelname, record.message) for record in caplog.records]
    assert ("INFO" in dict(told)) and f"on to {good.url}" in dict(told)["INFO"]
    assert any(f"GET {good.url}/v2/keys/k: 200 after" in text for _, text in told)
    assert sum(level == "DEBUG" for level, _ in told) == 3
    assert "secret" not in caplog.text and "hidden" not in caplog.text


def test_client_net_asyncio_waits_end_with_their_tasks():
    """More waits than the default executor has threads; another call gets through all the same."""
    async def work(client, watches):
        async def changes(watch):
            return [event.value async for event in pyetcd_client.each(watch)]

        tasks = [asyncio.create_task(changes(watch)) for watch in watches]
        tasks.append(asyncio.create_task(pyetcd_client.to_thread(client.watch, "k", timeout=1e3)))
        while len(server.watches) < len(tasks):
            await asyncio.sleep(0.01)
        assert (await pyetcd_client.to_thread(client.get, "k", timeout=10)).value == "v"
        for task in tasks:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with _NetStore() as server, Client(server.url) as client:
        watches = [client.watcher("k", relist=False) for _ in range(60)]
        outcomes = asyncio.run(work(client, watches))
        assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 61
        assert all(watch._life.cancelled for watch in watches) and not client.scope.calls
        eventually(lambda: not any(      # a thread ends after it has told its outcome
            thread.name.startswith("pyetcd-to-thread") for thread in threading.enumerate()))
        with pytest.raises(pyetcd_client.KeyNotFound):
            asyncio.run(pyetcd_client.to_thread(client.get, "none"))


def test_client_net_a_proxy_is_asked_on_request():
    with _ClientRawServer(_CLIENT_GOOD) as proxy:
        with Client("http://etcd.invalid:1", proxies={"http": proxy.url}) as client:
            assert client.get("k").value == "v"
        assert proxy.requests == [("GET", "http://etcd.invalid:1/v2/keys/k", "")]
    refusal = (b"HTTP/1.1 502 X\r\n\r\n",)
    with _ClientRawServer(refusal) as proxy:
        with Client("https://etcd.invalid:1", proxies={"https": proxy.url}, retry=False) as client:
            with pytest.raises(pyetcd_client.ConnectionFailed, match="502") as caught:
                client.set("k", "v")
        assert not caught.value.maybe_applied and proxy.requests[0][0] == "CONNECT"


def test_client_net_another_cluster_than_expected():
    with _ClientRawServer(_CLIENT_GOOD) as server:
        with Client(server.url, expected_cluster_id="c9") as client:
            with pytest.raises(pyetcd_client.ClusterIdChanged):
                client.get("k")


def test_client_net_states_change_as_kazoos():
    states = []

    def listen(state):
        states.append(state.value)
        raise RuntimeError("a listener's own problem")

    with _ClientRawServer(_CLIENT_GOOD, _client_hang_up, _client_hang_up, _CLIENT_GOOD) as server:
        with Client(server.url, retry=False, session_timeout=0.05, on_state=listen) as client:
            once = []
            client.add_listener(lambda state: once.append(state) or True)
            assert client.state is pyetcd_client.ConnectionState.LOST
            client.get("k")
            for _ in range(2):
                with pytest.raises(pyetcd_client.ConnectionFailed):
                    client.get("k")
            eventually(lambda: len(states) == 3)
            client.get("k")
            client.remove_listener(listen)
    assert states == ["CONNECTED", "SUSPENDED", "LOST", "CONNECTED"]
    assert once == [pyetcd_client.ConnectionState.CONNECTED]


def _net_silent_head(connection):
    connection.sendall(_CLIENT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    connection.recv(1)


@pytest.mark.parametrize("server_does", [_net_silent_head, lambda c: c.recv(1)],
                         ids=["after-head", "before-head"])
def test_client_watch_close_ends_a_wait_in_another_thread_at_once(server_does):
    with _ClientRawServer(server_does) as server, Client(server.url) as client:
        events = client.watcher("k", relist=False)
        with _client_background(list, events) as outcome:
            eventually(lambda: server.requests)
            events.close()
            eventually(lambda: outcome, 30)
        assert outcome == [[]] and server.connections == 1


_NET_WAITS = {
    "get": lambda client: client.get("k"),
    "set": lambda client: client.set("k", "v"),
    "watch": lambda client: client.watch("k"),
    "iteration": lambda client: list(client.watcher("k")),
    "health": lambda client: client.health(),
    "api_execute": lambda client: client.api_execute("/v2/keys/k", "GET", {"wait": "true"}),
    "sync": lambda client: client.sync(),
}


@pytest.mark.parametrize("ender", ["scope", "client"])
@pytest.mark.parametrize("wait", _NET_WAITS.values(), ids=_NET_WAITS)
def test_client_net_every_wait_can_be_ended_from_another_thread(wait, ender):
    """The waits have 30 s and more: that it ends well before shows that somebody ended it."""
    scope = pyetcd_client.Scope()

    def work():
        with scope:
            wait(client)

    with _ClientRawServer(_net_black_hole) as server, Client(server.url) as client:
        with _client_background(work) as outcome:
            eventually(lambda: server.requests)
            (scope.cancel if ender == "scope" else client.close)()
            eventually(lambda: outcome, 30)
        assert isinstance(outcome[0], pyetcd_client.Cancelled)
        assert outcome[0].maybe_applied == (wait is _NET_WAITS["set"])
        assert len(server.requests) == 1 and not client.scope._wakers and not scope._wakers
        server._replies = [_CLIENT_GOOD]
        assert client.get("k").value == "v"                 # a closed client can be used again


def test_client_net_the_wait_for_a_better_time_can_be_ended(monkeypatch):
    monkeypatch.setattr(pyetcd_client, "BACKOFF_MIN_S", 3600.0)
    monkeypatch.setattr(pyetcd_client, "BACKOFF_MAX_S", 3600.0)
    with _ClientRawServer(_CLIENT_GOOD, _client_hang_up) as server:
        with Client(server.url, total_timeout=1e6) as client:
            client.get("k")
            with _client_background(client.get, "k") as outcome:
                assert server.closed.acquire(timeout=_CLIENT_WAIT_S)
                client.close()
    assert isinstance(outcome[0], pyetcd_client.Cancelled)


def test_client_net_scopes_the_earliest_deadline_rules_and_the_outer_one_cancels():
    scope = pyetcd_client.Scope
    with scope(1000) as outer:
        with scope() as inner, scope(2000) as innermost:
            assert outer.deadline == inner.deadline == innermost.deadline
            outer.cancel()
            for cancelled in (outer, inner, innermost):
                with pytest.raises(pyetcd_client.Cancelled):
                    cancelled.wait(0)
        with pytest.raises(pyetcd_client.Cancelled), scope() as late:
            late.left_s()
    with scope() as free:
        assert free.deadline == math.inf and not free.once
        with scope(0), scope(1000) as inner:                # try once, however much time there is
            assert inner.once and inner.deadline < free.deadline
        with pytest.raises(ValueError), scope(-1):
            pass
    assert not free.cancelled and not outer._wakers
    with _ClientRawServer(_net_black_hole) as server, Client(server.url) as client:
        for call in (lambda: client.get("k"), lambda: client.watch("k"),
                     lambda: next(client.eternal_watch("k"))):
            with scope(0.1), pytest.raises(pyetcd_client.RequestTimeout):
                call()


_NET_ONCE = {
    "get": lambda client: client.get("k", timeout=0),
    "set": lambda client: client.set("k", "v", timeout=0),
    "watch": lambda client: client.watch("k", timeout=0),
    "watcher": lambda client: next(client.watcher("k", timeout=0)),
    "total_timeout": lambda client: client.member_list(),
}


@pytest.mark.parametrize("call", _NET_ONCE.values(), ids=_NET_ONCE)
@pytest.mark.parametrize("scoped", [False, True])
def test_client_net_timeout_0_asks_once_and_does_not_wait(call, scoped):
    """Neither for a silent server nor, in rounds, for one that hangs up."""
    with _ClientRawServer(_net_black_hole) as server, _ClientRawServer(_client_hang_up) as other:
        for url in (server.url, other.url):
            with Client(url, total_timeout=0) as client:
                client._reached = True                      # else there is one round anyway
                with contextlib.ExitStack() as stack:
                    if scoped:
                        stack.enter_context(pyetcd_client.Scope(0))
                    with pytest.raises(pyetcd_client.ConnectionFailed):
                        call(client)
        assert other.connections <= 4


_NET_ENDS = {
    "daemon": "threading.Thread(target=client.watch, args=('k',), daemon=True).start(); asked()",
    "interrupted": "threading.Thread(target=interrupt).start(); client.watch('k')",
}


@pytest.mark.parametrize("kind", _NET_ENDS)
def test_client_net_a_program_ends_at_once_though_a_thread_waits(kind):
    """In 0.4.0 a finalizer waited for the reader: up to a minute."""
    program = f"""
import signal, sys, threading
import pyetcd_client
client = pyetcd_client.Client(sys.argv[1])
head = threading.Event()
pyetcd_client.Watch._on_head = lambda *_: head.set()
def asked():
    assert head.wait(20)
def interrupt():
    asked()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
{_NET_ENDS[kind]}
"""
    with _ClientRawServer(_net_silent_head) as server:
        result = _client_python("-c", program, server.url)
    assert (result.returncode, result.stderr[-18:]) == (
        (0, b"") if kind == "daemon" else (-signal.SIGINT, b"KeyboardInterrupt\n"))


def test_client_watch_closed_watch_leaves_other_calls_alone():
    with _ClientRawServer(_CLIENT_GOOD, _client_event(9), _CLIENT_GOOD) as server:
        with Client(server.url) as client:
            with client.watcher("k") as events:
                next(events)
            assert client.get("k").value == "v"             # on the connection the watch had
            events.cancel()
            assert client.get("k").value == "v" and server.connections == 1
            assert list(events) == []


def test_client_watch_takes_no_event_twice_and_none_of_others(monkeypatch):
    """A proxy that repeats, and what etcd hands out of its history that is not for us."""
    monkeypatch.setattr(pyetcd_client, "BACKOFF_MAX_S", 0.02)

    def event(index, key):
        node = {"key": key, "value": "v", "modifiedIndex": index, "createdIndex": index}
        return _client_reply({"action": "set", "node": node})

    replies = [event(9, "/d/a"), event(9, "/d/a"), event(10, "/d/_h"), event(11, "/d/a/_h/x"),
               event(12, "/dx"), event(13, "/d"), event(14, "/")]
    with _ClientRawServer(*replies) as server, Client(server.url) as client:
        with client.watcher("/d", recursive=True, index=5, relist=False) as events:
            assert [next(events).modified_index for _ in range(3)] == [9, 13, 14]


class _NetStore(_ClientRawServer):
    """A member with the key /k; its store can be put back, it can freeze, or hold heads back."""

    def __init__(self, index=7, term=3, cluster="c1", value="v", holds_heads=False):
        self.change = threading.Condition()         # guards what follows
        self.index, self.term, self.cluster = index, term, cluster
        self.changed = index                        # modified index of the key
        self.value = value
        self.frozen = self.stopped = False
        self.holds_heads = holds_heads
        self.watches = []                           # the index of each
        self.life = 0                               # of the process: a watch does not survive it
        super().__init__()

    def become(self, **what):
        with self.change:
            self.__dict__.update(what)
            self.change.notify_all()

    def write(self, value):
        self.become(index=self.index + 1, changed=self.index + 1, value=value)

    def __exit__(self, *_):
        self.become(stopped=True)
        super().__exit__()

    def _answer(self, connection, request):
        target = request[1]
        with self.change:
            self.requests.append(target)
            self.change.wait_for(lambda: self.stopped or not self.frozen)
            if self.stopped:
                return False
            if "wait=true" in target:
                return self._watch(connection, target)
            found = target.partition("?")[0] == "/v2/keys/k"
            body = self._node("get") if found else b'{"errorCode": 100, "index": %d}' % self.index
            connection.sendall(self._head(200 if found else 404, f"Content-Length: {len(body)}")
                               + body)
        return True

    def _watch(self, connection, target):
        asked = re.search("waitIndex=([0-9]+)", target)
        asked = int(asked[1]) if asked else self.index + 1
        self.watches.append(asked)
        head = self._head(200, "Transfer-Encoding: chunked")
        if not self.holds_heads:
            connection.sendall(head)
        life = self.life
        self.change.wait_for(lambda: self.stopped or life != self.life or (
            not self.frozen and self.changed >= asked))
        if self.stopped or life != self.life:
            return False
        body = self._node("set")
        connection.sendall((head if self.holds_heads else b"")
                           + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        return True

    def _head(self, status, more):
        return (f"HTTP/1.1 {status} X\r\nX-Etcd-Cluster-Id: {self.cluster}\r\nX-Etcd-Index: "
                f"{self.index}\r\nX-Raft-Term: {self.term}\r\n{more}\r\n\r\n").encode()

    def _node(self, action):
        return json.dumps({"action": action, "node": {
            "key": "/k", "value": self.value, "modifiedIndex": self.changed,
            "createdIndex": 1}}).encode()


@pytest.fixture(name="_net_fast")
def _net_fast_fixture(monkeypatch):
    monkeypatch.setattr(pyetcd_client, "WATCH_HEAD_S", 0.2)
    monkeypatch.setattr(pyetcd_client, "WATCH_PROBE_S", 0.2)
    monkeypatch.setattr(pyetcd_client, "WATCH_SETTLE_S", 0.1)
    monkeypatch.setattr(pyetcd_client, "BACKOFF_MAX_S", 0.05)


_NET_RESTORES = {                                   # index and term were 20 and 3
    "index": {"index": 9, "changed": 9}, "term": {"index": 30, "changed": 25, "term": 2},
    "cluster": {"index": 30, "changed": 25, "cluster": "c2"}}


@pytest.mark.parametrize("relist", [True, False], ids=["relist", "plain"])
@pytest.mark.parametrize("restored", _NET_RESTORES.values(), ids=_NET_RESTORES)
def test_client_watch_hears_of_a_restore(restored, relist, _net_fast):
    with _NetStore(20) as server, Client(server.url) as client:
        with client.watcher("k", relist=relist) as events:
            with _client_background(next, events) as told:
                eventually(lambda: server.watches)
                server.write("x")
            assert told[0].value == "x" and events.index == 22
            with _client_background(lambda: next(events)) as told:
                eventually(lambda: len(server.watches) == 2)
                server.become(value="old", life=1, **restored)
            if "cluster" in restored:
                assert isinstance(told[0], pyetcd_client.ClusterIdChanged)
                client.cluster_id = None            # go on with the other cluster
                if relist:
                    told = [next(events)]
            elif not relist:
                assert isinstance(told[0], pyetcd_client.EventIndexCleared)
            if relist:
                assert (told[0].value, told[0].relisted) == ("old", True)
                with _client_background(next, events) as told:
                    server.write("new")
                assert (told[0].value, told[0].relisted) == ("new", False)


def test_client_watch_from_an_index_the_store_never_had_is_refused(_net_fast):
    """A program that kept its index over a restore; who lags behind only is waited for."""
    with _NetStore(9) as server, Client(server.url) as client:
        with pytest.raises(pyetcd_client.EventIndexCleared, match="went back"):
            client.watch("k", index=50)
        with client.watcher("k", index=50) as events:
            assert next(events).relisted
        server.write("y")
        assert client.watch("k", index=10).value == "y"


@pytest.mark.parametrize("holds_heads", [False, True], ids=["after-head", "before-head"])
def test_client_watch_leaves_a_member_that_froze(holds_heads, _net_fast):
    with _NetStore(holds_heads=holds_heads) as frozen, _NetStore() as other:
        with Client([frozen.url, other.url]) as client, client.watcher("k", index=8) as events:
            with _client_background(next, events) as told:
                eventually(lambda: frozen.watches)
                frozen.become(frozen=True)
                eventually(lambda: other.watches)
                other.write("w")
            assert told[0].value == "w" and client.endpoints.current == other.url


def test_client_watch_state_says_when_the_only_member_is_frozen(_net_fast):
    states = []
    with _NetStore() as server, Client(server.url, on_state=states.append) as client:
        with client.watcher("k", index=8) as events, _client_background(next, events) as told:
            eventually(lambda: server.watches)
            server.become(frozen=True)
            eventually(lambda: client.state is pyetcd_client.ConnectionState.SUSPENDED)
            server.become(frozen=False)
            eventually(lambda: client.state is pyetcd_client.ConnectionState.CONNECTED)
            server.write("w")
        assert told[0].value == "w"


def test_client_watch_stays_with_a_proxy_that_holds_heads_back(_net_fast):
    states = []
    with _NetStore(holds_heads=True) as proxy, _NetStore() as other:
        with Client([proxy.url, other.url], on_state=states.append) as client:
            with _client_background(client.watch, "k") as told:
                eventually(lambda: len(proxy.requests) > 5)     # it was seen to be alive
                proxy.write("w")
            assert told[0].value == "w" and len(proxy.watches) == 1
        assert other.requests == [] and states == [pyetcd_client.ConnectionState.CONNECTED]


@pytest.mark.parametrize("holds_heads", [False, True], ids=["heads", "no-heads"])
def test_client_watch_of_a_quiet_key_outlives_the_history(holds_heads, _net_fast, monkeypatch):
    """Others change much, never ours; the request is made anew from where nothing can be lost."""
    monkeypatch.setattr(pyetcd_client, "WATCH_POLL_S", 0.8)
    with _NetStore(holds_heads=holds_heads) as server, Client(server.url) as client:
        with _client_background(client.watch, "k") as told:
            for turn in range(1, 4):
                server.become(index=server.index + 900)
                eventually(lambda turn=turn: len(server.watches) > turn)
                assert server.index - server.watches[-1] < 1000
            server.write("w")
        assert told[0].value == "w"


def test_client_watch_state_machine_moves_up_only_when_it_must():
    state = pyetcd_client._WatchState("/k", recursive=False, index=None, relist=False)
    state.head(100, 2, 0.0)
    assert state.index == 101
    assert state.alive(300, 2, 5.0)
    state.settle(10.0)
    assert state.index == 101                       # etcd remembers: nothing is taken on trust
    state.alive(700, 2, 10.0)
    state.settle(10.5)
    assert state.index == 101                       # a change may be on its way
    state.settle(11.0)
    assert state.index == 701
    cleared = pyetcd_client.EventIndexCleared("")
    with pytest.raises(pyetcd_client.EventIndexCleared):
        state.cleared(cleared)
    state.alive(2000, 2, 20.0)
    state.cleared(cleared)
    assert state.index == 2001 and not state.found


_NET_STEP = pyetcd_client._Step


@pytest.mark.parametrize("relist, quorum_index, step", [
    (True, 50, _NET_STEP.POLL), (False, 50, _NET_STEP.POLL), (True, 20, _NET_STEP.RELIST)])
def test_client_watch_state_machine_asks_a_quorum_before_it_believes(relist, quorum_index, step):
    state = pyetcd_client._WatchState("/k", recursive=False, index=41, relist=relist)
    if relist:
        assert state.step is _NET_STEP.LIST
        state.listed({}, 50, 2)
    state.head(50, 2, 0.0)
    assert not state.is_doubtful()
    state.head(30, 2, 1.0)                          # a follower that lags behind, or a backup
    assert state.is_doubtful() and state.step is _NET_STEP.CHECK
    state.checked(quorum_index, 2)
    assert state.step is step
    if step is _NET_STEP.RELIST:
        state.listed({"/k": pyetcd_client.Node("/k", "v", modified_index=3)}, 20, 2)
        assert [event.value for event in state.found] == ["v"] and state.index == 21


def test_client_watch_difference_leads_from_one_listing_to_the_other():
    def node(key, index, dir=False, **more):
        return pyetcd_client.Node(key, None if dir else "v", dir, modified_index=index, **more)

    def tree(*nodes):
        return {node.key: node for node in nodes}

    known = tree(node("/d", 1, True), node("/d/same", 2), node("/d/gone", 3, True),
                 node("/d/gone/x", 3), node("/d/gone-not", 4), node("/d/new-value", 5))
    found = tree(node("/d", 1, True), node("/d/same", 2), node("/d/gone-not", 4),
                 node("/d/new-value", 22), node("/d/made", 21, True), node("/d/made/y", 21),
                 node("/d/empty", 20, True))
    events = list(pyetcd_client._difference(known, found, 11, 30))
    assert [(e.action, e.key, e.modified_index) for e in events] == [
        ("set", "/d/empty", 20), ("set", "/d/made/y", 21), ("set", "/d/new-value", 22),
        ("delete", "/d/gone", 30)]
    assert all(e.relisted for e in events)
    assert events[2].prev_node.modified_index == 5 and events[3].prev_node.dir


@pytest.mark.parametrize("kind", _CLIENT_KINDS)
def test_client_watch_shows_what_went_by_unseen_as_a_difference(kind, _client_server, _client_dir):
    if _client_server.kind != kind:
        pytest.skip("the shared server is of the other kind")
    with Client(_client_server.url) as client:
        for name in ("a", "b", "dir/x"):
            start = client.set(f"{_client_dir}/{name}", "1").modified_index + 1
        with client.watcher(_client_dir, recursive=True, index=start) as events:
            client.set(_client_dir + "/a", "2")
            assert next(events).value == "2"
            client.delete(_client_dir + "/b")
            client.delete(_client_dir + "/dir", recursive=True)
            for number in range(1010):
                client.set(_client_dir + "-elsewhere", str(number))
            client.set(_client_dir + "/c", "3")
            told = [next(events) for _ in range(3)]
            after = client.set(_client_dir + "/c", "4")
            live = next(events)
    names = [(e.action, e.key[len(_client_dir):], e.relisted) for e in told]
    assert names == [("set", "/c", True), ("delete", "/b", True), ("delete", "/dir", True)]
    assert told[1].prev_node.value == "1" and told[2].node.dir
    assert live.node == after.node and not live.relisted


class _NetHistory:
    """What writers of one key each wrote, never too far ahead of the reader."""

    def __init__(self, urls, writers, count, seen):
        self._client = Client(urls, connect_timeout=1.0, total_timeout=5.0)
        self._count = count
        self._seen = seen               # events so far
        self.keys = [f"/chain/{number}" for number in range(writers)]
        self.written = {}               # index -> (key, value), of what was acknowledged
        self.unknown = 0                # writes of unknown fate
        self.final = {}                 # key -> node

    def write(self):
        with self._client as client, contextlib.ExitStack() as stack:
            outcomes = [stack.enter_context(_client_background(self._write_one, key))
                        for key in self.keys]
            eventually(lambda: all(outcomes), 300)
        assert outcomes == [[None]] * len(self.keys)
        self.final = {key: client.get(key, quorum=True).node for key in self.keys}
        client.set("/chain/end", "")

    def _write_one(self, key):
        for number in itertools.count(1):
            if len(self.written) >= self._count:
                return
            if number % 10 == 0:        # etcd remembers 1000 changes: stay within
                least = len(self.written) - 500
                eventually(lambda least=least: len(self._seen) >= least, 300)
            try:
                result = self._client.set(key, str(number))
                self.written[result.modified_index] = key, result.value
            except pyetcd_client.EtcdError as error:
                self.unknown += error.maybe_applied


def _net_watch(urls, seen):
    with Client(urls, connect_timeout=1.0) as client:
        with client.watcher("/chain", recursive=True, index=1) as events:
            for event in events:
                if event.key == "/chain/end":
                    return
                seen.append(event)


def _net_prove(seen, history):
    """The events are the history: each follows the one before it, and every write is there."""
    indexes = [event.modified_index for event in seen]
    assert indexes == sorted(set(indexes)) and not any(event.relisted for event in seen)
    last = {}
    for event in seen:
        before = last.get(event.key)
        assert (event.prev_node and event.prev_node.value) == (before and before.value)
        assert (event.prev_node and event.prev_node.modified_index) == (
            before and before.modified_index)
        last[event.key] = event.node
    assert last == history.final
    told = {event.modified_index: (event.key, event.value) for event in seen}
    assert {index: told.get(index) for index in history.written} == history.written
    assert len(told) - len(history.written) <= history.unknown


def test_client_watch_tells_4000_changes_exactly_while_members_die(tmp_path):
    """The watched member and leaders are killed and restarted meanwhile; 1000 are remembered."""
    seen = []
    with StaticCluster(tmp_path, 3, "-heartbeat-interval", "50", "-election-timeout",
                       "500") as cluster:
        urls = [member.client for member in cluster.members]
        history = _NetHistory(urls[::-1], 16, 4_000, seen)
        with _client_background(_net_watch, urls, seen) as told, _client_background(
                history.write) as wrote:
            for turn in range(3):
                eventually(lambda turn=turn: told or wrote or len(seen) > 1_000 * (turn + 1), 300)
                victim = cluster.members[0] if turn != 1 else cluster.leader()
                victim.process.kill()
                cluster.start(victim)
                victim.process.wait_log("published")
            eventually(lambda: told and wrote, 300)
    assert told == wrote == [None]
    _net_prove(seen, history)


def _restored(member, directory, kind):
    """Take the store of a running member back, by a backup or a wipe, and start it anew."""
    member.process.kill()
    data = directory / f"{member.name}.etcd"
    shutil.rmtree(data)
    if kind == "backup":
        shutil.copytree(directory / "copy", data)
    member.start("-initial-cluster", f"{member.name}={member.peer}",
                 *["-force-new-cluster"] * (kind == "backup"))


@pytest.mark.parametrize("kind", ["backup", "wiped"])
def test_client_watch_and_tree_live_through_a_real_restore(kind, tmp_path):
    """With one process after the other at the same address: what they show is what there is.

    A restored backup is another cluster, which has to be accepted; a wiped one with the same
    flags has the same id, and its index goes back.
    """
    member = ClusterMember(tmp_path, "n0")
    member.start("-initial-cluster", f"n0={member.peer}")
    with ended(member):
        member.process.wait_log("published")
        with Client(member.client) as client:
            client.set("/d/kept", "1")
            client.set("/d/changed", "1")
            done = Process(tmp_path, "backup", "-data-dir", "n0.etcd", "-backup-dir", "copy")
            assert done.popen.wait(_CLIENT_WAIT_S) == 0, done.log()
            for number in range(20):
                client.set("/d/changed", number)
            client.set("/d/lost", "1")
            with client.watcher("/d", recursive=True) as events, \
                    pyetcd_client.CachedTree(client, "/d") as tree:
                seen, errors = [], []

                def follow():
                    while True:
                        try:
                            seen.extend(iter(events))
                            return
                        except pyetcd_client.ClusterIdChanged as error:
                            errors.append(error)
                            client.cluster_id = None

                with _client_background(follow):
                    eventually(lambda: len(tree) >= 3 and events.index)
                    _restored(member, tmp_path, kind)
                    member.process.wait_log("published")
                    with Client(member.client) as other:
                        other.set("/d/new", "1")
                    wanted = {"/d/new": "1"}
                    if kind == "backup":
                        wanted = {"/d/new": "1", "/d/kept": "1", "/d/changed": "1"}

                    def shows():
                        return {node.key: node.value for node in tree.values() if not node.dir}
                    eventually(lambda: shows() == wanted)
                    eventually(lambda: any(e.key == "/d/new" for e in seen))
                    events.close()
            assert bool(errors) is (kind == "backup")
            assert any((e.action, e.key) == ("delete", "/d/lost") for e in seen)
