"""Pictures for a model with vision, by its own processor: placeholders in the prompt, features for the engine.

A template writes one placeholder per picture; the model needs one per feature of the picture. Both are counted when a
prompt is built, so that placeholders and features of every stored row agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rollout.chat.template import ChatError
from rollout.wire.images import png_of
from rollout.wire.model_folder import pretrained

Features = dict[str, NDArray[Any]]

_CACHED_IMAGES = 64  # features: siblings share the first picture, and every turn needs all of its segment's


class PerceptionError(ChatError):
    """Pictures that cannot be encoded for a model."""


class Processor(Protocol):
    """The part of a Hugging Face processor (`ProcessorMixin`) that is used here."""

    image_processor: Any
    image_token: str
    image_token_id: int

    def replace_image_token(self, image_inputs: Any, image_idx: int) -> str: ...


class Perception:
    """A model's own processor. placeholder_id: the token that represents one feature of a picture."""

    def __init__(self, processor: Processor) -> None:
        self.placeholder_id = processor.image_token_id
        self._token = processor.image_token
        self._processor = processor
        self._features = lru_cache(_CACHED_IMAGES)(self._processed)

    @classmethod
    def load(cls, path: str, trusted: bool = False) -> Perception | None:
        """Load the processor of a checkpoint folder; None for a model without vision.

        trusted: code that comes with the model may be executed.
        """
        from transformers import (
            AutoConfig,
            AutoProcessor,
        )  # with all that they import, for models that see alone

        if getattr(pretrained(AutoConfig, path, trusted), "vision_config", None) is None:
            return None
        try:
            return cls(pretrained(AutoProcessor, path, trusted))
        except (ImportError, AttributeError, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise PerceptionError(
                f"the processor of {path} cannot be loaded (some need torchvision): {reason}"
            ) from error

    def spelled(self, text: str, images: Sequence[str]) -> str:
        """Repeat the placeholders in a rendered text: one for each feature of each picture."""
        pieces = text.split(self._token)
        if len(pieces) != len(images) + 1:
            raise PerceptionError(
                f"{len(images)} pictures, but the rendered text has {len(pieces) - 1} times {self._token}: an "
                "observation must not contain it, and the chat template must write it once per picture"
            )
        placeholders = [self._token * self.count(image) for image in images]
        return pieces[0] + "".join(
            placeholder + piece for placeholder, piece in zip(placeholders, pieces[1:], strict=True)
        )

    def check(self, token_ids: Sequence[int], images: Sequence[str]) -> None:
        """Raise PerceptionError unless these tokens have one placeholder for each feature of the pictures."""
        found, made = list(token_ids).count(self.placeholder_id), sum(map(self.count, images))
        if found != made:
            raise PerceptionError(
                f"{found} image tokens, but the processor makes {made} features of {len(images)} pictures"
            )

    def count(self, image: str) -> int:
        """Number of placeholders of a picture: the number of its features."""
        return self._features(image)[0]

    def features(self, images: Sequence[str]) -> Features:
        """Input arrays of these pictures for a transformers model, concatenated in order; empty without pictures."""
        found = [self._features(image)[1] for image in images]
        names = found[0] if found else ()
        return {name: np.concatenate([each[name] for each in found]) for name in names}

    def collapsed(self, token_ids: Sequence[int], images: Sequence[str]) -> list[int]:
        """Collapse the placeholders of a prompt to one per picture, as vLLM expects: it has its own processor."""
        self.check(token_ids, images)
        kept: list[int] = []
        counts = iter(images)
        passing = 0  # placeholders left of the current picture
        for token in token_ids:
            if token != self.placeholder_id:
                kept.append(token)
            elif passing:
                passing -= 1
            else:
                kept.append(token)
                passing = self.count(next(counts)) - 1
        return kept

    def opened(self, images: Sequence[str]) -> list[Any]:
        """Decode the pictures with PIL."""
        return [Image.open(BytesIO(png_of(image))).convert("RGB") for image in images]

    def _processed(self, image: str) -> tuple[int, Features]:
        try:
            inputs = self._processor.image_processor(images=self.opened([image]), return_tensors="np")
        except (ValueError, OSError) as error:  # not a picture, or one that this processor refuses
            raise PerceptionError(f"a picture cannot be read: {error}") from error
        placeholders = self._processor.replace_image_token(inputs, image_idx=0)
        count = placeholders.count(self._token)
        if placeholders != self._token * count:
            raise PerceptionError(
                f"{type(self._processor).__name__} puts other tokens than {self._token} into a picture's place; such "
                "a family is not supported"
            )
        return count, {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
