"""Where a run's replay buffer keeps its state: in the run folder, or on a local disk with a copy in shared storage."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

from rollout.buffer.file_system import flaw_of, sole_user
from rollout.buffer.ledger_checks import LEDGER, LedgerError, check_ledger
from rollout.buffer.objects import FolderObjects, is_url, objects_at
from rollout.buffer.part_log import FOLDER, PartLog, read
from rollout.buffer.segments import segment_files
from rollout.buffer.settings import BufferSettings
from rollout.buffer.state_copy import StateCopy, restore

AUTO, RUN = "auto", "run"  # values of buffer.copy_to beside a folder or URL
_LOCK = "buffer.lock"
ENDING_SECONDS = 30.0  # limit for the end of a process that was killed, which held the state


def copy_of(run_folder: Path, asked: str) -> str:
    """The base of a run's copy, a folder or URL; empty: the run folder holds the state itself, without a copy.

    asked: `buffer.copy_to`. A run that has a copy in its folder keeps it wherever the folder is moved.
    """
    if asked == AUTO:
        here = (run_folder / FOLDER).is_dir() or flaw_of(run_folder)
        return str(run_folder) if here else ""
    if asked == RUN:
        return str(run_folder)
    return asked if is_url(asked) else str(Path(asked).expanduser().absolute())


@contextmanager
def state_of(run_folder: Path, base: str, local: Path) -> Iterator[tuple[Path, StateCopy | None]]:
    """The folder of a run's state for the block, and the copy, if there is one.

    base: as `copy_of` returns it. local: a folder on a local disk, for a state with a copy. LedgerError, one line, if
    another replay buffer uses the state, if the folder cannot hold it, or if the copy is damaged.
    """
    if not base:
        with sole_user(run_folder / _LOCK, ENDING_SECONDS):
            yield run_folder, None
        return
    with _private(local, run_folder) as folder:
        objects = objects_at(base)
        log, parts = PartLog.claim(objects)
        readers = FolderObjects(run_folder)
        shared = not is_url(base) and Path(base) == run_folder
        if parts[-1].snapshot is not None:
            restore(parts, folder)
        elif (run_folder / LEDGER).is_file():
            _move_in(run_folder, folder, with_segments=not shared)
        yield folder, StateCopy(log, parts, folder, [objects] if shared else [objects, readers], readers)


def check_state(run_folder: Path, settings: BufferSettings, version: int | None) -> None:
    """Whether a run's replay buffer can be opened in its folder, before anything is started.

    version: of the checkpoint that a stopped run continues from, whose groups its ledger must have. LedgerError, one
    line; nothing of the run is written, and no copy is claimed.
    """
    base, groups_per_step = copy_of(run_folder, settings.copy_to), settings.groups_per_step
    parts = read(objects_at(base)) if base else []
    if version is None:
        return
    if parts and parts[-1].snapshot is not None:
        with tempfile.TemporaryDirectory(prefix="manta-check-") as name:
            restore(parts, Path(name))
            check_ledger(Path(name) / LEDGER, version, groups_per_step)
    elif (run_folder / LEDGER).is_file():
        check_ledger(run_folder / LEDGER, version, groups_per_step)


@contextmanager
def _private(local: Path, run_folder: Path) -> Iterator[Path]:
    """A new folder for one process. What killed ones of this run have left beside it is removed."""
    stem = f"manta-ledger-{blake3(os.fsencode(run_folder)).hexdigest(length=8)}-"
    try:
        local.mkdir(parents=True, exist_ok=True)
        flaw = flaw_of(local)
    except OSError as error:
        flaw = error.strerror or str(error)
    if flaw:
        raise LedgerError(
            f"{local} cannot hold the ledger: {flaw}; set buffer.local_dir to a folder on a local disk"
        )
    for left in local.glob(f"{stem}*"):
        with suppress(LedgerError, OSError), sole_user(left / _LOCK):
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=stem, dir=local) as name, sole_user(Path(name) / _LOCK):
        (Path(name) / "state").mkdir()
        yield Path(name) / "state"


def _move_in(run_folder: Path, folder: Path, with_segments: bool) -> None:
    """Take over the state of a run that had no copy so far; the first snapshot has it then."""
    for path in run_folder.glob(f"{LEDGER}*"):
        shutil.copy(path, folder / path.name)
    if (run_folder / "turns").is_dir():
        shutil.copytree(run_folder / "turns", folder / "turns")
    (folder / "groups").mkdir()
    for _, path in segment_files(run_folder / "groups") if with_segments else []:
        shutil.copy(path, folder / "groups" / path.name)
