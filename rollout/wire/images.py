"""The pictures in an observation: parts of messages, each a data URL. Facts, stored with the turn that saw them.

{"role": "user", "content": [{"type": "text", "text": "..."}, {"type": "image", "image": "data:image/png;..."}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

PREFIX = "data:image/"
MAX_IMAGE_BYTES = 4 * 2**20  # of one picture's data URL
MAX_EPISODE_BYTES = 64 * 2**20  # of all an episode's: thirty such siblings still fit into one Arrow column


def images_of(messages: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The data URLs of the pictures in these messages, in order. ValueError for a picture in another form."""
    contents = (message["content"] for message in messages)
    parts = [part for content in contents if isinstance(content, list) for part in content]
    images = tuple(part.get("image", "") for part in parts if part["type"] == "image")
    for image in images:
        if not isinstance(image, str) or not image.startswith(PREFIX):
            raise ValueError(f"a picture is a data URL that begins with {PREFIX}, got {str(image)[:40]!r}")
        if len(image) > MAX_IMAGE_BYTES:
            raise ValueError(
                f"a picture of {len(image)} bytes as a data URL; {MAX_IMAGE_BYTES} are the most: make it smaller"
            )
    return images


def images_in(observation: str) -> tuple[str, ...]:
    """The same of an observation as it is stored, JSON; text without pictures is not parsed."""
    return images_of(json.loads(observation)) if PREFIX in observation else ()
