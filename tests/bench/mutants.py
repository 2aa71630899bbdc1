"""Count the near misses of the programming environment's solutions that its examples and hidden tests let pass.

python -m tests.bench.mutants [TASKS_OF_EACH_KIND]
"""

from __future__ import annotations

import sys

import numpy as np

from envs.builtin.programming import FAMILIES, Programming
from envs.builtin.programming_tasks import draw_inputs, draw_task
from tests.envs.near_misses import FRESH, accepted


def main(tasks: int) -> None:
    env = Programming()
    print(f"level  family                near misses  same on {FRESH} inputs  passed")
    sums = [0, 0, 0]
    for family in FAMILIES:
        counts = [0, 0, 0]
        for seed in range(tasks):
            rng = np.random.default_rng(seed)
            task = draw_task([family], "all", rng)
            shown, hidden = draw_inputs(task, *env._counts, rng)
            others, same, passed = accepted(task, [*shown, *hidden])
            counts = [before + now for before, now in zip(counts, (others, same, len(passed)), strict=True)]
        print(f"{family.level:5}  {family.name:18} {counts[0]:12} {counts[1]:21} {counts[2]:7}", flush=True)
        sums = [before + now for before, now in zip(sums, counts, strict=True)]
    print(f"all    {'':18} {sums[0]:12} {sums[1]:21} {sums[2]:7}   ({sums[2] / sums[0]:.2%})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
