"""Two replay buffers on one run, on purpose: one is refused or fenced, and no group is trained on twice."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest

from rollout.buffer import state_copy, state_place
from rollout.buffer.ledger_checks import LedgerError
from rollout.buffer.objects import FolderObjects
from rollout.buffer.part_log import Fenced
from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.buffer.replay_store import BufferSettings, ReplayStore
from rollout.wire.schema import decode, encode
from tests.rollout.buffer.copied import Copied, copied
from tests.rollout.buffer.interleaving import InTurns, Turns
from tests.rollout.buffer.store_model import played, task_of
from tests.rollout.buffer.stores import rows_of, turns

SETTINGS = BufferSettings(groups_per_step=2, max_lag=1, max_failed_share=1.0)


def in_turns(objects: FolderObjects, order: Turns, base: str) -> InTurns:
    return InTurns(objects, order)


class Books:
    """What the two were told is done, by group and by step."""

    def __init__(self) -> None:
        self.complete: set[tuple[int, int]] = set()  # group, attempt
        self.steps: dict[int, set[tuple[int, ...]]] = {}  # by version: groups of every step in a checkpoint
        self.fenced = 0


def play(store: ReplayStore, name: str, rng: Random, books: Books) -> None:
    """A worker and a learner in one, for a while: every line of the books follows an answer."""
    store.rollback(len(books.steps))  # its learner continues from the newest checkpoint
    store.ship()
    for turn in range(rng.randint(3, 12)):
        if (given := store.reserve(f"{name}{turn}", 0)) is not None:
            slot = given.slot
            store.commit([turns(slot, 0)], [])
            store.ship()
            group = played(slot, (slot.version, slot.version))
            (stale,) = store.commit([], [(slot, encode(group), rows_of(group))])
            store.ship()
            if stale is None:
                books.complete.add((slot.group_id, slot.attempt))
        version = store.version
        if (batches := store.take(version)) is not None:
            store.ship()
            groups = tuple(decode(batch).slot.group_id for batch in batches)
            store.checkpointed(version + 1)
            store.ship()
            books.steps.setdefault(version, set()).add(groups)
            store.release(version + 1)
            store.ship()


@pytest.mark.parametrize("first", range(0, 50, 10))
def test_two_buffers_at_once_train_on_no_group_twice(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_copy, "SNAPSHOT_PARTS", 5)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    fenced = steps = 0
    for seed in range(first, first + 10):
        run, books, order = tmp_path / str(seed), Books(), Turns(seed)
        monkeypatch.setattr(state_place, "objects_at", partial(in_turns, FolderObjects(run), order))

        def buffer(name: str, seed: int = seed, run: Path = run, books: Books = books) -> Callable[[], None]:
            def work() -> None:
                rng = Random(f"{seed}{name}")
                for life in range(2):
                    try:
                        one = Copied(run, tmp_path / "local", SETTINGS)
                    except Fenced:  # while it opened
                        continue
                    try:
                        play(one.store, f"{name}{life}.", rng, books)
                    except Fenced:
                        books.fenced += 1
                    one.abandon()

            return work

        order.run({name: buffer(name) for name in "ab"})
        rows, _ = copied(run)
        attempts = {row["group_id"]: row["attempt"] for row in rows["groups"]}
        states = {row["group_id"]: row["state"] for row in rows["groups"]}
        # A step has one answer, whichever of the two gave it, and no group is in two steps.
        assert all(len(answers) == 1 for answers in books.steps.values()), seed
        trained = [group for answers in books.steps.values() for groups in answers for group in groups]
        assert len(trained) == len(set(trained)) and all(states[group] == "trained" for group in trained), (
            seed
        )
        assert all(attempts[group] >= attempt for group, attempt in books.complete), seed
        steps += len(books.steps)
        fenced += books.fenced
    assert fenced >= 10 and steps >= 20


@pytest.mark.parametrize("copy", [False, True])
def test_the_second_buffer_of_a_run_is_refused_or_fences_the_first(
    copy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_place, "ENDING_SECONDS", 0.2)
    settings = SETTINGS.model_copy(update={"local_dir": str(tmp_path / "local")})
    base = str(tmp_path / "run") if copy else ""
    (tmp_path / "run").mkdir()

    def opened() -> ReplayBuffer:
        return ReplayBuffer.over(tmp_path / "run", task_of, settings, 10, 0, copy=base)

    async def scenario() -> None:
        first = opened()
        given = await first.reserve("w", 0)
        assert given is not None
        await first.record_turns(turns(given.slot, 0))
        if not copy:
            with pytest.raises(
                LedgerError, match=r"run: another replay buffer is using it \(pid \d+\); stop that run"
            ):
                opened()
            await first.record_turns(turns(given.slot, 1))
            await first.close()
            await opened().close()  # it let go
            return
        second = opened()
        with pytest.raises(Fenced, match="another replay buffer has taken over this run"):
            await first.record_turns(turns(given.slot, 1))
        with pytest.raises(Fenced):
            await first.counts()
        again = await second.reserve("w", 0)
        assert again is not None and again.slot.group_id == given.slot.group_id
        assert again.turns is not None and again.turns.num_rows == 1
        await second.close()

    asyncio.run(scenario())


def test_what_a_killed_process_held_is_free_at_once(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib; from rollout.buffer.file_system import sole_user; "
        "held = sole_user(pathlib.Path(sys.argv[1])); held.__enter__(); print('held', flush=True); input()"
    )
    lock = tmp_path / "buffer.lock"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(LedgerError, match=f"pid {holder.pid}"), state_place.sole_user(lock):
            pass
        holder.kill()
        with state_place.sole_user(lock, wait_seconds=30):
            pass
