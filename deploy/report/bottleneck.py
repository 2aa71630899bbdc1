"""The bottleneck of a run, from the shares of the learner's time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rollout.wire.metrics import Row


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of the wall clock of steps, 0..1: waiting for rollouts, training, publishing weights, and the rest."""

    wait: float
    train: float
    publish: float

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Shares:
        """Shares over all given steps together, weighted by their duration. ValueError if they took no time."""
        rows = list(rows)
        total = sum(row["step_s"] for row in rows)
        if total <= 0:
            raise ValueError(f"shares are undefined for {len(rows)} steps of {total} s in total")
        wait, train, publish = (
            sum(row[name] for row in rows) / total for name in ("wait_s", "train_s", "publish_s")
        )
        return cls(wait, train, publish)

    @property
    def rest(self) -> float:
        return max(0.0, 1 - self.wait - self.train - self.publish)

    @property
    def verdict(self) -> str:
        """The bottleneck in one line, with the shares and what would help."""
        if self.wait >= max(self.train, self.publish):
            return f"rollout-bound: waited for rollouts {self.wait:.0%} of the time; more workers would help"
        if self.train >= self.publish:
            return f"learner-bound: trained {self.train:.0%} of the time, waited for rollouts {self.wait:.0%}"
        return f"sync-bound: published weights {self.publish:.0%} of the time, waited for rollouts {self.wait:.0%}"
