"""TLS: who may talk to whom, and what the log says of the others."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import logging
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import time
import types
import urllib.parse
import urllib.request
import warnings
from pathlib import Path

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

import pyetcd
from tests.kit.basics import eventually, free_port
from tests.kit.certificates import _tls_member
from tests.kit.clients import _client_main
from tests.kit.http import _http_get, _http_member, _HttpSocket
from tests.kit.processes import Process


def _tls_session(certificates, cert=None):
    session = requests.Session()
    session.trust_env = False
    session.verify, session.cert = certificates.ca_file, cert
    return session


def test_tls_serves_clients_with_all_sizes_of_requests_and_replies(tmp_path, certificates):
    """Records of TLS end nowhere special: neither reads nor writes may depend on them."""
    with _tls_member(tmp_path, certificates.files()) as (server, url), \
            _tls_session(certificates) as session:
        keys = url + "/v2/keys"
        for size in (0, 1, 16_384, 400_000):
            value = "x" * size
            assert session.put(f"{keys}/d/{size}", {"value": value}, timeout=60).status_code == 201
            assert session.get(f"{keys}/d/{size}", timeout=60).json()["node"]["value"] == value
        for i in range(10):
            session.put(f"{keys}/d/more{i}", {"value": "y" * 400_000}, timeout=60)
        nodes = session.get(f"{keys}/d?recursive=true", timeout=60).json()["node"]["nodes"]
        assert sum(len(node["value"]) for node in nodes) == 4_000_000 + 416_385
        assert server.call(lambda etcd: etcd.store.current_index) > 10


def test_tls_discovery_urls_are_https(tmp_path, certificates):
    """A token made over TLS leads back to the port that it came from."""
    with _tls_member(tmp_path, certificates.files()) as (_, url), \
            _tls_session(certificates) as session:
        assert session.get(url + "/new", timeout=60).text.startswith(url + "/")


def test_tls_streams_events(tmp_path, certificates):
    """A stream of chunks over TLS; its end by the client frees the watcher."""
    with _tls_member(tmp_path, certificates.files()) as (server, url), \
            _tls_session(certificates) as session:
        stream = session.get(
            f"{url}/v2/keys/w?wait=true&stream=true", stream=True, timeout=60
        )
        lines = stream.iter_lines(chunk_size=1)
        for value in ("1", "2"):
            requests.put(f"{url}/v2/keys/w", {"value": value}, verify=certificates.ca_file,
                         timeout=60)
            assert json.loads(next(lines))["node"]["value"] == value
        stream.close()
        eventually(lambda: server.call(lambda etcd: etcd.store.stats.watchers) == 0)


def test_tls_port_explains_itself_to_plain_http(tmp_path, certificates, caplog):
    """Go's sentence, and a line in the log."""
    caplog.set_level(logging.INFO)
    with _tls_member(tmp_path, certificates.files()) as (_, url):
        answer = requests.get(url.replace("https:", "http:") + "/version", timeout=60)
        assert (answer.status_code, answer.text) == (
            400, "Client sent an HTTP request to an HTTPS server.\n")
        assert "client sent an HTTP request to an HTTPS server" in caplog.text


@pytest.mark.parametrize(("which", "line"), [
    ("none", "client didn't provide a certificate"),
    ("foreign", "cannot be verified"),
    ("expired", "certificate has expired; issue a new one"),
    ("revoked", "certificate revoked by the revocation list"),
    ("other name", "not for alice"),
])
def test_tls_client_certificates_that_are_refused(tmp_path, certificates, caplog, which, line):
    """Each gets its line in the log; those who are welcome do not notice."""
    good = certificates.issue("good", "alice")
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    bad = {
        "none": None,
        "foreign": certificates.issue("foreign", "alice", ca=certificates.other_ca),
        "expired": certificates.issue("expired", "alice", not_after=past),
        "revoked": certificates.issue("revoked", "alice"),
        "other name": certificates.issue("other", "bob"),
    }[which]
    more = {"allowed_name": "alice"} if which == "other name" else {}
    if which == "revoked":
        more["crl_file"] = _revocation_list(certificates, bad[0])
    files = certificates.files(client_cert_auth=True, **more)
    with _tls_member(tmp_path, files) as (_, url), _tls_session(certificates, good) as welcome:
        assert welcome.get(url + "/version", timeout=60).status_code == 200
        with pytest.raises(requests.ConnectionError), _tls_session(certificates, bad) as refused:
            refused.get(url + "/version", timeout=60)
        assert welcome.get(url + "/version", timeout=60).status_code == 200
        eventually(lambda: line in caplog.text)
        assert "rejected connection from 127.0.0.1:" in caplog.text


@pytest.mark.parametrize("allowed, hosts, cn, passes", [
    ({"allowed_cn": "peer"}, ("a.test",), "peer", True),
    ({"allowed_cn": "peer"}, ("peer",), "other", False),        # a host of that name is no CN
    ({"allowed_cn": "peer"}, ("peer",), None, False),
    ({"allowed_name": "a.test"}, ("a.test", "b.test"), "x", True),
    ({"allowed_name": "A.test"}, ("a.test",), None, True),
    ({"allowed_name": "a.test"}, ("b.test",), "a.test", False),     # SANs count, if there are any
    ({"allowed_name": "a.test"}, ("*.test",), None, True),
    ({"allowed_name": "a.b.test"}, ("*.test",), None, False),
    ({"allowed_name": "10.0.0.1"}, ("10.0.0.1",), None, True),
    ({"allowed_name": "fd00::1"}, ("fd00::1",), None, True),
    ({"allowed_name": "10.0.0.1"}, ("10.0.0.2",), "10.0.0.1", False),
    ({"allowed_cn": "peer", "allowed_name": "a.test"}, ("a.test",), "peer", True),
], ids=str)
def test_tls_names_that_are_allowed(certificates, allowed, hosts, cn, passes):
    """-peer-cert-allowed-cn looks at the common name, -allowed-hostname at the SANs first."""
    cert, _ = certificates.issue("named", *hosts, common_name=cn)
    shown = ssl._ssl._test_decode_cert(cert)
    context = pyetcd.TlsContext(certificates.files(client_cert_auth=True, **allowed), server=True)
    check = functools.partial(context.check_peer, types.SimpleNamespace(getpeercert=lambda: shown))
    if passes:
        check()
    else:
        with pytest.raises(ssl.SSLError, match="the client certificate is for"):
            check()


def test_tls_a_certificate_without_sans_is_known_by_its_common_name(certificates):
    """As all were once; of two common names the last one counts, as in Go."""
    subject = ((("commonName", "first"),), (("commonName", "a.test"),))
    sock = types.SimpleNamespace(getpeercert=lambda: {"subject": subject})
    for allowed, passes in (({"allowed_name": "a.test"}, True), ({"allowed_cn": "a.test"}, True),
                            ({"allowed_cn": "first"}, False)):
        files = certificates.files(client_cert_auth=True, **allowed)
        with contextlib.nullcontext() if passes else pytest.raises(ssl.SSLError):
            pyetcd.TlsContext(files, server=True).check_peer(sock)


def _revocation_list(certificates, path):
    """A list of the authority that revokes the certificate in `path`."""
    leaf = x509.load_pem_x509_certificate(Path(path).read_bytes())
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)
    revoked = x509.RevokedCertificateBuilder().serial_number(leaf.serial_number)
    crl = x509.CertificateRevocationListBuilder().issuer_name(leaf.issuer).last_update(
        now - day).next_update(now + day).add_revoked_certificate(
        revoked.revocation_date(now).build()).sign(
        serialization.load_pem_private_key(certificates.ca.private_key_pem.bytes(), None),
        hashes.SHA256(),
    )
    file = certificates.directory / "revoked.crl"
    file.write_bytes(crl.public_bytes(serialization.Encoding.PEM))
    return str(file)


def test_tls_refuses_old_versions(tmp_path, certificates):
    """TLS 1.1 and older are no options today."""
    with _tls_member(tmp_path, certificates.files()) as (_, url):
        context = ssl.create_default_context(cafile=certificates.ca_file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        with _HttpSocket(url) as client, pytest.raises((ssl.SSLError, ConnectionError)):
            context.wrap_socket(client.socket, server_hostname="127.0.0.1")


def test_tls_stuck_handshakes_block_nobody_and_end(tmp_path, certificates, monkeypatch):
    """Silent connections and halves of a greeting: others are served, and time closes these."""
    monkeypatch.setattr(pyetcd, "HANDSHAKE_SECONDS_MAX", 1.0)
    with _tls_member(tmp_path, certificates.files()) as (server, url), \
            contextlib.ExitStack() as stack:
        stuck = [stack.enter_context(_HttpSocket(url)) for _ in range(40)]
        for client in stuck[::2]:
            client.send(b"\x16\x03\x01\x02\x00\x01\x00")
        with _tls_session(certificates) as session:
            assert session.get(url + "/version", timeout=60).status_code == 200
        assert all(client.rest() == b"" for client in stuck)


def test_tls_certificates_are_read_again_when_they_change(tmp_path, certificates, monkeypatch,
                                                          caplog):
    """New connections get the new certificate; a broken one leaves the old in use."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(pyetcd, "CERTIFICATE_CHECK_SECONDS", 0.0)
    files = certificates.files("changing")
    with _tls_member(tmp_path, files) as (_, url):
        parts = urllib.parse.urlsplit(url)

        def shown():
            return ssl.get_server_certificate((parts.hostname, parts.port))

        first = shown()
        Path(files.cert_file).write_bytes(b"half a file")
        assert shown() == first
        assert "cannot be used, the old ones stay" in caplog.text
        certificates.issue("changing")
        assert shown() != first
        assert "new connections use them" in caplog.text


@pytest.mark.parametrize(("files", "message"), [
    ({}, "KeyFile and CertFile are not presented"),
    ({"cert_file": "/nowhere/c.pem", "key_file": "/nowhere/k.pem"},
     "open /nowhere/c.pem: no such file or directory"),
    ({"cert_file": __file__, "key_file": __file__}, "it must hold PEM text"),
])
def test_tls_files_that_cannot_be_used_end_the_start(tmp_path, files, message):
    """One line that names the file."""
    server = pyetcd.Server(
        data_dir=str(tmp_path / "data"), listen_client_urls=["https://127.0.0.1:0"],
        client_tls=pyetcd.TlsFiles(**files),
    )
    with pytest.raises(pyetcd.StartError, match=re.escape(message)):
        server.start()
    server.stop()


@contextlib.contextmanager
def _tls_cluster(tmp_path, sides):
    """One member per TlsFiles of the peer side; nothing is asserted of their links."""
    members = [
        pyetcd.Server(
            name=f"m{i}", data_dir=str(tmp_path / f"m{i}"), peer_tls=files,
            listen_peer_urls=["https://127.0.0.1:0"], initial_cluster_token="tls",
            heartbeat_ms=50, election_ms=500,
        ) for i, files in enumerate(sides)
    ]
    with contextlib.ExitStack() as stack:
        for member in members:
            stack.callback(member.stop)
            member.bind()
        initial = ",".join(f"{m.config.name}={m.peer_urls[0]}" for m in members)
        for member in members:
            member.start(initial_cluster=initial)
        yield members


def test_tls_between_members_with_certificates_on_both_sides(tmp_path, certificates):
    """Streams, votes, posts and a member that joins later, all with client certificates."""
    files = certificates.files("peer", client_cert_auth=True)
    with _tls_cluster(tmp_path, [files] * 3) as members:
        assert all(member.wait_ready(60) for member in members)
        urls = [member.client_urls[0] for member in members]
        requests.put(urls[0] + "/v2/keys/a", {"value": "1"}, timeout=60).raise_for_status()
        eventually(lambda: all(
            requests.get(url + "/v2/keys/a", timeout=60).status_code == 200 for url in urls))
        joining = pyetcd.Server(
            name="late", data_dir=str(tmp_path / "late"), peer_tls=files,
            listen_peer_urls=["https://127.0.0.1:0"], initial_cluster_state="existing",
        )
        joining.bind()
        requests.post(urls[0] + "/v2/members", json={"peerURLs": list(joining.peer_urls)},
                      timeout=60).raise_for_status()
        initial = [f"{m.config.name}={m.peer_urls[0]}" for m in (*members, joining)]
        joining.start(initial_cluster=",".join(initial))
        with contextlib.closing(contextlib.ExitStack()) as stack:
            stack.callback(joining.stop)
            assert joining.wait_ready(60)
            late = joining.client_urls[0] + "/v2/keys/a"
            eventually(lambda: requests.get(late, timeout=60).status_code == 200)


def test_tls_member_with_the_wrong_certificate_stays_outside(tmp_path, certificates, caplog):
    """Names and authorities are checked in both directions, and the others work on."""
    good = certificates.files("peer", client_cert_auth=True)
    foreign = pyetcd.TlsFiles(
        *certificates.issue("foreign-peer", ca=certificates.other_ca),
        trusted_ca_file=certificates.ca_file, client_cert_auth=True,
    )
    with _tls_cluster(tmp_path, [good, good, foreign]) as members:
        assert all(member.wait_ready(60) for member in members[:2])
        eventually(lambda: "cannot be verified" in caplog.text)
        assert not members[2].wait_ready(0)
        answer = requests.put(members[0].client_urls[0] + "/v2/keys/a", {"value": "1"}, timeout=60)
        assert answer.status_code == 201


def test_tls_slow_reader_gets_all_answers(tmp_path, certificates):
    """After a send that was blocked TLS wants the same bytes again, however many came since."""
    with _tls_member(tmp_path, certificates.files()) as (server, url):
        context = ssl.create_default_context(cafile=certificates.ca_file)
        context.check_hostname = False
        server.call(lambda etcd: etcd.store.set("/1/k", value="x" * 3_000, now_ns=time.time_ns()))
        listener, count = server._client_listeners[0], 3_000
        with _HttpSocket(server, receive_buffer=4096, timeout_s=20, tls=context) as client:
            for _ in range(count // 100):           # each group finds the output blocked
                client.send(_http_get("/v2/keys/k") * 100)
            eventually(lambda: listener.unread)
            assert {client.answer()[0] for _ in range(count)} == {200}


def test_tls_members_check_the_name_in_the_url(tmp_path, certificates, caplog):
    """A certificate of the right authority for another host is no certificate."""
    good = certificates.files("peer")
    with _tls_cluster(tmp_path, [good, certificates.files("elsewhere", "10.1.2.3")]):
        eventually(lambda: "IP address mismatch" in caplog.text)


def test_tls_certificate_for_other_names_is_told_with_the_names(tmp_path, certificates, caplog):
    """Both: the name that was wanted, and those that are there."""
    good = certificates.files("peer")
    bad = certificates.files("elsewhere", "10.1.2.3", "m1.example")
    with _tls_cluster(tmp_path, [good, bad]):
        eventually(lambda: "mismatch" in caplog.text)
        shown = ' it has "m1.example", "10.1.2.3";' if sys.version_info >= (3, 10) else ""
        eventually(lambda: f"certificate is not valid for '127.0.0.1'.{shown} issue one whose"
                           f" subjectAltName has the host of the URL" in
                   caplog.text.replace('"10.1.2.3", "m1.example"', '"m1.example", "10.1.2.3"'))


@pytest.fixture(scope="module")
def tls_pairs(tmp_path_factory):
    """A certificate with its key, and other files, made by openssl."""
    path = tmp_path_factory.mktemp("pairs of keys")
    for line in (
        "req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -subj /CN=etcd",
        "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out other.pem",
        "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:prime256v1 -out ec.pem",
        "pkcs8 -topk8 -in key.pem -passout pass:secret -out locked.pem",
        "x509 -in cert.pem -outform der -out cert.der",
        "pkey -in key.pem -outform der -out key.der",
    ):
        subprocess.run(["openssl", *line.split()], cwd=path, check=True, capture_output=True)
    return path


def _tls_pair_error(cert, key):
    with pytest.raises(pyetcd.StartError) as caught:
        pyetcd.TlsContext(pyetcd.TlsFiles(cert_file=str(cert), key_file=str(key)), server=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("cert, key, told", [
    ("cert.pem", "ec.pem", "the key does not belong to the certificate"),
    ("cert.pem", "other.pem", "the key does not belong to the certificate"),
    ("key.pem", "cert.pem", "key.pem holds a private key and not a certificate"),
    ("cert.pem", "cert.pem", "cert.pem holds a certificate and not a private key"),
    ("cert.der", "key.pem", "it must hold PEM text, and "),
    ("cert.pem", "key.der", "it must hold PEM text, and "),
    ("cert.pem", "nowhere", "nowhere: no such file or directory"),
])
def test_tls_pair_that_does_not_fit_is_explained(tls_pairs, cert, key, told):
    assert told in _tls_pair_error(tls_pairs / cert, tls_pairs / key)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("cert, key", [
    ("cert.pem", "locked.pem"), ("cert.der", "key.pem"), ("cert.pem", "key.der"),
])
def test_tls_command_of_the_hint_works_as_printed(tls_pairs, cert, key):
    """It is run by a shell, without a terminal; then the file that it has made is used."""
    text = _tls_pair_error(tls_pairs / cert, tls_pairs / key)
    command = text.split("`")[1]
    subprocess.run(command, shell=True, check=True, input=b"secret\n", capture_output=True,
                   start_new_session=True)
    made = shlex.split(command)[-1]
    used = (made, tls_pairs / key) if cert.endswith("der") else (tls_pairs / cert, made)
    pyetcd.TlsContext(pyetcd.TlsFiles(*map(str, used)), server=True)


def test_tls_through_a_proxy(tmp_path, certificates):
    """It presents the peer certificate to members, and has one of its own for clients."""
    files = certificates.files("both", client_cert_auth=True)
    with _http_member(
        tmp_path, listen_client_urls=["https://127.0.0.1:0"], client_tls=files,
        listen_peer_urls=["https://127.0.0.1:0"], peer_tls=files,
    ) as server, pyetcd.ProxyServer(
        data_dir=str(tmp_path / "proxy"), initial_cluster=f"default={server.peer_urls[0]}",
        listen_client_urls=["https://127.0.0.1:0"], client_tls=certificates.files("door"),
        peer_tls=files,
    ) as proxy, _tls_session(certificates) as session:
        url = proxy.client_urls[0] + "/v2/keys/a"
        for size in (1, 900_000):
            value = "x" * size
            session.put(url, {"value": value}, timeout=60).raise_for_status()
            assert session.get(url, timeout=60).json()["node"]["value"] == value


def test_tls_by_flags_as_operators_give_them(tmp_path, certificates):
    """A process with both sides on TLS, asked by etcdctl with a client certificate."""
    client, peer = certificates.issue("by-flags", "localhost", "127.0.0.1"), free_port()
    url = f"https://127.0.0.1:{free_port()}"
    member = Process(
        tmp_path, "-name", "m", "-cert-file", client[0], "-key-file", client[1],
        "-trusted-ca-file", certificates.ca_file, "-client-cert-auth",
        "-listen-client-urls", url, "-advertise-client-urls", url,
        "-peer-cert-file", client[0], "-peer-key-file", client[1],
        "-peer-trusted-ca-file", certificates.ca_file,
        "-listen-peer-urls", f"https://127.0.0.1:{peer}",
        "-initial-advertise-peer-urls", f"https://127.0.0.1:{peer}",
        "-initial-cluster", f"m=https://127.0.0.1:{peer}",
    )
    try:
        member.wait_log("published")
        assert f"clientTLS: cert = {client[0]}, key = {client[1]}, ca = , trusted-ca = " in (
            member.log())
        with _tls_session(certificates, client) as session:
            session.put(url + "/v2/keys/a", {"value": "1"}, timeout=60).raise_for_status()
            peers = session.get(f"https://127.0.0.1:{peer}/members", timeout=60).json()
            assert peers[0]["clientURLs"] == [url]
        if not shutil.which("etcdctl"):
            pytest.skip("etcdctl (Debian: etcd-client) is not installed")
        answer = subprocess.run(
            ["etcdctl", "--endpoints", url, "--ca-file", certificates.ca_file,
             "--cert-file", client[0], "--key-file", client[1], "get", "a"],
            env={**os.environ, "ETCDCTL_API": "2"}, capture_output=True, text=True, timeout=20,
        )
        assert (answer.stdout, answer.returncode) == ("1\n", 0), answer.stderr
        words = ["--endpoints", url, "--ca-file", certificates.ca_file, "get", "a"]
        assert _client_main(*words)[0] == 2            # the server wants to know who asks
        assert _client_main("--cert-file", client[0], "--key-file", client[1], *words) == (
            0, "1\n", "")
    finally:
        member.kill()


def test_tls_files_that_cannot_be_opened_for_a_while_are_read_later(
    certificates, monkeypatch, caplog
):
    """Out of descriptors when they changed; and one line says so, however often it is tried."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(pyetcd, "CERTIFICATE_CHECK_SECONDS", 0.0)
    context = pyetcd.TlsContext(certificates.files("scarce"), server=True)
    first = context.current
    certificates.issue("scarce")
    with monkeypatch.context() as full:
        def fails(path):
            raise pyetcd.StartError(f"open {path}: too many open files")
        full.setattr(pyetcd, "check_readable", fails)
        assert [context.current for _ in range(3)] == [first] * 3
    assert context.current is not first
    assert caplog.text.count("the old ones stay") == 1
    assert caplog.text.count("new connections use them") == 1


def test_tls_default_authorities_are_kept_if_they_could_be_read(monkeypatch):
    """Where nothing can be opened there are none, which may not last."""
    monkeypatch.setattr(pyetcd, "_default_tls", [])
    with monkeypatch.context() as full:
        full.setattr(pyetcd.os, "devnull", "/nowhere")
        assert pyetcd.default_tls() is not pyetcd.default_tls()
    assert pyetcd.default_tls() is pyetcd.default_tls()
