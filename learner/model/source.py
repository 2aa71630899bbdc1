"""A model from anywhere as a folder of this machine: a folder, an id of the Hugging Face hub, or a GGUF file.

A model of the hub is downloaded into the hub's own cache, once. A GGUF file is converted once, into a folder of Manta's
cache that is named after the file's content and appears there whole.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blake3 import blake3

from learner.model.completeness import require_whole
from rollout.wire.model_folder import COMPANIONS, ModelDamaged, ModelMissing, require

FILES = (*COMPANIONS, "*.safetensors")  # what a model consists of
# Copies of the weights in other formats, and files of other programs. The hub's patterns match across folders.
_IGNORED = (
    *(f"*/{pattern}" for pattern in FILES if "/" not in pattern and pattern != "*.jinja"),
    "consolidated*.safetensors",
)


def local_model(named: str, download: bool = True) -> Path:
    """The folder of a model, fetched first if it is not here.

    named: a folder; a .gguf file; or an id of the hub, "owner/name" with an optional "@revision", whose snapshot is
    downloaded whole. A folder is not read; what is fetched is whole. ModelMissing or ModelDamaged, one line, for a
    model that is not there, not whole or not readable. download: from the hub; False: only what is in its cache.
    """
    if not named:
        raise ModelMissing(
            "no model to train: set learner.model.path to a folder, an id of the Hugging Face hub, or a GGUF file"
        )
    path = Path(named).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return _converted(path)
    require(named.partition("@")[0])
    return _snapshot(named, download)


def pinned(named: str, folder: Path) -> str:
    """Name of a model that is the same on every machine and at every time.

    The absolute path of a folder or file; for an id of the hub, with the commit whose snapshot is in `folder`.
    """
    path = Path(named).expanduser()
    return str(path.absolute()) if path.exists() else f"{named.partition('@')[0]}@{folder.name}"


def write_gguf(file: Path, target: Path) -> None:
    """Dequantize a GGUF file to float32, with its tokenizer and chat template. ModelMissing, ModelDamaged."""
    if not file.is_file():
        raise ModelMissing(f"model {file}: no such file; check the path")
    if find_spec("gguf") is None:
        raise ModelDamaged(f"model {file}: reading GGUF needs the package gguf: pip install 'manta-rl[gguf]'")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelDamaged(f"model {file} cannot be read: {reason}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelDamaged(
            f"model {file} lacks {len(missing)} weights, such as {missing[0]}; give a file that holds the whole model"
        )
    # The weights are not quantized any more, and transformers refuses to save what it believes is.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except (OSError, SafetensorError) as error:
        raise ModelDamaged(f"model {file} cannot be written to {target}: {error}") from error


def _converted(file: Path) -> Path:
    """The folder of a GGUF file in the cache, made by the first process that asks for it; others wait."""
    if not file.is_file():
        raise ModelMissing(f"model {file}: no such file; check the path")
    status = file.stat()
    target = _cache_folder() / f"gguf-{_content(file.resolve(), status.st_size, status.st_mtime_ns)}"
    if target.is_dir():
        return target
    with _locked(target):
        if not target.is_dir():
            partial = target.with_name(f".{target.name}.part")
            shutil.rmtree(partial, ignore_errors=True)  # of an interrupted conversion
            write_gguf(file, partial)
            require_whole(partial, str(file))
            partial.rename(target)
    return target


@lru_cache(maxsize=8)
def _content(file: Path, _size: int, _changed: int) -> str:
    """What a file holds, as a name; a process that asks several times for the same file reads it once."""
    return blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest(length=16)


def _cache_folder() -> Path:
    base = (
        os.environ.get("MANTA_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "manta"
    )
    return Path(base) / "models"


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of a folder of the cache."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f".{target.name}.lock").open("a", encoding="utf-8")
    except OSError as error:
        raise ModelDamaged(
            f"the cache of models {target.parent} cannot be written to ({error.strerror}); set MANTA_CACHE to a folder "
            "that can"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _snapshot(named: str, download: bool) -> Path:
    """The folder of a model of the hub in the hub's cache, whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, IncompleteSnapshotError, LocalEntryNotFoundError

    name, _, revision = named.partition("@")
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=list(FILES),
                ignore_patterns=list(_IGNORED),
                local_files_only=not download,
            )
        )
    except IncompleteSnapshotError as error:
        missing = str(error).partition("is incomplete: ")[2].partition(". ")[0]
        raise ModelDamaged(
            f"model {named}: its snapshot is not whole ({missing}), and the hub cannot be reached to complete it"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelMissing(
            f"model {named}: the hub cannot be reached, and no snapshot of it is here"
        ) from error
    except (HTTPError, OSError, ValueError) as error:
        raise ModelDamaged(f"model {named}: {(str(error).splitlines() or [''])[0]}") from error
    try:
        require_whole(folder, named)
    except ModelDamaged as error:
        raise ModelDamaged(f"{error} (snapshot {folder}, cached in part?)") from error
    return folder
