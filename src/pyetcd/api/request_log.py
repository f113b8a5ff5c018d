"""The line of a request at level DEBUG."""

from __future__ import annotations

import logging
from typing import Any, Sequence, cast

from ..net.http_connections import Connection
from ..net.http_requests import HttpRequest


def log_reply(request: HttpRequest, log: logging.Logger) -> None:
    """Have a request logged when its reply begins, with status and duration.

    Source: etcd 2.3 etcdhttp/client.go, which logs it when it comes, without either.
    """
    request.connection = cast(Connection, _Logged(request, log))


class _Logged:
    """The connection of one request, which looks at the first bytes of the reply."""

    def __init__(self, request: HttpRequest, log: logging.Logger) -> None:
        connection = request.connection
        line = request.method, request.target, connection.remote
        vars(self).update(connection=connection, line=line, log=log, since=connection.reactor.now())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.connection, name, value)

    def send(self, data: bytes, more: Sequence[bytes] = ()) -> None:
        self._look(data)
        self.connection.send(data, more)

    def finish(self, data: bytes, keep_alive: bool, more: Sequence[bytes] = ()) -> None:
        self._look(data)
        self.connection.finish(data, keep_alive, more)

    def _look(self, data: bytes) -> None:
        if self.line:
            seconds = self.connection.reactor.now() - self.since
            self.log.debug("[%s] %s remote:%s status:%d duration:%.3f ms", *self.line,
                           int(data[9:12]), round(seconds * 1e3, 3))
            vars(self)["line"] = ()
