"""What the sessions of a run have taken: one that was stopped and gone on with has several, and its figures are of all.

RUN/sessions.json    one entry a session: when it began, seconds by phase, tokens generated
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from deploy.config.config_errors import ConfigError
from deploy.config.timestamps import timestamp
from rollout.wire.whole_file import replace_file

FILE = "sessions.json"
OLD_FILE = "sittings.json"  # its name in runs of before 0.3


class Session(BaseModel):
    """From a start of the driver to its end, or as far as was recorded of it."""

    began: str = Field(default_factory=timestamp)
    seconds: dict[str, float] = {}
    tokens_generated: int = 0


_LIST = TypeAdapter(list[Session])


class Sessions:
    """Those of the past, and the present one, which is written again whenever it is recorded."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._all = [*past_sessions(folder), Session()]

    def record(self, seconds: Mapping[str, float], tokens_generated: int) -> None:
        """Store what the present session has taken up to now, in place of what it had before.

        A disk that is full keeps the older record: a run does not end for that.
        """
        rounded = {phase: round(value, 2) for phase, value in seconds.items()}
        present = self._all[-1].model_copy(update={"seconds": rounded, "tokens_generated": tokens_generated})
        self._all[-1] = present
        with suppress(OSError):
            replace_file(self._file, _LIST.dump_json(self._all, indent=1))

    def totals(self) -> dict[str, Any]:
        """Of all sessions: their number, seconds by phase and tokens generated."""
        seconds: Counter[str] = Counter()
        for session in self._all:
            seconds.update(session.seconds)
        return {
            "sessions": len(self._all),
            "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
            "tokens_generated": sum(session.tokens_generated for session in self._all),
        }


def past_sessions(folder: Path) -> list[Session]:
    """The sessions of a run, oldest first; the last one may be under way."""
    return _read(folder / FILE) or _read(folder / OLD_FILE)


def _read(file: Path) -> list[Session]:
    if not file.is_file():
        return []
    try:
        return _LIST.validate_json(file.read_bytes())
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{file}: broken file ({reason}); remove it, and its figures begin anew") from error
