"""Tools from functions, what a policy is told of its calls, and the wrapper that answers them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from envs.tools.tool import Tool, ToolRefused
from envs.tools.tool_calls import BadCall, Call, Fault
from envs.tools.tool_env import Answer, Reason, Toolbox
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
    assert answer("weather", place="arlen", day=3) == Answer("arlen 3 celsius", Reason.OK)
    assert answer("double", number=2) == Answer("4.0", Reason.OK)
    assert answer("total", numbers=[1, 2], json=True).text == '{"sum": 3, "first": "up", "json": true}'
    assert answer("fail", how="nothing") == Answer("done", Reason.OK)


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
    assert told.reason is Reason.WRONG_ARGUMENTS
    assert says in told.text and told.text.isprintable() and told.text.isascii()


@pytest.mark.parametrize("how", ["exit", "deep", "caf\u00e9"])
def test_a_tool_that_raises_is_an_answer(how: str) -> None:
    told = answer("fail", how=how)
    assert told.reason is Reason.FAILED
    assert told.text.startswith("fail failed: ") and told.text.isprintable() and told.text.isascii()


def test_what_cannot_be_called_has_its_own_reason() -> None:
    told = answer("caf\u00e9\n" * 50)
    assert told.reason is Reason.UNKNOWN_TOOL
    assert "there is: weather, double, lengthen, total, fail" in told.text
    assert told.text.isprintable() and told.text.isascii() and len(told.text) < 200
    for fault in Fault:
        assert box().answer(BadCall("{", fault)).reason is Reason.INVALID


def test_a_long_answer_is_cut_and_says_so() -> None:
    tools = box(max_result_chars=10)
    assert tools.answer(Call("lengthen", {"text": "ab", "times": 5})) == Answer("ab" * 5, Reason.OK)
    cut = tools.answer(Call("lengthen", {"text": "ab", "times": 500_000}))
    assert cut == Answer("ababababab... (1000000 characters, cut to 10)", Reason.CUT)
    failed = tools.answer(Call("fail", {"how": "x"}))
    assert failed.reason is Reason.FAILED and "cut to 10" in failed.text, "a mistake stays one"


def test_half_a_surrogate_pair_never_reaches_a_tokenizer() -> None:
    raw = Tool("echo", "", {"type": "object", "properties": {}}, lambda given: given["text"])
    told = box(raw).answer(Call("echo", {"text": "a\ud800b"}))
    assert told == Answer("a?b", Reason.OK)


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
    assert tools.answer(Call("wait", {})) == Answer("wait took longer than 0.05 s.", Reason.TIMED_OUT)
    assert tools.answer(Call("wait", {})).text == "wait is still busy with an earlier call."
    assert len(begun) == 1 and begun[0].daemon
    gate.set()
    begun[0].join()
    assert box(wait, call_seconds=60.0).answer(Call("wait", {})) == Answer("waited", Reason.OK)


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
    with pytest.raises(ToolRefused, match="two tools are called double"):
        box(double, double)


def test_the_thread_of_a_tool_that_does_not_return_is_ended() -> None:
    threads: list[threading.Thread] = []

    def spin() -> str:
        """Never return."""
        threads.append(threading.current_thread())
        while True:
            pass

    assert Toolbox([spin], call_seconds=0.2).answer(Call("spin", {})).reason is Reason.TIMED_OUT
    threads[0].join(30)
    assert not threads[0].is_alive()
