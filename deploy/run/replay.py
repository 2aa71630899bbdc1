"""A learner alone: it learns from the trajectories of a finished run, step by step as that run did, by any algorithm.

Nothing is sampled, and no engine, no environment and no Ray is there. What was recorded stays off-policy by as much as
the two learners differ: `effective_samples` says how much, and corrections weigh it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from deploy.assembly.build import load_tokenizer
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.load import Nested
from deploy.config.run_folder import CONFIG_FILE, read_stored
from deploy.run.in_process import LearnerHere
from learner.training.checkpoint import MODEL, latest
from rollout.buffer.history import History, HistoryError
from rollout.buffer.replay_store import EpisodeRow
from rollout.episodes.evaluation import EvaluationPlan
from rollout.wire.metrics import Row, joined
from rollout.wire.trajectory import Task
from rollout.wire.weights import ByteArray, Handle


class ReplayRuntime(LearnerHere):
    """The ring without its first half; the methods are those of `deploy.assembly.runtime.Runtime`."""

    async def start(self, resume: bool) -> int:
        self._history = _history(self._config)
        return self.start_learner(self._history, _nowhere, resume)

    async def publish(self, saves: bool = False) -> Row:
        return {}

    async def evaluate(self, tasks: Sequence[Task], name: str, plan: EvaluationPlan) -> list[EpisodeRow]:
        return []

    def begin_rollouts(self) -> None:
        pass

    async def step(
        self, number: int, before_publish: Awaitable[object] | None = None, saves: bool = False
    ) -> Row:
        began = time.perf_counter()
        row = await self._learner.train(number)
        return joined(row, {"publish_s": 0.0, "step_s": time.perf_counter() - began})

    async def counters(self) -> Row:
        return {"tokens_sampled": 0.0}

    async def counts(self) -> dict[str, int]:
        return await self._history.counts()

    async def close(self) -> None:
        pass


def _history(config: RunConfig) -> History:
    assert config.replay is not None
    try:
        history = History(Path(config.replay))
    except HistoryError as error:
        raise ConfigError(f"replay: {error}") from None
    if history.steps < config.steps:
        raise ConfigError(
            f"replay: {config.replay} made {history.steps} steps; say steps={history.steps} or fewer"
        )
    return history


def check(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a past that is no run's or too short, or whose numbers would be wrong under these settings.

    tokenizer: of the model that is to learn. More than one rank is refused too: a replay is one process.
    """
    assert config.replay is not None
    if config.learner.ranks > 1:
        raise ConfigError(
            f"replay: a learner alone is one process, but learner.ranks={config.learner.ranks}; use 1"
        )
    _history(config)
    past = Path(config.replay)
    _require_same_conditions(config, past)
    require_same_tokens(config, tokenizer, past, "replay")


def _require_same_conditions(config: RunConfig, past: Path) -> None:
    """What was sampled must be what these settings say it was."""
    stored = _stored(past)
    mine = {
        "sampling.temperature": config.sampling.temperature,
        "rollout.group_size": config.rollout.group_size,
        "buffer.groups_per_step": config.buffer.groups_per_step,
    }
    for name, value in mine.items():
        section, option = name.split(".")
        if (was := stored[section][option]) != value:
            raise ConfigError(f"replay: {past} was played with {name}={was}, not {value}; say {name}={was}")
    at_least = {
        "buffer.max_lag": (config.buffer.max_lag, "its tokens may be as many versions old"),
        "rollout.context_tokens": (config.rollout.context_tokens, "its conversations may be as long"),
    }
    for name, (value, why) in at_least.items():
        section, option = name.split(".")
        if (was := stored[section][option]) > value:
            raise ConfigError(
                f"replay: {past} was played with {name}={was} and {why}, but {name}={value}; say {was} or more"
            )


def _stored(past: Path) -> Nested:
    """The configuration of the past run as it lies there; it need not be one that would be accepted today."""
    file = past / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(f"replay: {past} has no {CONFIG_FILE}, so nobody knows how its tokens were sampled")
    stored, _ = read_stored(file)
    if not isinstance(stored, dict):
        raise ConfigError(f"replay: {file}: broken file (no table of options)")
    return stored


def require_same_tokens(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, past: Path, option: str
) -> None:
    """The token ids on record must mean to this model what they meant to the one that sampled them.

    option: what names the past run.
    """
    newest = latest(past)
    if newest is None:
        raise ConfigError(f"{option}: {past} has no checkpoint, so nobody knows what its tokens mean")
    require_same_ids(config, tokenizer, str(newest / MODEL), option, str(past))


def require_same_ids(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, folder: str, option: str, named: str
) -> None:
    """Every token must have the same id in the tokenizers of the run's model and of the model in a folder.

    named: that model, in the error.
    """
    trusted = config.learner.model.trust_remote_code
    mine, theirs = tokenizer.get_vocab(), load_tokenizer(folder, trusted).get_vocab()
    if mine != theirs:
        model = "the tiny model" if config.tiny else config.learner.model.path
        raise ConfigError(
            f"{option}: the tokenizer of {model} is not that of {named} ({len(mine)} and {len(theirs)} tokens, or "
            "other ids): its token ids would mean something else"
        )


def _nowhere(arrays: Sequence[ByteArray]) -> tuple[Handle, Any]:
    raise RuntimeError("a replay has no engines to offer weights to")
