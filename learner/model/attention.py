"""Attention over packed sequences, for any Hugging Face causal model that has pluggable attention.

`register()` registers the implementation "manta_packed" with transformers. A model loaded with
attn_implementation="manta_packed" takes one row, as in `hidden_states`: a prefix tree, in which every token attends to
itself and to the tokens on the way to it. No mask function is registered under the name, so transformers builds no
mask, and no [T, T] matrix is built here.

The row is computed in the blocks of `attention_blocks`. In a row without forks these are runs of neighboring sequences
of one length: each run is a [B, H, L, D] VIEW of the packed row, without padding or gathering, and a row sorted by
length has at most sqrt(2 T) runs. On CUDA in half precision such a row goes through torch's variable-length attention,
if this torch has one.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from learner.data.prefix_tree import PrefixTree
from learner.model.attention_blocks import RowAttention
from learner.model.tree_attention import tree_attention
from learner.parallel.context import ContextGroup

NAME = "manta_packed"

_VARLEN_MAX_HEAD_DIM = 256
# Frequencies of rotary positions that depend on the largest position of what is computed at once.
_ROPE_OF_ROWS = frozenset(("dynamic", "longrope"))
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


def require_slices(config: PretrainedConfig, size: int) -> None:
    """ValueError, one line, for a model of whose rows `size` ranks cannot compute a slice each."""
    text, option = config.get_text_config(), f"learner.context_parallel_size={size}"
    if size == 1:
        return
    if (heads := int(text.num_attention_heads)) % size:
        raise ValueError(
            f"has {heads} attention heads, which {option} does not divide; use a divisor of both"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {str(each.get("rope_type")) for each in (rope, *rope.values()) if isinstance(each, dict)}
    if found := sorted(kinds & _ROPE_OF_ROWS):
        raise ValueError(
            f"has rotary positions of type {found[0]!r}, which depend on the row's largest one: a slice does not know "
            f"it; use learner.context_parallel_size=1 instead of {size}"
        )


def hidden_states(
    model: PreTrainedModel,
    ids_T: Tensor,
    tree: PrefixTree,
    context: ContextGroup | None = None,
    **beside: Tensor,
) -> Tensor:
    """Final hidden states [T, D] of a packed row, without the logits of the whole row.

    beside: positions, and inputs of the vision tower. context: ranks that compute the row together; ids, positions and
    hidden states are then of the own slice, the tree of the whole row.
    """
    found: Tensor = model.base_model(
        input_ids=ids_T[None], use_cache=False, row_attention=RowAttention(tree, context), **beside
    ).last_hidden_state[0]
    return found


@torch.compiler.disable  # a compiled layer calls it as it is
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    row_attention: RowAttention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention along each packed sequence, with the signature that transformers calls.

    query [1, H, T, D]; key, value [1, K, T, D] with H a multiple of K; row_attention: of the row's prefix tree (None:
    one sequence). Returns ([1, T, H, D], None). Dropout is never applied: the learner's logprobs must be those of the
    model that sampled. ValueError for more than one row, a mask, or an argument that would change the formula.

    Where ranks compute the row together, T are the tokens of the own slice, given and returned; attention itself is of
    the whole row and the own heads.
    """
    unsupported = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if unsupported or attention_mask is not None or query.shape[0] != 1:
        what = unsupported or (
            "an attention mask" if attention_mask is not None else f"{query.shape[0]} rows"
        )
        raise ValueError(
            f"packed attention of {type(module).__name__} takes one row without a mask; got {what}"
        )
    if query.dtype != value.dtype:  # some families rotate query and key in float32
        query, key = query.to(value.dtype), key.to(value.dtype)
    row = row_attention or RowAttention(PrefixTree.apart([query.shape[2]]))
    if row.context.size == 1:
        return _attended(query, key, value, row, scaling, sliding_window), None
    query, key, value = row.context.own_heads(query, key, value)
    return row.context.own_tokens(_attended(query, key, value, row, scaling, sliding_window)), None


def _attended(
    query: Tensor, key: Tensor, value: Tensor, row: RowAttention, scale: float | None, window: int | None
) -> Tensor:
    """[1, T, H, D] of a whole row."""
    if _fits_varlen(query) and not row.tree.forked:
        borders = row.borders(query.device)
        return _varlen(query, key, value, borders, row.longest, scale, window)[None]
    query_THD, key_TKD, value_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    return tree_attention(query_THD, key_TKD, value_TKD, row.blocks(window, query), scale)[None]


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
