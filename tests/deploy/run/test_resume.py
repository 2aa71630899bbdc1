"""A run that was stopped goes on as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.config.run_folder import open_existing
from deploy.report.metrics import read_metrics
from rollout.buffer.segments import read_rows
from tests.deploy.small_run import (
    RECIPE,
    Stopped,
    assert_balanced,
    configured,
    largest_lag,
    late_engine,
    ledger,
    same_bits,
    train,
)

ROOT = Path(__file__).resolve().parents[3]


def steps_of(folder: Path) -> list[float]:
    return [row["step"] for row in read_metrics(folder)]


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(1, id="before the first checkpoint"),
        pytest.param(2, id="at a checkpoint"),
        pytest.param(3, id="a step past a checkpoint"),
    ],
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    after: int, reference: Path, tmp_path: Path
) -> None:
    config, folder = configured(), tmp_path / "run"
    with pytest.raises(Stopped):
        train(config, folder, stop_after=after)
    assert steps_of(folder) == list(range(1, after + 1))
    summary = train(config, folder, resume=True)
    assert same_bits(reference, folder)
    assert steps_of(folder) == [1, 2, 3, 4]
    assert_balanced(folder, config)
    assert ledger(folder, "SELECT count(*) FROM groups WHERE state <> 'trained'") == [(0,)]
    rewards = [[row["reward"] for row in read_metrics(each)] for each in (reference, folder)]
    assert rewards[0] == rewards[1]
    assert summary["success_before"] is not None and summary["steps"] == 4


def test_a_run_resumed_after_its_end_stays_as_it_is(reference: Path, tmp_path: Path) -> None:
    config, folder = configured(), tmp_path / "run"
    first = train(config, folder)
    again = train(config, folder, resume=True)
    assert same_bits(reference, folder)
    assert_balanced(folder, config)
    assert steps_of(folder) == [1, 2, 3, 4]
    assert again["success_after"] == first["success_after"]


@pytest.mark.parametrize("seed", range(2))
def test_a_run_stopped_with_groups_in_flight_accounts_for_each(seed: int, tmp_path: Path) -> None:
    config = configured(
        "steps=7", "buffer.max_lag=2", f"seed={seed}", "evaluation.tasks=0", "stages.0.source.episodes=4",
        "rollout.workers=2",
    )  # fmt: skip
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        train(config, folder, late_engine(seed), stop_after=3)
    issued, trained = ledger(folder, "SELECT count(*), sum(state = 'trained') FROM groups")[0]
    assert trained == 4 and issued > 6
    with pytest.raises(Stopped):
        train(config, folder, late_engine(seed + 10), resume=True, stop_after=2)
    train(config, folder, late_engine(seed + 20), resume=True)
    assert_balanced(folder, config)
    assert largest_lag(folder) <= 2
    assert steps_of(folder) == list(range(1, 8))


# Ctrl-C ---------------------------------------------------------------------------------------------------------

# The command itself, with the tiny model in vLLM's place; `hold` keeps it from getting past its first step.
SCRIPT = """
import asyncio, functools, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would hand on that it is ignored
import deploy.run.local
from deploy import cli
from tests.deploy.small_run import hf_engine

async def held(config, name, path):
    engine = await hf_engine(config, name, path)
    generate = engine.generate
    async def waiting(*request):
        if engine.version >= 1:
            await asyncio.Event().wait()
        return await generate(*request)
    engine.generate = waiting
    return engine

hold = sys.argv.pop(1) == "hold"
engine = held if hold else hf_engine
deploy.run.local.LocalRuntime = functools.partial(deploy.run.local.LocalRuntime, engine_factory=engine)
cli.main()
"""


def manta(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments, "--local"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that Ctrl-C can be what a terminal makes of it: a signal to all of the session
        encoding="utf-8",
    )


@pytest.mark.slow
def test_ctrl_c_ends_a_run_that_can_go_on(reference: Path, tmp_path: Path) -> None:
    with manta("hold", "train", RECIPE, "checkpoint.every_steps=1", "--output-dir", str(tmp_path)) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if "step 1/4" in line:
                break
        os.killpg(running.pid, signal.SIGINT)
        _, said = running.communicate(timeout=60)
    (folder,) = tmp_path.iterdir()
    assert (running.returncode, said) == (
        130,
        f"stopped; go on with: manta train --resume {folder} --local\n",
    )
    # The signal may come before, while or after the first checkpoint lands: whichever it is, the run goes on.
    assert ledger(folder, "SELECT count(*) FROM groups WHERE state = 'dropped'") == [(0,)]

    with manta("go", "train", "--resume", str(folder), "cluster.start_timeout_seconds=123") as resumed:
        out, said = resumed.communicate(timeout=120)
    assert (resumed.returncode, said) == (0, "")
    assert "report" in out
    assert open_existing(folder) == configured(
        "checkpoint.every_steps=1", "cluster.start_timeout_seconds=123"
    )
    assert steps_of(folder) == [1, 2, 3, 4]
    assert_balanced(folder, configured())
    assert same_bits(reference, folder)
    assert read_rows(folder / "evaluations" / "after").num_rows > 0
