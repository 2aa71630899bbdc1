"""Segments: what was synced is read back, by Manta and by those who never heard of it; a torn tail stays a tail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from blake3 import blake3

from rollout.buffer.segments import (
    CorruptSegment,
    Location,
    SegmentWriter,
    read_batch,
    read_rows,
    scan,
    segment_files,
    write_once,
)
from rollout.wire.schema import SCHEMA, SchemaError, decode, encode
from rollout.wire.trajectory import Group, Slot, Task

GroupOf = Callable[..., Group]


@pytest.fixture
def batches(group_of: GroupOf) -> list[pa.RecordBatch]:
    return [encode(group_of(Slot(index, 0, Task.of("count", index), 7), tokens=index)) for index in range(6)]


def test_batches_are_read_back_by_place_before_and_after_closing(
    tmp_path: Path, batches: list[pa.RecordBatch]
) -> None:
    writer = SegmentWriter(tmp_path, max_bytes=2**20)
    places = [writer.append(batch) for batch in batches]
    writer.sync()
    assert [read_batch(tmp_path, place) for place in reversed(places)] == batches[::-1]
    writer.close()
    assert [read_batch(tmp_path, place) for place in places] == batches
    assert read_rows(tmp_path) == pa.Table.from_batches(batches)


def test_files_turn_over_by_size_and_none_is_ever_reopened(
    tmp_path: Path, batches: list[pa.RecordBatch]
) -> None:
    writer = SegmentWriter(tmp_path, max_bytes=1)
    assert [writer.append(batch).segment for batch in batches[:3]] == [0, 1, 2]
    writer.close()
    before = [path.read_bytes() for _, path in segment_files(tmp_path)]
    restarted = SegmentWriter(tmp_path, max_bytes=2**20)
    assert [restarted.append(batch).segment for batch in batches[3:]] == [3, 3, 3]
    restarted.close()
    assert [path.name for _, path in segment_files(tmp_path)] == [f"segment-{n:06d}.arrows" for n in range(4)]
    assert [path.read_bytes() for _, path in segment_files(tmp_path)[:3]] == before
    assert read_rows(tmp_path) == pa.Table.from_batches(batches)


def test_a_file_cut_anywhere_yields_its_whole_batches(tmp_path: Path, batches: list[pa.RecordBatch]) -> None:
    writer = SegmentWriter(tmp_path, max_bytes=2**20)
    places = [writer.append(batch) for batch in batches[:3]]
    writer.sync()
    path = tmp_path / "segment-000000.arrows"
    whole = path.read_bytes()
    ends = [place.offset + place.length for place in places]
    assert ends[-1] == len(whole)
    cuts = {0, 1, 4, places[0].offset - 1, places[0].offset, *range(ends[0] - 9, len(whole) + 1, 97), *ends}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        assert list(scan(path)) == batches[: sum(end <= cut for end in ends)], cut
    for count, end in enumerate(ends, start=1):
        # After a power cut a file may be as long as it was and have no bytes at its end.
        path.write_bytes(whole[:end] + b"\0" * 100)
        assert list(scan(path)) == batches[:count]


def test_any_arrow_reader_opens_a_file_while_it_is_written(
    tmp_path: Path, batches: list[pa.RecordBatch]
) -> None:
    writer = SegmentWriter(tmp_path, max_bytes=2**20)
    for batch in batches:
        writer.append(batch)
    writer.sync()
    with pa.memory_map(str(tmp_path / "segment-000000.arrows")) as source:
        rows = duckdb.from_arrow(pa.ipc.open_stream(source))
        found = rows.query(
            "rows",
            "SELECT group_id, count(*), sum(len(action_ids)), max(list_max(versions)), sum(reward) FROM rows "
            "GROUP BY ALL ORDER BY group_id",
        ).fetchall()
    assert found == [(index, 2, 2 * index, 7 if index else None, 1.0) for index in range(6)]
    writer.close()
    with pa.memory_map(str(tmp_path / "segment-000000.arrows")) as source:
        assert pa.ipc.open_stream(source).read_all() == pa.Table.from_batches(batches)


def test_rows_outlive_the_reading(tmp_path: Path, batches: list[pa.RecordBatch]) -> None:
    writer = SegmentWriter(tmp_path, max_bytes=2**20)
    writer.append(batches[5])
    writer.close()
    (batch,) = scan(tmp_path / "segment-000000.arrows")
    (tmp_path / "segment-000000.arrows").unlink()
    np.testing.assert_array_equal(decode(batch).trajectories[0].turns[0].action_ids, [5, 6, 7, 8, 9])


def test_a_file_of_another_version_is_refused_by_name(tmp_path: Path, batches: list[pa.RecordBatch]) -> None:
    writer = SegmentWriter(tmp_path, max_bytes=2**20)
    place = writer.append(batches[0])
    writer.close()
    path = tmp_path / "segment-000000.arrows"
    other = batches[0].replace_schema_metadata({b"manta.schema": b"0"})
    with pa.ipc.new_stream(str(path), other.schema) as stream:
        stream.write_batch(other)
    for read in (lambda: read_rows(tmp_path), lambda: read_batch(tmp_path, place)):
        with pytest.raises(SchemaError, match=r"segment-000000\.arrows: rows of schema version 0"):
            read()


@pytest.mark.parametrize("closed", [True, False])
def test_a_flipped_bit_anywhere_is_named_or_changes_nothing(
    closed: bool, tmp_path: Path, batches: list[pa.RecordBatch]
) -> None:
    writer = SegmentWriter(tmp_path, max_bytes=2**20)
    ends = [place.offset + place.length for place in map(writer.append, batches[:3])]
    writer.sync()
    if closed:
        writer.close()
    path = tmp_path / "segment-000000.arrows"
    whole = path.read_bytes()
    named = 0
    for at in [*range(0, len(whole), 23), *range(len(whole) - 60, len(whole))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            assert list(scan(path)) == batches[:3], at
        except (CorruptSegment, SchemaError) as error:
            assert "segment-000000.arrows" in str(error) and "\n" not in str(error)
            named += 1
    assert named > 0.8 * (ends[-1] - 2000) / 23  # all but what stands in the schema and names nothing


def test_rows_of_an_earlier_manta_are_read(tmp_path: Path, batches: list[pa.RecordBatch]) -> None:
    path = tmp_path / "segment-000000.arrows"
    with pa.ipc.new_stream(str(path), SCHEMA) as stream:
        for batch in batches:
            stream.write_batch(batch)
    assert list(scan(path)) == batches
    message = batches[0].serialize()
    offset = len(SCHEMA.serialize())
    place = Location(0, offset, message.size, blake3(message).hexdigest(length=16))
    assert read_batch(tmp_path, place) == batches[0]


def test_a_batch_that_is_not_what_was_written_is_named(tmp_path: Path, batches: list[pa.RecordBatch]) -> None:
    writer = SegmentWriter(tmp_path, max_bytes=2**20)
    place = [writer.append(batch) for batch in batches][3]
    writer.close()
    path = tmp_path / "segment-000000.arrows"
    whole = path.read_bytes()
    for at in (place.offset, place.offset + place.length // 2, place.offset + place.length - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CorruptSegment, match=r"segment-000000\.arrows: the checksum does not match"):
            read_batch(tmp_path, place)
    for damaged in (whole[: place.offset + 5], b""):
        path.write_bytes(damaged)
        with pytest.raises(CorruptSegment, match=r"segment-000000\.arrows"):
            read_batch(tmp_path, place)
    path.write_bytes(whole)
    assert read_batch(tmp_path, place) == batches[3]
    path.unlink()
    with pytest.raises(CorruptSegment, match="is gone"):
        read_batch(tmp_path, place)


def test_rows_that_are_stored_once_are_stored_once(tmp_path: Path, batches: list[pa.RecordBatch]) -> None:
    for share in (batches[:2], batches[2:4], batches[:2], batches[2:4], []):
        write_once(tmp_path, share)
    assert read_rows(tmp_path) == pa.Table.from_batches(batches[:4])
    assert not list(tmp_path.glob("*.partial"))
