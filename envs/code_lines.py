"""Lines of user code: those that an error came through, and the one that a thread is executing.

    KeyError('north') (maze.py:12 in step, maze.py:30 in _turn)

Environments, rewards, tools and programs are user code. The frames of Manta, the standard library and installed
packages do not help to fix them; full tracebacks belong in logs.
"""

from __future__ import annotations

import os
import reprlib
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

_MAX_FRAMES = 3  # the innermost ones
_PACKAGE_ROOT = Path(__file__).parents[1]
_MANTA = tuple(str(_PACKAGE_ROOT / name) + os.sep for name in ("envs", "rollout", "learner", "deploy"))
_STDLIB = sysconfig.get_paths()["stdlib"]
_INSTALLED = tuple({sysconfig.get_paths()[name] + os.sep for name in ("purelib", "platlib")})
_SHORT = reprlib.Repr()  # an error's own __repr__ may raise or never return
_SHORT.maxother = 1000  # characters

Frame = tuple[str, int, str]  # file, line, function


def describe_error(error: BaseException) -> str:
    """The repr of an error, followed by the lines of user code it came through, innermost last, in parentheses.

    If no user code took part, the innermost line of an installed package is named instead.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}({error.msg!r}) ({_short_path(error.filename)}:{error.lineno})"
    return _SHORT.repr(error) + (user_lines_suffix(error) or _brackets(_format(_foreign_frames(error)[-1:])))


def user_lines_suffix(error: BaseException) -> str:
    """`user_lines` in parentheses after a space; empty if there are none."""
    return _brackets(user_lines(error))


def user_lines(error: BaseException) -> str:
    """The lines of user code that an error came through, innermost last; empty if no user code took part."""
    return _format([frame for frame in _foreign_frames(error) if not _is_installed(frame[0])])


def executing_line(thread: int | None) -> str:
    """The innermost line of a thread outside the standard library: "step (games/maze.py:33)"."""
    frame = None if thread is None else sys._current_frames().get(thread)
    if frame is None:
        return "a thread that has ended"
    inner: FrameType | None = frame
    while inner is not None and _is_stdlib(inner.f_code.co_filename):
        inner = inner.f_back
    shown = frame if inner is None else inner
    return f"{shown.f_code.co_qualname} ({shown.f_code.co_filename}:{shown.f_lineno})"


def _format(frames: Sequence[Frame]) -> str:
    lines = dict.fromkeys(f"{_short_path(file)}:{line} in {function}" for file, line, function in frames)
    return ", ".join(list(lines)[-_MAX_FRAMES:])


def _brackets(lines: str) -> str:
    return f" ({lines})" if lines else ""


def _foreign_frames(error: BaseException) -> list[Frame]:
    """The traceback without frames of Manta and the standard library, innermost last."""
    frames = [
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    return [frame for frame in frames if not (_is_stdlib(frame[0]) or frame[0].startswith(_MANTA))]


def _is_stdlib(path: str) -> bool:
    """Whether a code file belongs to the standard library, or is no file at all (frozen, a string)."""
    return path.startswith("<") or (path.startswith(_STDLIB) and not path.startswith(_INSTALLED))


def _is_installed(path: str) -> bool:
    return path.startswith(_INSTALLED) or not {"site-packages", "dist-packages"}.isdisjoint(Path(path).parts)


def _short_path(path: str) -> str:
    """A path relative to the current folder if it lies below it, else its last two parts."""
    here = os.getcwd() + os.sep
    return path[len(here) :] if path.startswith(here) else str(Path(*Path(path).parts[-2:]))
