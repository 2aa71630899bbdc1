"""What every environment promises, ours and adapted ones alike."""

from __future__ import annotations

import pickle
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import registry
from envs.registry import EnvironmentUnknown

ADAPTED = ["FrozenLake-v1", "CliffWalking-v1", "Taxi-v4", "Blackjack-v1"]
EVERY = [*registry.registered(), *ADAPTED]
ACTIONS = {
    "frozen_lake": ("left", "down", "right", "up"),
    "household": ("go hall", "go kitchen", "turn on light", "turn off light", "open window", "take cup"),
    "memory_corridor": ("walk", "walk", "walk", "red", "two"),
    "Blackjack-v1": ("0", "1"),
}


def play(env: Any, env_id: str, seed: int, turns: int = 30) -> list[Any]:
    """A random player's whole record; the player's choices depend on the seed alone."""
    choices = random.Random(seed)
    record: list[Any] = [env.reset(seed=seed)[0]]
    for _ in range(turns):
        step = env.step(choices.choice(ACTIONS.get(env_id, ("0", "1", "2", "3"))))
        record.append(step[:4])
        assert not (step[2] and step[3]), "terminated is not truncated"
        assert -100 <= step[1] <= 100
        if step[2] or step[3]:
            break
    return record


@pytest.mark.parametrize("env_id", EVERY)
@pytest.mark.filterwarnings("ignore")
def test_gymnasiums_own_checker_is_content(env_id: str) -> None:
    check_env(registry.make(env_id), skip_render_check=True)


@pytest.mark.parametrize("env_id", EVERY)
def test_a_seed_fixes_the_instance_in_every_replica(env_id: str) -> None:
    first, second = registry.make(env_id), registry.make(env_id)
    for seed in (0, 1, 2**31 - 1):
        assert play(first, env_id, seed) == play(second, env_id, seed)


@pytest.mark.parametrize("env_id", EVERY)
def test_replicas_share_nothing_and_leave_the_global_generators_alone(env_id: str) -> None:
    alone, disturbed, other = (registry.make(env_id) for _ in range(3))
    expected = play(alone, env_id, 7)
    random.seed(0)
    np.random.seed(0)
    before = (random.getstate(), np.random.get_state()[1].tolist())
    disturbed.reset(seed=7)
    play(other, env_id, 8)
    assert play(disturbed, env_id, 7) == expected
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("env_id", EVERY)
@pytest.mark.parametrize(
    "action", ["", "jump", "1.5", "left and right", "1_0", "\u0661", "9" * 30, "9" * 5000]
)
def test_an_action_that_cannot_be_read_ends_the_episode_and_says_so(env_id: str, action: str) -> None:
    env = registry.make(env_id)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated, info["malformed"]) == (0.0, True, False, True)


@pytest.mark.parametrize("env_id", EVERY)
def test_a_replica_can_be_made_in_another_process(env_id: str) -> None:
    make = pickle.loads(pickle.dumps(partial(registry.make, env_id)))
    assert isinstance(make().reset(seed=0)[0], str)


def test_a_time_limit_truncates() -> None:
    env = registry.make("FrozenLake-v1", max_episode_steps=3, is_slippery=False)
    env.reset(seed=0)
    assert [env.step("0")[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]


@pytest.mark.parametrize(
    ("env_id", "options", "says"),
    [
        ("frozen_lak", {}, "did you mean frozen_lake"),
        ("CartPole-v1", {}, "Box"),
        ("frozen_lake", {"sise": 4}, "its options: size"),
        ("frozen_lake", {"size": 1}, "use 2 or more"),
        ("frozen_lake", {"size": "4"}, "frozen_lake"),
        ("frozen_lake", {"max_turns": 0}, "use 1 or more"),
        ("FrozenLake-v1", {"sise": 4}, "sise.*its options: .*is_slippery"),
        ("FrozenLake-v1", {"map_name": "9x9"}, "9x9"),
        ("no_such_module:Lake-v0", {}, "no_such_module"),
        ("Taxi-v3", {}, "Taxi-v4"),
    ],
)
def test_a_wrong_environment_is_refused_in_one_line(env_id: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(EnvironmentUnknown, match=says) as refused:
        registry.make(env_id, **options)
    assert "\n" not in str(refused.value)


def test_an_environment_of_ones_own_is_made_by_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_OURS", dict(registry._OURS))
    registry.register("guess", lambda **options: registry.make("Blackjack-v1", **options))
    assert "guess" in registry.registered()
    assert registry.make("guess", sab=True).reset(seed=1)[0] == registry.make("Blackjack-v1").reset(seed=1)[0]


def test_an_environment_without_a_verdict_is_given_none() -> None:
    env = registry.make("FrozenLake-v1")
    env.reset(seed=0)
    assert "success" not in env.step("jump")[4]
