"""A whole run on Ray whose engine divides its layers over two processes, of which one is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from deploy.report.metrics import read_metrics
from tests.faults.job import LATENCY, REAL
from tests.faults.real import _steps, _worker
from tests.faults.run import Driver, accounts, children, command_of, until

SECONDS = 400.0
STEPS = 32  # a quick machine must not have made them all before the process is killed
OVERRIDES = (
    f"steps={STEPS}",
    "evaluation.tasks=0",
    "stages.0.source.episodes=16",
    "buffer.groups_per_step=2",
    "buffer.max_lag=1",
    "checkpoint.every_steps=2",
    "rollout.workers=1",
    "rollout.concurrent_groups=2",
    "tiny.heads=4",
    "engine.tensor_parallel_size=2",
    "engine.kv_cache_gib=0.25",
    "engine.args.max_num_batched_tokens=512",
    "cluster.start_timeout_seconds=300",
)


def _processes(worker: int) -> list[int]:
    return [pid for pid in children(worker) if command_of(pid).startswith("VLLM::Worker")]


@pytest.mark.rare
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_with_another_engine_after_one_of_two_processes_is_killed(tmp_path: Path) -> None:
    driver = Driver(tmp_path / "run", OVERRIDES, {REAL: "1", LATENCY: "0.2", "VLLM_LOGGING_LEVEL": "ERROR"})
    driver.start()
    try:
        until(lambda: _worker(driver) or not driver.alive(), SECONDS, "a serving worker")
        assert driver.alive(), driver.tail()
        _steps(driver, 2)
        first = _worker(driver)
        both = _processes(first)
        assert len(both) == 2
        os.kill(both[1], signal.SIGKILL)
        until(lambda: _worker(driver) not in (first, 0), SECONDS, "another worker")
        until(lambda: len(_processes(_worker(driver))) == 2, SECONDS, "its engine of two processes")
        assert not {pid for pid in both if "VLLM" in command_of(pid)}
        assert driver.wait(SECONDS) == 0, driver.tail()
    finally:
        driver.stop()
    books = accounts(driver, 2)
    assert books.sound and books.trained == STEPS * 2, books
    rows = read_metrics(driver.folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(0 <= row["probe_difference"] < 1e-4 for row in rows)
