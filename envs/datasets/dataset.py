"""A file of prompts with rewards: JSONL, JSON, CSV, Parquet, Arrow, a folder, a dataset of the Hugging Face hub.

Observation: the messages of one row, with its pictures. After a wrong answer that may be tried again: `feedback`. In a
conversation with a simulated user: what the user says.
Action: the answer.
Reward: the weighted sum of `rewards` of the last answer, each stored under its name. Horizon: one answer; `attempts`
lets a wrong one be tried again; a `user` talks until it has what it wants, or its turns are spent.
Levels: none; `where` chooses rows by their columns.
Ends: an answer that the first reward gives 1, the last attempt, the end of the conversation (terminated).

The seed says which row: seeds of the run's tasks are counted so that every row is played once before any is played
again, in an order that is another in each pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.base import Info, Message, Split, TalkSpace, TextEnv, check_options, held_out, text_space
from envs.datasets.files import DataError, Row, Rows, open_rows
from envs.datasets.schema import Schema, value
from envs.datasets.simulated_user import SimulatedUser
from envs.rewards.rewards import Said, reward_range, rewards_of

FEEDBACK = "That is not right. Try again."
MAX_ANSWER = 1 << 20  # characters


class Dataset(TextEnv):
    """The environment.

    path: of the data, see envs/datasets/files.py. heldout_path: of other data for split="heldout"; without it one row
    in eight is held out by its content. prompt, answer, images: columns; left out, they are found by their usual names.
    system: a system message that comes first. template: the user's message with {column} in it. rewards: kinds or
    sections, see envs/rewards/rewards.py. where: column -> a value or a list of values; other rows are left out.
    order_by: column by which rows are numbered, least first, such as a difficulty; without it as in the data.
    attempts: answers that an episode may give. feedback: what is said after a wrong one. user: options of the
    `SimulatedUser` that the agent talks to, in place of attempts. ValueError for wrong options, data that cannot be
    read and a first row that does not fit.
    """

    action_space = text_space(MAX_ANSWER)
    observation_space: spaces.Space[Any] = TalkSpace()

    def __init__(
        self,
        path: str,
        rewards: str | dict[str, Any] | Sequence[str | dict[str, Any]] = "exact",
        *,
        split: Split = "all",
        heldout_path: str | None = None,
        prompt: str | None = None,
        answer: str | None = None,
        images: str | None = None,
        system: str | None = None,
        template: str | None = None,
        where: dict[str, Any] | None = None,
        order_by: str | None = None,
        attempts: int = 1,
        feedback: str = FEEDBACK,
        user: dict[str, Any] | None = None,
    ) -> None:
        check_options(1, (1,), split, None)
        if attempts < 1:
            raise ValueError(f"attempts={attempts} leaves no answer to give; use 1 or more")
        if user and attempts > 1:
            raise ValueError(f"attempts={attempts} beside a user: the user says what follows an answer")
        self._rewards = rewards_of(rewards)
        self._rows, self._chosen_R = _selected(path, heldout_path, split, _frozen(where or {}), order_by)
        first = int(self._chosen_R[0])
        self._schema = Schema.of(
            self._rows[first],
            _data(path, heldout_path, split),  # not the row's place: the same of every split of the data
            prompt=prompt,
            answer=answer,
            images=images,
            system=system,
            template=template,
        )
        self._schema.messages(self._rows[first], self._rows.where(first))
        self.reward_range = reward_range(self._rewards)
        self._user = SimulatedUser(**user) if user else None
        self.nondeterministic = self._user is not None
        self._answers = self._user.turns + 1 if self._user else attempts
        self._feedback = feedback
        self._row: Row = {}
        self._talk: list[Message] = []
        self._posed = self._seed = self._left = 0

    @classmethod
    def count_tasks(
        cls, path: str, split: Split = "all", heldout_path: str | None = None, where: Any = None, **_: Any
    ) -> int:
        """How many rows an environment with these options plays: the seed modulo that says which."""
        return len(_selected(path, heldout_path, split, _frozen(where or {}))[1])

    @classmethod
    def check_tasks(cls, **options: Any) -> None:
        """Raise DataError for the first row that cannot be played, with its file and line."""
        env = cls(**options)
        for index in map(int, env._chosen_R):
            row, where = env._rows[index], env._rows.where(index)
            env._schema.messages(row, where)
            if env._schema.answer is None:
                continue
            if (truth := env._schema.truth(row)) is None:
                raise DataError(f"{where}: column {env._schema.answer!r} holds no answer")
            if not (first := env._rewards[0]).can_give(truth):
                raise DataError(
                    f"{where}: column {env._schema.answer!r} holds {truth!r}, which the reward {first.kind!r} does not "
                    "count as right itself: no answer could be; correct the row, or choose another reward"
                )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(len(self._chosen_R))) if seed is None else seed
        index = int(self._chosen_R[drawn % len(self._chosen_R)])
        row, where = self._rows[index], self._rows.where(index)
        self._row, self._talk = row, self._schema.messages(row, where)
        self._posed, self._seed, self._left = len(self._talk), drawn, self._answers
        return [*self._talk], {"row": where}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        self._talk.append({"role": "assistant", "content": action})
        self._left -= 1
        said = Said(action, self._schema.truth(self._row), self._row, self._talk, self._posed)
        reply, scores = self._reply(said) if self._left else (None, {})
        if reply is not None:
            self._talk.append({"role": "user", "content": reply})
            return reply, 0.0, False, False, {"success": False}
        scores |= {reward.name: reward(said) for reward in self._rewards if reward.name not in scores}
        total = sum(reward.weight * scores[reward.name] for reward in self._rewards)
        success = scores[self._rewards[0].name] >= 1.0
        costs = {reward.name: scores.pop(reward.name) for reward in self._rewards if reward.cost}
        info = {"success": success, "rewards": scores} | ({"costs": costs} if costs else {})
        return "", total, True, False, info

    def _reply(self, said: Said) -> tuple[str | None, dict[str, float]]:
        """What follows an answer, None where it is the last one; and the rewards that had to be known for that."""
        if self._user is not None:
            return self._user.next_message(said.trajectory, self._row, self._seed), {}
        first = self._rewards[0]
        score = first(said)
        return None if score >= 1.0 else self._feedback, {first.name: score}

    def snapshot(self) -> bytes:
        return json.dumps([self._talk[self._posed :], self._left]).encode()

    def restore(self, snapshot: bytes) -> None:
        since, self._left = json.loads(snapshot)
        self._talk += since


def _data(path: str, heldout_path: str | None, split: Split) -> str:
    return heldout_path if heldout_path and split == "heldout" else path


def _selected(
    path: str,
    heldout_path: str | None,
    split: Split,
    where: tuple[tuple[str, tuple[Any, ...]], ...],
    order_by: str | None = None,
) -> tuple[Rows, NDArray[np.int64]]:
    """The rows of a split and the indices of those that fit, in order. DataError where none is left."""
    rows = open_rows(_data(path, heldout_path, split))
    part = None if split == "all" or heldout_path is not None else split
    chosen = _chosen(rows, part, where) if order_by is None else _ordered(rows, part, where, order_by)
    if not len(chosen):
        raise DataError(
            f"{path}: no row is left in split={split} with where={dict(where)}; it has {len(rows)} rows"
        )
    return rows, chosen


@lru_cache(maxsize=16)
def _chosen(
    rows: Rows, split: Split | None, where: tuple[tuple[str, tuple[Any, ...]], ...]
) -> NDArray[np.int64]:
    """Indices of the rows of a split that fit; a file of rows is one object a process."""

    def fits(index: int) -> bool:
        if split is not None and held_out(rows.text(index)) != (split == "heldout"):
            return False
        row = rows[index] if where else {}
        return all(value(row, column) in values for column, values in where)

    indices = range(len(rows))
    return np.array(indices if split is None and not where else [*filter(fits, indices)], dtype=np.int64)


@lru_cache(maxsize=16)
def _ordered(
    rows: Rows, split: Split | None, where: tuple[tuple[str, tuple[Any, ...]], ...], column: str
) -> NDArray[np.int64]:
    """The same, by the numbers in a column."""
    chosen = _chosen(rows, split, where)
    return chosen[np.argsort([_difficulty(rows, int(index), column) for index in chosen], kind="stable")]


def _difficulty(rows: Rows, index: int, column: str) -> float:
    try:
        number = float(value(rows[index], column))
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise DataError(f"{rows.where(index)}: order_by={column!r} needs a number in every row")
    return number


def _frozen(where: dict[str, Any]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    return tuple(
        (column, tuple(wanted) if isinstance(wanted, list | tuple) else (wanted,))
        for column, wanted in where.items()
    )
