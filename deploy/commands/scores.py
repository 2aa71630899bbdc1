"""Scores of a run's episodes by reward models: what `manta label --scores` asks the most uncertain pair by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.config import run_folder
from deploy.config.config_errors import ConfigError
from deploy.labels.messages import Shown, conversation, shown_turns, tools_of
from deploy.labels.pool import Pool
from deploy.labels.scores import write_scores
from deploy.serving.reward_scorer import RewardScorer, Unscorable


@dataclass(frozen=True, slots=True)
class ScoreCount:
    """Episodes that were scored, and those left out since a reward model cannot read them."""

    scored: int
    left_out: int


def score_run(run: Path, models: Sequence[Path], out: Path, groups: int, device: str = "cpu") -> ScoreCount:
    """Score the episodes that pairs of the newest `groups` groups have, and replace `out`.

    models: folders of reward models; of several each episode has the score of each. ConfigError for a folder that is
    no run or no reward model, and where no episode can be scored.
    """
    if not run_folder.exists(run):
        raise ConfigError(f"{run} is not a run folder: it has no {run_folder.CONFIG_FILE}")
    played = {key: shown_turns(episode) for key, episode in Pool(run, groups).episodes().items()}
    columns = [_scores(RewardScorer(folder, device), list(played.values())) for folder in models]
    scores = {
        key: [each for each in row if each is not None]
        for key, row in zip(played, zip(*columns, strict=True), strict=True)
    }
    whole = {key: row for key, row in scores.items() if len(row) == len(models)}
    if not whole:
        raise ConfigError(
            f"{run}: none of its {len(played)} episodes in pairs can be scored; nothing is written"
        )
    with run_folder.writing(out):
        write_scores(out, whole)
    return ScoreCount(len(whole), len(played) - len(whole))


def _scores(scorer: RewardScorer, episodes: Sequence[Sequence[Shown]]) -> list[float | None]:
    """The score of each episode; None where the model cannot read it."""
    found: list[float | None] = [None] * len(episodes)
    rows: dict[int, list[int]] = {}
    for place, turns in enumerate(episodes):
        try:
            rows[place] = scorer.tokens(conversation(turns), tools_of(turns))
        except Unscorable:
            continue
    for place, score in zip(rows, scorer.scores(list(rows.values())), strict=True):
        found[place] = score
    return found
