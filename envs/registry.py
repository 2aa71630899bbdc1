"""Environments by id: ours, and any that `gymnasium.make` knows.

Modules are imported when their environment is first asked for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import gymnasium as gym

from envs.adapters import TextAdapter, UnsupportedSpace

Env = gym.Env[Any, str]
_Factory = Callable[..., Env]


class EnvironmentUnknown(ValueError):
    """There is no such environment, or it cannot be made as asked; the message says what there is."""


class Player(Protocol):
    """A scripted player: one an episode, asked once a turn."""

    def act(self, observation: Any) -> str: ...


_OURS: dict[str, str | _Factory] = {
    "frozen_lake": "envs.frozen_lake:FrozenLake",
    "household": "envs.household:Household",
    "memory_corridor": "envs.memory_corridor:MemoryCorridor",
}
_PLAYERS: dict[str, str] = {
    "frozen_lake": "envs.frozen_lake:Player",
    "household": "envs.household:Player",
    "memory_corridor": "envs.memory_corridor:Player",
}


def register(env_id: str, factory: _Factory) -> None:
    """Add an environment under an id of one's own; `factory(**options)` makes a replica."""
    _OURS[env_id] = factory


def registered() -> list[str]:
    """The ids that are Manta's or were registered; every `gymnasium.make` id works besides."""
    return sorted(_OURS)


def make(env_id: str, **options: Any) -> Env:
    """A new replica with text on both sides.

    Raises EnvironmentUnknown for a wrong id, wrong options or spaces that have no text form.
    """
    if env_id in _OURS:
        return _make_ours(env_id, options)
    try:
        env = gym.make(env_id, **options)
    except gym.error.UnregisteredEnv:
        close = difflib.get_close_matches(env_id, [*_OURS, *gym.registry], n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"ours are {', '.join(registered())}"
        raise EnvironmentUnknown(f"unknown environment {env_id!r}; {hint}") from None
    except (
        TypeError,
        ValueError,
        KeyError,
    ) as error:  # an option it does not have, or a value it does not take
        have = ", ".join(inspect.signature(_creator(env_id)).parameters)
        raise EnvironmentUnknown(
            f"environment {env_id} cannot take {options}: {error}; its options: {have}"
        ) from error
    except (gym.error.Error, ImportError) as error:  # a deprecated version, a missing package, a malformed id
        raise EnvironmentUnknown(f"environment {env_id}: {error}") from error
    try:
        return TextAdapter(env)
    except UnsupportedSpace as error:
        raise EnvironmentUnknown(f"environment {env_id}: {error}") from error


def recipe(env_id: str, **options: Any) -> Callable[[], Env]:
    """`make` for another process to call, as far as pickle can carry what was registered here."""
    entry = _OURS.get(env_id)
    if entry is None or isinstance(entry, str):
        return partial(make, env_id, **options)
    return partial(_made_elsewhere, env_id, entry, options)


def player(env_id: str) -> Callable[[float, int], Player]:
    """The scripted player of an environment, made with (error rate, seed)."""
    if env_id not in _PLAYERS:
        have = ", ".join(sorted(_PLAYERS))
        raise EnvironmentUnknown(f"environment {env_id} has no scripted player; those that have: {have}")
    made: Callable[[float, int], Player] = _load(_PLAYERS[env_id])
    return made


def _made_elsewhere(env_id: str, factory: _Factory, options: dict[str, Any]) -> Env:
    register(env_id, factory)
    return make(env_id, **options)


def _make_ours(env_id: str, options: dict[str, Any]) -> Env:
    entry = _OURS[env_id]
    factory: _Factory = _load(entry) if isinstance(entry, str) else entry
    parameters = inspect.signature(factory).parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    have = ", ".join(parameters)
    for name in options:
        if name not in parameters and not takes_any:
            raise EnvironmentUnknown(f"environment {env_id} has no option {name!r}; its options: {have}")
    try:
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise EnvironmentUnknown(f"environment {env_id}: {error}") from error


def _creator(env_id: str) -> Any:
    entry = gym.spec(env_id).entry_point
    return _load(entry) if isinstance(entry, str) else entry


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
