"""Systems other than Linux: what they lack is taken away, and the rest must do."""

from __future__ import annotations

import errno
import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

import pyetcd
from tests.kit.basics import ROOT

_MACOS = ROOT / "tests/kit/macos"

# Windows as far as a program sees it that imports our modules, after those of Python.
_WINDOWS = """
import builtins, importlib, os, re, select, shutil, signal, socket, sys, tempfile, types
sys.path.insert(0, %r)
gone = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "crypt", "pty", "posix")
texts = [open(name + ".py", encoding="utf-8").read() for name in ("pyetcd", "pyetcd_client")]
for name in re.findall(r"^(?:import|from) (\\w+)", "\\n".join(texts), re.M):
    if name not in gone:
        importlib.import_module(name)
import pytest
tempfile.gettempdir()                       # found once, with pwd
shutil.os = types.SimpleNamespace(**vars(os))       # it decided at its import what to call
for name in gone:
    sys.modules[name] = None
for module, wanted in (
    (select, "select|error"), (signal, "SIG(ABRT|BREAK|FPE|ILL|INT|SEGV|TERM|_DFL|_IGN)|Signals|"
     "Handlers|default_int_handler|[gs]etsignal|signal|raise_signal|strsignal"),
):
    for name in [n for n in vars(module) if not n.startswith("_")]:
        if not re.fullmatch(wanted, name):
            delattr(module, name)
for name in ("fork", "forkpty", "register_at_fork", "getuid", "geteuid", "getgid", "getegid",
             "getpgid", "setsid", "set_blocking", "mkfifo", "sysconf", "uname", "nice", "pread",
             "pwrite", "preadv", "pwritev", "fdatasync", "sendfile", "memfd_create", "eventfd",
             "pipe2", "chown", "fchmod", "fchown", "killpg", "wait3", "wait4", "sched_yield",
             "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_SYNC", "O_DSYNC"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("AF_UNIX", "SO_REUSEPORT", "MSG_DONTWAIT", "MSG_NOSIGNAL", "SOCK_CLOEXEC",
             "SOCK_NONBLOCK"):
    if hasattr(socket, name):
        delattr(socket, name)
sys.platform, os.name = "win32", "nt"
import pyetcd, pyetcd_client, pyetcd_pytest
pyetcd_client.Client()
for start in (pyetcd.Server, pyetcd.LocalMember().start, pyetcd.LocalCluster(3).start):
    try:
        start()
    except pyetcd.StartError as error:
        print(error)
sys.exit(pyetcd.main(["-name", "a"]))
"""


def _python(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, **environ}, capture_output=True,
        text=True, timeout=120)


def test_systems_like_windows_import_everything_and_say_what_is_missing() -> None:
    """Both modules and the fixtures can be imported; a server says one sentence, however begun."""
    done = _python("-c", _WINDOWS % str(ROOT))
    sentence = ("pyetcd does not run on win32, which lacks file locks (fcntl) and poll: use Linux"
                " or macOS, or on Windows WSL or a container; pyetcd_client runs here\n")
    assert (done.returncode, done.stderr) == (1, sentence)
    assert done.stdout == 3 * sentence


def test_systems_like_macos_run_a_cluster() -> None:
    """Without epoll and the rest a cluster of the fixtures serves, fails over and starts again."""
    done = _python("-c", """if 1:
        import select, urllib.request, pyetcd
        assert not hasattr(select, "epoll")
        def put(member, key):
            request = urllib.request.Request(f"{member.client_url}/v2/keys/{key}", b"value=1",
                                             method="PUT")
            return urllib.request.urlopen(request, timeout=30).status
        with pyetcd.LocalCluster(3) as cluster:
            old = cluster.leader()
            assert put(old, "a") == 201
            old.kill()
            assert put(cluster.wait_leader(), "b") == 201
            old.start()
            print(urllib.request.urlopen(old.client_url + "/v2/keys/b?quorum=true").status)
            print(urllib.request.urlopen(old.client_url + "/metrics").status)
        """, PYTHONPATH=f"{_MACOS}{os.pathsep}{ROOT}", PYETCD_TEST_SYSTEM="macos")
    assert (done.returncode, done.stdout) == (0, "200\n200\n"), done.stderr


def test_systems_without_epoll_poll_as_epoll_does() -> None:
    """The same calls, the same bits: readable, writable, and hung up."""
    ours, theirs = os.pipe()
    polls = [pyetcd.Poll(), *([select.epoll()] if hasattr(select, "epoll") else [])]
    for poll in polls:
        poll.register(ours, 1)
        poll.register(theirs, 4)
        assert poll.poll(0.0) == [(theirs, 4)]
        poll.modify(theirs, 0)
        assert poll.poll(0.001) == []
        poll.unregister(theirs)
    os.close(theirs)
    assert [poll.poll() for poll in polls] == [[(ours, 16)]] * len(polls)
    os.close(ours)
    for poll in polls:
        poll.close()


def test_systems_with_a_full_fsync_use_it_where_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS: F_FULLFSYNC, and fsync where the file system does not know it; failures are raised."""
    done, answer = [], 0

    def control(handle: int, command: int) -> int:
        done.append(command)
        if answer:
            raise OSError(answer, os.strerror(answer))
        return 0

    monkeypatch.setattr(pyetcd.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(pyetcd.fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(-1))
    with open(tmp_path / "file", "wb") as file:
        pyetcd.OS_DISK.fsync(file.fileno())
        assert done == [51]
        answer = errno.ENOTSUP
        pyetcd.OS_DISK.fsync(file.fileno())
        assert done == [51, 51, -1]
        answer = errno.EIO
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.EIO))):
            pyetcd.OS_DISK.fsync(file.fileno())
    assert done == [51, 51, -1, 51]
