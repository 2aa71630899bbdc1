from __future__ import annotations

import pytest

from deploy.report.bottleneck import Shares


def _row(wait: float, train: float, publish: float, total: float) -> dict[str, float]:
    return {"wait_s": wait, "train_s": train, "publish_s": publish, "step_s": total}


def test_shares_are_weighted_by_the_time_of_each_step() -> None:
    shares = Shares.of([_row(0, 1, 0, 1), _row(6, 2, 0.5, 9)])
    assert (shares.wait, shares.train, shares.publish) == pytest.approx((0.6, 0.3, 0.05))
    assert shares.rest == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("row", "bound", "waited"),
    [
        (_row(6, 3, 1, 10), "rollout-bound", "rollouts 60%"),
        (_row(2, 7, 1, 10), "learner-bound", "rollouts 20%"),
        (_row(1, 3, 6, 10), "sync-bound", "rollouts 10%"),
    ],
)
def test_the_largest_share_names_the_bound(row: dict[str, float], bound: str, waited: str) -> None:
    verdict = Shares.of([row]).verdict
    assert verdict.startswith(bound)
    assert waited in verdict


def test_steps_without_time_have_no_shares() -> None:
    with pytest.raises(ValueError, match="0 steps"):
        Shares.of([])
