"""A run's configuration from a TOML recipe and `a.b=c` overrides.

Nothing is configured twice and nothing is ignored: an unknown key is an error that names the nearest valid one, and so
is a pair that contradicts itself (config_checks.py).
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from deploy.config.config import RunConfig
from deploy.config.config_checks import require_consistent
from deploy.config.config_errors import ConfigError, explain
from deploy.config.renamed import require_current_names

Nested = dict[str, Any]
Model = TypeVar("Model", bound=BaseModel)

# What may be another when a run goes on: where, how and how far it runs, never what is played and learned.
MOVABLE = (
    "cluster",
    "supervision",
    "learner.ranks",
    "learner.threads",
    "rollout.workers",
    "rollout.cpus_per_worker",
    "rollout.gpus_per_worker",
    "steps",  # more of them
)


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe (a path, or the name of one that ships with Manta), apply overrides, check everything.

    A recipe that `extends` one that ships with Manta says only what differs. An override "section=" with nothing behind
    it leaves the section out.
    """
    tree = _read(recipe)
    for override in overrides:
        _apply(tree, override)
    require_current_names(tree, recipe)
    return parse(tree, recipe)


def moved(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A stored run's configuration for going on elsewhere or for longer.

    ConfigError for overrides of anything that is not MOVABLE, and for fewer steps.
    """
    tree = config.model_dump(mode="json")
    for override in overrides:
        name = override.partition("=")[0].strip()
        if not any(name == each or name.startswith(f"{each}.") for each in MOVABLE):
            raise ConfigError(
                f"override {override!r}: a run goes on playing and learning what it did; what may differ: "
                f"{', '.join(MOVABLE)}"
            )
        _apply(tree, override)
    changed = parse(tree, f"run {config.name}")
    if changed.steps < config.steps:
        raise ConfigError(
            f"steps={changed.steps} is fewer than the run's {config.steps}: a run that goes on may be given more; "
            "to end it earlier, stop it"
        )
    return changed


def _read(recipe: str) -> Nested:
    """A recipe over what it extends."""
    try:
        tree = tomllib.loads(recipe_text(recipe))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {recipe}: not valid TOML: {error}") from error
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str) or base.endswith(".toml"):
        raise ConfigError(f"recipe {recipe}: extends names a recipe that ships with Manta, not {base!r}")
    return _merged(_read(base), tree)


def _merged(base: Nested, changes: Nested) -> Nested:
    """Options of sections that both have stand side by side; one with another `kind` or `id` is another section."""
    merged = dict(base)
    for name, value in changes.items():
        old = base.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            other = any(key in value and value[key] != old.get(key) for key in ("kind", "id"))
            merged[name] = value if other else _merged(old, value)
        else:
            merged[name] = value
    return merged


def recipe_text(recipe: str) -> str:
    """The text of a recipe; an unknown name is an error that lists what there is."""
    path = Path(recipe)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(f"recipe {recipe}: no such file")
        return _text(path)
    shipped = {entry.name.removesuffix(".toml"): entry for entry in files("deploy.recipes").iterdir()}
    names = sorted(name for name, entry in shipped.items() if entry.name.endswith(".toml"))
    if recipe not in names:
        raise ConfigError(f"recipe {recipe!r} is neither a .toml file nor one of: {', '.join(names)}")
    return shipped[recipe].read_text(encoding="utf-8")


def _text(path: Path) -> str:
    """The text of a file that a user wrote: UTF-8, with or without a byte-order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"recipe {path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} in line {line}); save it as UTF-8"
        ) from error


def parse(tree: Nested, source: str) -> RunConfig:
    """Validate a nested dict; all faults together become one line."""
    config = validated(RunConfig, tree, source)
    try:
        require_consistent(config)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    return config


def validated(model: type[Model], tree: Nested, source: str) -> Model:
    """The same for any settings."""
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
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {section} is an option, not a section")
    if not text.strip() and isinstance(node.get(option), dict):
        del node[option]
    else:
        node[option] = toml_value(text.strip())


def toml_value(text: str) -> Any:
    """A TOML value where the text reads as one (numbers, booleans, lists, quoted strings), else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
