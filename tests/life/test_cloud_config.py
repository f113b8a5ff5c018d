"""-cloud-config: the section coreos.etcd2, as it stands in the article."""

from __future__ import annotations

import logging
import re
import textwrap
from pathlib import Path
from typing import Any, Dict, Sequence

import pytest

import pyetcd
from tests.kit.basics import TESTDATA, free_port
from tests.kit.processes import ClusterMember, Process, ended

_ARTICLE = TESTDATA / "article"
_TOKEN = "0123456789abcdef0123456789abcdef"


def _cloud_article(directory: Path, discovery: str) -> Path:
    """The article's file, with a token; nothing else is changed."""
    text = (_ARTICLE / "cloud-config.yml").read_text(encoding="utf-8")
    path = directory / "cloud-config.yml"
    path.write_text(text.replace("https://discovery.etcd.io/<token>", discovery))
    return path


def _cloud_file(directory: Path, text: str) -> str:
    path = directory / "c.yml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def _cloud_settings(
    path: object, argv: Sequence[str] = (), environ: Any = None
) -> pyetcd.Settings:
    settings = pyetcd.Settings(["-cloud-config", str(path), *argv], environ or {})
    settings.complete()
    return settings


def _cloud_values(directory: Path, section: str) -> Dict[str, Any]:
    """What a section gives, besides the flag that names the file."""
    values = dict(_cloud_settings(_cloud_file(directory, section)).values)
    del values["cloud-config"]
    return values


def test_cloud_section_of_the_article(tmp_path: Path) -> None:
    """The addresses come from where they come from for flags."""
    discovery = f"https://discovery.etcd.io/{_TOKEN}"
    settings = _cloud_settings(
        _cloud_article(tmp_path, discovery), environ={"COREOS_PRIVATE_IPV4": "10.0.0.111"})
    config = pyetcd.make_config(settings)
    assert config.discovery == discovery
    assert config.listen_client_urls == ("http://0.0.0.0:2379",)
    assert config.advertise_client_urls == ("http://10.0.0.111:2379",)
    assert config.listen_peer_urls == ("http://10.0.0.111:2380",)
    assert config.initial_advertise_peer_urls == ("http://10.0.0.111:2380",)
    assert (config.name, config.initial_cluster) == ("default", "")


def test_cloud_file_of_the_article_is_understood_as_it_stands() -> None:
    path = _ARTICLE / "cloud-config.yml"
    settings = _cloud_settings(path, environ={"COREOS_PRIVATE_IPV4": "10.0.0.111"})
    assert settings["discovery"] == "https://discovery.etcd.io/<token>"
    assert settings.where("discovery") == f"discovery (from {path}:6)"


def test_cloud_second_file_of_the_article_has_no_such_section() -> None:
    """Its units are YAML that nothing here has to understand."""
    with pytest.raises(pyetcd.FlagError, match="there is no section etcd2 below coreos"):
        _cloud_settings(_ARTICLE / "cloud-config-environment.yml")


def test_cloud_configs_of_contrib_are_understood(tmp_path: Path) -> None:
    path = TESTDATA.parent / "contrib" / "cloud-config.yml"
    text = path.read_text(encoding="utf-8").replace("http://<host>:4001/<token>",
                                                    f"http://10.0.0.1:4001/{_TOKEN}")
    settings = _cloud_settings(_cloud_file(tmp_path, text), environ={
        "COREOS_PRIVATE_IPV4": "10.0.0.9"})
    assert settings["discovery"] == f"http://10.0.0.1:4001/{_TOKEN}"
    assert settings["listen-peer-urls"] == ("http://10.0.0.9:2380",)


def test_cloud_flags_and_variables_go_before_the_file(tmp_path: Path) -> None:
    section = "coreos:\n  etcd2:\n    name: a\n    data-dir: d\n    wal-dir: w\n"
    path = _cloud_file(tmp_path, section)
    settings = _cloud_settings(path, ["-name", "b"], {"ETCD_DATA_DIR": "e"})
    assert [settings[name] for name in ("name", "data-dir", "wal-dir")] == ["b", "e", "w"]
    assert [line[2] for line in settings.lines if "unused" in line[2]] == [
        f"{path}:3: name is unused: -name goes before it",
        f"{path}:4: data-dir is unused: ETCD_DATA_DIR goes before it"]
    assert settings.where("wal-dir") == f"wal-dir (from {path}:5)"


def test_cloud_file_may_be_named_by_its_variable(tmp_path: Path) -> None:
    path = _cloud_file(tmp_path, "coreos:\n  etcd2:\n    name: a\n")
    settings = pyetcd.Settings([], {"ETCD_CLOUD_CONFIG": path})
    settings.complete()
    assert settings["name"] == "a"


@pytest.mark.parametrize("text, expected", [
    ("coreos: {}\n", None),
    ("coreos:\n  etcd2:\n", {}),
    ("coreos:\n  etcd2:   # none yet\n  fleet:\n    metadata: a=b\n", {}),
    ("#cloud-config\n---\ncoreos:\n\n    etcd2:\n        # here\n        name: n   # the name\n\n",
     {"name": "n"}),
    ("coreos:\n  etcd2:\n    initial_cluster_token: 't t'\n    debug: yes\n    cors: ['*']\n",
     {"initial-cluster-token": "t t", "debug": True, "cors": ("*",)}),
    ("'coreos':\n  \"etcd2\":\n    'name': n\n", {"name": "n"}),
    ("\ufeffcoreos:\r\n  etcd2:\r\n    name: n\r\n", {"name": "n"}),
    ("coreos:\n etcd2:\n  name: n\n  discovery:\nusers:\n- name: x\n  groups: [a,\n   b]\n",
     {"name": "n"}),
    ("ssh_authorized_keys:\n- ssh-rsa AAAA\nhostname: h\ncoreos:\n  units:\n  - name: a\n"
     "    content: |\n      [Unit]\n      etcd2:\n        name: wrong\n\n\tx\n"
     "  etcd2:\n    name: n\n", None),
    ("write_files:\n  - path: /a\n    content: |\n      coreos:\n        etcd2:\n"
     "          name: wrong\n      \tx\n"
     "coreos:\n  units:\n  - name: a\n    content: >-\n        etcd2:\n      x: y\n"
     "  etcd2:\n    name: n\n", {"name": "n"}),
    ("coreos:\n  etcd2:\n    election-timeout: 2000\n    name: $private_ipv4\n",
     {"election-timeout": 2000, "name": "10.9.8.7"}),
], ids=range(11))
def test_cloud_section_is_found_among_other_yaml(
    text: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: refused."""
    monkeypatch.setattr(pyetcd, "default_route_address", lambda: "10.9.8.7")
    monkeypatch.setattr(pyetcd, "ENVIRONMENT_FILE", str(tmp_path / "none"))
    if expected is None:
        with pytest.raises(pyetcd.FlagError):
            _cloud_values(tmp_path, text)
    else:
        assert _cloud_values(tmp_path, text) == expected


@pytest.mark.parametrize("text, line, words", [
    ("coreos:\n  etcd2:\n    name n\n", 3, "'name n' is not understood"),
    ("coreos:\n  etcd2:\n    name: n\n    name: m\n", 4, "name is set a second time, after line 3"),
    ("coreos:\n  etcd2:\n    data_dir: n\n    data-dir: m\n", 4, "data-dir is set a second time"),
    ("coreos:\n  etcd2:\n    name: n\n      wal-dir: w\n", 4, "is indented, but stands in none"),
    ("coreos:\n  etcd2:\n    name: n\n   wal-dir: w\n", 3, "is indented, but stands in none"),
    ("coreos:\n  etcd2:\n    - name: n\n", 3, "'- name: n' is not understood"),
    ("coreos:\n  etcd2:\n    name: &a n\n", 3, "the value of name, '&a n', is not understood"),
    ("coreos:\n  etcd2:\n    name: |\n      n\n", 3, "the value of name, '|', is not understood"),
    ("coreos:\n  etcd2:\n    heartbeat_interval: soon\n", 3, "write a whole number, in millis"),
    ("coreos:\n  etcd2:\n    listen_peer_urls: 10.0.0.1:2380\n", 3, "write http://10.0.0.1:2380"),
    ("coreos:\n  etcd2: {name: n}\n", 2, "etcd2 is a section: its settings stand indented below"),
    ("coreos:\n  etcd2:\n    name: n\n  etcd2:\n    name: m\n", 4, "etcd2 is there a second time"),
    ("coreos:\n  etcd2:\n    name: n\ncoreos:\n  units:\n", 4, "coreos is there a second time"),
    ("coreos:\n\tetcd2:\n", 2, "it is indented by a tab: use spaces"),
    ("#!/bin/bash\necho hi\n", 2, "'echo hi' is not understood"),
    ("coreos:\n  etcd2:\n    advertise-client-urls: http://$public_ipv4:2379\n", 3,
     "the public address of this machine is not known"),
])
def test_cloud_errors_name_the_line(
    text: str, line: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyetcd, "ENVIRONMENT_FILE", str(tmp_path / "none"))
    path = _cloud_file(tmp_path, text)
    with pytest.raises(pyetcd.FlagError) as caught:
        _cloud_settings(path)
    assert f"{path}:{line}" in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cloud_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(pyetcd.FlagError, match="open .*none.yml: no such file"):
        _cloud_settings(tmp_path / "none.yml")
    with pytest.raises(pyetcd.FlagError, match="there is no section coreos;"):
        _cloud_settings(_cloud_file(tmp_path, ""))


def test_cloud_unknown_setting_is_a_warning(tmp_path: Path) -> None:
    path = _cloud_file(tmp_path, "coreos:\n  etcd2:\n    nmae: n\n    config-file: x\n")
    warnings = [text for level, _, text in _cloud_settings(path).lines if level == logging.WARNING]
    assert [text.partition(";")[0] for text in warnings] == [
        f'{path}:3: unknown setting "nmae" is ignored',
        f'{path}:4: unknown setting "config-file" is ignored']
    assert warnings[0].endswith("did you mean name?")


def test_cloud_members_form_the_article_s_cluster(tmp_path: Path) -> None:
    """Three machines, one file; on this one machine, each has ports of its own by its flags."""
    registry = ClusterMember(tmp_path, "registry")
    machines = [ClusterMember(tmp_path, f"machine{number}") for number in (1, 2, 3)]
    environ = {"COREOS_PRIVATE_IPV4": "127.0.0.1"}
    with ended(registry, *machines):
        registry.start_alone()
        _, url, _ = registry.request("GET", "/new?size=3")
        path = _cloud_article(tmp_path, url)
        for machine in machines:
            machine.process = Process(
                tmp_path, "-cloud-config", str(path), *machine.flags(), env=environ)
        for machine in machines:
            machine.process.wait_log("ready to serve client requests")
            assert f"reading coreos.etcd2 from \"{path}\"" in machine.process.log()
        _, answer, _ = machines[0].request("GET", "/v2/members")
        assert sorted(member["name"] for member in answer["members"]) == [
            "machine1", "machine2", "machine3"]


def test_cloud_member_runs_from_the_file_alone(tmp_path: Path) -> None:
    client, peer = (f"http://$private_ipv4:{free_port()}" for _ in range(2))
    path = _cloud_file(tmp_path, textwrap.dedent(f"""\
        #cloud-config
        coreos:
          etcd2:
            name: alone
            data-dir: {tmp_path / "data"}
            listen-client-urls: {client}
            advertise-client-urls: {client}
            listen-peer-urls: {peer}
            initial-advertise-peer-urls: {peer}
        """))
    process = Process(tmp_path, "-cloud-config", path, env={"COREOS_PRIVATE_IPV4": "127.0.0.1"})
    try:
        process.wait_log("ready to serve client requests")
        assert re.search(r"etcdserver: initial cluster = alone=http://127\.0\.0\.1:\d+\n",
                         process.log())
    finally:
        process.kill()
