"""Memory of logprobs and entropies over a large vocabulary, forward and backward; prints JSON.

Each size runs in a process of its own, which tells how much more memory it held at most than hidden states, head and
their gradients need. The learner's way is compared with the dense one, which holds all logits.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import torch

from learner.model.logprobs import token_logprobs

VOCABULARY, WIDTH, BLOCK = 152_064, 64, 2**23
SIZES = (
    (256, VOCABULARY // 4),
    (256, VOCABULARY),
    (2048, VOCABULARY),
)  # tokens, vocabulary; the block is full in each
DENSE = (256, VOCABULARY)


def dense(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> list[torch.Tensor]:
    """As one would write it."""
    logprobs_TV = (hidden_TD @ weight_VD.T).log_softmax(-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return [logprobs_TV.gather(1, targets_T[:, None])[:, 0], entropy_T]


def ours(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor) -> list[torch.Tensor]:
    return list(token_logprobs(hidden_TD, weight_VD, None, targets_T, 1.0, max(BLOCK // len(hidden_TD), 8)))


def inputs(tokens: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, WIDTH, generator=generator).requires_grad_()
    weight_VD = (0.1 * torch.randn(vocabulary, WIDTH, generator=generator)).requires_grad_()
    return hidden_TD, weight_VD, torch.randint(vocabulary, (tokens,), generator=generator)


def peak_mb(way: str, tokens: int, vocabulary: int) -> float:
    """In this process: memory at the peak, beyond inputs and gradients, MB."""
    torch.set_num_threads(1)
    warm = inputs(8, 64)
    sum(out.sum() for out in (ours if way == "ours" else dense)(*warm)).backward()  # type: ignore[union-attr]
    hidden_TD, weight_VD, targets_T = inputs(tokens, vocabulary)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outs = (ours if way == "ours" else dense)(hidden_TD, weight_VD, targets_T)
    (outs[0].sum() + outs[1].sum()).backward()
    gradients = hidden_TD.nbytes + weight_VD.nbytes
    return ((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - gradients) / 1e6


def _measured(way: str, tokens: int, vocabulary: int) -> float:
    command = [sys.executable, "-m", "tests.bench.bench_logprobs", way, str(tokens), str(vocabulary)]
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout.split()[
            -1
        ]
    )


def largest_difference() -> float:
    """Between both ways, of values and gradients."""
    results = []
    for way in (ours, dense):
        leaves = inputs(64, VOCABULARY // 8)
        outs = way(*leaves)
        (outs[0].sum() + outs[1].sum()).backward()
        results.append([*outs, leaves[0].grad, leaves[1].grad])
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True) if a is not None)


def main() -> dict[str, float]:
    """`growth`: peak of the largest size over that of the smallest, with a 32nd of its logits (target: at most 1.5)."""
    found = {
        f"mb_{tokens}x{vocabulary}": _measured("ours", tokens, vocabulary) for tokens, vocabulary in SIZES
    }
    smallest, *_, largest = found.values()
    return {
        "growth": round(largest / smallest, 3),
        "largest_difference": largest_difference(),
        **{name: round(value, 1) for name, value in found.items()},
        "dense_mb_{}x{}".format(*DENSE): round(_measured("dense", *DENSE), 1),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak_mb(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    else:
        print(json.dumps(main()))
