"""A batch that can not be learned from is refused, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.algorithm.schedule import OptimSettings
from learner.data.batch_checks import BatchRefused
from learner.settings import LearnerSettings
from learner.stages.settings import SftSettings
from learner.training.learner import Learner
from rollout.wire.trajectory import Group

Groups = Callable[..., Group]
Recipe = dict[str, Any]
UNDIVIDED: Recipe = {"advantage": {"kind": "grpo", "divide": False}}
GAE: Recipe = {"advantage": {"kind": "gae"}, "skip_zero_advantage": False}
OWN: Recipe = GAE | {"critic": {"kind": "own", "optim": {"learning_rate": 1e-2}}}
DETACHED: Recipe = GAE | {"critic": {"kind": "shared", "detach": True, "optim": {"learning_rate": 1e-2}}}
TOO_MUCH = 3e38  # a float32, but the norm of what it weighs is none


def _learner(tiny: Path, recipe: Recipe, stages: Sequence[SftSettings] = (), **fields: Any) -> Learner:
    settings = {
        "model": {"path": str(tiny)},
        "optim": {"learning_rate": 3e-3},
        "algorithm": recipe,
        "tokens_per_microbatch": 50,
    }
    return Learner(LearnerSettings.model_validate(settings | fields), stages=stages)


def _spoilt(group: Group, **changes: Any) -> Group:
    """Its last episode's last turn changed."""
    *others, last = group.trajectories
    steps = (*last.turns[:-1], replace(last.turns[-1], **changes))
    return replace(group, trajectories=(*others, replace(last, turns=steps)))


def _told(group: Group, logprob: float) -> Group:
    return _spoilt(
        group, behavior_logprobs=np.full_like(group.trajectories[-1].turns[-1].behavior_logprobs, logprob)
    )


def _parameters(learner: Learner) -> list[torch.Tensor]:
    critic = learner._critic.optimizer._parameters if learner._critic else []
    return [p.detach().clone() for p in (*learner.policy.parameters(), *critic)]


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("logprob", [np.nan, -np.inf])
@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"proximal": "learner"},
        {"proximal": "learner", "corrections": [{"kind": "mask"}]},
        {"proximal": "learner", "corrections": [{"kind": "icepop"}]},
    ],
    ids=str,
)
def test_logprobs_that_are_no_numbers_are_refused_whatever_reads_them(
    tiny: Path, group_of: Groups, recipe: Recipe, logprob: float
) -> None:
    learner = _learner(tiny, recipe)
    before = _parameters(learner)
    with pytest.raises(BatchRefused, match=r"^group 7, episode 2: its behavior logprobs are not finite$"):
        learner.step([group_of(0, [1.0, 0.0]), _told(group_of(7, [1.0, 0.0, 0.5]), logprob)])
    assert _equal(before, _parameters(learner)) and learner.version == 0


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "maxrl", "reinforce_pp", "returns", "gigpo"])
def test_a_reward_that_is_no_number_is_refused_by_every_estimator(
    tiny: Path, group_of: Groups, estimator: str
) -> None:
    with pytest.raises(BatchRefused, match=r"^group 7, episode 1: its reward is nan$"):
        _learner(tiny, {"advantage": {"kind": estimator}}).step(
            [_spoilt(group_of(7, [1.0, 0.0]), reward=np.nan)]
        )


def test_named_rewards_that_no_episode_has_are_refused(tiny: Path, group_of: Groups) -> None:
    learner = _learner(tiny, {"advantage": {"kind": "gdpo", "weights": {"goal": 1.0}}})
    with pytest.raises(BatchRefused, match=r"^advantage.weights names the reward 'goal'.*have: none"):
        learner.step([group_of(0, [1.0, 0.0])])
    learner.step([_spoilt(group_of(0, [1.0, 0.0]), named_rewards='{"goal": 1.0}')])  # one has it


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_token_that_the_engine_gave_no_chance_costs_a_finite_divergence(
    tiny: Path, group_of: Groups, estimator: str
) -> None:
    kl = {"coefficient": 0.1, "estimator": estimator, "where": "reward"}
    row = _learner(tiny, {"kl": kl}).step([_told(group_of(0, [1.0, 0.0]), -9999.0)])
    assert np.isfinite(row["loss"])


# Of two groups the second is too much, and the second update's: the first has moved by then.
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    "more", [{"minibatches": 2}, {"minibatches": 2, "epochs": 2, "proximal": "learner"}], ids=str
)
def test_a_later_update_that_is_not_finite_undoes_those_before_it(
    tiny: Path, group_of: Groups, steps: int, more: Recipe
) -> None:
    spoilt, unspoilt = (_learner(tiny, UNDIVIDED | more) for _ in range(2))
    for learner in (spoilt, unspoilt):
        for step in range(steps):
            learner.step([group_of(step, [1.0, 0.0])])
    before, moved = _parameters(spoilt), []
    spoilt.optimizer._adamw.register_step_post_hook(
        lambda *_: moved.append(not _equal(before, _parameters(spoilt)))
    )
    with pytest.raises(BatchRefused, match=r"^an optimizer step is not finite: loss .*grad_norm (inf|nan)$"):
        spoilt.step([group_of(8, [1.0, 0.0]), group_of(9, [TOO_MUCH, 0.0])])
    assert moved == [True]
    assert _equal(before, _parameters(spoilt)) and spoilt.version == steps
    later = [group_of(10, [1.0, 0.0, 0.5])]
    assert spoilt.step(later) == unspoilt.step(
        later
    )  # moments, schedule and generators too are what they were
    assert _equal(_parameters(spoilt), _parameters(unspoilt))


@pytest.mark.parametrize("warmup", [0, 9])
@pytest.mark.parametrize("recipe", [OWN, DETACHED], ids=["own", "detached"])
def test_a_critic_that_can_not_follow_holds_the_policy_back(
    tiny: Path, group_of: Groups, recipe: Recipe, warmup: int
) -> None:
    learner = _learner(tiny, recipe | {"critic": recipe["critic"] | {"warmup_steps": warmup}})
    learner.step([group_of(0, [1.0, 0.0])])
    before = _parameters(learner)
    with pytest.raises(BatchRefused, match=r"value_loss inf"):
        learner.step([group_of(1, [1e30, 0.0])])
    assert _equal(before, _parameters(learner)) and learner.version == 1


def test_a_stage_leaves_out_what_is_not_finite_and_ends_when_nothing_else_comes(
    tiny: Path, group_of: Groups
) -> None:
    sft = SftSettings(epochs=2, episodes_per_step=1, optim=OptimSettings(learning_rate=1e-3))
    learner = _learner(tiny, {}, [sft])
    weight = next(learner.policy.parameters())
    whole = weight.detach().clone()
    with torch.no_grad():
        weight[:] = np.nan
    learner.begin_stage(0, [group_of(g, [1.0]) for g in range(5)])
    assert [row["skipped_step"] for row in learner.advance_stage(3)] == [1.0, 1.0, 1.0]
    with torch.no_grad():
        weight.copy_(whole)
    assert [row["skipped_step"] for row in learner.advance_stage(1)] == [0.0]
    with torch.no_grad():
        weight[:] = np.nan
    with pytest.raises(BatchRefused, match=r"^4 steps in a row of a stage of kind 'sft': .*loss nan"):
        learner.advance_stage(6)
