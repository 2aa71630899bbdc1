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

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from deploy.assembly.build import probe_environment
from deploy.assembly.conversations import try_conversations
from deploy.assembly.models import tiny_tokenizer
from deploy.assembly.stage_data import past_episodes, recorded
from deploy.assembly.suites import suites_of
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.environments import Environment
from deploy.config.own_parts import check_own_parts
from deploy.run import replay
from deploy.run.model_checks import (
    check_architecture,
    check_context,
    check_ends,
    check_lora,
    check_model,
    check_teacher,
    check_tokenizer,
    check_trainable,
    loaded,
)
from envs import registry
from envs.base import Observation
from envs.child_process import find_program
from envs.hosting.host import HostSettings
from envs.tools.tool import ToolRefused
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
from rollout.chat.perception import Perception
from rollout.engines.settings import EngineSettings
from rollout.external.external_env import PROGRAM, ProgramOptions


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
        if config.replay is None and (config.workers or config.league is not None):
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


def check_prompt(config: RunConfig, environment: Environment, chat: Chat, observation: Observation) -> None:
    """Require that the template renders all messages, and that the first prompt and one token fit into the context."""
    prompt = try_conversations(chat, observation, environment.agent)
    if prompt + 1 > config.rollout.context_tokens:
        raise ConfigError(
            f"the first prompt of {environment.id} has {prompt} tokens, which does not fit into "
            f"rollout.context_tokens={config.rollout.context_tokens}; raise it or shorten the environment's text"
        )


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


def _tiny(config: RunConfig) -> PreTrainedTokenizerBase:
    with TemporaryDirectory() as folder:
        return tiny_tokenizer(config, Path(folder))
