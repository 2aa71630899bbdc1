"""One episode: environment and agent in turns until exactly one of them, or a limit, ends it."""

from __future__ import annotations

import asyncio
import time
import traceback
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.base import Observation
from rollout.agent import Actor, ContextOverflow, Turn, as_messages
from rollout.chat import ChatError
from rollout.engine import EngineFailed
from rollout.pool import Env, EnvironmentFailed, asking
from rollout.wire.trajectory import EndReason, Slot, Step, Task, Trajectory


@dataclass(frozen=True, slots=True)
class Limits:
    """What the runner allows an episode, whatever its environment allows."""

    max_turns: int
    seconds: float  # wall clock, waiting for the engine included


@dataclass(frozen=True, slots=True)
class Place:
    """Where an episode belongs: its slot, its index among its siblings, and the seed of all its sampling."""

    slot: Slot
    index: int
    seed: int
    worker: str = ""

    @property
    def task(self) -> Task:
        return self.slot.task


class EpisodeLimitExceeded(RuntimeError):
    """A limit of the runner was hit that says nothing about the agent: the episode is no evidence."""


async def run_episode(env: Env, agent: Actor, place: Place, limits: Limits) -> Trajectory:
    """Play `place.task` once; the task's seed fixes the instance.

    Never raises for what an environment, an engine or a limit does: that is a FAILED trajectory with the traceback and
    the steps so far. Anything else (a bug of ours, cancellation) propagates.
    """
    episode = _Episode(env, agent, place)
    try:
        try:
            async with asyncio.timeout(limits.seconds) as clock:
                end_reason = await episode.play(limits.max_turns)
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


class _Episode:
    """The state of an episode while it runs: steps are kept here so that a failure does not lose them."""

    def __init__(self, env: Env, agent: Actor, place: Place) -> None:
        self.steps: list[Step] = []
        self.success: bool | None = None
        self._env = env
        self._agent = agent
        self._task = place.task
        self._seed = place.seed

    async def play(self, max_turns: int) -> EndReason:
        conversation = self._agent.begin(self._seed)
        observation, reset_seconds = self._reset()
        for number in range(max_turns):
            turn = await self._agent.turn(conversation, observation)
            if isinstance(turn, ContextOverflow):
                return self._overflow(turn)
            observation, end_reason = self._act(number, turn, reset_seconds if number == 0 else 0.0)
            if end_reason is not None:
                return end_reason
        return EndReason.TRUNCATED

    def _reset(self) -> tuple[Observation, float]:
        began = time.perf_counter()
        with asking(self._task, "reset"):
            observation, _ = self._env.reset(seed=self._task.seed)
            as_messages(observation)
        return observation, time.perf_counter() - began

    def _act(self, number: int, turn: Turn, reset_seconds: float) -> tuple[Observation, EndReason | None]:
        """One environment step, recorded. `reset_seconds` counts as the first step's environment time."""
        began = time.perf_counter() - reset_seconds
        try:
            with asking(self._task, f"step {number}"):
                observation, reward, terminated, truncated, info = self._env.step(turn.action)
                reward = float(reward)
                as_messages(observation)
        except EnvironmentFailed:
            # The action that broke the environment is what a person will look for; it has earned nothing.
            self.steps.append(_step(number, turn, 0.0, time.perf_counter() - began))
            raise
        self.steps.append(_step(number, turn, reward, time.perf_counter() - began))
        self._judge(info)
        return observation, _end_reason(terminated, truncated, info)

    def _judge(self, info: dict[str, Any]) -> None:
        if info.get("success") is not None:
            self.success = bool(info["success"])

    def _overflow(self, overflow: ContextOverflow) -> EndReason:
        if not self.steps:
            raise EpisodeLimitExceeded(
                f"{self._task.env_id} (seed {self._task.seed}): the first prompt has {overflow.prompt_tokens} tokens "
                f"and leaves no room to answer in context_tokens={overflow.context_tokens}"
            )
        return EndReason.CONTEXT_OVERFLOW


def _end_reason(terminated: bool, truncated: bool, info: dict[str, Any]) -> EndReason | None:
    if (terminated or truncated) and info.get("malformed"):
        return EndReason.MALFORMED
    if terminated:
        return EndReason.TERMINATED
    return EndReason.TRUNCATED if truncated else None


def _step(number: int, turn: Turn, reward: float, env_seconds: float) -> Step:
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
