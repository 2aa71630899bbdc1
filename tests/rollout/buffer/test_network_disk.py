"""Network file systems, which a library pretends: no ledger is in use there, or it is refused in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.buffer import file_system
from rollout.buffer.file_system import flaw_of
from rollout.buffer.state_place import copy_of
from tests.rollout.buffer.copied import copied, tables

ROOT = Path(__file__).resolve().parents[3]
FLAWS = {
    "type": "it is on a network file system (NFS)",
    "locks": "its files cannot be locked (No locks available)",
    "free": "a lock on its files does not exclude a second one",
    "memory": "its files cannot be shared memory (No such device)",
}
# Opens the run's replay buffer, plays, and is killed without a word to anybody.
SCRIPT = """
import asyncio, os, sys
from pathlib import Path
from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.buffer.ledger_checks import LedgerError
from rollout.buffer.settings import BufferSettings
from rollout.buffer.state_place import copy_of
from rollout.wire.schema import encode
from tests.rollout.buffer.store_model import played, task_of
from tests.rollout.buffer.stores import rows_of, turns

async def play(run, local):
    settings = BufferSettings(groups_per_step=2, max_lag=1, local_dir=local)
    buffer = ReplayBuffer.over(run, task_of, settings, 10, 0, copy=copy_of(run, "auto"))
    for loop in range(3):
        slot = (await buffer.reserve("w", loop)).slot
        await buffer.record_turns(turns(slot, 0))
        if loop < 2:
            group = played(slot, (0, 0))
            await buffer.add(slot, encode(group), rows_of(group))
    await buffer.take(0, 5.0)
    print("taken", buffer._store._groups, flush=True)
    os._exit(9)

try:
    asyncio.run(play(Path(sys.argv[1]), sys.argv[2]))
except LedgerError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the library that stands for a network file system")
    built = tmp_path_factory.mktemp("library") / "network_disk.so"
    source = Path(__file__).with_name("network_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(built), str(source), "-ldl"], check=True)
    return str(built)


def played(library: str, how: str, disk: Path, run: Path, local: Path) -> str:
    """What the script says on a machine where `disk` is such a file system."""
    faked = {"LD_PRELOAD": library, "NETWORK_HOW": how, "NETWORK_DISK": str(disk), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(run), str(local)],
        env=os.environ | faked,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 9), done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("how", FLAWS)
def test_where_a_file_system_fails_the_state_is_elsewhere_and_its_copy_is_whole(
    how: str, library: str, tmp_path: Path
) -> None:
    run = tmp_path / "network" / "run"
    run.mkdir(parents=True)
    said = played(library, how, tmp_path / "network", run, tmp_path / "local")
    state = Path(said.removeprefix("taken ")).parent
    assert state.is_relative_to(tmp_path / "local")
    assert not list(run.glob("ledger.sqlite-*"))  # the ledger there was never opened
    rows, _ = copied(run)
    assert {row["group_id"]: row["state"] for row in rows["groups"]} == {0: "taken", 1: "taken", 2: "issued"}
    assert rows == tables(state)


@pytest.mark.parametrize("how", FLAWS)
def test_a_local_folder_on_such_a_file_system_is_refused_in_one_line(
    how: str, library: str, tmp_path: Path
) -> None:
    run = tmp_path / "network" / "run"
    run.mkdir(parents=True)
    local = tmp_path / "network" / "local"
    said = played(library, how, tmp_path / "network", run, local)
    assert (
        said
        == f"{local} cannot hold the ledger: {FLAWS[how]}; set buffer.local_dir to a folder on a local disk"
    )


def test_known_types_are_told_by_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flaw_of(tmp_path) == "" and copy_of(tmp_path, "auto") == ""
    for number, name in {0x6969: "NFS", 0x0BD00BD0: "Lustre", 0x65735546: "FUSE", 0xFE534D42: "SMB"}.items():
        monkeypatch.setattr(file_system, "_type_of", lambda folder, number=number: number)
        assert flaw_of(tmp_path) == f"it is on a network file system ({name})"
        assert copy_of(tmp_path, "auto") == str(tmp_path)
    monkeypatch.undo()
    assert copy_of(tmp_path, "run") == str(tmp_path)
    assert copy_of(tmp_path, "s3://bucket/run") == "s3://bucket/run"
    (tmp_path / "copy").mkdir()
    assert copy_of(tmp_path, "auto") == str(tmp_path)  # a run keeps its copy on any file system
