"""A user's own modules and functions, as recipes name them ("module:function"), and what they return."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import threading
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

from envs.own_frames import told


def load_function(reference: str) -> Callable[..., Any]:
    """The function meant by "module:function". ValueError, one line, where there is none."""
    module, colon, name = reference.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{reference!r} is not of the form module:function")
    try:
        found = getattr(imported(module), name, None)
    except ValueError as error:
        raise ValueError(f"{reference!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"{reference!r}: module {module} has no function {name!r}")
    loaded: Callable[..., Any] = found
    return loaded


def imported(module: str) -> ModuleType:
    """A user's own module. ValueError, one line, where it is not there, raises or exits; names the line that did."""
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # it is anybody's code
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        if missing:
            raise ValueError(f"there is no module {module} to import here") from None
        raise ValueError(f"importing module {module} raised {told(error)}") from error


async def awaited(value: Any) -> Any:
    """What a function returned; where that is awaitable, what it comes to. Coroutine functions are not told apart."""
    return await value if inspect.isawaitable(value) else value


def settled(value: Any) -> Any:
    """`awaited` for a thread that does not await: a coroutine runs to its end on an event loop of its own."""
    if not inspect.isawaitable(value):
        return value
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(awaited(value))
    return _elsewhere(value)


def _elsewhere(value: Awaitable[Any]) -> Any:
    """A thread runs one event loop at a time: where one runs, another thread has the coroutine's."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((asyncio.run(awaited(value)), None))
        except BaseException as error:  # for the caller's thread, where it is raised
            outcome.extend((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    result, error = outcome
    if error is not None:
        raise error
    return result
