"""The check for lost data: a member without a log asks whether it ever had one."""

from __future__ import annotations

import contextlib
from typing import Callable, Dict, Optional, Set

from ..base.basics import Backoff
from ..base.errors import StartError
from ..base.limits import CALL_BODY_BYTES_MAX
from ..base.messages import Message
from ..base.urls import usable_urls
from ..member.cluster import Member
from ..member.configuration import Bootstrap
from ..member.server import EtcdServer
from ..net.http_calls import Answer, HttpCall, fetch
from ..net.tls import TlsContext
from ..net.workers import Timer
from .addresses import JOIN_ANSWER_SECONDS, PROBE_ANSWER_SECONDS, parse_members
from .bootstrap import data_lost, is_published

ASK_AGAIN_SECONDS = 0.1             # after a round without news; doubles with each round
ASK_AGAIN_SECONDS_MAX = 1.6


class DataLossCheck:
    """Keeps a member whose log is empty from voting twice in a term.

    Bootstrap asks the members too, but perhaps none of them was up.  Ignores a peer's messages
    until that peer confirms that this member's client URLs were never published.  If a peer
    reports that they were, the data directory was lost and refuse() ends the member.  The check
    ends with the first leader: until then this member publishes nothing.
    Thread: reactor.  Differs from etcd, whose member votes as if it were new.
    """

    def __init__(
        self, etcd: EtcdServer, refuse: Callable[[StartError], None], tls: Optional[TlsContext]
    ) -> None:
        self._reactor = etcd.reactor
        self._transport = etcd.transport
        self._cluster = etcd.cluster
        self._counts = etcd.counts
        self._member_id = etcd.member_id
        self._refuse = refuse
        self._tls = tls
        self._confirmed: Set[int] = {etcd.member_id}    # members that know no past of ours
        self._asked: Dict[int, HttpCall] = {}
        self._rounds = 0
        self._backoff = Backoff(ASK_AGAIN_SECONDS, ASK_AGAIN_SECONDS_MAX)
        self._transport.drop = self._drops
        self._timer: Timer = self._reactor.call_later(0.0, self._ask)

    @staticmethod
    def is_due(boot: Bootstrap) -> bool:
        """True if the log was never written to by a leader."""
        return boot.snapshot is None and all(entry.term <= 1 for entry in boot.contents.entries)

    def _drops(self, message: Message) -> bool:
        return message.sender not in self._confirmed and not self._is_over

    @property
    def _is_over(self) -> bool:
        return self._counts.leader_changes > 0

    def _ask(self) -> None:
        if self._is_over:
            self.end()
            return
        for member in self._cluster.members.values():
            urls = usable_urls(member.peer_urls)
            if urls and member.id not in self._confirmed and member.id not in self._asked:
                self._ask_one(member, urls[self._rounds % len(urls)])
        self._rounds += 1
        self._timer = self._reactor.call_later(self._backoff.next(), self._ask)

    def _ask_one(self, member: Member, url: str) -> None:
        def done(error: Optional[Exception], answer: Answer) -> None:
            del self._asked[member.id]
            if error is None:
                self._answered(member.id, answer.body)

        self._asked[member.id] = fetch(
            self._reactor, url, "/members", done, connect_timeout_s=PROBE_ANSWER_SECONDS,
            idle_timeout_s=JOIN_ANSWER_SECONDS, body_max=CALL_BODY_BYTES_MAX, tls=self._tls,
        )

    def _answered(self, peer_id: int, body: bytes) -> None:
        with contextlib.suppress(ValueError):       # a list without us: it is not up to date
            members = parse_members(body)
            if is_published(self._member_id, members) and not self._is_over:
                self._refuse(data_lost(self._member_id))
            elif any(member.id == self._member_id for member in members):
                self._confirmed.add(peer_id)
                self._backoff.reset()

    def end(self) -> None:
        if self._transport.drop == self._drops:
            self._transport.drop = None
        self._timer.cancel()
        for call in self._asked.values():
            call.cancel()
        self._asked.clear()
