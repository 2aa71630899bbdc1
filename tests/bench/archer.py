"""ArCHer against GRPO on a task of many turns: success in training over the episodes played.

    python -m tests.bench.archer [METHOD ...] [--seeds 3] [--steps 40] [--folder DIR] [--figure FILE.svg]

The task is the household's third level: commands in several rooms. A tiny model has imitated a scripted player that
errs 30% of the time, and goes on from there by the recipe's own GRPO, and by the preset `archer`. A step plays 16
groups of 8 episodes, sampled by vLLM; those that ArCHer plays while its policy waits for the critic count
as well. Needs no Ray; what is there already is not run again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy import load_recipe
from tests.bench.environments import Curve, curve, episodes_until
from tests.bench.offline import OPTIM
from tests.bench.runs import exported, run_here

DEMONSTRATIONS, ERROR_RATE, GROUPS, SIBLINGS = 4096, 0.3, 16, 8
ENOUGH = 0.8
TASK = {"level": 3, "max_turns": 16, "split": "train", "instructions": False}
PLAYED: dict[str, Any] = {
    "env.options": TASK,
    "evaluation.tasks": 256,
    "evaluation.options": {"split": "heldout"},
}
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"learner.optim.learning_rate": 7e-4},
    "archer": {
        "algorithm": "archer",
        "learner.optim.learning_rate": 3e-4,
        "learner.algorithm.critic.optim": {"learning_rate": 2e-3, "betas": [0.9, 0.95]},
    },
}


def imitator(seed: int, folder: Path) -> Path:
    """The model that both methods begin with."""
    stage = {
        "kind": "sft",
        "source": {"kind": "player", "episodes": DEMONSTRATIONS, "error_rate": ERROR_RATE},
        "epochs": 3,
        "episodes_per_step": 16,
        "threads": 1,
        "optim": OPTIM,
    }
    run = folder / f"imitation-{seed}"
    run_here(load_recipe("household", seed=seed, steps=0, stages=[stage], **PLAYED), run)
    return exported(run, folder / f"imitation-{seed}-model", 0)


def learned(method: str, start: Path, seed: int, steps: int, run: Path) -> tuple[Curve, float, float]:
    """Success in training over the episodes played; success on held-out tasks before and after."""
    config = load_recipe(
        "household",
        seed=seed,
        steps=steps,
        tiny=None,
        stages=[],
        **PLAYED,
        **{
            "learner.model.path": str(start),
            "learner.model.dtype": "float32",
            "rollout.group_size": SIBLINGS,
            "buffer.groups_per_step": GROUPS,
            "buffer.max_lag": 0,
            "learner.optim.schedule": "constant",
            "learner.optim.final_share": 0.0,
            **METHODS[method],
        },
    )
    summary = run_here(config, run)
    return curve(run), summary["success_before"], summary["success_after"]


def draw(file: Path, found: Mapping[str, Sequence[Curve]]) -> None:
    """Success in training over the episodes played; thin: each seed, thick: their mean."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(7, 3.6), layout="constrained")
    panel = chart.subplots()
    for place, (method, curves) in enumerate(found.items()):
        for episodes, reached in curves:
            panel.plot(episodes, reached, color=f"C{place}", lw=0.7, alpha=0.5)
        mean = np.mean([reached for _, reached in curves], axis=0)
        panel.plot(curves[0][0], mean, color=f"C{place}", lw=2, label=method)
    panel.axhline(ENOUGH, color="black", lw=0.8, ls="--")
    panel.set(xlabel="episodes played", ylabel="success in training", ylim=(0, 1))
    panel.grid(alpha=0.25)
    panel.legend(frameon=False)
    chart.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.archer", description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of: {', '.join(METHODS)}; none: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("runs/archer"))
    parser.add_argument("--figure", type=Path, help="draw the curves here, too (.svg)")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.methods) - set(METHODS)):
        parser.error(f"no method {unknown[0]!r}; there are: {', '.join(METHODS)}")
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[Curve]] = {method: [] for method in asked.methods or METHODS}
    print(f"| method | seed | episodes to {ENOUGH} | held out, before and after |\n|---|---|---|---|")
    for seed in range(asked.seeds):
        start = imitator(seed, folder)
        for method, of_seeds in curves.items():
            found, before, after = learned(method, start, seed, asked.steps, folder / f"{method}-{seed}")
            of_seeds.append(found)
            needed = episodes_until(found, ENOUGH)
            print(f"| `{method}` | {seed} | {needed} | {before:.3f} -> {after:.3f} |", flush=True)
            print(f"{method} seed {seed}: {found[1].round(2).tolist()}", file=sys.stderr, flush=True)
    if asked.figure:
        draw(asked.figure, curves)


if __name__ == "__main__":
    main()
