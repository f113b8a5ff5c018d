"""Histories: could one register at one place have answered like this?"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.histories import Operation, _is_explained_by_some_order, find_violation


@given(st.lists(st.tuples(
    st.integers(0, 6), st.integers(0, 4), st.booleans(), st.sampled_from(["read", "write", "swap"]),
    st.integers(0, 4), st.integers(0, 4), st.booleans(),
), max_size=5))
def test_history_checker_agrees_with_trying_every_order(drawn):
    """Any small history: the checker says what its definition says."""
    operations = []
    for number, (called, lasts, is_lost, verb, seen, old, ok) in enumerate(drawn):
        is_lost = is_lost and verb != "read"
        returned = math.inf if is_lost else called + lasts + 0.5
        new = f"v{number}" if verb != "read" else f"v{seen}" if seen < 4 else None
        operations.append(Operation(
            called + number / 100, returned + number / 100, verb, new,
            f"v{old}" if verb == "swap" else None, ok or is_lost))
    violation = find_violation(operations)
    assert (violation is None) == _is_explained_by_some_order(operations)


@pytest.mark.parametrize("operations, is_possible", [
    ([Operation(0, 1, "write", "a"), Operation(2, 3, "read", "a")], True),
    ([Operation(0, 1, "write", "a"), Operation(2, 3, "read", None)], False),
    ([Operation(0, 3, "write", "a"), Operation(1, 2, "read", "a"),
      Operation(2.1, 2.2, "read", None)], False),
    ([Operation(0, math.inf, "write", "a"), Operation(1, 2, "read", None),
      Operation(3, 4, "read", "a")], True),
    ([Operation(0, 1, "write", "a"), Operation(2, 3, "swap", "b", "a"),
      Operation(2, 3, "swap", "c", "a")], False),
    ([Operation(0, 1, "write", "a"), Operation(2, math.inf, "swap", "b", "a"),
      Operation(2, 3, "swap", "c", "a", ok=False), Operation(4, 5, "read", "b")], True),
], ids=["read-own", "stale", "back-in-time", "late-effect", "two-winners", "lost-winner"])
def test_history_checker_on_known_histories(operations, is_possible):
    """What a register can do, and what it never does."""
    assert (find_violation(operations) is None) == is_possible
