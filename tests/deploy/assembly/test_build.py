"""Parts made from a model's files: what cannot be read of them is told in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deploy.assembly.build import load_chat
from deploy.assembly.models import model_path
from deploy.config.config_errors import ConfigError
from tests.deploy.small_run import configured


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_models_damaged_file_is_one_line(reference: Path, tmp_path: Path, name: str) -> None:
    model = shutil.copytree(reference / "base", tmp_path / "model")
    whole = (model / name).read_bytes()
    (model / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=f"model {model}: one of its files cannot be read: .*") as refused:
        load_chat(str(model))
    assert "\n" not in str(refused.value)


def test_a_run_does_not_go_on_over_another_tokenizer(reference: Path, tmp_path: Path) -> None:
    model = shutil.copytree(reference / "base", tmp_path / "model")
    config = configured("tiny=", f"learner.model.path={model}")
    (run := tmp_path / "run").mkdir()
    assert model_path(config, run) == model_path(config, run) == str(model)
    file = model / "tokenizer_config.json"
    whole = file.read_text(encoding="utf-8")
    for other in (whole + "\n", None):
        file.unlink() if other is None else file.write_text(other, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"tokenizer_config\.json has changed since this run began"):
            model_path(config, run)
    file.write_text(whole, encoding="utf-8")
    assert model_path(config, run) == str(model)
