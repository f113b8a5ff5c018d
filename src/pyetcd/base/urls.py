"""URLs as flags and member lists hold them."""

from __future__ import annotations

import contextlib
from typing import Iterable, List, Tuple
from urllib.parse import urlsplit

from .text import is_ip, split_address, split_url


def check_url(url: str) -> str:
    """Return `url` as scheme://host:port, or raise ValueError with etcd's words.

    The scheme is in lower case, as etcd writes it: member ids are hashes of these URLs.
    """
    url = url.strip()
    scheme, authority, rest = split_url(url)
    host, port = split_address(authority.rpartition("@")[2])
    if scheme not in ("http", "https"):
        raise ValueError(f"URL scheme must be http or https: {url}")
    if len(port) < 2 or (":" in host and not host.startswith("[")):
        raise ValueError(f'URL address does not have the form "host:port": {url}')
    if rest:
        raise ValueError(f"URL must not contain a path: {url}")
    return f"{scheme}://{authority}"


def usable_urls(urls: Iterable[str]) -> List[str]:
    """Return the `urls` that check_url accepts; an older or another program may have sent them."""
    usable: List[str] = []
    for url in urls:
        with contextlib.suppress(ValueError):
            usable.append(check_url(url))
    return usable


def check_advertised_url(url: str) -> str:
    """Return check_url(url), or raise ValueError if no client could connect to it."""
    checked = check_url(url)
    host, port = url_address(checked)
    if not host or not port:
        raise ValueError(f'URL address does not have the form "host:port": {url.strip()}')
    return checked


def parse_urls(text: str) -> Tuple[str, ...]:
    """Return the URLs of a comma-separated list, sorted as text.  Raises ValueError."""
    return tuple(sorted(check_url(url) for url in text.split(",")))


def is_https(url: str) -> bool:
    return url.startswith("https:")


def url_address(url: str) -> Tuple[str, int]:
    """Return (host, port) of a checked URL; the host of `http://:2379` is ""."""
    parts = urlsplit(url)
    port = parts.port
    if port is None:
        port = 443 if parts.scheme == "https" else 80
    return parts.hostname or "", port


WILDCARD_HOSTS = ("0.0.0.0", "::")


def is_local(url: str) -> bool:
    """True if `url` leads each client to its own machine: loopback, or a wildcard."""
    host = url_address(url)[0]
    is_loopback = host in ("localhost", "::1") or host.startswith("127.") and is_ip(host)
    return is_loopback or host in WILDCARD_HOSTS
