"""Scores of episodes, from a file of JSON lines, by which the most uncertain pair is asked."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError

from deploy.config.config_errors import ConfigError
from deploy.labels.asking import Pair, Worth, uncertainty


class Score(BaseModel, extra="ignore", frozen=True):
    """One line: an episode, and what a judge, or each of several, thinks of it."""

    group_id: int
    episode: int  # place in its group
    attempt: int = 0
    score: float | tuple[float, ...]

    @property
    def scores_E(self) -> tuple[float, ...]:
        return (self.score,) if isinstance(self.score, float) else self.score


def read_worth(path: Path) -> Worth:
    """The worth of asking a pair: how uncertain the scores of its episodes leave it; 0 where one has none.

    ConfigError, one line, for a file that cannot be read and for a line that holds no score.
    """
    scores: dict[tuple[int, int, int], tuple[float, ...]] = {}
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

    def worth(pair: Pair) -> float:
        first, second = (scores.get((*pair[:2], place)) for place in pair[2:])
        return uncertainty(first, second) if first and second else 0.0

    return worth


_FORM = '{"group_id": 0, "episode": 0, "score": 0.5}'
