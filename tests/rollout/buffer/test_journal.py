"""The journal: durable turns come back exactly, whatever a crash or a disk has made of the files."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rollout.buffer.journal import Journal, read_journal
from rollout.wire.schema import JOURNAL_SCHEMA, VERSION, SchemaError, encode_turns, restore_turns
from rollout.wire.trajectory import EndReason, PartialEpisode, Slot, Task, Turn, TurnEnd

Place = tuple[int, int, int, int]  # group, attempt, episode, turn


def step(group: int, attempt: int, episode: int, turn: int, version: int = 0) -> Turn:
    ids = np.array([group, attempt, episode, turn], dtype=np.int32)
    by = np.full(4, version, dtype=np.int32)
    return Turn(turn, 0, "?", "!", ids, ids[:2], -np.ones(4, np.float32), by, 0.5, "stop", 0.25, 0.125)


def rows(*turns: Place, version: int = 0) -> pa.RecordBatch:
    given = [
        (Slot(turn[0], turn[1], Task.of("count", turn[0]), 0), turn[2], step(*turn, version), None, None)
        for turn in turns
    ]
    return encode_turns(given, "w")


def write(journal: Journal, *batches: pa.RecordBatch) -> None:
    written = journal.append(batches)
    journal.sync()
    journal.keep(written)


def known(journal: Journal, group: int) -> list[list[int]]:
    found = journal.turns(group)
    episodes = {} if found is None else restore_turns(found)
    return [s.prompt_ids.tolist() for episode in episodes.values() for s in episode.turns]


def test_a_turn_comes_back_as_it_was() -> None:
    slot = Slot(3, 1, Task.of("count", 7, {"size": 4}), 5)
    end = TurnEnd(EndReason.TERMINATED, True)
    steps = [step(3, 1, 0, 0), step(3, 1, 0, 1), step(3, 1, 2, 0)]
    given = [
        (slot, 2, steps[2], None, b"\0state"),
        (slot, 0, steps[0], None, None),
        (slot, 0, steps[1], end, None),
    ]
    batch = encode_turns(given, "w")
    batch.validate(full=True)
    assert batch.schema.equals(JOURNAL_SCHEMA, check_metadata=True)
    found = restore_turns(batch)
    assert list(found) == [0, 2]
    assert (found[0].end, found[0].snapshot, found[2].end, found[2].snapshot) == (end, None, None, b"\0state")
    for expected, got in zip(steps, [*found[0].turns, *found[2].turns], strict=True):
        np.testing.assert_equal(vars_of(got), vars_of(expected))
    assert restore_turns(encode_turns([], "w")) == {}


def vars_of(step: Turn) -> dict[str, object]:
    return {name: getattr(step, name) for name in Turn.__slots__}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([(0, 0), (0, 1), (0, 2)], [(0, 0), (0, 1), (0, 2)]),
        ([(0, 1), (0, 0), (0, 0), (0, 1)], [(0, 0), (0, 1)]),
        ([(0, 0), (0, 2), (0, 3)], [(0, 0)]),
        ([(0, 1), (0, 2)], []),
        ([(0, 0), (0, 1), (1, 2), (3, 3)], [(0, 0), (0, 1), (1, 2), (3, 3)]),
        ([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)], [(1, 0), (1, 1)]),
        ([(0, 0), (0, 1), (1, 1)], [(0, 0), (1, 1)]),
        ([(0, 0), (1, 2)], [(0, 0)]),
    ],
    ids=[
        "in order",
        "any order, repeated",
        "a gap",
        "no beginning",
        "handed on",
        "anew",
        "from the middle",
        "a gap between",
    ],
)
def test_an_episodes_turns_are_a_prefix_of_one_playing(
    given: list[tuple[int, int]], kept: list[tuple[int, int]]
) -> None:
    found = restore_turns(rows(*[(0, attempt, 0, turn) for attempt, turn in given]))
    episode = found.get(0, PartialEpisode((), None, None))
    assert [(s.prompt_ids[1], s.prompt_ids[3]) for s in episode.turns] == kept


def test_a_file_cut_anywhere_yields_its_whole_records(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, {})
    batches = [rows((0, 0, 0, turn), (1, 0, 0, turn)) for turn in range(3)]
    ends = []
    path = tmp_path / "turns-000000.journal"
    for batch in batches:
        write(journal, batch)
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in {*range(0, len(whole), 41), *(end + shift for end in ends for shift in (-1, 0, 1, 23))}:
        for tail in (b"", b"\0" * 50):
            path.write_bytes(whole[: min(cut, len(whole))])
            count = sum(end <= cut for end in ends)
            if tail and cut not in ends:
                continue  # bytes are lost behind what was written, not within
            path.write_bytes(whole[:cut] + tail)
            assert read_journal(path) == (batches[:count], None), cut


@pytest.mark.parametrize("at", ["magic", "length", "checksum", "payload"])
def test_a_damaged_record_ends_what_is_known_and_its_file_is_set_aside(
    at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = {0: 0, 1: 0}
    journal = Journal(tmp_path, 0, attempts, max_bytes=1)
    for turn in range(2):
        write(journal, rows((0, 0, 0, turn)))
    journal = Journal(tmp_path, 0, attempts)
    path = tmp_path / "turns-000002.journal"
    write(journal, rows((0, 0, 0, 2), (1, 0, 0, 0)))
    begin = path.stat().st_size
    write(journal, rows((0, 0, 0, 3)), rows((0, 0, 0, 4)))
    write(Journal(tmp_path, 0, attempts), rows((1, 0, 0, 1)))  # in a file of its own
    data = bytearray(path.read_bytes())
    data[begin + {"magic": 1, "length": 6, "checksum": 9, "payload": 200}[at]] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        journal = Journal(tmp_path, 0, attempts)
    assert journal.damaged
    assert f"turns-000002.journal: the record at byte {begin} is damaged" in caplog.text
    rewritten = journal.rewrite(attempts)
    journal.adopt(rewritten)
    for reading in (journal, Journal(tmp_path, rewritten.first, attempts)):
        assert [turn[3] for turn in known(reading, 0)] == [0, 1, 2]
        assert [turn[3] for turn in known(reading, 1)] == [0]
    assert sorted(found.name for found in tmp_path.iterdir()) == [
        "turns-000002.journal.corrupt",
        "turns-000004.journal",
    ]


def test_a_file_is_removed_once_none_of_its_groups_is_unfinished(tmp_path: Path) -> None:
    def files() -> list[int]:
        return sorted(int(path.stem.removeprefix("turns-")) for path in tmp_path.iterdir())

    journal = Journal(tmp_path, 0, {}, max_bytes=1)
    for turn in range(3):
        write(journal, rows((0, 0, 0, turn)), rows((1, 0, 0, turn)))
    journal.finish([1])
    assert files() == [0, 2, 4, 5], "the last one is open"
    write(journal, rows((2, 0, 0, 0)))
    journal.finish([0])
    assert files() == [6]
    assert known(Journal(tmp_path, 0, {2: 0}), 2) == [[2, 0, 0, 0]]
    Journal(tmp_path, 0, {})
    assert files() == []


def test_going_back_keeps_turns_up_to_the_first_token_of_lost_weights(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, {})
    for turn, version in enumerate([0, 1, 2, 1]):
        write(journal, rows((0, 0, 0, turn), version=version))
    write(journal, rows((0, 0, 1, 0), version=1), rows((1, 0, 0, 0), version=0))
    rewritten = journal.rewrite([0], up_to=1)
    assert [turn[2:] for turn in known(journal, 0)] == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]], "not yet"
    journal.adopt(rewritten)
    reopened = Journal(tmp_path, rewritten.first, {0: 0, 1: 0})
    for reading in (journal, reopened):
        assert [turn[2:] for turn in known(reading, 0)] == [[0, 0], [0, 1], [1, 0]]
        assert known(reading, 1) == []


def test_turns_of_another_version_of_the_schema_are_refused(tmp_path: Path) -> None:
    write(Journal(tmp_path, 0, {}), rows((0, 0, 0, 0)))
    path = tmp_path / "turns-000000.journal"
    path.write_bytes(path.read_bytes().replace(b"MTJ" + VERSION, b"MTJ7", 1))
    with pytest.raises(SchemaError, match=r"turns-000000\.journal: turns of schema version 7"):
        Journal(tmp_path, 0, {0: 0})
