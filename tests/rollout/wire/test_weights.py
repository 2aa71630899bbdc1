from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rollout.wire.weights import Probe, WeightMismatch, write_memory

READ = """
import sys
from rollout.wire.weights import open_file
print([array.tolist() for array in open_file(sys.argv[1], [3, 0, 2])])
"""


def test_another_process_maps_weights_in_memory_and_nothing_is_left_when_they_are_let_go() -> None:
    arrays = [np.array(values, dtype=np.uint8) for values in ([1, 2, 3], [], [9, 8])]
    handle, file = write_memory(arrays)
    read = [sys.executable, "-c", READ, handle.address]
    root = Path(__file__).parents[3]
    done = subprocess.run(read, cwd=root, capture_output=True, text=True, check=True, encoding="utf-8")
    assert done.stdout.strip() == "[[1, 2, 3], [], [9, 8]]"
    mapped = handle.open([3, 0, 2])
    path = Path(handle.address)
    assert path.exists()
    del file
    assert not path.exists()
    assert [array.tolist() for array in mapped] == [[1, 2, 3], [], [9, 8]], "what is mapped stays"
    with pytest.raises(FileNotFoundError):
        handle.open([3, 0, 2])


def test_an_engine_that_rounds_more_coarsely_is_allowed_in_proportion() -> None:
    probe = Probe((1, 2, 3), (-1.0, -2.0), tolerance=0.01)
    apart = [-1.1, -2.1]
    with pytest.raises(WeightMismatch, match=r"0.1 nats on average \(allowed 0.01\)"):
        probe.check("rollout-0", 3, apart)
    assert probe.check("rollout-0", 3, apart, coarseness=16) == pytest.approx(0.1)
    with pytest.raises(WeightMismatch, match=r"allowed 0.16"):
        probe.check("rollout-0", 3, [-1.2, -2.2], coarseness=16)
