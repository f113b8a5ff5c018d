"""Command line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import py_compile
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Dict, List

import pytest
import requests

import pyetcd
from tests.kit.basics import eventually, free_port, manual, manual_pages
from tests.kit.flags import _FLAGS_FILE, _FLAGS_FILE_JSON, _flags_config, _flags_fails
from tests.kit.processes import Process, StaticCluster

_FLAGS_ADVERTISED = ["-advertise-client-urls", "http://10.0.0.9:2379"]


@pytest.fixture
def flags_environment_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An /etc/environment of our own, absent at first."""
    path = tmp_path / "environment"
    monkeypatch.setattr(pyetcd, "ENVIRONMENT_FILE", str(path))
    return path


# -- the parser --------------------------------------------------------------


@pytest.mark.parametrize("argv", [
    ["-name", "n1"], ["--name", "n1"], ["-name=n1"], ["--name=n1"], ["-name", "n0", "-name", "n1"],
], ids=" ".join)
def test_flags_dash_and_value_forms(argv: List[str]) -> None:
    assert _flags_config(argv).name == "n1"


@pytest.mark.parametrize("argv, expected", [
    (["-debug"], True), (["--debug"], True), (["-debug=true"], True), (["-debug=T"], True),
    (["-debug=1"], True), (["-debug=false"], False), (["-debug=0"], False), (["-debug=F"], False),
    ([], False),
], ids=str)
def test_flags_booleans(argv: List[str], expected: bool) -> None:
    assert _flags_config(argv).debug is expected


@pytest.mark.parametrize("text, value", [
    ("100", 100), ("0x64", 100), ("0144", 100), ("0b1100100", 100), ("0o144", 100), ("0", 0),
])
def test_flags_unsigned_integers(text: str, value: int) -> None:
    assert pyetcd.parse_uint(text) == value


def test_flags_value_that_another_one_replaces_is_told() -> None:
    settings = pyetcd.Settings(["-name", "a", "-debug", "-name=b", "--debug"], {})
    assert settings["name"] == "b"
    assert [text for _, _, text in settings.lines] == [
        "-name is given more than once: only the last, b, counts"]


def test_flags_value_may_look_like_a_flag() -> None:
    assert _flags_config(["-name", "-debug"]).name == "-debug"


def test_flags_value_may_contain_equals_signs() -> None:
    config = _flags_config(["-initial-cluster=default=http://a:1,b=http://c:2"])
    assert config.initial_cluster == "default=http://a:1,b=http://c:2"


def test_flags_double_dash_ends_the_flags() -> None:
    settings = pyetcd.Settings(["-debug", "--"], {})
    settings.check_leftover()
    assert settings["debug"] is True


@pytest.mark.parametrize("argv, words", [
    (["-bogus"], "flag provided but not defined: -bogus"),
    (["--bogus=1"], "flag provided but not defined: -bogus"),
    (["-name"], "flag needs an argument: -name"),
    (["---"], "bad flag syntax: ---"),
    (["-=x"], "bad flag syntax: -=x"),
    (["-heartbeat-interval", "abc"],
     'invalid value "abc" for flag -heartbeat-interval: parse error'),
    (["-heartbeat-interval", "-5"], 'invalid value "-5" for flag -heartbeat-interval: parse error'),
    (["-election-timeout", "99999999999999999999"], "value out of range"),
    (["-debug=maybe"], 'invalid boolean value "maybe" for -debug: parse error'),
    (["-proxy", "foo"], 'invalid value "foo" for flag -proxy: invalid value'),
    (["-initial-cluster-state", "old"],
     'invalid value "old" for flag -initial-cluster-state: invalid value, use one of new,'),
    (["-discovery-fallback", "x"], 'invalid value "x" for flag -discovery-fallback'),
    (["-discovery", "nowhere"], 'discovery: invalid URL "nowhere"'),
    (["-discovery", "http://host:4001"], "path/of/the/token"),
    (["-peers", "foo"],
     'invalid value "foo" for flag -peers: flag "-peers" is no longer supported'),
    (["-peers-file", "foo"], "no longer supported"),
    (["-auto-tls"], '-auto-tls is not supported: pyetcd cannot make certificates; make one with'
                    ' `openssl req -x509'),
    (["-peer-auto-tls=1"], "-peer-cert-file cert.pem -peer-key-file key.pem"),
    (["-host-whitelist", "example.com"], "requests are answered whatever their Host"),
    (["-tls-min-version", "TLS1.3"], "TLS 1.2 and later are accepted"),
    (["-peer-client-cert-file", "x"], "peers are shown the certificate of -peer-cert-file"),
    (["-discovery-srv-name", "x"], "a suffix of the SRV names is not supported"),
    (["-config-file", "none.yml"],
     "error verifying flags, open none.yml: no such file or directory"),
    (["-cors", "ftp://x"], "Invalid CORS origin: ftp://x"),
    (["-ui", "maybe"], "invalid value, use one of true, false, readonly"),
    (["-log-package-levels", "raft=LOUD"], "raft=LOUD is not <package>=<level>"),
    (["-addr", "foo"], "address foo: missing port in address"),
    (["-addr", "foo:1"], "bad IP in address specification"),
    (["-addr", "127.0.0.1:x"], "bad port in address specification"),
    (["foo"], "error verifying flags, 'foo' is not a valid flag"),
    (["-debug", "true"], "error verifying flags, 'true' is not a valid flag"),
    (["-"], "error verifying flags, '-' is not a valid flag"),
    (["-config", "x"], "error verifying flags, 'x' is not a valid flag"),
], ids=str)
def test_flags_bad_command_line(argv: List[str], words: str) -> None:
    with _flags_fails(words):
        _flags_config(argv)


@pytest.mark.parametrize("url, reason", [
    ("http://%zz", 'parse "http://%zz": invalid URL escape "%zz"'),
    ("http://[::1:80", "parse \"http://[::1:80\""),
    ("http://host:99999", "parse \"http://host:99999\""),
    ("tcp://host:1", "URL scheme must be http or https: tcp://host:1"),
    ("unix://x:1", "URL scheme must be http or https"),
    ("host:2379", "URL scheme must be http or https: host:2379"),
    ("http://a:1,", "URL scheme must be http or https: "),
    ("http://host", 'URL address does not have the form "host:port": http://host'),
    ("http://host:1/", "URL must not contain a path: http://host:1/"),
    ("http://host:1/v2", "URL must not contain a path"),
])
@pytest.mark.parametrize("flag", ["listen-client-urls", "initial-advertise-peer-urls"])
def test_flags_bad_urls(flag: str, url: str, reason: str) -> None:
    with _flags_fails(f'invalid value "{url}" for flag -{flag}: {reason}'):
        _flags_config([f"-{flag}", url])


# -- mistakes: by flag, variable and file ---------------------------------------------


_FLAGS_URLS = [
    "listen-peer-urls", "listen-client-urls", "initial-advertise-peer-urls",
    "advertise-client-urls",
]


def _flags_in_all_places(name: str, text: str, tmp_path: Path) -> List[str]:
    """What is said of a value on the command line (both spellings), as variable, in a file."""
    path = tmp_path / "c.yml"
    path.write_text(json.dumps({name: text}))
    found = []
    is_bool = pyetcd._all_flags()[name].is_bool
    for argv, environ in (
        ([f"-{name}={text}"], {}), ([f"--{name}={text}"] if is_bool else [f"--{name}", text], {}),
        ([], {"ETCD_" + name.upper().replace("-", "_"): text}),
        ([f"-config-file={path}"], {}), ([], {"ETCD_CONFIG_FILE": str(path)}),
    ):
        settings = None
        try:
            settings = pyetcd.Settings(argv, environ)
            settings.complete()
            pyetcd.make_config(settings)
            found.append(" ".join(line for level, _, line in settings.lines if level > 20))
        except pyetcd.FlagError as error:
            found.append(str(error))
        assert "\n" not in found[-1] and "\r" not in found[-1]
    return found


@pytest.mark.parametrize("url, advice", [
    ("http://::1:2380", "; write http://[::1]:2380"),
    ("http://2001:db8::7:2380", "; write http://[2001:db8::7]:2380"),
    ("http://fe80::1", "; write http://[fe80::1]:PORT"),
    ("::1", "; write http://[::1]:PORT"),
    ("10.0.0.5", "; write http://10.0.0.5:PORT"),
    ("etcd1.example:2380", "; write http://etcd1.example:2380"),
    ("http://10.0.0.5", "; write http://10.0.0.5:PORT"),
    ("https://10.0.0.5:", "; write https://10.0.0.5:PORT"),
    ("http://10.0.0.5:2380/", "; write http://10.0.0.5:2380"),
    ("http://a:1,http://b:2/v2", "; write http://b:2"),
    ('"http://10.0.0.5:2380"', "; the quotes are part of it"),
    ("'http://10.0.0.5:2380'", "; the quotes are part of it"),
    ("\u201chttp://10.0.0.5:2380\u201d", "; it has typographic quotes"),
    ("http://a:1 http://b:2", "; separate URLs by commas without spaces"),
    ("http://a:1,", "; there is a comma too many"),
    *((url, "; a variable or placeholder was not filled in: write the address itself")
      for url in ("http://${IP}:2380", "http://{{ip}}:2380", "http://<ip>:2380", "http://$IP:1",
                  "http://%IP%:2380")),
])
@pytest.mark.parametrize("name", _FLAGS_URLS)
def test_flags_url_that_is_none_is_answered_with_the_one_that_was_meant(
    name: str, url: str, advice: str, tmp_path: Path
) -> None:
    port = "2380" if "peer" in name else "2379"
    for told in _flags_in_all_places(name, url, tmp_path):
        assert advice.replace("PORT", port) in told, told


@pytest.mark.parametrize("text, told", [
    ("=http://h:1", "Empty name given for http://h:1 in '=http://h:1': write name=url; perhaps a"),
    ("default=", 'Empty URL given for "default" in \'default=\': write name=url'),
    ("default=", "; write http://HOST:PORT"),
    ("default,b", 'Empty URL given for "default" in \'default\': write name=url'),
    ("http://h:1", 'Empty URL given for "http://h:1"'),
    ("default=http://::1:2380", "; write http://[::1]:2380"),
    ("default=10.0.0.5", "; write http://10.0.0.5:2380"),
    ("default=http://${IP}:2380", "; a variable or placeholder was not filled in"),
    ('"default=http://h:1"', "; the quotes are part of it"),
    ("default=http://h:1,b=http://a b:1", 'invalid character " " in host name'),
])
def test_flags_initial_cluster_that_is_none_is_explained(
    text: str, told: str, tmp_path: Path
) -> None:
    for line in _flags_in_all_places("initial-cluster", text, tmp_path):
        assert "error setting up initial cluster: " in line and told in line, line


@pytest.mark.parametrize("name", sorted(
    name for name, flag in pyetcd._all_flags().items()
    if name not in ("config-file", "cloud-config", "version", *pyetcd.IGNORED_BOOLS)))
def test_flags_quotes_of_an_env_file_are_told_whatever_the_flag(
    name: str, tmp_path: Path
) -> None:
    """docker's --env-file takes `NAME="x"` as it is."""
    flag = pyetcd._all_flags()[name]
    value = "true" if flag.is_bool else "5000" if flag.parse is pyetcd.parse_uint else "x"
    told = ("quotes are part of it", "not supported", "requests are answered whatever",
            "TLS 1.2 and later", "peers are shown", "a suffix of the SRV", "no longer supported")
    for line in _flags_in_all_places(name, f'"{value}"', tmp_path):
        assert any(words in line for words in told), line


def test_flags_line_end_of_another_system_is_told() -> None:
    settings = pyetcd.Settings([], {"ETCD_NAME": "m1\r"})
    settings.complete()
    assert "ends with a carriage return: save the file with Unix" in settings.lines[-1][2]


@pytest.mark.parametrize("wrong, meant", [
    ("nmae", "name"), ("Name", "name"), ("data_dir", "data-dir"), ("datadir", "data-dir"),
    ("listen-client-url", "listen-client-urls"), ("initial-cluser", "initial-cluster"),
    ("advertise-peer-urls", "initial-advertise-peer-urls"), ("proxxy", "proxy"),
    ("election-timout", "election-timeout"), ("cert_file", "cert-file"), ("debgu", "debug"),
])
def test_flags_typing_error_gets_a_suggestion(wrong: str, meant: str, tmp_path: Path) -> None:
    for argv in ([f"-{wrong}=x"], [f"--{wrong}", "x"]):
        with _flags_fails(f"flag provided but not defined: -{wrong}; did you mean -{meant}?"):
            pyetcd.Settings(argv, {})
    variable = "ETCD_" + wrong.upper().replace("-", "_")
    if variable != pyetcd._all_flags()[meant].variable:
        settings = pyetcd.Settings([], {variable: "x"})
        settings.complete()
        suggested = pyetcd._all_flags()[meant].variable
        assert settings.lines[-1][2] == (
            f"unrecognized environment variable {variable}=x; did you mean {suggested}?")
    path = tmp_path / "c"
    path.write_text(f"{wrong}: x\n")
    settings = pyetcd.Settings([f"-config-file={path}"], {})
    settings.complete()
    assert settings.lines[-1][2].endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize("variable", ["ETCD_PORT", "ETCD_SERVICE_HOST", "ETCD_1_PORT_2379_TCP"])
def test_flags_variables_of_links_between_containers_get_no_suggestion(variable: str) -> None:
    settings = pyetcd.Settings([], {variable: "tcp://10.0.0.1:2379"})
    settings.complete()
    assert "did you mean" not in settings.lines[-1][2]


@pytest.mark.parametrize("argv, told", [
    *(([f"-{name}", "true"], f"; -{name} is a switch: write -{name}, or -{name}=true")
      for name, flag in pyetcd._all_flags().items()
      if flag.is_bool and name not in pyetcd.IGNORED_BOOLS and not name.endswith("auto-tls")),
    (["-debug", "no"], "; -debug is a switch: write -debug, or -debug=false"),
    (["-debug", "name"], "; write -name"),
    (["name=x"], "; write -name=x"), (["help"], "; write -help"), (["version"], "; write -version"),
    (["\u2013name", "x"], "; it begins with a typographic dash, write -name"),
    (["\u2014\u2014name", "x"], "; it begins with a typographic dash, write -name"),
    (["-initial-cluster", "a=http://h:1,", "b=http://h:2"], "; write a list as one word"),
    (["-config", "x.yml"], "; a configuration file is given with -config-file FILE"),
    (["-debug", "backup"], "; write `pyetcd backup` first and its flags behind it"),
    (["-debug", "x"], "; x stands behind the switch -debug"),
    (["chek", "d"], "; did you mean the command `pyetcd check`?"),
])
def test_flags_word_that_is_none_is_explained(argv: List[str], told: str) -> None:
    settings = pyetcd.Settings(argv, {})
    with _flags_fails("' is not a valid flag" + told):
        settings.check_leftover()


@pytest.mark.parametrize("name, text, told", [
    ("debug", "x", "; write true or false"),
    ("heartbeat-interval", "100ms", "; write a whole number, in milliseconds and without a unit"),
    ("snapshot-count", "-1", "; write a whole number"),
    ("addr", "http://10.0.0.1:4001", "; write 10.0.0.1:4001"),
    ("cors", "example.com", "; write origins as https://HOST, or * for all"),
    ("discovery-srv", "http://example.com", "a domain is wanted whose SRV records name"),
    ("discovery-srv", "a b", "a domain is wanted"),
    ("discovery-proxy", "http://${proxy}", 'invalid character "$" in host name'),
    ("discovery-proxy", "ftp://p:1", "it must read http://host:port"),
    ("discovery-proxy", "http://::1:1", "it must read http://host:port"),
    ("discovery-proxy", "http://u@:1", "it must read http://host:port"),
    ("discovery-proxy", "p:0", "it must read http://host:port"),
    ("discovery", "http://h:4001/new?size=3", "run `curl 'http://h:4001/new?size=3'` once"),
    ("auto-tls", "true", " is not supported: pyetcd cannot make certificates; make one with"),
    ("peer-auto-tls", "1", "-peer-cert-file cert.pem -peer-key-file key.pem"),
    ("self-signed-cert-validity", "2", "has no effect: pyetcd makes no certificates"),
    ("name", "a=b", 'in -initial-cluster, = and , separate names and URLs; choose a name without'),
    ("name", "a,b", 'in -initial-cluster, = and , separate names and URLs; choose a name without'),
    ("v", "true", "does nothing: -version shows the version, -debug logs more"),
    ("peer-heartbeat-interval", "true", "does nothing: use -heartbeat-interval"),
    ("log-package-levels", "etcdservr=DEBUG", "has etcdservr, which logs nothing here; the"
                                              " packages are auth, discovery, etcd, etcdhttp,"),
    ("log-package-levels", "etcdservr=DEBUG", "; did you mean etcdserver?"),
    ("log-package-levels", "etcdserver=DEBUG,raft.node=INFO,*=INFO", ""),
    ("initial-advertise-peer-urls", "http://127.0.0.1:0", "has port 0"),
])
def test_flags_value_that_cannot_be_used_is_explained(
    name: str, text: str, told: str, tmp_path: Path
) -> None:
    for line in _flags_in_all_places(name, text, tmp_path):
        if name not in ("v", "peer-heartbeat-interval"):    # of etcd 0.4
            line = line.replace("invalid boolean value", "invalid value")
        assert told in line if told else not line, line


def test_flags_empty_name_is_named() -> None:
    with _flags_fails('couldn\'t find local name "" in the initial cluster configuration: -name is'
                      " empty; give this member a name, or leave the flag out"):
        _flags_config(["-name", ""])


def test_flags_packages_that_log_are_all_known() -> None:
    text = Path(pyetcd.__file__).read_text()
    used = set(re.findall(r'(?:package_logger|ThrottledLog)\("([a-z]+)', text)) | {"flags"}
    assert used == set(pyetcd.LOG_PACKAGES)


def test_flags_failed_start_says_nothing_of_the_past_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags_logging: logging.Logger,
) -> None:
    monkeypatch.chdir(tmp_path)
    port = free_port()
    argv = [
        f"-listen-client-urls=http://127.0.0.1:{port}", f"-initial-cluster=b=http://h.test:{port}",
        f"-advertise-client-urls=http://127.0.0.1:{port}",
        f"-listen-peer-urls=http://127.0.0.1:{port + 1}",
    ]
    for _ in range(2):
        assert pyetcd.main(argv) == 1
        assert "already initialized" not in capsys.readouterr().err
        assert os.listdir(tmp_path) == []


def test_flags_editable_install_is_a_plain_path() -> None:
    """With a finder of its own, a clone called pyetcd hides it from the parent directory."""
    text = (Path(pyetcd.__file__).parent / "pyproject.toml").read_text()
    assert '\npackage-dir = {"" = "."}' in text


def test_flags_urls_are_trimmed_and_sorted() -> None:
    config = _flags_config(["-advertise-client-urls", "http://b:2, http://a:1"])
    assert config.advertise_client_urls == ("http://a:1", "http://b:2")


# -- defaults and the whole table ----------------------------------------------


def test_flags_defaults_are_those_of_etcd() -> None:
    config = _flags_config()
    assert config.name == "default"
    assert config.initial_cluster == "default=http://localhost:2380,default=http://localhost:7001"
    assert config.listen_client_urls == ("http://localhost:2379", "http://localhost:4001")
    assert config.listen_peer_urls == ("http://localhost:2380", "http://localhost:7001")
    assert (config.heartbeat_ms, config.election_ms, config.snapshot_count) == (100, 1000, 10000)
    assert (config.discovery_fallback, config.initial_cluster_state) == ("proxy", "new")


def test_flags_initial_cluster_follows_the_name() -> None:
    assert _flags_config(["-name", "x"]).initial_cluster == (
        "x=http://localhost:2380,x=http://localhost:7001")


def test_flags_initial_cluster_follows_the_advertised_peer_urls() -> None:
    """As in etcd 3; programs that start an `etcd` for their tests leave -initial-cluster out."""
    urls = "http://10.0.0.5:2380,http://10.0.0.6:2380"
    config = _flags_config(["-name", "x", "-initial-advertise-peer-urls", urls])
    assert config.initial_cluster == "x=http://10.0.0.5:2380,x=http://10.0.0.6:2380"
    proxied = _flags_config(["-proxy", "on", "-initial-advertise-peer-urls", urls])
    assert proxied.initial_cluster == config.initial_cluster.replace("x=", "default=")


def test_flags_fill_every_field_of_the_configuration() -> None:
    config = _flags_config([
        "-name=n", "-data-dir=d", "-wal-dir=w", "-snapshot-count=5", "-heartbeat-interval=10",
        "-election-timeout=60", "-max-snapshots=1", "-max-wals=2", "-initial-cluster=n=http://h:1",
        "-initial-cluster-token=t", "-initial-cluster-state=existing", "-force-new-cluster",
        "-advertise-client-urls=http://h:2", "-initial-advertise-peer-urls=http://h:1",
        "-listen-client-urls=http://h:4", "-listen-peer-urls=http://h:5",
        "-discovery-fallback=exit", "-discovery-proxy=p:1", "-strict-reconfig-check=false",
        "-compat-version=3.4",
        "-cors=*", "-ui=readonly", "-debug", "-proxy=readonly", "-proxy-failure-wait=1",
        "-proxy-refresh-interval=2", "-proxy-dial-timeout=3", "-proxy-write-timeout=4",
        "-proxy-read-timeout=5", "-cert-file=c", "-key-file=k", "-trusted-ca-file=t",
        "-ca-file=a", "-client-cert-auth", "-client-crl-file=r",
        "-client-cert-allowed-hostname=n", "-peer-cert-file=pc", "-peer-key-file=pk",
        "-peer-trusted-ca-file=pt", "-peer-ca-file=pa", "-peer-client-cert-auth",
        "-peer-crl-file=pr", "-peer-cert-allowed-cn=pn",
    ])
    assert config == pyetcd.ServerConfig(
        name="n", data_dir="d", wal_dir="w", snapshot_count=5, heartbeat_ms=10, election_ms=60,
        max_snapshots=1, max_wals=2, initial_cluster="n=http://h:1", initial_cluster_token="t",
        initial_cluster_state="existing", force_new_cluster=True,
        advertise_client_urls=("http://h:2",), initial_advertise_peer_urls=("http://h:1",),
        listen_client_urls=("http://h:4",), listen_peer_urls=("http://h:5",),
        discovery_fallback="exit", discovery_proxy="p:1", strict_reconfig_check=False,
        compat_version="3.4",
        cors=("*",), ui="readonly", debug=True, proxy="readonly", proxy_failure_wait_ms=1,
        proxy_refresh_interval_ms=2, proxy_dial_timeout_ms=3, proxy_write_timeout_ms=4,
        proxy_read_timeout_ms=5,
        client_tls=pyetcd.TlsFiles("c", "k", "t", "a", True, "r", "n"),
        peer_tls=pyetcd.TlsFiles("pc", "pk", "pt", "pa", True, "pr", allowed_cn="pn"),
    )
    told = {name for name in pyetcd.ServerConfig._fields
            if getattr(config, name) != getattr(pyetcd.ServerConfig(), name)}
    assert told == set(pyetcd.ServerConfig._fields) - {
        "history_events", "discovery", "discovery_srv"}


def test_flags_of_the_article_are_understood() -> None:
    url = "https://discovery.etcd.io/9dfd14389c921bdde47847f13b7f51cb"
    config = _flags_config([
        "-name", "machine1", "-initial-advertise-peer-urls", "http://127.0.0.1:2380",
        "-listen-peer-urls", "http://127.0.0.1:2380", "-listen-client-urls",
        "http://127.0.0.1:2379", "-advertise-client-urls", "http://127.0.0.1:2379",
        "-discovery", url,
    ])
    assert config.discovery == url
    assert config.initial_cluster == ""


_FLAGS_URLS_2380 = ("http://localhost:2380", "http://localhost:7001")
_FLAGS_URLS_2379 = ("http://localhost:2379", "http://localhost:4001")
_FLAGS_TABLE: Dict[str, Any] = {        # etcd 2.3; flags without effect have no default
    "name": "default", "data-dir": "", "wal-dir": "", "snapshot-count": 10000,
    "heartbeat-interval": 100, "election-timeout": 1000, "listen-peer-urls": _FLAGS_URLS_2380,
    "listen-client-urls": _FLAGS_URLS_2379, "max-snapshots": 5, "max-wals": 5, "cors": (),
    "initial-advertise-peer-urls": _FLAGS_URLS_2380, "advertise-client-urls": _FLAGS_URLS_2379,
    "initial-cluster": "",              # made of the name
    "initial-cluster-state": "new", "initial-cluster-token": "etcd-cluster", "discovery": "",
    "discovery-fallback": "proxy", "discovery-proxy": "", "discovery-srv": "",
    "strict-reconfig-check": True,      # as etcd 3
    "proxy": "off", "proxy-failure-wait": 5000, "proxy-refresh-interval": 30000,
    "proxy-dial-timeout": 1000, "proxy-write-timeout": 5000, "proxy-read-timeout": 0,
    "cert-file": "", "key-file": "", "trusted-ca-file": "", "ca-file": "",
    "client-cert-auth": False, "peer-cert-file": "", "peer-key-file": "",
    "peer-trusted-ca-file": "", "peer-ca-file": "", "peer-client-cert-auth": False,
    "debug": False, "log-package-levels": {}, "force-new-cluster": False, "version": False,
    "enable-pprof": False, "experimental-v3demo": False,
    "experimental-gRPC-addr": "", "experimental-auto-compaction-retention": "",
    "addr": "", "bind-addr": "", "peer-addr": "", "peer-bind-addr": "",
    "config-file": "", "auto-tls": False, "peer-auto-tls": False, "host-whitelist": "*",
    "auth-token": "", "max-request-bytes": "", "pre-vote": False,
    "initial-election-tick-advance": False,
    **dict.fromkeys(pyetcd.IGNORED_BOOLS, False),
}
_FLAGS_VALUES = {       # another value than the default, where its kind does not tell
    "initial-cluster": "default=http://h:1", "initial-cluster-state": "existing",
    "discovery": "http://h:1/t", "discovery-fallback": "exit", "proxy": "on", "cors": "*",
    "log-package-levels": "raft=DEBUG", "host-whitelist": "*", "addr": "10.0.0.1:1",
    "bind-addr": "10.0.0.1:1", "peer-addr": "10.0.0.1:1", "peer-bind-addr": "10.0.0.1:1",
    "auto-tls": "false", "peer-auto-tls": "false",
}


@pytest.mark.parametrize("name", _FLAGS_TABLE)
def test_flags_table_of_etcd(name: str) -> None:
    """Each flag has etcd's default, takes its kind of value, and has its variable."""
    default = _FLAGS_TABLE[name]
    assert pyetcd.Settings([], {})[name] == default
    text = _FLAGS_VALUES.get(name)
    if text is None:
        kinds = {bool: "true", int: "7", str: "x", tuple: "http://h:1"}
        text = kinds[type(default)]
    given = pyetcd.Settings([f"-{name}={text}"], {})
    assert given.is_set(name)
    variable = "ETCD_" + name.upper().replace("-", "_")
    if name == "config-file":
        return
    from_environment = pyetcd.Settings([], {variable: text})
    from_environment.read_environment()
    assert from_environment[name] == given[name]
    assert from_environment.sources[name] == variable


@pytest.mark.skipif(not shutil.which("etcd"), reason="needs etcd 3.4")
def test_flags_of_etcd_3_are_all_known() -> None:
    """What `etcd -h` lists is accepted; the same flags are switches."""
    listing = subprocess.run(["etcd", "-h"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             check=False, text=True).stdout
    found = re.findall(r"^  --([\w-]+) '?([^'\n]*)'?$", listing, re.M)
    assert len(found) > 70
    for name, default in found:
        settings = pyetcd.Settings([f"-{name}={default}"], {})
        assert settings.is_set(name)
        assert isinstance(settings[name], bool) == (default in ("true", "false")), name


def test_flags_snapshot_count_zero_is_the_default() -> None:
    assert _flags_config(["-snapshot-count", "0"]).snapshot_count == 10000


@pytest.mark.parametrize("argv, text", [
    (["-v"], 'flag "-v" is no longer supported - ignoring.'),
    (["-snapshot=false"], 'flag "-snapshot" is no longer supported - ignoring.'),
    (["-enable-v2"], "flag -enable-v2 has no effect: the v2 API is always on"),
    (["--enable-v2=true"], "flag -enable-v2 has no effect: the v2 API is always on"),
    (["-log-level", "debug"], "flag -log-level has no effect: the log goes to stderr; its level is"
                              " set by -debug and -log-package-levels"),
    (["-quota-backend-bytes=1"],
     "flag -quota-backend-bytes has no effect: there is no v3 database file"),
    (["-cipher-suites", "X,Y"],
     "flag -cipher-suites has no effect: Python's defaults with TLS 1.2 and later are used"),
    (["-unsafe-no-fsync"], "flag -unsafe-no-fsync has no effect: every write is synced"),
], ids=str)
def test_flags_without_effect_are_accepted_with_one_warning(argv: List[str], text: str) -> None:
    settings = pyetcd.Settings(argv, {})
    settings.check_leftover()
    assert settings.lines == [(logging.WARNING, "flags", text)]


@pytest.mark.parametrize("argv, field, value", [
    (["-addr", "10.0.0.1:4001", "-bind-addr", "127.0.0.1:4001"], "advertise_client_urls",
     ("http://10.0.0.1:4001",)),
    (["-addr", "10.0.0.1:4001"], "listen_client_urls", ("http://[::]:4001",)),
    (["-peer-addr", "10.0.0.1:7001"], "initial_advertise_peer_urls", ("http://10.0.0.1:7001",)),
    (["-peer-addr", "10.0.0.1:7001"], "listen_peer_urls", ("http://[::]:7001",)),
    (["-peer-bind-addr", "[::1]:7001"], "listen_peer_urls", ("http://[::1]:7001",)),
], ids=str)
def test_flags_of_etcd_04_become_urls(argv: List[str], field: str, value: Any) -> None:
    assert getattr(_flags_config(argv), field) == value


def test_flags_old_and_new_name_of_one_setting_conflict() -> None:
    with _flags_fails("Set only one of flags -listen-client-urls and -bind-addr"):
        _flags_config(["-bind-addr", "127.0.0.1:1", "-listen-client-urls", "http://127.0.0.1:1",
                       *_FLAGS_ADVERTISED])


# -- variables -----------------------------------------------------------------


def test_flags_environment_is_used() -> None:
    config = _flags_config([], {"ETCD_NAME": "n", "ETCD_HEARTBEAT_INTERVAL": "20"})
    assert (config.name, config.heartbeat_ms) == ("n", 20)


def test_flags_go_before_variables_and_it_is_said() -> None:
    settings = pyetcd.Settings(["-name", "flag"], {"ETCD_NAME": "env", "ETCD_DATA_DIR": "d",
                                                   "ETCD_BOGUS": "1", "OTHER": "x"})
    settings.read_environment()
    assert settings["name"] == "flag"
    assert settings["data-dir"] == "d"
    assert settings.lines == [
        (logging.INFO, "flags", "recognized environment variable ETCD_NAME, but unused: shadowed by"
                                " corresponding flag "),
        (logging.INFO, "flags", "recognized and used environment variable ETCD_DATA_DIR=d"),
        (logging.WARNING, "flags", "unrecognized environment variable ETCD_BOGUS=1"),
    ]


def test_flags_empty_variable_counts_as_unset() -> None:
    assert _flags_config([], {"ETCD_NAME": "", "ETCD_INITIAL_CLUSTER": ""}).name == "default"


@pytest.mark.parametrize("environ, words", [
    ({"ETCD_HEARTBEAT_INTERVAL": "abc"},
     'invalid value "abc" for ETCD_HEARTBEAT_INTERVAL: parse error'),
    ({"ETCD_VERSION": "v2.3.8"}, 'invalid value "v2.3.8" for ETCD_VERSION: parse error'),
    ({"ETCD_PEERS": "a"}, "no longer supported"),
    ({"ETCD_PROXY": "yes"}, 'invalid value "yes" for ETCD_PROXY: invalid value, use one of off,'),
    ({"ETCD_LISTEN_PEER_URLS": "x"}, 'invalid value "x" for ETCD_LISTEN_PEER_URLS'),
    ({"ETCD_PEER_AUTO_TLS": "true"}, "pyetcd cannot make certificates"),
    ({"ETCD_CONFIG_FILE": "none.yml"}, "open none.yml: no such file or directory"),
], ids=str)
def test_flags_bad_variable(environ: Dict[str, str], words: str) -> None:
    with _flags_fails(words):
        _flags_config([], environ)


def test_flags_variable_of_the_version_is_without_effect() -> None:
    """But containers that set it to a version do not start, as with etcd (above)."""
    assert _flags_config([], {"ETCD_VERSION": "true"}) == _flags_config()


def test_flags_ignored_flag_is_a_variable_too() -> None:
    settings = pyetcd.Settings([], {"ETCD_V": "1"})
    settings.complete()
    assert settings.lines[-1] == (
        logging.WARNING, "flags", 'flag "-v" is no longer supported - ignoring.')


def test_flags_every_flag_has_its_variable() -> None:
    names = [flag.name for group in pyetcd.FLAGS.values() for flag in group]
    assert len(names) == len(set(names))
    flag = pyetcd.FLAGS["clustering"][0]
    assert (flag.name, flag.variable) == (
        "initial-advertise-peer-urls", "ETCD_INITIAL_ADVERTISE_PEER_URLS")


# -- what does not go together ---------------------------------------------------


@pytest.mark.parametrize("argv, words", [
    (["-discovery", "http://h:1/t", "-initial-cluster", "a=http://h:1"],
     'error verifying flags, multiple discovery or bootstrap flags are set. Choose one of'
     ' "initial-cluster", "discovery" or "discovery-srv"'),
    (["-discovery=http://h:1/t", "-discovery-srv", "x"], "multiple discovery or bootstrap flags"),
    (["-listen-client-urls", "http://127.0.0.1:1"],
     "error verifying flags, -advertise-client-urls is required when -listen-client-urls is set"
     " explicitly"),
    (["-discovery=http://h:1/t", "-discovery-fallback=exit", "-listen-client-urls=http://h:1"],
     "-advertise-client-urls is required"),
    (["-election-timeout", "499"],
     "-election-timeout[499ms] should be at least as 5 times as -heartbeat-interval[100ms]"),
    (["-election-timeout", "50001"],
     "-election-timeout[50001ms] is too long, and should be set less than 50000ms"),
    (["-heartbeat-interval", "0"], "should be at least 1ms"),
    (["-peer-cert-allowed-cn=a", "-peer-cert-allowed-hostname=b"],
     'AllowedCN and AllowedHostname are mutually exclusive (cn="a", hostname="b")'),
    (["-initial-cluster="], 'couldn\'t find local name "default" in the initial cluster'),
    (["-initial-cluster=default=ftp://h:1"], "URL scheme must be http or https: ftp://h:1"),
], ids=str)
def test_flags_that_do_not_go_together(argv: List[str], words: str) -> None:
    with _flags_fails(words):
        _flags_config(argv)


@pytest.mark.parametrize("argv", [
    ["-election-timeout", "50000"], ["-election-timeout", "500"],
    ["-discovery=http://h:1/t", "-listen-client-urls=http://h:1"],
    ["-proxy=on", "-listen-client-urls=http://h:1"],
    ["-proxy=readonly", "-listen-client-urls=http://h:1"],
    ["-listen-peer-urls=https://h:1", "-initial-advertise-peer-urls=https://h:1"],
    ["-auto-tls=false"], ["-host-whitelist=*"], ["-tls-min-version", "TLS1.2"],
], ids=str)
def test_flags_at_the_limit_are_accepted(argv: List[str]) -> None:
    _flags_config(argv)


@pytest.mark.parametrize("text", [
    _FLAGS_FILE, json.dumps(_FLAGS_FILE_JSON), json.dumps(_FLAGS_FILE_JSON, indent=1),
    "\ufeff---\r\n" + _FLAGS_FILE.replace("\n", "\r\n"),
], ids=["lines", "json", "json, indented", "windows"])
def test_flags_configuration_file_counts_alone(text: str, tmp_path: Path) -> None:
    """Flags and variables are ignored, and that is said."""
    path = tmp_path / "c.yml"
    path.write_bytes(text.encode())
    settings = pyetcd.Settings(
        ["-config-file", str(path), "-name", "flag", "-debug"], {"ETCD_WAL_DIR": "w", "ETCD_X": ""})
    settings.complete()
    assert settings.lines[0] == (
        logging.INFO, "etcd", f'Loading server configuration from "{path}". Other configuration'
        " command line flags and environment variables will be ignored if provided.")
    assert pyetcd.make_config(settings) == pyetcd.ServerConfig(
        name="n1", data_dir="dA", snapshot_count=77, strict_reconfig_check=False,
        initial_cluster="n1=http://10.0.0.1:2380,n2=http://10.0.0.2:2380",
        initial_advertise_peer_urls=("http://10.0.0.1:2380",),
        listen_client_urls=("http://10.0.0.1:2379", "http://127.0.0.1:2379"),
        advertise_client_urls=("http://10.0.0.1:2379",), initial_cluster_token="it''s#no comment",
        client_tls=pyetcd.TlsFiles("c.pem", "k.pem", client_cert_auth=True),
        peer_tls=pyetcd.TlsFiles(trusted_ca_file="ca.pem"),
    )


def test_flags_configuration_file_may_be_named_by_its_variable(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("name: file\n")
    config = _flags_config([], {"ETCD_CONFIG_FILE": str(tmp_path / "c"), "ETCD_NAME": "env"})
    assert config.name == "file"


def test_flags_unknown_setting_of_a_file_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_text("name: a\nbogus: 1\nversion: true\nenable-v2: true\n")
    settings = pyetcd.Settings([f"-config-file={path}"], {})
    settings.complete()
    known = "`pyetcd -help` lists those that are known"
    assert [text for level, _, text in settings.lines if level == logging.WARNING] == [
        f'{path}:2: unknown setting "bogus" is ignored; {known}',
        f'{path}:3: unknown setting "version" is ignored; {known}',
        "flag -enable-v2 has no effect: the v2 API is always on",
    ]


@pytest.mark.parametrize("text, line, words", [
    ("name: a\n\nheartbeat-interval: abc\n", 3,
     'invalid value "abc" for heartbeat-interval: parse error'),
    ("name: a\nname: b\n", 2, "name is set a second time, after line 1"),
    ("name a\n", 1, "'name a' is not understood; write `setting: value`"),
    ("name:a\n", 1, "is not understood"),
    ("- name: a\n", 1, "is not understood"),
    ("listen-peer-urls:\n  - http://h:1\n", 2, "is not understood"),
    ("name: a\n  data-dir: x\n", 2, "data-dir is indented, but stands in none of the sections"),
    ("cors: *\n", 1, "the value of cors, '*', is not understood"),
    ("name: a: b\n", 1, "is not understood"),
    ("name: 'a' b\n", 1, "is not understood"),
    ("name: 'a\n", 1, "is not understood"),
    ("name: |\n", 1, "is not understood"),
    ("name: {a: b}\n", 1, "is not understood"),
    ("cors: [a, [b]]\n", 1, "is not understood"),
    ("cors: [a,\n b\n", 1, "is not understood"),
    ("peer-transport-security: x\n", 1, "peer-transport-security is a section"),
    ("\npeer-transport-security:\n  client-cert-aut: true\n", 3,
     'unknown setting "client-cert-aut" in peer-transport-security; use one of cert-file,'),
    ("client-transport-security:\n  auto-tls: true\n", 2, "pyetcd cannot make certificates"),
    ('{"name": "a",\n "debug": truth}', 2, "not JSON"),
    ('{"name": "a",\n "name": "b"}', 1, "name is set a second time"),
    ('{"name": "a",\n "debug": {"a": 1}}', 2, "the value of debug is not understood"),
    ('{"name": "a",\n "snapshot-count": [1.5]}', 2, "is not understood"),
    ('{"snapshot-count": -1}', 1, 'invalid value "-1" for snapshot-count: parse error'),
    ('{"name": "a",\n "peer-transport-security": "x"}', 2,
     "peer-transport-security is a section"),
], ids=str)
def test_flags_bad_configuration_file(text: str, line: int, words: str, tmp_path: Path) -> None:
    """File, line, and what is wrong; nothing that may protect something is skipped in silence."""
    path = tmp_path / "c.yml"
    path.write_text(text)
    with pytest.raises(pyetcd.FlagError) as caught:
        _flags_config(["-config-file", str(path)])
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_flags_checks_of_a_file_speak_its_language(tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("listen-client-urls: http://10.0.0.1:1\n")
    with _flags_fails("for example advertise-client-urls: http://10.0.0.1:1"):
        _flags_config(["-config-file", str(path)])
    path.write_text("\nadvertise-client-urls: http://:1\n")
    with _flags_fails(f"advertise-client-urls (from {path}:2) has no host"):
        _flags_config(["-config-file", str(path)])


def test_flags_configuration_file_must_be_text(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"name: \xff\n")
    with _flags_fails("is not text in UTF-8"):
        _flags_config(["-config-file", str(tmp_path / "c")])
    with _flags_fails(f"open {tmp_path}: is a directory"):
        _flags_config(["-config-file", str(tmp_path)])


# -- TLS -----------------------------------------------------------------------------


@pytest.fixture
def flags_pem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """c.pem, k.pem and ca.pem in the working directory: here only their names count."""
    monkeypatch.chdir(tmp_path)
    for name in ("c.pem", "k.pem", "ca.pem"):
        (tmp_path / name).write_text("")


_FLAGS_PAIR = {"cert_file": "c.pem", "key_file": "k.pem"}


@pytest.mark.parametrize("side, files, urls, words", [
    ("client", {"cert_file": "c.pem"}, "http://h:1",
     "KeyFile and CertFile must both be present[key: , cert: c.pem]; give both -cert-file and"
     " -key-file"),
    ("peer", {"key_file": "k.pem"}, "http://h:1",
     "KeyFile and CertFile must both be present[key: k.pem, cert: ]; give both -peer-cert-file"),
    ("client", {}, "https://h:1",
     "cannot listen on TLS for given listener: KeyFile and CertFile are not presented"),
    ("peer", {}, "https://h:1",
     "cannot listen on TLS for https://h:1: KeyFile and CertFile are not presented"),
    ("client", {"cert_file": "no.pem", "key_file": "k.pem"}, "https://h:1",
     "open no.pem: no such file or directory; -cert-file must name"),
    ("peer", {**_FLAGS_PAIR, "trusted_ca_file": "no.pem"}, "https://h:1",
     "open no.pem: no such file or directory; -peer-trusted-ca-file must name"),
    ("peer", {**_FLAGS_PAIR, "crl_file": "no.pem", "client_cert_auth": True}, "https://h:1",
     "open no.pem: no such file or directory; -peer-crl-file must name"),
    ("client", {**_FLAGS_PAIR, "allowed_name": "x"}, "https://h:1",
     "client certificates need -client-cert-auth: without it no certificate is asked for"),
    ("peer", {**_FLAGS_PAIR, "crl_file": "ca.pem"}, "https://h:1",
     "peer certificates need -peer-client-cert-auth"),
], ids=str)
def test_flags_tls_that_cannot_work(
    side: str, files: Dict[str, Any], urls: str, words: str, flags_pem: None
) -> None:
    with pytest.raises(pyetcd.StartError) as caught:
        pyetcd.check_tls(side, pyetcd.TlsFiles(**files), urls.split(","))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("side, files, urls, lines", [
    ("client", {}, "http://h:1", []),
    ("client", {"trusted_ca_file": "ca.pem"}, "http://h:1", []),
    ("client", {**_FLAGS_PAIR, "trusted_ca_file": "ca.pem", "allowed_name": "x",
                "client_cert_auth": True}, "https://h:1",
     ["clientTLS: cert = c.pem, key = k.pem, ca = , trusted-ca = ca.pem, client-cert-auth = true"]),
    ("peer", {**_FLAGS_PAIR, "ca_file": "ca.pem", "crl_file": "ca.pem"}, "http://h:1,https://h:2",
     ["peerTLS: cert = c.pem, key = k.pem, ca = ca.pem, trusted-ca = , client-cert-auth = false",
      "The scheme of peer url http://h:1 is http while peer key/cert files are presented. Ignored"
      " peer key/cert files."]),
    ("client", {"client_cert_auth": True}, "http://h:1",
     ["client certificates are not asked for on http://h:1: that needs https, with -cert-file and"
      " -key-file"]),
], ids=str)
def test_flags_tls_start_lines(
    side: str, files: Dict[str, Any], urls: str, lines: List[str], flags_pem: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    pyetcd.check_tls(side, pyetcd.TlsFiles(**files), urls.split(","))
    assert caplog.messages == lines


@pytest.mark.parametrize("argv, field, value", [
    (["-bind-addr=10.0.0.1:1", "-addr=10.0.0.1:1", "-cert-file=c", "-key-file=k"],
     "listen_client_urls", ("https://10.0.0.1:1",)),
    (["-bind-addr=10.0.0.1:1", "-addr=10.0.0.1:1", "-peer-cert-file=c", "-peer-key-file=k"],
     "listen_client_urls", ("http://10.0.0.1:1",)),
    (["-peer-addr=10.0.0.1:1", "-peer-cert-file=c", "-peer-key-file=k"],
     "initial_advertise_peer_urls", ("https://10.0.0.1:1",)),
], ids=str)
def test_flags_of_etcd_04_with_a_certificate_are_https(
    argv: List[str], field: str, value: Any
) -> None:
    assert getattr(_flags_config(argv), field) == value


# -- addresses that nobody can reach ---------------------------------------------------


@pytest.mark.parametrize("argv, environ, example", [
    (["-listen-client-urls", "http://0.0.0.0:2379"], {},
     "for example -advertise-client-urls http://192.168.7.7:2379"),
    (["-listen-client-urls", "https://[::]:1,http://127.0.0.1:2"], {},
     "for example -advertise-client-urls http://127.0.0.1:2,https://192.168.7.7:1"),
    ([], {"ETCD_LISTEN_CLIENT_URLS": "http://0.0.0.0:2379"},
     "for example ETCD_ADVERTISE_CLIENT_URLS=http://192.168.7.7:2379"),
    (["-bind-addr", "0.0.0.0:4001"], {},
     "for example -advertise-client-urls http://192.168.7.7:4001"),
], ids=str)
def test_flags_listening_everywhere_needs_an_address_for_the_clients(
    argv: List[str], environ: Dict[str, str], example: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyetcd, "default_route_address", lambda: "192.168.7.7")
    with _flags_fails(example):
        _flags_config(argv, environ)


@pytest.mark.parametrize("argv, where", [
    (["-advertise-client-urls", "http://0.0.0.0:1"], "-advertise-client-urls has http://0.0.0.0:1"),
    (["-initial-advertise-peer-urls", "http://[::]:1"], "-initial-advertise-peer-urls has http:"),
    (["-initial-cluster", "default=http://0.0.0.0:1"], "-initial-cluster has http://0.0.0.0:1"),
], ids=str)
def test_flags_wildcard_that_is_advertised_is_a_warning(
    argv: List[str], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """etcd takes it in silence; on one host it even works."""
    monkeypatch.setattr(pyetcd, "default_route_address", lambda: "192.168.7.7")
    settings = pyetcd.Settings(argv, {})
    pyetcd.make_config(settings)
    ((level, package, text),) = settings.lines
    assert (level, package) == (logging.WARNING, "etcd")
    assert text.startswith(where)
    assert text.endswith("advertise the address of this one, e.g. http://192.168.7.7:1")


def test_flags_registering_default_peer_urls_is_a_warning() -> None:
    """The others would look for this member on their own machines."""
    argv = ["-discovery", "http://h:1/t", "-listen-peer-urls", "http://h:2"]
    settings = pyetcd.Settings(argv, {})
    pyetcd.make_config(settings)
    assert settings.lines == [(
        logging.WARNING, "etcd", "-listen-peer-urls is set, but the other members are told"
        " http://localhost:2380,http://localhost:7001; set -initial-advertise-peer-urls"
        " http://h:2")]


# -- empty hosts and $private_ipv4 -------------------------------------------------


def test_flags_drop_in_of_the_article_names_the_empty_variable() -> None:
    """The failure at the end of the article: cloud-config did not know $private_ipv4."""
    with pytest.raises(pyetcd.FlagError) as caught:
        _flags_config([], {
            "ETCD_ADVERTISE_CLIENT_URLS": "http://:2379",
            "ETCD_DISCOVERY": "https://discovery.etcd.io/7d7a0ede23474b12c32b88e5b968b2a5",
            "ETCD_INITIAL_ADVERTISE_PEER_URLS": "http://10.0.0.5:2380",
            "ETCD_LISTEN_CLIENT_URLS": "http://0.0.0.0:2379",
            "ETCD_LISTEN_PEER_URLS": "http://:2380",
            "ETCD_NAME": "default",
        })
    text = str(caught.value)
    where = "advertise-client-urls (from ETCD_ADVERTISE_CLIENT_URLS)"
    assert f"{where} has no host in http://:2379" in text
    assert "$private_ipv4 was empty" in text
    assert "http://10.0.0.5:2379" in text
    assert "COREOS_PRIVATE_IPV4 in /etc/environment" in text
    assert "\n" not in text


@pytest.mark.parametrize("argv, words", [
    (["-advertise-client-urls", "http://:2379"], "-advertise-client-urls has no host"),
    (["-initial-advertise-peer-urls", "http://:2380"], "-initial-advertise-peer-urls has no host"),
    (["-initial-cluster", "default=http://:2380"], "-initial-cluster has no host"),
], ids=str)
def test_flags_empty_host_is_refused_where_others_connect(argv: List[str], words: str) -> None:
    with _flags_fails(words):
        _flags_config(argv)


def test_flags_empty_host_listens_everywhere() -> None:
    config = _flags_config(["-listen-peer-urls", "http://:2380"])
    assert config.listen_peer_urls == ("http://:2380",)


@pytest.mark.parametrize("environ, lines, expected", [
    ({"COREOS_PRIVATE_IPV4": "10.1.1.1"}, "", "10.1.1.1"),
    ({}, "COREOS_PRIVATE_IPV4=10.2.2.2\n", "10.2.2.2"),
    ({}, "# x\nexport COREOS_PRIVATE_IPV4=\"10.3.3.3\"\n", "10.3.3.3"),
    ({"COREOS_PRIVATE_IPV4": "10.1.1.1"}, "COREOS_PRIVATE_IPV4=10.2.2.2\n", "10.1.1.1"),
    ({}, "COREOS_PRIVATE_IPV4=\n", "192.168.7.7"),
], ids=str)
def test_flags_private_ipv4_is_filled_in(
    environ: Dict[str, str], lines: str, expected: str, flags_environment_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pyetcd, "default_route_address", lambda: "192.168.7.7")
    flags_environment_file.write_text(lines)
    config = _flags_config([], {"ETCD_ADVERTISE_CLIENT_URLS": "http://$private_ipv4:2379",
                                "ETCD_INITIAL_CLUSTER": "default=http://$private_ipv4:2380",
                                **environ})
    assert config.advertise_client_urls == (f"http://{expected}:2379",)
    assert config.initial_cluster == f"default=http://{expected}:2380"


@pytest.mark.parametrize("kind", ["private", "public"])
def test_flags_unknown_address_is_refused_with_instructions(
    kind: str, flags_environment_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyetcd, "default_route_address", lambda: "")
    with _flags_fails(f"set COREOS_{kind.upper()}_IPV4 in {flags_environment_file}"):
        _flags_config(["-advertise-client-urls", f"http://${kind}_ipv4:2379"])


def test_flags_public_ipv4_is_never_guessed(flags_environment_file: Path) -> None:
    with _flags_fails("-listen-peer-urls has $public_ipv4 in http://$public_ipv4:1"):
        _flags_config(["-listen-peer-urls", "http://$public_ipv4:1"])


def test_flags_default_route_address_is_ours_or_empty() -> None:
    address = pyetcd.default_route_address()
    assert address == "" or socket.inet_pton(socket.AF_INET, address)


# -- output ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv", [["-h"], ["-help"], ["--help"], ["-debug", "-h", "-bogus"]], ids=str)
def test_flags_help_lists_every_flag(argv: List[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert pyetcd.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for group in pyetcd.FLAGS.values():
        for flag in group:
            assert f"--{flag.name} " in out
    assert "\t--pre-vote\n" in out


def test_flags_fill_every_field_that_is_not_for_programs_only() -> None:
    """A row whose field is misspelt would leave the field at its default in silence."""
    filled = {flag.field for group in pyetcd.FLAGS.values() for flag in group if flag.field}
    fields = {*pyetcd.ServerConfig._fields} - {"client_tls", "peer_tls"}
    fields |= {f"{side}_tls.{name}" for side in ("client", "peer")
               for name in pyetcd.TlsFiles._fields}
    assert fields - filled == {"history_events", "client_tls.allowed_cn"}


def test_flags_page_of_the_manual_names_every_flag_that_works() -> None:
    """And none that does not exist; where it says "and the same with peer-", it lists them."""
    named = set(re.findall(r"`-?([a-z][a-z-]+)`", manual("configuration")))
    known = {flag.name for group in pyetcd.FLAGS.values() for flag in group}
    works = {flag.name for title, group in pyetcd.FLAGS.items() for flag in group
             if "refused" not in title and not flag.no_effect
             and "not supported" not in flag.help and "DEPRECATED" not in flag.help}
    assert works - named == set()
    for page in manual_pages():
        for command in re.findall(r"python3 (?:\.\./)?pyetcd\.py (?![a-z])((?:.*\\\n)*.*)",
                                  manual(page)):
            assert set(re.findall(r"(?<!\S)-([a-z][a-z-]+)", command.partition("#")[0])) <= known


def test_flags_version_has_four_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert pyetcd.main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "etcd Version: 2.3.8"
    assert [line.partition(":")[0] for line in lines] == [
        "etcd Version", "Git SHA", "Go Version", "Go OS/Arch"]


def test_flags_version_does_not_read_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ETCD_HEARTBEAT_INTERVAL", "abc")
    assert pyetcd.main(["-version"]) == 0


@pytest.mark.parametrize("argv", [["-bogus"], ["foo"], ["-advertise-client-urls", "http://:1"]],
                         ids=str)
def test_flags_error_is_one_line_on_stderr_and_exit_code_1(
    argv: List[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert pyetcd.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith(". See 'pyetcd -help'.\n")


def test_flags_log_lines_have_the_form_of_the_article() -> None:
    formatter = pyetcd.LogFormatter()

    def line(name: str) -> str:
        record = logging.LogRecord(name, logging.INFO, "", 0, "found %d peer(s)", (1,), None)
        record.created = 1441026186.0       # 2015-08-31 13:03:06 UTC
        return formatter.format(record)

    text = line("pyetcd.raft.node")
    assert text.endswith(":06 raft.node: found 1 peer(s)")
    assert text[:8] == "2015/08/" or text[:8] == "2015/09/"
    assert line("pyetcd").endswith(":06 found 1 peer(s)")


def test_flags_log_levels_are_set(flags_logging: logging.Logger) -> None:
    settings = pyetcd.Settings(["-log-package-levels", "etcdserver=WARNING,*=DEBUG"], {})
    pyetcd.set_up_logging(settings)
    assert flags_logging.level == logging.DEBUG
    assert pyetcd.package_logger("etcdserver").level == logging.WARNING


# -- the data directory, the process -------------------------------------------------


def test_flags_default_data_dir_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "pyetcd")
    pyetcd.check_data_dir(pyetcd.ServerConfig(name="machine1"))
    assert caplog.messages == ["no data-dir provided, using default data-dir ./machine1.etcd"]


def test_flags_member_dir_is_recognized(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    (tmp_path / "member" / "wal").mkdir(parents=True)
    config = pyetcd.ServerConfig(data_dir=str(tmp_path), proxy="on")
    assert pyetcd.check_data_dir(config) == "member"
    assert caplog.messages == ["already initialized as member before, starting as etcd member..."]


def test_flags_proxy_dir_is_recognized(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    (tmp_path / "proxy").mkdir()
    assert pyetcd.check_data_dir(pyetcd.ServerConfig(data_dir=str(tmp_path))) == "proxy"
    assert caplog.messages == ["already initialized as proxy before, starting as etcd proxy..."]


@pytest.mark.parametrize("abstract", [False, True])
def test_flags_systemd_is_notified(abstract: bool, tmp_path: Path) -> None:
    name = f"@pyetcd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:] if abstract else name)
        sock.settimeout(5)
        pyetcd.notify_systemd({"NOTIFY_SOCKET": name})
        assert sock.recv(100) == b"READY=1"


def test_flags_missing_notify_socket_is_logged_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a socket only a service of systemd is told; not who starts it by hand."""
    monkeypatch.setattr(os, "getppid", lambda: 2)
    pyetcd.notify_systemd({})
    assert caplog.messages == []
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/run/systemd/system")
    pyetcd.notify_systemd({})
    assert caplog.messages == ["forgot to set Type=notify in systemd service file?"]
    caplog.clear()
    pyetcd.notify_systemd({"NOTIFY_SOCKET": str(tmp_path / "none")})
    assert caplog.messages[0].startswith("failed to notify systemd for readiness: ")


@pytest.mark.parametrize("limit, code", [(150, 1), (151, 0)])
def test_flags_low_descriptor_limit_is_refused(limit: int, code: int) -> None:
    script = f"""
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
        import pyetcd
        try:
            pyetcd.raise_descriptor_limit()
        except pyetcd.StartError as error:
            print(error)
            raise SystemExit(1)
    """
    done = _flags_python(script)
    assert done.wait(20) == code
    assert ("file descriptor limit[150]" in _flags_output(done)) == bool(code)


def _flags_python(script: str) -> subprocess.Popen[bytes]:
    """Start another interpreter, which can import pyetcd."""
    environ = {**os.environ, "PYTHONPATH": str(Path(pyetcd.__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, env=environ)


def _flags_output(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    with process.stdout:
        return process.stdout.read().decode()


@pytest.mark.parametrize("number, name", [
    (signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupt"),
])
def test_flags_signal_stops_in_order_then_ends_the_process(number: int, name: str) -> None:
    """The parent sees death by the signal, after the stop."""
    process = _flags_python("""
        import logging, sys, threading
        import pyetcd
        logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
        stopped = threading.Event()
        signals = pyetcd.SignalStop()
        signals.install(lambda: (print("stopping"), stopped.set()))
        print("up", flush=True)
        stopped.wait()
        sys.stdout.flush()
        signals.end()
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(number)
    assert process.wait(20) == -number
    assert _flags_output(process) == f"received {name} signal, shutting down...\nstopping\n"


def test_flags_first_process_of_a_container_ends_with_0_after_a_signal() -> None:
    """For process 1 the kernel would drop the signal anyway."""
    process = _flags_python("""
        import os, threading
        import pyetcd
        stopped = threading.Event()
        signals = pyetcd.SignalStop()
        signals.install(stopped.set)
        print("up", flush=True)
        stopped.wait()
        os.getpid = lambda: 1
        signals.end()
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    _flags_output(process)


def test_flags_signal_before_the_start_ends_the_process_silently() -> None:
    process = _flags_python("""
        import threading
        import pyetcd
        pyetcd.SignalStop()
        print("up", flush=True)
        threading.Event().wait(60)
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == -signal.SIGINT
    assert _flags_output(process) == ""


def test_flags_ignored_interrupt_stays_ignored() -> None:
    """A background job of a shell without job control must survive ^C."""
    process = _flags_python("""
        import signal, threading
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        import pyetcd
        pyetcd.SignalStop().install(lambda: None)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    """)
    assert process.wait(20) == 0
    _flags_output(process)


# -- a whole member ----------------------------------------------------------------------


def _flags_member(path: Path, *more: str, **environ: str) -> subprocess.Popen[str]:
    """`python pyetcd.py` in an empty directory, on ports of its own."""
    return subprocess.Popen(
        [*Process.program, *more], cwd=path, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, universal_newlines=True, env={**os.environ, **environ})


def _flags_ports(count: int) -> List[int]:
    return [free_port() for _ in range(count)]


def test_flags_member_runs_from_the_environment_alone(tmp_path: Path) -> None:
    """As under systemd: variables, READY=1 when it serves, SIGTERM, death by SIGTERM."""
    client, peer = (f"http://127.0.0.1:{port}" for port in _flags_ports(2))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(30)
        process = _flags_member(
            tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify"), ETCD_NAME="n1",
            ETCD_LISTEN_CLIENT_URLS=client, ETCD_ADVERTISE_CLIENT_URLS=client,
            ETCD_LISTEN_PEER_URLS=peer, ETCD_INITIAL_ADVERTISE_PEER_URLS=peer,
            ETCD_INITIAL_CLUSTER=f"n1={peer}")
        try:
            assert notify.recv(100) == b"READY=1"
            with urllib.request.urlopen(client + "/version", timeout=10) as answer:
                assert answer.status == 200
        finally:
            process.terminate()
            output = process.communicate(timeout=30)[0]
    lines = [line.split(" ", 2)[2] for line in output.splitlines()]
    assert process.returncode == -signal.SIGTERM
    assert "flags: recognized and used environment variable ETCD_NAME=n1" in lines
    start = lines.index("etcd: no data-dir provided, using default data-dir ./n1.etcd")
    assert lines[start + 1:start + 4] == [
        f"etcd: listening for peers on {peer}",
        f"etcd: listening for client requests on {client}",
        "etcdserver: datadir is valid for the 2.0.1 format",
    ]
    assert "received terminated signal, shutting down..." in lines


def test_flags_start_failure_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    """What was open is closed again, and that is said."""
    ports = _flags_ports(2)
    with socket.create_server(("127.0.0.1", ports[1])):
        process = _flags_member(
            tmp_path, f"-listen-peer-urls=http://127.0.0.1:{ports[0]}",
            f"-listen-client-urls=http://127.0.0.1:{ports[1]}", *_FLAGS_ADVERTISED)
        output = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert "Traceback" not in output
    lines = output.splitlines()
    assert lines[-2].endswith(f"etcd: stopping listening for peers on http://127.0.0.1:{ports[0]}")
    assert "bind: address already in use" in lines[-1]


def test_flags_tls_failure_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    process = _flags_member(tmp_path, "-cert-file=c.pem", "-cors=*")
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert output.count("\n") == 1
    assert "etcd: KeyFile and CertFile must both be present[key: , cert: c.pem]" in output


def test_flags_start_lines_say_how_each_side_is_protected(
    flags_pem: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyetcd")
    pair = pyetcd.TlsFiles("c.pem", "k.pem")
    pyetcd.log_tls_and_cors(pyetcd.ServerConfig(
        listen_client_urls=("https://h:1",), client_tls=pair, listen_peer_urls=("http://h:2",),
        peer_tls=pair, cors=("http://a", "http://b")))
    assert [(r.name, r.levelname, r.getMessage()[:20]) for r in caplog.records] == [
        ("pyetcd.etcd", "INFO", "peerTLS: cert = c.pe"),
        ("pyetcd.etcd", "WARNING", "The scheme of peer u"),
        ("pyetcd.etcd", "INFO", "clientTLS: cert = c."),
        ("pyetcd.etcd", "INFO", "cors = http://a,http"),
    ]


def test_flags_member_runs_from_a_configuration_file(tmp_path: Path) -> None:
    """The file alone: a flag that would be an error in itself does not count."""
    client, peer = (f"http://127.0.0.1:{port}" for port in _flags_ports(2))
    (tmp_path / "c.yml").write_text(
        f"name: n1\nlisten-client-urls: {client}\nadvertise-client-urls: {client}\n"
        f"listen-peer-urls: {peer}\ninitial-advertise-peer-urls: {peer}\n"
        f"initial-cluster: n1={peer}\nbogus: 1\n")
    process = Process(tmp_path, "-config-file", "c.yml", "-election-timeout", "1")
    try:
        process.wait_log("published {Name:n1 ")
        lines = [line.split(" ", 2)[2] for line in process.log().splitlines()]
        assert lines[0].startswith('etcd: Loading server configuration from "c.yml". Other')
        assert lines[1].startswith('etcd: c.yml:7: unknown setting "bogus" is ignored')
    finally:
        process.kill()


@pytest.mark.parametrize("state", ["new", "existing"])
def test_flags_member_that_lost_its_data_directory_says_what_to_do(
    tmp_path: Path, state: str
) -> None:
    """It must not vote again as if it had never voted."""
    with StaticCluster(tmp_path, 3) as cluster:
        lost = cluster.members[2]
        lost.process.kill()
        shutil.rmtree(tmp_path / "n2.etcd")
        cluster.start(lost, "-initial-cluster-state", state)
        assert lost.process.popen.wait(60) == 1
        line = lost.process.log().splitlines()[-1]
        assert "has already been bootstrapped; its data directory is lost" in line
        assert "DELETE /v2/members/" in line and "-initial-cluster-state existing" in line
        assert cluster.members[0].put("a", "1")[0] == 201


# -- the fresh image, by which the program gives the compiler's memory back ------------


_IMAGE_PROBE = """
import json, os, sys, warnings
with open("/proc/self/cmdline", "rb") as file:
    words = file.read().decode().split("\\0")[:-1]
with open("/proc/self/comm") as file:
    name = file.read()
print(json.dumps({
    "is_fresh": "_PAST_IMAGE" in globals(), "words": words, "name": name, "argv": sys.argv,
    "orig_argv": getattr(sys, "orig_argv", words), "path": sys.path, "file": __file__,
    "flags": str(sys.flags), "executable": sys.executable, "main": __name__, "pid": os.getpid(),
    "open": [os.readlink("/proc/self/fd/" + fd) for fd in os.listdir("/proc/self/fd")
             if os.path.exists("/proc/self/fd/" + fd)],
}))
sys.exit(7)
"""


def _image_run(words, directory, *, script="pyetcd.py", before=None, **options):
    """Run a script that begins as pyetcd.py does, and then tells what it sees."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("there is no image without memfd_create, and the probe looks into /proc")
    source = Path(pyetcd.__file__).read_text()
    head = source[:source.index("import base64\n")].replace('"""pyetcd:', before or '"""pyetcd:', 1)
    (directory / Path(script).name).write_text(head + _IMAGE_PROBE)
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True, timeout=60,
                          check=False, **options)
    assert done.returncode == 7, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("options, script", [
    ([], "pyetcd.py"), (["-I"], "./pyetcd.py"), (["-X", "dev"], "absolute"), (["-P"], "pyetcd.py"),
    (["-Xdev", "-W", "error", "-bb", "-Es"], "p.py"), (["-O"], "\u00e9/p.py"),
])
def test_image_is_as_if_the_file_had_been_run(tmp_path, options, script):
    """Same words for `ps` and `pgrep -f`, same sys.path, flags and name; nothing on stderr."""
    if options == ["-P"] and sys.version_info < (3, 11):
        pytest.skip("this Python has no -P")
    directory = tmp_path / "\u00e9" if "\u00e9" in script else tmp_path
    directory.mkdir(exist_ok=True)
    path = str(tmp_path / "pyetcd.py") if script == "absolute" else Path(script).name
    words = [sys.executable, *options, path, "-name", "x y", "", "z"]
    seen, errors = _image_run(words, directory, script=path)
    (directory / "plain.py").write_text(_IMAGE_PROBE)
    plain_words = [sys.executable, *options, "plain.py", *words[-4:]]
    plain = json.loads(subprocess.run(plain_words, cwd=directory, capture_output=True, text=True,
                                      check=False).stdout)
    assert seen["is_fresh"] and seen["main"] == "__main__"
    assert seen["words"][:len(words)] == words and not any(seen["words"][len(words):])
    assert seen["argv"] == words[len(options) + 1:]
    if sys.version_info >= (3, 10):
        assert seen["orig_argv"] == words
    assert seen["file"] == str(directory / Path(path).name)
    for same in ("name", "path", "flags", "executable"):
        assert seen[same] == plain[same], same
    assert not [name for name in seen["open"] if "memfd" in name]
    assert errors == ""


def test_image_is_left_out_where_it_cannot_be(tmp_path):
    """Debuggers, modules that run the file, system calls and files that are not there."""
    forbid = "import os\ndef no(*args):\n    raise OSError('no')\n"
    for before in ("os.execv = no", "os.memfd_create = no", "del os.memfd_create",
                   "os.readlink, real = lambda path: '/lib/ld-linux.so', os.readlink",
                   "import sys; sys.settrace(lambda *args: None)",
                   "import builtins; real = open; builtins.open = lambda name, *a, **o: "
                   "no() if name == '/proc/self/mem' else real(name, *a, **o)"):
        # Before the first statement of the file, as a .pth file could have it.
        (tmp_path / "sitecustomize.py").write_text(forbid + before + "\n")
        seen, errors = _image_run([sys.executable, "pyetcd.py", "x"], tmp_path,
                                  env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert not seen["is_fresh"] and seen["argv"] == ["pyetcd.py", "x"], before
        assert errors == ""
    (tmp_path / "sitecustomize.py").unlink()
    by_runpy = "import runpy; runpy.run_path('pyetcd.py', run_name='__main__')"
    for options in (["-m", "pyetcd"], ["-c", by_runpy], ["-m", "cProfile", "pyetcd.py"]):
        done = subprocess.run([sys.executable, *options], cwd=tmp_path, capture_output=True,
                              text=True, check=False)
        assert '"is_fresh": false' in done.stdout, (options, done.stderr)
    code = py_compile.compile(str(tmp_path / "pyetcd.py"), doraise=True)
    done = subprocess.run([sys.executable, code], capture_output=True, text=True, check=False)
    assert '"is_fresh": false' in done.stdout, done.stderr      # nothing was compiled
    with open(tmp_path / "pyetcd.py", "rb") as script:
        done = subprocess.run([sys.executable, "-"], stdin=script, capture_output=True, text=True,
                              check=False)
    assert json.loads(done.stdout)["argv"] == ["-"]


def test_image_runs_under_another_name(tmp_path):
    """`exec -a etcd python pyetcd.py`: Python then does not know where its program is."""
    words = ["no-such-program", "pyetcd.py", "x"]
    seen, _ = _image_run(words, tmp_path, executable=os.path.realpath(sys.executable),
                         env={**os.environ, "PYTHONHOME": sys.base_prefix})
    assert seen["is_fresh"]
    assert seen["words"][:3] == words


def test_image_does_not_run_what_lies_beside_the_file(tmp_path):
    """-I and -P promise that the script's directory is not searched."""
    (tmp_path / "bisect.py").write_text("raise SystemExit('the module beside the file ran')\n")
    shutil.copy(pyetcd.__file__, tmp_path)
    for option in ("-I", *(["-P"] if sys.version_info >= (3, 11) else [])):
        done = subprocess.run([sys.executable, option, "pyetcd.py", "-version"], cwd=tmp_path,
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout.startswith("etcd Version"), done.stderr


def test_image_is_small(tmp_path):
    """What the compiler used is given back: half of the memory of a process without it."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system has no memfd_create")

    def resident_kb(**variables):
        url, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        with subprocess.Popen(
            [sys.executable, pyetcd.__file__, "-listen-client-urls", url,
             "-advertise-client-urls", url, "-listen-peer-urls", peer,
             "-initial-advertise-peer-urls", peer, "-initial-cluster", f"default={peer}"],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, **variables},
        ) as process:
            try:
                eventually(lambda: _http_is_up(url))
                status = Path(f"/proc/{process.pid}/status").read_text()
                command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
                assert pyetcd.__file__.encode() in command.split(b"\0")
                return int(re.search(r"VmRSS:\s+(\d+)", status)[1])
            finally:
                process.kill()

    (tmp_path / "sitecustomize.py").write_text("import os; del os.memfd_create")
    assert resident_kb() < 0.75 * resident_kb(PYTHONPATH=str(tmp_path))


def _http_is_up(url):
    with contextlib.suppress(OSError):
        return requests.get(url + "/health", timeout=1).ok
