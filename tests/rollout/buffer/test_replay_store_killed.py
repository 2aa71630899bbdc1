"""The store's process killed for good, again and again, in the middle of its work: what it said it had done is done."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

from rollout.buffer.replay_store import BufferSettings, ReplayStore
from rollout.wire.schema import decode, restore_turns
from rollout.wire.trajectory import Task

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = BufferSettings(groups_per_step=2, max_lag=1, segment_mib=1)
# Plays, trains and saves without end, and says so: a line is printed when a call has returned.
SCRIPT = """
import itertools, sys
from pathlib import Path
import numpy as np
from rollout.wire.schema import encode, encode_turns
from rollout.buffer.replay_store import BufferSettings, EpisodeRow, ReplayStore
from rollout.wire.trajectory import EndReason, Group, Turn, Task, Trajectory

def step(slot, turn):
    ids = np.array([slot.group_id, slot.attempt, turn] * 3_000, dtype=np.int32)
    by = np.full(len(ids), slot.version, dtype=np.int32)
    return Turn(turn, 0, "?", "!", ids, ids, np.zeros(len(ids), np.float32), by, 0.0, "stop")

def say(*words):
    print(*words, flush=True)

settings = BufferSettings(groups_per_step=2, max_lag=1, segment_mib=1)
store = ReplayStore(Path(sys.argv[1]), lambda group_id: Task.of("count", group_id), settings)
while True:
    playing = [given.slot for worker_loop in range(4) if (given := store.reserve(sys.argv[2], worker_loop))]
    for turn in range(3):
        turns = [encode_turns([(slot, 0, step(slot, turn), None, None)], "w") for slot in playing]
        store.commit(turns, [])
        for slot in playing:
            say("turn", slot.group_id, slot.attempt, turn)
    groups = [
        Group(slot, (Trajectory(slot.group_id, slot.attempt, 0, slot.task, (step(slot, 0),), EndReason.TERMINATED),))
        for slot in playing[1:]
    ]
    finished = [(group.slot, encode(group), [EpisodeRow.of(t) for t in group.trajectories]) for group in groups]
    assert store.commit([], finished) == [None] * len(groups)
    for group in groups:
        say("complete", group.slot.group_id, group.slot.attempt)
    if store.take(store.version) is not None:
        store.release(store.version + 1)
        say("released", store.version)
        if store.version % 2:
            store.checkpointed(store.version)
            say("landed", store.version)
"""


def killed(folder: Path, name: str, lines: int) -> list[list[str]]:
    """What it said until it was killed, which came after so many lines."""
    command = [sys.executable, "-c", SCRIPT, str(folder), name]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
    return [line.split() for line in said if line.endswith("\n")]


def test_what_was_said_to_be_done_is_done(tmp_path: Path, tasks: Callable[[int], Task]) -> None:
    turns: dict[int, set[tuple[int, int]]] = {}
    complete: dict[int, int] = {}
    released = checkpointed = 0
    for life in range(5):
        for what, *numbers in killed(tmp_path, f"w{life}", Random(life).randrange(1, 60)):
            group_id, *rest = map(int, numbers)
            match what:
                case "turn":
                    attempt, turn = rest
                    turns.setdefault(group_id, set()).add((attempt, turn))
                case "complete":
                    complete[group_id] = rest[0]
                case "released":
                    released = group_id
                case "landed":
                    checkpointed = group_id
        with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
            fates = {row[0]: row[1:] for row in db.execute("SELECT group_id, attempt, state FROM groups")}
            late = db.execute(
                "SELECT count(*) FROM groups WHERE state = 'taken' AND taken_version < ?", (checkpointed,)
            ).fetchone()
        db.close()
        store = ReplayStore(tmp_path, tasks, SETTINGS)
        assert store.version >= released and late == (0,)
        for group_id, attempt in complete.items():
            assert fates[group_id][0] == attempt and fates[group_id][1] in ("complete", "taken", "trained")
        store.reassign(f"w{life}")
        worker_loop = 0
        while (given := store.reserve(f"check{life}", worker_loop)) is not None:
            worker_loop += 1
            resume_from = {} if given.turns is None else restore_turns(given.turns)
            found = {
                tuple(map(int, step.prompt_ids[1:3]))
                for episode in resume_from.values()
                for step in episode.turns
            }
            newest = max((attempt for attempt, _ in turns.get(given.slot.group_id, ())), default=0)
            said = {turn for turn in turns.get(given.slot.group_id, ()) if turn[0] == newest}
            # An attempt after that one may have recorded its first turns, and be killed before it said so.
            later = any(attempt > newest for attempt, _ in found)
            assert later or said <= found, f"life {life}: turns of group {given.slot.group_id} are lost"
        taken = [decode(batch).slot.group_id for batch in store.take(store.version) or []]
        assert all(fates[group_id][1] in ("complete", "taken", "trained") for group_id in taken)
        store.reassign(f"check{life}")
        store.close()
