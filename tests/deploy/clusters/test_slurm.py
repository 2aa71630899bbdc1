"""The Slurm script on this machine, with stand-ins for srun and scontrol: a Ray of two nodes, a run, a requeue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from random import Random

import pytest

from deploy.report.metrics import read_metrics
from deploy.run.state import run_state
from tests.deploy.ray_head import ROOT, environment
from tests.deploy.small_run import RECIPE, assert_balanced, configured
from tests.faults.run import until

SCRIPT = ROOT / "deploy" / "slurm" / "manta.sbatch"
# Options of a step, then its command, which becomes a process of this machine.
SRUN = """#!/bin/bash
echo "$@" >> "$STEPS"
while [[ "$1" == -* ]]; do shift; done
exec "$@"
"""
SCONTROL = (
    "#!/bin/bash\n[ \"$1 $2 $3\" = 'show hostnames pretended[1-2]' ] && printf '127.0.0.1\\n127.0.0.2\\n'\n"
)
OPTIONS = (
    "steps=60", "evaluation.tasks=0", "stages.0.source.episodes=8", 'engine={kind="transformers"}', "rollout.workers=2",
    "checkpoint.every_steps=5",
)  # fmt: skip


def test_the_script_is_a_script_of_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    options = [line for line in SCRIPT.read_text(encoding="utf-8").splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in options and "#SBATCH --signal=B:TERM@180" in options


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.timeout(600)
def test_two_nodes_play_a_run_that_goes_on_when_its_job_is_requeued(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    job = Random().randrange(10_000)
    slurm = {
        "SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "pretended[1-2]", "SLURM_CPUS_PER_TASK": "2",
        "MANTA_RUNS": str(tmp_path / "runs"), "STEPS": str(tmp_path / "steps"), "TMPDIR": "/tmp",
    }  # fmt: skip
    made = environment()
    made |= slurm | {"PATH": f"{tmp_path}{os.pathsep}{made['PATH']}"}
    run, log = tmp_path / "runs" / f"slurm-{job}", tmp_path / "log"

    def batch() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", str(SCRIPT), RECIPE, *OPTIONS], env=made, cwd=ROOT, stdout=log.open("ab"),
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    first = batch()
    try:
        until(lambda: len(read_metrics(run)) >= 1 or first.poll() is not None, 240, "the first step")
        first.send_signal(signal.SIGTERM)  # as before the time limit
        assert first.wait(150) != 0
    finally:
        _end(first)
    said = log.read_text(encoding="utf-8", errors="replace")
    made_before = len(read_metrics(run))
    assert run_state(run).phase == "stopped" and made_before < 60, said[-3000:]
    steps = (tmp_path / "steps").read_text(encoding="utf-8").splitlines()
    assert len(steps) == 2 and "--head" in steps[0] and "--exclude=127.0.0.1" in steps[1]

    again = batch()
    try:
        assert again.wait(280) == 0, log.read_text(encoding="utf-8", errors="replace")[-3000:]
    finally:
        _end(again)
    assert_balanced(run, configured(*OPTIONS))
    state = run_state(run)
    assert (state.phase, state.step, state.restarts["driver"]) == ("finished", 60, 1)
    roster = json.loads((run / "roster.json").read_text(encoding="utf-8"))
    assert len({part["node"] for part in roster}) == 2


def _end(batch: subprocess.Popen[bytes]) -> None:
    """End what is left of a batch job, as Slurm does with its steps."""
    try:
        os.killpg(batch.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    batch.wait(10)
