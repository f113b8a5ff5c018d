"""Fuzzing: any bytes, in any pieces, at every door."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import random
import tempfile
import urllib.parse
import urllib.request

import pyetcd
from pyetcd import Applier, Cluster, CodecError, Entry, InvariantError, RawNode, Store
from tests.kit.reactors import FakeReactor


class _FuzzSocket:
    """Gives out pieces, one per recv(), and takes everything."""

    def __init__(self, pieces=()):
        self.pieces = list(pieces)
        self.sent = b""

    def recv(self, size):
        if not self.pieces:
            raise BlockingIOError
        return self.pieces.pop(0)

    def send(self, data):
        self.sent += bytes(data)
        return len(data)

    def fileno(self): return 0
    def shutdown(self, how): pass
    def close(self): pass


class _FuzzListener:
    """What a Connection uses of its Listener; answers every request, and keeps it."""

    tls = None
    patient = True
    memory_max = held_max = 1 << 20     # not reached: how much of a body came first would decide
    received_bytes = sent_bytes = held_bytes = 0

    def body_limit(self, head):
        return 1 << 20

    def open_spool(self, first): return None

    def __init__(self):
        self.reactor = FakeReactor()
        self.flush_soon = self.reactor.flush_soon
        self.heads, self.unread, self.requests = {}, {}, []
        self.budget = pyetcd.BufferBudget(self.reactor)

    def dispatch(self, request):
        self.requests.append((request.method, request.target, request.body,
                              request.body_too_large, dict(request.headers)))
        request.reply(200, b"ok")

    partial = (None,)

    def watch_partial(self, connection, partial, *, begun): pass
    def watch_unread(self, connection, taken): pass
    def forget(self, connection): pass


def _fuzz_pieces(data):
    """The rest of `data`, cut at places that its first bytes choose."""
    sizes, data = data[:4], data[4:]
    pieces = []
    for size in itertools.cycle(sizes or b"\x01"):
        if not data:
            return pieces
        pieces.append(data[:size % 16 + 1])
        data = data[size % 16 + 1:]


def _fuzz_serve(pieces):
    """Return the requests in `pieces` and all answers."""
    listener = _FuzzListener()
    sock = _FuzzSocket(pieces)
    connection = pyetcd.Connection(listener, sock, "fuzz:1")
    while sock.pieces and not connection.closed:
        connection._on_event(pyetcd.selectors.EVENT_READ)
        listener.reactor.rest()
    return listener.requests, sock.sent


def fuzz_http_requests(data):
    """In one piece or in many: the same requests, and the same answers."""
    pieces = _fuzz_pieces(data)
    one, many = _fuzz_serve([b"".join(pieces)] if pieces else []), _fuzz_serve(pieces)
    assert one == many


def fuzz_http_answers(data):
    """HttpCall: on_done once, with an exception or without, and nothing after it."""
    class Call(pyetcd.HttpCall):
        __slots__ = ()

        def _resolve(self, host, port):
            self._sock, self.connected, self._events = sock, True, pyetcd.selectors.EVENT_READ

    log = []
    sock = _FuzzSocket([*_fuzz_pieces(data), b""])
    call = Call(
        FakeReactor(), "http://127.0.0.1:1", "GET", "/", {},
        on_head=lambda status, headers: log.append(("head", status)),
        on_data=lambda piece: log.append(("data", piece)),
        on_done=lambda error: log.append(("done", error)),
    )
    while not call.ended:
        call._receive()
    assert [kind for kind, _ in log].count("done") == 1 and log[-1][0] == "done"
    assert log[-1][1] is None or isinstance(log[-1][1], (OSError, EOFError))


def fuzz_chunks(data):
    """The decoder of chunked bodies: whole and in pieces the same, or refused in both."""
    def decode(pieces):
        decoder, body = pyetcd.ChunkedDecoder(), b""
        try:
            for piece in pieces:
                body += decoder.feed(piece)
        except pyetcd.BadRequest:
            return "refused"
        return body, decoder.done, decoder.rest

    pieces = _fuzz_pieces(data)
    assert decode(pieces) == decode([b"".join(pieces)])


def fuzz_forms(data):
    """Everything that reads what a client wrote: forms, types, queries, JSON, credentials."""
    text = data.decode("latin-1")
    for parse, refusal in (
        (lambda: pyetcd.parse_form(data), pyetcd.InvalidForm),
        (lambda: pyetcd.parse_members(data), (ValueError, KeyError, TypeError)),
        (lambda: pyetcd.parse_answer_head(data), pyetcd.BadRequest),
        (lambda: pyetcd.is_form_type(text), pyetcd.InvalidForm),
        (lambda: pyetcd.parse_peer_urls(data), ValueError),
        (lambda: pyetcd.parse_user_body(data), ValueError),
        (lambda: pyetcd.parse_role_body(data), ValueError),
        (lambda: pyetcd.parse_credential(text), ()),
        (lambda: pyetcd.parse_stored("user", "u", text), ()),
        (lambda: pyetcd.parse_stored("role", "r", text), ()),
        (lambda: pyetcd.check_url(text), ValueError),
        (lambda: pyetcd.parse_initial_cluster(text), ValueError),
    ):
        with contextlib.suppress(refusal):
            parse()
    with contextlib.suppress(ValueError):
        assert pyetcd.unquote(data) == urllib.parse.unquote_to_bytes(data)
    assert json.loads(pyetcd.json_string(text * 20)) == text * 20
    with contextlib.suppress(pyetcd.BadRequest):
        head = pyetcd.parse_head(b"PUT /v2/keys/" + data + b" HTTP/1.1\r\nHost: x")
        target = pyetcd.KeyTarget(head)
        request = pyetcd.HttpRequest(head, data, None)
        with contextlib.suppress(pyetcd.EtcdError):
            collections.deque(target.request(request, 0), 0)


def fuzz_peer_streams(data):
    """Both kinds of frames, in pieces: messages, or CodecError."""
    for frames in (pyetcd.message_frames(), pyetcd.app_v2_frames(1, 2)):
        decoder = pyetcd.StreamParser(frames)
        with contextlib.suppress(pyetcd.CodecError):
            for piece in _fuzz_pieces(data):
                collections.deque(decoder.feed(piece), 0)


_FUZZ_DECODERS = (
    pyetcd.decode_hard_state, pyetcd.decode_entry, pyetcd.decode_conf_change,
    pyetcd.decode_snapshot, pyetcd.decode_message, pyetcd.decode_request, pyetcd.decode_metadata,
)


def fuzz_peer_door(data):
    """Whatever passes the door of a follower can be written, read again, applied and restored."""
    store = Store()
    cluster = Cluster(store)
    cluster.members = {2: pyetcd.Member(2, ("http://127.0.0.1:1",))}
    node = RawNode(pyetcd.RaftConfig(id=1, rng=random.Random(1), trace=lambda text: None),
                   snapshot=pyetcd.Snapshot(b"", (1, 2), 1, 1))
    inspector = pyetcd.MemberInspector(cluster, node.protocol_violation)
    applier = Applier(store, cluster, 1, clock=lambda: 1)
    at = 0
    while at < len(data):
        size = data[at] * 8 + 8
        try:
            message = pyetcd.decode_message(data[at + 1:at + 1 + size])
            message.to = 1
            if message.snapshot is not None:
                state = inspector.read_state(message.snapshot.data)
                message.snapshot = message.snapshot._replace(state=state)
        except (CodecError, ValueError):
            message = None
        at += 1 + size
        if message is None or pyetcd.finish(inspector.inspect(message)):
            continue
        with contextlib.suppress(pyetcd.ProposalDropped):
            node.step(message)
        ready = node.ready()
        for entry in ready.entries:
            assert pyetcd._wal_entry(pyetcd.encode_entry(entry)) == entry
        if ready.hard_state is not None:
            encoded = pyetcd.encode_hard_state(ready.hard_state)
            assert pyetcd.decode_hard_state(encoded) == ready.hard_state
        node.persisted(ready.mark)
        if ready.snapshot is not None:
            store.install(ready.snapshot.state)
            cluster.recover()
            node.applied_to(ready.snapshot.index)
        for entry in node.committed_entries():
            if entry.type:
                applier.apply_conf_change(pyetcd.read_change(entry))
                node.apply_conf_change(pyetcd.ConfChange())
            else:
                applier.apply_entry(entry)
            node.applied_to(entry.index)
    again = Store()
    again.recover(store.save())
    assert again.save() == store.save()


def fuzz_codec(data):
    """Every decoder of the wire: a value, or CodecError."""
    for decode in _FUZZ_DECODERS:
        with contextlib.suppress(pyetcd.CodecError):
            decode(data)
    with contextlib.suppress(pyetcd.SnapshotError, pyetcd.CodecError):
        pyetcd.decode_snapshot_file(data)


def fuzz_apply(data):
    """What a peer committed is applied, whatever it is: errors are results."""
    store = Store()
    cluster = Cluster(store)
    applier = Applier(store, cluster, 1, clock=lambda: 1)
    for at in range(0, len(data), 64):
        with contextlib.suppress(InvariantError):               # a version newer than ours
            applier.apply_entry(Entry(data=data[at:at + 64]))
        with contextlib.suppress(CodecError):
            applier.apply_conf_change(pyetcd.decode_conf_change(data[at:at + 64]))
    b"".join(store.snapshot_chunks())


def fuzz_store_snapshot(data):
    """A snapshot of a peer: recovered, or ValueError."""
    with contextlib.suppress(ValueError):
        Store().recover(data)


def fuzz_config_file(data):
    """Settings, or FlagError that names the file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(pyetcd.FlagError):
            pyetcd.read_config_file(file.name)
