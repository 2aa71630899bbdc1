"""vLLM's processes: their death is noticed at once and everywhere, and no death of ours leaves any of them behind."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from learner.model.policy import Policy
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from learner.settings import ModelSettings
from learner.training.publish import take_snapshot
from rollout.engines.engine import EngineDied, Sampling
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_process import CallFailed, CoreProcess, family
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.weights import WeightUpdate, write_memory

ROOT = Path(__file__).parents[3]
SETTINGS = VllmSettings(dtype="float32", kv_cache_gib=0.25, max_num_seqs=8)
CONTEXT = 512


# What a call to the core comes to, with a process that sleeps in the core's place.


def _with_core(check: Any) -> None:
    async def run() -> None:
        process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
        process.start()
        core = CoreProcess("rollout-3", process)
        try:
            await check(core, process)
        finally:
            process.kill()
            process.join(30)
            core.close()
            core.close()

    asyncio.run(run())


async def _never() -> None:
    await asyncio.Event().wait()


async def _raise(error: Exception) -> None:
    raise error


def test_calls_under_way_and_later_ones_end_with_the_core_and_say_how_it_ended() -> None:
    async def check(core: CoreProcess, process: Any) -> None:
        calls = [asyncio.create_task(core.answer(_never())) for _ in range(3)]
        await asyncio.sleep(0)
        process.kill()
        calls.append(asyncio.create_task(core.answer(_never())))
        for call in calls:
            with pytest.raises(
                EngineDied, match=rf"rollout-3: .* \(pid {process.pid}\) was killed by SIGKILL"
            ):
                await asyncio.wait_for(call, 30)
        assert len(asyncio.all_tasks()) == 1, "no call is left behind"

    _with_core(check)


def test_the_end_of_one_of_several_cores_is_the_engines_and_it_is_named() -> None:
    async def check(core: CoreProcess, process: Any) -> None:
        other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
        other.start()
        both = CoreProcess("rollout-4", process, other)
        call = asyncio.create_task(both.answer(_never()))
        other.kill()
        with pytest.raises(EngineDied, match=rf"rollout-4: .* \(pid {other.pid}\) was killed by SIGKILL"):
            await asyncio.wait_for(call, 30)
        assert process.is_alive()
        both.close()

    _with_core(check)


def test_an_error_is_told_apart_from_the_cores_end() -> None:
    async def check(core: CoreProcess, process: Any) -> None:
        with pytest.raises(CallFailed, match="rollout-3: Call to load failed: no such tensor"):
            await core.answer(_raise(Exception("Traceback ...\nCall to load failed: no such tensor")))
        with pytest.raises(ZeroDivisionError):
            await core.answer(_raise(ZeroDivisionError()))
        with pytest.raises(EngineDied):
            await core.answer(_raise(EngineDeadError()))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(core.answer(_never()), 0.01)

    _with_core(check)


# The real vLLM.


def _model(folder: Path) -> int:
    tokenizer = build_tokenizer(folder, ("left", "right"))
    build_tiny(folder, tokenizer, layers=2, width=64, heads=2, mlp=128, context=CONTEXT)
    stop: int = tokenizer.eos_token_id
    return stop


def _update(model: Path, version: int) -> tuple[WeightUpdate, Any]:
    snapshot = take_snapshot(Policy(ModelSettings(path=str(model))), version, "float32")
    handle, alive = write_memory(snapshot.arrays)
    return WeightUpdate(snapshot.manifest, handle), alive


def _shared(pids: list[int]) -> set[Path]:
    """Shared memory that processes have mapped, under the names it once had."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text(encoding="utf-8") for pid in pids)
    return {
        Path(line[line.index("/dev/shm") :].split()[0])
        for line in maps.splitlines()
        if "/dev/shm/psm" in line
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    _model(folder)
    return folder


@pytest.fixture
def others_memory() -> Iterator[Path]:
    memory = SharedMemory(create=True, size=64)
    yield Path("/dev/shm") / memory.name
    memory.close()
    memory.unlink()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_core_that_hangs_does_not_answer_and_one_that_dies_fails_every_call(
    model: Path, others_memory: Path
) -> None:
    async def fails(call: Coroutine[Any, Any, Any], pid: int) -> None:
        with pytest.raises(
            EngineDied, match=rf"rollout-0: vLLM's engine core \(pid {pid}\) was killed by SIGKILL"
        ):
            await asyncio.wait_for(call, 30)

    async def run() -> None:
        engine = await VllmEngine.start("rollout-0", str(model), [0], CONTEXT, SETTINGS)
        core = engine._core.pid
        # It computes itself: no worker, and no shared memory between the two.
        assert [pid for pid in family(core)[1:] if "resource_tracker" not in _command(pid)] == []
        assert not _shared(family(core))
        assert others_memory.exists()
        first, _alive = _update(model, 0)
        assert (await engine.sync(first)).version == 0
        await engine.ping()

        os.kill(core, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.ping(), 2)
        os.kill(core, signal.SIGCONT)
        await asyncio.wait_for(engine.ping(), 30)

        os.kill(core, signal.SIGSTOP)  # so that all of these are under way when it dies
        second, _alive_too = _update(model, 1)
        calls = [engine.generate([1, 2, i], Sampling(max_tokens=CONTEXT - 3)) for i in range(4)]
        waiting = [
            asyncio.create_task(fails(call, core)) for call in (*calls, engine.sync(second), engine.ping())
        ]
        await asyncio.sleep(1)
        assert not any(task.done() for task in waiting)
        os.kill(core, signal.SIGKILL)
        await asyncio.gather(*waiting)
        for call in (engine.generate([1], Sampling(max_tokens=2)), engine.score([1, 2]), engine.ping()):
            await fails(call, core)
        assert engine.version == 0
        await asyncio.wait_for(engine.close(), 30)

    asyncio.run(run())


async def _host(model: Path, leave: bool) -> None:
    """Run in a process of its own: an engine that has synced and generated; then say who is there, close or wait."""
    engine = await VllmEngine.start("rollout-0", str(model), [0], CONTEXT, SETTINGS)
    update, _alive = _update(model, 0)
    await engine.sync(update)
    await engine.generate([1, 2, 3], Sampling(max_tokens=8))
    print("family", *family(os.getpid()), flush=True)
    if leave:
        await engine.close()
    else:
        await asyncio.sleep(600)


def _hosted(model: Path, leave: bool, errors: Path) -> tuple[subprocess.Popen[str], list[int]]:
    command = [
        sys.executable,
        "-m",
        "tests.rollout.engines.test_vllm_process",
        str(model),
        "leave" if leave else "stay",
    ]
    with errors.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=stderr, encoding="utf-8"
        )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("family"):
            return process, [int(pid) for pid in line.split()[1:]]
    raise AssertionError(errors.read_text(encoding="utf-8"))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").replace("\0", " ")


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while left := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < deadline, [_command(pid) for pid in left]
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killing_the_host_of_an_engine_leaves_no_process_even_where_all_are_stopped(
    model: Path, tmp_path: Path
) -> None:
    host, pids = _hosted(model, leave=False, errors=tmp_path / "errors")
    assert len(pids) >= 3, "itself, the fork server, the core"
    for pid in pids[1:]:
        if "resource_tracker" not in _command(pid):  # Python's own: it ends by itself, unless it is stopped
            os.kill(pid, signal.SIGSTOP)
    host.kill()
    host.wait(10)
    _wait_until_gone(pids)


@pytest.mark.rare
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_closing_an_engine_says_nothing_of_errors_or_leaks(model: Path, tmp_path: Path) -> None:
    host, pids = _hosted(model, leave=True, errors=tmp_path / "errors")
    assert host.wait(60) == 0
    said = (tmp_path / "errors").read_text(encoding="utf-8")
    assert [
        line for line in said.splitlines() if any(w in line for w in ("Error", "Traceback", "leaked"))
    ] == []
    _wait_until_gone(pids)


if __name__ == "__main__":
    asyncio.run(_host(Path(sys.argv[1]), sys.argv[2] == "leave"))
