"""Tool calls in what a model wrote: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """A tool's name and its arguments."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadCall:
    """A call that could not be read."""

    text: str
    why: str


def parse_calls(text: str) -> tuple[str, list[Call | BadCall]]:
    """What is said beside the calls, and the calls in order."""
    return _CALL.sub("", text).strip(), [_read(body) for body in _CALL.findall(text)]


def _read(body: str) -> Call | BadCall:
    try:
        said = json.loads(body)
    except ValueError as error:
        return BadCall(body, f"not JSON: {error}")
    match said:
        case {"name": str(name), "arguments": dict(arguments)}:
            return Call(name, arguments)
    return BadCall(body, "needs a name and arguments")
