"""A critic: a second model of the policy's kind, and one number for every token.

    V_n = head(hidden state before the n-th sampled token)

It begins as a copy of the policy, so that it can read what the policy can, with a head of zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from learner.algorithm import CriticSettings
from learner.batch import Batch, MicroBatch, level
from learner.model import ModelSettings, Policy
from learner.optim import Optimizer
from learner.ranks import ALONE, Ranks
from learner.shards import gathered_state, laid_out, shard
from learner.step import Means

_TRUNK, _HEAD = "trunk", "head.safetensors"


def value_loss(values_N: Tensor, old_N: Tensor, targets_N: Tensor, clip: float | None) -> Tensor:
    """(V - target)^2 / 2, or with a clip the larger of that and the same of V kept within `clip` of its old value.

    float [N]. Schulman et al. 2016; the clip is that of the reference code of PPO (Engstrom et al. 2020, section 3).
    """
    loss_N = (values_N - targets_N).square()
    if clip is not None:
        near_N = old_N + (values_N - old_N).clamp(-clip, clip)
        loss_N = torch.maximum(loss_N, (near_N - targets_N).square())
    return loss_N / 2


class Critic:
    """Model, head and optimizer. The trunk becomes its own; `total_steps` are its optimizer's."""

    def __init__(self, settings: CriticSettings, trunk: Policy, total_steps: int | None = None) -> None:
        self.settings = settings
        self._trunk = trunk
        self._head = nn.Linear(self._trunk.width, 1, device=self._trunk.device)
        nn.init.zeros_(self._head.weight)
        nn.init.zeros_(self._head.bias)
        ranks = trunk.ranks
        self._sharded_head = None if ranks.size == 1 else shard(self._head, ranks)
        learning = [*self._trunk.model.base_model.parameters(), *self._head.parameters()]
        self.optimizer = Optimizer(learning, settings.optim, total_steps)

    @classmethod
    def beside(cls, policy: Policy, settings: CriticSettings, total_steps: int | None = None) -> Critic:
        """A new one that begins where the policy stands."""
        return cls(settings, policy.twin(), total_steps)

    @classmethod
    def load(
        cls,
        folder: Path,
        settings: CriticSettings,
        model: ModelSettings,
        total_steps: int | None,
        ranks: Ranks = ALONE,
    ) -> Critic:
        """What `writer` wrote; the optimizer's state is not in it."""
        critic = cls(settings, Policy.restored(model, folder / _TRUNK, ranks), total_steps)
        own, stored = critic._head.state_dict(), load_file(folder / _HEAD)
        critic._head.load_state_dict({name: laid_out(stored[name], like) for name, like in own.items()})
        return critic

    def writer(self) -> Callable[[Path], None]:
        """What writes trunk (Hugging Face format) and head as they are now; on several ranks rank 0's alone does."""
        ranks = self._trunk.ranks
        trunk = self._trunk.whole_state()
        head = gathered_state(self._head, ranks)

        def write(folder: Path) -> None:
            self._trunk.save(folder / _TRUNK, trunk)
            save_file({name: tensor.contiguous() for name, tensor in head.items()}, folder / _HEAD)

        return write

    @property
    def nbytes(self) -> int:
        """Of its weights."""
        return sum(parameter.nbytes for parameter in (*self._trunk.parameters(), *self._head.parameters()))

    def values(self, micro: MicroBatch) -> Tensor:
        """What the state before each scored token is worth: float32 [N], with gradients."""
        wide_ND = self._trunk.hidden(micro).to(self._head.weight.dtype)
        values_N1: Tensor = (
            self._head(wide_ND)
            if self._sharded_head is None
            else self._sharded_head.use(lambda: self._head(wide_ND))
        )
        return values_N1[:, 0]

    @torch.no_grad()
    def look(self, micro: MicroBatch) -> Tensor:
        """The same of a row from anywhere, without gradients."""
        return self.values(micro.to(self._trunk.device))

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step towards the targets. Metrics: "value_loss", "value", "value_error" (mean |V - target|)."""
        self.optimizer.zero_grad()
        means = Means(self._trunk.device)
        for micro in level(batch.micro_batches, self._trunk.ranks):
            on_device = micro.to(self._trunk.device)
            old_N, targets_N = on_device.values_N, on_device.value_targets_N
            assert old_N is not None and targets_N is not None
            values_N = self.values(on_device)
            loss_N = value_loss(values_N, old_N, targets_N, self.settings.value_clip)
            (loss_N * on_device.weights_N).sum().backward()
            with torch.no_grad():
                error_N = (values_N - targets_N).abs()
                means.add({"value_loss": loss_N.detach(), "value": values_N.detach(), "value_error": error_N})
        report = self.optimizer.step()
        return means.values(self._trunk.ranks) | {
            "value_grad_norm": report.grad_norm,
            "value_skipped_step": 0.0 if report.applied else 1.0,
        }
