"""Settings of the optimizer, and the learning rate of every step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, Field

Decay = Annotated[float, Field(ge=0, lt=1)]  # of a moment; 1 would ignore new gradients


class OptimSettings(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """AdamW (Loshchilov & Hutter 2019) and its schedule."""

    learning_rate: float = Field(default=1e-6, gt=0, description="peak learning rate")
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.999), description="decay rates of AdamW's first and second moments"
    )
    eps: float = Field(
        default=1e-8,
        gt=0,
        description="constant added to the root of the second moment, for numerical stability",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="decoupled weight decay; applied to matrices, never to vectors (biases, norms)",
    )
    max_grad_norm: float = Field(
        default=1.0,
        gt=0,
        description="gradient clipping: largest 2-norm of the gradient; larger ones are scaled down",
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="optimizer steps in which the learning rate rises linearly to its peak; 0: no warm-up",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="shape of the learning rate after the warm-up: constant, or falling until the last step",
    )
    final_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="learning rate at the end of a falling schedule, as a fraction of the peak",
    )
    moments: Literal["float32", "8bit"] = Field(
        default="float32",
        description="data type of AdamW's moments. 8bit: about 2 bytes a parameter instead of 8, by block-wise dynamic "
        "quantization (Dettmers et al. 2022, as 8-bit Adam in bitsandbytes); vectors and tensors of fewer than 4,096 "
        "numbers stay in float32. A run may be continued with the other type. On a CPU a step takes longer",
    )
    offload: bool = Field(
        default=False,
        description="keep AdamW's moments, 8 bytes a parameter (2 in 8 bits), in host memory instead of on the GPU. "
        "Every update moves them there and back, 16 bytes a parameter (4). Results and checkpoints do not change. "
        "On a CPU there is nothing to gain",
    )


def learning_rate(settings: OptimSettings, step: int, total_steps: int | None = None) -> float:
    """Learning rate of a step, counted from 0. total_steps: the step at which a falling schedule ends.

    ValueError for a falling schedule without an end, or with an end inside the warm-up; where no step is made (0) any
    schedule will do.
    """
    falls = settings.schedule != "constant" and total_steps != 0
    if falls and (total_steps is None or total_steps <= settings.warmup_steps):
        raise ValueError(
            f"schedule {settings.schedule!r} falls from step {settings.warmup_steps} (warmup_steps) to the last one, "
            f"{total_steps}: there must be steps between them"
        )
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if not falls or not total_steps:
        return settings.learning_rate
    done = min(1.0, (step - settings.warmup_steps) / (total_steps - settings.warmup_steps))
    falling = 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.learning_rate * (settings.final_share + (1.0 - settings.final_share) * falling)
