"""vLLM's own weight transfers in the ring: the learner sends to the engines itself, and members are lent nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import ray
import torch

from deploy.config.config import RunConfig
from learner.training.learner import Learner
from learner.training.publish import Publisher
from rollout.wire.weights import Handle, Probe, WeightManifest, WeightUpdate

# What a member is lent where vLLM's own transfer brings the weights.
NOTHING = WeightUpdate(WeightManifest(-1, (), Probe((), (), 0.0)), Handle("", ""))


def native_publisher(
    config: RunConfig, sync_seconds: float, workers: dict[str, Any], learner: Learner
) -> Publisher:
    """The learner's publisher; workers: handles of rollout actors by name; sync_seconds: limit of a transfer."""
    from rollout.engines.vllm_native import NativePublisher

    assert config.weights.transfer != "object_store"
    return NativePublisher(
        config.weights.transfer,
        partial(learner.policy.named_weights, getattr(torch, config.engine.dtype)),
        workers,
        config.engine.placement.gpus,
        ray.util.get_node_ip_address(),
        sync_seconds,
    )
