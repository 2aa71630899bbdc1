"""Whether a model's folder is whole: configuration, tokenizer, and every tensor that its index of weights lists."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rollout.wire.model_folder import ModelDamaged

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")
_NEEDED = (
    (("config.json",), "configuration"),
    (("tokenizer_config.json",), "tokenizer"),
    (_VOCABULARIES, "vocabulary"),
)


def require_whole(folder: Path, name: str = "") -> None:
    """ModelDamaged, one line, for a folder without one of the files that a model consists of, or with a broken one.

    name: the model's name in the error, if it differs from the folder. Weights are safetensors: one file, or several
    with an index. Only their headers are read.
    """
    named = name or str(folder)
    dangling = [file.name for file in sorted(folder.glob("*")) if not file.exists()]
    if dangling:
        raise ModelDamaged(
            f"model {named}: {dangling[0]} is a link to a file that is not there; download it again"
        )
    for patterns, what in _NEEDED:
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise ModelDamaged(
                f"model {named}: no {what} ({patterns[0]} is missing); is it a Hugging Face checkpoint?"
            )
    for file, listed in _listed_tensors(folder, named).items():
        if missing := sorted(listed - _stored_tensors(folder / file)):
            raise ModelDamaged(
                f"model {named}: {file} lacks {len(missing)} tensors that {_INDEX} lists, such as {missing[0]}; "
                "download it again"
            )


def _listed_tensors(folder: Path, named: str) -> dict[str, set[str]]:
    """Files of weights with the tensors that the index lists for each; a single file has no index."""
    if (folder / _WEIGHTS).is_file():
        return {_WEIGHTS: set()}
    if not (folder / _INDEX).is_file():
        some = sorted(file.name for file in folder.glob("*.safetensors"))
        what = f"{some[0]}, but no {_WEIGHTS} or {_INDEX}" if some else f"no {_WEIGHTS}"
        raise ModelDamaged(f"model {named}: no weights ({what}); is it a Hugging Face checkpoint?")
    try:
        file_of = {
            str(k): str(v) for k, v in json.loads((folder / _INDEX).read_bytes())["weight_map"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelDamaged(f"model {named}: {_INDEX} cannot be read ({error}); download it again") from error
    listed: dict[str, set[str]] = {}
    for tensor, file in file_of.items():
        listed.setdefault(file, set()).add(tensor)
    if missing := sorted(file for file in listed if not (folder / file).is_file()):
        raise ModelDamaged(
            f"model {named}: {len(missing)} of {len(listed)} files of weights are missing, such as {missing[0]}; "
            "download them"
        )
    return listed


def _stored_tensors(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="np") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ModelDamaged(f"model weights {file}: broken file ({error})") from error
