"""Critics: one number for every token, what the state before it is worth.

    V_n = head(hidden state before the n-th sampled token)

The hidden states are those of a second model of the policy's kind (`OwnCritic`), or the policy's own (`SharedCritic`):
then one forward and one backward pass serve policy and values. A head begins as zeros. A critic of turns is in
turn_critic.py; critics.py makes the one that a recipe names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from learner.algorithm.algorithm import OwnCriticSettings, SharedCriticSettings
from learner.algorithm.estimators import Values
from learner.data.batch import Batch, MicroBatch
from learner.data.prepare import Example, and_after
from learner.model.policy import Policy
from learner.model.shared_files import Folder, file_of
from learner.model.tensor_files import tensors_in
from learner.parallel.auxiliary import AuxiliaryModule
from learner.training.optim import Optimizer
from learner.training.step import Auxiliary, Stats, accumulate
from rollout.wire.metrics import Row, joined

TRUNK, _HEAD = "trunk", "head.safetensors"


def value_loss(values_N: Tensor, old_N: Tensor, targets_N: Tensor, clip: float | None) -> Tensor:
    """(V - target)^2 / 2, or with a clip the larger of that and the same of V kept within `clip` of its old value.

    float [N]. Schulman et al. 2016; the clip is that of the reference code of PPO (Engstrom et al. 2020, section 3).
    """
    loss_N = (values_N - targets_N).square()
    if clip is not None:
        near_N = old_N + (values_N - old_N).clamp(-clip, clip)
        loss_N = torch.maximum(loss_N, (near_N - targets_N).square())
    return loss_N / 2


class ValueHead:
    """A linear layer from hidden states to values, in float32; on several ranks it lies over all of them, or whole."""

    def __init__(self, trunk: Policy, whole: bool = False) -> None:
        self.ranks = trunk.ranks
        self.linear = nn.Linear(trunk.width, 1, device=trunk.device)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self._module = AuxiliaryModule(self.linear, self.ranks, trunk.device, whole)
        self.sum_gradients = self._module.sum_gradients

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Values, float32 [N]."""
        values_N1: Tensor = self._module(hidden_ND.to(self.linear.weight.dtype))
        return values_N1[:, 0]

    def folder(self) -> Folder:
        """What is written of it, as it is now: a copy."""
        return Folder([file_of(_HEAD, self._module.state(), not self.ranks.rank)])

    def load(self, folder: Path) -> None:
        """Take over what was written there."""
        self._module.load(tensors_in(folder / _HEAD))


class PolicyStep(Protocol):
    """`train_step` of a learner's policy, which a critic may give something to learn besides, or hold back."""

    def __call__(
        self, batch: Batch, *, auxiliary: Auxiliary | None = None, agree: Callable[[], bool]
    ) -> Row: ...


class Critic(Protocol):
    """What a learner asks of a critic, whichever it is. `optimizer`: of all that the policy's own does not move."""

    optimizer: Optimizer

    @property
    def learns_by_itself(self) -> bool:
        """Whether `look` has it learn from the episodes, so that the estimator gives it no targets."""

    @property
    def warmup_steps(self) -> int:
        """First learner steps in which only the critic learns."""

    def look(self, examples: Sequence[Example], tokens_per_row: int, temperature: float | None) -> None:
        """Give each episode its values. BatchRefused where it learns and its gradient is not finite.

        With a temperature somebody wants the policy's logprobs at it too: where they come of the same pass, they become
        the column "proximal_logprobs".
        """

    def step(self, batch: Batch) -> Row:
        """One optimizer step towards the targets; the policy stays as it is.

        Metrics: "value_loss", "value", "value_error" (mean |V - target|), "value_grad_norm", "value_skipped_step".
        """

    def step_with(self, policy_step: PolicyStep, batch: Batch, whole: Batch) -> Row:
        """The same and a step of the policy, with the metrics of both; if one of them is not finite, neither is made.

        batch: what the policy needs to see; whole: what a critic does, the sequences without advantage too.
        """

    def folders(self) -> dict[str, Folder]:
        """What is written of all that is not the policy's, as it is now, by folder. A collective call."""

    def keep(self) -> Callable[[], None]:
        """What puts all that is not the policy's back, to the bit, as it is now."""

    def load(self, folder: Path) -> None:
        """Take over what was written beside the trunk, which the critic was made with."""

    def held(self) -> Iterator[Tensor]:
        """What of it lies on the device from one step to the next."""


class OwnCritic:
    """A second model and a head on it. The trunk becomes its own; `total_steps` are its optimizer's."""

    def __init__(self, settings: OwnCriticSettings, trunk: Policy, total_steps: int | None = None) -> None:
        self.settings = settings
        self.trunk = trunk
        self.head = ValueHead(trunk, whole=trunk.adapter is not None)
        learning = [*trunk.model.base_model.parameters(), *self.head.linear.parameters()]
        self.optimizer = Optimizer(learning, settings.optim, total_steps)

    @property
    def learns_by_itself(self) -> bool:
        return False

    @property
    def warmup_steps(self) -> int:
        return self.settings.warmup_steps

    def look(self, examples: Sequence[Example], tokens_per_row: int, temperature: float | None) -> None:
        """One pass of its own model; it says nothing of the policy's logprobs."""

        @torch.no_grad()
        def seen(micro: MicroBatch) -> Tensor:
            return self._values(micro.to(self.trunk.device))[:, None]

        found = and_after(examples, seen, tokens_per_row, self.trunk.ranks)
        for example, (before_N1, after_1) in zip(examples, found, strict=True):
            example.episode = replace(example.episode, values=Values(before_N1[:, 0], float(after_1[0])))

    def step(self, batch: Batch) -> Row:
        loss, means = self._gradients(batch)
        return joined(means, _moved(self.optimizer, math.isfinite(loss)))

    def step_with(self, policy_step: PolicyStep, batch: Batch, whole: Batch) -> Row:
        loss, means = self._gradients(whole)
        finite = math.isfinite(loss) and math.isfinite(self.optimizer.grad_norm())
        row = policy_step(batch, agree=lambda: finite)
        return joined(row, means, _moved(self.optimizer, finite=not row["skipped_step"]))

    def folders(self) -> dict[str, Folder]:
        trunk = {f"{TRUNK}/{path}": folder for path, folder in self.trunk.folders().items()}
        return {"": self.head.folder()} | trunk

    def keep(self) -> Callable[[], None]:
        return self.optimizer.keep()

    def load(self, folder: Path) -> None:
        self.head.load(folder)

    def held(self) -> Iterator[Tensor]:
        modules = self.trunk.model.parameters(), self.head.linear.parameters()
        return chain(*modules, self.optimizer.held())

    def _gradients(self, batch: Batch) -> tuple[float, Row]:
        self.optimizer.zero_grad()
        found = accumulate(self.trunk, batch, self._loss)
        self.head.sum_gradients()
        return found

    def _values(self, micro: MicroBatch) -> Tensor:
        return self.head(self.trunk.hidden(micro))

    def _loss(self, micro: MicroBatch) -> tuple[Tensor, Stats]:
        return _towards_targets(self._values(micro), micro, self.settings.value_clip)


class SharedCritic:
    """A head on the policy's own hidden states: loss = the policy's + value_coefficient * value loss.

    What the value loss says of the trunk, unless `detach` keeps it away, is the policy's optimizer's to apply, within
    its bound of the gradient's norm; the head has its own optimizer, of `total_steps`.
    """

    def __init__(
        self, settings: SharedCriticSettings, policy: Policy, total_steps: int | None = None
    ) -> None:
        self.settings = settings
        self.head = ValueHead(policy)
        self.optimizer = Optimizer(self.head.linear.parameters(), settings.optim, total_steps)
        self._policy = policy

    @property
    def learns_by_itself(self) -> bool:
        return False

    @property
    def warmup_steps(self) -> int:
        return self.settings.warmup_steps

    def look(self, examples: Sequence[Example], tokens_per_row: int, temperature: float | None) -> None:
        """One pass of the policy; logprobs, where they are wanted, come of the same one."""
        policy = self._policy

        @torch.no_grad()
        def seen(micro: MicroBatch) -> Tensor:
            on_device = micro.to(policy.device)
            if temperature is None:
                return self.head(policy.hidden(on_device))[:, None]
            logprobs_N, _, hidden_ND = policy.read(on_device, temperature)
            return torch.stack([self.head(hidden_ND), logprobs_N], dim=1)

        found = and_after(
            examples, seen, tokens_per_row, policy.ranks, columns=1 if temperature is None else 2
        )
        for example, (before_NC, after_C) in zip(examples, found, strict=True):
            example.episode = replace(example.episode, values=Values(before_NC[:, 0], float(after_C[0])))
            if temperature is not None:
                example.columns["proximal_logprobs"] = before_NC[:, 1]

    def step(self, batch: Batch) -> Row:
        def loss_of(micro: MicroBatch) -> tuple[Tensor, Stats]:
            with torch.no_grad():
                hidden_ND = self._policy.hidden(micro)
            return self._loss(micro, hidden_ND)

        self.optimizer.zero_grad()
        loss, means = accumulate(self._policy, batch, loss_of)
        return joined(means, _moved(self.optimizer, math.isfinite(loss)))

    def step_with(self, policy_step: PolicyStep, batch: Batch, whole: Batch) -> Row:
        self.optimizer.zero_grad()
        row = policy_step(
            whole, auxiliary=self._loss, agree=lambda: math.isfinite(self.optimizer.grad_norm())
        )
        return joined(row, _moved(self.optimizer, finite=not row["skipped_step"]))

    def folders(self) -> dict[str, Folder]:
        return {"": self.head.folder()}

    def keep(self) -> Callable[[], None]:
        return self.optimizer.keep()

    def load(self, folder: Path) -> None:
        self.head.load(folder)

    def held(self) -> Iterator[Tensor]:
        return chain(self.head.linear.parameters(), self.optimizer.held())

    def _loss(self, micro: MicroBatch, hidden_ND: Tensor) -> tuple[Tensor, Stats]:
        values_N = self.head(hidden_ND.detach() if self.settings.detach else hidden_ND)
        loss_N, stats = _towards_targets(values_N, micro, self.settings.value_clip)
        return self.settings.value_coefficient * loss_N, stats


def _towards_targets(values_N: Tensor, micro: MicroBatch, clip: float | None) -> tuple[Tensor, Stats]:
    """Value loss [N] of a row, and its statistics."""
    old_N, targets_N = micro.values_N, micro.value_targets_N
    assert old_N is not None and targets_N is not None
    loss_N = value_loss(values_N, old_N, targets_N, clip)
    error_N = (values_N.detach() - targets_N).abs()
    return loss_N, {"value_loss": loss_N.detach(), "value": values_N.detach(), "value_error": error_N}


def _moved(optimizer: Optimizer, finite: bool) -> Row:
    """Apply the gradients that lie there."""
    report = optimizer.step(finite)
    return {
        "value_grad_norm": report.grad_norm,
        "value_skipped_step": float(not report.finite),
    }
