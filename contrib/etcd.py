"""python-etcd's module `etcd`, on pyetcd_client, for programs that are not to be edited.

Copy this file and pyetcd_client.py to where the program looks for modules, before or without
python-etcd.  `import etcd`, `etcd.client`, `etcd.lock` and `etcd.auth` work then.  A program of
your own says `import pyetcd_client as etcd` instead.

Beyond pyetcd_client this has what such programs count on: python-etcd's defaults (port 4001; one
server is asked once, unless allow_reconnect is given), the members asked for at the start where
allow_reconnect is given, `watch(timeout=0)` without an end, and `client.http`, whose methods may
be replaced or mocked.  "Deliberately different" in the manual holds here too.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import sys
import types
from typing import Any, Dict, Optional
from urllib.parse import parse_qsl

import urllib3
from requests.structures import CaseInsensitiveDict
from urllib3.exceptions import HTTPError
from urllib3.exceptions import TimeoutError as UrllibTimeout

import pyetcd_client as _pyetcd
from pyetcd_client import *  # noqa: F403

_log = _pyetcd._log             # programs set its level (Salt's cache does)
_CLUSTER_ID = "x-etcd-cluster-id"
_SENDING = frozenset(("request", "request_encode_body", "urlopen"))


class Client(_pyetcd.Client):
    """A client with python-etcd's defaults; see pyetcd_client.Client.

    http  a urllib3.PoolManager; requests go through it only if its methods, or it, are replaced
    """

    def __init__(
        self, host: Any = "127.0.0.1", port: int = 4001, *args: Any, **kwargs: Any,
    ) -> None:
        if len(args) < 10 and isinstance(host, str):
            kwargs.setdefault("allow_reconnect", False)
        super().__init__(host, port, *args, **kwargs)
        self.http = self._http = urllib3.PoolManager()
        self._use_proxies = kwargs.get("use_proxies", len(args) > 10 and args[10])
        if self._sync:
            with contextlib.suppress(_pyetcd.EtcdError), _pyetcd.Scope(2):
                self.sync()

    def watch(self, key: str, index: Optional[int] = None, timeout: Optional[float] = None,
              recursive: Optional[bool] = None) -> _pyetcd.WatchedChange:
        """Return the next change; `timeout=0` waits for ever, as in python-etcd."""
        return super().watch(key, index, math.inf if timeout == 0 else timeout, recursive)

    @property
    def leader(self) -> Dict[str, Any]:
        """The leader as the answering member knows it, out of `members`."""
        return self.members[self.stats["leaderInfo"]["leader"]]

    def _get_headers(self) -> Dict[str, str]:
        """Return headers to send; a subclass may have more."""
        if self.username is None:
            return {}
        return urllib3.make_headers(basic_auth=f"{self.username}:{self.password}")

    def _headers(self, base: str, call: Any) -> Dict[str, str]:
        if type(self)._get_headers is Client._get_headers:
            return super()._headers(base, call)
        return {**super()._headers(base, call), **self._get_headers()}

    def _is_replaced(self, name: str = "") -> bool:
        if not name:                                # asked by a watch: is there any seam in use?
            return self._has_own_http() or super()._is_replaced("api_execute")
        own, known = getattr(type(self), name), getattr(_pyetcd.Client, name)
        return name in vars(self) or own is not known

    def _has_own_http(self) -> bool:
        return self.http is not self._http or not _SENDING.isdisjoint(vars(self.http))

    def _exchange(self, base: str, target: str, call: Any, exchange: Any, connections: Any) -> Any:
        if not self._has_own_http():
            return super()._exchange(base, target, call, exchange, connections)
        path, _, query = target.partition("?")
        options: Dict[str, Any] = {
            "timeout": None if exchange.deadline == math.inf else exchange.left_s(),
            "redirect": False, "headers": self._headers(base, call), "preload_content": False}
        exchange.sent = True
        try:
            if call.form is None:
                answer = self.http.request(
                    call.method, base + path, fields=dict(parse_qsl(query, True)), **options)
            elif call.content_type.endswith("json"):
                answer = self.http.urlopen(call.method, base + target, body=call.form, **options)
            else:
                answer = self.http.request_encode_body(
                    call.method, base + path, fields=dict(parse_qsl(call.form.decode(), True)),
                    encode_multipart=False, **options)
            data = answer.data
        except (OSError, HTTPError, http.client.HTTPException) as error:
            kind = (_pyetcd.RequestTimeout if isinstance(error, UrllibTimeout)
                    else _pyetcd.ConnectionFailed)
            raise kind(repr(error), cause=error, endpoint=base,
                       maybe_applied=call.write) from error
        return _pyetcd._Reply(answer.status, _headers_of(answer), data)


def _headers_of(answer: Any) -> CaseInsensitiveDict[str]:
    """Return the headers of an answer; of a mock, what `getheader` says of the cluster."""
    headers = getattr(answer, "headers", None)
    if isinstance(headers, (dict, urllib3.HTTPHeaderDict)):
        return CaseInsensitiveDict(headers)
    return CaseInsensitiveDict({_CLUSTER_ID: answer.getheader(_CLUSTER_ID)})


def _module(name: str, **names: Any) -> types.ModuleType:
    module = sys.modules[f"{__name__}.{name}"] = types.ModuleType(f"{__name__}.{name}")
    vars(module).update(names)
    return module


client = _module("client", Client=Client, _log=_log, etcd=sys.modules[__name__])
lock = _module("lock", Lock=_pyetcd.Lock, etcd=sys.modules[__name__])
auth = _module("auth", **{
    name: getattr(_pyetcd, name) for name in ("EtcdUser", "EtcdRole", "Auth")})
