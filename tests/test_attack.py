"""Fuzzing: any bytes, in any pieces, at every door."""

from __future__ import annotations

import ast
import collections
import contextlib
import functools
import importlib
import inspect
import itertools
import random
import re
import socket
import struct
import sys
import threading
import time
import types
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

import pyetcd
import pyetcd_client
from pyetcd import Store
from tests.kit.basics import eventually
from tests.kit.fuzzing import _FuzzSocket
from tests.kit.http import _http_ask
from tests.kit.reactors import FakeReactor

# -- bounded work: every pattern and every parser, on input made to be slow ----------


try:
    _sre_parse = importlib.import_module("re._parser")
except ImportError:                     # Python 3.9 and 3.10
    _sre_parse = importlib.import_module("sre_parse")
_SLOW_SIZES = (50, 100)                 # double the size may take double the steps, and no more
_SLOW_GROWTH_MAX = 2.6
_SLOW_STEPS_MAX = 4_000                 # of a text of some 110 characters
_SLOW_CHARS = tuple("a0fFZ_ \t;:=\"\\,.-%#[]{}$/\r\x00\x1f\x7f\u00e9\u2028\udcff")


class _PatternSteps:
    """Counts the steps of a backtracking matcher that has none of the shortcuts of `re`."""

    def __init__(self, pattern):
        self.tree = list(_sre_parse.parse(pattern.pattern, pattern.flags & ~re.UNICODE))
        self.steps = 0

    def count(self, text, mode):
        """Return the steps that `fullmatch`, `match` or `search` takes."""
        self.steps, self.text = 0, text
        with contextlib.suppress(OverflowError):
            self.search(text, mode)
        return self.steps

    def search(self, text, mode):
        starts = range(len(text) + 1) if mode == "search" else (0,)
        for start in starts:
            for end in self.run(self.tree, 0, start):
                if mode != "fullmatch" or end == len(text):
                    return

    def run(self, nodes, first, at):
        if first == len(nodes):
            yield at
            return
        for middle in self.one(*nodes[first], at):
            yield from self.run(nodes, first + 1, middle)

    def one(self, op, arg, at):
        self.steps += 1
        if self.steps > _SLOW_STEPS_MAX:
            raise OverflowError
        name, text = op.name, self.text
        if name == "BRANCH":
            for branch in arg[1]:
                yield from self.run(list(branch), 0, at)
        elif name == "SUBPATTERN":
            yield from self.run(list(arg[-1]), 0, at)
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            yield from self.repeat(name == "MAX_REPEAT", *arg, at)
        elif name in ("ASSERT", "ASSERT_NOT"):
            start = at if arg[0] > 0 else at - arg[1].getwidth()[0]
            found = start >= 0 and any(True for _ in self.run(list(arg[1]), 0, start))
            if found == (name == "ASSERT"):
                yield at
        elif name == "AT":
            where = arg.name
            if not ("BEGINNING" in where and at or "END" in where and at < len(text)):
                yield at
        elif at < len(text) and _accepts(op, arg, text[at]):
            yield at + 1

    def repeat(self, greedy, least, most, body, at):
        body = list(body)
        if len(body) == 1 and body[0][0].name in ("IN", "LITERAL", "NOT_LITERAL", "ANY"):
            end = at                    # a loop, as there is nothing to go back to inside
            while end < len(self.text) and end - at < int(most) and _accepts(
                    *body[0], self.text[end]):
                end += 1
                self.steps += 1
            ends = range(at + least, end + 1)
            for place in reversed(ends) if greedy else ends:
                self.steps += 1
                yield place
            return
        yield from self.again(greedy, least, int(most), body, at, 0)

    def again(self, greedy, least, most, body, at, count):
        if not greedy and count >= least:
            yield at
        if count < most:
            for middle in self.run(body, 0, at):
                if middle > at:
                    yield from self.again(greedy, least, most, body, middle, count + 1)
        if greedy and count >= least:
            yield at


def _accepts(op, arg, char):
    """True if one step of a pattern takes `char`."""
    name, code = op.name, ord(char)
    if name in ("LITERAL", "NOT_LITERAL"):
        return (code == arg) == (name == "LITERAL")
    if name == "ANY":
        return True                     # as with DOTALL: the faults found are the same
    negated = any(kind.name == "NEGATE" for kind, _ in arg)
    for kind, item in arg:
        kind = kind.name
        if kind == "LITERAL" and code == item or kind == "RANGE" and item[0] <= code <= item[1]:
            return not negated
        if kind == "CATEGORY":
            name = item.name
            found = (char.isspace() if "SPACE" in name else char.isdigit() if "DIGIT" in name
                     else char.isalnum() or char == "_")
            if found == ("NOT_" not in name):
                return not negated
    return negated


def _single_nodes(nodes):
    """Yield every part of a pattern that takes one character."""
    for op, arg in nodes:
        name = op.name
        if name in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
            yield op, arg
        elif name == "BRANCH":
            for branch in arg[1]:
                yield from _single_nodes(branch)
        elif name in ("SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT", "ASSERT", "ASSERT_NOT"):
            yield from _single_nodes(arg[-1])


def _pattern_attacks(nodes, prefix, chars, optional):
    """Yield (prefix, what is repeated) for every repetition in a pattern, and the end of it."""
    for op, arg in nodes:
        name = op.name
        if name in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
            taken = [char for char in chars if _accepts(op, arg, char)]
            if name == "LITERAL":
                taken = [chr(arg)]
            prefix += taken[0] if taken else "?"
        elif name == "BRANCH":
            ends = [item for branch in arg[1]
                    for item in _pattern_attacks(list(branch), prefix, chars, optional)]
            yield from (item for item in ends if isinstance(item, tuple))
            prefix = next(item for item in ends if isinstance(item, str))
        elif name == "SUBPATTERN":
            for item in _pattern_attacks(list(arg[-1]), prefix, chars, optional):
                if isinstance(item, tuple):
                    yield item
                else:
                    prefix = item
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, body = arg
            body = list(body)
            one = prefix
            for item in _pattern_attacks(body, prefix, chars, optional):
                if isinstance(item, tuple):
                    yield item
                else:
                    one = item
            if int(most) > 8:
                if len(body) == 1 and body[0][0].name in ("IN", "NOT_LITERAL", "ANY", "LITERAL"):
                    for char in chars:
                        if _accepts(*body[0], char):
                            yield prefix, char
                yield prefix, one[len(prefix):]
            prefix += one[len(prefix):] * max(least, optional)
    yield prefix


def _slow_pattern(pattern, modes):
    """Return (mode, input) that makes a pattern take more than linear steps; None if none does."""
    text = pattern.pattern
    pattern = re.compile(text.decode("latin-1"), pattern.flags | re.UNICODE) if isinstance(
        text, bytes) else pattern
    steps = _PatternSteps(pattern)
    singles = list(_single_nodes(steps.tree))
    letters = tuple({                   # one of those that are the same to the pattern
        tuple(_accepts(op, arg, char) for op, arg in singles): char
        for char in (*_SLOW_CHARS, *filter(str.isascii, pattern.pattern))
    }.values())
    attacks = set()
    for optional in (0, 1):
        attacks |= {item for item in _pattern_attacks(steps.tree, "", letters, optional)
                    if isinstance(item, tuple) and item[1]}
    attacks |= {("", char) for char in letters}
    for mode in modes:
        for (prefix, body), end in itertools.product(sorted(attacks), ("", "\0", "\n")):
            small, large = (prefix + body * size + end for size in _SLOW_SIZES)
            count = steps.count(large, mode)
            if count < 6 * len(large):
                continue                # linear, without a look at the other
            if count > min(steps.count(small, mode) * _SLOW_GROWTH_MAX + 100, _SLOW_STEPS_MAX):
                return mode, prefix + body * 3 + end
    return None


def _patterns_of(module):
    """Yield (name, pattern, the ways it is used) of everything in a module that is one."""
    source, calls = Path(module.__file__).read_text(), {}
    for name, method in re.findall(r"\b(\w+)\.(\w+)\(", source):
        calls.setdefault(name, set()).add(method)
    for name, value in vars(module).items():
        if isinstance(value, re.Pattern):
            used = calls.get(name, set()) & {"fullmatch", "match"}
            others = calls.get(name, set()) & {"search", "sub", "finditer", "findall", "split"}
            yield name, value, sorted(used | ({"search"} if others or not used else set()))
    for call in ast.walk(ast.parse(source)):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        if ast.unparse(call.func.value) != "re" or call.func.attr in ("compile", "escape"):
            continue
        text = ast.unparse(call.args[0])
        try:
            pattern = eval(text, vars(module))      # f-strings of the module's constants
        except NameError:
            pattern = _LOCAL_PATTERNS[text]
        flags = re.DOTALL if "DOTALL" in ast.unparse(call) else 0
        mode = call.func.attr if call.func.attr in ("fullmatch", "match") else "search"
        yield f"line {call.lineno}", re.compile(pattern, flags), [mode]


_LOCAL_PATTERNS = {                     # made of local variables
    r"f'\\+?(?:{part})+'": r"\+?(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(h|ms|us|µs|ns|m|s))+",
    "part": "",                         # only on text that the whole pattern has taken
}


def test_attack_every_pattern_is_linear():
    """Whatever is fed to it: the steps of a plain backtracking matcher grow as the input does.

    All compiled patterns of both modules, and all that stand in calls of `re`.
    """
    slow, seen = {}, 0
    for module in (pyetcd, pyetcd_client):
        for name, pattern, modes in _patterns_of(module):
            seen += 1
            found = _slow_pattern(pattern, modes)
            if found:
                slow[module.__name__, name, pattern.pattern] = found
    assert not slow and seen > 40


@pytest.mark.parametrize(("text", "mode"), [
    (r"([!#$a-z]+):[ \t]*([^\x00\r\n]*?)[ \t]*", "fullmatch"), ("(a+)+b", "match"),
    ("(?:a|a)*b", "match"), (r"\s+x", "search"), (r"a=(.*?)\s*", "fullmatch"), ("a*a*b", "match"),
    (r"\w+(?:-?\w+)*!", "match"),
])
def test_attack_slow_patterns_are_found(text, mode):
    """The header pattern of 0.4.0, and the classics."""
    assert _slow_pattern(re.compile(text), [mode])


# What reads bytes of others, as (call, pieces of input that are repeated).  The names of all
# that parse or decode must be here, or below with the reason why they need not be.
_FORM_BYTES = (b"&", b"a=b&", b"%41", b"%", b"+", b"=", b"a", b"\xff", b"%ff=%ff&", b";")
_JSON_BYTES = (b"[", b"{\"a\":", b"0,", b"1", b"\"", b"\\u0041", b"a", b"\xff", b" ", b'"a":0,')
_WIRE_BYTES = (b"\0", b"\xff", b"\x08\x01", b"\x0a\x00", b"\x3a\x02\x08\0", b"\x80")
_HEAD_BYTES = (b"a", b" ", b"a: b\r\n", b"a:" , b"\r\n", b"\n", b"%41", b"\0", b"/../", b",")
_SLOW_PARSERS = {
    "parse_header_lines": (
        lambda data: pyetcd.parse_header_lines(data.split(b"\r\n")), _HEAD_BYTES),
    "_parse_new_head": (lambda data: pyetcd._parse_new_head(
        b"GET / HTTP/1.1\r\nHost: x\r\na: " + data, {}), _HEAD_BYTES),
    "_parse_header_line": (lambda data: pyetcd._parse_header_line(b"a:" + data), _HEAD_BYTES),
    "parse_head": (lambda data: pyetcd.parse_head(
        b"GET / HTTP/1.1\r\nHost: x\r\na: " + data), _HEAD_BYTES),
    "parse_answer_head": (lambda data: pyetcd.parse_answer_head(
        b"HTTP/1.1 200 OK\r\n" + data), _HEAD_BYTES),
    "ChunkedDecoder.feed": (lambda data: _fed(pyetcd.ChunkedDecoder(), data),
                            (b"1\r\na\r\n", b"0", b";", b"1", b"0\r\n", b"\r\n")),
    "StreamParser.feed": (lambda data: (
        all(pyetcd.StreamParser(pyetcd.http2_refusal(b"x")).feed(data)),
        _fed(pyetcd.StreamParser(pyetcd.message_frames()), data),
    ), (*_WIRE_BYTES, b"SM\r\n\r\n", b"\0", b"\xff")),
    "parse_form": (pyetcd.parse_form, _FORM_BYTES),
    "_parse_uint64": (lambda data: pyetcd._parse_uint64(data.decode("latin-1")), (b"1", b"0")),
    "parse_key_request": (lambda data: pyetcd.parse_key_request(
        "PUT", "/1/a", {"ttl": data.decode("latin-1"), "value": "a"}, 0), (b"1", b"0", b" ")),
    "GoJson.loads": (pyetcd.GoJson.loads, _JSON_BYTES),
    "parse_user_body": (pyetcd.parse_user_body, _JSON_BYTES),
    "parse_role_body": (pyetcd.parse_role_body, _JSON_BYTES),
    "parse_peer_urls": (lambda data: pyetcd.parse_peer_urls(b'{"peerURLs":[' + data + b'"a"]}'),
                        (*_JSON_BYTES, b'"http://a:1",')),
    "parse_members": (pyetcd.parse_members, _JSON_BYTES),
    "parse_member": (lambda data: pyetcd.parse_member(data, 1), _JSON_BYTES),
    "parse_credential": (lambda data: pyetcd.parse_credential(
        "Basic " + data.decode("latin-1")), (b"QUJD", b":", b"=", b"\xff")),
    "parse_stored": (lambda data: [
        pyetcd.parse_stored(kind, "a", data.decode("latin-1")) for kind in ("user", "role")
    ], _JSON_BYTES),
    "parse_time": (lambda data: pyetcd.parse_time(
        "2020-01-01T00:00:00." + data.decode("latin-1")), (b"1", b"Z", b" ")),
    "_parse_id": (lambda data: pyetcd._parse_id(data.decode("latin-1")), (b"1", b"g")),
    "decode_varint": (lambda data: pyetcd.decode_varint(data, 0), _WIRE_BYTES),
    "decode_message_steps": (
        lambda data: pyetcd.finish(pyetcd.decode_message_steps(data)), _WIRE_BYTES),
    "decode_long_request": (
        lambda data: pyetcd.finish(pyetcd.decode_long_request(data)), _WIRE_BYTES),
    "decode_fields": (lambda data: list(pyetcd.decode_fields(data)), _WIRE_BYTES),
    **{name: (getattr(pyetcd, name), _WIRE_BYTES) for name in (
        "decode_hard_state", "decode_entry", "decode_conf_change", "decode_snapshot",
        "decode_message", "decode_request", "decode_metadata", "_decode_voters",
        "_decode_plain_message", "_decode_any_message",
        "decode_request_head", "_decode_plain_put", "_decode_record",
        "_decode_walpb_snapshot", "decode_snapshot_file",
    )},
}
_PARSERS_OF_SETTINGS = {                # flags, environment and files of the user
    "parse_bool", "parse_uint", "parse_urls", "parse_initial_cluster", "_parse_origins",
    "_parse_levels", "_parse_address",
    "_parse_domain", "_parse_choice", "_parse_auto_tls",
    "_parse_port", "_parse_host", "parse_key_map",
    "Flag.parse", "decode_known",      # the latter is a part of other decoders
}


def _fed(decoder, data):
    """Feed a decoder in pieces, as a slow sender does."""
    for start in range(0, len(data), 7):
        list(decoder.feed(data[start:start + 7]))


def _lines_run(call, data):
    """Count the lines of Python that `call(data)` runs; what it raises does not matter."""
    count = 0

    def line(frame, event, arg):
        nonlocal count
        count += event == "line"
        return line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg:
                 line if frame.f_code.co_filename != __file__ else None)
    try:
        call(data)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error,
            pyetcd.EtcdError, pyetcd.CodecError, pyetcd.SnapshotError, pyetcd.WalError):
        pass
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("name", _SLOW_PARSERS)
def test_attack_every_parser_is_linear(name):
    """Twice the input runs at most about twice the lines, whatever is repeated; none recurses."""
    call, pieces = _SLOW_PARSERS[name]
    for piece in pieces:
        small, large = (_lines_run(call, piece * size) for size in (600, 1_200))
        assert large <= small * 2.3 + 300, (piece, small, large)


def test_attack_no_parser_is_forgotten():
    """A function or method that parses or decodes is among those that are attacked above."""
    found = {name for name, value in vars(pyetcd).items() if inspect.isfunction(value)
             and re.match("_?(parse|decode)_", name)}
    for name, value in vars(pyetcd).items():
        if inspect.isclass(value) and value.__module__ == "pyetcd":
            found |= {f"{name}.{method}" for method in ("feed", "loads", "parse")
                      if method in vars(value)}
    assert found - _PARSERS_OF_SETTINGS == set(_SLOW_PARSERS)


def test_attack_percent_escapes_are_decoded_as_urllib_does():
    """The fast way and the library's give the same, and the first bad escape is named."""
    rng = random.Random(9)
    for _ in range(3_000):
        data = bytes(rng.choice(b"%%%%40aF=_?\n\r +&z\xff\0") for _ in range(rng.randrange(12)))
        bad = re.search(b"%(?![0-9A-Fa-f]{2})", data)
        if bad is None:
            assert pyetcd.unquote(data) == urllib.parse.unquote_to_bytes(data), data
            assert pyetcd.unquote(data, plus=True) == urllib.parse.unquote_to_bytes(
                data.replace(b"+", b" ")), data
        else:
            with pytest.raises(ValueError) as caught:
                pyetcd.unquote(data)
            assert pyetcd.utf8(str(caught.value)) == data[bad.start():bad.start() + 3]


def test_attack_long_strings_are_escaped_as_short_ones_are():
    """JSON by whole passes, by table and by expression."""
    rng = random.Random(10)
    for _ in range(300):
        text = "".join(rng.choice('ab"\\<>&\b\f\n\r\t\0\x1f\x7f\u00e9\u2028\U0001f600'
                                  + "\udcff" * rng.randrange(2)) for _ in range(30))
        assert pyetcd.json_string(text * 10) == '"' + pyetcd.json_string(text)[1:-1] * 10 + '"'


def test_attack_a_long_form_is_parsed_in_slices_as_in_one_piece():
    """No slice cuts an escape or a character in two; what is not UTF-8 is refused."""
    rng = random.Random(11)
    for _ in range(4):
        text = "".join(rng.choice("a+ =%\u00e9\u2028\U0001f600") for _ in range(400_000))
        data = b"value=" + urllib.parse.quote_plus(text).encode() + b"&b=1"
        steps = pyetcd.form_steps(data)
        with pytest.raises(StopIteration) as end:
            for _ in range(100):
                next(steps)
        assert end.value.value == {"value": text, "b": "1"}
    with pytest.raises(pyetcd.InvalidForm, match="not UTF-8"):
        pyetcd.parse_form(b"value=" + b"%ff" * 400_000)


def test_attack_the_fields_of_a_long_form_are_counted_in_slices():
    """To look for 10,000,000 separators takes 8 ms; it ends at the first slice with too many."""
    data = b"value=" + b"a" * 5_000_000
    steps, fields = _steps_of(pyetcd.form_steps(data))
    assert len(fields["value"]) == 5_000_000
    assert steps >= 2 * (len(data) // pyetcd.FORM_SLICE_BYTES)
    steps = pyetcd.form_steps(b"&" * 5_000_000)
    with pytest.raises(pyetcd.InvalidForm, match="more than"):
        for _ in range(2):
            next(steps)


# -- bounded turns: what clients send together is served in parts --------------------


# -- long values: done in steps, kept as they are sent, and never again looked at ------------

_LONG_VALUES = {
    "plain": b"a" * 700_001, "lt": b"<" * 700_001, "quotes": b'\\"' * 350_000,
    "latin": "\u00e9<".encode() * 200_000, "astral": "\U0001f600".encode() * 150_000,
    "separators": "\u2028".encode() * 200_000, "not-utf8": b"\xff\xe4\xb8<" * 150_000,
}


_NEEDS_NO_ESCAPE = ("plain", "astral")


def _steps_of(work):
    """(steps, result) of a generator."""
    for count in range(1_000_000):
        try:
            next(work)
        except StopIteration as stop:
            return count + 1, stop.value
    raise AssertionError("without end")


@pytest.mark.parametrize("name", _LONG_VALUES)
def test_attack_a_long_value_becomes_json_in_steps(name):
    """Whatever is in it: each step is short, and the result is what one step would make."""
    data = _LONG_VALUES[name]
    steps, pieces = _steps_of(pyetcd.long_text_steps(data))
    text = pyetcd.as_unicode(pyetcd.text_of(data))
    assert b'"%b"' % b"".join(pieces) == pyetcd.json_string(text).encode()
    assert pyetcd.text_of_long(pieces) == text
    size = pyetcd.LONG_TEXT_STEP_BYTES
    assert max(map(len, pieces)) <= 6 * size
    assert steps > len(data) // size // (32 if name in _NEEDS_NO_ESCAPE else 3)


@pytest.mark.parametrize("name", _LONG_VALUES)
def test_attack_a_long_command_is_read_in_steps_as_in_one(name):
    """A value, and a value to compare with: on every member the same."""
    text = pyetcd.text_of(_LONG_VALUES[name])
    for request in (pyetcd.Request(7, "PUT", "/1/a", text),
                    pyetcd.Request(7, "PUT", "/1/a", "x", prev_value=text, prev_exist=True)):
        data = pyetcd.encode_request(request)
        steps, encoded = _steps_of(pyetcd.encode_request_steps(request))
        assert encoded == data and steps >= 1 + len(text) // (8 * pyetcd.LONG_REQUEST_BYTES)
        steps, long = _steps_of(pyetcd.decode_long_request(data))
        texts = [value if isinstance(value, str) else pyetcd.text_of_long(value)
                 for value in (long.val, long.prev_value)]
        again = long._replace(val=texts[0], prev_value=texts[1])
        assert again == request.as_unicode() and (
            steps > 5 or name in _NEEDS_NO_ESCAPE)
        assert pyetcd.decode_request_head(data) == request._replace(val="", prev_value="")


def test_attack_the_log_sums_a_long_entry_in_steps(tmp_path):
    """10 MB, of which no piece is copied, as the plain way writes them."""
    data = bytes(range(256)) * (10 << 12)
    wals = [pyetcd.Wal.create(str(tmp_path / name), b"") for name in "ab"]
    for index, entry in enumerate((b"x", data, b"y" * 5_000), 1):
        entries = [pyetcd.Entry(0, 1, index, entry)]
        steps, pieces = _steps_of(wals[0].encode_steps(None, entries))
        assert b"".join(pieces) == wals[1]._encoder.batch(
            [pyetcd.encode_entry(entries[0])], b"")
        assert steps >= len(entry) >> 20 and (index == 1 or any(p is entry for p in pieces))
    for wal in wals:
        wal.close()


def test_attack_a_long_message_is_not_copied():
    """Neither on a stream nor in a POST, and the bytes are those of the plain way."""
    data, snapshot = b"x" * (1 << 20), pyetcd.Snapshot(b"s" * (1 << 20), (1, 2), 3, 4)
    entries = [pyetcd.Entry(0, 3, 5, b"a"), pyetcd.Entry(0, 3, 6, data), pyetcd.Entry(0, 3, 7, b"")]
    message = pyetcd.Message(
        pyetcd.MsgType.APP, to=2, sender=1, term=3, log_term=3, index=4, entries=entries)
    encoder = pyetcd.AppV2Encoder(pyetcd.EntryListEncoder())
    full, short = encoder.encode(message), None
    message.index, message.entries = 7, [pyetcd.Entry(0, 3, 8, data)]
    short = encoder.encode(message)
    decoder = pyetcd.StreamParser(pyetcd.app_v2_frames(2, 1))
    found = filter(None, decoder.feed(b"".join(full + short)))
    assert [message.entries for message in found] == [entries, message.entries]
    posted = pyetcd.encode_message_parts(
        pyetcd.Message(pyetcd.MsgType.SNAP, to=2, sender=1, term=5, snapshot=snapshot))
    assert pyetcd.decode_message(b"".join(posted)).snapshot == snapshot
    for parts, part in ((full, data), (short, data), (posted, snapshot.data)):
        assert any(piece is part for piece in parts) and len(parts) <= 4


def test_attack_answers_share_the_pieces_of_a_long_value():
    """GET, listing, event, history and snapshot: none of them makes the JSON again."""
    store, now_ns = pyetcd.Store(), 10 ** 18
    event = store.set("/1/d/a", value="<" * 500_000, expires_ns=2 * now_ns, now_ns=now_ns)
    pieces = event.node.json
    event = store.update("/1/d/a", refresh=True, expires_ns=3 * now_ns, now_ns=now_ns)
    listing = store.listing("/1", recursive=True, now_ns=now_ns)
    while not listing.done:
        listing.work()
    for found in (store.file_json("/1/d/a", now_ns=now_ns), event.client_pieces(),
                  listing.chunks, list(store.snapshot_chunks())):
        ids = set(map(id, found))
        assert all(id(piece) in ids for piece in pieces)


def test_attack_a_comparison_with_a_long_value_shows_the_start_of_it():
    """20 MB of error text would be escaped in one turn."""
    store, now_ns = pyetcd.Store(), 10 ** 18
    store.set("/1/a", value="<" * 500_000, now_ns=now_ns)
    with pytest.raises(pyetcd.CompareFailed) as failure:
        store.compare_and_swap("/1/a", prev_value=">" * 100_000, value="", now_ns=now_ns)
    start = pyetcd.SHOWN_VALUE_CHARS
    assert failure.value.cause == f"[{'>' * start}... != {'<' * start}...]"
    same = pyetcd.long_text("<" * 500_000)
    for previous in ("<" * 500_000, same, (same[0][:6], same[0][6:], *same[1:])):
        store.compare_and_swap("/1/a", prev_value=previous, value="<" * 500_000, now_ns=now_ns)


def test_attack_a_long_value_is_applied_over_many_turns(monkeypatch, tmp_path):
    """A member goes on turning while it takes 3 MB that all have to be escaped."""
    steps, prepare = [], pyetcd.Applier.prepare

    def counted(applier, entry):
        steps.append(len(entry.data))
        return prepare(applier, entry)

    monkeypatch.setattr(pyetcd.Applier, "prepare", counted)
    with pyetcd.Server(data_dir=str(tmp_path / "data")) as server:
        url = f"{server.client_urls[0]}/v2/keys/a"
        body = b"value=" + b"<" * (3 << 20)
        request = urllib.request.Request(url, body, method="PUT", headers={
            "Content-Type": "application/x-www-form-urlencoded"})
        assert urllib.request.urlopen(request, timeout=60).status == 201
        answer = urllib.request.urlopen(url, timeout=60).read()
    assert b'"value":"' + b"\\u003c" * (3 << 20) + b'"' in answer
    assert sum(size > 1 << 20 for size in steps) > 40


def test_attack_a_large_directory_is_removed_over_many_turns(monkeypatch, tmp_path):
    """By DELETE and by expiry; who writes into it at once waits for it, and nobody else."""
    turns, drops, begin_turn, drop = [0], collections.Counter(), Store.begin_turn, Store._free

    def begun(store):
        turns[0] += 1
        begin_turn(store)

    def counted(store, path):
        drops[turns[0]] += 1
        drop(store, path)

    monkeypatch.setattr(pyetcd, "REMOVED_NODES_MAX", 50)
    monkeypatch.setattr(Store, "begin_turn", begun)
    monkeypatch.setattr(Store, "_free", counted)
    with pyetcd.Server(data_dir=str(tmp_path / "data")) as server:
        url = f"{server.client_urls[0]}/v2/keys/d"

        def ask(method, path, body=""):
            request = urllib.request.Request(url + path, body.encode(), method=method, headers={
                "Content-Type": "application/x-www-form-urlencoded"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status

        def fill():
            for number in range(300):
                assert ask("PUT", f"/{number}", "value=1") == 201

        fill()
        assert ask("DELETE", "?recursive=true&dir=true") == 200
        assert ask("PUT", "/7", "value=2") == 201
        assert ask("DELETE", "?recursive=true&dir=true") == 200
        fill()
        assert ask("PUT", "", "dir=true&ttl=1&prevExist=true") == 200
        eventually(lambda: sum(drops.values()) == 604, 30, "all removed")
    assert max(drops.values()) <= 50 + 1


class _TurnRig:
    """A listener on a reactor that the test turns by hand.

    served   (turn, remote, target) of every request so far
    handler  answers them; at first with a body of two bytes
    """

    def __init__(self, *, patient=True):
        self.reactor = pyetcd.Reactor()
        self.served = []
        self.handler = lambda request: request.reply(200, b"ok")
        self.listeners = [self.listen(patient=patient)]
        self.clients = []

    def listen(self, *, patient):
        listener = pyetcd.Listener(
            "http://127.0.0.1:0", self.reactor, self._handle, patient=patient)
        listener.start()
        return listener

    def _handle(self, request):
        self.served.append((self.reactor.turns, request.remote, request.target))
        self.handler(request)

    def connect(self, listener=None):
        host, port = (listener or self.listeners[0]).server_address[:2]
        self.clients.append(socket.create_connection((host, port), 10))
        return self.clients[-1]

    def turn(self, count=1):
        for _ in range(count):
            self.reactor.call_soon(lambda: None)        # it does not wait
            self.reactor._turn(self.reactor._poll())

    def turn_until(self, condition):
        for _ in range(20_000):
            if condition():
                return
            self.turn()
        raise AssertionError("it never came true")

    def answer(self, client, until=b""):
        """What has come, when the connection has ended, or `until` is in it."""
        client.settimeout(0.005)
        data = []

        def is_there():
            with contextlib.suppress(socket.timeout):       # no TimeoutError before 3.10
                data.append(client.recv(1 << 20))
            return data and not data[-1] or until and until in b"".join(data)

        self.turn_until(is_there)
        return b"".join(data)

    def requests_of_a_turn(self):
        """How many were served in the fullest turn."""
        return max(collections.Counter(turn for turn, _, _ in self.served).values())


@pytest.fixture
def turn_rig():
    """A listener whose reactor turns by hand."""
    rig = _TurnRig()
    yield rig
    for client in rig.clients:
        client.close()
    for listener in rig.listeners:
        listener.stop()
    rig.reactor.close()


def _busy(seconds=0.002):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


_TURN_GET = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"


def test_attack_pipelined_requests_wait_for_the_others(turn_rig):
    """One request of a connection in a turn: the single one of another is served second."""
    many, one = turn_rig.connect(), turn_rig.connect()
    turn_rig.turn(3)
    many.sendall(b"".join(_TURN_GET % number for number in range(300)))
    one.sendall(_TURN_GET % 1_000)
    turn_rig.turn_until(lambda: len(turn_rig.served) == 301)
    targets = [target for _, _, target in turn_rig.served]
    assert "/1000" in targets[:3] and turn_rig.requests_of_a_turn() <= 3
    assert [t for t in targets if t != "/1000"] == [f"/{number}" for number in range(300)]


def test_attack_ready_clients_share_turns_and_members_go_first(turn_rig):
    """Costly requests of 60 clients take many turns; a member's is in the first or second."""
    peers = turn_rig.listen(patient=False)
    turn_rig.listeners.append(peers)
    clients = [turn_rig.connect() for _ in range(60)]
    turn_rig.turn_until(lambda: len(turn_rig.listeners[0]._connections) == 60)
    member = turn_rig.connect(peers)
    turn_rig.turn_until(lambda: peers._connections)
    turn_rig.handler = lambda request: (_busy(), request.reply(200))
    for number, client in enumerate(clients):
        client.sendall(_TURN_GET % number)
    turn_rig.turn()
    member.sendall(_TURN_GET % 1_000)
    before = turn_rig.reactor.turns
    turn_rig.turn_until(lambda: len(turn_rig.served) == 61)
    assert turn_rig.requests_of_a_turn() <= 5
    turns = {target: turn for turn, _, target in turn_rig.served}
    assert turns["/1000"] <= before + 1 and len(turns) == 61, "each once, the member at once"


def test_attack_a_late_socket_that_is_gone_is_not_served(turn_rig):
    """Its descriptor may belong to another by then."""
    clients = [turn_rig.connect() for _ in range(20)]
    turn_rig.turn_until(lambda: len(turn_rig.listeners[0]._connections) == 20)

    def handler(request):
        _busy(0.006)                    # all that a turn has for clients
        request.reply(200)
        if len(turn_rig.served) <= pyetcd.CLOCK_STRIDE:
            return
        for connection in list(turn_rig.listeners[0]._connections):
            if connection is not request.connection:
                connection.close()

    turn_rig.handler = handler
    for client in clients:
        client.sendall(_TURN_GET % 1)
    turn_rig.turn(10)
    assert len(turn_rig.served) == pyetcd.CLOCK_STRIDE + 1


def test_attack_what_becomes_ready_together_is_done_in_parts(turn_rig):
    """Callbacks in line, and flushes of clients: a few in a turn, in order, none lost."""
    for ask in (turn_rig.reactor.call_in_turn, turn_rig.reactor.flush_in_turn):
        done = []

        def work(number, done=done):
            _busy()
            done.append((turn_rig.reactor.turns, number))

        for number in range(30):
            ask(functools.partial(work, number))
        turn_rig.turn(30)
        assert [number for _, number in done] == list(range(30))
        assert max(collections.Counter(turn for turn, _ in done).values()) <= 4


def test_attack_listings_ready_together_are_sent_in_parts(turn_rig):
    """Those that waited for one listing are told in line; who has left costs nobody a search."""
    store, told = Store(), []
    for number in range(12_000):
        store.set(f"/1/d/{number:05}", value="x", now_ns=1)
    listings = pyetcd.Listings(store, turn_rig.reactor)
    wanted = pyetcd.ListingRequest("/1/d", False, True)
    requests = [pyetcd.HttpRequest(None, b"", types.SimpleNamespace()) for _ in range(2_000)]
    for request in requests:
        listings.ask(wanted, request, lambda listing: told.append(turn_rig.reactor.turns))
    assert not told
    left = _lines_run(lambda data: [r.connection.on_close() for r in requests[:1_000]], b"")
    assert left <= 5 * 1_000
    turn_rig.turn_until(lambda: len(told) >= 1_000)
    turn_rig.turn(3)
    assert len(told) == 1_000


def test_attack_small_chunks_are_decoded_in_parts(turn_rig):
    """60,000 chunks of one byte: no more of them in one turn than CHUNKED_SLICE_BYTES hold."""
    client, bodies, chunks = turn_rig.connect(), [], [0]
    turn_rig.handler = lambda request: (bodies.append(request.body), request.reply(200))
    sender = threading.Thread(target=client.sendall, args=(
        b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"1\r\na\r\n" * 60_000 + b"0\r\n\r\n",))
    sender.start()

    def is_done():
        for connection in turn_rig.listeners[0]._connections:
            if connection._chunks is not None:
                chunks.append(connection._chunks.chunks)
        return bodies

    turn_rig.turn_until(is_done)
    sender.join()
    steps = [later - earlier for earlier, later in zip(chunks, chunks[1:])]
    assert bodies == [b"a" * 60_000]
    assert max(steps) <= 2 * pyetcd.CHUNKED_SLICE_BYTES // 6 + 2


class _CountedBuffer(bytearray):
    """Counts the bytes that find() may look at."""

    looked = 0

    def find(self, what, start=0, end=None):
        self.looked += (len(self) if end is None else end) - start
        return super().find(what, start, *([] if end is None else [end]))


def test_attack_a_head_that_comes_byte_by_byte_is_looked_at_once():
    """Not again and again from its beginning: 1 MB would be looked at a million times."""
    finder, data = pyetcd.HeadFinder(), _CountedBuffer()
    head = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1_000
    for start in range(len(head)):
        data += head[start:start + 1]
        assert finder.find(data) is None
    data += b"\r\n"
    assert finder.find(data) == (len(head) - 2, len(head) + 2)
    assert data.looked <= 8 * len(head)


def test_attack_trailers_that_come_byte_by_byte_are_looked_at_once():
    """They are fed like heads."""
    decoder = pyetcd.ChunkedDecoder()
    decoder.rest = buffer = _CountedBuffer()
    decoder.feed(b"0\r\n")
    for _ in range(500):
        for char in b"a: b\r\n":
            decoder.feed(bytes([char]))
    decoder.feed(b"\r\n")
    assert decoder.done and buffer.looked <= 8 * 3_000


def _answers_of_call(data, **options):
    """What a HttpCall makes of `data`: heads, body, error."""
    class Call(pyetcd.HttpCall):
        __slots__ = ()

        def _resolve(self, host, port):
            self._sock, self.connected, self._events = sock, True, pyetcd.selectors.EVENT_READ

    sock, heads, body, ended = _FuzzSocket([data, b""]), [], [], []
    call = Call(
        FakeReactor(), "http://127.0.0.1:1", "GET", "/", {},
        on_head=lambda status, headers: heads.append(status), on_data=body.append,
        on_done=ended.append, **options,
    )
    while not call.ended:
        call._receive()
    return heads, b"".join(body), ended[0]


@pytest.mark.parametrize("interim", [
    b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"])
def test_attack_interim_answers_are_passed_over_and_counted(interim):
    """Some come before an answer; 16,000 of them are an error, and no recursion."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    assert _answers_of_call(interim * 50 + answer) == ([200], b"ok", None)
    heads, body, error = _answers_of_call(interim * 16_000 + answer)
    assert not heads and not body and "interim answers" in str(error)


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 20_000,
    b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n" + b"a" * 100_000,
    b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 100_000])
def test_attack_an_answer_without_end_is_cut(answer):
    """A peer that never ends its answers kept both others of three busy with reading them."""
    heads, body, error = _answers_of_call(answer, answer_max=1_000)
    assert heads == [200] and error is None and body.startswith(b"a" * 500)
    short = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"a" * 1_000
    assert _answers_of_call(short, answer_max=1_000) == ([200], b"a" * 1_000, None)


def test_attack_every_call_but_streams_and_proxied_ones_has_an_end():
    """A call says how much of an answer is wanted; fetch() does so for its callers."""
    calls = [node for path in Path(pyetcd.__file__).parent.glob("src/pyetcd/**/*.py")
             for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "HttpCall"]
    assert inspect.signature(pyetcd.fetch).parameters["body_max"].default < 1 << 20
    endless = [call for call in calls
               if not any(option.arg == "answer_max" for option in call.keywords)]
    assert len(calls) >= 4 and len(endless) == 2


def test_attack_pipelined_requests_before_a_half_close_are_all_answered(turn_rig):
    """Also where the last is incomplete; then the connection ends."""
    for more in (b"", b"GET /x"):
        client = turn_rig.connect()
        client.sendall(b"".join(_TURN_GET % number for number in range(50)) + more)
        client.shutdown(socket.SHUT_WR)
        assert turn_rig.answer(client).count(b"HTTP/1.1 200 OK") == 50


def test_attack_answers_that_come_late_reach_a_half_closed_client(turn_rig):
    """A handler that answers in a later turn, as writes do."""
    turn_rig.handler = lambda request: turn_rig.reactor.call_later(
        0.001, request.reply, 200, b"late")
    client = turn_rig.connect()
    client.sendall(b"".join(_TURN_GET % number for number in range(5)))
    client.shutdown(socket.SHUT_WR)
    assert turn_rig.answer(client).count(b"late") == 5


def test_attack_http10_keep_alive_stays_open(turn_rig):
    """And is answered as HTTP/1.0; without the header, the connection ends."""
    client = turn_rig.connect()
    ask = b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"
    for _ in range(2):
        client.sendall(ask)
        answer = turn_rig.answer(client, b"ok")
        assert answer.startswith(b"HTTP/1.0 200 OK\r\n")
        assert b"\r\nConnection: keep-alive\r\n" in answer and b"Content-Length: 2\r\n" in answer
    client.sendall(b"GET / HTTP/1.0\r\n\r\n")
    answer = turn_rig.answer(client)
    assert answer.startswith(b"HTTP/1.0 200 OK\r\n") and b"keep-alive" not in answer


def test_attack_http10_keep_alive_ends_where_only_the_end_tells_the_length(turn_rig):
    """A stream without length has no other end."""
    def handler(request):
        reply = request.start_stream(200)
        reply.write(b"one")
        reply.end()

    turn_rig.handler = handler
    client = turn_rig.connect()
    client.sendall(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    answer = turn_rig.answer(client)
    assert answer.endswith(b"\r\n\r\none") and b"keep-alive" not in answer


@pytest.mark.parametrize("raw", [
    b"GET / HTTP/1.0\n\n", b"GET / HTTP/1.1\nHost: x\nConnection: close\n\n",
    b"GET / HTTP/1.1\r\nHost: x\nConnection: close\r\n\n",
    b"GET / HTTP/1.1\nHost: x\nConnection: close\n\r\n",
])
def test_attack_bare_newlines_are_served(turn_rig, raw):
    """As simple health checks send them: in one piece, and byte by byte."""
    for pieces in ([raw], [raw[at:at + 1] for at in range(len(raw))]):
        client = turn_rig.connect()
        for piece in pieces:
            client.sendall(piece)
            turn_rig.turn()
        assert turn_rig.answer(client).split()[1] == b"200"


_CHUNKED = b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(("raw", "status"), [
    (b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: \r\nContent-Length: 1\r\n\r\na", b"400"),
    (b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:\r\n\r\n", b"501"),
    (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", b"400"),
    (b"GET / HTTP/1.1\r\nHost: x\r\r\n\r\n", b"400"), (b"GET / HTTP/1.0\r\r\n\r\n", b"400"),
    (b"GET / HTTP/1.1\r\r\nHost: x\r\n\r\n", b"400"),
    (b"GET / HTTP/1.1\r\nHost: x\r\nhost: x\r\n\r\n", b"400"),
    (_CHUNKED + b"1 \r\na\r\n0\r\n\r\n", b"400"), (_CHUNKED + b" 1\r\na\r\n0\r\n\r\n", b"400"),
    (_CHUNKED + b"1 ;x\r\na\r\n0\r\n\r\n", b"400"), (_CHUNKED + b"1\na\r\n0\r\n\r\n", b"400"),
    (_CHUNKED + b"1;\0\r\na\r\n0\r\n\r\n", b"400"), (_CHUNKED + b"+1\r\na\r\n0\r\n\r\n", b"400"),
    (_CHUNKED + b"0x1\r\na\r\n0\r\n\r\n", b"400"), (_CHUNKED + b"0\r\nA: \0\r\n\r\n", b"400"),
    (_CHUNKED + b"0\r\nA b\r\n\r\n", b"400"), (_CHUNKED + b"0\r\nA: b\nC: d\r\n\r\n", b"400"),
    (_CHUNKED + b"0\r\nA: b\n\n", b"400"),
    (_CHUNKED + b"0\r\n" + b"A: b\r\n" * 1_001 + b"\r\n", b"400"),
    (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1,2\r\n\r\n", b"400"),
    (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\r\n", b"400"),
    (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"1," * 3_000 + b"1\r\n\r\n", b"431"),
    (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: " + b"a," * 3_000 + b"\r\n\r\n", b"431"),
])
def test_attack_ambiguous_requests_are_refused(turn_rig, raw, status):
    """What two servers in a row could read in two ways ends the connection."""
    client = turn_rig.connect()
    client.sendall(raw)
    answer = turn_rig.answer(client)
    assert answer.split()[1] == status and not turn_rig.served and answer.count(b"HTTP/1.") == 1


@pytest.mark.parametrize("raw", [
    _CHUNKED + b"1;a=b\r\na\r\n0;c\r\nA: b\r\n\r\n", _CHUNKED + b"0001\r\na\r\n000\r\n\r\n",
    _CHUNKED + b"1;a=\"b c\"\r\na\r\n0\r\n\r\n"])
def test_attack_chunks_as_the_standard_has_them_are_taken(turn_rig, raw):
    """Extensions and trailers, of no interest."""
    client = turn_rig.connect()
    client.sendall(raw)
    turn_rig.answer(client, b"ok")
    assert len(turn_rig.served) == 1


def test_attack_a_handler_that_fails_after_its_reply_sends_no_second_one(turn_rig, caplog):
    """The reply stands, and the connection serves on."""
    def handler(request):
        request.reply(200, b"first")
        raise KeyError("too late")

    turn_rig.handler = handler
    client = turn_rig.connect()
    client.sendall(_TURN_GET % 1 + _TURN_GET % 2 + b"GET /3 HTTP/1.0\r\n\r\n")
    answer = turn_rig.answer(client)
    assert answer.count(b"HTTP/1.") == answer.count(b"first") == 3 and b"500" not in answer
    assert sum("bug:" in message for message in caplog.messages) == 3


def test_attack_a_handler_that_fails_before_its_reply_sends_one_only(turn_rig):
    """What it has set going answers later, and is not heard."""
    late = []

    def handler(request):
        late.append(request)
        raise KeyError("too early")

    turn_rig.handler = handler
    client = turn_rig.connect()
    client.sendall(_TURN_GET % 1)
    turn_rig.turn_until(lambda: late)
    late[0].reply(200, b"late")
    late[0].start_stream(200).write(b"later")
    answer = turn_rig.answer(client)
    assert answer.count(b"HTTP/1.1") == 1 and b" 500 " in answer and b"late" not in answer


def test_attack_a_handler_that_fails_in_a_stream_cuts_it(turn_rig):
    """A second head inside of a body would look like a part of it."""
    def handler(request):
        request.start_stream(200).write(b"first")
        raise KeyError("too late")

    turn_rig.handler = handler
    client = turn_rig.connect()
    client.sendall(_TURN_GET % 1)
    answer = turn_rig.answer(client)
    assert answer.count(b"HTTP/1.1") <= 1 and not answer.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(("method", "path", "body", "content_type", "statuses"), [
    ("POST", "/new", b"a=b&" * 2_600_000, "application/x-www-form-urlencoded", {400}),
    ("POST", "/new", b"size=" + b"1" * 10_000_000, "application/x-www-form-urlencoded", {400}),
    ("PUT", "/v2/keys/a", b"a=b&" * 2_600_000, "application/x-www-form-urlencoded", {400}),
    ("PUT", "/v2/keys/a", b"value=" + b"%41" * 3_000_000, "application/x-www-form-urlencoded",
     {200, 201}),
    ("PUT", "/v2/keys/" + "a" * 70_000, b"value=1", "application/x-www-form-urlencoded", {400}),
    ("PUT", "/v2/keys/a", b"value=1", "a/b" + ";c=d" * 100_000, {400}),
    ("GET", "/v2/keys/a?" + "a=b&" * 100_000, b"", "", {400}),
    ("GET", "/v2/keys" + "/b" * 200_000, b"", "", {404}),
    ("GET", "/v2/keys/" + "a/../" * 80_000, b"", "", {414}),
    ("DELETE", "/v2/keys" + "/a" * 200_000, b"", "", {400}),
    ("GET", "/readyz?" + "exclude=b&" * 40_000, b"", "", {414}),
    ("POST", "/v2/members", b"[" + b"0," * 5_000_000, "application/json", {400}),
    ("POST", "/v2/members", b'{"peerURLs":[' + b'"http://a:1",' * 9_000 + b'"b"]}',
     "application/json", {400}),
    ("PUT", "/v2/auth/roles/a", b"[" * 1_000_000, "application/json", {400}),
    ("PUT", "/v2/auth/users/a", b"[" + b"0," * 5_000_000, "application/json", {400}),
    ("PUT", "/config/local/log", b"[" * 10_000_000, "application/json", {400}),
], ids=lambda value: str(value)[:24] if isinstance(value, str) else "")
def test_attack_expensive_requests_are_refused_or_sliced(
    http_server, method, path, body, content_type, statuses
):
    """Few lines of ours run for each turn of them; and the member serves on."""
    most = [0]

    def watch(etcd):
        turn = etcd.reactor._turn

        def counted(events):
            most[0] = max(most[0], _lines_run(lambda data: turn(events), b""))

        etcd.reactor._turn = counted

    http_server.call(watch)
    status, _, _ = _http_ask(http_server, method, path, body, {"Content-Type": content_type})
    assert status in statuses
    assert _http_ask(http_server, "GET", "/version")[0] == 200
    assert most[0] < 60_000, "some 10 ms where nothing counts the lines"
