"""A tiny tokenizer, and an environment whose every failure can be ordered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import pytest
from transformers import PreTrainedTokenizerFast

from learner.model.tokenizer import build_tokenizer
from rollout.agents.agent import Agent, AgentSettings
from rollout.chat.chat import Chat
from rollout.engines.engine import Engine, Sampling
from rollout.wire.trajectory import Group, Task
from tests.rollout.groups import make_group, task_of


@dataclass
class Orders:
    """How `CountEnv` behaves; shared by the replicas made under it."""

    length: int = 3  # turns until it terminates
    reset_error: Callable[[int], Exception | None] = lambda seed: None
    reward: Callable[[int, int], float | None] = lambda seed, turn: None  # in place of the usual one
    step_error: Callable[[int, int], Exception | None] = lambda seed, turn: None
    info: dict[str, Any] = field(default_factory=dict)  # of the last step
    truncates: bool = False
    made: list[CountEnv] = field(default_factory=list)

    def make(self, env_id: str, **options: Any) -> CountEnv:
        del env_id, options
        self.made.append(CountEnv(self))
        return self.made[-1]


class CountEnv(gym.Env[str, str]):
    """Says its seed, the turn and what it heard; pays 1 for every "right"."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.resets: list[int] = []
        self.closed = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        assert seed is not None
        self.resets.append(seed)
        self.turn = 0
        if error := self.orders.reset_error(seed):
            raise error
        return f"seed {seed}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if error := self.orders.step_error(self.resets[-1], self.turn):
            raise error
        ordered = self.orders.reward(self.resets[-1], self.turn)
        self.turn += 1
        ended = self.turn >= self.orders.length
        said = f"turn {self.turn} heard {action}"
        terminated, truncated = ended and not self.orders.truncates, ended and self.orders.truncates
        reward = float(action == "right") if ordered is None else ordered
        return said, reward, terminated, truncated, self.orders.info if ended else {}

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="session")
def tasks() -> Callable[[int], Task]:
    return task_of


@pytest.fixture(scope="session")
def group_of() -> Callable[..., Group]:
    return make_group


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    built = build_tokenizer(folder, ("left", "right", "turn", "seed", "heard"))
    assert isinstance(built, PreTrainedTokenizerFast)
    return built


@pytest.fixture(scope="session")
def chat(tokenizer: PreTrainedTokenizerFast) -> Chat:
    return Chat(tokenizer)


@pytest.fixture
def orders() -> Orders:
    return Orders()


@pytest.fixture
def agent_of(chat: Chat) -> Callable[..., Agent]:
    def make(
        engine: Engine,
        max_tokens: int = 8,
        context_tokens: int = 512,
        min_new_tokens: int = 1,
        memory: Literal["full", "last"] = "full",
    ) -> Agent:
        return Agent(
            engine,
            chat,
            Sampling(max_tokens=max_tokens),
            context_tokens,
            AgentSettings(min_new_tokens=min_new_tokens, memory=memory),
        )

    return make
