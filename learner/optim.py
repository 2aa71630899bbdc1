"""AdamW with a learning-rate schedule, a bounded gradient norm, and no step on non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from learner.shards import gathered, laid_out


class OptimSettings(BaseModel, extra="forbid", frozen=True):
    """AdamW (Loshchilov & Hutter 2019) and its schedule."""

    learning_rate: float = Field(default=1e-6, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.999), description="decay of the gradient's first and second moments"
    )
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        default=0.0, ge=0, description="decoupled decay of matrices; vectors are never decayed"
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="gradients of a larger 2-norm are scaled down to it"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear rise to the peak")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="what follows the warm-up"
    )
    final_share: float = Field(
        default=0.0, ge=0, le=1, description="share of the peak that a falling schedule ends at"
    )


def learning_rate(settings: OptimSettings, step: int, total_steps: int | None = None) -> float:
    """Learning rate of the step with this index, counted from 0; `total_steps` is where a falling schedule ends.

    Raises ValueError for a falling schedule without an end, or with one inside the warm-up.
    """
    if settings.schedule != "constant" and (total_steps is None or total_steps <= settings.warmup_steps):
        raise ValueError(
            f"schedule {settings.schedule!r} falls from step {settings.warmup_steps} (warmup_steps) to the last one, "
            f"{total_steps}: there must be steps between them"
        )
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant" or total_steps is None:
        return settings.learning_rate
    done = min(1.0, (step - settings.warmup_steps) / (total_steps - settings.warmup_steps))
    falling = 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.learning_rate * (settings.final_share + (1.0 - settings.final_share) * falling)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did."""

    grad_norm: float  # 2-norm before scaling
    learning_rate: float
    applied: bool  # False: the norm was not finite, and nothing was changed


class Optimizer:
    """AdamW over a model's trainable parameters. `steps` counts applied steps and drives the schedule."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], settings: OptimSettings, total_steps: int | None = None
    ) -> None:
        learning_rate(settings, 0, total_steps)  # a schedule that cannot be followed fails here, not mid-run
        self.settings = settings
        self._total_steps = total_steps
        self.steps = 0
        self._parameters = [p for p in parameters if p.requires_grad]
        matrices = [p for p in self._parameters if p.ndim >= 2]
        vectors = [p for p in self._parameters if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )

    def zero_grad(self) -> None:
        """Set every gradient to zeros.

        Zeros, not None: a batch without any gradient must still decay the moments, so that leaving sequences
        without advantage out of the forward pass changes nothing.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])

    def step(self, finite: bool = True) -> StepReport:
        """Scale the gradients down to max_grad_norm and apply them.

        The step is skipped where the norm is not finite, or the caller's loss was not.
        """
        grads: list[Tensor] = [p.grad for p in self._parameters if p.grad is not None]
        rate = learning_rate(self.settings, self.steps, self._total_steps)
        norm = float(gathered(nn.utils.get_total_norm(grads)))  # of all ranks
        if not (finite and math.isfinite(norm)):
            return StepReport(norm, rate, applied=False)
        if norm > self.settings.max_grad_norm:
            torch._foreach_mul_(grads, self.settings.max_grad_norm / norm)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self.steps += 1
        return StepReport(norm, rate, applied=True)

    def state_dict(self) -> dict[str, Any]:
        """Moments and step count, as torch.save takes them.

        Moments of parameters that lie over several ranks lie there too: see `learner.shards.gathered_tree`.
        """
        return {"adamw": self._adamw.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from whole tensors of an optimizer over the same parameters, keeping own settings."""
        own = [{k: v for k, v in group.items() if k != "params"} for group in self._adamw.param_groups]
        parameters = [p for group in self._adamw.param_groups for p in group["params"]]
        moments = {
            place: {
                name: laid_out(tensor, parameters[place]) if tensor.ndim else tensor
                for name, tensor in entry.items()
            }
            for place, entry in state["adamw"]["state"].items()
        }
        self._adamw.load_state_dict(state["adamw"] | {"state": moments})
        for group, options in zip(self._adamw.param_groups, own, strict=True):
            group.update(options)
        self.steps = int(state["steps"])
