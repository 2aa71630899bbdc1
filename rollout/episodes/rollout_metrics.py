"""What a worker's episodes come to: sums for the counters, and the way of every turn to the recorder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

from envs.tools.tool_env import Reason
from rollout.episodes.episode import Place
from rollout.episodes.recorder import Recorder
from rollout.episodes.resume import Restart
from rollout.wire.trajectory import EndReason, Step, Trajectory, TurnEnd


class RolloutMetrics:
    """A `Watch` that sums up, training and evaluation alike. Turns count as they end, episodes with their group."""

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

    def turn_ended(self, place: Place, step: Step, end: TurnEnd | None, snapshot: bytes | None) -> None:
        self._turns += 1
        self._tokens_sampled += len(step.action_ids)
        self._tokens_prompt += len(step.prompt_ids)
        self._env_seconds += step.env_seconds
        self._last_turn = time.perf_counter()

    def answered(self, calls: Mapping[str, int]) -> None:
        self._calls.update(calls)

    def resumed(self, steps: Sequence[Step]) -> None:
        self._resumed += 1
        self._turns_reused += len(steps)
        self._tokens_reused += sum(len(step.action_ids) for step in steps)

    def restarted(self, why: Restart) -> None:
        self._restarted[why] += 1

    def ended(self, trajectory: Trajectory) -> None:
        self._ended[trajectory.end_reason] += 1

    def seconds_since_turn(self) -> float:
        """Seconds since the last turn ended, or since the tally began."""
        return time.perf_counter() - self._last_turn

    def row(self) -> dict[str, float]:
        """The sums by name.

        tokens_sampled, turns: of this worker's own doing; the reused ones were sampled by an earlier attempt.
        tokens_prompt: added by environment and template; a prefix is counted once. env_seconds: inside environments.
        tools_REASON: tool calls, by what became of them.
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
        sums |= {f"tools_{reason}": self._calls[reason] for reason in Reason}
        return sums | {f"episodes_{reason}": self._ended[reason] for reason in EndReason}


class Recorded:
    """A `Watch` over training episodes: counted, recorded, and halted when the worker leaves."""

    def __init__(self, tally: RolloutMetrics, recorder: Recorder) -> None:
        self.halted = False
        self.answered = tally.answered
        self.resumed = tally.resumed
        self.restarted = tally.restarted
        self._tally = tally
        self._recorder = recorder

    def turn_ended(self, place: Place, step: Step, end: TurnEnd | None, snapshot: bytes | None) -> None:
        self._tally.turn_ended(place, step, end, snapshot)
        self._recorder.note(place.slot, place.index, step, end, snapshot)
