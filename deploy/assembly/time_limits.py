"""How long a run waits for what depends on its model's size: starts, syncs, checkpoints."""

from __future__ import annotations

from deploy.assembly.fetching import fetch
from deploy.assembly.memory_plan import SIZES, shape_in
from deploy.config.config import RunConfig
from deploy.config.supervise import TimeLimits
from rollout.wire.time_limits import DISK, MEMORY, NETWORK, limit

_STATE_BYTES = 12  # of a parameter in a checkpoint: its float32 weight and AdamW's two moments


def limits_for(config: RunConfig, parameters: int) -> TimeLimits:
    """The limits of a run for a model of so many parameters."""
    cluster, learner = config.cluster, config.learner
    adapter = learner.model.lora is not None and learner.model.lora.sync == "adapter"
    sent = 0 if adapter else parameters * SIZES[config.engine.dtype]
    critic = learner.algorithm.critic
    models = {"own": 2, "turns": 3}.get(critic.kind, 1) if critic is not None else 1
    state = models * parameters * _STATE_BYTES
    checkpoint = limit(cluster.start_timeout_seconds, 2 * state, DISK)  # written, and read for its checksums
    return TimeLimits(
        start=checkpoint,
        publish=limit(cluster.start_timeout_seconds, 4 * parameters + sent, MEMORY),
        sync=limit(limit(config.weights.sync_timeout_seconds, sent, NETWORK), 2 * sent, MEMORY),
        load=sent / MEMORY,
        save=checkpoint,
    )


def time_limits(config: RunConfig, path: str) -> TimeLimits:
    """The limits of a run; path: of its model, as `model_path` returns it."""
    return limits_for(config, shape_in(fetch(path), config.learner.model.trust_remote_code).parameters)
