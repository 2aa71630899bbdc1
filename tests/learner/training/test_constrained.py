"""A learner under a constraint: multipliers stand in its metrics and checkpoints, and a refused batch moves none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.data.batch_checks import BatchRefused
from learner.settings import LearnerSettings
from learner.training.learner import Learner
from rollout.wire.trajectory import Group

Groups = Callable[..., Group]
PID = {"kind": "pid", "kp": 0.1, "ki": 0.3, "kd": 0.7}


def learner(tiny: Path, **changes: Any) -> Learner:
    algorithm = {"constraints": [{"name": "risk", "limit": 0.3, "update": PID}], **changes}
    settings = {
        "model": {"path": str(tiny)},
        "optim": {"learning_rate": 3e-3},
        "tokens_per_microbatch": 50,
        "algorithm": algorithm,
    }
    return Learner(LearnerSettings.model_validate(settings))


def costing(group: Group, costs: list[float], reuse: int = 0) -> Group:
    episodes = [
        replace(
            t, turns=(*t.turns[:-1], replace(t.turns[-1], named_rewards=json.dumps({"costs/risk": cost})))
        )
        for t, cost in zip(group.trajectories, costs, strict=True)
    ]
    return replace(group, trajectories=tuple(episodes), reuse=reuse)


def weights(of: Learner) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in of.policy.parameters()]


def test_multipliers_follow_the_fresh_episodes_and_resume_to_the_bit(
    tiny: Path, group_of: Groups, tmp_path: Path
) -> None:
    batches = [
        [
            costing(group_of(2 * step, [1.0, 0.0, 1.0]), [0.1 * step, 0.7, 0.9]),
            costing(group_of(2 * step + 1, [1.0, 1.0]), [9.0, 0.0], reuse=1),
        ]
        for step in range(4)
    ]
    straight, stopped = learner(tiny), learner(tiny)
    rows = [straight.step(batch) for batch in batches]
    mean = (0.0 + 0.7 + 0.9) / 3
    assert rows[0]["costs/risk/mean"] == pytest.approx(mean)
    assert rows[0]["constraint/risk/multiplier"] == pytest.approx((0.1 + 0.3) * (mean - 0.3))
    assert rows[0]["constraint/risk/limit"] == 0.3
    for batch in batches[:2]:
        stopped.step(batch)
    stopped.save(tmp_path)
    resumed = learner(tiny)
    assert "multipliers" not in resumed.load(tmp_path)
    again = [resumed.step(batch) for batch in batches[2:]]
    assert again == rows[2:]
    assert all(map(torch.equal, weights(resumed), weights(straight)))


def test_costs_that_siblings_share_teach_nothing_and_dearer_ones_are_unlearned(
    tiny: Path, group_of: Groups
) -> None:
    alike = learner(tiny).step([costing(group_of(0, [1.0, 1.0]), [2.0, 2.0])])
    assert alike["zero_advantage_fraction"] == 1.0
    dear = learner(tiny)
    before = weights(dear)
    assert dear.step([costing(group_of(0, [1.0, 1.0]), [0.0, 2.0])])["zero_advantage_fraction"] == 0.0
    assert not all(map(torch.equal, before, weights(dear)))


def test_a_refused_batch_moves_no_multiplier(tiny: Path, group_of: Groups) -> None:
    taught = learner(tiny)
    good, broken = (
        costing(group_of(0, [1.0, 0.0]), [1.0, 0.5]),
        costing(group_of(1, [1.0, float("nan")]), [9.0, 9.0]),
    )
    taught.step([good])
    with pytest.raises(BatchRefused):
        taught.step([broken])
    other = learner(tiny)
    other.step([good])
    assert taught.step([good]) == other.step([good])


def test_what_cannot_be_limited_is_refused(tiny: Path, group_of: Groups) -> None:
    with pytest.raises(BatchRefused, match="no episode says a cost 'risk'"):
        learner(tiny).step([group_of(0, [1.0, 0.0])])
    group = costing(group_of(0, [1.0, 0.0]), [1.0, 0.5])
    seated = [replace(t, turns=tuple(replace(s, seat=0) for s in t.turns)) for t in group.trajectories]
    with pytest.raises(ValueError, match="limits costs of one player"):
        learner(tiny).step([replace(group, trajectories=tuple(seated))])
