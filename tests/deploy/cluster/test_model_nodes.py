"""Every node that a part of a run may be placed on has the model before any part starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from deploy.assembly.models import model_path
from deploy.cluster.model_nodes import fetch_on_nodes
from deploy.config.config_errors import ConfigError
from tests.deploy.small_run import configured
from tests.learner.model.test_source import NAME, NEWER, snapshot

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Any]:
    """A head, another node with a cache of its own, and one without a processor."""
    import ray
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    own = {
        "HF_HUB_CACHE": str(tmp_path / "second" / "hub"),
        "MANTA_CACHE": str(tmp_path / "second" / "manta"),
    }
    started.add_node(num_cpus=1, env_vars=own)
    started.add_node(num_cpus=0, env_vars={"HF_HUB_CACHE": str(tmp_path / "third" / "hub")})
    ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
    yield started
    ray.shutdown()
    started.shutdown()


def test_a_node_without_the_model_is_named_before_anything_starts(
    nodes: Any, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    config = configured("tiny=", f"learner.model.path={NAME}", "cluster.fetch_timeout_seconds=120")
    snapshot(tmp_path, reference / "base")
    (run := tmp_path / "run").mkdir()
    path = model_path(config, run)
    assert path == f"{NAME}@{NEWER}"
    told = rf"node \S+: model {NAME}@{NEWER}: the hub cannot be reached, and no snapshot of it is here; every node"
    with pytest.raises(ConfigError, match=told) as refused:
        fetch_on_nodes(config, path)
    assert "\n" not in str(refused.value)
    there = snapshot(tmp_path / "second", reference / "base")
    fetch_on_nodes(config, path)  # the third node has none, and needs none
    (there / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=rf"node \S+: model {NAME}@{NEWER}: no vocabulary"):
        fetch_on_nodes(config, path)
