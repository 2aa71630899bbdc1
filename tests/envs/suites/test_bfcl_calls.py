"""Function-calling tasks, against the possible answers of the package's own data. Needs the package bfcl-eval."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("bfcl_eval")

from envs import registry
from envs.checks.check import check
from envs.registry import EnvironmentUnknown
from envs.suites.bfcl_calls import CATEGORIES, IDS, IRRELEVANCE, RELEVANCE, BfclCalls, Player, tools_of
from envs.tools.tool_calls import ToolCall, write_call

CHECKED = [each for each in CATEGORIES if each not in (*IRRELEVANCE, *RELEVANCE)]


def asked(category: str, seed: int = 0, **options: Any) -> BfclCalls:
    env = BfclCalls(f"bfcl/{category}", **options)
    env.reset(seed=seed)
    return env


def filled(value: Any) -> Any:
    """A value out of a list of possible ones, at every depth; a dict holds a list for each of its keys."""
    if isinstance(value, dict):
        return {
            key: filled(next(each for each in of if each != "")) for key, of in value.items() if of != [""]
        }
    return [filled(each) for each in value] if isinstance(value, list) else value


def answered(env: BfclCalls) -> list[ToolCall]:
    """The first possible call of each function that the package's data ask for, without what may be left out."""
    calls = []
    for each in env.possible_answer:
        [(name, arguments)] = each.items()
        given = {key: of[0] for key, of in arguments.items() if of and "" not in of}
        calls.append(ToolCall(name, {key: filled(value) for key, value in given.items()}))
    return calls


def written(calls: list[ToolCall]) -> str:
    return "\n".join(map(write_call, calls))


@pytest.mark.parametrize("category", CHECKED)
def test_the_possible_answers_of_the_data_are_paid_and_what_differs_is_not(category: str) -> None:
    env = BfclCalls(f"bfcl/{category}")
    count = registry.task_count(f"bfcl/{category}", {})
    assert count is not None and count > 10
    right = 0
    for seed in range(0, count, max(count // 60, 1)):
        env.reset(seed=seed)
        calls = answered(env)
        right += int(env.step(written(calls))[1])
        assert env.step("I would rather not.")[1:] == (0.0, True, False, {"success": False})
        assert env.step(written([*calls, calls[0]]))[1] == 0.0, "one call too many"
        other = [ToolCall(f"{calls[0].name}_", calls[0].arguments), *calls[1:]]
        assert env.step(written(other))[1] == 0.0
        more = [ToolCall(calls[0].name, calls[0].arguments | {"no_such_parameter": 1}), *calls[1:]]
        assert env.step(written(more))[1] == 0.0
    played = len(range(0, count, max(count // 60, 1)))
    assert right / played > 0.9, "a few possible answers are not accepted by the package's own checker"


def test_a_task_by_hand() -> None:
    env = asked("simple_python")
    messages, _ = env.reset(seed=0)
    assert messages[0]["role"] == "user" and "triangle" in messages[0]["content"]
    [tool] = messages[0]["tools"]
    assert tool["function"]["name"] == "calculate_triangle_area"
    assert tool["function"]["parameters"]["type"] == "object"
    call = '<tool_call>\n{"name": "calculate_triangle_area", "arguments": {"base": 10, "height": 5}}\n</tool_call>'
    assert env.step(f"<think>easy</think>Here: {call}") == ("", 1.0, True, False, {"success": True})
    env.reset(seed=0)
    assert env.step(call.replace("10", "11"))[1] == 0.0
    env.reset(seed=0)
    assert env.step(call.replace("</tool_call>", ""))[1:] == (
        0.0,
        True,
        False,
        {"success": False, "malformed": True},
    )


def test_where_no_function_fits_only_no_call_is_right_and_the_other_way_round() -> None:
    call = written([ToolCall("anything", {})])
    for category, paid in (*((each, (1.0, 0.0)) for each in IRRELEVANCE), (RELEVANCE[0], (0.0, 1.0))):
        assert (asked(category).step("There is none.")[1], asked(category).step(call)[1]) == paid


def test_each_seed_is_one_task_and_the_parts_of_a_split_share_none() -> None:
    count = registry.task_count("bfcl/simple_python", {})
    assert count == 400
    names = [asked("simple_python", seed).reset(seed=seed)[1]["task"] for seed in (0, 1, count - 1, count)]
    assert len(set(names)) == 3 and names[3] == names[0]
    parts = [
        registry.task_count("bfcl/simple_python", {"split": split}) or 0 for split in ("train", "heldout")
    ]
    assert sum(parts) == count and min(parts) > 20
    assert registry.has_splits("bfcl/simple_python")


def test_functions_are_told_in_a_system_message_where_a_template_has_no_tools() -> None:
    [system, user] = asked("multiple", announce="system").reset(seed=0)[0]
    assert (system["role"], user["role"]) == ("system", "user") and "tools" not in system
    told = [
        json.loads(line)
        for line in system["content"].splitlines()
        if line.startswith('{"name": ') and "desc" in line
    ]
    assert [each["name"] for each in told] == [
        tool["function"]["name"] for tool in asked("multiple").reset(seed=0)[0][0]["tools"]
    ]


def test_types_are_those_of_json_schemas_at_every_depth() -> None:
    nested = {"type": "dict", "properties": {"a": {"type": "array", "items": {"type": "float"}}}}
    [tool] = tools_of([{"name": "f", "description": "", "parameters": nested, "response": {}}])
    wanted = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "number"}}}}
    assert tool == {"type": "function", "function": {"name": "f", "description": "", "parameters": wanted}}


def test_the_scripted_player_beats_one_at_random() -> None:
    def success(error_rate: float) -> float:
        env, paid = BfclCalls("bfcl/simple_python"), 0.0
        for seed in range(100):
            observation, _ = env.reset(seed=seed)
            paid += env.step(Player(error_rate, seed).act(observation))[1]
        return paid / 100

    assert success(1.0) < 0.05 < success(0.0)


@pytest.mark.parametrize("env_id", ["bfcl/simple_python", "bfcl/live_irrelevance"])
def test_it_keeps_what_environments_promise(env_id: str) -> None:
    assert check(env_id, seconds=60) == []


def test_wrong_categories_and_options_are_refused_in_one_line() -> None:
    assert set(IDS) == set(
        registry.suite_ids(next(each for each in registry.SUITES if each.prefix == "bfcl/"))
    )
    for env_id, options, says in (
        ("bfcl/simple_java", {}, "no category 'simple_java'; use one of: simple_python"),
        ("bfcl/multiple", {"announce": "user"}, "must be template or system"),
    ):
        with pytest.raises(EnvironmentUnknown, match=says) as refused:
            registry.make(env_id, **options)
        assert "\n" not in str(refused.value)
