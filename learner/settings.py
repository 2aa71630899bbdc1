"""Everything about learning that a recipe can say; what computes is imported by whoever computes.

A command, the replay buffer and a rollout worker read these settings too, and need not wait for what learns.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from learner.algorithm.algorithm import AlgorithmSettings
from learner.algorithm.schedule import OptimSettings


class LoraSettings(BaseModel, extra="forbid", frozen=True):
    """Train a low-rank adapter; the model's own weights stay as they are."""

    rank: int = Field(
        default=8, gt=0, le=512, description="of the product B A that is learned beside a matrix"
    )
    alpha: int = Field(default=16, gt=0, description="the product is multiplied with alpha / rank")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear",
        min_length=1,
        description="names of the linear layers to adapt, such as q_proj; 'all-linear': every one but the head",
    )
    sync: Literal["merged", "adapter"] = Field(
        default="merged",
        description="what engines get: whole weights with the product added, or the adapter alone: little to send, "
        "more to compute for every token",
    )


class ModelSettings(BaseModel, extra="forbid", frozen=True):
    """Which model, and how it is computed."""

    path: str = Field(default="", description="folder of a Hugging Face checkpoint, or the id of one")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="precision of the matrix products; weights and optimizer state stay float32",
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where the learner computes")
    logit_block: int = Field(
        default=2**25,
        ge=1,
        description="logits held at a time, whatever vocabulary and length; bounds memory",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="recompute each layer in the backward pass: less memory, about a third more time",
    )
    lora: LoraSettings | None = Field(
        default=None, description="train a low-rank adapter; without this section every weight is trained"
    )


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
    store_advantages: bool = Field(
        default=True,
        description="keep the advantage of every trained token in RUN/advantages: 4 bytes a token, which "
        "buffer.disk_gib does not bound",
    )
    threads: int = Field(default=0, ge=0, description="CPU threads of torch; 0 leaves torch's own choice")
    ranks: int = Field(
        default=1, ge=1, description="processes that learn together, each with a part of every parameter"
    )
