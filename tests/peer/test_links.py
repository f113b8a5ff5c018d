"""Peer transport: frames, refusals, and two members on loopback."""

from __future__ import annotations

import collections
import contextlib
import errno
import gzip
import hashlib
import itertools
import json
import logging
import pathlib
import queue
import random
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest

import pyetcd
from pyetcd import (
    AppV2Encoder,
    CodecError,
    Entry,
    EntryListEncoder,
    Message,
    MessageEncoder,
    MsgType,
    Reactor,
    Snapshot,
    Store,
    StreamParser,
    Transport,
    app_v2_frames,
    message_frames,
)
from tests.kit.basics import TESTDATA, eventually, free_port
from tests.kit.http import _http_ask, _HttpSocket
from tests.kit.links import _door_change, _door_entry
from tests.kit.reactors import FakeReactor

_LINK_CLUSTER = 0xC53239D6A4BED4F6
_LINK_APP_RECORDINGS = ("leader-to-follower", "new-leader", "idle-heartbeats-only")
_LINK_MESSAGE_RECORDINGS = (
    "leader-to-follower", "follower-to-leader", "election-candidate-to-voter",
    "election-voter-to-candidate",
)


# -- helpers -----------------------------------------------------------------


def _link_recording(name: str) -> Tuple[bytes, Dict[str, Any]]:
    data = (TESTDATA / f"stream-{name}.bin").read_bytes()
    return data, json.loads((TESTDATA / f"stream-{name}.json").read_text())


def _link_fed(decoder: StreamParser, data: bytes) -> List[Message]:
    """The messages that are complete with `data`."""
    return [message for message in decoder.feed(data) if message is not None]


def _link_summary(message: Message) -> Dict[str, Any]:
    """What a recording says of a message, read from ours."""
    return {
        "type": message.type, "to": f"{message.to:x}", "from": f"{message.sender:x}",
        "term": message.term, "logTerm": message.log_term, "index": message.index,
        "commit": message.commit, "reject": message.reject, "rejectHint": message.reject_hint,
        "entries": [_link_entry_summary(entry) for entry in message.entries],
    }


def _link_entry_summary(entry: Entry) -> Tuple[int, int, int, int]:
    request = pyetcd.decode_request(entry.data) if entry.data and not entry.type else None
    return entry.type, entry.term, entry.index, request.id if request else 0


def _link_recorded_entries(entries: List[Dict[str, Any]]) -> List[Tuple[int, int, int, int]]:
    return [(entry["Type"], entry["Term"], entry["Index"], entry.get("Request", {}).get("ID", 0))
            for entry in entries]


def _link_recorded(frame: Dict[str, Any], recording: Dict[str, Any]) -> Dict[str, Any]:
    """The summary of one recorded frame, which is not a heartbeat."""
    if "implied" in frame:
        return {
            "type": MsgType.APP, "to": recording["dialer"], "from": recording["server"],
            "reject": False, "rejectHint": 0, "commit": frame["commit"],
            **{name: frame["implied"][name] for name in ("term", "logTerm", "index")},
            "entries": _link_recorded_entries(frame.get("entries", [])),
        }
    message = frame["message"]
    names = ("type", "to", "from", "term", "logTerm", "index", "commit", "reject", "rejectHint")
    return {**{name: message[name] for name in names},
            "entries": _link_recorded_entries(message["entries"])}


def _link_is_heartbeat(frame: Dict[str, Any]) -> bool:
    if frame.get("frame") == "linkHeartbeat":
        return True
    return frame.get("message", {}).get("from") == "0"


def _link_app(index: int, terms: List[int], *, term: int = 5, log_term: int = 5) -> Message:
    """A MsgApp from member 1 to member 2 with entries index+1... of `terms`."""
    entries = [Entry(0, entry_term, index + 1 + offset, b"value %d" % offset)
               for offset, entry_term in enumerate(terms)]
    return Message(MsgType.APP, to=2, sender=1, term=term, log_term=log_term, index=index,
                   entries=entries, commit=index)


def _link_beat(sender: int, to: int, *, commit: int = 0) -> Message:
    return Message(MsgType.HEARTBEAT, to=to, sender=sender, term=3, commit=commit)


class _LinkNet:
    """One reactor, turned by the test until a condition holds."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.closers: List[Callable[[], None]] = []

    def until(self, condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
        """Turn until condition() is true."""
        def turn() -> None:
            self.reactor.call_later(0.005, lambda: None)
            self.reactor._turn(self.reactor._poll())

        eventually(condition, timeout_s, between=turn)

    def turn_for(self, seconds: float) -> None:
        """Turn for a while, to see that something does not happen."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end)

    def listen(self, handler: Callable[[Any], None], port: int = 0) -> pyetcd.Listener:
        """A listener for the peer protocol on loopback."""
        listener = pyetcd.Listener(
            f"http://127.0.0.1:{port or free_port()}", self.reactor, handler,
            body_max=pyetcd.PEER_BODY_BYTES_MAX, patient=False,
        )
        listener.start()
        self.closers.append(listener.stop)
        return listener

    def ask(self, url: str, request: bytes, ends: bytes = b"") -> bytes:
        """Send raw bytes; return what comes until `ends` is seen, or the connection closes."""
        with socket.create_connection(pyetcd.url_address(url)) as sock:
            sock.setblocking(False)
            left, answer = memoryview(request), [b""]

            def answered() -> bool:
                nonlocal left
                try:
                    left = left[sock.send(left):] if left else left
                    data = sock.recv(65_536)
                except BlockingIOError:
                    return False
                answer[0] += data
                return not data or bool(ends and ends in answer[0])

            self.until(answered)
            return answer[0]

    def close(self) -> None:
        for closer in reversed(self.closers):
            closer()
        self.reactor.stop()
        self.reactor.run()
        self.reactor.close()


@pytest.fixture
def link_net():
    """A reactor that ends with the test."""
    net = _LinkNet()
    yield net
    net.close()


def _dial_listen(host: str) -> Tuple[socket.socket, Any]:
    """A listening socket on loopback, and what getaddrinfo says of it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, 0), family=family)
    return sock, (family, socket.SOCK_STREAM, 6, "", sock.getsockname())


def _dial(net: _LinkNet, *found: Any) -> Tuple[Optional[Tuple[str, int]], Optional[OSError]]:
    """Dial these addresses; return which one was reached, or the error."""
    ends: List[Any] = []
    pyetcd.Dial(net.reactor, found, lambda sock, error: ends.append((sock, error)))
    assert not ends, "it called back from inside the constructor"
    net.until(lambda: ends)
    (sock, error), *more = ends
    assert not more
    with sock or contextlib.nullcontext():
        return sock and sock.getpeername()[:2], error


def test_link_dial_order_takes_turns() -> None:
    """RFC 8305 §4: after an address of one family comes one of the other; the first begins."""
    four, six = socket.AF_INET, socket.AF_INET6
    found = [(six, 1), (six, 2), (six, 3), (four, 4), (four, 5)]
    assert pyetcd.dial_order(found) == [(six, 1), (four, 4), (six, 2), (four, 5), (six, 3)]
    assert pyetcd.dial_order([]) == []
    assert len(pyetcd.dial_order(found * 100)) == pyetcd.DIAL_ADDRESSES_MAX


@pytest.mark.parametrize("hosts", [("127.0.0.1", "::1"), ("::1", "127.0.0.1")], ids=str)
def test_link_dial_goes_on_to_the_next_address(link_net: _LinkNet, hosts: Tuple[str, ...]) -> None:
    """Whichever family a listener has chosen, who dials its name finds it."""
    (closed, refusing), (open_, good) = map(_dial_listen, hosts)
    closed.close()
    with open_:
        assert _dial(link_net, refusing, good) == (good[4][:2], None)
        no_family = (socket.AF_APPLETALK, socket.SOCK_STREAM, 6, "", refusing[4])
        assert _dial(link_net, no_family, refusing, good) == (good[4][:2], None)
    reached, error = _dial(link_net, refusing, good)
    assert reached is None and error is not None and error.errno == errno.ECONNREFUSED


def test_link_dial_does_not_wait_for_an_address_that_is_silent(link_net: _LinkNet) -> None:
    """The second address is dialed beside the first, and all attempts end with the winner."""
    before = len(link_net.reactor._callbacks)
    with contextlib.ExitStack() as held:
        full, silent = _dial_listen("127.0.0.1")
        held.enter_context(full).listen(0)
        for _ in range(4):                      # its queue is full: it answers nobody any more
            sock = held.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        open_, good = _dial_listen("127.0.0.1")
        held.enter_context(open_)
        assert _dial(link_net, silent, good) == (good[4][:2], None)
        assert len(link_net.reactor._callbacks) == before
        dial = pyetcd.Dial(link_net.reactor, [silent, silent], lambda sock, error: 1 / 0)
        dial.cancel()
        link_net.turn_for(pyetcd.DIAL_SECONDS * 1.2)
        assert len(link_net.reactor._callbacks) == before


def test_link_call_by_name_reaches_a_listener_of_either_family(
    link_net: _LinkNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`localhost` and names with two addresses; a name that cannot be is an error, no more."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **options: [
        info for each in (("::1", "127.0.0.1") if host == "both.test" else (host,))
        for info in real(each, *args, **options)])
    for host in ("[::1]", "127.0.0.1"):
        listener = pyetcd.Listener(
            f"http://{host}:{free_port()}", link_net.reactor, lambda request: request.reply(200))
        listener.start()
        link_net.closers.append(listener.stop)
        for name in ("localhost", "both.test"):
            ends: List[Optional[Exception]] = []
            port = listener.server_address[1]
            pyetcd.HttpCall(link_net.reactor, f"http://{name}:{port}", "GET", "/", {},
                            on_done=ends.append)
            link_net.until(lambda ends=ends: ends)
            assert ends == [None]
    failed: List[Optional[Exception]] = []
    for name in ("a..b", "x" * 70 + ".test"):
        pyetcd.HttpCall(link_net.reactor, f"http://{name}:1", "GET", "/", {}, on_done=failed.append)
    link_net.until(lambda: len(failed) == 2)
    assert all(isinstance(error, Exception) for error in failed)


class _LinkMember:
    """A Transport with its listener, and what it was told."""

    def __init__(
        self, net: _LinkNet, member_id: int, port: int = 0, **more: Any
    ) -> None:
        self.id = member_id
        self.inbox: List[Message] = []
        self.unreachable: List[int] = []
        self.snapshots: List[Tuple[int, bool]] = []
        self.removals = 0
        self.removed_ids: set = set()
        self.sent: List[Tuple[int, str, int, bool]] = []
        self.received: List[Tuple[int, int]] = []
        self.not_mine: List[str] = []
        self.net = net
        self.listener = net.listen(self._handle, port)
        self.url = self.listener.bound_url
        self.transport = Transport(
            net.reactor, member_id=member_id, cluster_id=_LINK_CLUSTER, peer_urls=[self.url],
            is_removed=self.removed_ids.__contains__, deliver=self.inbox.append,
            unreachable=self.unreachable.append,
            snapshot_done=lambda to, ok: self.snapshots.append((to, ok)),
            removed=self._removed, election_s=1.0,
            sent=lambda sent: self.sent.append(
                (sent.to, sent.channel, sent.message.type, sent.ok)),
            received=lambda sender, message, size: self.received.append((sender, size)), **more,
        )
        net.closers.append(self.transport.stop)

    def _handle(self, request: Any) -> None:
        if not self.transport.handle(request):
            self.not_mine.append(request.path)
            request.reply(404, b"404 page not found\n", "text/plain")

    def _removed(self) -> None:
        self.removals += 1

    @property
    def types(self) -> List[int]:
        return [message.type for message in self.inbox]

    def end(self) -> None:
        """Go away as a crashed process does."""
        self.transport.stop()
        self.listener.stop()

    def knows(self, other: _LinkMember) -> None:
        self.transport.add_peer(other.id, [other.url])

    def has_streams_to(self, other: _LinkMember) -> bool:
        peer = self.transport._peers.get(other.id)
        return bool(peer and peer._app_writer.attached and peer._message_writer.attached)


def _link_pair(net: _LinkNet) -> Tuple[_LinkMember, _LinkMember]:
    """Members 1 and 2 with all four streams open."""
    one, two = _LinkMember(net, 1), _LinkMember(net, 2)
    one.knows(two)
    two.knows(one)
    net.until(lambda: one.has_streams_to(two) and two.has_streams_to(one))
    return one, two


def _link_request(
    method: str, path: str, body: bytes = b"", *, chunked: bool = False, **headers: Optional[str]
) -> bytes:
    """A raw request of member 2 to member 1; a header given as None is left out."""
    fields: Dict[str, Optional[str]] = {
        "Host": "peer", "X-Etcd-Cluster-Id": f"{_LINK_CLUSTER:x}", "X-Server-From": "2",
        "X-Server-Version": "2.3.8", "X-Min-Cluster-Version": "2.2.0", "X-Raft-To": "1",
        "Connection": "close",
    }
    if chunked:
        fields["Transfer-Encoding"] = "chunked"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    elif method == "POST":
        fields["Content-Length"] = str(len(body))
    fields.update({name.replace("_", "-"): value for name, value in headers.items()})
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


class _LinkFakeReply:
    """A StreamReply whose other end takes nothing until it is told to."""

    def __init__(self) -> None:
        self.pieces: List[bytes] = []
        self.pending = 0
        self.closed = False
        self.on_close: Optional[Callable[[], None]] = None

    def when_read(self, callback: Callable[[], None]) -> None:
        self.on_drain = callback

    def write(self, data: bytes, more: Sequence[bytes] = ()) -> bool:
        data = b"".join((data, *more))
        self.pieces.append(data)
        self.pending += len(data)
        return True

    def read(self) -> None:
        """The other end takes everything."""
        self.pending = 0
        self.on_drain()

    def abort(self) -> None:
        self.closed = True
        self.on_close = None


class _LinkFakes:
    """A LinkContext of fakes, and what it was told."""

    def __init__(self) -> None:
        self.reactor = FakeReactor()
        self.unreachable: List[int] = []
        self.errors: List[str] = []
        self.snapshots: List[Tuple[int, bool]] = []
        self.sent: List[pyetcd.Sent] = []
        self.round_trips: List[Any] = []
        self.context = pyetcd.LinkContext(
            self.reactor, 1, "c", {}, 1.0, self.errors.append, lambda message, size: True,
            self.unreachable.append, lambda to, ok: self.snapshots.append((to, ok)),
            lambda: None, self.sent.append, lambda *round_trip: self.round_trips.append(round_trip),
            None, pyetcd.SlicedWork(self.reactor),
        )
        self.status = pyetcd.PeerStatus(2, self.reactor.wall_ns)

    def writer(self, kind: pyetcd.StreamKind = pyetcd.MESSAGE_STREAM) -> pyetcd.StreamWriter:
        return pyetcd.StreamWriter(self.context, 2, kind, self.status)


# -- frames ------------------------------------------------------------------


@pytest.mark.parametrize("name", _LINK_APP_RECORDINGS)
def test_link_msgappv2_recording_is_decoded_as_etcd_meant_it(name: str) -> None:
    """Every frame of a recorded msgapp stream yields the message noted beside it."""
    data, recording = _link_recording("msgappv2-" + name)
    local_id, remote_id = int(recording["dialer"], 16), int(recording["server"], 16)
    decoder = StreamParser(app_v2_frames(local_id, remote_id))

    messages = _link_fed(decoder, data)

    frames = [frame for frame in recording["frames"] if not _link_is_heartbeat(frame)]
    assert [_link_summary(message) for message in messages] == [
        _link_recorded(frame, recording) for frame in frames]


@pytest.mark.parametrize("name", _LINK_MESSAGE_RECORDINGS)
def test_link_message_recording_is_decoded_as_etcd_meant_it(name: str) -> None:
    """Every frame of a recorded message stream, but the heartbeats, yields its message."""
    data, recording = _link_recording("message-" + name)

    messages = _link_fed(StreamParser(message_frames()), data)

    frames = [frame for frame in recording["frames"] if not _link_is_heartbeat(frame)]
    assert [_link_summary(message) for message in messages] == [
        _link_recorded(frame, recording) for frame in frames]


@pytest.mark.parametrize("name", [
    *("msgappv2-" + name for name in _LINK_APP_RECORDINGS),
    *("message-" + name for name in _LINK_MESSAGE_RECORDINGS),
])
def test_link_recording_is_encoded_to_the_same_bytes(name: str) -> None:
    """What was decoded, with heartbeats at their places, encodes to the recorded stream."""
    data, recording = _link_recording(name)
    is_app = name.startswith("msgappv2")
    decoder = StreamParser(app_v2_frames(1, 2) if is_app else message_frames())
    encoder = AppV2Encoder(EntryListEncoder()) if is_app else MessageEncoder()
    messages = iter(_link_fed(decoder, data))

    encoded = [
        encoder.heartbeat if _link_is_heartbeat(frame) else b"".join(encoder.encode(next(messages)))
        for frame in recording["frames"]]

    assert b"".join(encoded) == data


@pytest.mark.parametrize("name", ["msgappv2-leader-to-follower", "message-leader-to-follower"])
def test_link_pieces_of_any_size_give_the_same_messages(name: str) -> None:
    """However the network cuts a stream, the messages are the same."""
    data, _ = _link_recording(name)
    def make() -> StreamParser:
        return StreamParser(app_v2_frames(1, 2) if "msgappv2" in name else message_frames())

    expected = [_link_summary(message) for message in _link_fed(make(), data)]
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)

    for longest in (1, 2, 9, 100, 2_000):
        decoder, messages, offset = make(), [], 0
        while offset < len(data):
            size = rng.randint(1, longest)
            messages += _link_fed(decoder, data[offset:offset + size])
            offset += size
        assert [_link_summary(message) for message in messages] == expected


@pytest.mark.parametrize("frame", [
    pytest.param(b"\3", id="unknown kind"),
    pytest.param(b"\xff" * 20, id="kind 255"),
    pytest.param(b"\1" + b"\0" * 7 + b"\1", id="continues nothing"),
    pytest.param(b"\2" + b"\xff" * 8, id="message longer than memory"),
    pytest.param(b"\2" + b"\0" * 7 + b"\2\xff\xff", id="no protobuf"),
    pytest.param(b"\2" + b"\0" * 7 + b"\2\x08\x63", id="unknown message type"),
])
def test_link_msgappv2_nonsense_is_a_codec_error(frame: bytes) -> None:
    """Bytes that are no frame raise CodecError, whatever they announce."""
    with pytest.raises(CodecError):
        _link_fed(StreamParser(app_v2_frames(1, 2)), frame)


@pytest.mark.parametrize("rest", [
    pytest.param(b"\1" + b"\xff" * 8, id="count"),
    pytest.param(b"\1" + b"\0" * 7 + b"\1" + b"\xff" * 8, id="entry length"),
    pytest.param(b"\1" + b"\0" * 7 + b"\1" + b"\0" * 7 + b"\1\xff", id="entry bytes"),
])
def test_link_msgappv2_nonsense_in_a_short_frame_is_a_codec_error(rest: bytes) -> None:
    """The frame that leaves things out is checked like the full one."""
    start = b"".join(AppV2Encoder(EntryListEncoder()).encode(_link_app(3, [5])))
    decoder = StreamParser(app_v2_frames(2, 1))
    assert len(_link_fed(decoder, start)) == 1

    with pytest.raises(CodecError):
        _link_fed(decoder, rest)


@pytest.mark.parametrize("frame", [
    pytest.param(b"\xff" * 8, id="longer than memory"),
    pytest.param(b"\0" * 7 + b"\3\x0f\xff\xff", id="no protobuf"),
])
def test_link_message_nonsense_is_a_codec_error(frame: bytes) -> None:
    """The message stream is checked likewise."""
    with pytest.raises(CodecError):
        _link_fed(StreamParser(message_frames()), frame)


def test_link_damaged_streams_raise_nothing_but_codec_error() -> None:
    """Bytes flipped at random never make a decoder fail in another way."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    streams = [_link_recording(name)[0] for name in
               ("msgappv2-new-leader", "message-election-voter-to-candidate")]

    for _ in range(400):
        for data, frames in zip(streams, (app_v2_frames(1, 2), message_frames())):
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                messages = _link_fed(StreamParser(frames), bytes(damaged))
            except CodecError:
                continue
            assert all(isinstance(message, Message) for message in messages)


def test_link_first_frame_of_a_connection_is_full() -> None:
    """A new encoder leaves nothing out; the second, adjoining message is short."""
    encoder = AppV2Encoder(EntryListEncoder())

    frames = [b"".join(encoder.encode(message))
              for message in (_link_app(7, [5, 5]), _link_app(9, [5]))]

    assert [frame[0] for frame in frames] == [2, 1]


@pytest.mark.parametrize("message", [
    pytest.param(_link_app(12, [5]), id="gap"),
    pytest.param(_link_app(9, [6], term=6), id="new term"),
    pytest.param(_link_app(8, [5]), id="again"),
])
def test_link_frame_is_full_when_it_does_not_follow(message: Message) -> None:
    """What the last frame does not imply is sent in full, and understood."""
    encoder, decoder = AppV2Encoder(EntryListEncoder()), StreamParser(app_v2_frames(2, 1))
    first = b"".join(encoder.encode(_link_app(7, [5, 5])))

    frame = b"".join(encoder.encode(message))

    assert frame[0] == 2
    arrived = _link_fed(decoder, first + frame)[1]
    assert [getattr(arrived, name) for name in Message.__slots__] == [
        getattr(message, name) for name in Message.__slots__]


def test_link_list_shared_by_two_followers_is_encoded_once(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader's broadcast costs one encoding of its entries, not one per follower."""
    encoded: List[Entry] = []
    encode = pyetcd.encode_entry
    monkeypatch.setattr(
        pyetcd, "encode_entry", lambda entry: (encoded.append(entry), encode(entry))[1])
    lists = EntryListEncoder()
    encoders = [AppV2Encoder(lists), AppV2Encoder(lists)]
    message = _link_app(8, [5, 5, 5])
    for encoder in encoders:
        b"".join(encoder.encode(_link_app(7, [5])))
    encoded.clear()

    frames = [b"".join(encoder.encode(message)) for encoder in encoders]

    assert frames[0] == frames[1]
    assert len(encoded) == 3


def test_link_large_message_in_small_pieces_arrives() -> None:
    """A message of 8 MB is put together from pieces as a socket gives them."""
    message = Message(MsgType.PROP, to=2, sender=1, entries=[Entry(data=b"x" * 8_000_000)])
    data = b"".join(MessageEncoder.encode(message))
    decoder, messages = StreamParser(message_frames()), []

    for offset in range(0, len(data), 65_536):
        messages += _link_fed(decoder, data[offset:offset + 65_536])

    assert [len(entry.data) for entry in messages[0].entries] == [8_000_000]


# -- refusals ----------------------------------------------------------------


_LINK_STREAM = "/raft/stream/msgapp/2"


@pytest.mark.parametrize("method, path, headers, status, text, allow", [
    pytest.param("POST", _LINK_STREAM, {}, 405, "Method Not Allowed", "GET", id="stream-post"),
    pytest.param("GET", "/raft", {}, 405, "Method Not Allowed", "POST", id="raft-get"),
    pytest.param("PUT", "/raft/snapshot", {}, 405, "Method Not Allowed", "POST", id="snap-put"),
    pytest.param("GET", _LINK_STREAM, {"X_Server_Version": "2.1.9"}, 412,
                 "incompatible version", "", id="too-old"),
    pytest.param("GET", _LINK_STREAM, {"X_Server_Version": None}, 412,
                 "incompatible version", "", id="no-version"),
    pytest.param("POST", "/raft", {"X_Min_Cluster_Version": "3.0.0"}, 412,
                 "incompatible version", "", id="wants-newer"),
    pytest.param("POST", "/raft", {"X_Server_Version": "new"}, 412,
                 "incompatible version", "", id="no-semver"),
    pytest.param("GET", _LINK_STREAM, {"X_Etcd_Cluster_Id": "1", "X_Server_Version": "2.0.0"},
                 412, "incompatible version", "", id="version-before-cluster"),
    pytest.param("GET", _LINK_STREAM, {"X_Etcd_Cluster_Id": "0c53239d6a4bed4f6"}, 412,
                 "cluster ID mismatch", "", id="cluster-padded"),
    pytest.param("POST", "/raft", {"X_Etcd_Cluster_Id": None}, 412,
                 "cluster ID mismatch", "", id="no-cluster"),
    pytest.param("GET", "/raft/stream/other/2", {}, 404, "invalid path", "", id="kind"),
    pytest.param("GET", "/raft/stream/other/zz", {}, 404, "invalid path", "", id="kind-first"),
    pytest.param("GET", "/raft/stream/msgapp/2/3", {}, 404, "invalid path", "", id="too-deep"),
    pytest.param("GET", "/raft/stream/msgapp/0x2", {}, 404, "invalid from", "", id="not-hex"),
    pytest.param("GET", "/raft/stream/msgapp/", {}, 404, "invalid from", "", id="no-id"),
    pytest.param("GET", "/raft/stream/message/" + "f" * 17, {}, 404, "invalid from", "",
                 id="id-too-long"),
    pytest.param("GET", "/raft/stream/message/9", {"X_Raft_To": "7"}, 410, "removed member", "",
                 id="removed-first"),
    pytest.param("GET", "/raft/stream/message/5", {"X_Raft_To": "7"}, 404,
                 "error sender not found", "", id="stranger-first"),
    pytest.param("GET", _LINK_STREAM, {"X_Raft_To": "7"}, 412, "to field mismatch", "", id="to"),
    pytest.param("GET", _LINK_STREAM, {"X_Raft_To": None}, 412, "to field mismatch", "",
                 id="no-to"),
    pytest.param("POST", "/raft", {}, 500, "error processing raft message", "", id="to-nobody"),
])
def test_link_requests_are_refused_in_etcds_order(
    link_net: _LinkNet, method: str, path: str, headers: Dict[str, Optional[str]], status: int,
    text: str, allow: str,
) -> None:
    """Method, versions, cluster, path, id, removed, known, addressee: the first fault answers."""
    one = _LinkMember(link_net, 1)
    one.transport.add_peer(2, ["http://127.0.0.1:1"])
    one.removed_ids.add(9)

    answer = link_net.ask(one.url, _link_request(method, path, **headers)).decode()

    head, _, body = answer.partition("\r\n\r\n")
    assert head.split()[1] == str(status)
    assert body == text + "\n"
    assert "X-Content-Type-Options: nosniff" in head
    assert "text/plain; charset=utf-8" in head
    assert ("Allow: " + allow in head) == bool(allow)
    assert ("X-Etcd-Cluster-Id: c53239d6a4bed4f6" in head) == (status != 405)
    assert one.inbox == []


def test_link_oversized_post_is_refused_unread(link_net: _LinkNet) -> None:
    """A body that announces more than the limit is answered 413."""
    one = _LinkMember(link_net, 1)
    one.listener.body_max = 100

    answer = link_net.ask(one.url, _link_request("POST", "/raft", b"x" * 101))

    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("path, body, text", [
    pytest.param("/raft", b"\xff", "error unmarshaling raft message", id="raft"),
    pytest.param("/raft/snapshot", b"", "failed to decode raft message (unexpected EOF)",
                 id="empty"),
    pytest.param("/raft/snapshot", b"\0" * 7 + b"\5abc",
                 "failed to decode raft message (unexpected EOF)", id="cut"),
    pytest.param("/raft/snapshot", b"\xff" * 9,
                 f"failed to decode raft message (frame of {2**64 - 1} bytes)", id="huge"),
    pytest.param("/raft/snapshot", MessageEncoder.heartbeat, "wrong raft message type",
                 id="heartbeat"),
])
def test_link_posted_nonsense_is_answered_400(
    link_net: _LinkNet, path: str, body: bytes, text: str
) -> None:
    """What cannot be decoded costs the sender an answer of 400, and us nothing."""
    one = _LinkMember(link_net, 1)

    answer = link_net.ask(one.url, _link_request("POST", path, body)).decode()

    assert answer.split()[1] == "400"
    assert answer.endswith("\r\n\r\n" + text + "\n")
    assert one.inbox == []


def test_link_posted_message_is_delivered_and_answered_204(link_net: _LinkNet) -> None:
    """A recorded POST of etcd 2.3.8 reaches Raft."""
    body = (TESTDATA / "pipeline-post-1-MsgProp.bin").read_bytes()
    one = _LinkMember(link_net, 0xE0C9C7DA79491D1C)

    answer = link_net.ask(one.url, _link_request("POST", "/raft", body)).decode()

    assert answer.startswith("HTTP/1.1 204 No Content\r\n")
    assert "X-Etcd-Cluster-Id: c53239d6a4bed4f6\r\n" in answer
    assert answer.endswith("\r\n\r\n")
    assert one.types == [MsgType.PROP]
    assert one.received == [(0x3FBECE688E64B66C, len(body))]


@pytest.mark.parametrize("message, status", [
    pytest.param(_link_beat(9, 1), "403", id="removed sender"),
    pytest.param(_link_beat(2, 3), "500", id="another addressee"),
    pytest.param(Message(MsgType.SNAP, to=1, sender=2, term=1), "500", id="empty snapshot"),
])
def test_link_message_that_is_not_for_us_is_not_delivered(
    link_net: _LinkNet, message: Message, status: str
) -> None:
    """Removed senders, other addressees and snapshots of nothing stop at the door."""
    one = _LinkMember(link_net, 1)
    one.removed_ids.add(9)
    body = pyetcd.encode_message(message)

    answer = link_net.ask(one.url, _link_request("POST", "/raft", body)).decode()

    assert answer.split()[1] == status
    assert one.inbox == []
    if status == "403":
        assert answer.endswith('{"message":"cannot process message from removed member"}')


def test_link_snapshot_of_etcd_3_is_accepted(link_net: _LinkNet) -> None:
    """The recorded, chunked POST /raft/snapshot of 3.4.23 arrives; its database is ignored."""
    body = gzip.decompress((TESTDATA / "snapshot-post-3.4.23.bin.gz").read_bytes())
    one = _LinkMember(link_net, 0x68CFC6C1F424BB7B)

    answer = link_net.ask(
        one.url, _link_request("POST", "/raft/snapshot", body, chunked=True))

    assert answer.startswith(b"HTTP/1.1 204 ")
    snapshot = one.inbox[0].snapshot
    assert (snapshot.term, snapshot.index, len(snapshot.data)) == (2, 30, 12_816)


def test_link_probing_tells_the_time(link_net: _LinkNet) -> None:
    """Any method is answered with our clock, without the checks of the others."""
    one = _LinkMember(link_net, 1)

    for method in ("GET", "POST"):
        request = f"{method} /raft/probing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        head, _, body = link_net.ask(one.url, request.encode()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        assert body.endswith(b"\n")
        told = json.loads(body)
        assert told["OK"] is True
        assert abs(pyetcd.parse_time(told["Now"]) - time.time_ns()) < 5 * pyetcd.NS


def test_link_other_paths_are_left_to_the_next_handler(link_net: _LinkNet) -> None:
    """Only raft's paths are answered; /raft/stream is sent on to /raft/stream/."""
    one = _LinkMember(link_net, 1)

    for path in ("/members", "/raft/other", "/raftx", "/"):
        link_net.ask(one.url, _link_request("GET", path))
    moved = link_net.ask(one.url, _link_request("GET", "/raft/stream"))

    assert one.not_mine == ["/members", "/raft/other", "/raftx", "/"]
    assert moved.startswith(b"HTTP/1.1 301 ")
    assert b"Location: /raft/stream/\r\n" in moved


def test_link_open_stream_has_the_recorded_head(link_net: _LinkNet) -> None:
    """A dialer sees the head that etcd 2.3.8 sends, and a first heartbeat."""
    one = _LinkMember(link_net, 1)
    one.transport.add_peer(2, ["http://127.0.0.1:1"])
    _, recording = _link_recording("msgappv2-idle-heartbeats-only")

    answer = link_net.ask(one.url, _link_request(
        "GET", _LINK_STREAM, Connection=None), ends=b"1\r\n\0\r\n")

    head = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    recorded = recording["response_head"].strip().split("\r\n")
    assert [line for line in head if "Date" not in line] == [
        line for line in recorded if "Date" not in line]


# -- two members -------------------------------------------------------------


def test_link_each_message_takes_its_channel(link_net: _LinkNet) -> None:
    """MsgApp goes by msgappv2, the rest by the message stream, a snapshot by POST."""
    one, two = _link_pair(link_net)
    snapshot = Snapshot(b"{}" * 1_000, (1, 2), 7, 3)

    one.transport.offer([
        _link_app(3, [5]), _link_app(4, [5, 5]), _link_beat(1, 2, commit=4),
        Message(MsgType.SNAP, to=2, sender=1, term=5, snapshot=snapshot),
    ])
    link_net.until(lambda: len(two.inbox) == 4 and one.snapshots)

    apps = [message for message in two.inbox if message.type == MsgType.APP]
    assert [(message.index, len(message.entries)) for message in apps] == [(3, 1), (4, 2)]
    assert [message.snapshot for message in two.inbox if message.snapshot] == [snapshot]
    assert one.snapshots == [(2, True)]
    streamed = [(to, kind) for to, channel, kind, ok in one.sent if channel != "pipeline" and ok]
    posted = [(to, kind) for to, channel, kind, ok in one.sent if channel == "pipeline" and ok]
    assert streamed == [(2, MsgType.APP), (2, MsgType.APP), (2, MsgType.HEARTBEAT)]
    assert posted == [(2, MsgType.SNAP)]
    assert one.unreachable == []


def test_link_messages_flow_both_ways(link_net: _LinkNet) -> None:
    """Each member receives on the streams that it dialed."""
    one, two = _link_pair(link_net)

    one.transport.offer([_link_beat(1, 2)])
    two.transport.offer([Message(MsgType.HEARTBEAT_RESP, to=1, sender=2, term=3)])
    link_net.until(lambda: one.inbox and two.inbox)

    assert (one.types, two.types) == ([MsgType.HEARTBEAT_RESP], [MsgType.HEARTBEAT])
    assert one.received[0][0] == 2
    assert one.received[0][1] >= 28
    assert one.transport.active_since(2) > 1_600_000_000
    assert one.transport.active_since(3) == 0.0


def test_link_without_a_stream_messages_are_posted(link_net: _LinkNet) -> None:
    """Until a peer has dialed us, everything goes by POST, and arrives."""
    one, two = _LinkMember(link_net, 1), _LinkMember(link_net, 2)
    one.knows(two)

    one.transport.offer([_link_beat(1, 2, commit=number) for number in range(20)])
    link_net.until(lambda: len(two.inbox) == 20)

    assert sorted(message.commit for message in two.inbox) == list(range(20))


def test_link_many_large_messages_arrive_in_order(link_net: _LinkNet) -> None:
    """More than any socket buffer, in one offer."""
    one, two = _link_pair(link_net)
    messages = [Message(MsgType.APP, to=2, sender=1, term=5, log_term=5, index=index,
                        entries=[Entry(0, 5, index + 1, bytes(300_000))])
                for index in range(1, 61)]

    one.transport.offer(messages)
    link_net.until(lambda: len(two.inbox) == 60)

    assert [message.entries[0].index for message in two.inbox] == list(range(2, 62))
    assert one.unreachable == []


def test_link_to_unknown_members_is_silence(link_net: _LinkNet) -> None:
    """Id 0 and ids that nobody has told us are dropped without a report."""
    one = _LinkMember(link_net, 1)

    one.transport.offer([_link_beat(1, 0), _link_beat(1, 77)])
    link_net.turn_for(0.05)

    assert (one.sent, one.unreachable) == ([], [])


def test_link_to_a_dead_peer_is_reported(
    link_net: _LinkNet, caplog: pytest.LogCaptureFixture
) -> None:
    """A refused connection makes the peer unreachable, and a snapshot failed."""
    one = _LinkMember(link_net, 1)
    one.transport.add_peer(2, ["http://127.0.0.1:1"])

    one.transport.offer([
        _link_beat(1, 2), Message(MsgType.SNAP, to=2, sender=1, snapshot=Snapshot(b"", (), 1, 1)),
    ])
    link_net.until(lambda: one.snapshots and len(one.unreachable) >= 2)

    assert one.snapshots == [(2, False)]
    assert set(one.unreachable) == {2}
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_link_survives_the_restart_of_the_other_side(
    link_net: _LinkNet, caplog: pytest.LogCaptureFixture
) -> None:
    """A peer that comes back on its old address is in touch again, and the log says so."""
    caplog.set_level(logging.INFO)
    one, two = _link_pair(link_net)
    port = two.listener.server_address[1]

    two.end()
    link_net.until(lambda: not one.has_streams_to(two) and one.transport.active_since(2) == 0)
    again = _LinkMember(link_net, 2, port)
    again.knows(one)
    link_net.until(lambda: one.has_streams_to(again) and again.has_streams_to(one))
    one.transport.offer([_link_app(3, [5]), _link_beat(1, 2)])
    link_net.until(lambda: len(again.inbox) == 2)

    link_log = [record.getMessage() for record in caplog.records if "with 2" in record.message]
    assert link_log[:3] == [
        "the connection with 2 became active", "the connection with 2 became inactive",
        "the connection with 2 became active"]
    assert 2 in one.unreachable


def test_link_new_urls_are_used(link_net: _LinkNet) -> None:
    """After another add_peer the peer is reached at its new address."""
    one, two = _LinkMember(link_net, 1), _LinkMember(link_net, 2)
    one.transport.add_peer(2, ["http://127.0.0.1:1"])
    two.knows(one)

    one.transport.add_peer(2, [two.url])
    two.transport.offer([_link_beat(2, 1)])
    link_net.until(lambda: one.has_streams_to(two) and two.has_streams_to(one) and one.inbox)

    assert one.transport.active_since(2) > 0


def test_link_dead_url_is_left_for_the_next(link_net: _LinkNet) -> None:
    """With several URLs a failed one is not tried for ever."""
    one, two = _LinkMember(link_net, 1), _LinkMember(link_net, 2)
    two.knows(one)

    one.transport.add_peer(2, ["http://127.0.0.1:1", two.url])

    link_net.until(lambda: two.has_streams_to(one))


def test_link_removed_peer_is_told_so_once(link_net: _LinkNet) -> None:
    """A removed member learns it when it dials; its messages are no longer taken."""
    one, two = _link_pair(link_net)

    one.removed_ids.add(2)
    one.transport.remove_peer(2)
    one.transport.remove_peer(2)
    link_net.until(lambda: two.removals)
    two.transport.offer([_link_beat(2, 1)])
    one.transport.offer([_link_beat(1, 2)])
    link_net.turn_for(0.2)

    assert two.removals == 1
    assert (one.inbox, two.inbox) == ([], [])
    assert one.transport.active_since(2) == 0


def test_link_peers_come_back_after_remove_all(link_net: _LinkNet) -> None:
    """A snapshot received rebuilds all links."""
    one, two = _link_pair(link_net)

    one.transport.remove_all()
    one.knows(two)
    link_net.until(lambda: not two.has_streams_to(one) or not one.has_streams_to(two))
    link_net.until(lambda: two.has_streams_to(one) and one.has_streams_to(two))
    one.transport.offer([_link_app(3, [5])])
    link_net.until(lambda: two.inbox)

    assert two.inbox[0].index == 3


def test_link_unknown_dialer_can_be_answered(link_net: _LinkNet) -> None:
    """Who dials before we know it as a member is remembered by its X-PeerURLs."""
    one, two = _LinkMember(link_net, 1), _LinkMember(link_net, 2)
    two.knows(one)
    link_net.until(lambda: 2 in one.transport._remotes)

    one.transport.offer([_link_beat(1, 2)])
    link_net.until(lambda: two.inbox)

    assert two.types == [MsgType.HEARTBEAT]
    assert one.transport.active_since(2) == 0


def test_link_remotes_are_bounded(link_net: _LinkNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers cannot fill the memory."""
    monkeypatch.setattr(pyetcd, "REMOTES_MAX", 3)
    one = _LinkMember(link_net, 1)

    for member_id in range(2, 10):
        one.transport.add_remote(member_id, ["http://127.0.0.1:1"])
    one.transport.add_remote(1, ["http://127.0.0.1:1"])

    assert sorted(one.transport._remotes) == [2, 3, 4]


def test_link_drop_hook_cuts_both_ways(link_net: _LinkNet) -> None:
    """A test can take a member off the net, and put it back."""
    one, two = _link_pair(link_net)

    one.transport.drop = lambda message: True
    one.transport.offer([_link_beat(1, 2)])
    two.transport.offer([_link_beat(2, 1)])
    link_net.turn_for(0.1)
    assert (one.inbox, two.inbox) == ([], [])

    one.transport.drop = None
    one.transport.offer([_link_beat(1, 2)])
    link_net.until(lambda: two.inbox)


def test_link_stopped_transport_is_silent(link_net: _LinkNet) -> None:
    """After stop() nobody is called, and requests are answered 503."""
    one, two = _link_pair(link_net)
    one.transport.offer([_link_beat(1, 2)])

    one.transport.stop()
    one.transport.add_peer(2, [two.url])
    one.transport.offer([_link_beat(1, 2)])
    answer = link_net.ask(one.url, _link_request("POST", "/raft", b""))
    link_net.turn_for(0.1)

    assert answer.startswith(b"HTTP/1.1 503 ")
    assert one.unreachable == []
    assert not one.transport._peers


def test_link_delivery_may_remove_the_peer(link_net: _LinkNet) -> None:
    """A message may end its own stream; those behind it in the same piece are dropped."""
    one, two = _link_pair(link_net)
    taken: List[Message] = []

    def remove(message: Message) -> None:
        taken.append(message)
        two.transport.remove_peer(1)

    two.transport._deliver = remove
    one.transport.offer([_link_beat(1, 2), _link_beat(1, 2)])
    link_net.until(lambda: taken)
    link_net.turn_for(0.05)

    assert len(taken) == 1


# -- peers that misbehave ----------------------------------------------------


def _link_bad_peer(net: _LinkNet, answer: Callable[[Any], None]) -> Tuple[_LinkMember, List[str]]:
    """Member 1, whose peer 2 answers streams by `answer`; and the streams dialed so far."""
    dialed: List[str] = []

    def handle(request: Any) -> None:
        if request.path.startswith("/raft/stream/message/"):
            dialed.append(request.path)
            answer(request)
        else:
            request.reply(404)

    listener = net.listen(handle)
    one = _LinkMember(net, 1)
    one.transport.add_peer(2, [listener.bound_url])
    return one, dialed


@pytest.mark.parametrize("garbage", [
    pytest.param(b"\xff" * 100, id="length"),
    pytest.param(b"\0" * 7 + b"\2\xff\xff", id="protobuf"),
])
def test_link_garbage_on_a_stream_ends_only_that_stream(
    link_net: _LinkNet, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The stream is dropped and dialed anew; what came before the garbage was delivered."""
    caplog.set_level(logging.INFO)

    def answer(request: Any) -> None:
        reply = request.start_stream(200, None, "X-Server-Version: 2.3.8\r\n")
        reply.write(b"".join(MessageEncoder.encode(_link_beat(2, 1))))
        request.connection.reactor.call_later(0.02, reply.write, garbage)

    one, dialed = _link_bad_peer(link_net, answer)
    link_net.until(lambda: len(dialed) >= 2)

    assert one.types[:1] == [MsgType.HEARTBEAT]
    assert any(record.message.startswith("failed to read 2 on stream Message (")
               for record in caplog.records)
    assert "the connection with 2 became inactive" in caplog.messages


def test_link_silent_stream_is_given_up(
    link_net: _LinkNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a heartbeat within the time limit the stream is dialed anew."""
    monkeypatch.setattr(pyetcd, "LINK_TIMEOUT_SECONDS", 0.2)
    one, dialed = _link_bad_peer(
        link_net, lambda request: request.start_stream(200, None, "X-Server-Version: 2.3.8\r\n"))

    link_net.until(lambda: len(dialed) >= 2)

    assert one.transport.active_since(2) >= 0


def test_link_heartbeats_keep_an_idle_stream(
    link_net: _LinkNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two idle members of ours keep their streams beyond the time limit."""
    monkeypatch.setattr(pyetcd, "LINK_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(pyetcd, "LINK_HEARTBEAT_SECONDS", 0.1)
    one, two = _link_pair(link_net)
    writers = [one.transport._peers[2]._app_writer, two.transport._peers[1]._message_writer]
    replies = [writer._reply for writer in writers]

    link_net.turn_for(1.0)

    assert [writer._reply for writer in writers] == replies


@pytest.mark.parametrize("status, body, reason", [
    pytest.param(404, b"error sender not found\n",
                 "remote member 2 could not recognize local member", id="404"),
    pytest.param(412, b"incompatible version\n", "incompatible version", id="version"),
    pytest.param(412, b"cluster ID mismatch\n", "cluster ID mismatch", id="cluster"),
    pytest.param(412, b"to field mismatch\n", "unhandled http status 412", id="to"),
    pytest.param(500, b"", "unhandled http status 500", id="500"),
    pytest.param(200, None, "unsupported stream type", id="2.0"),
])
def test_link_refused_dial_is_logged_and_repeated(
    link_net: _LinkNet, status: int, body: Optional[bytes], reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every refusal has its reason in the log, at debug level while the peer is inactive."""
    caplog.set_level(logging.DEBUG)
    version = "2.0.13" if body is None else "2.3.8"

    def answer(request: Any) -> None:
        headers = f"X-Server-Version: {version}\r\nX-Etcd-Cluster-Id: abc\r\n"
        request.reply(status, body or b"", "text/plain", headers)

    one, dialed = _link_bad_peer(link_net, answer)
    link_net.until(lambda: len(dialed) >= 3)

    assert f"failed to dial 2 on stream Message ({reason})" in caplog.messages
    loud = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    expected = {
        "incompatible version":
            ["request sent was ignored by peer 2 (server version incompatible)"],
        "cluster ID mismatch":
            ["request sent was ignored (cluster ID mismatch: remote[2]=abc,"
             " local=c53239d6a4bed4f6)" + pyetcd.FOREIGN_HINT],
    }
    assert loud == expected.get(reason, [])
    assert one.transport.active_since(2) == 0


def test_link_gone_means_that_we_were_removed(link_net: _LinkNet) -> None:
    """410 to a dial is told once, however often we dial."""
    one, dialed = _link_bad_peer(
        link_net, lambda request: request.reply(
            410, b"removed member\n", None, "X-Server-Version: 2.3.8\r\n"))

    link_net.until(lambda: len(dialed) >= 3)
    link_net.until(lambda: one.removals)

    assert one.removals == 1


def test_link_forbidden_post_means_that_we_were_removed(link_net: _LinkNet) -> None:
    """403 to a POST is told too."""
    listener = link_net.listen(lambda request: request.reply(403))
    one = _LinkMember(link_net, 1)
    one.transport.add_remote(2, [listener.bound_url])

    one.transport.offer([_link_beat(1, 2)])
    link_net.until(lambda: one.removals)

    assert one.unreachable == [2]


def test_link_unanswered_posts_fill_the_queue_and_drop(
    link_net: _LinkNet, caplog: pytest.LogCaptureFixture
) -> None:
    """Four POSTs at a time, 64 waiting; the next is dropped and reported once."""
    waiting: List[Any] = []
    listener = link_net.listen(waiting.append)
    one = _LinkMember(link_net, 1)
    one.transport.add_remote(2, [listener.bound_url])
    snapshot = Message(MsgType.SNAP, to=2, sender=1, snapshot=Snapshot(b"", (), 1, 1))

    one.transport.offer([_link_beat(1, 2, commit=number) for number in range(75)] + [snapshot])
    link_net.until(lambda: len(waiting) == pyetcd.PIPELINE_WORKERS and one.snapshots)
    link_net.turn_for(0.05)

    assert len(waiting) == pyetcd.PIPELINE_WORKERS
    assert one.unreachable == [2]
    assert one.snapshots == [(2, False)]
    assert caplog.messages == ["dropped messages to 2: too many wait for the pipeline"]


def test_link_silent_post_frees_its_worker(
    link_net: _LinkNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that does not come is a failure after the time limit."""
    monkeypatch.setattr(pyetcd, "LINK_TIMEOUT_SECONDS", 0.2)
    waiting: List[Any] = []
    listener = link_net.listen(waiting.append)
    one = _LinkMember(link_net, 1)
    one.transport.add_remote(2, [listener.bound_url])

    one.transport.offer([_link_beat(1, 2) for _ in range(6)])
    link_net.until(lambda: len(waiting) == 6 and len(one.unreachable) == 6)

    assert [ok for _, _, _, ok in one.sent] == [False] * 6


@pytest.mark.parametrize("needs_v3_data", [False, True], ids=["no-v3-data", "v3-data"])
def test_link_peer_of_version_3_gets_a_snapshot_with_a_database_or_none(
    link_net: _LinkNet, caplog: pytest.LogCaptureFixture, needs_v3_data: bool
) -> None:
    """A bare MsgSnap kills etcd 3.x.  An empty database would take its v3 data away."""
    posted: List[Tuple[str, bytes]] = []

    def handle(request: Any) -> None:
        if request.method == "POST":
            posted.append((request.path, request.body))
        if request.path.startswith("/raft/stream/"):
            request.start_stream(200, None, "X-Server-Version: 3.0.17\r\n")
        else:
            request.reply(204)

    class Inspector(pyetcd.MessageInspector):
        def needs_v3_data(self, member_id: int) -> bool:
            return needs_v3_data

        def empty_database(self, raft_index: int) -> bytes:
            return b"database %d" % raft_index

    listener = link_net.listen(handle)
    one = _LinkMember(link_net, 1, inspector=Inspector())
    one.transport.add_peer(2, [listener.bound_url])
    link_net.until(lambda: one.transport.active_since(2))
    message = Message(MsgType.SNAP, to=2, sender=1, snapshot=Snapshot(b"{}", (1, 2), 9, 1))

    one.transport.offer([message])
    one.transport.offer([message])
    link_net.until(lambda: len(one.snapshots) == 2)

    loud = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    if needs_v3_data:
        assert one.snapshots == [(2, False)] * 2 and posted == []
        assert len(loud) == 1 and "a member of etcd 3 must lead to send it" in loud[0]
    else:
        body = pyetcd.encode_message(message)
        framed = len(body).to_bytes(8, "big") + body + b"database 9"
        assert one.snapshots == [(2, True)] * 2 and loud == []
        assert posted == [("/raft/snapshot", framed)] * 2


def test_link_version_in_a_request_counts_for_snapshots(link_net: _LinkNet) -> None:
    """A peer that we could not dial yet is known by what it announces when it dials us."""
    one = _LinkMember(link_net, 1)
    one.transport.add_peer(2, ["http://127.0.0.1:1"])

    link_net.ask(one.url, _link_request(
        "GET", _LINK_STREAM, X_Server_Version="3.0.1", X_Min_Cluster_Version="2.3.0"),
        ends=b"\r\n\r\n")

    assert one.transport._peers[2].status.version == "3.0.1"


@pytest.mark.parametrize("urls", [[], ["http://127.0.0.1:99999"], ["nonsense"]])
def test_link_peer_with_unusable_urls_is_only_unreachable(
    link_net: _LinkNet, urls: List[str]
) -> None:
    """Whatever the log says of a member's URLs, dialing them only fails."""
    one = _LinkMember(link_net, 1)

    one.transport.add_peer(2, urls)
    one.transport.offer([_link_beat(1, 2)])
    link_net.until(lambda: one.unreachable)

    assert one.transport.active_since(2) == 0


# -- the door ----------------------------------------------------------------


class _DoorMember:
    """A member whose peer, 2, was added but does not run: the test speaks for it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server = pyetcd.Server(
            name="a", data_dir=str(directory), election_ms=30_000, strict_reconfig_check=False)
        self.server.start()
        assert self.server.wait_ready()
        self.id = self.server.call(lambda etcd: etcd.member_id)
        self.cluster = self.server.call(lambda etcd: f"{etcd.cluster.id:x}")
        self.peer = 0x2222
        # It proposes its version behind its first entries; a test compares what is on disk.
        eventually(lambda: self.server.call(lambda etcd: etcd.cluster.version))
        self.rest()

    def follow(self) -> None:
        """Have peer 2 in the cluster, and lead it at the next term."""
        added = queue.Queue()
        member = pyetcd.Member(self.peer, ("http://127.0.0.1:1",))
        self.server.call(lambda etcd: etcd.change_member(
            pyetcd.ConfChangeType.ADD_NODE, member, added.put))
        assert added.get(timeout=10) is None
        assert self.post(Message(
            MsgType.HEARTBEAT, to=self.id, sender=self.peer, term=self.term() + 1)) == 204
        assert self.server.call(lambda etcd: etcd.node.raft.lead) == self.peer
        self.rest()

    def rest(self) -> None:
        """Wait until nothing is to be written."""
        eventually(lambda: self.server.call(
            lambda etcd: not etcd.journal.busy and not etcd.node.has_ready()))

    def term(self) -> Any:
        return self.server.call(lambda etcd: etcd.node.raft.term)

    def last(self) -> Any:
        return self.server.call(lambda etcd: etcd.node.raft.log.last_id)

    def append(self, *entries: Entry, **fields: Any) -> Message:
        """A MsgApp of the leader behind our last entry."""
        last = self.last()
        term = self.term()
        for number, entry in enumerate(entries, 1):
            entry.index = entry.index or last.index + number
            entry.term = entry.term or term
        return Message(MsgType.APP, **{
            "to": self.id, "sender": self.peer, "term": term, "index": last.index,
            "log_term": last.term, "commit": last.index + len(entries), "entries": entries,
            **fields})

    def post(self, message: Any, path: str = "/raft", sender: int = 0) -> int:
        body = message if isinstance(message, bytes) else pyetcd.encode_message(message)
        if path == "/raft/snapshot":
            body = len(body).to_bytes(8, "big") + body
        return _http_ask(self.server, "POST", path, body, {
            "X-Etcd-Cluster-Id": self.cluster, "X-Server-From": f"{sender or self.peer:x}",
            "X-Server-Version": "2.3.8", "X-Min-Cluster-Version": "2.2.0"}, peer=True)[0]

    def files(self) -> Dict[str, bytes]:
        """What is on disk, by name."""
        return {str(path): path.read_bytes() for path in sorted(self.directory.rglob("*"))
                if path.is_file() and not path.name.endswith(".tmp")}


@pytest.fixture
def door_member(tmp_path: Path) -> Iterator[_DoorMember]:
    member = _DoorMember(tmp_path / "door")
    yield member
    member.server.stop()


def _door_bad_entries() -> List[Any]:
    deep = "/1" + "/a" * 40_000
    return [
        pytest.param(lambda: Entry(data=b"\xff\xff"), id="garbage"),
        pytest.param(lambda: Entry(data=b"\x08\0" * 100_000), id="repeated fields"),
        pytest.param(lambda: Entry(1, data=b"\xff\xff"), id="garbage change"),
        pytest.param(lambda: Entry(1), id="empty change"),
        pytest.param(lambda: Entry(2, data=b"\x12\x02\x08\x01"), id="change of 3.x"),
        pytest.param(lambda: Entry(9, data=b"x"), id="unknown type"),
        pytest.param(lambda: _door_change(context=b"{"), id="context is no JSON"),
        pytest.param(lambda: _door_change(context=b'{"peerURLs":7}'), id="context is no member"),
        pytest.param(lambda: _door_change(context=b'{"id":8,"peerURLs":["http://h:1"]}'),
                     id="another member"),
        pytest.param(lambda: _door_change(node_id=0, context=b"{}"), id="member 0"),
        pytest.param(lambda: _door_entry(path="/0/version", val="9.0.0"), id="a newer version"),
        pytest.param(lambda: _door_entry(path="/0/members/9", val="x"), id="a file as a member"),
        pytest.param(lambda: _door_entry(path="/1/../0/x"), id="out of the key space"),
        pytest.param(lambda: _door_entry(method="DELETE", path="/0/members", recursive=True),
                     id="all members"),
        pytest.param(lambda: _door_entry(path=deep), id="too deep"),
    ]


@pytest.mark.parametrize("entry", _door_bad_entries())
def test_link_door_refuses_entries_that_would_be_fatal_when_applied(
    door_member: _DoorMember, caplog: Any, entry: Any
) -> None:
    """As a leader's and as a proposal: 400, the sender in the log, nothing on disk."""
    door_member.follow()
    before, files = door_member.last(), door_member.files()
    assert door_member.post(door_member.append(entry())) == 400
    assert door_member.post(door_member.append(_door_entry(), entry(), _door_entry())) == 400
    assert door_member.post(Message(
        MsgType.PROP, to=door_member.id, sender=door_member.peer, entries=[entry()])) == 400
    assert "of 2222: " in "".join(line for line in caplog.messages if "refused a Msg" in line)
    assert (door_member.last(), door_member.files()) == (before, files)
    assert door_member.post(door_member.append(_door_entry())) == 204
    eventually(lambda: door_member.server.call(lambda etcd: etcd.store.value("/1/k")) == "v")


@pytest.mark.parametrize("fields", [
    {"type": MsgType.HEARTBEAT, "term": 2**64 - 1}, {"type": MsgType.APP, "term": 2**63},
    {"type": MsgType.VOTE, "term": 2**64 - 1, "log_term": 5, "index": 5},
    {"type": MsgType.VOTE_RESP, "term": 2**40}, {"type": MsgType.APP_RESP, "term": 2**64 - 2},
    {"type": MsgType.PRE_VOTE, "term": 2**64 - 1}, {"type": MsgType.PROP, "term": 2**64 - 1},
    {"type": MsgType.HEARTBEAT, "commit": 10**6}, {"type": MsgType.HEARTBEAT, "commit": 2**64 - 1},
    {"type": MsgType.APP, "index": 2**64 - 1}, {"type": MsgType.HUP}, {"type": MsgType.PROP},
    {"type": MsgType.APP_RESP, "reject": True, "reject_hint": 2**64 - 1},
], ids=lambda fields: " ".join(f"{name}={value}" for name, value in fields.items()))
def test_link_door_refuses_numbers_that_no_member_can_have(
    door_member: _DoorMember, caplog: Any, fields: Any
) -> None:
    """A term of 2^64-1 was written, and the next one could not be; a commit index behind our log
    ended the member."""
    door_member.follow()
    before, files = door_member.term(), door_member.files()
    message = {"term": before, "to": door_member.id, "sender": door_member.peer, **fields}
    assert door_member.post(Message(message.pop("type"), **message)) == 400
    assert "of 2222: " in "".join(line for line in caplog.messages if "refused a Msg" in line)
    assert door_member.files() == files
    assert door_member.term() - before in (0, 1)     # it may have begun to campaign
    door_member.server.stop()
    with pyetcd.Server(name="a", data_dir=str(door_member.directory)) as again:
        assert again.call(lambda etcd: etcd.node.raft.term) < before + 20


@pytest.mark.parametrize("change", [
    lambda entries: setattr(entries[1], "index", entries[1].index + 5),
    lambda entries: setattr(entries[1], "index", entries[0].index),
    lambda entries: setattr(entries[1], "term", 2**63),
    lambda entries: setattr(entries[2], "term", 1),
    lambda entries: setattr(entries[0], "index", 2**64 - 1),
], ids=["index ahead", "index twice", "term ahead", "term back", "first index"])
def test_link_door_refuses_entries_that_are_no_log(door_member: _DoorMember, change: Any) -> None:
    """The ends alone were looked at: an entry with a wrong index in the middle was written."""
    door_member.follow()
    message = door_member.append(*[_door_entry() for _ in range(3)])
    change(message.entries)
    files = door_member.files()
    assert door_member.post(message) == 400
    assert door_member.files() == files


@pytest.mark.parametrize("sender", [0x9999, 0])
def test_link_door_takes_no_proposal_from_strangers(door_member: _DoorMember, sender: int) -> None:
    """One could turn auth off, or add itself as a member."""
    before, files = door_member.last(), door_member.files()
    message = Message(
        MsgType.PROP, to=door_member.id, sender=sender, entries=[_door_entry(), _door_change()])
    assert door_member.post(message, sender=0x9999) == 400
    assert (door_member.last(), door_member.files()) == (before, files)


@pytest.mark.parametrize("entry", [
    lambda: _door_change(context=b"{}"), lambda: _door_change(context=b'{"peerURLs":[5]}'),
    lambda: _door_change(context=b'{"peerURLs":["http://h:1","http://${IP}:2380"]}'),
    lambda: _door_change(context=b'{"peerURLs":["http://:2380"]}'),
], ids=range(4))
def test_link_door_takes_no_proposal_that_no_api_lets_in(
    door_member: _DoorMember, entry: Any
) -> None:
    """From a member, too: one without URLs, or that nobody can reach, may cost the quorum."""
    def propose(entry: Any) -> int:
        message = Message(
            MsgType.PROP, to=door_member.id, sender=door_member.id, entries=[entry])
        return door_member.post(message, sender=door_member.peer)

    before, files = door_member.last(), door_member.files()
    assert propose(entry()) == 400
    assert (door_member.last(), door_member.files()) == (before, files)
    assert propose(_door_entry()) == 204


def _door_snapshot(data: bytes, *, index: int = 1_000, term: int = 2, voters: Any = (7, 8)) -> Any:
    return pyetcd.Snapshot(data, voters, index, term)


def _door_store(version: str = "") -> bytes:
    store = Store()
    if version:
        store.set("/0/version", value=version, now_ns=1)
    return store.save()


@pytest.mark.parametrize("path", ["/raft", "/raft/snapshot"])
@pytest.mark.parametrize("snapshot", [
    _door_snapshot(b""), _door_snapshot(b"{}"), _door_snapshot(b"\xff" * 100),
    _door_snapshot(_door_store()[:-9]), _door_snapshot(_door_store("9.9.0")),
    _door_snapshot(_door_store("x")), _door_snapshot(_door_store(), voters=()),
    _door_snapshot(_door_store(), index=2**63), _door_snapshot(_door_store(), term=2**63),
], ids=["empty", "object", "bytes", "cut", "newer version", "no version", "no voters", "index",
        "term"])
def test_link_door_reads_a_snapshot_before_it_is_saved(
    door_member: _DoorMember, path: str, snapshot: Any
) -> None:
    """One that no store can become was saved, and the member could not start again."""
    door_member.follow()
    files = door_member.files()
    message = Message(
        MsgType.SNAP, to=door_member.id, sender=door_member.peer, term=door_member.term(),
        snapshot=snapshot)
    assert door_member.post(message, path) == 400
    assert door_member.files() == files
    assert door_member.server.call(lambda etcd: etcd.node.raft.log.applied) < 1_000


@pytest.mark.parametrize("path", ["/raft", "/raft/snapshot"])
@pytest.mark.parametrize("size", [10, 20 << 20], ids=["small", "from a file"])
def test_link_door_takes_a_good_snapshot(
    door_member: _DoorMember, path: str, size: int, monkeypatch: Any
) -> None:
    """Large ones arrive in a file; what was read at the door is what the store becomes."""
    door_member.follow()
    spools = []
    real = tempfile.TemporaryFile
    monkeypatch.setattr(
        pyetcd.tempfile, "TemporaryFile", lambda **where: spools.append(where) or real(**where))
    store = Store()
    store.create("/0/members/2222/raftAttributes",
                 value='{"peerURLs":["http://127.0.0.1:1"]}', now_ns=1)
    for number in range(2):
        store.set(f"/1/{number}", value="x" * (size // 2), now_ns=1)
    message = Message(
        MsgType.SNAP, to=door_member.id, sender=door_member.peer, term=door_member.term(),
        snapshot=_door_snapshot(store.save(), voters=(door_member.id, door_member.peer)))
    assert door_member.post(message, path) == 204
    eventually(lambda: door_member.server.call(lambda etcd: etcd.raft_index) == 1_000)
    value = door_member.server.call(lambda etcd: etcd.store.value("/1/1"))
    assert value == "x" * (size // 2) and len(spools) == (size > pyetcd.RAFT_BODY_BYTES_MAX)
    assert not list(door_member.directory.rglob("tmp*"))


def _door_head(member: _DoorMember, method: str, path: str, **headers: str) -> bytes:
    fields = {
        "Host": "x", "Content-Length": str(512 << 20), "X-Etcd-Cluster-Id": member.cluster,
        "X-Server-From": "2222", "X-Server-Version": "2.3.8", "X-Min-Cluster-Version": "2.2.0"}
    fields.update({name.replace("_", "-"): value for name, value in headers.items()})
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode()


@pytest.mark.parametrize(("method", "path", "headers", "status"), [
    ("POST", "/raft", {"X_Etcd_Cluster_Id": "1"}, 412),
    ("POST", "/raft", {"X_Server_Version": "1.0.0"}, 412),
    ("POST", "/raft", {"X_Server_From": "9999"}, 413),
    ("POST", "/raft", {"X_Server_From": ""}, 413),
    ("POST", "/raft/snapshot", {"X_Server_From": "9999"}, 413),
    ("PUT", "/raft", {}, 405), ("POST", "/raft/stream/msgapp/2222", {}, 405),
    ("POST", "/members", {}, 405), ("POST", "/v2/keys/a", {}, 404), ("GET", "/version", {}, 200),
    ("POST", "/raft", {"Content_Length": str(513 << 20)}, 413),
])
def test_link_door_answers_by_the_head_whose_body_nobody_wants(
    door_member: _DoorMember, method: str, path: str, headers: Any, status: int
) -> None:
    """Bodies of 512 MB were kept until route, method, cluster and sender were looked at."""
    door_member.follow()
    with _HttpSocket(door_member.server.peer_urls[0]) as client:
        client.send(_door_head(door_member, method, path, **headers) + b"x" * 70_000)
        assert client.until(b"\r\n").split()[1] == b"%d" % status
    assert [listener.held_bytes for listener in door_member.server._peer_listeners] == [0]


def test_link_door_bounds_all_bodies_together(door_member: _DoorMember) -> None:
    """Of known members, too: what does not fit is answered 413; no snapshot may be so large."""
    door_member.follow()
    (listener,) = door_member.server._peer_listeners
    listener.held_max = 3 << 20
    (url,) = door_member.server.peer_urls
    with contextlib.ExitStack() as cleanup:
        statuses = []
        for _ in range(5):
            client = cleanup.enter_context(_HttpSocket(url, timeout_s=1))
            with contextlib.suppress(OSError):
                client.send(_door_head(door_member, "POST", "/raft") + b"\x08\3" * (1 << 19))
            with contextlib.suppress(OSError):
                statuses.append(client.until(b"\r\n").split()[1])
        assert statuses and set(statuses) == {b"413"}
        assert listener.held_bytes <= listener.held_max + 262_144
    eventually(lambda: listener.held_bytes == 0)
    with _HttpSocket(url) as client, contextlib.suppress(OSError):
        client.send(_door_head(door_member, "POST", "/raft"))
        for _ in range(20):
            client.send(b"\x08\3" * (1 << 19))
    eventually(lambda: listener.held_bytes == 0)
    assert door_member.post(door_member.append(_door_entry())) == 204


@pytest.mark.parametrize("body", [
    b"\x10\0" * (1 << 22), b"\x3a\0" * (1 << 22), b"\x08\3" + b"\x3a\x02\x22\0" * (1 << 21),
    b"\x08\3" + b"\x3a" + pyetcd.encode_varint(1 << 20) + b"\x08\0" * (1 << 19),
    b"\x08\7\x4a" + pyetcd.encode_varint(1 << 22) + b"\x12" + pyetcd.encode_varint((1 << 22) - 4)
    + b"\x0a" + pyetcd.encode_varint((1 << 22) - 8) + b"\x08\1" * (1 << 21),
], ids=["fields", "entries", "empty data", "fields of an entry", "voters"])
def test_link_door_work_for_one_message_is_bounded(body: bytes) -> None:
    """40 MB of repeated fields took 10 s: counted are the steps of the interpreter, in loops."""
    steps = itertools.count()
    message = pyetcd.decode_message_steps(body)
    with pytest.raises(CodecError):
        for _ in message:
            next(steps)
    assert next(steps) <= pyetcd.MESSAGE_ENTRIES_MAX // 100


def test_link_door_decodes_in_steps_of_bounded_work() -> None:
    """By count and by bytes, on streams and in posts; the messages are the same."""
    entries = [Entry(0, 1, 1 + number, b"x" * (number % 3)) for number in range(5_000)]
    large = [Entry(0, 1, 1 + number, b"x" * 100_000) for number in range(50)]
    for some in (entries, large):
        message = Message(MsgType.APP, to=2, sender=1, term=1, log_term=0, entries=some)
        following = Message(MsgType.APP, to=2, sender=1, term=1, log_term=1,
                            index=len(some), entries=[
                                Entry(0, 1, len(some) + e.index, e.data) for e in some])
        encoder = pyetcd.AppV2Encoder(pyetcd.EntryListEncoder())
        data = b"".join(encoder.encode(message)) + b"".join(encoder.encode(following))
        found = list(StreamParser(app_v2_frames(2, 1)).feed(data))
        whole = [one for one in found if one is not None]
        assert [list(one.entries) for one in whole] == [some, following.entries]
        between = [len(list(group)) for is_step, group in itertools.groupby(
            found, lambda one: one is None) if is_step]
        assert sum(between) >= len(some) * max(1, len(some[-1].data) // 10_000) // 400
        assert list(pyetcd.decode_message_steps(pyetcd.encode_message(message)))


def test_link_a_peer_that_refuses_streams_is_dialed_less_and_less_often(
    link_net: _LinkNet
) -> None:
    """One that dials us is dialed again at once: it can be reached."""
    delays: List[float] = []
    one = _LinkMember(link_net, 1)
    real = link_net.reactor.call_later

    def call_later(delay_s: float, callback: Any, *args: Any) -> Any:
        if getattr(callback, "__name__", "") == "_dial":
            delays.append(delay_s)
            return real(0.0, callback, *args)
        return real(delay_s, callback, *args)

    link_net.reactor.call_later = call_later        # type: ignore[method-assign]
    one.transport.add_peer(2, [f"http://127.0.0.1:{free_port()}"])
    link_net.until(lambda: len(delays) >= 24)
    assert max(delays) == pyetcd.STREAM_RETRY_SECONDS_MAX
    assert delays[2] == pyetcd.STREAM_RETRY_SECONDS
    two = _LinkMember(link_net, 2)
    two.knows(one)
    one.transport.add_peer(2, [two.url])
    link_net.until(lambda: one.has_streams_to(two) and two.has_streams_to(one))


def test_link_sliced_work_shares_a_turn(link_net: _LinkNet) -> None:
    """Many works are not done one after the other, and none takes a whole turn."""
    work, log = pyetcd.SlicedWork(link_net.reactor), []
    turn = [0]
    link_net.reactor.now = lambda: turn[0]          # type: ignore[method-assign]

    def steps(name: int) -> Iterator[None]:
        for _ in range(3):
            log.append((link_net.reactor.turns, name))
            turn[0] += pyetcd.SlicedWork.TURN_S / 2
            yield
        return name

    done: List[int] = []
    for name in range(4):
        work.add(steps(name), done.append)
    for _ in range(20):
        link_net.reactor._turn([])
    per_turn = collections.Counter(at for at, _ in log)
    assert sorted(done) == [0, 1, 2, 3] and max(per_turn.values()) <= 3 and len(log) == 12
    assert {name for _, name in log[2:6]} == {0, 1, 2, 3}


# -- one link, in virtual time -----------------------------------------------


def test_link_offer_is_one_write() -> None:
    """All frames of one offer leave as one piece."""
    fakes, reply = _LinkFakes(), _LinkFakeReply()
    writer = fakes.writer()
    writer.attach(reply, MessageEncoder())
    reply.pieces.clear()
    messages = [_link_beat(1, 2, commit=number) for number in range(5)]

    for message in messages:
        assert writer.offer(message)
    assert reply.pieces == []
    writer.flush()
    writer.flush()

    assert reply.pieces == [b"".join(
        piece for message in messages for piece in MessageEncoder.encode(message))]


def test_link_messages_count_as_sent_once_the_peer_takes_them() -> None:
    """However late that is, and though nothing else is sent after them."""
    fakes, reply = _LinkFakes(), _LinkFakeReply()
    writer = fakes.writer()
    writer.attach(reply, MessageEncoder())
    writer.offer(_link_beat(1, 2))
    writer.flush()
    assert fakes.sent == []
    reply.read()
    assert [(sent.to, sent.ok) for sent in fakes.sent] == [(2, True)]
    writer.offer(_link_beat(1, 2))
    writer.flush()
    writer.close()
    assert [sent.ok for sent in fakes.sent] == [True, False]


def test_link_slow_reader_loses_messages_and_is_reported_once() -> None:
    """Above the limit of unsent bytes messages are dropped, until the peer has read on."""
    fakes, reply = _LinkFakes(), _LinkFakeReply()
    writer = fakes.writer()
    writer.attach(reply, MessageEncoder())

    reply.pending = pyetcd.StreamWriter.PENDING_BYTES_MAX + 1
    assert [writer.offer(_link_beat(1, 2)) for _ in range(3)] == [False] * 3
    assert fakes.unreachable == [2]
    reply.pending = 0
    assert writer.offer(_link_beat(1, 2))
    reply.pending = pyetcd.StreamWriter.PENDING_BYTES_MAX + 1
    assert not writer.offer(_link_beat(1, 2))

    assert fakes.unreachable == [2, 2]
    assert not reply.closed


def test_link_peer_that_reads_nothing_is_given_up() -> None:
    """A stream whose bytes nobody takes for 5 s is closed and reported."""
    fakes, reply = _LinkFakes(), _LinkFakeReply()
    writer = fakes.writer()
    writer.attach(reply, MessageEncoder())

    fakes.reactor.pass_time(4.9)
    assert writer.attached
    fakes.reactor.pass_time(3.5)

    assert not writer.attached
    assert reply.closed
    assert fakes.unreachable == [2]
    assert not fakes.status.active_since


def test_link_slow_but_steady_reader_keeps_its_stream() -> None:
    """A byte taken now and then is a sign of life."""
    fakes, reply = _LinkFakes(), _LinkFakeReply()
    writer = fakes.writer()
    writer.attach(reply, MessageEncoder())
    writer.offer(_link_beat(1, 2))
    writer.flush()

    for _ in range(20):
        fakes.reactor.pass_time(2.0)
        reply.pending -= 1

    assert writer.attached
    assert not reply.closed


def test_link_heartbeat_is_sent_every_five_thirds_of_a_second() -> None:
    """An idle stream carries a heartbeat on each beat."""
    fakes, reply = _LinkFakes(), _LinkFakeReply()
    fakes.writer(pyetcd.APP_STREAM).attach(reply, AppV2Encoder(EntryListEncoder()))

    for _ in range(100):
        fakes.reactor.pass_time(0.1)
        reply.pending = 0

    assert reply.pieces == [b"\0"] * 7


def test_link_new_stream_replaces_the_old_one() -> None:
    """The peer's newest stream is the one we use; its msgappv2 state begins anew."""
    fakes, old, new = _LinkFakes(), _LinkFakeReply(), _LinkFakeReply()
    writer = fakes.writer(pyetcd.APP_STREAM)
    writer.attach(old, AppV2Encoder(EntryListEncoder()))
    writer.offer(_link_app(3, [5]))
    writer.flush()

    writer.attach(new, AppV2Encoder(EntryListEncoder()))
    writer.offer(_link_app(4, [5]))
    writer.flush()

    assert old.closed
    assert not new.closed
    assert new.pieces[-1][0] == 2
    assert fakes.unreachable == []


def test_link_stream_closed_by_the_peer_is_reported() -> None:
    """What was on its way may be lost, so Raft is told."""
    fakes, reply = _LinkFakes(), _LinkFakeReply()
    writer = fakes.writer()
    writer.attach(reply, MessageEncoder())

    reply.on_close()

    assert not writer.attached
    assert not writer.offer(_link_beat(1, 2))
    assert fakes.unreachable == [2]


def test_link_status_tells_changes_only(caplog: pytest.LogCaptureFixture) -> None:
    """The first failure is an error, the following ones are details."""
    caplog.set_level(logging.INFO)
    status = pyetcd.PeerStatus(0xAB, lambda: 5 * pyetcd.NS)

    for _ in range(2):
        status.activate()
    assert status.active_since == 5.0
    for _ in range(3):
        status.deactivate("write", "pipeline", OSError(113, "No route to host"))

    assert status.active_since == 0.0
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "the connection with ab became active"),
        ("ERROR", "failed to write ab on pipeline (no route to host)"),
        ("INFO", "the connection with ab became inactive"),
    ]


def test_link_repeated_errors_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The same text is logged again only after 30 s."""
    reactor = FakeReactor()
    log = pyetcd.ThrottledLog("rafthttp", reactor.now)

    for _ in range(100):
        log.error("it rains")
        reactor.pass_time(0.5)

    assert caplog.messages == ["it rains"] * 2


def test_link_url_picker_goes_round() -> None:
    """Only the failure of the URL in use moves on; new URLs begin with the first."""
    picker = pyetcd.UrlPicker(["http://b:2", "http://a:1"])

    assert picker.pick() == "http://a:1"
    picker.failed("http://b:2")
    assert picker.pick() == "http://a:1"
    picker.failed("http://a:1")
    assert picker.pick() == "http://b:2"
    picker.failed("http://b:2")
    assert picker.pick() == "http://a:1"
    picker.update(["http://c:3"])
    assert picker.pick() == "http://c:3"


@pytest.mark.parametrize("body, status, warning", [
    pytest.param(b'{"OK":true,"Now":"1970-01-01T00:16:40Z"}', 200, "", id="healthy"),
    pytest.param(b'{"OK":true,"Now":"1970-01-01T00:16:47Z"}', 200,
                 "the clock difference against peer 2 is too high [-7s > 1s]", id="ahead"),
    pytest.param(b'{"OK":true,"Now":"1970-01-01T00:16:37.5Z"}', 200,
                 "the clock difference against peer 2 is too high [2.5s > 1s]", id="behind"),
    pytest.param(b"", 404, "the connection to peer 2 is unhealthy", id="404"),
    pytest.param(b"[" * 4_000, 200, "the connection to peer 2 is unhealthy", id="nonsense"),
    pytest.param(b'{"Now":"1970-99-01T00:00:00Z"}', 200,
                 "the connection to peer 2 is unhealthy", id="no time"),
    pytest.param(None, 0, "the connection to peer 2 is unhealthy", id="refused"),
])
def test_link_prober_warns_every_thirty_seconds(
    body: Optional[bytes], status: int, warning: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A peer that is ill, or whose clock is off, is named twice in a minute or so."""
    fakes = _LinkFakes()
    asked: List[str] = []

    def call(reactor: Any, url: str, method: str, target: str, headers: Any, **callbacks: Any):
        asked.append(method + " " + url + target)
        if body is not None:
            callbacks["on_head"](status, {})
            callbacks["on_data"](body)
        callbacks["on_done"](None if body is not None else OSError("refused"))

    monkeypatch.setattr(pyetcd, "HttpCall", call)
    monkeypatch.setattr(fakes.reactor, "wall_ns", lambda: 1_000 * pyetcd.NS)
    prober = pyetcd.Prober(fakes.context, 2, pyetcd.UrlPicker(["http://x:1"]))

    fakes.reactor.pass_time(65)
    prober.stop()
    fakes.reactor.pass_time(65)

    assert asked == ["GET http://x:1/raft/probing"] * 16
    assert caplog.messages == ([warning] * 2 if warning else [])


# -- a real etcd -------------------------------------------------------------


def _link_sha1_id(*parts: bytes) -> int:
    return int.from_bytes(hashlib.sha1(b"".join(parts)).digest()[:8], "big")


@pytest.mark.skipif(shutil.which("etcd") is None, reason="needs etcd 3.4 (Debian: etcd-server)")
def test_link_real_etcd_leads_us(
    link_net: _LinkNet, tmp_path: pathlib.Path
) -> None:
    """Next to one etcd 3.4, our yes-man of a member is what makes it leader and commit."""
    client = f"http://127.0.0.1:{free_port()}"
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    etcd_id, own_id = (_link_sha1_id(url.encode(), b"link-test") for url in urls)
    ids = [member_id.to_bytes(8, "big") for member_id in sorted((etcd_id, own_id))]

    def deliver(message: Message) -> None:
        yes = {MsgType.VOTE: MsgType.VOTE_RESP, MsgType.APP: MsgType.APP_RESP,
               MsgType.HEARTBEAT: MsgType.HEARTBEAT_RESP}.get(message.type)
        if yes is not None:
            transport.offer([Message(
                yes, to=etcd_id, sender=own_id, term=message.term, context=message.context,
                index=message.index + len(message.entries),
            )])

    transport = Transport(
        link_net.reactor, member_id=own_id, cluster_id=_link_sha1_id(*ids), peer_urls=urls[1:],
        is_removed=lambda member_id: False, deliver=deliver, unreachable=lambda to: None,
        snapshot_done=lambda to, ok: None, removed=lambda: None, election_s=1.0,
        identity=pyetcd.IDENTITIES["3.4"],
    )
    link_net.closers.append(transport.stop)
    link_net.listen(lambda request: transport.handle(request) or request.reply(404),
                    pyetcd.url_address(urls[1])[1])
    transport.add_peer(etcd_id, urls[:1])
    etcd = subprocess.Popen(
        ["etcd", "--name=a", "--enable-v2", f"--data-dir={tmp_path}/etcd",
         f"--listen-peer-urls={urls[0]}", f"--initial-advertise-peer-urls={urls[0]}",
         f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
         f"--initial-cluster=a={urls[0]},b={urls[1]}", "--initial-cluster-token=link-test"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    link_net.closers.append(lambda: (etcd.kill(), etcd.wait()))
    statuses: List[int] = []

    def put(error: Optional[Exception] = None) -> None:
        if 201 not in statuses:
            pyetcd.HttpCall(
                link_net.reactor, client, "PUT", "/v2/keys/link",
                {"Content-Type": "application/x-www-form-urlencoded"}, b"value=1",
                on_head=lambda status, headers: statuses.append(status),
                on_done=lambda error: link_net.reactor.call_later(0.2, put) and None,
            )

    put()
    link_net.until(lambda: 201 in statuses)

    assert transport.active_since(etcd_id) > 0
    assert transport._peers[etcd_id]._app_writer.attached
