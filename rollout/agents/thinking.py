"""Thoughts before an action, within a token budget: the environment receives the text after them.

    policy   <think> ... </think> action          the environment receives "action"
    policy   <think> ...                          the budget is spent: the thought is closed by the part,
             </think>                             with tokens that are not sampled and not trained,
    policy   action                               and the turn continues
    policy   <think> ... </think> act             the budget is spent after the thought:
    policy   ion                                  the turn continues, and the environment receives "action"

The agent counts the budget in tokens (`max_tokens` of an observation) and reports whether a turn was cut. With
keep=False a thought is removed after its action, as in the chat templates of reasoning models: the next turn opens a
new segment, whose history has no thoughts; stored segments are never edited. Closing a thought that takes too long:
Muennighoff et al. 2025, s1: Simple test-time scaling, section 3.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.base import Info, Message, Observation, messages_of
from envs.hosting.host import TokenUsage
from envs.tools.tool_calls import THOUGHT
from rollout.agents.part import (
    AgentPart,
    Env,
    Outcome,
    continues_turn,
    part_answer,
    reset_context,
    resets_context,
)


class ThinkSettings(BaseModel):
    """Thoughts before every action, and their budget."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["think"] = "think"
    tokens: int = Field(
        256,
        gt=0,
        description="most tokens of a turn, thought and action together; a thought that is still open then is "
        "closed",
    )
    answer_tokens: int = Field(
        64, gt=0, description="tokens added for the action of a turn that reached the limit"
    )
    keep: bool = Field(
        True,
        description="keep thoughts in the conversation. False removes each one after its action, as the chat "
        "templates of reasoning models do; every turn is then a segment of its own",
    )

    def wrap(self, env: Env) -> Env:
        """Wrap an environment in this part."""
        return Thinking(env, settings=self)


class Thinking(AgentPart):
    """An environment that receives actions without thoughts."""

    def __init__(self, env: Env, settings: ThinkSettings) -> None:
        super().__init__(env, settings=settings)
        self._settings = settings
        self._history: list[Message] = []
        self._cut = False  # whether the next turn was cut at its budget
        self._acting: str | None = None  # the action so far of a turn that continues; None: a new turn
        self._said = ""  # the action so far, if the environment continues the turn

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._history, self._cut, self._acting, self._said = messages_of(observation), False, None, ""
        return self._budgeted(messages_of(observation)), info

    def sampled(self, sampled: TokenUsage) -> None:
        """Receive how the next step's turn was sampled (`envs.hosting.host.SamplingAware`)."""
        self._cut = sampled.cut

    def step(self, action: str) -> Outcome:
        _, closed, spoken = action.rpartition(THOUGHT)
        if self._acting is None and not (closed and not self._cut):
            self._acting = spoken if closed else ""
            close, limit = "" if closed else THOUGHT, self._settings.answer_tokens
            return part_answer(
                [{"role": "assistant", "content": close, "continue_turn": True, "max_tokens": limit}]
            )
        spoken = ((self._acting or "") + spoken).strip()
        observation, reward, terminated, truncated, info = self.env.step(spoken)
        return self._heard(spoken, messages_of(observation)), float(reward), terminated, truncated, info

    def _heard(self, spoken: str, new: list[Message]) -> list[Message]:
        """The observation after an action, appended to the conversation or to a history without the thought."""
        spoken, self._said, self._acting = self._said + spoken, "", None
        if continues_turn(new):
            self._said, self._acting = f"{spoken}{new[0]['content']}", ""
            return new
        if resets_context(new):
            self._history = new
        else:
            self._history = [*self._history, {"role": "assistant", "content": spoken}, *new]
        keeps = self._settings.keep or resets_context(new)
        return self._budgeted(messages_of(new if keeps else reset_context(self._history, new)))

    def _budgeted(self, messages: list[Message]) -> list[Message]:
        first = messages[0]
        first["max_tokens"] = min(first.get("max_tokens", self._settings.tokens), self._settings.tokens)
        return messages
