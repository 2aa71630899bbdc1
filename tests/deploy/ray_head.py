"""A Ray cluster of this machine, started as a person starts one: `ray start --head`, with a dashboard for jobs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS, STARTS = 120.0, 3


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def environment() -> dict[str, str]:
    """This checkout's `manta` and `ray` in the path, and no cluster of someone else."""
    names = [name for name in os.environ if name.startswith("RAY_") and name != "RAY_worker_niceness"]
    kept = {name: value for name, value in os.environ.items() if name not in (*names, "MANTA_RUN")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    # Ray asks for a token where the user's home has one; this cluster is on loopback.
    own = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    return kept | own | {"PATH": path, "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class RayHead:
    """Where the cluster is reached."""

    url: str  # of its dashboard
    address: str  # host and port that other nodes join
    metrics: str  # of its exporter
    agent: str  # of its node
    environment: dict[str, str]
    folder: Path  # of its sockets and logs


@contextmanager
def ray_head(cpus: int = 4, grows: Mapping[str, Any] | None = None) -> Iterator[RayHead]:
    """Start a head node, and stop what was started. grows: kinds of nodes that an autoscaler may pretend to add.

    On a busy machine a process of Ray may be late for another one, and `ray start` ends: then it is started again.
    """
    temporary = Path(tempfile.mkdtemp(prefix="mh-", dir="/tmp"))  # short: Ray's sockets lie in it
    for _ in range(STARTS):
        started, head = _start(temporary, cpus, grows)
        if _answers(head, started):
            break
        _end(started)
    else:
        raise TimeoutError((temporary / "start.log").read_text(encoding="utf-8", errors="replace")[-2000:])
    try:
        yield head
    finally:
        _end(started)
        shutil.rmtree(temporary, ignore_errors=True)


def _start(
    temporary: Path, cpus: int, grows: Mapping[str, Any] | None
) -> tuple[subprocess.Popen[bytes], RayHead]:
    port, dashboard, agent, metrics, client = (free_port() for _ in range(5))
    command = [
        "ray", "start", "--head", "--block", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1",
        f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", f"--temp-dir={temporary}",
        "--include-dashboard=true", "--object-store-memory=200000000", "--disable-usage-stats",
    ]  # fmt: skip
    started_with = environment()
    if grows is not None:
        scaled = temporary / "autoscaling.yaml"
        scaled.write_text(json.dumps(_autoscaling(cpus, grows, f"127.0.0.1:{port}")), encoding="utf-8")
        command.append(f"--autoscaling-config={scaled}")
        started_with |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with (temporary / "start.log").open("ab") as log:
        started = subprocess.Popen(command, env=started_with, stdout=log, stderr=log, start_new_session=True)
    urls = [f"http://127.0.0.1:{each}" for each in (dashboard, metrics, agent)]
    return started, RayHead(urls[0], f"127.0.0.1:{port}", *urls[1:], environment(), temporary)


def _answers(head: RayHead, started: subprocess.Popen[bytes]) -> bool:
    """Wait until jobs can be submitted; False if it has ended, or does not answer in time."""
    deadline = time.monotonic() + START_SECONDS
    while started.poll() is None and time.monotonic() < deadline:
        with suppress(URLError, TimeoutError, ConnectionError), urlopen(f"{head.url}/api/jobs/", timeout=5):
            return True
        time.sleep(0.5)
    return False


def _end(started: subprocess.Popen[bytes]) -> None:
    """Stop a head with all processes below it."""
    family = psutil.Process(started.pid).children(recursive=True) if started.poll() is None else []
    started.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        started.wait(60)
    for process in (started, *psutil.wait_procs(family, timeout=10)[1]):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    started.wait(10)


def _autoscaling(cpus: int, grows: Mapping[str, Any], address: str) -> dict[str, Any]:
    """The configuration of Ray's autoscaler whose nodes are processes of this machine."""
    head = {"resources": {"CPU": cpus}, "node_config": {}, "max_workers": 0}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "pretended",
        "provider": {"type": "fake_multinode", "gcs_address": address, "disable_node_updaters": True},
        "available_node_types": {**grows, "ray.head.default": head},
        "head_node_type": "ray.head.default",
        "max_workers": sum(kind["max_workers"] for kind in grows.values()),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    } | {f"{name}_commands": [] for name in commands}
