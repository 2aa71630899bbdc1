"""Twenty questions: find out by yes-or-no questions which thing is meant, then name it, within few turns.

Observation: the first one lists the candidates, "drum ant bell ..."; every later one is "yes" or "no".
Action: "is it PROPERTY", one of fifteen, to ask, or "it is THING", any of the 64, to guess; only one guess.
Reward: 1 for the right guess, else 0; with `cost`, a right guess is paid 1 - cost per earlier question, at least 0.
Horizon: `max_turns`, the guess included.
Levels: 1, 2, 3 and 4 have 8, 16, 32 and 64 candidates and 5, 6, 7 and 9 turns: one more than exact halving and
the guess take, and two more at level 4.
Ends: the guess (terminated), turns used up (truncated), an action that is neither question nor guess (malformed).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from envs.base import Info, Split, TextEnv, check_options, draw_valid, vocabulary

CANDIDATES = {1: 8, 2: 16, 3: 32, 4: 64}
TURNS = {1: 5, 2: 6, 3: 7, 4: 9}

# Each property -> the things that have it; no two things have the same set of properties.
PROPERTIES: dict[str, frozenset[str]] = {
    named: frozenset(things.split())
    for named, things in {
        "alive": "ant bat bear butterfly cactus chicken cow crab crocodile dog duck eagle elephant frog lion mouse oak "
        "parrot penguin rose shark snake wasp whale wolf",
        "bigger than a person": "bear bed boat bridge bus castle cow crocodile elephant fridge lion moon oak piano "
        "plane river shark ship whale",
        "able to fly": "balloon bat butterfly duck eagle kite parrot plane wasp",
        "found in water": "boat crab crocodile duck frog pearl penguin river shark ship whale",
        "on four legs": "bear bed chair cow crocodile dog elephant frog lion mouse wolf",
        "held in one hand": "ant apple ball balloon banana bat butterfly candle coin crab flute frog hammer knife "
        "mouse orange pearl pencil phone ring rose spoon sword thorn wasp",
        "found in most homes": "apple ball banana bed bread candle chair clock coin fridge knife orange pencil phone "
        "radio spoon",
        "made of metal": "bell bicycle bridge bus coin crown flute fridge hammer knife plane ring ship spoon sword",
        "round": "apple ball balloon clock coin crown drum moon orange pearl ring",
        "sweet": "apple banana cake orange",
        "a hunter": "bat bear crocodile eagle frog lion penguin shark snake wolf",
        "from hot countries": "banana cactus crocodile elephant lion orange parrot",
        "able to make music": "bell drum flute guitar phone piano radio",
        "sharp": "cactus knife pencil rose sword thorn wasp",
        "made to carry people": "bicycle boat bus plane ship",
    }.items()
}
THINGS = tuple(sorted(frozenset().union(*PROPERTIES.values())))
ASK, GUESS = "is it ", "it is "
YES, NO, UNREADABLE = "yes", "no", "That is neither a question nor a guess."
INSTRUCTIONS = (
    "One of the things in the last line is meant; find out which. Ask by a line such as "
    f'"{ASK}{next(iter(PROPERTIES))}", with one of: {", ".join(PROPERTIES)}. Or guess, once, by a line such as '
    f'"{GUESS}{THINGS[0]}". '
    "You have {turns} turns, the guess included.\n"
)
WORDS = vocabulary((ASK, GUESS, YES, NO, UNREADABLE, *PROPERTIES, *THINGS))

Things = frozenset[str]


class TwentyQuestions(TextEnv):
    """The environment.

    level: see above. max_turns: questions and guess before truncation; None for the level's own. cost: per question, 0
    to 0.1. things: how many of the 64 are ever candidates, spread evenly: fewer are easier to learn. split: "train" and
    "heldout" divide the lists of candidates as shown, regardless of the seed; "all" contains both. The thing meant is
    drawn independently of the split; else a part would exclude some things, and a policy could exploit that.
    instructions: begin with the rules in English. Raises ValueError for other values.
    """

    def __init__(
        self,
        level: int = 1,
        max_turns: int | None = None,
        cost: float = 0.0,
        things: int = len(THINGS),
        split: Split = "all",
        instructions: bool = True,
    ) -> None:
        check_options(level, CANDIDATES, split, max_turns)
        if not 0 <= cost <= 0.1:
            raise ValueError(f"cost={cost} must lie in [0, 0.1]")
        if not CANDIDATES[level] <= things <= len(THINGS):
            raise ValueError(
                f"things={things} must lie between the level's candidates, {CANDIDATES[level]}, and {len(THINGS)}"
            )
        self._level = level
        self._max_turns = max_turns or TURNS[level]
        self._cost = cost
        self._things = [THINGS[place * len(THINGS) // things] for place in range(things)]
        self._split = split
        self._opening = INSTRUCTIONS.format(turns=self._max_turns) if instructions else ""
        self._meant = ""
        self._turns = 0

    @property
    def meant(self) -> str:
        """The thing to be found."""
        return self._meant

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        listed = draw_valid(self._attempt, str, self._split)
        self._meant = listed.split()[self.np_random.integers(CANDIDATES[self._level])]
        self._turns = 0
        return self._opening + listed, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if not self._meant:
            raise RuntimeError("step() was called before reset()")
        told = action.strip().lower()
        prefix = next((each for each in (ASK, GUESS) if told.startswith(each)), "")
        name = told.removeprefix(prefix)
        if not (prefix == ASK and name in PROPERTIES) and not (prefix == GUESS and name in THINGS):
            return UNREADABLE, 0.0, True, False, {"malformed": True, "success": False}
        questions = self._turns
        self._turns += 1
        if prefix == GUESS:
            right = name == self._meant
            return YES if right else NO, paid(right, questions, self._cost), True, False, {"success": right}
        answer = YES if self._meant in PROPERTIES[name] else NO
        truncated = self._turns >= self._max_turns
        return answer, 0.0, False, truncated, {"success": False} if truncated else {}

    def _attempt(self) -> str | None:
        """A list of candidates; None if the level's turns do not suffice to tell them apart."""
        listed = self.np_random.choice(self._things, size=CANDIDATES[self._level], replace=False).tolist()
        return " ".join(listed) if questions_needed(frozenset(listed)) < TURNS[self._level] else None


def paid(right: bool, questions: int, cost: float) -> float:
    """The reward of a guess after this many questions, in [0, 1]."""
    return max(0.0, 1.0 - cost * questions) if right else 0.0


class Player:
    """Asks the question that halves the candidates; with probability `error_rate` it acts at random.

    A random action is a guess one time in sixteen. One per episode.
    """

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)
        self._candidates: Things = frozenset()
        self._left: Things = frozenset()
        self._asked = ""

    def act(self, observation: str) -> str:
        """A question or the guess; the first observation contains the candidates."""
        if observation in (YES, NO):
            having = PROPERTIES[self._asked]
            self._left = self._left & having if observation == YES else self._left - having
        else:
            self._candidates = self._left = frozenset(observation.splitlines()[-1].split())
        if self._rng.random() < self._error_rate:
            return self._anything()
        return f"{GUESS}{next(iter(self._left))}" if len(self._left) == 1 else self._ask(halving(self._left))

    def _anything(self) -> str:
        chosen = self._rng.integers(len(PROPERTIES) + 1)
        if chosen < len(PROPERTIES):
            return self._ask(tuple(PROPERTIES)[chosen])
        return GUESS + str(self._rng.choice(sorted(self._candidates)))

    def _ask(self, name: str) -> str:
        self._asked = name
        return ASK + name


@lru_cache(maxsize=65536)
def halving(left: Things) -> str:
    """The property that divides these things most evenly; the first one on ties."""
    return min(PROPERTIES, key=lambda name: abs(2 * len(PROPERTIES[name] & left) - len(left)))


@lru_cache(maxsize=65536)
def questions_needed(left: Things) -> int:
    """The maximum number of questions that `halving` asks until one of these things is left."""
    if len(left) == 1:
        return 0
    having = PROPERTIES[halving(left)] & left
    return 1 + max(questions_needed(having), questions_needed(left - having))
