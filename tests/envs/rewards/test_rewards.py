"""The rewards of a recipe: several with weights, functions of one's own as Manta, verl and TRL call them, a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from envs.rewards.judge import judge
from envs.rewards.rewards import Reward, Said, reward_range, rewards_of
from envs.served_model import NoAnswer
from tests.envs.chat_server import Messages, chat_server

OWN = """
async def brevity(completion, row, words=10):
    return max(0.0, 1 - len(completion.split()) / words)

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(data_source == "sums" and solution_str == ground_truth and extra_info["index"] == 7)}

def accuracy_reward(completions, solution, **kwargs):
    assert len(kwargs["prompts"]) == 1
    return [1.0 if each[0]["content"] == answer else 0.0 for each, answer in zip(completions, solution)]

def length(completions):
    return [float(len(each)) for each in completions]

def nothing(completion, row):
    return None

def blind(completion):
    return 1.0

def demanding(completion, row, words):
    return 1.0 / words

def answers(completion, row, trajectory):
    return float(sum(each["role"] == "assistant" for each in trajectory))
"""
ROW: dict[str, Any] = {
    "data_source": "sums",
    "prompt": [{"role": "user", "content": "3 + 4?"}],
    "solution": "7",
    "extra_info": {"index": 7},
}


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scoring_of_one.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


def said(completion: str, truth: Any = "7", row: dict[str, Any] | None = None) -> Said:
    talk = [*ROW["prompt"], {"role": "assistant", "content": completion}]
    return Said(completion, truth, ROW if row is None else row, talk, posed=1)


def test_a_function_is_called_as_its_parameters_say() -> None:
    for name in ("compute_score", "accuracy_reward"):
        reward = Reward.of(f"scoring_of_one:{name}")
        assert [reward(said("7")), reward(said("8"))] == [1.0, 0.0], name
    assert Reward.of({"kind": "scoring_of_one:brevity", "words": 4})(said("one two")) == 0.5
    assert Reward.of("scoring_of_one:answers")(said("7")) == 1.0
    text_row = {
        "prompt": "3 + 4?",
        "extra": 1,
    }  # without **kwargs a function of TRL's kind is given what it names
    assert Reward.of("scoring_of_one:length")(said("seven", row=text_row)) == 5.0
    with pytest.raises(TypeError, match="None"):
        Reward.of("scoring_of_one:nothing")(said("7"))


def test_several_have_names_and_weights() -> None:
    rewards = rewards_of(["number", {"kind": "contains", "weight": -0.5, "name": "echo"}])
    assert [(reward.name, reward.weight) for reward in rewards] == [("number", 1.0), ("echo", -0.5)]
    assert reward_range(rewards) == (-0.5, 1.0)
    assert reward_range(rewards_of("scoring_of_one:nothing")) == (-float("inf"), float("inf"))


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ("nmber", "there is no reward 'nmber'; there are exact, number, "),
        ({"kind": "number", "tolerence": 1}, "reward number has no option 'tolerence'; it has tolerance"),
        ({"kind": "judge"}, "reward judge needs the option 'model'"),
        ({"kind": "scoring_of_one:absent"}, "has no function 'absent'"),
        (
            {"kind": "scoring_of_one:brevity", "wrods": 3},
            "is called with completion, row and its options: .* 'wrods'",
        ),
        (
            "scoring_of_one:blind",
            "is called with completion, row and its options: too many positional arguments",
        ),
        ("scoring_of_one:demanding", "missing a required argument: 'words'"),
        ({"weight": 2.0}, "a reward has a kind"),
        ({"kind": "number", "weight": float("nan")}, "give a finite number"),
        (["number", "number"], "rewards have names of their own"),
        ([], "at least one"),
    ],
)
def test_a_wrong_section_is_refused_in_a_line(sections: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        rewards_of(sections)


# A judge ------------------------------------------------------------------------------------------------------------


def test_a_judges_score_is_the_reward_and_is_asked_once() -> None:
    asked: list[str] = []

    def scored(messages: Messages) -> str:
        asked.append(messages[0]["content"])
        return f"It says 1 thing.\nscore: {asked[-1].rpartition('Answer:')[2].strip()}"

    with chat_server(scored) as url:
        reward = Reward.of({"kind": "judge", "model": "m", "base_url": url})
        assert [reward(said("6")), reward(said("6")), reward(said("10"))] == [0.6, 0.6, 1.0]
        assert len(asked) == 2
        assert "Task:\n3 + 4?" in asked[0]
        assert "Reference answer:\n7" in asked[0]
        for answer in ("11", "no number at all"):
            with pytest.raises(NoAnswer, match="said no score from 0 to 10"):
                reward(said(answer))
        whole = Reward.of(
            {"kind": "judge", "model": "m", "base_url": url, "prompt": "{conversation} Answer: 5"}
        )
        assert whole(said("{most} {task}")) == 0.5
        assert asked[-1] == "user: 3 + 4?\n\nassistant: {most} {task} Answer: 5"


def test_a_judge_that_does_not_answer_is_no_reward() -> None:
    with pytest.raises(NoAnswer, match="did not answer"):
        judge("a", "b", model="m", base_url="http://127.0.0.1:9/v1", retries=0, seconds=5)
