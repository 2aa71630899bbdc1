"""Families of programming tasks of level 4: several steps of the lower levels in one function."""

from __future__ import annotations

from string import ascii_lowercase

from envs.builtin.programming_functions import ANY, ENDINGS, NUMBERS, WORDS
from envs.builtin.programming_tasks import Family, Rng, letters, numbers_between, several, whole

NUMBER_TESTS = {
    "that are even": "number % 2 == 0",
    "that are odd": "number % 2 == 1",
    "greater than 0": "number > 0",
    "less than 5": "number < 5",
    "that can be divided by 3": "number % 3 == 0",
}
NUMBER_CHANGES = {
    "squared": "number * number",
    "doubled": "number * 2",
    "made 7 larger": "number + 7",
    "subtracted from 10": "10 - number",
}
SUMMARIES = {
    "the sum": "sum(kept)",
    "the largest, or 0 where nothing is left,": "max(kept, default=0)",
    "the smallest, or 0 where nothing is left,": "min(kept, default=0)",
    "the last, or 0 where nothing is left,": "kept[-1] if kept else 0",
}
WORD_TESTS = {
    'that begin with "a", "b", "c" or "d"': 'word[0] in "abcd"',
    "that have more than 2 letters": "len(word) > 2",
    'that hold an "e"': '"e" in word',
    "whose first letter comes before their last in the alphabet": "word[0] < word[-1]",
}
WORD_CHANGES = {
    "reversed": "word[::-1]",
    "written twice": "word * 2",
    "without its first letter": "word[1:]",
    "with its letters in alphabetical order": '"".join(sorted(word))',
}
ROW_TESTS = {
    "whose sum is even": "sum(row) % 2 == 0",
    "that hold a number greater than 5": "max(row) > 5",
    "that begin with their smallest number": "row[0] == min(row)",
}
ROW_SUMMARIES = {"sum": "sum(row)", "largest number": "max(row)", "last number": "row[-1]"}


def _formula(rng: Rng) -> str:
    """Digits, + and * such that each operator finds two values on the stack, and one is left."""
    written, height = "", 0
    while height != 1 or len(written) < 5:
        if height < 2 or (height < 4 and rng.random() < 0.5):
            written, height = written + str(rng.integers(10)), height + 1
        else:
            written, height = written + "+*"[rng.integers(2)], height - 1
    return written


def _span(rng: Rng) -> list[int]:
    first = int(rng.integers(0, 30))
    return [first, first + int(rng.integers(0, 12))]


COMPOSITIONS = (
    Family(
        4,
        "number_steps",
        "$summary, times $k, of those numbers $test, each first $change",
        NUMBERS,
        """
        kept = [$change for number in numbers if $test]
        return ($summary) * $k
        """,
        {"summary": SUMMARIES, "k": numbers_between(1, 9), "test": NUMBER_TESTS, "change": NUMBER_CHANGES},
    ),
    Family(
        4,
        "word_steps",
        "those words $test, each $change, written with $between between them",
        WORDS,
        "return $between.join($change for word in words if $test)",
        {"test": WORD_TESTS, "change": WORD_CHANGES, "between": ENDINGS},
    ),
    Family(
        4,
        "ranked",
        "a list of the first $k of words when they are ordered by how many $a they hold, the most first, then by "
        "length, then alphabetically",
        {"words": several(letters(2, 5, "abcdefghij"), 3, 6)},
        "return sorted(words, key=lambda word: (-word.count($a), len(word), word))[:$k]",
        {"k": numbers_between(1, 3), "a": ANY},
    ),
    Family(
        4,
        "grouped",
        "a list of $k numbers, of which the one at index r is $b plus the sum of those numbers whose remainder divided "
        "by $k is r",
        {"numbers": several(whole(0, 30), 2, 8)},
        """
        sums = [$b] * $k
        for number in numbers:
            sums[number % $k] += number
        return sums
        """,
        {"k": numbers_between(2, 5), "b": numbers_between(0, 12)},
    ),
    Family(
        4,
        "rows",
        "a list with the $summary, plus $k, of each of the rows $test",
        {"rows": several(several(whole(-4, 9), 3, 3), 2, 5)},
        "return [$summary + $k for row in rows if $test]",
        {"summary": ROW_SUMMARIES, "k": numbers_between(0, 20), "test": ROW_TESTS},
    ),
    Family(
        4,
        "obeyed",
        'what x becomes when the letters of orders are obeyed one by one: "u" adds $a, "d" subtracts $b, "m" '
        "multiplies by $c, and after each the remainder divided by $m is taken, which is never less than 0",
        {"x": whole(0, 9), "orders": letters(2, 8, "udm")},
        """
        for order in orders:
            if order == "u":
                x += $a
            elif order == "d":
                x -= $b
            else:
                x *= $c
            x %= $m
        return x
        """,
        {
            "a": numbers_between(1, 9),
            "b": numbers_between(1, 9),
            "c": numbers_between(2, 5),
            "m": numbers_between(20, 99),
        },
    ),
    Family(
        4,
        "rebased",
        "what n is when its digits in base $a are written from the last to the first and read in base $b, plus $k",
        {"n": whole(1, 400)},
        """
        digits = []
        while n:
            digits.append(n % $a)
            n //= $a
        result = 0
        for digit in digits:
            result = result * $b + digit
        return result + $k
        """,
        {"a": numbers_between(2, 5), "b": numbers_between(5, 10), "k": numbers_between(0, 9)},
    ),
    Family(
        4,
        "secret",
        'an alphabetical list of words, each with its letters moved $k places on in the alphabet, in which "a" comes '
        'after "z", and followed by $end',
        {"words": several(letters(2, 5, ascii_lowercase), 2, 4)},
        """
        def moved(word):
            return "".join(chr((ord(letter) - ord("a") + $k) % 26 + ord("a")) for letter in word)

        return sorted(moved(word) + $end for word in words)
        """,
        {"k": numbers_between(1, 25), "end": ENDINGS},
    ),
    Family(
        4,
        "next_primes",
        "the sum of the $k smallest prime numbers greater than n, times $b",
        {"n": whole(0, 90)},
        """
        found = []
        while len(found) < $k:
            n += 1
            if n > 1 and all(n % divisor for divisor in range(2, int(n ** 0.5) + 1)):
                found.append(n)
        return sum(found) * $b
        """,
        {"k": numbers_between(2, 5), "b": numbers_between(1, 9)},
    ),
    Family(
        4,
        "pile",
        'what is left of formula, plus $k: each digit is put on a pile, "+" and "*" take the two on top and put their '
        "sum or product there, of which the remainder divided by $m is taken",
        {"formula": _formula},
        """
        pile = []
        for sign in formula:
            if sign.isdigit():
                pile.append(int(sign))
            else:
                a, b = pile.pop(), pile.pop()
                pile.append((a + b if sign == "+" else a * b) % $m)
        return pile[0] + $k
        """,
        {"m": numbers_between(11, 60), "k": numbers_between(0, 9)},
    ),
    Family(
        4,
        "covered",
        "how many whole numbers lie in at least $k of spans, each a list of its first and its last number; times $b",
        {"spans": several(_span, 2, 6)},
        """
        count = 0
        for number in range(100):
            count += sum(first <= number <= last for first, last in spans) >= $k
        return count * $b
        """,
        {"k": numbers_between(1, 3), "b": numbers_between(1, 15)},
    ),
    Family(
        4,
        "climb",
        "how many numbers the longest stretch of numbers has in which each is at least $k greater than the one before, "
        "plus $b",
        {"numbers": several(whole(-10, 20), 2, 9)},
        """
        longest = length = 1
        for before, number in zip(numbers, numbers[1:]):
            length = length + 1 if number - before >= $k else 1
            longest = max(longest, length)
        return longest + $b
        """,
        {"k": numbers_between(1, 6), "b": numbers_between(0, 9)},
    ),
)
