"""Compatibility of a model with packed rows, tested by computing one: configurations do not state it.

Some families scale or cap their logits after the head. Others mix tokens outside of attention, in convolutions and
recurrent states, so that sequences of one row would leak into one another. Both would be trained as another model than
the one that samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from learner.data.prefix_tree import PrefixTree
from learner.model.attention import hidden_states

_TOKENS, _AFTER = 9, 5  # lengths of a sequence and of the next one in the row
# In float32. A cap changes a logit by a third of (logit / cap)^2; compatible models agree to the bit.
_HEAD_TOLERANCE = 1e-5  # relative to the largest logit
_LEAK_TOLERANCE = 1e-3  # relative to the largest hidden state; leaks are 1e-2 and more, rounding 1e-6
_TIE = 1e-3  # relative to the largest score; as above
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
    after_T = torch.arange(count, count + min(_AFTER, context)) % vocabulary
    with _Choices() as by_us:
        alone_TD = _alone(model, ids_T)
    with _Choices(by_us.made):
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0]
    apart = _apart(head(alone_TD), logits_TV)
    if not apart <= _HEAD_TOLERANCE:
        return (
            f"has logits that are not hidden state times head: they differ by {apart:.2g} of the largest logit (a head "
            "that scales or caps, or weights that are not finite)"
        )
    # Beside a sequence that shares all but its last token, and behind one that shares nothing.
    rows = [ids_T, torch.cat([ids_T[:-1], after_T])[:context], after_T]
    tree = _tree(rows)
    with _Choices() as together:
        packed = _hidden(model, rows, tree)
    alone = []
    for row_T, path_T in zip(rows, tree.paths_B, strict=True):
        with _Choices([indices[torch.from_numpy(path_T)] for indices in together.made]):
            alone.append(_alone(model, row_T))
    leaks = [_apart(*pair) for pair in zip(packed, alone, strict=True)]
    if not all(apart <= _LEAK_TOLERANCE for apart in leaks):
        return (
            "lets a sequence see another one of a packed row (convolutions or recurrences mix tokens outside of "
            f"attention): hidden states differ by {max(leaks):.2g} of the largest one"
        )
    return ""


def _alone(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    """Final hidden states [T, D] of a sequence in a row of its own."""
    (found,) = _hidden(model, [ids_T], _tree([ids_T]))
    return found


def _hidden(model: PreTrainedModel, sequences: Sequence[Tensor], tree: PrefixTree) -> list[Tensor]:
    """Final hidden states [T, D] of each of these sequences, computed in one row."""
    ids_T = torch.zeros(tree.tokens, dtype=torch.int64)
    for sequence_T, path_T in zip(sequences, tree.paths_B, strict=True):
        ids_T[path_T] = sequence_T
    places_T = torch.from_numpy(tree.depths_T).long()
    hidden_TD = hidden_states(model, ids_T, tree, position_ids=places_T[None])
    return [hidden_TD[path_T] for path_T in tree.paths_B]


def _tree(sequences: Sequence[Tensor]) -> PrefixTree:
    return PrefixTree.of([ids_T.numpy().astype(np.int32) for ids_T in sequences], [()] * len(sequences))


class _Choices(TorchFunctionMode):
    """Routers choose experts as they did before where scores are nearly equal, since rounding would decide.

    before: indices [T, K] of each choice by torch.topk that the same tokens have made before, in order.
    """

    def __init__(self, before: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self._before = before

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if function in (torch.topk, Tensor.topk):
            found = self._chosen(args[0], found)
            self.made.append(found.indices)
        return found

    def _chosen(self, scores_TE: Tensor, found: Any) -> Any:
        if len(self.made) >= len(self._before):
            return found
        before_TK = self._before[len(self.made)]
        if before_TK.shape != found.indices.shape:
            return found
        lost_TK = found.values.sort(-1).values - scores_TE.gather(-1, before_TK).sort(-1).values
        tied_T1 = lost_TK.abs().amax(-1, keepdim=True) <= _TIE * scores_TE.abs().max()
        indices_TK = torch.where(tied_T1, before_TK, found.indices)
        return torch.return_types.topk((scores_TE.gather(-1, indices_TK), indices_TK))


def _apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value; NaN if either has one."""
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / scale)
