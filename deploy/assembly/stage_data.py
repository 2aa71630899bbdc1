"""What a stage learns from: demonstrations played for it, the episodes of a finished run, or recorded conversations."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path

import pyarrow as pa

from deploy.assembly.build import environment_seed, load_chat
from deploy.assembly.fetching import fetch
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from envs import registry
from envs.datasets.conversations import Conversation, Reciter, RecordedTalk, conversations
from envs.datasets.files import DataError
from learner.stages.settings import DatasetSource, PlayerSource, RunSource
from rollout.buffer.history import History, HistoryError
from rollout.chat.chat import Chat
from rollout.episodes.demonstrations import demonstrate
from rollout.episodes.mixture import Interleaving
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.tasks import TaskStream
from rollout.wire.schema import decode, encode
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory

log = logging.getLogger(__name__)


async def stage_data(config: RunConfig, index: int, path: str) -> list[pa.RecordBatch]:
    """The groups that a stage of the run learns from, as rows. path: of the run's model, whose tokens they are in."""
    source = config.stages[index].source
    if isinstance(source, RunSource):
        return list(past_episodes(source, f"stages.{index}.source"))
    if isinstance(source, DatasetSource):
        return await _recorded(config, source, f"stages.{index}.source", path)
    return await _played(config, index, source, path)


def gather(config: RunConfig, index: int, path: str) -> list[pa.RecordBatch]:
    """The same, in a process that has no event loop."""
    return asyncio.run(stage_data(config, index, path))


def _chat(config: RunConfig, path: str) -> Chat:
    return load_chat(fetch(path), trusted=config.learner.model.trust_remote_code)


async def _played(config: RunConfig, index: int, source: PlayerSource, path: str) -> list[pa.RecordBatch]:
    """Demonstrations of the environments' scripted players, by shares, on tasks that the run's seed decides."""
    chat, context = _chat(config, path), config.rollout.context_tokens
    interleaving = Interleaving([each.share for each in config.environments])
    counts = Counter(interleaving.at(slot)[0] for slot in range(source.episodes))
    groups: list[Group] = []
    for place, environment in enumerate(config.environments):
        seed = environment_seed(config.seed + 1 + index, place)
        tasks = map(TaskStream(environment.id, environment.options, seed), range(counts[place]))
        player = partial(registry.player(environment.id), source.error_rate)
        groups += await demonstrate(
            list(tasks), player, chat, context, environment.agent, first_group=len(groups)
        )
    least = source.min_reward
    kept = [each for each in groups if least is None or each.trajectories[0].reward >= least]
    if not kept:
        raise ConfigError(
            f"stages.{index}.source: no demonstration has a reward of min_reward={least} or more; lower it"
        )
    return [encode(group) for group in kept]


async def _recorded(config: RunConfig, source: DatasetSource, option: str, path: str) -> list[pa.RecordBatch]:
    """The conversations of a data file, one group a row, in the tokens of the run's model.

    They are played as demonstrations, in an environment that says what was said, so that they are encoded as sampled
    episodes are. A row that does not fit into rollout.context_tokens is left out.
    """
    by_row = [*recorded(source, option)]
    talks = [talk for row in by_row for talk in row]
    context = config.rollout.context_tokens
    pool = EnvironmentPool(make=lambda _id, **_options: RecordedTalk(talks))
    played = iter(
        await demonstrate(
            [Task.of("recorded", place) for place in range(len(talks))],
            lambda place: Reciter(talks[place]),
            _chat(config, path),
            context,
            pool=pool,
        )
    )
    rows = [[next(played).trajectories[0] for _ in row] for row in by_row]
    whole = [_group(place, row) for place, row in enumerate(rows) if all(map(_is_whole, row))]
    if not whole:
        raise ConfigError(f"{option}: no row fits into rollout.context_tokens={context}; raise it")
    if left_out := len(rows) - len(whole):
        log.warning(
            "%s: %d of %d rows do not fit into rollout.context_tokens=%d and are left out",
            option,
            left_out,
            len(rows),
            context,
        )
    return [encode(group) for group in whole]


def _is_whole(episode: Trajectory) -> bool:
    """Whether every turn was played, and none of them cut."""
    return episode.end_reason is EndReason.TERMINATED and all(
        turn.finish_reason != "length" for turn in episode.turns
    )


def _group(place: int, episodes: Sequence[Trajectory]) -> Group:
    """The episodes of a row as the siblings of one group."""
    task = Task.of("recorded", place)
    siblings = tuple(
        replace(each, group_id=place, index=index, task=task) for index, each in enumerate(episodes)
    )
    return Group(Slot(place, 0, task, version=0), siblings)


def recorded(source: DatasetSource, option: str) -> Iterator[list[Conversation]]:
    """The conversations of each row. ConfigError, naming the file and line, for a row that is none."""
    try:
        yield from conversations(source.path, source.episodes, source.system)
    except DataError as error:
        raise ConfigError(f"{option}: {error}") from None


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
        wanted = [episode for episode in group.trainable if episode.reward >= least]
        if source.keep == "best_of_group" and wanted:
            wanted = [max(wanted, key=lambda episode: episode.reward)]  # of equal ones the first
        episodes = tuple(islice(wanted, None if most is None else most - found))
        found += len(episodes)
        if episodes:
            yield encode(replace(group, trajectories=tuple(map(Trajectory.unrouted, episodes))))
        if found == most:
            return
    if not found:
        raise ConfigError(
            f"{option}: no episode of {source.path} has a reward of min_reward={source.min_reward} or more; lower it"
        )
