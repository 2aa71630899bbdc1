"""Leagues: two policies that learn from games against each other's past, and one that learns from its own.

    python -m tests.bench.league [--seeds 3] [--steps 40] [--games 512] [--folder DIR]

The game is `locks`, by tiny models that were shown a player who takes one key in three wrong; plain transformers
sample.

roles      a keeper and an opener, each a policy of one run with its own learning rate, and uniform fictitious
           self-play. Each policy's first and last version play all past versions of the other: how often do they win?
league     one policy of both seats, prioritized fictitious self-play against its own past versions; beside it, from the
           same start and for as many steps, plain self-play against the latest version. Both are tested against the
           scripted players of both seats, whom neither ever met.

Needs neither Ray nor vLLM; what is there already is not run again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deploy import load_recipe
from deploy.assembly.build import agents_of, load_chat, start_engine
from deploy.assembly.league import League, Member
from deploy.assembly.models import model_path
from deploy.config.config import RunConfig
from deploy.config.policies import of_policy
from deploy.report.statistics import wilson_interval
from rollout.episodes.group import concurrently, run_group
from rollout.episodes.pool import EnvironmentPool
from rollout.wire.policies import Opponent
from rollout.wire.trajectory import Slot, Task
from tests.bench.runs import run_here

ROLES = ("keeper", "opener")
# An answer that wins always leaves nothing to learn from, and soon the other knows it: a policy stays near its start,
# the keeper moves less than the opener can follow, and both meet the whole past.
ROLES_LEARN = {
    "league.sampler": "uniform",
    "league.keep": 16,
    "league.engines": 12,
    "learner.algorithm.kl": {"coefficient": 0.1},
    "learner.algorithm.skip_zero_advantage": False,
    "learner.algorithm.epochs": 2,
}
RATES = {"keeper": 2e-4, "opener": 2e-3}
SELF = {"league.latest_share": 1.0}
FIRST_GAME = 1_000_000  # seeds from here on are games of the comparison
AT_ONCE = 32


class Rate(NamedTuple):
    """How often a policy won."""

    wins: float
    games: int

    @property
    def share(self) -> float:
        return self.wins / self.games

    def __str__(self) -> str:
        low, high = wilson_interval(round(self.wins), self.games)
        return f"{self.share:.3f} ({low:.3f} to {high:.3f})"


class Match(NamedTuple):
    """One version of a policy against some versions of another."""

    own: Opponent
    against: tuple[Opponent, ...]


async def played(league: League, member: Member, match: Match, games: int) -> Rate:
    """Play so many games, shared by the opponents."""
    config = member.config
    path = model_path(config, member.folder)
    engine = await start_engine(config, "match", path)
    await engine.sync(member.kept.open(match.own.version))
    players, others = agents_of(config, engine, load_chat(path, config.rollout.context_tokens))
    opponents = league.opponents(match.own.policy, start_engine, "match")
    assert opponents is not None
    await opponents.begin({each.policy for each in match.against})
    pool, env = EnvironmentPool(), config.environments[0]
    gate = asyncio.Semaphore(AT_ONCE)

    async def game(number: int) -> float:
        task = Task.of(env.id, FIRST_GAME + number, env.options)
        opponent = match.against[number % len(match.against)]
        slot = Slot(number, 0, task, match.own.version, match.own.policy, opponent)
        agent, limits = players.get(task.environment, (others, env.limits))
        async with gate, opponents.playing(opponent, task) as other:
            group = await run_group(slot, pool, agent, 1, limits, 0, opponent=other)
        return group.trajectories[0].reward

    try:
        rewards = await concurrently(game(number) for number in range(games))
    finally:
        await opponents.close()
        await pool.close()
        await engine.close()
    return Rate(float(np.sum(rewards)), games)


def recipe(seed: int, steps: int, games: int, **changes: Any) -> RunConfig:
    """The recipe of every run here."""
    return load_recipe("locks", seed=seed, steps=steps, **{"evaluation.tasks": games, **changes})


def roles(seed: int, steps: int, games: int, folder: Path) -> list[str]:
    """Lines of the table of two policies that learn at once."""
    run = folder / f"roles-{seed}"
    policies = {
        role: {"env": {"options": {"seat": role}}, "learner": {"optim": {"learning_rate": RATES[role]}}}
        for role in ROLES
    }
    config = recipe(seed, steps, games, policies=policies, **ROLES_LEARN)
    run_here(config, run)
    members = {role: Member(of_policy(config, role), run / "policies" / role) for role in ROLES}
    league = League(members)
    lines = []
    for role, other in zip(ROLES, reversed(ROLES), strict=True):
        assert config.league is not None
        past = tuple(Opponent(other, version) for version in config.league.past(steps))
        cells = []
        for against in (past[:1], past):
            for version in (0, steps):
                match = Match(Opponent(role, version), against)
                cells.append(str(asyncio.run(played(league, members[role], match, games))))
        lines.append(f"| {seed} | {role} | {' | '.join(cells)} | {told_apart(members[role].folder)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def told_apart(folder: Path) -> str:
    """What a ledger says of whom a policy met: groups and versions by opponent."""
    query = """SELECT policy, opponent, count(*), count(DISTINCT opponent_version), min(opponent_version),
        max(opponent_version) FROM groups WHERE state = 'trained' GROUP BY 1, 2"""
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        rows = db.execute(query).fetchall()
    return "; ".join(
        f"{policy} met {opponent} in {groups} groups, {versions} versions from {low} to {high}"
        for policy, opponent, groups, versions, low, high in rows
    )


def against_scripted(seed: int, steps: int, games: int, folder: Path) -> str:
    """A line of the table of plain self-play and the league."""
    summaries, met = [], []
    for name, changes in (("self", SELF), ("league", {})):
        run = folder / f"{name}-{seed}"
        summaries.append(run_here(recipe(seed, steps, games, **changes), run))
        met.append(told_apart(run))
    start, *ends = summaries[0]["success_before"], *(each["success_after"] for each in summaries)
    cells = [str(Rate(share * games, games)) for share in (start, *ends)]
    line = f"| {seed} | {' | '.join(cells)} | {' | '.join(met)} |"
    print(line, file=sys.stderr, flush=True)
    return line


def printed(title: Sequence[str], lines: Sequence[str]) -> None:
    print(f"| {' | '.join(title)} |")
    print("|---" * len(title) + "|")
    print("\n".join(lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.league", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="of: roles, league; none: both")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--games", type=int, default=512, help="of each comparison")
    parser.add_argument("--folder", type=Path, default=Path("runs/league"))
    asked = parser.parse_args()
    if unknown := sorted(set(asked.parts) - {"roles", "league"}):
        parser.error(f"no part {unknown[0]!r}; there are: roles, league")
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    given = asked.steps, asked.games, folder
    if not asked.parts or "roles" in asked.parts:
        lines = [line for seed in range(asked.seeds) for line in roles(seed, *given)]
        wins = [
            f"{which} wins against {whom}"
            for whom in ("version 0", "all past")
            for which in ("version 0", "last")
        ]
        printed(["seed", "policy", *wins, "its ledger"], lines)
        print()
    if not asked.parts or "league" in asked.parts:
        lines = [against_scripted(seed, *given) for seed in range(asked.seeds)]
        titles = ["seed", "start", "plain self-play", "league", "ledger of self-play", "ledger of the league"]
        printed(titles, lines)


if __name__ == "__main__":
    main()
