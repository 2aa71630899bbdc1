"""Images as parts of messages, and environments of pixels that are shown as images."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from envs import registry
from envs.base import TalkSpace
from envs.images import decode_image, image_observation, image_part
from envs.registry import EnvironmentUnknown


class Lamp(gym.Env[Any, Any]):
    """Shows a number in grey: as pixels, or when it is asked to draw itself."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    action_space = spaces.Discrete(3)

    def __init__(self, pixels: bool = True, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = spaces.Box(0, 255, (9, 8, 3), np.uint8) if pixels else spaces.Discrete(3)
        self._pixels = pixels

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.number = int(self.np_random.integers(3))
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, Any]:
        return self._seen(), float(action == self.number), True, False, {}

    def render(self) -> Any:
        return np.full((9, 8, 3), 100 * self.number, np.uint8)

    def _seen(self) -> Any:
        return Lamp.render(self) if self._pixels else 0


gym.register("Lamp-v0", entry_point=Lamp)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_pixels_come_back_as_they_were(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    wide = np.broadcast_to(pixels.reshape(5, 7, -1), (5, 7, 3))
    np.testing.assert_array_equal(decode_image(image_part(pixels)), wide)
    assert image_part(pixels) == image_part(pixels.copy()), "the same pixels are the same part"
    assert image_observation(pixels) in TalkSpace() and image_observation(pixels, "look") in TalkSpace()


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4)), np.zeros((0, 4), np.uint8)]
)
def test_what_is_no_picture_is_refused(pixels: Any) -> None:
    with pytest.raises(ValueError, match=r"an image must be uint8 \[H, W\]"):
        image_part(pixels)


@pytest.mark.parametrize("options", [{}, {"pixels": False, "picture": "render"}, {"picture": "observation"}])
def test_an_environment_of_pixels_is_shown_as_it_is(options: dict[str, Any]) -> None:
    env = registry.make("Lamp-v0", **options)
    for seed in range(4):
        plain = Lamp()
        pixels, _ = plain.reset(seed=seed)
        (message,), _ = env.reset(seed=seed)
        text, picture = message["content"]
        assert text["text"] == "Answer with one whole number from 0 to 2 and nothing else.\n"
        np.testing.assert_array_equal(decode_image(picture), pixels)
        (message,), reward, terminated, _, _ = env.step(str(plain.number))
        assert (reward, terminated, len(message["content"])) == (1.0, True, 1)


@pytest.mark.parametrize(
    ("env_id", "picture", "says"),
    [
        ("Lamp-v0", "drawing", "picture='drawing' must be observation or render"),
        ("CartPole-v1", "observation", "needs uint8 pixels, got .*; use picture='render'"),
    ],
)
def test_what_cannot_be_shown_is_said(env_id: str, picture: str, says: str) -> None:
    with pytest.raises(EnvironmentUnknown, match=says):
        registry.make(env_id, picture=picture)
