"""How the tasks of an evaluation are played, and the outcome of each of its episodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.rewards.answers import answer_in, chosen_letter, last_number, plain_answer
from rollout.buffer.replay_store import EpisodeRow
from rollout.engines.engine import Sampling, derive_seed
from rollout.episodes.episode import EpisodeSpec
from rollout.wire.policies import POLICY
from rollout.wire.trajectory import Group, Slot, Task, Trajectory

_EVALUATION = 1  # a component of the seed, which separates evaluation from training episodes

Majority = Literal["none", "text", "number", "choice"]


class EvaluationSampling(BaseModel):
    """Sampling of evaluations; what is not set is as in training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float | None = Field(
        None,
        ge=0,
        description="temperature; 0: greedy, the likeliest token each time. Not set: as in training",
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="probability mass of nucleus sampling; not set: as in training"
    )
    max_tokens: int | None = Field(
        None, gt=0, description="most tokens sampled in one turn; not set: as in training"
    )

    def over(self, training: Sampling) -> Sampling:
        """The sampling of training with these changes."""
        return training.model_copy(update=self.model_dump(exclude_none=True))


_AS_IN_TRAINING = EvaluationSampling()


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """How often each task is played, how its turns are sampled, and what its samples vote with."""

    samples: int = 1
    sampling: EvaluationSampling = _AS_IN_TRAINING
    majority: Majority = "none"


ONCE = EvaluationPlan()


@dataclass(frozen=True, slots=True)
class EvaluationRow(EpisodeRow):
    """Outcome of an evaluated episode."""

    answer: str | None = None  # that it votes for; None: no vote
    costs: dict[str, float] = field(default_factory=dict)  # by name


def evaluation_row(trajectory: Trajectory, majority: Majority = "none") -> EvaluationRow:
    """The outcome of an episode, with the answer of its last turn and its costs."""
    action = trajectory.turns[-1].action if trajectory.turns else ""
    costs = {name: sum(costs_K) for name, costs_K in trajectory.costs.items()}
    return EvaluationRow(**asdict(EpisodeRow.of(trajectory)), answer=vote(action, majority), costs=costs)


def vote(action: str, majority: Majority) -> str | None:
    """The answer in a text that samples are counted by; None where there is none."""
    match majority:
        case "text":
            return plain_answer(action) or None
        case "number":
            number = last_number(answer_in(action))
            return None if number is None else str(number.normalize())
        case "choice":
            return chosen_letter(action)
        case "none":
            return None


def require_differing(samples: int, temperature: float | None) -> None:
    """ValueError for several samples of a greedy sampling. temperature: None, as in training, is above 0."""
    if samples > 1 and temperature == 0:
        raise ValueError(
            f"samples={samples} of a greedy sampling (temperature=0) are all the same; use samples=1, or a temperature "
            "above 0"
        )


def pass_sizes(samples: int) -> list[int]:
    """The k of pass@k for so many samples of a task: powers of two, and all of them."""
    return sorted({samples, *(2**power for power in range(samples.bit_length()) if 2**power <= samples)})


def evaluation_specs(
    tasks: Sequence[Task], samples: int, seed: int, worker: str, version: int, policy: str = POLICY
) -> list[EpisodeSpec]:
    """The episodes of an evaluation: the samples of each task, one task after another."""
    return [
        EpisodeSpec(
            Slot(task.seed, 0, task, version, policy),
            index,
            derive_seed(seed, task.seed, index, _EVALUATION),
            worker,
            evaluation=True,
        )
        for task in tasks
        for index in range(samples)
    ]


def as_groups(trajectories: Sequence[Trajectory], policy: str = POLICY) -> list[Group]:
    """Collect evaluation episodes into groups, for storage: the episodes of one task are siblings."""
    siblings: dict[tuple[int, Task], list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        siblings[trajectory.group_id, trajectory.task].append(trajectory)
    return [
        Group(Slot(group_id, 0, task, _first_version(members), policy), tuple(members))
        for (group_id, task), members in siblings.items()
    ]


def _first_version(trajectories: Sequence[Trajectory]) -> int:
    return min(
        (int(t.turns[0].versions[0]) for t in trajectories if t.turns and len(t.turns[0].versions)), default=0
    )
