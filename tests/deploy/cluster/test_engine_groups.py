"""Engines over several GPUs on a real Ray cluster of two nodes, whose 8 GPUs each are pretended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from deploy.cluster.cluster import RayRuntime
from deploy.cluster.connect import require_capacity
from deploy.cluster.engine_groups import EngineGroups
from deploy.cluster.fleet import Fleet
from deploy.cluster.ray_actors import actor
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from rollout.engines.vllm_start import VllmSettings
from tests.deploy.small_run import assert_balanced, configured, late_engine, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[None]:
    head = {"num_cpus": 8, "num_gpus": 8, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=head)
    started.add_node(num_cpus=8, num_gpus=8)
    ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    started.shutdown()


def _config(gpus: int, workers: int, *more: str) -> RunConfig:
    sizes = (
        f"engine.tensor_parallel_size={gpus}",
        f"rollout.gpus_per_worker={gpus}",
        f"tiny.heads={2 * gpus}",
    )
    return configured(*sizes, f"rollout.workers={workers}", "rollout.cpus_per_worker=0.5", *more)


def _free() -> float:
    return float(ray.available_resources().get("GPU", 0.0))


def _until_free(gpus: float) -> None:
    deadline = time.monotonic() + 60
    while _free() != gpus:
        assert time.monotonic() < deadline, f"{_free()} GPUs are free, not {gpus}"
        time.sleep(0.1)


class Shown:
    """Stands for a worker: what Ray gives it."""

    def gpus(self) -> int:
        return len(ray.get_gpu_ids())

    def bundles(self) -> list[dict[str, float]]:
        group = ray.util.get_current_placement_group()
        return list(group.bundle_specs)


def test_what_fits_in_sum_but_not_on_single_nodes_is_refused_in_one_line(nodes: None) -> None:
    require_capacity([_config(5, 2)])
    with pytest.raises(ConfigError) as refused:
        require_capacity([_config(5, 3, "cluster.capacity_timeout_seconds=1")])
    said = str(refused.value)
    assert "\n" not in said
    assert "asked are 3 rollout workers, each 5 GPU and 0.5 CPU on one node, and 1 learner rank" in said
    assert "free are 2 nodes of 8 GPU and 8 CPU" in said


def test_an_engine_has_all_its_gpus_on_one_node_and_keeps_them_over_restarts(nodes: None) -> None:
    groups = EngineGroups(_config(4, 3))
    asyncio.run(groups.reserve(3, 60))
    _until_free(4)
    worker = actor(Shown, **groups.options("rollout-1")).remote()
    assert ray.get(worker.gpus.remote(), timeout=60) == 4
    ray.kill(worker)
    again = actor(Shown, **groups.options("rollout-1.1")).remote()
    assert ray.get(again.gpus.remote(), timeout=60) == 4
    assert _free() == 4, "the replacement is in the group of the one before"
    ray.kill(again)
    groups.release("rollout-1.1")
    _until_free(8)
    groups.close()
    _until_free(16)


def test_a_group_that_no_node_has_room_for_is_waited_for_with_a_limit(nodes: None) -> None:
    groups = EngineGroups(_config(5, 3))
    with pytest.raises(Exception, match="the placement groups of the engines did not answer within 1 s"):
        asyncio.run(groups.reserve(3, 1))
    groups.close()
    _until_free(16)


def test_an_engine_larger_than_a_node_claims_gpu_by_gpu_for_vllms_own_workers(nodes: None) -> None:
    config = _config(12, 1)
    require_capacity([config])
    groups = EngineGroups(config)
    asyncio.run(groups.reserve(1, 60))
    assert groups.spanning
    worker = actor(Shown, **groups.options("rollout-0")).remote()
    assert ray.get(worker.gpus.remote(), timeout=60) == 0
    bundles = ray.get(worker.bundles.remote(), timeout=60)
    assert [each["GPU"] for each in bundles] == [1.0] * 12
    placed = [set(each["bundles_to_node_id"].values()) for each in placement_group_table().values()]
    assert 2 in map(len, placed), "both nodes have a part of it"
    engine = groups.config.engine
    assert isinstance(engine, VllmSettings) and engine.args["distributed_executor_backend"] == "ray"
    ray.kill(worker)
    groups.close()
    _until_free(16)


@pytest.mark.rare
def test_a_run_whose_workers_hold_groups_of_gpus(nodes: None, tmp_path: Path) -> None:
    config = _config(2, 2, "cluster.learner_cpus=0.5", "rollout.concurrent_groups=1")
    seen: list[float] = []
    buffers: list[str] = []

    class Watched(RayRuntime):
        async def start(self, resume: bool) -> int:
            version = await super().start(resume)
            seen.append(_free())
            buffers.extend(part["node"] for part in self.roster() if part["part"] == "replay buffer")
            return version

    train(config, tmp_path / "run", late_engine(0), ring_type=Watched)
    assert seen == [12.0]
    assert buffers == [ray.get_runtime_context().get_node_id()], "SQLite's writer is on its readers' host"
    assert_balanced(tmp_path / "run", config)
    _until_free(16)


class Stopped(Exception):
    """The test has seen what it wanted to."""


@pytest.mark.parametrize("transfer", ["ipc", "object_store"])
def test_on_a_gpu_that_both_use_the_learner_is_started_before_the_engines(
    transfer: str, nodes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = ("rollout.gpus_per_worker=0.5", "learner.model.device=cuda", "engine.kv_cache_gib=1")
    config = configured(*shared, f"weights.transfer={transfer}", "learner.model.dtype=bfloat16")
    (tmp_path / "run").mkdir()
    begun: list[str] = []

    class Ordered(RayRuntime):
        async def _start_learner(self, load: bool) -> int:
            begun.append("learner")
            if transfer == "ipc":
                raise Stopped
            return 0

    monkeypatch.setattr(Fleet, "scale", lambda fleet, wanted: begun.append("engines"))

    async def start() -> None:
        runtime = Ordered(config, tmp_path / "run", late_engine(0))
        try:
            await runtime.start(resume=False)
        finally:
            await runtime.close()

    if transfer == "ipc":
        with pytest.raises(Stopped):
            asyncio.run(start())
        assert begun == ["learner"]
    else:
        asyncio.run(start())
        assert begun == ["engines", "learner"]
