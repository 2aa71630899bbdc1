"""Markdown that GitHub and the site both show alike: headings with anchors, tables, text of the code as prose."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

GENERATED = (
    "*This page is generated from the code by `manta docs`. To change a text, change it in the code.*\n\n"
)


def anchor(heading: str) -> str:
    """The id that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def link(text: str, heading: str) -> str:
    """A link to a heading of the same page."""
    return f"[{text}](#{anchor(heading)})"


def code(text: str) -> str:
    """Code in a line; where it has a bar, which would end a table's cell, as HTML."""
    if "|" in text or "`" in text:
        return f"<code>{escape(text, quote=False).replace('|', '&#124;')}</code>"
    return f"`{text}`"


def prose(text: str) -> str:
    """A text of the code in one line: what stands between backticks is code, and no other character is markup."""
    parts = " ".join(text.split()).split("`")
    return "".join(code(part) if place % 2 else _plain(part) for place, part in enumerate(parts))


def _plain(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return text.replace("*", r"\*")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; cells are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def sentence(text: str) -> str:
    """The text with a capital at its beginning and a full stop at its end."""
    whole = text[:1].upper() + text[1:]
    return whole if whole.endswith((".", "!", "?")) or not whole else f"{whole}."
