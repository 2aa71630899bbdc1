"""Which workers are sent deltas: those on other nodes than the learner's, unless the recipe says otherwise."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deploy.cluster.actor_member import ActorMember
from deploy.cluster.learner_part import LearnerPart
from rollout.wire.process_info import ProcessInfo
from rollout.wire.weights import Handle, Probe, WeightManifest, WeightUpdate
from tests.deploy.small_run import configured

UPDATE = WeightUpdate(WeightManifest(0, (), Probe((), (), 0.0)), Handle("", ""))


class Worker:
    """The handle of a rollout actor on a node; `holds` is what its syncs were asked for."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.holds: list[bool] = []
        self.start = self.sync = self

    async def remote(self, *given: Any) -> Any:
        if not given:
            return ProcessInfo("host", 2, self.node, "")
        self.holds.append(given[1])
        return None


@pytest.mark.parametrize(
    ("delta", "node", "held"), [(True, "far", True), (True, "near", False), (False, "far", False)]
)
def test_a_worker_on_another_node_holds_what_it_is_sent(delta: bool, node: str, held: bool) -> None:
    part = LearnerPart(configured(f"weights.delta={str(delta).lower()}"), lambda ranks: None, None, None)  # type: ignore[arg-type, return-value]
    part.where = {"learner": ProcessInfo("host", 1, "near", "")}
    worker = Worker(node)
    member = ActorMember("rollout-0", worker, apart=part.apart)

    async def scene() -> None:
        await member.start()
        await member.sync(UPDATE)

    asyncio.run(scene())
    assert worker.holds == [held]
    assert not part.apart(""), "a worker that has not started is nowhere"
