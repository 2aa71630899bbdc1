"""A data file of 100,000 rows of 1 KB on its way into a run: checked when submitted, then opened by an environment.

The file of rows is not there yet. Memory is what the process has more than before at its peak, pages of mapped files
included, and what of it no other process shares at the end. Prints JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

from envs.datasets.dataset import Dataset

ROWS = 100_000
TERMS = 230  # "1 + " so often makes a row of about 1 KB


def _write(path: Path) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for number in range(ROWS):
            row = {"question": f"what is {'1 + ' * TERMS}{number}?", "answer": str(TERMS + number)}
            lines.write(json.dumps(row) + "\n")


def _status(name: str) -> float:
    """A size of this process in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MANTA_CACHE"] = folder
        path = Path(folder) / "rows.jsonl"
        _write(path)
        peak, anonymous, begun = _status("VmHWM"), _status("RssAnon"), time.perf_counter()
        Dataset.check_tasks(path=str(path), split="train", rewards="number")
        for split in ("train", "heldout"):
            Dataset(path=str(path), split=split, rewards="number").reset(seed=1)
        figures = {
            "start_s": time.perf_counter() - begun,
            "peak_mb": _status("VmHWM") - peak,
            "anonymous_mb": _status("RssAnon") - anonymous,
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
