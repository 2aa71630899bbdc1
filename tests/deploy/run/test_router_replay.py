"""A run that replays its engine's routing: what is stored, and what a resumed run ends with."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.report.metrics import read_metrics
from rollout.buffer.segments import read_rows
from tests.deploy.small_run import Stopped, configured, same_bits, train, trained_rows, with_experts


def test_a_resumed_run_replays_what_it_has_stored(tmp_path: Path) -> None:
    mixture = ("tiny=", "learner.model.dtype=float32", f"learner.model.path={with_experts(tmp_path)}")
    config = configured(
        "steps=3",
        "evaluation.tasks=2",
        *mixture,
        "learner.model.router_replay=true",
        "engine.kind=transformers",
    )
    train(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, tmp_path / "resumed", stop_after=2)
    train(config, tmp_path / "resumed", resume=True)
    assert same_bits(tmp_path / "whole", tmp_path / "resumed")
    rows = trained_rows(tmp_path / "whole")
    for row in rows:
        tokens = len(row["prompt_ids"]) + len(row["action_ids"])
        experts = row["routed_experts"]
        assert len(experts) == 2 * tokens  # one layer, two experts a token
        assert experts[:2] == bytes(2)  # every turn begins a segment
        pairs = {frozenset(experts[place : place + 2]) for place in range(2, 2 * tokens, 2)}
        assert all(len(pair) == 2 and max(pair) < 4 for pair in pairs)
    assert len({row["routed_experts"] for row in rows}) > 3
    assert len(read_metrics(tmp_path / "resumed")) == 3
    evaluated, *_ = (tmp_path / "whole" / "evaluations").glob("*/segment-*.arrows")
    experts_of_turns = read_rows(evaluated.parent)["routed_experts"]
    assert experts_of_turns.null_count == len(experts_of_turns) > 0, "nothing is learned from an evaluation"
