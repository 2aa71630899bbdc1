"""Rewards that compare what was said with the right answer: pure functions (completion, truth) -> number in [0, 1].

The truth is a text, a number, or a list of which each is right.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any

_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d+)?"
)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LETTER = re.compile(r"(?<![A-Za-z0-9])\(?([A-Z])\)?(?![A-Za-z0-9])")
_SAID = re.compile(r"answer\s*(?:is|:)?\s*\**\(?([A-Za-z])\)?(?![A-Za-z0-9])", re.IGNORECASE)


def exact(completion: str, truth: Any, *, ignore_case: bool = True) -> float:
    """1 where the answer is the right one, apart from spaces around and between its words."""
    said = _plain(answer_in(completion), ignore_case)
    return float(any(said == _plain(str(each), ignore_case) for each in several(truth)))


def contains(completion: str, truth: Any, *, ignore_case: bool = True) -> float:
    """1 where the right answer stands in what was said, as whole words."""
    said = _plain(completion, ignore_case)
    wanted = (re.escape(_plain(str(each), ignore_case)) for each in several(truth))
    return float(any(each and re.search(rf"(?<!\w){each}(?!\w)", said) for each in wanted))


def number(completion: str, truth: Any, *, tolerance: float = 0.0) -> float:
    """1 where the last number said is the last number of the truth (GSM8K's "... #### 42"), within a tolerance."""
    said = last_number(answer_in(completion))
    wanted = (last_number(str(each)) for each in several(truth))
    if said is None:
        return 0.0
    return float(any(each is not None and abs(said - each) <= Decimal(str(tolerance)) for each in wanted))


def choice(completion: str, truth: Any) -> float:
    """1 where the letter that was chosen is the right one: what "the answer is" names, else the last letter alone."""
    right = {_LETTER.search(str(each).strip().upper()) for each in several(truth)}
    return float(chosen_letter(completion) in {each[1] for each in right if each})


def regex(completion: str, truth: Any, *, pattern: str | None = None) -> float:
    """1 where a pattern matches: the option's, else the row's answer. Its group 1 is compared with the truth."""
    if pattern is None:
        return float(any(re.search(str(each), completion) is not None for each in several(truth)))
    found = re.search(pattern, completion)
    if found is None or not found.re.groups or truth is None:
        return float(found is not None)
    return exact(found[1] or "", truth)


def answer_in(completion: str) -> str:
    """What stands in the last <answer>...</answer>; the whole of it where there is none."""
    tagged = _TAGGED.findall(completion)
    return str(tagged[-1] if tagged else completion).strip()


def plain_answer(completion: str) -> str:
    """The answer in a text, without case and with single spaces between words."""
    return _plain(answer_in(completion), ignore_case=True)


def chosen_letter(completion: str) -> str | None:
    """The letter that was chosen, as a capital: what "the answer is" names, else the last letter that stands alone."""
    text = answer_in(completion)
    named = _SAID.findall(text) or _LETTER.findall(text)
    return str(named[-1]).upper() if named else None


def last_number(text: str) -> Decimal | None:
    """The last decimal number of a text, as it is written; commas between thousands belong to it."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def _plain(text: str, ignore_case: bool) -> str:
    joined = " ".join(text.split())
    return joined.casefold() if ignore_case else joined


def several(truth: Any) -> list[Any]:
    """The answers that are right. A list in JSON, as tables hold it, is one."""
    if isinstance(truth, str) and truth.startswith("["):
        try:
            held = json.loads(truth)
        except json.JSONDecodeError:
            return [truth]
        return held if isinstance(held, list) else [truth]
    return truth if isinstance(truth, list) else [] if truth is None else [truth]
