"""A cluster that grows is asked for what a run lacks: Ray's autoscaler, with its provider of pretended nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.report.metrics import read_metrics
from tests.deploy.ray_head import ROOT, ray_head
from tests.deploy.small_run import RECIPE, assert_balanced, configured

pytestmark = [pytest.mark.slow, pytest.mark.rare, pytest.mark.timeout(600)]
NODES = {
    "rollout": {"resources": {"CPU": 1, "rollout": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    "learner": {"resources": {"CPU": 1, "learner": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1},
}
OPTIONS = (
    "steps=2", "evaluation.tasks=0", "stages.0.source.episodes=8", 'engine={kind="transformers"}', "rollout.workers=2",
    "rollout.resources_per_worker={rollout=1}", "cluster.learner_resources={learner=1}",
)  # fmt: skip


def test_a_cluster_grows_to_what_a_run_asks_for(tmp_path: Path) -> None:
    with ray_head(cpus=0, grows=NODES) as head:
        command = [sys.executable, "-m", "deploy.cli", "submit", RECIPE, *OPTIONS]
        limits = ["cluster.capacity_timeout_seconds=200", "--output-dir", str(tmp_path)]
        done = subprocess.run(
            [*command, *limits, "--address", head.url],
            cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=500, encoding="utf-8",
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (run,) = tmp_path.iterdir()
    assert_balanced(run, configured(*OPTIONS))
    assert [row["workers"] for row in read_metrics(run)] == [2, 2]
    roster = json.loads((run / "roster.json").read_text(encoding="utf-8"))
    nodes = {part["part"]: part["node"] for part in roster}
    assert len({nodes[name] for name in ("rollout-0", "rollout-1", "learner", "replay buffer")}) == 4
    # The logs of all nodes are in the run's folder.
    kept = {folder.name.rpartition("-")[2] for folder in (run / "logs").iterdir() if any(folder.iterdir())}
    assert {node[:8] for node in nodes.values()} <= kept
