"""An error of a user's own code in one line: the error, and the lines of that code by which it came about.

    KeyError('north') (maze.py:12 in step, maze.py:30 in _turn)

An environment, a reward, a tool or a program is anybody's code. What Manta, the standard library and installed packages
did in between helps nobody to mend it; the full traceback is for logs.
"""

from __future__ import annotations

import os
import reprlib
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

from envs.standing import is_library

_MOST_FRAMES = 3  # the innermost
_MANTA = tuple(
    str(Path(__file__).parents[1] / name) + os.sep for name in ("envs", "rollout", "learner", "deploy")
)
_INSTALLED = tuple({sysconfig.get_paths()[name] + os.sep for name in ("purelib", "platlib")})
_SHORT = reprlib.Repr()  # an error's own __repr__ may raise, or never end
_SHORT.maxother = 1000  # characters

Frame = tuple[str, int, str]  # file, line, function


def told(error: BaseException) -> str:
    """The error's repr, and in brackets where it came from, the innermost line last.

    Where the user's own code took no part, the innermost line of the installed packages that did.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}({error.msg!r}) ({_short(error.filename)}:{error.lineno})"
    return _SHORT.repr(error) + (came_from(error) or _bracketed(_lines(_foreign(error)[-1:])))


def came_from(error: BaseException) -> str:
    """`own_lines` in brackets behind a space; empty where there are none."""
    return _bracketed(own_lines(error))


def own_lines(error: BaseException) -> str:
    """The lines of the user's own code, the innermost last; empty where it took no part."""
    return _lines([frame for frame in _foreign(error) if not _is_installed(frame[0])])


def _lines(frames: Sequence[Frame]) -> str:
    lines = dict.fromkeys(f"{_short(file)}:{line} in {function}" for file, line, function in frames)
    return ", ".join(list(lines)[-_MOST_FRAMES:])


def _bracketed(lines: str) -> str:
    return f" ({lines})" if lines else ""


def _foreign(error: BaseException) -> list[Frame]:
    """The traceback without Manta and the standard library, the innermost line last."""
    frames = [
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    return [frame for frame in frames if not (is_library(frame[0]) or frame[0].startswith(_MANTA))]


def _is_installed(path: str) -> bool:
    return path.startswith(_INSTALLED) or not {"site-packages", "dist-packages"}.isdisjoint(Path(path).parts)


def _short(path: str) -> str:
    """A path below the current folder as it is named from there; of others the last two parts."""
    here = os.getcwd() + os.sep
    return path[len(here) :] if path.startswith(here) else str(Path(*Path(path).parts[-2:]))
