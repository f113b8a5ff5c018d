"""Client: against real servers, against misbehaving ones, and beside etcdctl."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import pyetcd
import pyetcd_client
from pyetcd_client import Client
from tests.kit.basics import free_port
from tests.kit.processes import PROCESS_TYPES, ClusterMember, ended
from tests.kit.servers import RawServer

_CLIENT_KINDS = ("etcd", "pyetcd")
_CLIENT_WAIT_S = 60.0


@contextlib.contextmanager
def _client_running(kind, directory):
    """A process of its own while it serves; it also has `url` and `kind`."""
    if kind == "etcd" and shutil.which("etcd") is None:
        pytest.skip("etcd is not installed")
    member = ClusterMember(directory, "m1", PROCESS_TYPES[kind])
    member.url, member.kind = member.client, kind
    with ended(member):
        member.start_alone()
        yield member


@pytest.fixture(scope="module", params=_CLIENT_KINDS, name="_client_server")
def _client_server_fixture(request, tmp_path_factory):
    """A running server; tests share it, each in a directory of its own (`_client_dir`)."""
    directory = tmp_path_factory.mktemp(f"client-{request.param}")
    with _client_running(request.param, directory) as member:
        yield member


@pytest.fixture(params=_CLIENT_KINDS, name="_client_own_server")
def _client_own_server_fixture(request, tmp_path):
    """The URL of a server for one test, which may lock everybody out."""
    if request.param == "etcd":
        with _client_running("etcd", tmp_path) as member:
            yield member.url
    else:
        with pyetcd.LocalMember() as member:
            yield member.client_url


@pytest.fixture(name="_client_dir")
def _client_dir_fixture():
    return f"/t{random.getrandbits(48):012x}"


@pytest.fixture(name="_client")
def _client_fixture(_client_server):
    with Client(_client_server.url) as client:
        yield client


@contextlib.contextmanager
def _client_background(function, *args):
    """Run `function` on a thread; yields a list that gets its result or exception."""
    outcome = []

    def run():
        try:
            outcome.append(function(*args))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="client-background", daemon=True)
    thread.start()
    yield outcome
    thread.join(_CLIENT_WAIT_S)
    assert not thread.is_alive()


# -- raw-socket servers

_CLIENT_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Etcd-Index: 7\r\n"


def _client_reply(payload, status=200, cluster="c1", extra="", index=7):
    """Return a whole answer."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    head = (f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nX-Etcd-Index: {index}\r\n"
            f"X-Etcd-Cluster-Id: {cluster}\r\n{extra}Content-Length: {len(body)}\r\n\r\n")
    return head.encode() + body


_CLIENT_NODE = {"action": "get", "node": {"key": "/k", "value": "v", "modifiedIndex": 7,
                                          "createdIndex": 7}}
_CLIENT_GOOD = _client_reply(_CLIENT_NODE)
_CLIENT_HALF = _CLIENT_GOOD[:-9]                                 # Content-Length promises more
_CLIENT_TIMED_OUT = _client_reply(
    {"errorCode": 300, "message": "Raft Internal Error", "cause": "etcdserver: request timed out",
     "index": 0}, status=500)


class _ClientRawServer(RawServer):
    """Answers each request with the next of `replies`, the last one for ever.

    A reply is bytes (sent, connection kept), bytes in a tuple (sent, then closed), or a callable
    which gets the socket; after it the connection is closed.
    """

    def __init__(self, *replies):
        self._replies = list(replies)
        self._lock = threading.Lock()           # guards what follows
        self.requests = []                      # (method, target, body)
        super().__init__(self._answer_all)

    def _answer_all(self, connection):
        with connection.makefile("rb") as stream:
            while line := stream.readline().decode():
                length = 0
                for header in iter(stream.readline, b"\r\n"):
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                request = (*line.split()[:2], stream.read(length).decode())
                if not self._answer(connection, request):
                    return

    def _answer(self, connection, request):
        """False when the connection is to be closed."""
        with self._lock:
            self.requests.append(request)
            reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        if callable(reply):
            reply(connection)
            return False
        connection.sendall(reply[0] if isinstance(reply, tuple) else reply)
        return isinstance(reply, bytes)


def _client_hang_up(connection):
    """Close without a word."""


def _net_black_hole(connection):
    connection.recv(1)


def _client_dead_url():
    """Return a URL at which every connection is refused."""
    return f"http://127.0.0.1:{free_port()}"


def _client_event(index):
    node = {"key": "/k", "value": f"v{index}", "modifiedIndex": index, "createdIndex": index}
    return _client_reply({"action": "set", "node": node}, index=index)


# -- cli

def _client_python(*arguments, **options):
    path = str(Path(pyetcd_client.__file__).parent)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, timeout=_CLIENT_WAIT_S, check=False,
        env={**os.environ, "PYTHONPATH": path}, **options)


def _client_etcdctl(url, *arguments, stdin=b""):
    """Run etcdctl; it waits 20 s for a head instead of 2, which a busy machine may need."""
    result = subprocess.run(
        ["etcdctl", "--timeout", "20s", "--total-timeout", "60s", "--endpoints", url, *arguments],
        input=stdin, capture_output=True, timeout=_CLIENT_WAIT_S, check=False,
        env={**os.environ, "ETCDCTL_API": "2"})
    return result.returncode, result.stdout.decode(), result.stderr.decode()


class _ClientCaptured:
    """A text stream over bytes, as sys.stdout is."""

    def __init__(self, data=b""):
        self.stream = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", write_through=True)

    def text(self):
        return self.stream.buffer.getvalue().decode()


def _client_main(*arguments, stdin=b"", main=pyetcd_client.main, directory="."):
    """Run a command line in this process; return exit code, output and errors."""
    out, err, given = _ClientCaptured(), _ClientCaptured(), _ClientCaptured(stdin)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(sys, "stdout", out.stream)
        patch.setattr(sys, "stderr", err.stream)
        patch.setattr(sys, "stdin", given.stream)
        code = main(arguments)
    return code, out.text(), err.text()


def run_tool(directory, *arguments):
    """Run `pyetcd <arguments>` in a directory, but in this process."""
    return _client_main(*map(str, arguments), main=lambda words: pyetcd.main(list(words)),
                        directory=directory)


def _client_blurred(outcome, directory):
    """Return an outcome without what differs between two runs: directory, indexes, times."""
    code, *texts = outcome
    rules = [(re.escape(directory), "DIR"), (r"/\d{20}", "/ORDER"), (r"Index: \d+", "Index: N"),
             (r"\[\d+\]$", "[N]"), (r'Index":\d+', 'Index":N'), (r'"20\d\d-[^"]+Z"', "TIME"),
             (r"\[\d+ != \d+\]", "[N != N]")]
    for pattern, text in rules:
        texts = [re.sub(pattern, text, given, flags=re.MULTILINE) for given in texts]
    return (code, *texts)
