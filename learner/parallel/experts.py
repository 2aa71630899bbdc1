"""Expert parallelism: the experts of a mixture stay on the ranks that hold them, and tokens travel to them.

With E experts in a layer and S ranks that parameters are sharded over, rank s holds F = E / S experts, from s F on:

    forward     tokens, sorted by expert -> all-to-all -> products on the owner -> all-to-all -> weighted sum at home
    backward    gradients of the same, by the same two exchanges in reverse

Lepikhin et al. 2021 (GShard), section 3, without its capacity: no token is dropped. Weights are never gathered, and an
owner's gradients are those of all ranks' tokens; nothing is left to sum but between copies of the model. Parameters are
sharded as FSDP2 would shard them: whatever reads, writes or updates parameters sees no difference.

All ranks compute every layer together, a rank without a token for its experts too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.func import functional_call
from torch.nn.functional import pad

from learner.parallel.ranks import Ranks
from rollout.wire.module_names import names_experts

# What its decorator of classes of experts (`use_experts_implementation`) gives them, which most families use. Their
# forward takes (hidden states [T, D], chosen experts [T, K], their weights [T, K]).
_DECORATED = "is_concatenated"


def experts_in(model: nn.Module) -> dict[str, Any]:
    """The modules of experts by name, one for each layer that has them."""
    return {name: module for name, module in model.named_modules() if names_experts(name)}


def rows_by_expert(experts: Any) -> bool:
    """Whether such a module is given the chosen experts, and each of its parameters has a row for every expert."""
    own, everything = list(experts.parameters(recurse=False)), list(experts.parameters())
    return (
        hasattr(experts, _DECORATED)
        and len(own) == len(everything)
        and {len(parameter) for parameter in own} == {experts.num_experts}
    )


class ExpertParallel:
    """The experts of a model, of which this rank holds its part and computes with no other.

    compute: the type that weights are cast to for products; None: their own. Every module is as `rows_by_expert` asks,
    and the ranks divide its experts.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, compute: torch.dtype | None) -> None:
        assert ranks.mesh is not None, "one rank has all experts"
        self._copies = ranks.copies
        self._modules = list(experts_in(model).values())
        for module in self._modules:
            for name, whole in list(module.named_parameters()):
                own = whole.detach().chunk(ranks.mesh.size())[ranks.mesh.get_local_rank()]
                sharded = DTensor.from_local(own, ranks.mesh, [Shard(0)], run_check=False)
                setattr(module, name, nn.Parameter(sharded, whole.requires_grad))
            module.num_experts = len(own)
            module.forward = _OwnExperts(module, ranks.mesh.get_group(), compute).of_all_ranks

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of all layers, always in the same order; loading a model replaces them."""
        for module in self._modules:
            yield from module.parameters()

    def sum_over_copies(self) -> None:
        """Sum the gradients over the copies of the model; a collective call, once for each optimizer step."""
        if self._copies is None:
            return
        for parameter in self.parameters():
            if isinstance(parameter.grad, DTensor):
                dist.all_reduce(parameter.grad.to_local(), group=self._copies)


class _OwnExperts(nn.Module):
    """The experts of one layer that this rank holds."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, compute: torch.dtype | None) -> None:
        super().__init__()
        self.module: Any = module
        self._forward, self._group, self._compute = module.forward, group, compute

    def of_all_ranks(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the module would compute with all experts, [T, D]; the names of the arguments are transformers'."""
        hidden_TD, experts_TK, weights_TK = hidden_states, top_k_index, top_k_weights
        tokens, chosen = experts_TK.shape
        # A = T K rows go out, a token for one of its experts each, sorted by expert and with that by the rank that has
        # it; I rows come in.
        order_A = experts_TK.flatten().argsort(stable=True)
        place_A = torch.empty_like(order_A)
        place_A[order_A] = torch.arange(len(order_A), device=order_A.device)
        sent, received, own_I = self._routes(experts_TK)
        given_ID = _Exchange.apply(hidden_TD[order_A // chosen], sent, received, self._group)
        found_AD = _Exchange.apply(self._computed(given_ID, own_I), received, sent, self._group)
        weighted_TKD = found_AD[place_A].view(tokens, chosen, hidden_TD.shape[1]) * weights_TK[..., None]
        return weighted_TKD.sum(1).to(hidden_TD.dtype)

    def forward(self, *given: Tensor) -> Tensor:
        """What the module computes; `functional_call` calls this."""
        found: Tensor = self._forward(*given)
        return found

    def _routes(self, experts_TK: Tensor) -> tuple[list[int], list[int], Tensor]:
        """Rows that go to each rank and come from each, and the own expert of every row that comes, int64 [I]."""
        ranks, own = self._group.size(), self.module.num_experts
        sent_SF = torch.bincount(experts_TK.flatten(), minlength=ranks * own).view(ranks, own)
        received_SF = torch.empty_like(sent_SF)
        dist.all_to_all_single(received_SF, sent_SF, group=self._group)
        sent, received = torch.stack([sent_SF, received_SF]).sum(2).tolist()
        own_SF = torch.arange(own, device=sent_SF.device).expand(ranks, own)
        rows = sum(received)
        return sent, received, own_SF.flatten().repeat_interleave(received_SF.flatten(), output_size=rows)

    def _computed(self, given_ID: Tensor, own_I: Tensor) -> Tensor:
        """What the own experts make of rows [I, D], one expert each. Their routers' weights are applied at home."""
        weights = {}
        for name, parameter in self.module.named_parameters():
            assert isinstance(parameter, DTensor)
            weights[f"module.{name}"] = parameter.to_local().to(self._compute or parameter.dtype)
        rows = len(own_I)
        if not rows:
            # Kernels of grouped products need not take none. A row of zeros, left out below, adds to no gradient.
            given_ID, own_I = pad(given_ID, (0, 0, 0, 1)), own_I.new_zeros(1)
        alone_I1 = torch.ones(len(own_I), 1, dtype=given_ID.dtype, device=given_ID.device)
        found_ID: Tensor = functional_call(self, weights, (given_ID, own_I[:, None], alone_I1))
        return found_ID[:rows]


class _Exchange(torch.autograd.Function):
    """All-to-all of rows: `sent` of them to each rank, in order, and `received` from each. [A, D] to [I, D]."""

    @staticmethod
    def forward(
        ctx: Any, rows_AD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(rows_AD, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad_ID: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad_ID, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchanged(rows_AD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    found_ID = rows_AD.new_empty(sum(received), rows_AD.shape[1])
    dist.all_to_all_single(found_ID, rows_AD.contiguous(), received, sent, group)
    return found_ID
