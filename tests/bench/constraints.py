"""A task whose best reward breaks a rule, learned without and with a limit: what it is held at, what that costs.

    python -m tests.bench.constraints [--seeds 3] [--steps 400] [--folder DIR] [--figure FILE.svg]

One of nine jobs is offered, of gain 1, 2 or 3 and of risk 0, 1 or 2, each as often; the policy takes or leaves it. The
reward is the gain of a job that is taken, the cost is its risk. Whoever takes all has the most reward, 2, at a risk of
1; the limit is 0.25. A tiny model, fine-tuned to take half of the jobs, learns by Dr. GRPO with plain transformers. A
divergence from that model is penalized, whose gradient (k3's, of KL(reference, policy)) keeps both answers alive: a
policy that has stopped trying one of them learns nothing from its price until the price is far too high. Needs neither
Ray nor vLLM; what is there already is not run again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from deploy import load_recipe
from deploy.report.metrics import read_metrics
from deploy.report.statistics import clustered_interval
from tests.bench.runs import run_here

LIMIT = 0.25
JOBS = list(product((1, 2, 3), (0, 1, 2)))  # gain, risk
UPDATES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "dual ascent": {"kind": "dual", "rate": 0.05},
    "PID": {"kind": "pid", "kp": 1.0, "ki": 0.05, "kd": 1.0},
}
LAST = 100  # steps that are counted: their weights no longer move in one direction


def gain(completion: str, row: dict[str, Any]) -> float:
    """The reward: what a job brings that is taken."""
    return row["gain"] * (completion.strip() == "take")


def risk(completion: str, row: dict[str, Any]) -> float:
    """The cost: what it risks."""
    return row["risk"] * (completion.strip() == "take")


def words(completion: str, row: dict[str, Any], most: int = 1) -> float:
    """A reward or a cost of any answer: how many words it has, divided by `most`."""
    return len(completion.split()) / most


def best_within(limit: float) -> float:
    """The most reward of any policy within the limit: jobs of the best ratio first, the last one in part."""
    total, left = 0.0, limit * len(JOBS)
    for earned, dear in sorted(JOBS, key=lambda job: -job[0] / max(job[1], 1e-9)):
        share = min(1.0, left / dear) if dear else 1.0
        total, left = total + share * earned, left - share * dear
    return total / len(JOBS)


def written(folder: Path) -> tuple[Path, Path]:
    """The jobs, and the conversations that the model begins with, which take every second one."""
    jobs, talks = folder / "jobs.jsonl", folder / "talks.jsonl"
    asked = [{"prompt": f"gain {g} risk {r}", "gain": g, "risk": r} for g, r in JOBS]
    jobs.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    said = [{"prompt": row["prompt"], "completion": word} for row in asked for word in ("take", "leave")]
    talks.write_text("".join(json.dumps(row) + "\n" for row in said * 16), encoding="utf-8")
    return jobs, talks


def run(update: dict[str, Any] | None, seed: int, steps: int, run_dir: Path) -> list[dict[str, float]]:
    """The rows of a run's steps."""
    jobs, talks = written(run_dir.parent)
    rewards = [{"kind": f"{__spec__.name}:gain"}, {"kind": f"{__spec__.name}:risk", "cost": True}]
    limit = {"name": "risk", "limit": LIMIT, "update": update}
    config = load_recipe(
        "scratch",
        seed=seed,
        steps=steps,
        tiny={"layers": 2, "width": 64, "heads": 2, "mlp": 128, "words": ["take", "leave", "gain", "risk"]},
        env={"id": "dataset", "options": {"path": str(jobs), "rewards": rewards}},
        stages=[
            {
                "kind": "sft",
                "source": {"kind": "dataset", "path": str(talks)},
                "episodes_per_step": 16,
                "epochs": 6,
                "optim": {"learning_rate": 3e-3},
            }
        ],
        engine={"kind": "transformers"},
        **{
            "evaluation.tasks": 0,
            "rollout.group_size": 8,
            "rollout.max_turns": 1,
            "rollout.context_tokens": 64,
            "sampling.max_tokens": 1,
            "buffer.groups_per_step": 18,
            "buffer.max_lag": 0,
            "learner.optim.learning_rate": 5e-4,
            "learner.algorithm.advantage": {"kind": "grpo", "divide": False},
            "learner.algorithm.kl": {"coefficient": 0.2},
            "learner.algorithm.skip_zero_advantage": False,
            "learner.algorithm.constraints": [limit] if update else [],
        },
    )
    run_here(config, run_dir)
    return read_metrics(run_dir)


def figure(name: str, rows: Sequence[Sequence[dict[str, float]]]) -> str:
    """A line of the table: means over the last steps of all seeds, intervals over seeds and steps."""
    cells = []
    for metric in ("reward", "costs/risk/mean"):
        by_seed = [[row[metric] for row in of_seed[-LAST:]] for of_seed in rows]
        means = [float(np.mean(values)) for values in by_seed]
        low, high = clustered_interval([[value] for values in by_seed for value in values])
        listed = ", ".join(f"{mean:.3f}" for mean in means)
        cells.append(f"{listed}: {np.mean(means):.3f} ({low:.3f} to {high:.3f})")
    return f"| {name} | {' | '.join(cells)} |"


def draw(file: Path, found: dict[str, list[list[dict[str, float]]]]) -> None:
    """Risk and reward over the steps, a curve for each way and seed; dashed: the limit, and the best reward within."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(9, 3.0), layout="constrained")
    bounds = {"costs/risk/mean": ("risk", LIMIT), "reward": ("reward", best_within(LIMIT))}
    for panel, (metric, (title, bound)) in zip(chart.subplots(1, 2), bounds.items(), strict=True):
        for place, (name, rows) in enumerate(found.items()):
            for number, of_seed in enumerate(rows):
                values = [row[metric] for row in of_seed]
                panel.plot(values, color=f"C{place}", lw=0.8, label=None if number else name)
        panel.axhline(bound, color="black", lw=0.8, ls="--")
        panel.set(title=title, xlabel="step")
    chart.axes[0].legend(frameon=False)
    chart.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.constraints", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--folder", type=Path, default=Path("runs/constraints"))
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[list[dict[str, float]]]] = {name: [] for name in UPDATES}
    for seed in range(asked.seeds):
        for name, rows in found.items():
            rows.append(run(UPDATES[name], seed, asked.steps, folder / f"{name.replace(' ', '-')}-{seed}"))
            print(figure(f"{name}, seed {seed}", rows[-1:]), file=sys.stderr, flush=True)
    print(
        f"| update | reward (at most {best_within(LIMIT):.3f} within the limit) | risk (limit {LIMIT}) |\n"
        "|---|---|---|"
    )
    for name, rows in found.items():
        print(figure(name, rows))
    if asked.figure:
        draw(asked.figure, found)


if __name__ == "__main__":
    main()
