"""Manifests for Kubernetes and SkyPilot: they follow their schemas, and what they call is there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from jsonschema import Draft202012Validator

from deploy.cli import app
from deploy.config.load import load_config

ROOT = Path(__file__).resolve().parents[3]
KUBERNETES = ROOT / "deploy" / "kubernetes"
SKYPILOT = ROOT / "deploy" / "skypilot.yaml"


@lru_cache
def schema(name: str) -> Any:
    return json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def loaded(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def faults(manifest: dict[str, Any]) -> list[str]:
    """What a manifest has that its kind's schema does not allow, or lacks."""
    known = schema("kubernetes.json")
    validator = Draft202012Validator({**known, "$ref": f"#/$defs/{manifest['kind']}"})
    return [f"{'.'.join(map(str, each.path))}: {each.message}" for each in validator.iter_errors(manifest)]


def pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod specifications of a RayCluster or a RayJob, the head's first."""
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"]


def command(words: list[str]) -> dict[str, Any]:
    """The parameters of a `manta` command; fails for one that does not exist, or has no such option."""
    manta = typer.main.get_command(app)
    name, *arguments = words[1:]
    said: dict[str, Any] = manta.commands[name].make_context(name, arguments).params  # type: ignore[attr-defined]
    if said.get("recipe"):
        load_config(said["recipe"], said["overrides"] or ())
    return said


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml", "volume.yaml"])
def test_a_manifest_follows_the_schema_of_its_kind(name: str) -> None:
    assert faults(loaded(KUBERNETES / name)) == []


def test_a_wrong_manifest_is_seen() -> None:
    job = loaded(KUBERNETES / "rayjob.yaml")
    job["spec"]["backofLimit"] = job["spec"].pop("backoffLimit")
    (container,) = next(pods(job))["containers"]
    container["livenessProbe"]["httpGet"].pop("port")
    container["lifecycle"]["preStop"]["exec"]["command"] = "manta drain"
    del job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]
    said = "\n".join(faults(job))
    for fault in (
        "backofLimit",
        "'port' is a required",
        "'manta drain' is not of type",
        "'groupName' is a required",
    ):
        assert fault in said, said


def test_the_job_has_the_clusters_pods_and_runs_a_command_that_there_is() -> None:
    cluster, job = (loaded(KUBERNETES / name) for name in ("raycluster.yaml", "rayjob.yaml"))
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    said = command(shlex.split(job["spec"]["entrypoint"]))
    config = load_config(said["recipe"], said["overrides"])
    offered = {name: json.loads(json.loads(group["rayStartParams"]["resources"]))
               for group in cluster["spec"]["workerGroupSpecs"] for name in [group["groupName"]]}  # fmt: skip
    assert config.rollout.resources_per_worker == offered["rollout"]
    assert config.cluster.learner_resources == offered["learner"]
    assert str(said["run_dir"]).startswith("/shared/") and said["retries"] > 0
    comment = (KUBERNETES / "raycluster.yaml").read_text(encoding="utf-8").replace("\\\n# ", "")
    (submit,) = re.findall(r"^# +(manta submit .*)$", comment, re.MULTILINE)
    command(shlex.split(submit))


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_every_pod_is_probed_drained_and_sees_the_shared_volume(name: str) -> None:
    claim = loaded(KUBERNETES / "volume.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(loaded(KUBERNETES / name)):
        volumes = {each["name"]: each for each in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
        drained = command(container["lifecycle"]["preStop"]["exec"]["command"])
        assert drained["seconds"] < pod["terminationGracePeriodSeconds"]


def test_the_task_for_skypilot_follows_its_schema_and_runs_commands_that_there_are() -> None:
    task = loaded(SKYPILOT)
    validator = Draft202012Validator(schema("skypilot.json"))
    assert [each.message for each in validator.iter_errors(task)] == []
    assert [each.message for each in validator.iter_errors(task | {"num_node": 2})] != []
    run = task["run"].replace("\\\n", "")
    (submit,) = re.findall(r"^ *(manta submit .*)$", run, re.MULTILINE)
    for name, value in task["envs"].items():
        submit = submit.replace(f"${name}", value)
    command(shlex.split(submit))
