"""A checkpoint in two parts: a copy of all it holds, and its way to disk, which may go on while the learner learns.

    Saving(...)    on every rank, between two steps: copies of the own rows in host memory
    Saving.land    on every rank, in any thread: written aside, synced, renamed

A process that ends on the way leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from learner.model.shared_files import Folder, file_of, write_together
from learner.parallel.ranks import Ranks
from learner.training.checkpoint import (
    OPTIMIZER,
    STATE,
    TORCH_RNG,
    Contents,
    best_version,
    complete,
    folder_of,
    remove_stages,
    sealed,
    version_of,
    without_tensors,
)
from rollout.wire.whole_file import sync

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(RuntimeError):
    """There is no room for a checkpoint. Nothing of it was left behind and the earlier ones are as they were."""


class Saving:
    """A checkpoint of a run that is copied and not yet on disk.

    folders: what it consists of beside the optimizers, by path. target: the folder whose checkpoints it joins, that of
    the run or of its stages; ended: the run whose checkpoints of stages it replaces, if any. keep: how many of the last
    ones stay. ranks: of its own, so that the thread that lands it disturbs no other.
    """

    def __init__(
        self,
        target: Path,
        contents: Contents,
        folders: Mapping[str, Folder],
        keep: int,
        ranks: Ranks,
        ended: Path | None = None,
    ) -> None:
        self._target, self._keep, self._ranks, self._ended = target, keep, ranks, ended
        self._lead = not ranks.rank
        assert isinstance(contents.torch_rng, Tensor)
        tensors = {TORCH_RNG: contents.torch_rng}
        optimizers = without_tensors(contents.optimizers, "optimizers", tensors)
        self._state = {
            "version": contents.version,
            "cursor": contents.cursor,
            "generator": contents.generator,
            "optimizers": optimizers,
        }
        self.folder = folder_of(target, contents.version)
        self.folders = {**folders, "": Folder([file_of(OPTIMIZER, tensors, self._lead)])}
        self.nbytes = sum(folder.nbytes for folder in self.folders.values())

    def land(self) -> Path:
        """Write it, make it durable, remove all but the last ones and the best; a collective call.

        Returns its folder. Raises DiskFull, and what ended another rank's part as an OSError.
        """
        partial = self.folder.parent / f".partial-{self.folder.name}"
        with self._room(partial):
            if self._lead:
                for left in [*partial.parent.glob(".partial-*"), *partial.parent.glob(".removed-*")]:
                    shutil.rmtree(left)  # by a process that ended on its way
            write_together(self.folders, partial, self._ranks)
            if self._lead:
                state = sealed(self._state, partial)
                (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
                for path in [*partial.rglob("*"), partial]:
                    sync(path)
        if self._lead:
            self._replace(partial)
        return self.folder

    def _replace(self, partial: Path) -> None:
        root = self.folder.parent
        replaced = _put_away(self.folder)  # the same version again, after going back to an earlier one
        partial.rename(self.folder)
        sync(root)
        shutil.rmtree(replaced, ignore_errors=True)
        best = best_version(self._target)
        for old in complete(root)[: -self._keep]:
            if version_of(old) != best:
                shutil.rmtree(_put_away(old))
        if self._ended is not None:
            remove_stages(self._ended)

    @contextmanager
    def _room(self, partial: Path) -> Iterator[None]:
        """Turn a full disk into DiskFull, with what was half written removed."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if not _is_full(error):
                raise
            if self._lead:
                shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(partial.parent).free
            raise DiskFull(
                f"no room for a checkpoint in {partial.parent}: {free / 1e9:.3g} GB are free (a quota may allow less), "
                f"about {self.nbytes / 1e9:.3g} GB are wanted"
            ) from error


def _is_full(error: OSError | SafetensorError) -> bool:
    """Whether an error comes from a full disk, which safetensors hides in its text."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(f"(os error {code})" in str(error) for code in _FULL)


def _put_away(folder: Path) -> Path:
    """Give a checkpoint a name that is none, so that a crash while it is removed leaves no half of one."""
    going = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(going, ignore_errors=True)
    if folder.exists():
        folder.rename(going)
    return going
