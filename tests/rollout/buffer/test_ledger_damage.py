"""A ledger that was damaged is refused by name, one that a crash has cut off is not, whatever byte it is."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rollout.buffer.ledger import Ledger
from rollout.buffer.ledger_checks import LedgerError, check_ledger, check_log

# Four steps of two groups each, then the process is killed, so that its log stays.
WRITER = """
import os, signal, sys
from pathlib import Path
from rollout.buffer.ledger import EpisodeRow, Ledger
from rollout.buffer.segments import Location
from rollout.wire.trajectory import EndReason, Slot, Task
ledger = Ledger(Path(sys.argv[1]))
if sys.argv[2] == "checkpointed":
    ledger.db.execute("PRAGMA wal_autocheckpoint=1")
for version in range(4):
    for group_id in (2 * version, 2 * version + 1):
        slot = Slot(group_id, 0, Task.of("count", group_id), version)
        ledger.issue(slot, "w", 0)
        row = EpisodeRow(0, EndReason.TERMINATED, 0.5 * group_id, True, 1, 3, version, None)
        ledger.complete([(slot, Location(0, 100 * group_id, 100, "ab" * 16), [row])])
    ledger.take([2 * version, 2 * version + 1], version)
    ledger.release(version + 1)
    ledger.checkpointed(version + 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module", params=["in the log", "checkpointed"])
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, "-c", WRITER, str(folder / "ledger.sqlite"), request.param], timeout=60)
    return folder


def content(folder: Path) -> list[list[tuple[object, ...]]]:
    db = sqlite3.connect(folder / "ledger.sqlite")
    try:
        tables = ("groups", "episodes", "reuses", "gone", "meta")
        return [db.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
    finally:
        db.close()


def with_flip(whole: bytes, at: int, bit: int) -> bytes:
    return whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]


def test_a_flipped_bit_of_a_ledger_is_refused_by_name_or_changes_nothing(
    killed: Path, tmp_path: Path
) -> None:
    written = {path.name: path.read_bytes() for path in killed.iterdir() if not path.name.endswith("-shm")}
    known = content(shutil.copytree(killed, tmp_path / "known"))
    rng = np.random.default_rng(0)
    refused = 0
    for name, whole in written.items():
        frame = (len(whole) - 32) % 4120 == 0  # of the log
        for at in rng.integers(len(whole) - (4120 if frame else 0), size=60):
            folder = tmp_path / "damaged"
            folder.mkdir()
            for each, data in written.items():
                (folder / each).write_bytes(with_flip(data, at, int(at) % 8) if each == name else data)
            try:
                check_ledger(folder / "ledger.sqlite", 4, 2)
                Ledger(folder / "ledger.sqlite").close()
            except LedgerError as error:
                assert "ledger.sqlite" in str(error) and "\n" not in str(error)
                refused += 1
            else:
                assert content(folder) == known, (name, at)
            shutil.rmtree(folder)
    assert refused > 10


def test_a_log_that_a_crash_has_cut_off_is_no_damage(killed: Path, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    shutil.copy(killed / "ledger.sqlite", path)
    log = (killed / "ledger.sqlite-wal").read_bytes()
    for cut in (0, 20, 32, 40, 32 + 4120, 32 + 4120 + 7, len(log) - 4120, len(log) - 1):
        for tail in (b"", bytes(4120), b"\x55" * 9000):
            path.with_name("ledger.sqlite-wal").write_bytes(log[:cut] + tail if cut >= 32 else log[:cut])
            check_log(path)


def test_a_ledger_without_the_groups_of_a_checkpoint_is_refused(killed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    check_ledger(folder / "ledger.sqlite", 4, 2)
    with pytest.raises(LedgerError, match=r"it has 0 of 2 groups of step 5"):
        check_ledger(folder / "ledger.sqlite", 5, 2)
    ledger = Ledger(folder / "ledger.sqlite")
    ledger.close()
    with sqlite3.connect(folder / "ledger.sqlite") as db:  # by somebody else's hand
        db.execute("UPDATE groups SET reward_sum = 1 WHERE group_id = 3")
    with pytest.raises(LedgerError, match="its rows do not match their checksum"):
        Ledger(folder / "ledger.sqlite")


def test_a_ledger_of_an_earlier_manta_is_given_its_digests(killed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        db.execute("DELETE FROM meta WHERE name IN ('digest', 'schema')")
    Ledger(folder / "ledger.sqlite").close()
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        db.execute("UPDATE episodes SET reward = 7")
    with pytest.raises(LedgerError):
        Ledger(folder / "ledger.sqlite")


def test_what_is_no_ledger_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 40)
    for open_it in (lambda: Ledger(path), lambda: check_ledger(path, 0, 2)):
        with pytest.raises(LedgerError, match=r"ledger\.sqlite: damaged"):
            open_it()
