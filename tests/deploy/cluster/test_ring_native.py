"""A ring whose weights go from the learner to the engines directly: workers die, join and leave, and it goes on.

vLLM's trainer and the engines' end of it are stand-ins (no GPU): the publisher, its group, the actors and the fleet are
the run's own.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

from deploy.assembly.build import load_chat
from deploy.cluster import cluster
from deploy.cluster.cluster import RayRuntime
from deploy.cluster.connect import connect
from deploy.config.config import RunConfig
from learner.training.learner import Learner
from rollout.engines.engine import Engine
from rollout.engines.hf_engine import HfEngine
from rollout.engines.vllm_native import NativePublisher
from rollout.wire.weights import SyncReport, WeightManifest
from tests.deploy.small_run import assert_balanced, configured, ledger, train
from tests.rollout.engines.native_rig import IpcTrainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class DirectEngine(HfEngine):
    """Takes the tensors of a transfer as they come."""

    async def open_transfer(self, init_info: dict[str, Any]) -> None:
        assert init_info["native"] == "ipc"

    async def begin_update(self, manifest: WeightManifest) -> None:
        manifest.require_names(self._weights, self.name)

    @torch.no_grad()
    async def receive(self, update_info: dict[str, Any]) -> None:
        for name, tensor in update_info["tensors"]:
            self._weights[name].copy_(tensor)

    async def finish_update(self, manifest: WeightManifest) -> SyncReport:
        self.version = manifest.version
        logprobs = await self.score(manifest.probe.token_ids)
        difference = manifest.probe.check(self.name, self.version, logprobs)
        return SyncReport(self.name, self.version, len(manifest.tensors), difference, 0.0, 0.0)


async def direct_engine(config: RunConfig, name: str, path: str) -> Engine:
    return DirectEngine.load(path, load_chat(path).stops, name=name)


def direct_publisher(config: RunConfig, sync_seconds: float, learner: Learner) -> NativePublisher:
    """The run's own, in the learner's process, over the stand-in."""
    WeightTransferTrainerFactory._registry["ipc"] = lambda: IpcTrainer
    IPCTrainerInitInfo.packed_buffer_size_bytes = 1
    return NativePublisher("ipc", learner.policy.named_weights, 1, "here", sync_seconds, sync_seconds)


class Shaken(RayRuntime):
    """Kills, adds and takes away workers; `sent` has the members of each transfer that was begun, by step."""

    def __init__(self, config: RunConfig, folder: Path, engine: Any) -> None:
        self.said: list[str] = []
        self.sent: dict[int, list[str]] = {}
        self._number = 0
        super().__init__(config, folder, engine, say=self.said.append)

    async def step(self, number: int, *given: Any, **named: Any) -> Any:
        self._number = number
        if number == 2:  # between two transfers
            self._kill("rollout-0")
        if number == 4:
            self.scale(3)
            await self._fleet.ready()
        if number == 6:
            self.scale(1)
        return await super().step(number, *given, **named)

    async def _send(self, names: Sequence[str]) -> list[SyncReport]:
        self.sent[self._number] = list(names)
        if self._number == 3:  # within one
            self._kill("rollout-1")
        return await super()._send(names)

    def _kill(self, name: str) -> None:
        (member,) = [part for part in self.roster() if part["part"] == name]
        os.kill(member["pid"], signal.SIGKILL)


@pytest.mark.rare
def test_workers_die_join_and_leave_while_weights_are_sent_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "native_publisher", direct_publisher)
    small = (
        "rollout.cpus_per_worker=0.25",
        "cluster.learner_cpus=0.25",
    )  # three workers and the learner on two cores
    # A checkpoint after every step: no step is begun ahead, so that who joins between two steps finds their version.
    config = configured(
        "steps=8", "rollout.workers=2", "checkpoint.every_steps=1", "evaluation.tasks=0", *small
    )
    config = config.model_copy(update={"weights": config.weights.model_copy(update={"transfer": "ipc"})})
    made: list[Shaken] = []

    def ring(*given: Any) -> Shaken:
        made.append(Shaken(*given))
        return made[0]

    connect(config)
    try:
        train(config, tmp_path / "run", direct_engine, ring_type=ring)
    finally:
        ray.shutdown()
    sent = made[0].sent
    assert_balanced(tmp_path / "run", config)
    ((trained,),) = ledger(tmp_path / "run", "SELECT MAX(taken_version) FROM groups")
    assert trained == 7
    assert sent[1] == ["rollout-0", "rollout-1"]
    assert [text for text in made[0].said if "this version goes through the object store" in text]
    assert len(sent[5]) == 3 and "rollout-2" in sent[5]
    assert sent[8] == ["rollout-0.1"]
