"""What each token of a batch weighs in the loss. The weights are set once for the WHOLE batch of an optimizer step, so
that no split into micro-batches or ranks changes them, and loss = sum of weight times token loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from learner.parallel.ranks import ALONE, Ranks

Aggregation = Literal["token", "sequence", "constant"]


def token_weights(
    sampled_E: Sequence[int], how: Aggregation, length: int | None = None, ranks: Ranks = ALONE
) -> list[float]:
    """The weight of each of an episode's sampled tokens, for every episode: [E] from [E] counts of sampled tokens.

    token     1 / (all sampled tokens): long episodes weigh more. Yu et al. 2025 (DAPO), equation 8
    sequence  1 / (episodes x the episode's own tokens): GRPO's, Shao et al. 2024, equation 3
    constant  1 / (episodes x length): no length is favoured. Liu et al. 2025 (Dr. GRPO), section 3.2

    Episodes without a sampled token weigh nothing and are counted all the same. Episodes and tokens are those of all
    ranks; sampled_E is of this one.
    """
    whole = ranks.sums({"episodes": len(sampled_E), "tokens": sum(sampled_E)})
    if how == "token":
        return [1.0 / max(whole["tokens"], 1)] * len(sampled_E)
    if how == "sequence":
        return [1.0 / (whole["episodes"] * max(sampled, 1)) for sampled in sampled_E]
    if length is None:
        raise ValueError("constant aggregation divides by a length; give one")
    return [1.0 / (whole["episodes"] * length) for _ in sampled_E]
