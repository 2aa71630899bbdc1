"""What is said of a recipe that is wrong: one line for each fault, naming the option, and what would fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

Settings = type[BaseModel]


def explain(fault: Any, root: Settings) -> str:
    """One of pydantic's errors about settings of the class `root`, as a line."""
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        if misplaced := _of_another_kind([part for part in fault["loc"] if isinstance(part, str)], root):
            return misplaced
        close = difflib.get_close_matches(where, option_names(root), n=1, cutoff=0.3)
        return f"unknown option {where}" + (f"; did you mean {close[0]}?" if close else "")
    if fault["type"] == "missing":
        return f"option {where} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    return (
        f"{where}: {message} (got {fault['input']!r})"
        if where and not isinstance(fault["input"], dict)
        else message
    )


def option_names(root: Settings) -> list[str]:
    """Every option's dotted name, sections included."""
    return [name for name, _ in _options(root)]


def models_in(annotation: Any) -> list[Settings]:
    """The settings classes of an annotation, those of unions and sequences too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [model for argument in arguments for model in models_in(argument)]


def _options(root: Settings, prefix: str = "") -> Iterator[tuple[str, Settings]]:
    """Every option's dotted name, and the class that declares it."""
    for name, field in root.model_fields.items():
        yield prefix + name, root
        for section in models_in(field.annotation):
            yield from _options(section, f"{prefix}{name}.")


def _of_another_kind(names: Sequence[str], root: Settings) -> str:
    """What to say of an option that its section has under another `kind`; nothing, where it has it under none.

    names: of the section, its kind, and the option.
    """
    *section, kind, option = ["", *names]
    dotted = ".".join([*section[1:], option])
    kinds = [
        declared.model_fields["kind"].default
        for name, declared in _options(root)
        if name == dotted and "kind" in declared.model_fields
    ]
    if not kinds:
        return ""
    return f"{dotted} does not belong to kind={kind!r}; it does to {', '.join(map(repr, kinds))}"
