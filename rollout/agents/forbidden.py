"""Forbidden tools as a part of an agent: they are not offered, and a call to one is refused."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.base import Info, Message, Observation, messages_of
from envs.tools.tool_calls import Style, ToolCall, parse_calls, spoken
from envs.tools.tool_env import CallOutcome
from rollout.agents.part import AgentPart, Env, Outcome


class ForbidSettings(BaseModel):
    """Tools that the policy may never call, whoever offers them: a rule that holds whatever has been learned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["forbid"] = "forbid"
    tools: tuple[str, ...] = Field(
        min_length=1,
        description="names of tools, of the environment or of the part tools. They are removed from the offered ones; "
        "a turn that calls one is answered with a refusal, and none of its calls is made",
    )

    def wrap(self, env: Env) -> Env:
        """Wrap an environment so that these tools are out of reach."""
        return ForbiddenTools(env, settings=self)


class ForbiddenTools(AgentPart):
    """An environment without some of its tools."""

    def __init__(self, env: Env, settings: ForbidSettings) -> None:
        super().__init__(env, settings=settings)
        self._names = frozenset(settings.tools)
        self._style: Style = "hermes"

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._without(observation), info

    def step(self, action: str) -> Outcome:
        calls = parse_calls(spoken(action), self._style)[1]
        names = [call.name for call in calls if isinstance(call, ToolCall)]
        if not self._names & set(names):
            observation, reward, terminated, truncated, info = self.env.step(action)
            return self._without(observation), float(reward), terminated, truncated, info
        refused: list[Message] = [
            {"role": "tool", "name": name, "content": f"{name} {self._why(name)}."} for name in names
        ]
        forbidden = sum(name in self._names for name in names)
        return refused, 0.0, False, False, {"tools": {CallOutcome.FORBIDDEN.value: forbidden}}

    def _why(self, name: str) -> str:
        return "is forbidden" if name in self._names else "was not called: a forbidden tool was, beside it"

    def _without(self, observation: Observation) -> Observation:
        messages = messages_of(observation)
        offered = messages[0].get("tools")
        if not offered:
            return observation
        self._style = offered[0].get("style", "hermes")
        left = [schema for schema in offered if schema["function"]["name"] not in self._names]
        messages[0] = {key: value for key, value in messages[0].items() if key != "tools"}
        if left:
            messages[0]["tools"] = left
        return messages
