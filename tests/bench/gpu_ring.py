"""A ring of Ray, vLLM and the learner that share one GPU, for each way to send weights.

    python -m tests.bench.gpu_ring [--tiny]

Four steps of `smollm2_sums`, where `make llm` has been run, else of `frozen_lake`. `ipc` hands the engine's process the
learner's memory, `object_store` goes through the host. `--tiny` is a rehearsal on a CPU: `frozen_lake`, by the object
store alone. Prints JSON: figures of the last step.
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
ON_GPU = [
    "learner.model.device=cuda",
    "rollout.gpus_per_worker=0.5",
    "engine.memory_fraction=0.4",
]


def ring(recipe: str, run: Path, overrides: list[str]) -> dict[str, Any]:
    """Figures of a run's last step."""
    small = [f"steps={STEPS}", "evaluation.tasks=0"]
    small += ["stages.0.source.episodes=64"] if recipe == "frozen_lake" else ["buffer.groups_per_step=8"]
    command = [sys.executable, "-m", "deploy.cli", "train", recipe, "--run-dir", str(run), *small, *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr)
    *_, last = read_metrics(run)
    return {name: last[name] for name in FIGURES}


def main(tiny: bool) -> dict[str, Any]:
    """The figures of each way."""
    real = not tiny and (FOLDER / "config.json").is_file()
    ways = ["object_store"] if tiny else ["object_store", "ipc"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for way in ways:
            on_gpu = [] if tiny else [*ON_GPU, f"weights.transfer={way}"]
            figures = ring("smollm2_sums" if real else "frozen_lake", Path(name) / way, on_gpu)
            found |= {f"{way}_{figure}": value for figure, value in figures.items()}
    return found


if __name__ == "__main__":
    print(json.dumps(main("--tiny" in sys.argv[1:])))
