"""Compatibility of a model with packed rows, tested by computing one: configurations do not state it.

Some families scale or cap their logits after the head. Others mix tokens outside of attention, in convolutions and
recurrent states, so that sequences of one row would leak into one another. Both would be trained as another model than
the one that samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.model.attention import hidden_states

_BEFORE, _TOKENS = 5, 9  # lengths of a sequence and of the next one in the row
# In float32. A cap changes a logit by a third of (logit / cap)^2; compatible models agree to the bit.
_HEAD_TOLERANCE = 1e-5  # relative to the largest logit
_LEAK_TOLERANCE = 1e-3  # relative to the largest hidden state; leaks are 1e-2 and more, rounding 1e-6
# Errors of a family's own code for arguments that it does not support.
_FOREIGN = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class IncompatibleModel(ValueError):
    """A model that packed rows cannot train; the message gives the reason in one line."""


@torch.no_grad()
def require_compatible(model: PreTrainedModel) -> None:
    """IncompatibleModel unless the model is a linear head on hidden states that packing does not change.

    The model must be whole, on a CPU, in evaluation mode and float32, so that rounding is small against the
    differences tested for, for any size of logits and any later compute type.
    """
    kind = model.config.model_type
    if not hasattr(model.config.get_text_config(), "max_position_embeddings"):
        raise IncompatibleModel(
            f"its family {kind} states no max_position_embeddings; choose a pure attention model"
        )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise IncompatibleModel(f"its family {kind} has no linear head; choose another model")
    try:
        found = _fault(model, head)
    except _FOREIGN as error:
        reason = (str(error).splitlines() or [""])[0]
        found = f"cannot compute a packed row ({type(error).__name__}: {reason})"
    if found:
        raise IncompatibleModel(f"its family {kind} {found}; choose another model")


def _fault(model: PreTrainedModel, head: nn.Linear) -> str:
    """The reason why the model is incompatible; empty if it is compatible."""
    context, vocabulary = model.config.get_text_config().max_position_embeddings, head.weight.shape[0]
    count = min(_TOKENS, context)
    ids_T = torch.arange(count) % vocabulary
    before_T = torch.arange(count, count + min(_BEFORE, context)) % vocabulary
    alone_TD = _hidden(model, [ids_T])
    apart = _apart(head(alone_TD), model(input_ids=ids_T[None], use_cache=False).logits[0])
    if not apart <= _HEAD_TOLERANCE:
        return (
            f"has logits that are not hidden state times head: they differ by {apart:.2g} of the largest logit (a head "
            "that scales or caps, or weights that are not finite)"
        )
    apart = _apart(_hidden(model, [before_T, ids_T])[len(before_T) :], alone_TD)
    if not apart <= _LEAK_TOLERANCE:
        return (
            "lets a sequence see the one before it in a packed row (convolutions or recurrences mix tokens outside of "
            f"attention): hidden states differ by {apart:.2g} of the largest one"
        )
    return ""


def _hidden(model: PreTrainedModel, sequences: Sequence[Tensor]) -> Tensor:
    """Final hidden states [T, D] of these sequences in one row."""
    lengths = [len(ids_T) for ids_T in sequences]
    borders_B = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    places_T = torch.cat([torch.arange(length) for length in lengths])
    ids_T = torch.cat(list(sequences))
    return hidden_states(model, ids_T, borders_B, max(lengths), position_ids=places_T[None])


def _apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value; NaN if either has one."""
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / scale)
