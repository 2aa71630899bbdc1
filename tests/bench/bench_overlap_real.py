"""The overlap with the real vLLM and the real learner, as the main recipe sets them; prints JSON.

Unlike in bench_overlap the parts need cores: where there are fewer than both ask for, they can only share them, and the
figure says as much about the machine as about Manta. It has no bound.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from functools import partial
from pathlib import Path

import ray

from deploy.assembly.build import start_engine
from deploy.assembly.models import build_learner
from tests.bench.bench_overlap import Rig, measure, summary
from tests.bench.player import playing_model, recipe

ROUNDS = 3


def main() -> dict[str, float]:
    """Median of the rounds' ratios, and the seconds a step it is made of."""
    config = recipe()
    with tempfile.TemporaryDirectory() as name:
        path = playing_model(config, Path(name))
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
        try:
            rig = Rig(config, Path(name), path, start_engine, partial(build_learner, config, path))
            return summary(asyncio.run(measure(rig, ROUNDS)))
        finally:
            ray.shutdown()


if __name__ == "__main__":
    print(json.dumps(main()))
