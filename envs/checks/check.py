"""What an environment promises, examined: Gymnasium's own checker and ours. `manta check-env ID` shows the findings.

    in a process of its own   it starts, answers within the limit, says there what it says here
    (envs/checks/subprocess_check.py) an episode of each seed   observations, rewards, ends and verdicts are what they
    must be actions nobody can read   are answered, not raised, and earn nothing
    the same seed again       the same instance, and the same episode, unless it says `nondeterministic`
    beside another replica, after other episodes, from a snapshot   the same episode still

Checks that would only repeat an earlier finding in other words are left out.
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
from envs.checks.findings import Finding, answered, paid, said
from envs.checks.recording import Record, Script, Trouble, asking, first_difference, go_on, play, shown, step
from envs.checks.subprocess_check import Unfit, made, played_apart, process
from envs.hosting.host import Env, EnvironmentFailed, InProcessEnv
from envs.own_frames import own_lines
from envs.registry import Player

SECONDS = 10.0  # for a reset or a step, unless it is said
TURNS = 30  # played an episode, unless it is said
SEEDS = (0, 1, 2**31 - 1)
ERROR_RATE = 0.5  # of a scripted player, so that it sees more than the shortest way
UNREADABLE = ("", "\x00", "zq nobody says this", "1.5.5", "1_0", "\u0661", "9" * 5000, "[" * 5000, '{"a": ')
ANY_REWARD = (-math.inf, math.inf)  # of an environment that does not say its reward_range
_TOLERATED = ("generators", "time")  # findings that make no later one an echo
_EXPECTED = ("is different from the unwrapped version",)  # what Gymnasium warns of and is meant so here
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

FindPlayer = Callable[[], Callable[[int], Player] | None]  # asked only when the environment could be made


@dataclass(frozen=True, slots=True)
class Subject:
    """What is examined: how a replica is made, who plays on it, and how long a reset or a step may take."""

    recipe: Callable[[], Env]
    player: Callable[[int], Player]
    seconds: float
    turns: int  # played an episode
    nondeterministic: bool
    reward_range: tuple[float, float]  # of an episode

    def replica(self) -> InProcessEnv:
        with asking("making it"):
            return InProcessEnv(self.recipe())

    def differ(self, one: Record, other: Record) -> int | None:
        """Where two episodes of one seed differ that should not."""
        place = first_difference(one, other)
        return None if place and self.nondeterministic else place


def check(
    env_id: str,
    options: dict[str, Any] | None = None,
    seconds: float = SECONDS,
    turns: int = TURNS,
    apart: bool = True,
) -> list[Finding]:
    """What there is to say against an environment of the registry, played by its scripted player where it has one.

    Others as of `check_recipe`. EnvironmentUnknown for a wrong id or option.
    """

    def scripted() -> Callable[[int], Player] | None:
        return partial(registry.player(env_id), ERROR_RATE) if registry.has_player(env_id) else None

    return _checked(registry.recipe(env_id, **(options or {})), scripted, seconds, turns, apart)


def check_recipe(
    recipe: Callable[[], Env],
    player: Callable[[int], Player] | None = None,
    seconds: float = SECONDS,
    turns: int = TURNS,
    apart: bool = True,
) -> list[Finding]:
    """What there is to say against what `recipe` makes; empty for a sound environment.

    player: made with a seed for each episode; without one, actions are drawn from the action space. seconds: for a
    reset or a step. turns: played an episode. apart: also in a process of its own, killed when it takes longer; without
    that an environment that never answers is waited for.
    """
    return _checked(recipe, lambda: player, seconds, turns, apart)


def _checked(
    recipe: Callable[[], Env], find_player: FindPlayer, seconds: float, turns: int, apart: bool
) -> list[Finding]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium's, which are findings below
        return asyncio.run(_check(recipe, find_player, seconds, turns, apart))


async def _check(
    recipe: Callable[[], Env], find_player: FindPlayer, seconds: float, turns: int, apart: bool
) -> list[Finding]:
    findings: list[Finding] = []
    try:
        async with process(recipe, seconds, findings) if apart else nullcontext() as there:
            subject = _subject(recipe, find_player, seconds, turns)  # here only after it could be made there
            elsewhere = None
            if there is not None:
                elsewhere = await played_apart(there, subject.player, SEEDS, UNREADABLE, turns, seconds)
        findings += await _examined(subject, elsewhere)
    except Unfit as unfit:
        findings.append(unfit.finding)
    except Trouble as trouble:
        apart_only = isinstance(trouble.error, EnvironmentFailed)  # its words are those of the error there
        text = str(trouble.error) if apart_only else repr(trouble.error)
        findings.append(Finding("raises", shown(text, 400), _place(trouble)))
    return list({finding.kind: finding for finding in reversed(findings)}.values())[
        ::-1
    ]  # the first of each kind


def _subject(recipe: Callable[[], Env], find_player: FindPlayer, seconds: float, turns: int) -> Subject:
    env = made(recipe)
    with asking("its player"):
        player = find_player() or partial(RandomPlayer, env)
        player(SEEDS[0])
    with asking("its reward_range"):
        low, high = getattr(env.unwrapped, "reward_range", ANY_REWARD)
        reward_range = float(low), float(high)
    return Subject(recipe, player, seconds, turns, InProcessEnv(env).nondeterministic, reward_range)


async def _examined(subject: Subject, elsewhere: Record | Trouble | None) -> list[Finding]:
    before = _generators()
    records = [await _episode(subject, seed) for seed in SEEDS]
    findings = [
        Finding("generators", f"the global generator of {name} was used", "playing")
        for name, state in _generators().items()
        if state != before[name]
    ]
    for record in records:
        findings += said(record, subject.seconds)
    if _conclusive(findings):
        return findings
    for record in records:
        findings += paid(record, *subject.reward_range)
    findings += await _unreadable(subject)
    if _conclusive(findings):
        return findings
    findings += [*_gymnasium(subject), *await _closed(subject), *await _again(subject, records)]
    if any(finding.kind in ("seeding", "repetition") for finding in findings):
        return findings
    findings += await _beside(subject, records[0], records[1].seed)
    findings += await _reused(subject, records[0], records[1])
    findings += await _restored(subject, records[0])
    return [*findings, *_told_there(subject, records[0], elsewhere)]


def _conclusive(findings: list[Finding]) -> bool:
    return any(finding.kind not in _TOLERATED for finding in findings)


async def _episode(subject: Subject, seed: int, actions: list[str] | None = None) -> Record:
    """An episode on a replica of its own, by the player or with these actions."""
    replica = subject.replica()
    if actions is None:
        record = await play(replica, seed, subject.player(seed), subject.turns)
    else:
        record = await play(replica, seed, Script(actions), len(actions))
    with asking("close"):
        await replica.close()
    return record


async def _unreadable(subject: Subject) -> list[Finding]:
    replica = subject.replica()
    for action in UNREADABLE:
        with asking(f"reset, seed {SEEDS[0]}"):
            await replica.reset(SEEDS[0])
        where = f"step 1, seed {SEEDS[0]}, action {shown(repr(action))}"
        try:
            turn = await step(replica, action, where)
        except Trouble as trouble:
            return [Finding("unreadable", f"it raised {shown(repr(trouble.error), 200)}", _place(trouble))]
        findings = list(answered(turn, where, subject.seconds))
        if not findings and turn.told[4].get("malformed") and turn.told[1] != 0:
            findings = [Finding("unreadable", f"it paid {float(turn.told[1]):g}", where)]
        if findings:
            return findings
    return []


def _gymnasium(subject: Subject) -> list[Finding]:
    where, texts = "gymnasium.utils.env_checker", []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with asking(where):
                words = _InWords(subject.recipe(), subject.nondeterministic)
                check_env(words, skip_render_check=True, skip_close_check=True)
        except Trouble as trouble:
            texts.append(str(trouble.error))
    for warning in caught:
        text = _COLOUR.sub("", str(warning.message))
        if text.startswith("WARN: ") and not any(expected in text for expected in _EXPECTED):
            texts.append(text.removeprefix("WARN: "))
    return [Finding("gymnasium", shown(text, 300), where) for text in texts]


class _InWords(gym.Wrapper[str, str, Any, str]):
    """Messages as JSON, since Gymnasium's checker knows no space of messages; what it goes by is the spec."""

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


async def _closed(subject: Subject) -> list[Finding]:
    replica = subject.replica()
    try:
        with asking("close, called twice"):
            await replica.reset(SEEDS[0])
            await replica.close()
            await replica.close()
    except Trouble as trouble:
        return [Finding("closing", shown(repr(trouble.error), 200), _place(trouble))]
    return []


def _place(trouble: Trouble) -> str:
    """When an environment raised, and in which lines of its own."""
    lines = own_lines(trouble.error)
    return f"{trouble.where}, {lines}" if lines else trouble.where


async def _again(subject: Subject, records: list[Record]) -> list[Finding]:
    for record in records:
        place = subject.differ(record, await _episode(subject, record.seed, record.actions))
        if place == 0:
            return [Finding("seeding", "two replicas begin differently with one seed", record.where(0))]
        if place is not None:
            what = "the same seed and actions led elsewhere in another replica"
            return [Finding("repetition", what, record.where(place))]
    return []


async def _beside(subject: Subject, record: Record, other_seed: int) -> list[Finding]:
    """An episode while another replica plays, a turn each."""
    neighbour = subject.replica()
    plays: list[tuple[Player, Any]] = []  # who plays there, and what was seen last; empty between episodes

    async def between() -> None:
        with asking("playing beside another replica"):
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
    return [Finding("isolation", "it goes differently while another replica plays", record.where(place))]


async def _reused(subject: Subject, record: Record, other: Record) -> list[Finding]:
    """The same episode on a replica that has played others."""
    replica = subject.replica()
    await play(replica, other.seed, Script(other.actions), len(other.actions) - 1)
    again = await play(replica, record.seed, Script(record.actions), len(record.actions))
    if (place := subject.differ(record, again)) is not None:
        what = "it goes differently after an episode that was given up"
        return [Finding("reuse", what, record.where(place))]
    last = await play(replica, other.seed, Script(other.actions), len(other.actions))
    with suppress(Trouble):  # a step behind the end may be refused
        await step(replica, last.actions[-1], "a step behind the end")
    again = await play(replica, record.seed, Script(record.actions), len(record.actions))
    if (place := subject.differ(record, again)) is not None:
        what = "it goes differently after an episode with a step behind its end"
        return [Finding("reuse", what, record.where(place))]
    return []


async def _restored(subject: Subject, record: Record) -> list[Finding]:
    """Episodes that go on from a snapshot in another replica."""
    taken = [number for number, turn in enumerate(record.turns, start=1) if turn.snapshot is not None]
    for number in dict.fromkeys((*taken[:1], *taken[len(taken) // 2 :][:1], *taken[-1:])):
        done, left = record.turns[:number], record.actions[number:]
        replica = subject.replica()
        with asking(f"restore, {record.where(number)}"):
            await replica.reset(record.seed)
            assert done[-1].snapshot is not None
            await replica.restore(done[-1].snapshot)
        resumed = Record(record.seed, record.opening, 0.0, list(done))
        await go_on(replica, resumed, done[-1].told[0], Script(left), len(left))
        if (place := subject.differ(record, resumed)) is not None:
            what = f"it goes on differently from its snapshot after step {number}"
            return [Finding("snapshots", what, record.where(place))]
    return []


def _told_there(subject: Subject, record: Record, elsewhere: Record | Trouble | None) -> list[Finding]:
    if elsewhere is None:
        return []
    if isinstance(elsewhere, Trouble):
        return [
            Finding("elsewhere", f"it raised there only: {shown(str(elsewhere.error), 200)}", elsewhere.where)
        ]
    place = subject.differ(record, elsewhere)
    if place is None:
        return []
    return [Finding("elsewhere", "in another process it says something else", record.where(place))]


def _generators() -> dict[str, Any]:
    """The states of the global generators."""
    state = np.random.get_state(legacy=False)["state"]
    return {"random": random.getstate(), "numpy.random": (state["key"].tobytes(), state["pos"])}
