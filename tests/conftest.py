"""Fixtures of all tests."""

from __future__ import annotations

import gc
import logging
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Iterator

import pytest

if os.environ.get("PYETCD_TEST_SYSTEM"):        # before any of our modules, and for children too
    _lacking = Path(__file__).parent / "kit" / os.environ["PYETCD_TEST_SYSTEM"]
    runpy.run_path(str(_lacking / "sitecustomize.py"))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(_lacking), *filter(None, [os.environ.get("PYTHONPATH")])])

# Workers and children read the byte code that the first of them wrote: to rewrite and compile all
# tests takes 15 seconds of processor time, in each of four workers.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

pytest.register_assert_rewrite("tests.kit")

# ruff: noqa: E402
from tests.kit.certificates import certificates as certificates
from tests.kit.clients import _client_dir_fixture as _client_dir_fixture
from tests.kit.clients import _client_fixture as _client_fixture
from tests.kit.clients import _client_own_server_fixture as _client_own_server_fixture
from tests.kit.clients import _client_server_fixture as _client_server_fixture
from tests.kit.clusters import cluster_log as cluster_log
from tests.kit.files import wal_log as wal_log
from tests.kit.flags import flags_logging as flags_logging
from tests.kit.http import http_server as http_server
from tests.kit.processes import compile_once
from tests.kit.registries import disc_dns as disc_dns
from tests.kit.registries import disc_registry as disc_registry
from tests.kit.stores import store as store


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the run: compile once, and let the children of every process hear signals.

    A shell without job control starts its background jobs with SIGINT ignored, and children
    inherit that. A handler of Python becomes the default in a child.
    """
    if not hasattr(config, "workerinput"):
        compile_once()
    for number in (signal.SIGINT, signal.SIGHUP):       # nohup has the latter ignored
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)


def pytest_collection_finish() -> None:
    """Leave what all tests share out of every later collection of garbage: 300 ms each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _logging_as_imported() -> Iterator[None]:
    """Undo what a test, or the thread of an earlier one, does to the loggers.

    Others look at the log, so the levels are those of an import and not those found before.
    """
    root = logging.getLogger("pyetcd")
    handlers, propagate = root.handlers[:], root.propagate
    _reset_levels()
    yield
    _reset_levels()
    root.handlers[:], root.propagate = handlers, propagate


def _reset_levels() -> None:
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("pyetcd")]:
        logging.getLogger(name).setLevel(logging.NOTSET)
