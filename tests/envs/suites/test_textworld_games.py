"""TextWorld's games, against the package's own interpreter and its own plans. Needs the extra textworld."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("textworld")

import textworld

from envs import registry
from envs.checks.check import check
from envs.registry import EnvironmentUnknown
from envs.suites.textworld_games import COMMANDS, Player, TextWorldGame

HUNT, SIMPLE = "textworld/tw-treasure_hunter", "textworld/tw-simple"
DENSE = {"rewards": "dense", "goal": "detailed"}


@pytest.fixture(scope="module", autouse=True)
def games(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the games of this file: each is generated once."""
    with pytest.MonkeyPatch.context() as patched:
        kept = tmp_path_factory.mktemp("games")
        patched.setenv("XDG_CACHE_HOME", str(kept))
        yield kept


def begun(env_id: str, seed: int = 0, **options: Any) -> tuple[TextWorldGame, str]:
    env: Any = registry.make(env_id, **options)
    return env, env.reset(seed=seed)[0]


def test_the_packages_own_plan_wins_and_is_paid_one(games: Path) -> None:
    env, seen = begun(HUNT, level=3)
    assert "$$" not in seen and "\n>" not in seen and f"\n{COMMANDS}" in seen
    paid, done, info = 0.0, False, {}
    while not done:
        command = env.walkthrough[0]
        assert command in seen.rpartition(COMMANDS)[2].split(", ")
        seen, reward, done, truncated, info = env.step(command)
        assert not truncated
        paid += reward
    assert paid == 1.0 and info == {"success": True}
    env.close()


def test_points_are_those_of_the_packages_own_environment(games: Path) -> None:
    env, _ = begun(SIMPLE, **DENSE)
    [file] = (
        each
        for each in games.rglob("0.z8")
        if "dense" in textworld.Game.load(str(each.with_suffix(".json"))).metadata["uuid"].lower()
    )
    theirs = textworld.start(str(file), textworld.EnvInfos(score=True, max_score=True, won=True))
    most = theirs.reset().max_score
    done, score, commands = False, 0, iter(env.walkthrough)
    while not done:
        command = next(commands)
        _, reward, done, _, info = env.step(command)
        state, total, over = theirs.step(command)
        assert (reward, done) == ((total - score) / most, over)
        score = total
    assert score == most and info == {"success": bool(state.won)}


def test_a_seed_is_one_game_which_is_generated_once(games: Path) -> None:
    env, first = begun(HUNT, level=3)
    made = {each: each.stat().st_mtime_ns for each in games.rglob("*.z8")}
    assert begun(HUNT, level=3)[1] == first == env.reset(seed=0)[0]
    assert {each: each.stat().st_mtime_ns for each in games.rglob("*.z8")} == made
    assert begun(HUNT, seed=1, level=3)[1] != first


def test_the_game_answers_what_it_does_not_know_and_what_is_no_command_ends_it(games: Path) -> None:
    env, _ = begun(HUNT, level=3, max_turns=2)
    assert env.step("dance on the table")[1:] == (0.0, False, False, {})
    assert env.step("look")[1:] == (0.0, False, True, {"success": False})
    for unreadable in ("", " \n", "look\nlook", "x" * 300):
        env.reset(seed=0)
        assert env.step(unreadable)[1:] == (0.0, True, False, {"malformed": True, "success": False})


def test_games_of_a_folder_are_played_by_number(games: Path) -> None:
    [file] = {
        each
        for each in games.rglob("0.z8")
        if "hunter" in textworld.Game.load(str(each.with_suffix(".json"))).metadata["uuid"]
    }
    env, seen = begun("textworld/games", seed=5, folder=str(file.parent), commands=False)
    assert COMMANDS not in seen
    count = len(list(file.parent.glob("*.z8")))
    assert env.reset(seed=5 + count)[0] == seen


def test_the_scripted_player_wins_where_it_may_explore(games: Path) -> None:
    env, seen = begun(HUNT, level=3, max_turns=100)
    player, done, paid = Player(0.0, 0), False, 0.0
    while not done:
        seen, reward, terminated, truncated, info = env.step(player.act(seen))
        paid, done = paid + reward, terminated or truncated
    assert info["success"] == (paid == 1.0)


def test_it_keeps_what_environments_promise(games: Path) -> None:
    assert check(HUNT, {"level": 3}, turns=6, seconds=120) == []


@pytest.mark.parametrize(
    ("env_id", "options", "says"),
    [
        (HUNT, {}, "the following arguments are required: --level"),
        (HUNT, {"level": "hard"}, "argument --level: invalid int value: 'hard'"),
        (HUNT, {"level": 1, "size": 3}, "unrecognized arguments: --size 3"),
        ("textworld/tw-hunter", {}, "no challenge 'tw-hunter'; use one of: tw-"),
        ("textworld/games", {}, "takes the option folder"),
        ("textworld/games", {"folder": "/nowhere"}, "holds no games; make some: tw-make"),
        (HUNT, {"level": 1, "max_turns": 0}, "leaves no turn to play"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(env_id: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(EnvironmentUnknown, match=says) as refused:
        registry.make(env_id, **options)
    assert "\n" not in str(refused.value)
