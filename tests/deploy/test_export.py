from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.config import ConfigError
from deploy.export import export_model
from learner.checkpoint import latest
from learner.model import Policy
from learner.settings import ModelSettings
from tests.deploy.small_run import configured, train


def test_an_export_is_a_model_that_transformers_loads(reference: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    assert export_model(reference, target) == 4
    ids = AutoTokenizer.from_pretrained(target)("left right", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)(ids).logits[0, :-1]
    dense = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
    newest = latest(reference)
    learner = Policy(ModelSettings(path=f"{newest}/model")).score_ids(ids[0].tolist())
    assert abs(dense - learner).max() < 1e-5


def test_a_value_head_is_neither_published_nor_exported(reference: Path, tmp_path: Path) -> None:
    # Engines compare names and checksums with their checkpoint's: a run with the head in them would not get here.
    algorithm = "{ credit = { kind = 'gae' }, critic = { kind = 'shared' }, skip_zero_advantage = false }"
    run, target, plain = tmp_path / "run", tmp_path / "model", tmp_path / "plain"
    train(configured(f"learner.algorithm={algorithm}", "steps=2"), run)
    assert export_model(run, target) == 2
    newest = latest(run)
    assert newest is not None and (newest / "critic" / "head.safetensors").is_file()
    export_model(reference, plain)
    assert {path.name for path in target.iterdir()} == {path.name for path in plain.iterdir()}
    shapes = [
        {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
        for folder in (target, plain)
    ]
    assert shapes[0] == shapes[1]
    assert (target / "config.json").read_text() == (plain / "config.json").read_text()


def test_an_export_overwrites_nothing_and_names_the_versions_there_are(
    reference: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is there already"):
        export_model(reference, tmp_path)
    with pytest.raises(ConfigError, match=r"no checkpoint of version 1; versions kept: 2, 4"):
        export_model(reference, tmp_path / "model", version=1)
    with pytest.raises(ConfigError, match="not a run folder"):
        export_model(tmp_path, tmp_path / "model")
