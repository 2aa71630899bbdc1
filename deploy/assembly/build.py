"""Builders of a run's parts from its configuration, for the local runtime and for the cluster.

Every process of a run imports this module. Modules that take seconds to import (transformers, the learner) are imported
inside the functions that need them, so that a restarted replay buffer does not wait for them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deploy.assembly.fetching import fetch
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.environments import Environment
from deploy.config.suites import all_environments
from envs import registry
from envs.base import Observation
from envs.code_lines import describe_error, user_lines_suffix
from envs.hosting.host import EnvironmentFailed, EnvironmentRefused, HostSettings
from envs.hosting.subprocess_env import SubprocessEnv, resets_in_subprocess
from envs.tools.tool import ToolRefused
from rollout.agents.agent import Agent, AgentSettings, BusyClock
from rollout.agents.settings import PartSettings, wrapped, wrapping
from rollout.buffer.new_groups import Owner
from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.buffer.state_place import copy_of
from rollout.chat.chat import Chat
from rollout.chat.end_tokens import end_tokens
from rollout.chat.perception import Perception
from rollout.engines.engine import Engine, EngineStart, Sampling, derive_seed
from rollout.engines.vllm_start import VllmSettings, gpu_bytes
from rollout.episodes.mixture import TaskMixture
from rollout.episodes.opponents import Opponents
from rollout.episodes.pool import EnvironmentPool, Hosting, Start
from rollout.episodes.tasks import TaskStream
from rollout.episodes.worker import GroupBuffer, Player, RolloutWorker
from rollout.external.external_env import PROGRAM
from rollout.wire.adapter import AdapterSpec
from rollout.wire.model_folder import ModelMissing, pretrained
from rollout.wire.trajectory import EnvironmentKey, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

EngineFactory = Callable[[RunConfig, str, str], Awaitable[Engine]]  # (config, worker name, model path)


def load_tokenizer(path: str, trusted: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer. ConfigError, one line, for unreadable files; ModelMissing if there is no model.

    trusted: code that comes with the model may be executed.
    """
    from transformers import AutoTokenizer

    with _files_of(path):
        tokenizer: PreTrainedTokenizerBase = pretrained(AutoTokenizer, path, trusted)
    return tokenizer


def load_chat(path: str, context_tokens: int | None = None, trusted: bool = False) -> Chat:
    """Load the chat of a model's folder, which renders messages to tokens, and pictures for a vision model.

    trusted: code that comes with the model may be executed.
    """
    tokenizer = load_tokenizer(path, trusted)
    with _files_of(path):
        perception, ends = Perception.load(path, trusted), end_tokens(path)
    return Chat(tokenizer, perception, ends, context_tokens)


@contextmanager
def _files_of(path: str) -> Iterator[None]:
    """Turn a library's error about a model's files into ConfigError, one line."""
    try:
        yield
    except ModelMissing:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model {path}: one of its files cannot be read: {reason}") from error


def training_tasks(config: RunConfig) -> TaskMixture:
    """The run's stream of tasks: a pure function of (run seed, group id)."""
    streams = [
        TaskStream(
            each.id,
            each.options,
            environment_seed(config.seed, place),
            count=registry.task_count(each.id, each.options),
            shuffle=each.shuffle,
        )
        for place, each in enumerate(config.environments)
    ]
    return TaskMixture(streams, [each.share for each in config.environments])


def environment_seed(seed: int, place: int) -> int:
    """The seed of the tasks of one of several environments; the first has the run's own."""
    return derive_seed(seed, place) if place else seed


def held_out(environment: Environment) -> bool:
    """Whether evaluation uses a split that training does not draw from; a foreign agent's task names its split."""
    trained, evaluated = environment.options, environment.evaluated
    if environment.id == PROGRAM:
        trained, evaluated = trained.get("task", {}), evaluated.get("task", {})
    splits = trained.get("split", "all"), evaluated.get("split", "all")
    return "all" not in splits and splits[0] != splits[1]


@contextmanager
def probe_environment(
    env_id: str, options: dict[str, Any], host: HostSettings | None, parts: Sequence[PartSettings] = ()
) -> Iterator[Callable[[int], Observation]]:
    """Start a replica before a run and yield its `reset`.

    Environments that are neither Manta's nor Gymnasium's get a process and the limits of `host`. ConfigError, one line,
    if the environment fails or does not answer.
    """
    if registry.is_trusted(env_id):
        env = _asked(env_id, lambda: wrapped(partial(registry.make, env_id, **options), parts))
        try:
            yield lambda seed: _asked(env_id, lambda: env.reset(seed=seed)[0])
        finally:
            env.close()
        return
    recipe = wrapping(registry.env_factory(env_id, **options), parts)
    try:
        with resets_in_subprocess(recipe, host or HostSettings()) as reset:
            yield reset
    except EnvironmentRefused as error:
        raise ConfigError(str(error)) from error
    except EnvironmentFailed as error:
        raise ConfigError(f"environment {env_id}: {error}") from error


def _asked(env_id: str, call: Callable[[], T]) -> T:
    """Call an environment in this process; an error of a user's code becomes ConfigError, one line."""
    try:
        return call()
    except (registry.EnvironmentUnknown, ToolRefused):
        raise
    except (Exception, SystemExit) as error:
        if env_id in registry.registered() and not user_lines_suffix(error):
            raise  # a fault of Manta's own environment keeps its traceback
        raise ConfigError(f"environment {env_id}: {describe_error(error)}") from error


def distinct_tasks(
    env_id: str,
    options: dict[str, Any],
    first_seed: int,
    count: int,
    host: HostSettings | None = None,
) -> list[Task]:
    """`count` tasks with different first observations, for seeds from `first_seed` on.

    ConfigError if 1000 seeds in a row give no new observation: the environment has too few instances. An environment
    without splits holds out seeds alone, which training never uses, and its episodes may differ after equal starts (a
    slippery lake): its tasks are the first seeds. So are a foreign agent's, and those of an environment with a list of
    tasks: at most as many as the list has.
    """
    if (held := registry.task_count(env_id, options)) is not None:
        count = min(count, held)
    first = [Task.of(env_id, seed, options) for seed in range(first_seed, first_seed + count)]
    if env_id == PROGRAM:
        return first
    seen: set[str] = set()
    tasks: list[Task] = []
    seed, last_new = first_seed, first_seed
    with probe_environment(env_id, options, host) as reset:
        if first and (held is not None or not registry.has_splits(env_id)):
            reset(first_seed)
            return first
        while len(tasks) < count:
            observation = reset(seed)
            if str(observation) not in seen:
                seen.add(str(observation))
                tasks.append(Task.of(env_id, seed, options))
                last_new = seed
            elif seed - last_new >= 1000:
                raise ConfigError(
                    f"evaluation.tasks={count} is too large: {env_id} has only {len(tasks)} different first "
                    f"observations with these options (seeds {first_seed} to {seed}); lower it or change "
                    "evaluation.options"
                )
            seed += 1
    return tasks


def identical_starts(tasks: list[Task], host: HostSettings | None = None) -> str:
    """A notice, one line, if all of several tasks have the same first observation; otherwise empty."""
    if len(tasks) < 2 or tasks[0].env_id == PROGRAM:
        return ""
    env_id = tasks[0].env_id
    with probe_environment(env_id, tasks[0].kwargs, host) as reset:
        first = str(reset(tasks[0].seed))
        alike = all(str(reset(task.seed)) == first for task in tasks[1:])
    notice = f"{env_id} has the same first observation for all {len(tasks)} evaluation seeds; later turns may differ"
    return notice if alike else ""


def sent_adapter(config: RunConfig, path: str) -> AdapterSpec | None:
    """The adapter that is sent to engines instead of whole weights; None if whole weights are sent."""
    lora = config.learner.model.lora
    if lora is None or lora.sync != "adapter":
        return None
    from learner.model.lora_targets import planned

    return planned(path, lora, config.learner.model.trust_remote_code)


async def start_engine(config: RunConfig, name: str, path: str) -> Engine:
    """Start the engine of the configuration."""
    trusted = config.learner.model.trust_remote_code
    tokenizer = load_tokenizer(path, trusted)
    with _files_of(path):
        perception, ends = Perception.load(path, trusted), end_tokens(path)
    engine = config.engine
    if config.weights.transfer == "ipc" and isinstance(engine, VllmSettings) and engine.kv_cache_gib is None:
        from deploy.assembly.shared_gpu import beside_learner  # it imports what learns

        engine = beside_learner(config, path, gpu_bytes())
    return await engine.start(
        EngineStart(
            name,
            path,
            Chat(tokenizer, perception, ends).stops,
            config.rollout.context_tokens,
            on_gpu=config.rollout.gpus_per_worker > 0,
            transfer=config.weights.transfer,
            adapter=sent_adapter(config, path),
            perception=perception,
            trust_remote_code=trusted,
            routing=config.learner.model.router_replay,
            policy=config.policy,
            sleeps=config.cluster.colocate == "turns",
        )
    )


def replica_start(*hosts: HostSettings) -> Start:
    """The start function of replicas outside of their worker's process."""
    if all(host.where != "ray" for host in hosts):
        return SubprocessEnv.start
    from envs.hosting.actors import RemoteEnv  # imports Ray, which is optional here

    return RemoteEnv.start


def agents_of(config: RunConfig, engine: Engine, chat: Chat) -> tuple[dict[EnvironmentKey, Player], Agent]:
    """Who plays a run's environments on an engine, and who plays all others. All share the engine's clock."""
    clock = BusyClock()

    def agent(sampling: Sampling, settings: AgentSettings) -> Agent:
        return Agent(engine, chat, sampling, config.rollout.context_tokens, settings, clock)

    players: dict[EnvironmentKey, Player] = {}
    for each in all_environments(config):
        players |= dict.fromkeys(each.keys, Player(agent(each.sampling, each.agent), each.limits))
    return players, agent(config.sampling, config.agent)


async def build_worker(
    config: RunConfig,
    path: str,
    engine_factory: EngineFactory,
    name: str,
    replay_buffer: GroupBuffer,
    opponents: Opponents | None = None,
) -> RolloutWorker:
    """Start an engine and build the rollout worker over it. path: the model's, as `model_path` returns it."""
    folder = fetch(path)
    engine = await engine_factory(config, name, folder)
    chat = load_chat(folder, config.rollout.context_tokens, config.learner.model.trust_remote_code)
    players, usual = agents_of(config, engine, chat)
    hosting: dict[EnvironmentKey, Hosting] = {}
    for each in all_environments(config):
        hosting |= dict.fromkeys(each.keys, Hosting(each.host, each.agent.parts, each.reward))
    start = replica_start(*(each.host for each in config.environments))
    pool = EnvironmentPool(parts=config.agent.parts, start=start, chat=chat, hosting=hosting)
    settings, seed = config.rollout, config.seed
    return RolloutWorker(
        name, engine, usual, replay_buffer, settings, seed, pool, players, config.policy, opponents
    )


def replay_buffer_builder(
    config: RunConfig, run_folder: Path, owner: Owner | None = None
) -> Callable[[], ReplayBuffer]:
    """A function that opens the run's replay buffer from its ledger and segments on disk, or from their copy.

    It holds no configuration, so that a process that unpickles it does not import torch. LedgerError if the run folder
    can hold neither.
    """
    copy = copy_of(run_folder, config.buffer.copy_to)
    over = partial(ReplayBuffer.over, run_folder, training_tasks(config), config.buffer, config.steps)
    return partial(over, config.seed, owner or Owner(config.policy), copy)
