"""Which pair is asked next: a pure function of pairs, judgements and the worth of asking each."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random
from typing import NamedTuple


class Pair(NamedTuple):
    """Two episodes of one group, by their places in it; first < second."""

    group_id: int
    attempt: int
    first: int
    second: int


Worth = Callable[[Pair], float]  # of asking a pair; the highest is asked first


def next_pair(
    pairs: Sequence[Pair],
    seen: Mapping[Pair, Collection[str]],
    annotator: str,
    rng: Random,
    *,
    shown: Collection[Pair] = (),
    overlap: float = 0.2,
    worth: Worth | None = None,
) -> Pair | None:
    """The next pair for an annotator; None if there is none that this annotator has not seen.

    seen: the annotators of each judged pair. shown: pairs that others have before them now. overlap: probability of a
    pair that others have seen too, from which agreement is computed. worth: None asks at random.
    """
    left = [pair for pair in pairs if annotator not in seen.get(pair, ())]
    fresh = [pair for pair in left if not seen.get(pair) and pair not in shown]
    repeated = [pair for pair in left if seen.get(pair)]
    candidates = (repeated if rng.random() < overlap else fresh) or fresh or repeated or left
    if not candidates:
        return None
    return rng.choice(candidates) if worth is None else max(candidates, key=worth)


def uncertainty(first_E: Sequence[float], second_E: Sequence[float]) -> float:
    """Entropy, in nats, of the answer which of two episodes is better, by the scores that E judges give them.

    The probability is that of Bradley and Terry (1952), averaged over the judges, so that close scores and judges who
    disagree are both uncertain. One judge is an ensemble of one.
    """
    # (1 + tanh(x / 2)) / 2 is the logistic function, which does not overflow in this form.
    wins = [(1 + math.tanh((a - b) / 2)) / 2 for a, b in zip(first_E, second_E, strict=True)]
    better = math.fsum(wins) / len(wins)
    return -math.fsum(p * math.log(p) for p in (better, 1 - better) if p > 0)
