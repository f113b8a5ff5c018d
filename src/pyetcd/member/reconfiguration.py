"""Reconfiguration: a member leaves, and the others keep a leader and a quorum."""

from __future__ import annotations

import contextlib
from typing import Callable, Collection, Iterable

from ..base.codec import decode_conf_change
from ..base.errors import CodecError, NotEnoughActive
from ..base.ids import package_logger
from ..base.messages import ConfChange, ConfChangeType, Entry, EntryType
from ..raft.core import RaftRole
from ..raft.node import RawNode
from .cluster import format_id


def check_active(
    change_type: ConfChangeType, id: int, own_id: int, members: Collection[int],
    active_since: Callable[[int], float],
) -> None:
    """Raise NotEnoughActive if a change leaves too few members that can be reached for a quorum.

    A member that is down may always be removed.  Source: etcd 3 server.go, mayRemoveMember.
    Differs from it: active now is enough, it needs no 5 s, and one more may be added while others
    are down if all that are up will be a quorum.
    """
    active = {member for member in members if member == own_id or active_since(member) > 0}
    if change_type == ConfChangeType.ADD_NODE:
        what, left, size = "adding", len(active), len(members) + 1
        is_risky = size > 2             # a cluster of one must be able to grow
    else:
        what, left, size = "removing", len(active) - 1, len(members) - 1
        is_risky = change_type == ConfChangeType.REMOVE_NODE and id in active
    if is_risky and left < size // 2 + 1:
        package_logger("etcdserver").warning(
            "not healthy for reconfigure: %s a member leaves %d of %d active", what, left, size
        )
        raise NotEnoughActive(what, left, size)


class LeadershipTransfer:
    """Gives the lead to the member that can take it over best.  Thread: reactor.

    Source: Raft thesis §3.10; etcd 3 server.go, TransferLeadership.
    """

    def __init__(self, node: RawNode, active_since: Callable[[int], float]) -> None:
        self._node = node
        self._active_since = active_since
        self._tried_term = 0            # in which we handed over because of a removal

    def begin(self, beyond: int = -1) -> int:
        """Start to hand over; return the id of the heir, 0 if there is none or we do not lead.

        Proposals are refused until the heir leads, or has not done so for an election timeout.

        beyond  the heir must have more of our log on its disk than this index
        """
        raft = self._node.raft
        heir = self._find_heir(beyond) if raft.role == RaftRole.LEADER else 0
        if heir:
            package_logger("etcdserver").info(
                "leadership transfer %s -> %s", format_id(raft.id), format_id(heir)
            )
            self._node.transfer_leader(heir)
        return heir

    def before(self, changes: Iterable[ConfChange]) -> None:
        """Hand over if one of `changes`, about to be proposed, removes us; once in a term.

        Who commits the own removal may be gone before the others hear that it is committed.  Of
        two members the second one then waits for ever for the vote of the first (thesis §4.2.2).
        If no other member takes over, the change has to be proposed here all the same.
        """
        raft = self._node.raft
        if raft.term != self._tried_term and any(
            change.type == ConfChangeType.REMOVE_NODE and change.node_id == raft.id
            for change in changes
        ) and self.begin():
            self._tried_term = raft.term

    def before_entries(self, entries: Iterable[Entry]) -> None:
        """The same for proposals that come from another member."""
        for entry in entries:
            if entry.type == EntryType.CONF_CHANGE:
                with contextlib.suppress(CodecError):
                    self.before((decode_conf_change(entry.data),))

    def _find_heir(self, beyond: int) -> int:
        """The member with the most of our log among those that can be reached; 0: none."""
        raft = self._node.raft
        reachable = [
            (progress.match_index, id) for id, progress in raft.progress.items()
            if id != raft.id and progress.match_index > beyond and self._active_since(id) > 0
        ]
        return max(reachable, default=(0, 0))[1]
