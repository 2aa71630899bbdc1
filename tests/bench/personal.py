"""People of different tastes, held out: a policy with memory, one without, and one preference for all.

    python -m tests.bench.personal [--seeds 3] [--folder DIR]

memory         the recipe `personal` as it is: earlier sessions are in the prompt, and the reward is the person's own
no memory      every session begins a new conversation; everything else is the same
one for all    earlier sessions are in the prompt, but the reward is the mean of all people's

Every policy is evaluated by the reward of the person whom it serves, on people that none was trained on: for the same
seed the same person, who asks and says the same. The first and the last begin as one model, so that imitation is made
once for both. Runs use vLLM, without Ray; what is there already is not run again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deploy.config.load import load_config
from deploy.report.comparison import Difference
from deploy.report.statistics import clustered_interval
from envs.builtin.personal import Personal
from rollout.buffer.segments import read_rows
from tests.bench.runs import exported, from_model, run_here

RECIPE = "personal"
WAYS = {
    "memory": [],
    "no memory": ["env.options.memory=false", "evaluation.options.memory=false"],
    "one for all": ["env.options.reward=people"],
}
FIRST = "memory"  # its imitation is also the beginning of "one for all"

Sums = Mapping[str, list[float]]  # person -> a number of each of their episodes


def learned(way: str, seed: int, folder: Path) -> Path:
    """The run of one way."""
    run = folder / f"{way.replace(' ', '-')}-{seed}"
    if (run / "summary.json").is_file():
        return run
    overrides = [f"seed={seed}", "checkpoint.keep=100", *WAYS[way]]
    if way == "one for all":
        first = folder / f"{FIRST}-{seed}"
        config = from_model(RECIPE, exported(first, folder / f"imitated-{seed}", 0), overrides)
    else:
        config = load_config(RECIPE, ["stages.0.threads=1", *overrides])
    run_here(config, run)
    return run


def person_of(seed: int, level: int) -> str:
    """Whom a held-out task is about."""
    env = Personal(level, split="heldout")
    env.reset(seed=seed)
    return str(env.person)


def served(run: Path, when: str) -> tuple[Sums, Sums]:
    """The reward of every episode of an evaluation, and how often the forbidden topic was mentioned, by person."""
    rows = read_rows(run / "evaluations" / when).to_pylist()
    totals: dict[int, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for row in rows:
        reward, cost = totals[row["seed"]]
        named = json.loads(row["named_rewards"])
        totals[row["seed"]] = reward + row["reward"], cost + named["costs/forbidden"]
    level = json.loads(rows[0]["env_options"])["level"]
    rewards, costs = defaultdict(list), defaultdict(list)
    for seed, (reward, cost) in totals.items():
        person = person_of(seed, level)
        rewards[person].append(reward)
        costs[person].append(cost)
    return rewards, costs


def mean_and_interval(seeds: Sequence[Sums]) -> str:
    """The mean over seeds and episodes, and its 95% interval over people."""
    together = [[value for each in seeds for value in each[person]] for person in seeds[0]]
    low, high = clustered_interval(together)
    return f"{np.mean(np.concatenate(together)):.3f} ({low:.3f} to {high:.3f})"


def row(way: str, before: Sequence[Sums], after: Sequence[Sums], costs: Sequence[Sums]) -> str:
    """A line of the table."""
    by_seed = ", ".join(f"{np.mean(np.concatenate(list(each.values()))):.3f}" for each in after)
    return f"| {way} | {mean_and_interval(before)} | {by_seed} | {' | '.join(map(mean_and_interval, (after, costs)))} |"


def difference(first: Sequence[Sums], second: Sequence[Sums]) -> str:
    """How much more the first earns of a person, with the 95% interval over people."""

    def earned(way: Sequence[Sums], person: str) -> float:
        return float(np.mean([each[person] for each in way]))

    found = Difference.of([(earned(first, person), earned(second, person)) for person in first[0]])
    return f"{found.difference:+.3f} ({found.interval[0]:+.3f} to {found.interval[1]:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.personal", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/personal"))
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    before: dict[str, list[Sums]] = {way: [] for way in WAYS}
    after: dict[str, list[Sums]] = {way: [] for way in WAYS}
    costs: dict[str, list[Sums]] = {way: [] for way in WAYS}
    for seed in range(asked.seeds):
        for way in WAYS:
            run = learned(way, seed, folder)
            before[way].append(served(run, "before")[0])
            rewards, forbidden = served(run, "after")
            after[way].append(rewards)
            costs[way].append(forbidden)
            latest = (each[way][-1:] for each in (before, after, costs))
            print(row(f"{way}, seed {seed}", *latest), file=sys.stderr, flush=True)
    print("| | reward before | after, by seed | after | forbidden topics an episode |\n|---|---|---|---|---|")
    for way in WAYS:
        print(row(way, before[way], after[way], costs[way]))
    for other in (way for way in WAYS if way != FIRST):
        print(f"\n{FIRST} - {other}: {difference(after[FIRST], after[other])}")


if __name__ == "__main__":
    main()
