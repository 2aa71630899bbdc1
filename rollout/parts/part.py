"""What the parts of an agent have in common: they talk.

A part is a wrapper between an environment and a policy, text on both sides. It answers the policy itself where a turn
is its own business: `answered` is such an outcome (nothing stepped, nothing earned).
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from envs.base import DIRECTIONS, Info, Message, Observation, messages_of

Env = gym.Env[Any, str]
Content = str | list[dict[str, Any]]
Outcome = tuple[Observation, float, bool, bool, Info]


class Part(gym.Wrapper[Any, str, Any, str], RecordConstructorArgs):
    """A wrapper that hands everything on. Its state begins anew with every reset."""

    def __init__(self, env: Env, **options: Any) -> None:
        RecordConstructorArgs.__init__(self, **options)  # lets Gymnasium describe and rebuild what is wrapped
        super().__init__(env)


def joined(first: Content, second: Content) -> Content:
    """Two contents as one, each on a line of its own: text, or parts where one of them has parts."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n{second}"
    before = [{"type": "text", "text": f"{first}\n"}] if isinstance(first, str) else first
    return [*before, *([{"type": "text", "text": f"\n{second}"}] if isinstance(second, str) else second)]


def preceded(text: str, observation: Observation) -> list[Message]:
    """An observation with a text before what its first message of the user says; its directions stay."""
    messages = messages_of(observation)
    for message in messages:
        if message["role"] == "user":
            message["content"] = joined(text, message["content"])
            return messages
    return [*messages, {"role": "user", "content": text}]


def followed(observation: Observation, text: str) -> list[Message]:
    """An observation with a text behind what its last message says; its directions stay."""
    messages = messages_of(observation)
    messages[-1]["content"] = joined(messages[-1]["content"], text)
    return messages


def anew(messages: list[Message]) -> list[Message]:
    """Messages with which the conversation begins anew.

    Of their directions only the tools stay. What one role says in a row is one message: some templates want turns.
    """
    said: list[Message] = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key not in DIRECTIONS}
        if said and plain["role"] == said[-1]["role"] == "user":
            said[-1]["content"] = joined(said[-1]["content"], plain["content"])
        else:
            said.append(plain)
    tools = next((message["tools"] for message in messages if "tools" in message), None)
    said[0] |= {"forget": True} | ({} if tools is None else {"tools": tools})
    return said


def answered(observation: Observation) -> Outcome:
    """What a part says to a turn that is its own business."""
    return observation, 0.0, False, False, {}
