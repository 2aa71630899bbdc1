"""Trust in a stored configuration: what it would execute, and whether the user has allowed that.

A run folder may come from another person. Its config.json is only data until the user trusts it, either by starting the
run here from a recipe or by `--trust`. Trust is stored outside the folder, under $XDG_STATE_HOME/manta/trusted (default
~/.local/state), for this folder and exactly these commands, functions, modules and servers. A copied or moved folder,
another host, or a changed configuration is not trusted.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.environments import Environment, environment_named
from deploy.config.own_parts import own_parts
from deploy.config.policies import configurations, is_several
from deploy.config.suites import all_environments
from envs import registry
from envs.datasets.files import FILE_OPTIONS, SAMPLE
from rollout.agents.settings import PartSettings
from rollout.agents.tools import ToolsSettings
from rollout.engines.settings import EngineSettings, OwnEngineSettings
from rollout.engines.vllm_start import VllmSettings
from rollout.external.external_env import PROGRAM
from rollout.wire.own_part import OwnPart
from rollout.wire.whole_file import replace_file

_SAFE_FUNCTIONS = ("envs.tools.python_tool:python",)  # in the sandbox or not at all
_NUMBERS = (bool, int, float)
_DANGEROUS_OPTIONS = ("allow_unsafe", "executable")
_SHOWN_CHARACTERS = 160  # of one entry in an error
_SHOWN_ENTRIES = 5


def executed(config: RunConfig) -> list[str]:
    """Everything besides Manta that a run of this configuration executes, one line an entry.

    Modules, functions and commands; servers that are started or called; options that disable the sandbox; a Ray
    cluster, whose nodes execute code of one another; the code of a model's repository. Each entry has all arguments.
    Nothing is imported.
    """
    if is_several(config):
        return [*_once(entry for own in configurations(config).values() for entry in executed(own))]
    environments = all_environments(config)
    return [
        *_once(entry for each in environments for entry in _environment(each)),
        *_once(
            entry for each in environments for entry in executed_parts(each.agent.parts, each.agent_section)
        ),
        *[_own(where, part) for where, part in own_parts(config) if "agent.parts[" not in where],
        *([_entry("cluster.address", config.cluster.address)] if config.cluster.address else []),
        *_arguments(config.engine),
        *executed_model(config),
    ]


def _environment(each: Environment) -> list[str]:
    """An environment's module, if it is not Manta's, and its options in training and evaluation."""
    return [*_modules(each), *_options(each)]


def _options(each: Environment) -> list[str]:
    said = ((f"{each.section}.options", each.options), (each.evaluation_section, each.evaluation_options))
    return [entry for name, options in said for entry in executed_options(each.id, options, name)]


def _once(entries: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(entries))  # environments share sections


def executed_model(config: RunConfig) -> list[str]:
    """The code of the repositories of model and teacher, if the recipe trusts it."""
    model, distill = config.learner.model, config.learner.algorithm.distill
    named = [model.path, *([distill.teacher] if distill else [])]
    return [_entry("learner.model.trust_remote_code", each) for each in named if model.trust_remote_code]


def executed_options(env_id: str, options: Mapping[str, Any], name: str) -> list[str]:
    """The options of an environment that execute code or reach a server. name: of the section."""
    if env_id == PROGRAM:
        return [_entry(name, options)] if options else []
    files = {f"{name}.{each}" for each in FILE_OPTIONS} if env_id == "dataset" else set()
    return [
        _entry(where, value)
        for where, value in _leaves(options, name)
        if _executes(where, value) and not (where in files and str(value).startswith(SAMPLE))
    ]


def executed_parts(parts: Sequence[PartSettings], section: str = "agent") -> list[str]:
    """The own parts of an agent, and the functions and servers of its tools."""
    entries = []
    for place, part in enumerate(parts):
        where = f"{section}.parts[{place}]"
        if isinstance(part, OwnPart):
            entries.append(_own(where, part))
        elif isinstance(part, ToolsSettings):
            unsafe = [each for each in part.functions if each not in _SAFE_FUNCTIONS]
            entries += [_entry(f"{where}.functions", each) for each in unsafe]
            entries += [_entry(f"{where}.servers", each.model_dump(mode="json")) for each in part.servers]
    return entries


def executed_engine(engine: EngineSettings) -> list[str]:
    """A user's own engine, with the arguments that start it; arguments of vLLM that may name code, models or files."""
    own = isinstance(engine, OwnEngineSettings)
    return [_entry("engine", engine.model_dump(mode="json"))] if own else _arguments(engine)


def _arguments(engine: EngineSettings) -> list[str]:
    args = engine.args if isinstance(engine, VllmSettings) else {}
    return [
        _entry(f"engine.args.{name}", each) for name, each in args.items() if not isinstance(each, _NUMBERS)
    ]


def executed_by_evaluation(config: RunConfig, env_id: str, said: bool = True) -> list[str]:
    """What an evaluation on this environment executes. said: the user named it, and trusts it where he said its id."""
    known = environment_named(config.environments, env_id)
    if known is None:
        return [*executed_parts(config.agent.parts), *executed_engine(config.engine), *executed_model(config)]
    return executed_by_environment(config, known, trusted=said and known.id == env_id)


def executed_by_environment(config: RunConfig, known: Environment, trusted: bool = False) -> list[str]:
    """What an evaluation on an environment of a run, or of one of its suites, executes. trusted: its module is."""
    reward = [] if known.reward is None else [_own(f"{known.section}.reward", known.reward)]
    parts = executed_parts(known.agent.parts, known.agent_section)
    module = [] if trusted else _modules(known)
    return [
        *module,
        *_options(known),
        *reward,
        *parts,
        *executed_engine(config.engine),
        *executed_model(config),
    ]


def require_trust(folder: Path, entries: Sequence[str], trusted: bool) -> None:
    """Require that the user trusts this folder with these entries. ConfigError, one line, otherwise.

    trusted: the user trusts it now, which is remembered.
    """
    if trusted:
        remember(folder, entries)
        return
    known = _remembered(folder) if entries else []
    if unknown := [each for each in entries if each not in known]:
        shown = [
            each if len(each) <= _SHOWN_CHARACTERS else f"{each[:_SHOWN_CHARACTERS]}..." for each in unknown
        ]
        more = f"; and {len(shown) - _SHOWN_ENTRIES} more" if len(shown) > _SHOWN_ENTRIES else ""
        raise ConfigError(
            f"{folder}: its stored configuration executes {'; '.join(shown[:_SHOWN_ENTRIES])}{more}; "
            "if you know what this does and trust the author of the folder, add --trust"
        )


def remember(folder: Path, entries: Sequence[str]) -> None:
    """Store that the user trusts this folder with these entries. Nothing is stored in a read-only home."""
    if not entries:
        return
    try:
        record = _record(folder)
        record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with record.with_suffix(".lock").open("a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at once: both are stored
            known = _remembered(folder)
            if all(each in known for each in entries):
                return
            kept = {"folder": str(folder.resolve()), "executes": sorted({*known, *entries})}
            replace_file(record, json.dumps(kept, indent=1))
    except OSError:
        return


def _remembered(folder: Path) -> list[str]:
    try:
        return list(json.loads(_record(folder).read_text(encoding="utf-8"))["executes"])
    except (OSError, ValueError, KeyError):
        return []


def _record(folder: Path) -> Path:
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError as error:  # an unknown user id and no HOME
        raise FileNotFoundError("no home folder to remember in") from error
    name = blake3(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest(length=16)
    return Path(state) / "manta" / "trusted" / f"{name}.json"


def _modules(each: Environment) -> list[str]:
    """The environment itself, if its id names a module or its code is another package's."""
    env_id = each.id
    of_suite = any(env_id.startswith(suite.prefix) for suite in registry.SUITES)
    known = of_suite or env_id == PROGRAM or registry.is_trusted(env_id)
    foreign = ":" in env_id or not known
    return [_entry(f"{each.section}.id", [env_id, each.options, each.evaluated])] if foreign else []


def _own(where: str, part: OwnPart) -> str:
    return _entry(where, part.model_dump(mode="json"))


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{name}.{key}")
    elif isinstance(tree, list | tuple):
        for place, value in enumerate(tree):
            yield from _leaves(value, f"{name}[{place}]")
    else:
        yield name, tree


def _executes(where: str, value: Any) -> bool:
    if where.rpartition(".")[2].partition("[")[0] in _DANGEROUS_OPTIONS:
        return bool(value)
    return isinstance(value, str) and ":" in value  # module:function, http://host


def _entry(where: str, value: Any) -> str:
    # ASCII JSON: one line without control characters, for any content of the folder.
    return f"{json.dumps(where)[1:-1]}={json.dumps(value, sort_keys=True, default=str)}"
