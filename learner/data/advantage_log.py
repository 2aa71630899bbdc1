"""RUN/advantages: the advantage of every trained token, beside the version that trained it.

    version-00000012.arrow            advantages of the step that made version 12
    version-00000012-rank-1.arrow     those of another rank of the learner

Workers store the rows of an episode before any advantage is known. Advantages depend on the whole batch of a step, so
they have a file of their own: Arrow IPC, one row a turn, joined with the stored rows by group_id, attempt, episode and
turn. A reused group is in the file of every step that trained on it. A step repeated from an earlier checkpoint
replaces its file; files of versions after the checkpoint are removed when the learner starts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from rollout.wire.trajectory import Float32Array, Group

logger = logging.getLogger(__name__)

FOLDER = "advantages"
_PARTIAL = ".part"
SCHEMA = pa.schema(
    [
        ("version", pa.int32()),
        ("group_id", pa.int64()),
        ("attempt", pa.int32()),
        ("episode", pa.int32()),
        ("turn", pa.int32()),
        ("reuse", pa.int32()),
        ("advantages", pa.list_(pa.float32())),
    ]
)


class AdvantageLog:
    """One rank's files in a run's folder. Opening at `version` removes files of later versions."""

    def __init__(self, run_folder: Path, version: int, rank: int = 0) -> None:
        self._folder = run_folder / FOLDER
        self._suffix = f"-rank-{rank}" if rank else ""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob("version-*") if not rank else ():
            if path.suffix == _PARTIAL or _version_of(path) > version:
                path.unlink(missing_ok=True)

    def write(self, version: int, groups: Sequence[Group], advantages: Sequence[Float32Array]) -> None:
        """Store the advantages that made `version`: for each trainable episode of the groups, in order, float32 [N].

        A file that cannot be written is a warning: the step is already made, and nothing else needs the file.
        """
        path = self._folder / f"version-{version:08d}{self._suffix}.arrow"
        aside = path.with_suffix(_PARTIAL)
        try:
            with aside.open("wb") as file:
                with pa.ipc.new_file(file, SCHEMA) as writer:
                    writer.write_batch(_batch(version, groups, advantages))
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError as error:
            logger.warning("the advantages of version %d are not stored: %s", version, error)
            aside.unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def read_advantages(run_folder: str | Path) -> pa.Table:
    """All stored advantages of a run, in order of version; empty if the run stored none.

    FileNotFoundError if the folder does not exist; ValueError, which names the file, for a damaged one.
    """
    if not Path(run_folder).is_dir():
        raise FileNotFoundError(f"{run_folder}: no such run folder")
    files = sorted((Path(run_folder) / FOLDER).glob("version-*.arrow"), key=lambda path: path.stem)
    return pa.concat_tables([SCHEMA.empty_table(), *map(_read, files)])


def _read(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: broken file ({error})") from error


def _batch(version: int, groups: Sequence[Group], advantages: Sequence[Float32Array]) -> pa.RecordBatch:
    trained = [(group.reuse, trajectory) for group in groups for trajectory in group.trainable]
    turns = [(reuse, trajectory, step) for reuse, trajectory in trained for step in trajectory.turns]
    offsets = np.cumsum([0, *(len(step.action_ids) for *_, step in turns)]).astype(np.int32)
    values_N = np.concatenate([np.zeros(0, np.float32), *advantages])
    if len(values_N) != offsets[-1]:
        raise ValueError(f"{len(values_N)} advantages do not match {offsets[-1]} sampled tokens")
    columns = {
        "version": np.full(len(turns), version, np.int32),
        "group_id": [trajectory.group_id for _, trajectory, _ in turns],
        "attempt": [trajectory.attempt for _, trajectory, _ in turns],
        "episode": [trajectory.index for _, trajectory, _ in turns],
        "turn": [step.turn for *_, step in turns],
        "reuse": [reuse for reuse, *_ in turns],
        "advantages": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_N, pa.float32())),
    }
    return pa.RecordBatch.from_pydict(columns, SCHEMA)


def _version_of(path: Path) -> int:
    return int(path.name.removeprefix("version-")[:8])
