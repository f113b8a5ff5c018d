"""Members in processes of their own, of pyetcd and of etcd, alone and in clusters.

In this process, members are those of our users: pyetcd.LocalMember and pyetcd.LocalCluster.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import py_compile
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pyetcd
import pyetcd_client
from tests.kit.basics import _ports, eventually, free_port

_FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def compile_once():
    """Keep the byte code of the two files: to compile them costs more than to start a member."""
    for module in (pyetcd, pyetcd_client):
        py_compile.compile(module.__file__, doraise=True)


def compiled(module):
    """Return the path of a module's byte code, for a process that runs it as a program."""
    return importlib.util.cache_from_source(module.__file__)


def copy_module(module, directory):
    """Copy a module together with its byte code, which belongs to this time of change."""
    shutil.copy2(module.__file__, directory)
    (directory / "__pycache__").mkdir(exist_ok=True)
    shutil.copy2(compiled(module), directory / "__pycache__")


class Process:
    """`python pyetcd.py`, compiled before, with a log that can be read while it runs."""

    program = (sys.executable, compiled(pyetcd))

    def __init__(self, directory, *arguments, env=None):
        self.directory = directory
        self.log_path = directory / f"log{next(_ports)}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("ETCD_")}
        with open(self.log_path, "wb") as log:
            self.popen = subprocess.Popen(
                [*self.program, *arguments], cwd=directory,
                stdout=log, stderr=log, env={**clean, **(env or {})},
            )

    def log(self):
        return self.log_path.read_text(errors="replace")

    def wait_log(self, text, timeout_s=60.0):
        def seen():
            if text not in self.log() and self.popen.poll() is not None:
                raise AssertionError(f"exited {self.popen.returncode}:\n{self.log()}")
            return text in self.log()
        eventually(seen, timeout_s, f"{text!r} in the log")

    def kill(self, number=signal.SIGKILL):
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(60)


class EtcdProcess(Process):
    """The same of Debian's etcd."""

    program = ("etcd", "--enable-v2", "--strict-reconfig-check=false")    # off in etcd 2.3


PROCESS_TYPES = {"etcd": EtcdProcess, "pyetcd": Process}


class ClusterMember:
    """One member: its URLs, its flags, and its present process."""

    def __init__(self, directory, name, process_type=Process):
        self.directory, self.name = directory, name
        self.process_type = process_type
        self.client = f"http://127.0.0.1:{free_port()}"
        self.peer = f"http://127.0.0.1:{free_port()}"
        self.process = None
        self.failure = None             # of the last request without an answer

    def flags(self):
        return [
            "-name", self.name, "-initial-advertise-peer-urls", self.peer,
            "-listen-peer-urls", self.peer, "-listen-client-urls", self.client,
            "-advertise-client-urls", self.client,
        ]

    def start(self, *more):
        self.process = self.process_type(self.directory, *self.flags(), *more)

    def start_alone(self):
        """Start as a cluster of one; return when it serves."""
        self.start("-initial-cluster", f"{self.name}={self.peer}")
        eventually(self._serves, what=f"{self.name} serves")

    def _serves(self):
        assert self.process.popen.poll() is None, self.process.log()
        leader = self.request("GET", "/v2/members/leader")
        return leader and leader[0] == 200 and self.request("GET", "/v2/keys/", quorum="true")

    def request(self, method, path, data=None, timeout_s=10.0, **query):
        """Return (status, JSON or text, headers); None if nobody answers (see `failure`).

        data: a form.
        """
        target = path + ("?" + urllib.parse.urlencode(query) if query else "")
        connection = http.client.HTTPConnection(
            urllib.parse.urlsplit(self.client).netloc, timeout=timeout_s)
        with contextlib.closing(connection):
            try:
                connection.request(method, target, data and urllib.parse.urlencode(data), _FORM)
                answer = connection.getresponse()
                text = answer.read().decode()
            except (OSError, http.client.HTTPException) as error:
                self.failure = error
                return None
        try:
            return answer.status, json.loads(text), answer.headers
        except ValueError:
            return answer.status, text, answer.headers

    def put_many(self, pairs, connections=40):
        """Write all (key, value) pairs, many at a time; values may hold what a URL may."""
        shares = [[b"PUT /v2/keys/%s?value=%s HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
                   % (key.encode(), value.encode()) for key, value in pairs[number::connections]]
                  for number in range(connections)]
        address = pyetcd.url_address(self.client)
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(socket.create_connection(address, 60))
                       for _ in range(connections)]
            for writer, share in zip(writers, shares):
                writer.sendall(b"".join(share))
                writer.shutdown(socket.SHUT_WR)
            answers = [b"".join(iter(lambda w=writer: w.recv(1 << 16), b"")) for writer in writers]
        done = [len(re.findall(rb"HTTP/1.1 20[01] ", answer)) for answer in answers]
        assert sum(done) == len(pairs), answers

    def put(self, key, value, **more):
        return self.request("PUT", f"/v2/keys/{key}", {"value": value, **more})

    def value(self, key, **query):
        answer = self.request("GET", f"/v2/keys/{key}", **query)
        return answer[1]["node"]["value"] if answer and answer[0] == 200 else None

    def index(self):
        answer = self.request("GET", "/v2/keys/")
        return answer and int(answer[2]["X-Etcd-Index"])

    def is_leader(self):
        answer = self.request("GET", "/v2/stats/self", timeout_s=2)
        return bool(answer and answer[0] == 200 and answer[1]["state"] == "StateLeader")


@contextlib.contextmanager
def ended(*members):
    """In the end, kill those of these members that were started."""
    try:
        yield
    finally:
        for member in members:
            if member.process:
                member.process.kill()


class StaticCluster:
    """n members by -initial-cluster; a context manager that ends them all."""

    member_type = ClusterMember

    def __init__(self, directory, size=3, *flags, process_type=Process):
        self.directory = directory
        self.members = [self.member_type(directory, f"n{i}", process_type) for i in range(size)]
        self.flags = flags
        self.initial = ",".join(f"{m.name}={m.peer}" for m in self.members)

    def start(self, member, *more):
        member.start("-initial-cluster", self.initial, *self.flags, *more)

    def __enter__(self):
        with contextlib.ExitStack() as on_failure:
            on_failure.push(self)
            for member in self.members:
                self.start(member)
            for member in self.members:
                member.process.wait_log("published")
            on_failure.pop_all()
        return self

    def __exit__(self, *exc_info):
        for member in self.members:
            if member.process:
                member.process.kill()
                if exc_info[0]:
                    print(f"--- {member.name}\n{member.process.log()[-3000:]}")

    def leader(self):
        return eventually(
            lambda: next((m for m in self.members
                          if m.process.popen.poll() is None and m.is_leader()), None),
            what="a leader")

    def put_through(self, member, key, value, timeout_s=10.0):
        """Write until it is acknowledged; return the seconds it took."""
        started = time.monotonic()

        def written():
            answer = member.request("PUT", f"/v2/keys/{key}", {"value": value}, timeout_s=3)
            return answer and answer[0] in (200, 201)
        eventually(written, timeout_s, f"a write of {key}")
        return time.monotonic() - started


@contextlib.contextmanager
def _members_embedded(tmp_path, size):
    """Members in this process; yields them, the leader first."""
    times = {"heartbeat_ms": 50, "election_ms": 300}
    with pyetcd.LocalCluster(size, str(tmp_path), **times) as cluster:
        leader = cluster.leader()
        yield sorted(cluster.members, key=lambda member: member is not leader)
