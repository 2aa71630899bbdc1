from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy.config.config_errors import ConfigError
from deploy.report.episodes import ShownEpisode, chosen_episodes
from learner.data.advantage_log import AdvantageLog
from learner.model.tokenizer import build_tokenizer
from rollout.buffer.segments import SegmentWriter
from rollout.wire.schema import encode
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory, Turn


def step(turn: int, reward: float, segment: int = 0, observation: str = "SF\nFG") -> Turn:
    return Turn(
        turn=turn,
        segment=segment,
        observation=observation,
        action="ab",
        prompt_ids=np.array([1, 2, 3], np.int32),
        action_ids=np.array([5, 6], np.int32),
        behavior_logprobs=np.log(np.array([0.5, 0.25], np.float32)),
        versions=np.array([3, 4], np.int32),
        reward=reward,
        finish_reason="stop",
    )


def episode(
    rewards: Sequence[float],
    reason: EndReason = EndReason.TERMINATED,
    success: bool | None = None,
    seed: int = 0,
    group_id: int = 0,
    error: str | None = None,
) -> Trajectory:
    steps = tuple(step(turn, reward) for turn, reward in enumerate(rewards))
    return Trajectory(group_id, 0, 0, Task.of("lake", seed), steps, reason, success, error, "rollout-0")


def store(folder: Path, *trajectories: Trajectory) -> None:
    """Each in a group of its own, in this order."""
    writer = SegmentWriter(folder, max_bytes=1 << 20)
    for trajectory in trajectories:
        writer.append(encode(Group(Slot(trajectory.group_id, 0, trajectory.task, 0), (trajectory,))))
    writer.close()


def shown(run: Path) -> dict[str, ShownEpisode]:
    return {episode.why: episode for episode in chosen_episodes(run)}


def test_first_best_worst_failed_and_each_other_end_are_shown_once(tmp_path: Path) -> None:
    failed = [episode([0, 9], EndReason.FAILED, group_id=20 + i, error=f"Traceback {i}") for i in range(5)]
    store(
        tmp_path / "groups",
        episode([0, 0.5], group_id=0),
        episode([1, 1], group_id=1),
        episode([0, -1, 0.25], group_id=2),
        episode([2], group_id=3),  # as good as group 1, and later
        episode([0.5], EndReason.TRUNCATED, group_id=4),
        episode([0.75], EndReason.TRUNCATED, group_id=5),
        episode([8], EndReason.CANCELLED, group_id=6),
        *failed,
    )
    episodes = chosen_episodes(tmp_path)
    assert [(e.why, e.group_id, e.reward) for e in episodes] == [
        ("first of training", 0, 0.5),
        ("best of training", 3, 2.0),
        ("worst of training", 2, -0.75),
        ("ended: truncated", 5, 0.75),
        ("failed", 22, 9.0),
        ("failed", 23, 9.0),
        ("failed", 24, 9.0),
    ]
    assert episodes[-1].error == "Traceback 4"
    assert [len(e.turns) for e in episodes[:3]] == [2, 1, 3]


def test_a_task_lost_before_and_won_after_is_shown_twice(tmp_path: Path) -> None:
    store(
        tmp_path / "evaluations" / "before",
        episode([0], success=True, seed=7),
        episode([0], success=False, seed=8),
        episode([0], success=False, seed=9),
    )
    store(
        tmp_path / "evaluations" / "after",
        episode([1], success=True, seed=7),
        episode([0], success=False, seed=8),
        episode([0, 1], success=True, seed=9),
    )
    pair = shown(tmp_path)
    assert pair["held-out task, before training"].seed == 9
    assert pair["held-out task, before training"].success is False
    assert pair["the same task, after training"].seed == 9
    assert len(pair["the same task, after training"].turns) == 2


def test_a_turn_holds_what_was_said_and_sampled(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path / "base")
    ids = tokenizer("ok")["input_ids"]
    chat = '[{"role": "system", "content": "be brief"}, {"role": "user", "content": "yes?"}]'
    first = step(0, 0.0, observation=chat)
    second = Turn(
        1,
        1,
        "not JSON",
        "ok",
        first.prompt_ids,
        np.array(ids, np.int32),
        np.log(np.array([0.5, 0.25], np.float32)),
        first.versions,
        1.0,
        "length",
    )
    store(tmp_path / "groups", Trajectory(0, 0, 0, Task.of("lake", 0), (first, second), EndReason.TERMINATED))
    (only,) = chosen_episodes(tmp_path)
    assert only.turns[0].messages == (("system", "be brief"), ("user", "yes?"))
    assert only.turns[1].messages == (("user", "not JSON"),)
    assert [turn.rewritten for turn in only.turns] == [False, True]
    assert [token.text for token in only.turns[1].tokens] == ["o", "k"]
    assert [token.probability for token in only.turns[1].tokens] == pytest.approx([0.5, 0.25])
    assert [token.version for token in only.turns[1].tokens] == [3, 4]


def test_siblings_of_the_last_group_with_different_rewards_are_shown_with_their_advantages(
    tmp_path: Path,
) -> None:
    writer, log = SegmentWriter(tmp_path / "groups", max_bytes=1 << 20), AdvantageLog(tmp_path, 0)
    groups = []
    for group_id, rewards in enumerate([(3, 0), (1, 2), (1, 1)]):
        siblings = tuple(replace(episode([r], group_id=group_id), index=i) for i, r in enumerate(rewards))
        groups.append(Group(Slot(group_id, 0, siblings[0].task, 0), siblings))
        writer.append(encode(groups[-1]))
    writer.close()
    log.write(1, groups, [np.array([value, value / 2], np.float32) for value in (1, -1, -2, 2, 0, 0)])
    found = {(each.group_id, each.index): each for each in chosen_episodes(tmp_path)}
    # The first and best, the worst, and both of group 1; of group 2 there is nothing to compare.
    assert list(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [found[1, index].turns[0].advantage for index in (0, 1)] == [-1.5, 1.5]
    assert [token.advantage for token in found[0, 0].turns[0].tokens] == [1.0, 0.5]


@pytest.mark.parametrize("damaged", [b"", b"ARROW1", b"x" * 4096])
def test_a_damaged_file_of_advantages_is_named(damaged: bytes, tmp_path: Path) -> None:
    store(tmp_path / "groups", episode([1]))
    (tmp_path / "advantages").mkdir()
    (tmp_path / "advantages" / "version-00000001.arrow").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"advantages/version-00000001\.arrow: broken file"):
        chosen_episodes(tmp_path)


def test_a_long_run_shows_episodes_on_the_way(tmp_path: Path) -> None:
    store(tmp_path / "groups", *(episode([number % 3], group_id=number) for number in range(40)))
    on_the_way = {why: each.group_id for why, each in shown(tmp_path).items() if why.startswith("after")}
    assert on_the_way == {
        "after a quarter of training": 10,
        "after half of training": 20,
        "after three quarters of training": 30,
    }


def test_a_run_without_rows_shows_nothing(tmp_path: Path) -> None:
    assert chosen_episodes(tmp_path) == []
