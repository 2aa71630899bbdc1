"""Reaching a Ray cluster, or starting a local one, and asking whether it can hold a run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import ray

from deploy.cluster.janitor import TAG, ray_folder
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError


def connect(config: RunConfig, temporary: Path | None = None) -> None:
    """Join the cluster named by the configuration or by the job that runs us, or start a local Ray.

    A local Ray keeps its sockets and logs below `temporary`, where one is given. ConfigError where Ray cannot be had.
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
            "see that it runs there (ray status) with the same version of Ray, or say cluster.address= to start one",
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
            "wait for processors and memory to be free and try again, or train without Ray: --local",
            address="local",
            **options,
        )


def _init(what: str, remedy: str, **options: Any) -> None:
    """Call `ray.init`. ConfigError, one line, where it fails: of a node that is late Ray raises Exception itself."""
    try:
        ray.init(**options)
    except Exception as error:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{what}: {said}; {remedy}") from error


def require_capacity(config: RunConfig) -> None:
    """Refuse a request that the cluster cannot hold, saying what is missing."""
    wanted = demand(config)
    deadline = time.monotonic() + config.cluster.capacity_seconds
    while True:
        held = ray.cluster_resources()
        missing = {
            name: amount - held.get(name, 0.0)
            for name, amount in wanted.items()
            if amount > held.get(name, 0.0)
        }
        if not missing:
            return
        if time.monotonic() > deadline or _fixed_size(config):
            lacking = ", ".join(f"{amount:g} {name}" for name, amount in missing.items())
            asked = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
            lower = "lower rollout.workers or rollout.cpus_per_worker"
            if replicas := replicas_elsewhere(config):
                lower += (
                    f", what each of {replicas} replicas claims (env.host.cpus_per_replica, resources) or their number "
                    "(rollout.concurrent_groups * rollout.group_size a worker)"
                )
            raise ConfigError(
                f"the cluster is too small: {lacking} missing (the run asks for {asked}); {lower}, or add nodes"
            )
        time.sleep(0.5)


def require_room(config: RunConfig, workers: int) -> None:
    """Refuse more rollout workers than a cluster that never grows can hold. ConfigError says how many it can."""
    if not _fixed_size(config):
        return
    held = ray.cluster_resources()

    def fits(count: int) -> bool:
        rollout = config.rollout.model_copy(update={"workers": count})
        wanted = demand(config.model_copy(update={"rollout": rollout}))
        return all(amount <= held.get(name, 0.0) for name, amount in wanted.items())

    if not fits(workers):
        most = next((count for count in range(workers, 0, -1) if fits(count)), 0)
        raise ConfigError(f"{workers} rollout workers were asked for, but this machine has room for {most}")


def demand(config: RunConfig) -> dict[str, float]:
    """The resources all actors of a run need together, in Ray's names."""
    workers, rollout = config.rollout.workers, config.rollout
    ranks = config.learner.ranks
    wanted = {"CPU": workers * rollout.cpus_per_worker + ranks * config.cluster.learner_cpus}
    if gpus := workers * rollout.gpus_per_worker + ranks * learner_gpus(config):
        wanted["GPU"] = gpus
    if replicas := replicas_elsewhere(config):
        for name, amount in config.env.host.claims.items():
            # Sums as Ray makes them, which counts in ten thousandths.
            wanted[name] = round(wanted.get(name, 0.0) + replicas * amount, 4)
    return wanted


def replicas_elsewhere(config: RunConfig) -> int:
    """How many replicas of the environment are actors of their own: one for each episode that is played at once."""
    return config.rollout.workers * config.rollout.episodes if config.env.host.where == "ray" else 0


def learner_gpus(config: RunConfig) -> float:
    """A rank's GPU: whole; with "ipc", which hands over a GPU's own memory, what engines leave of the one shared."""
    if config.learner.model.device != "cuda":
        return 0
    shared = config.weights.transfer == "ipc"
    return 1 - config.rollout.workers * config.rollout.gpus_per_worker if shared else 1


def _fixed_size(config: RunConfig) -> bool:
    # A local Ray never grows; an autoscaled cluster may, so it is given time.
    return not config.cluster.joins
