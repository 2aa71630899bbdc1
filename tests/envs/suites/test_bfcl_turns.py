"""Multi-turn function calling, against the package's own right calls. Needs the package bfcl-eval."""

from __future__ import annotations

import ast
from typing import Any

import pytest

pytest.importorskip("bfcl_eval")

from envs import registry
from envs.checks.check import check
from envs.registry import EnvironmentUnknown
from envs.suites.bfcl_turns import CATEGORIES, MAX_ANSWERS, BfclTurns
from envs.tools.tool_calls import ToolCall, write_call


def asked(category: str = "multi_turn_base", seed: int = 0) -> BfclTurns:
    env = BfclTurns(f"bfcl/{category}")
    env.reset(seed=seed)
    return env


def as_call(written: str, tools: list[dict[str, Any]]) -> ToolCall:
    """A right call, which the data give as Python text, in JSON; positions become the names of the document."""
    parsed: Any = ast.parse(written, mode="eval").body
    name = parsed.func.id
    [properties] = (
        each["function"]["parameters"]["properties"] for each in tools if each["function"]["name"] == name
    )
    given = dict(zip(properties, map(ast.literal_eval, parsed.args), strict=False))
    return ToolCall(name, given | {each.arg: ast.literal_eval(each.value) for each in parsed.keywords})


def play(env: BfclTurns, seed: int, without: int | None = None) -> tuple[float, bool, bool, Any]:
    """Make the right calls of every turn, each turn ended by an answer; `without`: the number of a call left out."""
    observation, _ = env.reset(seed=seed)
    tools: Any = observation[0]["tools"]  # type: ignore[index]
    made = 0
    result: Any = None
    for calls in env.right_calls:
        for written in calls:
            made += 1
            if made - 1 != without:
                [told], *rest = env.step(write_call(as_call(written, tools)))
                assert told["role"] == "tool" and rest == [0.0, False, False, {}]
        result = env.step("Done.")
    return result[1:]


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_right_calls_of_the_data_are_paid(category: str) -> None:
    env = BfclTurns(f"bfcl/{category}")
    count = registry.task_count(f"bfcl/{category}", {})
    assert count == 200
    paid = [play(env, seed) for seed in range(0, count, 20)]
    assert all(each == (1.0, True, False, {"success": True}) for each in paid)


def test_a_call_that_is_left_out_and_one_too_many_are_not_paid() -> None:
    env = BfclTurns("bfcl/multi_turn_base")
    assert play(env, 0, without=0)[0] == 0.0
    assert play(env, 0)[0] == 1.0
    [told], *_ = asked().step(write_call(ToolCall("pwd", {})))
    assert "current_working_directory" in told["content"]  # type: ignore[index]


def test_nothing_but_the_functions_of_the_task_is_called() -> None:
    env = asked()
    for call in (
        ToolCall("__import__", {"name": "os"}),
        ToolCall("print", {}),
        ToolCall("cd", {"folder=__import__('os')": "x"}),
        ToolCall("cd", {"no_such_argument": "x"}),
    ):
        [told], *_ = env.step(write_call(call))
        assert told["content"].startswith("Error: that is no call")  # type: ignore[index]
    [told], *_ = env.step(write_call(ToolCall("cd", {"folder": "'); __import__('os').abort(); ('"})))
    assert "No such directory" in told["content"] or "error" in told["content"]  # type: ignore[index]


def test_replicas_and_episodes_share_no_state() -> None:
    one, other = asked(), asked()
    made = write_call(ToolCall("mkdir", {"dir_name": "only_mine"}))
    listing = write_call(ToolCall("ls", {}))
    one.step(made)
    [mine], *_ = one.step(listing)
    [theirs], *_ = other.step(listing)
    assert "only_mine" in mine["content"] and "only_mine" not in theirs["content"]  # type: ignore[index]
    one.reset(seed=0)
    assert one.step(listing)[0][0] == theirs  # type: ignore[index]


def test_a_turn_without_an_end_is_cut() -> None:
    env = asked()
    for _ in range(MAX_ANSWERS - 1):
        assert env.step(write_call(ToolCall("pwd", {})))[1:] == (0.0, False, False, {})
    assert env.step(write_call(ToolCall("pwd", {})))[1:] == (0.0, False, True, {"success": False})
    with pytest.raises(RuntimeError, match="call reset"):
        env.step("Done.")


def test_it_keeps_what_environments_promise() -> None:
    assert check("bfcl/multi_turn_base", seconds=60, turns=4) == []


def test_a_category_without_a_checker_here_is_refused() -> None:
    with pytest.raises(
        EnvironmentUnknown, match="no category 'multi_turn_miss_func'; use one of: multi_turn_base"
    ):
        registry.make("bfcl/multi_turn_miss_func")
