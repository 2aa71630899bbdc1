"""Which environment a group plays: several streams of tasks, interleaved by their shares.

    group id -> the environment whose next group is due first -> that environment's own stream, at its own count

After any number of groups each environment has had its share of them, less than one group more or fewer. Each stream is
asked for 0, 1, 2, ... in order, so that an environment with a list of tasks plays each once per pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import lcm

from rollout.wire.trajectory import Task


class Interleaving:
    """Slots divided by shares: a pure function of the slot's number, periodic with the sum of the whole shares.

    The n-th group of an environment with share p (of a sum of 1) is released at slot floor((n-1)/p) and due before slot
    ceil(n/p); of those released the one due first has the slot. That is the fair schedule of Baruah et al. 1996
    (Proportionate Progress), in which no environment is ever a whole group ahead or behind.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        """shares: positive, in any unit; decimals are taken exactly as they are written. ValueError for others."""
        if not shares or not all(0 < share < float("inf") for share in shares):
            raise ValueError(f"shares {list(shares)} must be positive numbers")
        exact = [Fraction(repr(float(share))) for share in shares]
        whole = lcm(*(share.denominator for share in exact))
        self._shares = [int(share * whole) for share in exact]
        self._period = sum(self._shares)
        self._counts = [0] * len(shares)  # groups of each within the known slots
        self._known: list[tuple[int, int]] = []  # slots of the first period so far

    def at(self, slot: int) -> tuple[int, int]:
        """Return the place of the environment that has the slot, and how many slots before it were that one's."""
        periods, within = divmod(slot, self._period)
        while len(self._known) <= within:
            self._extend()
        place, count = self._known[within]
        return place, periods * self._shares[place] + count

    def _extend(self) -> None:
        slot = len(self._known)
        due = [
            (-(-(count + 1) * self._period // share), place)
            for place, (count, share) in enumerate(zip(self._counts, self._shares, strict=True))
            if count * self._period < share * (slot + 1)
        ]
        _, place = min(due)
        self._known.append((place, self._counts[place]))
        self._counts[place] += 1


class TaskMixture:
    """Task of a group id in a run with several environments, or with one. streams: of each, by the same order."""

    def __init__(self, streams: Sequence[Callable[[int], Task]], shares: Sequence[float]) -> None:
        self._streams = tuple(streams)
        self._interleaving = Interleaving(shares)

    def __call__(self, group_id: int) -> Task:
        place, count = self._interleaving.at(group_id)
        return self._streams[place](count)
