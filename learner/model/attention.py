"""Attention over packed sequences, for any Hugging Face causal model that has pluggable attention.

`register()` registers the implementation "manta_packed" with transformers. A model loaded with
attn_implementation="manta_packed" takes one row of whole sequences end to end, as in `hidden_states`, and every token
attends to itself and to earlier tokens of its own sequence only. No mask function is registered under the name, so
transformers builds no mask, and no [T, T] matrix is built here.

On CUDA in half precision it is torch's variable-length attention, if this torch has one. Otherwise the row is split
into runs of neighboring sequences of one length: each run is a [B, H, L, D] VIEW of the packed row, without padding or
gathering. A row sorted by length has at most sqrt(2 T) runs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from inspect import signature
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

NAME = "manta_packed"

_VARLEN_MAX_HEAD_DIM = 256
# Arguments of some families that change the formula; ignoring one would train a different model.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


def _find_varlen() -> tuple[Callable[..., Any] | None, bool]:
    """torch's variable-length attention (None before torch 2.11), and whether it supports grouped heads."""
    if find_spec("torch.nn.attention.varlen") is None:
        return None, False
    from torch.nn.attention.varlen import varlen_attn

    parameters = signature(varlen_attn).parameters
    return (varlen_attn if "window_size" in parameters else None), "enable_gqa" in parameters


_VARLEN, _VARLEN_GROUPS = _find_varlen()


def register() -> str:
    """Register packed attention with transformers (repeated calls are harmless) and return its name."""
    AttentionInterface.register(NAME, packed_attention)
    return NAME


def hidden_states(
    model: PreTrainedModel, ids_T: Tensor, cu_seqlens_B: Tensor | None, longest: int, **beside: Tensor
) -> Tensor:
    """Final hidden states [T, D] of a packed row, without the logits of the whole row.

    cu_seqlens_B: None for a row of one sequence. beside: positions, and inputs of the vision tower.
    """
    found: Tensor = model.base_model(
        input_ids=ids_T[None],
        use_cache=False,
        cu_seq_lens_q=cu_seqlens_B,
        cu_seq_lens_k=cu_seqlens_B,
        max_length_q=longest,
        max_length_k=longest,
        **beside,
    ).last_hidden_state[0]
    return found


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence, with the signature that transformers calls.

    query [1, H, T, D]; key, value [1, K, T, D] with H a multiple of K; cu_seq_lens_q int32 [B + 1], the borders of the
    sequences in the row (None: one sequence). Returns ([1, T, H, D], None). Dropout is never applied: the learner's
    logprobs must be those of the model that sampled. ValueError for more than one row, a mask, or an argument that
    would change the formula.
    """
    unsupported = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if unsupported or attention_mask is not None or query.shape[0] != 1:
        what = unsupported or (
            "an attention mask" if attention_mask is not None else f"{query.shape[0]} rows"
        )
        raise ValueError(
            f"packed attention of {type(module).__name__} takes one row without a mask; got {what}"
        )
    if query.dtype != value.dtype:  # under autocast a normalization returns query and key as float32
        query, key = query.to(value.dtype), key.to(value.dtype)
    if _fits_varlen(query) and cu_seq_lens_q is not None and max_length_q is not None:
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)[None], None
    lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    return _by_runs(query[0], key[0], value[0], lengths, scaling, sliding_window)[None], None


def _fits_varlen(query: Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return _VARLEN is not None and query.is_cuda and half and query.shape[3] <= _VARLEN_MAX_HEAD_DIM


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """[1, H, T, D] -> [T, H, D] by torch's variable-length kernel."""
    assert _VARLEN is not None
    query_THD, key_TKD, value_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    repeats = query_THD.shape[1] // key_TKD.shape[1]
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if _VARLEN_GROUPS:
        options["enable_gqa"] = repeats > 1
    elif repeats > 1:
        key_TKD, value_TKD = key_TKD.repeat_interleave(repeats, 1), value_TKD.repeat_interleave(repeats, 1)
    out: Tensor = _VARLEN(query_THD, key_TKD, value_TKD, cu_seqlens, cu_seqlens, longest, longest, **options)
    return out


def _by_runs(
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTD: Tensor,
    lengths: list[int],
    scale: float | None,
    window: int | None,
) -> Tensor:
    """[H, T, D] -> [T, H, D], one call per run of neighbouring sequences of equal length."""
    runs = [(length, sum(1 for _ in same)) for length, same in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    grouped = query_HTD.shape[0] != key_KTD.shape[0]
    outputs = []
    # split instead of slices: its backward is one concatenation; each slice's would be a tensor of the whole row.
    pieces = zip(query_HTD.split(sizes, 1), key_KTD.split(sizes, 1), value_KTD.split(sizes, 1), strict=True)
    for (length, count), piece in zip(runs, pieces, strict=True):
        query, key, value = (x.unflatten(1, (count, length)).transpose(0, 1) for x in piece)
        banded = window is not None and length > window
        mask = _band(length, window, query.device) if banded and window is not None else None
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=not banded, scale=scale, enable_gqa=grouped
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """bool [L, L]: each token attends to itself and the window - 1 tokens before it."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - window)
