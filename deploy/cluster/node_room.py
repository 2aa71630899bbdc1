"""Whether workers and ranks fit onto the nodes of a cluster, node by node: the sum of all nodes is not enough.

Two nodes of 8 GPUs of which 4 are taken on each have 8 GPUs in sum, and none has room for an engine of 8. Pure
arithmetic over what nodes have, by Ray's names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor

from deploy.config.config import RunConfig
from deploy.config.resources import rank_claims, worker_claims

Resources = Mapping[str, float]

_SHOWN_NODES = 8
_UNIT = 1e4  # Ray counts resources in units of 1e-4


@dataclass(frozen=True, slots=True)
class Claim:
    """`count` actors that each take so much of one node. pieces: so many of them are one engine, over several nodes."""

    part: str
    count: int
    each: dict[str, float]
    pieces: int = 1

    def fit(self, free: Resources) -> int:
        """How many a node with these free resources has room for."""
        most = [floor(_units(free.get(name, 0.0)) / _units(each)) for name, each in self.each.items() if each]
        return min([self.count, *most])

    def __str__(self) -> str:
        if self.pieces > 1:
            return (
                f"{_counted(self.count // self.pieces, self.part)}, each {self.pieces} GPU over several nodes"
            )
        return f"{_counted(self.count, self.part)}, each {_listed(self.each)} on one node"


def joined_claims(configs: Sequence[RunConfig], nodes: Sequence[Resources]) -> list[tuple[Claim, Claim]]:
    """What workers and ranks of each policy claim; policies that claim alike, together."""
    found: list[tuple[Claim, Claim]] = []
    for pair in (claims(config, nodes) for config in configs):
        alike = next((each for each in found if [_kind(c) for c in each] == [_kind(c) for c in pair]), None)
        if alike is not None:
            found.remove(alike)
            pair = [replace(c, count=c.count + d.count) for c, d in zip(pair, alike, strict=True)]
        found.append((pair[0], pair[1]))
    return found


def _kind(claim: Claim) -> tuple[dict[str, float], int]:
    return claim.each, claim.pieces


def claims(config: RunConfig, nodes: Sequence[Resources]) -> list[Claim]:
    """What workers and ranks claim: an engine on one node where the largest node has its GPUs, else GPU by GPU."""
    gpus = config.rollout.gpus_per_worker
    worker = Claim("rollout worker", config.workers, worker_claims(config))
    if spans_nodes(gpus, nodes):
        pieces = round(gpus)
        worker = Claim("rollout worker", config.workers * pieces, {"GPU": 1.0}, pieces)
    return [worker, Claim("learner rank", config.learner.ranks, rank_claims(config))]


def spans_nodes(gpus: float, nodes: Sequence[Resources]) -> bool:
    """Whether no node has as many GPUs as an engine, but some have GPUs."""
    largest = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    return 0 < largest < gpus


def fits(nodes: Sequence[Resources], first: Claim, second: Claim) -> bool:
    """Whether all actors of both claims can be placed at once. Exact: the best of all ways to deal them."""
    # placed[n]: most actors of `first` beside n of `second`, on the nodes so far.
    placed = [0] + [-1] * second.count
    for node in nodes:
        here = [first.fit(_without(node, second.each, n)) for n in range(second.fit(node) + 1)]
        merged = [-1] * (second.count + 1)
        for before, most in enumerate(placed):
            if most >= 0:
                for more, added in enumerate(here[: second.count - before + 1]):
                    merged[before + more] = max(merged[before + more], min(first.count, most + added))
        placed = merged
    return placed[second.count] >= first.count


def shown(nodes: Sequence[tuple[str, Resources]]) -> str:
    """What each node has, by its name, in one line; nodes alike are counted."""
    alike = Counter(_listed(node) for _, node in nodes)
    named = {_listed(node): name for name, node in nodes}
    said = [
        f"{count} nodes of {each}" if count > 1 else f"node {named[each]}: {each}"
        for each, count in alike.most_common()
    ]
    more = len(said) - _SHOWN_NODES
    return "; ".join(said[:_SHOWN_NODES]) + (f"; and {more} kinds of nodes more" if more > 0 else "")


def _without(node: Resources, each: Resources, count: int) -> dict[str, float]:
    return {name: amount - count * each.get(name, 0.0) for name, amount in node.items()}


def _units(amount: float) -> int:
    return round(amount * _UNIT)


def _listed(resources: Resources) -> str:
    own = [name for name in resources if ":" not in name and "memory" not in name and name != "CPU"]
    said = [f"{resources[name]:g} {name}" for name in [*sorted(own), "CPU"] if resources.get(name)]
    return " and ".join(said) or "no GPU or CPU"


def _counted(count: int, part: str) -> str:
    return f"{count} {part}{'s' if count != 1 else ''}"
