"""What moments in 8 bits and products in float8 change of a real model that learns a text; prints JSON.

    python -m tests.bench fewer_bits

SmolLM2 learns the pages of this repository, a few pieces an optimizer step, four times from the same start: float32 as
it is, with moments in 8 bits, in bfloat16, and with products in float8. Needs `make llm`.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer

from learner.algorithm.schedule import OptimSettings
from learner.data.batch import NOT_SAMPLED, MicroBatch, TokenSequence, pack
from learner.model.policy import Policy
from learner.settings import ModelSettings
from learner.training.optim import Optimizer
from tests.bench.bench_nf4 import PAGES
from tests.smollm2 import FOLDER

LENGTH, PIECES, STEPS, HELD_OUT = 128, 2, 4, 8
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of the model, of the optimizer
    "float32": ({}, {}),
    "8bit moments": ({}, {"moments": "8bit"}),
    "bfloat16": ({"dtype": "bfloat16"}, {}),
    "float8": ({"dtype": "bfloat16", "float8": True}, {}),
}


def rows() -> list[MicroBatch]:
    """Packed rows of pieces of the pages, of which every token but the first is learned; the last row is held out."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))
    count = STEPS * PIECES + HELD_OUT
    ids = np.array(AutoTokenizer.from_pretrained(FOLDER)(text)["input_ids"], dtype=np.int32)
    pieces = np.random.default_rng(0).permutation(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH))[
        :count
    ]
    sequences = []
    for piece_T in pieces:
        sampled_T = np.arange(LENGTH) > 0
        nothing_T = np.zeros(LENGTH, dtype=np.float32)
        versions_T = np.where(sampled_T, 0, NOT_SAMPLED).astype(np.int32)
        sequences.append(TokenSequence(piece_T, sampled_T, nothing_T, nothing_T, versions_T))
    sizes = [PIECES] * STEPS + [HELD_OUT]
    ends = np.cumsum(sizes)
    return [
        pack(sequences[end - size : end], size * LENGTH, LENGTH).micro_batches[0]
        for size, end in zip(sizes, ends, strict=True)
    ]


def learned(model: dict[str, Any], optim: dict[str, Any]) -> tuple[dict[str, float], Tensor]:
    """What a case tells, and its weights in the end."""
    policy = Policy(ModelSettings.model_validate({"path": str(FOLDER), **model}), examined=True)
    optimizer = Optimizer(policy.parameters(), OptimSettings(learning_rate=2e-5, **optim))
    *steps, held_out = rows()
    loss = seconds = 0.0
    for row in steps:
        optimizer.zero_grad()
        last = -policy.score(row, 1.0)[0].mean()
        last.backward()
        loss += float(last.detach()) / len(steps)
        began = time.perf_counter()
        optimizer.step()
        seconds = time.perf_counter() - began
    with torch.no_grad():
        after = -float(policy.score(held_out, 1.0)[0].mean())
    numbers = sum(parameter.numel() for parameter in policy.parameters())
    told = {
        "training loss": loss,
        "held-out loss": after,
        "bytes of moments": sum(each.nbytes for each in optimizer.held()),
        "the same a parameter": sum(each.nbytes for each in optimizer.held()) / numbers,
        "seconds of an update": seconds,
    }
    return told, weights(policy)


def weights(policy: Policy) -> Tensor:
    """All of them, one behind the other."""
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def main() -> None:
    """Each case, and how it moved the weights in relation to the first."""
    start = weights(Policy(ModelSettings(path=str(FOLDER)), examined=True))
    found: dict[str, float] = {}
    first = None
    for name, (model, optim) in CASES.items():
        figures, after = learned(model, optim)
        moved = after.sub_(start)
        first = moved if first is None else first
        cosine = float(cosine_similarity(moved.double(), first.double(), dim=0))
        figures["cosine with the first one's way"] = cosine
        found |= {f"{name}: {figure}": value for figure, value in figures.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
