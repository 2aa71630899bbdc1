"""Losses of values against numbers worked out by hand, a table by bisection, derivatives by difference quotients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.algorithm.episode import Episode, Values
from learner.algorithm.values import (
    advantage_weighted_loss,
    advantage_weights,
    bellman_targets,
    conservative_loss,
    expectile_loss,
    td_loss,
)


def episode(
    rewards: list[float], tokens: tuple[int, ...], before: list[float], after: float, ended: bool
) -> Episode:
    values = Values(np.array(before, np.float32), after)
    return Episode(np.array(rewards), tokens, ended, values=values)


def test_a_target_is_the_reward_and_the_value_of_the_next_state_discounted_at_a_turns_end() -> None:
    # Two turns of two tokens and of one: within the first turn nothing is discounted.
    ended = episode([1.0, 4.0], (2, 1), [0.5, 2.0, 3.0], 7.0, ended=True)
    assert bellman_targets(ended, gamma=0.5).tolist() == [2.0, 1.0 + 0.5 * 3.0, 4.0]
    truncated = episode([1.0, 4.0], (2, 1), [0.5, 2.0, 3.0], 7.0, ended=False)
    assert bellman_targets(truncated, gamma=0.5).tolist() == [2.0, 2.5, 4.0 + 0.5 * 7.0]


def test_a_turn_without_a_token_pays_the_token_before_it_and_discounts_once() -> None:
    found = bellman_targets(episode([1.0, 2.0, 4.0], (1, 0, 1), [9.0, 8.0], 6.0, ended=False), gamma=0.5)
    assert found.tolist() == [1.0 + 2.0 + 0.5 * 8.0, 4.0 + 0.5 * 6.0]


def test_losses_are_their_papers_numbers() -> None:
    q_N, targets_N = torch.tensor([1.0, -0.5]), torch.tensor([3.0, 0.5])
    assert td_loss(q_N, targets_N).tolist() == [4.0, 1.0]
    assert expectile_loss(torch.tensor([2.0, -2.0]), 0.75).tolist() == [3.0, 1.0]
    q_NV = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    found = conservative_loss(q_NV.log_softmax(-1)[:, 1])
    assert found.item() == pytest.approx(np.log(1 + np.e + np.e**2) - 1.0, rel=1e-12)
    weights_N = advantage_weights(torch.tensor([0.0, 0.5, 900.0, -900.0]), temperature=0.5, limit=20.0)
    assert weights_N.tolist() == pytest.approx([1.0, np.e, 20.0, 0.0])
    assert advantage_weighted_loss(torch.tensor([-2.0]), torch.tensor([3.0])).tolist() == [6.0]


TARGETS, ACTIONS = torch.tensor([0.3, -0.7], dtype=torch.float64), torch.tensor([[2], [0]])
WEIGHTS = torch.tensor([2.0, 0.1], dtype=torch.float64)
# Of float64 [2, 3]: everything that a gradient flows through
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "td": lambda x: td_loss(x[:, 0], TARGETS),
    "expectile": lambda x: expectile_loss(TARGETS - x[:, 0], 0.8),
    "conservative": lambda x: conservative_loss(x.log_softmax(-1).gather(1, ACTIONS)[:, 0]),
    "weighted": lambda x: advantage_weighted_loss(x.log_softmax(-1).gather(1, ACTIONS)[:, 0], WEIGHTS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_is_a_difference_quotient(name: str) -> None:
    loss = LOSSES[name]
    x = torch.tensor([[0.4, -1.1, 0.2], [0.9, 0.1, -0.3]], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(x).sum(), x)
    for place in np.ndindex(2, 3):
        step = torch.zeros(2, 3, dtype=torch.float64)
        step[place] = 1e-6
        quotient = (loss(x.detach() + step) - loss(x.detach() - step)).sum() / 2e-6
        assert float(found[place]) == pytest.approx(float(quotient), abs=1e-8)


def test_weights_carry_no_gradient() -> None:
    advantages_N = torch.tensor([0.5], requires_grad=True)
    assert not advantage_weights(advantages_N, 0.1, 20.0).requires_grad


def _expectile(values: list[float], share: float) -> float:
    """Of equally frequent numbers, by bisection of its definition."""
    low, high = min(values), max(values)
    for _ in range(100):
        middle = (low + high) / 2
        pull = sum((share if x > middle else 1 - share) * (x - middle) for x in values)
        low, high = (middle, high) if pull > 0 else (low, middle)
    return low


@pytest.mark.parametrize("share", [0.5, 0.7, 0.95])
def test_a_table_learns_the_values_of_a_stitched_path(share: float) -> None:
    """Two states; the data goes 0 -> 1 -> nothing, 0 -> out for 0.3, and, begun in 1, out for 1.

    By hand: Q(1, .) is 0 and 1, V(1) their expectile; Q(0, on) = 0.9 V(1), Q(0, out) = 0.3, V(0) their expectile.
    """
    gamma = 0.9
    v1 = _expectile([0.0, 1.0], share)
    expected = [_expectile([gamma * v1, 0.3], share), v1, gamma * v1, 0.3, 0.0, 1.0]

    #                 state, action, reward, next state (2: over), in the order of `expected`'s Q
    steps = [(0, 0, 0.0, 1), (0, 1, 0.3, 2), (1, 0, 0.0, 2), (1, 1, 1.0, 2)]
    state, action, reward, after = (torch.tensor(column) for column in zip(*steps, strict=True))
    q = torch.zeros(2, 2, requires_grad=True)
    v = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([q, v], lr=0.25)
    for _ in range(3000):
        optimizer.zero_grad()
        with torch.no_grad():
            targets = reward + gamma * torch.cat([v, torch.zeros(1)])[after]
        loss = td_loss(q[state, action], targets) + expectile_loss(
            q[state, action].detach() - v[state], share
        )
        loss.sum().backward()
        optimizer.step()
    found = [*v.tolist(), *q.flatten().tolist()]
    assert found == pytest.approx(expected, abs=1e-4)
    assert (found[2] > found[3]) == (gamma * v1 > 0.3)
