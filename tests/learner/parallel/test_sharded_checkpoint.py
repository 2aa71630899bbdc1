"""Checkpoints that ranks write together: one layout, read by any number of ranks, each byte once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import learner.model.tensor_files as tensor_files
from learner.parallel.ranks import Ranks
from learner.training.checkpoint import latest
from learner.training.learner import Learner
from learner.training.publish import take_snapshot
from tests.families import build_family
from tests.learner.ranked import built, groups_of, own, plain
from tests.learner.together import together

RECIPE: dict[str, Any] = {"advantage": {"kind": "grpo"}}
# Adam's step is as large for a gradient of rounding's size as for any other: of its 1e-2 a hundredth.
ROUNDING = 1e-4


def made(ranks: Ranks, folder: Path, steps: int) -> Learner:
    learner = built(ranks, folder, RECIPE)
    for step in range(steps):
        learner.step(own(ranks, groups_of(step)))
    return learner


def saved(ranks: Ranks, folder: Path, run: Path, steps: int) -> list[Any]:
    """A learner that made so many steps and a checkpoint: its parameters."""
    learner = made(ranks, folder, steps)
    learner.save(run, {"step": steps}, keep=5)
    return plain(learner.policy.parameters())


def resumed(ranks: Ranks, folder: Path, run: Path) -> dict[str, Any]:
    """A learner that went on: what it held, the bytes that this rank read for it, what it published, its next step."""
    learner = built(ranks, folder, RECIPE)
    counted, read = [], tensor_files._read

    def counting(stream: Any, first: int, room: memoryview) -> None:
        counted.append(len(room))
        read(stream, first, room)

    tensor_files._read = counting
    cursor = learner.load(run)
    tensor_files._read = read
    held = plain(learner.policy.parameters())
    snapshot = take_snapshot(learner.policy, learner.version, "bfloat16")
    metrics = learner.step(own(ranks, groups_of(9)))
    return {
        "cursor": cursor,
        "held": held,
        "read": sum(counted),
        "published": [spec.checksum for spec in snapshot.manifest.tensors],
        "loss": metrics["loss"],
        "moved": plain(learner.policy.parameters()),
    }


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts whose vocabulary and experts no number of ranks divides."""
    folder = tmp_path_factory.mktemp("experts")
    build_family("Qwen3-30B-A3B", False, folder, num_experts=5, vocab_size=137)
    return folder


def _same(one: list[Any], other: list[Any], atol: float = 0.0) -> None:
    for left, right in zip(one, other, strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=atol)


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (1, 4), (2, 1)])
def test_experts_step_publish_save_and_go_on_with_another_number_of_ranks(
    before: int, after: int, experts: Path, tmp_path: Path
) -> None:
    wrote, *_ = together(before, saved, experts, tmp_path, 2)
    same = together(before, resumed, experts, tmp_path)
    other = together(after, resumed, experts, tmp_path)
    (alone,) = together(1, saved, experts, tmp_path / "alone", 2)
    _same(wrote, alone, atol=ROUNDING)
    for found in (*same, *other):
        assert found["cursor"] == {"step": 2}
        _same(found["held"], wrote)
        _same(found["moved"], same[0]["moved"], atol=ROUNDING)
        assert found["loss"] == pytest.approx(same[0]["loss"], abs=1e-5)
    assert other[0]["published"] == same[0]["published"]
    newest = latest(tmp_path)
    assert newest is not None
    data = sum(
        stored.rows(0, stored.shape[0] if stored.shape else 1).nbytes
        for file in newest.rglob("*.safetensors")
        for stored in tensor_files.tensors_in(file).values()
    )
    # Every rank reads the few numbers that are not sharded: the optimizer's step counts, torch's generator.
    assert data <= sum(found["read"] for found in same) < data + before * 6000


@pytest.mark.parametrize("size", [2, 4])
def test_the_files_are_the_same_for_any_number_of_ranks(size: int, experts: Path, tmp_path: Path) -> None:
    for ranks in (1, size):
        together(ranks, saved, experts, tmp_path / str(ranks), 0)
    one, other = (latest(tmp_path / str(ranks)) for ranks in (1, size))
    assert one is not None and other is not None
    for name in ("model/model.safetensors", "optimizer.safetensors", "model/config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_what_one_rank_finds_changed_sends_all_back_to_the_one_before(experts: Path, tmp_path: Path) -> None:
    before, *_ = together(2, saved, experts, tmp_path, 1)
    together(2, saved, experts, tmp_path, 2)
    newest = latest(tmp_path)
    assert newest is not None and newest.name == "version-00000002"
    file = newest / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-9000] ^= 1  # of the last rows of a moment, which rank 1 reads
    file.write_bytes(content)
    found = together(2, resumed, experts, tmp_path)
    assert [each["cursor"] for each in found] == [{"step": 1}] * 2
    _same(found[1]["held"], before)
    assert newest.with_name(".broken-version-00000002").is_dir()
