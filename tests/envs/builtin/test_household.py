"""The household against a home written by hand, its scripted player, and attempts to game the reward."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.builtin.household import (
    CARRIED,
    COMMANDS,
    PLACES,
    WORDS,
    Home,
    Household,
    Player,
    Subgoal,
    fulfilled,
)

SEEDS = range(200)
LEVELS = (1, 2, 3, 4)


def at_home(goals: tuple[Subgoal, ...], **options: Any) -> Household:
    """Hall, kitchen and bedroom; the player in the bedroom, a cup in its drawer, a book on the kitchen shelf."""
    env = Household(instructions=False, **options)
    env.reset(seed=0)
    devices = {("hall", "light"): "on", ("hall", "door"): "open", ("kitchen", "light"): "off"}
    devices |= {("bedroom", "light"): "on", ("bedroom", "window"): "closed"}
    things = {"cup": ("bedroom", "drawer"), "book": ("kitchen", "shelf")}
    env._home = Home("bedroom", {"hall": False, "kitchen": False, "bedroom": True}, devices, things)
    env._goals = goals
    return env


CUP = Subgoal("bring", "cup", "kitchen", "table")
LIGHTS = Subgoal("turn off", "light", "")
DOOR = Subgoal("close", "door", "hall")


def played(env: Household, player: Player | None, seed: int) -> tuple[float, int, list[str]]:
    """Reward, turns and observations of an episode; without a player, of a new one every turn."""
    observations, rewards, done = [env.reset(seed=seed)[0]], [], False
    while not done:
        action = (player or Player(0.0, seed)).act(observations[-1])
        observation, reward, terminated, truncated, info = env.step(action)
        assert COMMANDS.get(action), "a player speaks the grammar"
        assert ("success" in info) == (terminated or truncated)
        observations.append(observation)
        rewards.append(reward)
        done = terminated or truncated
    assert info["success"] == (sum(rewards) == 1.0)
    return sum(rewards), len(rewards), observations


def test_an_errand_by_hand() -> None:
    env = at_home((CUP, LIGHTS, DOOR))
    task = "task: bring the cup to the kitchen table and turn off every light and close the hall door\n"
    bedroom = "bedroom\nlight on\nwindow closed\nbed\ndrawer: cup\nnew: hall"
    assert env.step("go kitchen") == (f"nothing happens\n{task}{bedroom}", 0.0, False, False, {})
    bedroom = "bedroom\nlight on\nwindow closed\nbed\ndrawer\ncarried: cup\nnew: hall"
    assert env.step("take cup")[0] == task + bedroom
    assert env.step(" Turn off LIGHT\n")[0] == task + bedroom.replace("light on", "light off")
    task = "task: bring the cup to the kitchen table and turn off every light and close the door\n"
    hall = "hall\nlight on\ndoor open\nbench\ncarried: cup\nexits: bedroom\nnew: kitchen"
    assert env.step("go hall")[0] == task + hall
    task = "task: bring the cup to the kitchen table and turn off every light\n"
    hall = "hall\nlight on\ndoor closed\nbench\ncarried: cup\nexits: bedroom\nnew: kitchen"
    assert env.step("close door")[0] == task + hall
    assert env.step("turn off light")[0] == task + hall.replace("light on", "light off")
    kitchen = "kitchen\nlight off\ntable\nshelf: book\ncarried: cup\nexits: hall"
    assert env.step("go kitchen")[0] == "task: bring the cup to the table\n" + kitchen, "every light is seen"
    kitchen = "kitchen\nlight off\ntable\nshelf: cup book\nexits: hall"
    assert env.step("put cup shelf")[0] == "task: bring the cup to the table\n" + kitchen
    assert env.step("put cup table")[0].startswith("nothing happens\n"), "what lies there is not in hand"
    env.step("take cup")
    assert env.step("put cup table") == ("done", 1.0, True, False, {"success": True})


def test_without_reminders_the_task_is_said_once() -> None:
    env = at_home((CUP,), remind=False)
    assert env.step("go hall")[0] == "hall\nlight on\ndoor open\nbench\nexits: bedroom\nnew: kitchen"
    for seed in SEEDS:
        _, _, (first, *later) = played(Household(4, remind=False), Player(0.5, seed), seed)
        assert "task: " in first and not any("task: " in each for each in later)


@pytest.mark.parametrize("command", ["open window", "turn off light", "take book"])
def test_what_was_not_asked_ends_the_episode(command: str) -> None:
    env = at_home((CUP, DOOR))
    if command == "take book":
        for way in ("go hall", "go kitchen"):
            env.step(way)
    assert env.step(command) == ("that was not asked", 0.0, True, False, {"success": False})


def test_what_was_asked_can_be_made_good() -> None:
    env = at_home((Subgoal("turn off", "light", "bedroom"), DOOR))
    commands = ["turn off light", "turn on light", "go hall", "close door", "go bedroom", "turn off light"]
    assert [env.step(each)[1] for each in commands] == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("remind", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_a_player_without_errors_does_everything(level: int, remind: bool) -> None:
    env = Household(level, remind=remind, instructions=not remind)
    assert all(played(env, Player(0.0, seed), seed)[0] == 1.0 for seed in SEEDS)


@pytest.mark.parametrize("level", LEVELS)
def test_with_reminders_the_last_observation_is_enough(level: int) -> None:
    assert all(played(Household(level), None, seed)[0] == 1.0 for seed in SEEDS)


def test_every_level_asks_for_more() -> None:
    turns = [sum(played(Household(level), Player(0.0, 0), seed)[1] for seed in SEEDS) for level in LEVELS]
    assert turns == sorted(turns) and turns[0] == len(SEEDS), "one command on level 1"
    random = [sum(played(Household(level), Player(1.0, seed), seed)[0] for seed in SEEDS) for level in LEVELS]
    assert all(share <= most * len(SEEDS) for share, most in zip(random, (0.35, 0.1, 0.05, 0.0), strict=True))


def test_train_and_heldout_openings_never_meet() -> None:
    for level in LEVELS:
        train, heldout = (
            {Household(level, split=split).reset(seed=seed)[0] for seed in range(100)}
            for split in ("train", "heldout")
        )
        assert not train & heldout
        assert len(heldout) > 90, "there are enough of them"


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_paid_to_who_does_not_read_the_task(level: int) -> None:
    env = Household(level, instructions=False)
    paid = 0.0
    for seed in SEEDS:
        observation, _ = env.reset(seed=seed)
        task = observation.splitlines()[0]
        for action in ("", task, task.removeprefix("task: "), " and ".join(COMMANDS), "\n".join(COMMANDS)):
            env.reset(seed=seed)
            assert env.step(action)[1:4] == (0.0, True, False), action
        env.reset(seed=seed)
        for command in COMMANDS:  # one after the other, until it ends
            _, reward, terminated, _, _ = env.step(command)
            paid += reward
            if terminated:
                break
    assert paid <= 0.35 * len(SEEDS), "by luck, where the first device at hand is the one"


@pytest.mark.parametrize("level", LEVELS)
def test_every_word_is_in_the_list_and_observations_are_short(level: int) -> None:
    assert all(re.fullmatch("[a-z]+", word) for word in WORDS)
    assert {word for command in COMMANDS for word in command.split()} <= set(WORDS)
    env = Household(level, instructions=False)
    for seed in SEEDS:
        for observation in played(env, Player(0.7, seed), seed)[2]:
            assert set(re.findall(r"[^\s:]+", observation)) <= set(WORDS)
            assert len(re.findall(r"[a-z]+|:", observation)) <= (40 if level < 4 else 50)


@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from(LEVELS),
    st.lists(st.sampled_from(sorted(COMMANDS)), max_size=40),
)
def test_the_home_does_what_it_is_told_and_nothing_else(seed: int, level: int, commands: list[str]) -> None:
    env = Household(level, instructions=False, max_turns=100)
    player, done = Player(0.0, 0), False
    observation, _ = env.reset(seed=seed)
    assert not any(goal.holds(env._home) for goal in env._goals), "nothing is done beforehand"
    while not done:
        player.act(observation)
        home, known = env._home, player._home
        assert home.here == known.here and observation.count("task: ") == 1
        assert known.devices.items() <= home.devices.items() and known.things.items() <= home.things.items()
        assert {room for room, _ in known.devices} == {
            room for room, entered in home.rooms.items() if entered
        }
        if not commands:
            return
        before = (home.here, dict(home.devices), dict(home.things))
        command = commands.pop()
        possible = command in home.possible()
        observation, reward, done, _, _ = env.step(command)
        after = (home.here, home.devices, home.things)
        changes = sum(
            before[0] != after[0]
            if part == 0
            else sum(before[part][key] != after[part][key] for key in before[part])
            for part in range(3)
        )
        assert changes == possible == (not observation.startswith("nothing happens"))
        assert reward == fulfilled(env._goals, home) or observation == "that was not asked"


def test_turns_run_out_as_truncation() -> None:
    env = at_home((CUP,), max_turns=2)
    assert env.step("go hall")[2:] == (False, False, {})
    assert env.step("go hall")[2:] == (False, True, {"success": False})


def test_what_is_carried_lies_nowhere() -> None:
    env = at_home((CUP,))
    env.step("take cup")
    assert env._home.things["cup"] == CARRIED and CARRIED[0] not in PLACES


@pytest.mark.parametrize("options", [{"level": 0}, {"level": "1"}, {"max_turns": 0}, {"split": "test"}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Household(**options)
