"""Adapter from any Gymnasium environment to text, in the forms of `envs/spaces_text.py`, or to images.

The first observation begins with one line that describes the form of an action. Text that is not an action ends the
episode as malformed: a lenient parser would train what it guesses.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from envs.base import PRINTABLE, Info, Observation, TalkSpace, text_space
from envs.images import image_observation, is_image_space
from envs.spaces_text import (
    DIGITS,
    MAX_DIGITS,
    MAX_NUMBERS,
    UnsupportedSpace,
    action_format,
    from_text,
    require_text_form,
    to_text,
)

Picture = Literal["observation", "render"]

MAX_CHARACTERS = 1 << 16  # per observation


class TextAdapter(gym.Wrapper[Observation, str, Any, Any], RecordConstructorArgs):
    """Wrap an environment. Limits, seeds, rewards and `success` stay those of the environment.

    digits: significant digits of a Box's numbers. picture: what is shown instead of text: "observation" if it is uint8
    pixels (the default if they are too many to write), or "render", the environment's own drawing (needs render_mode
    "rgb_array"). UnsupportedSpace if a space has neither form, ValueError unless digits is 1 to 17.
    """

    def __init__(self, env: gym.Env[Any, Any], digits: int = DIGITS, picture: Picture | None = None) -> None:
        # so that Gymnasium can describe and rebuild the wrapped environment
        RecordConstructorArgs.__init__(self, digits=digits, picture=picture)
        super().__init__(env)
        if not isinstance(digits, int) or not 1 <= digits <= MAX_DIGITS:
            raise ValueError(f"text_digits={digits!r} must be a whole number from 1 to {MAX_DIGITS}")
        require_text_form(env.action_space, "actions")
        self._digits = digits
        self._grammar = action_format(env.action_space)
        self._picture = _resolve_picture(env, picture)
        self.action_space = text_space(256)
        if self._picture:
            self.observation_space = TalkSpace()
            return
        require_text_form(env.observation_space, "observations")
        space = env.observation_space
        extra = space.character_set if isinstance(space, spaces.Text) else frozenset()
        self.observation_space = spaces.Text(MAX_CHARACTERS, min_length=0, charset=extra | set(PRINTABLE))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._observe(observation, f"{self._grammar}\n"), info

    def step(self, action: str) -> tuple[Observation, float, bool, bool, Info]:
        parsed = from_text(self.env.action_space, action)
        if parsed is None:
            return "That is not an action.", 0.0, True, False, {"malformed": True}
        observation, reward, terminated, truncated, info = self.env.step(parsed)
        return self._observe(observation), float(reward), terminated, truncated, info

    def _observe(self, observation: Any, first: str = "") -> Observation:
        if self._picture:
            pixels: Any = observation if self._picture == "observation" else self.env.render()
            return image_observation(pixels, first)
        return first + to_text(self.env.observation_space, observation, self._digits)


def _resolve_picture(env: gym.Env[Any, Any], picture: Picture | None) -> Picture | None:
    """What is shown as an image, if anything. UnsupportedSpace if that is impossible."""
    pixels = is_image_space(env.observation_space)
    if picture is None:
        return "observation" if pixels and np.prod(env.observation_space.shape or ()) > MAX_NUMBERS else None
    if picture not in get_args(Picture):
        raise ValueError(f"picture={picture!r} must be observation or render")
    if picture == "observation" and not pixels:
        raise UnsupportedSpace(
            f"picture='observation' needs uint8 pixels, got {env.observation_space}; use picture='render'"
        )
    if picture == "render" and env.render_mode != "rgb_array":
        raise UnsupportedSpace(
            "picture='render' needs render_mode='rgb_array', which this environment does not support"
        )
    return picture


class RandomPlayer:
    """Random baseline: plays actions sampled from the environment's own action space. One per episode."""

    def __init__(self, env: gym.Env[Any, str], seed: int) -> None:
        inner: gym.Env[Any, Any] = env
        while isinstance(inner, gym.Wrapper) and not isinstance(inner, TextAdapter):
            inner = inner.env
        adapted = inner.env if isinstance(inner, TextAdapter) else env
        self._space = deepcopy(adapted.action_space)  # a space holds its own generator
        self._space.seed(seed)

    def act(self, observation: Any) -> str:
        """A random action; the observation is ignored."""
        return to_text(self._space, self._space.sample())
