"""A DNS client for SRV records."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
import time
from typing import List, NamedTuple, Sequence, Tuple

from .tls import tls_reason

DNS_ANSWER_SECONDS = 5.0            # per name server and try; then the next one
DNS_TRIES = 2                       # rounds through the name servers
DNS_MESSAGE_BYTES_MAX = 65_535
RESOLV_CONF = "/etc/resolv.conf"


def _reason(error: Exception) -> str:
    """Return the text of an error without Python's decoration."""
    if isinstance(error, ssl.SSLError):
        return tls_reason(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


class SrvRecord(NamedTuple):
    """One answer to a DNS SRV query (RFC 2782)."""

    priority: int
    weight: int
    port: int
    target: str                         # without the trailing dot


def name_servers(path: str = RESOLV_CONF) -> List[Tuple[str, int]]:
    """Return the addresses of the system's name servers; the local one if there are none."""
    found: List[Tuple[str, int]] = []
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for words in map(str.split, file):
            if len(words) > 1 and words[0] == "nameserver":
                found.append((words[1], 53))
    return found or [("127.0.0.1", 53)]


def lookup_srv(name: str, servers: Sequence[Tuple[str, int]]) -> List[SrvRecord]:
    """Return the SRV records of `name` from the first name server with a good answer.

    Sorted by priority, then by falling weight: the order numbers the unnamed members, so the
    random choice of RFC 2782 would be of no use.  Raises OSError.
    """
    fault = "no name server to ask"
    for address in list(servers) * DNS_TRIES:
        query_id = random.randrange(1 << 16)
        query = _srv_query(query_id, name)
        try:
            answer = _ask_udp(address, query)
            if answer[2] & 2:           # truncated: the whole answer needs TCP (RFC 1035 §4.2)
                answer = _ask_tcp(address, query)
            records = _srv_answer(answer)
        except socket.timeout:
            fault = f"lookup {name} on {address[0]}: i/o timeout"
        except OSError as error:
            fault = f"lookup {name} on {address[0]}: {_reason(error)}"
        except (IndexError, struct.error):
            fault = f"lookup {name} on {address[0]}: malformed answer"
        else:
            if not records:
                raise OSError(f"lookup {name}: no such host")
            return sorted(records, key=lambda r: (r.priority, -r.weight, r.target, r.port))
    raise OSError(fault)


def _srv_query(query_id: int, name: str) -> bytes:
    labels = [label.encode("idna") for label in name.rstrip(".").split(".")]
    question = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    return struct.pack(">6H", query_id, 0x0100, 1, 0, 0, 0) + question + struct.pack(">2H", 33, 1)


def _ask_udp(address: Tuple[str, int], query: bytes) -> bytes:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)           # the kernel drops datagrams from other addresses
        sock.send(query)
        deadline = time.monotonic() + DNS_ANSWER_SECONDS
        while True:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            answer = sock.recv(DNS_MESSAGE_BYTES_MAX)
            if len(answer) >= 12 and answer[:2] == query[:2] and answer[2] & 0x80:
                return answer


def _ask_tcp(address: Tuple[str, int], query: bytes) -> bytes:
    with socket.create_connection(address, DNS_ANSWER_SECONDS) as sock, sock.makefile("rb") as file:
        sock.sendall(struct.pack(">H", len(query)) + query)
        (size,) = struct.unpack(">H", file.read(2))
        return file.read(size)


def _srv_answer(message: bytes) -> List[SrvRecord]:
    """Return the SRV records; [] for an unknown name.  Raises OSError, IndexError, struct.error."""
    code = message[3] & 15
    questions, answers = struct.unpack_from(">2H", message, 4)
    if code not in (0, 3):              # 3: the name does not exist
        words = {2: "server misbehaving", 5: "query refused"}
        raise OSError(words.get(code, f"DNS error {code}"))
    offset = 12
    for _ in range(questions):
        offset = _dns_name(message, offset)[1] + 4
    records: List[SrvRecord] = []
    for _ in range(answers):
        offset = _dns_name(message, offset)[1]
        kind, size = struct.unpack_from(">H6xH", message, offset)
        offset += 10
        if kind == 33:
            priority, weight, port = struct.unpack_from(">3H", message, offset)
            target = _dns_name(message, offset + 6)[0]
            records.append(SrvRecord(priority, weight, port, target))
        offset += size
    return records


def _dns_name(message: bytes, offset: int) -> Tuple[str, int]:
    """Return (name without the final dot, offset behind it); compressed names are followed."""
    labels: List[str] = []
    behind = 0
    for _ in range(128):                # more labels or pointers: a loop, not a name
        size = message[offset]
        if size >= 192:
            behind = behind or offset + 2
            offset = (size & 63) << 8 | message[offset + 1]
            continue
        if not size:
            return ".".join(labels), behind or offset + 1
        labels.append(message[offset + 1:offset + 1 + size].decode("latin-1"))
        offset += 1 + size
    raise IndexError(offset)
