"""Code of a model's repository: refused in one line that names the option, executed where a recipe says so."""

from __future__ import annotations

import asyncio
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from deploy.assembly.build import load_chat, sent_adapter, start_engine
from deploy.config import run_folder
from deploy.config.config_errors import ConfigError
from deploy.config.trust import executed, executed_by_evaluation
from deploy.run.evaluate import Conditions, evaluate_checkpoint
from deploy.run.preflight import check
from learner.model.loading import ModelError
from learner.model.policy import Policy
from learner.settings import LearnerSettings, ModelSettings
from learner.training.learner import Learner
from learner.training.publish import take_snapshot
from rollout.engines import vllm_engine, vllm_start
from rollout.engines.engine import EngineStart
from rollout.engines.settings import TransformersSettings
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.trajectory import Group
from rollout.wire.weights import WeightUpdate, inline
from tests.deploy.command import command
from tests.deploy.small_run import configured

CODE = """
from pathlib import Path

from transformers import Qwen3Config, Qwen3ForCausalLM

Path({ran!r}).touch()

class OwnConfig(Qwen3Config):
    model_type = "of_its_own"

class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
"""
REFUSED = r"needs custom code of its own repository, .* set learner.model.trust_remote_code=true"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model as one of a family that transformers does not have; its code notes that it was executed."""
    folder = shutil.copytree(tiny, tmp_path / "own")
    (folder / "modeling_own.py").write_text(CODE.format(ran=str(tmp_path / "ran")), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "of_its_own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def recipe(model: Path, *overrides: str) -> Any:
    return configured("tiny=", f"learner.model.path={model}", "rollout.context_tokens=64", *overrides)


def test_it_is_refused_in_one_line_that_names_the_option(model: Path, tmp_path: Path) -> None:
    conditions = Conditions(context_tokens=64, engine=TransformersSettings())
    tries: list[tuple[type[Exception], Callable[[], Any]]] = [
        (ConfigError, lambda: check(recipe(model))),
        (ConfigError, lambda: evaluate_checkpoint(str(model), "frozen_lake", range(1), conditions)),
        (ConfigError, lambda: load_chat(str(model))),
        (ModelError, lambda: Policy(ModelSettings(path=str(model)))),
    ]
    for kind, attempt in tries:
        with pytest.raises(kind, match=REFUSED) as refused:
            attempt()
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_a_recipe_that_trusts_it_trains_it(
    model: Path, tmp_path: Path, tiny: Path, group_of: Callable[..., Group]
) -> None:
    config = recipe(model, "learner.model.trust_remote_code=true", 'engine={kind="transformers"}')
    check(config)
    assert (tmp_path / "ran").exists()
    own = config.learner.model
    learner = Learner(LearnerSettings(model=own))
    ids = list(range(3, 40))
    np.testing.assert_array_equal(
        learner.policy.score_ids(ids), Policy(ModelSettings(path=str(tiny), dtype=own.dtype)).score_ids(ids)
    )
    learner.step([group_of(0, [1.0, 0.0])])
    engine = asyncio.run(start_engine(config, "rollout-0", str(model)))
    snapshot = take_snapshot(learner.policy, 1, "float32")
    asyncio.run(engine.sync(WeightUpdate(snapshot.manifest, inline(snapshot.arrays))))
    saved = learner.save(tmp_path) / "model"
    own = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    assert type(own).__name__ == "OwnForCausalLM"
    restored = Policy.restored(config.learner.model, saved)
    np.testing.assert_array_equal(restored.score_ids(ids), learner.policy.score_ids(ids))
    adapted = recipe(model, "learner.model.trust_remote_code=true", "learner.model.lora.sync=adapter")
    assert sent_adapter(adapted, str(model)) is not None


@pytest.mark.parametrize("recipe_trusts", [True, False])
def test_an_evaluation_executes_the_code_of_another_model_only_at_the_users_word(
    recipe_trusts: bool,
    model: Path,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manta = command(monkeypatch, capsys)
    theirs = tmp_path / "run's own"
    overrides = (
        f"learner.model.trust_remote_code={str(recipe_trusts).lower()}",
        'engine={kind="transformers"}',
    )
    run_folder.create(recipe(theirs, *overrides), run := tmp_path / "run")  # started here, so it is trusted
    (run / "ledger.sqlite").touch()
    asked = ("eval", str(model), "--like", str(run), "--seeds", "0:1")
    code, _, err = manta(*asked, "--out", str(tmp_path / "refused"))
    assert code == 2 and err.count("\n") == 1 and "--trust" in err
    asked_of_two = ("eval", str(tiny), "--like", str(run), "--seeds", "0:1", "--compare", str(model))
    code, _, err = manta(*asked_of_two, "--out", str(tmp_path / "half"))
    assert code == 2 and "--trust" in err
    assert not (tmp_path / "ran").exists()
    code, said, err = manta(*asked, "--trust", "--out", str(tmp_path / "played"))
    assert (code, err) == (0, "") and "1 episodes" in said
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    assert manta(*asked, "--out", str(tmp_path / "again"))[0] == 2, "this word is not remembered"
    model.rename(theirs)
    own = ("eval", str(theirs), "--like", str(run), "--seeds", "0:1", "--out", str(tmp_path / "own"))
    assert manta(*own)[0] == (0 if recipe_trusts else 2), "the recipe's word is about the model that it names"


def test_vllm_is_told_whether_to_trust_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    class Started(Exception):
        pass

    def start(*given: Any, **named: Any) -> Any:
        raise Started

    place = [*inspect.signature(vllm_engine.start_llm).parameters].index("trusted")
    monkeypatch.setattr(vllm_engine, "start_llm", lambda *given: told.append(given[place]) or start())
    for trusted in (True, False):
        begin = EngineStart("rollout-0", str(model), (0,), 64, trust_remote_code=trusted)
        monkeypatch.setattr(vllm_engine, "checkpoint_names", lambda model, trusted: [])
        with pytest.raises(Started):
            asyncio.run(VllmSettings().start(begin))
    assert told == [True, False]
    arguments: list[Any] = []
    monkeypatch.setattr(vllm_start, "_logits_processors", lambda *given: [])
    from vllm.v1.engine.async_llm import AsyncLLM

    monkeypatch.setattr(AsyncLLM, "from_engine_args", lambda given: arguments.append(given) or start())
    for trusted in (True, False):
        with pytest.raises(Started):
            vllm_start.start_llm(str(model), 64, VllmSettings(), True, trusted=trusted)
    assert [each.trust_remote_code for each in arguments] == [True, False]


def test_a_stored_run_that_trusts_it_asks_for_trust() -> None:
    config = configured("tiny=", "learner.model.path=somebody/own", "learner.model.trust_remote_code=true")
    entry = 'learner.model.trust_remote_code="somebody/own"'
    assert entry in executed(config)
    assert entry in executed_by_evaluation(config, "frozen_lake")
    plain = configured("tiny=", "learner.model.path=somebody/own")
    assert executed(plain) == executed_by_evaluation(plain, "frozen_lake") == []
