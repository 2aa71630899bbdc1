"""A benchmark in a process of its own, whose last line on standard output is JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What it printed, or why it printed nothing."""

    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def ask(module: str, limit_s: int, options: Sequence[str] = ()) -> Answer:
    """Run a module of `tests.bench` for at most so long."""
    began = time.perf_counter()
    # A session of its own, so that an engine's processes can be ended with it.
    process = subprocess.Popen(
        [sys.executable, "-m", f"tests.bench.{module}", *options],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"},
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    figures: dict[str, Any] = {}
    error = ""
    try:
        printed, complained = process.communicate(timeout=limit_s)
        if process.returncode:
            error = complained.strip()[-2000:] or f"exit status {process.returncode}"
        else:
            figures = json.loads(printed.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        error = f"took longer than {limit_s} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return Answer(round(time.perf_counter() - began, 1), figures, error)
