"""Export a checkpoint's model to a Hugging Face folder; output folders, written atomically and never over others."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.assembly.models import stored_checkpoint
from deploy.config import run_folder
from deploy.config.config_errors import ConfigError
from learner.training import checkpoint


def export_model(run: Path, target: Path, version: int | None = None, best: bool = False) -> int:
    """Copy a verified checkpoint's model atomically; returns its version. ConfigError, CheckpointError."""
    run_folder.open_existing(run)
    if best:
        version = checkpoint.best_version(run)
        if version is None:
            raise ConfigError(f"{run} has no best checkpoint: set checkpoint.best_metric when it is trained")
    folder = stored_checkpoint(run, version)
    with fresh_folder(target) as partial:
        for name in checkpoint.model_files(folder):  # only files of the checkpoint, no later ones
            copy = partial / Path(name).relative_to(checkpoint.MODEL)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, copy, follow_symlinks=False)
    return checkpoint.version_of(folder)


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to write into that becomes `target` at the end of the block, or is removed after an error.

    ConfigError if `target` exists; of several processes that write it at once, one succeeds.
    """
    if target.exists():
        raise _taken(target)
    partial = target.with_name(f".partial-{target.name}-{secrets.token_hex(4)}")
    with run_folder.writing(target):
        partial.mkdir(parents=True)
    try:
        yield partial
        try:
            target.mkdir()  # succeeds in exactly one process; the rename then replaces the empty folder
        except FileExistsError:
            raise _taken(target) from None
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def fresh_file(target: Path) -> Iterator[Path]:
    """Yield a file to write that becomes `target` at the end of the block. ConfigError if `target` exists."""
    if target.exists():
        raise _taken(target)
    partial = target.with_name(f".partial-{secrets.token_hex(4)}{target.suffix}")
    try:
        with run_folder.writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            try:
                os.link(partial, target)  # fails where another process was faster
            except FileExistsError:
                raise _taken(target) from None
    finally:
        partial.unlink(missing_ok=True)


def _taken(target: Path) -> ConfigError:
    return ConfigError(f"{target} exists already; choose a new name")
