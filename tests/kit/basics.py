"""Helpers of all sections."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTDATA = ROOT / "testdata"
_ports = itertools.count(os.getpid() * 4_999)    # far from those of a test run beside this one


def free_port() -> int:
    """Return a loopback port below the ephemeral range that nobody listens on."""
    while True:
        port = 20_000 + next(_ports) % 12_000
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def eventually(condition, timeout_s=60.0, what="condition"):
    """Return condition()'s first true value; poll until timeout_s is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not hold within {timeout_s} s")
        threading.Event().wait(0.02)
