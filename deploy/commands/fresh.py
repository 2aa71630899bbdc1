"""Folders that commands write for their user: whole or absent, and never somebody else's."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.config.config_errors import ConfigError
from deploy.config.run_folder import writing


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; it becomes `target` at the end of the block, or is removed by an error.

    ConfigError where `target` is there already; of several processes that write it at once, one ends well.
    """
    if target.exists():
        raise _taken(target)
    partial = target.with_name(f".partial-{target.name}-{secrets.token_hex(4)}")
    with writing(target):
        partial.mkdir(parents=True)
    try:
        yield partial
        try:
            target.mkdir()  # to exactly one process; what is renamed then takes the place of an empty folder
        except FileExistsError:
            raise _taken(target) from None
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _taken(target: Path) -> ConfigError:
    return ConfigError(f"{target} is there already; name a folder that is not")
