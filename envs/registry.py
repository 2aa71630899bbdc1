"""Environments by id: ours, those of optional suites, anybody's as "module:Class", and any that `gymnasium.make` knows.

Modules are imported when their environment is first asked for, those of a suite when one of its ids is, or their list.
What has no text on both sides is adapted to it. A module of anybody's may hold a `Player` and its WORDS, as ours do.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
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
from envs.own_frames import came_from
from envs.user_functions import imported

Env = gym.Env[Any, str]
_Factory = Callable[..., Env]


class EnvironmentUnknown(ValueError):
    """There is no such environment, or it cannot be made as asked; the message says what there is."""


class Player(Protocol):
    """A scripted player: one an episode, asked once a turn."""

    def act(self, observation: Any) -> str: ...


@dataclass(frozen=True, slots=True)
class Suite:
    """Environments of another package, an optional extra of ours."""

    prefix: str  # of their ids
    extra: str  # pip install 'manta-rl[EXTRA]'
    package: str  # what must be there to import
    factory: str  # "module:function" of ours, called with the id and the options; the module's IDS are all there are
    about: str

    @property
    def installed(self) -> bool:
        """Whether its package is there; nothing is imported to know it."""
        return importlib.util.find_spec(self.package) is not None


@dataclass(frozen=True, slots=True)
class Description:
    """What there is to know of an environment of ours without making it."""

    env_id: str
    about: str  # the first line of its docstring
    levels: str  # what the docstring says of them; empty where there are none
    has_player: bool


SUITES: tuple[Suite, ...] = (
    Suite("MiniGrid-", "minigrid", "minigrid", "envs.suites.minigrid_words:minigrid", "MiniGrid"),
    Suite("BabyAI-", "minigrid", "minigrid", "envs.suites.minigrid_words:minigrid", "BabyAI"),
    Suite(
        "reasoning_gym/",
        "reasoning",
        "reasoning_gym",
        "envs.suites.reasoning_questions:reasoning_gym",
        "reasoning-gym",
    ),
    Suite(
        "pettingzoo/",
        "pettingzoo",
        "pettingzoo",
        "envs.suites.pettingzoo_games:pettingzoo_game",
        "PettingZoo",
    ),
    Suite("textarena/", "textarena", "textarena", "envs.suites.textarena_games:textarena_game", "TextArena"),
)
_OURS: dict[str, str | _Factory] = {
    "arithmetic": "envs.builtin.arithmetic:Arithmetic",
    "assistant": "envs.builtin.assistant:assistant",
    "browser": "envs.builtin.browser:Browser",
    "chess": "envs.builtin.chess_game:ChessGame",
    "dataset": "envs.datasets.dataset:Dataset",
    "frozen_lake": "envs.builtin.frozen_lake:FrozenLake",
    "household": "envs.builtin.household:Household",
    "memory_corridor": "envs.builtin.memory_corridor:MemoryCorridor",
    "patches": "envs.builtin.patches:Patches",
    "programming": "envs.builtin.programming:Programming",
    "sokoban": "envs.builtin.sokoban:Sokoban",
    "twenty_questions": "envs.builtin.twenty_questions:TwentyQuestions",
}
_PLAYERS: dict[str, str] = {
    "arithmetic": "envs.builtin.arithmetic:Player",
    "assistant": "envs.builtin.assistant:Player",
    "browser": "envs.builtin.browser:Player",
    "chess": "envs.builtin.chess_game:Player",
    "frozen_lake": "envs.builtin.frozen_lake:Player",
    "household": "envs.builtin.household:Player",
    "memory_corridor": "envs.builtin.memory_corridor:Player",
    "patches": "envs.builtin.patches:Player",
    "programming": "envs.builtin.programming:Player",
    "sokoban": "envs.builtin.sokoban:Player",
    "twenty_questions": "envs.builtin.twenty_questions:Player",
}


def register(env_id: str, factory: _Factory) -> None:
    """Add an environment under an id of one's own; `factory(**options)` makes a replica."""
    _OURS[env_id] = factory


def registered() -> list[str]:
    """The ids that are Manta's or were registered; every `gymnasium.make` id works besides."""
    return sorted(_OURS)


def make(env_id: str, **options: Any) -> Env:
    """A new replica with text on both sides.

    Environments of Gymnasium take two options more: text_digits, the significant digits of a Box's numbers, and
    picture, what is shown of it (see `TextAdapter`). Raises EnvironmentUnknown for a wrong id, wrong options or spaces
    that have no text form.
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
    """What `gymnasium.make` makes, as it is. EnvironmentUnknown, one line, where it makes nothing of it."""
    try:
        return gym.make(env_id, **options)
    except gym.error.UnregisteredEnv:
        raise EnvironmentUnknown(_unknown(env_id)) from None
    except (
        TypeError,
        ValueError,
        KeyError,
    ) as error:  # an option it does not have, or a value it does not take
        have = ", ".join(inspect.signature(_creator(env_id)).parameters)
        raise EnvironmentUnknown(
            f"environment {env_id} cannot take {options}: {error}{came_from(error)}; its options: {have}"
        ) from error
    except (gym.error.Error, ImportError) as error:  # a deprecated version, a missing package, a malformed id
        raise EnvironmentUnknown(f"environment {env_id}: {error}") from error


def _unknown(env_id: str) -> str:
    """What is said of an id that nobody knows; its module, where it names one, has been imported."""
    module, _, name = env_id.partition(":")
    if not name:
        close = difflib.get_close_matches(env_id, [*_OURS, *gym.registry], n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"ours are {', '.join(registered())}"
        return f"unknown environment {env_id!r}; {hint}"
    there = vars(_own_module(env_id)).items()
    have = [each for each, found in there if inspect.isclass(found) and issubclass(found, gym.Env)]
    close = difflib.get_close_matches(name, have, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else "name a class of its, or an id it registers"
    return f"environment {env_id}: module {module} has no {name}, and registers none; {hint}"


def _adapted(env_id: str, env: gym.Env[Any, Any], adapting: dict[str, Any]) -> Env:
    try:
        return TextAdapter(env, **adapting)
    except ValueError as error:  # UnsupportedSpace among them
        env.close()
        raise EnvironmentUnknown(f"environment {env_id}: {error}") from error


def recipe(env_id: str, **options: Any) -> Callable[[], Env]:
    """`make` for another process to call, as far as pickle can carry what was registered here."""
    entry = _OURS.get(env_id)
    if entry is None or isinstance(entry, str):
        return partial(make, env_id, **options)
    return partial(_made_elsewhere, env_id, entry, options)


def is_trusted(env_id: str) -> bool:
    """Whether an environment's code is Manta's, registered here, or Gymnasium's own: trusted to end every step."""
    spec = gym.registry.get(env_id)
    return env_id in _OURS or (spec is not None and str(spec.entry_point).startswith("gymnasium.envs."))


def has_player(env_id: str) -> bool:
    """Whether a scripted player of this environment exists."""
    return _player(env_id) is not None


def player(env_id: str) -> Callable[[float, int], Player]:
    """The scripted player of an environment, made with (error rate, seed)."""
    if (reference := _player(env_id)) is None:
        have = ", ".join(sorted(_PLAYERS))
        raise EnvironmentUnknown(f"environment {env_id} has no scripted player; those that have: {have}")
    made: Callable[[float, int], Player] = _load(env_id, reference)
    return made


def has_splits(env_id: str) -> bool:
    """Whether an environment divides its instances by an option `split`."""
    entry = _entry(env_id)
    factory = _load(env_id, entry) if isinstance(entry, str) else entry
    return factory is not None and "split" in inspect.signature(factory).parameters


def task_count(env_id: str, options: dict[str, Any]) -> int | None:
    """The number of tasks of an environment that has a list of them; the seed modulo it says which is played.

    None where every seed is another task. The class says it by a class method `count_tasks(**options)`.
    """
    count = _asked_of_class(env_id, "count_tasks", options)
    return None if count is None else int(count)


def check_tasks(env_id: str, options: dict[str, Any]) -> None:
    """Refuse a list of tasks of which one cannot be played: the class's `check_tasks(**options)`, where it has one."""
    _asked_of_class(env_id, "check_tasks", options)


def _asked_of_class(env_id: str, method: str, options: dict[str, Any]) -> Any:
    """What a class method of an environment returns; None where it has none. EnvironmentUnknown for a ValueError."""
    entry = _entry(env_id)
    factory = _load(env_id, entry) if isinstance(entry, str) else entry
    asked = getattr(factory, method, None)
    if asked is None:
        return None
    try:
        return asked(**options)
    except (ValueError, TypeError) as error:
        raise EnvironmentUnknown(f"environment {env_id}: {error}") from error


def suite_ids(suite: Suite) -> tuple[str, ...]:
    """The ids of an installed suite, as its package lists them. EnvironmentUnknown where it cannot be imported."""
    ids: tuple[str, ...] = _load(suite.prefix, f"{suite.factory.partition(':')[0]}:IDS")
    return tuple(each for each in ids if each.startswith(suite.prefix))


def words(env_id: str) -> tuple[str, ...]:
    """Every lower-case word that is said in an environment, for tokenizers of whole words: its module's WORDS."""
    suite = _suite(env_id)
    entry = suite.factory if suite else _entry(env_id)
    module = entry.partition(":")[0] if isinstance(entry, str) else ""
    said = getattr(_module(env_id, module), "WORDS", None) if module else None
    if said is None:
        raise EnvironmentUnknown(f"environment {env_id} does not say its WORDS; list them in tiny.words")
    return tuple(said)


def describe(env_id: str) -> Description:
    """What an environment of ours says of itself. EnvironmentUnknown where a package it needs is missing."""
    entry = _OURS[env_id]
    told = _module(env_id, entry.partition(":")[0]) if isinstance(entry, str) else entry
    text = inspect.getdoc(told) or ""
    levels = re.search(r"^Levels: (.+?)(?=\n\w+:|\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return Description(
        env_id,
        text.partition("\n")[0],
        " ".join(levels[1].split()) if levels else "",
        env_id in _PLAYERS,
    )


def _suite(env_id: str) -> Suite | None:
    """The suite an id belongs to. EnvironmentUnknown where its package is missing."""
    suite = next((each for each in SUITES if env_id.startswith(each.prefix)), None)
    if suite and not suite.installed:
        raise EnvironmentUnknown(
            f"environment {env_id} belongs to {suite.about}, which is not installed here: "
            f"pip install 'manta-rl[{suite.extra}]'"
        )
    return suite


def _made_elsewhere(env_id: str, factory: _Factory, options: dict[str, Any]) -> Env:
    register(env_id, factory)
    return make(env_id, **options)


def _entry(env_id: str) -> str | _Factory | None:
    """What makes an environment that is ours, registered, of a suite, or named by its class; None for Gymnasium's."""
    if suite := _suite(env_id):
        return partial(_load(env_id, suite.factory), env_id)
    if env_id in _OURS or ":" not in env_id:
        return _OURS.get(env_id)
    found = getattr(_own_module(env_id), env_id.partition(":")[2], None)
    return env_id if callable(found) else None


def _own_module(env_id: str) -> ModuleType:
    """The module that an id names; EnvironmentUnknown where there is none, or it cannot be imported."""
    module, _, name = env_id.partition(":")
    if not name or ":" in name or not all(part.isidentifier() for part in module.split(".")):
        raise EnvironmentUnknown(
            f"environment {env_id}: one of your own is module:Class, and this names neither"
        )
    try:
        return imported(module)
    except ValueError as error:
        raise EnvironmentUnknown(f"environment {env_id}: {error}") from error


def _player(env_id: str) -> str | None:
    """Where the scripted player of an environment is: among ours, or in the module that an id names."""
    if env_id in _OURS or ":" not in env_id or _suite(env_id):
        return _PLAYERS.get(env_id)
    own = vars(_own_module(env_id)).get("Player")
    mere_type = own is None or own is Player  # the protocol above, imported to be named
    return None if mere_type else f"{env_id.partition(':')[0]}:Player"


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
        raise EnvironmentUnknown(f"environment {env_id}: {error}{came_from(error)}") from error
    except TypeError as error:  # of another type than it is for, and the error rarely says which
        odd = [
            f"{name}={value!r} (by default {parameters[name].default!r})"
            for name, value in options.items()
            if name in parameters and not _is_like(value, parameters[name].default)
        ]
        taken = f" does not take {', '.join(odd)}" if odd else ""
        raise EnvironmentUnknown(f"environment {env_id}{taken}: {error}{came_from(error)}") from error
    if not isinstance(env, gym.Env):
        raise EnvironmentUnknown(
            f"environment {env_id}: a {type(env).__name__} is made, and no gymnasium.Env"
        )
    for space in ("action_space", "observation_space"):
        if not isinstance(getattr(env, space, None), spaces.Space):
            raise EnvironmentUnknown(
                f"environment {env_id}: {type(env).__name__} has no {space}; declare {space}, or derive from "
                "envs.base.TextEnv, which declares both as text"
            )
    return env


def _check_text(env_id: str, name: str, value: Any, parameter: inspect.Parameter) -> None:
    """Refuse a value for an option that takes text alone: TOML reads 1_1_1, true or 2024-01-01 as something else."""
    annotated = parameter.annotation
    if annotated is inspect.Parameter.empty:
        annotated = type(parameter.default)
    if annotated in (str, "str") and not isinstance(value, str):
        raise EnvironmentUnknown(
            f"environment {env_id}: {name}={value!r} must be text; quote text that reads as another value: "
            f"{name}='\"TEXT\"'"
        )


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value is of its default's type; of one without a type to go by, any is."""
    whole_for_any = isinstance(default, float) and type(value) is int
    return default in (None, inspect.Parameter.empty) or type(value) is type(default) or whole_for_any


def _creator(env_id: str) -> Any:
    entry = gym.spec(env_id).entry_point
    return _load(env_id, entry) if isinstance(entry, str) else entry


def _load(env_id: str, reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(_module(env_id, module), name)


def _module(env_id: str, name: str) -> ModuleType:
    """A module of an environment; EnvironmentUnknown where a package it needs is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentUnknown(f"environment {env_id}: {error}") from error
