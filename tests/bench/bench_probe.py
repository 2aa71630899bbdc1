"""How surely a sync is refused that left an engine with other weights, and a sound one is not.

Prints a table (docs/reliability.md) and what was missed, then the shares over all of it as JSON.

The learner makes a step; an engine takes the version, and something goes wrong behind the checksums: a tensor is left
out, or is that of the version before, or has noise of 1% of its norm, or two layers change places. Twenty seeds choose
which, for the real SmolLM2 and two random families, engines and learners in float32 and bfloat16. Engines are
transformers'; the real vLLM serves SmolLM2 in bfloat16 and a random model in float32, and meets the same faults.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from learner.model.policy import Policy
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from learner.settings import ModelSettings
from learner.training.publish import Snapshot, take_snapshot
from rollout.engines.engine import Engine
from rollout.engines.hf_engine import HfEngine
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.weights import WeightMismatch, WeightUpdate, inline, write_memory
from tests.smollm2 import FOLDER

SEEDS = 20
SEEDS_OF_VLLM = {
    "smollm2": 5,
    "qwen3": SEEDS,
}  # a sync of SmolLM2 takes a second, and is made five times a seed
DTYPES = ("float32", "bfloat16")
FAULTS = ("dropped", "before", "noise", "swapped")
NOISE = 0.01  # of a tensor's norm
LEARNING_RATE = 2e-5  # what Adam moves every weight by in a step
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Sync:
    """One sync of the study: whose, of which kind, and how it was judged."""

    engine: str  # "transformers" or "vllm"
    model: str
    types: str  # the learner's and the engine's
    kind: str  # "correct" or a fault
    spoilt: str  # the first tensor with a fault
    right: bool  # a sound one passed, one with a fault was refused
    by_logprobs: bool = False  # the probe's logprobs alone refuse it


def model_folders(root: Path) -> dict[str, Path]:
    """SmolLM2 where it was made (`make llm`), and two random models: Qwen3, untied, and Llama, tied."""
    tokenizer = build_tokenizer(root / "qwen3", ("left", "down", "right", "up"))
    build_tiny(root / "qwen3", tokenizer, layers=4, width=64, heads=2, mlp=128, tie=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=8,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(root / "llama")
    tokenizer.save_pretrained(root / "llama")
    known = {"smollm2": FOLDER, "qwen3": root / "qwen3", "llama": root / "llama"}
    return {name: folder for name, folder in known.items() if folder.is_dir()}


@torch.no_grad()
def make_step(policy: Policy, seed: int) -> None:
    """Move every weight as far as a step of Adam does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        signs = torch.empty_like(parameter).uniform_(-1, 1, generator=generator).sign_()
        parameter.add_(signs, alpha=LEARNING_RATE)


def spoilt(fault: str, new: Tensors, old: Tensors, seed: int) -> Tensors:
    """The tensors of `new` that an engine has instead, with a fault of this kind; a dropped one is of zeros."""
    random = np.random.default_rng([seed, FAULTS.index(fault)])
    if fault == "swapped":
        layers = sorted({int(name.split(".")[2]) for name in new if name.startswith("model.layers.")})
        one, two = (f"model.layers.{layer}." for layer in random.choice(layers, 2, replace=False))
        places = {name: name.replace(one, two) for name in new if name.startswith(one)}
        return {name: new[there] for name, there in (places | {b: a for a, b in places.items()}).items()}
    # A tensor that a step has not changed, as the engine's type has it, is no fault.
    changed = [name for name in new if not torch.equal(new[name], old[name])]
    name = str(random.choice(changed))
    if fault == "dropped":
        return {name: torch.zeros_like(new[name])}
    if fault == "before":
        return {name: old[name]}
    noise = torch.randn(new[name].shape, generator=torch.Generator().manual_seed(seed))
    exact = new[name].float()
    return {name: (exact + noise * (NOISE * exact.norm() / noise.norm())).to(new[name].dtype)}


def tensors_of(snapshot: Snapshot) -> Tensors:
    """A version's tensors by name: copies, in the engine's type."""
    return {
        spec.name: torch.from_numpy(array.copy()).view(getattr(torch, spec.dtype)).view(spec.shape)
        for spec, array in zip(snapshot.manifest.tensors, snapshot.arrays, strict=True)
    }


async def refusals(engine: HfEngine, snapshot: Snapshot, update: WeightUpdate) -> tuple[bool, bool]:
    """Whether the engine, as it is now, would be refused: at all, and by the probe's logprobs alone."""
    probe = snapshot.manifest.probe
    by_tensors = by_logprobs = False
    try:
        engine._prove(update)
    except WeightMismatch:
        by_tensors = True
    try:
        probe.check(engine.name, update.version, await engine.score(probe.token_ids))
    except WeightMismatch:
        by_logprobs = True
    return by_tensors or by_logprobs, by_logprobs


async def study_transformers(name: str, folder: Path, learner: str, dtype: str, seeds: int) -> list[Sync]:
    """All faults, seed by seed, in an engine that took a version rightly."""
    study = partial(Sync, "transformers", name, f"{learner} > {dtype}")
    found: list[Sync] = []
    policy = Policy(ModelSettings(path=str(folder), dtype=learner))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    engine = HfEngine(model, [0])
    old = tensors_of(take_snapshot(policy, 0, dtype))
    for seed in range(seeds):
        make_step(policy, seed)
        snapshot = take_snapshot(policy, seed + 1, dtype)
        new = tensors_of(snapshot)
        update = WeightUpdate(snapshot.manifest, inline(snapshot.arrays))
        found.append(study("correct", "", await takes(engine, update)))
        for fault in FAULTS:
            wrong = spoilt(fault, new, old, seed)
            _write(engine, wrong)
            found.append(study(fault, min(wrong), *await refusals(engine, snapshot, update)))
            _write(engine, {name: new[name] for name in wrong})
        old = new
    return found


async def takes(engine: Engine, update: WeightUpdate) -> bool:
    """Whether the engine takes the version."""
    try:
        await engine.sync(update)
    except WeightMismatch:
        return False
    return True


@torch.no_grad()
def _write(engine: HfEngine, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        engine._weights[name].copy_(tensor)


def spoil_loading(worker: Any, fault: str, seed: int) -> None:
    """Runs in vLLM's worker: the next version's tensors go wrong on their way into the model, behind the checksums."""
    worker.worker._weight_update_active = (
        False  # a version that was refused ends a run; here another one follows
    )
    model = worker.model_runner.model
    load: Callable[..., Any] = type(model).load_weights
    kept: dict[str, Tensor] = getattr(model, "_loaded_before", {})

    def wrong(weights: Iterator[tuple[str, Tensor]]) -> Any:
        new = dict(weights)  # as they lie in the version's memory
        instead = spoilt(fault, new, kept, seed) if fault != "correct" else {}
        model._loaded_before = kept if instead else {name: tensor.clone() for name, tensor in new.items()}
        left_out = set(instead) if fault == "dropped" else set()
        return load(model, [(n, instead.get(n, tensor)) for n, tensor in new.items() if n not in left_out])

    model.load_weights = wrong


async def study_vllm(name: str, folder: Path, dtype: Any, seeds: int) -> list[Sync]:
    """The same in the real vLLM, whose worker loads the tensors wrongly; after each fault it loads them rightly."""
    study = partial(Sync, "vllm", name, f"float32 > {dtype}")
    found: list[Sync] = []
    policy = Policy(ModelSettings(path=str(folder)))
    settings = VllmSettings(dtype=dtype, kv_cache_gib=0.25, max_num_seqs=8)
    engine = await VllmEngine.start("rollout-0", str(folder), [0], 128, settings)
    old: Tensors = {}
    try:
        for seed in range(seeds):
            for kind in ("correct", *FAULTS) if seed else ("correct",):
                make_step(policy, 10 * seed + len(kind))
                snapshot = take_snapshot(policy, 10 * seed, dtype)
                new = tensors_of(snapshot)
                await engine._llm.collective_rpc(spoil_loading, args=(kind, seed))
                handle, _alive = write_memory(snapshot.arrays)
                took = await takes(engine, WeightUpdate(snapshot.manifest, handle))
                if kind == "correct":
                    found.append(study(kind, "", took))
                    old = new
                else:
                    found.append(study(kind, min(spoilt(kind, new, old, seed)), not took))
    finally:
        await engine.close()
    return found


def share(syncs: Iterable[Sync], verdict: str = "right") -> float:
    """Of these syncs."""
    return round(float(np.mean([getattr(sync, verdict) for sync in syncs])), 3)


def write_power(found: list[Sync]) -> None:
    """A row of Markdown for each engine, model and pair of types, then every sync that was judged wrongly."""
    print(
        "| engine | model | learner > engine |", " | ".join(f"{kind}" for kind in ("correct", *FAULTS)), "|"
    )
    print("|---" * (4 + len(FAULTS)) + "|")
    for subject in dict.fromkeys((sync.engine, sync.model, sync.types) for sync in found):
        cells = [
            [sync for sync in found if (sync.engine, sync.model, sync.types, sync.kind) == (*subject, kind)]
            for kind in ("correct", *FAULTS)
        ]
        counts = (f"{sum(sync.right for sync in cell)} of {len(cell)}" for cell in cells)
        print("|", " | ".join([*subject, *counts]), "|")
    for sync in found:
        if not sync.right:
            print(f"wrong: {sync}")


def main(seeds: int = SEEDS, with_vllm: bool = True) -> dict[str, float]:
    """Shares: of sound syncs that passed, and of each kind of fault that was refused."""
    torch.set_num_threads(1)
    found: list[Sync] = []
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a function is sent to vLLM's worker
    with tempfile.TemporaryDirectory() as root:
        folders = model_folders(Path(root))
        for name, folder in folders.items():
            for learner in DTYPES:
                for dtype in DTYPES:
                    found += asyncio.run(study_transformers(name, folder, learner, dtype, seeds))
        if with_vllm:
            for name, dtype in (("smollm2", "bfloat16"), ("qwen3", "float32")):
                if name in folders:
                    found += asyncio.run(study_vllm(name, folders[name], dtype, SEEDS_OF_VLLM[name]))
    write_power(found)
    figures: dict[str, float] = {"syncs": len(found)}
    for kind in ("correct", *FAULTS):
        figures[kind] = share(s for s in found if (s.engine, s.kind) == ("transformers", kind))
    for kind in FAULTS:
        for dtype in DTYPES:
            of_type = (
                s for s in found if s.kind == kind and s.types.endswith(f"> {dtype}") and s.engine != "vllm"
            )
            figures[f"{kind} by logprobs, {dtype}"] = share(of_type, "by_logprobs")
    if with_vllm:
        figures["vllm_correct"] = share(s for s in found if (s.engine, s.kind) == ("vllm", "correct"))
        figures["vllm_refused"] = share(s for s in found if s.engine == "vllm" and s.kind != "correct")
    return figures


if __name__ == "__main__":
    print(json.dumps(main()))
