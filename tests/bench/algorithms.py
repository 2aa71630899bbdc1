"""Every recipe on the main job, several seeds each, from one warm start a seed: the table of docs/algorithms.md.

    python -m tests.bench.algorithms [RECIPE ...] [--seeds 3] [--steps 40] [--folder DIR]

A seed's warm start (imitation) is made once; every recipe then goes on from it, with the real vLLM and Ray, and is
evaluated on 256 held-out maps. What is there already is not run again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from deploy import run_folder
from deploy.config import RunConfig, load_config, parse
from deploy.export import export_model

RECIPES = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "gspo", "cispo", "dppo", "ppo", "ppo_shared")
LIMIT_S = 3600


def _run(config: RunConfig, folder: Path) -> None:
    """Run it to its end, or go on with it, unless it has ended."""
    if (folder / "summary.json").is_file():
        return
    if not run_folder.exists(folder):
        run_folder.create(config, folder)
    command = [sys.executable, "-m", "deploy.cli", "train", "--resume", str(folder)]
    with folder.with_suffix(".log").open("ab") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT_S)


def warm_start(folder: Path, seed: int) -> Path:
    """The imitated model of a seed: version 0 of a run of one step."""
    warm = folder / f"warm-{seed}"
    if not warm.is_dir():
        run = folder / f"imitation-{seed}"
        _run(load_config("frozen_lake", [f"seed={seed}", "steps=1", "learner.optim.warmup_steps=0"]), run)
        export_model(run, warm, version=0)
    return warm


def config_of(recipe: str, seed: int, steps: int, warm: Path) -> RunConfig:
    """The recipe from the warm start on."""
    tree = load_config(recipe, [f"seed={seed}", f"steps={steps}"]).model_dump(mode="json")
    tree |= {"tiny": None, "warm_start": None}
    tree["learner"]["model"]["path"] = str(warm)
    return parse(tree, recipe)


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
        warm = warm_start(folder, seed)
        for recipe, successes in found.items():
            run = folder / f"{recipe}-{seed}"
            _run(config_of(recipe, seed, asked.steps, warm), run)
            summary = json.loads((run / "summary.json").read_text())
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
