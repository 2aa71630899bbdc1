"""Tools described in the system message, for models whose chat template has no section for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from envs.base import Message
from envs.tools.tool_calls import CLOSE, OPEN


def with_tools_said(messages: Sequence[Message]) -> list[Message]:
    """The messages of a new conversation with the first one's `tools` as text, at the end of the system message.

    A conversation without a system message gets one. Unchanged if no tools are announced.
    """
    first, *others = messages
    if not (tools := first.get("tools")):
        return list(messages)
    rest = {key: value for key, value in first.items() if key != "tools"}
    text = tools_text(tools)
    if rest.get("role") != "system":
        return [{"role": "system", "content": text}, rest, *others]
    said = rest.get("content") or ""
    both = [*said, {"type": "text", "text": text}] if isinstance(said, list) else f"{said}\n\n{text}".strip()
    return [rest | {"content": both}, *others]


def tools_text(tools: Sequence[dict[str, Any]]) -> str:
    """What a policy has to know about tools, given as schemas: how to call one, and each with its arguments.

    Schemas of the style "plain" (envs/tools/tool_calls.py) become signatures, all others JSON.
    """
    if all(tool.get("style") == "plain" for tool in tools):
        return "\n".join(["You may call these tools, one call a line:", *map(_signature, tools)])
    example = json.dumps({"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}})
    call = f"A call is written {OPEN}\n{example}\n{CLOSE}"
    return "\n".join(["You may call these tools:", *map(_as_json, tools), call])


def _signature(tool: dict[str, Any]) -> str:
    function = tool.get("function", {})
    arguments = ", ".join(function.get("parameters", {}).get("properties", {}))
    return f"{function.get('name')}({arguments}): {function.get('description', '')}"


def _as_json(tool: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in tool.items() if key != "style"}, ensure_ascii=False)
