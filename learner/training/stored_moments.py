"""AdamW whose moments lie elsewhere, or in other numbers, than its kernel takes them: they come part by part.

    in host memory   after ZeRO-Offload (Ren et al. 2021), pinned beside a GPU
    in eight bits    codes and scales (eight_bit.py), on the device or in host memory
    device           parameters and gradients; of the moments one part in float32, while it is updated

The update itself is computed where the parameters are, by the kernel that updates float32 moments on the device, so
that host memory changes no bit. The original computes it on the host, which moves gradients and parameters instead of
moments (8 bytes a parameter instead of 16) and needs a core's time for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from learner.parallel.shards import Stored, laid_out, laid_out_on_host, local, zeros_beside, zeros_on_host
from learner.training.eight_bit import AT_ONCE_CPU, AT_ONCE_GPU, WORKING, block_of, dequantize, quantize

PART = (
    2**26
)  # float32 numbers of a parameter that are updated at a time; a multiple of what kernels compute at once
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # the moments by their names in a state
_SCALES = "_scales"  # ending of the name of a moment's scales

State = dict[str, Tensor]


class _Float32:
    """The own part of a moment as a flat tensor [n]."""

    def __init__(self, stored: Tensor) -> None:
        self._flat_n = local(stored).view(-1)

    def read(self, own: slice, like: Tensor) -> Tensor:
        """These numbers, where `like` is; a view if they are there."""
        return self._flat_n[own].to(like.device, non_blocking=True)

    def write(self, own: slice, numbers: Tensor) -> None:
        room = self._flat_n[own]
        if room.data_ptr() != numbers.data_ptr():
            room.copy_(numbers, non_blocking=True)


class _EightBit:
    """The own part of a moment in codes and scales; slices are of whole blocks."""

    def __init__(self, codes: Tensor, scales: Tensor, signed: bool) -> None:
        self._block = prod(codes.shape[1:]) // scales.shape[1]
        self._codes_n, self._scales_B = local(codes).view(-1), local(scales).view(-1)
        self._signed = signed

    def read(self, own: slice, like: Tensor) -> Tensor:
        """These numbers in the type and on the device of `like`: [n]."""
        codes_n, scales_B = (
            stored.to(like.device, non_blocking=True)
            for stored in (self._codes_n[own], self._scales_B[self._blocks(own)])
        )
        return dequantize(codes_n.view(-1, self._block), scales_B, self._signed).view(-1).to(like.dtype)

    def write(self, own: slice, numbers: Tensor) -> None:
        codes_BC, scales_B = quantize(numbers.float().view(-1, self._block), self._signed)
        self._codes_n[own].copy_(codes_BC.view(-1), non_blocking=True)
        self._scales_B[self._blocks(own)].copy_(scales_B, non_blocking=True)

    def _blocks(self, own: slice) -> slice:
        return slice(own.start // self._block, own.stop // self._block)


class StoredMoments:
    """The update of `optimizer` with moments in its state that are stored by `on_host` and `eight_bit`."""

    def __init__(self, optimizer: torch.optim.AdamW, *, on_host: bool, eight_bit: bool) -> None:
        self._optimizer = optimizer
        self._on_host, self._eight_bit = on_host, eight_bit

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter, of all groups in their order; moments begin as zeros."""
        devices: set[torch.device] = set()
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state[parameter]
                if not state:
                    state.update(self._zeros(parameter))
                self._update(parameter, state, group)
                devices.add(parameter.device)
        for device in devices:
            self._arrive(device)

    @torch.no_grad()
    def read(self, entry: dict[str, Stored], parameter: nn.Parameter) -> State:
        """A parameter's state from a file, of which this rank reads its rows; float32 and codes become each other."""
        wanted = {name: moment.dtype for name, moment in _blank(parameter, self._block(parameter)).items()}
        same = all(stored.dtype == wanted.get(name, stored.dtype) for name, stored in entry.items())
        lay = laid_out_on_host if same and self._on_host else laid_out
        found = {
            name: lay(stored, parameter) if stored.shape else stored[...] for name, stored in entry.items()
        }
        step = found["step"].to(parameter.device)
        if same:
            return found | {"step": step}
        converted = self._zeros(parameter)
        numbers_n = local(parameter.detach()).view(-1)
        for own in _parts(numbers_n, block_of(parameter.shape)):
            for source, target in zip(_moments(found), _moments(converted), strict=True):
                target.write(own, source.read(own, numbers_n))
        self._arrive(parameter.device)
        return converted | {"step": step}

    def to_come(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Room for what the first step will have on the device: moments that stay there, and those of a part."""
        if not parameters:
            return []
        begun = self._on_host or bool(self._optimizer.state)
        states = [] if begun else [self._zeros(each) for each in parameters]
        kept = [moment for state in states for moment in state.values() if moment.ndim]
        part = max(map(self._part_numbers, parameters))
        return [*kept, torch.empty(part, device=parameters[0].device)]

    def _arrive(self, device: torch.device) -> None:
        """Wait for moments that are on their way to host memory, where they may be read next."""
        if self._on_host and device.type == "cuda":
            torch.cuda.synchronize(device)

    def _part_numbers(self, parameter: nn.Parameter) -> int:
        block, numbers_n = self._block(parameter), local(parameter.detach()).view(-1)
        largest = max((own.stop - own.start for own in _parts(numbers_n, block)), default=0)
        if block:
            return WORKING * largest
        return 2 * largest if self._on_host else 0

    def _zeros(self, parameter: nn.Parameter) -> State:
        make = zeros_on_host if self._on_host else zeros_beside
        blank = _blank(parameter, self._block(parameter))
        state = {name: make(parameter, each.shape[1:], each.dtype) for name, each in blank.items()}
        return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **state}

    def _block(self, parameter: nn.Parameter) -> int:
        return block_of(parameter.shape) if self._eight_bit else 0

    def _update(self, parameter: nn.Parameter, state: State, group: dict[str, Any]) -> None:
        assert parameter.grad is not None, "the norm of all gradients was asked for before"
        numbers_n, gradients_n = (local(each.detach()).view(-1) for each in (parameter, parameter.grad))
        moments = _moments(state)
        for own in _parts(numbers_n, self._block(parameter)):
            here = [moment.read(own, numbers_n) for moment in moments]
            adamw(
                [numbers_n[own]],
                [gradients_n[own]],
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
                moment.write(own, moved)
        state["step"] += 1


def _blank(parameter: nn.Parameter, block: int) -> State:
    """Whole moments of a parameter without numbers, in blocks of this length or, with 0, in the parameter's type."""
    found = {}
    for name in _SIGNED:
        dtype = torch.uint8 if block else parameter.dtype
        found[name] = torch.empty(parameter.shape, dtype=dtype, device="meta")
        if block:
            scales = (parameter.shape[0], prod(parameter.shape[1:]) // block)
            found[name + _SCALES] = torch.empty(scales, dtype=torch.float32, device="meta")
    return found


def _moments(state: State) -> list[_Float32 | _EightBit]:
    return [
        _EightBit(state[name], state[name + _SCALES], signed)
        if name + _SCALES in state
        else _Float32(state[name])
        for name, signed in _SIGNED.items()
    ]


def _parts(numbers_n: Tensor, block: int) -> Iterator[slice]:
    """Consecutive parts of a parameter, of whole blocks."""
    size = PART
    if block:
        size = (AT_ONCE_CPU if numbers_n.device.type == "cpu" else AT_ONCE_GPU) // block * block
    for begin in range(0, len(numbers_n), size):
        yield slice(begin, min(begin + size, len(numbers_n)))
