"""A recipe chooses its engine: vLLM, transformers, or one of the user's own; each is checked before a run starts."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import pytest

from deploy.assembly.build import start_engine
from deploy.cluster.janitor import TAG
from deploy.config.config_errors import ConfigError
from deploy.config.trust import executed, executed_by_evaluation
from deploy.run import drive
from deploy.run.evaluate import conditions_of, evaluate_checkpoint
from deploy.run.preflight import check, check_engine
from rollout.engines.vllm_start import VllmSettings
from tests.deploy.command import Manta, command
from tests.deploy.small_run import RECIPE, assert_balanced, configured, same_bits, train

DOCS = Path(__file__).parents[3] / "docs" / "python.md"
OWN = 'engine={kind="plain_engine:PlainEngine"}'
PLAIN = 'engine={kind="transformers"}'
train_with_own = partial(train, engine=start_engine)


@pytest.fixture
def manta(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Manta:
    """The command in this process, which has no janitor, beside the engine that the guide shows."""
    monkeypatch.setattr(drive, "start_janitor", lambda *arguments: None)
    monkeypatch.setattr(drive, "temporary_of", lambda run: None)
    monkeypatch.setenv(TAG, "tests")
    (source,) = re.findall(
        r"```python\n# plain_engine.py\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "plain_engine.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plain_engine", raising=False)
    return command(monkeypatch, capsys)


def test_the_guides_engine_trains_and_its_checkpoint_is_evaluated_by_it(manta: Manta, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, _, err = manta("train", RECIPE, "--local", "--run-dir", str(run), OWN)
    assert (code, err) == (0, ""), err
    assert_balanced(run, configured(OWN))
    conditions = conditions_of(str(run), "frozen_lake")
    assert conditions.engine.kind == "plain_engine:PlainEngine"
    outcome = evaluate_checkpoint(str(run), "frozen_lake", range(2), conditions)
    assert "2 " in str(outcome)


def test_transformers_needs_no_vllm_and_samples_the_same_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it raises ImportError
    with pytest.raises(
        ConfigError, match=r"^engine.kind='vllm': vLLM is not installed here; .*kind='transformers'$"
    ):
        check_engine(VllmSettings(), False)
    config = configured(PLAIN, "steps=2")
    check_engine(config.engine, False)
    train_with_own(config, tmp_path / "once")
    train_with_own(config, tmp_path / "again")
    assert_balanced(tmp_path / "once", config)
    assert same_bits(tmp_path / "once", tmp_path / "again")


@pytest.mark.parametrize(("steps", "tasks"), [(0, 0), (0, 2), (1, 0)])
def test_vllm_is_asked_for_only_where_an_engine_starts(
    steps: int, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    stages = "stages=[{kind='sft', source={kind='player', episodes=4}}]"
    config = configured(stages, f"steps={steps}", f"evaluation.tasks={tasks}", "engine={kind='vllm'}")
    if not steps + tasks:
        check(config)
        return
    with pytest.raises(ConfigError, match="vLLM is not installed here"):
        check(config)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("engine.kind=sglang", "'vllm', 'transformers', 'module:name'"),
        ("engine.kind=a:b:c", "engine.kind: "),
        (
            'engine={kind="transformers", threads=2}',
            "engine.threads does not belong to kind='transformers'; it belongs to 'vllm'",
        ),
        ('engine={kind="a:b", seeded=true}', "engine.seeded does not belong to kind='module:name'"),
        (
            "engine.options={a=1}",
            "engine.options does not belong to kind='vllm'; it belongs to 'module:name'",
        ),
    ],
)
def test_what_a_kind_does_not_have_is_refused_by_name(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configured(override)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((PLAIN, "rollout.gpus_per_worker=1"), "engine.kind='transformers': it runs on CPUs, but"),
        (('engine={kind="a:b", device="gpu"}',), "engine.kind='a:b': it needs a GPU, but"),
        (
            ('engine={kind="a:b"}', "rollout.gpus_per_worker=1", "weights.transfer=nccl"),
            "engine.kind='a:b' does not support weights.transfer='nccl'",
        ),
    ],
)
def test_an_engine_in_a_place_where_it_cannot_run_is_refused(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configured(*overrides)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ('kind="no_such_module:x"', "there is no module no_such_module"),
        ('kind="plain_engine:Other"', "module plain_engine has no function 'Other'"),
        ('kind="plain_engine:PlainEngine", options={heat=1}', "unexpected keyword argument 'heat'"),
        ('kind="collections:Counter"', "no method generate, score, sync, adopt_loaded, ping, close"),
    ],
)
def test_an_engine_that_cannot_be_started_is_one_line_before_anything_is_written(
    manta: Manta, tmp_path: Path, engine: str, says: str
) -> None:
    code, out, err = manta(
        "train", RECIPE, "--local", "--run-dir", str(tmp_path / "run"), f"engine={{{engine}}}"
    )
    assert (code, out) == (2, "")
    assert says in err and err.startswith("manta: engine: ") and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_a_stored_runs_own_engine_is_among_what_it_executes() -> None:
    config = configured('engine={kind="hostile:Engine", options={path="/tmp/x"}}')
    (entry,) = executed(config)
    assert entry.startswith("engine=") and "hostile:Engine" in entry and "/tmp/x" in entry
    assert executed_by_evaluation(config, "frozen_lake") == [entry]
    assert executed(configured(PLAIN)) == executed(configured()) == []
