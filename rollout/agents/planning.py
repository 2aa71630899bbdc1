"""Plan first, act on the plan, revise it: the plan is a turn of the trajectory, stored and trained.

    environment   the first observation
    policy        a plan                          a turn to this part
    environment   "Plan: ..." and the observation again
    policy        an action
    ...
    policy        "plan: another plan"            a turn to this part, whenever what was seen contradicts the plan
    environment   "Plan: another plan" and the observation again

Where the conversation is kept, the plan stands in it, and is said again where it begins anew; `remind` says it with
every observation besides, for policies that see the last observation alone. Planning as a turn of its own before
acting: Wang et al. 2023, Plan-and-Solve Prompting, section 2; revising in the light of what was observed: Yao et al.
2023, ReAct, section 2.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.base import Info, Observation, messages_of
from rollout.agents.part import Env, Outcome, Part, answered, begins_anew, followed, goes_on, preceded

REVISION = "plan:"  # what a turn begins with that revises the plan


class PlanSettings(BaseModel):
    """A plan before the first action, and whenever the policy wants another."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["plan"] = "plan"
    ask: str = Field("First write a plan.", description="what is said behind the first observation")
    remind: bool = Field(True, description="say the plan with every observation")
    max_chars: int = Field(400, gt=0, description="a longer plan is cut")
    max_revisions: int = Field(
        4, ge=0, description="revisions an episode; a turn that wants another is an action"
    )

    def dress(self, env: Env) -> Env:
        """The environment as the policy has it."""
        return Planning(env, settings=self)


class Planning(Part):
    """An environment whose policy plans."""

    def __init__(self, env: Env, settings: PlanSettings) -> None:
        super().__init__(env, settings=settings)
        self._settings = settings
        self._plan: str | None = None  # None: asked for
        self._revisions = 0
        self._seen: Observation = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self._seen, info = self.env.reset(seed=seed, options=options)
        self._plan, self._revisions = None, 0
        return followed(self._seen, self._settings.ask), info

    def step(self, action: str) -> Outcome:
        if self._plan is None:
            return self._planned(action)
        begins = action.lower().startswith(REVISION) and not goes_on(messages_of(self._seen))
        if begins and self._revisions < self._settings.max_revisions:
            self._revisions += 1
            return self._planned(action[len(REVISION) :])
        self._seen, reward, terminated, truncated, info = self.env.step(action)
        return self._with_plan(self._seen), float(reward), terminated, truncated, info

    def _planned(self, text: str) -> Outcome:
        self._plan = text.strip()[: self._settings.max_chars]
        return answered(self._with_plan(self._seen))

    def _with_plan(self, observation: Observation) -> Observation:
        messages = messages_of(observation)
        said = self._settings.remind or begins_anew(messages)
        return preceded(f"Plan: {self._plan}", messages) if said and not goes_on(messages) else messages
