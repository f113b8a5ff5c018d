"""Metrics, samples, tables and plots."""

from __future__ import annotations

import json
import re
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union
from xml.sax.saxutils import escape

from foreign import ForeignPeer
from members import Peer

REFERENCE = "etcd"                      # ratios are value / value of this peer
SUBJECT = "pyetcd"
AnyPeer = Union[Peer, ForeignPeer]


class Metric(NamedTuple):
    """One number per round and peer.

    better        "higher" or "lower"
    ratio_target  wanted value / reference; None: no target
    limit         wanted absolute bound, upper or lower as `better` says; None: no bound
    """

    key: str
    title: str
    unit: str
    family: str
    better: str
    ratio_target: Optional[float] = None
    limit: Optional[float] = None

    def verdict(self, value: float, reference: Optional[float]) -> str:
        """Return "met", "MISSED" or "" (nothing to compare with)."""
        results = []
        if self.limit is not None:
            results.append(value <= self.limit if self.better == "lower" else value >= self.limit)
        if self.ratio_target is not None and reference:
            ratio = value / reference
            results.append(ratio >= self.ratio_target if self.better == "higher"
                           else ratio <= self.ratio_target)
        return "" if not results else "met" if all(results) else "MISSED"

    def target(self) -> str:
        """Spell the target out for the table."""
        parts = []
        sign = ">=" if self.better == "higher" else "<="
        if self.ratio_target is not None:
            parts.append(f"ratio {sign} {self.ratio_target:g}")
        if self.limit is not None:
            parts.append(f"{sign} {self.limit:g} {self.unit}")
        return ", ".join(parts)


class Results:
    """Samples by metric and peer; ratios are between medians.

    samples_path  gets every sample as a line of JSON, so that an interrupted run is not lost
    """

    def __init__(self, peers: Sequence[AnyPeer], samples_path: Optional[Path] = None) -> None:
        self.peers = tuple(peers)
        self.metrics: List[Metric] = []
        self.failures: List[str] = []
        self._samples: Dict[Tuple[str, str], List[float]] = {}
        self._path = samples_path

    def add(self, peer_name: str, values: Dict[str, float]) -> None:
        """Take in what one run of a case gave."""
        for key, value in values.items():
            self._samples.setdefault((key, peer_name), []).append(value)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps([peer_name, values]) + "\n")

    def load(self, path: Path) -> None:
        """Take in the samples of an earlier run."""
        for line in path.read_text(encoding="utf-8").splitlines():
            peer_name, values = json.loads(line)
            for key, value in values.items():
                self._samples.setdefault((key, peer_name), []).append(value)

    def count(self, metric: Metric, peer_name: str) -> int:
        """How many samples there are."""
        return len(self._samples.get((metric.key, peer_name), ()))

    def median(self, metric: Metric, peer_name: str) -> Optional[float]:
        """Median of a metric, or None if that peer did not run."""
        samples = self._samples.get((metric.key, peer_name))
        return statistics.median(samples) if samples else None

    def spread(self, metric: Metric, peer_name: str) -> str:
        """Smallest and largest sample."""
        samples = self._samples.get((metric.key, peer_name))
        return f"{number(min(samples))}-{number(max(samples))}" if samples else "-"

    def rows(self, names: Sequence[str] = ()) -> List[List[str]]:
        """The table: a head, then one row per metric; of all peers, or of those named."""
        names = names or [peer.name for peer in self.peers]
        rows = [["case", "unit", *names, "ratio", "target", ""]]
        for metric in self.metrics:
            subject, reference = (self.median(metric, name) for name in (SUBJECT, REFERENCE))
            ratio = f"{subject / reference:.2f}" if subject and reference else "-"
            verdict = "" if subject is None else metric.verdict(subject, reference)
            rows.append([metric.title, metric.unit, *self._medians(metric, names),
                         ratio, metric.target(), verdict])
        return rows

    def foreign_rows(self, names: Sequence[str]) -> List[List[str]]:
        """Where one of `names` ran: its median beside the subject's."""
        return [["case", "unit", SUBJECT, *names],
                *([metric.title, metric.unit, *self._medians(metric, [SUBJECT, *names])]
                  for metric in self.metrics if any(self.count(metric, name) for name in names))]

    def spread_rows(self, names: Sequence[str]) -> List[List[str]]:
        """Smallest and largest sample where one of `names` ran."""
        return [["case", *names],
                *([f"{metric.title} ({metric.unit}), {self.count(metric, SUBJECT)} rounds",
                   *(self.spread(metric, name) for name in names)]
                  for metric in self.metrics if any(self.count(metric, name) for name in names))]

    def _medians(self, metric: Metric, names: Sequence[str]) -> List[str]:
        values = [self.median(metric, name) for name in names]
        return ["-" if value is None else number(value) for value in values]


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns for a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                               for column, (cell, width) in enumerate(zip(row, widths))).rstrip()
                     for row in rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The same table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" + "|---:" * (len(rows[0]) - 1) + "|")
    return "\n".join(lines)


REASONS = "## Missed, and why"          # a chapter written by hand: the next page keeps it
COLUMNS = 112                           # of its text; with all peers in one table, rows have more


def wrapped(text: str) -> str:
    """Fold a paragraph or an item of a list."""
    return textwrap.fill(text, COLUMNS, subsequent_indent="  " if text.startswith("- ") else "",
                         break_long_words=False, break_on_hyphens=False)


def results_page(
    results: Results, notes: Sequence[str], plots: Sequence[str], reasons: str = ""
) -> str:
    """Contents of RESULTS.md.

    reasons  the chapter REASONS of the page before, "" if there is none
    """
    ours = [peer.name for peer in results.peers if peer.name in (SUBJECT, REFERENCE)]
    others = [peer.name for peer in results.peers if peer.name not in ours]
    parts = [
        "# pyetcd beside etcd", "Written by `python bench/bench.py --write`.",
        *map(wrapped, notes), f"`ratio` is {SUBJECT} / {REFERENCE}.",
        markdown_table(results.rows(ours)),
        *([reasons.rstrip()] if reasons else []),
        *(["## Beside other systems", markdown_table(results.foreign_rows(others))]
          if others else []),
        "## What each of them guarantees",
        "\n".join(map(wrapped, guarantees(results, "- ").splitlines())),
        *(["## What could not be measured",
           "\n".join(wrapped(f"- {text}") for text in results.failures)]
          if results.failures else []),
        "## Smallest and largest round", markdown_table(results.spread_rows(ours)),
        *([markdown_table(results.spread_rows(others))] if others else []),
        "## Plots", *(f"![{name}]({name})" for name in plots)]
    return "\n\n".join(parts) + "\n"


def reasons_of(page: Path) -> str:
    """The chapter REASONS of a page, or ""."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    found = re.search(rf"^{REASONS}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[0] if found else ""


def guarantees(results: Results, mark: str = "") -> str:
    """One line per peer: what it is, and what an acknowledged write means."""
    return "\n".join(f"{mark}{peer.name} ({peer.version()}): {peer.guarantee}"
                     for peer in results.peers)


# --- plots ----------------------------------------------------------------------------------------

COLOURS = ("#3366aa", "#bbbbbb", "#cc8844", "#669966", "#aa5577", "#888833")
BAR_HEIGHT, BAR_GAP, GROUP_GAP, TEXT_WIDTH, BAR_WIDTH = 18, 3, 30, 90, 430


def plot(results: Results, family: str) -> str:
    """One SVG of a family: a group of bars per metric, each group on its own scale."""
    shapes: List[str] = []
    y = 10
    for metric in (metric for metric in results.metrics if metric.family == family):
        title = f"{metric.title} ({metric.unit}, {metric.better} is better)"
        shapes.append(f'<text x="10" y="{y + 12}" font-weight="bold">{escape(title)}</text>')
        y += 20
        medians = [results.median(metric, peer.name) or 0.0 for peer in results.peers]
        for position, (peer, value) in enumerate(zip(results.peers, medians)):
            width = BAR_WIDTH * value / (max(medians) or 1.0)
            shapes.append(
                f'<text x="10" y="{y + 13}">{escape(peer.name)}</text>'
                f'<rect x="{TEXT_WIDTH}" y="{y}" width="{width:.1f}" height="{BAR_HEIGHT}" '
                f'fill="{COLOURS[position % len(COLOURS)]}"/>'
                f'<text x="{TEXT_WIDTH + width + 6:.1f}" y="{y + 13}">{number(value)}</text>')
            y += BAR_HEIGHT + BAR_GAP
        y += GROUP_GAP - BAR_GAP
    total_width = TEXT_WIDTH + BAR_WIDTH + 90
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {y}" '
            f'width="{total_width}" height="{y}" font-family="sans-serif" font-size="12">\n'
            f'<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(shapes)
            + "\n</svg>\n")


def write_results(results: Results, notes: Sequence[str], directory: Path) -> None:
    """Write RESULTS.md and one SVG per family into a directory."""
    plots = []
    for family in dict.fromkeys(metric.family for metric in results.metrics):
        name = f"results-{family}.svg"
        (directory / name).write_text(plot(results, family), encoding="utf-8")
        plots.append(name)
    page = directory / "RESULTS.md"
    page.write_text(results_page(results, notes, plots, reasons_of(page)), encoding="utf-8")
    print(f"wrote {page} and {', '.join(plots)}", file=sys.stderr)


