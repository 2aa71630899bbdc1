"""One episode: agent and environment take turns until the environment, the context or a limit ends it."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from envs.base import (
    Info,
    Observation,
    as_number,
    earlier_end,
    messages_of,
    named_costs,
    named_rewards,
    seat_of,
)
from envs.gate import time_limit
from envs.hosting.host import EnvironmentFailed, Replica, TokenUsage
from envs.tools.tool_env import call_outcomes
from rollout.agents.agent import Actor, ContextOverflow, Conversation, SampledTurn
from rollout.chat.chat import ChatError
from rollout.engines.engine import EngineFailed
from rollout.episodes.opponents import Opposing
from rollout.episodes.pool import environment_call
from rollout.episodes.resume import EpisodeState, Restart, pack_snapshot, restore_environment
from rollout.wire.trajectory import (
    COST,
    EndReason,
    PartialEpisode,
    Slot,
    Task,
    Trajectory,
    Turn,
    TurnEnd,
    UInt8Array,
)

_LARGEST = float(np.finfo(np.float32).max)  # of a reward


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """Limits of an episode beside those of its environment."""

    max_turns: int
    timeout_seconds: float  # wall clock; waits for the engine count, waits at a gate (envs.gate) do not


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """An episode to play: its slot, its index among its siblings, and the seed of its sampling."""

    slot: Slot
    index: int
    seed: int
    worker: str = ""
    evaluation: bool = False  # agent parts do not learn from it
    own_process: bool = False  # a worker was lost while it was played: its environment gets its own process
    opposing: Opposing | None = (
        None  # who plays the other seat; None: the environment has none, or plays it itself
    )

    @property
    def task(self) -> Task:
        return self.slot.task


class EpisodeLimitExceeded(RuntimeError):
    """A limit was exceeded that says nothing about the policy: the episode has failed."""


class EpisodeListener(Protocol):
    """Receives the events of an episode and may halt it."""

    @property
    def halted(self) -> bool:
        """Whether the episode must end before its next turn; it is then CANCELLED, and may be resumed elsewhere."""

    def turn_ended(self, spec: EpisodeSpec, turn: Turn, end: TurnEnd | None, snapshot: bytes | None) -> None:
        """A turn was sampled and its action executed. end: if it was the episode's last."""

    def answered(self, calls: Mapping[str, int]) -> None:
        """Tool calls of a turn were answered; counts by reason (`envs.tools.tool_env.CallOutcome`)."""

    def resumed(self, turns: Sequence[Turn]) -> None:
        """An episode continues after `turns` of an earlier attempt, which may be all of it."""

    def restarted(self, why: Restart) -> None:
        """An episode starts again although it has durable turns."""


class NullListener:
    """An `EpisodeListener` that ignores all events."""

    halted = False

    def turn_ended(self, spec: EpisodeSpec, turn: Turn, end: TurnEnd | None, snapshot: bytes | None) -> None:
        pass

    def answered(self, calls: Mapping[str, int]) -> None:
        pass

    def resumed(self, turns: Sequence[Turn]) -> None:
        pass

    def restarted(self, why: Restart) -> None:
        pass


async def run_episode(
    replica: Replica,
    agent: Actor,
    spec: EpisodeSpec,
    limits: EpisodeLimits,
    listener: EpisodeListener | None = None,
    resume_from: PartialEpisode | None = None,
) -> Trajectory:
    """Play `spec.task` once; the task's seed fixes the instance. resume_from: an unfinished episode to continue.

    A failure of environment or engine, or an exceeded limit, gives a FAILED trajectory with the traceback and the turns
    so far. Raises CannotResume. Other errors (a bug in Manta, an engine that died, cancellation) propagate.
    """
    episode = _Episode(replica, agent, spec, listener or NullListener())
    try:
        try:
            async with time_limit(limits.timeout_seconds) as clock:
                end_reason = await episode.play(limits.max_turns, resume_from)
        except TimeoutError:
            if not clock.expired():
                raise
            raise EpisodeLimitExceeded(
                f"{spec.task.env_id} (seed {spec.task.seed}): the episode took longer than "
                f"{limits.timeout_seconds:g} s and had played {len(episode.turns)} turns; raise rollout.episode_seconds"
            ) from None
    except (EnvironmentFailed, EngineFailed, ChatError, EpisodeLimitExceeded) as error:
        return failed(spec, error, tuple(episode.turns))
    return _trajectory(spec, tuple(episode.turns), end_reason, success=episode.success)


def failed(spec: EpisodeSpec, error: Exception, turns: tuple[Turn, ...] = ()) -> Trajectory:
    """Trajectory of an episode that failed by infrastructure."""
    return _trajectory(spec, turns, EndReason.FAILED, error="".join(traceback.format_exception(error)))


def finished(spec: EpisodeSpec, turns: tuple[Turn, ...], end: TurnEnd) -> Trajectory:
    """Trajectory of an episode that an earlier attempt has finished."""
    return _trajectory(spec, turns, end.end_reason, success=end.success)


class _Episode:
    """State of a running episode; it keeps the turns, so that a failure does not lose them."""

    def __init__(self, replica: Replica, agent: Actor, spec: EpisodeSpec, listener: EpisodeListener) -> None:
        self.turns: list[Turn] = []
        self.success: bool | None = None
        self._ended: Info | None = None  # the environment's end, if agent parts have turns after it
        self._replica = replica
        self._agent = agent
        self._spec = spec
        self._listener = listener
        self._reset_seconds = 0.0

    async def play(self, max_turns: int, resume_from: PartialEpisode | None) -> EndReason:
        conversation = self._agent.begin(self._spec.seed)
        observation = await (
            self._go_on(conversation, resume_from) if resume_from and resume_from.turns else self._reset()
        )
        for number in range(len(self.turns), max_turns):
            if self._listener.halted:
                return EndReason.CANCELLED
            turn = await self._agent.turn(conversation, observation)
            if isinstance(turn, ContextOverflow):
                return self._overflow(turn)
            said, cut = len(turn.completion.token_ids), turn.completion.finish_reason == "length"
            sampled = TokenUsage(len(conversation.ids) - said, said, cut)
            observation, end_reason = await self._act(number, turn, sampled, last=number + 1 == max_turns)
            if end_reason is not None:
                return end_reason
        return self._end(EndReason.TRUNCATED)

    async def _reset(self) -> Observation:
        began = time.perf_counter()
        with environment_call(self._spec.task, "reset"):
            observation = await self._replica.reset(self._spec.task.seed)
            messages_of(observation)
        self._reset_seconds = time.perf_counter() - began
        return observation

    async def _go_on(self, conversation: Conversation, resume_from: PartialEpisode) -> Observation:
        state = await restore_environment(self._replica, self._spec.task, resume_from)
        for turn in resume_from.turns:
            self._agent.recall(conversation, turn)
        self.turns = list(resume_from.turns)
        self.success, self._ended = state.success, state.ended
        self._listener.resumed(resume_from.turns)
        return state.observation

    async def _act(
        self, number: int, sampled_turn: SampledTurn, sampled: TokenUsage, last: bool
    ) -> tuple[Observation, EndReason | None]:
        """Execute one action and record the turn. The reset counts as environment time of the first turn."""
        task = self._spec.task
        began = time.perf_counter() - (self._reset_seconds if number == 0 else 0.0)
        try:
            with environment_call(task, f"step {number}"):
                self._replica.sampled(sampled)
                observation, reward, terminated, truncated, info = await self._replica.step(
                    sampled_turn.action
                )
                reward = as_number(reward, "the reward")
                messages_of(observation)
                named, seat = _named(info), seat_of(info)
                _require_finite({"the reward": reward} | (named or {}))
                end_reason = _end_reason(terminated, truncated, info)
                snapshot = None if last or end_reason else self._replica.snapshot()
        except EnvironmentFailed:
            # The action that made the environment fail is stored for debugging, without a reward.
            self.turns.append(_turn(number, sampled_turn, 0.0, time.perf_counter() - began))
            raise
        turn = _turn(number, sampled_turn, reward, time.perf_counter() - began, named, seat)
        self.turns.append(turn)
        if info.get("success") is not None:
            self.success = bool(info["success"])
        self._ended = earlier_end(info).get("ended", self._ended)
        if last or end_reason is not None:
            end_reason = self._end(end_reason or EndReason.TRUNCATED)
        if calls := call_outcomes(info):
            self._listener.answered(calls)
        state = EpisodeState(observation, self.success, self._ended)
        sealed = None if snapshot is None else pack_snapshot(state, snapshot)
        end = None if end_reason is None else TurnEnd(end_reason, self.success)
        self._listener.turn_ended(self._spec, turn, end, sealed)
        return observation, end_reason

    def _overflow(self, overflow: ContextOverflow) -> EndReason:
        if not self.turns:
            task = self._spec.task
            raise EpisodeLimitExceeded(
                f"{task.env_id} (seed {task.seed}): the first prompt has {overflow.prompt_tokens} tokens "
                f"and leaves no room to answer in context_tokens={overflow.context_tokens}; raise it"
            )
        return self._end(EndReason.CONTEXT_OVERFLOW)

    def _end(self, reason: EndReason) -> EndReason:
        """The end reason; an end of the environment that agent parts deferred takes precedence."""
        ended = self._ended
        if ended is None:
            return reason
        self.success = ended.get("success", self.success)
        return _end_reason(bool(ended.get("terminated")), bool(ended.get("truncated")), ended) or reason


def _named(info: Info) -> dict[str, float] | None:
    """The named numbers of a step, rewards and costs; None without any."""
    rewards, costs = named_rewards(info), named_costs(info)
    if rewards is None and not costs:
        return None
    return (rewards or {}) | {f"{COST}{name}": cost for name, cost in costs.items()}


def _require_finite(rewards: dict[str, float]) -> None:
    """Raise ValueError for a reward that is not finite as float32."""
    for name, reward in rewards.items():
        if not abs(reward) <= _LARGEST:
            raise ValueError(f"{name} is {reward}; a reward must be a finite float32")


def _end_reason(terminated: bool, truncated: bool, info: dict[str, Any]) -> EndReason | None:
    if (terminated or truncated) and info.get("malformed"):
        return EndReason.MALFORMED
    if terminated:
        return EndReason.TERMINATED
    return EndReason.TRUNCATED if truncated else None


def _turn(
    number: int,
    sampled_turn: SampledTurn,
    reward: float,
    env_seconds: float,
    named: dict[str, float] | None = None,
    seat: int | None = None,
) -> Turn:
    return Turn(
        turn=number,
        segment=sampled_turn.segment,
        observation=sampled_turn.observation,
        action=sampled_turn.action,
        prompt_ids=np.array(sampled_turn.prompt_ids, dtype=np.int32),
        action_ids=sampled_turn.completion.token_ids,
        behavior_logprobs=sampled_turn.completion.logprobs,
        versions=sampled_turn.completion.versions,
        reward=reward,
        finish_reason=sampled_turn.completion.finish_reason,
        env_seconds=env_seconds,
        engine_seconds=sampled_turn.engine_seconds,
        seat=seat,
        named_rewards=None if named is None else json.dumps(named),
        routed_experts=_routed(sampled_turn),
    )


def _routed(sampled_turn: SampledTurn) -> UInt8Array | None:
    """The experts of the token before each of the turn's, bytes [P+A, B]; zeros before the first of a segment."""
    routed = sampled_turn.completion.routed_experts
    if routed is None:
        return None
    tokens = len(sampled_turn.prompt_ids) + len(sampled_turn.completion.token_ids)
    own = routed[-tokens:]
    # A copy: the rows of all tokens before the turn's are let go.
    return np.concatenate([np.zeros((tokens - len(own), routed.shape[1]), np.uint8), own])


def _trajectory(
    spec: EpisodeSpec,
    turns: tuple[Turn, ...],
    end_reason: EndReason,
    *,
    success: bool | None = None,
    error: str | None = None,
) -> Trajectory:
    return Trajectory(
        group_id=spec.slot.group_id,
        attempt=spec.slot.attempt,
        index=spec.index,
        task=spec.task,
        turns=turns,
        end_reason=end_reason,
        success=success,
        error=error,
        worker=spec.worker,
    )
