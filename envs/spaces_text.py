"""Values of Gymnasium spaces as text: writing, describing and parsing them.

    Discrete                     3
    MultiDiscrete, MultiBinary   [3, 0, 1]; nested brackets for several axes
    Box                          [0.12, -3.1e-05]; a bare number for a box without axes
    Text                         verbatim; inside another space in double quotes, escaped as in JSON
    Tuple                        (3, [0, 1])
    Dict                         {"goal": 3, "hand": [0, 1]}, keys in the order of the space
    Sequence                     [3, 1, 4, 1]

Parsing is strict: exactly one value of the space, with white space only between its parts. Numbers are decimal, in
ASCII digits, finite, within their bounds, and as many as the space has. Writing and parsing a value gives the same
value; floats keep a fixed number of significant digits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array, iterate

DIGITS = 4  # significant digits of a float
MAX_DIGITS = 17  # enough to distinguish any two float64
MAX_NUMBERS = 64  # per value; larger ones (images) are not written as text

# Bounded lengths: int() and float() raise errors of their own for thousands of digits.
_WHOLE = re.compile(r"-?[0-9]{1,20}")
_NUMBER = re.compile(r"-?[0-9]{1,40}(?:\.[0-9]{1,40})?(?:[eE][+-]?[0-9]{1,3})?")
_BLANK = re.compile(r"[ \t\r\n]*")
_JSON = json.JSONDecoder()
_STACKABLE = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Box)
_GRAPHIC = frozenset(map(chr, range(33, 127)))

Cells = np.ndarray[Any, np.dtype[Any]]


class UnsupportedSpace(ValueError):
    """A space without a text form."""


class _ParseError(ValueError):
    """The text is not a value of the space."""


def require_text_form(space: gym.Space[Any], what: str) -> None:
    """Raise UnsupportedSpace, one line beginning with `what`, if the space has no text form."""
    count = _count(space, what)
    if count > MAX_NUMBERS:
        raise UnsupportedSpace(
            f"{what} of {count} numbers have no text form (at most {MAX_NUMBERS} are written); "
            "reduce them in a wrapper"
        )


def to_text(space: gym.Space[Any], value: Any, digits: int = DIGITS) -> str:
    """Write a value as text. ValueError for an array of the wrong shape."""
    return str(value) if isinstance(space, spaces.Text) else _write(space, value, digits)


def from_text(space: gym.Space[Any], text: str) -> Any:
    """Parse a value of the space; None if the text is not one. Never raises."""
    if isinstance(space, spaces.Text):
        return text if space.contains(text) else None
    reader = _Reader(text.strip())
    try:
        value = reader.value(space)
        reader.end()
    except _ParseError:
        return None
    return value if space.contains(value) else None


def action_format(space: gym.Space[Any]) -> str:
    """One line for the agent that describes what an action looks like."""
    if isinstance(space, spaces.Discrete):
        return f"Answer with one {_form(space)} and nothing else."
    if isinstance(space, spaces.Text):
        return f"Answer with {_characters(space)}."
    drawn = deepcopy(space)
    drawn.seed(0)
    return (
        f"Answer with {_form(space)} and nothing else, for example {to_text(space, drawn.sample(), digits=2)}"
    )


def _count(space: gym.Space[Any], what: str) -> int:
    """The number of numbers in a value; items of a Sequence count once."""
    match space:
        case spaces.Discrete():
            return 1
        case spaces.Text():
            return 0
        case spaces.Box() if space.dtype.kind == "f" and space.dtype.itemsize > 8:
            raise UnsupportedSpace(f"{what} of {space.dtype} have no text form; use float64")
        case spaces.Box() | spaces.MultiBinary() | spaces.MultiDiscrete():
            return int(np.prod(space.shape, dtype=np.int64))
        case spaces.Tuple():
            return sum(_count(part, what) for part in space.spaces)
        case spaces.Dict():
            if not all(isinstance(key, str) for key in space.spaces):
                raise UnsupportedSpace(f"{what} of Dict have a text form only if every key is text")
            return sum(_count(part, what) for part in space.spaces.values())
        case spaces.Sequence():
            inner = space.feature_space
            if space.stack and not isinstance(inner, _STACKABLE):
                raise UnsupportedSpace(
                    f"{what} of stacked sequences of {type(inner).__name__} have no text form; use stack=False"
                )
            return _count(inner, what)
    raise UnsupportedSpace(
        f"{what} of {type(space).__name__} have no text form; Discrete, MultiDiscrete, MultiBinary, Box, Text, "
        "Tuple, Dict and Sequence have"
    )


def _write(space: gym.Space[Any], value: Any, digits: int) -> str:
    match space:
        case spaces.Discrete():
            return str(int(value))
        case spaces.Text():
            return json.dumps(value)
        case spaces.Tuple():
            parts = zip(space.spaces, value, strict=True)
            return f"({', '.join(_write(part, each, digits) for part, each in parts)})"
        case spaces.Dict():
            named = space.spaces.items()
            texts = (f"{json.dumps(key)}: {_write(part, value[key], digits)}" for key, part in named)
            return f"{{{', '.join(texts)}}}"
        case spaces.Sequence():
            items = iterate(space.stacked_feature_space, value) if space.stack else value
            return f"[{', '.join(_write(space.feature_space, item, digits) for item in items)}]"
    array = np.asarray(value)
    if array.shape != space.shape:
        raise ValueError(f"expected an array of shape {space.shape}, got {array.shape}")
    if _is_whole(space):
        return _nested((str(int(cell)) for cell in array.ravel()), array.shape)
    cells = zip(array.ravel(), *_bounds(space), strict=True)
    return _nested((_float(float(cell), low, high, digits) for cell, low, high in cells), array.shape)


def _nested(cells: Iterator[str], shape: tuple[int, ...]) -> str:
    """Take cells from the iterator and put them into nested brackets of this shape."""
    if not shape:
        return next(cells)
    return f"[{', '.join(_nested(cells, shape[1:]) for _ in range(shape[0]))}]"


def _float(value: float, low: Any, high: Any, digits: int) -> str:
    text = f"{value:.{digits}g}"
    with np.errstate(over="ignore"):
        rounded = low.dtype.type(text)
    if low <= value <= high and not low <= rounded <= high:
        text = repr(value)
    return "0" if text == "-0" else text


class _Reader:
    """A cursor over a text, from which values are parsed one after another. Raises _ParseError."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def value(self, space: gym.Space[Any]) -> Any:
        """Parse a value of a space. Discrete values may be out of range: check `space.contains`."""
        match space:
            case spaces.Discrete():
                return int(self._match(_WHOLE))
            case spaces.Text():
                return self._string()
            case spaces.Tuple():
                return tuple(self._list("()", (partial(self.value, part) for part in space.spaces)))
            case spaces.Dict():
                return dict(
                    self._list("{}", (partial(self._entry, key, part) for key, part in space.spaces.items()))
                )
            case spaces.Sequence():
                return self._sequence(space)
        return self._array(space)

    def end(self) -> None:
        """Require the end of the text."""
        self._blank()
        if self._position != len(self._text):
            raise _ParseError

    def _array(self, space: gym.Space[Any]) -> Cells:
        pattern, number = (_WHOLE, int) if _is_whole(space) else (_NUMBER, float)
        cells: list[Any] = []
        assert space.shape is not None
        self._cells(space.shape, lambda: cells.append(number(self._match(pattern))))
        low, high = _bounds(space)
        if _is_whole(space):
            # Compared as Python integers, which may not fit the dtype.
            if not all(
                int(least) <= cell <= int(most) for cell, least, most in zip(cells, low, high, strict=True)
            ):
                raise _ParseError
            return np.array(cells, dtype=space.dtype).reshape(space.shape)
        with np.errstate(over="ignore"):
            array = np.array(cells, dtype=np.float64).astype(space.dtype).reshape(space.shape)
        if not np.isfinite(array).all():
            raise _ParseError
        return array

    def _cells(self, shape: tuple[int, ...], read: Callable[[], None]) -> None:
        if shape:
            self._list("[]", [partial(self._cells, shape[1:], read)] * shape[0])
        else:
            read()

    def _sequence(self, space: spaces.Sequence) -> Any:
        inner = space.feature_space
        items = self._list("[]", self._until("]", partial(self.value, inner)))
        if not space.stack:
            return tuple(items)
        if not all(inner.contains(item) for item in items):
            raise _ParseError
        empty: Any = create_empty_array(inner, len(items))
        return concatenate(inner, items, empty) if items else empty

    def _until(self, closing: str, read: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
        while not self._at(closing):
            yield read

    def _list(self, brackets: str, items: Iterable[Callable[[], Any]]) -> list[Any]:
        """Parse a comma-separated list of `items` in brackets."""
        self._take(brackets[0])
        values: list[Any] = []
        for item in items:
            if values:
                self._take(",")
            values.append(item())
        self._take(brackets[1])
        return values

    def _entry(self, key: str, space: gym.Space[Any]) -> tuple[str, Any]:
        if self._string() != key:
            raise _ParseError
        self._take(":")
        return key, self.value(space)

    def _string(self) -> str:
        if not self._at('"'):
            raise _ParseError
        try:
            value, self._position = _JSON.raw_decode(self._text, self._position)
        except json.JSONDecodeError:
            raise _ParseError from None
        return str(value)

    def _match(self, pattern: re.Pattern[str]) -> str:
        self._blank()
        found = pattern.match(self._text, self._position)
        if found is None:
            raise _ParseError
        self._position = found.end()
        return found.group()

    def _take(self, token: str) -> None:
        if not self._at(token):
            raise _ParseError
        self._position += len(token)

    def _at(self, token: str) -> bool:
        self._blank()
        return self._text.startswith(token, self._position)

    def _blank(self) -> None:
        found = _BLANK.match(self._text, self._position)
        assert found is not None
        self._position = found.end()


def _form(space: gym.Space[Any]) -> str:
    """The form of a value, in words and with the brackets it is written in."""
    match space:
        case spaces.Discrete():
            return f"whole number from {int(space.start)} to {int(space.start) + int(space.n) - 1}"
        case spaces.Text():
            return f"text of {_characters(space)} in double quotes"
        case spaces.Tuple():
            return f"({', '.join(map(_form, space.spaces))})"
        case spaces.Dict():
            return (
                f"{{{', '.join(f'{json.dumps(key)}: {_form(part)}' for key, part in space.spaces.items())}}}"
            )
        case spaces.Sequence():
            return f"[any number of times: {_form(space.feature_space)}]"
    assert space.shape is not None
    kind = "whole number" if _is_whole(space) else "number"
    cells = [f"{kind}{limits}" for limits in _limits(space)]
    if len(set(cells)) > 1:
        return _nested(iter(cells), space.shape)
    form = cells[0] if cells else ""
    for axis in reversed(space.shape):
        form = f"[{form}]" if axis == 1 or not form else f"[{axis} times {form}]"
    return form


def _limits(space: gym.Space[Any]) -> Iterator[str]:
    low, high = _bounds(space)
    always = np.ones(len(low), dtype=bool)
    below, above = always, always
    if isinstance(space, spaces.Box):
        below, above = space.bounded_below.ravel(), space.bounded_above.ravel()
    for least, most, has_least, has_most in zip(low, high, below, above, strict=True):
        match bool(has_least), bool(has_most):
            case True, True:
                yield f" from {least} to {most}"
            case True, False:
                yield f" of at least {least}"
            case False, True:
                yield f" of at most {most}"
            case _:
                yield ""


def _characters(space: spaces.Text) -> str:
    least, most = space.min_length, space.max_length
    length = f"at most {most}" if least == 0 else str(most) if least == most else f"{least} to {most}"
    if space.character_set >= _GRAPHIC:
        return f"{length} characters"
    return f"{length} characters of {' '.join(_runs(sorted(space.character_set)))}"


def _runs(characters: Iterable[str]) -> Iterator[str]:
    """Consecutive characters as ranges "a-z", others one by one; non-graphic ones as Python escapes."""
    runs: list[list[str]] = []
    for character in characters:
        if runs and ord(runs[-1][-1]) + 1 == ord(character):
            runs[-1].append(character)
        else:
            runs.append([character])
    for run in runs:
        shown = [each if each in _GRAPHIC else ascii(each) for each in run]
        if len(run) > 2:
            yield f"{shown[0]}-{shown[-1]}"
        else:
            yield from shown


def _is_whole(space: gym.Space[Any]) -> bool:
    return np.dtype(space.dtype).kind != "f"


def _bounds(space: gym.Space[Any]) -> tuple[Cells, Cells]:
    """Lower and upper bound (inclusive) of every number of an array, flattened."""
    match space:
        case spaces.MultiDiscrete():
            return space.start.ravel(), (space.start + (space.nvec - 1)).ravel()
        case spaces.MultiBinary():
            zeros = np.zeros(space.shape, dtype=np.int8).ravel()
            return zeros, zeros + 1
    assert isinstance(space, spaces.Box)
    return space.low.ravel(), space.high.ravel()
