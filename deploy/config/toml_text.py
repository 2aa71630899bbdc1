"""Write the options of a configuration as TOML text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date, time
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def toml_of(tree: Mapping[str, Any], section: str = "") -> str:
    """Nested tables as TOML, without None values. section: the dotted name of the table itself."""
    options = {
        name: value for name, value in tree.items() if value is not None and not isinstance(value, Mapping)
    }
    lines = [f"{key_text(name)} = {value_text(value)}\n" for name, value in options.items()]
    tables = {name: value for name, value in tree.items() if isinstance(value, Mapping)}
    text = "".join(lines)
    if section and (lines or not tables):
        text = f"\n[{section}]\n{text}"
    inside = f"{section}." if section else ""
    return text + "".join(toml_of(value, f"{inside}{key_text(name)}") for name, value in tables.items())


def value_text(value: Any) -> str:
    """One value as TOML, with tables inline."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Mapping):
        said = [f"{key_text(name)} = {value_text(each)}" for name, each in value.items() if each is not None]
        return f"{{ {', '.join(said)} }}" if said else "{}"
    return f"[{', '.join(map(value_text, value))}]"


def key_text(name: str) -> str:
    """A key as TOML, bare if possible."""
    return name if _BARE.fullmatch(name) else value_text(name)
