"""The `manta` command with scripted engines (or logged real ones) and with what an injector of faults reads.

    python -m tests.faults.job train RECIPE --run-dir FOLDER ...

FOLDER/moments/NAME    there while an engine takes a version ("sync") or a checkpoint is being written ("checkpoint")
FOLDER/consumed.jsonl  the group ids of every learner step, as each rank of the learner had them in its hands
FOLDER/sampled/NAME    a line for every completion: time, the seed of the turn, its tokens. A turn has one seed for
                       ever, so a seed that stands there twice was sampled again
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from deploy.assembly.build import load_tokenizer, start_engine
from deploy.config.config import RunConfig
from rollout.engines.engine import Completion, Engine, Sampling
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.wire.trajectory import Float32Array
from rollout.wire.weights import SyncReport, WeightUpdate

if TYPE_CHECKING:  # engines are made of this module too, and need not wait for a learner
    from learner.parallel.ranks import Ranks
    from learner.training.checkpoint_writing import Saving
    from learner.training.learner import Learner

LATENCY = "MANTA_FAULTS_LATENCY_S"  # of one scripted completion; added to one of vLLM's
REAL = "MANTA_FAULTS_REAL"  # set: vLLM


class Logged:
    """An engine whose completions and syncs leave a trace."""

    def __init__(self, engine: Engine, folder: Path, extra_seconds: float = 0.0) -> None:
        self._extra = extra_seconds
        (folder / "sampled").mkdir(exist_ok=True)
        self._folder = folder
        self._file = (folder / "sampled" / f"{engine.name}-{os.getpid()}").open("a", encoding="utf-8")
        self._engine = engine

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def version(self) -> int:
        return self._engine.version

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, images: Sequence[str] = ()
    ) -> Completion:
        completion = await self._engine.generate(prompt_ids, sampling, images)
        await asyncio.sleep(self._extra)
        self._file.write(f"{time.time():.3f} {sampling.seed} {len(completion.token_ids)}\n")
        self._file.flush()
        return completion

    async def score(self, token_ids: Sequence[int]) -> Float32Array:
        return await self._engine.score(token_ids)

    async def sync(self, update: WeightUpdate) -> SyncReport:
        with moment(self._folder, "sync"):
            await asyncio.sleep(0.1)
            return await self._engine.sync(update)

    async def adopt_loaded(self, version: int) -> None:
        await self._engine.adopt_loaded(version)

    async def ping(self) -> None:
        await self._engine.ping()

    async def close(self) -> None:
        await self._engine.close()


@contextmanager
def moment(folder: Path, name: str) -> Iterator[None]:
    marker = folder / "moments" / name
    marker.parent.mkdir(exist_ok=True)
    marker.touch()
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


async def engine(config: RunConfig, name: str, path: str) -> Engine:
    folder = Path(path).parent
    if REAL in os.environ:
        return Logged(await start_engine(config, name, path), folder, float(os.environ.get(LATENCY, "0")))
    seconds = float(os.environ.get(LATENCY, "0.01"))

    def move(prompt: str, rng: Random) -> str:
        return rng.choice(("left", "down", "down", "right", "right", "up"))

    async def latency() -> None:
        await asyncio.sleep(seconds)

    scripted = ScriptedEngine(load_tokenizer(path), move, latency=latency, name=name, record=False)
    return Logged(scripted, folder)


def learner(config: RunConfig, path: str, ranks: Ranks | None = None, teacher: str = "") -> Learner:
    """The learner of a run, with its steps written down and its checkpoints slow enough to be hit."""
    from deploy.assembly.models import build_learner
    from learner.parallel.ranks import ALONE

    ranks = ranks or ALONE
    made, folder = build_learner(config, path, ranks, teacher), Path(path).parent
    step, begin_save = made.step, made.begin_save

    def logged_step(groups: Sequence[Any]) -> dict[str, float]:
        line = {"version": made.version, "groups": [group.slot.group_id for group in groups]}
        row = step(groups)
        with (folder / "consumed.jsonl").open("a", encoding="utf-8") as file:
            told = {"rank": ranks.rank, "pid": os.getpid(), "time": time.time()}
            file.write(json.dumps(line | told) + "\n")
        return row

    def slow_save(*args: Any, **named: Any) -> Saving:
        saving = begin_save(*args, **named)
        path, model = next((path, each) for path, each in saving.folders.items() if path.startswith("model"))

        def slow_write(target: Path) -> None:
            with moment(folder, "checkpoint"):
                model.beside(target)
                time.sleep(0.2)

        saving.folders[path] = replace(model, beside=slow_write)
        return saving

    made.step, made.begin_save = logged_step, slow_save  # type: ignore[method-assign]
    return made


def main() -> None:
    """The command; engine and learner are replaced at the last moment, since Ray must not be imported before."""
    from deploy import cli
    from deploy.run import drive

    train = drive._train

    def trained(asked: drive.Drive, local: bool, phases: Any) -> dict[str, Any]:
        hosting = importlib.import_module("deploy.run.local" if local else "deploy.cluster.cluster")
        ring = "LocalRuntime" if local else "RayRuntime"
        learning = importlib.import_module("deploy.run.in_process") if local else hosting
        learning.build_learner = learner
        setattr(hosting, ring, partial(getattr(hosting, ring), engine_factory=engine))
        return train(asked, local, phases)

    drive._train = trained
    cli.main()


if __name__ == "__main__":
    # Under its importable name, so that what actors are sent is found in their processes.
    from tests.faults import job

    job.main()
