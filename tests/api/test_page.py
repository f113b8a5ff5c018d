"""The page: what its server says, and what a reader sees in headless Chromium."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import logging
import re
import threading
import urllib.parse

import pytest
import requests

import pyetcd
from tests.kit.basics import ROOT, eventually
from tests.kit.browser import Page, start_browser
from tests.kit.http import _http_ask, _http_keys, _http_member
from tests.kit.users import _auth_call, _auth_enable

_OURS = {"X-Pyetcd-Page": "1"}
_FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def _rows(server, path, **query):
    """Return (rows, last line) of an answer to /ui/keys."""
    _, _, body = _http_ask(server, "GET", f"/ui/keys{path}?{urllib.parse.urlencode(query)}")
    *parts, end = map(json.loads, body.splitlines())
    return [row for part in parts for row in part], end


# -- the server's part -------------------------------------------------------


def test_page_is_one_small_file_that_may_run_its_own_script_only(http_server):
    status, headers, body = _http_ask(http_server, "GET", "/ui")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert len(body) <= 60 << 10
    policy = headers["Content-Security-Policy"]
    for tag in ("style", "script"):
        inside = re.search(f"<{tag}>(.*?)</{tag}>".encode(), body, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(inside).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and "default-src 'none'" in policy
    assert not re.search(rb'(?:src|href)="(?:https?:)?//', body)
    assert _http_ask(http_server, "HEAD", "/ui")[0] == 200
    assert b" style=" not in body and not re.search(rb"\son\w+=", body.split(b"<script>")[0])


@pytest.mark.parametrize("name", ["html", "css", "js"])
def test_page_is_built_from_its_files(name):
    """build.py puts them into the module as they are."""
    source = ROOT / "src" / "pyetcd" / "api" / "page" / f"page.{name}"
    assert getattr(pyetcd, f"PAGE_{name.upper()}") == source.read_text(encoding="utf-8")


@pytest.mark.parametrize("accept, status", [
    ("text/html,application/xhtml+xml,*/*;q=0.8", 302), ("*/*", 404), ("", 404),
    ("application/json", 404),
])
def test_page_is_where_browsers_are_sent_from_the_root(http_server, accept, status):
    found, headers, body = _http_ask(http_server, "GET", "/", headers={"Accept": accept})
    assert found == status
    assert headers["Location"] == ("/ui" if status == 302 else None)
    assert status == 302 or body == b"404 page not found\n"


def test_page_can_be_turned_off(tmp_path):
    with _http_member(tmp_path, ui="false") as server:
        for path in ("/ui", "/ui/status", "/ui/keys/", "/ui/log", "/"):
            assert _http_ask(server, "GET", path, headers={"Accept": "text/html"})[0] == 404


def test_page_is_not_for_peers(http_server):
    for path in ("/ui", "/ui/status"):
        assert _http_ask(http_server, "GET", path, peer=True)[0] == 404


@pytest.mark.parametrize("ui, headers, status", [
    ("true", {}, 201), ("true", _OURS, 201),
    ("readonly", {}, 201), ("readonly", _OURS, 403), ("false", _OURS, 403),
    ("true", {"Referer": "http://host:1/ui", "Host": "host:1"}, 403),
    ("true", {"Referer": "http://host:1/ui", "Host": "host:1", **_OURS}, 201),
], ids=str)
def test_page_writes_with_its_header_and_where_it_may(tmp_path, ui, headers, status):
    """Its header is what no form can send; a client without a browser needs none."""
    with _http_member(tmp_path, ui=ui) as server:
        answer = _http_ask(server, "PUT", "/v2/keys/a", "value=1", {**_FORM, **headers})
        assert answer[0] == status, answer
        assert _http_ask(server, "GET", "/v2/keys/a", headers=headers)[0] == (
            200 if status == 201 else 404)
        for method, path in (("DELETE", "/v2/keys/a"), ("POST", "/new"), ("PUT", "/v2/auth/enable"),
                             ("POST", "/v2/members"), ("DELETE", "/v2/members/1")):
            refused = _http_ask(server, method, path, headers=headers)[0] == 403
            assert refused is (status == 403), path


@pytest.mark.parametrize("headers, status", [
    ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Sec-Fetch-Site": "same-origin"}, 201), ({"Sec-Fetch-Site": "none"}, 201),
    ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
    ({"Referer": "http://other/ui"}, 201), ({"Origin": "http://a.example"}, 201),
    ({"Origin": "http://x", "Host": "x"}, 201), ({}, 201),
], ids=str)
def test_page_elsewhere_cannot_post_a_form(tmp_path, headers, status):
    """No browser asks us before it sends one; -cors names who may."""
    with _http_member(tmp_path, cors=("http://a.example",)) as server:
        assert _http_ask(
            server, "POST", "/v2/keys/a", "value=1", {**_FORM, **headers})[0] == status


def test_page_lists_a_directory_without_its_values(http_server):
    for key, value in (("d/b", "2"), ("d/a", "x" * 100), ("d/_h", "3"), ("d/s/t", "4")):
        _http_keys(http_server, "PUT", "/" + key, f"value={value}")
    _http_keys(http_server, "PUT", "/d/long", "value=" + "y" * 10_000)
    rows, end = _rows(http_server, "/d")
    assert [row[:4] for row in rows] == [
        ["b", 0, "2", 1], ["a", 0, "x" * 60, 100], ["s", 1, "", 1], ["long", 0, "", 10_000]]
    assert (end["looked"], end["more"]) == (5, False)
    assert [row[0] for row in _rows(http_server, "/d", hidden="")[0]] == [
        "b", "a", "_h", "s", "long"]
    for path, code in (("/none", 100), ("/d/a", 104)):
        assert json.loads(_http_ask(http_server, "GET", "/ui/keys" + path)[2])["errorCode"] == code


@pytest.mark.parametrize("query, found", [
    ({"q": "NEEDLE"}, ["/k/needle", "/k/short", "/k/long", "/k/cut"]),
    ({"q": "needle", "in": "key"}, ["/k/needle"]),
    ({"q": "needle", "in": "value"}, ["/k/short", "/k/long", "/k/cut"]),
    ({"q": '<"é', "in": "value"}, ["/k/json"]),
    ({"q": "needle", "in": "key", "hidden": ""}, ["/k/needle", "/k/_needle"]),
    ({"q": "nothing"}, []),
], ids=str)
def test_page_search_finds_keys_and_values(http_server, query, found):
    """Whatever their case; also in long values, which are kept as JSON in pieces of 32 KiB."""
    values = {"needle": "", "short": "a nEEdle", "long": "x" * 50_000 + "Needle", "none": "nee dle",
              "cut": "x" * (32_768 - 3) + "needle" + "y" * 9_000, "_needle": "",
              "json": "z" * 5_000 + '<"É'}
    for key, value in values.items():
        form = urllib.parse.urlencode({"value": value})
        assert _http_keys(http_server, "PUT", f"/k/{key}", form)[0] == 201
    assert [row[0] for row in _rows(http_server, "/", **query)[0]] == found


def test_page_listings_and_searches_end_at_a_limit(http_server):
    def fill(etcd):
        for number in range(3_000):
            etcd.store.set(f"/1/many/{number:04}", value=f"v{number}", now_ns=1)

    http_server.call(fill)
    rows, end = _rows(http_server, "/", q="v")
    assert (len(rows), end["more"]) == (500, True)
    rows, end = _rows(http_server, "/many")
    assert (len(rows), len({row[0] for row in rows}), end["more"]) == (3_000, 3_000, False)


def test_page_walk_of_a_directory_that_goes_away_ends(http_server):
    """A walk in slices takes each node as it is when its turn comes."""
    def walk(etcd):
        for number in range(10):
            etcd.store.set(f"/1/d/{number}/x", value="v", now_ns=1)
        nodes = etcd.store.below("/1/d", recursive=True, hidden=False)
        first = [next(nodes)[0] for _ in range(3)]
        etcd.store.set("/1/d/9/y", value="v", now_ns=1)
        etcd.store.delete("/1/d/5", recursive=True, now_ns=1)
        return first, [found[0] for found in nodes if found]

    first, rest = http_server.call(walk)
    assert first == ["/1/d/0", "/1/d/0/x", "/1/d/1"]
    assert "/1/d/9/y" in rest and not any("/5" in path for path in rest)


def test_page_samples_count_what_happens(http_server):
    def samples():
        return json.loads(_http_ask(http_server, "GET", "/ui/status")[2])["samples"]

    for number in range(30):
        _http_keys(http_server, "PUT", f"/a/{number}", "value=1")
        _http_keys(http_server, "GET", f"/a/{number}")
    eventually(lambda: sum(sample[2] for sample in samples()) > 20)
    eventually(lambda: samples()[-1][7] == 31)      # the keys, and their directory
    busiest = max(samples(), key=lambda sample: sample[1])
    assert 0 < busiest[3] <= busiest[4] and busiest[5] > 0
    last = samples()[-1][0]
    rest = json.loads(_http_ask(http_server, "GET", f"/ui/status?since={last}")[2])["samples"]
    assert all(sample[0] > last for sample in rest)


@pytest.mark.parametrize("counts, share, value", [
    ([0, 0, 0, 0], 0.5, 0.0), ([4, 0, 0, 0], 0.5, 0.5), ([0, 4, 0, 0], 0.5, 1.5),
    ([1, 1, 0, 2], 0.5, 2.0), ([1, 0, 0, 9], 0.99, 3.0), ([99, 1, 0, 0], 0.99, 1.0),
], ids=str)
def test_page_quantiles_come_from_buckets(counts, share, value):
    assert pyetcd.quantile([1.0, 2.0, 3.0], counts, share) == pytest.approx(value)


def test_page_log_has_the_last_lines_for_root_only(http_server):
    log = logging.getLogger("pyetcd.etcdserver")
    for number in range(600):
        log.warning("line %d\nof the log %s", number, "x" * 2_000 if number == 599 else "")
    lines = json.loads(_http_ask(http_server, "GET", "/ui/log")[2])["lines"]
    assert len(lines) == 500
    assert lines[-2][1:] == ["WARNING", "etcdserver", "line 598\\nof the log "]
    assert len(lines[-1][3]) == 1_000
    _auth_enable(http_server.client_urls[0], guest=True)
    assert _http_ask(http_server, "GET", "/ui/log")[0] == 401
    assert requests.get(
        http_server.client_urls[0] + "/ui/log", auth=("root", "rootpw"), timeout=30).ok


def test_page_listings_are_for_those_who_may_read(http_server):
    url = http_server.client_urls[0]
    _http_keys(http_server, "PUT", "/open/a", "value=1")
    _http_keys(http_server, "PUT", "/shut/a", "value=1")
    _auth_enable(url)
    grant = {"role": "guest", "grant": {"kv": {"read": ["/open/*", "/open"], "write": []}}}
    assert _auth_call(url, "PUT", "roles/guest", grant)[0] == 200
    for path, status in (("/open", 200), ("/open?q=a", 200), ("/shut", 401), ("/", 401),
                         ("/?q=a", 401)):
        assert _http_ask(http_server, "GET", "/ui/keys" + path)[0] == status, path


def test_page_overview_says_what_is_wrong(tmp_path):
    """Members that are silent, and a quorum that is lost; asked while somebody looks."""
    with pyetcd.LocalCluster(3, str(tmp_path)) as cluster:
        one, two, three = cluster.members

        def status():
            return requests.get(one.client_url + "/ui/status", timeout=30).json()

        def rows():
            return {row["name"]: row for row in status()["members"]}

        eventually(lambda: all("term" in row for row in rows().values()))
        assert status()["problems"] == []
        assert rows()[two.name]["index"] > 0 and rows()[two.name]["clientURLs"] == [two.client_url]
        three.kill()
        eventually(lambda: any(
            re.fullmatch(rf"{three.name} has not answered for \d+ s\.", said)
            for said in status()["problems"]))
        two.kill()
        eventually(lambda: any(
            said.startswith("Only 1 of 3 members can be reached") for said in status()["problems"]))
        three.start(0)
        eventually(lambda: not rows()[three.name]["silent"])


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"term":"x","index":true,"evil":1}', b"\xff"])
def test_page_believes_no_nonsense_of_other_members(body):
    assert pyetcd.read_report(body) == {}


def test_page_tokens_tell_their_age():
    """A UUID of version 7 (RFC 9562 §5.7)."""
    token = pyetcd.make_token(1_796_000_000_123 * 10**6)
    assert int(token[:12], 16) == 1_796_000_000_123
    assert re.fullmatch("[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}", token)


# -- what a reader sees ------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    driver = start_browser()
    yield driver
    driver.quit()


@pytest.fixture
def member(tmp_path):
    with pyetcd.LocalMember(directory=str(tmp_path)) as member:
        yield member


def _put(member, key, value=None, **form):
    if value is not None:
        form["value"] = value
    answer = requests.put(f"{member.client_url}/v2/keys{key}", data=form, timeout=30)
    assert answer.ok, answer.text


def _value(member, key):
    answer = requests.get(f"{member.client_url}/v2/keys{key}", timeout=30).json()
    return answer["node"]["value"] if "node" in answer else None


def _rows_shown(page):
    return page.run("return [...document.querySelectorAll('.row')].map(row => row.innerText)")


def test_page_in_a_browser_shows_the_member_and_its_charts(browser, member):
    """From the root; nothing is refused by the page's own policy."""
    _put(member, "/a", "1")
    browser.get(member.client_url + "/")
    page = Page(browser, browser.current_url.removesuffix("/ui"))
    assert page.url == member.client_url
    page.shows("healthy", "#health")
    page.shows("leader", "#members")
    assert member.id in page.text("#members") and member.client_url in page.text("#members")
    page.until("return samples.length && document.querySelector('path.area').getAttribute('d')")
    assert page.text("#charts").count("peak") == 6
    page.press("5")
    page.shows("Users and roles are off")
    page.press("6")
    page.until("return !document.getElementById('log').hidden")
    assert page.complaints() == []


def test_page_in_a_browser_edits_a_key(browser, member):
    _put(member, "/conf/web", '{"a":1}')
    page = Page(browser, member.client_url, "keys")
    page.until("return tree.flat.length")
    page.press("/")                     # search, and back to the tree
    page.run("document.getElementById('tree').focus()")
    from selenium.webdriver.common.keys import Keys
    page.press(Keys.ARROW_RIGHT, Keys.NULL)
    page.until("return tree.flat.length === 2")
    page.press(Keys.ARROW_DOWN, Keys.ENTER)
    page.shows("valid JSON", "#kind")
    page.click("button", "Format")
    assert page.run("return document.getElementById('value').value") == '{\n  "a": 1\n}'
    page.type("#value", '{"a": 2')
    page.shows("not JSON", "#kind")
    page.type("#value", '{"a": 2}')
    page.click("#save")
    page.shows("Saved /conf/web", "#toasts")
    assert _value(member, "/conf/web") == '{"a": 2}'
    eventually(lambda: len(page.text("#history").split("compareAndSwap")) == 2)
    page.click("#history li:last-child button", "Use")
    page.click("#save")
    eventually(lambda: _value(member, "/conf/web") == '{"a":1}')


def test_page_in_a_browser_shows_a_history_that_moves_on(browser, tmp_path):
    """The oldest events leave the history between two requests of the page."""
    with pyetcd.LocalMember(directory=str(tmp_path), history_events=40) as member:
        _put(member, "/a", "0")
        stopped = threading.Event()

        def write():
            for number in itertools.count(1):
                if stopped.is_set():
                    return
                _put(member, "/noise" if number % 5 else "/a", str(number))

        writer = threading.Thread(target=write)
        writer.start()
        try:
            eventually(lambda: member.call(lambda etcd: etcd.store.current_index) > 100)
            page = Page(browser, member.client_url, "keys/a")
            page.shows("set", "#history")
        finally:
            stopped.set()
            writer.join()


def test_page_in_a_browser_keeps_what_another_wrote_first(browser, member):
    _put(member, "/a", "one\ntwo\nthree", ttl=1_000)
    page = Page(browser, member.client_url, "keys/a")
    page.type("#value", "one\nmine\nthree")
    _put(member, "/a", "one\ntheirs\nthree")
    page.shows("was changed elsewhere", "#changed")
    page.click("#save")
    page.shows("The key was changed meanwhile", "#dialog")
    assert page.text("#diff").splitlines() == ["  one", "- theirs", "+ mine", "  three"]
    assert _value(member, "/a") == "one\ntheirs\nthree"
    page.click("#dialog button", "Take theirs")
    page.holds("one\ntheirs\nthree")
    page.type("#value", "mine")
    _put(member, "/a", "theirs")
    page.click("#save")
    page.click("#dialog button", "Save mine over it")
    eventually(lambda: _value(member, "/a") == "mine")
    page.holds("mine")
    page.until("return opened.node && opened.node.value === 'mine'")
    page.type("#value", "again")
    requests.delete(member.client_url + "/v2/keys/a", timeout=30)
    page.click("#save")
    page.shows("deleted meanwhile", "#dialog")
    page.click("#dialog button", "Create")
    eventually(lambda: _value(member, "/a") == "again")


def test_page_in_a_browser_creates_deletes_and_undoes(browser, member):
    page = Page(browser, member.client_url, "keys")
    page.shows("No keys yet", "#tree")
    page.press("n")
    page.type("#newkey", "/d/new")
    page.type("#newvalue", "hello")
    page.click("#dialog button", "Create")
    eventually(lambda: _value(member, "/d/new") == "hello")
    page.holds("hello")
    _put(member, "/d/other", "x", ttl=500)
    page.run("location.hash = '#/keys/d'")
    page.click("#detail button", "Delete")
    page.shows("With the 2 keys in it", "#dialog")
    page.click("#dialog button", "Cancel")
    assert _value(member, "/d/new") == "hello"
    page.click("#detail button", "Delete")
    page.click("#dialog button", "Delete")
    eventually(lambda: _value(member, "/d/new") is None)
    page.click("#toasts button", "Undo")
    eventually(lambda: _value(member, "/d/other") == "x")
    node = requests.get(member.client_url + "/v2/keys/d/other", timeout=30).json()["node"]
    assert _value(member, "/d/new") == "hello" and 400 < node["ttl"] <= 500


def test_page_in_a_browser_takes_no_answer_of_the_dialog_before(browser, member):
    """The event of a dialog that was closed comes when the next one is open."""
    page = Page(browser, member.client_url, "keys")
    page.run("window.answers = [];"
             "const ask = title => choose(title, [], ['ok', 'Do it']).then(a => answers.push(a));"
             "ask('first'); document.querySelector('#dialog button').click(); ask('second')")
    page.shows("second", "#dialog")
    page.until("return answers.length === 1")
    page.click("#dialog button", "Do it")
    assert page.until("return answers.length === 2 && answers") == ["", "ok"]
    page.run("choose('third', []).then(answer => answers.push(answer))")
    page.press("\ue00c")                # Escape
    assert page.until("return answers.length === 3 && answers")[2] == ""


def test_page_in_a_browser_counts_down_and_copies(browser, member):
    _put(member, "/it's", "a 'b'", ttl=100)
    page = Page(browser, member.client_url, "keys/it's")
    first = page.until("const node = document.querySelector('[data-expires]');"
                       " return node && node.innerText")
    eventually(lambda: page.text("[data-expires]") not in ("", first))
    assert re.fullmatch(r"\d+ s", page.text("[data-expires]"))
    page.type("#value", "c")
    page.click("#save")
    eventually(lambda: _value(member, "/it's") == "c")
    node = requests.get(member.client_url + "/v2/keys/it's", timeout=30).json()["node"]
    assert 0 < node["ttl"] <= 100       # a new value does not make it last for ever
    page.click("#detail button", "Copy as")
    shown = page.text("#dialog")
    assert f"curl '{member.client_url}/v2/keys/it'\\''s' -XPUT --data-urlencode 'value=c'" in shown
    source = shown[shown.index("from pyetcd_client"):]
    code = source[:source.index("client.set")] + 'client.set("/it\'s", "from python")'
    exec(compile(code, "copied", "exec"), {})
    assert 'client.set("/it\'s", "c")' in shown and _value(member, "/it's") == "from python"


def test_page_in_a_browser_shows_scripts_as_text_and_bytes_as_hex(browser, member):
    evil = "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
    _put(member, "/<img src=x onerror=hacked=1>", evil)
    _put(member, "/plain", evil)
    requests.put(member.client_url + "/v2/keys/raw", b"value=%ffab%00", headers=_FORM, timeout=30)
    page = Page(browser, member.client_url, "keys/plain")
    page.holds(evil)
    assert any("<img src=x" in row for row in _rows_shown(page))
    page.run("location.hash = '#/watch/'")
    page.shows("Watching /")
    eventually(lambda: member.call(lambda etcd: etcd.store.stats.watchers) == 1)
    _put(member, "/plain", evil + "2")
    page.shows("<script>", "#watch")
    page.run("location.hash = '#/keys/raw'")
    page.shows("ef bf bd 61 62 00", ".hex")
    assert page.run("return window.hacked") is None
    page.run("try { document.body.innerHTML = '<b>x</b>' } catch (error) { window.kept = true }")
    assert page.run("return window.kept")


def test_page_in_a_browser_watches_pauses_and_filters(browser, member):
    page = Page(browser, member.client_url, "watch")
    page.type("#watched", "/w")
    page.click("#start")
    page.shows("Watching /w")
    eventually(lambda: member.call(lambda etcd: etcd.store.stats.watchers))
    _put(member, "/w/a", "first")
    _put(member, "/elsewhere", "x")
    page.shows("first", "#events")
    page.click("#pause")
    _put(member, "/w/b", "second")
    page.shows("Go on (1)", "#pause")
    assert "second" not in page.text("#events") and "elsewhere" not in page.text("#events")
    page.click("#pause")
    page.shows("second", "#events")
    page.type("#filter", "w/b")
    eventually(lambda: "first" not in page.text("#events"))
    page.shows("second", "#events")
    page.click("#start", "Stop")
    eventually(lambda: not member.call(lambda etcd: etcd.store.stats.watchers))


def test_page_in_a_browser_tells_of_a_leader_that_was_killed(browser, tmp_path):
    """On another member: who is silent, and who leads now.  On its own: where else to look."""
    with pyetcd.LocalCluster(3, str(tmp_path)) as cluster:
        leader = cluster.leader()
        other, third = (member for member in cluster.members if member is not leader)
        page = Page(browser, other.client_url)
        page.shows("3 of 3 members", "#health")
        leader.kill()
        page.shows(f"{leader.name} has not answered for", "#problems")
        new = cluster.wait_leader()
        page.until("return state.members.some(m => m.leader && m.name === arguments[0])", new.name)
        page.shows("silent", ".member.bad")
        other.kill()
        page.shows("This member has not answered for", "#offline")
        assert third.client_url + "/ui" in page.run(
            "return [...document.querySelectorAll('#offline a')].map(link => link.href)")
        other.start(0)
        page.until("return document.getElementById('offline').hidden")


def test_page_in_a_browser_asks_for_a_login_and_forgets_it(browser, member):
    _put(member, "/secret", "s3cret")
    _auth_enable(member.client_url)
    page = Page(browser, member.client_url, "keys/secret")
    page.shows("Log in", "#dialog")
    assert "s3cret" not in page.run("return document.documentElement.outerHTML")
    page.type("#password", "rootpw")
    page.click("#dialog button", "Log in")
    page.holds("s3cret")
    page.type("#value", "changed")
    page.click("#save")
    page.shows("Saved /secret", "#toasts")
    page.run("location.hash = '#/access'")
    page.shows("root", "#access td")
    page.shows("guest", "#access")
    page.run("location.hash = '#/log'")
    assert page.run("return JSON.stringify([{...localStorage}, {...sessionStorage},"
                    " document.cookie])").count("rootpw") == 0
    page = Page(browser, member.client_url, "log")
    page.shows("Insufficient credentials", "#dialog")


def test_page_in_a_browser_shows_a_user_what_it_may_read(browser, member):
    """Without rights on `/` there is no tree; the key opens by its address, another does not."""
    url = member.client_url
    _put(member, "/app/mine", "m1ne")
    _put(member, "/other", "th3irs")
    _auth_enable(url)
    rights = {"kv": {"read": ["/app/*"], "write": ["/app/*"]}}
    assert _auth_call(url, "PUT", "roles/app", {"role": "app", "permissions": rights})[0] == 201
    assert _auth_call(url, "PUT", "users/nina", {
        "user": "nina", "password": "ninapw", "roles": ["app"]})[0] == 200
    page = Page(browser, url, "keys/app/mine")
    page.type("#user", "nina")
    page.type("#password", "ninapw")
    page.click("#dialog button", "Log in")
    page.holds("m1ne")
    page.shows("A key can be opened by its address", "#tree")
    page.type("#value", "changed")
    page.click("#save")
    page.shows("Saved /app/mine", "#toasts")
    page.run("location.hash = '#/keys/other'")
    page.shows("nina may not do this", "#detail")
    assert "th3irs" not in page.run("return document.documentElement.outerHTML")


def test_page_in_a_browser_that_is_read_only_offers_no_write(browser, tmp_path):
    with pyetcd.LocalMember(directory=str(tmp_path), ui="readonly") as member:
        _put(member, "/a", "1")
        page = Page(browser, member.client_url, "keys/a")
        page.shows("read-only", "header")
        page.until("return document.getElementById('value')")
        assert page.run("return [...document.querySelectorAll('.write')].every(node =>"
                        " !node.offsetParent) && document.getElementById('value').readOnly")
        page.run("ask('PUT', 'v2/keys/a', {form: {value: '2'}}).catch(error => {"
                 " window.said = error.message })")
        assert "readonly" in page.until("return window.said")
        page.run("fetch('/v2/keys/a', {method: 'PUT', body: new URLSearchParams('value=3')})"
                 ".then(reply => { window.status_ = reply.status })")
        assert page.until("return window.status_") == 403
        assert _value(member, "/a") == "1"


def test_page_in_a_browser_shows_100000_keys_of_a_directory(browser, member):
    """The document holds the rows that can be seen, and the server looks at 500 in a turn."""
    def fill(etcd):
        for number in range(100_000):
            etcd.store.set(f"/1/many/key{number:06}", value=f"value {number}", now_ns=1)

    member.call(fill)
    page = Page(browser, member.client_url, "keys")
    page.until("return tree.flat.length")
    page.run("tree.open(0)")
    page.shows("100,001 rows", "#count")
    page.until("return !tree.flat[0].loading")
    assert page.run("return document.querySelectorAll('.row').length") < 100
    page.run("document.getElementById('tree').scrollTop = 1e9")
    eventually(lambda: any("key099999" in row for row in _rows_shown(page)))
    page.type("#query", "key04999")
    page.shows("10 found", "#count")
    page.run("const where = document.getElementById('where'); where.value = 'value';"
             " where.dispatchEvent(new Event('change'))")
    page.type("#query", "value 9999")
    page.shows("11 found", "#count")
    page.run("tree.open(0)")
    page.holds("value 9999")


def test_page_in_a_browser_tree_follows_other_clients(browser, member):
    """In what is loaded; a directory that is closed counts its children."""
    for key in ("/a", "/m", "/open/x", "/closed/x", "/z"):
        _put(member, key, "1")
    page = Page(browser, member.client_url, "keys/open")
    page.run("tree.open(tree.flat.findIndex(node => node.key === '/open'))")
    eventually(lambda: any("x" in row for row in _rows_shown(page)[3:]), what="the open directory")
    eventually(lambda: member.call(lambda etcd: etcd.store.stats.watchers), what="the stream")
    _put(member, "/a", "changed", ttl=500)
    _put(member, "/b/c/d", "1")                     # two new directories
    _put(member, "/open/w", "first")
    _put(member, "/closed/y", "2")
    for key in ("/m", "/open/x"):
        assert requests.delete(f"{member.client_url}/v2/keys{key}", timeout=30).ok
    _put(member, "/open/sub", dir="true")
    for text in ("changed", "b/", "first", "sub/"):
        eventually(lambda text=text: any(text in row for row in _rows_shown(page)), what=text)
    rows = page.run("return tree.flat.map(node => [node.key, Number(node.bytes)])")
    assert rows == [["/a", 7], ["/b", 1], ["/closed", 2], ["/open", 2], ["/open/sub", 0],
                    ["/open/w", 5], ["/z", 1]]
    assert any("min" in row and "changed" in row for row in _rows_shown(page))
    page.run("location.hash = '#/log'")
    eventually(lambda: not member.call(lambda etcd: etcd.store.stats.watchers), what="no stream")
    for number in range(1100):                      # more than the history holds
        member.call(lambda etcd, number=number: etcd.store.set(
            f"/1/open/sub/{number}", value="", now_ns=1))
    _put(member, "/aa", "late")
    page.run("location.hash = '#/keys'")
    eventually(lambda: page.run("return tree.flat.map(node => node.key)")[:2] == ["/a", "/aa"])
    eventually(lambda: ["/open/sub", 1100] in page.run(
        "return tree.flat.map(node => [node.key, node.bytes])"), what="the count")
    assert not page.complaints()


def test_page_in_a_browser_keeps_the_rows_in_view_where_they_are(browser, member):
    for number in range(200):
        _put(member, f"/k{number:03}", "1")
    page = Page(browser, member.client_url, "keys")
    page.shows("200 rows", "#count")
    eventually(lambda: member.call(lambda etcd: etcd.store.stats.watchers), what="the stream")
    where = ("const row = [...document.querySelectorAll('.row')].find(row =>"
             " row.innerText.includes('k100')); return row && row.getBoundingClientRect().top")
    page.run("document.getElementById('tree').scrollTop = 98 * tree.high")
    before = page.until(where)
    _put(member, "/a", "new")
    page.shows("201 rows", "#count")
    assert page.run(where) == before


@pytest.mark.parametrize("value, formatted", [
    ('{"id":12345678901234567890,"x":1.10,"d":1,"d":2}',
     '{\n  "id": 12345678901234567890,\n  "x": 1.10,\n  "d": 1,\n  "d": 2\n}'),
    (' [ { } , [ ] , "a: {b}, \\" c" , [ null,\n-1e3 ] ] ',
     '[\n  {},\n  [],\n  "a: {b}, \\" c",\n  [\n    null,\n    -1e3\n  ]\n]'),
    ("7", "7"),
], ids=["numbers", "brackets", "scalar"])
def test_page_in_a_browser_formats_json_without_a_change(browser, member, value, formatted):
    """JavaScript's own way rounds long numbers, and keeps one of two equal names."""
    _put(member, "/j", value)
    page = Page(browser, member.client_url, "keys/j")
    page.shows("valid JSON", "#kind")
    page.click("#detail button", "Format")
    page.holds(formatted)
    assert json.loads(formatted) == json.loads(value)


def test_page_in_a_browser_keeps_the_ends_of_lines(browser, member):
    """A text area turns CR LF into LF; where it is mixed, no edit could keep it."""
    _put(member, "/crlf", "a\r\nb\r\n")
    _put(member, "/mixed", "a\r\nb\n")
    page = Page(browser, member.client_url, "keys/crlf")
    page.holds("a\nb\n")
    assert page.run("return document.getElementById('save').disabled")
    page.type("#value", "a\nc\n")
    page.click("#save")
    eventually(lambda: _value(member, "/crlf") == "a\r\nc\r\n", what="the save")
    page.run("visit('/mixed')")
    page.shows("61 0d 0a 62 0a", "#detail")


def test_page_in_a_browser_needs_few_connections(browser, member):
    """A browser has six to a server for all its windows: streams end with what they are for."""
    for key in ("/0", "/a", "/b"):
        _put(member, key, "1")

    def watchers():
        return member.call(lambda etcd: etcd.store.stats.watchers)

    page = Page(browser, member.client_url, "keys")
    page.shows("3 rows", "#count")
    page.run("location.hash = '#/keys/a'")
    page.holds("1")
    page.until("return tree.flat[tree.at].key === '/a'")
    eventually(lambda: watchers() == 2, what="the streams of the tree and of the key")
    page.run("location.hash = '#/log'")
    eventually(lambda: watchers() == 0, what="no stream")
    _put(member, "/a", "2")
    page.press("/")                                 # search: the key is still open
    page.shows("was changed elsewhere", "#changed")
    assert page.run("return location.hash") == "#/keys/a"


def test_page_in_a_browser_is_dark_when_the_reader_wants_it(browser, member):
    def is_dark():
        colour = page.run("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) < 200

    page = Page(browser, member.client_url, dark=True)
    assert is_dark()
    page.prefer(dark=False)
    eventually(lambda: not is_dark())
    page.press("tt")                    # as the system has them, light, dark
    eventually(is_dark)
    page = Page(browser, member.client_url)
    assert is_dark()
    page.run("localStorage.clear()")


def test_page_in_a_browser_fits_a_phone(browser, member):
    _put(member, "/a/" + "long" * 30, "x" * 500)
    page = Page(browser, member.client_url, width=360, height=700)
    for view in ("overview", "keys", "watch", "discovery", "access", "log"):
        page.run("location.hash = '#/' + arguments[0]", view)
        page.until("return current === arguments[0]", view)
        page.until("return document.documentElement.scrollWidth <= 360 &&"
                   " document.querySelector('main').scrollWidth <= 360")
    page.run("location.hash = '#/keys/a/' + 'long'.repeat(30)")
    page.until("const node = document.getElementById('value'); return node && node.offsetParent")
    assert not page.run("return document.getElementById('tree').offsetParent")
    page.click(".back")
    page.until("return document.getElementById('tree').offsetParent")
    page.run("tree.open(0)")            # a directory opens in the tree
    page.until("return opened.key === '/a' && document.getElementById('tree').offsetParent")


def test_page_in_a_browser_makes_a_token_and_shows_who_is_missing(browser, member):
    page = Page(browser, member.client_url, "discovery")
    page.shows("No tokens yet", "#tokens")
    page.type("#size", "3")
    page.click("#token")
    page.shows("0 of 3 registered", "#tokens")
    token = re.search("[0-9a-f]{32}", page.text("#tokens"))[0]
    url = f"{member.client_url}/{token}"
    requests.put(url + "/abc", {"value": "m1=http://10.0.0.1:2380"}, timeout=30)
    page.shows("1 of 3 registered", "#tokens")
    page.shows("m1=http://10.0.0.1:2380", "#tokens")
    page.shows("2 missing", "#tokens")
    assert re.search(r"\d+ s old", page.text("#tokens"))
    page.click("summary", "The next member")
    page.shows(f"-discovery {url}", "#tokens")


def test_page_pictures_are_small():
    pictures = sorted((ROOT / "docs").glob("page-*.png"))
    assert len(pictures) >= 4
    assert all(picture.stat().st_size < 100_000 for picture in pictures)
