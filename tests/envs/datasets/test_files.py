"""Files of data: every format gives the same rows, faults are named by file and line, and no process holds the rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from envs.datasets.files import DataError, open_rows

ROWS: list[dict[str, Any]] = [
    {"question": "3 + 4?", "answer": "7", "tags": ["easy"], "meta": {"level": 1}},
    {"question": "Grüße, 5 - 9?", "answer": "-4", "tags": [], "meta": {"level": 2}},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))


def written(folder: Path, suffix: str) -> Path:
    path, table = folder / f"rows.{suffix}", pa.Table.from_pylist(ROWS)
    if suffix == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    elif suffix == "json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif suffix == "parquet":
        pq.write_table(table, path, row_group_size=1)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow"])
def test_every_format_holds_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = open_rows(str(written(tmp_path, suffix)))
    assert list(rows) == ROWS
    assert rows.where(1) == f"rows.{suffix}:{3 if suffix == 'jsonl' else 2}"


def test_a_table_of_text_has_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n"two\nlines, and a comma",7\nx,8\n', encoding="utf-8")
    rows = open_rows(str(path))
    assert list(rows) == [
        {"question": "two\nlines, and a comma", "answer": "7"},
        {"question": "x", "answer": "8"},
    ]
    assert rows.where(1) == "rows.csv:4"


def test_a_folder_is_its_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 0):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"part-{number}.jsonl").write_text(json.dumps({"q": number}), encoding="utf-8")
    (tmp_path / "data" / "dataset_info.json").write_text("{}", encoding="utf-8")
    assert [row["q"] for row in open_rows(str(tmp_path / "data"))] == [0, 1]
    assert [row["q"] for row in open_rows(str(tmp_path / "data" / "part-*"))] == [0, 1]
    monkeypatch.chdir(tmp_path / "data")
    assert [row["q"] for row in open_rows("part-*.jsonl")] == [0, 1]
    with pytest.raises(DataError, match=r"part-\*.csv: no file matches"):
        open_rows("part-*.csv")


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for count in (1, 3):
        path.write_text("\n".join(json.dumps({"q": each}) for each in range(count)), encoding="utf-8")
        assert len(open_rows(str(path))) == count


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.jsonl", b'{"q": 1}\n{"q": \n', r"rows.jsonl:2: not JSON"),
        ("rows.jsonl", b'{"q": 1}\n[1]\n', r"rows.jsonl:2: a row is an object"),
        ("rows.jsonl", b'{"q": "\xff"}\n', r"rows.jsonl: not UTF-8"),
        ("rows.jsonl", b"\n", "there is no row"),
        ("rows.json", b'{"q": 1', r"rows.json:1: not JSON"),
        ("rows.json", b"3", r"rows.json: a .json file holds a list of rows"),
        (
            "rows.csv",
            b"a,b\n1,2\n1\n",
            r"rows.csv:3: the line has another number of columns than the header's 2",
        ),
        ("rows.parquet", b"PAR1", r"rows.parquet: "),
        ("rows.txt", b"", "files of data end in .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        open_rows(str(tmp_path / name))


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_rows(str(tmp_path / "none.jsonl"))
    monkeypatch.setitem(sys.modules, "datasets", None)  # whether the extra is here or not
    with pytest.raises(DataError, match="no such file or folder; a dataset of the hub needs the extra"):
        open_rows("someone/gsm8k")


def test_a_hub_dataset_is_named_with_its_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    class Loaded(list[dict[str, str]]):
        def with_format(self, _: None) -> Loaded:
            return self

    def load_dataset(name: str, config: str | None, split: str) -> Loaded:
        asked.append((name, config, split))
        return Loaded([{"question": "1 + 1?", "answer": "2"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for path in ("someone/sums", "someone/sums:test", "someone/sums:main:test"):
        assert open_rows(path)[0] == {"question": "1 + 1?", "answer": "2"}
    assert asked == [
        ("someone/sums", None, "train"),
        ("someone/sums", None, "test"),
        ("someone/sums", "main", "test"),
    ]


def test_a_process_does_not_hold_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    line = json.dumps({"question": "what is " + "1 + " * 250 + "1?", "answer": "251"})
    path.write_text("\n".join([line] * 100_000), encoding="utf-8")  # 100 MB
    script = (
        "import resource, sys; from envs.datasets.files import open_rows; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; rows = open_rows(sys.argv[1]); "
        "rows[99_999]; print(len(rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    count, kilobytes = map(int, ran.stdout.split())
    assert count == 100_000
    assert kilobytes < 50_000
