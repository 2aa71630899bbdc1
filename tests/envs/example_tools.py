"""Tools of the tests: every kind of argument, and one that fails in every way."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import Field

from envs.tools.tool_calls import ToolCall
from envs.tools.tool_env import Toolbox, ToolResult


class Unit(Enum):
    CELSIUS = "celsius"


def weather(place: Annotated[str, Field(description="where")], day: int, unit: Unit = Unit.CELSIUS) -> str:
    """The weather of a day."""
    return f"{place} {day} {unit.value}"


def double(number: float) -> float:
    return 2 * number


def lengthen(text: str, times: int) -> str:
    return text * times


def total(numbers: list[int], first: Literal["up", "down"] = "up", *, json: bool = False) -> dict[str, Any]:
    return {"sum": sum(numbers), "first": first, "json": json}


def fail(how: str) -> None:
    match how:
        case "exit":
            raise SystemExit(3)
        case "deep":
            fail(how)
        case "nothing":
            return
    raise ValueError(f"on\npurpose: {how}")


def box(*tools: Any, **options: Any) -> Toolbox:
    return Toolbox(tools or (weather, double, lengthen, total, fail), **{"call_seconds": None, **options})


def answer(name: str, **arguments: Any) -> ToolResult:
    return box().answer(ToolCall(name, arguments))
