"""What a driver does with environments before and beside a run: within limits, and as the run itself would."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deploy.assembly.build import distinct_tasks, identical_starts
from deploy.config.config_errors import ConfigError
from deploy.config.load import parse
from deploy.run import evaluate
from deploy.run.preflight import first_observation
from envs import registry
from envs.hosting.host import HostSettings, InProcessEnv
from envs.hosting.subprocess_env import SubprocessEnv
from rollout.engines.vllm_engine import VllmEngine
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.worker import RolloutSettings
from rollout.wire.trajectory import Task

STUCK = "tests.rollout.trouble:Starter"
HASTY = HostSettings(reset_seconds=1.0)
RUN = {
    "name": "theirs",
    "steps": 1,
    "env": {"id": STUCK, "host": {"where": "ray", "step_seconds": 7.0}},
    "rollout": {"max_turns": 3, "episode_seconds": 11.0},
    "learner": {"model": {"path": "a model"}},
}


def test_a_reset_without_end_is_named_with_its_limit() -> None:
    limit = r"did not answer within 1 s \(env.host.reset_seconds\) and was killed"
    says = rf"^environment {STUCK}: its process \d+ {limit}$"
    with pytest.raises(ConfigError, match=says):
        first_observation(STUCK, {}, host=HASTY)
    with pytest.raises(ConfigError, match=says):
        distinct_tasks(STUCK, {}, first_seed=0, count=1, host=HASTY)
    with pytest.raises(ConfigError, match=says):
        identical_starts([Task.of(STUCK, seed) for seed in (0, 1)], HASTY)


def test_foreign_environments_are_looked_at_as_ours_are() -> None:
    trouble = "tests.rollout.trouble:Trouble"
    assert first_observation(trouble, {"turns": 2}) == "begin"
    with pytest.raises(
        ConfigError, match=rf"^environment {trouble} has no option 'turn'; its options: what, [^\n]*$"
    ):
        first_observation(trouble, {"turn": 2})


def test_replicas_of_foreign_code_are_processes_unless_the_user_says_otherwise() -> None:
    async def kinds(where: str) -> list[type[Any]]:
        pool = EnvironmentPool(host=HostSettings.model_validate({"where": where}))
        tasks = [Task.of(env_id, 1) for env_id in ("frozen_lake", "Taxi-v4", "tests.rollout.trouble:Trouble")]
        replicas = [await pool.take(task) for task in tasks]
        for task, replica in zip(tasks, replicas, strict=True):
            await pool.discard(task, replica)
        return [type(replica) for replica in replicas]

    assert asyncio.run(kinds("auto")) == [InProcessEnv, InProcessEnv, SubprocessEnv]
    assert asyncio.run(kinds("inline")) == [InProcessEnv] * 3


@pytest.mark.parametrize(
    ("env_id", "trusted"),
    [
        ("frozen_lake", True),
        ("Taxi-v4", True),
        ("tests.rollout.trouble:Trouble", False),
        ("MiniGrid-Empty-5x5-v0", False),
        ("nobody knows", False),
    ],
)
def test_only_code_of_ours_and_of_gymnasium_is_trusted_to_end(env_id: str, trusted: bool) -> None:
    assert registry.is_trusted(env_id) == trusted


def test_an_evaluation_plays_under_the_limits_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(parse(RUN, "test").model_dump_json(), encoding="utf-8")
    (tmp_path / "ledger.sqlite").touch()
    conditions = evaluate.conditions_of(str(tmp_path), STUCK)
    assert conditions.host == HostSettings(where="process", step_seconds=7.0), "there is no Ray beside a run"
    assert evaluate.conditions_of(str(tmp_path), "frozen_lake").host == HostSettings()
    assert evaluate.environment_of(str(tmp_path / "checkpoints" / "version-00000001")) == STUCK
    with pytest.raises(
        ConfigError, match="is not of a run, which would say its environment; name one with --env"
    ):
        evaluate.environment_of("some/model")
    given: list[Any] = []

    class Started(Exception):
        pass

    def worker(
        name: str, engine: object, agent: object, replay_buffer: object, rollout: RolloutSettings, **more: Any
    ) -> None:
        given.append((rollout.max_turns, rollout.episode_seconds))
        raise Started

    class Pool(EnvironmentPool):
        def __init__(self, **settings: Any) -> None:
            given.append(settings["host"])

    class Engine:
        async def adopt_loaded(self, version: int) -> None: ...

    async def start(*given: Any, **more: Any) -> Engine:
        return Engine()

    class NoChat:
        stops = ()

    monkeypatch.setattr(VllmEngine, "start", start)
    monkeypatch.setattr(evaluate, "RolloutWorker", worker)
    monkeypatch.setattr(evaluate, "EnvironmentPool", Pool)
    monkeypatch.setattr(evaluate, "Chat", lambda *given: NoChat())
    monkeypatch.setattr(evaluate, "load_tokenizer", lambda *given: None)
    monkeypatch.setattr(evaluate.Perception, "load", lambda *given: None)
    with pytest.raises(Started):
        asyncio.run(evaluate._evaluate("a model", [], conditions))
    assert given == [conditions.host, (3, 11.0)]
