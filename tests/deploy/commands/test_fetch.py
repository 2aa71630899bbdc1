"""manta fetch: a whole model folder of what is named, or one line and nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from deploy.commands.fetch import fetch_model
from deploy.config.config_errors import ConfigError
from learner.model import source as model_source


def test_a_folder_is_copied_with_what_a_model_needs(reference: Path, tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    for file in (reference / "base").iterdir():
        (source / file.name).symlink_to(file)  # as the hub's cache holds them
    (source / "optimizer.pt").write_bytes(b"not a model's")
    size = fetch_model(str(source), tmp_path / "out")
    copied = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if not file.is_symlink()}
    assert copied == {file.name: file.read_bytes() for file in (reference / "base").iterdir()}
    assert size == sum(map(len, copied.values()))


def test_a_model_that_is_not_whole_leaves_nothing(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source := tmp_path / "source").mkdir()
    for file in (reference / "base").iterdir():
        content = file.read_bytes()
        (source / file.name).write_bytes(content[:100] if file.suffix == ".safetensors" else content)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(
        model_source, "find_spec", lambda name: None if name == "gguf" else importlib.util.find_spec(name)
    )
    for model, told in (
        (str(source), "broken file"),
        ("nobody/has-this-model", "the hub cannot be reached, and no snapshot of it is here"),
        (str(tmp_path / "none.gguf"), "no such file"),
        (str(tmp_path / "model.gguf"), r"needs the package gguf: pip install 'manta-rl\[gguf\]'"),
        ("a/b/c", "a/b/c"),
    ):
        with pytest.raises(ConfigError, match=told) as refused:
            fetch_model(model, tmp_path / "out")
        assert "\n" not in str(refused.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "source"]


def test_a_folder_that_is_there_is_kept(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        fetch_model(str(reference / "base"), tmp_path)
