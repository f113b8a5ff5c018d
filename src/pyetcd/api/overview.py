"""The members as this one sees them, and what is wrong, in words."""

from __future__ import annotations

import functools
from typing import Any, Dict, List, Mapping, Optional

from ..base.limits import NS, __version__
from ..base.text import json_text, load_json, utf8
from ..base.urls import usable_urls
from ..member.cluster import Member, format_id
from ..member.server import EtcdServer
from ..net.http_calls import Answer, HttpCall, fetch
from ..net.http_requests import HttpRequest
from ..raft.core import RaftRole

ASK_SECONDS = 0.9                   # between two questions to a member, however many pages look
SILENT_SECONDS = 3.0                # without an answer; from then on it is said
LAG_ENTRIES_MAX = 1_000             # behind the commit index; above: it is said

# What a member says about itself: name -> type.  Answers of others are cut down to these.
_REPORT_FIELDS = {
    "role": str, "term": int, "index": int, "commit": int, "healthy": bool, "version": str,
    "pyetcd": str, "since": int, "problem": str,
}


def self_report(server: EtcdServer) -> Dict[str, object]:
    """Return what this member says about itself, to the page and to other members."""
    raft = server.node.raft
    return {
        "role": RaftRole(raft.role).name.lower(), "term": raft.term, "index": server.raft_index,
        "commit": raft.log.commit, "lag": raft.log.commit - server.raft_index,
        "healthy": server.is_healthy, "version": server.cluster.identity.reported,
        "pyetcd": __version__, "since": server.stats.started_ns // NS, "problem": server.no_space,
    }


def reply_report(server: EtcdServer, request: HttpRequest) -> None:
    """Answer GET /status on the peer port."""
    request.reply(200, utf8(json_text(self_report(server))))


def read_report(body: bytes) -> Dict[str, Any]:
    """Return what another member says about itself, as far as it can be used; {} if not."""
    try:
        report = load_json(body)
    except ValueError:
        return {}
    if not isinstance(report, dict):
        return {}
    return {name: report[name] for name, kind in _REPORT_FIELDS.items()
            if type(report.get(name)) is kind}


class Overview:
    """Asks the other members how they are while somebody looks.  Thread: reactor."""

    def __init__(self, server: EtcdServer) -> None:
        self._server = server
        self._now = server.reactor.now
        self._asked_at: Optional[float] = None      # monotonic, as are the next two
        self._answered_at: Dict[int, float] = {}
        self._leaderless_at: Optional[float] = None
        self._reports: Dict[int, Dict[str, Any]] = {}
        self._calls: Dict[int, HttpCall] = {}       # under way

    def look(self) -> None:
        """Ask again, if the last answers are old.  To be called by each request of a page."""
        server, now = self._server, self._now()
        if server.lead:
            self._leaderless_at = None
        elif self._leaderless_at is None:
            self._leaderless_at = now
        if self._asked_at is not None and now - self._asked_at < ASK_SECONDS:
            return
        if self._asked_at is None or now - self._asked_at > SILENT_SECONDS:
            self._answered_at, self._reports = {}, {}       # nobody looked: they are of the past
        self._asked_at = now
        for member in server.cluster.members.values():
            urls = usable_urls(member.peer_urls)
            if member.id != server.member_id and member.id not in self._calls and urls:
                self._ask(member.id, urls[0])

    def stop(self) -> None:
        for call in self._calls.values():
            call.cancel()
        self._calls = {}

    def _ask(self, member_id: int, url: str) -> None:
        self._calls[member_id] = fetch(
            self._server.reactor, url, "/status", functools.partial(self._answered, member_id),
            connect_timeout_s=1.0, idle_timeout_s=1.0, tls=self._server.versions.tls,
        )

    def _answered(self, member_id: int, error: Optional[Exception], answer: Answer) -> None:
        """An etcd answers 404: it is there, and says no more."""
        del self._calls[member_id]
        if error is None:
            self._answered_at[member_id] = self._now()
            report = read_report(answer.body) if answer.status == 200 else {}
            if "index" in report:           # compared at once: it is older with every moment
                commit = max(self._server.node.raft.log.commit, report.get("commit", 0))
                report["lag"] = commit - report["index"]
            self._reports[member_id] = report

    def rows(self) -> List[Dict[str, Any]]:
        members = sorted(self._server.cluster.members.values(), key=lambda m: (m.name, m.id))
        return [self._row(member) for member in members]

    def _row(self, member: Member) -> Dict[str, Any]:
        server = self._server
        is_self = member.id == server.member_id
        report = self_report(server) if is_self else self._reports.get(member.id, {})
        return {
            "id": format_id(member.id), "name": member.name, "peerURLs": member.peer_urls,
            "clientURLs": member.client_urls, "self": is_self,
            "leader": member.id == server.lead, "silent": round(self._silent_s(member.id)),
            **report,
        }

    def _silent_s(self, member_id: int) -> float:
        """For how long a member has not answered; 0.0 if it does, or may."""
        server, answered_at = self._server, self._answered_at.get(member_id)
        if answered_at is not None:
            silent_s = self._now() - answered_at
            return silent_s if silent_s >= SILENT_SECONDS else 0.0
        since = server.transport.inactive_since(member_id)
        return max(server.reactor.wall_ns() / NS - since, 1.0) if since else 0.0

    def problems(self, rows: List[Dict[str, Any]]) -> List[str]:
        """Say what is wrong, the worst first; [] if nothing is."""
        server, said = self._server, []
        if server.no_space:
            said.append(f"The log cannot be written: {server.no_space}. Writes are refused.")
        if self._leaderless_at is not None:
            waited = show_seconds(self._now() - self._leaderless_at)
            said.append(f"There has been no leader for {waited}: writes wait for the next one.")
        reached = sum(not row["silent"] and bool(row["name"]) for row in rows)
        needed = len(rows) // 2 + 1
        if reached < needed:
            said.append(f"Only {reached} of {len(rows)} members can be reached from here, and"
                        f" {needed} are needed: writes fail.")
        for row in rows:
            said += _member_problems(row)
        return said


def _member_problems(row: Mapping[str, Any]) -> List[str]:
    name = row["name"] or ", ".join(row["peerURLs"])
    if not row["name"]:
        return [f"The member at {name} was added, and has not started yet."]
    if row["silent"]:
        return [f"{name} has not answered for {show_seconds(row['silent'])}."]
    said = []
    if row.get("problem") and not row["self"]:
        said.append(f"{name}: {row['problem']}.")
    if row.get("lag", 0) > LAG_ENTRIES_MAX:
        said.append(f"{name} is {row['lag']:,} entries behind.")
    return said


def show_seconds(seconds: float) -> str:
    """Return a duration in the unit that fits it: `12 s`, `3 min`, `2 h`, `5 d`."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"
