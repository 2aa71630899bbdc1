"""Checkpoints: a folder a version, whole or absent.

    RUN/checkpoints/version-00000012/
        model/        Hugging Face format: config, safetensors, tokenizer; vLLM serves it as it is
        critic/       where there is one: its head; its trunk in the same format, unless that is the policy's
        optimizer.safetensors   moments, torch's RNG state
        *.safetensors.blocks    checksums of the blocks of each such file
        state.json    version, task cursor, step counts, the learner's own RNG, size and blake3 of every other file (of
                      a safetensors file its blocks stand for it), and its own seal
    RUN/checkpoints/best.json   the version that is kept beside the newest ones, its metric and its value

Before version 0, checkpoints of the run's stages lie under RUN/stages/checkpoints in the same form: their number counts
the steps of all stages, and state.json says where the stages stand. The first checkpoint of a version removes them.

A checkpoint is written beside its final place by all ranks, each its own rows (checkpoint_writing.py), synced to disk,
and renamed: a folder under its final name was complete. It is the same for any number of ranks. What is read is
compared with its checksum: a rank that continues reads its own rows, and with that verifies them. A checkpoint that has
changed since is set aside as .broken-version-N and the one before is used. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from blake3 import blake3
from safetensors import SafetensorError
from torch import Tensor

from learner.model.tensor_files import BLOCKS, StoredTensor, tensors_in, verify
from rollout.wire.whole_file import replace_file

logger = logging.getLogger(__name__)

ROOT, MODEL, CRITIC, OPTIMIZER, STATE = (
    "checkpoints",
    "model",
    "critic",
    "optimizer.safetensors",
    "state.json",
)
BEST = "best.json"  # beside the checkpoints: which of them evaluations found the best
STAGES = "stages"  # folder of a run, and what a checkpoint's cursor calls where they stand
_TENSOR = "tensor"  # key of a tensor's path in state.json
TORCH_RNG = "torch_rng"  # its path
_NAME = re.compile(r"version-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that is broken, or not one."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds beside the weights.

    Leaves of `optimizers` are JSON values and tensors: sharded ones where it is written, those of a file where it is
    read, of which each rank reads the rows that it needs.
    """

    version: int
    cursor: dict[str, Any]  # where the task stream stands; JSON
    generator: Mapping[str, Any]  # state of the learner's numpy bit generator
    optimizers: dict[str, Any]  # state of each, by the name of what it moves
    torch_rng: Tensor | StoredTensor


def folder_of(run: Path, version: int) -> Path:
    """Where the checkpoint of this version of a run lies, or will."""
    return run / ROOT / f"version-{version:08d}"


def note_best(run: Path, version: int, metric: str, value: float) -> bool:
    """Note a version as the best of a run if no other was better by this metric; its checkpoint is then kept.

    A version that is evaluated again counts by its new value. Returns whether it is the best.
    """
    file = run / ROOT / BEST
    known = _best(run)
    if known and known["metric"] == metric and known["version"] != version and known["value"] >= value:
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps({"version": version, "metric": metric, "value": value}))
    return True


def best_version(run: Path) -> int | None:
    """The version that was noted as the best of a run; None where none was."""
    known = _best(run)
    return None if known is None else int(known["version"])


def _best(run: Path) -> dict[str, Any] | None:
    """What best.json says. CheckpointError if broken."""
    file = run / ROOT / BEST
    if not file.is_file():
        return None
    try:
        known = dict(json.loads(file.read_text(encoding="utf-8")))
        return {
            "version": int(known["version"]),
            "metric": str(known["metric"]),
            "value": float(known["value"]),
        }
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file}: broken file ({error}); remove it to continue without it") from error


def load(folder: Path) -> Contents:
    """Read a checkpoint's state; the weights are read from `folder / MODEL`. CheckpointError if broken.

    Tensors are read when they are indexed; OSError if one has changed (`learner.model.tensor_files.Changed`).
    """
    state = _stated(folder)
    try:
        stored = tensors_in(folder / OPTIMIZER)
        return Contents(
            version=int(state["version"]),
            cursor=dict(state["cursor"]),
            generator=state["generator"],
            optimizers=_with_tensors(state["optimizers"], stored),
            torch_rng=stored[TORCH_RNG],
        )
    except (OSError, SafetensorError, KeyError) as error:
        raise broken(folder, f"{OPTIMIZER}: {str(error).splitlines()[0]}") from error


def without_tensors(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A tree of dicts as JSON: each tensor is replaced by its path, under which it is put into `tensors`."""
    if isinstance(tree, Tensor):
        tensors[path] = tree
        return {_TENSOR: path}
    if isinstance(tree, Mapping):
        return {name: without_tensors(value, f"{path}/{name}", tensors) for name, value in tree.items()}
    return tree


def _with_tensors(tree: Any, stored: Mapping[str, StoredTensor]) -> Any:
    """The tree that `without_tensors` was given, with tensors of a file."""
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {_TENSOR}:
        return stored[tree[_TENSOR]]
    return {name: _with_tensors(value, stored) for name, value in tree.items()}


def latest(run: Path, read: bool = True) -> Path | None:
    """The newest whole checkpoint of a run, or None. A broken one is named in a warning and set aside.

    read: every file; False: of safetensors files only their size is compared, for a learner that verifies what it
    reads of them.
    """
    for folder in reversed(complete(run / ROOT)):
        try:
            _verified(folder, read)
        except CheckpointError as error:
            set_aside(folder, error)
        else:
            return folder
    return None


def newest(run: Path) -> Path | None:
    """What a run goes on from: its newest whole checkpoint of a version, else of a stage; None where it has neither.

    Weights and moments are not read: the learner that loads them finds out whether they are what was written.
    """
    return latest(run, read=False) or latest(run / STAGES, read=False)


def next_stage(run: Path) -> int:
    """The stage that a run without a version goes on with, by its newest checkpoint of a stage; 0 without one."""
    folders = complete(run / STAGES / ROOT)
    return int(_stated(folders[-1])["cursor"][STAGES]["stage"]) if folders else 0


def remove_stages(run: Path) -> None:
    """Remove the checkpoints of a run's stages: it goes on from a version now."""
    shutil.rmtree(run / STAGES / ROOT, ignore_errors=True)


def newest_version(run: Path) -> int:
    """The version of a run's newest checkpoint by what its state.json says, its other files unread; 0: none."""
    for folder in reversed(complete(run / ROOT)):
        try:
            return int(_stated(folder)["version"])
        except CheckpointError:
            continue
    return 0


def model_files(folder: Path) -> list[str]:
    """The files of a checkpoint's model, relative to the checkpoint: those that were written with it."""
    names = _stated(folder)["files"]
    return [name for name in names if Path(name).parts[0] == MODEL and not name.endswith(BLOCKS)]


def versions(run: Path) -> list[int]:
    """The weight versions a run keeps checkpoints of, oldest first; whether they are whole is not looked at."""
    return [version_of(folder) for folder in complete(run / ROOT)]


def version_of(folder: Path) -> int:
    """The weight version of a checkpoint, which its name says."""
    return int(folder.name.removeprefix("version-"))


def whole(run: Path, version: int) -> Path | None:
    """The checkpoint of one version, or None where a run keeps none. CheckpointError if broken."""
    folder = folder_of(run, version)
    if not folder.is_dir():
        return None
    _verified(folder)
    return folder


def sealed(state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What state.json says of a folder that is otherwise written: `state`, every file, and a seal."""
    files = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "blake3": _checksum(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    state = {**state, "files": files}
    return {**state, "seal": _seal(state)}


def _seal(state: Mapping[str, Any]) -> str:
    """blake3 of everything state.json says, the seal itself left out."""
    rest = {name: value for name, value in state.items() if name != "seal"}
    return blake3(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _verified(folder: Path, read: bool = True) -> dict[str, Any]:
    """state.json of a checkpoint whose every file is what was written.

    Sizes are compared first, then the checksums of files, and with `read` those of the blocks of safetensors files.
    """
    state = _stated(folder)
    for name, written in state["files"].items():
        found = _size(folder, name)
        if found != written["size"]:
            raise broken(folder, f"{name} has {found} of {written['size']} bytes")
    for name, written in sorted(state["files"].items(), key=lambda file: file[1]["blake3"] is None):
        try:
            if written["blake3"]:
                if _checksum(folder / name) != written["blake3"]:
                    raise broken(folder, f"{name} has changed since it was written")
            elif read:
                verify(folder / name)
        except OSError as error:
            raise broken(folder, error.strerror or str(error)) from error
    return state


def _stated(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, whole by its own seal, and of the version that the folder's name says."""
    file = folder / STATE
    try:
        if not S_ISREG(file.lstat().st_mode):
            raise ValueError("no plain file")
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        seal, version, files = state["seal"], state["version"], dict(state["files"])
        listed = {name: (int(of["size"]), of["blake3"]) for name, of in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise broken(folder, f"{STATE} is missing or unreadable") from error
    if seal != _seal(state):
        raise broken(folder, f"{STATE} has changed since it was written")
    if version != version_of(folder):
        raise broken(folder, f"{STATE} is of version {version}")
    for name in listed:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise broken(folder, f"{STATE} lists {name!r}, which lies outside of it")
    return state


def _size(folder: Path, name: str) -> int:
    """Bytes of a file; 0 where it is missing. CheckpointError for what is no plain file of the folder itself."""
    file = folder / name
    linked = any((folder / part).is_symlink() for part in [Path(name), *Path(name).parents][:-1])
    if linked or (file.exists() and not file.is_file()):
        raise broken(folder, f"{name} is no plain file of its own")
    return file.stat().st_size if file.exists() else 0


def broken(folder: Path, what: str) -> CheckpointError:
    """The error of a checkpoint that is broken. what: is, in one line; files may be named by their whole path."""
    return CheckpointError(f"checkpoint {folder} is broken: {what.replace(f'{folder}/', '')}")


def _checksum(file: Path) -> str | None:
    """blake3 of a file; None of one whose blocks have checksums of their own."""
    if file.with_name(file.name + BLOCKS).is_file():
        return None
    # Read, not mapped: a disk that fails under a mapping ends the process instead of raising.
    return blake3(file.read_bytes(), max_threads=blake3.AUTO).hexdigest()


def complete(root: Path) -> list[Path]:
    """Folders of checkpoints under their final name, oldest first."""
    versions = {path: _NAME.fullmatch(path.name) for path in root.glob("version-*")}
    return sorted((path for path, match in versions.items() if match), key=version_of)


def set_aside(folder: Path, error: Exception) -> None:
    """Name a broken checkpoint in a warning, and give it a name that is none."""
    logger.warning("%s; it is set aside and an earlier one is used", error)
    aside = folder.with_name(f".broken-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        folder.rename(aside)
    except OSError as failed:  # somebody else's folder, or a read-only one: passing over it is enough
        logger.warning("%s stays where it is: %s", folder, failed.strerror)
