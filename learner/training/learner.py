"""The learner: groups in, one weight version more, metrics out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.algorithm import constraints
from learner.data.advantage_log import AdvantageLog
from learner.data.batch import Batch, TokenSequence, pack
from learner.data.batch_checks import BatchRefused, require_groups
from learner.data.batch_stats import describe
from learner.data.prepare import Example, weighed
from learner.model.loading import FilesChanged
from learner.model.policy import Policy
from learner.model.tensor_files import Changed
from learner.parallel.ranks import ALONE, Ranks
from learner.settings import LearnerSettings
from learner.stages.settings import AnyStage
from learner.training import checkpoint
from learner.training.checkpoint_writing import Saving
from learner.training.critic import Critic
from learner.training.critics import critic_of
from learner.training.experience import ExperienceMaker
from learner.training.memory_dry_run import rehearse, settle
from learner.training.optim import Optimizer
from learner.training.reference_policy import Reference
from learner.training.stage_run import Stages
from learner.training.step import PolicyObjective, merged, not_finite, sizes, train_step, use_threads
from learner.training.teacher import Teacher
from rollout.wire.metrics import joined
from rollout.wire.trajectory import EnvironmentKey, Group

_MULTIPLIERS = "multipliers"  # what a checkpoint's cursor calls those of the constraints


class Learner:
    """Holds the policy, its optimizer and the weight version: 0 until the first step, one more with each.

    seed: of the order in which episodes are used by stages and used again; temperature: that of the sampling, which the
    learner's logprobs must share; total_steps: learner steps of the whole run, where a falling learning rate ends;
    stages: what comes before version 0; environments: names of several, whose episodes are described one by one too.

    ranks: this process among those that learn together. Each is told the same things in the same order, with groups of
    its own share; what is raised, decided and returned is the same on all, and rank 0 writes.
    """

    def __init__(
        self,
        settings: LearnerSettings,
        seed: int = 0,
        temperature: float = 1.0,
        total_steps: int | None = None,
        ranks: Ranks = ALONE,
        stages: Sequence[AnyStage] = (),
        environments: Mapping[EnvironmentKey, str] | None = None,
    ) -> None:
        self.settings = settings
        self.ranks = ranks
        use_threads(settings.threads)
        self.version = 0
        self.policy = Policy(settings.model, ranks)
        self._critic_steps = total_steps and settings.algorithm.critic_steps(total_steps)
        self._policy_steps = total_steps and settings.algorithm.policy_steps(total_steps)
        self.optimizer = Optimizer(self.policy.parameters(), settings.optim, self._policy_steps)
        self._temperature = temperature
        self._rng = np.random.default_rng(seed)
        self.stages = Stages(stages, settings, self._rng)
        self._advantages: AdvantageLog | None = None
        self._environments = environments or {}
        self._verdicts = False  # whether the environment was ever seen to give one
        self._multipliers: constraints.Multipliers = {}  # of the constraints
        self._critic: Critic | None = None  # made by the first step, which finds the policy as it begins
        self._reference = Reference(settings.model, ranks) if settings.algorithm.needs_reference else None
        distill = settings.algorithm.distill
        self._teacher = None if distill is None else Teacher(distill, settings.model, ranks)

    def step(self, groups: Sequence[Group]) -> dict[str, float]:
        """Learn from groups of sibling episodes; the version becomes one higher.

        Returns train_step's metrics and the critic's (means over optimizer steps; counts are sums), those of
        `describe`, and "scored_share": of the tokens sampled, those that were computed, of which the statistics are.
        BatchRefused where the batch gives no advantages, or an optimizer step on it is not finite: parameters, moments
        and generators are then, to the bit, what they were before the batch. Where it makes several optimizer steps,
        host memory holds a copy of parameters and moments meanwhile.
        """
        use_threads(self.settings.threads)
        algorithm = self.settings.algorithm
        self._begin()
        require_groups(groups, algorithm.advantage.kind if algorithm.advantage.siblings else None, self.ranks)
        described = describe(groups, self.version, self.ranks, self._verdicts, self._environments)
        self._verdicts = "success" in described
        try:
            multipliers = constraints.updated(algorithm.constraints, self._multipliers, described)
        except ValueError as error:
            raise BatchRefused(str(error)) from error
        put_back = self._keep() if algorithm.keeps else lambda: None
        try:
            examples, rows = self._updated(groups, multipliers)
        except BatchRefused:
            put_back()  # all of a step's updates are made, or none
            raise
        self.version += 1
        self._multipliers = multipliers
        if self._advantages is not None:
            self._advantages.write(self.version, groups, [example.advantages_N for example in examples])
        row = merged(rows)
        shares = {
            "scored_share": row["tokens_scored"] / max(row["batch_tokens_sampled"], 1.0),
            "zero_advantage_fraction": self._share(not example.advantages_N.any() for example in examples),
            "truncated_without_bootstrap": self._share(
                not each.episode.ended and each.episode.values is None for each in examples
            ),
        }
        limits = constraints.metrics(algorithm.constraints, multipliers)
        return joined(row, described, shares, limits, {"version": float(self.version)})

    def keep_advantages(self, run: Path) -> None:
        """From here on, store the advantages of every step in the run's folder, where the settings say so.

        Of ranks with the same share the first one does.
        """
        if self.settings.store_advantages and not self.ranks.context.rank:
            self._advantages = AdvantageLog(run, self.version, self.ranks.share.rank)

    def rehearse(self, longest: int) -> None:
        """Fail now where a step of the largest row would not fit into memory, by what memory_dry_run.py tries.

        longest: tokens of the longest sequence. ModelError says what to lower.
        """
        taught = None if self._teacher is None else self._teacher.policy
        self.settings = settle(self.policy, self.settings, longest, taught)
        rehearse(self.policy, self.optimizer, self.settings, longest, self._temperature, self._critic_steps)

    def held(self) -> Iterator[Tensor]:
        """What lies on its device from one step to the next, gradients and what engines need aside."""
        parts = (self.optimizer, self._critic, self._reference, self._teacher)
        return chain(self.policy.model.parameters(), *(part.held() for part in parts if part is not None))

    @property
    def published_version(self) -> int:
        """The version that engines are given the weights as: -1 until the stages have made version 0."""
        return self.version if self.version or self.stages.over else -1

    def begin_stage(self, index: int, groups: Sequence[Group]) -> tuple[int, int]:
        """Begin a stage of the run on these groups; returns the steps that are made and how many there are in all.

        Stages come before version 0, in order, and a stage that a checkpoint was written in goes on where it was. Ranks
        are all given all groups.
        """
        return self.stages.begin(index, groups, self.policy)

    def advance_stage(self, steps: int) -> list[dict[str, float]]:
        """Make up to so many steps of the stage; fewer at its end. BatchRefused after four in a row not finite."""
        return self.stages.advance(steps)

    def save(self, run: Path, cursor: Mapping[str, Any] | None = None, keep: int = 2) -> Path:
        """Write a checkpoint of this version into the run, keep the last `keep`, and return its folder.

        See `begin_save`. Raises DiskFull.
        """
        return self.begin_save(run, cursor, keep).land()

    def begin_save(self, run: Path, cursor: Mapping[str, Any] | None = None, keep: int = 2) -> Saving:
        """Copy what a checkpoint of this version holds into host memory: what is returned lands it in any thread.

        While stages are under way it is one of a stage; the first of a version removes those.
        cursor: where the task stream stands, JSON; `load` gives it back. Of several ranks each copies its own part.
        """
        staged = self.stages.open
        optimizers = {"policy": self.optimizer.state_dict(), **self.stages.tensors()}
        folders = {f"{checkpoint.MODEL}/{path}": each for path, each in self.policy.folders().items()}
        if self._critic is not None:
            optimizers["critic"] = self._critic.optimizer.state_dict()
            parts = self._critic.folders().items()
            folders |= {f"{checkpoint.CRITIC}/{path}": each for path, each in parts}
        contents = checkpoint.Contents(
            version=self.stages.done if staged else self.version,
            cursor={
                **(cursor or {}),
                **({checkpoint.STAGES: self.stages.position()} if staged else {}),
                **({_MULTIPLIERS: constraints.stored(self._multipliers)} if self._multipliers else {}),
            },
            generator=self._rng.bit_generator.state,
            optimizers=optimizers,
            torch_rng=torch.get_rng_state(),
        )
        if self._reference is not None and self.version == 0 and not staged:
            self._reference.keep(run, self.policy)
        target, ended = (run / checkpoint.STAGES, None) if staged else (run, run)
        return Saving(target, contents, folders, keep, self.ranks.aside, ended)

    def load(self, run: Path) -> dict[str, Any]:
        """Continue from the newest whole checkpoint of a run, bit for bit; returns its cursor.

        Before the first version it is one of the run's stages. Every rank reads its own part. One that is broken is set
        aside, and the one before is used. CheckpointError or ModelError, in one line, if there is none or it is not of
        this recipe; this learner is then of no more use.
        """
        while True:
            # Rank 0 says which: a broken one is set aside while it looks.
            found = checkpoint.newest(run) if not self.ranks.rank else None
            (newest, *_) = self.ranks.gather(found and str(found))
            if newest is None:
                raise checkpoint.CheckpointError(f"run {run} has no whole checkpoint")
            folder, error, cursor = Path(newest), "", dict[str, Any]()
            try:
                cursor = self._load(run, folder)
            except (checkpoint.CheckpointError, Changed, FilesChanged) as changed:
                error = str(changed)
            broken = next(filter(None, self.ranks.gather(error, everyone=True)), "")
            if not broken:
                return cursor
            if not self.ranks.rank:
                checkpoint.set_aside(folder, checkpoint.broken(folder, broken))
            self.ranks.gather(None)  # it is aside

    def _load(self, run: Path, folder: Path) -> dict[str, Any]:
        """Continue from one checkpoint. Models are read first, together: what follows a rank reads by itself."""
        contents = checkpoint.load(folder)
        self._critic = None
        self.policy, self.optimizer = None, None  # type: ignore[assignment]
        gc.collect()  # their memory is needed for what comes, and sharded modules refer to one another
        self.policy = Policy.restored(self.settings.model, folder / checkpoint.MODEL, self.ranks)
        critic = self.settings.algorithm.critic
        if critic is not None and "critic" in contents.optimizers:
            self._critic = critic_of(critic, self.policy, self._critic_steps, folder / checkpoint.CRITIC)
            self._critic.optimizer.load_state_dict(contents.optimizers["critic"])
        self.optimizer = Optimizer(self.policy.parameters(), self.settings.optim, self._policy_steps)
        self.optimizer.load_state_dict(contents.optimizers["policy"])
        staged = contents.cursor.pop(checkpoint.STAGES, None)
        if self._reference is not None and not staged:
            self._reference.find(run)
        self.stages.restore(staged, contents.optimizers)
        self._multipliers = constraints.restored(contents.cursor.pop(_MULTIPLIERS, {}))
        self.version = 0 if staged else contents.version
        self._rng.bit_generator.state = contents.generator
        torch.set_rng_state(contents.torch_rng[...])
        return contents.cursor

    def _begin(self) -> None:
        """What the first step finds: the critic and the reference begin where the policy does."""
        critic = self.settings.algorithm.critic
        if critic is not None and self._critic is None:
            self._critic = critic_of(critic, self.policy, self._critic_steps)
        if self._reference is not None and self.version == 0:
            self._reference.copy(self.policy)

    def _updated(
        self, groups: Sequence[Group], multipliers: constraints.Multipliers
    ) -> tuple[list[Example], list[dict[str, float]]]:
        """What a step learns from, and the metrics of its updates. BatchRefused where one is not finite."""
        models = self.policy, self._critic, self._reference, self._teacher
        examples = ExperienceMaker(self.settings, self._temperature, *models).make(groups, multipliers)
        rows: list[dict[str, float]] = []
        for batch, whole in self._batches(examples):
            rows.append(row := self._update(batch, whole))
            if row["skipped_step"] or row.get("value_skipped_step"):
                raise BatchRefused(not_finite(row))
        return examples, rows

    def _update(self, batch: Batch, whole: Batch) -> dict[str, float]:
        """One optimizer step of whatever learns now."""
        objective = PolicyObjective(self.settings.algorithm, self.version)
        teach = partial(
            train_step,
            self.policy,
            self.optimizer,
            objective=objective,
            temperature=self._temperature,
            teacher=self._teacher,
        )
        if self._critic is None:
            return teach(batch)
        if self.version < self._critic.warmup_steps:
            return joined({"skipped_step": 0.0}, sizes(whole, self.ranks), self._critic.step(whole))
        return self._critic.step_with(teach, batch, whole)

    def _keep(self) -> Callable[[], None]:
        """What undoes all that updates on a batch change."""
        kept = [self.optimizer.keep(), *([self._critic.keep()] if self._critic else [])]
        drawn = self._rng.bit_generator.state

        def put_back() -> None:
            for undo in kept:
                undo()
            self._rng.bit_generator.state = drawn

        return put_back

    def _batches(self, examples: Sequence[Example]) -> Iterator[tuple[Batch, Batch]]:
        """Whole episodes in nearly equal parts, one for each optimizer step: what the policy sees, and the critic.

        In order the first time; later passes shuffle. Every rank divides its own, into as many parts, and draws as much
        from its generator, as the one with most: all stay alike.
        """
        algorithm = self.settings.algorithm
        most = self.ranks.most(len(examples))
        order = np.arange(len(examples))
        for epoch in range(algorithm.epochs):
            if epoch:
                order = self._rng.permutation(most)
                order = order[order < len(examples)]
            for part in np.array_split(order, min(algorithm.minibatches, most) or 1):
                chosen = [examples[place] for place in part]
                sequences = weighed(chosen, algorithm.aggregation, algorithm.aggregation_length, self.ranks)
                batch = self._pack(sequences, algorithm.skip_zero_advantage)
                alike = self._critic is None or not batch.skipped_sequences
                yield batch, batch if alike else self._pack(sequences)

    def _pack(self, sequences: list[TokenSequence], skip_zero_advantage: bool = False) -> Batch:
        return pack(sequences, self.settings.tokens_per_microbatch, self.policy.context, skip_zero_advantage)

    def _share(self, true: Iterable[bool]) -> float:
        counted = [bool(one) for one in true]  # of the episodes of all ranks
        sums = self.ranks.sums({"true": sum(counted), "all": len(counted)})
        return sums["true"] / max(sums["all"], 1)
