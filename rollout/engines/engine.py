"""The engine interface: token ids in; sampled ids, logprobs and weight versions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from rollout.wire.adapter import AdapterSpec
from rollout.wire.policies import POLICY
from rollout.wire.trajectory import Float32Array, Int32Array, UInt8Array
from rollout.wire.weights import SyncReport, WeightManifest, WeightUpdate

if TYPE_CHECKING:
    from rollout.chat.perception import Perception

FinishReason = Literal["stop", "length"]


class EngineFailed(RuntimeError):
    """An engine could not answer a request: that episode fails, the worker continues."""


class WeightsNotFinite(ValueError):
    """A model's weights are NaN or infinite, as stored or in the engine's dtype."""


class EngineDied(RuntimeError):
    """The engine's process is gone: the worker ends, and its groups are reassigned."""


class Sampling(BaseModel):
    """Sampling of one turn. An engine gets the tokens that end a turn when it starts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(
        1.0,
        ge=0,
        description="temperature that divides the logits; stored logprobs include it, and the learner "
        "computes with the same value. 0 is greedy, for evaluations only: its logprobs are those of temperature 1",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus sampling: probability mass that is sampled from. Training requires 1, as a lower "
        "value removes tokens from the distribution",
    )
    max_tokens: int = Field(256, gt=0, description="most tokens sampled in one turn, the stop token included")
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="seed of a single request, derived by Manta from the run's seed; leave it unset in a "
        "recipe",
    )


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled turn. With finish_reason "stop" the last token is the stop token, which is trained like any other."""

    token_ids: Int32Array  # [A]
    logprobs: Float32Array  # [A] of the distribution sampled from (temperature included), nats
    versions: Int32Array  # [A] weight version that sampled each token
    finish_reason: FinishReason
    # uint8 [C-1, B]: the bytes of the experts of every token of prompt and answer but the last (`as_bytes`)
    routed_experts: UInt8Array | None = None


@dataclass(frozen=True, slots=True)
class EngineStart:
    """Arguments of a run for the engine that it starts."""

    name: str  # of the engine in errors and reports, e.g. "rollout-0"
    model: str  # Hugging Face folder whose weights it loads
    stop_token_ids: tuple[int, ...]  # each ends a turn and is the turn's last token
    context_tokens: int  # most tokens of a prompt and its answer together
    on_gpu: bool = False
    transfer: str = "object_store"  # weights.transfer of the recipe
    adapter: AdapterSpec | None = None  # versions are such adapters for the weights of `model`
    perception: Perception | None = None  # of a model with vision
    trust_remote_code: bool = False  # code in the model's folder may be executed
    routing: bool = False  # completions are to have their routed experts; of a mixture of experts
    policy: str = POLICY  # of the run, whose versions it is to hold
    sleeps: bool = False  # it will be told to sleep


@dataclass(frozen=True, slots=True)
class Placement:
    """Resources of an engine, and how it reads published weights."""

    device: Literal["any", "cpu", "gpu"]  # "gpu" needs rollout.gpus_per_worker above 0, "cpu" needs it at 0
    gpus: int = 0  # that one engine runs on, if it runs on GPUs; 0: those that its worker claims
    maps_weights: bool = False  # it maps them from shared memory; else it reads them within its process
    concurrent_requests: int = 16  # useful number of requests at once
    transfers: tuple[str, ...] = ("object_store",)  # supported values of weights.transfer
    tells_routing: bool = False  # it can record the experts of tokens
    half_adapters: bool = False  # on GPUs it multiplies adapters in half precision only
    sleeps: Literal["anywhere", "on_gpus"] | None = None  # where it is a `SleepingEngine`

    def unfit(self, gpus_per_worker: float) -> str:
        """Say why an engine cannot run with so many GPUs per worker; empty if it can."""
        if self.device == "cpu" and gpus_per_worker:
            return (
                f"it runs on CPUs, but rollout.gpus_per_worker={gpus_per_worker:g}; use 0 or another engine"
            )
        if self.device == "gpu" and not gpus_per_worker:
            return "it needs a GPU, but rollout.gpus_per_worker=0; give the workers one or use another engine"
        return ""


class Generates(Protocol):
    """The part of an engine that an agent uses. `name` and `version` may be plain attributes."""

    @property
    def name(self) -> str:
        """Name of the engine in errors and reports."""

    @property
    def version(self) -> int:
        """Version of the current weights."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, images: Sequence[str] = ()
    ) -> Completion:
        """Sample at least one and at most `sampling.max_tokens` tokens. Raises EngineFailed and EngineDied.

        images: data URLs of the pictures whose placeholders are in the prompt, in order. A placeholder is never
        sampled, nor an id beyond the tokenizer's (`rollout.wire.model_folder.token_count`): logprobs are of the
        distribution over all other tokens.
        """


class Engine(Generates, Protocol):
    """Samples from one version of the weights at a time, for many concurrent requests.

    `version` is -1 until the first sync or `adopt_loaded`. All methods are called from one event loop.
    """

    async def score(self, token_ids: Sequence[int]) -> Float32Array:
        """[T-1] logprob of every token after the first, at temperature 1."""

    async def sync(self, update: WeightUpdate) -> SyncReport:
        """Replace the weights and verify them; running requests continue with the new ones.

        Raises WeightMismatch if names, checksums or the probe differ, and EngineDied.
        """

    async def adopt_loaded(self, version: int) -> None:
        """Give the weights that were loaded at the start this version number, to evaluate a checkpoint.

        Raises WeightsNotFinite if their logprobs are not finite.
        """

    async def ping(self) -> None:
        """Return when the process with the weights has answered.

        Raises EngineDied if it is gone. A process that hangs never answers: the caller sets a time limit.
        """

    async def close(self) -> None:
        """End all processes of the engine; requests under way may fail."""


@runtime_checkable
class NativeTransfer(Protocol):
    """An engine that receives weights from GPU to GPU, in steps (weights.transfer nccl and ipc)."""

    async def open_transfer(self, init_info: dict[str, Any]) -> None: ...
    async def begin_update(self, manifest: WeightManifest) -> None: ...
    async def receive(self, update_info: Any) -> None: ...
    async def finish_update(self, manifest: WeightManifest) -> SyncReport: ...


SleepLevel = Literal[1, 2]


@runtime_checkable
class SleepingEngine(Protocol):
    """An engine that gives up its memory between two versions, to a learner on the same device (cluster.colocate).

    The levels are vLLM's: 1 keeps the weights in host memory, 2 discards them. The KV cache is discarded by both.
    """

    async def sleep(self, level: SleepLevel) -> None:
        """Give up weights and KV cache. Requests under way fail: there should be none."""

    async def wake(self) -> None:
        """Have memory for both again. A `sync`, which calls this first, must follow: until then requests fail."""


def sleeping(engine: Engine) -> SleepingEngine:
    """The engine as one that can sleep; RuntimeError if it cannot."""
    if not isinstance(engine, SleepingEngine):
        raise RuntimeError(f"{engine.name} cannot sleep: leave cluster.colocate out")
    return engine


def as_bytes(experts_CLK: NDArray[np.uint8 | np.uint16] | None) -> UInt8Array | None:
    """Bytes of the experts of tokens, as they are stored: uint8 [C, B] from numbers [C, L, K].

    uint16 for models of more than 256 experts, else uint8. L counts all layers: those without experts have zeros. The
    K experts of a layer are in any order.
    """
    return (
        None
        if experts_CLK is None
        else np.ascontiguousarray(experts_CLK.reshape(len(experts_CLK), -1)).view(np.uint8)
    )


def derive_seed(*parts: int) -> int:
    """Derive a seed in [0, 2**63) from all parts and their order, the same in every process."""
    digest = blake2b(b"".join(part.to_bytes(8, "little", signed=True) for part in parts), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def require_awake(name: str, asleep: bool) -> None:
    """Raise EngineFailed for a request to an engine that sleeps, or has woken up without a version."""
    if asleep:
        raise EngineFailed(f"{name} sleeps: it has no weights before its next version")


FINITE_PROBE = tuple(range(8))  # tokens that are scored once, to check that logprobs are finite


def require_finite(name: str, logprobs: Float32Array) -> None:
    """Raise WeightsNotFinite unless all are finite: an engine with NaN weights samples one token, without an error."""
    if not np.isfinite(logprobs).all():
        raise WeightsNotFinite(
            f"{name}: the model's logprobs are not finite; its weights have NaN or infinite values"
        )
