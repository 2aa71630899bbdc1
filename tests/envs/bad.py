"""A small sound environment, and a variant for every issue that the checks find."""

from __future__ import annotations

import json
import os
import random
import threading
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from envs.base import Info, TextEnv, text_space

MAX_TURNS = 8
Step = tuple[Any, Any, Any, Any, Info]


class Sound(TextEnv):
    """Go up and down to a height; the wind may carry one step further. Offers snapshots."""

    action_space = spaces.Text(1, charset="ud")

    def __init__(self) -> None:
        self.at = self.turns = self.target = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        super().reset(seed=seed)
        self.target = int(self.draw().integers(2, 5))
        self.at = self.turns = 0
        return self.say(), {}

    def step(self, action: str) -> Step:
        if action not in ("u", "d"):
            return self.not_understood(action)
        self.turns += 1
        self.at += (1 if action == "u" else -1) * (1 + int(self.draw().random() < 0.3))
        terminated = self.at == self.target
        truncated = not terminated and self.turns == MAX_TURNS
        info: Info = {"success": terminated} if terminated or truncated else {}
        return self.say(), float(terminated), terminated, truncated, info

    def draw(self) -> np.random.Generator:
        return self.np_random

    def say(self) -> Any:
        return f"{self.at} of {self.target}, turn {self.turns}"

    def not_understood(self, action: str) -> Step:
        return "u or d", 0.0, True, False, {"malformed": True}

    def snapshot(self) -> bytes:
        state = self.np_random.bit_generator.state
        return json.dumps([self.at, self.turns, self.target, state]).encode()

    def restore(self, snapshot: bytes) -> None:
        self.at, self.turns, self.target, self.np_random.bit_generator.state = json.loads(snapshot)


class SaysMessages(Sound):
    """Sound as well."""

    def say(self) -> Any:
        return [{"role": "user", "content": super().say(), "tools": []}]


class Noisy(Sound):
    """Its wind follows no seed."""

    def step(self, action: str) -> Step:
        self.np_random = np.random.default_rng()
        return super().step(action)


class SaysItIsNoisy(Noisy):
    nondeterministic = True


gym.register("ManyWinds-v0", entry_point=Noisy, nondeterministic=True)


class Sleeps(Sound):
    def step(self, action: str) -> Step:
        threading.Event().wait()
        return super().step(action)


class Hangs(Sound):
    def not_understood(self, action: str) -> Step:
        threading.Event().wait()
        return super().not_understood(action)


class HangsLater(Sound):
    """Every seed but the first leads to a step without end."""

    late = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        self.late = bool(seed)
        return super().reset(seed=seed)

    def step(self, action: str) -> Step:
        if self.late:
            threading.Event().wait()
        return super().step(action)


class BrokenBehindTheEnd(Sound):
    ended = broken = False

    def reset(self, **keywords: Any) -> tuple[Any, Info]:
        self.ended = False
        return super().reset(**keywords)

    def step(self, action: str) -> Step:
        self.broken |= self.ended
        said = super().step(action)
        self.ended = said[2] or said[3]
        return said

    def say(self) -> Any:
        return "?" if self.broken else super().say()


class HangsBehindTheEnd(BrokenBehindTheEnd):
    def step(self, action: str) -> Step:
        if self.ended:
            threading.Event().wait()
        return super().step(action)


class NeverMade(Sound):
    def __init__(self) -> None:
        threading.Event().wait()


class Dies(Sound):
    def step(self, action: str) -> Step:
        os._exit(3)


class CannotBeMade(Sound):
    def __init__(self) -> None:
        raise OSError("no such file: words.txt")


class Raises(Sound):
    def step(self, action: str) -> Step:
        if self.turns == 1:
            raise KeyError("the second turn")
        return super().step(action)


class SaysNumbers(Sound):
    def say(self) -> Any:
        return np.array([self.at, self.target])


class SaysNothing(Sound):
    def say(self) -> Any:
        return []


class FourAnswers(Sound):
    def step(self, action: str) -> Any:
        return super().step(action)[:4]


class PaysNothingKnown(Sound):
    def step(self, action: str) -> Step:
        return super().step(action)[0], float("nan"), *super().step(action)[2:]


class PaysFive(gym.Env[Any, Any]):
    """One of Gymnasium's, with a word on what it pays."""

    observation_space = action_space = spaces.Discrete(2)
    reward_range = (0.0, 1.0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        super().reset(seed=seed)
        return 0, {}

    def step(self, action: Any) -> Step:
        return 0, 5.0, True, False, {}


class PaysTooMuch(Sound):
    def step(self, action: str) -> Step:
        said, reward, *rest = super().step(action)
        return said, reward + 0.5 * (action in ("u", "d")), *rest  # type: ignore[return-value]


class EndsTwice(Sound):
    def step(self, action: str) -> Step:
        said, reward, terminated, truncated, info = super().step(action)
        return said, reward, terminated, terminated or truncated, info


class EndsInNumbers(Sound):
    def step(self, action: str) -> Step:
        said, reward, terminated, truncated, info = super().step(action)
        return said, reward, int(terminated), truncated, info


class ToldTooSoon(Sound):
    def step(self, action: str) -> Step:
        *said, info = super().step(action)
        return *said, {"success": False} | info  # type: ignore[return-value]


class NamesNoNumbers(Sound):
    def step(self, action: str) -> Step:
        *said, info = super().step(action)
        return *said, {"rewards": {"goal": "much"}} | info  # type: ignore[return-value]


class OneListForAll(Sound):
    def reset(self, **keywords: Any) -> tuple[Any, Info]:
        self.messages: list[dict[str, str]] = []
        return super().reset(**keywords)

    def say(self) -> Any:
        self.messages.append({"role": "user", "content": super().say()})
        return self.messages


class RaisesOnJunk(Sound):
    def not_understood(self, action: str) -> Step:
        raise ValueError(f"{action!r} is no direction")


class PaysForJunk(Sound):
    def not_understood(self, action: str) -> Step:
        said, _, *rest = super().not_understood(action)
        return said, 1.0, *rest  # type: ignore[return-value]


class OutsideOfItsSpace(Sound):
    observation_space = text_space(3)


class ClosesOnce(Sound):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


class DrawsGlobally(Sound):
    def step(self, action: str) -> Step:
        random.random()
        return super().step(action)


class DrawsFromNumpy(Sound):
    def step(self, action: str) -> Step:
        np.random.rand()
        return super().step(action)


class NoSeed(Sound):
    def draw(self) -> np.random.Generator:
        return np.random.default_rng()

    def say(self) -> Any:
        return f"{super().say()} {self.draw().integers(10**9)}"


class OneHeightForAll(Sound):
    height = 0

    @property
    def at(self) -> int:
        return OneHeightForAll.height

    @at.setter
    def at(self, value: int) -> None:
        OneHeightForAll.height = value


class KeepsItsTurns(Sound):
    def reset(self, **keywords: Any) -> tuple[Any, Info]:
        turns = self.turns
        super().reset(**keywords)
        self.turns = turns % MAX_TURNS
        return self.say(), {}


class ForgetsItsTurns(Sound):
    def restore(self, snapshot: bytes) -> None:
        super().restore(snapshot)
        self.turns = 0


class KnowsItsProcess(Sound):
    def say(self) -> Any:
        return f"{super().say()} in {os.getpid()}"


class WithoutSpaces(gym.Env[str, str]):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        return "", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        return "", 1.0, True, False, {}
