"""Demonstrations on disk: rows that any Arrow reader opens, whole or not at all."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from rich.console import Console

from deploy.assembly.build import load_tokenizer
from deploy.commands.demos import Demonstrations, write_demonstrations
from deploy.config.config_errors import ConfigError
from envs import registry
from learner.model.tokenizer import build_tokenizer
from rollout.buffer.segments import read_rows, scan, segment_files
from rollout.wire.schema import decode

ASKED = Demonstrations("frozen_lake", {"instructions": False}, episodes=12, first_seed=5)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_a_player_without_errors_is_written_as_it_plays(tmp_path: Path) -> None:
    outcome = write_demonstrations(ASKED, tmp_path / "demos", quiet())
    assert (outcome.success, outcome.episodes, outcome.mean_reward, outcome.failed) == (1.0, 12, 1.0, 0)
    tokenizer = load_tokenizer(str(tmp_path / "demos" / "tokenizer"))
    batches = [batch for _, path in segment_files(tmp_path / "demos") for batch in scan(path)]
    assert [decode(batch).slot.task.seed for batch in batches] == list(range(5, 17))
    for batch in batches:
        (trajectory,) = decode(batch).trajectories
        env = registry.make("frozen_lake", instructions=False)
        said: Any = env.reset(seed=trajectory.task.seed)[0]
        for step in trajectory.turns:
            assert said in tokenizer.decode(step.prompt_ids)
            assert tokenizer.decode(step.action_ids, skip_special_tokens=True) == step.action
            said, reward, *_ = env.step(step.action)
            assert reward == step.reward


def test_other_readers_count_the_same_episodes(tmp_path: Path) -> None:
    outcome = write_demonstrations(replace(ASKED, error_rate=0.7), tmp_path / "demos", quiet())
    rows = read_rows(tmp_path / "demos")
    counted = duckdb.sql("select count(distinct seed), sum(success::int), sum(reward) from rows").fetchall()
    assert counted == [(12, outcome.successes, 12 * outcome.mean_reward)]
    assert 0 < outcome.successes < 12
    with pa.OSFile(str(tmp_path / "demos" / "segment-000000.arrows")) as file:
        assert pa.ipc.open_stream(file).read_all().num_rows == rows.num_rows
    told = json.loads((tmp_path / "demos" / "demonstrations.json").read_text(encoding="utf-8"))
    assert (told["env_id"], told["error_rate"], told["outcome"]["successes"]) == (
        "frozen_lake",
        0.7,
        outcome.successes,
    )


def test_ids_are_those_of_the_tokenizer_that_is_named(tmp_path: Path) -> None:
    words = build_tokenizer(tmp_path / "model", ("left", "down", "right", "up"))
    write_demonstrations(replace(ASKED, model=str(tmp_path / "model")), tmp_path / "demos", quiet())
    rows = read_rows(tmp_path / "demos").to_pylist()
    assert all(len(row["action_ids"]) == 2 for row in rows), "a word and the end of the turn"
    assert {row["action"] for row in rows} == {words.decode(row["action_ids"][:1]) for row in rows}
    assert not (tmp_path / "demos" / "tokenizer").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"env_id": "Taxi-v4", "options": {}},
            "Taxi-v4 has no scripted player; use one of: .*frozen_lake",
        ),
        ({"options": {"sise": 4}}, "no option 'sise'"),
        ({"model": "absent/model/folder"}, "model absent/model/folder"),
    ],
)
def test_what_cannot_be_played_leaves_nothing_behind(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises((ConfigError, registry.EnvironmentUnknown), match=says):
        write_demonstrations(replace(ASKED, **change), tmp_path / "demos", quiet())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demos").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        write_demonstrations(ASKED, tmp_path / "demos", quiet())
    assert not list((tmp_path / "demos").iterdir())
