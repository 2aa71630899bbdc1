"""How long generation stands still for a new weight version, and how many bytes a version has as a delta; prints JSON.

The real vLLM, busy with requests: every sync brings other weights through shared memory, and is proved as in a run:
names, checksums, version, probe. Deltas are those of 50 steps at a learning rate of 2e-5, of SmolLM2 where it is there;
of SmolLM2 is also told what each process of an engine copies that is divided over three, and what its checksums cost.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from deploy.assembly.build import load_tokenizer
from deploy.assembly.models import build_learner, model_path
from deploy.config.config import RunConfig
from learner.model.policy import Policy
from learner.settings import ModelSettings
from learner.training.publish import take_snapshot
from rollout.engines.engine import Sampling
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.verdicts import Verdicts
from rollout.wire.weights import SyncReport, WeightUpdate, write_memory
from tests.bench.deltas import follow
from tests.bench.player import recipe
from tests.smollm2 import FOLDER

SYNCS, WARM_UP, REQUESTS = 24, 3, 32
DELTAS, RATE = 50, 2e-5
DIVIDED = 3  # SmolLM2 has nine heads, three of keys and values


async def _keep_asking(engine: VllmEngine, prompt_ids: list[int], sampling: Sampling) -> None:
    while True:
        await engine.generate(prompt_ids, sampling)


def _perturb(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)


async def _sync(engine: VllmEngine, policy: Policy, version: int) -> SyncReport:
    _perturb(policy)
    snapshot = take_snapshot(policy, version, "float32")
    handle, _alive = write_memory(snapshot.arrays)
    return await engine.sync(WeightUpdate(snapshot.manifest, handle))


async def _measure(config: RunConfig, path: str) -> list[SyncReport]:
    policy = build_learner(config, path).policy
    stop = load_tokenizer(path).eos_token_id
    engine = await VllmEngine.start("rollout-0", path, [stop], config.rollout.context_tokens, config.engine)
    asking: list[asyncio.Task[None]] = []
    try:
        await _sync(engine, policy, 0)
        sampling = Sampling(max_tokens=config.sampling.max_tokens)
        asking = [asyncio.create_task(_keep_asking(engine, [1, 2 + n], sampling)) for n in range(REQUESTS)]
        reports = [await _sync(engine, policy, version) for version in range(1, WARM_UP + SYNCS + 1)]
        for task in asking:
            if task.done():
                task.result()
        return reports[WARM_UP:]
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await engine.close()


def _deltas(path: str, folder: Path) -> dict[str, float]:
    """Bytes of versions in bfloat16, and of those of their deltas; the first version has none."""
    sent = list(follow(Policy(ModelSettings(path=path)), DELTAS, RATE, folder))[1:]
    shares = [each.delta_bytes / each.whole_bytes for each in sent]
    return {
        "whole_mb": round(sent[0].whole_bytes / 1e6, 3),
        "delta_mb": round(statistics.median(each.delta_bytes for each in sent) / 1e6, 3),
        "delta_share": round(statistics.median(shares), 4),
        "delta_share_largest": round(max(shares), 4),
        "deltas_exact": sum(each.exact for each in sent),
        "publish_ms": round(1e3 * statistics.median(each.publish_s for each in sent), 1),
        "receive_ms": round(1e3 * statistics.median(each.receive_s for each in sent), 1),
    }


async def _shares(path: str) -> dict[str, float]:
    """What the processes of one engine copy of a version in bfloat16; its checksums, first and by the verdict."""
    policy = Policy(ModelSettings(path=path))
    snapshot = take_snapshot(policy, 0, "bfloat16")
    handle, _alive = write_memory(snapshot.arrays)
    update = WeightUpdate(snapshot.manifest, handle)
    settings = VllmSettings(dtype="bfloat16", kv_cache_gib=0.25, max_num_seqs=8, tensor_parallel_size=DIVIDED)
    engine = await VllmEngine.start("rollout-0", path, [0], 128, settings)
    try:
        await engine.sync(update)
        copied = await engine._llm.collective_rpc("copied_bytes")
    finally:
        await engine.close()
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            began = time.perf_counter()
            Verdicts(Path(folder) / "verdicts").verified(update)
            seconds.append(time.perf_counter() - began)
    return {
        "processes": DIVIDED,
        "copied_mb_each": round(max(copied) / 1e6, 3),
        "copied_mb_all": round(sum(copied) / 1e6, 3),
        "verify_ms": round(1e3 * seconds[0], 1),
        "verdict_ms": round(1e3 * seconds[1], 3),
    }


def main() -> dict[str, float]:
    """Median stall of a sync of the recipe's tiny model, in ms (target: at most 100), and figures of deltas."""
    config = recipe()
    with tempfile.TemporaryDirectory() as name:
        path = model_path(config, Path(name))
        reports = asyncio.run(_measure(config, path))
        deltas = _deltas(str(FOLDER) if FOLDER.is_dir() else path, Path(name))
        shares = asyncio.run(_shares(str(FOLDER))) if FOLDER.is_dir() else {}
    stalls = [1e3 * report.seconds_stalled for report in reports]
    return {
        "stall_ms": round(statistics.median(stalls), 1),
        "stall_ms_longest": round(max(stalls), 1),
        "sync_ms": round(statistics.median(1e3 * report.seconds for report in reports), 1),
        "syncs": len(stalls),
    } | (deltas | shares)


if __name__ == "__main__":
    print(json.dumps(main()))
