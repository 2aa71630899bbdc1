"""A reward of a user's own is paid once, with the last turn; one that fails costs its episode and is no reward."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from envs.hosting.host import HostSettings
from rollout.agents.agent import Agent
from rollout.chat.chat import Chat
from rollout.engines.engine import Sampling
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec
from rollout.episodes.group import play
from rollout.episodes.pool import EnvironmentPool, Hosting
from rollout.episodes.reward import OwnReward
from rollout.wire.trajectory import EndReason, PartialEpisode, Slot, Task, Trajectory, TurnEnd

SEED = 9
TASK = Task.of("frozen_lake", SEED, {"size": 3})


@pytest.fixture
def agent(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> Agent:
    engine = ScriptedEngine(tokenizer, lambda prompt, rng: rng.choice(["left", "right", "down"]))
    return Agent(engine, chat, Sampling(max_tokens=8), 4096)


def paid(
    agent: Agent, reward: dict[str, Any] | None, resume_from: PartialEpisode | None = None
) -> Trajectory:
    own = None if reward is None else OwnReward.model_validate(reward)
    return played(agent, EnvironmentPool(host=HostSettings(), reward=own), TASK, resume_from)


def played(
    agent: Agent, pool: EnvironmentPool, task: Task, resume_from: PartialEpisode | None = None
) -> Trajectory:
    async def run() -> Trajectory:
        try:
            place = EpisodeSpec(Slot(0, 0, task, 0), 0, seed=1)
            return await play(place, pool, agent, EpisodeLimits(4, 60.0), resume_from=resume_from)
        finally:
            await pool.close()

    return asyncio.run(run())


def rewards(episode: Trajectory) -> list[float]:
    return [step.reward for step in episode.turns]


def test_it_stands_in_place_of_the_environments_or_is_added_to_it(agent: Agent) -> None:
    plain = paid(agent, None)
    own = {"kind": "tests.own_parts:success", "bonus": 0.5}
    value = float(bool(plain.success)) + 0.5
    replaced, added = paid(agent, own), paid(agent, own | {"mode": "add"})
    assert rewards(replaced) == [0.0] * (len(plain.turns) - 1) + [value]
    assert rewards(added) == [*rewards(plain)[:-1], rewards(plain)[-1] + value]
    assert [step.action for step in replaced.turns] == [step.action for step in plain.turns]


def test_named_numbers_are_summed_and_kept_by_name(agent: Agent) -> None:
    episode = paid(agent, {"kind": "tests.own_parts:by_name"})
    turns = len(episode.turns)
    assert episode.named_rewards == {"turns": -turns, "seed": SEED}
    assert episode.reward == SEED - turns


def test_one_environment_may_have_a_reward_of_its_own(agent: Agent) -> None:
    hosting = {TASK.environment: Hosting(reward=OwnReward(kind="tests.own_parts:thoughtful"))}
    other = Task.of("frozen_lake", SEED, {"size": 4})
    assert played(agent, EnvironmentPool(hosting=hosting), TASK).reward == 0.25
    assert rewards(played(agent, EnvironmentPool(hosting=hosting), other)) == rewards(
        played(agent, EnvironmentPool(), other)
    )


def test_a_coroutine_function_may_pay(agent: Agent) -> None:
    assert paid(agent, {"kind": "tests.own_parts:thoughtful"}).reward == 0.25


def test_an_episode_that_an_earlier_attempt_ended_is_paid_alike(agent: Agent) -> None:
    plain = paid(agent, None)
    resume_from = PartialEpisode(plain.turns, TurnEnd(plain.end_reason, plain.success), None)
    own = {"kind": "tests.own_parts:by_name"}
    assert rewards(paid(agent, own, resume_from)) == rewards(paid(agent, own))


def test_a_reward_that_fails_costs_its_episode_and_names_its_line(agent: Agent) -> None:
    episode = paid(agent, {"kind": "tests.own_parts:unpayable"})
    assert episode.end_reason is EndReason.FAILED and not episode.trainable
    assert episode.error is not None
    said = "the reward tests.own_parts:unpayable failed: KeyError('no judge') (tests/own_parts.py:"
    assert f"frozen_lake (seed {SEED}): {said}" in episode.error
