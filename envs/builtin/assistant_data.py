"""The assistant's tools and their data, which are the same everywhere because they are drawn from hashes.

Sixteen invented places and as many people; the weather of every day of a year in each place; and 64 documents of one
sentence each: mayors of places, birthplaces and trades of people, and heights of towers.
"""

from __future__ import annotations

import ast
import hashlib
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

from envs.tools.tool import Tool

PLACES = (
    *("arlen", "brone", "celdor", "dunmar", "eskil", "farrow", "gostra", "harven"),
    *("irmel", "jorvale", "keldra", "lomund", "mirfeld", "norbeck", "ostrin", "pelham"),
)
PEOPLE = (
    *("adela", "bertil", "corin", "dagny", "edvin", "frida", "gunnar", "hedda"),
    *("ivor", "jutta", "kasper", "linnea", "mattis", "nora", "oskar", "tilda"),
)
TRADES = ("baker", "carver", "fisher", "miller", "potter", "smith", "tailor", "weaver")
MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
DAYS = 28  # of every month
QUANTITIES = {"temperature": (-20, 38), "wind": (0, 30), "rain": (0, 40)}  # lowest and highest

_EXPRESSION = re.compile(r"[0-9.+\-*/() ]{1,100}")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIZES = {  # unit -> (quantity, size in the first unit of that quantity)
    "metres": ("length", Fraction(1)),
    "feet": ("length", Fraction("0.3048")),
    "km": ("length", Fraction(1000)),
    "miles": ("length", Fraction("1609.344")),
    "kg": ("weight", Fraction(1)),
    "pounds": ("weight", Fraction("0.45359237")),
    "litres": ("volume", Fraction(1)),
    "gallons": ("volume", Fraction("3.785411784")),
}
UNITS = (*_SIZES, "celsius", "fahrenheit")


def _drawn(key: str, low: int, high: int) -> int:
    """An integer from `low` to `high`, determined by `key`."""
    return low + int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % (high - low + 1)


def _dealt(names: Sequence[str], key: str) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{key} {name}".encode()).digest())


MAYORS = dict(zip(PLACES, _dealt(PEOPLE, "mayor"), strict=True))
BIRTHPLACES = dict(zip(PEOPLE, _dealt(PLACES, "birthplace"), strict=True))
TRADE_OF = {person: TRADES[_drawn(f"trade {person}", 0, len(TRADES) - 1)] for person in PEOPLE}
TOWERS = {place: _drawn(f"tower {place}", 20, 120) for place in PLACES}  # metres
DOCUMENTS = (
    *(f"the mayor of {place} is {person}." for place, person in MAYORS.items()),
    *(f"the birthplace of {person} is {place}." for person, place in BIRTHPLACES.items()),
    *(f"the trade of {person} is {trade}." for person, trade in TRADE_OF.items()),
    *(f"the height of the tower of {place} is {height} metres." for place, height in TOWERS.items()),
)


def measured(quantity: str, place: str, date: str) -> int:
    """One quantity of the weather: degrees celsius, metres per second, or millimetres."""
    return _drawn(f"{quantity} {place} {date}", *QUANTITIES[quantity])


def converted(amount: Fraction, unit: str, to: str) -> Fraction:
    """An amount in another unit. ValueError for unknown units, or units of different quantities."""
    if (unit, to) == ("celsius", "fahrenheit"):
        return amount * 9 / 5 + 32
    if (unit, to) == ("fahrenheit", "celsius"):
        return (amount - 32) * 5 / 9
    if unit not in UNITS or to not in UNITS:
        raise ValueError(f"units are {', '.join(UNITS)}")
    kind, size = _SIZES.get(unit, (unit, Fraction(1)))
    other, other_size = _SIZES.get(to, (to, Fraction(1)))
    if kind != other:
        raise ValueError(f"{unit} are not to be told in {to}")
    return amount * size / other_size


def evaluated(expression: str) -> Fraction:
    """The exact value of an expression of numbers, + - * / and brackets, of at most 100 characters.

    ValueError for anything else, ZeroDivisionError for a division by zero.
    """
    if not _EXPRESSION.fullmatch(expression):
        raise ValueError("an expression is made of numbers, + - * / and brackets, at most 100 characters")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError("the expression is not complete, or has too much") from error


def written(number: Fraction) -> str:
    """A number with up to two decimals, without trailing zeros."""
    text = f"{float(round(number, 2)):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def weather(place: str, date: str) -> str:
    """Temperature (celsius), wind and rain in a place on a date such as may 12."""
    month, _, day = date.lower().partition(" ")
    if place.lower() not in PLACES:
        raise LookupError("there is no such place")
    if month not in MONTHS or day not in map(str, range(1, DAYS + 1)):
        raise LookupError(f"a date is a month and a day from 1 to {DAYS}, such as may 12")
    return ", ".join(f"{each} {measured(each, place.lower(), date.lower())}" for each in QUANTITIES)


def calculate(expression: str) -> str:
    """The value of an expression such as 3 * (4 + 5)."""
    return written(evaluated(expression))


def convert(amount: float, unit: str, to: str) -> str:
    """An amount in another unit, such as metres in feet or celsius in fahrenheit."""
    return written(converted(Fraction(str(amount)), unit.lower(), to.lower()))


def search(words: str) -> str:
    """What is known of some words: mayors, birthplaces, trades, heights of towers."""
    asked = set(re.findall("[a-z]+", words.lower()))
    scores = [sum(_WEIGHTS[word] for word in asked & said) for said in _SAID]
    best = max(scores)
    return DOCUMENTS[scores.index(best)] if best > 0 else "nothing found"


_FUNCTIONS: tuple[Callable[..., str], ...] = (weather, calculate, convert, search)
TOOLS = tuple(map(Tool.of, _FUNCTIONS))

_SAID = [frozenset(re.findall("[a-z]+", document)) for document in DOCUMENTS]
# Inverse document frequency: a word that occurs in every document has weight 0.
_WEIGHTS = {
    word: math.log(len(DOCUMENTS) / count)
    for word, count in Counter(w for said in _SAID for w in said).items()
}


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.BinOp(left, op, right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand)
        case ast.Constant(int() | float() as value):
            return Fraction(str(value))
    raise ValueError("an expression knows + - * / and brackets only")
