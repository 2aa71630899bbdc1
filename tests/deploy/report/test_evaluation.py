"""What an evaluation says: success where there are verdicts, else reward; held out only where something is."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from deploy.assembly.build import held_out
from deploy.config.config_errors import ConfigError
from deploy.config.load import load_config
from deploy.report.evaluation import Evaluation, figures, stored_figures
from rollout.buffer.failures import TooManyFailures
from rollout.buffer.replay_store import EpisodeRow
from rollout.wire.trajectory import EndReason, Task, Trajectory
from tests.deploy.report.test_episodes import step
from tests.deploy.small_run import RECIPE

PROGRAM = ("env.id=program", "env.options={command=['x']}")


def row(reward: float, success: bool | None, reason: EndReason = EndReason.TERMINATED) -> EpisodeRow:
    return EpisodeRow.of(
        Trajectory(0, 0, 0, Task.of("lake", 0), (step(0, reward),), reason, success, None, "rollout-0")
    )


def test_an_environment_without_verdicts_is_measured_by_its_reward() -> None:
    evaluation = Evaluation.of([row(0.25, None), row(0.75, None)] * 20)
    assert (evaluation.success, evaluation.interval) == (None, None)
    low, high = evaluation.reward_interval or (0.0, 0.0)
    # Half of forty values lie 0.25 from the mean: its standard error is 0.25 / sqrt(40).
    assert low == pytest.approx(0.5 - 1.96 * 0.25 / 40**0.5, abs=0.015)
    assert high == pytest.approx(0.5 + 1.96 * 0.25 / 40**0.5, abs=0.015)
    assert str(evaluation) == f"reward 0.500 (95% interval {low:.3f} to {high:.3f}), 40 episodes"
    assert figures({"before": evaluation})["success_before"] is None


def test_an_episode_without_a_verdict_beside_others_has_not_succeeded() -> None:
    evaluation = Evaluation.of(
        [
            row(1, True),
            row(0, None),
            row(0, False),
            row(0, None, EndReason.TRUNCATED),
            row(0, None, EndReason.FAILED),
        ]
    )
    assert (evaluation.successes, evaluation.episodes, evaluation.failed) == (1, 4, 1)
    assert str(evaluation).startswith("success 0.250 (95% interval ")


def test_an_evaluation_without_a_sound_episode_is_one_line_and_keeps_the_traceback() -> None:
    error = "Traceback:\n  step\nKeyError: 3\n\nTraceback:\n"
    error += "envs.host.EnvironmentFailed: lake failed in step 0: KeyError(3)\n"
    lost = EpisodeRow(0, EndReason.FAILED, 0.0, None, 0, 0, -1, error)
    with pytest.raises(TooManyFailures) as refused:
        Evaluation.of([lost, lost])
    said = "all 2 evaluation episodes failed; the last: EnvironmentFailed: lake failed in step 0: KeyError(3)"
    sent = pickle.loads(pickle.dumps(refused.value))
    assert (str(sent), sent.message, sent.details) == (said, said, error)


def test_an_evaluation_is_read_as_it_was_stored(tmp_path: Path) -> None:
    (tmp_path / "evaluation_before.json").write_text(
        '{"successes": 1, "episodes": 2, "mean_reward": 0.5, "failed": 0}',
        encoding="utf-8",
    )
    Evaluation.of([row(0.5, None)], held_out=True).save(tmp_path / "evaluation_after.json")
    found = stored_figures(tmp_path)
    assert (found["success_before"], found["reward_before_interval"]) == (0.5, None)
    # The environment gives verdicts: an evaluation in which no episode came to one is one without success.
    assert (found["success_after"], found["reward_after"], found["held_out"]) == (0.0, 0.5, True)
    for broken in ('{"succ', '{"successes": 1}', "[]"):
        (tmp_path / "evaluation_before.json").write_text(broken, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"evaluation_before\.json: broken file .*; remove it"):
            stored_figures(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "held"),
    [
        ([], True),
        (["env.options.split=all"], False),
        (["evaluation.options="], False),
        ([*PROGRAM, "env.options.task={split='train'}", "evaluation.options={task={split='test'}}"], True),
        ([*PROGRAM, "evaluation.options="], False),
    ],
)  # fmt: skip
def test_tasks_are_held_out_where_training_draws_from_another_split(overrides: list[str], held: bool) -> None:
    assert held_out(*load_config(RECIPE, overrides).environments) is held
