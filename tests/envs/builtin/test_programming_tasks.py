"""The tasks of the programming environment: each solution against a second implementation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import combinations, groupby, pairwise
from typing import Any

import numpy as np
import pytest

from envs.base import Split
from envs.builtin.programming import FAMILIES, LEVELS
from envs.builtin.programming_tasks import ProgrammingTask, draw_inputs, draw_task

A = ord("a")
Expected = Callable[..., Any]


def moved(word: str, places: int) -> str:
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return word.translate(str.maketrans(alphabet, alphabet[places:] + alphabet[:places]))


def prime(n: int) -> bool:
    return n > 1 and not any(n % d == 0 for d in range(2, n))


def digits(n: int, base: int) -> list[int]:
    return [] if n == 0 else [*digits(n // base, base), n % base]


def halved(n: int, steps: int, b: int) -> int:
    return n if steps == 0 else halved([n >> 1, 3 * n + b][n & 1], steps - 1, b)


def coins(n: int, a: int, b: int) -> int:
    return min(x + y + n - a * x - b * y for x in range(n // a + 1) for y in range((n - a * x) // b + 1))


def stretch(numbers: list[int], k: int) -> int:
    spans = [numbers[i:j] for i in range(len(numbers)) for j in range(i + 1, len(numbers) + 1)]
    return max(len(s) for s in spans if all(y - x >= k for x, y in pairwise(s)))


def worth(formula: str, m: int) -> int:
    """By rewriting the text of the formula, from the left, until one value is left."""
    left: list[Any] = list(formula)
    while len(left) > 1:
        at = next(i for i, sign in enumerate(left) if sign in ("+", "*"))
        a, b = int(left[at - 2]), int(left[at - 1])
        left[at - 2 : at + 1] = [(a + b if left[at] == "+" else a * b) % m]
    return int(left[0])


def obeyed(x: int, orders: str, a: int, b: int, c: int, m: int) -> int:
    return reduce(lambda now, order: {"u": now + a, "d": now - b, "m": now * c}[order] % m, orders, x)


SUMMARY = {"sum": sum, "largest": max, "smallest": min, "last": lambda kept: kept[-1]}
TEST = {
    "even": lambda n: not n & 1,
    "odd": lambda n: n & 1,
    "greater": lambda n: n >= 1,
    "less": lambda n: n <= 4,
    "divided": lambda n: n in range(-300, 300, 3),
}
CHANGE = {
    "squared": lambda n: n**2,
    "doubled": lambda n: n + n,
    "made": lambda n: n + 7,
    "subtracted": lambda n: -n + 10,
}
WORD_TEST = {
    "begin": lambda w: ord(w[0]) - A < 4,
    "have": lambda w: len(w) >= 3,
    "hold": lambda w: w.count("e") > 0,
    "letter": lambda w: ord(w[0]) < ord(w[-1]),
}
WORD_CHANGE = {
    "reversed": lambda w: "".join(reversed(w)),
    "twice": lambda w: w + w,
    "without": lambda w: w.removeprefix(w[0]),
    "alphabetical": lambda w: "".join(c * w.count(c) for c in "abcdefghij"),
}
ROW_TEST = {
    "even": lambda r: not sum(r) & 1,
    "hold": lambda r: any(n >= 6 for n in r),
    "begin": lambda r: all(r[0] <= n for n in r),
}


def by(table: dict[str, Any], phrase: str) -> Any:
    """The entry whose key stands in the phrase as a word."""
    words = phrase.replace(",", "").split()
    (found,) = [value for key, value in table.items() if key in words]
    return found


def number_steps(ns: list[int], summary: str, k: int, test: str, change: str) -> int:
    kept = list(map(by(CHANGE, change), filter(by(TEST, test), ns)))
    return (by(SUMMARY, summary)(kept) if kept else 0) * k


# By name of the family: arguments first, then the parameters in the order of their names, quotes and all taken away.
SECOND: dict[str, Expected] = {
    "plus": lambda x, k: sum([x, k]),
    "times": lambda x, k: sum([x] * k),
    "line": lambda x, a, b: b + x * a,
    "power": lambda x, b, k: math.prod([x] * k) + b,
    "remainder": lambda n, k: n - k * (n // k),
    "divides": lambda n, k: n in range(0, 61, k),
    "at_least": lambda x, k: k if x < k else x,
    "between": lambda x, a, b: x in range(a, b + 1),
    "distance": lambda x, k: x - k if x > k else k - x,
    "total": lambda ns, k: reduce(lambda a, b: a + b, ns, k),
    "largest": lambda ns, k: sorted(ns)[-1] * k,
    "repeated": lambda w, end, k: "".join([w] * k + [end]),
    "extended": lambda w, end: f"{w}{end}",
    "cut": lambda w, end, k: "".join([*list(w)[k:], end]),
    "count_letters": lambda w, a, b: w.count(a) + w.count(b),
    "replaced": lambda w, a, b: "".join(b if c == a else c for c in w),
    "without": lambda w, a, b: w.replace(a, "").replace(b, ""),
    "mirrored": lambda w, m: w + m + "".join(reversed(w)),
    "joined": lambda ws, s: reduce(lambda a, b: b + s + a, ws),
    "long_words": lambda ws, b, k: b + len([w for w in ws if len(w) >= k + 1]),
    "each_plus": lambda ns, k: list(map(k.__add__, ns)),
    "those_below": lambda ns, k: list(filter(lambda n: n - k < 0, ns)),
    "count_above": lambda ns, k: len([n for n in ns if n >= k + 1]),
    "sum_divisible": lambda ns, b, k: b + sum(n for n in ns if abs(n) in range(0, 100, k)),
    "product": lambda ns, k: math.prod(ns) % k,
    "digit_sum": lambda n, k: k * sum(digits(n, 10)),
    "common_divisor": lambda n, k: math.gcd(n, k),
    "sequence": lambda n, a, b: reduce(lambda p, _: (p[1], p[0] + p[1]), range(n), (a, b))[0],
    "halving": lambda n, b, k: halved(n, k, b),
    "count_primes": lambda n, a: len([p for p in range(a, n + 1) if prime(p)]),
    "in_base": lambda n, k, m: "".join(map(str, digits(n, k))).zfill(m),
    "rotated": lambda ns, k: [ns[(i + k) % len(ns)] for i in range(len(ns))],
    "shifted": lambda w, k: moved(w, k),
    "runs": lambda w, m: "".join(f"{c}{len(list(run))}{m}" for c, run in groupby(w)),
    "pair": lambda ns, k: any(x + y == k for x, y in combinations(ns, 2)),
    "window": lambda ns, b, k: b + max(sum(run) for run in zip(*(ns[i:] for i in range(k)), strict=False)),
    "remainders": lambda ns, k: sorted({n % k for n in ns}, key=[n % k for n in ns].index),
    "coins": lambda n, a, b: coins(n, a, b),
    "merged": lambda one, two, k: sorted(n for n in [*one, *two] if n < k + 1),
    "number_steps": lambda ns, change, k, summary, test: number_steps(ns, summary, k, test, change),
    "word_steps": lambda ws, s, change, test: s.join(
        map(by(WORD_CHANGE, change), filter(by(WORD_TEST, test), ws))
    ),
    "ranked": lambda ws, a, k: sorted(sorted(sorted(ws), key=len), key=lambda w: w.count(a), reverse=True)[
        :k
    ],
    "grouped": lambda ns, b, k: [b + sum(n for n in ns if n % k == r) for r in range(k)],
    "rows": lambda rs, k, summary, test: [
        by(SUMMARY, summary)(r) + k for r in filter(by(ROW_TEST, test), rs)
    ],
    "obeyed": obeyed,
    "rebased": lambda n, a, b, k: k + sum(d * b**i for i, d in enumerate(digits(n, a))),
    "secret": lambda ws, end, k: sorted(moved(w, k) + end for w in ws),
    "next_primes": lambda n, b, k: b * sum([p for p in range(n + 1, n + 200) if prime(p)][:k]),
    "pile": lambda formula, k, m: k + worth(formula, m),
    "covered": lambda spans, b, k: (
        b * sum(c >= k for c in Counter(n for first, last in spans for n in range(first, last + 1)).values())
    ),
    "climb": lambda ns, b, k: b + stretch(ns, k),
}


def parameters(task: ProgrammingTask) -> list[Any]:
    return [read(task.chosen[name]) for name in sorted(task.chosen)]


def read(phrase: str) -> Any:
    return int(phrase) if phrase.lstrip("-").isdigit() else phrase.strip('"')


def drawn(level: int, split: Split = "all", count: int = 300) -> list[ProgrammingTask]:
    families = [family for family in FAMILIES if family.level == level]
    return [draw_task(families, split, np.random.default_rng(seed)) for seed in range(count)]


def each_family(level: int) -> Iterator[tuple[ProgrammingTask, np.random.Generator]]:
    for family in FAMILIES:
        for seed in range(30 if family.level == level else 0):
            rng = np.random.default_rng(seed)
            yield draw_task([family], "all", rng), rng


def test_there_are_over_forty_families_and_each_has_a_name_of_its_own() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) >= 40
    assert set(Counter(family.level for family in FAMILIES)) == set(range(1, LEVELS + 1))
    assert set(SECOND) == {family.name for family in FAMILIES}


@pytest.mark.parametrize("level", range(1, LEVELS + 1))
def test_a_solution_agrees_with_one_written_another_way(level: int) -> None:
    for task, rng in each_family(level):
        shown, hidden = draw_inputs(task, 3, 8, rng)
        for arguments in (*shown, *hidden):
            before = repr(arguments)
            second = SECOND[task.name](*arguments, *parameters(task))
            assert ascii(task.expected(arguments)) == ascii(second), (task.name, task.says, arguments)
            assert repr(arguments) == before, "a solution leaves its arguments as they are"


@pytest.mark.parametrize("level", range(1, LEVELS + 1))
def test_a_sentence_says_the_whole_task(level: int) -> None:
    for task, _ in each_family(level):
        assert task.family.recognized(task.says) == task
        assert task.says.isascii() and task.says.isprintable() and "$" not in task.says


@pytest.mark.parametrize("level", range(1, LEVELS + 1))
def test_nothing_that_was_seen_and_no_constant_is_right_on_hidden_inputs(level: int) -> None:
    for task, rng in each_family(level):
        shown, hidden = draw_inputs(task, 3, 8, rng)
        assert (len(shown), len(hidden)) == (3, 8)
        assert not set(map(repr, shown)) & set(map(repr, hidden))
        expected = [task.expected(each) for each in hidden]
        assert len({repr(each) for each in expected}) > 1
        for place in range(len(task.family.takes)):
            assert [arguments[place] for arguments in hidden] != expected


@pytest.mark.parametrize("level", range(1, LEVELS + 1))
def test_what_is_held_out_is_never_trained_on(level: int) -> None:
    train = {(task.name, task.says) for task in drawn(level, "train")}
    heldout = {(task.name, task.says) for task in drawn(level, "heldout")}
    assert not train & heldout
    assert len(heldout) > 20 and len({name for name, _ in heldout}) >= 8


@pytest.mark.parametrize("level", range(1, LEVELS + 1))
def test_every_family_of_a_level_is_drawn(level: int) -> None:
    assert {task.name for task in drawn(level)} == {
        family.name for family in FAMILIES if family.level == level
    }
