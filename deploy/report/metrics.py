"""The numbers of a run, one row a learner step: RUN/metrics.jsonl, and the same for TensorBoard in RUN/tensorboard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite, nan
from pathlib import Path

from deploy.config.config_errors import ConfigError
from rollout.wire.metrics import Row

# Names in older runs. Their tokens_sampled was written by the learner, and then over that by the rollout.
RENAMED = {
    "tokens_sampled": "rollout_tokens_sampled",
    "tokens_trained": "tokens_processed",
    "cut_short": "truncated_without_bootstrap",
}
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsLog:
    """Appends one row a step. A row is on its way to disk when `write` returns.

    A run that is resumed does the steps after its checkpoint again: rows of steps beyond `resume_after` are cut off
    first, so that every step stands in the file once.
    """

    def __init__(self, folder: Path, resume_after: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds that a reader of metrics need not wait

        path = folder / METRICS_FILE
        _cut(path, resume_after)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=resume_after + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Store the metrics of one step. What is not finite becomes null in the file: JSON has no word for it."""
        plain = {"step": step} | {name: value if isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush both and close."""
        self._file.close()
        self._board.close()


def read_metrics(folder: str | Path) -> list[Row]:
    """The stored rows of a run in order of steps, under today's names; null reads as NaN. Empty before the first.

    ConfigError for a damaged line.
    """
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        return []
    # What follows the last newline is the torn row of a run that was killed while it wrote.
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
    """What was played during a step, out of the workers' sums before and after it (see
    `rollout.episodes.rollout_metrics`).

    rollout_tokens_sampled: by the workers meanwhile, for this step and later ones, evaluations and groups that are
    dropped included; what the step was trained on is the learner's batch_tokens_sampled. tools_REASON: tool calls for
    each episode that ended in the step, in a run that has made any.
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
    aside = path.with_suffix(".part")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    aside.replace(path)
