"""The learner with and without shared prefixes, on rows of four kinds; prints JSON.

    frozen_lake   a step of the main job: the map is the prompt of every turn
    household     groups whose prompt is their whole history: siblings part where they act differently
    smollm2       8 groups of 8 answers of SmolLM2-135M to sums, as it samples them (where `make llm` has been run), in
                  the data type that the recipe has on this processor
    long_prompt   16 answers of 512 tokens after one prompt of 4,096, for a layer of the sizes of Qwen2.5-0.5B's

What sharing saves of a long prompt depends on the model: 6.0 of its linear layers, 3.9 of its attention. A narrow model
of random weights is mostly attention at this length, which no model in use is; hence the sizes of a real one.

Players of the environments err so often that siblings differ. What is timed is packing, forward, backward and the
optimizer step, in turns on one thread; rates are of effective tokens: those of all sequences.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from deploy.assembly.build import load_chat
from deploy.assembly.models import model_path
from deploy.config.load import load_config
from envs import registry
from learner.algorithm.algorithm import AlgorithmSettings
from learner.algorithm.schedule import OptimSettings
from learner.data.batch import NOT_SAMPLED, TokenSequence, pack, sequences_of
from learner.model.policy import Policy
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from learner.settings import ModelSettings
from learner.training.optim import Optimizer
from learner.training.step import PolicyObjective, train_step
from rollout.buffer.history import History
from rollout.episodes.demonstrations import demonstrate
from rollout.episodes.tasks import TaskStream
from rollout.wire.schema import decode
from rollout.wire.trajectory import Trajectory
from tests.bench.runs import run_here
from tests.smollm2 import FOLDER

SIBLINGS, ERRORS = 8, 0.3


@dataclass(frozen=True)
class Case:
    """Sequences of one optimizer step, and the model that learns from them."""

    sequences: Sequence[TokenSequence]
    model: ModelSettings
    tokens_per_row: int
    rounds: int = 5


def _played(recipe: str, folder: Path, groups: int, *overrides: str) -> Case:
    """A step of a recipe, played by the environment's own player."""
    config = load_config(recipe, list(overrides))
    folder.mkdir()
    path = model_path(config, folder)
    (environment,) = config.environments
    tasks = list(islice(map(TaskStream(environment.id, environment.options, config.seed), count()), groups))
    player, number = registry.player(environment.id), count()
    played = demonstrate(
        [task for task in tasks for _ in range(SIBLINGS)],
        lambda _: player(ERRORS, next(number)),
        load_chat(path),
        config.rollout.context_tokens,
        environment.agent,
    )
    episodes = [group.trajectories[0] for group in asyncio.run(played)]
    model = config.learner.model.model_copy(update={"path": path})
    return Case(_sequences(episodes), model, config.learner.tokens_per_microbatch)


def _answered(folder: Path) -> Case:
    """A step of a real model's recipe, sampled by the model itself."""
    config = load_config(
        "smollm2_sums",
        [
            "steps=1",
            "engine={kind='transformers'}",
            "buffer={groups_per_step=8, max_lag=0}",
            "evaluation.tasks=0",
            f"learner.model.path={FOLDER}",
        ],
    )
    run_here(config, folder)
    episodes = [episode for batch in History(folder).groups() for episode in decode(batch).trainable]
    return Case(_sequences(episodes), config.learner.model, config.learner.tokens_per_microbatch)


def _sequences(episodes: Sequence[Trajectory]) -> list[TokenSequence]:
    """Theirs, with random advantages."""
    rng = np.random.default_rng(0)
    return [s for e in episodes for s in sequences_of(e, rng.normal(size=e.num_sampled).astype(np.float32))]


def _group(prompt: int, answers: Sequence[int], vocabulary: int) -> list[TokenSequence]:
    """Random answers of these lengths to a random prompt."""
    rng = np.random.default_rng(0)
    opening, found = rng.integers(0, vocabulary, prompt), []
    for size in answers:
        sampled_T = np.arange(prompt + size) >= prompt
        found.append(
            TokenSequence(
                token_ids_T=np.append(opening, rng.integers(0, vocabulary, size)).astype(np.int32),
                sampled_T=sampled_T,
                behavior_logprobs_T=np.where(sampled_T, -4.6, 0).astype(np.float32),
                advantages_T=np.where(sampled_T, rng.normal(), 0).astype(np.float32),
                versions_T=np.where(sampled_T, 0, NOT_SAMPLED).astype(np.int32),
            )
        )
    return found


def _long_prompt(folder: Path) -> Case:
    tokenizer = build_tokenizer(folder, ["left", "right", "up", "down"])
    build_tiny(folder, tokenizer, layers=1, width=896, heads=14, head_width=64, mlp=4864, context=8192)
    return Case(_group(4096, [512] * 16, len(tokenizer)), ModelSettings(path=str(folder)), 16_384, rounds=2)


CASES: dict[str, Callable[[Path], Case]] = {
    "frozen_lake": lambda folder: _played("frozen_lake", folder, 32),
    "household": lambda folder: _played(
        "household", folder, 32, "agent.memory=full", "rollout.context_tokens=512"
    ),
    **({"smollm2": _answered} if (FOLDER / "config.json").is_file() else {}),
    "long_prompt": _long_prompt,
}


def _step(case: Case, share: bool) -> Callable[[], dict[str, float]]:
    policy = Policy(case.model)
    optimizer = Optimizer(policy.parameters(), OptimSettings(learning_rate=1e-5))
    objective = PolicyObjective(AlgorithmSettings())

    def step() -> dict[str, float]:
        batch = pack(case.sequences, case.tokens_per_row, policy.context, share=share)
        return train_step(policy, optimizer, batch, objective, 1.0)

    return step


def _measured(name: str, case: Case) -> dict[str, float]:
    steps = {share: _step(case, share) for share in (True, False)}
    rows = {share: step() for share, step in steps.items()}
    took: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(case.rounds):
        for share, step in steps.items():
            began = time.perf_counter()
            step()
            took[share].append(time.perf_counter() - began)
    tokens = rows[True]["tokens_effective"]
    return {
        f"{name}_tokens": tokens,
        f"{name}_unique": rows[True]["tokens_processed"],
        f"{name}_tokens_per_s": round(tokens / statistics.median(took[True])),
        f"{name}_apart_tokens_per_s": round(tokens / statistics.median(took[False])),
        f"{name}_ratio": round(
            statistics.median(a / s for s, a in zip(took[True], took[False], strict=True)), 2
        ),
    }


def main(names: Sequence[str]) -> dict[str, float]:
    """Figures of the named cases, or of all."""
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            if not names or name in names:
                found |= _measured(name, case(Path(folder) / name))
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
