"""Counters of a worker's episodes, and the listener that counts and records training episodes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

from envs.tools.tool_env import CallOutcome
from rollout.episodes.episode import EpisodeSpec
from rollout.episodes.recorder import Recorder
from rollout.episodes.resume import Restart
from rollout.wire.trajectory import EndReason, Trajectory, Turn, TurnEnd


class RolloutMetrics:
    """An `EpisodeListener` that sums over training and evaluation. Turns count at once, episodes with their group."""

    halted = False

    def __init__(self) -> None:
        self._tokens_sampled = 0
        self._tokens_prompt = 0
        self._turns = 0
        self._env_seconds = 0.0
        self._tokens_reused = 0
        self._turns_reused = 0
        self._resumed = 0
        self._restarted: Counter[Restart] = Counter()
        self._ended: Counter[EndReason] = Counter()
        self._calls: Counter[str] = Counter()  # by reason
        self._last_turn = time.perf_counter()

    def turn_ended(self, spec: EpisodeSpec, turn: Turn, end: TurnEnd | None, snapshot: bytes | None) -> None:
        self._turns += 1
        self._tokens_sampled += len(turn.action_ids)
        self._tokens_prompt += len(turn.prompt_ids)
        self._env_seconds += turn.env_seconds
        self._last_turn = time.perf_counter()

    def answered(self, calls: Mapping[str, int]) -> None:
        self._calls.update(calls)

    def resumed(self, turns: Sequence[Turn]) -> None:
        self._resumed += 1
        self._turns_reused += len(turns)
        self._tokens_reused += sum(len(turn.action_ids) for turn in turns)

    def restarted(self, why: Restart) -> None:
        self._restarted[why] += 1

    def ended(self, trajectory: Trajectory) -> None:
        self._ended[trajectory.end_reason] += 1

    def seconds_since_turn(self) -> float:
        """Seconds since the last turn ended, or since the start."""
        return time.perf_counter() - self._last_turn

    def row(self) -> dict[str, float]:
        """The sums by name.

        tokens_sampled, turns: by this worker; the reused ones were sampled by an earlier attempt. tokens_prompt: added
        by environment and template; a prefix is counted once. env_seconds: inside environments. tools_REASON: tool
        calls by outcome.
        """
        sums: dict[str, float] = {
            "tokens_sampled": self._tokens_sampled,
            "tokens_prompt": self._tokens_prompt,
            "turns": self._turns,
            "env_seconds": self._env_seconds,
            "tokens_reused": self._tokens_reused,
            "turns_reused": self._turns_reused,
            "episodes": self._ended.total(),
            "episodes_resumed": self._resumed,
        }
        sums |= {f"episodes_restarted_{why}": self._restarted[why] for why in Restart}
        sums |= {f"tools_{reason}": self._calls[reason] for reason in CallOutcome}
        return sums | {f"episodes_{reason}": self._ended[reason] for reason in EndReason}


class RecordingListener:
    """An `EpisodeListener` for training episodes: it counts and records turns, and halts when the worker leaves."""

    def __init__(self, metrics: RolloutMetrics, recorder: Recorder) -> None:
        self.halted = False
        self.answered = metrics.answered
        self.resumed = metrics.resumed
        self.restarted = metrics.restarted
        self._metrics = metrics
        self._recorder = recorder

    def turn_ended(self, spec: EpisodeSpec, turn: Turn, end: TurnEnd | None, snapshot: bytes | None) -> None:
        self._metrics.turn_ended(spec, turn, end, snapshot)
        self._recorder.note(spec.slot, spec.index, turn, end, snapshot)
