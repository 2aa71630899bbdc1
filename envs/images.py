"""Images as parts of messages: uint8 pixels <-> a PNG as a data URL, which is valid JSON like the rest of a message."""

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


def image_part(pixels: Pixels) -> dict[str, Any]:
    """A message part from pixels: uint8 [H, W], [H, W, 1] or [H, W, 3], encoded as PNG. ValueError for others."""
    if not is_image(pixels.dtype, pixels.shape):
        raise ValueError(
            f"an image must be uint8 [H, W], [H, W, 1] or [H, W, 3], got {pixels.dtype} {pixels.shape}"
        )
    flat = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    buffer = io.BytesIO()
    # A fixed compression level, so that the same pixels give the same bytes when an episode is replayed.
    Image.fromarray(np.ascontiguousarray(flat)).save(buffer, "png", compress_level=6)
    return png_part(buffer.getvalue())


def png_part(encoded: bytes) -> dict[str, Any]:
    """A message part from the bytes of a PNG."""
    return {"type": "image", "image": _PNG + base64.b64encode(encoded).decode()}


def text_part(text: str) -> dict[str, Any]:
    """A message part with text."""
    return {"type": "text", "text": text}


def image_observation(pixels: Pixels, text: str = "") -> list[Message]:
    """An observation of one user message: the text, unless it is empty, and the image."""
    return [{"role": "user", "content": [*([text_part(text)] if text else []), image_part(pixels)]}]


def decode_image(part: dict[str, Any]) -> Pixels:
    """The pixels of an image part, uint8 [H, W, 3]. For players and tests; models use their own processors."""
    opened = Image.open(io.BytesIO(base64.b64decode(part["image"].removeprefix(_PNG))))
    return np.asarray(opened.convert("RGB"))


def is_image(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
    """Whether an array of this dtype and shape is a greyscale or RGB image."""
    return (
        dtype == np.uint8 and 0 not in shape and (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3)))
    )


def is_image_space(space: Any) -> bool:
    """Whether the values of a space are images."""
    return isinstance(space, spaces.Box) and is_image(space.dtype, space.shape)
