"""Tools in words, for chat templates without a section for them."""

from __future__ import annotations

import json

from envs.base import Message
from envs.tools.tool import Tool
from rollout.chat.tool_prompt import tools_text, with_tools_said


def weather(place: str, date: str) -> str:
    """The weather in a place."""
    return f"{place} {date}"


SCHEMA = Tool.of(weather).schema
PLAIN = "You may call these tools, one call a line:\nweather(place, date): The weather in a place."


def test_plain_tools_are_signatures_and_others_are_json_with_the_form_of_a_call() -> None:
    assert tools_text([SCHEMA | {"style": "plain"}]) == PLAIN
    lines = tools_text([SCHEMA]).splitlines()
    assert json.loads(lines[1]) == SCHEMA
    assert lines[2:] == [
        "A call is written <tool_call>",
        '{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}',
        "</tool_call>",
    ]


def test_tools_end_the_system_message_and_other_directions_stay() -> None:
    tools = [SCHEMA | {"style": "plain"}]
    asked: Message = {"role": "user", "content": "q", "max_tokens": 4}
    assert with_tools_said([asked]) == [asked]
    assert with_tools_said([asked | {"tools": tools}]) == [{"role": "system", "content": PLAIN}, asked]
    told: Message = {"role": "system", "content": "Be brief."}
    assert with_tools_said([told | {"tools": tools}, asked]) == [
        {"role": "system", "content": f"Be brief.\n\n{PLAIN}"},
        asked,
    ]
    parts: Message = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    (system,) = with_tools_said([parts | {"tools": tools}])
    assert system["content"] == [{"type": "text", "text": "Be brief."}, {"type": "text", "text": PLAIN}]
