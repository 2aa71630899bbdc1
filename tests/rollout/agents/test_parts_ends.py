"""What an episode comes to with parts that have turns behind its end, and what crosses to a replica's process."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from envs.base import Message, TextEnv, messages_of
from envs.hosting.host import HostSettings, InProcessEnv, TokenUsage
from rollout.agents.agent import Agent
from rollout.agents.library import LibrarySettings, Store
from rollout.agents.memory import NotebookSettings, SummarySettings, WindowSettings
from rollout.agents.planning import PlanSettings
from rollout.agents.reflection import ReflectSettings
from rollout.agents.settings import PartSettings, wrapped
from rollout.agents.thinking import ThinkSettings
from rollout.agents.tools import ToolsSettings
from rollout.chat.chat import Chat
from rollout.engines.engine import Sampling
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec, run_episode
from rollout.episodes.group import run_group
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.worker import RolloutSettings, RolloutWorker
from rollout.wire.trajectory import EndReason, PartialEpisode, Slot, Task
from tests.rollout.fake_replay_buffer import FakeReplayBuffer
from tests.rollout.scripted import played

Outcome = tuple[str, float, bool, bool, dict[str, Any]]


class Paid(TextEnv):
    """Attempts that pay what was ordered, step by step, each step's reward being named, too; then verdicts in order."""

    def __init__(self, attempts: list[list[float]], verdicts: list[bool | None]) -> None:
        self.attempts, self.verdicts, self.attempt = attempts, verdicts, -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Any]:
        self.attempt = (self.attempt + 1) % len(self.attempts)
        self.left = list(self.attempts[self.attempt])
        return "play", {}

    def step(self, action: str) -> Outcome:
        reward = self.left.pop(0)
        info: dict[str, Any] = {"rewards": {"a": reward / 4, "b": reward * 3 / 4}}
        verdict = self.verdicts[self.attempt]
        if not self.left and verdict is not None:
            info["success"] = verdict
        return "played", reward, not self.left, False, info


def won() -> Paid:
    return Paid([[1.0]], [True])


def say(prompt: str, rng: Random) -> str:
    return "left"


def test_a_lesson_costs_neither_reward_nor_verdict(
    chat: Chat, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    env = wrapped(won, [LibrarySettings(path=tmp_path / "lessons.sqlite")])
    whole = played(chat, tokenizer, say, env, 0)
    assert [step.reward for step in whole.turns] == [1.0, 0.0]
    last = played(chat, tokenizer, say, env, 0, max_turns=1)
    full = played(chat, tokenizer, say, env, 0, context_tokens=60)
    assert [len(each.turns) for each in (whole, last, full)] == [2, 1, 1]
    for each in (whole, last, full):
        assert (each.end_reason, each.reward, each.success) == (EndReason.TERMINATED, 1.0, True)


def test_an_episode_without_a_turn_to_reflect_ended_as_its_attempt_did(
    chat: Chat, tokenizer: PreTrainedTokenizerFast
) -> None:
    make = partial(wrapped, lambda: Paid([[0.0, 0.5], [0.0, 1.0]], [False, True]), [ReflectSettings()])
    cut = played(chat, tokenizer, say, make(), 0, max_turns=2)
    assert (cut.end_reason, cut.reward, cut.success) == (EndReason.TERMINATED, 0.5, False)
    second = played(chat, tokenizer, say, make(), 0, max_turns=4)
    assert (second.end_reason, second.success) == (EndReason.TRUNCATED, None), "the attempt under way was cut"

    agent = Agent(ScriptedEngine(tokenizer, say), chat, Sampling(max_tokens=8), 512)
    resume_from = PartialEpisode(second.turns[:2], end=None, snapshot=None)
    place = EpisodeSpec(Slot(0, 0, second.task, 0), index=0, seed=0)
    again = asyncio.run(
        run_episode(InProcessEnv(make()), agent, place, EpisodeLimits(2, 30.0), resume_from=resume_from)
    )
    assert (again.end_reason, again.success) == (EndReason.TERMINATED, False), "also where it went on"


amounts = st.floats(-2, 2, width=16)


@settings(max_examples=60)
@given(st.lists(st.lists(amounts, min_size=1, max_size=4), min_size=3, max_size=3), st.integers(1, 4))
def test_an_episode_earns_what_its_best_attempt_did(attempts: list[list[float]], wins: int) -> None:
    """The `wins`th of three attempts succeeds; the named rewards are the best one's, too."""
    verdicts: list[bool | None] = [number == wins for number in (1, 2, 3)]
    env = wrapped(lambda: Paid(attempts, verdicts), [ReflectSettings(attempts=3)])
    env.reset(seed=0)
    earned, named, ended = 0.0, {"a": 0.0, "b": 0.0}, False
    while not ended:
        _, reward, terminated, truncated, info = env.step("left")
        earned += reward
        for name, value in info.get("rewards", {}).items():
            named[name] += value
        ended = terminated or truncated
    assert earned == pytest.approx(max(sum(each) for each in attempts[:wins]))
    assert named == pytest.approx({"a": earned / 4, "b": earned * 3 / 4})


def test_where_there_is_no_verdict_nothing_has_failed(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> None:
    env = wrapped(lambda: Paid([[1.0, 1.0], [1.0, 1.0]], [None, None]), [ReflectSettings()])
    trajectory = played(chat, tokenizer, say, env, 0)
    assert (len(trajectory.turns), trajectory.reward, trajectory.success) == (2, 2.0, None)


def test_an_evaluation_reads_lessons_and_leaves_none(
    chat: Chat, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "lessons.sqlite"
    engine = ScriptedEngine(tokenizer, say)
    agent = Agent(engine, chat, Sampling(max_tokens=8), 512)
    task = Task.of("paid", 0)
    limits = RolloutSettings(group_size=2, concurrent_groups=1)

    async def run() -> None:
        pool = EnvironmentPool(lambda env_id: won(), parts=[LibrarySettings(path=path)])
        worker = RolloutWorker("worker", engine, agent, FakeReplayBuffer([]), limits, 0, pool)
        (before,) = await worker.evaluate([task])
        assert (len(before.turns), before.success) == (1, True)
        assert Store(path, 9).similar("play", 9) == []
        await run_group(Slot(0, 0, task, 0), pool, agent, 2, limits.limits, 0)
        assert Store(path, 9).similar("play", 9) == ["left", "left"]
        (after,) = await worker.evaluate([task])
        assert "Remember: left" in after.turns[0].observation
        assert Store(path, 9).similar("play", 9) == ["left", "left"]
        await worker.close()

    asyncio.run(run())


class Directing(TextEnv):
    """Has the policy's first turn go on, then answers with a limit; never ends."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Any]:
        self.turn = 0
        return "play", {}

    def step(self, action: str) -> tuple[list[Message], float, bool, bool, dict[str, Any]]:
        self.turn += 1
        if self.turn == 1:
            return [{"role": "assistant", "content": "!", "continue_turn": True}], 0.0, False, False, {}
        return [{"role": "user", "content": f"heard {action}", "max_tokens": 5}], 0.0, False, False, {}


@pytest.mark.parametrize(
    "part",
    [
        ThinkSettings(keep=False),
        PlanSettings(),
        NotebookSettings(),
        WindowSettings(every=1, keep=0),
        SummarySettings(every=1),
        ReflectSettings(),
        ToolsSettings(),
    ],
    ids=lambda part: part.kind,
)
def test_a_part_lets_a_turn_go_on_and_keeps_the_environments_limit(part: PartSettings) -> None:
    env = wrapped(Directing, [part])
    env.reset(seed=0)
    if part.kind == "plan":
        env.step("a plan")
    assert env.step("</think>le")[0] == [{"role": "assistant", "content": "!", "continue_turn": True}]
    said, *_ = env.step("ft")
    if part.kind == "summary":
        assert "max_tokens" not in said[0], "a summary is no answer to the environment"
        said, *_ = env.step("so it was")
    assert said[0]["max_tokens"] == 5
    if part.kind == "think":
        assert [each["content"] for each in said] == ["play", "le!ft", "heard ft"]


def test_what_a_part_must_know_and_say_crosses_to_its_process(tmp_path: Path) -> None:
    calculator = ToolsSettings(functions=("envs.builtin.assistant_data:calculate",), style="plain")
    library = LibrarySettings(path=tmp_path / "lessons.sqlite")

    async def run() -> list[Any]:
        pool = EnvironmentPool(
            host=HostSettings(where="process"), parts=[library, calculator, ThinkSettings()]
        )
        task = Task.of("frozen_lake", 0)
        replica = await pool.take(task)
        try:
            await replica.reset(0)
            replica.sampled(TokenUsage(9, 9, cut=True))
            told = [await replica.step("<think>so</think>calculate(2")]
            replica.sampled(TokenUsage(9, 9, cut=False))
            return [*told, await replica.step(" + 3)"), await replica.step("</think>swim")]
        finally:
            await pool.discard(task, replica)

    cut, called, ended = asyncio.run(run())
    assert cut[0][0] == {"role": "assistant", "content": "", "continue_turn": True, "max_tokens": 64}
    assert (called[0][0]["content"], called[4]) == ("5", {"tools": {"ok": 1}})
    assert ended[2:] == (
        False,
        False,
        {"ended": {"terminated": True, "truncated": False, "success": False, "malformed": True}},
    )


def test_a_seal_of_before_is_read() -> None:
    from rollout.episodes.resume import EpisodeState, pack_snapshot, unpack_snapshot

    standing = EpisodeState(messages_of("x"), None, {"terminated": True})
    assert unpack_snapshot(pack_snapshot(standing, b"state")) == (standing, b"state")
    head = json.dumps({"observation": '[{"role": "user", "content": "x"}]', "success": True}).encode()
    assert unpack_snapshot(len(head).to_bytes(4, "little") + head) == (
        EpisodeState(messages_of("x"), True, None),
        b"",
    )
