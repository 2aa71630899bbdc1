"""What a run has played can be learned from again, by its own algorithm and by any other."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from deploy.assembly.models import tiny_tokenizer
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.report.metrics import read_metrics
from deploy.run.replay import ReplayRuntime, check
from tests.deploy.small_run import configured, same_bits, train


def replayed(past: Path, folder: Path, *overrides: str) -> RunConfig:
    config = configured(f"replay={str(past)!r}", *overrides)
    train(config, folder, ring_type=lambda config, folder, _: ReplayRuntime(config, folder))
    return config


def test_the_same_algorithm_over_a_runs_past_gives_the_same_parameters_bit_for_bit(
    reference: Path, tmp_path: Path
) -> None:
    replayed(reference, tmp_path / "again")
    assert same_bits(reference, tmp_path / "again")
    rewards = [[row["reward"] for row in read_metrics(run)] for run in (reference, tmp_path / "again")]
    assert rewards[0] == rewards[1]


def test_another_algorithm_learns_something_else_of_the_same_past(reference: Path, tmp_path: Path) -> None:
    replayed(reference, tmp_path / "other", "learner.algorithm.advantage.kind=rloo", "steps=3")
    rows = read_metrics(tmp_path / "other")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert not same_bits(reference, tmp_path / "other")


def checked(past: Path, *overrides: str) -> None:
    config = configured(f"replay={str(past)!r}", *overrides)
    with TemporaryDirectory() as folder:
        check(config, tiny_tokenizer(config, Path(folder)))


def test_a_past_that_can_not_be_learned_from_is_refused_in_one_line(reference: Path, tmp_path: Path) -> None:
    checked(reference, "steps=3", "buffer.max_lag=1", "rollout.context_tokens=50")
    with pytest.raises(ConfigError, match=r"made 4 steps; say steps=4 or fewer"):
        checked(reference, "steps=5")
    with pytest.raises(ConfigError, match=r"no ledger\.sqlite"):
        checked(tmp_path)
    with pytest.raises(ConfigError, match=r"the tiny model .* would mean something else"):
        checked(reference, "tiny.words=['left', 'right']")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampling.temperature=0.7", "sampling.temperature=1.0, not 0.7; say sampling.temperature=1.0"),
        ("rollout.group_size=8", "rollout.group_size=4, not 8; say rollout.group_size=4"),
        ("buffer.groups_per_step=4", "buffer.groups_per_step=2, not 4"),
        ("rollout.context_tokens=39", "may be as long, but rollout.context_tokens=39; say 40 or more"),
    ],
)
def test_a_past_played_under_other_conditions_is_refused_with_what_to_say(
    override: str, said: str, reference: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        checked(reference, override)


def test_a_past_with_more_lag_is_refused_before_it_begins(reference: Path, tmp_path: Path) -> None:
    late = tmp_path / "late"
    late.mkdir()
    for each in reference.iterdir():
        (late / each.name).symlink_to(each)
    (late / "config.json").unlink()
    (late / "config.json").write_text(configured("buffer.max_lag=2").model_dump_json(), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"may be as many versions old, but buffer\.max_lag=0; say 2 or more"
    ):
        checked(late)
    checked(late, "buffer.max_lag=2")
    (late / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        checked(late, "buffer.max_lag=2")
