"""`manta train` of a run that is there: nothing said is ignored, a finished one is told, a folder has one run."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from deploy import cli
from deploy.assembly.build import replay_buffer_builder
from deploy.assembly.models import model_path
from deploy.cluster.control import driving
from deploy.commands.export import fresh_folder
from deploy.config import run_folder
from deploy.config.config_errors import ConfigError
from deploy.config.load import moved
from deploy.config.supervise import PartLost
from deploy.report.metrics import read_metrics
from deploy.report.phases import Phases, Startup
from deploy.report.progress import Progress
from deploy.run import drive
from deploy.run.local import LocalRuntime
from deploy.run.sessions import Sessions
from deploy.run.train import Training
from tests.deploy.command import Manta, command
from tests.deploy.small_run import RECIPE, Stopped, configured, hf_engine, late_engine, same_bits, train


@pytest.fixture
def manta(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Manta:
    """Runs the command in this process up to where a run would be started; returns exit code, stdout and stderr."""
    monkeypatch.setattr(drive, "_train", lambda *arguments: pytest.fail("a run was started"))
    monkeypatch.setattr(drive, "start_janitor", lambda *arguments: None)
    monkeypatch.setattr(drive, "make_private", lambda temporary: None)
    return command(monkeypatch, capsys)


def files_of(folder: Path) -> dict[str, int]:
    return {str(each): each.stat().st_mtime_ns for each in folder.rglob("*") if each.name != "driver.lock"}


# Nothing that is said is ignored --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch", "foo.bar=3"], "recipe 'nosuch' is neither"),
        ([RECIPE, "foo.bar=3"], "foo"),
        (
            [RECIPE, "learner.optim.learning_rate=1e-5"],
            "learner.optim.learning_rate is 0.01 there and 1e-05 here",
        ),
        (
            [RECIPE, "seed=3", "env.options.size=4"],
            "seed is 0 there and 3 here; env.options.size is 3 there",
        ),
        ([RECIPE, "stages="], "stages is [{"),
        (["frozen_lake"], "; and "),
    ],
)
def test_a_run_of_another_configuration_is_not_gone_on_with(
    manta: Manta, reference: Path, arguments: list[str], said: str
) -> None:
    code, out, err = manta("train", *arguments, "--run-dir", str(reference), "--local")
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_an_equal_configuration_goes_on(manta: Manta, reference: Path) -> None:
    code, out, err = manta("train", RECIPE, "seed=0", "--run-dir", str(reference), "--local")
    assert (code, err) == (0, "") and "finished already" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resume", "{run}", "--output-dir", "elsewhere"], "leave --output-dir elsewhere away"),
        (["--resume", "{run}", "--run-dir", "other"], "leave --run-dir other away"),
        (["--resume", "{run}", "--replay", "other"], "leave --replay other away"),
        (["--resume", "{run}", "steps=3"], "steps=3 is less than the run's 4"),
        (["--resume", "{run}", "cluster.address=ray://a:1", "--local"], "leave --local away"),
        ([RECIPE, "--run-dir", "one", "--output-dir", "other"], "leave --output-dir away"),
        ([RECIPE, "cluster.address=ray://a:1", "--local", "--output-dir", "new"], "leave --local away"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(
    manta: Manta,
    reference: Path,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = manta("train", *(each.format(run=reference) for each in arguments))
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# A finished run -------------------------------------------------------------------------------------------------


def test_a_finished_run_is_told_at_once_and_stays_as_it_is(manta: Manta, reference: Path) -> None:
    before = files_of(reference)
    code, out, err = manta("train", "--resume", str(reference))
    assert (code, err) == (0, "")
    summary = json.loads((reference / "summary.json").read_text(encoding="utf-8"))
    assert "4 of 4 steps are made" in out and f"success after  {summary['success_after']:.3f}" in out
    assert files_of(reference) == before


def test_a_run_given_more_steps_ends_as_one_that_had_them_from_the_start(
    reference: Path, tmp_path: Path
) -> None:
    more = moved(configured(), ["steps=6"])
    assert more == configured("steps=6")
    folder = shutil.copytree(reference, tmp_path / "run")
    summary = train(more, folder, resume=True)
    train(configured("steps=6", "evaluation.tasks=0"), tmp_path / "whole")
    assert same_bits(folder, tmp_path / "whole")
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4, 5, 6] and summary["steps"] == 6


def test_where_a_falling_schedule_ends_now_is_said(
    manta: Manta, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(reference, tmp_path / "run")
    run_folder.store(configured("learner.optim.schedule=linear"), folder)
    monkeypatch.setattr(drive, "drive", lambda asked: print(asked.config.steps))
    code, out, err = manta("train", "--resume", str(folder), "steps=9")
    assert (code, out) == (0, "9\n")
    assert "goes on to step 9 instead of 4, where the linear schedule of the learning rate ends now" in err


# Figures of all sessions ----------------------------------------------------------------------------------------


def test_the_figures_of_a_run_are_of_all_its_sessions(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        train(configured(), folder, stop_after=2)  # at a checkpoint: nothing is played twice
    (first,) = json.loads((folder / "sessions.json").read_text(encoding="utf-8"))
    assert first["seconds"]["training"] > 0 and first["tokens_generated"] > 0
    summary = train(configured(), folder, resume=True)
    whole = json.loads((reference / "summary.json").read_text(encoding="utf-8"))
    assert (summary["sessions"], whole["sessions"]) == (2, 1)
    assert summary["tokens_processed"] == whole["tokens_processed"]
    _, second = json.loads((folder / "sessions.json").read_text(encoding="utf-8"))
    # Whatever is trained and evaluated was sampled in one of them.
    assert summary["tokens_generated"] == first["tokens_generated"] + second["tokens_generated"]
    assert summary["tokens_generated"] >= whole["tokens_generated"] > second["tokens_generated"]
    for phase in ("start", "training"):
        total = first["seconds"][phase] + second["seconds"][phase]
        assert summary["seconds"][phase] == pytest.approx(total, abs=0.011)


def test_what_a_killed_session_had_recorded_is_kept(tmp_path: Path) -> None:
    killed = Sessions(tmp_path)
    killed.record({"training": 3.0}, 10)
    killed.record({"training": 7.5}, 25)
    second = Sessions(tmp_path)
    second.record({"training": 1.5, "evaluate_after": 2.0}, 5)
    assert second.totals() == {
        "sessions": 2,
        "seconds": {"training": 9.0, "evaluate_after": 2.0},
        "tokens_generated": 30,
    }
    (tmp_path / "sessions.json").rename(tmp_path / "sittings.json")  # as it was called
    assert Sessions(tmp_path).totals()["sessions"] == 3
    (tmp_path / "sessions.json").write_text("[{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"sessions\.json: broken file"):
        Sessions(tmp_path)


def test_a_summary_says_what_the_start_was_made_of(tmp_path: Path) -> None:
    config, startup = configured("steps=1"), Startup()
    startup.add("imports", 2.5)
    run_folder.create(config, tmp_path)
    ring = LocalRuntime(config, tmp_path, hf_engine, startup)
    progress = Progress(config.steps, "run", Console(file=io.StringIO()))
    asyncio.run(Training(config, ring, progress, startup).run(resume=False))
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    parts = summary["startup"]
    assert parts.keys() >= {"imports", "evaluation_tasks", "engines", "learner", "publish"}
    assert parts.pop("imports") == 2.5
    # No part that comes before the first episode is longer than what has passed until then.
    assert all(0 <= seconds <= summary["first_episode_s"] for seconds in parts.values())


def test_what_opens_the_buffer_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "build").write_bytes(pickle.dumps(replay_buffer_builder(configured(), tmp_path)))
    opened = (
        "import pathlib, pickle, sys; pickle.loads(pathlib.Path('build').read_bytes())(); "
        "print({'torch', 'transformers'} & {*sys.modules})"
    )
    code = subprocess.run(
        [sys.executable, "-c", opened],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert code.stdout.strip() == "set()" and (tmp_path / "ledger.sqlite").is_file()


def test_a_phase_that_several_are_in_at_once_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 9.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    phases = Phases()
    with phases.timed("engines"), phases.timed("engines"):  # from 0; 1 is read, and passed over
        pass
    # Left at last at 4: the inner end reads no clock.
    assert phases._ended == {"engines": 4.0}
    with phases.timed("learner"):  # from 9
        assert phases.seconds == {"engines": 4.0, "learner": 11.0}  # at 20
        monkeypatch.undo()


# One folder, one run --------------------------------------------------------------------------------------------


def test_runs_that_begin_in_one_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "20260101-120000")
    together = threading.Barrier(8)

    def choose(seed: int) -> Path:
        together.wait()
        return run_folder.choose(configured(f"seed={seed}"), tmp_path / "runs")

    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(choose, range(8)))
    assert len({*folders}) == 8 and {*folders} == {*(tmp_path / "runs").iterdir()}


def test_whoever_comes_second_writes_nothing(manta: Manta, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_folder.make(folder)
    with driving(folder):  # another process, which has not stored its configuration yet
        code, _, err = manta("train", RECIPE, "seed=2", "--run-dir", str(folder), "--local")
    assert code == 2 and "is being driven already" in err
    assert [each.name for each in folder.iterdir()] == ["driver.lock"]


def test_a_run_begun_there_meanwhile_is_not_begun_again(
    manta: Manta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, check = tmp_path / "run", "deploy.run.preflight.check"
    monkeypatch.setattr(check, lambda config: run_folder.create(configured("seed=1"), folder))
    code, _, err = manta("train", RECIPE, "seed=2", "--run-dir", str(folder), "--local")
    assert code == 2 and "another run was begun there meanwhile" in err
    assert run_folder.open_existing(folder).seed == 1


def test_of_two_that_write_one_folder_one_ends_well_and_it_is_whole(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def write(number: int) -> bool:
        try:
            with fresh_folder(tmp_path / "model") as partial:
                (partial / "one").write_text(str(number), encoding="utf-8")
                together.wait()
                (partial / "two").write_text(str(number), encoding="utf-8")
        except ConfigError as error:
            assert "exists already" in str(error)
            return False
        return True

    with ThreadPoolExecutor(4) as threads:
        ended = list(threads.map(write, range(4)))
    assert sum(ended) == 1
    winner = str(ended.index(True))
    assert [(tmp_path / "model" / name).read_text(encoding="utf-8") for name in ("one", "two")] == [
        winner,
        winner,
    ]
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_a_base_model_half_written_by_a_killed_driver_is_built_again(reference: Path, tmp_path: Path) -> None:
    (tmp_path / ".base.part").mkdir()
    shutil.copy(reference / "base" / "config.json", tmp_path / ".base.part")
    built = Path(model_path(configured(), tmp_path))
    assert {each.name for each in built.iterdir()} == {each.name for each in (reference / "base").iterdir()}
    assert {each.name for each in tmp_path.iterdir()} == {"base", "model.json"}


def test_a_stopped_run_that_was_told_more_steps_is_not_finished(manta: Manta, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = configured("evaluation.tasks=0", "stages.0.source.episodes=4")
    with pytest.raises(Stopped):
        train(config, folder, late_engine(0), stop_after=1)
    with pytest.raises(pytest.fail.Exception, match="a run was started"):
        manta("train", "--resume", str(folder), "--local")


def test_a_part_that_does_not_start_ends_the_run_in_one_line(
    manta: Manta, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def late(*arguments: object) -> None:
        raise PartLost("the learner (start) did not answer within 300 s")

    monkeypatch.setattr(drive, "_train", late)
    code, _, errors = manta("train", RECIPE, "--local", "--run-dir", str(tmp_path / "run"))
    assert code == 1
    assert "the learner (start) did not answer within 300 s" in errors
    assert "Traceback" not in errors
