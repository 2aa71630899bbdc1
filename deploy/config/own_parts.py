"""A user's own parts ("module:name") of a configuration: found, and checked against their signatures."""

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
from envs.user_functions import load_function
from rollout.wire.own_part import OwnPart, OwnPartFailed, OwnPartRefused


def own_parts(settings: Any, where: str = "") -> Iterator[tuple[str, OwnPart]]:
    """Every own part, with the name of its section. Nothing is imported."""
    if isinstance(settings, OwnPart):
        yield where, settings
    elif isinstance(settings, BaseModel):
        for name in type(settings).model_fields:
            yield from own_parts(getattr(settings, name), f"{where}.{name}" if where else name)
    elif isinstance(settings, tuple):
        for place, each in enumerate(settings):
            yield from own_parts(each, f"{where}[{place}]")


def check_own_parts(config: RunConfig) -> None:
    """Import each part, check its signature, and call it on a small example where that is cheap.

    ConfigError, one line that names the section, for a part that cannot be imported, does not fit, or fails.
    """
    critic = config.learner.algorithm.critic is not None
    for where, part in own_parts(config):
        try:
            part.check_signature(load_function(part.kind))
            part.try_out(critic)
        except OwnPartFailed as error:
            raise ConfigError(f"{where}, called on a small example: {error}") from error
        except (OwnPartRefused, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from error


@contextmanager
def importable(folders: Sequence[Path]) -> Iterator[None]:
    """Put these folders first in the module search path."""
    before = list(sys.path)
    sys.path[:0] = [os.fspath(folder.resolve()) for folder in folders]
    try:
        yield
    finally:
        sys.path[:] = before
