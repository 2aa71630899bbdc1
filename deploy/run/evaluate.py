"""Measure a checkpoint on an environment, outside of any run."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from deploy.assembly.build import load_tokenizer
from deploy.assembly.conversations import try_conversations
from deploy.config import run_folder
from deploy.config.config_errors import ConfigError
from deploy.config.environments import environment_named
from deploy.config.load import toml_value
from deploy.config.trust import executed_by_evaluation, require_trust
from deploy.report.console import errors, write
from deploy.report.evaluation import Evaluation as Evaluation
from deploy.report.noticed import Noticed
from deploy.run.failure_log import failures_kept_in
from deploy.run.preflight import (
    check_context,
    check_ends,
    check_engine,
    check_model,
    check_tokenizer,
    first_observation,
)
from deploy.run.quiet import output_kept_in
from envs.hosting.host import HostSettings
from learner.training.checkpoint import MODEL, latest
from rollout.agents.agent import Agent, AgentSettings
from rollout.buffer.replay_store import EpisodeRow
from rollout.buffer.segments import SegmentWriter
from rollout.chat.chat import Chat
from rollout.chat.end_tokens import end_tokens
from rollout.chat.perception import Perception
from rollout.engines.engine import EngineStart, Sampling, WeightsNotFinite
from rollout.engines.settings import EngineSettings
from rollout.engines.vllm_start import VllmSettings
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.reward import OwnReward
from rollout.episodes.worker import RolloutSettings, RolloutWorker, as_groups
from rollout.wire.notices import Notices
from rollout.wire.schema import encode
from rollout.wire.trajectory import Assignment, DropReason, Slot, Task, Trajectory

LOG_FILE = "engine.log"
SEGMENT_BYTES = 64 << 20


class Conditions(BaseModel):
    """Under what an agent is evaluated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    env_options: dict[str, Any] = {}
    agent: AgentSettings = AgentSettings()
    sampling: Sampling = Sampling(max_tokens=64)
    context_tokens: int = 2048
    max_turns: int = 100
    episode_seconds: float = 600.0
    host: HostSettings = HostSettings()
    engine: EngineSettings = VllmSettings(dtype="float32")
    reward: OwnReward | None = None
    on_gpu: bool = False
    seed: int = Field(0, ge=0, description="seed of all sampling; the same seed samples the same tokens")


def environment_of(checkpoint: str) -> str:
    """The environment of the run that a checkpoint belongs to, by its name or, of a single one, its id.

    ConfigError where it belongs to no run, or to one with several.
    """
    if (run := _run_of(checkpoint)) is None:
        raise ConfigError(
            f"{checkpoint} is not of a run, which would say its environment; name one with --env"
        )
    names = [each.name for each in run_folder.open_existing(run).environments]
    if len(names) > 1:
        raise ConfigError(f"the run of {checkpoint} has {len(names)} environments; --env {' | '.join(names)}")
    return names[0]


def environment_id(checkpoint: str, named: str) -> str:
    """The id of an environment that is named as in the run of the checkpoint, or by its id."""
    run = _run_of(checkpoint)
    known = run and environment_named(run_folder.open_existing(run).environments, named)
    return known.id if known else named


def _run_of(checkpoint: str) -> Path | None:
    """The run folder that a checkpoint lies in."""
    folder = Path(checkpoint).resolve()
    for candidate in (folder, *folder.parents[:3]):
        if (candidate / run_folder.CONFIG_FILE).is_file() and (candidate / "ledger.sqlite").is_file():
            return candidate
    return None


def conditions_of(checkpoint: str, named: str, trusted: bool = False) -> Conditions:
    """The conditions of the run a checkpoint belongs to (the environment's options and where it lives only for the same
    environment), or the defaults where it belongs to none. There is no Ray here: its replicas get processes.

    named: the environment, by its id or its name in that run.

    trusted: the user says that the run may execute what its configuration names; ConfigError where he never did.
    """
    if (run := _run_of(checkpoint)) is None:
        return Conditions()
    config = run_folder.open_existing(run)
    require_trust(run, executed_by_evaluation(config, named), trusted)
    known = environment_named(config.environments, named)
    limits = known.limits if known else config.rollout.limits
    return Conditions(
        env_options=known.evaluated if known else {},
        host=known.host.without_ray() if known else HostSettings(),
        reward=known.reward if known else None,
        agent=known.agent if known else config.agent,
        sampling=known.sampling if known else config.sampling,
        context_tokens=config.rollout.context_tokens,
        max_turns=limits.max_turns,
        episode_seconds=limits.timeout_seconds,
        engine=config.engine,
        on_gpu=config.rollout.gpus_per_worker > 0,
    )


def evaluate_checkpoint(
    checkpoint: str, named: str, seeds: range, conditions: Conditions, folder: Path | None = None
) -> Evaluation:
    """Play one episode a seed. `checkpoint`: a run folder (its newest checkpoint), one of its checkpoints, or any
    Hugging Face folder or id. `named`: the environment, as in `conditions_of`. `folder`: a new one for the rows, the
    outcome and the engine's log.
    """
    if folder is not None and folder.exists():
        raise ConfigError(f"{folder} is there already; name a folder that is not")
    path, env_id = resolve_checkpoint(checkpoint), environment_id(checkpoint, named)
    check_engine(conditions.engine, conditions.on_gpu)
    check_model(path)
    check_context(path, conditions.context_tokens)
    tokenizer = check_tokenizer(path)
    # It refuses what cannot be made.
    observation = first_observation(env_id, conditions.env_options, conditions.agent.parts, conditions.host)
    chat = Chat(tokenizer, Perception.load(path), check_ends(path))
    if observation is not None:
        try_conversations(chat, observation, conditions.agent)
    tasks = [Task.of(env_id, seed, conditions.env_options) for seed in seeds]
    if folder is None:
        with _notices_said(None):
            return Evaluation.of(_rows(asyncio.run(_evaluate(path, tasks, conditions))))
    folder.mkdir(mode=0o700, parents=True)
    with _notices_said(folder), output_kept_in(folder / LOG_FILE):
        played = asyncio.run(_evaluate(path, tasks, conditions))
    _store(played, folder)
    with failures_kept_in(folder):
        evaluation = Evaluation.of(_rows(played))
    evaluation.save(folder / "evaluation.json")
    return evaluation


@contextmanager
def _notices_said(folder: Path | None) -> Iterator[None]:
    """Say at the end what is noticed meanwhile, however it ends."""
    with Notices() as notices:
        try:
            yield
        finally:
            Noticed(folder, partial(write, errors())).hear("", notices.since(0))


def new_folder(env_id: str, runs: Path) -> Path:
    """A path for an evaluation's folder: what, when, and by which process, so that no two share one."""
    what = re.sub(r"[^A-Za-z0-9_.-]+", "-", env_id)
    return runs / f"eval-{what}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _rows(played: Sequence[Trajectory]) -> list[EpisodeRow]:
    return [EpisodeRow.of(trajectory) for trajectory in played]


def _store(played: Sequence[Trajectory], folder: Path) -> None:
    """Write the episodes' rows, as rollout.buffer.segments.read_rows gives them back."""
    writer = SegmentWriter(folder, SEGMENT_BYTES)
    for group in as_groups(played):
        batch = encode(group)
        if batch.num_rows:  # an episode that failed in its reset has none
            writer.append(batch)
    writer.close()


async def _evaluate(path: str, tasks: Sequence[Task], conditions: Conditions) -> list[Trajectory]:
    perception = Perception.load(path)
    chat = Chat(load_tokenizer(path), perception, end_tokens(path), conditions.context_tokens)
    context = conditions.context_tokens
    settings = conditions.engine.reproducible()
    engine = await settings.start(
        EngineStart("evaluation", path, chat.stops, context, on_gpu=conditions.on_gpu, perception=perception)
    )
    try:
        await engine.adopt_loaded(version=0)
    except WeightsNotFinite as error:
        await engine.close()
        raise ConfigError(
            f"model {path}: its weights hold NaN or infinity, or overflow in dtype={settings.dtype} ({error}); use "
            "sound weights, or --dtype float32"
        ) from error
    agent = Agent(engine, chat, conditions.sampling, context, conditions.agent)
    rollout = RolloutSettings(
        group_size=1,
        concurrent_groups=settings.placement.concurrent_requests,
        context_tokens=context,
        max_turns=conditions.max_turns,
        episode_seconds=conditions.episode_seconds,
    )
    parts, reward = conditions.agent.parts, conditions.reward
    pool = EnvironmentPool(host=conditions.host, parts=parts, chat=chat, reward=reward)
    worker = RolloutWorker(
        "evaluation", engine, agent, _NoBuffer(), rollout, run_seed=conditions.seed, pool=pool
    )
    try:
        return await worker.evaluate(tasks)
    finally:
        await worker.close()
        await engine.close()


class _NoBuffer:
    """An evaluation is asked for, not reserved."""

    async def reserve(self, worker: str, worker_loop: int) -> Assignment | None:
        return None

    async def record_turns(self, batch: object) -> None:
        raise AssertionError("an evaluation records no turns")

    async def add(self, slot: Slot, batch: object, episodes: Sequence[EpisodeRow]) -> None:
        raise AssertionError("an evaluation adds no groups")

    async def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None:
        raise AssertionError("an evaluation drops no groups")


def resolve_checkpoint(checkpoint: str) -> str:
    """The Hugging Face folder meant by a run folder, a checkpoint folder, or such a folder itself."""
    folder = Path(checkpoint)
    if (folder / "ledger.sqlite").is_file():
        newest = latest(folder)
        if newest is None:
            raise ConfigError(f"run {folder} has no whole checkpoint yet")
        return str(newest / MODEL)
    return str(folder / MODEL) if (folder / MODEL / "config.json").is_file() else checkpoint


def parse_seeds(text: str) -> range:
    """`A:B`, B excluded."""
    first, colon, end = text.partition(":")
    if not (colon and first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise ConfigError(f"--seeds {text!r} is not of the form A:B with A < B, for example 0:256")
    return range(int(first), int(end))


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs, values in TOML where they read as TOML."""
    parsed: dict[str, Any] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or not name:
            raise ConfigError(f"--option {option!r} is not of the form NAME=VALUE")
        parsed[name] = toml_value(text)
    return parsed
