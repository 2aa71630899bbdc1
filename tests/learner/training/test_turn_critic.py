"""ArCHer's critic of turns: its targets and losses over each segment alone, what it moves, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from learner.algorithm.advantages import turn_targets
from learner.data.batch_checks import BatchRefused
from learner.model.footprint import shape_of
from learner.model.lora_targets import Sizes
from learner.parallel.ranks import ALONE
from learner.settings import LearnerSettings
from learner.training.learner import Learner
from learner.training.memory_estimate import host_amounts
from learner.training.turn_critic import TurnCritic, correlation
from rollout.wire.trajectory import Group
from tests.learner.dense import gradients, load, segments, with_weights
from tests.learner.episodes import group, random_groups
from tests.learner.ranked import built, float64, groups_of
from tests.learner.staged import interrupted
from tests.reference import Episode

Groups = Callable[..., Group]
STILL = {"learning_rate": 1e-30, "max_grad_norm": 1e9}  # moves nothing
MOVING = {"learning_rate": 1e-2}
GAMMA, LAM, RATE, TEMPERATURE = 0.7, 0.4, 0.25, 0.8
Pairs = list[tuple[Tensor, Tensor]]  # of both heads' values, [2]: before and behind the action of each turn


def _learner(
    tiny: Path, optim: dict[str, float], limit: int = 10_000, of: str = "action_values", **critic: Any
) -> Learner:
    of_turns = {"kind": "turns", "optim": optim, "gamma": GAMMA, "lam": LAM, "target_rate": RATE}
    algorithm = {
        "advantage": {"kind": "turns", "of": of},
        "loss": {"kind": "reinforce"},
        "critic": of_turns | {"passes": 1, "minibatches": 1, "trust": 0.0} | critic,
        "skip_zero_advantage": False,
    }
    settings = {"model": {"path": str(tiny)}, "optim": optim, "algorithm": algorithm}
    fields = settings | {"tokens_per_microbatch": limit}
    return Learner(LearnerSettings.model_validate(fields), temperature=TEMPERATURE)


def _critic(learner: Learner) -> TurnCritic:
    learner._begin()
    assert isinstance(learner._critic, TurnCritic)
    return learner._critic


def _parts(critic: TurnCritic) -> dict[str, nn.Module]:
    return {
        "trunk": critic.trunk.model,
        "heads": critic.heads.module,
        "slow trunk": critic.slow_trunk.model,
        "slow heads": critic.slow_heads.module,
    }


def _shaken(modules: dict[str, nn.Module]) -> None:
    """Other numbers than those they began with, the same every time, and different in the slow copy."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.add_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.1
                )


def _numbers(learner: Learner) -> list[Tensor]:
    """All that a step may change: weights of policy and critic, and the moments of both."""
    critic = _critic(learner)
    weights = [*learner.policy.parameters(), *(p for m in _parts(critic).values() for p in m.parameters())]
    states = [each._adamw.state.values() for each in (learner.optimizer, critic.optimizer)]
    moments = [tensor for state in states for entry in state for tensor in entry.values()]
    return [tensor.detach().clone() for tensor in (*weights, *moments)]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _values(model: PreTrainedModel, heads: nn.Module, story: Episode) -> Pairs:
    """Each segment alone through transformers' model; heads as their layers are written down."""

    def read(hidden_D: Tensor) -> Tensor:
        found = []
        for name in ("one", "other"):
            first, last = (heads.get_submodule(f"{name}.{each}") for each in ("features.0", "last"))
            assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
            inner = (first.weight @ hidden_D + first.bias).clamp(min=0)
            found.append((last.weight @ inner + last.bias)[0])
        return torch.stack(found)

    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for tokens in segments(story):
        hidden_TD = model.base_model(torch.tensor([[token.id for token in tokens]])).last_hidden_state[0]
        for turn in sorted({token.turn for token in tokens if token.sampled}):
            places = [place for place, token in enumerate(tokens) if token.sampled and token.turn == turn]
            pairs[turn] = read(hidden_TD[places[0] - 1]), read(hidden_TD[places[-1]])
    return [pairs[turn] for turn in sorted(pairs)]


def _paid(story: Episode) -> list[float]:
    """Rewards of the turns that acted; that of another turn belongs to the one before it, at first to the one after."""
    acting = sorted({token.turn for token in story.sampled})
    found = dict.fromkeys(acting, 0.0)
    for turn, reward in enumerate(story.rewards):
        found[max((each for each in acting if each <= turn), default=acting[0])] += reward
    return [found[turn] for turn in acting]


def _targets(rewards: list[float], slow: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of V and Q of each turn, from the end of the episode backwards."""
    found, later = [], 0.0
    for turn in reversed(range(len(rewards))):
        ahead = slow[turn + 1][0] if turn + 1 < len(rewards) else 0.0
        later = rewards[turn] + GAMMA * ((1 - LAM) * ahead + LAM * later)
        found.append((slow[turn][1], later))
    return found[::-1]


@pytest.fixture
def stories() -> list[Episode]:
    found = [story for siblings in random_groups(8) for story in siblings]
    assert {story.ended for story in found} == {True, False}
    assert any(len(segments(story)) > 1 for story in found)
    assert any(len(_paid(story)) < len(story.rewards) for story in found), "a turn without a token"
    return found


def _groups(stories: list[Episode]) -> list[Group]:
    return [group([story], place) for place, story in enumerate(stories)]


def test_targets_by_hand() -> None:
    rewards, before, behind = [0.0, 1.0], [0.5, 0.25], [0.4, 0.6]
    for lam, first in ((0.0, 0.5 * 0.25), (1.0, 0.5 * 1.0), (0.5, 0.5 * (0.125 + 0.5))):
        of_v, of_q = turn_targets(rewards, before, behind, gamma=0.5, lam=lam)
        assert of_v.tolist() == pytest.approx([0.4, 0.6]) and of_q.tolist() == pytest.approx([first, 1.0])


class Plain:
    """The formulas by transformers' models, one segment and turn after the other."""

    def __init__(self, plain: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
        self.trunk, self._slow = (
            with_weights(plain, modules[name].state_dict()) for name in ("trunk", "slow trunk")
        )
        self._heads, self._slow_heads = modules["heads"], modules["slow heads"]

    def losses(self, story: Episode) -> list[Tensor]:
        """Of both heads together, at every place."""
        slow = _values(self._slow, self._slow_heads, story)
        lower = [(before.min().item(), behind.min().item()) for before, behind in slow]
        pairs = zip(_values(self.trunk, self._heads, story), _targets(_paid(story), lower), strict=True)
        return [
            ((values - target) ** 2).sum() / 2
            for pair, targets in pairs
            for values, target in zip(pair, targets, strict=True)
        ]

    def advantages(self, story: Episode, of: str) -> dict[int, float]:
        """Of each turn that acted, before they are normalized."""
        means = [(v.mean().item(), q.mean().item()) for v, q in _values(self.trunk, self._heads, story)]
        returns = [target for _, target in _targets(_paid(story), means)]
        worth = {"action_values": [q for _, q in means], "returns": returns}[of]
        acting = sorted({token.turn for token in story.sampled})
        return {turn: each - v for turn, each, (v, _) in zip(acting, worth, means, strict=True)}


def _policy_loss(plain: PreTrainedModel, stories: list[Episode], by_turn: list[dict[int, float]]) -> Tensor:
    """REINFORCE with the advantages of turns, normalized over all turns; the mean over all sampled tokens."""
    of_turns = [advantage for each in by_turn for advantage in each.values()]
    mean, deviation = np.mean(of_turns), np.sqrt(np.var(of_turns) + 1e-8)
    terms = []
    for story, advantages in zip(stories, by_turn, strict=True):
        for tokens in segments(story):
            logits_TV = plain(torch.tensor([[token.id for token in tokens]])).logits[0] / TEMPERATURE
            for place, token in enumerate(tokens):
                if token.sampled:
                    logprob = logits_TV[place - 1].log_softmax(-1)[token.id]
                    terms.append(-(advantages[token.turn] - mean) / deviation * logprob)
    return torch.stack(terms).mean()


@pytest.mark.parametrize(("limit", "of"), [(1, "action_values"), (30, "returns"), (10_000, "action_values")])
def test_a_step_has_the_gradients_of_the_formulas_over_each_segment_alone(
    tiny: Path, plain: PreTrainedModel, stories: list[Episode], limit: int, of: str
) -> None:
    with float64():
        learner = _learner(tiny, STILL, limit, of)
        critic = _critic(learner)
        modules = _parts(critic)
        _shaken(modules)
        formulas = Plain(plain, modules)
        value_loss = torch.stack([loss for story in stories for loss in formulas.losses(story)]).mean()
        value_loss.backward()
        expected = [gradients(formulas.trunk.base_model), gradients(modules["heads"])]
        modules["heads"].zero_grad()
        plain.zero_grad()
        _policy_loss(plain, stories, [formulas.advantages(story, of) for story in stories]).backward()
        before = [parameter.clone() for parameter in modules["slow heads"].parameters()]
        row = learner.step(_groups(stories))
    assert row["value_loss"] == pytest.approx(value_loss.item(), abs=1e-6)
    assert row["truncated_without_bootstrap"] == np.mean([not story.ended for story in stories])
    found = [gradients(critic.trunk.model.base_model), gradients(modules["heads"])]
    found.append(gradients(learner.policy.model))
    for one, other in zip(found, [*expected, gradients(plain)], strict=True):
        assert len(one) == len(other) and max(float(each.abs().max()) for each in other) > 1e-3
        for left, right in zip(one, other, strict=True):
            torch.testing.assert_close(left, right, atol=2e-6, rtol=1e-5)  # targets are float32
    fast = modules["heads"].parameters()
    for old, new, followed in zip(before, modules["slow heads"].parameters(), fast, strict=True):
        torch.testing.assert_close(new, old + RATE * (followed - old))


def test_only_states_before_and_behind_actions_move_the_critic(tiny: Path, stories: list[Episode]) -> None:
    learner = _learner(tiny, MOVING)
    critic = _critic(learner)
    _shaken({name: each.float() for name, each in _parts(critic).items()})
    reached: list[int] = []

    def watch(module: nn.Module, given: Any, hidden_TD: Any) -> None:
        last = hidden_TD.last_hidden_state
        if last.requires_grad:
            last.register_hook(lambda grad: reached.append(int((grad[0].abs().sum(-1) > 0).sum())))

    critic.trunk.model.base_model.register_forward_hook(watch)
    learner.step(_groups(stories))
    places = set()
    for tokens in (tokens for story in stories for tokens in segments(story)):
        ids, acted = [token.id for token in tokens], [t.turn if t.sampled else None for t in tokens]
        for end in range(1, len(ids) + 1):
            last, following = acted[end - 1], acted[end] if end < len(ids) else None
            if last != following:
                places.add(tuple(ids[:end]))
    assert sum(reached) == len(places)


def test_the_policy_waits_for_the_critic(tiny: Path, group_of: Groups) -> None:
    learner = _learner(tiny, MOVING, warmup_steps=2, passes=4)
    first = [parameter.clone() for parameter in learner.policy.parameters()]
    errors = [learner.step([group_of(0, [1.0, 0.5])])["value_error"] for _ in range(2)]
    assert errors[1] < errors[0] and learner.optimizer.steps == 0
    assert _equal(first, list(learner.policy.parameters()))
    learner.step([group_of(0, [1.0, 0.5])])
    assert not any(torch.equal(a, b) for a, b in zip(first, learner.policy.parameters(), strict=True))


def test_the_policy_moves_once_fresh_episodes_bear_the_critic_out(tiny: Path, group_of: Groups) -> None:
    """Of the same episodes again the critic foretells more and more; reused ones are no evidence."""
    learner = _learner(tiny, MOVING, trust=0.5, passes=6, lam=1.0)
    rewards = [1.0, 0.0, 0.5, 0.25]
    seen: list[tuple[float, bool]] = []
    for _ in range(12):
        before = learner.optimizer.steps
        row = learner.step([group_of(0, rewards, turns=3)])
        seen.append((row["value_correlation"], learner.optimizer.steps > before))
    assert seen[0] == (0.0, False), "heads begin as zeros"
    assert seen[-1][0] > 0.5 and all(moved == (foretold >= 0.5) for foretold, moved in seen)
    row = learner.step([group_of(1, [0.0], turns=1), replace(group_of(0, rewards, turns=3), reuse=1)])
    assert row["value_correlation"] == 0.0 and row["idle_step"] == 1.0


def test_correlation_is_numpys() -> None:
    x_M, y_M = np.random.default_rng(0).normal(size=(2, 50))
    assert correlation(x_M, x_M + y_M) == pytest.approx(np.corrcoef(x_M, x_M + y_M)[0, 1])
    assert correlation(x_M, np.ones(50)) == correlation(np.zeros(0), np.zeros(0)) == 0.0


class _Copied(TorchDispatchMode):
    """Bytes of copies that are made of tensors."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.nbytes += found.nbytes if func is torch.ops.aten._to_copy.default else 0
        return found


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 4}}], ids=["whole", "lora"])
@pytest.mark.parametrize("critic", [{"kind": "own"}, {"kind": "turns", "trust": 0.0}], ids=["own", "turns"])
def test_what_a_step_keeps_of_policy_and_critic_is_told(
    tiny: Path, model: dict[str, Any], critic: dict[str, Any]
) -> None:
    advantage = {"kind": "turns" if critic["kind"] == "turns" else "gae"}
    recipe = {"advantage": advantage, "critic": critic, "epochs": 2}
    learner = built(ALONE, tiny, recipe, **model)
    for step in range(2):  # then there are moments: before the first, no turn has a value
        learner.step(groups_of(step))
    with (copied := _Copied()):
        learner._keep()
    adapter, shape = sum(p.numel() for p in learner.policy.parameters()), shape_of(load(tiny))
    amounts = host_amounts(learner.settings, shape, Sizes(adapter if model else 0), 0)
    (told,) = (each.nbytes for each in amounts if each.what == "copy of weights and moments, in a step")
    # Heads, whose width a model's is not small against here: weights and two moments; their slow copy.
    assert learner._critic is not None
    heads = sum(p.numel() for p in learner._critic.optimizer._parameters) - adapter
    beside = 4 * heads * (4 if critic["kind"] == "turns" else 3)
    assert told + beside == pytest.approx(copied.nbytes, rel=0.01)


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    tiny: Path, tmp_path: Path, group_of: Groups
) -> None:
    def made() -> Learner:
        return _learner(tiny, MOVING, 40, warmup_steps=1, passes=2, minibatches=3)

    batches = [[group_of(10 * s + g, [1.0, 0.0, 0.5]) for g in range(2)] for s in range(4)]
    straight, resumed = interrupted(made, batches, tmp_path)
    assert _equal(_numbers(straight), _numbers(resumed))


@pytest.mark.parametrize("refuses", ["critic", "policy"])
def test_a_batch_that_is_not_finite_moves_nothing(
    tiny: Path, group_of: Groups, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    learner = _learner(tiny, MOVING, passes=2)
    learner.step([group_of(0, [1.0, 0.0])])
    before, good = _numbers(learner), group_of(1, [1.0, 0.0])
    first, *others = good.trajectories
    turns = first.turns
    if refuses == "critic":
        turns = tuple(replace(turn, reward=3e38) for turn in turns)
    else:  # the critic has made its steps by then
        monkeypatch.setattr(learner.optimizer, "grad_norm", lambda: float("nan"))
    with pytest.raises(BatchRefused, match="not finite"):
        learner.step([replace(good, trajectories=(replace(first, turns=turns), *others))])
    assert _equal(before, _numbers(learner))
