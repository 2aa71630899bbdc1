"""reasoning-gym's questions: the reward is the scorer's, and gaming it pays nothing. Needs the extra reasoning."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from reasoning_gym.factory import DATASETS, create_dataset

from envs import registry
from envs.checks.check import check
from envs.registry import EnvironmentUnknown
from envs.suites.reasoning_questions import EVALUATED, PROBES, ReasoningQuestions

NONSENSE = PROBES[0]
CODE = "__import__('os').mkdir('ran')"
CHECKED = ["chain_sum", "pool_matrix", "list_functions"]
FEW = ["chain_sum", "countdown", "pool_matrix", "list_functions", "knights_knaves", "game_of_life_halting"]
EVERY = sorted(set(DATASETS) - {"composite"})


def asked(name: str, seed: int = 0, **options: Any) -> tuple[ReasoningQuestions, dict[str, Any]]:
    env = ReasoningQuestions(name, **options)
    env.reset(seed=seed)
    return env, env._entry


def paid(env: ReasoningQuestions, answer: str, seed: int = 0) -> float:
    env.reset(seed=seed)
    return env.step(answer)[1]


def test_a_sum_by_hand() -> None:
    env = registry.make("reasoning_gym/chain_sum", min_terms=3, max_terms=3, instructions=False)
    question = env.reset(seed=5)[0]
    numbers = re.search(r"[\d+\- ]+ =", question)
    assert numbers is not None
    right = str(sum(int(each.replace(" ", "")) for each in re.findall(r"[+-]? ?\d+", numbers[0])))
    assert env.step(f" {right}\n") == ("", 1.0, True, False, {"success": True})
    env.reset(seed=5)
    assert env.step(f"{right} 0")[1:] == (0.0, True, False, {"success": False})
    env.reset(seed=5)
    assert env.step(" \n")[1:] == (0.0, True, False, {"malformed": True, "success": False})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in EVERY]
)
def test_right_answers_are_paid_and_no_answer_the_question_nonsense_and_code_are_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    env, entry = asked(name)
    question, right = entry["question"], entry["answer"]
    if isinstance(right, str):
        assert paid(env, right) == 1.0
    told_back = (question, f"{question}\n{right}", f"{right}\n{question}")
    for gamed in (
        "",
        " ",
        *told_back,
        NONSENSE,
        "zq",
        "[]",
        "0",
        "1",
        "0" * 4000,
        CODE,
        f"[{CODE}]",
        f"1 + {CODE}",
    ):
        assert gamed == right or paid(env, gamed) == 0.0, gamed
    env = ReasoningQuestions(name, partial=True)
    assert paid(env, question) == paid(env, f"{question}\n{right}") == 0.0
    assert 0.0 <= paid(env, NONSENSE) <= 0.25 or name == "game_of_life_halting"
    assert os.listdir() == [], "nothing that was said was run"


def test_a_scorer_that_takes_everything_else_for_no_is_not_believed() -> None:
    name = "game_of_life_halting"
    seeds = [seed for seed in range(20) if asked(name, seed)[1]["answer"] == "False"]
    assert seeds, "there are such questions"
    for seed in seeds[:3]:
        env, entry = asked(name, seed)
        assert env._dataset.score_answer("zq", entry) == 1.0, "the package pays this"
        assert (paid(env, "zq", seed), paid(env, "True", seed), paid(env, "False", seed)) == (0.0, 0.0, 1.0)


def test_a_scorer_that_pays_how_a_number_begins_is_not_believed() -> None:
    env, entry = asked("coin_flip")
    assert entry["answer"] == "0.03125" and env._dataset.score_answer("0", entry) == 1.0, (
        "the package pays this"
    )
    assert (paid(env, "0"), paid(env, "0.0"), paid(env, "0.03125")) == (0.0, 0.0, 1.0)
    assert paid(ReasoningQuestions("coin_flip", partial=True), "0") == 0.0
    env, entry = asked("decimal_arithmetic")
    same = entry["answer"] + "0"
    assert paid(env, same) == 1.0, "another way to write a number is paid where the scorer is believed"


def test_what_a_scorer_gives_for_half_an_answer_is_paid_only_where_asked_for() -> None:
    env, entry = asked("countdown")
    wrong = " + ".join(map(str, entry["metadata"]["numbers"]))
    given = create_dataset("countdown", seed=0, size=1).score_answer(wrong, entry)
    assert 0.0 < given < 1.0
    assert (paid(env, wrong), paid(ReasoningQuestions("countdown", partial=True), wrong)) == (0.0, given)


@pytest.mark.parametrize("name", sorted(EVALUATED))
def test_no_answer_is_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env, entry = asked(name, partial=True)
    env._dataset.score_answer(CODE, entry)
    assert os.path.isdir("ran"), "the package runs it: when it does no longer, this guard can go"
    os.rmdir("ran")
    for text in (CODE, f"[{CODE}]", f"1 + {CODE}", "9**9**9**9"):
        assert paid(env, text) == 0.0
    assert os.listdir() == []


def test_a_scorer_nobody_has_looked_at_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(EVALUATED, "countdown")
    with pytest.raises(ValueError, match="countdown may evaluate answers as Python"):
        ReasoningQuestions("countdown")


def test_tagged_answers_leave_room_to_think_and_there_is_one_of_them() -> None:
    env, entry = asked("chain_sum", answer="tagged")
    right = entry["answer"]
    assert env.reset(seed=0)[0].startswith("Say the answer within <answer>")
    assert paid(env, f"Let me see.\n<answer>\n{right}\n</answer> Done.") == 1.0
    for text in (
        right,
        f"<answer>{right}",
        "<answer></answer>",
        f"<answer>{right}</answer><answer>7</answer>",
    ):
        env.reset(seed=0)
        assert env.step(text)[4] == {"malformed": True, "success": False}


def test_the_seed_is_the_question_and_the_split_divides_them() -> None:
    questions = {}
    for split in ("train", "heldout"):
        env = ReasoningQuestions("chain_sum", split=split)  # type: ignore[arg-type]
        first = [env.reset(seed=seed)[0] for seed in range(40)]
        assert first == [
            ReasoningQuestions("chain_sum", split=split).reset(seed=seed)[0] for seed in range(40)
        ]  # type: ignore[arg-type]
        questions[split] = set(first)
        assert len(questions[split]) > 35
    assert not questions["train"] & questions["heldout"]


@pytest.mark.parametrize("name", CHECKED)
def test_it_keeps_what_environments_promise(name: str) -> None:
    assert check(f"reasoning_gym/{name}", seconds=60) == []


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("chain_sun", {}, "did you mean chain_sum"),
        ("composite", {}, "name its datasets as tasks of their own"),
        ("chain_sum", {"terms": 3}, "no option 'terms'; its options: .*min_terms"),
        ("chain_sum", {"seed": 3}, "no option 'seed'"),
        ("chain_sum", {"min_terms": 9, "max_terms": 2}, "the dataset rejects .*min_terms"),
        ("chain_sum", {"split": "test"}, "must be all, train or heldout"),
        ("chain_sum", {"answer": "last"}, "must be whole or tagged"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(EnvironmentUnknown, match=says) as refused:
        registry.make(f"reasoning_gym/{name}", **options)
    assert "\n" not in str(refused.value)
