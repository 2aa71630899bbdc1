"""Several policies on Ray: the same bits as in one process, and losses that cost one policy's part alone."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from deploy.cluster.cluster import RayRuntime
from deploy.cluster.connect import connect, require_capacity
from deploy.commands.status import described
from deploy.config import run_folder
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.policies import configurations
from deploy.config.resources import demand
from deploy.report.metrics import read_metrics
from deploy.run.several import train_several
from deploy.run.state import run_state
from rollout.wire.metrics import Row
from tests.deploy.run.test_several import POLICIES, TWO, assert_same, configured, folders, trained
from tests.deploy.small_run import ledger

ON_RAY = ("cluster.learner_cpus=0.25", "rollout.cpus_per_worker=0.25")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "run"
    trained(configured(*TWO, *ON_RAY), folder)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    connect(configured(*TWO, *ON_RAY))
    yield
    ray.shutdown()


def on_ray(config: RunConfig, folder: Path, spoiled: tuple[str, int] | None = None) -> str:
    """The run of several policies; spoiled: whose learner is killed, and before which step. Returns what it said."""
    run_folder.create(config, folder)

    def make_ring(own: RunConfig, *given: Any, **named: Any) -> RayRuntime:
        ring = RayRuntime(own, *given, asked_in=folder, **named)
        if spoiled is not None and own.policy == spoiled[0]:
            _kill_before(ring, spoiled[1])
        return ring

    said = io.StringIO()
    asyncio.run(train_several(config, folder, Console(file=said, width=500), False, make_ring=make_ring))
    return said.getvalue()


def _kill_before(ring: RayRuntime, number: int) -> None:
    step, killed = ring.step, False

    async def killed_before(asked: int, *given: Any) -> Row:
        nonlocal killed
        if asked == number and not killed:
            killed = True
            ray.kill(ring._learner.lead)
        return await step(asked, *given)

    ring.step = killed_before  # type: ignore[method-assign]


def test_actors_change_nothing_about_two_policies_that_meet(
    local: Path, cluster: None, tmp_path: Path
) -> None:
    config, folder = configured(*TWO, *ON_RAY), tmp_path / "run"
    on_ray(config, folder)
    assert_same(local, folder)
    state = run_state(folder)
    assert state.step == 6 and set(state.policies) == set(POLICIES)
    assert all(each.workers is not None and each.step == 6 for each in state.policies.values())
    assert all(f"policy {name}\n" in described(state) for name in POLICIES)


@pytest.mark.parametrize("killed", [POLICIES[0], pytest.param(POLICIES[1], marks=pytest.mark.rare)])
def test_a_lost_learner_is_replaced_and_all_policies_end_with_the_same_bits(
    killed: str, local: Path, cluster: None, tmp_path: Path
) -> None:
    said = on_ray(configured(*TWO, *ON_RAY), tmp_path / "run", (killed, 4))
    assert said.count("it starts again from its newest checkpoint") == 1
    assert_same(local, tmp_path / "run")


@pytest.mark.rare
def test_policies_one_version_behind_train_and_drop_all_that_was_issued(
    cluster: None, tmp_path: Path
) -> None:
    config, folder = configured(*TWO, *ON_RAY, "buffer.max_lag=1", "rollout.workers=2"), tmp_path / "run"
    on_ray(config, folder)
    for each, groups in zip(folders(folder), (2, 4), strict=True):
        assert max(row["lag_max"] for row in read_metrics(each)) <= 1
        states = ledger(each, "SELECT state, count(*) FROM groups GROUP BY 1")
        assert dict(states)["trained"] == 6 * groups and set(dict(states)) <= {"trained", "dropped"}


def test_what_all_policies_reserve_is_asked_of_the_cluster_before_anything_starts(cluster: None) -> None:
    config = configured(
        *TWO, "cluster.learner_cpus=0.75", "rollout.workers=3", "rollout.cpus_per_worker=0.25"
    )
    own = list(configurations(config).values())
    assert demand(*own)["CPU"] == 2 * (0.75 + 3 * 0.25)
    held = ray.cluster_resources()["CPU"]
    too_many = configured(*TWO, "cluster.learner_cpus=0.5", f"rollout.cpus_per_worker={held / 2}")
    with pytest.raises(ConfigError, match=r"the cluster is too small: 1 CPU missing"):
        require_capacity(list(configurations(too_many).values()))
