"""Stored turns as messages: what annotators are shown, and what is written into files and scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from envs.base import DIRECTIONS, Message, messages_of
from rollout.wire.trajectory import Trajectory

Shown = dict[str, Any]  # a turn as JSON: its messages, the first of which may have tools, and the answer


def shown_turns(episode: Trajectory) -> list[Shown]:
    """The turns of an episode: the messages before each answer, as the environment said them, and the answer."""
    return [{"messages": _messages(turn.observation), "answer": turn.action} for turn in episode.turns]


def conversation(turns: Sequence[Shown]) -> list[Message]:
    """Everything that was said in these turns, without the tools that were offered."""
    said = []
    for turn in turns:
        said += [{key: each[key] for key in each if key != "tools"} for each in turn["messages"]]
        said.append(spoken(turn["answer"]))
    return said


def spoken(answer: str) -> Message:
    """An answer as the assistant's message."""
    return {"role": "assistant", "content": answer}


def tools_of(turns: Sequence[Shown]) -> list[Any]:
    """The tools that the environment offered, as JSON schemas; none where it offered none."""
    return list(turns[0]["messages"][0].get("tools") or ())


def _messages(observation: str) -> list[Message]:
    """Chat messages without directions other than the tools; any other text is the user's."""
    try:
        said = json.loads(observation)
    except json.JSONDecodeError:
        said = observation
    hidden = set(DIRECTIONS) - {"tools"}
    messages = messages_of(said if isinstance(said, list) and said else observation)
    return [{key: value for key, value in each.items() if key not in hidden} for each in messages]
