"""A model read from its folder: first without memory, then filled layer by layer, of each layer the own part.

    blank        the architecture: parameters on the meta device, buffers where they are computed
    excerpt      its first layers alone, on which a model is examined before any rank has its share
    fill         parameters from the files, sharded ones the rank's own rows only
    load         all of that: sharded over the ranks, or quantized

Host memory holds the own part of the parameters and one layer of the files.
"""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, dot_natural_key
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from learner.model.attention import NAME, register
from learner.model.compatibility import require_compatible
from learner.model.nf4 import quantize_layers
from learner.model.source import local_model
from learner.model.tensor_files import Changed, StoredTensor, stored_tensors
from learner.parallel.ranks import ALONE, Ranks
from learner.parallel.shards import Whole, local, shard
from learner.settings import ModelSettings
from rollout.wire.model_folder import code_refused, pretrained

_UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


class ModelError(ValueError):
    """A checkpoint that cannot be loaded or trained; the message says why, in one line."""


class FilesChanged(ModelError):
    """Files of weights that are not what their checksums say."""


@contextmanager
def as_model_error(prefix: str = "") -> Iterator[None]:
    """Turn a ValueError into ModelError."""
    try:
        yield
    except ValueError as error:
        raise ModelError(f"{prefix}{error}") from error


def blank(settings: ModelSettings) -> tuple[Path, PreTrainedModel]:
    """A model's folder, and the model in float32 with packed attention: its parameters have no memory yet.

    ModelError, one line, if it cannot be read.
    """
    path, trusted = settings.path, settings.trust_remote_code
    try:
        folder = local_model(path)
        config = pretrained(AutoConfig, str(folder), trusted)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                "its weights are quantized and cannot be trained; use the unquantized checkpoint"
            )
        sees = getattr(config, "vision_config", None) is not None
        kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        # The vision tower does not take packed rows.
        attention: Any = {"text_config": register()} if sees else register()
        options = {"dtype": torch.float32, "attn_implementation": attention, "trust_remote_code": trusted}
        with _parameters_without_memory(), code_refused(trusted):
            model: PreTrainedModel = kind.from_config(config, **options)
    except _UNREADABLE as error:
        raise _cannot_be_loaded(path, error) from error
    return folder, model.eval()


def _cannot_be_loaded(named: str, error: Exception) -> ModelError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if error.args == (NAME,):
        reason = "its family has its own attention code, which packed rows cannot use; choose another model"
    return ModelError(f"model {named!r} cannot be loaded: {reason}")


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters that this thread registers meanwhile are on the meta device; buffers are computed as usual."""
    here = threading.get_ident()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or threading.get_ident() != here:
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        hook.remove()


def freeze_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Freeze a blank model's parameters, and have them stored in `dtype`; buffers keep their types."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)


def excerpt(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a blank model with as many of its first layers as show every kind of layer that it has."""
    short = deepcopy(model)
    for layers in [module for module in short.modules() if isinstance(module, nn.ModuleList)]:
        if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
            continue
        kinds = _kinds(layers, short)
        enough = max((kinds.index(kind) + 1 for kind in set(kinds)), default=0)
        del layers[enough:]
    return short


def _kinds(layers: nn.ModuleList, model: PreTrainedModel) -> list[str]:
    """What distinguishes layers: their modules, and the types that the configuration gives them."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or []
    said = types if len(types) == len(layers) else [""] * len(layers)
    return [f"{kind} {layer}" for kind, layer in zip(said, layers, strict=True)]


def trim() -> None:
    """Give memory that was freed back to the system: a learner's process on a CPU is told to keep it for its steps."""
    gc.collect()  # modules refer to one another in circles
    if (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # glibc's
        give_back(0)


def examine(model: PreTrainedModel, folder: Path, named: str, ranks: Ranks) -> None:
    """ModelError, on all ranks, unless packed rows train such a blank model right: rank 0 computes its first layers."""
    said = ""
    if not ranks.rank:
        short = excerpt(model)
        try:
            fill(short, folder, named, torch.device("cpu"))
            with as_model_error(f"model {named!r} cannot be trained: "):
                require_compatible(short)
        except ModelError as error:
            said = str(error)
        del short
        trim()
    if message := next(filter(None, ranks.gather(said, everyone=True)), ""):
        raise ModelError(message)


def load(
    model: PreTrainedModel, folder: Path, settings: ModelSettings, products: torch.dtype | None, ranks: Ranks
) -> Whole | None:
    """Fill a blank model from its folder, as `fill` does, and shard it over several ranks; returns the sharded root.

    products: the type of gathered tensors, None: their own. A base in NF4 (`learner.model.nf4`) is quantized layer by
    layer as it is read, on every rank alike: blocks do not end where rows of ranks do, so that its bytes are sharded.
    """
    device, quantized = torch.device(settings.device), settings.quantized
    if not quantized:
        sharded = shard(model, ranks, products, expert_parallel=settings.expert_parallel)
        fill(model, folder, settings.path, device, ranks)
        return sharded
    quantize = partial(quantize_layers, model, model.get_output_embeddings())
    fill(model, folder, settings.path, device, ranks, quantize)
    trim()
    return shard(model, ranks, products)


def fill(
    model: PreTrainedModel,
    folder: Path,
    named: str,
    device: torch.device,
    ranks: Ranks = ALONE,
    after_layer: Callable[[], None] = lambda: None,
) -> None:
    """Fill a blank model's parameters from a folder, sharded ones with the own rows; a collective call.

    named: the model's name in errors. after_layer: called when a layer has been read. ModelError, one line and the same
    on all ranks, for files that are broken or incomplete, whose shapes are others, or with numbers that are not finite.
    """
    error: ModelError | None = None
    apart: list[str] = []  # tied parameters of which the files hold two
    try:
        apart = _fill(model, folder, named, device, after_layer)
    except ModelError as found:
        error = found
    found_by = [str(error) if error else "", isinstance(error, FilesChanged), apart]
    said = ranks.gather(found_by, everyone=True)
    if message := next((text for text, *_ in said if text), ""):
        raise (FilesChanged if any(changed for _, changed, _ in said) else ModelError)(message) from error
    if any(apart for *_, apart in said):
        raise ModelError(
            f"model {named!r} has tie_word_embeddings=true, but its files hold another head, which engines ignore; set "
            "it to false in config.json, or remove the head from the files"
        )


def _fill(
    model: PreTrainedModel, folder: Path, named: str, device: torch.device, after_layer: Callable[[], None]
) -> list[str]:
    try:
        stored = stored_tensors(folder)
        missing = _convert(model, stored, device, after_layer)
    except Changed as error:
        raise FilesChanged(str(error)) from error
    except _UNREADABLE as error:
        raise _cannot_be_loaded(named, error) from error
    apart = _tie(model, missing)
    if lacking := sorted(missing):
        raise ModelError(
            f"model {named!r} lacks {len(lacking)} weights, such as {lacking[0]}; complete its files"
        )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(local(parameter.detach())).all()):
            raise ModelError(
                f"model {named!r} has weights that are not finite, such as {name}; use other files"
            )
    return apart


def _convert(
    model: PreTrainedModel,
    stored: Mapping[str, StoredTensor],
    device: torch.device,
    after_layer: Callable[[], None],
) -> set[str]:
    """Read and convert to transformers' own form, layer by layer; returns the names that the files did not have."""
    options = LoadStateDictConfig(
        dtype=next(model.parameters()).dtype,
        device_map={"": device},
        weight_mapping=get_model_conversion_mapping(model),
    )
    missing = set(model.state_dict())
    for _, names in groupby(sorted(stored, key=dot_natural_key), key=layer_of):
        with _without_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(model, {n: stored[n] for n in names}, options)
        for name, found, wanted in info.mismatched_keys:
            raise ValueError(
                f"its files hold {name} of shape {tuple(found)}, its configuration asks for {tuple(wanted)}"
            )
        missing &= info.missing_keys
        for name, error in info.conversion_errors.items():
            if not _own(model, name).numel():  # there are fewer experts than ranks, and this one has none
                _set_empty(model, name, device)
                missing.discard(name)
            else:
                raise ValueError(f"{name} cannot be converted: {error.strip().splitlines()[-1]}")
        after_layer()
    needless = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return {name for name in missing if not any(pattern.search(name) for pattern in needless)}


def layer_of(name: str) -> tuple[str, ...]:
    """A parameter's name up to its first number, that of a layer; empty for what belongs to none."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return tuple(parts[: number + 1])


def _tie(model: PreTrainedModel, missing: set[str]) -> list[str]:
    """Tie parameters as the configuration says; returns those of which the files hold two that differ.

    missing: names that the files did not have; tied ones are removed.
    """
    apart = []
    for tied, source in list(model.all_tied_weights_keys.items()):
        if missing.isdisjoint({tied, source}):
            if torch.equal(_own(model, tied), _own(model, source)):
                missing.add(tied)
            else:
                apart.append(tied)
                model.all_tied_weights_keys.pop(tied)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    return apart


def _own(model: PreTrainedModel, name: str) -> Tensor:
    return local(model.get_parameter(name).detach())


def _set_empty(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Give memory to a sharded parameter of which this rank has no rows."""
    module, _, last = name.rpartition(".")
    blank = model.get_parameter(name)
    empty = torch.empty_like(blank, device=device)
    setattr(model.get_submodule(module), last, nn.Parameter(empty, blank.requires_grad))


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """transformers would show one for every layer."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
