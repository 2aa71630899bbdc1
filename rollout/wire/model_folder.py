"""A model's folder or Hugging Face id: what stands in it beside the weights, read as it came.

A folder that is written for others (a checkpoint, an export) holds the very files the model came with: a library that
writes them anew validates them, drops what it does not know, and renames what it does.
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
_WEIGHTS = ("*.index.json", "adapter_config.json")  # they describe weights, which are written by themselves
_WIDE = ("dtype", "torch_dtype")


class ModelMissing(FileNotFoundError):
    """A model that is a folder's path, but no such folder is there (any more)."""


def pretrained(auto: Any, path: str, **options: Any) -> Any:
    """What a transformers Auto class loads from `path`; code that came with the model is never run.

    Raises ModelMissing for a folder that is gone, which the hub's client takes for a malformed id, and what the class
    raises.
    """
    require(path)
    return auto.from_pretrained(path, trust_remote_code=False, **options)


def companions(folder: Path) -> dict[str, bytes]:
    """The files beside the weights, by their names in the folder (`COMPANIONS`).

    Small enough to be held: the folder may be gone when they are written.
    """
    found = {file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()}
    found -= {file for pattern in _WEIGHTS for file in folder.glob(pattern)}
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(found)}


def write_companions(files: Mapping[str, bytes], folder: Path) -> None:
    """Write them beside weights of float32: the configuration says so, everything else is to the byte what it was."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_of_float32(content) if name == "config.json" else content)


def require(path: str) -> None:
    """Raise ModelMissing for a folder that is gone; an id of the hub is let pass."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise ModelMissing(f"model {path}: there is no such folder (any more)")


def _of_float32(config: bytes) -> bytes:
    """A configuration that says of which type its weights are; unchanged where it says so already."""
    said = json.loads(config)
    parts = [
        said,
        *(said[name] for name in ("text_config", "vision_config") if isinstance(said.get(name), dict)),
    ]
    narrow = [(part, key) for part in parts for key in _WIDE if part.get(key) not in (None, "float32")]
    for part, key in narrow:
        part[key] = "float32"
    return json.dumps(said, indent=2).encode() if narrow else config
