"""Whole runs that a table is made of: each runs to its end once, in its own folder, and is gone on with if cut off."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy import train
from deploy.commands.export import export_model
from deploy.config import run_folder
from deploy.config.config import RunConfig
from deploy.config.load import load_config

LIMIT_S = 3600
SMOOTHED = 3  # steps whose mean is a point of a curve


def run_to_end(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Run it to its end, or go on with it, unless it has ended; its summary."""
    if not (folder / "summary.json").is_file():
        if not run_folder.exists(folder):
            run_folder.create(config, folder)
        command = [sys.executable, "-m", "deploy.cli", "train", "--resume", str(folder)]
        with folder.with_suffix(".log").open("ab") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT_S)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def run_here(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The same in this process, without Ray."""
    resume = run_folder.exists(folder)
    return dict(train(config, folder, local=True, resume=resume, quiet=True).summary)


def fine_tuned(recipe: str, seed: int, folder: Path) -> Path:
    """The model that a recipe's stages make: version 0 of a run of one step."""
    run = folder / f"{recipe}-stages-{seed}"
    run_to_end(load_config(recipe, [f"seed={seed}", "steps=1", "learner.optim.warmup_steps=0"]), run)
    return exported(run, folder / f"{recipe}-fine-tuned-{seed}", 0)


def exported(run: Path, model: Path, version: int | None) -> Path:
    """The model of a version, the last if None."""
    if not model.is_dir():
        export_model(run, model, version=version)
    return model


def from_model(recipe: str, model: Path, overrides: Sequence[str]) -> RunConfig:
    """A recipe without stages of its own: it goes on from a model."""
    return load_config(recipe, ["tiny=", "stages=", f"learner.model.path={model}", *overrides])


def success(rows: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Success in training of a run's metrics, float [steps - SMOOTHED + 1], each point the mean of SMOOTHED steps."""
    return np.convolve([row["success"] for row in rows], np.ones(SMOOTHED) / SMOOTHED, "valid")
