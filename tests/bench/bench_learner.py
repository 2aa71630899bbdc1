"""Learner throughput: train_step against a bare torch loop over the same packed rows; prints JSON.

The bare loop is what one would write by hand: plain transformers forward with packed attention, logits of the
scored tokens, log_softmax, a clipped surrogate, AdamW. Both run on one thread, in turns, on equal episodes.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from learner.algorithm.algorithm import AlgorithmSettings
from learner.algorithm.schedule import OptimSettings
from learner.data.batch import NOT_SAMPLED, Batch, TokenSequence, pack
from learner.model.attention import register
from learner.model.attention_blocks import RowAttention
from learner.model.policy import Policy
from learner.settings import ModelSettings
from learner.training.optim import Optimizer
from learner.training.step import PolicyObjective, train_step
from tests.bench.player import untaught_model

SEQUENCES, ROUNDS, CONTEXT = 128, 7, 256


def _sequences(vocab_size: int) -> list[TokenSequence]:
    """Episodes of 60 to 200 tokens, about an eighth of them sampled."""
    rng = np.random.default_rng(0)
    sequences = []
    for length in rng.integers(60, 201, SEQUENCES):
        sampled_T = rng.random(length) < 0.125
        sampled_T[0], sampled_T[-1] = False, True
        sequences.append(
            TokenSequence(
                token_ids_T=rng.integers(0, vocab_size, length).astype(np.int32),
                sampled_T=sampled_T,
                behavior_logprobs_T=np.where(sampled_T, -4.6, 0.0).astype(np.float32),
                advantages_T=np.where(sampled_T, rng.normal(), 0.0).astype(np.float32),
                versions_T=np.where(sampled_T, 0, NOT_SAMPLED).astype(np.int32),
            )
        )
    return sequences


def _bare_loop(folder: Path, batch: Batch) -> Callable[[], None]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=register())
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        adamw.zero_grad()
        for row in batch.micro_batches:
            logits_NV = model(
                input_ids=row.input_ids_T[None],
                position_ids=row.position_ids_T[None],
                use_cache=False,
                row_attention=RowAttention(row.tree),
                logits_to_keep=row.score_index_M,  # random sequences share nothing: pairs are tokens
            ).logits[0]
            logprobs_N = logits_NV.log_softmax(-1).gather(1, row.targets_M[:, None])[:, 0]
            ratio_N = torch.exp(logprobs_N - row.behavior_logprobs_N)
            clipped_N = ratio_N.clamp(0.8, 1.28)
            loss_N = -torch.minimum(ratio_N * row.advantages_N, clipped_N * row.advantages_N)
            (loss_N.sum() / batch.sampled_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()

    return step


def _ours(folder: Path, batch: Batch) -> Callable[[], None]:
    policy = Policy(ModelSettings(path=str(folder)))
    optimizer = Optimizer(policy.parameters(), OptimSettings(learning_rate=1e-4))
    objective = PolicyObjective(AlgorithmSettings())

    def step() -> None:
        train_step(policy, optimizer, batch, objective, 1.0)

    return step


def _seconds(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main() -> dict[str, float]:
    """Median tokens per second of both, on one thread, and their ratio (target: at least 0.90)."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sequences = _sequences(untaught_model(folder, CONTEXT))
        weight = 1 / sum(sequence.num_sampled for sequence in sequences)
        batch = pack([replace(sequence, weight=weight) for sequence in sequences], 4096, CONTEXT)
        steps = {"learner": _ours(folder, batch), "bare": _bare_loop(folder, batch)}
        for step in steps.values():
            step()
        timings: dict[str, list[float]] = {who: [] for who in steps}
        for _ in range(ROUNDS):
            for who, step in steps.items():
                timings[who].append(_seconds(step))
    tokens = sum(len(row.input_ids_T) for row in batch.micro_batches)
    ratios = [bare / own for bare, own in zip(timings["bare"], timings["learner"], strict=True)]
    return {
        "learner_tokens_per_s": round(tokens / statistics.median(timings["learner"])),
        "bare_tokens_per_s": round(tokens / statistics.median(timings["bare"])),
        "ratio": round(statistics.median(ratios), 3),
    }


if __name__ == "__main__":
    print(json.dumps(main()))
