"""Parameters sharded over all ranks, each holding a part of every tensor: PyTorch's FSDP2 (`fully_shard`).

A layer's tensors are gathered before it computes, in the forward and the backward pass, and freed afterwards. Gradients
are summed over the ranks, each keeping its part. Optimizers work on the parts alone. Master weights, sums and moments
are float32; with bfloat16 the gathered tensors are bfloat16.
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

# FSDP records every forward pass for its backward pass. Without one (a reference policy) the records, some bytes a
# layer, would stay; torch 2.11 has no call that clears them.
_FORGETS = hasattr(FSDPModule, "reset_iter_state")


class Whole(nn.Module):
    """The root module of a sharded model: parameters are whole inside its forward, and every use happens there.

    Layers gather their own parameters. Those of no layer (embedding, last normalization, head) are gathered by the root
    while its forward runs. Our head is used outside of the model's own forward and would be sharded there, so the root
    is this module around the model, and its forward runs the caller's function.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], T]) -> T:
        """Return compute(); its tensors with gradients trigger the gathering in the backward pass."""
        return compute()

    def use(self, compute: Callable[[], T]) -> T:
        """Call `compute` with whole parameters."""
        found: T = self(compute)
        if _FORGETS and not torch.is_grad_enabled():
            self.reset_iter_state()  # type: ignore[operator]  # `shard` makes this module an FSDPModule
        return found


def shard(model: nn.Module, ranks: Ranks, compute: torch.dtype | None = None) -> Whole:
    """Shard the parameters over all ranks, in place, layer by layer, on the mesh's device. A collective call.

    compute: the type of gathered tensors; None: their own.
    """
    whole = Whole(model)
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=None if compute is None else torch.float32
    )
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in (*layers, whole):
        # The root frees its tensors after the forward pass too: after one without a backward pass (a probe, a
        # reference) they would stay whole, and stale after an optimizer step.
        sharded = fully_shard(module, mesh=ranks.mesh, reshard_after_forward=True, mp_policy=policy)
        assert isinstance(sharded, FSDPModule)
        # Weights of tokens are set over the whole batch, so gradients are summed. Gloo has no other reduction.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    return whole


def gathered(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded. A collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The own part of a tensor that may be sharded; a view, so that changing it changes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor that every rank holds whole, laid out and on the device as `like` is; a copy."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device, copy=True)
    on_device = tensor.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def gathered_tree(tree: Any, ranks: Ranks) -> Any:
    """Gather every tensor of nested dicts and lists into rank 0's host memory; other ranks get empty tensors."""
    if isinstance(tree, DTensor):
        whole = tree.full_tensor()
        return whole.cpu() if ranks.rank == 0 else whole.new_empty(0)
    if isinstance(tree, dict):
        return {name: gathered_tree(value, ranks) for name, value in tree.items()}
    return [gathered_tree(value, ranks) for value in tree] if isinstance(tree, list) else tree


def gathered_state(module: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """Gather the module's state into rank 0's host memory, tensor by tensor; other ranks get an empty dict.

    A collective call. Tied tensors stay one.
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
    """Copy a tensor out of a padded storage, as gathering makes it, since files are written from whole storages."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
