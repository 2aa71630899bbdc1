"""Checks before a run starts or writes anything.

Each check raises an error for the user: what is wrong, where, and how to fix it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from deploy.assembly.build import probe_environment
from deploy.assembly.conversations import try_conversations
from deploy.assembly.fetching import fetch
from deploy.assembly.models import model_of, tiny_tokenizer
from deploy.assembly.stage_data import past_episodes, recorded
from deploy.assembly.suites import suites_of
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.engine_checks import require_divisible
from deploy.config.environments import Environment
from deploy.config.own_parts import check_own_parts
from deploy.run import replay
from envs import registry
from envs.base import Observation
from envs.child_process import find_program
from envs.hosting.host import HostSettings
from envs.tools.tool import ToolRefused
from learner.model.attention import require_slices
from learner.model.lora_targets import planned
from learner.model.mixtures import require_mixture_of
from learner.model.tiny import build_tiny
from learner.model.tiny_vision import tiny_processor
from learner.stages.settings import (
    AnyStage,
    DatasetSource,
    PreferenceSettings,
    RewardModelSettings,
    RunSource,
    SftSettings,
)
from rollout.agents.memory import NotebookSettings
from rollout.agents.settings import OwnAgentPart, PartSettings
from rollout.agents.tools import ToolsSettings
from rollout.chat.chat import Chat
from rollout.chat.end_tokens import end_tokens
from rollout.chat.perception import Perception
from rollout.engines.settings import EngineSettings
from rollout.external.external_env import PROGRAM, ProgramOptions
from rollout.wire.model_folder import CodeRefused, companions, pretrained, write_companions


def check(config: RunConfig) -> None:
    """Run every check of a configuration on this machine."""
    for each in Preflight(config).checks():
        each()


class Preflight:
    """The checks of one configuration on this machine, in order; what several of them need is made once.

    Without model, its files are not looked at; without data, its environment is not started: `manta check` leaves out
    what is not on this machine. architecture: the model's configuration, if it is not that in its folder.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        model: bool = True,
        data: bool = True,
        architecture: PretrainedConfig | None = None,
    ) -> None:
        self._config = config
        self._model = model
        self._data = data
        self._architecture = architecture

    def checks(self) -> Iterator[Callable[[], object]]:
        """Each raises an error for the user."""
        config, path = self._config, self._config.learner.model.path
        yield lambda: check_own_parts(config)
        if config.replay is None:
            yield lambda: check_engine(config.engine, config.rollout.gpus_per_worker > 0)
        if self._data:
            yield lambda: self.observations
        if path and self._model:
            yield lambda: self.folder
        if path and (self._model or self._architecture is not None):
            yield lambda: check_trainable(path, self.architecture)
            yield lambda: check_context(path, config.rollout.context_tokens, self.architecture)
            yield lambda: check_architecture(config, self.architecture)
        if self._model:
            yield lambda: self.chat
            if self._data:
                yield self._check_prompts
            yield lambda: check_lora(config, self.folder, self.tokenizer)
        if self._data and config.replay is None:
            yield lambda: check_suites(config)
        if self._model:
            if config.replay is not None:
                yield lambda: replay.check(config, self.tokenizer)
            yield lambda: check_teacher(config, self.tokenizer)
            yield lambda: check_stages(config, self.tokenizer)
        if config.cluster.dashboard_port and not config.cluster.address:
            yield lambda: check_port(config.cluster.dashboard_port)

    @cached_property
    def observations(self) -> list[Observation | None]:
        """The first one of every environment; None for a foreign agent."""
        return [check_environment(each) for each in self._config.environments]

    @cached_property
    def folder(self) -> str:
        """The model's folder on this machine, fetched and whole; empty for a tiny one."""
        path = self._config.learner.model.path
        return check_model(path) if path else ""

    @cached_property
    def architecture(self) -> PretrainedConfig:
        """The model's configuration."""
        model = self._config.learner.model
        return self._architecture or loaded(AutoConfig, self.folder, model.trust_remote_code)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        model = self._config.learner.model
        return check_tokenizer(self.folder, model.trust_remote_code) if model.path else _tiny(self._config)

    @cached_property
    def chat(self) -> Chat:
        """The model's chat."""
        return _chat(self._config, self.folder, self.tokenizer)

    def _check_prompts(self) -> None:
        for environment, observation in zip(self._config.environments, self.observations, strict=True):
            if observation is None:
                check_foreign_agent(environment)
            else:
                check_prompt(self._config, environment, self.chat, observation)


def check_environment(environment: Environment) -> Observation | None:
    """Require an environment and its list of tasks; returns its first observation, None for a foreign agent."""
    observation = first_observation(
        environment.id, environment.options, environment.agent.parts, environment.host
    )
    registry.check_tasks(environment.id, environment.options)
    return observation


def check_foreign_agent(environment: Environment) -> None:
    """Require settings that apply to a foreign agent."""
    agent = environment.agent_section
    if environment.agent.memory != "full" or environment.agent.parts:
        raise ConfigError(
            f"{agent}.memory and {agent}.parts do not apply to a foreign agent, which has its own: use memory = 'full' "
            "and no parts"
        )
    if environment.host.where == "ray":
        raise ConfigError(
            f"{environment.section}.host.where='ray': a foreign agent must run on its worker's node; use 'process'"
        )


def check_suites(config: RunConfig) -> None:
    """Require the tasks of every evaluation. ConfigError names the suite."""
    for suite in suites_of(config):
        for tasks in suite.sets:
            environment = tasks.environment
            try:
                if environment.evaluated != environment.options:  # those of training are checked already
                    registry.check_tasks(environment.id, environment.evaluated)
                tasks.tasks()
            except ConfigError as error:
                raise ConfigError(
                    f"evaluation suite {suite.name!r}: {error}" if suite.name else str(error)
                ) from error


def check_stages(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """What stages learn from must be there: a scripted player, or episodes in this model's tokens."""
    for place, stage in enumerate(config.stages):
        option = f"stages.{place}.source"
        if isinstance(stage.source, RunSource):
            next(past_episodes(stage.source, option))
            replay.require_same_tokens(config, tokenizer, Path(stage.source.path), option)
        elif isinstance(stage.source, DatasetSource):
            check_recorded(stage, stage.source, option)
        else:
            for environment in config.environments:
                registry.player(environment.id)


def check_teacher(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """The teacher of a run that distils one must read the same tokens, as many at once."""
    if (distill := config.learner.algorithm.distill) is not None:
        option, folder = "learner.algorithm.distill.teacher", check_model(model_of(distill.teacher))
        replay.require_same_ids(config, tokenizer, folder, option, distill.teacher)
        architecture = loaded(AutoConfig, folder, config.learner.model.trust_remote_code)
        check_context(distill.teacher, config.rollout.context_tokens, architecture)


def check_recorded(stage: AnyStage, source: DatasetSource, option: str) -> None:
    """Every row must be a conversation, and of the sort that the stage learns from."""
    for place, row in enumerate(recorded(source, option), start=1):
        worths = {each.reward for each in row}
        if isinstance(stage, SftSettings) and 0.0 in worths:
            raise ConfigError(
                f'{option}: row {place} holds an answer to be avoided (rejected, or label false); kind = "sft" learns '
                'every answer. Use kind = "preference" for pairs, "kto" for labels'
            )
        if isinstance(stage, PreferenceSettings | RewardModelSettings) and len(worths) < 2:
            raise ConfigError(
                f"{option}: row {place} holds no pair: it needs columns chosen and rejected; "
                'single answers with a label are learned by kind = "kto"'
            )


def check_engine(engine: EngineSettings, on_gpu: bool) -> None:
    """Require the engine's packages; of a user's own engine its module and signature."""
    try:
        if unfit := engine.placement.unfit(float(on_gpu)):
            raise ValueError(unfit)
        engine.require_here()
    except ValueError as error:
        raise ConfigError(f"engine.kind={engine.kind!r}: {error}") from error


def first_observation(
    env_id: str,
    options: dict[str, Any],
    parts: Sequence[PartSettings] = (),
    host: HostSettings | None = None,
) -> Observation | None:
    """The first observation of an environment with the agent's tools, whose schemas are part of the prompt.

    None for a foreign agent, which is not started here. Raises EnvironmentUnknown.
    """
    if env_id == PROGRAM:
        check_program(options)
        return None
    tools = [part for part in parts if isinstance(part, ToolsSettings | NotebookSettings | OwnAgentPart)]
    try:
        with probe_environment(env_id, options, host, tools) as reset:
            return reset(0)
    except ToolRefused as error:
        raise ConfigError(f"agent.parts: {error}") from error


def check_program(options: dict[str, Any]) -> None:
    """Require valid options of a foreign agent, and its command."""
    command = ProgramOptions.read(options).command
    if command and find_program(name := command[0]) is None:
        raise ConfigError(f"env.options.command: program {name!r} not found; install it or give its path")


def check_model(named: str) -> str:
    """Fetch a model to this machine and require all of its files; returns its folder."""
    return fetch(named, whole=True)


def check_trainable(path: str, architecture: PretrainedConfig) -> None:
    """ConfigError for quantized weights, which cannot be trained."""
    method = getattr(architecture, "quantization_config", None)
    if method is not None:
        raise ConfigError(
            f"model {path}: its weights are quantized and cannot be trained; use the unquantized checkpoint"
        )


def check_context(path: str, context_tokens: int, architecture: PretrainedConfig) -> None:
    """Require a position of the model for every token of the context."""
    config = architecture.get_text_config()
    if not hasattr(config, "max_position_embeddings"):
        raise ConfigError(
            f"model {path}: its family {config.model_type} states no max_position_embeddings, so it is unknown whether "
            f"rollout.context_tokens={context_tokens} fits; choose a pure attention model"
        )
    if (positions := config.max_position_embeddings) < context_tokens:
        raise ConfigError(
            f"model {path} has {positions} positions, but rollout.context_tokens={context_tokens} "
            "(manta eval: --context-tokens); lower it"
        )


def check_architecture(config: RunConfig, architecture: PretrainedConfig) -> None:
    """Require a model that the parallel sizes divide, and routers if they are balanced or replayed."""
    try:
        require_divisible(config, architecture)
        require_mixture_of(architecture, config.learner.model, config.learner.shards)
        require_slices(architecture, config.learner.context_parallel_size)
    except ValueError as error:
        raise ConfigError(f"model {config.learner.model.path}: {error}") from error


def check_tokenizer(path: str, trusted: bool = False) -> PreTrainedTokenizerBase:
    """Require a row of the model for every token; the model may have more rows. Returns the tokenizer.

    The tokenizer is loaded from the files that a checkpoint will contain, written to a scratch folder. Placeholders of
    pictures and sounds that no text prompt contains may lack a row: some families share a tokenizer.
    """
    with TemporaryDirectory(prefix="manta-saved-") as scratch:
        write_companions(companions(Path(path)), Path(scratch))
        rows = loaded(AutoConfig, scratch, trusted, path).get_text_config().vocab_size
        tokenizer: PreTrainedTokenizerBase = loaded(AutoTokenizer, scratch, trusted, path)
    tokenizer.name_or_path = path
    special = {place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    beyond = {
        place: token
        for token, place in tokenizer.get_vocab().items()
        if place >= rows
        and (place not in special or place in used or token in str(tokenizer.chat_template or ""))
    }
    if beyond:
        last = max(beyond)
        raise ConfigError(
            f"model {path} has a vocabulary of {rows}, but its tokenizer one of {len(tokenizer)} (token "
            f"{beyond[last]!r} is id {last}); put the model's own tokenizer into the folder"
        )
    return tokenizer


def check_prompt(config: RunConfig, environment: Environment, chat: Chat, observation: Observation) -> None:
    """Require that the template renders all messages, and that the first prompt and one token fit into the context."""
    prompt = try_conversations(chat, observation, environment.agent)
    if prompt + 1 > config.rollout.context_tokens:
        raise ConfigError(
            f"the first prompt of {environment.id} has {prompt} tokens, which does not fit into "
            f"rollout.context_tokens={config.rollout.context_tokens}; raise it or shorten the environment's text"
        )


def check_lora(config: RunConfig, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Require the layers of the model that are to be adapted. path: of the model's folder, unless it is a tiny one."""
    lora = config.learner.model.lora
    if lora is None:
        return
    with TemporaryDirectory() as folder:
        if config.tiny:  # layers have the same names in any size
            path = folder
            build_tiny(Path(path), tokenizer, layers=1, width=32, heads=1, mlp=32)
        try:
            planned(path, lora, config.learner.model.trust_remote_code)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def check_port(port: int) -> None:
    """Require a free port for the dashboard."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"cluster.dashboard_port={port} is in use on this machine; choose another port, or 0 for no dashboard"
            ) from error


def _chat(config: RunConfig, path: str, tokenizer: PreTrainedTokenizerBase) -> Chat:
    if config.tiny is None:
        perception = Perception.load(path, config.learner.model.trust_remote_code)
        return Chat(tokenizer, perception, check_ends(path))
    pixels = config.tiny.pixels
    return Chat(tokenizer, Perception(tiny_processor(tokenizer, pixels)) if pixels else None)


def check_ends(path: str) -> tuple[int, ...]:
    """Read a model's end tokens. ConfigError for unreadable files."""
    try:
        return end_tokens(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {path}: {error}") from error


def _tiny(config: RunConfig) -> PreTrainedTokenizerBase:
    with TemporaryDirectory() as folder:
        return tiny_tokenizer(config, Path(folder))


def loaded(auto: Any, path: str, trusted: bool = False, named: str = "") -> Any:
    """Load with a transformers Auto class from `path`. ConfigError if that fails.

    trusted: code that comes with the model may be executed. named: the model's name in the error, where it is not path.
    """
    try:
        return pretrained(auto, path, trusted)
    except CodeRefused as error:
        raise ConfigError(f"model {named or path}: {error}") from error
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model {named or path}: {reason} Is it a Hugging Face folder or id?") from error
