"""Other clients: etcdctl and libraries, side by side."""

from __future__ import annotations

import pytest

from tests.kit.clients import _CLIENT_KINDS, _client_member
from tests.kit.processes import ClusterMember, Process


class _WalkEtcdProcess(Process):
    program = ("etcd", "--enable-v2", "--strict-reconfig-check=false")    # off in etcd 2.3


class _WalkEtcdMember(ClusterMember):
    process_type = _WalkEtcdProcess


@pytest.fixture(params=_CLIENT_KINDS, name="_lib_own_server")
def _lib_own_server_fixture(request, tmp_path):
    """A server for one test, which may lock everybody out."""
    member = _client_member(request.param, tmp_path)
    try:
        yield member.start()
    finally:
        member.kill()
