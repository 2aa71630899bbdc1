"""Arithmetic against Python's and against problems solved by hand, and attempts to game the reward."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.builtin.arithmetic import LEVELS, PROBLEMS, WORDS, Arithmetic, Player, _patterns, said, solved
from tests.envs.playing import played

SEEDS = range(300)
STYLES = ("whole", "last", "boxed")
BY_HAND = (
    ("7 + 12", 19),
    ("0 + 0", 0),
    ("3 - 9 + 2", -4),
    ("2 + 3 * 4", 14),
    ("5 * 3 - 20", -5),
    ("(20 - 5) * 3 + 30", 75),
    ("40 - 2 * (30 + 10)", -40),
    ("(1 - 4) * (50 - 2)", -144),
    ("60 - (30 - (8 - 3))", 35),
    ("2 * (30 - 10) - 3 * (40 - 15)", -35),
    ("anna has 3 nuts and finds 40 more. how many nuts has anna now?", 43),
    ("ben has 30 pens. ben gives 12 of them to ida. how many pens has ben left?", 18),
    ("leo has 5 cups and emma has 21. how many cups have they together?", 26),
    ("kate has 30 eggs. jack has 4 more than kate. how many eggs has jack?", 34),
    ("kate has 30 eggs. jack has 4 fewer than kate. how many eggs has jack?", 26),
    ("felix fills 6 boxes with 7 coins each. how many coins is that?", 42),
    ("clara has 11 books. henry has 3 times as many. how many books has henry?", 33),
    ("grace shares 36 plums equally among 4 friends. how many does each get?", 9),
    ("there are 50 stones. david takes some and 8 are left. how many did david take?", 42),
    ("anna buys 3 boxes of 20 nuts and gives 5 of them to ben. how many nuts has anna left?", 55),
    ("leo has 5 cups. emma has 4 times as many. how many have they together?", 25),
    ("ida has 33 cards, loses 3 and shares the rest equally among 5 friends. how many does each get?", 6),
    ("ida and leo find 30 pens each. ida gives 4 of them to leo. how many more has leo than ida now?", 8),
    ("ben puts 4 eggs into each of 3 bags and 10 into each of 2 boxes. how many eggs is that?", 32),
    ("jack had 25 coins, found 5 more and gave half of all to kate. how many has jack left?", 15),
    ("anna finds 2 shells a day for 6 days. ben brings 40 more. how many shells have they together?", 52),
    ("emma needs 60 stamps and has 10. felix brings 4 boxes of 9. how many are still missing?", 14),
    ("kate has 30 eggs. jack has 4 fewer than kate. how many have they together?", 56),
)


def posed(problem: str, **options: Any) -> Arithmetic:
    env = Arithmetic(**options)
    env.reset(seed=0)
    env._problem, env._answer = problem, dict(BY_HAND)[problem]
    return env


@pytest.mark.parametrize(("problem", "answer"), BY_HAND)
def test_problems_worked_by_hand(problem: str, answer: int) -> None:
    assert solved(problem) == answer


def test_every_template_was_worked_by_hand_and_reads_in_one_way_only() -> None:
    values = {
        (index, value.format(**match.groupdict()))
        for problem, _ in BY_HAND
        for index, (pattern, value) in enumerate(_patterns())
        if (match := pattern.fullmatch(problem))
    }
    assert {index for index, _ in values} == set(range(len(_patterns())))
    for level in (4, 5):
        for seed in SEEDS:
            env = Arithmetic(level)
            env.reset(seed=seed)
            assert sum(bool(pattern.fullmatch(env.problem)) for pattern, _ in _patterns()) == 1


@pytest.mark.parametrize("level", [1, 2, 3])
def test_an_expressions_answer_is_pythons(level: int) -> None:
    env = Arithmetic(level)
    for seed in SEEDS:
        env.reset(seed=seed)
        assert env._answer == eval(env.problem)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("style", STYLES)
def test_a_player_without_errors_is_right_at_once(level: int, style: str) -> None:
    for instructions in (True, False):
        env = Arithmetic(level, answer=style, max_turns=2, instructions=instructions)
        for seed in SEEDS:
            episode = played(env, Player(0.0, seed), seed)
            assert (episode.reward, episode.turns, episode.success) == (1.0, 1, True)


@pytest.mark.parametrize("level", LEVELS)
def test_a_player_of_errors_only_is_seldom_right(level: int) -> None:
    assert sum(played(Arithmetic(level), Player(1.0, seed), seed).reward for seed in SEEDS) < 0.1 * len(SEEDS)


def test_a_wrong_answer_is_final_unless_there_are_turns_left() -> None:
    env = posed("7 + 12")
    assert env.step("18") == ("wrong", 0.0, True, False, {"success": False})
    env = posed("7 + 12", max_turns=3)
    assert env.step("18") == ("wrong", 0.0, False, False, {})
    assert env.step(" 19\n") == ("right", 1.0, True, False, {"success": True})
    env = posed("7 + 12", max_turns=2)
    assert [env.step("18")[2:4] for _ in range(2)] == [(False, False), (True, False)]
    erring = [played(Arithmetic(max_turns=9, answer="last"), Player(0.5, seed), seed) for seed in range(50)]
    assert any(1 < episode.turns < 9 for episode in erring) and all(each.success for each in erring)


def test_the_whole_text_is_the_rules_the_problem_and_the_form_asked_for() -> None:
    rules, problem = Arithmetic(level=1).reset(seed=0)[0].splitlines()
    assert rules == "Work out the answer, a whole number. Say it in digits and say nothing else."
    assert Arithmetic(level=1, instructions=False).reset(seed=0)[0] == problem
    for style, cue in (("last", "answer:"), ("boxed", "\\boxed{}")):
        assert Arithmetic(level=1, answer=style, instructions=False).reset(seed=0)[0] == f"{problem}\n{cue}"


EVERY_NUMBER = " ".join(map(str, range(100)))


@pytest.mark.parametrize(
    ("style", "text", "number"),
    [
        ("whole", "19", 19),
        ("whole", "\t-4 \n", -4),
        ("last", "7 and 12 is 19, I am sure.\n\nAnswer: 19", 19),
        ("last", "answer:-3\n", -3),
        ("boxed", "So it is \\boxed{19}, as said.", 19),
        *((style, text, None) for style in STYLES for text in ("", " \n", "7 + 12", "19 20", EVERY_NUMBER)),
        *(
            ("whole", text, None)
            for text in ("+19", "019", "-0", "19.0", "1e1", "1,000", "19.", "answer: 19")
        ),
        *(("whole", text, None) for text in ("\u0661\u0669", "19\n20", "nineteen", "9" * 10, "- 4")),
        *(("last", text, None) for text in ("19", "answer:", "answer: 18 or 19", "answer: 18\nanswer: 19")),
        *(("last", text, None) for text in ("answer: 19\nor so", "answer: 19\nanswer: 19", "the answer: 19")),
        *(
            ("boxed", text, None)
            for text in ("\\boxed{}", "\\boxed{18}\\boxed{19}", "\\boxed{18, 19}", "{19}")
        ),
        *(("boxed", text, None) for text in ("\\boxed{19", "\\boxed{\\boxed{19}}", "\\boxed 18 \\boxed{19}")),
    ],
)
def test_one_number_in_its_form_is_an_answer_and_nothing_else(
    style: str, text: str, number: int | None
) -> None:
    assert said(text, style) == number
    _, reward, terminated, truncated, info = posed("7 + 12", answer=style).step(text)
    assert reward == float(number == 19)
    assert (terminated, truncated, info.get("malformed", False)) == (True, False, number is None)


@given(st.text(), st.sampled_from(STYLES))
def test_no_text_is_paid_that_does_not_hold_the_number(text: str, style: str) -> None:
    if "19" not in text:
        assert posed("7 + 12", answer=style).step(text)[1] == 0.0


def test_the_problem_said_back_is_never_paid() -> None:
    for level in LEVELS:
        for style in STYLES:
            env = Arithmetic(level, answer=style)
            for seed in range(20):
                observation, _ = env.reset(seed=seed)
                for text in (observation, env.problem, *observation.splitlines()):
                    env.reset(seed=seed)
                    assert env.step(text)[1] == 0.0


@pytest.mark.parametrize("level", LEVELS)
def test_train_and_heldout_problems_never_meet(level: int) -> None:
    drawn: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for split, problems in drawn.items():
        env = Arithmetic(level, split=split)
        for seed in SEEDS:
            env.reset(seed=seed)
            problems.add(env.problem)
    assert not drawn["train"] & drawn["heldout"]
    assert len(drawn["heldout"]) > 30


def test_every_word_said_is_among_words() -> None:
    for level in LEVELS:
        for style in STYLES:
            env = Arithmetic(level, answer=style, max_turns=2, instructions=False)
            for seed in SEEDS:
                assert played(env, Player(0.5, seed), seed).words <= set(WORDS)
    assert len(PROBLEMS[4]) + len(PROBLEMS[5]) == 18


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"level": 6}, "level=6 must be one of 1, 2, 3, 4, 5"),
        ({"max_turns": 0}, "use 1 or more"),
        ({"split": "test"}, "must be all, train or heldout"),
        ({"answer": "first"}, "must be whole, last or boxed"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Arithmetic(**options)
