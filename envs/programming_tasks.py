"""What a programming task is, and how one is drawn from kinds: a sentence with parameters, inputs, and a solution.

A kind's solution is what tells right from wrong; tests compare each with a second one, written another way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import Template
from textwrap import dedent, indent
from typing import Any

import numpy as np

from envs.base import MAX_DRAWS, Split, drawn

Rng = np.random.Generator
Choices = Mapping[str, str]  # what the sentence says -> what the solution says
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Kind:
    """A family of tasks; `$name` stands for a parameter in `says` and `body`.

    says: what the function returns, in English. takes: argument -> how a value is drawn. body: of the solution, as
    Python. chosen: parameter -> its choices.
    """

    level: int
    name: str
    says: str
    takes: Mapping[str, Callable[[Rng], Any]]
    body: str
    chosen: Mapping[str, Choices]

    def filled(self, chosen: Mapping[str, str]) -> Task:
        """The task of these parameters, as the sentence says them."""
        code = {name: self.chosen[name][phrase] for name, phrase in chosen.items()}
        body = indent(dedent(Template(self.body).substitute(code)).strip("\n"), "    ")
        says = Template(self.says).substitute(chosen)
        return Task(self, chosen, says, f"def {self.name}({', '.join(self.takes)}):\n{body}\n")

    def recognized(self, says: str) -> Task:
        """The task whose sentence this is. ValueError if it is not of this kind."""
        pattern, known = re.escape(self.says), set[str]()
        for name in re.findall(r"\$(\w+)", self.says):
            group = f"(?P={name})" if name in known else f"(?P<{name}>.+?)"
            pattern = pattern.replace(rf"\${name}", group, 1)
            known.add(name)
        found = re.fullmatch(pattern, says)
        if found is None:
            raise ValueError(f"{says!r} is not a task of {self.name}")
        return self.filled(found.groupdict())


@dataclass(frozen=True)
class Task:
    """A function to be written; `chosen` are the kind's parameters as `says` has them."""

    kind: Kind
    chosen: Mapping[str, str]
    says: str
    solution: str

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def signature(self) -> str:
        return f"{self.name}({', '.join(self.kind.takes)})"

    def expected(self, arguments: Arguments) -> Any:
        """What the function must return."""
        return _compiled(self.solution, self.name)(*arguments)


@lru_cache(maxsize=256)
def _compiled(solution: str, name: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {}
    exec(solution, scope)  # from the tables of this repository, never from an action
    function: Callable[..., Any] = scope[name]
    return function


def draw_task(kinds: Sequence[Kind], split: Split, rng: Rng) -> Task:
    """A task of one of these kinds; the sentence decides which split it belongs to."""

    def attempt() -> Task:
        kind = kinds[int(rng.integers(len(kinds)))]
        return kind.filled({name: pick(list(choices))(rng) for name, choices in kind.chosen.items()})

    return drawn(attempt, lambda task: f"{task.name}: {task.says}", split)


def draw_inputs(task: Task, examples: int, hidden: int, rng: Rng) -> tuple[list[Arguments], list[Arguments]]:
    """Inputs to be shown and inputs to be hidden, no two alike.

    The hidden ones ask for at least two different results, and some for another than an argument itself: no constant,
    no table of the examples and no argument given back is right on all of them.
    """
    for _ in range(MAX_DRAWS):
        drawn: dict[str, Arguments] = {}
        for _ in range(4 * (examples + hidden)):
            arguments = tuple(draw(rng) for draw in task.kind.takes.values())
            drawn.setdefault(repr(arguments), arguments)
            if len(drawn) == examples + hidden:
                break
        inputs = list(drawn.values())
        kept = inputs[examples:]
        results = [ascii(task.expected(each)) for each in kept]
        echoes = [{ascii(argument) for argument in each} for each in kept]
        told = len(set(results)) > 1 and any(
            result not in echo for result, echo in zip(results, echoes, strict=True)
        )
        if len(kept) == hidden and told:
            return inputs[:examples], kept
    raise ValueError(f"no inputs for {task.name}: {task.says}")


# What parameters are chosen from.


def numbers_between(first: int, last: int) -> Choices:
    return {str(number): str(number) for number in range(first, last + 1)}


def quoted(texts: Sequence[str]) -> Choices:
    return {f'"{text}"': f'"{text}"' for text in texts}


# What arguments are drawn from.


def pick(values: Sequence[Any]) -> Callable[[Rng], Any]:
    return lambda rng: values[int(rng.integers(len(values)))]


def whole(first: int, last: int) -> Callable[[Rng], int]:
    return lambda rng: int(rng.integers(first, last + 1))


def letters(fewest: int, most: int, alphabet: str = "abcdefghij") -> Callable[[Rng], str]:
    return lambda rng: "".join(
        alphabet[at] for at in rng.integers(len(alphabet), size=rng.integers(fewest, most + 1))
    )


def several(draw: Callable[[Rng], Any], fewest: int, most: int) -> Callable[[Rng], list[Any]]:
    return lambda rng: [draw(rng) for _ in range(rng.integers(fewest, most + 1))]
