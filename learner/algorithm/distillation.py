"""On-policy distillation: the policy samples, and a teacher says how likely it would have sampled the same.

    signal of a sampled token = log pi_teacher - log pi        minus the k1 estimate of KL(pi || teacher)
    advantage of the token    = that of the rewards + coefficient * signal

The mean of signal * grad log pi over tokens that pi samples is the gradient of -KL(pi || teacher) in that state. A
policy-gradient loss therefore descends the reverse divergence in the states that the policy itself reaches; earlier
tokens get no credit for later ones. With `divergence` reverse or forward that of a token's whole distribution is a loss
of its own instead (`learner.model.divergence`), and advantages stay those of the rewards. Agarwal et al. 2024 (GKD), Gu
et al. 2024 (MiniLLM); as an advantage: Lu 2025, "On-Policy Distillation".
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, field_validator

from learner.algorithm.regularizers import divergence
from rollout.wire.trajectory import Float32Array


class DistillSettings(BaseModel, extra="forbid", frozen=True):
    """A teacher, held by the learner, that says of every sampled token how likely it would have been to sample it."""

    teacher: str = Field(
        min_length=1,
        description="model with the policy's tokenizer: a Hugging Face folder or id, a GGUF file, or the folder of a "
        "run (its newest checkpoint; with @VERSION that version's)",
    )
    coefficient: float = Field(
        default=1.0,
        gt=0,
        description="factor of the teacher's signal, nats, against advantages of rewards; with "
        "advantage.kind='none' there are no others",
    )
    divergence: Literal["sampled", "reverse", "forward"] = Field(
        default="sampled",
        description="what is learned from the teacher at a token. sampled: its logprob of that token less the "
        "policy's, as an advantage. reverse: KL(policy || teacher) over the whole vocabulary, as a loss; forward: "
        "KL(teacher || policy). The whole vocabulary says more of each token, and costs a pass of the teacher in "
        "each optimizer step",
    )

    @field_validator("teacher")
    @classmethod
    def _from_anywhere(cls, teacher: str) -> str:
        """A stored run finds a folder from wherever it is resumed."""
        folder, at, version = teacher.rpartition("@")
        if at and version.isdigit() and Path(folder).is_dir():
            return f"{Path(folder).absolute()}@{version}"
        return str(Path(teacher).absolute()) if Path(teacher).exists() else teacher


def signal(behavior_N: Float32Array, teacher_N: Float32Array) -> Float32Array:
    """Teacher's minus policy's logprob of each sampled token, both of the sampling temperature: float32 [N], nats.

    behavior_N: as recorded while sampling. Bounded at 20 nats either way (`divergence`).
    """
    return (
        -divergence(torch.from_numpy(behavior_N), torch.from_numpy(teacher_N), "k1")
        .numpy()
        .astype(np.float32)
    )
