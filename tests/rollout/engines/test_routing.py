"""Engines say which experts they chose for every token; the learner computes what they sampled with them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from learner.data.batch import row_of, sequences_of
from learner.model.policy import Policy
from learner.settings import ModelSettings
from learner.training.publish import take_snapshot
from rollout.engines.engine import Completion, Engine, EngineStart, Sampling
from rollout.engines.settings import TransformersSettings
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.schema import decode, encode
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory, Turn
from rollout.wire.weights import WeightUpdate, write_memory
from tests.families import build_family, shake

CONTEXT, LAYERS, CHOSEN = 192, 3, 3
# Prompts longer than a step are computed in parts.
VLLM = VllmSettings(
    dtype="float32", kv_cache_gib=0.25, max_num_seqs=4, args={"max_num_batched_tokens": 48, "block_size": 32}
)
ENGINES = [
    pytest.param(TransformersSettings(), id="transformers"),
    pytest.param(VLLM, id="vllm", marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
]
PROMPTS = [[3 + (place * 7 + length) % 20 for place in range(length)] for length in (5, 60, 60, 90)]


def _build(folder: Path) -> None:
    build_family("Qwen3-30B-A3B", False, folder, num_hidden_layers=LAYERS, num_experts_per_tok=CHOSEN)


def _nudged(folder: Path, by: float) -> None:
    """Let experts have nearly equal routers in pairs: of three that are chosen, the last is one of such a pair."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    for name, tensor in stored.items():
        if name.endswith("mlp.gate.weight"):
            tensor[1::2] = tensor[::2]
            tensor[::2] += by * torch.randn(tensor[::2].shape, generator=torch.Generator().manual_seed(1))
    save_file(stored, file, metadata={"format": "pt"})


def _with_engine(model: Path, settings: Any, use: Callable[[Engine], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        start = EngineStart("rollout-0", str(model), (1,), CONTEXT, routing=True)
        engine = await settings.start(start)
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def _chosen(folder: Path, ids: list[int]) -> np.ndarray:
    """Experts [T, L, K] that transformers' routers choose for the whole text at once, in order of their numbers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[int, np.ndarray] = {}

    def note(layer: int) -> Any:
        def noted(gate: nn.Module, given: Any, told: Any) -> None:
            found[layer] = told[2].sort(-1).values.numpy()

        return noted

    for name, module in model.named_modules():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.gate", name):
            module.register_forward_hook(note(int(match[1])))
    with torch.no_grad():
        model(torch.tensor([ids]))
    return np.stack([found[layer] for layer in range(LAYERS)], 1)


@pytest.mark.parametrize("settings", ENGINES)
def test_every_token_comes_with_the_experts_it_was_computed_by(settings: Any, tmp_path: Path) -> None:
    _build(tmp_path / "model")
    policy = Policy(ModelSettings(path=str(tmp_path / "model")))
    shake(policy.parameters())
    policy.save(tmp_path / "moved")
    snapshot = take_snapshot(policy, 1, "float32")
    handle, alive = write_memory(snapshot.arrays)

    async def use(engine: Engine) -> list[list[Completion]]:
        await engine.adopt_loaded(0)
        asked = Sampling(max_tokens=30)
        rounds = []
        for version in (0, 0, 1):  # the second finds the prompts computed
            if version:
                await engine.sync(WeightUpdate(snapshot.manifest, handle))
            rounds.append(await asyncio.gather(*(engine.generate(prompt, asked) for prompt in PROMPTS)))
        return rounds

    rounds = _with_engine(tmp_path / "model", settings, use)
    for folder, completions in zip(("model", "model", "moved"), rounds, strict=True):
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            ids = prompt + completion.token_ids.tolist()
            assert completion.routed_experts is not None
            experts = completion.routed_experts.reshape(len(ids) - 1, LAYERS, CHOSEN)
            np.testing.assert_array_equal(np.sort(experts, -1), _chosen(tmp_path / folder, ids[:-1]))
    del alive


@pytest.mark.parametrize("settings", ENGINES)
def test_where_experts_are_nearly_equal_the_learner_takes_the_engines(settings: Any, tmp_path: Path) -> None:
    for name, by in (("engine", 1e-6), ("learner", -1e-6)):
        _build(tmp_path / name)
        _nudged(tmp_path / name, by)
    task = Task.of("talk", 0)

    async def use(engine: Engine) -> Trajectory:
        """Two turns in one segment; the second prompt repeats the first turn."""
        await engine.adopt_loaded(0)
        turns: list[Turn] = []
        ids: list[int] = []
        for number, added in enumerate(PROMPTS[:2]):
            answer = await engine.generate([*ids, *added], Sampling(max_tokens=12))
            tokens = len(added) + len(answer.token_ids)
            assert answer.routed_experts is not None
            own = answer.routed_experts[-tokens:]
            first = np.zeros((tokens - len(own), own.shape[1]), np.uint8)
            turns.append(
                Turn(
                    number,
                    0,
                    json.dumps([{"role": "user", "content": ""}]),
                    "",
                    np.array(added, np.int32),
                    answer.token_ids,
                    answer.logprobs,
                    answer.versions,
                    0.0,
                    answer.finish_reason,
                    routed_experts=np.concatenate([first, own]),
                )
            )
            ids += [*added, *answer.token_ids.tolist()]
        return Trajectory(0, 0, 0, task, tuple(turns), EndReason.TERMINATED)

    played = _with_engine(tmp_path / "engine", settings, use)
    stored = decode(encode(Group(Slot(0, 0, task, 0), (played,)))).trajectories[0]
    sampled_N = np.concatenate([turn.behavior_logprobs for turn in played.turns])
    row = row_of(sequences_of(stored, np.ones(len(sampled_N), np.float32)))
    differences = {}
    for replays in (True, False):
        policy = Policy(ModelSettings(path=str(tmp_path / "learner"), router_replay=replays))
        with torch.no_grad():
            differences[replays] = np.abs(policy.score(row, 1.0)[0].numpy() - sampled_N)
    assert differences[True].max() < 1e-4
    assert differences[False].max() > 1e-2, "the learner's own routers choose other experts"
