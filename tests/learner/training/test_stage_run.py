"""Stages are made in order, each once, and go on from a checkpoint within them as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.algorithm.preferences import AnyPreferenceLoss, DpoLoss, IpoLoss, OrpoLoss, Pairs, SimpoLoss
from learner.algorithm.schedule import OptimSettings
from learner.settings import LearnerSettings, ModelSettings
from learner.stages.kto import Kto
from learner.stages.settings import (
    AnyStage,
    IlqlSettings,
    KtoSettings,
    OwnStage,
    PreferenceSettings,
    RewardModelSettings,
    SftSettings,
)
from learner.training.checkpoint import CheckpointError, newest, next_stage
from learner.training.learner import Learner
from rollout.wire.trajectory import Group, Trajectory
from tests.learner.staged import action_logprobs, learned

Groups = Callable[..., Group]
SFT = SftSettings(optim=OptimSettings(learning_rate=5e-3, warmup_steps=3), epochs=2, episodes_per_step=3)
DPO = PreferenceSettings(
    optim=OptimSettings(learning_rate=5e-3, max_grad_norm=1e9), epochs=3, pairs_per_step=4
)
KTO = KtoSettings(
    optim=OptimSettings(learning_rate=5e-3, max_grad_norm=1e9), epochs=3, episodes_per_step=3, beta=0.5
)
REWARD = RewardModelSettings(
    optim=OptimSettings(learning_rate=5e-3), epochs=3, pairs_per_step=2, margin=0.5, heldout_share=0.25
)
ILQL = IlqlSettings(
    optim=OptimSettings(learning_rate=5e-3, warmup_steps=3),
    value_optim=OptimSettings(learning_rate=1e-2, schedule="linear"),
    target_rate=0.2,
    epochs=2,
    episodes_per_step=3,
)
RETURNS = OwnStage.model_validate({"kind": "tests.own_parts:Returns"})
PREFERENCES = OwnStage.model_validate({"kind": "tests.own_parts:Preferences", "beta": 0.5})


def made(tiny: Path, *stages: AnyStage) -> Learner:
    settings = LearnerSettings(model=ModelSettings(path=str(tiny)), tokens_per_microbatch=50)
    return Learner(settings, seed=3, stages=stages)


def bits(learner: Learner) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in learner.policy.parameters()]


def same(left: Learner, right: Learner) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(left), bits(right), strict=True))


@pytest.fixture
def groups(group_of: Groups) -> list[Group]:
    return [group_of(g, [1.0, 0.0]) for g in range(4)]


@pytest.mark.parametrize(
    "stage",
    [SFT, DPO.model_copy(update={"pairs_per_step": 2}), KTO, REWARD, ILQL, PREFERENCES, RETURNS],
    ids=["sft", "preference", "kto", "reward_model", "ilql", "own", "own modules"],
)
def test_a_stage_goes_on_from_its_checkpoint_bit_for_bit(
    stage: AnyStage, tiny: Path, tmp_path: Path, groups: list[Group]
) -> None:
    straight = made(tiny, stage, SFT)
    _, steps = straight.begin_stage(0, groups)
    straight.advance_stage(2)
    straight.save(tmp_path)
    expected = straight.advance_stage(steps)

    resumed = made(tiny, stage, SFT)
    resumed.load(tmp_path)
    assert (next_stage(tmp_path), resumed.version) == (0, 0)
    assert resumed.begin_stage(0, groups) == (2, steps)
    assert resumed.advance_stage(steps) == expected and len(expected) == steps - 2
    assert same(straight, resumed)
    assert learned(resumed, groups, 1) == learned(
        straight, groups, 1
    )  # the generators too are where they were


def test_a_stage_that_has_ended_is_behind_a_run_that_goes_on(
    tiny: Path, tmp_path: Path, groups: list[Group]
) -> None:
    learner = made(tiny, SFT, SFT)
    learned(learner, groups)
    learner.save(tmp_path, {"issued": 0})
    assert next_stage(tmp_path) == 1
    resumed = made(tiny, SFT, SFT)
    assert resumed.load(tmp_path) == {"issued": 0}
    with pytest.raises(ValueError, match="stage 0 was asked of a learner that is at stage 1"):
        resumed.begin_stage(0, groups)
    learned(resumed, groups, 1)
    landed = resumed.save(tmp_path)
    assert landed == newest(tmp_path) == tmp_path / "checkpoints" / "version-00000000"
    assert not (tmp_path / "stages" / "checkpoints").exists()
    with pytest.raises(ValueError, match="stage 1 was asked of a learner that is at stage 2"):
        resumed.begin_stage(1, groups)


def test_a_stage_that_asks_for_other_modules_than_its_checkpoint_holds_is_refused(
    tiny: Path, tmp_path: Path, groups: list[Group]
) -> None:
    learner = made(tiny, RETURNS)
    learner.begin_stage(0, groups)
    learner.advance_stage(1)
    learner.save(tmp_path)
    changed = made(tiny, OwnStage.model_validate({"kind": RETURNS.kind, "other": True}))
    changed.load(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"asks for other, slow, .* holds head, slow, stage\.0, stage\.1"
    ):
        changed.begin_stage(0, groups)


def test_modules_move_with_the_policy_or_not_at_all(tiny: Path, group_of: Groups) -> None:
    learner = made(tiny, RETURNS)
    learner.begin_stage(0, [group_of(0, [1.0]), group_of(1, [float("inf")])])
    run = learner.stages._run
    assert run is not None
    head = [parameter.detach().clone() for parameter in run.modules["head"].parameters()]
    policy = bits(learner)
    (row,) = learner.advance_stage(1)  # both episodes: one reward is not finite
    assert row["skipped_step"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(policy, bits(learner), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(head, run.modules["head"].parameters(), strict=True))


def test_two_modules_of_one_name_are_refused(tiny: Path) -> None:
    learner = made(tiny, SFT)
    learner.begin_stage(0, [])
    run = learner.stages._run
    assert run is not None
    run.module("head", torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="two modules 'head'"):
        run.module("head", torch.nn.Linear(1, 1))


def test_the_steps_of_preferences_are_those_of_their_paper(tiny: Path, groups: list[Group]) -> None:
    learner = made(tiny, PREFERENCES)
    learner.begin_stage(0, groups)
    (first,) = learner.advance_stage(1)
    tokens = first["tokens_scored"]  # a stage's loss is a mean over them
    found = [
        parameter.grad * tokens for parameter in learner.policy.parameters() if parameter.grad is not None
    ]

    model = AutoModelForCausalLM.from_pretrained(tiny)

    better, worse = (action_logprobs(model, each).sum() for each in groups[0].trajectories)
    gain = (better - better.detach()) - (
        worse - worse.detach()
    )  # the reference is the policy itself, at first
    (-torch.nn.functional.logsigmoid(0.5 * gain)).backward()
    expected = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert first["margin"] == pytest.approx(0.0, abs=1e-5) and len(found) == len(expected)
    for of_learner, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(of_learner, plain, atol=2e-5, rtol=1e-3)
    margins = [row["margin"] for row in learner.advance_stage(99)]
    assert min(margins[-4:]) > 0.0


@pytest.mark.parametrize("loss", [DpoLoss(beta=0.5), IpoLoss(beta=0.5), SimpoLoss(), OrpoLoss()])
def test_a_step_of_pairs_is_the_gradient_of_their_mean_loss(
    loss: AnyPreferenceLoss, tiny: Path, groups: list[Group]
) -> None:
    """Pairs are dealt and packed as single episodes; a plain model computes the loss of all of them at once."""
    learner = made(tiny, DPO.model_copy(update={"loss": loss}))
    learner.begin_stage(0, groups)
    (first,) = learner.advance_stage(1)
    found = [parameter.grad for parameter in learner.policy.parameters() if parameter.grad is not None]

    model = AutoModelForCausalLM.from_pretrained(tiny)
    totals = [
        torch.stack([action_logprobs(model, each).sum() for each in group.trajectories]) for group in groups
    ]
    better_P, worse_P = torch.stack(totals).double().unbind(1)
    tokens = torch.tensor([[each.num_sampled for each in group.trajectories] for group in groups]).double()
    pairs = Pairs(better_P, worse_P, better_P.detach(), worse_P.detach(), *tokens.unbind(1))
    expected_loss = loss(pairs)[0].mean()
    expected_loss.backward()
    expected = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert first["loss"] == pytest.approx(expected_loss.item(), abs=1e-5)
    assert len(found) == len(expected)
    for of_learner, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(of_learner, plain, atol=2e-5, rtol=1e-3)
    rows = learner.advance_stage(99)
    assert len(rows) == 2 and rows[-1]["loss"] < first["loss"]


def plain_logprobs(model: torch.nn.Module, episodes: Sequence[Trajectory]) -> torch.Tensor:
    return torch.stack([action_logprobs(model, each).sum() for each in episodes]).double()


def test_a_step_of_kto_is_the_gradient_of_its_mean_loss_around_the_batchs_reference_point(
    tiny: Path, groups: list[Group]
) -> None:
    """The second step, where the policy has left the reference; a plain model computes all episodes at once."""
    learner = made(tiny, KTO.model_copy(update={"episodes_per_step": 8, "desirable_weight": 1.5}))
    assert learner.begin_stage(0, groups) == (0, 3)
    run = learner.stages._run
    assert run is not None and isinstance(run._stage, Kto)
    own, foreign = ([pair[side].trajectory for pair in run._stage._examples] for side in (0, 1))
    # Every first prompt has the first answer of one other episode, and every answer is used once.
    assert [each.turns[0].prompt_ids.tolist() for each in foreign] == [
        each.turns[0].prompt_ids.tolist() for each in own
    ]
    taken = np.array(
        [
            [np.shares_memory(other.turns[0].action_ids, each.turns[0].action_ids) for other in own]
            for each in foreign
        ]
    )
    assert (taken.sum(0) == 1).all() and (taken.sum(1) == 1).all() and not taken.diagonal().any()

    learner.advance_stage(1)
    at_step = AutoModelForCausalLM.from_pretrained(tiny)
    at_step.load_state_dict(learner.policy.model.state_dict())
    (second,) = learner.advance_stage(1)
    found = [parameter.grad for parameter in learner.policy.parameters() if parameter.grad is not None]

    reference = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        gaps_E = plain_logprobs(at_step, foreign) - plain_logprobs(reference, foreign)
        reference_E = plain_logprobs(reference, own)
    point = max(gaps_E.mean().item(), 0.0)
    gains_E = plain_logprobs(at_step, own) - reference_E
    good_E = torch.tensor([each.reward == 1.0 for each in own])
    value_E = torch.where(
        good_E, 1.5 * torch.sigmoid(0.5 * (gains_E - point)), torch.sigmoid(0.5 * (point - gains_E))
    )
    expected_loss = (torch.where(good_E, 1.5, 1.0) - value_E).mean()
    expected_loss.backward()
    expected = [parameter.grad for parameter in at_step.parameters() if parameter.grad is not None]
    assert second["reference_point"] == pytest.approx(point, abs=1e-5)
    assert second["loss"] == pytest.approx(expected_loss.item(), abs=1e-5)
    assert second["chosen_reward"] == pytest.approx(0.5 * gains_E[good_E].mean().item(), abs=1e-5)
    assert len(found) == len(expected)
    for of_learner, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(of_learner, plain, atol=2e-5, rtol=1e-3)
    (third,) = learner.advance_stage(1)
    assert third["reward_margin"] > second["reward_margin"] > 0.0


def test_groups_without_a_better_episode_make_no_pair(tiny: Path, group_of: Groups) -> None:
    learner = made(tiny, DPO)
    assert learner.begin_stage(0, [group_of(0, [1.0, 1.0]), group_of(1, [1.0])]) == (0, 0)


def test_a_stage_of_nothing_ends_at_once(tiny: Path) -> None:
    learner = made(tiny, SFT)
    assert learner.begin_stage(0, []) == (0, 0)
    assert learner.advance_stage(5) == []
    assert not learner.stages.open
