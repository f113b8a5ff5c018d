"""Takes from Python what it lacks on macOS: no such system is needed to see what happens there.

With PYETCD_TEST_SYSTEM=macos in the environment tests/conftest.py runs this file, and so does every
child process, as Python imports `sitecustomize` when it starts.  What it cannot show is how the
system itself behaves: its network stack, its file system, its scheduler.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import signal
import socket
import stat
import sys
import weakref

_LINUX_ONLY = {
    select: ("epoll", "EPOLL*"),
    os: ("eventfd*", "EFD_*", "memfd_create", "MFD_*", "fdatasync", "posix_fallocate",
         "posix_fadvise", "pipe2", "pidfd_open", "splice", "sched_*affinity", "getrandom", "setns",
         "unshare", "getresuid", "getresgid", "O_TMPFILE", "O_DIRECT", "O_PATH", "O_NOATIME"),
    socket: ("SOCK_CLOEXEC", "SOCK_NONBLOCK", "MSG_NOSIGNAL", "MSG_ERRQUEUE", "TCP_CORK",
             "TCP_QUICKACK", "TCP_USER_TIMEOUT", "TCP_DEFER_ACCEPT", "TCP_KEEPIDLE", "TCP_LINGER2",
             "TCP_SYNCNT", "TCP_INFO", "TCP_CONGESTION", "SO_BINDTODEVICE", "SO_DOMAIN", "SO_MARK",
             "SO_PASSCRED", "SO_PEERCRED", "SO_PRIORITY", "SO_PROTOCOL"),
    fcntl: ("F_OFD_*", "F_*PIPE_SZ", "F_ADD_SEALS", "F_GET_SEALS", "F_SEAL_*", "F_NOTIFY",
            "F_*LEASE", "F_SETSIG", "F_GETSIG"),
    resource: ("prlimit",),
    signal: ("SIGRT*", "SIGPOLL", "SIGPWR", "SIGSTKFLT", "SIGCLD", "sigtimedwait", "sigwaitinfo",
             "pidfd_send_signal"),
}
F_FULLFSYNC = 51


def _matches(name, pattern):
    first, star, last = pattern.partition("*")
    return name.startswith(first) and name.endswith(last) if star else name == pattern


def _hide_proc():
    """There is no /proc.  What opens and lists files tells an audit hook first."""
    def check(path):
        if isinstance(path, (str, bytes, os.PathLike)):
            text = os.fsdecode(os.fspath(path))
            if text == "/proc" or text.startswith("/proc/"):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    def hook(event, arguments):
        if event in ("open", "os.listdir", "os.scandir"):
            check(arguments[0])

    def guarded(function):
        def guard(path, *arguments, **options):
            check(path)
            return function(path, *arguments, **options)
        return guard

    sys.addaudithook(hook)
    for name in ("stat", "lstat", "readlink"):
        setattr(os, name, guarded(getattr(os, name)))


def _one_socket_per_port():
    """Without SO_REUSEPORT a second socket cannot be bound to a port, listening or not."""
    bind, bound = socket.socket.bind, weakref.WeakSet()

    def bind_once(self, address):
        if isinstance(address, tuple) and address[1] and self.type == socket.SOCK_STREAM:
            for other in list(bound):
                if other.fileno() >= 0 and other.getsockname()[:2] == tuple(address[:2]):
                    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        bind(self, address)
        if isinstance(address, tuple) and self.type == socket.SOCK_STREAM:
            bound.add(self)

    socket.socket.bind = bind_once


def _full_fsync():
    """fcntl.F_FULLFSYNC works on files, and not everywhere."""
    plain = fcntl.fcntl

    def with_full_fsync(handle, command, argument=0):
        if command != F_FULLFSYNC:
            return plain(handle, command, argument)
        number = handle if isinstance(handle, int) else handle.fileno()
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        os.fsync(number)
        return 0

    fcntl.F_FULLFSYNC, fcntl.fcntl = F_FULLFSYNC, with_full_fsync


if os.environ.get("PYETCD_TEST_SYSTEM") == "macos" and hasattr(select, "epoll"):
    for module, patterns in _LINUX_ONLY.items():
        for each in [name for name in vars(module) if any(_matches(name, p) for p in patterns)]:
            delattr(module, each)
            if each in getattr(module, "__all__", ()):
                module.__all__.remove(each)
    if "selectors" in sys.modules:
        selectors = sys.modules["selectors"]
        del selectors.EpollSelector
        selectors.DefaultSelector = selectors.PollSelector
    if "tempfile" in sys.modules:
        sys.modules["tempfile"]._O_TMPFILE_WORKS = False
    _hide_proc()
    _one_socket_per_port()
    _full_fsync()
