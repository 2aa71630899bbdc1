"""AdamW with its moments in host memory, after ZeRO-Offload (Ren et al. 2021): an update moves them part by part.

    host memory   first and second moments, float32, pinned beside a GPU
    device        parameters and gradients; of the moments one part, while it is updated

The update itself is computed where the parameters are, by the kernel that updates them without offloading, so that the
numbers are the same to the bit. The original computes it on the host, which moves gradients and parameters instead of
moments (8 bytes a parameter instead of 16) and needs a core's time for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from learner.parallel.shards import local, zeros_on_host

PART = 2**26  # numbers of a parameter that are updated at a time; a multiple of what kernels compute at once


class HostMoments:
    """The update of `adamw` with its state's moments in host memory. All groups are updated in their order."""

    def __init__(self, optimizer: torch.optim.AdamW) -> None:
        self._optimizer = optimizer

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter; moments begin as zeros."""
        devices = set()
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                self._update(parameter, self._state_of(parameter), group)
                devices.add(parameter.device)
        for device in devices:
            if (
                device.type == "cuda"
            ):  # moments are on their way back to the host, where they may be read next
                torch.cuda.synchronize(device)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = zeros_on_host(parameter), zeros_on_host(parameter)
        return state

    def _update(self, parameter: nn.Parameter, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        assert parameter.grad is not None, "the norm of all gradients was asked for before"
        numbers, gradients = (local(each.detach()).view(-1) for each in (parameter, parameter.grad))
        moments = [local(state[name]).view(-1) for name in ("exp_avg", "exp_avg_sq")]
        for begin in range(0, len(numbers), PART):
            own = slice(begin, begin + PART)
            here = [moment[own].to(numbers.device, non_blocking=True) for moment in moments]
            adamw(
                [numbers[own]],
                [gradients[own]],
                [here[0]],
                [here[1]],
                [],
                [state["step"].clone()],  # which the call counts up
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for moment, moved in zip(moments, here, strict=True):
                if moved.device != moment.device:
                    moment[own].copy_(moved, non_blocking=True)
        state["step"] += 1


def room_of_a_part(parameters: list[nn.Parameter]) -> list[Tensor]:
    """The memory that moments take on the device during an update: those of the largest part."""
    if not parameters:
        return []
    numbers = min(max(local(each.detach()).numel() for each in parameters), PART)
    return [torch.empty(numbers, device=parameters[0].device) for _ in range(2)]
