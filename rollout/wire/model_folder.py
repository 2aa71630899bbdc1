"""A model's folder or Hugging Face id: the files beside the weights, kept byte for byte.

Checkpoints and exports hold the files that the model came with. A library that rewrites them would validate them, drop
fields that it does not know, and rename others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Configurations, tokenizer, templates, processor, code.
COMPANIONS = (
    *("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.py", "LICENSE*"),
    *("*.txt", "*.model", "*.tiktoken", "vocab.*"),  # vocabularies
)
_WEIGHTS = ("*.index.json", "adapter_config.json")  # describe the weights, which are written separately
_WIDE = ("dtype", "torch_dtype")


class ModelMissing(FileNotFoundError):
    """A model is given as a folder's path, but the folder does not exist (any more)."""


class ModelDamaged(ValueError):
    """A model's files cannot be loaded; the message is one line."""


def pretrained(auto: Any, path: str, **options: Any) -> Any:
    """Load `path` with a transformers Auto class; code that comes with the model is never executed.

    Raises ModelMissing for a missing folder, which the hub's client would report as a malformed id, and what the class
    raises.
    """
    require(path)
    return auto.from_pretrained(path, trust_remote_code=False, **options)


def companions(folder: Path) -> dict[str, bytes]:
    """Read the files beside the weights, by their names in the folder (`COMPANIONS`).

    They are held in memory, because the folder may be removed before they are written.
    """
    found = {file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()}
    found -= {file for pattern in _WEIGHTS for file in folder.glob(pattern)}
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(found)}


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
