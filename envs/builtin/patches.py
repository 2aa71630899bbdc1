"""A coloured patch in an image: the answer is visible in the image and given nowhere else.

Observation: a question and an image of 16 x 16 pixels, a patch of 8 x 8 at one of four places on a dark, noisy ground.
Action: the answer in one word: a colour (red, green, blue, yellow), at level 2 a place (top, bottom, left, right).
Reward: 1 for the right answer, else 0. Horizon: one turn, at level 3 two.
Levels: 1 the colour, 2 the place, 3 the colour of the picture before: the first answer only brings the second picture.
Ends: an answer to the last question (terminated), any other word (malformed).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np

from envs.base import Info, Observation, Split, TalkSpace, check_options, draw_valid, text_space
from envs.images import Pixels, decode_image, image_observation

LEVELS = (1, 2, 3)
SIZE, PATCH = 16, 8
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
PLACES = {
    "top": (0, 4),
    "bottom": (8, 4),
    "left": (4, 0),
    "right": (4, 8),
}  # row and column of the patch's corner
COLOUR, PLACE, BEFORE = "which colour", "which place", "which colour before"
RIGHT, WRONG, UNREADABLE = "right", "wrong", "no such word"
# The words of observations and actions.
WORDS = tuple(
    dict.fromkeys(
        f"{COLOUR} {PLACE} {BEFORE} {' '.join((*COLOURS, *PLACES))} {RIGHT} {UNREADABLE} {WRONG}".split()
    )
)
_NOISE = 60  # maximum brightness of the ground


def picture(colour: str, place: str, noise: Pixels) -> Pixels:
    """uint8 [16, 16, 3]: the patch on a ground of noise, of the same shape."""
    pixels = noise.copy()
    row, column = PLACES[place]
    pixels[row : row + PATCH, column : column + PATCH] = COLOURS[colour]
    return pixels


class Patches(gym.Env[Observation, str]):
    """The environment.

    level: 1 to 3, see above. split: "train" and "heldout" divide the images by their pixels. Raises ValueError for
    other values.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own convention
    reward_range = (0.0, 1.0)
    observation_space = TalkSpace()
    action_space = text_space(256)

    def __init__(self, level: int = 1, split: Split = "all") -> None:
        check_options(level, LEVELS, split, None)
        self._level = level
        self._split = split
        self._answer = ""
        self._questions: list[str] = []  # remaining questions, in reverse order

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        super().reset(seed=seed)
        self._questions = [BEFORE, COLOUR] if self._level == 3 else [PLACE if self._level == 2 else COLOUR]
        colour, place, pixels = self._drawn()
        self._answer = place if self._level == 2 else colour
        return image_observation(pixels, self._questions[-1]), {}

    def step(self, action: str) -> tuple[Observation, float, bool, bool, Info]:
        if not self._questions:
            raise RuntimeError("step() was called before reset()")
        word = action.strip().lower()
        if word not in (PLACES if self._level == 2 else COLOURS):
            return UNREADABLE, 0.0, True, False, {"malformed": True, "success": False}
        if len(self._questions) > 1:
            self._questions.pop()
            return image_observation(self._drawn()[2], self._questions[-1]), 0.0, False, False, {}
        reward = paid(word, self._answer)
        return RIGHT if reward else WRONG, reward, True, False, {"success": reward > 0}

    def _drawn(self) -> tuple[str, str, Pixels]:
        rng = self.np_random

        def attempt() -> tuple[str, str, Pixels]:
            colour, place = (list(each)[rng.integers(len(each))] for each in (COLOURS, PLACES))
            return colour, place, picture(colour, place, rng.integers(0, _NOISE, (SIZE, SIZE, 3), np.uint8))

        return draw_valid(attempt, lambda found: found[2].tobytes().hex(), self._split)


def paid(answer: str, right: str) -> float:
    """The reward of an answer to the last question."""
    return float(answer == right)


class Player:
    """Reads the image; with probability `error_rate` it says a random valid word. One per episode."""

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)
        self._before = ""

    def act(self, observation: Observation) -> str:
        """The answer to the last question, in one word."""
        assert not isinstance(observation, str)
        question, shown_part = observation[-1]["content"]
        colour, place = seen(decode_image(shown_part))
        before, self._before = self._before, colour
        answers: dict[str, tuple[str, Iterable[str]]] = {
            COLOUR: (colour, COLOURS),
            PLACE: (place, PLACES),
            BEFORE: (before, COLOURS),
        }
        answer, possible = answers[question["text"]]
        if self._rng.random() < self._error_rate:
            words = tuple(possible)
            return words[self._rng.integers(len(words))]
        return answer


def seen(pixels: Pixels) -> tuple[str, str]:
    """Colour and place of the patch in an image."""
    for colour, value in COLOURS.items():
        rows, columns = np.nonzero((pixels == value).all(-1))
        if len(rows) >= PATCH**2:
            corner = (int(rows.min()), int(columns.min()))
            return colour, next(place for place, found in PLACES.items() if found == corner)
    raise ValueError("there is no patch in this picture")
