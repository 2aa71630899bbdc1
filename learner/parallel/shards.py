"""Parameters that lie over all ranks, each holding a part of every tensor: PyTorch's FSDP2 (`fully_shard`).

Before a layer computes, its tensors are gathered, and they are let go of afterwards; in the backward pass again, and
its gradients are summed over the ranks, each keeping its part. Optimizers work on the parts alone. Master weights, sums
and moments are float32; under bfloat16 the gathered tensors are bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.parallel.ranks import Ranks

T = TypeVar("T")

# FSDP notes every forward pass for the backward pass to come. Where none comes (a reference policy) the notes, some
# bytes a layer, would stay; torch 2.11 has no word for letting them go.
_FORGETS = hasattr(FSDPModule, "reset_iter_state")


class Whole(nn.Module):
    """The place where a model's parameters are whole: every use of them happens in this module's forward.

    Layers gather their own. What belongs to no layer (embedding, last normalization, head) is gathered by the root, and
    only while the root's forward runs; a head that is used outside of a model's own forward, as ours is, would find a
    part of itself. So the root is this module around the model, and what it runs is the caller's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], T]) -> T:
        """What `compute` gives; tensors in it that have gradients are where the backward pass gathers again."""
        return compute()

    def use(self, compute: Callable[[], T]) -> T:
        """The same, from outside."""
        found: T = self(compute)
        if _FORGETS and not torch.is_grad_enabled():
            self.reset_iter_state()  # type: ignore[operator]  # `shard` makes this module an FSDPModule
        return found


def shard(model: nn.Module, ranks: Ranks, compute: torch.dtype | None = None) -> Whole:
    """Lay the parameters over all ranks, in place, layer by layer, on the mesh's device. Every rank has to.

    compute: the type that tensors are gathered in; None: their own.
    """
    whole = Whole(model)
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=None if compute is None else torch.float32
    )
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in (*layers, whole):
        # The root too lets go after the forward pass: what nobody trains on next (a probe, a reference) would else
        # leave it whole, and stale after an optimizer's step.
        sharded = fully_shard(module, mesh=ranks.mesh, reshard_after_forward=True, mp_policy=policy)
        assert isinstance(sharded, FSDPModule)
        # Weights of tokens are those of the whole batch: gradients add up. Gloo knows no other reduction.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    return whole


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie over the ranks; every rank has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The own part of a tensor that may lie over the ranks: what changes it changes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The own part of a tensor that every rank holds whole, laid out as `like` is; a copy, on its device."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device, copy=True)
    on_device = tensor.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def gathered_tree(tree: Any, ranks: Ranks) -> Any:
    """Nested dicts and lists with every tensor gathered into rank 0's host memory; elsewhere tensors are emptied."""
    if isinstance(tree, DTensor):
        whole = tree.full_tensor()
        return whole.cpu() if ranks.rank == 0 else whole.new_empty(0)
    if isinstance(tree, dict):
        return {name: gathered_tree(value, ranks) for name, value in tree.items()}
    return [gathered_tree(value, ranks) for value in tree] if isinstance(tree, list) else tree


def gathered_state(module: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """The module's state in rank 0's host memory, one tensor gathered after the other; elsewhere nothing is kept.

    Every rank has to ask. Tied tensors stay one.
    """
    kept: dict[int, Tensor] = {}
    state = module.state_dict(
        keep_vars=True
    )  # the parameters themselves: a tied one is the same object twice
    for tensor in state.values():
        if id(tensor) not in kept:
            whole = gathered(tensor.detach())
            kept[id(tensor)] = _alone(whole.cpu()) if ranks.rank == 0 else whole.new_empty(0)
    return {name: kept[id(tensor)] for name, tensor in state.items()} if ranks.rank == 0 else {}


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own: a gathered one may be part of a padded storage, which no file is made of."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
