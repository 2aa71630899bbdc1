"""Model FLOP utilisation of the learner on one GPU, beside a plain transformers loop over the same tokens.

    python -m tests.bench.gpu_learner [--model 8b] [--also compile float8] [--rounds 5] [--plain-rounds 3]
                                      [--peak-tflops 989] [--tiny]

A dense Qwen3-shaped model of about 1.7 billion parameters with random weights, or four layers of one of 8 billion; rows
of 16,384 packed tokens whose sequences have log-normal lengths, three quarters of them sampled; bfloat16 products over
float32 weights, activation checkpointing where it is needed. Needs torch and transformers, neither Ray nor vLLM.
`--also` measures the learner with such an option too, or says why it cannot. `--tiny` is a rehearsal on a CPU. Prints
JSON.

FLOPs that count, of either way: 6 x the parameters of the layers for each token, 6 x those of the head for each sampled
one, and 12 x layers x heads x head width for each pair of tokens of which one attends to the other; what is computed
again in the backward pass, or for nobody, counts nothing. 989 TFLOP/s is the dense bfloat16 peak of an H100 or H200.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from learner.algorithm.algorithm import AlgorithmSettings
from learner.algorithm.schedule import OptimSettings
from learner.data.batch import NOT_SAMPLED, Batch, TokenSequence, pack
from learner.model.loading import ModelError
from learner.model.policy import Policy
from learner.settings import ModelSettings
from learner.training.optim import Optimizer
from learner.training.step import PolicyObjective, train_step

LARGE = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 16_384,
    "tie_word_embeddings": True,
}
# Four of its 36 layers, and its whole head: all of it with moments in float32 does not fit one GPU.
LAYERS_OF_8B = LARGE | {
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
SHAPES = {"1.7b": LARGE, "8b": LAYERS_OF_8B}
TINY = LARGE | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}


def build(folder: Path, shape: dict[str, Any]) -> None:
    """Write a model of this shape with random weights."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        Qwen3ForCausalLM(Qwen3Config(**shape)).to(torch.bfloat16).save_pretrained(folder)


def sequence(ids_T: NDArray[np.int64], prompt: int, rng: np.random.Generator) -> TokenSequence:
    """Tokens of which all but the first `prompt` were sampled, with one random advantage."""
    sampled_T = np.arange(len(ids_T)) >= prompt
    return TokenSequence(
        token_ids_T=ids_T.astype(np.int32),
        sampled_T=sampled_T,
        behavior_logprobs_T=np.where(sampled_T, -12.0, 0.0).astype(np.float32),
        advantages_T=np.where(sampled_T, rng.normal(), 0.0).astype(np.float32),
        versions_T=np.where(sampled_T, 0, NOT_SAMPLED).astype(np.int32),
    )


def sequences(shape: dict[str, Any], row: int, rows: int) -> list[TokenSequence]:
    """Enough of them for so many rows: log-normal lengths about an eighth of a row, three quarters sampled."""
    rng = np.random.default_rng(0)
    made: list[TokenSequence] = []
    while sum(s.num_inputs for s in made) < rows * row:
        length = int(np.clip(rng.lognormal(np.log(row / 10), 0.6), 64, row))
        made.append(sequence(rng.integers(0, shape["vocab_size"], length), length // 4, rng))
    weight = 1 / sum(s.num_sampled for s in made)
    return [replace(s, weight=weight) for s in made]


def flops(shape: dict[str, Any], made: list[TokenSequence]) -> float:
    """Of one forward and backward pass over these sequences."""
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads = shape["num_attention_heads"] * shape["head_dim"]
    kv = shape["num_key_value_heads"] * shape["head_dim"]
    layer = width * (2 * heads + 2 * kv) + 3 * width * shape["intermediate_size"]
    tokens, sampled = sum(s.num_inputs for s in made), sum(s.num_sampled for s in made)
    attended = sum(s.num_inputs**2 / 2 for s in made)
    head = width * shape["vocab_size"] * sampled
    return 6.0 * (layers * layer * tokens + head) + 12.0 * layers * heads * attended


def ours(folder: Path, device: str, batch: Batch, **options: bool) -> Callable[[], None]:
    """A learner's step. ModelError for options that this machine has not got."""
    settings = {"path": str(folder), "device": device, "dtype": "bfloat16"} | options
    policy = Policy(ModelSettings.model_validate(settings))
    optimizer = Optimizer(policy.parameters(), OptimSettings(learning_rate=1e-6))
    objective = PolicyObjective(AlgorithmSettings())
    return lambda: float(train_step(policy, optimizer, batch, objective, 1.0)["loss"]) and None


def plain(folder: Path, device: str, made: list[TokenSequence], row: int) -> Callable[[], None]:
    """transformers as it comes: bfloat16 weights, sdpa, checkpointing, padded batches of about a row's tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").to(
        device
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device == "cuda")
    ordered = sorted(made, key=lambda s: len(s.token_ids_T))
    total = sum(s.num_sampled for s in made)

    def batches() -> list[list[TokenSequence]]:
        groups: list[list[TokenSequence]] = [[]]
        for sequence in ordered:
            if (len(groups[-1]) + 1) * len(sequence.token_ids_T) > row // 4 and groups[-1]:
                groups.append([])
            groups[-1].append(sequence)
        return groups

    def step() -> None:
        adamw.zero_grad()
        for some in batches():
            longest = max(len(s.token_ids_T) for s in some)

            def padded(arrays: list[Any], longest: int = longest) -> torch.Tensor:
                return torch.tensor(
                    np.stack([np.pad(a, (0, longest - len(a))) for a in arrays]), device=device
                )

            ids = padded([s.token_ids_T for s in some]).long()
            mask = padded([np.ones(len(s.token_ids_T), np.int64) for s in some])
            sampled = padded([s.sampled_T.astype(np.float32) for s in some])[:, 1:]
            advantages = padded([s.advantages_T for s in some])[:, 1:]
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            logprobs = (
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
                )
                .neg()
                .view_as(sampled)
            )
            ratio = (logprobs + 12.0).exp()
            surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
            (-(surrogate * sampled).sum() / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()

    return step


def measured(step: Callable[[], None], rounds: int, device: str) -> tuple[float, float]:
    """Median seconds of a step after one that is not counted, and the most memory held, GB."""
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return statistics.median(took), peak


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu_learner", description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), default="1.7b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain-rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="packed rows of a step")
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--no-checkpointing", action="store_true", help="keep every activation")
    parser.add_argument("--also", nargs="*", choices=("compile", "float8"), default=[])
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on the CPU")
    asked = parser.parse_args()
    shape, row, device = (TINY, 512, "cpu") if asked.tiny else (SHAPES[asked.model], 16_384, "cuda")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, shape)
        made = sequences(shape, row, asked.rows)
        batch = pack(made, row, shape["max_position_embeddings"])
        tokens = sum(s.num_inputs for s in made)
        found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
        own = partial(ours, folder, device, batch, gradient_checkpointing=not asked.no_checkpointing)
        ways: dict[str, tuple[Callable[[], Callable[[], None]], int]] = {
            "learner": (own, asked.rounds),
            "plain": (lambda: plain(folder, device, made, row), asked.plain_rounds),
            **{option: (partial(own, **{option: True}), asked.rounds) for option in asked.also},
        }
        for way, (made_ready, rounds) in ways.items():  # one after the other: each has the memory to itself
            try:
                seconds, peak = measured(made_ready(), rounds, device)
            except ModelError as error:
                found[f"{way}_left_out"] = str(error)
                continue
            found |= {
                f"{way}_tokens_per_s": round(tokens / seconds),
                f"{way}_mfu": round(flops(shape, made) / seconds / asked.peak_tflops / 1e12, 4),
                f"{way}_peak_gb": round(peak, 2),
            }
    return found | {"torch": torch.__version__, "rows": len(batch.micro_batches), "tokens": tokens}


if __name__ == "__main__":
    print(json.dumps(main()))
