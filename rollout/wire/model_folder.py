"""A model's folder or Hugging Face id: the files beside the weights, kept byte for byte.

Checkpoints and exports hold the files that the model came with. A library that rewrites them would validate them, drop
fields that it does not know, and rename others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Configurations, tokenizer, templates, processor, code.
COMPANIONS = (
    *("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.py", "LICENSE*"),
    *("*.txt", "*.model", "*.tiktoken", "vocab.*"),  # vocabularies
)
_WEIGHTS = ("*.index.json", "adapter_config.json")  # describe the weights, which are written separately
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # fields of configurations, by family
_WIDE = ("dtype", "torch_dtype")


class ModelMissing(FileNotFoundError):
    """A model is given as a folder's path, but the folder does not exist (any more)."""


class ModelDamaged(ValueError):
    """A model's files cannot be loaded; the message is one line."""


class CodeRefused(ValueError):
    """A model needs Python code of its repository, which is not trusted; the message is one line."""


def pretrained(auto: Any, path: str, trusted: bool = False, **options: Any) -> Any:
    """Load `path` with a transformers Auto class.

    trusted: execute code that comes with the model. Raises CodeRefused where it is needed and not trusted, ModelMissing
    for a missing folder, which the hub's client would report as a malformed id, and what the class raises.
    """
    require(path)
    with code_refused(trusted):
        return auto.from_pretrained(path, trust_remote_code=trusted, **options)


@contextmanager
def code_refused(trusted: bool) -> Iterator[None]:
    """CodeRefused in place of transformers' own error, where code of the model's is needed and not trusted."""
    try:
        yield
    except ValueError as error:
        if trusted or "trust_remote_code" not in str(error):
            raise
        raise CodeRefused(
            "it needs custom code of its own repository, which is not executed; if you have read the code and trust "
            "its author, set learner.model.trust_remote_code=true, or add --trust to manta eval"
        ) from error


def files(folder: Path, patterns: Sequence[str] = COMPANIONS) -> dict[str, Path]:
    """The files of a folder that match one of the patterns, by their names in the folder, sorted."""
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return {file.relative_to(folder).as_posix(): file for file in sorted(found)}


def companions(folder: Path) -> dict[str, bytes]:
    """Read the files beside the weights, by their names in the folder (`COMPANIONS`).

    They are held in memory, because the folder may be removed before they are written.
    """
    weights = files(folder, _WEIGHTS)
    return {name: file.read_bytes() for name, file in files(folder).items() if name not in weights}


def token_count(folder: str) -> int | None:
    """One more than the largest id of a model's tokenizer; None without a tokenizer.json.

    A model may have more rows, to pad its vocabulary: no token has their ids, and no engine samples them. Raises
    ValueError for a file that is not a tokenizer's.
    """
    file, config = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        said = json.loads(file.read_bytes())
        vocabulary = said["model"]["vocab"]  # {token: id}, or [[token, score], ...] in the order of ids
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        ids += [added["id"] for added in said.get("added_tokens", ())]
        if config.is_file():
            ids += map(int, json.loads(config.read_bytes()).get("added_tokens_decoder", ()))
        return 1 + max(ids)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: broken file ({error})") from error


def expert_count(config: Any) -> int:
    """Experts of a layer, by the configuration of a mixture in transformers; 0 of another model."""
    text = config.get_text_config()
    return next((int(count) for name in _EXPERTS if (count := getattr(text, name, None))), 0)


def write_companions(files: Mapping[str, bytes], folder: Path) -> None:
    """Write them beside float32 weights: config.json gets that dtype, all other files are unchanged."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_of_float32(content) if name == "config.json" else content)


def looks_local(path: str) -> bool:
    """Whether a model's path can only be a folder's, not an id of the hub."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def require(path: str) -> None:
    """Raise ModelMissing for a missing folder; ids of the hub pass."""
    if looks_local(path) and not Path(path).is_dir():
        raise ModelMissing(f"model {path}: no such folder (any more); check the path")


def _of_float32(config: bytes) -> bytes:
    """A configuration with the dtype float32; unchanged where it has that already."""
    said = json.loads(config)
    parts = [
        said,
        *(said[name] for name in ("text_config", "vision_config") if isinstance(said.get(name), dict)),
    ]
    narrow = [(part, key) for part in parts for key in _WIDE if part.get(key) not in (None, "float32")]
    for part, key in narrow:
        part[key] = "float32"
    return json.dumps(said, indent=2).encode() if narrow else config
