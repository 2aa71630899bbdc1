"""Gymnasium's environments are trained on as they are, by their id alone."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from deploy.assembly.build import identical_starts, load_tokenizer
from deploy.assembly.suites import suites_of
from deploy.config.config import RunConfig
from deploy.report.metrics import read_metrics
from deploy.run.preflight import check
from envs import registry
from rollout.engines.engine import Engine
from rollout.engines.scripted_engine import ScriptedEngine
from tests.deploy.small_run import assert_balanced, configured, train, trained_rows


async def gambler(config: RunConfig, name: str, path: str) -> Engine:
    """An engine that now and then says what is no action."""

    def move(prompt: str, rng: Random) -> str:
        return rng.choice("0101010x")

    return ScriptedEngine(load_tokenizer(path), move, name=name, record=False)


@pytest.mark.parametrize(
    "env_id", ["FrozenLake-v1", "Taxi-v4", "CliffWalking-v1", "Blackjack-v1", "CartPole-v1"]
)
def test_an_id_is_enough_to_train_and_to_be_evaluated(env_id: str, tmp_path: Path) -> None:
    tree = configured("steps=2", "rollout.context_tokens=160", "rollout.max_turns=20")
    changed = {"stages": (), "env": {"id": env_id}, "evaluation": {}}
    config = RunConfig.model_validate(tree.model_dump() | changed)
    check(config)
    train(config, tmp_path / "run", gambler)
    assert_balanced(tmp_path / "run", config)
    assert len(read_metrics(tmp_path / "run")) == 2
    assert (
        json.loads((tmp_path / "run" / "evaluation_after.json").read_text(encoding="utf-8"))["episodes"]
        == 256
    )
    episodes: dict[tuple[int, int], list[dict[str, object]]] = {}
    for row in trained_rows(tmp_path / "run"):
        episodes.setdefault((row["group_id"], row["episode"]), []).append(row)
    assert len(episodes) == 2 * 2 * 4
    for rows in episodes.values():
        env = registry.make(env_id)
        env.reset(seed=rows[0]["seed"])
        for number, row in enumerate(rows, start=1):
            _, reward, terminated, truncated, info = env.step(row["action"])
            assert row["reward"] == pytest.approx(reward)
            ended = terminated or truncated or number == 20
            kind = "malformed" if info.get("malformed") else "terminated" if terminated else "truncated"
            assert row["end_reason"] == (kind if ended else None)


@pytest.mark.parametrize(
    ("env", "alike"),
    [
        ({"id": "FrozenLake-v1"}, "FrozenLake-v1 has the same first observation for all 9 evaluation seeds"),
        ({"id": "CartPole-v1"}, ""),
        ({"id": "frozen_lake"}, ""),
        ({"id": "program", "options": {"command": ["true"]}}, ""),
    ],
)
def test_without_a_split_the_first_seeds_are_evaluated_and_what_begins_alike_is_said(
    env: dict[str, Any], alike: str
) -> None:
    asked = {"tasks": 9, "first_seed": 3}
    config = RunConfig.model_validate({"steps": 1, "tiny": {}, "env": env, "evaluation": asked})
    tasks = suites_of(config)[0].sets[0].tasks()
    assert len({task.seed for task in tasks}) == 9
    assert env["id"] == "frozen_lake" or [task.seed for task in tasks] == list(range(3, 12))
    assert identical_starts(tasks).startswith(alike) and bool(identical_starts(tasks)) == bool(alike)
    assert identical_starts(tasks[:1]) == ""
