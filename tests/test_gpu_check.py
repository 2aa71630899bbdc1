"""The GPU check as it is rehearsed on a CPU: what it measures, and what it says of it."""

from __future__ import annotations

import pytest

from deploy.config.load import load_config
from deploy.run.preflight import check
from tests.bench import gpu_attention
from tests.bench.gpu_check import CHECKS, Check, Outcome, run, unmet, verdict
from tests.bench.gpu_ring import ON_CPU, ON_GPU, overrides

BOUNDED = Check("some", "a ratio", "nothing", 1, at_least={"ratio": 1.0}, at_most={"error": 0.1})


def test_packed_attention_is_a_dense_softmax_of_each_sequence() -> None:
    (attention,) = (check for check in CHECKS if check.module == "gpu_attention")
    assert not unmet(attention, Outcome("attention", figures=gpu_attention.main(tiny=True)))


def test_all_checks_together_end_within_nine_minutes() -> None:
    assert sum(check.limit_s for check in CHECKS) <= 540


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome("some", figures={"ratio": 1.0, "error": 0.1}), "ok"),
        (Outcome("some", figures={"ratio": float("nan"), "error": 0.2}), "error 0.2 > 0.1; ratio nan < 1"),
        (Outcome("some", error="Traceback\nCUDA error"), "failed: CUDA error"),
        (Outcome("some", left_out="ray not installed"), "left out: ray not installed"),
    ],
)
def test_a_check_is_told_in_a_line(outcome: Outcome, said: str) -> None:
    assert verdict(BOUNDED, outcome) == said


def test_a_check_whose_packages_lack_is_left_out() -> None:
    found = run(Check("some", "nothing", "nothing", 1, needs=("no_such_package",)), on_gpu=False)
    assert found.left_out == "no_such_package not installed"


def test_the_rings_are_accepted_as_they_are_asked_for() -> None:
    """The rehearsed ones by all checks of a run; those on a GPU by what needs none."""
    for way in ON_CPU:
        check(load_config("frozen_lake", overrides("frozen_lake", way, tiny=True)))
    for recipe in ("frozen_lake", "smollm2_sums"):
        for way in ON_GPU:
            config = load_config(recipe, overrides(recipe, way, tiny=False))
            for stage in config.stages:
                assert stage.optim.warmup_steps == 0
