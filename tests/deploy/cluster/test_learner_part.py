"""Calls of the learner: a lost rank is a `LearnerLost` in one line; errors of the user stay what they are."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from deploy.assembly.runtime import LearnerLost
from deploy.cluster.learner_part import LearnerPart
from learner.data.batch_checks import BatchRefused
from learner.parallel.ranks import RankLost
from tests.deploy.small_run import configured


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (RayActorError(), r"^the learner is lost \(it never started\): RayActorError"),
        (RankLost("rank 1 is gone"), r"^the learner is lost \(it never started\): RankLost: rank 1 is gone$"),
    ],
)
def test_a_rank_that_is_lost_in_a_stage_is_told_in_one_line(raised: Exception, told: str) -> None:
    with pytest.raises(LearnerLost, match=told) as lost:
        asyncio.run(_advance(raised))
    assert "\n" not in str(lost.value)


def test_an_error_of_the_stage_itself_is_passed_on() -> None:
    with pytest.raises(BatchRefused, match="no pairs"):
        asyncio.run(_advance(BatchRefused("no pairs")))


async def _advance(raised: Exception) -> None:
    async def advance_stage(steps: int) -> list[dict[str, float]]:
        raise raised

    part = LearnerPart(configured(), lambda ranks: None, None, None)  # type: ignore[arg-type, return-value]
    part._handles = [SimpleNamespace(advance_stage=SimpleNamespace(remote=advance_stage))]
    await part.advance_stage(1)
