"""The learner's weights from and to files: seconds, GB/s, and whether what is read is what was written.

    python -m tests.bench.gpu_checkpoint [--tiny]

The model is that of `gpu_learner`, 1.7 billion parameters in float32 on the GPU. `--tiny` is a rehearsal on a CPU.
Prints JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from learner.model.policy import Policy
from learner.settings import ModelSettings
from tests.bench.gpu_learner import LARGE, TINY, build


def main(tiny: bool) -> dict[str, Any]:
    """The figures."""
    shape, device = (TINY, "cpu") if tiny else (LARGE, "cuda")
    with tempfile.TemporaryDirectory() as name:
        folder, saved = Path(name) / "model", Path(name) / "saved"
        build(folder, shape)
        settings = ModelSettings(path=str(folder), device=device, dtype="bfloat16")
        began = time.perf_counter()
        policy = Policy(settings)
        loaded = time.perf_counter() - began
        gigabytes = sum(p.numel() * p.element_size() for p in policy.model.parameters()) / 1e9
        saved.mkdir()
        began = time.perf_counter()
        policy.save(saved)
        wrote = time.perf_counter() - began
        began = time.perf_counter()
        again = Policy.restored(settings, saved)
        read = time.perf_counter() - began
        pairs = zip(policy.model.parameters(), again.model.parameters(), strict=True)
        same = all(torch.equal(one, other) for one, other in pairs)
    return {
        "gb": round(gigabytes, 3),
        "load_s": round(loaded, 2),
        "save_s": round(wrote, 2),
        "restore_s": round(read, 2),
        "save_gb_per_s": round(gigabytes / wrote, 2),
        "equal": float(same),
        "host_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


if __name__ == "__main__":
    print(json.dumps(main("--tiny" in sys.argv[1:])))
