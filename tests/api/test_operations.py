"""Operations."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import itertools
import json
import os
import random
import re
import select
import shutil
import struct
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyetcd
from tests.kit.basics import ROOT, TESTDATA, eventually, free_port
from tests.kit.http import (
    _HTTP_JSON,
    _HTTP_TEXT,
    _http_ask,
    _http_get,
    _http_keys,
    _http_member,
    _HttpSocket,
)
from tests.kit.processes import _members_embedded

# Answers that show the members of the cluster, which are three here, or who of them leads.
_OPS_NOT_OF_A_FOLLOWER = {
    "mach-get", "leader-get", "mem-list", "mem-list-slash", "mem-leader", "mem-list-2",
    "self-get",                         # has rates, as a leader sends to it
}
# Scenarios without pauses; `stats` counts what a member does itself, also for other clients.
_OPS_KEYS_SCENARIOS = (
    "set-get,intermediate-dirs,create,update,cas-value,cas-index,cad,delete,dirs,listing,hidden,"
    "post,root,ttl-parse,refresh,bool-parse,error-priority,form,paths,methods,quorum,novalue,"
    "index-rules,watch-bad,watch-basic,json-escape"
)


def _ops_recorded():
    """The module testdata/compare_ops.py."""
    spec = importlib.util.spec_from_file_location("compare_ops", TESTDATA / "compare_ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ops_a_follower_answers_like_a_member_that_is_alone(tmp_path):
    """Recorded requests of the keys API and of all else, to one that has to ask the leader."""
    with pyetcd.LocalCluster(3, initial_cluster_token="ops") as cluster:
        leader = cluster.wait_leader()
        follower = next(member for member in cluster.members if member is not leader)
        eventually(lambda: follower.call(lambda etcd: etcd.cluster.version))
        replay = subprocess.run(
            [sys.executable, "compare.py", "--again", "3", "--only", _OPS_KEYS_SCENARIOS,
             follower.client_url, "keys-cases.jsonl", "keys-etcd-2.3.8.jsonl"],
            cwd=TESTDATA, capture_output=True, text=True, timeout=600)
        assert re.search(r"TOTAL pass [5-9]\d\d fail 0$", replay.stdout.strip()), replay.stdout
        recorded = _ops_recorded().Replay([
            (follower.client_url[len("http://"):], follower.peer_url[len("http://"):])])
        asked = [case for case in _ops_recorded().groups()[0][1]
                 if case["id"] not in _OPS_NOT_OF_A_FOLLOWER]
        assert recorded.run(asked) == {} and cluster.leader() is leader


# -- what a v3 client is told -----------------------------------------------------


def _ops_frame(kind, payload=b"", stream=0, flags=0):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _ops_frames(data):
    """Split what came after the preface into (kind, flags, stream, payload)."""
    frames = []
    while data:
        size = int.from_bytes(data[:3], "big")
        kind, flags, stream = struct.unpack(">BBI", data[3:9])
        frames.append((kind, flags, stream, data[9:9 + size]))
        data = data[9 + size:]
    return frames


_OPS_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.mark.parametrize("step", [1, 10_000], ids=["byte by byte", "at once"])
def test_ops_http2_request_is_answered_with_a_sentence(http_server, step):
    """SETTINGS, acknowledgements, the error of gRPC on the stream, GOAWAY, and the end."""
    raw = (_OPS_PREFACE + _ops_frame(4, b"\0\3\0\0\0\1") + _ops_frame(6, b"12345678")
           + _ops_frame(8, b"\0\0\1\0") + _ops_frame(1, b"\x82", 5, 4) + _ops_frame(0, b"x", 5, 1))
    with _HttpSocket(http_server) as client:
        with contextlib.suppress(OSError):          # it may be closed before all is sent
            for at in range(0, len(raw), step):
                client.send(raw[at:at + step])
        frames = _ops_frames(client.rest())
    assert [frame[:3] for frame in frames] == [
        (4, 0, 0), (4, 1, 0), (6, 1, 0), (1, 5, 5), (7, 0, 0)]
    assert frames[2][3] == b"12345678"
    block, goodbye = frames[3][3], frames[4][3]
    assert block.startswith(b"\x88\0\x0ccontent-type\x10application/grpc\0\x0bgrpc-status\x0212")
    assert block.endswith(pyetcd.V3_REFUSAL.encode()) and len(pyetcd.V3_REFUSAL) < 127
    assert goodbye == struct.pack(">II", 5, 0xD) + pyetcd.V3_REFUSAL.encode()


@pytest.mark.parametrize("raw", [
    _OPS_PREFACE[:-6] + b"nonsense",
    _OPS_PREFACE + b"\xff\xff\xff" + bytes(6) + b"x" * 1_000,
    _OPS_PREFACE + _ops_frame(7, bytes(8)),
], ids=["no preface", "oversized frame", "goodbye"])
def test_ops_http2_that_goes_wrong_is_ended(http_server, raw):
    """GOAWAY and the end of the connection, without waiting for more."""
    with _HttpSocket(http_server) as client:
        client.send(raw)
        frames = _ops_frames(client.rest())
    assert [frame[0] for frame in frames] == [4, 7]
    assert _http_ask(http_server, "GET", "/version")[0] == 200


@given(st.binary(max_size=100))
def test_ops_http2_of_any_bytes_is_bounded(data):
    """Whatever comes, nothing escapes, and no more than one frame is kept."""
    refusal = pyetcd.StreamParser(pyetcd.http2_refusal(b"no"))
    answers = list(itertools.takewhile(bool, refusal.feed(_OPS_PREFACE[-6:] + data)))
    frames = _ops_frames(b"".join(answers))
    assert frames[-1][0] == 7 or len(refusal._partial) <= len(data)


@pytest.mark.skipif(not shutil.which("etcdctl"), reason="etcdctl is not installed")
@pytest.mark.parametrize("command", ["get a", "put a b", "member list", "watch a"])
def test_ops_etcdctl_of_api_3_shows_the_sentence_at_once(http_server, command):
    """Not `context deadline exceeded` after five seconds."""
    done = subprocess.run(
        ["etcdctl", "--endpoints", http_server.client_urls[0], "--command-timeout", "30s",
         *command.split()],
        env={**os.environ, "ETCDCTL_API": "3"}, capture_output=True, text=True, timeout=60)
    assert done.returncode and pyetcd.V3_REFUSAL in done.stdout + done.stderr


@pytest.mark.parametrize("path", ["/v3/kv/range", "/v3alpha/kv/put", "/v3beta/watch"])
def test_ops_json_gateway_of_v3_is_answered_in_its_words(http_server, path):
    """501 is what the gateway makes of gRPC's 12; /v3 itself is as unknown as any other path."""
    status, headers, body = _http_ask(http_server, "POST", path, "{}", _HTTP_JSON)
    shown = {"error": pyetcd.V3_REFUSAL, "message": pyetcd.V3_REFUSAL, "code": 12}
    assert (status, json.loads(body)) == (501, shown)
    assert headers["Content-Type"] == "application/json"
    assert _http_ask(http_server, "POST", "/v3")[0] == 404


# -- metrics -----------------------------------------------------------------------


_OPS_SAMPLE = re.compile(
    r'([a-zA-Z_:][a-zA-Z0-9_:]*)(\{(?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)*\})? (-?[0-9.e+-]+)')


def _ops_samples(text):
    """Read an exposition strictly; return {sample with labels: value}."""
    samples, kinds = {}, {}
    name = kind = ""
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split(" ")[2]
            assert name not in kinds and len(line.split(" ", 3)[3]) > 5
        elif line.startswith("# TYPE "):
            assert line.split(" ")[2] == name
            kind = kinds[name] = line.split(" ")[3]
            assert kind in ("counter", "gauge", "histogram")
        else:
            match = _OPS_SAMPLE.fullmatch(line)
            assert match, line
            suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            assert match[1] in [name + suffix for suffix in suffixes], line
            assert line.rpartition(" ")[0] not in samples, line
            samples[line.rpartition(" ")[0]] = float(match[3])
    return samples


def _ops_metrics(server):
    return _ops_samples(_http_ask(server, "GET", "/metrics")[2].decode())


def _ops_moved(before, after, *names):
    """By how much each of these samples has grown."""
    return [after[name] - before.get(name, 0) for name in names]


def test_ops_metrics_move_when_things_happen(tmp_path):
    """Each number counts what its name says."""
    with _http_member(tmp_path, snapshot_count=20) as server:
        eventually(lambda: server.call(lambda etcd: etcd.reads.enabled and etcd.cluster.version))
        before = _ops_metrics(server)
        for number in range(30):
            _http_keys(server, "PUT", f"/d/{number}", "value=1")
        for path in ("/d/1", "/d?recursive=true", "/d?recursive=true&quorum=true", "/none",
                     "/none?recursive=true"):
            _http_keys(server, "GET", path)
        _http_ask(server, "GET", "/health")
        eventually(lambda: _ops_metrics(server)["etcd_snapshot_save_total_durations_seconds_count"])
        after = _ops_metrics(server)
    requests_seen = 30 + 5              # each looks whether auth is on, which is a failed get
    assert _ops_moved(
        before, after, 'etcd_store_writes_total{action="set"}',
        'etcd_store_reads_total{action="get"}', 'etcd_store_reads_total{action="getRecursive"}',
        'etcd_store_reads_failed_total{action="get"}',
        'etcd_store_reads_failed_total{action="getRecursive"}',
        'etcd_http_received_total{method="QGET"}', "etcd_server_health_success",
        "etcd_server_proposals_applied_total", "etcd_server_proposals_committed_total",
        "etcd_server_proposal_durations_seconds_count",
    ) == [30, 1, 2, requests_seen + 1, 1, 1, 1, 30, 30, 31]
    syncs = [after[f"{name}_count"] for name in (
        "etcd_wal_fsync_durations_seconds", "etcd_disk_wal_fsync_duration_seconds")]
    assert syncs[0] == syncs[1] >= before["etcd_wal_fsync_durations_seconds_count"] + 30
    assert after['etcd_wal_fsync_durations_seconds_bucket{le="+Inf"}'] == syncs[0]
    assert after['etcd_wal_fsync_durations_seconds_bucket{le="8.192"}'] <= syncs[0]
    assert after["etcd_snapshot_save_marshalling_durations_seconds_sum"] > 0
    received, sent = _ops_moved(before, after, *(
        f"etcd_network_client_grpc_{way}_bytes_total" for way in ("received", "sent")))
    assert 2_000 < received < 50_000 and 5_000 < sent < 500_000
    assert after["etcd_server_has_leader"] == after["etcd_server_is_leader"] == 1
    assert after["etcd_server_leader_changes_seen_total"] == 1
    assert after['etcd_server_version{server_version="2.3.8"}'] == 1
    assert after['etcd_cluster_version{cluster_version="2.3.0"}'] == 1


def test_ops_metrics_count_proposals_that_fail(tmp_path):
    """Both names, and probes that fail with them."""
    with _http_member(tmp_path) as server:
        body = '{"peerURLs":["http://127.0.0.1:1"]}'
        assert _http_ask(server, "POST", "/v2/members", body, _HTTP_JSON)[0] == 201
        server.call(lambda etcd: setattr(etcd.proposals, "timeout_s", 0.2))
        assert _http_keys(server, "PUT", "/a", "value=1")[0] == 500
        assert _http_ask(server, "GET", "/health")[0] == 503
        seen = _ops_metrics(server)
    assert seen["etcd_server_proposals_failed_total"] >= 1
    assert seen["etcd_server_proposal_failed_total"] == seen["etcd_server_proposals_failed_total"]
    assert seen["etcd_server_health_failures"] == 1


def test_ops_metrics_are_read_by_the_official_parser(http_server):
    """prometheus_client finds the same families and as many samples."""
    parser = pytest.importorskip("prometheus_client.parser")
    text = _http_ask(http_server, "GET", "/metrics")[2].decode()
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert sum(len(family.samples) for family in families.values()) == len(_ops_samples(text))
    assert families["etcd_wal_fsync_durations_seconds"].type == "histogram"


# What the dashboard and the alerts of etcd 3.5 (contrib/mixin) ask for, but for grpc_server_*,
# and for sizes and commits of the 3.x database, which is not here.
_OPS_MIXIN = {
    "etcd_server_has_leader", "etcd_server_leader_changes_seen_total",
    "etcd_server_proposals_failed_total", "etcd_disk_wal_fsync_duration_seconds_bucket",
    "etcd_network_client_grpc_received_bytes_total", "etcd_network_client_grpc_sent_bytes_total",
    "etcd_network_peer_received_bytes_total", "etcd_network_peer_sent_bytes_total",
    "etcd_network_peer_round_trip_time_seconds_bucket", "etcd_network_peer_sent_failures_total",
    "process_resident_memory_bytes",
}


def test_ops_member_change_that_meets_another_one_is_proposed_again(tmp_path):
    """The leader makes it a no-op; its client is answered all the same, and not by a timeout."""
    with _members_embedded(tmp_path, 3) as (leader, *followers):
        bodies = [f'{{"peerURLs":["http://127.0.0.1:{port}"]}}' for port in (1, 2)]
        with concurrent.futures.ThreadPoolExecutor(2) as clients:
            answers = list(clients.map(
                lambda server, body: _http_ask(server, "POST", "/v2/members", body, _HTTP_JSON),
                followers, bodies))
        assert [status for status, _, _ in answers] == [201, 201]
        eventually(lambda: leader.call(lambda etcd: len(etcd.cluster.members)) == 5)


def test_ops_metrics_of_peers_and_all_names_that_dashboards_read(tmp_path, monkeypatch):
    """Messages, bytes, probes and failures by peer; then contrib's dashboard and the mixin."""
    monkeypatch.setattr(pyetcd, "PROBE_SECONDS", 0.1)
    with _members_embedded(tmp_path, 3) as (leader, follower, victim):
        names = [server.call(lambda e: f"{e.member_id:x}") for server in (leader, follower, victim)]
        _http_keys(leader, "PUT", "/a?ttl=1", "value=1")
        _http_keys(leader, "GET", "/none")
        latency = ('etcd_rafthttp_message_sent_latency_seconds_count{sendingType="%s",'
                   'remoteID="%s",msgType="%s"}')
        trips = 'etcd_network_peer_round_trip_time_seconds_count{To="%s"}' % names[1]
        appended = latency % ("msgappv2", names[1], "MsgApp")
        answered = latency % ("message", names[0], "MsgAppResp")
        for server, name in ((leader, trips), (leader, appended), (follower, answered)):
            eventually(lambda: _ops_metrics(server).get(name), what=name)  # noqa: B023
        shown = [_ops_metrics(leader), _ops_metrics(follower)]
        beats = latency % ("message", names[1], "MsgHeartbeat")
        eventually(lambda: _ops_metrics(leader).get(beats))
        assert shown[1]['etcd_network_peer_received_bytes_total{From="%s"}' % names[0]] > 100
        assert shown[0]['etcd_network_peer_sent_bytes_total{To="%s"}' % names[1]] > 100
        assert (shown[0]["etcd_server_is_leader"], shown[1]["etcd_server_is_leader"]) == (1, 0)
        victim.kill()
        failures = 'etcd_network_peer_sent_failures_total{To="%s"}' % names[2]
        eventually(lambda: _ops_metrics(leader).get(failures))
        eventually(lambda: _ops_metrics(leader)["etcd_store_expires_total"])
        seen = {sample.partition("{")[0] for sample in _ops_metrics(leader)}
    for name, least in (("grafana-dashboard.json", 20), ("prometheus-rules.yml", 7)):
        read = _ops_names((ROOT / "contrib" / name).read_text(encoding="utf-8"))
        assert len(read) >= least and read <= seen, name
    assert seen >= _OPS_MIXIN


def _ops_names(text):
    """The metrics that a dashboard or rules read."""
    return set(re.findall(r"\b(?:etcd|pyetcd|process)_\w+", text)) - {"pyetcd_client"}


def test_ops_dashboard_has_the_panels_that_an_operator_asks_for():
    """Valid JSON; ids and places are of one panel each; leader, elections, turns, keys, bytes."""
    dashboard = json.loads((ROOT / "contrib/grafana-dashboard.json").read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    read = _ops_names(" ".join(target["expr"] for panel in panels for target in panel["targets"]))
    assert read >= {"etcd_server_has_leader", "etcd_server_leader_changes_seen_total",
                    "pyetcd_reactor_turn_seconds_bucket", "pyetcd_store_keys",
                    "pyetcd_store_bytes", "etcd_store_watchers"}


def test_ops_alert_rules_and_scrape_example_are_what_prometheus_reads():
    """The parts that it requires; each alert is for a time, has a severity, and says what to do."""
    yaml = pytest.importorskip("yaml")
    scrape = yaml.safe_load((ROOT / "contrib/prometheus.yml").read_text(encoding="utf-8"))
    (job,) = scrape["scrape_configs"]
    assert (ROOT / "contrib" / scrape["rule_files"][0]).exists()
    (group,) = yaml.safe_load(
        (ROOT / "contrib" / scrape["rule_files"][0]).read_text(encoding="utf-8"))["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names) >= 8
    for rule in group["rules"]:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert f'job="{job["job_name"]}"' in rule["expr"]
        assert {"up"} & set(re.findall(r"\w+", rule["expr"])) or _ops_names(rule["expr"])


def test_ops_store_metrics_follow_what_is_written(http_server):
    """Keys with their directories, and the characters of paths and values."""
    before = _ops_metrics(http_server)
    _http_keys(http_server, "PUT", "/a/b", "value=12345")
    after = _ops_metrics(http_server)
    assert after["pyetcd_store_keys"] - before["pyetcd_store_keys"] == 2
    grown = after["pyetcd_store_bytes"] - before["pyetcd_store_bytes"]
    assert grown == len("/1/a" "/1/a/b" "12345")
    _http_keys(http_server, "DELETE", "/a?recursive=true")
    eventually(lambda: _ops_metrics(http_server)["pyetcd_store_bytes"]
               == before["pyetcd_store_bytes"])


def test_ops_health_check_of_the_container_file_asks_the_member(http_server):
    """The command as it stands there: 0 for a member that serves, 1 where nobody listens."""
    text = (ROOT / "contrib/Containerfile").read_text(encoding="utf-8").replace("\\\n", "")
    words = json.loads(re.search(r"^HEALTHCHECK .*CMD (\[.*\])$", text, re.M)[1])
    assert words.pop(0) == "python"
    port = http_server.client_urls[0].rpartition(":")[2]
    for url, code in ((f"http://0.0.0.0:{port}", 0), (f"http://127.0.0.1:{free_port()}", 1),
                      (f"http://127.0.0.1:{port}/", 0)):
        environ = {**os.environ, "ETCD_LISTEN_CLIENT_URLS": f"{url},http://10.0.0.1:1",
                   "http_proxy": "http://127.0.0.1:1"}      # a proxy is not for this
        assert subprocess.run([sys.executable, *words], env=environ, timeout=60,
                              stderr=subprocess.DEVNULL).returncode == code
    for name in ("pyetcd.py", "pyetcd_client.py"):
        assert os.access(ROOT / name, os.X_OK) and f"/usr/local/lib/pyetcd/{name}" in text


def test_ops_metrics_count_late_heartbeats_and_slow_applies():
    """A tick more than a period late, times the followers; a turn of more than 100 ms."""
    counts = pyetcd.ServerCounts(0.1)
    for now, followers in ((5.0, 2), (5.1, 2), (5.4, 2), (5.5, 2), (5.9, 0)):
        counts.tick(now, followers)
    clock = iter([1.0, 1.05, 2.0, 2.2])
    for _ in range(2):
        counts.time_apply(lambda: None, lambda: next(clock))
    assert (counts.late_heartbeats, counts.slow_applies) == (2, 1)


# -- other documents ------------------------------------------------------------------


@pytest.mark.parametrize(("zone", "shown"), [
    ("UTC", "2026-01-01T00:00:00.5Z"), ("XXX-5:30", "2026-01-01T05:30:00.5+05:30"),
    ("YYY3", "2025-12-31T21:00:00.5-03:00"),
])
def test_ops_stats_show_local_time(monkeypatch, zone, shown):
    """As Go shows times: with the offset of the zone, Z where it is none."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        stats = pyetcd.ServerStats("x", 1, pyetcd.SYSTEM_CLOCK)
        stats.started_ns = 1_767_225_600 * pyetcd.NS + pyetcd.NS // 2
        started = json.loads(stats.json("StateFollower"))["startTime"]
    time.tzset()
    assert started == shown
    assert pyetcd.parse_time(shown) == stats.started_ns


def test_ops_debug_vars_show_memory(http_server):
    """What collectors of Go's expvar ask for first."""
    memory = json.loads(_http_ask(http_server, "GET", "/debug/vars")[2])["memstats"]
    assert memory["Alloc"] > 1e6 and memory["NumGC"] > 0
    assert memory["Sys"] > memory["Alloc"] or not os.path.exists("/proc/self/statm")


def test_ops_debug_vars_show_where_the_time_goes(tmp_path):
    """Seconds of each part of a turn, entries per write to the disk, and what waits."""
    with _http_member(tmp_path) as server:
        began = time.monotonic()
        before = json.loads(_http_ask(server, "GET", "/debug/vars")[2])
        for number in range(20):
            _http_keys(server, "PUT", f"/d/{number}", "value=1")
        shown = json.loads(_http_ask(server, "GET", "/debug/vars")[2])
        took_s = time.monotonic() - began
    phases = [{name: shown["reactor"]["seconds"][name] - before["reactor"]["seconds"][name]}
              for name in pyetcd.Reactor.PHASES]
    spent = {name: seconds for phase in phases for name, seconds in phase.items()}
    assert all(seconds >= 0 for seconds in spent.values()) and sum(spent.values()) <= took_s
    assert all(spent[name] > 0 for name in ("waiting", "sockets", "server", "flush"))
    assert 0 < shown["reactor"]["mean_turn_s"] <= shown["reactor"]["slowest_turn_s"]
    assert shown["journal"]["visits"] >= before["journal"]["visits"] + 20
    assert shown["journal"]["mean_batch_entries"] >= 0 < shown["journal"]["mean_sync_s"]
    assert set(shown["queues"].values()) == {0}


def test_ops_histogram_counts_many_values_as_one_by_one():
    rng = random.Random(3)
    values = [rng.choice((0.0, 0.001, 0.004, 1e9, rng.expovariate(100))) for _ in range(3_000)]
    single, many = (pyetcd.Histogram(pyetcd.exponential_bounds(0.001, 8)) for _ in range(2))
    for value in values:
        single.observe(value)
    many.observe_many(values[:1_000])
    many.observe_many(values[1_000:])
    many.observe_many([])
    *buckets, (_, _, total), count = many.samples()
    assert [*single.samples()][:-2] == buckets and count == ("_count", "", 3_000)
    assert total == pytest.approx(sum(values))


# -- work: what a request costs, counted and not timed ---------------------------------


@contextlib.contextmanager
def _ops_calls_counted(server):
    """Count the calls of Python functions on the reactor's thread; yields a list of that number."""
    calls = [0]

    def count(frame, event, argument):
        calls[0] += event == "call"

    server.call(lambda etcd: sys.setprofile(count))
    try:
        yield calls
    finally:
        server.call(lambda etcd: sys.setprofile(None))


def _ops_ask_at_once(server, clients, request):
    """Send a request on each connection so that the reactor finds them all in one turn."""
    gate = threading.Event()
    if len(clients) > 1:                # the gate takes a turn of its own
        server._reactor.call_soon_threadsafe(gate.wait, 20)
    for number, client in enumerate(clients):
        client.send(request.replace(b"NUMBER", b"%04d" % number))
    gate.set()
    for client in clients:
        assert client.answer()[0] in (200, 201)


def _ops_calls_of_round(server, clients, request):
    """The calls that five requests on each connection cost."""
    with _ops_calls_counted(server) as calls:
        for _ in range(5):
            _ops_ask_at_once(server, clients, request)
    return calls[0]


# Measured on 3.11: 20, 54, 62 and 223.
_OPS_CALLS = [("GET", 40, 23), ("PUT", 40, 57), ("GET", 1, 70), ("PUT", 1, 230)]


@pytest.mark.parametrize(("method", "connections", "calls_max"), _OPS_CALLS,
                         ids=[f"{method}-{count}" for method, count, _ in _OPS_CALLS])
def test_ops_work_per_request_does_not_grow(tmp_path, method, connections, calls_max):
    """A guard for speed that no busy machine disturbs; raise a number only with a reason."""
    request = _http_get("/v2/keys/k-NUMBER")
    if method == "PUT":
        request = (b"PUT /v2/keys/k-NUMBER HTTP/1.1\r\nHost: x\r\nContent-Length: 70\r\n"
                   b"Content-Type: application/x-www-form-urlencoded\r\n\r\nvalue=" + b"x" * 64)
    with _http_member(tmp_path, heartbeat_ms=1_000, election_ms=10_000) as server, \
            contextlib.ExitStack() as stack:
        clients = [stack.enter_context(_HttpSocket(server)) for _ in range(connections)]
        for number in range(connections):
            _http_keys(server, "PUT", f"/k-{number:04d}", "value=1")
        _ops_ask_at_once(server, clients, request)      # heads and tables are known from now on
        rounds = [_ops_calls_of_round(server, clients, request) for _ in range(5)]
    per_request = min(rounds) / connections / 5         # a busy machine only adds turns and ticks
    print(f"{method}, {connections} connections: {per_request:.1f} calls per request")
    if hasattr(select, "epoll"):            # poll takes a few more
        assert per_request <= calls_max


# -- probes, as of 3.5 ----------------------------------------------------------------


def test_ops_livez_and_readyz_of_a_healthy_member(http_server):
    """`ok`; each check with ?verbose; one of them by its own path."""
    checks = ["[+]serializable_read ok\n", "[+]linearizable_read ok\n"]
    for path, text in (
        ("/livez", ""), ("/livez?verbose", checks[0]), ("/readyz", ""),
        ("/readyz?verbose", "".join(checks)), ("/readyz?verbose&exclude=linearizable_read",
                                               checks[0]),
        ("/readyz/linearizable_read?verbose=1", checks[1]), ("/livez/serializable_read", ""),
    ):
        status, headers, body = _http_ask(http_server, "GET", path)
        assert (status, body.decode()) == (200, text + "ok\n"), path
        assert headers["Content-Type"] == _HTTP_TEXT
    assert _http_ask(http_server, "GET", "/livez/linearizable_read")[0] == 404
    status, headers, _ = _http_ask(http_server, "POST", "/readyz")
    assert (status, headers["Allow"]) == (405, "GET")


def test_ops_livez_needs_no_leader_and_readyz_does(tmp_path):
    """A member that waits for the others is alive; kill it for that, and they never meet."""
    with pyetcd.Server(name="a", data_dir=str(tmp_path / "a")) as alone:
        body = '{"peerURLs":["http://127.0.0.1:1"]}'
        assert alone.wait_ready()
        assert _http_ask(alone, "POST", "/v2/members", body, _HTTP_JSON)[0] == 201
        eventually(lambda: _http_ask(alone, "GET", "/readyz")[0] == 503)
        assert _http_ask(alone, "GET", "/readyz")[2] == (
            b"[+]serializable_read ok\n"
            b"[-]linearizable_read failed: no quorum of members is connected\n")
        assert _http_ask(alone, "GET", "/livez")[0] == 200
    waiting = pyetcd.Server(name="b", data_dir=str(tmp_path / "b"))
    try:
        waiting.bind()
        waiting.start(initial_cluster=f"b={waiting.peer_urls[0]},c=http://127.0.0.1:1")
        status, _, body = _http_ask(waiting, "GET", "/readyz?exclude=serializable_read")
        assert (status, body) == (
            503, b"[-]linearizable_read failed: etcdserver: no leader\n")
        assert _http_ask(waiting, "GET", "/livez")[2] == b"ok\n"
        assert _http_ask(waiting, "GET", "/readyz?exclude=linearizable_read")[0] == 200
    finally:
        waiting.stop()


# -- answers to GETs that are kept -----------------------------------------------------


def _ops_lines(headers):
    return {name: headers[name] for name in
            ("Content-Type", "Content-Length", "X-Etcd-Index", "X-Raft-Term", "X-Etcd-Cluster-Id")}


def test_ops_a_kept_answer_is_the_one_made_anew(http_server):
    """The way without a kept answer is that of a request whose connection closes."""
    for value in ("first", "second", "%C3%A9%22", "x" * 8_000):
        assert _http_keys(http_server, "PUT", "/kept", f"value={value}")[0] in (200, 201)
        plain = _http_ask(http_server, "GET", "/v2/keys/kept", headers={"Connection": "close"})
        for target in ("/v2/keys/kept", "/v2/keys/kept", "/v2/keys/kept?sorted=true"):
            answer = _http_ask(http_server, "GET", target)
            assert answer[0] == plain[0] == 200
            assert answer[2] == plain[2]
            assert _ops_lines(answer[1]) == _ops_lines(plain[1])
    status, headers, body = _http_ask(http_server, "HEAD", "/v2/keys/kept")
    assert (status, body) == (200, b"")
    assert headers["Content-Length"] == plain[1]["Content-Length"]
    assert _http_keys(http_server, "DELETE", "/kept")[0] == 200
    assert _http_ask(http_server, "GET", "/v2/keys/kept")[0] == 404


def test_ops_a_kept_answer_is_counted_as_any_other(http_server):
    def counts():
        stats = json.loads(_http_ask(http_server, "GET", "/v2/stats/store")[2])
        return stats["getsSuccess"], stats["getsFail"]

    _http_keys(http_server, "PUT", "/kept", "value=1")
    success, fail = counts()
    for _ in range(10):
        _http_ask(http_server, "GET", "/v2/keys/kept")
    assert counts() == (success + 10, fail + 10)
