"""Whole runs from a GGUF file and from an id of the hub: what plays and learns is that very model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.config import run_folder
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from learner.training.checkpoint import MODEL, latest
from rollout.buffer.segments import read_rows
from tests.deploy.small_run import RECIPE, assert_balanced
from tests.learner.model.test_source import NEWER, OLDER, snapshot, write_tiny_gguf
from tests.smollm2 import FOLDER, GGUF, PACKAGES, needs_smollm2

ROOT = Path(__file__).resolve().parents[3]
# A random model finds it out by half: siblings differ, so there is something to learn.
PAID = """
from envs.base import TextEnv

class Paid(TextEnv):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return f"say something {seed}", {}

    def step(self, action):
        return "", float(sum(map(ord, action)) % 2), True, False, {}
"""
SMALL = (
    "env={id='paid:Paid'}",
    "evaluation.options={}",
    "tiny=",
    "stages=[]",
    'engine={kind="transformers"}',
    "steps=2",
    "evaluation.tasks=2",
    "rollout.context_tokens=96",
    "sampling.max_tokens=4",
)


def train(home: Path, model: str, *overrides: str) -> Path:
    """`manta train --local` with caches of its own; returns the run's folder."""
    run = home / "run"
    (home / "paid.py").write_text(PAID, encoding="utf-8")
    command = [sys.executable, "-m", "deploy.cli", "train", RECIPE, "--local", "--run-dir", str(run)]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{PACKAGES}{os.pathsep}{home}",
        "HF_HOME": str(home),
        "MANTA_CACHE": str(home / "manta"),
    }
    done = subprocess.run(
        [*command, *SMALL, f"learner.model.path={model}", *overrides],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert "it/s]" not in done.stderr, "no bar of a library's beside the run's own display"
    assert_balanced(run, run_folder.open_existing(run))
    return run


@torch.no_grad()
def require_begun_with(model: Path, run: Path) -> None:
    """The first evaluation and the first step were played by this model with its tokenizer; training has moved it."""
    scorer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows: list[dict[str, Any]] = read_rows(run / "evaluations" / "before").to_pylist()
    rows += [row for row in read_rows(run / "groups").to_pylist() if set(row["versions"]) == {0}]
    assert len(rows) > 8
    for row in rows:
        prompt, action = row["prompt_ids"], row["action_ids"]
        (message,) = json.loads(row["observation"])
        assert message["content"] in tokenizer.decode(prompt)
        logprobs_TV = scorer(torch.tensor([prompt + action])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        known = logprobs_TV.gather(1, torch.tensor(action)[:, None])[:, 0]
        np.testing.assert_allclose(row["behavior_logprobs"], known, atol=1e-3)
    newest = latest(run)
    assert newest is not None
    before = load_file(model / "model.safetensors")
    after = load_file(newest / MODEL / "model.safetensors")
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) / 2


@pytest.mark.slow
@needs_smollm2
def test_a_run_from_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PACKAGES)
    written = write_tiny_gguf(file := tmp_path / "tiny.gguf", seed=0, context=128)
    run = train(tmp_path, str(file))
    (folder,) = [each for each in (tmp_path / "manta" / "models").iterdir() if each.is_dir()]
    assert all(
        torch.equal(written.get_parameter(name), tensor)
        for name, tensor in load_file(folder / "model.safetensors").items()
    )
    require_begun_with(folder, run)


@pytest.mark.slow
def test_a_run_from_an_id_of_the_hub_of_which_there_is_a_snapshot(tmp_path: Path) -> None:
    for commit, seed in ((OLDER, 1), (NEWER, 2)):
        folder = tmp_path / f"tiny-{seed}"
        build_tiny(folder, build_tokenizer(folder, ("left", "down")), layers=1, width=32, heads=2, seed=seed)
        snapshot(tmp_path, folder, commit)
    run = train(tmp_path, "somebody/tiny")
    named = json.loads((run / "model.json").read_text(encoding="utf-8"))["@"]
    assert named == f"somebody/tiny@{NEWER}"
    require_begun_with(tmp_path / "tiny-2", run)
    shutil.rmtree(run)
    require_begun_with(tmp_path / "tiny-1", train(tmp_path, f"somebody/tiny@{OLDER}", "steps=1"))


@pytest.mark.rare
@pytest.mark.slow
@needs_smollm2
@pytest.mark.timeout(600)
def test_a_run_from_the_gguf_file_of_the_real_smollm2(tmp_path: Path) -> None:
    few = ("steps=1", "evaluation.tasks=1", "learner.optim.learning_rate=1e-5")
    run = train(tmp_path, str(GGUF), *few, "rollout.context_tokens=160")
    require_begun_with(FOLDER, run)
