"""Checkpoints: a folder a version, whole or absent.

    RUN/checkpoints/version-00000012/
        model/        Hugging Face format: config, safetensors, tokenizer; vLLM serves it as it is
        optimizer.pt  moments, step count, torch's RNG state
        state.json    version, task cursor, the learner's own RNG, and the size of every other file

A checkpoint is written beside its final place, synced to disk, and renamed: a folder under its final name was
complete. Nothing is ever unpickled: weights are safetensors, and optimizer.pt is read with weights_only.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

logger = logging.getLogger(__name__)

ROOT, MODEL, OPTIMIZER, STATE = "checkpoints", "model", "optimizer.pt", "state.json"
_NAME = re.compile(r"version-(\d{8,})")
_TOKENIZER_FILES = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
]


class CheckpointError(ValueError):
    """A checkpoint that is broken, or not one."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds beside the weights."""

    version: int
    cursor: dict[str, Any]  # where the task stream stands; JSON
    generator: Mapping[str, Any]  # state of the learner's numpy bit generator
    optimizer: dict[str, Any]
    torch_rng: Tensor


def tokenizer_files(path: str) -> dict[str, bytes]:
    """Tokenizer files of a checkpoint folder or Hugging Face id, by name; empty if it has none.

    Held in memory (they are small): the folder they came from may be gone when the next checkpoint is
    written.
    """
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(path, allow_patterns=_TOKENIZER_FILES))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise CheckpointError(
                f"tokenizer of {path!r} cannot be read: {str(error).splitlines()[0]}"
            ) from error
    found = {file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    return {file.name: file.read_bytes() for file in sorted(found)}


def save(run: Path, contents: Contents, write_model: Callable[[Path], None], keep: int) -> Path:
    """Write a checkpoint of a run, make it durable, remove all but the last `keep`, return its folder.

    write_model is called with the empty model folder.
    """
    root = run / ROOT
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"version-{contents.version:08d}"
    partial = root / f".partial-{folder.name}"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / MODEL).mkdir(parents=True)
    write_model(partial / MODEL)
    torch.save({"optimizer": contents.optimizer, "torch_rng": contents.torch_rng}, partial / OPTIMIZER)
    sizes = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
    state = {
        "version": contents.version,
        "cursor": contents.cursor,
        "generator": contents.generator,
        "sizes": sizes,
    }
    (partial / STATE).write_text(json.dumps(state, indent=1))
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    _remove(folder)  # the same version again, after going back to an earlier one
    partial.rename(folder)
    _sync(root)
    for old in _complete(root)[:-keep]:
        _remove(old)
    return folder


def load(folder: Path) -> Contents:
    """Read a checkpoint's state; the weights are read from `folder / MODEL`. CheckpointError if broken."""
    state = _verified(folder)
    try:
        tensors = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        return Contents(
            version=int(state["version"]),
            cursor=dict(state["cursor"]),
            generator=state["generator"],
            optimizer=tensors["optimizer"],
            torch_rng=tensors["torch_rng"],
        )
    except (RuntimeError, pickle.UnpicklingError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {folder} is broken: {OPTIMIZER}: {str(error).splitlines()[0]}"
        ) from error


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. A broken one is named in a warning and passed over."""
    for folder in reversed(_complete(run / ROOT)):
        try:
            _verified(folder)
        except CheckpointError as error:
            logger.warning("%s; an earlier one is used", error)
        else:
            return folder
    return None


def _verified(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint all of whose files are there in full."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
        sizes = state["sizes"].items()
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {folder} is broken: {STATE} is missing or unreadable") from error
    for name, size in sizes:
        file = folder / name
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise CheckpointError(f"checkpoint {folder} is broken: {name} has {found} of {size} bytes")
    return state


def _complete(root: Path) -> list[Path]:
    """Folders under their final name, oldest first."""
    versions = {path: _NAME.fullmatch(path.name) for path in root.glob("version-*")}
    return sorted((path for path, match in versions.items() if match), key=lambda path: int(path.name[8:]))


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that a crash on the way leaves no half of one under its final name."""
    if folder.exists():
        going = folder.with_name(f".removed-{folder.name}")
        shutil.rmtree(going, ignore_errors=True)
        folder.rename(going)
        shutil.rmtree(going)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
