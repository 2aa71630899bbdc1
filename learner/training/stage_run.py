"""The stages of a run on a learner: which one is under way, at which step, and what a checkpoint keeps of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from learner.algorithm.estimators import Values
from learner.algorithm.schedule import OptimSettings
from learner.data.batch import MicroBatch, pack
from learner.data.batch_checks import MOST_REFUSED, BatchRefused
from learner.data.prepare import Example, and_after, of_tokens, weighed
from learner.model.policy import Policy
from learner.parallel.auxiliary import AuxiliaryModule
from learner.parallel.ranks import Ranks
from learner.settings import LearnerSettings
from learner.stages.ilql import Ilql
from learner.stages.kto import Kto
from learner.stages.own import Owned
from learner.stages.preference import Preference
from learner.stages.reward_model import RewardModel
from learner.stages.settings import (
    AnyStage,
    IlqlSettings,
    KtoSettings,
    OwnStage,
    PreferenceSettings,
    RewardModelSettings,
    SftSettings,
)
from learner.stages.sft import Sft
from learner.stages.stage import Stage, StageLoss, StateValue
from learner.training.checkpoint import CheckpointError
from learner.training.optim import Optimizer
from learner.training.step import Stats, not_finite, optimizer_step, use_threads
from rollout.wire.metrics import Row, joined
from rollout.wire.partition import deal, work
from rollout.wire.trajectory import Float32Array, Group

_OPTIMIZER = re.compile(r"stage\.\d+")
_KEPT, _MODULES = "stage.kept", "stage.modules"  # among the optimizers of a checkpoint


class PackedOptimizer:
    """An optimizer with the batches it steps on: a `StageOptimizer`."""

    def __init__(self, optimizer: Optimizer, policy: Policy, tokens_per_row: int) -> None:
        self.optimizer = optimizer
        self._policy = policy
        self._tokens_per_row = tokens_per_row

    def step(
        self,
        examples: Sequence[Example],
        loss: StageLoss,
        beside: Mapping[str, Self] = MappingProxyType({}),
    ) -> Row:
        policy, others = self._policy, {name: each.optimizer for name, each in beside.items()}
        own = weighed(dealt(examples, policy.ranks), "token", ranks=policy.ranks)
        batch = pack(own, self._tokens_per_row, policy.context)

        def loss_of(micro: MicroBatch) -> tuple[Tensor, Stats]:
            loss_N, statistics = loss(micro)
            return loss_N, dict(statistics)

        def agree() -> bool:
            return all([math.isfinite(other.grad_norm()) for other in others.values()])  # ranks ask for each

        for other in others.values():
            other.zero_grad()
        row = optimizer_step(policy, self.optimizer, batch, loss_of, agree)
        reports = {name: other.step(finite=not row["skipped_step"]) for name, other in others.items()}
        return joined(row, {f"{name}_grad_norm": report.grad_norm for name, report in reports.items()})


class StageRun:
    """One stage under way: a `StageLearner` for the stage, which it asks for one step after another."""

    def __init__(
        self, stage: AnyStage, settings: LearnerSettings, policy: Policy, rng: np.random.Generator
    ) -> None:
        self.policy, self.ranks, self.rng = policy, policy.ranks, rng
        self.step, self.steps = 0, 0  # the next one to make, and how many there are
        self.refused = 0  # steps in a row that were not finite
        self.optimizers: list[PackedOptimizer] = []
        self.modules: dict[str, AuxiliaryModule] = {}
        self.tensors: dict[str, Tensor] = {}  # what the stage has `kept`
        self._kind = stage.kind
        self._threads = stage.threads or settings.threads
        self._tokens_per_row = settings.tokens_per_microbatch
        self._stage = _stage_of(stage)

    def optimizer(
        self, settings: OptimSettings, steps: int, of: Sequence[AuxiliaryModule] = ()
    ) -> PackedOptimizer:
        moved = chain.from_iterable(module.parameters() for module in of) if of else self.policy.parameters()
        made = PackedOptimizer(Optimizer(moved, settings, steps), self.policy, self._tokens_per_row)
        self.optimizers.append(made)
        return made

    def module(self, name: str, module: nn.Module) -> AuxiliaryModule:
        if name in self.modules:
            raise ValueError(f"the stage has two modules {name!r}; give each a name of its own")
        self.modules[name] = AuxiliaryModule(module, self.ranks, self.policy.device)
        return self.modules[name]

    def kept(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if name not in self.tensors:
            self.tensors[name] = compute()
        return self.tensors[name]

    def share(self, examples: Sequence[Example]) -> list[Example]:
        return dealt(examples, self.ranks)

    def values(self, examples: Sequence[Example], value: StateValue) -> list[Values]:
        @torch.no_grad()
        def compute(micro: MicroBatch) -> Tensor:
            return value(self.policy.hidden(micro.to(self.policy.device)))[:, None]

        found = and_after(examples, compute, self._tokens_per_row, self.ranks)
        return [Values(before_N1[:, 0], float(after_1[0])) for before_N1, after_1 in found]

    def logprobs(self, examples: Sequence[Example]) -> list[Float32Array]:
        @torch.no_grad()
        def score(micro: MicroBatch) -> Tensor:
            return self.policy.score(micro.to(self.policy.device), 1.0)[0]

        return of_tokens(examples, score, self._tokens_per_row, self.ranks)

    def begin(self, groups: Sequence[Group]) -> None:
        """Have the stage make ready."""
        use_threads(self._threads)
        self.steps = self._stage.begin(self, groups)

    def advance(self) -> Row:
        """Make the next step. BatchRefused after four in a row that were not finite."""
        use_threads(self._threads)
        row = self._stage.advance(self.step)
        self.step += 1
        self.refused = self.refused + 1 if row.get("skipped_step") else 0
        if self.refused > MOST_REFUSED:
            raise BatchRefused(
                f"{self.refused} steps in a row of a stage of kind {self._kind!r}: {not_finite(row)}"
            )
        return row


class Stages:
    """All stages of a run, one after the other.

    rng: the learner's generator, whose state a checkpoint of the learner holds; the state in which the present stage
    began is kept besides, so that a stage that is begun again draws the same.
    """

    def __init__(
        self, stages: Sequence[AnyStage], settings: LearnerSettings, rng: np.random.Generator
    ) -> None:
        self._stages = tuple(stages)
        self._settings = settings
        self._rng = rng
        self._next = 0  # the stage that is under way or to be begun
        self._done = 0  # steps of all stages
        self._run: StageRun | None = None
        self._began: Any = None  # the generator's state before the present stage
        self._resumed: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None  # position and tensors

    @property
    def open(self) -> bool:
        """Whether the policy is between stages or within one: it is no version yet."""
        return self._run is not None or 0 < self._next < len(self._stages)

    @property
    def over(self) -> bool:
        """Whether all stages are made: the policy is version 0, or a later one."""
        return self._next == len(self._stages)

    @property
    def done(self) -> int:
        """Steps made, of all stages together."""
        return self._done

    def begin(self, index: int, groups: Sequence[Group], policy: Policy) -> tuple[int, int]:
        """Begin a stage, or go on within it; returns the steps that are made and how many there are in all."""
        if index != self._next or self._run is not None:
            raise ValueError(f"stage {index} was asked of a learner that is at stage {self._next}")
        now = self._rng.bit_generator.state, torch.get_rng_state()
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            self._rng.bit_generator.state = resumed[0]["generator"]
        self._began = self._rng.bit_generator.state
        run = StageRun(self._stages[index], self._settings, policy, self._rng)
        if resumed is not None:
            run.tensors = {name: stored[...] for name, stored in resumed[1][_KEPT].items()}
        run.begin(groups)
        if resumed is not None:
            position, stored = resumed
            run.step, run.refused = int(position["step"]), int(position["refused"])
            _require_same(run, stored)
            for name, made in _named(run).items():
                made.optimizer.load_state_dict(stored[name])
            for name, module in run.modules.items():
                module.load(stored[_MODULES][name])
            self._rng.bit_generator.state = now[0]
            torch.set_rng_state(now[1])
        self._run = run
        return run.step, run.steps

    def advance(self, steps: int) -> list[Row]:
        """Make up to so many steps; fewer when the stage ends, and none when it has ended."""
        rows: list[Row] = []
        while self._run is not None and len(rows) < steps:
            if self._run.step < self._run.steps:
                rows.append(self._run.advance())
                self._done += 1
            if self._run.step >= self._run.steps:
                self._run, self._next = None, self._next + 1
        return rows

    def position(self) -> dict[str, Any]:
        """Where the stages stand, as JSON."""
        run = self._run
        within = {"step": run.step, "refused": run.refused, "generator": self._began} if run else {}
        return {"stage": self._next, "done": self._done, **within}

    def tensors(self) -> dict[str, Any]:
        """The state of the present stage's optimizers and modules, by name, and what it has kept."""
        if self._run is None:
            return {}
        optimizers = {name: made.optimizer.state_dict() for name, made in _named(self._run).items()}
        modules = {name: module.state() for name, module in self._run.modules.items()}
        return {**optimizers, _MODULES: modules, _KEPT: self._run.tensors}

    def restore(self, position: Mapping[str, Any] | None, tensors: Mapping[str, Any]) -> None:
        """Stand where a checkpoint says; None: behind all stages."""
        self._run, self._resumed = None, None
        if position is None:
            self._next = len(self._stages)
            return
        self._next, self._done = int(position["stage"]), int(position["done"])
        if "generator" in position:
            self._resumed = position, tensors


def _stage_of(settings: AnyStage) -> Stage:
    match settings:
        case SftSettings():
            return Sft(settings)
        case PreferenceSettings():
            return Preference(settings)
        case KtoSettings():
            return Kto(settings)
        case RewardModelSettings():
            return RewardModel(settings)
        case IlqlSettings():
            return Ilql(settings)
        case OwnStage():
            return Owned(settings)


def dealt(examples: Sequence[Example], ranks: Ranks) -> list[Example]:
    """The part of a step's episodes that is this rank's."""
    share = ranks.share
    if share.ranks == 1:
        return list(examples)
    sizes = [work([each.token_ids_T for each in example.sequences()]) for example in examples]
    return [examples[place] for place in deal(sizes, share.ranks)[share.rank]]


def _require_same(run: StageRun, stored: Mapping[str, Any]) -> None:
    """CheckpointError where the stage asks for other optimizers or modules than when the checkpoint was written."""
    asked = sorted([*_named(run), *run.modules])
    held = sorted([*(name for name in stored if _OPTIMIZER.fullmatch(name)), *stored.get(_MODULES, {})])
    if asked != held:
        raise CheckpointError(
            f"the stage asks for {', '.join(asked)}, but its checkpoint holds {', '.join(held)}; continue the run with "
            "the stage as it was, or begin a new one"
        )


def _named(run: StageRun) -> dict[str, PackedOptimizer]:
    return {f"stage.{place}": each for place, each in enumerate(run.optimizers)}
