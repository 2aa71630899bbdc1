"""A reward model learns what pairs say, and transformers computes its scores from the folder it is written to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from learner.algorithm.preferences import bradley_terry
from learner.algorithm.schedule import OptimSettings
from learner.settings import LearnerSettings, ModelSettings
from learner.stages.reward_model import RewardModel
from learner.stages.settings import RewardModelSettings
from learner.training.learner import Learner
from rollout.wire.trajectory import Group, Trajectory
from tests.families import PUBLISHED, build_family
from tests.learner.staged import learned
from tests.smollm2 import FOLDER, needs_smollm2

Groups = Callable[..., Group]
STAGE = RewardModelSettings(
    optim=OptimSettings(learning_rate=5e-3, max_grad_norm=1e9),
    head_optim=OptimSettings(learning_rate=5e-2, max_grad_norm=1e9),
    pairs_per_step=8,
    epochs=4,
    margin=0.5,
    centre=0.1,
    heldout_share=0.0,
)


def made(path: Path, stage: RewardModelSettings, row: int = 50) -> Learner:
    settings = LearnerSettings(model=ModelSettings(path=str(path)), tokens_per_microbatch=row)
    return Learner(settings, seed=3, stages=[stage])


def ids_of(episode: Trajectory) -> torch.Tensor:
    parts = [ids for turn in episode.turns for ids in (turn.prompt_ids, turn.action_ids)]
    return torch.from_numpy(np.concatenate(parts)).long()[None]


def test_the_loss_of_pairs_is_what_trl_computes() -> None:
    """The formula of TRL 1.16.0's reward trainer on these numbers: margins 0.5 and 0.25, centred by 0.01."""
    chosen, rejected, margin = (
        torch.tensor(x, dtype=torch.float64) for x in ([1.2, -0.3], [0.4, 0.5], [0.5, 0.25])
    )
    plain_P, statistics = bradley_terry(chosen, rejected, margin)
    assert plain_P.tolist() == pytest.approx([0.5543552444685271, 1.3500584796176431], rel=1e-12)
    centred_P, _ = bradley_terry(chosen, rejected, margin, 0.01)
    assert centred_P.mean().item() == pytest.approx(0.9652068620430851, rel=1e-7)
    assert statistics["reward_accuracy"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("row", [50, 4096])
def test_a_step_is_the_gradient_of_the_pairs_mean_loss(row: int, tiny: Path, group_of: Groups) -> None:
    """The third step, where the head is no zero; a plain model scores each conversation alone, for any packing."""
    groups = [group_of(g, [1.0, 0.0, 0.5]) for g in range(4)]
    learner = made(tiny, STAGE, row)
    assert learner.begin_stage(0, groups) == (0, 4)
    learner.advance_stage(2)
    run = learner.stages._run
    assert run is not None
    plain = AutoModelForCausalLM.from_pretrained(tiny)
    plain.load_state_dict(learner.policy.model.state_dict())
    head = next(run.modules["reward"].parameters()).detach().clone().requires_grad_()
    (third,) = learner.advance_stage(1)

    def reward(episode: Trajectory) -> torch.Tensor:
        hidden_TD = plain(ids_of(episode), output_hidden_states=True).hidden_states[-1][0]
        return hidden_TD[-1] @ head[0]

    pairs = [(group.trajectories[0], group.trajectories[1]) for group in groups]
    gaps = [(reward(better), reward(worse)) for better, worse in pairs]
    losses = [
        -torch.nn.functional.logsigmoid(better - worse - 0.5) + 0.1 * (better + worse) ** 2
        for better, worse in gaps
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    assert third["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert third["reward_margin"] == pytest.approx(
        torch.stack([better - worse for better, worse in gaps]).mean().item(), abs=1e-5
    )
    found = [each.grad for each in (*learner.policy.parameters(), *run.modules["reward"].parameters())]
    expected = [each.grad for each in (*plain.parameters(), head)]
    assert expected[-1] is not None and expected[-1].abs().max() > 1e-3
    for of_learner, of_plain in zip(found, expected, strict=True):
        torch.testing.assert_close(of_learner, of_plain, atol=2e-5, rtol=1e-3)


def test_pairs_of_one_prompt_are_learned_or_held_out_together(tiny: Path, group_of: Groups) -> None:
    groups = [group_of(g // 2, [1.0, 0.0], seed=g % 2) for g in range(8)]
    groups = [
        replace(group, trajectories=_with_prompt(group, groups[g // 2 * 2])) for g, group in enumerate(groups)
    ]
    learner = made(tiny, STAGE.model_copy(update={"heldout_share": 0.5}))
    learner.begin_stage(0, groups)
    run = learner.stages._run
    assert run is not None and isinstance(run._stage, RewardModel)
    assert len(run._stage._learned) == len(run._stage._heldout) == 4
    assert {place // 2 for place in run._stage._learned}.isdisjoint(
        place // 2 for place in run._stage._heldout
    )


def _with_prompt(group: Group, other: Group) -> tuple[Trajectory, ...]:
    """The group's episodes, as if they began as the other's."""
    first = other.trajectories[0].turns[0].prompt_ids
    return tuple(
        replace(each, turns=(replace(each.turns[0], prompt_ids=first), *each.turns[1:]))
        for each in group.trajectories
    )


def test_it_learns_to_tell_pairs_that_it_has_not_seen_and_is_written_as_a_classifier(
    tiny: Path, tmp_path: Path, group_of: Groups
) -> None:
    groups = [marked(group_of(g, [1.0, 0.0])) for g in range(24)]
    learner = made(tiny, STAGE.model_copy(update={"margin": 0.0, "heldout_share": 0.25, "epochs": 6}))
    rows = learned(learner, groups)
    judged = [row["heldout_accuracy"] for row in rows if "heldout_accuracy" in row]
    assert len(judged) == 6 and judged[-1] == 1.0 and rows[-1]["heldout_loss"] < 0.3
    folder = learner.save(tmp_path) / "model"
    scores = scored(folder, [each for group in groups for each in group.trajectories], padded=True)
    assert all(better > worse for better, worse in zip(scores[::2], scores[1::2], strict=True))


def marked(group: Group) -> Group:
    """The group with an action in every better episode that no worse one has."""
    episodes = []
    for episode in group.trajectories:
        turn = episode.turns[-1]
        said = np.full_like(turn.action_ids, 6 if episode.reward else 5)
        episodes.append(replace(episode, turns=(*episode.turns[:-1], replace(turn, action_ids=said))))
    return replace(group, trajectories=tuple(episodes))


def scored(folder: Path, episodes: Sequence[Trajectory], padded: bool) -> list[float]:
    """What transformers makes of these conversations; padded: all in one batch, with the folder's padding token."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert model.config.num_labels == 1
    rows = [ids_of(each)[0] for each in episodes]
    with torch.no_grad():
        if not padded:
            return [float(model(row[None]).logits) for row in rows]
        assert AutoTokenizer.from_pretrained(folder).pad_token_id == model.config.pad_token_id
        ids_BL = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=model.config.pad_token_id
        )
        return [
            float(each) for each in model(ids_BL, attention_mask=ids_BL != model.config.pad_token_id).logits
        ]


@needs_smollm2
def test_transformers_scores_conversations_of_a_real_model_as_the_learner_did(
    tmp_path: Path, group_of: Groups
) -> None:
    """Its padding token ends its conversations: the written one has another, or scores would be of other tokens."""
    end = AutoTokenizer.from_pretrained(FOLDER).eos_token_id
    groups = [ended(group_of(g, [1.0, 0.0]), end) for g in range(3)]
    folder, expected = of_learner(FOLDER, groups, tmp_path, row=200)
    episodes = [each for group in groups for each in group.trajectories]
    assert scored(folder, episodes, padded=True) == pytest.approx(expected, abs=1e-4)
    assert scored(folder, episodes, padded=False) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", PUBLISHED)
def test_transformers_scores_conversations_of_a_family_as_the_learner_did(
    family: str, tmp_path: Path, group_of: Groups
) -> None:
    build_family(family, False, tmp_path / "model")
    groups = [group_of(g, [1.0, 0.0]) for g in range(3)]
    folder, expected = of_learner(tmp_path / "model", groups, tmp_path / "run", row=50)
    episodes = [each for group in groups for each in group.trajectories]
    assert scored(folder, episodes, padded=False) == pytest.approx(expected, abs=1e-4)


def of_learner(path: Path, groups: Sequence[Group], run: Path, row: int) -> tuple[Path, list[float]]:
    """The folder of a reward model of these pairs, and the learner's own scores of them."""
    learner = made(path, STAGE.model_copy(update={"epochs": 2}), row)
    learner.begin_stage(0, groups)
    under_way = learner.stages._run
    assert under_way is not None and isinstance(under_way._stage, RewardModel)
    learner.advance_stage(2)
    scores: list[float] = under_way._stage._rewards(range(len(groups))).flatten().tolist()
    assert max(scores) - min(scores) > 0.1
    return learner.save(run) / "model", scores


def ended(group: Group, end: int) -> Group:
    """The group with an end token at the end of every turn."""

    def of(episode: Trajectory) -> Trajectory:
        turns = [
            replace(turn, action_ids=np.append(turn.action_ids[:-1], np.int32(end))) for turn in episode.turns
        ]
        return replace(episode, turns=tuple(turns))

    return replace(group, trajectories=tuple(map(of, group.trajectories)))
