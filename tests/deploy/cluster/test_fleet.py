"""The fleet over members that are scripted to die, freeze and refuse."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from deploy.cluster.fleet import Fleet
from deploy.cluster.native import DirectSync
from deploy.config.supervise import PartFailed
from deploy.report.evaluation import Evaluation
from rollout.buffer.replay_store import EpisodeRow
from rollout.episodes.evaluation import EvaluationPlan
from rollout.wire.trajectory import Task
from rollout.wire.weights import SyncReport, TransferFailed, WeightMismatch
from tests.deploy.cluster.scripted_members import Scripted, World, play, until, update


@pytest.mark.parametrize("how", ["dead", "frozen"])
def test_a_lost_worker_is_killed_its_groups_handed_on_and_its_seat_filled(how: str) -> None:
    async def script(world: World, fleet: Fleet) -> None:
        fleet.scale(2)
        await fleet.ready()
        fleet.play()
        await until(lambda: len(world.ran) == 2)
        setattr(world.members["rollout-0"], how, True)
        await until(lambda: ("rollout-0.1", 0) in world.ran)
        assert world.members["rollout-0"].killed.is_set()
        assert world.reassigned == ["rollout-0"]
        assert {member.name for member in fleet.serving} == {"rollout-0.1", "rollout-1"}
        cause = (
            "is dead"
            if how == "dead"
            else "within 1 s: its event loop has been blocked for 30 s in step (maze.py:33)"
        )
        assert any(cause in said for said in world.said)

    play(script)


def test_publishing_does_not_wait_for_the_dead_and_the_next_one_holds_the_new_version() -> None:
    async def script(world: World, fleet: Fleet) -> None:
        fleet.scale(3)
        await fleet.ready()
        fleet.play()
        world.members["rollout-1"].dead = True
        world.version = 1
        reports = await fleet.publish(update(1))
        assert {report.engine for report in reports} == {"rollout-0", "rollout-2"}
        await fleet.ready()
        assert {member.version for member in fleet.serving} == {1}  # type: ignore[attr-defined]
        await until(lambda: ("rollout-1.1", 1) in world.ran)

    play(script)


def test_a_member_is_never_admitted_with_a_version_that_was_replaced_meanwhile() -> None:
    async def script(world: World, fleet: Fleet) -> None:
        fleet.scale(1)
        await fleet.ready()
        fleet.scale(4)
        for version in range(1, 6):
            world.version = version
            await fleet.publish(update(version))
            assert {member.version for member in fleet.serving} == {version}  # type: ignore[attr-defined]
        await fleet.ready()
        assert {member.version for member in fleet.serving} == {5}  # type: ignore[attr-defined]

    play(script)


def test_members_that_are_sent_a_version_serve_it_and_one_that_joins_meanwhile_is_lent_it() -> None:
    async def script(world: World, fleet: Fleet) -> None:
        async def send(names: Sequence[str]) -> list[SyncReport]:
            fleet.scale(3)  # the third loads version 0 while version 1 is on its way
            await until(lambda: world.members["rollout-2"].version == 0 if len(world.members) > 2 else False)
            world.version = 1
            for name in names:
                world.members[name].version = 1
            return [SyncReport(name, 1, 0, 0.0, 0.0, 0.0) for name in names]

        fleet.scale(2)
        await fleet.ready()
        reports = await fleet.hand_over(send)
        assert [report.engine for report in reports] == ["rollout-0", "rollout-1"]
        await fleet.ready()
        assert [member.version for member in fleet.serving] == [1, 1, 1]  # type: ignore[attr-defined]
        assert [row["version"] for row in fleet.roster()] == [1, 1, 1]

    play(script)


def test_a_transfer_that_fails_costs_a_way_and_no_worker() -> None:
    async def script(world: World, fleet: Fleet) -> None:
        async def fail(names: Sequence[str]) -> list[SyncReport]:
            raise TransferFailed("rollout-1 could not load weight version 1")

        async def succeed(names: Sequence[str]) -> list[SyncReport]:
            return [SyncReport(name, 2, 0, 0.0, 0.0, 0.0) for name in names]

        direct = DirectSync(True, world.said.append)
        fleet.scale(2)
        await fleet.ready()
        assert await direct.sync(fleet, succeed) is None, "nothing was published yet"
        direct.begin()
        assert await direct.sync(fleet, fail) is None
        assert world.said == [
            "rollout-1 could not load weight version 1; this version goes through the object store"
        ]
        assert await direct.sync(fleet, succeed) is None, "members may hold half a version"
        await fleet.publish(update(1))
        direct.begin()
        assert await direct.sync(fleet, succeed) is not None
        assert await direct.sync(fleet, succeed) is not None, "the next one too"
        assert {member.name for member in fleet.serving} == {"rollout-0", "rollout-1"}

    play(script)


def test_beyond_its_budget_a_part_stops_the_run_and_is_named() -> None:
    async def script(world: World, fleet: Fleet) -> None:
        world.stillborn |= {f"rollout-0{life}" for life in ("", ".1", ".2", ".3")}
        fleet.scale(1)
        with pytest.raises(PartFailed, match=r"rollout-0 was lost 3 times .* finds no device"):
            await fleet.ready()

    play(script)


def test_a_worker_with_other_weights_stops_the_run() -> None:
    async def script(world: World, fleet: Fleet) -> None:
        fleet.scale(2)
        await fleet.ready()
        world.refusing.add("rollout-1")
        with pytest.raises(WeightMismatch, match="lm_head"):
            await fleet.publish(update(1))

    play(script)


def test_the_fleet_grows_and_shrinks_while_it_plays() -> None:
    async def script(world: World, fleet: Fleet) -> None:
        fleet.scale(2)
        await fleet.ready()
        fleet.play()
        await until(lambda: len(world.ran) == 2)
        fleet.scale(4)
        await until(lambda: len(world.ran) == 4)
        fleet.scale(1)
        await until(lambda: len(world.reassigned) == 3)
        assert all(world.members[f"rollout-{seat}"].drained for seat in (1, 2, 3))
        assert [member.name for member in fleet.serving] == ["rollout-0"]
        fleet.scale(2)
        await fleet.ready()
        assert len(fleet.serving) == 2

    play(script)


def test_after_a_pause_every_member_plays_again() -> None:
    async def script(world: World, fleet: Fleet) -> None:
        fleet.scale(2)
        await fleet.ready()
        for round_ in range(3):
            fleet.play()
            await until(lambda: len(world.ran) == 2 * (round_ + 1))  # noqa: B023
            await fleet.pause()
        assert not world.reassigned

    play(script)


def test_an_evaluation_is_whole_although_a_worker_dies_in_it() -> None:
    async def script(world: World, fleet: Fleet) -> None:
        fleet.scale(2)
        await fleet.ready()
        tasks, thrice = [Task.of("e", seed) for seed in range(100)], EvaluationPlan(samples=3)
        evaluation = asyncio.create_task(fleet.evaluate(tasks, "after", thrice))
        await asyncio.sleep(0.005)
        world.members["rollout-0"].dead = True
        assert [row.episode for row in await evaluation] == [seed for seed in range(100) for _ in range(3)]

    play(script)


@pytest.mark.parametrize("guilty", [{3}, {3, 70}])
def test_a_task_that_kills_every_worker_is_given_up_as_crashed_and_all_others_are_measured(
    guilty: set[int],
) -> None:
    tasks = [Task.of("maze", seed) for seed in range(100)]
    shares: list[list[int]] = []

    class Dying(Scripted):
        async def evaluate(self, tasks: Sequence[Task], name: str, plan: EvaluationPlan) -> list[EpisodeRow]:
            seeds = [task.seed for task in tasks]
            self.dead = bool(guilty & set(seeds))
            if self.dead:
                shares.append(seeds)
            return await super().evaluate(tasks, name, plan)

    class DyingWorld(World):
        def launch(self, name: str) -> Scripted:
            self.members[name] = Dying(name, self)
            return self.members[name]

    async def script(world: World, fleet: Fleet) -> None:
        fleet.scale(8)
        await fleet.ready()
        rows = await fleet.evaluate(tasks, "before")
        assert [row.episode for row in rows if row.sound] == [
            each for each in range(100) if each not in guilty
        ]
        for seed in guilty:
            assert str(rows[seed].error).startswith(
                f"crashed: 3 rollout workers were lost while they played maze (seed {seed}), the last one with no "
                "other task; its error: ConnectionError: rollout-"
            )
        evaluation = Evaluation.of(rows)
        assert (evaluation.episodes, evaluation.failed) == (100 - len(guilty), len(guilty))

    play(script, DyingWorld())
    for seed in guilty:
        lost_with = [len(share) for share in shares if seed in share]
        assert lost_with == [64 if seed < 64 else 36] * 2 + [1], "twice among others, then by itself"
