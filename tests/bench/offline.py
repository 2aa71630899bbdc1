"""What can be learned from the same stored episodes without playing: imitation of all, of the successful, and values.

    python -m tests.bench.offline [TASK ...] [--methods METHOD ...] [--seeds 3] [--tasks 256] [--folder DIR]

frozen_lake, household   the episodes are those of the task's scripted player, which errs 60% of the time
stitching                a row of doors that no episode has crossed from end to end (tests/deploy/run/locks.py)

For one seed all methods have the same episodes. Imitation of all and of the successful makes as many optimizer steps;
values are learned longer, by a model that has imitated first, and move the policy in the last third of their steps:
what a reward says is learned later than a move. Held-out tasks are played by the plain transformers engine, sampled and
greedily. Needs neither Ray nor vLLM; what is there already is not run again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy import load_recipe
from deploy.config.config import RunConfig
from deploy.report.statistics import wilson_interval
from tests.bench.runs import exported, run_here
from tests.deploy.run.test_ilql_runs import ILQL, IMITATED, doors

EPISODES, ERROR_RATE, PER_STEP = 2048, 0.6, 16
EPOCHS = 5  # passes of imitation over all episodes
FIRST, VALUED = 2, 24  # passes that imitate before values are learned; those that learn them
SUCCESSFUL = {
    "frozen_lake": 0.43,
    "household": 0.24,
}  # share of them: imitating these alone makes as many steps
OPTIM = {
    "learning_rate": 3e-3,
    "betas": [0.9, 0.98],
    "weight_decay": 0.01,
    "warmup_steps": 50,
    "schedule": "linear",
}
VALUES = {
    "gamma": 0.9,
    "expectile": 0.8,
    "cql": 0.01,
    "target_rate": 0.1,
    "temperature": 0.05,
    "value_coefficient": 30.0,
    "warmup_steps": 2000,
}
METHODS = {"imitation": "all", "filtered": "the successful alone", "ilql": "all, by their values"}
TASKS = (*SUCCESSFUL, "stitching")
GREEDY = [{"name": "greedy", "sampling": {"temperature": 0.0}}]


def stage(task: str, method: str) -> dict[str, Any]:
    """The stage of a method; that of `begun` makes the model whose values are learned."""
    source: dict[str, Any] = {"kind": "player", "episodes": EPISODES, "error_rate": ERROR_RATE}
    made = {"kind": "sft", "episodes_per_step": PER_STEP, "threads": 1, "optim": OPTIM, "source": source}
    if method == "filtered":
        source["min_reward"] = 1.0
        return made | {"epochs": round(EPOCHS / SUCCESSFUL[task])}
    if method == "ilql":
        return made | {"kind": "ilql", "epochs": VALUED, "value_optim": OPTIM, **VALUES}
    return made | {"epochs": FIRST if method == "begun" else EPOCHS}


def configured(task: str, method: str, seed: int, tasks: int, **changes: Any) -> RunConfig:
    """The run of a method: its stage, and its policy played on tasks that are held out."""
    if task == "stitching":
        known = {"imitation": IMITATED["all"], "filtered": IMITATED["successful"], "ilql": ILQL}
        greedy = "[{name='greedy', sampling={temperature=0.0}}]"
        played = (f"evaluation.tasks={tasks}", "evaluation.sampling={}", f"evaluation.suites={greedy}")
        return doors(known[method], f"seed={seed}", "engine={kind='transformers'}", *played)
    suites = {"evaluation.suites": GREEDY} if tasks else {}
    return load_recipe(
        task,
        steps=0,
        seed=seed,
        stages=[stage(task, method)],
        engine={"kind": "transformers"},
        **{"evaluation.tasks": tasks, **suites, **changes},
    )


def successes(task: str, method: str, seed: int, tasks: int, folder: Path) -> tuple[float, float]:
    """Success of a method's policy, sampled and greedy."""
    changes: dict[str, Any] = {}
    if method == "ilql" and task != "stitching":
        run = folder / f"{task}-begun-{seed}"
        run_here(configured(task, "begun", seed, 0), run)
        model = exported(run, run.with_name(f"{run.name}-model"), 0)
        changes = {"tiny": None, "learner.model.path": str(model), "learner.model.dtype": "float32"}
    config = configured(task, method, seed, tasks, **changes)
    summary = run_here(config, folder / f"{task}-{method}-{seed}")
    return summary["success_after"], summary["suites"]["greedy"]["success_after"]


def table(found: Mapping[tuple[str, str], Sequence[tuple[float, float]]], tasks: int) -> str:
    """Seed by seed, with the 95% interval of all episodes together."""
    lines = [
        "| task | method | learns from | success, sampled | success, greedy |",
        "|---|---|---|---|---|",
    ]
    for (task, method), of_seeds in found.items():
        cells = []
        for shares in zip(*of_seeds, strict=True):
            mean, episodes = statistics.mean(shares), tasks * len(shares)
            low, high = wilson_interval(round(mean * episodes), episodes)
            listed = ", ".join(f"{share:.3f}" for share in shares)
            cells.append(f"{listed}: {mean:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {task} | `{method}` | {METHODS[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.offline", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="TASK", help=f"of: {', '.join(TASKS)}; none: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=256, help="held-out tasks")
    parser.add_argument("--folder", type=Path, default=Path("runs/offline"))
    asked = parser.parse_args()
    if unknown := sorted(set(asked.names) - set(TASKS)):
        parser.error(f"no task {unknown[0]!r}; there are: {', '.join(TASKS)}")
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    names = asked.names or TASKS
    found: dict[tuple[str, str], list[tuple[float, float]]] = {
        (task, method): [] for task in names for method in asked.methods
    }
    for seed in range(asked.seeds):
        for (task, method), of_seeds in found.items():
            of_seeds.append(successes(task, method, seed, asked.tasks, folder))
            print(f"{task} {method} seed {seed}: {of_seeds[-1]}", file=sys.stderr, flush=True)
    print(table(found, asked.tasks))


if __name__ == "__main__":
    main()
