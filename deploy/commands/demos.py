"""Write demonstrations: a scripted player's episodes in the trajectory schema, and the tokenizer of their ids.

FOLDER/segment-NNNNNN.arrows   rows, one a turn, a record batch an episode: rollout.buffer.segments.read_rows(FOLDER)
FOLDER/tokenizer/              the tokenizer, if a tiny one was built
FOLDER/demonstrations.json     the options, and the resulting success and reward
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deploy.assembly.build import probe_environment
from deploy.commands.export import fresh_folder
from deploy.report.console import Console
from deploy.report.evaluation import Evaluation
from deploy.report.progress import Progress
from deploy.run.model_checks import loaded
from envs import registry
from learner.model.tokenizer import build_tokenizer
from rollout.agents.agent import AgentSettings
from rollout.buffer.replay_store import EpisodeRow
from rollout.buffer.segments import SegmentWriter
from rollout.chat.chat import Chat
from rollout.episodes.demonstrations import demonstrations
from rollout.wire.schema import encode
from rollout.wire.trajectory import Group, Task

SEGMENT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """The demonstrations to play, and their tokenizer."""

    env_id: str
    options: dict[str, Any]
    episodes: int
    first_seed: int = 0  # of the first episode; each has the next seed
    error_rate: float = 0.0
    model: str | None = (
        None  # of the tokenizer, a Hugging Face folder or id; None: a tiny one, a token a character
    )
    memory: str = "full"  # see AgentSettings
    context_tokens: int = 32768  # limit of an episode


def write_demonstrations(asked: Demonstrations, folder: Path, console: Console) -> Evaluation:
    """Play demonstrations and write `folder` atomically. ConfigError and EnvironmentUnknown for the user's mistakes."""
    player = registry.player(asked.env_id)
    with probe_environment(asked.env_id, asked.options, None) as reset:
        reset(asked.first_seed)
    with fresh_folder(folder) as partial_folder:
        chat = Chat(_tokenizer(asked, partial_folder))
        tasks = [
            Task.of(asked.env_id, asked.first_seed + index, asked.options) for index in range(asked.episodes)
        ]
        played = demonstrations(
            tasks,
            partial(player, asked.error_rate),
            chat,
            asked.context_tokens,
            AgentSettings.model_validate({"memory": asked.memory}),
        )
        with Progress(0, f"{asked.episodes} demonstrations of {asked.env_id}", console) as progress:
            evaluation = asyncio.run(_written(played, partial_folder, asked.episodes, progress))
        facts = asdict(asked) | {"outcome": asdict(evaluation)}
        (partial_folder / "demonstrations.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return evaluation


async def _written(played: AsyncIterator[Group], folder: Path, total: int, progress: Progress) -> Evaluation:
    rows: list[EpisodeRow] = []
    sums: dict[str, float] = {}
    sound = 0
    writer = SegmentWriter(folder, SEGMENT_BYTES)
    with progress.phase("demonstrations", total) as phase:
        async for group in played:
            batch = encode(group)
            if batch.num_rows:  # an episode that failed in its reset has no rows
                writer.append(batch)
            rows += [EpisodeRow.of(trajectory) for trajectory in group.trajectories]
            if rows[-1].sound:
                sound += 1
                verdicts = {} if rows[-1].success is None else {"success": float(rows[-1].success)}
                for name, value in ({"reward": rows[-1].reward} | verdicts).items():
                    sums[name] = sums.get(name, 0.0) + value
            phase.advance(1, **{name: total / max(sound, 1) for name, total in sums.items()})
    writer.close()
    return Evaluation.of(rows)


def _tokenizer(asked: Demonstrations, folder: Path) -> PreTrainedTokenizerBase:
    if asked.model is None:
        return build_tokenizer(folder / "tokenizer")
    tokenizer: PreTrainedTokenizerBase = loaded(AutoTokenizer, asked.model)
    return tokenizer
