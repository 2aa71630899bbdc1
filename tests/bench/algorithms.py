"""Every recipe on the main job, several seeds each, from one fine-tuned model a seed: the table and the picture of
docs/algorithms.md.

    python -m tests.bench.algorithms [RECIPE ...] [--seeds 3] [--steps 40] [--folder DIR] [--figure FILE]

A seed's fine-tuned model is made once; every recipe then goes on from it, with the real vLLM and Ray, and is
evaluated on 256 held-out maps. What is there already is not run again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deploy.report.metrics import read_metrics
from tests.bench.runs import SMOOTHED, fine_tuned, from_model, run_to_end, success

RECIPES = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "gspo", "cispo", "dppo", "ppo", "ppo_shared")
COLUMNS = 5


def draw(runs: Mapping[str, Sequence[Path]], file: Path) -> None:
    """A panel for each recipe: its seeds thin, their mean thick, and the first recipe's mean in grey."""
    from matplotlib.figure import Figure

    curves = {
        recipe: np.stack([success(read_metrics(run)) for run in folders]) for recipe, folders in runs.items()
    }
    first, *_ = curves
    rows = -(-len(curves) // COLUMNS)
    figure = Figure(figsize=(9, 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, min(len(curves), COLUMNS), sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(curves) :]:
        panel.remove()
    for panel, (recipe, of_seeds) in zip(panels.flat, curves.items(), strict=False):
        steps = SMOOTHED + np.arange(of_seeds.shape[1])
        panel.plot(steps, curves[first].mean(0), color="grey", linewidth=1.2)
        panel.plot(steps, of_seeds.T, color="tab:blue", alpha=0.4, linewidth=0.8)
        panel.plot(steps, of_seeds.mean(0), color="tab:blue", linewidth=2)
        panel.set_title(recipe, fontsize="medium")
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.25)
    for panel in panels.flat[max(len(curves) - COLUMNS, 0) : len(curves)]:  # the lowest of each column
        panel.tick_params(labelbottom=True)
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("success in training", fontsize="medium")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.algorithms", description=__doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of: {', '.join(RECIPES)}; none: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("runs/algorithms"))
    parser.add_argument(
        "--figure", type=Path, help="draw success in training over the steps here, too (.svg)"
    )
    asked = parser.parse_args()
    if unknown := sorted(set(asked.recipes) - set(RECIPES)):
        parser.error(f"no recipe of these is named {unknown[0]!r}; there are: {', '.join(RECIPES)}")
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[float]] = {recipe: [] for recipe in asked.recipes or RECIPES}
    before = []
    for seed in range(asked.seeds):
        warm = fine_tuned("frozen_lake", seed, folder)
        for recipe, successes in found.items():
            config = from_model(recipe, warm, [f"seed={seed}", f"steps={asked.steps}"])
            summary = run_to_end(config, folder / f"{recipe}-{seed}")
            successes.append(summary["success_after"])
            before.append(summary["success_before"])
            print(
                f"{recipe} seed {seed}: {before[-1]:.3f} -> {successes[-1]:.3f}", file=sys.stderr, flush=True
            )
    print(f"| recipe | success after {asked.steps} steps, seed by seed | mean |\n|---|---|---|")
    print(f"| before | | {statistics.mean(before):.3f} |")
    for recipe, successes in found.items():
        print(
            f"| `{recipe}` | {', '.join(f'{s:.3f}' for s in successes)} | {statistics.mean(successes):.3f} |"
        )
    if asked.figure:
        draw(
            {recipe: [folder / f"{recipe}-{seed}" for seed in range(asked.seeds)] for recipe in found},
            asked.figure,
        )


if __name__ == "__main__":
    main()
