"""Random episodes, told once for the formulas (tests/reference.py) and once in the words of the wire.

They hold what a loop over turns may overlook: unequal turn counts, observations at the start, in the middle and at the
end, histories that were rewritten, episodes that were cut off, states met again, turns that sampled nothing. Siblings
begin alike, up to any token.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from rollout.wire import trajectory as wire
from tests.reference import Episode, Token

Pick = Callable[[int, int], int]  # an integer of the closed range
TASK = wire.Task.of("toy", 0)


def random_groups(seed: int, groups: int = 2, siblings: int = 3, alike: bool = True) -> list[list[Episode]]:
    """So many groups of so many episodes. alike: siblings share prefixes of tokens."""
    rng, forks = np.random.default_rng(seed), np.random.default_rng([seed, 1])

    def pick(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    made = [[episode(pick) for _ in range(siblings)] for _ in range(groups)]
    return [beginning_alike(each, forks) for each in made] if alike else made


@st.composite
def any_groups(draw: st.DrawFn) -> list[list[Episode]]:
    """One to three groups of two to four episodes."""

    def pick(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    return [[episode(pick) for _ in range(pick(2, 4))] for _ in range(pick(1, 3))]


def episode(pick: Pick) -> Episode:
    """Its shape is picked, its tokens are noise. Rewards are eighths, so that equal sums are equal floats."""
    noise = np.random.default_rng(pick(0, 9999))
    turns, segment = pick(1, 3), 0
    tokens: list[Token] = []
    for turn in range(turns):
        rewritten = turn > 0 and pick(0, 3) == 0
        segment += rewritten
        opens = turn == 0 or rewritten
        observed = pick(1 if opens else 0, 4)
        acted = 0 if not opens and observed and pick(0, 3) == 0 else pick(1, 3)
        tokens += [Token(int(noise.integers(5, 99)), False, turn, segment) for _ in range(observed)]
        tokens += [_sampled(noise, turn, segment) for _ in range(acted)]
    count = sum(token.sampled for token in tokens)
    return Episode(
        tokens=tuple(tokens),
        rewards=tuple(pick(-2, 6) / 4 for _ in range(turns)),
        states=tuple(f"state {pick(0, 2)}" for _ in range(turns)),
        named={"goal": pick(0, 4) / 4, "form": pick(-4, 0) / 4, "costs/risk": len(tokens) / 8},
        ended=bool(pick(0, 1)),
        values=_eighths(noise, count),
        after=float(noise.integers(-8, 8)) / 8,
    )


def beginning_alike(siblings: list[Episode], forks: np.random.Generator) -> list[Episode]:
    """The siblings, whose first segments begin with the tokens of the sibling before, up to a random one."""
    found = siblings[:1]
    for of in siblings[1:]:
        known = [token.id for token in found[-1].tokens if not token.segment]
        own = sum(not token.segment for token in of.tokens)
        ids = known[: int(forks.integers(0, min(len(known), own) + 1))]
        head = tuple(replace(token, id=id) for token, id in zip(of.tokens, ids, strict=False))
        found.append(replace(of, tokens=head + of.tokens[len(head) :]))
    return found


def paid(of: Episode) -> Episode:
    """The same, with a reward of each sampled token beside its turn's."""
    return Episode(**{**vars(of), "extra": _eighths(np.random.default_rng(len(of.tokens)), len(of.sampled))})


def even(of: Episode) -> Episode:
    """The same, having earned nothing: among its like it has no advantage."""
    return Episode(**{**vars(of), "rewards": (0.0,) * len(of.rewards), "named": dict.fromkeys(of.named, 0.0)})


def trajectory(of: Episode, group_id: int = 0, index: int = 0) -> wire.Trajectory:
    """The episode in the words of the wire; values and rewards of tokens have none there."""
    steps = tuple(_step(of, turn) for turn in range(len(of.rewards)))
    end = wire.EndReason.TERMINATED if of.ended else wire.EndReason.TRUNCATED
    return wire.Trajectory(group_id, 0, index, TASK, steps, end)


def group(of: list[Episode], group_id: int = 0) -> wire.Group:
    """Siblings in the words of the wire."""
    episodes = tuple(trajectory(story, group_id, index) for index, story in enumerate(of))
    return wire.Group(wire.Slot(group_id, 0, TASK, 0), episodes)


def _sampled(noise: np.random.Generator, turn: int, segment: int) -> Token:
    logprob = float(np.float32(noise.normal(-4.5, 0.4)))
    return Token(int(noise.integers(5, 99)), True, turn, segment, logprob, int(noise.integers(0, 2)))


def _eighths(noise: np.random.Generator, count: int) -> tuple[float, ...]:
    return tuple(float(x) / 8 for x in noise.integers(-8, 8, count))


def _step(of: Episode, turn: int) -> wire.Turn:
    here = [token for token in of.tokens if token.turn == turn]
    acted = [token for token in here if token.sampled]
    last = turn == len(of.rewards) - 1
    return wire.Turn(
        turn=turn,
        segment=here[0].segment,
        observation=of.states[turn],
        action="",
        prompt_ids=np.array([token.id for token in here if not token.sampled], np.int32),
        action_ids=np.array([token.id for token in acted], np.int32),
        behavior_logprobs=np.array([token.behavior for token in acted], np.float32),
        versions=np.array([token.version for token in acted], np.int32),
        reward=of.rewards[turn],
        finish_reason="stop",
        named_rewards=json.dumps(of.named) if last else None,
    )
