"""HTTP contract."""

from __future__ import annotations

import collections
import contextlib
import gc
import json
import logging
import math
import os
import re
import selectors
import socket
import sys
import threading
import time
import types
import urllib.parse
import urllib.request

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

import pyetcd
from tests.kit.basics import eventually
from tests.kit.fuzzing import _FuzzSocket
from tests.kit.http import (
    _BAD_HOSTS,
    _HTTP_FORM,
    _HTTP_JSON,
    _HTTP_TEXT,
    _http_ask,
    _http_get,
    _http_keys,
    _http_member,
    _HttpSocket,
)
from tests.kit.reactors import FakeReactor
from tests.kit.users import _AUTH_ROOT, _auth_enable, _auth_key

# -- parsing: forms, types, parameters -----------------------------------------


def test_http_keys_that_expire_together_do_so_in_several_entries(http_server, monkeypatch):
    """The next entry follows at once, not half a second later."""
    monkeypatch.setattr(pyetcd, "EXPIRED_KEYS_MAX", 2)
    before = http_server.call(lambda etcd: etcd.raft_index)
    for number in range(24):
        form = b"value=1&ttl=1"
        assert _http_ask(http_server, "PUT", f"/v2/keys/{number}", form, _HTTP_FORM)[0] == 201
    eventually(lambda: not http_server.call(lambda etcd: etcd.store.has_ttl))
    assert http_server.call(lambda etcd: etcd.raft_index) >= before + 24 + 12
    assert http_server.call(lambda etcd: etcd.store.stats.expire_count) == 24


@pytest.mark.parametrize(("data", "fields"), [
    (b"", {}),
    (b"value=bar", {"value": "bar"}),
    (b"a=1&a=2", {"a": "1"}),
    (b"&&a=&b&=c&", {"a": "", "b": "", "": "c"}),
    (b"a+b=c+d&x=%2B%26%3d", {"a b": "c d", "x": "+&="}),
    (b"a=b=c", {"a": "b=c"}),
    (b"a=%ff\xfe", {"a": "\udcff\udcfe"}),
    ("a=\u00e9".encode(), {"a": "\u00e9"}),
])
def test_http_form_takes_the_first_value_of_each_name(data, fields):
    """Go's ParseQuery, first values only."""
    assert pyetcd.parse_form(data) == fields


@pytest.mark.parametrize(("data", "cause"), [
    (b"a=%zz", 'invalid URL escape "%zz"'),
    (b"a=%", 'invalid URL escape "%"'),
    (b"a=%4&b=1", 'invalid URL escape "%4"'),
    (b"%4x=%zz", 'invalid URL escape "%4x"'),
    (b'a=%"b', 'invalid URL escape "%\\"b"'),
    (b"a=%\xff\x01", 'invalid URL escape "%\\xff\\x01"'),
    (b"a=1;b=2", "invalid semicolon separator in query"),
    (b"a=%zz&b=;", "invalid semicolon separator in query"),
    (b"&" * 10_000, "more than 10000 fields"),
])
def test_http_form_errors_have_gos_words(data, cause):
    """Error 210, the cause as etcd writes it."""
    with pytest.raises(pyetcd.InvalidForm) as caught:
        pyetcd.parse_form(data)
    assert caught.value.cause == cause


@given(st.binary(max_size=200))
def test_http_form_of_any_bytes_is_read_or_refused(data):
    """Nothing but InvalidForm ever escapes, and what is read can be encoded again."""
    with contextlib.suppress(pyetcd.InvalidForm):
        for name, value in pyetcd.parse_form(data).items():
            pyetcd.utf8(name + value)


@given(st.dictionaries(st.text(), st.text(), max_size=5))
def test_http_form_reads_what_urlencode_writes(fields):
    """The standard library's encoder and our decoder agree."""
    safe = {k.encode("utf-8", "replace"): v.encode("utf-8", "replace") for k, v in fields.items()}
    expected = {k.decode(): v.decode() for k, v in safe.items()}
    assert pyetcd.parse_form(urllib.parse.urlencode(safe).encode()) == expected


@pytest.mark.parametrize(("content_type", "expected"), [
    ("", False),
    ("application/x-www-form-urlencoded", True),
    ("Application/X-WWW-Form-Urlencoded", True),
    ("application/x-www-form-urlencoded; charset=utf-8", True),
    (' application/x-www-form-urlencoded ; charset="u;8" ;', True),
    ("application/json", False),
    ("multipart/form-data; boundary=x", False),
    ("text", False),
    ("/", "mime: no media type"),
    (";", "mime: no media type"),
    ("text plain", "mime: expected slash after first token"),
    ("text/", "mime: expected token after slash"),
    ("text/plain x", "mime: unexpected content after media subtype"),
    ("application/x-www-form-urlencoded; =", "mime: invalid media parameter"),
    ("text/plain; a", "mime: invalid media parameter"),
    ("text/plain; a=1; a=2", "mime: duplicate parameter name"),
])
def test_http_media_type_decides_whether_the_body_counts(content_type, expected):
    """Go's mime.ParseMediaType: a form, something else, or error 210 with this cause."""
    if isinstance(expected, bool):
        assert pyetcd.is_form_type(content_type) is expected
    else:
        with pytest.raises(pyetcd.InvalidForm) as caught:
            pyetcd.is_form_type(content_type)
        assert caught.value.cause == expected


@given(st.text(alphabet=st.characters(max_codepoint=255), max_size=60))
def test_http_media_type_of_any_text_is_judged(content_type):
    """True, False or InvalidForm."""
    with contextlib.suppress(pyetcd.InvalidForm):
        assert pyetcd.is_form_type(content_type) in (True, False)


_HTTP_BAD_FIELDS = [        # in etcd's order: each hides all that follow
    ("prevIndex", "x", 203, 'invalid value for "prevIndex"'),
    ("waitIndex", "-1", 203, 'invalid value for "waitIndex"'),
    ("recursive", "", 209, 'invalid value for "recursive"'),
    ("sorted", "yes", 209, 'invalid value for "sorted"'),
    ("wait", "tRUE", 209, 'invalid value for "wait"'),
    ("dir", "2", 209, 'invalid value for "dir"'),
    ("quorum", "no", 209, 'invalid value for "quorum"'),
    ("stream", " 1", 209, 'invalid value for "stream"'),
    ("prevValue", "", 201, '"prevValue" cannot be empty'),
    ("ttl", "1.5", 202, 'invalid value for "ttl"'),
    ("prevExist", "", 209, "invalid value for prevExist"),
    ("refresh", "maybe", 209, "invalid value for refresh"),
]


@pytest.mark.parametrize("first", range(len(_HTTP_BAD_FIELDS)))
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_http_parameters_are_judged_in_etcds_order(first, method):
    """Of several bad parameters the first in the fixed order is reported, for every method."""
    fields = {name: text for name, text, _, _ in reversed(_HTTP_BAD_FIELDS[first:])}
    with pytest.raises(pyetcd.EtcdError) as caught:
        pyetcd.parse_key_request(method, "/1/a", fields, 0)
    assert (caught.value.code, caught.value.cause) == _HTTP_BAD_FIELDS[first][2:]
    assert caught.value.index == 0


@pytest.mark.parametrize(("method", "fields", "code"), [
    ("PUT", {"wait": "true"}, 209),
    ("HEAD", {"wait": "1"}, 209),
    ("PUT", {"refresh": "true", "value": "x", "ttl": "1"}, 211),
    ("PUT", {"refresh": "true"}, 212),
    ("DELETE", {"refresh": "true", "ttl": ""}, 212),
    ("GET", {"prevIndex": "18446744073709551616"}, 203),
    ("GET", {"prevIndex": "9" * 5000}, 203),
    ("GET", {"prevIndex": "\u0663"}, 203),
])
def test_http_parameters_that_do_not_fit_are_refused(method, fields, code):
    """wait is for GET; refresh takes a ttl and no value; 64 bits; ASCII digits."""
    with pytest.raises(pyetcd.EtcdError) as caught:
        pyetcd.parse_key_request(method, "/1/a", fields, 0)
    assert caught.value.code == code


def test_http_parameters_become_the_command():
    """Every field lands where the applier looks for it."""
    fields = {
        "value": "v", "dir": "t", "prevValue": "p", "prevIndex": "007", "prevExist": "F",
        "ttl": "5", "recursive": "1", "sorted": "T", "quorum": "true", "stream": "TRUE",
        "waitIndex": "18446744073709551615", "refresh": "0", "wait": "false", "unknown": "x",
    }
    assert pyetcd.parse_key_request("PUT", "/1/a", fields, 10) == pyetcd.Request(
        method="PUT", path="/1/a", val="v", dir=True, prev_value="p", prev_index=7,
        prev_exist=False, expiration=5 * pyetcd.NS + 10, since=pyetcd.UINT64_MAX, recursive=True,
        sorted=True, quorum=True, stream=True, refresh=False,
    )
    assert pyetcd.parse_key_request("GET", "/1/a", {}, 10) == pyetcd.Request(
        method="GET", path="/1/a"
    )


@given(st.sampled_from(["GET", "HEAD", "PUT", "POST", "DELETE"]), st.dictionaries(
    st.sampled_from([name for name, *_ in _HTTP_BAD_FIELDS] + ["value"]),
    st.one_of(st.text(), st.sampled_from(["true", "false", "0", "1", "3600", "9" * 20])),
))
def test_http_parameters_of_any_text_become_a_command_or_an_error(method, fields):
    """No other exception escapes, and every command can be written to the log."""
    with contextlib.suppress(pyetcd.EtcdError):
        command = pyetcd.parse_key_request(method, "/1/a", fields, time.time_ns())
        fields_max = command._replace(
            val=command.val.encode("utf-8", "replace").decode(),
            prev_value=command.prev_value.encode("utf-8", "replace").decode(),
        )
        assert pyetcd.decode_request(pyetcd.encode_request(fields_max)) == fields_max


@pytest.mark.parametrize(("ttl", "seconds"), [
    ("0", 0), ("18446744073709551615", -1), ("9223372036854775807", -1),
    ("9223372036854775808", 0), ("18446744073", -0.709551616), ("18446744074", 0.290448384),
])
def test_http_ttl_overflows_like_gos_durations(ttl, seconds):
    """ttl * 1e9 wraps as a signed 64-bit number."""
    now_ns = 1_700_000_000 * pyetcd.NS
    command = pyetcd.parse_key_request("PUT", "/1/a", {"ttl": ttl}, now_ns)
    assert math.isclose((command.expiration - now_ns) / pyetcd.NS, seconds, abs_tol=1e-9)


def test_http_ttl_sum_overflows_too():
    """now + ttl beyond the year 2262 wraps into the past."""
    now_ns = 1_700_000_000 * pyetcd.NS
    command = pyetcd.parse_key_request("PUT", "/1/a", {"ttl": "9223372036"}, now_ns)
    assert command.expiration == now_ns + 9223372036 * pyetcd.NS - (1 << 64) < 0


@pytest.mark.parametrize(("path", "canonical"), [
    ("/", "/"), ("/v2/keys/a/", "/v2/keys/a/"), ("//x/", "/x/"), ("/a/./b", "/a/b"),
    ("/v2/keys/../../x", "/x"), ("/a/..", "/"), ("/a/.", "/a"), ("/.x/...", "/.x/..."),
])
def test_http_paths_are_cleaned_as_by_gos_mux(path, canonical):
    """Trailing slashes stay; nothing leaves the root."""
    assert pyetcd.canonical_path(path) == canonical


@given(st.text(alphabet="/.ab", max_size=12))
def test_http_canonical_path_is_canonical(path):
    """Cleaning twice changes nothing more, and no dot element survives."""
    clean = pyetcd.canonical_path("/" + path)
    assert pyetcd.canonical_path(clean) == clean
    assert clean.startswith("/") and not {".", ".."} & set(clean.split("/"))


@pytest.mark.parametrize(("text", "quoted"), [
    ("%zz", '"%zz"'), ('"\\', '"\\"\\\\"'), ("\n\x00\x7f", '"\\n\\x00\\x7f"'),
    ("\udcff", '"\\xff"'), ("\u00e9\u2028\u00a0", '"\u00e9\\u2028\\u00a0"'),
])
def test_http_quoting_is_gos(text, quoted):
    """strconv.Quote."""
    assert pyetcd.go_quote(text) == quoted


@pytest.mark.parametrize(("body", "text"), [
    (b"", "unexpected end of JSON input"),
    (b" {", "unexpected end of JSON input"),
    (b'{"a"', "unexpected end of JSON input"),
    (b'{"a', "unexpected end of JSON input"),
    (b'{"a":tr', "unexpected end of JSON input"),
    (b"nope", "invalid character 'o' in literal null (expecting 'u')"),
    (b"peerURLs=x", "invalid character 'p' looking for beginning of value"),
    (b"{x}", "invalid character 'x' looking for beginning of object key string"),
    (b'{"a" 1}', "invalid character '1' after object key"),
    (b"{} x", "invalid character 'x' after top-level value"),
    (b'["\x01"]', r"invalid character '\x01' in string literal"),
    (b'["\\q"]', "invalid character 'q' in string escape code"),
    (b"NaN", "invalid character 'N' looking for beginning of value"),
    (b"'", r"invalid character '\'' looking for beginning of value"),
])
def test_http_json_errors_have_gos_words(body, text):
    """The texts that clients of the members API see."""
    with pytest.raises(ValueError) as caught:
        pyetcd.GoJson.loads(body)
    assert str(caught.value) == text


@given(st.one_of(st.binary(max_size=40), st.text(alphabet='{}[]",:\\ntf1eE+-. u0', max_size=20)))
def test_http_json_of_any_bytes_is_read_or_refused(data):
    """Only ValueError escapes, and it always says something."""
    raw = data if isinstance(data, bytes) else data.encode()
    for read in (pyetcd.GoJson.loads, pyetcd.parse_peer_urls):
        try:
            read(raw)
        except ValueError as error:
            assert str(error)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"peerURLs":' + b"9" * 100_000 + b"}"])
def test_http_json_bombs_are_refused(body):
    """Deep nesting and endless numbers cost an error, neither the stack nor a second of work."""
    started = time.thread_time()
    with pytest.raises(ValueError):
        pyetcd.parse_peer_urls(body)
    assert time.thread_time() - started < 1         # of this thread's work, not of the clock


@pytest.mark.parametrize(("body", "text"), [
    ("[]", 'json: cannot unmarshal array into Go value of type '
           'struct { PeerURLs []string "json:\\"peerURLs\\"" }'),
    ("{}", "no valid URLs given"),
    ("null", "no valid URLs given"),
    ('{"peerURLs":[]}', "no valid URLs given"),
    ('{"PEERurls":"foo"}',
     "json: cannot unmarshal string into Go struct field .peerURLs of type []string"),
    ('{"peerURLs":[1]}',
     "json: cannot unmarshal number into Go struct field .peerURLs of type string"),
    ('{"peerURLs":[true]}',
     "json: cannot unmarshal bool into Go struct field .peerURLs of type string"),
    ('{"peerURLs":["."]}', "URL scheme must be http or https: ."),
    ('{"peerURLs":[null]}', "URL scheme must be http or https: "),
    ('{"peerURLs":["http://127.0.0.1"]}',
     'URL address does not have the form "host:port": http://127.0.0.1'),
    ('{"peerURLs":["http://h:1/"]}', "URL must not contain a path: http://h:1/"),
    ('{"peerURLs":["http://%zz:1"]}', 'parse "http://%zz:1": invalid URL escape "%zz"'),
])
def test_http_peer_urls_are_checked_with_etcds_words(body, text):
    """The 400 answers of POST and PUT /v2/members."""
    with pytest.raises(ValueError) as caught:
        pyetcd.parse_peer_urls(body.encode())
    assert str(caught.value) == text


@pytest.mark.parametrize("url", _BAD_HOSTS)
def test_http_hosts_that_no_machine_can_have_are_refused(url):
    with pytest.raises(ValueError, match="^parse ") as caught:
        pyetcd.parse_peer_urls(json.dumps({"peerURLs": [url]}).encode())
    assert _BAD_HOSTS[url] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("url", [
    "http://h_1.example:1", "http://bücher.example:1", "http://[::1]:1", "http://[fe80::1]:1",
    "http://1.2.3.4:65535", "http://h.example.:1", "http://0123456789ab:1", "http://u:p@h:1",
    "https://xn--bcher-kva.example:1", "http://12:1",
])
def test_http_hosts_that_a_machine_can_have_are_taken(url):
    assert pyetcd.check_url(url) == url


def test_http_scheme_of_a_url_counts_in_lower_case():
    """Member ids are hashes of URLs: `HTTP://` made another member."""
    assert pyetcd.parse_peer_urls(b'{"peerURLs":["HTTP://A:1"]}') == ("http://A:1",)
    assert pyetcd.parse_urls("HttpS://b:2, http://a:1") == ("http://a:1", "https://b:2")
    assert pyetcd.parse_initial_cluster("m=HTTP://a:1") == {"m": ("http://a:1",)}
    server = pyetcd.Server(advertise_client_urls=["HTTP://a:1"])
    assert server.config.advertise_client_urls == ("http://a:1",)
    server.stop()


@pytest.mark.parametrize("url", ["http://${IP}:2380", "http://:2380", "http://127.0.0.1:0"])
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_http_member_that_nobody_could_reach_is_refused(http_server, method, url):
    """It cost a member that is alone its quorum for good."""
    own = http_server.call(lambda etcd: pyetcd.format_id(etcd.member_id))
    path = "/v2/members" + (f"/{own}" if method == "PUT" else "")
    body = json.dumps({"peerURLs": [url]})
    status, _, answer = _http_ask(http_server, method, path, body, _HTTP_JSON)
    assert status == 400 and b"URL" in answer or b"host name" in answer
    assert len(json.loads(_http_ask(http_server, "GET", "/v2/members")[2])["members"]) == 1
    assert _http_ask(http_server, "PUT", "/v2/keys/a", "value=1", _HTTP_FORM)[0] == 201


def test_http_member_at_localhost_of_a_cluster_of_several_machines_is_warned(caplog):
    """The members API takes it, as etcd does."""
    cluster = pyetcd.Cluster()
    api = pyetcd.MembersApi(types.SimpleNamespace(cluster=cluster))
    for known, url, warned in (
        ("http://10.0.0.8:1", "http://localhost:2380", True),
        ("http://127.0.0.1:1", "http://localhost:2380", False),
        ("http://10.0.0.8:1", "http://10.0.0.9:2380", False),
    ):
        cluster.members = {1: pyetcd.Member(1, (known,))}
        caplog.clear()
        api._warn_of_local((url,))
        assert ("each member takes for its own machine" in caplog.text) is warned


@pytest.mark.parametrize("path", ["/", "/index.html", "/v2", "/v1/keys/a", "/favicon.ico"])
def test_http_unknown_paths_are_not_found_for_curl(http_server, path):
    for accept in ("*/*", ""):
        status, _, body = _http_ask(http_server, "GET", path, headers={"Accept": accept})
        assert (status, body) == (404, b"404 page not found\n")


def test_http_peer_urls_are_sorted():
    """Their order decides the member's id."""
    body = b'{"x":1,"peerurls":[" http://b:2","http://a:1"]}'
    assert pyetcd.parse_peer_urls(body) == ("http://a:1", "http://b:2")


# -- statistics ---------------------------------------------------------------------


def test_http_metrics_text_is_what_prometheus_reads():
    """Cumulative buckets, escaped labels, nothing for what never happened."""
    metrics = pyetcd.Metrics()
    metrics.counter("b_total", "Help.", ("x",)).inc('q"\\\n')
    metrics.counter("unused_total", "Help.", ("x",))
    latency = pyetcd.Histogram(pyetcd.exponential_bounds(0.5, 2))
    metrics.add("a_seconds", "Help.", latency)
    for value in (0.5, 0.75, 9.0):
        latency.observe(value)
    metrics.gauge("c", "Help.", lambda: 7)
    assert metrics.text() == (
        "# HELP a_seconds Help.\n# TYPE a_seconds histogram\n"
        'a_seconds_bucket{le="0.5"} 1\na_seconds_bucket{le="1.0"} 2\n'
        'a_seconds_bucket{le="+Inf"} 3\na_seconds_sum 10.25\na_seconds_count 3\n'
        "# HELP b_total Help.\n# TYPE b_total counter\n" r'b_total{x="q\"\\\n"} 1' "\n"
        "# HELP c Help.\n# TYPE c gauge\nc 7\n"
    )


def test_http_leader_stats_show_latency_in_milliseconds():
    """Mean and deviation over all successes; etcd's minimum before the first."""
    stats = pyetcd.LeaderStats(0xABC)
    stats.success(2, 0.001)
    stats.success(2, 0.003)
    stats.fail(2)
    shown = json.loads(stats.json([2, 3]), parse_float=float)
    assert shown["leader"] == "abc"
    assert shown["followers"]["2"] == {
        "latency": {"current": 3, "average": 2, "standardDeviation": 1, "minimum": 1, "maximum": 3},
        "counts": {"fail": 1, "success": 2},
    }
    assert '"minimum":9223372036854775808,' in stats.json([3])
    stats.remove(2)
    assert json.loads(stats.json([2]))["followers"]["2"]["counts"]["success"] == 0


def test_http_server_stats_leave_out_rates_that_are_zero():
    """A rate needs two messages, the last within a second."""
    clock = types.SimpleNamespace(now=100.0)
    stats = pyetcd.ServerStats("n\u00e4me", 1, pyetcd.Clock(lambda: clock.now, time.time_ns))
    stats.recv_append(7, 100)
    assert "Rate" not in stats.json("StateFollower")
    clock.now += 0.5
    stats.recv_append(7, 300)
    shown = json.loads(stats.json("StateFollower"))
    assert (shown["recvPkgRate"], shown["recvBandwidthRate"]) == (4, 800)
    assert shown["leaderInfo"]["leader"] == "7" and shown["recvAppendRequestCnt"] == 2
    clock.now += 1.5
    assert "Rate" not in stats.json("StateFollower")


# -- keys ------------------------------------------------------------------------


def test_http_put_and_get_have_etcds_headers_and_bodies(http_server):
    """201 then 200; one line of JSON; the four headers of etcd."""
    status, headers, body = _http_ask(http_server, "PUT", "/v2/keys/a", "value=one", _HTTP_FORM)
    assert status == 201
    assert headers["Content-Type"] == "application/json"
    assert re.fullmatch("[0-9a-f]+", headers["X-Etcd-Cluster-Id"])
    index = int(headers["X-Etcd-Index"])
    assert (index, headers["X-Raft-Term"]) == (4, "2") and int(headers["X-Raft-Index"]) >= index
    node = f'{{"key":"/a","value":"one","modifiedIndex":{index},"createdIndex":{index}}}'
    assert body.decode() == f'{{"action":"set","node":{node}}}\n'
    assert _http_ask(http_server, "GET", "/v2/keys/a")[2].decode() == (
        f'{{"action":"get","node":{node}}}\n')
    status, headers, body = _http_ask(http_server, "PUT", "/v2/keys/a", "value=two", _HTTP_FORM)
    assert status == 200 and headers["X-Etcd-Index"] == str(index + 1)
    assert json.loads(body)["prevNode"] == json.loads(node)


@pytest.mark.parametrize(("method", "path", "form", "status", "code", "cause"), [
    ("GET", "/none/x", None, 404, 100, "/none"),
    ("HEAD", "/none", None, 404, None, ""),
    ("PUT", "/f", "value=2&prevValue=x", 412, 101, "[x != 1]"),
    ("PUT", "/d", "value=2", 403, 102, "/d"),
    ("PUT", "/f/x", "value=2", 400, 104, "/f"),
    ("PUT", "/f", "prevExist=false", 412, 105, "/f"),
    ("PUT", "/", "value=2", 400, 107, "/"),
    ("DELETE", "/d?dir=true", None, 403, 108, "/d"),
    ("PUT", "/f", "prevValue=", 400, 201, '"prevValue" cannot be empty'),
    ("PUT", "/f", "ttl=x", 400, 202, 'invalid value for "ttl"'),
    ("GET", "/f?waitIndex=x", None, 400, 203, 'invalid value for "waitIndex"'),
    ("GET", "/f?recursive", None, 400, 209, 'invalid value for "recursive"'),
    ("PUT", "/f?wait=true", "", 400, 209, '"wait" can only be used with GET requests'),
    ("GET", "/f?a=%zz", None, 400, 210, 'invalid URL escape "%zz"'),
    ("PUT", "/f?a=1;b", "value=%zz", 400, 210, 'invalid URL escape "%zz"'),
    ("PUT", "/f", "value=1&refresh=true&ttl=1", 400, 211, "A value was provided on a refresh"),
    ("PUT", "/f", "refresh=true", 400, 212, "No TTL value set"),
    pytest.param("PUT", "/x" * 1024, "value=deep", 201, None, "", id="deep"),
    pytest.param("POST", "/x" * 1025, "value=deep", 400, 210,
                 "the key has more than 1024 path elements", id="too-deep"),
])
def test_http_errors_have_code_cause_and_status(
    http_server, method, path, form, status, code, cause
):
    """The error table, through the whole server.  Errors of the request itself have index 0."""
    _http_keys(http_server, "PUT", "/f", "value=1")
    _http_keys(http_server, "PUT", "/d/c", "value=1")
    index = http_server.call(lambda etcd: etcd.store.current_index)
    got, headers, body = _http_ask(
        http_server, method, "/v2/keys" + path, form, _HTTP_FORM if form is not None else {})
    assert got == status and headers["Content-Type"] == "application/json"
    if code is not None:
        expected = index if code < 200 else 0
        assert headers["X-Etcd-Index"] == str(expected) and "X-Raft-Index" not in headers
        assert list(json.loads(body).items()) == [
            ("errorCode", code), ("message", json.loads(body)["message"]), ("cause", cause),
            ("index", expected),
        ]
        assert body.endswith(b"}\n")


def test_http_head_has_the_headers_of_get_and_no_body(http_server):
    """Content-Length included; the connection stays usable."""
    _http_keys(http_server, "PUT", "/a", "value=one")
    with _HttpSocket(http_server) as client:
        client.send(b"HEAD /v2/keys/a HTTP/1.1\r\nHost: x\r\n\r\n" + _http_get("/v2/keys/a"))
        head = client.until(b"\r\n\r\n").decode()
        status, get_head, body = client.answer()
    assert status == 200 and f"Content-Length: {len(body)}" in head
    assert sorted(head.split("\r\n")[1:]) == sorted(get_head.split("\r\n")[1:])


@pytest.mark.parametrize("raw", [
    b"value=a=b", b"value=", b"value=\xff\xfe", "value=\u00e9\u2028<>".encode(),
    b"value=" + b"x" * 70_000,
], ids=["equals", "empty", "not-utf8", "utf8", "long"])
def test_http_plain_bodies_give_what_the_full_parser_gives(http_server, raw):
    """The short way for `value=<nothing encoded>` and the long one store the same."""
    short = _http_ask(http_server, "PUT", "/v2/keys/k", raw, _HTTP_FORM)
    long = _http_ask(http_server, "PUT", "/v2/keys/l", b"x=1&" + raw, _HTTP_FORM)
    assert short[0] == long[0] == 201
    assert json.loads(short[2])["node"]["value"] == json.loads(long[2])["node"]["value"]


@pytest.mark.parametrize(("query", "body", "content_type", "value"), [
    ("?value=q", "", "application/x-www-form-urlencoded", "q"),
    ("?value=q", "value=b", "application/x-www-form-urlencoded", "b"),
    ("?value=q", "value=", "application/x-www-form-urlencoded", ""),
    ("", "value=b", "application/json", ""),
    ("", "value=b", "", ""),
    ("?value=q", "value=b", "multipart/form-data", "q"),
    ("", "value=a+b%2B", "APPLICATION/X-www-form-urlencoded; charset=x", "a b+"),
])
def test_http_body_beats_query_where_it_is_a_form(http_server, query, body, content_type, value):
    """Bodies of other types are ignored silently."""
    _, headers, answer = _http_ask(
        http_server, "PUT", "/v2/keys/k" + query, body, {"Content-Type": content_type})
    assert json.loads(answer)["node"]["value"] == value


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_http_bodies_of_reads_are_ignored(http_server, method):
    """Even malformed ones."""
    _http_keys(http_server, "PUT", "/k", "value=1")
    assert _http_ask(http_server, method, "/v2/keys/k", "value=%zz;", _HTTP_FORM)[0] == 200


def test_http_post_makes_keys_in_order(http_server):
    """Twenty digits, from the store index."""
    first, second = (_http_keys(http_server, "POST", "/q", f"value={i}")[1] for i in (1, 2))
    keys = [event["node"]["key"] for event in (first, second)]
    assert keys == [f"/q/{event['node']['createdIndex']:020d}" for event in (first, second)]
    assert keys == sorted(keys)


@pytest.mark.parametrize(("path", "key"), [
    ("/a%2Fb/", "/a/b"), ("/a%20b", "/a b"), ("/%2b+", "/++"),
    ("/%C3%A9", "/\u00e9"), ("/...", "/..."), ("/%00%0a", "/\x00\n"), ("/%25", "/%"),
])
def test_http_keys_may_hold_any_byte(http_server, path, key):
    """The path is decoded once; reading finds what writing stored."""
    assert _http_keys(http_server, "PUT", path, "value=1")[1]["node"]["key"] == key
    assert _http_keys(http_server, "GET", path)[1]["node"] == {
        "key": key, "value": "1", "modifiedIndex": 4, "createdIndex": 4}


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "POST", "DELETE"])
@pytest.mark.parametrize("target", ["/%ff", "/d/%c3", "/%ed%a0%80/a", "/a%ff?quorum=true"])
def test_http_keys_that_are_not_utf8_are_refused(http_server, method, target):
    """A snapshot, which is JSON, cannot hold them: members would differ after a restart."""
    before = http_server.call(lambda etcd: etcd.store.current_index)
    status, _, body = _http_ask(
        http_server, method, "/v2/keys" + target, "value=1", _HTTP_FORM)
    assert status == 400
    if method != "HEAD":
        assert (json.loads(body)["errorCode"], json.loads(body)["cause"]) == (
            210, "the key is not UTF-8")
    assert http_server.call(lambda etcd: etcd.store.current_index) == before


def test_http_a_value_that_is_not_utf8_is_what_a_snapshot_makes_of_it(http_server):
    """Both ways to set it; a prevValue that no value can be is refused."""
    for body in ("value=%ff%fe", b"value=\xff\xfe"):
        node = json.loads(_http_ask(http_server, "PUT", "/v2/keys/a", body, _HTTP_FORM)[2])["node"]
        assert node["value"] == "\ufffd\ufffd"
        stored = http_server.call(lambda etcd: etcd.store.value("/1/a"))
        assert stored == "\ufffd\ufffd"
    for method in ("PUT", "DELETE"):
        status, _, body = _http_ask(
            http_server, method, "/v2/keys/a?prevValue=%ff%fe", "value=1", _HTTP_FORM)
        assert (status, json.loads(body)["errorCode"]) == (400, 210)
    status, _, _ = _http_ask(
        http_server, "PUT", "/v2/keys/a", "value=1&prevValue=%EF%BF%BD%EF%BF%BD", _HTTP_FORM)
    assert status == 200


def test_http_quorum_read_costs_no_entry_of_the_log(http_server):
    """It moves no index, where all members know MsgReadIndex; HEAD ignores it; it beats wait."""
    eventually(lambda: http_server.call(lambda etcd: etcd.reads.enabled))
    _http_keys(http_server, "PUT", "/a", "value=1")
    _, before, _ = _http_ask(http_server, "GET", "/v2/keys/a")
    status, after, body = _http_ask(http_server, "GET", "/v2/keys/a?quorum=true&wait=true")
    assert status == 200 and json.loads(body)["action"] == "get"
    assert after["X-Raft-Index"] == before["X-Raft-Index"]
    assert after["X-Etcd-Index"] == before["X-Etcd-Index"]
    _, head, _ = _http_ask(http_server, "HEAD", "/v2/keys/a?quorum=true")
    assert head["X-Raft-Index"] == after["X-Raft-Index"]


def test_http_ttl_is_shown_and_kept(http_server):
    """expiration in UTC, ttl in whole seconds; the key goes when it is over."""
    _, event = _http_keys(http_server, "PUT", "/t", "value=1&ttl=100")
    assert event["node"]["ttl"] == 100
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z", event["node"]["expiration"])
    _http_keys(http_server, "PUT", "/t", "value=1&ttl=0")
    eventually(lambda: _http_keys(http_server, "GET", "/t")[0] == 404)


def test_http_largest_body_is_taken_and_one_byte_more_refused(http_server):
    """10 MiB of form; beyond: 210 and the end of the connection."""
    value = "x" * (pyetcd.REQUEST_BODY_BYTES_MAX - len("value="))
    assert _http_ask(http_server, "PUT", "/v2/keys/big", "value=" + value, _HTTP_FORM)[0] == 201
    status, headers, body = _http_ask(
        http_server, "PUT", "/v2/keys/big", "value=x" + value, _HTTP_FORM)
    assert (status, headers["Connection"]) == (400, "close")
    assert json.loads(body)["cause"] == "http: POST too large"


# -- watches ----------------------------------------------------------------------


def test_http_watch_sends_its_head_before_any_event(http_server):
    """Then one chunk; the body ends and the connection serves on."""
    with _HttpSocket(http_server) as client:
        client.send(_http_get("/v2/keys/w?wait=true"))
        head = client.until(b"\r\n\r\n").decode()
        assert head.startswith("HTTP/1.1 200") and "Transfer-Encoding: chunked" in head
        assert re.search(r"X-Etcd-Index: 3\r\nX-Raft-Index: \d+\r\nX-Raft-Term: 2\r\n", head)
        _http_keys(http_server, "PUT", "/other", "value=1")
        _, event = _http_keys(http_server, "PUT", "/w", "value=2")
        assert client.event() == event and client.chunk() == b""
        client.send(_http_get())
        assert client.answer()[0] == 200


def test_http_watch_of_the_past_is_answered_from_history(http_server):
    """The same head and framing as a live event."""
    _, event = _http_keys(http_server, "PUT", "/w", "value=1")
    _http_keys(http_server, "PUT", "/w", "value=2")
    index = event["node"]["modifiedIndex"]
    status, headers, body = _http_ask(
        http_server, "GET", f"/v2/keys/w?wait=true&waitIndex={index}")
    assert status == 200 and headers["Transfer-Encoding"] == "chunked"
    assert json.loads(body) == event and headers["X-Etcd-Index"] == str(index + 1)


def test_http_watch_before_the_history_is_an_error(tmp_path):
    """401 with the first index that is left, and a connection that serves on."""
    with _http_member(tmp_path, history_events=5) as server:
        for value in range(10):
            _http_keys(server, "PUT", "/w", f"value={value}")
        status, answer = _http_keys(server, "GET", "/w?wait=true&waitIndex=2")
        assert (status, answer["errorCode"], answer["index"]) == (400, 401, 13)
        assert answer["cause"] == "the requested history has been cleared [9/2]"


def test_http_stream_tells_every_event(http_server):
    """Recursive, until the client leaves; then the watcher is gone."""
    with _HttpSocket(http_server) as client:
        client.send(_http_get("/v2/keys/d?wait=true&stream=true&recursive=true"))
        client.until(b"\r\n\r\n")
        for number in range(20):
            _, event = _http_keys(http_server, "PUT", f"/d/{number}", "value=1")
            assert client.event() == event
        assert http_server.call(lambda etcd: etcd.store.stats.watchers) == 1
    eventually(lambda: not http_server.call(lambda etcd: etcd.store.stats.watchers))


def test_http_watch_of_http10_ends_with_the_connection(http_server):
    """No chunks in HTTP/1.0."""
    with _HttpSocket(http_server) as client:
        client.send(_http_get("/v2/keys/w?wait=true", version="1.0"))
        client.until(b"\r\n\r\n")
        _, event = _http_keys(http_server, "PUT", "/w", "value=2")
        assert json.loads(client.rest()) == event


def test_http_slow_watcher_is_disconnected_and_forgotten(http_server):
    """A client that does not read loses its watch, visibly; others are not held up."""
    def burst(etcd):
        for _ in range(pyetcd.WATCHER_QUEUE_EVENTS_MAX + 60):
            etcd.store.set("/1/s", value="x" * 200_000, now_ns=time.time_ns())

    with _HttpSocket(http_server, receive_buffer=4096) as client:
        client.send(_http_get("/v2/keys/s?wait=true&stream=true"))
        client.until(b"\r\n\r\n")
        http_server.call(burst)
        assert http_server.call(lambda etcd: etcd.store.stats.watchers) == 0
        assert not client.rest().endswith(b"0\r\n\r\n"), "cut, not ended"
    assert _http_keys(http_server, "PUT", "/s", "value=1")[0] == 200


def test_http_watcher_that_reads_may_get_many_events_at_once(http_server):
    """A burst longer than the queue costs a client that keeps up nothing."""
    events = 5 * pyetcd.WATCHER_QUEUE_EVENTS_MAX

    def burst(etcd):
        for number in range(events):
            etcd.store.set("/1/b", value=str(number), now_ns=time.time_ns())

    with _HttpSocket(http_server) as client:
        client.send(_http_get("/v2/keys/b?wait=true&stream=true"))
        client.until(b"\r\n\r\n")
        http_server.call(burst)
        got = [client.event()["node"]["value"] for _ in range(events)]
    assert got == [str(number) for number in range(events)]


# -- the other paths ------------------------------------------------------------


@pytest.mark.parametrize("path", [
    "/", "/v2", "/v2/keysfoo", "/v2/stats", "/v2/leader", "/v2/machines/", "/version/", "/raft",
    "/debug/pprof", "/members",
])
def test_http_unknown_paths_are_404(http_server, path):
    """Plain text, on any method."""
    for method in ("GET", "POST"):
        status, headers, body = _http_ask(http_server, method, path)
        assert (status, body) == (404, b"404 page not found\n")
        assert headers["Content-Type"] == _HTTP_TEXT
        assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(("method", "path", "allow"), [
    ("PATCH", "/v2/keys/a", "HEAD,GET,PUT,POST,DELETE"), ("get", "/v2/keys/a", None),
    ("PUT", "/v2/stats/self", "GET"), ("HEAD", "/v2/stats/store", "GET"),
    ("POST", "/v2/machines", "GET,HEAD"), ("POST", "/version", "GET"), ("HEAD", "/health", "GET"),
    ("HEAD", "/v2/members", "GET,POST,DELETE,PUT"), ("GET", "/config/local/log", "PUT"),
    ("POST", "/debug/vars", "GET"),
])
def test_http_wrong_methods_are_405(http_server, method, path, allow):
    """Allow lists what there is, without spaces; no header of etcd."""
    status, headers, body = _http_ask(http_server, method, path)
    assert (status, headers["Allow"]) == (405, allow or "HEAD,GET,PUT,POST,DELETE")
    assert headers["X-Content-Type-Options"] == "nosniff" and "X-Etcd-Cluster-Id" not in headers
    assert body == (b"" if method == "HEAD" else b"Method Not Allowed\n")


@pytest.mark.parametrize(("path", "location"), [
    ("//version", "/version"), ("/v2/keys/a//b/?x=1&y=%2F", "/v2/keys/a/b/?x=1&y=%2F"),
    ("/v2/../version", "/version"), ("/v2/keys/%2e%2e/x%20%C3%a9", "/v2/x%20%C3%A9"),
    ("/v2/keys/a/./(b)", "/v2/keys/a/%28b%29"),
])
def test_http_unclean_paths_are_redirected(http_server, path, location):
    """Whatever the method; a body for GET only, with HTML escapes."""
    for method in ("GET", "PUT", "PATCH"):
        status, headers, body = _http_ask(http_server, method, path)
        assert (status, headers["Location"]) == (301, location)
        if method == "GET":
            shown = location.replace("&", "&amp;")
            assert body.decode() == f'<a href="{shown}">Moved Permanently</a>.\n\n'
        else:
            assert body == b"" and "Content-Type" not in headers


@pytest.mark.parametrize("path", ["/", "/v2/keys/a", "/nope", "//x", "*"])
def test_http_options_is_200_everywhere(http_server, path):
    """Empty, without etcd's headers."""
    status, headers, body = _http_ask(http_server, "OPTIONS", path)
    assert (status, headers["Content-Length"], body) == (200, "0", b"")
    assert "X-Etcd-Cluster-Id" not in headers and "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(("cors", "origin", "allowed"), [
    (("http://a.example",), "http://a.example", "http://a.example"),
    (("http://a.example",), "http://b.example", None),
    (("*",), "http://b.example", "*"),
])
def test_http_cors_lines_are_on_every_answer(tmp_path, cors, origin, allowed):
    """Reads, writes, errors, watches and OPTIONS; only for origins that are listed."""
    with _http_member(tmp_path, cors=cors) as server:
        for method, path in (
            ("PUT", "/v2/keys/a"), ("GET", "/v2/keys/a"), ("GET", "/nope"), ("OPTIONS", "/x"),
            ("GET", "/v2/keys/a?wait=true&waitIndex=4"), ("GET", "/new"),
        ):
            _, headers, _ = _http_ask(server, method, path, headers={"Origin": origin})
            assert headers.get_all("Access-Control-Allow-Origin") == (allowed and [allowed])
            assert headers.get_all("Vary") == (None if cors == ("*",) else ["Origin"])
            if allowed:
                assert "authorization" in headers["Access-Control-Allow-Headers"]


@pytest.mark.parametrize("headers, makes", [
    ({}, True),
    ({"User-Agent": "curl/7.88.1", "Accept": "*/*"}, True),
    ({"User-Agent": "Go-http-client/1.1", "Accept-Encoding": "gzip"}, True),
    ({"Accept-Language": "*", "Sec-Fetch-Mode": "cors", "User-Agent": "node"}, True),
    ({"User-Agent": "Mozilla/5.0 (Windows NT; en-US) WindowsPowerShell/5.1"}, True),
    ({"Sec-Fetch-Site": "none", "User-Agent": "Mozilla/5.0", "Accept": "text/html"}, True),
    ({"Sec-Fetch-Site": "cross-site", "Accept": "*/*"}, False),
    ({"Sec-Fetch-Site": "same-site"}, False),
    ({"Sec-Fetch-Site": "same-origin"}, False),
    ({"Origin": "http://evil.example"}, False),
    ({"Origin": "null", "Content-Type": "application/x-www-form-urlencoded"}, False),
    ({"Referer": "http://evil.example/"}, False),
    ({"Host": "evil.example:2379", "User-Agent": "Mozilla/5.0 (X11; Linux x86_64)"}, False),
    ({"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}, False),
    ({"Accept": "image/avif,image/webp,*/*;q=0.8"}, False),
    ({"Accept-Language": "en-US,en;q=0.5"}, False),
], ids=str)
def test_http_no_web_page_makes_tokens(http_server, headers, makes):
    """A form, an image or a script, also on a page whose name was bound to our address."""
    def tokens():
        body = _http_ask(http_server, "GET", "/v2/keys/_etcd/registry")[2]
        return len(json.loads(body).get("node", {}).get("nodes", ()))

    for method in ("GET", "HEAD", "POST"):
        before = tokens()
        status, _, body = _http_ask(http_server, method, "/new?size=3", headers=headers)
        assert (status, tokens() - before) == ((200, 1) if makes else (403, 0))
        assert makes or method == "HEAD" or b"use curl" in body


def test_http_pages_that_cors_names_may_make_tokens(tmp_path):
    """The operator has said that scripts of this origin may do what others may."""
    with _http_member(tmp_path, cors=("http://a.example",)) as server:
        for origin, status in (("http://a.example", 200), ("http://b.example", 403)):
            assert _http_ask(server, "GET", "/new", headers={"Origin": origin})[0] == status


@pytest.mark.parametrize("text, shown", [
    ("a\n2026/01/01 00:00:00 etcd: b", "a\\n2026/01/01 00:00:00 etcd: b"),
    ("\x1b[2K\r\x00\x7f\x9b", "\\x1b[2K\\r\\x00\\x7f\\x9b"),
    ("\u2028\u202e\u2066\udcff", "\\u2028\\u202e\\u2066\\udcff"),
    ("/v2/keys/\u00e4 'x' \"y\"", "/v2/keys/\u00e4 'x' \"y\""),
    ("x" * 20_000, "x" * 16_384 + "..."),
], ids=range(5))
def test_http_log_lines_cannot_be_forged(caplog, text, shown):
    """Whatever a name, a key or a peer says: one line, without what moves a cursor."""
    caplog.set_level(logging.INFO, "pyetcd")
    log = pyetcd.package_logger("forged")
    log.info("%s", text)
    pyetcd.package_logger("forged").info(text.replace("%", "%%"))
    assert [record.getMessage() for record in caplog.records] == [shown] * 2
    try:
        raise ValueError(text)
    except ValueError:      # not logged: pytest could not pass its own text of it on
        record = logging.LogRecord("pyetcd.forged", logging.ERROR, __file__, 1, "bug: %s",
                                   (text[:100],), sys.exc_info())
    log.filter(record)
    first, *others = pyetcd.LogFormatter().format(record).split("\n")
    assert first.endswith("bug: " + pyetcd.one_line(text[:100]))
    assert others and all(line.startswith("    ") for line in others)
    assert not set("".join(others)) & set("\x1b\x00\r\x9b\u2028\u202e\udcff")


def test_http_log_lines_of_requests_cannot_be_forged(tmp_path, caplog):
    """Names of users and paths with line ends and escapes, as they come over the network."""
    caplog.set_level(logging.DEBUG, "pyetcd")
    with _http_member(tmp_path) as server:
        evil = "x\n2026/01/01 00:00:00 etcd: forged\x1b[31m"
        url = server.client_urls[0]
        requests.put(url + "/v2/auth/users/root", json={"user": "root", "password": "p"})
        requests.put(url + "/v2/auth/enable")
        requests.get(url + "/v2/keys/a", auth=(evil, "p"))
        requests.get(url + "/v2/keys/" + urllib.parse.quote(evil))
        requests.put(url + "/v2/auth/users/" + urllib.parse.quote(evil), auth=("root", "p"),
                     json={"user": evil, "password": "q", "roles": ["guest"]})
        requests.get(url + "/v2/members", auth=(evil, "q"))
        requests.delete(url + "/v2/members/1", auth=(evil, "q"))
        for name in ("X-Server-From", "X-Server-Version", "X-Min-Cluster-Version", "X-Raft-To",
                     "X-Etcd-Cluster-ID", "X-PeerURLs", "X-Forwarded-For", "User-Agent", "Origin"):
            for door in (url + "/v2/keys/", server.peer_urls[0] + "/raft/stream/msgapp/7"):
                requests.get(door, headers={name: "7\x1b[31m\x9b\x0b\x85forged"})
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "forged" in text and "no such user: x\\n2026" in text
    assert not set(text) & set("\x1b\x9b\x0b\x85")
    assert not [line for line in text.split("\n") if line[:4] == "2026"]


def test_http_version_machines_and_health(http_server):
    """Exact bodies and types."""
    status, headers, body = _http_ask(http_server, "GET", "/version")
    assert body == b'{"etcdserver":"2.3.8","etcdcluster":"2.3.0"}'
    assert (status, headers["Content-Type"]) == (200, "application/json")
    status, headers, body = _http_ask(http_server, "GET", "/v2/machines")
    assert (body.decode(), headers["Content-Type"]) == (http_server.client_urls[0], _HTTP_TEXT)
    assert _http_ask(http_server, "HEAD", "/v2/machines")[2] == b""
    status, headers, body = _http_ask(http_server, "GET", "/health")
    assert (status, body, headers["Content-Type"]) == (200, b'{"health": "true"}', _HTTP_TEXT)


def test_http_stats_have_etcds_members_in_order(http_server):
    """Three objects, no newline at the end, no header of etcd."""
    expected = {
        "self": "name id state startTime leaderInfo recvAppendRequestCnt sendAppendRequestCnt",
        "leader": "leader followers",
        "store": "getsSuccess getsFail setsSuccess setsFail deleteSuccess deleteFail"
                 " updateSuccess updateFail createSuccess createFail compareAndSwapSuccess"
                 " compareAndSwapFail compareAndDeleteSuccess compareAndDeleteFail expireCount"
                 " watchers",
    }
    for name, members in expected.items():
        status, headers, body = _http_ask(http_server, "GET", "/v2/stats/" + name)
        assert (status, headers["Content-Type"]) == (200, "application/json")
        assert list(json.loads(body)) == members.split() and not body.endswith(b"\n")
        assert "X-Etcd-Cluster-Id" not in headers
    shown = json.loads(_http_ask(http_server, "GET", "/v2/stats/self")[2])
    assert shown["state"] == "StateLeader" and shown["leaderInfo"]["leader"] == shown["id"]
    assert json.loads(_http_ask(http_server, "GET", "/v2/stats/leader")[2])["followers"] == {}


def test_http_every_key_request_counts_a_miss_as_in_etcd(http_server):
    """etcd looks for /2/enabled each time; clients' dashboards know these numbers."""
    def fails():
        return json.loads(_http_ask(http_server, "GET", "/v2/stats/store")[2])["getsFail"]

    before = fails()
    _http_keys(http_server, "PUT", "/a", "value=1")
    _http_keys(http_server, "GET", "/a")
    _http_keys(http_server, "GET", "/none")         # one of its own besides
    _http_keys(http_server, "PUT", "/a", "ttl=x")   # not counted: it never got that far
    assert fails() - before == 4


def test_http_metrics_and_debug_vars_are_readable(http_server):
    """Every sample parses; etcd's names; the variables are JSON."""
    _http_keys(http_server, "PUT", "/a", "value=1")
    _http_keys(http_server, "GET", "/none")
    status, headers, body = _http_ask(http_server, "POST", "/metrics")
    assert headers["Content-Type"] == "text/plain; version=0.0.4"
    samples = {}
    for line in body.decode().splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            samples[name] = float(value)
    assert samples['etcd_http_received_total{method="PUT"}'] == 1
    assert samples['etcd_http_failed_total{method="GET",code="404"}'] == 1
    assert samples['etcd_http_successful_duration_second_count{method="PUT"}'] == 1
    assert samples["etcd_server_proposal_durations_seconds_count"] == 1
    assert samples["etcd_wal_fsync_durations_seconds_count"] > 0
    assert samples["process_resident_memory_bytes"] > 1e6
    status, headers, body = _http_ask(http_server, "GET", "/debug/vars")
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert body.startswith(b'{\n"cmdline": [') and body.endswith(b"\n}\n")
    shown = json.loads(body)
    assert shown["raft.status"]["raftState"] == "StateLeader" and shown["file_descriptor_limit"] > 0


@pytest.mark.parametrize(("body", "status", "message"), [
    ("nope", 400, "Invalid json body"), ("", 400, "Invalid json body"),
    ("[]", 400, "Invalid json body"), ('{"Level":5}', 400, "Invalid json body"),
    ("{}", 400, "Invalid log level "), ('{"Level":"loud"}', 400, "Invalid log level loud"),
    ('{"level":"debug"} x', 204, None), ('{"Level":"4"}', 204, None), ('{"Level":"w"}', 204, None),
])
def test_http_log_level_can_be_changed(http_server, body, status, message):
    """By name, letter or number, in any case."""
    logger = logging.getLogger("pyetcd")
    old = logger.level
    try:
        got, _, answer = _http_ask(http_server, "PUT", "/config/local/log", body)
        level = logger.level
        assert got == status and _http_ask(http_server, "GET", "/version")[0] == 200
    finally:
        logger.setLevel(old)
    if message is None:
        assert level == (logging.WARNING if '"w"' in body else logging.DEBUG) and answer == b""
    else:
        assert answer.decode() == f'{{"message":"{message}"}}' and level == old


# -- members --------------------------------------------------------------------


def test_http_members_lists_and_names_the_leader(http_server):
    """With and without slash; other subpaths are unknown."""
    member = {
        "id": http_server.call(lambda etcd: f"{etcd.member_id:x}"), "name": "default",
        "peerURLs": list(http_server.peer_urls), "clientURLs": list(http_server.client_urls),
    }
    for path in ("/v2/members", "/v2/members/"):
        status, headers, body = _http_ask(http_server, "GET", path)
        assert status == 200 and headers["X-Etcd-Cluster-Id"]
        assert body.decode() == json.dumps({"members": [member]}, separators=(",", ":")) + "\n"
    _, _, body = _http_ask(http_server, "GET", "/v2/members/leader")
    assert body.decode() == json.dumps(member, separators=(",", ":")) + "\n"
    for path in ("/v2/members/leader/", f"/v2/members/{member['id']}"):
        status, _, body = _http_ask(http_server, "GET", path)
        assert (status, body) == (404, b'{"message":"Not found"}')


@pytest.mark.parametrize(("method", "path", "body", "kind", "status", "message"), [
    ("POST", "", '{"peerURLs":["http://h:1"]}', "", 415,
     "Bad Content-Type , accept application/json"),
    ("POST", "", "{}", "application/json; charset=utf-8", 415,
     "Bad Content-Type application/json; charset=utf-8, accept application/json"),
    ("POST", "", "", "application/json", 400, "unexpected end of JSON input"),
    ("POST", "/x", "{}", "application/json", 400, "no valid URLs given"),
    ("POST", "", "OWN", "application/json", 409, "etcdserver: peerURL exists"),
    ("DELETE", "/xyz", None, "", 404, "No such member: xyz"),
    ("DELETE", "/0xab", None, "", 404, "No such member: 0xab"),
    ("DELETE", "/11111111111111111", None, "", 404, "No such member: 11111111111111111"),
    ("DELETE", "/00ABC", None, "", 404, "No such member: abc"),
    ("PUT", "/xyz", "{", "", 404, "No such member: xyz"),
    ("PUT", "/abc", "{", "", 415, "Bad Content-Type , accept application/json"),
    ("PUT", "/abc", "{", "application/json", 400, "unexpected end of JSON input"),
    ("PUT", "/abc", '{"peerURLs":["http://h:1"]}', "application/json", 404, "No such member: abc"),
])
def test_http_members_errors(http_server, method, path, body, kind, status, message):
    """Status and message; the checks come in etcd's order."""
    if body == "OWN":
        body = json.dumps({"peerURLs": list(http_server.peer_urls)})
    headers = {"Content-Type": kind} if kind else {}
    got, headers, answer = _http_ask(http_server, method, "/v2/members" + path, body, headers)
    assert (got, json.loads(answer)) == (status, {"message": message})
    assert headers["Content-Type"] == "application/json" and headers["X-Etcd-Cluster-Id"]
    assert not answer.endswith(b"\n")


@pytest.mark.parametrize(("method", "path"), [
    ("DELETE", "/v2/members"), ("PUT", "/v2/members/"),
])
def test_http_members_need_an_id(http_server, method, path):
    """405 without Allow, as etcd answers."""
    status, headers, body = _http_ask(http_server, method, path, "{}", _HTTP_JSON)
    assert (status, body) == (405, b"Method Not Allowed\n")
    assert "Allow" not in headers and headers["X-Etcd-Cluster-Id"]


def test_http_member_added_without_a_process_costs_the_quorum(http_server):
    """201 with the new member; then one of two is no quorum and health says so."""
    body = '{"peerURLs":["http://127.0.0.1:2","http://127.0.0.1:1"]}'
    status, _, answer = _http_ask(http_server, "POST", "/v2/members", body, _HTTP_JSON)
    added = json.loads(answer)
    assert status == 201 and answer.endswith(b"}\n")
    assert added == {"id": added["id"], "name": "", "clientURLs": [],
                     "peerURLs": ["http://127.0.0.1:1", "http://127.0.0.1:2"]}
    eventually(lambda: _http_ask(http_server, "GET", "/health")[0] == 503)
    status, headers, answer = _http_ask(http_server, "GET", "/health")
    assert (answer, headers["Content-Type"]) == (b'{"health": "false"}\n', _HTTP_TEXT)
    assert _http_keys(http_server, "GET", "/")[0] == 200, "reads need no quorum"


def test_http_member_may_change_its_own_urls(http_server):
    """PUT 204, empty, with the cluster id."""
    own = http_server.call(lambda etcd: f"{etcd.member_id:x}")
    urls = [*http_server.peer_urls, "http://127.0.0.1:1"]
    status, headers, body = _http_ask(
        http_server, "PUT", "/v2/members/" + own, json.dumps({"peerURLs": urls}), _HTTP_JSON)
    assert (status, body) == (204, b"") and headers["X-Etcd-Cluster-Id"]
    listing = json.loads(_http_ask(http_server, "GET", "/v2/members")[2])
    assert listing["members"][0]["peerURLs"] == sorted(urls)


def test_http_writes_without_quorum_time_out_with_etcds_words(tmp_path):
    """500, error 300, index 0, and the reason."""
    with _http_member(tmp_path, strict_reconfig_check=False) as server:
        body = '{"peerURLs":["http://127.0.0.1:1"]}'
        assert _http_ask(server, "POST", "/v2/members", body, _HTTP_JSON)[0] == 201
        server.call(lambda etcd: setattr(etcd.proposals, "timeout_s", 0.2))
        status, headers, answer = _http_ask(server, "PUT", "/v2/keys/a", "value=1", _HTTP_FORM)
        assert status == 500 and headers["X-Etcd-Index"] == "0"
        assert json.loads(answer) == {
            "errorCode": 300, "message": "Raft Internal Error", "index": 0,
            "cause": "etcdserver: request timed out, possibly due to connection lost",
        }
        status, _, answer = _http_ask(server, "DELETE", "/v2/members/1", body, _HTTP_JSON)
        assert (status, answer) == (500, b'{"message":"Internal Server Error"}')


def test_http_member_add_that_would_lose_the_quorum_says_what_to_do(http_server, caplog):
    """500 as etcd; the sentence is in the message, and etcd's line in the log."""
    body = '{"peerURLs":["http://127.0.0.1:1"]}'
    assert _http_ask(http_server, "POST", "/v2/members", body, _HTTP_JSON)[0] == 201
    body = '{"peerURLs":["http://127.0.0.1:2"]}'
    status, _, answer = _http_ask(http_server, "POST", "/v2/members", body, _HTTP_JSON)
    assert (status, json.loads(answer)["message"]) == (
        500, "etcdserver: re-configuration failed due to not enough started members: adding a"
             " member leaves 1 started of 3 members, and 2 are needed for a quorum; start the"
             " members that were added and not started yet, or remove those, and try again")
    assert ("Reject add member request: the number of started member (1) will be less than the"
            " quorum number of the cluster (2)") in caplog.messages
    assert len(json.loads(_http_ask(http_server, "GET", "/v2/members")[2])["members"]) == 2


# -- peer port ------------------------------------------------------------------


def test_http_peer_port_tells_members_and_version(http_server):
    """Ids are decimal there; the cluster id is in the header; nothing of the keys API."""
    status, headers, body = _http_ask(http_server, "GET", "/members", peer=True)
    own = http_server.call(lambda etcd: etcd.member_id)
    assert status == 200 and headers["X-Etcd-Cluster-Id"]
    assert json.loads(body) == [{
        "id": own, "peerURLs": list(http_server.peer_urls), "name": "default",
        "clientURLs": list(http_server.client_urls)}]
    assert body.startswith(b'[{"id":') and body.endswith(b"]\n")
    assert b"etcdserver" in _http_ask(http_server, "GET", "/version", peer=True)[2]
    for path in ("/", "/health", "/v2/keys/a", "/members/x", "/metrics", "/raft/"):
        assert _http_ask(http_server, "GET", path, peer=True)[0] == 404, path
    for method, path, allow in (
        ("POST", "/members", "GET"), ("POST", "/version", "GET"), ("GET", "/raft", "POST"),
    ):
        status, headers, _ = _http_ask(http_server, method, path, peer=True)
        assert (status, headers["Allow"]) == (405, allow), path


# -- slow and malformed clients ---------------------------------------------------


@pytest.mark.parametrize(("raw", "status"), [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    (b"hello\r\n\r\n", 400),
    (b"GET /version HTTP/1.1\r\n\r\n", 400),
    (b"GET /version HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    (b"GET /version HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
    (b"GET /v2/keys/%zz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET version HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET /version HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    (b"PUT /v2/keys/a HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    (b"PUT /v2/keys/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n"
     b"\r\n", 400),
    (b"PUT /v2/keys/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
])
def test_http_garbage_is_answered_and_the_connection_closed(http_server, raw, status):
    """And the server goes on."""
    with _HttpSocket(http_server) as client:
        client.send(raw)
        answer = client.rest()
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert _http_ask(http_server, "GET", "/version")[0] == 200


_HTTP_PUT = (b"PUT /v2/keys/piece HTTP/1.1\r\nHost: x\r\n"
             b"Content-Type: application/x-www-form-urlencoded\r\n")


@pytest.mark.parametrize("raw", [
    b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /version HTTP/1.1\nHost: x\r\n\r\n",
    b"GET /version HTTP/1.1\r\nHost: x\n\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /version HTTP/1.0\n\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /version HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"nonsense\r\n\r\n", b"\r\n\r\nGET /version HTTP/1.1\r\nHost: x\r\n\r\n",
    _HTTP_PUT + b"Content-Length: 7\r\n\r\nvalue=1",
    _HTTP_PUT + b"Content-Length: 7, 7\r\n\r\nvalue=1",
    _HTTP_PUT + b"Content-Length: 7, 8\r\n\r\nvalue=1",
    _HTTP_PUT + b"Content-Length: ,\r\n\r\n", _HTTP_PUT + b"Content-Length:\r\n\r\n",
    _HTTP_PUT + b"Content-Length: 7\r\n\r\nvalue=12",
    _HTTP_PUT + b"Transfer-Encoding: chunked\r\n\r\n7\r\nvalue=1\r\n0\r\n\r\n",
    _HTTP_PUT + b"Expect: 100-continue\r\nContent-Length: 7\r\n\r\nvalue=1",
], ids=str)
def test_http_a_request_alone_is_answered_as_behind_another(http_server, raw):
    """A request that arrives in one piece takes a short way; the others take the long one."""
    first = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    answers = []
    for sent in (_HTTP_PUT + b"Content-Length: 7\r\n\r\nvalue=1", first, raw, first + raw):
        with _HttpSocket(http_server) as client:
            client.send(sent)
            client.socket.shutdown(socket.SHUT_WR)
            answers.append(re.sub(
                rb'(Index(?:": ?|: )|Length: |Term: |Date: .{3},? )[^\r\n,}]+', rb"\1N",
                client.rest()))
    assert answers[1] + answers[2] == answers[3] and answers[2]


@given(raw=st.binary(max_size=80))
def test_http_head_of_any_bytes_is_parsed_or_refused(raw):
    """BadRequest is all that parse_head ever raises; every parsed head can be routed to a key."""
    for data in (raw, b"GET /v2/keys/" + raw + b" HTTP/1.1\r\nHost: x"):
        with contextlib.suppress(pyetcd.BadRequest):
            head = pyetcd.parse_head(data)
            if head.path.startswith("/v2/keys/"):
                pyetcd.KeyTarget(head)


_HTTP_MANY_LINES = [f"X-{i}: 1" for i in range(pyetcd.HEADER_LINES_MAX)]


@pytest.mark.parametrize(("request_bytes", "status"), [
    (_http_get("/v2/keys/a?x=" + "y" * 500_000), b"404"),
    (_http_get("/v2/keys/a?x=" + "y" * pyetcd.REQUEST_LINE_BYTES_MAX), b"414"),
    (b"GET /" + b"y" * (pyetcd.REQUEST_LINE_BYTES_MAX + 100), b"414"),
    (_http_get("/v2/keys/a", "X: " + "y" * 1_000_000), b"404"),
    (_http_get("/v2/keys/a", "X: " + "y" * pyetcd.REQUEST_HEAD_BYTES_MAX), b"431"),
    (_http_get("/v2/keys/a", *_HTTP_MANY_LINES[5:]), b"404"),
    (_http_get("/v2/keys/a", *_HTTP_MANY_LINES), b"431"),
], ids=["line", "long line", "endless line", "header", "long header", "lines", "many lines"])
def test_http_heads_are_limited(http_server, request_bytes, status):
    """A request line of half a MiB and headers of one work; more is refused, and the end."""
    with _HttpSocket(http_server) as client:
        with contextlib.suppress(OSError):
            client.send(request_bytes)
        if status == b"404":
            assert client.answer()[0] == 404
        else:
            assert client.rest().startswith(b"HTTP/1.1 %b " % status)


@pytest.mark.parametrize(("method", "path"), [
    ("PUT", "/v2/auth/users/u"), ("PUT", "/v2/auth/roles/r"), ("PUT", "/config/local/log"),
    ("POST", "/v2/members"), ("POST", "/new"),
])
def test_http_bodies_are_limited(http_server, method, path):
    """Beyond 10 MiB: 413, and the connection ends without reading the rest."""
    head = (f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {pyetcd.REQUEST_BODY_BYTES_MAX + 1}\r\n\r\n")
    with _HttpSocket(http_server) as client:
        client.send(head.encode())
        assert client.answer()[0] == 413
        assert client.rest() == b""


def test_http_chunks_are_limited(http_server):
    """A body in a hundred thousand pieces is treated as one that is too large."""
    head = (b"PUT /v2/auth/users/u HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    with _HttpSocket(http_server) as client:
        with contextlib.suppress(OSError):
            client.send(head + b"1\r\nx\r\n" * (pyetcd.CHUNKS_MAX + 10_000))
        assert client.answer()[0] == 413


def test_http_connections_are_limited(http_server, monkeypatch, caplog):
    """One more is told so, and closed; when another one ends, there is room again."""
    monkeypatch.setattr(pyetcd, "CONNECTIONS_MAX", 3)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(_HttpSocket(http_server)) for _ in range(3)]
        for client in clients:
            client.send(_http_get())
            assert client.answer()[0] == 200
        with _HttpSocket(http_server) as late:
            status, _, body = late.answer()
            assert status == 503 and b"too many connections" in body
        assert "too many connections (3)" in caplog.text
        clients[0].socket.close()

        def has_room():
            with _HttpSocket(http_server) as client:
                client.send(_http_get())
                return client.answer()[0] == 200
        eventually(has_room)


def _http_output(server):
    """(bytes that clients have not taken, those of them that are in memory)."""
    connections = [c for listener in server._client_listeners for c in listener._connections]
    pieces = {id(piece): len(piece) for c in connections for piece in c.pieces()}
    return sum(connection.pending for connection in connections), sum(pieces.values())


def test_http_watchers_share_the_bytes_of_events(http_server):
    """50 that never read 90 events of 50 KB: the events are in memory once."""
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            watcher = stack.enter_context(_HttpSocket(http_server, receive_buffer=4096))
            watcher.send(_http_get("/v2/keys/w?wait=true&stream=true&recursive=true"))
        eventually(lambda: http_server.call(lambda etcd: etcd.store.stats.watchers) == 50)
        for number in range(90):
            form = b"value=" + 50_000 * b"x"
            assert _http_ask(http_server, "PUT", f"/v2/keys/w/{number}", form, _HTTP_FORM)[0] == 201
        pending, held = http_server.call(lambda etcd: _http_output(http_server))
        assert pending > 10 * 90 * 50_000 and held < 1.2 * 90 * 50_000
        first = http_server.call(lambda etcd: etcd.store.hub.history.first_index)
        for _ in range(5):              # also those that begin in the past
            late = stack.enter_context(_HttpSocket(http_server, receive_buffer=4096))
            late.send(_http_get(
                f"/v2/keys/w?wait=true&stream=true&recursive=true&waitIndex={first}"))
            late.until(b"\r\n\r\n")
        assert http_server.call(lambda etcd: _http_output(http_server))[1] < 1.2 * 90 * 50_000


@pytest.mark.parametrize("kind", ["replies", "listings", "requests", "pipelined"])
def test_http_bytes_of_all_connections_are_bounded(tmp_path, monkeypatch, caplog, kind):
    """Who has not moved for the longest is closed; others read and write meanwhile."""
    monkeypatch.setattr(pyetcd, "HELD_BYTES_MAX", 4 << 20)
    with _http_member(tmp_path) as server, contextlib.ExitStack() as stack:
        for number in range(24):
            form = b"value=" + str(number).encode() + (1 << 20) * b"x"
            path = f"/v2/keys/d{number}/a"
            assert _http_ask(server, "PUT", path, form, _HTTP_FORM)[0] == 201
        big_head = b"POST /v2/keys/a HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n"
        clients = []
        for number in range(24):
            client = stack.enter_context(_HttpSocket(server, receive_buffer=4096))
            clients.append(client)
            with contextlib.suppress(OSError):
                client.send({
                    "replies": 12 * _http_get(f"/v2/keys/d{number}/a"),
                    "listings": 12 * _http_get(f"/v2/keys/d{number}"),
                    "requests": big_head + 1_000_000 * b"x",
                    "pipelined": _http_get("/v2/keys/w?wait=true") + 900_000 * b"x",
                }[kind])
            assert _http_keys(server, "GET", "/w")[0] == 404
        eventually(lambda: "closed connections that held more than 4 MB" in caplog.text)
        bound = 6 << 20                 # what has come since the last look, too
        eventually(lambda: server.call(lambda etcd: _http_output(server))[1] < bound)
        assert _http_keys(server, "PUT", "/w", "value=1")[0] == 201
        if kind == "replies":
            assert clients[-1].answer()[0] == 200, "the last one is served"


def test_http_what_is_over_leaves_nothing(tmp_path, monkeypatch):
    """10,000 watches, connections and proxied requests, without any collection of cycles."""
    def count():
        kinds = collections.Counter(type(thing).__name__ for thing in gc.get_objects())
        return sum(kinds[name] for name in (
            "Connection", "HttpRequest", "StreamReply", "KeyWatch", "Watcher", "HttpCall",
            "Forward", "Download", "socket", "traceback"))

    def go(server, request, times):
        for first in range(0, times, 50):
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(_HttpSocket(server)) for _ in range(50)]
                for number, client in enumerate(clients, first):
                    client.send(request.replace(b"NUMBER", str(number).encode()))
                for client in clients:
                    client.until(b"HTTP/1.")

    def put(path):
        return (f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n"
                "Content-Type: application/x-www-form-urlencoded\r\n\r\nvalue=1").encode()

    cases = [
        (_http_get("/v2/keys/w?wait=true&x=NUMBER"), 3), (_http_get("/v2/keys/NUMBER"), 2),
        (_http_get("/v2/keys/w?wait=true&stream=true&x=NUMBER"), 3),
        (put("/v2/keys/w?prevValue=NUMBER"), 1), (_http_get("/v2/snapshot?x=NUMBER"), 0.25),
        (b"nonsense NUMBER\r\n\r\n", 0.5), (_http_get("/?x=NUMBER", version="1.0"), 0.4),
    ]
    with _http_member(tmp_path) as server, pyetcd.ProxyServer(
        data_dir=str(tmp_path / "p"), initial_cluster=f"default={server.peer_urls[0]}"
    ) as proxy:
        eventually(lambda: _http_ask(proxy, "GET", "/version")[0] == 200)
        for door in (server, proxy):    # what is made once
            for request, _ in cases:
                go(door, request, 1)
        gc.disable()
        gc.freeze()                     # count() sees only objects that are made from now on
        try:
            for request, share in cases:
                go(server, request, int(800 * share))
                go(proxy, request, int(200 * share))
            eventually(lambda: count() <= 5, what="nothing left")
        finally:
            gc.enable()
            gc.unfreeze()


def test_http_entries_applied_in_one_turn_are_bounded(tmp_path, monkeypatch):
    """However many are committed together: WORK_ENTRIES_MAX of them, then the others' turn."""
    turns, answered, apply_entry = [], [], pyetcd.Applier.apply_entry

    def apply(self, entry):
        turns.append(server._reactor.turns)
        return apply_entry(self, entry)

    def propose(etcd):
        for number in range(3_000):
            request = pyetcd.Request(method="PUT", path=f"/1/{number}", val="1")
            etcd.do(request, answered.append)

    with _http_member(tmp_path) as server:
        assert _http_keys(server, "PUT", "/a", "value=1")[0] == 201
        monkeypatch.setattr(pyetcd.Applier, "apply_entry", apply)
        server.call(propose)
        eventually(lambda: len(answered) == 3_000)
    most = max(collections.Counter(turns).values())
    assert 100 < most <= pyetcd.WORK_ENTRIES_MAX < 3_000


def test_reactor_timers_that_are_cancelled_are_forgotten():
    """Long before they are due, however many; the others come in order."""
    reactor = pyetcd.Reactor()
    called = []
    try:
        before = sum(type(thing) is pyetcd.Timer for thing in gc.get_objects())
        for number in range(10_000):
            reactor.call_later(3_600.0, called.append, bytes(1_000)).cancel()
            if number % 1_000 == 0:
                reactor.call_later(0.001 + number / 1e6, called.append, number)
        after = sum(type(thing) is pyetcd.Timer for thing in gc.get_objects())
        assert after - before <= pyetcd.TIMERS_SWEPT_MIN + 10
        reactor.call_later(0.03, reactor.stop)
        reactor.run()
    finally:
        reactor.close()
    assert called == list(range(0, 10_000, 1_000))


@pytest.fixture
def hanging_names(monkeypatch):
    """Names whose look-up hangs until the event that is yielded; and all that were looked up."""
    go_on, asked, find = threading.Event(), [], socket.getaddrinfo

    def getaddrinfo(host, *args, **more):
        if host.startswith("hang") and not more.get("flags", 0) & socket.AI_NUMERICHOST:
            asked.append(host)
            go_on.wait(30)
            raise socket.gaierror(socket.EAI_AGAIN, "temporary failure")
        return find("127.0.0.1" if host == "fine" else host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield go_on, asked
    go_on.set()


def test_reactor_names_that_hang_hold_up_nothing_else(tmp_path, hanging_names):
    """Snapshots, passwords and other names go on; stop() does not wait; a name is asked once."""
    go_on, asked = hanging_names
    with _http_member(tmp_path, snapshot_count=5) as server:
        url = server.client_urls[0]
        fine = url.replace("127.0.0.1", "fine")
        ended, answered = [], []

        def call(etcd, url, done):
            return [pyetcd.HttpCall(etcd.reactor, url, "GET", "/version", {}, on_done=done,
                                    connect_timeout_s=30.0) for _ in range(50)]

        urls = [f"http://hang{number}:1" for number in range(8)]
        calls = server.call(lambda etcd: [
            one for url in urls for one in call(etcd, url, ended.append)])
        server.call(lambda etcd: [one.cancel() for one in calls[::2]])
        server.call(lambda etcd: call(etcd, fine, answered.append))
        eventually(lambda: answered == 50 * [None])
        for number in range(12):
            assert _http_keys(server, "PUT", "/a", f"value={number}")[0] in (200, 201)
        eventually(lambda: server.call(lambda etcd: etcd.snapshots.index) > 5)
        _auth_enable(url)
        assert _auth_key(url, "GET", "/", auth=_AUTH_ROOT) == 200
        assert sorted(asked) == [f"hang{number}" for number in range(8)] and not ended
        server.stop()
        assert not go_on.is_set(), "it has not waited"


def test_reactor_calls_that_block_are_bounded():
    """One too many is refused; a bug in one of them ends no thread."""
    kind = pyetcd.WorkKind("test", 2, 3, True)
    reactor, go_on, results = pyetcd.Reactor(), threading.Event(), []

    def work(number):
        go_on.wait(20)
        return 1 // (number - 3)

    for number in range(8):
        reactor.run_blocking(work, number, kind=kind,
                             done=lambda error, result: results.append((error, result)))
    reactor.call_later(0.0, go_on.set)

    def stop_when_done():
        reactor.stop() if len(results) == 8 else reactor.call_later(0.01, stop_when_done)
    stop_when_done()
    reactor.run()
    reactor.close()
    errors = [type(error) for error, _ in results if error is not None]
    assert errors == 3 * [pyetcd.WorkersBusy] + [ZeroDivisionError]


def test_http_watchers_are_limited(http_server, monkeypatch):
    """The next one gets 503; reads and writes go on."""
    monkeypatch.setattr(pyetcd, "WATCHERS_MAX", 2)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            watcher = stack.enter_context(_HttpSocket(http_server))
            watcher.send(_http_get("/v2/keys/w?wait=true"))
            watcher.until(b"\r\n\r\n")
        status, _, body = _http_ask(http_server, "GET", "/v2/keys/w?wait=true")
        assert status == 503 and "watchers wait already" in json.loads(body)["message"]
        assert _http_keys(http_server, "PUT", "/w", "value=1")[0] == 201


def test_http_paths_of_watchers_are_limited(http_server, monkeypatch):
    """Their bytes together; every way that a watch ends makes room again."""
    monkeypatch.setattr(pyetcd, "WATCHED_BYTES_MAX", 10_000)
    path = "/v2/keys/" + 3_000 * "w"

    def watched():
        return http_server.call(lambda etcd: etcd.store.hub.watched_bytes)

    with contextlib.ExitStack() as stack:
        for more in ("", "&stream=true", ""):
            watcher = stack.enter_context(_HttpSocket(http_server))
            watcher.send(_http_get(f"{path}?wait=true{more}"))
            watcher.until(b"\r\n\r\n")
        status, _, body = _http_ask(http_server, "GET", path + "?wait=true")
        assert status == 503 and "take too much memory" in json.loads(body)["message"]
        assert _http_ask(http_server, "PUT", path, b"value=1", _HTTP_FORM)[0] == 201
        assert 3_000 < watched() < 4_000, "two had their event"
    eventually(lambda: watched() == 0)
    assert http_server.call(lambda etcd: etcd.store.stats.watchers) == 0


def test_http_bytes_that_wait_for_a_leader_are_limited(http_server, monkeypatch):
    """Large writes wait until there is as much as may; the next one gets 503 at once."""
    monkeypatch.setattr(pyetcd, "QUEUED_BYTES_MAX", 100_000)
    answers = []
    # As without a leader.
    monkeypatch.setattr(pyetcd.EtcdServer, "_propose_queued", lambda etcd: False)

    def put(etcd):
        for number in range(4):
            request = pyetcd.Request(method="PUT", path=f"/1/{number}", val=60_000 * "x")
            etcd.do(request, answers.append)
        return list(answers)

    refused = http_server.call(put)
    assert [type(error) for error in refused] == 2 * [pyetcd.TooManyRequests]
    monkeypatch.undo()
    eventually(lambda: len(answers) == 4)
    assert http_server.call(lambda etcd: etcd._queued_bytes) == 0
    late = pyetcd.LateProposals(1.0)
    for _ in range(300):
        late.add([pyetcd.Entry(0, data=bytes(1 << 20))], 1.0)
    assert len(late) == 65
    late.expire(9.0)
    late.add([pyetcd.Entry(0, data=b"x")], 9.0)
    assert [entry.data for entry in late.take(9.0)] == [b"x"]


def test_http_pending_requests_are_limited(http_server, monkeypatch):
    """503 says that the write was not tried."""
    monkeypatch.setattr(pyetcd, "PROPOSALS_PENDING_MAX", 0)
    status, body = _http_keys(http_server, "PUT", "/a", "value=1")
    assert (status, body["errorCode"], body["cause"]) == (503, 300, "etcdserver: too many requests")


def test_http_deepest_key_works_everywhere(tmp_path):
    """1,024 elements: listed with all between, in a snapshot, and after a restart."""
    path = "/d" * pyetcd.KEY_DEPTH_MAX
    with _http_member(tmp_path, snapshot_count=3) as server:
        assert _http_keys(server, "PUT", path, "value=1")[0] == 201
        assert _http_keys(server, "PUT", path + "/d", "value=1")[1]["errorCode"] == 210
        _, _, before = _http_ask(server, "GET", "/v2/keys/?recursive=true&sorted=true")
        assert before.count(b'"dir":true') == pyetcd.KEY_DEPTH_MAX and b'"value":"1"' in before
        for i in range(10):
            _http_keys(server, "PUT", "/x", f"value={i}")
        eventually(lambda: server.call(lambda etcd: etcd.snapshots.index))
        _, _, before = _http_ask(server, "GET", "/v2/keys/?recursive=true&sorted=true")
    with _http_member(tmp_path) as server:
        assert _http_ask(server, "GET", "/v2/keys/?recursive=true&sorted=true")[2] == before


@pytest.mark.parametrize("request_bytes", [
    b"GET /version HT", b"PUT /v2/keys/a HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nval",
    b"PUT /v2/keys/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nva",
    _http_get() + b"GET /version HT",
], ids=["head", "body", "chunk", "second"])
def test_http_requests_that_never_end_are_closed(tmp_path, monkeypatch, request_bytes):
    """408 after some time; a connection between two requests may stay."""
    monkeypatch.setattr(pyetcd, "REQUEST_SECONDS_MAX", 0.2)
    monkeypatch.setattr(pyetcd, "SLOW_CHECK_SECONDS", 0.05)
    with _http_member(tmp_path) as server, _HttpSocket(server) as idle, \
            _HttpSocket(server) as client:
        idle.send(_http_get())
        assert idle.answer()[0] == 200
        client.send(request_bytes)
        assert b"HTTP/1.1 408 " in client.rest()
        idle.send(_http_get())
        assert idle.answer()[0] == 200


def test_http_clients_that_do_not_read_are_closed(tmp_path, monkeypatch):
    """Their replies take bounded memory, and in the end none; an idle watch stays."""
    monkeypatch.setattr(pyetcd, "SLOW_CHECK_SECONDS", 0.05)
    with _http_member(tmp_path) as server, _HttpSocket(server) as idle, \
            _HttpSocket(server, receive_buffer=4096) as client:
        idle.send(_http_get("/v2/keys/w?wait=true"))
        idle.until(b"\r\n\r\n")
        _http_keys(server, "PUT", "/big", "value=" + "x" * 1_000_000)
        client.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                client.send(_http_get("/v2/keys/big"))
        listener = server._client_listeners[0]
        eventually(lambda: listener.unread)
        owed = max(connection.pending for connection in list(listener.unread))
        assert owed < 2 * pyetcd.OUTPUT_PAUSE_BYTES + 2_000_000
        monkeypatch.setattr(pyetcd, "UNREAD_SECONDS_MAX", 0.2)
        eventually(lambda: not listener.unread)
        _http_keys(server, "PUT", "/w", "value=1")
        assert idle.event()["node"]["value"] == "1"


@pytest.mark.parametrize(("piece", "is_kept"), [(1, False), (9_000, False), (12_000, True)])
def test_http_clients_that_read_too_slowly_are_closed(piece, is_kept):
    """Who takes so much every 10 s, all the time: 64 KB a minute are enough."""
    reactor, sock = FakeReactor(), _FuzzSocket()
    sock.send = sock.sendmsg = lambda data: piece
    service = pyetcd.Service(reactor, lambda request: None, 1_000, None, None, patient=False)
    connection = service.serve(sock, "client")
    connection.send(bytes(2_000_000))
    for _ in range(60):
        connection.flush()
        service.close_slow()
        reactor.time += 10
    assert connection.closed is not is_kept
    sock.send = len
    connection.flush()
    assert not service.unread


def test_http_answers_to_a_flood_of_http2_frames_are_one_piece():
    """7,000 short ones would hold six times the memory that the budget counts."""
    settings = b"\0\0\0\4\0\0\0\0\0"
    sock = _FuzzSocket([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", settings * 7_000])
    service = pyetcd.Service(
        FakeReactor(), lambda request: None, 1_000, None, None, patient=False)
    connection = service.serve(sock, "client")
    for _ in range(2):
        connection._on_event(selectors.EVENT_READ)
    assert [len(piece) for piece in connection.pieces()] == [9, 9 * 7_000]


def test_http_pipelined_replies_wait_for_a_slow_reader(http_server):
    """More than the output may hold: all come, in order, as the client reads."""
    _http_keys(http_server, "PUT", "/big", "value=" + "x" * 300_000)
    with _HttpSocket(http_server, receive_buffer=4096) as client:
        client.send(b"".join(_http_get(f"/v2/keys/big?n={n}") + _http_get() for n in range(30)))
        for _ in range(30):
            assert len(client.answer()[2]) > 300_000
            assert b"etcdserver" in client.answer()[2]


def test_http_head_cut_inside_its_blank_line_is_not_taken_for_a_request(http_server):
    """Even where it is known, and as long as the request it would make."""
    lines = "PUT /v2/keys/cut HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d"
    form = _HTTP_FORM["Content-Type"]
    size = len(lines % (form, 100)) - 2
    head, body = (lines % (form, size)).encode(), b"value=" + b"y" * (size - 6)
    assert len(head) == size + 2 and 100 <= size < 1_000
    with _HttpSocket(http_server) as client:
        client.send(head + b"\r\n\r\n" + body)
        assert client.answer()[0] == 201            # the head is known from now on
        before = http_server._client_listeners[0].received_bytes
        client.send(head + b"\r")
        eventually(lambda: http_server._client_listeners[0].received_bytes > before)
        client.send(b"\n\r\n" + body)
        status, _, answer = client.answer()
        assert status == 200 and json.loads(answer)["node"]["value"] == "y" * (size - 6)


def test_http_half_a_request_holds_up_nobody(http_server):
    """It is served when the rest has come, byte by byte if need be."""
    raw = (b"PUT /v2/keys/slow HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n"
           b"Content-Type: application/x-www-form-urlencoded\r\n\r\nvalue=1")
    with _HttpSocket(http_server) as client:
        client.send(raw[:-10])
        assert _http_keys(http_server, "PUT", "/fast", "value=1")[0] == 201
        for byte in raw[-10:]:
            client.send(bytes([byte]))
        assert client.answer()[0] == 201


def test_http_pipelined_requests_are_answered_in_order(http_server):
    """Reads do not overtake the write before them."""
    put = (b"PUT /v2/keys/p HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n"
           b"Content-Type: application/x-www-form-urlencoded\r\n\r\n%b")
    with _HttpSocket(http_server) as client:
        for number in range(20):
            body = b"value=%d" % number
            client.send(put % (len(body), body) + _http_get("/v2/keys/p"))
        for number in range(20):
            assert client.answer()[0] in (200, 201)
            assert json.loads(client.answer()[2])["node"]["value"] == str(number)


def test_http_pipelined_writes_wait_for_no_timer(tmp_path, monkeypatch):
    """A write that is read in the middle of a turn is proposed at once, not at the next tick."""
    put = (b"PUT /v2/keys/p HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n"
           b"Content-Type: application/x-www-form-urlencoded\r\n\r\nvalue=1")
    monkeypatch.setattr(pyetcd, "SYNC_SECONDS", 3600.0)
    with _http_member(tmp_path, heartbeat_ms=10_000, election_ms=50_000) as server:
        with _HttpSocket(server) as client:         # which waits 10 s for an answer
            client.send(put * 30)
            for _ in range(30):
                assert client.answer()[0] in (200, 201)


def test_http_chunked_bodies_and_expect_continue_work(http_server):
    """Extensions and trailers of chunks are skipped."""
    head = ("PUT /v2/keys/c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            "Content-Type: application/x-www-form-urlencoded\r\n")
    with _HttpSocket(http_server) as client:
        client.send(head.encode() + b"\r\n3;x=y\r\nval\r\n4\r\nue=1\r\n0\r\nT: x\r\n\r\n")
        assert json.loads(client.answer()[2])["node"]["value"] == "1"
        client.send(head.encode() + b"Expect: 100-continue\r\n\r\n")
        assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        client.send(b"7\r\nvalue=2\r\n0\r\n\r\n")
        assert json.loads(client.answer()[2])["node"]["value"] == "2"


@pytest.mark.parametrize(("version", "header"), [("1.0", "X: y"), ("1.1", "Connection: close")])
def test_http_connection_ends_when_asked_to(http_server, version, header):
    """Writes and reads; a complete answer first."""
    _http_keys(http_server, "PUT", "/a", "value=1")
    for path in ("/v2/keys/a", "/v2/keys/a?quorum=true", "/version"):
        with _HttpSocket(http_server) as client:
            client.send(_http_get(path, header, version=version))
            answer = client.rest()
        assert answer.startswith(f"HTTP/{version} 200 ".encode())
        assert answer.endswith(b"}\n" if path != "/version" else b"}")


@pytest.mark.parametrize("path", ["/v2/snapshot", "/ui/keys/"])
@pytest.mark.parametrize(("version", "header"), [("1.0", "X: y"), ("1.1", "Connection: close")])
def test_http_connection_ends_after_a_reply_in_pieces(http_server, version, header, path):
    """Its end may come in a later turn than its last piece, and has no bytes of its own."""
    _http_keys(http_server, "PUT", "/a", "value=1")
    with _HttpSocket(http_server) as client:
        client.send(_http_get(path, header, version=version))
        assert client.rest().startswith(f"HTTP/{version} 200 ".encode())


def test_http_clients_that_vanish_leave_nothing_behind(http_server):
    """Half requests, unread answers and watches of clients that are gone."""
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for number in range(50):
        with _HttpSocket(http_server) as client:
            client.send([
                b"GET /v2/ke", _http_get("/v2/keys/x?wait=true"), _http_get() * 50,
                b"PUT /v2/keys/a HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nvalue",
            ][number % 4])
    eventually(lambda: http_server.call(lambda etcd: etcd.store.stats.watchers) == 0)
    if before:
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 5)
    assert _http_ask(http_server, "GET", "/version")[0] == 200
