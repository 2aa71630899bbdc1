"""Plain transformers behind the Engine protocol: slow and easy to follow, for tests and debugging.

Requests alternate token by token in the event loop. A weight sync therefore happens between two tokens, and running
requests continue with the new weights and the KV cache of the old ones, as in vLLM's in-flight update.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, UntypedStorage
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rollout.chat.perception import Perception
from rollout.engines.engine import (
    FINITE_PROBE,
    Completion,
    EngineFailed,
    EngineStart,
    FinishReason,
    Sampling,
    SleepLevel,
    derive_seed,
    require_awake,
    require_finite,
)
from rollout.engines.hf_routing import RoutingRecorder
from rollout.engines.settings import TransformersSettings
from rollout.wire.model_folder import ModelDamaged, pretrained, token_count
from rollout.wire.trajectory import Float32Array, UInt8Array
from rollout.wire.weights import (
    ByteArray,
    SyncReport,
    TensorSpec,
    WeightManifest,
    WeightMismatch,
    WeightUpdate,
)


async def start(start: EngineStart, settings: TransformersSettings) -> HfEngine:
    """Load the engine of a run."""
    return HfEngine.load(
        start.model,
        start.stop_token_ids,
        name=start.name,
        dtype=settings.dtype,
        trusted=start.trust_remote_code,
        routing=start.routing,
    )


class HfEngine:
    """One model on CPU. A request with a seed is reproducible: it depends on prompt, sampling and weights only.

    tokens: ids from this one on are never sampled, since no token has them. routing: completions have the experts of
    their tokens; ValueError for a model without. `version` is -1 until the first sync or
    `adopt_loaded`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stop_token_ids: Sequence[int],
        *,
        name: str = "hf",
        perception: Perception | None = None,
        tokens: int | None = None,
        routing: bool = False,
    ) -> None:
        self.name = name
        self.version = -1
        self._model = model.eval()
        self._stop = frozenset(stop_token_ids)
        self._perception = perception
        self._tokens = tokens
        self._routing = RoutingRecorder(model) if routing else None
        for parameter in model.parameters():
            if not parameter.untyped_storage().resizable():  # it is of a file's mapping
                parameter.data = parameter.data.clone()
        # A tied head appears once, under the embedding's name, as in a checkpoint.
        self._weights: dict[str, Tensor] = revert_weight_conversion(model, dict(model.named_parameters()))
        self._base: dict[str, Tensor] = {}  # matrices that an adapter changes, without it
        self._asleep = False  # until the first sync after it woke up
        self._kept: list[Tensor] = []  # weights of an engine that sleeps at level 1

    @classmethod
    def load(
        cls,
        path: str,
        stop_token_ids: Sequence[int],
        *,
        name: str = "hf",
        dtype: str = "float32",
        trusted: bool = False,
        routing: bool = False,
    ) -> Self:
        """Load a checkpoint folder. ModelDamaged for files that cannot be read.

        trusted: code that comes with the model may be executed.
        """
        perception = Perception.load(path, trusted)
        kind: Any = AutoModelForCausalLM if perception is None else AutoModelForImageTextToText
        try:
            model = pretrained(kind, path, trusted, dtype=getattr(torch, dtype))
            tokens = token_count(path)
        except (ValueError, RuntimeError, SafetensorError) as error:
            raise ModelDamaged(f"model {path} cannot be loaded: {str(error).splitlines()[0]}") from error
        return cls(model, stop_token_ids, name=name, perception=perception, tokens=tokens, routing=routing)

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, images: Sequence[str] = ()
    ) -> Completion:
        require_awake(self.name, self._asleep)
        context = self._model.config.get_text_config().max_position_embeddings
        if len(prompt_ids) + sampling.max_tokens > context:
            raise EngineFailed(
                f"{self.name}: {len(prompt_ids)} prompt tokens and max_tokens={sampling.max_tokens} exceed the model's "
                f"{context} positions; lower rollout.context_tokens"
            )
        random = _generator(prompt_ids, sampling)
        ids: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        routed: list[UInt8Array] = []
        new, cache = list(prompt_ids), None
        beside = self._perceived(prompt_ids, images)
        finish: FinishReason = "length"
        while len(ids) < sampling.max_tokens:
            logits_V, cache = self._forward(new, cache, **beside)
            if self._routing is not None:
                routed.append(self._routing.taken())
            token, logprob = _sample(logits_V, sampling, random)
            ids.append(token)
            logprobs.append(logprob)
            versions.append(self.version)
            if token in self._stop:
                finish = "stop"
                break
            new, beside = [token], _followed(beside)
            await asyncio.sleep(0)  # let other requests run
        return Completion(
            np.array(ids, dtype=np.int32),
            np.array(logprobs, dtype=np.float32),
            np.array(versions, dtype=np.int32),
            finish,
            np.concatenate(routed) if routed else None,
        )

    async def score(self, token_ids: Sequence[int]) -> Float32Array:
        require_awake(self.name, self._asleep)
        ids_T = torch.tensor(token_ids)
        with torch.no_grad():
            logprobs_TV = self._model(ids_T[None]).logits[0, :-1].float().log_softmax(-1)
        chosen_T = logprobs_TV.gather(-1, ids_T[1:, None])[:, 0]
        return np.asarray(chosen_T, dtype=np.float32)

    async def sync(self, update: WeightUpdate) -> SyncReport:
        """Verify names, shapes and checksums, copy the tensors in place, then check the probe."""
        began = time.perf_counter()
        shapes = self._wanted(update.manifest)
        update.manifest.require_names(shapes, self.name)
        self._require_shapes(update.manifest, shapes)
        update.verify()
        stalled = time.perf_counter()
        if self._asleep:
            await self.wake()
        self._load(update)
        self._prove(update)
        self.version, self._asleep = update.version, False
        seconds_stalled = time.perf_counter() - stalled
        probe = update.manifest.probe
        difference = probe.check(self.name, self.version, await self.score(probe.token_ids))
        seconds = time.perf_counter() - began
        return SyncReport(self.name, self.version, len(shapes), difference, seconds, seconds_stalled)

    async def adopt_loaded(self, version: int) -> None:
        """Give the loaded weights this version number. Raises WeightsNotFinite."""
        require_finite(self.name, await self.score(FINITE_PROBE))
        self.version = version

    async def sleep(self, level: SleepLevel) -> None:
        """Free the parameters' memory; each request has a KV cache of its own, which ends with it."""
        if self._asleep:
            return
        parameters = list(self._model.parameters())
        if level == 1:
            self._kept = [parameter.detach().clone() for parameter in parameters]
        for storage in _storages(parameters):
            storage.resize_(0)
        self._asleep = True

    async def wake(self) -> None:
        """Allocate the parameters' memory again: what it holds is undefined, or what it was before level 1."""
        for parameter in self._model.parameters():
            storage = parameter.untyped_storage()
            storage.resize_(max(storage.nbytes(), parameter.nbytes))
        for parameter, kept in zip(self._model.parameters() if self._kept else (), self._kept, strict=True):
            parameter.detach().copy_(kept)
        self._kept = []

    @property
    def weight_bytes(self) -> int:
        """Memory that the parameters take now."""
        return sum(storage.nbytes() for storage in _storages(self._model.parameters()))

    async def ping(self) -> None:
        pass  # it runs in the caller's process

    async def close(self) -> None:
        pass

    @torch.no_grad()
    def _forward(self, new_ids: Sequence[int], cache: Any, **beside: Tensor) -> tuple[Tensor, Any]:
        output = self._model(
            torch.tensor([new_ids]), past_key_values=cache, use_cache=True, logits_to_keep=1, **beside
        )
        logits_V = output.logits[0, -1].float()
        if self._perception is not None:  # a sampled placeholder would have no picture
            logits_V[self._perception.placeholder_id] = -torch.inf
        if self._tokens is not None:
            logits_V[self._tokens :] = -torch.inf
        return logits_V, output.past_key_values

    def _perceived(self, prompt_ids: Sequence[int], images: Sequence[str]) -> dict[str, Tensor]:
        """Inputs of the first pass beside ids: the pictures' features, and position ids of multimodal RoPE."""
        if not images:
            return {}
        if self._perception is None:
            raise EngineFailed(f"{self.name}: a request has a picture, but the model reads text only")
        self._perception.check(prompt_ids, images)
        beside = {name: torch.from_numpy(x) for name, x in self._perception.features(images).items()}
        positions_of = getattr(self._model.base_model, "get_rope_index", None)
        if positions_of is not None:
            ids = torch.tensor([list(prompt_ids)])
            grids = {name: grid for name, grid in beside.items() if name.endswith("grid_thw")}
            kinds = (ids == self._perception.placeholder_id).int()
            beside["position_ids"], _ = positions_of(ids, mm_token_type_ids=kinds, **grids)
        return beside

    def _wanted(self, manifest: WeightManifest) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that a version must have."""
        adapter = manifest.adapter
        if adapter is None:
            return {name: tuple(weight.shape) for name, weight in self._weights.items()}
        if missing := adapter.missing_from(self._weights):
            raise WeightMismatch(
                f"{self.name}: version {manifest.version} adapts {missing[0]}, which this model does not have"
            )
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in adapter.layers:
            out, width = self._weights[f"{layer}.weight"].shape
            a_name, b_name = adapter.tensor_names(layer)
            shapes |= {a_name: (adapter.rank, width), b_name: (out, adapter.rank)}
        return shapes

    def _require_shapes(self, manifest: WeightManifest, wanted: dict[str, tuple[int, ...]]) -> None:
        for spec in manifest.tensors:
            if spec.shape != wanted[spec.name]:
                raise WeightMismatch(
                    f"{self.name}: version {manifest.version}: tensor {spec.name} has shape {spec.shape}, the model's "
                    f"is {wanted[spec.name]}"
                )

    @torch.no_grad()
    def _load(self, update: WeightUpdate) -> None:
        tensors = {spec.name: _as_tensor(spec, array) for spec, array in update.tensors()}
        adapter = update.manifest.adapter
        if adapter is None:
            self._replace(tensors)
            return
        for layer in adapter.layers:
            weight_VD = self._weights[f"{layer}.weight"]
            base_VD = self._base.setdefault(layer, weight_VD.clone())
            a_RD, b_VR = (tensors[name].to(weight_VD.dtype) for name in adapter.tensor_names(layer))
            weight_VD.copy_(torch.addmm(base_VD, b_VR, a_RD, alpha=adapter.scale))

    def _replace(self, tensors: dict[str, Tensor]) -> None:
        """Copy whole weights, by their names in a checkpoint, into the model."""
        parameters = dict(self._model.named_parameters())
        held = {parameter.untyped_storage().data_ptr() for parameter in parameters.values()}
        if all(weight.untyped_storage().data_ptr() in held for weight in self._weights.values()):
            for name, tensor in tensors.items():
                self._weights[name].copy_(tensor)
            return
        # The model has another layout than its checkpoint, such as all experts in one tensor: transformers converts.
        model: Any = type(self._model)
        loaded = model.from_pretrained(
            None, config=self._model.config, state_dict=tensors, dtype=self._model.dtype
        )
        for name, parameter in parameters.items():
            parameter.copy_(loaded.get_parameter(name))

    def _prove(self, update: WeightUpdate) -> None:
        """Compare all of the model's tensors with those received; an adapter is verified by the probe only."""
        if update.manifest.adapter is not None:
            return
        live = revert_weight_conversion(self._model, dict(self._model.named_parameters()))
        for spec, array in update.tensors():
            if not torch.equal(live[spec.name], _as_tensor(spec, array).to(live[spec.name].dtype)):
                raise WeightMismatch(
                    f"{self.name}: version {update.version}: the model computes with another {spec.name} than was "
                    "received"
                )


def _storages(parameters: Iterable[Tensor]) -> list[UntypedStorage]:
    """The storages of parameters, each once."""
    return list({each.untyped_storage()._cdata: each.untyped_storage() for each in parameters}.values())


def _followed(beside: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of the next token's pass beside ids: the next position of multimodal RoPE."""
    positions = beside.get("position_ids")
    return {} if positions is None else {"position_ids": (positions.max() + 1).expand(3, 1, 1)}


def _generator(prompt_ids: Sequence[int], sampling: Sampling) -> torch.Generator:
    random = torch.Generator()
    if sampling.seed is None:
        random.seed()
    else:
        random.manual_seed(derive_seed(sampling.seed, hash(tuple(prompt_ids))))
    return random


def _sample(logits_V: Tensor, sampling: Sampling, random: torch.Generator) -> tuple[int, float]:
    """Sample one token; returns it with its logprob in the sampled distribution."""
    if sampling.temperature == 0:
        token = int(logits_V.argmax())
        return token, float(logits_V.log_softmax(-1)[token])
    logprobs_V = (logits_V / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        logprobs_V = _nucleus(logprobs_V, sampling.top_p)
    token = int(torch.multinomial(logprobs_V.exp(), 1, generator=random))
    return token, float(logprobs_V[token])


def _nucleus(logprobs_V: Tensor, top_p: float) -> Tensor:
    """The smallest set of most likely tokens with at least `top_p` of the mass, renormalised."""
    ordered_V, order_V = logprobs_V.exp().sort(descending=True)
    outside_V = ordered_V.cumsum(-1) - ordered_V >= top_p
    return logprobs_V.index_fill(0, order_V[outside_V], -torch.inf).log_softmax(-1)


def _as_tensor(spec: TensorSpec, array: ByteArray) -> Tensor:
    return torch.from_numpy(np.array(array)).view(getattr(torch, spec.dtype)).view(spec.shape)
