"""Prompts with pictures for vLLM, which has a processor of its own: one placeholder a picture goes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rollout.engines.engine import EngineFailed

if TYPE_CHECKING:
    from rollout.chat.perception import Perception


def prompt(perception: Perception | None, token_ids: Sequence[int], images: Sequence[str]) -> dict[str, Any]:
    """What vLLM is given of these tokens, in which a placeholder stands for every feature."""
    if perception is None:
        raise EngineFailed("asked about a picture, but the model reads text alone")
    pictures = {"image": perception.opened(images)}
    return {"prompt_token_ids": perception.collapsed(token_ids, images), "multi_modal_data": pictures}


def require_same(token_ids: Sequence[int], read: Sequence[int], images: Sequence[str]) -> None:
    """EngineFailed where vLLM has put other placeholders into the prompt than were counted."""
    if list(read) != list(token_ids):
        raise EngineFailed(
            f"vLLM reads {len(read)} prompt tokens with {len(images)} pictures, where the model's processor makes "
            f"{len(token_ids)}"
        )


def never_sampled(perception: Perception | None) -> dict[int, float] | None:
    """What is added to logits: e^-100 of a placeholder's probability is left, the least that vLLM takes."""
    return None if perception is None else {perception.placeholder_id: -100.0}
