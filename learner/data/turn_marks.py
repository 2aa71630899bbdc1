"""The places of a trajectory where the values of its turns are read: before and behind the tokens of each action.

    prompt  a a a  prompt  a a  0          a: sampled
          ^      ^       ^    ^
          V_0   Q_0     V_1  Q_1           V of the state, Q of the state and the action

The first kind of place and the second are scored in two sequences of the same tokens, which a packed row computes once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from learner.algorithm.episode import TurnValues
from learner.data.batch import TokenSequence
from learner.data.prepare import Example, TokenFunction, followed, of_sequences
from learner.parallel.ranks import ALONE, Ranks
from rollout.wire.trajectory import Float32Array


def turn_sequences(
    example: Example, targets: TurnValues | None = None, weight: float = 1.0
) -> list[TokenSequence]:
    """Of each segment with a sampled token, the places before actions and those behind, one after the other.

    targets: of every place, which become the column "value_targets"; weight: of every place in the loss.
    """
    tokens_K = example.episode.tokens_K
    numbers_N = np.repeat(np.arange(1, len(tokens_K) + 1), tokens_K).astype(np.float32)
    numbered = replace(example, columns={"turns": numbers_N})
    remaining = None if targets is None else (iter(targets.before_J), iter(targets.behind_J))
    found = []
    for sequence in numbered.sequences(weight):
        here_T = np.append(sequence.columns["turns"], 0.0)  # 0: not sampled
        last_T = np.insert(here_T[:-1], 0, 0.0)
        places = ((here_T != last_T) & (here_T > 0), (here_T != last_T) & (last_T > 0))
        for kind, place_T in enumerate(places):
            columns = {} if remaining is None else {"value_targets": _spread(remaining[kind], place_T)}
            found.append(replace(followed(sequence), sampled_T=place_T, columns=columns))
    return found


def of_turns(
    examples: Sequence[Example], compute: TokenFunction, tokens_per_row: int, ranks: Ranks = ALONE
) -> list[TurnValues]:
    """Apply `compute`, which returns a number for each scored place of a row, to every turn of each example."""
    by_example = [turn_sequences(example) for example in examples]
    remaining = iter(of_sequences([s for each in by_example for s in each], compute, tokens_per_row, ranks))
    none_0, found = np.zeros(0, np.float32), []
    for sequences in by_example:
        parts = [next(remaining) for _ in sequences]
        before_J, behind_J = (np.concatenate([none_0, *parts[kind::2]]) for kind in (0, 1))
        found.append(TurnValues(before_J, behind_J))
    return found


def _spread(values: Iterator[np.float32], place_T: np.ndarray) -> Float32Array:
    """The next values at these places, zeros elsewhere: float32 [T]."""
    out_T = np.zeros(len(place_T), np.float32)
    out_T[place_T] = [next(values) for _ in range(int(place_T.sum()))]
    return out_T
