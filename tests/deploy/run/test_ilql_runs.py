"""Values join what no recorded episode holds whole, and the ordinary engine plays the policy that they make."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.assembly.stage_data import gather
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.report.metrics import read_metrics, stage_folder
from deploy.run.preflight import check
from rollout.wire.schema import decode
from rollout.wire.trajectory import Trajectory
from tests.deploy.run.test_stages import stopped
from tests.deploy.small_run import Stopped, configured, same_bits, train

DOORS = (
    "steps=0",
    "env={id='tests.deploy.run.locks:Locks'}",
    "evaluation={tasks=2, options={start='first'}, sampling={temperature=0.0}}",  # all doors are the same
)
# With warm-up and a longer memory of moments every one of seeds 0 to 10 stitches; without, some do not converge.
STEADY = "schedule='linear', warmup_steps=50, betas=[0.9, 0.98]"
OPTIM = f"optim={{learning_rate=2e-3, {STEADY}}}"
VALUE_OPTIM = f"value_optim={{learning_rate=5e-3, {STEADY}}}"
PLAYED = f"{OPTIM}, epochs=12, episodes_per_step=4, source={{kind='player', episodes=256"
ILQL = f"kind='ilql', {VALUE_OPTIM}, gamma=0.7, expectile=0.9, cql=0.01, target_rate=0.2, {PLAYED}}}"
IMITATED = {"all": f"kind='sft', {PLAYED}}}", "successful": f"kind='sft', {PLAYED}, min_reward=1.0}}"}


def doors(stage: str, *overrides: str) -> RunConfig:
    return configured(*DOORS, f"stages=[{{{stage}}}]", *overrides)


def demonstrations(config: RunConfig, folder: Path) -> list[Trajectory]:
    """What the stage of a run learns from."""
    rows = gather(config, 0, str(folder / "base"))
    return [episode for batch in rows for episode in decode(batch).trajectories]


@pytest.mark.rare
def test_values_stitch_a_path_that_no_demonstration_has_gone(tmp_path: Path) -> None:
    config = doors(ILQL)
    check(config)
    success = {"ilql": train(config, tmp_path / "ilql")["success_after"]}
    episodes = demonstrations(config, tmp_path / "ilql")
    begun_first = {episode.reward for episode in episodes if "door 0" in episode.turns[0].observation}
    assert begun_first == {0.0} and max(episode.reward for episode in episodes) == 1.0
    success |= {name: train(doors(each), tmp_path / name)["success_after"] for name, each in IMITATED.items()}
    assert success == {"ilql": 1.0, "all": 0.0, "successful": 0.0}
    kept = demonstrations(doors(IMITATED["successful"]), tmp_path / "ilql")
    assert {episode.reward for episode in kept} == {1.0} and len(kept) == sum(e.reward for e in episodes)
    rows = read_metrics(stage_folder(tmp_path / "ilql", 0))
    assert rows[-1]["td_error"] < rows[20]["td_error"] and 0.0 < rows[-1]["effective_samples"] < 1.0


def test_a_run_killed_within_the_stage_ends_where_the_uninterrupted_one_does(
    reference: Path, tmp_path: Path
) -> None:
    source = f"source={{kind='run', path={str(reference)!r}}}"
    optim = "optim={learning_rate=5e-3, schedule='linear'}"
    config = configured(
        "steps=1", "evaluation.tasks=0", "checkpoint.stage_steps=20",
        f"stages=[{{kind='ilql', {optim}, target_rate=0.1, episodes_per_step=2, epochs=2, {source}}}]",
    )  # fmt: skip
    straight, folder = tmp_path / "straight", tmp_path / "run"
    check(config)
    train(config, straight)
    with pytest.raises(Stopped):
        train(config, folder, ring_type=stopped([], after=3))
    assert 20 < len(read_metrics(stage_folder(folder, 0))) < 32  # past the checkpoint at 20
    train(config, folder, resume=True)
    assert same_bits(straight, folder)
    rows = [read_metrics(stage_folder(each, 0)) for each in (straight, folder)]
    assert rows[0] == rows[1] and len(rows[1]) == 32


def test_demonstrations_that_all_earn_too_little_are_refused(tmp_path: Path) -> None:
    config = doors("kind='sft', source={kind='player', episodes=4, min_reward=2.0}")
    with pytest.raises(
        ConfigError, match=r"^stages\.0\.source: no demonstration has a reward of min_reward=2\.0"
    ):
        train(config, tmp_path / "run")
