"""References to a user's own functions, as recipes write them: "module:function"."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def load_function(reference: str) -> Callable[..., Any]:
    """The function meant by "module:function". ValueError, one line, where there is none."""
    module, colon, name = reference.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{reference!r} is not of the form module:function")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"{reference!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"{reference!r}: module {module} has no function {name!r}")
    loaded: Callable[..., Any] = found
    return loaded
