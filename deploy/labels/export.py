"""Labels as files of JSON lines, in TRL's conversational formats, which the stages of a run read too.

    pairs.jsonl            chosen, rejected: of each pair the whole conversations, by the majority of its annotators
    thumbs.jsonl           prompt, completion, label: of each judged turn, by majority
    demonstrations.jsonl   prompt, completion: each corrected answer; only the completion is learned

A column `tools` is there where the environment offered tools. A tie of annotators is left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.labels.judgements import Judgement, Labels, by_pair
from deploy.labels.messages import Shown, conversation, spoken, tools_of

Row = dict[str, Any]
Key = tuple[int, int, int]  # group, attempt and place of an episode
Turns = Mapping[Key, Sequence[Shown]]


def export(labels: Labels, folder: Path) -> dict[str, int]:
    """Write the three files into an existing folder; returns the rows of each, by the file's name."""
    judgements, turns = [*labels], labels.turns()
    found = {
        "pairs": pairs(judgements, turns),
        "thumbs": thumbs(judgements, turns),
        "demonstrations": demonstrations(judgements, turns),
    }
    return {name: _write(folder / f"{name}.jsonl", rows) for name, rows in found.items()}


def pairs(judgements: Iterable[Judgement], turns: Turns) -> Iterator[Row]:
    """A row for each pair of which more annotators prefer the one episode than the other."""
    for pair, given in by_pair(judgements).items():
        lead = sum((each.answer == "first") - (each.answer == "second") for each in given)
        if lead:
            ranked = (pair.first, pair.second) if lead > 0 else (pair.second, pair.first)
            chosen, rejected = (turns[pair.group_id, pair.attempt, place] for place in ranked)
            yield {"chosen": conversation(chosen), "rejected": conversation(rejected)} | _tools(chosen)


def thumbs(judgements: Iterable[Judgement], turns: Turns) -> Iterator[Row]:
    """A row for each turn of which more thumbs point one way than the other."""
    leads: Counter[tuple[Key, int]] = Counter()
    for judgement in judgements:
        for thumb in judgement.thumbs:
            episode = (judgement.group_id, judgement.attempt, thumb.episode)
            leads[episode, thumb.turn] += 1 if thumb.up else -1
    for (episode, turn), lead in leads.items():
        if lead:
            played = turns[episode]
            yield _completed(played, turn, played[turn]["answer"]) | {"label": lead > 0}


def demonstrations(judgements: Iterable[Judgement], turns: Turns) -> Iterator[Row]:
    """A row for each correction: what was said before the turn, and what should have been answered."""
    for judgement in judgements:
        for each in judgement.corrections:
            played = turns[judgement.group_id, judgement.attempt, each.episode]
            yield _completed(played, each.turn, each.text)


def _completed(played: Sequence[Shown], turn: int, answer: str) -> Row:
    prompt = conversation(played[: turn + 1])[:-1]
    return {"prompt": prompt, "completion": [spoken(answer)]} | _tools(played)


def _tools(played: Sequence[Shown]) -> Row:
    tools = tools_of(played)
    return {"tools": tools} if tools else {}


def _write(path: Path, rows: Iterable[Row]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)
