"""Make a Hugging Face folder of a model from anywhere: a GGUF file, an id of the hub, another folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from deploy.commands.export import fresh_folder
from deploy.config.config_errors import ConfigError
from deploy.run.model_checks import check_model
from learner.model.source import FILES, write_gguf
from rollout.wire.model_folder import ModelDamaged, ModelMissing, files


def fetch_model(model: str, target: Path) -> int:
    """Write `target`, a folder of float32 or the model's own safetensors; returns its bytes.

    model: as `learner.model.source.local_model` takes it. ConfigError, one line, for a model that is not there, not
    whole or not readable: nothing is left of it.
    """
    with fresh_folder(target) as partial:
        if model.endswith(".gguf"):  # converted in place: the cache needs no second copy
            try:
                write_gguf(Path(model).expanduser(), partial)
            except (ModelMissing, ModelDamaged) as error:
                raise ConfigError(str(error)) from error
        else:
            _copy(Path(check_model(model)), partial)
        check_model(str(partial))
        return sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())


def _copy(source: Path, target: Path) -> None:
    """Copy the files of a model; links of the hub's cache become files."""
    for name, file in files(source, FILES).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)
