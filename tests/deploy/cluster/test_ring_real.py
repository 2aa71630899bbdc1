"""One run as a person starts it: the command line, real Ray, two workers with a real vLLM each, on CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.config import run_folder
from deploy.report.metrics import read_metrics
from tests.deploy.small_run import assert_balanced, largest_lag, ledger, trained_rows

ROOT = Path(__file__).resolve().parents[3]

SMALL = (
    "steps=3", "tiny.layers=1", "tiny.width=32", "stages.0.source.episodes=64", "evaluation.tasks=16",
    "stages.0.optim.warmup_steps=2", "learner.optim.warmup_steps=0", "buffer.groups_per_step=8",
    "rollout.workers=2", "rollout.cpus_per_worker=0.5", "rollout.concurrent_groups=4", "rollout.group_size=4",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_on_ray_with_two_vllm_workers(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "deploy.cli",
        "train",
        "frozen_lake",
        *SMALL,
        "--output-dir",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    del environment["HF_HUB_DISABLE_PROGRESS_BARS"]  # the command sees to that itself
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, encoding="utf-8"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 3/3" in done.stdout and "report.html" in done.stdout

    (folder,) = tmp_path.iterdir()
    config = run_folder.open_existing(folder)
    assert_balanced(folder, config)
    workers = ledger(folder, "SELECT DISTINCT worker FROM groups WHERE state = 'trained' ORDER BY worker")
    assert workers == [("rollout-0",), ("rollout-1",)]
    assert {row["worker"] for row in trained_rows(folder)} == {"rollout-0", "rollout-1"}
    assert largest_lag(folder) <= config.buffer.max_lag

    # A sync ends with the version, every tensor's checksum and the probe's logprobs, or it ends the run.
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 <= row["probe_difference"] < 1e-4 and row["sync_stall_ms"] > 0 for row in rows)
    assert {version for row in trained_rows(folder) for version in row["versions"]} <= {0, 1, 2}

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 3
    assert summary["ledger"]["trained"] == summary["ledger"]["issued"] == 24
    for name in ("before", "after"):
        low, high = summary[f"success_{name}_interval"]
        assert 0 <= low <= summary[f"success_{name}"] <= high <= 1
