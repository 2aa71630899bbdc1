"""Published adapters in vLLM: options at its start, a folder for each version, a LoRA request with every prompt.

vLLM reads adapters from folders only. All versions have one id, and each replaces the one before. A request keeps its
id, and therefore continues under the version that is loaded, as it does when whole weights are replaced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import save_file
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest

from rollout.engines.vllm_weights import as_torch
from rollout.wire.adapter import CONFIG_FILE, TENSOR_FILE, AdapterSpec
from rollout.wire.weights import WeightUpdate

_ID, _NAME = 1, "policy"
PRESENT = LoRARequest(_NAME, _ID, lora_path="loaded by a sync")  # of requests: the version loaded last


def arguments(adapter: AdapterSpec) -> dict[str, Any]:
    """Engine arguments for an adapter; layers outside of it are not wrapped."""
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min(rank for rank in get_args(MaxLoRARanks) if rank >= adapter.rank),
        "lora_target_modules": sorted({layer.rpartition(".")[2] for layer in adapter.layers}),
    }


def write(update: WeightUpdate, folder: Path) -> LoRARequest:
    """Write a version into a folder; returns the request that loads it and replaces the one before."""
    adapter = update.manifest.adapter
    assert adapter is not None
    save_file({spec.name: as_torch(spec, array) for spec, array in update.tensors()}, folder / TENSOR_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(adapter.config()), encoding="utf-8")
    return LoRARequest(_NAME, _ID, lora_path=str(folder), load_inplace=True)
