"""How a run's processes are known after its driver is gone."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from ray._common.utils import try_to_create_directory

from deploy.cluster import janitor

TITLES = {
    "ray's agents": "from ray._raylet import setproctitle",
    "vllm's processes": "from setproctitle import setproctitle",
}


@pytest.mark.parametrize("whose", TITLES)
def test_a_process_that_names_itself_still_carries_the_runs_id(
    whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what tag_run sets ends with this test
    os.environ.pop("SPT_NOENV", None)
    run = janitor.tag_run()
    # The id comes first in the environment: there a title that is longer than the command reaches it.
    environment = {janitor.TAG: run} | os.environ
    code = f"{TITLES[whose]}\nsetproctitle('a title ' * 40)\nprint(flush=True)\ninput()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        assert "a title" in Path(f"/proc/{process.pid}/cmdline").read_text(encoding="utf-8")
        assert process.pid in janitor.processes_of(run)
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_carries_an_exported_id_is_none_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ | {janitor.TAG: "exported"})
    beside = subprocess.Popen(["sleep", "60"], env=dict(os.environ))
    try:
        run, other = janitor.tag_run(), janitor.tag_run()
        assert len({run, other, "exported"}) == 3 and os.environ[janitor.TAG] == other
        started = subprocess.Popen(["sleep", "60"], env=dict(os.environ))
        janitor.clean_up(other, tmp_path, None, grace=0.0)
        assert started.wait(10) == -signal.SIGKILL
        assert beside.poll() is None
    finally:
        beside.kill()
        beside.wait()


def test_what_a_local_ray_opens_to_everybody_lies_where_only_its_user_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    temporary = tmp_path / "manta-1"
    janitor.make_private(temporary)
    try_to_create_directory(str(janitor.ray_folder(temporary)))  # as Ray does with its `_temp_dir`
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
    assert os.environ["TMPDIR"] == str(temporary)
    with pytest.raises(FileExistsError):  # another user may have made it, to own what is put there
        janitor.make_private(temporary)


def test_a_socket_of_ray_fits_into_the_longest_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for parent in ("/tmp", "/" + "x" * 23, "/" + "x" * 60):
        monkeypatch.setattr(tempfile, "tempdir", parent)
        ray = janitor.ray_folder(janitor.temporary_of("0123456789abcdef"))
        assert len(f"{ray}/session_2026-01-01_00-00-00_123456_4194304/sockets/plasma_store") <= 107


def test_temporary_files_are_removed_where_logs_cannot_be_kept(tmp_path: Path) -> None:
    temporary, folder = tmp_path / "manta-1", tmp_path / "run"
    (janitor.ray_folder(temporary) / "session_2026" / "logs").mkdir(parents=True)
    folder.mkdir()
    (folder / "logs").touch()  # where a folder ought to be made
    with pytest.raises(OSError):
        janitor.clean_up("nobody", folder, temporary, grace=0.0)
    assert not temporary.exists()
