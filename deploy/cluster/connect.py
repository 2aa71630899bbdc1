"""Connection to Ray: join a cluster or start a local one, and check that it has room for a run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from deploy.cluster.janitor import TAG, ray_folder
from deploy.cluster.node_room import Claim, claims, fits, joined_claims, shown
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.resources import demand, replica_claims, replicas_elsewhere


def connect(config: RunConfig, temporary: Path | None = None) -> None:
    """Join the cluster named by the configuration or by the Ray job of this process, or start a local Ray.

    temporary: folder for the sockets and logs of a local Ray. ConfigError if Ray cannot be reached or started.
    """
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if config.cluster.joins:
        if run := os.environ.get(TAG):
            options["runtime_env"] = {"env_vars": {TAG: run}}
        address = config.cluster.address or "auto"
        _init(
            f"the Ray cluster at cluster.address={address!r} cannot be joined",
            "check that it runs there (ray status) with the same version of Ray, or use cluster.address= to start one",
            address=address,
            **options,
        )
    else:
        port = config.cluster.dashboard_port
        options |= {"include_dashboard": bool(port)} | ({"dashboard_port": port} if port else {})
        if temporary is not None:
            options["_temp_dir"] = str(ray_folder(temporary))
        _init(
            "Ray did not start on this machine",
            "free processors and memory and try again, or train without Ray: --local",
            address="local",
            **options,
        )


def _init(what: str, remedy: str, **options: Any) -> None:
    """Call `ray.init`. ConfigError, one line, for any failure: for a late node Ray raises a plain Exception."""
    try:
        ray.init(**options)
    except Exception as error:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{what}: {said}; {remedy}") from error


def require_capacity(configs: Sequence[RunConfig]) -> None:
    """ConfigError if the cluster has too few resources for the run, in all or on single nodes.

    configs: of each of the run's policies. The message lists the missing ones, or what each node has free. A cluster
    that may grow is asked for them and has `capacity_timeout_seconds`.
    """
    cluster = configs[0].cluster
    deadline = time.monotonic() + cluster.capacity_timeout_seconds
    with _Room(configs) as room:
        while lack := _lack(configs):
            if not cluster.joins or time.monotonic() > deadline:
                raise ConfigError(lack)
            if room.found():
                return


class _Room:
    """A placement group of all that a run reserves, from the first time that it is asked for to the end of the context.

    Ray's autoscaler sees what it lacks, beside what others use, and adds nodes for it.
    """

    def __init__(self, configs: Sequence[RunConfig]) -> None:
        self._configs = configs
        self._group: Any = None

    def __enter__(self) -> _Room:
        return self

    def __exit__(self, *error: object) -> None:
        if self._group is not None:
            ray.util.remove_placement_group(self._group)

    def found(self) -> bool:
        """Wait for a moment; whether the cluster has reserved everything."""
        if self._group is None:
            bundles = [bundle for config in self._configs for bundle in _bundles(config)]
            self._group = ray.util.placement_group(bundles)
            self._ready = self._group.ready()
        return bool(ray.wait([self._ready], timeout=0.5)[0])


def _bundles(config: RunConfig) -> list[dict[str, float]]:
    """What each actor of a run reserves."""
    held = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    each = [(claim.count, claim.each) for claim in claims(config, held)]
    each.append((replicas_elsewhere(config), replica_claims(config)))
    bundles = [{name: amount for name, amount in claim.items() if amount} for _, claim in each]
    return [bundle for bundle, (count, _) in zip(bundles, each, strict=True) if bundle for _ in range(count)]


def _lack(configs: Sequence[RunConfig]) -> str:
    """The message of what the cluster lacks for a run, as it is now; empty if it has room."""
    wanted, held = demand(*configs), ray.cluster_resources()
    missing = {
        name: amount - held.get(name, 0.0) for name, amount in wanted.items() if amount > held.get(name, 0.0)
    }
    if not missing:
        return _crowded(configs)
    lacking = ", ".join(f"{amount:g} {name}" for name, amount in missing.items())
    asked = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    lower = "lower rollout.workers or rollout.cpus_per_worker"
    if replicas := sum(map(replicas_elsewhere, configs)):
        lower += (
            f", the resources of each of {replicas} replicas (env.host.cpus_per_replica, env.host.resources) "
            "or their number (rollout.concurrent_groups * rollout.group_size a worker)"
        )
    return f"the cluster is too small: {lacking} missing (the run asks for {asked}); {lower}, or add nodes"


def _crowded(configs: Sequence[RunConfig]) -> str:
    """The message that workers and ranks do not fit onto the nodes as these are now; empty if they do.

    Of policies that claim differently each is looked at as if it were alone.
    """
    free = available_resources_per_node()
    nodes = [
        (str(node["NodeManagerAddress"]), free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]
    held = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for worker, rank in joined_claims(configs, held):
        if not fits([resources for _, resources in nodes], worker, rank):
            return _no_room(worker, rank, shown(nodes))
    return ""


def _no_room(worker: Claim, rank: Claim, free: str) -> str:
    return (
        f"the cluster has no room for the run node by node: asked are {worker}, and {rank}; free are {free}; "
        "lower rollout.workers, rollout.gpus_per_worker with the engine's parallel sizes, or learner.ranks, or add "
        "nodes"
    )


def require_room(config: RunConfig, workers: int) -> None:
    """ConfigError for more rollout workers than a cluster of fixed size has room for; the message has the maximum."""
    if config.cluster.joins:  # an autoscaled cluster may grow: its capacity is awaited
        return
    held = ray.cluster_resources()

    def has_room(count: int) -> bool:
        rollout = config.rollout.model_copy(update={"workers": count})
        wanted = demand(config.model_copy(update={"rollout": rollout}))
        return all(amount <= held.get(name, 0.0) for name, amount in wanted.items())

    if not has_room(workers):
        most = next((count for count in range(workers, 0, -1) if has_room(count)), 0)
        raise ConfigError(
            f"{workers} rollout workers requested, but this machine has room for {most}; ask for fewer"
        )
