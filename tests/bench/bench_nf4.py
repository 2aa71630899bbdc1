"""What a base in NF4 costs a real model: bits a weight, and logprobs of a text; prints JSON.

    python -m tests.bench nf4

The text is the beginning of this repository's pages, in pieces of 512 tokens. Needs `make llm`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from learner.model.policy import Policy
from learner.settings import ModelSettings
from tests.smollm2 import FOLDER

PAGES = Path(__file__).parents[2] / "docs"
LENGTH, PIECES = 512, 4


def policy(dtype: str, quantized: bool) -> Policy:
    """With a new adapter, which changes nothing."""
    lora = {"rank": 8, "alpha": 16} | ({"quantize_base": "nf4"} if quantized else {})
    settings = {"path": str(FOLDER), "dtype": dtype, "lora": lora}
    return Policy(ModelSettings.model_validate(settings), examined=True)


def texts() -> torch.Tensor:
    """Token ids [PIECES, LENGTH]."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))
    ids = AutoTokenizer.from_pretrained(FOLDER)(text[: 16 * LENGTH * PIECES])["input_ids"]
    return torch.tensor(ids[: LENGTH * PIECES]).view(PIECES, LENGTH)


def logprobs(of: Policy) -> np.ndarray:
    """Of every token of the texts after their first ones."""
    return np.concatenate([of.score_ids(piece.tolist()) for piece in texts()])


def main() -> None:
    plain, quantized = policy("float32", False), policy("float32", True)
    one, other = logprobs(plain), logprobs(quantized)
    stored = [p for p in quantized.model.parameters() if p.dtype == torch.uint8]
    matrices = [p for n, p in plain.model.named_parameters() if n.endswith("base_layer.weight")]
    found = {
        "bits a weight": 8 * sum(p.nbytes for p in stored) / sum(p.numel() for p in matrices),
        "perplexity": float(np.exp(-one.mean())),
        "perplexity in NF4": float(np.exp(-other.mean())),
        "mean |dlogprob|, nats": float(np.abs(one - other).mean()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
