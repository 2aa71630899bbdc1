from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.commands.export import export_model
from deploy.config.config_errors import ConfigError
from learner.model.policy import Policy
from learner.settings import ModelSettings
from learner.training.checkpoint import CheckpointError, latest, newest_version
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
    algorithm = "{ advantage = { kind = 'gae' }, critic = { kind = 'shared' }, skip_zero_advantage = false }"
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
    assert (target / "config.json").read_text(encoding="utf-8") == (plain / "config.json").read_text(
        encoding="utf-8"
    )


def test_an_export_overwrites_nothing_and_names_the_versions_there_are(
    reference: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        export_model(reference, tmp_path)
    with pytest.raises(ConfigError, match=r"no checkpoint of version 1; stored versions: 2, 4"):
        export_model(reference, tmp_path / "model", version=1)
    with pytest.raises(ConfigError, match="not a run folder"):
        export_model(tmp_path, tmp_path / "model")


def resealed(checkpoint: Path, **changes: object) -> None:
    """state.json as somebody writes it who knows how its seal is made."""
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8")) | changes
    rest = {name: value for name, value in state.items() if name != "seal"}
    seal = blake3(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (checkpoint / "state.json").write_text(json.dumps(state | {"seal": seal}), encoding="utf-8")


def test_an_export_holds_what_was_written_with_the_checkpoint_and_nothing_else(
    reference: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(reference, tmp_path / "run")
    newest = latest(run)
    assert newest is not None
    (newest / "model" / "extra.py").write_text("added later", encoding="utf-8")
    (newest / "model" / "secret").symlink_to("/etc/hostname")
    os.mkfifo(newest / "model" / "pipe")
    export_model(reference, tmp_path / "plain")
    export_model(run, tmp_path / "model")
    names = [{path.name for path in (tmp_path / each).rglob("*")} for each in ("plain", "model")]
    assert names[0] == names[1]


@pytest.mark.parametrize("what", ["device", "parent", "link", "pipe", "linked folder"])
def test_a_checkpoint_that_names_what_is_not_its_own_file_is_broken(
    what: str, reference: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(reference, tmp_path / "run")
    newest = run / "checkpoints" / "version-00000004"
    files = json.loads((newest / "state.json").read_text(encoding="utf-8"))["files"]
    empty = {"size": 0, "blake3": blake3().hexdigest()}
    if what == "device":
        resealed(newest, files=files | {"/dev/zero": empty})
    elif what == "parent":
        resealed(newest, files=files | {"../../config.json": empty})
    elif what == "link":
        (newest / "model" / "endless").symlink_to("/dev/zero")
        resealed(newest, files=files | {"model/endless": empty})
    elif what == "pipe":
        os.mkfifo(newest / "model" / "pipe")
        resealed(newest, files=files | {"model/pipe": empty})
    else:
        (newest / "model").rename(tmp_path / "elsewhere")
        (newest / "model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is broken") as refused:
        export_model(run, tmp_path / "model", version=4)
    assert "\n" not in str(refused.value)
    assert export_model(run, tmp_path / "before") == 2, "the one before it is whole"


@pytest.mark.parametrize(
    "state", ["[]", "[" * 100_000, '{"seal": 1}', '{"version": 4, "files": 7, "seal": ""}']
)
def test_a_state_that_is_none_is_broken(state: str, reference: Path, tmp_path: Path) -> None:
    run = shutil.copytree(reference, tmp_path / "run")
    (run / "checkpoints" / "version-00000004" / "state.json").write_text(state, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"state\.json"):
        export_model(run, tmp_path / "model", version=4)


def test_a_checkpoint_under_another_name_is_broken(reference: Path, tmp_path: Path) -> None:
    run = shutil.copytree(reference, tmp_path / "run")
    folder = run / "checkpoints"
    (folder / "version-00000004").rename(folder / "version-00000099")
    with pytest.raises(CheckpointError, match="is of version 4"):
        export_model(run, tmp_path / "model", version=99)
    assert newest_version(run) == 2
