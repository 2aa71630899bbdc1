"""Environments by id. Each one's contract is checked by `envs.checks.check`, see test_check.py."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium as gym
import pytest
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation, TimeLimit

from envs import registry
from envs.adapters import TextAdapter
from envs.base import messages_of
from envs.registry import EnvironmentUnknown, Suite
from tests.envs.playing import here

ADAPTED = ["FrozenLake-v1", "CliffWalking-v1", "Taxi-v4", "Blackjack-v1", "CartPole-v1", "Pendulum-v1"]
EVERY = [*here(), *ADAPTED]


class Picture(gym.Env[Any, Any]):
    observation_space = spaces.Box(0, 255, (5, 5, 3))
    action_space = spaces.Discrete(2)


gym.register("Picture-v0", entry_point=Picture)


@pytest.mark.parametrize("env_id", EVERY)
@pytest.mark.parametrize(
    "action", ["", "jump", "1.5", "left and right", "1_0", "\u0661", "9" * 30, "9" * 5000]
)
def test_an_action_that_cannot_be_read_ends_the_episode_and_says_so(env_id: str, action: str) -> None:
    if (env_id, action) == ("assistant", "1.5"):
        pytest.skip("a number is an answer there")
    env = registry.make(env_id)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated, info["malformed"]) == (0.0, True, False, True)


@pytest.mark.parametrize(("old", "new"), [("forget", "reset_context"), ("go_on", "continue_turn")])
def test_an_old_key_of_a_message_is_refused_with_the_new_name(old: str, new: str) -> None:
    message = {"role": "user", "content": "x"}
    assert messages_of([message | {new: True}]) == [message | {new: True}]
    with pytest.raises(ValueError, match=f"the key '{old}' of a message is called '{new}' now"):
        messages_of([message | {old: True}])


def test_an_adapted_environment_says_what_it_says_to_others() -> None:
    plain, text = (
        gym.make("CartPole-v1", max_episode_steps=9),
        registry.make("CartPole-v1", max_episode_steps=9),
    )
    state, _ = plain.reset(seed=3)
    opening, observation = text.reset(seed=3)[0].splitlines()
    assert opening == "Answer with one whole number from 0 to 1 and nothing else."
    truncated = False
    for action in (0, 1, 1, 0, 1, 0, 0, 1, 1):
        assert observation == "[" + ", ".join(f"{number:.4g}" for number in state) + "]"
        state, reward, terminated, truncated, _ = plain.step(action)
        observation, *rest, _ = text.step(f" {action}\n")
        assert rest == [reward, terminated, truncated]
    assert truncated


def test_numbers_are_written_with_as_many_digits_as_asked_for() -> None:
    long, short = (
        registry.make("Pendulum-v1", text_digits=digits).reset(seed=0)[0].splitlines()[1] for digits in (9, 2)
    )
    assert [f"{float(number):.2g}" for number in long[1:-1].split(", ")] == short[1:-1].split(", ")


def test_a_wrapped_environment_of_ones_own_is_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_OURS", dict(registry._OURS))
    registry.register("pairs", lambda: FrameStackObservation(TimeLimit(gym.make("CartPole-v1"), 2), 2))
    env = registry.make("pairs")
    assert isinstance(env, TextAdapter)
    assert env.reset(seed=0)[0].splitlines()[1].startswith("[[")
    assert [env.step("0")[3] for _ in range(2)] == [False, True]


def test_a_suite_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "tests.envs.suite_of_here"
    absent = Suite("Nowhere-", "nowhere", "package_of_nobody", f"{module}:lake", "Environments of Nobody")
    present = Suite("Here-", "here", "tests", f"{module}:lake", "a suite")
    monkeypatch.setattr(registry, "SUITES", (absent, present))
    with pytest.raises(
        EnvironmentUnknown, match=r"Environments of Nobody.*pip install 'manta-rl\[nowhere\]'"
    ):
        registry.make("Nowhere-Easy-v0")
    with pytest.raises(EnvironmentUnknown, match="did you mean Here-Lake"):
        registry.make("Here-Laka")
    with pytest.raises(EnvironmentUnknown, match="no option 'sise'; its options: slippery"):
        registry.make("Here-Lake", sise=4)
    assert "Answer with" in registry.make("Here-Lake", slippery=False).reset(seed=0)[0]
    with pytest.raises(EnvironmentUnknown, match="defines no WORDS"):
        registry.words("Here-Lake")


def test_a_suites_ids_are_those_of_its_prefix_and_splits_are_an_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite = Suite("Here-", "here", "tests", "tests.envs.suite_of_here:lake", "a suite")
    assert registry.suite_ids(suite) == ("Here-Lake",)
    monkeypatch.setattr(registry, "SUITES", (suite,))
    without = ("locks",)  # its tasks differ by chance alone: none is worth holding out
    assert all(map(registry.has_splits, set(here()) - {*without})) and not any(
        map(registry.has_splits, without)
    )
    assert not any(map(registry.has_splits, ("Here-Lake", "FrozenLake-v1", "tests.envs.bad:Sound")))


def test_no_suite_is_imported_before_it_is_asked_for() -> None:
    packages = sorted({suite.package for suite in registry.SUITES})
    asked = (
        "import sys; from envs import registry; from envs.checks import check; "
        "assert all(suite.prefix for suite in registry.SUITES); "
        f"print(*(name for name in {packages} if name in sys.modules))"
    )
    told = subprocess.run(
        [sys.executable, "-c", asked], check=True, capture_output=True, text=True, encoding="utf-8"
    )
    assert told.stdout.strip() == ""


def test_what_an_environment_says_of_itself() -> None:
    told = registry.describe("frozen_lake")
    assert told.about.startswith("FrozenLake in words") and told.has_player and told.levels == ""


def test_levels_are_read_from_the_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    def stairs() -> Any:
        """Climb stairs.

        Action: up.
        Levels: 1 one step,
        2 two.
        Ends: at the top.
        """

    monkeypatch.setattr(registry, "_OURS", {"stairs": stairs})
    told = registry.describe("stairs")
    assert (told.about, told.levels, told.has_player) == ("Climb stairs.", "1 one step, 2 two.", False)


def test_a_time_limit_truncates() -> None:
    env = registry.make("FrozenLake-v1", max_episode_steps=3, is_slippery=False)
    env.reset(seed=0)
    assert [env.step("0")[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]


@pytest.mark.parametrize(
    ("env_id", "options", "says"),
    [
        ("frozen_lak", {}, "did you mean frozen_lake"),
        ("CartPole-v1", {"text_digits": 0}, "text_digits=0 must be a whole number from 1 to 17"),
        (
            "tests.envs.test_environments:Picture-v0",
            {},
            "observations of 75 numbers have no text form .at most 64",
        ),
        ("frozen_lake", {"text_digits": 3}, "its options: size"),
        ("frozen_lake", {"sise": 4}, "its options: size"),
        ("frozen_lake", {"size": 1}, "use 2 or more"),
        ("frozen_lake", {"size": "4"}, r"frozen_lake does not accept size='4' \(default: 4\)"),
        ("frozen_lake", {"size": 4.5, "max_turns": 9}, r"does not accept size=4\.5 \(default: 4\): '?float"),
        ("frozen_lake", {"max_turns": 0}, "use 1 or more"),
        ("FrozenLake-v1", {"sise": 4}, "sise.*its options: .*is_slippery"),
        ("FrozenLake-v1", {"map_name": "9x9"}, "9x9"),
        ("no_such_module:Lake-v0", {}, "no_such_module"),
        (
            "tests.envs.bad:Sond",
            {},
            "module tests.envs.bad neither defines nor registers Sond; did you mean Sound",
        ),
        *(
            (each, {}, "environment .*: not of the form module:Class")
            for each in (":", ":Foo", ".x:Foo", "a:b:c", "json:")
        ),
        ("tests.envs.bad:MAX_TURNS", {}, "module tests.envs.bad neither defines nor registers MAX_TURNS"),
        ("fractions:Fraction", {}, "the factory returned a Fraction; return a gymnasium.Env"),
        (
            "tests.envs.bad:WithoutSpaces",
            {},
            "has no action_space; declare action_space, or derive from .*TextEnv",
        ),
        ("Taxi-v3", {}, "Taxi-v4"),
    ],
)
def test_a_wrong_environment_is_refused_in_one_line(env_id: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(EnvironmentUnknown, match=says) as refused:
        registry.make(env_id, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("env_id", "package", "module"),
    [
        ("chess", "chess", "envs.builtin.chess_game"),
        ("browser", "playwright.sync_api", "envs.builtin.browser_tab"),
    ],
)
def test_an_environment_whose_package_is_missing_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, env_id: str, package: str, module: str
) -> None:
    for absent in (package, package.partition(".")[0]):
        monkeypatch.setitem(sys.modules, absent, None)
    for ours in (module, registry._OURS[env_id].partition(":")[0]):
        monkeypatch.delitem(sys.modules, ours, raising=False)
    for asked in (registry.make, registry.words, registry.player, registry.describe):
        with pytest.raises(EnvironmentUnknown, match=rf"pip install 'manta-rl\[{env_id}\]'") as refused:
            asked(env_id)
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
