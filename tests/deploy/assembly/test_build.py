"""Parts made from a model's files: what cannot be read of them is told in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deploy.assembly.build import load_chat
from deploy.config.config_errors import ConfigError


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_models_damaged_file_is_one_line(reference: Path, tmp_path: Path, name: str) -> None:
    model = shutil.copytree(reference / "base", tmp_path / "model")
    whole = (model / name).read_bytes()
    (model / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=f"model {model}: a file of it cannot be read: .*") as refused:
        load_chat(str(model))
    assert "\n" not in str(refused.value)
