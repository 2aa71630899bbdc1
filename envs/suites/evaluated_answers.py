"""Answers that a scorer will evaluate as Python code: checks that make this safe.

A scorer that calls `eval`, directly or through a parser, executes anything that a policy writes, with all rights of the
process. Only literals, sums and products of numbers, and formulas of known functions pass here, and only small ones,
because evaluating a power like 9**9**9 takes forever.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

MAX_CHARACTERS = 2000
MAX_NUMBER = 10**12
MAX_POWER = 30  # of exponents, and of the parts of a fractional one
MAX_NESTED_POWERS = 3
FUNCTIONS = frozenset(
    (
        *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan"),
        *("sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "Abs"),
    )
)

_SUM = re.compile(r"[0-9+\-*/() ]+")
_LONG_NUMBER = re.compile(r"[0-9]{10}")
_HUGE_EXPONENT = re.compile(r"[0-9.][eE][+-]?[0-9]{4}")
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div)

AnswerCheck = Callable[[str], bool]


def holds_no_huge_number(answer: str) -> bool:
    """Whether no number has an exponent of four digits, whose exact value would not fit in memory."""
    return not _HUGE_EXPONENT.search(answer)


def is_literal(answer: str) -> bool:
    """Whether it is a Python literal: numbers, texts, lists of them."""
    try:
        ast.literal_eval(answer)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return len(answer) <= MAX_CHARACTERS


def is_sum(answer: str) -> bool:
    """Whether it consists of integers of up to nine digits, brackets, + - * and /."""
    return (
        len(answer) <= MAX_CHARACTERS
        and _SUM.fullmatch(answer) is not None
        and not any(power in answer.replace(" ", "") for power in ("**", "//"))
        and not _LONG_NUMBER.search(answer)
    )


def is_formula(answer: str) -> bool:
    """Whether it is a formula of one-letter variables and FUNCTIONS, with small or variable exponents."""
    if len(answer) > MAX_CHARACTERS:
        return False
    try:
        tree = ast.parse(answer.strip(), mode="eval")
        return _formula(tree.body, MAX_NESTED_POWERS)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _formula(node: ast.expr, powers: int) -> bool:
    match node:
        case ast.Constant():
            return _number(node, MAX_NUMBER)
        case ast.Name():
            return len(node.id) == 1 or node.id == "pi"
        case ast.UnaryOp(op=ast.UAdd() | ast.USub()):
            return _formula(node.operand, powers)
        case ast.BinOp(op=ast.Pow()):
            return powers > 0 and _exponent(node.right) and _formula(node.left, powers - 1)
        case ast.BinOp() if isinstance(node.op, _OPERATORS):
            return _formula(node.left, powers) and _formula(node.right, powers)
        case ast.Call(func=ast.Name(id=function), args=[argument], keywords=[]):
            return function in FUNCTIONS and _formula(argument, powers)
    return False


def _exponent(node: ast.expr) -> bool:
    """A small number, a fraction of two, or a variable times a small number."""
    match node:
        case ast.UnaryOp(op=ast.UAdd() | ast.USub()):
            return _exponent(node.operand)
        case ast.BinOp(op=ast.Mult() | ast.Div()):
            return all(_small(part) or _variable(part) for part in (node.left, node.right))
    return _small(node) or _variable(node)


def _small(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and _number(node, MAX_POWER)


def _variable(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and len(node.id) == 1


def _number(node: ast.Constant, most: float) -> bool:
    return (
        isinstance(node.value, int | float) and not isinstance(node.value, bool) and abs(node.value) <= most
    )
