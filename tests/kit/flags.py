"""Command line."""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Iterator, Sequence

import pytest

import pyetcd


def _flags_config(argv: Sequence[str] = (), environ: Any = None) -> pyetcd.ServerConfig:
    """What main() makes of a command line."""
    settings = pyetcd.Settings(list(argv), environ or {})
    settings.check_leftover()
    settings.complete()
    return pyetcd.make_config(settings)


@pytest.fixture
def flags_logging() -> Iterator[logging.Logger]:
    """The package's logger, put back afterwards as it was."""
    root = logging.getLogger("pyetcd")
    saved = (root.handlers[:], root.level, root.propagate)
    yield root
    root.handlers[:], root.level, root.propagate = saved
    for name in ("etcdserver", "raft"):
        pyetcd.package_logger(name).setLevel(logging.NOTSET)


@contextlib.contextmanager
def _flags_fails(text: str) -> Iterator[None]:
    """The block raises a one-line FlagError that contains `text`."""
    with pytest.raises(pyetcd.FlagError) as caught:
        yield
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


# -- the configuration file ----------------------------------------------------------


_FLAGS_FILE = """\
# As the sample of etcd 3, shortened.
name: 'n1'          # a comment
data-dir: "d\\u0041"
wal-dir:
snapshot-count: 77
initial-cluster: n1=http://10.0.0.1:2380,n2=http://10.0.0.2:2380
initial-advertise-peer-urls: http://10.0.0.1:2380
listen-client-urls: [http://10.0.0.1:2379, "http://127.0.0.1:2379"]
advertise-client-urls: http://10.0.0.1:2379
discovery:
initial-cluster-token: it''s#no comment
strict-reconfig-check: no
proxy: off

client-transport-security:
  # Indented.
  cert-file: c.pem
  key-file: 'k.pem'
  client-cert-auth: true
  auto-tls: false

peer-transport-security:
  cert-file:
  trusted-ca-file: ca.pem
  client-cert-auth: false

log-outputs: [stderr]
cipher-suites: [
  TLS_A,    # one
  TLS_B
]
tls-min-version: 'TLS1.2'
"""
_FLAGS_FILE_JSON = {
    "name": "n1", "data-dir": "dA", "wal-dir": None, "snapshot-count": 77,
    "initial-cluster": "n1=http://10.0.0.1:2380,n2=http://10.0.0.2:2380",
    "initial-advertise-peer-urls": "http://10.0.0.1:2380",
    "listen-client-urls": ["http://10.0.0.1:2379", "http://127.0.0.1:2379"],
    "advertise-client-urls": "http://10.0.0.1:2379", "discovery": "",
    "initial-cluster-token": "it''s#no comment", "strict-reconfig-check": False, "proxy": "off",
    "client-transport-security": {
        "cert-file": "c.pem", "key-file": "k.pem", "client-cert-auth": True, "auto-tls": False},
    "peer-transport-security": {"cert-file": "", "trusted-ca-file": "ca.pem"},
    "log-outputs": ["stderr"],
}
