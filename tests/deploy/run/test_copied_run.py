"""A whole run whose ledger lies on a local disk, with its copy in the run folder, and which goes on on another host."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from deploy.assembly.build import replay_buffer_builder
from deploy.config.config_errors import ConfigError
from deploy.config.load import moved
from deploy.run.drive import _check_buffer
from deploy.run.local import LocalRuntime
from rollout.buffer.part_log import Fenced
from rollout.buffer.state_copy import StateCopy
from tests.deploy.small_run import (
    Row,
    Stopped,
    assert_balanced,
    configured,
    same_bits,
    train,
    trained_rows,
)

pytestmark = pytest.mark.slow


def test_a_run_that_loses_its_disk_ends_where_the_undisturbed_one_does(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "run"
    config = configured("buffer.copy_to=run", f"buffer.local_dir={tmp_path / 'here'}")
    with monkeypatch.context() as killed:  # it ends without a last word to the copy
        killed.setattr(StateCopy, "close", lambda self: None)
        with pytest.raises(Stopped):
            train(config, copied, stop_after=2)
    shutil.rmtree(tmp_path / "here")
    elsewhere = moved(config, [f"buffer.local_dir={tmp_path / 'there'}"])
    _check_buffer(elsewhere, copied, resume=True)
    summary = train(elsewhere, copied, resume=True)
    assert same_bits(reference, copied)
    assert_balanced(copied, config)
    assert summary["steps"] == config.steps

    def played(folder: Path) -> list[tuple[object, ...]]:
        rows = trained_rows(folder)
        return sorted(
            (row["group_id"], row["episode"], row["turn"], row["action"], row["taken_version"])
            for row in rows
        )

    assert played(copied) == played(reference)
    assert not list((tmp_path / "there").iterdir())  # a run that ended leaves nothing on its disk


def test_a_run_that_is_started_a_second_time_stops_with_one_line_and_the_second_goes_on(
    tmp_path: Path,
) -> None:
    config = configured("buffer.copy_to=run", f"buffer.local_dir={tmp_path / 'local'}")
    folder = tmp_path / "run"

    class Superseded(LocalRuntime):
        async def step(self, number: int, *arguments: Any, **named: Any) -> Row:
            row = await super().step(number, *arguments, **named)
            if number == 2:  # another driver, on a host that does not see the lock of this one
                await replay_buffer_builder(config, folder)().close()
            return row

    with pytest.raises(
        Fenced, match=r"^another replay buffer has taken over this run \(pid .*stop one of the two runs$"
    ):
        train(config, folder, ring_type=Superseded)
    train(config, folder, resume=True)
    assert_balanced(folder, config)


def test_a_replay_buffer_that_may_be_placed_anywhere_needs_a_copy(tmp_path: Path) -> None:
    anywhere = "cluster.buffer_resources.storage_node=0.01"
    with pytest.raises(
        ConfigError, match=r"has its state without a copy; set buffer.copy_to=run, with a run folder"
    ):
        _check_buffer(configured(anywhere), tmp_path, resume=False)
    _check_buffer(configured(anywhere, "buffer.copy_to=run"), tmp_path, resume=False)
