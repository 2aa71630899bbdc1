"""Error messages for a wrong recipe: one line for each fault, with the option and a fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from datetime import date, time
from typing import Any

from pydantic import BaseModel

from deploy.config.synonyms import SYNONYMS
from rollout.engines.vllm_options import vllm_argument
from rollout.wire.own_part import TAGS


class ConfigError(ValueError):
    """A mistake of the user in a recipe, an override, a path or a command; the message is one line."""


SPELLED_SCORE = 0.55  # least similarity, 0 to 1, of a suggestion

# Types that text without quotes may be read as.
UNQUOTED = (bool, int, float, date, time)

Settings = type[BaseModel]


def explain(fault: Any, root: Settings) -> str:
    """Turn one of pydantic's errors about settings of the class `root` into a line."""
    location = [part for part in fault["loc"] if part not in TAGS]
    where = _written(location, root)
    if fault["type"] == "extra_forbidden":
        if misplaced := _of_another_kind([part for part in location if isinstance(part, str)], root):
            return misplaced
        return unknown(where, fault["input"], root)
    if fault["type"] == "missing":
        return f"option {where} is missing"
    if fault["type"] == "union_tag_invalid":
        kinds = fault["ctx"]["expected_tags"]
        return f"{where}.kind: there is no kind {fault['ctx']['tag']!r}; there are {kinds}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "string_type" and isinstance(fault["input"], UNQUOTED):
        message += f"; quote text that reads as another value: {where}='\"TEXT\"'"
    return (
        f"{where}: {message} (got {fault['input']!r})"
        if where and not isinstance(fault["input"], dict)
        else message
    )


def unknown(where: str, value: Any, root: Settings) -> str:
    """The message for an unknown option, with a suggestion: by names in other trainers first, then by spelling.

    value: of the option; for an unknown section the suggestion is for its first option.
    """
    names = list(dict.fromkeys(option_names(root)))
    sections = [name for name in names if any(each.startswith(f"{name}.") for each in names)]
    if isinstance(value, dict) and value and not difflib.get_close_matches(where, sections, n=1, cutoff=0.8):
        inner, within = next(iter(value.items()))
        return unknown(f"{where}.{inner}", within, root)
    ours = _synonym(where, names) or vllm_argument(where)
    found = _placed(ours or _spelled(where, names), where)
    return f"unknown option {where}" + (f"; did you mean {found}?" if found else "")


def _placed(found: str, where: str) -> str:
    """An option in a list with the place that was written: stages.optim and stages.0.opt give stages.0.optim."""
    listed = re.match(r"([a-z_.]+)\.\d+\.", where)
    if listed is None or not found.startswith(f"{listed[1]}."):
        return found
    return listed[0] + found.removeprefix(f"{listed[1]}.")


def _synonym(where: str, names: Sequence[str]) -> str:
    """The option with this name in another trainer; of several, the one in the most similar section."""
    *sections, last = where.split(".")
    ours = [name for name in SYNONYMS.get(last.lower().replace("-", "_"), ()) if name in names]
    return max(ours, key=lambda name: _alike(".".join(sections), name.rpartition(".")[0]), default="")


def _spelled(where: str, names: Sequence[str]) -> str:
    """The option with the most similar spelling: by its last part first, then its sections, then its depth."""
    section, _, last = where.rpartition(".")

    def score(name: str) -> float:
        theirs, _, option = name.rpartition(".")
        begun = len(last) >= 3 and option.startswith(last)
        return (
            0.75 * max(_alike(last, option), 0.9 * begun)
            + 0.25 * _alike(section, theirs)
            - 1e-3 * name.count(".")
        )

    best = max(names, key=score, default="")
    return best if best and score(best) >= SPELLED_SCORE else ""


def _alike(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()


def _written(location: Sequence[Any], root: Settings) -> str:
    """An option's dotted name as in a recipe, without the kinds that pydantic adds for sections of a union."""
    names, parts = set(option_names(root)), [str(part) for part in location]
    kept: list[str] = []
    for place, part in enumerate(parts):
        section = ".".join(each for each in kept if not each.isdigit())
        tag = f"{section}.kind" in names and f"{section}.{part}" not in names and place < len(parts) - 1
        if not tag or part.isdigit():
            kept.append(part)
    return ".".join(kept)


def option_names(root: Settings) -> list[str]:
    """Every option's dotted name, sections included."""
    return [name for name, _ in _options(root)]


def models_in(annotation: Any) -> list[Settings]:
    """The settings classes of an annotation, also inside unions and sequences."""
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
    """The message for an option that belongs to another `kind` of its section; empty if it belongs to none.

    names: the section, its kind, and the option.
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
    return f"{dotted} does not belong to kind={kind!r}; it belongs to {', '.join(map(repr, kinds))}"
