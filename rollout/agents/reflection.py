"""Reflection: after a failed attempt the policy reflects on it and tries again, several attempts per episode.

    attempt fails   the last observation, and "What went wrong?"
    policy          a reflection                       a turn that this part answers
    next attempt    the instance from its start, after the reflections so far, in a restarted conversation

An attempt has failed if it ended with success=False. Without a verdict of the environment there is no other attempt.
The episode's verdict is the last attempt's. An episode earns the reward of its best attempt: the first attempt's
rewards are paid step by step, a later one's at its end, as far as it exceeds the best before it. The sum thus stays in
the environment's range, and doing worse first never pays. (Paying only the last attempt would take back rewards of
turns that did nothing wrong.) Shinn et al. 2023, Reflexion, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.base import Info, Observation, named_rewards
from rollout.agents.part import (
    AgentPart,
    Env,
    Outcome,
    defer_end,
    reset_context,
    with_text_after,
    with_text_before,
)


class ReflectSettings(BaseModel):
    """More attempts after a failed one, with reflections."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["reflect"] = "reflect"
    attempts: int = Field(
        2,
        gt=1,
        description="most attempts per episode, the first included. Another attempt follows one that the "
        "environment calls unsuccessful",
    )
    ask: str = Field(
        "That failed. What will you do otherwise?",
        description="text that asks for a reflection, appended to the last observation of a failed attempt",
    )
    max_chars: int = Field(400, gt=0, description="longest reflection, characters; a longer one is cut")

    def wrap(self, env: Env) -> Env:
        """Wrap an environment in this part."""
        return Reflection(env, settings=self)


@dataclass
class Earned:
    """Rewards of an attempt."""

    total: float = 0.0
    named: dict[str, float] = field(default_factory=dict)

    def add(self, reward: float, named: dict[str, float] | None) -> None:
        """Add one step's reward and its components."""
        self.total += reward
        for name, value in (named or {}).items():
            self.named[name] = self.named.get(name, 0.0) + value

    def beyond(self, other: Earned) -> dict[str, float]:
        """Difference of each named reward to another attempt's."""
        names = self.named | other.named
        return {name: self.named.get(name, 0.0) - other.named.get(name, 0.0) for name in names}


class Reflection(AgentPart):
    """An environment that gives the policy several attempts."""

    def __init__(self, env: Env, settings: ReflectSettings) -> None:
        super().__init__(env, settings=settings)
        self._settings = settings
        self._seed: int | None = None
        self._options: dict[str, Any] | None = None
        self._learnt: list[str] = []
        self._failed = False  # the last attempt has failed, and the policy was asked to reflect
        self._earned = Earned()
        self._best: Earned | None = None  # of the attempts before

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        if seed is None:  # the same instance must come again
            seed = int(self.np_random.integers(2**31))
        self._seed, self._options = seed, options
        self._learnt, self._failed = [], False
        self._earned, self._best = Earned(), None
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, info

    def step(self, action: str) -> Outcome:
        if self._failed:
            return self._again(action)
        observation, reward, terminated, truncated, info = self.env.step(action)
        ended = terminated or truncated
        paid, info = self._paid(float(reward), info, ended)
        success = info.get("success")
        self._failed = ended and success is not None and not success
        if not self._failed or len(self._learnt) + 1 >= self._settings.attempts:
            return observation, paid, terminated, truncated, info
        told = defer_end(terminated, truncated, info)
        return with_text_after(observation, self._settings.ask), paid, False, False, told

    def _paid(self, reward: float, info: Info, ended: bool) -> tuple[float, Info]:
        """Reward of a step, and its info with the named components."""
        self._earned.add(reward, named_rewards(info))
        best = self._best
        if best is None:
            self._best = self._earned if ended else None
            return reward, info
        info = {key: value for key, value in info.items() if key != "rewards"}
        if not ended or self._earned.total <= best.total:
            return 0.0, info
        self._best = self._earned
        named = self._earned.beyond(best)
        return self._earned.total - best.total, info | ({"rewards": named} if named else {})

    def _again(self, text: str) -> Outcome:
        self._failed, self._earned = False, Earned()
        self._learnt.append(text.strip()[: self._settings.max_chars])
        observation, _ = self.env.reset(seed=self._seed, options=self._options)
        lessons = "\n".join(f"Attempt {number}: {text}" for number, text in enumerate(self._learnt, 1))
        opening = with_text_before(lessons, observation)
        return reset_context(opening, opening), 0.0, False, False, {"ended": None}
