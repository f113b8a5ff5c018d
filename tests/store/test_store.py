"""Store: one test per sentence of the keys API, on a clock that is passed in."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re
import urllib.parse
import urllib.request
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Type

import pytest

import pyetcd
from pyetcd import Event, Store, Watcher
from tests.kit.basics import TESTDATA
from tests.kit.stores import delete_expired, event_line, store_json

_STORE_NOW = 1_800_000_000 * pyetcd.NS + 123_456_789       # 2027-01-15T08:00:00.123456789Z
_STORE_LATER = _STORE_NOW + 1000 * pyetcd.NS


def _store_in(seconds: float) -> int:
    return _STORE_NOW + int(seconds * pyetcd.NS)


def _store_call(store: Store, verb: str, path: str, **options: Any) -> Event:
    """store.verb("/1" + path), at _STORE_NOW unless the options say when."""
    options.setdefault("now_ns", _STORE_NOW)
    event: Event = getattr(store, verb)("/1" + path, **options)
    return event


def _store_body(event: Event) -> Any:
    line = event_line(event)
    assert line.endswith(b"}\n") and line.count(b"\n") == 1
    return json.loads(line)


def _store_get(store: Store, path: str, **options: Any) -> Any:
    """The node of a GET, after a check that both ways of asking agree."""
    options.setdefault("now_ns", _STORE_NOW)
    line = store_json(store, "/1" + path, **options)
    options.pop("sorted", None)
    event = store.get("/1" + path, **options)
    assert event.action == "get" and event.index == store.current_index
    node = json.loads(line)["node"]
    assert _store_body(event)["node"] == {name: node[name] for name in node if name != "nodes"}
    return node


def _store_keys(node: Any) -> List[str]:
    return [child["key"] for child in node.get("nodes", ())]


def _store_watch(store: Store, path: str, **options: Any) -> Tuple[Watcher, List[Any]]:
    """A watcher and the list that its events' bodies go to."""
    seen: List[Any] = []
    watcher = store.watch("/1" + path, deliver=lambda event: seen.append(_store_body(event)),
                          **options)
    return watcher, seen


def _store_keys_of(events: List[Any]) -> List[Tuple[str, str]]:
    return [(event["action"], event["node"]["key"]) for event in events]


# -- reading


def test_store_get_file_answers_key_value_and_indexes(store: Store) -> None:
    _store_call(store, "set", "/a", value="one")
    assert event_line(store.get("/1/a", now_ns=_STORE_NOW)) == (
        b'{"action":"get","node":{"key":"/a","value":"one","modifiedIndex":1,"createdIndex":1}}\n'
    )


@pytest.mark.parametrize("value", ["x" * 9_000, "ä<" * 9_000, '"' * 9_000], ids=["x", "ä", "q"])
@pytest.mark.parametrize("expires_ns", [0, _STORE_LATER], ids=["", "ttl"])
def test_store_event_of_a_long_value_is_the_plain_one(
    store: Store, value: str, expires_ns: int
) -> None:
    """The way without copies gives the same line, with and without a previous node."""
    def plain(node: Any) -> Any:
        return node and pyetcd.Node(
            node.value, node.created_index, node.modified_index, node.expires_ns)

    for text in (value, value + "2", "short", value):
        event = _store_call(store, "set", "/a", value=text, expires_ns=expires_ns)
        same = pyetcd.Event(
            event.action, event.key, plain(event.node), plain(event.prev), event.index, _STORE_NOW)
        assert event_line(event) == event_line(same)
        history = b"".join(pyetcd.in_pieces(event.history_texts()))
        assert history == "".join(map(str, same.history_texts())).encode()


def test_store_get_writes_an_empty_value(store: Store) -> None:
    _store_call(store, "set", "/a")
    assert _store_get(store, "/a")["value"] == ""


@pytest.mark.parametrize(("path", "error", "cause"), [
    ("/x", pyetcd.KeyNotFound, "/x"),
    ("/x/y/z", pyetcd.KeyNotFound, "/x"),
    ("/d/x/y", pyetcd.KeyNotFound, "/d/x"),
    ("/d/f/x", pyetcd.NotDir, "/d/f"),
    ("/d/f/x/y", pyetcd.NotDir, "/d/f"),
])
@pytest.mark.parametrize("verb", ["get", "update", "compare_and_swap", "delete",
                                  "compare_and_delete"])
def test_store_lookup_error_names_the_first_bad_component(
    store: Store, verb: str, path: str, error: Type[pyetcd.EtcdError], cause: str
) -> None:
    _store_call(store, "set", "/d/f", value="1")
    with pytest.raises(error) as caught:
        _store_call(store, verb, path)
    assert (caught.value.cause, caught.value.index) == (cause, 1)
    assert store.current_index == 1


def test_store_get_lists_children_without_their_nodes(store: Store) -> None:
    _store_call(store, "set", "/d/e/f", value="1")
    node = _store_get(store, "/d")
    assert list(node) == ["key", "dir", "nodes", "modifiedIndex", "createdIndex"]
    assert node["nodes"] == [{"key": "/d/e", "dir": True, "modifiedIndex": 1, "createdIndex": 1}]


def test_store_get_recursive_nests_all_the_way_down(store: Store) -> None:
    for path in ("/d/a", "/d/e/f/g", "/d/e/h"):
        _store_call(store, "set", path, value=path)
    node = _store_get(store, "/d", recursive=True, sorted=True)
    assert _store_keys(node) == ["/d/a", "/d/e"]
    assert _store_keys(node["nodes"][1]) == ["/d/e/f", "/d/e/h"]
    assert node["nodes"][1]["nodes"][0]["nodes"][0]["value"] == "/d/e/f/g"


def test_store_get_sorted_orders_every_level_by_bytes(store: Store) -> None:
    names = ["a", "a.b", "B", "ab", "é", "\U00010000", "\ue000", pyetcd.text_of(b"\xff")]
    for name in names:
        _store_call(store, "set", "/d/s/" + name)
    stored = sorted(names, key=pyetcd.utf8)
    node = store_json(store, "/1/d", recursive=True, sorted=True, now_ns=_STORE_NOW)
    shown = _store_keys(json.loads(node)["node"]["nodes"][0])
    assert shown == ["/d/s/" + name.replace("\udcff", "\ufffd") for name in stored]


def test_store_get_of_a_directory_without_visible_children_has_no_nodes(store: Store) -> None:
    _store_call(store, "set", "/d/_h", value="1")
    _store_call(store, "set", "/e", dir=True)
    assert "nodes" not in _store_get(store, "/d", recursive=True)
    assert "nodes" not in _store_get(store, "/e")


def test_store_root_has_neither_key_nor_indexes(store: Store) -> None:
    assert store_json(store, "/1", now_ns=_STORE_NOW) == b'{"action":"get","node":{"dir":true}}\n'
    _store_call(store, "set", "/a", value="1")
    assert list(_store_get(store, "")) == ["dir", "nodes"]


def test_store_hidden_keys_are_left_out_of_listings_at_any_depth(store: Store) -> None:
    for path in ("/_h", "/a/_b/c", "/a/x_", "/a/.y", "/_d/v", "/_d/_w"):
        _store_call(store, "set", path, value="1")
    root = _store_get(store, "", recursive=True, sorted=True)
    assert _store_keys(root) == ["/a"]
    assert _store_keys(root["nodes"][0]) == ["/a/.y", "/a/x_"]
    assert _store_keys(_store_get(store, "/_d")) == ["/_d/v"]
    assert _store_get(store, "/_h")["value"] == "1"


def test_store_get_does_not_change_when_the_store_does(store: Store) -> None:
    """A quorum read is answered after later entries were applied."""
    _store_call(store, "set", "/d/a", value="1")
    event = store.get("/1/d/a", now_ns=_STORE_NOW)
    listing = store.listing("/1/d", recursive=True, now_ns=_STORE_NOW)
    _store_call(store, "delete", "/d", recursive=True)
    assert _store_body(event)["node"]["value"] == "1"
    listing.work()
    assert json.loads(b"".join(listing.chunks))["node"]["nodes"][0]["value"] == "1"


def test_store_strings_are_escaped_as_by_go(store: Store) -> None:
    _store_call(store, "set", "/<k>", value='&"\\\n\x08\u2028\x7fé' + pyetcd.text_of(b"\xfe"))
    assert store_json(store, "/1/<k>", now_ns=_STORE_NOW).startswith(
        '{"action":"get","node":{"key":"/\\u003ck\\u003e","value":'
        '"\\u0026\\"\\\\\\n\\u0008\\u2028\x7fé\\ufffd"'.encode()
    )


def test_store_value_and_children_are_plain_and_uncounted(store: Store) -> None:
    store.create("/0/members/1/attributes", value="x", now_ns=_STORE_NOW)
    assert store.value("/0/members/1/attributes") == "x"
    assert store.value("/0/members") is None and store.value("/0/nothing") is None
    assert store.children("/0/members") == [("1", True)]
    assert store.children("/0/members/1") == [("attributes", False)]
    assert store.children("/0/members/1/attributes") == store.children("/0/no") == []
    assert (store.stats.gets_success, store.stats.gets_fail) == (0, 0)


# -- set


def test_store_set_of_a_new_key_has_no_prev_node(store: Store) -> None:
    event = _store_call(store, "set", "/a", value="1")
    assert event.is_created and event.index == 1
    assert event_line(event) == (
        b'{"action":"set","node":{"key":"/a","value":"1","modifiedIndex":1,"createdIndex":1}}\n'
    )


def test_store_set_replaces_a_file_as_a_new_node(store: Store) -> None:
    _store_call(store, "set", "/a", value="1")
    event = _store_call(store, "set", "/a", value="2")
    assert not event.is_created
    assert _store_body(event) == {
        "action": "set",
        "node": {"key": "/a", "value": "2", "modifiedIndex": 2, "createdIndex": 2},
        "prevNode": {"key": "/a", "value": "1", "modifiedIndex": 1, "createdIndex": 1},
    }


def test_store_set_makes_parents_with_the_index_of_the_event(store: Store) -> None:
    _store_call(store, "set", "/x")
    _store_call(store, "set", "/a/b/c", expires_ns=_store_in(5))
    for path in ("/a", "/a/b"):
        node = _store_get(store, path)
        assert (node["createdIndex"], node["modifiedIndex"]) == (2, 2)
        assert "ttl" not in node


def test_store_children_coming_and_going_do_not_touch_the_parent(store: Store) -> None:
    _store_call(store, "set", "/d/a")
    _store_call(store, "set", "/d/b")
    _store_call(store, "delete", "/d/a")
    assert _store_get(store, "/d")["modifiedIndex"] == 1


def test_store_set_under_a_file_is_refused_and_makes_nothing(store: Store) -> None:
    _store_call(store, "set", "/f")
    with pytest.raises(pyetcd.NotDir) as caught:
        _store_call(store, "set", "/f/a/b")
    assert caught.value.cause == "/f"
    assert (store.current_index, store.stats.sets_fail, store.stats.create_fail) == (1, 1, 0)


@pytest.mark.parametrize("options", [{}, {"dir": True}, {"value": "x"}, {"refresh": True}],
                         ids=["plain", "dir", "value", "refresh"])
def test_store_set_of_a_directory_is_not_a_file(store: Store, options: Any) -> None:
    _store_call(store, "set", "/d", dir=True)
    with pytest.raises(pyetcd.NotFile) as caught:
        _store_call(store, "set", "/d", **options)
    assert caught.value.cause == "/d"


def test_store_set_dir_replaces_a_file_by_an_empty_directory(store: Store) -> None:
    _store_call(store, "set", "/a", value="1", expires_ns=_store_in(5))
    body = _store_body(_store_call(store, "set", "/a", dir=True, value="ignored"))
    assert body["node"] == {"key": "/a", "dir": True, "modifiedIndex": 2, "createdIndex": 2}
    assert body["prevNode"]["value"] == "1"
    assert not store.has_ttl
    _store_call(store, "set", "/a/b")


def test_store_set_without_ttl_makes_permanent(store: Store) -> None:
    _store_call(store, "set", "/a", expires_ns=_store_in(5))
    _store_call(store, "set", "/a")
    assert not store.has_ttl and delete_expired(store, _STORE_LATER) == []


@pytest.mark.parametrize("verb", ["set", "create", "update", "compare_and_swap", "refresh"])
def test_store_long_values_are_long_whoever_wrote_them(store: Store, verb: str) -> None:
    """They are looked at once, and neither joined nor searched with what stands around them."""
    value = "x" * (pyetcd.LONG_VALUE_CHARS + 1)
    if verb != "create":
        _store_call(store, "set", "/a", value=value if verb == "refresh" else "1")
    options = {"compare_and_swap": {"prev_index": 1}, "refresh": {"refresh": True}}.get(verb, {})
    event = _store_call(
        store, "update" if verb == "refresh" else verb, "/a",
        value="" if verb == "refresh" else value, **options)
    assert isinstance(event.node, pyetcd.LongNode) and event.node.value == value
    assert json.loads(event_line(event))["node"]["value"] == value
    again = Store()
    again.recover(store.save())
    assert isinstance(again.hub.history.events[-1].node, pyetcd.LongNode)
    assert again.save() == store.save()


@pytest.mark.parametrize("text", [
    "".join(map(chr, range(128))) * 3, '"' * 300, "\\" * 300, "\u2028<>&\u2029é" * 100,
    "é" * 200 + pyetcd.text_of(b"\xff") * 9, "\x01\n\t" * 200,
], ids=["ascii", "quotes", "backslashes", "separators", "no UTF-8", "controls"])
def test_store_long_strings_are_escaped_like_short_ones(text: str) -> None:
    """A pass per character that has to be escaped gives what a call for each one does."""
    short = "".join(pyetcd.json_string(char)[1:-1] for char in text)
    assert pyetcd.json_string(text) == f'"{short}"'


@pytest.mark.parametrize("size", [64, 1 << 14, 1 << 18, 1 << 20])
def test_store_snapshot_slices_hold_a_bounded_text_or_one_node(store: Store, size: int) -> None:
    """Counted in characters and not in nodes: 500 values of 256 KB took half a second."""
    for number in range(40):
        _store_call(store, "set", f"/{number % 20}", value="x" * size)
    chunks = list(store.snapshot_chunks())
    assert json.loads(b"".join(chunks))
    assert max(map(len, chunks)) < pyetcd.SNAPSHOT_SLICE_CHARS + 2 * size + 1_000


@pytest.mark.parametrize("verb", ["set", "create"])
def test_store_instant_before_2000_is_permanent_for_set_and_create(
    store: Store, verb: str
) -> None:
    event = _store_call(store, verb, "/a", value="1", expires_ns=pyetcd.EXPIRES_NS_MIN - 1)
    assert event.node.expires_ns == 0 and not store.has_ttl
    event = _store_call(store, verb, "/b", value="1", expires_ns=pyetcd.EXPIRES_NS_MIN)
    assert event.node.expires_ns and store.has_ttl


@pytest.mark.parametrize("verb", ["update", "compare_and_swap"])
def test_store_instant_before_2000_expires_for_update_and_swap(store: Store, verb: str) -> None:
    _store_call(store, "set", "/a", value="1")
    wrapped = _STORE_NOW - 9_223_372_036 * pyetcd.NS
    body = _store_body(_store_call(store, verb, "/a", value="2", expires_ns=wrapped))
    assert body["node"]["ttl"] == -9_223_372_036
    assert body["node"]["expiration"].startswith("1734-")
    assert len(delete_expired(store, _STORE_NOW)) == 1


# -- create


def test_store_create_makes_a_new_key(store: Store) -> None:
    event = _store_call(store, "create", "/a/b", value="1")
    assert event.is_created
    assert _store_body(event) == {"action": "create", "node": {
        "key": "/a/b", "value": "1", "modifiedIndex": 1, "createdIndex": 1}}


@pytest.mark.parametrize("path", ["/f", "/d"])
def test_store_create_refuses_what_exists(store: Store, path: str) -> None:
    _store_call(store, "set", "/f")
    _store_call(store, "set", "/d", dir=True)
    with pytest.raises(pyetcd.NodeExists) as caught:
        _store_call(store, "create", path)
    assert (caught.value.cause, caught.value.index) == (path, 2)


def test_store_create_unique_appends_the_index_in_20_digits(store: Store) -> None:
    _store_call(store, "set", "/a")
    assert _store_call(store, "create", "/q", unique=True).key == "/1/q/00000000000000000002"
    assert _store_call(store, "create", "", unique=True).key == "/1/00000000000000000003"
    event = _store_call(store, "create", "/_q", unique=True, dir=True)
    assert event.node.children is not None


def test_store_create_unique_on_a_file_is_not_a_directory(store: Store) -> None:
    _store_call(store, "set", "/f")
    with pytest.raises(pyetcd.NotDir) as caught:
        _store_call(store, "create", "/f", unique=True)
    assert caught.value.cause == "/f"
    assert (store.stats.create_fail, store.stats.sets_fail) == (1, 1)


# -- update, compare and swap


def test_store_update_keeps_created_and_takes_value_or_nothing(store: Store) -> None:
    _store_call(store, "set", "/a", value="1", expires_ns=_store_in(9))
    body = _store_body(_store_call(store, "update", "/a"))
    assert body["action"] == "update"
    assert body["node"] == {"key": "/a", "value": "", "modifiedIndex": 2, "createdIndex": 1}
    assert body["prevNode"]["ttl"] == 9
    assert not store.has_ttl


def test_store_update_of_a_directory_changes_only_its_ttl(store: Store) -> None:
    _store_call(store, "set", "/d/a", value="1")
    body = _store_body(_store_call(store, "update", "/d", expires_ns=_store_in(9)))
    assert body["node"]["modifiedIndex"] == 2 and body["node"]["ttl"] == 9
    assert "nodes" not in body["prevNode"] and "ttl" not in body["prevNode"]
    node = _store_get(store, "/d")
    assert (node["modifiedIndex"], node["ttl"], _store_keys(node)) == (1, 9, ["/d/a"])


def test_store_update_of_a_directory_with_value_is_not_a_file(store: Store) -> None:
    _store_call(store, "set", "/d", dir=True)
    with pytest.raises(pyetcd.NotFile) as caught:
        _store_call(store, "update", "/d", value="x")
    assert caught.value.cause == "/d"


@pytest.mark.parametrize(("prev", "cause"), [
    ({"prev_value": "x"}, "[x != 1]"),
    ({"prev_index": 7}, "[7 != 1]"),
    ({"prev_value": "x", "prev_index": 7}, "[x != 1] [7 != 1]"),
    ({"prev_value": "1", "prev_index": 7}, "[7 != 1]"),
    ({"prev_value": "x", "prev_index": 1}, "[x != 1]"),
], ids=["value", "index", "both", "only-index", "only-value"])
@pytest.mark.parametrize("verb", ["compare_and_swap", "compare_and_delete"])
def test_store_compare_failure_shows_given_and_stored(
    store: Store, verb: str, prev: Any, cause: str
) -> None:
    _store_call(store, "set", "/a", value="1")
    with pytest.raises(pyetcd.CompareFailed) as caught:
        _store_call(store, verb, "/a", **prev)
    assert (caught.value.cause, caught.value.index) == (cause, 1)


def test_store_compare_and_swap_updates_when_both_hold(store: Store) -> None:
    _store_call(store, "set", "/a", value="1")
    event = _store_call(store, "compare_and_swap", "/a", prev_value="1", prev_index=1, value="2")
    assert _store_body(event) == {
        "action": "compareAndSwap",
        "node": {"key": "/a", "value": "2", "modifiedIndex": 2, "createdIndex": 1},
        "prevNode": {"key": "/a", "value": "1", "modifiedIndex": 1, "createdIndex": 1},
    }
    with pytest.raises(pyetcd.CompareFailed):
        _store_call(store, "compare_and_swap", "/a", prev_index=1)


@pytest.mark.parametrize("verb", ["compare_and_swap", "compare_and_delete"])
def test_store_compare_of_a_directory_is_not_a_file(store: Store, verb: str) -> None:
    _store_call(store, "set", "/d/a")
    with pytest.raises(pyetcd.NotFile) as caught:
        _store_call(store, verb, "/d", prev_index=1)
    assert caught.value.cause == "/d"


# -- delete


def test_store_delete_file_whatever_the_flags(store: Store) -> None:
    for options in ({}, {"dir": True}, {"recursive": True}):
        _store_call(store, "set", "/a", value="1")
        index = store.current_index
        body = _store_body(_store_call(store, "delete", "/a", **options))
        assert body == {
            "action": "delete",
            "node": {"key": "/a", "modifiedIndex": index + 1, "createdIndex": index},
            "prevNode": {"key": "/a", "value": "1", "modifiedIndex": index, "createdIndex": index},
        }


def test_store_delete_directory_needs_dir_and_an_empty_one(store: Store) -> None:
    _store_call(store, "set", "/d/_h")
    with pytest.raises(pyetcd.NotFile) as not_file:
        _store_call(store, "delete", "/d")
    with pytest.raises(pyetcd.DirNotEmpty) as not_empty:
        _store_call(store, "delete", "/d", dir=True)
    assert not_file.value.cause == not_empty.value.cause == "/d"
    _store_call(store, "delete", "/d/_h")
    assert _store_body(_store_call(store, "delete", "/d", dir=True))["node"]["dir"] is True


def test_store_delete_recursive_is_one_event(store: Store) -> None:
    for path in ("/d/a", "/d/e/f", "/d/_h"):
        _store_call(store, "set", path, expires_ns=_store_in(5))
    body = _store_body(_store_call(store, "delete", "/d", recursive=True))
    assert body["node"] == {"key": "/d", "dir": True, "modifiedIndex": 4, "createdIndex": 1}
    assert body["prevNode"] == {"key": "/d", "dir": True, "modifiedIndex": 1, "createdIndex": 1}
    assert store.current_index == 4 and not store.has_ttl
    assert store_json(store, "/1", now_ns=_STORE_NOW) == b'{"action":"get","node":{"dir":true}}\n'
    _store_call(store, "set", "/d", value="a file now")


def test_store_compare_and_delete_removes_a_file(store: Store) -> None:
    _store_call(store, "set", "/a", value="1")
    body = _store_body(_store_call(store, "compare_and_delete", "/a", prev_value="1"))
    assert body["action"] == "compareAndDelete"
    assert body["node"] == {"key": "/a", "modifiedIndex": 2, "createdIndex": 1}
    assert body["prevNode"]["value"] == "1"


# -- the root


@pytest.mark.parametrize("path", ["/", "/0", "/1"])
@pytest.mark.parametrize(("verb", "options"), [
    ("set", {}), ("set", {"dir": True}), ("set", {"refresh": True}), ("create", {}),
    ("update", {}), ("update", {"value": "x"}), ("compare_and_swap", {"prev_index": 3}),
    ("delete", {}), ("delete", {"recursive": True}),
])
def test_store_root_is_read_only(store: Store, verb: str, options: Any, path: str) -> None:
    with pytest.raises(pyetcd.RootReadOnly) as caught:
        getattr(store, verb)(path, now_ns=_STORE_NOW, **options)
    assert (caught.value.cause, store.current_index) == ("/", 0)


def test_store_compare_and_delete_of_the_root_is_not_a_file_without_cause(store: Store) -> None:
    with pytest.raises(pyetcd.NotFile) as caught:
        _store_call(store, "compare_and_delete", "", prev_value="x")
    assert caught.value.cause == ""


# -- index and ttl


def test_store_failures_and_reads_do_not_count_as_changes(store: Store) -> None:
    _store_call(store, "set", "/a")
    _store_get(store, "/a")
    for verb in ("get", "update", "delete"):
        with pytest.raises(pyetcd.KeyNotFound):
            _store_call(store, verb, "/no")
    assert store.current_index == store.hub.history.last_index == 1


@pytest.mark.parametrize(("left_s", "shown"), [
    (10, 10), (9.2, 10), (0.000000001, 1), (0, None), (-0.5, None), (-0.999999999, None),
    (-1, -1), (-1.5, -1), (-2, -2),
])
def test_store_ttl_is_rounded_up_and_then_towards_zero(
    store: Store, left_s: float, shown: Optional[int]
) -> None:
    _store_call(store, "set", "/a", expires_ns=_store_in(left_s))
    node = _store_get(store, "/a")
    assert node.get("ttl") == shown
    assert "expiration" in node


def test_store_expiration_is_utc_without_trailing_zeros(store: Store) -> None:
    event = _store_call(store, "set", "/a", value="1", expires_ns=_store_in(5) - 6_789)
    assert b'"value":"1","expiration":"2027-01-15T08:00:05.12345Z","ttl":5,' in event_line(event)


def test_store_event_keeps_the_ttl_of_its_time(store: Store) -> None:
    _store_call(store, "set", "/a", expires_ns=_store_in(50))
    _, seen = _store_watch(store, "/a", since=1)
    assert seen[0]["node"]["ttl"] == 50
    assert _store_get(store, "/a", now_ns=_store_in(20))["ttl"] == 30


def test_store_expiry_is_earliest_first_with_one_index_each(store: Store) -> None:
    for name, seconds in (("c", 3), ("a", 1), ("b", 2), ("d", 99)):
        _store_call(store, "set", "/" + name, expires_ns=_store_in(seconds))
    assert store._ttl.first()[0] == _store_in(1)
    events = delete_expired(store, _store_in(3))
    assert [(event.key, event.index) for event in events] == [
        ("/1/a", 5), ("/1/b", 6), ("/1/c", 7)]
    assert store._ttl.first()[0] == _store_in(99) and store.has_ttl
    assert store.stats.expire_count == 3


def test_store_expiry_of_equal_instants_goes_by_key(store: Store) -> None:
    """Members must agree on the indexes, whether they applied the writes or took a snapshot."""
    for name in "bca":
        _store_call(store, "set", "/" + name, expires_ns=_store_in(1))
    assert [event.key for event in delete_expired(store, _store_in(1))] == ["/1/a", "/1/b", "/1/c"]


def test_store_expire_event_of_a_file(store: Store) -> None:
    _store_call(store, "set", "/a", value="1", expires_ns=_store_in(1))
    [event] = delete_expired(store, _store_in(1.3))
    assert _store_body(event) == {
        "action": "expire", "node": {"key": "/a", "modifiedIndex": 2, "createdIndex": 1},
        "prevNode": {"key": "/a", "value": "1", "expiration": "2027-01-15T08:00:01.123456789Z",
                     "modifiedIndex": 1, "createdIndex": 1},
    }


def test_store_expires_many_in_steps_like_at_once(store: Store) -> None:
    """Steps end between different times only, reach every key, and change no order."""
    rng, other = random.Random(20154), Store(history_capacity=2_000)
    for number in range(2_000):
        expires_ns = _store_in(rng.randrange(800))
        for each in (store, other):
            _store_call(each, "set", f"/{number % 1_500}", expires_ns=expires_ns)
    events, sizes = [], []
    until_ns, step_ns = _store_in(700), 0
    while step_ns < until_ns:
        step_ns = store.expiry_step_ns(until_ns)
        expired = delete_expired(store, step_ns)
        sizes.append(len(expired))
        events += expired
    assert max(sizes) <= pyetcd.EXPIRED_KEYS_MAX + 10 and min(sizes[:-1]) > 0
    at_once = delete_expired(other, until_ns)
    assert [e.key for e in events] == [e.key for e in at_once] and len(events) > 1_000
    assert store.expiry_step_ns(until_ns) == until_ns


def test_store_expired_directory_takes_its_children_without_events(store: Store) -> None:
    _store_call(store, "set", "/d", dir=True, expires_ns=_store_in(2))
    _store_call(store, "set", "/d/a", expires_ns=_store_in(2.5))
    [event] = delete_expired(store, _STORE_LATER)
    assert _store_body(event)["node"] == {"key": "/d", "modifiedIndex": 3, "createdIndex": 1}
    assert _store_body(event)["prevNode"]["dir"] is True
    assert not store.has_ttl and store._ttl.first()[0] == 0
    assert store.stats.expire_count == 1


def test_store_until_expiry_a_key_exists(store: Store) -> None:
    _store_call(store, "set", "/a", value="1", expires_ns=_store_in(-5))
    with pytest.raises(pyetcd.NodeExists):
        _store_call(store, "create", "/a")
    _store_call(store, "set", "/a", refresh=True, expires_ns=_store_in(5))
    assert delete_expired(store, _STORE_NOW) == []


def test_store_ttl_heap_stays_small_under_refresh(store: Store) -> None:
    for step in range(5_000):
        _store_call(store, "set", "/a", expires_ns=_store_in(1 + step))
    assert len(store._ttl._heap) < 200
    assert store._ttl.first()[0] == _store_in(5_000)


# -- refresh


@pytest.mark.parametrize("verb", ["set", "update", "compare_and_swap"])
def test_store_refresh_keeps_the_value_and_wakes_nobody(store: Store, verb: str) -> None:
    _store_call(store, "set", "/a", value="1")
    _, exact = _store_watch(store, "/a")
    _, above = _store_watch(store, "", recursive=True, stream=True)
    event = _store_call(store, verb, "/a", refresh=True, expires_ns=_store_in(9))
    assert _store_body(event)["node"]["value"] == "1" and b"refresh" not in event_line(event)
    assert exact == above == [] and store.current_index == 2
    assert "".join(event.history_texts()).endswith(',"refresh":true}')
    _, late = _store_watch(store, "/a", since=2)
    assert late == []
    assert event.node.created_index == (2 if verb == "set" else 1)


def test_store_refresh_needs_the_key(store: Store) -> None:
    with pytest.raises(pyetcd.KeyNotFound):
        _store_call(store, "set", "/a", refresh=True, expires_ns=_store_in(9))
    assert store.stats.sets_fail == 1


# -- watch


def test_store_watch_delivers_the_next_change_once(store: Store) -> None:
    _store_call(store, "set", "/a", value="0")
    _, seen = _store_watch(store, "/a")
    assert store.stats.watchers == 1
    _store_call(store, "set", "/b")
    _store_call(store, "set", "/a", value="1")
    _store_call(store, "set", "/a", value="2")
    assert [event["node"]["value"] for event in seen] == ["1"]
    assert store.stats.watchers == 0


def test_store_watch_stream_delivers_every_change(store: Store) -> None:
    watcher, seen = _store_watch(store, "/a", stream=True)
    for value in "123":
        _store_call(store, "set", "/a", value=value)
    watcher.cancel()
    watcher.cancel()
    _store_call(store, "set", "/a", value="4")
    assert [event["node"]["value"] for event in seen] == ["1", "2", "3"]
    assert store.stats.watchers == 0


def test_store_watch_in_the_future_waits_for_its_index(store: Store) -> None:
    _, seen = _store_watch(store, "/a", since=3)
    for value in "123":
        _store_call(store, "set", "/a", value=value)
    assert [event["node"]["modifiedIndex"] for event in seen] == [3]


def test_store_watch_exact_is_not_told_about_children(store: Store) -> None:
    _store_call(store, "set", "/d", dir=True)
    _, seen = _store_watch(store, "/d", stream=True)
    _store_call(store, "set", "/d/a")
    _store_call(store, "update", "/d", expires_ns=_store_in(1))
    delete_expired(store, _store_in(1))
    assert [event["action"] for event in seen] == ["update", "expire", "expire"]


def test_store_watch_recursive_is_told_about_all_below_and_itself(store: Store) -> None:
    _, seen = _store_watch(store, "/d", recursive=True, stream=True)
    for path in ("/d", "/dd", "/e/d"):
        _store_call(store, "set", path, dir=True)
    _store_call(store, "create", "/d/e/f", unique=True)
    assert _store_keys_of(seen) == [("set", "/d"), ("create", "/d/e/f/" + "4".zfill(20))]


@pytest.mark.parametrize(("watched", "key", "told"), [
    ("", "/_h", False), ("/p", "/p/_q/z", False), ("/p", "/p/q/_z", False),
    ("/p/_q", "/p/_q", True),
    ("/p/_q", "/p/_q/z", True), ("/p/_q", "/p/_q/_z", False), ("/p", "/p/q_", True),
])
def test_store_watch_recursive_skips_what_is_hidden_below(
    store: Store, watched: str, key: str, told: bool
) -> None:
    _, seen = _store_watch(store, watched, recursive=True)
    _store_call(store, "set", key)
    assert bool(seen) == told


def test_store_delete_of_a_directory_wakes_everybody_on_what_it_held(store: Store) -> None:
    for path in ("/d/a", "/d/s/b", "/d/_h"):
        _store_call(store, "set", path)
    paths = ("/d", "/d/a", "/d/s", "/d/s/b", "/d/_h")
    told = {path: _store_watch(store, path)[1] for path in paths}
    told["above"] = _store_watch(store, "", recursive=True)[1]
    silent = [_store_watch(store, "")[1], _store_watch(store, "/d/none", recursive=True)[1]]
    _store_call(store, "delete", "/d", recursive=True)
    assert all(_store_keys_of(seen) == [("delete", "/d")] for seen in told.values())
    assert silent == [[], []] and store.stats.watchers == 2


def test_store_delete_reaches_the_deepest_first_and_then_from_the_root(store: Store) -> None:
    _store_call(store, "set", "/d/s/b")
    order: List[str] = []
    for path in ("", "/d", "/d/s", "/d/s/b"):
        store.watch("/1" + path, recursive=True, stream=True,
                    deliver=lambda _, path=path: order.append(path))  # type: ignore[misc]
    _store_call(store, "delete", "/d", recursive=True)
    assert order == ["/d/s/b", "/d/s", "/d", "", "/d"]


@pytest.mark.parametrize("recursive", [False, True])
def test_store_exact_stream_gets_the_delete_twice(store: Store, recursive: bool) -> None:
    _store_call(store, "set", "/a")
    _, seen = _store_watch(store, "/a", stream=True, recursive=recursive)
    _store_call(store, "delete", "/a")
    assert _store_keys_of(seen) == [("delete", "/a")] * 2


def test_store_delete_of_hidden_is_not_seen_above(store: Store) -> None:
    _store_call(store, "set", "/_d/a")
    _, seen = _store_watch(store, "", recursive=True)
    _store_call(store, "delete", "/_d", recursive=True)
    assert seen == []


def test_store_watchers_may_cancel_and_register_while_being_told(store: Store) -> None:
    told: List[str] = []

    def first(_: Event) -> None:
        told.append("first")
        second.cancel()
        store.watch("/1/a", deliver=lambda _: told.append("third"))

    store.watch("/1/a", deliver=first)
    second = store.watch("/1/a", deliver=lambda _: told.append("second"))
    _store_call(store, "set", "/a")
    assert told == ["first"] and store.stats.watchers == 1
    _store_call(store, "set", "/a")
    assert told == ["first", "third"] and store.stats.watchers == 0


def test_store_tells_many_watchers_over_several_turns(store: Store) -> None:
    """So many in a turn, in the order of the events; who goes away before is told nothing."""
    limit, told = pyetcd.WATCHERS_NOTIFIED_MAX, []
    store.hub.begin_turn()
    watchers = [
        store.watch("/1/a", stream=number % 2 == 1,
                    deliver=lambda event, number=number: told.append((event.index, number)))
        for number in range(2 * limit)
    ]
    _store_call(store, "set", "/a")
    _store_call(store, "set", "/a")
    assert told == [(1, number) for number in range(limit)]
    assert store.hub.backlog == 2 * limit and store.stats.watchers == limit
    watchers[limit].cancel()
    watchers[limit + 1].cancel()
    store.hub.begin_turn()
    store.hub.begin_turn()
    assert told == [
        *((1, n) for n in range(2 * limit) if n not in (limit, limit + 1)),
        *((2, n) for n in range(1, 2 * limit, 2) if n != limit + 1),
    ]
    assert store.hub.backlog == 0 and store.stats.watchers == limit - 1


def test_store_tells_watchers_at_once_if_events_come_too_fast(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyetcd, "WATCHERS_NOTIFIED_MAX", 1)
    monkeypatch.setattr(pyetcd, "WATCHERS_MAX", 5)
    store.hub.begin_turn()
    _, seen = _store_watch(store, "/a", stream=True)
    for _ in range(20):
        _store_call(store, "set", "/a")
    assert len(seen) == 15 and store.hub.backlog == 5


def test_store_tells_the_owed_before_a_snapshot_replaces_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Store()
    for _ in range(5):
        _store_call(other, "set", "/a")
    monkeypatch.setattr(pyetcd, "WATCHERS_NOTIFIED_MAX", 1)
    store.hub.begin_turn()
    _, seen = _store_watch(store, "/a", stream=True)
    for _ in range(3):
        _store_call(store, "set", "/a")
    store.recover(other.save())
    assert [event["node"]["modifiedIndex"] for event in seen] == [1, 2, 3, 4, 5]


def test_store_event_is_encoded_once_for_all_watchers(store: Store) -> None:
    bodies: List[bytes] = []
    for _ in range(1_000):
        store.watch("/1/a", deliver=lambda event: bodies.append(event_line(event)))
    _store_call(store, "set", "/a")
    assert len(bodies) == 1_000 and all(body is bodies[0] for body in bodies)


# -- history


def test_store_watch_from_history_is_served_at_once_and_not_registered(store: Store) -> None:
    for value in "123":
        _store_call(store, "set", "/a", value=value)
    _, seen = _store_watch(store, "/a", since=2)
    assert [event["node"]["value"] for event in seen] == ["2"]
    assert store.stats.watchers == 0


def test_store_watch_from_history_without_a_match_registers(store: Store) -> None:
    _store_call(store, "set", "/b")
    _, seen = _store_watch(store, "/a", since=1)
    assert store.stats.watchers == 1
    _store_call(store, "set", "/a")
    assert len(seen) == 1


def test_store_stream_from_history_goes_on_with_live_events(store: Store) -> None:
    """Differs from etcd, which sends one event and then nothing, ever."""
    for value in "123":
        _store_call(store, "set", "/d", value=value)
        _store_call(store, "set", "/x", value=value)
    _, seen = _store_watch(store, "/d", since=3, stream=True, recursive=True)
    _store_call(store, "set", "/d", value="4")
    assert [event["node"]["value"] for event in seen] == ["2", "3", "4"]


def test_store_history_scan_of_recursive_misses_later_exact_events(store: Store) -> None:
    _store_call(store, "set", "/x")
    _store_call(store, "set", "/foo")
    assert _store_watch(store, "/foo", since=1, recursive=True)[1] == []
    assert len(_store_watch(store, "/foo", since=2, recursive=True)[1]) == 1
    assert len(_store_watch(store, "/foo", since=1)[1]) == 1


def test_store_history_scan_does_not_filter_hidden(store: Store) -> None:
    _store_call(store, "set", "/p/_h")
    assert len(_store_watch(store, "/p", since=1, recursive=True)[1]) == 1


@pytest.mark.parametrize(("watched", "found"), [
    ("/bar", True), ("/bar/z", True), ("/bar/z/q", True), ("/barbaz", True), ("/ba", False),
])
def test_store_history_scan_takes_a_deleted_directory_by_prefix(
    store: Store, watched: str, found: bool
) -> None:
    _store_call(store, "set", "/bar/z")
    _store_call(store, "delete", "/bar", recursive=True)
    assert bool(_store_watch(store, watched, since=2)[1]) == found


def test_store_history_scan_ignores_the_deletion_of_a_file_above(store: Store) -> None:
    _store_call(store, "set", "/one")
    _store_call(store, "delete", "/one")
    assert _store_watch(store, "/one/two", since=2)[1] == []


def test_store_history_is_cleared_behind_its_capacity() -> None:
    store = Store(history_capacity=10)
    for _ in range(25):
        _store_call(store, "set", "/a")
    with pytest.raises(pyetcd.EventIndexCleared) as caught:
        _store_watch(store, "/a", since=15)
    assert caught.value.cause == "the requested history has been cleared [16/15]"
    assert caught.value.index == 25
    assert _store_watch(store, "/a", since=16)[1][0]["node"]["modifiedIndex"] == 16


# -- statistics


def test_store_stats_have_the_names_and_order_of_etcd(store: Store) -> None:
    _store_call(store, "set", "/a")
    _store_watch(store, "/a")
    assert store.stats.json() == (
        '{"getsSuccess":0,"getsFail":0,"setsSuccess":1,"setsFail":0,"deleteSuccess":0,'
        '"deleteFail":0,"updateSuccess":0,"updateFail":0,"createSuccess":0,"createFail":0,'
        '"compareAndSwapSuccess":0,"compareAndSwapFail":0,"compareAndDeleteSuccess":0,'
        '"compareAndDeleteFail":0,"expireCount":0,"watchers":1}'
    )


@pytest.mark.parametrize(("verb", "path", "options", "counted"), [
    ("get", "/no", {}, "gets_fail"),
    ("set", "/d", {}, "sets_fail"),
    ("set", "", {}, "sets_fail"),
    ("create", "/f", {}, "create_fail"),
    ("create", "", {}, "create_fail"),
    ("update", "/no", {}, "update_fail"),
    ("update", "/f/x", {}, "update_fail"),
    ("update", "/d", {"value": "x"}, "update_success"),
    ("update", "", {}, "update_success"),
    ("compare_and_swap", "/no", {}, "compare_and_swap_fail"),
    ("compare_and_swap", "/f", {"prev_value": "x"}, "compare_and_swap_fail"),
    ("compare_and_swap", "/d", {"prev_value": "x"}, "compare_and_swap_fail"),
    ("compare_and_swap", "", {"prev_value": "x"}, "compare_and_swap_success"),
    ("delete", "/no", {}, "delete_fail"),
    ("delete", "/d", {}, "delete_fail"),
    ("delete", "/d", {"dir": True}, "delete_fail"),
    ("delete", "", {}, "delete_success"),
    ("compare_and_delete", "/no", {}, "compare_and_delete_fail"),
    ("compare_and_delete", "/f/x", {}, "compare_and_delete_fail"),
    ("compare_and_delete", "/f", {"prev_value": "x"}, "compare_and_delete_success"),
    ("compare_and_delete", "/d", {"prev_value": "x"}, "compare_and_delete_success"),
])
def test_store_stats_count_failures_as_etcd_does(
    store: Store, verb: str, path: str, options: Any, counted: str
) -> None:
    _store_call(store, "set", "/f", value="1")
    _store_call(store, "set", "/d/a")
    before = json.loads(store.stats.json())
    with pytest.raises(pyetcd.EtcdError):
        _store_call(store, verb, path, **options)
    after = json.loads(store.stats.json())
    first, *rest = counted.split("_")
    changed = [name for name in after if after[name] != before[name]]
    assert changed == [first + "".join(map(str.title, rest))]


# -- snapshots


def _store_fill(store: Store) -> None:
    _store_call(store, "set", "/a", value="<one>")
    _store_call(store, "set", "/d/e/f", value="é\x01", expires_ns=_store_in(77))
    _store_call(store, "set", "/d/empty", dir=True)
    _store_call(store, "set", "/a", refresh=True, expires_ns=_store_in(5))
    _store_call(store, "update", "/d", expires_ns=_store_in(50))
    _store_call(store, "create", "/q", unique=True)
    _store_call(store, "set", "/gone", value="x")
    _store_call(store, "delete", "/gone")
    _store_call(store, "set", "/late", expires_ns=_store_in(1))
    delete_expired(store, _store_in(3.5))
    store.create("/0/members/1/attributes", value="{}", now_ns=_STORE_NOW)


def _store_fixture_json() -> bytes:
    name = "0000000000000002-0000000000000066.snap"
    outer = (TESTDATA / name).read_bytes()
    [inner] = [value for number, _, value in pyetcd.decode_fields(outer) if number == 2]
    return pyetcd.decode_snapshot(inner).data


def test_store_snapshot_of_real_etcd_comes_back_byte_for_byte() -> None:
    data = _store_fixture_json()
    store = Store()
    store.recover(data)
    assert store.save() == data
    assert store.current_index == 85 and store.stats.sets_success == 75 and store.has_ttl
    [seen] = _store_watch(store, "/short", since=85)[1]
    assert seen["action"] == "expire"


def test_store_snapshot_round_trip_keeps_everything(store: Store) -> None:
    _store_fill(store)
    data = store.save()
    other = Store()
    other.recover(data)
    assert other.save() == data
    shown, wanted = (
        store_json(one, "/1", recursive=True, sorted=True, now_ns=_STORE_NOW)
        for one in (other, store)
    )
    assert shown == wanted
    for since in range(1, store.current_index + 1):
        assert _store_watch(other, "", since=since, recursive=True)[1] == _store_watch(
            store, "", since=since, recursive=True)[1]
    assert ["".join(event.history_texts()) for event in delete_expired(other, _STORE_LATER)] == [
        "".join(event.history_texts()) for event in delete_expired(store, _STORE_LATER)]


def test_store_snapshot_says_what_the_specification_shows(store: Store) -> None:
    _store_call(store, "set", "/a", value="1")
    state = json.loads(store.save())
    assert list(state) == ["Root", "WatcherHub", "CurrentIndex", "Stats", "CurrentVersion"]
    assert state["CurrentVersion"] == 2
    assert json.dumps(state["Root"]["Children"]["1"]["Children"]["a"]) == (
        '{"Path": "/1/a", "CreatedIndex": 1, "ModifiedIndex": 1, '
        '"ExpireTime": "0001-01-01T00:00:00Z", "Value": "1", "Children": null}')
    assert state["Root"]["Children"]["0"]["Children"] == {}
    history = state["WatcherHub"]["EventHistory"]
    assert (history["StartIndex"], history["LastIndex"]) == (1, 1)
    queue = history["Queue"]
    assert len(queue["Events"]) == queue["Capacity"] == 1000 and queue["Events"][1] is None
    assert (queue["Size"], queue["Front"], queue["Back"]) == (1, 0, 1)


def test_store_snapshot_of_a_full_history_is_a_ring() -> None:
    store = Store(history_capacity=7)
    for _ in range(17):
        _store_call(store, "set", "/a")
    queue = json.loads(store.save())["WatcherHub"]["EventHistory"]["Queue"]
    assert (queue["Size"], queue["Front"], queue["Back"]) == (7, 3, 3)
    indexes = [event["node"]["modifiedIndex"] for event in queue["Events"]]
    assert indexes == [15, 16, 17, 11, 12, 13, 14]


@pytest.mark.parametrize("capacity", [3, 7, 50])
def test_store_history_of_another_capacity_is_taken_over(capacity: int) -> None:
    source, target = Store(history_capacity=7), Store(history_capacity=capacity)
    for _ in range(17):
        _store_call(source, "set", "/a")
    target.recover(source.save())
    kept = min(capacity, 7)
    assert [event.index for event in target.hub.history.events] == list(range(18 - kept, 18))
    for _ in range(60):
        _store_call(target, "set", "/a")
    queue = json.loads(target.save())["WatcherHub"]["EventHistory"]["Queue"]
    oldest = queue["Events"][queue["Front"]]
    assert oldest["node"]["modifiedIndex"] == 78 - capacity
    assert queue["Events"][queue["Back"] - 1]["node"]["modifiedIndex"] == 77


def test_store_recover_accepts_foreign_offsets_and_members(store: Store) -> None:
    _store_call(store, "set", "/a", value="1", expires_ns=1_800_000_000 * pyetcd.NS)
    text = store.save().decode()
    text = text.replace("2027-01-15T08:00:00Z", "2027-01-15T10:30:00+02:30")
    text = text.replace('"Value":', '"ACL":"","Value":')
    other = Store()
    other.recover(text.encode())
    assert other._ttl.first()[0] == 1_800_000_000 * pyetcd.NS
    assert other.save() == store.save()


def test_store_recover_accepts_null_history_and_missing_counters(store: Store) -> None:
    state = json.loads(store.save())
    state["WatcherHub"]["EventHistory"]["Queue"].update(Events=None)
    state["Stats"] = {"getsSuccess": 5, "somethingNew": 1}
    store.recover(json.dumps(state, separators=(",", ":")).encode())
    assert store.stats.gets_success == 5 and not store.hub.history.events


def test_store_recover_tells_watchers_what_has_happened_meanwhile(store: Store) -> None:
    """A snapshot of the leader brings the events with it: none is told twice, or left out."""
    other = Store()
    for _ in range(3):
        _store_call(other, "set", "/a")
    _, seen = _store_watch(store, "/a", stream=True)
    _, next_one = _store_watch(store, "/a", stream=False)
    _, elsewhere = _store_watch(store, "/b", stream=True)
    store.recover(other.save())
    assert store.stats.watchers == 2 and elsewhere == []
    _store_call(store, "set", "/a")
    assert [event["node"]["modifiedIndex"] for event in seen] == [1, 2, 3, 4]
    assert [event["node"]["modifiedIndex"] for event in next_one] == [1]


def test_store_recover_ends_watches_that_would_miss_events(store: Store) -> None:
    """Where the history does not reach back, silence would be a lie."""
    other = Store(history_capacity=2)
    for _ in range(4):
        _store_call(other, "set", "/a")
    told: List[str] = []
    store.watch("/1/a", stream=True, deliver=lambda event: told.append("event"),
                lost=lambda: told.append("lost"))
    store.watch("/1/a", stream=True, since=3, deliver=lambda event: told.append("later"))
    store.recover(other.save())
    _store_call(store, "set", "/a")
    assert told == ["lost", "later", "later", "later"]
    assert store.stats.watchers == 1


@pytest.mark.parametrize("name", ["CreatedIndex", "Path", "Children", "x"])
def test_store_recover_is_not_confused_by_names_of_keys(store: Store, name: str) -> None:
    for path in ("/d/" + name, f"/{name}/Path/Path", "/Value"):
        _store_call(store, "set", path, value="1")
    other = Store()
    other.recover(store.save())
    assert other.save() == store.save()


@pytest.mark.parametrize("data", [
    b"", b"{", b"null", b"[]", b"{}", b'{"Root":null}', b'{"Root":{}}', b'"x"', b"\xff",
    b'{"Root":{"Path":"/"}}',
    b'{"Root":{"Path":"/","CreatedIndex":0,"ModifiedIndex":0,"ExpireTime":"x","Children":{}}}',
], ids=range(11))
def test_store_recover_of_nonsense_leaves_the_store_unchanged(store: Store, data: bytes) -> None:
    _store_fill(store)
    before = store.save()
    with pytest.raises(ValueError):
        store.recover(data)
    assert store.save() == before


@pytest.mark.parametrize(("old", "new"), [
    ('"CreatedIndex":1', '"CreatedIndex":"1"'), ('"CreatedIndex":1', '"CreatedIndex":-1'),
    ('"Value":"x"', '"Value":7'), ('"Children":null', '"Children":[]'),
    ('"Children":null', '"Kinder":null'), ('"Front":0', '"Front":"0"'),
    ('"CurrentIndex":1', '"CurrentIndex":null'), ('"action":"set"', '"action":1'),
    ('"key":"/1/a"', '"schluessel":""'), ('"setsSuccess":1', '"setsSuccess":"1"'),
    ('"Children":{"a"', '"Children":{"b":5,"a"'), ('"Back":1', '"Back":[]'),
], ids=range(12))
def test_store_recover_refuses_a_wrong_member(store: Store, old: str, new: str) -> None:
    _store_call(store, "set", "/a", value="x")
    text = store.save().decode()
    assert old in text
    with pytest.raises(ValueError):
        Store().recover(text.replace(old, new).encode())


def test_store_snapshot_and_listing_of_the_deepest_key(store: Store) -> None:
    """Deeper than json.loads goes."""
    path = "/\u2028\"k\\" * pyetcd.KEY_DEPTH_MAX
    _store_call(store, "set", path, value="bottom")
    data = store.save()
    other = Store()
    other.recover(data)
    assert other.save() == data
    assert other.value("/1" + path) == "bottom"
    body = store_json(other, "/1", recursive=True, now_ns=_STORE_NOW)
    assert body.count(b'"nodes":[') == pyetcd.KEY_DEPTH_MAX


def test_store_only_one_snapshot_walk_at_a_time(store: Store) -> None:
    walk = store.snapshot_chunks()
    next(walk)
    with pytest.raises(pyetcd.InvariantError):
        next(store.snapshot_chunks())
    walk.close()  # type: ignore[attr-defined]
    assert store.save()


def _store_mutate(store: Store, rng: random.Random) -> None:
    """One random operation on a small tree; failures are fine."""
    depth = rng.choice((1, 1, 2, 3))
    path = "/1" + "".join("/" + rng.choice(("a", "b", "c", "_d")) for _ in range(depth))
    expires_ns = rng.choice((0, 0, _store_in(rng.randint(1, 400))))
    operations: List[Callable[[], Any]] = [
        lambda: store.set(path, value=str(rng.random()), expires_ns=expires_ns,
                          now_ns=_STORE_NOW),
        lambda: store.set(path, dir=True, expires_ns=expires_ns, now_ns=_STORE_NOW),
        lambda: store.create(path, unique=True, now_ns=_STORE_NOW),
        lambda: store.update(path, expires_ns=expires_ns, now_ns=_STORE_NOW),
        lambda: store.delete(path, recursive=rng.random() < 0.5, dir=True, now_ns=_STORE_NOW),
        lambda: delete_expired(store, _store_in(rng.randint(0, 100))),
    ]
    try:
        rng.choice(operations)()
    except pyetcd.EtcdError:
        pass


def _store_plain_listing(
    store: Store, path: str, now_ns: int, *, recursive: bool, top: bool = True
) -> Dict[str, Any]:
    """The node of a sorted listing, made in the plain way: node after node, by recursion."""
    node = store._nodes[path]
    shown: Dict[str, Any] = {} if path == "/1" else {"key": path[2:]}
    if node.value is not None:
        shown["value"] = node.value
    if node.children is not None:
        shown["dir"] = True
    if node.expires_ns:
        shown["expiration"] = pyetcd.format_time(node.expires_ns)
    if node.ttl_s(now_ns):
        shown["ttl"] = node.ttl_s(now_ns)
    if recursive or top:
        shown["nodes"] = [
            _store_plain_listing(store, child, now_ns, recursive=recursive, top=False)
            for child in sorted(node.children or ()) if not child[len(path) + 1:].startswith("_")
        ]
        if not shown["nodes"]:
            del shown["nodes"]
    if node.modified_index:
        shown["modifiedIndex"] = node.modified_index
    if node.created_index:
        shown["createdIndex"] = node.created_index
    return shown


@pytest.mark.parametrize("round_", range(40))
def test_store_sliced_listing_is_exact_while_the_store_changes(
    store: Store, round_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows the state of the moment when it began, whatever happens between slices."""
    seed = 9_000 + round_
    print("seed", seed)
    rng = random.Random(seed)
    monkeypatch.setattr(pyetcd, "LISTING_BLOCK_NODES", rng.choice((1, 2, 5)))
    monkeypatch.setattr(pyetcd, "LISTING_SORT_RUN", rng.choice((1, 2, 4_000)))
    for _ in range(120):
        _store_mutate(store, rng)
    path = rng.choice([path for path, node in store._nodes.items()
                       if node.children is not None and path.startswith("/1")])
    recursive = rng.random() < 0.7
    expected = _store_plain_listing(store, path, _STORE_NOW, recursive=recursive)
    index = store.current_index
    listing, unsorted = (
        store.listing(path, recursive=recursive, sorted=sort, now_ns=_STORE_NOW)
        for sort in (True, False)
    )
    while not (listing.done and unsorted.done):
        for one in (listing, unsorted):
            if not one.done:
                one.work(1)
        for _ in range(rng.choice((0, 1, 3))):
            _store_mutate(store, rng)
    line = b"".join(listing.chunks)
    assert line == json.dumps(
        {"action": "get", "node": expected}, ensure_ascii=False, separators=(",", ":")
    ).encode() + b"\n"
    assert _store_sorted(json.loads(b"".join(unsorted.chunks))) == _store_sorted(json.loads(line))
    assert listing.index == unsorted.index == index
    assert not store._walks


def test_store_one_slice_of_a_listing_is_a_bounded_amount_of_work(store: Store) -> None:
    """Sorting and large values count as well; the store keeps no image once it is over."""
    for number in range(9_000):
        store.set(f"/1/d/{number * 7919 % 9_000}", value="v", now_ns=_STORE_NOW)
    for number in range(20):
        store.set(f"/1/d/x/{number}", value="v" * 400_000, now_ns=_STORE_NOW)
    for sort in (True, False):
        listing = store.listing("/1/d", recursive=True, sorted=sort, now_ns=_STORE_NOW)
        slices = []
        while not listing.done:
            before = listing.work_done
            listing.work(1_000)
            slices.append(listing.work_done - before)
        assert max(slices) <= 1_000 + pyetcd.LISTING_SORT_RUN
        assert len(slices) > 10
        assert max(map(len, listing.chunks)) < 1_000_000
        keys = _store_keys(json.loads(b"".join(listing.chunks))["node"])
        assert len(keys) == 9_001
        assert not sort or keys == sorted(keys)
    given_up = store.listing("/1/d", recursive=True, now_ns=_STORE_NOW)
    given_up.work(1)
    assert store._walks
    given_up.end()
    assert not store._walks


@pytest.mark.parametrize("round_", range(40))
def test_store_sliced_snapshot_is_exact_while_the_store_changes(
    store: Store, round_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte what save() gave at the first next(), whatever happens between slices."""
    seed = 8_000 + round_
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(120):
        _store_mutate(store, rng)
    expected = store.save()
    monkeypatch.setattr(pyetcd, "SNAPSHOT_SLICE_NODES", rng.choice((1, 2, 5)))
    walk = store.snapshot_chunks()
    chunks = [next(walk)]
    for chunk in walk:
        chunks.append(chunk)
        for _ in range(rng.choice((0, 1, 10))):
            _store_mutate(store, rng)
    assert b"".join(chunks) == expected


def test_store_snapshot_walk_survives_a_recover(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader's snapshot arrives while ours is written: ours stays what it was."""
    _store_fill(store)
    expected, other = store.save(), Store()
    monkeypatch.setattr(pyetcd, "SNAPSHOT_SLICE_NODES", 1)
    walk = store.snapshot_chunks()
    chunks = [next(walk)]
    store.recover(other.save())
    _store_call(store, "set", "/a", value="of another tree")
    _store_call(store, "set", "/d/e/f", value="too")
    assert next(store.snapshot_chunks())        # a new walk may begin
    assert b"".join(chunks + list(walk)) == expected


@pytest.mark.parametrize("round_", range(10))
def test_store_recovered_copy_goes_on_like_the_original(store: Store, round_: int) -> None:
    """Equal events and equal snapshots under the same operations: members stay equal."""
    seed = 9_000 + round_
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(200):
        _store_mutate(store, rng)
    other = Store()
    other.recover(store.save())
    state = rng.getstate()
    for _ in range(200):
        _store_mutate(store, rng)
    rng.setstate(state)
    for _ in range(200):
        _store_mutate(other, rng)
    assert other.save() == store.save()


def test_store_100000_keys_take_little_memory() -> None:
    """Far below 1 KB a key (10 characters, 64-byte value): counted here, not guessed."""
    tracemalloc = pytest.importorskip("tracemalloc")
    tracemalloc.start()
    try:
        store = Store()
        for number in range(20_000):
            store.set(f"/1/{number:010d}", value=f"{number:064d}", now_ns=_STORE_NOW)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert used / 20_000 < 500


# -- the recording of etcd 2.3.8, without HTTP


class _StoreReplay:
    """Runs the scenarios of keys-cases.jsonl against a Store, on a virtual clock."""

    def __init__(self, scenario: str, base: int) -> None:
        self.prefix = "/t/" + scenario
        self.base = base
        self.store = Store()
        self.now_ns = _STORE_NOW
        self.ticks = 0
        self.watches: Dict[str, Tuple[Optional[Watcher], List[bytes]]] = {}
        _store_call(self.store, "set", "/t", dir=True)
        while self.store.current_index < base:
            self.store.set("/0/pad", now_ns=self.now_ns)
        self.stats = json.loads(self.store.stats.json())

    def sub(self, text: str) -> str:
        text = text.replace("{D}", self.prefix)
        return re.sub(r"\{I([+-]\d+)\}", lambda match: str(self.base + int(match[1])), text)

    def advance(self, seconds: float) -> None:
        """Let time pass; the leader looks for expired keys every half second."""
        self.now_ns += int(seconds * pyetcd.NS)
        while self.ticks * pyetcd.NS // 2 <= self.now_ns - _STORE_NOW:
            delete_expired(self.store, _STORE_NOW + self.ticks * pyetcd.NS // 2)
            self.ticks += 1

    def request(self, case: Any) -> Tuple[int, Any, List[bytes], Optional[Watcher]]:
        """Do one request: (status, X-Etcd-Index, body lines, watcher)."""
        self.advance(0.001)
        target, _, query = self.sub(case["path"]).partition("?")
        fields = urllib.parse.parse_qsl(query, keep_blank_values=True)
        if case["m"] in ("PUT", "POST"):
            body = self.sub(case.get("b", ""))
            fields = urllib.parse.parse_qsl(body, keep_blank_values=True) + fields
        form: Dict[str, str] = {}
        for name, value in fields:
            form.setdefault(name, value)
        path = pyetcd.clean_path("/1" + urllib.parse.unquote(target[len("/v2/keys"):]))
        self.store.stats.gets_fail += 1         # the server looks for /2/enabled
        try:
            return self.dispatch(case["m"], path, form)
        except pyetcd.EtcdError as error:
            line = {"errorCode": error.code, "message": error.message, "cause": error.cause,
                    "index": error.index}
            if not error.cause:
                del line["cause"]
            return error.status, error.index, [json.dumps(line).encode()], None

    def dispatch(
        self, method: str, path: str, form: Dict[str, str]
    ) -> Tuple[int, Any, List[bytes], Optional[Watcher]]:
        def flag(name: str) -> bool:
            return form.get(name, "") in ("1", "t", "T", "TRUE", "true", "True")

        if method == "GET" and flag("wait") and not flag("quorum"):
            index, lines = self.store.current_index, []  # type: int, List[bytes]
            watcher = self.store.watch(
                path, recursive=flag("recursive"), stream=flag("stream"),
                since=int(form.get("waitIndex") or 0),
                deliver=lambda event: lines.append(event_line(event)))
            return 200, index, lines, watcher
        event = self.write(method, path, form, flag)
        return 201 if event.is_created else 200, event.index, [event_line(event)], None

    def write(self, method: str, path: str, form: Dict[str, str], flag: Callable[[str], bool]
              ) -> Event:
        store = self.store
        when: Dict[str, Any] = {"now_ns": self.now_ns}
        if method in ("GET", "HEAD"):
            line = store_json(
                store, path, recursive=flag("recursive"), sorted=flag("sorted"), **when
            )
            node, index = store._nodes[path], store.current_index
            return Event("get", path, node, None, index, self.now_ns, encoded=(line,))
        prev: Dict[str, Any] = {"prev_value": form.get("prevValue", ""),
                                "prev_index": int(form.get("prevIndex") or 0)}
        if method == "DELETE":
            if any(prev.values()):
                return store.compare_and_delete(path, **prev, **when)
            return store.delete(path, dir=flag("dir"), recursive=flag("recursive"), **when)
        put: Dict[str, Any] = {"value": form.get("value", ""), **when}
        if form.get("ttl"):
            wrapped = self.now_ns + int(form["ttl"]) * pyetcd.NS
            put["expires_ns"] = (wrapped + 2**63) % 2**64 - 2**63
        if method == "POST" or ("prevExist" in form and not flag("prevExist")):
            return store.create(path, dir=flag("dir"), unique=method == "POST", **put)
        put["refresh"] = flag("refresh")
        if any(prev.values()):
            return store.compare_and_swap(path, **prev, **put)
        if "prevExist" in form:
            return store.update(path, **put)
        return store.set(path, dir=flag("dir"), **put)

    def collect(self, case: Any) -> List[bytes]:
        """The next events of a background watch, waiting for them if need be."""
        lines = self.watches[case["id"]][1]
        waited = 0.0
        while len(lines) < case["count"] and waited < case.get("timeout", 5):
            self.advance(0.1)
            waited += 0.1
        taken, lines[:] = lines[:case["count"]], lines[case["count"]:]
        return taken


def _store_plain(value: Any, prefix: str) -> Any:
    """Hide what differs between runs: the instant of expiry and the scenario's directory."""
    text = json.dumps(value).replace(prefix + "/", "{D}/").replace(prefix, "{D}")
    text = re.sub(r'("expiration": )"[-0-9T:.]+Z"', r'\1"time"', text)
    return _store_sorted(json.loads(text))


def _store_sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return [(name, _store_sorted(item)) for name, item in value.items()]
    if isinstance(value, list):
        return sorted(map(_store_sorted, value), key=repr)
    return value


def _store_scenarios() -> Iterator[Tuple[str, List[Tuple[Any, Any]]]]:
    def load(name: str) -> List[Any]:
        with open(TESTDATA / name, encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]

    answers = {(row["s"], row["i"]): row for row in load("keys-etcd-2.3.8.jsonl")}
    grouped: Dict[str, List[Tuple[Any, Any]]] = {}
    for case in load("keys-cases.jsonl"):
        steps = grouped.setdefault(case["s"], [])
        steps.append((case, answers.get((case["s"], len(steps)))))
    yield from grouped.items()


# A stream that begins in the history: etcd sends one event and then nothing, ever; we go on.
_STORE_DIFFERS = {("watch-stream", 15), ("watch-stream", 17)}
_STORE_NOT_REPLAYED = {"form"}          # media types, which the store never sees


@pytest.mark.parametrize(("scenario", "steps"), [
    pytest.param(name, steps, id=name) for name, steps in _store_scenarios()
    if name not in _STORE_NOT_REPLAYED
])
def test_store_answers_as_recorded_from_etcd(scenario: str, steps: List[Tuple[Any, Any]]) -> None:
    replay = _StoreReplay(scenario, next(row["base"] for _, row in steps if row))
    for number, (case, row) in enumerate(steps):
        operation = case.get("op", "req")
        if operation == "sleep":
            replay.advance(case["sec"])
        elif operation == "fill":
            for value in range(case["n"]):
                replay.request({"m": "PUT", "path": case["path"], "b": f"value={value}"})
        elif operation == "stats":
            now = json.loads(replay.store.stats.json())
            assert {name: now[name] - replay.stats[name] for name in now} == row["body"], number
        elif operation == "collect":
            got = [_store_plain(json.loads(line), replay.prefix) for line in replay.collect(case)]
            want = [_store_plain(event, "{D}") for event in row["events"]]
            assert got == want or (scenario, number) in _STORE_DIFFERS, number
        else:
            _store_check_request(replay, case, row, number)


def _store_check_request(replay: _StoreReplay, case: Any, row: Any, number: int) -> None:
    if row["headers"].get("X-Etcd-Index", "0") == "0":
        return                                  # answered before the store is asked
    status, index, lines, watcher = replay.request(case)
    if case.get("op") == "start":
        replay.watches[case["id"]] = watcher, lines
    assert status == row["status"], number
    if case.get("cmp") == "status":
        return
    assert str(index) == row["headers"]["X-Etcd-Index"], number
    if "body" in row:
        got = _store_plain(json.loads(lines[0]), replay.prefix)
        assert got == _store_plain(row["body"], "{D}"), number


@pytest.mark.parametrize("round_", range(20))
def test_store_removes_in_slices_like_at_once(
    store: Store, round_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same events, states and walks, however little a turn removes."""
    seed = 11_000 + round_
    print("seed", seed)
    rng, other = random.Random(seed), Store()
    monkeypatch.setattr(pyetcd, "REMOVED_NODES_MAX", rng.choice((1, 2, 3)))
    store.begin_turn()
    dead = 0
    for _ in range(30):
        state = rng.getstate()
        for each in (store, other):
            rng.setstate(state)
            for _ in range(12):
                _store_mutate(each, rng)
            for number in range(5):
                _store_call(each, "set", f"/z/{number % 2}/{number}", expires_ns=_store_in(900))
        listings = [each.listing("/1", recursive=True, sorted=True, now_ns=_STORE_NOW)
                    for each in (store, other)]
        removed = rng.choice(("/z", "/z/1"))
        for each in (store, other):
            _store_call(each, "delete", removed, recursive=True)
        dead += bool(store._detached)
        expected, walk = other.save(), store.snapshot_chunks()
        listings += [each.listing("/1", recursive=True, sorted=True, now_ns=_STORE_NOW)
                     for each in (store, other)]
        chunks = [next(walk)]
        store.begin_turn()
        chunks.append(next(walk, b""))
        state = rng.getstate()
        for each in (store, other):
            rng.setstate(state)
            for _ in range(rng.choice((0, 5))):
                _store_mutate(each, rng)
        while store.has_garbage and rng.random() < 0.7:
            store.begin_turn()
        assert b"".join([*chunks, *walk]) == expected
        for listing in listings:
            listing.work(10_000)
        texts = [b"".join(listing.chunks) for listing in listings]
        assert texts[0] == texts[1] and texts[2] == texts[3]
        assert store.save() == other.save()
        for path in ("/1/a", "/1/a/b", "/1/b/a/c", "/1/c/_d"):
            assert store.value(path) == other.value(path)
            assert store.children(path) == other.children(path)
    assert dead > 10



def test_store_removal_of_many_is_a_bounded_amount_of_work_in_a_turn(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By DELETE and by expiry; all is out of reach at once, and told at once."""
    monkeypatch.setattr(pyetcd, "REMOVED_NODES_MAX", 100)
    store.begin_turn()
    for name, expires_ns in (("/d", 0), ("/e", _store_in(1)), ("/f", _store_in(1))):
        _store_call(store, "set", name, dir=True, expires_ns=expires_ns)
        for number in range(1_000):
            _store_call(store, "set", f"{name}/s/{number}", expires_ns=_store_in(500))
    told = {path: _store_watch(store, path)[1] for path in ("/d", "/d/s", "/d/s/7", "/e/s/8")}
    silent = _store_watch(store, "/d/s/none")[1]
    before, index = len(store), store.current_index
    _store_call(store, "delete", "/d", recursive=True)
    assert before - len(store) <= 100 and store.current_index == index + 1
    assert not store.accepts_changes and store.has_garbage
    assert [len(told[path]) for path in ("/d", "/d/s", "/d/s/7", "/e/s/8")] == [1, 1, 1, 0]
    with pytest.raises(pyetcd.KeyNotFound):
        store.get("/1/d/s/7", now_ns=_STORE_NOW)
    with pytest.raises(pyetcd.KeyNotFound):
        store.listing("/1/d/s", now_ns=_STORE_NOW)
    assert store.value("/1/d/s/7") is None and store.children("/1/d/s") == []
    assert b'"/1/d' not in store.save().partition(b"WatcherHub")[0]
    events = delete_expired(store, _store_in(2))
    assert [event.key for event in events] == ["/1/e", "/1/f"]
    assert len(told["/e/s/8"]) == 1 and silent == []
    turns = 0
    while store.has_garbage:
        before = len(store)
        store.begin_turn()
        turns += 1
        assert before - len(store) <= 100
    assert turns >= 29 and len(store) == 3 and not store.has_ttl
    store.begin_turn()
    assert store.accepts_changes


def test_store_writes_find_what_is_dead_gone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever does not wait for it has it done."""
    monkeypatch.setattr(pyetcd, "REMOVED_NODES_MAX", 10)
    store.begin_turn()
    for number in range(100):
        _store_call(store, "set", f"/d/{number}", expires_ns=_store_in(1))
    _store_call(store, "delete", "/d", recursive=True)
    assert store.has_garbage
    event = _store_call(store, "create", "/d/5")
    assert event.prev is None and event.is_created and not store.has_garbage
    assert store.children("/1/d") == [("5", False)] and delete_expired(store, _STORE_LATER) == []


def test_store_frees_the_tree_before_a_recover_in_slices(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not while a walk still reads it."""
    monkeypatch.setattr(pyetcd, "REMOVED_NODES_MAX", 50)
    store.begin_turn()
    for number in range(300):
        _store_call(store, "set", f"/d/{number}")
    expected, walk = store.save(), store.snapshot_chunks()
    chunks = [next(walk)]
    nodes = store._nodes
    store.recover(Store().save())
    store.begin_turn()
    assert not store.has_garbage and len(nodes) > 300
    assert b"".join([*chunks, *walk]) == expected
    sizes = [len(nodes)]
    while store.has_garbage:
        store.begin_turn()
        sizes.append(len(nodes))
    assert sizes[-1] == 0 and max(a - b for a, b in zip(sizes, sizes[1:])) <= 50
    assert not store._replaced


@pytest.mark.parametrize("seed", range(8))
def test_store_reads_a_snapshot_in_blocks_as_node_by_node(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is where a block ends: directories, escapes, long values, invalid UTF-8."""
    print("seed", seed)
    rng, store = random.Random(seed), Store()
    values = ("", "x" * 64, 'a"}\\,"Children":null}', "\u00e4\U0001f600\u2028<", "v" * 5_000)
    for number in range(600):
        directory = "/".join(rng.choices(("a", "b", "\u00f6", 'q"'), k=rng.randrange(3)))
        path = f"/{directory}/{number}".replace("//", "/")
        expires_ns = rng.choice((0, 0, _STORE_LATER))
        _store_call(store, "set", path, value=rng.choice(values), expires_ns=expires_ns)
    data = store.save()
    if seed % 2:
        data = data.replace(b"x" * 64, b"x\xff" + b"x" * 62, 40)
    monkeypatch.setattr(pyetcd, "SNAPSHOT_BLOCK_BYTES", 0)
    plain = pyetcd.StoreState.read(data)
    sizes, read_files = [], pyetcd._read_files

    def read_and_note(*args: Any) -> Any:
        found = read_files(*args)
        sizes.append(found[0])
        return found

    monkeypatch.setattr(pyetcd, "_read_files", read_and_note)
    for block_bytes in (1_000, 1 << 15):
        monkeypatch.setattr(pyetcd, "SNAPSHOT_BLOCK_BYTES", block_bytes)
        state = pyetcd.StoreState.read(memoryview(data))
        assert list(state.nodes) == list(plain.nodes) and state.chars == plain.chars
        recovered, other = Store(), Store()
        recovered.install(state)
        other.recover(data)
        assert recovered.save() == other.save()
    assert any(sizes)


def test_store_expires_the_keys_of_one_entry_in_slices(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leader of Go expires any number at once; the events are those of delete_expired()."""
    monkeypatch.setattr(pyetcd, "REMOVED_NODES_MAX", 900)
    other = Store()
    store.begin_turn()
    for each in (store, other):
        _store_call(each, "set", "/d", dir=True, expires_ns=_store_in(1))
        for number in range(2_000):
            _store_call(each, "set", f"/d/{number}")
            _store_call(each, "set", f"/k/{number}", expires_ns=_store_in(1 + number % 7))
            _store_call(each, "set", f"/later/{number}", expires_ns=_store_in(1_000))
    store.expire(_store_in(10))
    delete_expired(other, _store_in(10))
    turns = 0
    while store.has_garbage:
        assert not store.accepts_changes and turns < 40
        before = store.current_index
        store.begin_turn()
        turns += 1
        assert store.current_index - before <= 100
    assert turns > 20 and not store.is_expiring and store.save() == other.save()
    store.begin_turn()
    assert store.accepts_changes


def test_store_frees_the_ttls_before_a_recover_in_slices(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyetcd, "REMOVED_NODES_MAX", 50)
    store.begin_turn()
    for number in range(300):
        _store_call(store, "set", f"/d/{number}", expires_ns=_store_in(number + 1))
    heap = store._ttl
    store.recover(Store().save())
    sizes = [len(heap._heap)]
    while store.has_garbage:
        store.begin_turn()
        sizes.append(len(heap._heap))
    assert sizes[-1] == 0 and max(a - b for a, b in zip(sizes, sizes[1:])) <= 100


@pytest.mark.parametrize("seed", range(4))
def test_store_counts_the_characters_of_what_it_holds(seed: int) -> None:
    """After every change, also of long values, directories in slices, expiry and a snapshot."""
    rng, store, now = random.Random(seed), Store(), _STORE_NOW

    def counted(store: Store) -> int:
        return sum(
            len(path) + len(b"".join(node.json) if isinstance(node, pyetcd.LongNode)
                            else node.value or "")
            for path, node in store._nodes.items()) - len("/" + "/0" + "/1")

    for step in range(600):
        path = "/1/" + "/".join(rng.choices("abc", k=rng.randint(1, 3)))
        value = "x" * rng.choice((0, 3, 50, pyetcd.LONG_VALUE_CHARS + 9))
        expires_ns = rng.choice((0, 0, now + 5))
        with contextlib.suppress(pyetcd.EtcdError):
            change, options = rng.choice((
                (store.set, {"value": value, "expires_ns": expires_ns}), (store.set, {"dir": True}),
                (store.create, {"value": value, "unique": rng.random() < 0.5}),
                (store.update, {"value": value}), (store.compare_and_swap, {"value": value}),
                (store.compare_and_delete, {}), (store.delete, {"recursive": True}),
            ))
            change(path, now_ns=now, **options)
        rng.choice((
            lambda now: [], functools.partial(delete_expired, store), lambda now: store.begin_turn()
        ))(now)
        now += 1
        assert store.chars == counted(store), (seed, step)
    again = Store()
    again.recover(store.save())
    assert again.chars == counted(again) > 0
