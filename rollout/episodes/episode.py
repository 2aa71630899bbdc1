"""One episode: environment and agent in turns until exactly one of them, or a limit, ends it."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from envs.base import Info, Observation, as_number, end_behind, named_rewards, seat_of
from envs.gate import time_limit
from envs.hosting.host import EnvironmentFailed, Replica, Sampled
from envs.tools.tool_env import answers_by_reason
from rollout.agents.agent import Actor, ContextOverflow, Conversation, Turn, as_messages
from rollout.chat.chat import ChatError
from rollout.engines.engine import EngineFailed
from rollout.episodes.pool import asking
from rollout.episodes.resume import Restart, Standing, bring_back, seal
from rollout.wire.trajectory import EndReason, EpisodeSoFar, Slot, Step, Task, Trajectory, TurnEnd

_LARGEST = float(np.finfo(np.float32).max)  # of a reward


@dataclass(frozen=True, slots=True)
class Limits:
    """What the runner allows an episode, whatever its environment allows."""

    max_turns: int
    seconds: float  # wall clock; waits for the engine count, waits at a gate (envs.gate) do not


@dataclass(frozen=True, slots=True)
class Place:
    """Where an episode belongs: its slot, its index among its siblings, and the seed of all its sampling."""

    slot: Slot
    index: int
    seed: int
    worker: str = ""
    evaluation: bool = False  # played to be measured: no part learns from it
    apart: bool = False  # a worker was lost while it was played: its environment gets a process of its own

    @property
    def task(self) -> Task:
        return self.slot.task


class EpisodeLimitExceeded(RuntimeError):
    """A limit of the runner was hit that says nothing about the agent: the episode is no evidence."""


class Watch(Protocol):
    """Whoever is told how an episode goes, and may ask it to stop."""

    @property
    def halted(self) -> bool:
        """Whether the episode is to end before its next turn; it is then CANCELLED, and may go on elsewhere."""
        ...

    def turn_ended(self, place: Place, step: Step, end: TurnEnd | None, snapshot: bytes | None) -> None:
        """A turn was sampled and acted on. end: where it was the episode's last."""
        ...

    def answered(self, calls: Mapping[str, int]) -> None:
        """A turn's tool calls were, so many by reason (`envs.tools.tool_env.Reason`)."""
        ...

    def resumed(self, steps: Sequence[Step]) -> None:
        """An episode goes on after `steps`, sampled by an earlier attempt; or they were all of it."""
        ...

    def restarted(self, why: Restart) -> None:
        """An episode starts again although turns of it are durable."""
        ...


class Unwatched:
    """A `Watch` that looks away."""

    halted = False

    def turn_ended(self, place: Place, step: Step, end: TurnEnd | None, snapshot: bytes | None) -> None:
        pass

    def answered(self, calls: Mapping[str, int]) -> None:
        pass

    def resumed(self, steps: Sequence[Step]) -> None:
        pass

    def restarted(self, why: Restart) -> None:
        pass


async def run_episode(
    replica: Replica,
    agent: Actor,
    place: Place,
    limits: Limits,
    watch: Watch | None = None,
    so_far: EpisodeSoFar | None = None,
) -> Trajectory:
    """Play `place.task` once; the task's seed fixes the instance. so_far: an unfinished episode to go on with.

    Never raises for what an environment, an engine or a limit does: that is a FAILED trajectory with the traceback and
    the steps so far. CannotGoOn where `so_far` leads nowhere. Anything else (a bug of ours, an engine that died,
    cancellation) propagates.
    """
    episode = _Episode(replica, agent, place, watch or Unwatched())
    try:
        try:
            async with time_limit(limits.seconds) as clock:
                end_reason = await episode.play(limits.max_turns, so_far)
        except TimeoutError:
            if not clock.expired():
                raise
            raise EpisodeLimitExceeded(
                f"{place.task.env_id} (seed {place.task.seed}): the episode took longer than {limits.seconds:g} s "
                f"(episode_seconds) and had played {len(episode.steps)} turns"
            ) from None
    except (EnvironmentFailed, EngineFailed, ChatError, EpisodeLimitExceeded) as error:
        return failed(place, error, tuple(episode.steps))
    return _trajectory(place, tuple(episode.steps), end_reason, success=episode.success)


def failed(place: Place, error: Exception, steps: tuple[Step, ...] = ()) -> Trajectory:
    """The record of an episode that infrastructure ended."""
    return _trajectory(place, steps, EndReason.FAILED, error="".join(traceback.format_exception(error)))


def finished(place: Place, steps: tuple[Step, ...], end: TurnEnd) -> Trajectory:
    """The record of an episode that an earlier attempt played to its end."""
    return _trajectory(place, steps, end.end_reason, success=end.success)


class _Episode:
    """The state of an episode while it runs: steps are kept here so that a failure does not lose them."""

    def __init__(self, replica: Replica, agent: Actor, place: Place, watch: Watch) -> None:
        self.steps: list[Step] = []
        self.success: bool | None = None
        self._ended: Info | None = None  # an end that lies behind
        self._replica = replica
        self._agent = agent
        self._place = place
        self._watch = watch
        self._reset_seconds = 0.0

    async def play(self, max_turns: int, so_far: EpisodeSoFar | None) -> EndReason:
        conversation = self._agent.begin(self._place.seed)
        observation = await (self._go_on(conversation, so_far) if so_far and so_far.steps else self._reset())
        for number in range(len(self.steps), max_turns):
            if self._watch.halted:
                return EndReason.CANCELLED
            turn = await self._agent.turn(conversation, observation)
            if isinstance(turn, ContextOverflow):
                return self._overflow(turn)
            said, cut = len(turn.completion.token_ids), turn.completion.finish_reason == "length"
            sampled = Sampled(len(conversation.ids) - said, said, cut)
            observation, end_reason = await self._act(number, turn, sampled, last=number + 1 == max_turns)
            if end_reason is not None:
                return end_reason
        return self._end(EndReason.TRUNCATED)

    async def _reset(self) -> Observation:
        began = time.perf_counter()
        with asking(self._place.task, "reset"):
            observation = await self._replica.reset(self._place.task.seed)
            as_messages(observation)
        self._reset_seconds = time.perf_counter() - began
        return observation

    async def _go_on(self, conversation: Conversation, so_far: EpisodeSoFar) -> Observation:
        standing = await bring_back(self._replica, self._place.task, so_far)
        for step in so_far.steps:
            self._agent.recall(conversation, step)
        self.steps = list(so_far.steps)
        self.success, self._ended = standing.success, standing.ended
        self._watch.resumed(so_far.steps)
        return standing.observation

    async def _act(
        self, number: int, turn: Turn, sampled: Sampled, last: bool
    ) -> tuple[Observation, EndReason | None]:
        """One environment step, recorded. The reset counts as the first step's environment time."""
        task = self._place.task
        began = time.perf_counter() - (self._reset_seconds if number == 0 else 0.0)
        try:
            with asking(task, f"step {number}"):
                self._replica.sampled(sampled)
                observation, reward, terminated, truncated, info = await self._replica.step(turn.action)
                reward = as_number(reward, "the reward")
                as_messages(observation)
                named, seat = named_rewards(info), seat_of(info)
                _require_finite({"the reward": reward} | (named or {}))
                end_reason = _end_reason(terminated, truncated, info)
                snapshot = None if last or end_reason else self._replica.snapshot()
        except EnvironmentFailed:
            # The action that broke the environment is what a person will look for; it has earned nothing.
            self.steps.append(_step(number, turn, 0.0, time.perf_counter() - began))
            raise
        step = _step(number, turn, reward, time.perf_counter() - began, named, seat)
        self.steps.append(step)
        if info.get("success") is not None:
            self.success = bool(info["success"])
        self._ended = end_behind(info).get("ended", self._ended)
        if last or end_reason is not None:
            end_reason = self._end(end_reason or EndReason.TRUNCATED)
        if calls := answers_by_reason(info):
            self._watch.answered(calls)
        standing = Standing(observation, self.success, self._ended)
        sealed = None if snapshot is None else seal(standing, snapshot)
        end = None if end_reason is None else TurnEnd(end_reason, self.success)
        self._watch.turn_ended(self._place, step, end, sealed)
        return observation, end_reason

    def _overflow(self, overflow: ContextOverflow) -> EndReason:
        if not self.steps:
            task = self._place.task
            raise EpisodeLimitExceeded(
                f"{task.env_id} (seed {task.seed}): the first prompt has {overflow.prompt_tokens} tokens "
                f"and leaves no room to answer in context_tokens={overflow.context_tokens}"
            )
        return self._end(EndReason.CONTEXT_OVERFLOW)

    def _end(self, reason: EndReason) -> EndReason:
        """How an episode ends that has come to this: as what lies behind already did."""
        ended = self._ended
        if ended is None:
            return reason
        self.success = ended.get("success", self.success)
        return _end_reason(bool(ended.get("terminated")), bool(ended.get("truncated")), ended) or reason


def _require_finite(rewards: dict[str, float]) -> None:
    """ValueError for a reward that is no number, or none as it is stored."""
    for name, reward in rewards.items():
        if not abs(reward) <= _LARGEST:
            raise ValueError(f"{name} is {reward}; a reward has to be a finite float32")


def _end_reason(terminated: bool, truncated: bool, info: dict[str, Any]) -> EndReason | None:
    if (terminated or truncated) and info.get("malformed"):
        return EndReason.MALFORMED
    if terminated:
        return EndReason.TERMINATED
    return EndReason.TRUNCATED if truncated else None


def _step(
    number: int,
    turn: Turn,
    reward: float,
    env_seconds: float,
    named: dict[str, float] | None = None,
    seat: int | None = None,
) -> Step:
    return Step(
        turn=number,
        segment=turn.segment,
        observation=turn.observation,
        action=turn.action,
        prompt_ids=np.array(turn.prompt_ids, dtype=np.int32),
        action_ids=turn.completion.token_ids,
        behavior_logprobs=turn.completion.logprobs,
        versions=turn.completion.versions,
        reward=reward,
        finish_reason=turn.completion.finish_reason,
        env_seconds=env_seconds,
        engine_seconds=turn.engine_seconds,
        seat=seat,
        named_rewards=None if named is None else json.dumps(named),
    )


def _trajectory(
    place: Place,
    steps: tuple[Step, ...],
    end_reason: EndReason,
    *,
    success: bool | None = None,
    error: str | None = None,
) -> Trajectory:
    return Trajectory(
        group_id=place.slot.group_id,
        attempt=place.slot.attempt,
        index=place.index,
        task=place.task,
        steps=steps,
        end_reason=end_reason,
        success=success,
        error=error,
        worker=place.worker,
    )
