"""Near misses of a solution: one token or one line is changed. They are generated here and run without a sandbox.

What one computes is compared with the solution on `FRESH` inputs that are drawn as a task's are; one that agrees on all
is held to be the same function.
"""

from __future__ import annotations

import ast
import io
import keyword
import signal
import tokenize
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from envs.builtin.programming_tasks import Arguments, ProgrammingTask

FRESH = 2000
SECONDS = 2.0  # for one near miss on all inputs; one that takes longer is wrong

TOKENS = {
    "<": ("<=", ">", ">=", "=="), "<=": ("<", ">=", "==", ">"), ">": (">=", "<", "<=", "=="),
    ">=": (">", "<=", "==", "<"), "==": ("!=", "<=", ">=", "<"), "!=": ("==", "<", ">"),
    "+": ("-", "*"), "-": ("+", "*"), "*": ("+", "-"), "//": ("%", "/"), "%": ("//", "-"), "**": ("*", "+"),
    "+=": ("-=", "="), "-=": ("+=", "="), "*=": ("+=", "="), "//=": ("-=", "/="), "%=": ("-=", "//="),
    "and": ("or",), "or": ("and",), "not": ("",), "in": ("not in",), "if": ("if not",),
    "min": ("max", "sum"), "max": ("min", "sum"), "any": ("all",), "all": ("any",), "sum": ("len", "max", "min"),
    "len": ("sum", "max"), "abs": ("int", ""), "sorted": ("list", "reversed"), "reversed": ("list", "sorted"),
    "True": ("False",), "False": ("True",), "rjust": ("ljust", "center"), "set": ("list",), "ord": ("len",),
    "append": ("extend",), "isdigit": ("isalpha",), "pop": ("copy",),
}  # fmt: skip


def near_misses(task: ProgrammingTask) -> Iterator[str]:
    """Programs other than the task's solution, of which Python at least accepts the text."""
    seen = {task.solution}
    for program in (*_other_tokens(task.solution), *_other_lines(task.solution)):
        if program not in seen:
            seen.add(program)
            try:
                compile(program, "near miss", "exec")
            except (SyntaxError, ValueError):
                continue
            yield program


def _other_tokens(source: str) -> Iterator[str]:
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    lines = source.splitlines(keepends=True)
    body = [token for token in tokens if token.start[0] > 1]
    names = sorted({each.string for each in tokens if _is_variable(each, source)})
    for token in body:
        others: list[str] = list(TOKENS.get(token.string, ()))
        if token.type == tokenize.NUMBER:
            number = ast.literal_eval(token.string)
            others = [str(number + 1), f"({number - 1})", "0" if number else "1", f"({-number})"]
        elif token.type == tokenize.STRING:
            text = token.string[1:-1]
            others = [repr(text[1:]), repr(text[:-1]), repr(text + "a")]
        elif token.string in names:
            others += [name for name in names if name != token.string]
        row, column = token.start
        for other in others:
            line = lines[row - 1]
            changed = line[:column] + other + line[token.end[1] :]
            yield "".join([*lines[: row - 1], changed, *lines[row:]])


def _is_variable(token: tokenize.TokenInfo, source: str) -> bool:
    called = f"{token.string}(" in source or f".{token.string}" in source
    return token.type == tokenize.NAME and not keyword.iskeyword(token.string) and not called


def _other_lines(source: str) -> Iterator[str]:
    first, *lines = source.splitlines(keepends=True)
    for at, line in enumerate(lines):
        margin = line[: len(line) - len(line.lstrip())]
        yield "".join([first, *lines[:at], f"{margin}pass\n", *lines[at + 1 :]])
        yield "".join([first, *lines[: at + 1], line, *lines[at + 1 :]])
        if at + 1 < len(lines):
            yield "".join([first, *lines[:at], lines[at + 1], line, *lines[at + 2 :]])
            below = lines[at + 1]
            inner = below[: len(below) - len(below.lstrip())]
            yield "".join(
                [first, *lines[:at], margin + below.lstrip(), inner + line.lstrip(), *lines[at + 2 :]]
            )
        yield "".join([first, *lines[:at], f"{margin}    {line.lstrip()}", *lines[at + 1 :]])
        yield "".join([first, *lines[:at], margin[:-4] + line.lstrip(), *lines[at + 1 :]])


class Slow(Exception):
    pass


@contextmanager
def _limited() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Slow

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def agrees(program: str, task: ProgrammingTask, inputs: Sequence[Arguments]) -> bool:
    """Whether a program gives what the solution gives on all of these inputs, as the environment compares it."""
    scope: dict[str, Any] = {}
    try:
        with _limited():
            exec(program, scope)
            return all(
                ascii(scope[task.name](*arguments)) == ascii(task.expected(arguments)) for arguments in inputs
            )
    except Exception:  # whatever a near miss raises, it is wrong
        return False


def accepted(task: ProgrammingTask, tests: Sequence[Arguments]) -> tuple[int, int, list[str]]:
    """Of a task's near misses: how many compute something else, how many the same, and which others pass."""
    rng = np.random.default_rng(2**31)
    fresh = [tuple(draw(rng) for draw in task.family.takes.values()) for _ in range(FRESH)]
    others, same, passed = 0, 0, []
    for program in near_misses(task):
        passes = agrees(program, task, tests)
        if passes and agrees(program, task, fresh):
            same += 1
            continue
        others += 1
        if passes:
            passed.append(program)
    return others, same, passed
