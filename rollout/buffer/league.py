"""Opponents of new groups: which frozen version of which policy plays the other seat.

    latest_share of the groups    the latest version of one of the opponents: plain self-play
    all others                    a past version, by the sampler

Prioritized fictitious self-play (Vinyals et al. 2019, AlphaStar) samples a past version B against policy A in
proportion to f(P[A beats B]), with f(x) = (1 - x)^p: those that A loses to are met most.

The choice depends on the run's seed, the group id, the weight version and the groups of earlier steps only. It is
stored with the group when it is issued, so that a resumed run plays the same opponents.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from rollout.wire.policies import Opponent
from rollout.wire.trajectory import EndReason

LOOKED_BACK = 8192  # newest groups whose outcomes count
_STREAM = 7  # separates these random numbers from others of the run's seed
# A group's outcome counts from the version after the step that was trained on it, or that it was dropped in.
_OUTCOMES = f"""
SELECT g.opponent, g.opponent_version, avg(min(max(e.reward, 0), 1)), count(*)
FROM groups AS g JOIN episodes AS e ON e.group_id = g.group_id AND e.attempt = g.attempt
WHERE g.opponent IS NOT NULL AND g.group_id > (SELECT max(group_id) FROM groups) - {LOOKED_BACK}
    AND coalesce(g.taken_version < :version, g.state = 'dropped' AND g.issue_version < :version)
    AND e.end_reason NOT IN ('{EndReason.FAILED}', '{EndReason.CANCELLED}')
GROUP BY g.group_id ORDER BY g.group_id DESC
"""


class LeagueSettings(BaseModel):
    """Whom policies of a run meet in games."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_versions: int = Field(
        4, gt=0, description="versions whose number is a multiple of this are kept as past versions"
    )
    keep: int = Field(
        8,
        gt=0,
        description="most past versions of each policy that are opponents: version 0, and the newest of the others",
    )
    sampler: Literal["pfsp", "uniform"] = Field(
        "pfsp",
        description="how past versions are sampled. pfsp: by success, those that the policy loses to most "
        "(prioritized fictitious self-play, Vinyals et al. 2019); uniform: all alike",
    )
    power: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="exponent p of pfsp: a version that the policy beats at the rate x has the weight (1 - x)^p",
    )
    latest_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="fraction of the groups that meet the latest version of an opponent instead of a past one. 1 is "
        "plain self-play",
    )
    window: int = Field(
        256, gt=0, description="newest episodes against a version that its win rate is measured on"
    )
    engines: int = Field(
        4,
        gt=0,
        description="engines of opponents that one worker starts for each policy; groups against other versions "
        "wait for one. Each takes the memory of an engine",
    )

    def past(self, version: int) -> list[int]:
        """The past versions that are opponents while engines hold `version`; [0] before there is another."""
        multiples = [each for each in range(0, max(version, 1), self.every_versions) if each]
        return [0, *multiples[len(multiples) - min(self.keep - 1, len(multiples)) :]]


def pfsp_weights(win_rates: Sequence[float], power: float) -> NDArray[np.float64]:
    """[V] probability of each past version, by the rates at which the policy beats them: (1 - x)^p, normalized.

    If it beats all of them always, they are all alike.
    """
    weight_V = (1.0 - np.asarray(win_rates, dtype=np.float64)) ** power
    total = weight_V.sum()
    return weight_V / total if total > 0 else np.full(len(weight_V), 1.0 / len(weight_V))


class Matchmaking:
    """Opponents of a policy's new groups. opponents: names of the policies it meets. db: the ledger's connection."""

    def __init__(
        self, settings: LeagueSettings, opponents: Sequence[str], seed: int, db: sqlite3.Connection
    ) -> None:
        self._settings = settings
        self._opponents = tuple(opponents)
        self._seed = seed
        self._db = db
        self._version: int | None = None  # of the win rates; None: not read yet
        self._rates: dict[Opponent, float] = {}

    def opponent(self, group_id: int, version: int) -> Opponent:
        """Who plays the other seat of a new group. version: of the engines' weights."""
        settings = self._settings
        rng = np.random.default_rng((self._seed, group_id, _STREAM))
        if rng.random() < settings.latest_share:
            return Opponent(self._opponents[rng.integers(len(self._opponents))], version)
        candidates = [Opponent(name, past) for name in self._opponents for past in settings.past(version)]
        if settings.sampler == "uniform":
            return candidates[rng.integers(len(candidates))]
        rates = self.win_rates(version)
        shares_V = pfsp_weights([rates.get(each, 0.5) for each in candidates], settings.power)
        return candidates[rng.choice(len(candidates), p=shares_V)]

    def win_rates(self, version: int) -> dict[Opponent, float]:
        """How often the policy beat each opponent that it has met, in the newest episodes: the mean reward in [0, 1].

        One more game than was played counts, a draw, so that a few games decide little.
        """
        if self._version != version:
            self._rates, self._version = self._measured(version), version
        return self._rates

    def forget(self) -> None:
        """Read the outcomes again: groups have changed their states."""
        self._version = None

    def _measured(self, version: int) -> dict[Opponent, float]:
        won: dict[Opponent, float] = defaultdict(lambda: 0.5)
        played: dict[Opponent, int] = defaultdict(int)
        for name, past, mean, episodes in self._db.execute(_OUTCOMES, {"version": version}):
            opponent = Opponent(name, past)
            if played[opponent] < self._settings.window:
                won[opponent] += mean * episodes
                played[opponent] += episodes
        return {opponent: won[opponent] / (count + 1) for opponent, count in played.items()}
