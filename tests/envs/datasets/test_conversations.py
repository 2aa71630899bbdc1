"""Recorded conversations are read as TRL, OpenRLHF and ShareGPT write them, and played as they were said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from envs.datasets.conversations import Conversation, Reciter, RecordedTalk, conversations, of_row
from envs.datasets.files import DataError


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


ONE = [Conversation((([user("Sky?")], "blue"),))]
TWO = [*ONE, Conversation((([user("Sky?")], "green"),), reward=0.0)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [user("Sky?"), assistant("blue")]}, ONE),
        ({"prompt": "Sky?", "completion": "blue"}, ONE),
        ({"prompt": [user("Sky?")], "completion": [assistant("blue")]}, ONE),
        ({"input": "Sky?", "output": "blue"}, ONE),
        ({"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "blue"}]}, ONE),
        ({"prompt": "Sky?", "completion": "green", "label": False}, [TWO[1]]),
        ({"prompt": "Sky?", "chosen": "blue", "rejected": "green"}, TWO),
        ({"prompt": [user("Sky?")], "chosen": [assistant("blue")], "rejected": [assistant("green")]}, TWO),
        ({"chosen": [user("Sky?"), assistant("blue")], "rejected": [user("Sky?"), assistant("green")]}, TWO),
        (
            {
                "prompt": "Sky?",
                "chosen": [user("Sky?"), assistant("blue")],
                "rejected": [user("Sky?"), assistant("green")],
            },
            TWO,
        ),
    ],
)
def test_every_schema_says_the_same(row: dict[str, Any], expected: list[Conversation]) -> None:
    assert of_row(row, "rows.jsonl:1") == expected


def test_every_turn_of_messages_is_learned_and_none_of_a_prompt() -> None:
    talk = [user("Sky?"), assistant("blue"), user("Grass?"), assistant("green")]
    (found,) = of_row({"messages": talk}, "rows.jsonl:1", system="Be short.")
    system = {"role": "system", "content": "Be short."}
    assert found.turns == (([system, user("Sky?")], "blue"), ([user("Grass?")], "green"))
    (found,) = of_row({"prompt": talk[:3], "completion": "green"}, "rows.jsonl:1")
    assert found.turns == ((talk[:3], "green"),)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "Sky is blue."}, "no column of the usual names"),
        ({"messages": [user("Sky?")]}, "no turn of an assistant"),
        ({"messages": [assistant("blue")]}, "text that answers something"),
        ({"prompt": "Sky?", "completion": 3}, "a prompt is text or a list of messages"),
        ({"prompt": "Sky?", "completion": "blue", "tools": "look"}, "tools is a list of JSON schemas"),
    ],
)
def test_a_row_without_a_conversation_is_named(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{told}"):
        list(conversations(str(tmp_path / "rows.jsonl")))


def test_a_conversation_is_played_as_it_was_said() -> None:
    talk = Conversation((([user("Sky?")], "blue"), ([user("Grass?")], "green")), reward=0.5)
    env, player = RecordedTalk([talk]), Reciter(talk)
    observation, _ = env.reset(seed=0)
    said = [observation, player.act(observation)]
    observation, reward, ended, *_ = env.step("whatever")
    said += [observation, player.act(observation)]
    assert (said, reward, ended) == ([[user("Sky?")], "blue", [user("Grass?")], "green"], 0.0, False)
    assert env.step("whatever")[1:3] == (0.5, True)
