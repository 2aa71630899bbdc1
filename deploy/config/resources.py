"""What the actors of a run reserve on a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

from deploy.config.config import RunConfig

# What the actors of an engine and of a rank that take turns on a GPU claim of it: no two of a kind fit on one.
_ENGINES_PART, _RANKS_PART = 0.6, 0.4


@dataclass(frozen=True, slots=True)
class Reservation:
    """Actors of one kind."""

    part: str
    count: int
    each: dict[str, float]  # by Ray's names: CPU, GPU, a user's own

    def total(self, name: str) -> float:
        """All of them together, rounded as in Ray, which counts in units of 1e-4."""
        return round(self.count * self.each.get(name, 0.0), 4)


def reservations(config: RunConfig) -> list[Reservation]:
    """The actors of a run that reserve resources: workers, the learner's ranks, replicas that are actors."""
    found = [
        Reservation("rollout worker", config.workers, worker_claims(config)),
        Reservation("learner", config.learner.ranks, rank_claims(config)),
    ]
    if config.cluster.buffer_resources:
        found.append(Reservation("replay buffer", 1, config.cluster.buffer_resources))
    if replicas := replicas_elsewhere(config):
        found.append(Reservation("environment replica", replicas, replica_claims(config)))
    return found


def demand(*configs: RunConfig) -> dict[str, float]:
    """The resources of all actors of a run together, by Ray's names; one of which none is asked for is left out.

    configs: of each of its policies.
    """
    reserved = [each for config in configs for each in reservations(config)]
    names = dict.fromkeys(name for each in reserved for name in each.each)
    wanted = {name: round(sum(each.total(name) for each in reserved), 4) for name in names}
    return {name: amount for name, amount in wanted.items() if amount or name == "CPU"}


def worker_claims(config: RunConfig) -> dict[str, float]:
    """What each rollout worker reserves, by Ray's names."""
    rollout = config.rollout
    return {"CPU": rollout.cpus_per_worker, "GPU": rollout.gpus_per_worker} | rollout.resources_per_worker


def worker_gpus(config: RunConfig) -> float:
    """GPUs that a worker's actor claims; of one that it has in turns with a rank a part."""
    gpus = config.rollout.gpus_per_worker
    return gpus * _ENGINES_PART if config.cluster.colocate == "turns" else gpus


def rank_gpus(config: RunConfig) -> float:
    """GPUs that a rank's actor claims; of one that it has in turns with an engine a part."""
    takes_turns = config.cluster.colocate == "turns" and config.learner.model.device == "cuda"
    return _RANKS_PART if takes_turns else learner_gpus(config)


def rank_claims(config: RunConfig) -> dict[str, float]:
    """What each rank of the learner reserves, by Ray's names."""
    cluster = config.cluster
    return {"CPU": cluster.learner_cpus, "GPU": learner_gpus(config)} | cluster.learner_resources


def replica_claims(config: RunConfig) -> dict[str, float]:
    """What a replica claims at most: all episodes of the moment may be of one environment."""
    claims: dict[str, float] = {}
    for each in config.environments:
        if each.host.where == "ray":
            claims |= {name: max(amount, claims.get(name, 0.0)) for name, amount in each.host.claims.items()}
    return claims


def replicas_elsewhere(config: RunConfig) -> int:
    """The number of environment replicas that are actors: one for each concurrent episode."""
    elsewhere = any(each.host.where == "ray" for each in config.environments)
    return config.workers * config.rollout.episodes if elsewhere else 0


def learner_gpus(config: RunConfig) -> float:
    """GPUs of a rank: one; with "ipc", which shares a GPU's memory, the part of that GPU that engines leave free.

    None, where it has that of an engine in turns.
    """
    if config.learner.model.device != "cuda" or config.cluster.colocate == "turns":
        return 0
    shared = config.weights.transfer == "ipc"
    return 1 - config.rollout.workers * config.rollout.gpus_per_worker if shared else 1
