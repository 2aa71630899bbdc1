"""One tool: a name, the JSON schema of its arguments, what is done with them; most often a typed Python function."""

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

_ECHOED = 40  # characters of a policy's own words that an answer repeats
_ERRORS_TOLD = 3
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class ToolRefused(ValueError):
    """What was given can be no tool; the message says why."""


class WrongArguments(ValueError):
    """A tool cannot take these arguments; one line that says which and why."""


class ToolGone(RuntimeError):
    """What a tool belongs to is no more; it will not work again in this replica."""


@dataclass(frozen=True)
class Tool:
    """A name, what it says of itself, the JSON schema of its arguments, and what is done with them.

    run: takes the arguments by name, as they were written, and gives any value; text is shown as it is, nothing as
    "done", anything else as JSON. Raises WrongArguments, ToolGone, TimeoutError, or whatever it likes.
    """

    name: str
    description: str
    parameters: Schema
    run: Callable[[dict[str, Any]], Any] = field(repr=False)

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Tool:
        """A tool of a function whose parameters are all annotated; its docstring is the description.

        Arguments are checked strictly, as JSON: no text for a number, no number for text. ToolRefused where it is no
        named function that returns its result, or can not be called with named values of types that JSON has.
        """
        if not inspect.isroutine(function) or not _NAME.fullmatch(function.__name__):
            raise ToolRefused(
                f"{function!r} can be no tool; give a function with a name of letters, digits and _"
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
        """The tool as chat templates take it: OpenAI's form for functions."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


def _arguments_type(name: str, function: Callable[..., Any]) -> Any:
    """A type that holds a function's arguments by name. TypeError for a parameter that can have none."""
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"parameter {parameter} can not be given by name")
        if parameter.name not in hints:
            raise TypeError(f"parameter {parameter.name} has no type; annotate it")
        hint = hints[parameter.name]
        fields[parameter.name] = hint if parameter.default is parameter.empty else NotRequired[hint]
    typed_dict: Any = TypedDict  # mypy knows those alone that are written out
    arguments = typed_dict(name, fields)
    arguments.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    return arguments


class _Untitled(GenerateJsonSchema):
    """Schemas without the titles that only repeat names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _checked(adapter: TypeAdapter[Any], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the types that a function declares, read as the JSON they were."""
    try:
        checked: dict[str, Any] = adapter.validate_json(json.dumps(given))
    except ValidationError as error:
        told = error.errors(include_url=False, include_context=False, include_input=False)
        more = [f"and {len(told) - _ERRORS_TOLD} more"] if len(told) > _ERRORS_TOLD else []
        said = [_told(each["type"], each["loc"], each["msg"]) for each in told[:_ERRORS_TOLD]]
        raise WrongArguments("; ".join([*said, *more])) from error
    return checked


def _told(kind: str, place: Sequence[int | str], message: str) -> str:
    where = ".".join(map(str, place))
    if kind == "missing":
        return f"argument {echo(where)} is missing"
    if kind == "extra_forbidden":
        return f"there is no argument {echo(where)}"
    return f"argument {echo(where)}: {message}" if where else message


def line(text: str) -> str:
    """One line of printable ASCII, without its full stop."""
    return " ".join(text.encode("ascii", "backslashreplace").decode().split()).rstrip(".")


def echo(text: str) -> str:
    """What a policy wrote, for it to see: quoted, ASCII, and short."""
    return ascii(text if len(text) <= _ECHOED else f"{text[:_ECHOED]}...")
