"""Any Gymnasium environment as text, unmodified: the forms are those of `envs/spaces_text.py`; and as pictures.

The first observation is preceded by one line that says what an action looks like. What is not an action ends the
episode, marked as malformed: guessing what was meant would train the guess.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from envs.base import PRINTABLE, Info, Observation, TalkSpace, text_space
from envs.images import are_pictures, shown
from envs.spaces_text import (
    DIGITS,
    MAX_DIGITS,
    MAX_NUMBERS,
    UnsupportedSpace,
    grammar,
    parsed,
    require_text_form,
    written,
)

Picture = Literal["observation", "render"]

MAX_CHARACTERS = 1 << 16  # of an observation


class TextAdapter(gym.Wrapper[Observation, str, Any, Any], RecordConstructorArgs):
    """Wraps an environment; limits, seeds and rewards are the environment's own, and so is `success` if it has one.

    digits: significant ones that a Box's numbers are written with. picture: what is shown in place of text, the
    "observation" where it is uint8 pixels (so it is, unsaid, where they are too many to be written), or what the
    environment draws of itself ("render", with render_mode "rgb_array"). UnsupportedSpace where a space has neither
    form, ValueError for another number of digits than 1 to 17.
    """

    def __init__(self, env: gym.Env[Any, Any], digits: int = DIGITS, picture: Picture | None = None) -> None:
        # lets Gymnasium describe and rebuild what is wrapped
        RecordConstructorArgs.__init__(self, digits=digits, picture=picture)
        super().__init__(env)
        if not isinstance(digits, int) or not 1 <= digits <= MAX_DIGITS:
            raise ValueError(f"text_digits={digits!r} must be a whole number from 1 to {MAX_DIGITS}")
        require_text_form(env.action_space, "actions")
        self._digits = digits
        self._grammar = grammar(env.action_space)
        self._picture = _pictured(env, picture)
        self.action_space = text_space(256)
        if self._picture:
            self.observation_space = TalkSpace()
            return
        require_text_form(env.observation_space, "observations")
        said = env.observation_space
        more = said.character_set if isinstance(said, spaces.Text) else frozenset()
        self.observation_space = spaces.Text(MAX_CHARACTERS, min_length=0, charset=more | set(PRINTABLE))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._said(observation, f"{self._grammar}\n"), info

    def step(self, action: str) -> tuple[Observation, float, bool, bool, Info]:
        meant = parsed(self.env.action_space, action)
        if meant is None:
            return "That is not an action.", 0.0, True, False, {"malformed": True}
        observation, reward, terminated, truncated, info = self.env.step(meant)
        return self._said(observation), float(reward), terminated, truncated, info

    def _said(self, observation: Any, first: str = "") -> Observation:
        if self._picture:
            pixels: Any = observation if self._picture == "observation" else self.env.render()
            return shown(pixels, first)
        return first + written(self.env.observation_space, observation, self._digits)


def _pictured(env: gym.Env[Any, Any], picture: Picture | None) -> Picture | None:
    """What is shown of an environment; UnsupportedSpace where it cannot be."""
    pixels = are_pictures(env.observation_space)
    if picture is None:
        return "observation" if pixels and np.prod(env.observation_space.shape or ()) > MAX_NUMBERS else None
    if picture not in get_args(Picture):
        raise ValueError(f"picture={picture!r} must be observation or render")
    if picture == "observation" and not pixels:
        raise UnsupportedSpace(
            f"observations of {env.observation_space} are no uint8 pixels: use picture='render'"
        )
    if picture == "render" and env.render_mode != "rgb_array":
        raise UnsupportedSpace(
            "an environment is shown with render_mode='rgb_array', which this one does not take"
        )
    return picture


class RandomPlayer:
    """Plays actions drawn from an environment's own action space, one an episode: the random baseline."""

    def __init__(self, env: gym.Env[Any, str], seed: int) -> None:
        within: gym.Env[Any, Any] = env
        while isinstance(within, gym.Wrapper) and not isinstance(within, TextAdapter):
            within = within.env
        adapted = within.env if isinstance(within, TextAdapter) else env
        self._space = deepcopy(adapted.action_space)  # a space holds a generator of its own
        self._space.seed(seed)

    def act(self, observation: Any) -> str:
        """An action, whatever was observed."""
        return written(self._space, self._space.sample())
