from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.algorithm.schedule import OptimSettings
from learner.model.shared_files import Folder
from learner.settings import LearnerSettings, ModelSettings
from learner.stages.settings import SftSettings
from learner.training.checkpoint import (
    CheckpointError,
    best_version,
    latest,
    note_best,
    versions,
    whole,
)
from learner.training.checkpoint_writing import DiskFull
from learner.training.learner import Learner
from rollout.wire.trajectory import Group
from tests.learner.staged import learned

Groups = Callable[..., Group]


def _learner(tiny: Path) -> Learner:
    optim = OptimSettings(learning_rate=3e-3, warmup_steps=3, weight_decay=0.01)
    return Learner(
        LearnerSettings(model=ModelSettings(path=str(tiny)), optim=optim, tokens_per_microbatch=40),
        stages=[SftSettings(), SftSettings()],
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


def test_the_order_of_a_stages_episodes_is_resumed_too(tmp_path: Path, tiny: Path, group_of: Groups) -> None:
    groups = [group_of(g, [1.0, 1.0]) for g in range(3)]
    first = _learner(tiny)
    learned(first, groups)
    first.save(tmp_path)
    resumed = _learner(tiny)
    resumed.load(tmp_path)
    assert learned(resumed, groups, 1) == learned(first, groups, 1)


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


def _flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (
            lambda folder: (folder / "optimizer.safetensors").write_bytes(b"short"),
            r"optimizer.safetensors has 5 of \d+ bytes",
        ),
        (lambda folder: (folder / "model" / "config.json").unlink(), "model/config.json has 0 of"),
        (
            lambda folder: _flip(folder / "model" / "model.safetensors", -100),
            "model/model.safetensors has changed",
        ),
        (
            lambda folder: _flip(folder / "optimizer.safetensors", -100),
            "optimizer.safetensors has changed",
        ),
        (
            lambda folder: _flip(folder / "optimizer.safetensors.blocks", 20),
            "optimizer.safetensors.blocks has changed",
        ),
        (
            lambda folder: (folder / "state.json").write_text(
                (folder / "state.json").read_text(encoding="utf-8").replace('"version": 1', '"version": 7'),
                encoding="utf-8",
            ),
            "state.json has changed",
        ),
        (
            lambda folder: (folder / "state.json").write_text("{", encoding="utf-8"),
            "state.json is missing or unreadable",
        ),
    ],
)
def test_a_broken_one_is_named_and_set_aside_and_the_one_before_is_used(
    tmp_path: Path,
    tiny: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], object],
    what: str,
) -> None:
    assert latest(tmp_path) is None
    learner = _learner(tiny)
    good = learner.save(tmp_path)
    learner.version = 1
    bad = learner.save(tmp_path)
    (tmp_path / "checkpoints" / ".partial-version-00000002").mkdir()
    assert latest(tmp_path) == bad
    spoil(bad)
    with pytest.raises(CheckpointError, match=rf"^checkpoint .* is broken: {what}[^\n]*$"):
        whole(tmp_path, 1)
    resumed = _learner(tiny)
    resumed.version = 5
    resumed.load(tmp_path)
    assert resumed.version == 0
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "learner.training.checkpoint"]
    assert str(bad) in warning
    assert not bad.exists()
    assert bad.with_name(f".broken-{bad.name}").is_dir()
    assert latest(tmp_path) == good


def test_a_checkpoint_on_its_way_is_none_and_holds_what_was_when_it_was_begun(
    tmp_path: Path, tiny: Path, group_of: Groups
) -> None:
    learner = _learner(tiny)
    good = learner.save(tmp_path)
    learner.step([group_of(0, [1.0, 0.0])])
    saving, then = learner.begin_save(tmp_path, {"next_group": 1}), _weights(learner)
    learner.step([group_of(1, [1.0, 0.0])])
    assert latest(tmp_path) == good
    saving.land()
    resumed = _learner(tiny)
    assert resumed.load(tmp_path) == {"next_group": 1} and resumed.version == 1
    assert all(torch.equal(tensor, then[name]) for name, tensor in _weights(resumed).items())
    resumed.step([group_of(1, [1.0, 0.0])])
    assert all(torch.equal(tensor, _weights(resumed)[name]) for name, tensor in _weights(learner).items())


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path: Path, tiny: Path) -> None:
    root = tmp_path / "checkpoints"
    for name in (".partial-version-00000004", ".removed-version-00000002"):
        (root / name / "model").mkdir(parents=True)
    _learner(tiny).save(tmp_path)
    assert [path.name for path in root.iterdir()] == ["version-00000000"]


def _by_the_system(folder: Path) -> None:
    (folder / "config.json").write_text("{}", encoding="utf-8")
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def _by_safetensors(folder: Path) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("write_model", [_by_the_system, _by_safetensors])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    tmp_path: Path, tiny: Path, write_model: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = _learner(tiny)
    good = learner.save(tmp_path)
    learner.version = 1
    monkeypatch.setattr(learner.policy, "folders", lambda: {"": Folder([], write_model)})
    with pytest.raises(
        DiskFull, match=r"^no room for a checkpoint in .* GB are free .* GB are wanted$"
    ) as full:
        learner.save(tmp_path)
    assert str(good.parent) in str(full.value)
    assert list(good.parent.iterdir()) == [good]
    assert latest(tmp_path) == good


def test_another_failure_is_not_taken_for_a_full_disk(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "no")

    learner = _learner(tiny)
    monkeypatch.setattr(learner.policy, "folders", lambda: {"": Folder([], denied)})
    with pytest.raises(PermissionError):
        learner.save(tmp_path)


def test_a_run_without_checkpoints_is_one_line(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        _learner(tiny).load(tmp_path)


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path, tiny: Path, group_of: Groups) -> None:
    learner, values = _learner(tiny), [0.25, 0.75, 0.5, 0.75, 0.5]
    for version, value in enumerate(values):
        learner.save(tmp_path, keep=1)
        note_best(tmp_path, version, "eval_success", value)
        learner.step([group_of(version, [1.0, 0.0])])
    assert best_version(tmp_path) == 1, "an equal one later is not better"
    assert versions(tmp_path) == [1, 4]
    assert note_best(tmp_path, 4, "eval_reward", -3.0), "values of another metric are not compared"
    assert note_best(tmp_path, 4, "eval_reward", -4.0), (
        "a version that is evaluated again counts by its new value"
    )
    (tmp_path / "checkpoints" / "best.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"best\.json: broken file"):
        best_version(tmp_path)
