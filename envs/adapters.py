"""Any Gymnasium environment with Discrete or Text spaces, as text.

An observation is written as Python would print it ("14", "(13, 10, 0)"); the first one is preceded by the action
grammar. A Discrete action is its decimal number with nothing around it but white space. What is not an action ends the
episode, marked as malformed: guessing what was meant would train the guess.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from envs.base import Info, text_space

INT64_DIGITS = 18  # so many characters always fit an int64; longer ones make int() or the space raise


class UnsupportedSpace(ValueError):
    """A space that has no text form here."""


class TextAdapter(gym.Wrapper[str, str, Any, Any], RecordConstructorArgs):
    """Wraps an environment; limits, seeds and rewards are the environment's own, and so is `success` if it has one."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)  # lets Gymnasium describe and rebuild what is wrapped
        super().__init__(env)
        self._grammar = _grammar(env.action_space)
        _require_observable(env.observation_space)
        self.observation_space = text_space()
        self.action_space = text_space(256)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        observation, info = self.env.reset(seed=seed, options=options)
        return f"{self._grammar}\n{_written(observation)}", info

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        parsed = _parsed(self.env.action_space, action)
        if parsed is None:
            return "That is not an action.", 0.0, True, False, {"malformed": True}
        observation, reward, terminated, truncated, info = self.env.step(parsed)
        return _written(observation), float(reward), terminated, truncated, info


def _grammar(space: gym.Space[Any]) -> str:
    if isinstance(space, spaces.Discrete):
        first, last = int(space.start), int(space.start + space.n - 1)
        return f"Answer with one whole number from {first} to {last} and nothing else."
    if isinstance(space, spaces.Text):
        return f"Answer with at most {space.max_length} characters."
    raise UnsupportedSpace(f"actions of {type(space).__name__} have no text form yet; Discrete and Text have")


def _require_observable(space: gym.Space[Any]) -> None:
    parts = space.spaces if isinstance(space, spaces.Tuple) else [space]
    for part in parts:
        if not isinstance(part, spaces.Discrete | spaces.Text):
            raise UnsupportedSpace(
                f"observations of {type(part).__name__} have no text form yet; Discrete, Text and tuples of them have"
            )


def _written(observation: Any) -> str:
    if isinstance(observation, tuple):
        return "(" + ", ".join(_written(part) for part in observation) + ")"
    return observation if isinstance(observation, str) else str(int(observation))


def _parsed(space: gym.Space[Any], action: str) -> Any:
    if isinstance(space, spaces.Text):
        return action if space.contains(action) else None
    text = action.strip()
    # int() alone would take "+1", "1_0" and digits of other scripts
    if not (text.removeprefix("-").isdigit() and text.isascii()) or len(text) > INT64_DIGITS:
        return None
    number = int(text)
    return number if space.contains(number) else None
