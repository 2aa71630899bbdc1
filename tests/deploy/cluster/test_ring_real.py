"""Runs as a person starts them: the command line, real Ray, real vLLM on CPU; a tiny model, and a real one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from deploy.config import run_folder
from deploy.report.metrics import read_metrics
from tests.deploy.small_run import assert_balanced, largest_lag, ledger, trained_rows
from tests.smollm2 import FOLDER, needs_smollm2

ROOT = Path(__file__).resolve().parents[3]

SMALL = (
    "steps=3", "tiny.layers=1", "tiny.width=32", "stages.0.source.episodes=64", "evaluation.tasks=16",
    "stages.0.optim.warmup_steps=2", "learner.optim.warmup_steps=0", "buffer.groups_per_step=8",
    "rollout.workers=2", "rollout.cpus_per_worker=0.5", "rollout.concurrent_groups=4", "rollout.group_size=4",
)  # fmt: skip
SMOLLM2 = (
    "steps=2", "evaluation.tasks=8", "buffer.groups_per_step=4", "rollout.group_size=4",
    f"learner.model.path={FOLDER}", "learner.optim.warmup_steps=0",
)  # fmt: skip


def train(folder: Path, recipe: str, *options: str) -> Path:
    """Run `manta train` to its end; returns the run's folder."""
    command = [sys.executable, "-m", "deploy.cli", "train", recipe, *options, "--output-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    del environment["HF_HUB_DISABLE_PROGRESS_BARS"]  # the command sees to that itself
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, encoding="utf-8"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "report.html" in done.stdout
    (run,) = folder.iterdir()
    return run


@needs_smollm2
@pytest.mark.slow
def test_a_pretrained_model_is_trained_on_a_dataset(tmp_path: Path) -> None:
    folder = train(tmp_path, "smollm2_sums", *SMOLLM2)
    config = run_folder.open_existing(folder)
    assert_balanced(folder, config)
    assert largest_lag(folder) <= config.buffer.max_lag
    rows = trained_rows(folder)
    assert {row["env_id"] for row in rows} == {"dataset"}
    assert {version for row in rows for version in row["versions"]} <= {0, 1}
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    for (
        row
    ) in rows:  # what the model saw and said, by its own tokenizer and template; what that is worth, by hand
        messages = json.loads(row["observation"])
        template = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(row["prompt_ids"]) == template
        assert tokenizer.decode(row["action_ids"], skip_special_tokens=True) == row["action"]
        total = sum(map(int, re.findall(r"\d+", messages[0]["content"])))
        numbers = re.findall(r"\d+", row["action"])
        assert row["reward"] == 1.0 or numbers != [str(total)]
        assert row["reward"] == 0.0 or str(total) in numbers
    metrics = read_metrics(folder)
    assert [row["step"] for row in metrics] == [1, 2]
    for version, step in enumerate(metrics):  # there is a gradient where siblings were not rewarded alike
        taken = [row for row in rows if row["taken_version"] == version]
        rewards = {(row["group_id"], row["reward"]) for row in taken}
        assert (step["grad_norm"] > 0) == (len(rewards) > len({row["group_id"] for row in taken}))
        assert step["sync_stall_ms"] > 0
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert 0 <= summary["success_before"] <= 1 and 0 <= summary["success_after"] <= 1


@pytest.mark.rare
@pytest.mark.slow
def test_a_run_on_ray_with_two_vllm_workers(tmp_path: Path) -> None:
    folder = train(tmp_path, "frozen_lake", *SMALL)
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
