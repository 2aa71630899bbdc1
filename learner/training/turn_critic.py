"""A critic of turns: ArCHer's, learned off-policy from fresh and reused episodes (Zhou et al. 2024, arXiv 2402.19446).

    V(s) = heads(hidden state before an action)        Q(s, a) = heads(hidden state behind it)

Two heads on one trunk are read at both places, since a state and an action are text that says which of them it is.
Each learns towards the lower one of their slow copies (Fujimoto et al. 2018), and an advantage is the difference of
their means: the lower ones would be lower still where an action is rare. Where the paper draws a new action of the
policy for the target of V, this takes the recorded one, which is at most a few versions old (`buffer.reuse.max_lag`).
Before it learns from fresh episodes the critic is tried on them: where its advantages do not foretell what the turns
brought, the policy waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from learner.algorithm.advantages import turn_targets
from learner.algorithm.algorithm import TurnCriticSettings
from learner.algorithm.episode import TurnValues
from learner.data.batch import Batch, MicroBatch, pack
from learner.data.batch_checks import BatchRefused
from learner.data.prepare import Example
from learner.data.turn_marks import of_turns, turn_sequences
from learner.model.policy import Policy
from learner.model.shared_files import Folder, file_of
from learner.model.tensor_files import tensors_in
from learner.model.value_heads import TwoStateValues
from learner.parallel.auxiliary import AuxiliaryModule, follow
from learner.parallel.ranks import ALONE, Ranks
from learner.parallel.shards import local
from learner.training.critic import TRUNK, PolicyStep
from learner.training.optim import Optimizer
from learner.training.reference_policy import frozen
from learner.training.step import Stats, accumulate, not_finite
from rollout.wire.metrics import Row, joined
from rollout.wire.trajectory import Float32Array

SLOW_TRUNK = "slow_trunk"


class TurnCritic:
    """Trunk and heads, and the slow copy of both. `total_steps` are the optimizer's."""

    def __init__(
        self, settings: TurnCriticSettings, trunk: Policy, slow: Policy, total_steps: int | None = None
    ) -> None:
        self.settings = settings
        self.trunk, self.slow_trunk = trunk, frozen(slow)
        heads = TwoStateValues(trunk.width, 2 * trunk.width, torch.Generator().manual_seed(0))
        copy = deepcopy(heads).requires_grad_(False)
        whole = trunk.adapter is not None
        self.heads = AuxiliaryModule(heads, trunk.ranks, trunk.device, whole)
        self.slow_heads = AuxiliaryModule(copy, trunk.ranks, trunk.device, whole)
        learning = [*trunk.model.base_model.parameters(), *self.heads.parameters()]
        self.optimizer = Optimizer(learning, settings.optim, total_steps)
        self._learned: Row = {}  # metrics of what the last `look` learned

    @property
    def learns_by_itself(self) -> bool:
        return True

    @property
    def warmup_steps(self) -> int:
        return self.settings.warmup_steps

    def look(self, examples: Sequence[Example], tokens_per_row: int, temperature: float | None) -> None:
        """Give fresh episodes the values of their turns, if they bear the critic out; then learn from all episodes.

        Values after learning would hold what the very episode has brought, and leave little of an advantage.
        """
        fresh = [each for each in examples if not each.reused]
        read = self._values(fresh, self.trunk, self.heads, torch.mean, tokens_per_row)
        ahead = [self._targets(*pair)[1] for pair in zip(fresh, read, strict=True)]
        found = [replace(values, ahead_J=ahead_J) for values, ahead_J in zip(read, ahead, strict=True)]
        foretold = self._foretold(read, ahead)
        if foretold >= self.settings.trust or not self.settings.trust:
            for example, values in zip(fresh, found, strict=True):
                example.episode = replace(example.episode, turn_values=values)
        rows = [self._step(part, tokens_per_row) for part in self._parts(examples)]
        learned = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        self._learned = learned | {"value_correlation": foretold}

    def step(self, batch: Batch) -> Row:
        return self._learned

    def step_with(self, policy_step: PolicyStep, batch: Batch, whole: Batch) -> Row:
        return joined(policy_step(batch, agree=lambda: True), self._learned)

    def keep(self) -> Callable[[], None]:
        put_back_learning = self.optimizer.keep()
        pairs = zip(self.slow_trunk.model.parameters(), self.trunk.model.parameters(), strict=True)
        slow = [own for own, followed in pairs if followed.requires_grad]  # others do not move
        slow += self.slow_heads.parameters()
        copies = [local(parameter.detach()).to("cpu", copy=True) for parameter in slow]

        @torch.no_grad()
        def put_back() -> None:
            put_back_learning()
            for parameter, value in zip(slow, copies, strict=True):
                local(parameter).copy_(value)

        return put_back

    def held(self) -> Iterator[Tensor]:
        models = self.trunk.model.parameters(), self.slow_trunk.model.parameters()
        return chain(*models, self.heads.parameters(), self.slow_heads.parameters(), self.optimizer.held())

    def load(self, folder: Path) -> None:
        for name, heads in self._head_files.items():
            heads.load(tensors_in(folder / name))

    def folders(self) -> dict[str, Folder]:
        lead, trunks = not self.trunk.ranks.rank, {TRUNK: self.trunk, SLOW_TRUNK: self.slow_trunk}
        heads = Folder([file_of(name, each.state(), lead) for name, each in self._head_files.items()])
        return {"": heads} | {
            f"{name}/{path}": folder
            for name, trunk in trunks.items()
            for path, folder in trunk.folders().items()
        }

    @property
    def _head_files(self) -> dict[str, AuxiliaryModule]:
        return {"heads.safetensors": self.heads, "slow_heads.safetensors": self.slow_heads}

    def _parts(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Whole episodes in nearly equal parts, in a new order each pass; every rank divides its own into as many."""
        most = self.trunk.ranks.most(len(examples))
        random = np.random.default_rng(self.optimizer.steps)  # alike on all ranks, and after a resume
        for _ in range(self.settings.passes):
            order = random.permutation(most)
            for part in np.array_split(order, min(self.settings.minibatches, most) or 1):
                yield [examples[place] for place in part if place < len(examples)]

    def _foretold(self, read: Sequence[TurnValues], ahead: Sequence[Float32Array]) -> float:
        """Correlation of Q - V with what followed - V."""
        none_0 = np.zeros(0, np.float32)
        told = [values.behind_J - values.before_J for values in read]
        came = [ahead_J - values.before_J for values, ahead_J in zip(read, ahead, strict=True)]
        return correlation(np.concatenate([none_0, *told]), np.concatenate([none_0, *came]), self.trunk.ranks)

    def _targets(self, example: Example, values: TurnValues) -> tuple[Float32Array, Float32Array]:
        """Targets of V and Q by these values."""
        rewards_J, settings = example.episode.rewards_J, self.settings
        return turn_targets(rewards_J, values.before_J, values.behind_J, settings.gamma, settings.lam)

    def _step(self, examples: Sequence[Example], tokens_per_row: int) -> Row:
        """One optimizer step towards the slow copy's targets, which then follows."""
        ranks = self.trunk.ranks
        slow = self._values(examples, self.slow_trunk, self.slow_heads, torch.amin, tokens_per_row)
        places = ranks.sums({"places": 2.0 * sum(len(values.before_J) for values in slow)})["places"]
        sequences = []
        for example, values in zip(examples, slow, strict=True):
            targets = TurnValues(*self._targets(example, values))
            sequences += turn_sequences(example, targets, 1 / places)
        # Sequences end with a dummy token, which is no input.
        batch = pack(sequences, tokens_per_row, self.trunk.context + 1)
        self.optimizer.zero_grad()
        loss, means = accumulate(self.trunk, batch, self._loss)
        self.heads.sum_gradients()
        report = self.optimizer.step(finite=math.isfinite(loss))
        row = means | {"value_grad_norm": report.grad_norm, "value_skipped_step": float(not report.finite)}
        if not report.finite:
            raise BatchRefused(not_finite(row))
        follow(self.slow_trunk.model.base_model, self.trunk.model.base_model, self.settings.target_rate)
        self.slow_heads.follow(self.heads, self.settings.target_rate)
        return row

    def _values(
        self,
        examples: Sequence[Example],
        trunk: Policy,
        heads: AuxiliaryModule,
        of_both: Callable[[Tensor, int], Tensor],
        tokens_per_row: int,
    ) -> list[TurnValues]:
        """The heads' values at every turn of these episodes, the two reduced to one."""

        @torch.no_grad()
        def read(micro: MicroBatch) -> Tensor:
            return of_both(heads(trunk.hidden(micro.to(trunk.device))), 0)

        return of_turns(examples, read, tokens_per_row, trunk.ranks)

    def _loss(self, micro: MicroBatch) -> tuple[Tensor, Stats]:
        """Half the squared errors of both heads [N] and statistics, N places."""
        values_2N, targets_N = self.heads(self.trunk.hidden(micro)), micro.value_targets_N
        assert targets_N is not None
        error_2N = values_2N - targets_N
        loss_N = error_2N.square().sum(0) / 2
        stats: Stats = {
            "value_loss": loss_N.detach(),
            "value": values_2N.detach().mean(0),
            "value_error": error_2N.detach().abs().mean(0),
        }
        return loss_N, stats


def correlation(x_M: ArrayLike, y_M: ArrayLike, ranks: Ranks = ALONE) -> float:
    """Pearson's correlation over the pairs of all ranks; 0 where either side is the same everywhere."""
    x, y = np.asarray(x_M, np.float64), np.asarray(y_M, np.float64)
    sums = ranks.sums({"pairs": float(len(x)), "x": float(x.sum()), "y": float(y.sum())})
    pairs = max(sums["pairs"], 1.0)
    x, y = x - sums["x"] / pairs, y - sums["y"] / pairs
    squares = ranks.sums({"xx": float(x @ x), "yy": float(y @ y), "xy": float(x @ y)})
    scale = math.sqrt(squares["xx"] * squares["yy"])
    return squares["xy"] / scale if scale > 0 else 0.0
