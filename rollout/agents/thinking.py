"""Thoughts before an action, within a budget: the environment hears what comes behind them.

    policy   <think> ... </think> action          the environment is told "action"
    policy   <think> ...                          the budget is spent: the thought is closed for it,
             </think>                             as tokens that nobody sampled and nothing trains,
    policy   action                               and its turn goes on from there
    policy   <think> ... </think> act             the budget is spent behind the thought:
    policy   ion                                  its turn goes on, and the environment is told "action"

A budget is counted in tokens by the agent (`max_tokens` of an observation), which says when a turn was cut. With
keep=False a thought is forgotten once it was acted on, as the chat templates of reasoning models have it: the next turn
opens a new segment, whose history is what was said without the thoughts; what is stored is never edited. Closing a
thought that takes too long: Muennighoff et al. 2025, s1: Simple test-time scaling, section 3.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.base import Info, Message, Observation, messages_of
from envs.hosting.host import Sampled
from envs.tools.tool_calls import THOUGHT
from rollout.agents.part import Env, Outcome, Part, anew, answered, begins_anew, goes_on


class ThinkSettings(BaseModel):
    """A thought before every action."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["think"] = "think"
    tokens: int = Field(
        256,
        gt=0,
        description="a turn, thought and action; one that is still thinking after so many is stopped thinking",
    )
    answer_tokens: int = Field(
        64, gt=0, description="what a turn that was cut there is then given for the action"
    )
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
        self._cut = False  # the turn that comes next was
        # The turn goes on with its action, which begins so; None: it is another turn.
        self._acting: str | None = None
        self._said = ""  # of an action that the environment has go on

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._history, self._cut, self._acting, self._said = messages_of(observation), False, None, ""
        return self._budgeted(messages_of(observation)), info

    def sampled(self, sampled: Sampled) -> None:
        """How the turn came about that the next step brings (`envs.hosting.host.Told`)."""
        self._cut = sampled.cut

    def step(self, action: str) -> Outcome:
        _, closed, spoken = action.rpartition(THOUGHT)
        if self._acting is None and not (closed and not self._cut):
            self._acting = spoken if closed else ""
            close, limit = "" if closed else THOUGHT, self._settings.answer_tokens
            return answered([{"role": "assistant", "content": close, "go_on": True, "max_tokens": limit}])
        spoken = ((self._acting or "") + spoken).strip()
        observation, reward, terminated, truncated, info = self.env.step(spoken)
        return self._heard(spoken, messages_of(observation)), float(reward), terminated, truncated, info

    def _heard(self, spoken: str, new: list[Message]) -> list[Message]:
        """What is said to an action: behind it, or to a history without the thought."""
        spoken, self._said, self._acting = self._said + spoken, "", None
        if goes_on(new):
            self._said, self._acting = f"{spoken}{new[0]['content']}", ""
            return new
        if begins_anew(new):
            self._history = new
        else:
            self._history = [*self._history, {"role": "assistant", "content": spoken}, *new]
        keeps = self._settings.keep or begins_anew(new)
        return self._budgeted(messages_of(new if keeps else anew(self._history, new)))

    def _budgeted(self, messages: list[Message]) -> list[Message]:
        first = messages[0]
        first["max_tokens"] = min(first.get("max_tokens", self._settings.tokens), self._settings.tokens)
        return messages
