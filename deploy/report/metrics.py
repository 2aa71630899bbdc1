"""Metrics of a run, one row a learner step: RUN/metrics.jsonl, and the same for TensorBoard in RUN/tensorboard.

Metrics of stage N are one row a step of the stage, in the same form in RUN/stages/N.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite, nan
from pathlib import Path

from deploy.config.config_errors import ConfigError
from rollout.wire.metrics import Row
from rollout.wire.whole_file import replace_file

# Names in older runs. Their tokens_sampled of the learner was replaced by that of the rollout.
RENAMED = {
    "tokens_sampled": "rollout_tokens_sampled",
    "tokens_trained": "tokens_processed",
    "cut_short": "truncated_without_bootstrap",
}
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsLog:
    """Appends one row a step, flushed when `write` returns.

    A resumed run repeats the steps after its checkpoint: rows of steps after `resume_after` are removed first, so that
    every step is in the file once.
    """

    def __init__(self, folder: Path, resume_after: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported here: it takes seconds

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        _cut(path, resume_after)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=resume_after + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Store the metrics of one step. A value that is not finite becomes null, since JSON has no NaN."""
        plain = {"step": step} | {name: value if isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush both and close."""
        self._file.close()
        self._board.close()


def stage_folder(run: Path, index: int) -> Path:
    """Where the numbers of a stage lie: a folder as a run is one for `MetricsLog` and `read_metrics`."""
    return run / "stages" / str(index)


def read_metrics(folder: str | Path) -> list[Row]:
    """The stored rows of a run in order of steps, under present names; null reads as NaN. Empty before the first.

    ConfigError for a damaged line.
    """
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        return []
    # Text after the last newline is an incomplete row of a run that was killed while writing.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [
        {RENAMED.get(name, name): nan if value is None else value for name, value in row.items()}
        for row in _parsed(path, lines)
    ]


def _parsed(path: Path, lines: list[str]) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}:{number}: broken line ({error!r}); remove the line") from error
    return rows


def rollout_rates(before: Row, after: Row, seconds: float) -> Row:
    """Metrics of the rollouts during a step, from the workers' counters before and after it (see
    `rollout.episodes.rollout_metrics`).

    rollout_tokens_sampled: sampled by the workers during the step, for this step and later ones, including evaluations
    and dropped groups; the tokens of the step's batch are the learner's batch_tokens_sampled. tools_REASON: tool calls
    per episode that ended in the step, in a run with tool calls.
    """
    sampled = after["tokens_sampled"] - before["tokens_sampled"]
    row = {"rollout_tokens_sampled": sampled, "rollout_tokens_per_s": sampled / seconds}
    calls = {name: count for name, count in after.items() if name.startswith("tools_")}
    episodes = after.get("episodes", 0) - before.get("episodes", 0)
    if episodes and any(calls.values()):
        row |= {name: (count - before.get(name, 0)) / episodes for name, count in calls.items()}
    return row


def _cut(path: Path, last_step: int) -> None:
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    kept = [line for line, row in zip(lines, _parsed(path, lines), strict=True) if row["step"] <= last_step]
    replace_file(path, "".join(line + "\n" for line in kept))
