"""Costs travel beside rewards, from an environment or a reward function to the rows, and never into the reward."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from envs.base import TextEnv, named_costs
from envs.datasets.dataset import Dataset
from envs.hosting.host import HostSettings, InProcessEnv
from rollout.agents.agent import Agent
from rollout.chat.chat import Chat
from rollout.engines.engine import Sampling
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec, run_episode
from rollout.episodes.evaluation import evaluation_row
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.reward import OwnReward
from rollout.wire.schema import decode, encode
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory
from tests.rollout.scripted import played


class Toll(TextEnv):
    """Pays 1 a turn for three turns; the first and the last cost what `costs` says."""

    def __init__(self, *costs: Any) -> None:
        self.costs = costs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Any]:
        self.turn = 0
        return "go", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        info = {} if self.turn == 2 else {"costs": self.costs[self.turn // 3], "rewards": {"fare": 1.0}}
        return "on", 1.0, self.turn == 3, False, info


def go(prompt: str, rng: Random) -> str:
    return "go"


def words(episode: Trajectory) -> dict[str, Any]:
    """A reward of a user's own."""
    return {"said": 2.0, "costs": {"words": len(episode.turns), "toll": 7}}


def test_costs_of_turns_are_stored_beside_the_rewards(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> None:
    episode = played(chat, tokenizer, go, Toll({"toll": 0.5}, {"toll": 2, "dirt": 1}), 0)
    (stored,) = decode(encode(Group(Slot(0, 0, Task.of("code", 0), 0), (episode,)))).trajectories
    assert stored.costs == {"toll": [0.5, 0.0, 2.0], "dirt": [0.0, 0.0, 1.0]}
    assert stored.named_rewards == {"fare": 2.0} and stored.reward == 3.0
    assert evaluation_row(stored).costs == {"toll": 2.5, "dirt": 1.0}


def test_a_reward_function_may_say_costs_and_leaves_the_environments(
    chat: Chat, tokenizer: PreTrainedTokenizerFast
) -> None:
    episode = played(chat, tokenizer, go, Toll({"toll": 1}, {"dirt": 1}), 0)
    paid = OwnReward(kind=f"{__name__}:words")(episode)
    assert paid.reward == 2.0 and paid.named_rewards == {"said": 2.0}
    assert paid.costs == {"toll": [1.0, 0.0, 7.0], "dirt": [0.0, 0.0, 1.0], "words": [0.0, 0.0, 3.0]}


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ({"toll": -1.0}, "the cost toll is -1.0; a cost must be a finite number of 0 or more"),
        ({"toll": float("inf")}, "the cost toll is inf"),
        (["toll"], "must be a dict, name -> number"),
    ],
)
def test_what_is_no_cost_fails_the_episode(
    costs: Any, said: str, chat: Chat, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises((TypeError, ValueError), match=said.partition(";")[0]):
        named_costs({"costs": costs})
    agent = Agent(ScriptedEngine(tokenizer, go), chat, Sampling(max_tokens=8), 512)
    place = EpisodeSpec(Slot(0, 0, Task.of("toll", 0), 0), index=0, seed=0)
    episode = asyncio.run(run_episode(InProcessEnv(Toll(costs)), agent, place, EpisodeLimits(4, 60.0)))
    assert episode.end_reason is EndReason.FAILED and said in (episode.error or "")


def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "two and two", "answer": "4"}) + "\n")
    return str(file)


def length(completion: str, row: dict[str, Any]) -> float:
    """A reward of a user's own: how long an answer is."""
    return float(len(completion))


LENGTH = {"kind": f"{__name__}:length", "cost": True}


def test_a_reward_of_a_recipe_may_be_a_cost(tmp_path: Path) -> None:
    env = Dataset(rows(tmp_path), ["number", LENGTH])
    assert env.reward_range == (0.0, 1.0)
    env.reset(seed=0)
    _, reward, _, _, info = env.step("it is 4")
    assert (reward, info["rewards"], info["costs"]) == (1.0, {"number": 1.0}, {"length": 7.0})
    with pytest.raises(ValueError, match="is a cost, which has no weight"):
        Dataset(rows(tmp_path), ["number", LENGTH | {"weight": 2}])
    with pytest.raises(ValueError, match="the first reward says whether the answer is right"):
        Dataset(rows(tmp_path), [LENGTH, "number"])


def test_costs_come_out_of_an_environments_own_process(tmp_path: Path) -> None:
    async def stepped() -> Any:
        options = {"path": rows(tmp_path), "rewards": ["number", LENGTH]}
        pool = EnvironmentPool(host=HostSettings(where="process"))
        task = Task.of("dataset", 0, options)
        replica = await pool.take(task)
        try:
            await replica.reset(0)
            return await replica.step("4")
        finally:
            await pool.discard(task, replica)

    assert asyncio.run(stepped())[-1]["costs"] == {"length": 1.0}
