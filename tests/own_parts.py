"""Parts as a user would bring them, outside of Manta's packages: formulas written again, and some that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.algorithm.schedule import OptimSettings
from learner.data.batch import MicroBatch
from learner.data.prepare import Example
from learner.stages.stage import StageLearner
from rollout.wire.trajectory import Group

Arrays = list[list[Any]]


def ppo(
    logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, sequence_N: Tensor, low: float, high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    ratio_N = torch.exp(logprobs_N - proximal_N)
    clipped_N = torch.clamp(ratio_N, 1 - low, 1 + high)
    return -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N), {"ratio": ratio_N}


def leave_one_out(groups: Sequence[Sequence[Any]], ranks: Any) -> Arrays:
    found: Arrays = []
    for group in groups:
        rewards = [episode.reward for episode in group]
        others = [(sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]
        found.append(
            [np.full(sum(e.tokens_K), r - o) for e, r, o in zip(group, rewards, others, strict=True)]
        )
    return found


def monte_carlo(groups: Sequence[Sequence[Any]], ranks: Any) -> tuple[Arrays, Arrays]:
    """GAE at gamma = lambda = 1: what is still to come, minus the value."""
    targets = [[np.cumsum(e.rewards_N[::-1])[::-1] for e in group] for group in groups]
    advantages = [
        [target_N - e.values.before_N for target_N, e in zip(of_group, group, strict=True)]
        for of_group, group in zip(targets, groups, strict=True)
    ]
    return advantages, targets


def capped(log_ratio_N: Tensor, sequence_N: Tensor, lag_N: Tensor, cap: float = 2.0) -> Tensor:
    return torch.exp(log_ratio_N).clamp(max=cap)


def half_square(
    logprobs_N: Tensor, entropy_N: Tensor, reference_N: Tensor | None, sequence_N: Tensor, weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    assert reference_N is not None
    return weight * (reference_N - logprobs_N) ** 2 / 2, {}


def late(
    logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, sequence_N: Tensor, run: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Raises in the second step of the run in this folder: the first has stored its advantages."""
    if Path(run, "advantages", "version-00000001.arrow").exists():
        _missing("second")
    return -advantages_N * (logprobs_N - proximal_N).exp(), {}


def _missing(name: str) -> None:
    raise KeyError(name)


def newest_first(candidates: Sequence[Any], uniform_C: Any) -> list[Any]:
    return sorted(candidates, key=lambda candidate: -candidate.group_id)


def success(episode: Any, bonus: float = 0.0) -> float:
    return float(bool(episode.success)) + bonus


def by_name(episode: Any) -> dict[str, float]:
    return {"turns": -float(len(episode.turns)), "seed": float(episode.task.seed)}


async def thoughtful(episode: Any) -> float:
    return 0.25


def unpayable(episode: Any) -> float:
    raise KeyError("no judge")


def bare(env: Any) -> Any:
    return env


class Heard:
    """Keeps what it was told, as lines of a file; fails in one hook where it is told to."""

    def __init__(self, path: str, fails_in: str = "") -> None:
        self._path, self._fails_in = Path(path), fails_in

    def _write(self, hook: str, what: object) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{hook} {what}\n")
        if hook == self._fails_in:
            raise OSError("no network")

    def on_run_start(self, config: dict[str, Any], folder: Path) -> None:
        self._write("on_run_start", (config["name"], folder.name))

    def on_step(self, row: dict[str, float]) -> None:
        self._write("on_step", row["step"])

    def on_eval(self, name: str, row: dict[str, Any]) -> None:
        self._write("on_eval", name)

    def on_run_end(self, summary: dict[str, Any] | None) -> None:
        self._write("on_run_end", summary and summary["steps"])


class Preferences:
    """Direct preference optimization (Rafailov et al. 2023, equation 7): the best episode of a group against the worst.

    Its gradient is that of the likelihoods, weighed by how wrongly the policy ranks the two: that is what the loss has.
    """

    def __init__(self, beta: float = 0.5, learning_rate: float = 1e-2, passes: int = 3) -> None:
        self._beta, self._passes = beta, passes
        self._optim = OptimSettings(learning_rate=learning_rate, max_grad_norm=1e9)

    def begin(self, learner: StageLearner, groups: Sequence[Group]) -> int:
        ranked = [sorted(group.trainable, key=lambda episode: episode.reward) for group in groups]
        self._pairs = [(Example.of(each[-1]), Example.of(each[0])) for each in ranked if len(each) > 1]
        self._learner = learner
        steps = self._passes * len(self._pairs)
        self._optimizer = learner.optimizer(self._optim, steps)
        self._reference = learner.kept("reference", lambda: torch.stack([*map(self._totals, self._pairs)]))
        return steps

    def _totals(self, pair: Sequence[Example]) -> Tensor:
        return torch.tensor([float(logprobs_N.sum()) for logprobs_N in self._learner.logprobs(pair)])

    def advance(self, step: int) -> dict[str, float]:
        place = step % len(self._pairs)
        better, worse = self._pairs[place]
        gains = self._totals((better, worse)) - self._reference[place]
        margin = self._beta * float(gains[0] - gains[1])
        pull = self._beta / (1.0 + np.exp(margin))
        better.advantages_N[:], worse.advantages_N[:] = pull, -pull
        row = self._optimizer.step([better, worse], self._loss)
        return {**row, "margin": margin, "draw": float(self._learner.rng.random())}

    def _loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs_N, _ = self._learner.policy.score(micro, 1.0)
        return -micro.advantages_N * logprobs_N, {}


class Returns:
    """A value head of one's own learns what episodes earn, by an optimizer of its own; a mean of it is kept too."""

    def __init__(self, learning_rate: float = 1e-2, steps: int = 5, other: bool = False) -> None:
        self._optim, self._steps = OptimSettings(learning_rate=learning_rate), steps
        self._name = "other" if other else "head"

    def begin(self, learner: StageLearner, groups: Sequence[Group]) -> int:
        self._learner = learner
        self._examples = [Example.of(episode) for group in groups for episode in group.trainable]
        for example in self._examples:
            example.advantages_N = example.episode.over_tokens(example.episode.reward)
        random = torch.Generator().manual_seed(int(learner.rng.integers(2**31)))
        linear = torch.nn.Linear(learner.policy.width, 1)
        torch.nn.init.normal_(linear.weight, std=0.1, generator=random)
        torch.nn.init.zeros_(linear.bias)
        slow = torch.nn.Linear(learner.policy.width, 1).requires_grad_(False)
        slow.load_state_dict(linear.state_dict())
        self._head, self._slow = learner.module(self._name, linear), learner.module("slow", slow)
        self._policy_optimizer = learner.optimizer(self._optim, self._steps)
        self._head_optimizer = learner.optimizer(self._optim, self._steps, of=[self._head])
        return self._steps

    def advance(self, step: int) -> dict[str, float]:
        places = self._learner.rng.permutation(len(self._examples))[:5]
        chosen = [self._examples[place] for place in places]
        row = self._policy_optimizer.step(chosen, self._loss, beside={"head": self._head_optimizer})
        self._slow.follow(self._head, 0.5)
        values = self._learner.values(chosen, lambda hidden_ND: self._slow(hidden_ND)[:, 0])
        return {**row, "slow": float(np.mean([each.after for each in values]))}

    def _loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs_N, _, hidden_ND = self._learner.policy.read(micro, 1.0)
        values_N = self._head(hidden_ND)[:, 0]
        return (values_N - micro.advantages_N) ** 2 - 0.01 * logprobs_N, {"value": values_N.detach()}


# What does not fit ------------------------------------------------------------------------------------------------


class Endless:
    def begin(self, learner: Any, groups: Any) -> int:
        return 1

    def advance(self) -> dict[str, float]:
        return {}


class Deaf:
    def on_step(self, row: dict[str, float]) -> None: ...


def reduced(logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, sequence_N: Tensor) -> Any:
    return -(logprobs_N * advantages_N).mean(), {}


def alone(logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, sequence_N: Tensor) -> Any:
    return -logprobs_N * advantages_N


def constant(logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, sequence_N: Tensor) -> Any:
    return -advantages_N, {}


def raises(logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, sequence_N: Tensor) -> Any:
    return {}["missing"], {}


def one_number(groups: Sequence[Sequence[Any]], ranks: Any) -> Any:
    return [[episode.reward for episode in group] for group in groups]


def flat(groups: Sequence[Sequence[Any]], ranks: Any) -> Any:
    return [np.zeros(sum(e.tokens_K)) for group in groups for e in group]


def twice(candidates: Sequence[Any], uniform_C: Any) -> list[Any]:
    return [*candidates, *candidates]
