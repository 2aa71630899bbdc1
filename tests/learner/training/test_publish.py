"""Deltas of a learner's versions: what their holder makes of fifty of them is what was cast, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from learner.model.policy import Policy
from learner.settings import ModelSettings
from learner.training.publish import Staging, take_snapshot
from tests.bench.deltas import follow
from tests.smollm2 import FOLDER, needs_smollm2


def _require_exact(policy: Policy, most: float, folder: Path) -> None:
    first, *later = follow(policy, steps=50, rate=2e-5, folder=folder)
    assert first.exact and first.delta_bytes == first.whole_bytes, "the first version is sent whole"
    assert len(later) == 50
    assert all(sent.exact and sent.delta_bytes < most * sent.whole_bytes for sent in later)


def test_fifty_deltas_of_a_random_model_are_exact(tiny: Path, tmp_path: Path) -> None:
    _require_exact(Policy(ModelSettings(path=str(tiny))), 0.5, tmp_path)


@needs_smollm2
@pytest.mark.rare
@pytest.mark.timeout(900)
def test_fifty_deltas_of_a_pretrained_model_are_exact_and_a_small_part_of_it(tmp_path: Path) -> None:
    _require_exact(Policy(ModelSettings(path=str(FOLDER))), 0.1, tmp_path)


def test_without_a_version_before_or_where_every_word_changes_there_is_no_delta(tiny: Path) -> None:
    policy, staging = Policy(ModelSettings(path=str(tiny))), Staging()
    assert not take_snapshot(policy, 0, "float32", staging=staging, delta=True).base
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    moved = take_snapshot(policy, 1, "float32", staging=staging, delta=True)
    assert (moved.base, moved.differences) == ("", ())
    same = take_snapshot(policy, 2, "float32", staging=staging, delta=True)
    assert same.base == moved.manifest.digest
