"""Foreign agents over real HTTP, with the real client: every call is recorded as it was sampled, and kept apart."""

from __future__ import annotations

import asyncio
import json
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from envs.hosting.host import HostSettings
from rollout.agents.agent import Agent
from rollout.chat.chat import Chat
from rollout.engines.engine import Sampling
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec
from rollout.episodes.group import concurrently, play
from rollout.episodes.pool import EnvironmentPool
from rollout.external.endpoint import Endpoint
from rollout.external.openai_format import ChatReply, read
from rollout.external.session import Session
from rollout.wire.trajectory import EndReason, Slot, Task, Trajectory
from tests.rollout import callers

LIMITS = EpisodeLimits(max_turns=20, timeout_seconds=60.0)
HOST = HostSettings(reset_seconds=30.0, step_seconds=30.0)
MOVES = ["extend", "parts", "shorten", "edit", "again", "anew"]


def task_of(function: str, seed: int = 1, options: dict[str, Any] | None = None, **task: Any) -> Task:
    return Task.of(
        "program", seed, {"function": f"tests.rollout.callers:{function}", "task": task} | (options or {})
    )


def played(
    agent: Agent, *tasks: Task, host: HostSettings = HOST, limits: EpisodeLimits = LIMITS
) -> list[Trajectory]:
    """The tasks' episodes, all at once."""

    async def run() -> list[Trajectory]:
        pool = EnvironmentPool(host=host, chat=agent.chat)
        try:
            places = [EpisodeSpec(Slot(place, 0, task, 0), 0, seed=place) for place, task in enumerate(tasks)]
            return await concurrently(play(place, pool, agent, limits) for place in places)
        finally:
            await pool.close()
            assert not list(pool._all_idle()), "a program is for one episode"

    return asyncio.run(run())


Scripted = Callable[..., tuple[ScriptedEngine, Agent]]


@pytest.fixture(scope="module")
def scripted(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> Scripted:
    def make(*said: str, latency: Any = None, max_tokens: int = 200) -> tuple[ScriptedEngine, Agent]:
        turns = iter(said)
        words = ["left", "right", "turn 1"]
        engine = ScriptedEngine(
            tokenizer,
            (lambda prompt, rng: next(turns)) if said else (lambda prompt, rng: rng.choice(words)),
            latency=latency,
        )
        return engine, Agent(engine, chat, Sampling(max_tokens=max_tokens), 4096)

    return make


def contexts(trajectory: Trajectory) -> list[list[int]]:
    """What the policy had before each turn, put together from the stored rows alone."""
    segments: dict[int, list[int]] = {}
    before = []
    for step in trajectory.turns:
        ids = segments.setdefault(step.segment, [])
        ids += step.prompt_ids.tolist()
        before.append(list(ids))
        ids += step.action_ids.tolist()
    return before


def flat(messages: Sequence[Any]) -> list[tuple[str, str]]:
    """Messages as a person reads them, whether dicts, parts or the client's own objects."""
    told = []
    for message in messages:
        each = message if isinstance(message, dict) else message.model_dump()
        content = each["content"]
        told.append((each["role"], content if isinstance(content, str) else content[0]["text"]))
    return told


@settings(max_examples=6)
@given(plans=st.lists(st.lists(st.sampled_from(MOVES), min_size=1, max_size=7), min_size=6, max_size=6))
def test_what_is_stored_is_what_the_program_asked_and_what_was_sampled(
    scripted: Scripted, chat: Chat, plans: list[list[str]]
) -> None:
    engine, agent = scripted()
    tasks = [task_of("planned", seed, plan=plan) for seed, plan in enumerate(plans)]
    trajectories = played(agent, *tasks)
    answers = [(r.prompt_ids, tuple(r.completion.token_ids.tolist())) for r in engine.requests]
    for seed, trajectory in enumerate(trajectories):
        assert trajectory.end_reason is EndReason.TERMINATED, trajectory.error
        assert trajectory.reward == 0.5
        told = callers.heard[seed]
        assert len(trajectory.turns) == len(told) == len(plans[seed])
        segment, before = -1, [("nobody", "")]
        for step, context, (messages, said, usage) in zip(
            trajectory.turns, contexts(trajectory), told, strict=True
        ):
            asked = flat(messages)
            # Rendered at once or by delta: the same tokens, where a template's histories are prefixes.
            whole = chat.opening([{"role": role, "content": content} for role, content in asked])
            assert context == list(whole)
            assert (tuple(context), tuple(step.action_ids.tolist())) in answers
            assert step.action == said == chat.text(step.action_ids.tolist())
            segment += asked[: len(before)] != before or len(asked) == len(before)
            assert step.segment == segment
            assert (usage.prompt_tokens, usage.completion_tokens) == (len(context), len(step.action_ids))
            before = [*asked, ("assistant", said)]


def test_calls_are_read_where_they_can_be_and_go_back_by_delta(scripted: Scripted) -> None:
    good = '<tool_call>{"name": "left", "arguments": {"turn": 7}}</tool_call>'
    bad = "right <tool_call>left</tool_call>"
    _, agent = scripted(f"{good}</think>turn {good}{good}", bad, "right")
    (trajectory,) = played(agent, task_of("tools", turns=3))
    first, second, third = callers.heard[1]
    assert first.finish_reason == "tool_calls"
    assert first.message.content == f"{good}</think>turn"
    calls = first.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("left", {"turn": 7})
    ] * 2
    assert calls[0].id != calls[1].id
    assert (second.finish_reason, second.message.content, second.message.tool_calls) == ("stop", bad, None)
    assert third.message.content == "right"
    assert [step.segment for step in trajectory.turns] == [0, 0, 0]
    observed = [json.loads(step.observation) for step in trajectory.turns]
    assert observed[0][0]["tools"][0]["function"]["name"] == "left"
    assert [(message["role"], message["content"]) for message in observed[1]] == [
        ("tool", '{"turn": 7}'),
        ("tool", '{"turn": 7}'),
        ("user", "turn"),
    ]
    assert flat(observed[2]) == [("user", "turn")]


def test_a_stream_says_what_was_sampled(scripted: Scripted) -> None:
    _, agent = scripted("left turn")
    (trajectory,) = played(agent, task_of("streaming"))
    *said, counted = callers.heard[1]
    choices = [chunk.choices[0] for chunk in said]
    assert "".join(choice.delta.content or "" for choice in choices) == "left turn"
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert counted.choices == []
    assert counted.usage.completion_tokens == len(trajectory.turns[0].action_ids)


def test_a_turn_cut_short_says_so(scripted: Scripted) -> None:
    _, agent = scripted("right right right", "right right right", max_tokens=3)
    (trajectory,) = played(agent, task_of("tools", turns=2, limits=[4, 2]))
    assert [choice.finish_reason for choice in callers.heard[1]] == ["length", "length"]
    assert [len(step.action_ids) for step in trajectory.turns] == [3, 2], (
        "a request may lower the recipe's limit"
    )


def test_requests_at_once_are_answered_in_order_each_with_its_own(scripted: Scripted) -> None:
    _, agent = scripted()
    (trajectory,) = played(agent, task_of("at_once"))
    assert [step.segment for step in trajectory.turns] == [0, 1]
    by_prompt = {flat(json.loads(step.observation))[0][1]: step.action for step in trajectory.turns}
    assert [by_prompt["turn 0"], by_prompt["turn 1"]] == callers.heard[1]
    assert (trajectory.reward, trajectory.success) == (1.0, True)
    assert trajectory.named_rewards == {"speed": 0.25, "truth": 0.75}


@pytest.mark.parametrize("end", ["terminated", "truncated", "malformed"])
def test_a_posted_reward_ends_the_episode(scripted: Scripted, end: str) -> None:
    _, agent = scripted()
    callers.gate.clear()
    body = {"reward": 0.75, "success": False, "end": end}
    (trajectory,) = played(agent, task_of("posting", body=body))
    assert (trajectory.end_reason, trajectory.reward, trajectory.success) == (EndReason(end), 0.75, False)
    assert len(trajectory.turns) == 1
    assert callers.gate.wait(callers.PATIENT)
    posted, late = callers.heard[1]
    assert posted["ended"]
    assert isinstance(
        late, openai.ConflictError | openai.APIConnectionError
    )  # the server may be gone by then


def test_a_function_of_the_run_may_judge(scripted: Scripted) -> None:
    _, agent = scripted("left")
    judged = {"reward": "tests.rollout.callers:judge"}
    (trajectory,) = played(agent, task_of("rewardless", 5, judged, level=2))
    assert trajectory.reward == 0.25
    task, messages, output = callers.heard[5]
    assert (task, output) == ({"level": 2, "seed": 5}, "")
    assert flat(messages) == [("user", "turn"), ("assistant", "left")]


@pytest.mark.parametrize("judge", ["judge_async", "judge_object", "judge_returned"])
def test_a_judge_that_is_asynchronous_is_awaited_however_it_is_written(
    scripted: Scripted, judge: str
) -> None:
    _, agent = scripted("left")
    (trajectory,) = played(agent, task_of("rewardless", options={"reward": f"tests.rollout.callers:{judge}"}))
    assert (trajectory.reward, trajectory.success) == (0.25, True), trajectory.error


def test_agents_that_are_asynchronous_are_awaited_and_one_that_blocks_holds_up_itself(
    scripted: Scripted,
) -> None:
    _, agent = scripted()
    host = HostSettings(reset_seconds=30.0, step_seconds=0.3)
    tasks = [task_of(name, seed) for seed, name in enumerate(("sleeper", "speaker", "speaker_object"))]
    blocked, *others = played(agent, *tasks, host=host)
    assert blocked.end_reason is EndReason.FAILED
    assert "did not ask again or end within 0.3 s" in (blocked.error or "")
    assert [trajectory.reward for trajectory in others] == [0.5, 0.5], [each.error for each in others]


def test_what_is_not_offered_is_refused_in_the_clients_own_errors(
    scripted: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    _, agent = scripted()
    (trajectory,) = played(agent, task_of("refused"))
    assert len(trajectory.turns) == 1, "nothing was sampled for a refused request"
    *errors, listed, found = callers.heard[1]
    assert [(type(error), said in str(error)) for error, said in zip(errors, (
        "belongs to no episode", "n=2", "logprobs", "at least one message", "images", "/v1/chat/completions",
        "a reward is", "cannot be forced", "'wizard'", "stop must be", "größer",
    ), strict=True)] == [
        (openai.AuthenticationError, True),
        (openai.BadRequestError, True),
        (openai.BadRequestError, True),
        (openai.BadRequestError, True),
        (openai.BadRequestError, True),
        (openai.NotFoundError, True),
        *[(openai.BadRequestError, True)] * 5,
    ]  # fmt: skip
    assert errors[0].code == "invalid_api_key"
    assert (listed, found) == ("policy", "policy")
    assert "option is ignored: chat_template_kwargs, temperature, top_k;" in caplog.text


def test_an_answer_ends_for_the_program_where_it_asks_for_it(scripted: Scripted) -> None:
    _, agent = scripted("left right turn heard", "left", "heard right heard")
    (trajectory,) = played(agent, task_of("stopping"))
    assert callers.heard[1] == [("left right", "stop"), ("left", "stop"), ("", "stop")]
    assert [step.action for step in trajectory.turns] == [
        "left right turn heard",
        "left",
        "heard right heard",
    ]
    assert [step.segment for step in trajectory.turns] == [0, 1, 1], (
        "the rest of an answer is nobody's history"
    )
    assert flat(json.loads(trajectory.turns[1].observation)) == [
        ("user", "turn"),
        ("assistant", "left right"),
        ("user", "turn"),
    ]


def test_a_client_that_lost_patience_gets_the_answer_that_was_sampled(scripted: Scripted) -> None:
    callers.gate.clear()

    async def until_the_client_is_gone() -> None:
        assert await asyncio.to_thread(callers.gate.wait, callers.PATIENT)

    engine, agent = scripted(latency=until_the_client_is_gone)
    (trajectory,) = played(agent, task_of("impatient"))
    assert len(trajectory.turns) == len(engine.requests) == 1
    assert callers.heard[1] == [trajectory.turns[0].action]


def test_whoever_asks_again_before_the_hang_up_is_known_gets_that_answer() -> None:
    asked, other = (read({"messages": [callers.user(text)]}) for text in ("turn", "left"))
    said = ChatReply({"role": "assistant", "content": "right"}, "stop", 1, 1)

    async def run() -> None:
        session = Session("key")
        lost = session.ask(asked)
        assert await session.next() is lost
        between, again, twin = (session.ask(each) for each in (other, asked, asked))
        lost.hung_up = True
        session.reply(lost, said)
        assert await again.answer is said
        assert await session.next() is between
        assert await session.next() is twin, "one asked again; the other wants an answer of its own"
        assert session.ask(asked) is not lost

    asyncio.run(run())


@pytest.mark.parametrize(
    ("function", "judge", "turns", "says"),
    [
        ("raising", "", 1, "no such tile') (tests/rollout/callers.py:166 in raising)"),
        ("silent", "", 0, "ended without a request"),
        ("rewardless", "", 1, "ended without a reward: post one"),
        (
            "rewardless",
            "wrong",
            1,
            "the reward function tests.rollout.callers:wrong raised ZeroDivisionError('no such tile') "
            "(tests/rollout/callers.py:183 in wrong)",
        ),
        ("rewardless", "judge_text", 1, "a reward is a finite number, or an object"),
        ("rewardless", "never", 1, "callers:never did not return within 0.2 s (env.options.reward_seconds)"),
    ],
)
def test_an_agent_that_fails_is_no_evidence(
    scripted: Scripted, function: str, judge: str, turns: int, says: str
) -> None:
    _, agent = scripted()
    options = {"reward": f"tests.rollout.callers:{judge}", "reward_seconds": 0.2} if judge else {}
    (trajectory,) = played(agent, task_of(function, options=options))
    assert trajectory.end_reason is EndReason.FAILED
    assert trajectory.error is not None
    assert says in trajectory.error
    assert len(trajectory.turns) == turns


def test_rows_hold_the_engines_logprobs_and_versions(scripted: Scripted) -> None:
    engine, agent = scripted()
    engine.version = 3
    (trajectory,) = played(agent, task_of("planned", plan=["extend", "extend"]))
    for step, request in zip(trajectory.turns, engine.requests, strict=True):
        np.testing.assert_array_equal(step.behavior_logprobs, request.completion.logprobs)
        assert set(step.versions.tolist()) == {3}


def test_the_endpoint_leaves_signals_alone_and_nothing_behind() -> None:
    def asked(url: str) -> int | None:
        try:
            urllib.request.urlopen(f"{url}/models", timeout=callers.PATIENT)
        except urllib.error.HTTPError as error:
            return error.code
        except urllib.error.URLError:
            return None
        raise AssertionError("there is no such key")

    async def run() -> list[int | None]:
        before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
        endpoint = Endpoint()
        codes = [await asyncio.to_thread(asked, endpoint.base_url)]
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
        await endpoint.close()
        return [*codes, await asyncio.to_thread(asked, endpoint.base_url)]

    assert asyncio.run(run()) == [401, None]
