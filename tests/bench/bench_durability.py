"""What durability costs: the worker of the main recipe with it and without it, on one real vLLM, in turns in one run.

Without: no turn is recorded and no file is synced (rows and ledger are still written). Prints JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.config.config import RunConfig
from rollout.episodes.recorder import Recorder
from tests.bench.bench_rollout import Rig
from tests.bench.player import playing_model, recipe

ROUNDS, WARM_UP = 7, 2


@contextmanager
def _switched_off() -> Iterator[None]:
    """No sync of any file of ours, and no turns."""
    fsync, note = os.fsync, Recorder.note

    def nothing(*args: Any) -> None:
        pass

    os.fsync, Recorder.note = nothing, nothing  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        os.fsync, Recorder.note = fsync, note  # type: ignore[method-assign]


async def _measure(config: RunConfig, folder: Path, path: str) -> list[dict[str, float]]:
    rig = Rig(config, folder, path)
    await rig.start()
    rounds = []
    try:
        for number in range(WARM_UP + ROUNDS):
            rates = {}
            # Whoever goes first meets another machine than whoever goes second: they change places.
            for durable in (True, False) if number % 2 else (False, True):
                seed = 2 * number + durable
                if durable:
                    played = await rig.play(seed)
                else:
                    with _switched_off():
                        played = await rig.play(seed)
                rates["durable" if durable else "without"] = played.tokens / played.seconds
            rounds.append(rates)
    finally:
        await rig.close()
    return rounds[WARM_UP:]


def main() -> dict[str, float]:
    """Medians; `ratio` is tokens per second with durability, of those without (target: at least 0.97)."""
    config = recipe()
    with tempfile.TemporaryDirectory() as name:
        path = playing_model(config, Path(name))
        rounds = asyncio.run(_measure(config, Path(name), path))
    ratios = [one["durable"] / one["without"] for one in rounds]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_lowest": round(min(ratios), 3),
        "ratio_highest": round(max(ratios), 3),
    } | {f"{how}_tokens_per_s": round(statistics.median(one[how] for one in rounds)) for how in rounds[0]}


if __name__ == "__main__":
    print(json.dumps(main()))
