"""Adapters in vLLM: options at its start, a folder for each adapter, a LoRA request with every prompt.

vLLM reads adapters from folders only. Of a published adapter all versions have one id, and each replaces the one
before. A request keeps its id, and therefore continues under the version that is loaded, as it does when whole weights
are replaced. Adapters that are served side by side have an id each, and stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, get_args

from safetensors.torch import save_file
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest

from rollout.engines.engine import Completion, Generates, Sampling
from rollout.engines.vllm_process import CallFailed
from rollout.engines.vllm_weights import as_torch
from rollout.wire.adapter import CONFIG_FILE, TENSOR_FILE, AdapterSpec
from rollout.wire.weights import WeightUpdate

_ID, _NAME = 1, "policy"
PRESENT = LoRARequest(_NAME, _ID, lora_path="loaded by a sync")  # of requests: the version loaded last


def arguments(adapters: Sequence[AdapterSpec]) -> dict[str, Any]:
    """Engine arguments for adapters that are loaded at once; layers outside of all of them are not wrapped."""
    largest = max(adapter.rank for adapter in adapters)
    return {
        "enable_lora": True,
        "max_loras": len(adapters),
        "max_lora_rank": min(rank for rank in get_args(MaxLoRARanks) if rank >= largest),
        "lora_target_modules": sorted(
            {layer.rpartition(".")[2] for adapter in adapters for layer in adapter.layers}
        ),
    }


def write(update: WeightUpdate, folder: Path) -> LoRARequest:
    """Write a version into a folder; returns the request that loads it and replaces the one before."""
    adapter = update.manifest.adapter
    assert adapter is not None
    save_file({spec.name: as_torch(spec, array) for spec, array in update.tensors()}, folder / TENSOR_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(adapter.config()), encoding="utf-8")
    return LoRARequest(_NAME, _ID, lora_path=str(folder), load_inplace=True)


async def loaded_beside(
    folders: Mapping[str, Path], load: Callable[[LoRARequest], Awaitable[Any]]
) -> dict[str, LoRARequest]:
    """Load adapters from their folders, to stay; the requests to compute with each, by name.

    load: asks vLLM to load one. ValueError for an adapter that it refuses.
    """
    found = {}
    for number, (name, folder) in enumerate(folders.items(), _ID):
        found[name] = LoRARequest(name, number, lora_path=str(folder))
        try:
            await load(found[name])
        except CallFailed as error:
            raise ValueError(f"adapter {name!r} in {folder} is refused by vLLM: {error}") from error
    return found


class ServesAdapters(Generates, Protocol):
    """An engine that computes every request with an adapter of its own."""

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        images: Sequence[str] = (),
        *,
        adapter: str | None = None,
    ) -> Completion:
        """Sample as `Generates` does, with the adapter of this name."""


class WithAdapter:
    """An engine as an agent of one of its adapters sees it (`Generates`)."""

    def __init__(self, engine: ServesAdapters, adapter: str) -> None:
        self._engine = engine
        self._adapter = adapter

    @property
    def name(self) -> str:
        """Names of engine and adapter."""
        return f"{self._engine.name}/{self._adapter}"

    @property
    def version(self) -> int:
        """Version of the engine's weights."""
        return self._engine.version

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, images: Sequence[str] = ()
    ) -> Completion:
        """Sample with the adapter."""
        return await self._engine.generate(prompt_ids, sampling, images, adapter=self._adapter)
