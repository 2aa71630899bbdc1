"""Value heads compute what plain layers over the whole vocabulary do, block by block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learner.model.value_heads import ActionValues, StateValue
from learner.stages.settings import IlqlSettings

N, D, H, V = 7, 5, 6, 11


def heads(seed: int = 0) -> ActionValues:
    made = ActionValues(D, H, V, torch.Generator().manual_seed(seed)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    return made


def dense(made: ActionValues, hidden_ND: Tensor) -> Tensor:
    """Every action's value by both heads: [2, N, V]."""
    layers = ((made.features[0], made.last), (made.other_features[0], made.other_last))
    both = [
        torch.relu(hidden_ND @ first.weight.T + first.bias) @ last.weight.T + last.bias
        for first, last in layers
    ]
    return torch.stack(both)


@pytest.mark.parametrize("chunk", [3, 100])
def test_values_and_normalizers_are_those_over_the_whole_vocabulary(chunk: int) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden_ND = torch.randn(N, D, generator=generator, dtype=torch.float64, requires_grad=True)
    actions_N = torch.randint(V, (N,), generator=generator)
    pulls = torch.randn(2, 2, N, generator=generator, dtype=torch.float64)  # some gradient of every output
    made = heads()
    moved = [hidden_ND, *made.parameters()]
    found = made(hidden_ND, actions_N, chunk)
    q_2NV = dense(made, hidden_ND)
    index_2N1 = actions_N.expand(2, N)[..., None]
    expected = [each.gather(2, index_2N1)[..., 0] for each in (q_2NV, q_2NV.log_softmax(-1))]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    both = [
        sum((pull * each).sum() for pull, each in zip(pulls, of, strict=True)) for of in (found, expected)
    ]
    for one, other in zip(*(torch.autograd.grad(each, moved) for each in both), strict=True):
        torch.testing.assert_close(one, other)


def test_the_settings_count_the_parameters() -> None:
    values = ActionValues(D, H, V, torch.Generator()), StateValue(D, H, torch.Generator())
    counted = tuple(sum(parameter.numel() for parameter in each.parameters()) for each in values)
    assert IlqlSettings(head_width=H).head_parameters(D, V) == counted
    assert IlqlSettings().hidden_width(D) == 2 * D


def test_heads_begin_as_zeros_on_features_that_differ_and_that_the_generator_decides() -> None:
    made, same, another = (ActionValues(D, H, V, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert not dense(made, torch.ones(1, D)).any()
    assert not torch.equal(made.features[0].weight, made.other_features[0].weight)
    assert torch.equal(made.features[0].weight, same.features[0].weight)
    assert not torch.equal(made.features[0].weight, another.features[0].weight)
    assert not StateValue(D, H, torch.Generator())(torch.ones(2, D)).any()
