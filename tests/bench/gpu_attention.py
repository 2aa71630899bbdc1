"""Attention of packed rows on one GPU: what the kernels give beside a dense softmax, and what they take.

    python -m tests.bench.gpu_attention [--tiny]

Two layouts of the same sequences: `tree`, where 16 answers share their prompt, and `apart`, end to end (torch's
variable-length kernel in half precision). The dense softmax is computed in float64 for each sequence alone. Errors are
the largest difference of outputs and gradients over the largest value, at a length that a dense softmax holds; rates
are forward and backward at the full length, in tokens of all sequences. `--tiny` is a rehearsal on a CPU. Prints JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.data.prefix_tree import PrefixTree
from learner.model.attention import packed_attention
from learner.model.attention_blocks import RowAttention

HEADS, SHARED_HEADS, WIDTH = 16, 8, 128
SIBLINGS, ROUNDS = 16, 5


def layouts(prompt: int, answer: int) -> dict[str, PrefixTree]:
    """Answers that share a prompt, as a tree and end to end."""
    shared = np.zeros(prompt, np.int32)
    texts = [np.append(shared, np.full(answer, 1 + number, np.int32)) for number in range(SIBLINGS)]
    return {
        "tree": PrefixTree.of(texts, [()] * SIBLINGS),
        "apart": PrefixTree.apart([len(text) for text in texts]),
    }


def inputs(tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Query [1, H, T, D], key and value [1, K, T, D], with gradients."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, tokens, WIDTH, generator=generator).to(device, dtype).requires_grad_()
        for heads in (HEADS, SHARED_HEADS, SHARED_HEADS)
    ]


def dense(tree: PrefixTree, given: Sequence[Tensor], of_out: Tensor) -> list[Tensor]:
    """Gradients of the inputs where each sequence attends along itself; float64."""
    query, key, value = (x.detach().double().requires_grad_() for x in given)
    total = torch.zeros((), dtype=torch.float64, device=query.device)
    counted = torch.zeros(tree.tokens, dtype=torch.bool)
    for path in tree.paths_B:
        place = torch.from_numpy(path).to(query.device)
        q, k, v = (x[0].index_select(1, place) for x in (query, key, value))
        k, v = (x.repeat_interleave(HEADS // SHARED_HEADS, 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) / WIDTH**0.5
        ahead = torch.ones(len(path), len(path), dtype=torch.bool, device=q.device).triu(1)
        out = (scores.masked_fill(ahead, float("-inf")).softmax(-1) @ v).transpose(0, 1)
        fresh = ~counted[path]  # a shared token is one token of the row
        counted[path] = True
        mine = fresh.to(q.device)
        total = total + (out[mine] * of_out[0].index_select(0, place)[mine].double()).sum()
    return list(torch.autograd.grad(total, (query, key, value)))


def error(tree: PrefixTree, dtype: torch.dtype, device: str) -> float:
    """Largest difference of the gradients from the dense ones, over the largest of these."""
    given = inputs(tree.tokens, dtype, device)
    out, _ = packed_attention(torch.nn.Module(), *given, None, row_attention=RowAttention(tree))
    of_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    mine = torch.autograd.grad(out, given, of_out)
    wanted = dense(tree, given, of_out)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(mine, wanted, strict=True))


def rate(tree: PrefixTree, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Tokens of all sequences a second, forward and backward, and the most memory held, GB."""
    given = inputs(tree.tokens, dtype, device)
    row = RowAttention(tree)

    def once() -> float:
        began = time.perf_counter()
        out, _ = packed_attention(torch.nn.Module(), *given, None, row_attention=row)
        torch.autograd.grad(out, given, torch.ones_like(out))
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(once() for _ in range(ROUNDS))
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return tree.effective_tokens / seconds, peak


def main(tiny: bool) -> dict[str, Any]:
    """The figures of both layouts."""
    device = "cpu" if tiny else "cuda"
    small, full = (layouts(70, 20), layouts(70, 20)) if tiny else (layouts(512, 64), layouts(4096, 512))
    found: dict[str, Any] = {}
    for name in small:
        found[f"{name}_error_float32"] = error(small[name], torch.float32, device)
        found[f"{name}_error_bfloat16"] = error(small[name], torch.bfloat16, device)
        tokens, peak = rate(full[name], torch.bfloat16, device)
        found |= {f"{name}_tokens_per_s": round(tokens), f"{name}_peak_gb": round(peak, 3)}
    return found


if __name__ == "__main__":
    print(json.dumps(main("--tiny" in sys.argv[1:])))
