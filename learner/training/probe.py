"""The learner's side of the probe: a likely text, its logprobs, and how far rounding alone may move them.

A bfloat16 engine is no further from float32 than rounding takes it, but how far that is depends on the model: 0.001
nats a token for a tiny one, 0.04 for a pretrained one of thirty layers, and more for tokens that no model expects. So
the text is drawn from the model itself, and the tolerance is measured on the same weights, version by version: every
product and sum of a forward pass is moved at random by up to the engine's rounding error, and the logprobs are compared
with those of an exact pass (a stochastic arithmetic as in Parker 1997, "Monte Carlo Arithmetic").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from learner.model.policy import Policy
from rollout.wire.trajectory import Float32Array
from rollout.wire.weights import PROBE_TOKENS, Probe

_PIECE = 8  # tokens of the text that are drawn one after the other; pieces are drawn side by side
_DRAWS = 2  # of the rounding, whose movements are averaged
# A correct engine moves its logprobs once, the measurement on average: three times that is out of reach of chance.
_MULTIPLE = 3.0
_FLOOR = 5e-5  # nats; what float32 sums in another order move the logprobs of a tiny model by, with room
# Relative error of one stored value, by what the engine computes in: half a unit in the last place. A float32 product
# is a sum of thousands of terms that are rounded too; the narrower types are summed in float32.
_ROUNDING = {"float32": 2.0**-20, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# What gives a tensor that an engine stores and rounds; gathers of weights stand for the weights' own rounding.
_ROUNDED = frozenset(
    (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "linear",
        "_linear_pointwise",
        "_grouped_mm",
        "embedding",
        "add",
        "mul",
        "silu",
    )
) | {"gelu", "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"}


class Rounding(TorchDispatchMode):
    """While this is active, results of products and sums are moved by a relative error drawn from [-size, size]."""

    def __init__(self, size: float, generator: torch.Generator) -> None:
        super().__init__()
        self._size = size
        self._generator = generator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute, then move what was computed where an engine would have rounded it."""
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in _ROUNDED:
            return result
        if isinstance(result, tuple):  # attention's kernels give more than the output
            return self._moved(result[0]), *result[1:]
        return self._moved(result)

    def _moved(self, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        share = torch.empty_like(value).uniform_(-self._size, self._size, generator=self._generator)
        return value + value * share


def probe_of(policy: Policy, dtype: str) -> Probe:
    """The probe of the policy's present weights for an engine of `dtype`. Every rank has to ask for it."""
    if not policy.probe_text:
        policy.probe_text = likely_text(policy, PROBE_TOKENS)
    exact = policy.score_texts(torch.tensor([policy.probe_text]), widest=True)[0]
    return Probe(policy.probe_text, tuple(exact.tolist()), tolerance(policy, policy.probe_text, exact, dtype))


def likely_text(policy: Policy, tokens: int) -> tuple[int, ...]:
    """Tokens that the model itself samples, from a fixed seed: short texts, one behind the other.

    The same for the same weights. It takes as many forward passes as a piece has tokens.
    """
    generator = torch.Generator().manual_seed(0)
    never = [] if policy.picture_inputs is None else [policy.picture_inputs.placeholder_id]
    ids_BL = torch.full((-(-tokens // _PIECE), 1), _first_id(policy))
    for _ in range(_PIECE - 1):
        logits_BV = policy.next_logits(ids_BL).float().cpu()
        logits_BV[:, never] = -torch.inf
        drawn_B1 = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
        ids_BL = torch.cat([ids_BL, drawn_B1], 1)
    return tuple(ids_BL.flatten()[:tokens].tolist())


def _first_id(policy: Policy) -> int:
    """The token that texts begin with, or the one that ends them where the model names no other."""
    config = policy.model.config.get_text_config()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    named = (
        token for token in (config.bos_token_id, *ends) if token is not None and token < policy.vocab_size
    )
    return next(named, 0)


def tolerance(policy: Policy, text: Sequence[int], exact: Float32Array, dtype: str) -> float:
    """Mean |dlogprob| of the text that a sound engine of `dtype` stays within, nats.

    exact: the text's logprobs without rounding.
    """
    # Measured at bfloat16's size, whatever the type: the movement is in proportion, and well above float32's own.
    generator = torch.Generator(policy.device).manual_seed(0)
    with Rounding(_ROUNDING["bfloat16"], generator):
        moved = policy.score_texts(torch.tensor([list(text)] * _DRAWS), widest=True)
    movement = float(np.abs(moved - exact).mean())
    computed = "bfloat16" if policy.rounds_always else "float32"
    size = max(_ROUNDING[dtype], _ROUNDING[computed])
    return max(_MULTIPLE * movement * size / _ROUNDING["bfloat16"], _FLOOR)
