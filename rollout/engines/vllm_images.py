"""Prompts with pictures for vLLM, which has its own processor and expects one placeholder per picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rollout.engines.engine import EngineFailed

if TYPE_CHECKING:
    from rollout.chat.perception import Perception


def prompt(perception: Perception | None, token_ids: Sequence[int], images: Sequence[str]) -> dict[str, Any]:
    """Build vLLM's prompt from tokens with one placeholder per feature."""
    if perception is None:
        raise EngineFailed("a request has a picture, but the model reads text only")
    pictures = {"image": perception.opened(images)}
    return {"prompt_token_ids": perception.collapsed(token_ids, images), "multi_modal_data": pictures}


def require_same(token_ids: Sequence[int], read: Sequence[int], images: Sequence[str]) -> None:
    """Raise EngineFailed if vLLM has expanded the placeholders differently."""
    if list(read) != list(token_ids):
        raise EngineFailed(
            f"vLLM makes {len(read)} prompt tokens with {len(images)} pictures, but the model's processor makes "
            f"{len(token_ids)}"
        )


def never_sampled(perception: Perception | None) -> dict[int, float] | None:
    """Bias of logits that suppresses placeholders: -100 is the lowest value that vLLM accepts."""
    return None if perception is None else {perception.placeholder_id: -100.0}
