"""An episode ends for exactly one reason, and what broke it costs nothing but itself."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from envs.hosting.host import InProcessEnv
from rollout.agents.agent import Agent
from rollout.engines.engine import Completion, EngineFailed
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec, run_episode
from rollout.wire.trajectory import EndReason, Slot, Task, Trajectory

PLACE = EpisodeSpec(Slot(5, 2, Task.of("count", 7), 0), index=3, seed=11, worker="w")
LIMITS = EpisodeLimits(max_turns=10, timeout_seconds=30.0)
AgentOf = Callable[..., Agent]


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast) -> ScriptedEngine:
    return ScriptedEngine(tokenizer, lambda prompt, rng: rng.choice(["left", "right"]), version=4)


def played(env: Any, agent: Agent, limits: EpisodeLimits = LIMITS) -> Trajectory:
    return asyncio.run(run_episode(InProcessEnv(env), agent, PLACE, limits))


def test_the_record_is_what_environment_and_engine_said(
    orders: Any, agent_of: AgentOf, engine: ScriptedEngine
) -> None:
    orders.info = {"success": True}
    trajectory = played(orders.make("count"), agent_of(engine))
    assert (trajectory.group_id, trajectory.attempt, trajectory.index, trajectory.worker) == (5, 2, 3, "w")
    assert trajectory.end_reason is EndReason.TERMINATED
    assert trajectory.success is True
    heard = [step.action for step in trajectory.turns]
    seen = [json.loads(step.observation)[0]["content"] for step in trajectory.turns]
    assert seen == ["seed 7", f"turn 1 heard {heard[0]}", f"turn 2 heard {heard[1]}"]
    assert [step.reward for step in trajectory.turns] == [float(action == "right") for action in heard]
    assert [step.turn for step in trajectory.turns] == [0, 1, 2]


def test_trained_ids_are_the_engines_ids(orders: Any, agent_of: AgentOf, engine: ScriptedEngine) -> None:
    steps = played(orders.make("count"), agent_of(engine)).turns
    history: list[int] = []
    for step, request in zip(steps, engine.requests, strict=True):
        assert (*history, *step.prompt_ids.tolist()) == request.prompt_ids
        np.testing.assert_array_equal(step.action_ids, request.completion.token_ids)
        np.testing.assert_array_equal(step.behavior_logprobs, request.completion.logprobs)
        assert step.versions.tolist() == [4] * len(step.action_ids)
        history = [*request.prompt_ids, *step.action_ids.tolist()]
    assert {step.prompt_ids.dtype for step in steps} == {np.dtype(np.int32)}


class RoutedEngine(ScriptedEngine):
    """Says of every token but the last its place in the context, and which request computed it."""

    async def generate(self, prompt_ids: Any, *given: Any) -> Completion:
        completion = await super().generate(prompt_ids, *given)
        tokens = len(prompt_ids) + len(completion.token_ids) - 1
        told = np.stack([np.arange(tokens), np.full(tokens, len(self.requests))], 1).astype(np.uint8)
        return replace(completion, routed_experts=told)


@pytest.mark.parametrize("memory", ["full", "last"])
def test_each_token_has_the_experts_of_the_one_before_it_as_they_were_when_it_was_sampled(
    orders: Any, agent_of: AgentOf, tokenizer: PreTrainedTokenizerFast, memory: str
) -> None:
    engine = RoutedEngine(tokenizer, lambda prompt, rng: rng.choice(["left", "right"]))
    turns = played(orders.make("count"), agent_of(engine, memory=memory)).turns
    expected: list[list[int]] = []
    for turn in turns:
        begins = turn.turn == 0 or memory == "last"  # the turn's first token is the segment's
        first = 0 if begins else len(expected)
        number = turn.turn + 1
        tokens = range(first, first + len(turn.prompt_ids) + len(turn.action_ids))
        rows = [[place - 1, number] if place else [0, 0] for place in tokens]
        assert turn.routed_experts is not None
        assert turn.routed_experts.tolist() == rows
        expected += rows
    assert len(turns) == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, EndReason.TERMINATED),
        ({"truncates": True}, EndReason.TRUNCATED),
        ({"info": {"malformed": True}}, EndReason.MALFORMED),
        ({"info": {"malformed": True}, "truncates": True}, EndReason.MALFORMED),
        ({"length": 99}, EndReason.TRUNCATED),  # by the runner's max_turns
    ],
)
def test_end_reasons(
    orders: Any, agent_of: AgentOf, engine: ScriptedEngine, changes: dict[str, Any], reason: EndReason
) -> None:
    for name, value in changes.items():
        setattr(orders, name, value)
    trajectory = played(orders.make("count"), agent_of(engine))
    assert trajectory.end_reason is reason
    assert len(trajectory.turns) == min(orders.length, LIMITS.max_turns)
    assert trajectory.trainable


def test_a_turn_is_shortened_to_the_room_left_and_then_there_is_none(
    orders: Any, agent_of: AgentOf, tokenizer: PreTrainedTokenizerFast
) -> None:
    orders.length = 99
    engine = ScriptedEngine(tokenizer, lambda prompt, rng: "x" * 40)
    trajectory = played(
        orders.make("count"), agent_of(engine, max_tokens=30, context_tokens=100, min_new_tokens=5)
    )
    assert trajectory.end_reason is EndReason.CONTEXT_OVERFLOW
    used = sum(len(step.prompt_ids) + len(step.action_ids) for step in trajectory.turns)
    rooms = [100 - len(request.prompt_ids) for request in engine.requests]
    assert [request.sampling.max_tokens for request in engine.requests] == [min(30, room) for room in rooms]
    assert rooms[-1] < 30, "the last turn was shortened"
    assert used == 100
    assert [step.finish_reason for step in trajectory.turns] == ["length", "length"]


def test_a_first_prompt_that_does_not_fit_names_both_lengths(
    orders: Any, agent_of: AgentOf, engine: ScriptedEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    trajectory = played(orders.make("count"), agent_of(engine, context_tokens=4))
    length = len(tokenizer.encode("<|user|>seed 7<|assistant|>", add_special_tokens=False))
    assert trajectory.end_reason is EndReason.FAILED
    assert trajectory.error is not None
    assert f"{length} tokens" in trajectory.error
    assert "context_tokens=4" in trajectory.error


def test_an_environment_that_raises_leaves_its_traceback_and_the_steps_so_far(
    orders: Any, agent_of: AgentOf, engine: ScriptedEngine
) -> None:
    orders.step_error = lambda seed, turn: ZeroDivisionError("no such tile") if turn == 1 else None
    trajectory = played(orders.make("count"), agent_of(engine))
    assert trajectory.end_reason is EndReason.FAILED
    assert not trajectory.trainable
    assert [step.turn for step in trajectory.turns] == [0, 1], "the action that broke it is kept"
    assert trajectory.error is not None
    assert "ZeroDivisionError: no such tile" in trajectory.error
    assert "conftest.py" in trajectory.error, "the place in the environment's own code"


def test_an_observation_that_is_not_text_is_the_environments_failure(
    orders: Any, agent_of: AgentOf, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = orders.make("count")
    monkeypatch.setattr(env, "reset", lambda seed: (np.zeros(3), {}))
    trajectory = played(env, agent_of(engine))
    assert trajectory.end_reason is EndReason.FAILED
    assert trajectory.error is not None
    assert "ndarray" in trajectory.error


@pytest.mark.parametrize(
    ("reward", "info"),
    [(float("nan"), {}), (float("-inf"), {}), (1e300, {}), (1.0, {"rewards": {"goal": float("nan")}})],
)
def test_a_reward_that_is_no_number_is_the_environments_failure(
    orders: Any, agent_of: AgentOf, engine: ScriptedEngine, reward: float, info: dict[str, Any]
) -> None:
    orders.reward = lambda seed, turn: reward if turn == 2 else 0.5
    orders.info = info
    trajectory = played(orders.make("count"), agent_of(engine))
    assert trajectory.end_reason is EndReason.FAILED
    assert [step.reward for step in trajectory.turns] == [0.5, 0.5, 0.0], "what broke it has earned nothing"
    assert trajectory.error is not None
    assert re.search(r"failed in step 2: .*(the reward|goal) is .*finite float32", trajectory.error)


@pytest.mark.parametrize(("reward", "info"), [("1", {}), (1.0, {"rewards": {"goal": "1"}})])
def test_a_reward_that_is_text_is_the_environments_failure(
    orders: Any, agent_of: AgentOf, engine: ScriptedEngine, reward: Any, info: dict[str, Any]
) -> None:
    orders.reward, orders.info = lambda seed, turn: reward, info
    trajectory = played(orders.make("count"), agent_of(engine))
    assert trajectory.end_reason is EndReason.FAILED
    assert re.search(r"the reward( goal)? is the text '1'; give a number", trajectory.error or "")


def test_an_engine_that_fails_costs_the_episode(
    orders: Any, agent_of: AgentOf, engine: ScriptedEngine
) -> None:
    async def refuse() -> None:
        raise EngineFailed("engine: out of memory")

    engine._latency = refuse
    trajectory = played(orders.make("count"), agent_of(engine))
    assert trajectory.end_reason is EndReason.FAILED
    assert trajectory.error is not None
    assert "out of memory" in trajectory.error


def test_a_mistake_of_ours_is_no_failed_episode(
    orders: Any, agent_of: AgentOf, engine: ScriptedEngine
) -> None:
    async def misspelt() -> None:
        raise NameError("modle")

    engine._latency = misspelt
    with pytest.raises(NameError):
        played(orders.make("count"), agent_of(engine))


def test_an_episode_over_its_time_fails_and_says_how_far_it_got(
    orders: Any, agent_of: AgentOf, engine: ScriptedEngine
) -> None:
    async def forever() -> None:
        if engine.requests:
            await asyncio.Event().wait()

    engine._latency = forever
    trajectory = played(
        orders.make("count"), agent_of(engine), EpisodeLimits(max_turns=10, timeout_seconds=0.05)
    )
    assert trajectory.end_reason is EndReason.FAILED
    assert trajectory.error is not None
    assert "longer than 0.05 s" in trajectory.error
    assert "1 turns" in trajectory.error


def test_cancellation_is_not_an_end_reason(orders: Any, agent_of: AgentOf, engine: ScriptedEngine) -> None:
    async def run() -> None:
        asked = asyncio.Event()

        async def forever() -> None:
            asked.set()
            await asyncio.Event().wait()

        engine._latency = forever
        episode = asyncio.create_task(
            run_episode(InProcessEnv(orders.make("count")), agent_of(engine), PLACE, LIMITS)
        )
        await asked.wait()
        episode.cancel()
        await episode

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
