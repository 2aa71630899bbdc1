"""Inputs of vision models for a packed row: features of its pictures, positions of its sequences.

Pictures are processed by the model's own image processor and concatenated in the order of the row's sequences, which
is that of their placeholders. Positions are computed for each sequence alone (M-RoPE, Wang et al. 2024, section 2.1,
gives the tokens of a picture rows and columns), so that packing does not change a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel

from learner.data.batch import MicroBatch, SequencePictures
from learner.model.loading import ModelError
from learner.settings import ModelSettings
from rollout.wire.images import png_of
from rollout.wire.model_folder import pretrained

# Families with causal attention over pictures and features concatenated picture by picture; each is tested against its
# own unpacked computation.
FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_CACHED_IMAGES = 256  # features kept for further passes over a batch


class RowMismatch(ValueError):
    """A row whose placeholders do not match the features of its pictures; the message names it."""


def picture_inputs(
    model: PreTrainedModel, folder: str, settings: ModelSettings, ranks: int
) -> PictureInputs | None:
    """Of a model that sees; None: it takes text alone. ValueError, one line, for one that cannot be learned."""
    kind, is_one = model.config.model_type, f"model {settings.path!r} is a vision model"
    if getattr(model.config, "vision_config", None) is None:
        return None
    if kind not in FAMILIES:
        raise ValueError(f"{is_one} of the family {kind}; supported are {', '.join(FAMILIES)}")
    if ranks > 1 or settings.lora:
        raise ValueError(f"{is_one}; use learner.ranks=1 and no learner.model.lora")
    return PictureInputs(model, folder, settings.trust_remote_code)


def inputs_beside(micro: MicroBatch, pictures: PictureInputs | None, named: str) -> dict[str, Tensor]:
    """The model's inputs of a row besides ids; pictures: None for a model that takes text alone.

    named: the model in errors. ModelError for pictures that it does not take.
    """
    positions = {"position_ids": micro.position_ids_T[None]}
    if pictures is not None:
        return positions | pictures.inputs(micro)
    if shown := next(filter(None, micro.pictures_B), None):
        raise ModelError(
            f"model {named!r} takes text only, but {shown.where} has pictures; choose a vision model"
        )
    return positions


class PictureInputs:
    """Makes the inputs of a vision model for packed rows, by its image processor."""

    def __init__(self, model: PreTrainedModel, path: str, trusted: bool) -> None:
        self.processor: Any = pretrained(AutoImageProcessor, path, trusted)
        self.placeholder_id = int(model.config.image_token_id)
        self._merge = getattr(self.processor, "merge_size", 1)
        self._positions_of: Callable[..., tuple[Tensor, Tensor]] | None = getattr(
            model.base_model, "get_rope_index", None
        )
        self._per_picture = getattr(model.config, "image_seq_length", 0)
        self._features = lru_cache(_CACHED_IMAGES)(self._processed)

    def inputs(self, micro: MicroBatch) -> dict[str, Tensor]:
        """The model's inputs of a row besides ids; RowMismatch if placeholders and features differ in number."""
        if not micro.pictures_B:
            return {}
        features: list[dict[str, Tensor]] = []
        positions = []
        for item, brought in micro.tree.brought:  # depth first: as the placeholders lie in the row
            pictures = micro.pictures_B[item]
            ids_T = micro.input_ids_T[torch.from_numpy(micro.tree.paths_B[item]).to(micro.input_ids_T.device)]
            found = [self._features(image) for image in (pictures.images if pictures else ())]
            self._check(ids_T, found, pictures)
            features += found[self._pictures_in(ids_T[:brought], found, pictures) :]
            positions.append(self._positions(ids_T, found)[..., brought:])
        device = micro.input_ids_T.device
        joined = {name: torch.cat([each[name] for each in features]).to(device) for name in features[0]}
        if self._positions_of is not None:
            joined["position_ids"] = torch.cat(positions, dim=-1)
        return joined

    def _positions(self, ids_T: Tensor, features: list[dict[str, Tensor]]) -> Tensor:
        """Positions of one sequence: int64 [3, 1, T]."""
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

    def _pictures_in(
        self, ids_T: Tensor, features: list[dict[str, Tensor]], pictures: SequencePictures | None
    ) -> int:
        """The number of pictures whose placeholders are among these first tokens of a sequence."""
        sums = [0, *accumulate(map(self._count, features))]
        shown = int((ids_T == self.placeholder_id).sum())
        if shown not in sums:
            raise RowMismatch(
                f"{pictures.where if pictures else 'a row without pictures'}: the image tokens of a picture are not in "
                "one piece"
            )
        return sums.index(shown)

    def _check(
        self, ids_T: Tensor, features: list[dict[str, Tensor]], pictures: SequencePictures | None
    ) -> None:
        found, made = int((ids_T == self.placeholder_id).sum()), sum(map(self._count, features))
        if found != made:
            where = pictures.where if pictures else "a row without pictures"
            raise RowMismatch(
                f"{where}: {found} image tokens, but the processor makes {made} features of {len(features)} pictures; "
                "use the processor of the model that sampled it"
            )

    def _count(self, features: dict[str, Tensor]) -> int:
        """The number of features of a picture: one for each merged patch."""
        grid = features.get("image_grid_thw")
        return self._per_picture if grid is None else int(grid.prod()) // self._merge**2

    def _processed(self, image: str) -> dict[str, Tensor]:
        opened = Image.open(BytesIO(png_of(image))).convert("RGB")
        inputs = self.processor(images=[opened], return_tensors="pt")
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
