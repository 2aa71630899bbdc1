"""A step that was begun ahead is the one that is asked for next, made once; forgotten, it disturbs nobody."""

from __future__ import annotations

import asyncio

import pytest

from deploy.cluster.step_ahead import StepAhead
from rollout.wire.metrics import Row


class Maker:
    def __init__(self) -> None:
        self.begun: list[int] = []
        self.go_on = asyncio.Event()

    async def __call__(self, number: int) -> Row:
        self.begun.append(number)
        await self.go_on.wait()
        if number == 13:
            raise RuntimeError("unlucky")
        return {"step": float(number)}


def test_a_step_begun_ahead_is_made_once_and_given_to_who_asks_for_it() -> None:
    async def run() -> None:
        maker = Maker()
        steps = StepAhead(maker)
        maker.go_on.set()
        assert await steps.made(1) == {"step": 1.0}
        steps.begin(2)
        await asyncio.sleep(0)
        assert maker.begun == [1, 2]
        assert await steps.made(2) == {"step": 2.0}
        assert await steps.made(3) == {"step": 3.0}
        assert maker.begun == [1, 2, 3]
        steps.begin(13)
        with pytest.raises(RuntimeError, match="unlucky"):
            await steps.made(13)

    asyncio.run(run())


def test_a_step_that_is_forgotten_is_begun_anew() -> None:
    async def run() -> None:
        maker = Maker()
        steps = StepAhead(maker)
        steps.begin(2)
        await asyncio.sleep(0)
        steps.forget()
        steps.forget()
        maker.go_on.set()
        assert await steps.made(1) == {"step": 1.0}
        assert maker.begun == [2, 1]

    asyncio.run(run())
