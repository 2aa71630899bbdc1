"""A checkpoint's model as a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from deploy import run_folder
from deploy.config import ConfigError
from learner import checkpoint


def export_model(run: Path, target: Path, version: int | None = None) -> int:
    """Copy a verified checkpoint's model, whole or not at all; returns its version. ConfigError, CheckpointError."""
    run_folder.open_existing(run)
    if target.exists():
        raise ConfigError(f"{target} is there already; name a folder that is not")
    folder = checkpoint.latest(run) if version is None else checkpoint.whole(run, version)
    if folder is None:
        kept = ", ".join(map(str, checkpoint.versions(run))) or "none"
        asked = "no whole checkpoint" if version is None else f"no checkpoint of version {version}"
        raise ConfigError(f"{run} has {asked}; versions kept: {kept}")
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    with run_folder.writing(target):
        for name in checkpoint.model_files(folder):  # nothing that was put beside them later
            copy = partial / Path(name).relative_to(checkpoint.MODEL)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, copy, follow_symlinks=False)
        partial.rename(target)
    return checkpoint.version_of(folder)
