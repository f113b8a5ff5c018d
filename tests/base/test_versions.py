"""Versions: which identities and which etcd accept one another, by recorded headers."""

from __future__ import annotations

import gzip
import io
import json
from typing import Any, Dict

import pytest

import pyetcd
from tests.kit.basics import TESTDATA


def _recorded(name: str) -> Dict[str, str]:
    """The headers of a recorded request of etcd."""
    head = json.loads((TESTDATA / name).read_text())["request_head"]
    pairs = (line.split(": ", 1) for line in head.replace("\r", "").split("\n") if ": " in line)
    return {key.lower(): value for key, value in pairs}


_ETCD_2_3_8 = _recorded("stream-message-follower-to-leader.json")
_ETCD_3_4_23 = _recorded("snapshot-post-3.4.23.json")
# What each compares a peer's headers with.
_RULES = {"2.3.8": pyetcd.Identity("2.3.8", "2.2.0", ""),
          "3.4.23": pyetcd.Identity("3.4.23", "3.0.0", "")}


@pytest.mark.parametrize("name, accepts_3_4", [("2.3", False), ("3.4", True), ("bridge", True)])
def test_versions_identities_and_recorded_members_accept_each_other(
    name: str, accepts_3_4: bool
) -> None:
    """Both directions agree: a one-sided refusal would leave half of the streams open."""
    identity = pyetcd.IDENTITIES[name]
    headers = {"x-server-version": identity.server, "x-min-cluster-version": identity.min_cluster}
    assert _ETCD_2_3_8["x-server-version"] == "2.3.8"
    assert identity.refusal(_ETCD_2_3_8) == _RULES["2.3.8"].refusal(headers) == ""

    assert (_ETCD_3_4_23["x-server-version"], _ETCD_3_4_23["x-min-cluster-version"]) == (
        "3.4.23", "3.0.0")
    assert (not identity.refusal(_ETCD_3_4_23)) is accepts_3_4
    assert (not _RULES["3.4.23"].refusal(headers)) is accepts_3_4


def test_versions_members_of_2_3_and_3_4_refuse_each_other() -> None:
    """As recorded: that is why a bridge is needed.  The refusal says which flag helps."""
    assert _RULES["2.3.8"].refusal(_ETCD_3_4_23).endswith(
        "local=2.3.8; start this member with -compat-version 3.4")
    assert "remote version is too low" in _RULES["3.4.23"].refusal(_ETCD_2_3_8)


@pytest.mark.parametrize("name, versions, server, reported", [
    ("auto", (), "2.3.8", "2.3.8"),
    ("auto", ("2.3.0", None), "2.3.8", "2.3.8"),
    ("auto", ("2.3.0", "3.0.0"), "3.4.23", "3.4.23"),
    ("auto", ("nonsense",), "2.3.8", "2.3.8"),
    ("2.3", ("3.4.0",), "2.3.8", "2.3.8"),
    ("bridge", ("2.3.0",), "3.4.23", "2.3.8"),
])
def test_versions_auto_looks_at_the_cluster(
    name: str, versions: Any, server: str, reported: str
) -> None:
    identity = pyetcd.choose_identity(name, *versions)
    assert (identity.server, identity.reported) == (server, reported)


def test_versions_recorded_snapshot_of_3_4_comes_without_v3_data() -> None:
    """The database behind it has 24 KiB, and none of its pages holds a key."""
    record = json.loads((TESTDATA / "snapshot-post-3.4.23.json").read_text())
    body = gzip.decompress((TESTDATA / "snapshot-post-3.4.23.bin.gz").read_bytes())
    file = io.BytesIO(body)
    file.seek(8 + record["message_len"])
    assert not pyetcd.holds_v3_data(file)
    cut = io.BytesIO(body[:-9_000])
    cut.seek(8 + record["message_len"])
    assert pyetcd.holds_v3_data(cut)        # a damaged one is not taken for empty
