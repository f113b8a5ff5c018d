"""pyetcdctl machines: what `fleetctl list-machines` prints, from fleet's directory in etcd."""

from __future__ import annotations

import json
from typing import Any, Dict, Iterator, List

import pytest

import pyetcd
import pyetcd_client
from tests.kit.basics import TESTDATA

_DIRECTORY = "/_coreos.com/fleet/machines"
_ARTICLE = {
    "79e7347d66de4ce8b3ec423cdd93e314": "10.0.0.124",
    "4c5b32d1d79c47ff8e4847e1df78ab53": "10.0.0.111",
    "ef6ce0b8871844beb929411f8926b686": "10.0.0.139",
}


@pytest.fixture(name="machines_client")
def _machines_client() -> Iterator[pyetcd_client.Client]:
    with pyetcd.LocalMember() as member, pyetcd_client.Client(member.client_url) as client:
        yield client


def _register(client: pyetcd_client.Client, id: str, **state: Any) -> None:
    """Write what the fleetd of a machine writes."""
    known = {"ID": id, "PublicIP": "", "Metadata": {}, "Capabilities": {"GRPC": True},
             "Version": "0.11.7", **state}
    client.set(f"{_DIRECTORY}/{id}/object", json.dumps(known), ttl=30)


def _machines(client: pyetcd_client.Client, *words: str) -> int:
    return pyetcd_client.main(["--endpoints", client.endpoints.urls[0], "machines", *words])


def test_ctl_machines_prints_the_table_of_the_article(
    machines_client: pyetcd_client.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bytes that stand below `$ fleetctl list-machines -l`."""
    for id, address in _ARTICLE.items():
        _register(machines_client, id, PublicIP=address)
    _, table = (TESTDATA / "article" / "list-machines.txt").read_text().split("\n", 1)
    for flag in ("-l", "--full"):
        assert _machines(machines_client, flag) == 0
        assert capsys.readouterr() == (table, "")


def test_ctl_machines_shortens_ids_without_l(
    machines_client: pyetcd_client.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    for id, address in _ARTICLE.items():
        _register(machines_client, id, PublicIP=address, Metadata={"zone": "a", "role": "db"})
    assert _machines(machines_client, "--no-legend") == 0
    assert capsys.readouterr().out.splitlines() == [
        "4c5b32d1...     10.0.0.111      role=db,zone=a",
        "79e7347d...     10.0.0.124      role=db,zone=a",
        "ef6ce0b8...     10.0.0.139      role=db,zone=a"]


@pytest.mark.parametrize("words, shown", [
    ([], "MACHINE IP METADATA"), (["-l", "--no-legend"], ""),
])
def test_ctl_machines_without_fleet(
    words: List[str], shown: str, machines_client: pyetcd_client.Client,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _machines(machines_client, *words) == 0
    out, err = capsys.readouterr()
    assert (" ".join(out.split()), err) == (shown, "")


@pytest.mark.parametrize("value", ["", "[]", "7", "{", '"x"', '{"ID": 7}', '{"Metadata": [1]}'])
def test_ctl_machines_leaves_out_what_is_none(
    value: str, machines_client: pyetcd_client.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that is gone leaves an empty directory behind."""
    machines_client.set(_DIRECTORY + "/bad/object", value)
    machines_client.mkdir(_DIRECTORY + "/gone")
    machines_client.set(_DIRECTORY + "/file", "x")
    _register(machines_client, "m1")
    assert _machines(machines_client, "-l", "--no-legend") == 0
    out, err = capsys.readouterr()
    assert out.split() == ["m1", "-", "-"]
    assert err == f"pyetcdctl: {_DIRECTORY}/bad/object is no machine of fleet\n"


def test_ctl_machines_keeps_terminals_safe(
    machines_client: pyetcd_client.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    state: Dict[str, Any] = {"PublicIP": "\x1b[31m", "Metadata": {"a": "ü\ud800\n"}}
    _register(machines_client, "m1", **state)
    assert _machines(machines_client, "-l", "--no-legend") == 0
    assert capsys.readouterr().out.split() == ["m1", "\\u001b[31m", "a=ü?\\n"]
