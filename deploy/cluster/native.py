"""vLLM's own weight transfers in the ring: a faster way for members that serve a version already.

The first version of every member goes through the object store, and so does one whose transfer has failed. So members
are lost, join and leave as without it: each transfer is to those that serve when it begins.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import ray
import torch

from deploy.cluster.fleet import Fleet
from deploy.config.config import RunConfig
from learner.training.learner import Learner
from learner.training.publish import Publisher
from rollout.wire.weights import SyncReport, TransferFailed


def native_publisher(config: RunConfig, sync_seconds: float, learner: Learner) -> Publisher:
    """The learner's publisher; sync_seconds: limit of a sync."""
    from rollout.engines.vllm_native import NativePublisher

    assert config.weights.transfer != "object_store"
    return NativePublisher(
        config.weights.transfer,
        partial(learner.policy.named_weights, getattr(torch, config.engine.dtype)),
        config.engine.placement.gpus,
        ray.util.get_node_ip_address(),
        sync_seconds
        / 2,  # engines that have let go can be given the version otherwise, within the same limit
        sync_seconds,
    )


class DirectSync:
    """Syncs of the fleet by the learner's own transfer, where that can be. say: prints a message for the user."""

    def __init__(self, wanted: bool, say: Callable[[str], None]) -> None:
        self._wanted = wanted
        self._say = say
        self._ready = False

    def begin(self) -> None:
        """The members that serve hold a version by the object store: the next one may be sent to them."""
        self._ready = self._wanted

    async def sync(
        self, fleet: Fleet, send: Callable[[Sequence[str]], Awaitable[list[SyncReport]]]
    ) -> list[SyncReport] | None:
        """Have the learner send to the members that serve. None: it has to go through the object store, then `begin`.

        send: called with the members' names.
        """
        if not self._ready or not fleet.serving:
            return None
        self._ready = False
        try:
            reports = await fleet.hand_over(send)
        except TransferFailed as error:
            self._say(f"{error}; this version goes through the object store")
            return None
        self._ready = True
        return reports
