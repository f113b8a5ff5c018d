"""The status API: version, health, statistics and log level of one member."""

from __future__ import annotations

import logging
import urllib.parse

from ..base.ids import LOG_PACKAGES, package_logger
from ..base.limits import SHORT_HEADER_BYTES_MAX
from ..base.text import json_string, json_text, utf8
from ..member.server import EtcdServer
from ..net.http_requests import HttpRequest
from .forms import _NOSNIFF, write_message, write_text
from .gojson import GoJson, raft_state_name
from .metrics import add_member_metrics, debug_variables


def version_json(server: EtcdServer) -> bytes:
    cluster = server.cluster
    version = cluster.version or "not_decided"
    return f'{{"etcdserver":"{cluster.identity.reported}","etcdcluster":"{version}"}}'.encode()


class StatusApi:
    """Version, machines, stats, health, metrics and log level of a member."""

    CHECKS = {
        "/livez": ("serializable_read",), "/readyz": ("serializable_read", "linearizable_read"),
    }

    def __init__(self, server: EtcdServer) -> None:
        self._server = server
        metrics = server.metrics
        self._healthy = metrics.counter(
            "etcd_server_health_success", "Probes answered with good news.")
        self._unhealthy = metrics.counter(
            "etcd_server_health_failures", "Probes answered with bad news.")
        add_member_metrics(server)

    def version(self, request: HttpRequest) -> None:
        request.reply(200, version_json(self._server))

    def machines(self, request: HttpRequest) -> None:
        write_text(request, 200, ", ".join(sorted(self._server.cluster.client_urls())))

    def health(self, request: HttpRequest) -> None:
        """Answer at once, from the known leader and the links to the other members.

        Differs from etcd, which waits up to 750 ms for the raft index to move.
        """
        healthy = self._server.is_healthy
        (self._healthy if healthy else self._unhealthy).inc()
        if healthy:
            write_text(request, 200, '{"health": "true"}')
        else:
            write_text(request, 503, '{"health": "false"}\n')

    def probe(self, request: HttpRequest) -> None:
        """Answer /livez, /readyz, or one check of them: `ok`, or 503 with the failed checks.

        ?verbose shows every check, ?exclude=NAME skips one.  A serializable read needs this
        member's store only; a linearizable one needs a leader and a quorum, as /health does.
        Source: etcd 3.5 etcdhttp/health.go; 2.3 has no such paths.
        """
        path, _, single = request.path[1:].partition("/")
        if len(request.query) > SHORT_HEADER_BYTES_MAX:
            request.reply(414)
            return
        query = urllib.parse.parse_qs(request.query, keep_blank_values=True)
        checks = (single,) if single else self.CHECKS["/" + path]
        failed, lines = False, ""
        for check in checks:
            if check in query.get("exclude", ()):
                continue
            problem = "" if check == "serializable_read" else self._problem()
            failed = failed or problem != ""
            lines += f"[-]{check} failed: {problem}\n" if problem else f"[+]{check} ok\n"
        (self._unhealthy if failed else self._healthy).inc()
        if failed:
            write_text(request, 503, lines)
        else:
            write_text(request, 200, (lines if "verbose" in query else "") + "ok\n", _NOSNIFF)

    def _problem(self) -> str:
        """Return why a linearizable read would fail; "" if it would not."""
        if self._server.is_healthy:
            return ""
        return "no quorum of members is connected" if self._server.lead else "etcdserver: no leader"

    def stats_self(self, request: HttpRequest) -> None:
        state = raft_state_name(self._server.node.raft.role)
        request.reply(200, utf8(self._server.stats.json(state)))

    def stats_leader(self, request: HttpRequest) -> None:
        server = self._server
        if not server.is_leader:
            write_message(request, 403, "not current leader")
            return
        followers = server.cluster.members.keys() - {server.member_id}
        request.reply(200, server.leader_stats.json(followers).encode())

    def stats_store(self, request: HttpRequest) -> None:
        request.reply(200, self._server.store.stats.json().encode())

    def metrics(self, request: HttpRequest) -> None:
        request.reply(200, utf8(self._server.metrics.text()), "text/plain; version=0.0.4")

    def debug_vars(self, request: HttpRequest) -> None:
        lines = ",\n".join(
            f"{json_string(name)}: {json_text(value)}"
            for name, value in debug_variables(self._server).items()
        )
        request.reply(200, utf8(f"{{\n{lines}\n}}\n"), "application/json; charset=utf-8")

    def log_level(self, request: HttpRequest) -> None:
        """Set the level of all loggers to that in the body, {"Level": "DEBUG"}.

        With "Package": "raft" only that of one package; without it, as in etcd, also that of
        packages with a level of their own.
        """
        if request.body_too_large:
            write_message(request, 413, "Request Entity Too Large")
            return
        try:
            members = GoJson.loads(request.body, partial=True)
            name = GoJson.string_member(members, "Level")
            package = GoJson.string_member(members, "Package")
        except ValueError:
            write_message(request, 400, "Invalid json body")
            return
        level = _LEVELS.get(name.upper())
        if level is None:
            write_message(request, 400, f"Invalid log level {name}")
            return
        if package and package.partition(".")[0] not in LOG_PACKAGES:
            write_message(request, 400, f"Invalid log package {package}")
            return
        if package:
            package_logger("etcdhttp").info('log level of %s set to "%s"', package, level[0])
            package_logger(package).setLevel(level[1])
        else:
            package_logger("etcdhttp").info('globalLogLevel set to "%s"', level[0])
            for each in [n for n in logging.root.manager.loggerDict if n.startswith("pyetcd.")]:
                logging.getLogger(each).setLevel(logging.NOTSET)
            logging.getLogger("pyetcd").setLevel(level[1])
        request.reply(204)


_LEVELS = {
    word: (name, level) for name, number, level in (
        ("CRITICAL", "", logging.CRITICAL), ("ERROR", "0", logging.ERROR),
        ("WARNING", "1", logging.WARNING), ("NOTICE", "2", logging.INFO),
        ("INFO", "3", logging.INFO), ("DEBUG", "4", logging.DEBUG), ("TRACE", "5", logging.DEBUG),
    ) for word in (name, name[0], number) if word
}
