"""Mutants: variants of a solution with one comparison, bound, sign, call or statement changed.

Inputs on which every mutant fails distinguish a solution from programs with boundary errors (DeMillo, Lipton and
Sayward 1978, "Hints on test data selection: help for the practicing programmer").
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Any

MAX_ROUNDS = 300  # iterations of all `while` loops in a call; a mutant that exceeds it is wrong

Function = Callable[..., Any]
_WRONG = (ArithmeticError, AttributeError, LookupError, NameError, TypeError, ValueError)

# Operators that are easily confused.
_COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt, ast.NotEq), ast.LtE: (ast.Lt, ast.GtE, ast.Eq),
    ast.Gt: (ast.GtE, ast.Lt, ast.NotEq), ast.GtE: (ast.Gt, ast.LtE, ast.Eq),
    ast.Eq: (ast.NotEq, ast.LtE, ast.GtE), ast.NotEq: (ast.Eq, ast.Lt, ast.Gt),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
_COMPUTED: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Add, ast.FloorDiv), ast.FloorDiv: (ast.Mod, ast.Mult),
    ast.Mod: (ast.FloorDiv, ast.Sub), ast.Pow: (ast.Mult,),
}  # fmt: skip
_CALLED = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "max", "rjust": "ljust"}


class _Endless(ValueError):
    pass


def is_right(function: Function, arguments: tuple[Any, ...], expected: str) -> bool:
    """Whether a mutant returns the expected result, compared as text like in the environment."""
    try:
        return ascii(function(*arguments)) == expected
    except _WRONG:
        return False


def mutants(solution: str, name: str) -> Iterator[Function]:
    """Functions that differ from a solution in one place. A non-terminating loop raises ValueError."""
    tree: ast.Module = _Bounded().visit(ast.parse(solution))
    for parent in list(ast.walk(tree)):
        for field, value in list(ast.iter_fields(parent)):
            if isinstance(value, list):
                yield from _of_list(tree, name, value)
            elif isinstance(value, ast.AST):
                for other in _replacements(value):
                    setattr(parent, field, other)
                    yield _function(tree, name)
                setattr(parent, field, value)


def _of_list(tree: ast.Module, name: str, items: list[Any]) -> Iterator[Function]:
    """Variants with one item changed, one dropped, or two neighbours swapped."""
    original = list(items)
    others = [
        [*original[:at], other, *original[at + 1 :]]
        for at, item in enumerate(original)
        for other in _replacements(item)
    ]
    if original and isinstance(original[0], ast.stmt | ast.expr | ast.comprehension):
        statement = isinstance(original[0], ast.stmt)
        swaps = range(len(original) - 1)
        others += [[*original[:at], original[at + 1], original[at], *original[at + 2 :]] for at in swaps]
        if len(original) > 1 or statement:
            gone: list[Any] = [ast.Pass()] if statement else []
            others += [[*original[:at], *gone, *original[at + 1 :]] for at in range(len(original))]
    for other in others:
        items[:] = other
        try:
            yield _function(tree, name)
        except (SyntaxError, ValueError, TypeError):  # not a valid program
            continue
        finally:
            items[:] = original


def _function(tree: ast.Module, name: str) -> Function:
    rounds = 0

    def bounded() -> bool:
        nonlocal rounds
        rounds += 1
        if rounds > MAX_ROUNDS:
            raise _Endless
        return True

    def called(*arguments: Any) -> Any:
        nonlocal rounds
        rounds = 0
        return scope[name](*arguments)

    scope: dict[str, Any] = {"_bounded": bounded}
    exec(compile(ast.fix_missing_locations(tree), "mutant", "exec"), scope)
    return called


class _Bounded(ast.NodeTransformer):
    """Loops that count their iterations."""

    def visit_While(self, node: ast.While) -> ast.While:
        self.generic_visit(node)
        node.test = ast.IfExp(
            ast.Call(ast.Name("_bounded", ast.Load()), [], []), node.test, ast.Constant(False)
        )
        return node


def _replacements(node: Any) -> Iterator[ast.AST]:
    match node:
        case ast.Constant(value=bool()) | ast.IfExp(test=ast.Call(func=ast.Name(id="_bounded"))):
            return
        case ast.Constant(value=int(number)):
            yield from (ast.Constant(number + 1), ast.Constant(number - 1))
        case ast.Constant(value=str(text)) if text:
            yield from (ast.Constant(text[1:]), ast.Constant(text[:-1]))
        case ast.Compare(left=left, ops=ops, comparators=right):
            for at, op in enumerate(ops):
                for other in _COMPARED[type(op)]:
                    yield ast.Compare(left, [*ops[:at], other(), *ops[at + 1 :]], right)
            if len(ops) > 1:
                yield from (
                    ast.Compare(left, ops[:1], right[:1]),
                    ast.Compare(right[-2], ops[-1:], right[-1:]),
                )
        case ast.BinOp(left=left, op=op, right=right):
            for made in _COMPUTED[type(op)]:
                yield ast.BinOp(left, made(), right)
            yield from (left, right, ast.BinOp(right, op, left))
        case ast.AugAssign(target=target, op=op, value=value):
            for made in _COMPUTED[type(op)]:
                yield ast.AugAssign(target, made(), value)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.If(body=body, orelse=orelse, test=test):
            yield from (
                ast.If(ast.Constant(True), body, orelse),
                ast.If(ast.UnaryOp(ast.Not(), test), body, orelse),
            )
        case ast.IfExp(body=body, orelse=orelse):
            yield from (body, orelse)
        case ast.Call():
            yield from _other_calls(node)
        case ast.Slice(lower=lower, upper=upper, step=step):
            if lower is not None:
                yield ast.Slice(None, upper, step)
            if upper is not None:
                yield ast.Slice(lower, None, step)
            if step is not None:
                yield ast.Slice(lower, upper, None)
        case ast.comprehension(ifs=[_, *_]):
            yield ast.comprehension(node.target, node.iter, [], 0)
        case ast.Return(value=value) if value is not None:
            yield ast.Return(ast.BinOp(value, ast.Add(), ast.Constant(1)))


def _other_calls(node: ast.Call) -> Iterator[ast.AST]:
    """Another function, arguments dropped or reordered, or the receiver of the call."""
    function, given = node.func, node.args
    name = (
        function.id
        if isinstance(function, ast.Name)
        else function.attr
        if isinstance(function, ast.Attribute)
        else ""
    )
    if name in _CALLED and isinstance(function, ast.Name):
        yield ast.Call(ast.Name(_CALLED[name], ast.Load()), given, node.keywords)
    if name in _CALLED and isinstance(function, ast.Attribute):
        yield ast.Call(ast.Attribute(function.value, _CALLED[name], ast.Load()), given, node.keywords)
    if len(given) == 1 and isinstance(function, ast.Name):
        yield given[0]
    if node.keywords:
        yield ast.Call(function, given, [])
    if isinstance(function, ast.Attribute):
        yield function.value
