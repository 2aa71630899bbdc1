"""What `manta config` prints: a resolved recipe, every option with its description, as TOML that is a recipe itself."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from deploy.config.config import RunConfig
from deploy.config.toml_text import key_text, value_text

WIDTH = 100  # characters of a comment's line


def config_text(config: RunConfig) -> str:
    """Every option with its description above it; an option that differs from its default names that default."""
    head = "# Every option as it is resolved. An option that differs from its default has that behind it.\n"
    return head + "".join(_section(config, None, ""))


def _section(settings: BaseModel, usual: Any, name: str) -> Iterator[str]:
    """The lines of a section, and then those of the sections within it. usual: the settings that it has by default."""
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
    """Settings and tuples of them as tables and lists."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
