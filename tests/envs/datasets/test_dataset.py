"""The environment over data files: schemas of other trainers, splits, attempts, and rows that cannot be played."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from envs import registry
from envs.datasets.dataset import Dataset
from envs.datasets.files import DataError
from envs.images import decode_image, image_part
from envs.registry import EnvironmentUnknown
from rollout.episodes.tasks import TaskStream
from tests.envs.chat_server import Messages, chat_server

SUMS = [
    {"question": f"{a} + {b}?", "answer": str(a + b), "level": a % 3} for a in range(10) for b in range(10)
]
GOOD = {"prompt": "a", "answer": "b"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))


def lines(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder / name)


def parquet(folder: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def test_a_right_answer_is_paid_and_a_wrong_one_is_not(tmp_path: Path) -> None:
    env = registry.make("dataset", path=lines(tmp_path, SUMS), rewards="number")
    for answer, paid in (("It is 7.", 1.0), ("8", 0.0)):
        messages, info = env.reset(seed=34)  # the 35th row: 3 + 4
        assert (messages, info) == ([{"role": "user", "content": "3 + 4?"}], {"row": "rows.jsonl:35"})
        _, reward, terminated, truncated, info = env.step(answer)
        assert (reward, terminated, truncated) == (paid, True, False)
        assert info == {"success": bool(paid), "rewards": {"number": paid}}


def test_a_wrong_answer_may_be_tried_again(tmp_path: Path) -> None:
    env = Dataset(lines(tmp_path, SUMS), "number", attempts=3, feedback="No.")
    env.reset(seed=34)
    assert env.step("5")[:4] == ("No.", 0.0, False, False)
    assert env.step("7")[1:4] == (1.0, True, False)
    env.reset(seed=34)
    assert [env.step("5")[2] for _ in range(3)] == [False, False, True]


def test_only_the_last_answer_is_given_every_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reward says whether there is another answer; the others may cost a question to a server."""
    (tmp_path / "costly.py").write_text(
        "paid = []\ndef fee(completion, row):\n    paid.append(completion)\n    return 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    env = Dataset(lines(tmp_path, SUMS), ["number", "costly:fee"], attempts=2)
    env.reset(seed=34)
    assert env.step("5")[2] is False
    assert env.step("7")[1] == 3.0
    assert sys.modules["costly"].paid == ["7"]


def test_a_simulated_user_talks_until_it_has_what_it_wants(tmp_path: Path) -> None:
    heard: list[Messages] = []

    def user(messages: Messages) -> str:
        heard.append(messages)
        return "[DONE]" if messages[-1]["content"] == "7" else " And in digits? "

    rows = [{"prompt": "Three and four?", "answer": "7", "wish": "digits"}]
    with chat_server(user) as url:
        options = {"model": "m", "base_url": url, "turns": 2, "prompt": "You want {wish}. Else say [DONE]."}
        env = Dataset(lines(tmp_path, rows), "exact", user=options)
        env.reset(seed=0)
        assert env.step("Seven.")[:4] == ("And in digits?", 0.0, False, False)
        other = Dataset(lines(tmp_path, rows), "exact", user=options)
        other.reset(seed=0)
        other.restore(env.snapshot())
        assert other.step("7")[1:] == (1.0, True, False, {"success": True, "rewards": {"exact": 1.0}})
        assert heard[-1] == [
            {"role": "system", "content": "You want digits. Else say [DONE]."},
            {"role": "assistant", "content": "Three and four?"},
            {"role": "user", "content": "Seven."},
            {"role": "assistant", "content": "And in digits?"},
            {"role": "user", "content": "7"},
        ]
        env.reset(seed=0)  # the user's turns are spent after the third answer
        assert [env.step("Seven.")[2] for _ in range(3)] == [False, False, True]
        assert env.nondeterministic
    for wrong, told in (
        ({"user": {"model": "m", "turns": 0}}, "turns=0"),
        ({"user": {"model": "m", "prompt": "Be a user."}}, r"has to ask for \[DONE\]"),
        ({"user": {"model": "m"}, "attempts": 2}, "attempts=2 beside a user"),
    ):
        with pytest.raises(ValueError, match=told):
            Dataset(lines(tmp_path, rows), **cast(Any, wrong))


def test_files_of_verl_are_read_as_they_are(tmp_path: Path) -> None:
    row = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "48 and half of it?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"},
        "extra_info": {"split": "train", "index": 0, "answer": "#### 72", "question": "48 and half of it?"},
    }
    env = Dataset(parquet(tmp_path, [row]), "number")
    assert env.reset(seed=0)[0] == row["prompt"]
    assert env.step("48 + 24 = 72")[1] == 1.0


def test_files_of_trl_and_openrlhf_are_read_as_they_are(tmp_path: Path) -> None:
    conversation = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "blue"}]
    for name, row in {
        "prompt-only": {"prompt": "Sky?", "solution": "blue"},
        "conversational": {"prompt": conversation[:1], "solution": "blue"},
        "messages": {"messages": conversation},
        "prompt-completion": {"prompt": "Sky?", "completion": "blue"},
        "sharegpt": {"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "blue"}]},
        "openrlhf": {"input": "Sky?", "label": "blue"},
    }.items():
        env = Dataset(parquet(tmp_path, [row]))
        assert env.reset(seed=0)[0] == [{"role": "user", "content": "Sky?"}], name
        assert env.step("Blue")[1] == 1.0, name


def test_a_prompt_is_made_of_columns_and_a_system_message(tmp_path: Path) -> None:
    path = lines(tmp_path, [{"a": {"b": 3}, "c": '{"x": 1}', "truth": 3}])
    env = Dataset(path, template='Say {a.b} and {"{c}"}', system="Be short.", answer="truth")
    assert env.reset(seed=0)[0] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": 'Say 3 and {"{"x": 1}"}'},
    ]
    assert env.step("3")[1] == 1.0


def test_pictures_stand_where_they_are_marked(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    png = base64.b64decode(image_part(pixels)["image"].partition(",")[2])
    row = {"prompt": "Is <image> blue?", "images": [{"bytes": png, "path": None}], "answer": "no"}
    ((message,), _) = Dataset(parquet(tmp_path, [row])).reset(seed=0)
    before, picture, after = message["content"]
    assert (before["text"], after["text"]) == ("Is ", " blue?")
    assert np.array_equal(decode_image(picture), pixels)


def test_rows_may_be_numbered_by_their_difficulty(tmp_path: Path) -> None:
    rows = [{"prompt": str(level), "answer": "x", "level": level} for level in (3, 1, 2.5, 1)]
    env = Dataset(lines(tmp_path, rows), order_by="level")
    assert [env.reset(seed=seed)[0][0]["content"] for seed in range(4)] == ["1", "1", "2.5", "3"]
    stream = TaskStream("dataset", count=4, shuffle=False)
    assert [stream(group).seed % 4 for group in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert len({stream(group).seed for group in range(8)}) == 8
    with pytest.raises(DataError, match=r"rows.jsonl:2: order_by='level' needs a number in every row"):
        Dataset(lines(tmp_path, [rows[0], GOOD]), order_by="level")


def test_splits_share_no_row_and_filters_leave_rows_out(tmp_path: Path) -> None:
    path = lines(tmp_path, SUMS)
    counts = {
        split: registry.task_count("dataset", {"path": path, "split": split})
        for split in ("train", "heldout")
    }
    assert sum(filter(None, counts.values())) == len(SUMS)
    rows = {
        split: {Dataset(path, split=split).reset(seed=seed)[1]["row"] for seed in range(counts[split] or 0)}
        for split in ("train", "heldout")
    }
    assert not rows["train"] & rows["heldout"]
    assert len(rows["train"]) == counts["train"]
    assert registry.task_count("dataset", {"path": path, "where": {"level": [0, 2]}}) == 70
    other = lines(tmp_path, SUMS[:3], "other.jsonl")
    assert registry.task_count("dataset", {"path": path, "heldout_path": other, "split": "heldout"}) == 3
    assert registry.task_count("dataset", {"path": path, "heldout_path": other, "split": "train"}) == 100


def test_every_row_is_played_once_before_any_is_played_again(tmp_path: Path) -> None:
    path = lines(tmp_path, SUMS)
    env = Dataset(path)
    stream = TaskStream(
        "dataset", {"path": path}, seed=5, count=registry.task_count("dataset", {"path": path})
    )
    passes = [
        [env.reset(seed=stream(group).seed)[1]["row"] for group in range(start, start + 100)]
        for start in (0, 100, 200)
    ]
    assert [len(set(rows)) for rows in passes] == [100, 100, 100]
    assert len({tuple(rows) for rows in passes}) == 3
    assert stream(7) == stream(7)
    far = {stream(group).seed for group in range(10**9, 10**9 + 100)}
    assert all(2**30 <= seed < 2**31 for seed in far)


@pytest.mark.parametrize(
    ("rows", "options", "told"),
    [
        ([{"q": "a"}], {}, "rows.jsonl: no column of the usual names .* its columns: q"),
        ([{"prompt": "a"}], {"prompt": "qestion"}, "rows.jsonl: there is no column 'qestion'"),
        ([{"prompt": "a"}], {"template": "{b}"}, "there is no column 'b'"),
        (
            [GOOD, {"prompt": "", "answer": "b"}],
            {},
            "rows.jsonl:2: column 'prompt': a prompt is",
        ),
        (
            [GOOD, {"prompt": "a", "answer": None}],
            {},
            "rows.jsonl:2: column 'answer' holds no",
        ),
        (
            [GOOD, {"prompt": "a", "answer": " "}],
            {},
            "rows.jsonl:2: column 'answer' holds ' ', which the reward",
        ),
        (
            [{"prompt": "a", "answer": "two"}],
            {"rewards": "number"},
            "rows.jsonl:1: .* 'two', .* 'number' does not",
        ),
        (
            [{"prompt": "a", "answer": "2nd"}],
            {"rewards": "choice"},
            "rows.jsonl:1: .* '2nd', .* 'choice' does not",
        ),
        ([{"prompt": "a", "answer": "why #### 1,200"}], {"rewards": "number"}, None),
        ([{"prompt": "a", "answer": "(b)"}], {"rewards": "choice"}, None),
        ([{"prompt": "a", "answer": ["", "b"]}], {"rewards": "contains"}, None),
        ([{"prompt": [{"role": "bot", "content": "a"}]}], {}, "rows.jsonl:1: .* a message has a role"),
        ([{"prompt": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]}], {}, None),
        ([{"prompt": "a"}], {"where": {"x": 1}}, "no row is left in split=all with where="),
    ],
)
def test_a_row_that_cannot_be_played_is_named(
    tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], told: str | None
) -> None:
    path = lines(tmp_path, rows)
    if told is None:
        Dataset.check_tasks(path=path, **options)
        return
    with pytest.raises(DataError, match=told):
        Dataset.check_tasks(path=path, **options)


def test_wrong_options_are_refused_in_a_line(tmp_path: Path) -> None:
    path = lines(tmp_path, SUMS)
    for options, told in (
        ({"rewards": "nmber"}, "there is no reward 'nmber'"),
        ({"attempts": 0}, "attempts=0 leaves no answer"),
        ({"path": "none.jsonl"}, "none.jsonl: no such file"),
        ({"colour": 1}, "has no option 'colour'"),
    ):
        with pytest.raises(EnvironmentUnknown, match=told):
            registry.make("dataset", **{"path": path} | options)
