"""Parsing of tool calls in sampled text, in one of two styles.

hermes, as in the chat templates of the Hermes and Qwen families; any text may surround the calls:

    <tool_call>
    {"name": "weather", "arguments": {"place": "arlen", "day": 3}}
    </tool_call>

plain, for models too small for JSON: a line that begins with a name and a bracket is a call and ends with a bracket.

    weather(arlen, 3)

    line  = name "(" [ value *( "," value ) ] ")"           white space around line and values is ignored
    value = a JSON number, true, false, null, a JSON string, or words: any text without comma and double quote

Plain arguments are positional; they are parsed under the keys "1", "2", ... Text that begins like a call but is not one
is a `MalformedCall` with a reason. Nothing is guessed, nothing raises, and parsing takes linear time. Calls inside
thoughts do not count: remove thoughts with `spoken` first.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NoReturn

Style = Literal["hermes", "plain"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, THOUGHT = "<think>", "</think>"


class CallFault(StrEnum):
    """Why a call could not be parsed."""

    UNCLOSED = "unclosed"
    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "not_an_object"
    NO_NAME = "no_name"  # missing, empty, or not text
    BAD_ARGUMENTS = "bad_arguments"  # hermes: missing or not an object; plain: empty, or a stray quote


@dataclass(frozen=True)
class ToolCall:
    """A parsed call; the tool need not exist."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class MalformedCall:
    """Text that begins like a call, without the delimiters of the style, and what is wrong with it."""

    text: str
    why: CallFault


def spoken(text: str) -> str:
    """The text after the last closed thought and before an open one; chat templates may open the first thought."""
    return text.rpartition(THOUGHT)[2].partition(THINK)[0]


def parse_calls(text: str, style: Style = "hermes") -> tuple[str, list[ToolCall | MalformedCall]]:
    """The text outside calls, stripped, and the calls in order."""
    return _parse_hermes(text) if style == "hermes" else _parse_plain(text)


def write_call(call: ToolCall, style: Style = "hermes") -> str:
    """Write a call as a policy would; the plain style drops argument names.

    ValueError for values without such a form: non-finite numbers; in plain also lists, objects, and names that are not
    identifiers.
    """
    if style == "hermes":
        written = json.dumps(
            {"name": call.name, "arguments": call.arguments}, ensure_ascii=False, allow_nan=False
        )
        # The delimiters must not occur inside a call; here they can only be part of a JSON string.
        inside = written.replace("tool_call>", "tool_call\\u003e")
        return f"{OPEN}\n{inside}\n{CLOSE}"
    if not _NAME.fullmatch(call.name):
        raise ValueError(f"a call of {call.name!r} has no plain form; use a name of letters, digits and _")
    return f"{call.name}({', '.join(map(_written, call.arguments.values()))})"


def _reject(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON")


def _finite(literal: str) -> float:
    number = float(literal)
    return number if abs(number) != float("inf") else _reject(literal)


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_reject)


def _parse_hermes(text: str) -> tuple[str, list[ToolCall | MalformedCall]]:
    outside: list[str] = []
    calls: list[ToolCall | MalformedCall] = []
    place = 0
    while (begin := text.find(OPEN, place)) >= 0:
        outside.append(text[place:begin])
        begin += len(OPEN)
        end = text.find(CLOSE, begin)
        if end < 0:
            calls.append(MalformedCall(text[begin:], CallFault.UNCLOSED))
            place = len(text)
        else:
            calls.append(_hermes_call(text[begin:end]))
            place = end + len(CLOSE)
    outside.append(text[place:])
    return "".join(outside).strip(), calls


def _hermes_call(text: str) -> ToolCall | MalformedCall:
    try:
        said = _DECODER.decode(text)
    except (
        ValueError,
        RecursionError,
    ):  # also for numbers too long for int() and for too deep nesting
        return MalformedCall(text, CallFault.INVALID_JSON)
    if not isinstance(said, dict):
        return MalformedCall(text, CallFault.NOT_AN_OBJECT)
    name, arguments = said.get("name"), said.get("arguments")
    if not isinstance(name, str) or not name:
        return MalformedCall(text, CallFault.NO_NAME)
    if not isinstance(arguments, dict):
        return MalformedCall(text, CallFault.BAD_ARGUMENTS)
    return ToolCall(name, arguments)


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BEGINNING = re.compile(rf"({_NAME.pattern})\(")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None}


def _parse_plain(text: str) -> tuple[str, list[ToolCall | MalformedCall]]:
    outside: list[str] = []
    calls: list[ToolCall | MalformedCall] = []
    for line in text.split("\n"):
        said = line.strip()
        beginning = _BEGINNING.match(said)
        if beginning is None:
            outside.append(line)
        elif not said.endswith(")"):
            calls.append(MalformedCall(said, CallFault.UNCLOSED))
        else:
            calls.append(_plain_call(beginning[1], said, beginning.end()))
    return "\n".join(outside).strip(), calls


def _plain_call(name: str, said: str, place: int) -> ToolCall | MalformedCall:
    inside = said[place:-1]
    try:
        values = _values(inside) if inside.strip() else []
    except ValueError:
        return MalformedCall(said, CallFault.BAD_ARGUMENTS)
    return ToolCall(name, {str(place): value for place, value in enumerate(values, start=1)})


def _values(inside: str) -> list[Any]:
    values: list[Any] = []
    place = 0
    while place <= len(inside):
        while inside[place : place + 1].isspace():
            place += 1
        if inside.startswith('"', place):
            value, place = _DECODER.raw_decode(inside, place)
            end = inside.find(",", place)
            end = len(inside) if end < 0 else end
            if inside[place:end].strip():
                raise ValueError("text follows a string")
            values.append(value)
        else:
            end = inside.find(",", place)
            end = len(inside) if end < 0 else end
            values.append(_bare(inside[place:end].strip()))
        place = end + 1
    return values


def _bare(text: str) -> Any:
    """Parse a value without quotes. ValueError for an empty one, and for one that contains a quote."""
    if not text or '"' in text:
        raise ValueError("a value is empty or contains a quote")
    if text in _WORDS:
        return _WORDS[text]
    number = _NUMBER.fullmatch(text)
    if number is None:
        return text
    return int(text) if number[1] is None and number[2] is None else _finite(text)


def _written(value: Any) -> str:
    """Write a value in the plain style: text verbatim if it parses back as itself, anything else as JSON."""
    if isinstance(value, str):
        quoted = not value or value != value.strip() or any(mark in value for mark in ',"\n')
        return json.dumps(value, ensure_ascii=False) if quoted or _is_other(value) else value
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value, allow_nan=False)
    raise ValueError(f"an argument of type {type(value).__name__} has no plain form")


def _is_other(text: str) -> bool:
    return text in _WORDS or _NUMBER.fullmatch(text) is not None
