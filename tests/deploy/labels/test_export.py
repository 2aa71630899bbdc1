"""Labels as files, read again by what the stages `preference` and `sft` read them with."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from deploy.assembly.stage_data import recorded
from deploy.labels.export import export
from deploy.labels.judgements import Correction, Judgement, Labels, Thumb, agreement
from deploy.labels.pool import Pool
from learner.stages.settings import DatasetSource
from tests.deploy.command import command
from tests.deploy.labels.stored import OPENING, group, stored

ANSWERS = [["4", "yes"], ["5", "no"], ["4", "sure"]]


def labelled(run: Path, *said: dict[str, Any]) -> Path:
    """The run with these judgements of its group 0."""
    pool = Pool(run, 100)
    with closing(Labels(run)) as labels:
        for each in said:
            judgement = Judgement(
                **{"id": str(uuid4()), "group_id": 0, "attempt": 0, "annotator": "ann"} | each
            )
            episodes = [pool.episode(0, 0, place) for place in (judgement.left, judgement.right)]
            labels.add(judgement, [episode for episode in episodes if episode])
    return run


def rows(run: Path, out: Path) -> dict[str, list[dict[str, Any]]]:
    out.mkdir()
    with closing(Labels(run)) as labels:
        export(labels, out)
    return {file.stem: [*map(json.loads, file.read_text().splitlines())] for file in out.iterdir()}


def said(*answers: str) -> list[dict[str, Any]]:
    users: list[list[dict[str, Any]]] = [OPENING, [{"role": "user", "content": "sure?"}]]
    return [
        message
        for heard, answer in zip(users, answers, strict=False)
        for message in (*heard, {"role": "assistant", "content": answer})
    ]


def test_files_say_what_the_majority_of_annotators_said(tmp_path: Path) -> None:
    run = labelled(
        stored(tmp_path / "run", group(0, ANSWERS)),
        {"left": 0, "right": 1, "verdict": "left", "thumbs": (Thumb(episode=1, turn=0, up=False),)},
        {"left": 1, "right": 0, "verdict": "right", "annotator": "ben", "thumbs": (Thumb(episode=1, turn=0, up=True),)},
        {"left": 0, "right": 1, "verdict": "tie", "annotator": "cleo", "thumbs": (Thumb(episode=1, turn=0, up=False),)},
        {"left": 2, "right": 0, "verdict": "left"},  # one for it, one against it: nothing follows
        {"left": 2, "right": 0, "verdict": "right", "annotator": "ben"},
        {
            "left": 1, "right": 2, "verdict": "both_bad",
            "thumbs": (Thumb(episode=2, turn=1, up=True),),
            "corrections": (Correction(episode=1, turn=1, text="No, 4."),),
        },
    )  # fmt: skip
    prompt, longer = OPENING, said("4", "sure")[:-1]
    assert rows(run, tmp_path / "out") == {
        "pairs": [{"chosen": said("4", "yes"), "rejected": said("5", "no")}],
        "thumbs": [
            {"prompt": prompt, "completion": [{"role": "assistant", "content": "5"}], "label": False},
            {"prompt": longer, "completion": [{"role": "assistant", "content": "sure"}], "label": True},
        ],
        "demonstrations": [
            {"prompt": said("5", "no")[:-1], "completion": [{"role": "assistant", "content": "No, 4."}]}
        ],
    }


def test_agreement_is_of_verdicts_whichever_side_an_episode_was_shown_on(tmp_path: Path) -> None:
    run = labelled(
        stored(tmp_path / "run", group(0, ANSWERS)),
        *[
            {"left": 0, "right": 1, "verdict": "left"},
            {"left": 1, "right": 0, "verdict": "right", "annotator": "ben"},
        ],
        *[
            {"left": 0, "right": 2, "verdict": "tie"},
            {"left": 0, "right": 2, "verdict": "tie", "annotator": "ben"},
        ],
        *[
            {"left": 1, "right": 2, "verdict": "skip"},
            {"left": 1, "right": 2, "verdict": "left", "annotator": "ben"},
        ],
    )
    with closing(Labels(run)) as labels:
        assert agreement(labels) == 1.0


def test_the_stages_read_the_files_as_they_are(tmp_path: Path) -> None:
    run = labelled(
        stored(tmp_path / "run", group(0, ANSWERS)),
        {
            "left": 1,
            "right": 2,
            "verdict": "right",
            "corrections": (Correction(episode=1, turn=1, text="No, 4."),),
        },
    )
    rows(run, tmp_path / "out")
    pairs, demonstrations = (
        [*recorded(DatasetSource(path=str(tmp_path / "out" / f"{name}.jsonl")), name)]
        for name in ("pairs", "demonstrations")
    )
    assert [[(talk.reward, talk.turns) for talk in row] for row in pairs] == [
        [
            (reward, ((OPENING, first), ([{"role": "user", "content": "sure?"}], second)))
            for reward, (first, second) in ((1.0, ("4", "sure")), (0.0, ("5", "no")))
        ]
    ]
    # Of the answers before the correction nothing is learned: they are context.
    assert [[talk.turns for talk in row] for row in demonstrations] == [[((said("5", "no")[:-1], "No, 4."),)]]


def test_tools_of_the_environment_stand_in_their_column(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    opening = [{"role": "user", "content": "2 + 2?", "tools": tools, "max_tokens": 8}]
    run = stored(tmp_path / "run", group(0, [["4"], ["5"]], opening=opening))
    (pair,) = rows(labelled(run, {"left": 0, "right": 1, "verdict": "left"}), tmp_path / "out")["pairs"]
    assert pair["tools"] == tools
    assert pair["chosen"][0] == {"role": "user", "content": "2 + 2?"}
    (read,) = recorded(DatasetSource(path=str(tmp_path / "out" / "pairs.jsonl")), "pairs")
    assert [talk.turns[0][0] for talk in read] == [
        [{"role": "user", "content": "2 + 2?", "tools": tools}]
    ] * 2


def test_the_command_exports_once_and_refuses_what_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manta, run, out = (
        command(monkeypatch, capsys),
        stored(tmp_path / "run", group(0, ANSWERS)),
        tmp_path / "out",
    )
    assert manta("label", str(tmp_path))[0::2] == (
        2, f"manta: {tmp_path} is not a run folder: it has no config.json\n",
    )  # fmt: skip
    code, _, error = manta("label", str(run), "--export", str(out))
    assert (code, error) == (2, f"manta: {run} has no labels; collect some with manta label {run}\n")
    labelled(run, {"left": 0, "right": 1, "verdict": "left"})
    code, text, _ = manta("label", str(run), "--export", str(out))
    assert code == 0 and text.splitlines()[:2] == ["     1 pairs", "     0 thumbs"]
    assert sorted(file.name for file in out.iterdir()) == [
        "demonstrations.jsonl",
        "pairs.jsonl",
        "thumbs.jsonl",
    ]
    code, _, error = manta("label", str(run), "--export", str(out))
    assert (code, error) == (2, f"manta: {out} exists already; choose a new name\n")
