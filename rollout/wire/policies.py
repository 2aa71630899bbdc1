"""The names of a run's policies, and one frozen version of a policy."""

from __future__ import annotations

from dataclasses import dataclass

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"  # what a policy may be called: it names folders, too
POLICY = "policy"  # of a run with a single policy, unless its recipe says otherwise


@dataclass(frozen=True, slots=True)
class Opponent:
    """A frozen policy that plays the other seat of a game: one version of a policy of the run."""

    policy: str
    version: int

    def __str__(self) -> str:
        return f"{self.policy}@{self.version}"
