"""Endpoints: addresses of servers, and their discovery by SRV records."""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any, Union, cast
from urllib.parse import urlsplit

from .connections import Scope, _call_on_thread, _context
from .errors import ConnectionFailed

_Address = Union[str, tuple[str, int]]              # a URL, host, host:port, or (host, port)


def _base_url(text: str, protocol: str = "http") -> str:
    """Return `text` as scheme://host:port.  Raises ValueError if it does not name a server."""
    url = text.strip()
    if url.count(":") > 1 and not {"[", "/"}.intersection(url):     # a bare IPv6 address
        url = f"[{url}]"
    url = url if "://" in url else f"{protocol}://{url}"
    try:
        parts = urlsplit(url)
        valid = parts.port != 0 and not parts.netloc.endswith(":")
        if "[" in parts.netloc:         # urlsplit looks into brackets since 3.11.4, never around
            ipaddress.IPv6Address(re.sub(r"^\[([^]]*)\](:\d+)?$", r"\1", parts.netloc))
    except ValueError:                  # not a number, above 65535, or not an IPv6 address
        parts, valid = urlsplit(""), False
    if (parts.scheme not in ("http", "https") or not valid
            or not re.fullmatch(r"[^\s\"'{}<>$]+", parts.hostname or "")):
        raise ValueError(f"endpoint {text!r} is not http://HOST:PORT or https://HOST:PORT"
                         f"{_endpoint_advice(text)}")
    if parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"endpoint {text!r} has more than a scheme, a host and a port")
    return f"{parts.scheme}://{parts.netloc}"


def _endpoint_advice(text: str) -> str:
    if not text.strip():
        return "; it is empty, or there is a comma too many"
    if re.search(r"[\"'\u2018-\u201f]", text):
        return "; the quotes are part of it: write it without them"
    if re.search(r"[${}<>]", text):
        return "; a variable or placeholder was not filled in"
    if " " in text.strip():
        return "; separate endpoints by commas"
    bare = text.count(":") > 2 and "[" not in text
    return "; an IPv6 address needs brackets: http://[::1]:2379" if bare else ""


def _listed_urls(host: _Address | Sequence[_Address], port: int, protocol: str) -> list[str]:
    """Return the URLs of the servers in `host`; `port` is the default port."""
    urls: list[str] = []
    alone = isinstance(host, str) or (len(host) == 2 and isinstance(host[1], int))
    for item in cast(Sequence[_Address], [host] if alone else host):
        if isinstance(item, str):
            for part in item.split(","):
                url = _base_url(part, protocol)
                urls.append(url if urlsplit(url).port is not None else _base_url(f"{url}:{port}"))
        else:
            name, number = item
            address = f"[{name}]:{number}" if ":" in name else f"{name}:{number}"
            urls.append(_base_url(address, protocol))
    return urls


class Endpoints:
    """The servers of a client: one is used until it fails, then the next in turn.

    given    from the constructor or DNS; permanent
    urls     `given`, then the URLs learned from the member list
    current  the URL in use; "" before the first DNS lookup

    Thread: any.  There is no lock: threads that fail at the same time may at worst skip an
    endpoint, which is tried again in the next round.
    """

    def __init__(self, urls: Iterable[str] | None = None) -> None:
        self.given: tuple[str, ...] = ()
        self.urls: tuple[str, ...] = ()
        self.current = ""
        if urls is not None:
            self.give(urls)

    def give(self, urls: Iterable[str]) -> None:
        """Replace the given URLs.  Raises ValueError for a malformed one, or for none."""
        listed = [urls] if isinstance(urls, str) else list(urls)
        cleaned = [_base_url(part) for url in listed for part in url.split(",")]
        if not cleaned:
            raise ValueError("at least one endpoint is needed")
        self.given = tuple(dict.fromkeys(cleaned))
        self.learn(())

    def learn(self, urls: Iterable[str]) -> None:
        """Replace the URLs learned from the member list; the one in use stays in use.

        If all given URLs are https, others are ignored: passwords would travel in clear.
        """
        secure = bool(self.given) and all(url.startswith("https:") for url in self.given)
        learned = [url for url in urls if url.startswith("https:") or not secure]
        self.urls = urls = tuple(dict.fromkeys([*self.given, *learned]))
        if self.current not in urls and urls:
            self.current = urls[0]

    def candidates(self) -> tuple[str, ...]:
        """Return every endpoint once, the one in use first."""
        urls, current = self.urls, self.current
        position = urls.index(current) if current in urls else 0
        return urls[position:] + urls[:position]

    def failed(self, url: str) -> None:
        """Switch to the next endpoint, unless another thread has done so."""
        urls = self.urls
        if url == self.current and url in urls:
            self.current = urls[(urls.index(url) + 1) % len(urls)]


# -- DNS: the standard library has no SRV lookup


def _lookup_srv(name: str, deadline: float) -> list[str]:
    """Return host:port of the SRV records of `name` in the order of RFC 2782; [] if there is none.

    Raises OSError if no name server replies before `deadline` (monotonic seconds).
    """
    try:
        import dns.exception
        import dns.resolver
    except ImportError as error:
        raise OSError("SRV records need the package dnspython: pip install dnspython (or, from "
                      "Debian: apt install python3-dnspython)") from error

    def left_s() -> float:
        wait_s = (_context.scope or Scope()).left_s(deadline - time.monotonic())
        if not wait_s:
            raise OSError(f"lookup of {name} failed: no answer in time")
        return wait_s

    lifetime_s = left_s()
    try:
        found = _call_on_thread(f"pyetcd-lookup {name}", lambda: dns.resolver.resolve(
            name, "SRV", lifetime=lifetime_s, search=False), left_s)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return []
    except dns.exception.DNSException as error:
        raise OSError(f"lookup of {name} failed: {error}") from error
    records: list[Any] = found.rrset.processing_order() if found.rrset else []
    return [f"{str(record.target).rstrip('.')}:{record.port}" for record in records]


def _discover(domain: str, protocol: str, deadline: float) -> list[str]:
    """Return the URLs of the servers in the SRV records of `domain`.  Raises ConnectionFailed.

    _etcd-client-ssl._tcp (https), else _etcd-client._tcp (http), as in etcdctl 2.3; else
    _etcd._tcp (`protocol`), as in python-etcd.
    """
    services = ("etcd-client-ssl", "https"), ("etcd-client", "http"), ("etcd", protocol)
    for service, scheme in services:
        try:
            found = _lookup_srv(f"_{service}._tcp.{domain}", deadline)
            if found:
                return [_base_url(address, scheme) for address in found]
        except (OSError, ValueError) as error:
            raise ConnectionFailed(str(error)) from error
    raise ConnectionFailed(f"there are no SRV records for etcd in {domain}")
