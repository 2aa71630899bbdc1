"""Episodes shown in a report: their choice, and their turns from stored rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tokenizers import Tokenizer

from learner.data.advantage_log import read_advantages
from rollout.buffer.segments import read_rows
from rollout.wire.schema import SCHEMA
from rollout.wire.trajectory import EndReason

TokenText = Callable[[int], str]  # the text of one token id
IntArray = NDArray[np.int64]
Advantages = Mapping[tuple[int, ...], Sequence[float]]  # (group, attempt, episode, turn) -> [sampled tokens]

MAX_FAILED = 3
MAX_SIBLINGS = 4  # of one group
SPACED_FROM = 16  # number of episodes from which some between the first and the last are shown
SPACED = {"a quarter": 0.25, "half": 0.5, "three quarters": 0.75}  # of the way through training


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One sampled token."""

    id: int
    text: str
    logprob: float  # nats, recorded while sampling
    version: int  # the weights that sampled it
    advantage: float | None = None  # of the loss; None if none is stored, as for evaluations

    @property
    def probability(self) -> float:
        return math.exp(self.logprob)


@dataclass(frozen=True, slots=True)
class ShownTurn:
    """One turn: messages of the environment, the sampled answer, its reward."""

    number: int
    messages: tuple[tuple[str, str], ...]  # role, text
    action: str  # the sampled text
    tokens: tuple[ShownToken, ...]
    reward: float
    finish_reason: str
    rewritten: bool  # a later segment begins here: the agent rewrote its history

    @property
    def advantage(self) -> float | None:
        """Mean over the turn's tokens; None if none is stored."""
        known = [token.advantage for token in self.tokens if token.advantage is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True, slots=True)
class ShownEpisode:
    """One episode and the reason why it is shown."""

    why: str
    env_id: str
    seed: int
    group_id: int
    index: int
    worker: str
    end_reason: str
    success: bool | None
    reward: float
    error: str | None
    turns: tuple[ShownTurn, ...]


def chosen_episodes(run_folder: Path, task: str = "held-out task") -> list[ShownEpisode]:
    """The episodes of a report: one task evaluated before and after training, then a selection of training episodes.

    Of training: the first, the best, the worst, one of each other end reason, some in between, siblings of the last
    group with different rewards, and some that failed. Of equal ones the latest is shown. An episode that failed before
    its first turn has no rows; the ledger counts it.
    """
    text = token_text(run_folder)
    evaluations = run_folder / "evaluations"
    before, after = (Spans.of(_stored(evaluations / name)) for name in ("before", "after"))
    training = Spans.of(_stored(run_folder / "groups"))
    shown = []
    if learned := _learned(before, after):
        shown.append(before.episode(learned[0], f"{task}, before training", text))
        shown.append(after.episode(learned[1], "the same task, after training", text))
    told = list(_telling(training))
    advantages = _advantages(run_folder, training, [place for place, _ in told])
    return shown + [training.episode(place, why, text, advantages) for place, why in told]


def _stored(folder: Path) -> pa.Table:
    """The rows of a folder; an empty table if the run has not made it yet."""
    return read_rows(folder) if folder.is_dir() else SCHEMA.empty_table()


def token_text(run_folder: Path) -> TokenText:
    """Text of single tokens by the run's tokenizer; ids in brackets if the run keeps none."""
    kept = sorted(run_folder.rglob("tokenizer.json"))
    if not kept:
        return lambda token: f"[{token}]"
    tokenizer = Tokenizer.from_file(str(kept[-1]))
    return lambda token: str(tokenizer.decode([token], skip_special_tokens=False)) or f"[{token}]"


@dataclass(frozen=True, slots=True)
class Spans:
    """A table of rows with the spans of its episodes: rows of one are contiguous, and its last has the end reason."""

    rows: pa.Table
    first: IntArray  # [episodes]
    last: IntArray  # [episodes], included
    rewards: NDArray[np.float64]  # [episodes] sums over the turns
    end_reasons: tuple[str, ...]

    @classmethod
    def of(cls, rows: pa.Table) -> Spans:
        """Find the episodes. Rows after the last end belong to an incomplete batch and are skipped."""
        ended = rows["end_reason"].is_valid().to_numpy()
        last = np.flatnonzero(ended)
        first = np.concatenate([np.zeros(1, np.int64), last + 1])[: len(last)]
        before = np.concatenate([np.zeros(1), np.cumsum(rows["reward"].to_numpy(), dtype=np.float64)])
        sums = before[last + 1] - before[first]
        return cls(rows, first, last, sums, tuple(rows["end_reason"].take(last).to_pylist()))

    def __len__(self) -> int:
        return len(self.last)

    def column(self, name: str) -> list[Any]:
        """A column of the episode: its value in each last row."""
        values: list[Any] = self.rows[name].take(self.last).to_pylist()
        return values

    def episode(
        self, place: int, why: str, text: TokenText, advantages: Advantages | None = None
    ) -> ShownEpisode:
        """The `place`-th episode of the table."""
        first, last = int(self.first[place]), int(self.last[place])
        rows = self.rows.slice(first, last - first + 1).to_pylist()
        end = rows[-1]
        return ShownEpisode(
            why=why,
            env_id=end["env_id"],
            seed=end["seed"],
            group_id=end["group_id"],
            index=end["episode"],
            worker=end["worker"],
            end_reason=end["end_reason"],
            success=end["success"],
            reward=float(self.rewards[place]),
            error=end["error"],
            turns=tuple(
                _turn(row, previous, text, (advantages or {}).get(_turn_key(row), ()))
                for row, previous in zip(rows, [None, *rows], strict=False)
            ),
        )


def _learned(before: Spans, after: Spans) -> tuple[int, int] | None:
    # Positions of the first task that failed before and succeeded after; without verdicts, of the largest gain.
    places = {task: place for place, task in enumerate(_tasks(before))}
    pairs = [(places[task], place) for place, task in enumerate(_tasks(after)) if task in places]
    lost, won = before.column("success"), after.column("success")
    if all(verdict is None for verdict in won):
        gains = [(after.rewards[new] - before.rewards[old], (old, new)) for old, new in pairs]
        gain, pair = max(gains, default=(0.0, None), key=lambda each: each[0])
        return pair if gain > 0 else None
    return next(((old, new) for old, new in pairs if lost[old] is False and won[new]), None)


def _tasks(spans: Spans) -> list[tuple[Any, ...]]:
    return list(zip(*(spans.column(name) for name in ("env_id", "env_options", "seed")), strict=True))


def _telling(spans: Spans) -> Iterator[tuple[int, str]]:
    # Positions in the table and the reason for each; no position twice.
    unfit = (EndReason.FAILED.value, EndReason.CANCELLED.value)
    fit = [place for place, reason in enumerate(spans.end_reasons) if reason not in unfit]
    failed = [place for place, reason in enumerate(spans.end_reasons) if reason == EndReason.FAILED.value]
    shown: set[int] = set()
    candidates: list[tuple[int, str]] = []
    if fit:
        candidates.append((fit[0], "first of training"))
        candidates.append((max(reversed(fit), key=lambda place: spans.rewards[place]), "best of training"))
        candidates.append((min(reversed(fit), key=lambda place: spans.rewards[place]), "worst of training"))
    latest = {spans.end_reasons[place]: place for place in fit}
    covered = {spans.end_reasons[place] for place, _ in candidates}
    candidates += [
        (place, f"ended: {reason}") for reason, place in sorted(latest.items()) if reason not in covered
    ]
    if len(fit) >= SPACED_FROM:
        candidates += [
            (fit[int(len(fit) * part)], f"after {name} of training") for name, part in SPACED.items()
        ]
    candidates += [
        (place, "sibling in the last group with different rewards") for place in _siblings(spans, fit)
    ]
    candidates += [(place, "failed") for place in failed[-MAX_FAILED:]]
    for place, why in candidates:
        if place not in shown:
            shown.add(place)
            yield place, why


def _siblings(spans: Spans, fit: Sequence[int]) -> list[int]:
    """Positions of siblings of the last group whose rewards differ."""
    groups: dict[tuple[int, int], list[int]] = {}
    issued = list(zip(spans.column("group_id"), spans.column("attempt"), strict=True))
    for place in fit:
        groups.setdefault(issued[place], []).append(place)
    differ = (places for places in reversed(groups.values()) if np.ptp(spans.rewards[places]) > 0)
    return next(differ, [])[:MAX_SIBLINGS]


def _advantages(run_folder: Path, spans: Spans, places: Sequence[int]) -> Advantages:
    """Stored advantages of the turns of these episodes; of a reused group the first ones."""
    groups = spans.rows["group_id"].take(spans.last[list(places)]) if places else pa.array([], pa.int64())
    try:
        stored = read_advantages(run_folder)
    except ValueError as error:
        from deploy.config.config_errors import ConfigError  # imported here, since it imports torch

        raise ConfigError(f"{error}; remove the file for a report without its advantages") from error
    found: dict[tuple[int, ...], Sequence[float]] = {}
    for row in stored.filter(pc.is_in(stored["group_id"], groups)).to_pylist():
        found.setdefault(_turn_key(row), row["advantages"])
    return found


def _turn_key(row: Mapping[str, Any]) -> tuple[int, ...]:
    return row["group_id"], row["attempt"], row["episode"], row["turn"]


def _turn(
    row: dict[str, Any], previous: dict[str, Any] | None, text: TokenText, advantages: Sequence[float]
) -> ShownTurn:
    known = advantages if len(advantages) == len(row["action_ids"]) else [None] * len(row["action_ids"])
    sampled = zip(row["action_ids"], row["behavior_logprobs"], row["versions"], known, strict=True)
    return ShownTurn(
        number=row["turn"],
        messages=_messages(row["observation"]),
        action=row["action"],
        tokens=tuple(
            ShownToken(token, text(token), logprob, version, advantage)
            for token, logprob, version, advantage in sampled
        ),
        reward=row["reward"],
        finish_reason=row["finish_reason"],
        rewritten=previous is not None and previous["segment"] != row["segment"],
    )


def _messages(observation: str) -> tuple[tuple[str, str], ...]:
    # Chat messages as JSON; any other text is shown unchanged.
    try:
        said = json.loads(observation)
    except json.JSONDecodeError:
        return (("user", observation),)
    if not isinstance(said, list):
        return (("user", observation),)
    return tuple((message["role"], _content(message["content"])) for message in said)


def _content(content: Any) -> str:
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(_part(part) for part in content)
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1)


def _part(part: dict[str, Any]) -> str:
    if part.get("type") == "image":
        return f"[picture, {len(part.get('image', '')) * 3 // 4:,} bytes] "
    return str(part.get("text", json.dumps(part, ensure_ascii=False)))
