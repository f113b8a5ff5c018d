"""The machines of fleet, which every fleetd keeps in etcd, with 30 s to live.

Source: fleet 0.11, registry/machine.go and fleetctl list-machines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from ..transport.errors import KeyNotFound
from ..transport.results import Node
from .output import _escape
from .program import _command, _Flag, _Run

_FLEET_MACHINES = "/_coreos.com/fleet/machines"
_SHORT_ID_LENGTH = 8
_TAB_WIDTH = 8              # of the tabs between the columns of fleetctl, which are spaces here


@_command("machines", "", "list the machines that fleet has registered, as fleetctl list-machines",
          _Flag(("full", "l"), bool, "with whole machine ids"),
          _Flag(("no-legend",), bool, "without the headings"), own=True)
def _cmd_machines(run: _Run) -> None:
    rows = [] if run.options.on("no-legend") else [("MACHINE", "IP", "METADATA")]
    try:
        listing = run.client.get(_FLEET_MACHINES, recursive=True, sorted=True).node
    except KeyNotFound:
        pass                            # no fleetd has ever run
    else:
        rows += _machine_rows(listing, full=run.options.on("full"))
    widths = [(max(map(len, column)) // _TAB_WIDTH + 1) * _TAB_WIDTH for column in zip(*rows)]
    for machine, ip, metadata in rows:
        line = f"{machine:{widths[0]}}{ip:{widths[1]}}{metadata}"
        print(line.encode("utf-8", "replace").decode())


def _machine_rows(listing: Node, *, full: bool) -> Iterator[tuple[str, str, str]]:
    """Yield id, address and metadata of each machine; report malformed ones on stderr."""
    for directory in listing.nodes:
        for node in directory.nodes:
            if not node.key.endswith("/object"):
                continue
            try:
                state = json.loads(node.value or "")
                id = _escape(state.get("ID") or directory.key.rpartition("/")[2])
                pairs = sorted((state.get("Metadata") or {}).items())
                metadata = _escape(",".join(f"{name}={value}" for name, value in pairs))
                address = _escape(state.get("PublicIP") or "-")
            except (ValueError, TypeError, AttributeError, LookupError):
                print(f"pyetcdctl: {_escape(node.key)} is no machine of fleet", file=sys.stderr)
                continue
            yield id if full else id[:_SHORT_ID_LENGTH] + "...", address, metadata or "-"
