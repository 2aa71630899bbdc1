"""Thoughts before an action, within a budget: the environment hears what comes behind them.

    policy   <think> ... </think> action          the environment is told "action"
    policy   <think> ...                          the budget is spent: the thought is closed for it,
             </think>                             as tokens that nobody sampled and nothing trains,
    policy   action                               and its turn goes on from there

A budget is counted in tokens by the agent (`max_tokens` of an observation). With keep=False a thought is forgotten once
it was acted on, as the chat templates of reasoning models have it: the next turn opens a new segment, whose history is
what was said without the thoughts; what is stored is never edited. Closing a thought that takes too long: Muennighoff
et al. 2025, s1: Simple test-time scaling, section 3.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.base import Info, Message, Observation, messages_of
from rollout.parts.part import Env, Outcome, Part, anew, answered

CLOSE = "</think>"


class ThinkSettings(BaseModel):
    """A thought before every action."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["think"] = "think"
    tokens: int = Field(
        256, gt=0, description="a turn that is still thinking after so many tokens is stopped thinking"
    )
    answer_tokens: int = Field(64, gt=0, description="what it is then given for the action")
    keep: bool = Field(True, description="let thoughts stay in the conversation")

    def dress(self, env: Env) -> Env:
        """The environment as the policy has it."""
        return Thinking(env, settings=self)


class Thinking(Part):
    """An environment that does not hear thoughts."""

    def __init__(self, env: Env, settings: ThinkSettings) -> None:
        super().__init__(env, settings=settings)
        self._settings = settings
        self._history: list[Message] = []
        self._stopped = False  # the last turn was stopped thinking

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._history, self._stopped = messages_of(observation), False
        return self._budgeted(messages_of(observation)), info

    def step(self, action: str) -> Outcome:
        thought, closed, spoken = action.rpartition(CLOSE)
        if not closed and not self._stopped:
            self._stopped = True
            limit = self._settings.answer_tokens
            return answered([{"role": "assistant", "content": CLOSE, "go_on": True, "max_tokens": limit}])
        observation, reward, terminated, truncated, info = self.env.step(spoken.strip())
        new = messages_of(observation)
        self._history += [{"role": "assistant", "content": spoken.strip()}, *new]
        thought_of = bool(thought) or self._stopped
        self._stopped = False
        said = anew(self._history) if thought_of and not self._settings.keep else new
        return self._budgeted(said), float(reward), terminated, truncated, info

    def _budgeted(self, messages: list[Message]) -> list[Message]:
        first = messages[0]
        first["max_tokens"] = min(first.get("max_tokens", self._settings.tokens), self._settings.tokens)
        return messages
