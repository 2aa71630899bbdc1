"""What a learner step computes is the formula's, whatever way its tokens take there: one row or many, in any order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.data import prefix_tree
from learner.settings import LearnerSettings
from learner.training.critic import Critic, OwnCritic
from learner.training.learner import Learner
from tests import reference
from tests.learner.dense import Dense, Recipe, gradients, segments, valued, with_values, with_weights
from tests.learner.episodes import even, group, random_groups
from tests.reference import Episode

TEMPERATURE, WHOLE = 0.8, 10_000
GAE: dict[str, Any] = {"kind": "gae", "gamma": 0.9, "lam": 0.8, "normalize": True}
CRITIC: dict[str, Any] = {"optim": {"learning_rate": 0.03, "max_grad_norm": 1e9}}
ESTIMATORS: list[dict[str, Any]] = [
    {"kind": "grpo", "divide": True, "eps": 1e-6},
    {"kind": "rloo"},
    {"kind": "maxrl", "eps": 1e-6},
    {"kind": "reinforce_pp", "gamma": 0.9, "group_baseline": True},
    {"kind": "returns", "gamma": 0.9, "baseline": "group"},
    {"kind": "gigpo", "gamma": 0.9, "weight": 0.5, "divide": True, "eps": 1e-6},
    {"kind": "gdpo", "weights": {"goal": 1.0, "form": 0.5}, "eps": 1e-6},
    GAE,
]
# Bounds that some of the random ratios break and some do not.
LOSSES: list[dict[str, Any]] = [
    {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5},
    {"kind": "reinforce"},
    {"kind": "gspo", "clip_low": 0.1, "clip_high": 0.15},
    {"kind": "cispo", "clip_low": 0.3, "clip_high": 0.28},
    {"kind": "sapo", "positive": 1.0, "negative": 1.05},
    {"kind": "dppo", "divergence": "tv", "threshold": 0.003},
    {"kind": "dppo", "divergence": "kl", "threshold": 0.001},
]
AGGREGATIONS: list[dict[str, Any]] = [
    {"aggregation": "token"},
    {"aggregation": "sequence"},
    {"aggregation": "constant", "aggregation_length": 16},
]
CORRECTIONS: list[list[dict[str, Any]]] = [
    [{"kind": "tis", "of": "token", "cap": 1.2}],
    [{"kind": "tis", "of": "sequence", "cap": 1.5}],
    [{"kind": "mask", "of": "token", "low": 0.7, "high": 1.4}],
    [{"kind": "mask", "of": "sequence", "low": 0.9, "high": 1.2}],
    [{"kind": "icepop", "low": 0.7, "high": 1.4}],
    [{"kind": "tis", "of": "token", "cap": 1.2}, {"kind": "lag", "max_lag": 0}],
]
EXTRAS: list[dict[str, Any]] = [
    {},
    {"kl": {"coefficient": 0.3, "estimator": "k3", "where": "loss"}, "skip_zero_advantage": False},
    {"entropy_bonus": 0.2, "skip_zero_advantage": False},
    {"kl": {"coefficient": 0.3, "estimator": "k1", "where": "reward"}},
    {"overlong": {"tokens": 6, "margin": 4, "weight": 0.5}},
    {
        "kl": {"coefficient": 0.3, "estimator": "k2", "where": "loss"},
        "entropy_bonus": 0.1,
        "skip_zero_advantage": False,
    },
]
Stories = list[list[Episode]]


def _recipes() -> Iterator[Recipe]:
    """Every estimator with every loss, and around them by turns all aggregations, corrections and extras."""
    for number, (estimator, loss) in enumerate(product(ESTIMATORS, LOSSES)):
        recipe = {"advantage": estimator, "loss": loss, **AGGREGATIONS[number % 3], **EXTRAS[number % 6]}
        if estimator["kind"] == "gdpo" and (
            "overlong" in recipe or recipe.get("kl", {}).get("where") == "reward"
        ):
            recipe = {key: recipe[key] for key in recipe if key not in ("overlong", "kl")}
        if estimator["kind"] == "gae":
            recipe["critic"] = CRITIC
        if number % 2:
            recipe |= {"proximal": "learner", "corrections": CORRECTIONS[number // 2 % 6]}
        yield recipe


TAUGHT: list[Recipe] = [  # the teacher is the model that every learner begins with
    {
        "advantage": {"kind": "none"},
        "loss": {"kind": "reinforce"},
        "aggregation": "token",
        "distill": {"coefficient": 0.5},
    },
    {
        "advantage": ESTIMATORS[0],
        "loss": LOSSES[0],
        "aggregation": "sequence",
        "proximal": "learner",
        "corrections": CORRECTIONS[0],
        "distill": {"coefficient": 0.3},
    },
    {
        "advantage": {"kind": "none"},
        "loss": {"kind": "reinforce"},
        "aggregation": "sequence",
        "distill": {"coefficient": 0.5, "divergence": "reverse"},
        "skip_zero_advantage": False,
    },
    {
        "advantage": ESTIMATORS[0],
        "loss": LOSSES[0],
        "aggregation": "token",
        "distill": {"coefficient": 0.3, "divergence": "forward"},
        "skip_zero_advantage": False,
    },
]
RECIPES = [*_recipes(), *TAUGHT]
CONSTRAINT = {"name": "risk", "limit": 0.5, "update": {"kind": "pid", "kp": 0.1, "ki": 0.5}}
FEW = [  # every estimator, loss, aggregation, correction and extra is among these twelve; and one with a limit of costs
    *RECIPES[: -len(TAUGHT) : 5],
    *TAUGHT,
    {**RECIPES[0], "constraints": [CONSTRAINT]},
]


def _name(recipe: Recipe) -> str:
    parts = [recipe["advantage"]["kind"], *recipe["loss"].values(), recipe["aggregation"]]
    parts += [part["kind"] for part in recipe.get("corrections", [])]
    parts += [recipe["distill"]["divergence"]] if "divergence" in recipe.get("distill", {}) else []
    return "-".join(
        str(part) for part in parts + [key for key in recipe if key in ("kl", "overlong", "distill")]
    )


def _learner(tiny: Path, recipe: Recipe, tokens_per_microbatch: int = WHOLE) -> Learner:
    """In the middle of a run: at version 1, its weights no longer the reference's, its critic no longer new."""
    if "distill" in recipe:
        recipe = recipe | {"distill": {"teacher": str(tiny), **recipe["distill"]}}
    settings = {
        "model": {"path": str(tiny)},
        "optim": {"learning_rate": 1e-30, "max_grad_norm": 1e9},
        "algorithm": recipe,
        "tokens_per_microbatch": tokens_per_microbatch,
    }
    learner = Learner(LearnerSettings.model_validate(settings), temperature=TEMPERATURE)
    learner.policy.model.double()
    learner.step([group(siblings, 90 + place) for place, siblings in enumerate(random_groups(1))])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return learner


def _step(learner: Learner, stories: Stories) -> tuple[float, list[Tensor]]:
    """The loss and the gradients of one more step; the weights stay."""
    loss = learner.step([group(siblings, place) for place, siblings in enumerate(stories)])["loss"]
    return loss, gradients(learner.policy.model)


def _same(left: list[Tensor], right: list[Tensor], atol: float = 1e-6) -> None:
    assert max(float(one.abs().max()) for one in left) > 1e-3
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


def _critic(plain: PreTrainedModel, critic: Critic) -> tuple[PreTrainedModel, nn.Linear]:
    """The critic's trunk and head as transformers and torch have them."""
    assert isinstance(critic, OwnCritic)
    head = nn.Linear(critic.head.linear.in_features, 1).double()
    head.load_state_dict(critic.head.linear.state_dict())
    return with_weights(plain, critic.trunk.model.state_dict()), head


def _dense(plain: PreTrainedModel, learner: Learner, recipe: Recipe) -> Dense:
    policy = with_weights(plain, learner.policy.model.state_dict())
    critic = None if learner._critic is None else valued(*_critic(plain, learner._critic))
    return Dense(recipe, learner.version, TEMPERATURE, policy, plain, critic)


@pytest.mark.parametrize("recipe", RECIPES, ids=_name)
def test_a_step_is_the_formulas_over_each_segment_alone(
    tiny: Path, plain: PreTrainedModel, recipe: Recipe
) -> None:
    # Where nobody earned anything only what acts on every token moves them, and yet they count.
    stories = [*random_groups(5), [even(story) for story in random_groups(4, groups=1)[0]]]
    learner = _learner(tiny, recipe, tokens_per_microbatch=30)
    expected, dense_gradients = _dense(plain, learner, recipe).step(stories)
    loss, found = _step(learner, stories)
    assert loss == pytest.approx(expected, abs=1e-6)
    _same(found, dense_gradients)


@pytest.mark.parametrize("recipe", FEW, ids=_name)
def test_no_split_and_no_order_of_arrival_moves_a_gradient(tiny: Path, recipe: Recipe) -> None:
    one, two, three = random_groups(6, groups=3)
    loss, whole = _step(_learner(tiny, recipe), [one, two, three])
    for limit, arrived in ((1, [three, two, one]), (25, [two, three, one])):
        other, found = _step(_learner(tiny, recipe, limit), arrived)
        assert other == pytest.approx(loss, abs=1e-6)
        _same(found, whole)


@pytest.mark.parametrize("recipe", TAUGHT, ids=_name)
def test_shared_prefixes_move_no_gradient_of_a_teacher(
    tiny: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    stories, found = random_groups(6), []
    for least in (1, WHOLE):
        monkeypatch.setattr(prefix_tree, "LEAST_SHARED", least)
        learner = _learner(tiny, recipe)
        row = learner.step([group(siblings, place) for place, siblings in enumerate(stories)])
        found.append((row["tokens_processed"], row["distill/kl"], gradients(learner.policy.model)))
    (shared, kl, ours), (alone, same_kl, theirs) = found
    assert shared < alone and kl == pytest.approx(same_kl, abs=1e-6)
    _same(ours, theirs)


@pytest.mark.parametrize("proximal", ["behavior", "learner"])
def test_a_minibatch_is_weighed_by_its_own_tokens(tiny: Path, plain: PreTrainedModel, proximal: str) -> None:
    recipe = {**RECIPES[2], "proximal": proximal, "minibatches": 2}
    stories = random_groups(7)
    learner = _learner(tiny, recipe, tokens_per_microbatch=30)
    _, dense_gradients = _dense(plain, learner, recipe).step(stories, last=3)
    _same(_step(learner, stories)[1], dense_gradients)


@pytest.mark.parametrize("recipe", FEW, ids=_name)
def test_only_what_predicts_a_sampled_token_has_a_gradient(tiny: Path, recipe: Recipe) -> None:
    stories = random_groups(6, alike=False)
    learner = _learner(tiny, recipe, tokens_per_microbatch=1)  # each segment in a row of its own
    rows: list[tuple[list[int], Tensor]] = []

    def keep(_: object, __: object, inputs: dict[str, Tensor], out: Any) -> None:
        if out.last_hidden_state.requires_grad:
            out.last_hidden_state.retain_grad()
            rows.append((inputs["input_ids"][0].tolist(), out.last_hidden_state))

    hook = learner.policy.model.base_model.register_forward_hook(keep, with_kwargs=True)
    _step(learner, stories)
    hook.remove()
    found = [tokens for siblings in stories for story in siblings for tokens in segments(story)]
    predicts = {tuple(t.id for t in tokens[:-1]): [t.sampled for t in tokens[1:]] for tokens in found}
    assert rows
    for ids, hidden_1TD in rows:
        assert hidden_1TD.grad is not None
        moved_T = hidden_1TD.grad[0].any(1)
        assert not moved_T[~torch.tensor(predicts[tuple(ids)])].any()
    assert any(hidden_1TD.grad.any() for _, hidden_1TD in rows if hidden_1TD.grad is not None)


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=str)
def test_the_critics_gradient_is_the_formulas_over_each_segment_alone(
    tiny: Path, plain: PreTrainedModel, aggregation: dict[str, Any]
) -> None:
    recipe = {"advantage": GAE, "critic": CRITIC, "loss": LOSSES[0], **aggregation}
    learner = _learner(tiny, recipe, tokens_per_microbatch=30)
    own = learner._critic
    assert isinstance(own, OwnCritic)
    trunk, head = _critic(plain, own)
    stories, moving = random_groups(9), []
    for story in [story for siblings in stories for story in siblings]:
        values, _ = valued(trunk, head)(story)
        told = with_values(story, valued(trunk, head))
        targets = reference.gae_of(told, GAE["gamma"], GAE["lam"])[1]
        # Before its update every value is the old one: no clip holds it.
        moving.append([(x.item() - target) * x for x, target in zip(values, targets, strict=True)])
    reference.aggregate(moving, aggregation["aggregation"], aggregation.get("aggregation_length")).backward()
    _step(learner, stories)
    found = gradients(own.trunk.model.base_model, own.head.linear)
    _same([gradient.double() for gradient in found], gradients(trunk.base_model, head), atol=1e-5)
