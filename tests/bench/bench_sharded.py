"""A model of a billion random parameters on four ranks: memory while loading, bytes read to go on, time lost by a save.

Prints JSON. The ranks are processes of this machine that gather over gloo; the model is float32, without moments, since
those of four ranks and a copy of them would not fit into 24 GiB. A save blocks a learner while its part is copied; the
rest of its time threads write. Told is the second save: the first touches new memory, which a learner's process keeps.
Memory is resident memory above what a rank holds before it has a model, at its highest.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from deploy.cluster.learner_part import KEEPS_MEMORY
from learner.parallel.ranks import Ranks
from learner.settings import LearnerSettings, ModelSettings
from learner.training.checkpoint import latest
from learner.training.learner import Learner
from tests.learner.together import together

RANKS, SECONDS = 4, 300.0
SHAPE = {
    "vocab_size": 32_768,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TINY = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}


def _build(folder: Path, tiny: bool) -> None:
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**(SHAPE | (TINY if tiny else {})))).save_pretrained(folder)


def _learner(ranks: Ranks, folder: Path) -> Learner:
    return Learner(LearnerSettings(model=ModelSettings(path=str(folder))), ranks=ranks)


def _status(name: str) -> int:
    """A number of kilobytes of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text(encoding="utf-8").split()[1])


def _forget_peak() -> int:
    """Begin to look for the highest resident memory; returns the present one."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def begun(ranks: Ranks, folder: Path, run: Path) -> dict[str, float]:
    """A learner made from the model, and a checkpoint of it."""
    ranks.gather(None)
    before = _forget_peak()
    began = time.perf_counter()
    learner = _learner(ranks, folder)
    loaded, peak = time.perf_counter() - began, _status("VmHWM") - before
    ranks.gather(None)
    found = {"peak": peak, "load_s": loaded}
    for save in ("first", "next"):  # the first touches new memory, which is kept
        ranks.gather(None)
        began = time.perf_counter()
        saving = learner.begin_save(run)
        blocked = time.perf_counter() - began
        saving.land()
        del saving  # as a learner lets go of it: the next copy takes its memory
        found |= {f"{save}_blocked_s": blocked, f"{save}_save_s": time.perf_counter() - began}
    return found


def resumed(ranks: Ranks, folder: Path, run: Path) -> dict[str, float]:
    """A learner that goes on from the checkpoint."""
    learner = _learner(ranks, folder)
    ranks.gather(None)
    read = _bytes_read()
    learner.load(run)
    return {"read": _bytes_read() - read}


def main(tiny: bool = False) -> dict[str, Any]:
    """The figures: of the rank with the most of each."""
    os.environ.update(KEEPS_MEMORY)  # as in a learner's processes on CPUs
    with tempfile.TemporaryDirectory(dir=os.environ.get("MANTA_BENCH_FOLDER")) as name:
        folder, run = Path(name) / "model", Path(name) / "run"
        building = multiprocessing.get_context("spawn").Process(target=_build, args=(folder, tiny))
        building.start()
        building.join()
        model = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        first = together(RANKS, begun, folder, run, seconds=SECONDS)
        newest = latest(run)
        assert newest is not None
        stored = sum(file.stat().st_size for file in newest.rglob("*.safetensors"))
        again = together(RANKS, resumed, folder, run, seconds=SECONDS)
        # With fewer ranks than it was written by, too.
        half = together(RANKS // 2, resumed, folder, run, seconds=SECONDS)
    most = {figure: max(each[figure] for each in first) for figure in first[0]}
    return {
        "gb": round(model / 1e9, 2),
        "load_s": round(most["load_s"], 1),
        "peak_mb": round(most["peak"] / 1e6),
        "over_share_mb": round((most["peak"] - model / RANKS) / 1e6),
        "read_share": round(sum(each["read"] for each in again) / stored, 4),
        "read_share_of_two": round(sum(each["read"] for each in half) / stored, 4),
        "save_s": round(most["next_save_s"], 1),
        "blocked_s": round(most["next_blocked_s"], 2),
        "blocked_share": round(most["next_blocked_s"] / most["next_save_s"], 3),
        "first_save_s": round(most["first_save_s"], 1),
        "first_blocked_s": round(most["first_blocked_s"], 2),
    }


if __name__ == "__main__":
    print(json.dumps(main("--tiny" in sys.argv[1:])))
