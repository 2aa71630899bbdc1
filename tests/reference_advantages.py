"""The papers' formulas from rewards to advantages, one number at a time: see tests/reference.py."""

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
Advantages = list[list[list[float]]]  # of each group, of each episode, of each sampled token


# Rewards to advantages.


def grpo(groups: Sequence[Group], divide: bool, eps: float, deviation: str = "population") -> Advantages:
    """DeepSeekMath 4.1: (r - mean) / (std + eps); Dr. GRPO 3.2: r - mean."""
    found = []
    for group in groups:
        totals, paid = [e.total for e in group], [e.paid for e in group]
        found.append(_for_all_tokens(group, _compared(totals, divide, eps, paid, deviation)))
    return found


def rloo(groups: Sequence[Group]) -> Advantages:
    """RLOO, equation 5: r minus the mean of the others'."""
    found = []
    for group in groups:
        others = [_mean([o.total for o in group if o is not episode]) for episode in group]
        found.append(
            _for_all_tokens(group, [e.total - other for e, other in zip(group, others, strict=True)])
        )
    return found


def maxrl(groups: Sequence[Group], eps: float) -> Advantages:
    """MaxRL, section 4: (r - mean) / mean; nothing is learned where nothing was earned."""
    found = []
    for group in groups:
        mean = _mean([episode.total for episode in group])
        none = mean <= 0 or len({e.paid for e in group}) == 1
        numbers = [0.0 if none else (e.total - mean) / (mean + eps) for e in group]
        found.append(_for_all_tokens(group, numbers))
    return found


def reinforce_pp(groups: Sequence[Group], gamma: float, group_baseline: bool) -> Advantages:
    """REINFORCE++, section 3: discounted token returns, standardized over the batch.

    The paper's variant with a group baseline ("REINFORCE++-baseline", several responses a prompt) first has, at every
    token t of response o to prompt q, A(q, o, t) = R(q, o) - mean of R(q, .): one number for a response, no discount.
    """
    if not group_baseline:
        return _over_batch([[_discounted(_token_rewards(e), gamma) for e in group] for group in groups])
    found = []
    for group in groups:
        whole = [math.fsum((*e.rewards, *e.extra)) for e in group]
        found.append(
            [
                [r - math.fsum(whole) / len(whole) for _ in e.sampled]
                for e, r in zip(group, whole, strict=True)
            ]
        )
    return _over_batch(found)


def returns(groups: Sequence[Group], gamma: float, baseline: str) -> Advantages:
    """Monte Carlo: the discounted sum of the turns that follow, this one included."""
    by_turn = [[_discounted(_turn_rewards(episode), gamma) for episode in group] for group in groups]
    paid = [[_discounted(e.rewards, gamma) for e in group] for group in groups]
    if baseline == "group":
        flat = [[x for numbers in of_group for x in numbers] for of_group in paid]
        by_turn = [_over_batch([group], paid=own)[0] for group, own in zip(by_turn, flat, strict=True)]
    elif baseline == "turn":
        by_turn = [_by_turn(group, own) for group, own in zip(by_turn, paid, strict=True)]
    elif baseline == "batch":
        by_turn = _over_batch(by_turn)
    return [
        [[numbers[token.turn] for token in e.sampled] for e, numbers in zip(group, of_group, strict=True)]
        for group, of_group in zip(groups, by_turn, strict=True)
    ]


def _by_turn(group: list[list[float]], paid: list[list[float]]) -> list[list[float]]:
    """Each turn less the mean of the siblings' turns of its number, all over one deviation of the group."""
    centered = [[0.0 for _ in numbers] for numbers in group]
    differ = False
    for turn in range(max(map(len, group))):
        peers = [numbers[turn] for numbers in group if len(numbers) > turn]
        differ = differ or len({numbers[turn] for numbers in paid if len(numbers) > turn}) > 1
        for place, numbers in enumerate(group):
            if len(numbers) > turn and len(peers) > 1:
                centered[place][turn] = numbers[turn] - _mean(peers)
    variance = _mean([x * x for numbers in centered for x in numbers])
    return [[x / math.sqrt(variance + 1e-8) if differ else 0.0 for x in numbers] for numbers in centered]


def gigpo(
    groups: Sequence[Group],
    gamma: float,
    weight: float,
    divide: bool,
    eps: float,
    deviation: str = "population",
) -> Advantages:
    """GiGPO, section 3: the episode's advantage plus weight times its turn's among turns of the same state."""
    found = grpo(groups, divide, eps, deviation)
    for group, own in zip(groups, found, strict=True):
        for episode, numbers in zip(group, own, strict=True):
            for place, token in enumerate(episode.sampled):
                state, here, same, paid = episode.states[token.turn], 0, [], []
                for other in group:
                    for turn, value in enumerate(_discounted(_turn_rewards(other), gamma)):
                        if other.states[turn] == state:
                            if other is episode and turn == token.turn:
                                here = len(same)
                            same.append(value)
                            paid.append(_discounted(other.rewards, gamma)[turn])
                numbers[place] += weight * _compared(same, divide, eps, paid, deviation)[here]
    return found


def gdpo(
    groups: Sequence[Group], weights: dict[str, float], eps: float, deviation: str = "population"
) -> Advantages:
    """GDPO, equations 4 to 6: every reward normalized by itself, the weighted sum normalized over the batch."""
    sums = []
    for group in groups:
        columns = {
            name: _compared([e.named[name] for e in group], True, eps, (), deviation) for name in weights
        }
        sums.append([[sum(weights[name] * columns[name][i] for name in weights)] for i in range(len(group))])
    normal = _over_batch(sums)
    return [
        _for_all_tokens(group, [x for (x,) in numbers]) for group, numbers in zip(groups, normal, strict=True)
    ]


def gae(groups: Sequence[Group], gamma: float, lam: float, normalize: bool) -> Advantages:
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


ESTIMATORS: dict[str, Callable[..., Advantages]] = {
    "grpo": grpo,
    "rloo": rloo,
    "maxrl": maxrl,
    "reinforce_pp": reinforce_pp,
    "returns": returns,
    "gigpo": gigpo,
    "gdpo": gdpo,
    "gae": gae,
    "none": lambda groups: [[[0.0] * len(story.sampled) for story in group] for group in groups],
}


def advantages(section: dict[str, Any], groups: Sequence[Group]) -> Advantages:
    """What a recipe's section `advantage` means."""
    return ESTIMATORS[section["kind"]](groups, **options(section))


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _compared(
    numbers: Sequence[float],
    divide: bool,
    eps: float,
    paid: Sequence[float] = (),
    deviation: str = "population",
) -> list[float]:
    """x - mean, divided by the deviation + eps or not; zeros where all are equal, if divided in pay."""
    if len(set(paid if divide and paid else numbers)) < 2:
        return [0.0 for _ in numbers]
    mean = _mean(numbers)
    squares = sum((x - mean) ** 2 for x in numbers) / (len(numbers) - (deviation == "sample"))
    return [(x - mean) / (math.sqrt(squares) + eps if divide else 1.0) for x in numbers]


def _over_batch(numbers: Advantages, paid: Sequence[float] = ()) -> Advantages:
    """Standardized with epsilon on the variance, as the authors' code whitens: (x - mean) / sqrt(variance + 1e-8)."""
    whole = [x for group in numbers for part in group for x in part]
    if len(set(paid or whole)) < 2:
        return [[[0.0 for _ in part] for part in group] for group in numbers]
    mean = _mean(whole)
    deviation = math.sqrt(_mean([(x - mean) ** 2 for x in whole]) + 1e-8)
    return [[[(x - mean) / deviation for x in part] for part in group] for group in numbers]


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


def options(section: dict[str, Any]) -> dict[str, Any]:
    """What a section says beside its kind."""
    return {name: value for name, value in section.items() if name != "kind"}
