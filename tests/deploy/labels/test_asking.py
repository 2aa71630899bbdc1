"""Which pair is asked next."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import pytest

from deploy.config.config_errors import ConfigError
from deploy.labels.asking import Pair, next_pair, uncertainty
from deploy.labels.pool import Pool
from deploy.labels.scores import ScoreFile, write_scores
from rollout.wire.trajectory import EndReason
from tests.deploy.labels.stored import group, stored

PAIRS = [Pair(0, 0, 0, 1), Pair(0, 0, 0, 2), Pair(1, 0, 0, 1)]


def test_an_annotator_is_asked_every_pair_once_and_shown_ones_last() -> None:
    seen: dict[Pair, set[str]] = {PAIRS[1]: {"ben"}}
    asked = []
    while pair := next_pair(PAIRS, seen, "ann", Random(len(asked)), shown={PAIRS[0]}, overlap=0.0):
        asked.append(pair)
        seen.setdefault(pair, set()).add("ann")
    assert asked == [PAIRS[2], PAIRS[1], PAIRS[0]]


def test_the_share_of_pairs_that_others_have_judged_is_the_overlap() -> None:
    seen = {PAIRS[0]: {"ben"}}
    asked = [next_pair(PAIRS, seen, "ann", Random(seed), overlap=0.25) for seed in range(4000)]
    assert asked.count(PAIRS[0]) / 4000 == pytest.approx(0.25, abs=0.03)  # four standard deviations
    assert asked.count(PAIRS[1]) / 4000 == pytest.approx(0.375, abs=0.03)


def test_uncertainty_is_the_entropy_of_the_better_one() -> None:
    assert uncertainty([3.0], [3.0]) == pytest.approx(math.log(2))
    # A difference of ln 3 is a probability of 3/4.
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert uncertainty([math.log(3)], [0.0]) == pytest.approx(quarter)
    assert uncertainty([0.0], [math.log(3)]) == pytest.approx(quarter)
    assert uncertainty([5.0, 0.0], [0.0, 5.0]) == pytest.approx(math.log(2))  # judges who disagree
    assert uncertainty([1e9], [-1e9]) == 0.0


def test_the_pair_that_scores_leave_most_uncertain_is_asked_first(tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    lines = [(0, 0, 1.0), (0, 1, 4.0), (0, 2, 1.5), (1, 0, 0.0)]  # group 1 has one score only
    file.write_text("".join(f'{{"group_id": {g}, "episode": {e}, "score": {s}}}\n' for g, e, s in lines))
    scores = ScoreFile(file)
    assert next_pair(PAIRS, {}, "ann", Random(0), worth=scores.worth) == PAIRS[1]
    assert scores.worth(PAIRS[2]) == 0.0
    file.write_text('{"group_id": 0, "episode": 0, "score": [1, 2]}\n{"group_id": 0}\n')
    with pytest.raises(ConfigError, match=r"scores.jsonl:2: episode Field required; write {"):
        scores.refresh()
    assert scores.worth(PAIRS[1]) > 0.0  # those of before


def test_scores_may_come_later_and_be_replaced(tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    scores = ScoreFile(file)
    assert not scores and scores.worth(PAIRS[0]) == 0.0
    write_scores(file, {(0, 0, 0): [1.0, 3.0], (0, 0, 1): [3.0, 1.0]})  # two judges who disagree
    scores.refresh()
    quarter = 1 / (1 + math.exp(2.0))
    assert len(scores) == 2
    assert scores.worth(PAIRS[0]) == pytest.approx(math.log(2))
    write_scores(file, {(0, 0, 0): [2.0], (0, 0, 1): [0.0]})
    scores.refresh()
    assert scores.worth(PAIRS[0]) == pytest.approx(
        -(quarter * math.log(quarter) + (1 - quarter) * math.log(1 - quarter))
    )


def test_pairs_are_of_sound_episodes_that_differ_in_the_last_attempt_of_the_newest_groups(
    tmp_path: Path,
) -> None:
    failed = [EndReason.TERMINATED, EndReason.FAILED]
    run = stored(
        tmp_path,
        group(0, [["a"], ["b"]]),
        group(
            1, [["a", "x"], ["lost"], ["a", "y"], ["a"]], failed
        ),  # the last one breaks off, and differs nowhere
        group(2, [["a"], ["b"]]),
        group(2, [["a"], ["c"]], attempt=1),
    )
    pool = Pool(run, groups=3)
    assert pool.pairs == [Pair(1, 0, 0, 2), Pair(2, 1, 0, 1)]
    assert pool.episode(1, 0, 1) is None and pool.episode(2, 0, 0) is None
    stored(run, group(3, [["a"], ["b"]]))  # the run goes on
    pool.refresh()
    assert pool.pairs[-1] == Pair(3, 0, 0, 1)
