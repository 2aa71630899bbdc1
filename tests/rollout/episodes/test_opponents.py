"""Opponents move inside the replica, each with exactly the version that the slot names."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.base import for_opponent
from envs.hosting.host import EnvironmentFailed, TokenUsage
from rollout.agents.agent import ContextOverflow, Conversation
from rollout.episodes.opponents import Opponents, OpposedReplica, Opposing, Seat, opposed
from rollout.wire.kept_versions import KeptVersions, VersionMissing
from rollout.wire.policies import Opponent
from rollout.wire.trajectory import Slot, Task
from rollout.wire.weights import (
    Probe,
    TensorSpec,
    WeightManifest,
    WeightMismatch,
    WeightUpdate,
    checksum,
    inline,
)

TASK = Task.of("count", 1)


class Said:
    """An agent that answers what it is told and notes what it saw."""

    def __init__(self, *words: str) -> None:
        self.words, self.saw = list(words), list[Any]()

    def begin(self, seed: int) -> Conversation:
        return Conversation(seed)

    def recall(self, conversation: Conversation, turn: Any) -> None:
        raise AssertionError("an opponent's turns are not stored")

    async def turn(self, conversation: Conversation, observation: Any) -> Any:
        self.saw.append((conversation.seed, observation))
        if not self.words:
            return ContextOverflow(9, 8)
        return type("Turn", (), {"action": self.words.pop(0)})()


class Game:
    """A replica that gives out prepared outcomes and notes the actions."""

    nondeterministic, reusable = False, True

    def __init__(self, opening: Any, *outcomes: Any) -> None:
        self.opening, self.outcomes, self.actions = opening, list(outcomes), list[str]()

    async def reset(self, seed: int) -> Any:
        return self.opening

    async def step(self, action: str) -> Any:
        self.actions.append(action)
        return self.outcomes.pop(0)

    def sampled(self, sampled: TokenUsage) -> None: ...
    def snapshot(self) -> bytes | None:
        return b"state"

    async def restore(self, snapshot: bytes) -> None: ...
    async def close(self) -> None: ...


def test_the_opponent_moves_until_it_is_ones_own_turn_and_rewards_add_up() -> None:
    async def play() -> None:
        game = Game(
            for_opponent("a"),
            ("b", 0.5, False, False, {}),
            (for_opponent("c"), 0.25, False, False, {"success": False, "costs": {"x": 1.0}}),
            (for_opponent("d"), 1.0, False, False, {}),
            ("over", 2.0, True, False, {"success": True}),
        )
        agent = Said("first", "second", "third")
        replica = OpposedReplica(game, Opposing(agent, 7))
        assert await replica.reset(3) == "b"
        outcome = await replica.step("own")
        assert outcome == ("over", 3.25, True, False, {"success": True, "costs": {"x": 1.0}})
        assert game.actions == ["first", "own", "second", "third"]
        assert agent.saw == [(7, [{"role": "user", "content": text}]) for text in "acd"]
        assert replica.snapshot() is None, "the opponent's conversation is no part of the environment's state"

    asyncio.run(play())


def test_a_game_that_never_comes_to_ones_own_turn_has_failed() -> None:
    over = Game(for_opponent("a"), ("x", 0.0, True, False, {}))
    with pytest.raises(EnvironmentFailed, match="ended before the policy's first turn"):
        asyncio.run(OpposedReplica(over, Opposing(Said("go"), 0)).reset(0))
    with pytest.raises(
        EnvironmentFailed, match=r"context is full: 9 of 8 tokens; raise rollout\.context_tokens"
    ):
        asyncio.run(OpposedReplica(Game(for_opponent("a")), Opposing(Said(), 0)).reset(0))


def version(number: int, policy: str = "solver") -> WeightUpdate:
    array = np.full(8, number, dtype=np.uint8)
    spec = TensorSpec("w", "float32", (2,), checksum(array))
    manifest = WeightManifest(number, (spec,), Probe((1, 2), (-0.5,), 0.1), policy=policy)
    return WeightUpdate(manifest, inline([array]))


def test_a_kept_version_comes_back_with_its_bytes_and_others_go(tmp_path: Path) -> None:
    kept = KeptVersions(tmp_path / "versions")
    for number in range(4):
        kept.keep(version(number))
    again = kept.open(2)
    assert again.manifest == version(2).manifest
    again.verify()
    kept.keep_only({0, 2, 9})
    assert kept.versions == [0, 2] and len(list((tmp_path / "versions").iterdir())) == 4
    with pytest.raises(VersionMissing, match=r"version 1 is not kept: .*version-00000001\.json"):
        kept.open(1)
    (tmp_path / "versions" / "version-00000002.bytes").write_bytes(bytes(8))
    with pytest.raises(WeightMismatch, match="tensor w arrived with another checksum"):
        kept.open(2).verify()


class Loading:
    """An engine that notes which versions it was given."""

    def __init__(self, name: str) -> None:
        self.name, self.version, self.loaded = name, -1, list[int]()

    async def sync(self, update: WeightUpdate) -> None:
        await asyncio.sleep(0)
        update.verify()
        self.version = update.version
        self.loaded.append(update.version)

    async def close(self) -> None:
        self.name = "closed"


def opponents(folder: Path, most: int) -> tuple[Opponents, list[Loading]]:
    kept, engines = KeptVersions(folder), list[Loading]()
    for number in range(4):
        kept.keep(version(number))

    async def start(policy: str, number: int) -> Seat:
        engines.append(Loading(f"{policy}-{number}"))
        agent: Any = engines[-1]
        return Seat(agent, {}, agent)

    starting: Callable[[str, int], Awaitable[Seat]] = start
    return Opponents(starting, {"solver": kept}, most), engines


def test_each_group_meets_its_version_on_few_engines(tmp_path: Path) -> None:
    async def play() -> None:
        everyone, engines = opponents(tmp_path, most=2)
        await everyone.begin(["solver"])
        playing, largest = 0, 0

        async def group(number: int) -> None:
            nonlocal playing, largest
            async with everyone.playing(Opponent("solver", number), TASK) as agent:
                playing += 1
                largest = max(largest, playing)
                for _ in range(5):
                    assert agent.version == number  # type: ignore[attr-defined]
                    await asyncio.sleep(0)
                playing -= 1

        async with asyncio.timeout(30):
            await asyncio.gather(*(group(number) for number in (0, 1, 0, 1, 2, 3, 2, 0, 3)))
        assert len(engines) == 2 and largest >= 2
        await everyone.close()
        assert [engine.name for engine in engines] == ["closed", "closed"]

    asyncio.run(play())


def test_versions_that_are_loaded_are_not_loaded_again(tmp_path: Path) -> None:
    async def play() -> list[list[int]]:
        everyone, engines = opponents(tmp_path, most=2)
        await everyone.begin(["solver"])
        for number in (0, 1, 0, 1, 2, 1, 2):
            async with everyone.playing(Opponent("solver", number), TASK):
                pass
        return [engine.loaded for engine in engines]

    assert asyncio.run(play()) == [[0, 2], [1]], "the engine whose last use is oldest gives way"


def test_an_opponent_that_is_not_what_the_slot_names_ends_the_run(tmp_path: Path) -> None:
    async def meet(slot: Slot, who: Opponents | None) -> None:
        if who is not None:
            await who.begin(["solver"])
        async with opposed(slot, who):
            pass

    everyone, _ = opponents(tmp_path, most=1)
    KeptVersions(tmp_path).keep(version(1, policy="asker"))
    slot = Slot(4, 0, TASK, 1, "asker", Opponent("solver", 1))
    with pytest.raises(
        WeightMismatch, match=r"version 1 is of policy 'asker', but the engine serves 'solver'"
    ):
        asyncio.run(meet(slot, everyone))
    with pytest.raises(RuntimeError, match=r"group 4 meets solver@1, but its worker has no opponents"):
        asyncio.run(meet(slot, None))
