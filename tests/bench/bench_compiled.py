"""What compiled layers take of the time of a real model's passes, and how far their numbers differ; prints JSON.

    python -m tests.bench compiled

SmolLM2 reads pieces of this repository's pages, forward and backward, in either type: in turns with compiled layers and
without, after a row of each kind that is compiled for. Needs `make llm` and a C++ compiler.
"""

from __future__ import annotations

import json
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from learner.data.batch import MicroBatch
from learner.model.policy import Policy
from learner.settings import ModelSettings
from tests.bench.bench_fewer_bits import rows
from tests.smollm2 import FOLDER

TIMES = 3


def passed(policy: Policy, row: MicroBatch) -> tuple[float, Tensor, Tensor]:
    """Seconds of a row's passes, its logprobs and its gradients."""
    for parameter in policy.parameters():
        parameter.grad = None
    began = time.perf_counter()
    logprobs_N, _ = policy.score(row, 1.0)
    (-logprobs_N.mean()).backward()
    seconds = time.perf_counter() - began
    gradients = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
    return seconds, logprobs_N.detach(), torch.cat(gradients)


def compared(dtype: str, exact: list[Tensor]) -> dict[str, float]:
    """The figures of one type. exact: gets the logprobs of the first one, to compare others with."""
    options: dict[str, Any] = {"path": str(FOLDER), "dtype": dtype}
    plain, quick = (
        Policy(ModelSettings.model_validate(options | {"compile": on}), examined=True) for on in (False, True)
    )
    short, other, *_, long = rows()
    began = time.perf_counter()
    for row in (short, long):  # for the one length, and for any
        passed(quick, row)
    compiling = time.perf_counter() - began
    passed(plain, long)
    turns = [(passed(plain, long), passed(quick, long)) for _ in range(TIMES)]
    (_, expected_N, gradient), (_, found_N, other_gradient) = turns[-1]
    exact.append(expected_N)
    cosine = float(cosine_similarity(gradient.double(), other_gradient.double(), dim=0))
    before = time.perf_counter()
    passed(quick, other)
    return {
        "ratio of time": median(mine[0] / theirs[0] for theirs, mine in turns),
        "seconds without": median(theirs[0] for theirs, _ in turns),
        "tokens": float(len(long.input_ids_T)),
        "largest difference of a logprob": float((found_N - expected_N).abs().max()),
        "mean difference of a logprob": _apart(found_N, expected_N),
        "the same from float32's, without": _apart(expected_N, exact[0]),
        "the same from float32's, compiled": _apart(found_N, exact[0]),
        "cosine of the gradients": cosine,
        "seconds of the first two rows": compiling,
        "seconds of a row of 254": time.perf_counter() - before,
    }


def _apart(one_N: Tensor, other_N: Tensor) -> float:
    return float((one_N - other_N).abs().mean())


def main() -> None:
    """Both types."""
    exact: list[Tensor] = []
    found = {
        f"{dtype}: {name}": value
        for dtype in ("float32", "bfloat16")
        for name, value in compared(dtype, exact).items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
