"""Planning: the policy writes a plan before it acts, and may revise it; plans are turns, stored and trained.

    environment   the first observation
    policy        a plan                          a turn that this part answers
    environment   "Plan: ..." and the observation again
    policy        an action
    ...
    policy        "plan: another plan"            a turn that this part answers: a revision
    environment   "Plan: another plan" and the observation again

A full conversation contains the plan, which is repeated when the conversation restarts. `remind` repeats it with every
observation, for policies that see the last observation only. Planning in a turn before acting: Wang et al. 2023,
Plan-and-Solve Prompting, section 2; revising after observations: Yao et al. 2023, ReAct, section 2.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.base import Info, Observation, messages_of
from rollout.agents.part import (
    AgentPart,
    Env,
    Outcome,
    continues_turn,
    part_answer,
    resets_context,
    with_text_after,
    with_text_before,
)

REVISION = "plan:"  # prefix of a turn that revises the plan


class PlanSettings(BaseModel):
    """A plan before the first action, and revisions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["plan"] = "plan"
    ask: str = Field(
        "First write a plan.", description="text that asks for a plan, appended to the first observation"
    )
    remind: bool = Field(
        True,
        description="repeat the plan with every observation. False shows it once; only for a conversation "
        "that is kept whole",
    )
    max_chars: int = Field(400, gt=0, description="longest plan, characters; a longer one is cut")
    max_revisions: int = Field(
        4,
        ge=0,
        description='most revisions of the plan per episode, turns that begin with "plan:"; a further one is '
        "taken as an action",
    )

    def wrap(self, env: Env) -> Env:
        """Wrap an environment in this part."""
        return Planning(env, settings=self)


class Planning(AgentPart):
    """An environment whose policy writes plans."""

    def __init__(self, env: Env, settings: PlanSettings) -> None:
        super().__init__(env, settings=settings)
        self._settings = settings
        self._plan: str | None = None  # None: the policy was asked for it
        self._revisions = 0
        self._seen: Observation = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self._seen, info = self.env.reset(seed=seed, options=options)
        self._plan, self._revisions = None, 0
        return with_text_after(self._seen, self._settings.ask), info

    def step(self, action: str) -> Outcome:
        if self._plan is None:
            return self._planned(action)
        begins = action.lower().startswith(REVISION) and not continues_turn(messages_of(self._seen))
        if begins and self._revisions < self._settings.max_revisions:
            self._revisions += 1
            return self._planned(action[len(REVISION) :])
        self._seen, reward, terminated, truncated, info = self.env.step(action)
        return self._with_plan(self._seen), float(reward), terminated, truncated, info

    def _planned(self, text: str) -> Outcome:
        self._plan = text.strip()[: self._settings.max_chars]
        return part_answer(self._with_plan(self._seen))

    def _with_plan(self, observation: Observation) -> Observation:
        messages = messages_of(observation)
        said = self._settings.remind or resets_context(messages)
        return (
            with_text_before(f"Plan: {self._plan}", messages)
            if said and not continues_turn(messages)
            else messages
        )
