"""Versions of a learner as deltas, each held to the whole version: how many bytes they have, whether they are exact.

The learner makes steps of GRPO: five on each group of answers that the model samples, with random advantages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from learner.algorithm.algorithm import AlgorithmSettings
from learner.algorithm.schedule import OptimSettings
from learner.data.batch import NOT_SAMPLED, TokenSequence, pack
from learner.model.policy import Policy
from learner.training.optim import Optimizer
from learner.training.publish import Snapshot, Staging, take_snapshot
from learner.training.step import PolicyObjective, train_step
from rollout.wire.held_version import HeldVersion
from rollout.wire.weights import Delta, WeightUpdate, inline

_ANSWERS, _TOKENS, _SAMPLED_EVERY = 8, 4, 5


@dataclass(frozen=True)
class Sent:
    """One version, as a worker on another node receives it."""

    version: int
    whole_bytes: int
    delta_bytes: int  # those of the whole where there is no delta
    exact: bool  # the bytes that the worker holds are those that torch casts, and pass their checksums
    publish_s: float  # cast, compare, hash and probe, by the learner
    receive_s: float  # decompress, apply and verify, by the worker


def follow(policy: Policy, steps: int, rate: float, folder: Path) -> Iterator[Sent]:
    """Publish version 0 and those of so many steps to one worker that holds each; folder: an empty one."""
    optimizer = Optimizer(policy.parameters(), OptimSettings(learning_rate=rate))
    objective = PolicyObjective(AlgorithmSettings())
    staging, worker = Staging(), HeldVersion(folder / "versions")
    for version in range(steps + 1):
        began = time.perf_counter()
        snapshot = take_snapshot(policy, version, "bfloat16", staging=staging, delta=True)
        taken = time.perf_counter()
        update = worker.receive(_offered(snapshot))
        received = time.perf_counter()
        whole = snapshot.manifest.nbytes
        sent = sum(each.nbytes for each in snapshot.differences) if snapshot.base else whole
        worker.loaded()
        yield Sent(version, whole, sent, _is_cast(policy, update), taken - began, received - taken)
        if version % _SAMPLED_EVERY == 0:
            batch = pack(_answers(policy, version), 4096, policy.context)
        if version < steps:
            train_step(policy, optimizer, batch, objective, 1.0)


def _offered(snapshot: Snapshot) -> WeightUpdate:
    if not snapshot.base:
        return WeightUpdate(snapshot.manifest, inline(snapshot.arrays))
    sizes = tuple(each.nbytes for each in snapshot.differences)
    delta = Delta(snapshot.base, inline(snapshot.differences), sizes)
    return WeightUpdate(snapshot.manifest, inline([]), delta)  # the whole version is out of reach


def _is_cast(policy: Policy, update: WeightUpdate) -> bool:
    words = (tensor.to(torch.bfloat16).view(torch.int16) for _, tensor in policy.named_weights())
    return all(
        np.array_equal(array.view(np.int16), word.flatten().numpy())
        for (_, array), word in zip(update.tensors(), words, strict=True)
    )


def _answers(policy: Policy, version: int) -> list[TokenSequence]:
    """A group of answers that the policy samples, with advantages that sum to zero."""
    generator = torch.Generator().manual_seed(version)
    ids_BL = torch.randint(0, policy.vocab_size, (_ANSWERS, 1), generator=generator)
    for _ in range(_TOKENS):
        drawn_B1 = torch.multinomial(policy.next_logits(ids_BL).float().softmax(-1), 1, generator=generator)
        ids_BL = torch.cat([ids_BL, drawn_B1], 1)
    logprobs_BL = policy.score_texts(ids_BL, widest=False)
    advantages_B = torch.randn(_ANSWERS, generator=generator)
    advantages_B -= advantages_B.mean()
    sampled_T = np.arange(_TOKENS + 1) > 0
    return [
        TokenSequence(
            token_ids_T=ids_T.numpy().astype(np.int32),
            sampled_T=sampled_T,
            behavior_logprobs_T=np.append(np.float32(0), logprobs_T),
            advantages_T=np.where(sampled_T, advantage, 0).astype(np.float32),
            versions_T=np.where(sampled_T, version, NOT_SAMPLED).astype(np.int32),
        )
        for ids_T, logprobs_T, advantage in zip(ids_BL, logprobs_BL, advantages_B.tolist(), strict=True)
    ]
