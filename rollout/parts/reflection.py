"""Reflect on a failed attempt and try again: one episode is several attempts at the same instance.

    attempt fails   the last observation, and "What went wrong?"
    policy          a reflection                       a turn to this part
    next attempt    the instance from its start, behind the reflections so far, in a conversation that begins anew

Every attempt's rewards are paid as they come; the verdict is the last attempt's. An attempt has failed when it ended
and the environment did not call it a success. Shinn et al. 2023, Reflexion, section 3.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.base import Info, Observation
from rollout.parts.part import Env, Outcome, Part, anew, answered, followed, preceded


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


class Reflection(Part):
    """An environment that gives another chance to a policy that says what it has learnt."""

    def __init__(self, env: Env, settings: ReflectSettings) -> None:
        super().__init__(env, settings=settings)
        self._settings = settings
        self._seed: int | None = None
        self._options: dict[str, Any] | None = None
        self._learnt: list[str] = []
        self._failed = False  # the last attempt has, and what went wrong is being asked

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        if seed is None:  # the same instance must come again
            seed = int(self.np_random.integers(2**31))
        self._seed, self._options = seed, options
        self._learnt, self._failed = [], False
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, info

    def step(self, action: str) -> Outcome:
        if self._failed:
            return self._again(action)
        observation, reward, terminated, truncated, info = self.env.step(action)
        ended = terminated or truncated
        if not ended or info.get("success") or len(self._learnt) + 1 >= self._settings.attempts:
            return observation, float(reward), terminated, truncated, info
        self._failed = True
        told = {key: value for key, value in info.items() if key == "rewards"}
        return followed(observation, self._settings.ask), float(reward), False, False, told

    def _again(self, text: str) -> Outcome:
        self._failed = False
        self._learnt.append(text.strip()[: self._settings.max_chars])
        observation, _ = self.env.reset(seed=self._seed, options=self._options)
        lessons = "\n".join(f"Attempt {number}: {text}" for number, text in enumerate(self._learnt, 1))
        return answered(anew(preceded(lessons, observation)))
