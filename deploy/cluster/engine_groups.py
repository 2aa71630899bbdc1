"""Placement groups of rollout workers whose engines run on several GPUs: all of an engine's GPUs, or none.

    an engine fits a node       one bundle of all its GPUs, STRICT_PACK: vLLM starts a process for each
    an engine spans nodes       a bundle for each GPU, PACK: vLLM's Ray executor starts a worker in each

A worker's group is kept over its restarts, so that a replacement never waits for GPUs that others took meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deploy.cluster.node_room import spans_nodes
from deploy.cluster.ray_actors import awaited
from deploy.config.config import RunConfig
from deploy.config.resources import worker_gpus
from deploy.config.supervise import within
from rollout.engines.vllm_start import VllmSettings
from rollout.episodes.actors import BESIDE


class EngineGroups:
    """The groups of a run's workers, by the names of the first members of their indices: rollout-3 for rollout-3.1."""

    def __init__(self, config: RunConfig) -> None:
        rollout = config.rollout
        self._cpus, self._gpus = rollout.cpus_per_worker, worker_gpus(config)
        self._own = dict(rollout.resources_per_worker)
        self._groups: dict[str, Any] = {}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        engine = config.engine
        self.spanning, self.config = False, config  # whether engines span nodes; what a worker is built from
        if isinstance(engine, VllmSettings) and spans_nodes(self._gpus, nodes):
            self.spanning, self.config = True, _on_ray(config, engine)

    async def reserve(self, workers: int, limit: float) -> None:
        """Make the groups of the first workers, and wait until the cluster has reserved them all."""
        if self._gpus > 1:
            ready = [self._group(f"rollout-{index}").ready() for index in range(workers)]
            every = asyncio.gather(*(awaited(each) for each in ready))
            await within(limit, every, "the placement groups of the engines")

    def options(self, worker: str) -> dict[str, Any]:
        """Resources and placement of a worker's actor."""
        if self._gpus <= 1:
            return {"num_cpus": self._cpus, "num_gpus": self._gpus, "resources": self._own}
        placed = PlacementGroupSchedulingStrategy(self._group(worker), 0)
        # The GPUs of an engine over several nodes are claimed by vLLM's own workers.
        gpus = 0 if self.spanning else self._gpus
        claims = {"num_cpus": self._cpus, "num_gpus": gpus, "resources": self._own}
        return claims | {"scheduling_strategy": placed}

    def release(self, worker: str) -> None:
        """Free the group of a worker that has left for good."""
        if (group := self._groups.pop(_first(worker), None)) is not None:
            ray.util.remove_placement_group(group)

    def close(self) -> None:
        """Free every group."""
        for worker in list(self._groups):
            self.release(worker)

    def _group(self, worker: str) -> Any:
        name = _first(worker)
        if name not in self._groups:
            self._groups[name] = self._made()
        return self._groups[name]

    def _made(self) -> Any:
        first = ({"CPU": self._cpus} if self._cpus else {}) | self._own
        if not self.spanning:
            return ray.util.placement_group([{**first, "GPU": self._gpus}], strategy="STRICT_PACK")
        others = [{"GPU": 1.0} for _ in range(round(self._gpus) - 1)]
        return ray.util.placement_group([{**first, "GPU": 1.0}, *others], strategy="PACK")


async def placed(workers: Iterable[Any], limit: float) -> None:
    """Wait until the actors of workers have their places, before engines start. PartLost after so many seconds."""
    answers = [worker.standing.options(concurrency_group=BESIDE).remote() for worker in workers]
    await within(limit, asyncio.gather(*map(awaited, answers)), "a place for the rollout workers")


def _first(worker: str) -> str:
    return worker.partition(".")[0]


def _on_ray(config: RunConfig, engine: VllmSettings) -> RunConfig:
    """The configuration of engines whose processes are Ray's; not for recipes, which leave this to Manta."""
    args = engine.args | {"distributed_executor_backend": "ray"}
    return config.model_copy(update={"engine": engine.model_copy(update={"args": args})})
