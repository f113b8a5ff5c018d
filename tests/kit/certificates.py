"""TLS: who may talk to whom, and what the log says of the others."""

from __future__ import annotations

import contextlib

import pytest
import trustme

import pyetcd
from tests.kit.http import _http_member


class _Certificates:
    """Authorities and certificates made for one run, as PEM files in a directory."""

    def __init__(self, directory):
        self.directory = directory
        self.ca, self.other_ca = trustme.CA(), trustme.CA()
        self.ca_file = str(directory / "ca.pem")
        self.other_ca_file = str(directory / "other-ca.pem")
        self.ca.cert_pem.write_to_path(self.ca_file)
        self.other_ca.cert_pem.write_to_path(self.other_ca_file)

    def issue(self, name, *hosts, ca=None, **more):
        """Return (certificate path, key path); hosts: those it is for, loopback if none."""
        leaf = (ca or self.ca).issue_cert(*(hosts or ("127.0.0.1", "localhost")), **more)
        paths = str(self.directory / f"{name}.pem"), str(self.directory / f"{name}-key.pem")
        leaf.private_key_pem.write_to_path(paths[1])
        with open(paths[0], "wb") as file:
            file.write(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        return paths

    def files(self, name="server", *hosts, **more):
        """TlsFiles of a side with a certificate of its own, that trusts our authority."""
        return pyetcd.TlsFiles(*self.issue(name, *hosts), trusted_ca_file=self.ca_file, **more)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """One authority for all tests: making keys takes time."""
    return _Certificates(tmp_path_factory.mktemp("tls"))


@contextlib.contextmanager
def _tls_member(tmp_path, files):
    with _http_member(
        tmp_path, listen_client_urls=["https://127.0.0.1:0"], client_tls=files,
    ) as server:
        yield server, server.client_urls[0]
