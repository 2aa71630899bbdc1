"""What modules of transformers' models are called, in every family: layers, and the experts in them."""

from __future__ import annotations

import re

_LAYER = re.compile(r".*\blayers\.(\d+)\b")


def layer_number(name: str) -> int | None:
    """The number of the layer that a module or parameter with this dotted name belongs to; None: to none."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def names_experts(name: str) -> bool:
    """Whether this is the dotted name of a layer's experts."""
    return name.rpartition(".")[2] == "experts"
