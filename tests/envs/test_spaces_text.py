"""Spaces as text: written values parse back, parsed values lie in the space, and nothing else is parsed."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import example, given
from hypothesis import strategies as st

from envs.spaces_text import UnsupportedSpace, action_format, from_text, require_text_form, to_text

# Gymnasium's own: it asks a scalar of a stacked sequence whether it lies in a box.
pytestmark = pytest.mark.filterwarnings("ignore:.*Casting input x to numpy array")

INTEGERS = (np.int8, np.uint8, np.int32, np.int64, np.uint64)
FLOATS = (np.float16, np.float32, np.float64)
SHAPES = st.sampled_from([(), (0,), (1,), (3,), (2, 2), (1, 0, 2)])


@st.composite
def discretes(draw: st.DrawFn) -> spaces.Discrete:
    return spaces.Discrete(draw(st.integers(1, 200)), start=draw(st.integers(-(2**62), 2**62)))


@st.composite
def multi_discretes(draw: st.DrawFn) -> spaces.MultiDiscrete:
    shape = draw(SHAPES.filter(bool))
    return spaces.MultiDiscrete(
        np.full(shape, draw(st.integers(1, 20))), start=np.full(shape, draw(st.integers(-9, 9)))
    )


@st.composite
def boxes(draw: st.DrawFn) -> spaces.Box:
    shape, dtype = draw(SHAPES), np.dtype(draw(st.sampled_from([*INTEGERS, *FLOATS, np.bool_])))
    if dtype.kind == "b":
        return spaces.Box(0, 1, shape, np.bool_)
    if dtype.kind == "f":
        width = 8 * dtype.itemsize
        finite = st.floats(allow_nan=False, allow_infinity=False, width=width, max_value=1e4, min_value=-1e4)
        low, high = sorted((draw(finite), draw(finite)))
        low, high = draw(st.sampled_from([(low, high), (-np.inf, high), (low, np.inf), (-np.inf, np.inf)]))
    else:
        # Gymnasium draws whole numbers by way of floats: far larger ones may lie outside of their own space.
        info = np.iinfo(dtype)
        numbers = st.integers(max(info.min, -(2**40)), min(info.max, 2**40))
        low, high = sorted(draw(st.lists(numbers, min_size=2, max_size=2)))
        return spaces.Box(np.full(shape, low, dtype), np.full(shape, high, dtype), dtype=dtype)
    return spaces.Box(low, high, shape, dtype)


TEXTS = st.builds(
    spaces.Text,
    st.integers(2, 6),
    min_length=st.integers(0, 2),
    charset=st.sampled_from(["ab", '"\\,]}\n é', "0-9"]),
)
BINARIES = st.sampled_from([(1,), (3,), (2, 2)]).map(spaces.MultiBinary)
PLAIN = st.one_of(discretes(), multi_discretes(), boxes(), TEXTS, BINARIES)
NESTED = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(spaces.Tuple),
        st.dictionaries(st.text(max_size=4), inner, max_size=3).map(spaces.Dict),
        inner.map(spaces.Sequence),
        st.one_of(discretes(), boxes()).map(lambda space: spaces.Sequence(space, stack=True)),
    ),
    max_leaves=4,
)


def same(one: Any, other: Any, digits: int) -> bool:
    """Equal in kind, shape and dtype, whole numbers and texts to the last, floats to so many digits."""
    if isinstance(one, tuple):
        return (
            isinstance(other, tuple)
            and len(one) == len(other)
            and all(map(same, one, other, [digits] * len(one)))
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], digits) for key in one)
    if isinstance(one, np.ndarray) and one.dtype.kind == "f":
        assert isinstance(other, np.ndarray)
        near = 0.51 * 10.0 ** (1 - digits) + 2 * np.finfo(one.dtype).eps
        tiny = float(np.finfo(one.dtype).tiny)  # below it a dtype has fewer digits of its own
        return one.dtype == other.dtype and np.allclose(
            other.astype(np.float64), one.astype(np.float64), rtol=near, atol=tiny
        )
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


@given(NESTED, st.integers(0, 2**31), st.integers(1, 17))
def test_what_is_written_reads_back(space: gym.Space[Any], seed: int, digits: int) -> None:
    space.seed(seed)
    value = space.sample()
    text = to_text(space, value, digits)
    back = from_text(space, text)
    assert back is not None, text
    assert space.contains(back)
    assert same(value, back, digits), (value, text, back)


@given(NESTED, st.text())
@example(spaces.Box(-np.inf, np.inf, (1,)), "[inf]")
@example(spaces.Box(-np.inf, np.inf, (1,)), "[1e999]")
@example(spaces.Sequence(spaces.Discrete(3), stack=True), f"[{'9' * 20}]")
@example(spaces.Text(3), "[" * 100_000)
@example(spaces.Sequence(spaces.Discrete(3)), "[" * 100_000)
def test_any_text_is_a_value_of_the_space_or_none(space: gym.Space[Any], text: str) -> None:
    value = from_text(space, text)
    assert value is None or space.contains(value)


@given(NESTED, st.integers(0, 2**31), st.data())
def test_no_broken_text_leaves_the_space(space: gym.Space[Any], seed: int, data: st.DataObject) -> None:
    space.seed(seed)
    text = to_text(space, space.sample())
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    put = data.draw(st.sampled_from(["", "9", "-", ",", "]", '"', "e9", "\u0663", " ", "nan", "0" * 50]))
    value = from_text(space, text[:start] + put + text[end:])
    assert value is None or space.contains(value)


HAND = spaces.Dict(
    {"goal": spaces.Discrete(3, start=-1), "hand": spaces.MultiBinary(2), "say": spaces.Text(3)}
)
PAIR = spaces.MultiDiscrete([3, 3])
BOX = spaces.Box(-1, 1, (2,))
REFUSED = [
    (PAIR, ["0, 1", "[0, 1", "[0]", "[0, 1, 2]", "[0, 3]", "[0, -1]", "[0 1]", "[0, 1,]", "[, 0, 1]"]),
    (PAIR, ["[0.0, 1]", "[0, 1] [0, 1]", "[\u0660, 1]", "[0,\u00a01]", f"[0, {'1' * 5000}]", "[[0, 1]]"]),
    (spaces.MultiBinary(2), ["[0, 2]", "[true, 0]", "01"]),
    (BOX, ["[0, 1.01]", "[0, nan]", "[0, inf]", "[0, 1e999]", "[0, .5]", "[0, 5.]", "[0, +1]", "[0, 0x1]"]),
    (BOX, ["[0, 1_0]", f"[0, 0.{'0' * 60}]", "[0, 1e0001]", "0 0", "[(0), 0]"]),
    (spaces.Box(0, 255, (1,), np.uint8), ["[256]", "[-1]", "[1.0]", "[1e1]"]),
    (spaces.Box(-1, 1, ()), ["[0]", "", "-", "--0"]),
    (spaces.Tuple([spaces.Discrete(2)]), ["(0,)", "0", "[0]", "(2)", "()"]),
    (HAND, ['{"hand": [0, 1], "goal": 0, "say": "a"}', '{"goal": 0, "hand": [0, 1]}']),
    (HAND, ["{'goal': 0, 'hand': [0, 1], 'say': 'a'}", '{"goal": 2, "hand": [0, 1], "say": "a"}']),
    (HAND, ['{"goal": 0, "hand": [0, 1], "say": "abcd"}', '{"goal": 0, "hand": [0, 1], "say": a}']),
    (spaces.Sequence(spaces.Discrete(2)), ["[2]", "(0, 1)", "[0,, 1]", "[,]", "0"]),
]


@pytest.mark.parametrize(("space", "text"), [(space, text) for space, texts in REFUSED for text in texts])
def test_what_is_not_the_grammar_is_refused(space: gym.Space[Any], text: str) -> None:
    assert from_text(space, text) is None


def test_white_space_between_parts_is_none_of_the_value() -> None:
    assert from_text(HAND, '\n{ "goal" :-1,"hand": [ 0,1 ] , "say":"abc"}\t') is not None
    assert from_text(spaces.Text(3, charset="a "), " a") == " a"


def test_a_float_is_written_inside_of_its_bounds() -> None:
    space = spaces.Box(np.float64(-0.12345), np.float64(0.12395), (1,), np.float64)
    edge = np.array([0.12394])
    assert to_text(space, edge, digits=2) == "[0.12]"
    assert to_text(space, edge, digits=3) == "[0.12394]", "rounded it would be 0.124"


def test_what_an_environment_says_outside_of_its_space_is_still_written() -> None:
    space = spaces.Box(-1, 1, (3,))
    assert to_text(space, np.array([math.nan, math.inf, -7.0])) == "[nan, inf, -7]"
    assert to_text(space, [0.1, -1e-9, -0.0]) == "[0.1, -1e-09, 0]"
    with pytest.raises(ValueError, match="shape"):
        to_text(space, np.zeros(2))


@pytest.mark.parametrize(
    ("space", "line"),
    [
        (spaces.Discrete(4), "Answer with one whole number from 0 to 3 and nothing else."),
        (
            spaces.Text(9, min_length=0, charset="".join(map(chr, range(32, 127)))),
            "Answer with at most 9 characters.",
        ),
        (spaces.Text(9), "Answer with 1 to 9 characters of 0-9 A-Z a-z."),
        (
            spaces.MultiBinary(3),
            "Answer with [3 times whole number from 0 to 1] and nothing else, for example [0, 1, 1]",
        ),
        (
            spaces.Box(-2, 2, (1,)),
            "Answer with [number from -2.0 to 2.0] and nothing else, for example [0.55]",
        ),
    ],
)
def test_the_grammar_is_one_line(space: gym.Space[Any], line: str) -> None:
    assert action_format(space) == line


@given(NESTED)
def test_the_grammars_example_is_an_action(space: gym.Space[Any]) -> None:
    line = action_format(space)
    assert "\n" not in line
    if "for example " in line:
        assert from_text(space, line.split("for example ")[1]) is not None


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (spaces.Box(0, 255, (8, 9), np.uint8), "observations of 72 numbers .* 64"),
        (spaces.Graph(spaces.Discrete(2), None), "observations of Graph .*Tuple, Dict"),
        (spaces.Tuple([spaces.OneOf([spaces.Discrete(2)])]), "observations of OneOf"),
        (spaces.Dict([(1, spaces.Discrete(2))]), "every key is text"),
        (spaces.Sequence(spaces.Tuple([spaces.Discrete(2)]), stack=True), "stack=False"),
        (spaces.Box(0, 1, (1,), np.longdouble), "float64"),
    ],
)
def test_a_space_without_a_text_form_is_named_in_one_line(space: gym.Space[Any], says: str) -> None:
    with pytest.raises(UnsupportedSpace, match=says) as refused:
        require_text_form(space, "observations")
    assert "\n" not in str(refused.value)
