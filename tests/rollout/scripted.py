"""An episode that a script plays, and what must hold of its tokens whatever stands between it and the environment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import gymnasium as gym
from transformers import PreTrainedTokenizerFast

from envs.hosting.host import InProcessEnv
from rollout.agents.agent import Agent, AgentSettings
from rollout.chat.chat import Chat
from rollout.engines.engine import Sampling
from rollout.engines.scripted_engine import Request, ScriptedEngine
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec, run_episode
from rollout.wire.trajectory import Slot, Task, Trajectory

Script = Callable[[str, Random], str]


def played(
    chat: Chat,
    tokenizer: PreTrainedTokenizerFast,
    script: Script,
    env: gym.Env[Any, str],
    seed: int,
    memory: str = "full",
    context_tokens: int = 4096,
    max_turns: int = 40,
    requests: list[Request] | None = None,
) -> Trajectory:
    """requests: where what the engine was asked is put."""
    engine = ScriptedEngine(tokenizer, script)
    settings = AgentSettings(memory=memory, min_new_tokens=16)
    agent = Agent(engine, chat, Sampling(max_tokens=128), context_tokens, settings)
    place = EpisodeSpec(Slot(seed, 0, Task.of("code", seed), 0), index=0, seed=seed)
    trajectory = asyncio.run(run_episode(InProcessEnv(env), agent, place, EpisodeLimits(max_turns, 60.0)))
    assert trajectory.error is None, trajectory.error
    _assert_exact(trajectory, engine)
    if requests is not None:
        requests += engine.requests
    return trajectory


def _assert_exact(trajectory: Trajectory, engine: ScriptedEngine) -> None:
    """What is stored of every segment is what the engine was asked and answered, token by token."""
    history: dict[int, list[int]] = {}
    for step, request in zip(trajectory.turns, engine.requests, strict=True):
        resume_from = history.setdefault(step.segment, [])
        resume_from += step.prompt_ids.tolist()
        assert tuple(resume_from) == request.prompt_ids
        resume_from += step.action_ids.tolist()
        assert step.action_ids.tolist() == request.completion.token_ids.tolist()
