"""Replicas on the cluster: what a run asks of it for them, and that where they live changes nothing about a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.config.config_errors import ConfigError
from deploy.config.resources import demand
from deploy.run.local import LocalRuntime
from deploy.run.preflight import check
from tests.deploy.small_run import assert_balanced, configured, same_bits, train, trained_rows

FEW = (
    "steps=2",
    "rollout.concurrent_groups=1",
    "rollout.group_size=2",
    "evaluation.tasks=2",
    "stages.0.source.episodes=16",
)
ON_RAY = (
    *FEW,
    "env.host.where=ray",
    "env.host.cpus_per_replica=0.25",
    "env.host.resources={cpu_node=0.5}",
    "rollout.cpus_per_worker=0.5",
    "cluster.learner_cpus=0.5",
)


def test_a_run_claims_a_replica_for_every_episode_that_is_played_at_once() -> None:
    config = configured(*ON_RAY, "rollout.workers=3", "rollout.group_size=4", "rollout.concurrent_groups=5")
    assert demand(config) == {"CPU": 3 * 0.5 + 0.5 + 3 * 4 * 5 * 0.25, "cpu_node": 30.0}
    inline = configured(*FEW, "rollout.cpus_per_worker=0.5", "cluster.learner_cpus=0.5")
    assert demand(inline) == {"CPU": 1.0}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["env.host.resources={cpu_node=1}"], "where='auto'; use where='ray', or omit them"),
        (["env.host.where=process", "env.host.cpus_per_replica=2"], "where='process'; use where='ray'"),
        (
            ["env.host.where=ray", "env.host.resources={CPU=1}"],
            "CPU is built into Ray; CPUs and GPUs have options of their own",
        ),
        (["env.host.where=ray", "env.host.resources={cpu_node=0.00001}"], "env.host.resources.cpu_node"),
    ],
)
def test_claims_that_cannot_be_made_are_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configured(*overrides)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_one_process_has_no_replicas_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^env.host.where='ray' has replicas in actors: [^\n]*$"):
        LocalRuntime(configured(*ON_RAY), tmp_path)


def test_a_foreign_agent_runs_beside_its_worker() -> None:
    config = configured(
        "env.id=program", "env.options={command=['true']}", "env.host.where=ray", "agent.memory=full"
    )
    with pytest.raises(ConfigError, match="a foreign agent must run on its worker's node"):
        check(config)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        resources={"cpu_node": 1},
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_cluster_too_small_for_the_replicas_is_refused(cluster: None) -> None:
    from deploy.cluster.connect import require_capacity

    require_capacity([configured(*ON_RAY)])
    with pytest.raises(ConfigError) as refused:
        require_capacity([configured(*ON_RAY, "rollout.group_size=12")])
    said = str(refused.value)
    assert "too small: 2 CPU, 5 cpu_node missing (the run asks for 4 CPU, 6 cpu_node)" in said
    assert "the resources of each of 12 replicas (env.host.cpus_per_replica, env.host.resources)" in said
    assert "\n" not in said


@pytest.mark.rare
@pytest.mark.slow
def test_where_replicas_live_changes_nothing_about_a_run(cluster: None, tmp_path: Path) -> None:
    import ray

    from deploy.cluster.cluster import RayRuntime

    # Replicas of the evaluation claim all that the cluster has for them, and those of the training go on there.
    config = configured(*ON_RAY)
    train(config, tmp_path / "ray", ring_type=RayRuntime)
    assert_balanced(tmp_path / "ray", config)
    deadline = time.monotonic() + 60
    while ray.available_resources().get("cpu_node") != 1.0:
        assert time.monotonic() < deadline, "a replica of the run is still there"
        time.sleep(0.1)
    train(configured(*FEW), tmp_path / "inline")
    assert _played(tmp_path / "ray") == _played(tmp_path / "inline")
    assert same_bits(tmp_path / "ray", tmp_path / "inline")


def _played(folder: Path) -> list[list[object]]:
    facts = ("group_id", "episode", "turn", "observation", "action", "reward", "end_reason", "success")
    return sorted([row[fact] for fact in facts] for row in trained_rows(folder))
