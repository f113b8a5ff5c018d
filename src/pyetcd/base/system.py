"""What systems other than Linux lack, or do otherwise.

macOS has no epoll, no fdatasync and no /proc.  Windows has none of what a member needs, but
imports this file.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import sys
from typing import Callable, List, Optional, Tuple

from .errors import StartError

try:
    import fcntl
    import resource
except ImportError:                     # Windows
    fcntl = resource = None  # type: ignore[assignment]


def check_system() -> None:
    """Raise StartError with what a member needs and this system lacks."""
    lacks = [what for what, is_there in (
        ("file locks (fcntl)", fcntl is not None),
        ("poll", hasattr(select, "epoll") or hasattr(select, "poll")),
    ) if not is_there]
    if lacks:
        raise StartError(
            f"pyetcd does not run on {sys.platform}, which lacks {' and '.join(lacks)}: use Linux"
            " or macOS, or on Windows WSL or a container; pyetcd_client runs here"
        )


class Poll:
    """What select.epoll does, by poll(), whose bits are the same."""

    def __init__(self) -> None:
        poll = select.poll()
        self.register, self.modify, self.unregister = poll.register, poll.modify, poll.unregister
        self._poll = poll.poll

    def poll(self, timeout_s: Optional[float] = None) -> List[Tuple[int, int]]:
        """Return (descriptor, events) of what is ready; wait for it timeout_s at most."""
        return self._poll(None if timeout_s is None else math.ceil(timeout_s * 1e3))

    def close(self) -> None:
        """Nothing is open."""


def make_poll() -> Poll:
    """Return epoll where the system has it: its cost does not grow with the sockets."""
    return select.epoll() if hasattr(select, "epoll") else Poll()  # type: ignore[return-value]


def lock_file(handle: int) -> bool:
    """Take the POSIX lock of a file; False if another process has it."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def sync_file(handle: int) -> None:
    """Make contents and attributes of a file durable.

    macOS's fsync leaves them in the drive's cache, which a power cut empties.  Where F_FULLFSYNC
    does not work (a network's file system), fsync has to do.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                raise
    os.fsync(handle)


sync_data: Callable[[int], None] = getattr(os, "fdatasync", sync_file)      # contents only


def open_files_limit() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def resident_bytes_max() -> int:
    """Return the most memory that this process has ever used."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def raise_files_limit() -> None:
    """Raise the limit of open files to the highest allowed; macOS reports none but takes 10,240."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for limit in (hard, 10_240):
        if limit == hard or open_files_limit() < limit:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                return
