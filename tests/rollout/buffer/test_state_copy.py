"""The copy of a replay buffer's state: exact, verified, enough to go on from, and shipped before an answer."""

from __future__ import annotations

import asyncio
import errno
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rollout.buffer import state_copy, state_place
from rollout.buffer.history import History
from rollout.buffer.ledger_checks import LEDGER, LedgerError
from rollout.buffer.objects import FolderObjects, RemoteObjects, objects_at
from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.buffer.replay_store import BufferSettings, ReplayStore
from rollout.buffer.segments import read_rows
from rollout.buffer.state_place import check_state
from rollout.wire.schema import encode
from rollout.wire.trajectory import DropReason, EndReason, Group, Slot, Trajectory, Turn
from tests.rollout.buffer.copied import Copied, copied, files, tables
from tests.rollout.buffer.store_model import played, task_of
from tests.rollout.buffer.stores import rows_of, turns

SETTINGS = BufferSettings(groups_per_step=2, max_lag=1, max_failed_share=1.0, segment_mib=1)


def large(slot: Slot) -> Group:
    """Two episodes of half a megabyte: a segment is full after one group."""
    tokens = np.arange(30_000, dtype=np.int32)
    by = np.full(len(tokens), slot.version, np.int32)
    turn = Turn(0, 0, "?", "!", tokens, tokens, np.zeros(len(tokens), np.float32), by, 0.1 + 0.2, "stop")
    episodes = (
        Trajectory(slot.group_id, slot.attempt, i, slot.task, (turn,), EndReason.TERMINATED) for i in (0, 1)
    )
    return Group(slot, tuple(episodes))


def work(store: ReplayStore, rng: Random, steps: int, size: Callable[[Slot], Group] = large) -> None:
    """Everything that a store does, for some steps; a drop now and then."""
    version = store.version
    while store.version < version + steps:
        for loop in range(4):
            given = store.reserve(f"w{rng.randrange(10**9)}", loop)
            if given is None:
                continue
            store.commit([turns(given.slot, 0)], [])
            store.ship()
            if rng.random() < 0.2:
                store.drop(given.slot, DropReason.FAILED, "no route to höst")
            else:
                group = size(given.slot)
                store.commit([], [(given.slot, encode(group), rows_of(group))])
            store.ship()
        if store.take(store.version) is not None:
            store.ship()
            store.release(store.version + 1)
            store.checkpointed(store.version)
            store.ship()


def test_what_is_restored_is_the_original_row_for_row_and_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_copy, "SNAPSHOT_PARTS", 9)
    run, rng, whole = tmp_path / "run", Random(0), {}
    for life in range(4):
        one = Copied(run, tmp_path / f"local{life}", SETTINGS)
        for _ in range(3):
            work(one.store, rng, 2)
            rows, stored = copied(run)
            assert rows == tables(one.state)
            own = files(one.state)
            assert {name: stored[name] for name in own} == own
            assert all(
                stored[name] == data for name, data in whole.items()
            )  # and every segment that ever was
            whole |= {
                name: data for name, data in stored.items() if name in FolderObjects(run).names("groups")
            }
        one.abandon()
        shutil.rmtree(tmp_path / f"local{life}")
    assert len(whole) > 20
    one = Copied(run, tmp_path / "local", SETTINGS)
    one.close()
    rows = read_rows(run / "groups")
    with closing(
        sqlite3.connect(f"{(run / LEDGER).as_uri()}?mode=ro", uri=True)
    ) as db:  # read as any reader does
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        stored = {row[0] for row in db.execute("SELECT group_id FROM groups WHERE state != 'dropped'")}
    assert set(rows.column("group_id").to_pylist()) == stored
    assert History(run).steps == 24  # a replay reads the run folder


def test_the_oldest_segments_beyond_the_limit_leave_the_copy(tmp_path: Path) -> None:
    run = tmp_path / "run"
    one = Copied(run, tmp_path / "local", SETTINGS.model_copy(update={"disk_gib": 5 / 1024}))
    work(one.store, Random(1), 8)
    sizes = FolderObjects(run).names("groups")
    assert len(sizes) >= 2 and sum(sizes.values()) <= 6 * 2**20
    assert "segment-000000.arrows" not in sizes
    here = files(one.state)
    assert len([name for name in here if name.endswith(".arrows")]) <= 5  # no more here than are in use
    one.abandon()
    two = Copied(run, tmp_path / "local", SETTINGS)
    work(two.store, Random(2), 1)
    two.close()


def test_storage_that_is_away_pauses_the_run_and_what_was_unsure_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, away = FolderObjects.create, [0]

    def failing(self: FolderObjects, name: str, data: bytes) -> None:
        if away[0] and "copy/0" in name:
            away[0] -= 1
            if away[0] % 2:
                create(self, name, data)  # stored, but the answer is lost
            raise OSError(errno.ESTALE, "Stale file handle")
        create(self, name, data)

    monkeypatch.setattr(FolderObjects, "create", failing)

    async def scenario() -> None:
        one = Copied(tmp_path / "run", tmp_path / "local", SETTINGS)
        buffer = ReplayBuffer(one.store, retry_interval_seconds=0.01)
        paused = []
        for loop in range(4):
            given = await buffer.reserve("w", loop)
            assert given is not None
            away[0] = loop
            adding = asyncio.create_task(buffer.add(given.slot, encode(played(given.slot, (0, 0))), []))
            while not adding.done():
                paused.append((await buffer.state())["paused"])
                await asyncio.sleep(0)
            await adding
        assert any("the copy of the ledger cannot be written" in (reason or "") for reason in paused)
        assert (await buffer.counts())["complete"] == 4
        rows, _ = copied(tmp_path / "run")
        assert [row["state"] for row in rows["groups"]] == ["complete"] * 4
        await buffer.close()

    asyncio.run(scenario())


def test_a_run_that_had_no_copy_goes_on_with_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    plain = ReplayStore(run, task_of, SETTINGS, seed=7)
    work(plain, Random(3), 2)
    given = plain.reserve("w", 7)
    assert given is not None
    plain.commit([turns(given.slot, 0)], [])
    before = tables(run)
    plain._ledger.close()  # as after a kill: its log is still beside it
    for name, base in (("inside", ""), ("elsewhere", str(tmp_path / "elsewhere"))):
        folder = tmp_path / name / "run"
        shutil.copytree(run, folder)
        one = Copied(folder, tmp_path / "local", SETTINGS, base and f"{base}-{name}")
        assert tables(one.state) == before
        again = one.store.reserve("w", 7)
        assert again is not None and again.turns is not None and again.turns.num_rows == 1
        one.store.reassign("w")
        work(one.store, Random(4), 2)
        one.close()
        assert not (folder / f"{LEDGER}-wal").exists()
        assert History(folder).steps == 4
        check_state(folder, SETTINGS.model_copy(update={"copy_to": (base and f"{base}-{name}") or "auto"}), 4)


def test_a_resume_is_refused_whose_copy_lacks_what_its_checkpoint_contains(tmp_path: Path) -> None:
    run = tmp_path / "run"
    one = Copied(run, tmp_path / "local", SETTINGS)
    work(one.store, Random(5), 2)
    one.abandon()
    check_state(run, SETTINGS, 2)
    with pytest.raises(LedgerError, match="0 of 2 groups of step 3"):
        check_state(run, SETTINGS, 3)
    newest = max((run / "copy").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(LedgerError, match=f"copy/{newest.name}: damaged"):
        check_state(run, SETTINGS, 2)


def test_a_store_of_objects_keeps_the_copy_as_a_folder_does(tmp_path: Path) -> None:
    base = "memory://bucket/run"
    try:
        for life in range(2):
            one = Copied(tmp_path / "run", tmp_path / f"local{life}", SETTINGS, base)
            work(one.store, Random(life), 2)
            rows, stored = copied(objects_at(base))
            assert rows == tables(one.state)
            own = files(one.state)
            assert {name: stored[name] for name in own} == own
            one.abandon()
        two, one = (Copied(tmp_path / "run", tmp_path / "local", SETTINGS, base) for _ in range(2))
        one.close()
        two.abandon()
        assert {path.name for path in (tmp_path / "run" / "groups").iterdir()} == objects_at(base).names(
            "groups"
        ).keys()
        assert History(tmp_path / "run").steps == 4
    finally:
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]


def test_storage_without_exclusive_creation_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Careless(MemoryFileSystem):  # type: ignore[misc]
        protocol = "careless"

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
            super().pipe_file(path, value, "overwrite")

    class General(MemoryFileSystem):  # type: ignore[misc]
        protocol = "general"
        pipe_file = fsspec.AbstractFileSystem.pipe_file

    fsspec.register_implementation("careless", Careless, clobber=True)
    fsspec.register_implementation("general", General, clobber=True)
    for base, why in (
        (
            "careless://run",
            "can be created again, so two writers would not notice each other; use another store",
        ),
        ("general://run", r"its file system \(General\) cannot create an object exclusively"),
        ("nowhere://run", "cannot be used .*nowhere"),
        (str(tmp_path / "file" / "below"), "cannot be used .*Not a directory"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(LedgerError, match=why) as refused:
            objects_at(base)
        assert "\n" not in str(refused.value) and base in str(refused.value)
    monkeypatch.setattr(state_place, "flaw_of", lambda folder: "it is on a network file system (NFS)")
    with pytest.raises(
        LedgerError, match=r"local cannot hold the ledger: it is on a network .*set buffer.local_dir to"
    ):
        Copied(tmp_path / "run", tmp_path / "local", SETTINGS)
    assert isinstance(objects_at("memory://bucket"), RemoteObjects)
