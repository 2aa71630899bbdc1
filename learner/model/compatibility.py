"""Whether a model can be trained on packed rows at all: computed once, since no configuration says it.

Some families scale or cap their logits after the head. In others tokens meet outside of attention, in convolutions and
recurrent states, and sequences that lie in one row would see one another. Either would be trained as another model than
the one that samples, and nothing but a comparison notices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.model.attention import hidden_states

_BEFORE, _TOKENS = 5, 9  # a sequence, and the one behind it in the row
# In float32. A cap changes a logit by a third of (logit / cap)^2; what is sound is the same to the bit.
_HEAD_TOLERANCE = 1e-5  # of the largest logit
_LEAK_TOLERANCE = 1e-3  # of the largest hidden state; leaks are a hundredth and more, rounding a millionth
# What a family's own code raises where it is called in a way that it does not know.
_FOREIGN = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class Unfit(ValueError):
    """A model that cannot be trained as what it is; the message says why, in one line."""


@torch.no_grad()
def examine(model: PreTrainedModel) -> None:
    """Raise Unfit unless the model is a linear head on hidden states that are the same in a packed row as alone.

    The model is whole, on a CPU, in evaluation mode and float32: rounding is then nothing beside what is looked for,
    however large the logits are and whatever is computed in afterwards.
    """
    kind = model.config.model_type
    if not hasattr(model.config.get_text_config(), "max_position_embeddings"):
        raise Unfit(f"its family {kind} states no max_position_embeddings; choose a model of attention alone")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise Unfit(f"its family {kind} has no linear layer for a head; choose another model")
    try:
        found = _fault(model, head)
    except _FOREIGN as error:
        reason = (str(error).splitlines() or [""])[0]
        found = f"cannot compute a packed row ({type(error).__name__}: {reason})"
    if found:
        raise Unfit(f"its family {kind} {found}; choose another model")


def _fault(model: PreTrainedModel, head: nn.Linear) -> str:
    """What is wrong with the model, or nothing."""
    context, vocabulary = model.config.get_text_config().max_position_embeddings, head.weight.shape[0]
    count = min(_TOKENS, context)
    ids_T = torch.arange(count) % vocabulary
    before_T = torch.arange(count, count + min(_BEFORE, context)) % vocabulary
    alone_TD = _hidden(model, [ids_T])
    apart = _apart(head(alone_TD), model(input_ids=ids_T[None], use_cache=False).logits[0])
    if not apart <= _HEAD_TOLERANCE:
        return (
            f"has logits that are not hidden state times head, but {apart:.2g} of the largest one apart (a head that "
            "scales or caps, or weights that are not finite)"
        )
    apart = _apart(_hidden(model, [before_T, ids_T])[len(before_T) :], alone_TD)
    if not apart <= _LEAK_TOLERANCE:
        return (
            "lets a sequence see the one before it in a packed row (tokens meet outside of attention: convolutions or "
            f"recurrences): hidden states are {apart:.2g} of the largest one apart"
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
    """The largest difference, as a share of the largest value expected; NaN where there is one in either."""
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / scale)
