"""Gymnasium's spaces as text: how a value is written, how an action is described, and how one is read.

    Discrete                     3
    MultiDiscrete, MultiBinary   [3, 0, 1]; brackets in brackets where there are several axes
    Box                          [0.12, -3.1e-05]; the number alone where the box has no axis
    Text                         as it is; inside of another space in double quotes, escaped as in JSON
    Tuple                        (3, [0, 1])
    Dict                         {"goal": 3, "hand": [0, 1]}, in the order of the space
    Sequence                     [3, 1, 4, 1]

Reading is strict: one value of the space and nothing else, with white space between its parts only. Numbers are
decimal, in ASCII digits, finite, within their bounds and as many as the space has. A value that is written and read
again is the same value; of floats a stated number of significant digits is kept.
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

DIGITS = 4  # significant ones of a float
MAX_DIGITS = 17  # tell every float64 from its neighbours
MAX_NUMBERS = 64  # in one value: pictures are no text

# No longer than the numbers of a dtype: of thousands of digits int() and float() make errors of their own.
_WHOLE = re.compile(r"-?[0-9]{1,20}")
_NUMBER = re.compile(r"-?[0-9]{1,40}(?:\.[0-9]{1,40})?(?:[eE][+-]?[0-9]{1,3})?")
_BLANK = re.compile(r"[ \t\r\n]*")
_JSON = json.JSONDecoder()
_STACKABLE = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Box)
_GRAPHIC = frozenset(map(chr, range(33, 127)))

Cells = np.ndarray[Any, np.dtype[Any]]


class UnsupportedSpace(ValueError):
    """A space that has no text form here."""


class _NotAnAction(ValueError):
    """The text is not what the space writes."""


def require_text_form(space: gym.Space[Any], what: str) -> None:
    """UnsupportedSpace, one line that begins with `what`, for a space that has no text form."""
    count = _count(space, what)
    if count > MAX_NUMBERS:
        raise UnsupportedSpace(
            f"{what} of {count} numbers have no text form: {MAX_NUMBERS} are the most that are written; "
            "leave some away in a wrapper"
        )


def written(space: gym.Space[Any], value: Any, digits: int = DIGITS) -> str:
    """A value as text. ValueError for an array of another shape than the space's."""
    return str(value) if isinstance(space, spaces.Text) else _write(space, value, digits)


def parsed(space: gym.Space[Any], text: str) -> Any:
    """The value of the space that a text stands for; None where it stands for none. Never raises."""
    if isinstance(space, spaces.Text):
        return text if space.contains(text) else None
    reader = _Reader(text.strip())
    try:
        value = reader.value(space)
        reader.end()
    except _NotAnAction:
        return None
    return value if space.contains(value) else None


def grammar(space: gym.Space[Any]) -> str:
    """What an action must look like: one line for the agent."""
    if isinstance(space, spaces.Discrete):
        return f"Answer with one {_form(space)} and nothing else."
    if isinstance(space, spaces.Text):
        return f"Answer with {_characters(space)}."
    drawn = deepcopy(space)
    drawn.seed(0)
    return (
        f"Answer with {_form(space)} and nothing else, for example {written(space, drawn.sample(), digits=2)}"
    )


def _count(space: gym.Space[Any], what: str) -> int:
    """The numbers of one value; those of a Sequence's items are counted once."""
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
                raise UnsupportedSpace(f"{what} of Dict have a text form only where every key is text")
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
        raise ValueError(f"an array of shape {array.shape} is no value of a space of shape {space.shape}")
    if _is_whole(space):
        return _nested((str(int(cell)) for cell in array.ravel()), array.shape)
    cells = zip(array.ravel(), *_bounds(space), strict=True)
    return _nested((_float(float(cell), low, high, digits) for cell, low, high in cells), array.shape)


def _nested(cells: Iterator[str], shape: tuple[int, ...]) -> str:
    """The next cells in brackets, as many as `shape` takes."""
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
    """A place in a text, from which values are read one after another. Raises _NotAnAction."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._place = 0

    def value(self, space: gym.Space[Any]) -> Any:
        """The value of a space at this place. Its whole numbers may lie outside of it: ask `space.contains`."""
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
        """There is nothing more."""
        self._blank()
        if self._place != len(self._text):
            raise _NotAnAction

    def _array(self, space: gym.Space[Any]) -> Cells:
        pattern, number = (_WHOLE, int) if _is_whole(space) else (_NUMBER, float)
        cells: list[Any] = []
        assert space.shape is not None
        self._cells(space.shape, lambda: cells.append(number(self._match(pattern))))
        low, high = _bounds(space)
        if _is_whole(space):
            # As Python's integers: the dtype may hold none of these.
            if not all(
                int(least) <= cell <= int(most) for cell, least, most in zip(cells, low, high, strict=True)
            ):
                raise _NotAnAction
            return np.array(cells, dtype=space.dtype).reshape(space.shape)
        with np.errstate(over="ignore"):
            array = np.array(cells, dtype=np.float64).astype(space.dtype).reshape(space.shape)
        if not np.isfinite(array).all():
            raise _NotAnAction
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
            raise _NotAnAction
        empty: Any = create_empty_array(inner, len(items))
        return concatenate(inner, items, empty) if items else empty

    def _until(self, closing: str, read: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
        while not self._at(closing):
            yield read

    def _list(self, brackets: str, items: Iterable[Callable[[], Any]]) -> list[Any]:
        """What `items` read one after another, between brackets and with commas in between."""
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
            raise _NotAnAction
        self._take(":")
        return key, self.value(space)

    def _string(self) -> str:
        if not self._at('"'):
            raise _NotAnAction
        try:
            value, self._place = _JSON.raw_decode(self._text, self._place)
        except json.JSONDecodeError:
            raise _NotAnAction from None
        return str(value)

    def _match(self, pattern: re.Pattern[str]) -> str:
        self._blank()
        found = pattern.match(self._text, self._place)
        if found is None:
            raise _NotAnAction
        self._place = found.end()
        return found.group()

    def _take(self, token: str) -> None:
        if not self._at(token):
            raise _NotAnAction
        self._place += len(token)

    def _at(self, token: str) -> bool:
        self._blank()
        return self._text.startswith(token, self._place)

    def _blank(self) -> None:
        found = _BLANK.match(self._text, self._place)
        assert found is not None
        self._place = found.end()


def _form(space: gym.Space[Any]) -> str:
    """What a value looks like, in words and the brackets it is written with."""
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
    """Neighbours as "a-z", others one by one; what is no graphic character as Python would write it."""
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
    """The least and the greatest value of every number of an array, flat, both included."""
    match space:
        case spaces.MultiDiscrete():
            return space.start.ravel(), (space.start + (space.nvec - 1)).ravel()
        case spaces.MultiBinary():
            zeros = np.zeros(space.shape, dtype=np.int8).ravel()
            return zeros, zeros + 1
    assert isinstance(space, spaces.Box)
    return space.low.ravel(), space.high.ravel()
