"""Pairs from a run's groups: what is written is read back as the conversations that were played."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from deploy.assembly.stage_data import gather, past_episodes
from deploy.commands.pairs import _row, write_pairs
from deploy.config.config_errors import ConfigError
from learner.stages.settings import RunSource
from learner.training.checkpoint import latest
from rollout.wire.schema import decode
from rollout.wire.trajectory import EndReason, Group, Task, Trajectory, Turn
from tests.deploy.small_run import configured, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose agent remembers the whole conversation."""
    folder = tmp_path_factory.mktemp("talks") / "run"
    train(
        configured("agent.memory=full", "rollout.context_tokens=200", "steps=3", "evaluation.tasks=0"), folder
    )
    return folder


def played(run: Path) -> list[Group]:
    return [decode(batch) for batch in past_episodes(RunSource(path=str(run)), "source")]


def test_pairs_are_the_best_and_the_worst_of_every_group_whose_rewards_differ(
    run: Path, tmp_path: Path
) -> None:
    groups = played(run)
    rewards = [[episode.reward for episode in group.trainable] for group in groups]
    unequal = [each for each in rewards if max(each) > min(each)]
    assert 0 < len(unequal) < len(groups)
    count = write_pairs(run, tmp_path / "pairs.jsonl")
    assert (count.groups, count.pairs, count.rewritten) == (len(groups), len(unequal), 0)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [row["margin"] for row in rows] == [max(each) - min(each) for each in unequal]
    write_pairs(run, tmp_path / "pairs.parquet")
    assert pq.read_table(tmp_path / "pairs.parquet").to_pylist() == rows
    with pytest.raises(ConfigError, match="exists already"):
        write_pairs(run, tmp_path / "pairs.jsonl")
    with pytest.raises(ConfigError, match="no reward differs by more than margin=1"):
        write_pairs(run, tmp_path / "none.jsonl", margin=1.0)
    assert not [*tmp_path.glob(".partial*")]


def test_a_stage_reads_a_pair_in_the_tokens_that_were_played(run: Path, tmp_path: Path) -> None:
    write_pairs(run, tmp_path / "pairs.jsonl")
    source = f"source={{kind='dataset', path={str(tmp_path / 'pairs.jsonl')!r}}}"
    config = configured(
        f"stages=[{{kind='preference', {source}}}]",
        "steps=0",
        "evaluation.tasks=0",
        "rollout.context_tokens=200",
    )
    newest = latest(run)
    assert newest is not None
    read = [decode(batch) for batch in gather(config, 0, str(newest / "model"))]
    by_rank = [sorted(group.trainable, key=lambda episode: episode.reward) for group in played(run)]
    wanted = [(each[-1], each[0]) for each in by_rank if each[-1].reward > each[0].reward]
    assert len(read) == len(wanted)
    for group, pair in zip(read, wanted, strict=True):
        for found, episode in zip(group.trajectories, pair, strict=True):
            assert [turn.action for turn in found.turns] == [turn.action for turn in episode.turns]
            assert found.turns[0].prompt_ids.tolist() == episode.turns[0].prompt_ids.tolist()
            assert len(found.turns) == len(episode.turns)


@pytest.mark.parametrize("name", ["pairs.csv", "pairs"])
def test_an_unknown_ending_is_refused(name: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.jsonl or \.parquet"):
        write_pairs(run, tmp_path / name)


def test_rewritten_conversations_make_no_pairs(reference: Path, tmp_path: Path) -> None:
    """Its agent sees the last observation alone: longer episodes are several conversations."""
    with pytest.raises(ConfigError, match=r"of its 8 groups makes a pair: \d have rewritten conversations"):
        write_pairs(reference, tmp_path / "pairs.jsonl", margin=0.5)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no ledger\.sqlite"):
        write_pairs(tmp_path, tmp_path / "pairs.jsonl")


def test_tools_and_their_results_are_written_beside_the_answers(episode_of: Any) -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    asked = [{"role": "user", "content": "1 + 2?", "tools": [tool], "max_tokens": 9}]
    result = [{"role": "tool", "name": "add", "content": "3"}]
    better = episode_of([(asked, "<call>add</call>"), (result, "3")], 1.0)
    worse = episode_of([(asked, "4")], 0.25)
    assert _row(better, worse) == {
        "prompt": [{"role": "user", "content": "1 + 2?"}],
        "chosen": [
            {"role": "assistant", "content": "<call>add</call>"},
            {"role": "tool", "content": "3", "name": "add"},
            {"role": "assistant", "content": "3"},
        ],
        "rejected": [{"role": "assistant", "content": "4"}],
        "margin": 0.75,
        "tools": json.dumps([tool]),
    }


@pytest.fixture
def episode_of() -> Any:
    """A function ([(messages, answer), ...], reward) -> Trajectory, without tokens."""

    def build(turns: list[tuple[list[dict[str, Any]], str]], reward: float) -> Trajectory:
        none = np.zeros(0, np.int32)
        steps = tuple(
            Turn(
                place, 0, json.dumps(messages), answer, none, none, none.astype(np.float32), none,
                reward if place + 1 == len(turns) else 0.0, "stop",
            )
            for place, (messages, answer) in enumerate(turns)
        )  # fmt: skip
        return Trajectory(0, 0, 0, Task.of("toy", 0), steps, EndReason.TERMINATED)

    return build
