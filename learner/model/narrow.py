"""Parameters kept in float32 and computed with in a narrower type: all of them on one rank, or an adapter's on any.

They are cast layer by layer, as several ranks gather theirs (`learner.parallel.shards`). The residual stream,
normalizations, and gradients of weights therefore have the same types on any number of ranks: those of a transformers
model that is stored in the narrower type. Gradients are added up in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.func import functional_call

from learner.parallel.layers import layers_in

T = TypeVar("T")


class Narrow:
    """A model whose parameters are cast to `dtype` where they are used inside `use`.

    The `forward` of every layer is replaced: a layer that is recomputed in the backward pass casts its parameters
    again, and no copies of them are kept until then. parameters: those that are cast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, parameters: Iterable[nn.Parameter]) -> None:
        self.dtype = dtype
        self.wide = False  # whether parameters are used as they are, at the moment
        layers = layers_in(model)
        cast = {id(parameter) for parameter in parameters}
        for layer in layers:
            layer.forward = _Body(self, layer, layer.forward, cast).compute
        cast -= {id(parameter) for layer in layers for parameter in layer.parameters()}
        self._root = _Body(self, model, lambda compute: compute(), cast)

    def use(self, compute: Callable[[], T], wide: bool = False) -> T:
        """Call `compute` with narrow parameters. wide: with the parameters as they are."""
        self.wide = wide
        try:
            found: T = self._root.compute(compute)
        finally:
            self.wide = False
        return found


class _Body(nn.Module):
    """A module of a `Narrow` model, and a function that uses its parameters."""

    def __init__(
        self, narrow: Narrow, inside: nn.Module, body: Callable[..., Any], cast: Collection[int]
    ) -> None:
        super().__init__()
        self.inside = inside
        self._narrow, self._body = narrow, body
        self._names = [name for name, parameter in self.named_parameters() if id(parameter) in cast]

    def forward(self, *given: Any, **named: Any) -> Any:
        """The function's result; `functional_call` calls this."""
        return self._body(*given, **named)

    def compute(self, *given: Any, **named: Any) -> Any:
        """The function's result with the module's parameters cast."""
        if self._narrow.wide:
            return self._body(*given, **named)
        cast = {name: self.get_parameter(name).to(self._narrow.dtype) for name in self._names}
        return functional_call(self, cast, given, named)
