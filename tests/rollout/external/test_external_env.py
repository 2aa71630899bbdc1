"""Programs as foreign agents: how they enter a run, how they end, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from deploy.assembly.build import distinct_tasks
from deploy.config.config_errors import ConfigError
from deploy.config.load import parse
from deploy.run.preflight import check, check_program
from envs.hosting.host import HostSettings
from envs.registry import EnvironmentUnknown
from rollout.agents.agent import Agent
from rollout.chat.chat import Chat
from rollout.engines.engine import Sampling
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec, NullListener
from rollout.episodes.group import play, run_group
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.resume import Restart
from rollout.external.external_env import ProgramOptions
from rollout.external.program import environment
from rollout.wire.trajectory import EndReason, Group, PartialEpisode, Slot, Task, Trajectory

GUIDE = (Path(__file__).parents[3] / "docs" / "foreign_agents.md").read_text(encoding="utf-8")
HOST = HostSettings(reset_seconds=60.0, step_seconds=60.0)
LIMITS = EpisodeLimits(max_turns=9, timeout_seconds=120.0)
# An agent without a client, which starts in a tenth of the time; it says whom it started.
RAW = """
import json, os, subprocess, sys, time, urllib.request

def ask():
    body = json.dumps({"messages": [{"role": "user", "content": "turn"}]}).encode()
    head = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, head)
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]

task = json.loads(os.environ["MANTA_TASK"])
child = subprocess.Popen(["sleep", "3600"])
with open(task["file"], "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
"""


@pytest.fixture
def agent(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> Agent:
    engine = ScriptedEngine(tokenizer, lambda prompt, rng: rng.choice("123456789"))
    return Agent(engine, chat, Sampling(max_tokens=8), 4096)


def raw(tmp_path: Path, then: str, **options: Any) -> Task:
    command = [sys.executable, "-c", RAW + then]
    return Task.of("program", 3, {"command": command, "task": {"file": str(tmp_path / "pids")}} | options)


def played(agent: Agent, task: Task, host: HostSettings = HOST, limits: EpisodeLimits = LIMITS) -> Trajectory:
    async def run() -> Trajectory:
        pool = EnvironmentPool(host=host)
        try:
            return await play(EpisodeSpec(Slot(0, 0, task, 0), 0, 1), pool, agent, limits)
        finally:
            await pool.close()

    return asyncio.run(run())


def left(tmp_path: Path) -> list[int]:
    """What is left of a program and its child; those that are dead and not yet buried are gone."""
    stats = [Path(f"/proc/{pid}/stat") for pid in (tmp_path / "pids").read_text(encoding="utf-8").split()]
    alive = [
        path
        for path in stats
        if path.exists() and path.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    ]
    return [int(path.parent.name) for path in alive]


def test_an_assistant_of_the_openai_client_is_recorded_as_ours_is(
    tokenizer: PreTrainedTokenizerFast, chat: Chat
) -> None:
    def policy(prompt: str, rng: random.Random) -> str:
        return "corin" if "is corin." in prompt else "search(mayor of arlen)"

    agent = Agent(ScriptedEngine(tokenizer, policy), chat, Sampling(max_tokens=64), 4096)
    options = {"level": 1, "max_calls": 2, "split": "train"}
    ours = Task.of("assistant", 5, options | {"style": "plain", "instructions": False})
    theirs = Task.of("program", 5, {"function": "tests.bench.openai_assistant:play", "task": options})
    one, other = played(agent, ours), played(agent, theirs)
    assert (one.end_reason, one.reward) == (other.end_reason, other.reward) == (EndReason.TERMINATED, 0.0)
    assert len(one.turns) == len(other.turns) == 2
    for mine, foreign in zip(one.turns, other.turns, strict=True):
        assert mine.prompt_ids.tolist() == foreign.prompt_ids.tolist()
        assert mine.action_ids.tolist() == foreign.action_ids.tolist()
        assert mine.segment == foreign.segment == 0


def test_the_guides_own_agent_plays_and_learns_nothing_of_us(agent: Agent, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len(program.splitlines()) <= 30
    assert "manta" not in program.replace("MANTA_TASK", "")
    (tmp_path / "guess.py").write_text(program, encoding="utf-8")
    task = Task.of("program", 4, {"command": [sys.executable, str(tmp_path / "guess.py")]})

    async def run() -> Group:
        pool = EnvironmentPool(host=HOST)
        try:
            return await run_group(Slot(7, 0, task, 0), pool, agent, 3, LIMITS, run_seed=1)
        finally:
            await pool.close()

    group = asyncio.run(run())
    for trajectory in group.trajectories:
        assert trajectory.end_reason is EndReason.TERMINATED, trajectory.error
        assert trajectory.success == (trajectory.reward == 1.0)
        assert {step.segment for step in trajectory.turns} == {0}
        guesses = [int(step.action) for step in trajectory.turns]
        assert len(guesses) == 3 or trajectory.success
    hints = {
        (int(step.action), "higher" in after.observation)
        for trajectory in group.trajectories
        for step, after in zip(trajectory.turns, trajectory.turns[1:], strict=False)
    }
    secrets = {int(t.turns[-1].action) for t in group.trajectories if t.success}
    assert len(secrets) <= 1, "siblings play the same instance"
    bounds = [guess for guess, higher in hints if higher], [guess for guess, higher in hints if not higher]
    assert max(bounds[0], default=0) < min(bounds[1], default=10)


def test_the_guides_recipe_is_one(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    env = tomllib.loads(recipe)
    config = parse(env | {"steps": 1, "tiny": {}}, "the guide")
    assert ProgramOptions.read(config.env.options).command == ("python", "guess.py")
    tasks = distinct_tasks(config.env.id, config.env.options, first_seed=5, count=3)
    assert [task.seed for task in tasks] == [5, 6, 7]
    for agent in ({"memory": "last"}, {"parts": [{"kind": "plan"}]}):
        with pytest.raises(ConfigError, match="which has its own"):
            check(parse(env | {"steps": 1, "tiny": {}, "agent": agent}, "the guide"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give either command or function"),
        ({"command": ["true"], "function": "tests.rollout.callers:judge"}, "give either command or function"),
        ({"comand": ["true"]}, "comand.*its options: command, function, reward, reward_seconds, task"),
        ({"function": "tests.rollout.callers"}, "not of the form module:function"),
        ({"function": "tests.rollout.callers:nobody"}, "has no function 'nobody'"),
        ({"command": ["true"], "reward": "no.such:thing"}, "cannot be imported"),
        ({"command": ["true"], "task": {"seed": 1}}, "set by each episode"),
        ({"command": ["no-such-program"]}, "program 'no-such-program' not found"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises((EnvironmentUnknown, ConfigError), match=says) as refusal:
        check_program(options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("then", "turns", "says"),
    [
        ("ask()\nsys.exit('no such tile')", 1, "exit code 1; it said last:\nno such tile"),
        ("ask()\nos.kill(os.getpid(), 11)", 1, "signal 11"),
        ("ask()\nprint(42)", 1, "ended without a reward"),
        ('ask()\nprint(json.dumps({"reward": "much"}))', 1, "a reward is a finite number"),
        ("print('here I wait', flush=True)\ntime.sleep(3600)", 0, "completion within 5 s (env.host.reset_seconds)"),
        ("print('here I wait', flush=True)\nask()\ntime.sleep(3600)", 1, "end within 1 s (env.host.step_seconds)"),
    ],
)  # fmt: skip
def test_a_program_that_fails_is_no_evidence_and_leaves_nothing(
    agent: Agent, tmp_path: Path, then: str, turns: int, says: str
) -> None:
    waits = "sleep" in then
    host = HostSettings(reset_seconds=60.0 if turns else 5.0, step_seconds=1.0) if waits else HOST
    trajectory = played(agent, raw(tmp_path, then), host)
    assert trajectory.end_reason is EndReason.FAILED
    assert trajectory.error is not None
    assert says in trajectory.error
    assert ("here I wait" in trajectory.error) == waits
    assert len(trajectory.turns) == turns
    assert left(tmp_path) == []


def test_the_last_line_is_the_reward_whatever_else_is_printed(agent: Agent, tmp_path: Path) -> None:
    then = 'print("x" * 10_000_000)\nask()\nprint(json.dumps({"reward": 0.5, "end": "truncated"}))\nprint()'
    trajectory = played(agent, raw(tmp_path, then))
    assert (trajectory.end_reason, trajectory.reward) == (EndReason.TRUNCATED, 0.5), trajectory.error
    assert left(tmp_path) == []


def test_an_episode_at_its_limit_ends_the_program(agent: Agent, tmp_path: Path) -> None:
    trajectory = played(agent, raw(tmp_path, "while True: ask()"), limits=EpisodeLimits(3, 60.0))
    assert (trajectory.end_reason, trajectory.reward) == (EndReason.TRUNCATED, 0.0)
    assert len(trajectory.turns) == 3
    assert left(tmp_path) == []


def test_a_function_can_be_a_program(agent: Agent) -> None:
    task = Task.of(
        "program", 1, {"function": "tests.rollout.callers:planned", "task": {"plan": ["extend"] * 2}}
    )
    trajectory = played(agent, task, HOST.model_copy(update={"where": "process"}))
    assert (trajectory.end_reason, trajectory.reward) == (EndReason.TERMINATED, 0.5), trajectory.error
    assert [step.segment for step in trajectory.turns] == [0, 0]


def test_an_unfinished_episode_starts_again(agent: Agent, tmp_path: Path) -> None:
    task = raw(tmp_path, 'ask()\nask()\nprint(json.dumps({"reward": 1}))')
    before = played(agent, task)
    restarts: list[Restart] = []

    class Listener(NullListener):
        def restarted(self, why: Restart) -> None:
            restarts.append(why)

    async def run() -> Trajectory:
        pool = EnvironmentPool(host=HOST)
        resume_from = PartialEpisode(before.turns[:1], None, None)
        try:
            return await play(
                EpisodeSpec(Slot(0, 1, task, 0), 0, 1), pool, agent, LIMITS, Listener(), resume_from
            )
        finally:
            await pool.close()

    again = asyncio.run(run())
    assert restarts == [Restart.NONDETERMINISTIC]
    assert [step.action for step in again.turns] == [step.action for step in before.turns]


def test_a_program_finds_its_way_past_a_proxy(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert "RAY_AUTH_TOKEN" not in environment("http://127.0.0.1/v1", "key", {})
    trajectory = played(agent, raw(tmp_path, 'ask()\nprint(json.dumps({"reward": 1}))'))
    assert trajectory.reward == 1.0, trajectory.error
    assert os.environ.get("no_proxy") is None
    assert json.loads(trajectory.turns[0].observation) == [{"role": "user", "content": "turn"}]
