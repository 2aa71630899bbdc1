"""Engines that share the learner's GPU take what it leaves at its fullest, as `manta check` tells it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from transformers import AutoConfig

from deploy.assembly import build
from deploy.assembly.memory_plan import GIB, MemoryPlan, ModelFacts
from deploy.assembly.shared_gpu import beside_learner
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.load import load_config
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from rollout.engines.engine import EngineStart
from rollout.engines.vllm_start import VllmSettings
from tests.deploy.small_run import configured
from tests.qwen3 import QWEN3_06B

TWO = ("rollout.workers=2", "rollout.gpus_per_worker=0.3")


def _open(run: RunConfig) -> RunConfig:
    """Without a size of the KV cache."""
    return run.model_copy(update={"engine": run.engine.model_copy(update={"kv_cache_gib": None})})


@pytest.mark.parametrize("workers", [(), TWO], ids=["one engine", "two engines"])
def test_the_learner_at_its_fullest_and_all_engines_fill_a_gpu_but_a_twentieth(
    tmp_path: Path, workers: tuple[str, ...]
) -> None:
    run, gpu_bytes = _open(load_config("qwen3_gsm8k", workers)), 80 * GIB
    QWEN3_06B.write(tmp_path)
    plan = MemoryPlan.of(run, ModelFacts.of(AutoConfig.from_pretrained(tmp_path), run), gpu_bytes)
    engines = run.rollout.workers * plan.process("rollout worker").peak(on_host=False)
    learner = plan.process("learner").peak(on_host=False)
    assert engines + learner == pytest.approx(0.95 * gpu_bytes, rel=1e-6)
    engine = beside_learner(run, str(tmp_path), gpu_bytes)
    assert plan.cache is not None and engine.kv_cache_bytes(on_gpu=True) == plan.cache.nbytes
    # What vLLM wants to find free when it starts is there, whatever the learner has taken by then.
    assert run.rollout.workers * engine.memory_fraction * gpu_bytes + learner <= gpu_bytes


def test_a_learner_that_leaves_no_room_is_told_with_the_figures(tmp_path: Path) -> None:
    QWEN3_06B.write(tmp_path)
    with pytest.raises(ConfigError, match=r"a GPU of 16 GiB has no room for a KV cache; lower") as refused:
        beside_learner(_open(load_config("qwen3_gsm8k", [])), str(tmp_path), 16 * GIB)
    assert "\n" not in str(refused.value)


def test_a_worker_starts_its_engine_with_that_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[VllmSettings] = []

    async def start(self: VllmSettings, start: EngineStart) -> None:
        started.append(self)

    monkeypatch.setattr(VllmSettings, "start", start)
    monkeypatch.setattr(build, "gpu_bytes", lambda: 16 * GIB)
    build_tiny(tmp_path, build_tokenizer(tmp_path, ["left"]), layers=1, width=32, heads=2, mlp=48)
    shared = ("weights.transfer=ipc", "rollout.gpus_per_worker=0.5", "learner.model.device=cuda")
    asked = configured(*shared, "engine.kv_cache_gib=2")
    for run in (_open(asked), asked):
        asyncio.run(build.start_engine(run, "rollout-0", str(tmp_path)))
    derived, own = started
    assert derived == beside_learner(_open(asked), str(tmp_path), 16 * GIB)
    assert derived.kv_cache_gib is not None and 10 < derived.kv_cache_gib < 13
    assert own == asked.engine
