"""Each part of an agent, in an environment where a policy succeeds with it and the same policy cannot without it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerFast

from envs.base import TextEnv, messages_of
from envs.hosting.host import HostSettings, InProcessEnv
from envs.tools.tool_calls import ToolCall, write_call
from rollout.agents.library import LibrarySettings, Store
from rollout.agents.memory import Notebook, NotebookSettings, SummarySettings, WindowSettings
from rollout.agents.planning import PlanSettings
from rollout.agents.reflection import ReflectSettings
from rollout.agents.settings import PartSettings, wrapped
from rollout.agents.thinking import ThinkSettings
from rollout.chat.chat import Chat
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.resume import restore_environment
from rollout.wire.trajectory import EndReason, PartialEpisode, Task
from tests.rollout.scripted import Script, played

MOVES = ("left", "right")
CODES = list(product(MOVES, repeat=3))


class Code(TextEnv):
    """Wants a code of moves, one a turn, after `wait` turns. It says the code once, at the `says`th turn, or never.

    With `changes` the code is the opposite one from the second move on, which is said then. The end reveals the code.
    """

    def __init__(self, wait: int = 0, says: int | None = 0, changes: bool = False) -> None:
        self.wait, self.says, self.changes = wait, says, changes

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Any]:
        self.code = CODES[(seed or 0) % len(CODES)]
        self.turn, self.right = 0, True
        return f"begin{self.said()}", {}

    def said(self) -> str:
        return f" code {' '.join(self.code)}" if self.turn == self.says else ""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        number = self.turn - self.wait
        if number >= 0 and action not in MOVES:
            return "what", 0.0, True, False, {"malformed": True, "success": False}
        self.right &= number < 0 or action == self.code[number]
        self.turn += 1
        if number + 1 == len(self.code):
            return f"it was {' '.join(self.code)}", float(self.right), True, False, {"success": self.right}
        if self.changes and number == 0:
            self.code = (self.code[0], *(MOVES[move == "left"] for move in self.code[1:]))
            return f"code {' '.join(self.code)} move 1", 0.0, False, False, {}
        return f"move {number + 1}{self.said()}", 0.0, False, False, {}


def codes_in(prompt: str) -> list[list[str]]:
    return [found.split() for found in re.findall(r"code ((?:left|right)(?: (?:left|right)){2})", prompt)]


def move(prompt: str, rng: Random) -> str:
    """The move that is asked for, if the newest code in the prompt says it."""
    del rng
    number = re.findall(r"move (-?\d+)", prompt)
    codes = codes_in(prompt)
    return codes[-1][max(0, int(number[-1]) if number else 0)] if codes else "left"


def planner(prompt: str, rng: Random) -> str:
    last = prompt.rsplit("<|user|>", 1)[-1]
    said = codes_in(last)
    if "First write a plan." in last:
        return "code " + " ".join(said[-1])
    if len(said) == 2 and said[0] != said[1]:  # the plan, and what contradicts it
        return "plan: code " + " ".join(said[1])
    return move(last, rng)


def thinker(prompt: str, rng: Random) -> str:
    if prompt.endswith("</think>"):
        return move(prompt, rng)
    long = "so " * 200 if "move 2" in prompt else ""
    return f"<think>hm {long}</think> {move(prompt, rng)}"


def summarizer(prompt: str, rng: Random) -> str:
    if prompt.endswith("Write down what matters of all this.<|assistant|>"):
        codes = codes_in(prompt)
        return "code " + " ".join(codes[-1]) if codes else "nothing"
    return move(prompt, rng)


def noter(prompt: str, rng: Random) -> str:
    """Writes a code down when it is said, and reads it again when it is in sight no more."""
    said = codes_in(prompt.rsplit("<|user|>", 1)[-1])
    if said and "move" in prompt.rsplit("<|user|>", 1)[-1]:
        return write_call(ToolCall("write", {"key": "k", "text": f"code {' '.join(said[0])}"}))
    if "move" in prompt and not codes_in(prompt):
        return write_call(ToolCall("read", {"key": "k"}))
    return move(prompt, rng)


def learner(prompt: str, rng: Random) -> str:
    """Asked what there is to learn, it writes the code down that the end has revealed."""
    revealed = re.findall(r"it was ((?:left|right)(?: (?:left|right)){2})", prompt.rsplit("<|user|>", 1)[-1])
    return f"code {revealed[0]}" if revealed else move(prompt, rng)


@pytest.fixture
def successes(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> Callable[..., int]:
    """Of the eight codes, how many a policy plays right."""

    def count(script: Script, part: PartSettings | None, env: dict[str, Any], **how: Any) -> int:
        made = wrapped(lambda: Code(**env), [part] if part else [])
        return sum(bool(played(chat, tokenizer, script, made, seed, **how).success) for seed in range(8))

    return count


def test_a_plan_carries_what_was_seen_once(successes: Callable[..., int]) -> None:
    assert successes(planner, PlanSettings(), {}, memory="last") == 8
    assert successes(move, None, {}, memory="last") == 2  # two moves are guessed


def test_a_plan_is_revised_when_an_observation_contradicts_it(successes: Callable[..., int]) -> None:
    assert successes(planner, PlanSettings(), {"changes": True}, memory="last") == 8
    assert successes(planner, PlanSettings(max_revisions=0), {"changes": True}, memory="last") == 0
    assert successes(move, None, {"changes": True}, memory="last") == 4  # the last move is guessed


def test_thoughts_are_not_heard_and_end_in_time(successes: Callable[..., int]) -> None:
    assert successes(thinker, ThinkSettings(tokens=60), {}) == 8
    assert successes(thinker, ThinkSettings(tokens=60, keep=False), {}) == 8
    assert successes(thinker, None, {}) == 0


def test_a_thought_that_is_closed_for_the_policy_goes_on_in_the_same_turn(
    chat: Chat, tokenizer: PreTrainedTokenizerFast
) -> None:
    env = wrapped(Code, [ThinkSettings(tokens=60)])
    steps = played(chat, tokenizer, thinker, env, seed=5).turns
    closed = steps[3]
    assert [step.finish_reason for step in steps] == ["stop", "stop", "length", "stop"]
    assert tokenizer.decode(closed.prompt_ids) == "</think>"
    assert closed.segment == steps[2].segment


def test_forgotten_thoughts_open_a_segment_without_them(
    chat: Chat, tokenizer: PreTrainedTokenizerFast
) -> None:
    env = wrapped(Code, [ThinkSettings(tokens=60, keep=False)])
    steps = played(chat, tokenizer, thinker, env, seed=5).turns
    assert [step.segment for step in steps] == [0, 1, 2, 2]
    second = tokenizer.decode(steps[1].prompt_ids)
    assert second == "<|user|>begin code right left right<|assistant|>right<|end|><|user|>move 1<|assistant|>"


LONG = {"wait": 12}


def test_a_window_fits_a_long_conversation_into_a_short_context(successes: Callable[..., int]) -> None:
    assert successes(move, WindowSettings(every=4, keep=2), LONG, context_tokens=110) == 8
    assert successes(move, None, LONG, context_tokens=110) == 0


def test_a_summary_keeps_what_a_window_forgets(successes: Callable[..., int]) -> None:
    late = {"wait": 24, "says": 1}
    assert successes(summarizer, SummarySettings(every=4), late, context_tokens=220) == 8
    assert successes(summarizer, WindowSettings(every=4, keep=2), late, context_tokens=220) < 4
    assert successes(summarizer, None, late, context_tokens=220) < 4


def test_a_notebook_keeps_what_a_window_forgets(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> None:
    window = WindowSettings(every=6, keep=2)

    def play(parts: list[PartSettings]) -> int:
        made = partial(wrapped, partial(Code, wait=9, says=1), parts)
        return sum(bool(played(chat, tokenizer, noter, made(), seed).success) for seed in range(8))

    assert play([NotebookSettings(), window]) == 8
    assert play([window]) == 0


def test_a_notebook_is_bounded_and_begins_empty() -> None:
    notebook = Notebook(entries=2, max_chars=3)
    assert [notebook.write(key, "12345") for key in "aab"] == ["noted"] * 3
    assert notebook.write("c", "1") == "the notebook is full: a, b"
    assert (notebook.read("a"), notebook.read("c")) == ("123", "nothing stands under c")
    assert notebook.write("a" * 9, "1") == "the notebook is full: a, b", "a key is cut, too"
    notebook.renew()
    assert notebook.write("key of nine", "1") == "noted"
    assert (notebook.notes(), notebook.read("key")) == ("key", "1")
    notebook.renew()
    assert notebook.notes() == "no notes"


def test_a_summary_is_a_turn_that_is_trained_and_begins_a_segment(
    chat: Chat, tokenizer: PreTrainedTokenizerFast
) -> None:
    env = wrapped(lambda: Code(wait=3), [SummarySettings(every=2)])
    trajectory = played(chat, tokenizer, summarizer, env, seed=6)
    assert trajectory.end_reason is EndReason.TERMINATED
    assert [step.segment for step in trajectory.turns] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [step.action for step in trajectory.turns][2::3] == ["code right right left"] * 2
    fourth = json.loads(trajectory.turns[3].observation)
    assert fourth == [
        {
            "role": "user",
            "content": "begin code right right left\nSo far: code right right left\nmove -1",
            "reset_context": True,
        }
    ]


NEVER = {"says": None}


def test_a_reflection_makes_the_second_attempt_succeed(successes: Callable[..., int]) -> None:
    assert successes(learner, ReflectSettings(), NEVER) == 8
    assert successes(learner, None, NEVER) == 1  # "left" three times


def test_every_attempt_earns_what_it_earned_and_the_last_one_decides(
    chat: Chat, tokenizer: PreTrainedTokenizerFast
) -> None:
    trajectory = played(
        chat,
        tokenizer,
        lambda prompt, rng: "left",
        wrapped(lambda: Code(**NEVER), [ReflectSettings(attempts=3)]),
        7,
    )
    assert [step.segment for step in trajectory.turns] == [0] * 4 + [1] * 4 + [2] * 3
    assert (trajectory.success, trajectory.reward) == (False, 0.0)
    third = json.loads(trajectory.turns[8].observation)
    assert third == [
        {"role": "user", "content": "Attempt 1: left\nAttempt 2: left\nbegin", "reset_context": True},
    ]


def test_a_lesson_of_one_episode_serves_the_next(
    chat: Chat, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    part = LibrarySettings(path=tmp_path / "lessons.sqlite", found=1)
    results = [
        played(chat, tokenizer, learner, wrapped(lambda: Code(**NEVER), [part]), seed=6).success
        for _ in range(2)
    ]
    assert results == [False, True]
    assert InProcessEnv(wrapped(Code, [part])).nondeterministic
    assert played(chat, tokenizer, learner, Code(**NEVER), seed=6).success is False


def test_a_store_finds_what_is_alike_and_forgets_the_oldest(tmp_path: Path) -> None:
    store = Store(tmp_path / "lessons.sqlite", capacity=3)
    assert store.similar("a red door", 2) == []
    for about, lesson in (
        ("a red door", "push"),
        ("a blue door", "pull"),
        ("the sea", "swim"),
        ('a "cat"', "purr"),
    ):
        store.add(about, lesson)
    store.add("the sea", "")
    assert store.similar("blue door", 2) == ["pull"]
    assert store.similar("the deep sea", 1) == ["swim"]
    assert store.similar("red", 3) == []  # the oldest, beyond the capacity
    assert store.similar('" OR cat', 1) == ["purr"]
    assert Store(tmp_path / "lessons.sqlite", capacity=3).similar("cat", 1) == ["purr"]


EVERY_PART = (
    ThinkSettings(tokens=60, keep=False),
    PlanSettings(),
    SummarySettings(every=2),
    WindowSettings(every=3, keep=1),
    ReflectSettings(),
    NotebookSettings(),
)


@pytest.mark.parametrize("part", EVERY_PART, ids=lambda part: part.kind)
def test_an_episode_goes_on_through_its_part(
    chat: Chat, tokenizer: PreTrainedTokenizerFast, part: Any
) -> None:
    """Replayed from seed and actions, every observation the same: what a lost worker leaves is enough."""
    make = partial(wrapped, partial(Code, wait=2), [part])
    trajectory = played(
        chat, tokenizer, lambda prompt, rng: rng.choice(["left", "code", "<think>a</think> left"]), make(), 3
    )
    for count in range(1, len(trajectory.turns)):
        resume_from = PartialEpisode(trajectory.turns[:count], end=None, snapshot=None)
        standing = asyncio.run(restore_environment(InProcessEnv(make()), trajectory.task, resume_from))
        assert json.loads(trajectory.turns[count].observation) == messages_of(standing.observation)


def test_parts_go_with_an_environment_into_its_process() -> None:
    async def opening() -> Any:
        pool = EnvironmentPool(host=HostSettings(where="process"), parts=[PlanSettings(ask="Plan it.")])
        task = Task.of("frozen_lake", 0)
        replica = await pool.take(task)
        try:
            return await replica.reset(0)
        finally:
            await pool.discard(task, replica)

    assert asyncio.run(opening())[-1]["content"].endswith("\nPlan it.")


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "window", "every": 4, "keep": 4},
        {"kind": "reflect", "attempts": 1},
        {"kind": "plan", "asks": "x"},
        {"kind": "dream"},
        {"kind": "library"},
    ],
)
def test_a_part_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(PartSettings).validate_python(options)
