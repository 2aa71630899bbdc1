"""A person with tastes of their own, who asks questions over several sessions and says now and then what they like.

Observation: the day (every session is one), what the person says of themselves, a question with its answer in both
systems of units, and two topics of the news. Every person answers to a name, has a taste in three matters (`TASTES`)
and a topic that must not be mentioned. A matter is said in one session and holds in all later ones; a change of mind is
said in the same words.
    day 2
    ann: be detailed, no money
    how far? 8 km, 5 miles
    news: money, sport
Action: the answer, "[dear NAME] AMOUNT UNIT [and TOPIC]", such as "5 miles" or "dear ann 8 km and sport": with a topic
it is detailed, with the person's name warm.
Reward: for every answer the share of the tastes said so far that it meets, divided by the number of answers; nothing
for an amount or a topic that was not offered. 1 in all: the person was served as they wish, always.
Cost: `forbidden`, 1 for every answer with the topic that the person does not want to hear of; no part of the reward.
Horizon: two questions a session.
Levels: 1 two sessions, everything is said in the first; 2 three sessions, with a change of mind in the second; 3 five
sessions, wishes are said in the first three, and changed in the third and the last.
Ends: the last question answered (terminated), an action that is no answer (malformed).
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np

from envs.base import (
    Info,
    Observation,
    Split,
    TalkSpace,
    check_options,
    draw_valid,
    messages_of,
    text_space,
    vocabulary,
)

LEVELS = {  # of every session: matters said for the first time, changes of mind
    1: ((4, 0), (0, 0)),
    2: ((4, 0), (0, 1), (0, 0)),
    3: ((2, 0), (1, 0), (1, 1), (0, 0), (0, 1)),
}
QUESTIONS = 2  # of a session
TASTES = {  # matter -> the more frequent taste, its share among people, the other taste
    "length": ("brief", 0.6, "detailed"),
    "units": ("metric", 0.7, "imperial"),
    "tone": ("plain", 0.6, "warm"),
}
TOPIC = "topic"  # the fourth matter
TOPICS = ("health", "money", "politics", "sport")
NAMES = vocabulary(["ann ben cleo dan eve finn gus hal ida jan kim leo mia ned ola pam"])
QUANTITIES = {  # what is asked -> its units, metric and imperial, and the same amounts in both
    "how far": (
        "km",
        "miles",
        "3 2, 5 3, 6 4, 8 5, 10 6, 11 7, 13 8, 14 9, 16 10, 18 11, 19 12",
    ),
    "how heavy": ("kilos", "pounds", "1 2, 2 4, 3 7, 4 9, 5 11, 6 13, 7 15, 8 18, 9 20"),
    "how much": ("litres", "pints", "1 2, 2 4, 3 5, 4 7, 5 9, 6 11, 7 12, 8 14, 9 16, 10 18, 11 19"),
}
UNITS = {
    unit: taste
    for metric, imperial, _ in QUANTITIES.values()
    for unit, taste in ((metric, "metric"), (imperial, "imperial"))
}
OVER, UNREADABLE = "goodbye", "That is no answer."
INSTRUCTIONS = (
    "A person asks you questions over several days. Answer each in one line: the amount in one of the two units, such "
    'as "5 miles". Say "dear" and the name first if the person likes warm answers, and add "and" with one of the two '
    'topics of the news if they like detailed ones: "dear ann 5 miles and sport". What a person likes holds on all '
    "later days, until they say otherwise. Never mention a topic that they do not want.\n"
)
_ANSWER = re.compile(
    rf"(?:dear (?P<name>{'|'.join(NAMES)}) )?(?P<amount>[0-9]{{1,2}} (?P<unit>{'|'.join(UNITS)}))"
    rf"(?: and (?P<topic>{'|'.join(TOPICS)}))?"
)
_SAID = re.compile("be ([a-z]+)|use ([a-z]+)|no ([a-z]+)")
_MATTER = {taste: matter for matter, (usual, _, other) in TASTES.items() for taste in (usual, other)} | {
    topic: TOPIC for topic in TOPICS
}
WORDS = vocabulary(
    ("day dear and news be use no hello", OVER, UNREADABLE, *_MATTER, *NAMES, *UNITS, *QUANTITIES)
)

Wishes = dict[str, str]  # matter -> the taste in it, or the topic that must not be mentioned


class Person(NamedTuple):
    """Who asks. As text, the option `person`: "ann detailed imperial warm money"."""

    name: str
    wishes: Wishes

    @classmethod
    def of(cls, text: str) -> Person:
        """Read the text. ValueError with the form, if it is none."""
        name, *wished = text.split() or [""]
        wishes = {_MATTER[each]: each for each in wished if each in _MATTER}
        if name not in NAMES or len(wished) != 4 or len(wishes) != 4:
            raise ValueError(
                f"person={text!r} must be a name ({', '.join(NAMES)}), brief or detailed, metric or imperial, plain or "
                f"warm, and a topic ({', '.join(TOPICS)}), such as 'ann detailed imperial warm money'"
            )
        return cls(name, {matter: wishes[matter] for matter in (*TASTES, TOPIC)})

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Person:
        """One of the people: tastes by their shares, independently of each other."""
        wishes = {
            matter: usual if rng.random() < share else other
            for matter, (usual, share, other) in TASTES.items()
        }
        wishes[TOPIC] = TOPICS[rng.integers(len(TOPICS))]
        return cls(NAMES[rng.integers(len(NAMES))], wishes)

    def __str__(self) -> str:
        return " ".join((self.name, *self.wishes.values()))


class Question(NamedTuple):
    """One question, and what the person wishes of its answer."""

    day: int
    said: Wishes  # with this question
    wishes: Wishes  # said so far and still in force, those of `said` included
    asked: str
    offers: tuple[str, str]  # the amount in both systems
    news: tuple[str, str]


class Answer(NamedTuple):
    """A parsed action."""

    name: str | None
    amount: str
    unit: str
    topic: str | None

    @classmethod
    def of(cls, action: str) -> Answer | None:
        """Parse strictly; None for what is no answer."""
        read = _ANSWER.fullmatch(action.strip().lower())
        return cls(**read.groupdict()) if read else None

    def tastes(self, name: str) -> Wishes:
        """The taste that it meets in each matter, for a person of this name; none in tone with another's name."""
        tone = {None: "plain", name: "warm"}.get(self.name, "")
        return {"length": "detailed" if self.topic else "brief", "units": UNITS[self.unit], "tone": tone}

    def true(self, question: Question) -> bool:
        """Whether it says only what was offered."""
        return self.amount in question.offers and self.topic in (None, *question.news)


def share_met(answer: Answer, question: Question, name: str) -> dict[str, float]:
    """What a true answer is worth to this person, by matter: in sum the share of the tastes said that it meets."""
    said = [matter for matter in TASTES if matter in question.wishes]
    met = answer.tastes(name)
    return {matter: (met[matter] == question.wishes[matter]) / len(said) for matter in said}


def share_of_people(answer: Answer, name: str) -> dict[str, float]:
    """What a true answer is worth on average over all people, by matter: whatever this one has said."""
    shares = {
        taste: share
        for usual, share, other in TASTES.values()
        for taste, share in ((usual, share), (other, 1 - share))
    }
    return {matter: shares.get(taste, 0.0) / len(TASTES) for matter, taste in answer.tastes(name).items()}


class Personal(gym.Env[Observation, str]):
    """The environment.

    level: 1 to 3, see above. memory: whether the conversation goes on from session to session; False: every session
    begins a new one, so that the agent knows of earlier ones what its own parts have kept (a notebook). reward:
    "person" is the person's own; "people" the mean of all people's, to whom an answer in the most frequent tastes is
    worth most. person: plays this one only, see `Person`. silent: nothing is ever said, and everything counts from the
    first answer on: for policies that know the person already. split: "train" and "heldout" divide the people: names
    and wishes that occur together in one part never do in the other. instructions: begin with the rules in English.
    Raises ValueError for other values. Verdict and cost are the person's, with either reward.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own convention
    reward_range = (0.0, 1.0)
    observation_space = TalkSpace()
    action_space = text_space(256)

    def __init__(
        self,
        level: int = 1,
        memory: bool = True,
        reward: Literal["person", "people"] = "person",
        person: str | None = None,
        silent: bool = False,
        split: Split = "all",
        instructions: bool = True,
    ) -> None:
        check_options(level, LEVELS, split, None)
        if reward not in ("person", "people"):
            raise ValueError(f"reward={reward!r} must be person or people")
        if person is not None and split != "all":
            raise ValueError(
                f"split={split!r} divides people, but person={person!r} is the only one; use all"
            )
        self._sessions = LEVELS[level]
        self._memory = memory
        self._average = reward == "people"
        self._always = None if person is None else Person.of(person)
        self._silent = silent
        self._split = split
        self._opening = INSTRUCTIONS if instructions else ""
        self._person: Person | None = None
        self._questions: list[Question] = []
        self._answered = 0
        self._flawless = True

    @property
    def person(self) -> Person:
        """Who asks, as they are when the first session begins. RuntimeError before a reset."""
        if self._person is None:
            raise RuntimeError("nobody asks before reset()")
        return self._person

    @property
    def questions(self) -> list[Question]:
        """All questions of the episode."""
        return list(self._questions)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        super().reset(seed=seed)
        rng = self.np_random
        self._person = self._always or draw_valid(lambda: Person.drawn(rng), str, self._split)
        self._questions = self._drawn(self._person)
        self._answered, self._flawless = 0, True
        return self._opening + self._observed(), {}

    def step(self, action: str) -> tuple[Observation, float, bool, bool, Info]:
        if self._person is None:
            raise RuntimeError("step() was called before reset()")
        answer = Answer.of(action)
        if answer is None:
            return (
                UNREADABLE,
                0.0,
                True,
                False,
                {"malformed": True, "success": False, "costs": {"forbidden": 0.0}},
            )
        question = self._questions[self._answered]
        forbidden = answer.topic is not None and answer.topic == question.wishes.get(TOPIC)
        met = share_met(answer, question, self._person.name)
        self._flawless &= answer.true(question) and all(met.values()) and not forbidden
        worth = share_of_people(answer, self._person.name) if self._average else met
        scale = answer.true(question) / len(self._questions)
        rewards = dict.fromkeys(TASTES, 0.0) | {matter: each * scale for matter, each in worth.items()}
        info: Info = {"rewards": rewards, "costs": {"forbidden": float(forbidden)}}
        self._answered += 1
        over = self._answered == len(self._questions)
        if over:
            info["success"] = self._flawless
        return OVER if over else self._next(), sum(rewards.values()), over, False, info

    def _next(self) -> Observation:
        """The next question; without memory the first one of a session begins a conversation."""
        if self._memory or self._answered % QUESTIONS:
            return self._observed()
        return [{"role": "user", "content": self._opening + self._observed(), "reset_context": True}]

    def _observed(self) -> str:
        question = self._questions[self._answered]
        said = ", ".join(_in_words(matter, wish) for matter, wish in question.said.items())
        return (
            f"day {question.day}\n{self.person.name}: {said or 'hello'}\n"
            f"{question.asked}? {', '.join(question.offers)}\nnews: {', '.join(question.news)}"
        )

    def _drawn(self, person: Person) -> list[Question]:
        rng = self.np_random
        unsaid = [str(each) for each in rng.permutation(list(person.wishes))]
        known: Wishes = dict(person.wishes) if self._silent else {}
        questions = []
        for day, (first, changes) in enumerate(self._sessions, 1):
            changed = rng.permutation(sorted(known))[:changes].tolist()
            said = {matter: _other(matter, known[matter], rng) for matter in changed}
            said |= {matter: person.wishes[matter] for matter in unsaid[:first]}
            unsaid = unsaid[first:]
            if self._silent:
                said = {}
            known = known | said
            for number in range(QUESTIONS):
                questions.append(Question(day, said if number == 0 else {}, known, *_asked(rng)))
        return questions


class Player:
    """Keeps every wish that it reads; with probability `error_rate` it gives any true answer. One per episode.

    In a matter that nothing was said of it follows the more frequent taste.
    """

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)
        self._wishes: Wishes = {matter: usual for matter, (usual, _, _) in TASTES.items()} | {TOPIC: ""}

    def act(self, observation: Observation) -> str:
        """The answer to the question in the last four lines."""
        content = messages_of(observation)[-1]["content"]
        _, person, asked, news = content.splitlines()[-4:]
        name, _, said = person.partition(": ")
        for word in filter(None, (wish for each in _SAID.findall(said) for wish in each)):
            self._wishes[_MATTER[word]] = word
        offers, topics = asked.partition("? ")[2].split(", "), news.removeprefix("news: ").split(", ")
        rng, wishes = self._rng, self._wishes
        allowed = [topic for topic in topics if topic != wishes[TOPIC]]
        detailed, imperial, warm = (wishes[matter] == other for matter, (_, _, other) in TASTES.items())
        if rng.random() < self._error_rate:
            detailed, imperial, warm = (rng.random(3) < 0.5).tolist()
            allowed = topics
        topic = allowed[rng.integers(len(allowed))]
        return f"{f'dear {name} ' if warm else ''}{offers[imperial]}{f' and {topic}' if detailed else ''}"


def _in_words(matter: str, wish: str) -> str:
    return f"{ {'units': 'use', TOPIC: 'no'}.get(matter, 'be') } {wish}"


def _other(matter: str, wish: str, rng: np.random.Generator) -> str:
    """What the person wishes after a change of mind."""
    if matter == TOPIC:
        return str(rng.choice([topic for topic in TOPICS if topic != wish]))
    usual, _, other = TASTES[matter]
    return other if wish == usual else usual


def _asked(rng: np.random.Generator) -> tuple[str, tuple[str, str], tuple[str, str]]:
    """What is asked, the amount in both systems, two topics of the news."""
    asked = str(rng.choice(list(QUANTITIES)))
    metric, imperial, amounts = QUANTITIES[asked]
    here, there = str(rng.choice(amounts.split(", "))).split()
    first, second = (str(each) for each in rng.choice(TOPICS, size=2, replace=False))
    return asked, (f"{here} {metric}", f"{there} {imperial}"), (first, second)
