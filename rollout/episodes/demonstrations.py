"""Demonstrations: a scripted player in the agent's place, its episodes in the same words as sampled ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import numpy as np

from envs.base import Observation
from envs.hosting.host import EnvironmentFailed
from envs.own_frames import told
from envs.user_functions import awaited
from rollout.agents.agent import Agent, AgentSettings, ContextOverflow, Conversation, Turn
from rollout.buffer.failures import TooManyFailures, cause_of
from rollout.chat.chat import Chat
from rollout.engines.engine import Completion, Sampling
from rollout.episodes.episode import Limits, Place
from rollout.episodes.group import play
from rollout.episodes.pool import EnvironmentPool
from rollout.wire.trajectory import Group, Slot, Step, Task


class Player(Protocol):
    """Knows an environment well enough to act in it."""

    def act(self, observation: Observation) -> str: ...


class DemonstrationError(TooManyFailures):
    """No demonstration could be played to its end."""


async def demonstrate(
    tasks: Sequence[Task],
    player_factory: Callable[[int], Player],
    chat: Chat,
    context_tokens: int,
    settings: AgentSettings | None = None,
    limits: Limits | None = None,
    pool: EnvironmentPool | None = None,
) -> list[Group]:
    """Play every task once; groups of one, in order of `tasks`, with behavior logprobs and versions of 0.

    player_factory is called with a task's seed. Failed episodes are among the groups (never trainable); raises
    DemonstrationError with the last error when there is nothing else.
    """
    played = demonstrations(tasks, player_factory, chat, context_tokens, settings, limits, pool)
    groups = [group async for group in played]
    if groups and not any(group.trainable for group in groups):
        error = groups[-1].trajectories[0].error or ""
        raise DemonstrationError(
            f"all {len(groups)} demonstrations failed; the last: {cause_of(error)}", error
        )
    return groups


async def demonstrations(
    tasks: Sequence[Task],
    player_factory: Callable[[int], Player],
    chat: Chat,
    context_tokens: int,
    settings: AgentSettings | None = None,
    limits: Limits | None = None,
    pool: EnvironmentPool | None = None,
) -> AsyncIterator[Group]:
    """The groups of `demonstrate` one by one, for more than fit into memory."""
    limits = limits or Limits(max_turns=context_tokens, seconds=60.0)
    replicas = pool or EnvironmentPool()
    try:
        for index, task in enumerate(tasks):
            slot = Slot(index, 0, task, version=0)
            actor = Demonstrator(player_factory(task.seed), chat, context_tokens, settings)
            place = Place(slot, 0, seed=0, worker="demonstration")
            yield Group(slot, (await play(place, replicas, actor, limits),))
    finally:
        if pool is None:
            await replicas.close()


class Demonstrator:
    """An `Actor` whose sampled tokens are a player's words; all else is an agent's doing."""

    def __init__(
        self, player: Player, chat: Chat, context_tokens: int, settings: AgentSettings | None = None
    ) -> None:
        self._hand = _Hand(player, chat)
        self._agent = Agent(self._hand, chat, Sampling(max_tokens=context_tokens), context_tokens, settings)

    def begin(self, seed: int) -> Conversation:
        return self._agent.begin(seed)

    def recall(self, conversation: Conversation, step: Step) -> None:
        self._agent.recall(conversation, step)

    async def turn(self, conversation: Conversation, observation: Observation) -> Turn | ContextOverflow:
        self._hand.observation = observation
        return await self._agent.turn(conversation, observation)


class _Hand:
    """Writes what the player answers to `observation`, which is set before every request."""

    def __init__(self, player: Player, chat: Chat) -> None:
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
        except Exception as error:  # a player is anybody's code, as the environment is that it comes with
            raise EnvironmentFailed(f"the player failed: {told(error)}") from error
        ids = self._chat.encode_action(said)
        kept = np.array(ids[: sampling.max_tokens], dtype=np.int32)
        cut = len(ids) > sampling.max_tokens
        zeros = np.zeros(len(kept), dtype=np.int32)
        return Completion(kept, zeros.astype(np.float32), zeros, "length" if cut else "stop")
