"""A student that distils its teacher on its own episodes, against GRPO from the same start: success over episodes.

    python -m tests.bench.distill [--seeds 1] [--steps 25] [--tasks 128] [--folder DIR] [--figure FILE.svg]

The teacher is the main job's model, fine-tuned on a scripted player that errs rarely. The student has two layers of
three and was shown little of a player that errs 60% of the time. From there it learns by GRPO, from the teacher alone,
and from both. A step plays 16 groups of 8 episodes; held-out maps are played every five steps, by plain transformers.
Needs neither Ray nor vLLM; what is there already is not run again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy import load_recipe
from deploy.report.metrics import read_metrics
from tests.bench.offline import OPTIM
from tests.bench.runs import exported, run_here

GROUPS, SIBLINGS, EVERY = 16, 8, 5
SHARE = 0.9  # of the teacher's success, which a student is to reach
ALONE = {"learner.algorithm.advantage": {"kind": "none"}, "learner.algorithm.skip_zero_advantage": False}
# Each state's whole distribution is known, whoever reached it: more passes over a batch are no bias.
PASSES = {"learner.algorithm.epochs": 4, "learner.optim.learning_rate": 3e-3}
METHODS = {
    "grpo": "rewards",
    "sampled": "the teacher's logprobs of sampled tokens",
    "both": "rewards and these",
    "reverse": "the teacher's whole distributions",
}
Curve = list[tuple[int, float]]  # episodes seen, success on held-out maps


def imitator(run: Path, seed: int, tasks: int, source: dict[str, Any], **changes: Any) -> tuple[Path, float]:
    """A model fine-tuned on a scripted player's episodes, and its success on held-out maps."""
    stage = {
        "kind": "sft",
        "source": {"kind": "player", **source},
        "epochs": 3,
        "episodes_per_step": 8,
        "threads": 1,
        "optim": OPTIM,
    }
    config = load_recipe(
        "frozen_lake",
        seed=seed,
        steps=0,
        stages=[stage],
        engine={"kind": "transformers"},
        **{"evaluation.tasks": tasks, **changes},
    )
    summary = run_here(config, run)
    return exported(run, run.with_name(f"{run.name}-model"), 0), summary["success_after"]


def curve(method: str, start: Path, teacher: Path, seed: int, steps: int, tasks: int, run: Path) -> Curve:
    """Success on held-out maps over the episodes that a student has seen."""
    kind = "reverse" if method == "reverse" else "sampled"
    distill = {"learner.algorithm.distill": {"teacher": str(teacher), "divergence": kind}}
    changes = {
        "grpo": {},
        "sampled": distill | ALONE,
        "both": distill,
        "reverse": distill | ALONE | PASSES,
    }[method]
    config = load_recipe(
        "frozen_lake",
        seed=seed,
        steps=steps,
        tiny=None,
        stages=[],
        engine={"kind": "transformers"},
        **{
            "learner.model.path": str(start),
            "learner.model.dtype": "float32",
            "evaluation.tasks": tasks,
            "evaluation.every_steps": EVERY,
            "rollout.group_size": SIBLINGS,
            "buffer.groups_per_step": GROUPS,
            "buffer.max_lag": 0,
            "learner.optim.learning_rate": 1e-3,
            "learner.optim.schedule": "constant",
            "learner.optim.final_share": 0.0,
            "learner.algorithm.minibatches": 4,
            **changes,
        },
    )
    summary = run_here(config, run)
    during = {int(row["step"]): row["eval_success"] for row in read_metrics(run / "evaluations")}
    found = {0: summary["success_before"], **during, steps: summary["success_after"]}
    return [(step * GROUPS * SIBLINGS, success) for step, success in sorted(found.items())]


def needed(found: Curve, success: float) -> int | None:
    """Episodes seen when a student was first found to have this success; None: never."""
    return next((episodes for episodes, reached in found if reached >= success), None)


def row(method: str, curves: Sequence[Curve], goal: float) -> str:
    """A line of the table, seed by seed."""
    told = [needed(each, goal) for each in curves]
    episodes = ", ".join("not reached" if each is None else f"{each:,}" for each in told)
    last = ", ".join(f"{each[-1][1]:.3f}" for each in curves)
    return f"| `{method}` | {METHODS[method]} | {episodes} | {last} |"


def draw(file: Path, found: Mapping[str, Sequence[Curve]], teacher: float) -> None:
    """Success over the episodes seen; thin: each seed, thick: their mean; dashed: the teacher and the goal."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(7, 3.6), layout="constrained")
    panel = chart.subplots()
    for place, (method, curves) in enumerate(found.items()):
        episodes = [each for each, _ in curves[0]]
        successes = np.array([[success for _, success in of_seed] for of_seed in curves])
        panel.plot(episodes, successes.mean(0), color=f"C{place}", lw=2, label=METHODS[method])
        if len(curves) > 1:
            panel.plot(episodes, successes.T, color=f"C{place}", lw=0.7, alpha=0.5)
    for level, name in ((teacher, "teacher"), (SHARE * teacher, f"{SHARE:.0%} of it")):
        panel.axhline(level, color="black", lw=0.8, ls="--")
        panel.annotate(
            name, (1, level), (-2, 2), ("axes fraction", "data"), "offset points", ha="right", fontsize=8
        )
    panel.set(xlabel="episodes seen", ylabel="success on held-out maps", ylim=(0, 1))
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, title="learns from")
    chart.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.distill", description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of: {', '.join(METHODS)}; none: all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--tasks", type=int, default=128, help="held-out maps")
    parser.add_argument("--folder", type=Path, default=Path("runs/distill"))
    parser.add_argument("--figure", type=Path, help="draw the curves here, too (.svg)")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.methods) - set(METHODS)):
        parser.error(f"no method {unknown[0]!r}; there are: {', '.join(METHODS)}")
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    taught = {"episodes": 4096, "error_rate": 0.1}
    teacher, goal = imitator(folder / "teacher", 0, asked.tasks, taught)
    print(f"teacher: {goal:.3f}", file=sys.stderr, flush=True)
    found: dict[str, list[Curve]] = {method: [] for method in asked.methods or METHODS}
    for seed in range(asked.seeds):
        run, shown = folder / f"student-{seed}", {"episodes": 1024, "error_rate": 0.6}
        start, _ = imitator(run, seed, asked.tasks, shown, **{"tiny.layers": 2})
        for method, curves in found.items():
            run = folder / f"{method}-{seed}"
            curves.append(curve(method, start, teacher, seed, asked.steps, asked.tasks, run))
            print(f"{method} seed {seed}: {curves[-1]}", file=sys.stderr, flush=True)
    print(
        f"| method | learns from | episodes to {SHARE:.0%} of the teacher's {goal:.3f} | success at the end |"
    )
    print("|---|---|---|---|")
    for method, curves in found.items():
        print(row(method, curves, SHARE * goal))
    if asked.figure:
        draw(asked.figure, found, goal)


if __name__ == "__main__":
    main()
