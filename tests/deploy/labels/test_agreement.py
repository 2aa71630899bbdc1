"""Krippendorff's alpha against the worked examples of the paper that defines it."""

from __future__ import annotations

import pytest

from deploy.labels.agreement import krippendorff_alpha


def units(*annotators: str) -> list[str]:
    """The values of each unit, from a line of values for each annotator; a dot is a missing one."""
    return ["".join(values).replace(".", "") for values in zip(*annotators, strict=True)]


# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): A, binary; B, nominal; C, nominal, four annotators
# with missing values, in which the last unit has one value only.
@pytest.mark.parametrize(
    ("annotators", "alpha"),
    [
        (("0100000010", "1110010000"), 0.095),
        (("aabbdcccedda", "babbbccceddd"), 0.692),
        (("123321412...", "1233224125.3", ".3332342251.", "12332441251."), 0.743),
    ],
)
def test_the_published_examples_come_out(annotators: tuple[str, ...], alpha: float) -> None:
    assert krippendorff_alpha(units(*annotators)) == pytest.approx(alpha, abs=5e-4)


def test_perfect_agreement_is_one_and_nothing_to_compare_is_none() -> None:
    assert krippendorff_alpha(["aa", "bbb", "c"]) == 1.0
    assert krippendorff_alpha(["aa", "aa"]) is None  # one value: chance would agree as well
    assert krippendorff_alpha(["a", "b", ""]) is None
