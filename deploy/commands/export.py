"""A checkpoint's model as a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from deploy.commands.fresh import fresh_folder
from deploy.config import run_folder
from deploy.config.config_errors import ConfigError
from learner.training import checkpoint


def export_model(run: Path, target: Path, version: int | None = None) -> int:
    """Copy a verified checkpoint's model, whole or not at all; returns its version. ConfigError, CheckpointError."""
    run_folder.open_existing(run)
    folder = checkpoint.latest(run) if version is None else checkpoint.whole(run, version)
    if folder is None:
        kept = ", ".join(map(str, checkpoint.versions(run))) or "none"
        asked = "no whole checkpoint" if version is None else f"no checkpoint of version {version}"
        raise ConfigError(f"{run} has {asked}; versions kept: {kept}")
    with fresh_folder(target) as partial:
        for name in checkpoint.model_files(folder):  # nothing that was put beside them later
            copy = partial / Path(name).relative_to(checkpoint.MODEL)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, copy, follow_symlinks=False)
    return checkpoint.version_of(folder)
