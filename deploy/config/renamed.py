"""Old names and the names that replaced them: options, values of options, and flags of the command.

A recipe, an override or a command line with an old name is refused, with the new name in the message. The stored
configuration of an earlier run is read under the new names: `eval`, `export`, `report` and `--resume` work on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from deploy.config.config_errors import ConfigError

# "section.option" renames an option or a whole section, "section.option=value" a value. Entries apply from top to
# bottom, so a value's entry uses its option's present name. Names also reach into lists of sections.
RENAMED = {
    "learner.algorithm.credit": "learner.algorithm.advantage",
    "learner.algorithm.advantage.kind=group": "learner.algorithm.advantage.kind=grpo",
    "rollout.drop_uniform": "rollout.dynamic_sampling",
    "guards.metric=cut_short": "guards.metric=truncated_without_bootstrap",
    "cluster.start_seconds": "cluster.start_timeout_seconds",
    "cluster.step_seconds": "cluster.step_timeout_seconds",
    "cluster.capacity_seconds": "cluster.capacity_timeout_seconds",
    "weights.sync_seconds": "weights.sync_timeout_seconds",
    "evaluation.seconds": "evaluation.timeout_seconds",
    "supervision.heartbeat_seconds": "supervision.heartbeat_interval_seconds",
    "supervision.frozen_seconds": "supervision.heartbeat_timeout_seconds",
    "supervision.drain_seconds": "supervision.drain_timeout_seconds",
    "supervision.no_progress_seconds": "supervision.progress_timeout_seconds",
}
# Sections that became a stage of kind "sft" -> where in its list their options lie. The first one decides whether there
# is such a stage at all: without it the others said nothing.
STAGED = {"warm_start": "stages.0.source", "learner.imitation": "stages.0"}
RENAMED_FLAGS = {"--run": "--run-dir", "--runs": "--output-dir", "--episodes": "--out"}


def with_current_names(tree: Any) -> Any:
    """A copy of a stored configuration under the present names."""
    return _renamed(tree)[0]


def require_current_names(tree: Any, source: str) -> None:
    """Refuse a configuration with an old name. ConfigError, one line, with the new names."""
    if notes := _renamed(tree)[1]:
        raise ConfigError(f"{source}: " + "; ".join(notes))


def _renamed(tree: Any) -> tuple[Any, list[str]]:
    """The tree under new names, and a note for each old name."""
    tree, notes = deepcopy(tree), []
    for old, new in RENAMED.items():
        (option, _, old_value), (new_option, _, new_value) = old.partition("="), new.partition("=")
        *sections, name = option.split(".")
        for holder in list(_sections(tree, sections)):
            if name not in holder or (old_value and holder[name] != old_value):
                continue
            if old_value:
                holder[name] = new_value
                notes.append(f"{option}={old_value!r} is called {new_value!r} now")
            else:
                _put(tree, holder, sections, new_option, holder.pop(name))
                notes.append(f"option {option} is called {new_option} now")
    notes += _stage(tree)
    return tree, list(dict.fromkeys(notes))


def _stage(tree: Any) -> list[str]:
    """Replace the sections that said how a run begins by its list of stages; a note for each."""
    if not isinstance(tree, dict):
        return []
    notes, said = [], {}
    for old, new in STAGED.items():
        *sections, name = old.split(".")
        for holder in _sections(tree, sections):
            if name in holder:
                said[old] = holder.pop(name)
                notes.append(f'section {old} is called {new} now, in [[stages]] with kind = "sft"')
    player, optimized = (said.get(old) for old in STAGED)
    if isinstance(player, dict):
        learned = optimized if isinstance(optimized, dict) else {}
        tree["stages"] = [{"kind": "sft", "source": {"kind": "player", **player}, **learned}]
    return notes


def _sections(tree: Any, path: list[str]) -> Iterator[dict[str, Any]]:
    """The tables at a path of sections; several if the path contains a list."""
    if isinstance(tree, list):
        for each in tree:
            yield from _sections(each, path)
    elif isinstance(tree, dict) and not path:
        yield tree
    elif isinstance(tree, dict) and path[0] in tree:
        yield from _sections(tree[path[0]], path[1:])


def _put(tree: Any, holder: dict[str, Any], sections: list[str], option: str, value: Any) -> None:
    """Store a value under its new name, in the same section or another one."""
    *others, name = option.split(".")
    if others != sections:
        holder = tree
        for section in others:
            holder = holder.setdefault(section, {})
    holder[name] = value
