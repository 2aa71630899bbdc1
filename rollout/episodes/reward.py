"""A user's own reward: a function of an episode, whose value replaces the environment's rewards or is added to them.

It is computed once, after the end of the episode, and stored with the last turn. A dict of numbers counts as their sum,
and each is stored under its name, like an environment's named rewards; its entry `costs`, a dict of numbers of 0 or
more, counts as an environment's costs do: not in the sum. The environment's own costs stay. The function may be a
coroutine function. It runs in a thread, within the time limit of an environment's step (env.host.step_seconds). If it
raises, exceeds the limit or returns no finite number, the episode has failed: an error is never a reward.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from envs.base import as_number, named_costs
from envs.code_lines import describe_error
from envs.hosting.host import EnvironmentFailed
from envs.user_functions import settled
from rollout.wire.own_part import OwnPart
from rollout.wire.trajectory import COST, EndReason, Trajectory, Turn

_NO_EVIDENCE = (EndReason.FAILED, EndReason.CANCELLED)


class OwnReward(OwnPart):
    """A reward function: (episode) -> a number, or named numbers."""

    CALLED_WITH: ClassVar[tuple[str, ...]] = ("episode",)

    mode: Literal["add", "replace"] = Field(
        "replace",
        description="how the reward is used. replace: the function's reward is the episode's reward. add: it "
        "is added to the environment's",
    )

    def __call__(self, episode: Trajectory) -> Trajectory:
        """Return the episode with this reward. TypeError, ValueError for a value that is no finite number."""
        returned = settled(self.run(episode))
        named = dict(returned) if isinstance(returned, Mapping) else None
        costs = named_costs({} if named is None else {"costs": named.pop("costs", {})})
        parts = {"reward": returned} if named is None else {str(name): named[name] for name in named}
        numbers = {name: as_number(value, f"{self.kind}: {name}") for name, value in parts.items()}
        for name, number in numbers.items():
            if not math.isfinite(number):
                raise ValueError(f"{self.kind}: {name} is {number}; a reward must be a finite number")
        turns = episode.turns if self.mode == "add" else tuple(map(_unpaid, episode.turns))
        *before, last = turns
        own = json.loads(last.named_rewards or "{}") | (numbers if named is not None else {})
        own |= {f"{COST}{name}": cost for name, cost in costs.items()}
        paid = replace(
            last,
            reward=last.reward + sum(numbers.values()),
            named_rewards=json.dumps(own) if own else None,
        )
        return replace(episode, turns=(*before, paid))


async def rewarded(episode: Trajectory, reward: OwnReward | None, timeout_seconds: float) -> Trajectory:
    """Return the episode with its reward; one that failed, was cancelled or has no turn is unchanged."""
    if reward is None or episode.end_reason in _NO_EVIDENCE or not episode.turns:
        return episode
    where = f"{episode.task.env_id} (seed {episode.task.seed}): the reward {reward.kind}"
    try:
        async with asyncio.timeout(timeout_seconds):
            return await asyncio.to_thread(reward, episode)
    except TimeoutError as error:
        raise EnvironmentFailed(
            f"{where} took longer than {timeout_seconds:g} s (env.host.step_seconds)"
        ) from error
    except Exception as error:  # foreign code, like an environment
        raise EnvironmentFailed(f"{where} failed: {describe_error(error)}") from error


def _unpaid(turn: Turn) -> Turn:
    numbers = json.loads(turn.named_rewards or "{}")
    costs = {name: cost for name, cost in numbers.items() if name.startswith(COST)}
    return replace(turn, reward=0.0, named_rewards=json.dumps(costs) if costs else None)
