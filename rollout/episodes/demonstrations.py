"""Demonstrations: episodes of a scripted player instead of the policy, encoded like sampled ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import numpy as np

from envs.base import Observation, messages_of
from envs.code_lines import describe_error
from envs.hosting.host import EnvironmentFailed
from envs.user_functions import awaited
from rollout.agents.agent import Agent, AgentSettings, ContextOverflow, Conversation, SampledTurn
from rollout.buffer.failures import TooManyFailures, cause_of
from rollout.chat.chat import Chat
from rollout.engines.engine import Completion, Sampling
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec
from rollout.episodes.group import play
from rollout.episodes.pool import EnvironmentPool
from rollout.wire.trajectory import Group, Slot, Task, Turn


class ScriptedPlayer(Protocol):
    """A program that plays an environment."""

    def act(self, observation: Observation) -> str: ...


class DemonstrationError(TooManyFailures):
    """All demonstrations failed."""


async def demonstrate(
    tasks: Sequence[Task],
    player_factory: Callable[[int], ScriptedPlayer],
    chat: Chat,
    context_tokens: int,
    settings: AgentSettings | None = None,
    limits: EpisodeLimits | None = None,
    pool: EnvironmentPool | None = None,
    first_group: int = 0,
) -> list[Group]:
    """Play every task once; returns groups of one, in order of `tasks`, with behavior logprobs and versions of 0.

    player_factory: called with a task's seed. first_group: id of the first group. Failed episodes are included and
    never trainable. Raises DemonstrationError with the last error if all failed.
    """
    played = demonstrations(tasks, player_factory, chat, context_tokens, settings, limits, pool, first_group)
    groups = [group async for group in played]
    if groups and not any(group.trainable for group in groups):
        error = groups[-1].trajectories[0].error or ""
        raise DemonstrationError(
            f"all {len(groups)} demonstrations failed; the last: {cause_of(error)}", error
        )
    return groups


async def demonstrations(
    tasks: Sequence[Task],
    player_factory: Callable[[int], ScriptedPlayer],
    chat: Chat,
    context_tokens: int,
    settings: AgentSettings | None = None,
    limits: EpisodeLimits | None = None,
    pool: EnvironmentPool | None = None,
    first_group: int = 0,
) -> AsyncIterator[Group]:
    """Yield the groups of `demonstrate` one by one, for more than fit into memory."""
    limits = limits or EpisodeLimits(max_turns=context_tokens, timeout_seconds=60.0)
    replicas = pool or EnvironmentPool()
    try:
        for group_id, task in enumerate(tasks, first_group):
            slot = Slot(group_id, 0, task, version=0)
            actor = Demonstrator(player_factory(task.seed), chat, context_tokens, settings)
            spec = EpisodeSpec(slot, 0, seed=0, worker="demonstration")
            yield Group(slot, (await play(spec, replicas, actor, limits),))
    finally:
        if pool is None:
            await replicas.close()


class Demonstrator:
    """An `Actor` whose sampled tokens are a player's answers; everything else is done by an agent."""

    def __init__(
        self, player: ScriptedPlayer, chat: Chat, context_tokens: int, settings: AgentSettings | None = None
    ) -> None:
        self._engine = _PlayerEngine(player, chat)
        self._agent = Agent(self._engine, chat, Sampling(max_tokens=context_tokens), context_tokens, settings)

    def begin(self, seed: int) -> Conversation:
        return self._agent.begin(seed)

    def recall(self, conversation: Conversation, turn: Turn) -> None:
        self._agent.recall(conversation, turn)

    async def turn(
        self, conversation: Conversation, observation: Observation
    ) -> SampledTurn | ContextOverflow:
        messages = messages_of(observation)
        messages[0].pop("opponent", None)  # the player moves for both seats of a game
        self._engine.observation = observation
        return await self._agent.turn(conversation, messages)


class _PlayerEngine:
    """An engine that generates the player's answer to `observation`, which is set before every request."""

    def __init__(self, player: ScriptedPlayer, chat: Chat) -> None:
        self.name = "demonstration"
        self.version = 0
        self.observation: Observation = ""
        self._player = player
        self._chat = chat

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, images: Sequence[str] = ()
    ) -> Completion:
        try:
            said = await awaited(self._player.act(self.observation))
        except Exception as error:  # foreign code, like its environment
            raise EnvironmentFailed(f"the player failed: {describe_error(error)}") from error
        ids = self._chat.encode_action(said)
        kept = np.array(ids[: sampling.max_tokens], dtype=np.int32)
        cut = len(ids) > sampling.max_tokens
        zeros = np.zeros(len(kept), dtype=np.int32)
        return Completion(kept, zeros.astype(np.float32), zeros, "length" if cut else "stop")
