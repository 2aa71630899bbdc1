"""Environments that can be played on this machine, and a checked episode of a scripted player."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from envs import registry
from envs.registry import Env, Player
from envs.sandbox import sandbox


def here() -> list[str]:
    """The registered ids for which this machine has what they need: files, a sandbox, a package of an extra."""
    there = {
        "programming": sandbox.refusal() is None,
        "chess": find_spec("chess") is not None,
        "dataset": False,  # needs files, see tests/envs/datasets
        "browser": find_spec("playwright") is not None and shutil.which("chromium") is not None,
    }
    return [env_id for env_id in registry.registered() if there.get(env_id, True)]


@dataclass(frozen=True)
class Episode:
    reward: float
    turns: int
    success: bool
    truncated: bool
    observations: list[str]
    actions: list[str]

    @property
    def words(self) -> set[str]:
        """Every lower-case word of at least two letters in observations and actions."""
        text = "\n".join([*self.observations, *self.actions])
        return set(re.findall("(?<![A-Za-z])[a-z]{2,}(?![A-Za-z])", text))


def played(env: Env, player: Player, seed: int) -> Episode:
    observations: list[Any] = [env.reset(seed=seed)[0]]
    actions: list[str] = []
    total, done = 0.0, False
    while not done:
        actions.append(player.act(observations[-1]))
        observation, reward, terminated, truncated, info = env.step(actions[-1])
        observations.append(observation)
        total += reward
        done = terminated or truncated
        assert not (terminated and truncated)
        assert ("success" in info) == done, "the verdict is said with the last step and only then"
        assert reward == 0.0 or terminated, "only a final state is paid"
        assert "malformed" not in info, "a player speaks the grammar, whatever it errs in"
        assert observation in env.observation_space and actions[-1] in env.action_space
    assert 0.0 <= total <= 1.0
    return Episode(total, len(actions), info["success"], truncated, observations, actions)
