"""A learner whose state is taken to host memory while engines have its device."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from learner.data.batch_checks import GroupsRefused
from learner.training.checkpoint import latest
from learner.training.loop import Row
from tests.learner.training.looped import Groups, Setup


@pytest.fixture
def setup(tiny: Path, group_of: Groups) -> Setup:
    return Setup(tiny, group_of)


def test_a_learner_that_is_away_lands_what_it_copied_and_does_nothing_else(
    setup: Setup, tmp_path: Path
) -> None:
    async def run() -> None:
        here, away = tmp_path / "here", tmp_path / "away"
        await setup.loop.train(1)
        await setup.loop.save(here)
        await setup.loop.landed()
        await setup.loop.copy(away)
        update = await setup.loop.publish_weights()
        state = setup.loop._state
        held = state.device_bytes
        parameters = sum(p.numel() for p in setup.learner.policy.parameters())
        assert await setup.loop.offload() == held == 4 * 3 * parameters  # and two moments of each
        assert state.device_bytes == 0 and all(p.grad is None for p in setup.learner.policy.parameters())
        assert await setup.loop.offload() == 0
        for refused in (setup.loop.train(2), setup.loop.save(tmp_path / "other")):
            with pytest.raises(RuntimeError, match="in host memory"):
                await refused
        await setup.loop.save(away)
        await setup.loop.landed()
        assert (await setup.loop.publish_weights()).manifest == update.manifest
        assert await setup.loop.onload() == held == state.device_bytes
        assert setup.holds(update)
        files = [latest(run) for run in (here, away)]
        assert None not in files
        one, other = ({p.name: p.read_bytes() for p in f.rglob("*.safetensors")} for f in files if f)
        assert one == other and one

    asyncio.run(run())


def test_a_step_whose_groups_are_refused_is_asked_for_again_where_nobody_plays_others(setup: Setup) -> None:
    setup.replay_buffer.broken = 2

    async def run() -> Row:
        for _ in range(2):
            with pytest.raises(GroupsRefused, match=r"step 1: .* not finite"):
                await setup.loop.train(1, others=False)
        return await setup.loop.train(1, others=False)

    row = asyncio.run(run())
    assert row["nonfinite_batches"] == 2 and setup.replay_buffer.discarded == []
