"""Opponents: frozen versions of the run's policies, which play the other seat of a game.

    OpposedReplica   the other seat is played inside the replica, as a scripted opponent would be
    Opponents        engines of frozen versions, each of which serves one version at a time

An environment asks for the opponent's move by the direction `opponent` in an observation's first message (see
envs/base.py).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from envs.base import Observation, messages_of
from envs.hosting.host import EnvironmentFailed, Outcome, Replica, TokenUsage
from rollout.agents.agent import Actor, Agent, ContextOverflow
from rollout.engines.engine import Engine
from rollout.wire.kept_versions import KeptVersions
from rollout.wire.policies import Opponent
from rollout.wire.trajectory import EnvironmentKey, Slot, Task

MOST_MOVES = 1000  # of the opponent between two turns of the policy


@dataclass(frozen=True, slots=True)
class Opposing:
    """Who plays the other seat of an episode, and the seed of its sampling, which siblings share."""

    agent: Actor
    seed: int


class OpposedReplica:
    """A replica whose other seat is played by an opponent: reset and step return when it is the policy's turn."""

    def __init__(self, replica: Replica, opposing: Opposing) -> None:
        self._replica = replica
        self._agent = opposing.agent
        self._seed = opposing.seed
        self._conversation = opposing.agent.begin(opposing.seed)
        self.nondeterministic = replica.nondeterministic
        self.reusable = replica.reusable

    async def reset(self, seed: int) -> Observation:
        self._conversation = self._agent.begin(self._seed)
        observation = await self._replica.reset(seed)
        opened = await self._until_our_turn((observation, 0.0, False, False, {}))
        observation, _, terminated, truncated, _ = opened
        if terminated or truncated:
            raise EnvironmentFailed("the game ended before the policy's first turn")
        return observation

    async def step(self, action: str) -> Outcome:
        return await self._until_our_turn(await self._replica.step(action))

    def sampled(self, sampled: TokenUsage) -> None:
        self._replica.sampled(sampled)

    def snapshot(self) -> bytes | None:
        """None: the opponent's conversation is no part of the environment's state. Episodes are replayed instead."""
        return None

    async def restore(self, snapshot: bytes) -> None:
        raise RuntimeError("restore() was called, but an opposed replica has no snapshots")

    async def close(self) -> None:
        await self._replica.close()

    async def _until_our_turn(self, outcome: Outcome) -> Outcome:
        """Let the opponent move until it is the policy's turn or the game is over; rewards add up."""
        observation, reward, terminated, truncated, info = outcome
        for _ in range(MOST_MOVES):
            said = messages_of(observation)
            if terminated or truncated or not said[0].pop("opponent", False):
                return observation, reward, terminated, truncated, info
            turn = await self._agent.turn(self._conversation, said)
            if isinstance(turn, ContextOverflow):
                raise EnvironmentFailed(
                    f"the opponent's context is full: {turn.prompt_tokens} of {turn.context_tokens} tokens; raise "
                    "rollout.context_tokens"
                )
            observation, more, terminated, truncated, later = await self._replica.step(turn.action)
            reward, info = reward + more, info | later
        raise EnvironmentFailed(f"the policy has no turn within {MOST_MOVES} moves of its opponent")


@dataclass(slots=True, eq=False)
class Seat:
    """An engine of one policy, and its agents: of single environments, and of all others."""

    engine: Engine
    agents: Mapping[EnvironmentKey, Agent]
    others: Agent
    version: int = -1
    users: int = 0
    used: int = field(default=0)  # number of its last use, for the least recent one

    def agent(self, task: Task) -> Agent:
        return self.agents.get(task.environment, self.others)


class Opponents:
    """The opponents of one worker's episodes. All calls come from one event loop.

    start: starts an engine of a policy, by its name and the number of the engine. versions: what may be loaded. most:
    engines for each policy, which `begin` starts. Groups get their opponents in the order in which they ask.
    """

    def __init__(
        self,
        start: Callable[[str, int], Awaitable[Seat]],
        versions: Mapping[str, KeptVersions],
        most: int,
    ) -> None:
        self._start = start
        self._versions = versions
        self._most = most
        self._seats: dict[str, list[Seat]] = defaultdict(list)
        self._first = asyncio.Lock()  # the caller that is served next
        self._left = asyncio.Event()
        self._uses = 0

    async def begin(self, policies: Iterable[str]) -> None:
        """Start all engines of these policies: later, while episodes wait, a start would block the event loop."""
        for name in policies:
            for number in range(self._most):
                self._seats[name].append(await self._start(name, number))

    @asynccontextmanager
    async def playing(self, opponent: Opponent, task: Task) -> AsyncIterator[Agent]:
        """The agent of a frozen version for the length of the block. Raises WeightMismatch and VersionMissing."""
        async with self._first:
            seat = await self._seat(opponent)
            seat.users += 1
            self._uses += 1
            seat.used = self._uses
        try:
            yield seat.agent(task)
        finally:
            seat.users -= 1
            self._left.set()

    async def close(self) -> None:
        """Close all engines."""
        for seat in (seat for seats in self._seats.values() for seat in seats):
            await seat.engine.close()
        self._seats.clear()

    async def _seat(self, opponent: Opponent) -> Seat:
        seats = self._seats[opponent.policy]
        if not seats:
            raise RuntimeError(f"{opponent} is met, but no engine of {opponent.policy} was started")
        while True:
            self._left.clear()
            for seat in seats:
                if seat.version == opponent.version:
                    return seat
            if idle := [seat for seat in seats if not seat.users]:
                return await self._load(min(idle, key=lambda seat: seat.used), opponent)
            await self._left.wait()

    async def _load(self, seat: Seat, opponent: Opponent) -> Seat:
        update = self._versions[opponent.policy].open(opponent.version)
        update.manifest.require_policy(opponent.policy, seat.engine.name)
        seat.version = -1
        await seat.engine.sync(update)
        seat.version = opponent.version
        return seat


@asynccontextmanager
async def opposed(slot: Slot, opponents: Opponents | None) -> AsyncIterator[Agent | None]:
    """Who plays the other seat of a group for the length of the block; None: nobody of the run."""
    if slot.opponent is None:
        yield None
        return
    if opponents is None:
        raise RuntimeError(f"group {slot.group_id} meets {slot.opponent}, but its worker has no opponents")
    async with opponents.playing(slot.opponent, slot.task) as agent:
        yield agent
