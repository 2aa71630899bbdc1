"""A model's chat template as foreign code: normalized input, bounded execution, checked output.

Templates come with models and support only the messages that their authors expected. Every error of a template becomes
a ChatError about the messages, never a failure of the process that renders them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from envs.base import DIRECTIONS, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_LINES = 500_000  # of a template's code per rendering, calls included: about a second
MOST_CHARACTERS = 256_000_000  # written per rendering
_CODE = "<template>"  # the file name of what Jinja compiles


class ChatError(ValueError):
    """Messages that cannot be rendered, or a chat template that cannot be extended turn by turn."""


class Template:
    """One tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ChatError(
                f"tokenizer {tokenizer.name_or_path} has no chat template; set chat_template and save it"
            )
        self._tokenizer = tokenizer
        self.name = f"chat template of {tokenizer.name_or_path or 'this tokenizer'}"

    @property
    def source(self) -> str:
        """Source text of the template; of all templates if there are several."""
        templates = self._tokenizer.chat_template
        return "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)

    def render(self, messages: Sequence[Message], *, prompted: bool) -> str:
        """Render these messages, with the first one's `tools`. Every error is a ChatError."""
        shaped = [_shaped(message) for message in messages]
        tools = messages[0].get("tools") or None
        try:
            with _bounded():
                text = self._tokenizer.apply_chat_template(
                    shaped, tools=tools, tokenize=False, add_generation_prompt=prompted
                )
        except Exception as error:  # foreign code: Jinja's errors, and those of filters and operators
            roles = [message.get("role") for message in shaped]
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise ChatError(f"{self.name} refuses messages of the roles {roles}: {reason}") from error
        return str(text)


def _shaped(message: Message) -> Message:
    """Normalize a message for templates: no directions, missing content is empty text, arguments are objects.

    Clients and datasets may write arguments as JSON text, or omit empty ones.
    """
    shaped = {key: _bare(value) for key, value in message.items() if key not in DIRECTIONS}
    if shaped.get("content") is None:
        shaped["content"] = ""
    if not shaped.get("tool_calls"):
        shaped.pop("tool_calls", None)
    elif isinstance(shaped["tool_calls"], list):
        shaped["tool_calls"] = [_shaped_call(call) for call in shaped["tool_calls"]]
    return shaped


def _bare(value: Any) -> Any:
    """Replace pictures in a message's content by placeholders without data."""
    if not isinstance(value, list):
        return value
    return [
        {"type": "image"} if isinstance(part, dict) and part.get("type") == "image" else part
        for part in value
    ]


def _shaped_call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_object(call["function"])}
    return _with_object(call) if "name" in call else call


def _with_object(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": as_object(function.get("arguments"))}


def as_object(arguments: Any) -> Any:
    """Convert arguments of a call to an object if they are JSON text of one, or missing; others are unchanged."""
    if arguments is None:
        return {}
    if not isinstance(arguments, str):
        return arguments
    if not arguments.strip():
        return {}
    try:
        read = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    if read is None:
        return {}
    return read if isinstance(read, dict) else arguments


class _Spent(Exception):
    """A template exceeded the limit of lines or characters."""


@contextmanager
def _bounded() -> Iterator[None]:
    """Count the lines that a template runs and the characters it writes in this thread, and stop it at the limits.

    Nested loops and recursive macros may not end otherwise. Lines are counted, not seconds, so that the result does not
    depend on the machine. Under a debugger's trace nothing is counted.
    """
    lines = characters = 0

    def count(frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        nonlocal lines, characters
        lines += 1
        if event == "return" and isinstance(arg, str):  # output is yielded piece by piece
            characters += len(arg)
        if lines > MOST_LINES or characters > MOST_CHARACTERS:
            raise _Spent(
                f"it runs more than {MOST_LINES} lines, or writes more than {MOST_CHARACTERS} characters"
            )
        return count

    def enter(frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        count(frame, event, arg)
        return count if frame.f_code.co_filename == _CODE else None

    if sys.gettrace() is not None:
        yield
        return
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(None)
