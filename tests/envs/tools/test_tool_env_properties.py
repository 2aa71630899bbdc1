"""Tools around an environment: calls are answered, budgeted, counted, and never raise."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.base import TalkSpace, TextEnv
from envs.hosting.host import InProcessEnv, find_snapshots
from envs.tools.tool import Tool, ToolRefused
from envs.tools.tool_calls import Style, ToolCall, parse_calls, write_call
from envs.tools.tool_env import CallOutcome, Toolbox, ToolEnv, call_outcomes
from tests.envs.example_tools import box, double, fail


class Ask(TextEnv):
    """Expects the answer 42; repeats every action."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Any]:
        return "what?", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        right = action == "42"
        return f"heard {action}", float(right), right, False, {"success": True} if right else {}

    def snapshot(self) -> bytes:
        return b""

    def restore(self, snapshot: bytes) -> None:
        pass


def written(*calls: ToolCall, style: Style = "hermes") -> str:
    return "\n".join(write_call(call, style) for call in calls)


def test_turns_with_calls_are_answered_and_all_others_go_to_the_environment() -> None:
    env = ToolEnv(Ask(), box())
    (first,), _ = env.reset(seed=0)
    assert (first["role"], first["content"], first["tools"]) == ("user", "what?", box().schemas())
    turn = f"Hm.\n{written(ToolCall('double', {'number': 21}), ToolCall('nothing', {}))}\n<tool_call>"
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
    assert env.step(written(ToolCall("double", {"number": 1})))[0].startswith("heard <tool_call>")


def test_a_budget_is_told_forgiven_and_then_ends_the_episode() -> None:
    env = ToolEnv(Ask(), box(), max_calls=2, grace=1, verdict=True)
    call = ToolCall("double", {"number": 1})
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
    both = written(ToolCall("halve", {"number": 3}), ToolCall("double", {"number": 3}), ToolCall("third", {}))
    said, _, _, _, info = env.step(both)
    assert [each["name"] for each in said] == ["double", "halve", ""]
    assert info == {"tools": {"ok": 2, "unknown_tool": 1}}
    assert env.step(written(ToolCall("double", {"number": 1})))[0][0]["content"] == "2.0"
    assert env.step("42")[1] == 1.0


def test_directions_of_the_environment_are_kept() -> None:
    class Forgetful(Ask):
        def reset(self, **_: Any) -> tuple[Any, Any]:
            return [{"role": "system", "content": "you"}, {"role": "user", "content": "what?", "x": 1}], {}

    (first, second), _ = ToolEnv(Forgetful(), box(double)).reset()
    assert first == {"role": "system", "content": "you", "tools": box(double).schemas()}
    assert second == {"role": "user", "content": "what?", "x": 1}


def test_it_counts_calls_so_it_is_played_again_and_not_restored() -> None:
    assert find_snapshots(Ask()) is not None
    env = ToolEnv(Ask(), box())
    assert find_snapshots(env) is None
    assert not InProcessEnv(env).nondeterministic


class Server:
    """A source of tools that records how it is used."""

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
    assert tools.answer(ToolCall("where", {})).outcome is CallOutcome.OK
    assert threads == [threading.current_thread()], "the toolbox waits as long as the source does"


def test_tools_that_do_not_go_with_the_environments_own_are_refused_in_one_line() -> None:
    plain = ToolEnv(Ask(), box(double), style="plain")
    for env, says in (
        (ToolEnv(plain, box(halve)), "differs from the style of the environment's own tools"),
        (ToolEnv(plain, box(double), style="plain"), "two tools are named double"),
    ):
        with pytest.raises(ToolRefused, match=says) as refused:
            env.reset()
        assert "\n" not in str(refused.value)


def test_what_is_thought_of_a_call_is_no_call() -> None:
    env = ToolEnv(Ask(), box(double))
    env.reset()
    call = written(ToolCall("double", {"number": 1}))
    for turn in (f"<think>{call}</think>42", f"<think>{call}", f"{call}</think>"):
        assert env.step(turn)[0] == f"heard {turn}"
    assert env.step(f"{call}</think>{call}<think>{call}")[0] == [
        {"role": "tool", "name": "double", "content": "2.0"}
    ]


def test_what_an_info_says_of_tools_is_taken_where_it_is_ours() -> None:
    assert call_outcomes({"tools": {"ok": 2, "lost": 1, "failed": "often"}}) == {"ok": 2}
    for others in ({}, {"tools": ["hammer"]}, {"tools": None}):
        assert call_outcomes(others) == {}


def test_a_source_is_renewed_with_every_episode_and_closed_with_the_environment() -> None:
    server = Server()
    env = ToolEnv(Ask(), Toolbox([halve], [server]))
    assert InProcessEnv(ToolEnv(env, box(fail))).nondeterministic, (
        "its answers may change, however it is wrapped"
    )
    env.reset()
    assert env.step(written(ToolCall("double", {"number": 1})))[0][0]["content"] == "2.0"
    env.reset()
    env.close()
    assert server.told == ["renew", "renew", "close"]


pieces = st.sampled_from(
    [
        written(ToolCall("double", {"number": 1})),
        written(ToolCall("weather", {"place": "\ud800", "day": 1})),
        written(ToolCall("fail", {"how": "deep"})),
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
