"""Limits on what an episode costs on average, held by multipliers that follow the costs measured: Lagrangian learning.

    maximize the mean reward, subject to mean cost_i <= limit_i
    reward learned from = (reward - sum of multiplier_i * cost_i) / (1 + sum of multiplier_i)

Once a step each multiplier moves by the mean cost of the step's fresh episodes, by dual ascent or PID control, and the
step uses it. Stooke et al. 2020, "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods"; the division,
theirs too, keeps the size of a step where a multiplier is large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from learner.algorithm.episode import Episode


@dataclass(frozen=True, slots=True)
class Multiplier:
    """What a constraint's next update depends on; three numbers of a checkpoint."""

    value: float = 0.0  # never negative
    integral: float = 0.0  # of what costs were above the limit, never negative
    cost: float | None = None  # mean of the step before; None: no episode has ever said it


class DualSettings(BaseModel, extra="forbid", frozen=True):
    """Dual ascent: the multiplier grows by what the cost is above the limit, and falls by what it is below."""

    kind: Literal["dual"] = "dual"
    rate: float = Field(
        gt=0, description="growth of the multiplier per step and unit of cost above the limit"
    )

    def __call__(self, now: Multiplier, cost: float, limit: float) -> Multiplier:
        """The multiplier after a step with this mean cost: max(0, value + rate (cost - limit))."""
        return Multiplier(value=max(0.0, now.value + self.rate * (cost - limit)), cost=cost)


class PidSettings(BaseModel, extra="forbid", frozen=True):
    """PID control: multiplier (kp e + ki I + kd D), not below 0, with e the cost above its limit."""

    kind: Literal["pid"] = "pid"
    kp: float = Field(default=0.0, ge=0, description="factor of what the cost is above its limit now")
    ki: float = Field(gt=0, description="factor of the sum over steps of what it was above, never negative")
    kd: float = Field(default=0.0, ge=0, description="factor of what it grew since the step before")

    def __call__(self, now: Multiplier, cost: float, limit: float) -> Multiplier:
        """The multiplier after a step with this mean cost. Stooke et al. 2020, algorithm 2.

        e = cost - limit; I = max(0, I + e); D = max(0, cost - cost before), 0 in the first step.
        """
        above = cost - limit
        integral = max(0.0, now.integral + above)
        growth = 0.0 if now.cost is None else max(0.0, cost - now.cost)
        value = max(0.0, self.kp * above + self.ki * integral + self.kd * growth)
        return Multiplier(value, integral, cost)


class ConstraintSettings(BaseModel, extra="forbid", frozen=True):
    """A limit on the mean of a named cost."""

    name: str = Field(
        min_length=1,
        description="name of the cost, as an environment's `info['costs']` or a reward of a recipe says it",
    )
    limit: float = Field(ge=0, description="largest mean over episodes, in the unit of the cost")
    update: Annotated[DualSettings | PidSettings, Field(discriminator="kind")] = Field(
        description="how the multiplier follows the costs: dual ascent or PID control"
    )


Constraints = tuple[ConstraintSettings, ...]
Multipliers = Mapping[str, Multiplier]


def updated(constraints: Constraints, now: Multipliers, described: Mapping[str, float]) -> Multipliers:
    """The multipliers after a step with these metrics, of which costs/NAME/mean counts.

    A step without any cost of a name has a mean of 0. ValueError, in one line, where no step had any yet.
    """
    found = {}
    for constraint in constraints:
        before, cost = now.get(constraint.name, Multiplier()), described.get(f"costs/{constraint.name}/mean")
        if cost is None and before.cost is None:
            said = sorted(
                key[6:-5] for key in described if key.startswith("costs/") and key.endswith("/mean")
            )
            raise ValueError(
                f"learner.algorithm.constraints: no episode says a cost {constraint.name!r} (costs said: "
                f"{', '.join(said) or 'none'}); let the environment give it in info['costs'] in every episode, 0 where "
                "nothing happened"
            )
        found[constraint.name] = constraint.update(before, cost or 0.0, constraint.limit)
    return found


def metrics(constraints: Constraints, multipliers: Multipliers) -> dict[str, float]:
    """The multiplier and the limit of each constraint."""
    found = {
        f"constraint/{constraint.name}/multiplier": multipliers[constraint.name].value
        for constraint in constraints
    }
    return found | {f"constraint/{constraint.name}/limit": constraint.limit for constraint in constraints}


def stored(multipliers: Multipliers) -> dict[str, Any]:
    """As JSON, which holds floats exactly."""
    return {name: asdict(each) for name, each in multipliers.items()}


def restored(kept: Mapping[str, Any]) -> Multipliers:
    """What was `stored`."""
    return {name: Multiplier(**each) for name, each in kept.items()}


def priced(episode: Episode, multipliers: Multipliers) -> Episode:
    """The episode with its costs in its rewards, turn by turn: (r - sum of multiplier * cost) / (1 + sum of them).

    ValueError for an episode of self-play: a cost says not which of its players it is of.
    """
    if episode.sides_K:
        raise ValueError(
            "learner.algorithm.constraints limits costs of one player, but an episode of self-play has two; remove it"
        )
    rewards_K, total = episode.rewards_K, 1.0
    for name, each in multipliers.items():
        total += each.value
        if name in episode.costs:
            rewards_K = rewards_K - each.value * episode.costs[name]
    return replace(episode, rewards_K=rewards_K / total)
