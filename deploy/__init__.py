"""Manta's Python interface: `from deploy import load_recipe, train` (docs/python.md)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.config.config_errors import ConfigError
    from deploy.run.interface import RunResult, load_recipe, train

__all__ = ["ConfigError", "RunResult", "load_recipe", "train"]

_HOMES = {"ConfigError": "deploy.config.config_errors"}  # of the others: deploy.run.interface


def __getattr__(name: str) -> Any:
    # Every process of a run imports this package: what the interface needs is imported when it is asked for.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "deploy.run.interface")), name)
