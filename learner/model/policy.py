"""The policy: a Hugging Face causal model that scores packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
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

from learner.data.batch import MicroBatch
from learner.data.prefix_tree import PrefixTree
from learner.model.attention import NAME, hidden_states, register
from learner.model.compatibility import require_compatible
from learner.model.divergence import Head, Opposite, divergence
from learner.model.linear import use_onednn
from learner.model.logprobs import token_logprobs
from learner.model.lora import Adapter
from learner.model.perception import picture_inputs
from learner.model.reward_head import classifier_files
from learner.model.saving import write_weights
from learner.model.source import local_model
from learner.parallel.auxiliary import AuxiliaryModule
from learner.parallel.ranks import ALONE, Ranks
from learner.parallel.shards import gathered_state, shard
from learner.settings import ModelSettings
from rollout.wire.adapter import AdapterSpec
from rollout.wire.model_folder import companions, pretrained, token_count, write_companions
from rollout.wire.trajectory import Float32Array

T = TypeVar("T")

_LEAST_CHUNK = 8  # vocabulary entries at a time, at least
_NEVER = -1e4  # added to a logit: exp of it is zero, and zero times it is not NaN
_ADAPTER = "adapter"  # folder of the adapter's own tensors, inside that of the merged model


class ModelError(ValueError):
    """A checkpoint that cannot be loaded or trained; the message says why, in one line."""


@contextmanager
def _as_model_error(prefix: str = "") -> Iterator[None]:
    """Turn a ValueError into ModelError."""
    try:
        yield
    except ValueError as error:
        raise ModelError(f"{prefix}{error}") from error


class Policy:
    """The learner's causal language model: packed tokens in, logprobs of sampled tokens out.

    Dropout is always off: the learner's logprobs must be those of the model that samples. ModelError, one line, for a
    checkpoint that is missing, broken or incomplete, or incompatible with packed rows (`learner.model.compatibility`).

    On several ranks the parameters are sharded over all of them, and every computation is a collective call.
    """

    def __init__(self, settings: ModelSettings, ranks: Ranks = ALONE) -> None:
        self.settings = settings
        self.ranks = ranks
        self.device = torch.device(settings.device)
        folder, self.model = _load(settings)
        # Read now: the folder may be removed before they are written.
        self._files = companions(folder)
        self.model.eval()
        with _as_model_error(f"model {settings.path!r} is a vision model"):
            self.picture_inputs = picture_inputs(self.model, str(folder), settings, ranks.size)
        with _as_model_error(f"model {settings.path!r}: "):
            self._tokens = token_count(str(folder))
        # The model as loaded: layers that are replaced below are tested to compute the same.
        with _as_model_error(f"model {settings.path!r} cannot be trained: "):
            require_compatible(self.model)
        with _as_model_error(f"model {settings.path!r}: "):
            self.adapter = Adapter(self.model, settings.lora) if settings.lora else None
        # The probe of every weight sync (learner.training.probe), once drawn.
        self.probe_text: tuple[int, ...] = ()
        self._reward_head: AuxiliaryModule | None = None
        if settings.gradient_checkpointing:
            self._checkpoint_gradients()
        if settings.device == "cpu" and settings.dtype == "float32":
            with _as_model_error():  # in some families the base is the whole model
                use_onednn(self.model.base_model, leave=self._head)
        gathered = torch.bfloat16 if settings.dtype == "bfloat16" else None
        self.sharded = None if ranks.size == 1 else shard(self.model, ranks, gathered)
        if self.sharded is None:  # shards are moved one by one, so that no device has to hold all parameters
            nn.Module.to(self.model, self.device)  # the subclass's `to` is untyped

    @classmethod
    def restored(cls, settings: ModelSettings, folder: Path, ranks: Ranks = ALONE) -> Policy:
        """Load the policy that `save` wrote into `folder`, bit for bit.

        An adapter is added to its base, which is loaded from `settings.path`.
        """
        if settings.lora is None:
            return cls(settings.model_copy(update={"path": str(folder)}), ranks)
        policy = cls(settings, ranks)
        assert policy.adapter is not None
        with _as_model_error():
            policy.adapter.load(folder / _ADAPTER)
        return policy

    def twin(self) -> Policy:
        """A copy of this policy."""
        other = Policy(self.settings, self.ranks)
        other.model.load_state_dict(self.model.state_dict())
        return other

    def make_reward_model(self, head: AuxiliaryModule, last_tokens: Collection[int]) -> None:
        """From here on `save` writes a reward model: the trunk with this head (`learner.model.reward_head`).

        last_tokens: ids that conversations end with.
        """
        self._reward_head = head
        self._files = classifier_files(self._files, self.model_type, last_tokens)

    @property
    def model_type(self) -> str:
        """The family's name in transformers."""
        return str(self.model.config.model_type)

    @property
    def context(self) -> int:
        """The model's largest number of positions, in tokens."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the model's head."""
        return int(self._head.weight.shape[0])

    def vocab_chunk(self, tokens: int) -> int:
        """Vocabulary entries whose logits of so many tokens are computed at a time: `logit_block` numbers in all."""
        return max(self.settings.logit_block // max(tokens, 1), _LEAST_CHUNK)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters, tied ones once, always in the same order."""
        return (p for p in self.model.parameters() if p.requires_grad)

    @property
    def width(self) -> int:
        """Size of the hidden states."""
        return int(self._head.weight.shape[1])

    def hidden(self, micro: MicroBatch) -> Tensor:
        """Final hidden states before each scored token of a packed row, [N, D] with gradients."""
        return micro.expanded(self._whole(lambda: self._scored(micro)))

    def score(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Logprob of each sampled token and entropy of its distribution: float32 [N] each, with gradients."""
        logprobs_M, entropy_M, *_ = self._read(micro, temperature, None)
        return micro.expanded(logprobs_M), micro.expanded(entropy_M)

    def read(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """The results of `score` and `hidden` from one pass."""
        return self.compare(micro, temperature, None)[:3]

    def compare(
        self, micro: MicroBatch, temperature: float, against: Opposite | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The results of `read`, and the divergence from what it is compared with, [N]."""
        *found, kl_M = self._read(micro, temperature, against)
        logprobs_N, entropy_N, hidden_ND = map(micro.expanded, found)
        return logprobs_N, entropy_N, hidden_ND, None if kl_M is None else micro.expanded(kl_M)

    @torch.no_grad()
    def head(self, micro: MicroBatch) -> Head:
        """What this policy, a constant, says at the row's pairs; on several ranks each holds a copy of the head."""

        def once() -> Head:
            own = Head(self._scored(micro), self._head.weight, self._sampled_bias())
            return own if self.sharded is None else own._replace(weight_VD=own.weight_VD.clone())

        return self._whole(once)

    def _read(
        self, micro: MicroBatch, temperature: float, against: Opposite | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Logprobs [M], entropies [M], hidden states [M, D] and divergences [M] of the row's pairs."""

        def once() -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
            hidden_MD = self._scored(micro)
            own = Head(hidden_MD, self._head.weight, self._sampled_bias())
            chunk = self.vocab_chunk(2 * len(hidden_MD))  # logits of both at a time
            kl_M = divergence(own, against, temperature, chunk) if against else None
            return *self._logprobs(own, micro.targets_M, temperature), hidden_MD, kl_M

        return self._whole(once)

    def score_ids(self, token_ids: Sequence[int]) -> Float32Array:
        """Logprob of each token after the first, at temperature 1: float32 [T - 1]."""
        return self.score_texts(torch.tensor([list(token_ids)]), widest=False)[0]

    @torch.no_grad()
    def score_texts(self, ids_BL: Tensor, widest: bool) -> Float32Array:
        """Logprob of each token after the first of texts of equal length, at temperature 1: float32 [B, L - 1].

        widest: compute in float32 for any type of the learner, unless `rounds_always`.
        """
        count, length = ids_BL.shape
        ids_BL = ids_BL.to(self.device)

        def score() -> tuple[Tensor, Tensor]:
            hidden_TD = self._plain_rows(ids_BL[:, :-1].flatten(), count, length - 1, widest)
            head = Head(hidden_TD, self._head.weight, self._head.bias)
            return self._logprobs(head, ids_BL[:, 1:].flatten(), 1.0)

        logprobs_T, _ = self._whole(score)
        return logprobs_T.unflatten(0, (count, length - 1)).cpu().numpy()

    @torch.no_grad()
    def next_logits(self, ids_BL: Tensor) -> Tensor:
        """Logits [B, V] of the token after each of these texts of equal length."""
        count, length = ids_BL.shape
        ids_T = ids_BL.flatten().to(self.device)

        def score() -> Tensor:
            last_BD = self._plain_rows(ids_T, count, length, False).unflatten(0, (count, length))[:, -1]
            logits_BV: Tensor = nn.functional.linear(last_BD, self._head.weight.to(last_BD.dtype))
            return logits_BV if self._head.bias is None else logits_BV + self._head.bias

        return self._whole(score)

    @property
    def rounds_always(self) -> bool:
        """Whether float32 is not available, since shards are gathered as bfloat16."""
        return self.settings.dtype == "bfloat16" and self.ranks.size > 1

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its Hugging Face checkpoint name, detached; a tied head is not repeated.

        With an adapter these are the merged weights, all in memory at once beside the base. On several ranks each is
        sharded; `learner.parallel.shards.gathered` makes it whole.
        """
        own = {name: parameter.detach() for name, parameter in self._merged(self.model.named_parameters())}
        yield from revert_weight_conversion(self.model, own).items()

    def published(self) -> tuple[AdapterSpec | None, Iterator[tuple[str, Tensor]]]:
        """The tensors sent to engines: every weight, or an adapter's alone with its specification."""
        if self.adapter is not None and self.adapter.settings.sync == "adapter":
            return self.adapter.spec, self.adapter.tensors()
        return None, self.named_weights()

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write a Hugging Face folder: the weights, and unchanged copies of the model's other files.

        With an adapter the weights are the merged ones, and the adapter is written beside them. weights: `whole_state`,
        a collective call that precedes rank 0's writing.
        """
        if weights is None:
            weights = dict(self._merged(self.model.state_dict().items())) | self._head_state()
        write_weights(self.model, weights, folder)
        write_companions(self._files, folder)
        if self.adapter is not None:
            self.adapter.save(folder / _ADAPTER)

    def whole_state(self) -> dict[str, Tensor] | None:
        """Gather sharded parameters into rank 0's host memory; None on a single rank."""
        return None if self.sharded is None else gathered_state(self.model, self.ranks) | self._head_state()

    def _head_state(self) -> dict[str, Tensor]:
        """The reward head's weight, if this is a reward model; gathered like the others."""
        head = self._reward_head
        return {} if head is None else gathered_state(head.module, self.ranks)

    @property
    def _head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    def _whole(self, compute: Callable[[], T]) -> T:
        """Call `compute` with whole parameters."""
        return compute() if self.sharded is None else self.sharded.use(compute)

    def _autocast(self) -> torch.autocast:
        # Sharded parameters are already gathered as bfloat16.
        enabled = self.settings.dtype == "bfloat16" and self.ranks.size == 1
        return torch.autocast(self.settings.device, torch.bfloat16, enabled=enabled)

    def _hidden(self, ids_T: Tensor, tree: PrefixTree, **beside: Tensor) -> Tensor:
        """Final hidden states [T, D] of a packed row. beside: positions, and inputs of the vision tower."""
        with self._autocast():
            hidden_TD = hidden_states(self.model, ids_T, tree, **beside)
        # The head's product has the hidden state's type; under autocast a normalization returns float32.
        return hidden_TD.to(torch.bfloat16) if self.settings.dtype == "bfloat16" else hidden_TD

    def _plain_rows(self, ids_T: Tensor, count: int, length: int, widest: bool) -> Tensor:
        """Final hidden states [T, D] of `count` texts of `length` tokens, without pictures."""
        tree = PrefixTree.apart([length] * count)
        places_T = torch.arange(length, device=self.device).repeat(count)
        if widest and not self.rounds_always:
            return hidden_states(self.model, ids_T, tree, position_ids=places_T[None])
        return self._hidden(ids_T, tree, position_ids=places_T[None])

    def _scored(self, micro: MicroBatch) -> Tensor:
        """Hidden states of the row's pairs, [M, D]."""
        beside = {"position_ids": micro.position_ids_T[None]} | self._perceived(micro)
        hidden_TD = self._hidden(micro.input_ids_T, micro.tree, **beside)
        return hidden_TD.index_select(0, micro.score_index_M)

    def _perceived(self, micro: MicroBatch) -> dict[str, Tensor]:
        if self.picture_inputs is not None:
            return self.picture_inputs.inputs(micro)
        if pictures := next(filter(None, micro.pictures_B), None):
            raise ModelError(
                f"model {self.settings.path!r} takes text only, but {pictures.where} has pictures; choose a vision "
                "model"
            )
        return {}

    def _sampled_bias(self) -> Tensor | None:
        """Bias of the logits of sampled tokens.

        It excludes what engines never sample: placeholders of pictures, and ids of a vocabulary that is padded beyond
        the tokenizer's.
        """
        bias_V, tokens, pictures = self._head.bias, self._tokens, self.picture_inputs
        if pictures is None and (tokens is None or tokens >= self.vocab_size):
            return bias_V
        never_V = torch.zeros(self.vocab_size, device=self.device)
        if tokens is not None:
            never_V[tokens:] = _NEVER
        if pictures is not None:
            never_V[pictures.placeholder_id] = _NEVER
        return never_V if bias_V is None else bias_V + never_V

    def _logprobs(self, head: Head, targets_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return token_logprobs(*head, targets_T, temperature, self.vocab_chunk(len(targets_T)))

    def _merged(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        return tensors if self.adapter is None else self.adapter.merged(tensors)

    def _checkpoint_gradients(self) -> None:
        """Recompute every layer in the backward pass.

        transformers' own switch works in training mode alone, which also turns on dropout and router noise.
        """
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise ModelError(
                f"model {self.settings.path!r} has no layers that can be recomputed; "
                "set learner.model.gradient_checkpointing=false"
            )
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _load(settings: ModelSettings) -> tuple[Path, PreTrainedModel]:
    """A model's folder, and the model in float32 with packed attention. ModelError, one line, if it cannot be read."""
    path, trusted = settings.path, settings.trust_remote_code
    try:
        folder = local_model(path)
        config = pretrained(AutoConfig, str(folder), trusted)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                "its weights are quantized and cannot be trained; use the unquantized checkpoint"
            )
        sees = getattr(config, "vision_config", None) is not None
        kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        # The vision tower does not take packed rows.
        attention: Any = {"text_config": register()} if sees else register()
        options = {"dtype": torch.float32, "attn_implementation": attention, "output_loading_info": True}
        loaded: Any = pretrained(kind, str(folder), trusted, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if error.args == (NAME,):
            reason = (
                "its family has its own attention code, which packed rows cannot use; choose another model"
            )
        raise ModelError(f"model {path!r} cannot be loaded: {reason}") from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ModelError(
            f"model {path!r} lacks {len(missing)} weights, such as {missing[0]}; complete its files"
        )
    head = model.get_output_embeddings()
    of_both = (config, config.get_text_config())  # a vision model may have it in one of them only
    said = [each.tie_word_embeddings for each in of_both if hasattr(each, "tie_word_embeddings")]
    if said and all(said) and head is not None and head.weight is not model.get_input_embeddings().weight:
        raise ModelError(
            f"model {path!r} has tie_word_embeddings=true, but its files hold another head, which engines ignore; set "
            "it to false in config.json, or remove the head from the files"
        )
    return folder, model
