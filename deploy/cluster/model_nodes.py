"""The model on every node of a cluster that a part of the run may be placed on, before any part starts."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.assembly.fetching import fetch
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.resources import learner_gpus


def fetch_on_nodes(config: RunConfig, path: str) -> None:
    """Fetch the model on every other node with room for a rollout worker or a rank of the learner, on all at once.

    path: as `model_path` returns it. ConfigError, one line, names the first node that cannot have it. A node that joins
    later fetches it when a worker starts there.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here}
    pending = {
        node_id: _fetch_there.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(path)
        for node_id, node in nodes.items()
        if _has_room(config, node["Resources"])
    }
    limit = config.cluster.fetch_timeout_seconds
    if pending:
        ray.wait(list(pending.values()), num_returns=len(pending), timeout=limit)
    for node_id, answer in pending.items():
        where = f"node {nodes[node_id]['NodeManagerAddress']}"
        try:
            ray.get(answer, timeout=0)
        except GetTimeoutError as error:
            raise ConfigError(
                f"{where} has not fetched the model {path} within cluster.fetch_timeout_seconds={limit:g}; raise it, "
                "or put the model onto a file system that all nodes share"
            ) from error
        except RayTaskError as error:
            if not isinstance(error.cause, ConfigError):
                raise
            raise ConfigError(
                f"{where}: {error.cause}; every node needs the model, from the hub or a file system that all nodes "
                "share"
            ) from error
        except RayError as error:
            raise ConfigError(f"{where} was lost while it fetched the model {path}: {error}") from error


@ray.remote(num_cpus=0)
def _fetch_there(path: str) -> None:
    fetch(path, whole=True)


def _has_room(config: RunConfig, held: dict[str, Any]) -> bool:
    """Whether a rollout worker or a rank of the learner fits onto a node that has these resources."""
    # Of an engine over several nodes, each of them has a part.
    parts = (
        (config.rollout.cpus_per_worker, min(config.rollout.gpus_per_worker, 1.0)),
        (config.cluster.learner_cpus, learner_gpus(config)),
    )
    return any(cpus <= held.get("CPU", 0.0) and gpus <= held.get("GPU", 0.0) for cpus, gpus in parts)
