"""docs/reference/configuration.md: every section and option of a recipe, from the JSON schema of `RunConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from deploy.commands.markdown import GENERATED, code, link, prose, sentence, table
from deploy.config.config import RunConfig
from deploy.config.toml_text import toml_of, value_text
from rollout.engines.settings import OWN as OWN_KIND

Schema = dict[str, Any]

TOP = "Top level"
_WORDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
# Units of numbers, by the last word of an option's name.
_UNITS = {
    "seconds": "s",
    "bytes": "bytes",
    "mib": "MiB",
    "gib": "GiB",
    "tokens": "tokens",
    "chars": "characters",
    "lag": "weight versions",
}
_INTRODUCTION = """\
A recipe is a TOML file with these sections and options. `manta train` and `manta submit` take the same names as
overrides, and `manta config RECIPE` prints every option of a recipe as it is resolved:

    manta train frozen_lake steps=20 rollout.group_size=16 learner.optim.learning_rate=3e-5

A section of several kinds is chosen by its `kind`, and has the options of that kind only. A recipe that leaves an
option out gets its default; *required* options have none. Unknown options are errors that name the nearest valid one.

"""


@dataclass(frozen=True, slots=True)
class _Place:
    """A section: its dotted name, and the kinds of the sections around it."""

    path: str = ""
    kinds: tuple[str, ...] = ()
    depth: int = 2  # of its heading

    @property
    def heading(self) -> str:
        kinds = "".join(f" kind {code(kind)}" for kind in self.kinds)
        return f"{code(self.path)}{kinds}" if self.path else TOP

    def of_kind(self, kind: str) -> _Place:
        return _Place(self.path, (*self.kinds, kind), self.depth + 1)

    def inner(self, option: str) -> _Place:
        path = f"{self.path}.{option}" if self.path else option
        return _Place(path, self.kinds, self.depth + 1 if self.path else 2)


@dataclass(slots=True)
class _Page:
    """The page under construction: its sections in order, and their index."""

    schema: Schema
    index: list[str] = field(default_factory=list)
    # A settings class that stands in several sections is written out once: by id, where, and with which defaults.
    written: dict[int, tuple[_Place, Schema]] = field(default_factory=dict)

    def section(self, place: _Place, node: Schema, usual: Any) -> Iterator[str]:
        """Yield a section and those within it. usual: its value in a recipe that leaves it out; None: absent."""
        classes = self.classes(node)
        by_kind = {_kind_of(each): each for each in classes}
        yield f"{'#' * min(place.depth, 5)} {place.heading}\n\n"
        if about := node.get("description", ""):
            yield f"{prose(sentence(about))}{_absent(usual)}\n\n"
        self.index.append(f"{'    ' * place.path.count('.')}- {link(place.heading, place.heading)}")
        if len(classes) == 1:
            yield from self._options(place, classes[0], usual, about)
        else:
            links = [link(code(kind), place.of_kind(kind).heading) for kind in by_kind]
            self.index[-1] += f": {', '.join(links)}"
            yield f"{_listed(node)} one of these kinds: {', '.join(links)}.\n\n"
        if isinstance(usual, list) and usual:
            yield "The default:\n\n" + "".join(f"    {value_text(_short(each, by_kind))}\n" for each in usual)
            yield "\n"
        for kind, each in by_kind.items() if len(classes) > 1 else ():
            within = place.of_kind(kind)
            yield f"{'#' * min(within.depth, 5)} {within.heading}\n\n"
            same = usual if isinstance(usual, dict) and usual.get("kind") == kind else None
            yield from self._options(within, each, same, "")

    def _options(self, place: _Place, table_: Schema, usual: Any, about: str) -> Iterator[str]:
        """Yield the options of a settings class as a table, then the sections within it."""
        explained = table_.get("description", "").partition("\n\n")[0]
        if explained and ("kind" in table_["properties"] or not about):
            yield f"{prose(sentence(explained))}\n\n"
        defaults = _defaults(table_, usual or None)  # a table of names is empty: the defaults are the class's
        if id(table_) in self.written:
            yield from self._as_before(table_, defaults)
            return
        self.written[id(table_)] = place, defaults
        rows = [
            self._row(place, name, option, table_, defaults)
            for name, option in table_["properties"].items()
            if "const" not in option  # a kind, which the heading says
        ]
        yield table(("option", "type", "default", "description"), rows) if rows else "It has no options.\n\n"
        for name, option in table_["properties"].items():
            if self.classes(option):
                yield from self.section(place.inner(name), option, defaults.get(name))

    def _as_before(self, table_: Schema, defaults: Schema) -> Iterator[str]:
        place, before = self.written[id(table_)]
        different = {name: value for name, value in defaults.items() if value != before.get(name)}
        yield f"The options of {link(code(place.path), place.heading)}"
        if different:
            said = toml_of(different).strip().replace("\n", ", ")
            yield f", with other defaults: {code(said)}"
        yield ".\n\n"

    def _row(
        self, place: _Place, name: str, option: Schema, table_: Schema, defaults: Schema
    ) -> tuple[str, ...]:
        required = name in table_.get("required", ())
        within = place.inner(name)
        shown = link(code(name), within.heading) if self.classes(option) else code(name)
        default = "*required*" if required else self._default(option, defaults.get(name))
        about = option.get("description") or "".join(
            each.get("description", "").partition("\n\n")[0] for each in self.classes(option)
        )
        return shown, self._type(option) + _unit(name, option), default, prose(sentence(about))

    def _default(self, option: Schema, value: Any) -> str:
        if value is None:
            return "not set"
        if not self.classes(option):
            return code(value_text(value))
        if value == {} and _named(option):
            return code("{}")
        if isinstance(value, list):
            return "below" if value else code("[]")
        return f"kind {code(value['kind'])}" if "kind" in value else ""

    def _type(self, node: Schema) -> str:
        """The type of an option's value with its bounds."""
        if self.classes(node):
            return "tables by name" if _named(node) else "list of tables" if _is_list(node) else "section"
        if "const" in node:
            return code(value_text(node["const"]))
        if "enum" in node:
            return ", ".join(code(value_text(each)) for each in node["enum"])
        if alternatives := [each for each in node.get("anyOf", ()) if each.get("type") != "null"]:
            return " or ".join(map(self._type, alternatives))
        if "prefixItems" in node:
            return f"list of {len(node['prefixItems'])}: {', '.join(map(self._type, node['prefixItems']))}"
        if node.get("type") == "array":
            return f"list of {self._type(node['items'])}" + (", not empty" if node.get("minItems") else "")
        if node.get("type") == "object":
            values = node.get("additionalProperties")
            return f"table of {self._type(values)}" if isinstance(values, dict) else "table"
        return _WORDS.get(node.get("type", ""), "any value") + _bounds(node)

    def classes(self, node: Schema) -> list[Schema]:
        """Return the settings classes that an option may hold, those of unions and lists included."""
        if "$ref" in node:
            found: Schema = self.schema["$defs"][node["$ref"].rpartition("/")[2]]
            return [found]
        inner = [*node.get("oneOf", ()), *node.get("anyOf", ())]
        if isinstance(node.get("items"), dict):
            inner.append(node["items"])
        inner += _named(node)
        return [each for one in inner for each in self.classes(one)]


def configuration_page() -> str:
    """Return the page: an index of all sections, then each with a table of its options."""
    schema = RunConfig.model_json_schema()
    page = _Page(schema)
    usual = RunConfig.model_validate({"steps": 1, "env": {"id": "any"}}).model_dump(mode="json")
    top = "".join(page._options(_Place(), schema, usual, ""))
    index = "\n".join([f"- {link(TOP, TOP)}", *page.index])
    return f"# Configuration\n\n{GENERATED}{_INTRODUCTION}{index}\n\n## {TOP}\n\n{top}".rstrip() + "\n"


def _defaults(table_: Schema, usual: Any) -> Schema:
    """Return the value of every option in a recipe that leaves it out. usual: the section's own; None: its class's."""
    if isinstance(usual, dict):
        return usual
    required = table_.get("required", ())
    return {
        name: option.get("default", {} if option.get("type") == "object" else None)
        for name, option in table_["properties"].items()
        if "const" not in option and name not in required
    }


def _kind_of(table_: Schema) -> str:
    kind: str = table_["properties"].get("kind", {}).get("const", OWN_KIND)
    return kind


def _short(entry: Schema, by_kind: dict[str, Schema]) -> Schema:
    """Return an entry of a list without the options that have their defaults."""
    defaults = _defaults(by_kind.get(entry.get("kind", OWN_KIND), {"properties": {}}), None)
    return {name: value for name, value in entry.items() if name not in defaults or value != defaults[name]}


def _is_list(node: Schema) -> bool:
    return node.get("type") == "array" or any(map(_is_list, node.get("anyOf", ())))


def _named(node: Schema) -> list[Schema]:
    """The values of a table whose keys are names of the user's own; empty for others."""
    return list(node.get("patternProperties", {}).values())


def _listed(node: Schema) -> str:
    return "A list; each entry is" if _is_list(node) else "It is"


def _absent(usual: Any) -> str:
    return " Not set by default." if usual is None else ""


def _unit(name: str, option: Schema) -> str:
    numbers = [option, *option.get("anyOf", ())]
    unit = _UNITS.get(name.rpartition("_")[2], "")
    return f", {unit}" if unit and any(each.get("type") in ("integer", "number") for each in numbers) else ""


def _bounds(node: Schema) -> str:
    """The bounds of a number, or the pattern of a text."""
    low, high = node.get("minimum"), node.get("maximum")
    above, below = node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
    least, most = (above if low is None else low), (below if high is None else high)
    text = ""
    if least is not None and most is not None:
        text = f" in {'(' if low is None else '['}{least}, {most}{')' if high is None else ']'}"
    elif least is not None:
        text = f" {'>' if low is None else '≥'} {least}"
    elif most is not None:
        text = f" {'<' if high is None else '≤'} {most}"
    if "multipleOf" in node:
        text += f", a multiple of {node['multipleOf']}"
    return text + (f" that matches {code(node['pattern'])}" if "pattern" in node else "")
