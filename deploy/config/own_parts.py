"""The parts of a configuration that are a user's own ("module:name"): which there are, and whether they fit."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from envs.code_lines import describe_error
from envs.user_functions import load_function
from rollout.wire.own_part import OwnPart, OwnPartRefused


def own_parts(settings: Any, where: str = "") -> Iterator[tuple[str, OwnPart]]:
    """Every part that is a user's own, with the name of its section. Nothing is imported to know it."""
    if isinstance(settings, OwnPart):
        yield where, settings
    elif isinstance(settings, BaseModel):
        for name in type(settings).model_fields:
            yield from own_parts(getattr(settings, name), f"{where}.{name}" if where else name)
    elif isinstance(settings, tuple):
        for place, each in enumerate(settings):
            yield from own_parts(each, f"{where}[{place}]")


def check_own_parts(config: RunConfig) -> None:
    """Import each part, look at its signature, and try it on a small example where that is cheap.

    ConfigError, one line that names the section, for a part that is not there or does not fit.
    """
    critic = config.learner.algorithm.critic is not None
    for where, part in own_parts(config):
        try:
            part.check_signature(load_function(part.kind))
        except (OwnPartRefused, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from error
        try:
            part.try_out(critic)
        except OwnPartRefused as error:
            raise ConfigError(f"{where}: {error}") from error
        except Exception as error:  # it is anybody's code
            raise ConfigError(
                f"{where}: {part.kind} failed on a small example: {describe_error(error)}"
            ) from error


@contextmanager
def importable(folders: Sequence[Path]) -> Iterator[None]:
    """Have modules in these folders found, before all others."""
    before = list(sys.path)
    sys.path[:0] = [os.fspath(folder.resolve()) for folder in folders]
    try:
        yield
    finally:
        sys.path[:] = before
