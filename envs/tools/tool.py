"""One tool: a name, the JSON schema of its arguments, and a callable; usually made from a typed Python function."""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import TypedDict

Schema = dict[str, Any]

_ECHOED = 40  # characters of a policy's text that a result repeats
_MAX_ERRORS = 3
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class ToolRefused(ValueError):
    """A value cannot be used as a tool, or a tool server cannot be used; the message says why."""


class InvalidArguments(ValueError):
    """The arguments do not match the tool's schema; one line that says which and why."""


class ToolUnavailable(RuntimeError):
    """The backend of a tool has ended; the tool will not work again in this replica."""


@dataclass(frozen=True)
class Tool:
    """A name, a description, the JSON schema of the arguments, and the callable.

    run: takes the arguments by name, as parsed from JSON, and returns any value: text is shown verbatim, None as
    "done", anything else as JSON. May raise InvalidArguments, ToolUnavailable, TimeoutError, or any other error.
    """

    name: str
    description: str
    parameters: Schema
    run: Callable[[dict[str, Any]], Any] = field(repr=False)

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Tool:
        """A tool from a function with annotated parameters; its docstring is the description.

        Arguments are validated strictly, as JSON: no text for a number, no number for text. ToolRefused unless it is a
        named, synchronous function whose parameters can be passed by name and have types that JSON can represent.
        """
        if not inspect.isroutine(function) or not _NAME.fullmatch(function.__name__):
            raise ToolRefused(
                f"{function!r} cannot be a tool; give a function with a name of letters, digits and _"
            )
        name = function.__name__
        if inspect.iscoroutinefunction(function):
            raise ToolRefused(f"tool {name} is a coroutine function; give one that returns its result")
        try:
            adapter = TypeAdapter(_arguments_type(name, function))
            schema = adapter.json_schema(schema_generator=_Untitled)
        except (PydanticUserError, NameError, TypeError, ValueError) as error:
            raise ToolRefused(f"tool {name}: {line(str(error))}") from error
        del schema["title"]
        description = inspect.getdoc(function) or ""
        return cls(name, description, schema, lambda given: function(**_checked(adapter, given)))

    @property
    def schema(self) -> Schema:
        """The tool in the form that chat templates take (OpenAI's function schema)."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


def _arguments_type(name: str, function: Callable[..., Any]) -> Any:
    """A TypedDict type of a function's arguments. TypeError for a parameter that cannot be passed by name."""
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"parameter {parameter} cannot be passed by name; make it a named parameter")
        if parameter.name not in hints:
            raise TypeError(f"parameter {parameter.name} has no type; annotate it")
        hint = hints[parameter.name]
        fields[parameter.name] = hint if parameter.default is parameter.empty else NotRequired[hint]
    typed_dict: Any = TypedDict  # mypy only understands literal definitions
    arguments = typed_dict(name, fields)
    arguments.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    return arguments


class _Untitled(GenerateJsonSchema):
    """JSON schemas without titles, which would only repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _checked(adapter: TypeAdapter[Any], given: dict[str, Any]) -> dict[str, Any]:
    """Validate arguments against the annotated types, as JSON."""
    try:
        checked: dict[str, Any] = adapter.validate_json(json.dumps(given))
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        more = [f"and {len(errors) - _MAX_ERRORS} more"] if len(errors) > _MAX_ERRORS else []
        listed = [_describe(each["type"], each["loc"], each["msg"]) for each in errors[:_MAX_ERRORS]]
        raise InvalidArguments("; ".join([*listed, *more])) from error
    return checked


def _describe(kind: str, path: Sequence[int | str], message: str) -> str:
    where = ".".join(map(str, path))
    if kind == "missing":
        return f"argument {echo(where)} is missing"
    if kind == "extra_forbidden":
        return f"there is no argument {echo(where)}"
    return f"argument {echo(where)}: {message}" if where else message


def line(text: str) -> str:
    """The text on one line of printable ASCII, without its final full stop."""
    return " ".join(text.encode("ascii", "backslashreplace").decode().split()).rstrip(".")


def echo(text: str) -> str:
    """A policy's text for the policy to see: quoted, ASCII, and short."""
    return ascii(text if len(text) <= _ECHOED else f"{text[:_ECHOED]}...")
