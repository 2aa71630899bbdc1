"""Tools from functions, what a policy is told of its calls, and the wrapper that answers them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from envs.base import TalkSpace, TextEnv
from envs.calls import BadCall, Call, Fault, Style, parse_calls, write_call
from envs.host import Inline, reach
from envs.tool import Tool, ToolRefused
from envs.tools import Answer, Reason, Toolbox, ToolEnv, answers_by_reason


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


def answer(name: str, **arguments: Any) -> Answer:
    return box().answer(Call(name, arguments))


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


class Ask(TextEnv):
    """Wants to be told 42; says everything back."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Any]:
        return "what?", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        right = action == "42"
        return f"heard {action}", float(right), right, False, {"success": True} if right else {}

    def snapshot(self) -> bytes:
        return b""

    def restore(self, snapshot: bytes) -> None:
        pass


def written(*calls: Call, style: Style = "hermes") -> str:
    return "\n".join(write_call(call, style) for call in calls)


def test_turns_with_calls_are_answered_and_all_others_go_to_the_environment() -> None:
    env = ToolEnv(Ask(), box())
    (first,), _ = env.reset(seed=0)
    assert (first["role"], first["content"], first["tools"]) == ("user", "what?", box().schemas())
    turn = f"Hm.\n{written(Call('double', {'number': 21}), Call('nothing', {}))}\n<tool_call>"
    said, reward, terminated, truncated, info = env.step(turn)
    assert [(each["role"], each["name"], each["content"]) for each in said] == [
        ("tool", "double", "42.0"),
        ("tool", "", "There is no tool 'nothing'; there is: weather, double, lengthen, total, fail."),
        ("tool", "", "That is no call: it is not closed."),
    ]
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info == {"tools": {"ok": 1, "unknown_tool": 1, "invalid": 1}}
    assert env.step(" what now")[0] == "heard  what now"
    assert env.step("42") == ("heard 42", 1.0, True, False, {"success": True})


def test_plain_calls_have_their_arguments_by_place() -> None:
    env = ToolEnv(Ask(), box(), style="plain")
    (first,), _ = env.reset()
    assert all(schema["style"] == "plain" for schema in first["tools"])
    said, *_ = env.step("weather(arlen, 3)\ndouble(1, 2)\nweather(arlen, 3, celsius)")
    assert [each["content"] for each in said] == [
        "arlen 3 celsius",
        "double was not called: there is no argument '2'.",
        "arlen 3 celsius",
    ]
    assert env.step(written(Call("double", {"number": 1})))[0].startswith("heard <tool_call>")


def test_a_budget_is_told_forgiven_and_then_ends_the_episode() -> None:
    env = ToolEnv(Ask(), box(), max_calls=2, grace=1, verdict=True)
    call = Call("double", {"number": 1})
    for _ in range(2):  # a new episode has a new budget
        env.reset()
        said, _, _, truncated, info = env.step(written(call, call, call))
        assert [each["content"] for each in said] == [
            "2.0",
            "2.0",
            "All 2 calls are made: answer without tools.",
        ]
        assert (truncated, info) == (False, {"tools": {"ok": 2, "spent": 1}})
        said, reward, terminated, truncated, info = env.step(written(call, call, call))
        assert len(said) == 1, "what comes after the end is not answered"
        assert (reward, terminated, truncated) == (0.0, False, True)
        assert info == {"tools": {"spent": 1}, "success": False}
    unjudged = ToolEnv(Ask(), box(), max_calls=0, grace=0)
    unjudged.reset()
    assert unjudged.step(written(call))[3:] == (True, {"tools": {"spent": 1}})


def halve(number: float) -> float:
    return number / 2


def test_one_toolbox_may_stand_around_another() -> None:
    env = ToolEnv(ToolEnv(Ask(), box(double)), box(halve))
    (first,), _ = env.reset()
    assert [each["function"]["name"] for each in first["tools"]] == ["double", "halve"]
    both = written(Call("halve", {"number": 3}), Call("double", {"number": 3}), Call("third", {}))
    said, _, _, _, info = env.step(both)
    assert [each["name"] for each in said] == ["double", "halve", ""]
    assert info == {"tools": {"ok": 2, "unknown_tool": 1}}
    assert env.step(written(Call("double", {"number": 1})))[0][0]["content"] == "2.0"
    assert env.step("42")[1] == 1.0


def test_directions_of_the_environment_are_kept() -> None:
    class Forgetful(Ask):
        def reset(self, **_: Any) -> tuple[Any, Any]:
            return [{"role": "system", "content": "you"}, {"role": "user", "content": "what?", "x": 1}], {}

    (first, second), _ = ToolEnv(Forgetful(), box(double)).reset()
    assert first == {"role": "system", "content": "you", "tools": box(double).schemas()}
    assert second == {"role": "user", "content": "what?", "x": 1}


def test_it_counts_calls_so_it_is_played_again_and_not_restored() -> None:
    assert reach(Ask()) is not None
    env = ToolEnv(Ask(), box())
    assert reach(env) is None
    assert not Inline(env).nondeterministic


class Server:
    """A source of tools that is told what is done with it."""

    repeatable = False

    def __init__(self) -> None:
        self.tools = [Tool.of(double)]
        self.told: list[str] = []

    def renew(self) -> None:
        self.told.append("renew")

    def close(self) -> None:
        self.told.append("close")


def test_a_call_of_a_source_has_the_sources_own_limit() -> None:
    server, threads = Server(), []
    server.tools = [Tool("where", "", {}, lambda given: threads.append(threading.current_thread()))]
    tools = Toolbox([halve], [server], call_seconds=0.05)
    assert tools.answer(Call("where", {})).reason is Reason.OK
    assert threads == [threading.current_thread()], "the toolbox waits as long as the source does"


def test_tools_that_do_not_go_with_the_environments_own_are_refused_in_one_line() -> None:
    plain = ToolEnv(Ask(), box(double), style="plain")
    for env, says in (
        (ToolEnv(plain, box(halve)), "use its style"),
        (ToolEnv(plain, box(double), style="plain"), "two tools are called double"),
    ):
        with pytest.raises(ToolRefused, match=says) as refused:
            env.reset()
        assert "\n" not in str(refused.value)


def test_what_is_thought_of_a_call_is_no_call() -> None:
    env = ToolEnv(Ask(), box(double))
    env.reset()
    call = written(Call("double", {"number": 1}))
    for turn in (f"<think>{call}</think>42", f"<think>{call}", f"{call}</think>"):
        assert env.step(turn)[0] == f"heard {turn}"
    assert env.step(f"{call}</think>{call}<think>{call}")[0] == [
        {"role": "tool", "name": "double", "content": "2.0"}
    ]


def test_what_an_info_says_of_tools_is_taken_where_it_is_ours() -> None:
    assert answers_by_reason({"tools": {"ok": 2, "lost": 1, "failed": "often"}}) == {"ok": 2}
    for others in ({}, {"tools": ["hammer"]}, {"tools": None}):
        assert answers_by_reason(others) == {}


def test_a_source_is_renewed_with_every_episode_and_closed_with_the_environment() -> None:
    server = Server()
    env = ToolEnv(Ask(), Toolbox([halve], [server]))
    assert Inline(ToolEnv(env, box(fail))).nondeterministic, "its answers may change, however it is wrapped"
    env.reset()
    assert env.step(written(Call("double", {"number": 1})))[0][0]["content"] == "2.0"
    env.reset()
    env.close()
    assert server.told == ["renew", "renew", "close"]


pieces = st.sampled_from(
    [
        written(Call("double", {"number": 1})),
        written(Call("weather", {"place": "\ud800", "day": 1})),
        written(Call("fail", {"how": "deep"})),
        "weather(arlen, 3)\n",
        "fail(exit)\n",
        "double(",
        "<tool_call>",
        "</tool_call>",
        '{"name": "double", "arguments": {"number": "\\ud800"}}',
    ]
)


TOOLS = box()


@settings(max_examples=40)
@given(st.lists(st.lists(pieces | st.text(max_size=8), max_size=6).map("".join), max_size=6))
@pytest.mark.parametrize("style", ["hermes", "plain"])
def test_nothing_a_policy_writes_makes_it_raise(style: Style, turns: list[str]) -> None:
    env = ToolEnv(Ask(), TOOLS, style=style, max_calls=4)
    env.reset(seed=0)
    for turn in turns:
        said, reward, terminated, truncated, info = env.step(turn)
        assert said in TalkSpace()
        calls = parse_calls(turn, style)[1]
        assert sum(info.get("tools", {}).values()) == (len(said) if calls else 0) <= len(calls)
        if calls:
            assert reward == 0.0 and not terminated
            "".join(each["content"] + each["name"] for each in said).encode()  # a tokenizer can spell it
        if terminated or truncated:
            break
