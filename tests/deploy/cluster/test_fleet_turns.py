"""The fleet whose engines have their devices in turns with a learner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deploy.assembly.turns import Turns
from deploy.cluster.fleet import Fleet
from rollout.wire.weights import WeightUpdate
from tests.deploy.cluster.scripted_members import World, play, until, update


def test_a_member_that_cannot_sleep_is_ended_before_anyone_has_its_memory() -> None:
    async def script(world: World, fleet: Fleet) -> None:
        fleet.scale(2)
        await fleet.ready()
        one, other = (world.members[f"rollout-{seat}"] for seat in range(2))
        one.sleepless = True
        await fleet.sleep(2)
        assert one.killed.is_set() and other.asleep and not other.killed.is_set()
        await fleet.sleep(2)  # asked again, it sleeps on
        world.version = 1
        await fleet.publish(update(1))
        assert not other.asleep and other.version == 1

    play(script)


def test_a_member_that_does_not_wake_in_time_is_named_and_replaced() -> None:
    async def script(world: World, fleet: Fleet) -> None:
        fleet.scale(1)
        await fleet.ready()
        world.members["rollout-0"].wakes_late = True
        await fleet.sleep(2)
        world.version = 1
        assert await fleet.publish(update(1)) == []
        await fleet.ready()
        assert [member.name for member in fleet.serving] == ["rollout-0.1"]
        late = "rollout-0 (wake and sync to version 1) did not answer within 1 s"
        assert any(late in said for said in world.said)

    play(script)


def test_a_member_starts_in_the_engines_turn_which_does_not_end_meanwhile() -> None:
    moved: list[str] = []

    async def note(what: str) -> None:
        moved.append(what)

    async def script(world: World, fleet: Fleet) -> None:
        async def sleep() -> None:
            assert {member.name for member in fleet.serving} == {"rollout-0"}, "it was waited for"
            await fleet.sleep(2)

        turns = Turns(sleep, lambda: note("onload"), lambda: note("offload"))
        fleet._turn = turns.starting
        fleet.scale(1)
        await asyncio.sleep(0.02)
        assert world.members["rollout-0"].version == -1 and moved == []
        await turns.engines()
        await until(lambda: turns._starting == 1)
        await turns.learner()
        assert world.members["rollout-0"].asleep and moved == ["offload", "onload"]
        # One that is lost in the learner's turn is replaced in the engines' next one.
        world.members["rollout-0"].dead = True
        await until(lambda: "rollout-0.1" in world.members)
        await asyncio.sleep(0.02)
        assert world.members["rollout-0.1"].version == -1
        await turns.engines()
        await fleet.ready()
        assert world.members["rollout-0.1"].version == 0

    play(script)


def test_members_that_join_when_the_learner_is_lost_do_not_hold_its_successor_up() -> None:
    async def script(world: World, fleet: Fleet) -> None:
        async def nothing() -> None: ...

        @asynccontextmanager
        async def never() -> AsyncIterator[WeightUpdate]:
            await asyncio.Event().wait()
            yield update(0)

        turns = Turns(lambda: fleet.sleep(2), nothing, nothing)
        fleet._turn, fleet._lend = turns.starting, never
        await turns.engines()
        fleet.scale(1)
        await until(lambda: turns._starting == 1)
        fleet.lose_joining("the learner is lost")
        await turns.new_learner()
        await until(lambda: "rollout-0.1" in world.members)
        assert world.members["rollout-0"].killed.is_set()
        assert any("the learner is lost" in said for said in world.said)

    play(script)
