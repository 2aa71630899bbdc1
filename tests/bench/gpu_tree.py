"""A learner step on one GPU with and without shared prefixes: 16 answers of 512 tokens after a prompt of 4,096.

    python -m tests.bench.gpu_tree [--tiny]

The model is that of `gpu_learner`, 1.7 billion parameters; rows of 16,384 tokens, bfloat16 products, activations
computed again. Rates are of the tokens of all sequences. `--tiny` is a rehearsal on a CPU. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from learner.data.batch import TokenSequence, pack
from tests.bench.gpu_learner import LARGE, TINY, build, measured, ours, sequence

SIBLINGS, ROUNDS = 16, 3


def siblings(prompt: int, answer: int, vocabulary: int) -> list[TokenSequence]:
    """Random answers to one random prompt."""
    rng = np.random.default_rng(0)
    opening = rng.integers(0, vocabulary, prompt)
    texts = [np.append(opening, rng.integers(0, vocabulary, answer)) for _ in range(SIBLINGS)]
    return [replace(sequence(text, prompt, rng), weight=1 / (SIBLINGS * answer)) for text in texts]


def main(tiny: bool) -> dict[str, Any]:
    """The figures of both ways."""
    shape, row, device = (TINY, 1024, "cpu") if tiny else (LARGE, 16_384, "cuda")
    prompt, answer = (256, 32) if tiny else (4096, 512)
    made = siblings(prompt, answer, shape["vocab_size"])
    tokens = sum(s.num_inputs for s in made)
    found: dict[str, Any] = {"tokens": tokens}
    with tempfile.TemporaryDirectory() as name:
        build(Path(name), shape)
        for way, share in (("tree", True), ("apart", False)):
            batch = pack(made, row, shape["max_position_embeddings"], share=share)
            seconds, peak = measured(
                ours(Path(name), device, batch, gradient_checkpointing=True), ROUNDS, device
            )
            found |= {f"{way}_tokens_per_s": round(tokens / seconds), f"{way}_peak_gb": round(peak, 2)}
    return found | {"ratio": round(found["tree_tokens_per_s"] / found["apart_tokens_per_s"], 2)}


if __name__ == "__main__":
    print(json.dumps(main("--tiny" in sys.argv[1:])))
