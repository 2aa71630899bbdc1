"""Load a run's configuration from a TOML recipe and `a.b=c` overrides.

No option is ignored: an unknown option is an error that names the nearest valid one, and so are options that contradict
one another (config_checks.py).
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from deploy.config.config import RunConfig
from deploy.config.config_checks import require_consistent
from deploy.config.config_errors import ConfigError, explain
from deploy.config.derived import with_correction, with_data_types, with_lengths
from deploy.config.recipe_files import Nested, read_recipe, with_algorithm
from deploy.config.renamed import require_current_names

Model = TypeVar("Model", bound=BaseModel)

# Options that may change when a run continues: where, how and how long it runs, never what is played and learned.
MOVABLE = (
    "cluster",
    "supervision",
    "buffer.local_dir",
    "learner.ranks",
    "learner.sharded_over",
    "learner.context_parallel_size",
    "learner.threads",
    "learner.model.sum_gradients",
    "learner.model.expert_parallel",
    "learner.model.gradient_checkpointing",
    "rollout.workers",
    "rollout.cpus_per_worker",
    "rollout.gpus_per_worker",
    "rollout.resources_per_worker",
    "steps",  # more of them
)


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe (a path, or the name of one that ships with Manta), apply overrides, check the result.

    An override "section=" without a value removes the section; "stages.0.epochs=2" sets an option of the first entry of
    a list; "algorithm=NAME" chooses a preset and is applied before the other overrides.
    """
    tree = read_recipe(recipe)
    chosen, others = _algorithm(overrides)
    if chosen:
        tree = with_algorithm(tree, chosen, f"override algorithm={chosen}")
    for override in others:
        _apply(tree, override)
    require_current_names(tree, recipe)
    tree = with_lengths(with_data_types(tree))
    config = parse(tree, recipe)
    corrected = with_correction(tree, config)
    return config if corrected is None else parse(corrected, recipe)


def _algorithm(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """The preset chosen by the overrides, the last of several, and the other overrides."""
    chosen = [
        value.strip() for name, _, value in (each.partition("=") for each in overrides) if name == "algorithm"
    ]
    others = [each for each in overrides if each.partition("=")[0] != "algorithm"]
    return (str(toml_value(chosen[-1])) if chosen else ""), others


def moved(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a stored run that continues elsewhere or for more steps.

    ConfigError for an override of an option that is not MOVABLE, and for fewer steps.
    """
    tree = config.model_dump(mode="json")
    for override in overrides:
        name = override.partition("=")[0].strip()
        if not any(name == each or name.startswith(f"{each}.") for each in MOVABLE):
            raise ConfigError(
                f"override {override!r}: a resumed run keeps its environment, model and algorithm; options that may "
                f"change: {', '.join(MOVABLE)}"
            )
        _apply(tree, override)
    changed = parse(tree, f"run {config.name}")
    if changed.steps < config.steps:
        raise ConfigError(
            f"steps={changed.steps} is less than the run's {config.steps}; a resumed run may be given more steps; to "
            "end it earlier, stop it"
        )
    return changed


def parse(tree: Nested, source: str) -> RunConfig:
    """Validate a nested dict; ConfigError with all faults in one line."""
    config = validated(RunConfig, tree, source)
    try:
        require_consistent(config)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    return config


def validated(model: type[Model], tree: Nested, source: str) -> Model:
    """Validate a nested dict as settings of any class; ConfigError with all faults in one line."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        faults = [explain(fault, model) for fault in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(faults)) from None


def _apply(tree: Nested, override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r} is not of the form section.option=value")
    *sections, option = path.strip().split(".")
    node: Any = tree
    for section in sections:
        node = _inside(node, section, override)
    if isinstance(node, list):
        node[_place(node, option, override)] = toml_value(text.strip())
    elif not text.strip() and _is_section(node.get(option)):
        del node[option]
    else:
        node[option] = toml_value(text.strip())


def _inside(node: Any, name: str, override: str) -> Any:
    """The section of this name, made where it is not there yet, or the entry of a list at this place."""
    inner = node[_place(node, name, override)] if isinstance(node, list) else node.setdefault(name, {})
    if not isinstance(inner, dict | list):
        raise ConfigError(f"override {override!r}: {name} is an option, not a section")
    return inner


def _place(entries: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(entries):
        raise ConfigError(
            f"override {override!r}: {name} is no place in a list of {len(entries)}, which are counted from 0"
        )
    return int(name)


def _is_section(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(e, dict) for e in value))


def toml_value(text: str) -> Any:
    """Parse a text as a TOML value (number, boolean, list, quoted string); the text itself if it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
