"""Any Gymnasium environment as text, unmodified: the forms are those of `envs/spaces_text.py`.

The first observation is preceded by one line that says what an action looks like. What is not an action ends the
episode, marked as malformed: guessing what was meant would train the guess.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from envs.base import PRINTABLE, Info, text_space
from envs.spaces_text import DIGITS, MAX_DIGITS, grammar, parsed, require_text_form, written

MAX_CHARACTERS = 1 << 16  # of an observation


class TextAdapter(gym.Wrapper[str, str, Any, Any], RecordConstructorArgs):
    """Wraps an environment; limits, seeds and rewards are the environment's own, and so is `success` if it has one.

    digits: significant ones that a Box's numbers are written with. UnsupportedSpace where a space has no text form,
    ValueError for another number of digits than 1 to 17.
    """

    def __init__(self, env: gym.Env[Any, Any], digits: int = DIGITS) -> None:
        RecordConstructorArgs.__init__(
            self, digits=digits
        )  # lets Gymnasium describe and rebuild what is wrapped
        super().__init__(env)
        if not isinstance(digits, int) or not 1 <= digits <= MAX_DIGITS:
            raise ValueError(f"text_digits={digits!r} must be a whole number from 1 to {MAX_DIGITS}")
        require_text_form(env.action_space, "actions")
        require_text_form(env.observation_space, "observations")
        self._digits = digits
        self._grammar = grammar(env.action_space)
        said = env.observation_space
        more = said.character_set if isinstance(said, spaces.Text) else frozenset()
        self.observation_space = spaces.Text(MAX_CHARACTERS, min_length=0, charset=more | set(PRINTABLE))
        self.action_space = text_space(256)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        observation, info = self.env.reset(seed=seed, options=options)
        return f"{self._grammar}\n{self._written(observation)}", info

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        meant = parsed(self.env.action_space, action)
        if meant is None:
            return "That is not an action.", 0.0, True, False, {"malformed": True}
        observation, reward, terminated, truncated, info = self.env.step(meant)
        return self._written(observation), float(reward), terminated, truncated, info

    def _written(self, observation: Any) -> str:
        return written(self.env.observation_space, observation, self._digits)


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
