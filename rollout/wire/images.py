"""Pictures in an observation: parts of messages, each a PNG as a data URL, stored with the turn that shows them.

    {"role": "user", "content": [{"type": "text", "text": "..."}, {"type": "image", "image": "data:image/png;..."}]}

Sizes are checked here against the PNG header, so that code that decodes a picture can rely on them.
"""

from __future__ import annotations

import json
import struct
from base64 import b64decode
from collections.abc import Iterable, Mapping
from typing import Any

PREFIX = "data:image/png;base64,"
MAX_IMAGE_BYTES = 4 * 2**20  # of one picture's data URL
MAX_PIXELS = 2**24  # of one picture once it is decoded
MAX_EPISODE_BYTES = (
    64 * 2**20
)  # of all pictures of an episode: thirty such siblings still fit into one Arrow column


def images_of(messages: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the data URLs of the pictures in these messages, in order. ValueError: one is no PNG URL, or too large."""
    contents = (message.get("content") for message in messages)
    parts = [part for content in contents if isinstance(content, list) for part in content]
    if not all(isinstance(part, dict) and "type" in part for part in parts):
        raise ValueError(
            "a part of a message has no type; write {'type': 'text', 'text': ...} or {'type': 'image', ...}"
        )
    images = tuple(part.get("image", "") for part in parts if part["type"] == "image")
    for image in images:
        height, width = _size(image)
        if len(image) > MAX_IMAGE_BYTES or height * width > MAX_PIXELS:
            raise ValueError(
                f"a picture has {height} x {width} pixels and {len(image)} bytes as a data URL, more than {MAX_PIXELS} "
                f"pixels or {MAX_IMAGE_BYTES} bytes; make it smaller"
            )
    return images


def png_of(image: str) -> bytes:
    """Return the file's bytes of a data URL."""
    return b64decode(image.removeprefix(PREFIX))


def _size(image: object) -> tuple[int, int]:
    """Height and width from the PNG header (ISO 15948, section 11.2.2)."""
    if not isinstance(image, str) or not image.startswith(PREFIX):
        raise ValueError(f"a picture is a data URL that begins with {PREFIX}, got {str(image)[:40]!r}")
    try:
        header = b64decode(image[len(PREFIX) : len(PREFIX) + 32], validate=True)
        signature, width, height = struct.unpack(">8s8xII", header)
    except (ValueError, struct.error) as error:
        raise ValueError(f"a picture is not a PNG: {error}") from error
    if signature != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"a picture is not a PNG: it begins with {signature!r}")
    return height, width


def images_in(observation: str) -> tuple[str, ...]:
    """`images_of` for a stored observation (JSON); one without pictures is not parsed."""
    return images_of(json.loads(observation)) if PREFIX in observation else ()
