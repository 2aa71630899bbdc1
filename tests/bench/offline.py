"""What can be learned from the same stored episodes without playing: imitation of all, of the successful, and values.

    python -m tests.bench.offline [METHOD ...] [--seeds 3] [--epochs 3] [--tasks 256] [--folder DIR]

The episodes are those of the main job's scripted player, which errs 60% of the time; for one seed all methods have the
same. Each makes about as many optimizer steps. Held-out maps are played by the plain transformers engine, sampled and
greedily. Needs neither Ray nor vLLM; what is there already is not run again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy import load_recipe
from deploy.report.statistics import wilson_interval
from tests.bench.runs import run_here

EPISODES, ERROR_RATE = 8192, 0.6
SUCCESSFUL = 0.43  # share of them, so that imitating these alone makes as many steps
OPTIM = {
    "learning_rate": 3e-3,
    "betas": [0.9, 0.98],
    "weight_decay": 0.01,
    "warmup_steps": 50,
    "schedule": "linear",
}
VALUES = {"gamma": 0.9, "expectile": 0.8, "cql": 0.01, "target_rate": 0.02, "temperature": 0.1}
METHODS = {"imitation": "all", "filtered": "the successful alone", "ilql": "all, by their values"}


def stage(method: str, epochs: int) -> dict[str, Any]:
    """The one stage of a method's run."""
    source: dict[str, Any] = {"kind": "player", "episodes": EPISODES, "error_rate": ERROR_RATE}
    made: dict[str, Any] = {
        "kind": "sft",
        "epochs": epochs,
        "episodes_per_step": 8,
        "threads": 1,
        "optim": OPTIM,
    }
    if method == "filtered":
        source["min_reward"] = 1.0
        made["epochs"] = round(epochs / SUCCESSFUL)
    if method == "ilql":
        made |= {"kind": "ilql", "value_optim": OPTIM, **VALUES}
    return made | {"source": source}


def successes(method: str, seed: int, epochs: int, tasks: int, folder: Path) -> tuple[float, float]:
    """Success of a method's policy, sampled and greedy."""
    config = load_recipe(
        "frozen_lake",
        steps=0,
        seed=seed,
        stages=[stage(method, epochs)],
        engine={"kind": "transformers"},
        **{
            "evaluation.tasks": tasks,
            "evaluation.suites": [{"name": "greedy", "sampling": {"temperature": 0.0}}],
        },
    )
    run = folder / f"{method}-{epochs}-{seed}"
    summary = run_here(config, run)
    return summary["success_after"], summary["suites"]["greedy"]["success_after"]


def row(method: str, found: Sequence[tuple[float, float]], tasks: int) -> str:
    """A line of the table: seed by seed, and the interval of all episodes together."""
    cells = []
    for of_seeds in zip(*found, strict=True):
        mean = statistics.mean(of_seeds)
        low, high = wilson_interval(round(mean * tasks * len(of_seeds)), tasks * len(of_seeds))
        listed = ", ".join(f"{share:.3f}" for share in of_seeds)
        cells.append(f"{listed}: {mean:.3f} ({low:.3f} to {high:.3f})")
    return f"| `{method}` | {METHODS[method]} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.offline", description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of: {', '.join(METHODS)}; none: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="passes over the episodes")
    parser.add_argument("--tasks", type=int, default=256, help="held-out maps")
    parser.add_argument("--folder", type=Path, default=Path("runs/offline"))
    asked = parser.parse_args()
    if unknown := sorted(set(asked.methods) - set(METHODS)):
        parser.error(f"no method {unknown[0]!r}; there are: {', '.join(METHODS)}")
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[tuple[float, float]]] = {method: [] for method in asked.methods or METHODS}
    for seed in range(asked.seeds):
        for method, of_seeds in found.items():
            of_seeds.append(successes(method, seed, asked.epochs, asked.tasks, folder))
            print(f"{method} seed {seed}: {of_seeds[-1]}", file=sys.stderr, flush=True)
    print("| method | learns from | success, sampled | success, greedy |\n|---|---|---|---|")
    for method, of_seeds in found.items():
        print(row(method, of_seeds, asked.tasks))


if __name__ == "__main__":
    main()
