"""Tools as a part of an agent: what a recipe says, in an episode, through a crash, and in another process."""

from __future__ import annotations

import asyncio
import json
import sys
from random import Random
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerFast

from envs.base import TextEnv
from envs.hosting.host import HostSettings, InProcessEnv
from envs.tools.tool import ToolRefused
from rollout.agents.agent import Agent
from rollout.agents.settings import PartSettings, wrapped
from rollout.agents.tools import ServerSettings, ToolsSettings
from rollout.chat.chat import Chat
from rollout.engines.engine import Sampling
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec, run_episode
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.recorder import Recorder
from rollout.episodes.resume import restore_environment
from rollout.episodes.rollout_metrics import RecordingListener, RolloutMetrics
from rollout.wire.trajectory import PartialEpisode, Slot, Task, Trajectory
from tests.rollout.fake_replay_buffer import FakeReplayBuffer

CALCULATOR = ToolsSettings(functions=("envs.builtin.assistant_data:calculate",), style="plain")
SUMS = ["3 + 4", "12 * 12", "99 - 100", "2 * (3 + 4)", "7 / 2", "81 + 19", "5 * 5 * 5", "1 - 1"]


class Sum(TextEnv):
    """Asks for the value of a sum."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Any]:
        self.asked = SUMS[(seed or 0) % len(SUMS)]
        return f"what is {self.asked}?", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        right = action == f"{eval(self.asked):g}"
        return "", float(right), True, False, {"success": right}


def asker(prompt: str, rng: Random) -> str:
    """Says what it was told last, if that is a number, and asks the calculator otherwise."""
    del rng
    heard = prompt.rsplit("<|user|>", 1)[-1].removesuffix("<|assistant|>")
    return f"calculate({heard[8:-1]})" if heard.startswith("what is ") else heard


def played(chat: Chat, tokenizer: PreTrainedTokenizerFast, seed: int, parts: list[Any]) -> Trajectory:
    agent = Agent(ScriptedEngine(tokenizer, asker), chat, Sampling(max_tokens=64), 512)
    place = EpisodeSpec(Slot(seed, 0, Task.of("sum", seed), 0), index=0, seed=seed)
    return asyncio.run(run_episode(InProcessEnv(wrapped(Sum, parts)), agent, place, EpisodeLimits(8, 30.0)))


def test_a_policy_that_cannot_calculate_succeeds_with_a_calculator(
    chat: Chat, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert [played(chat, tokenizer, seed, [CALCULATOR]).success for seed in range(8)] == [True] * 8
    assert [played(chat, tokenizer, seed, []).success for seed in range(8)] == [False] * 8


def test_calls_are_turns_that_are_stored_and_played_again(
    chat: Chat, tokenizer: PreTrainedTokenizerFast
) -> None:
    trajectory = played(chat, tokenizer, 1, [CALCULATOR])
    assert [step.action for step in trajectory.turns] == ["calculate(12 * 12)", "144"]
    assert [step.reward for step in trajectory.turns] == [0.0, 1.0]
    opening = tokenizer.decode(trajectory.turns[0].prompt_ids)
    assert opening == "<|system|>calculate(expression)\n<|user|>what is 12 * 12?<|assistant|>"
    replica = InProcessEnv(wrapped(Sum, [CALCULATOR]))
    resume_from = PartialEpisode(trajectory.turns[:1], end=None, snapshot=None)
    standing = asyncio.run(restore_environment(replica, trajectory.task, resume_from))
    assert standing.observation == json.loads(trajectory.turns[1].observation)


def test_a_worker_counts_calls_by_what_became_of_them(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> None:
    def careless(prompt: str, rng: Random) -> str:
        return asker(prompt, rng) if "no tool" in prompt else "calculat(1)\ncalculate(1, 2)"

    metrics = RolloutMetrics()
    agent = Agent(ScriptedEngine(tokenizer, careless), chat, Sampling(max_tokens=64), 512)
    place = EpisodeSpec(Slot(0, 0, Task.of("sum", 0), 0), index=0, seed=0)
    replica = InProcessEnv(wrapped(Sum, [CALCULATOR]))
    asyncio.run(
        run_episode(
            replica,
            agent,
            place,
            EpisodeLimits(8, 30.0),
            RecordingListener(metrics, Recorder(FakeReplayBuffer([]), "")),
        )
    )
    counted = {name: count for name, count in metrics.row().items() if name.startswith("tools_") and count}
    assert counted == {"tools_unknown_tool": 1, "tools_wrong_arguments": 1}


def test_tools_go_with_an_environment_into_its_process() -> None:
    async def called() -> Any:
        pool = EnvironmentPool(host=HostSettings(where="process"), parts=[CALCULATOR])
        task = Task.of("frozen_lake", 0)
        replica = await pool.take(task)
        try:
            await replica.reset(0)
            return await replica.step("calculate(2 + 3)")
        finally:
            await pool.discard(task, replica)

    said, reward, terminated, truncated, _ = asyncio.run(called())
    assert said == [{"role": "tool", "name": "calculate", "content": "5"}]
    assert (reward, terminated, truncated) == (0.0, False, False)


def test_a_recipe_names_functions_and_servers() -> None:
    part = TypeAdapter(PartSettings).validate_python(
        {
            "kind": "tools",
            "functions": ["envs.builtin.assistant_data:search", "envs.builtin.assistant_data:calculate"],
            "servers": [{"command": "python", "args": ["server.py"]}],
        }
    )
    assert isinstance(part, ToolsSettings) and part.servers == (
        ServerSettings(command="python", args=("server.py",)),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"functions": ["search"]},
        {"functions": [":search"]},
        {"style": "xml"},
        {"max_calls": -1},
        {"servers": [{}]},
    ],
)
def test_tools_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(PartSettings).validate_python({"kind": "tools"} | options)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (ToolsSettings(functions=("envs.builtin.assistant_data:serch",)), "has no function 'serch'"),
        (ToolsSettings(functions=("no_such_module:search",)), "no_such_module"),
        (ToolsSettings(servers=(ServerSettings(command="no-such-command"),)), "no command"),
    ],
)
def test_tools_that_are_not_there_are_refused_in_one_line(part: ToolsSettings, says: str) -> None:
    with pytest.raises(ToolRefused, match=says) as refused:
        wrapped(Sum, [part])
    assert "\n" not in str(refused.value)


def test_servers_are_closed_where_a_tool_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    class Server:
        tools = ()
        repeatable = True

        def close(self) -> None:
            closed.append("closed")

    monkeypatch.setattr(ServerSettings, "start", lambda self: Server())
    part = ToolsSettings(functions=("no_such_module:x",), servers=(ServerSettings(command=sys.executable),))
    with pytest.raises(ToolRefused):
        wrapped(Sum, [part])
    assert closed == ["closed"]
    wrapped(Sum, [part.model_copy(update={"functions": ()})])
    assert closed == ["closed"], "an environment closes its own"
