"""Gymnasium's environments are trained on as they are, by their id alone."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from deploy.build import load_tokenizer
from deploy.config import RunConfig
from deploy.metrics import read_metrics
from envs import registry
from rollout.engine import Engine
from rollout.scripted_engine import ScriptedEngine
from tests.deploy.small_run import assert_balanced, configured, train, trained_rows


async def gambler(config: RunConfig, name: str, path: str) -> Engine:
    """An engine that now and then says what is no action."""

    def move(prompt: str, rng: Random) -> str:
        return rng.choice("0101010x")

    return ScriptedEngine(load_tokenizer(path), move, name=name, record=False)


@pytest.mark.parametrize(
    "env_id", ["FrozenLake-v1", "Taxi-v4", "CliffWalking-v1", "Blackjack-v1", "CartPole-v1"]
)
def test_an_id_is_enough_to_train(env_id: str, tmp_path: Path) -> None:
    tree = configured("steps=2", "evaluation.tasks=0", "rollout.context_tokens=160", "rollout.max_turns=20")
    changed = {"warm_start": None, "env": {"id": env_id}}
    config = RunConfig.model_validate(tree.model_dump() | changed)
    train(config, tmp_path / "run", gambler)
    assert_balanced(tmp_path / "run", config)
    assert len(read_metrics(tmp_path / "run")) == 2
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
