"""Tool calls out of text: both forms against examples by hand, and against whatever hypothesis can write."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.tools.tool_calls import CLOSE, OPEN, BadCall, Call, Fault, Style, parse_calls, write_call

STYLES: tuple[Style, ...] = ("hermes", "plain")
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True)
# Text made of what the forms are made of finds more than text of any characters.
pieces = [
    OPEN,
    CLOSE,
    '{"name": "f", "arguments": {}}',
    '{"name"',
    "{",
    "}",
    "[",
    '"',
    "\\",
    "f(",
    ")",
    ",",
    "\n",
]
texts = st.lists(st.sampled_from(pieces) | st.text(max_size=5), max_size=30).map("".join)


def hermes(body: str) -> list[Call | BadCall]:
    return parse_calls(f"{OPEN}{body}{CLOSE}")[1]


def test_text_and_calls_are_told_apart() -> None:
    said = (
        'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"place": "arlen", "day": 3}}\n</tool_call>\n'
        '<tool_call>{"arguments": {"deep": [{"x": "}"}]}, "name": "f"}</tool_call> Well.'
    )
    text, calls = parse_calls(said)
    assert text == "Let me look.\n\n Well."
    assert calls == [Call("weather", {"place": "arlen", "day": 3}), Call("f", {"deep": [{"x": "}"}]})]
    assert parse_calls("weather(arlen, 3)") == ("weather(arlen, 3)", [])


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("", Fault.INVALID_JSON),
        ('{"name": "f", "arguments": {}} {}', Fault.INVALID_JSON),
        ('{"name": "f", "arguments": {"x": NaN}}', Fault.INVALID_JSON),
        ('{"name": "f", "arguments": {"x": 1e999}}', Fault.INVALID_JSON),
        ('{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", Fault.INVALID_JSON),
        ('{"name": "f", "arguments": ' + '{"x":' * 100_000 + "1" + "}" * 100_000 + "}", Fault.INVALID_JSON),
        ('<tool_call>{"name": "f", "arguments": {}}', Fault.INVALID_JSON),
        ('["f", {}]', Fault.NOT_AN_OBJECT),
        ("3", Fault.NOT_AN_OBJECT),
        ('{"arguments": {}}', Fault.NO_NAME),
        ('{"name": "", "arguments": {}}', Fault.NO_NAME),
        ('{"name": ["f"], "arguments": {}}', Fault.NO_NAME),
        ('{"name": "f"}', Fault.BAD_ARGUMENTS),
        ('{"name": "f", "arguments": "{}"}', Fault.BAD_ARGUMENTS),
    ],
)
def test_a_call_that_is_none_has_one_reason(body: str, why: Fault) -> None:
    assert hermes(body) == [BadCall(body, why)]


def test_an_unclosed_call_takes_the_rest() -> None:
    text, calls = parse_calls('before <tool_call>{"name": "f", "arguments": {}}')
    assert (text, calls) == ("before", [BadCall('{"name": "f", "arguments": {}}', Fault.UNCLOSED)])


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("f()", []),
        ("f( )", []),
        ("  f(arlen, 3) ", ["arlen", 3]),
        ("f(may 12,-2.5,1e3 , true,null)", ["may 12", -2.5, 1000.0, True, None]),
        ("f((3 + 4) * 2)", ["(3 + 4) * 2"]),
        ('f("3", "a, b", "c)")', ["3", "a, b", "c)"]),
        ("f(03, 1_0, +1, NaN, tool(x))", ["03", "1_0", "+1", "NaN", "tool(x)"]),
    ],
)
def test_a_plain_line_is_a_call_with_values_by_place(line: str, values: list[Any]) -> None:
    expected = Call("f", {str(place): value for place, value in enumerate(values, start=1)})
    assert parse_calls(f"well\n{line}\nthen", "plain") == ("well\nthen", [expected])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("f(x", Fault.UNCLOSED),
        ("f(x) = 3", Fault.UNCLOSED),
        ("f(,)", Fault.BAD_ARGUMENTS),
        ("f(a,)", Fault.BAD_ARGUMENTS),
        ('f("a)', Fault.BAD_ARGUMENTS),
        ('f("a" b)', Fault.BAD_ARGUMENTS),
        ('f(a "b")', Fault.BAD_ARGUMENTS),
        ("f(1e999)", Fault.BAD_ARGUMENTS),
        ("f(" + "9" * 5000 + ")", Fault.BAD_ARGUMENTS),
    ],
)
def test_a_plain_line_that_begins_as_a_call_is_one_or_has_a_reason(line: str, why: Fault) -> None:
    assert parse_calls(line, "plain") == ("", [BadCall(line, why)])


@pytest.mark.parametrize("line", ["", "14", "arlen", "f (x)", "the f(x)", "3(x)", "(x)"])
def test_other_plain_lines_are_text(line: str) -> None:
    assert parse_calls(line, "plain") == (line, [])


@given(st.text(min_size=1), st.dictionaries(st.text(), documents, max_size=4), texts)
def test_what_is_written_in_hermes_form_is_read_back(
    name: str, arguments: dict[str, Any], after: str
) -> None:
    call = Call(name, arguments)
    assert parse_calls(f"so {write_call(call)} then") == ("so  then", [call])
    assert parse_calls(write_call(call) + after)[1][0] == call


@given(names, st.lists(scalars, max_size=4))
def test_what_is_written_in_plain_form_is_read_back(name: str, values: list[Any]) -> None:
    call = Call(name, {str(place): value for place, value in enumerate(values, start=1)})
    text, read = parse_calls(f"so\n{write_call(call, 'plain')}\nthen", "plain")
    assert (text, repr(read)) == ("so\nthen", repr([call])), "types and signs of zero included"


@given(texts, st.sampled_from(STYLES))
def test_nothing_raises_and_a_bad_call_is_a_piece_of_the_text(text: str, style: Style) -> None:
    outside, calls = parse_calls(text, style)
    assert len(outside) <= len(text)
    for call in calls:
        assert call.text in text if isinstance(call, BadCall) else call.name
    again = parse_calls(outside, "hermes" if style == "hermes" else "plain")[1]
    assert style == "hermes" or again == [], "no plain call is left in the text outside"


@pytest.mark.parametrize(
    "piece", [OPEN, CLOSE, '{"a":', "[", '"', "\\", "f(", "f(,", 'f("', "\n", "f(a)\n", ",a"]
)
@pytest.mark.parametrize("style", STYLES)
def test_a_long_text_of_anything_is_read_in_time(piece: str, style: Style) -> None:
    many = piece * (100_000 // len(piece))
    for text in (
        many,
        f"{OPEN}{many}{CLOSE}",
        f"{OPEN}{many}",
        f"f({many})",
        f"{OPEN}{json.dumps(many)}{CLOSE}",
    ):
        parse_calls(text, style)  # were it quadratic, the suite's limit on a test's time would end it


@pytest.mark.parametrize(
    ("call", "style"),
    [
        (Call("f", {"x": float("nan")}), "hermes"),
        (Call("f", {"x": float("inf")}), "plain"),
        (Call("f", {"x": [1]}), "plain"),
        (Call("a b", {}), "plain"),
    ],
)
def test_what_has_no_form_is_refused(call: Call, style: Style) -> None:
    with pytest.raises(ValueError):
        write_call(call, style)
