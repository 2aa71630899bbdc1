"""All environments pass the checks; each kind of issue is found, alone, with a message of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from envs import registry
from envs.checks import subprocess_check
from envs.checks.check import check, check_factory
from envs.checks.findings import ADVICE, Issue
from tests.envs import bad
from tests.envs.playing import here

ADAPTED = ["FrozenLake-v1", "CliffWalking-v1", "Taxi-v4", "Blackjack-v1", "CartPole-v1"]

# Environment, kind of its issue, message; those of the second table need a child process.
INLINE = [
    (bad.Raises, "raises", r"KeyError\('the second turn'\) \(step 2, seed 0, action"),
    (bad.SaysNumbers, "observation", "ndarray .* is neither text nor messages"),
    (bad.SaysNothing, "observation", "list .* is neither text"),
    (bad.FourAnswers, "raises", "return .observation, reward, terminated, truncated, info"),
    (bad.PaysNothingKnown, "reward", "nan is not a finite number"),
    (bad.PaysTooMuch, "reward", r"return of an episode, [\d.]+, is outside of \[0, 1\]"),
    (bad.EndsTwice, "ends", "terminated and truncated are both set"),
    (bad.EndsInNumbers, "ends", "terminated=0, truncated=False are not bools"),
    (bad.ToldTooSoon, "info", "success is set before the end"),
    (
        bad.NamesNoNumbers,
        "info",
        "does not map names to numbers: the reward goal is the text 'much'; give a number",
    ),
    (bad.OneListForAll, "sharing", "changed by a later step"),
    (bad.RaisesOnJunk, "unreadable", "it raised ValueError.*action ''"),
    (bad.PaysForJunk, "unreadable", "its reward was 1"),
    (bad.OutsideOfItsSpace, "gymnasium", "not within the observation space"),
    (bad.ClosesOnce, "closing", "closed already"),
    (bad.DrawsGlobally, "generators", "generator of random was used"),
    (bad.DrawsFromNumpy, "generators", "generator of numpy.random was used"),
    (bad.NoSeed, "seeding", "start differently with the same seed .reset, seed 0"),
    (bad.Noisy, "repetition", "gave another episode in another replica .step"),
    (bad.OneHeightForAll, "isolation", "while another replica plays"),
    (bad.KeepsItsTurns, "reuse", "after an abandoned one"),
    (bad.BrokenBehindTheEnd, "reuse", "with a step after its end"),
    (bad.ForgetsItsTurns, "snapshots", "from the snapshot after step 1"),
]
APART = [
    (bad.Sleeps, "time", r"no answer within 0.5 s \(in a child process, seed 0"),
    (bad.Hangs, "time", r"no answer within 0.5 s \(in a child process, seed 0, action ''"),
    (bad.HangsLater, "time", r"no answer within 0.5 s \(in a child process, seed 1\)"),
    (bad.HangsBehindTheEnd, "time", r"no answer within 0.5 s \(in a child process, seed 0, action ''"),
    (bad.Dies, "death", "died with exit code 3"),
    (bad.CannotBeMade, "raises", r"no such file: words.txt.*making it"),
    (bad.KnowsItsProcess, "elsewhere", "the episode differs in another process .reset, seed 0"),
]
ECHOES = {"gymnasium"}  # its checker resets with one seed, too


def only(findings: list[Issue], kind: str) -> str:
    """The text of the only issue."""
    told = {finding.kind: str(finding) for finding in findings}
    assert kind in told and set(told) <= {kind} | ECHOES, told
    assert "\n" not in told[kind] and ADVICE[kind] in told[kind]
    return told[kind]


@pytest.mark.parametrize("env_id", [*here(), *ADAPTED])
def test_everything_there_is_passes(env_id: str) -> None:
    assert check(env_id) == []


@pytest.mark.parametrize(("env", "kind", "says"), INLINE)
def test_what_is_wrong_is_found_and_named(env: type[bad.Sound], kind: str, says: str) -> None:
    assert re.search(says, only(check_factory(env, in_subprocess=False), kind))


@pytest.mark.parametrize(("env", "kind", "says"), APART)
def test_what_only_a_process_of_its_own_can_show_is_found(env: type[bad.Sound], kind: str, says: str) -> None:
    seconds = 0.5 if kind == "time" else 30.0
    assert re.search(says, only(check_factory(env, seconds=seconds), kind))


def test_one_that_is_never_made_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess_check, "START_SECONDS", 0.5)
    assert re.search(
        r"no answer within 0.5 s \(making it in a child process", only(check_factory(bad.NeverMade), "time")
    )


def test_a_reward_range_holds_for_an_environment_of_gymnasiums_too() -> None:
    told = only(check("tests.envs.bad:PaysFive", in_subprocess=False), "reward")
    assert "return of an episode, 5, is outside of [0, 1]" in told


def test_a_wrong_id_or_option_is_no_finding() -> None:
    for env_id, options, says in (
        ("frozen_lake", {"size": 1}, "use 2 or more"),
        ("nowhere:It", {}, "no module"),
    ):
        with pytest.raises(registry.EnvironmentUnknown, match=says):
            check(env_id, options)


OF_ONES_OWN = """
from tests.envs.bad import Sound

class Cave(Sound):
    def not_understood(self, action):
        if action == "open sesame":
            raise KeyError("the door")
        return super().not_understood(action)

class Player:
    def __init__(self, error_rate, seed):
        assert error_rate == 0.5

    def act(self, observation):
        return "open sesame"
"""


def test_a_module_of_ones_own_is_played_by_its_own_player(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cave.py").write_text(OF_ONES_OWN, encoding="utf-8")
    assert registry.has_player("cave:Cave")
    told = only(check("cave:Cave", in_subprocess=False), "raises")
    assert "KeyError('the door')" in told and "cave.py:7 in not_understood)" in told
    (tmp_path / "den.py").write_text(OF_ONES_OWN.replace("0.5", "0.7"), encoding="utf-8")
    assert "its player" in only(check("den:Cave", in_subprocess=False), "raises")
    (tmp_path / "hole.py").write_text(
        f"from envs.registry import Player\n{OF_ONES_OWN.replace('Player:', 'Nobody:')}",
        encoding="utf-8",
    )
    assert not registry.has_player("hole:Cave")
    assert check("hole:Cave", in_subprocess=False) == []


def test_what_cannot_travel_is_said_and_examined_here() -> None:
    findings = check_factory(lambda: bad.DrawsGlobally())
    assert [finding.kind for finding in findings] == ["pickling", "generators"]


def test_every_kind_of_finding_has_its_environment() -> None:
    assert {kind for _, kind, _ in [*INLINE, *APART]} | {"pickling"} == set(ADVICE)


def test_a_sound_environment_passes_and_one_that_says_it_does_not_repeat_itself_does() -> None:
    assert check_factory(bad.Sound) == []
    assert check_factory(bad.SaysMessages) == []
    assert check_factory(bad.SaysItIsNoisy, in_subprocess=False) == []
    assert check("tests.envs.bad:ManyWinds-v0") == []
