"""A whole run that distils a teacher: what it may be, that it is learned, and that an interruption changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.assembly.models import TEACHER_FILE, model_of
from deploy.config.config import RunConfig
from deploy.report.metrics import read_metrics
from deploy.run.preflight import check
from tests.deploy.small_run import Stopped, configured, same_bits, train

ALONE = "learner.algorithm.advantage={kind='none'}"


def taught(teacher: str, *overrides: str) -> RunConfig:
    """A student of one layer whose only stage is short."""
    distill = f"learner.algorithm.distill={{teacher={teacher!r}}}"
    return configured("evaluation.tasks=0", "stages.0.source.episodes=16", distill, *overrides)


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher_and_a_stopped_run_ends_where_the_straight_one_does(
    reference: Path, tmp_path: Path
) -> None:
    config = taught(str(reference), ALONE, "steps=16", "rollout.group_size=1", "buffer.groups_per_step=16")
    check(config)
    straight, folder = tmp_path / "straight", tmp_path / "run"
    train(config, straight)
    rows = read_metrics(straight)
    first, last = ([row["distill/kl"] for row in rows][part] for part in (slice(4), slice(-4, None)))
    assert sum(last) < 0.6 * sum(first)
    assert all(row["zero_advantage_fraction"] == 0.0 for row in rows)
    with pytest.raises(Stopped):
        train(config, folder, stop_after=7)
    kept = json.loads((folder / TEACHER_FILE).read_text(encoding="utf-8"))
    assert kept["@"] == str(reference / "checkpoints" / "version-00000004" / "model")
    train(config, folder, resume=True)
    assert same_bits(straight, folder)


def test_a_teacher_is_a_run_one_of_its_versions_or_a_folder(reference: Path, tmp_path: Path) -> None:
    newest, earlier = (
        reference / "checkpoints" / f"version-0000000{version}" / "model" for version in (4, 2)
    )
    assert model_of(str(reference)) == str(newest)
    assert model_of(f"{reference}@2") == str(earlier)
    assert model_of(str(newest)) == str(newest) and model_of("owner/name@main") == "owner/name@main"
    for named in (f"{reference}@2", str(newest)):
        check(taught(named))
        check(taught(named, ALONE))


@pytest.mark.parametrize(
    ("named", "overrides", "said"),
    [
        ("{}@3", [], r"has no checkpoint of version 3; stored versions: 2, 4"),
        (
            "{}",
            ["tiny.words=['left', 'right']"],
            r"distill\.teacher: the tokenizer of the tiny model is not that of",
        ),
        ("{}/nowhere", [], r"nowhere: no such folder"),
        ("{}", ["rollout.context_tokens=99"], r"has 40 positions, but rollout\.context_tokens=99"),
        (
            "{}",
            ["tiny.heads=4", "learner.ranks=4", "learner.context_parallel_size=4"],
            r"has 2 attention heads, which learner\.context_parallel_size=4 does not divide",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_one_line(
    named: str, overrides: list[str], said: str, reference: Path
) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        check(taught(named.format(reference), *overrides))
    assert "\n" not in str(refused.value)
