"""Programming tasks, drawn from families: a sentence with parameters, inputs, and a reference solution.

The reference solution decides what is right; tests compare it with a second implementation.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import Template
from textwrap import dedent, indent
from typing import Any

import numpy as np

from envs.base import MAX_DRAWS, Split, draw_valid
from envs.builtin.programming_mutants import Function, is_right, mutants

MAX_PROBES = 500  # distinct inputs that are tried
MAX_IN_VAIN = 1000  # runs of mutants without a failure; the remaining mutants are most likely equivalent

Rng = np.random.Generator
Choices = Mapping[str, str]  # text in the sentence -> code in the solution
Arguments = tuple[Any, ...]
Draw = Callable[[Rng], Any]  # draws a value for an argument


@dataclass(frozen=True)
class Family:
    """A family of tasks; `$name` is a parameter in `says` and `body`.

    says: what the function returns, in English. takes: argument -> how a value is drawn. body: the solution's body,
    Python code. chosen: parameter -> its choices.
    """

    level: int
    name: str
    says: str
    takes: Mapping[str, Draw]
    body: str
    chosen: Mapping[str, Choices]

    def filled(self, chosen: Mapping[str, str]) -> ProgrammingTask:
        """The task with these parameters, as worded in the sentence."""
        code = {name: self.chosen[name][phrase] for name, phrase in chosen.items()}
        body = indent(dedent(Template(self.body).substitute(code)).strip("\n"), "    ")
        says = Template(self.says).substitute(chosen)
        return ProgrammingTask(self, chosen, says, f"def {self.name}({', '.join(self.takes)}):\n{body}\n")

    def recognized(self, says: str) -> ProgrammingTask:
        """The task with this sentence. ValueError if it does not belong to the family."""
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
class ProgrammingTask:
    """A function to be written; `chosen` are the family's parameters as worded in `says`."""

    family: Family
    chosen: Mapping[str, str]
    says: str
    solution: str

    @property
    def name(self) -> str:
        return self.family.name

    @property
    def signature(self) -> str:
        return f"{self.name}({', '.join(self.family.takes)})"

    def expected(self, arguments: Arguments) -> Any:
        """The result that the function must return."""
        return _compiled(self.solution, self.name)(*arguments)


@lru_cache(maxsize=256)
def _compiled(solution: str, name: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {}
    exec(solution, scope)  # only code from this repository, never from an action
    function: Callable[..., Any] = scope[name]
    return function


def draw_task(families: Sequence[Family], split: Split, rng: Rng) -> ProgrammingTask:
    """A task of one of these families; its sentence decides the split."""

    def attempt() -> ProgrammingTask:
        family = families[int(rng.integers(len(families)))]
        return family.filled({name: pick(list(choices))(rng) for name, choices in family.chosen.items()})

    return draw_valid(attempt, lambda task: f"{task.name}: {task.says}", split)


def draw_inputs(
    task: ProgrammingTask, examples: int, hidden: int, rng: Rng
) -> tuple[list[Arguments], list[Arguments]]:
    """Visible and hidden inputs, all distinct.

    The hidden ones include the task's probes. They have at least two different results, and at least one result that is
    not an argument: no constant, no table of the examples and no returned argument passes all of them.
    """
    probed = probes(task.name, task.says, task.solution, tuple(task.family.takes.values()))[:hidden]
    for _ in range(MAX_DRAWS):
        drawn = {repr(arguments): arguments for arguments in probed}
        for arguments in _draws(task.family.takes.values(), rng, 4 * (examples + hidden)):
            drawn.setdefault(repr(arguments), arguments)
            if len(drawn) == examples + hidden:
                break
        inputs = list(drawn.values())
        at = [int(place) for place in rng.permutation(len(inputs) - examples)]
        kept = [inputs[place] for place in at]
        results = [ascii(task.expected(each)) for each in kept]
        echoes = [{ascii(argument) for argument in each} for each in kept]
        informative = len(set(results)) > 1 and any(
            result not in echo for result, echo in zip(results, echoes, strict=True)
        )
        if len(kept) == hidden and informative:
            return inputs[hidden:], kept
    raise ValueError(f"no inputs for {task.name}: {task.says}")


@lru_cache(maxsize=256)
def probes(name: str, says: str, solution: str, takes: tuple[Draw, ...]) -> tuple[Arguments, ...]:
    """A small set of inputs on which all of a task's mutants fail; the same for every episode of the task.

    Inputs that the others replace least come first. Takes some hundredths to some tenths of a second.
    """
    left, in_vain = list(mutants(solution, name)), 0
    kept: list[tuple[Arguments, str, list[Function]]] = []
    seen = set[str]()
    for arguments in _draws(
        takes, np.random.default_rng(zlib.crc32(f"{name}: {says}".encode())), 2 * MAX_PROBES
    ):
        if len(seen) == MAX_PROBES or in_vain > MAX_IN_VAIN:
            break
        if (key := repr(arguments)) in seen:
            continue
        seen.add(key)
        expected = ascii(_compiled(solution, name)(*arguments))
        wrong = [mutant for mutant in left if not is_right(mutant, arguments, expected)]
        if wrong:
            kept.append((arguments, expected, wrong))
            left = [mutant for mutant in left if mutant not in wrong]
        in_vain = 0 if wrong else in_vain + len(left)
    # Each input was kept for mutants that earlier inputs missed. Mutants that it catches too need no other input.
    needed, known = [], set[Function]()
    for at, (arguments, expected, wrong) in reversed(list(enumerate(kept))):
        if not known.issuperset(wrong):
            needed.append(arguments)
            earlier = [mutant for *_, others in kept[:at] for mutant in others if mutant not in known]
            known.update(wrong, (mutant for mutant in earlier if not is_right(mutant, arguments, expected)))
    return tuple(needed)


def _draws(takes: Iterable[Draw], rng: Rng, count: int) -> Iterator[Arguments]:
    draws = tuple(takes)
    return (tuple(draw(rng) for draw in draws) for _ in range(count))


# Choices of parameters.


def numbers_between(first: int, last: int) -> Choices:
    return {str(number): str(number) for number in range(first, last + 1)}


def quoted(texts: Sequence[str]) -> Choices:
    return {f'"{text}"': f'"{text}"' for text in texts}


# Distributions of arguments.


def pick(values: Sequence[Any]) -> Draw:
    return lambda rng: values[int(rng.integers(len(values)))]


def whole(first: int, last: int) -> Callable[[Rng], int]:
    return lambda rng: int(rng.integers(first, last + 1))


def letters(fewest: int, most: int, alphabet: str = "abcdefghij") -> Callable[[Rng], str]:
    return lambda rng: "".join(
        alphabet[at] for at in rng.integers(len(alphabet), size=rng.integers(fewest, most + 1))
    )


def several(draw: Draw, fewest: int, most: int) -> Callable[[Rng], list[Any]]:
    return lambda rng: [draw(rng) for _ in range(rng.integers(fewest, most + 1))]
