"""Checks of an environment against its contract, by Gymnasium and by Manta. `manta check-env ID` prints the result.

    in a child process        it starts, answers within the limit, and behaves as it does here (subprocess_check.py)
    an episode per seed       observations, rewards, ends and verdicts are well formed
    unparsable actions        are answered instead of raised, and earn nothing
    the same seed again       gives the same instance and the same episode, unless it is `nondeterministic`
    with other episodes       beside another replica, after other episodes, from a snapshot: the same episode

Checks whose failure would only repeat an earlier finding are skipped.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env

from envs import registry
from envs.adapters import RandomPlayer
from envs.base import text_space
from envs.checks.findings import Issue, check_record, check_return, check_turn
from envs.checks.recording import EnvRaised, Record, Script, env_call, first_diff, play, resume, shown, step
from envs.checks.subprocess_check import CheckAborted, child_replica, make_env, play_in_child
from envs.code_lines import user_lines
from envs.hosting.host import Env, EnvironmentFailed, InProcessEnv
from envs.registry import Player

SECONDS = 10.0  # default limit for a reset or a step
TURNS = 30  # default turns per episode
SEEDS = (0, 1, 2**31 - 1)
ERROR_RATE = 0.5  # of a scripted player, so that it leaves the shortest path
UNREADABLE = ("", "\x00", "zq nobody says this", "1.5.5", "1_0", "\u0661", "9" * 5000, "[" * 5000, '{"a": ')
ANY_REWARD = (-math.inf, math.inf)  # for environments without a reward_range
_TOLERATED = ("generators", "time")  # violations that do not cause later ones
_EXPECTED = ("is different from the unwrapped version",)  # Gymnasium warnings that do not apply here
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

FindPlayer = Callable[[], Callable[[int], Player] | None]  # called only after the environment could be made


@dataclass(frozen=True, slots=True)
class Subject:
    """The environment under test: its factory, its player, and the limits."""

    factory: Callable[[], Env]
    player: Callable[[int], Player]
    seconds: float
    turns: int  # per episode
    nondeterministic: bool
    reward_range: tuple[float, float]  # of an episode's return

    def replica(self) -> InProcessEnv:
        with env_call("making it"):
            return InProcessEnv(self.factory())

    def differ(self, one: Record, other: Record) -> int | None:
        """The first position at which two episodes that should be equal differ, or None."""
        place = first_diff(one, other)
        return None if place and self.nondeterministic else place


def check(
    env_id: str,
    options: dict[str, Any] | None = None,
    seconds: float = SECONDS,
    turns: int = TURNS,
    in_subprocess: bool = True,
) -> list[Issue]:
    """Check an environment of the registry, played by its scripted player if it has one; returns the violations.

    Other parameters as in `check_factory`. EnvironmentUnknown for a wrong id or option.
    """

    def scripted() -> Callable[[int], Player] | None:
        return partial(registry.player(env_id), ERROR_RATE) if registry.has_player(env_id) else None

    return _checked(registry.env_factory(env_id, **(options or {})), scripted, seconds, turns, in_subprocess)


def check_factory(
    factory: Callable[[], Env],
    player: Callable[[int], Player] | None = None,
    seconds: float = SECONDS,
    turns: int = TURNS,
    in_subprocess: bool = True,
) -> list[Issue]:
    """Check the environment that `factory` makes; returns the violations, none for a sound environment.

    player: called with a seed for each episode; without one, actions are sampled from the action space. seconds: limit
    for a reset or a step. turns: per episode. in_subprocess: also run it in a child process, which is killed if it
    exceeds the limit; without that, a call that never returns blocks.
    """
    return _checked(factory, lambda: player, seconds, turns, in_subprocess)


def _checked(
    factory: Callable[[], Env], find_player: FindPlayer, seconds: float, turns: int, in_subprocess: bool
) -> list[Issue]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium's warnings are collected below
        return asyncio.run(_check(factory, find_player, seconds, turns, in_subprocess))


async def _check(
    factory: Callable[[], Env], find_player: FindPlayer, seconds: float, turns: int, in_subprocess: bool
) -> list[Issue]:
    findings: list[Issue] = []
    try:
        async with child_replica(factory, seconds, findings) if in_subprocess else nullcontext() as child:
            subject = _subject(factory, find_player, seconds, turns)  # after it could be made in the child
            elsewhere = None
            if child is not None:
                elsewhere = await play_in_child(child, subject.player, SEEDS, UNREADABLE, turns, seconds)
        findings += await _run_checks(subject, elsewhere)
    except CheckAborted as aborted:
        findings.append(aborted.violation)
    except EnvRaised as failed:
        in_child_only = isinstance(failed.error, EnvironmentFailed)  # the text of the child's error
        text = str(failed.error) if in_child_only else repr(failed.error)
        findings.append(Issue("raises", shown(text, 400), _place(failed)))
    return list({finding.kind: finding for finding in reversed(findings)}.values())[
        ::-1
    ]  # the first of each kind


def _subject(factory: Callable[[], Env], find_player: FindPlayer, seconds: float, turns: int) -> Subject:
    env = make_env(factory)
    with env_call("its player"):
        player = find_player() or partial(RandomPlayer, env)
        player(SEEDS[0])
    with env_call("its reward_range"):
        low, high = getattr(env.unwrapped, "reward_range", ANY_REWARD)
        reward_range = float(low), float(high)
    return Subject(factory, player, seconds, turns, InProcessEnv(env).nondeterministic, reward_range)


async def _run_checks(subject: Subject, elsewhere: Record | EnvRaised | None) -> list[Issue]:
    before = _generators()
    records = [await _episode(subject, seed) for seed in SEEDS]
    findings = [
        Issue("generators", f"the global generator of {name} was used", "playing")
        for name, state in _generators().items()
        if state != before[name]
    ]
    for record in records:
        findings += check_record(record, subject.seconds)
    if _stop_early(findings):
        return findings
    for record in records:
        findings += check_return(record, *subject.reward_range)
    findings += await _unreadable(subject)
    if _stop_early(findings):
        return findings
    findings += [*_gymnasium(subject), *await _closed(subject), *await _again(subject, records)]
    if any(finding.kind in ("seeding", "repetition") for finding in findings):
        return findings
    findings += await _beside(subject, records[0], records[1].seed)
    findings += await _reused(subject, records[0], records[1])
    findings += await _restored(subject, records[0])
    return [*findings, *_elsewhere(subject, records[0], elsewhere)]


def _stop_early(findings: list[Issue]) -> bool:
    return any(finding.kind not in _TOLERATED for finding in findings)


async def _episode(subject: Subject, seed: int, actions: list[str] | None = None) -> Record:
    """An episode on a new replica, by the player or with these actions."""
    replica = subject.replica()
    if actions is None:
        record = await play(replica, seed, subject.player(seed), subject.turns)
    else:
        record = await play(replica, seed, Script(actions), len(actions))
    with env_call("close"):
        await replica.close()
    return record


async def _unreadable(subject: Subject) -> list[Issue]:
    replica = subject.replica()
    for action in UNREADABLE:
        with env_call(f"reset, seed {SEEDS[0]}"):
            await replica.reset(SEEDS[0])
        where = f"step 1, seed {SEEDS[0]}, action {shown(repr(action))}"
        try:
            turn = await step(replica, action, where)
        except EnvRaised as failed:
            return [Issue("unreadable", f"it raised {shown(repr(failed.error), 200)}", _place(failed))]
        findings = list(check_turn(turn, where, subject.seconds))
        if not findings and turn.outcome[4].get("malformed") and turn.outcome[1] != 0:
            findings = [Issue("unreadable", f"its reward was {float(turn.outcome[1]):g}", where)]
        if findings:
            return findings
    return []


def _gymnasium(subject: Subject) -> list[Issue]:
    where, texts = "gymnasium.utils.env_checker", []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with env_call(where):
                words = _InWords(subject.factory(), subject.nondeterministic)
                check_env(words, skip_render_check=True, skip_close_check=True)
        except EnvRaised as failed:
            texts.append(str(failed.error))
    for warning in caught:
        text = _COLOUR.sub("", str(warning.message))
        if text.startswith("WARN: ") and not any(expected in text for expected in _EXPECTED):
            texts.append(text.removeprefix("WARN: "))
    return [Issue("gymnasium", shown(text, 300), where) for text in texts]


class _InWords(gym.Wrapper[str, str, Any, str]):
    """Messages as JSON text, because Gymnasium's checker has no space for messages; carries the spec that it reads."""

    def __init__(self, env: Env, nondeterministic: bool) -> None:
        super().__init__(env)
        self._cached_spec = EnvSpec("Examined-v0", nondeterministic=nondeterministic)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._words(observation), info

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._words(observation), reward, terminated, truncated, info

    def _words(self, observation: Any) -> str:
        if isinstance(observation, str):
            return observation
        self.observation_space = text_space(1 << 20)
        return json.dumps(observation)


async def _closed(subject: Subject) -> list[Issue]:
    replica = subject.replica()
    try:
        with env_call("close, called twice"):
            await replica.reset(SEEDS[0])
            await replica.close()
            await replica.close()
    except EnvRaised as failed:
        return [Issue("closing", shown(repr(failed.error), 200), _place(failed))]
    return []


def _place(failed: EnvRaised) -> str:
    """Where an environment raised, and in which of its own lines."""
    lines = user_lines(failed.error)
    return f"{failed.where}, {lines}" if lines else failed.where


async def _again(subject: Subject, records: list[Record]) -> list[Issue]:
    for record in records:
        place = subject.differ(record, await _episode(subject, record.seed, record.actions))
        if place == 0:
            return [Issue("seeding", "two replicas start differently with the same seed", record.where(0))]
        if place is not None:
            what = "the same seed and actions gave another episode in another replica"
            return [Issue("repetition", what, record.where(place))]
    return []


async def _beside(subject: Subject, record: Record, other_seed: int) -> list[Issue]:
    """An episode while another replica plays, turn by turn."""
    neighbour = subject.replica()
    plays: list[tuple[Player, Any]] = []  # its player and last observation; empty between episodes

    async def between() -> None:
        with env_call("playing beside another replica"):
            if not plays:
                plays.append((subject.player(other_seed), await neighbour.reset(other_seed)))
                return
            player, observation = plays.pop()
            observation, _, terminated, truncated, _ = await neighbour.step(player.act(observation))
            if not (terminated or truncated):
                plays.append((player, observation))

    replica = subject.replica()
    again = await play(replica, record.seed, Script(record.actions), len(record.actions), between)
    place = subject.differ(record, again)
    if place is None:
        return []
    return [Issue("isolation", "the episode differs while another replica plays", record.where(place))]


async def _reused(subject: Subject, record: Record, other: Record) -> list[Issue]:
    """The same episode on a replica that has played others."""
    replica = subject.replica()
    await play(replica, other.seed, Script(other.actions), len(other.actions) - 1)
    again = await play(replica, record.seed, Script(record.actions), len(record.actions))
    if (place := subject.differ(record, again)) is not None:
        what = "the episode differs after an abandoned one"
        return [Issue("reuse", what, record.where(place))]
    last = await play(replica, other.seed, Script(other.actions), len(other.actions))
    with suppress(EnvRaised):  # a step after the end may raise
        await step(replica, last.actions[-1], "a step after the end")
    again = await play(replica, record.seed, Script(record.actions), len(record.actions))
    if (place := subject.differ(record, again)) is not None:
        what = "the episode differs after one with a step after its end"
        return [Issue("reuse", what, record.where(place))]
    return []


async def _restored(subject: Subject, record: Record) -> list[Issue]:
    """Episodes continued from a snapshot in another replica."""
    taken = [number for number, turn in enumerate(record.turns, start=1) if turn.snapshot is not None]
    for number in dict.fromkeys((*taken[:1], *taken[len(taken) // 2 :][:1], *taken[-1:])):
        done, left = record.turns[:number], record.actions[number:]
        replica = subject.replica()
        with env_call(f"restore, {record.where(number)}"):
            await replica.reset(record.seed)
            assert done[-1].snapshot is not None
            await replica.restore(done[-1].snapshot)
        resumed = Record(record.seed, record.opening, 0.0, list(done))
        await resume(replica, resumed, done[-1].outcome[0], Script(left), len(left))
        if (place := subject.differ(record, resumed)) is not None:
            what = f"the episode differs when continued from the snapshot after step {number}"
            return [Issue("snapshots", what, record.where(place))]
    return []


def _elsewhere(subject: Subject, record: Record, elsewhere: Record | EnvRaised | None) -> list[Issue]:
    if elsewhere is None:
        return []
    if isinstance(elsewhere, EnvRaised):
        return [
            Issue("elsewhere", f"it raised there only: {shown(str(elsewhere.error), 200)}", elsewhere.where)
        ]
    place = subject.differ(record, elsewhere)
    if place is None:
        return []
    return [Issue("elsewhere", "the episode differs in another process", record.where(place))]


def _generators() -> dict[str, Any]:
    """The states of Python's and NumPy's global generators."""
    state = np.random.get_state(legacy=False)["state"]
    return {"random": random.getstate(), "numpy.random": (state["key"].tobytes(), state["pos"])}
