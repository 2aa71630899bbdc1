"""Tiny models: one that can play, the recipe's, fine-tuned shortly (one that says anything ends its episodes soon),
and one that nobody taught.
"""

from __future__ import annotations

from pathlib import Path

from deploy.assembly.models import build_learner, model_path
from deploy.assembly.stage_data import gather
from deploy.config.config import RunConfig
from deploy.config.load import load_config
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from rollout.wire.schema import decode

DEMONSTRATIONS = 512


def untaught_model(folder: Path, context: int) -> int:
    """Build what the learner's benchmarks compute with; returns its vocabulary's size."""
    tokenizer = build_tokenizer(folder, ["left", "right", "up", "down"])
    build_tiny(folder, tokenizer, layers=4, width=128, heads=4, mlp=384, context=context)
    return len(tokenizer)


def recipe(*overrides: str) -> RunConfig:
    """The main recipe with a stage of seconds."""
    return load_config("frozen_lake", [f"stages.0.source.episodes={DEMONSTRATIONS}", *overrides])


def playing_model(config: RunConfig, folder: Path) -> str:
    """Build the tiny model in `folder`, fine-tune it, and return where the outcome lies (Hugging Face format)."""
    base = model_path(config, folder)
    learner = build_learner(config, base)
    rows = gather(config, 0, base)
    _, steps = learner.begin_stage(0, [decode(batch) for batch in rows])
    learner.advance_stage(steps)
    taught = folder / "taught"
    learner.policy.save(taught)
    return str(taught)
