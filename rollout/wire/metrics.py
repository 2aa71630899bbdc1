"""Rows of metrics: numbers by name, joined into one row a step."""

from __future__ import annotations

from collections.abc import Mapping


def joined(*rows: Mapping[str, float]) -> dict[str, float]:
    """Join several rows. ValueError for a name that two of them have: one value would overwrite the other."""
    found: dict[str, float] = {}
    for row in rows:
        if twice := sorted(found.keys() & row.keys()):
            raise ValueError(
                f"two parts of a row of metrics have the name {', '.join(map(repr, twice))}; let each name say what it "
                "counts"
            )
        found |= row
    return found
