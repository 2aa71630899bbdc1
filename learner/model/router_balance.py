"""The load-balancing loss of a mixture of experts, over all tokens of an optimizer step.

With E experts, f_e the tokens that are routed to expert e and P_e the sum of the router's probabilities for it, both
over all layers and tokens and divided by their number,

    loss = E * sum over e of f_e * P_e              Fedus et al. 2021 (Switch Transformers), equations 4 to 6

as transformers computes it; f_e are of the routers' own choice, also where another is replayed (router_replay.py). A
token that several sequences share counts for each of them. The f_e have no gradient, and
those of the whole step are counted first, by a forward pass of their own: how tokens are packed into rows, and how rows
and their slices are divided over ranks, then changes nothing (Qiu et al. 2025 show what a loss of single micro-batches
does instead).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from learner.data.batch import MicroBatch
from learner.model.logprobs import wide
from learner.parallel.context import ContextGroup
from learner.parallel.ranks import Ranks


def recorder_of(model: PreTrainedModel) -> OutputRecorder | None:
    """Where transformers finds the logits of the model's routers; None: nowhere, or in several places of a layer."""
    found = (getattr(model.base_model, "_can_record_outputs", None) or {}).get("router_logits")
    return found if isinstance(found, OutputRecorder) else None


class RouterBalance:
    """The loss of a model's routers, with the gradient of `coefficient` times it.

    context: the ranks that compute a row together.
    """

    def __init__(
        self, model: PreTrainedModel, coefficient: float, context: ContextGroup | None = None
    ) -> None:
        recorder = recorder_of(model)
        assert recorder is not None
        self.coefficient = coefficient
        self._context = context or ContextGroup()
        self._chosen = int(model.config.get_text_config().num_experts_per_tok)
        self._place = int(recorder.index)
        self._logits: list[Tensor] | None = None  # [T, E] of each router in turn, while a row is watched
        for module in model.modules():
            if isinstance(module, recorder.target_class):
                module.register_forward_hook(self._note)
        self._routed_E = torch.zeros(0)  # f of this step
        self._tokens = 0.0  # of this step, once for each layer

    @torch.no_grad()
    def count(self, rows: Iterable[MicroBatch], compute: Callable[[MicroBatch], Any], ranks: Ranks) -> None:
        """Count what the rows of a step route where. compute: a forward pass; ranks compute rows together."""
        counts_E, tokens = np.zeros(1), 0.0
        for row in rows:
            with self.watching() as logits:
                compute(row)
            weights_T = self._sequences_through(row)
            for logits_TE in logits:
                chosen_TK = _probabilities(logits_TE).topk(self._chosen).indices.cpu()
                weights = weights_T.repeat_interleave(self._chosen)
                found_E = torch.bincount(chosen_TK.flatten(), weights, logits_TE.shape[1])
                counts_E = counts_E + found_E.numpy()
                tokens += float(weights_T.sum())
        own = {"tokens": tokens} | {str(e): float(n) for e, n in enumerate(counts_E)}
        summed = ranks.sums(own, sliced=True)
        self._tokens = max(summed.pop("tokens"), 1.0)
        self._routed_E = torch.tensor(list(summed.values()), dtype=torch.float64) / self._tokens

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """Collect the routers' logits of a row's forward pass; what is recomputed for a backward pass is left out."""
        self._logits = found = list[Tensor]()
        try:
            yield found
        finally:
            self._logits = None

    def of(self, row: MicroBatch, logits: Iterable[Tensor]) -> Tensor:
        """The part of the own slice of a row, with gradient: the parts of all rows of all ranks are added up."""
        weights_T, parts = self._sequences_through(row), []
        for logits_TE in logits:
            probabilities_TE = _probabilities(logits_TE)
            summed_E = weights_T.to(probabilities_TE) @ probabilities_TE
            parts.append(len(summed_E) * (self._routed_E.to(summed_E) @ summed_E))
        return torch.stack(parts).sum() / self._tokens

    def _sequences_through(self, row: MicroBatch) -> Tensor:
        """How many sequences go through each token of the own slice, float64; none through that of an idle row."""
        tokens = row.tree.tokens
        paths = np.concatenate(row.tree.paths_B) if len(row.weights_N) else np.zeros(0, np.int64)
        counts_T = np.bincount(paths, minlength=tokens + self._context.lacking(tokens))
        return self._context.own(torch.from_numpy(counts_T.astype(np.float64)))

    def _note(self, router: nn.Module, given: Any, found: Any) -> None:
        if self._logits is not None:
            self._logits.append(found[self._place])


def _probabilities(logits_TE: Tensor) -> Tensor:
    return logits_TE.softmax(-1, dtype=wide(logits_TE))
