"""What a job needs travels with it or is refused here; a user without a home folder is no reason to fail."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.commands.cluster_jobs import run_of
from deploy.commands.runtime_env import runtime_env
from deploy.commands.submit import submit
from deploy.config.config_errors import ConfigError

NOBODY = "http://127.0.0.1:1"  # no cluster: what is sent gets as far as this


def refusal(
    recipe: str,
    *overrides: str,
    working_dir: Path | None = None,
    modules: tuple[Path, ...] = (),
    environment: Path | None = None,
) -> str:
    with pytest.raises(ConfigError) as refused:
        submit(recipe, overrides, NOBODY, Path("/runs"), working_dir, modules, (), environment)
    return str(refused.value)


def written(folder: Path, text: str) -> Path:
    (folder / "env.yaml").write_text(text, encoding="utf-8")
    return folder / "env.yaml"


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


def test_flags_add_to_the_file_of_a_runtime_environment(tmp_path: Path) -> None:
    (tmp_path / "judges").mkdir()
    file = written(tmp_path, f"working_dir: {tmp_path}\nuv: [sympy]\nenv_vars: {{A: 1, B: b}}\n")
    made = runtime_env(file, None, (tmp_path / "judges",), ("A=2", "SECRET"), {"SECRET": "s=3"})
    assert made.content == {
        "working_dir": str(tmp_path),
        "uv": ["sympy"],
        "env_vars": {"A": "2", "B": "b", "SECRET": "s=3"},
        "py_modules": [str(tmp_path / "judges")],
    }
    assert made.command == ["python", "-P", "-m", "deploy.cli"]  # of the interpreter that uv installs into
    assert runtime_env(None, None, (), (), {}).command == ["manta"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a]", "write fields with their values"),
        ("working_dirs: .", "no field 'working_dirs'; did you mean working_dir?"),
        ("a: b: c", "neither YAML nor JSON"),
        ("env_vars: [A]", "env_vars must be names with values"),
        ("working_dir: /nowhere", "no such folder"),
        ("py_modules: [/nowhere]", "neither the folder of a package nor a wheel"),
    ],
)
def test_a_wrong_runtime_environment_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal("frozen_lake", environment=written(tmp_path, text))


def test_what_contradicts_the_runtime_environment_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, f"working_dir: {tmp_path}")
    assert "leave one of them away" in refusal("frozen_lake", working_dir=tmp_path, environment=file)
    assert "No such file" in refusal("frozen_lake", environment=tmp_path / "nowhere.yaml")
    for variable, said in (("2A=1", "write NAME=VALUE"), ("A", "it has no value here")):
        with pytest.raises(ConfigError, match=said):
            runtime_env(None, None, (), (variable,), {})
    recipe = tmp_path / "mine.toml"
    recipe.write_text("extends = 'scratch'\n[env]\nid = 'arithmetic'\n", encoding="utf-8")
    there = written(tmp_path, "working_dir: s3://bucket/code.zip")
    assert "which the cluster fetches itself" in refusal(str(recipe), environment=there)


def test_modules_that_the_job_installs_are_not_asked_for_here(tmp_path: Path) -> None:
    own = ("scratch", "env.id=higher:Higher")
    assert "no Ray cluster answers" in refusal(*own, environment=written(tmp_path, "uv: [higher]"))
    assert "module higher" in refusal(*own, environment=written(tmp_path, "env_vars: {A: b}"))


@pytest.mark.parametrize(
    ("command", "run"),
    [
        ("manta train x --run-dir /shared/runs/a steps=3", "/shared/runs/a"),
        ("python -P -m deploy.cli train --resume='/shared/my runs/a/' --retries 3", "/shared/my runs/a"),
        ("manta train x --output-dir /shared/runs", None),
    ],
)
def test_the_run_of_a_job_is_the_one_that_its_command_names(command: str, run: str | None) -> None:
    assert run_of(SimpleNamespace(entrypoint=command)) == run  # type: ignore[arg-type]
