"""The door for peers: what would harm this member when it is applied is refused."""

from __future__ import annotations

from typing import Callable, Generator

from ..base.codec import STEP_BYTES, STEP_ENTRIES
from ..base.errors import CodecError
from ..base.limits import SERVER_VERSION
from ..base.messages import Message, MsgType
from ..peer.transport import MessageInspector
from ..store.tree import StoreState
from .applier import check_entry, check_proposal
from .cluster import Cluster, version_key


class MemberInspector(MessageInspector):
    """Where a message ends that would be fatal when it is applied, or make our log unreadable."""

    def __init__(self, cluster: Cluster, fault: Callable[[Message], str]) -> None:
        self._cluster = cluster
        self._fault = fault             # of Raft's rules alone

    def inspect(self, message: Message) -> Generator[None, None, str]:
        """Say, in steps, why `message` must not be stepped; "": it may."""
        if message.type == MsgType.PROP and message.sender not in self._cluster.members:
            return "its sender is no member, and may propose nothing"
        if message.type == MsgType.SNAP and not (message.snapshot and message.snapshot.state):
            return "nobody has read the snapshot in it"
        fault, work = self._fault(message), 0
        if fault or message.type not in (MsgType.APP, MsgType.PROP):
            return fault
        for entry in message.entries:
            try:
                check_entry(entry)
                if message.type == MsgType.PROP:
                    check_proposal(entry)
            except CodecError as error:
                return str(error)
            work += STEP_BYTES // STEP_ENTRIES + len(entry.data)
            if work > STEP_BYTES:
                work = 0
                yield
        return ""

    def read_state(self, data: bytes) -> StoreState:
        """Return the state in a snapshot.  Raises ValueError if we cannot become it."""
        state = StoreState.read(data)
        if state.version and version_key(state.version) > version_key(SERVER_VERSION):
            raise ValueError(f"cluster version {state.version} is newer than this program")
        return state
