"""A step of ILQL is its papers' losses over each segment alone, however its tokens are packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.data.batch_checks import BatchRefused
from learner.model.value_heads import ActionValues, StateValue
from learner.settings import LearnerSettings
from learner.stages.settings import IlqlSettings
from learner.training.learner import Learner
from rollout.wire.trajectory import Group
from tests.learner.dense import gradients, segments, with_weights
from tests.learner.episodes import group, random_groups
from tests.learner.ranked import float64
from tests.reference import Episode

STILL = {"learning_rate": 1e-30, "max_grad_norm": 1e9}  # moves nothing
GAMMA, EXPECTILE, CQL, COEFFICIENT, TEMPERATURE, LIMIT = 0.7, 0.8, 0.3, 0.6, 0.5, 2.0
STAGE: dict[str, Any] = {
    "optim": STILL,
    "value_optim": STILL,
    "episodes_per_step": 6,
    "head_width": 10,
    "gamma": GAMMA,
    "expectile": EXPECTILE,
    "cql": CQL,
    "value_coefficient": COEFFICIENT,
    "temperature": TEMPERATURE,
    "weight_limit": LIMIT,
    "target_rate": 0.25,
}


def _learner(tiny: Path, limit: int = 10_000, **changed: Any) -> Learner:
    settings = {"model": {"path": str(tiny)}, "tokens_per_microbatch": limit}
    stage = IlqlSettings.model_validate(STAGE | changed)
    return Learner(LearnerSettings.model_validate(settings), seed=3, stages=[stage])


def _modules(learner: Learner) -> tuple[ActionValues, ActionValues, StateValue]:
    """Both action values and the slow copy of them, and the state value."""
    run = learner.stages._run
    assert run is not None
    q, slow, v = (run.modules[name].module for name in ("q", "q_target", "v"))
    assert isinstance(q, ActionValues) and isinstance(slow, ActionValues) and isinstance(v, StateValue)
    return q, slow, v


def _shaken(*modules: nn.Module) -> None:
    """Other numbers than zeros, the same every time."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


class Plain:
    """The losses of an episode by transformers' model, one segment and token after the other."""

    def __init__(
        self, model: PreTrainedModel, q: ActionValues, slow: ActionValues, v: StateValue, detach: bool
    ) -> None:
        self._model, self._q, self._slow, self._v, self._detach = model, q, slow, v, detach
        self.weights: list[float] = []  # of the policy's loss, token by token

    def losses(self, story: Episode) -> list[tuple[Tensor, Tensor]]:
        """Policy loss and value losses of each sampled token."""
        states, logprobs, actions, turns, last = [], [], [], [], None
        for tokens in segments(story):
            ids = torch.tensor([[token.id for token in tokens]])
            hidden_TD = self._model.base_model(ids).last_hidden_state[0]
            logprobs_TV = self._model.lm_head(hidden_TD).log_softmax(-1)
            for place, token in enumerate(tokens):
                if token.sampled:
                    states.append(hidden_TD[place - 1])
                    logprobs.append(logprobs_TV[place - 1, token.id])
                    actions.append(token.id)
                    turns.append(token.turn)
            last = hidden_TD[-1]
        assert last is not None
        found = []
        for place, (state, action, turn) in enumerate(zip(states, actions, turns, strict=True)):
            final = place == len(states) - 1
            ahead = None if final else turns[place + 1]
            # A turn without a token of its own is paid with the one before it.
            first = 0 if place == 0 else turn
            paid = range(first, len(story.rewards) if ahead is None else ahead)
            reward = 0.0 if ahead == turn else sum(story.rewards[each] for each in paid)
            following = last if final else states[place + 1]
            worth = 0.0 if final and story.ended else self._value(following).item()
            target = reward + (1.0 if ahead == turn else GAMMA) * worth
            found.append(self._token(state, action, target, logprobs[place]))
        return found

    def _token(self, state: Tensor, action: int, target: float, logprob: Tensor) -> tuple[Tensor, Tensor]:
        seen = state.detach() if self._detach else state
        q = [self._actions(self._q, seen, place) for place in (0, 1)]
        slow = min(self._actions(self._slow, state, place)[action].item() for place in (0, 1))
        v = self._value(seen)
        td = sum((target - each[action]) ** 2 for each in q)
        share = EXPECTILE if slow > v.item() else 1 - EXPECTILE
        cql = sum(torch.log(torch.exp(each).sum()) - each[action] for each in q)
        weight = min(float(torch.exp(torch.tensor((slow - v.item()) / TEMPERATURE))), LIMIT)
        self.weights.append(weight)
        return -weight * logprob, td + share * (slow - v) ** 2 + CQL * cql

    def _actions(self, heads: ActionValues, state: Tensor, place: int) -> Tensor:
        features = (heads.features, heads.other_features)[place]
        return (heads.last, heads.other_last)[place](features(state))

    def _value(self, state: Tensor) -> Tensor:
        return self._v.last(self._v.features(state))[0]


@pytest.fixture
def stories() -> list[Episode]:
    found = [story for siblings in random_groups(8) for story in siblings]
    assert {story.ended for story in found} == {True, False}
    assert any(len(segments(story)) > 1 for story in found)
    return found


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("limit", [1, 30, 10_000])
def test_a_step_has_the_gradients_of_the_papers_losses_over_each_segment_alone(
    tiny: Path, plain: PreTrainedModel, stories: list[Episode], limit: int, detach: bool
) -> None:
    with float64():
        learner = _learner(tiny, limit, detach=detach)
        assert learner.begin_stage(0, [group([story], place) for place, story in enumerate(stories)]) == (
            0,
            1,
        )
        q, slow, v = _modules(learner)
        _shaken(q, slow, v)
        copies = Plain(with_weights(plain, learner.policy.model.state_dict()), q, slow, v, detach)
        policy = copies._model
        losses = [pair for story in stories for pair in copies.losses(story)]
        both = [torch.stack(each).mean() for each in zip(*losses, strict=True)]
        (both[0] + COEFFICIENT * both[1]).backward()
        expected = [gradients(module) for module in (policy, q, v)]
        for module in (q, v):
            module.zero_grad()
        (row,) = learner.advance_stage(1)
    assert row["loss"] == pytest.approx((both[0] + COEFFICIENT * both[1]).item(), abs=1e-6)
    assert row["policy_loss"] == pytest.approx(both[0].item(), abs=1e-6)
    total, squares = sum(copies.weights), sum(weight**2 for weight in copies.weights)
    assert row["effective_samples"] == pytest.approx(total**2 / (len(losses) * squares), abs=1e-6)
    assert row["tokens_scored"] == len(losses) == row["batch_tokens_sampled"]
    found = [gradients(module) for module in (learner.policy.model, q, v)]
    assert not gradients(slow), "the slow copy is only followed"
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other) and max(float(each.abs().max()) for each in other) > 1e-3
        for left, right in zip(one, other, strict=True):
            torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)  # targets are float32


def test_what_was_not_sampled_moves_no_logit(tiny: Path, stories: list[Episode]) -> None:
    """The gradient of a step reaches each different prefix that precedes a sampled token, and nothing else."""
    learner = _learner(tiny)
    learner.begin_stage(0, [group([story], place) for place, story in enumerate(stories)])
    _shaken(*(each.float() for each in _modules(learner)))
    reached: list[int] = []

    def watch(module: nn.Module, given: Any, hidden_TD: Any) -> None:
        last = hidden_TD.last_hidden_state
        if last.requires_grad:
            last.register_hook(lambda grad: reached.append(int((grad[0].abs().sum(-1) > 0).sum())))

    learner.policy.model.base_model.register_forward_hook(watch)
    learner.advance_stage(1)
    preceding = {
        tuple(each.id for each in tokens[:place])
        for story in stories
        for tokens in segments(story)
        for place, token in enumerate(tokens)
        if token.sampled
    }
    assert sum(reached) == len(preceding)


def test_the_slow_copy_goes_its_share_of_the_way(tiny: Path, stories: list[Episode]) -> None:
    learner = _learner(tiny, value_optim={"learning_rate": 1e-2})
    learner.begin_stage(0, [group([story], place) for place, story in enumerate(stories)])
    q, slow, _ = _modules(learner)
    before = [parameter.clone() for parameter in slow.parameters()]
    learner.advance_stage(1)
    for old, online, followed in zip(before, q.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(followed, 0.75 * old + 0.25 * online.detach())


def test_the_policy_imitates_all_tokens_alike_until_the_warmup_ends_and_values_are_learned_meanwhile(
    tiny: Path, plain: PreTrainedModel, stories: list[Episode]
) -> None:
    groups = [group([story], place) for place, story in enumerate(stories)]
    with float64():
        learner = _learner(tiny, warmup_steps=1, epochs=2, target_rate=1e-12)
        learner.begin_stage(0, groups)
        q, slow, v = _modules(learner)
        _shaken(q, slow, v)
        model = with_weights(plain, learner.policy.model.state_dict())
        copies = Plain(model, q, slow, v, detach=False)
        # A copy's losses with the weights undone are -log pi, the loss of imitation.
        losses = [policy for story in stories for policy, _ in copies.losses(story)]
        told = torch.stack(
            [loss / weight for loss, weight in zip(losses, copies.weights, strict=True)]
        ).mean()
        told.backward()
        warm, after = learner.advance_stage(2)
    assert warm["policy_loss"] == pytest.approx(told.item(), abs=1e-6)
    assert (warm["policy_weight"], warm["effective_samples"]) == (1.0, 1.0)
    weight = sum(copies.weights) / len(copies.weights)
    assert after["policy_weight"] == pytest.approx(weight, abs=1e-6) and abs(weight - 1) > 1e-2
    assert warm["td_loss"] > 0 and warm["value_grad_norm"] >= 0


def test_a_warmup_as_long_as_the_stage_is_refused(tiny: Path, stories: list[Episode]) -> None:
    learner = _learner(tiny, warmup_steps=1)
    with pytest.raises(
        BatchRefused, match="warmup_steps=1 leaves the policy none of the stage's steps, which are 1"
    ):
        learner.begin_stage(0, [group([story], place) for place, story in enumerate(stories)])


def test_a_game_of_two_sides_is_refused(tiny: Path, stories: list[Episode]) -> None:
    game = group([stories[0]], 0)
    (episode,) = game.trajectories
    seated = replace(episode, turns=tuple(replace(turn, seat=0) for turn in episode.turns))
    with pytest.raises(BatchRefused, match="learns values of one player"):
        _learner(tiny).begin_stage(0, [Group(game.slot, (seated,))])
