"""Measure a checkpoint, or a model behind a server, on an environment, outside of any run."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from deploy.assembly.build import load_tokenizer
from deploy.assembly.conversations import try_conversations
from deploy.assembly.suites import suites_of
from deploy.config import run_folder
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.environments import Environment, environment_named
from deploy.config.load import toml_value
from deploy.config.trust import executed_by_environment, executed_by_evaluation, require_trust
from deploy.report.console import errors, write
from deploy.report.evaluation import FILE
from deploy.report.evaluation import Evaluation as Evaluation
from deploy.report.noticed import Noticed
from deploy.report.transcripts import write_episodes
from deploy.run.conditions import Conditions as Conditions
from deploy.run.failure_log import failures_kept_in
from deploy.run.model_checks import check_context, check_ends, check_model, check_tokenizer, loaded
from deploy.run.preflight import check_engine, first_observation
from deploy.run.quiet import output_kept_in
from deploy.run.served import is_server, play_served, served_model
from envs.hosting.host import HostSettings
from learner.training.checkpoint import MODEL, best_version, latest, whole
from rollout.agents.agent import Agent
from rollout.buffer.replay_store import EpisodeRow
from rollout.buffer.segments import SegmentWriter
from rollout.chat.chat import Chat
from rollout.chat.end_tokens import end_tokens
from rollout.chat.perception import Perception
from rollout.engines.engine import EngineStart, WeightsNotFinite
from rollout.episodes.evaluation import EvaluationPlan, as_groups, evaluation_row
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.worker import RolloutSettings, RolloutWorker
from rollout.wire.notices import Notices
from rollout.wire.schema import encode
from rollout.wire.trajectory import Assignment, DropReason, Slot, Task, Trajectory

LOG_FILE = "engine.log"
SEGMENT_BYTES = 64 << 20
Play = Callable[[Sequence[Task], "Conditions"], Coroutine[Any, Any, list[Trajectory]]]


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


def conditions_of(checkpoint: str, env: str | None, trusted: bool = False) -> Conditions:
    """The conditions of the run a checkpoint belongs to (the environment's options and where it lives only for the same
    environment), or the defaults where it belongs to none. There is no Ray here: its replicas get processes.

    env: the environment by its id or its name in that run; None: that run's own.
    trusted: the user says that the run may execute what its configuration names; ConfigError where he never did.
    """
    if (run := _run_of(checkpoint)) is None:
        return Conditions()
    config, named = run_folder.open_existing(run), env or environment_of(checkpoint)
    require_trust(run, executed_by_evaluation(config, named, said=env is not None), trusted)
    return _conditions(config, environment_named(config.environments, named))


def executes_code(checkpoint: str, run: str, conditions: Conditions, trusted: bool) -> bool:
    """Whether code that comes with a model may be executed when it is evaluated under the conditions of a run.

    What the run trusts is the code of its own model: that of its checkpoints, and the one that it began with. Any other
    model needs the user's word. run: a run folder or a checkpoint in one, or what belongs to none. trusted: that word.
    """
    folder = _run_of(run)
    if trusted or folder is None:
        return trusted
    began_with = run_folder.open_existing(folder).learner.model.path
    return conditions.trust_remote_code and (_run_of(checkpoint) == folder or checkpoint == began_with)


def suite_conditions(run: str, name: str, trusted: bool = False) -> tuple[str, list[int], Conditions]:
    """A suite of a run: its environment, the seeds of its tasks, its conditions. ConfigError where there is none."""
    if (folder := _run_of(run)) is None:
        raise ConfigError(f"{run} is not of a run, which would have the suite {name!r}; name one with --like")
    config = run_folder.open_existing(folder)
    suites = {each.name: each for each in suites_of(config) if each.name}
    if name not in suites:
        raise ConfigError(f"{run} has no evaluation suite {name!r}; it has {', '.join(suites) or 'none'}")
    plan, (tasks,) = suites[name].plan, suites[name].sets
    environment = tasks.environment
    require_trust(folder, executed_by_environment(config, environment), trusted)
    changes = {
        "sampling": plan.sampling.over(environment.sampling),
        "samples": plan.samples,
        "majority": plan.majority,
    }
    seeds = [task.seed for task in tasks.tasks()]
    return environment.id, seeds, _conditions(config, environment).model_copy(update=changes)


def _conditions(config: RunConfig, environment: Environment | None) -> Conditions:
    """The conditions of a run's evaluation in one of its environments, or in one that it does not know."""
    limits = environment.limits if environment else config.rollout.limits
    return Conditions(
        env_options=environment.evaluated if environment else {},
        host=environment.host.without_ray() if environment else HostSettings(),
        reward=environment.reward if environment else None,
        agent=environment.agent if environment else config.agent,
        sampling=config.evaluation.sampling.over(environment.sampling if environment else config.sampling),
        samples=config.evaluation.samples,
        majority=config.evaluation.majority,
        context_tokens=config.rollout.context_tokens,
        max_turns=limits.max_turns,
        episode_seconds=limits.timeout_seconds,
        engine=config.engine,
        on_gpu=config.rollout.gpus_per_worker > 0,
        trust_remote_code=config.learner.model.trust_remote_code,
    )


def evaluate_checkpoint(
    checkpoint: str,
    env_id: str,
    seeds: Sequence[int],
    conditions: Conditions,
    folder: Path | None = None,
    model: str = "",
) -> Evaluation:
    """Play the samples of every seed. `checkpoint`: a run folder (its newest checkpoint), one of its checkpoints, any
    model as learner.model.path takes it, or the URL of an OpenAI-compatible server. `folder`: a new one for the rows,
    the outcome and the engine's log. `model`: which one of a server.
    """
    if folder is not None and folder.exists():
        raise ConfigError(f"{folder} is there already; name a folder that is not")
    tasks = [Task.of(env_id, seed, conditions.env_options) for seed in seeds]
    play = _ready(checkpoint, env_id, conditions, model)
    if folder is None:
        with _notices_said(None):
            return _outcome(asyncio.run(play(tasks, conditions)), conditions)
    folder.mkdir(mode=0o700, parents=True)
    with _notices_said(folder), output_kept_in(folder / LOG_FILE):
        played = asyncio.run(play(tasks, conditions))
    _store(played, folder)
    with failures_kept_in(folder):
        evaluation = _outcome(played, conditions)
    evaluation.save(folder / FILE)
    return evaluation


def _ready(checkpoint: str, env_id: str, conditions: Conditions, model: str) -> Play:
    """What plays the tasks, once everything is checked that it needs. ConfigError, EnvironmentUnknown."""
    # It refuses what cannot be made.
    observation = first_observation(env_id, conditions.env_options, conditions.agent.parts, conditions.host)
    if is_server(checkpoint):
        return partial(play_served, checkpoint, served_model(checkpoint, model))
    if model:
        raise ConfigError(
            f"--model {model}: {checkpoint} is no server (http://...), so there is nothing to choose"
        )
    check_engine(conditions.engine, conditions.on_gpu)
    path, trusted = check_model(resolve_checkpoint(checkpoint)), conditions.trust_remote_code
    check_context(path, conditions.context_tokens, loaded(AutoConfig, path, trusted))
    tokenizer = check_tokenizer(path, trusted)
    chat = Chat(tokenizer, Perception.load(path, trusted), check_ends(path))
    if observation is not None:
        try_conversations(chat, observation, conditions.agent)
    return partial(_evaluate, path)


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


def _outcome(played: Sequence[Trajectory], conditions: Conditions) -> Evaluation:
    rows = [evaluation_row(trajectory, conditions.majority) for trajectory in played]
    return Evaluation.of(rows, samples=conditions.samples, voted=conditions.majority != "none")


def _store(played: Sequence[Trajectory], folder: Path) -> None:
    """Write the episodes as rows, which rollout.buffer.segments.read_rows gives back, and as JSON."""
    writer = SegmentWriter(folder, SEGMENT_BYTES)
    for group in as_groups(played):
        batch = encode(group)
        if batch.num_rows:  # an episode that failed in its reset has none
            writer.append(batch)
    writer.close()
    write_episodes(folder)


async def _evaluate(path: str, tasks: Sequence[Task], conditions: Conditions) -> list[Trajectory]:
    trusted, context = conditions.trust_remote_code, conditions.context_tokens
    perception = Perception.load(path, trusted)
    chat = Chat(load_tokenizer(path, trusted), perception, end_tokens(path), context)
    settings = conditions.engine.reproducible()
    start = EngineStart(
        "evaluation",
        path,
        chat.stops,
        context,
        on_gpu=conditions.on_gpu,
        perception=perception,
        trust_remote_code=trusted,
    )
    engine = await settings.start(start)
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
        return await worker.evaluate(tasks, EvaluationPlan(conditions.samples))
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


def best_checkpoint(run: str) -> str:
    """The checkpoint that a run has kept as its best. ConfigError where it has none."""
    version = best_version(Path(run))
    folder = None if version is None else whole(Path(run), version)
    if folder is None:
        raise ConfigError(f"{run} has no best checkpoint: set checkpoint.best_metric when it is trained")
    return str(folder)


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
