"""Router replay: the experts that the engine chose for each token compute it in the learner too (Ma et al. 2025).

Rounding differs between engine and learner, and decides which experts of nearly equal probability are chosen: the same
token then goes through other weights, and its logprobs differ by more than any rounding (arXiv 2510.11370, "R3"). The
engine's choice is stored with every token. It replaces what the learner's router would choose; the weights of the
chosen experts are the learner's own, so that gradients reach the router.

Routers choose by `torch.topk` of a score for each expert, in every family: its result is replaced within the block that
holds the experts. The learner's router chooses for tokens without a stored choice: those of other models' episodes and
of demonstrations, a sequence's tokens from the first one that has none, and texts that are no episode's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from learner.data.batch import MicroBatch
from learner.parallel.experts import experts_in
from rollout.wire.model_folder import expert_count
from rollout.wire.module_names import layer_number


def routing_bytes(config: PretrainedConfig) -> int:
    """Bytes of a token's stored experts, B; 0 for a model without experts."""
    text, experts = config.get_text_config(), expert_count(config)
    width = 2 if experts > 256 else 1
    return int(text.num_hidden_layers) * int(text.num_experts_per_tok) * width if experts else 0


def blocks_of(model: nn.Module) -> dict[str, int]:
    """The blocks of layers that hold experts and their router, by name, and the layer of each."""
    blocks = (name.rpartition(".")[0] for name in experts_in(model))
    return {block: layer for block in blocks if (layer := layer_number(block)) is not None}


class RouterReplay:
    """The stored choice in the place of the routers' own.

    The row is kept until the next one: layers that are recomputed in its backward pass choose as in its forward pass.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self._layers = int(config.num_hidden_layers)
        self._chosen = int(config.num_experts_per_tok)
        self._width = routing_bytes(model.config) // (self._layers * self._chosen)
        self._off = False
        self._bytes_TLKW: Tensor | None = None  # of the row's numbers of experts; None: the routers choose
        self._known_T1: Tensor | None = None  # tokens whose choice is stored; None: all
        for name, layer in blocks_of(model).items():
            block = model.get_submodule(name)
            block.forward = partial(self._routed, block.forward, layer)

    def follow(self, row: MicroBatch | None) -> None:
        """Choose what is stored of this row from here on. ValueError where it is of another model."""
        self._bytes_TLKW, self._known_T1 = None, None
        if self._off or row is None or row.routed_TB is None:
            return
        self._bytes_TLKW = self._laid_out(row.routed_TB)
        if row.routed_T is not None:
            self._known_T1 = row.routed_T[:, None]

    @contextmanager
    def off(self) -> Iterator[None]:
        """The routers choose, while this lasts."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def _laid_out(self, routed_TB: Tensor) -> Tensor:
        if routed_TB.shape[1] != self._layers * self._chosen * self._width:
            raise ValueError(
                f"stored routing of {routed_TB.shape[1]} bytes a token is not of {self._layers} layers and "
                f"{self._chosen} experts a token; it is another model's"
            )
        return routed_TB.view(-1, self._layers, self._chosen, self._width)

    def _routed(self, forward: Callable[..., Any], layer: int, *given: Any, **named: Any) -> Any:
        if self._bytes_TLKW is None:
            return forward(*given, **named)
        choice = _Choice(_numbers(self._bytes_TLKW[:, layer]), self._known_T1)
        with choice:
            found = forward(*given, **named)
        if choice.made != 1:
            raise ValueError(
                f"the router of layer {layer} has chosen its experts {choice.made} times by torch.topk, not once; set "
                "learner.model.router_replay=false for this model"
            )
        return found


def _numbers(bytes_TKW: Tensor) -> Tensor:
    """Numbers of experts, int64 [T, K], from their bytes, the lower first."""
    low_TK, *high = bytes_TKW.long().unbind(-1)
    return low_TK + 256 * high[0] if high else low_TK


class _Choice(TorchFunctionMode):
    """Gives the stored experts where `torch.topk` is asked for as many, of one score for each token and expert."""

    def __init__(self, experts_TK: Tensor, known_T1: Tensor | None) -> None:
        super().__init__()
        self._experts_TK, self._known_T1 = experts_TK, known_T1
        self.made = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in (torch.topk, Tensor.topk):
            return function(*args, **kwargs)
        scores, count = args[0], args[1] if len(args) > 1 else kwargs["k"]
        tokens, chosen = self._experts_TK.shape
        if count != chosen or scores.ndim != 2 or len(scores) != tokens:
            return function(*args, **kwargs)  # the groups of experts that some families choose from first
        self.made += 1
        experts_TK = self._experts_TK
        if self._known_T1 is not None:
            experts_TK = torch.where(self._known_T1, experts_TK, function(*args, **kwargs).indices)
        return torch.return_types.topk((scores.gather(-1, experts_TK), experts_TK))
