"""The policy: a Hugging Face causal model that scores packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from learner.data.batch import MicroBatch
from learner.data.prefix_tree import PrefixTree
from learner.data.row_slice import RowSlice
from learner.model.attention import hidden_states, require_slices
from learner.model.compiled import compile_layers
from learner.model.divergence import Head, Opposite, divergence
from learner.model.float8 import Float8
from learner.model.linear import use_onednn
from learner.model.loading import as_model_error, blank, examine, freeze_in, load
from learner.model.logprobs import token_logprobs
from learner.model.lora import Adapter
from learner.model.mixtures import require_mixture
from learner.model.narrow import Narrow
from learner.model.perception import inputs_beside, picture_inputs
from learner.model.recompute import recompute_layers
from learner.model.reward_head import classifier_files
from learner.model.router_balance import RouterBalance
from learner.model.router_replay import RouterReplay
from learner.model.saving import named_weights, weight_files, weight_shapes
from learner.model.shared_files import Folder, write_together
from learner.parallel.auxiliary import AuxiliaryModule
from learner.parallel.context import ContextGroup
from learner.parallel.ranks import ALONE, Ranks
from learner.parallel.shards import sum_whole
from learner.settings import ModelSettings
from rollout.wire.adapter import AdapterSpec
from rollout.wire.model_folder import companions, token_count, write_companions
from rollout.wire.trajectory import Float32Array

T = TypeVar("T")

_LEAST_CHUNK = 8  # vocabulary entries at a time, at least
_NEVER = -1e4  # added to a logit: exp of it is zero, and zero times it is not NaN
_ADAPTER = "adapter"  # folder of the adapter's own tensors, inside that of the merged model


class Policy:
    """The learner's causal language model: packed tokens in, logprobs of sampled tokens out.

    Dropout is always off: the learner's logprobs must be those of the model that samples. ModelError, one line, for a
    checkpoint that is missing, broken or incomplete, or incompatible with packed rows (`learner.model.compatibility`).

    On several ranks the parameters are sharded over all of them, each reads its own rows, and every computation is a
    collective call. examined: the model was found compatible before.
    """

    def __init__(self, settings: ModelSettings, ranks: Ranks = ALONE, examined: bool = False) -> None:
        self.settings = settings
        self.ranks = ranks
        self.device = torch.device(settings.device)
        with as_model_error():
            settings.require_consistent()
        folder, self.model = blank(settings)
        # Read now: the folder may be removed before they are written.
        self._files = companions(folder)
        with as_model_error():
            self.picture_inputs = picture_inputs(self.model, str(folder), settings, ranks.size)
        with as_model_error(f"model {settings.path!r} "):
            require_slices(self.model.config, ranks.context.size)
            require_mixture(self.model, settings, ranks.shards)
        with as_model_error(f"model {settings.path!r}: "):
            self._tokens = token_count(str(folder))
        # The model as it is stored: layers that are replaced below are tested to compute the same.
        if not examined:
            examine(self.model, folder, settings.path, ranks)
        # The probe of every weight sync (learner.training.probe), once drawn.
        self.probe_text: tuple[int, ...] = ()
        self._reward_head: AuxiliaryModule | None = None
        self._float8: Float8 | None = None
        if settings.float8:
            with as_model_error():
                self._float8 = Float8(self.model.base_model, self._head, self.device)
        if not settings.lora:
            self._use_onednn()
        products = torch.bfloat16 if settings.dtype == "bfloat16" else None
        if settings.lora and products:
            freeze_in(self.model, products)
        self.sharded = load(self.model, folder, settings, products, ranks)
        with as_model_error(f"model {settings.path!r}: "):
            self.adapter = Adapter(self.model, settings.lora) if settings.lora else None
        if settings.lora:  # whose layers are linear ones too
            self._use_onednn()
        if self.sharded is None:  # buffers, and an adapter
            nn.Module.to(self.model, self.device)  # the subclass's `to` is untyped
        with as_model_error(f"model {settings.path!r} "):
            if settings.compile:
                compile_layers(self.model, self.device)
        self._narrow: Narrow | None = None
        if products and (self.adapter or self.sharded is None):
            masters = self.model if self.adapter is None else self.adapter
            self._narrow = Narrow(self.model, products, masters.parameters())
        with as_model_error(f"model {settings.path!r} "):
            balance = settings.router_balance
            self.balance = RouterBalance(self.model, balance, ranks.context) if balance else None
            self.replay = RouterReplay(self.model) if settings.router_replay else None
            if settings.gradient_checkpointing:  # with the casts, so that copies of weights are made again
                recompute_layers(self.model, settings.gradient_checkpointing == "selective")

    @classmethod
    def restored(cls, settings: ModelSettings, folder: Path, ranks: Ranks = ALONE) -> Policy:
        """Load the policy that `save` wrote into `folder`, bit for bit.

        An adapter is added to its base, which is loaded from `settings.path`.
        """
        if settings.lora is None:
            return cls(settings.model_copy(update={"path": str(folder)}), ranks, examined=True)
        policy = cls(settings, ranks, examined=True)
        assert policy.adapter is not None
        with as_model_error():
            policy.adapter.load(folder / _ADAPTER)
        return policy

    def twin(self) -> Policy:
        """A copy of this policy that routes by itself."""
        other = Policy(self.settings.beside, self.ranks, examined=True)
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

    def passes(self, rows: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The rows of an optimizer step, whose gradients are then summed over the ranks.

        Those of sharded parameters are summed by the backward pass of each row, or of the last one.
        """
        listed = list(rows)
        for number, row in enumerate(listed, 1):
            if self.sharded is not None and self.settings.sum_gradients == "step":
                self.sharded.sum_gradients(now=number == len(listed))
            yield row
        if self.sharded is not None:
            self.sharded.finish_gradients()
        if self.adapter is not None:
            sum_whole((p.grad for p in self.adapter.parameters() if p.grad is not None), self.ranks)

    def hidden(self, micro: MicroBatch) -> Tensor:
        """Final hidden states before each scored token of a packed row, [N, D] with gradients."""
        part = RowSlice.of(micro, self.ranks.context)
        return part.expanded(self._whole(lambda: self._scored(part.own)))

    def score(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Logprob of each sampled token and entropy of its distribution: float32 [N] each, with gradients."""
        return self.compare(micro, temperature, None, hidden=False)[:2]

    def read(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """The results of `score` and `hidden` from one pass."""
        logprobs_N, entropy_N, hidden_ND, _ = self.compare(micro, temperature, None)
        assert hidden_ND is not None
        return logprobs_N, entropy_N, hidden_ND

    def compare(
        self, micro: MicroBatch, temperature: float, against: Opposite | None, hidden: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The results of `read`, and the divergence from what it is compared with, [N].

        hidden: the hidden states of the whole row are wanted, which ranks that share it gather.
        """
        part = RowSlice.of(micro, self.ranks.context)
        logprobs_M, entropy_M, hidden_MD, kl_M = self._read(part.own, temperature, against)
        whole = (hidden_MD if hidden else None, kl_M)
        hidden_ND, kl_N = (None if each is None else part.expanded(each) for each in whole)
        return part.expanded(logprobs_M), part.expanded(entropy_M), hidden_ND, kl_N

    @torch.no_grad()
    def route(self, micro: MicroBatch) -> None:
        """Compute the own slice of a row, for what watches the model's routers."""
        own = RowSlice.of(micro, self.ranks.context).own
        self._whole(lambda: self._scored(own))

    @torch.no_grad()
    def head(self, micro: MicroBatch) -> Head:
        """What this policy, a constant, says at the row's pairs (those of the own slice, where ranks share a row).

        On several ranks each holds a copy of the head.
        """
        part = RowSlice.of(micro, self.ranks.context)

        def once() -> Head:
            own = Head(self._scored(part.own), self._head.weight, self._sampled_bias())
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

        widest: compute in float32 for any type of the learner, unless `rounds_always`, and never in float8.
        """
        count, length = ids_BL.shape
        ids_BL = ids_BL.to(self.device)

        def score() -> tuple[Tensor, Tensor]:
            hidden_TD = self._plain_rows(ids_BL[:, :-1].flatten(), count, length - 1)
            head = Head(hidden_TD, self._head.weight, self._head.bias)
            return self._logprobs(head, ids_BL[:, 1:].flatten(), 1.0)

        logprobs_T, _ = self._whole(score, wide=widest)
        return logprobs_T.unflatten(0, (count, length - 1)).cpu().numpy()

    @torch.no_grad()
    def next_logits(self, ids_BL: Tensor) -> Tensor:
        """Logits [B, V] of the token after each of these texts of equal length."""
        count, length = ids_BL.shape
        ids_T = ids_BL.flatten().to(self.device)

        def score() -> Tensor:
            last_BD = self._plain_rows(ids_T, count, length).unflatten(0, (count, length))[:, -1]
            logits_BV: Tensor = nn.functional.linear(last_BD, self._head.weight.to(last_BD.dtype))
            return logits_BV if self._head.bias is None else logits_BV + self._head.bias

        return self._whole(score)

    @property
    def rounds_always(self) -> bool:
        """Whether float32 is not available, since parameters are gathered, or an adapter's base stored, as bfloat16."""
        stored = self.sharded is not None or self.adapter is not None
        return self.settings.dtype == "bfloat16" and stored

    def named_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its Hugging Face checkpoint name, layer by layer: see `learner.model.saving`."""
        return named_weights(self.model, self.adapter, dtype)

    def weight_shapes(self) -> list[tuple[str, torch.Size]]:
        """The names and shapes of `named_weights`; nothing is gathered."""
        return weight_shapes(self.model, self.adapter)

    def published(
        self, dtype: torch.dtype
    ) -> tuple[AdapterSpec | None, list[tuple[str, torch.Size]], Iterator[tuple[str, Tensor]]]:
        """What is sent to engines: every weight, or an adapter's alone with its specification.

        Names and shapes, and an iterator over the tensors, see `named_weights`.
        """
        if self.adapter is not None and self.adapter.settings.sync == "adapter":
            shapes = [(name, tensor.shape) for name, tensor in self.adapter.tensors()]
            return self.adapter.spec, shapes, self.adapter.tensors()
        return None, self.weight_shapes(), self.named_weights(dtype)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder: the weights, and unchanged copies of the model's other files.

        With an adapter the weights are the merged ones, and the adapter is written beside them. A collective call.
        """
        write_together(self.folders(), folder, self.ranks)

    def folders(self) -> dict[str, Folder]:
        """What `save` writes, by folder, as it is now: a copy in host memory. A collective call."""
        lead, beside = not self.ranks.rank, self._reward_head.state() if self._reward_head else {}
        files = weight_files(self.model, self.adapter, beside, lead)
        found = {} if self.adapter is None else {_ADAPTER: self.adapter.folder(lead)}
        found[""] = Folder(files, self._write_beside)
        if self.device.type == "cuda":  # the copies were begun
            torch.cuda.synchronize(self.device)
        return found

    def _write_beside(self, folder: Path) -> None:
        write_companions(self._files, folder)

    @property
    def _head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    def _whole(self, compute: Callable[[], T], wide: bool = False) -> T:
        """Call `compute` with whole parameters in the type of products.

        wide: in float32, unless `rounds_always`, and never in float8.
        """
        if self._float8 is None:
            return self._gathered(compute, wide)
        with self._float8.exact(wide):
            return self._gathered(compute, wide)

    def _gathered(self, compute: Callable[[], T], wide: bool) -> T:
        if (narrow := self._narrow) is None:
            return compute() if self.sharded is None else self.sharded.use(compute)
        if self.sharded is None:
            return narrow.use(compute, wide and not self.rounds_always)
        return self.sharded.use(lambda: narrow.use(compute))

    def _hidden(
        self, ids_T: Tensor, tree: PrefixTree, context: ContextGroup | None = None, **beside: Tensor
    ) -> Tensor:
        """Final hidden states [T, D] of a packed row: see `hidden_states`."""
        hidden_TD = hidden_states(self.model, ids_T, tree, context, **beside)
        # Some families normalize to float32; the head's product has the hidden state's type.
        return hidden_TD.to(self._head.weight.dtype)

    def _plain_rows(self, ids_T: Tensor, count: int, length: int) -> Tensor:
        """Final hidden states [T, D] of `count` texts of `length` tokens, without pictures."""
        if self.replay is not None:
            self.replay.follow(None)
        tree = PrefixTree.apart([length] * count)
        places_T = torch.arange(length, device=self.device).repeat(count)
        return self._hidden(ids_T, tree, position_ids=places_T[None])

    def _scored(self, micro: MicroBatch) -> Tensor:
        """Hidden states of the pairs of a row, or of the own slice of one: [M, D]."""
        if self.replay is not None:
            with as_model_error():
                self.replay.follow(micro)
        beside = inputs_beside(micro, self.picture_inputs, self.settings.path)
        hidden_TD = self._hidden(micro.input_ids_T, micro.tree, self.ranks.context, **beside)
        return hidden_TD.index_select(0, micro.score_index_M)

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

    def _use_onednn(self) -> None:
        if self.settings.device == "cpu" and self.settings.dtype == "float32":
            with as_model_error():  # in some families the base is the whole model
                use_onednn(self.model.base_model, leave=self._head)
