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
        default=8,
        gt=0,
        le=512,
        description="rank of the adapter: inner dimension of the product B A added to each adapted matrix",
    )
    alpha: int = Field(
        default=16, gt=0, description="scale of the adapter: the product is multiplied by alpha / rank"
    )
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear",
        min_length=1,
        description='linear layers and experts that are adapted, by name ("q_proj", "gate_up_proj"); "all-linear" '
        "adapts every one except the output head and routers",
    )
    sync: Literal["merged", "adapter"] = Field(
        default="merged",
        description="what is sent to the engines. merged: full weights with the adapter added. adapter: only "
        "the adapter, which is much smaller to send but adds work to every sampled token",
    )
    quantize_base: Literal["nf4"] | None = Field(
        default=None,
        description="store the frozen linear layers, except the output head, in fewer bits (QLoRA). nf4: 4-bit "
        "NormalFloat with double quantization, 4.13 bits a weight, dequantized for every product: a quarter of the "
        'memory of bfloat16, and a slower step. Not set: the type of products. Needs sync="merged"',
    )


class ModelSettings(BaseModel, extra="forbid", frozen=True):
    """Which model, and how it is computed."""

    path: str = Field(
        default="",
        description="model to train: a Hugging Face folder, an id of the Hugging Face hub (owner/name, with an "
        "optional @revision), or a GGUF file, which is converted to float32 once; empty only with the section tiny",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="execute Python code that comes with the model's repository, in every process of the run. "
        "Needed by families that transformers does not have; read the code first",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="data type of matrix products. Weights, gradients and optimizer state stay float32 in "
        "either case. Not set in a recipe for CPUs whose model is a checkpoint: bfloat16 where the processor "
        "multiplies it, as `manta doctor` says",
    )
    float8: bool = Field(
        default=False,
        description="multiply in 8-bit floating point in the linear layers, except the output head and routers: e4m3 "
        "forward, e5m2 for gradients, one scale a tensor found at every use. Needs dtype bfloat16, in which all else "
        "is computed, and a GPU of compute capability 8.9 or later (Ada, Hopper); not with lora. On a CPU it is slow",
    )
    compile: bool = Field(
        default=False,
        description="compile the layers with torch.compile: what lies between matrix products becomes few kernels. "
        "The first rows take up to a minute longer. Needs a C++ compiler, on GPUs also triton; not for mixtures of "
        "experts, nor with selective recomputation. Results differ by rounding alone",
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="device that the learner computes on")
    logit_block: int = Field(
        default=2**25,
        ge=1,
        description="most logits (tokens x vocabulary) held in memory at once. Lower it if the learner runs "
        "out of memory; results do not change",
    )
    gradient_checkpointing: bool | Literal["selective"] = Field(
        default=False,
        description="recompute activations in the backward pass. true: of whole layers, least memory and about a "
        'third more time. "selective": of what lies between matrix products and attention, whose results are kept',
    )
    router_balance: float = Field(
        default=0.0,
        ge=0.0,
        description="coefficient of the load-balancing loss of a mixture of experts, over all tokens of an optimizer "
        "step; costs a forward pass more. 0: none, as the engine's routing is what is trained on; published "
        "configurations pretrain with 0.001",
    )
    router_replay: bool = Field(
        default=False,
        description="of a mixture of experts, compute every token with the experts that the engine chose for it while "
        "sampling, which are then stored with it. They differ from the learner's by rounding; false is right for any "
        "other model. Costs layers x experts a token bytes for every token (twice that beyond 256 experts)",
    )
    expert_parallel: bool = Field(
        default=False,
        description="of a mixture of experts over several ranks, leave every expert on the rank that holds it and send "
        "it the tokens (all-to-all), instead of gathering all experts for every packed row. `manta check` shows the "
        "bytes exchanged for a row: compare them for true and false. The ranks that parameters are sharded over must "
        "divide the number of experts. Results differ by rounding alone",
    )
    sum_gradients: Literal["row", "step"] | None = Field(
        default=None,
        description="when several ranks sum their gradients. row: after every packed row, each rank keeping its "
        "part. step: once an optimizer step, which exchanges less; until then each rank keeps whole gradients in "
        "float32. Not set: step if `manta check` says that it fits into memory. Results do not change",
    )
    lora: LoraSettings | None = Field(
        default=None, description="train a low-rank adapter (LoRA) instead of all weights"
    )

    def require_consistent(self) -> None:
        """ValueError, one line, for options that exclude each other."""
        if self.float8 and self.dtype != "bfloat16":
            raise ValueError(
                f"learner.model.float8=true multiplies numbers of dtype bfloat16; set learner.model.dtype, now "
                f"{self.dtype!r}, to 'bfloat16'"
            )
        if self.float8 and self.lora is not None:
            raise ValueError(
                "learner.model.float8=true trains all weights; leave out learner.model.lora, or set float8=false"
            )
        if self.compile and self.gradient_checkpointing == "selective":
            raise ValueError(
                "learner.model.gradient_checkpointing='selective' keeps what single operators gave, and a compiled "
                "layer has others; set it to true or false, or compile=false"
            )
        if self.compile and self.quantized:
            raise ValueError(
                "learner.model.compile=true does not compile a base in few bits; leave out "
                "learner.model.lora.quantize_base, or set compile=false"
            )

    @property
    def quantized(self) -> bool:
        """Whether an adapter's frozen base is stored in few bits."""
        return self.lora is not None and self.lora.quantize_base is not None

    @property
    def beside(self) -> ModelSettings:
        """Settings of another model that is computed beside the policy, and routes by itself."""
        return self.model_copy(update={"router_replay": False})


class LearnerSettings(BaseModel, extra="forbid", frozen=True):
    """Everything about learning."""

    model: ModelSettings = Field(
        default=ModelSettings(), description="model to train, and how it is computed"
    )
    optim: OptimSettings = Field(
        default=OptimSettings(),
        description="optimizer of reinforcement learning: AdamW and its learning-rate schedule",
    )
    algorithm: AlgorithmSettings = Field(
        default=AlgorithmSettings(),
        description="what is optimized: advantage, loss, aggregation, corrections and regularizers",
    )
    tokens_per_microbatch: int = Field(
        default=4096,
        ge=1,
        description="tokens per forward and backward pass, those that sequences share counted once; gradients are "
        "accumulated over all passes. Lower it if the learner runs out of memory; the result does not change",
    )
    store_advantages: bool = Field(
        default=True,
        description="store the advantage of every trained token in RUN/advantages, 4 bytes a token. "
        "buffer.disk_gib does not bound this folder",
    )
    threads: int = Field(default=0, ge=0, description="CPU threads of torch; 0 keeps torch's default")
    ranks: int = Field(
        default=1,
        ge=1,
        description="learner processes that train together; parameters, gradients and optimizer state are "
        "sharded over them (FSDP)",
    )
    sharded_over: int | None = Field(
        default=None,
        ge=2,
        description="ranks that parameters are sharded over, a divisor of ranks: as many as a node has GPUs keep the "
        "gathering of weights within nodes, and each node then holds a whole copy (hybrid sharding). Not set: all "
        "ranks. Results do not change",
    )

    context_parallel_size: int = Field(
        default=1,
        ge=1,
        description="consecutive ranks that compute one packed row together, each a slice of its tokens (Ulysses), for "
        "rows whose activations do not fit on one GPU. A divisor of ranks and of the model's attention heads. These "
        "ranks take the same groups, so that ranks / context_parallel_size rows are computed at a time. 1: every rank "
        "computes rows of its own. Results do not change",
    )

    @property
    def shares(self) -> int:
        """Parts that the groups of a step are divided into: ranks that compute a row together have one."""
        return self.ranks // self.context_parallel_size

    @property
    def shares_option(self) -> str:
        """What `shares` is called where a number of groups does not fit it."""
        return "learner.ranks" if self.context_parallel_size == 1 else "learner.ranks / context_parallel_size"

    @property
    def shards(self) -> int:
        """Parts that parameters are divided into."""
        return self.sharded_over or self.ranks

    @property
    def travels(self) -> bool:
        """Whether experts stay on their ranks, and tokens travel to them."""
        return self.model.expert_parallel and self.shards > 1
