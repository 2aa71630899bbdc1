"""A model's chat template as foreign code: it is given one form of messages, bounded, and believed nothing.

Templates come with models and are written for the messages their authors thought of. Whatever one raises is a ChatError
about these messages, never a fault of the process that renders them.
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

MOST_LINES = 500_000  # of a template's code that one rendering may run, calls included: about a second
MOST_CHARACTERS = 256_000_000  # that its lines may write
_CODE = "<template>"  # the file name of what Jinja compiles


class ChatError(ValueError):
    """Messages that cannot be rendered, or a chat template that cannot be extended turn by turn."""


class Template:
    """One tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ChatError(f"tokenizer {tokenizer.name_or_path} has no chat template; set one and save it")
        self._tokenizer = tokenizer
        self.name = f"chat template of {tokenizer.name_or_path or 'this tokenizer'}"

    @property
    def source(self) -> str:
        """Its text; of several, all of them."""
        templates = self._tokenizer.chat_template
        return "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)

    def render(self, messages: Sequence[Message], *, prompted: bool) -> str:
        """The text of these messages, with the first one's `tools`. Raises ChatError, whatever the template does."""
        shaped = [_shaped(message) for message in messages]
        tools = messages[0].get("tools") or None
        try:
            with _bounded():
                text = self._tokenizer.apply_chat_template(
                    shaped, tools=tools, tokenize=False, add_generation_prompt=prompted
                )
        except (
            Exception
        ) as error:  # foreign code: Jinja's own errors, and whatever filters and operators raise
            roles = [message.get("role") for message in shaped]
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise ChatError(f"{self.name} refuses messages of the roles {roles}: {reason}") from error
        return str(text)


def _shaped(message: Message) -> Message:
    """A message as templates expect it, without directions: no content is empty text, arguments are objects.

    Clients and datasets write arguments as JSON text, and leave them away where there are none.
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
    """What a template is told of a message's content: that there is a picture, not which."""
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
    """The arguments of a call as an object: of JSON text that is one, and of none; anything else stays."""
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
    """A template ran more lines, or wrote more, than a rendering may."""


@contextmanager
def _bounded() -> Iterator[None]:
    """Count what a template runs and writes in this thread, and stop it beyond the limits.

    Loops nest, and macros call themselves: nothing else ends them. Lines are counted, not seconds, so that a slow
    machine refuses nothing more. Where a debugger traces, nothing is counted.
    """
    lines = characters = 0

    def count(frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        nonlocal lines, characters
        lines += 1
        if event == "return" and isinstance(arg, str):  # what it writes is yielded, piece by piece
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
