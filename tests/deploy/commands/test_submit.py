"""What a job needs travels with it or is refused here; a user without a home folder is no reason to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.commands.submit import submit
from deploy.config.config_errors import ConfigError

NOBODY = "http://127.0.0.1:1"  # no cluster: what is sent gets as far as this


def refusal(
    recipe: str, *overrides: str, working_dir: Path | None = None, modules: tuple[Path, ...] = ()
) -> str:
    with pytest.raises(ConfigError) as refused:
        submit(recipe, overrides, NOBODY, Path("/runs"), working_dir, modules)
    return str(refused.value)


def test_a_module_that_would_not_travel_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "higher.py").write_text("", encoding="utf-8")
    (tmp_path / "judges").mkdir()
    own = ("scratch", "env.id=higher:Higher")
    said = refusal(*own)
    assert "module higher" in said and "--working-dir" in said and "--py-modules" in said
    assert "module higher" in refusal(*own, working_dir=tmp_path / "judges")
    assert "no Ray cluster answers" in refusal(*own, working_dir=tmp_path)
    tool = "agent.parts=[{kind='tools',functions=['judges.web:search']}]"
    assert "module judges" in refusal("scratch", "env.id=arithmetic", tool)
    sent = refusal("scratch", "env.id=arithmetic", tool, modules=(tmp_path / "judges",))
    assert "no Ray cluster answers" in sent
    assert "no such folder" in refusal(*own, working_dir=tmp_path / "nowhere")


def test_a_recipe_beside_the_folder_that_is_sent_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("extends = 'scratch'\n[env]\nid = 'arithmetic'\n", encoding="utf-8")
    (tmp_path / "sent").mkdir()
    assert "mine.toml is not sent" in refusal(str(recipe), working_dir=tmp_path / "sent")
    assert "no Ray cluster answers" in refusal(str(recipe), working_dir=tmp_path)


def test_a_user_without_a_home_submits(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(path: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nowhere)  # Path.home() asks it too
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert "no Ray cluster answers" in refusal("frozen_lake")
