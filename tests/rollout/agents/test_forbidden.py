"""A forbidden tool is neither offered nor called, whoever offers it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from envs.base import TextEnv
from rollout.agents.agent import AgentSettings
from rollout.agents.settings import PartSettings, wrapped

CALCULATOR = {"kind": "tools", "functions": ["envs.builtin.assistant_data:calculate"], "style": "plain"}


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {}}
    return {"type": "function", "style": "plain", "function": {"name": name, "parameters": parameters}}


class Shop(TextEnv):
    """Offers two tools of its own, and says its tools again after a turn that resets the context."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        self.heard: list[str] = []
        return self.offer(), {}

    def offer(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "go", "tools": [tool(name) for name in ("look", "buy")]}]

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.heard.append(action)
        return [self.offer()[0] | {"reset_context": True}], 0.5, False, False, {}


def env_with(*parts: dict[str, Any]) -> Any:
    return wrapped(Shop, TypeAdapter(tuple[PartSettings, ...]).validate_python(parts))


def offered(observation: Any) -> list[str]:
    return [schema["function"]["name"] for schema in observation[0].get("tools", [])]


def test_it_is_not_offered_and_a_call_is_refused_whole() -> None:
    env = env_with(CALCULATOR, {"kind": "forbid", "tools": ["buy", "calculate"]})
    assert offered(env.reset(seed=0)[0]) == ["look"]
    observation, reward, terminated, truncated, info = env.step("look()\nbuy()")
    assert [message["content"] for message in observation] == [
        "look was not called: a forbidden tool was, beside it.",
        "buy is forbidden.",
    ]
    assert (reward, terminated, truncated, info) == (0.0, False, False, {"tools": {"forbidden": 1}})
    assert env.step("calculate(1 + 1)")[0][0]["content"] == "calculate is forbidden."
    assert env.unwrapped.heard == []
    observation, reward, *_ = env.step("look()")
    assert env.unwrapped.heard == ["look()"] and reward == 0.5
    assert offered(observation) == ["look"]


def test_without_any_tool_left_none_are_said() -> None:
    observation, _ = env_with({"kind": "forbid", "tools": ["buy", "look"]}).reset(seed=0)
    assert "tools" not in observation[0]


def test_tools_that_are_added_outside_of_it_are_refused() -> None:
    with pytest.raises(ValidationError, match="forbid is listed before tools: it would not see their calls"):
        AgentSettings.model_validate({"parts": [{"kind": "forbid", "tools": ["calculate"]}, CALCULATOR]})
