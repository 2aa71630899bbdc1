"""Rows of data files as JSON, one after another, kept in one memory-mapped file beside which no process holds them.

    JSONL, JSON, CSV, Parquet, Arrow, a folder of these, a dataset of the Hugging Face hub
      -> rows (dict), each with its file and line -> rows.arrow {file, line, row as JSON} -> Rows (memory-mapped)

The file of rows is made once for the same data (path, size, time of change) and shared by every process of a machine.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from datetime import date, datetime, time
from decimal import Decimal
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

Row = dict[str, Any]
Found = tuple[str, int, Row]  # file, line or row number in it from 1, row

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
SAMPLES = Path(__file__).with_name("samples")
SAMPLE = "sample:"  # of a file that ships with Manta
FILE_OPTIONS = ("path", "heldout_path")  # of the environment: names of data, which is read and never executed
_SCHEMA = pa.schema([("file", pa.string()), ("line", pa.int64()), ("row", pa.large_string())])
_BATCH = 4096  # rows held while the file is made
_FORMAT = "1"  # of the file of rows: a file of another format is written again


class DataError(ValueError):
    """Data cannot be used; the message names the file and, where there is one, the line."""


class DataAbsent(DataError):
    """A dataset of the hub is not on this machine and cannot be fetched."""


class Rows:
    """Rows by index. They are read from the memory-mapped file one at a time."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._file_B, self._line_B, self._row_B = (
            [batch.column(name) for batch in self._batches] for name in _SCHEMA.names
        )

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches)

    def __getitem__(self, index: int) -> Row:
        row: Row = json.loads(self.text(index))
        return row

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def text(self, index: int) -> str:
        """A row as JSON."""
        return str(_value(self._row_B, index))

    def where(self, index: int) -> str:
        """Where a row comes from: "train.jsonl:17"."""
        return f"{_value(self._file_B, index)}:{_value(self._line_B, index)}"


def _value(column_B: list[pa.Array], index: int) -> Any:
    """What a column holds for a row: every batch but the last has _BATCH rows."""
    return column_B[index // _BATCH][index % _BATCH].as_py()


def open_rows(path: str) -> Rows:
    """Rows of a file, a folder or a hub dataset: "owner/name", "owner/name:split", "owner/name:config:split".

    DataError where there are none.
    """
    return _opened(path, tuple(map(_print_of, data_files(path))))


def data_files(path: str) -> list[Path]:
    """The files that a path means, in order of their names; none for a hub id. "sample:NAME" is a file of Manta's."""
    if path.startswith(SAMPLE):
        path = str(SAMPLES / f"{path.removeprefix(SAMPLE)}.jsonl")
    here = Path(path).expanduser()
    if here.is_file():
        if here.suffix not in SUFFIXES:
            raise DataError(f"{path}: files of data end in {', '.join(SUFFIXES)}")
        return [here]
    if here.is_dir():
        found = sorted(each for each in here.rglob("*") if each.suffix in SUFFIXES and not _describes(each))
        if not found:
            raise DataError(f"{path}: the folder holds no file that ends in {', '.join(SUFFIXES)}")
        return found
    if any(sign in here.name for sign in "*?["):
        found = sorted(each for each in here.parent.glob(here.name) if each.suffix in SUFFIXES)
        if not found:
            raise DataError(f"{path}: no file matches that ends in {', '.join(SUFFIXES)}")
        return found
    if path.count("/") == 1 and not here.suffix and not path.startswith((".", "/", "~")):
        return []
    raise DataError(f"{path}: no such file or folder")


def _describes(path: Path) -> bool:
    """Whether a file of a dataset folder describes the data and holds none."""
    return path.name in ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json")


def _print_of(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    return str(file.resolve()), status.st_size, status.st_mtime_ns


@lru_cache(maxsize=16)
def _opened(path: str, prints: tuple[tuple[str, int, int], ...]) -> Rows:
    digest = hashlib.sha256(json.dumps([_FORMAT, path if not prints else "", prints]).encode()).hexdigest()[
        :32
    ]
    kept = cache_folder() / f"{digest}.arrow"
    if not kept.exists():
        found = (row for file, *_ in prints for row in _rows(Path(file))) if prints else _hub_rows(path)
        _write(kept, found, path)
    return Rows(kept)


def cache_folder() -> Path:
    """Where files of rows are kept: MANTA_CACHE, or the user's cache folder."""
    base = (
        os.environ.get("MANTA_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "manta"
    )
    folder = Path(base) / "datasets"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(kept: Path, found: Iterable[Found], path: str) -> None:
    """Write the file of rows. Its name is there once it is whole: another process may write the same at once."""
    descriptor, name = tempfile.mkstemp(dir=kept.parent, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            rows, count = iter(found), 0
            while batch := list(islice(rows, _BATCH)):
                _write_batch(writer, batch)
                count += len(batch)
        if not count:
            raise DataError(f"{path}: there is no row")
        Path(name).replace(kept)
    finally:
        Path(name).unlink(missing_ok=True)


def _write_batch(writer: pa.ipc.RecordBatchFileWriter, batch: list[Found]) -> None:
    files, lines, rows = zip(*batch, strict=True)
    texts = [json.dumps(row, ensure_ascii=False, default=_plain) for row in rows]
    writer.write_batch(pa.record_batch([list(files), list(lines), texts], schema=_SCHEMA))


def _plain(value: Any) -> Any:
    """What JSON has no word for, as what it has one for; bytes (pictures) in base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise DataError(f"a value of type {type(value).__name__} has no form in JSON")


def _rows(file: Path) -> Iterator[Found]:
    """The rows of one file, with their lines. DataError names the first that cannot be read."""
    reader = {".jsonl": _lines, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".arrow": _arrow}[
        file.suffix
    ]
    try:
        for number, row in reader(file):
            if not isinstance(row, dict):
                raise DataError(f"{file}:{number}: a row is an object with named columns, found {row!r:.60}")
            yield file.name, number, row
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: {str(error).splitlines()[0]}") from error


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{file}:{number}: not JSON: {error}") from error


def _json(file: Path) -> Iterator[tuple[int, Any]]:
    text = file.read_text(encoding="utf-8")
    try:
        held = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{"):  # many write lines of JSON under this name
            yield from _lines(file)
            return
        raise DataError(f"{file}:{error.lineno}: not JSON: {error}") from error
    if not isinstance(held, list):
        raise DataError(
            f"{file}: a .json file holds a list of rows, or a row a line; found {type(held).__name__}"
        )
    yield from enumerate(held, 1)


def _csv(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open(encoding="utf-8", newline="") as text:
        reader = csv.DictReader(text)
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{file}:{reader.line_num}: the line has another number of columns than the header's "
                    f"{len(reader.fieldnames or ())}"
                )
            yield reader.line_num, row


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    batches = pq.ParquetFile(file).iter_batches(_BATCH)
    yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1)


def _arrow(file: Path) -> Iterator[tuple[int, Any]]:
    with pa.memory_map(str(file)) as source:
        try:
            reader: Any = pa.ipc.open_stream(source)  # as the datasets library writes it
            batches: Iterable[pa.RecordBatch] = reader
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(source)
            batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
        yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1)


def _hub_rows(path: str) -> Iterator[Found]:
    """Rows of a dataset of the hub, by the `datasets` library."""
    try:
        import datasets
    except ImportError:
        raise DataAbsent(
            f"{path}: no such file or folder; a dataset of the hub needs the extra: pip install 'manta-rl[datasets]'"
        ) from None
    name, *chosen = path.split(":")
    config, split = (chosen[0] if len(chosen) > 1 else None), (chosen[-1] if chosen else "train")
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise DataAbsent(
            f"{path}: the hub's dataset cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    for number, row in enumerate(loaded.with_format(None), 1):
        yield path, number, row
