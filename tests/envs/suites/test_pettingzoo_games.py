"""PettingZoo's games, played from one seat, against the package's own agent loop. Needs the extra pettingzoo."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("pettingzoo")
pytest.importorskip("pygame")

import pettingzoo

from envs import registry
from envs.checks.check import check, check_factory
from envs.registry import EnvironmentUnknown
from envs.suites.turn_taking import TurnGame

TICTACTOE, CONNECT_FOUR = "pettingzoo/classic/tictactoe_v3", "pettingzoo/classic/connect_four_v3"
FIRST = "tests.envs.opponents:first"


class Legal:
    """Makes any move of an observation's "legal" line."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def act(self, observation: str) -> str:
        legal = observation.splitlines()[-1].split(" ")
        assert legal[0] == "legal"
        return str(self._rng.choice(legal[1:]))


def begun(env_id: str, seed: int = 0, **options: Any) -> tuple[Any, str]:
    env = registry.make(env_id, instructions=False, **options)
    return env, env.reset(seed=seed)[0]


def test_a_game_by_hand() -> None:
    env, seen = begun(TICTACTOE, seat=0, opponent=FIRST)
    assert seen == "you are player_1\n...\n...\n...\nlegal 0 1 2 3 4 5 6 7 8"
    assert env.step("4")[0] == "you are player_1\no..\n.x.\n...\nlegal 1 2 3 5 6 7 8"
    seen, *rest = env.step("0")
    assert (seen, rest) == (
        "illegal\nyou are player_1\no..\n.x.\n...\nlegal 1 2 3 5 6 7 8",
        [0.0, False, False, {}],
    )
    assert env.step("3")[0].splitlines()[1:4] == ["oo.", "xx.", "..."]
    assert env.step("5") == ("you are player_1\noo.\nxxx\n...", 1.0, True, False, {"success": True})
    env, seen = begun(TICTACTOE, seat=1, opponent=FIRST)
    assert seen.splitlines()[:2] == ["you are player_2", "o.."], "x is the agent's on either side"


def test_a_lost_game_and_a_drawn_one() -> None:
    env, _ = begun(TICTACTOE, seat=1, opponent=FIRST)  # which takes 0, 1, 2 in turn
    env.step("3")
    told = env.step("4")
    assert told == ("you are player_2\nooo\nxx.\n...", 0.0, True, False, {"success": False})
    env, _ = begun(TICTACTOE, opponent="self")
    *moves, last = ["0", "1", "2", "4", "3", "5", "7", "6", "8"]
    for turn, move in enumerate(moves):
        assert env.step(move)[1:] == (0.0, False, False, {"seat": turn % 2})
    assert env.step(last)[1:] == (0.5, True, False, {"success": False, "seat": 0})


@pytest.mark.parametrize("env_id", [TICTACTOE, CONNECT_FOUR, "pettingzoo/classic/rps_v2"])
def test_how_it_ends_and_pays_for_a_seat_is_as_in_the_packages_loop(env_id: str) -> None:
    rng = np.random.default_rng(0)
    for seed in range(4):
        env, seen = begun(env_id, seed, opponent="self")
        plain = pettingzoo.make("aec", env_id.removeprefix("pettingzoo/"))
        plain.reset(seed=seed)
        totals = dict.fromkeys(plain.possible_agents, 0.0)
        paid, ends = None, (False, False)
        said: dict[str, tuple[bool, bool]] = {}
        for agent in plain.agent_iter():
            observed, reward, terminated, truncated, _ = plain.last()
            totals[agent] += reward
            if terminated or truncated:
                said.setdefault(agent, (terminated, truncated))
                plain.step(None)
                continue
            assert not any(ends) and seen.startswith(f"you are {agent}\n")
            mask = (
                observed["action_mask"]
                if isinstance(observed, dict)
                else np.ones(plain.action_space(agent).n)
            )
            move = int(rng.choice(np.flatnonzero(mask)))
            if "legal" in seen:
                assert seen.splitlines()[-1].split()[1:] == [str(each) for each in np.flatnonzero(mask)]
            plain.step(move)
            seen, paid, *ends, _ = env.step(str(move))
        first = plain.possible_agents[0]
        total = totals[first]
        assert tuple(ends) == said[first] and any(ends)
        assert paid == min(max((total + 1) / 2, 0.0), 1.0)


def test_the_game_and_the_scale_are_told_by_options() -> None:
    env, _ = begun("pettingzoo/classic/rps_v2", seat=0, opponent=FIRST, lowest=-15, highest=15)
    truncated, won = False, 0
    while not truncated:
        _, paid, terminated, truncated, _ = env.step("1")  # paper against rock
        won += 1
        assert not terminated, "the package cuts it after so many rounds"
    assert (won, paid) == (15, 1.0)
    assert begun("pettingzoo/classic/rps_v2", num_actions=5)[0].step("4")[4] == {}
    opening = registry.make(TICTACTOE).reset(seed=0)[0].splitlines()[0]
    assert opening.startswith("You play classic/tictactoe_v3; win. ") and opening.endswith(
        "Answer with one whole number from 0 to 8 and nothing else."
    )


def test_an_aec_game_of_ones_own_is_named_by_its_function() -> None:
    env, seen = begun("pettingzoo/pettingzoo.classic.tictactoe_v3:env")
    assert isinstance(env, TurnGame) and "legal" in seen


@pytest.mark.parametrize("env_id", [TICTACTOE, CONNECT_FOUR])
def test_it_keeps_what_environments_promise(env_id: str) -> None:
    assert check(env_id, seconds=60) == []
    assert check_factory(registry.env_factory(env_id), Legal, seconds=60, in_subprocess=False) == []


@pytest.mark.parametrize(
    ("env_id", "options", "says"),
    [
        ("pettingzoo/classic/tictacto_v3", {}, "not found"),
        ("pettingzoo/nobody.here:env", {}, "cannot be imported"),
        (TICTACTOE, {"lowest": 1.0}, "lowest=1.0 must be less than highest=1.0"),
        (TICTACTOE, {"sise": 3}, "sise"),
        (TICTACTOE, {"seat": 2}, "must be from 0 to 1"),
        ("pettingzoo/classic/go_v5", {}, "observations of .* numbers have no text form"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(env_id: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(EnvironmentUnknown, match=says) as refused:
        registry.make(env_id, **options)
    assert "\n" not in str(refused.value)
