"""The keys API: turns HTTP requests into commands, and their results into replies."""

from __future__ import annotations

import functools
from typing import Any, Dict, Generator, List, Optional, Sequence, Tuple, Union

from ..base.codec import encode_plain, encode_request_steps
from ..base.errors import EtcdError, EventIndexCleared, Unauthorized
from ..base.limits import OUTPUT_JOIN_BYTES_MAX, WATCHED_BYTES_MAX, WATCHERS_MAX
from ..base.messages import Request
from ..base.text import as_unicode
from ..member.auth import Guard
from ..member.cluster import format_id
from ..member.server import EtcdServer
from ..member.statistics import Histogram, Histograms, exponential_bounds
from ..net.http_messages import HttpHead
from ..net.http_requests import Handler, HttpRequest
from ..store.walks import Listing
from .forms import FORM_SLICE_BYTES, KeyTarget, KeyWatch, refuse_method, write_error, write_message
from .listings import ListingRequest, Listings

KEPT_ANSWERS_MAX = 1_000            # to GETs; above: made anew for each request
KEPT_ANSWER_BYTES_MAX = 4_096       # of a longer one nothing is kept


class KeysApi:
    """/v2/keys: local reads, writes through consensus, watches.  Source: etcd 2.3 API, keys."""

    METHODS = ("HEAD", "GET", "PUT", "POST", "DELETE")

    def __init__(self, server: EtcdServer, guard: Guard) -> None:
        self._server = server
        self._guard = guard
        self._store = server.store
        self._reactor = server.reactor
        self._now, self._wall_ns = server.reactor.now, server.reactor.wall_ns
        self._listings = Listings(server.store, server.reactor)
        self._stats = server.store.stats
        self._cluster_line = f"X-Etcd-Cluster-Id: {format_id(server.cluster.id)}\r\n"
        self._heads = {
            status: f"HTTP/1.1 {phrase}\r\nContent-Type: application/json\r\n{self._cluster_line}"
            for status, phrase in ((200, "200 OK"), (201, "201 Created"))
        }
        metrics = server.metrics
        self._received = metrics.counter(
            "etcd_http_received_total", "Key requests that could be parsed.", ("method",))
        self._failed = metrics.counter(
            "etcd_http_failed_total", "Key requests answered with an error.", ("method", "code"))
        self._durations = Histograms(exponential_bounds(0.0005, 13), ("method",))
        metrics.add("etcd_http_successful_duration_second", "Time to answer a key request.",
                    self._durations)
        self._proposals = Histogram(exponential_bounds(0.001, 14))
        metrics.add("etcd_server_proposal_durations_seconds", "Time to commit and apply.",
                    self._proposals)
        # Finer than the metrics, which have the buckets of etcd: for the page's charts.
        self.write_durations = Histogram([0.000_1 * 1.25 ** step for step in range(52)])    # 8.7 s
        self._watches = metrics.counter(
            "etcd_store_watch_requests_total", "Watches that were asked for.")
        self._get_durations = self._durations.child("GET")
        self._put_durations = self._durations.child("PUT")
        self._answers: Dict[str, bytes] = {}    # to GETs of files, by path; see _get
        self._answers_at: Tuple[int, int, str] = (0, 0, "")
        self._puts_s: List[float] = []      # durations of PUTs that _put_durations lacks
        metrics.before_text = self.count_puts

    def route(self, head: HttpHead) -> Handler:
        if head.method not in self.METHODS:
            return functools.partial(refuse_method, ",".join(self.METHODS))
        target = KeyTarget(head)
        command = target.command
        if target.error is not None:
            return functools.partial(self._refuse, target.error)
        return self._guard.key(
            head, head.path[len("/v2/keys"):], write=head.method not in ("GET", "HEAD"),
            recursive=command.recursive, passed=self._answer(head, target),
            refused=functools.partial(self._unauthorized, target),
        )

    def _answer(self, head: HttpHead, target: KeyTarget) -> Handler:
        command = target.command
        if head.method in ("PUT", "POST"):
            return functools.partial(self._put, target)
        if head.method == "DELETE":
            return functools.partial(self._submit, command)
        if head.method == "GET" and command.quorum:
            return functools.partial(self._submit, command._replace(method="QGET"))
        if command.wait:
            return functools.partial(self._watch, command)
        return functools.partial(self._get, command.path, command.recursive, command.sorted)

    def _refuse(self, error: EtcdError, request: HttpRequest) -> None:
        write_error(request, error, self._cluster_line)

    def _unauthorized(self, target: KeyTarget, request: HttpRequest) -> None:
        """Answer 401, or an error in the form of a PUT or POST, which comes first."""
        refuse = functools.partial(self._refuse, Unauthorized("Insufficient credentials"))
        if request.method in ("PUT", "POST"):
            self._parse_slice(self._read(target, request), request, refuse)
        else:
            refuse(request)

    def _get(self, path: str, recursive: bool, sorted: bool, request: HttpRequest) -> None:
        """GET and HEAD from the local store.  A hot path.

        The answer to a GET of a file is kept until the store, the log or the Date header changes:
        such GETs at 64 connections take 0.79 of the processor time, that of the client included.
        """
        started = self._now()
        state = self._store.current_index, self._server.raft_index, self._reactor.http_date
        if state != self._answers_at:
            self._answers_at = state
            self._answers.clear()
        elif path in self._answers and request.head.takes_raw and not recursive:
            self._stats.gets_fail += 1      # as below
            self._stats.gets_success += 1
            self._received.inc("GET")
            request.reply_raw(self._answers[path])
            self._get_durations.observe(self._now() - started)
            return
        # etcd reads the key that enables auth at every key request, and counts the miss.
        self._stats.gets_fail += 1
        method = request.head.method
        self._received.inc(method)
        try:
            body = self._store.file_json(path, recursive=recursive, now_ns=self._wall_ns())
        except EtcdError as error:
            self._fail(request, method, error)
            return
        if not body:
            self._list(request, method, started, ListingRequest(path, recursive, sorted))
            return
        answer = self._send(request, 200, self._store.current_index, body[0], body[1:])
        if len(answer) < KEPT_ANSWER_BYTES_MAX and len(self._answers) < KEPT_ANSWERS_MAX and (
            answer and b'"expiration"' not in answer    # its ttl changes with the clock
        ):
            self._answers[path] = answer
        durations = self._get_durations if method == "GET" else self._durations.child(method)
        durations.observe(self._now() - started)

    def _list(
        self, request: HttpRequest, method: str, started: float, wanted: ListingRequest
    ) -> None:
        def done(result: Union[Listing, EtcdError]) -> None:
            if isinstance(result, EtcdError):
                self._fail(request, method, result)
                return
            first, *more = result.chunks
            self._send(request, 200, result.index, first, more)
            self._durations.child(method).observe(self._now() - started)

        self._listings.ask(wanted, request, done)

    def _put(self, target: KeyTarget, request: HttpRequest) -> None:
        """PUT and POST.  A hot path for bodies of the form `value=<nothing encoded>`."""
        body = request.body
        find = body.find                # `in` first raises a TypeError, looking for a number: 2 us
        if (
            target.plain and body.startswith(b"value=") and len(body) < FORM_SLICE_BYTES
            and find(b"%") < 0 and find(b"+") < 0 and find(b"&") < 0 and find(b";") < 0
        ):
            value, known = body[6:], target.command
            try:
                text = value.decode()
            except UnicodeDecodeError:
                pass
            else:
                id = self._server.ids.next()
                command = Request(id, known.method, known.path, text)
                self._submit(command, request, encode_plain(id, target.encoded, value))
                return
        self._parse_slice(self._read(target, request), request)

    def _read(
        self, target: KeyTarget, request: HttpRequest
    ) -> Generator[None, None, Tuple[Request, bytes]]:
        """Return the command of a PUT or POST, and its encoding if it is long, with pauses."""
        command = yield from target.request(request, self._wall_ns())
        if len(request.body) < FORM_SLICE_BYTES:
            return command, b""
        # Longer texts are UTF-8, see form_steps(); another check would take 1 ms per MB.
        val, prev_value = (
            text if len(text) > FORM_SLICE_BYTES else as_unicode(text)
            for text in (command.val, command.prev_value)
        )
        command = command._replace(
            id=self._server.ids.next(), path=as_unicode(command.path), val=val,
            prev_value=prev_value,
        )
        return command, (yield from encode_request_steps(command))

    def _parse_slice(
        self, steps: Generator[None, None, Tuple[Request, bytes]], request: HttpRequest,
        refuse: Optional[Handler] = None,
    ) -> None:
        """Parse as much of a form as fits in a turn; at its end propose the command, or refuse."""
        try:
            next(steps)
        except StopIteration as end:
            if refuse is None:
                command, encoded = end.value
                self._submit(command, request, encoded)
            else:
                refuse(request)
        except EtcdError as error:
            self._refuse(error, request)
        else:
            if not request.connection.closed:
                self._reactor.call_in_turn(self._parse_slice, steps, request, refuse)

    def _submit(self, command: Request, request: HttpRequest, encoded: bytes = b"") -> None:
        method = command.method
        self._stats.gets_fail += 1              # as in _get
        self._received.inc(method)
        done = functools.partial(self._reply_applied, request, command, self._now())
        self._server.do(command, done, encoded)

    def _reply_applied(
        self, request: HttpRequest, command: Request, started: float, result: Any
    ) -> None:
        method = command.method
        if isinstance(result, EtcdError):
            self._fail(request, method, result)
            return
        if method == "QGET" and result.node.children is not None:
            self._proposals.observe(self._now() - started)
            wanted = ListingRequest(command.path, command.recursive, command.sorted)
            self._list(request, method, started, wanted)
            return
        body = result.client_pieces()
        status = 201 if result.is_created else 200
        self._send(request, status, result.index, body[0], body[1:])
        elapsed_s = self._now() - started
        if method == "PUT":
            self._puts_s.append(elapsed_s)
            if len(self._puts_s) >= 1_000:
                self.count_puts()
            return
        self._proposals.observe(elapsed_s)
        if method != "QGET":
            self.write_durations.observe(elapsed_s)
        self._durations.child(method).observe(elapsed_s)

    @property
    def reads(self) -> int:
        """How many reads of keys this member was asked for."""
        return sum(map(self._received.value, ("GET", "HEAD", "QGET")))

    def count_puts(self) -> None:
        puts_s, self._puts_s = self._puts_s, []
        self.write_durations.observe_many(puts_s)
        self._proposals.observe_many(puts_s)
        self._put_durations.observe_many(puts_s)

    def _watch(self, command: Request, request: HttpRequest) -> None:
        self._stats.gets_fail += 1              # as in _get
        if self._store.stats.watchers >= WATCHERS_MAX:
            write_message(
                request, 503, f"{WATCHERS_MAX} watchers wait already; use another member, or one"
                " recursive watch instead of many", self._cluster_line,
            )
            return
        if self._store.hub.watched_bytes + len(command.path) > WATCHED_BYTES_MAX:
            write_message(
                request, 503, "the watchers' paths take too much memory; use shorter keys, or"
                " another member", self._cluster_line,
            )
            return
        self._watches.inc()
        headers = self._cluster_line + self._index_lines(self._store.current_index)
        try:
            KeyWatch(self._store, command, request, headers)
        except EventIndexCleared as error:
            self._fail(request, "GET", error)

    def _fail(self, request: HttpRequest, method: str, error: EtcdError) -> None:
        self._failed.inc(method, str(error.status))
        write_error(request, error, self._cluster_line)

    def _index_lines(self, index: int) -> str:
        server = self._server
        return (
            f"X-Etcd-Index: {index}\r\nX-Raft-Index: {server.raft_index}\r\n"
            f"X-Raft-Term: {server.raft_term}\r\n"
        )

    def _send(
        self, request: HttpRequest, status: int, index: int, body: bytes,
        more: Sequence[bytes] = (),
    ) -> bytes:
        """Answer with an event; return the bytes of an answer in one piece, else b""."""
        head, size = request.head, len(body)
        if not head.takes_raw:
            headers = self._cluster_line + self._index_lines(index)
            request.reply(status, body, "application/json", headers, more)
            return b""
        if more or size > OUTPUT_JOIN_BYTES_MAX:
            body, more = b"", (body, *more)
            size = sum(map(len, more))
        server = self._server
        data = (
            f"{self._heads[status]}X-Etcd-Index: {index}\r\nX-Raft-Index: {server.raft_index}\r\n"
            f"X-Raft-Term: {server.raft_term}\r\nDate: {self._reactor.http_date}\r\n"
            f"Content-Length: {size}\r\n\r\n".encode("latin-1") + body
        )
        request.reply_raw(data, more)
        return b"" if more else data
