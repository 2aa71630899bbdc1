"""The papers' formulas, one number at a time: the truth that learner/ is compared with.

Plain loops over plain floats, written from the papers and sharing nothing with what they judge. An episode is a flat
list of tokens. A loss is a (value, slope) pair for each sampled token: the slope is d value / d logprob of that very
token, derived by hand, with nothing where a paper stops the gradient. Options have the names of the recipe's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Token:
    """One token of an episode; what follows `segment` is known of sampled ones only."""

    id: int
    sampled: bool
    turn: int
    segment: int
    behavior: float = 0.0  # log-probability recorded while sampling, nats
    version: int = 0


@dataclass(frozen=True)
class Episode:
    """Observations and actions in the order in which they came."""

    tokens: tuple[Token, ...]
    rewards: tuple[float, ...]  # of turns
    states: tuple[str, ...]  # that turns began in
    named: dict[str, float]
    ended: bool = True  # False: cut off in a state that was not final
    extra: tuple[float, ...] = ()  # reward of each sampled token beside its turn's
    values: tuple[float, ...] = ()  # a critic's, before each sampled token
    after: float = 0.0  # and after the last token

    @property
    def sampled(self) -> list[Token]:
        return [token for token in self.tokens if token.sampled]

    @property
    def paid(self) -> float:
        """By the task alone."""
        return sum(self.rewards)

    @property
    def total(self) -> float:
        """Reward of the whole episode."""
        return sum(self.rewards) + sum(self.extra)


Group = Sequence[Episode]
Credit = list[list[list[float]]]  # of each group, of each episode, of each sampled token
Pair = tuple[float, float]  # value, slope


# Rewards to advantages.


def grpo(groups: Sequence[Group], divide: bool, eps: float) -> Credit:
    """DeepSeekMath 4.1: (r - mean) / (std + eps); Dr. GRPO 3.2: r - mean."""
    return [
        _for_all_tokens(g, _compared([e.total for e in g], divide, eps, [e.paid for e in g])) for g in groups
    ]


def rloo(groups: Sequence[Group]) -> Credit:
    """RLOO, equation 5: r minus the mean of the others'."""
    found = []
    for group in groups:
        others = [_mean([o.total for o in group if o is not episode]) for episode in group]
        found.append(
            _for_all_tokens(group, [e.total - other for e, other in zip(group, others, strict=True)])
        )
    return found


def maxrl(groups: Sequence[Group], eps: float) -> Credit:
    """MaxRL, section 4: (r - mean) / mean; nothing is learned where nothing was earned."""
    found = []
    for group in groups:
        mean = _mean([episode.total for episode in group])
        none = mean <= 0 or len({e.paid for e in group}) == 1
        numbers = [0.0 if none else (e.total - mean) / (mean + eps) for e in group]
        found.append(_for_all_tokens(group, numbers))
    return found


def reinforce_pp(groups: Sequence[Group], gamma: float, group_baseline: bool) -> Credit:
    """REINFORCE++, section 3: discounted token returns, less the group's mean reward, standardized over the batch."""
    found = []
    for group in groups:
        baseline = _mean([episode.total for episode in group]) if group_baseline else 0.0
        found.append([[x - baseline for x in _discounted(_token_rewards(e), gamma)] for e in group])
    return _over_batch(found)


def returns(groups: Sequence[Group], gamma: float, baseline: str) -> Credit:
    """Monte Carlo: the discounted sum of the turns that follow, this one included."""
    by_turn = [[_discounted(_turn_rewards(episode), gamma) for episode in group] for group in groups]
    if baseline == "group":
        paid = [[x for e in group for x in _discounted(e.rewards, gamma)] for group in groups]
        by_turn = [_over_batch([group], paid=own)[0] for group, own in zip(by_turn, paid, strict=True)]
    elif baseline == "batch":
        by_turn = _over_batch(by_turn)
    return [
        [[numbers[token.turn] for token in e.sampled] for e, numbers in zip(group, of_group, strict=True)]
        for group, of_group in zip(groups, by_turn, strict=True)
    ]


def gigpo(groups: Sequence[Group], gamma: float, weight: float, divide: bool, eps: float) -> Credit:
    """GiGPO, section 3: the episode's advantage plus weight times its turn's among turns of the same state."""
    found = grpo(groups, divide, eps)
    for group, credit in zip(groups, found, strict=True):
        for episode, numbers in zip(group, credit, strict=True):
            for place, token in enumerate(episode.sampled):
                state, here, same, paid = episode.states[token.turn], 0, [], []
                for other in group:
                    for turn, value in enumerate(_discounted(_turn_rewards(other), gamma)):
                        if other.states[turn] == state:
                            if other is episode and turn == token.turn:
                                here = len(same)
                            same.append(value)
                            paid.append(_discounted(other.rewards, gamma)[turn])
                numbers[place] += weight * _compared(same, divide, eps, paid)[here]
    return found


def gdpo(groups: Sequence[Group], weights: dict[str, float], eps: float) -> Credit:
    """GDPO, equations 4 to 6: every reward normalized by itself, the weighted sum normalized over the batch."""
    sums = []
    for group in groups:
        columns = {name: _compared([e.named[name] for e in group], True, eps) for name in weights}
        sums.append([[sum(weights[name] * columns[name][i] for name in weights)] for i in range(len(group))])
    normal = _over_batch(sums, eps)
    return [
        _for_all_tokens(group, [x for (x,) in numbers]) for group, numbers in zip(groups, normal, strict=True)
    ]


def gae(groups: Sequence[Group], gamma: float, lam: float, normalize: bool) -> Credit:
    """Schulman et al. 2016, equation 16, over sampled tokens."""
    found = [[gae_of(episode, gamma, lam)[0] for episode in group] for group in groups]
    return _over_batch(found) if normalize else found


def gae_of(episode: Episode, gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Advantages sum_l (gamma lam)^l delta_(n+l) and the critic's targets A + V."""
    rewards = _token_rewards(episode)
    values = [*episode.values, 0.0 if episode.ended else episode.after]
    deltas = [r + gamma * values[n + 1] - values[n] for n, r in enumerate(rewards)]
    advantages = _discounted(deltas, gamma * lam)
    return advantages, [a + v for a, v in zip(advantages, episode.values, strict=True)]


def overlong(length: int, tokens: int, margin: int) -> float:
    """DAPO, equation 13."""
    if length <= tokens - margin:
        return 0.0
    if length <= tokens:
        return ((tokens - margin) - length) / margin
    return -1.0


ESTIMATORS: dict[str, Callable[..., Credit]] = {
    "group": grpo,
    "rloo": rloo,
    "maxrl": maxrl,
    "reinforce_pp": reinforce_pp,
    "returns": returns,
    "gigpo": gigpo,
    "gdpo": gdpo,
    "gae": gae,
}


def credit(section: dict[str, Any], groups: Sequence[Group]) -> Credit:
    """What a recipe's section `credit` means."""
    return ESTIMATORS[section["kind"]](groups, **_options(section))


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _compared(numbers: Sequence[float], divide: bool, eps: float, paid: Sequence[float] = ()) -> list[float]:
    """x - mean, divided by the population's deviation + eps or not; zeros where all are equal, if divided in pay."""
    if len(set(paid if divide and paid else numbers)) < 2:
        return [0.0 for _ in numbers]
    mean = _mean(numbers)
    scale = math.sqrt(_mean([(x - mean) ** 2 for x in numbers])) + eps if divide else 1.0
    return [(x - mean) / scale for x in numbers]


def _over_batch(numbers: Credit, eps: float = 1e-8, paid: Sequence[float] = ()) -> Credit:
    flat = iter(_compared([x for group in numbers for part in group for x in part], True, eps, paid))
    return [[[next(flat) for _ in part] for part in group] for group in numbers]


def _for_all_tokens(group: Group, numbers: Sequence[float]) -> list[list[float]]:
    return [[number for _ in episode.sampled] for episode, number in zip(group, numbers, strict=True)]


def _discounted(rewards: Sequence[float], gamma: float) -> list[float]:
    count = len(rewards)
    return [sum(gamma ** (j - k) * rewards[j] for j in range(k, count)) for k in range(count)]


def _turn_rewards(episode: Episode) -> list[float]:
    """With what each turn's tokens earned beside it."""
    found = list(episode.rewards)
    for token, extra in zip(episode.sampled, episode.extra, strict=False):
        found[token.turn] += extra
    return found


def _token_rewards(episode: Episode) -> list[float]:
    """A turn is paid at its last sampled token; one that sampled nothing at the last one before, or at the first."""
    found = list(episode.extra) or [0.0 for _ in episode.sampled]
    for turn, reward in enumerate(episode.rewards):
        until = [place for place, token in enumerate(episode.sampled) if token.turn <= turn]
        found[until[-1] if until else 0] += reward
    return found


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


def dppo(logprob: float, proximal: float, advantage: float, divergence: str, threshold: float) -> Pair:
    """DPPO, section 4, its binary approximations: the token or any other."""
    p, q = math.exp(logprob), math.exp(proximal)
    if divergence == "tv":
        apart = (abs(p - q) + abs((1 - p) - (1 - q))) / 2
    else:
        apart = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    outward = (advantage > 0 and p > q) or (advantage < 0 and p < q)
    if outward and apart > threshold:
        return 0.0, 0.0
    return -p / q * advantage, -p / q * advantage


def gspo(
    logprobs: Sequence[float],
    proximals: Sequence[float],
    advantages: Sequence[float],
    segments: Sequence[int],
    clip_low: float,
    clip_high: float,
) -> list[Pair]:
    """GSPO, section 4.3: the token's own gradient, the segment's geometric mean as its ratio."""
    found = []
    for advantage, segment in zip(advantages, segments, strict=True):
        ratios = [
            math.exp(logprobs[n] - proximals[n]) for n in range(len(segments)) if segments[n] == segment
        ]
        ratio = math.prod(ratios) ** (1 / len(ratios))
        found.append(_clipped_pair(ratio, advantage, clip_low, clip_high, None))
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
        return gspo(logprobs, proximals, advantages, segments, **_options(section))
    tokens = zip(logprobs, proximals, advantages, strict=True)
    return [LOSSES[section["kind"]](*token, **_options(section)) for token in tokens]


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
    """Schulman 2020."""
    ratio = math.exp(reference - logprob)
    if estimator == "k1":
        return -math.log(ratio), 1.0
    if estimator == "k2":
        return math.log(ratio) ** 2 / 2, -math.log(ratio)
    return (ratio - 1) - math.log(ratio), 1 - ratio


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


def _options(section: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != "kind"}
