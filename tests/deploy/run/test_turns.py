"""Engines and learner in turns on one device: what is learned is the same, and only one of them holds its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy.config.config import RunConfig
from deploy.run.local import LocalRuntime
from learner.data.batch_checks import BatchRefused
from learner.training.learner import Learner
from rollout.engines.engine import Completion, Engine
from rollout.engines.hf_engine import HfEngine
from tests.deploy.small_run import (
    Stopped,
    assert_balanced,
    configured,
    hf_engine,
    same_bits,
    train,
    trained_rows,
)

TURNS = ("cluster.colocate=turns", "engine.kind=transformers")


class Scales:
    """Weighs engines and learner whenever one of them works: (who, bytes of engines, bytes of the learner)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engines: list[HfEngine] = []
        self.weighed: list[tuple[str, int, int]] = []
        self._rings: list[Any] = []
        step, start = Learner.step, LocalRuntime.start

        def weighed_step(learner: Learner, groups: Any) -> dict[str, float]:
            self._weigh("learner")
            return step(learner, groups)

        async def noted(ring: LocalRuntime, resume: bool) -> int:
            self._rings.append(ring)
            return await start(ring, resume)

        monkeypatch.setattr(Learner, "step", weighed_step)
        monkeypatch.setattr(LocalRuntime, "start", noted)

    async def engine(self, config: RunConfig, name: str, path: str) -> Engine:
        """An engine that is weighed with every request."""
        engine = await hf_engine(config, name, path)
        assert isinstance(engine, HfEngine)
        self.engines.append(engine)
        generate = engine.generate

        async def weighed(*request: Any) -> Completion:
            self._weigh("engine")
            return await generate(*request)

        engine.generate = weighed  # type: ignore[method-assign]
        return engine

    def _weigh(self, who: str) -> None:
        engines = sum(engine.weight_bytes for engine in self.engines)
        self.weighed.append((who, engines, self._rings[-1]._learner._state.device_bytes))


def test_a_run_in_turns_learns_what_one_with_separate_devices_does(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales, folder = Scales(monkeypatch), tmp_path / "run"
    config = configured(*TURNS, "evaluation.every_steps=1", "rollout.workers=2")
    train(config, folder, scales.engine)
    assert same_bits(reference, folder)
    assert_balanced(folder, config)
    playing = {(engines, learner) for who, engines, learner in scales.weighed if who == "engine"}
    learning = {(engines, learner) for who, engines, learner in scales.weighed if who == "learner"}
    ((engines, away),) = playing
    assert away == 0 and {asleep for asleep, _ in learning} == {0}
    # Both engines have the model; the learner has it, and after its first step AdamW's two moments of each number.
    one = engines // 2
    assert one and {learner for _, learner in learning} == {one, 3 * one}


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_in_turns_is_resumed_exactly(after: int, reference: Path, tmp_path: Path) -> None:
    config, folder = configured(*TURNS, "learner.optim.offload=true"), tmp_path / "run"
    with pytest.raises(Stopped):
        train(config, folder, stop_after=after)
    train(config, folder, resume=True)
    assert same_bits(reference, folder)


def test_groups_that_cannot_be_learned_from_are_replaced_in_the_engines_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, asked = Learner.step, []

    def refusing(learner: Learner, groups: Any) -> dict[str, float]:
        asked.append(learner.version)
        if asked.count(1) in (1, 2) and learner.version == 1:
            raise BatchRefused("a test")
        return step(learner, groups)

    monkeypatch.setattr(Learner, "step", refusing)
    folder, config = tmp_path / "run", configured(*TURNS)
    train(config, folder)
    assert asked == [0, 1, 1, 1, 2, 3]
    groups = {version: set[int]() for version in range(4)}
    for row in trained_rows(folder):
        groups[row["taken_version"]].add(row["group_id"])
    assert groups == {0: {0, 1}, 1: {6, 7}, 2: {8, 9}, 3: {10, 11}}
