"""A critic that is a head on the policy's own hidden states: what it learns, what it moves, what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.algorithm.schedule import OptimSettings
from learner.data.batch_checks import BatchRefused
from learner.settings import LearnerSettings
from learner.training.learner import Learner
from learner.training.optim import StepReport
from learner.training.publish import take_snapshot
from rollout.wire.trajectory import Group
from tests import reference
from tests.learner.dense import Dense, gradients, valued, with_values, with_weights
from tests.learner.episodes import group, random_groups
from tests.learner.ranked import float64
from tests.learner.staged import interrupted

Groups = Callable[..., Group]
Recipe = dict[str, Any]
TEMPERATURE, WHOLE = 0.8, 10_000
GAE: Recipe = {"kind": "gae", "gamma": 0.9, "lam": 0.8, "normalize": True}
PPO: Recipe = {"advantage": GAE, "loss": {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.28}}
TIS: Recipe = {"corrections": [{"kind": "tis", "of": "token", "cap": 1.2}]}
STILL = 1e-30  # a learning rate that moves nothing


def _learner(tiny: Path, critic: Recipe, recipe: Recipe, limit: int = WHOLE, **settings: Any) -> Learner:
    algorithm = {**PPO, "aggregation": "token", "skip_zero_advantage": False, **recipe}
    optim = {"learning_rate": 3e-3, "max_grad_norm": 1e9}
    fields = {
        "model": {"path": str(tiny)},
        "optim": optim,
        "algorithm": algorithm | {"critic": {"kind": "shared", "optim": optim} | critic},
        "tokens_per_microbatch": limit,
    }
    return Learner(LearnerSettings.model_validate(fields | settings), temperature=TEMPERATURE)


def _head(learner: Learner) -> nn.Linear:
    assert learner._critic is not None
    return learner._critic.head.linear


def _copies(plain: PreTrainedModel, learner: Learner) -> tuple[PreTrainedModel, nn.Linear]:
    """Policy and head as they stand, as transformers and torch have them."""
    return with_weights(plain, learner.policy.model.state_dict()), deepcopy(_head(learner))


def _parameters(learner: Learner) -> list[Tensor]:
    return [p.detach().clone() for p in (*learner.policy.parameters(), *_head(learner).parameters())]


# (critic, recipe, learning rate): several updates at a rate that moves show the clip, at none what was looked up before
CASES: list[tuple[Recipe, Recipe, float]] = [
    ({"value_coefficient": 0.7}, {"aggregation": "sequence"}, STILL),
    ({"value_coefficient": 0.7, "value_clip": 0.3}, {"epochs": 2}, 0.02),
    ({"value_coefficient": 0.7, "value_clip": 0.3, "detach": True}, {"epochs": 2}, 0.02),
    ({"value_coefficient": 2.0}, {"epochs": 3, "proximal": "learner", **TIS}, STILL),
]


@pytest.mark.parametrize(("critic", "recipe", "rate"), CASES, ids=str)
@pytest.mark.parametrize("limit", [1, 30, WHOLE])
def test_one_pass_has_the_gradients_of_both_losses_over_each_segment_alone(
    tiny: Path,
    plain: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    critic: Recipe,
    recipe: Recipe,
    rate: float,
    limit: int,
) -> None:
    optim = {"learning_rate": rate, "max_grad_norm": 1e9}
    with float64():
        learner = _learner(tiny, critic | {"optim": optim}, recipe, limit, optim=optim)
        learner._begin()
    own = learner._critic
    assert own is not None
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (*learner.policy.parameters(), *own.head.linear.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    states = [_copies(plain, learner)]  # before each update, and after the last one
    move = own.optimizer.step

    def watched(finite: bool = True) -> StepReport:
        report = move(finite)
        states.append(_copies(plain, learner))
        return report

    monkeypatch.setattr(own.optimizer, "step", watched)
    stories = random_groups(5)
    metrics = learner.step([group(siblings, place) for place, siblings in enumerate(stories)])

    (first, first_head), (policy, head) = states[0], states[-2]
    whole = PPO | {"aggregation": "token"} | recipe
    dense = Dense(whole, learner.version, TEMPERATURE, policy, plain, valued(first, first_head))
    policy_loss, trunk_gradients = dense.step(stories)
    losses, moving, held = [], [], 0
    for story in [story for siblings in stories for story in siblings]:
        told = with_values(story, valued(first, first_head))
        targets = reference.gae_of(told, GAE["gamma"], GAE["lam"])[1]
        values, _ = valued(policy, head)(story)
        clip = critic.get("value_clip", 0.2)
        rows = zip(values, told.values, targets, strict=True)
        pairs = [reference.value_loss(v.item(), old, target, clip) for v, old, target in rows]
        held += sum(slope == 0 for _, slope in pairs)
        losses.append([value for value, _ in pairs])
        moving.append([slope * value for (_, slope), value in zip(pairs, values, strict=True)])
    value_loss = critic["value_coefficient"] * reference.aggregate(moving, whole["aggregation"])
    if critic.get("detach"):
        head_gradients = list(torch.autograd.grad(value_loss, [*head.parameters()]))
    else:
        value_loss.backward()
        trunk_gradients, head_gradients = gradients(policy), gradients(head)

    assert (held > 0) == (rate != STILL), "a clip that holds some values is seen, and one that holds none"
    for found, expected in ((learner.policy.model, trunk_gradients), (own.head.linear, head_gradients)):
        for one, other in zip(gradients(found), expected, strict=True):
            assert float(other.abs().max()) > 1e-3 or one.ndim == 1
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    if rate == STILL:
        both = policy_loss + critic["value_coefficient"] * reference.aggregate(losses, whole["aggregation"])
        assert metrics["loss"] == pytest.approx(both, abs=1e-6)


def test_warming_up_teaches_the_head_and_leaves_the_policy_and_what_is_published_as_they_are(
    tiny: Path, tmp_path: Path, group_of: Groups
) -> None:
    learner = _learner(tiny, {"warmup_steps": 2}, {"minibatches": 2})
    first = take_snapshot(learner.policy, 0, "float32").manifest
    before = learner.save(tmp_path / "before") / "model"
    errors = [learner.step([group_of(0, [1.0, 0.5])])["value_error"] for _ in range(2)]
    assert errors[1] < errors[0] and learner.optimizer.steps == 0
    assert take_snapshot(learner.policy, 0, "float32").manifest == first
    after = learner.save(tmp_path / "after") / "model"
    assert {p.name: p.read_bytes() for p in before.iterdir()} == {
        p.name: p.read_bytes() for p in after.iterdir()
    }
    head = {"head.safetensors", "head.safetensors.blocks"}
    assert {path.name for path in (after.parent / "critic").iterdir()} == head
    warm = _parameters(learner)
    learner.step([group_of(0, [1.0, 0.5])])
    assert not any(torch.equal(a, b) for a, b in zip(warm, _parameters(learner), strict=True))
    last = take_snapshot(learner.policy, 0, "float32").manifest
    assert [spec.name for spec in last.tensors] == [spec.name for spec in first.tensors]
    assert last != first


def test_a_falling_learning_rate_ends_with_the_run_whatever_the_warm_up(
    tiny: Path, tmp_path: Path, group_of: Groups
) -> None:
    falling = OptimSettings(learning_rate=0.1, schedule="linear")
    settings = _learner(tiny, {"warmup_steps": 2}, {}).settings.model_copy(update={"optim": falling})
    learner = Learner(settings, total_steps=4)
    rates = []
    for _ in range(4):
        row = learner.step([group_of(0, [1.0, 0.5])])
        rates.append(row.get("learning_rate"))
        learner.save(tmp_path)
        learner = Learner(settings, total_steps=4)
        learner.load(tmp_path)
    assert rates == [None, None, pytest.approx(0.1), pytest.approx(0.05)]
    assert learner._critic is not None and learner._critic.optimizer.steps == 4


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 4}}], ids=["whole", "lora"])
@pytest.mark.parametrize("recipe", [{"minibatches": 2}, {"proximal": "learner", "epochs": 2}], ids=str)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    tiny: Path, tmp_path: Path, group_of: Groups, model: Recipe, recipe: Recipe
) -> None:
    def made() -> Learner:
        return _learner(tiny, {"warmup_steps": 1}, recipe, 40, model={"path": str(tiny)} | model)

    batches = [[group_of(10 * s + g, [1.0, 0.0, 0.5]) for g in range(2)] for s in range(4)]
    straight, resumed = interrupted(made, batches, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(_parameters(straight), _parameters(resumed), strict=True))


@pytest.mark.parametrize(
    ("critic", "recipe", "still", "moving"),
    [
        ({}, {}, 1, 1),
        ({}, {"proximal": "learner", "epochs": 2}, 1, 2),
        ({"detach": True}, {"epochs": 2}, 1, 2),
        ({"warmup_steps": 1}, {}, 2, 0),
    ],
    ids=str,
)
def test_values_need_no_pass_beside_those_of_old_logprobs_and_of_the_loss(
    tiny: Path, group_of: Groups, critic: Recipe, recipe: Recipe, still: int, moving: int
) -> None:
    learner = _learner(tiny, critic, recipe)
    passes: list[bool] = []
    learner.policy.model.base_model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    learner.step([group_of(0, [1.0, 0.0])])
    assert (passes.count(False), passes.count(True)) == (still, moving)


def test_the_head_is_float32_under_narrow_products(tiny: Path, group_of: Groups) -> None:
    model = {"path": str(tiny), "dtype": "bfloat16", "gradient_checkpointing": True}
    narrow, wide = (_learner(tiny, {}, {}, **kind) for kind in ({"model": model}, {}))
    for _ in range(2):  # the first finds a head of zeros
        found, expected = (learner.step([group_of(0, [1.0, 0.0])]) for learner in (narrow, wide))
    assert {tensor.dtype for p in _head(narrow).parameters() for tensor in (p, p.grad)} == {torch.float32}
    for name in ("value", "value_loss", "grad_norm", "value_grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=0.05, abs=0.02)


def test_a_batch_that_is_not_finite_moves_neither_policy_nor_head(tiny: Path, group_of: Groups) -> None:
    learner = _learner(tiny, {}, {})
    learner.step([group_of(0, [1.0, 0.0])])
    before = _parameters(learner)
    good = group_of(1, [1.0, 0.0])
    spoilt, *others = good.trajectories
    steps = tuple(
        replace(s, behavior_logprobs=np.full_like(s.behavior_logprobs, np.nan)) for s in spoilt.turns
    )
    with pytest.raises(BatchRefused):
        learner.step([replace(good, trajectories=(replace(spoilt, turns=steps), *others))])
    assert all(torch.equal(a, b) for a, b in zip(before, _parameters(learner), strict=True))
