"""What the README says to type works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy.config.load import load_config
from deploy.report.metrics import read_metrics
from envs import registry
from envs.checks.check import check
from tests.deploy.small_run import assert_balanced, train

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The README's environment, as a module of its own in a folder that is being looked in."""
    (source,) = re.findall(
        r"```python\n(from envs.base import TextEnv\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(source.strip().splitlines()) <= 20
    (tmp_path / "higher.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "higher"


def test_the_readmes_environment_is_sound(module: str) -> None:
    assert check(f"{module}:Higher") == []


@pytest.mark.slow
def test_the_readmes_environment_trains(module: str, tmp_path: Path) -> None:
    config = load_config(
        "scratch", [f"env.id={module}:Higher", "steps=40", "evaluation.tasks=0", "buffer.max_lag=0"]
    )
    train(config, tmp_path / "run")
    rewards = [row["reward"] for row in read_metrics(tmp_path / "run")]
    assert sum(rewards[:5]) / 5 < 0.1
    assert sum(rewards[-5:]) / 5 > 0.6
    assert_balanced(tmp_path / "run", config)


def test_the_readmes_recipe_is_valid(module: str, tmp_path: Path) -> None:
    (recipe,) = re.findall(r"```toml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "higher.toml").write_text(recipe, encoding="utf-8")
    config = load_config(str(tmp_path / "higher.toml"))
    assert config.env.id == f"{module}:Higher"
    assert registry.make(config.env.id, **config.env.options).reset(seed=0)[0].startswith("Which is higher, ")


def test_a_class_that_is_not_there_is_said_in_one_line(module: str) -> None:
    for env_id, says in ((f"{module}:Lower", "Lower"), ("lower:Lower", "no module lower")):
        with pytest.raises(registry.EnvironmentUnknown, match=says) as refused:
            registry.make(env_id)
        assert "\n" not in str(refused.value)
