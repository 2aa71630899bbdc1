"""What an agent asks of whatever holds the weights: token ids in; ids, logprobs and weight versions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from rollout.wire.adapter import AdapterSpec
from rollout.wire.trajectory import Float32Array, Int32Array
from rollout.wire.weights import SyncReport, WeightManifest, WeightUpdate

if TYPE_CHECKING:
    from rollout.chat.perception import Perception

FinishReason = Literal["stop", "length"]


class EngineFailed(RuntimeError):
    """An engine could not answer a request. It costs the episode that asked, never the worker."""


class WeightsNotFinite(ValueError):
    """A model whose weights, or what an engine's type makes of them, are NaN or infinite."""


class EngineDied(RuntimeError):
    """The engine itself is gone, and whoever uses it ends. It costs no episode: its groups are handed on."""


class Sampling(BaseModel):
    """How one turn is sampled. Which tokens end a turn is the engine's to know, given when it is built."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(1.0, gt=0, description="divides the logits; behavior logprobs include it")
    top_p: float = Field(
        1.0, gt=0, le=1, description="nucleus; below 1 it changes the support: not for training"
    )
    max_tokens: int = Field(256, gt=0, description="most tokens sampled in one turn, the stop token included")
    seed: int | None = Field(None, ge=0, lt=2**63, description="of one request; None: not reproducible")


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled turn. A turn that ended by itself ends with its stop token, which is trained like any other."""

    token_ids: Int32Array  # [A]
    logprobs: Float32Array  # [A] of the distribution sampled from (temperature included), nats
    versions: Int32Array  # [A] weight version that sampled each token
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class EngineStart:
    """Everything a run tells an engine that it starts."""

    name: str  # of the engine in errors and reports, e.g. "rollout-0"
    model: str  # Hugging Face folder or id whose weights it loads
    stop_token_ids: tuple[int, ...]  # each ends a turn and is the turn's last token
    context_tokens: int  # most tokens of a prompt and its answer together
    on_gpu: bool = False
    transfer: str = "object_store"  # how weights travel: weights.transfer of the recipe
    adapter: AdapterSpec | None = None  # versions are such adapters for what `model` holds
    perception: Perception | None = None  # of a model that sees pictures


@dataclass(frozen=True, slots=True)
class Placement:
    """What engines of some settings take of a machine, and where they read published weights."""

    device: Literal["any", "cpu", "gpu"]  # "gpu" needs rollout.gpus_per_worker above 0, "cpu" needs it at 0
    gpus: int = 1  # that one engine spans, where it runs on them
    maps_weights: bool = (
        False  # from memory that other processes can map; else where they lie in this process
    )
    concurrent_requests: int = 16  # that are worth sending at once
    transfers: tuple[str, ...] = ("object_store",)  # values of weights.transfer that it takes
    half_adapters: bool = False  # on GPUs it multiplies adapters in half precision only

    def unfit(self, gpus_per_worker: float) -> str:
        """Say why an engine cannot run with so many GPUs a worker; empty where it can."""
        if self.device == "cpu" and gpus_per_worker:
            return (
                f"it runs on CPUs, but rollout.gpus_per_worker={gpus_per_worker:g}; use 0 or another engine"
            )
        if self.device == "gpu" and not gpus_per_worker:
            return "it needs a GPU, but rollout.gpus_per_worker=0; give the workers one or use another engine"
        return ""


class Generates(Protocol):
    """What an agent asks of an engine. Plain attributes serve as `name` and `version`."""

    @property
    def name(self) -> str:
        """Names the engine in errors and reports."""
        ...

    @property
    def version(self) -> int:
        """The version of the weights that sample now."""
        ...

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, images: Sequence[str] = ()
    ) -> Completion:
        """Sample at least one and at most `sampling.max_tokens` tokens. Raises EngineFailed and EngineDied.

        images: data URLs of the pictures whose placeholders stand in the prompt, in order. A placeholder is never
        sampled: logprobs are of the distribution over all other tokens.
        """
        ...


class Engine(Generates, Protocol):
    """Holds one version of the weights at a time and samples from it, many requests at once.

    `version` is -1 until the first sync or `adopt_loaded`. All methods are called from one event loop.
    """

    async def score(self, token_ids: Sequence[int]) -> Float32Array:
        """[T-1] logprob of every token after the first, at temperature 1."""
        ...

    async def sync(self, update: WeightUpdate) -> SyncReport:
        """Replace the weights and prove it; requests that are running go on under the new ones.

        Raises WeightMismatch where names, checksums or the probe disagree, and EngineDied.
        """
        ...

    async def adopt_loaded(self, version: int) -> None:
        """Call the weights that were loaded at the start `version`: for evaluating a checkpoint.

        Raises WeightsNotFinite where they give logprobs that are no numbers.
        """
        ...

    async def ping(self) -> None:
        """Return when the process that holds the weights has answered.

        Raises EngineDied where it is gone. One that hangs never answers: the limit is the caller's.
        """
        ...

    async def close(self) -> None:
        """Stop everything that was started; requests under way may fail."""
        ...


@runtime_checkable
class NativeTransfer(Protocol):
    """An engine that weights reach from GPU to GPU, step by step (weights.transfer nccl and ipc)."""

    async def open_transfer(self, init_info: dict[str, Any]) -> None: ...
    async def begin_update(self, manifest: WeightManifest) -> None: ...
    async def receive(self, update_info: Any) -> None: ...
    async def finish_update(self, manifest: WeightManifest) -> SyncReport: ...


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2**63) that depends on every part and on their order, the same in every process."""
    digest = blake2b(b"".join(part.to_bytes(8, "little", signed=True) for part in parts), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


FINITE_PROBE = tuple(range(8))  # tokens that are scored once to see whether a model computes numbers at all


def require_finite(name: str, logprobs: Float32Array) -> None:
    """Raise WeightsNotFinite unless all are numbers: such an engine samples without complaint, one token for ever."""
    if not np.isfinite(logprobs).all():
        raise WeightsNotFinite(f"{name}: the model's logprobs are not finite numbers")
