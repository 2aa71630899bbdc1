"""Pairs of answers made from a finished run: the best episode of a group against the worst, as TRL writes them.

    {"prompt": [...], "chosen": [...], "rejected": [...], "margin": 0.7, "tools": [...]}

Messages have a role and a content. `prompt` is what both episodes begin with; `chosen` and `rejected` hold each one's
answers and, between them, what the environment or a tool said. `margin` is the difference of the rewards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deploy.commands.export import fresh_file
from deploy.config.config_errors import ConfigError
from deploy.labels.messages import conversation, shown_turns, tools_of
from rollout.buffer.history import History, HistoryError
from rollout.wire.schema import decode
from rollout.wire.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class PairCount:
    """Groups of a run, and the pairs that they made."""

    groups: int
    pairs: int
    rewritten: int  # groups left out, since an episode is more than one unbroken conversation


def write_pairs(run: Path, out: Path, margin: float = 0.0) -> PairCount:
    """Write a row for every group whose rewards differ by more than `margin`; .jsonl or .parquet by the file's name.

    ConfigError for a folder that is no finished run, a file that exists, an unknown ending, or no pair.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(
            f"{out}: pairs are written as .jsonl or .parquet; choose a name with such an ending"
        )
    rows, groups, rewritten = [], 0, 0
    for best, worst in _ranked(run):
        groups += 1
        if best.reward - worst.reward <= margin:
            continue
        if not (_is_conversation(best) and _is_conversation(worst)):
            rewritten += 1
            continue
        rows.append(_row(best, worst))
    if not rows:
        raise ConfigError(
            f"{run}: none of its {groups} groups makes a pair: {rewritten} have rewritten conversations, in the others "
            f"no reward differs by more than margin={margin:g}"
        )
    with fresh_file(out) as partial:
        if out.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), partial)
        else:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PairCount(groups, len(rows), rewritten)


def _ranked(run: Path) -> Iterator[tuple[Trajectory, Trajectory]]:
    """The episodes of the most and of the least reward of every group that the run has trained on."""
    try:
        for batch in History(run).groups():
            if episodes := sorted(decode(batch).trainable, key=lambda episode: episode.reward):
                yield episodes[-1], episodes[0]
    except HistoryError as error:
        raise ConfigError(str(error)) from None


def _is_conversation(episode: Trajectory) -> bool:
    """Whether the episode is one list of messages: one segment, and no turn that continues an unfinished one."""
    first = episode.turns[0].segment
    return all(turn.segment == first for turn in episode.turns) and not any(
        json.loads(turn.observation)[0].get("continue_turn") for turn in episode.turns
    )


def _row(best: Trajectory, worst: Trajectory) -> dict[str, Any]:
    played = shown_turns(best)
    prompt, tools = conversation(played[:1])[:-1], tools_of(played)
    chosen, rejected = (conversation(shown_turns(each))[len(prompt) :] for each in (best, worst))
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "margin": best.reward - worst.reward,
        **({"tools": json.dumps(tools)} if tools else {}),
    }
