"""An episode that goes on from its durable turns is the episode that was never interrupted."""

from __future__ import annotations

import asyncio
import random
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import OrderEnforcing, TimeLimit
from transformers import PreTrainedTokenizerFast

from envs import registry
from envs.base import text_space
from rollout.agents.agent import Agent, AgentSettings
from rollout.chat.chat import Chat
from rollout.engines.engine import Sampling
from rollout.engines.scripted_engine import Request, ScriptedEngine
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec, NullListener
from rollout.episodes.group import run_group
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.resume import Restart
from rollout.wire.schema import encode_turns, restore_turns
from rollout.wire.trajectory import EndReason, Group, PartialEpisode, Slot, Task, Trajectory, Turn, TurnEnd

SIZE = 4
Row = tuple[Slot, int, Turn, TurnEnd | None, bytes | None]


class Notes(NullListener):
    """Every finished turn, as the recorder would note it, and what became of the durable ones."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.reused = 0
        self.restarts: list[Restart] = []

    def turn_ended(self, place: EpisodeSpec, step: Turn, end: TurnEnd | None, snapshot: bytes | None) -> None:
        self.rows.append((place.slot, place.index, step, end, snapshot))

    def resumed(self, steps: Sequence[Turn]) -> None:
        self.reused += len(steps)

    def restarted(self, why: Restart) -> None:
        self.restarts.append(why)


class Rig:
    """One group of one task, played as often as asked, each time by a new worker's worth of objects."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, task: Task, words: Sequence[str], memory: str, context: int
    ) -> None:
        self.tokenizer, self.words, self.memory, self.context = tokenizer, words, memory, context
        self.slot = Slot(17, 0, task, version=0)
        self.make: Any = registry.make
        self.notes = Notes()

    def play(self, resume_from: dict[int, PartialEpisode] | None = None) -> tuple[Group, list[Request]]:
        engine = ScriptedEngine(self.tokenizer, lambda prompt, rng: rng.choice(self.words), version=3)
        settings = AgentSettings.model_validate({"memory": self.memory})
        agent = Agent(engine, Chat(self.tokenizer), Sampling(max_tokens=8), self.context, settings)
        self.notes = Notes()
        pool = EnvironmentPool(self.make)
        slot = replace(self.slot, attempt=self.slot.attempt + (resume_from is not None))
        limits = EpisodeLimits(max_turns=9, timeout_seconds=30.0)
        group = asyncio.run(run_group(slot, pool, agent, SIZE, limits, 5, "w", self.notes, resume_from))
        return group, engine.requests

    def cut(self, rows: Sequence[Row], turns: Sequence[int]) -> dict[int, PartialEpisode]:
        """The first `turns[index]` turns of every episode, as they come back from the journal."""
        kept = [row for row in rows if row[2].turn < turns[row[1]]]
        return restore_turns(encode_turns(kept, "w"))


def facts(trajectory: Trajectory) -> list[Any]:
    """All of an episode but its timings and its attempt."""
    plain = ("turn", "segment", "observation", "action", "reward", "finish_reason")
    arrays = ("prompt_ids", "action_ids", "behavior_logprobs", "versions")
    steps = [
        [getattr(step, name) for name in plain] + [getattr(step, name).tolist() for name in arrays]
        for step in trajectory.turns
    ]
    return [trajectory.index, trajectory.end_reason, trajectory.success, trajectory.error, steps]


def asked(requests: Sequence[Request]) -> Counter[Any]:
    return Counter(
        (request.prompt_ids, request.sampling.seed, request.sampling.max_tokens) for request in requests
    )


LAKE = Task.of("frozen_lake", 5, {"slippery": True, "max_turns": 7})
MOVES = ("left", "down", "right", "up", "right", "down", "hm")


@pytest.mark.parametrize(
    ("task", "words", "memory", "context"),
    [
        (LAKE, MOVES, "full", 4096),
        (LAKE, MOVES, "last", 4096),
        (Task.of("frozen_lake", 6, {"slippery": True, "view": "map"}), MOVES, "full", 320),  # overflows
        (Task.of("FrozenLake-v1", 7, {"max_episode_steps": 6}), ("0", "1", "2", "3"), "full", 4096),
        (Task.of("Taxi-v4", 8), ("0", "1", "2", "3", "4"), "last", 4096),
    ],
)
def test_an_episode_cut_anywhere_goes_on_as_if_nothing_had_happened(
    tokenizer: PreTrainedTokenizerFast, task: Task, words: Sequence[str], memory: str, context: int
) -> None:
    rig = Rig(tokenizer, task, words, memory, context)
    whole, requests = rig.play()
    rows = rig.notes.rows
    lengths = [len(trajectory.turns) for trajectory in whole.trajectories]
    assert max(lengths) > 1
    assert context > 1000 or EndReason.CONTEXT_OVERFLOW in {t.end_reason for t in whole.trajectories}
    cuts = random.Random(1)
    for _ in range(12):
        turns = [cuts.randint(0, length) for length in lengths]
        group, missing = rig.play(rig.cut(rows, turns))
        assert [facts(t) for t in group.trajectories] == [facts(t) for t in whole.trajectories]
        assert {t.attempt for t in group.trajectories} == {1}
        assert rig.notes.restarts == []
        assert rig.notes.reused == sum(turns)
        assert len(missing) == sum(lengths) - sum(turns), "no finished turn was sampled again"
        assert asked(missing) <= asked(requests)


def test_a_resumed_episode_can_be_cut_and_resumed_again(tokenizer: PreTrainedTokenizerFast) -> None:
    rig = Rig(tokenizer, LAKE, MOVES[:4], "full", 4096)
    whole, _ = rig.play()
    rows = [row for row in rig.notes.rows if row[2].turn < 1]
    for turns in range(2, 8):
        rig.play(restore_turns(encode_turns(rows, "w")))
        rows += [row for row in rig.notes.rows if row[2].turn < turns]
        rig.slot = replace(rig.slot, attempt=rig.slot.attempt + 1)
    group, missing = rig.play(restore_turns(encode_turns(rows, "w")))
    assert [facts(t) for t in group.trajectories] == [facts(t) for t in whole.trajectories]
    assert not missing


class Dice(gym.Env[str, str]):
    """Adds up throws that no seed decides."""

    observation_space = text_space()
    action_space = text_space()

    def __init__(self, offers: bool = True, fails: bool = False) -> None:
        self.spec = EnvSpec("Dice-v0", nondeterministic=not fails)
        self.total = 0
        if offers:
            self.snapshot = lambda: struct.pack("<q", self.total)
            self.restore = self._restore
        self.fails = fails

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        self.total = 0
        return "throw", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.fails:
            raise OSError("the dice are gone")
        self.total += random.randint(1, 1000)
        return f"total {self.total}", 1.0, False, False, {}

    def _restore(self, snapshot: bytes) -> None:
        (self.total,) = struct.unpack("<q", snapshot)


def dice_rig(tokenizer: PreTrainedTokenizerFast, made: list[Dice], **options: Any) -> Rig:
    def make(env_id: str) -> Any:
        made.append(Dice(**options))
        return TimeLimit(OrderEnforcing(made[-1]), max_episode_steps=6)

    rig = Rig(tokenizer, Task.of("dice", 1), ("throw", "again"), "full", 4096)
    rig.make = make
    return rig


def test_a_snapshot_is_gone_on_from_through_the_usual_wrappers(tokenizer: PreTrainedTokenizerFast) -> None:
    made: list[Dice] = []
    rig = dice_rig(tokenizer, made)
    whole, _ = rig.play()
    group, missing = rig.play(rig.cut(rig.notes.rows, [0, 1, 4, 6]))
    assert rig.notes.restarts == []
    assert len(missing) == 6 + 5 + 2
    for turns, before, after in zip([0, 1, 4, 6], whole.trajectories, group.trajectories, strict=True):
        assert after.end_reason is EndReason.TRUNCATED, (
            "the time limit counts the turns of the earlier attempt"
        )
        assert facts(before)[-1][:turns] == facts(after)[-1][:turns]
        said = [int(step.observation.split("total ")[1].split('"')[0]) for step in after.turns[1:]]
        assert said == sorted(set(said)), "the total grows from where it stood"
        if 0 < turns < 6:
            # What the environment said last is what the next turn is asked with.
            assert after.turns[turns].observation == before.turns[turns].observation


def test_what_may_not_repeat_itself_and_left_no_snapshot_starts_again(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    made: list[Dice] = []
    rig = dice_rig(tokenizer, made, offers=False)
    rig.play()
    group, missing = rig.play(rig.cut(rig.notes.rows, [3, 0, 0, 6]))
    assert rig.notes.restarts == [Restart.NONDETERMINISTIC]
    assert rig.notes.reused == 6, "a finished episode is taken as it is"
    assert len(missing) == 18
    assert [len(t.turns) for t in group.trajectories] == [6] * 4


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"observation": '[{"role": "user", "content": "elsewhere"}]'}, Restart.DIVERGED),
        ({"reward": 0.25}, Restart.DIVERGED),
    ],
)
def test_an_environment_that_does_not_repeat_itself_is_noticed(
    tokenizer: PreTrainedTokenizerFast, change: dict[str, Any], why: Restart
) -> None:
    rig = Rig(tokenizer, LAKE, MOVES[:4], "full", 4096)
    whole, _ = rig.play()
    resume_from = rig.cut(rig.notes.rows, [2, 2, 2, 2])
    cut = next(index for index, episode in resume_from.items() if episode.end is None)
    steps = resume_from[cut].turns
    resume_from[cut] = replace(resume_from[cut], turns=(steps[0], replace(steps[1], **change)))
    group, _ = rig.play(resume_from)
    assert rig.notes.restarts == [why]
    assert [facts(t) for t in group.trajectories] == [facts(t) for t in whole.trajectories]


def test_a_replay_that_raises_costs_a_replica_and_not_the_episode(tokenizer: PreTrainedTokenizerFast) -> None:
    made: list[Dice] = []
    rig = dice_rig(tokenizer, made, offers=False)
    rig.play()
    resume_from = rig.cut(rig.notes.rows, [2, 6, 6, 6])
    broken: list[Dice] = []

    def make_first_broken(env_id: str) -> Any:
        broken.append(Dice(offers=False, fails=not broken))
        return TimeLimit(broken[-1], max_episode_steps=6)

    rig.make = make_first_broken
    group, _ = rig.play(resume_from)
    assert rig.notes.restarts == [Restart.FAILED]
    assert len(broken) == 2
    assert group.trajectories[0].end_reason is EndReason.TRUNCATED
