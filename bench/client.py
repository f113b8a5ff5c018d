#!/usr/bin/env python3
"""Measure pyetcd_client beside a bare requests.Session and python-etcd, on one server, in one run.

    python bench/client.py                      # table on the terminal, about 20 seconds
    python bench/client.py --write              # and bench/CLIENT.md
    python bench/client.py --server etcd --rounds 50

All send the same request and decode the JSON of the answer; the two clients also make their result
of it and check the cluster id.  In every round the clients take turns (in the opposite order next
time), one thread with one kept connection each.  What counts is the ratio of the medians: absolute
numbers drift with the machine.  A PUT waits for the disk, so its rate says less than the CPU time
that the client's process took for it.  Needs Linux, requests and python-etcd.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import etcd
import requests
import urllib3
from members import PLAIN_KEY, VALUE, Cluster, Peer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import pyetcd_client  # noqa: E402

SUBJECT, BARE, FAMILIAR = "pyetcd_client", "requests.Session", "python-etcd"
TARGETS = {BARE: 0.9, FAMILIAR: 1.0}            # our calls per second / theirs, at least
KEY = PLAIN_KEY[len("/v2/keys"):]

Action = Callable[[], Any]


class Sample(NamedTuple):
    """One client in one round."""

    rate: float                                 # calls per second
    cpu_us: float                               # of this process, per call


def actions(url: str, port: int) -> Dict[str, Dict[str, Action]]:
    """Return what is measured: {kind of request: {client: call}}."""
    ours = pyetcd_client.Client(url)
    session = requests.Session()
    theirs = etcd.Client(host="127.0.0.1", port=port)
    target, form = url + PLAIN_KEY, {"value": VALUE}
    return {
        "GET": {
            SUBJECT: lambda: ours.get(KEY),
            BARE: lambda: session.get(target).json(),
            FAMILIAR: lambda: theirs.read(KEY),
        },
        "PUT": {
            SUBJECT: lambda: ours.set(KEY, VALUE),
            BARE: lambda: session.put(target, data=form).json(),
            FAMILIAR: lambda: theirs.write(KEY, VALUE),
        },
    }


def measure(action: Action, seconds: float) -> Sample:
    """Call it again and again for some time."""
    action()                                    # the connection is there when we begin
    calls, began, cpu_began = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            action()
        calls += 10
    return Sample(calls / (time.perf_counter() - began),
                  (time.process_time() - cpu_began) / calls * 1e6)


def run_rounds(
    kinds: Dict[str, Dict[str, Action]], rounds: int, seconds: float,
) -> Dict[Tuple[str, str], Sample]:
    """Return the medians by (kind of request, client)."""
    samples: Dict[Tuple[str, str], List[Sample]] = {}
    for number in range(rounds):
        for kind, clients in kinds.items():
            for name in sorted(clients, reverse=bool(number % 2)):
                sample = measure(clients[name], seconds)
                samples.setdefault((kind, name), []).append(sample)
    return {key: Sample(*map(statistics.median, zip(*found))) for key, found in samples.items()}


def table(medians: Dict[Tuple[str, str], Sample]) -> Tuple[List[str], bool]:
    """Return the lines of a Markdown table, and whether every target is met."""
    lines = ["| request | client | calls/s | CPU per call | ours / this | target |  |",
             "|---|---|---:|---:|---:|---:|---|"]
    met = True
    for (kind, name), sample in sorted(medians.items(), key=lambda item: (item[0][0], -item[1][0])):
        ratio, target = medians[kind, SUBJECT].rate / sample.rate, TARGETS.get(name)
        verdict = "" if target is None else "met" if ratio >= target else "MISSED"
        met = met and verdict != "MISSED"
        wanted = "" if target is None else f">= {target}"
        lines.append(f"| {kind} | {name} | {sample.rate:,.0f} | {sample.cpu_us:,.0f} us "
                     f"| {ratio:.2f} | {wanted} | {verdict} |")
    return lines, met


def conditions(server: Peer, options: argparse.Namespace) -> str:
    """Say where and how this was measured."""
    return (
        f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.system()} "
        f"{platform.release()}, CPython {platform.python_version()}, requests "
        f"{requests.__version__}, urllib3 {urllib3.__version__}; one member of {server.name}, "
        f"64-byte value; medians of {options.rounds} rounds of {options.seconds:g} s in "
        f"alternating order; one thread.")


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.1,
                        help="length of one sample (default: %(default)s)")
    parser.add_argument("--server", choices=("pyetcd", "etcd"), default="pyetcd",
                        help="who answers (default: %(default)s)")
    parser.add_argument("--dir", default=None, help="where its data go (default: a temporary one)")
    parser.add_argument("--write", action="store_true", help="write bench/CLIENT.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run it; 0 if every target is met, 2 otherwise."""
    options = parse_options(argv)
    command = ("etcd", "--enable-v2") if options.server == "etcd" else (
        sys.executable, str(HERE.parent / "pyetcd.py"))
    server = Peer(options.server, command, "")
    with tempfile.TemporaryDirectory(prefix="pyetcd-bench-", dir=options.dir) as name:
        cluster = Cluster(server, Path(name), 1)
        try:
            cluster.start()
            port = cluster.members[0].client_port
            kinds = actions(f"http://127.0.0.1:{port}", port)
            lines, met = table(run_rounds(kinds, options.rounds, options.seconds))
        finally:
            cluster.stop()
    page = ["# The client's own cost", "", "Written by `python bench/client.py --write`.", "",
            *textwrap.wrap(conditions(server, options), 112), "", *lines, ""]
    print("\n".join(page))
    if options.write:
        (HERE / "CLIENT.md").write_text("\n".join(page), encoding="utf-8")
    return 0 if met else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
