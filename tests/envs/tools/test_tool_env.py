"""Tools from functions, the results of calls, and the wrapper that answers them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from envs.tools.tool import Tool, ToolRefused
from envs.tools.tool_calls import CallFault, MalformedCall, ToolCall
from envs.tools.tool_env import CallOutcome, Toolbox, ToolResult
from tests.envs.example_tools import answer, box, double, weather


def test_a_schema_says_what_a_signature_says() -> None:
    assert box(weather).schemas() == [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "The weather of a day.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "place": {"type": "string", "description": "where"},
                        "day": {"type": "integer"},
                        "unit": {"$ref": "#/$defs/Unit"},
                    },
                    "required": ["place", "day"],
                    "additionalProperties": False,
                    "$defs": {"Unit": {"type": "string", "enum": ["celsius"], "title": "Unit"}},
                },
            },
        }
    ]


def test_a_result_is_text_or_json() -> None:
    assert answer("weather", place="arlen", day=3) == ToolResult("arlen 3 celsius", CallOutcome.OK)
    assert answer("double", number=2) == ToolResult("4.0", CallOutcome.OK)
    assert answer("total", numbers=[1, 2], json=True).text == '{"sum": 3, "first": "up", "json": true}'
    assert answer("fail", how="nothing") == ToolResult("done", CallOutcome.OK)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("weather", {"place": "arlen"}, "argument 'day' is missing"),
        ("weather", {"place": "arlen", "day": 3, "hour": 1}, "there is no argument 'hour'"),
        ("weather", {"place": "arlen", "day": "3"}, "argument 'day': Input should be a valid integer"),
        ("weather", {"place": "arlen", "day": 3.5}, "argument 'day'"),
        ("weather", {"place": "arlen", "day": True}, "argument 'day': Input should be a valid integer"),
        ("weather", {"place": 3, "day": 3}, "argument 'place': Input should be a valid string"),
        (
            "weather",
            {"place": "arlen", "day": 3, "unit": "kelvin"},
            "argument 'unit': Input should be 'celsius'",
        ),
        ("weather", {"place": "\ud800", "day": 3}, "JSON"),
        ("total", {"numbers": [1, "2"], "first": "left"}, "argument 'numbers.1': "),
        ("total", {"numbers": ["a"] * 9}, "and 6 more"),
        ("double", {}, "'number' is missing"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(name: str, arguments: dict[str, Any], says: str) -> None:
    told = answer(name, **arguments)
    assert told.outcome is CallOutcome.WRONG_ARGUMENTS
    assert says in told.text and told.text.isprintable() and told.text.isascii()


@pytest.mark.parametrize("how", ["exit", "deep", "caf\u00e9"])
def test_a_tool_that_raises_is_an_answer(how: str) -> None:
    told = answer("fail", how=how)
    assert told.outcome is CallOutcome.FAILED
    assert told.text.startswith("fail failed: ") and told.text.isprintable() and told.text.isascii()


def test_what_cannot_be_called_has_its_own_reason() -> None:
    told = answer("caf\u00e9\n" * 50)
    assert told.outcome is CallOutcome.UNKNOWN_TOOL
    assert "there is: weather, double, lengthen, total, fail" in told.text
    assert told.text.isprintable() and told.text.isascii() and len(told.text) < 200
    for fault in CallFault:
        assert box().answer(MalformedCall("{", fault)).outcome is CallOutcome.INVALID


def test_a_long_answer_is_cut_and_says_so() -> None:
    tools = box(max_result_chars=10)
    assert tools.answer(ToolCall("lengthen", {"text": "ab", "times": 5})) == ToolResult(
        "ab" * 5, CallOutcome.OK
    )
    cut = tools.answer(ToolCall("lengthen", {"text": "ab", "times": 500_000}))
    assert cut == ToolResult("ababababab... (1000000 characters, cut to 10)", CallOutcome.CUT)
    failed = tools.answer(ToolCall("fail", {"how": "x"}))
    assert failed.outcome is CallOutcome.FAILED and "cut to 10" in failed.text, "a mistake stays one"


def test_half_a_surrogate_pair_never_reaches_a_tokenizer() -> None:
    raw = Tool("echo", "", {"type": "object", "properties": {}}, lambda given: given["text"])
    told = box(raw).answer(ToolCall("echo", {"text": "a\ud800b"}))
    assert told == ToolResult("a?b", CallOutcome.OK)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What the tool below waits for; opened in the end so that its thread ends."""
    opened = threading.Event()
    yield opened
    opened.set()


def test_a_call_over_its_time_is_left_behind_and_not_made_again_beside_itself(gate: threading.Event) -> None:
    begun = []

    def wait() -> str:
        begun.append(threading.current_thread())
        gate.wait()
        return "waited"

    tools = box(wait, double, call_seconds=0.05)
    assert tools.answer(ToolCall("wait", {})) == ToolResult(
        "wait took longer than 0.05 s.", CallOutcome.TIMED_OUT
    )
    assert tools.answer(ToolCall("wait", {})).text == "wait is still busy with an earlier call."
    assert len(begun) == 1 and begun[0].daemon
    gate.set()
    begun[0].join()
    assert box(wait, call_seconds=60.0).answer(ToolCall("wait", {})) == ToolResult("waited", CallOutcome.OK)


async def later(x: int) -> int:
    return x


def untyped(x):  # type: ignore[no-untyped-def]
    return x


def starred(*numbers: int) -> int:
    return sum(numbers)


def unwritable(x: threading.Event) -> None:
    pass


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (later, "coroutine"),
        (untyped, "parameter x has no type"),
        (starred, "by name"),
        (unwritable, "Event"),
        (lambda: 1, "give a function with a name"),
        (3, "give a function with a name"),
    ],
)
def test_what_can_be_no_tool_is_refused_in_one_line(function: Any, says: str) -> None:
    with pytest.raises(ToolRefused, match=says) as refused:
        Tool.of(function)
    assert "\n" not in str(refused.value)


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ToolRefused, match="two tools are named double"):
        box(double, double)


def test_the_thread_of_a_tool_that_does_not_return_is_ended() -> None:
    threads: list[threading.Thread] = []

    def spin() -> str:
        """Never return."""
        threads.append(threading.current_thread())
        while True:
            pass

    assert Toolbox([spin], call_seconds=0.2).answer(ToolCall("spin", {})).outcome is CallOutcome.TIMED_OUT
    threads[0].join(30)
    assert not threads[0].is_alive()
