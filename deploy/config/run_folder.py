"""The folder of a run: its files, how it is made, and how a stored configuration is read.

RUN/config.json       resolved options, manta_version    RUN/ledger.sqlite   every group and episode, with its fate
RUN/base/             the tiny base model, if one was built  RUN/groups/     stored rows, Arrow IPC streams
RUN/stages/           metrics of each stage; its checkpoints, until there is one of a version
RUN/checkpoints/      the learner's states               RUN/evaluations/    rows of the evaluations
RUN/metrics.jsonl     one row a step                     RUN/summary.json, RUN/report.html   at the end
RUN/advantages/       advantages of trained tokens, a file a version
RUN/copy/             the copy of a replay buffer's state, where that lies on a local disk; RUN/buffer.lock, where not
RUN/turns/            turns of unfinished groups         RUN/logs/       of all nodes
RUN/driver.lock, roster.json, wanted.json                the driver's process, the run's parts, a wanted scale
RUN/notices.log       warnings of all parts, a line each RUN/labels/     what people said of its episodes
RUN/failure.log       the traceback of the failure that ended the run: of an episode, or of a user's own part
RUN/state.json, losses.jsonl, driver.log                 the driver's last word, losses of parts, its console
RUN/versions/         versions that may be met as opponents  RUN/policies/    such a folder for each of several policies
RUN/sessions.json     the time of each session: a run that was stopped and resumed has several
"""

from __future__ import annotations

import errno
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.load import parse
from deploy.config.renamed import with_current_names
from deploy.config.trust import executed, remember
from deploy.config.version import VERSION
from rollout.wire.whole_file import replace_file

CONFIG_FILE, LOCK, POLICIES = "config.json", "driver.lock", "policies"
VERSION_KEY = "manta_version"  # in config.json: the version of Manta that wrote the file
FIRST_TO_SAY = "0.2"  # the first version that stores its number
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def name(config: RunConfig) -> str:
    """The name of a new run by the clock."""
    return f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def choose(config: RunConfig, parent: Path) -> Path:
    """Make a private folder (mode 700) with a unique name for a new run, and return it."""
    first = parent / name(config)
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for folder in itertools.chain([first], others):
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                continue
            return folder
    raise AssertionError("numbers do not end")


def create(config: RunConfig, folder: Path) -> None:
    """Make a private run folder (mode 700), unless it exists, and store the configuration in it."""
    make(folder)
    store(config, folder)


def make(folder: Path) -> None:
    """Make a private folder (mode 700) and its parents, unless they exist. ConfigError if that is not possible."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)


def make_private(folder: Path) -> bool:
    """Make an existing run folder private; False if its file system does not support that."""
    with suppress(OSError):
        folder.chmod(0o700)
    return not folder.stat().st_mode & 0o077


@contextmanager
def parents_made(folder: Path) -> Iterator[None]:
    """Make this folder and its parents; those made here and still empty at the end of the block are removed."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty
            for each in made:
                each.rmdir()


@contextmanager
def removed_unless_begun(folder: Path) -> Iterator[None]:
    """Remove the folder at the end of the block if no run was started in it; the caller holds its lock."""
    try:
        yield
    finally:
        if not exists(folder) and {each.name for each in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError for a path that this user may not write into a ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise ConfigError(
            f"{error.filename or path}: {error.strerror}; choose a folder that you may write"
        ) from error


def store(config: RunConfig, folder: Path) -> None:
    """Write or replace a run's configuration atomically. It is the user's own, so what it executes is trusted."""
    written = {VERSION_KEY: VERSION} | config.model_dump(mode="json")
    replace_file(folder / CONFIG_FILE, json.dumps(written, indent=2, ensure_ascii=False))
    remember(folder, executed(config))


def of_policy(run: Path, name: str) -> Path:
    """The folder of one of a run's several policies."""
    return run / POLICIES / name


def exists(folder: Path) -> bool:
    """Whether a run was started here, which stores the configuration first."""
    return (folder / CONFIG_FILE).is_file()


def open_existing(folder: Path) -> RunConfig:
    """Read the configuration of an existing run, written by this version of Manta or an earlier one.

    ConfigError, one line, if it cannot be read; the line names the version that wrote the folder.
    """
    stored = folder / CONFIG_FILE
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run folder; check the path")
    if not stored.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no {CONFIG_FILE}")
    tree, version = read_stored(stored)
    return parse(tree, f"{stored} (written by Manta {version}, read by Manta {VERSION})")


def read_stored(file: Path) -> tuple[Any, str]:
    """Read a config.json: the options under the present names, and the version of Manta that wrote them."""
    tree, version = read_json(file), f"before {FIRST_TO_SAY}"
    if isinstance(tree, dict):
        version = str(tree.pop(VERSION_KEY, version))
    return with_current_names(tree), version


def read_json(file: Path) -> Any:
    """The content of a JSON file of a run folder. ConfigError, one line, if it cannot be read."""
    try:
        if not file.is_file():
            raise ValueError("not a regular file")  # reading a pipe or a device might never end
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON or not text
        raise ConfigError(
            f"{file}: broken file ({error}); restore it from a copy of the run folder"
        ) from error
