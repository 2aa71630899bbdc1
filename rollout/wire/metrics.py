"""Metrics: declarations of what is counted, and rows of numbers by name, joined into one row a step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# What a declared name leaves open, as a pattern.
_OPEN = {
    "{K}": r"\d+",
    "{LAG}": r"\d+",
    "{NAME}": r".+",
    "{REASON}": r"[a-z_]+",
    "{SUITE}": r"[A-Za-z0-9][A-Za-z0-9_.-]*",
}


@dataclass(frozen=True, slots=True)
class Metric:
    """A declared metric. In its name {K}, {LAG}, {NAME}, {REASON} or {SUITE} is left open: it stands for several."""

    name: str
    unit: str
    about: str  # what it counts, over what
    when: str = ""  # the condition for a row to have it; empty: every row does

    @property
    def is_open(self) -> bool:
        return "{" in self.name

    def covers(self, name: str) -> bool:
        """Whether this declares the metric of that name."""
        pattern = re.escape(self.name)
        for part, values in _OPEN.items():
            pattern = pattern.replace(re.escape(part), values)
        return re.fullmatch(pattern, name) is not None


@dataclass(frozen=True, slots=True)
class MetricGroup:
    """Metrics that one part of a run writes."""

    title: str
    writer: str  # the file that computes them
    about: str
    metrics: tuple[Metric, ...]


Row = dict[str, float]


def joined(*rows: Mapping[str, float]) -> Row:
    """Join several rows. ValueError for a name that two of them have: one value would overwrite the other."""
    found: Row = {}
    for row in rows:
        if twice := sorted(found.keys() & row.keys()):
            raise ValueError(
                f"two parts of a row of metrics have the name {', '.join(map(repr, twice))}; let each name say what it "
                "counts"
            )
        found |= row
    return found
