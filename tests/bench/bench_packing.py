"""The learner on episodes of very unequal lengths, against a padded loop; and what a step costs beside its mathematics.

Lengths are log-normal, as those of answers are. The padded loop is what one would write by hand: batches of
neighbouring episodes, padded to their longest, with an attention mask. Both run on one thread, in turns, over the same
episodes; tokens are the episodes' own. `overhead` is what `Learner.step` spends outside of forward, backward and
optimizer: advantages, packing, statistics. Prints JSON.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from learner.algorithm.schedule import OptimSettings
from learner.settings import LearnerSettings, ModelSettings
from learner.training.learner import Learner
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory, Turn
from tests.bench.player import untaught_model

GROUPS, GROUP_SIZE, CONTEXT, PADDED_BATCH, ROUNDS = 8, 8, 512, 8, 5
PROMPT = 16
OPTIM = OptimSettings(learning_rate=1e-5)


def episodes(vocabulary: int) -> list[Group]:
    rng = np.random.default_rng(0)
    task = Task.of("bench", 0)

    def episode(group: int, index: int) -> Trajectory:
        sampled = int(np.clip(rng.lognormal(4.2, 0.9), 4, CONTEXT - PROMPT))
        step = Turn(
            turn=0,
            segment=0,
            observation="",
            action="",
            prompt_ids=rng.integers(0, vocabulary, PROMPT).astype(np.int32),
            action_ids=rng.integers(0, vocabulary, sampled).astype(np.int32),
            behavior_logprobs=np.full(sampled, -4.6, np.float32),
            versions=np.zeros(sampled, np.int32),
            reward=float(rng.random()),
            finish_reason="stop",
        )
        return Trajectory(group, 0, index, task, (step,), EndReason.TERMINATED)

    return [
        Group(Slot(g, 0, task, 0), tuple(episode(g, i) for i in range(GROUP_SIZE))) for g in range(GROUPS)
    ]


def padded_loop(folder: Path, groups: list[Group]) -> Callable[[], None]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adamw = torch.optim.AdamW(model.parameters(), lr=OPTIM.learning_rate, fused=True)
    steps = [trajectory.turns[0] for group in groups for trajectory in group.trajectories]
    total = sum(len(step.action_ids) for step in steps)

    def step() -> None:
        adamw.zero_grad()
        for start in range(0, len(steps), PADDED_BATCH):
            rows = [np.concatenate([s.prompt_ids, s.action_ids]) for s in steps[start : start + PADDED_BATCH]]
            longest = max(map(len, rows))
            ids = torch.tensor(np.stack([np.pad(row, (0, longest - len(row))) for row in rows])).long()
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, PROMPT - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(2, ids[:, PROMPT:, None])[..., 0]
            ratio = torch.exp(logprobs + 4.6)
            loss = -torch.minimum(ratio, ratio.clamp(0.8, 1.28)) * mask[:, PROMPT:]
            (loss.sum() / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()

    return step


class Stopwatch:
    """Seconds spent in the functions it was put around."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.never_called: set[str] = set()

    def around(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)
        self.never_called.add(name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.never_called.discard(name)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        setattr(owner, name, timed)


def main() -> dict[str, float]:
    """Medians (targets: ratio at least 1.5, overhead at most 0.05)."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        groups = episodes(untaught_model(folder, CONTEXT))
        learner = Learner(
            LearnerSettings(
                model=ModelSettings(path=name), optim=OPTIM, tokens_per_microbatch=2048, threads=1
            )
        )
        padded = padded_loop(folder, groups)
        inside = Stopwatch()
        inside.around(learner.policy, "score")
        inside.around(torch.Tensor, "backward")
        inside.around(learner.optimizer, "step")
        padded()
        learner.step(groups)
        if inside.never_called:  # what it does has another name now, and would count as overhead
            raise RuntimeError(f"a step called no {', '.join(sorted(inside.never_called))}")
        took: dict[str, list[float]] = {"packed": [], "padded": [], "overhead": []}
        for _ in range(ROUNDS):
            inside.seconds, began = 0.0, time.perf_counter()
            learner.step(groups)
            took["packed"].append(time.perf_counter() - began)
            took["overhead"].append(1 - inside.seconds / took["packed"][-1])
            began = time.perf_counter()
            padded()
            took["padded"].append(time.perf_counter() - began)
    tokens = sum(len(t.turns[0].action_ids) + PROMPT for group in groups for t in group.trajectories)
    ratios = [slow / fast for slow, fast in zip(took["padded"], took["packed"], strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "overhead": round(statistics.median(took["overhead"]), 4),
        "packed_tokens_per_s": round(tokens / statistics.median(took["packed"])),
        "padded_tokens_per_s": round(tokens / statistics.median(took["padded"])),
    }


if __name__ == "__main__":
    print(json.dumps(main()))
