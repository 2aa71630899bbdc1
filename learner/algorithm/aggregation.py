"""Weights of tokens in the loss, which is the sum of weight times token loss.

Weights are set once for the WHOLE batch of an optimizer step: no split into micro-batches or ranks changes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from learner.parallel.ranks import ALONE, Ranks

Aggregation = Literal["token", "sequence", "constant"]


def token_weights(
    sampled_E: Sequence[int], how: Aggregation, length: int | None = None, ranks: Ranks = ALONE
) -> list[float]:
    """Weight of each sampled token of every episode: [E] from [E] counts of sampled tokens.

    token     1 / (all sampled tokens): long episodes weigh more. Yu et al. 2025 (DAPO), equation 8
    sequence  1 / (episodes x the episode's own tokens): GRPO's, Shao et al. 2024, equation 3
    constant  1 / (episodes x length): no length is favoured. Liu et al. 2025 (Dr. GRPO), section 3.2

    Episodes without a sampled token have no weight but are counted. Counts of episodes and tokens are over all ranks;
    sampled_E is this rank's.
    """
    whole = ranks.sums({"episodes": len(sampled_E), "tokens": sum(sampled_E)})
    if how == "token":
        return [1.0 / max(whole["tokens"], 1)] * len(sampled_E)
    if how == "sequence":
        return [1.0 / (whole["episodes"] * max(sampled, 1)) for sampled in sampled_E]
    if length is None:
        raise ValueError("aggregation='constant' divides by a length; give one")
    return [1.0 / (whole["episodes"] * length) for _ in sampled_E]
