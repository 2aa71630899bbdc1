"""Make a Hugging Face folder of a model from anywhere: a GGUF file, an id of the hub, another folder."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deploy.commands.export import fresh_folder
from deploy.config.config_errors import ConfigError
from deploy.run.preflight import check_model
from rollout.wire.model_folder import COMPANIONS

_FILES = (*COMPANIONS, "*.safetensors")


def fetch_model(model: str, target: Path) -> int:
    """Write `target`, a folder of float32 or the model's own safetensors; returns its bytes.

    model: a .gguf file, whose weights are dequantized to float32; a folder; or an id of the hub, "owner/name" with an
    optional "@revision", whose snapshot is downloaded whole. ConfigError, one line, for a model that is not there, not
    whole or not readable: nothing is left of it.
    """
    with fresh_folder(target) as partial:
        if model.endswith(".gguf"):
            _from_gguf(Path(model), partial)
        elif Path(model).is_dir():
            check_model(model)
            _copy(Path(model), partial)
        else:
            _from_hub(model, partial)
        check_model(str(partial))
        return sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())


def _from_gguf(file: Path, target: Path) -> None:
    """Dequantize a GGUF file, tokenizer and chat template included."""
    if not file.is_file():
        raise ConfigError(f"model {file}: no such file; check the path")
    if find_spec("gguf") is None:
        raise ConfigError(f"model {file}: reading GGUF needs the package gguf: pip install 'manta-rl[gguf]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        read: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"model {file} cannot be read: {str(error).splitlines()[0]}") from error
    # The weights are not quantized any more, and transformers refuses to save what it believes is.
    read.hf_quantizer = None
    read.is_quantized = False
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    read.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _from_hub(model: str, target: Path) -> None:
    """Download every file of a snapshot that a model needs; an interrupted download is no model."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    try:
        snapshot = snapshot_download(name, revision=revision or None, allow_patterns=list(_FILES))
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"model {model}: the hub cannot be reached, and no snapshot of it is here"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ConfigError(f"model {model}: {str(error).splitlines()[0]}") from error
    _copy(Path(snapshot), target)


def _copy(source: Path, target: Path) -> None:
    """Copy the files of a model; links of the hub's cache become files."""
    for pattern in _FILES:
        for file in source.glob(pattern):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
