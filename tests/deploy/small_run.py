"""Small whole runs for the tests of this folder, and what they left on disk read back independently."""

from __future__ import annotations

import asyncio
import io
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from deploy.assembly.build import EngineFactory, load_chat, load_tokenizer
from deploy.assembly.runtime import Runtime
from deploy.config.config import RunConfig
from deploy.config.load import load_config
from deploy.report.progress import Progress
from deploy.run.local import LocalRuntime
from deploy.run.train import Training
from learner.model.tokenizer import build_tokenizer
from learner.training.checkpoint import MODEL, OPTIMIZER, latest
from rollout.buffer.segments import read_rows
from rollout.engines.engine import Engine
from rollout.engines.hf_engine import HfEngine
from rollout.engines.scripted_engine import ScriptedEngine

RECIPE = str(Path(__file__).with_name("small.toml"))

Row = dict[str, Any]


def configured(*overrides: str) -> RunConfig:
    return load_config(RECIPE, overrides)


def with_experts(folder: Path) -> Path:
    """Write a mixture of experts with the tokens of the small run."""
    tokenizer = build_tokenizer(folder / "experts", ("left", "down", "right", "up"))
    shape = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1, "num_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3MoeConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape, **heads, **ends)
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "experts")
    return folder / "experts"


async def hf_engine(config: RunConfig, name: str, path: str) -> Engine:
    """The tiny model itself: what is sampled depends on prompt, seed and weights alone."""
    stops, routing = load_chat(path).stops, config.learner.model.router_replay
    return HfEngine.load(path, stops, name=name, routing=routing)


def late_engine(seed: int) -> EngineFactory:
    """An engine of random moves whose every answer lets the others go first a random number of times."""
    delays = Random(seed)

    async def latency() -> None:
        for _ in range(delays.choice((0, 1, 5, 200))):
            await asyncio.sleep(0)

    def move(prompt: str, rng: Random) -> str:
        return rng.choice(("left", "down", "down", "right", "right", "up"))

    async def start(config: RunConfig, name: str, path: str) -> Engine:
        return ScriptedEngine(load_tokenizer(path), move, latency=latency, name=name, record=False)

    return start


def train(
    config: RunConfig,
    folder: Path,
    engine: EngineFactory = hf_engine,
    *,
    resume: bool = False,
    ring_type: Callable[[RunConfig, Path, EngineFactory], Runtime] = LocalRuntime,
    stop_after: int | None = None,
) -> dict[str, object]:
    """Drive a run from end to end; with `stop_after` it is interrupted in the wait for the step after that many."""
    if not resume:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    torch.set_num_threads(1)
    ring = ring_type(config, folder, engine)
    if stop_after is not None:
        _stop(ring, stop_after)
    progress = Progress(config.steps, folder.name, Console(file=io.StringIO()))
    return asyncio.run(Training(config, ring, progress).run(resume))


class Stopped(Exception):
    """The driver was interrupted by the test."""


def _stop(ring: Any, after: int) -> None:
    step, done = ring.step, 0

    async def step_or_stop(
        number: int, before_publish: Awaitable[object] | None = None, saves: bool = False
    ) -> Row:
        nonlocal done
        if done == after:
            raise Stopped
        done += 1
        row: Row = await step(number, before_publish, saves)
        return row

    ring.step = step_or_stop


def parameters(folder: Path) -> dict[str, NDArray[np.uint32]]:
    """Weights and optimizer moments of a run's newest checkpoint, as bits."""
    newest = latest(folder)
    assert newest is not None
    weights = load_file(newest / MODEL / "model.safetensors")
    weights |= {k: v for k, v in load_file(newest / OPTIMIZER).items() if k.startswith("optimizers/policy")}
    return {name: array.view(np.uint32) for name, array in weights.items()}


def same_bits(left: Path, right: Path) -> bool:
    a, b = parameters(left), parameters(right)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def ledger(folder: Path, query: str) -> list[Any]:
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        return db.execute(query).fetchall()


def trained_rows(folder: Path) -> list[Row]:
    """Stored rows of the attempts that count, each with the version the learner stood at when it took them."""
    taken = {
        (group, attempt): version
        for group, attempt, version in ledger(folder, "SELECT group_id, attempt, taken_version FROM groups")
        if version is not None
    }
    rows = read_rows(folder / "groups").to_pylist()
    kept = [row for row in rows if (row["group_id"], row["attempt"]) in taken]
    return [row | {"taken_version": taken[row["group_id"], row["attempt"]]} for row in kept]


def largest_lag(folder: Path) -> int:
    return max(row["taken_version"] - min(row["versions"]) for row in trained_rows(folder))


def assert_balanced(folder: Path, config: RunConfig) -> None:
    """issued = trained + dropped + in flight, and what was trained is exactly what the steps took."""
    states = dict(ledger(folder, "SELECT state, count(*) FROM groups GROUP BY state"))
    issued = sum(states.values())
    trained, dropped = states.pop("trained", 0), states.pop("dropped", 0)
    assert issued == trained + dropped + sum(states.values())
    assert trained == config.steps * config.buffer.groups_per_step
    per_step = ledger(
        folder, "SELECT taken_version, count(*) FROM groups WHERE state = 'trained' GROUP BY 1 ORDER BY 1"
    )
    assert per_step == [(version, config.buffer.groups_per_step) for version in range(config.steps)]
