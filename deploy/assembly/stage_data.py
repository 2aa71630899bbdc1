"""What a stage learns from: demonstrations played for it, or the episodes of a finished run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from math import inf
from pathlib import Path

import pyarrow as pa

from deploy.assembly.build import load_chat
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from envs import registry
from learner.stages.settings import PlayerSource, RunSource
from rollout.buffer.history import History, HistoryError
from rollout.episodes.demonstrations import demonstrate
from rollout.episodes.tasks import TaskStream
from rollout.wire.schema import decode, encode


async def stage_data(config: RunConfig, index: int, path: str) -> list[pa.RecordBatch]:
    """The groups that a stage of the run learns from, as rows. path: of the run's model, whose tokens they are in."""
    source = config.stages[index].source
    if isinstance(source, RunSource):
        return list(past_episodes(source, f"stages.{index}.source"))
    return await _played(config, index, source, path)


async def _played(config: RunConfig, index: int, source: PlayerSource, path: str) -> list[pa.RecordBatch]:
    """Demonstrations of the environment's scripted player, on tasks that are a function of the run's seed."""
    stream = TaskStream(config.env.id, config.env.options, config.seed + 1 + index)
    player = registry.player(config.env.id)
    groups = await demonstrate(
        [stream(place) for place in range(source.episodes)],
        lambda seed: player(source.error_rate, seed),
        load_chat(path),
        config.rollout.context_tokens,
        config.agent,
    )
    return [encode(group) for group in groups]


def past_episodes(source: RunSource, option: str) -> Iterator[pa.RecordBatch]:
    """The groups of a finished run, one by one, with those of their episodes that the source asks for.

    option: the source's name in the recipe. ConfigError where the folder is no run's, or no episode is left.
    """
    try:
        batches = History(Path(source.path)).groups()
    except HistoryError as error:
        raise ConfigError(f"{option}: {error}") from None
    least = -inf if source.min_reward is None else source.min_reward
    found, most = 0, source.episodes
    for group in map(decode, batches):
        wanted = (episode for episode in group.trainable if episode.reward >= least)
        episodes = tuple(islice(wanted, None if most is None else most - found))
        found += len(episodes)
        if episodes:
            yield encode(replace(group, trajectories=episodes))
        if found == most:
            return
    if not found:
        raise ConfigError(
            f"{option}: no episode of {source.path} has a reward of min_reward={source.min_reward} or more; lower it"
        )
