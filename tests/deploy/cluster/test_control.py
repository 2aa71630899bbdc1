"""How a running job is spoken to, and what looks after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.cluster import connect
from deploy.cluster.control import ask_workers, driving, is_driven, read_roster, wanted_workers
from deploy.cluster.watchdog import Watchdog
from deploy.config.config_errors import ConfigError
from deploy.config.supervise import PartLost, SupervisionSettings, within
from tests.deploy.small_run import configured


def test_a_run_has_one_driver_and_is_free_again_when_it_ends(tmp_path: Path) -> None:
    with driving(tmp_path):
        assert is_driven(tmp_path)
        with pytest.raises(ConfigError, match=r"is being driven already \(pid \d+ on "), driving(tmp_path):
            pass
    assert not is_driven(tmp_path)
    with driving(tmp_path):
        pass


def test_only_a_run_that_is_driven_can_be_scaled(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no driver is running, so"):
        ask_workers(tmp_path, 4)
    with driving(tmp_path):
        assert wanted_workers(tmp_path) is None
        ask_workers(tmp_path, 4)
        assert wanted_workers(tmp_path) == 4
    with driving(tmp_path):
        assert wanted_workers(tmp_path) is None  # that was asked of the driver before


class FakeRing:
    """What a caretaker sees, settable."""

    def __init__(self) -> None:
        self.playing = True
        self.workers = 1
        self.replay_buffer: dict[str, Any] = {
            "version": 3,
            "ready": 1,
            "paused": None,
            "missing": "1 of 2 groups",
        }
        self.turns = 0.0

    def scale(self, workers: int) -> None:
        self.workers = workers

    def roster(self) -> list[dict[str, Any]]:
        return [{"part": f"rollout-{seat}", "state": "serving"} for seat in range(self.workers)]

    async def state(self) -> dict[str, Any]:
        return dict(self.replay_buffer)

    async def counters(self) -> dict[str, float]:
        return {"turns": self.turns}

    async def stacks(self) -> dict[str, str]:
        return {"learner": "waits in take", "rollout-0": "did not answer within 5 s"}


def cared_for(folder: Path, ring: FakeRing, script: Callable[[list[str]], Any]) -> list[str]:
    """Run a caretaker while the script (a generator of conditions) waits for one thing after the other."""
    said: list[str] = []
    settings = SupervisionSettings(heartbeat_interval_seconds=0.01, progress_timeout_seconds=0.2)

    async def scene() -> None:
        caring = asyncio.create_task(Watchdog(ring, folder, settings, said.append).run())
        async with asyncio.timeout(10):
            for holds in script(said):
                while not holds():
                    assert not caring.done(), caring.exception()
                    await asyncio.sleep(0.01)
        caring.cancel()

    asyncio.run(scene())
    return said


def test_the_wanted_number_of_workers_is_followed_and_the_roster_kept(tmp_path: Path) -> None:
    ring = FakeRing()

    def script(said: list[str]) -> Any:
        yield lambda: len(read_roster(tmp_path)) == 1
        ask_workers(tmp_path, 3)
        yield lambda: len(read_roster(tmp_path)) == 3

    with driving(tmp_path):
        assert "scaling to 3 rollout workers" in cared_for(tmp_path, ring, script)


@pytest.mark.parametrize(
    "asked",
    [b"\x80\xff", b"[" * 100_000, b"[]", b'{"workers": "4"}', b'{"workers": 3000}', b'{"workers": 0}'],
)
def test_a_wish_that_is_none_is_said_once_and_the_run_goes_on(asked: bytes, tmp_path: Path) -> None:
    ring = FakeRing()

    def script(said: list[str]) -> Any:
        (tmp_path / "wanted.json").write_bytes(asked)
        yield lambda: said
        waited = asyncio.get_running_loop().time() + 0.3
        yield lambda: asyncio.get_running_loop().time() > waited
        (tmp_path / "wanted.json").write_text('{"workers": 2}', encoding="utf-8")
        yield lambda: ring.workers == 2

    refused, *more = [line for line in cared_for(tmp_path, ring, script) if "stacks" not in line]
    assert "wanted.json" in refused and "\n" not in refused
    assert more == ["scaling to 2 rollout workers"]


@pytest.mark.parametrize("workers", [-1, 0, 1025])
def test_a_number_of_workers_that_no_driver_looks_after_is_refused(tmp_path: Path, workers: int) -> None:
    with driving(tmp_path), pytest.raises(ConfigError, match=rf"--workers {workers}: .* from 1 to 1024"):
        ask_workers(tmp_path, workers)
    assert wanted_workers(tmp_path) is None


def test_more_workers_than_this_machine_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connect.ray, "cluster_resources", lambda: {"CPU": 4.0})
    config = configured("rollout.cpus_per_worker=1", "cluster.learner_cpus=1")
    connect.require_room(config, 3)
    with pytest.raises(ConfigError, match=r"1000 rollout workers requested, but .* has room for 3"):
        connect.require_room(config, 1000)
    elsewhere = configured("cluster.address='10.0.0.1:6379'")
    connect.require_room(elsewhere, 1000)  # it may grow


def test_missing_progress_is_noticed_and_all_stacks_are_kept(tmp_path: Path) -> None:
    def script(said: list[str]) -> Any:
        yield lambda: list(tmp_path.glob("stacks-*.txt"))

    (line, *_) = cared_for(tmp_path, FakeRing(), script)
    assert line.startswith("no turn and no step for 0.2 s: 1 of 2 groups; all stacks are in ")
    (dump,) = tmp_path.glob("stacks-*.txt")
    assert "waits in take" in dump.read_text(encoding="utf-8") and "did not answer" in dump.read_text(
        encoding="utf-8"
    )


def test_stacks_that_cannot_be_written_are_said_and_the_run_goes_on(tmp_path: Path) -> None:
    def script(said: list[str]) -> Any:
        yield lambda: any(line.endswith("; no progress: 1 of 2 groups") for line in said)

    cared_for(tmp_path / "gone", FakeRing(), script)


def test_a_pause_is_said_once_and_is_no_missing_progress(tmp_path: Path) -> None:
    ring = FakeRing()

    def script(said: list[str]) -> Any:
        ring.replay_buffer["paused"] = "the disk of RUN has 3 MiB free"
        yield lambda: said
        waited = asyncio.get_running_loop().time() + 0.5
        yield lambda: asyncio.get_running_loop().time() > waited
        ring.replay_buffer["paused"] = None
        yield lambda: len(said) == 2

    said = cared_for(tmp_path, ring, script)
    assert said == ["PAUSED: the disk of RUN has 3 MiB free", "RESUMED: there is room on the disk again"]
    assert not list(tmp_path.glob("stacks-*.txt"))


def test_an_answer_that_does_not_come_names_who_owed_it() -> None:
    with pytest.raises(PartLost, match=r"the learner \(heartbeat\) did not answer within 0.01 s"):
        asyncio.run(within(0.01, asyncio.sleep(5), "the learner (heartbeat)"))
