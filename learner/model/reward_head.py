"""A reward model: a policy's trunk and one number on the hidden state of a conversation's last token.

It is written as transformers classifies sequences (`AutoModelForSequenceClassification`, one label): that class scores
the last token that is no padding. A padding token that ends conversations, as in many chat models, is therefore
replaced by another special token in the written configuration.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

SCORE = "score.weight"  # its name among the weights, in every family


class RewardHead(nn.Module):
    """A linear layer without bias, in float32. It begins as zeros: all conversations are worth the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Rewards [N] of hidden states [N, D]."""
        rewards_N1: Tensor = self.score(hidden_ND.to(torch.float32))
        return rewards_N1[:, 0]


def classifier_of(model_type: str) -> str:
    """transformers' class of this family that classifies sequences. ValueError where there is none."""
    found = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type)
    if found is None:
        raise ValueError(
            f"transformers has no sequence classification for the family {model_type!r}; train the reward model from "
            "another base, such as llama or qwen2"
        )
    return str(found)


def classifier_files(
    files: Mapping[str, bytes], model_type: str, last_tokens: Collection[int]
) -> dict[str, bytes]:
    """A policy's files beside the weights, changed to those of a classifier of one label.

    last_tokens: ids that conversations end with. If no other special token is left for padding there is none, and
    transformers then scores one conversation at a time.
    """
    config = json.loads(files["config.json"])
    padding = _padding(files, config.get("pad_token_id"), last_tokens)
    config |= {
        "architectures": [classifier_of(model_type)],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "pad_token_id": padding and padding[0],
    }
    changed = {**files, "config.json": _json(config)}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if padding is not None and name in files:
            changed[name] = _json(json.loads(files[name]) | {"pad_token": padding[1]})
    return changed


def _padding(
    files: Mapping[str, bytes], present: int | None, last_tokens: Collection[int]
) -> tuple[int, str] | None:
    """Id and text of the padding token: the present one, or the first special token that ends no conversation."""
    tokenizer: dict[str, Any] = json.loads(files.get("tokenizer.json", b"{}"))
    special = {
        each["id"]: str(each["content"]) for each in tokenizer.get("added_tokens", ()) if each.get("special")
    }
    free = [token for token in sorted(special) if token not in last_tokens]
    if present is not None and present in free:
        return present, special[present]
    return (free[0], special[free[0]]) if free else None


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode()
