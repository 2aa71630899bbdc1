"""Runs as people submit them to a cluster: a real Ray of this machine, its Jobs API, an environment of one's own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import urlopen
from zipfile import ZipFile

import pytest
import yaml

from deploy.assembly.build import start_engine
from deploy.commands.status import state_of
from deploy.config import run_folder
from deploy.report.metrics import read_metrics
from tests.deploy.ray_head import ROOT, RayHead, ray_head
from tests.deploy.small_run import RECIPE, assert_balanced, configured, same_bits, train, trained_rows
from tests.faults.run import until

pytestmark = [pytest.mark.slow, pytest.mark.rare, pytest.mark.timeout(600)]
PLAIN = 'engine={kind="transformers"}'
LESS = ("evaluation.tasks=0", "stages.0.source.episodes=8", "rollout.cpus_per_worker=0.5", PLAIN)
OWN = """
import os

from envs.base import TextEnv

try:
    from judges import verdict
except ImportError:
    verdict = None


class Higher(TextEnv):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return os.environ.get("QUESTION", "unasked"), {}

    def step(self, action):
        success = verdict(action) if verdict else len(action) > 2
        return "", float(success), True, False, {"success": success}
"""
ENV = ('env={id="higher:Higher"}', "stages=", "evaluation={tasks=0}", "steps=1", "rollout.context_tokens=64")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHead]:
    with ray_head() as head:
        yield head


def manta(cluster: RayHead, *arguments: str, code: int = 0, folder: Path = ROOT) -> str:
    """What the command says to stdout, as it is called anywhere that reaches the cluster."""
    environment = cluster.environment | {"RAY_API_SERVER_ADDRESS": cluster.url, "SECRET": "of this shell"}
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=280, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def job_of(said: str) -> str:
    """The id in what `manta submit` says first."""
    return said.split("submitted ")[1].split()[0]


def status(cluster: RayHead, target: str, *more: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(manta(cluster, "status", target, "--json", *more))
    return told


def test_an_own_environment_in_a_folder_is_submitted_and_told(
    cluster: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "higher.py").write_text(OWN, encoding="utf-8")
    runs = ("--output-dir", str(tmp_path / "runs"))
    said = manta(
        cluster, "submit", RECIPE.replace(str(ROOT), "."), *ENV, PLAIN, "rollout.cpus_per_worker=0.5", *runs,
        "--working-dir", str(tmp_path / "mine"), "--env-var", "QUESTION=Which?", "--env-var", "SECRET",
        code=2,
    )  # fmt: skip
    assert said == ""  # the recipe lies beside the folder
    (tmp_path / "mine" / "small.toml").write_bytes(Path(RECIPE).read_bytes())
    said = manta(
        cluster, "submit", "small.toml", *ENV, PLAIN, "rollout.cpus_per_worker=0.5", *runs,
        "--working-dir", ".", "--env-var", "QUESTION=Which?", folder=tmp_path / "mine",
    )  # fmt: skip
    job = job_of(said)
    run = tmp_path / "runs" / job
    assert "report.html" in said
    assert all("Which?" in row["observation"] for row in trained_rows(run))
    told = status(cluster, job)
    assert told == status(cluster, str(run), "--address", cluster.url)
    assert (told["phase"], told["step"], told["steps"], told["job_status"]) == ("finished", 1, 1, "SUCCEEDED")
    assert told["job"] == job and told["failure"] is None and told["restarts"] == {"driver": 0}
    with monkeypatch.context() as elsewhere:  # a machine that does not see the folder: the cluster reads it
        elsewhere.setattr(run_folder, "exists", lambda folder: False)
        assert state_of(job, cluster.url).model_dump(mode="json") == told
    assert "step 1/1" in manta(cluster, "logs", job) and "step 1/1" in manta(cluster, "logs", str(run))


def test_the_same_through_a_runtime_environment(cluster: RayHead, tmp_path: Path) -> None:
    for name in ("mine", "judges"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "higher.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "mine" / "small.toml").write_bytes(Path(RECIPE).read_bytes())
    (tmp_path / "judges" / "__init__.py").write_text(
        "def verdict(action):\n    return False\n", encoding="utf-8"
    )
    (tmp_path / "env.yaml").write_text(
        f"working_dir: {tmp_path / 'mine'}\npy_modules: [{tmp_path / 'judges'}]\n"
        "env_vars: {QUESTION: 'Whose?'}\n",
        encoding="utf-8",
    )
    said = manta(
        cluster, "submit", str(tmp_path / "mine" / "small.toml"), *ENV, PLAIN, "rollout.cpus_per_worker=0.5",
        "--runtime-env", str(tmp_path / "env.yaml"), "--output-dir", str(tmp_path / "runs"),
    )  # fmt: skip
    rows = trained_rows(tmp_path / "runs" / job_of(said))
    assert all("Whose?" in row["observation"] and row["success"] is not True for row in rows)
    assert {row["success"] for row in rows if row["end_reason"]} == {False}


def test_packages_are_installed_by_uv_for_a_job(cluster: RayHead, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "higher.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "mine" / "small.toml").write_bytes(Path(RECIPE).read_bytes())
    packed = {
        "judges.py": "def verdict(action):\n    return True\n",
        "judges-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: judges\nVersion: 1.0\n",
        "judges-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with ZipFile(tmp_path / "judges-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in packed.items():
            wheel.writestr(name, text)
        wheel.writestr("judges-1.0.dist-info/RECORD", "".join(f"{name},,\n" for name in packed))
    asked = {
        "packages": ["judges==1.0"],
        "uv_pip_install_options": ["--no-index", f"--find-links={tmp_path}"],
    }
    (tmp_path / "env.yaml").write_text(
        yaml.safe_dump({"working_dir": str(tmp_path / "mine"), "uv": asked}), encoding="utf-8"
    )
    said = manta(
        cluster, "submit", str(tmp_path / "mine" / "small.toml"), *ENV, PLAIN, "rollout.cpus_per_worker=0.5",
        "--runtime-env", str(tmp_path / "env.yaml"), "--output-dir", str(tmp_path / "runs"),
    )  # fmt: skip
    rows = trained_rows(tmp_path / "runs" / job_of(said))
    assert {row["success"] for row in rows if row["end_reason"]} == {True}  # as the package judges
    assert find_spec("judges") is None  # it is the job's alone


def test_a_job_whose_driver_is_killed_goes_on_exactly(cluster: RayHead, tmp_path: Path) -> None:
    options = ("steps=40", "buffer.max_lag=0", "checkpoint.every_steps=3", *LESS)
    reference = tmp_path / "reference"
    train(configured(*options), reference, start_engine)
    said = manta(
        cluster,
        "submit",
        RECIPE,
        *options,
        "--retries",
        "2",
        "--no-wait",
        "--output-dir",
        str(tmp_path / "runs"),
    )
    job = job_of(said)
    run = tmp_path / "runs" / job
    until(lambda: len(read_metrics(run)) >= 4, 150, "the fourth step", poll=0.01)
    first = json.loads((run / "state.json").read_text(encoding="utf-8"))  # a command would be too slow
    os.kill(first["pid"], signal.SIGKILL)
    until(lambda: len(read_metrics(run)) == 40 and (run / "summary.json").exists(), 150, "the end")
    until(lambda: status(cluster, job)["job_status"] == "SUCCEEDED", 60, "the end of the job")
    told = status(cluster, job)
    assert told["phase"] == "finished" and told["restarts"]["driver"] == 1
    assert told["driver"]["pid"] != first["pid"]
    assert "the driver was killed by SIGKILL; start 1 of at most 2 more" in manta(cluster, "logs", job)
    assert_balanced(run, configured(*options))
    assert same_bits(reference, run)


def test_a_job_is_stopped_in_order_from_anywhere(cluster: RayHead, tmp_path: Path) -> None:
    said = manta(
        cluster, "submit", RECIPE, "steps=100000", *LESS, "--retries", "2", "--no-wait",
        "--output-dir", str(tmp_path / "runs"),
    )  # fmt: skip
    job = job_of(said)
    run = tmp_path / "runs" / job
    until(lambda: len(read_metrics(run)) >= 1, 150, "the first step")
    told = status(cluster, job)
    assert told["phase"] == "training" and told["workers"] == {"wanted": 1, "serving": 1}
    shown = manta(cluster, "logs", str(run), "--part", "rollout-0")
    assert shown == manta(cluster, "logs", job, "--part", "rollout-0")
    assert str(run) in manta(cluster, "stop", job)
    told = status(cluster, job)
    assert (told["phase"], told["job_status"]) == ("stopped", "STOPPED")
    assert told["workers"]["serving"] == 0 and not told["driver"]["alive"]


def test_the_dashboard_shows_what_rays_exporter_serves(cluster: RayHead, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    said = manta(
        cluster, "submit", RECIPE, "evaluation.tasks=4", "learner.algorithm.skip_zero_advantage=false", *LESS[1:],
        "--output-dir", str(folder), "--no-wait",
    )  # fmt: skip
    run = folder / job_of(said)
    panels = json.loads((ROOT / "deploy" / "monitoring" / "dashboard.json").read_text(encoding="utf-8"))[
        "panels"
    ]
    shown = {re.match(r"\w+", each["expr"])[0] for panel in panels for each in panel.get("targets", ())}  # type: ignore[index]
    shown.discard("ray_node_gpus_utilization")  # this machine has none
    until(lambda: (run / "summary.json").exists(), 150, "the end of the run")
    served: dict[str, str] = {}

    def all_served() -> bool:
        with urlopen(f"{cluster.metrics}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                name = re.match(r"\w+", line)
                if name and ("ray_node" in line or f'run="{run.name}"' in line):
                    served[name[0]] = line
        return shown <= served.keys() and value("step") == 4

    def value(name: str) -> float:
        return float(served[f"ray_manta_{name}"].split()[-1])

    try:
        until(all_served, 60, "every metric of the last step", poll=1.0)
    except TimeoutError as late:
        missing = sorted(shown - served.keys())
        raise AssertionError(f"not served: {missing}; {served.get('ray_manta_step')}") from late
    assert value("loss") == pytest.approx(read_metrics(run)[-1]["loss"])


def test_prometheus_is_told_of_every_node(cluster: RayHead) -> None:
    scraped = yaml.safe_load((ROOT / "deploy" / "monitoring" / "prometheus.yaml").read_text(encoding="utf-8"))
    ((file,),) = [each["file_sd_configs"][0]["files"] for each in scraped["scrape_configs"][:1]]
    found = cluster.folder / Path(file).relative_to("/tmp/ray")
    until(found.exists, 60, "the list of nodes")
    targets = [target for each in json.loads(found.read_text(encoding="utf-8")) for target in each["targets"]]
    assert cluster.metrics.rpartition(":")[2] in {target.rpartition(":")[2] for target in targets}


def test_the_probes_of_the_pods_are_answered(cluster: RayHead) -> None:
    job = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "rayjob.yaml").read_text(encoding="utf-8"))
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    ports = {8265: cluster.url, 52365: cluster.agent}  # those of a pod, and of this cluster
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = head[probe]["httpGet"]
        with urlopen(f"{ports[asked['port']]}{asked['path']}", timeout=10) as answer:
            assert answer.status == 200
