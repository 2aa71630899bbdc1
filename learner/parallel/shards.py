"""Parameters sharded over all ranks, each holding a part of every tensor: PyTorch's FSDP2 (`fully_shard`).

A layer's tensors are gathered before it computes, in the forward and the backward pass, and freed afterwards. Gradients
are summed over the ranks, each keeping its part. Optimizers work on the parts alone. Master weights, sums and moments
are float32; with bfloat16 the gathered tensors are bfloat16.

Hybrid sharding (Zhang et al. 2022, MiCS): groups of ranks hold a whole model each. What a group has summed is summed
over the groups too, by the ranks that hold the same part.

Experts of a mixture may be left out of the gathering: see experts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from learner.parallel.experts import ExpertParallel
from learner.parallel.layers import layers_in
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

    def __init__(self, model: nn.Module, experts: ExpertParallel | None = None) -> None:
        super().__init__()
        self.model = model
        self._experts = experts

    def forward(self, compute: Callable[[], T]) -> T:
        """Return compute(); its tensors with gradients trigger the gathering in the backward pass."""
        return compute()

    def use(self, compute: Callable[[], T]) -> T:
        """Call `compute` with whole parameters."""
        found: T = self(compute)
        if _FORGETS and not torch.is_grad_enabled():
            self.reset_iter_state()  # type: ignore[operator]  # `shard` makes this module an FSDPModule
        return found

    def sum_gradients(self, now: bool) -> None:
        """Whether the next backward pass sums gradients over the ranks, with those that earlier passes left.

        Otherwise each rank adds its own to whole gradients, which it keeps in the type of the sums.
        """
        self.set_requires_gradient_sync(now)  # type: ignore[operator]  # an FSDPModule, as above

    def finish_gradients(self) -> None:
        """Sum what backward passes leave to be summed once an optimizer step. A collective call."""
        if self._experts is not None:
            self._experts.sum_over_copies()


def shard(
    model: nn.Module,
    ranks: Ranks,
    compute: torch.dtype | None = None,
    *,
    alike: int = 1,
    expert_parallel: bool = False,
) -> Whole | None:
    """Shard the parameters over all ranks, in place, layer by layer, on the mesh's device; None on one rank.

    A collective call. compute: the type of gathered tensors; None: their own. alike: ranks that compute the same of the
    same row, whose gradients count once. expert_parallel: experts are not gathered, tokens travel (`ExpertParallel`).
    """
    if ranks.size == 1:
        return None
    experts = ExpertParallel(model, ranks, compute) if expert_parallel else None
    apart = None if experts is None else set(experts.parameters())
    whole = Whole(model, experts)
    # What layers are given keeps its type, as on one rank: angles of positions are float32 in some families.
    policy = MixedPrecisionPolicy(
        param_dtype=compute,
        reduce_dtype=None if compute is None else torch.float32,
        cast_forward_inputs=False,
    )
    layers = layers_in(model)
    for module in (*layers, whole):
        # The root frees its tensors after the forward pass too: after one without a backward pass (a probe, a
        # reference) they would stay whole, and stale after an optimizer step.
        sharded = fully_shard(
            module, mesh=ranks.mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=apart
        )
        assert isinstance(sharded, FSDPModule)
        # Weights of tokens are set over the whole batch, so gradients are summed. Gloo has no other reduction.
        sharded.set_gradient_divide_factor(float(alike))
        sharded.set_force_sum_reduction_for_comms(True)
        if ranks.copies is not None:
            sharded.set_all_reduce_hook(partial(dist.all_reduce, group=ranks.copies))
    return whole


def gathered(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded. A collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The own part of a tensor that may be sharded; a view, so that changing it changes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_whole(tensors: Iterable[Tensor], ranks: Ranks) -> None:
    """Sum tensors that every rank holds whole over all ranks, in place and in one exchange."""
    listed = list(tensors)
    if ranks.size == 1 or not listed:
        return
    flat = torch.cat([tensor.flatten() for tensor in listed])
    dist.all_reduce(flat)
    for tensor, summed in zip(listed, flat.split([each.numel() for each in listed]), strict=True):
        tensor.copy_(summed.view_as(tensor))


class Stored(Protocol):
    """A tensor of a file, of which any rows can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def rows(self, begin: int, end: int) -> Tensor: ...
    def __getitem__(self, index: Any) -> Tensor: ...


def laid_out(stored: Stored, like: Tensor) -> Tensor:
    """Read a tensor of as many rows as `like`, laid out and on the device as that is: of a sharded one the own rows."""
    return _of_all_rows(_own_rows(stored, like).to(like.device), like)


def laid_out_on_host(stored: Stored, like: Tensor) -> Tensor:
    """As `laid_out`, in host memory."""
    found = zeros_on_host(like, stored.shape[1:], stored.dtype)
    local(found).copy_(_own_rows(stored, like))
    return found


def zeros_beside(like: Tensor, row: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros with a row of this shape for each row of `like`, laid out and on the device as that is."""
    rows = len(local(like)) if like.ndim else 1
    own = torch.zeros((rows, *row) if like.ndim else (), dtype=dtype, device=like.device)
    return _of_all_rows(own, like)


def zeros_on_host(like: Tensor, row: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `zeros_beside`, in host memory; pinned where `like` is on a GPU."""
    # A sharded tensor keeps its mesh and placements; its own part alone is on the host.
    there = like.detach() if like.shape[1:] == torch.Size(row) else zeros_beside(like, row, dtype)
    return torch.zeros_like(there, dtype=dtype, device="cpu", pin_memory=like.device.type == "cuda")


def _of_all_rows(own: Tensor, like: Tensor) -> Tensor:
    """The tensor whose own rows these are, where `like` is sharded."""
    if not isinstance(like, DTensor):
        return own
    whole = torch.empty((like.shape[0], *own.shape[1:]), device="meta")
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(
        own, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _own_rows(stored: Stored, like: Tensor) -> Tensor:
    return stored.rows(*own_range(like)) if isinstance(like, DTensor) else stored[...]


def of_first_copy(tensor: DTensor) -> bool:
    """Whether the own part of a sharded tensor is of the first of its copies, which is the one that is written."""
    return bool((tensor.device_mesh.mesh == 0).any())


def own_range(tensor: DTensor) -> tuple[int, int]:
    """The rows of a sharded tensor that this rank has: equal parts, the last ones shorter, or empty."""
    count = -(-tensor.shape[0] // tensor.device_mesh.size())
    begin = min(tensor.device_mesh.get_local_rank() * count, tensor.shape[0])
    return begin, min(begin + count, tensor.shape[0])
