"""The log: text and JSON, lines that are counted, levels, and what a member waits for."""

from __future__ import annotations

import io
import json
import logging
import re
import signal
import threading
from datetime import datetime
from typing import Any, Dict, Iterator, List

import pytest

import pyetcd
from tests.kit.basics import eventually
from tests.kit.http import _http_ask, _http_keys
from tests.kit.processes import ClusterMember
from tests.kit.registries import _DiscRegistry


class _Log:
    """A logger `pyetcd.<package>` whose lines are kept, with a clock that a test moves."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self.now = 100.0
        self._text = io.StringIO()
        target = logging.StreamHandler(self._text)
        target.setFormatter(formatter)
        self.handler = pyetcd.RepeatHandler(target, lambda: self.now)

    def log(self, package: str, text: str, *args: object, level: int = logging.INFO) -> None:
        record = logging.LogRecord(f"pyetcd.{package}", level, __file__, 1, text, args, None)
        pyetcd.package_logger(package).filter(record)
        self.handler.handle(record)

    def lines(self) -> List[str]:
        """What was written since the last call, without the time of each line."""
        text = self._text.getvalue()
        self._text.seek(0)
        self._text.truncate()
        return [line.split(" ", 2)[2] for line in text.splitlines()]


@pytest.fixture(name="text_log")
def _text_log_fixture() -> Iterator[_Log]:
    log = _Log(pyetcd.LogFormatter())
    yield log
    log.handler.close()


def _json(record: logging.LogRecord) -> Dict[str, Any]:
    pyetcd.package_logger(record.name.partition(".")[2]).filter(record)
    line = pyetcd.JsonFormatter().format(record)
    assert "\n" not in line and line.isascii()
    shown: Dict[str, Any] = json.loads(line)
    return shown


def _record(package: str, text: str, *args: object, **more: Any) -> logging.LogRecord:
    return logging.LogRecord(f"pyetcd.{package}", logging.WARNING, __file__, 1, text, args,
                             more.get("exc_info"))


# -- JSON -----------------------------------------------------------------------------


def test_log_json_has_time_level_package_and_message() -> None:
    record = _record("raft.node", "member is %s", "up")
    record.created = 1441026186.000123      # 2015-08-31 13:03:06 UTC
    shown = _json(record)
    assert {name: shown[name] for name in ("level", "package", "message")} == {
        "level": "warning", "package": "raft.node", "message": "member is up"}
    assert re.fullmatch(r"2015-\d\d-\d\dT\d\d:\d\d:06\.000123[+-]\d\d:\d\d", shown["time"])
    assert datetime.strptime(shown["time"].replace(":", ""),
                             "%Y-%m-%dT%H%M%S.%f%z").timestamp() == record.created


@pytest.mark.parametrize("package, text, args, fields", [
    ("etcdserver", "removed member %s from cluster %s", ("9e", "c1"),
     {"member": "9e", "cluster": "c1"}),
    ("rafthttp", "the connection with %s became active", ("9e",), {"peer": "9e"}),
    ("rafthttp", "rejected the stream from peer %x since it was removed", (0x9E,), {"peer": "9e"}),
    ("raft.node", "%s elected leader %s at term %d", ("1a", "9e", 7),
     {"member": "1a", "leader": "9e", "term": 7}),
    ("raft", "1a received vote from 9e at term 7", (), {"member": "1a", "peer": "9e", "term": 7}),
    ("raft", "1a [logterm: 1, index: 3] sent vote request to 9e at term 2", (),
     {"member": "1a", "peer": "9e", "term": 2}),
    ("etcdhttp", "[%s] %s remote:%s status:%d", ("GET", "/term 9", "127.0.0.1:9", 200),
     {"remote": "127.0.0.1:9", "status": 200}),
    ("auth", "%s", ("user x at term 9 of member 5",), {}),
    ("auth", "user x at term 9 of member 5", (), {}),
])
def test_log_json_fields_come_from_our_own_texts(
    package: str, text: str, args: tuple[object, ...], fields: Dict[str, object]
) -> None:
    """A name, a key or a header that reads `term 9` is no field."""
    shown = _json(_record(package, text, *args))
    for name in ("time", "level", "package", "message"):
        del shown[name]
    assert shown == fields


def test_log_json_traceback_is_in_the_line() -> None:
    evil = 'x"}\n{"time": "2026"'
    try:
        raise ValueError(evil)
    except ValueError as error:
        shown = _json(_record("http", "bug: %s", evil,
                              exc_info=(ValueError, error, error.__traceback__)))
    assert shown["message"] == 'bug: x"}\\n{"time": "2026"'
    assert "ValueError: " + evil in shown["exception"]


@pytest.mark.parametrize("value, formatter", [
    (None, "LogFormatter"), ("text", "LogFormatter"), ("console", "LogFormatter"),
    ("json", "JsonFormatter"),
])
def test_log_format_is_chosen_by_a_flag(
    value: str, formatter: str, flags_logging: logging.Logger
) -> None:
    words = ["-log-format", value] if value else []
    pyetcd.set_up_logging(pyetcd.Settings(words, {}))
    handler, recent = flags_logging.handlers
    assert isinstance(handler, pyetcd.RepeatHandler) and recent is pyetcd.RECENT_LINES
    assert type(handler._target.formatter).__name__ == formatter


def test_log_format_that_does_not_exist_is_refused() -> None:
    with pytest.raises(pyetcd.FlagError, match="log-format"):
        pyetcd.Settings(["-log-format", "xml"], {})


def test_log_of_a_process_is_json_line_by_line(tmp_path: Any) -> None:
    """From the first line to the last, that of the signal."""
    member = ClusterMember(tmp_path, "a")
    member.start("-initial-cluster", f"a={member.peer}", "-log-format", "json", "-debug")
    try:
        eventually(lambda: member.put("a", "1"), what="a write")
        assert member.request("GET", "/v2/keys/none")
    finally:
        member.process.kill(15)
    lines = [json.loads(line) for line in member.process.log().splitlines()]
    assert all({"time", "level", "package", "message"} <= line.keys() for line in lines)
    assert any(line["message"].startswith("received terminated signal") for line in lines)
    (read,) = [line for line in lines if line["message"].startswith("[GET] /v2/keys/none ")]
    assert (read["level"], read["package"], read["status"]) == ("debug", "etcdhttp", 404)
    assert read["duration_ms"] > 0


def test_log_says_where_a_member_was_when_the_system_ends_it(tmp_path: Any) -> None:
    """As with a mapped file that the disk does not give back."""
    member = ClusterMember(tmp_path, "a")
    member.start("-initial-cluster", f"a={member.peer}")
    # Behind its last entry no thread works, whose frames would change while they are printed.
    member.process.wait_log("set the initial cluster version")
    assert member.process.kill(signal.SIGBUS) == -signal.SIGBUS
    log = member.process.log()
    assert "Fatal Python error: Bus error" in log and "most recent call first" in log


# -- repeated lines --------------------------------------------------------------------


def test_log_line_that_repeats_is_counted(text_log: _Log) -> None:
    """Logged once, then once in ten seconds with the count, then no more."""
    for _ in range(180):
        text_log.log("rafthttp", "rejected the stream from peer %x", 0x9E)
        text_log.now += 0.055
    assert text_log.lines() == ["rafthttp: rejected the stream from peer 9e"]
    text_log.now += 1.0
    text_log.log("etcd", "something else")
    assert text_log.lines() == [
        "rafthttp: rejected the stream from peer 9e (repeated 179 times in 10 s)",
        "etcd: something else"]
    text_log.now += 10.0
    text_log.log("etcd", "a third")
    text_log.log("rafthttp", "rejected the stream from peer %x", 0x9E)
    assert text_log.lines() == ["etcd: a third", "rafthttp: rejected the stream from peer 9e"]


def test_log_reason_of_an_end_is_the_last_line(text_log: _Log) -> None:
    """Counts come before a critical line, so that the end of the log says why."""
    for _ in range(3):
        text_log.log("raft", "9e became candidate at term 2")
    text_log.log("etcd", "its data directory is lost", level=logging.CRITICAL)
    text_log.handler.close()
    assert text_log.lines() == [
        "raft: 9e became candidate at term 2",
        "raft: 9e became candidate at term 2 (repeated 2 times in 10 s)",
        "etcd: its data directory is lost"]


def test_log_lines_of_raft_repeat_with_another_term(text_log: _Log) -> None:
    """An election that nobody answers, again and again: the newest term is shown."""
    for term in range(2, 12):
        text_log.log("raft", f"9e became candidate at term {term}")
        text_log.log("raft", f"9e sent vote request to 1a at term {term}")
        text_log.log("raft.node", "9e lost leader 1a at term %d", term)
        text_log.now += 0.9
    lines = text_log.lines()
    assert lines[:2] == ["raft: 9e became candidate at term 2",
                         "raft: 9e sent vote request to 1a at term 2"]
    assert len(lines) == 12             # and every line of raft.node: who leads is no repetition
    text_log.handler.close()
    assert text_log.lines() == [
        "raft: 9e became candidate at term 11 (repeated 9 times in 10 s)",
        "raft: 9e sent vote request to 1a at term 11 (repeated 9 times in 10 s)"]


def test_log_counts_are_bounded_and_none_is_lost(text_log: _Log) -> None:
    """A thousand lines that take turns: the oldest is told when another needs its place."""
    for _ in range(2):
        for number in range(1_000):
            text_log.log("etcd", "line %d", number)
            text_log.log("etcd", "line %d", number)
    assert len(text_log.handler._logged) == pyetcd.LOG_REPEATS_MAX
    text_log.handler.close()
    lines = text_log.lines()
    assert len(lines) == 4_000 and lines.count("etcd: line 7 (repeated once in 10 s)") == 2


def test_log_lines_of_debug_and_tracebacks_are_never_counted(text_log: _Log) -> None:
    for _ in range(3):
        text_log.log("etcdhttp", "[GET] /", level=logging.DEBUG)
    assert text_log.lines() == ["etcdhttp: [GET] /"] * 3
    error = (ValueError, ValueError("x"), None)
    for _ in range(3):
        text_log.handler.handle(_record("http", "bug", exc_info=error))
    assert len(text_log.lines()) == 6


def test_log_json_shows_the_count_as_a_number() -> None:
    record = _record("etcd", "again")
    record.repeated = 12
    assert _json(record)["repeated"] == 12


# -- requests and levels ---------------------------------------------------------------


def test_log_line_of_a_request_has_status_and_duration(
    http_server: pyetcd.Server, caplog: pytest.LogCaptureFixture
) -> None:
    """One line each, when the reply begins: of reads, writes, waits and refusals."""
    caplog.set_level(logging.DEBUG, "pyetcd.etcdhttp")
    assert _http_keys(http_server, "PUT", "/a", "value=1")[0] == 201
    assert _http_keys(http_server, "GET", "/none")[0] == 404
    assert _http_ask(http_server, "GET", "/v2/keys/a?wait=true&waitIndex=1")[0] == 200
    assert _http_ask(http_server, "DELETE", "/version")[0] == 405
    assert _http_ask(http_server, "GET", "/nowhere")[0] == 404
    shown = [re.fullmatch(r"\[(\w+)\] (\S+) remote:127\.0\.0\.1:\d+ status:(\d+)"
                          r" duration:\d+\.\d{3} ms", record.getMessage())
             for record in caplog.records if record.name == "pyetcd.etcdhttp"]
    assert [found.groups() for found in shown if found] == [
        ("PUT", "/v2/keys/a", "201"), ("GET", "/v2/keys/none", "404"),
        ("GET", "/v2/keys/a?wait=true&waitIndex=1", "200"), ("DELETE", "/version", "405"),
        ("GET", "/nowhere", "404")]


@pytest.mark.parametrize("body, status", [
    ('{"Level":"DEBUG","Package":"raft.node"}', 204), ('{"level":"d","package":"raft.node"}', 204),
    ('{"Level":"DEBUG","Package":"nosuch"}', 400), ('{"Level":"DEBUG","Package":5}', 400),
    ('{"Level":"loud","Package":"raft.node"}', 400),
])
def test_log_level_of_one_package_can_be_changed(
    http_server: pyetcd.Server, body: str, status: int
) -> None:
    """Others keep theirs; a change of all levels takes it back, as in etcd."""
    logger, other = logging.getLogger("pyetcd.raft.node"), logging.getLogger("pyetcd.auth")
    before = other.getEffectiveLevel()
    assert _http_ask(http_server, "PUT", "/config/local/log", body)[0] == status
    assert (logger.level == logging.DEBUG) is (status == 204)
    assert other.getEffectiveLevel() == before
    assert _http_ask(http_server, "PUT", "/config/local/log", '{"Level":"ERROR"}')[0] == 204
    assert logger.getEffectiveLevel() == logging.ERROR


# -- what a member waits for -------------------------------------------------------------


def test_log_member_without_a_leader_says_whom_it_waits_for(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which member, where, why, how many are needed, and for how long; until there is a leader."""
    caplog.set_level(logging.INFO, "pyetcd")
    monkeypatch.setattr(pyetcd, "LEADER_WAIT_SECONDS", 0.05)
    with pyetcd.LocalCluster(3, str(tmp_path)) as cluster:
        one, two, three = cluster.members
        two.kill()
        three.kill()
        pattern = (rf"waiting for etcd2 at {two.peer_url}: connection refused, etcd3 at"
                   rf" {three.peer_url}: connection refused, 2 of 3 needed, \d+ s")

        def said() -> List[str]:
            return [record.getMessage() for record in list(caplog.records)
                    if re.fullmatch(pattern, record.getMessage())]

        eventually(lambda: len(said()) > 2, what="lines that name both members")
        two.start()
        cluster.wait_leader()
        assert one.call(lambda etcd: etcd._leadership.unled_s()) == 0


def test_log_member_in_discovery_says_what_it_waits_for(
    disc_registry: _DiscRegistry, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """How many members are missing, and who is there; before that, why the service is no help."""
    caplog.set_level(logging.INFO, "pyetcd")
    monkeypatch.setattr(pyetcd, "WAIT_REPORT_SECONDS", 0.02)
    disc_registry.answers.append((503, b""))
    unreachable = threading.Event()

    def said(text: str) -> bool:
        return any(text in record.getMessage() and re.search(r", \d+ s$", record.getMessage())
                   for record in list(caplog.records))

    def sleep(seconds: float) -> None:
        eventually(lambda: said("waiting for the discovery service: unexpected status code 503"))
        unreachable.set()

    def complete() -> None:
        if unreachable.is_set():
            eventually(lambda: said(f"waiting for 2 more member(s) at {disc_registry.url}: 1 of 3"
                                    " registered (a), "))
            disc_registry.on_wait = lambda: None
            disc_registry.put("2", "b=http://127.0.0.1:2")
            disc_registry.put("3", "c=http://127.0.0.1:3")

    disc_registry.on_wait = complete
    discovery = pyetcd.Discovery(disc_registry.url, 1, "a=http://127.0.0.1:1", sleep=sleep)
    assert discovery.join().count("=") == 3
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "wait-report"])
