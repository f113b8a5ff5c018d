"""Endpoints: addresses of servers, and their discovery by SRV records."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from typing import Iterable, List, Optional, Sequence, Tuple, Union, cast
from urllib.parse import urlsplit

from .connections import Scope, _here
from .defaults import DNS_ANSWER_S, DNS_SLICE_S, RESOLV_CONF
from .errors import ConnectionFailed

_Address = Union[str, Tuple[str, int]]              # a URL, host, host:port, or (host, port)


def _base_url(text: str, protocol: str = "http") -> str:
    """Return `text` as scheme://host:port; raise ValueError if it does not name a server."""
    url = text.strip()
    if url.count(":") > 1 and not {"[", "/"}.intersection(url):     # an IPv6 address alone
        url = f"[{url}]"
    url = url if "://" in url else f"{protocol}://{url}"
    parts = urlsplit(url)
    try:
        valid = parts.port != 0
    except ValueError:                              # not a number, or above 65535
        valid = False
    if parts.scheme not in ("http", "https") or not parts.hostname or not valid:
        raise ValueError(f"endpoint {text!r} is not http://HOST:PORT or https://HOST:PORT")
    if parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"endpoint {text!r} has more than a scheme, a host and a port")
    return f"{parts.scheme}://{parts.netloc}"


def _listed_urls(
    host: Union[_Address, Sequence[_Address]], port: int, protocol: str,
) -> List[str]:
    """Return the URLs of the servers in `host`; `port` is for those that come without one."""
    urls: List[str] = []
    alone = isinstance(host, str) or (len(host) == 2 and isinstance(host[1], int))
    for item in cast(Sequence[_Address], [host] if alone else host):
        if isinstance(item, str):
            urls.extend(_with_port(_base_url(part, protocol), port) for part in item.split(","))
        else:
            name, number = item
            address = f"[{name}]:{number}" if ":" in name else f"{name}:{number}"
            urls.append(_base_url(address, protocol))
    return urls


def _with_port(url: str, port: int) -> str:
    return url if urlsplit(url).port is not None else _base_url(f"{url}:{port}")


class Endpoints:
    """The servers a client may ask: one is used until it fails, then the next in turn.

    given  those named at the start, or found in DNS; never forgotten
    urls   `given`, then those learned from the member list

    Thread: any.  There is no lock: what threads that fail at once may do to each other is to skip
    an endpoint, which is tried again in the next round.
    """

    def __init__(self, urls: Optional[Iterable[str]] = None) -> None:
        self.given: Tuple[str, ...] = ()
        self.urls: Tuple[str, ...] = ()
        self._current = ""                          # the endpoint in use; "" if there is none
        if urls is not None:
            self.give(urls)

    @property
    def current(self) -> str:
        """Base URL of the endpoint in use; "" before the first look into DNS."""
        return self._current

    def give(self, urls: Iterable[str]) -> None:
        """Replace those given at the start.  Raises ValueError if one is malformed, or none is."""
        listed = [urls] if isinstance(urls, str) else list(urls)
        cleaned = [_base_url(part) for url in listed for part in url.split(",")]
        if not cleaned:
            raise ValueError("at least one endpoint is needed")
        self.given = tuple(dict.fromkeys(cleaned))
        self.learn(())

    def learn(self, urls: Iterable[str]) -> None:
        """Replace what was learned from the member list; the one in use stays in use.

        Where all that were given are https, others are not taken: passwords would travel in clear.
        """
        secure = bool(self.given) and all(url.startswith("https:") for url in self.given)
        learned = [url for url in urls if url.startswith("https:") or not secure]
        self.urls = urls = tuple(dict.fromkeys([*self.given, *learned]))
        if self._current not in urls and urls:
            self._current = urls[0]

    def candidates(self) -> Tuple[str, ...]:
        """Return every endpoint once, the one in use first."""
        urls, current = self.urls, self._current
        position = urls.index(current) if current in urls else 0
        return urls[position:] + urls[:position]

    def failed(self, url: str) -> None:
        """Move on to the next endpoint, unless another thread has done so already."""
        urls = self.urls
        if url == self._current and url in urls:
            self._current = urls[(urls.index(url) + 1) % len(urls)]


# -- DNS: the standard library cannot ask for SRV records, and a package for the one question would
# be a dependency larger than this client


def _name_servers() -> List[Tuple[str, int]]:
    """Return the addresses of the system's name servers; without any, the local one."""
    found: List[Tuple[str, int]] = []
    with contextlib.suppress(OSError), open(RESOLV_CONF, encoding="utf-8") as lines:
        found = [(words[1], 53) for words in map(str.split, lines) if words[:1] == ["nameserver"]]
    return found or [("127.0.0.1", 53)]


def _dns_ask(server: Tuple[str, int], query: bytes, wait_s: float) -> bytes:
    """Return the answer of a name server, by TCP if it is too long for a datagram (RFC 1035)."""
    family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
    deadline = time.monotonic() + wait_s
    scope = _here.scope or Scope()
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(server)                        # the kernel drops what comes from others
        sock.send(query)
        answer = b""
        while answer[:2] != query[:2] or len(answer) < 12:
            left_s = deadline - time.monotonic()
            if scope.left_s() <= 0 or left_s <= 0:
                raise socket.timeout("no answer in time")
            sock.settimeout(min(left_s, DNS_SLICE_S))
            with contextlib.suppress(socket.timeout):
                answer = sock.recv(65535)
    if not answer[2] & 2:
        return answer
    with socket.create_connection(server, wait_s) as sock, sock.makefile("rb") as stream:
        sock.sendall(struct.pack(">H", len(query)) + query)
        return stream.read(*struct.unpack(">H", stream.read(2)))


def _dns_name(message: bytes, offset: int) -> Tuple[str, int]:
    """Return a name, without the last dot, and the offset behind it; pointers are followed."""
    labels: List[str] = []
    behind = 0
    for _ in range(128):                            # more would be a loop of pointers
        size = message[offset]
        if size >= 0xC0:
            behind = behind or offset + 2
            offset = struct.unpack_from(">H", message, offset)[0] & 0x3FFF
        elif size:
            labels.append(message[offset + 1:offset + 1 + size].decode("latin-1"))
            offset += 1 + size
        else:
            return ".".join(labels), behind or offset + 1
    raise ValueError("a name without an end")


def _srv_records(message: bytes) -> List[Tuple[int, int, int, str]]:
    """Return (priority, weight, port, target) of the SRV records in a DNS answer."""
    questions, answers = struct.unpack_from(">2H", message, 4)
    offset, records = 12, []
    for _ in range(questions):
        offset = _dns_name(message, offset)[1] + 4
    for _ in range(answers):
        offset = _dns_name(message, offset)[1]
        kind, size = struct.unpack_from(">H6xH", message, offset)
        offset += 10
        if kind == 33:
            fields = struct.unpack_from(">3H", message, offset)
            records.append((*fields, _dns_name(message, offset + 6)[0]))
        offset += size
    return records


def _lookup_srv(name: str, deadline: float) -> List[str]:
    """Return host:port of the SRV records of `name`, in the random order of RFC 2782; [] if none.

    Raises OSError if no name server has a usable answer before `deadline`.
    """
    labels = [label.encode("idna") for label in name.strip(".").split(".")]
    question = b"".join(bytes((len(label),)) + label for label in labels) + b"\0\0\x21\0\x01"
    last: Exception = OSError("no time to ask a name server")
    for server in _name_servers() * 2:
        wait_s = min(DNS_ANSWER_S, deadline - time.monotonic())
        if wait_s <= 0:
            break
        query = struct.pack(">6H", random.randrange(1 << 16), 0x0100, 1, 0, 0, 0) + question
        try:
            answer = _dns_ask(server, query, wait_s)
            if answer[3] & 15 not in (0, 3):        # 3: there is no such name
                raise OSError(f"DNS error {answer[3] & 15}")
            records = _srv_records(answer)
        except (OSError, struct.error, IndexError, ValueError) as error:
            last = error
            continue
        records.sort(key=lambda r: (r[0], -random.random() ** (1 / (r[1] or 0.01))))
        return [f"{target}:{port}" for _, _, port, target in records]
    raise OSError(f"lookup of {name} failed: {last}") from last


def _discover(domain: str, protocol: str, deadline: float) -> List[str]:
    """Return the URLs of the servers that the SRV records of `domain` name.

    _etcd-client-ssl._tcp (https), else _etcd-client._tcp (http), as etcdctl 2.3 asks; else
    _etcd._tcp (`protocol`), as python-etcd asks.  Raises ConnectionFailed.
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
