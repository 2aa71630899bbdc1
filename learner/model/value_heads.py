"""Value heads: perceptrons of one hidden layer on hidden states, as in ILQL (Snell et al. 2022).

The last layers begin as zeros. Products and sums are float32 at least.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from learner.model.logprobs import token_logprobs


class StateValue(nn.Module):
    """V: one number a state."""

    def __init__(self, width: int, hidden: int, random: torch.Generator) -> None:
        super().__init__()
        self.features, self.last = _layers(width, hidden, 1, random)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Values [N] of hidden states [N, D]."""
        values_N1: Tensor = self.last(self.features(hidden_ND.to(self.last.weight.dtype)))
        return values_N1[:, 0]


class TwoStateValues(nn.Module):
    """V, twice, by two heads that begin differently."""

    def __init__(self, width: int, hidden: int, random: torch.Generator) -> None:
        super().__init__()
        self.one, self.other = StateValue(width, hidden, random), StateValue(width, hidden, random)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Values [2, N] of hidden states [N, D]."""
        return torch.stack([self.one(hidden_ND), self.other(hidden_ND)])


class ActionValues(nn.Module):
    """Q, twice: one number a state and token of the vocabulary, by two heads that begin differently."""

    def __init__(self, width: int, hidden: int, vocabulary: int, random: torch.Generator) -> None:
        super().__init__()
        self.features, self.last = _layers(width, hidden, vocabulary, random)
        self.other_features, self.other_last = _layers(width, hidden, vocabulary, random)

    def forward(self, hidden_ND: Tensor, actions_N: Tensor, vocab_chunk: int) -> tuple[Tensor, Tensor]:
        """Values of these tokens by both heads, and log-softmax of all values at these tokens: [2, N] each.

        actions_N: int64. The whole [N, V] is never in memory, only blocks of `vocab_chunk` columns.
        """
        values, logprobs = [], []
        for features, last in ((self.features, self.last), (self.other_features, self.other_last)):
            feature_NH = features(hidden_ND.to(last.weight.dtype))
            values.append((feature_NH * last.weight[actions_N]).sum(1) + last.bias[actions_N])
            found_N, _ = token_logprobs(feature_NH, last.weight, last.bias, actions_N, 1.0, vocab_chunk)
            logprobs.append(found_N)
        return torch.stack(values), torch.stack(logprobs)


def _layers(width: int, hidden: int, out: int, random: torch.Generator) -> tuple[nn.Module, nn.Linear]:
    first, last = nn.Linear(width, hidden), nn.Linear(hidden, out)
    nn.init.kaiming_uniform_(first.weight, a=math.sqrt(5), generator=random)
    nn.init.uniform_(first.bias, -(width**-0.5), width**-0.5, generator=random)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(first, nn.ReLU()), last
