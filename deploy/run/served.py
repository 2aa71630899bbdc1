"""Evaluate a model behind an OpenAI-compatible server as the policy."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deploy.config.config_errors import ConfigError
from deploy.run.conditions import Conditions
from envs.served_model import client_options
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec
from rollout.episodes.evaluation import evaluation_specs
from rollout.episodes.group import concurrently, play
from rollout.episodes.pool import EnvironmentPool
from rollout.wire.trajectory import Task, Trajectory

if TYPE_CHECKING:
    from openai import AsyncOpenAI

CONCURRENT = 16  # episodes at once
RETRIES = 3
SECONDS = 120.0  # limit for an answer
_SHOWN = 10  # models that an error names


def is_server(checkpoint: str) -> bool:
    """Whether this names a server instead of a checkpoint."""
    return checkpoint.startswith(("http://", "https://"))


def served_model(url: str, model: str) -> str:
    """The name of the model to ask: `model`, or the only one of the server. ConfigError where that is unclear."""
    if importlib.util.find_spec("openai") is None:
        raise ConfigError("evaluating a server needs the package openai: pip install 'manta-rl[judge]'")
    return asyncio.run(_model(url, model))


async def _model(url: str, model: str) -> str:
    import openai

    async with _client(url) as client:
        try:
            names = [each.id async for each in client.models.list()]
        except openai.NotFoundError:
            names = []  # not every server lists its models
        except openai.OpenAIError as error:
            raise ConfigError(f"the server at {url} does not answer: {error}") from error
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    if model and (not names or model in names):
        return model
    if model:
        raise ConfigError(f"the server at {url} has no model {model!r}; it has {shown}")
    if len(names) != 1:
        raise ConfigError(f"the server at {url} has {shown or 'no list of models'}; name one with --model")
    return names[0]


async def play_served(
    url: str, model: str, tasks: Sequence[Task], conditions: Conditions
) -> list[Trajectory]:
    """Play the samples of every task with the model behind the server, one task after another."""
    from rollout.agents.served import ServedAgent

    pool = EnvironmentPool(host=conditions.host, parts=conditions.agent.parts, reward=conditions.reward)
    limits = EpisodeLimits(conditions.max_turns, conditions.episode_seconds)
    gate = asyncio.Semaphore(CONCURRENT)
    async with _client(url) as client:
        agent = ServedAgent(client, model, conditions.sampling, conditions.agent.memory)

        async def one(spec: EpisodeSpec) -> Trajectory:
            async with gate:
                return await play(spec, pool, agent, limits)

        try:
            specs = evaluation_specs(tasks, conditions.samples, conditions.seed, "server", version=0)
            return await concurrently(one(spec) for spec in specs)
        finally:
            await pool.close()


def _client(url: str) -> AsyncOpenAI:
    import openai

    return openai.AsyncOpenAI(**client_options(url, RETRIES, SECONDS))
