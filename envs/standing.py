"""Where a thread stands: the line of code that it is executing."""

from __future__ import annotations

import sys
import sysconfig
from types import FrameType

_LIBRARY = sysconfig.get_paths()["stdlib"]
_PACKAGES = tuple({sysconfig.get_paths()[name] for name in ("purelib", "platlib")})


def stands_in(thread: int | None) -> str:
    """The innermost line of a thread that is no line of the standard library: "step (games/maze.py:33)"."""
    frame = None if thread is None else sys._current_frames().get(thread)
    if frame is None:
        return "a thread that has ended"
    inner: FrameType | None = frame
    while inner is not None and is_library(inner.f_code.co_filename):
        inner = inner.f_back
    told = frame if inner is None else inner
    return f"{told.f_code.co_qualname} ({told.f_code.co_filename}:{told.f_lineno})"


def is_library(path: str) -> bool:
    """Whether a file of code is one of the standard library, or none (frozen, a text)."""
    return path.startswith("<") or (path.startswith(_LIBRARY) and not path.startswith(_PACKAGES))
