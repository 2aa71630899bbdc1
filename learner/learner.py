"""The learner: groups in, one weight version more, metrics out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field

from learner import checkpoint
from learner.advantages import group_normalized
from learner.algorithm import AlgorithmSettings
from learner.batch import Batch, MicroBatch, TokenSequence, pack, sequences_of
from learner.model import ModelSettings, Policy
from learner.optim import Optimizer, OptimSettings
from learner.step import PolicyObjective, cross_entropy_objective, train_step
from rollout.wire.trajectory import Group, Trajectory

# Summed over minibatches, not averaged.
_COUNTS = ("tokens_trained", "tokens_scored", "tokens_sampled", "skipped_step")


class ImitationSettings(BaseModel, extra="forbid", frozen=True):
    """Learning from recorded episodes before any reinforcement."""

    optim: OptimSettings = Field(default=OptimSettings(learning_rate=1e-5), description="its own optimizer")
    epochs: int = Field(default=1, ge=1, description="passes over the episodes")
    episodes_per_step: int = Field(default=32, ge=1, description="episodes in one optimizer step")
    threads: int = Field(
        default=0, ge=0, description="CPU threads of torch meanwhile; nothing is sampled then. 0: as always"
    )

    def steps(self, episodes: int) -> int:
        """How many optimizer steps that many episodes make."""
        return self.epochs * -(-episodes // self.episodes_per_step)


class LearnerSettings(BaseModel, extra="forbid", frozen=True):
    """Everything about learning."""

    model: ModelSettings = Field(default=ModelSettings(), description="which model, and how it is computed")
    optim: OptimSettings = Field(
        default=OptimSettings(), description="the optimizer of reinforcement learning"
    )
    algorithm: AlgorithmSettings = Field(default=AlgorithmSettings(), description="what is optimized")
    imitation: ImitationSettings = Field(
        default=ImitationSettings(), description="learning from recorded episodes"
    )
    tokens_per_microbatch: int = Field(
        default=4096, ge=1, description="tokens computed at a time; bounds memory, not the loss"
    )
    threads: int = Field(default=0, ge=0, description="CPU threads of torch; 0 leaves torch's own choice")


class Learner:
    """Holds the policy, its optimizer and the weight version: 0 until the first step, one more with each.

    seed: of the order in which episodes are imitated; temperature: that of the sampling, which the learner's logprobs
    must share; total_steps: learner steps of the whole run, where a falling learning rate ends.
    """

    def __init__(
        self,
        settings: LearnerSettings,
        seed: int = 0,
        temperature: float = 1.0,
        total_steps: int | None = None,
    ) -> None:
        self.settings = settings
        _use_threads(settings.threads)
        self.version = 0
        self.policy = Policy(settings.model)
        self._optimizer_steps = total_steps and total_steps * settings.algorithm.minibatches
        self.optimizer = Optimizer(self.policy.parameters(), settings.optim, self._optimizer_steps)
        self._tokenizer = checkpoint.tokenizer_files(settings.model.path)
        self._temperature = temperature
        self._rng = np.random.default_rng(seed)

    def step(self, groups: Sequence[Group]) -> dict[str, float]:
        """Learn from groups of sibling episodes; the version becomes one higher.

        Returns train_step's metrics (means over minibatches; counts are sums) and those of `describe`.
        ValueError for a group with fewer than two trainable episodes: it has no baseline.
        """
        _use_threads(self.settings.threads)
        weighted = [pair for group in groups for pair in self._with_advantages(group)]
        described = describe(groups, self.version)
        steps = [
            train_step(self.policy, self.optimizer, batch, self._objective, self._temperature)
            for batch in self._with_proximal(self._minibatches(weighted))
        ]
        self.version += 1
        zero = sum(advantage == 0.0 for _, advantage in weighted) / max(len(weighted), 1)
        return {
            **_merged(steps),
            **described,
            "zero_advantage_fraction": zero,
            "version": float(self.version),
        }

    def imitate(self, groups: Sequence[Group]) -> Iterator[dict[str, float]]:
        """Raise the likelihood of the groups' recorded actions: one optimizer step per item yielded.

        Every trainable episode is one example, in a new order each epoch. It has its own optimizer, and the
        weight version stays: this is what comes before version 0 is published.
        """
        settings = self.settings.imitation
        episodes = [trajectory for group in groups for trajectory in group.trainable]
        sequences = [sequences_of(trajectory, 1.0) for trajectory in episodes]
        optimizer = Optimizer(self.policy.parameters(), settings.optim, self.imitation_steps(len(episodes)))
        for epoch in range(settings.epochs):
            order = self._rng.permutation(len(episodes))
            for start in range(0, len(order), settings.episodes_per_step):
                _use_threads(settings.threads or self.settings.threads)
                chosen = order[start : start + settings.episodes_per_step]
                batch = self._pack([sequence for place in chosen for sequence in sequences[place]])
                metrics = train_step(self.policy, optimizer, batch, cross_entropy_objective, temperature=1.0)
                yield {**metrics, "epoch": float(epoch)}

    def imitation_steps(self, episodes: int) -> int:
        """How many optimizer steps `imitate` makes of that many trainable episodes."""
        return self.settings.imitation.steps(episodes)

    def save(self, run: Path, cursor: Mapping[str, Any] | None = None, keep: int = 2) -> Path:
        """Write a checkpoint of this version into the run, keep the last `keep`, and return its folder.

        cursor: where the task stream stands, JSON; `load` gives it back. Raises DiskFull.
        """
        contents = checkpoint.Contents(
            version=self.version,
            cursor=dict(cursor or {}),
            generator=self._rng.bit_generator.state,
            optimizer=self.optimizer.state_dict(),
            torch_rng=torch.get_rng_state(),
        )
        model_bytes = sum(parameter.nbytes for parameter in self.policy.parameters())
        return checkpoint.save(run, contents, self.write_model, model_bytes, keep)

    def load(self, run: Path) -> dict[str, Any]:
        """Continue from the newest whole checkpoint of a run, bit for bit; returns its cursor.

        CheckpointError or ModelError, in one line, if there is none or it is broken; this learner is then of
        no more use.
        """
        folder = checkpoint.latest(run)
        if folder is None:
            raise checkpoint.CheckpointError(f"run {run} has no whole checkpoint")
        contents = checkpoint.load(folder)
        del self.policy, self.optimizer  # their memory is needed for what comes
        self.policy = Policy(self.settings.model.model_copy(update={"path": str(folder / checkpoint.MODEL)}))
        self.optimizer = Optimizer(self.policy.parameters(), self.settings.optim, self._optimizer_steps)
        self.optimizer.load_state_dict(contents.optimizer)
        self.version = contents.version
        self._rng.bit_generator.state = contents.generator
        torch.set_rng_state(contents.torch_rng)
        return contents.cursor

    def write_model(self, folder: Path) -> None:
        """Write weights, config and tokenizer in Hugging Face format: what vLLM starts from."""
        self.policy.save(folder)
        for name, content in self._tokenizer.items():
            (folder / name).write_bytes(content)

    @property
    def _objective(self) -> PolicyObjective:
        return PolicyObjective(self.settings.algorithm)

    def _with_advantages(self, group: Group) -> list[tuple[Trajectory, float]]:
        episodes = group.trainable
        if len(episodes) < 2:
            where = f"group {group.slot.group_id}"
            raise ValueError(f"{where} has {len(episodes)} trainable episodes; its baseline needs at least 2")
        advantages_G = group_normalized([t.reward for t in episodes], self.settings.algorithm.advantage_eps)
        return list(zip(episodes, advantages_G.tolist(), strict=True))

    def _pack(self, sequences: list[TokenSequence], skip_zero_advantage: bool = False) -> Batch:
        return pack(sequences, self.settings.tokens_per_microbatch, self.policy.context, skip_zero_advantage)

    def _minibatches(self, weighted: list[tuple[Trajectory, float]]) -> list[Batch]:
        """Whole episodes, in order, in as many nearly equal parts as there are optimizer steps."""
        algorithm = self.settings.algorithm
        parts = np.array_split(np.arange(len(weighted)), min(algorithm.minibatches, len(weighted)) or 1)
        return [
            self._pack([s for i in part for s in sequences_of(*weighted[i])], algorithm.skip_zero_advantage)
            for part in parts
        ]

    def _with_proximal(self, batches: list[Batch]) -> list[Batch]:
        """Fix the learner's own logprobs before the first of several optimizer steps, if it asks for them."""
        algorithm = self.settings.algorithm
        if algorithm.proximal == "behavior" or len(batches) == 1:
            return batches
        return [replace(b, micro_batches=tuple(map(self._own_logprobs, b.micro_batches))) for b in batches]

    @torch.no_grad()
    def _own_logprobs(self, micro: MicroBatch) -> MicroBatch:
        logprobs_N, _ = self.policy.score(micro.to(self.policy.device), self._temperature)
        return replace(micro, proximal_logprobs_N=logprobs_N)


def _use_threads(count: int) -> None:
    # Of the calling thread: OpenMP keeps the number for each, and steps run in whatever thread is free.
    if count:
        torch.set_num_threads(count)


def describe(groups: Sequence[Group], version: int) -> dict[str, float]:
    """What the trained groups were, from their trainable episodes alone.

    "reward", "success" (of those with a verdict; absent without any), "turns",
    "sampled_per_episode" (tokens), "episodes", "untrainable_episodes", and "lag_mean", "lag_max": `version`,
    the learner's, minus the weight version that sampled each token.
    """
    episodes = [trajectory for group in groups for trajectory in group.trainable]
    if not episodes:
        raise ValueError("a step needs at least one group of trainable episodes, got none")
    lags = version - np.concatenate([step.versions for t in episodes for step in t.steps])
    verdicts = [t.success for t in episodes if t.success is not None]
    metrics = {
        "reward": float(np.mean([t.reward for t in episodes])),
        "turns": float(np.mean([len(t.steps) for t in episodes])),
        "sampled_per_episode": float(np.mean([t.num_sampled for t in episodes])),
        "episodes": float(len(episodes)),
        "untrainable_episodes": float(sum(len(group.trajectories) for group in groups) - len(episodes)),
        "lag_mean": float(lags.mean()) if lags.size else 0.0,
        "lag_max": float(lags.max()) if lags.size else 0.0,
    }
    return {**metrics, "success": float(np.mean(verdicts))} if verdicts else metrics


def _merged(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of several optimizer steps as one: sums of counts, means of everything else."""
    names = dict.fromkeys(name for step in steps for name in step)
    merged = {}
    for name in names:
        values = [step[name] for step in steps if name in step]
        merged[name] = float(np.sum(values) if name in _COUNTS else np.mean(values))
    return merged
