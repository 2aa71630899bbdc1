"""A model's weights as files of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from learner.model.reward_head import SCORE

_LARGEST_FILE = "50GB"


def write_weights(model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write whole weights of the model, and a reward head's beside them, under the names of checkpoints.

    weights: by the names of the model's state; tied ones are written once.
    """
    head = {name: tensor for name, tensor in weights.items() if name == SCORE}
    own = {name: tensor for name, tensor in weights.items() if name != SCORE}
    kept = revert_weight_conversion(model, remove_tied_weights_from_state_dict(own, model)) | head
    folder.mkdir(parents=True, exist_ok=True)
    alone = {name: _with_own_storage(tensor) for name, tensor in kept.items()}
    save_torch_state_dict(alone, folder, max_shard_size=_LARGEST_FILE)


def _with_own_storage(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a part of a larger one, as an expert's matrix is: such a view cannot be saved."""
    return tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()
