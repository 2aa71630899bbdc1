"""Checkpoints: a folder a version, whole or absent.

    RUN/checkpoints/version-00000012/
        model/        Hugging Face format: config, safetensors, tokenizer; vLLM serves it as it is
        critic/       where there is one: its head; its trunk in the same format, unless that is the policy's
        optimizer.pt  moments and step counts, torch's RNG state
        state.json    version, task cursor, the learner's own RNG, size and blake3 of every other file, and its own seal
    RUN/checkpoints/best.json   the version that is kept beside the newest ones, its metric and its value

Before version 0, checkpoints of the run's stages lie under RUN/stages/checkpoints in the same form: their number counts
the steps of all stages, and state.json says where the stages stand. The first checkpoint of a version removes them.

A checkpoint is written beside its final place, synced to disk, and renamed: a folder under its final name was
complete. What is read is compared with its checksum first; a checkpoint that has changed since is set aside as
.broken-version-N and the one before is used. Nothing is ever unpickled: weights are safetensors, and optimizer.pt is
read with weights_only.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError
from torch import Tensor

from rollout.wire.whole_file import replace_file

logger = logging.getLogger(__name__)

ROOT, MODEL, CRITIC, OPTIMIZER, STATE = "checkpoints", "model", "critic", "optimizer.pt", "state.json"
BEST = "best.json"  # beside the checkpoints: which of them evaluations found the best
STAGES = "stages"  # folder of a run, and what a checkpoint's cursor calls where they stand
_READ_BYTES = 16 << 20  # at a time while hashing; blake3 spreads that over all cores
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NAME = re.compile(r"version-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that is broken, or not one."""


class DiskFull(RuntimeError):
    """There is no room for a checkpoint. Nothing of it was left behind and the earlier ones are as they were."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds beside the weights."""

    version: int
    cursor: dict[str, Any]  # where the task stream stands; JSON
    generator: Mapping[str, Any]  # state of the learner's numpy bit generator
    optimizers: dict[str, Any]  # state of each, by the name of what it moves
    torch_rng: Tensor


def folder_of(run: Path, version: int) -> Path:
    """Where the checkpoint of this version of a run lies, or will."""
    return run / ROOT / f"version-{version:08d}"


def save(
    run: Path, contents: Contents, parts: Mapping[str, Callable[[Path], None]], part_bytes: int, keep: int
) -> Path:
    """Write a checkpoint of a run, make it durable, remove all but the last `keep` and the best; return its folder.

    parts: each is called with an empty folder of its name and writes itself into it, about `part_bytes` together.
    Raises DiskFull.
    """
    folder = folder_of(run, contents.version)
    root = folder.parent
    partial = root / f".partial-{folder.name}"
    with _room_for(partial, part_bytes + _tensor_bytes(contents.optimizers)):
        for left in [
            *root.glob(".partial-*"),
            *root.glob(".removed-*"),
        ]:  # by a process that ended on its way
            shutil.rmtree(left)
        for name, write in parts.items():
            (partial / name).mkdir(parents=True)
            write(partial / name)
        with (partial / OPTIMIZER).open("wb") as file:
            torch.save({"optimizers": contents.optimizers, "torch_rng": contents.torch_rng}, file)
        (partial / STATE).write_text(json.dumps(_sealed(contents, partial), indent=1), encoding="utf-8")
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
    replaced = _put_away(folder)  # the same version again, after going back to an earlier one
    partial.rename(folder)
    _sync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    best = best_version(run)
    for old in _complete(root)[:-keep]:
        if version_of(old) != best:
            shutil.rmtree(_put_away(old))
    return folder


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


def load(folder: Path, verified: bool = False) -> Contents:
    """Read a checkpoint's state; the weights are read from `folder / MODEL`. CheckpointError if broken.

    verified: `latest` has just read every file of it, which takes seconds a gigabyte.
    Tensors are mapped: of several ranks on one machine each has only the part in its memory that it copies.
    """
    state = _stated(folder) if verified else _verified(folder)
    try:
        tensors = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
        return Contents(
            version=int(state["version"]),
            cursor=dict(state["cursor"]),
            generator=state["generator"],
            optimizers=tensors["optimizers"],
            torch_rng=tensors["torch_rng"],
        )
    except (RuntimeError, pickle.UnpicklingError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {folder} is broken: {OPTIMIZER}: {str(error).splitlines()[0]}"
        ) from error


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. A broken one is named in a warning and set aside."""
    for folder in reversed(_complete(run / ROOT)):
        try:
            _verified(folder)
        except CheckpointError as error:
            logger.warning("%s; it is set aside and an earlier one is used", error)
            _set_aside(folder)
        else:
            return folder
    return None


def newest(run: Path) -> Path | None:
    """What a run goes on from: its newest whole checkpoint of a version, else of a stage; None where it has neither."""
    return latest(run) or latest(run / STAGES)


def next_stage(run: Path) -> int:
    """The stage that a run without a version goes on with, by its newest checkpoint of a stage; 0 without one."""
    folders = _complete(run / STAGES / ROOT)
    return int(_stated(folders[-1])["cursor"][STAGES]["stage"]) if folders else 0


def remove_stages(run: Path) -> None:
    """Remove the checkpoints of a run's stages: it goes on from a version now."""
    shutil.rmtree(run / STAGES / ROOT, ignore_errors=True)


def newest_version(run: Path) -> int:
    """The version of a run's newest checkpoint by what its state.json says, its other files unread; 0: none."""
    for folder in reversed(_complete(run / ROOT)):
        try:
            return int(_stated(folder)["version"])
        except CheckpointError:
            continue
    return 0


def model_files(folder: Path) -> list[str]:
    """The files of a checkpoint's model, relative to the checkpoint: those that were written with it."""
    return [name for name in _stated(folder)["files"] if Path(name).parts[0] == MODEL]


def versions(run: Path) -> list[int]:
    """The weight versions a run keeps checkpoints of, oldest first; whether they are whole is not looked at."""
    return [version_of(folder) for folder in _complete(run / ROOT)]


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


def _sealed(contents: Contents, folder: Path) -> dict[str, Any]:
    """What state.json says of a folder that is otherwise written."""
    files = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "blake3": _checksum(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    state = {
        "version": contents.version,
        "cursor": contents.cursor,
        "generator": contents.generator,
        "files": files,
    }
    return {**state, "seal": _seal(state)}


def _seal(state: Mapping[str, Any]) -> str:
    """blake3 of everything state.json says, the seal itself left out."""
    rest = {name: value for name, value in state.items() if name != "seal"}
    return blake3(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _verified(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose every file is what was written: sizes are compared first, then checksums."""
    state = _stated(folder)
    for name, written in state["files"].items():
        found = _size(folder, name)
        if found != written["size"]:
            raise _broken(folder, f"{name} has {found} of {written['size']} bytes")
    for name, written in state["files"].items():
        try:
            checksum = _checksum(folder / name)
        except OSError as error:
            raise _broken(folder, f"{name} can not be read ({error.strerror})") from error
        if checksum != written["blake3"]:
            raise _broken(folder, f"{name} has changed since it was written")
    return state


def _stated(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, whole by its own seal, and of the version that the folder's name says."""
    file = folder / STATE
    try:
        if not S_ISREG(file.lstat().st_mode):
            raise ValueError("no plain file")
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        seal, version, files = state["seal"], state["version"], dict(state["files"])
        listed = {name: (int(of["size"]), str(of["blake3"])) for name, of in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(folder, f"{STATE} is missing or unreadable") from error
    if seal != _seal(state):
        raise _broken(folder, f"{STATE} has changed since it was written")
    if version != version_of(folder):
        raise _broken(folder, f"{STATE} is of version {version}")
    for name in listed:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise _broken(folder, f"{STATE} lists {name!r}, which lies outside of it")
    return state


def _size(folder: Path, name: str) -> int:
    """Bytes of a file; 0 where it is missing. CheckpointError for what is no plain file of the folder itself."""
    file = folder / name
    linked = any((folder / part).is_symlink() for part in [Path(name), *Path(name).parents][:-1])
    if linked or (file.exists() and not file.is_file()):
        raise _broken(folder, f"{name} is no plain file of its own")
    return file.stat().st_size if file.exists() else 0


def _broken(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder} is broken: {what}")


def _checksum(file: Path) -> str:
    # Read, not mapped: a disk that fails under a mapping ends the process instead of raising.
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(min(_READ_BYTES, max(1, file.stat().st_size))))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            hasher.update(buffer[:count])
    return hasher.hexdigest()


def _tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, Mapping):
        return sum(map(_tensor_bytes, tree.values()))
    return sum(map(_tensor_bytes, tree)) if isinstance(tree, list | tuple) else 0


@contextmanager
def _room_for(partial: Path, wanted_bytes: int) -> Iterator[None]:
    """Turn a full disk into DiskFull, with what was half written removed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(partial.parent).free
        raise DiskFull(
            f"no room for a checkpoint in {partial.parent}: {free / 1e9:.3g} GB are free (a quota may allow less), "
            f"about {wanted_bytes / 1e9:.3g} GB are wanted"
        ) from error


def _is_full(error: BaseException | None) -> bool:
    """Whether an error comes from a full disk: torch hides that one behind its own, safetensors in its text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if isinstance(error, SafetensorError) and any(f"(os error {code})" in str(error) for code in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _complete(root: Path) -> list[Path]:
    """Folders under their final name, oldest first."""
    versions = {path: _NAME.fullmatch(path.name) for path in root.glob("version-*")}
    return sorted((path for path, match in versions.items() if match), key=version_of)


def _put_away(folder: Path) -> Path:
    """Give a checkpoint a name that is none, so that a crash while it is removed leaves no half of one."""
    going = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(going, ignore_errors=True)
    if folder.exists():
        folder.rename(going)
    return going


def _set_aside(folder: Path) -> None:
    aside = folder.with_name(f".broken-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        folder.rename(aside)
    except OSError as error:  # somebody else's folder, or a read-only one: passing over it is enough
        logger.warning("%s stays where it is: %s", folder, error.strerror)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
