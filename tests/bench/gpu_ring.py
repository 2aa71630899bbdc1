"""A ring of Ray, vLLM and the learner that share one GPU, for each way to share it.

    python -m tests.bench.gpu_ring [--tiny]

Four steps of `smollm2_sums`, where `make llm` has been run, else of `frozen_lake`. `ipc`: side by side; the learner
hands the engine's process its memory. `turns`: one holds the memory at a time; weights go through the host. `--tiny`
is a rehearsal on a CPU: `frozen_lake`, with the object store, and in turns with the transformers engine. Prints JSON:
figures of the last step.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from deploy.report.metrics import read_metrics
from tests.smollm2 import FOLDER

STEPS = 4
FIGURES = ("step_s", "publish_s", "sync_stall_ms", "behavior_gap", "probe_difference")
TURNS = ["cluster.colocate=turns", "buffer.max_lag=0"]
ON_GPU = {
    "ipc": ["rollout.gpus_per_worker=0.5", "engine.memory_fraction=0.4", "weights.transfer=ipc"],
    "turns": [*TURNS, "rollout.gpus_per_worker=1", "engine.memory_fraction=0.8"],
}
ON_CPU = {
    "object_store": [],
    "turns": [*TURNS, "engine={kind='transformers'}", "buffer.groups_per_step=4", "rollout.group_size=4"],
}


# A short run: the stage of frozen_lake has few steps then, and no room to warm up; what it samples may all be lost,
# and is trained nevertheless.
SMALL = [f"steps={STEPS}", "evaluation.tasks=0", "learner.algorithm.skip_zero_advantage=false"]
OF_RECIPE = {
    "frozen_lake": ["stages.0.source.episodes=64", "stages.0.optim.warmup_steps=0"],
    "smollm2_sums": ["buffer.groups_per_step=8"],
}


def overrides(recipe: str, way: str, tiny: bool) -> list[str]:
    """What a ring changes of its recipe."""
    device = ON_CPU[way] if tiny else ["learner.model.device=cuda", *ON_GPU[way]]
    return [*SMALL, *OF_RECIPE[recipe], *device]


def ring(recipe: str, run: Path, changes: list[str]) -> dict[str, Any]:
    """Figures of a run's last step."""
    command = [sys.executable, "-m", "deploy.cli", "train", recipe, "--run-dir", str(run), *changes]
    subprocess.run(command, check=True, stdout=sys.stderr)
    *_, last = read_metrics(run)
    return {name: last[name] for name in FIGURES}


def main(tiny: bool) -> dict[str, Any]:
    """The figures of each way."""
    real = not tiny and (FOLDER / "config.json").is_file()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:  # logs may still be copied
        recipe = "smollm2_sums" if real else "frozen_lake"
        for way in ON_CPU if tiny else ON_GPU:
            figures = ring(recipe, Path(name) / way, overrides(recipe, way, tiny))
            found |= {f"{way}_{figure}": value for figure, value in figures.items()}
    return found


if __name__ == "__main__":
    print(json.dumps(main("--tiny" in sys.argv[1:])))
