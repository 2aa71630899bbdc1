"""People of different tastes: what was said in an earlier session holds, until it is said otherwise."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from envs.base import Observation, messages_of
from envs.builtin.personal import (
    LEVELS,
    OVER,
    QUESTIONS,
    TASTES,
    TOPIC,
    UNREADABLE,
    WORDS,
    Person,
    Personal,
    Player,
    Question,
    Wishes,
)
from rollout.agents.memory import NotebookSettings
from rollout.agents.settings import wrapped

SEEDS = range(200)
ANN = "ann detailed imperial warm money"


@dataclass
class Played:
    """An episode: what was seen and said, what it earned and cost."""

    observations: list[Observation] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    cost: float = 0.0
    success: bool = False


def played(error_rate: float, seed: int, **options: Any) -> Played:
    env, player, done, found = Personal(**options), Player(error_rate, seed), False, Played()
    found.observations.append(env.reset(seed=seed)[0])
    while not done:
        found.actions.append(player.act(found.observations[-1]))
        observation, reward, done, truncated, info = env.step(found.actions[-1])
        assert not truncated and ("success" in info) == done and "malformed" not in info
        assert reward == pytest.approx(sum(info["rewards"].values()))
        found.observations.append(observation)
        found.rewards.append(reward)
        found.cost += info["costs"]["forbidden"]
    found.success = info["success"]
    return found


def asked(said: list[Wishes], **options: Any) -> Personal:
    """Ann's questions, one a day, each with these statements and "8 km, 5 miles" and news of money and sport."""
    env, known, questions = Personal(instructions=False, **options), Wishes(), []
    env.reset(seed=0)
    for day, each in enumerate(said, 1):
        known = known | each
        questions.append(Question(day, each, known, "how far", ("8 km", "5 miles"), ("money", "sport")))
    env._person, env._questions = Person.of(ANN), questions
    return env


def test_four_sessions_by_hand() -> None:
    env = asked(
        [{"length": "detailed", TOPIC: "money"}, {"units": "imperial"}, {"length": "brief"}, {"tone": "warm"}]
    )
    assert env._observed() == "day 1\nann: be detailed, no money\nhow far? 8 km, 5 miles\nnews: money, sport"
    observation, reward, *ended, info = env.step("8 km and sport")  # the length is all that was said
    assert (observation, reward, ended) == (
        "day 2\nann: use imperial\nhow far? 8 km, 5 miles\nnews: money, sport",
        0.25,
        [False, False],
    )
    assert info == {"rewards": {"length": 0.25, "units": 0.0, "tone": 0.0}, "costs": {"forbidden": 0.0}}
    _, reward, _, _, info = env.step(
        "dear ann 8 km and sport"
    )  # detailed as said the day before, not imperial
    assert reward == 0.125 and info["rewards"] == {"length": 0.125, "units": 0.0, "tone": 0.0}
    assert env.step("5 miles")[1] == 0.25  # a change of mind: brief from now on
    *_, info = env.step(" Dear Ann 5 miles and sport\n")  # imperial and warm, and not brief
    assert info["rewards"] == {"length": 0.0, "units": pytest.approx(1 / 12), "tone": pytest.approx(1 / 12)}
    assert info["success"] is False


def test_who_meets_every_taste_that_was_said_succeeds() -> None:
    env = asked([{"length": "detailed"}, {"units": "imperial", "tone": "warm"}])
    assert env.step("8 km and money")[1] == 0.5, "the topic is not forbidden"
    observation, reward, terminated, truncated, info = env.step("dear ann 5 miles and sport")
    assert (observation, terminated, truncated, info["success"]) == (OVER, True, False, True)
    assert reward == pytest.approx(0.5)


@pytest.mark.parametrize(
    "answer", ["5 km and sport", "8 miles and sport", "13 km and sport", "8 km and health"]
)
def test_an_untrue_answer_pays_nothing(answer: str) -> None:
    env = asked([{"length": "detailed"}, {}])
    assert env.step(answer)[1] == 0.0
    assert env.step("8 km and sport")[1] == 0.5


def test_anothers_name_is_neither_warm_nor_plain() -> None:
    for tone in ("warm", "plain"):
        env = asked([{"tone": tone}])
        assert env.step("dear ben 8 km")[1] == 0.0


def test_a_forbidden_topic_costs_and_is_no_part_of_the_reward() -> None:
    first, second, third, fourth = (
        {"length": "detailed"},
        {TOPIC: "money"},
        {TOPIC: "sport"},
        {"units": "metric"},
    )
    env, paid = asked([first, second, third, fourth]), []
    for topic in ("money", "money", "money", "sport"):
        _, reward, _, _, info = env.step(f"8 km and {topic}")
        paid.append((reward, info["costs"]))
    # Before it was said it is free; after the change of mind money may be mentioned again, and sport may not.
    assert paid == [(0.25, {"forbidden": cost}) for cost in (0.0, 1.0, 0.0, 1.0)]
    assert info["success"] is False, "all tastes were met, but not the wish"


def test_the_reward_of_all_people_ignores_what_one_says() -> None:
    for said in ({}, {"length": "detailed", "units": "imperial", "tone": "warm"}):
        env = asked([said] * 4, reward="people")
        rewards = [
            env.step(each)[1] for each in ("8 km", "5 miles", "dear ann 5 miles and sport", "dear ben 8 km")
        ]
        # Shares of people: brief 0.6, metric 0.7, plain 0.6.
        by_hand = [(0.6 + 0.7 + 0.6) / 12, (0.6 + 0.3 + 0.6) / 12, (0.4 + 0.3 + 0.4) / 12, (0.6 + 0.7) / 12]
        assert rewards == pytest.approx(by_hand)


def test_a_person_is_read_from_text_and_comes_in_every_episode() -> None:
    person = Person.of("ann money warm imperial detailed")
    assert str(person) == ANN and Person.of(str(person)) == person
    env = Personal(person=ANN, silent=True)
    for seed in range(20):
        assert "ann: hello" in env.reset(seed=seed)[0]
        assert all(not each.said and each.wishes == person.wishes for each in env.questions)
    for text in (
        "",
        "ann",
        "ann brief",
        "tom brief metric warm money",
        "ann brief detailed metric money",
        ANN + " sport",
    ):
        with pytest.raises(ValueError, match="such as 'ann detailed imperial warm money'"):
            Personal(person=text)
    with pytest.raises(ValueError, match="use all"):
        Personal(person=ANN, split="heldout")
    with pytest.raises(ValueError, match="person or people"):
        Personal(reward="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("level", LEVELS)
def test_who_remembers_serves_everybody(level: int) -> None:
    answers = QUESTIONS * len(LEVELS[level])
    for split in ("train", "heldout"):
        for seed in SEEDS:
            found = played(0.0, seed, level=level, split=split)
            assert found.success and found.cost == 0.0 and len(found.actions) == answers
            assert sum(found.rewards) == pytest.approx(1.0)
    careless = [played(1.0, seed, level=level) for seed in SEEDS]
    assert sum(sum(each.rewards) for each in careless) / len(SEEDS) == pytest.approx(0.5, abs=0.05)
    assert not any(each.success for each in careless)
    # Half of such answers have a topic, half of the pairs of topics hold the forbidden one, half of the draws hit it.
    if level == 1:  # where it is known from the first answer on
        assert sum(each.cost for each in careless) / len(SEEDS) / answers == pytest.approx(1 / 8, abs=0.03)


@pytest.mark.parametrize("level", LEVELS)
def test_wishes_are_said_once_and_contradicted_as_often_as_the_level_says(level: int) -> None:
    env = Personal(level)
    for seed in SEEDS:
        env.reset(seed=seed)
        known: Wishes = {}
        for place, (first, changes) in enumerate(LEVELS[level]):
            opening, follow_up = env.questions[place * QUESTIONS : (place + 1) * QUESTIONS]
            again = {matter for matter in opening.said if matter in known}
            assert len(again) == changes and len(opening.said) == first + changes and not follow_up.said
            assert all(opening.said[matter] != known[matter] for matter in again)
            known = known | opening.said
            assert opening.wishes == follow_up.wishes == known
        assert set(known) == {*TASTES, TOPIC}


def test_without_memory_a_session_begins_a_conversation_and_shows_the_same() -> None:
    for seed in range(20):
        with_memory, without = (
            played(0.5, seed, level=2, memory=memory, instructions=False).observations
            for memory in (True, False)
        )
        for place, (one, other) in enumerate(zip(with_memory[:-1], without[:-1], strict=True)):
            opens = place > 0 and place % QUESTIONS == 0
            assert messages_of(other)[0].get("reset_context", False) == opens
            assert isinstance(one, str) and messages_of(other)[0]["content"] == one


def test_people_of_one_split_are_never_of_the_other_and_are_as_many_sided() -> None:
    people: dict[str, Counter[str]] = {}
    for split in ("train", "heldout"):
        env = Personal(split=split)
        people[split] = Counter()
        for seed in range(1000):
            env.reset(seed=seed)
            people[split][str(env.person)] += 1
    assert not people["train"].keys() & people["heldout"].keys()
    assert len(people["heldout"]) > 40
    for counted in people.values():
        words = Counter(
            word for person, count in counted.items() for word in person.split() for _ in range(count)
        )
        for usual, share, other in TASTES.values():
            assert words[usual] / (words[usual] + words[other]) == pytest.approx(share, abs=0.1)


def test_everything_at_once_is_no_answer() -> None:
    env = Personal(instructions=False)
    seen = str(env.reset(seed=0)[0])
    for action in (
        "",
        seen,
        "8 km 5 miles",
        "8 km and money and sport",
        "dear 8 km",
        "dear ann",
        "08 km or",
        "-8 km",
    ):
        env.reset(seed=0)
        observation, reward, terminated, truncated, info = env.step(action)
        assert (observation, reward, terminated, truncated) == (UNREADABLE, 0.0, True, False)
        assert info == {"malformed": True, "success": False, "costs": {"forbidden": 0.0}}


@pytest.mark.parametrize("level", LEVELS)
def test_every_word_is_in_the_list(level: int) -> None:
    for seed in SEEDS:
        found = played(0.5, seed, level=level, instructions=False)
        text = "\n".join([*map(str, found.observations), *found.actions])
        assert set(re.findall("[a-z]{2,}", text)) <= set(WORDS)


def test_a_notebook_is_what_remains_of_a_session_without_memory() -> None:
    env = wrapped(lambda: Personal(1, memory=False, instructions=False), [NotebookSettings(style="plain")])
    player = Player(0.0, 0)
    observation = env.reset(seed=0)[0]
    wished = messages_of(observation)[-1]["content"].splitlines()[1]
    env.step(f"write(person, {wished.replace(', ', ' ')})")
    for _ in range(QUESTIONS):
        observation = env.step(player.act(observation))[0]
    opening = messages_of(observation)
    assert opening[0]["reset_context"] and opening[0]["tools"], "the tools are announced again"
    assert wished not in str(opening)
    assert wished.replace(", ", " ") in str(env.step("read(person)")[0])
