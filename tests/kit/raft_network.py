"""Raft by the paper: one test per rule."""

from __future__ import annotations

import random
from typing import Any, List, Optional, Sequence

import pyetcd
from pyetcd import (
    ConfChange,
    ConfChangeType,
    Entry,
    EntryType,
    HardState,
    RaftConfig,
    RawNode,
    Snapshot,
)
from tests.kit.raft_log import _raft_entries


def _raft_config(member: int, trace: Optional[List[str]] = None, **options: Any) -> RaftConfig:
    lines: List[str] = [] if trace is None else trace
    return RaftConfig(id=member, rng=random.Random(member), trace=lines.append, **options)


def _raft_node(
    member: int = 1, voters: Sequence[int] = (1, 2, 3), terms: Sequence[int] = (), *,
    term: Optional[int] = None, vote: int = 0, commit: int = 0, **options: Any,
) -> RawNode:
    """A restarted member whose log holds entries of `terms`, all durable."""
    return RawNode(
        _raft_config(member, **options),
        hard_state=HardState(max([0, *terms]) if term is None else term, vote, commit),
        snapshot=Snapshot(voters=tuple(voters)), entries=_raft_entries(terms),
    )


def _raft_conf_entry(index: int, member: int) -> Entry:
    data = pyetcd.encode_conf_change(ConfChange(0, ConfChangeType.ADD_NODE, member, b"{}"))
    return Entry(EntryType.CONF_CHANGE, 1, index, data)


# --- membership ---------------------------------------------------------------


def _raft_change(kind: ConfChangeType, member: int) -> ConfChange:
    return ConfChange(1, kind, member, None)
