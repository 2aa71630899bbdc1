"""What a base in NF4 costs an adapter of a real model: bits, logprobs of a text, and time; prints JSON.

    python -m tests.bench nf4

The text is this repository's pages, in pieces of 512 tokens; a step is forward and backward pass of one such row, with
and without NF4 in turns. Needs `make llm`.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from learner.data.batch import longest_row
from learner.model.policy import Policy
from learner.settings import ModelSettings
from tests.smollm2 import FOLDER

PAGES = Path(__file__).parents[2] / "docs"
LENGTH, PIECES, ROUNDS = 512, 16, 5


def policy(dtype: str, quantized: bool) -> Policy:
    lora = {"rank": 8, "alpha": 16} | ({"quantize_base": "nf4"} if quantized else {})
    return Policy(
        ModelSettings.model_validate({"path": str(FOLDER), "dtype": dtype, "lora": lora}), examined=True
    )


def texts() -> torch.Tensor:
    """Token ids [PIECES, LENGTH]."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))
    ids = AutoTokenizer.from_pretrained(FOLDER)(text[: 16 * LENGTH * PIECES])["input_ids"]
    return torch.tensor(ids[: LENGTH * PIECES]).view(PIECES, LENGTH)


def logprobs(of: Policy) -> np.ndarray:
    """Of every token of the texts after their first ones."""
    return np.concatenate([of.score_ids(piece.tolist()) for piece in texts()])


def seconds(of: Policy) -> float:
    """Forward and backward pass of a row of one sequence."""
    began = time.perf_counter()
    of.score(longest_row(LENGTH, LENGTH), 1.0)[0].sum().backward()
    return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(2)
    found: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        plain, quantized = policy(dtype, False), policy(dtype, True)
        one, other = logprobs(plain), logprobs(quantized)
        stored = [p for p in quantized.model.parameters() if p.dtype == torch.uint8]
        matrices = [p for n, p in plain.model.named_parameters() if n.endswith("base_layer.weight")]
        times = [(seconds(quantized), seconds(plain)) for _ in range(1 + ROUNDS)][1:]
        found |= {
            f"{dtype}: bits a weight": 8 * sum(p.nbytes for p in stored) / sum(p.numel() for p in matrices),
            f"{dtype}: perplexity": float(np.exp(-one.mean())),
            f"{dtype}: perplexity in NF4": float(np.exp(-other.mean())),
            f"{dtype}: mean |dlogprob|, nats": float(np.abs(one - other).mean()),
            f"{dtype}: time of a row in NF4, relative": statistics.median(a / b for a, b in times),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
