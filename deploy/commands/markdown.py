"""Markdown that GitHub and the site both show alike: headings with anchors, tables, text of the code as prose."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

GENERATED = (
    "*This page is generated from the code by `manta docs`. To change a text, change it in the code.*\n\n"
)


def anchor(heading: str) -> str:
    """Return the id of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def link(text: str, heading: str) -> str:
    """Return a link to a heading of the same page."""
    return f"[{text}](#{anchor(heading)})"


def code(text: str) -> str:
    """Return inline code; as HTML where the text has a bar, which would end a cell of a table."""
    if "|" in text or "`" in text:
        return f"<code>{escape(text, quote=False).replace('|', '&#124;')}</code>"
    return f"`{text}`"


def prose(text: str) -> str:
    """Return a text of the code as Markdown of one line: text between backticks is code, all else is escaped."""
    parts = " ".join(text.split()).split("`")
    return "".join(code(part) if place % 2 else _plain(part) for place, part in enumerate(parts))


def _plain(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return text.replace("*", r"\*")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; its cells are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def sentence(text: str) -> str:
    """Return the text with a capital letter at its beginning and a full stop at its end."""
    whole = text[:1].upper() + text[1:]
    return whole if whole.endswith((".", "!", "?")) or not whole else f"{whole}."
