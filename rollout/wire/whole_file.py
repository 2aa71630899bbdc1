"""Small files that are replaced whole: a reader finds the old content or the new, never a part."""

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
