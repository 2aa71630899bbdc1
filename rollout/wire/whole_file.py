"""Small files that are replaced whole: a reader finds the old content or the new, never a part; what is durable."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: str | bytes, several: bool = False) -> None:
    """Replace a file's content, which is not synced to disk.

    several: processes may do so at once; the content of one of them stays. What a killed process leaves beside the
    file is named after the process then, and otherwise overwritten by the next call.
    """
    writer = f".{os.getpid()}" if several else ""
    aside = path.with_name(f".{path.name}{writer}.part")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    aside.replace(path)


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, survive a crash of the machine: neither keeps the other."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
