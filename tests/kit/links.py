"""Peer transport: frames, refusals, and two members on loopback."""

from __future__ import annotations

from typing import Any

import pyetcd
from pyetcd import Entry, Request


def _door_entry(*, type: int = 0, **fields: Any) -> Entry:
    request = Request(**{"id": 7, "method": "PUT", "path": "/1/k", "val": "v", **fields})
    return Entry(type, data=pyetcd.encode_request(request))


def _door_change(type: int = 0, node_id: int = 9, context: Any = None) -> Entry:
    context = b'{"id":9,"peerURLs":["http://127.0.0.1:9"]}' if context is None else context
    change = pyetcd.ConfChange(1, type, node_id, context)
    return Entry(1, data=pyetcd.encode_conf_change(change))
