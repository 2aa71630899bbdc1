"""What only a GPU can show, in one command of at most nine minutes: `make gpu-check`.

    python -m tests.bench.gpu_check [NAME ...] [--out FILE]

Each check runs in a process of its own with a limit of its own. torch, transformers and the learner's other packages
are enough for all but `ring`. Without a GPU each is rehearsed on the CPU with tiny shapes, which shows that it runs and
nothing else. Prints one table and writes one JSON file. The exit status is 1 where a check failed or a bound was not
met; what was left out is said with its reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tests.bench.child import ask


@dataclass(frozen=True)
class Check:
    """A module of this folder that prints JSON."""

    name: str
    shows: str
    module: str
    limit_s: int  # on a GPU; together below nine minutes
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # packages beyond the learner's
    at_most: dict[str, float] = field(default_factory=dict)
    at_least: dict[str, float] = field(default_factory=dict)


CHECKS = (
    Check(
        "attention",
        "kernels of trees and of rows beside a dense softmax",
        "gpu_attention",
        50,
        at_most={"tree_error_float32": 1e-4, "apart_error_float32": 1e-4, "tree_error_bfloat16": 3e-2}
        | {"apart_error_bfloat16": 3e-2},
    ),
    Check("learner", "MFU of a step at 1.7B, beside plain transformers", "gpu_learner", 90),
    Check(
        "learner_8b",
        "the same for four layers of 8B; compiled, and in float8",
        "gpu_learner",
        140,
        ("--model", "8b", "--also", "compile", "float8"),
    ),
    Check("tree", "a step at 1.7B with and without shared prefixes", "gpu_tree", 70),
    Check(
        "checkpoint",
        "weights to and from files at 1.7B",
        "gpu_checkpoint",
        50,
        at_least={"equal": 1.0},
    ),
    Check(
        "offload",
        "a learner's state to the host and back at 1.7B",
        "gpu_offload",
        30,
        at_most={"share_left_when_away": 0.01},
        at_least={"equal": 1.0},
    ),
    Check("ring", "Ray, vLLM and learner on one GPU", "gpu_ring", 110, needs=("ray", "vllm")),
)
REHEARSAL_S = 300  # limit of a check on a CPU


@dataclass(frozen=True)
class Outcome:
    """What a check printed, or why it did not."""

    check: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    left_out: str = ""
    error: str = ""


def run(check: Check, on_gpu: bool) -> Outcome:
    """One check in a process of its own."""
    if lacking := [name for name in check.needs if find_spec(name) is None]:
        return Outcome(check.name, left_out=f"{' and '.join(lacking)} not installed")
    options = list(check.options) if on_gpu else [*check.options, "--tiny"]
    answer = ask(check.module, check.limit_s if on_gpu else REHEARSAL_S, options)
    return Outcome(check.name, answer.seconds, answer.figures, error=answer.error)


def unmet(check: Check, outcome: Outcome) -> list[str]:
    """The bounds that an outcome does not keep, in words."""
    figures = outcome.figures
    high = [f"{n} {figures[n]:g} > {most:g}" for n, most in check.at_most.items() if not figures[n] <= most]
    low = [
        f"{n} {figures[n]:g} < {least:g}" for n, least in check.at_least.items() if not figures[n] >= least
    ]
    return high + low


def verdict(check: Check, outcome: Outcome) -> str:
    """In a word or a line."""
    if outcome.left_out:
        return f"left out: {outcome.left_out}"
    if outcome.error:
        return f"failed: {outcome.error.splitlines()[-1]}"
    return "; ".join(unmet(check, outcome)) or "ok"


def where(on_gpu: bool) -> str:
    """The device, in words."""
    if on_gpu:
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"no GPU: rehearsed on the CPU with tiny shapes, torch {torch.__version__}"


def main(arguments: Sequence[str]) -> int:
    known = [check.name for check in CHECKS]
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu_check", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(known)}; none: all")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check.json"))
    asked = parser.parse_args(arguments)
    if unknown := sorted(set(asked.names) - set(known)):
        parser.error(f"no check {unknown[0]!r}; there are: {', '.join(known)}")
    on_gpu = torch.cuda.is_available()
    print(where(on_gpu), flush=True)
    outcomes = []
    failed = False
    for check in CHECKS:
        if asked.names and check.name not in asked.names:
            continue
        outcome = run(check, on_gpu)
        outcomes.append(outcome)
        failed |= bool(outcome.error or (outcome.figures and unmet(check, outcome)))
        print(f"\n{check.name}: {check.shows} ({outcome.seconds:g} s): {verdict(check, outcome)}")
        for name, value in outcome.figures.items():
            print(f"  {name:28} {value:g}" if isinstance(value, float | int) else f"  {name:28} {value}")
        sys.stdout.flush()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"device": where(on_gpu), "checks": [asdict(outcome) for outcome in outcomes]}
    asked.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"\nwrote {asked.out}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
