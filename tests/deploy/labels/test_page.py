"""The page in a real browser, judged by keyboard alone."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from deploy.labels.judgements import Labels
from tests.deploy.labels.stored import group, stored

pytest.importorskip("playwright")
if shutil.which("chromium") is None:
    pytest.skip("there is no Chromium here", allow_module_level=True)

from tests.bench.annotator import annotating, serving

ANSWERS = [["4"], ["four"], ["it is 4"], ["nine"]]  # by their length: two are alike


def test_what_an_annotator_says_by_keyboard_is_stored_of_the_episodes_that_were_shown(tmp_path: Path) -> None:
    run = stored(tmp_path / "run", group(0, ANSWERS))
    with serving(["label", str(run), "--port", "0"]) as address, annotating(address, "ann", len) as annotator:
        annotator.judge(3)
        annotator.reload()
        annotator.judge(2)
    with closing(Labels(run)) as labels:
        judged = [*labels]
    assert len({each.pair for each in judged}) == 5
    for each in judged:
        first, second = (len(ANSWERS[place][0]) for place in each.pair[2:])
        assert each.annotator == "ann"
        assert each.answer == ("tie" if first == second else "first" if first > second else "second")
