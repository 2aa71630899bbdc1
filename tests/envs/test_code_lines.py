"""Errors of user code are one line, with the cause and the line of user code; the traceback is in a file."""

from __future__ import annotations

import importlib
import re
from functools import partial
from pathlib import Path
from random import Random

import pytest
from ray.exceptions import RayTaskError

from deploy.assembly.build import load_tokenizer, probe_environment
from deploy.cluster.janitor import TAG
from deploy.config.config import RunConfig
from deploy.config.load import load_config
from deploy.run import drive, local
from deploy.run.failure_log import failures_kept_in
from envs import registry
from envs.base import as_number
from envs.builtin.frozen_lake import FrozenLake
from learner.model.loading import ModelError
from rollout.buffer.failures import TooManyFailures
from rollout.engines.engine import Engine
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.wire.own_part import OwnPartError
from tests.deploy.command import Manta, command
from tests.deploy.small_run import train

ENVIRONMENT = """\
from envs.base import TextEnv
{top}

class Broken(TextEnv):
    def __init__(self):
        {init}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        {reset}
        return "left or right", {{}}

    def step(self, action):
        return self._turn(action), 0.0, True, False, {{}}

    def _turn(self, action):
        {step}
"""
RECIPE = """\
name = "broken"
steps = 2
env = {{ id = "{env_id}", host = {{ where = "{where}" }} }}
evaluation = {{ tasks = {tasks} }}
tiny = {{ layers = 1, width = 32, heads = 2, mlp = 64, words = ["left", "right", "or"] }}
sampling = {{ max_tokens = 2 }}
rollout = {{ group_size = 2, concurrent_groups = 4, context_tokens = 40 }}
engine = {{ dtype = "float32" }}
buffer = {{ groups_per_step = 2, max_lag = 0 }}
learner = {{ threads = 1 }}
"""


async def up_and_down(config: RunConfig, name: str, path: str) -> Engine:
    return ScriptedEngine(load_tokenizer(path), lambda prompt, rng: rng.choice("ud"), name=name, record=False)


async def left(config: RunConfig, name: str, path: str) -> Engine:
    def move(prompt: str, rng: Random) -> str:
        return "left"

    return ScriptedEngine(load_tokenizer(path), move, name=name, record=False)


@pytest.fixture
def manta(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Manta:
    """The command in this process, which has no janitor; `--local` samples from a script."""
    monkeypatch.setattr(drive, "start_janitor", lambda *arguments: None)
    monkeypatch.setattr(drive, "temporary_of", lambda run: None)
    monkeypatch.setattr(local, "LocalRuntime", partial(local.LocalRuntime, engine_factory=left))
    monkeypatch.setenv(TAG, "tests")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return command(monkeypatch, capsys)


def written(folder: Path, module: str, *, tasks: int = 4, where: str = "auto", **lines: str) -> str:
    """The path of a recipe for an environment of which some lines are replaced."""
    sound = {"top": "", "init": "pass", "reset": "pass", "step": "return action"}
    (folder / f"{module}.py").write_text(ENVIRONMENT.format(**(sound | lines)), encoding="utf-8")
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(env_id=f"{module}:Broken", tasks=tasks, where=where), encoding="utf-8")
    return str(recipe)


@pytest.mark.parametrize(
    ("tasks", "where", "begins"),
    [
        (4, "process", "manta: all 4 evaluation episodes failed; the last: "),
        (4, "inline", "manta: all 4 evaluation episodes failed; the last: "),
        (0, "inline", r"manta: \d+ of the last \d+ episodes failed by infrastructure, more than 20% of 200 "),
    ],
)
def test_an_environment_that_always_raises_is_one_line_that_names_its_line_and_the_log(
    manta: Manta, tmp_path: Path, tasks: int, where: str, begins: str
) -> None:
    module = f"always_{where}_{tasks}"
    recipe = written(tmp_path, module, tasks=tasks, where=where, step="raise KeyError('north')")
    code, _, err = manta("train", recipe, "--local", "--run-dir", str(tmp_path / "run"))
    assert code == 1
    assert re.match(begins, err) and err.count("\n") == 1, err
    assert f"KeyError('north') ({module}.py:14 in step, {module}.py:17 in _turn)" in err
    log = tmp_path / "run" / "failure.log"
    assert err.endswith(f"; its traceback: {log}\n")
    assert "line 17, in _turn\n    raise KeyError('north')" in log.read_text(encoding="utf-8")


PLAYER = """
class Player:
    def __init__(self, error_rate, seed):
        pass

    def act(self, observation):
        raise KeyError('west')
"""


def test_a_player_that_raises_is_one_line_that_names_its_line(manta: Manta, tmp_path: Path) -> None:
    written(tmp_path, "played", top=PLAYER)
    code, _, err = manta("demos", "played:Broken", "-n", "2", "--out", str(tmp_path / "out"))
    assert code == 1
    assert err.startswith("manta: all 2 ") and err.count("\n") == 1, err
    assert "the player failed: KeyError('west') (played.py:8 in act)" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_on_a_cluster_it_is_the_same_line_through_every_process(tmp_path: Path) -> None:
    import ray

    from deploy.cluster.cluster import RayRuntime

    recipe = written(tmp_path, "unused", tasks=0)
    changes = ["env.id=tests.envs.bad:Raises", "rollout.context_tokens=200", "sampling.max_tokens=1"]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with pytest.raises(TooManyFailures) as ended, failures_kept_in(tmp_path / "run"):
            train(load_config(recipe, changes), tmp_path / "run", up_and_down, ring_type=RayRuntime)
    finally:
        ray.shutdown()
    said = str(ended.value)
    assert "KeyError('the second turn') (tests/envs/bad.py:153 in step); its traceback: " in said
    assert "\n" not in said
    assert "line 153, in step" in (tmp_path / "run" / "failure.log").read_text(encoding="utf-8")


LATE = r"tests\.own_parts:late failed: KeyError\('second'\) \(own_parts.py:\d+ in late, own_parts.py:\d+ in _missing\)"


def _late(run: Path) -> list[str]:
    """Overrides with a loss that raises in the second step."""
    loss = f"learner.algorithm.loss={{kind='tests.own_parts:late', run='{run}'}}"
    return [loss, "learner.algorithm.skip_zero_advantage=false"]


def test_an_own_loss_that_raises_in_a_step_is_one_line_that_names_its_lines_and_the_log(
    manta: Manta, tmp_path: Path
) -> None:
    recipe, run = written(tmp_path, "sound", tasks=0), tmp_path / "run"
    code, _, err = manta("train", recipe, "--local", "--run-dir", str(run), *_late(run))
    assert code == 1
    assert re.fullmatch(rf"manta: {LATE}; its traceback: {re.escape(str(run / 'failure.log'))}\n", err), err
    assert "raise KeyError(name)" in (run / "failure.log").read_text(encoding="utf-8")


@pytest.mark.rare
@pytest.mark.slow
def test_on_a_cluster_an_own_loss_that_raises_restarts_no_rank_of_the_learner(tmp_path: Path) -> None:
    import ray

    from deploy.cluster.cluster import RayRuntime

    run, told = tmp_path / "run", list[str]()
    half = [
        "cluster.learner_cpus=0.5",
        "rollout.cpus_per_worker=0.5",
        "rollout.context_tokens=200",
        "sampling.max_tokens=1",
        "env.id=tests.envs.bad:Sound",
    ]
    config = load_config(written(tmp_path, "unused", tasks=0), [*_late(run), *half, "learner.ranks=2"])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with pytest.raises(OwnPartError, match=f"^{LATE}; its traceback: [^\n]*$"), failures_kept_in(run):
            train(config, run, up_and_down, ring_type=partial(RayRuntime, say=told.append))
    finally:
        ray.shutdown()
    assert not [text for text in told if "starts again" in text]


def test_a_registered_environment_that_raises_is_one_line_and_a_fault_of_mantas_own_keeps_its_traceback(
    manta: Manta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = written(tmp_path, "by_id", reset="raise OSError('no maze')")
    monkeypatch.setitem(registry._OURS, "mine", lambda: importlib.import_module("by_id").Broken())
    code, _, err = manta("train", recipe, "env.id=mine", "--local", "--output-dir", str(tmp_path / "runs"))
    assert (code, err) == (2, "manta: environment mine: OSError('no maze') (by_id.py:10 in reset)\n")
    monkeypatch.setattr(FrozenLake, "reset", partial(as_number, None, "the reward"))
    with (
        pytest.raises(TypeError, match="unexpected keyword"),
        probe_environment("frozen_lake", {}, None) as reset,
    ):
        reset(0)


@pytest.mark.parametrize(
    ("module", "lines", "says"),
    [
        ("in_reset", {"reset": "raise OSError('no maze')"}, "OSError('no maze') (in_reset.py:10 in reset)"),
        ("in_init", {"init": "self.there"}, "(in_init.py:6 in __init__)"),
        ("by_value", {"init": "int('two')"}, "base 10: 'two' (by_value.py:6 in __init__)"),
        ("by_type", {"init": "len(2)"}, "no len() (by_type.py:6 in __init__)"),
        ("leaves", {"reset": "raise SystemExit(3)"}, "SystemExit(3) (leaves.py:10 in reset)"),
        ("misspelt", {"top": "def x(:"}, "SyntaxError('invalid syntax') (misspelt.py:2)"),
        ("unnamed", {"top": "maze"}, "name 'maze' is not defined\") (unnamed.py:2 in <module>)"),
        ("lacks", {"top": "import no_maze"}, "No module named 'no_maze'\") (lacks.py:2 in <module>)"),
        ("exits", {"top": "raise SystemExit(3)"}, "SystemExit(3) (exits.py:2 in <module>)"),
    ],
)
def test_what_fails_before_a_run_is_one_line_that_names_its_own_line(
    manta: Manta, tmp_path: Path, module: str, lines: dict[str, str], says: str
) -> None:
    recipe = written(tmp_path, module, **lines)
    code, out, err = manta("train", recipe, "--local", "--output-dir", str(tmp_path / "runs"))
    assert (code, out) == (2, "")
    assert err.startswith(f"manta: environment {module}:Broken: ") and err.count("\n") == 1, err
    assert says in err
    assert not (tmp_path / "runs").exists()


def test_what_an_actor_refuses_is_told_in_its_own_words(
    manta: Manta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        cause = ModelError("a row of 4064 tokens does not fit")
        raise RayTaskError(
            "start", "Traceback (most recent call last):\n  line 1", cause
        ).as_instanceof_cause()

    monkeypatch.setattr("deploy.run.preflight.check", refuse)
    recipe = written(tmp_path, "unused")
    ended = manta("train", recipe, "env.id=frozen_lake", "--local", "--output-dir", str(tmp_path / "runs"))
    assert ended == (2, "", "manta: a row of 4064 tokens does not fit\n")
