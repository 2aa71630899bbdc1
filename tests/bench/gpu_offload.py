"""A learner's state to host memory and back, AdamW with its moments there or in 8 bits: seconds, bytes, equality.

    python -m tests.bench.gpu_offload [--tiny]

1.7 billion parameters, in matrices of one size, without a model: random gradients. Updates are made with and without
`offload`, and all bits are compared. `--tiny` is a rehearsal on a CPU. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import nn

from learner.algorithm.schedule import OptimSettings
from learner.model.host_memory import HostMemory, device_bytes
from learner.training.optim import Optimizer

STEPS = 3


def parameters(count: int, width: int, device: str) -> list[nn.Parameter]:
    """Matrices of width x 4 width, drawn on the device; the last one is a vector."""
    torch.manual_seed(0)
    shapes = [(width, 4 * width)] * count + [(width,)]
    return [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]


def moved(
    count: int, width: int, device: str, **optim: Any
) -> tuple[list[nn.Parameter], Optimizer, float, int]:
    """Parameters after some steps, seconds of the last one, and the most bytes that torch held on the device."""
    own = parameters(count, width, device)
    optimizer = Optimizer(own, OptimSettings(learning_rate=1e-3, weight_decay=0.1, **optim))
    seconds = 0.0
    for step in range(STEPS):
        for place, parameter in enumerate(own):
            torch.manual_seed(step * len(own) + place)
            parameter.grad = torch.randn(parameter.shape, device=device)
        began = time.perf_counter()
        optimizer.step()
        _settled(device)
        seconds = time.perf_counter() - began
    optimizer.zero_grad()
    return own, optimizer, seconds, torch.cuda.max_memory_allocated() if device == "cuda" else 0


def _forget(device: str) -> None:
    """Give freed memory back, and count the most that is held from here on."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _settled(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(tiny: bool) -> dict[str, Any]:
    """The figures."""
    count, width, device = (3, 64, "cpu") if tiny else (100, 2048, "cuda")
    plain, _, plain_s, plain_most = moved(count, width, device)
    kept = [parameter.detach().cpu() for parameter in plain]
    del plain, _
    _forget(device)
    *coded, coded_s, coded_most = moved(count, width, device, moments="8bit")
    del coded
    _forget(device)
    own, optimizer, offloaded_s, most = moved(count, width, device, offload=True)
    same = all(torch.equal(a.detach().cpu(), b) for a, b in zip(own, kept, strict=True))
    host, held = HostMemory(), device_bytes(own)
    times = []
    for _ in range(2):  # the first time room is made
        began = time.perf_counter()
        host.take([*own, *optimizer.held()])
        away = device_bytes(own) + (torch.cuda.memory_reserved() if device == "cuda" else 0)
        middle = time.perf_counter()
        host.give_back()
        times.append((middle - began, time.perf_counter() - middle))
    same &= all(torch.equal(a.detach().cpu(), b) for a, b in zip(own, kept, strict=True))
    return {
        "gb": round(held / 1e9, 3),
        "equal": float(same),
        "update_ms": round(1e3 * plain_s, 1),
        "offloaded_update_ms": round(1e3 * offloaded_s, 1),
        "eight_bit_update_ms": round(1e3 * coded_s, 1),
        "peak_gb": round(plain_most / 1e9, 2),
        "eight_bit_peak_gb": round(coded_most / 1e9, 2),
        "offloaded_peak_gb": round(most / 1e9, 2),
        "share_left_when_away": round(away / held, 4),
        "first_offload_s": round(times[0][0], 2),
        "offload_s": round(times[1][0], 3),
        "onload_s": round(times[1][1], 3),
    }


if __name__ == "__main__":
    print(json.dumps(main("--tiny" in sys.argv[1:])))
