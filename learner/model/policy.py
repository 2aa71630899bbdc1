"""The policy: a Hugging Face causal model that scores packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from learner.data.batch import MicroBatch
from learner.model.attention import NAME, hidden_states, register
from learner.model.compatibility import Unfit, examine
from learner.model.linear import use_onednn
from learner.model.logprobs import token_logprobs
from learner.model.lora import Adapter
from learner.model.perception import FAMILIES, Sight
from learner.parallel.ranks import ALONE, Ranks
from learner.parallel.shards import gathered_state, shard
from learner.settings import LoraSettings, ModelSettings
from rollout.wire.adapter import AdapterSpec
from rollout.wire.model_folder import COMPANIONS, companions, pretrained, write_companions
from rollout.wire.trajectory import Float32Array

T = TypeVar("T")

_LEAST_CHUNK = 8  # vocabulary entries at a time, however small the block
_SHARD = "50GB"  # the largest file of weights
_ADAPTER = "adapter"  # folder of the adapter's own tensors, inside that of the merged model


class ModelError(ValueError):
    """A checkpoint that cannot be loaded or trained as it is."""


class Policy:
    """A causal language model as the learner sees it: packed tokens in, logprobs of sampled tokens out.

    Dropout is off, always: the learner's logprobs have to be those of the model that samples. ModelError, in
    one line, for a checkpoint that is missing, broken or incomplete, or that packed rows would train wrongly
    (`learner.model.compatibility`).

    On several ranks the parameters lie over all of them, and whatever computes is said by all ranks together.
    """

    def __init__(self, settings: ModelSettings, ranks: Ranks = ALONE) -> None:
        self.settings = settings
        self.ranks = ranks
        self.device = torch.device(settings.device)
        self.model = _load(settings.path)
        self._files = model_files(settings.path)  # read now: the folder may be gone when they are written
        self.model.eval()
        self.sight = self._sight()
        self._examine()  # the model as it was loaded: what replaces its layers is tested to compute the same
        self.adapter = self._adapt(settings.lora) if settings.lora else None
        self.probe_text: tuple[
            int, ...
        ] = ()  # what every sync is proved with (learner.training.probe), once drawn
        if settings.gradient_checkpointing:
            self._checkpoint_gradients()
        if settings.device == "cpu" and settings.dtype == "float32":
            self._use_onednn()
        self.sharded = None if ranks.size == 1 else shard(self.model, ranks, self._gathered_dtype)
        if self.sharded is None:  # shards are moved one by one: no device has to hold all of them
            nn.Module.to(self.model, self.device)  # the subclass's `to` is untyped

    @classmethod
    def restored(cls, settings: ModelSettings, folder: Path, ranks: Ranks = ALONE) -> Policy:
        """The policy that `save` wrote into `folder`, bit for bit.

        An adapter is put on the base again, which is loaded from where it first came from: `settings.path`.
        """
        if settings.lora is None:
            return cls(settings.model_copy(update={"path": str(folder)}), ranks)
        policy = cls(settings, ranks)
        assert policy.adapter is not None
        try:
            policy.adapter.load(folder / _ADAPTER)
        except ValueError as error:
            raise ModelError(str(error)) from error
        return policy

    def twin(self) -> Policy:
        """Another policy that holds the same."""
        other = Policy(self.settings, self.ranks)
        other.model.load_state_dict(self.model.state_dict())
        return other

    @property
    def context(self) -> int:
        """Longest sequence the model has positions for, tokens."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model knows."""
        return int(self._head.weight.shape[0])

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters, tied ones once, always in the same order."""
        return (p for p in self.model.parameters() if p.requires_grad)

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return int(self._head.weight.shape[1])

    def hidden(self, micro: MicroBatch) -> Tensor:
        """Final hidden states before each scored token of a packed row, [N, D] with gradients."""
        return self._whole(lambda: self._scored(micro))

    def score(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Logprob of each sampled token and entropy of its distribution: float32 [N] each, with gradients."""
        logprobs_N, entropy_N, _ = self.read(micro, temperature)
        return logprobs_N, entropy_N

    def read(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """What `score` gives and, of the same pass, what `hidden` gives."""

        def once() -> tuple[Tensor, Tensor, Tensor]:
            hidden_ND = self._scored(micro)
            return *self._logprobs(hidden_ND, micro.targets_N, temperature, self._sampled_bias()), hidden_ND

        return self._whole(once)

    def score_ids(self, token_ids: Sequence[int]) -> Float32Array:
        """Logprob of each token after the first, at temperature 1: float32 [T - 1]."""
        return self.score_texts(torch.tensor([list(token_ids)]), widest=False)[0]

    @torch.no_grad()
    def score_texts(self, ids_BL: Tensor, widest: bool) -> Float32Array:
        """Logprob of each token after the first of texts of equal length, at temperature 1: float32 [B, L - 1].

        widest: computed in float32 whatever the learner's type, unless `rounds_always`.
        """
        count, length = ids_BL.shape
        ids_BL = ids_BL.to(self.device)

        def score() -> tuple[Tensor, Tensor]:
            hidden_TD = self._plain_rows(ids_BL[:, :-1].flatten(), count, length - 1, widest)
            return self._logprobs(hidden_TD, ids_BL[:, 1:].flatten(), 1.0, self._head.bias)

        logprobs_T, _ = self._whole(score)
        return logprobs_T.unflatten(0, (count, length - 1)).cpu().numpy()

    @torch.no_grad()
    def next_logits(self, ids_BL: Tensor) -> Tensor:
        """Logits [B, V] of what follows each of these texts of equal length."""
        count, length = ids_BL.shape
        ids_T = ids_BL.flatten().to(self.device)

        def score() -> Tensor:
            last_BD = self._plain_rows(ids_T, count, length, False).unflatten(0, (count, length))[:, -1]
            logits_BV: Tensor = nn.functional.linear(last_BD, self._head.weight.to(last_BD.dtype))
            return logits_BV if self._head.bias is None else logits_BV + self._head.bias

        return self._whole(score)

    @property
    def rounds_always(self) -> bool:
        """Whether it cannot compute in float32: shards are gathered as bfloat16."""
        return self.settings.dtype == "bfloat16" and self.ranks.size > 1

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its Hugging Face checkpoint name, detached; a tied head is not repeated.

        With an adapter they are the merged ones, all of them in memory at once beside the base. On several ranks each
        lies over all of them: `learner.parallel.shards.gathered` makes it whole.
        """
        own = {name: parameter.detach() for name, parameter in self._merged(self.model.named_parameters())}
        yield from revert_weight_conversion(self.model, own).items()

    def published(self) -> tuple[AdapterSpec | None, Iterator[tuple[str, Tensor]]]:
        """What engines are sent: every weight, or an adapter alone and what it belongs to."""
        if self.adapter is not None and self.adapter.settings.sync == "adapter":
            return self.adapter.spec, self.adapter.tensors()
        return None, self.named_weights()

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write a Hugging Face folder: the weights beside the files the model came with, as they came.

        With an adapter the weights are the merged ones, and it lies beside them. weights: `whole_state`, which all
        ranks have to be asked for before rank 0 writes.
        """
        if weights is None:
            weights = dict(self._merged(self.model.state_dict().items()))
        folder.mkdir(parents=True, exist_ok=True)
        kept = revert_weight_conversion(
            self.model, remove_tied_weights_from_state_dict(dict(weights), self.model)
        )
        save_torch_state_dict(kept, folder, max_shard_size=_SHARD)
        write_companions(self._files, folder)
        if self.adapter is not None:
            self.adapter.save(folder / _ADAPTER)

    def whole_state(self) -> dict[str, Tensor] | None:
        """Parameters that lie over several ranks, gathered in rank 0's host memory; None where they do not."""
        return None if self.sharded is None else gathered_state(self.model, self.ranks)

    @property
    def _head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    def _whole(self, compute: Callable[[], T]) -> T:
        """Do this where every parameter can be used."""
        return compute() if self.sharded is None else self.sharded.use(compute)

    @property
    def _gathered_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.settings.dtype == "bfloat16" else None

    def _autocast(self) -> torch.autocast:
        # Shards are gathered as bfloat16 already.
        enabled = self.settings.dtype == "bfloat16" and self.ranks.size == 1
        return torch.autocast(self.settings.device, torch.bfloat16, enabled=enabled)

    def _hidden(self, ids_T: Tensor, cu_seqlens_B: Tensor, longest: int, **beside: Tensor) -> Tensor:
        """Final hidden states [T, D] of a packed row, without the logits of the whole row.

        beside: positions, and what the model perceives.
        """
        with self._autocast():
            hidden_TD = hidden_states(self.model, ids_T, cu_seqlens_B, longest, **beside)
        # The head's product runs in the hidden state's type; a normalization leaves it wide under autocast.
        return hidden_TD.to(torch.bfloat16) if self.settings.dtype == "bfloat16" else hidden_TD

    def _plain_rows(self, ids_T: Tensor, count: int, length: int, widest: bool) -> Tensor:
        """Final hidden states [T, D] of `count` texts of `length` tokens, without pictures."""
        borders = torch.arange(count + 1, dtype=torch.int32, device=self.device) * length
        places_T = torch.arange(length, device=self.device).repeat(count)
        if widest and not self.rounds_always:
            return hidden_states(self.model, ids_T, borders, length, position_ids=places_T[None])
        return self._hidden(ids_T, borders, length, position_ids=places_T[None])

    def _scored(self, micro: MicroBatch) -> Tensor:
        beside = {"position_ids": micro.position_ids_T[None]} | self._perceived(micro)
        hidden_TD = self._hidden(micro.input_ids_T, micro.cu_seqlens_B, micro.longest, **beside)
        return hidden_TD.index_select(0, micro.score_index_N)

    def _perceived(self, micro: MicroBatch) -> dict[str, Tensor]:
        if self.sight is not None:
            return self.sight.inputs(micro)
        if seen := next(filter(None, micro.seen_B), None):
            raise ModelError(
                f"model {self.settings.path!r} reads text alone, but {seen.where} shows pictures"
            )
        return {}

    def _sampled_bias(self) -> Tensor | None:
        """What is added to the logits of sampled tokens: engines leave placeholders out of what they sample from."""
        bias_V = self._head.bias
        if self.sight is None:
            return bias_V
        never_V = self.sight.bias(self.vocab_size, self.device)
        return never_V if bias_V is None else bias_V + never_V

    def _logprobs(
        self, hidden_ND: Tensor, targets_N: Tensor, temperature: float, bias_V: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        chunk = max(self.settings.logit_block // max(len(hidden_ND), 1), _LEAST_CHUNK)
        return token_logprobs(hidden_ND, self._head.weight, bias_V, targets_N, temperature, chunk)

    def _sight(self) -> Sight | None:
        kind = self.model.config.model_type
        if getattr(self.model.config, "vision_config", None) is None:
            return None
        if kind not in FAMILIES:
            raise ModelError(
                f"model {self.settings.path!r} sees and is of the family {kind}; only of {', '.join(FAMILIES)} is it "
                "known that pictures in a packed row are computed as they are alone"
            )
        if self.ranks.size > 1 or self.settings.lora:
            raise ModelError(f"model {self.settings.path!r} sees: it takes learner.ranks=1 and no lora")
        return Sight(self.model, self.settings.path)

    def _adapt(self, settings: LoraSettings) -> Adapter:
        try:
            return Adapter(self.model, settings)
        except ValueError as error:
            raise ModelError(f"model {self.settings.path!r}: {error}") from error

    def _merged(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        return tensors if self.adapter is None else self.adapter.merged(tensors)

    def _checkpoint_gradients(self) -> None:
        """Have every layer computed again in the backward pass.

        transformers' own switch does so in training mode alone, and with that mode come dropout and router noise.
        """
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise ModelError(
                f"model {self.settings.path!r} has no layers that can be computed again; "
                "set learner.model.gradient_checkpointing=false"
            )
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def _use_onednn(self) -> None:
        try:
            use_onednn(
                self.model.base_model, leave=self._head
            )  # the base of some families is the whole model
        except ValueError as error:
            raise ModelError(str(error)) from error

    def _examine(self) -> None:
        try:
            examine(self.model)
        except Unfit as error:
            raise ModelError(f"model {self.settings.path!r} cannot be trained: {error}") from error


def _load(path: str) -> PreTrainedModel:
    """The model in float32 with packed attention, or one line saying what is wrong with it."""
    if not path:
        raise ModelError(
            "no model to learn: set the model's path to a checkpoint folder or a Hugging Face id"
        )
    try:
        config = pretrained(AutoConfig, path)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its weights are quantized and cannot be trained; choose unquantized ones")
        sees = getattr(config, "vision_config", None) is not None
        kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        # A vision tower has no packed rows.
        attention: Any = {"text_config": register()} if sees else register()
        loaded: Any = pretrained(
            kind, path, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if error.args == (NAME,):
            reason = "its family has no attention but its own, which packed rows cannot use; choose another"
        raise ModelError(f"model {path!r} cannot be loaded: {reason}") from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ModelError(f"model {path!r} lacks {len(missing)} weights, {missing[0]} among them")
    head = model.get_output_embeddings()
    of_both = (config, config.get_text_config())  # of a model that sees, one of them alone may say it
    said = [each.tie_word_embeddings for each in of_both if hasattr(each, "tie_word_embeddings")]
    if said and all(said) and head is not None and head.weight is not model.get_input_embeddings().weight:
        raise ModelError(
            f"model {path!r} says tie_word_embeddings=true, but its files hold a head of another value, which engines "
            "leave out; set it to false in config.json, or take the head out of the files"
        )
    return model


def model_files(path: str) -> dict[str, bytes]:
    """The files a model came with beside its weights; of a hub id those of its folder's top, and its templates."""
    try:
        if Path(path).is_dir():
            return companions(Path(path))
        below = [f"*/{pattern}" for pattern in COMPANIONS if "/" not in pattern]
        return companions(
            Path(snapshot_download(path, allow_patterns=list(COMPANIONS), ignore_patterns=below))
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(f"model {path!r}: its files cannot be read: {str(error).splitlines()[0]}") from error
