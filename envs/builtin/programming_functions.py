"""Families of programming tasks of levels 1 (one line), 2 (loops and text) and 3 (small algorithms)."""

from __future__ import annotations

from string import ascii_lowercase

from envs.builtin.programming_tasks import Family, letters, numbers_between, quoted, several, whole

X = {"x": whole(-30, 30)}
N = {"n": whole(0, 60)}
NUMBERS = {"numbers": several(whole(-20, 20), 1, 7)}
WORD = {"word": letters(3, 8)}
WORDS = {"words": several(letters(1, 6), 2, 5)}

EARLY, LATE = quoted("abcde"), quoted("fghij")  # two letters of these are never the same
ANY = quoted("abcdefghij")
ENDINGS = quoted([a + b for a in "klmno" for b in "pqrst"])

FUNCTIONS = (
    # Level 1.
    Family(1, "plus", "x plus $k", X, "return x + $k", {"k": numbers_between(2, 99)}),
    Family(1, "times", "x times $k", X, "return x * $k", {"k": numbers_between(2, 99)}),
    Family(
        1,
        "line",
        "$a times x plus $b",
        X,
        "return $a * x + $b",
        {"a": numbers_between(2, 9), "b": numbers_between(1, 30)},
    ),
    Family(
        1,
        "power",
        "x to the power of $k, plus $b",
        X,
        "return x ** $k + $b",
        {"k": numbers_between(2, 5), "b": numbers_between(0, 9)},
    ),
    Family(
        1, "remainder", "the remainder of n divided by $k", N, "return n % $k", {"k": numbers_between(2, 25)}
    ),
    Family(
        1, "divides", "whether n can be divided by $k", N, "return n % $k == 0", {"k": numbers_between(2, 12)}
    ),
    Family(
        1, "at_least", "x, but $k where x is less", X, "return max(x, $k)", {"k": numbers_between(-15, 15)}
    ),
    Family(
        1,
        "between",
        "whether x lies from $a to $b, both included",
        X,
        "return $a <= x <= $b",
        {"a": numbers_between(-15, -1), "b": numbers_between(0, 15)},
    ),
    Family(
        1,
        "distance",
        "how far x is from $k, never less than 0",
        X,
        "return abs(x - $k)",
        {"k": numbers_between(-15, 15)},
    ),
    Family(
        1,
        "total",
        "the sum of numbers, plus $k",
        NUMBERS,
        "return sum(numbers) + $k",
        {"k": numbers_between(0, 50)},
    ),
    Family(
        1,
        "largest",
        "the largest of numbers, times $k",
        NUMBERS,
        "return max(numbers) * $k",
        {"k": numbers_between(2, 30)},
    ),
    Family(
        1,
        "repeated",
        "word written $k times, followed by $end",
        WORD,
        "return word * $k + $end",
        {"k": numbers_between(2, 5), "end": ENDINGS},
    ),
    Family(1, "extended", "word followed by $end", WORD, "return word + $end", {"end": ENDINGS}),
    Family(
        1,
        "cut",
        "word without its first $k letters, followed by $end",
        WORD,
        "return word[$k:] + $end",
        {"k": numbers_between(1, 3), "end": ENDINGS},
    ),
    # Level 2.
    Family(
        2,
        "count_letters",
        "how many letters of word are $a or $b",
        WORD,
        "return sum(letter in ($a, $b) for letter in word)",
        {"a": EARLY, "b": LATE},
    ),
    Family(
        2,
        "replaced",
        "word with every $a replaced by $b",
        WORD,
        "return word.replace($a, $b)",
        {"a": ANY, "b": quoted("vwxyz")},
    ),
    Family(
        2,
        "without",
        "word without any $a or $b",
        WORD,
        'return "".join(letter for letter in word if letter not in ($a, $b))',
        {"a": EARLY, "b": LATE},
    ),
    Family(
        2,
        "mirrored",
        "word, then $middle, then word from its end to its beginning",
        WORD,
        "return word + $middle + word[::-1]",
        {"middle": ENDINGS},
    ),
    Family(
        2,
        "joined",
        "words from the last to the first, with $between between them",
        WORDS,
        "return $between.join(reversed(words))",
        {"between": ENDINGS},
    ),
    Family(
        2,
        "long_words",
        "how many of words have more than $k letters, plus $b",
        WORDS,
        "return sum(len(word) > $k for word in words) + $b",
        {"k": numbers_between(2, 4), "b": numbers_between(0, 9)},
    ),
    Family(
        2,
        "each_plus",
        "a list of numbers with $k added to each",
        NUMBERS,
        "return [number + $k for number in numbers]",
        {"k": numbers_between(2, 99)},
    ),
    Family(
        2,
        "those_below",
        "a list of those numbers that are less than $k, in their order",
        NUMBERS,
        "return [number for number in numbers if number < $k]",
        {"k": numbers_between(-12, 12)},
    ),
    Family(
        2,
        "count_above",
        "how many of numbers are greater than $k",
        NUMBERS,
        "return sum(number > $k for number in numbers)",
        {"k": numbers_between(-12, 12)},
    ),
    Family(
        2,
        "sum_divisible",
        "the sum of those numbers that can be divided by $k, plus $b",
        NUMBERS,
        "return sum(number for number in numbers if number % $k == 0) + $b",
        {"k": numbers_between(2, 5), "b": numbers_between(0, 9)},
    ),
    Family(
        2,
        "product",
        "the product of numbers, divided by $k: the remainder, which is never less than 0",
        NUMBERS,
        """
        result = 1
        for number in numbers:
            result = result * number % $k
        return result
        """,
        {"k": numbers_between(5, 60)},
    ),
    Family(
        2,
        "digit_sum",
        "the sum of the decimal digits of n, times $k",
        {"n": whole(0, 9999)},
        "return sum(int(digit) for digit in str(n)) * $k",
        {"k": numbers_between(2, 40)},
    ),
    # Level 3.
    Family(
        3,
        "common_divisor",
        "the greatest common divisor of n and $k",
        {"n": whole(1, 400)},
        """
        a, b = n, $k
        while b:
            a, b = b, a % b
        return a
        """,
        {"k": numbers_between(12, 120)},
    ),
    Family(
        3,
        "sequence",
        "item n of the sequence that begins with $a, $b and goes on with the sum of the last two; $a is item 0",
        {"n": whole(0, 25)},
        """
        a, b = $a, $b
        for _ in range(n):
            a, b = b, a + b
        return a
        """,
        {"a": numbers_between(0, 7), "b": numbers_between(1, 9)},
    ),
    Family(
        3,
        "halving",
        "what n becomes in $k steps, of which each halves it if it is even, else triples it and adds $b",
        {"n": whole(1, 60)},
        """
        for _ in range($k):
            n = n // 2 if n % 2 == 0 else 3 * n + $b
        return n
        """,
        {"k": numbers_between(2, 12), "b": {"1": "1", "3": "3", "5": "5"}},
    ),
    Family(
        3,
        "count_primes",
        "how many prime numbers p there are with $a <= p <= n",
        {"n": whole(0, 150)},
        """
        count = 0
        for p in range(max(2, $a), n + 1):
            count += all(p % divisor for divisor in range(2, int(p ** 0.5) + 1))
        return count
        """,
        {"a": numbers_between(2, 40)},
    ),
    Family(
        3,
        "in_base",
        "n written in base $k, as text of at least $m digits with zeros in front where it takes them",
        {"n": whole(0, 500)},
        """
        digits = ""
        while n:
            digits, n = str(n % $k) + digits, n // $k
        return digits.rjust($m, "0")
        """,
        {"k": numbers_between(2, 9), "m": numbers_between(1, 8)},
    ),
    Family(
        3,
        "rotated",
        "a list of numbers in which each has moved $k places towards the front, those in front to the end",
        {"numbers": several(whole(-9, 9), 1, 6)},
        """
        places = $k % len(numbers)
        return numbers[places:] + numbers[:places]
        """,
        {"k": numbers_between(1, 40)},
    ),
    Family(
        3,
        "shifted",
        'word with each letter moved $k places on in the alphabet, in which "a" comes after "z"',
        {"word": letters(2, 7, ascii_lowercase)},
        """
        return "".join(chr((ord(letter) - ord("a") + $k) % 26 + ord("a")) for letter in word)
        """,
        {"k": numbers_between(1, 25)},
    ),
    Family(
        3,
        "runs",
        "word with each run of equal letters written as the letter, how long the run is, and $mark",
        {"word": letters(2, 9, "ab")},
        """
        written, start = "", 0
        for end in range(1, len(word) + 1):
            if end == len(word) or word[end] != word[start]:
                written += word[start] + str(end - start) + $mark
                start = end
        return written
        """,
        {"mark": ENDINGS},
    ),
    Family(
        3,
        "pair",
        "whether two of numbers at different places add up to $k",
        NUMBERS,
        """
        seen = set()
        for number in numbers:
            if $k - number in seen:
                return True
            seen.add(number)
        return False
        """,
        {"k": numbers_between(-15, 15)},
    ),
    Family(
        3,
        "window",
        "the largest sum of $k numbers that stand next to one another, plus $b",
        {"numbers": several(whole(-20, 20), 4, 8)},
        "return max(sum(numbers[i:i + $k]) for i in range(len(numbers) - $k + 1)) + $b",
        {"k": numbers_between(2, 4), "b": numbers_between(0, 12)},
    ),
    Family(
        3,
        "remainders",
        "a list of the remainders of numbers divided by $k, each once, in the order in which they come first",
        {"numbers": several(whole(0, 60), 3, 8)},
        "return list(dict.fromkeys(number % $k for number in numbers))",
        {"k": numbers_between(3, 25)},
    ),
    Family(
        3,
        "coins",
        "the smallest number of coins worth 1, $a and $b that are worth n together",
        {"n": whole(0, 60)},
        """
        fewest = [0]
        for worth in range(1, n + 1):
            fewest.append(1 + min(fewest[worth - coin] for coin in (1, $a, $b) if coin <= worth))
        return fewest[n]
        """,
        {"a": numbers_between(3, 8), "b": numbers_between(9, 16)},
    ),
    Family(
        3,
        "merged",
        "one ascending list of what is in first and second, which are ascending, without numbers greater than $k",
        {
            "first": lambda rng: sorted(several(whole(0, 40), 0, 5)(rng)),
            "second": lambda rng: sorted(several(whole(0, 40), 0, 5)(rng)),
        },
        "return [number for number in sorted(first + second) if number <= $k]",
        {"k": numbers_between(10, 35)},
    ),
)
