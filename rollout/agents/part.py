"""Base of the built-in agent parts, and functions on the messages they pass on.

A part is a wrapper between an environment and a policy, with text on both sides. It may answer a turn of the policy
itself: `part_answer` is such an outcome (no step of the environment, no reward). When the wrapped environment restarts
the conversation, a part resets its state too. When the environment continues the policy's turn, a part adds nothing.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from envs.base import DIRECTIONS, Info, Message, Observation, messages_of

VERDICT = ("success", "malformed")  # keys of an info that describe an end

Env = gym.Env[Any, str]
Content = str | list[dict[str, Any]]
Outcome = tuple[Observation, float, bool, bool, Info]


class AgentPart(gym.Wrapper[Any, str, Any, str], RecordConstructorArgs):
    """A wrapper that passes everything through; the state of its subclasses is reset with every episode."""

    def __init__(self, env: Env, **options: Any) -> None:
        RecordConstructorArgs.__init__(self, **options)  # lets Gymnasium describe and rebuild the wrapper
        super().__init__(env)


def joined_content(first: Content, second: Content) -> Content:
    """Join two contents, each on its own line: text, or a list of parts if one of them is a list."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n{second}"
    before = [{"type": "text", "text": f"{first}\n"}] if isinstance(first, str) else first
    return [*before, *([{"type": "text", "text": f"\n{second}"}] if isinstance(second, str) else second)]


def with_text_before(text: str, observation: Observation) -> list[Message]:
    """Insert a text before the content of an observation's first message of the user; its directions stay."""
    messages = messages_of(observation)
    for message in messages:
        if message["role"] == "user":
            message["content"] = joined_content(text, message["content"])
            return messages
    return [*messages, {"role": "user", "content": text}]


def with_text_after(observation: Observation, text: str) -> list[Message]:
    """Append a part's request to an observation, as the user's text.

    Its directions stay, except `max_tokens`, which limits answers to the environment.
    """
    messages = messages_of(observation)
    messages[0].pop("max_tokens", None)
    if messages[-1]["role"] != "user":
        return [*messages, {"role": "user", "content": text}]
    messages[-1]["content"] = joined_content(messages[-1]["content"], text)
    return messages


def resets_context(messages: list[Message]) -> bool:
    """Whether these messages restart the conversation."""
    return bool(messages[0].get("reset_context"))


def continues_turn(messages: list[Message]) -> bool:
    """Whether these messages continue the policy's last turn."""
    return bool(messages[0].get("continue_turn"))


def reset_context(messages: list[Message], latest: list[Message]) -> list[Message]:
    """Build the messages that restart the conversation. latest: those among them that the policy answers.

    Of their directions, tools and `max_tokens` stay. Consecutive messages of the user are merged, because some chat
    templates require alternating roles.
    """
    said: list[Message] = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key not in DIRECTIONS}
        if said and plain["role"] == said[-1]["role"] == "user":
            said[-1]["content"] = joined_content(said[-1]["content"], plain["content"])
        else:
            said.append(plain)
    tools = next((message["tools"] for message in messages if "tools" in message), None)
    said[0] |= {"reset_context": True} | ({} if tools is None else {"tools": tools})
    if "max_tokens" in latest[0]:
        said[0]["max_tokens"] = latest[0]["max_tokens"]
    return said


def part_answer(observation: Observation) -> Outcome:
    """Outcome of a turn that a part answers itself."""
    return observation, 0.0, False, False, {}


def defer_end(terminated: bool, truncated: bool, info: Info) -> Info:
    """Info of a step whose end a part defers: the end moves into its key `ended`."""
    verdict = {key: info[key] for key in VERDICT if key in info}
    rest = {key: value for key, value in info.items() if key not in VERDICT}
    return rest | {"ended": {"terminated": terminated, "truncated": truncated} | verdict}
