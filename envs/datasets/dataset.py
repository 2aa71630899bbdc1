"""A file of prompts with rewards: JSONL, JSON, CSV, Parquet, Arrow, a folder, a dataset of the Hugging Face hub.

Observation: the messages of one row, with its pictures. After a wrong answer that may be tried again: `feedback`.
Action: the answer.
Reward: the weighted sum of `rewards`, each stored under its name. Horizon: one answer; `attempts` lets a wrong one be
tried again, and the last answer counts.
Levels: none; `where` chooses rows by their columns.
Ends: an answer that the first reward gives 1, or the last attempt (terminated).

The seed says which row: seeds of the run's tasks are counted so that every row is played once before any is played
again, in an order that is another in each pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.base import Info, Message, Split, TalkSpace, TextEnv, check_options, held_out, text_space
from envs.datasets.files import DataError, Rows, open_rows
from envs.datasets.schema import Schema, value
from envs.rewards.rewards import Said, reward_range, rewards_of

FEEDBACK = "That is not right. Try again."
MAX_ANSWER = 1 << 20  # characters


class Dataset(TextEnv):
    """The environment.

    path: of the data, see envs/datasets/files.py. heldout_path: of other data for split="heldout"; without it one row
    in eight is held out by its content. prompt, answer, images: columns; left out, they are found by their usual names.
    system: a system message that comes first. template: the user's message with {column} in it. rewards: kinds or
    sections, see envs/rewards/rewards.py. where: column -> a value or a list of values; other rows are left out.
    attempts: answers that an episode may give. feedback: what is said after a wrong one. ValueError for wrong options,
    data that cannot be read and a first row that does not fit.
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
        attempts: int = 1,
        feedback: str = FEEDBACK,
    ) -> None:
        check_options(1, (1,), split, None)
        if attempts < 1:
            raise ValueError(f"attempts={attempts} leaves no answer to give; use 1 or more")
        self._rewards = rewards_of(rewards)
        self._rows, self._chosen_R = _selected(path, heldout_path, split, _frozen(where or {}))
        first = int(self._chosen_R[0])
        self._schema = Schema.of(
            self._rows[first],
            self._rows.where(first),
            prompt=prompt,
            answer=answer,
            images=images,
            system=system,
            template=template,
        )
        self._schema.messages(self._rows[first], self._rows.where(first))
        self.reward_range = reward_range(self._rewards)
        self._attempts = attempts
        self._feedback = feedback
        self._said = Said("", None, {}, ())
        self._left = 0

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
            if env._schema.answer is not None and env._schema.truth(row) is None:
                raise DataError(f"{where}: column {env._schema.answer!r} holds no answer")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(len(self._chosen_R))) if seed is None else seed
        index = int(self._chosen_R[drawn % len(self._chosen_R)])
        row, where = self._rows[index], self._rows.where(index)
        messages: list[Message] = self._schema.messages(row, where)
        self._said = Said("", self._schema.truth(row), row, messages)
        self._left = self._attempts
        return messages, {"row": where}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        said = Said(action, self._said.truth, self._said.row, self._said.messages)
        scores = {reward.name: reward(said) for reward in self._rewards}
        self._left -= 1
        success = next(iter(scores.values())) >= 1.0
        if not success and self._left:
            return self._feedback, 0.0, False, False, {"success": False}
        total = sum(reward.weight * scores[reward.name] for reward in self._rewards)
        return "", total, True, False, {"success": success, "rewards": scores}


def _selected(
    path: str, heldout_path: str | None, split: Split, where: tuple[tuple[str, tuple[Any, ...]], ...]
) -> tuple[Rows, NDArray[np.int64]]:
    """The rows of a split and the indices of those that fit. DataError where none is left."""
    rows = open_rows(heldout_path if heldout_path and split == "heldout" else path)
    whole = split == "all" or heldout_path is not None
    chosen = _chosen(rows, None if whole else split, where)
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

    if split is None and not where:
        return np.arange(len(rows))
    return np.array([index for index in range(len(rows)) if fits(index)], dtype=np.int64)


def _frozen(where: dict[str, Any]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    return tuple(
        (column, tuple(wanted) if isinstance(wanted, list | tuple) else (wanted,))
        for column, wanted in where.items()
    )
