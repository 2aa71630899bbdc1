"""A reward model from its folder: conversations to scores, in the tokens that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from deploy.assembly.build import load_chat
from deploy.config.config_errors import ConfigError
from envs.datasets.conversations import Conversation, of_row
from envs.datasets.files import DataError

TOKENS = 16_384  # of one forward pass, padding included


class Unscorable(ValueError):
    """A conversation that cannot be scored; the message says why, in one line."""


class RewardScorer:
    """Any classifier of one label that transformers loads, with a chat template beside it.

    ConfigError for a folder that holds none.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        try:
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} holds no reward model: {str(error).splitlines()[0]}") from error
        model, info = loaded
        if info["missing_keys"]:
            raise ConfigError(
                f"{folder} is a language model, without the head of a reward model; give another folder"
            )
        if model.config.num_labels != 1:
            raise ConfigError(f"{folder} has {model.config.num_labels} labels; a reward model has one")
        self._model = model.eval().to(device)
        self._chat = load_chat(str(folder))
        self._context = int(model.config.get_text_config().max_position_embeddings)
        self._padding: int | None = model.config.get_text_config().pad_token_id

    def tokens(self, conversation: Sequence[dict[str, Any]], tools: Sequence[Any] = ()) -> list[int]:
        """Tokens up to the end of the assistant's last turn. Unscorable for what is no such conversation.

        tools: JSON schemas of the tools that were offered.
        """
        try:
            (talk,) = of_row({"messages": list(conversation), "tools": list(tools)}, "conversation")
            ids = self._tokens(talk)
        except (DataError, ValueError) as error:  # a template's refusal is a ValueError too
            raise Unscorable(str(error)) from error
        if len(ids) > self._context:
            raise Unscorable(
                f"a conversation of {len(ids)} tokens exceeds the model's context of {self._context}"
            )
        return ids

    def _tokens(self, talk: Conversation) -> list[int]:
        ids: list[int] = []
        said: tuple[int, ...] = ()
        for heard, answer in talk.turns:
            ids += self._chat.delta(heard, said) if ids else self._chat.opening(heard)
            said = self._chat.encode_action(answer)
            ids += said
        return ids

    @torch.no_grad()
    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Scores of tokenized conversations, in their order; those of alike length are computed together."""
        found = [0.0] * len(rows)
        for part in self._parts(rows):
            longest = max(len(rows[place]) for place in part)
            ids_BL = torch.full((len(part), longest), self._padding or 0)
            mask_BL = torch.zeros_like(ids_BL)
            for line, place in enumerate(part):
                ids_BL[line, : len(rows[place])] = torch.tensor(rows[place])
                mask_BL[line, : len(rows[place])] = 1
            device = self._model.device
            logits_B1 = self._model(ids_BL.to(device), attention_mask=mask_BL.to(device)).logits
            for place, score in zip(part, logits_B1[:, 0].float().tolist(), strict=True):
                found[place] = score
        return found

    def _parts(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Places of the rows of each forward pass: without a padding token a row alone."""
        most = TOKENS if self._padding is not None else 0
        parts: list[list[int]] = []
        for place in sorted(range(len(rows)), key=lambda place: len(rows[place]), reverse=True):
            if parts and len(rows[parts[-1][0]]) * (len(parts[-1]) + 1) <= most:
                parts[-1].append(place)
            else:
                parts.append([place])
        return parts
