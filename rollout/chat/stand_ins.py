"""Stand-in conversations: the form of another conversation with known texts, to detect what a template omits.

Contents, names of tools and of calls, and arguments are replaced by marks that no template treats specially. A mark
that is missing in the rendered text stands for content that the policy would not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from envs.base import Message

_ROLES = (
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
)  # roles that templates distinguish


@dataclass
class StandIn:
    """Messages with marks, and the meaning of each mark."""

    messages: list[Message] = field(default_factory=list)
    marks: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, messages: Sequence[Message]) -> StandIn:
        """Build the stand-in of these messages; conversations of the same form have the same stand-in."""
        stand_in = cls()
        for message in messages:
            stand_in.messages.append(stand_in._message(message))
        return stand_in

    def left_out(self, text: str) -> str:
        """The first mark that is missing in the rendered text; empty if none is."""
        said = text.casefold()
        return next((mark for mark in self.marks if mark not in said), "")

    def _mark(self, what: str) -> str:
        mark = f"zq8m{len(self.marks)}x"
        self.marks[mark] = what
        return mark

    def _message(self, message: Message) -> Message:
        role = message.get("role")
        known = role if role in _ROLES else "zq8role"
        made: Message = {**message, "role": known}
        if "content" in message:
            made["content"] = self._content(message["content"], f"what a message of the role {role!r} says")
        if isinstance(message.get("name"), str):
            made["name"] = "zq8name"
        if isinstance(message.get("tool_calls"), list):
            made["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        if isinstance(message.get("tools"), list):
            made["tools"] = [self._tool(tool) for tool in message["tools"]]
        return made

    def _content(self, content: Any, what: str) -> Any:
        if isinstance(content, str):
            return self._mark(what) if content.strip() else content
        if isinstance(content, list):
            return [
                {**part, "text": self._content(part["text"], what)}
                if isinstance(part, dict) and isinstance(part.get("text"), str)
                else part
                for part in content
            ]
        return content

    def _call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            return call
        made = {**function, "name": self._mark("the name of a call (an assistant's tool_calls)")}
        if isinstance(function.get("arguments"), dict) and function["arguments"]:
            made["arguments"] = {
                "zq8argument": self._mark("the arguments of a call (an assistant's tool_calls)")
            }
        return {**call, "function": made}

    def _tool(self, tool: Any) -> Any:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            return tool
        mark = self._mark(f"a tool that is offered ({function.get('name')})")
        return {**tool, "function": {**function, "name": mark}}
