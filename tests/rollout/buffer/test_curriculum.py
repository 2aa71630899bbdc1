"""The curriculum repeats the easiest task that is not yet solved, and chooses the same one after a restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rollout.buffer.curriculum import CurriculumSettings
from rollout.buffer.replay_store import BufferSettings, ReplayStore
from rollout.wire.schema import encode
from rollout.wire.trajectory import DropReason, Group, Slot, Task
from tests.rollout.buffer.stores import reserve, rows_of
from tests.rollout.groups import make_group, task_of

SETTINGS = BufferSettings(
    groups_per_step=4, max_lag=0, curriculum=CurriculumSettings(repeat_share=0.5)
)  # every second group repeats a task, where one is there
ENDS = make_group(Slot(0, 0, task_of(0), 0)).trajectories[0].end_reason


def played(slot: Slot, successes: int, of: int = 4) -> Group:
    group = make_group(slot, end_reasons=(ENDS,) * of)
    siblings = [replace(each, success=number < successes) for number, each in enumerate(group.trajectories)]
    return replace(group, trajectories=tuple(siblings))


def step(store: ReplayStore, successes: list[int | None]) -> list[Slot]:
    """Play the groups of a step with so many successes of 4; None: dropped, all siblings alike and solved."""
    slots = []
    for count in successes:
        slots.append(slot := reserve(store))
        if count is None:
            store.drop(slot, DropReason.EQUAL_REWARDS, episodes=rows_of(played(slot, 4)))
        else:
            group = played(slot, count)
            assert store.commit([], [(slot, encode(group), rows_of(group))]) == [None]
    version = store.version
    assert store.take(version) is not None
    store.checkpointed(version + 1)
    store.release(version + 1)
    return slots


def tasks(slots: list[Slot]) -> list[Task]:
    return [slot.task for slot in slots]


def test_the_easiest_unsolved_task_is_repeated(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, task_of, SETTINGS)
    first = step(store, [1, 4, 3, 0])
    assert tasks(first) == [task_of(group) for group in range(4)], "nothing is measured yet"
    # Measured: 1, 4, 3, 0 successes of 4. Groups 5 and 7 repeat: the one with 3, then the one with 1.
    second = step(store, [2, 4, None, 2, 2])
    assert tasks(second) == [task_of(4), task_of(2), task_of(6), task_of(0), task_of(8)]
    # Task 2 is solved now, 6 was dropped as solved; left with 2 of 4 are 4, 0, 8, the oldest group first.
    third = step(store, [0, 0, 0, 0])
    assert tasks(third) == [task_of(4), task_of(10), task_of(0), task_of(12)]


def test_a_task_that_is_being_played_is_not_repeated_and_a_restart_chooses_alike(tmp_path: Path) -> None:
    chosen = []
    for name in ("whole", "restarted"):
        store = ReplayStore(tmp_path / name, task_of, SETTINGS)
        step(store, [1, 2, 3, 0])
        slots = [reserve(store), reserve(store)]
        if name == "restarted":
            store.close()
            store = ReplayStore(tmp_path / name, task_of, SETTINGS)
            store.rollback(1)
            for slot in slots:
                again = reserve(store)
                assert (again.group_id, again.task) == (slot.group_id, slot.task)
        slots += [reserve(store), reserve(store)]
        chosen.append(tasks(slots))
        store.close()
    assert chosen[0] == chosen[1] == [task_of(4), task_of(2), task_of(6), task_of(1)]


def test_without_a_share_every_group_plays_the_next_task(tmp_path: Path) -> None:
    store = ReplayStore(tmp_path, task_of, SETTINGS.model_copy(update={"curriculum": CurriculumSettings()}))
    assert tasks(step(store, [1, 2, 3, 3]) + step(store, [1, 2, 3, 3])) == [task_of(g) for g in range(8)]
