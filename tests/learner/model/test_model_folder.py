"""A model folder that is written holds the files its model came with, whatever a library says of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from learner.model.loading import ModelError
from learner.model.policy import Policy
from learner.settings import LearnerSettings, LoraSettings, ModelSettings
from learner.training.learner import Learner
from rollout.wire.model_folder import ModelMissing, pretrained


@pytest.fixture
def model(tmp_path: Path, tiny: Path) -> Path:
    """A folder that transformers loads, and would refuse to write, of two files; and a few that it does not know."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    edit(folder / "generation_config.json", do_sample=False, temperature=0.6, top_p=0.9)
    edit(folder / "config.json", temperature=0.7, of_our_own=[1])
    (folder / "preprocessor.py").write_text("raise SystemExit('never run')", encoding="utf-8")
    (folder / "LICENSE").write_text("as you like", encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text(
        "{{ messages[0].content }}", encoding="utf-8"
    )
    return folder


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder but weights and their checksums."""
    found = [file for file in folder.rglob("*") if file.is_file() and ".safetensors" not in file.suffixes]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def test_transformers_would_not_write_these_files(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"generation parameters|temperature"):
        AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "written")


def test_a_checkpoint_holds_the_files_its_model_came_with_to_the_byte(model: Path, tmp_path: Path) -> None:
    came = files(model)
    learner = Learner(LearnerSettings(model=ModelSettings(path=str(model))))
    weights = {name: tensor.clone() for name, tensor in learner.policy.named_weights()}
    shutil.rmtree(model)  # what is written was read before
    written = learner.save(tmp_path) / "model"
    assert files(written) == came
    loaded = AutoModelForCausalLM.from_pretrained(written)
    assert all(torch.equal(loaded.get_parameter(name), tensor) for name, tensor in weights.items())


def test_so_does_a_folder_of_merged_weights(model: Path, tmp_path: Path) -> None:
    settings = ModelSettings(path=str(model), lora=LoraSettings(rank=2, alpha=4))
    Policy(settings).save(tmp_path / "merged")
    adapter = {"adapter/adapter_config.json"}
    assert {
        name: content for name, content in files(tmp_path / "merged").items() if name not in adapter
    } == files(model)


def test_a_configuration_says_of_what_type_the_weights_beside_it_are(model: Path, tmp_path: Path) -> None:
    edit(model / "config.json", dtype="bfloat16")
    Policy(ModelSettings(path=str(model))).save(tmp_path / "written")
    said = json.loads((tmp_path / "written" / "config.json").read_text(encoding="utf-8"))
    assert said == json.loads((model / "config.json").read_text(encoding="utf-8")) | {"dtype": "float32"}


def test_code_that_came_with_a_model_is_neither_run_nor_asked_about(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(model / "config.json", model_type="unheard_of", auto_map={"AutoConfig": "preprocessor.Config"})
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked on standard input"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        pretrained(AutoConfig, str(model))
    with pytest.raises(ModelError, match="cannot be loaded"):
        Policy(ModelSettings(path=str(model)))


def test_a_folder_that_is_gone_is_no_malformed_id(tmp_path: Path) -> None:
    gone = str(tmp_path / "runs" / "mine" / "base")
    with pytest.raises(ModelMissing, match=f"model {gone}: no such folder"):
        pretrained(AutoTokenizer, gone)
    with pytest.raises(ModelError, match="no such folder"):
        Policy(ModelSettings(path=gone))


def test_quantized_weights_are_refused(model: Path) -> None:
    edit(model / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelError, match="quantized"):
        Policy(ModelSettings(path=str(model)))
