from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learner.model.logprobs import token_logprobs

T, D, V = 7, 5, 23


def _inputs(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_TD, weight_VD, bias_V = (
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for shape in ((T, D), (V, D), (V,))
    )
    return hidden_TD, weight_VD, bias_V, torch.randint(V, (T,), generator=generator)


def _dense(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits_TV = torch.nn.functional.linear(hidden_TD, weight_VD, bias_V) / temperature
    logprobs_TV = logits_TV.log_softmax(-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return logprobs_TV.gather(1, targets_T[:, None])[:, 0], entropy_T


@pytest.mark.parametrize("chunk", [1, 4, 23, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_a_dense_log_softmax(chunk: int, with_bias: bool) -> None:
    hidden_TD, weight_VD, bias_V, targets_T = _inputs(torch.float32, scale=2.0)
    inputs = [hidden_TD, weight_VD, *([bias_V] if with_bias else [])]
    bias = bias_V if with_bias else None
    got = token_logprobs(hidden_TD, weight_VD, bias, targets_T, 0.7, chunk)
    want = _dense(hidden_TD, weight_VD, bias, targets_T, 0.7)
    mix_T = torch.linspace(-1, 1, T)
    got_grads = torch.autograd.grad((got[0] * mix_T + got[1] * mix_T.flip(0)).sum(), inputs)
    want_grads = torch.autograd.grad((want[0] * mix_T + want[1] * mix_T.flip(0)).sum(), inputs)
    for mine, dense in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        torch.testing.assert_close(mine, dense, atol=1e-5, rtol=1e-5)


def test_gradcheck_in_float64() -> None:
    hidden_TD, weight_VD, bias_V, targets_T = _inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprobs(h, w, b, targets_T, 1.3, 6), (hidden_TD, weight_VD, bias_V)
    )


def test_large_logits_stay_finite() -> None:
    hidden_TD, weight_VD, bias_V, targets_T = _inputs(torch.float32, scale=100.0)
    logprobs_T, entropy_T = token_logprobs(hidden_TD, weight_VD, bias_V, targets_T, 1.0, 4)
    (logprobs_T.sum() + entropy_T.sum()).backward()
    assert torch.isfinite(logprobs_T).all()
    assert torch.isfinite(entropy_T).all()
    assert hidden_TD.grad is not None
    assert torch.isfinite(hidden_TD.grad).all()


def test_bfloat16_hidden_states_are_accumulated_in_float32() -> None:
    hidden_TD, weight_VD, _, targets_T = _inputs(torch.bfloat16)
    logprobs_T, entropy_T = token_logprobs(hidden_TD, weight_VD, None, targets_T, 1.0, 6)
    want = _dense(hidden_TD.float(), weight_VD.float(), None, targets_T, 1.0)
    assert logprobs_T.dtype == entropy_T.dtype == torch.float32
    torch.testing.assert_close(logprobs_T, want[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy_T, want[1], atol=1e-5, rtol=1e-5)
    logprobs_T.sum().backward()
    assert hidden_TD.grad is not None
    assert hidden_TD.grad.dtype == torch.bfloat16


def test_no_block_is_wider_than_a_chunk() -> None:
    # Every tensor autograd keeps is an input, or one number a token.
    hidden_TD, weight_VD, bias_V, targets_T = _inputs(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        token_logprobs(hidden_TD, weight_VD, bias_V, targets_T, 1.0, 4)
    assert {tuple(t.shape) for t in kept} == {(T, D), (V, D), (V,), (T,)}
