"""Fixtures for pytest: `etcd_server`, `etcd_cluster` and `etcd_cluster_factory`.

pytest loads this file in every run.  pyetcd takes 0.2 s, and is imported by the first test that
asks for a fixture.  Where both files are copied and not installed, conftest.py says
`pytest_plugins = ["pyetcd_pytest"]`.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, Iterator

import pytest

if TYPE_CHECKING:
    import pyetcd


@contextlib.contextmanager
def _shown_logs() -> Iterator[None]:
    """Let pytest capture the members' lines, and show them if the test fails."""
    log = logging.getLogger("pyetcd")
    before = log.level
    if before == logging.NOTSET:
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before)


@pytest.fixture
def etcd_server(tmp_path_factory: Any) -> Iterator[pyetcd.LocalMember]:
    """A member alone, ready, in this process: pyetcd.LocalMember."""
    from pyetcd import LocalMember
    directory = str(tmp_path_factory.mktemp("etcd"))
    with _shown_logs(), LocalMember(directory=directory) as member:
        yield member


@pytest.fixture
def etcd_cluster_factory(tmp_path_factory: Any) -> Iterator[pyetcd.ClusterFactory]:
    """A function (size=3, **settings) that starts a pyetcd.LocalCluster: pyetcd.ClusterFactory."""
    from pyetcd import ClusterFactory
    with _shown_logs(), contextlib.ExitStack() as clusters:
        yield ClusterFactory(tmp_path_factory, clusters)


@pytest.fixture
def etcd_cluster(etcd_cluster_factory: pyetcd.ClusterFactory) -> pyetcd.LocalCluster:
    """Three members, ready, in this process: pyetcd.LocalCluster."""
    return etcd_cluster_factory()
