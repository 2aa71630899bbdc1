"""How a model that sees computes a packed row: features of its pictures, positions of its sequences.

Pictures are processed by the model's own image processor and concatenated in the order of the row's sequences, which
is that of their placeholders. Positions are the model's own for every sequence by itself (M-RoPE, Wang et al. 2024,
section 2.1, gives the tokens of a picture rows and columns), so that a packed sequence is computed as if it were alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel

from learner.data.batch import MicroBatch, Seen
from rollout.wire.images import png_of
from rollout.wire.model_folder import pretrained

# Families whose pictures attend as text does and whose features are concatenated picture after picture: every one of
# them is tested against its own unpacked computation.
FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_CACHED_IMAGES = 256  # their features: several passes over a batch look at the same ones
_NEVER = -1e4  # added to a logit: exp of it is zero, and zero times it is not NaN


class RowMismatch(ValueError):
    """A row whose placeholders are not those of its pictures; the message names it."""


class Sight:
    """The image processor of a model that sees."""

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        self.processor: Any = pretrained(AutoImageProcessor, path)
        self.placeholder_id = int(model.config.image_token_id)
        self._merge = getattr(self.processor, "merge_size", 1)
        self._positions_of: Callable[..., tuple[Tensor, Tensor]] | None = getattr(
            model.base_model, "get_rope_index", None
        )
        self._per_picture = getattr(model.config, "image_seq_length", 0)
        self._features = lru_cache(_CACHED_IMAGES)(self._processed)

    def inputs(self, micro: MicroBatch) -> dict[str, Tensor]:
        """What the model is given of a row beside ids; RowMismatch where placeholders and features do not agree."""
        if not micro.seen_B:
            return {}
        borders = micro.cu_seqlens_B.tolist()
        features: list[dict[str, Tensor]] = []
        positions = []
        for seen, start, stop in zip(micro.seen_B, borders[:-1], borders[1:], strict=True):
            ids_T = micro.input_ids_T[start:stop]
            found = [self._features(image) for image in (seen.images if seen else ())]
            self._check(ids_T, found, seen)
            features += found
            positions.append(self._positions(ids_T, found))
        device = micro.input_ids_T.device
        joined = {name: torch.cat([each[name] for each in features]).to(device) for name in features[0]}
        if self._positions_of is not None:
            joined["position_ids"] = torch.cat(positions, dim=-1)
        return joined

    def bias(self, vocab_size: int, device: torch.device) -> Tensor:
        """What is added to logits [V]: no engine samples a placeholder."""
        bias_V = torch.zeros(vocab_size, device=device)
        bias_V[self.placeholder_id] = _NEVER
        return bias_V

    def _positions(self, ids_T: Tensor, features: list[dict[str, Tensor]]) -> Tensor:
        """Of one sequence: int64 [3, 1, T]."""
        if self._positions_of is None:
            return ids_T
        if not features:
            return torch.arange(len(ids_T), device=ids_T.device).expand(3, 1, -1)
        grids = [name for name in features[0] if name.endswith("grid_thw")]
        positions, _ = self._positions_of(
            ids_T[None],
            mm_token_type_ids=(ids_T == self.placeholder_id).int()[None],
            **{name: torch.cat([each[name] for each in features]).to(ids_T.device) for name in grids},
        )
        return positions

    def _check(self, ids_T: Tensor, features: list[dict[str, Tensor]], seen: Seen | None) -> None:
        found, made = int((ids_T == self.placeholder_id).sum()), sum(map(self._count, features))
        if found != made:
            where = seen.where if seen else "a row without pictures"
            raise RowMismatch(
                f"{where}: {found} image tokens, but the processor makes {made} features of {len(features)} pictures; "
                "was it sampled by a model with another processor?"
            )

    def _count(self, features: dict[str, Tensor]) -> int:
        """How many features the model makes of a picture: of every merged patch one."""
        grid = features.get("image_grid_thw")
        return self._per_picture if grid is None else int(grid.prod()) // self._merge**2

    def _processed(self, image: str) -> dict[str, Tensor]:
        opened = Image.open(BytesIO(png_of(image))).convert("RGB")
        inputs = self.processor(images=[opened], return_tensors="pt")
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
