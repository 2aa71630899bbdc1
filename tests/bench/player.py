"""A tiny model that can play: the recipe's, after a short imitation. One that says anything ends its episodes soon."""

from __future__ import annotations

import asyncio
from pathlib import Path

from deploy.build import build_learner, model_path, play_demonstrations
from deploy.config import RunConfig, load_config
from rollout.wire.schema import decode

DEMONSTRATIONS = 512


def recipe(*overrides: str) -> RunConfig:
    """The main recipe with a warm start of seconds."""
    return load_config("frozen_lake", [f"warm_start.episodes={DEMONSTRATIONS}", *overrides])


def playing_model(config: RunConfig, folder: Path) -> str:
    """Build the tiny model in `folder`, have it imitate, and return where the outcome lies (Hugging Face format)."""
    base = model_path(config, folder)
    learner = build_learner(config, base)
    rows = asyncio.run(play_demonstrations(config, base))
    for _ in learner.imitate([decode(batch) for batch in rows]):
        pass
    taught = folder / "taught"
    learner.write_model(taught)
    return str(taught)
