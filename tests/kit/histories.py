"""Histories: could one register at one place have answered like this?"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple, Optional


class Operation(NamedTuple):
    """What one client asked of one key, and was told; times by one clock.

    verb      "read" (`new` is what was seen; None: no key), "write" (`new`; None: delete) or
              "swap" (`old` to `new`; `ok` tells whether it compared equal)
    returned  math.inf if there was no answer: it may have happened, or may happen still
    """

    called: float
    returned: float
    verb: str
    new: Optional[str]
    old: Optional[str] = None
    ok: bool = True

    def after(self, state):
        """Return (state after it), or () if it cannot have been answered so at `state`."""
        if self.verb == "write":
            return (self.new,)
        if self.verb == "read":
            return (state,) if state == self.new else ()
        if self.ok:
            return (self.new,) if state == self.old else ()
        return (state,) if state != self.old else ()


def find_violation(operations):
    """Return the first operation that no order explains, or None: the history is linearizable.

    Between call and return each operation happens at one moment; those without an answer, later
    or never.  Values written are unique.  Walks through the calls and returns in time, with every
    (state, what of the open operations has happened, which unanswered ones) that is possible:
    the method of Wing and Gong, with Lowe's memory of what was seen.  An unanswered one is only
    assumed to have happened right before an operation that needs it; sooner would explain no more.
    Of several that would explain the same, the oldest.
    """
    observed = {op.new for op in operations if op.verb == "read"}
    observed |= {op.old for op in operations if op.verb == "swap"}
    effects = [
        (op.verb, op.old, op.new if op.new in observed else "?") for op in operations
    ]
    events = sorted(
        (time_s, is_return, number)
        for number, op in enumerate(operations)
        for is_return, time_s in enumerate((op.called, op.returned)) if time_s < math.inf
    )
    open_ones, unanswered = set(), set()
    possible = {(None, frozenset(), frozenset())}
    for _, is_return, number in events:
        if not is_return:
            (unanswered if operations[number].returned == math.inf else open_ones).add(number)
            continue
        possible = {
            (state, done - {number}, used)
            for state, done, used in _closure(
                operations, effects, possible, number, open_ones, unanswered)
        }
        open_ones.discard(number)
        if not possible:
            return operations[number]
    return None


def _closure(operations, effects, possible, number, open_ones, unanswered):
    """Yield every way to go on from `possible` so that operation `number` has happened."""
    todo, seen = list(possible), set(possible)
    while todo:
        state, done, used = todo.pop()
        if number in done:
            yield state, done, used
            continue
        for other in open_ones - done:
            for ahead, more in _ways(operations, effects, state, unanswered - used):
                for following in operations[other].after(ahead):
                    reached = (following, done | {other}, used | more)
                    if reached not in seen:
                        seen.add(reached)
                        todo.append(reached)
                if not more and operations[other].after(ahead):
                    break               # no need of the unanswered ones


def _ways(operations, effects, state, unanswered):
    """Yield (state, used) with none, one or a chain of unanswered operations before the next."""
    yield state, frozenset()
    oldest = {effects[number]: number for number in sorted(unanswered, reverse=True)}
    todo = [(state, frozenset())]
    while todo:
        state, used = todo.pop()
        for number in oldest.values():
            if number in used or (used and operations[number].verb == "write"):
                continue                # it would only hide what was used before it
            for following in operations[number].after(state):
                yield following, used | {number}
                todo.append((following, used | {number}))


def _is_explained_by_some_order(operations):
    """The plain meaning of linearizable, by trying every order: for small histories."""
    answered = [n for n, op in enumerate(operations) if op.returned < math.inf]
    others = [n for n, op in enumerate(operations) if op.returned == math.inf]
    return any(
        _is_explained_by(operations, order)
        for count in range(len(others) + 1)
        for chosen in itertools.combinations(others, count)
        for order in itertools.permutations(answered + list(chosen))
    )


def _is_explained_by(operations, order):
    state = None
    for place, number in enumerate(order):
        if any(operations[later].returned < operations[number].called for later in order[place:]):
            return False
        states = operations[number].after(state)
        if not states:
            return False
        state = states[0]
    return True
