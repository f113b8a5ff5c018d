"""Paths, back-off, TLS file names, and fsync of a directory."""

from __future__ import annotations

import errno
import os
import re
from typing import List, NamedTuple

from .system import open_files_limit, sync_file

_DOTS = re.compile(r"/\.{1,2}(?:/|\Z)")


def is_clean_path(path: str) -> bool:
    """True if clean_path() removes at most a trailing slash from an absolute path."""
    return path.startswith("/") and not (
        "//" in path or "/." in path and _DOTS.search(path) is not None
    )


def clean_path(path: str) -> str:
    """Remove `.`, `..`, `//` and a trailing slash from an absolute path, as Go's path.Clean."""
    if is_clean_path(path):
        return path.rstrip("/") or "/"
    parts: List[str] = []
    for part in path.split("/"):
        if part == "..":
            if parts:
                parts.pop()
        elif part and part != ".":
            parts.append(part)
    return "/" + "/".join(parts)


class TlsFiles(NamedTuple):
    """The TLS settings of one side, client or peer: PEM files, read again when one changes."""

    cert_file: str = ""
    key_file: str = ""
    trusted_ca_file: str = ""           # "": the system's authorities
    ca_file: str = ""                   # etcd 2.0's: trusted as well, and implies client_cert_auth
    client_cert_auth: bool = False      # refuse clients without a certificate of the trusted CA
    crl_file: str = ""                  # revoked certificates
    allowed_name: str = ""              # host that a client certificate must be for
    allowed_cn: str = ""                # common name that it must have


class Backoff:
    """Exponential back-off: next() returns first_s, then twice the last wait, up to max_s."""

    def __init__(self, first_s: float, max_s: float) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._next_s = first_s

    def next(self) -> float:
        wait_s = self._next_s
        self._next_s = min(wait_s * 2, self._max_s)
        return wait_s

    def reset(self) -> None:
        self._next_s = self._first_s


NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)    # of OSError: too many open files


def descriptors_max(kept: int, part: int) -> int:
    """Return the limit of open descriptors, less a reserve of `kept` or one `part` of them."""
    limit = open_files_limit()
    return limit - min(kept, limit // part)


def fsync_dir(path: str) -> None:
    """Make names created, renamed or removed in directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def _nothing() -> None:
    """A callback without effect; posted, it makes the reactor turn."""
