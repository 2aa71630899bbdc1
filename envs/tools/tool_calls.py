"""Tool calls in what a policy wrote, in one of two forms.

hermes, as chat templates of the Hermes and Qwen families have it; around calls there may be any text:

    <tool_call>
    {"name": "weather", "arguments": {"place": "arlen", "day": 3}}
    </tool_call>

plain, for models too small for JSON: a line that begins with a name and a bracket is a call, and closes it at its end.

    weather(arlen, 3)

    line  = name "(" [ value *( "," value ) ] ")"           white space around line and values does not count
    value = a JSON number, true, false, null, a JSON string, or words: any text without comma and double quote

Arguments of the plain form have no names; they are read under their places, "1", "2", ... What begins as a call and is
none is a `BadCall` with a reason: nothing is guessed, nothing raises, and the time taken is linear in the text. What is
thought of calls is no call: `spoken` takes thoughts out first.
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


class Fault(StrEnum):
    """Why a call could not be read."""

    UNCLOSED = "unclosed"
    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "not_an_object"
    NO_NAME = "no_name"  # missing, empty, or no text
    BAD_ARGUMENTS = "bad_arguments"  # hermes: missing, or no object; plain: an empty value, or a stray quote


@dataclass(frozen=True)
class Call:
    """A call as it was written; whether there is such a tool is another matter."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class BadCall:
    """What began as a call: its text without the brackets of the form, and what is wrong with it."""

    text: str
    why: Fault


def spoken(text: str) -> str:
    """What stands behind the last thought, and before one that is not closed; templates may open the first one."""
    return text.rpartition(THOUGHT)[2].partition(THINK)[0]


def parse_calls(text: str, style: Style = "hermes") -> tuple[str, list[Call | BadCall]]:
    """The text outside of calls, without white space around it, and the calls in their order."""
    return _parse_hermes(text) if style == "hermes" else _parse_plain(text)


def write_call(call: Call, style: Style = "hermes") -> str:
    """A call as a policy would write it; the plain form drops the names of arguments.

    ValueError for what has no such form: numbers that are not finite; in plain also lists, objects, and names that are
    no identifiers.
    """
    if style == "hermes":
        written = json.dumps(
            {"name": call.name, "arguments": call.arguments}, ensure_ascii=False, allow_nan=False
        )
        # The brackets of the form may not stand inside it; here they could only be part of a JSON string.
        inside = written.replace("tool_call>", "tool_call\\u003e")
        return f"{OPEN}\n{inside}\n{CLOSE}"
    if not _NAME.fullmatch(call.name):
        raise ValueError(f"a call of {call.name!r} has no plain form; its name must be letters, digits and _")
    return f"{call.name}({', '.join(map(_written, call.arguments.values()))})"


def _refused(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is no JSON")


def _finite(literal: str) -> float:
    number = float(literal)
    return number if abs(number) != float("inf") else _refused(literal)


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refused)


def _parse_hermes(text: str) -> tuple[str, list[Call | BadCall]]:
    outside: list[str] = []
    calls: list[Call | BadCall] = []
    place = 0
    while (begin := text.find(OPEN, place)) >= 0:
        outside.append(text[place:begin])
        begin += len(OPEN)
        end = text.find(CLOSE, begin)
        if end < 0:
            calls.append(BadCall(text[begin:], Fault.UNCLOSED))
            place = len(text)
        else:
            calls.append(_hermes_call(text[begin:end]))
            place = end + len(CLOSE)
    outside.append(text[place:])
    return "".join(outside).strip(), calls


def _hermes_call(text: str) -> Call | BadCall:
    try:
        said = _DECODER.decode(text)
    except (
        ValueError,
        RecursionError,
    ):  # a number too long for an int, and nesting too deep, are no JSON here
        return BadCall(text, Fault.INVALID_JSON)
    if not isinstance(said, dict):
        return BadCall(text, Fault.NOT_AN_OBJECT)
    name, arguments = said.get("name"), said.get("arguments")
    if not isinstance(name, str) or not name:
        return BadCall(text, Fault.NO_NAME)
    if not isinstance(arguments, dict):
        return BadCall(text, Fault.BAD_ARGUMENTS)
    return Call(name, arguments)


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BEGINNING = re.compile(rf"({_NAME.pattern})\(")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None}


def _parse_plain(text: str) -> tuple[str, list[Call | BadCall]]:
    outside: list[str] = []
    calls: list[Call | BadCall] = []
    for line in text.split("\n"):
        said = line.strip()
        beginning = _BEGINNING.match(said)
        if beginning is None:
            outside.append(line)
        elif not said.endswith(")"):
            calls.append(BadCall(said, Fault.UNCLOSED))
        else:
            calls.append(_plain_call(beginning[1], said, beginning.end()))
    return "\n".join(outside).strip(), calls


def _plain_call(name: str, said: str, place: int) -> Call | BadCall:
    inside = said[place:-1]
    try:
        values = _values(inside) if inside.strip() else []
    except ValueError:
        return BadCall(said, Fault.BAD_ARGUMENTS)
    return Call(name, {str(place): value for place, value in enumerate(values, start=1)})


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
                raise ValueError("something stands behind a string")
            values.append(value)
        else:
            end = inside.find(",", place)
            end = len(inside) if end < 0 else end
            values.append(_bare(inside[place:end].strip()))
        place = end + 1
    return values


def _bare(text: str) -> Any:
    """A value without quotes. ValueError for none at all, and for one that holds a quote."""
    if not text or '"' in text:
        raise ValueError("a value is missing, or a quote stands inside it")
    if text in _WORDS:
        return _WORDS[text]
    number = _NUMBER.fullmatch(text)
    if number is None:
        return text
    return int(text) if number[1] is None and number[2] is None else _finite(text)


def _written(value: Any) -> str:
    """A value of the plain form: words as they are where they read back as themselves, anything else as JSON."""
    if isinstance(value, str):
        quoted = not value or value != value.strip() or any(mark in value for mark in ',"\n')
        return json.dumps(value, ensure_ascii=False) if quoted or _is_other(value) else value
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value, allow_nan=False)
    raise ValueError(f"an argument of type {type(value).__name__} has no plain form")


def _is_other(text: str) -> bool:
    return text in _WORDS or _NUMBER.fullmatch(text) is not None
