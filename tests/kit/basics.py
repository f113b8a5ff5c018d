"""Helpers of all sections."""

from __future__ import annotations

import itertools
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import List

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTDATA = ROOT / "testdata"


def manual(page: str, chapter: str = "") -> str:
    """Return the text of a page of docs/, or of README, or of a chapter (`## …`) of one."""
    root = ROOT
    path = root / "README.md" if page == "README" else root / "docs" / f"{page}.md"
    text = path.read_text(encoding="utf-8")
    if not chapter:
        return text
    found = re.search(rf"^## {re.escape(chapter)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found is not None, f"{path} has no chapter {chapter}"
    return found[1]


def manual_pages() -> List[str]:
    """The names of all pages of the manual, for `manual`."""
    return ["README", *sorted(p.stem for p in (ROOT / "docs").glob("*.md"))]


def manual_code(page: str, chapter: str = "", language: str = "python") -> List[str]:
    """Return the blocks of code of a page or chapter that are marked with that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", manual(page, chapter), re.M | re.S)


_ports = itertools.count(os.getpid() * 4_999)    # far from those of a test run beside this one


def open_files() -> List[str]:
    """The names of this process's descriptors, or skip."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("this system has no /proc")
    return os.listdir("/proc/self/fd")


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


def eventually(condition, timeout_s=60.0, what="condition",
               between=lambda: threading.Event().wait(0.02)):
    """Return condition()'s first true value; poll, with between(), until timeout_s is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not hold within {timeout_s} s")
        between()
