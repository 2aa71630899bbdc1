"""Whether a run fits onto nodes, against trying every way to place it."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.cluster.node_room import Claim, Resources, claims, fits, shown, spans_nodes
from tests.deploy.small_run import configured

EIGHT: Resources = {"GPU": 8.0, "CPU": 16.0}


def _every_way(nodes: list[Resources], first: Claim, second: Claim) -> bool:
    """Try every node for every actor."""
    actors = [first.each] * first.count + [second.each] * second.count
    for places in product(range(len(nodes)), repeat=len(actors)):
        left = [dict(node) for node in nodes]
        for place, each in zip(places, actors, strict=True):
            for name, amount in each.items():
                left[place][name] = left[place].get(name, 0.0) - amount
        if all(amount >= 0 for node in left for amount in node.values()):
            return True
    return not nodes and not actors


amounts = st.integers(0, 8)
nodes_of = st.lists(st.fixed_dictionaries({"GPU": amounts, "CPU": amounts}), min_size=1, max_size=3)
claims_of = st.builds(
    Claim,
    st.just("worker"),
    st.integers(1, 3),
    st.fixed_dictionaries({"GPU": st.integers(0, 5), "CPU": st.integers(0, 3)}),
)


@given(nodes_of, claims_of, claims_of)
def test_it_fits_where_some_way_of_placing_it_does(
    nodes: list[Resources], first: Claim, second: Claim
) -> None:
    assert fits(nodes, first, second) == _every_way(nodes, first, second)


@pytest.mark.parametrize(
    ("overrides", "nodes", "room"),
    [
        (["rollout.workers=2", "engine.tensor_parallel_size=8", "rollout.gpus_per_worker=8"], [EIGHT] * 2, True),
        (["rollout.workers=3", "engine.tensor_parallel_size=5", "rollout.gpus_per_worker=5"], [EIGHT] * 2, False),
        (["rollout.workers=2", "rollout.gpus_per_worker=0.5"], [{"GPU": 1.0, "CPU": 3.0}], True),
        (["rollout.workers=3", "rollout.gpus_per_worker=0.5"], [{"GPU": 1.0, "CPU": 4.0}], False),
        (["engine.tensor_parallel_size=16", "rollout.gpus_per_worker=16"], [EIGHT] * 2, True),
        (["engine.tensor_parallel_size=16", "rollout.gpus_per_worker=16"], [EIGHT], False),
        (
            ["engine.tensor_parallel_size=8", "rollout.gpus_per_worker=8", "learner.model.device=cuda"],
            [EIGHT, {"GPU": 0.0, "CPU": 16.0}],
            False,
        ),
    ],
)  # fmt: skip
def test_engines_and_ranks_of_recipes(overrides: list[str], nodes: list[Resources], room: bool) -> None:
    assert fits(nodes, *claims(configured("tiny.heads=80", *overrides), nodes)) is room


def test_an_engine_spans_nodes_where_none_has_its_gpus() -> None:
    assert spans_nodes(16, [EIGHT, EIGHT]) and not spans_nodes(8, [EIGHT, EIGHT])
    assert not spans_nodes(1, [{"CPU": 4.0}]), "without any GPU the sum is what is missing"
    sizes = ("tiny.heads=16", "engine.tensor_parallel_size=16", "rollout.gpus_per_worker=16")
    config = configured(*sizes, "rollout.workers=2")
    worker, rank = claims(config, [EIGHT, EIGHT])
    assert str(worker) == "2 rollout workers, each 16 GPU over several nodes"
    assert str(rank) == "1 learner rank, each 1 CPU on one node"


def test_nodes_alike_are_counted() -> None:
    nodes = [("10.0.0.1", EIGHT), ("10.0.0.2", EIGHT), ("10.0.0.3", {"CPU": 4.0}), ("10.0.0.4", {})]
    assert shown(nodes) == "2 nodes of 8 GPU and 16 CPU; node 10.0.0.3: 4 CPU; node 10.0.0.4: no GPU or CPU"
