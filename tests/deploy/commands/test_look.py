"""Commands that show something and change nothing."""

from __future__ import annotations

import tomllib

import pytest

from deploy.config.version import VERSION
from tests.deploy.command import Manta, command
from tests.deploy.small_run import RECIPE


@pytest.fixture
def manta(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Manta:
    return command(monkeypatch, capsys)


def test_version_recipes_and_a_resolved_recipe_are_shown(manta: Manta) -> None:
    assert manta("--version") == (0, f"manta {VERSION}\n", "")
    code, out, _ = manta("recipes")
    assert code == 0 and "frozen_lake" in out and "dr_grpo" in out and "The main job" in out
    code, out, _ = manta("config", RECIPE, "steps=7")
    assert code == 0 and "steps = 7  # no default\n" in out
    code, out, _ = manta("config", "locks", "policies.a.env.options.seat=keeper", "policies.b.share=1")
    assert code == 0 and tomllib.loads(out)["policies"]["a"]["env"]["options"]["seat"] == "keeper"
    code, out, err = manta("config", RECIPE, "rollout.sise=7")
    assert (code, out) == (2, "") and "unknown option rollout.sise" in err
