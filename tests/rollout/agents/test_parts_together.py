"""Every pair of parts, in both orders: either it is refused, or each of the two does what it does alone."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from functools import partial
from itertools import cycle, permutations
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from envs.base import TextEnv, messages_of
from envs.builtin.assistant import assistant
from envs.hosting.host import InProcessEnv
from envs.tools.tool_calls import ToolCall, write_call
from rollout.agents.agent import AgentSettings
from rollout.agents.library import LibrarySettings
from rollout.agents.memory import NotebookSettings, SummarySettings, WindowSettings
from rollout.agents.planning import PlanSettings
from rollout.agents.reflection import ReflectSettings
from rollout.agents.settings import PartSettings, wrapped
from rollout.agents.thinking import ThinkSettings
from rollout.agents.tools import ToolsSettings
from rollout.chat.chat import Chat
from rollout.engines.scripted_engine import Request
from rollout.episodes.resume import restore_environment
from rollout.wire.trajectory import EndReason, PartialEpisode
from tests.rollout.scripted import Script, played

TASK = "begin: walk to the end"
THOUGHT_TOKENS = 60
SUMS: list[str] = []  # that were calculated


def calculate(expression: str) -> str:
    """Looks the sum up."""
    SUMS.append(expression)
    return f"{expression} is 7"


class Walk(TextEnv):
    """Walks `length` turns whatever it is told, and has then failed. It pays nothing and remembers what it heard."""

    def __init__(self, length: int, heard: list[str]) -> None:
        self.length, self.heard = length, heard

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Any]:
        self.turn = 0
        return TASK, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.heard.append(action)
        self.turn += 1
        ended = self.turn == self.length
        return f"at {self.turn:02d}", 0.0, ended, False, {"success": False} if ended else {}


CALLS = [
    write_call(ToolCall("calculate", {"expression": "3 + 4"})),
    write_call(ToolCall("write", {"key": "k", "text": "x"})),
]
IN_THOUGHT = write_call(ToolCall("calculate", {"expression": "0 + 0"}))
SAID = ["left", "right", "plan: left", *CALLS]


def talker() -> Script:
    """Says in turn what a policy may say: with and without thoughts, with calls, with calls in thoughts."""
    saying = cycle([*SAID, *(f"<think>hm {IN_THOUGHT}</think> {said}" for said in SAID)])
    return lambda prompt, rng: next(saying)


def thinker(prompt: str, rng: Random) -> str:
    """Always thinks, sometimes for too long, and sometimes until there is no room for what it says."""
    said = rng.choice(SAID)
    if prompt.endswith("</think>"):
        return said
    if not prompt.endswith("<|assistant|>"):  # a turn that goes on behind its thought
        return "alk"
    return rng.choice([f"<think>hm</think>{said}", f"<think>{'so ' * 40}", f"<think>{'o' * 44}</think>walk"])


def parts(folder: Path) -> dict[str, PartSettings]:
    chosen: Sequence[PartSettings] = (
        ThinkSettings(tokens=THOUGHT_TOKENS, answer_tokens=120, keep=False),
        PlanSettings(max_chars=20),
        NotebookSettings(max_calls=99),
        WindowSettings(every=4, keep=2),
        SummarySettings(every=3, max_chars=20),
        ReflectSettings(max_chars=20),
        LibrarySettings(path=folder / "lessons.sqlite", found=1, max_chars=20),
        ToolsSettings(
            functions=("tests.rollout.agents.test_parts_together:calculate",), call_seconds=None, max_calls=99
        ),
    )
    return {part.kind: part for part in chosen}


KINDS = ("think", "plan", "notebook", "window", "summary", "reflect", "library", "tools")
REFUSED = {
    *((("think", kind)) for kind in KINDS[1:]),
    ("window", "summary"),  # would remove the summaries
    ("reflect", "tools"),  # would keep the first attempt
}
ORDERS = sorted(set(permutations(KINDS, 2)) - REFUSED)


def test_orders_that_undo_one_another_are_refused_in_one_line(tmp_path: Path) -> None:
    found = set()
    for pair in permutations(KINDS, 2):
        try:
            AgentSettings(parts=tuple(parts(tmp_path)[kind] for kind in pair))
        except ValidationError as error:
            (fault,) = error.errors()
            assert re.search(r"list \w+ (last|before)", fault["msg"]) and "\n" not in fault["msg"]
            found.add(pair)
    assert found == REFUSED


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"parts": [{"kind": "plan"}, {"kind": "tools"}, {"kind": "plan"}]}, "plan is listed 2 times"),
        ({"parts": [{"kind": "tools", "style": "plain"}, {"kind": "notebook"}]}, "styles hermes and plain"),
        ({"parts": [{"kind": "plan", "remind": False}, {"kind": "window"}]}, "use remind=true"),
        ({"parts": [{"kind": "plan", "remind": False}], "memory": "last"}, "use remind=true"),
        ({"parts": [{"kind": "summary"}], "memory": "last"}, "remove the part"),
        ({"parts": [{"kind": "think", "keep": False}], "memory": "last"}, "remove the part"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        AgentSettings.model_validate(options)


def longest_prompt(requests: list[Request]) -> int:
    return max(len(request.prompt_ids) for request in requests)


@pytest.mark.parametrize("pair", ORDERS, ids="-".join)
def test_two_parts_do_what_each_does_alone(
    chat: Chat, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, pair: tuple[str, str]
) -> None:
    heard: list[str] = []
    asked: list[Request] = []
    SUMS.clear()
    chosen = [parts(tmp_path)[kind] for kind in pair]
    make = partial(wrapped, partial(Walk, 8, heard), chosen)
    trajectory = played(chat, tokenizer, _script(pair), make(), 1, max_turns=200, requests=asked)

    assert (trajectory.end_reason, trajectory.success) == (EndReason.TERMINATED, False)
    prompts = [tokenizer.decode(request.prompt_ids) for request in asked]
    assert all(TASK in prompt for prompt in prompts), "the task stays visible"
    announced = {"tools": "calculate(expression)", "notebook": "write(key, text)"}
    for kind in announced.keys() & set(pair):
        assert all(announced[kind] in prompt.partition("<|user|>")[0] for prompt in prompts)
    assert "0 + 0" not in SUMS, "what is thought of a call is no call"
    if "think" in pair:
        assert not [action for action in heard if "<think>" in action or "</think>" in action]
        assert "walk" in heard and "w" not in heard, "an action is heard as a whole"
        assert max(request.sampling.max_tokens for request in asked) <= 120
        begun = [each for each in asked if tokenizer.decode(each.prompt_ids).endswith("<|assistant|>")]
        assert {request.sampling.max_tokens for request in begun} == {THOUGHT_TOKENS}
    if {"window", "summary"} & set(pair):
        longer: list[Request] = []
        longer_env = wrapped(partial(Walk, 48, heard), chosen)
        played(chat, tokenizer, _script(pair), longer_env, 1, max_turns=400, requests=longer)
        assert longest_prompt(longer) < 3 * longest_prompt(asked), "it does not grow six times"
    if "library" not in pair:
        _assert_goes_on(trajectory, make)


def _script(pair: tuple[str, str]) -> Script:
    return thinker if "think" in pair else talker()


def _assert_goes_on(trajectory: Any, make: Any) -> None:
    """Replayed from seed, actions and what is known of each turn, every observation is the same."""
    for count in range(1, len(trajectory.turns), 3):
        resume_from = PartialEpisode(trajectory.turns[:count], end=None, snapshot=None)
        standing = asyncio.run(restore_environment(InProcessEnv(make()), trajectory.task, resume_from))
        assert json.loads(trajectory.turns[count].observation) == messages_of(standing.observation)


def test_an_attempt_that_follows_another_is_told_what_was_learnt_as_long_as_it_lasts(
    chat: Chat, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked: list[Request] = []
    chosen = [ReflectSettings(), WindowSettings(every=3, keep=1)]
    env = wrapped(partial(Walk, 8, []), chosen)
    played(chat, tokenizer, lambda prompt, rng: "left", env, 1, requests=asked)
    second = [tokenizer.decode(request.prompt_ids) for request in asked[9:]]
    assert len(second) == 8 and all("Attempt 1: left" in prompt for prompt in second)


def test_tools_are_announced_with_every_turn_that_sees_nothing_else(
    chat: Chat, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked: list[Request] = []
    env = assistant(style="plain", max_calls=2)
    trajectory = played(
        chat, tokenizer, lambda prompt, rng: "calculate(1 + 1)", env, 3, memory="last", requests=asked
    )
    prompts = [tokenizer.decode(request.prompt_ids) for request in asked]
    assert len(prompts) == 5
    heads = {prompt.partition("<|user|>")[0] for prompt in prompts}
    assert len(heads) == 1 and "calculate(expression)" in heads.pop()
    resume_from = PartialEpisode(trajectory.turns[:2], end=None, snapshot=None)
    standing = asyncio.run(
        restore_environment(InProcessEnv(assistant(style="plain", max_calls=2)), trajectory.task, resume_from)
    )
    assert standing.observation == json.loads(trajectory.turns[2].observation), (
        "what is stored is what was said"
    )
