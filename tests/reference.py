"""The papers' formulas, one number at a time: the truth that learner/ is compared with.

Plain loops over plain floats, written from the papers and sharing nothing with what they judge. An episode is a flat
list of tokens. A loss is a (value, slope) pair for each sampled token: the slope is d value / d logprob of that very
token, derived by hand, with nothing where a paper stops the gradient. Options have the names of the recipe's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tests.reference_advantages import Episode, Token, advantages, gae_of, options, overlong

__all__ = [
    "Episode",
    "Token",
    "advantages",
    "gae_of",
    "overlong",
]  # rewards to advantages, on a page of their own

Pair = tuple[float, float]  # value, slope


# Advantages to losses: of one sampled token, from its logprob and the proximal policy's.


def ppo(
    logprob: float,
    proximal: float,
    advantage: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Pair:
    """PPO, equation 7, with DAPO's two bounds and the dual clip of Ye et al. 2020, equation 5."""
    ratio = math.exp(logprob - proximal)
    return _clipped_pair(ratio, advantage, clip_low, clip_high, dual_clip)


def reinforce(logprob: float, proximal: float, advantage: float) -> Pair:
    """Williams 1992."""
    return -advantage * logprob, -advantage


def cispo(logprob: float, proximal: float, advantage: float, clip_low: float, clip_high: float) -> Pair:
    """MiniMax-M1, equations 4 and 5: the weight is a constant."""
    weight = min(max(math.exp(logprob - proximal), 1 - clip_low), 1 + clip_high)
    return -weight * advantage * logprob, -weight * advantage


def sapo(logprob: float, proximal: float, advantage: float, positive: float, negative: float) -> Pair:
    """SAPO, equations 5 and 6; the slope is the sech^2 gate of its section on gradients: 4 s (1 - s) r A."""
    ratio = math.exp(logprob - proximal)
    tau = positive if advantage > 0 else negative
    gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
    return -advantage * gate * 4 / tau, -advantage * 4 * gate * (1 - gate) * ratio


def dppo(
    logprob: float,
    proximal: float,
    advantage: float,
    divergence: str,
    threshold: float,
    ratio_cap: float = math.inf,
) -> Pair:
    """DPPO, section 4, its binary approximations: the token or any other; with a truncated importance weight."""
    p, q = math.exp(logprob), math.exp(proximal)
    if divergence == "tv":
        apart = (abs(p - q) + abs((1 - p) - (1 - q))) / 2
    else:
        apart = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    outward = (advantage > 0 and p > q) or (advantage < 0 and p < q)
    if outward and apart > threshold:
        return 0.0, 0.0
    weight = min(p / q, ratio_cap)
    return -weight * advantage, -weight * advantage


def gspo(
    logprobs: Sequence[float],
    proximals: Sequence[float],
    advantages: Sequence[float],
    segments: Sequence[int],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> list[Pair]:
    """GSPO, section 4.3: the token's own gradient, the segment's geometric mean as its ratio."""
    found = []
    for advantage, segment in zip(advantages, segments, strict=True):
        ratios = [
            math.exp(logprobs[n] - proximals[n]) for n in range(len(segments)) if segments[n] == segment
        ]
        ratio = math.prod(ratios) ** (1 / len(ratios))
        found.append(_clipped_pair(ratio, advantage, clip_low, clip_high, dual_clip))
    return found


LOSSES: dict[str, Callable[..., Pair]] = {
    "ppo": ppo,
    "reinforce": reinforce,
    "cispo": cispo,
    "sapo": sapo,
    "dppo": dppo,
}


def loss(
    section: dict[str, Any],
    logprobs: Sequence[float],
    proximals: Sequence[float],
    advantages: Sequence[float],
    segments: Sequence[int],
) -> list[Pair]:
    """What a recipe's section `loss` means, for an episode's sampled tokens."""
    if section["kind"] == "gspo":
        return gspo(logprobs, proximals, advantages, segments, **options(section))
    tokens = zip(logprobs, proximals, advantages, strict=True)
    return [LOSSES[section["kind"]](*token, **options(section)) for token in tokens]


def _clipped_pair(ratio: float, advantage: float, low: float, high: float, dual_clip: float | None) -> Pair:
    """Which of the bounds holds decides both numbers."""
    if dual_clip is not None and advantage < 0 and ratio > dual_clip:
        return -dual_clip * advantage, 0.0
    if advantage > 0 and ratio > 1 + high:
        return -(1 + high) * advantage, 0.0
    if advantage < 0 and ratio < 1 - low:
        return -(1 - low) * advantage, 0.0
    return -ratio * advantage, -ratio * advantage


def value_loss(value: float, old: float, target: float, clip: float | None) -> Pair:
    """Half the squared error, or the larger one of that and of the value kept near the old one."""
    free = (value - target) ** 2 / 2
    if clip is not None and abs(value - old) > clip:
        near = old + clip if value > old else old - clip
        if (near - target) ** 2 / 2 > free:
            return (near - target) ** 2 / 2, 0.0
    return free, value - target


# What else acts on a token.


def correction(
    section: dict[str, Any], log_ratios: Sequence[float], segments: Sequence[int], lags: Sequence[int]
) -> list[float]:
    """What one of a recipe's `corrections` multiplies an episode's sampled tokens with."""
    found = []
    for segment, lag, log_ratio in zip(segments, lags, log_ratios, strict=True):
        together = [x for x, other in zip(log_ratios, segments, strict=True) if other == segment]
        found.append(_weight(section, math.exp(log_ratio), [math.exp(x) for x in together], lag))
    return found


def _weight(section: dict[str, Any], own: float, together: list[float], lag: int) -> float:
    whole = section.get("of") == "sequence"
    if section["kind"] == "tis":  # IMPALA, section 4.1; of a sequence, its likelihood ratio
        return min(math.prod(together) if whole else own, section["cap"])
    if section["kind"] == "mask":
        ratio = math.prod(together) ** (1 / len(together)) if whole else own
        return 1.0 if section["low"] <= ratio <= section["high"] else 0.0
    if section["kind"] == "icepop":  # Ring-1T, section 3.1
        return own if section["low"] <= own <= section["high"] else 0.0
    return 1.0 if lag <= section["max_lag"] else 0.0


def kl(logprob: float, reference: float, estimator: str) -> Pair:
    """Schulman 2020, k3 held at 10 as trainers do; "k3+" has k2's slope."""
    ratio = math.exp(reference - logprob)
    if estimator == "k1":
        return -math.log(ratio), 1.0
    if estimator == "k2":
        return math.log(ratio) ** 2 / 2, -math.log(ratio)
    k3 = (ratio - 1) - math.log(ratio)
    if estimator == "k3+":
        return min(k3, 10.0), -math.log(ratio)
    return (k3, 1 - ratio) if k3 < 10 else (10.0, 0.0)


def entropy(logits: Sequence[float]) -> float:
    """-sum p log p of the softmax."""
    total = sum(math.exp(x) for x in logits)
    return -sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in logits)


def effective_share(weights: Sequence[float]) -> float:
    """Kish 1965: (sum w)^2 / (n sum w^2)."""
    return sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))


def aggregate(episodes: Sequence[Sequence[Any]], how: str, length: int | None = None) -> Any:
    """One number from those of each episode's sampled tokens: DAPO equation 8, GRPO equation 3, Dr. GRPO 3.2."""
    if how == "token":
        return sum(sum(numbers) for numbers in episodes) / sum(len(numbers) for numbers in episodes)
    if how == "sequence":
        return sum(sum(numbers) / len(numbers) for numbers in episodes if numbers) / len(episodes)
    return sum(sum(numbers) / length for numbers in episodes) / len(episodes)
