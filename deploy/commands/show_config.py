"""Output of `manta recipes` and `manta config`: the shipped recipes, and a resolved recipe with descriptions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from deploy.config.config import RunConfig
from deploy.config.recipe_files import algorithm_names, first_line, recipe_names
from deploy.config.toml_text import key_text, value_text
from deploy.report.console import Console, write, write_table

WIDTH = 100  # characters of a comment's line


def show_recipes(console: Console) -> None:
    """Print the names of recipes and algorithm presets, each with its purpose."""
    write_table(console, ("recipe", "purpose"), [(name, first_line(name)) for name in recipe_names()])
    presets = [(name, first_line(name, algorithm=True)) for name in algorithm_names()]
    write_table(console, ("algorithm", "description"), presets)
    write(
        console,
        'A recipe extends another one with extends = "NAME" and chooses an algorithm with algorithm = "NAME"; '
        "manta config NAME prints all of its options.",
        wrap=True,
    )


def config_text(config: RunConfig) -> str:
    """Every option with its description above it, and its default behind it if they differ."""
    head = "# Every option with its resolved value, followed by the default if they differ.\n"
    return head + "".join(_section(config, None, ""))


def _section(settings: BaseModel, usual: Any, name: str) -> Iterator[str]:
    """The lines of a section, then those of its inner sections. usual: the section's default settings."""
    of_default = usual if type(usual) is type(settings) else None
    if name:
        yield f"\n[{name}]\n"
    fields = type(settings).model_fields
    inner = [each for each in fields if isinstance(getattr(settings, each), BaseModel)]
    for option in (each for each in fields if each not in inner):
        value, default = getattr(settings, option), _default(settings, of_default, option)
        for line in wrap(fields[option].description or "", WIDTH):
            yield f"# {line}\n"
        yield f"{_assigned(option, value)}{_difference(value, default)}\n"
    for option in inner:
        default = _default(settings, of_default, option)
        yield from _section(getattr(settings, option), default, f"{name}.{option}" if name else option)


def _default(settings: BaseModel, usual: BaseModel | None, option: str) -> Any:
    if usual is not None:
        return getattr(usual, option)
    return type(settings).model_fields[option].get_default(call_default_factory=True, validated_data={})


def _assigned(option: str, value: Any) -> str:
    return f"# {option} is not set" if value is None else f"{key_text(option)} = {value_text(plain(value))}"


def _difference(value: Any, default: Any) -> str:
    if default is PydanticUndefined:
        return "  # no default"
    if plain(value) == plain(default):
        return ""
    return f"  # default: {'not set' if default is None else value_text(plain(default))}"


def plain(value: Any) -> Any:
    """Convert settings, also in tables and tuples, to tables and lists."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
