"""The buffer's throughput, in memory and on disk, and its memory over many groups; prints JSON.

Large groups are eight episodes of four turns, 3,000 tokens a turn, about 1 MB. GB are 10^9 bytes of encoded rows.
Run it as `python -m tests.bench.bench_buffer`.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from rollout.buffer.replay_store import BufferSettings, EpisodeRow, FinishedGroup, ReplayStore
from rollout.buffer.scheduler import StalenessScheduler
from rollout.buffer.state_place import state_of
from rollout.wire.schema import decode, encode
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory, Turn

GROUPS_PER_STEP, STEPS, ROUNDS = 32, 4, 5
SMALL_GROUPS, SMALL_WARM_UP, SMALL_PER_STEP = 100_000, 10_000, 200


def build_group(slot: Slot, episodes: int, turns: int, prompt: int, sampled: int, text: int) -> Group:
    """A group of random tokens; `prompt` and `sampled` tokens and `text` characters a turn."""
    rng = np.random.default_rng(slot.group_id)

    def step(turn: int) -> Turn:
        return Turn(
            turn=turn,
            segment=0,
            observation="x" * text,
            action="y" * text,
            prompt_ids=rng.integers(0, 150_000, prompt, dtype=np.int32),
            action_ids=rng.integers(0, 150_000, sampled, dtype=np.int32),
            behavior_logprobs=-rng.random(sampled, dtype=np.float32),
            versions=np.zeros(sampled, dtype=np.int32),
            reward=0.0,
            finish_reason="stop",
        )

    def episode(index: int) -> Trajectory:
        steps = tuple(step(turn) for turn in range(turns))
        return Trajectory(slot.group_id, slot.attempt, index, slot.task, steps, EndReason.TERMINATED, True)

    return Group(slot, tuple(episode(index) for index in range(episodes)))


def large_group(group_id: int) -> Group:
    slot = Slot(group_id, 0, Task.of("bench", group_id), 0)
    return build_group(slot, episodes=8, turns=4, prompt=1_000, sampled=2_000, text=2_000)


def median_seconds(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median wall time of each, run in turns so that a busy machine is busy for all; the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def in_memory(groups: list[Group], coded: bool) -> Callable[[], None]:
    """A few steps of reserve, add, take and release; with `coded` every group is also encoded and decoded."""
    ready = [encode(group) for group in groups]

    def run() -> None:
        buffer: StalenessScheduler[pa.RecordBatch] = StalenessScheduler(len(groups), max_lag=0)
        for version in range(1, STEPS + 1):
            for index, group in enumerate(groups):
                group_id = version * len(groups) + index
                buffer.reserve(group_id)
                buffer.add(group_id, encode(group) if coded else ready[index])
            for _, batch in buffer.take() or []:
                if coded:
                    decode(batch)
            buffer.release(version)

    return run


def on_disk(folder: Path, groups: list[Group], per_sync: int, copied: bool = False) -> Callable[[], None]:
    """The same through a store, with one fsync for every `per_sync` groups and a checkpoint at the end.

    copied: with a copy on the same disk, which has every answer before it is given.
    """
    ready = [(encode(group), [EpisodeRow.of(t) for t in group.trajectories]) for group in groups]
    settings = BufferSettings(groups_per_step=len(groups), max_lag=0)
    run_folder = Path(tempfile.mkdtemp(dir=folder))
    base = str(run_folder) if copied else ""
    state, copy = ExitStack().enter_context(state_of(run_folder, base, folder / "local"))
    store = ReplayStore(state, lambda group_id: Task.of("bench", group_id), settings, copy=copy)

    def run() -> None:
        for _ in range(STEPS):
            store_step(store, ready, per_sync)
            store.release(store.version + 1)
            store.ship()
        store.checkpointed(store.version)
        store.ship()

    return run


def plain_file(folder: Path, groups: list[Group]) -> Callable[[], None]:
    """What the disk gives to the same bytes in one file, with one fsync a step: the ceiling of the store."""
    ready = [encode(group).serialize() for group in groups]

    def run() -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(STEPS):
                file.writelines(ready)
                file.flush()
                os.fsync(file.fileno())

    return run


def store_step(
    store: ReplayStore, ready: list[tuple[pa.RecordBatch, list[EpisodeRow]]], per_sync: int
) -> None:
    """Hand in and take the groups of one step."""
    finished: list[FinishedGroup] = []
    for worker_loop, (batch, rows) in enumerate(ready):
        given = store.reserve("bench", worker_loop)
        assert given is not None
        finished.append((given.slot, batch, rows))
        if len(finished) == per_sync:
            assert store.commit([], finished) == [None] * per_sync
            store.ship()
            finished = []
    assert not finished
    assert store.take(store.version) is not None
    store.ship()


def resident_growth_mb(folder: Path) -> float:
    """Memory gained while many small groups go through a store, once it has warmed up."""
    process = psutil.Process()
    small = build_group(
        Slot(0, 0, Task.of("bench", 0), 0), episodes=2, turns=1, prompt=20, sampled=10, text=20
    )
    ready = [(encode(small), [EpisodeRow.of(t) for t in small.trajectories])] * SMALL_PER_STEP
    settings = BufferSettings(groups_per_step=SMALL_PER_STEP, max_lag=0)
    with tempfile.TemporaryDirectory(dir=folder) as run_folder:
        store = ReplayStore(Path(run_folder), lambda group_id: Task.of("bench", group_id), settings)
        warm = 0
        for version in range(1, SMALL_GROUPS // SMALL_PER_STEP + 1):
            store_step(store, ready, per_sync=SMALL_PER_STEP)
            store.release(version)
            store.checkpointed(version)
            if version * SMALL_PER_STEP == SMALL_WARM_UP:
                warm = process.memory_info().rss
        grown = process.memory_info().rss - warm
        assert store.counts()["trained"] == SMALL_GROUPS
        store.close()
    return grown / 1e6


def main() -> dict[str, float]:
    """The figures by name (targets: memory_gb_per_s at least 1, disk_ratio at least 0.7, resident_growth_mb at most 8).

    "coded" includes what rollout workers and the learner do: rows encoded before and decoded after.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # First: later, memory that large groups have left behind would hide growth.
        grown = resident_growth_mb(folder)
        groups = [large_group(index) for index in range(GROUPS_PER_STEP)]
        gb = STEPS * sum(encode(group).nbytes for group in groups) / 1e9
        took = median_seconds(
            {
                "encode": lambda: [encode(group) for _ in range(STEPS) for group in groups],
                "memory": in_memory(groups, coded=False),
                "memory_coded": in_memory(groups, coded=True),
                "plain_file": plain_file(folder, groups),
                "disk": on_disk(folder, groups, per_sync=GROUPS_PER_STEP),
                "disk_sync_each": on_disk(folder, groups, per_sync=1),
                "copied": on_disk(folder, groups, per_sync=GROUPS_PER_STEP, copied=True),
                "copied_sync_each": on_disk(folder, groups, per_sync=1, copied=True),
            }
        )
    figures = {f"{name}_gb_per_s": gb / value for name, value in took.items()}
    figures["disk_ratio"] = figures["disk_gb_per_s"] / figures["plain_file_gb_per_s"]
    figures |= {"group_mb": 1e3 * gb / STEPS / GROUPS_PER_STEP, "resident_growth_mb": grown}
    return {name: round(value, 3) for name, value in figures.items()}


if __name__ == "__main__":
    print(json.dumps(main()))
