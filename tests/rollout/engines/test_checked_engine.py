"""A user's own engine is believed nothing: an answer that is not whole costs an episode, a wrong version is refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rollout.engines.checked_engine import CheckedEngine
from rollout.engines.engine import Completion, EngineFailed, EngineStart, Sampling
from rollout.wire.weights import (
    Probe,
    SyncReport,
    TensorSpec,
    WeightManifest,
    WeightMismatch,
    WeightUpdate,
    checksum,
    inline,
)

START = EngineStart("mine", "somewhere", stop_token_ids=(9,), context_tokens=32)
WHOLE = Completion(np.int32([4, 9]), np.float32([-1.0, -0.5]), np.int32([0, 0]), "stop")
BYTES = np.arange(4, dtype=np.uint8)
PROBE = Probe((1, 2, 3), (-1.0, -2.0), tolerance=0.01)


class Mine:
    """Answers as it is told, and claims that every sync went well."""

    def __init__(
        self, answer: Any = WHOLE, says: int = 0, scores: tuple[float, ...] = PROBE.logprobs
    ) -> None:
        self.version = 0
        self._answer, self._says, self._scores = answer, says, scores

    async def generate(self, prompt_ids: Any, sampling: Any, images: Any = ()) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    async def score(self, token_ids: Any) -> Any:
        return np.float32(self._scores)

    async def sync(self, update: WeightUpdate) -> SyncReport:
        self.version = self._says
        return SyncReport("mine", update.version, 1, 0.0, 0.0, 0.0)

    async def adopt_loaded(self, version: int) -> None:
        self.version = version

    async def ping(self) -> None: ...

    async def close(self) -> None: ...


def asked(engine: Mine) -> Completion:
    return asyncio.run(CheckedEngine(engine, START).generate([1], Sampling(max_tokens=2)))


def test_a_whole_answer_passes_untouched() -> None:
    assert asked(Mine()) is WHOLE


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"text": "left"}, "dict, not a Completion"),
        (replace(WHOLE, token_ids=np.int32([])), "0 tokens; 1 to 2 were requested"),
        (replace(WHOLE, token_ids=np.int32([4, 4, 9])), "3 tokens; 1 to 2"),
        (replace(WHOLE, logprobs=np.float32([-1.0])), "2 tokens with 1 logprobs and 2 versions"),
        (replace(WHOLE, logprobs=np.float32([-1.0, np.nan])), "must be finite"),
        (replace(WHOLE, logprobs=np.float32([-1.0, 0.7])), "at most 0"),
        (replace(WHOLE, versions=np.int32([0, 1])), "versions 0 to 1; 0 to 0 were loaded"),
        (replace(WHOLE, finish_reason="done"), "finish_reason='done'"),
        (replace(WHOLE, token_ids=np.int32([4, 4])), "'stop' after token 4"),
        (KeyError("north"), r"generate raised KeyError\('north'\)"),
    ],
)
def test_an_answer_that_is_not_whole_costs_the_episode_and_says_why(answer: Any, says: str) -> None:
    with pytest.raises(EngineFailed, match=says):
        asked(Mine(answer))


def synced(engine: Mine, version: int = 3, sum_: str = "") -> SyncReport:
    spec = TensorSpec("w", "float32", (1,), sum_ or checksum(BYTES))
    update = WeightUpdate(WeightManifest(version, (spec,), PROBE), inline([BYTES]))
    return asyncio.run(CheckedEngine(engine, START).sync(update))


def test_a_sync_is_believed_only_with_checksums_version_and_probe() -> None:
    assert synced(Mine(says=3)).probe_difference == 0.0
    with pytest.raises(WeightMismatch, match="tensor w arrived with another checksum"):
        synced(Mine(says=3), sum_="0")
    with pytest.raises(WeightMismatch, match="after the sync to version 3 the engine's version is 2"):
        synced(Mine(says=2))
    with pytest.raises(WeightMismatch, match=r"differ from the learner's by 0\.5 nats"):
        synced(Mine(says=3, scores=(-1.0, -3.0)))


def test_an_object_without_the_methods_is_no_engine() -> None:
    with pytest.raises(TypeError, match="mine: dict is not an Engine: it has no method generate, score"):
        CheckedEngine({}, START)
