"""First life: a member without a past asks the others whether that is so."""

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
from ..net.http_calls import HttpCall
from ..net.tls import TlsContext
from ..peer.streams import Answer
from .addresses import JOIN_ANSWER_SECONDS, PROBE_ANSWER_SECONDS, parse_members
from .bootstrap import data_lost, is_published

ASK_AGAIN_SECONDS = 0.1             # after a round that told nothing new, then twice as long, ...
ASK_AGAIN_SECONDS_MAX = 1.6


class DataLossCheck:
    """Keeps a member whose log is empty from voting where its first life may have voted.

    Bootstrap asks the members too, but perhaps none of them was up.  Nobody's messages count here
    until he has said that our client URLs were never published; who says that they were ends this
    member with refuse().  It is over when there is a leader: before, we have published nothing.
    Thread: reactor.  Differs from etcd, whose member votes as if it were new.
    """

    def __init__(
        self, etcd: EtcdServer, refuse: Callable[[StartError], None], tls: Optional[TlsContext]
    ) -> None:
        self._etcd = etcd
        self._refuse = refuse
        self._tls = tls
        self._heard: Set[int] = set()           # members that know no past of ours
        self._asked: Dict[int, HttpCall] = {}
        self._rounds = 0
        self._backoff = Backoff(ASK_AGAIN_SECONDS, ASK_AGAIN_SECONDS_MAX)
        etcd.transport.drop = self._drops
        etcd.reactor.call_later(0.0, self._ask)

    @staticmethod
    def is_due(boot: Bootstrap) -> bool:
        """True if the log was never written to by a leader."""
        return boot.snapshot is None and all(entry.term <= 1 for entry in boot.contents.entries)

    def _drops(self, message: Message) -> bool:
        is_heard = message.sender == self._etcd.member_id or message.sender in self._heard
        return not (is_heard or self._is_over)

    @property
    def _is_over(self) -> bool:
        return self._etcd.counts.leader_changes > 0

    def _ask(self) -> None:
        etcd = self._etcd
        if self._is_over or etcd.stopping:
            self.end()
            return
        for member in etcd.cluster.members.values():
            is_known = member.id in self._heard or member.id == etcd.member_id
            urls = usable_urls(member.peer_urls)
            if urls and not is_known and member.id not in self._asked:
                self._ask_one(member, urls[self._rounds % len(urls)])
        self._rounds += 1
        etcd.reactor.call_later(self._backoff.next(), self._ask)

    def _ask_one(self, member: Member, url: str) -> None:
        answer = Answer(CALL_BODY_BYTES_MAX)

        def done(error: Optional[Exception]) -> None:
            del self._asked[member.id]
            if error is None:
                self._answered(member.id, answer.body)

        self._asked[member.id] = HttpCall(
            self._etcd.reactor, url, "GET", "/members", {},
            connect_timeout_s=PROBE_ANSWER_SECONDS, idle_timeout_s=JOIN_ANSWER_SECONDS,
            answer_max=CALL_BODY_BYTES_MAX, tls=self._tls, on_data=answer.take_data, on_done=done,
        )

    def _answered(self, member_id: int, body: bytes) -> None:
        etcd = self._etcd
        with contextlib.suppress(ValueError):       # a list without us: it is not up to date
            members = parse_members(body)
            if is_published(etcd.member_id, members) and not self._is_over:
                self._refuse(data_lost(etcd.member_id))
            elif any(member.id == etcd.member_id for member in members):
                self._heard.add(member_id)
                self._backoff.reset()

    def end(self) -> None:
        """Ask no more, and believe everybody."""
        if self._etcd.transport.drop == self._drops:
            self._etcd.transport.drop = None
        for call in self._asked.values():
            call.cancel()
        self._asked.clear()
