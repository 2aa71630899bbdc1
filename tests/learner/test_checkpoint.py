from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.checkpoint import CheckpointError, latest, load
from learner.learner import Learner, LearnerSettings
from learner.model import ModelSettings
from learner.optim import OptimSettings
from rollout.wire.trajectory import Group

Groups = Callable[..., Group]


def _learner(tiny: Path) -> Learner:
    optim = OptimSettings(learning_rate=3e-3, warmup_steps=3, weight_decay=0.01)
    return Learner(
        LearnerSettings(model=ModelSettings(path=str(tiny)), optim=optim, tokens_per_microbatch=40)
    )


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.policy.named_weights()}


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    tmp_path: Path, tiny: Path, group_of: Groups
) -> None:
    batches = [[group_of(10 * s + g, [1.0, 0.0, 0.0]) for g in range(2)] for s in range(4)]
    straight = _learner(tiny)
    expected = [straight.step(groups) for groups in batches]
    first = _learner(tiny)
    for groups in batches[:2]:
        first.step(groups)
    first.save(tmp_path, {"next_group": 20})
    resumed = _learner(tiny)
    assert resumed.load(tmp_path) == {"next_group": 20}
    assert resumed.version == 2
    assert [resumed.step(groups) for groups in batches[2:]] == expected[2:]
    for name, tensor in _weights(straight).items():
        assert torch.equal(tensor, _weights(resumed)[name]), name


def test_the_order_of_imitation_is_resumed_too(tmp_path: Path, tiny: Path, group_of: Groups) -> None:
    groups = [group_of(g, [1.0, 1.0]) for g in range(3)]
    first = _learner(tiny)
    list(first.imitate(groups))
    first.save(tmp_path)
    resumed = _learner(tiny)
    resumed.load(tmp_path)
    assert list(resumed.imitate(groups)) == list(first.imitate(groups))


def test_a_checkpoint_is_a_hugging_face_model_with_its_tokenizer(tmp_path: Path, tiny: Path) -> None:
    learner = _learner(tiny)
    folder = learner.save(tmp_path) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in learner.policy.named_weights():
        assert torch.equal(model.get_parameter(name), tensor)
    assert (
        AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(tiny).get_vocab()
    )


def test_only_the_last_ones_are_kept(tmp_path: Path, tiny: Path) -> None:
    learner = _learner(tiny)
    for version in (1, 2, 2, 10):
        learner.version = version
        learner.save(tmp_path, keep=2)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["version-00000002", "version-00000010"]


def test_unfinished_ones_are_ignored_and_broken_ones_named(
    tmp_path: Path, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert latest(tmp_path) is None
    learner = _learner(tiny)
    good = learner.save(tmp_path)
    learner.version = 1
    bad = learner.save(tmp_path)
    (tmp_path / "checkpoints" / ".partial-version-00000002").mkdir()
    (bad / "optimizer.pt").write_bytes(b"short")
    assert latest(tmp_path) == good
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "learner.checkpoint"]
    assert str(bad) in warning
    assert "optimizer.pt has 5 of" in warning
    with pytest.raises(CheckpointError, match=r"^checkpoint .* is broken: [^\n]*$"):
        load(bad)


def test_an_optimizer_file_that_does_not_load_is_one_line(tmp_path: Path, tiny: Path) -> None:
    folder = _learner(tiny).save(tmp_path)
    file = folder / "optimizer.pt"
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"^checkpoint .* is broken: optimizer.pt: [^\n]*$"):
        load(folder)


def test_a_run_without_checkpoints_is_one_line(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        _learner(tiny).load(tmp_path)
