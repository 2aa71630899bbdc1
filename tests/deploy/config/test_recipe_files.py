"""Recipes over recipes: files and shipped ones, what is cleared, and the preset of an algorithm apart from the job."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from deploy.commands.show_config import config_text
from deploy.commands.submit import submit
from deploy.config.config_errors import ConfigError
from deploy.config.load import load_config
from deploy.config.recipe_files import (
    OF_ALGORITHM,
    algorithm_names,
    read_recipe,
    recipe_names,
    with_algorithm,
)
from deploy.config.toml_text import toml_of
from learner.algorithm.algorithm import AlgorithmSettings
from learner.stages.settings import SftSettings
from tests.deploy.small_run import RECIPE, configured

OWN = """
extends = "jobs/base.toml"
algorithm = "{algorithm}"
[learner.algorithm]
minibatches = 2
"""
BASE = """
extends = "../model.toml"
name = "base"
[env]
id = "arithmetic"
options = { level = 3 }
[rollout]
max_turns = 7
"""
MODEL = """
steps = 9
[learner.model]
path = "somewhere"
[sampling]
max_tokens = 50
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A recipe of one's own over two files, in folders apart."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "model.toml").write_text(MODEL, encoding="utf-8")
    (tmp_path / "jobs" / "base.toml").write_text(BASE, encoding="utf-8")
    (tmp_path / "own.toml").write_text(OWN.format(algorithm="dapo"), encoding="utf-8")
    return tmp_path / "own.toml"


def refusal(recipe: Path, text: str, *overrides: str) -> str:
    recipe.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_config(str(recipe), overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_recipe_extends_files_relative_to_itself_over_several_levels(own: Path) -> None:
    config = load_config(str(own))
    assert (config.steps, config.name, config.rollout.max_turns) == (9, "base", 7)
    assert (config.env.options, config.learner.model.path) == ({"level": 3}, "somewhere")
    assert config.learner.algorithm.minibatches == 2


def test_a_circle_a_file_that_is_not_there_and_what_is_no_name_are_refused(own: Path) -> None:
    (own.parent / "model.toml").write_text("extends = 'jobs/../own.toml'\n", encoding="utf-8")
    assert "own.toml extends itself: " in refusal(own, OWN.format(algorithm="grpo"))
    assert "extends itself" in refusal(own, "extends = 'own.toml'\n")
    assert "nowhere.toml: no such file" in refusal(own, "extends = 'nowhere.toml'\n")
    assert "neither a .toml file nor one of: " in refusal(own, "extends = 'frozen_lak'\n")
    assert "extends=3 must be the path of a .toml file or the name" in refusal(own, "extends = 3\n")


def test_an_entry_of_a_list_is_named_by_its_place() -> None:
    config = configured(
        "stages.0.source.error_rate=0.7", "stages.0.optim.weight_decay=0.1", "stages.0.epochs=5"
    )
    (before,), (sft,) = configured().stages, config.stages
    assert (sft.source.error_rate, sft.optim.weight_decay, sft.epochs) == (0.7, 0.1, 5)
    assert sft.source.episodes == before.source.episodes and sft.optim.betas == before.optim.betas
    assert configured("stages.0={kind='sft', epochs=7}").stages[0].epochs == 7
    for override, said in (
        ("stages.1.epochs=2", "1 is no place in a list of 1"),
        ("stages.epochs=2", "epochs is no place in a list of 1"),
        ("stages.0.episodes=2", r"did you mean stages\.0\.source\.episodes\?"),
        ("stages.0.kind=stf", r"stages\.0\.kind: there is no kind 'stf'; there are 'sft', 'preference'"),
    ):
        with pytest.raises(ConfigError, match=said):
            configured(override)


def test_an_entry_of_the_bases_list_is_changed_and_a_list_replaces_the_list(own: Path) -> None:
    own.write_text(
        "extends = 'frozen_lake'\n[stages.0]\nepochs = 7\nsource.episodes = 2048\n", encoding="utf-8"
    )
    (sft,), (base,) = load_config(str(own)).stages, load_config("frozen_lake").stages
    source = base.source.model_copy(update={"episodes": 2048})
    assert sft == base.model_copy(update={"epochs": 7, "source": source})
    own.write_text(
        "extends = 'frozen_lake'\n[[stages]]\nkind = 'sft'\n[[stages]]\nepochs = 2\n", encoding="utf-8"
    )
    assert [each.model_dump() for each in load_config(str(own)).stages] == [
        SftSettings().model_dump(), SftSettings(epochs=2).model_dump(),
    ]  # fmt: skip


def test_clear_leaves_out_what_the_base_says(own: Path) -> None:
    own.write_text(
        "extends = 'frozen_lake'\nclear = ['env.options', 'tiny', 'stages', 'learner.optim.schedule']\n"
        "env.options.size = 4\nlearner.model.path = 'somewhere'\n",
        encoding="utf-8",
    )
    config, base = load_config(str(own)), load_config("frozen_lake")
    assert (config.env.options, config.tiny, config.stages) == ({"size": 4}, None, ())
    assert (base.learner.optim.schedule, config.learner.optim.schedule) == ("linear", "constant")
    assert config.learner.optim.learning_rate == base.learner.optim.learning_rate
    assert "'warm_strat', which its base does not set" in refusal(
        own, "extends = 'frozen_lake'\nclear = ['warm_strat']"
    )
    assert "must be a list of option names" in refusal(own, "extends = 'frozen_lake'\nclear = 'tiny'")
    assert "extends is not set" in refusal(own, "clear = ['tiny']\n")


@pytest.mark.parametrize("algorithm", algorithm_names())
def test_a_preset_sets_its_algorithm_and_nothing_else(algorithm: str, own: Path) -> None:
    preset = with_algorithm({}, algorithm, "test")
    apart = {
        option: preset.get(option.split(".")[0], {}).get(option.split(".")[1]) for option in OF_ALGORITHM
    }
    rebuilt: dict[str, dict[str, object]] = {}
    for option, value in apart.items():
        section, name = option.split(".")
        if value is not None:
            rebuilt.setdefault(section, {})[name] = value
    assert preset == rebuilt

    own.write_text(OWN.format(algorithm=algorithm).replace("minibatches = 2", ""), encoding="utf-8")
    mine, plain = load_config(str(own)), load_config(str(own.parent / "jobs" / "base.toml"))
    differing = {name for name in type(mine).model_fields if getattr(mine, name) != getattr(plain, name)}
    assert differing <= {"learner", "rollout", "buffer"}
    assert (mine.buffer.reuse != plain.buffer.reuse) == (algorithm == "archer")
    assert mine.buffer == plain.buffer.model_copy(update={"reuse": mine.buffer.reuse})
    assert mine.rollout == plain.rollout.model_copy(update={"dynamic_sampling": algorithm == "dapo"})
    assert mine.learner == plain.learner.model_copy(update={"algorithm": mine.learner.algorithm})


def test_a_preset_takes_the_place_of_the_algorithm_before_it() -> None:
    dapo = load_config("dapo")
    assert dapo.rollout.dynamic_sampling and dapo.learner.algorithm.overlong
    config = load_config("dapo", ["learner.algorithm.loss.clip_high=0.3", "algorithm=ppo"])
    assert (config.rollout.dynamic_sampling, config.learner.algorithm.overlong) == (False, None)
    assert (
        load_config("archer").buffer.reuse.groups
        and not load_config("archer", ["algorithm=ppo"]).buffer.reuse.groups
    )
    assert config.learner.algorithm.critic is not None
    assert config.learner.algorithm.loss == AlgorithmSettings().loss.model_copy(update={"clip_high": 0.3})
    with pytest.raises(ConfigError, match="unknown algorithm='dappo'; choose one of: archer, cispo, dapo, "):
        load_config("frozen_lake", ["algorithm=dappo"])


def test_lengths_of_an_algorithm_follow_from_the_job(own: Path) -> None:
    most = 7 * 50  # turns by tokens a turn; the context is longer
    overlong = load_config(str(own)).learner.algorithm.overlong
    assert overlong is not None and (overlong.tokens, overlong.margin) == (most, most // 5)
    shorter = load_config(str(own), ["rollout.context_tokens=200", "algorithm=dr_grpo"])
    assert shorter.learner.algorithm.aggregation_length == 200
    said = load_config(str(own), ["learner.algorithm.overlong.tokens=100"]).learner.algorithm.overlong
    assert said is not None and (said.tokens, said.margin) == (100, 20)


def test_an_engine_of_another_type_than_the_learner_has_its_samples_weighed(
    own: Path, tmp_path: Path
) -> None:
    def algorithm(*overrides: str) -> AlgorithmSettings:
        config = load_config(str(own), ["algorithm=grpo", *overrides])
        printed = tmp_path / "printed.toml"
        printed.write_text(config_text(config), encoding="utf-8")
        assert load_config(str(printed)) == config
        return config.learner.algorithm

    differ = "engine.dtype=bfloat16", "learner.model.dtype=float32"
    weighed = algorithm(*differ)
    assert weighed.proximal == "learner"
    assert [part.kind for part in weighed.corrections] == ["tis"]
    for same in ("float32", "bfloat16"):
        equal = algorithm(f"engine.dtype={same}", f"learner.model.dtype={same}")
        assert (equal.proximal, equal.corrections) == ("behavior", ())
    for said in ("proximal=behavior", "corrections=[]"):  # a recipe that decides is not corrected
        decided = algorithm(*differ, f"learner.algorithm.{said}")
        assert (decided.proximal, decided.corrections) == ("behavior", ())


def test_every_algorithm_has_a_recipe_of_the_main_job() -> None:
    for algorithm in algorithm_names():
        tree = tomllib.loads((files("deploy.recipes") / f"{algorithm}.toml").read_text(encoding="utf-8"))
        assert (tree["extends"], tree["algorithm"], tree["name"]) == ("frozen_lake", algorithm, algorithm)


@pytest.mark.parametrize("recipe", [*recipe_names(), RECIPE])
def test_what_is_printed_of_a_recipe_is_that_recipe(recipe: str, tmp_path: Path) -> None:
    config = load_config(recipe)
    printed = tmp_path / "printed.toml"
    printed.write_text(config_text(config), encoding="utf-8")
    assert load_config(str(printed)) == config
    assert tomllib.loads(toml_of(read_recipe(recipe))) == read_recipe(recipe)


def test_what_is_printed_describes_options_and_names_defaults() -> None:
    lines = config_text(load_config("dapo", ["seed=3", 'env.options.note="a\\u007f\\u0001é"'])).splitlines()
    at = lines.index("dynamic_sampling = true  # default: false")
    assert lines[at - 2].startswith("# dynamic sampling (DAPO): drop a group")
    assert "seed = 3  # default: 0" in lines
    assert "steps = 80  # no default" in lines and "max_turns = 100" in lines
    assert "# replay is not set" in lines
    (options,) = (line for line in lines if line.startswith("options = ") and "note" in line)
    assert tomllib.loads(options.partition("  # ")[0])["options"]["note"] == "a\x7f\x01é"


def test_every_file_of_a_recipe_has_to_travel_with_it(own: Path) -> None:
    (own.parent / "sent").mkdir()
    mine = own.parent / "sent" / "mine.toml"
    mine.write_text("extends = '../own.toml'\n", encoding="utf-8")
    for folder, said in ((mine.parent, "own.toml is not sent"), (own.parent, "no Ray cluster answers")):
        with pytest.raises(ConfigError, match=said):
            submit(str(mine), (), "http://127.0.0.1:1", Path("/runs"), folder)
