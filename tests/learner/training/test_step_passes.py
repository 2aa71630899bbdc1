"""A step computes its rows as often as is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.data.batch import MicroBatch
from learner.model import policy
from learner.parallel.ranks import ALONE
from learner.parallel.traffic import Passes
from learner.training.step_passes import passes_of
from tests.families import build_family
from tests.learner import ranked
from tests.learner.ranked import built, groups_of

GAE: dict[str, Any] = {"advantage": {"kind": "gae"}}
TURNS: dict[str, Any] = {"advantage": {"kind": "turns"}}
SEVERAL = {"epochs": 3, "minibatches": 2, "proximal": "learner"}
KL = {"kl": {"coefficient": 0.1}}


@pytest.mark.parametrize(
    ("recipe", "balance"),
    [
        ({}, 0.0),
        (SEVERAL | KL, 0.01),
        (SEVERAL | GAE | {"critic": {"kind": "own"}}, 0.0),
        (SEVERAL | GAE | {"critic": {"kind": "shared"}}, 0.0),
        (TURNS | {"critic": {"kind": "turns", "passes": 3, "minibatches": 2, "trust": 0.0}}, 0.0),
        ({"epochs": 2, "distill": {}}, 0.0),
        ({"epochs": 2, "distill": {"divergence": "reverse"}}, 0.0),
    ],
    ids=["plain", "reference, balance", "own", "shared", "turns", "sampled teacher", "teacher"],
)
def test_a_step_computes_its_row_as_often_as_is_told(
    recipe: dict[str, Any], balance: float, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranked, "LIMIT", 1000)  # everything is in one row
    folder = tiny
    if balance:
        build_family("Qwen3-30B-A3B", False, tmp_path)
        folder = tmp_path
    learner = built(ALONE, folder, {"skip_zero_advantage": False} | recipe, router_balance=balance)
    learner._begin()
    found, hidden_states = Counter[str](), policy.hidden_states
    teacher = learner._teacher and learner._teacher.policy.model

    def counted(model: Any, *given: Any, **named: Any) -> Any:
        taught = model is teacher
        found["taught" if taught else "trained" if torch.is_grad_enabled() else "scored"] += 1
        return hidden_states(model, *given, **named)

    def summing(self: policy.Policy, rows: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        found["summed"] += 1
        return passes(self, rows)

    passes = policy.Policy.passes
    monkeypatch.setattr(policy.Policy, "passes", summing)
    monkeypatch.setattr(policy, "hidden_states", counted)
    learner.step(groups_of(0))
    told = passes_of(learner.settings, 1)
    assert told == Passes(found["trained"], found["scored"], told.valued, found["taught"], found["summed"])
