"""What a worker notices and its user should know is said on the console, once a run, and kept in the run's folder."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.cluster.actor_member import ActorMember
from deploy.cluster.learner_part import LearnerPart
from deploy.config.load import parse
from deploy.config.supervise import PartLost, SupervisionSettings
from deploy.report.noticed import FILE, Noticed
from deploy.run.evaluate import Conditions, evaluate_checkpoint
from deploy.run.local import LocalRuntime
from rollout.engines.engine import Sampling
from rollout.engines.hf_engine import HfEngine
from rollout.engines.vllm_engine import VllmEngine
from rollout.wire.notices import MOST
from tests.deploy.small_run import configured, late_engine, train
from tests.smollm2 import FOLDER, needs_smollm2

UNHEARD = "a foreign agent's option is ignored: temperature, top_p; the run's sampling settings apply"


def unheard(base_url: str, api_key: str, task: dict[str, Any]) -> dict[str, Any]:
    """An agent that asks for a sampling of its own; it fails in some episodes."""
    asked = {"messages": [{"role": "user", "content": "left"}], "temperature": 0.1, "top_p": 0.5}
    head = {"Authorization": f"Bearer {api_key}"}
    request = urllib.request.Request(f"{base_url}/chat/completions", json.dumps(asked).encode(), head)
    said = json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"]
    if task["seed"] % 1000 == 1:
        raise ValueError(f"no room for \x1b[2J seed {task['seed']}")
    return {"reward": float(said.startswith("left"))}


def test_what_the_workers_of_a_local_run_notice_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    tree = configured("rollout.workers=2", "steps=2").model_dump(mode="json") | {"stages": ()}
    tree["env"] |= {"id": "program", "options": {"function": f"{__name__}:unheard"}}
    tree["evaluation"] |= {"options": {}, "first_seed": 1000, "tasks": 3}
    tree["agent"]["memory"] = "full"
    train(parse(tree, ""), tmp_path / "run", late_engine(0), ring_type=partial(LocalRuntime, say=said.append))
    ignored = [line for line in said if "option is ignored" in line]
    assert ignored == [f"note: {UNHEARD}"], said
    failed = [line for line in said if "an episode failed" in line]
    assert len(failed) == 1 and r"no room for \x1b[2J seed 1001" in failed[0], said
    assert (tmp_path / "run" / FILE).read_text(encoding="utf-8").splitlines() == said


def test_what_several_workers_notice_is_said_once_with_one_of_them(tmp_path: Path) -> None:
    said: list[str] = []
    noticed = Noticed(tmp_path, said.append)
    noticed.hear("rollout-0", ["the loop has stood for 3 s in step (maze.py:33)", "\x1b[2J\nnew line"])
    noticed.hear("rollout-1", ["the loop has stood for 7 s in step (maze.py:33)"])
    noticed.hear("rollout-1", [f"{'x' * number}" for number in range(2 * MOST)])
    assert said[0] == "note: the loop has stood for 3 s in step (maze.py:33) (rollout-0)"
    assert said[1] == r"note: \x1b[2J new line (rollout-0)"
    assert len(said) == MOST
    assert (tmp_path / FILE).read_text(encoding="utf-8").splitlines() == said


class Handle:
    """The handle of an actor that notices something between two heartbeats, and again at its end."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.asked: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=partial(self._answer, name))

    async def _answer(self, name: str, *given: int) -> Any:
        if name != "notices":
            return None
        given = given or (0,)
        self.asked.append(*given)
        return self.texts[given[0] :]


def test_a_worker_is_heard_with_every_heartbeat_and_at_its_end() -> None:
    handle, heard = Handle(), []

    async def scene() -> None:
        member = ActorMember("rollout-0", handle, hear=lambda name, texts: heard.append((name, *texts)))
        for text in ("first", "second"):
            await member.ping()
            handle.texts.append(text)
        await member.close()

    asyncio.run(scene())
    assert heard == [("rollout-0",), ("rollout-0", "first"), ("rollout-0", "second")]
    assert handle.asked == [0, 0, 1]


def test_the_learner_is_heard_with_every_heartbeat() -> None:
    handle, heard = Handle(), []
    handle.texts.append("step 3: the loss is not finite; its groups are set aside and others taken")

    def hear(part: str, texts: Sequence[str]) -> None:
        heard.append((part, *texts))
        if len(heard) == 2:
            raise PartLost("gone")

    part = LearnerPart(configured(), lambda ranks: None, None, None)  # type: ignore[arg-type, return-value]
    part._handles = [handle]
    how = asyncio.run(part.lost(SupervisionSettings(heartbeat_interval_seconds=0.01), hear))
    assert heard == [("learner", handle.texts[0])] * 2 and "gone" in how


def test_a_log_that_cannot_be_written_costs_the_run_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    Noticed(tmp_path / "missing", said.append).hear("", ["anything"])
    assert said == ["note: anything"]


@needs_smollm2
def test_what_an_evaluation_of_the_real_smollm2_notices_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def start(name: str, path: str, stops: tuple[int, ...], *more: Any, **others: Any) -> HfEngine:
        return HfEngine.load(path, stops, name=name)

    async def adopt_loaded(self: HfEngine, version: int) -> None:
        self.version = version

    monkeypatch.setattr(VllmEngine, "start", start)
    monkeypatch.setattr(HfEngine, "adopt_loaded", adopt_loaded, raising=False)
    conditions = Conditions(
        env_options={"function": f"{__name__}:unheard"}, sampling=Sampling(max_tokens=2), context_tokens=256
    )
    outcome = evaluate_checkpoint(str(FOLDER), "program", range(3), conditions, tmp_path / "eval")
    assert (outcome.episodes, outcome.failed) == (2, 1)
    said = capfd.readouterr().err
    assert said.count("option is ignored") == said.count("an episode failed") == 1
    assert (tmp_path / "eval" / FILE).read_text(encoding="utf-8") == said
