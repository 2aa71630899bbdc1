"""Every benchmark that has a bound, or those named: each in a process of its own, in turn, and one table at the end.

    python -m tests.bench [NAME ...] [--out FILE]

What is compared is compared within one run, in turns, after a warm-up. The exit status is 1 when a bound was not met, 2
when a benchmark did not run to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from deploy.report.console import Cell, Console, errors, write, write_table
from tests.bench.child import ask

BENCHMARKS = (
    "rollout",
    "learner",
    "packing",
    "tree",
    "logprobs",
    "overlap",
    "sync",
    "probe",
    "transfer",
    "buffer",
    "durability",
    "episodes",
    "scale",
    "datasets",
    "sharded",
)
ON_REQUEST = ("overlap_real", "nf4", "fewer_bits", "compiled")  # have no bound
LIMIT_S = 600  # several times what any takes on two free cores


@dataclass(frozen=True)
class Bound:
    """What one figure of a benchmark must keep."""

    benchmark: str
    figure: str
    means: str
    side: Literal["at least", "at most"]
    value: float

    def met(self, measured: float) -> bool:
        return measured >= self.value if self.side == "at least" else measured <= self.value


BOUNDS = (
    Bound("rollout", "ratio", "tokens/s of a rollout worker, of those of bare vLLM", "at least", 0.9),
    Bound("learner", "ratio", "tokens/s of the learner, of those of a bare loop", "at least", 0.90),
    Bound("packing", "ratio", "learner's tokens/s on unequal lengths, of a padded loop's", "at least", 1.5),
    Bound(
        "packing", "overhead", "a step outside forward, backward and optimizer, of it all", "at most", 0.05
    ),
    Bound(
        "tree", "frozen_lake_ratio", "learner with shared prefixes, of without: frozen_lake", "at least", 3.0
    ),
    Bound("tree", "household_ratio", "the same: household, full history", "at least", 2.0),
    Bound("tree", "long_prompt_ratio", "the same: 16 x 512 tokens after 4,096", "at least", 5.0),
    Bound("logprobs", "growth", "peak memory with 32 times as many logits, of before", "at most", 1.5),
    Bound("logprobs", "largest_difference", "from logprobs and gradients over all logits", "at most", 1e-5),
    Bound("overlap", "ratio", "a step with both at work, of the longer part alone", "at most", 1.25),
    Bound("sync", "stall_ms", "generation stands still for new weights, ms", "at most", 100),
    Bound("sync", "delta_share", "bytes of a delta, of the whole version's", "at most", 0.1),
    Bound("sync", "deltas_exact", "of 50 deltas those exact to the bit", "at least", 50),
    Bound("probe", "correct", "sound syncs that pass", "at least", 1.0),
    Bound("probe", "dropped", "syncs refused that left a tensor out", "at least", 1.0),
    Bound("probe", "before", "refused with a tensor of the version before", "at least", 1.0),
    Bound("probe", "noise", "refused with noise of 1% of a tensor's norm", "at least", 1.0),
    Bound("probe", "swapped", "refused with two layers in each other's place", "at least", 1.0),
    Bound("probe", "vllm_correct", "the real vLLM: sound syncs that pass", "at least", 1.0),
    Bound("probe", "vllm_refused", "the real vLLM: syncs refused with any of these", "at least", 1.0),
    Bound("transfer", "ratio", "weight bytes/s by object store, of a plain copy's", "at least", 0.5),
    Bound("buffer", "memory_gb_per_s", "groups through add and take, GB/s", "at least", 1.0),
    Bound(
        "buffer", "disk_ratio", "the same with ledger and segments, of a plain file's rate", "at least", 0.7
    ),
    Bound("durability", "ratio", "tokens/s of a worker, of those without durability", "at least", 0.97),
    Bound("episodes", "turn_ms", "a turn of a worker with 1,000 episodes, ms of a core", "at most", 1.0),
    Bound("episodes", "episode_kb", "memory that each of them holds, KB", "at most", 200),
    Bound("episodes", "beside_stuck", "turns/s beside a stuck replica, of those without", "at least", 0.9),
    Bound("episodes", "process_adds_ms", "a replica's process adds to a step, ms", "at most", 0.3),
    Bound("scale", "linear", "turns/s of eight workers, of eight times one", "at least", 0.85),
    Bound("datasets", "start_s", "100,000 rows checked and opened, s", "at most", 5),
    Bound("datasets", "peak_mb", "memory more than without them, MB", "at most", 200),
    Bound("sharded", "over_share_mb", "peak of a rank that loads, above its share, MB", "at most", 300),
    Bound("sharded", "read_share", "bytes that all ranks read to go on, of the checkpoint", "at most", 1.01),
    Bound("sharded", "blocked_share", "of a save's time the learner waits", "at most", 0.1),
    Bound("buffer", "resident_growth_mb", "memory grown over 100,000 groups, MB", "at most", 8),
)


@dataclass(frozen=True)
class Outcome:
    """What one benchmark printed, and under which load of the machine (mean runnable processes of a minute)."""

    benchmark: str
    seconds: float
    load_before: float
    load_after: float
    figures: dict[str, float]
    error: str = ""


def run(name: str) -> Outcome:
    """One benchmark in a process of its own."""
    load = os.getloadavg()[0]
    answer = ask(f"bench_{name}", LIMIT_S)
    return Outcome(name, answer.seconds, load, os.getloadavg()[0], answer.figures, answer.error)


def table(outcomes: Sequence[Outcome]) -> list[tuple[Cell, ...]]:
    """One row a bound; a benchmark without bounds has one row of all its figures."""
    shown: list[tuple[Cell, ...]] = []
    for outcome in outcomes:
        bounds = [bound for bound in BOUNDS if bound.benchmark == outcome.benchmark]
        if outcome.error:
            shown.append(
                (outcome.benchmark, outcome.error.splitlines()[-1], "-", "-", ("did not run", "red"))
            )
        elif not bounds:
            listed = ", ".join(f"{figure} {value:g}" for figure, value in outcome.figures.items())
            shown.append((outcome.benchmark, listed, "-", "-", "-"))
        for bound in [] if outcome.error else bounds:
            measured = outcome.figures[bound.figure]
            met = ("yes", "green") if bound.met(measured) else ("no", "red")
            limit = f"{bound.side} {bound.value:g}"
            shown.append((outcome.benchmark, bound.means, f"{measured:g}", limit, met))
    return shown


def status(outcomes: Sequence[Outcome]) -> int:
    """0: all ran and met their bounds."""
    if any(outcome.error for outcome in outcomes):
        return 2
    figures = {outcome.benchmark: outcome.figures for outcome in outcomes}
    bounds = [bound for bound in BOUNDS if bound.benchmark in figures]
    return 0 if all(bound.met(figures[bound.benchmark][bound.figure]) for bound in bounds) else 1


def report(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Everything measured, for --out."""
    bounds = [
        asdict(bound)
        | {"measured": outcome.figures[bound.figure], "met": bound.met(outcome.figures[bound.figure])}
        for outcome in outcomes
        for bound in BOUNDS
        if bound.benchmark == outcome.benchmark and not outcome.error
    ]
    return {
        "cores": os.cpu_count(),
        "bounds": bounds,
        "benchmarks": [asdict(outcome) for outcome in outcomes],
    }


def main() -> int:
    known = (*BENCHMARKS, *ON_REQUEST)
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of: {', '.join(known)}; none: all with a bound"
    )
    parser.add_argument("--out", type=Path, help="write everything measured to this file, as JSON")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.names) - set(known)):
        parser.error(f"no benchmark {unknown[0]!r}; there are: {', '.join(known)}")
    outcomes: list[Outcome] = []
    for name in asked.names or BENCHMARKS:
        outcomes.append(run(name))
        last = outcomes[-1]
        write(errors(), f"{name}: {last.seconds:g} s {last.error or json.dumps(last.figures)}")
        if asked.out:
            asked.out.write_text(json.dumps(report(outcomes), indent=1), encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 130)
    write_table(console, ("benchmark", "what", "figure", "bound", "met"), table(outcomes))
    return status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
