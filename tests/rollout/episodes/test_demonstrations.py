"""Demonstrations are trajectories like any other, written by a player."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rollout.chat.chat import Chat
from rollout.episodes.demonstrations import DemonstrationError, demonstrate
from rollout.episodes.pool import EnvironmentPool
from rollout.wire.schema import decode, encode
from rollout.wire.trajectory import EndReason, Task

TASKS = [Task.of("count", seed) for seed in (4, 5)]


class Player:
    """Says "right" where it reads an even seed, else "left"; remembers what it read."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.read: list[Any] = []

    def act(self, observation: Any) -> str:
        self.read.append(observation)
        return "right" if self.seed % 2 == 0 else "left"


def test_a_players_words_become_tokens_and_rewards(chat: Chat, orders: Any) -> None:
    players: list[Player] = []

    def factory(seed: int) -> Player:
        players.append(Player(seed))
        return players[-1]

    groups = asyncio.run(demonstrate(TASKS, factory, chat, 512, pool=EnvironmentPool(orders.make)))
    assert [group.trajectories[0].reward for group in groups] == [3.0, 0.0]
    assert players[0].read == ["seed 4", "turn 1 heard right", "turn 2 heard right"]
    for group, word in zip(groups, ("right", "left"), strict=True):
        (trajectory,) = decode(encode(group)).trajectories
        assert trajectory.end_reason is EndReason.TERMINATED
        for step in trajectory.turns:
            assert tuple(step.action_ids) == chat.encode_action(word)
            assert not step.behavior_logprobs.any()
            assert not step.versions.any()


def test_when_no_demonstration_succeeds_the_reason_is_said(chat: Chat, orders: Any) -> None:
    orders.reset_error = lambda seed: RuntimeError("no map")
    with pytest.raises(DemonstrationError, match="no map"):
        asyncio.run(demonstrate(TASKS, Player, chat, 512, pool=EnvironmentPool(orders.make)))
