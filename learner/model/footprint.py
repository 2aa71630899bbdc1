"""What a model holds in memory, told by its configuration alone.

    config.json -> fake tensors of the true shapes, without bytes -> parameters; what autograd saves of a packed row

No weights are read and no product is computed, so that a model of any size can be told about on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from learner.data.prefix_tree import PrefixTree
from learner.model.attention import hidden_states
from learner.model.attention_blocks import RowAttention
from learner.model.recompute import KEPT
from learner.model.saved_tensors import SavedTensors
from learner.parallel.context import ContextGroup
from learner.parallel.experts import experts_in
from learner.parallel.layers import layers_in

_ATTENTION = "manta_footprint"
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")  # experts of a token, by family
_TOKENS = 32  # of the shorter of two rows that are compared


@dataclass(frozen=True, slots=True)
class Experts:
    """Numbers of a mixture of experts; of another model they are zero."""

    parameters: int = 0  # of all experts
    largest: int = 0  # of those of the layer with the most
    layers: int = 0  # with experts
    sent: int = 0  # numbers by which a token is sent to its experts in a layer: width x chosen experts


@dataclass(frozen=True, slots=True)
class Shape:
    """Numbers of parameters; a tied one counts once. linear: of the matrices of linear layers, the head aside."""

    parameters: int
    outside_layers: int  # embedding, last normalization, head
    largest_layer: int
    layers: int
    linear: int = 0
    largest_layer_linear: int = 0
    largest_linear: int = 0  # of one matrix
    sides: tuple[tuple[int, int], ...] = ()  # rows and columns that matrices of linear layers have
    experts: Experts = Experts()
    largest_beside: int = 0  # of the largest layer, its experts left out
    head: int = 0  # of the matrix of the head, which may be the embedding too


@dataclass(frozen=True, slots=True)
class Saved:
    """Bytes that autograd saves between forward and backward, for each token that a rank computes.

    per_token: by the whole model; of it `layer_per_token` by the largest layer, whose input is `input_per_token` and
    whose products and attention give `kept_per_token`. exchanged_per_token: bytes that come from other ranks in a
    forward pass, where they compute a row together.
    """

    per_token: float
    layer_per_token: float
    input_per_token: float
    kept_per_token: float
    exchanged_per_token: float = 0.0

    def row(self, tokens: int, layers: int, checkpointing: bool | str) -> int:
        """Bytes of a row.

        checkpointing: layers keep their input ("selective": and what products give), and are computed again one by one.
        """
        if not checkpointing:
            return round(tokens * self.per_token)
        outside = self.per_token - layers * self.layer_per_token
        kept = self.input_per_token + (self.kept_per_token if checkpointing == "selective" else 0.0)
        return round(tokens * (max(outside, 0.0) + layers * kept + self.layer_per_token))


def blank_model(config: PretrainedConfig, trusted: bool = False) -> PreTrainedModel:
    """The model of a configuration without weights: parameters on the meta device.

    trusted: code that comes with the model may be executed.
    """
    with torch.device("meta"):
        return _model(config, trust_remote_code=trusted)


def shape_of(model: PreTrainedModel) -> Shape:
    """Count the parameters of a model of any device."""
    layers = [_count(module) for module in layers_in(model)]
    own = [sum(map(_count, experts_in(module).values())) for module in layers_in(model)]
    beside = (whole - experts for whole, experts in zip(layers, own, strict=True))
    total, head = _count(model), model.get_output_embeddings()
    sides = _matrices(model, head)
    linear = [*map(prod, sides)]
    return Shape(
        parameters=total,
        outside_layers=total - sum(layers),
        largest_layer=max(layers, default=0),
        layers=len(layers),
        linear=sum(linear),
        largest_layer_linear=max(
            (sum(map(prod, _matrices(layer, head))) for layer in layers_in(model)), default=0
        ),
        largest_linear=max(linear, default=0),
        sides=tuple(sorted(set(sides))),
        experts=_experts(model.config, own) if any(own) else Experts(),
        largest_beside=max(beside, default=0),
        head=0 if head is None else head.weight.numel(),
    )


def _experts(config: PretrainedConfig, by_layer: list[int]) -> Experts:
    text, mixed = config.get_text_config(), [count for count in by_layer if count]
    chosen = next(filter(None, (getattr(text, name, None) for name in _CHOSEN)), 0)
    return Experts(sum(mixed), max(mixed), len(mixed), int(text.hidden_size) * int(chosen))


def saved_by(config: PretrainedConfig, dtype: str, together: int = 1) -> Saved | None:
    """What the learner's forward pass of a text row saves of its tokens, found by one with fake tensors.

    dtype: of `learner.model`, in which everything is computed. Attention is counted as fused kernels save it.
    together: ranks that compute a row together. None where it cannot be told: a vision tower saves what pictures make
    it, and some families read values in their pass.
    """
    if getattr(config, "vision_config", None) is not None:
        return None
    try:
        return _saved_by(config, torch.bfloat16 if dtype == "bfloat16" else torch.float32, together)
    except RuntimeError:  # what fake tensors cannot compute
        return None


def _saved_by(config: PretrainedConfig, dtype: torch.dtype, together: int) -> Saved:
    AttentionInterface.register(_ATTENTION, _fused_attention)
    with FakeTensorMode(), _GroupedProducts():
        model = _model(config, dtype=dtype, attn_implementation=_ATTENTION).eval()
        short, long = (_saved(model, tokens, together) for tokens in (_TOKENS, 2 * _TOKENS))
    return Saved(*((more - less) / _TOKENS for less, more in zip(short, long, strict=True)))


def _model(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    sees = getattr(config, "vision_config", None) is not None
    kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(deepcopy(config), **options)  # it writes into its configuration
    return model


def _matrices(module: nn.Module, head: nn.Module | None) -> list[tuple[int, int]]:
    """Rows and columns of the matrices of linear layers."""
    linear = [each for each in module.modules() if isinstance(each, nn.Linear) and each is not head]
    return [(each.out_features, each.in_features) for each in linear]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _Kept(TorchDispatchMode):
    """Counts the bytes of results that selective recomputation keeps."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in KEPT:
            results = found if isinstance(found, tuple) else (found,)
            self.nbytes += sum(each.nbytes for each in results if isinstance(each, Tensor))
        return found


class _GroupedProducts(TorchFunctionMode):
    """Products of experts by transformers' operator: torch knows the shapes of its own one in bfloat16 alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._grouped_mm:
            return torch.ops.transformers.grouped_mm_fallback(*args, kwargs["offs"])
        return func(*args, **(kwargs or {}))


class _Counted(ContextGroup):
    """The shapes of an exchange, and the bytes that others would send; nobody else is there."""

    nbytes = 0.0

    def exchange(self, x: Tensor) -> Tensor:
        self.nbytes += x.nbytes * (self.size - 1) / self.size
        return torch.empty_like(x, memory_format=torch.contiguous_format)


def _saved(model: PreTrainedModel, tokens: int, together: int) -> tuple[float, ...]:
    """Bytes of a slice of so many tokens: saved by the model, by its largest layer; that layer's input, what its
    products give, and what is exchanged.
    """
    layers: list[tuple[int, int, int]] = []  # saved, input, given by products
    saved, kept = SavedTensors(without=model.parameters()), _Kept()
    hooks = []
    for layer in layers_in(model):
        before: list[tuple[int, int]] = []
        hooks.append(layer.register_forward_pre_hook(_noting(before, saved, kept)))
        hooks.append(layer.register_forward_hook(_measuring(before, saved, kept, layers)))
    ids_T, places_1T = torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens)[None]
    tree, context = PrefixTree.apart([together * tokens]), _Counted(size=together)
    with saved, kept:
        last_TD = hidden_states(model, ids_T, tree, context, position_ids=places_1T)
    for hook in hooks:
        hook.remove()
    del last_TD  # the graph lives until here
    return saved.nbytes, *max(layers, default=(0, 0, 0)), context.nbytes


def _noting(
    before: list[tuple[int, int]], saved: SavedTensors, kept: _Kept
) -> Callable[[nn.Module, Any], None]:
    return lambda layer, inputs: before.append((saved.nbytes, kept.nbytes))


def _measuring(
    before: list[tuple[int, int]], saved: SavedTensors, kept: _Kept, layers: list[tuple[int, int, int]]
) -> Callable[[nn.Module, Any, Any], None]:
    def measure(layer: nn.Module, inputs: Any, output: Any) -> None:
        saved_before, kept_before = before.pop()
        layers.append((saved.nbytes - saved_before, inputs[0].nbytes, kept.nbytes - kept_before))

    return measure


class _Fused(torch.autograd.Function):
    """The shapes of a fused attention: it saves its inputs, its output, and a number for every head and token."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        ctx.save_for_backward(query, key, value, out, normalizer)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError("shapes have no gradients")


def _fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    row_attention: RowAttention,
    **options: Any,
) -> tuple[Tensor, None]:
    """Like `learner.model.attention.packed_attention`, without a product."""
    query, key, context = query.to(value.dtype), key.to(value.dtype), row_attention.context
    if context.size == 1:
        out: Tensor = _Fused.apply(query, key, value)
        return out.transpose(1, 2), None
    out = _Fused.apply(*context.own_heads(query, key, value))
    return context.own_tokens(out.transpose(1, 2)), None
