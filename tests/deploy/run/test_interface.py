"""Manta from Python: what the guide shows runs as it stands, also where an event loop is running already."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from deploy import ConfigError, RunResult, load_recipe, train
from deploy.run import drive
from deploy.run.interrupt import Stopped, beside_a_loop, interruptible
from learner.training.checkpoint import MODEL
from tests.deploy.small_run import RECIPE, configured
from tests.smollm2 import FOLDER, needs_smollm2

ROOT = Path(__file__).parents[3]
PLAIN = {"kind": "transformers"}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of its own, and no janitor: the test's process goes on."""
    monkeypatch.setattr(drive, "start_janitor", lambda *arguments: None)
    monkeypatch.setattr(drive, "temporary_of", lambda run: None)
    monkeypatch.setattr(drive, "tag_run", lambda: "tests")
    monkeypatch.chdir(tmp_path)


def blocks() -> list[str]:
    """The guide's code, but the engine that is a file of its own."""
    found = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL
    )
    return [block for block in found if not block.startswith("# plain_engine.py")]


def test_the_guide_runs_from_the_first_line_to_the_last() -> None:
    said: dict[str, Any] = {}
    for block in blocks():
        exec(compile(block, "docs/python.md", "exec"), said)
    result = said["result"]
    assert result.summary["steps"] == result.metrics.num_rows == 2
    assert result.summary["ledger"]["trained"] == 8
    assert result.episodes.num_rows >= 8 * 4 and isinstance(result.episodes, pa.Table)
    assert result.config == said["config"]
    assert len(said["completion"].token_ids) == len(said["completion"].logprobs) > 0
    assert said["learner"].version == 1 and (Path("alone") / "model" / "config.json").is_file()


def test_a_run_is_trained_where_an_event_loop_is_running_and_goes_on_later() -> None:
    async def cell(steps: int, resume: bool) -> RunResult:
        config = load_recipe(RECIPE, steps=steps, engine=PLAIN, stages=None)
        return train(config, "run", local=True, resume=resume, quiet=True)

    result = asyncio.run(cell(1, resume=False))
    assert result.metrics.num_rows == 1
    with pytest.raises(ConfigError, match="there is a run already; use another folder, or resume=True"):
        asyncio.run(cell(1, resume=False))
    with pytest.raises(ConfigError, match="its run has another configuration"):
        asyncio.run(cell(2, resume=True))
    assert asyncio.run(cell(1, resume=True)).metrics.equals(result.metrics)


def test_options_are_those_of_the_command_line() -> None:
    said = load_recipe(
        Path(RECIPE),
        name="111",
        steps=3,
        stages=None,
        engine={"kind": "mine:Engine", "options": {"heat": 0.5, "on": True, "paths": [Path("a b")]}},
        **{"learner.optim.learning_rate": 1e-05, "tiny.words": ("left", "right")},
    )
    engine = 'engine={kind="mine:Engine", options={heat=0.5, on=true, paths=["a b"]}}'
    written = configured(
        'name="111"',
        "steps=3",
        "stages=",
        engine,
        "learner.optim.learning_rate=1e-05",
        "tiny.words=['left', 'right']",
    )
    assert said == written
    with pytest.raises(ConfigError, match=r"did you mean rollout\.group_size\?"):
        load_recipe(RECIPE, **{"rollout.group_sise": 4})
    with pytest.raises(ConfigError, match="may be a number, text, a list or a dict, not object"):
        load_recipe(RECIPE, steps=object())


def test_interrupting_a_cell_ends_the_work_beside_it() -> None:
    ended, begun = threading.Event(), threading.Event()

    def interrupt_main() -> None:
        begun.wait(60)
        import _thread

        _thread.interrupt_main()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    raised: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(interruptible(work()))
        except Stopped as stopped:
            raised.append(stopped)
            raise

    async def cell() -> None:
        with pytest.raises(KeyboardInterrupt):
            beside_a_loop(run)

    threading.Thread(target=interrupt_main, daemon=True).start()
    loop = asyncio.new_event_loop()  # a notebook's loop leaves SIGINT to Python, as asyncio.run does not
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        loop.run_until_complete(cell())
    finally:
        signal.signal(signal.SIGINT, before)
        loop.close()
    assert ended.is_set() and len(raised) == 1


def test_what_every_process_imports_stays_light() -> None:
    script = (
        "import deploy, sys; assert 'pydantic' not in sys.modules; from deploy import load_recipe, train\n"
    )
    script += "assert {'vllm', 'ray', 'transformers'}.isdisjoint(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@needs_smollm2
@pytest.mark.slow
def test_a_real_model_is_trained_and_asked_by_the_same_lines() -> None:
    config = load_recipe(
        "scratch",
        steps=1,
        tiny=None,
        engine=PLAIN,
        evaluation={"tasks": 0},
        **{
            "env.id": "arithmetic",
            "learner.model.path": FOLDER,
            "learner.optim": {"learning_rate": 1e-6},
            "rollout.group_size": 2,
            "buffer": {"groups_per_step": 2, "max_lag": 0},
            "sampling.max_tokens": 4,
        },
    )
    result = train(config, "run", local=True, quiet=True)
    (row,) = result.metrics.to_pylist()
    assert row["lag_max"] == 0 and abs(row["probe_difference"]) < 1e-3
    (engine,) = [block for block in blocks() if "TransformersSettings()" in block]
    said: dict[str, Any] = {"model": str(result.checkpoints[-1] / MODEL)}
    exec(compile(engine, "docs/python.md", "exec"), said)
    assert 1 <= len(said["completion"].token_ids) <= 8
