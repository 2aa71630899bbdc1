"""Pictures as parts of messages: uint8 pixels <-> a PNG as a data URL, which is JSON and goes wherever messages go."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from PIL import Image

from envs.base import Message

Pixels = NDArray[np.uint8]
_PNG = "data:image/png;base64,"


def image(pixels: Pixels) -> dict[str, Any]:
    """A part of a message: uint8 [H, W], [H, W, 1] or [H, W, 3], as a PNG. ValueError for anything else."""
    if not is_picture(pixels.dtype, pixels.shape):
        raise ValueError(
            f"a picture is uint8 [H, W], [H, W, 1] or [H, W, 3], got {pixels.dtype} {pixels.shape}"
        )
    flat = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    written = io.BytesIO()
    # One level of compression for good: the same pixels are the same bytes when an episode is played again.
    Image.fromarray(np.ascontiguousarray(flat)).save(written, "png", compress_level=6)
    return png(written.getvalue())


def png(written: bytes) -> dict[str, Any]:
    """A part of a message: a picture that is a PNG already."""
    return {"type": "image", "image": _PNG + base64.b64encode(written).decode()}


def text(said: str) -> dict[str, Any]:
    """A part of a message that is text."""
    return {"type": "text", "text": said}


def shown(pixels: Pixels, said: str = "") -> list[Message]:
    """An observation: the user says something, unless it is empty, and shows a picture."""
    return [{"role": "user", "content": [*([text(said)] if said else []), image(pixels)]}]


def pixels_of(part: dict[str, Any]) -> Pixels:
    """The picture of a part: uint8 [H, W, 3]. For players and tests: a model has a processor of its own."""
    opened = Image.open(io.BytesIO(base64.b64decode(part["image"].removeprefix(_PNG))))
    return np.asarray(opened.convert("RGB"))


def is_picture(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
    """Whether an array like this is a picture: grey or red, green and blue."""
    return (
        dtype == np.uint8 and 0 not in shape and (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3)))
    )


def are_pictures(space: Any) -> bool:
    """Whether a space's values are pictures."""
    return isinstance(space, spaces.Box) and is_picture(space.dtype, space.shape)
