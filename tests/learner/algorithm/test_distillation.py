"""The teacher's signal is the reverse divergence: on known numbers, and its gradient over all tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from learner.algorithm.algorithm import AlgorithmSettings
from learner.algorithm.distillation import signal
from learner.algorithm.losses import policy_gradient

STUDENT = np.array([0.5, 0.25, 0.125, 0.125])
TEACHER = np.array([0.125, 0.5, 0.25, 0.125])


def reverse_kl(logits: np.ndarray) -> float:
    logprobs = logits - np.log(np.exp(logits).sum())
    return float((np.exp(logprobs) * (logprobs - np.log(TEACHER))).sum())


def test_the_signal_is_what_the_teacher_says_less_what_the_policy_said() -> None:
    found = signal(np.log(STUDENT).astype(np.float32), np.log(TEACHER).astype(np.float32))
    np.testing.assert_allclose(found, np.log(2) * np.array([-2.0, 1.0, 1.0, 0.0]), atol=1e-6)
    # By hand: 1/2 of 2 log 2 lost, 3/8 of log 2 gained.
    assert -(STUDENT * found).sum() == pytest.approx(np.log(2) * (1 - 3 / 8), abs=1e-6)
    impossible = signal(np.array([-1.0], np.float32), np.array([-1e4], np.float32))
    assert impossible.tolist() == [-20.0]


def test_over_all_tokens_its_policy_gradient_is_that_of_the_divergence() -> None:
    logits_V = torch.tensor(np.log(STUDENT) + 0.7, requires_grad=True)
    logprobs_V = logits_V.log_softmax(-1)
    advantages_V = torch.from_numpy(
        signal(logprobs_V.detach().numpy().astype(np.float32), np.log(TEACHER).astype(np.float32))
    )
    loss_V, _ = policy_gradient(logprobs_V, advantages_V.double())
    (loss_V * torch.from_numpy(STUDENT)).sum().backward()  # each token as often as the policy samples it
    step, slope = 1e-6, []
    for place in range(4):
        moved = [logits_V.detach().numpy() + sign * step * np.eye(4)[place] for sign in (1, -1)]
        slope.append((reverse_kl(moved[0]) - reverse_kl(moved[1])) / (2 * step))
    assert logits_V.grad is not None
    np.testing.assert_allclose(logits_V.grad.numpy(), slope, atol=1e-6)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"advantage": {"kind": "none"}}, "there is no teacher to learn from; add the section distill"),
        (
            {
                "advantage": {"kind": "none"},
                "distill": {"teacher": "x"},
                "overlong": {"tokens": 9, "margin": 3},
            },
            "reads no rewards, which overlong cannot change",
        ),
        ({"distill": {"teacher": "x", "coefficient": 0}}, "greater than 0"),
    ],
)
def test_what_would_have_no_effect_is_refused(section: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AlgorithmSettings.model_validate(section)
