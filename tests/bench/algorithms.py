"""Every recipe on the main job, several seeds each, from one warm start a seed: the table of docs/algorithms.md.

    python -m tests.bench.algorithms [RECIPE ...] [--seeds 3] [--steps 40] [--folder DIR]

A seed's warm start (imitation) is made once; every recipe then goes on from it, with the real vLLM and Ray, and is
evaluated on 256 held-out maps. What is there already is not run again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from tests.bench.runs import from_model, imitated, run_to_end

RECIPES = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "gspo", "cispo", "dppo", "ppo", "ppo_shared")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.algorithms", description=__doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of: {', '.join(RECIPES)}; none: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("runs/algorithms"))
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[float]] = {recipe: [] for recipe in asked.recipes or RECIPES}
    before = []
    for seed in range(asked.seeds):
        warm = imitated("frozen_lake", seed, folder)
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


if __name__ == "__main__":
    main()
