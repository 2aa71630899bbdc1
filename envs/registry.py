"""Environments by id: Manta's own, optional suites, user code as "module:Class", and every id of `gymnasium.make`.

Modules are imported when one of their environments is requested, suites also when their ids are listed. Environments
without text on both sides get a TextAdapter. A user's module may define a `Player` and WORDS, as Manta's modules do.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import gymnasium as gym
from gymnasium import spaces

from envs.adapters import TextAdapter
from envs.code_lines import user_lines_suffix
from envs.extras import SUITES, Suite
from envs.user_functions import imported

Env = gym.Env[Any, str]
_Factory = Callable[..., Env]


class EnvironmentUnknown(ValueError):
    """No such environment, or wrong options for it; the message lists what exists."""


class Player(Protocol):
    """A scripted policy: one instance per episode, called once per turn."""

    def act(self, observation: Any) -> str: ...


@dataclass(frozen=True, slots=True)
class Description:
    """Facts about an environment of Manta, found without making it."""

    env_id: str
    about: str  # the first line of its docstring
    levels: str  # the docstring's section on levels; empty if there is none
    has_player: bool


# Value of the option `opponent` of games whose other seat is a policy's (docs/leagues.md).
PLAYED_BY_POLICY = "policy"
_OURS: dict[str, str | _Factory] = {
    "arithmetic": "envs.builtin.arithmetic:Arithmetic",
    "assistant": "envs.builtin.assistant:assistant",
    "browser": "envs.builtin.browser:Browser",
    "chess": "envs.builtin.chess_game:ChessGame",
    "dataset": "envs.datasets.dataset:Dataset",
    "frozen_lake": "envs.builtin.frozen_lake:FrozenLake",
    "household": "envs.builtin.household:Household",
    "locks": "envs.builtin.locks:Locks",
    "memory_corridor": "envs.builtin.memory_corridor:MemoryCorridor",
    "patches": "envs.builtin.patches:Patches",
    "personal": "envs.builtin.personal:Personal",
    "programming": "envs.builtin.programming:Programming",
    "sokoban": "envs.builtin.sokoban:Sokoban",
    "twenty_questions": "envs.builtin.twenty_questions:TwentyQuestions",
}
_PLAYERS = {  # every module of envs.builtin has one
    env_id: f"{entry.partition(':')[0]}:Player"
    for env_id, entry in _OURS.items()
    if isinstance(entry, str) and entry.startswith("envs.builtin.")
}
# A step takes microseconds and waits for nothing: waking another thread for it would take longer.
_IMMEDIATE = frozenset(
    {"frozen_lake", "household", "locks", "memory_corridor", "personal", "twenty_questions"}
)


def register(env_id: str, factory: _Factory) -> None:
    """Register an environment under an id; `factory(**options)` makes a replica."""
    _OURS[env_id] = factory


def registered() -> list[str]:
    """The ids of Manta and those registered; `make` accepts every `gymnasium.make` id as well."""
    return sorted(_OURS)


def make(env_id: str, **options: Any) -> Env:
    """Make a replica with text on both sides.

    Gymnasium environments take two additional options: text_digits (significant digits of a Box's numbers) and picture
    (what is shown as an image; see `TextAdapter`). Raises EnvironmentUnknown for a wrong id, wrong options, or spaces
    without a text form.
    """
    if (entry := _entry(env_id)) is not None:
        env = _make_ours(env_id, entry, options)
        return env if isinstance(env.action_space, spaces.Text) else _adapted(env_id, env, {})
    adapting = {
        name: options.pop(option)
        for option, name in (("text_digits", "digits"), ("picture", "picture"))
        if option in options
    }
    if adapting.get("picture") == "render":
        options["render_mode"] = "rgb_array"
    return _adapted(env_id, make_gymnasium(env_id, options), adapting)


def make_gymnasium(env_id: str, options: dict[str, Any]) -> gym.Env[Any, Any]:
    """Call `gymnasium.make`, without an adapter. Its errors become EnvironmentUnknown, one line."""
    try:
        return gym.make(env_id, **options)
    except gym.error.UnregisteredEnv:
        raise EnvironmentUnknown(_unknown(env_id)) from None
    except (
        TypeError,
        ValueError,
        KeyError,
    ) as error:  # an unknown option or an invalid value
        have = ", ".join(inspect.signature(_creator(env_id)).parameters)
        raise EnvironmentUnknown(
            f"environment {env_id} does not accept {options}: {error}{user_lines_suffix(error)}; its options: {have}"
        ) from error
    except (gym.error.Error, ImportError) as error:  # a deprecated version, a missing package, a malformed id
        raise EnvironmentUnknown(f"environment {env_id}: {error}") from error


def _unknown(env_id: str) -> str:
    """The message for an unknown id; a module that it names has already been imported."""
    module, _, name = env_id.partition(":")
    if not name:
        close = difflib.get_close_matches(env_id, [*_OURS, *gym.registry], n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(registered())}"
        return f"unknown environment {env_id!r}; {hint}"
    attributes = vars(_user_module(env_id)).items()
    have = [each for each, found in attributes if inspect.isclass(found) and issubclass(found, gym.Env)]
    close = difflib.get_close_matches(name, have, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else "name a class in it, or an id it registers"
    return f"environment {env_id}: module {module} neither defines nor registers {name}; {hint}"


def _adapted(env_id: str, env: gym.Env[Any, Any], adapting: dict[str, Any]) -> Env:
    try:
        return TextAdapter(env, **adapting)
    except ValueError as error:  # includes UnsupportedSpace
        env.close()
        raise EnvironmentUnknown(f"environment {env_id}: {error}") from error


def env_factory(env_id: str, **options: Any) -> Callable[[], Env]:
    """A picklable call of `make`, for another process; registered factories must be picklable themselves."""
    entry = _OURS.get(env_id)
    if entry is None or isinstance(entry, str):
        return partial(make, env_id, **options)
    return partial(_register_and_make, env_id, entry, options)


def is_trusted(env_id: str) -> bool:
    """Whether the code is Manta's, registered here, or Gymnasium's own, so that every step is trusted to return."""
    spec = gym.registry.get(env_id)
    return env_id in _OURS or (spec is not None and str(spec.entry_point).startswith("gymnasium.envs."))


def is_immediate(env_id: str) -> bool:
    """Whether a step of the environment, one of Manta's own, returns at once whatever the action is."""
    return env_id in _IMMEDIATE and isinstance(_OURS[env_id], str)  # else a user's own under this id


def may_meet_policy(env_id: str, options: dict[str, Any]) -> bool:
    """Whether policies of the run may play the other seat. A user's own environment may leave it to them at any time.

    Nothing is imported: it is told by id and options.
    """
    of_suite = any(env_id.startswith(each.prefix) for each in SUITES)
    own = callable(_OURS.get(env_id)) or not (of_suite or is_trusted(env_id))
    return own or options.get("opponent") == PLAYED_BY_POLICY


def has_player(env_id: str) -> bool:
    """Whether the environment has a scripted player."""
    return _player(env_id) is not None


def player(env_id: str) -> Callable[[float, int], Player]:
    """The class of an environment's scripted player, called with (error rate, seed)."""
    if (reference := _player(env_id)) is None:
        have = ", ".join(sorted(_PLAYERS))
        raise EnvironmentUnknown(f"environment {env_id} has no scripted player; use one of: {have}")
    loaded: Callable[[float, int], Player] = _load(env_id, reference)
    return loaded


def has_splits(env_id: str) -> bool:
    """Whether the environment has an option `split`."""
    factory = _factory(env_id)
    return factory is not None and "split" in inspect.signature(factory).parameters


def task_count(env_id: str, options: dict[str, Any]) -> int | None:
    """The number of tasks of an environment with a list of tasks; the seed modulo this number selects one.

    None if every seed is another task. The class defines it by a class method `count_tasks(**options)`.
    """
    count = _call_class_method(env_id, "count_tasks", options)
    return None if count is None else int(count)


def check_tasks(env_id: str, options: dict[str, Any]) -> None:
    """Check that every task can be played, with the class method `check_tasks(**options)` if the class has one."""
    _call_class_method(env_id, "check_tasks", options)


def _call_class_method(env_id: str, method: str, options: dict[str, Any]) -> Any:
    """The result of a class method of an environment; None without one. Its ValueError becomes EnvironmentUnknown."""
    factory = _factory(env_id)
    given: tuple[Any, ...] = ()
    if isinstance(factory, partial):  # of a suite, whose classes take the id first
        given = factory.args
        factory = factory.func
    found = getattr(factory, method, None)
    if found is None:
        return None
    try:
        return found(*given, **options)
    except (ValueError, TypeError) as error:
        raise EnvironmentUnknown(f"environment {env_id}: {error}") from error


def suite_ids(suite: Suite) -> tuple[str, ...]:
    """The ids of an installed suite, as its package lists them. EnvironmentUnknown if it cannot be imported."""
    ids: tuple[str, ...] = _load(suite.prefix, f"{suite.factory.partition(':')[0]}:IDS")
    return tuple(each for each in ids if each.startswith(suite.prefix))


def words(env_id: str) -> tuple[str, ...]:
    """The lower-case words that occur in an environment (its module's WORDS), for word-level tokenizers."""
    suite = _suite(env_id)
    entry = suite.factory if suite else _entry(env_id)
    module = entry.partition(":")[0] if isinstance(entry, str) else ""
    found = getattr(_module(env_id, module), "WORDS", None) if module else None
    if found is None:
        raise EnvironmentUnknown(f"environment {env_id} defines no WORDS; list its words in tiny.words")
    return tuple(found)


def describe(env_id: str) -> Description:
    """The description of one of Manta's environments. EnvironmentUnknown if a package it needs is missing."""
    entry = _OURS[env_id]
    documented = _module(env_id, entry.partition(":")[0]) if isinstance(entry, str) else entry
    text = inspect.getdoc(documented) or ""
    levels = re.search(r"^Levels: (.+?)(?=\n\w+:|\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return Description(
        env_id,
        text.partition("\n")[0],
        " ".join(levels[1].split()) if levels else "",
        env_id in _PLAYERS,
    )


def _suite(env_id: str) -> Suite | None:
    """The suite that an id belongs to. EnvironmentUnknown if its package is not installed."""
    suite = next((each for each in SUITES if env_id.startswith(each.prefix)), None)
    if suite and not suite.installed:
        raise EnvironmentUnknown(
            f"environment {env_id} belongs to {suite.about}, which is not installed here: {suite.command}"
        )
    return suite


def _register_and_make(env_id: str, factory: _Factory, options: dict[str, Any]) -> Env:
    register(env_id, factory)
    return make(env_id, **options)


def _entry(env_id: str) -> str | _Factory | None:
    """The factory of an environment (Manta's, registered, of a suite, or named by class); None for Gymnasium's ids."""
    if suite := _suite(env_id):
        return partial(_load(env_id, suite.factory), env_id)
    if env_id in _OURS or ":" not in env_id:
        return _OURS.get(env_id)
    found = getattr(_user_module(env_id), env_id.partition(":")[2], None)
    return env_id if callable(found) else None


def _user_module(env_id: str) -> ModuleType:
    """The user module that an id names. EnvironmentUnknown if it is missing or cannot be imported."""
    module, _, name = env_id.partition(":")
    if not name or ":" in name or not all(part.isidentifier() for part in module.split(".")):
        raise EnvironmentUnknown(
            f"environment {env_id}: not of the form module:Class, which names an environment of your own"
        )
    try:
        return imported(module)
    except ValueError as error:
        raise EnvironmentUnknown(f"environment {env_id}: {error}") from error


def _player(env_id: str) -> str | None:
    """The reference "module:Player" of an environment's scripted player, or None."""
    if env_id in _OURS:
        return _PLAYERS.get(env_id)
    if suite := _suite(env_id):
        module = _module(env_id, suite.factory.partition(":")[0])
    elif ":" in env_id:
        module = _user_module(env_id)
    else:
        return None
    own = vars(module).get("Player")
    only_protocol = own is None or own is Player  # the protocol above, imported for annotations
    return None if only_protocol else f"{module.__name__}:Player"


def _make_ours(env_id: str, entry: str | _Factory, options: dict[str, Any]) -> Env:
    factory: _Factory = _load(env_id, entry) if isinstance(entry, str) else entry
    parameters = inspect.signature(factory).parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    have = ", ".join(parameters)
    for name in options:
        if name not in parameters and not takes_any:
            raise EnvironmentUnknown(f"environment {env_id} has no option {name!r}; its options: {have}")
        if name in parameters:
            _check_text(env_id, name, options[name], parameters[name])
    try:
        env = factory(**options)
    except ValueError as error:
        raise EnvironmentUnknown(f"environment {env_id}: {error}{user_lines_suffix(error)}") from error
    except TypeError as error:  # a value of the wrong type; the error rarely names the option
        odd = [
            f"{name}={value!r} (default: {parameters[name].default!r})"
            for name, value in options.items()
            if name in parameters and not _is_like(value, parameters[name].default)
        ]
        wrong = f" does not accept {', '.join(odd)}" if odd else ""
        raise EnvironmentUnknown(f"environment {env_id}{wrong}: {error}{user_lines_suffix(error)}") from error
    if not isinstance(env, gym.Env):
        raise EnvironmentUnknown(
            f"environment {env_id}: the factory returned a {type(env).__name__}; return a gymnasium.Env"
        )
    for space in ("action_space", "observation_space"):
        if not isinstance(getattr(env, space, None), spaces.Space):
            raise EnvironmentUnknown(
                f"environment {env_id}: {type(env).__name__} has no {space}; declare {space}, or derive from "
                "envs.base.TextEnv, which declares both as text"
            )
    return env


def _check_text(env_id: str, name: str, value: Any, parameter: inspect.Parameter) -> None:
    """Require text for an option that takes text: TOML parses 1_1_1, true and 2024-01-01 as other types."""
    annotated = parameter.annotation
    if annotated is inspect.Parameter.empty:
        annotated = type(parameter.default)
    if annotated in (str, "str") and not isinstance(value, str):
        raise EnvironmentUnknown(
            f"environment {env_id}: {name}={value!r} must be text; quote text that reads as another value: "
            f"{name}='\"TEXT\"'"
        )


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value has the type of its default; always if the default does not tell a type."""
    whole_for_any = isinstance(default, float) and type(value) is int
    return default in (None, inspect.Parameter.empty) or type(value) is type(default) or whole_for_any


def _factory(env_id: str) -> _Factory | None:
    """The callable that makes replicas of an environment; None for one of Gymnasium's."""
    entry = _entry(env_id)
    return _load(env_id, entry) if isinstance(entry, str) else entry


def _creator(env_id: str) -> Any:
    entry = gym.spec(env_id).entry_point
    return _load(env_id, entry) if isinstance(entry, str) else entry


def _load(env_id: str, reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(_module(env_id, module), name)


def _module(env_id: str, name: str) -> ModuleType:
    """Import a module of an environment. EnvironmentUnknown if a package it needs is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentUnknown(f"environment {env_id}: {error}") from error
