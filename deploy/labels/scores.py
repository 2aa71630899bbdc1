"""Scores of episodes, in a file of JSON lines, by which the most uncertain pair is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from deploy.config.config_errors import ConfigError
from deploy.labels.asking import Pair, uncertainty
from rollout.wire.whole_file import replace_file

Key = tuple[int, int, int]  # group, attempt and place of an episode
_FORM = '{"group_id": 0, "episode": 0, "score": 0.5}'


class Score(BaseModel, extra="ignore", frozen=True):
    """One line: an episode, and what a judge, or each of several, thinks of it."""

    group_id: int
    episode: int  # place in its group
    attempt: int = 0
    score: float | tuple[float, ...]

    @property
    def scores_E(self) -> tuple[float, ...]:
        return (self.score,) if isinstance(self.score, float) else self.score


class ScoreFile:
    """The scores in a file, which are read again when the file has been replaced.

    A file that does not exist yet has no scores.
    """

    def __init__(self, path: Path) -> None:
        """ConfigError as of `refresh`."""
        self._path = path
        self._state: tuple[int, ...] | None = None
        self._scores: Mapping[Key, tuple[float, ...]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the file if it has changed.

        ConfigError, one line, for a file that cannot be read and for a line that holds no score; the scores are then
        those of before.
        """
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return
        state = (found.st_ino, found.st_mtime_ns, found.st_size)
        if state != self._state:
            self._scores = _read(self._path)
            self._state = state

    def __len__(self) -> int:
        """How many episodes have scores."""
        return len(self._scores)

    def worth(self, pair: Pair) -> float:
        """The worth of asking a pair: how uncertain the scores of its episodes leave it; 0 where one has none."""
        first, second = (self._scores.get((*pair[:2], place)) for place in pair[2:])
        return uncertainty(first, second) if first and second else 0.0


def write_scores(path: Path, scores: Mapping[Key, Sequence[float]]) -> None:
    """Replace the file with these scores, of one judge or several each; readers find the old file or the new one."""
    rows = (
        Score(group_id=group, attempt=attempt, episode=place, score=tuple(scores_E))
        for (group, attempt, place), scores_E in scores.items()
    )
    replace_file(path, "".join(row.model_dump_json() + "\n" for row in rows))


def _read(path: Path) -> dict[Key, tuple[float, ...]]:
    scores: dict[Key, tuple[float, ...]] = {}
    judges: set[int] = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a file of JSON lines") from error
    for number, line in enumerate(lines, 1):
        try:
            score = Score.model_validate_json(line)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            raise ConfigError(f"{path}:{number}: {where} {fault['msg']}; write {_FORM}") from error
        scores[score.group_id, score.attempt, score.episode] = score.scores_E
        judges.add(len(score.scores_E))
    if len(judges) != 1 or judges == {0}:
        raise ConfigError(f"{path}: every line has the same number of scores, 1 or more; write {_FORM}")
    return scores
