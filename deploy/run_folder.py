"""A run's folder: where everything a run leaves lies, and how a stopped run is found again.

RUN/config.json       the resolved configuration         RUN/ledger.sqlite   every group and episode, with its fate
RUN/base/             the tiny base model, if one was built  RUN/groups/     stored rows, Arrow IPC streams
RUN/checkpoints/      the learner's states               RUN/evaluations/    rows of the evaluations
RUN/metrics.jsonl     one row a step                     RUN/summary.json, RUN/report.html   at the end
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from deploy.config import ConfigError, RunConfig, parse

CONFIG_FILE = "config.json"


def create(config: RunConfig, parent: Path) -> Path:
    """Make a new, private run folder (mode 700) and store the configuration in it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = parent / f"{config.name}-{stamp}"
    suffix = 1
    while folder.exists():
        suffix += 1
        folder = parent / f"{config.name}-{stamp}-{suffix}"
    folder.mkdir(parents=True, mode=0o700)
    (folder / CONFIG_FILE).write_text(config.model_dump_json(indent=2))
    return folder


def open_existing(folder: Path) -> RunConfig:
    """The configuration of a run that was started before."""
    stored = folder / CONFIG_FILE
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run folder")
    if not stored.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no {CONFIG_FILE}")
    try:
        tree = json.loads(stored.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{stored}: broken file ({error}); a run cannot go on without its configuration"
        ) from error
    return parse(tree, str(stored))
