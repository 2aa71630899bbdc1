"""A run's folder: where everything a run leaves lies, and how a stopped run is found again.

RUN/config.json       resolved options, manta_version    RUN/ledger.sqlite   every group and episode, with its fate
RUN/base/             the tiny base model, if one was built  RUN/groups/     stored rows, Arrow IPC streams
RUN/checkpoints/      the learner's states               RUN/evaluations/    rows of the evaluations
RUN/metrics.jsonl     one row a step                     RUN/summary.json, RUN/report.html   at the end
RUN/advantages/       of trained tokens, a file a version
RUN/turns/            turns of unfinished groups         RUN/logs/       of a local Ray, once the run has ended
RUN/driver.lock, roster.json, wanted.json                who drives the run, its parts, what was asked of it
RUN/notices.log       what its workers noticed and the console said, a line each
RUN/failure.log       of a run whose episodes failed too often: the traceback of the last one
RUN/sittings.json     what each sitting took: a run that was stopped and gone on with has several
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

CONFIG_FILE, LOCK = "config.json", "driver.lock"
VERSION_KEY = "manta_version"  # beside the options: the version of Manta that wrote the file
FIRST_TO_SAY = "0.2"  # the first version that says which it is
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def name(config: RunConfig) -> str:
    """A new run's name by the clock: that of its folder, unless there is one already."""
    return f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def choose(config: RunConfig, parent: Path) -> Path:
    """Make a private folder (mode 700) for a new run under a name that nothing else has, and return it."""
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
    """Make a private run folder (mode 700), where it is not there yet, and store the configuration in it."""
    make(folder)
    store(config, folder)


def make(folder: Path) -> None:
    """Make a private folder (mode 700) with all above it, where it is not there yet. ConfigError where it cannot be."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)


def make_private(folder: Path) -> bool:
    """Keep other users out of a run folder, whoever made it; False where its file system does not allow that."""
    with suppress(OSError):
        folder.chmod(0o700)
    return not folder.stat().st_mode & 0o077


@contextmanager
def parents_made(folder: Path) -> Iterator[None]:
    """Make this folder and all above it; what of them was made here and is empty at the end of the block is removed."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # it holds something
            for each in made:
                each.rmdir()


@contextmanager
def removed_unless_begun(folder: Path) -> Iterator[None]:
    """Remove the folder at the end of the block where no run was begun in it; the caller holds its lock."""
    try:
        yield
    finally:
        if not exists(folder) and {each.name for each in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says of a place that this user may not write into a ConfigError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise ConfigError(
            f"{error.filename or path}: {error.strerror}; name a folder that this user may write"
        ) from error


def store(config: RunConfig, folder: Path) -> None:
    """Write a run's configuration, or replace it, at one stroke. It is its user's own: what it executes is trusted."""
    aside = folder / f".{CONFIG_FILE}.part"
    written = {VERSION_KEY: VERSION} | config.model_dump(mode="json")
    aside.write_text(json.dumps(written, indent=2, ensure_ascii=False), encoding="utf-8")
    aside.rename(folder / CONFIG_FILE)
    remember(folder, executed(config))


def exists(folder: Path) -> bool:
    """Whether a run was started here; a folder without a configuration was given up before it began."""
    return (folder / CONFIG_FILE).is_file()


def open_existing(folder: Path) -> RunConfig:
    """Read the configuration of a run that was started before, by this version of Manta or an earlier one.

    ConfigError, one line, where it cannot be read; it names the version that wrote the folder.
    """
    stored = folder / CONFIG_FILE
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run folder")
    if not stored.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no {CONFIG_FILE}")
    tree, version = read_stored(stored)
    return parse(tree, f"{stored} (written by Manta {version}, read by Manta {VERSION})")


def read_stored(file: Path) -> tuple[Any, str]:
    """Read a config.json: the options under the names of today, and the version of Manta that wrote them."""
    tree, version = read_json(file), f"before {FIRST_TO_SAY}"
    if isinstance(tree, dict):
        version = str(tree.pop(VERSION_KEY, version))
    return with_current_names(tree), version


def read_json(file: Path) -> Any:
    """The content of a JSON file of a run folder. ConfigError, one line, where it cannot be read."""
    try:
        if not file.is_file():
            raise ValueError("no plain file")  # a pipe would be waited for, a device read for ever
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, or not even text
        raise ConfigError(
            f"{file}: broken file ({error}); restore it from a copy of the run folder"
        ) from error
