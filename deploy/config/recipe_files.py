"""Read a recipe: a TOML file merged over the recipe that it extends and the preset of its algorithm.

    extends = "base.toml"             # a file, relative to this one, or the name of a recipe that ships with Manta
    clear = ["env.options", "tiny"]   # options and sections of the base that this recipe removes
    algorithm = "dapo"                # a preset: sets learner.algorithm and other options of the algorithm alone

These three are top-level keys. Sections of both the base and the recipe are merged, and the recipe's options take
precedence; a section with another `kind` or `id` replaces the base's section. A list
replaces the base's list; [stages.0] is merged with the first entry of the base's.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from deploy.config.config_errors import ConfigError

Nested = dict[str, Any]

# Options that a preset of an algorithm may set; the preset chosen last replaces all of them.
OF_ALGORITHM = ("learner.algorithm", "rollout.dynamic_sampling", "buffer.reuse")


def recipe_names() -> list[str]:
    """The names of the recipes that ship with Manta."""
    return sorted(_shipped(files("deploy.recipes")))


def algorithm_names() -> list[str]:
    """The names of the algorithm presets."""
    return sorted(_shipped(files("deploy.recipes") / "algorithms"))


def read_recipe(recipe: str) -> Nested:
    """The options of a recipe, merged over its bases. ConfigError, one line, if it cannot be read."""
    tree: Nested = {}
    for name, layer in reversed(_layers(recipe)):
        tree = _over(tree, layer, name)
    return tree


def files_of(recipe: str) -> list[Path]:
    """The files of a recipe and its bases, its own first, without recipes that ship with Manta."""
    return [Path(name) for name, _ in _layers(recipe) if name.endswith(".toml")]


def with_algorithm(tree: Nested, name: str, source: str) -> Nested:
    """Replace the algorithm of a configuration by a preset."""
    presets = _shipped(files("deploy.recipes") / "algorithms")
    if name not in presets:
        raise ConfigError(
            f"{source}: unknown algorithm={name!r}; choose one of: {', '.join(sorted(presets))}"
        )
    for option in OF_ALGORITHM:
        tree = _without(tree, option)
    return merged(tree, tomllib.loads(presets[name].read_text(encoding="utf-8")))


def first_line(name: str, *, algorithm: bool = False) -> str:
    """The purpose of a shipped recipe or algorithm preset: the comment in its first line."""
    folder = files("deploy.recipes") / "algorithms" if algorithm else files("deploy.recipes")
    return _shipped(folder)[name].read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _layers(recipe: str) -> list[tuple[str, Nested]]:
    """A recipe and its bases, the recipe first, each with its name."""
    layers: list[tuple[str, Nested]] = []
    name: str | None = recipe
    while name is not None:
        seen = [each for each, _ in layers]
        if any(_same(name, each) for each in seen):
            raise ConfigError(f"recipe {recipe} extends itself: {' -> '.join([*seen, name])}")
        tree = _parsed(name)
        base = tree.pop("extends", None)
        if base is not None and (not isinstance(base, str) or not base):
            raise ConfigError(
                f"recipe {name}: extends={base!r} must be the path of a .toml file or the name of a recipe, as a string"
            )
        if base is None and "clear" in tree:
            raise ConfigError(
                f"recipe {name}: clear removes options of a base recipe, but extends is not set; set it, or remove "
                "clear"
            )
        layers.append((name, tree))
        # Relative to the file that names it; an absolute path stays absolute when joined.
        name = str(Path(name).parent / base) if base is not None and base.endswith(".toml") else base
    return layers


def _same(left: str, right: str) -> bool:
    if left.endswith(".toml") and right.endswith(".toml"):
        return Path(left).resolve() == Path(right).resolve()
    return left == right


def _over(base: Nested, layer: Nested, name: str) -> Nested:
    """Merge a recipe's own layer over the options of its base."""
    tree = base
    own = dict(layer)
    for option in _cleared(own.pop("clear", []), name):
        if not _holds(tree, option):
            raise ConfigError(
                f"recipe {name}: clear names {option!r}, which its base does not set; remove it from clear"
            )
        tree = _without(tree, option)
    if isinstance(own.get("algorithm"), str):
        tree = with_algorithm(tree, own.pop("algorithm"), f"recipe {name}")
    return merged(tree, own)


def _cleared(said: Any, name: str) -> Sequence[str]:
    if isinstance(said, list) and all(isinstance(each, str) for each in said):
        return said
    raise ConfigError(
        f"recipe {name}: clear={said!r} must be a list of option names, such as ['env.options', 'tiny']"
    )


def merged(base: Nested, changes: Nested) -> Nested:
    """Merge sections of both trees; a section with another `kind` or `id` is replaced."""
    return base | {name: _replaced(base.get(name), value) for name, value in changes.items()}


def _replaced(old: Any, new: Any) -> Any:
    """The value of an option or a section that both trees may have."""
    if isinstance(old, dict) and isinstance(new, dict):
        other = any(key in new and new[key] != old.get(key) for key in ("kind", "id"))
        return new if other else merged(old, new)
    if isinstance(old, list) and isinstance(new, dict) and new.keys() <= set(map(str, range(len(old)))):
        return [_replaced(entry, new.get(str(place), entry)) for place, entry in enumerate(old)]
    return new


def _holds(tree: Nested, option: str) -> bool:
    node: Any = tree
    for part in option.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _without(tree: Nested, option: str) -> Nested:
    """A copy of a configuration without an option or a section."""
    name, _, inner = option.partition(".")
    if not inner:
        return {key: value for key, value in tree.items() if key != name}
    section = tree.get(name)
    return tree | {name: _without(section, inner)} if isinstance(section, dict) else tree


def _shipped(folder: Traversable) -> dict[str, Traversable]:
    return {
        entry.name.removesuffix(".toml"): entry for entry in folder.iterdir() if entry.name.endswith(".toml")
    }


def _parsed(recipe: str) -> Nested:
    try:
        return tomllib.loads(recipe_text(recipe))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {recipe}: not valid TOML: {error}") from error


def recipe_text(recipe: str) -> str:
    """The text of a recipe; ConfigError for an unknown name lists the names."""
    path = Path(recipe)
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(f"recipe {recipe}: no such file; check the path")
        return _text(path)
    shipped = _shipped(files("deploy.recipes"))
    if recipe not in shipped:
        raise ConfigError(
            f"recipe {recipe!r} is neither a .toml file nor one of: {', '.join(sorted(shipped))} (see manta recipes)"
        )
    return shipped[recipe].read_text(encoding="utf-8")


def _text(path: Path) -> str:
    """The text of a user's file: UTF-8, with or without a byte-order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"recipe {path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} in line {line}); save it as UTF-8"
        ) from error
