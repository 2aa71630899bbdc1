"""User modules and functions, named "module:function" in recipes, and their results, which may be awaitable."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import threading
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

from envs.code_lines import describe_error


def load_function(reference: str) -> Callable[..., Any]:
    """The function named "module:function". ValueError, one line, if it does not exist."""
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
    """Import a user module. ValueError, one line with the failing line of code, if it is missing, raises or exits."""
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # user code may raise anything
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        if missing:
            raise ValueError(f"there is no module {module} to import here") from None
        raise ValueError(f"importing module {module} raised {describe_error(error)}") from error


async def awaited(value: Any) -> Any:
    """The result of a function, awaited if it is awaitable."""
    return await value if inspect.isawaitable(value) else value


def settled(value: Any) -> Any:
    """`awaited` for synchronous callers: a coroutine runs to completion on an event loop of its own."""
    if not inspect.isawaitable(value):
        return value
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(awaited(value))
    return _run_in_thread(value)


def _run_in_thread(value: Awaitable[Any]) -> Any:
    """Run an awaitable in a new thread, because this thread's event loop is already running."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((asyncio.run(awaited(value)), None))
        except BaseException as error:  # re-raised in the caller's thread
            outcome.extend((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    result, error = outcome
    if error is not None:
        raise error
    return result
