"""Conversations of a data file, to be learned from as recorded: what was said, and what the assistant answered.

Rows are read as TRL, OpenRLHF and ShareGPT write them:

    messages / conversations                      every turn of the assistant is learned
    prompt + completion  (input + output)         the completion
    prompt + completion + label                   the same, worth 1 or 0
    prompt + chosen + rejected                    two conversations, worth 1 and 0
    prompt + chosen + rejected + margin           the same, worth the margin and 0
    chosen + rejected                             the same; what both begin with is the prompt

A column `tools` has the JSON schemas of the tools that the assistant could call.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from envs.base import Info, Message, Observation, TextEnv, text_space
from envs.datasets.files import DataError, Row, open_rows
from envs.datasets.schema import PROMPTS, as_messages, first_of

_LEAST_MARGIN = 1e-6
COMPLETIONS = ("completion", "output", "response", "answer", "solution")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of an assistant, each with the messages since the turn before; and what the conversation is worth."""

    turns: tuple[tuple[list[Message], str], ...]
    reward: float = 1.0

    def offering(self, tools: Sequence[Any]) -> Conversation:
        """The same with tools, which its first message carries (envs/base.py)."""
        ((first, *others), answer), *later = self.turns
        return replace(self, turns=(([first | {"tools": tools}, *others], answer), *later))


def conversations(
    path: str, most: int | None = None, system: str | None = None
) -> Iterator[list[Conversation]]:
    """The conversations of each row: one, or a better and a worse one.

    path: as of `open_rows`. most: rows. system: message that is said first unless a row has one. DataError for a row
    that is none of the above, with its file and line.
    """
    rows = open_rows(path)
    for index in range(len(rows) if most is None else min(most, len(rows))):
        yield of_row(rows[index], rows.where(index), system)


def of_row(row: Row, where: str, system: str | None = None) -> list[Conversation]:
    """The conversations of a row. DataError where it holds none."""
    talks = _of_row(row, where, system)
    tools = _tools(row, where)
    return [each.offering(tools) for each in talks] if tools else talks


def _tools(row: Row, where: str) -> list[Any]:
    """The column `tools`: a list, or JSON of one, since files of columns hold no lists of unlike objects."""
    said = row.get("tools") or []
    try:
        tools = json.loads(said) if isinstance(said, str) else said
    except ValueError:
        tools = None
    if not isinstance(tools, list):
        raise DataError(f"{where}: tools is a list of JSON schemas, found {said!r:.60}")
    return tools


def _of_row(row: Row, where: str, system: str | None) -> list[Conversation]:
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return [
            _conversation(prompt, answer, where, system, reward)
            for reward, (prompt, answer) in zip((_margin(row, where), 0.0), _pair(row, where), strict=True)
        ]
    prompt = first_of(row, PROMPTS)
    if prompt is None:
        raise DataError(
            f"{where}: no column of the usual names ({', '.join(PROMPTS)}); its columns: {', '.join(row)}"
        )
    completion = first_of(row, COMPLETIONS)
    if completion is None or prompt in ("messages", "conversations"):
        return [_conversation([], as_messages(row[prompt], where), where, system)]
    worth = row.get("label")
    return [
        _conversation(
            as_messages(row[prompt], where),
            _answer(row[completion], where),
            where,
            system,
            1.0 if worth is None else float(bool(worth)),
        )
    ]


def _pair(row: Row, where: str) -> tuple[tuple[list[Message], list[Message]], ...]:
    """Prompt and answer of the chosen and of the rejected conversation."""
    sides = [_answer(row[name], where) for name in ("chosen", "rejected")]
    if (column := first_of(row, PROMPTS)) is not None:
        prompt = as_messages(row[column], where)
        # Some files repeat the prompt in both answers.
        return tuple(
            (prompt, side[len(prompt) :] if side[: len(prompt)] == prompt else side) for side in sides
        )
    shared = len([*takewhile(lambda both: both[0] == both[1], zip(*sides, strict=False))])
    return tuple((side[:shared], side[shared:]) for side in sides)


def _margin(row: Row, where: str) -> float:
    """By how much the chosen conversation is worth more. A margin of 0 is made small: the order remains."""
    if (margin := row.get("margin")) is None:
        return 1.0
    if not isinstance(margin, int | float) or not 0 <= margin < math.inf:
        raise DataError(
            f"{where}: the margin is {margin!r:.40}; give a number of 0 or more, the better answer as chosen"
        )
    return max(float(margin), _LEAST_MARGIN)


def _answer(said: Any, where: str) -> list[Message]:
    if isinstance(said, str):
        return [{"role": "assistant", "content": said}]
    return as_messages(said, where)


def _conversation(
    prompt: Sequence[Message], learned: Sequence[Message], where: str, system: str | None, reward: float = 1.0
) -> Conversation:
    """prompt: messages that are context only. learned: messages whose assistant's turns are learned."""
    heard = [*prompt]
    if system is not None and (heard or [*learned])[0]["role"] != "system":
        heard.insert(0, {"role": "system", "content": system})
    turns = []
    for message in learned:
        if message["role"] != "assistant":
            heard.append(message)
            continue
        if not isinstance(message["content"], str) or not heard:
            raise DataError(
                f"{where}: an assistant's turn is text that answers something, found {message!r:.80}"
            )
        turns.append((heard, message["content"]))
        heard = []
    if not turns:
        raise DataError(f"{where}: no turn of an assistant is in it")
    return Conversation(tuple(turns), reward)


class RecordedTalk(TextEnv):
    """An environment that says what was said in conversations, whatever is answered; the seed is the place of one."""

    action_space = text_space(1 << 20)

    def __init__(self, talks: Sequence[Conversation]) -> None:
        self._talks = talks
        self._turn = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        assert seed is not None
        self._talk, self._turn = self._talks[seed], 0
        return [*self._talk.turns[0][0]], {}

    def step(self, action: str) -> tuple[Any, float, bool, bool, Info]:
        self._turn += 1
        if self._turn == len(self._talk.turns):
            return "", self._talk.reward, True, False, {}
        return [*self._talk.turns[self._turn][0]], 0.0, False, False, {}


class Reciter:
    """A player who says what the assistant of a conversation said."""

    def __init__(self, talk: Conversation) -> None:
        self._answers = iter([answer for _, answer in talk.turns])

    def act(self, observation: Observation) -> str:
        del observation
        return next(self._answers)
