"""Two checkpoints that the command plays, and compares task by task."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.training.checkpoint import MODEL, latest
from rollout.buffer.segments import read_rows
from tests.deploy.command import Manta, command

TASKS = 12


@pytest.fixture(scope="module")
def run(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose recipe names the transformers engine."""
    folder = shutil.copytree(reference, tmp_path_factory.mktemp("compared") / "run")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["engine"] = {"kind": "transformers"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def manta(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Manta:
    return command(monkeypatch, capsys)


def solved(folder: Path) -> dict[int, bool]:
    """Whether each task's episode succeeded."""
    ends = [row for row in read_rows(folder).to_pylist() if row["end_reason"]]
    assert len(ends) == TASKS
    return {row["seed"]: bool(row["success"]) for row in ends}


@torch.no_grad()
def require_played_by(model: Path, folder: Path, greedy: bool) -> None:
    """Every stored token and logprob is this model's, by transformers alone."""
    scorer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows: list[dict[str, Any]] = read_rows(folder).to_pylist()
    for row in rows:
        prompt, action = row["prompt_ids"], row["action_ids"]
        logprobs_TV = scorer(torch.tensor([prompt + action])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        if greedy:
            assert action == logprobs_TV.argmax(-1).tolist()
        known = logprobs_TV.gather(1, torch.tensor(action)[:, None])[:, 0]
        np.testing.assert_allclose(row["behavior_logprobs"], known, atol=1e-4)


@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
def test_two_checkpoints_play_the_same_tasks_and_are_compared_by_what_is_stored(
    greedy: bool, run: Path, manta: Manta, tmp_path: Path
) -> None:
    limits = ("--seeds", f"0:{TASKS}", *(("--temperature", "0") if greedy else ()))
    out = tmp_path / "out"
    code, said, err = manta("eval", str(run), "--compare", str(run / "base"), *limits, "--out", str(out))
    assert (code, err) == (0, "")
    newest = latest(run)
    assert newest is not None
    require_played_by(newest / MODEL, out, greedy)
    require_played_by(run / "base", out / "compared", greedy)
    first, second = solved(out), solved(out / "compared")
    assert first.keys() == second.keys()
    begun = [
        {row["seed"]: row for row in read_rows(folder).to_pylist() if row["turn"] == 0}
        for folder in (out, out / "compared")
    ]
    for seed in first:
        assert begun[0][seed]["prompt_ids"] == begun[1][seed]["prompt_ids"]
    assert any(begun[0][seed]["action_ids"] != begun[1][seed]["action_ids"] for seed in first)

    found = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    won = sum(first[seed] > second[seed] for seed in first)
    lost = sum(first[seed] < second[seed] for seed in first)
    flips = [abs(sum(signs)) >= abs(won - lost) for signs in product((1, -1), repeat=won + lost)]
    assert (found["tasks"], found["unpaired"], found["won"], found["lost"]) == (TASKS, 0, won, lost)
    assert found["p_value"] == pytest.approx(np.mean(flips), abs=1e-12)
    assert found["success"]["difference"] == pytest.approx((won - lost) / TASKS)
    low, high = found["success"]["interval"]
    assert low <= (won - lost) / TASKS <= high
    assert f"{run} against {run / 'base'}:" in said and f"{won} won and {lost} lost" in said

    # Read back, it is the same comparison; alone, the other checkpoint plays the very same episodes.
    code, again, _ = manta("eval", str(out), "--compare", str(out / "compared"))
    assert code == 0 and again.splitlines()[-3:] == said.splitlines()[-3:]
    alone = tmp_path / "alone"
    assert manta("eval", str(run / "base"), *limits, "--out", str(alone))[0] == 0
    assert solved(alone) == second
