from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.data.batch_checks import BatchRefused
from learner.parallel.ranks import RankLost
from learner.stages.settings import SftSettings
from learner.training.learner import Learner
from learner.training.loop import Row
from rollout.wire.held_version import HeldVersion
from rollout.wire.schema import encode
from rollout.wire.weights import Handle
from tests.learner.training.looped import Groups, Setup


@pytest.fixture
def setup(tiny: Path, group_of: Groups) -> Setup:
    return Setup(tiny, group_of)


@pytest.fixture
def staged(tiny: Path, group_of: Groups) -> Setup:
    return Setup(tiny, group_of, [SftSettings(epochs=2)])


def test_a_step_asked_again_is_answered_again_and_trained_once(setup: Setup) -> None:
    async def run() -> tuple[Row, Row, Row]:
        first, same = await asyncio.gather(setup.loop.train(1), setup.loop.train(1))
        return first, same, await setup.loop.train(2)

    first, same, second = asyncio.run(run())
    assert first == same != second
    assert (first["step"], second["step"]) == (1, 2)
    assert setup.replay_buffer.taken == [0, 1]
    assert setup.loop.version == 2


def test_a_batch_that_can_not_be_learned_from_is_set_aside_and_the_step_takes_another(setup: Setup) -> None:
    before = [parameter.detach().clone() for parameter in setup.learner.policy.parameters()]
    setup.replay_buffer.broken = 2
    row = asyncio.run(setup.loop.train(1))
    assert setup.replay_buffer.taken == [0, 0, 0]
    assert setup.replay_buffer.discarded == [0, 0]
    assert row["nonfinite_batches"] == 2
    assert setup.loop.version == 1
    unspoilt = Learner(setup.learner.settings)
    unspoilt.step([setup.replay_buffer.group_of(0, [1.0, 0.0, 0.5])])
    assert all(
        torch.equal(a, b)
        for a, b in zip(unspoilt.policy.parameters(), setup.learner.policy.parameters(), strict=True)
    )
    assert not all(torch.equal(a, b) for a, b in zip(before, setup.learner.policy.parameters(), strict=True))


def test_batches_that_never_can_be_learned_from_end_the_run_at_a_whole_version(setup: Setup) -> None:
    setup.replay_buffer.broken = 100
    with pytest.raises(
        BatchRefused, match=r"^step 1: none of 4 batches in a row .*; last: group 0, episode 0"
    ):
        asyncio.run(setup.loop.train(1))
    assert setup.loop.version == 0
    asyncio.run(setup.loop.publish_weights())  # no half-made step: the parameters are version 0's


@pytest.mark.parametrize("step", [0, 2])
def test_a_step_out_of_order_is_refused(setup: Setup, step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} was asked of a learner that stands at version 0"):
        asyncio.run(setup.loop.train(step))
    assert setup.replay_buffer.taken == []


def test_one_version_is_offered_again_without_a_new_snapshot_until_the_next(setup: Setup) -> None:
    async def run() -> None:
        update = await setup.loop.publish_weights()
        update.verify()
        assert setup.holds(update)
        assert await setup.loop.publish_weights() is update
        await setup.loop.unpin_weights(update.version, update.handle)
        await setup.loop.unpin_weights(update.version, update.handle)
        again = await setup.loop.publish_weights()
        assert again.manifest is update.manifest
        assert setup.holds(again)
        await setup.loop.train(1)
        later = await setup.loop.publish_weights()
        later.verify()
        assert later.version == 1
        assert setup.holds(later)

    asyncio.run(run())
    assert setup.shelf.placed == 3


def test_a_delta_is_offered_beside_the_whole_version_to_those_who_hold_the_one_before(
    tiny: Path, tmp_path: Path, group_of: Groups
) -> None:
    setup = Setup(tiny, group_of, rate=1e-10)  # below the resolution of most float32 words
    worker = HeldVersion(tmp_path / "versions")

    async def run() -> None:
        first = await setup.loop.publish_weights(delta=True)
        assert first.delta is None, "there is no version before"
        worker.receive(first)
        worker.loaded()
        await setup.loop.train(1)
        second = await setup.loop.publish_weights(delta=True)
        assert second.delta is not None
        assert second.delta.base == first.manifest.digest
        assert sum(second.delta.sizes) < second.manifest.nbytes
        assert setup.holds(second), "whole"
        held = worker.receive(replace(second, handle=Handle("rollout.wire.nowhere:open", "")))
        replace(held, verified=False).verify()
        assert setup.holds(held), "by the delta"
        await setup.loop.train(2)
        assert (await setup.loop.publish_weights()).delta is None, "not asked for"
        await setup.loop.train(3)
        fourth = await setup.loop.publish_weights(delta=True)
        late = worker.receive(fourth)  # it has missed a version
        assert fourth.delta is not None
        assert setup.holds(late)

    asyncio.run(run())


def test_what_a_later_caller_was_offered_outlives_an_earlier_ones_letting_go(setup: Setup) -> None:
    """Calls of an asyncio actor overtake each other: the second offer may be made before the first is let go of."""

    async def run() -> None:
        first = await setup.loop.publish_weights()
        second = await setup.loop.publish_weights()
        await setup.loop.unpin_weights(first.version, first.handle)
        assert setup.holds(second)
        assert await setup.loop.publish_weights() is second
        await setup.loop.unpin_weights(second.version, second.handle)
        await setup.loop.unpin_weights(second.version, second.handle)
        anew = await setup.loop.publish_weights()
        assert setup.shelf.placed == 2
        await setup.loop.train(1)
        later = await setup.loop.publish_weights()
        anew.verify()  # engines may still load the version before
        await setup.loop.unpin_weights(anew.version, anew.handle)
        with pytest.raises(OSError):
            anew.verify()
        assert await setup.loop.publish_weights() is later

    asyncio.run(run())


def test_a_late_engine_gets_the_old_version_whole_while_the_next_is_trained(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()
    step = setup.learner.step

    def held_up(groups: Any) -> dict[str, float]:
        for parameter in setup.learner.policy.parameters():
            parameter.data.add_(1.0)  # half a step
        began.set()
        assert go_on.wait(30)
        return step(groups)

    async def run() -> None:
        early = await setup.loop.publish_weights()
        await setup.loop.unpin_weights(early.version, early.handle)
        training = asyncio.create_task(setup.loop.train(1))
        await asyncio.to_thread(began.wait, 30)
        late = await asyncio.wait_for(setup.loop.publish_weights(), 30)
        late.verify()
        assert late.version == 0
        go_on.set()
        await training
        next_one = await setup.loop.publish_weights()
        next_one.verify()
        assert next_one.version == 1

    monkeypatch.setattr(setup.learner, "step", held_up)
    asyncio.run(run())


def test_a_cancelled_caller_leaves_no_step_running_beside_the_next_call(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()
    step = setup.learner.step

    def held_up(groups: Any) -> dict[str, float]:
        began.set()
        assert go_on.wait(30)
        return step(groups)

    async def run() -> Row:
        training = asyncio.create_task(setup.loop.train(1))
        await asyncio.to_thread(began.wait, 30)
        training.cancel()
        asking_again = asyncio.create_task(setup.loop.train(1))
        await asyncio.sleep(0)
        go_on.set()
        return await asking_again

    monkeypatch.setattr(setup.learner, "step", held_up)
    assert asyncio.run(run())["step"] == 1
    assert setup.replay_buffer.taken == [0]


def test_after_a_step_that_failed_on_its_way_the_weights_go_nowhere(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(groups: Any) -> dict[str, float]:
        raise MemoryError("halfway")

    async def run() -> None:
        with pytest.raises(MemoryError):
            await setup.loop.train(1)
        for verb in (setup.loop.train(1), setup.loop.publish_weights(), setup.loop.save(tmp_path)):
            with pytest.raises(RuntimeError, match="the learner's step after version 0 failed on its way"):
                await verb

    monkeypatch.setattr(setup.learner, "step", failing)
    asyncio.run(run())


def test_version_0_lands_after_the_stages_and_a_save_may_be_asked_again(
    staged: Setup, tmp_path: Path, tiny: Path, group_of: Groups
) -> None:
    async def run() -> None:
        made, steps = await staged.loop.begin_stage(0, [encode(group_of(0, [1.0, 1.0]))])
        with pytest.raises(RuntimeError, match="a stage is under way"):
            await staged.loop.publish_weights()
        assert made == 0 and len(await staged.loop.advance_stage(steps + 1)) == steps
        for _ in range(2):
            await staged.loop.save(tmp_path)
            await staged.loop.landed()
        assert (await staged.loop.publish_weights()).version == 0 == len(await staged.loop.advance_stage(1))

    asyncio.run(run())
    assert staged.replay_buffer.landed_versions == [0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["version-00000000"]
    resumed = Setup(tiny, group_of)
    resumed.learner.load(tmp_path)
    assert resumed.loop.version == 0
    assert resumed.holds(asyncio.run(staged.loop.publish_weights()))


def test_what_the_stages_find_is_version_minus_1_also_while_they_are_made(
    staged: Setup, group_of: Groups
) -> None:
    async def run() -> None:
        found = await staged.loop.publish_weights()
        assert found.version == -1 and staged.holds(found)
        _, steps = await staged.loop.begin_stage(0, [encode(group_of(0, [1.0, 1.0]))])
        await staged.loop.advance_stage(1)
        again = await staged.loop.publish_weights()
        assert again.manifest == found.manifest and not staged.holds(again)
        await staged.loop.advance_stage(steps)
        made = await staged.loop.publish_weights()
        assert made.version == 0 and staged.holds(made)

    asyncio.run(run())


def test_other_ranks_are_told_in_order_what_is_done_and_nothing_of_what_is_said_again(
    setup: Setup, tmp_path: Path
) -> None:
    async def run() -> None:
        for _ in range(2):
            await setup.loop.train(1)
            update = await setup.loop.publish_weights()
            await setup.loop.save(tmp_path)
            await setup.loop.landed()
        await setup.loop.unpin_weights(update.version, update.handle)
        await setup.loop.publish_weights()

    asyncio.run(run())
    assert setup.told == [("take", 0), ("step", 1), ("snapshot",), ("copy", tmp_path), ("land",)]


def test_a_rank_that_is_gone_ends_the_wait_for_it_and_half_a_step_goes_nowhere(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def waiting(groups: Any) -> dict[str, float]:
        assert go_on.wait(30)  # in a collective, for the one that is gone
        raise RuntimeError("connection reset by peer")

    async def run() -> None:
        with pytest.raises(RankLost, match="rank 1 is gone"):
            await setup.loop.train(1)
        with pytest.raises(RuntimeError, match="failed on its way"):
            await setup.loop.publish_weights()
        go_on.set()

    monkeypatch.setattr("learner.training.loop._LAST_WORDS_SECONDS", 0.1)
    monkeypatch.setattr(setup.learner, "step", waiting)
    setup.gone_at = "step"
    asyncio.run(run())
