"""Reflect on a failed attempt and try again: one episode is several attempts at the same instance.

    attempt fails   the last observation, and "What went wrong?"
    policy          a reflection                       a turn to this part
    next attempt    the instance from its start, behind the reflections so far, in a conversation that begins anew

An attempt has failed when it ended and the environment said so: success is False. Where it gives no verdict nothing has
failed, and the episode ends as without this part. The verdict is the last attempt's. An episode earns what its best
attempt did: the first is paid as it goes along, a later one at its end by what it is better than the best before it. So
the sum stays in the environment's range, and it never pays to do worse first. (To pay the last attempt alone would take
back what was paid before, from a turn that did nothing wrong.) Shinn et al. 2023, Reflexion, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.base import Info, Observation, named_rewards
from rollout.agents.part import Env, Outcome, Part, anew, behind_the_end, followed, preceded


class ReflectSettings(BaseModel):
    """Another attempt after a failed one, with what was learnt from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["reflect"] = "reflect"
    attempts: int = Field(2, gt=1, description="attempts an episode, the first one included")
    ask: str = Field("That failed. What will you do otherwise?", description="what is said behind the end")
    max_chars: int = Field(400, gt=0, description="a longer reflection is cut")

    def dress(self, env: Env) -> Env:
        """The environment as the policy has it."""
        return Reflection(env, settings=self)


@dataclass
class Earned:
    """What an attempt has earned."""

    total: float = 0.0
    named: dict[str, float] = field(default_factory=dict)

    def add(self, reward: float, named: dict[str, float] | None) -> None:
        """One step's reward, and what it is made of."""
        self.total += reward
        for name, value in (named or {}).items():
            self.named[name] = self.named.get(name, 0.0) + value

    def beyond(self, other: Earned) -> dict[str, float]:
        """By how much each named reward is more than another attempt's."""
        names = self.named | other.named
        return {name: self.named.get(name, 0.0) - other.named.get(name, 0.0) for name in names}


class Reflection(Part):
    """An environment that gives another chance to a policy that says what it has learnt."""

    def __init__(self, env: Env, settings: ReflectSettings) -> None:
        super().__init__(env, settings=settings)
        self._settings = settings
        self._seed: int | None = None
        self._options: dict[str, Any] | None = None
        self._learnt: list[str] = []
        self._failed = False  # the last attempt has, and what went wrong is being asked
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
        told = behind_the_end(terminated, truncated, info)
        return followed(observation, self._settings.ask), paid, False, False, told

    def _paid(self, reward: float, info: Info, ended: bool) -> tuple[float, Info]:
        """What a step pays, and its info with what that is made of."""
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
        opening = preceded(lessons, observation)
        return anew(opening, opening), 0.0, False, False, {"ended": None}
