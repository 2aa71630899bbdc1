"""What the parts of an agent have in common: they talk.

A part is a wrapper between an environment and a policy, text on both sides. It answers the policy itself where a turn
is its own business: `answered` is such an outcome (nothing stepped, nothing earned). Where what it wraps has the
conversation begin anew, a part forgets what it knew of it, too; where it has the policy's turn go on, nothing is put
between.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from envs.base import DIRECTIONS, Info, Message, Observation, messages_of

VERDICT = ("success", "malformed")  # what an info says of an end

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
    """An observation with what a part asks for behind it, which the user says.

    Its directions stay, but how long an answer may be is said of answers to the environment.
    """
    messages = messages_of(observation)
    messages[0].pop("max_tokens", None)
    if messages[-1]["role"] != "user":
        return [*messages, {"role": "user", "content": text}]
    messages[-1]["content"] = joined(messages[-1]["content"], text)
    return messages


def begins_anew(messages: list[Message]) -> bool:
    """Whether the conversation does, with these messages."""
    return bool(messages[0].get("forget"))


def goes_on(messages: list[Message]) -> bool:
    """Whether the policy's last turn does, behind what these messages say."""
    return bool(messages[0].get("go_on"))


def anew(messages: list[Message], latest: list[Message]) -> list[Message]:
    """Messages with which the conversation begins anew; `latest` of them are those that the policy answers.

    Of their directions the tools stay, and how long the answer may be. What one role says in a row is one message: some
    templates want turns.
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
    if "max_tokens" in latest[0]:
        said[0]["max_tokens"] = latest[0]["max_tokens"]
    return said


def answered(observation: Observation) -> Outcome:
    """What a part says to a turn that is its own business."""
    return observation, 0.0, False, False, {}


def behind_the_end(terminated: bool, truncated: bool, info: Info) -> Info:
    """What is said with an end that a part has turns behind, in place of its info: the end is kept for later."""
    verdict = {key: info[key] for key in VERDICT if key in info}
    rest = {key: value for key, value in info.items() if key not in VERDICT}
    return rest | {"ended": {"terminated": terminated, "truncated": truncated} | verdict}
