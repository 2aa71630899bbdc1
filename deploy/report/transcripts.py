"""Transcripts of evaluated episodes, turn by turn: for a terminal, and as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.report.console import Console, write
from deploy.report.episodes import ShownEpisode, Spans, token_text
from rollout.buffer.segments import read_rows

EPISODES = "episodes.jsonl"


def show_transcripts(console: Console, folder: Path, count: int) -> None:
    """Print the first `count` episodes of a folder of stored rows; an episode that failed in its reset has no rows."""
    spans = Spans.of(read_rows(folder))
    text = token_text(folder)
    for place in range(min(count, len(spans))):
        _show(console, spans.episode(place, "", text))


def write_episodes(folder: Path, out: Path | None = None) -> None:
    """Write the stored episodes to OUT/episodes.jsonl, one a line with its messages, answers and rewards.

    out: the folder itself by default.
    """
    spans = Spans.of(read_rows(folder))
    with ((out or folder) / EPISODES).open("w", encoding="utf-8") as file:
        for place in range(len(spans)):
            episode = spans.episode(place, "", str)
            file.write(json.dumps(_plain(episode), ensure_ascii=False) + "\n")


def _plain(episode: ShownEpisode) -> dict[str, Any]:
    turns = [
        {
            "messages": [{"role": role, "content": text} for role, text in turn.messages],
            "answer": turn.action,
            "reward": turn.reward,
            "finish_reason": turn.finish_reason,
        }
        for turn in episode.turns
    ]
    return {
        "env_id": episode.env_id,
        "seed": episode.seed,
        "sample": episode.index,
        "success": episode.success,
        "reward": episode.reward,
        "end_reason": episode.end_reason,
        "error": episode.error,
        "turns": turns,
    }


def _show(console: Console, episode: ShownEpisode) -> None:
    verdict = {True: ", success", False: ", no success", None: ""}[episode.success]
    turns = f"{len(episode.turns)} turn{'s' * (len(episode.turns) != 1)}"
    end = episode.end_reason.replace("_", " ")
    write(console, f"\nseed {episode.seed}: reward {episode.reward:.3f}{verdict}, {turns}, {end}", "bold")
    for turn in episode.turns:
        for role, said in turn.messages:
            _say(console, role, said, "cyan")
        _say(console, "assistant", turn.action, "green")
        cut = ", cut at the token limit" if turn.finish_reason == "length" else ""
        write(console, f"  reward {turn.reward:.3f}{cut}", "dim")
    if episode.error:
        _say(console, "error", episode.error, "red")


def _say(console: Console, role: str, text: str, style: str) -> None:
    """Print a role on the left and its text beside it, with later lines indented."""
    write(console, f"{role:>10}  ", style, end="")
    write(console, text.replace("\n", "\n" + " " * 12))
