from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from learner.algorithm.losses import AnyLoss, clipped, cross_entropy
from learner.algorithm.regularizers import divergence
from learner.training.critic import value_loss
from tests import reference

LOW, HIGH = 0.2, 0.28
# (ratio pi/proximal, advantage, loss, d loss / d logprob, clipped): by hand
CASES = [
    (1.0, 1.0, -1.0, -1.0, 0),
    (1.2, 1.0, -1.2, -1.2, 0),  # inside the upper clip
    (1.5, 1.0, -1.28, 0.0, 1),  # above it, and good: stopped
    (1.5, -1.0, 1.5, 1.5, 0),  # above it, and bad: pushed back
    (0.5, 1.0, -0.5, -0.5, 0),  # below, and good: pulled up
    (0.5, -1.0, 0.8, 0.0, 1),  # below, and bad: stopped
    (1.5, 0.0, 0.0, 0.0, 0),
]
PPO: dict[str, Any] = {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.28}
DUAL = {**PPO, "dual_clip": 3.0}
GSPO = {**PPO, "kind": "gspo"}
CISPO: dict[str, Any] = {"kind": "cispo", "clip_low": 1.0, "clip_high": 0.28}
SAPO: dict[str, Any] = {"kind": "sapo", "positive": 1.0, "negative": 2.0}
TV: dict[str, Any] = {"kind": "dppo", "divergence": "tv", "threshold": 0.15}
KL: dict[str, Any] = {"kind": "dppo", "divergence": "kl", "threshold": 0.1}
# The proximal policy gave the token 1/4, this one ratio / 4. (section, ratio, advantage, loss, slope, clipped): by hand
QUARTER = [
    (DUAL, 2.0, -1.0, 2.0, 2.0, 0),
    (DUAL, 3.9, -2.0, 6.0, 0.0, 1),  # the second bound of a negative advantage
    (DUAL, 3.9, 1.0, -1.28, 0.0, 1),
    ({"kind": "reinforce"}, 2.0, 0.5, -0.5 * math.log(0.5), -0.5, None),
    (CISPO, 2.0, 1.0, -1.28 * math.log(0.5), -1.28, 1),  # the weight is cut, the gradient stays
    (CISPO, 0.5, -1.0, 0.5 * math.log(0.125), 0.5, 0),
    (SAPO, 1.0, 1.0, -2.0, -1.0, None),  # gate 1/2, and the slope of the plain policy gradient
    (SAPO, 1.0, -1.0, 1.0, 1.0, None),
    (SAPO, 2.0, 1.0, -2.924234, -1.572895, None),  # sigmoid(1) = 0.731059; 4 * 0.196612 * 2
    (TV, 1.5, 1.0, -1.5, -1.5, 0),  # 1/8 apart
    (TV, 2.0, 1.0, 0.0, 0.0, 1),  # 1/4 apart, and further
    (TV, 2.0, -1.0, 2.0, 2.0, 0),  # 1/4 apart, but on the way back
    (TV, 0.2, -1.0, 0.0, 0.0, 1),  # 1/5 apart, and further
    (KL, 2.0, 1.0, 0.0, 0.0, 1),  # 1/4 log(1/2) + 3/4 log(3/2) = 0.131
    (KL, 1.5, 1.0, -1.5, -1.5, 0),  # 1/4 log(2/3) + 3/4 log(6/5) = 0.035
    ({**TV, "ratio_cap": 2.0}, 3.0, -1.0, 2.0, 2.0, 0),  # on the way back, by a weight of at most 2
    ({**TV, "ratio_cap": 2.0}, 1.5, 1.0, -1.5, -1.5, 0),
    ({**TV, "ratio_cap": 2.0}, 3.0, 1.0, 0.0, 0.0, 1),
    ({"kind": "gspo", "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}, 3.9, -2.0, 6.0, 0.0, 1),
]
CAPPED = {**TV, "ratio_cap": 1.2}
SECTIONS = [
    *(PPO, DUAL, GSPO, {**GSPO, "dual_clip": 1.3}, CISPO, {**CISPO, "clip_low": 0.3}, SAPO, TV, KL, CAPPED),
    {"kind": "reinforce"},
]


def _name(section: object) -> str | None:
    return "-".join(map(str, section.values())) if isinstance(section, dict) else None


def _loss(section: dict[str, Any]) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    return TypeAdapter(AnyLoss).validate_python(section)


def _slopes(loss_N: Tensor, logprobs_N: Tensor) -> Tensor:
    return torch.autograd.grad(loss_N.sum(), logprobs_N)[0]


def _tokens(seed: int, count: int = 60) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprobs, proximal ones, advantages and sequences of random tokens; a fifth has no advantage."""
    rng = np.random.default_rng(seed)
    proximal_N = np.log(rng.uniform(0.05, 0.6, count))
    logprobs_N = np.minimum(proximal_N + rng.normal(0, 0.5, count), -0.02)
    advantages_N = rng.normal(0, 1.5, count) * (rng.random(count) > 0.2)
    sequence_N = torch.from_numpy(np.sort(rng.integers(0, 12, count)).astype(np.int64))
    floats = [torch.from_numpy(array) for array in (logprobs_N, proximal_N, advantages_N)]
    return floats[0].requires_grad_(), floats[1], floats[2], sequence_N


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope", "stopped"), CASES)
def test_the_clipped_loss_equals_the_hand_computed_table(
    ratio: float, advantage: float, loss: float, slope: float, stopped: int
) -> None:
    proximal_N = torch.tensor([-1.3], dtype=torch.float64)
    logprobs_N = (proximal_N + math.log(ratio)).requires_grad_()
    loss_N, stats = clipped(logprobs_N, proximal_N, torch.tensor([advantage]).double(), LOW, HIGH)
    assert loss_N.item() == pytest.approx(loss, abs=1e-12)
    assert _slopes(loss_N, logprobs_N).item() == pytest.approx(slope, abs=1e-12)
    assert stats["clip_fraction"].item() == stopped


@pytest.mark.parametrize(("section", "ratio", "advantage", "loss", "slope", "stopped"), QUARTER, ids=_name)
def test_every_loss_equals_its_hand_computed_rows(
    section: dict[str, Any], ratio: float, advantage: float, loss: float, slope: float, stopped: int | None
) -> None:
    proximal_N = torch.tensor([0.25], dtype=torch.float64).log()
    logprobs_N = (proximal_N + math.log(ratio)).requires_grad_()
    advantages_N = torch.tensor([advantage], dtype=torch.float64)
    loss_N, stats = _loss(section)(logprobs_N, proximal_N, advantages_N, torch.zeros(1, dtype=torch.int64))
    assert loss_N.item() == pytest.approx(loss, abs=1e-6)
    assert _slopes(loss_N, logprobs_N).item() == pytest.approx(slope, abs=1e-6)
    assert stats.keys() == (set() if stopped is None else {"clip_fraction"})
    assert stopped is None or stats["clip_fraction"].item() == stopped


def test_a_sequence_has_one_ratio_by_hand() -> None:
    # Ratios 2 and 1/2 cancel to 1; the next sequence, 1.5 and 1.5, stands above the clip and its good half is stopped.
    proximal_N = torch.full((4,), -2.0, dtype=torch.float64)
    logprobs_N = (proximal_N + torch.tensor([2.0, 0.5, 1.5, 1.5]).double().log()).requires_grad_()
    advantages_N = torch.tensor([1.0, -3.0, 1.0, -1.0], dtype=torch.float64)
    loss_N, stats = _loss(GSPO)(logprobs_N, proximal_N, advantages_N, torch.tensor([0, 0, 1, 1]))
    assert loss_N.tolist() == pytest.approx([-1.0, 3.0, -1.28, 1.5])
    assert _slopes(loss_N, logprobs_N).tolist() == pytest.approx([-1.0, 3.0, 0.0, 1.5])
    assert stats["clip_fraction"].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("section", SECTIONS, ids=_name)
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_slopes_are_those_of_the_papers_formulas(section: dict[str, Any], seed: int) -> None:
    logprobs_N, proximal_N, advantages_N, sequence_N = _tokens(seed)
    loss_N, stats = _loss(section)(logprobs_N, proximal_N, advantages_N, sequence_N)
    plain = [t.tolist() for t in (logprobs_N, proximal_N, advantages_N, sequence_N)]
    values, slopes = zip(*reference.loss(section, *plain), strict=True)
    np.testing.assert_allclose(loss_N.detach(), values, atol=1e-6)
    np.testing.assert_allclose(_slopes(loss_N, logprobs_N), slopes, atol=1e-6)
    if "clip_fraction" in stats and section["kind"] != "cispo":
        stopped = [slope == 0 and advantage != 0 for slope, advantage in zip(slopes, plain[2], strict=True)]
        assert stats["clip_fraction"].tolist() == stopped


@pytest.mark.parametrize("section", [PPO, DUAL, SAPO, TV, KL, {"kind": "reinforce"}], ids=_name)
def test_gradients_equal_finite_differences_between_the_kinks(section: dict[str, Any]) -> None:
    ratios = torch.tensor([0.15, 0.5, 0.9, 1.1, 1.5, 3.7], dtype=torch.float64).repeat(2)
    proximal_N = torch.full((12,), 0.25, dtype=torch.float64).log()
    advantages_N = torch.tensor([0.7, -1.3], dtype=torch.float64).repeat_interleave(6)
    logprobs_N = (proximal_N + ratios.log()).requires_grad_()
    sequence_N = torch.zeros(12, dtype=torch.int64)
    assert torch.autograd.gradcheck(
        lambda x: _loss(section)(x, proximal_N, advantages_N, sequence_N)[0], logprobs_N
    )


def test_where_a_sequence_shares_an_advantage_the_gradient_is_that_of_its_ratio() -> None:
    # GSPO's own objective moves every token's logprob through the mean: differences of the whole sum see that.
    logprobs_N, proximal_N, advantages_N, sequence_N = _tokens(7)
    shared_N = advantages_N[torch.searchsorted(sequence_N, sequence_N)]
    loss_N, _ = _loss(GSPO)(logprobs_N, proximal_N, shared_N, sequence_N)
    plain = [t.tolist() for t in (proximal_N, shared_N, sequence_N)]

    def objective(logprobs: np.ndarray) -> float:
        return sum(value for value, _ in reference.loss(GSPO, logprobs.tolist(), *plain))

    start = logprobs_N.detach().numpy()
    steps = 1e-6 * np.eye(len(start))
    slopes = [(objective(start + step) - objective(start - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(_slopes(loss_N, logprobs_N), slopes, atol=1e-6)


# (section, the largest slope at A = -1 whatever the ratio): -9999 is what an engine says of a token without a chance.
BOUNDED = [
    (DUAL, 3.0),
    ({**GSPO, "dual_clip": 3.0}, 3.0),
    (CISPO, 1.28),
    (SAPO, 1.0),
    ({**TV, "ratio_cap": 20.0}, 20.0),
    ({**KL, "ratio_cap": 20.0}, 20.0),
    ({"kind": "reinforce"}, 1.0),
]


@pytest.mark.parametrize(("section", "largest"), BOUNDED, ids=_name)
@pytest.mark.parametrize("log_ratio", [-9999.0, -9.5, 0.0, 1.0, 9.5, 9998.0])
def test_no_token_weighs_more_than_its_bound(
    section: dict[str, Any], largest: float, log_ratio: float
) -> None:
    logprob = min(-0.5, log_ratio - 0.5)
    logprobs_N = torch.tensor([logprob], dtype=torch.float64, requires_grad=True)
    proximal_N = torch.tensor([logprob - log_ratio], dtype=torch.float64)
    loss_N, _ = _loss(section)(
        logprobs_N, proximal_N, -torch.ones(1).double(), torch.zeros(1, dtype=torch.int64)
    )
    assert abs(_slopes(loss_N, logprobs_N).item()) <= largest + 1e-9


def test_the_threshold_of_a_trust_region_is_that_of_its_divergence() -> None:
    sections = [{"divergence": "tv"}, {"divergence": "kl"}, {"divergence": "kl", "threshold": 0.1}, {}]
    assert [_loss({"kind": "dppo", **section}).threshold for section in sections] == [0.15, 0.05, 0.1, 0.15]


# (log r, estimator, value, slope), r = pi_reference / pi: by hand. exp(1) = 2.71828; k3(2.5) = 8.6825; k3(3) = 16.09.
DIVERGENCES = [
    (1.0, "k3", 0.718282, -1.718282),
    (2.5, "k3", 8.682494, -11.182494),
    (3.0, "k3", 10.0, 0.0),
    (14.0, "k3", 10.0, 0.0),
    (-12.0, "k3", 10.0, 0.0),
    (1.0, "k3+", 0.718282, -1.0),
    (14.0, "k3+", 10.0, -14.0),
    (14.0, "k2", 98.0, -14.0),
]


@pytest.mark.parametrize(("log_ratio", "estimator", "value", "slope"), DIVERGENCES)
def test_one_token_of_a_divergence_is_bounded(
    log_ratio: float, estimator: Any, value: float, slope: float
) -> None:
    logprobs_N = torch.tensor([-15.0], dtype=torch.float64, requires_grad=True)
    kl_N = divergence(logprobs_N, torch.tensor([-15.0 + log_ratio], dtype=torch.float64), estimator)
    assert kl_N.item() == pytest.approx(value, abs=1e-6)
    assert _slopes(kl_N, logprobs_N).item() == pytest.approx(slope, abs=1e-6)


def test_without_a_cap_k3_is_the_formula() -> None:
    found_N = divergence(torch.tensor([-15.0]).double(), torch.tensor([-1.0]).double(), "k3", None)
    assert found_N.item() == pytest.approx(math.exp(14) - 1 - 14)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+"])
def test_divergences_are_those_of_the_formulas(estimator: str) -> None:
    logprobs_N, reference_N, _, _ = _tokens(5)
    divergence_N = divergence(logprobs_N, reference_N, estimator)
    pairs = zip(logprobs_N.tolist(), reference_N.tolist(), strict=True)
    values, slopes = zip(*(reference.kl(*pair, estimator) for pair in pairs), strict=True)
    np.testing.assert_allclose(divergence_N.detach(), values, atol=1e-12)
    np.testing.assert_allclose(_slopes(divergence_N, logprobs_N), slopes, atol=1e-12)
    if estimator != "k3+":  # whose gradient is another formula's
        assert torch.autograd.gradcheck(lambda x: divergence(x, reference_N, estimator), logprobs_N)


def test_kl_k1_and_k3_average_to_the_true_divergence() -> None:
    policy_V = torch.tensor([0.5, 0.3, 0.2]).double().log()
    reference_V = torch.tensor([0.2, 0.3, 0.5]).double().log()
    expected = (policy_V.exp() * (policy_V - reference_V)).sum()
    for estimator in ("k1", "k3"):
        estimated_V = divergence(policy_V, reference_V, estimator)
        assert (policy_V.exp() * estimated_V).sum().item() == pytest.approx(expected.item())
    assert (estimated_V >= 0).all()


def test_in_a_loss_k1_pulls_nowhere_on_average_and_k2_as_the_true_divergence_does() -> None:
    # And k3 as the divergence the other way round, KL(reference || pi).
    logits_V = torch.tensor([0.5, 0.3, 0.2]).double().log().requires_grad_()
    reference_V = torch.tensor([0.2, 0.3, 0.5]).double().log()
    policy_V = logits_V.log_softmax(-1)
    chance_V = policy_V.detach().exp()  # of being sampled: what is averaged over has no gradient
    true = torch.autograd.grad(
        (policy_V.exp() * (policy_V - reference_V)).sum(), logits_V, retain_graph=True
    )[0]
    slopes = {
        estimator: torch.autograd.grad(
            (chance_V * divergence(policy_V, reference_V, estimator)).sum(), logits_V, retain_graph=True
        )[0]
        for estimator in ("k1", "k2", "k3", "k3+")
    }
    other_way = torch.autograd.grad((reference_V.exp() * (reference_V - policy_V)).sum(), logits_V)[0]
    np.testing.assert_allclose(slopes["k1"], 0.0, atol=1e-12)
    np.testing.assert_allclose(slopes["k2"], true, atol=1e-12)
    np.testing.assert_allclose(slopes["k3+"], true, atol=1e-12)
    np.testing.assert_allclose(slopes["k3"], other_way, atol=1e-12)
    assert float(slopes["k3"] @ true) > 0.1 * float(true @ true)


# (value, old, target, clip, loss, slope): by hand
VALUES = [
    (1.0, 0.0, 3.0, None, 2.0, -2.0),
    (0.1, 0.0, 3.0, 0.2, 4.205, -2.9),  # within the clip
    (1.0, 0.0, 3.0, 0.2, 3.92, 0.0),  # moved 1 towards the target, only 0.2 count: stopped
    (-1.0, 0.0, 3.0, 0.2, 8.0, -4.0),  # moved away from it: pulled back
]


@pytest.mark.parametrize(("value", "old", "target", "clip", "loss", "slope"), VALUES)
def test_the_value_loss_equals_the_hand_computed_table(
    value: float, old: float, target: float, clip: float | None, loss: float, slope: float
) -> None:
    values_N = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    loss_N = value_loss(values_N, torch.tensor([old]), torch.tensor([target]), clip)
    assert loss_N.item() == pytest.approx(loss, rel=1e-6)
    assert _slopes(loss_N, values_N).item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_value_losses_are_those_of_the_formula(clip: float | None) -> None:
    values_N, old_N, targets_N, _ = _tokens(11)
    loss_N = value_loss(values_N, old_N, targets_N, clip)
    triples = zip(values_N.tolist(), old_N.tolist(), targets_N.tolist(), strict=True)
    losses, slopes = zip(*(reference.value_loss(*triple, clip) for triple in triples), strict=True)
    np.testing.assert_allclose(loss_N.detach(), losses, atol=1e-12)
    np.testing.assert_allclose(_slopes(loss_N, values_N), slopes, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old_N, targets_N, clip), values_N)


def test_cross_entropy_is_the_negative_logprob() -> None:
    assert cross_entropy(torch.tensor([-0.25, -2.0])).tolist() == [0.25, 2.0]
