"""A reward of a user's own: a function over a whole episode, whose number is added to the environment's or replaces it.

It is computed once, when the episode has ended, however it ended; what it gives is stored with the episode's last turn.
A dict of numbers is their sum, and each is stored under its name, as an environment's named rewards are. The function
may be a coroutine function. It runs in a thread, within the limit of a step of the environment (env.host.step_seconds);
where it raises, takes longer or gives no finite number, the episode has failed: an error is never a reward.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from envs.base import as_number
from envs.hosting.host import EnvironmentFailed
from envs.own_frames import told
from envs.user_functions import settled
from rollout.wire.own_part import OwnPart
from rollout.wire.trajectory import EndReason, Step, Trajectory

_NO_EVIDENCE = (EndReason.FAILED, EndReason.CANCELLED)


class OwnReward(OwnPart):
    """A reward function: (episode) -> a number, or named numbers."""

    CALLED_WITH: ClassVar[tuple[str, ...]] = ("episode",)

    mode: Literal["add", "replace"] = Field(
        "replace", description="in place of the environment's rewards, or added to them"
    )

    def __call__(self, episode: Trajectory) -> Trajectory:
        """The episode with this reward. TypeError, ValueError for what is no finite number."""
        returned = settled(self.run(episode))
        named = returned if isinstance(returned, Mapping) else None
        parts = {"reward": returned} if named is None else {str(name): named[name] for name in named}
        numbers = {name: as_number(value, f"{self.kind}: {name}") for name, value in parts.items()}
        for name, number in numbers.items():
            if not math.isfinite(number):
                raise ValueError(f"{self.kind}: {name} is {number}; a reward has to be a finite number")
        steps = episode.steps if self.mode == "add" else tuple(map(_unpaid, episode.steps))
        *before, last = steps
        own = json.loads(last.named_rewards or "{}") | (numbers if named is not None else {})
        paid = replace(
            last,
            reward=last.reward + sum(numbers.values()),
            named_rewards=json.dumps(own) if own else None,
        )
        return replace(episode, steps=(*before, paid))


async def rewarded(episode: Trajectory, reward: OwnReward | None, seconds: float) -> Trajectory:
    """The episode as it is paid; one that infrastructure ended, or that has no turn, as it is."""
    if reward is None or episode.end_reason in _NO_EVIDENCE or not episode.steps:
        return episode
    where = f"{episode.task.env_id} (seed {episode.task.seed}): the reward {reward.kind}"
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.to_thread(reward, episode)
    except TimeoutError as error:
        raise EnvironmentFailed(f"{where} took longer than {seconds:g} s (env.host.step_seconds)") from error
    except Exception as error:  # it is anybody's code, as an environment is
        raise EnvironmentFailed(f"{where} failed: {told(error)}") from error


def _unpaid(step: Step) -> Step:
    return replace(step, reward=0.0, named_rewards=None)
